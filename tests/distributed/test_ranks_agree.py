"""Ranks that do not fit together raise the same error, and none waits; a lost rank ends all."""

import os
import re
import subprocess
import time
from types import SimpleNamespace

import models
import numpy as np
import pytest
import torch
import torch.distributed as dist
import wrong_calls
from pool import SECONDS, Ranks
from test_losses_over_ranks import LOSSES, SCHEMES

from m3bind.distributed import lost, order

WRONG = {
    "features a row": ({1: {"features": 7}}, "rank 1 has features a row: 7; the others have"),
    "dtype": ({2: {"dtype": torch.float64}}, "rank 2 has features of torch.float64; the others"),
    "nan": ({1: {"nan": True, "check": True}, 0: {"check": True}, 2: {"check": True}},
            "on rank 1: NaN in x (check=True)"),
    "nan in others": ({i: {"negatives": torch.full((2, 8), torch.nan if i == 2 else 1.0),
                           "check": True} for i in range(3)},
                      "on rank 2: NaN in negatives (check=True)"),
    "nan in a scale": ({i: {"scale": torch.tensor(torch.nan if i == 1 else 5.0), "check": True}
                        for i in range(3)}, "on rank 1: NaN in logit_scale (check=True)"),
    "no float": ({1: {"margin": 10**400}}, "on rank 1: margin: the number is too large"),
    "numbers": ({1: {"scale": 50.0}}, "rank 1 has logit_scale=50.0; the others have logit_scale=5"),
    "torch.func": ({1: {"within": "torch.func"}}, "on rank 1: called within torch.func, which"),
    "forward mode": ({2: {"within": "forward mode"}}, "on rank 2: x has a tangent; over ranks"),
    "reduction": ({0: {"reduction": "sum"}}, "rank 0 has reduction='sum'; the others have"),
    "scheme": ({i: {"scheme": s} for i, s in enumerate(("gather", "circulate", "gather"))},
               "rank 1 has scheme='circulate'; the others have scheme='gather'"),
    "unknown scheme": ({1: {"scheme": "ring"}}, "on rank 1: scheme='ring'"),
    "unknown sizes": ({2: {"sizes": "x"}}, "on rank 2: sizes='x'"),
    "astral text": ({0: {"scheme": "\U0001f600" * 4000}}, "on rank 0: scheme="),
    "ids on one rank": ({2: {"mask_ids": torch.arange(4)}}, "rank 2 has mask_ids='given'; the"),
    "grad mode": ({1: {"grad": False}}, "rank 1 has gradients off (torch.no_grad); the others"),
    "label": ({1: {"labels": torch.tensor([0, 12, 3, 4])}, 0: {"labels": torch.arange(4)},
               2: {"labels": torch.arange(4)}},
              "on rank 1: column 12 is named, but all ranks together have 12"),
    "kind of ids": ({1: {"mask_ids": torch.rand(4)}, 0: {"mask_ids": torch.arange(4)},
                     2: {"mask_ids": torch.arange(4)}},
                    "on rank 1: mask_ids of the rows must be an int64 tensor, not torch.float32"),
    "two wrong ranks": ({0: {"scale": "1"}, 2: {"margin": "x"}},
                        "on rank 0: logit_scale must be a number or a tensor, not str; on rank 2"),
    "rows left over": ({1: {"short": True}}, "on rank 1: x has 4 rows, y has 3: row i of x"),
    "reference": ({i: {"backend": "reference"} for i in range(3)}, "backend='reference' holds"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_all_ranks_raise_the_same(pools, name):
    changes, words = WRONG[name]
    pool = pools(3)
    start = time.monotonic()
    found = pool.run(wrong_calls.caught, [(changes,)] * 3)
    assert time.monotonic() - start < SECONDS / 2  # nobody waited in vain
    assert len(set(found)) == 1 and found[0] is not None
    assert found[0].startswith("clip_loss: ") and words in found[0]
    assert pool.run(wrong_calls.caught, [({},)] * 3) == [None] * 3  # and go on


def test_ranks_in_different_losses(pools):
    pool = pools(3)
    found = pool.run(wrong_calls.caught, [({1: {"loss": "siglip_loss"}},)] * 3)
    assert len(set(found)) == 1
    assert found[0].startswith(
        "m3bind.distributed: rank 1 has loss='siglip_loss'; the others have loss='clip_loss'"
    )


@pytest.mark.parametrize("changes", (
    {0: {"margin": 0}, 1: {"margin": np.float64(-0.0)}},
    {0: {"z_loss": 0.1 + 0.2}, 1: {"z_loss": 0.3}, 2: {"z_loss": 0.3}},
    {1: {"scale": 5.0 + 1e-6}},  # made on another machine
    {1: {"scale": torch.tensor(5.0)}},
    {2: {"within": "inference mode"}},
    {2: {"within": "inference mode", "labels": torch.arange(4)}, 0: {"labels": torch.arange(4)},
     1: {"labels": torch.arange(4)}},
), ids=str)  # fmt: skip
def test_what_may_differ(pools, changes):
    assert pools(3).run(wrong_calls.caught, [(changes,)] * 3) == [None] * 3


SHARDED = {
    "replicated": ({1: "replicated"}, "on rank 1: x is a DTensor placed (Replicate(),) on a mesh"),
    "one plain": ({0: "plain", 2: "plain"}, "on rank 0: y is no DTensor, as others of x, y"),
    "all plain": ({2: "all plain"},
                  "rank 2 has features='tensors'; the others have features='DTensors'"),
    "ids": ({0: "ids", 1: "ids", 2: "ids"}, "on rank 0: {ids} is a DTensor; pass this rank's part"),
    "scale": ({1: "scale"}, "on rank 1: logit_scale is a DTensor; pass `logit_scale.full_tensor"),
}  # fmt: skip


@pytest.mark.parametrize("op", (*LOSSES, "similarity_lse"))
@pytest.mark.parametrize("name", SHARDED)
def test_all_ranks_raise_the_same_of_tensors_that_are_sharded(pools, name, op):
    changes, words = SHARDED[name]
    words = words.replace("{ids}", "row_ids" if op == "similarity_lse" else "mask_ids")
    pool = pools(3)
    start = time.monotonic()
    found = pool.run(wrong_calls.caught_sharded, [(changes, op)] * 3)
    assert time.monotonic() - start < SECONDS / 2
    assert len(set(found)) == 1 and found[0].startswith(f"{op}: ")
    assert words in found[0]
    assert pool.run(wrong_calls.caught_sharded, [({}, op)] * 3) == [""] * 3


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("sizes", ("exchange", "static"))
@pytest.mark.parametrize("losses, how", (
    (("clip_loss", "clip_loss"), {}),
    (("similarity_distill", "similarity_distill"), {"directions": "columns"}),
    (("siglip_loss", "siglip_loss"), {"reduction": "none"}),
    (("siglip_loss", "siglip_loss"), {"reduce_scale": True}),
))  # fmt: skip
def test_backward_passes_in_another_order(pools, losses, how, sizes, scheme):
    pool, how = pools(3), how | {"sizes": sizes, "scheme": scheme}
    start = time.monotonic()
    found = pool.run(models.backwards, [(1, losses, (4, 4), how)] * 3)
    assert time.monotonic() - start < SECONDS / 2
    assert len(set(found)) == 1
    first, second = (f"{loss} (call {{}} of {{}})" for loss in losses)
    count = int(re.search(r"\(call \d+ of (\d+)\)", found[0])[1])
    for rank, name, call in ((0, first, -1), (1, second, 0), (2, first, -1)):
        assert f"rank {rank} in that of {name.format(count + call, count)}" in found[0]
    assert "call them in the same order on every rank" in found[0]
    assert pool.run(models.backwards, [(0, losses, (4, 4), how)] * 3) == [""] * 3


def test_a_device_is_not_waited_for(monkeypatch):
    """Numbers on it are read at the next call."""
    waited = []
    event = SimpleNamespace(record=lambda: None, synchronize=lambda: waited.append(True))
    monkeypatch.setattr(torch, "get_device_module", lambda _: SimpleNamespace(Event=lambda: event))
    calls = order.History()
    calls.begin("clip_loss"), calls.begin("siglip_loss")
    for found in ([2.0, 2.0], [2.0, 1.0]):
        copied = torch.tensor(found)
        calls.met(SimpleNamespace(device=torch.device("cuda"), to=lambda *_, c=copied, **__: c))
    assert not waited
    with pytest.raises(ValueError, match=r"rank 1 in that of clip_loss \(call 1 of 2\)"):
        calls.begin("clip_loss")
    assert waited == [True, True] and calls.begin("clip_loss") == 3
    with pytest.raises(ValueError, match=r"rank 1 in that of a loss \(call nan of 3\)"):
        calls.met(torch.tensor([3.0, torch.nan]))


@pytest.mark.parametrize("size, last, words", (
    (3, 2, "rank 2 ended"),
    # Not all of the others exchange anything with it: one waits for the timeout.
    pytest.param(4, 2, "rank 2 ended", marks=pytest.mark.slow),
    pytest.param(3, 0, "rank 0 may be the one", marks=pytest.mark.slow),  # it holds the store
))  # fmt: skip
def test_a_lost_rank_ends_the_others_and_is_named(size, last, words):
    timeout = 20
    # Spawned, so that who is gone is a zombie of this process.
    pool = Ranks(size, seconds=timeout, how="spawn")
    try:
        pool.run(wrong_calls.caught, [({},)] * size)  # all are there
        pool.start(models.dies, [(last,)] * size)
        found = pool.answers(timeout + 10)
        assert found.keys() == set(range(size)) - {last}
        for good, (message, seconds) in found.values():
            assert good and "m3bind: a loss over several ranks lost one of them" in message
            assert words in message and seconds < timeout + lost.SECONDS + 2
    finally:
        pool.close()


def test_who_is_named(monkeypatch):
    """Of rank 0, 1 and 2, on one machine or not."""
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(lost, "SECONDS", 0.2)
    gone = subprocess.Popen(["true"])
    gone.wait()
    here = lost._machine()
    for processes, lives, words in (
        ({}, (1, 2), "all of them answer"),
        ({}, (1,), "rank 2 did not answer for 0.2 s"),
        ({1: f"{gone.pid} elsewhere", 2: f"{os.getpid()} {here}"}, (),
         "rank 1 and rank 2 did not answer"),
        ({1: f"{gone.pid} {here}", 2: f"{os.getpid()} {here}"}, (), "rank 1 ended"),
        ({1: f"{gone.pid} {here}", 2: f"{gone.pid} {here}"}, (), "rank 1 and rank 2 ended"),
    ):  # fmt: skip
        store = dist.HashStore()
        for rank, process in processes.items():
            store.set(f"m3bind/process/{rank}", process)
        for rank in lives:
            store.set(f"m3bind/lives/{rank}", "")
        assert lost._who(store, [0, 1, 2]).removeprefix("yet ").startswith(words)
