"""open_clip trains with m3bind's losses inside `integrations.open_clip.apply()`, and only there."""

import json
import pickle
import sys
import types

import open_clip
import open_clip.factory
import open_clip.loss
import pytest
import torch

from m3bind import losses
from m3bind.integrations.open_clip import apply

NAMES = ("ClipLoss", "SigLipLoss", "DistillClipLoss")
THEIRS = {name: getattr(open_clip.loss, name) for name in (*NAMES, "CoCaLoss")}
MODEL = {
    "embed_dim": 16,
    "vision_cfg": {
        "image_size": 16, "patch_size": 8, "width": 32, "head_width": 16, "layers": 1,
    },
    "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1},
}  # fmt: skip


def in_place_of(value, name):
    """Whether a class is ours, and to those that ask one of open_clip's."""
    return issubclass(value, getattr(losses, name)) and issubclass(value, THEIRS[name])


KINDS = {"clip": "ClipLoss", "siglip": "SigLipLoss", "distill": "DistillClipLoss"}


def arguments(kind="clip", **changes):
    """What open_clip's training script passes to its factory."""
    values = {
        "model": "coca" if kind == "coca" else "ViT",
        "distill": kind == "distill",
        "siglip": kind == "siglip",
        "local_loss": False,
        "gather_with_grad": False,
        "rank": 0,
        "world_size": 1,
        "horovod": False,
        "loss_dist_impl": None,
        "coca_caption_loss_weight": 2.0,
        "coca_contrastive_loss_weight": 1.0,
    }
    return types.SimpleNamespace(**values | changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model folder without weights, as open_clip's `local-dir:` reads it."""
    path = tmp_path_factory.mktemp("open_clip")
    (path / "open_clip_config.json").write_text(json.dumps({"model_cfg": MODEL}))
    return path


def create_model(folder, kind, seed):
    torch.manual_seed(seed)
    bias = {"init_logit_bias": -5.0} if kind == "siglip" else {}
    return open_clip.create_model(f"local-dir:{folder}", output_dict=True, **bias)


def train(folder, kind):
    """Two steps: the class of the loss, its values, and the gradients of the second step."""
    model, teacher = create_model(folder, kind, 0), create_model(folder, kind, 1).eval()
    loss_fn = open_clip.create_loss(arguments(kind))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    values = []
    for step in range(2):
        torch.manual_seed(step)
        batch = torch.randn(12, 3, 16, 16), torch.randint(64, (12, 8))
        outputs = model(*batch)
        if kind == "distill":
            with torch.no_grad():
                outputs |= {f"dist_{name}": value for name, value in teacher(*batch).items()}
        parts = loss_fn(**outputs, output_dict=True)
        optimizer.zero_grad()
        sum(parts.values()).backward()
        optimizer.step()
        values.append({name: part.item() for name, part in parts.items()})
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return type(loss_fn), values, gradients


@pytest.mark.parametrize("kind", KINDS)
def test_two_steps_of_training_agree(folder, kind):
    theirs, want, want_gradients = train(folder, kind)
    with apply():
        ours, got, got_gradients = train(folder, kind)
    assert theirs is THEIRS[KINDS[kind]] and in_place_of(ours, KINDS[kind])
    assert want[0] != want[1]  # the first step has changed the model
    for mine, reference in zip(got, want, strict=True):
        assert mine == pytest.approx(reference, rel=1e-5)
    assert got_gradients.keys() == want_gradients.keys()
    assert "logit_scale" in got_gradients
    for name, gradient in want_gradients.items():
        # Of the softmax losses the bias has no gradient; of the others each is of its own size.
        size = gradient.norm()
        assert size > 0, name
        assert (got_gradients[name] - gradient).norm() <= 2e-5 * size, name


def bindings():
    """Every class of losses that open_clip's modules hold, by module and name."""
    return {
        (module, name): value
        for module in ("open_clip", "open_clip.loss", "open_clip.factory")
        for name, value in vars(sys.modules[module]).items()
        if name.endswith("Loss")
    }


BEFORE = bindings()


def test_every_binding_is_replaced_and_restored():
    assert {name for _, name in BEFORE} >= {"ClipLoss", "SigLipLoss", "DistillClipLoss", "CoCaLoss"}
    with apply():
        for (module, name), value in bindings().items():
            if name in NAMES:
                assert in_place_of(value, name), (module, name)
            elif name == "CoCaLoss":
                assert value is not THEIRS[name] and issubclass(value, THEIRS[name])
    assert bindings() == BEFORE


def test_it_is_undone_when_the_body_raises():
    with pytest.raises(KeyError), apply():
        raise KeyError
    assert bindings() == BEFORE


def test_nested_and_entered_again():
    with apply() as patch:
        with apply():
            with patch:
                assert in_place_of(open_clip.ClipLoss, "ClipLoss")
            assert in_place_of(open_clip.ClipLoss, "ClipLoss")
        assert in_place_of(open_clip.ClipLoss, "ClipLoss")
    assert bindings() == BEFORE
    with patch:
        assert in_place_of(open_clip.factory.ClipLoss, "ClipLoss")
    assert bindings() == BEFORE


def test_a_plain_call_lasts_until_undo_in_any_order():
    first, second = apply(), apply()
    first.undo()
    first.undo()
    assert in_place_of(open_clip.loss.SigLipLoss, "SigLipLoss")
    second.undo()
    assert bindings() == BEFORE


def test_undo_within_the_block():
    with apply() as patch:
        patch.undo()
        assert bindings() == BEFORE
    assert bindings() == BEFORE


TASK = """
from open_clip.loss import SigLipLoss

class CLIPTask:
    def __init__(self, model, *, loss=None, rank=0, world_size=1):
        if loss is None:
            from open_clip.loss import ClipLoss
            loss = ClipLoss(local_loss=False, gather_with_grad=False, cache_labels=True,
                            rank=rank, world_size=world_size)
        self.loss = loss

class SigLIPTask(CLIPTask):
    def __init__(self, model):
        super().__init__(model, loss=SigLipLoss(rank=0, world_size=1, dist_impl=None))
"""


def add_tasks(monkeypatch):
    """A module that binds losses the two ways in which open_clip's development head does."""
    module = types.ModuleType("open_clip.task")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(TASK, vars(module))
    return module


def test_tasks_make_and_take_our_losses(monkeypatch):
    module = add_tasks(monkeypatch)
    with apply():
        assert in_place_of(type(module.CLIPTask(None).loss), "ClipLoss")
        assert in_place_of(type(module.SigLIPTask(None).loss), "SigLipLoss")
    assert type(module.CLIPTask(None).loss) is THEIRS["ClipLoss"]
    assert type(module.SigLIPTask(None).loss) is THEIRS["SigLipLoss"]


def test_a_module_that_is_imported_meanwhile_is_restored_too(monkeypatch):
    with apply():
        module = add_tasks(monkeypatch)
        assert in_place_of(module.SigLipLoss, "SigLipLoss")
    assert module.SigLipLoss is THEIRS["SigLipLoss"]


@pytest.mark.parametrize("output_dict", (False, True))
def test_coca_keeps_its_caption_loss(output_dict):
    torch.manual_seed(0)
    image, text = torch.nn.functional.normalize(torch.randn(2, 10, 16), dim=-1)
    logits, labels = torch.randn(10, 5, 30), torch.randint(30, (10, 5))
    results = []
    for patched in (False, True):
        patch = apply() if patched else None
        try:
            loss_fn = open_clip.create_loss(arguments("coca", gather_with_grad=True))
            assert loss_fn.gather_with_grad and loss_fn.caption_loss_weight == 2.0
            assert isinstance(loss_fn, losses.ClipLoss) == patched
            results.append(
                loss_fn(image, text, logits, labels, torch.tensor(9.0), output_dict=output_dict)
            )
        finally:
            if patch is not None:
                patch.undo()
    torch.testing.assert_close(results[1], results[0])


def test_ranks_that_are_not_there_are_refused():
    with apply():
        loss = open_clip.create_loss(arguments(world_size=2))
    with pytest.raises(ValueError, match="ClipLoss: world_size=2, but"):
        loss(torch.ones(4, 8), torch.ones(4, 8), torch.tensor(1.0))


def test_your_own_subclass_finds_what_open_clips_has():
    with apply():

        class Hard(open_clip.loss.ClipLoss):
            def forward(self, image, text, scale):
                rows, _ = self.get_logits(image, text, scale)
                labels = self.get_ground_truth(rows.device, len(rows))
                return torch.nn.functional.cross_entropy(rows, labels)

        x, y = torch.randn(5, 3), torch.randn(5, 3)
        want = torch.nn.functional.cross_entropy(2.0 * x @ y.T, torch.arange(5))
        assert Hard()(x, y, 2.0).item() == pytest.approx(want.item())
        assert isinstance(open_clip.loss.CoCaLoss(2.0, 1.0), open_clip.loss.ClipLoss)
        distill = open_clip.loss.DistillClipLoss()
        assert isinstance(distill, open_clip.loss.ClipLoss)


def test_a_subclass_that_changes_the_logits_gets_them():
    x, y, scale = torch.randn(5, 3), torch.randn(5, 3), torch.tensor(2.0)
    want = open_clip.loss.ClipLoss()(x, y, 2 * scale)
    with apply():

        class Doubled(open_clip.loss.ClipLoss):
            def get_logits(self, *args, **kwargs):
                return tuple(2 * side for side in super().get_logits(*args, **kwargs))

        torch.testing.assert_close(Doubled()(x, y, scale), want)


@pytest.mark.parametrize("name", THEIRS)
def test_pickles_under_and_outside_of_a_patch(name):
    needed = (2.0, 1.0) if name == "CoCaLoss" else ()
    theirs = pickle.dumps(THEIRS[name](*needed, rank=0, world_size=1))
    with apply():
        made = getattr(open_clip.loss, name)(*needed, rank=0, world_size=1)
        inside = pickle.dumps(made)
        read = pickle.loads(theirs)
        assert type(read) is type(pickle.loads(inside)) is type(made)
    for again in (pickle.loads(inside), pickle.loads(pickle.dumps(made)), read):
        assert type(again) is type(made) and again.world_size == 1
        if name == "ClipLoss":
            x, y = torch.randn(5, 3), torch.randn(5, 3)
            torch.testing.assert_close(again(x, y, 2.0), THEIRS[name]()(x, y, 2.0))
    assert type(pickle.loads(theirs)) is THEIRS[name]
