"""What one rank brings to a call, checked before it meets the others."""

import math
import struct
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from m3bind.distributed import agreement
from m3bind.distributed.agreement import NO_NUMBER, Brought
from m3bind.ops.arguments import DTYPES
from m3bind.ops.contrastive import Terms


@dataclass(kw_only=True, slots=True)
class Prepared:
    """The checked arguments of one rank."""

    x: Tensor
    y: Tensor
    scale: Tensor
    terms: Terms
    backend: str
    teacher: tuple[Tensor, Tensor] | None = None
    teacher_scale: Tensor | None = None
    given: dict[str, Any] = field(default_factory=dict)  # scales and biases as they were passed

    def tensors(self) -> dict[str, Tensor]:
        """Those of floating-point numbers, by name."""
        named = {"x": self.x, "y": self.y, "logit_scale": self.scale}
        more = {"logit_bias": self.terms.bias, "negatives": self.terms.negatives}
        if self.teacher is not None:
            more |= dict(zip(("teacher_x", "teacher_y"), self.teacher, strict=True))
            more["teacher_scale"] = self.teacher_scale
        if self.terms.soft_targets is not None:
            more["weights of soft_targets"] = self.terms.soft_targets[1]
        return named | {name: tensor for name, tensor in more.items() if tensor is not None}

    def brought(self, op: str, diagonal: bool, check: bool) -> Brought:
        self._refuse_transforms(op)
        self._leave_inference_mode()
        x, y, terms = self.x, self.y, self.terms
        listed = None if terms.soft_targets is None else terms.soft_targets[0]
        shared = terms.negatives if terms.negatives is not None else x[:0]
        scalars = [self.scale] if terms.bias is None else [self.scale, terms.bias]
        enabled = torch.is_grad_enabled()
        teacher_x = None if self.teacher is None else self.teacher[0]
        return Brought(
            grad_mode=enabled,
            features=x.shape[1],
            teacher_features=0 if teacher_x is None else teacher_x.shape[1],
            dtype=DTYPES.index(x.dtype),
            teacher_dtype=0 if teacher_x is None else DTYPES.index(teacher_x.dtype),
            device=agreement.device_kind(x.device),
            rows=x.shape[0],
            columns=y.shape[0],
            negatives=shared.shape[-2],
            listed=0 if listed is None else listed.shape[1],
            largest_column=agreement.largest(terms.labels, listed),
            unpaired=diagonal and x.shape[0] > y.shape[0],
            has_nan=self._has_nan() if check else 0,
            memory=agreement.device_memory(x.device),
            need_x=enabled and x.requires_grad,
            need_y=enabled and y.requires_grad,
            need_negatives=enabled and shared.requires_grad,
            need_scalars=enabled and any(s.requires_grad for s in scalars),
            **{name: _bits(self.given.get(name)) for name in agreement.NUMBERS},
        )

    def _has_nan(self) -> int:
        """A bit for each of `agreement.MAY_HOLD_NAN`."""
        named = self.tensors()
        found = [name in named and named[name].isnan().any() for name in agreement.MAY_HOLD_NAN]
        return sum(bool(there) << bit for bit, there in enumerate(found))

    def _refuse_transforms(self, op: str) -> None:
        """Here, where all ranks hear of it: later this rank alone would fail, and others wait."""
        if torch._C._are_functorch_transforms_active():
            raise ValueError(
                f"{op}: called within torch.func, which does not reach over ranks; call backward() "
                "or torch.autograd.grad on the loss"
            )
        if forward_ad._current_level >= 0:
            for name, tensor in self.tensors().items():
                if forward_ad.unpack_dual(tensor).tangent is not None:
                    raise ValueError(
                        f"{op}: {name} has a tangent; over ranks there is no forward mode: call "
                        "backward() or torch.autograd.grad on the loss"
                    )

    def _leave_inference_mode(self) -> None:
        """Copies what was made in it: other ranks may want gradients, for which it is kept."""
        if torch.is_inference_mode_enabled():
            return
        self.x, self.y, self.scale = map(_usual, (self.x, self.y, self.scale))
        terms = self.terms
        for name in ("bias", "labels", "negatives"):
            if getattr(terms, name) is not None:
                setattr(terms, name, _usual(getattr(terms, name)))
        for name in ("positive_ids", "mask_ids", "soft_targets"):
            if getattr(terms, name) is not None:
                setattr(terms, name, tuple(map(_usual, getattr(terms, name))))
        if self.teacher is not None and self.teacher_scale is not None:
            self.teacher = _usual(self.teacher[0]), _usual(self.teacher[1])
            self.teacher_scale = _usual(self.teacher_scale)


def _usual(tensor: Tensor) -> Tensor:
    return tensor.clone() if tensor.is_inference() else tensor


def _bits(number: Any) -> int:
    """Of a number that is passed as one, and is one; a tensor's would have to be waited for."""
    if number is None or isinstance(number, Tensor) or math.isnan(float(number)):
        return NO_NUMBER
    return struct.unpack("<q", struct.pack("<d", float(number)))[0]
