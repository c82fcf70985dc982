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
    `get_logits`, which gives the matrix; one that overrides it gets open_clip's forward, matrix and
    all. A loss that exists already stays what it is (and cannot be pickled until the patch is
    undone), and so does a class that your own module has imported by name.

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


# What open_clip's forward calls: a subclass that has its own gets that forward.
PARTS = ("get_logits", "get_ground_truth", "dist_loss", "_loss")


@functools.cache
def _classes(theirs: Any) -> dict[type, type]:
    """open_clip's class -> the one in its place: ours, and among its kind what theirs is."""
    clip = _derived(theirs.ClipLoss, losses.ClipLoss)
    return {
        theirs.ClipLoss: clip,
        theirs.SigLipLoss: _derived(theirs.SigLipLoss, losses.SigLipLoss),
        theirs.DistillClipLoss: _derived(theirs.DistillClipLoss, losses.DistillClipLoss, clip),
        # Its contrastive part comes from the class between it and its base.
        theirs.CoCaLoss: type("CoCaLoss", (theirs.CoCaLoss, clip), {}),
    }


def _derived(theirs: Any, ours: Any, *between: type) -> type:
    parts = {name: getattr(theirs, name) for name in PARTS if hasattr(theirs, name)}

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        changed = any(getattr(type(self), name) is not part for name, part in parts.items())
        return (theirs if changed else ours).forward(self, *args, **kwargs)

    return type(theirs.__name__, (ours, *between, _Pickled, theirs), {"forward": forward})


class _Pickled:
    """Read as what it is, under a patch or not; also what open_clip's own is read as under one."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        import open_clip.loss

        for theirs, ours in _classes(open_clip.loss).items():
            if type(self) is ours:
                return _unpickled, (theirs.__name__,), self.__dict__
        return super().__reduce_ex__(protocol)

    def __setstate__(self, state: dict[str, Any]) -> None:
        made = {**vars(losses.ClipLoss(world_size=state["world_size"])), **state}
        super().__setstate__(made)  # type: ignore[misc]  # of torch.nn.Module


def _unpickled(name: str) -> Any:
    import open_clip.loss

    classes = {theirs.__name__: ours for theirs, ours in _classes(open_clip.loss).items()}
    return object.__new__(classes[name])


_SWITCH = Switch(_install, _remove)
