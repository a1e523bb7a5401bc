"""What torch.export.save needs to know of the named tuples that losses and criteria return."""

from __future__ import annotations

from typing import TypeVar

import torch.utils._pytree as pytree

__all__ = ["exportable"]

Named = TypeVar("Named", bound=type)


def exportable(named: Named) -> Named:
    """A named tuple whose name goes into a saved program and is found again when it is loaded."""
    register = getattr(pytree, "_register_namedtuple", None)  # not in every torch to come, perhaps
    if register is not None:
        register(named, serialized_type_name=f"dnkd_ext.{named.__name__}")
    return named
