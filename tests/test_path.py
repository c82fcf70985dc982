"""The whole path on a small cohort: what each stage writes, and what the next takes of it."""

import copy
import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from m3bind.config import load_config
from m3bind.data.dataset import Dataset
from m3bind.data.shard_writer import ShardWriter
from m3bind.data.shards import iter_records
from m3bind.errors import M3BindError
from m3bind.eval.store import load_stage
from m3bind.models import load_expert, load_text_encoder
from m3bind.parallel import Placement
from m3bind.stages import Run


@pytest.fixture(scope="module")
def finished(write_settings, tmp_path_factory) -> Run:
    """A run that went through every stage once."""
    run = Run(load_config(write_settings(tmp_path_factory.mktemp("finished"))))
    for modality in run.modalities:
        run.pretrain(modality)
    run.align()
    run.distill()
    run.distill(control=True)
    for stage in run.trained_stages():
        run.embed(stage)
    run.evaluate()
    run.report()
    return run


def test_every_stage_is_embedded_and_judged(finished):
    assert finished.trained_stages() == ["before", "aligned", "distilled", "control"]
    metrics = json.loads((finished.folder / "metrics.json").read_text())
    assert metrics["simulated"] is True and metrics["seed"] == 3
    for stage in ("before", "aligned", "distilled"):
        for kind in ("name", "findings"):
            assert set(metrics["zero_shot"][stage][kind]) == {"mean", "xray", "retina", "ecg"}
    pairs = {f"{a}->{b}" for a in finished.modalities for b in finished.modalities if a != b}
    for stage in ("before", "aligned"):
        assert set(metrics["retrieval"][stage]["map"]) == {"mean", *pairs}
    assert set(metrics["text_retrieval"]) >= {"aligned", "distilled", "control"}
    measured = {"align", "distill", "control", "eval", "embed/before", "pretrain/xray"}
    assert measured <= set(metrics["seconds"]) and measured <= set(metrics["peak_rss_mib"])


def test_report_is_written_and_says_that_it_is_simulated(finished):
    page = (finished.folder / "report.html").read_text()
    assert "simulated" in page.lower() and page.count("<img") + page.count("<svg") > 10


def test_saved_experts_embed_as_those_in_memory(finished):
    """A second process that only reads the files must see the same embeddings."""
    stored = load_stage(finished.folder / "embeddings", "aligned", "test")
    experts = Run(finished.config).experts("aligned")
    for embedder in finished._embedders(experts, "test"):
        again = embedder()
        assert np.array_equal(again.image, stored[again.modality].image)
        assert np.array_equal(again.text, stored[again.modality].text)


def test_kept_features_embed_as_the_images_themselves(finished, tmp_path):
    config = copy.deepcopy(finished.config)
    config.output = str(tmp_path)
    for name in ("pretrain", "align"):
        (tmp_path / name).symlink_to(finished.folder.resolve() / name)
    for expert in config.experts.values():
        expert.image.cache = True
    for _ in ("computed", "read"):
        Run(config).embed("aligned")
        found = load_stage(tmp_path / "embeddings", "aligned")
        for modality, stored in load_stage(finished.folder / "embeddings", "aligned").items():
            np.testing.assert_allclose(found[modality].image, stored.image, atol=1e-6)
            assert (found[modality].ids, found[modality].labels) == (stored.ids, stored.labels)
    assert len(list((tmp_path / "features").glob("*-test.safetensors"))) == 3


def test_stage_2_leaves_the_images_as_they_are(finished):
    root = finished.folder / "embeddings"
    aligned, distilled = load_stage(root, "aligned"), load_stage(root, "distilled")
    for modality in finished.modalities:
        assert np.array_equal(aligned[modality].image, distilled[modality].image)
        assert not np.array_equal(aligned[modality].text, distilled[modality].text)


def test_stage_1_moves_heads_but_not_image_trunks(finished):
    before, after = finished.experts("before"), finished.experts("aligned")
    for modality in finished.modalities:
        old, new = before[modality].image.state_dict(), after[modality].image.state_dict()
        assert all(torch.equal(old[name], new[name]) for name in old)
        assert not torch.equal(
            before[modality].image_head.weight, after[modality].image_head.weight
        )


def test_a_tower_that_cannot_be_built_is_named_by_its_expert(settings):
    config = load_config(settings, ["experts.ecg.image.size=[48, 48]"])
    with pytest.raises(M3BindError, match=r"experts\.ecg: size .* needs 1 axes"):
        Run(config).experts("before")


def test_experts_do_not_start_bound(settings):
    experts = Run(load_config(settings)).experts("before")
    heads = [expert.text.head.weight for expert in experts.values()]
    for i, a in enumerate(heads):
        for b in heads[:i]:
            assert abs(torch.cosine_similarity(a.flatten(), b.flatten(), dim=0)) < 0.05


@pytest.fixture
def copied(finished, tmp_path) -> Run:
    """The finished run, to be spoilt."""
    config = copy.deepcopy(finished.config)
    config.output = str(shutil.copytree(finished.folder, tmp_path / "copied"))
    return Run(config)


def other_weights(run: Run, name: str) -> None:
    """As if the expert had been trained again, to something else."""
    path = run.folder / name / "model.safetensors"
    weights = load_file(path)
    weights["image_head.weight"] *= -1
    save_file(weights, path, metadata={"format": "pt"})


def test_an_interrupted_training_goes_on_only_with_the_same_experts(copied):
    expert = copied.config.experts["xray"]
    expert.lora.dropout = 0.9
    with pytest.raises(M3BindError, match=r"experts\.xray\.lora\.dropout = 0.1, now it is 0.9"):
        copied.align(resume=True)
    expert.lora.dropout = 0.1
    other_weights(copied, "pretrain/ecg")
    with pytest.raises(M3BindError, match=r"pretrain/ecg/model\.safetensors = sha256"):
        copied.align(resume=True)


def test_a_stage_does_not_take_weights_of_other_experts(copied):
    copied.config.experts["retina"].lora.alpha = 64
    for stage in (copied.align, copied.distill):
        with pytest.raises(M3BindError, match=r"experts\.retina\.lora\.alpha = 4.*give 64"):
            stage()
    copied.config.experts["retina"].lora.alpha = 4
    copied.config.seed = 4
    with pytest.raises(M3BindError, match="trained with seed = 3, the settings give 4 now"):
        copied.embed("before")


def test_embeddings_of_other_weights_seeds_and_data_are_not_judged(copied):
    copied.config.seed = 4
    for judge in (copied.evaluate, copied.report):
        with pytest.raises(M3BindError, match=r"before/xray-test\.\w+ was made with seed = 3, now"):
            judge()
    copied.config.seed = 3
    prompts = copied.dataset.modalities["ecg"].prompts["name"]
    prompts["none"] = [*prompts["none"], "a healthy heart"]
    with pytest.raises(M3BindError, match=r"ecg-test\.\w+ was made with prompts"):
        copied.evaluate()
    prompts["none"].pop()
    # Trained again: what was embedded of it is old, and what was trained from it is, too.
    other_weights(copied, "pretrain/ecg")
    with pytest.raises(M3BindError, match=r"image weights = .*run m3bind embed --stage before"):
        copied.evaluate()
    copied.embed("before")
    for judge in (copied.evaluate, copied.distill, lambda: copied.embed("aligned")):
        with pytest.raises(M3BindError, match=r"align/ecg was trained from .*run m3bind align"):
            judge()


def test_a_modality_that_was_taken_out_is_not_judged(copied):
    del copied.config.experts["ecg"]
    run = Run(copied.config)
    shown = run.evaluate()["zero_shot"]["aligned"]["name"]
    assert set(shown) == {"mean", "xray", "retina"}
    with pytest.raises(M3BindError, match=r"metrics\.json is of other embeddings .*m3bind eval"):
        copied.report()
    (run.folder / "embeddings" / "aligned" / "retina-test.safetensors").unlink()
    with pytest.raises(M3BindError, match=r"no .*retina-test.* run m3bind embed --stage aligned"):
        run.evaluate()


def test_published_models_embed_as_the_run_did(finished):
    expert = load_expert(finished.folder / "align" / "retina").eval()
    encoder = load_text_encoder(finished.folder / "distill").eval()
    with torch.no_grad():
        for stage, one in (("aligned", expert), ("distilled", encoder)):
            stored = load_stage(finished.folder / "embeddings", stage)["retina"]
            for label, texts in finished.dataset.modalities["retina"].prompts["name"].items():
                again = one.encode_text(texts).numpy()
                np.testing.assert_allclose(again, stored.prompts["name"][label], atol=1e-5)


def test_without_labels_the_last_weights_are_kept(small_cohort, settings, tmp_path):
    def unlabelled(record):
        return dataclasses.replace(record, labels=())

    for split in ("train", "val"):
        with ShardWriter(tmp_path / "data", "t", "ecg", split) as writer:
            for record in map(unlabelled, iter_records(small_cohort, "ecg", split)):
                writer.write(record)
    dataset = Dataset.load(small_cohort)
    dataset.root, dataset.modalities = tmp_path / "data", {"ecg": dataset.modalities["ecg"]}
    dataset.write()
    config = load_config(settings, [f"data={tmp_path / 'data'}", "pretrain.validate_every=1"])
    config.experts = {"ecg": config.experts["ecg"]}
    assert Run(config).pretrain("ecg").best_step == 4


def test_unknown_modality_and_stage_are_one_line(settings):
    config = load_config(settings)
    with pytest.raises(M3BindError, match=r"no aligned expert at .*run m3bind align first"):
        Run(config).embed("aligned")
    with pytest.raises(M3BindError, match="--stage finished: the stages are before"):
        Run(config).embed("finished")
    with pytest.raises(M3BindError, match="run m3bind distill --control first"):
        Run(config).text_encoder("control")
    config.experts["ultrasound"] = config.experts["xray"]
    with pytest.raises(M3BindError, match=r"experts.ultrasound: .* has no such modality"):
        Run(config)


def test_each_stage_has_its_own_loaders(settings):
    given = ["align.num_threads=3", "align.prefetch=1", "pretrain.num_threads=2"]
    run = Run(load_config(settings, given))
    placement = Placement.of(["ecg"], "replicated")
    for stage, numbers in ((run.config.align, (3, 1)), (run.config.pretrain, (2, 2))):
        loader = run._training(run._build("ecg"), stage, placement)
        assert (loader.num_threads, loader.prefetch) == numbers
