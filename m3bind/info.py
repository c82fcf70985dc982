"""What `m3bind info` prints: versions, how the extension was built, and the table of backends."""

import platform
from importlib import metadata

import torch

from m3bind import backends, verified
from m3bind.backends import DTYPE_NAMES

NOT_YET = "not yet run on a GPU"


def versions() -> dict[str, str]:
    """Versions of what the losses stand on; "not installed" where a distribution is missing."""
    found = {"python": platform.python_version()}
    for name in ("m3bind", "torch", "triton", "numpy"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def native_build() -> str:
    """One line on m3bind._C: what built it, its instruction set, or why it is missing."""
    module = backends.native()
    if isinstance(module, str):
        return f"not available: {module}"
    return (
        f"{module.compiler}, headers of torch {module.torch_headers}, runs with torch "
        f">= {module.torch_target}, {module.cpu_capability} chosen for this processor"
    )


def status(primitive: str, backend: str) -> str:
    """What is known of a backend on GPUs."""
    told = []
    for architecture in verified.table():
        for dtype, one in verified.found(architecture, primitive, backend).items():
            same = one.sources == backends.installed_sources(primitive, backend)
            word = "verified on" if same else "kernels changed since they were verified on"
            told.append(
                (f"{word} {one.device} ({architecture}) at {one.commit}, {one.date}", dtype)
            )
    if not told:
        known = ", ".join(verified.table())
        return f"not verified on {known}" if known else NOT_YET
    lines = dict.fromkeys(line for line, _ in told)
    return "; ".join(f"{line}: {' '.join(d for other, d in told if other == line)}"
                     for line in lines)  # fmt: skip


def support(primitive: str, device_type: str) -> list[tuple[str, str]]:
    """(backend, outcome) on one device: the dtypes it takes, or why it does not run."""
    rows = []
    for name in backends.BACKENDS:
        reasons = {d: backends.why_not(primitive, name, device_type, d) for d in DTYPE_NAMES}
        taken = [DTYPE_NAMES[d] for d, reason in reasons.items() if reason is None]
        if taken:
            remark = f"; {status(primitive, name)}" if device_type == "cuda" else ""
            note = backends.TABLE[primitive][name].note
            rows.append((name, f"{' '.join(taken)} ({note}{remark})"))
        else:
            rows.append((name, f"not available: {reasons[torch.float32]}"))
    return rows


def describe() -> str:
    """The whole text, ready to print. Needs torch and nothing of the toolkit."""
    lines = [f"{name:10} {version}" for name, version in versions().items()]
    lines.append(f"{'native':10} {native_build()}")
    lines.append(f"{'threads':10} {torch.get_num_threads()}")
    if torch.cuda.is_available():
        lines.append(f"{'cuda':10} {torch.cuda.get_device_name()}")
    else:
        lines.append(f"{'cuda':10} no device that torch can use")
    for primitive in backends.TABLE:
        names = [op for op, base in backends.BUILT_ON.items() if base == primitive]
        for device in ("cpu", "cuda"):
            default = backends.resolve(primitive, device, torch.float32)
            lines += ["", f"{', '.join(names)} on {device} tensors (default {default})"]
            lines += [f"  {name:10} {text}" for name, text in support(primitive, device)]
    return "\n".join(lines)
