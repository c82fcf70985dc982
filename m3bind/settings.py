"""Settings: a YAML file and ``a.b=c`` overrides, merged into a dataclass.

A key that no dataclass knows, or a value of the wrong type, is one error that names the file, the
key, the value and the nearest key that exists.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from m3bind.errors import M3BindError


def read(path: str | Path, overrides: Sequence[str], schema: type) -> Any:
    """An instance of the dataclass ``schema``; see `m3bind.config.load_config`."""
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    path = Path(path)
    if not path.is_file():
        raise M3BindError(f"no configuration file at {path}: give the path of a YAML file")
    try:
        loaded = OmegaConf.load(path)
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError) as error:
        where = getattr(error, "problem_mark", None)
        place = f" line {where.line + 1}" if where is not None else ""
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise M3BindError(f"{path}{place}: not valid YAML: {reason}") from None
    if not isinstance(loaded, DictConfig):
        raise M3BindError(f"{path}: expected keys and values such as 'seed: 0', found a list")
    _check_keys(_plain(loaded, str(path)), schema, str(path))
    merged = _merge(OmegaConf.structured(schema), loaded, str(path))
    for override in overrides:
        more = _parse_override(override, merged, schema)
        merged = _merge(merged, more, f"override {override!r}")
    return OmegaConf.to_object(merged)


def _plain(node: Any, source: str) -> dict[str, Any]:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        return typing.cast(dict[str, Any], OmegaConf.to_container(node, resolve=True))
    except OmegaConfBaseException as error:
        key = f"{error.full_key}: " if error.full_key else ""
        raise M3BindError(f"{source}: {key}{str(error).splitlines()[0]}") from None


def _parse_override(override: str, merged: Any, schema: type) -> Any:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    key, equals, _ = override.partition("=")
    if not equals or not key.strip():
        raise M3BindError(f"override {override!r}: expected key=value, such as align.steps=50")
    try:
        parsed = OmegaConf.from_dotlist([override])
    except (YAMLError, OmegaConfBaseException, ValueError) as error:
        raise M3BindError(f"override {key}: {str(error).splitlines()[0]}") from None
    plain = _plain(parsed, f"override {override!r}")
    _check_keys(plain, schema, f"override {override!r}")
    # A file may name any expert; an override that names a new one is a slip of the pen.
    named = [key for key, hint in typing.get_type_hints(schema).items()
             if typing.get_origin(hint) is dict]  # fmt: skip
    for key in named:
        for name in plain.get(key) or {}:
            if name not in merged[key]:
                known = sorted(str(each) for each in merged[key])
                raise _unknown_key(f"override {override!r}", f"{key}.{name}", name, known)
    return parsed


def _merge(base: Any, more: Any, source: str) -> Any:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        return OmegaConf.merge(base, more)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or getattr(error, "key", None) or "?"
        raise M3BindError(f"{source}: {key}: {str(error).splitlines()[0]}") from None
    except (OverflowError, ValueError) as error:  # of a number with hundreds of digits
        raise M3BindError(f"{source}: {str(error).splitlines()[0]}") from None


def _check_keys(given: Any, expected: Any, source: str, prefix: str = "") -> None:
    """Raise for the first key that the dataclass ``expected`` does not know."""
    if not isinstance(given, dict):
        return
    if dataclasses.is_dataclass(expected):
        hints = typing.get_type_hints(expected)
        for key, value in given.items():
            if key not in hints:
                raise _unknown_key(source, f"{prefix}{key}", str(key), sorted(hints))
            _check_value(value, hints[key], source, f"{prefix}{key}")
    elif typing.get_origin(expected) is dict:
        for key, value in given.items():
            _check_value(value, typing.get_args(expected)[1], source, f"{prefix}{key}")


def _check_value(value: Any, hint: Any, source: str, key: str) -> None:
    options = _options(hint)
    section = any(dataclasses.is_dataclass(o) or typing.get_origin(o) is dict for o in options)
    if section and not isinstance(value, dict) and not (value is None and type(None) in options):
        raise M3BindError(f"{source}: {key}: expected keys and values (or {{}}), found {value!r}")
    listed = any(typing.get_origin(option) is list for option in options)
    if listed and not isinstance(value, list) and not (value is None and type(None) in options):
        raise M3BindError(f"{source}: {key}: expected a list such as [1, 2], found {value!r}")
    for option in options:
        _check_keys(value, option, source, f"{key}.")


def _options(hint: Any) -> tuple[Any, ...]:
    union = isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
    return typing.get_args(hint) if union else (hint,)


def _unknown_key(source: str, full: str, key: str, known: list[str]) -> M3BindError:
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known) or 'none'}"
    return M3BindError(f"{source}: unknown key {full!r}: {hint}")
