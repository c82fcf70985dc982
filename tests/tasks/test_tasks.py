"""Tasks on stub experts: the losses by hand, where gradients flow, what is saved."""

import copy
import random

import numpy as np
import pytest
import torch
from dense_oracle import dense_clip
from stub_experts import REPORTS, WIDTH, StubText, batches, stub_encoder, stub_expert

from m3bind.config import AGREEMENTS, AlignConfig, DistillConfig
from m3bind.data.reports import sections
from m3bind.models.expert import Expert
from m3bind.models.heads import Head, seeded
from m3bind.models.text import TextEncoder
from m3bind.tasks.align import RATIO_EVERY, Align
from m3bind.tasks.common import draw_key, draw_sections
from m3bind.tasks.distill import Distill
from m3bind.tasks.pretrain import Pretrain

CENTRE = ["heart failure", "normal", "tumour of the lung", "atrial fibrillation"]


@pytest.fixture
def experts() -> dict[str, Expert]:
    return {name: stub_expert(name) for name in ("xray", "ct", "ecg")}


class TestPretrain:
    def test_loss_is_that_of_the_drawn_sections(self) -> None:
        expert = stub_expert("xray")
        losses, report = Pretrain(expert)(batches("xray"), random.Random(3))
        drawn = draw_sections(REPORTS, draw_key(random.Random(3)), "xray")
        with torch.no_grad():
            image = expert.encode_image(batches("xray")["xray"].images)
            expected = dense_clip(image, expert.encode_text(drawn), 1 / 0.07)
        assert float(losses["clip"].detach()) == pytest.approx(expected, rel=1e-4)
        assert report["scale"] == pytest.approx(1 / 0.07, rel=1e-5)

    def test_a_copy_of_a_sample_is_no_negative_of_it(self) -> None:
        expert, batch = stub_expert("xray"), batches("xray")
        batch["xray"].meta[2] = {"id": "0"}
        batch["xray"].images[2] = batch["xray"].images[0]
        losses, _ = Pretrain(expert)(batch, random.Random(3))
        drawn = draw_sections(REPORTS, draw_key(random.Random(3)), "xray")
        with torch.no_grad():
            image = expert.encode_image(batch["xray"].images)
            logits = image @ expert.encode_text(drawn).T / 0.07
        logits[0, 2] = logits[2, 0] = -torch.inf
        sides = [torch.nn.functional.cross_entropy(s, torch.arange(3)) for s in (logits, logits.T)]
        assert losses["clip"].item() == pytest.approx(sum(sides).item() / 2, rel=1e-4)

    def test_everything_of_the_expert_trains(self) -> None:
        expert = stub_expert("xray")
        task = Pretrain(expert)
        losses, _ = task(batches("xray"), random.Random(0))
        losses["clip"].backward()
        assert all(p.grad is not None for p in expert.parameters())
        grouped = [p for group in task.parameter_groups() for p in group["params"]]
        assert {id(p) for p in grouped} == {id(p) for p in expert.parameters()}
        assert len(grouped) == len(set(map(id, grouped)))

    def test_a_batch_of_another_modality_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"\['ct'\] given, of \['xray'\]"):
            Pretrain(stub_expert("xray"))(batches("ct"), random.Random(0))

    def test_a_repeated_section_gives_way_to_the_whole_report(self) -> None:
        same = [f"FINDINGS: patient {i}.\nIMPRESSION: normal." for i in range(30)]
        for seed in range(5):
            drawn = draw_sections(same, seed)
            assert len(set(drawn)) == 30
            assert all(text in sections(r).whole for text, r in zip(drawn, same, strict=True))
            assert any(text != sections(r).whole for text, r in zip(drawn, same, strict=True))


class TestAlign:
    def test_losses_are_the_sum_over_all_pairs(self, experts: dict[str, Expert]) -> None:
        config = AlignConfig(agreement_weight=0.5, centre_batch=99)
        losses, report = Align(experts, CENTRE, config)(batches(*experts), random.Random(0))
        assert set(losses) == {"clip/xray", "clip/ct", "clip/ecg", "agreement"}
        with torch.no_grad():
            x, c, e = (expert.encode_text(CENTRE).double() for expert in experts.values())
        pairs = ((x, c), (x, e), (c, e))
        expected = 0.5 * sum(float(((a - b) ** 2).sum() / len(CENTRE)) for a, b in pairs)
        assert float(losses["agreement"].detach()) == pytest.approx(expected, rel=1e-4)
        cosine = sum(float((a * b).sum() / len(CENTRE)) for a, b in pairs) / 3
        assert report["centre_cosine"] == pytest.approx(cosine, abs=1e-4)

    def test_every_tower_gets_the_raw_centre_texts(self, experts: dict[str, Expert]) -> None:
        task = Align(experts, [*CENTRE, CENTRE[0], " "], AlignConfig(centre_batch=2))
        task(batches(*experts), random.Random(0))
        seen = [set(e.text.tower.seen[-1]) & set(CENTRE) for e in experts.values()]
        assert len(seen[0]) == 2 and seen[0] == seen[1] == seen[2]

    def test_trunks_stay_and_heads_move(self, experts: dict[str, Expert]) -> None:
        task = Align(experts, CENTRE, AlignConfig()).train()
        sum(task(batches(*experts), random.Random(0))[0].values()).backward()
        for expert in experts.values():
            assert all(p.grad is None for p in expert.image.parameters())
            for part in (expert.image_head, expert.text, expert.logit_scale):
                parameters = part.parameters() if isinstance(part, torch.nn.Module) else [part]
                assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in parameters)

    def test_gradient_ratio_is_measured_and_a_weak_one_warned_of(
        self, experts: dict[str, Expert], caplog: pytest.LogCaptureFixture
    ) -> None:
        def ratio(weight: float) -> float:
            task = Align(experts, CENTRE, AlignConfig(agreement_weight=weight))
            reports = [task(batches(*experts), random.Random(0))[1] for _ in range(RATIO_EVERY + 1)]
            measured = [i for i, r in enumerate(reports) if "gradient_ratio" in r]
            assert measured == [0, RATIO_EVERY]
            return reports[0]["gradient_ratio"]

        one = ratio(1.0)
        assert not caplog.records
        assert ratio(1e-4) == pytest.approx(one * 1e-4, rel=1e-3)
        assert "raise align.agreement_weight" in caplog.text

    def test_gradient_ratio_by_full_backward(self, experts: dict[str, Expert]) -> None:
        task = Align(experts, CENTRE, AlignConfig(centre_batch=4))
        norms = []
        for agreement in (True, False):
            losses, report = task(batches(*experts), random.Random(0))
            if agreement:
                expected = report["gradient_ratio"]
            task.zero_grad()
            sum(v for k, v in losses.items() if (k == "agreement") == agreement).backward()
            heads = [e.text.head.weight.grad for e in experts.values()]
            norms.append(float(torch.cat([h.flatten() for h in heads]).norm()))
        assert expected == pytest.approx(norms[0] / norms[1], rel=1e-4)

    def test_preservation_starts_at_zero_and_holds_the_original(
        self, experts: dict[str, Expert]
    ) -> None:
        task = Align(experts, CENTRE, AlignConfig(preserve_weight=1.0)).train()
        losses, _ = task(batches(*experts), random.Random(0))
        for name in experts:
            assert float(losses[f"preserve/{name}"].detach()) == pytest.approx(0, abs=1e-5)
        with torch.no_grad():
            experts["ct"].text.head.weight.add_(1.0)
        losses, _ = task(batches(*experts), random.Random(0))
        assert float(losses["preserve/ct"].detach()) > 1e-3
        assert float(losses["preserve/ecg"].detach()) == pytest.approx(0, abs=1e-5)
        assert len(list(task.parameters())) == sum(
            len(list(e.parameters())) for e in experts.values()
        )

    @pytest.mark.parametrize("agreement", AGREEMENTS)
    def test_every_agreement_trains(self, experts: dict[str, Expert], agreement: str) -> None:
        task = Align(experts, CENTRE, AlignConfig(agreement=agreement))
        optimiser = torch.optim.AdamW(task.parameter_groups(), lr=1e-2)
        rng, values = random.Random(0), []
        for _ in range(15):
            losses, report = task(batches(*experts), rng)
            values.append(float(losses["agreement"].detach()))
            assert report["centre_cosine"] <= 1 + 1e-6
            optimiser.zero_grad()
            losses["agreement"].backward()
            optimiser.step()
        assert 0 <= values[-1] < 0.7 * values[0]

    def test_training_makes_the_experts_agree(self, experts: dict[str, Expert]) -> None:
        task = Align(experts, CENTRE, AlignConfig())
        optimiser = torch.optim.AdamW(task.parameter_groups(), lr=1e-2)
        rng, cosines = random.Random(0), []
        for _ in range(30):
            losses, report = task(batches(*experts), rng)
            cosines.append(report["centre_cosine"])
            optimiser.zero_grad()
            sum(losses.values()).backward()
            optimiser.step()
        assert cosines[-1] > cosines[0] + 0.5

    def test_state_round_trip(self, experts: dict[str, Expert]) -> None:
        task = Align(experts, CENTRE, AlignConfig())
        task(batches(*experts), random.Random(0))
        state = copy.deepcopy(task.trainable_state())
        fresh = {name: stub_expert(name + " again") for name in experts}
        other = Align(fresh, CENTRE, AlignConfig())
        other.load_trainable_state(state)
        want, _ = task(batches(*experts), random.Random(1))
        got, report = other(batches(*experts), random.Random(1))
        assert all(torch.equal(want[k], got[k]) for k in want)
        assert "gradient_ratio" not in report  # the counter goes on
        del state["ct.logit_scale"]
        with pytest.raises(ValueError, match="logit_scale"):
            other.load_trainable_state(state)

    def test_what_cannot_be_aligned_is_refused(self, experts: dict[str, Expert]) -> None:
        with pytest.raises(ValueError, match="two experts"):
            Align({"xray": experts["xray"]}, CENTRE, AlignConfig())
        with pytest.raises(ValueError, match="centre texts"):
            Align(experts, ["", "  "], AlignConfig())
        twins = {"xray": stub_expert("xray"), "ct": stub_expert("xray")}
        with pytest.raises(ValueError, match="bound by construction"):
            Align(twins, CENTRE, AlignConfig())


class TestDistill:
    def test_losses_by_hand(self, experts: dict[str, Expert]) -> None:
        student = stub_encoder("student")
        config = DistillConfig(cosine_weight=2.0, contrast_weight=3.0, similarity_weight=5.0)
        data = batches(*experts)
        losses, report = Distill(student, experts, config)(data, random.Random(7))
        key, cosines, contrasts, kls = draw_key(random.Random(7)), [], [], []
        with torch.no_grad():
            for name, expert in experts.items():
                texts = draw_sections(REPORTS, key, name)
                s, t = student.encode_text(texts), expert.encode_text(texts)
                v = expert.encode_image(data[name].images)
                cosines.append(float((s * t).sum(1).mean()))
                assert report[f"cosine/{name}"] == pytest.approx(cosines[-1], abs=1e-5)
                contrasts.append(dense_clip(v, s, 1 / 0.07))
                p = torch.softmax((t @ v.T).double() / 0.07, 1)
                q = torch.softmax((s @ v.T).double() / 0.07, 1)
                kls.append(float((p * (p / q).log()).sum(1).mean()))
        expected = {
            "cosine": 2 * (1 - np.mean(cosines)),
            "contrast": 3 * np.mean(contrasts),
            "similarity": 5 * np.mean(kls),
        }
        assert {k: float(v.detach()) for k, v in losses.items()} == pytest.approx(
            expected, rel=1e-3
        )

    def test_similarities_move_the_student_as_by_hand(self, experts: dict[str, Expert]) -> None:
        config = DistillConfig(cosine_weight=0, contrast_weight=0)
        student = stub_encoder("student")
        task, data = Distill(student, experts, config), batches(*experts)
        sum(task(data, random.Random(7))[0].values()).backward()
        got = student.head.weight.grad.clone()
        student.zero_grad()
        key, loss = draw_key(random.Random(7)), torch.zeros(())
        for name, expert in experts.items():
            texts = draw_sections(REPORTS, key, name)
            with torch.no_grad():
                v = expert.encode_image(data[name].images)
                p = (expert.encode_text(texts) @ v.T / 0.07).softmax(1)
            q = (student.encode_text(texts) @ v.T / 0.07).log_softmax(1)
            loss = loss + (p * (p.log() - q)).sum(1).mean() / 3
        loss.backward()
        torch.testing.assert_close(got, student.head.weight.grad, rtol=1e-3, atol=1e-6)

    def test_only_the_student_trains(self, experts: dict[str, Expert]) -> None:
        student = stub_encoder("student")
        task = Distill(student, experts, DistillConfig()).train()
        assert student.training and not any(e.training for e in experts.values())
        sum(task(batches(*experts), random.Random(0))[0].values()).backward()
        assert all(p.grad is not None for p in student.parameters())
        assert all(p.grad is None for e in experts.values() for p in e.parameters())
        grouped = {id(p) for group in task.parameter_groups() for p in group["params"]}
        assert grouped == {id(p) for p in student.parameters()}
        assert set(task.trainable_state()) == set(student.state_dict())

    def test_a_weight_of_zero_leaves_its_term_out(self, experts: dict[str, Expert]) -> None:
        config = DistillConfig(contrast_weight=0, similarity_weight=0)
        losses, _ = Distill(stub_encoder("s"), experts, config)(batches(*experts), random.Random(0))
        assert set(losses) == {"cosine"}

    def test_widths_must_agree(self, experts: dict[str, Expert]) -> None:
        student = TextEncoder(StubText(), Head(26, WIDTH + 1, seeded("s")))
        with pytest.raises(ValueError, match="7 wide"):
            Distill(student, experts, DistillConfig())


class TestOperatorsInTraining:
    """The fused operators are what runs, and nothing materialises similarities beside them."""

    def step(self, task: Align | Distill, experts: dict[str, Expert]) -> set[str]:
        activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities) as profile:
            sum(task(batches(*experts), random.Random(0))[0].values()).backward()
        return {event.key for event in profile.key_averages()}

    def test_align(self, experts: dict[str, Expert]) -> None:
        config = AlignConfig(agreement="relational", preserve_weight=1.0)
        names = self.step(Align(experts, CENTRE, config).train(), experts)
        for op in ("info_nce", "similarity_distill"):
            assert {f"m3bind::{op}_fwd", f"m3bind::{op}_bwd"} <= names
        assert not {"aten::_log_softmax", "aten::_softmax", "aten::logsumexp"} & names

    def test_distill(self, experts: dict[str, Expert]) -> None:
        names = self.step(Distill(stub_encoder("s"), experts, DistillConfig()).train(), experts)
        for op in ("info_nce", "similarity_distill"):
            assert {f"m3bind::{op}_fwd", f"m3bind::{op}_bwd"} <= names
        assert not {"aten::_log_softmax", "aten::_softmax", "aten::logsumexp"} & names
