"""open_clip trains with m3bind's losses: its factory, its tasks and direct uses of its classes."""

import functools
import sys
from types import ModuleType
from typing import Any

from m3bind import losses
from m3bind.integrations.patching import Patch, Switch


def apply() -> Patch:
    """Puts m3bind's losses in the place of open_clip's, until a `with` block ends or `undo()`.

    Equivalent to::

        class ClipLoss(m3bind.losses.ClipLoss, open_clip.loss.ClipLoss): pass
        open_clip.ClipLoss = open_clip.loss.ClipLoss = open_clip.factory.ClipLoss = ClipLoss
        ...  # and so on: SigLipLoss, DistillClipLoss, CoCaLoss, every module that holds one of them

    `open_clip.create_loss(args)`, `open_clip.loss.ClipLoss(...)`, and the losses that the tasks of
    open_clip's development head make (`open_clip.task.CLIPTask(model)`) are then m3bind's. CoCaLoss
    keeps open_clip's caption loss. Your own subclasses find what open_clip's have, such as
    `get_logits`, which gives the matrix. A loss that exists already stays what it is, and so does a
    class that your own module has imported by name.

    Raises:
        ModuleNotFoundError: open_clip is not installed (`pip install open_clip_torch`).
    """
    return Patch(_SWITCH)


def _install() -> None:
    import open_clip.factory
    import open_clip.loss

    _rebind(_classes(open_clip.loss))


def _remove() -> None:
    import open_clip.loss

    _rebind({ours: theirs for theirs, ours in _classes(open_clip.loss).items()})


def _rebind(classes: dict[type, type]) -> None:
    """By value, wherever open_clip holds them: its modules differ from version to version, and a
    module that is imported while the patch is on binds the classes that it finds then."""
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "open_clip" and isinstance(module, ModuleType):
            for attribute, value in list(vars(module).items()):
                if isinstance(value, type) and value in classes:
                    setattr(module, attribute, classes[value])


@functools.cache
def _classes(theirs: Any) -> dict[type, type]:
    """open_clip's class -> the one in its place: ours, and among theirs what theirs is among them.

    They are pickled by the names that they go by, so outside of a patch as open_clip's.
    """

    def derived(name: str, *bases: type) -> type:
        return type(name, bases, {"__module__": theirs.__name__})

    clip = derived("ClipLoss", losses.ClipLoss, theirs.ClipLoss)
    return {
        theirs.ClipLoss: clip,
        theirs.SigLipLoss: derived("SigLipLoss", losses.SigLipLoss, theirs.SigLipLoss),
        theirs.DistillClipLoss: derived(
            "DistillClipLoss", losses.DistillClipLoss, clip, theirs.DistillClipLoss
        ),
        # Its contrastive part comes from the class between it and its base.
        theirs.CoCaLoss: derived("CoCaLoss", theirs.CoCaLoss, clip),
    }


_SWITCH = Switch(_install, _remove)
