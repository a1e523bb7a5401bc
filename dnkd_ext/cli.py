"""The command line: ``dnkd`` or ``python -m dnkd_ext``."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import select
import signal
import sys
import threading
from collections.abc import Sequence

__all__ = ["entry", "main"]


def _parser() -> argparse.ArgumentParser:
    from dnkd_ext import __version__

    parser = argparse.ArgumentParser(
        prog="dnkd",
        description="Feature-direction-and-norm distillation losses: information and training.",
    )
    parser.add_argument("--version", action="version", version=f"dnkd_ext {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    info = commands.add_parser(
        "info",
        help="what this installation consists of",
        description="Versions, the compiled kernels and what they were built for.",
    )
    info.add_argument(
        "--check",
        action="store_true",
        help="compare every loss with its PyTorch reference on this machine",
    )
    info.add_argument("--json", action="store_true", help="print JSON")

    demo = commands.add_parser(
        "demo",
        help="distil small students from a teacher on real images",
        description=(
            "Train a convolutional teacher, gather its class means, train small students over "
            "several seeds with CE, KD and KD++ (CE + KD + the ND loss), and write a table, plots "
            "and weights. The data are scikit-learn's handwritten digits, or an image folder."
        ),
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    demo.add_argument("--out", required=True, metavar="DIR", help="folder for the results")
    demo.add_argument(
        "--data", metavar="DIR", help="image folder: DIR/train/CLASS/*.png and DIR/test or DIR/val"
    )
    demo.add_argument(
        "--limit", type=int, metavar="N", help="use at most N training images of --data"
    )
    demo.add_argument("--seeds", type=int, default=5, metavar="N", help="students per method")
    demo.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to train")
    demo.add_argument("--teacher-epochs", type=int, default=30, metavar="N", help="teacher epochs")
    demo.add_argument("--epochs", type=int, default=20, metavar="N", help="student epochs")
    demo.add_argument(
        "--overwrite", action="store_true", help="replace the results of an earlier run in --out"
    )
    # Their options are those of dataclasses and are parsed elsewhere, --help among them.
    for name, help_text in TRAINING.items():
        commands.add_parser(name, help=help_text, add_help=False)
    return parser


TRAINING = {
    "train": "train a model, alone or from a teacher, by the paper's recipes or your own",
    "presets": "list the recipes",
    "class-means": "gather a teacher's class means",
    "eval": "evaluate trained weights",
    "plot": "draw the curves of runs",
}


def _info(arguments: argparse.Namespace) -> int:
    from dnkd_ext import build_info

    information = build_info()
    if arguments.json:
        print(json.dumps(information, indent=2))
    else:
        for key, value in information.items():
            print(f"{key:20} {', '.join(value) if isinstance(value, list) else value}")
    if not arguments.check:
        return 0
    from dnkd_ext.selfcheck import self_check

    # Beside JSON, standard output is for that alone.
    with contextlib.redirect_stdout(sys.stderr if arguments.json else sys.stdout):
        return 0 if self_check() else 1


def _demo(arguments: argparse.Namespace) -> int:
    try:
        from dnkd_ext.train.demo import DemoConfig, run_demo
    except ImportError as error:
        raise ModuleNotFoundError(
            f"the demo needs the training extras ({error}); install them with "
            "pip install 'dnkd_ext[train]'"
        ) from error
    options = {k: v for k, v in vars(arguments).items() if k != "command"}
    run_demo(DemoConfig(**options))
    return 0


# What the training extras install, by the names they are imported by.
EXTRAS = ("PIL", "matplotlib", "sklearn", "tensorboard", "tqdm", "tyro", "yaml")


def _training(name: str, options: Sequence[str]) -> int:
    try:
        from dnkd_ext.train.arguments import COMMANDS

        return COMMANDS[name](options)
    except ModuleNotFoundError as error:
        # One without a name says itself what is needed for what.
        if (error.name or "").partition(".")[0] not in EXTRAS:
            raise
        raise ModuleNotFoundError(
            f"dnkd {name} needs the training extras ({error}); install them with "
            "pip install 'dnkd_ext[train]'"
        ) from error


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; a wrong input is one line on standard error and exit status 2.

    So is the death of a process that reads images.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv and argv[0] in TRAINING:
        arguments = argparse.Namespace(command=argv[0])
    else:
        arguments = _parser().parse_args(argv)
    try:
        if arguments.command in TRAINING:
            status = _training(arguments.command, argv[1:])
        else:
            status = {"info": _info, "demo": _demo}[arguments.command](arguments)
        sys.stdout.flush()
        return status
    except BrokenPipeError as error:
        if _is_read():
            print(f"dnkd {arguments.command}: error: {error}", file=sys.stderr)
            return 2
        return 128 + signal.SIGPIPE
    except (ValueError, OSError, ModuleNotFoundError, FloatingPointError) as error:
        print(f"dnkd {arguments.command}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"dnkd {arguments.command}: interrupted", file=sys.stderr)
        return 130
    except RuntimeError as error:
        if type(error).__name__ == "OtherProcessFailed":
            return 2  # the process that failed has told why
        died = None
        if type(error).__name__ == "WorkerDied" or "DataLoader worker" in str(error):
            from dnkd_ext.train.data.workers import worker_death

            died = worker_death(error)
        if died is None and _lost_another(error):
            print(
                f"dnkd {arguments.command}: error: another process ended, and should have told "
                f"why ({str(error).strip().splitlines()[0]})",
                file=sys.stderr,
            )
            return 2
        if died is None:
            raise
        if threading.current_thread() is threading.main_thread():
            # torch's handler would raise for every other worker that died, too.
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        resumes = arguments.command in ("train", "class-means")
        more = "; --resume goes on where the run was last kept" if resumes else ""
        print(f"dnkd {arguments.command}: error: {died}{more}", file=sys.stderr)
        return 2


def _lost_another(error: RuntimeError) -> bool:
    """Whether gloo lost the connection to another process of torchrun, which has ended."""
    distributed = sys.modules.get("torch.distributed")
    return (
        distributed is not None
        and distributed.is_initialized()
        and "gloo" in str(error)
        and any(end in str(error) for end in ("closed by peer", "reset by peer"))
    )


def _is_read() -> bool:
    """Whether somebody reads standard output; if not, what is still to be written goes nowhere."""
    try:
        place = sys.stdout.fileno()
    except OSError:  # no file
        return True
    poll = select.poll()
    poll.register(place, 0)
    if not any(event & select.POLLERR for _, event in poll.poll(0)):
        return True
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, place)
    os.close(nowhere)
    return False


def entry() -> None:
    """Run one command of the command line, and end with its exit status."""
    status = main()
    distributed = sys.modules.get("torch.distributed")
    if status and distributed is not None and distributed.is_initialized():
        # After an error the process group stands, for others may wait in a collective call of it;
        # its threads would make an abort of the interpreter's end.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
