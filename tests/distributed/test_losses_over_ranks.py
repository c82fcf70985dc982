"""Each loss over ranks: value and gradients are those of one process on the whole batch."""

import pytest
import torch
from cases import Case, averaged, compute, distance, parts, truth, unit
from feature_oracle import cases as features_of

from m3bind.distributed import schemes

SCHEMES = ("gather", "circulate")
LOSSES = ("clip_loss", "siglip_loss", "similarity_distill")
D, E = 12, 7
# Rows and columns of each rank. One rank; equal; a short last batch; an empty rank; a first one
# that is empty, and columns left over; four, of one row and of none among them.
LAYOUTS = {
    "1": ([7], [7]),
    "2 equal": ([6, 6], [6, 6]),
    "2 uneven": ([8, 5], [8, 5]),
    "3 with an empty rank": ([8, 5, 0], [8, 5, 0]),
    "3, more columns": ([0, 3, 4], [2, 3, 9]),
    "4": ([3, 0, 1, 6], [5, 0, 1, 7]),
}
# Beside 1.5 times plain PyTorch's error: what its own luck may hide. A GEMM of 12 features sums in
# an order that depends on its shape, and gathering forms the logits of the columns' gradient in
# another shape than those of their log-sum-exps.
TOLERANCE = {torch.float64: 1e-14, torch.float32: 8e-7, torch.bfloat16: 3e-4}


def case_of(loss, rows, cols, dtype=torch.float32, seed=0, scale=10.0, **options):
    n, m = sum(rows), sum(cols)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    leaves = {"x": unit(n, D, seed).to(dtype), "y": unit(m, D, seed + 1).to(dtype)}
    leaves["scale"] = torch.tensor(scale, dtype=wide)
    given = {}
    if loss == "siglip_loss":
        leaves["bias"] = torch.tensor(-2.0, dtype=wide)
    if loss == "similarity_distill":
        given["rows"] = {"teacher_x": unit(n, E, seed + 2).to(dtype)}
        given["columns"] = {"teacher_y": unit(m, E, seed + 3).to(dtype)}
    return Case(
        loss=loss, row_counts=list(rows), col_counts=list(cols), leaves=leaves, options=options,
        **given,
    )  # fmt: skip


def spread(pool, case, weights=None, **how):
    """What the ranks find."""
    each = [how | case.options for _ in case.row_counts]
    if weights is not None:
        for counts, values in zip((case.row_counts, case.col_counts), weights, strict=False):
            for given, part in zip(each, values.split(counts), strict=True):
                given["weights"] = [*given.get("weights", []), part]
    return pool.run(compute, [(*p, e) for p, e in zip(parts(case), each, strict=True)])


def check(case, found, weights=None, times=1):
    """Against float64, within 1.5 times what plain PyTorch errs in the same dtype."""
    want, plain = truth(case, weights), truth(case, weights, exact=False)
    tolerance = TOLERANCE[case.leaves["x"].dtype]
    got = averaged(case, found)
    assert got.keys() == want["grads"].keys()
    for name, value in want["grads"].items():
        allowed = 1.5 * distance(plain["grads"][name], value) + tolerance
        if name == "bias" and value.norm() < 1e-12:
            allowed += 1e-6
        error = distance(got[name] / times, value)
        assert error <= allowed, f"{name}: {error} > {allowed}"
    joined = []
    for at, value in enumerate(want["outputs"]):
        each = [rank["outputs"][at] for rank in found]
        if value.dim() == 0:
            assert all(torch.equal(t.nan_to_num(), each[0].nan_to_num()) for t in each)
            joined.append(each[0])
        else:
            joined.append(torch.cat(each))
        error = distance(joined[at], value)
        allowed = 1.5 * distance(plain["outputs"][at], value) + tolerance
        assert error <= allowed, f"output {at}: {error} > {allowed}"


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("loss", LOSSES)
def test_mean(pools, loss, layout, scheme):
    case = case_of(loss, *LAYOUTS[layout])
    check(case, spread(pools(len(case.row_counts)), case, scheme=scheme))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", (torch.float64, torch.bfloat16))
@pytest.mark.parametrize("loss", LOSSES)
def test_dtypes(pools, loss, dtype, scheme):
    for seed, scale in ((0, 10.0), (7, 100.0)):
        case = case_of(loss, [70, 41, 0], [70, 41, 20], dtype, seed, scale)
        check(case, spread(pools(3), case, scheme=scheme))


def divided(rows, cols, given):
    """Arguments of the whole batch, as a case holds them."""
    made = {"rows": {}, "columns": {}, "options": {}, "extra": {}}
    leaves = {}
    for name, value in given.items():
        if name in ("labels", "soft_targets"):
            made["rows"][name] = value
        elif name in ("positive_ids", "mask_ids"):
            made["rows"][name], made["columns"][name] = value
        elif name == "negatives":
            leaves[name] = value
            shared = [2, *[1] * (len(rows) - 2), 5 - len(rows)]
            made["extra"][name] = shared if value.dim() == 2 else rows
        elif name == "logit_bias":
            leaves["bias"] = torch.tensor(value)
        else:
            made["options"][name] = value
    return made, leaves


UNEVEN = ([8, 5, 0], [9, 5, 4])


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", features_of(13, 18, D, 0))
def test_features_of_clip_loss(pools, name, scheme):
    made, leaves = divided(*UNEVEN, features_of(13, 18, D, 0)[name])
    case = case_of("clip_loss", *UNEVEN)
    case = Case(
        loss="clip_loss", row_counts=UNEVEN[0], col_counts=UNEVEN[1],
        leaves=case.leaves | leaves, **made,
    )  # fmt: skip
    check(case, spread(pools(3), case, scheme=scheme))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_soft_targets_at_logits_that_overflow(pools, scheme):
    """All pairs are masked but the targets, each on one rank alone."""
    n = [3, 4]
    case = case_of("clip_loss", n, n, torch.float64, scale=3000.0)
    case.leaves["y"] = case.leaves["x"].clone()
    case.rows["mask_ids"] = case.columns["mask_ids"] = torch.zeros(7, dtype=torch.int64)
    case.rows["soft_targets"] = torch.arange(7)[:, None], torch.ones(7, 1)
    found = spread(pools(2), case, scheme=scheme)
    assert all(rank["outputs"][0] == 0 for rank in found)
    check(case, found)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(
    "name", ("labels", "positive_ids and mask_ids", "mask_ids that hold the positives")
)
def test_pairs_of_siglip_loss(pools, name, scheme):
    made, _ = divided(*UNEVEN, features_of(13, 18, D, 0)[name])
    case = case_of("siglip_loss", *UNEVEN)
    case = Case(
        loss="siglip_loss", row_counts=UNEVEN[0], col_counts=UNEVEN[1], leaves=case.leaves, **made
    )
    check(case, spread(pools(3), case, scheme=scheme))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kind", ("kl", "ce"))
@pytest.mark.parametrize("directions", ("both", "rows", "columns"))
def test_similarity_distill(pools, directions, kind, scheme):
    case = case_of("similarity_distill", *UNEVEN, kind=kind, directions=directions)
    ids = torch.arange(13) // 2 % 3, torch.arange(18) % 3
    case.rows["mask_ids"], case.columns["mask_ids"] = ids
    check(case, spread(pools(3), case, scheme=scheme))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("reduction", ("sum", "none"))
@pytest.mark.parametrize("loss", LOSSES)
def test_reductions(pools, loss, reduction, scheme):
    case = case_of(loss, *UNEVEN, reduction=reduction)
    weights = None
    if reduction == "none":
        weights = [torch.linspace(0.5, 2, 13), torch.linspace(2, 1, 18)]
        weights = weights[:1] if loss == "siglip_loss" else weights
    check(case, spread(pools(3), case, weights, scheme=scheme), weights)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("loss", LOSSES)
def test_backward_twice_doubles_the_gradients(pools, loss, scheme):
    case = case_of(loss, [4, 5], [4, 5])
    check(case, spread(pools(2), case, scheme=scheme, backwards=2), times=2)


FROZEN = (("x",), ("y",), ("x", "y"), ("scale",), ("x", "y", "scale"))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(
    ("loss", "frozen"),
    # siglip_loss has a bias, too; of the others nothing would be left to differentiate.
    [(loss, f) for loss in LOSSES for f in FROZEN if loss == "siglip_loss" or len(f) < 3],
)
def test_what_needs_no_gradient_costs_none(pools, loss, frozen, scheme):
    case = case_of(loss, [4, 5], [4, 5])
    case.frozen = frozen
    check(case, spread(pools(2), case, scheme=scheme))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("loss", LOSSES)
def test_a_rank_that_needs_no_gradient_takes_part(pools, loss, scheme):
    case = case_of(loss, [4, 3, 2], [4, 3, 2])
    given = [(*part, {"scheme": scheme}) for part in parts(case)]
    leaves = tuple(case.leaves)
    given[1] = (*given[1][:3], leaves, given[1][4])
    given[2] = (*given[2][:3], ("x", "scale"), given[2][4])
    found, want = pools(3).run(compute, given), truth(case)["grads"]
    assert found[1]["grads"] == {} and "x" not in found[2]["grads"]
    for rank, at, names in ((0, slice(0, 4), "xy"), (2, slice(7, 9), "y")):
        for name in names:
            assert distance(found[rank]["grads"][name] / 3, want[name][at]) < 2e-6


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("loss", LOSSES)
def test_two_runs_agree_bit_for_bit(pools, loss, scheme):
    case = case_of(loss, [70, 41, 0], [70, 41, 0])
    first, second = (spread(pools(3), case, scheme=scheme) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one["outputs"][0], other["outputs"][0])
        assert all(torch.equal(one["grads"][name], other["grads"][name]) for name in one["grads"])


@pytest.mark.parametrize(
    ("device", "columns", "features", "mebibytes", "scheme"),
    (
        ("meta", 16383, 512, 80 << 10, "gather"),
        ("meta", 16384, 512, 80 << 10, "circulate"),  # its products take longer than its transfer
        ("meta", 8192, 4096, 4 << 10, "circulate"),  # 2 * 8 * 8192 * 4096 * 2 bytes are 1 GiB
        ("cpu", 1023, 512, 80 << 10, "gather"),
        ("cpu", 1024, 512, 80 << 10, "circulate"),
    ),
)
def test_automatic_scheme(device, columns, features, mebibytes, scheme):
    """Any device that is no CPU counts as a GPU."""
    spread_out = schemes.Layout(counts=[columns] * 8, rank=0)
    x = torch.empty(0, features, dtype=torch.bfloat16, device=device)
    assert schemes.chosen("auto", x, spread_out, spread_out, mebibytes) == scheme
    assert schemes.chosen("gather", x, spread_out, spread_out, 1) == "gather"


@pytest.mark.parametrize("loss", LOSSES)
def test_static_sizes(pools, loss):
    case = case_of(loss, [6, 6], [6, 6])
    check(case, spread(pools(2), case, sizes="static"))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_scale_has_its_true_gradient_on_each_rank(pools, loss, scheme):
    case = case_of(loss, *UNEVEN)
    found = spread(pools(3), case, scheme=scheme, reduce_scale=True)
    check(case, found)
    for name in ("scale", "bias"):
        each = [rank["grads"].get(name) for rank in found]
        assert all(grad is None or torch.equal(grad, each[0]) for grad in each)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("loss", LOSSES)
def test_where_nothing_is_left(pools, loss, scheme):
    """Log-sum-exps over nothing on every rank: one pair alone, and pairs that are all masked."""
    single = case_of(loss, [1, 0], [1, 0])
    masked = case_of(loss, [3, 2], [3, 2])
    masked.rows["mask_ids"] = masked.columns["mask_ids"] = torch.zeros(5, dtype=torch.int64)
    for case in (single, masked):
        found = spread(pools(2), case, scheme=scheme, reduction="sum")
        case.options["reduction"] = "sum"
        check(case, found)
        assert all(grad.isfinite().all() for rank in found for grad in rank["grads"].values())


@pytest.mark.parametrize("loss", LOSSES)
def test_a_batch_of_nothing(pools, loss):
    """As in torch, a mean of nothing is NaN and a sum of nothing 0."""
    for reduction, value in (("mean", float("nan")), ("sum", 0.0)):
        case = case_of(loss, [0, 0], [0, 0], reduction=reduction)
        for scheme in SCHEMES:
            for rank in spread(pools(2), case, scheme=scheme):
                assert rank["outputs"][0].eq(value) or reduction == "mean"
                assert rank["outputs"][0].isnan() == (reduction == "mean")


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("loss", LOSSES)
def test_not_a_number_stays_one(pools, loss, scheme):
    case = case_of(loss, [4, 3], [4, 3])
    case.leaves["x"][5, 2] = torch.nan
    found = spread(pools(2), case, scheme=scheme)
    assert all(rank["outputs"][0].isnan() and rank["grads"]["y"].isnan().any() for rank in found)
    assert averaged(case, found)["scale"].isnan()
