"""Two tiny upstream models with random weights, as folders on disk."""

import json
from pathlib import Path

import pytest
import torch

WORDS = "the heart is enlarged lungs are clear no pneumonia sinus rhythm atrial fibrillation seen"


@pytest.fixture(scope="session")
def open_clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 wide, byte-pair vocabulary of 49408."""
    import open_clip
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("open_clip")
    model_cfg = {
        "embed_dim": 40,
        "vision_cfg": {
            "image_size": 32, "layers": 2, "width": 64, "patch_size": 8, "head_width": 32,
        },
        "text_cfg": {
            "context_length": 24, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2,
        },
    }  # fmt: skip
    preprocess_cfg = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4], "resize_mode": "longest"}
    torch.manual_seed(0)
    model = open_clip.model.CLIP(**json.loads(json.dumps(model_cfg)))
    save_file(
        {k: v.contiguous() for k, v in model.state_dict().items()},
        folder / "open_clip_model.safetensors",
    )
    config = {"model_cfg": model_cfg, "preprocess_cfg": preprocess_cfg}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def hf_clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 wide, a vocabulary of a dozen words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("hf_clip")
    specials = ["<pad>", "<start>", "<end>", "<unk>"]
    vocabulary = {word: i for i, word in enumerate(specials + sorted(set(WORDS.split())))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 1), ("<end>", 2)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<start>", eos_token="<end>",
        unk_token="<unk>",
    ).save_pretrained(folder)  # fmt: skip
    layer = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    text = {
        "hidden_size": 32, "vocab_size": len(vocabulary), "max_position_embeddings": 20,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    vision = {"hidden_size": 48, "image_size": 32, "patch_size": 8}
    torch.manual_seed(1)
    config = CLIPConfig(text_config=text | layer, vision_config=vision | layer, projection_dim=24)
    CLIPModel(config).save_pretrained(folder)
    preprocessor = {
        "size": {"shortest_edge": 36}, "crop_size": {"height": 32, "width": 32},
        "do_center_crop": True, "resample": 3,
        "image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28],
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return folder
