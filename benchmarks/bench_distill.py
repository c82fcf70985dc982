"""similarity_distill, forward and backward, beside its peers and the floor of six bare GEMMs.

open_clip's row is its DistillClipLoss' distillation term; its contrastive term would be the same
work for everybody. The floor is that of O(N + M) memory. torch.compile keeps both N x N matrices,
which takes four GEMMs; m3bind keeps what its memory_budget holds of them.
"""

from functools import cache, partial

import pytest
import torch
import torch.nn.functional as F
from clip_contestants import AMPLE_MIB
from demands import KEPT
from floor import gemm_floor
from rows import report
from turns import (
    FEATURES,
    SIZES,
    Contestant,
    Taken,
    fullgraph,
    in_turns,
    ours,
    peer,
    step,
    unit_rows,
)

from m3bind.ops import similarity_distill
from m3bind.ops.stats import MEMORY_BUDGET

SCALE, TEACHER_SCALE = 50.0, 100.0


def one_matrix_loss(x, y, scale, teacher_x, teacher_y, teacher_scale):
    """One matrix of the student and one of the teacher: both directions share them."""
    student, teacher = scale * x @ y.T, teacher_scale * teacher_x @ teacher_y.T
    rows = F.cross_entropy(student, teacher.softmax(1))
    columns = F.cross_entropy(student.T, teacher.T.softmax(1))
    return (rows + columns) / 2


def open_clip_loss():
    term = peer("open_clip.loss", "open_clip_torch").DistillClipLoss()

    def loss(x, y, scale, teacher_x, teacher_y, teacher_scale):
        student, student_text = term.get_logits(x, y, scale)
        teacher, teacher_text = term.get_logits(teacher_x, teacher_y, teacher_scale)
        return (term.dist_loss(teacher, student) + term.dist_loss(teacher_text, student_text)) / 2

    return loss


LOSSES = {
    "m3bind": (
        lambda: partial(similarity_distill, kind="ce"),
        f"{ours('similarity_distill')}, memory_budget {MEMORY_BUDGET:g} MiB, as by default, fp32",
    ),
    KEPT: (
        lambda: partial(similarity_distill, kind="ce", memory_budget=AMPLE_MIB),
        f"{ours('similarity_distill')}, memory_budget for all of them, fp32",
    ),
    "m3bind chunked": (
        lambda: partial(similarity_distill, kind="ce", backend="chunked"),
        "plain PyTorch in panels, fp32",
    ),
    "open_clip": (open_clip_loss, "eager, fp32"),
    "torch.compile": (
        lambda: fullgraph(one_matrix_loss), "two matrices, fullgraph, static shapes, fp32",
    ),
}  # fmt: skip
CONTESTANTS = (*LOSSES, "floor")


def contestant(name: str, n: int) -> Contestant:
    if name == "floor":
        return gemm_floor(n, "fp32", logits=2, teacher=1)
    make, setting = LOSSES[name]
    x, y, *teacher = unit_rows(n, 4)
    run = step(make(), (x, y, torch.tensor(SCALE)), *teacher, torch.tensor(TEACHER_SCALE))
    return Contestant(run=run, setting=setting)


@cache
def turns(n: int) -> dict[str, Taken]:
    return in_turns({name: partial(contestant, name, n) for name in CONTESTANTS})


@pytest.mark.parametrize("name", CONTESTANTS)
@pytest.mark.parametrize("n", SIZES)
def test_similarity_distill_forward_backward(benchmark, name, n):
    report(
        benchmark, f"similarity_distill fp32 forward+backward N={n} D={FEATURES}", name,
        turns(n)[name], op="similarity_distill", kind="time", dtype="fp32", n=n,
        flop=12 * n * n * FEATURES,
    )  # fmt: skip


def test_contestants_compute_the_same():
    args = unit_rows(40, 4)
    args = (*args[:2], SCALE, *args[2:], TEACHER_SCALE)
    want = similarity_distill(*args, kind="ce", backend="reference")
    uncompiled = {**LOSSES, "torch.compile": (lambda: one_matrix_loss, "")}
    for loss in (make() for make, _ in uncompiled.values()):
        torch.testing.assert_close(loss(*args), want, rtol=1e-5, atol=1e-5)
