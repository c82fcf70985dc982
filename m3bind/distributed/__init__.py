"""Losses of a batch that several ranks hold together.

`clip_loss`, `siglip_loss` and `similarity_distill` take what those of `m3bind` take: of features,
labels and ids this rank's part, in the order of the ranks the whole batch. Parts may differ in
size, and be empty. Labels count the columns of all ranks; ids mean the same everywhere. With one
rank, or without a process group, they are those of `m3bind`.

The contract
    The value of a mean or a sum is that of the whole batch, the same bits on every rank; "none"
    gives this rank's rows and columns. Features, scale and bias carry W times their gradient (the
    scale and bias: W times this rank's part of it), so that the mean over the W ranks, which DDP
    and FSDP take, is the gradient of one process on the whole batch, for every parameter. With
    "none", the whole is the sum of what all ranks call `backward` on. It holds for any sub-group,
    number of rows and columns, accumulation, and a second backward. Every rank calls forward and
    backward, with the same upstream gradient, also a rank whose features need no gradient. Several
    losses of a step go backward in the same order on every rank. The number of the call travels
    along: where other ranks are in another one of the same size, all raise a ValueError that names
    both (on a GPU at the next call, to wait for nothing); where sizes differ, the transport fails.

Arguments of all three
    group: a ProcessGroup, a DeviceMesh of one dimension, or None, the default group. Features that
        are DTensors placed (Shard(0),) on a mesh of one dimension bring their own; they get their
        gradient once and not W times, since DTensor adds up where DDP averages.
    scheme: "gather", "circulate", or "auto": circulate, which has fewer matrix products, where they
        hide its transfers: from 16384 columns a rank, on average (at 700 TFLOP/s and 50 GB/s), on
        CPUs from 1024 (measured with D = 512 on up to 4 ranks: docs/scaling.md); and where gathered
        features would take more than a sixteenth of the smallest device's memory. Else gather.
    sizes: "exchange" finds sizes, and what does not fit together, by one small collective a call:
        every rank then raises the same ValueError, and none waits for another. "static" leaves it
        out: the caller vouches for equal sizes and arguments on all ranks, and that the same
        features need gradients; "auto" then leaves memory out of account.
    check: also look for NaN in what is passed, on all ranks (a synchronisation on a GPU).
    reduce_scale: the scale's and bias's gradient is the true one on each rank, for parameters that
        nothing averages.

The schemes, for B = N = M rows of D features of s bytes, in equal parts on W ranks. Uneven parts
are filled up to the longest where they are gathered, and travel as they are where they circulate
(an empty one as one row).

    ============ ==================== ==========================================================
    scheme       memory a rank        bytes sent a rank, features and their gradients
    ============ ==================== ==========================================================
    gather       2 * B * D * s        2 * B * D * s * (W - 1) / W: x and y once each
    circulate    O(B / W * D)         2 * B * D * s * (W - 1) / W + 4 * B * D: y twice, and its
                                      float32 gradient, which goes all the way round
    ============ ==================== ==========================================================

    Matrix products a rank, in units of B / W * B * D: clip_loss 5 gathering and 4 circulating,
    siglip_loss 4 and 3 (its gradient is known in the forward pass, y travels once), and
    similarity_distill 8 and 6. Where memory_budget holds all dot products, clip_loss takes one and
    similarity_distill two fewer. Beside the features travel O(B) numbers: 24 bytes a column for its
    statistics, 32 for each row and column in the backward pass and for the call's number, 8 for
    each label or id. The schemes give the same numbers to rounding, each the same bits in every
    run. Circulating, gradients of 16-bit features are rounded once a block before they are added up
    in float32: 1.4 times the rounding error of a single one.

A rank that is lost ends the others with a RuntimeError within the group's timeout. They look for
five more seconds, in the store by which they met, for the one to name. torch.compile leaves these
calls out of its graphs. Within torch.func they raise; there is no double backward and no forward
mode.
"""

from m3bind.distributed.clip import clip_loss
from m3bind.distributed.distill import similarity_distill
from m3bind.distributed.groups import world_size
from m3bind.distributed.parts import first_column, mean, similarity_lse
from m3bind.distributed.siglip import siglip_loss

__all__ = [
    "clip_loss",
    "first_column",
    "mean",
    "siglip_loss",
    "similarity_distill",
    "similarity_lse",
    "world_size",
]
