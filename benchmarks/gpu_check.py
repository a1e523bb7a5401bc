"""Build, tests, compute-sanitizer and benchmarks on this machine's GPU, results in one folder.

Each stage is bounded in time and writes its own file, so that an interruption keeps the others.
Needs no network; uses the Python it runs in.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("build", "kernels", "tests", "sanitize", "bench")
LIMITS = {"build": 560, "kernels": 300, "tests": 560, "sanitize": 560, "bench": 560}
SANITIZERS = ("memcheck", "racecheck", "initcheck")


def commands(stage: str, out: Path) -> list[list[str]]:
    """What a stage runs."""
    python = sys.executable
    if stage == "build":
        return [[python, "setup.py", "build_ext", "--inplace"]]
    if stage == "kernels":
        return [[python, "-m", "benchmarks.kernels_report"]]
    if stage == "tests":
        return [
            [python, "-m", "dnkd_ext", "info", "--check"],
            [python, "-m", "pytest", "tests", "-q", "-p", "no:cacheprovider"],
        ]
    if stage == "sanitize":
        tool = shutil.which("compute-sanitizer")
        if tool is None:
            raise SystemExit("compute-sanitizer is not on PATH")
        # The self-check reaches every kernel: each dtype, a warp and a block per row, both widths.
        return [
            [
                tool,
                "--tool",
                name,
                "--error-exitcode",
                "9",
                python,
                "-m",
                "dnkd_ext",
                "info",
                "--check",
            ]
            for name in SANITIZERS
        ]
    return [
        [
            python, "-m", "pytest", "benchmarks", "--benchmark-only", "-q",
            "-p", "no:cacheprovider", "--device", "cuda", "--csv", str(out / "losses.csv"),
        ]
    ]  # fmt: skip


def run_stage(stage: str, out: Path) -> bool:
    """Run a stage's commands into its log; True where all passed in time."""
    log = out / f"{stage}.log"
    deadline = time.monotonic() + LIMITS[stage]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "DNKD_CUDA": "1"}
    passed = True
    with log.open("w") as file:
        for command in commands(stage, out):
            file.write(f"$ {' '.join(command)}\n")
            file.flush()
            try:
                done = subprocess.run(
                    command,
                    cwd=ROOT,
                    env=environment,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    timeout=max(1, deadline - time.monotonic()),
                )
                passed = passed and done.returncode == 0
                file.write(f"exit status {done.returncode}\n")
            except subprocess.TimeoutExpired:
                passed = False
                file.write(f"stopped: the stage's {LIMITS[stage]} s were over\n")
    return passed


def main() -> int:
    """Run the stages; 1 where one failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", required=True, type=Path, help="folder for logs and results")
    parser.add_argument(
        "--stage", choices=STAGES, action="append", help="only this stage (repeatable)"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the commands, run nothing")
    arguments = parser.parse_args()
    stages = arguments.stage or STAGES
    if arguments.dry_run:
        for stage in stages:
            for command in commands(stage, arguments.out):
                print(f"{stage}: {' '.join(command)}")
        return 0
    import torch

    if not torch.cuda.is_available():
        print("gpu-check needs a GPU: torch.cuda.is_available() is False", file=sys.stderr)
        return 2
    major, minor = torch.cuda.get_device_capability()
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", f"{major}.{minor}")
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    summary = [
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}, "
        f"built for {os.environ['TORCH_CUDA_ARCH_LIST']}"
    ]
    failed = False
    for stage in stages:
        begin = time.monotonic()
        passed = run_stage(stage, out)
        failed = failed or not passed
        word, seconds = "PASS" if passed else "FAIL", time.monotonic() - begin
        summary.append(f"{word} {stage} ({seconds:.0f} s), see {stage}.log")
        print(summary[-1], flush=True)
        lines = (out / f"{stage}.log").read_text().splitlines()
        print("\n".join(f"    {line}" for line in lines[-(40 if stage == "bench" else 8) :]))
        (out / "summary.txt").write_text("\n".join(summary) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
