"""What torch.compile and torch.export.save need to know of functions and results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.utils._pytree as pytree

__all__ = ["constant_result", "exportable"]

Function = TypeVar("Function", bound=Callable[..., Any])
Named = TypeVar("Named", bound=type)


def constant_result(function: Function) -> Function:
    """``torch.compiler.assume_constant_result``, without the compiler.

    That imports all of it before it sets this attribute, which takes almost as long as to import
    torch, in programs that compile nothing.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def exportable(named: Named) -> Named:
    """A named tuple whose name goes into a saved program and is found again when it is loaded."""
    register = getattr(pytree, "_register_namedtuple", None)  # not in every torch to come, perhaps
    if register is not None:
        register(named, serialized_type_name=f"dnkd_ext.{named.__name__}")
    return named
