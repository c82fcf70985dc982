"""Triton's interpreter, alike on all processors and without what tests need not wait for; imported
where it runs kernels."""

from dataclasses import replace

import numpy as np
import triton.language as tl
from triton.language.semantic import TritonSemantic
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


def dot_of_any_processor(a, b, d, *_):
    """A library's product in float32 rounds a dot product by its place in the tile, on some
    processors; a GPU does not. Of float64 nothing of that is left after rounding."""
    product = np.matmul(a.data.astype(np.float64), b.data.astype(np.float64))
    rounded = product.astype(d.data.dtype)
    return interpreter.TensorHandle(rounded + d.data, d.dtype.scalar)


builder.create_dot = dot_of_any_processor
broadcast = TritonSemantic.broadcast_impl_value


def broadcast_where_needed(self, lhs, rhs):
    """Triton walks the shapes of what has one shape, too."""
    same = lhs.type.is_block() and rhs.type.is_block() and lhs.type.shape == rhs.type.shape
    return (lhs, rhs) if same else broadcast(self, lhs, rhs)


TritonSemantic.broadcast_impl_value = broadcast_where_needed
numpy_type = interpreter._get_np_dtype
numpy_types: dict[str, np.dtype] = {}


def numpy_type_of(type):
    """Triton makes a table of all of them for each."""
    name = type.scalar.name
    if name not in numpy_types:
        numpy_types[name] = numpy_type(type)
    return numpy_types[name]


interpreter._get_np_dtype = numpy_type_of
make_type, make_value = tl.block_type.__init__, tl.tensor.__init__
types: dict[tuple, dict] = {}
values: dict[str, dict] = {}


def make_type_once(self, element_ty, shape):
    """Triton checks the shape of every value."""
    key = (element_ty.name, *shape)
    if key not in types:
        make_type(self, element_ty, shape)
        types[key] = vars(self).copy()
    vars(self).update(types[key])


def make_value_once(self, handle, type):
    """Triton wraps the shape of every value."""
    if type.name not in values:
        make_value(self, handle, type)
        values[type.name] = vars(self).copy()
    vars(self).update(values[type.name], handle=handle, type=type, dtype=type.scalar)


tl.block_type.__init__, tl.tensor.__init__ = make_type_once, make_value_once
