"""What GradCache leaves out, refuses, and holds in memory."""

import functools
import types

import pytest
import torch
from test_gradcache import DIM, ROWS, Tower, assert_same, clip, gradients, inputs, plain
from torch import nn

from m3bind import GradCache
from m3bind.gradcache import rows as gradcache_rows
from m3bind.losses import ClipLoss

MIB = 2**20


def test_a_frozen_tower_runs_once_and_its_loss_gradient_is_not_formed():
    frozen, tower, batches = Tower(0).requires_grad_(False), Tower(1, 0.0), inputs()
    needed = []

    def loss(x, y):
        needed.extend((x.requires_grad, y.requires_grad))
        return clip(x, y)

    torch.manual_seed(3)
    GradCache([frozen, tower], loss, 3).step(*batches)
    got = gradients(tower)
    assert (frozen.calls, tower.calls, needed) == (4, 8, [False, True])
    torch.manual_seed(3)
    plain([frozen, tower], clip, 3, *batches)
    assert_same(got, gradients(tower))


def test_a_tower_that_the_loss_leaves_out():
    first, second, batches = Tower(0), Tower(1), inputs()
    GradCache([first, second], lambda x, y: x.square().mean(), 3).step(*batches)
    assert all(g is None for g in gradients(second))
    assert second.calls == 4


def test_what_a_step_returns_stays_when_an_optimizer_changes_parameters():
    tower = Tower(0)

    def encode(self, rows):
        return self(rows), self.log_scale  # the parameter itself

    cache = GradCache([types.MethodType(encode, tower)], lambda x, s: (x.sum() ** 2, s), 3)
    _, scale = cache.step(inputs()[0])
    torch.optim.SGD(tower.parameters(), lr=1.0).step()
    assert scale == 1.5 and tower.log_scale == 0.5


def test_the_first_tower_goes_back_last():
    """Gradients of the others' features are gone before its activations, the largest, come."""
    order = []

    def named(name):
        def encode(self, rows):
            order.append(name)
            return self(rows)

        return types.MethodType(encode, Tower(0))

    GradCache([named("x"), named("y")], clip, 5).step(*inputs())
    assert "".join(order) == "xxyy" + "yyxx"


def test_inputs_that_train():
    tower, prompts = Tower(0, 0.0).requires_grad_(False), inputs()[0].requires_grad_()
    GradCache([tower], lambda x: x.square().mean(), 3).step(prompts)
    got, prompts.grad = prompts.grad, None
    tower(prompts).square().mean().backward()
    assert_same([got], [prompts.grad])
    with pytest.raises(ValueError, match="has a graph behind it"):
        GradCache([tower], lambda x: x.square().mean(), 3).step(prompts * 2)


def test_no_rows():
    tower = Tower(0)
    GradCache([tower], lambda x: x.sum(), 3).step(torch.zeros(0, 5))
    assert tower.calls == 2
    assert all(g is None or not g.any() for g in gradients(tower))


@pytest.mark.parametrize("rows, chunk, number", [
    (8, 3, 3), (5, 3, 3), (5, 3, 4), (7, 8, 3), (2, 3, 5), (0, 3, 2), (0, 3, 1), (6, 3, 2),
])  # fmt: skip
def test_chunks_that_other_ranks_need_are_equal(rows, chunk, number):
    """A rank with fewer rows computes as long in each chunk as it can, while others compute."""
    spans = gradcache_rows.spans(rows, chunk, number)
    lengths = [span.stop - span.start for span in spans]
    assert [i for span in spans for i in range(span.start, span.stop)] == list(range(rows))
    assert len(spans) == number and max(lengths) <= chunk
    if number > gradcache_rows.chunks(rows, chunk):
        assert max(lengths) - min(lengths) <= 1


class Normed(nn.Sequential):
    def __init__(self, norm: type[nn.Module] = nn.BatchNorm1d) -> None:
        torch.manual_seed(0)
        super().__init__(nn.Linear(5, DIM), norm(DIM), nn.GELU(), nn.Linear(DIM, DIM))


def test_batch_norm_is_refused_in_training_only():
    tower, batches = Normed(), inputs()
    with pytest.raises(ValueError, match=r"1 is a BatchNorm1d in training mode: .*\.eval\(\)"):
        GradCache([tower, tower], clip, 4).step(*batches)
    assert all(g is None for g in gradients(tower))
    tower.eval()
    GradCache([tower, tower], clip, 4).step(*batches)
    got = gradients(tower)
    plain([tower, tower], clip, ROWS, *batches)
    assert_same(got, gradients(tower))
    with pytest.raises(ValueError, match="SyncBatchNorm"):
        GradCache([Normed(nn.SyncBatchNorm)] * 2, clip, 4, batch_norm="chunk").step(*batches)


def test_batch_norm_over_chunks_updates_its_statistics_once():
    tower, other, batches = Normed(), Normed(), inputs()
    GradCache([tower, tower], clip, 4, batch_norm="chunk").step(*batches)
    plain([other, other], clip, 4, *batches)
    assert_same(gradients(tower), gradients(other))
    for got, want in zip(tower.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(got, want)
    assert int(tower[1].num_batches_tracked) == 6


class Returning(Tower):
    def __init__(self, what) -> None:
        super().__init__()
        self.what = what

    def forward(self, rows):
        return self.what(super().forward(rows))


def build(**change):
    given = {"towers": [Tower(0), Tower(1)], "loss": clip, "chunk": 3} | change
    return GradCache(given.pop("towers"), given.pop("loss"), given.pop("chunk"), **given)


@pytest.mark.parametrize("change, match", [
    ({"towers": Tower()}, r"one Tower: pass a list"),
    ({"towers": []}, "empty"),
    ({"towers": [lambda rows: rows]}, r"towers\[0\] is a function: .* fits in `loss`"),
    ({"towers": [functools.partial(len)]}, "is a partial"),
    ({"loss": 3}, "loss is a int"),
    ({"chunk": 0}, "chunk=0: rows are counted from 1"),
    ({"chunk": True}, "chunk=True"),
    ({"chunk": 2.5}, "chunk=2.5"),
    ({"chunk": (3, 3, 3)}, "3 numbers for 2 towers"),
    ({"batch_norm": "sync"}, "batch_norm='sync': choose one of error, chunk"),
])  # fmt: skip
def test_wrong_arguments(change, match):
    with pytest.raises(ValueError, match=match):
        build(**change)


X, Y = inputs()


@pytest.mark.parametrize("given, change, match", [
    ((X,), {}, "1 inputs for 2 towers"),
    ((X, 3), {}, r"inputs\[1\] holds no rows"),
    ((X, (Y, Y[1:])), {}, r"inputs\[1\] holds tensors of \[9, 10\] rows"),
    ((X, {"rows": [1, 2]}), {}, r"inputs\[1\]\['rows'\] is a list that holds a int"),
    ((X, Y), {"loss": lambda x, y: x}, r"the loss returned \(10, 8\)"),
    ((X, Y), {"loss": lambda x, y: {}}, "returned nothing"),
    ((X, Y), {"loss": lambda x, y: {"a": 3.0}}, "returned float"),
    ((X, Y), {"loss": lambda x, y: torch.zeros(())}, "needs no gradient"),
    ((X, Y), {"towers": [Returning(lambda f: None)] * 2}, "returned no tensor"),
    ((X, Y), {"towers": [Returning(lambda f: f[0])] * 2}, r"shape \(8,\)"),
    ((X, Y), {"towers": [Returning(lambda f: f[:, 0])] * 2}, r"shape \(3,\)"),
    ((X, Y), {"towers": [Returning(lambda f: f @ f.T)] * 2}, "must not depend on the chunk"),
    ((X, Y), {"towers": [Returning(lambda f: (f, [f]))] * 2}, "a list within its result"),
    ((X, Y), {"towers": [Returning(lambda f: (f,) * len(f))] * 2}, "the same for all"),
    ((X, Y), {"towers": [Returning(lambda f: {"x": f})] * 2}, "'x', which the loss gets from"),
])  # fmt: skip
def test_wrong_inputs_and_results(given, change, match):
    with pytest.raises(ValueError, match=match):
        build(**change).step(*given)


@pytest.mark.parametrize("mode", (torch.no_grad, torch.inference_mode))
def test_without_gradients(mode):
    with mode(), pytest.raises(ValueError, match=r"outside torch\.no_grad"):
        build().step(X, Y)


def peak_live(run) -> int:
    """Bytes that torch's CPU allocator held at most, above those it held before."""
    with torch.autograd.profiler.profile(profile_memory=True, use_kineto=True) as profile:
        run()
    events = profile.kineto_results.events()
    moves = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    live = peak = 0
    for _, nbytes in moves:
        live += nbytes
        peak = max(peak, live)
    return peak


def demo_expert():
    """An X-ray expert as configs/demo.yaml builds it."""
    from m3bind.config import ExpertConfig, TextTowerConfig
    from m3bind.models.expert import build_expert

    text = TextTowerConfig(
        source="minilm", max_tokens=96, train_layers=0, cache=True, frozen_bf16=True
    )
    return build_expert(ExpertConfig(text=text, head_hidden=512), "xray", width=256).train()


@pytest.mark.parametrize("rows", (192, pytest.param(4096, marks=pytest.mark.slow)))
@pytest.mark.parametrize("bf16", (False, True))
def test_memory_is_that_of_one_chunk(rows, bf16):
    """The towers of the demonstration, at its image size, trained in full."""
    expert, loss = demo_expert(), ClipLoss()
    texts = [f"No acute finding in examination {i}." for i in range(rows)]
    expert.text.tower.precompute(texts, torch.device("cpu"))  # these are inputs
    # One image for all rows, so that inputs take no memory; chunks of it are as any.
    images = torch.randn(1, expert.preprocess.channels, *expert.preprocess.size)
    images = images.expand(rows, -1, -1, -1)
    towers = [expert.encode_image, expert.encode_text]
    cache = GradCache(towers, lambda x, y: loss(x, y, expert.scale()), 64, batch_norm="chunk")

    def peak(count: int) -> int:
        expert.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            return peak_live(lambda: cache.step(images[:count], texts[:count]))

    small, large = peak(64), peak(rows)
    assert large < 1.3 * small, (small / MIB, large / MIB)
    # What grows are the gradients of the images' features; and where there are several chunks, the
    # parameters' gradients are there already when the second begins.
    trained = sum(p.numel() for p in expert.parameters() if p.requires_grad)
    assert large - small < 4 * (trained + rows * 256)
    # It is the activations that are left out.
    expert.zero_grad(set_to_none=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        whole = peak_live(lambda: loss(
            expert.encode_image(images[:192]), expert.encode_text(texts[:192]), expert.scale()
        ).backward())  # fmt: skip
    assert whole > 2 * small
