"""Result rows: measured, appended to a CSV file, read again, printed as a table."""

from __future__ import annotations

import csv
import dataclasses
import datetime
import functools
import io
import math
import os
import platform
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch

import dnkd_ext
from benchmarks.cases import CACHE, Case, all_cases
from benchmarks.harness import Probe, capturable, copy_of, measure, probe, warm_allocator
from benchmarks.sources import commit

RESULTS = Path(__file__).parent / "results"
FIELDS = (
    "date", "commit", "hardware", "threads", "torch", "cuda", "version", "kernels", "case", "peer",
    "allocator", "median_us", "low_us", "high_us", "blocks", "bytes", "copy_us", "pass", "host_us",
    "device_us", "launches", "syncs", "graph", "peak_bytes", "device_kernels",
)  # fmt: skip
NUMBERS = {
    "threads", "median_us", "low_us", "high_us", "blocks", "bytes", "copy_us", "host_us",
    "device_us", "launches", "syncs", "peak_bytes",
}  # fmt: skip
# The numbers of any results file that may be negative.
SIGNED = {"unexplained_ms"}
BOTH, FORWARD = "forward+backward", "forward"
# Peers whose forward pass is timed alone, too.
FORWARD_PEERS = ("ours", "eager", "compile")
# For how long at most.
FORWARD_SECONDS = 0.12
# On a CPU far beyond its caches, and with a warm allocator, only these: what others add to a call
# is nothing there, and the forward pass of ours is all of it.
ESSENTIAL_PEERS = ("ours", "noise", "float32", "loop", "eager", "compile")

Row = dict[str, object]
# Processor, device and torch.
Machine = tuple[str, str, str]


class ResultsError(ValueError):
    """A results file that cannot be read or added to."""


# -- where and what -------------------------------------------------------------------------------


def hardware(device: str) -> str:
    """The processor or GPU by name."""
    if device != "cpu":
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                break
    except OSError:
        pass
    return f"{name}, {torch.get_num_threads()} threads"


# Of the instruction sets that kernels are compiled for, what tells processors apart that call
# themselves alike, as in virtual machines. With and without an instruction that rounds to bfloat16
# they count as one: figures are recorded of versions that did not have it.
_INSTRUCTIONS = {"avx2": ", AVX2", "avx512": ", AVX-512", "avx512_bf16": ", AVX-512"}


def processor(row: Row) -> str:
    """The hardware of a row, with the width of its vectors where the CPU's kernels ran."""
    return f"{row['hardware']}{_INSTRUCTIONS.get(str(row['kernels']), '')}"


def machine_of(row: Row, device: str) -> Machine:
    """Processor, device and torch: what is only compared with itself."""
    return processor(row), device, str(row["torch"])


def allocator_of(device: str, *, warm: bool = False) -> str:
    """The column of that name; a GPU's caching allocator counts as warm."""
    return "warm" if warm or device != "cpu" else "default"


@functools.cache
def environment(device: str) -> Row:
    """The columns that tell hardware, versions and commit; asked once per process."""
    info = dnkd_ext.build_info()
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "commit": commit(),
        "hardware": hardware(device),
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "cuda": (torch.version.cuda or "") if device != "cpu" else "",
        "version": dnkd_ext.__version__,
        "kernels": info["cpu_isa"] if device == "cpu" else f"CUDA {info['cuda']}",
    }


# -- measuring ------------------------------------------------------------------------------------


def measure_case(
    case: Case, *, warm: bool, seconds: float = 1.0, only: Collection[str] | None = None
) -> tuple[list[Row], dict[str, str]]:
    """The rows of one case, all from the same run, and why peers were refused, by name.

    Two passes are timed: forward and backward of every peer and of the copy, and the forward pass
    alone of some. Everything else is counted apart from the timing.
    """
    only = _limited(case, warm, only)
    with warm_allocator(warm) as is_warm:
        peers = case.peers(only=only)
        calls = {"copy": copy_of(case.bytes, case.device), **peers.calls()}
        wide, refused = _in_float32(case, only)
        calls.update(wide)
        rows = []
        for name, timing in measure(calls, case.device, seconds=seconds).items():
            rows.append(_row(name, BOTH, timing))
        copy_us = rows[0]["median_us"]
        for row in rows:
            row.update(bytes=case.bytes, copy_us=copy_us)
        brief = min(seconds / 2, FORWARD_SECONDS)
        forward = {} if _is_brief(case, warm) else peers.forward_calls(FORWARD_PEERS)
        for name, timing in measure(forward, case.device, seconds=brief).items():
            rows.append(_row(name, FORWARD, timing))
        if not warm:
            for row in rows:
                if row["peer"] in peers.functions and row["peer"] != "noise":
                    row.update(_counted(case, peers, row))
    common = {
        **environment(case.device),
        "case": case.name,
        "allocator": allocator_of(case.device, warm=is_warm),
    }
    for row in rows:
        row.update(common)
        if case.device == "cpu":  # where a call returns when its work is done
            row.update(host_us="")
    return rows, {**peers.refused, **refused}


def _is_brief(case: Case, warm: bool) -> bool:
    return case.device == "cpu" and (warm or case.bytes > CACHE)


def _limited(case: Case, warm: bool, only: Collection[str] | None) -> Collection[str] | None:
    """Of the peers asked for those that are measured where little is."""
    if not _is_brief(case, warm):
        return only
    return {*ESSENTIAL_PEERS} if only is None else {*only} & {*ESSENTIAL_PEERS}


def peers_of(case: Case, *, warm: bool, only: Collection[str] | None = None) -> set[str]:
    """The peers of which :func:`measure_case` has rows where none is refused."""
    only = _limited(case, warm, only)
    names = {"copy", *case.peer_names(only)}
    return names | ({"float32"} if _has_float32(case, only) else set())


def _has_float32(case: Case, only: Collection[str] | None) -> bool:
    return case.dtype.itemsize == 2 and (only is None or "float32" in only)


def _in_float32(
    case: Case, only: Collection[str] | None
) -> tuple[dict[str, Callable[[], None]], dict[str, str]]:
    """The peer of that name, for a case of 16 bits, if asked for; and why it was refused."""
    if not _has_float32(case, only):
        return {}, {}
    wide = dataclasses.replace(case, dtype=torch.float32).peers(only=("ours",))
    if "ours" in wide.refused:
        return {}, {"float32": wide.refused["ours"]}
    return {"float32": wide.calls()["ours"]}, {}


def _row(peer: str, which: str, timing) -> Row:
    return {
        **dict.fromkeys(FIELDS, ""),
        "peer": peer,
        "pass": which,
        "median_us": round(timing.median * 1e6, 2),
        "low_us": round(timing.low * 1e6, 2),
        "high_us": round(timing.high * 1e6, 2),
        "host_us": round(timing.host * 1e6, 2),
        "blocks": timing.blocks,
    }


def _counted(case: Case, peers, row: Row) -> Row:
    run = peers.probe_call(row["peer"], backward=row["pass"] == BOTH)
    run()
    counted: Probe = probe(run, case.device)
    columns: Row = {} if counted.peak_bytes is None else {"peak_bytes": counted.peak_bytes}
    if case.device != "cpu":
        columns.update(
            launches=counted.launches,
            syncs=counted.syncs,
            device_us=round((counted.device or 0.0) * 1e6, 2),
            device_kernels=";".join(
                f"{name}:{seconds * 1e6:.2f}" for name, seconds in counted.kernels.items()
            ),
        )
        if row["peer"] == "ours" and row["pass"] == BOTH:
            columns["graph"] = "yes" if capturable(run) else "no"
    return columns


# -- the file -------------------------------------------------------------------------------------


def _is_new(path: Path) -> bool:
    """Whether nothing is there yet: no file, or an empty one, as mktemp makes it.

    Raises:
        ResultsError: it is neither, as a device, which may be read without end.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        raise ResultsError(f"{path} is no regular file")
    return not path.exists() or (path.is_file() and path.stat().st_size == 0)


@dataclass(frozen=True)
class ResultsFile:
    """A kind of CSV file of results.

    Attributes:
        path: where the recorded results are; others of the kind are anywhere.
        fields: the columns, in order.
        numbers: those that hold numbers, or nothing.
    """

    path: Path
    fields: tuple[str, ...]
    numbers: Collection[str]

    def append(self, rows: Sequence[Row], path: Path) -> None:
        """Add rows to a file, which gets a header when it is new.

        One write of whole lines, so that an interruption leaves all of them or none.

        Raises:
            ResultsError: the file has other columns, or does not end with a whole line.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        text = io.StringIO()
        writer = csv.DictWriter(text, self.fields, lineterminator="\n")
        if _is_new(path):
            writer.writeheader()
        else:
            self._require_fields(path)
        writer.writerows(rows)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            before, wanted = os.fstat(descriptor).st_size, text.getvalue().encode()
            written = os.write(descriptor, wanted)
            if written != len(wanted):  # as on a full disk
                os.ftruncate(descriptor, before)
                raise ResultsError(
                    f"{path}: only {written} of {len(wanted)} bytes could be written"
                )
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def require_addable(self, path: Path | None) -> None:
        """See before anything is measured that its rows can be added to a file, which may be new.

        Raises:
            ResultsError: the file is another one, or damaged.
            OSError: it cannot be written.
        """
        if path is None:
            return
        if not _is_new(path):
            self.read(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644))
        except FileExistsError:  # as a link to nothing does, too
            path.open("ab").close()
        else:
            path.unlink()  # until there is something to write

    def add_file(self, source: Path) -> int:
        """Append the rows of another file that the recorded ones do not have yet; how many.

        Raises:
            ResultsError: one of the files is another one, or damaged.
        """

        def lines(file: Path) -> list[dict[str, str]]:
            self.read(file)  # what is damaged must not be added
            with file.open(newline="", encoding="utf-8") as opened:
                return list(csv.DictReader(opened))

        known = set() if _is_new(self.path) else {tuple(row.values()) for row in lines(self.path)}
        fresh = [row for row in lines(source) if tuple(row.values()) not in known]
        if fresh:
            self.append([dict(row) for row in fresh], self.path)
        return len(fresh)

    def _require_fields(self, path: Path) -> None:
        if path.exists() and _is_new(path):
            raise ResultsError(f"{path} is empty")
        try:
            with path.open(newline="", encoding="utf-8") as file:
                found = next(csv.reader(file), [])
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise ResultsError(f"{path} cannot be read: {error}") from error
        if found != list(self.fields):
            missing = [name for name in self.fields if name not in found]
            others = [name for name in found if name not in self.fields]
            raise ResultsError(
                f"{path} has other columns: missing {missing}, unknown {others}"
                + ("" if missing or others else ", in another order")
            )
        with path.open("rb") as file:
            # There is the header at least.
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":  # what stops within a cell would be another number
                raise ResultsError(f"{path} does not end with a whole line")

    def read(self, path: Path) -> list[Row]:
        """The rows of a file; numbers are floats, and None where a cell is empty.

        Raises:
            ResultsError: the file cannot be read, or a line is not what it should be.
        """
        self._require_fields(path)
        rows: list[Row] = []
        with path.open(newline="", encoding="utf-8") as file:
            lines = csv.DictReader(file)
            while True:
                number = len(rows) + 2
                try:
                    line = next(lines, None)
                except csv.Error as error:
                    raise ResultsError(f"{path}, line {number}: {error}") from None
                if line is None:
                    break
                if None in line or None in line.values():
                    raise ResultsError(f"{path}, line {number}: not {len(self.fields)} cells")
                row: Row = dict(line)
                for name in self.numbers:
                    cell = line[name]
                    try:
                        row[name] = float(cell) if cell else None
                        least = -math.inf if name in SIGNED else 0
                        if cell and not (math.isfinite(float(cell)) and float(cell) >= least):
                            raise ValueError(cell)
                    except ValueError:
                        raise ResultsError(f"{path}, line {number}: {name} is {cell!r}") from None
                rows.append(row)
        return rows

    def recorded(self) -> list[Row]:
        """The recorded rows; none where the file is not there."""
        return self.read(self.path) if self.path.exists() else []

    def measured_here(self, path: Path, device: str) -> list[Row]:
        """The rows that a file, which may be new, has of this commit on this machine."""
        if _is_new(path):
            return []
        same = ("commit", "hardware", "torch", "version", "kernels")
        here = {name: environment(device)[name] for name in same}
        if "device" in self.fields:  # those of the losses have it in the case's name
            here["device"] = device
        return [
            row
            for row in self.read(path)
            if all(row[name] == value for name, value in here.items())
        ]


LOSSES = ResultsFile(RESULTS / "losses.csv", FIELDS, NUMBERS)
append, read = LOSSES.append, LOSSES.read


# -- what was measured together -------------------------------------------------------------------


@dataclass
class Measurement:
    """The rows of one case that were measured together, by pass and peer."""

    common: Row
    rows: dict[tuple[str, str], Row] = field(default_factory=dict)

    @property
    def case(self) -> str:
        return str(self.common["case"])

    @property
    def allocator(self) -> str:
        return str(self.common["allocator"])

    @property
    def machine(self) -> Machine:
        """Processor, device and torch: what is only compared with itself."""
        return machine_of(self.common, self.case.rsplit(" ", 1)[-1])

    @property
    def source(self) -> tuple[str, str]:
        """Commit and kernels: what figures that are judged together must have in common."""
        return str(self.common["commit"]), str(self.common["kernels"])

    def value(self, column: str, peer: str = "ours", which: str = BOTH) -> float | None:
        """A number of a peer's row; None where it was not measured."""
        number = self.rows.get((which, peer), {}).get(column)
        return None if number in (None, "") else float(str(number))

    def us(self, peer: str = "ours", which: str = BOTH) -> float | None:
        """A peer's median."""
        return self.value("median_us", peer, which)

    def ratio(self, peer: str, to: str = "ours", which: str = BOTH) -> float | None:
        """How many times as long a peer takes as another one."""
        first, second = self.us(peer, which), self.us(to, which)
        return first / second if first is not None and second else None

    def noise(self, peers: Iterable[str] = ("ours",), which: str = BOTH) -> float:
        """Relative: half the way between the quantiles of these peers, and ours timed twice."""
        parts = []
        for peer in peers:
            low, high = self.value("low_us", peer, which), self.value("high_us", peer, which)
            middle = self.us(peer, which)
            if low is not None and high is not None and middle:
                parts.append((high - low) / 2 / middle)
        again = self.ratio("noise", which=which)
        if again is not None:
            parts.append(abs(again - 1))
        return math.hypot(*parts) if parts else 0.0


def measurements(rows: Iterable[Row]) -> list[Measurement]:
    """Rows that follow one another and belong to one case, together."""
    same = ("date", "commit", "hardware", "torch", "version", "kernels", "case", "allocator")
    found: list[Measurement] = []
    for row in rows:
        key = str(row["pass"]), str(row["peer"])
        if (
            not found
            or any(found[-1].common[name] != row[name] for name in same)
            or key in found[-1].rows
        ):
            found.append(Measurement({name: row[name] for name in FIELDS if name in row}))
        found[-1].rows[key] = row
    return found


Latest = dict[tuple[str, str], Measurement]


def of_now(rows: Iterable[Row]) -> list[Row]:
    """The rows that were measured with the sources and the torch that are here."""
    here = {"commit": commit(), "torch": str(torch.__version__)}
    return [row for row in rows if all(row[name] == value for name, value in here.items())]


def latest(found: Iterable[Measurement]) -> dict[Machine, Latest]:
    """Per machine the last measurement of every case and allocator, the newest at the end."""
    result: dict[Machine, Latest] = {}
    for one in found:
        known = result.setdefault(one.machine, {})
        known.pop((one.case, one.allocator), None)
        known[one.case, one.allocator] = one
    return result


_Key = TypeVar("_Key")


def latest_settings(
    rows: Iterable[Row], machine: Callable[[Row], _Key], setting: Sequence[str]
) -> dict[_Key, list[Row]]:
    """Per machine, the last measured first, the last row of all that agree in these columns."""
    machines: dict[_Key, dict[tuple[str, ...], Row]] = {}
    for row in rows:
        found = machines.pop(machine(row), {})
        found[tuple(str(row[name]) for name in setting)] = row
        machines[machine(row)] = found
    return {one: list(machines[one].values()) for one in reversed(machines)}


def versions(found: Latest) -> list[Latest]:
    """A machine's measurements apart by version, that which was measured last in front."""
    order = list(dict.fromkeys(one.source for one in reversed(found.values())))
    return [{key: one for key, one in found.items() if one.source == source} for source in order]


def newest(found: Latest) -> Latest:
    """Of a machine's measurements those of the version that was measured last."""
    return versions(found)[0] if found else {}


def known_machines(rows: Iterable[Row]) -> dict[Machine, Latest]:
    """What is known of every machine, the last measured first; cases that no longer exist not."""
    known = all_cases()
    found = [one for one in measurements(rows) if one.case in known]
    order: dict[Machine, int] = {one.machine: number for number, one in enumerate(found)}
    by_machine = latest(found)
    return {m: by_machine[m] for m in sorted(by_machine, key=lambda m: -order[m])}


def ordered(found: Latest, allocator: str) -> list[tuple[Case, Measurement]]:
    """What was measured with an allocator, in the order of the cases."""
    return [
        (case, found[name, allocator])
        for name, case in all_cases().items()
        if (name, allocator) in found
    ]


def header(rows: Sequence[Row]) -> str:
    """Hardware, versions and commit of a run in a line."""
    first = rows[0]
    return (
        f"{first['hardware']}; torch {first['torch']}; dnkd_ext {first['version']} at "
        f"{first['commit']}, {first['kernels']} kernels"
    )


# -- the table ------------------------------------------------------------------------------------


def table(rows: Iterable[Row]) -> str:
    """Microseconds per forward and backward, and the ratios to ours."""
    lines = [
        f"{'forward + backward, us (median)':58}{'ours':>9}{'loop':>9}{'eager':>10}{'compile':>10}"
        f"{'copy':>9}  {'ours is faster than':>32}  {'time':>6} {'again':>6}",
        f"{'':58}{'':9}{'':9}{'':10}{'':10}{'':9}  {'loop':>10}{'eager':>11}{'compile':>11}"
        f"  {'/copy':>6} {'/ours':>6}",
    ]
    for one in measurements(rows):

        def cell(peer, one=one):
            us = one.us(peer)
            return "-" if us is None else f"{us:.0f}"

        def ratio(peer, one=one, to="ours", unit="x"):
            value = one.ratio(peer, to)
            return "-" if value is None else f"{value:.{1 if unit else 2}f}{unit}"

        lines.append(
            f"{one.case + ', ' + one.allocator + ' allocator':58}{cell('ours'):>9}"
            f"{cell('loop'):>9}{cell('eager'):>10}{cell('compile'):>10}{cell('copy'):>9}  "
            f"{ratio('loop'):>10}{ratio('eager'):>11}{ratio('compile'):>11}  "
            f"{ratio('ours', to='copy', unit=''):>6} {ratio('noise', unit=''):>6}"
        )
    lines.append(
        "copy: as many bytes as ours must move (features or logits of both, the gradient, each "
        "class mean once), half read and half written, in the same run. again: ours once more."
    )
    return "\n".join(lines)
