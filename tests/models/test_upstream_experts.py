"""Experts out of an open_clip folder and a Hugging Face CLIP folder, alone and bound together.

They differ in width (40 and 24), vocabulary (49408 byte pairs and a dozen words), preprocessing
and attention (fused and separate projections): what real experts differ in.
"""

import json
import math
import random
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from m3bind.config import (
    AlignConfig,
    DistillConfig,
    ExpertConfig,
    ImageTowerConfig,
    LoraConfig,
    TextTowerConfig,
)
from m3bind.models import Expert, build_expert, build_text_encoder
from m3bind.tasks.align import Align
from m3bind.tasks.distill import Distill

REPORTS = [
    "FINDINGS: the heart is enlarged\nIMPRESSION: heart enlarged",
    "FINDINGS: lungs are clear\nIMPRESSION: no pneumonia",
    "FINDINGS: pneumonia is seen\nIMPRESSION: pneumonia",
    "FINDINGS: the lungs are seen\nIMPRESSION: clear",
]
TEXTS = ["the heart is enlarged", "no pneumonia seen", "sinus rhythm", "lungs are clear"]


def expert_from(
    source: str, modality: str, *, lora: bool = True, width: int = 64, head_hidden: int = 0
) -> Expert:
    config = ExpertConfig(
        image=ImageTowerConfig(source=source),
        text=TextTowerConfig(source=source, max_tokens=20),
        lora=LoraConfig() if lora else None,
        head_hidden=head_hidden,
    )
    return build_expert(config, modality, width=width)


def pooled(output: object) -> Tensor:
    return output if isinstance(output, Tensor) else output.pooler_output  # type: ignore[attr-defined]


def cosines(image: Tensor, text: Tensor) -> Tensor:
    return torch.nn.functional.normalize(image) @ torch.nn.functional.normalize(text).T


def test_open_clip_pair_keeps_its_own_similarities(open_clip_folder: Path) -> None:
    import open_clip

    model = open_clip.create_model(f"local-dir:{open_clip_folder}").eval()
    tokens = open_clip.get_tokenizer(f"local-dir:{open_clip_folder}")(TEXTS)
    expert = expert_from(f"open_clip:{open_clip_folder}", "xray", head_hidden=8).eval()
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        expected = cosines(model.encode_image(images), model.encode_text(tokens))
        got = expert.encode_image(images) @ expert.encode_text(TEXTS).T
    assert torch.allclose(got, expected, atol=1e-5)
    assert float(expert.logit_scale.detach()) == pytest.approx(float(model.logit_scale.detach()))
    assert expert.preprocess.mean == (0.4, 0.5, 0.6) and expert.preprocess.fit == "pad"


def test_hf_pair_keeps_its_own_similarities(hf_clip_folder: Path) -> None:
    from transformers import AutoTokenizer, CLIPModel

    model = CLIPModel.from_pretrained(hf_clip_folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(hf_clip_folder)
    expert = expert_from(f"hf:{hf_clip_folder}", "retina").eval()
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        # One text at a time: no padding in the oracle.
        texts = [
            pooled(model.get_text_features(**tokenizer([t], return_tensors="pt"))) for t in TEXTS
        ]
        image = pooled(model.get_image_features(pixel_values=images))
        got = expert.encode_image(images) @ expert.encode_text(TEXTS).T
    assert torch.allclose(got, cosines(image, torch.cat(texts)), atol=1e-5)
    preprocess = expert.preprocess
    assert (preprocess.size, preprocess.resize, preprocess.fit) == ((32, 32), 36, "crop")
    assert preprocess.std == (0.27, 0.26, 0.28) and preprocess.interpolation == "bicubic"


def test_each_tower_tokenises_the_raw_string(open_clip_folder: Path, hf_clip_folder: Path) -> None:
    import open_clip
    from transformers import AutoTokenizer

    text = "the heart is enlarged"
    towers = {
        "open_clip": expert_from(f"open_clip:{open_clip_folder}", "xray").text.tower,
        "hf": expert_from(f"hf:{hf_clip_folder}", "retina").text.tower,
        "minilm": build_text_encoder(TextTowerConfig(), None, width=64).tower,
    }
    ids = {name: tower.tokenise([text])[0] for name, tower in towers.items()}
    assert len({tuple(row) for row in ids.values()}) == 3
    bpe = open_clip.get_tokenizer("ViT-B-32")
    assert bpe.decode(ids["open_clip"][1:-1]).strip() == text
    assert AutoTokenizer.from_pretrained(hf_clip_folder).decode(ids["hf"][1:-1]) == text


@pytest.mark.parametrize("family", ["open_clip", "hf"])
def test_only_adapters_heads_and_scale_train(
    family: str, open_clip_folder: Path, hf_clip_folder: Path
) -> None:
    folder = {"open_clip": open_clip_folder, "hf": hf_clip_folder}[family]
    expert = expert_from(f"{family}:{folder}", "xray")
    trained = {n for n, p in expert.named_parameters() if p.requires_grad}
    adapters = {n for n in trained if "lora_" in n}
    assert trained - adapters == {"image_head.weight", "text.head.weight", "logit_scale"}
    assert all(".q_proj." in n or ".v_proj." in n for n in adapters)
    # Two layers a tower, query and value, A and B.
    assert sum(n.startswith("image.") for n in adapters) == 8
    assert sum(n.startswith("text.") for n in adapters) == 8
    assert set(expert.trainable_state()) == trained
    expert.freeze_trunk()  # which stage 1 calls: adapters go on training
    (expert.encode_image(torch.randn(2, 3, 32, 32)) @ expert.encode_text(TEXTS).T).sum().backward()
    with_gradient = {n for n, p in expert.named_parameters() if p.grad is not None}
    assert with_gradient == trained - {"logit_scale"}


def test_open_clip_by_name_with_random_weights_saves_them() -> None:
    config = ExpertConfig(
        image=ImageTowerConfig(source="open_clip:RN50", size=[64, 64], freeze=True),
        text=TextTowerConfig(source="minilm"),
    )
    expert = build_expert(config, "xray", width=32)
    assert expert.preprocess.size == (64, 64)
    # No file holds these weights, so the checkpoint must.
    assert any(k.startswith("image.trunk.") for k in expert.trainable_state())


def test_what_does_not_fit_is_refused(hf_clip_folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(hf_clip_folder, broken)
    weights = load_file(broken / "model.safetensors")
    weights["text_projections.weight"] = weights.pop("text_projection.weight")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"text_projection\.weight.*text_projections\.weight"):
        expert_from(f"hf:{broken}", "xray")
    silent = tmp_path / "silent"
    shutil.copytree(hf_clip_folder, silent)
    (silent / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match="preprocessor_config"):
        expert_from(f"hf:{silent}", "xray")
    with pytest.raises(ValueError, match="give a folder on this machine"):
        expert_from("hf:openai/clip-vit-base-patch32", "xray")


def test_open_clip_weights_of_another_model_are_refused(
    open_clip_folder: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(open_clip_folder, other)
    config = json.loads((other / "open_clip_config.json").read_text())
    config["model_cfg"]["embed_dim"] = 48
    (other / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"open_clip:.*size mismatch"):
        expert_from(f"open_clip:{other}", "xray")


def batches(modalities: list[str]) -> dict[str, SimpleNamespace]:
    generator = torch.Generator().manual_seed(0)
    return {
        m: SimpleNamespace(
            images=torch.randn(4, 3, 32, 32, generator=generator),
            reports=REPORTS,
            meta=[{"id": str(row)} for row in range(4)],
        )
        for m in modalities
    }


def train(task: torch.nn.Module, steps: int) -> None:
    task.train()
    optimiser = torch.optim.AdamW(task.parameter_groups(), lr=1e-2)
    rng = random.Random(0)
    for _ in range(steps):
        losses, _ = task(batches(["xray", "retina"]), rng)
        total = sum(losses.values())
        assert torch.isfinite(total)
        optimiser.zero_grad()
        total.backward()
        optimiser.step()


def test_align_and_distil_experts_of_other_width_and_vocabulary(
    open_clip_folder: Path, hf_clip_folder: Path
) -> None:
    torch.manual_seed(0)
    experts = {
        "xray": expert_from(f"open_clip:{open_clip_folder}", "xray"),
        "retina": expert_from(f"hf:{hf_clip_folder}", "retina"),
    }

    def agreement() -> float:
        with torch.no_grad():
            a, b = (e.eval().encode_text(TEXTS) for e in experts.values())
        return float((a * b).sum(1).mean())

    before = agreement()
    assert abs(before) < 0.3  # not bound by construction
    frozen = {
        f"{m}.{n}": p.clone()
        for m, e in experts.items()
        for n, p in e.named_parameters()
        if not p.requires_grad
    }
    train(Align(experts, TEXTS, AlignConfig(centre_batch=4)), 15)
    after = agreement()
    assert after > before + 0.4
    named = {f"{m}.{n}": p for m, e in experts.items() for n, p in e.named_parameters()}
    assert all(torch.equal(named[n], p) for n, p in frozen.items())

    student = build_text_encoder(TextTowerConfig(), LoraConfig(), width=64)

    def likeness() -> float:
        with torch.no_grad():
            s = student.eval().encode_text(REPORTS)
            return float(
                torch.stack([(s * e.eval().encode_text(REPORTS)).sum(1).mean()
                             for e in experts.values()]).mean()
            )  # fmt: skip

    untaught = likeness()
    teachers = {m: {k: v.clone() for k, v in e.state_dict().items()} for m, e in experts.items()}
    train(Distill(student, experts, DistillConfig()), 15)
    assert likeness() > untaught + 0.3
    for modality, expert in experts.items():
        assert all(torch.equal(v, teachers[modality][k]) for k, v in expert.state_dict().items())
    assert math.isfinite(after)
