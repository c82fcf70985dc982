"""transformers' image-text models: the fused loss and its gradients are the model's own."""

import functools
import inspect

import pytest
import torch
import transformers

from m3bind.integrations import transformers as integration

TEXT = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
    "num_attention_heads": 2, "max_position_embeddings": 8,
}  # fmt: skip
VISION = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
    "image_size": 8, "patch_size": 4, "num_channels": 3, "num_patches": 4,
}  # fmt: skip
# The end-of-text token of CLIP's text tower has to be one of the vocabulary.
CLIP_TEXT = TEXT | {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
BERT_TEXT = TEXT | {"max_position_embeddings": 16, "pad_token_id": 0}
MODELS = {
    "CLIPModel": (transformers.CLIPConfig, CLIP_TEXT),
    "MetaClip2Model": (transformers.MetaClip2Config, CLIP_TEXT),
    "ChineseCLIPModel": (transformers.ChineseCLIPConfig, BERT_TEXT),
    "AltCLIPModel": (transformers.AltCLIPConfig, BERT_TEXT | {"project_dim": 16}),
    "SiglipModel": (transformers.SiglipConfig, CLIP_TEXT | {"projection_size": 16}),
    "Siglip2Model": (transformers.Siglip2Config, CLIP_TEXT | {"projection_size": 16}),
}


def make_model(name, dtype=torch.float32):
    torch.manual_seed(0)
    config_class, text = MODELS[name]
    config = config_class(text_config=text, vision_config=VISION, projection_dim=16)
    model = getattr(transformers, name)(config)
    with torch.no_grad():  # random values would leave both sides near log(N), whatever they do
        model.logit_scale.fill_(2.5)
    return model.to(dtype).eval()


def make_batch(name, num=9):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 40, (num, 8), generator=generator)
    ids[:, -1] = 2
    mask = torch.ones_like(ids)
    mask[: num // 2, 0] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    if name == "Siglip2Model":
        return batch | {
            "pixel_values": torch.randn(num, 4, 48, generator=generator),
            "pixel_attention_mask": torch.ones(num, 4, dtype=torch.long),
            "spatial_shapes": torch.tensor([[2, 2]] * num),
        }
    return batch | {"pixel_values": torch.randn(num, 3, 8, 8, generator=generator)}


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_equal_gradients(got, want):
    assert got.keys() == want.keys()
    assert "logit_scale" in got
    for name, gradient in want.items():
        # Relative to the norm; what is rounding in theirs (a key's bias has no gradient) is small.
        assert (got[name] - gradient).norm() <= 2e-5 * gradient.norm() + 1e-6, name


def test_the_table_of_models_is_tested():
    assert set(MODELS) == {*integration.SOFTMAX, *integration.SIGMOID}


@pytest.mark.parametrize("name", MODELS)
def test_contrastive_loss_is_the_models_own(name):
    model, batch = make_model(name), make_batch(name)
    own = model(**batch, return_loss=True).loss
    want = gradients(model, own)
    loss = integration.contrastive_loss(model, **batch)
    torch.testing.assert_close(loss, own, rtol=1e-5, atol=1e-6)
    assert_equal_gradients(gradients(model, loss), want)


@pytest.mark.parametrize("name", MODELS)
def test_patched_forward(name):
    model, batch = make_model(name), make_batch(name)
    own = model(**batch, return_loss=True)
    want = gradients(model, own.loss)
    with integration.apply():
        output = model(**batch, return_loss=True)
        assert_equal_gradients(gradients(model, output.loss), want)
        # Without the loss the forward is the model's own.
        torch.testing.assert_close(model(**batch).logits_per_image, own.logits_per_image)
    torch.testing.assert_close(output.loss, own.loss, rtol=1e-5, atol=1e-6)
    assert type(output) is type(own)
    assert output.logits_per_image is None and output.logits_per_text is None
    for field in ("image_embeds", "text_embeds"):
        torch.testing.assert_close(output[field], own[field])
    for tower in ("text_model_output", "vision_model_output"):
        assert type(output[tower]) is type(own[tower])
        torch.testing.assert_close(output[tower][0], own[tower][0])
    assert model(**batch, return_loss=True).logits_per_image is not None


def test_no_matrix_is_made():
    """With many rows of few features, every tensor of N x N stands out."""
    num = 300
    model, batch = make_model("CLIPModel"), make_batch("CLIPModel", num)

    class Largest(torch.overrides.TorchFunctionMode):
        square = 0

        def __torch_function__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.shape == (num, num):
                self.square += 1
            return out

    with Largest() as own:
        model(**batch, return_loss=True)
    with integration.apply(), Largest() as patched:
        model(**batch, return_loss=True)
    assert own.square > 0
    assert patched.square == 0


def test_positional_arguments_tuples_and_options():
    model, batch = make_model("CLIPModel"), make_batch("CLIPModel")
    positional = (batch["input_ids"], batch["pixel_values"], batch["attention_mask"], None, True)
    with integration.apply():
        want = model(**batch, return_loss=True, output_hidden_states=True)
        loss, text_embeds, *_ = model(*positional, return_dict=False)
        model.config.return_dict = False
        assert isinstance(model(*positional), tuple)
    torch.testing.assert_close(loss, want.loss)
    torch.testing.assert_close(text_embeds, want.text_embeds)
    assert len(want.vision_model_output.hidden_states) == 2


def test_trainer(tmp_path):
    """Three steps and an evaluation of transformers' own loop."""
    columns = make_batch("CLIPModel", 8)
    rows = [{name: column[i] for name, column in columns.items()} for i in range(8)]

    def collate(rows):
        batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        return batch | {"return_loss": True}

    def train():
        settings = transformers.TrainingArguments(
            output_dir=tmp_path, max_steps=3, per_device_train_batch_size=8, learning_rate=1e-3,
            eval_strategy="steps", eval_steps=3, logging_steps=1, save_strategy="no",
            report_to=[], use_cpu=True, disable_tqdm=True, remove_unused_columns=False,
        )  # fmt: skip
        trainer = transformers.Trainer(
            make_model("CLIPModel"), settings, collate, train_dataset=rows, eval_dataset=rows
        )
        trainer.train()
        logs = trainer.state.log_history
        return [log[name] for log in logs for name in ("loss", "eval_loss") if name in log]

    want = train()
    with integration.apply():
        got = train()
    assert len(want) == 4
    assert got == pytest.approx(want, rel=1e-4)


def test_compiled_whole():
    model, batch = make_model("CLIPModel"), make_batch("CLIPModel")
    want = integration.contrastive_loss(model, **batch)
    with integration.apply():
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        got = compiled(**batch, return_loss=True).loss
    torch.testing.assert_close(got, want)
    assert_equal_gradients(gradients(model, got), gradients(model, want))


def test_a_derived_model_and_the_signature():
    class Mine(transformers.CLIPModel):
        pass

    model, batch = make_model("CLIPModel"), make_batch("CLIPModel")
    derived = Mine(model.config)
    derived.load_state_dict(model.state_dict())
    signature = inspect.signature(transformers.CLIPModel.forward)
    with integration.apply():
        assert inspect.signature(transformers.CLIPModel.forward) == signature
        loss = derived.eval()(**batch, return_loss=True).loss
    torch.testing.assert_close(loss, integration.contrastive_loss(model, **batch, return_loss=True))


def test_it_is_undone_when_the_body_raises():
    before = {name: getattr(transformers, name).forward for name in MODELS}
    with pytest.raises(KeyError), integration.apply():
        raise KeyError
    assert {name: getattr(transformers, name).forward for name in MODELS} == before


def test_half_precision_has_float32_logits():
    name = "CLIPModel"
    model, batch = make_model(name, torch.bfloat16), make_batch(name)
    batch["pixel_values"] = batch["pixel_values"].bfloat16()
    with torch.no_grad(), integration.apply():
        output = model(**batch, return_loss=True)
        logits = output.text_embeds.double() @ output.image_embeds.double().T
        logits = model.logit_scale.exp().double() * logits
        labels = torch.arange(len(logits))
        want = sum(torch.nn.functional.cross_entropy(s, labels) for s in (logits, logits.T)) / 2
    assert output.loss.dtype == torch.float32
    torch.testing.assert_close(output.loss.double(), want, rtol=1e-6, atol=1e-6)


def test_a_forward_that_would_not_run_is_refused():
    class Doubled(transformers.CLIPModel):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.loss = 2 * output.loss
            return output

    model, batch = Doubled(make_model("CLIPModel").config).eval(), make_batch("CLIPModel")
    with pytest.raises(ValueError, match=r"Doubled has a forward of its own, .* use apply"):
        integration.contrastive_loss(model, **batch)
    want = model(**batch, return_loss=True).loss
    with integration.apply():
        torch.testing.assert_close(model(**batch, return_loss=True).loss, want)
    wrapped = make_model("CLIPModel")
    wrapped.forward = functools.partial(wrapped.forward)
    with pytest.raises(ValueError, match="has a forward of its own"):
        integration.contrastive_loss(wrapped, **batch)


def test_other_models_are_refused():
    with pytest.raises(ValueError, match="the model is a Linear; pass one of CLIPModel"):
        integration.contrastive_loss(torch.nn.Linear(2, 2))
