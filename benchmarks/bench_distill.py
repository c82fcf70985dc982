"""similarity_distill, forward and backward, beside its peers and the floor of six bare GEMMs.

open_clip's row is its DistillClipLoss' distillation term; its contrastive term would be the same
work for everybody. The floor is that of O(N + M) memory: torch.compile keeps both N x N matrices
and needs four GEMMs.
"""

from functools import cache, partial

import pytest
import torch
import torch.nn.functional as F
from turns import FEATURES, ROUNDS, SIZES, Run, gemm_floor, in_turns, record, step, unit_rows

from m3bind.ops import similarity_distill

SCALE, TEACHER_SCALE = 50.0, 100.0
CONTESTANTS = ("m3bind", "m3bind chunked", "open_clip", "torch.compile", "floor")


def one_matrix_loss(x, y, scale, teacher_x, teacher_y, teacher_scale):
    """One matrix of the student and one of the teacher: both directions share them."""
    student, teacher = scale * x @ y.T, teacher_scale * teacher_x @ teacher_y.T
    rows = F.cross_entropy(student, teacher.softmax(1))
    columns = F.cross_entropy(student.T, teacher.T.softmax(1))
    return (rows + columns) / 2


def open_clip_loss(x, y, scale, teacher_x, teacher_y, teacher_scale):
    loss = pytest.importorskip("open_clip.loss").DistillClipLoss()
    student, student_text = loss.get_logits(x, y, scale)
    teacher, teacher_text = loss.get_logits(teacher_x, teacher_y, teacher_scale)
    return (loss.dist_loss(teacher, student) + loss.dist_loss(teacher_text, student_text)) / 2


LOSSES = {
    "m3bind": partial(similarity_distill, kind="ce"),
    "m3bind chunked": partial(similarity_distill, kind="ce", backend="chunked"),
    "open_clip": open_clip_loss,
    "torch.compile": one_matrix_loss,
}


def contestant(name: str, n: int) -> Run:
    if name == "floor":
        return gemm_floor(n, "fp32", logits=2, teacher=1)
    loss = LOSSES[name]
    if name == "torch.compile":
        loss = torch.compile(loss, fullgraph=True)
    x, y, *teacher = unit_rows(n, 4)
    return step(loss, (x, y, torch.tensor(SCALE)), *teacher, torch.tensor(TEACHER_SCALE))


@cache
def turns(n: int) -> dict[str, list[float]]:
    return in_turns({name: contestant(name, n) for name in CONTESTANTS})


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("name", CONTESTANTS)
def test_similarity_distill_forward_backward(benchmark, name, n):
    benchmark.group = f"similarity_distill fp32 forward+backward N={n} D={FEATURES}"
    record(benchmark, name, turns(n), op="similarity_distill", flop=12 * n * n * FEATURES)
    benchmark.pedantic(contestant(name, n), rounds=ROUNDS, warmup_rounds=2)


def test_contestants_compute_the_same():
    args = unit_rows(40, 4)
    args = (*args[:2], SCALE, *args[2:], TEACHER_SCALE)
    want = similarity_distill(*args, kind="ce", backend="reference")
    for loss in LOSSES.values():
        torch.testing.assert_close(loss(*args), want, rtol=1e-5, atol=1e-5)
