"""The stages' losses and gradients on many ranks are those of one process on the whole batch."""

import functools
import math
import os
import threading
from datetime import timedelta

import bound
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from m3bind.errors import M3BindError
from m3bind.files import claimed
from m3bind.parallel.joining import fresh_store
from m3bind.train.parts import Parts

KINDS = ("pretrain", "mse+kept", "infonce", "relational", "distill")
WHERE = [("ddp", "replicated"), ("fsdp", "replicated"), ("ddp", "split"), ("fsdp", "split")]


@functools.cache
def alone(kind: str, micro: int) -> dict:
    return bound.step(kind, "ddp", "replicated", micro)


def check(kind: str, found: list[dict], micro: int = 1) -> None:
    want = alone(kind, micro)
    got = found[0]["gradients"]
    assert got.keys() == want["gradients"].keys()
    for name, value in want["gradients"].items():
        torch.testing.assert_close(got[name], value, rtol=2e-4, atol=2e-6, msg=name)
    assert all(rank["drawn"] == want["drawn"] for rank in found)
    # A group's norm is of its own experts; together they are all.
    norms = {rank["own"]: rank["norm"] for rank in found}
    assert math.hypot(*norms.values()) == pytest.approx(want["norm"], rel=1e-4)
    for name, value in want["losses"].items():
        those = [rank["losses"][name] for rank in found if name in rank["losses"]]
        assert sum(those) / len(those) == pytest.approx(value, rel=1e-5, abs=1e-6)
    for name, value in want["report"].items():
        those = [rank["report"][name] for rank in found if name in rank["report"]]
        assert those and those == pytest.approx([value] * len(those), rel=1e-4)


CASES = [
    (kind, *where) for kind in KINDS for where in WHERE if (kind, where[1]) != ("pretrain", "split")
]


@pytest.mark.parametrize(("kind", "how", "placing"), CASES)
def test_gradients_are_those_of_one_process(pools, kind, how, placing):
    check(kind, pools(4).run(bound.step, [(kind, how, placing)] * 4))


@pytest.mark.parametrize("how", ("ddp", "fsdp"))
def test_uneven_ranks_and_accumulation(pools, how):
    for kind in ("mse", "distill"):
        check(kind, pools(3).run(bound.step, [(kind, how, "replicated", 3)] * 3), 3)


@pytest.mark.parametrize("reader", [(3, "fsdp", "replicated"), (4, "ddp", "split"), (1,)])
@pytest.mark.parametrize("how", ("ddp", "fsdp"))
@pytest.mark.parametrize("placing", ("replicated", "split"))
def test_parts_of_ranks_are_read_by_any_others(pools, tmp_path, placing, how, reader):
    """Heads of 8 rows on 4 ranks, and scales of one number: some ranks have nothing of it."""
    want = bound.task_of("mse+kept", bound.Placement.of(list(bound.ROWS))).trainable_state()
    given = (tmp_path / "p", how, placing, 200)
    extent, *others = pools(4).run(bound.write_parts, [given] * 4)
    assert others == [extent] * 3 and extent["tensors"] == len(want) + 4
    assert extent["numbers"] == sum(t.numel() for t in want.values()) + 4
    assert len(list((tmp_path / "p").iterdir())) > 8  # more than a file a rank
    if reader == (1,):
        found = [Parts(tmp_path / "p", extent).read("model/")]
    else:
        ranks, *where = reader
        found = pools(ranks).run(bound.read_parts, [(tmp_path / "p", extent, *where)] * ranks)
    for got in found:
        assert got.keys() == want.keys()
        assert all(torch.equal(got[name], value) for name, value in want.items())


def test_what_is_there_more_than_once_is_written_once(pools, tmp_path):
    pools(4).run(bound.write_parts, [(tmp_path / "p", "ddp", "replicated")] * 4)
    sizes = [file.stat().st_size for file in (tmp_path / "p").iterdir()]
    want = bound.task_of("mse", bound.Placement.of(list(bound.ROWS))).trainable_state()
    total = sum(t.nbytes for t in want.values())
    assert len(sizes) == 4 and total < sum(sizes) < total + 4 * 8192
    assert max(sizes) < total / 2  # and no rank writes most of it


@pytest.mark.parametrize("how", ("ddp", "fsdp"))
def test_statistics_are_those_of_the_first_rank(pools, tmp_path, how):
    saved = pools(3).run(bound.save_statistics, [(tmp_path, how, False)] * 3)
    assert [found["layers.1.running_mean"][0].item() for found in saved] == [1, 2, 3]
    for ranks in (3, 4):
        for found in pools(ranks).run(bound.save_statistics, [(tmp_path, how, True)] * ranks):
            assert len(found) == 3 and all((buffer == 1).all() for buffer in found.values())


def test_one_rank_reads_the_headers_of_all_files(pools, tmp_path):
    pools(3).run(bound.save_statistics, [(tmp_path, "ddp", False)] * 3)
    assert pools(3).run(bound.headers_read, [(tmp_path,)] * 3) == [2, 0, 0]


def test_a_rank_that_cannot_write_is_named_by_all(pools, tmp_path):
    ranks = pools(3)
    ranks.start(bound.write_parts_without_space, [(tmp_path / "p",)] * 3)
    said = [text for good, text in ranks.answers().values() if not good]
    assert len(said) == 3
    for text in said:
        line = text.strip().splitlines()[-1]
        assert line.startswith(
            f"m3bind.errors.M3BindError: cannot write {tmp_path / 'p'}: rank 1: "
        )
        assert "[Errno 27] File too large: choose another folder" in line


@pytest.mark.parametrize("lost", range(4))
def test_a_missing_part_is_told(pools, tmp_path, lost):
    given = (tmp_path / "p", "fsdp", "replicated", 200)
    extent = pools(4).run(bound.write_parts, [given] * 4)[0]
    files = sorted((tmp_path / "p").glob(f"shard-{lost + 1:05d}-*"))
    # Some hold nothing but parts without a number.
    filled = [file for file in files if any(t.numel() for t in load_file(file).values())]
    assert len(filled) > 3
    filled[len(filled) // 2].unlink()
    with pytest.raises(M3BindError, match="is not a whole checkpoint"):
        Parts(tmp_path / "p", extent)


def test_ranks_call_what_they_like_of_what_is_spread(pools):
    """Before any step and after one, each rank another number of times."""
    for kind, ranks in (("distill", 3), ("mse", 4)):
        given = [(kind, "fsdp", "split")] * ranks
        check(kind, pools(ranks).run(bound.step_between_evaluations, given))


def test_fewer_ranks_than_experts_are_refused(pools):
    with pytest.raises(AssertionError, match="placement=split needs a rank for each of xray, ct"):
        pools(2).run(bound.step, [("mse", "ddp", "split")] * 2)


def test_ranks_wait_for_the_work_of_others(pools):
    found = pools(3).run(bound.arrivals, [(0.0, 0.7), (0.7, 0.0), (0.3, 0.3)])
    for turn in zip(*found, strict=True):
        assert min(met for _, met in turn) >= max(done for done, _ in turn)


def test_a_folder_that_another_process_has_is_refused_on_all_ranks(pools, tmp_path):
    pool = pools(2)
    with claimed(tmp_path):
        for said in pool.run(bound.claim, [(tmp_path,)] * 2):
            assert f"{tmp_path} is in use by process {os.getpid()} on " in said
    assert pool.run(bound.claim, [(tmp_path,)] * 2) == ["mine"] * 2


def joined(store: dist.Store, ranks: list[int], size: int, seconds: float) -> dict[int, str]:
    """What each of some ranks finds in the store that it was given; nothing where it gave up."""
    found: dict[int, str] = {}

    def join(rank: int) -> None:
        try:
            shared = fresh_store(store, rank, size, timedelta(seconds=seconds))
        except TimeoutError:
            return
        if rank == 0:
            shared.set("word", str(id(found)))
        found[rank] = shared.get("word").decode()

    threads = [threading.Thread(target=join, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_ranks_that_are_gone_are_not_met_again():
    """Twice all, then three of four that give up, then all: on one store, as torchrun keeps it."""
    store = dist.HashStore()
    for _ in range(2):
        found = joined(store, [0, 1, 2, 3], 4, 20)
        assert set(found.values()) == {found[0]} and len(found) == 4
    assert joined(store, [0, 1, 3], 4, 0.5) == {}
    words = {found[0]}
    found = joined(store, [3, 1, 2, 0], 4, 20)
    assert len(found) == 4 and set(found.values()) == {found[0]} and found[0] not in words
