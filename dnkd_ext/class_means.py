"""Class means of the teacher's features: the streaming accumulator and its files."""

from __future__ import annotations

import hashlib
import json
import numbers
import operator
import os
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dnkd_ext._checks import (
    require_floating,
    require_integer,
    require_same_device,
    require_tensor,
    rows_not_finite,
    shown,
)
from dnkd_ext._files import replacing
from dnkd_ext._modes import evaluating

__all__ = ["ClassMeans"]

LARGEST = torch.finfo(torch.float32).max

FORMAT = "dnkd_ext.class_means"
FORMAT_VERSION = "1"
OWN_METADATA = (
    "format",
    "format_version",
    "num_classes",
    "num_features",
    "ignore_index",
    "sha256",
)


class ClassMeans:
    """Streaming mean feature of every class, over all samples or as a moving average.

    Sums are kept in float64 on one device and nothing is read back until a result is asked for, so
    an update on a GPU costs no synchronisation. The sums are reproducible from run to run on the
    CPU, and on CUDA under ``torch.use_deterministic_algorithms(True)``.

    With ``momentum`` the table is an exponential moving average, gathered from the running teacher
    where a pass over the data of its own would cost too much. For every class ``k`` in a batch, and
    the mean ``b_k`` of its samples there,

        c_k <- b_k                                   the first time, so that nothing is biased to 0
        c_k <- momentum * c_k + (1 - momentum) * b_k after that

    and the other classes stay as they are. The batch is what ``update`` is given: of this process,
    or with ``process_group=`` of all its processes together. Use it before the loss, so that every
    class of the batch has a mean::

        means.update(teacher_features, target, process_group=group)
        criterion.class_means.copy_(means.compute())

    Args:
        num_classes: ``C``, at least 1.
        num_features: ``D``, at least 1.
        momentum: share of the old mean, between 0 and 1, both excluded; None for the mean over all
            samples.
        ignore_index: rows with this class index are skipped.
        device: where the sums live; by default that of the first features seen.

    Raises:
        ValueError: a size below 1, or a momentum that is no number between 0 and 1.
        TypeError: an ``ignore_index`` that is no integer.

    Example:
        >>> means = ClassMeans(num_classes=10, num_features=64)
        >>> means.update(torch.randn(32, 64), torch.randint(10, (32,)))
        >>> means.compute().shape
        torch.Size([10, 64])
    """

    def __init__(
        self,
        num_classes: int,
        num_features: int,
        *,
        momentum: float | None = None,
        ignore_index: int = -100,
        device: torch.device | str | None = None,
    ) -> None:
        self.num_classes = _positive("num_classes", num_classes)
        self.num_features = _positive("num_features", num_features)
        self.momentum = _momentum(momentum)
        require_integer(ignore_index, "ignore_index")
        self.ignore_index = int(ignore_index)
        self.metadata: dict[str, str] = {}
        self._device = None if device is None else torch.device(device)
        # Sums (C + 1, D) float64 and counts (C + 1,) int64: what this process saw since the last
        # merge, and what all processes together saw before it. Row C collects the rows whose target
        # names no class, apart from the rest. With a momentum the first holds averages instead of
        # sums, and nothing is ever merged.
        self._local: tuple[Tensor, Tensor] | None = None
        self._merged: tuple[Tensor, Tensor] | None = None
        # Whether what was seen is where it stays; a file or a state waits for the first features.
        self._placed = False
        # A table of unknown counts, as the authors' files are.
        self._table: Tensor | None = None

    # -- accumulation --------------------------------------------------------------------------

    @torch.no_grad()
    def update(self, features: Tensor, target: Tensor, *, process_group: Any = None) -> None:
        """Add a batch, or with a momentum move the means of its classes.

        Args:
            features: ``(..., D)``, float16, bfloat16, float32 or float64. One that is NaN or
                infinite makes its class's mean so, for good: nothing is looked at here, which
                would wait for a GPU; :meth:`save` and the criteria refuse such means.
            target: ``(...)`` class indices in int64 or int32 on the same device. An index outside
                ``[0, C)`` other than ``ignore_index`` raises IndexError on the CPU, before anything
                is added; on other devices, and in code that ``torch.compile`` has traced, it is
                counted in :attr:`out_of_range` and left out.
            process_group: with a momentum, processes of ``torch.distributed`` whose batches count
                as one: their sums are added in one all-reduce of ``(C + 1) (D + 1)`` float64 and
                every process moves its table by the whole batch, so that tables which were equal
                stay equal. A collective call, also for a process without rows. None: this
                process's batch alone. Without a momentum use :meth:`all_reduce` once, at the end.

        Raises:
            TypeError, ValueError, RuntimeError: dtype, shape or device of an argument.
            ValueError: this object is a table of unknown counts (:meth:`from_json`), or a process
                group without a momentum.
        """
        if self._table is not None:
            raise ValueError(
                "this ClassMeans is a table loaded without sample counts; it cannot be updated"
            )
        if process_group is not None and self.momentum is None:
            raise ValueError(
                "process_group is for class means with a momentum; without one update them alone "
                "and call all_reduce() at the end"
            )
        require_floating(features, "features")
        require_tensor(target, "target")
        if features.dim() < 1 or features.shape[-1] != self.num_features:
            raise ValueError(
                f"features must be (..., {self.num_features}), got shape {list(features.shape)}"
            )
        if target.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"target must be int64 or int32 class indices, got {target.dtype}")
        if target.shape != features.shape[:-1]:
            raise ValueError(
                f"target must have the leading shape of features {list(features.shape)}, "
                f"got shape {list(target.shape)}"
            )
        require_same_device(target, "target", features, "features")
        features = features.reshape(-1, self.num_features)
        target = target.reshape(-1).long()
        counted = target != self.ignore_index
        bad = counted & ((target < 0) | (target >= self.num_classes))
        # Traced code, which has no values to look at, leaves them out, too.
        looks = features.device.type == "cpu" and not torch.compiler.is_compiling()
        if looks and bool(bad.any()):
            position = int(bad.nonzero()[0])
            raise IndexError(
                f"target[{position}] = {int(target[position])} is out of range for "
                f"{self.num_classes} classes"
            )
        table, counts = self._local_sums(features.device)
        # Ignored and nameless rows go to the spare row; the count tells the latter alone.
        row = torch.where(counted & ~bad, target, self.num_classes)
        ones = torch.where(counted, 1, 0)
        if self.momentum is None:
            table.index_add_(0, row, features.to(torch.float64))
            counts.index_add_(0, row, ones)
            return
        # Sums and, in the last column, counts, so that one exchange has both; float64 holds any
        # count exactly.
        batch = table.new_zeros(self.num_classes + 1, self.num_features + 1)
        batch[:, :-1].index_add_(0, row, features.to(torch.float64))
        batch[:, -1].index_add_(0, row, ones.to(torch.float64))
        if process_group is not None:
            torch.distributed.all_reduce(batch, group=process_group)
        number = batch[:, -1:]
        mean = batch[:, :-1].div_(number.clamp_min(1))
        share = 1 - self.momentum * (counts.unsqueeze(-1) > 0).to(torch.float64)
        # In place, without C x D temporaries and for whoever recorded this step.
        table.lerp_(mean, share * (number > 0))
        counts += number.squeeze(-1).to(torch.int64)

    def _zeros(self, device: torch.device) -> tuple[Tensor, Tensor]:
        # Not inference tensors, which could never be updated outside torch.inference_mode().
        with torch.inference_mode(False):
            return (
                torch.zeros(
                    self.num_classes + 1, self.num_features, dtype=torch.float64, device=device
                ),
                torch.zeros(self.num_classes + 1, dtype=torch.int64, device=device),
            )

    def _local_sums(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if not self._placed:
            home = self._device or device
            local = self._local or self._zeros(home)
            self._local = local[0].to(home), local[1].to(home)
            if self._merged is not None:
                self._merged = self._merged[0].to(home), self._merged[1].to(home)
            self._placed = True
        assert self._local is not None
        if self._local[0].device != device:
            raise RuntimeError(
                f"features is on {device} but these class means are kept on {self._local[0].device}"
            )
        return self._local

    def tensors(self) -> tuple[Tensor, Tensor]:
        """What :meth:`update` changes in place, to be kept as a module's buffers.

        Sums, or with a momentum averages, ``(C + 1, D)`` float64 and counts ``(C + 1,)`` int64; the
        last row is of targets that name no class. They are on ``device``, or else on the CPU.
        """
        return self._local_sums(self._device or torch.device("cpu"))

    def _totals(self) -> tuple[Tensor, Tensor]:
        """Sums and counts of everything, merged parts included; may share memory with them."""
        parts = [part for part in (self._local, self._merged) if part is not None]
        if not parts:
            return self._zeros(self._device or torch.device("cpu"))
        if len(parts) == 1:
            return parts[0]
        return parts[0][0] + parts[1][0], parts[0][1] + parts[1][1]

    def all_reduce(self, group: Any = None) -> ClassMeans:
        """Merge over the processes of ``torch.distributed``.

        Every rank gets a new object that holds what all ranks saw; this one is unchanged. Updates
        of the merged object, and merging it again, count every sample once. Without an initialised
        process group the result is a copy.

        Args:
            group: the process group; None for the default one.

        Raises:
            ValueError: this object is a table of unknown counts, or a moving average: those of
                several processes have no exact average, see ``process_group`` of :meth:`update`.
        """
        if self._table is not None:
            raise ValueError("a table loaded without sample counts cannot be merged")
        if self.momentum is not None:
            raise ValueError(
                "class means with a momentum cannot be merged; pass process_group= to update() so "
                "that all processes hold the same table"
            )
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if self._local is not None:
            sums, counts = (t.clone() for t in self._local)
        else:
            device = self._device
            if device is None and self._merged is not None:
                device = self._merged[0].device
            sums, counts = self._zeros(device or torch.device("cpu"))
        # By device; get_backend() does not tell where a group was begun without one.
        backends = torch.distributed.get_backend_config(group) if distributed else ""
        if _reduces_on_gpu(backends, self._device) and not sums.is_cuda:
            device = torch.device("cuda", torch.cuda.current_device())
            sums, counts = sums.to(device), counts.to(device)
        if distributed:
            torch.distributed.all_reduce(sums, group=group)
            torch.distributed.all_reduce(counts, group=group)
        if self._merged is not None:
            sums = sums + self._merged[0].to(sums.device)
            counts = counts + self._merged[1].to(counts.device)
        result = ClassMeans(
            self.num_classes,
            self.num_features,
            ignore_index=self.ignore_index,
            device=self._device,
        )
        result.metadata = dict(self.metadata)
        result._merged = (sums, counts)
        return result

    # -- results -------------------------------------------------------------------------------

    def compute(self) -> Tensor:
        """The mean feature of every class, ``(C, D)`` float32; zeros where there are no samples."""
        if self._table is not None:
            return self._table.clone()
        sums, counts = (total[:-1] for total in self._totals())
        if self.momentum is not None:
            return sums.to(torch.float32)
        return (sums / counts.clamp_min(1).unsqueeze(-1)).to(torch.float32)

    @property
    def counts(self) -> Tensor | None:
        """Samples of every class, ``(C,)`` int64; None where a loaded table does not tell."""
        return None if self._table is not None else self._totals()[1][:-1].clone()

    @property
    def missing(self) -> list[int]:
        """Classes without samples (for a table without counts: those whose row is zero).

        Reading it on a GPU synchronises.
        """
        empty = (
            (self._table == 0).all(dim=1)
            if self._table is not None
            else self._totals()[1][:-1] == 0
        )
        return empty.nonzero().flatten().tolist()

    @property
    def out_of_range(self) -> int:
        """Rows left out because their target named no class (CUDA; the CPU raises instead)."""
        return 0 if self._table is not None else int(self._totals()[1][-1])

    def __repr__(self) -> str:
        sizes = f"num_classes={self.num_classes}, num_features={self.num_features}"
        momentum = "" if self.momentum is None else f", momentum={self.momentum}"
        return f"ClassMeans({sizes}{momentum})"

    # -- checkpoints ---------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on exactly here, for a checkpoint of this process.

        Tensors (copies, on their device), numbers and texts, so that
        ``torch.load(weights_only=True)`` reads it. What this process saw since the last merge stays
        apart from what was merged; with a momentum and ``process_group=`` the states of all
        processes are equal. :meth:`save` writes a file of the result instead.
        """
        state: dict[str, Any] = {
            "num_classes": self.num_classes,
            "num_features": self.num_features,
            "momentum": self.momentum,
            "ignore_index": self.ignore_index,
            "metadata": dict(self.metadata),
        }
        for name, part in (("local", self._local), ("merged", self._merged)):
            if part is not None:
                state[f"{name}_sums"], state[f"{name}_counts"] = part[0].clone(), part[1].clone()
        if self._table is not None:
            state["table"] = self._table.clone()
        return state

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was called; what was seen so far is forgotten.

        The device stays that of this object; where it is not decided yet, the next features do.

        Raises:
            ValueError: a state of other sizes, another momentum or ``ignore_index``, or no state of
                class means; nothing has changed then.
        """
        if not isinstance(state, dict):
            raise ValueError(f"state must be a dict of state_dict(), got {type(state).__name__}")
        for name in ("num_classes", "num_features", "momentum", "ignore_index"):
            if name not in state:
                raise ValueError(f"state is none of ClassMeans.state_dict(): it lacks {name}")
            if state[name] != getattr(self, name):
                raise ValueError(
                    f"state has {name} {state[name]}, but these class means have "
                    f"{getattr(self, name)}"
                )
        shapes = {
            "sums": ((self.num_classes + 1, self.num_features), torch.float64),
            "counts": ((self.num_classes + 1,), torch.int64),
        }
        given: dict[str, tuple[Tensor, Tensor] | None] = {}
        for name in ("local", "merged"):
            parts = []
            for kind, (shape, dtype) in shapes.items():
                tensor = state.get(f"{name}_{kind}")
                if tensor is not None:
                    _require_table(tensor, f"{name}_{kind}", shape, dtype)
                    parts.append(tensor)
            if len(parts) == 1:
                raise ValueError(f"state has one of {name}_sums and {name}_counts, not the other")
            given[name] = (parts[0], parts[1]) if parts else None
        table = state.get("table")
        if table is not None:
            _require_table(table, "table", (self.num_classes, self.num_features), torch.float32)
        metadata = dict(state.get("metadata", {}))
        home = self._local[0].device if self._placed and self._local else self._device

        def own(part: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor] | None:
            if part is None:
                return None
            with torch.inference_mode(False):
                return part[0].to(home, copy=True), part[1].to(home, copy=True)

        if self._placed and self._local:
            # In place, for whoever recorded an update.
            for mine, other in zip(self._local, given["local"] or (0, 0), strict=True):
                mine.copy_(other) if isinstance(other, Tensor) else mine.zero_()
        else:
            self._local = own(given["local"])
        self._merged = own(given["merged"])
        self._table = None if table is None else table.clone()
        self.metadata = metadata

    # -- from a model --------------------------------------------------------------------------

    @classmethod
    def from_model(
        cls,
        model: torch.nn.Module,
        loader: Iterable[tuple[Tensor, Tensor]],
        *,
        num_classes: int | None = None,
        classifier: str | torch.nn.Module | None = None,
        device: torch.device | str | None = None,
        ignore_index: int = -100,
        progress: bool = True,
        metadata: dict[str, str] | None = None,
    ) -> ClassMeans:
        """Gather the class means of a trained model over a loader, in evaluation mode.

        Args:
            model: any classifier; :func:`dnkd_ext.features` tells how its features are
                found. The training mode of each of its modules is restored afterwards: one that
                goes on as a teacher must be put into evaluation mode by its owner.
            loader: yields ``(images, target)``, the images a tensor or, for models that take
                keyword arguments, a mapping of inputs; for the paper's method the training set
                without augmentation. Of batches that are mappings with the target in them make
                pairs, ``(({"pixel_values": b["pixel_values"]}, b["labels"]) for b in loader)``.
            num_classes: ``C``; by default the width of the model's logits.
            classifier: the last linear layer or its name, where it cannot be found.
            device: where to move the batches; by default where the model's parameters are.
            ignore_index: samples with this class index count in no mean.
            progress: show a progress bar (needs tqdm; without it there is none).
            metadata: kept with the result and written by :meth:`save` ("teacher", "dataset").

        Raises:
            TypeError: the loader yields something else than pairs of tensors.
            ValueError: the loader yields nothing, or the classifier cannot be found.
            FloatingPointError: features are NaN, infinite, or too large for float32.
        """
        from dnkd_ext.adapters import extract_features, kind_of
        from dnkd_ext.progress import progress_bar

        if device is None:
            device = next((p.device for p in model.parameters()), torch.device("cpu"))
        means: ClassMeans | None = None
        # Not inference_mode: a model that FSDP shards keeps what it gathers for training, too.
        with evaluating(model), torch.no_grad():
            for batch in progress_bar(loader, "class means", enabled=progress):
                images, target = _pair(batch)
                features, logits = extract_features(
                    model, _moved(images, device), classifier=classifier
                )
                if means is None:
                    classes = logits.shape[-1] if num_classes is None else num_classes
                    means = cls(classes, features.shape[-1], ignore_index=ignore_index)
                means.update(features, target.to(device, non_blocking=True))
        if means is None:
            raise ValueError("loader yielded no batch; class means need at least one sample")
        wrong = rows_not_finite(means.compute())
        if wrong:
            raise FloatingPointError(
                f"the model's features are not finite, in the classes {shown(wrong)}"
            )
        if means.out_of_range:
            warnings.warn(
                f"{means.out_of_range} samples have a target outside the {means.num_classes} "
                "classes and are not part of the class means",
                UserWarning,
                stacklevel=2,
            )
        means.metadata = {"teacher": kind_of(model).__name__, **(metadata or {})}
        return means

    # -- files ---------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the means, counts and metadata as safetensors.

        The file appears whole or not at all: an existing one is replaced only by a complete one.

        Raises:
            OSError: the folder does not exist or cannot be written, or the path is a folder's.
            ValueError: :attr:`metadata` uses a name that the file format does, or means are not
                finite, because features were not.
        """
        from safetensors.torch import save as to_bytes

        tensors = {"class_means": self.compute().cpu().contiguous()}
        wrong = rows_not_finite(tensors["class_means"])
        if wrong:
            raise ValueError(f"the class means are not finite in the classes {shown(wrong)}")
        if self._table is None:
            sums, counts = (total[:-1] for total in self._totals())
            tensors["sums" if self.momentum is None else "averages"] = sums.cpu().contiguous()
            tensors["counts"] = counts.cpu().contiguous()
        own = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "num_classes": str(self.num_classes),
            "num_features": str(self.num_features),
            "ignore_index": str(self.ignore_index),
            "sha256": _digest(tensors),
        }
        if self.momentum is not None:
            own["momentum"] = repr(self.momentum)
        taken = sorted(set(own) & set(self.metadata))
        if taken:
            raise ValueError(f"metadata must not use the names {taken}; the file format does")
        metadata = {**{key: str(value) for key, value in self.metadata.items()}, **own}
        with replacing(Path(path)) as temporary:
            temporary.write_bytes(to_bytes(tensors, metadata=metadata))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ClassMeans:
        """Read a file written by :meth:`save`; its means, counts and metadata are those saved.

        What the file holds counts as merged: where several ranks continue from it, each must load
        the same file, and :meth:`all_reduce` then adds only what they saw since. A moving average
        comes back with its momentum and goes on.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is no safetensors file, is damaged, or holds no class means, or
                such as are not finite.
        """
        from safetensors import SafetensorError, safe_open

        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no class-means file at {path}")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = dict(file.metadata() or {})
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is not a whole safetensors file: {error}") from error
        if metadata.get("format") != FORMAT:
            raise ValueError(
                f"{path} holds no class means: its metadata says format "
                f"{metadata.get('format')!r}, expected {FORMAT!r}"
            )
        if metadata.get("format_version") != FORMAT_VERSION:
            raise ValueError(
                f"{path} is of class-means format version {metadata.get('format_version')!r}; "
                f"this version of dnkd_ext reads {FORMAT_VERSION!r}"
            )
        table = tensors.get("class_means")
        if table is None or table.dim() != 2 or table.dtype != torch.float32 or 0 in table.shape:
            raise ValueError(f"{path}: 'class_means' is not a (C, D) float32 table")
        if not table.isfinite().all():
            raise ValueError(f"{path} holds class means that are not finite")
        checksum, ignored = metadata.get("sha256"), metadata.get("ignore_index", "-100")
        if checksum is not None and checksum != _digest(tensors):
            raise ValueError(f"{path} is damaged: its contents do not match their checksum")
        if not ignored.removeprefix("-").isdecimal():
            raise ValueError(f"{path}: ignore_index {ignored!r} is no integer")
        kind, momentum = "sums", None
        if "averages" in tensors:
            kind, text = "averages", metadata.pop("momentum", "nothing")
            try:
                momentum = _momentum(float(text))
            except ValueError as error:
                raise ValueError(f"{path}: momentum {text!r} is not between 0 and 1") from error
        result = cls(*table.shape, momentum=momentum, ignore_index=int(ignored))
        result.metadata = {k: v for k, v in metadata.items() if k not in OWN_METADATA}
        if "counts" not in tensors and kind not in tensors:
            result._table = table
            return result
        sums, counts = tensors.get(kind), tensors.get("counts")
        if sums is None or sums.shape != table.shape or sums.dtype != torch.float64:
            raise ValueError(f"{path}: '{kind}' is not a {list(table.shape)} float64 table")
        if counts is None or counts.shape != table.shape[:1] or counts.dtype != torch.int64:
            raise ValueError(f"{path}: 'counts' is not a ({table.shape[0]},) int64 vector")
        # With an empty row for targets without a class.
        held = (
            torch.cat([sums, sums.new_zeros(1, sums.shape[1])]),
            torch.cat([counts, counts.new_zeros(1)]),
        )
        if momentum is None:
            result._merged = held
        else:
            result._local = held
        return result

    @classmethod
    def from_json(cls, path: str | os.PathLike[str]) -> ClassMeans:
        """Read the paper authors' ``center_emb_train.json``: ``{"0": [..D floats..], "1": ...}``.

        The sample counts are unknown, so :attr:`counts` is None and the table cannot be updated.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is no such table; names the file and what is wrong with it.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no class-means file at {path}")
        try:
            content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unique)
        except _RepeatedKeyError as error:
            raise ValueError(f"{path} holds the key {error} twice") from error
        except (ValueError, RecursionError) as error:  # not text, not JSON, or absurdly deep
            raise ValueError(f"{path} is not a whole JSON file: {error}") from error
        if not isinstance(content, dict) or not content:
            raise ValueError(
                f"{path} must hold an object of class index to feature list, "
                f"got {'an empty object' if content == {} else type(content).__name__}"
            )
        expected = [str(k) for k in range(len(content))]
        absent = [key for key in expected if key not in content]
        if absent:
            foreign = sorted(set(content) - set(expected))
            raise ValueError(
                f"{path} must have the class keys '0' to '{len(content) - 1}'; "
                f"missing {absent[:5]}, unexpected {foreign[:5]}"
            )
        width = len(content["0"]) if isinstance(content["0"], list) else 0
        if width == 0:
            raise ValueError(f"{path}: class '0' is not a list of numbers")
        for key in expected:
            row = content[key]
            if not isinstance(row, list) or len(row) != width:
                got = f"{len(row)} values" if isinstance(row, list) else type(row).__name__
                raise ValueError(f"{path}: class {key!r} has {got}, class '0' has {width} values")
            for value in row:
                if isinstance(value, bool) or not isinstance(value, (int, float)):
                    raise ValueError(f"{path}: class {key!r} holds {value!r}, which is no number")
                if not abs(value) <= LARGEST:  # NaN is not
                    raise ValueError(
                        f"{path}: class {key!r} holds {str(value)[:24]}, which is not finite in "
                        "float32"
                    )
        result = cls(len(content), width)
        result._table = torch.tensor([content[key] for key in expected], dtype=torch.float32)
        result.metadata = {"source": path.name}
        return result


class _RepeatedKeyError(ValueError):
    pass


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _RepeatedKeyError(next(key for key in keys if keys.count(key) > 1))
    return result


def _reduces_on_gpu(backends: str, device: torch.device | None) -> bool:
    """Whether all ranks merge on a GPU, those without features and those with them on the CPU, too.

    NCCL wants it. Where there is gloo as well, a device that was chosen stands; without one the
    ranks could not tell where the others' features are.
    """
    return "nccl" in backends and (device is None or "gloo" not in backends)


def _positive(name: str, value: Any) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = 0
    if isinstance(value, bool) or number < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
    return number


def _momentum(value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0 < value < 1:
        raise ValueError(
            f"momentum must be None or a number between 0 and 1, both excluded, got {value!r}"
        )
    return float(value)


def _require_table(value: Any, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if not isinstance(value, Tensor) or tuple(value.shape) != shape or value.dtype != dtype:
        got = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise ValueError(f"state's {name} must be {dtype} {list(shape)}, got {got}")


def _digest(tensors: dict[str, Tensor]) -> str:
    """SHA-256 over names, shapes and bytes."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def _moved(images: Any, device: torch.device | str) -> Any:
    """What can move itself, or the parts of a mapping that can."""
    if hasattr(images, "to"):
        return images.to(device, non_blocking=True)
    if isinstance(images, Mapping):
        return {name: _moved(part, device) for name, part in images.items()}
    if isinstance(images, (list, tuple)):
        return [_moved(part, device) for part in images]
    return images


def _pair(batch: Any) -> tuple[Tensor | Mapping[str, Tensor], Tensor]:
    """Images and target of a loader's batch."""
    if (
        not isinstance(batch, (tuple, list))
        or len(batch) != 2
        or not (isinstance(batch[0], Mapping) or callable(getattr(batch[0], "to", None)))
        or not callable(getattr(batch[1], "to", None))
    ):
        kinds = type(batch).__name__
        if isinstance(batch, (tuple, list)):
            kinds += f" of {', '.join(type(part).__name__ for part in batch) or 'nothing'}"
        elif isinstance(batch, Mapping):
            kinds += f" of {', '.join(map(str, batch)) or 'nothing'}"
        raise TypeError(
            f"loader must yield pairs (images, target) of tensors, or of a mapping of inputs and a "
            f"tensor, got a {kinds}"
        )
    return batch[0], batch[1]
