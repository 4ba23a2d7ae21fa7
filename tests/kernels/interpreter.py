"""Triton's interpreter, made to work out once what it works out at each operation: half of its time is of types. And
its products are made as a GPU makes them: a row's sums do not depend on where in a tile the row lies.

Nothing else in this process uses Triton's language, so it may stay as the interpreter patches it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from triton import language
from triton.language import core, semantic
from triton.runtime import interpreter


def remember(patch: pytest.MonkeyPatch) -> None:
    """Patches the interpreter and the language, until `patch` is undone."""
    patch.setattr(interpreter.InterpreterBuilder, "create_dot", product_by_rows)
    patch.setattr(interpreter, "_patch_lang", patched_once())
    patch.setattr(interpreter, "_get_np_dtype", dtypes_by_name())
    patch.setattr(core.block_type, "__init__", block_types_by_shape())
    patch.setattr(core.tensor, "__init__", shapes_of_tensors())
    patch.setattr(semantic.TritonSemantic, "broadcast_impl_value", broadcast_of_others())


def product_by_rows(self: Any, a: Any, b: Any, c: Any, precision: Any, imprecise: Any) -> Any:
    """numpy leaves a whole product to a library, of which some sum the last rows of a tile in another order."""
    rows = np.matmul(a.data[:, None, :], b.data, dtype=c.data.dtype)[:, 0]
    return interpreter.TensorHandle(rows + c.data, c.dtype.scalar)


def patched_once() -> Any:
    """The language is replaced at each call of a function, inner ones too, and put back after it."""
    patch_language = interpreter._patch_lang
    modules: set[int] = set()
    patched: set[frozenset[str]] = set()

    def patch_once(function: Any) -> Any:
        if id(function.__globals__) not in modules:
            modules.add(id(function.__globals__))
            visible = [language, core]
            names = frozenset(
                name for name, value in function.__globals__.items() if any(value is each for each in visible)
            )
            if names not in patched:
                patched.add(names)
                patch_language(function)
        return interpreter._LangPatchScope()  # of nothing: there is nothing to put back

    return patch_once


def dtypes_by_name() -> Any:
    """A table of all dtypes is made to look one up."""
    look_up = interpreter._get_np_dtype
    known: dict[str, Any] = {}

    def dtype_of(kind: Any) -> Any:
        if (name := str(kind)) not in known:
            known[name] = look_up(kind)
        return known[name]

    return dtype_of


def block_types_by_shape() -> Any:
    """A block's type checks its shape, and writes its name."""
    make = core.block_type.__init__
    known: dict[tuple[Any, ...], dict[str, Any]] = {}

    def init(self: Any, element_ty: Any, shape: Any) -> None:
        sizes = shape.values if isinstance(shape, core.tuple) else shape
        key = (str(element_ty), *(size.value if isinstance(size, core.constexpr) else size for size in sizes))
        if key not in known:
            make(self, element_ty, shape)
            known[key] = vars(self).copy()
        else:
            vars(self).update(known[key], element_ty=element_ty)

    return init


def shapes_of_tensors() -> Any:
    """A tensor's shape is made of its type's, of constants that are objects."""
    make = core.tensor.__init__
    known: dict[tuple[int, ...], tuple[Any, Any]] = {}

    def init(self: Any, handle: Any, type: Any) -> None:
        key = tuple(type.shape.values) if type.is_block() else ()
        if key not in known:
            make(self, handle, type)
            known[key] = self.shape, self.numel
        else:
            self.handle, self.type, self.dtype = handle, type, type.scalar
            self.shape, self.numel = known[key]

    return init


def broadcast_of_others() -> Any:
    """Operands of one shape are broadcast too: their shapes are compared, dimension by dimension, as objects."""
    broadcast = semantic.TritonSemantic.broadcast_impl_value

    def broadcast_where_they_differ(self: Any, lhs: Any, rhs: Any) -> Any:
        one, other = lhs.type, rhs.type
        blocks = one.is_block()
        if blocks == other.is_block() and (not blocks or one.shape.values == other.shape.values):
            return lhs, rhs
        return broadcast(self, lhs, rhs)

    return broadcast_where_they_differ
