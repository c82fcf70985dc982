"""Trained models as folders: what was saved comes back, and nothing else is taken for it."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from m3bind.config import ExpertConfig, ImageTowerConfig, LoraConfig, TextTowerConfig
from m3bind.errors import M3BindError
from m3bind.models import build_expert, build_text_encoder, load_expert, load_text_encoder
from m3bind.models.published import publish, restore

TEXTS = ["the heart is enlarged", "no pneumonia seen", "sinus rhythm"]


def trained(model: torch.nn.Module) -> torch.nn.Module:
    """``model`` with everything that training changes moved, as training would."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def of(source: str) -> ExpertConfig:
    return ExpertConfig(
        image=ImageTowerConfig(source=source),
        text=TextTowerConfig(source=source, max_tokens=20),
        lora=LoraConfig(r=4, alpha=4),
        head_hidden=16,
    )


CONFIGS = {
    "small and minilm": lambda folder: ExpertConfig(lora=LoraConfig(r=2), head_hidden=8),
    "open_clip": lambda folder: of(f"open_clip:{folder}"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_published_expert_loads_from_its_folder_alone(open_clip_folder, tmp_path, name) -> None:
    expert = trained(build_expert(CONFIGS[name](open_clip_folder), "xray", width=32, seed=5))
    publish(expert, tmp_path, {})
    again = load_expert(tmp_path).eval()
    images = torch.randn(2, expert.preprocess.channels, *expert.preprocess.size)
    with torch.no_grad():
        assert torch.equal(again.encode_image(images), expert.encode_image(images))
        assert torch.equal(again.encode_text(TEXTS), expert.encode_text(TEXTS))
    assert again.modality == "xray" and torch.equal(again.logit_scale, expert.logit_scale)
    with pytest.raises(M3BindError, match="does not describe a text encoder"):
        load_text_encoder(tmp_path)


@pytest.mark.parametrize("lora", [None, LoraConfig(r=2)])
def test_a_published_text_encoder_loads_from_its_folder_alone(tmp_path, lora) -> None:
    config = TextTowerConfig(max_tokens=24, train_layers=1)
    encoder = trained(build_text_encoder(config, lora, width=32, seed=5, head_hidden=8))
    publish(encoder, tmp_path, {})
    again = load_text_encoder(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again.encode_text(TEXTS), encoder.encode_text(TEXTS))
    with pytest.raises(M3BindError, match="does not describe an expert"):
        load_expert(tmp_path)


def test_upstream_weights_are_known_by_what_is_in_them(open_clip_folder, tmp_path) -> None:
    published = tmp_path / "published"
    expert = trained(build_expert(of(f"open_clip:{open_clip_folder}"), "xray", width=32))
    publish(expert, published, {})
    moved = Path(shutil.copytree(open_clip_folder, tmp_path / "moved"))
    again = load_expert(published, of(f"open_clip:{moved}"))
    with torch.no_grad():
        assert torch.equal(again.eval().encode_text(TEXTS), expert.encode_text(TEXTS))
    weights = load_file(moved / "open_clip_model.safetensors")
    weights["visual.proj"] += 0.1
    save_file(weights, moved / "open_clip_model.safetensors")
    with pytest.raises(M3BindError, match=r"image\.weights = sha256:\w+, the settings give sha256"):
        load_expert(published, of(f"open_clip:{moved}"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora": LoraConfig(r=4, alpha=64)}, r"lora\.alpha = 4(\.0)?, the settings give 64"),
        ({"lora": None}, r"lora"),
        ({"head_hidden": 0}, "head_hidden = 16, the settings give 0 now: set it back"),
        ({"text": {"max_tokens": 8}}, r"text\.max_tokens = 20, the settings give 8"),
    ],
)
def test_weights_are_not_put_on_another_model(open_clip_folder, tmp_path, change, message) -> None:
    config = of(f"open_clip:{open_clip_folder}")
    publish(build_expert(config, "xray", width=32), tmp_path, {})
    text = dataclasses.replace(config.text, **change.get("text", {}))
    other = dataclasses.replace(config, **{**change, "text": text})
    with pytest.raises(M3BindError, match=message):
        restore(build_expert(other, "xray", width=32), tmp_path)


def test_what_only_says_how_to_train_may_differ(open_clip_folder, tmp_path) -> None:
    config = of(f"open_clip:{open_clip_folder}")
    expert = trained(build_expert(config, "xray", width=32))
    publish(expert, tmp_path, {})
    other = dataclasses.replace(config, lora=LoraConfig(r=4, alpha=4, dropout=0.5))
    with torch.no_grad():
        again = load_expert(tmp_path, other).eval()
        assert torch.equal(again.encode_text(TEXTS), expert.encode_text(TEXTS))


def test_a_folder_without_its_description_is_named(tmp_path) -> None:
    publish(build_text_encoder(TextTowerConfig(), None, width=32), tmp_path, {})
    path = tmp_path / "m3bind_config.json"
    path.write_text(json.dumps({"width": 32}))
    with pytest.raises(M3BindError, match=r"m3bind_config\.json does not describe a text encoder"):
        load_text_encoder(tmp_path)
    with pytest.raises(M3BindError, match="no weights at"):
        load_expert(tmp_path / "nowhere")
