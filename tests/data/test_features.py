"""Features of frozen trunks: kept on disk, handed out as the image loader hands out images."""

import itertools
from types import SimpleNamespace

import pytest
import torch

from m3bind.data.features import FeatureLoader, Features
from m3bind.data.loader import Batch
from m3bind.errors import M3BindError
from m3bind.stages.inputs import Inputs
from m3bind.tasks.common import copies


def features(count: int = 11, width: int = 3, fingerprint: str = "f") -> Features:
    images = [torch.randn(n, 2, width) for n in (4, 4, count - 8)]
    number = itertools.count()
    batches = []
    for image in images:
        meta = [{"id": str(next(number))} for _ in image]
        reports = [f"report {m['id']}" for m in meta]
        batches.append(Batch(images=image, reports=reports, meta=meta, modality="ct"))
    found = Features.compute(batches, lambda x: x.sum(1), fingerprint)
    assert torch.equal(found.values, torch.cat(images).sum(1))
    return found


def ids(*batches: Batch) -> list[str]:
    return [sample["id"] for batch in batches for sample in batch.meta]


def test_kept_features_come_back_and_only_for_their_own_fingerprint(tmp_path) -> None:
    kept, path = features(), tmp_path / "ct" / "train.safetensors"
    assert Features.load(path, "ct", "f") is None
    kept.save(path)
    found = Features.load(path, "ct", "f")
    assert found is not None and torch.equal(found.values, kept.values)
    assert (found.reports, found.meta, found.modality) == (kept.reports, kept.meta, "ct")
    assert Features.load(path, "ct", "another trunk") is None
    path.write_bytes(path.read_bytes()[:-9])
    assert Features.load(path, "ct", "f") is None
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_one_pass_is_in_order_and_each_feature_keeps_its_sample() -> None:
    kept = features()
    loader = FeatureLoader(kept, 4, train=False)
    for _ in range(2):
        batches = list(loader)
        assert [len(batch) for batch in batches] == [4, 4, 3] and len(loader) == 3
        assert ids(*batches) == [str(i) for i in range(11)]
    for batch in itertools.islice(FeatureLoader(kept, 4, train=True), 5):
        for value, report, meta in zip(batch.images, batch.reports, batch.meta, strict=True):
            assert torch.equal(value, kept.values[int(meta["id"])])
            assert report == f"report {meta['id']}"


def test_training_goes_through_all_samples_each_epoch_in_a_new_order() -> None:
    def epochs(seed: int) -> list[list[str]]:
        stream = ids(*itertools.islice(FeatureLoader(features(), 4, train=True, seed=seed), 11))
        return [stream[i : i + 11] for i in range(0, 44, 11)]

    found = epochs(0)
    assert all(len(set(epoch)) == 11 for epoch in found)
    assert len({tuple(epoch) for epoch in found}) == 4
    assert found == epochs(0) and found != epochs(1)
    few = FeatureLoader(features(9), 30, train=True)
    assert [len(batch) for batch in itertools.islice(few, 2)] == [30, 30]


@pytest.mark.parametrize(("batch", "told"), [(11, False), (12, True)])
def test_a_batch_larger_than_its_split_is_told(caplog, batch, told) -> None:
    loader = FeatureLoader(features(), batch, train=True)
    stage = SimpleNamespace(_training=lambda *_: loader)
    assert Inputs._training_batches(stage, {"ct": None}, None, None) == {"ct": loader}
    assert ("ct: a batch of 12 samples, of which there are 11" in caplog.text) == told
    assert (copies(next(iter(loader))) is not None) == told


def test_a_stream_is_taken_up_where_it_stood() -> None:
    kept = features()
    first = FeatureLoader(kept, 4, train=True, seed=3)
    stream = iter(first)
    list(itertools.islice(stream, 5))
    state = first.state()
    expected = list(itertools.islice(stream, 5))
    second = FeatureLoader(kept, 4, train=True, seed=3)
    second.load_state(state)
    found = list(itertools.islice(second, 5))
    assert ids(*found) == ids(*expected)
    assert all(torch.equal(a.images, b.images) for a, b in zip(found, expected, strict=True))
    for other in (
        FeatureLoader(features(fingerprint="g"), 4, train=True, seed=3),
        FeatureLoader(kept, 5, train=True, seed=3),
        FeatureLoader(kept, 4, train=True, seed=4),
    ):
        with pytest.raises(M3BindError, match="ct features"):
            other.load_state(state)
    with pytest.raises(ValueError, match="batch_size 0"):
        FeatureLoader(kept, 0, train=True)


@pytest.mark.parametrize("parts", (1, 2, 3, 5))
def test_parts_of_any_number_are_the_same_batches(parts) -> None:
    """Also where another number goes on in the middle of an epoch."""
    kept, size = features(), 5

    def loaders(count: int) -> list[FeatureLoader]:
        bounds = [size * i // count for i in range(count + 1)]
        return [
            FeatureLoader(kept, size, train=True, seed=2, part=slice(*bounds[i : i + 2]))
            for i in range(count)
        ]

    whole = list(itertools.islice(FeatureLoader(kept, size, train=True, seed=2), 8))
    shared = loaders(parts)
    streams = [iter(loader) for loader in shared]
    for batch in whole[:4]:
        assert ids(*(next(stream) for stream in streams)) == ids(batch)
    others = loaders(4)
    for loader in others:
        loader.load_state_of_others(shared[0].state(), salt=1)
    for batch in whole[4:]:
        assert ids(*(next(iter(loader)) for loader in others)) == ids(batch)
    with pytest.raises(M3BindError, match="restore them"):
        FeatureLoader(kept, 6, train=True, seed=2).load_state_of_others(shared[0].state(), 1)
