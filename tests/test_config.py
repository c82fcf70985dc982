"""Settings: merging, and one clear line for each mistake."""

from pathlib import Path

import pytest

from m3bind.config import AlignConfig, Config, ExpertConfig, LoraConfig, find_problems, load_config
from m3bind.errors import M3BindError

GOOD = """
seed: 7
experts:
  xray: {}
  ultrasound:
    image: {source: "timm:resnet18", size: [64, 64], options: {drop_rate: 0.1}}
    lora: {r: 4}
align: {lr: 2e-5, agreement: infonce}
"""


def file(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text)
    return path


def test_file_and_overrides_become_dataclasses(tmp_path) -> None:
    overrides = ["align.steps=5", "experts.xray.image.size=[48,48]", "experts.xray.lora={r: 2}"]
    config = load_config(file(tmp_path, GOOD), overrides)
    assert isinstance(config, Config) and isinstance(config.align, AlignConfig)
    assert (config.seed, config.align.lr, config.align.steps) == (7, 2e-5, 5)
    assert config.align.agreement == "infonce" and config.pretrain.lr == Config().pretrain.lr
    assert list(config.experts) == ["xray", "ultrasound"]
    assert isinstance(config.experts["xray"], ExpertConfig)
    assert config.experts["xray"].image.size == [48, 48]
    assert config.experts["xray"].lora == LoraConfig(r=2)
    assert config.experts["ultrasound"].lora == LoraConfig(r=4)
    assert config.experts["ultrasound"].image.options == {"drop_rate": 0.1}


def test_the_defaults_are_valid_and_an_empty_file_gives_them(tmp_path) -> None:
    assert load_config(file(tmp_path, "")) == Config()
    assert list(find_problems(Config())) == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("sed: 1", ["unknown key 'sed'", "did you mean 'seed'?"]),
        ("align: {agrement: mse}", ["'align.agrement'", "'agreement'"]),
        ("experts: {xray: {image: {sorce: a}}}", ["'experts.xray.image.sorce'", "'source'"]),
        ("experts: {xray: {lora: {zzz: 1}}}", ["'experts.xray.lora.zzz'", "known keys: alpha"]),
        ("align: {steps: many}", ["align.steps", "'many'"]),
        ("align: {steps: 1.5}", ["align.steps", "1.5"]),
        ("align: {bf16: half}", ["align.bf16 = 'half'", "must be one of true, false, auto"]),
        ("align: {bf16: null}", ["align.bf16", "None"]),
        ("experts: {xray: {text: {frozen_bf16: 'true'}}}", ["frozen_bf16 = 'true'", "true, false"]),
        ("experts: {xray: {image: {size: 48}}}", ["experts.xray.image.size: expected a list"]),
        ("align: {lr: -1}", ["align.lr = -1.0", "above 0"]),
        ("align: {lr: .nan}", ["align.lr = nan", "above 0"]),
        ("align: {lr: .inf}", ["align.lr = inf", "above 0"]),
        ("align: {weight_decay: .inf}", ["align.weight_decay = inf", "finite"]),
        ("distill: {cosine_weight: .nan}", ["distill.cosine_weight = nan", "at least 0"]),
        (
            "distill: {cosine_weight: 0, contrast_weight: 0, similarity_weight: 0}",
            ["distill.cosine_weight = 0", "at least one must be above 0"],
        ),
        ("experts: {ct: {lora: {alpha: .nan}}}", ["experts.ct.lora.alpha = nan", "at least 0"]),
        ("pretrain: {batch_size: 1}", ["pretrain.batch_size = 1", "at least 2"]),
        ("pretrain: {num_threads: 100000}", ["pretrain.num_threads = 100000", "at most 1024"]),
        ("threads: 100000", ["threads = 100000", "at most 1024"]),
        ("seed: 4294967296", ["seed = 4294967296", "at most 4294967295"]),
        ("data: ${nope}", ["data: ", "'nope' not found"]),
        ("align: {agreement: l2}", ["align.agreement = 'l2'", "mse, cosine, infonce, relational"]),
        (
            "align: {agreement: relational, centre_batch: 2}",
            ["align.centre_batch = 2", "at least 3 with agreement=relational"],
        ),
        ("align: {agreement: infonce, centre_batch: 1}", ["align.centre_batch = 1", "at least 2"]),
        ("experts: {ct: {image: {size: [0]}}}", ["experts.ct.image.size = [0]", "positive"]),
        ("evaluation: {shots: []}", ["evaluation.shots"]),
        ("phantom: {train: 0}", ["phantom.train = 0", "at least 1"]),
        ("align: 5", ["align", "found 5"]),
        ("experts: {xray: }", ["experts.xray", "found None"]),
        ("seed: 1\nseed: 2", ["line 2", "duplicate key"]),
        ("seed: [1", ["not valid YAML"]),
        ("- 1", ["expected keys and values"]),
        ("width: ${nope}", ["nope"]),
    ],
)
def test_each_mistake_is_one_line_with_file_key_and_value(tmp_path, text, expected) -> None:
    path = file(tmp_path, text)
    with pytest.raises(M3BindError) as error:
        load_config(path)
    message = str(error.value)
    assert "\n" not in message and str(path) in message
    for part in expected:
        assert part in message


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("align.stps=1", ["'align.stps'", "'steps'"]),
        ("experts.xrya.seed=1", ["'experts.xrya'", "'xray'"]),
        ("align.steps", ["key=value"]),
        ("align.steps=x", ["align.steps", "'x'"]),
        ("align.steps=0", ["align.steps = 0", "at least 1"]),
        (f"align.lr=1{400 * '0'}", ["align.lr", "int too large"]),
        (f"align.steps=1{5000 * '0'}", ["align.steps", "4300 digits"]),
    ],
)
def test_a_wrong_override_is_named(tmp_path, override, expected) -> None:
    with pytest.raises(M3BindError) as error:
        load_config(file(tmp_path, "experts: {xray: {}}"), [override])
    assert "\n" not in str(error.value)
    for part in ["override", *expected]:
        assert part in str(error.value)


def test_a_missing_file(tmp_path) -> None:
    with pytest.raises(M3BindError, match=r"no configuration file at .*nowhere\.yaml"):
        load_config(tmp_path / "nowhere.yaml")


def test_every_committed_config_is_valid() -> None:
    paths = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
    for path in paths:
        assert load_config(path).experts, path
