"""Steps whose parameters, gradients and optimiser state are sharded over processes by FSDP2.

Parameters stay float32 and autocast casts what it computes with, as in one process: a
MixedPrecisionPolicy would halve what is sent, but also run normalisations and losses in bfloat16,
and a run would give other figures than without.
"""

from __future__ import annotations

import contextlib
import os
import uuid
import warnings
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from dnkd_ext._files import sync
from dnkd_ext.train.world import World

__all__ = [
    "as_sharded",
    "blocks",
    "copy_whole",
    "gather_whole",
    "local",
    "read_shards",
    "shapes_of_shards",
    "shard_model",
    "shard_step",
    "write_shards",
]

# A block beyond this share of all parameters is looked into for smaller ones; one below the other
# is not worth a message of its own.
LARGEST, SMALLEST = 1 / 4, 1 / 512


def _count(module: nn.Module) -> int:
    """Of the module's parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


def blocks(model: nn.Module) -> list[nn.Module]:
    """The parts of a model that are gathered one after another, together the bulk of it.

    They are the members of its lists: of ModuleList, Sequential and ModuleDict, and of modules all
    of whose children are of one class (timm's stages of RegNet). A member that is a list itself, or
    large and holds lists of its own (a stage), stands for its members. Single layers are none, nor
    are lists, whose members may be called without them.
    """
    total = _count(model)

    def inside(module: nn.Module) -> list[nn.Module]:
        children = [child for child in module.children() if _count(child)]
        containers = (nn.ModuleList, nn.Sequential, nn.ModuleDict)
        is_list = isinstance(module, containers) or (
            len(children) > 1 and len({type(child) for child in children}) == 1
        )
        found: list[nn.Module] = []
        for child in children:
            is_block = is_list and not isinstance(child, containers) and any(child.children())
            smaller = [] if is_block and _count(child) <= LARGEST * total else inside(child)
            # Not for the sake of a small part, as a shortcut.
            if is_block and 2 * sum(map(_count, smaller)) < _count(child):
                smaller = [child] if _count(child) >= SMALLEST * total else []
            found += smaller
        return found

    return inside(model)


def _prepare(module: nn.Module) -> None:
    """Parameters as FSDP2 takes them: of one dimension at least, and contiguous."""
    for name, parameter in module.named_parameters():
        if parameter.dim() == 0:
            raise ValueError(
                f"--fsdp cannot shard {type(module).__name__}, whose parameter {name} is a scalar"
            )
        if not parameter.is_contiguous():
            parameter.data = parameter.data.contiguous()


def shard_model(
    model: nn.Module,
    mesh: DeviceMesh,
    *,
    methods: Sequence[str] = (),
    keep: bool = True,
    compile: bool = False,
) -> None:
    """Shard a model in place: its blocks, and the rest as one.

    Args:
        model: is run by its call, or by one of ``methods``.
        mesh: all processes.
        methods: names of methods that run it in place of its call, where it has them.
        keep: the rest stays gathered from a forward pass to the end of the backward pass (without
            one until something asks for the shards), so that its layers may be called by
            themselves behind one of ``methods``.
        compile: torch.compile of every block; FSDP's own work stays outside.
    """
    _prepare(model)
    parts = blocks(model)
    if compile:
        # Blocks of a class share the code, of which Dynamo keeps so many forms.
        dynamo = torch._dynamo.config
        dynamo.recompile_limit = max(dynamo.recompile_limit, 8 * len(parts))
    for block in parts:
        if compile:
            block.compile(dynamic=False)
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    fully_shard(model, mesh=mesh, reshard_after_forward=not keep)
    for method in methods:
        if hasattr(model, method):
            register_fsdp_forward_method(model, method)


def shard_step(
    step: nn.Module,
    model: nn.Module,
    mesh: DeviceMesh,
    *,
    methods: Sequence[str] = (),
    compile: bool = False,
) -> None:
    """Shard a step in place: its model, and every other child, which may be called alone, too."""
    shard_model(model, mesh, methods=methods, compile=compile)
    _prepare(step)
    for child in step.children():
        if child is not model and _count(child):
            fully_shard(child, mesh=mesh, reshard_after_forward=False)
    fully_shard(step, mesh=mesh, reshard_after_forward=False)


# -- tensors --------------------------------------------------------------------------------------


@torch.no_grad()
def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, in the same memory; of a plain one all of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def as_sharded(part: Tensor, like: Tensor) -> Tensor:
    """A part in the same memory, as belonging to a tensor that is sharded as ``like`` is."""
    if not isinstance(like, DTensor):
        return part
    return DTensor.from_local(
        part,
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )


@torch.no_grad()
def copy_whole(to: Tensor, whole: Tensor) -> None:
    """Copy a whole tensor, of which every process takes its part."""
    if isinstance(to, DTensor):
        whole = whole.to(to.device, to.dtype).contiguous()
        whole = distribute_tensor(whole, to.device_mesh, to.placements, src_data_rank=None)
    local(to).copy_(local(whole))


@torch.no_grad()
def gather_whole(tensors: dict[str, Tensor], world: World) -> dict[str, Tensor]:
    """Copies of whole tensors on the CPU of the first process, gathered one by one; collective."""
    result = {}
    for name, tensor in tensors.items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if world.is_first:
            result[name] = whole.cpu().clone(memory_format=torch.contiguous_format)
    return result


# -- files ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def _alone_without_a_warning() -> Iterator[None]:
    """One process may read and write shards, too, which DCP takes for an oversight."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _checksum(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while part := file.read(1 << 24):
            value = zlib.crc32(part, value)
    return value


def write_shards(out: Path, label: str, tensors: dict[str, Tensor], world: World) -> dict[str, Any]:
    """Write tensors to a new folder of safetensors, each process its shards; collective.

    Returns:
        What :func:`check_shards` wants: the ``folder``'s name, and size and checksum of its
        ``files``. Until it is kept, nothing knows of the folder.
    """
    name = world.from_first(f"checkpoint-{label}-{uuid.uuid4().hex[:8]}")
    folder = out / name
    try:
        writer = dcp.HuggingFaceStorageWriter(os.fspath(folder), save_distributed=True)
        with _alone_without_a_warning():
            dcp.save(tensors, storage_writer=writer)
    except CheckpointException as error:  # no Exception; the same on all processes
        raise OSError(f"the checkpoint {folder} cannot be written: {error}") from error
    world.wait()
    names = sorted(path.name for path in folder.iterdir())
    if any(seen != names for seen in world.gather(names)):
        raise ValueError(f"{out} must be a folder that all processes share")
    own = {
        name: ((folder / name).stat().st_size, _checksum(folder / name))
        for name in names[world.rank :: world.size]
    }
    files = {name: part for parts in world.gather(own) for name, part in parts.items()}
    with world.first_alone():
        if world.is_first:
            sync(folder)
    return {"folder": name, "files": files}


def check_shards(out: Path, shards: dict[str, Any], names: Iterable[str] | None = None) -> None:
    """Look for a folder's files, and read those that are named to see that they are as written.

    Raises:
        ValueError: a file is missing or damaged.
    """
    folder = out / shards["folder"]
    for name, (size, _) in shards["files"].items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != size:
            raise ValueError(f"{path} is missing or not whole")
    for name in names or ():
        if _checksum(folder / name) != shards["files"][name][1]:
            raise ValueError(f"{folder / name} is damaged")


def shapes_of_shards(folder: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Names, shapes and types of the whole tensors in a folder."""
    metadata = dcp.HuggingFaceStorageReader(os.fspath(folder)).read_metadata()
    return {
        name: (value.size, value.properties.dtype)
        for name, value in metadata.state_dict_metadata.items()
    }


def read_shards(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Fill tensors, sharded over any number of processes or not at all; collective.

    Raises:
        ValueError: the folder cannot be read.
    """
    try:
        with _alone_without_a_warning():
            dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(os.fspath(folder)))
    except CheckpointException as error:
        raise ValueError(f"{folder} cannot be read: {error}") from error
