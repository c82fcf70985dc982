"""GradCache over ranks: the gradients of one process, synchronised once."""

import cached
import pytest
import torch
from cases import distance, unit
from models import WIDTH, train_alone
from test_losses_over_ranks import LOSSES, SCHEMES

from m3bind import ops

WRAPS = ("ddp", "fsdp2")


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("chunk", (1, 3, 8))
def test_encoder_in_chunks(pools, chunk, loss, wrap):
    """The second rank has fewer rows, hence fewer chunks, and FSDP2 gathers in each of them."""
    sizes = [8, 5]
    want = train_alone(loss, sizes, 1)
    given = [(wrap, loss, sizes, 1, chunk, "gather", False)] * 2
    for found, reduced in pools(2).run(cached.encoder, given):
        for name, value in want.items():
            assert distance(found[name], value) < 3e-6, name
        assert reduced == {"ddp": 1, "fsdp2": 3}[wrap]  # FSDP2: each of three modules once


@pytest.mark.parametrize("hold", (False, True))
@pytest.mark.parametrize("sizes", ([8, 5], [5, 0], [1, 7]))
@pytest.mark.parametrize("wrap", WRAPS)
def test_accumulation_over_steps(pools, wrap, sizes, hold):
    want = train_alone("clip_loss", sizes, 3)
    given = [(wrap, "clip_loss", sizes, 3, 2, "circulate", hold)] * 2
    for found, reduced in pools(2).run(cached.encoder, given):
        for name, value in want.items():
            assert distance(found[name], value) < 3e-6, name
        assert reduced == {"ddp": 1, "fsdp2": 3}[wrap] * (1 if hold else 3)


@pytest.mark.parametrize("chunk", (1, 3, 8))
@pytest.mark.parametrize("wrap", WRAPS)
def test_towers_of_their_own(pools, wrap, chunk):
    """Methods of one module with a wrapped module each, one of them for two inputs."""
    sizes = [8, 5]
    alone = cached.Model(cached.Image(), cached.Text()).double()
    a, b, c = (unit(sum(sizes), WIDTH, seed).double() for seed in range(3))
    cached.two_texts(ops, *alone.encode_image(a), alone.encode_text(b), alone.encode_text(c),
                     backend="reference").backward()  # fmt: skip
    for found, again, counts in pools(2).run(cached.towers, [(wrap, sizes, chunk)] * 2):
        for name, parameter in alone.named_parameters():
            assert distance(found[name], parameter.grad) < 3e-6, name
            assert distance(again[name], 2 * parameter.grad) < 3e-6, name
        assert counts == {"Image": 2, "Text": 2}


def check_left_out(pool, wrap, sizes, leaves, evaluate=False):
    image, text = cached.Image().double(), cached.Text().double()
    total = torch.zeros((), dtype=torch.float64)
    parts = [unit(sum(sizes), WIDTH, seed).double().split(sizes) for seed in range(2)]
    for rank, (a, b) in enumerate(zip(*parts, strict=True)):
        total = total + cached.partial_loss(*image(a), text(b), rank, leaves)
    (total / len(sizes)).backward()
    for found in pool.run(cached.left_out, [(wrap, sizes, leaves, evaluate)] * len(sizes)):
        for name, parameter in [*image.named_parameters(), *text.named_parameters()]:
            want = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            assert found[name] is not None, name
            assert distance(found[name], want) < 3e-6, name


@pytest.mark.parametrize("leaves", (
    {0: "y", 1: "y"}, {0: "sy", 1: "sy"}, {0: "y"}, {1: "s"}, {0: "s", 1: "y"},
))  # fmt: skip
@pytest.mark.parametrize("wrap", WRAPS)
def test_what_a_loss_leaves_out_has_gradients_of_zero(pools, wrap, leaves):
    """Not none: other ranks would wait for them."""
    for sizes in ([8, 5], [5, 0]):
        check_left_out(pools(2), wrap, sizes, leaves)


@pytest.mark.parametrize("wrap", WRAPS)
def test_a_step_after_an_evaluation(pools, wrap):
    """It leaves FSDP2's root gathered, where no parameter tells which ranks share it."""
    check_left_out(pools(2), wrap, [8, 5], {}, evaluate=True)


@pytest.mark.parametrize("tower, words", (
    ("itself", "towers[0] returned a parameter itself (1), whose memory FSDP2 has freed"),
    ("method", "towers[0] returned a DTensor (1): FSDP2 gathers parameters for a module's forward"),
))  # fmt: skip
def test_a_parameter_out_of_its_forward_pass(pools, tower, words):
    for error, _ in pools(2).run(cached.bare_parameter, [(tower,)] * 2):
        assert words in error


def test_a_method_that_fsdp_knows(pools):
    image = cached.Image().double()
    x, scale = image(unit(4, WIDTH, 0).double())
    (x.sum() * scale.sum()).backward()
    for _, grad in pools(2).run(cached.bare_parameter, [("registered method",)] * 2):
        assert distance(grad, image.log_scale.grad) < 3e-6


@pytest.mark.parametrize("wrap", WRAPS)
def test_a_scaled_step_that_overflows_on_one_rank(pools, wrap):
    assert pools(2).run(cached.scaled, [(wrap, 1)] * 2) == [(True, 4.0)] * 2
    assert pools(2).run(cached.scaled, [(wrap, -1)] * 2) == [(False, 8.0)] * 2


@pytest.mark.slow
@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("sizes", ([8, 5, 0], [3, 0, 1, 6]))
def test_encoder_in_chunks_on_more_ranks(pools, sizes, loss, scheme, wrap):
    want = train_alone(loss, sizes, 3)
    given = [(wrap, loss, sizes, 3, 2, scheme, False)] * len(sizes)
    for found, _ in pools(len(sizes)).run(cached.encoder, given):
        for name, value in want.items():
            assert distance(found[name], value) < 3e-6, name
