"""memory_budget over ranks: what they keep changes no result, and they do keep it."""

import pytest
from test_losses_over_ranks import SCHEMES, case_of, check, spread


@pytest.mark.parametrize(("loss", "matrices"), [("clip_loss", 1), ("similarity_distill", 2)])
def test_memory_budget_changes_nothing(pools, loss, matrices):
    block = 64 * 64 * matrices  # of dot products of one rank's rows and one rank's columns
    for mib, keeps in ((0.04 * matrices, True), (0, False)):
        case = case_of(loss, [70, 64], [70, 64], memory_budget=mib)
        for scheme in SCHEMES:
            found = spread(pools(2), case, scheme=scheme)
            check(case, found)
            assert all((rank["saved"] >= block) == keeps for rank in found)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_any_ranks_keep_what_fits(pools, scheme):
    """Uneven and empty ones; a teacher of float64, whose products are float64's."""
    for rows in ([130, 5, 0], [0, 66, 1]):
        case = case_of("similarity_distill", rows, rows, memory_budget=0.15)
        case.rows["teacher_x"] = case.rows["teacher_x"].double()
        case.columns["teacher_y"] = case.columns["teacher_y"].double()
        for options in ({}, {"directions": "rows", "reduction": "sum"}):
            case.options.update(options)
            found = spread(pools(3), case, scheme=scheme)
            check(case, found)
            assert max(rank["saved"] for rank in found) >= 2 * 64 * max(rows)
