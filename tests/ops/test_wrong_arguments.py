"""Wrong arguments give one clear error, that names the argument and its value."""

import pytest
import torch
from clip_oracle import needs_native, unit_pairs
from distill_oracle import features

from m3bind.losses import SigLipLoss
from m3bind.ops import (
    clip_loss,
    siglip_loss,
    similarity_distill,
    similarity_lse,
    similarity_rank,
    similarity_topk,
)

IDS = torch.arange(6)

CLIP = {
    "matrix": (lambda x, y: clip_loss(x[0], y, 1.0), r"x has shape \(7,\)"),
    "rows": (lambda x, y: clip_loss(x, y[:3], 1.0), "x has 6 rows, y has 3: row i"),
    "features": (lambda x, y: clip_loss(x, y[:, :3], 1.0), "x has 7 features a row, y has 3"),
    "no features": (lambda x, y: clip_loss(x[:, :0], y[:, :0], 1.0), "at least 1"),
    "dtypes": (lambda x, y: clip_loss(x, y.half(), 1.0), "torch.float32, y is torch.float16"),
    "integers": (lambda x, y: clip_loss(x.int(), y.int(), 1.0), "torch.int32; cast"),
    "not a tensor": (lambda x, y: clip_loss(x.tolist(), y, 1.0), "x must be a tensor, not list"),
    "device": (lambda x, y: clip_loss(x, y.to("meta"), 1.0), "x is on cpu, y on meta"),
    "scale": (lambda x, y: clip_loss(x, y, torch.ones(2)), r"logit_scale has shape \(2,\)"),
    "scale type": (lambda x, y: clip_loss(x, y, "1"), "logit_scale must be a number"),
    "scale size": (lambda x, y: clip_loss(x, y, 10**40), "logit_scale: the number is too large"),
    "scale beyond": (lambda x, y: clip_loss(x, y, 10**400), "logit_scale: the number is too large"),
    "reduction": (lambda x, y: clip_loss(x, y, 1.0, reduction="avg"), "one of mean, sum, none"),
    "backend": (lambda x, y: clip_loss(x, y, 1.0, backend="fast"), "reference, chunked, cpp"),
    "triton": (lambda x, y: clip_loss(x, y, 1.0, backend="triton"), "cannot run clip_loss: "),
    "float64": (lambda x, y: clip_loss(x.double(), y.double(), 1.0, backend="cpp"), "not float64"),
    "one id": (lambda x, y: similarity_lse(x, y, 1.0, row_ids=torch.arange(6)), "both row_ids"),
    "ids": (
        lambda x, y: similarity_lse(x, y, 1.0, row_ids=torch.arange(5), col_ids=torch.arange(6)),
        r"row_ids has shape \(5,\)",
    ),
}

SIGLIP = {
    "matrix": (lambda x, y: siglip_loss(x[0], y, 1.0), r"x has shape \(7,\)"),
    "rows": (lambda x, y: siglip_loss(x, y[:3], 1.0), "x has 6 rows, y has 3"),
    "features": (lambda x, y: siglip_loss(x, y[:, :3], 1.0), "x has 7 features a row, y has 3"),
    "dtypes": (lambda x, y: siglip_loss(x, y.half(), 1.0), "torch.float32, y is torch.float16"),
    "device": (lambda x, y: siglip_loss(x, y.to("meta"), 1.0), "x is on cpu, y on meta"),
    "scale": (lambda x, y: siglip_loss(x, y, torch.ones(2)), r"logit_scale has shape \(2,\)"),
    "bias": (lambda x, y: siglip_loss(x, y, 1.0, torch.ones(2)), r"logit_bias has shape \(2,\)"),
    "bias type": (lambda x, y: siglip_loss(x, y, 1.0, "1"), "logit_bias must be a number"),
    "labels": (lambda x, y: siglip_loss(x, y, 1.0, labels=IDS + 1), "labels contains 6, but"),
    "short labels": (lambda x, y: siglip_loss(x, y, 1.0, labels=IDS[:5]), r"labels has shape \(5,"),
    "float ids": (lambda x, y: siglip_loss(x, y, 1.0, positive_ids=x[:, 0]), "be an int64 tensor"),
    "three ids": (
        lambda x, y: siglip_loss(x, y, 1.0, mask_ids=(IDS, IDS, IDS)),
        "mask_ids must be one tensor, or two",
    ),
    "both": (
        lambda x, y: siglip_loss(x, y, 1.0, labels=IDS, positive_ids=IDS),
        "labels and positive_ids exclude each other",
    ),
    "reduction": (lambda x, y: siglip_loss(x, y, 1.0, reduction="avg"), "one of mean, sum, none"),
    "backend": (lambda x, y: siglip_loss(x, y, 1.0, backend="fast"), "reference, chunked, cpp"),
    "triton": (lambda x, y: siglip_loss(x, y, 1.0, backend="triton"), "cannot run siglip_loss: "),
    "ranks": (lambda x, y: SigLipLoss(rank=1, world_size=4)(x, y, 1.0, 0.0), "world_size=4"),
    "exchange": (lambda x, y: SigLipLoss(dist_impl="ring"), "one of bidir, shift, reduce, gather"),
}


def distilled(changed):
    x, y, teacher_x, teacher_y = features(6, 8, 7, 5, seed=0)
    given = {
        "x": x, "y": y, "logit_scale": 1.0, "teacher_x": teacher_x, "teacher_y": teacher_y,
        "teacher_scale": 1.0,
    }  # fmt: skip
    return similarity_distill(**(given | changed))


SOME = torch.randn(6, 5)
_DISTILL = {
    "matrix": ({"teacher_x": SOME[0]}, r"teacher_x has shape \(5,\)"),
    "rows": ({"teacher_x": SOME[:3]}, "teacher_x has 3 rows on cpu, x has 6"),
    "columns": ({"teacher_y": SOME}, "teacher_y has 6 rows on cpu, y has 8"),
    "width": ({"teacher_x": SOME[:, :3]}, "teacher_x has 3 features a row, teacher_y has 5"),
    "dtypes": (
        {"teacher_x": SOME.half()},
        "teacher_x is torch.float16, teacher_y is torch.float32",
    ),
    "device": ({"teacher_x": SOME.to("meta")}, "teacher_x is on meta, teacher_y on cpu"),
    "not a tensor": ({"teacher_y": None}, "teacher_y must be a tensor, not NoneType"),
    "scale": ({"teacher_scale": torch.ones(2)}, r"teacher_scale has shape \(2,\)"),
    "kind": ({"kind": "js"}, "kind='js': choose one of kl, ce"),
    "directions": ({"directions": "row"}, "one of both, rows, columns"),
    "reduction": ({"reduction": "avg"}, "one of mean, sum, none"),
    "ids": ({"mask_ids": torch.arange(6)}, r"mask_ids of the columns has shape \(6,\)"),
    "backend": ({"backend": "fast"}, "reference, chunked, cpp"),
    "triton": ({"backend": "triton"}, "cannot run similarity_distill: "),
    "float64": (
        {"teacher_x": SOME.double(), "teacher_y": torch.randn(8, 5).double(), "backend": "cpp"},
        "not float64",
    ),
}
DISTILL = {
    name: (lambda x, y, given=given: distilled(given), message)
    for name, (given, message) in _DISTILL.items()
}

TOPK = {
    "matrix": (lambda x, y: similarity_topk(x[0], y, 1), r"queries has shape \(7,\)"),
    "features": (lambda x, y: similarity_topk(x, y[:, :3], 1), "gallery has 3; they must be"),
    "dtypes": (lambda x, y: similarity_topk(x, y.half(), 1), "gallery is torch.float16"),
    "device": (lambda x, y: similarity_topk(x, y.to("meta"), 1), "gallery on meta"),
    "k": (lambda x, y: similarity_topk(x, y, 0), "k=0; pass an integer from 1 to 1024"),
    "large k": (lambda x, y: similarity_topk(x, y, 1025), "k=1025; pass an integer from 1"),
    "k's type": (lambda x, y: similarity_topk(x, y, 1.0), "k must be an integer, not float"),
    "one id": (lambda x, y: similarity_topk(x, y, 1, exclude_ids=torch.arange(5)), "exclude_ids"),
    "id type": (lambda x, y: similarity_topk(x, y, 1, exclude_ids=torch.ones(6)), "int64 tensor"),
    "ids": (lambda x, y: similarity_topk(x, y, 1, exclude_ids="x"), "not str"),
    "float64": (lambda x, y: similarity_topk(x.double(), y.double(), 1, backend="cpp"), "float64"),
    "backend": (lambda x, y: similarity_topk(x, y, 1, backend="fast"), "reference, chunked, cpp"),
}


def labelled(labels, **more):
    return lambda x, y: similarity_rank(x, y, labels, **more)


RANK = {
    "matrix": (lambda x, y: similarity_rank(x[0], y, torch.arange(6)), "queries has shape"),
    "label type": (labelled(torch.zeros(6)), "labels must be an int64 tensor, not torch.float32"),
    "label list": (labelled([0] * 6), "labels must be an int64 tensor, not list"),
    "labels": (labelled(torch.arange(5)), r"labels has shape \(5,\) on cpu; pass \[6\] or \[6, P"),
    "beyond": (labelled(torch.arange(1, 7)), "labels contains 6, but there are 6 columns"),
    "ids": (labelled(torch.arange(6), exclude_ids=(torch.arange(6),)), "or two: ids"),
    "backend": (labelled(torch.arange(6), backend="cuda"), "cannot run similarity_rank"),
}

BAD_CALLS = {
    f"{operator}: {what}": call
    for operator, calls in {
        "clip_loss": CLIP,
        "siglip_loss": SIGLIP,
        "similarity_distill": DISTILL,
        "similarity_topk": TOPK,
        "similarity_rank": RANK,
    }.items()
    for what, call in calls.items()
}


@needs_native
@pytest.mark.parametrize("name", BAD_CALLS)
def test_wrong_arguments_give_one_clear_error(name):
    call, message = BAD_CALLS[name]
    with pytest.raises(ValueError, match=message):
        call(*unit_pairs(6, 7, seed=0))
