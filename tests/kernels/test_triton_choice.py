"""When the triton backend runs, and with which configuration: no kernel runs here."""

import pytest
import torch
from triton.runtime.errors import OutOfResources

from m3bind import backends, info, verified
from m3bind_kernels import tuning
from m3bind_kernels.configs import TABLE, Config, candidates
from m3bind_kernels.launch import Inputs

CONFIGS = [Config(64, 64, 32, 4, 3), Config(128, 64, 32, 8, 3), Config(64, 128, 32, 8, 3)]


def test_only_by_choice_before_it_has_run_on_a_gpu(monkeypatch):
    monkeypatch.setattr(verified, "table", dict)
    for op in backends.BUILT_ON:
        assert backends.resolve(op, "cuda", torch.bfloat16) == "chunked"
        assert backends.resolve(op, "cuda", torch.bfloat16, "triton") == "triton"
        with pytest.raises(ValueError, match="it takes float32, bfloat16, float16, not float64"):
            backends.resolve(op, "cuda", torch.float64, "triton")
        with pytest.raises(ValueError, match="it runs on cuda tensors, not on cpu"):
            backends.resolve(op, "cpu", torch.float32, "triton")
    (told,) = (text for name, text in info.support("similarity_stats", "cuda") if name == "triton")
    assert "fp32 bf16 fp16" in told and "not yet run on a GPU" in told


@pytest.fixture
def inputs(monkeypatch, tmp_path) -> Inputs:
    monkeypatch.setattr(tuning, "for_device", lambda *_: CONFIGS)
    monkeypatch.setattr(tuning, "WORTH_MEASURING", 100)
    monkeypatch.setattr(tuning, "_known", {})
    monkeypatch.setattr(tuning, "_file", lambda: tmp_path / "cache" / "choices.json")
    x = torch.ones(20, 8)
    return Inputs.of(x, x, torch.tensor(1.0), None, None, None, None, 0.0, False)


def pretend(monkeypatch, times):
    """Measured times, one a configuration; returns those that were measured."""
    measured = []

    def measure(attempt):
        attempt()
        return times[CONFIGS.index(measured[-1])]

    monkeypatch.setattr(tuning, "measure", measure)
    return measured, lambda part, config: measured.append(config)


def test_the_fastest_is_chosen_once_and_remembered(monkeypatch, inputs):
    measured, attempt = pretend(monkeypatch, (3.0, 1.0, 2.0))
    for _ in range(2):
        assert tuning.choose("stats_fwd", inputs, attempt) == CONFIGS[1]
    assert measured == CONFIGS
    tuning._known.clear()  # as in another process
    assert tuning.choose("stats_fwd", inputs, attempt) == CONFIGS[1]
    assert len(measured) == 3
    tuning._known.clear()
    tuning._file().write_text("{")
    assert tuning.choose("stats_fwd", inputs, attempt) == CONFIGS[1]
    assert len(measured) == 6


def test_what_does_not_fit_is_left_out(monkeypatch, inputs):
    def attempt(part, config):
        if config == CONFIGS[0]:
            raise OutOfResources(300000, 232448, "shared memory")

    monkeypatch.setattr(tuning, "measure", lambda run: run() or 1.0)
    assert tuning.choose("stats_fwd", inputs, attempt) == CONFIGS[1]


def test_nothing_is_measured_where_it_is_not_wanted(monkeypatch, inputs):
    measured, attempt = pretend(monkeypatch, (3.0, 1.0, 2.0))
    torch.use_deterministic_algorithms(True)
    try:
        assert tuning.choose("stats_fwd", inputs, attempt) == CONFIGS[0]
    finally:
        torch.use_deterministic_algorithms(False)
    monkeypatch.setattr(tuning, "WORTH_MEASURING", 401)
    assert tuning.choose("stats_fwd", inputs, attempt) == CONFIGS[0]
    assert measured == []


@pytest.mark.parametrize("kernel", sorted({name for name, _, _ in TABLE}))
def test_there_is_a_configuration_for_every_device(kernel):
    """99 KiB of shared memory: sm_86, sm_89 and sm_120."""
    for capability, limit in ((80, 163), (86, 99), (89, 99), (90, 227), (103, 227), (120, 99)):
        for half in (True, False):
            first = candidates(kernel, half, capability, limit << 10)[0]
            assert first.shared_bytes(2 if half else 4) <= limit << 10
    assert candidates(kernel, True, 75, 64 << 10)[0] in TABLE[kernel, True, 80]
