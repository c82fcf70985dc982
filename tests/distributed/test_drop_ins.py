"""Losses in the place of open_clip's, Inf-CL's and sentence-transformers', over two ranks."""

import peers
import pytest
import torch
import torch.nn.functional as F
from cases import distance, unit


@pytest.mark.parametrize("name", ("ClipLoss", "SigLipLoss", "DistillClipLoss"))
def test_open_clips_modules(pools, name):
    pytest.importorskip("open_clip")
    pool, counts = pools(2), [6, 6]
    ours, theirs = (pool.run(peers.modules, [(name, own, counts)] * 2) for own in (True, False))
    # SigLIP's is the mean of each rank's own rows there.
    value = torch.stack([found["loss"] for found in theirs]).mean()
    for mine, other in zip(ours, theirs, strict=True):
        assert distance(mine["loss"], value) < 1e-6
        for key in ("x", "y"):
            assert distance(mine[key], other[key]) < 3e-6, key
    for key in ("scale", "bias")[: 2 if name == "SigLipLoss" else 1]:
        mean = [sum(found[key] for found in each) / 2 for each in (ours, theirs)]
        assert distance(*mean) < 3e-6, key


@pytest.mark.parametrize("labelled", (False, True))
@pytest.mark.parametrize("name", ("cal_ring_loss", "cal_inf_loss"))
def test_inf_cls_means(pools, name, labelled):
    counts = [6, 3]
    labels = [torch.tensor([1, 0, 0, 5, -100, 2]), torch.tensor([2, 2, 0])]
    q, k = (unit(9, 8, seed).double().requires_grad_() for seed in (0, 1))
    scale = torch.tensor(9.0, dtype=torch.float64, requires_grad=True)
    whole = torch.cat([labels[0], labels[1] + 6]) if labelled else torch.arange(9)
    want = F.cross_entropy(scale * q @ k.T, whole)
    want.backward()
    found = pools(2).run(peers.inf_cl_rows, [(name, counts, labels if labelled else None)] * 2)
    for key, leaf in (("x", q), ("y", k)):
        got = torch.cat([rank[key] for rank in found]) / 2
        assert distance(got, leaf.grad) < 2e-6, key
    assert distance(sum(rank["scale"] for rank in found) / 2, scale.grad) < 2e-6
    assert all(distance(rank["loss"], want) < 1e-6 for rank in found)


@pytest.mark.slow  # each rank imports sentence-transformers
@pytest.mark.parametrize(
    "options",
    (
        {},
        {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"},
        {"directions": ("query_to_doc", "doc_to_query", "query_to_query", "doc_to_doc")},
        {"hardness_mode": "all_negatives", "hardness_strength": 3.0},
    ),
    ids=("rows", "per direction", "joint", "hardness"),
)
@pytest.mark.parametrize("columns", (2, 3))
def test_sentence_transformers(pools, columns, options):
    pytest.importorskip("sentence_transformers")
    ours, theirs = (
        pools(2).run(peers.sentences, [(own, columns, options)] * 2) for own in (True, False)
    )
    value = torch.stack([found.pop("loss") for found in theirs]).mean()
    for mine, other in zip(ours, theirs, strict=True):
        assert distance(mine["loss"], value) < 2e-6
        for key, grad in other.items():
            assert distance(mine[key], grad) < 1e-5, key
