"""Every example runs as its reader runs it: a process of its own, on the CPU, without network."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
NAMES = sorted(path.name for path in EXAMPLES.glob("*.py"))
# A proxy that nobody serves: whatever asks for the network fails.
NO_NETWORK = dict.fromkeys(("http_proxy", "https_proxy", "all_proxy"), "http://127.0.0.1:9")
SAYS = {
    "hf_clip.py": "logits None",
    "inf_cl_names.py": "one call takes",
    "large_batch.py": "saw at most 64 rows at once",
    "open_clip_training.py": "inside:  <class 'm3bind.integrations.open_clip.ClipLoss'>",
    "own_loss.py": "kept for the backward pass: 64 numbers a row",
    "plain_loop.py": "were never in memory",
    "retrieval.py": "where its rank says so: True",
    "sentence_transformers_training.py": "32 of 32 find their paraphrase",
}


def run(name, folder):
    environment = {
        key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")
    }
    done = subprocess.run(
        [sys.executable, EXAMPLES / name],
        cwd=folder,
        env=environment | NO_NETWORK | {"CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", NAMES)
def test_example(name, tmp_path):
    printed = run(name, tmp_path)
    assert SAYS[name] in printed
    # Where it trains, it learns.
    for first, last in re.findall(r"^loss ([\d.]+) -> ([\d.]+)$", printed, re.MULTILINE):
        assert float(last) < float(first) / 3
    assert list(tmp_path.iterdir()) == []


def test_each_has_one_line_in_the_readme():
    listed = re.findall(r"^\| `(\w+\.py)` \|", (EXAMPLES / "README.md").read_text(), re.MULTILINE)
    assert sorted(listed) == NAMES
