"""open_clip trains with m3bind's losses: its factory, its tasks and direct uses of its classes."""

import sys
from types import ModuleType
from typing import Any

from m3bind import losses
from m3bind.integrations.patching import Patch, Switch

NAMES = ("ClipLoss", "SigLipLoss", "DistillClipLoss")


def apply() -> Patch:
    """Puts m3bind's losses in the place of open_clip's, until a `with` block ends or `undo()`.

    Equivalent to::

        open_clip.ClipLoss = open_clip.loss.ClipLoss = open_clip.factory.ClipLoss = m3bind.ClipLoss
        ...  # and so on: SigLipLoss, DistillClipLoss, CoCaLoss, every module that holds one of them

    `open_clip.create_loss(args)`, `open_clip.loss.ClipLoss(...)`, and the losses that the tasks of
    open_clip's development head make (`open_clip.task.CLIPTask(model)`) are then m3bind's. CoCaLoss
    keeps open_clip's caption loss. A loss that exists already stays what it is, and so does a class
    that your own module has imported by name.

    Raises:
        ModuleNotFoundError: open_clip is not installed (`pip install open_clip_torch`).
    """
    return Patch(_SWITCH)


# open_clip's class -> the one in its place, while the patch is on.
_replaced: dict[type, type] = {}


def _install() -> None:
    import open_clip.factory
    import open_clip.loss

    replaced = {getattr(open_clip.loss, name): getattr(losses, name) for name in NAMES}
    replaced[open_clip.loss.CoCaLoss] = _coca_loss(open_clip.loss)
    _replaced.update(replaced)
    _rebind(_replaced)


def _remove() -> None:
    _rebind({ours: theirs for theirs, ours in _replaced.items()})
    _replaced.clear()


def _rebind(classes: dict[type, type]) -> None:
    """By value, wherever open_clip holds them: its modules differ from version to version, and a
    module that is imported while the patch is on binds the classes that it finds then."""
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "open_clip" and isinstance(module, ModuleType):
            for attribute, value in list(vars(module).items()):
                if isinstance(value, type) and value in classes:
                    setattr(module, attribute, classes[value])


def _coca_loss(open_clip_loss: Any) -> type:
    """open_clip's CoCaLoss, whose contrastive part comes from the class between it and its base."""

    class Contrastive(open_clip_loss.ClipLoss):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.contrastive = losses.ClipLoss(*args, **kwargs)

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self.contrastive(*args, **kwargs)

    class CoCaLoss(open_clip_loss.CoCaLoss, Contrastive):
        pass

    return CoCaLoss


_SWITCH = Switch(_install, _remove)
