"""MultipleNegativesRankingLoss against sentence-transformers' own, in values and gradients."""

import inspect
import itertools

import pytest
import torch
from sentence_transformers.sentence_transformer import losses as theirs
from sentence_transformers.util import cos_sim, dot_score, euclidean_sim

from m3bind.integrations.sentence_transformers import MultipleNegativesRankingLoss

ALL = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
DIRECTIONS = [
    ("query_to_doc", *rest)
    for number in range(4)
    for rest in itertools.combinations(ALL[1:], number)
]
HARDNESS = (None, "in_batch_negatives", "hard_negatives", "all_negatives")


class Model(torch.nn.Module):
    """Looks rows up in a table: what a loss needs of a SentenceTransformer."""

    def __init__(self, num, dim, dtype=torch.float32):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.table = torch.nn.Parameter(torch.randn(num, dim, generator=generator).to(dtype))

    def forward(self, features):
        return {"sentence_embedding": self.table[features["rows"]]}


def columns(num, negatives):
    """(anchor, positive, negative_1, ...): rows of the table."""
    return [{"rows": torch.arange(num) + i * num} for i in range(2 + negatives)]


def run(loss_class, num, negatives, dtype=torch.float32, dim=24, **options):
    model = Model(num * (2 + negatives), dim, dtype)
    loss = loss_class(model, **options)(columns(num, negatives), None)
    loss.backward()
    return loss.detach(), model.table.grad


def compare(num, negatives, rtol=2e-5, atol=1e-7, **options):
    want, want_grad = run(theirs.MultipleNegativesRankingLoss, num, negatives, **options)
    got, got_grad = run(MultipleNegativesRankingLoss, num, negatives, **options)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert torch.isfinite(want_grad).all()
    assert (got_grad - want_grad).norm() <= rtol * want_grad.norm() + atol


@pytest.mark.parametrize("negatives", (0, 1, 3))
@pytest.mark.parametrize("directions", DIRECTIONS, ids="+".join)
def test_joint_directions(negatives, directions):
    compare(17, negatives, directions=directions)


@pytest.mark.parametrize("negatives", (0, 1, 3))
@pytest.mark.parametrize("directions", (ALL[:1], ("query_to_doc", "doc_to_query")))
def test_a_softmax_per_direction(negatives, directions):
    compare(17, negatives, directions=directions, partition_mode="per_direction")


@pytest.mark.parametrize("negatives", (0, 2))
@pytest.mark.parametrize("hardness_mode", HARDNESS[1:])
@pytest.mark.parametrize("directions", (ALL[:1], ALL), ids=("one", "all"))
def test_hardness(negatives, hardness_mode, directions):
    options = {"hardness_mode": hardness_mode, "hardness_strength": 5.0, "directions": directions}
    compare(17, negatives, **options)


def test_hardness_per_direction():
    compare(
        17, 2, hardness_mode="all_negatives", hardness_strength=9.0,
        directions=("query_to_doc", "doc_to_query"), partition_mode="per_direction",
    )  # fmt: skip


def test_dot_products_and_scale():
    compare(17, 1, similarity_fct=dot_score, scale=0.3, directions=ALL)


def test_float64():
    options = {"dtype": torch.float64, "directions": ALL, "hardness_mode": "all_negatives"}
    compare(17, 2, rtol=1e-12, hardness_strength=3.0, **options)


@pytest.mark.parametrize("scale", (13.0, 15.0, 17.0, 30.0))
def test_positives_far_below_all_others(scale):
    """Losses from 20 up: a softplus that is cut off there differs in the 10th digit."""
    generator = torch.Generator().manual_seed(0)
    anchors = torch.randn(9, 24, generator=generator, dtype=torch.float64)
    columns = [anchors, -anchors, anchors.roll(1, 0)]
    results = [
        loss_class(None, scale, directions=ALL).compute_loss_from_embeddings(columns, None)
        for loss_class in (MultipleNegativesRankingLoss, theirs.MultipleNegativesRankingLoss)
    ]
    assert results[1] > 20
    torch.testing.assert_close(*results, rtol=1e-13, atol=0)


@pytest.mark.parametrize("negatives", (0, 2))
@pytest.mark.parametrize("hardness_mode", HARDNESS)
@pytest.mark.parametrize("directions", DIRECTIONS, ids="+".join)
def test_one_row_has_nothing_to_compete_with(negatives, hardness_mode, directions):
    options = {"hardness_mode": hardness_mode, "hardness_strength": 2.0, "directions": directions}
    compare(1, negatives, atol=1e-6, **options)


def test_a_learned_scale():
    grads = []
    for loss_class in (theirs.MultipleNegativesRankingLoss, MultipleNegativesRankingLoss):
        scale = torch.tensor(15.0, requires_grad=True)
        run(
            loss_class, 17, 2, scale=scale, directions=("query_to_doc", "doc_to_query"),
            hardness_mode="all_negatives", hardness_strength=4.0,
        )  # fmt: skip
        grads.append(scale.grad)
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("directions", (ALL[:1], ALL), ids=("one", "all"))
def test_a_separated_batch_keeps_its_gradient(directions):
    """Positives that equal their anchors: theirs in float64 tells the value and the gradient."""

    def separated(loss_class, dtype):
        model = Model(24, 32, dtype)
        with torch.no_grad():
            model.table[:12] = torch.eye(12, 32) + 0.1 * Model(12, 32).table
            model.table[12:] = model.table[:12]
        loss = loss_class(model, scale=25.0, directions=directions)(columns(12, 0), None)
        loss.backward()
        return loss.detach().double(), model.table.grad.double()

    value, grad = separated(theirs.MultipleNegativesRankingLoss, torch.float64)
    got, got_grad = separated(MultipleNegativesRankingLoss, torch.float32)
    torch.testing.assert_close(got, value, rtol=1e-4, atol=0)
    assert (got_grad - grad).norm() <= 1e-3 * grad.norm()


@pytest.mark.parametrize("directions", (ALL[:1], ALL), ids=("one", "all"))
def test_bfloat16_embeddings_have_float32_scores(directions):
    options = {"num": 40, "negatives": 1, "directions": directions}
    exact = None
    errors = {}
    model = Model(120, 24, torch.bfloat16)
    rounded = [
        torch.nn.functional.normalize(model.table[c["rows"]], dim=-1) for c in columns(40, 1)
    ]
    exact = theirs.MultipleNegativesRankingLoss(
        None, similarity_fct=dot_score, directions=directions
    ).compute_loss_from_embeddings([r.double() for r in rounded], None)
    for loss_class in (theirs.MultipleNegativesRankingLoss, MultipleNegativesRankingLoss):
        value, _ = run(loss_class, dtype=torch.bfloat16, **options)
        errors[loss_class] = (value.double() - exact).abs().item()
    assert errors[MultipleNegativesRankingLoss] < 1e-5
    assert errors[MultipleNegativesRankingLoss] <= errors[theirs.MultipleNegativesRankingLoss]


@pytest.mark.parametrize("directions", (ALL[:1], ALL), ids=("one", "all"))
def test_no_matrix_is_kept(directions):
    num, kept = 300, []

    def keep(tensor):
        kept.append(tensor.numel())
        return tensor

    embeddings = [torch.randn(num, 8, requires_grad=True) for _ in range(4)]
    for loss_class in (MultipleNegativesRankingLoss, theirs.MultipleNegativesRankingLoss):
        loss_fn = loss_class(
            None, directions=directions, hardness_mode="all_negatives", hardness_strength=2.0
        )
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss_fn.compute_loss_from_embeddings(embeddings, None)
        matrices = [size for size in kept if size >= num * num]
        assert bool(matrices) == (loss_class is theirs.MultipleNegativesRankingLoss)


def test_the_constructor_is_theirs():
    ours, own = (
        inspect.signature(c)
        for c in (MultipleNegativesRankingLoss, theirs.MultipleNegativesRankingLoss)
    )
    assert ours == own
    options = {
        "scale": 7.0,
        "similarity_fct": dot_score,
        "directions": ALL,
        "hardness_strength": 2.0,
    }
    loss = MultipleNegativesRankingLoss(None, **options)
    want = theirs.MultipleNegativesRankingLoss(None, **options)
    assert loss.get_config_dict() == want.get_config_dict()
    assert isinstance(loss, theirs.MultipleNegativesRankingLoss)


def test_what_cannot_be_done_is_refused():
    with pytest.raises(ValueError, match=r"similarity_fct=.*pass cos_sim or dot_score"):
        MultipleNegativesRankingLoss(None, similarity_fct=euclidean_sim)
    with pytest.raises(ValueError, match="'query_to_doc' direction is required"):
        MultipleNegativesRankingLoss(None, directions=("doc_to_query",))
    with pytest.raises(ValueError, match="1 columns of texts"):
        MultipleNegativesRankingLoss(Model(4, 2))(columns(2, -1), None)
    loss = MultipleNegativesRankingLoss(Model(8, 2), gather_across_devices=True)
    assert loss(columns(4, 0), None).isfinite()


def test_an_argument_of_a_later_release_is_refused(monkeypatch):
    own = theirs.MultipleNegativesRankingLoss.__init__

    def later(self, model, scale=20.0, similarity_fct=cos_sim, twist=0.0):
        own(self, model, scale, similarity_fct)

    monkeypatch.setattr(theirs.MultipleNegativesRankingLoss, "__init__", later)
    assert MultipleNegativesRankingLoss(None, 5.0).scale == 5.0
    with pytest.raises(ValueError, match=r"twist=1\.0 is an argument of a later"):
        MultipleNegativesRankingLoss(None, twist=1.0)
