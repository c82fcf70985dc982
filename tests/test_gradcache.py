"""Chunked towers against the same chunks in one graph, with the same random numbers."""

import functools
from collections import namedtuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from m3bind import GradCache, clip_loss, siglip_loss, similarity_distill
from m3bind.losses import ClipLoss, DistillClipLoss

ROWS, WIDTH, DIM = 10, 5, 8
CHUNKS = (1, 3, 4, ROWS, 64)  # single rows, a last chunk of one row, of two, all, and beyond
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-6}


class Tower(nn.Module):
    """Tensors, or texts, to features; with dropout, which must be the same twice."""

    def __init__(self, seed: int = 0, dropout: float = 0.3) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.inner, self.outer = nn.Linear(WIDTH, 16), nn.Linear(16, DIM)
        self.dropout = nn.Dropout(dropout)
        self.log_scale = nn.Parameter(torch.tensor([1.5]))
        self.calls = 0

    def forward(self, rows: Tensor) -> Tensor:
        self.calls += 1
        return self.outer(self.dropout(F.gelu(self.inner(rows))))

    def texts(self, texts: list[str], upper: bool = False) -> Tensor:
        codes = [[ord(c) / 100 for c in (t.upper() if upper else t).ljust(WIDTH)] for t in texts]
        return self(torch.tensor(codes).view(len(texts), -1)[:, :WIDTH])

    def masked(self, *, rows: Tensor, more: list[Tensor], scale: float, mask: None) -> dict:
        assert mask is None
        return {"image_features": scale * self(rows + more[0]), "logit_scale": self.log_scale.exp()}


def clip(x: Tensor, y: Tensor) -> Tensor:
    return clip_loss(F.normalize(x, dim=1), F.normalize(y, dim=1), 9.0, z_loss=1e-2)


def siglip(x: Tensor, y: Tensor) -> Tensor:
    return siglip_loss(F.normalize(x, dim=1), F.normalize(y, dim=1), 9.0, -2.0)


def distill(x: Tensor, y: Tensor) -> Tensor:
    return similarity_distill(x, y, 1.0, y.detach(), x.detach(), 0.5)


LOSSES = (clip, siglip, distill)


def inputs(dtype: torch.dtype = torch.float32, *sizes: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    draw = functools.partial(torch.randn, generator=generator, dtype=torch.float64)
    return [draw(size, WIDTH).to(dtype) for size in sizes or (ROWS, ROWS)]


def gradients(*modules: nn.Module) -> list[Tensor | None]:
    """What has been accumulated; cleared."""
    parameters = [p for module in modules for p in module.parameters()]
    found = [p.grad for p in parameters]
    for parameter in parameters:
        parameter.grad = None
    return found


def plain(towers, loss, chunk, *batches):
    """One graph over the same chunks."""
    chunks = [chunk] * len(towers) if isinstance(chunk, int) else chunk
    parts = zip(towers, batches, chunks, strict=True)
    value = loss(*[torch.cat([t(part) for part in b.split(c)]) for t, b, c in parts])
    value.backward()
    return value.detach()


def distance(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm().clamp_min(1e-30))


def assert_same(got, want, tolerance=1e-6):
    for g, w in zip(got, want, strict=True):
        assert (g is None) == (w is None)
        assert g is None or distance(g, w) < tolerance


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_with_dropout(loss, chunk, dtype):
    towers, batches = [Tower(0).to(dtype), Tower(1).to(dtype)], inputs(dtype)

    def random(x: Tensor, y: Tensor) -> Tensor:  # draws between both passes of the towers
        return loss(x, y) * torch.rand((), dtype=dtype)

    torch.manual_seed(3)
    value = GradCache(towers, random, chunk).step(*batches)
    got, drawn = gradients(*towers), torch.rand(3)
    torch.manual_seed(3)
    want_value = plain(towers, random, chunk, *batches)
    assert_same(got, gradients(*towers), TOLERANCE[dtype])
    assert distance(value, want_value) < TOLERANCE[dtype] and not value.requires_grad
    # Whatever draws next draws as if each tower had run once.
    assert torch.equal(drawn, torch.rand(3))


@pytest.mark.parametrize("loss", LOSSES)
def test_every_chunk_size_gives_the_same(loss):
    towers, batches = [Tower(0, 0.0), Tower(1, 0.0)], inputs()
    plain(towers, loss, ROWS, *batches)
    want = gradients(*towers)
    for chunk in (1, 3, ROWS):
        GradCache(towers, loss, chunk).step(*batches)
        assert_same(gradients(*towers), want, 1e-6)


def test_one_tower_for_two_inputs_and_several_losses():
    """Two images with one text tower; chunks of each tower; a dict of losses."""
    first, second, text = Tower(0), Tower(1), Tower(2)
    towers, chunk = [first, text, second, text], [3, 4, 10, 1]
    batches = inputs(torch.float32, ROWS, ROWS, 7, 7)

    def loss(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> dict[str, Tensor]:
        return {"first": clip(a, b), "second": 2 * siglip(c, d)}

    torch.manual_seed(3)
    found = GradCache(towers, loss, chunk).step(*batches)
    got = gradients(first, second, text)
    torch.manual_seed(3)
    total = plain(towers, lambda *f: sum(loss(*f).values()), chunk, *batches)
    assert_same(got, gradients(first, second, text))
    assert list(found) == ["first", "second"]
    assert distance(sum(found.values()), total) < 1e-6


def test_losses_of_open_clip_signature_take_what_a_model_returns():
    """A dict by name, a tuple in order, a scale that gets its gradient once."""
    tower, teacher = Tower(0, 0.0), torch.randn(2, ROWS, DIM)
    batch, more = inputs()
    names = {"rows": batch, "more": [more], "scale": torch.tensor(0.5), "mask": None}

    def both(loss, **given):
        loss(**tower.masked(**names), **given).backward()
        return gradients(tower)

    y = torch.randn(ROWS, DIM)
    want = both(ClipLoss(), text_features=y)
    for chunk in CHUNKS:
        GradCache([tower.masked], ClipLoss(), chunk).step(names, text_features=y)
        got = gradients(tower)
        assert_same(got, want)
        assert got[0].norm() > 0
    distill_loss = DistillClipLoss()
    others = {"dist_image_features": teacher[0], "dist_text_features": teacher[1],
              "dist_logit_scale": 2.0, "text_features": y}  # fmt: skip
    found = GradCache([tower.masked], distill_loss, 3).step(names, **others)
    assert len(found) == 2
    got = gradients(tower)
    want = both(lambda **given: sum(distill_loss(**given)), **others)
    assert_same(got, want)


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = Tower(0), Tower(1)
        self.scale = nn.Parameter(torch.tensor([2.0]))

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        return self.left(a), self.right(b), self.scale.exp(), None


@pytest.mark.parametrize("kind", (tuple, namedtuple("Two", "a b")._make))
def test_a_module_with_both_towers_and_a_scale(kind):
    pair, batches = Pair(), inputs()

    def loss(x, y, scale, nothing=None):
        assert nothing is None
        return clip_loss(x, y, scale)

    torch.manual_seed(3)
    GradCache([pair], loss, 4).step(kind(batches))
    got = gradients(pair)
    torch.manual_seed(3)
    parts = [pair(a, b) for a, b in zip(*(t.split(4) for t in batches), strict=True)]
    x, y, scales, _ = zip(*parts, strict=True)
    loss(torch.cat(x), torch.cat(y), scales[0]).backward()
    assert_same(got, gradients(pair))


@pytest.mark.parametrize("kind", (list, tuple))
def test_texts_and_options(kind):
    tower, texts = Tower(0, 0.0), kind(f"text {i}" for i in range(ROWS))
    y = torch.randn(ROWS, DIM)
    GradCache([functools.partial(tower.texts, upper=True)], clip, 3).step(texts, y=y)
    got = gradients(tower)
    clip(tower.texts(texts, upper=True), y).backward()
    assert_same(got, gradients(tower))


def test_complex_features():
    class Waves(Tower):
        def forward(self, rows: Tensor) -> Tensor:
            found = super().forward(rows)
            return torch.complex(found, found.roll(1, 1))

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return clip(x.real, y.imag)

    towers, batches = [Waves(0, 0.0), Waves(1, 0.0)], inputs()
    plain(towers, loss, ROWS, *batches)
    want = gradients(*towers)
    GradCache(towers, loss, 3).step(*batches)
    assert_same(gradients(*towers), want)


def test_grad_scaler():
    towers, batches = [Tower(0, 0.0), Tower(1, 0.0)], inputs()
    parameters = [p for t in towers for p in t.parameters()]
    plain(towers, clip, ROWS, *batches)
    want = gradients(*towers)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    before = [p.detach().clone() for p in parameters]
    value = GradCache(towers, clip, 3).step(*batches, scaler=scaler)
    with torch.no_grad():
        assert distance(value, clip(*(t(b) for t, b in zip(towers, batches, strict=True)))) < 1e-6
    scaler.step(optimizer)
    scaler.update()
    moved = [b - p.detach() for b, p in zip(before, parameters, strict=True)]
    assert_same([m for m, w in zip(moved, want, strict=True) if w is not None],
                [w for w in want if w is not None], 1e-5)  # fmt: skip
    # A step that overflows is skipped, and the next factor is smaller.
    gradients(*towers)
    before = [p.detach().clone() for p in parameters]
    bad = [batches[0] * torch.inf, batches[1]]
    GradCache(towers, clip, 3).step(*bad, scaler=scaler)
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(b, p) for b, p in zip(before, parameters, strict=True))
    assert scaler.get_scale() == 512.0


def test_a_second_call_accumulates():
    towers, batches = [Tower(0, 0.0), Tower(1, 0.0)], inputs()
    cache = GradCache(nn.ModuleList(towers), clip, 3)
    for part in (slice(0, 6), slice(6, ROWS)):
        cache.step(*(b[part] for b in batches))
    got = gradients(*towers)
    for part in (slice(0, 6), slice(6, ROWS)):
        plain(towers, clip, ROWS, *(b[part] for b in batches))
    assert_same(got, gradients(*towers))
