"""Every native operator against float64, with the instruction set that M3BIND_CPU_CAPABILITY names.

Run by test_instruction_sets.py; prints the instruction set, and what identifies the search's bits.
"""

import distill_oracle
import siglip_oracle
import torch
from clip_oracle import errors, run, truth, unit_pairs
from search_oracle import check, integers, orders, some_ids, want_ranks, want_topk

from m3bind import _C
from m3bind.ops import clip_loss, siglip_loss, similarity_distill, similarity_rank, similarity_topk


def clip() -> None:
    x, y = unit_pairs(141, 37, seed=0, noise=2.0)
    for scale in (20.0, -3.0, 0.0, 3000.0):
        got = run(lambda *a: clip_loss(*a, backend="cpp"), x, y, scale)
        for name, error in errors(got, truth(x, y, scale)).items():
            assert error < 1e-6 * max(10.0, abs(scale)), (scale, name, error)


def siglip() -> None:
    x, y = unit_pairs(141, 37, seed=0, noise=2.0)
    for scale, bias in ((20.0, -10.0), (-3.0, 0.0), (0.0, -2.0), (100.0, -60.0), (3000.0, 5.0)):
        got = siglip_oracle.run(lambda *a: siglip_loss(*a, backend="cpp"), x, y, scale, bias)
        for name, error in errors(got, siglip_oracle.truth(x, y, scale, bias)).items():
            assert error < 1e-6 * max(5.0, abs(scale) / 10), (scale, name, error)


def distill() -> None:
    given = distill_oracle.features(141, 77, 37, 11, seed=0)
    for kind in ("kl", "ce"):
        for scale, teacher_scale in ((20.0, 9.0), (-3.0, 100.0), (0.0, 14.0), (3000.0, 30.0)):
            scales = scale, teacher_scale
            got = distill_oracle.run(similarity_distill, given, *scales, kind=kind, backend="cpp")
            want = distill_oracle.truth(given, *scales, kind=kind)
            for name, error in errors(got, want).items():
                assert error < 1e-6 * max(10.0, abs(scale)), (kind, scale, name, error)
    x, y, _, _ = given
    for scale in (20.0, 3000.0):
        alike = distill_oracle.run(similarity_distill, (x, y, x, y), scale, scale, backend="cpp")
        for value in alike.values():
            assert not value.any(), scale


def large_logits() -> None:
    """Hundreds, and exact: nothing may round them on their way to an exponential."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randint(-9, 10, (60, 5), generator=generator).float() for _ in range(2))
    assert (x @ y.T).max() > 200
    got = run(lambda *a: clip_loss(*a, backend="cpp"), x, y, 1.0)
    alike = errors(got, truth(x, y, 1.0))
    given = x, y, x + 0.5, y
    got = distill_oracle.run(similarity_distill, given, 1.0, 1.0, backend="cpp")
    apart = errors(got, distill_oracle.truth(given, 1.0, 1.0))
    for error in (alike, apart):
        assert max(error[name] for name in ("loss", "x", "y")) < 1e-6, error


def search() -> int:
    queries, gallery = integers(37, 300, seed=0), integers(203, 300, seed=1)
    queries[3, 5] = gallery[100, 7] = torch.nan
    ids = some_ids(37, seed=2), some_ids(203, seed=3)
    found = orders(queries, gallery, ids)
    first = similarity_topk(queries, gallery, 20, exclude_ids=ids, backend="cpp")
    check(first, want_topk(found, 20))
    labels = torch.arange(203).expand(37, 203)
    ranks = similarity_rank(queries, gallery, labels, exclude_ids=ids, backend="cpp")
    assert torch.equal(ranks, want_ranks(found, labels))
    torch.manual_seed(0)
    queries, gallery = torch.randn(40, 600), torch.randn(6000, 600)
    values, indices = similarity_topk(queries, gallery, 4, backend="cpp")
    assert indices.equal((queries.double() @ gallery.double().T).topk(4).indices)
    return hash((*values.flatten().tolist(), *indices.flatten().tolist()))


if __name__ == "__main__":
    clip()
    siglip()
    distill()
    large_logits()
    print(_C.cpu_capability, search())
