"""The loader as a stream: order, epochs, shares, exact resume, augmentation, damage."""

import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from m3bind.data.constants import KIND
from m3bind.data.loader import Batch, Loader
from m3bind.data.preprocess import Preprocess
from m3bind.errors import M3BindError

from loader_cases import cohort, noise, record, write  # isort: skip

pytest.importorskip("nvidia.dali")
SIZES = {"image2d": (32, 32), "volume": (6, 16, 16), "signal": (400,)}


def small(modality: str) -> Preprocess:
    return Preprocess.for_modality(modality, size=SIZES[KIND[modality]])


def ids(*batches: Batch) -> list[str]:
    return [sample["id"] for batch in batches for sample in batch.meta]


def test_one_pass_in_order_with_a_partial_last_batch(tmp_path) -> None:
    cohort(tmp_path, "retina", 12)
    loader = Loader(tmp_path, "retina", "train", small("retina"), 5, train=False)
    batches = list(loader)
    assert (len(loader), loader.num_samples) == (3, 12)
    assert [len(batch) for batch in batches] == [5, 5, 2]
    assert [tuple(batch.images.shape) for batch in batches] == [(n, 3, 32, 32) for n in (5, 5, 2)]
    assert ids(*batches) == [f"retina-{i:04d}" for i in range(12)]
    assert batches[1].reports[2] == "FINDINGS: number 7, caf\u00e9.\nIMPRESSION: none."
    assert batches[0].modality == "retina" and batches[0].images.dtype == torch.float32
    # A second pass gives the same, also after one that was left in its middle.
    next(iter(loader))
    again = list(loader)
    assert ids(*again) == ids(*batches)
    assert all(torch.equal(a.images, b.images) for a, b in zip(again, batches, strict=True))


@pytest.mark.parametrize("modality", KIND)
def test_training_resumes_to_the_bit(tmp_path, modality) -> None:
    cohort(tmp_path, modality, 11)

    def loader(state=None, prefetch=2) -> Loader:
        return Loader(
            tmp_path, modality, "train", small(modality), 4, train=True, seed=3, state=state,
            prefetch=prefetch,
        )  # fmt: skip

    first = loader()
    stream = iter(first)
    for _ in range(4):  # into the second epoch
        next(stream)
    state = first.state()
    expected = list(itertools.islice(stream, 6))
    second = loader(state, prefetch=1)  # how many batches wait changes none of them
    found = list(itertools.islice(second, 6))
    for a, b in zip(expected, found, strict=True):
        assert torch.equal(a.images, b.images) and (a.meta, a.reports) == (b.meta, b.reports)
    assert second.state() == first.state()
    # The augmentation is at work: the same sample never comes twice with the same numbers.
    seen: dict[str, torch.Tensor] = {}
    for batch in expected:
        for sample, image in zip(batch.meta, batch.images, strict=True):
            assert not torch.equal(seen.get(sample["id"], torch.zeros(())), image)
            seen[sample["id"]] = image


def test_each_epoch_is_a_new_order_of_all_samples(tmp_path) -> None:
    cohort(tmp_path, "retina", 12)
    loader = Loader(tmp_path, "retina", "train", small("retina"), 4, train=True)
    epochs = [ids(*itertools.islice(loader, 3)) for _ in range(3)]
    assert all(len(set(epoch)) == 12 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    other = Loader(tmp_path, "retina", "train", small("retina"), 4, train=True, seed=1)
    assert ids(*itertools.islice(other, 3)) != epochs[0]


def test_fewer_samples_than_a_batch_are_gone_through_again(tmp_path) -> None:
    cohort(tmp_path, "xray", 3)
    loader = Loader(tmp_path, "xray", "train", small("xray"), 8, train=True)
    batches = list(itertools.islice(loader, 3))
    assert [len(batch) for batch in batches] == [8, 8, 8]
    assert set(ids(*batches)) == {f"xray-{i:04d}" for i in range(3)}


def test_processes_share_a_split_without_overlap(tmp_path) -> None:
    cohort(tmp_path, "retina", 11)
    parts = [
        ids(*Loader(tmp_path, "retina", "train", small("retina"), 4, train=False,
                    shard_id=part, num_shards=3))
        for part in range(3)
    ]  # fmt: skip
    assert sorted(itertools.chain(*parts)) == [f"retina-{i:04d}" for i in range(11)]


def test_a_stream_after_another_number_of_processes_is_new(tmp_path) -> None:
    """And the same again for the same salt, also where it is stopped and taken up."""
    cohort(tmp_path, "retina", 12)

    def loader(part: int = 0, parts: int = 1) -> Loader:
        return Loader(
            tmp_path, "retina", "train", small("retina"), 4, train=True, seed=3, shard_id=part,
            num_shards=parts,
        )  # fmt: skip

    before = loader()
    old = list(itertools.islice(before, 2))
    state = before.state()
    found = {}
    for salt in (7, 8):
        new = loader(1, 2)
        new.load_state_of_others(state, salt)
        found[salt] = list(itertools.islice(new, 2))
        expected, rest = list(itertools.islice(new, 2)), loader(1, 2)
        again = loader(1, 2)
        again.load_state_of_others(state, salt)
        list(itertools.islice(again, 2))
        rest.load_state(again.state())
        assert all(map(same, itertools.islice(rest, 2), expected))
    assert not same(found[7][0], found[8][0]) and not same(found[7][0], old[0])
    assert {*ids(*found[7])} <= {f"retina-{i:04d}" for i in range(6, 12)}
    cohort(tmp_path, "retina", 3)
    with pytest.raises(M3BindError, match=r"shards .* are not those of the checkpoint"):
        loader().load_state_of_others(state, 7)


def same(a: Batch, b: Batch) -> bool:
    return ids(a) == ids(b) and torch.equal(a.images, b.images)


def test_processes_do_not_augment_alike(tmp_path) -> None:
    """The first halves of the shards hold the same images as the second ones."""
    write(tmp_path, [record("xray", i, noise("xray", i % 4)) for i in range(8)])
    first, second = (
        next(iter(Loader(
            tmp_path, "xray", "train", small("xray"), 4, train=True, shard_id=part, num_shards=2
        )))
        for part in (0, 1)
    )  # fmt: skip
    images = [dict(zip(ids(batch), batch.images, strict=True)) for batch in (first, second)]
    for i in range(4):
        assert not torch.equal(images[0][f"xray-{i:04d}"], images[1][f"xray-{i + 4:04d}"])


def test_five_loaders_at_once(tmp_path) -> None:
    for modality in KIND:
        cohort(tmp_path, modality, 4)
    loaders = [Loader(tmp_path, m, "train", small(m), 3, train=True) for m in KIND]
    for _, batches in zip(range(5), zip(*loaders, strict=True), strict=False):
        assert [batch.modality for batch in batches] == list(KIND)
        assert all(torch.isfinite(batch.images).all() for batch in batches)


def augmented(root: Path, modality: str, array: np.ndarray, **values) -> torch.Tensor:
    write(root, [record(modality, 0, array)])
    kind = KIND[modality]
    base = {"signal": {"rate_hz": 500}}.get(kind, {"fit": "stretch"})
    size = array.shape[-1:] if kind == "signal" else array.shape[: 3 if kind == "volume" else 2]
    channels = {"signal": 12, "volume": 1}.get(kind, 1 if array.ndim == 2 else 3)
    preprocess = Preprocess(kind=kind, size=size, channels=channels, **{**base, **values})
    return next(iter(Loader(root, modality, "train", preprocess, 40, train=True))).images


@pytest.mark.parametrize("modality", ["xray", "retina", "ct"])
def test_no_augmentation_changes_the_side(tmp_path, modality) -> None:
    lengths = (6, 32, 32) if modality == "ct" else (32, 32)
    array = np.full(lengths, -900 if modality == "ct" else 20, np.int16)
    array[..., :16, :16] = 300 if modality == "ct" else 180  # the upper left
    array = array if modality == "ct" else array.astype(np.uint8)
    if modality == "retina":
        array = np.repeat(array[..., None], 3, -1)
    images = augmented(tmp_path, modality, array)
    quarters = [
        images[..., y : y + 8, x : x + 8].flatten(1).mean(1) for y in (4, 20) for x in (4, 20)
    ]
    upper_left, *others = quarters
    assert all((upper_left > other + 0.3).all() for other in others)


def test_tissue_is_turned_mirrored_and_stained(tmp_path) -> None:
    array = np.full((32, 32, 3), (200, 120, 180), np.uint8)
    array[:16, :16] = (90, 40, 120)
    images = augmented(tmp_path, "pathology", array)
    assert images.min() >= 0 and images.max() <= 1
    corners = [images[:, :, y, x].mean(1) for y in (6, 26) for x in (6, 26)]
    darkest = torch.stack(corners).argmin(0)
    assert set(darkest.tolist()) == {0, 1, 2, 3}
    assert images[:, :, 16, 16].std(0).min() > 0.01


def test_an_augmented_ecg_stays_that_ecg(tmp_path) -> None:
    seconds = np.arange(1500) / 500
    beat = np.exp(-(((seconds % 0.8) - 0.4) ** 2) / (2 * 0.012**2))
    array = np.round(np.stack([(1 - 2 * (i == 3)) * 1000 * beat for i in range(12)])).astype("i2")
    images = augmented(tmp_path, "ecg", array).numpy()
    peaks = np.flatnonzero(beat > 0.999)
    masked = 0
    for record_ in images:
        silent = np.ptp(record_, axis=1) == 0
        masked += silent.any()
        for lead in np.flatnonzero(~silent):
            sign = -1 if lead == 3 else 1  # polarity and time stay, gain within 10 %
            assert 0.7 < (sign * record_[lead, peaks]).mean() < 1.3
    assert masked < len(images) / 4


def flip(path: Path, key: str, extension: str, offset: int = 40, count: int = 6) -> None:
    """Change bytes in the middle of one component."""
    words = path.with_suffix(".idx").read_text().split()
    place = words.index(f"{key}.{extension}")
    start, size = int(words[place - 2]), int(words[place - 1])
    data = bytearray(path.read_bytes())
    assert size > offset + count
    for at in range(start + offset, start + offset + count):
        data[at] ^= 0xFF
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("modality", "extension"), [("retina", "png"), ("ct", "hu"), ("ecg", "uv")]
)
def test_changed_bytes_name_shard_and_sample(tmp_path, modality, extension) -> None:
    cohort(tmp_path, modality, 8)
    shard = tmp_path / modality / "train" / f"simulated-{modality}-train-000001.tar"
    flip(shard, f"{modality}-0006", extension)
    loader = Loader(tmp_path, modality, "train", small(modality), 4, train=False)
    with pytest.raises(M3BindError, match=rf"000001.tar: sample {modality}-0006: .*checksum") as e:
        list(loader)
    assert "\n" not in str(e.value)


def test_an_image_that_was_never_one_names_shard_and_sample(tmp_path) -> None:
    broken = record("xray", 1, np.zeros((20, 20), np.uint8))
    broken.payload = broken.payload[:45]
    write(tmp_path, [record("xray", 0, np.zeros((20, 20), np.uint8)), broken])
    loader = Loader(tmp_path, "xray", "train", small("xray"), 2, train=True)
    with pytest.raises(
        M3BindError, match=r"000000.tar: sample xray-0001: .*cannot be decoded"
    ) as e:
        next(iter(loader))
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("share", [0.05, 0.5, 0.8])
def test_a_cut_shard(tmp_path, share) -> None:
    cohort(tmp_path, "ct", 6)
    shard = next((tmp_path / "ct" / "train").glob("*000000.tar"))
    shard.write_bytes(shard.read_bytes()[: int(shard.stat().st_size * share)])
    with pytest.raises(M3BindError, match=r"000000.tar"):
        list(Loader(tmp_path, "ct", "train", small("ct"), 2, train=False))


def test_missing_shards_and_index(tmp_path) -> None:
    with pytest.raises(M3BindError, match=r"no shards .*retina/train"):
        Loader(tmp_path, "retina", "train", small("retina"), 2, train=False)
    cohort(tmp_path, "retina", 3)
    next((tmp_path / "retina" / "train").glob("*.idx")).unlink()
    with pytest.raises(M3BindError, match=r"\.idx is missing"):
        Loader(tmp_path, "retina", "train", small("retina"), 2, train=False)


def test_a_state_of_other_shards_or_settings_is_refused(tmp_path) -> None:
    cohort(tmp_path / "a", "xray", 4)
    cohort(tmp_path / "b", "xray", 5)
    loader = Loader(tmp_path / "a", "xray", "train", small("xray"), 2, train=True)
    state = loader.state()
    for root, batch in (("b", 2), ("a", 3)):
        with pytest.raises(M3BindError, match="not those of the checkpoint"):
            Loader(tmp_path / root, "xray", "train", small("xray"), batch, train=True, state=state)
    with pytest.raises(ValueError, match="training loader"):
        Loader(tmp_path / "a", "xray", "train", small("xray"), 2, train=False).state()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("modality", KIND)
def test_the_gpu_gives_what_the_cpu_gives(tmp_path, modality) -> None:
    cohort(tmp_path, modality, 6)
    on_cpu, on_gpu = (
        list(Loader(tmp_path, modality, "train", small(modality), 4, train=False, device_id=device))
        for device in (None, 0)
    )
    for a, b in zip(on_cpu, on_gpu, strict=True):
        assert b.images.is_cuda and a.reports == b.reports
        torch.testing.assert_close(b.images.cpu(), a.images, atol=2e-2, rtol=0)
    training = Loader(tmp_path, modality, "train", small(modality), 4, train=True, device_id=0)
    assert torch.isfinite(next(iter(training)).images).all()


def test_importing_the_loop_and_the_loader_does_not_import_dali() -> None:
    code = (
        "import sys, m3bind.train, m3bind.data.loader, m3bind.config\n"
        "heavy = {'nvidia', 'omegaconf', 'tensorboard', 'timm', 'transformers'}\n"
        "found = heavy & set(sys.modules); assert not found, found"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
