"""Towers, heads and experts: shapes, seeds, what trains, what is saved."""

import copy

import pytest
import torch

from m3bind.config import ExpertConfig, ImageTowerConfig, LoraConfig, TextTowerConfig
from m3bind.models import build_expert
from m3bind.models.heads import Head, seeded
from m3bind.models.small import SmallTower

# Odd sizes: nothing in a tower may depend on the input being a multiple of its strides.
SHAPES = {
    "image2d": [(3, 96, 96), (3, 97, 65), (1, 112, 112)],
    "volume": [(3, 32, 80, 80), (1, 33, 50, 61)],
    "signal": [(12, 2500), (12, 1237)],
}
IMAGES = {"xray": (1, 48, 48), "retina": (3, 48, 48), "ct": (3, 16, 32, 32), "ecg": (12, 500)}


@pytest.mark.parametrize(("kind", "shape"), [(k, s) for k, v in SHAPES.items() for s in v])
def test_small_tower_shapes(kind: str, shape: tuple[int, ...]) -> None:
    tower = SmallTower(kind, shape[0])
    features = tower(torch.randn(2, *shape))
    assert features.shape == (2, tower.width)
    assert features.isfinite().all()


@pytest.mark.parametrize("kind", SHAPES)
def test_evaluated_a_sample_does_not_depend_on_its_batch(kind: str) -> None:
    shape = SHAPES[kind][0]
    tower, images = SmallTower(kind, shape[0]), torch.randn(3, *shape)
    tower(torch.randn(4, *shape) + 1)  # statistics that are not those of these images
    tower.eval()
    with torch.no_grad():
        assert torch.allclose(tower(images)[1], tower(images[1:2])[0], atol=1e-5)


WEIGHT_GRADIENT = {
    torch.nn.Conv1d: torch.nn.grad.conv1d_weight,
    torch.nn.Conv2d: torch.nn.grad.conv2d_weight,
    torch.nn.Conv3d: torch.nn.grad.conv3d_weight,
}


@pytest.mark.parametrize("kind", SHAPES)
def test_every_weight_gradient_under_bfloat16_is_right(kind: str) -> None:
    """Layer by layer, against float64 on what that layer saw: conv3d in bfloat16 is not right."""
    shape = SHAPES[kind][0]
    tower, images = SmallTower(kind, shape[0]), torch.randn(8, *shape)
    convolutions = [layer for layer in tower.modules() if type(layer) in WEIGHT_GRADIENT]
    seen: dict[torch.nn.Module, dict[str, torch.Tensor]] = {layer: {} for layer in convolutions}

    def note(layer: torch.nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        # Autocast rounds the input within the call: the gradient is taken by the rounded one.
        seen[layer]["input"] = inputs[0].detach().to(output.dtype)
        output.register_hook(lambda grad: seen[layer].__setitem__("upstream", grad))

    for layer in convolutions:
        layer.register_forward_hook(note)
    with torch.autocast("cpu", torch.bfloat16):
        features = tower(images)
    (features.float() * torch.randn(8, tower.width)).sum().backward()
    assert len(convolutions) >= 6
    for layer in convolutions:
        exact = WEIGHT_GRADIENT[type(layer)](
            seen[layer]["input"].double(), layer.weight.shape, seen[layer]["upstream"].double(),
            layer.stride, layer.padding,
        )  # fmt: skip
        error = (layer.weight.grad - exact).norm() / exact.norm()
        assert error < 0.01, layer  # one rounding to bfloat16 is 0.002


@pytest.mark.parametrize("modality", IMAGES)
def test_expert_embeds_images_and_texts(modality: str) -> None:
    expert = build_expert(ExpertConfig(lora=LoraConfig()), modality, width=64)
    image = expert.encode_image(torch.randn(2, *IMAGES[modality]))
    text = expert.encode_text(["clear lungs", "atrial fibrillation", "clear lungs"])
    assert image.shape == (2, 64) and text.shape == (3, 64)
    assert image.dtype == text.dtype == torch.float32
    assert torch.allclose(image.norm(dim=1), torch.ones(2), atol=1e-5)
    assert expert.logit_scale.shape == (1,)
    assert float(expert.scale().detach()) == pytest.approx(1 / 0.07, rel=1e-5)


def test_scale_is_kept_below_one_hundred() -> None:
    expert = build_expert(ExpertConfig(), "xray", width=64)
    with torch.no_grad():
        expert.logit_scale.fill_(9.0)
    scale = expert.scale()
    assert float(scale) == pytest.approx(100)
    scale.backward()
    assert float(expert.logit_scale.grad) == pytest.approx(100)  # it can come back down


def test_no_two_experts_start_alike_and_each_is_reproducible() -> None:
    config = ExpertConfig()
    a, b, again = (build_expert(config, m, width=64) for m in ("xray", "ct", "xray"))
    assert not torch.equal(a.text.head.weight, b.text.head.weight)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in a.state_dict().items())
    other = build_expert(config, "xray", width=64, seed=1)
    assert not torch.equal(a.text.head.weight, other.text.head.weight)
    assert not torch.equal(a.image_head.weight, other.image_head.weight)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (TextTowerConfig(source="zzz", cache=True), "'zzz' is not known"),
        (
            TextTowerConfig(source="hf:somewhere", cache=True),
            "text.cache works for source 'minilm'",
        ),
    ],
)
def test_what_is_wrong_with_a_text_tower(text: TextTowerConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_expert(ExpertConfig(text=text), "xray", width=64)


def test_building_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    build_expert(ExpertConfig(), "xray", width=64)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(("inner", "width"), [(24, 64), (64, 64), (96, 64)])
def test_head_is_semi_orthogonal(inner: int, width: int) -> None:
    head = Head(inner, width, seeded("test"))
    square = head.weight @ head.weight.T if inner >= width else head.weight.T @ head.weight
    assert torch.allclose(square, torch.eye(min(inner, width)), atol=1e-5)


def test_head_with_a_hidden_layer() -> None:
    head, features = Head(24, 16, seeded("test"), hidden=40), torch.randn(5, 24)
    assert torch.equal(head(features), Head(24, 16, seeded("test"))(features))  # it starts linear
    assert head.hidden is not None
    inner, _, outer = head.hidden
    torch.nn.init.normal_(outer.weight)
    hidden = features @ inner.weight.T + inner.bias
    gelu = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
    expected = features @ head.weight.T + gelu @ outer.weight.T
    expected = expected / expected.norm(dim=1, keepdim=True)
    assert torch.allclose(head(features), expected, atol=1e-6)
    again, other = Head(24, 16, seeded("test"), hidden=40), Head(24, 16, seeded("x"), hidden=40)
    assert torch.equal(inner.weight, again.hidden[0].weight)
    assert not torch.allclose(inner.weight, other.hidden[0].weight, atol=0.1)


def test_frozen_trunk_has_no_gradient_and_the_head_has() -> None:
    expert = build_expert(ExpertConfig(lora=LoraConfig()), "ecg", width=64)
    expert.freeze_trunk()
    expert.train()
    assert not expert.image.training and expert.text.training
    expert.encode_image(torch.randn(2, 12, 500)).sum().backward()
    assert all(p.grad is None for p in expert.image.parameters())
    assert expert.image_head.weight.grad is not None


def test_trainable_state_round_trip() -> None:
    config = ExpertConfig(lora=LoraConfig(dropout=0.0))
    first = build_expert(config, "xray", width=64)
    with torch.no_grad():
        for parameter in first.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    state = copy.deepcopy(first.trainable_state())
    assert not any("word_embeddings" in k or "base_layer" in k for k in state)
    second = build_expert(config, "xray", width=64, seed=3)
    second.load_trainable_state(state)
    images, texts = torch.randn(2, 1, 48, 48), ["clear lungs", "heart failure"]
    assert torch.equal(first.encode_image(images), second.encode_image(images))
    assert torch.equal(first.encode_text(texts), second.encode_text(texts))
    state.pop("image_head.weight")
    with pytest.raises(ValueError, match=r"missing \['image_head.weight'\]"):
        second.load_trainable_state(state)


def test_a_users_own_modality_needs_its_kind() -> None:
    with pytest.raises(ValueError, match="ultrasound"):
        build_expert(ExpertConfig(), "ultrasound")
    expert = build_expert(ExpertConfig(), "ultrasound", kind="image2d", width=64)
    assert expert.encode_image(torch.randn(1, 3, 48, 48)).shape == (1, 64)


@pytest.mark.parametrize("source", ["smal", "timm:", "hub:x", "open_clip:no-such-model"])
def test_unknown_image_sources_are_named(source: str) -> None:
    with pytest.raises(ValueError, match=source):
        build_expert(ExpertConfig(image=ImageTowerConfig(source=source)), "xray")


def test_a_flat_tower_on_a_volume_is_refused() -> None:
    config = ExpertConfig(image=ImageTowerConfig(source="timm:resnet18"))
    with pytest.raises(ValueError, match="ct is a volume"):
        build_expert(config, "ct")


def test_cache_is_for_minilm_only() -> None:
    config = ExpertConfig(text=TextTowerConfig(source="hf:/nowhere", cache=True))
    with pytest.raises(ValueError, match="minilm"):
        build_expert(config, "xray")


class TestTimm:
    def test_lora_on_a_vision_transformer(self) -> None:
        image = ImageTowerConfig(source="timm:test_vit")
        expert = build_expert(ExpertConfig(image=image, lora=LoraConfig()), "retina", width=32)
        size = expert.preprocess.size
        expert.encode_image(torch.randn(2, 3, *size)).sum().backward()
        trained = {n for n, p in expert.image.named_parameters() if p.grad is not None}
        assert trained and all("attn.qkv.lora_" in name for name in trained)

    def test_lora_without_attention_fails_loudly(self) -> None:
        image = ImageTowerConfig(source="timm:test_resnet")
        with pytest.raises(ValueError, match="no query and value projections"):
            build_expert(ExpertConfig(image=image, lora=LoraConfig()), "retina")

    def test_local_weights_without_the_classifier(self, tmp_path) -> None:
        import timm

        torch.manual_seed(2)
        model = timm.create_model("test_resnet", num_classes=7)
        path = tmp_path / "weights.pt"
        torch.save({"state_dict": model.state_dict()}, path)
        image = ImageTowerConfig(source="timm:test_resnet", weights=str(path), freeze=True)
        expert = build_expert(ExpertConfig(image=image), "retina", width=32).train()
        images = torch.randn(2, 3, *expert.preprocess.size)
        expected = model.eval().forward_head(model.forward_features(images), pre_logits=True)
        # In train mode too: the batch statistics of a frozen tower do not move.
        assert torch.allclose(expert.image_features(images), expected, atol=1e-5)
        assert not any(k.startswith("image.") for k in expert.trainable_state())
