"""``python -m benchmarks``: measure, report, compare."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

# The profiler otherwise writes a line to standard error whenever it starts and stops.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

HELP = {
    "run": "measure the losses against their peers and check the targets",
    "e2e": "measure whole training steps",
    "training": "measure the training of presets, part by part",
    "loading": "measure how many images per second the loaders of training read from disk",
    "report": "write benchmarks/README.md and its plots from the results",
    "compare": "compare two results files",
    "regression": "compare a quick run with what was recorded on this processor",
    "targets": "evaluate the performance targets on a results file",
}

# Those that append what they measure to --out.
KEEPING = ("run", "e2e", "training", "loading")
# That measure the kernels.
MEASURING = ("run", "regression", "e2e", "training")
# The exit status of regression where nothing can be said.
NO_VERDICT = 3


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=(
            "Benchmarks of the losses: a ladder of peers over a registry of cases, training steps, "
            "reports and comparisons. Exit status: 0 done, 1 a peer was refused (run, regression), "
            "something got slower (regression) or a target failed (targets), 2 wrong usage, 3 no "
            "verdict, as nothing is recorded or the machine is busy (regression), 130 interrupted "
            "(what was measured is kept in --out). run prints the targets, but does not fail for "
            "them."
        ),
    )
    commands = result.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, add, call in (
        ("run", _add_run, _run),
        ("e2e", _add_e2e, _e2e),
        ("training", _add_training, _training),
        ("loading", _add_loading, _loading),
        ("report", _add_report, _report),
        ("compare", _add_compare, _compare),
        ("regression", _add_regression, _regression),
        ("targets", _add_targets, _targets),
    ):
        command = commands.add_parser(name, help=HELP[name], description=HELP[name] + ".")
        command.set_defaults(call=call)
        add(command)
    return result


def _add_device(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="where to measure (default cpu)"
    )


def _add_choice(command: argparse.ArgumentParser) -> None:
    """Device, cases and dtypes."""
    from benchmarks.run import DTYPE_NAMES

    _add_device(command)
    command.add_argument(
        "--case", action="append", default=[], metavar="PATTERN",
        help="part of a case's name, or a glob that matches it (repeatable)",
    )  # fmt: skip
    command.add_argument(
        "--dtype", action="append", metavar="DTYPE",
        help=f"{', '.join(DTYPE_NAMES)} (repeatable; default float32 and bfloat16)",
    )  # fmt: skip


def _add_out(command: argparse.ArgumentParser) -> None:
    command.add_argument("--out", type=Path, metavar="CSV", help="append the rows to this file")


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number of seconds above 0, got {text}")
    return value


def _busy(device: str) -> str | None:
    """What to tell of a CPU whose cores others use, too; None where these are free."""
    import torch

    from benchmarks import harness

    share = harness.cpu_share() if device == "cpu" else 1.0
    if share >= harness.LEAST_SHARE:
        return None
    return (
        f"the machine is busy: this process got {100 * share:.0f} % of the time of "
        f"{torch.get_num_threads()} cores; times, and ratios of them, are not what they would be"
    )


def _add_run(command: argparse.ArgumentParser) -> None:
    from benchmarks.peers import PEERS
    from benchmarks.run import QUICK_PEERS, QUICK_SECONDS, SECONDS

    _add_choice(command)
    command.add_argument(
        "--peers", action="append", metavar="PEERS",
        help=f"separated by commas (default all that can run here): {', '.join(PEERS)}",
    )  # fmt: skip
    command.add_argument(
        "--quick", action="store_true",
        help=f"only sizes within the caches, briefly, and the peers {', '.join(QUICK_PEERS)}",
    )  # fmt: skip
    _add_out(command)
    command.add_argument(
        "--seconds",
        type=_positive,
        help=f"about how long a peer is timed per case (default {SECONDS}, quick {QUICK_SECONDS})",
    )
    command.add_argument(
        "--resume", action="store_true",
        help="leave out the cases that --out has already of this commit on this machine, with all "
        "peers asked for",
    )  # fmt: skip


def _run(arguments: argparse.Namespace) -> int:
    from benchmarks import results, run, targets

    if arguments.resume and arguments.out is None:
        raise ValueError("--resume needs --out, the file to go on with")
    names = [name.strip() for group in arguments.peers or () for name in group.split(",")]
    if arguments.out is not None and names and "ours" not in names:
        raise ValueError(
            f"--out keeps what ours is measured beside: --peers {','.join(names)} lacks ours"
        )
    if arguments.quick and not names:
        names = list(run.QUICK_PEERS)
    only = run.choose_peers(names, arguments.device)
    order = run.plan(
        arguments.device, patterns=arguments.case, dtypes=arguments.dtype, quick=arguments.quick
    )
    results.LOSSES.require_addable(arguments.out)
    if arguments.resume:
        order = run.remaining(order, arguments.out, arguments.device, only)
    outcome = run.Outcome()
    seconds = arguments.seconds or (run.QUICK_SECONDS if arguments.quick else run.SECONDS)
    try:
        run.run(order, out=arguments.out, only=only, seconds=seconds, outcome=outcome)
    finally:
        if outcome.rows:
            print(results.header(outcome.rows))
            print(results.table(outcome.rows))
            machines = results.latest(results.measurements(outcome.rows))
            if arguments.resume:  # with what the file had of this version on this machine
                known = results.latest(results.measurements(results.read(arguments.out)))
                machines = {machine: results.newest(known[machine]) for machine in machines}
            for found in machines.values():
                print(*targets.lines(targets.evaluate(found, arguments.device)), sep="\n")
        elif arguments.resume:
            print("nothing was measured" if order else "nothing left to measure")
        for text in outcome.refused:
            print(f"refused: {text}", file=sys.stderr)
    return 1 if outcome.refused else 0


def _add_report(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--out", type=Path, metavar="DIR", help="folder for README.md (default benchmarks)"
    )
    command.add_argument(
        "--add", type=Path, metavar="DIR",
        help="first add the losses.csv, steps.csv, training.csv and loading.csv of this folder (of "
        "gpu-check) to the results, those that it has",
    )  # fmt: skip
    command.add_argument("--no-plots", action="store_true", help="the text alone")


def _report(arguments: argparse.Namespace) -> int:
    from benchmarks import disk, parts, plots, report, results, steps

    folder = arguments.out or Path(__file__).parent
    if arguments.add is not None:
        sources = {
            arguments.add / file.path.name: file
            for file in (results.LOSSES, steps.STEPS, parts.TRAINING, disk.LOADING)
        }
        present = {source: file for source, file in sources.items() if source.exists()}
        if not present:
            raise results.ResultsError(
                f"{arguments.add} has none of {', '.join(source.name for source in sources)}"
            )
        for source, file in present.items():  # all of them, or nothing is added
            file.read(source)
            file.require_addable(file.path)
        for source, file in present.items():
            print(f"added {file.add_file(source)} rows of {source}")
    rows, walked = results.read(results.LOSSES.path), steps.STEPS.recorded()
    trained, loaded = parts.TRAINING.recorded(), disk.LOADING.recorded()
    text = report.render(rows, walked, trained, loaded)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "README.md").write_text(text, encoding="utf-8")
    written = [folder / "README.md"]
    if not arguments.no_plots:
        written += plots.plot(rows, folder, trained)
    print(*(f"wrote {path}" for path in written), sep="\n")
    return 0


def _add_compare(command: argparse.ArgumentParser) -> None:
    command.add_argument("before", type=Path, metavar="A", help="the earlier results file")
    command.add_argument("after", type=Path, metavar="B", help="the later one")


def _compare(arguments: argparse.Namespace) -> int:
    from benchmarks import compare, results

    measured = [
        results.measurements(results.read(path)) for path in (arguments.before, arguments.after)
    ]
    before, after = (results.latest(found) for found in measured)
    compared = False
    for machine, found in after.items():
        # From run to run within either file; between them is what is asked.
        between = [
            compare.between_runs(one for one in group if one.machine == machine)
            for group in measured
        ]
        noise = max(compare.LEAST_NOISE, *between)
        pairs = {
            other: compare.compare(earlier, found, noise)
            for other, earlier in before.items()
            if other[1] == machine[1]
        }
        if pairs.get(machine):  # then others tell nothing more
            pairs = {machine: pairs[machine]}
        for other, changes in pairs.items():
            if changes:
                compared = True
                print(f"{other[0]}, torch {other[2]} -> {machine[0]}, torch {machine[2]}")
                if other != machine:
                    print(
                        "another machine, instruction set or version of torch: times do not "
                        "compare, ratios may"
                    )
                kernels = [
                    sorted({str(one.common["kernels"]) for one in group.values()})
                    for group in (before[other], found)
                ]
                if kernels[0] != kernels[1]:
                    print(" -> ".join(f"{', '.join(group)} kernels" for group in kernels))
                print(compare.table(changes))
                print(
                    "ratio: of times, relative to eager's of the same run where both have it; "
                    "verdict -: eager and the copy, by which the machine differed, and other "
                    "machines, versions of torch or kernels"
                )
    if not compared:
        raise results.ResultsError(
            f"{arguments.before} and {arguments.after} have no case of the same device in common"
        )
    return 0


def _add_regression(command: argparse.ArgumentParser) -> None:
    from benchmarks.run import QUICK_SECONDS

    _add_choice(command)
    command.add_argument(
        "--against", type=Path, metavar="CSV",
        help="the recorded results (default benchmarks/results/losses.csv)",
    )  # fmt: skip
    command.add_argument(
        "--seconds", type=_positive, help=f"per peer and case (default {QUICK_SECONDS})"
    )


def _regression(arguments: argparse.Namespace) -> int:
    from benchmarks import compare, results, run

    path = arguments.against or results.LOSSES.path
    order = run.plan(arguments.device, patterns=arguments.case, dtypes=arguments.dtype, quick=True)
    here = results.environment(arguments.device)
    machine = results.machine_of(here, arguments.device)
    # Of other kernels nothing follows.
    measured = [
        one
        for one in results.measurements(results.read(path))
        if one.common["kernels"] == here["kernels"] or one.machine != machine
    ]
    recorded = results.latest(measured)
    names = {(case.name, results.allocator_of(arguments.device)) for case, _ in order}
    before = {key: one for key, one in recorded.get(machine, {}).items() if key in names}
    if not before:
        known = "\n  ".join(", ".join(one) for one in recorded) or "nothing"
        print(
            f"nothing is recorded of {', '.join(machine)} with {here['kernels']} kernels in {path} "
            f"for these cases; record with python -m benchmarks run --out {path}. There is\n  "
            f"{known}"
        )
        return NO_VERDICT
    of_machine = compare.between_runs(one for one in measured if one.machine == machine)
    noise = max(compare.LEAST_NOISE, of_machine)
    refused: list[str] = []

    def measure(names: set[str]) -> results.Latest:
        outcome = run.run(
            [(case, warm) for case, warm in order if case.name in names],
            only=run.QUICK_PEERS,
            seconds=arguments.seconds or run.QUICK_SECONDS,
        )
        refused.extend(text for text in outcome.refused if text not in refused)
        return results.latest(results.measurements(outcome.rows)).get(machine, {})

    busy = _busy(arguments.device)
    changes = compare.confirmed_regressions(before, measure, noise)
    busy = busy or _busy(arguments.device)
    slower = [change for change in changes if change.verdict == "slower"]
    commits = sorted({str(one.common["commit"]) for one in before.values()})
    print(f"ours relative to eager, recorded at {', '.join(commits)}, now at {here['commit']}")
    print(compare.table(changes, "of eager"))
    for text in refused:
        print(f"refused: {text}", file=sys.stderr)
    if changes or not refused:
        print(
            f"{len(slower) or 'none'} of {len(changes)} got slower by more than the noise, "
            f"at least {100 * noise:.0f} %"
            + (" as between recorded runs of this machine" if noise == of_machine else "")
        )
    if busy is not None and not refused:
        print(f"no verdict: {busy}", file=sys.stderr)
        return NO_VERDICT
    return 1 if slower or refused else 0


def _add_targets(command: argparse.ArgumentParser) -> None:
    command.add_argument("csv", type=Path, metavar="CSV", help="the results file of a ladder")
    command.add_argument("--steps", type=Path, metavar="CSV", help="that of the training steps")


def _targets(arguments: argparse.Namespace) -> int:
    from benchmarks import results, steps, targets

    rows = results.read(arguments.csv)
    first = targets.first_measured([*rows, *results.LOSSES.recorded()])
    ladders = results.latest(results.measurements(rows))
    walked: dict[results.Machine, list[results.Row]] = {}
    for row in steps.read_steps(arguments.steps) if arguments.steps else []:
        machine = results.machine_of(row, str(row["device"]))
        if machine[1] == "cuda":  # the targets of steps are those of a GPU
            walked.setdefault(machine, []).append(row)
    failed = False
    for machine in {**ladders, **walked}:
        hardware, device, torch = machine
        # Of one version, as in the report: figures of an older one say nothing about it.
        found, *older = results.versions(ladders.get(machine, {})) or [{}]
        groups = steps.latest_steps(walked.get(machine, []))
        commons = [one.common for one in found.values()] or groups[-1]
        commit = commons[-1]["commit"]
        print(f"{hardware}, torch {torch}, at {commit}, {commons[-1]['kernels']} kernels")
        verdicts = targets.evaluate(found, device, first) if found else []
        missed = targets.missed_before(verdicts, older, device)
        if device == "cuda":
            others = {str(group[0]["commit"]): None for group in groups} if found else {}
            for other in others:
                if other != commit:
                    print(f"steps at {other}")
            verdicts += targets.evaluate_steps([row for group in groups for row in group])
        failed = failed or any(verdict.status == targets.FAIL for verdict in verdicts)
        failed = failed or bool(missed)
        print(*missed, *targets.lines(verdicts), sep="\n")
    if not ladders and not walked:
        raise results.ResultsError(f"{arguments.csv} has nothing that was measured")
    return 1 if failed else 0


def _add_e2e(command: argparse.ArgumentParser) -> None:
    _add_device(command)
    command.add_argument(
        "--shape", action="append", choices=("cifar", "imagenet", "detection"),
        help="which networks (repeatable; default cifar and imagenet)",
    )  # fmt: skip
    command.add_argument(
        "--rounds", type=int, metavar="N", help="steps per method (default 7 on a CPU, 20 on a GPU)"
    )
    _add_out(command)
    command.add_argument(
        "--resume", action="store_true",
        help="leave out the shapes that --out has already of this commit on this machine",
    )  # fmt: skip


def _e2e(arguments: argparse.Namespace) -> int:
    from benchmarks import e2e

    if arguments.resume and arguments.out is None:
        raise ValueError("--resume needs --out, the file to go on with")
    return e2e.run(
        arguments.device,
        arguments.shape or ("cifar", "imagenet"),
        rounds=arguments.rounds,
        out=arguments.out,
        resume=arguments.resume,
    )


def _add_training(command: argparse.ArgumentParser) -> None:
    _add_device(command)
    command.add_argument(
        "--preset", action="append", metavar="PATTERN",
        help="name of a preset, or a pattern of several, as 'cifar100/resnet56-resnet20/{kd,kd++}' "
        "(repeatable; default that pair's ce, kd and kd++, and resnet32x4-resnet8x4/kd++)",
    )  # fmt: skip
    command.add_argument(
        "--data", metavar="DIR",
        help="folder of a data set, as dnkd train reads it (default synthetic images)",
    )  # fmt: skip
    command.add_argument(
        "--limit", type=int, metavar="IMAGES", help="training images (default 50,000, or all)"
    )
    command.add_argument(
        "--eval-images", type=int, metavar="IMAGES",
        help="for evaluation and class means (default 1,000 on a CPU, 10,000 on a GPU)",
    )  # fmt: skip
    command.add_argument(
        "--rounds", type=int, metavar="N",
        help="blocks of steps: 7 of one step on a CPU, 20 of 50 on a GPU by default",
    )  # fmt: skip
    command.add_argument(
        "--batch-size", type=int, metavar="IMAGES", help="per step (default the preset's)"
    )
    # What dnkd train takes; without them its own defaults.
    command.add_argument(
        "--precision",
        choices=("auto", "float32", "bfloat16"),
        help="of the step (default auto, as dnkd train)",
    )
    for name, text in (
        ("channels-last", "memory format of images and weights (default)"),
        ("compile", "torch.compile of teacher, student and loss"),
        ("cuda-graph", "record the step and replay it"),
    ):
        command.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, help=text)
    command.add_argument(
        "--teacher-outputs", action="store_true",
        help="measure presets that distil logits once more, with the teacher's outputs looked up "
        "(random numbers, as many as its outputs for all images)",
    )  # fmt: skip
    _add_out(command)
    command.add_argument(
        "--resume", action="store_true",
        help="leave out what --out has already of this commit on this machine",
    )  # fmt: skip


def _training(arguments: argparse.Namespace) -> int:
    from benchmarks import training

    if arguments.resume and arguments.out is None:
        raise ValueError("--resume needs --out, the file to go on with")
    names = ("precision", "channels_last", "compile", "cuda_graph", "batch_size")
    return training.run(
        arguments.device,
        arguments.preset or training.PRESETS,
        settings={name: getattr(arguments, name) for name in names},
        looks_up=arguments.teacher_outputs,
        data=arguments.data,
        limit=arguments.limit,
        rounds=arguments.rounds,
        eval_images=arguments.eval_images,
        out=arguments.out,
        resume=arguments.resume,
    )


def _add_loading(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--preset", action="append", metavar="NAME",
        help="whose augmentation (repeatable; default a ResNet's and DeiT's)",
    )  # fmt: skip
    command.add_argument(
        "--storage", action="append", choices=("folders", "tar", "wds"),
        help="kind of storage (repeatable; default all)",
    )  # fmt: skip
    command.add_argument(
        "--data", metavar="DIR", help="a data set of one's own (default pieces of photographs)"
    )
    command.add_argument(
        "--images", type=int, default=512, metavar="N", help="to make (default %(default)s)"
    )
    command.add_argument(
        "--batch-size", type=int, default=64, metavar="N", help="default %(default)s"
    )
    command.add_argument(
        "--workers", type=int, nargs="+", default=[0, 2], metavar="N", help="default 0 and 2"
    )
    command.add_argument(
        "--rounds", type=int, default=3, metavar="N", help="epochs timed (default %(default)s)"
    )
    _add_out(command)


def _loading(arguments: argparse.Namespace) -> int:
    from benchmarks import loading

    return loading.run(
        presets=arguments.preset or loading.PRESETS,
        storage=arguments.storage or loading.STORAGE,
        data=arguments.data,
        images=arguments.images,
        batch=arguments.batch_size,
        workers=arguments.workers,
        rounds=arguments.rounds,
        out=arguments.out,
    )


def _of_the_machine(error: RuntimeError) -> str | None:
    """A line for what the machine lacks: memory, a compiler, a process; None for other errors."""
    import torch

    from benchmarks.e2e import NOT_COMPILED

    kind = type(error)
    if (
        isinstance(error, torch.OutOfMemoryError)
        or "DefaultCPUAllocator" in str(error)
        or kind.__name__ in NOT_COMPILED
    ):
        return f"{kind.__name__}: {next(iter(str(error).strip().splitlines()), '')}"
    if "DataLoader worker" in str(error) or kind.__name__ == "WorkerDied":
        from dnkd_ext.train.data.workers import worker_death

        died = worker_death(error)
        return None if died is None else str(died)
    return None


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; a wrong input is one line on standard error and exit status 2."""
    arguments = parser().parse_args(argv)
    from benchmarks import run
    from benchmarks.results import ResultsError
    from benchmarks.run import NoDevice

    this = os.getpid()

    def stop(*_: object) -> None:
        if os.getpid() != this:  # a forked worker
            os._exit(128 + signal.SIGTERM)
        raise KeyboardInterrupt

    # As Ctrl-C: what was measured is kept, what was made for it removed.
    before = signal.signal(signal.SIGTERM, stop)
    try:
        if arguments.command in MEASURING:
            run.require_device(arguments.device)
            run.require_library(arguments.device)
        if arguments.command in MEASURING and arguments.command != "regression":
            busy = _busy(arguments.device)
            if busy is not None:
                print(f"benchmarks {arguments.command}: warning: {busy}", file=sys.stderr)
        return arguments.call(arguments)
    except (
        ResultsError,
        NoDevice,
        ValueError,
        OSError,
        ModuleNotFoundError,
        FloatingPointError,
    ) as error:
        print(f"benchmarks {arguments.command}: error: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        known = _of_the_machine(error)
        if known is None:
            raise
        print(f"benchmarks {arguments.command}: error: {known}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        keeps = arguments.command in KEEPING and arguments.out is not None
        kept = "; what was measured is kept" if keeps else ""
        print(f"benchmarks {arguments.command}: interrupted{kept}", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


if __name__ == "__main__":
    sys.exit(main())
