"""The command line as a user meets it: help, one-line errors, exit codes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from m3bind.cli import main
from m3bind.data.dataset import Dataset, ModalityInfo
from m3bind.errors import M3BindError

COMMANDS = (
    "info", "phantom", "samples", "prepare", "pretrain", "align", "distill", "embed", "eval",
    "report", "demo",
)  # fmt: skip


def m3bind(*arguments: str, cwd: Path | None = None, **environment: str):
    return subprocess.run(
        [sys.executable, "-m", "m3bind", *arguments],
        cwd=cwd, env={**os.environ, "COLUMNS": "100", **environment},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip


@pytest.fixture
def here(monkeypatch, capsys):
    """The same in this process, whose start takes longer than these commands."""

    def run(*arguments: str) -> subprocess.CompletedProcess:
        monkeypatch.setattr(sys, "argv", ["m3bind", *arguments])
        monkeypatch.setenv("COLUMNS", "100")
        with pytest.raises(SystemExit) as stop:
            main()
        return subprocess.CompletedProcess(arguments, stop.value.code or 0, *capsys.readouterr())

    return run


def test_help_names_every_command():
    shown = m3bind("--help")
    assert shown.returncode == 0
    for command in COMMANDS:
        assert f" {command} " in shown.stdout, command


@pytest.mark.parametrize("command", ["prepare", "align", "demo"])
def test_each_command_has_help(here, command):
    shown = here(command, "--help")
    assert shown.returncode == 0
    assert "Usage" in shown.stdout and "--help" in shown.stdout


def one_line(result) -> str:
    assert result.returncode == 1, result.stderr
    assert "Traceback" not in result.stderr
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("m3bind: ")
    return line


def test_unknown_key_is_one_line_with_file_key_and_remedy(tmp_path):
    settings = tmp_path / "mine.yaml"
    settings.write_text("align: {agrement: mse}\n")
    line = one_line(m3bind("align", "--config", str(settings)))
    assert str(settings) in line and "align.agrement" in line and "'agreement'" in line


def test_bad_override_is_one_line(here, tmp_path):
    settings = tmp_path / "mine.yaml"
    settings.write_text("seed: 1\n")
    line = one_line(here("align", "-c", str(settings), "align.steps=many"))
    assert "align.steps" in line and "many" in line


def test_missing_data_set_is_one_line(here, tmp_path):
    settings = tmp_path / "mine.yaml"
    settings.write_text(f"data: {tmp_path}/nowhere\n")
    line = one_line(here("align", "-c", str(settings)))
    assert "nowhere" in line and "m3bind phantom" in line


def test_info_works_without_the_extra(tmp_path):
    """`info` must not need typer, rich or omegaconf: a core install has none of them."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\nfor name in ('typer', 'rich', 'omegaconf', 'tqdm', 'yaml', 'scipy'):\n"
        "    sys.modules[name] = None\n"
    )
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    shown = m3bind("info", PYTHONPATH=path)
    assert shown.returncode == 0, shown.stderr
    assert "clip_loss" in shown.stdout
    other = m3bind("align", PYTHONPATH=path)
    assert other.returncode == 1 and "m3bind[train]" in other.stderr


def test_a_file_in_the_place_of_a_folder_is_named(tmp_path):
    taken = tmp_path / "taken"
    taken.write_text("a file")
    result = m3bind("phantom", str(taken / "shards"), "--train", "1")
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert f"m3bind: {taken}" in result.stderr and "choose another path" in result.stderr


def test_damaged_metrics_are_named(tmp_path):
    from m3bind.eval.metrics import load_metrics

    path = tmp_path / "metrics.json"
    path.write_text('{"seed": ')
    with pytest.raises(M3BindError, match=r"metrics\.json is damaged .*: run m3bind eval again"):
        load_metrics(path)


def test_a_full_disk_is_one_line_and_leaves_no_half_shard(tmp_path):
    code = (
        "import resource, sys\nresource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))\n"
        f"sys.argv = ['m3bind', 'phantom', {str(tmp_path)!r}, '--train', '4', '--workers', '1']\n"
        "from m3bind.cli import main\nmain()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "the space that is left" in done.stderr
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_too_little_memory_is_one_line(tmp_path):
    settings = tmp_path / "mine.yaml"
    shards = tmp_path / "shards"
    settings.write_text(f"data: {shards}\nwidth: 1000000000000\noutput: {tmp_path}/run\n")
    info = ModalityInfo(kind="image2d", labels=["none"])
    Dataset(
        root=shards, name="t", simulated=True, labels=["none"], modalities={"xray": info}
    ).write()
    line = one_line(m3bind("pretrain", "-c", str(settings)))
    assert "not enough memory" in line and "width" in line


@pytest.mark.parametrize("missing", ["omegaconf", "yaml"])
def test_a_part_of_the_extra_that_is_missing_is_named(tmp_path, missing):
    """Modules that a command imports only when it comes to need them."""
    (tmp_path / "sitecustomize.py").write_text(f"import sys\nsys.modules[{missing!r}] = None\n")
    settings = tmp_path / "mine.yaml"
    settings.write_text("seed: 1\n")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    line = one_line(m3bind("align", "-c", str(settings), PYTHONPATH=path))
    assert missing in line and "m3bind[train]" in line
