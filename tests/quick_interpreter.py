"""Triton's interpreter without what tests need not wait for; imported where it runs kernels."""

from dataclasses import replace

import triton.language as tl
from triton.runtime import interpreter

patch = interpreter._patch_lang
modules: dict[int, list] = {}


def patch_where_needed(function):
    """The interpreter patches Triton's language at every call of a jitted function from another,
    where it is patched already; most of the time would go there."""
    scope = function.__globals__
    if id(scope) not in modules:
        modules[id(scope)] = [m for m in (tl, tl.core) if any(m is v for v in scope.values())]
    if any(tl.core.is_builtin(module.load) for module in modules[id(scope)]):
        return patch(function)
    return interpreter._LangPatchScope()


interpreter._patch_lang = patch_where_needed
# Every sum and product of integers is formed again in 64 bits and checked, which takes long. A GPU
# does not, and matrices of some hundred rows are far from the end of 32 bits.
builder = interpreter.interpreter_builder
builder.options = replace(builder.options, sanitize_overflow=False)
