"""The training loop: what it minimises, validates, keeps and refuses."""

import math

import pytest
import torch
from holder import held
from torch import nn
from train_stub import Stub, StubLoader, config, kept, quadratic

from m3bind import files
from m3bind.dtypes import multiplies_bf16
from m3bind.errors import M3BindError
from m3bind.train import fit, load_best, schedule
from m3bind.train.index import read_checkpoint


def test_the_sum_of_the_losses_is_minimised_by_adamw(tmp_path) -> None:
    settings = config(steps=20, clip=0.5, weight_decay=0.1)
    task = Stub(quadratic)
    result = fit(task, {"stub": StubLoader()}, settings, tmp_path)
    expected = nn.Parameter(torch.tensor([1.0]))
    optimizer = torch.optim.AdamW([expected], lr=0.1, weight_decay=0.1)
    losses = []
    for step in range(1, 21):
        optimizer.param_groups[0]["lr"] = 0.1 * schedule(step, 2, 20)
        optimizer.zero_grad()
        parts = quadratic(expected, 0).values()
        sum(parts).backward()
        torch.nn.utils.clip_grad_norm_([expected], 0.5)
        optimizer.step()
        losses.append(sum(part.item() for part in parts))
    assert torch.equal(task.weight, expected)
    assert [line["loss"] for line in result.history] == losses
    assert (result.steps, result.best_step) == (20, 20) and math.isnan(result.best_score)
    assert result.history[0]["losses"] == {"a": 1.0, "b": 4.0}
    assert result.history[0]["report"] == {"note": 1.0}


def test_warm_up_is_linear_and_the_cosine_ends_above_zero() -> None:
    factors = [schedule(step, 4, 20) for step in range(1, 21)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[3:] == sorted(set(factors[3:]), reverse=True) and factors[-1] > 0
    assert schedule(12, 4, 20) == pytest.approx(0.5 * (1 + math.cos(math.pi * 8 / 17)))
    assert schedule(1, 0, 1) > 0


def test_the_best_validated_weights_are_kept_and_given_back(tmp_path) -> None:
    task = Stub(quadratic)
    seen: dict[int, tuple[float, float]] = {}
    scores = iter([0.2, 0.9, 0.5, 0.4])

    def validate() -> dict[str, float]:
        assert not task.training and not torch.is_grad_enabled()
        score = next(scores)
        seen[len(seen)] = (score, task.weight.item())
        return {"score": score, "other": 1.0}

    result = fit(task, {"stub": StubLoader()}, config(), tmp_path, validate=validate)
    assert (result.best_step, result.best_score) == (6, 0.9)  # of steps 3, 6, 9 and 10
    assert task.weight.item() == seen[1][1] != seen[3][1]
    assert all(task.modes)
    validated = [line["step"] for line in result.history if "validation" in line]
    assert validated == [3, 6, 9, 10]
    other = Stub(quadratic)
    assert load_best(other, tmp_path) == 6 and torch.equal(other.weight, task.weight)
    # The last weights are in the other checkpoint.
    assert read_checkpoint(tmp_path)["step"] == 10
    assert kept(tmp_path)["model/weight"].item() == seen[3][1]


def test_a_score_that_is_not_a_number_is_never_the_best(tmp_path) -> None:
    scores = iter([math.nan, 0.1, math.nan, math.nan])
    result = fit(
        Stub(quadratic), {"stub": StubLoader()}, config(), tmp_path,
        validate=lambda: {"score": next(scores)},
    )  # fmt: skip
    assert (result.best_step, result.best_score) == (6, 0.1)


def test_without_any_score_the_last_weights_are_kept(tmp_path) -> None:
    trained = Stub(quadratic)
    fit(trained, {"stub": StubLoader()}, config(), tmp_path / "without")
    task = Stub(quadratic)
    result = fit(
        task, {"stub": StubLoader()}, config(), tmp_path / "with",
        validate=lambda: {"score": math.nan},
    )  # fmt: skip
    assert result.best_step == 10 and math.isnan(result.best_score)
    assert torch.equal(task.weight, trained.weight)
    assert not any("validation" in line for line in result.history)
    assert load_best(Stub(quadratic), tmp_path / "with") == 10


def test_a_loss_that_is_not_finite_is_named(tmp_path) -> None:
    def function(weight, number):
        return {**quadratic(weight, number), "c": weight.sum() * (math.nan if number == 6 else 1)}

    with pytest.raises(
        M3BindError, match=r"step 6: the loss 'c' is nan: lower lr \(0.1\)"
    ) as error:
        fit(Stub(function), {"stub": StubLoader()}, config(), tmp_path)
    assert "\n" not in str(error.value)
    assert f"{tmp_path / 'checkpoints'} keeps step-4-" in str(error.value)
    assert torch.isfinite(kept(tmp_path)["model/weight"]).all()


def test_a_gradient_that_is_not_finite_is_named(tmp_path) -> None:
    def function(weight, number):
        return {"root": (weight - weight.detach()).abs().sqrt().sum()}  # 0, with slope infinity

    with pytest.raises(M3BindError, match="step 1: the gradient's norm is nan"):
        fit(Stub(function), {"stub": StubLoader()}, config(), tmp_path)


def test_bf16_autocast(tmp_path) -> None:
    dtypes = []

    def function(weight, number):
        dtypes.append((weight[None] @ weight[:, None]).dtype)
        return quadratic(weight, number)

    fit(Stub(function), {"stub": StubLoader()}, config(steps=1, bf16=True), tmp_path / "a")
    fit(Stub(function), {"stub": StubLoader()}, config(steps=1), tmp_path / "b")
    assert dtypes == [torch.bfloat16, torch.float32]


@pytest.mark.parametrize(
    ("avx512", "amx", "dtype"),
    [(0, 0, torch.float32), (1, 0, torch.bfloat16), (0, 1, torch.bfloat16)],
)
def test_auto_is_bf16_where_the_processor_multiplies_it(
    tmp_path, monkeypatch, avx512, amx, dtype
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bool(avx512))
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: bool(amx))
    dtypes = []

    def function(weight, number):
        dtypes.append((torch.ones(2, 2) @ torch.ones(2, 2)).dtype)
        return quadratic(weight, number)

    fit(Stub(function), {"stub": StubLoader()}, config(steps=1, bf16="auto"), tmp_path)
    assert dtypes == [dtype]
    for compute, has in (((7, 5), False), ((8, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, of=compute: of)
        assert multiplies_bf16("auto", torch.device("cuda")) == has
    assert not multiplies_bf16("auto", torch.device("mps"))


def test_a_folder_in_which_another_process_trains_is_refused(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(files, "_WAIT", 0.3)
    with held(tmp_path) as process:
        with pytest.raises(M3BindError, match=f"is in use by process {process.pid} on "):
            fit(Stub(quadratic), {"stub": StubLoader()}, config(), tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    fit(Stub(quadratic), {"stub": StubLoader()}, config(), tmp_path)  # which gives it back
    fit(Stub(quadratic), {"stub": StubLoader()}, config(), tmp_path)


def test_batches_move_to_the_device_of_the_task() -> None:
    batch = next(iter(StubLoader()))
    moved = batch.to("meta")
    assert moved.images.device.type == "meta" and batch.images.device.type == "cpu"
    assert moved.reports == ["r"] and len(moved) == 1


def test_a_step_is_the_mean_of_accumulated_batches(tmp_path) -> None:
    def function(weight, number):
        return {"a": ((weight - number) ** 2).sum()}

    task = Stub(function)
    settings = config(steps=2, warmup=0, clip=0, accumulate=3)
    result = fit(task, {"stub": StubLoader()}, settings, tmp_path)
    expected = nn.Parameter(torch.tensor([1.0]))
    optimizer = torch.optim.AdamW([expected], lr=0.1, weight_decay=settings.weight_decay)
    for step, numbers in ((1, (1, 2, 3)), (2, (4, 5, 6))):
        optimizer.param_groups[0]["lr"] = 0.1 * schedule(step, 0, 2)
        optimizer.zero_grad()
        loss = sum(((expected - n) ** 2).sum() for n in numbers) / 3
        loss.backward()
        optimizer.step()
        assert result.history[step - 1]["loss"] == pytest.approx(loss.item())
    assert task.weight.item() == pytest.approx(expected.item(), rel=1e-6)
