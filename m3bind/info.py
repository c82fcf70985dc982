"""What `m3bind info` prints: versions, how the extension was built, and the table of backends."""

import platform
from importlib import metadata

import torch

from m3bind import backends

DTYPE_NAMES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float64: "fp64",
}


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


def support(primitive: str, device_type: str) -> list[tuple[str, str]]:
    """(backend, outcome) on one device: the dtypes it takes, or why it does not run."""
    rows = []
    for name in backends.BACKENDS:
        reasons = {d: backends.why_not(primitive, name, device_type, d) for d in DTYPE_NAMES}
        taken = [DTYPE_NAMES[d] for d, reason in reasons.items() if reason is None]
        if taken:
            entry = backends.TABLE[primitive][name]
            remark = f"; never automatic: {entry.unverified}" if entry.unverified else ""
            rows.append((name, f"{' '.join(taken)} ({entry.note}{remark})"))
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
            remark = "" if device == "cpu" else "; m3bind's tests have not yet run on a GPU"
            lines += ["", f"{', '.join(names)} on {device} tensors (default {default}{remark})"]
            lines += [f"  {name:10} {text}" for name, text in support(primitive, device)]
    return "\n".join(lines)
