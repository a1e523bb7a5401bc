"""Loads the compiled kernels once, and knows why when it cannot."""

from __future__ import annotations

import importlib
import importlib.machinery
import json
import os
import re
import warnings
from pathlib import Path
from typing import Any

import torch

from dnkd_ext._export import constant_result

__all__ = ["build_info", "has_kernel_for", "is_loaded", "load_error", "operator"]

REBUILD = "pip install --no-build-isolation --force-reinstall --no-deps ."
IN_PLACE = "pip install --no-build-isolation --no-deps -e ."
# What Python calls or describes to torch: a library that lacks one is of other sources than this.
OPERATORS = (
    "nd_loss", "_nd_loss_added", "_nd_loss_forward", "_nd_loss_added_forward", "_nd_loss_backward",
    "_nd_loss_reference", "_nd_mixtures", "logit_loss", "_logit_loss_forward",
    "_logit_loss_backward", "_logit_loss_reference", "dist_loss", "_dist_loss_forward",
    "_dist_loss_moments", "_dist_loss_finish", "_dist_loss_backward", "_dist_loss_reference",
    "feature_diagnostics",
)  # fmt: skip

_library: Any = None
_load_error: str | None = None
_has_cuda = False
_runs_on_gpu: dict[int, bool] = {}


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


def _rebuild() -> str:
    # Inside a clone Python imports this folder, whatever is installed.
    return IN_PLACE if (FOLDER.parent / "csrc").is_dir() else REBUILD


def _is_required() -> bool:
    """Whether running without kernels is to be an error."""
    return os.environ.get("DNKD_REQUIRE_EXT", "0") not in {"", "0"}


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
    missing = [name for name in OPERATORS if not hasattr(torch.ops.dnkd_ext, name)]
    if missing:
        _library = None
        _load_error = f"the library was built from other sources and has no {', '.join(missing)}"
        return
    _has_cuda = _library.build_info()["cuda"] is not None


_load()

if _load_error is not None:
    _message = (
        f"dnkd_ext runs without its compiled kernels, on the slower PyTorch reference: "
        f"{_load_error}. To build them, run in the source folder: {_rebuild()}"
    )
    if _is_required():
        raise ImportError(_message + " (an error because DNKD_REQUIRE_EXT is set)")
    warnings.warn(_message, UserWarning, stacklevel=3)


def is_loaded() -> bool:
    """Whether the compiled library is in use."""
    return _library is not None


def operator(name: str) -> Any:
    """An operator of the library, to be kept: looking it up takes time at every dot."""
    if name not in OPERATORS:
        raise KeyError(f"{name} is not in dnkd_ext._extension.OPERATORS, which imports check")
    return getattr(torch.ops.dnkd_ext, name).default


def load_error() -> str | None:
    """Why the compiled library is not in use; None where it is."""
    return _load_error


def _covers(architectures: str, capability: tuple[int, int]) -> bool:
    """Whether code for these architectures, as in TORCH_CUDA_ARCH_LIST, runs on such a GPU."""
    for name in architectures.replace(";", " ").split():
        parts = re.fullmatch(r"(\d+)\.(\d+)([af]?)(\+PTX)?", name)
        if parts is None:
            return True  # the name of a family: not known here
        least = (int(parts[1]), int(parts[2]))
        if parts[3] == "a":
            fits = least == capability
        else:
            fits = least[0] == capability[0] and least <= capability
        if fits or (parts[4] and not parts[3] and least <= capability):
            return True
    return False


@constant_result
def _runs_on(index: int) -> bool:
    """Whether the CUDA kernels run on this GPU; a warning, once, where they do not."""
    if index not in _runs_on_gpu:
        try:
            capability = torch.cuda.get_device_capability(index)
        except (RuntimeError, AssertionError):  # a fake tensor may be of a GPU that is not there
            return True
        architectures = _library.build_info()["cuda_architectures"]
        runs = _covers(architectures, capability)
        if not runs:
            own = ".".join(map(str, capability))
            message = (
                f"the CUDA kernels of dnkd_ext were compiled for GPUs of {architectures} and do "
                f"not run on cuda:{index}, which is of {own}. To build them for it, run in the "
                f"source folder: TORCH_CUDA_ARCH_LIST={own} DNKD_CUDA=1 {_rebuild()}"
            )
            if _is_required():
                raise RuntimeError(message + " (an error because DNKD_REQUIRE_EXT is set)")
            warnings.warn(
                message + ". Until then the slower PyTorch reference runs there",
                UserWarning,
                stacklevel=4,
            )
        _runs_on_gpu[index] = runs
    return _runs_on_gpu[index]


def has_kernel_for(tensor: torch.Tensor) -> bool:
    """Whether the compiled operators take this tensor.

    Devices without kernels, GPUs that these were not compiled for, and the transforms of torch.func
    (which cannot see into a C++ autograd function) are left to the reference.
    """
    return (
        _library is not None
        and (tensor.is_cpu or (_has_cuda and tensor.is_cuda and _runs_on(tensor.device.index)))
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
