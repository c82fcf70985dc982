"""Low-rank adapters by peft, on the query and value projections that a tower really has."""

from torch import nn

from m3bind.config import LoraConfig
from m3bind.models.attention import split_attention

QUERY_VALUE = {"query", "value", "q_proj", "v_proj", "to_q", "to_v", "q_lin", "v_lin"}
FUSED = {"qkv", "in_proj", "c_attn", "query_key_value"}


def discover_targets(module: nn.Module) -> list[str]:
    """Full names of the projections to adapt, read from the module tree.

    Separate query and value layers where there are any; else fused ones (that adapts the key
    as well, as they are one matrix). Returns an empty list for a tower without attention.
    """
    linear = [n for n, m in module.named_modules() if isinstance(m, nn.Linear)]
    for known in (QUERY_VALUE, FUSED):
        found = [name for name in linear if name.rsplit(".", 1)[-1] in known]
        if found:
            return found
    return []


def add_lora(module: nn.Module, config: LoraConfig, *, tower: str) -> list[str]:
    """Freeze ``module`` and add trainable adapters to it, in place; returns their targets.

    ``config.targets`` are ends of module names, or None to discover them. Raises ValueError
    when nothing matches: adapters that adapt nothing would train nothing, silently.
    """
    from peft import LoraConfig as PeftConfig
    from peft import inject_adapter_in_model

    split_attention(module)
    adaptable = [name for name, part in module.named_modules() if isinstance(part, nn.Linear)]
    if config.targets is None:
        targets = discover_targets(module)
    else:
        unmatched = [t for t in config.targets if not any(_ends(n, t) for n in adaptable)]
        if unmatched:
            raise ValueError(
                f"lora.targets {unmatched} match nothing in {tower}: it has "
                f"{_kinds(adaptable)}; leave targets out to discover them"
            )
        targets = [n for n in adaptable if any(_ends(n, t) for t in config.targets)]
    if not targets:
        raise ValueError(
            f"lora finds no query and value projections in {tower}: it has "
            f"{_kinds(adaptable)}; name lora.targets, freeze the tower, or set lora to null"
        )
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    inject_adapter_in_model(
        PeftConfig(
            r=config.r,
            lora_alpha=config.alpha,
            lora_dropout=config.dropout,
            target_modules=targets,
            bias="none",
        ),
        module,
    )
    return targets


def _ends(name: str, target: str) -> bool:
    return name == target or name.endswith("." + target)


def _kinds(names: list[str]) -> str:
    return ", ".join(sorted({name.rsplit(".", 1)[-1] for name in names})) or "no linear layers"
