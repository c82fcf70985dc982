"""Image-text models of Hugging Face transformers train without the matrix of logits.

Their forward returns `logits_per_image`, so a loss put in the place of theirs would come too late:
the matrix is there already. `contrastive_loss` computes what a training step needs and no more;
`apply` makes `model(..., return_loss=True)` do the same, for `Trainer` and loops that exist.
"""

import functools
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from m3bind import losses
from m3bind.integrations.patching import Patch, Switch

# Softmax over the batch, both directions; and a sigmoid of every pair.
SOFTMAX = ("CLIPModel", "MetaClip2Model", "ChineseCLIPModel", "AltCLIPModel")
SIGMOID = ("SiglipModel", "Siglip2Model")


def contrastive_loss(model: torch.nn.Module, **batch: Any) -> Tensor:
    """The loss of a transformers image-text model, in O(N + M) memory.

    Equivalent to::

        model(**batch, return_loss=True).loss

    Args:
        model: a CLIPModel, MetaClip2Model, ChineseCLIPModel, AltCLIPModel (symmetric InfoNCE),
            SiglipModel or Siglip2Model (pairwise sigmoid), or of a class derived from them with
            their forward. Not a wrapper: under DistributedDataParallel use `apply`, so that its
            hooks run.
        batch: what the model's processor returns.

    The towers run as in the model's own forward. Logits are formed in float32, where a 16-bit
    model forms them in 16 bit. As in transformers, each process sees its own batch alone.

    Raises:
        ValueError: another kind of model, or one with a forward of its own.
    """
    batch.pop("return_loss", None)
    kind = _kind(type(model))
    if "forward" in vars(model) or type(model).forward is not kind.base.forward:
        raise ValueError(
            f"contrastive_loss: {type(model).__name__} has a forward of its own, which would not "
            f"run; use apply(), and call the model with return_loss=True"
        )
    return _forward(model, batch, kind)["loss"]


def apply() -> Patch:
    """`model(..., return_loss=True)` gives the fused loss, until a `with` block ends or `undo()`.

    For the models that `contrastive_loss` knows. Where a loss is asked for, the output holds the
    loss, the embeddings and what `get_image_features` and `get_text_features` return. The logits
    are None: they are the matrix. Calls without `return_loss=True` are the model's own.

    Raises:
        ModuleNotFoundError: transformers is not installed.
    """
    return Patch(_SWITCH)


@dataclass(frozen=True, slots=True)
class _Kind:
    """What tells the models apart."""

    base: Any  # the class of transformers whose forward and loss it has
    loss: Callable[[Any, Tensor, Tensor], Any]
    image_inputs: frozenset[str]
    text_inputs: frozenset[str]


def _kind(model_class: Any) -> _Kind:
    for base in model_class.__mro__:
        if base.__module__.startswith("transformers.") and base.__name__ in SOFTMAX + SIGMOID:
            return _Kind(
                base,
                _softmax_loss if base.__name__ in SOFTMAX else _sigmoid_loss,
                _inputs(model_class.get_image_features),
                _inputs(model_class.get_text_features),
            )
    raise ValueError(
        f"contrastive_loss: the model is a {model_class.__name__}; pass one of "
        f"{', '.join(SOFTMAX + SIGMOID)} itself (of a wrapped model, the module within)"
    )


def _inputs(method: Callable[..., Any]) -> frozenset[str]:
    parameters = list(inspect.signature(method).parameters.values())[1:]  # without self
    return frozenset(p.name for p in parameters if p.kind is not p.VAR_KEYWORD)


def _softmax_loss(model: Any, text: Tensor, image: Tensor) -> Any:
    return losses.ClipLoss()(text, image, model.logit_scale.exp())


def _sigmoid_loss(model: Any, text: Tensor, image: Tensor) -> Any:
    return losses.SigLipLoss()(text, image, model.logit_scale.exp(), model.logit_bias)


def _forward(model: Any, batch: dict[str, Any], kind: _Kind) -> dict[str, Any]:
    """The fields of the model's output, without the logits."""
    options = {k: v for k, v in batch.items() if k not in kind.image_inputs | kind.text_inputs}
    options["return_dict"] = True
    images = {k: v for k, v in batch.items() if k in kind.image_inputs}
    texts = {k: v for k, v in batch.items() if k in kind.text_inputs}
    vision = model.get_image_features(**images, **options)
    text = model.get_text_features(**texts, **options)
    image_embeds, text_embeds = (
        output.pooler_output / output.pooler_output.norm(dim=-1, keepdim=True)
        for output in (vision, text)
    )
    return {
        "loss": kind.loss(model, text_embeds, image_embeds.to(text_embeds.device)),
        "text_embeds": text_embeds,
        "image_embeds": image_embeds,
        "text_model_output": text,
        "vision_model_output": vision,
    }


# Class -> its own forward, while the patch is on.
_forwards: dict[type, Callable[..., Any]] = {}


def _install() -> None:
    import transformers

    for name in SOFTMAX + SIGMOID:
        model_class = getattr(transformers, name, None)
        if model_class is not None:  # an older release does not have all of them
            _forwards[model_class] = model_class.forward
            model_class.forward = _without_logits(model_class)


def _remove() -> None:
    while _forwards:
        model_class, forward = _forwards.popitem()
        model_class.forward = forward  # type: ignore[attr-defined]


def _without_logits(model_class: Any) -> Callable[..., Any]:
    own, kind = model_class.forward, _kind(model_class)
    names = [name for name in inspect.signature(own).parameters if name != "self"]
    output_class = getattr(
        sys.modules[model_class.__module__], model_class.__name__.removesuffix("Model") + "Output"
    )

    @functools.wraps(own)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        batch = dict(zip(names, args, strict=False)) | kwargs
        if not batch.pop("return_loss", None):
            return own(self, *args, **kwargs)
        return_dict = batch.pop("return_dict", None)
        output = output_class(**_forward(self, batch, kind))
        as_dict = self.config.return_dict if return_dict is None else return_dict
        return output if as_dict else output.to_tuple()

    return forward


_SWITCH = Switch(_install, _remove)
