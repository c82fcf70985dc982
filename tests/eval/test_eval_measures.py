"""The measures against scikit-learn, hand calculation and analytic expectations."""

from itertools import permutations

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, balanced_accuracy_score

from m3bind.eval.fewshot import few_shot, pick_shots
from m3bind.eval.gap import modality_gap
from m3bind.eval.ranks import nearest, own_ranks
from m3bind.eval.retrieval import retrieve
from m3bind.eval.zeroshot import class_vectors, zero_shot


def _unit(x: np.ndarray) -> np.ndarray:
    x = np.asarray(x, dtype=np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def _random(seed: int, n: int, d: int = 16) -> np.ndarray:
    return _unit(np.random.default_rng(seed).standard_normal((n, d)))


def _clusters(labels: list[str], directions: dict[str, np.ndarray], noise: float, seed: int):
    rng = np.random.default_rng(seed)
    base = np.stack([directions[label] for label in labels])
    return _unit(base + noise * rng.standard_normal(base.shape))


CONDITIONS = ["a", "b", "c", "d"]
QUERY_LABELS = [*CONDITIONS, "none", "only_query", ""] * 6
GALLERY_LABELS = [*CONDITIONS, "none", "only_gallery", ""] * 9


def _expected_map(query, query_labels, gallery, gallery_labels):
    values = []
    for vector, label in zip(query, query_labels, strict=True):
        relevant = np.array([label == other for other in gallery_labels])
        if label not in ("none", "") and relevant.any():
            values.append(average_precision_score(relevant, gallery @ vector))
    return np.mean(values), len(values)


# rounded embeddings tie often, exact ones never: both ways of ranking are needed
@pytest.mark.parametrize("ties", [False, True])
def test_map_equals_scikit_learn(ties):
    query, gallery = _random(0, len(QUERY_LABELS)), _random(1, len(GALLERY_LABELS))
    if ties:
        corners = _unit(np.array([[1, 0], [0, 1], [-1, 0], [0.6, 0.8]]))
        rng = np.random.default_rng(2)
        query = corners[rng.integers(4, size=len(query))]
        gallery = corners[rng.integers(4, size=len(gallery))]
    found = retrieve(query, QUERY_LABELS, gallery, GALLERY_LABELS)
    expected, count = _expected_map(query, QUERY_LABELS, gallery, GALLERY_LABELS)
    assert found.num_queries == count == 4 * 6  # not none, not unknown, not the query's own
    assert found.num_gallery == len(gallery)  # none and the others stay in as distractors
    assert found.map == pytest.approx(expected, abs=1e-6)


def test_precision_and_recall_by_hand():
    gallery = _unit(np.array([[1.0, 0.0], [0.9, 0.1], [0.5, 0.5], [0.5, 0.5], [0.0, 1.0]]))
    labels = ["a", "b", "a", "b", "a"]
    found = retrieve(np.eye(2, dtype=np.float32)[:1], ["a"], gallery, labels, ks=(1, 2, 3, 10))
    # ranks: a, b, then a and b tied (half of the third place each), a
    assert found.precision == pytest.approx({1: 1.0, 2: 0.5, 3: 1.5 / 3, 10: 0.3})
    assert found.recall == pytest.approx({1: 1 / 3, 2: 1 / 3, 3: 0.5, 10: 1.0})
    # AP: 1/1, then 2 of 4 at the end of the tie, then 3 of 5
    assert found.map == pytest.approx((1 + 2 / 4 + 3 / 5) / 3)


def test_the_order_of_the_files_changes_nothing():
    corners = _unit(np.array([[1, 0], [0, 1], [0.6, 0.8]]))
    rng = np.random.default_rng(0)
    gallery, labels = corners[rng.integers(3, size=40)], ["a", "b", "none", "c"] * 10
    query, asked = _random(3, 12, 2), ["a", "b", "c"] * 4
    order = rng.permutation(40)
    one = retrieve(query, asked, gallery, labels)
    two = retrieve(query, asked, gallery[order], [labels[i] for i in order])
    assert one.map == pytest.approx(two.map, abs=1e-9)
    assert one.precision == pytest.approx(two.precision, abs=1e-9)


def test_perfect_embeddings_give_one():
    labels = ["a", "b", "c", "none"] * 8
    axes = dict(zip(["a", "b", "c", "none"], np.eye(4), strict=True))
    found = retrieve(
        _clusters(labels, axes, 0.05, 0), labels, _clusters(labels, axes, 0.05, 1), labels
    )
    assert found.map == pytest.approx(1.0)
    assert found.normalised == pytest.approx(1.0)
    assert found.recall[10] == pytest.approx(1.0)


def test_chance_of_unclustered_embeddings_is_the_prevalence():
    labels = [*CONDITIONS, "none"] * 60
    found = retrieve(_random(0, 300, 64), labels, _random(1, 300, 64), labels)
    # AP of a random order of n relevant among N is n/N plus about ln(N)/N
    assert found.chance == pytest.approx(0.2 + np.log(300) / 300, abs=0.02)
    assert abs(found.map - found.chance) < 0.03
    assert abs(found.normalised) < 0.04


def test_chance_of_clusters_is_the_mean_over_all_assignments():
    labels = ["a", "b", "c", "none"] * 5
    axes = dict(zip(["a", "b", "c", "none"], _random(5, 4), strict=True))
    query, gallery = _clusters(labels, axes, 0.1, 0), _clusters(labels, axes, 0.1, 1)
    exact = []
    for renamed in permutations(["a", "b", "c", "none"]):
        name = dict(zip(["a", "b", "c", "none"], renamed, strict=True))
        exact.append(_expected_map(query, labels, gallery, [name[x] for x in labels])[0])
    found = retrieve(query, labels, gallery, labels, num_permutations=20_000)
    assert found.chance == pytest.approx(np.mean(exact), abs=0.005)
    assert found.chance_std == pytest.approx(np.std(exact), abs=0.005)
    assert found.chance > 0.35  # far above the prevalence of 0.25: the clusters count


def test_tight_clusters_under_wrong_names_are_not_bound():
    labels = [*CONDITIONS, "none"] * 10
    names = [*CONDITIONS, "none"]
    axes = dict(zip(names, np.eye(5), strict=True))
    shifted = dict(zip(names, np.roll(np.eye(5), 1, axis=0), strict=True))
    query, gallery = _clusters(labels, axes, 0.05, 0), _clusters(labels, shifted, 0.05, 1)
    found = retrieve(query, labels, gallery, labels)
    assert found.normalised < 0.0
    assert found.chance < 0.5


def test_seed_fixes_chance_and_ids_must_differ():
    query, gallery = _random(0, len(QUERY_LABELS)), _random(1, len(GALLERY_LABELS))
    args = (query, QUERY_LABELS, gallery, GALLERY_LABELS)
    assert retrieve(*args, seed=1) == retrieve(*args, seed=1)
    assert retrieve(*args, seed=1).chance != retrieve(*args, seed=2).chance
    with pytest.raises(ValueError, match="'p7' is a query and in its own gallery"):
        retrieve(*args, query_ids=["p7"], gallery_ids=["p7"])
    assert retrieve(query[:2], ["none", ""], gallery[:2], ["none", ""]) is None


def test_ranks_of_pairs_by_hand():
    gallery = np.eye(4)[[0, 1, 2, 2, 3]]  # rows 2 and 3 are the same
    query = _unit(np.array([[1, 0.1, 0, 0], [1, 0.5, 0, 0], [0, 0, 1, 0], [0, 0, 1, 0]]))
    found = own_ranks(query, gallery, ks=(1, 2))
    # own at 1; after row 0; first of two equal ones, and second of them
    assert found.recall == {1: 0.5, 2: 1.0}
    assert found.median == 1.5 and found.num_queries == 4
    with pytest.raises(ValueError, match="5 queries for 4 rows"):
        own_ranks(gallery, query)


def test_ranks_and_nearest_equal_a_sort_of_the_matrix():
    query, gallery = _random(0, 40), _random(1, 90)
    order = np.argsort(-(query.astype(np.float64) @ gallery.T.astype(np.float64)), axis=1)
    place = np.argsort(order, axis=1)[np.arange(40), np.arange(40)]
    found = own_ranks(query, gallery)
    assert found.recall == {k: pytest.approx((place < k).mean()) for k in (1, 5, 10)}
    assert found.median == np.median(place + 1)
    for i, hits in enumerate(nearest(query, gallery, 7)):
        assert [row for _, row in hits] == order[i, :7].tolist()
        for similarity, row in hits:
            assert similarity == pytest.approx(query[i] @ gallery[row], abs=1e-6)
    assert len(nearest(query[:1], gallery[:3], 7)[0]) == 3


def test_the_operators_are_what_runs():
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        nearest(_random(0, 4), _random(1, 9), 3)
        own_ranks(_random(0, 4), _random(1, 9))
    ran = {event.key for event in profile.key_averages()}
    assert {"m3bind::similarity_topk_fwd", "m3bind::similarity_rank_fwd"} <= ran
    assert not ran & {"aten::sort", "aten::argsort"}


def test_class_vectors_average_directions():
    classes, vectors = class_vectors({"a": np.eye(3)[:2], "b": np.eye(3)[2:]})
    assert classes == ("a", "b")
    np.testing.assert_allclose(vectors, [[0.5**0.5, 0.5**0.5, 0], [0, 0, 1]], atol=1e-6)
    with pytest.raises(ValueError, match="'a' cancel out"):
        class_vectors({"a": np.array([[1.0, 0.0], [-1.0, 0.0]])})


def test_zero_shot_by_hand():
    prompts = {"a": np.eye(3)[:1], "b": np.eye(3)[1:2], "never": np.eye(3)[2:]}
    image = np.eye(3)[[0, 0, 0, 1, 1, 2, 2]]
    labels = ["a", "a", "a", "a", "b", "b", ""]
    found = zero_shot(image, labels, prompts)
    assert found.balanced_accuracy == pytest.approx((3 / 4 + 1 / 2) / 2)
    assert found.recall == pytest.approx({"a": 0.75, "b": 0.5})
    np.testing.assert_array_equal(found.confusion, [[3, 1, 0], [0, 1, 1], [0, 0, 0]])
    truth = [x for x in labels if x]
    predicted = [["a", "b", "never"][i] for i in image.argmax(1)][:6]
    with pytest.warns(UserWarning, match="y_pred contains"):
        assert balanced_accuracy_score(truth, predicted) == pytest.approx(found.balanced_accuracy)
    with pytest.raises(ValueError, match=r"no prompt for \['c'\]"):
        zero_shot(image[:1], ["c"], prompts)
    with pytest.raises(ValueError, match="no image has a label"):
        zero_shot(image[:1], [""], prompts)


def test_bootstrap_interval_covers_the_binomial_one():
    rng = np.random.default_rng(0)
    right = rng.random(400) < 0.8
    labels = ["a"] * 400
    image = np.eye(2)[np.where(right, 0, 1)]
    found = zero_shot(image, labels, {"a": np.eye(2)[:1], "b": np.eye(2)[1:]}, num_bootstrap=4000)
    half = 1.96 * np.sqrt(right.mean() * (1 - right.mean()) / 400)
    assert found.low == pytest.approx(right.mean() - half, abs=0.006)
    assert found.high == pytest.approx(right.mean() + half, abs=0.006)


def test_gap_by_hand():
    gap = modality_gap({"x": np.eye(3)[:1], "y": np.eye(3)[1:2], "z": np.eye(3)[:2]})
    # centroid of z is halfway between those of x and y
    half = np.sqrt(0.5)
    assert gap == pytest.approx(
        {"x<->y": np.sqrt(2), "x<->z": half, "y<->z": half, "mean": (np.sqrt(2) + 2 * half) / 3}
    )
    assert modality_gap({"x": np.eye(3)}) == {}


def test_shots_are_drawn_from_every_class_by_seed():
    labels = ["a", "b", "", "a", "b", "a", "b"] * 3
    rows = pick_shots(labels, 4, seed=3)
    assert sorted(labels[i] for i in rows) == ["a"] * 4 + ["b"] * 4
    np.testing.assert_array_equal(rows, pick_shots(labels, 4, seed=3))
    assert not np.array_equal(rows, pick_shots(labels, 4, seed=4))
    with pytest.raises(ValueError, match="'a' has 9 samples"):
        pick_shots(labels, 10, seed=0)


def test_few_shot_on_separable_and_on_meaningless_embeddings():
    labels = ["a", "b", "c"] * 30
    axes = dict(zip("abc", np.eye(3), strict=True))
    train, test = _clusters(labels, axes, 0.1, 0), _clusters(labels, axes, 0.1, 1)
    clear = few_shot(train, labels, test, labels, num_shots=4)
    assert clear.mean == 1.0 and clear.std == 0.0 and len(clear.values) == 5
    assert clear == few_shot(train, labels, test, labels, num_shots=4)
    noise = few_shot(_random(0, 90), labels, _random(1, 90), labels, num_shots=16)
    assert noise.mean == pytest.approx(1 / 3, abs=0.12)
    assert noise.std > 0
    with pytest.raises(ValueError, match="two classes"):
        few_shot(train, ["a"] * 90, test, labels, num_shots=1)
