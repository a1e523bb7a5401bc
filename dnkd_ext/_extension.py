"""Loads the compiled kernels once, and knows why when it cannot."""

from __future__ import annotations

import importlib
import importlib.machinery
import json
import os
import warnings
from pathlib import Path
from typing import Any

import torch

__all__ = ["build_info", "has_kernel_for", "is_loaded", "load_error"]

REBUILD = "pip install --no-build-isolation --force-reinstall --no-deps ."
IN_PLACE = "pip install --no-build-isolation --no-deps -e ."

_library: Any = None
_load_error: str | None = None
_has_cuda = False


FOLDER = Path(__file__).parent


def _build_record() -> dict[str, Any]:
    """What the build wrote about itself; empty where nothing was built."""
    try:
        record = json.loads((FOLDER / "_build.json").read_text())
    except (OSError, ValueError):
        return {}
    if not isinstance(record, dict) or not isinstance(record.get("torch"), str):
        return {}
    return record


def _damage(record: dict[str, Any]) -> str | None:
    """Why the library must not even be tried: a truncated one kills the process when loaded."""
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        library = FOLDER / f"_C{suffix}"
        if library.is_file():
            size, built = library.stat().st_size, record.get("library_bytes")
            if built is not None and size != built:
                return f"{library.name} has {size} bytes, but the build wrote {built}"
            return None
    return None


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def _load() -> None:
    global _library, _load_error, _has_cuda
    record = _build_record()
    built_for = record.get("torch")
    if built_for is not None and _minor(built_for) != _minor(torch.__version__):
        # Loading it could succeed and then corrupt memory: torch's C++ ABI changes between minors.
        _load_error = (
            f"the library was built for torch {built_for} but torch {torch.__version__} "
            "is installed"
        )
        return
    damage = _damage(record)
    if damage is not None:
        _load_error = f"the library built for torch {built_for} is damaged: {damage}"
        return
    try:
        _library = importlib.import_module("dnkd_ext._C")
    except ImportError as error:
        if built_for is None:
            _load_error = f"no compiled library beside {FOLDER} ({error})"
        else:
            _load_error = (
                f"the library built for torch {built_for} does not load with torch "
                f"{torch.__version__}: {error}"
            )
        return
    _has_cuda = _library.build_info()["cuda"] is not None


_load()

if _load_error is not None:
    # Inside a clone Python imports this folder, whatever is installed.
    _rebuild = IN_PLACE if (FOLDER.parent / "csrc").is_dir() else REBUILD
    _message = (
        f"dnkd_ext runs without its compiled kernels, on the slower PyTorch reference: "
        f"{_load_error}. To build them, run in the source folder: {_rebuild}"
    )
    if os.environ.get("DNKD_REQUIRE_EXT", "0") not in {"", "0"}:
        raise ImportError(_message + " (an error because DNKD_REQUIRE_EXT is set)")
    warnings.warn(_message, UserWarning, stacklevel=3)


def is_loaded() -> bool:
    """Whether the compiled library is in use."""
    return _library is not None


def load_error() -> str | None:
    """Why the compiled library is not in use; None where it is."""
    return _load_error


def has_kernel_for(tensor: torch.Tensor) -> bool:
    """Whether the compiled operators take this tensor.

    Devices without kernels and the transforms of torch.func (which cannot see into a C++ autograd
    function) are left to the reference.
    """
    return (
        _library is not None
        and (tensor.is_cpu or (_has_cuda and tensor.is_cuda))
        and not torch._C._are_functorch_transforms_active()
    )


def build_info() -> dict[str, Any]:
    """What this installation consists of.

    Returns:
        A dictionary with ``version``, ``torch`` and ``torch_cuda`` (those installed), ``loaded``
        (whether the compiled kernels are in use), ``load_error`` (why not, or None),
        ``built_for_torch``, ``compiler``, ``openmp``, ``threads``, ``cpu_isas`` (instruction sets
        this build and CPU share), ``cpu_isa`` (the one in use), ``cuda`` (version of the CUDA
        kernels, None without) and ``cuda_architectures``. Entries that only the library knows are
        None where it is not loaded.
    """
    from dnkd_ext import __version__

    built = _library.build_info() if _library is not None else {}
    return {
        "version": __version__,
        "torch": str(torch.__version__),
        "torch_cuda": torch.version.cuda,
        "loaded": is_loaded(),
        "load_error": _load_error,
        "built_for_torch": _build_record().get("torch"),
        **{
            key: built.get(key)
            for key in (
                "compiler",
                "openmp",
                "threads",
                "cpu_isas",
                "cpu_isa",
                "cuda",
                "cuda_architectures",
            )
        },
    }


def empty_cache() -> int:
    """Give CPU memory that is kept for the next gradients back to the system.

    Gradients of 256 KiB and more on the CPU take the memory of earlier ones that were freed, since
    fresh memory costs page faults: as much time as the losses themselves. At most 256 MiB are kept,
    or as many mebibytes as ``DNKD_CPU_CACHE_MB`` says when the first is made (0: none), and nothing
    that 64 gradients in a row found no use for. On a GPU torch's own allocator does this.

    Returns:
        How many bytes were kept.

    Raises:
        ValueError: ``DNKD_CPU_CACHE_MB`` is no whole number.
    """
    return 0 if _library is None else _library.empty_cache()
