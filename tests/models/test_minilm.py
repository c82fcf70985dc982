"""MiniLM out of its package, against transformers' BertModel on the same files."""

import pytest
import torch

from m3bind.config import LoraConfig, TextTowerConfig
from m3bind.models import build_text_encoder
from m3bind.models.bert import Packed
from m3bind.models.hidden_cache import HiddenCache
from m3bind.models.minilm import MiniLM, minilm_folder, shared_layers

# One token, a usual report, and one that is cut at max_tokens.
TEXTS = [
    "Cardiomegaly",
    "FINDINGS: The heart is enlarged. IMPRESSION: Heart failure.",
    "Irregularly irregular rhythm without P waves. " * 12,
]
CPU = torch.device("cpu")


@pytest.mark.parametrize("train_layers", [0, 1, 6])
def test_pooled_output_is_that_of_transformers(train_layers: int) -> None:
    from transformers import AutoTokenizer, BertModel

    folder = minilm_folder()
    oracle = BertModel.from_pretrained(folder, attn_implementation="eager").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer(TEXTS, padding=True, truncation=True, max_length=64, return_tensors="pt")
    tower = MiniLM(TextTowerConfig(train_layers=train_layers), None)
    with torch.no_grad():
        hidden = oracle(**tokens).last_hidden_state
        mask = tokens["attention_mask"][:, :, None]
        expected = (hidden * mask).sum(1) / mask.sum(1)
        assert torch.allclose(tower(TEXTS, CPU), expected, atol=2e-5)
    expected_ids = [
        row[m.bool()].tolist()
        for row, m in zip(tokens["input_ids"], tokens["attention_mask"], strict=True)
    ]
    assert tower.tokenise(TEXTS) == expected_ids


def test_cached_equals_uncached() -> None:
    config = TextTowerConfig(cache=True, train_layers=2)
    cached, plain = MiniLM(config, None), MiniLM(TextTowerConfig(train_layers=2), None)
    with torch.no_grad():
        expected = plain(TEXTS, CPU)
        got = cached(TEXTS, CPU)
        # What remains is float16's rounding of the kept states.
        assert torch.allclose(got, expected, atol=3e-3)
        assert torch.equal(cached(TEXTS, CPU), got)
        cached.cache.dtype = torch.float32
        cached.cache._states.clear()
        assert torch.allclose(cached(TEXTS, CPU), expected, atol=1e-5)
    shared_layers.cache_clear()


def test_cache_keeps_each_text_once_and_survives_a_file(tmp_path) -> None:
    tower = MiniLM(TextTowerConfig(cache=True, max_tokens=48), None)
    seen = []
    tower.precompute(
        [*TEXTS, TEXTS[0]], CPU, progress=lambda batches: seen.extend(batches) or batches
    )
    assert sorted(text for batch in seen for text in batch) == sorted(TEXTS)
    tokens = sum(len(ids) for ids in tower.tokenise(TEXTS))
    assert tower.cache.nbytes == tokens * 384 * 2
    path = tmp_path / "cache.safetensors"
    tower.cache.save(path, TEXTS)
    before = tower(TEXTS, CPU)
    tower.cache._states.clear()
    assert tower.cache.load(path) and len(tower.cache) == 3
    assert torch.equal(tower(TEXTS, CPU), before)
    # Cut at another length the states differ, so such a file is not taken.
    other = MiniLM(TextTowerConfig(cache=True, max_tokens=32), None)
    assert not other.cache.load(path) and len(other.cache) == 0
    shared_layers.cache_clear()


def test_auto_is_one_of_both_and_so_is_what_it_keeps(monkeypatch) -> None:
    """Kept hidden states of bfloat16 are not taken where the processor does not multiply it."""
    kept = {}
    for has in (True, False):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda has=has: has)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        tower = MiniLM(TextTowerConfig(cache=True, frozen_bf16="auto"), None)
        want = MiniLM(TextTowerConfig(cache=True, frozen_bf16=has), None)
        with torch.no_grad():
            kept[tower.cache.fingerprint] = tower(TEXTS, CPU)
            assert torch.equal(want(TEXTS, CPU), kept[want.cache.fingerprint])
    narrow, wide = kept.values()
    assert 1e-4 < (narrow - wide).abs().max() < 0.1
    shared_layers.cache_clear()


def test_what_is_missing_is_computed_where_it_is_asked_for() -> None:
    seen = []

    def compute(texts, device):
        seen.append(device)
        return Packed(torch.ones(len(texts), 4), torch.ones(len(texts), dtype=torch.long))

    cache = HiddenCache(compute, len)
    cache.precompute(["a"], torch.device("cuda", 1))
    cache(["a", "b"], CPU)
    assert seen == [torch.device("cuda", 1), CPU]


def test_where_all_layers_are_frozen_one_vector_a_text_is_kept() -> None:
    tower = MiniLM(TextTowerConfig(cache=True, train_layers=0), None)
    plain = MiniLM(TextTowerConfig(train_layers=0), None)
    tower.precompute(TEXTS, CPU)
    assert tower.cache.nbytes == len(TEXTS) * 384 * 2
    with torch.no_grad():
        assert torch.allclose(tower(TEXTS, CPU), plain(TEXTS, CPU), atol=1e-3)
    shared_layers.cache_clear()


def test_only_the_adapters_of_the_last_layers_and_the_head_train() -> None:
    encoder = build_text_encoder(TextTowerConfig(train_layers=2), LoraConfig(), width=64)
    encoder.encode_text(TEXTS).sum().backward()
    trained = {n for n, p in encoder.named_parameters() if p.requires_grad}
    part = "tower.layers.{}.attention.self.{}.lora_{}.default.weight"
    assert trained == {"head.weight"} | {
        part.format(i, name, ab) for i in (0, 1) for name in ("query", "value") for ab in "AB"
    }
    with_gradient = {n for n, p in encoder.named_parameters() if p.grad is not None}
    assert with_gradient == trained
    assert set(encoder.trainable_state()) == trained  # 45 MB of MiniLM stay out of checkpoints


def test_the_first_tower_of_a_process_starts_as_a_later_one() -> None:
    config = TextTowerConfig(train_layers=1)
    shared_layers.cache_clear()
    first, second = (build_text_encoder(config, LoraConfig(r=4)).trainable_state() for _ in "ab")
    assert first and all(torch.equal(value, second[name]) for name, value in first.items())


def test_padding_and_neighbours_do_not_change_an_embedding() -> None:
    encoder = build_text_encoder(TextTowerConfig(), None, width=64).eval()
    with torch.no_grad():
        together = encoder.encode_text([*TEXTS, TEXTS[1]])
        for i, text in enumerate(TEXTS):
            assert torch.allclose(encoder.encode_text([text])[0], together[i], atol=1e-5)
    assert torch.equal(together[1], together[3])
    assert torch.allclose(together.norm(dim=1), torch.ones(4), atol=1e-5)


@pytest.mark.parametrize("texts", [[], [""], ["clear lungs", "  \n"]])
def test_empty_texts_are_refused(texts: list[str]) -> None:
    encoder = build_text_encoder(TextTowerConfig(), None, width=64)
    with pytest.raises(ValueError, match="empty"):
        encoder.encode_text(texts)


def test_settings_that_do_not_fit_name_the_limit(tmp_path) -> None:
    with pytest.raises(ValueError, match="has 6"):
        MiniLM(TextTowerConfig(train_layers=7), None)
    with pytest.raises(ValueError, match="at most 512"):
        MiniLM(TextTowerConfig(max_tokens=513), None)
    with pytest.raises(ValueError, match=r"config\.json"):
        MiniLM(TextTowerConfig(weights=str(tmp_path)), None)


def test_frozen_layers_in_bfloat16_stay_close_and_do_not_share_a_cache() -> None:
    exact = MiniLM(TextTowerConfig(), None)
    rounded = MiniLM(TextTowerConfig(frozen_bf16=True), None)
    with torch.no_grad():
        a, b = exact(TEXTS, CPU), rounded(TEXTS, CPU)
        cached = MiniLM(TextTowerConfig(frozen_bf16=True, cache=True), None)(TEXTS, CPU)
    assert not torch.equal(a, b)
    assert torch.cosine_similarity(a, b).min() > 0.999  # bfloat16 has eight bits
    assert torch.cosine_similarity(cached, b).min() > 0.9999
    assert exact.cache.fingerprint != rounded.cache.fingerprint
    shared_layers.cache_clear()
