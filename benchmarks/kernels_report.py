"""Registers, spills and vector accesses of every CUDA kernel, per architecture.

Compiles each .cu file alone (they include no torch header) and reads what the compiler and the
disassembly say. Fails where a kernel spills, or where one that reads vectors has no 128-bit load.
Needs nvcc; no GPU. Says nothing about speed.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# Kernels that promise vector accesses: those templated on a vector width above 1, the first number
# among their arguments, and these, which choose it themselves.
ALWAYS_VECTORS = ("scale_kernel",)
# Kernels that only read rows: no vector stores are expected of them.
READ_ONLY = ("feature_diagnostics_kernel", "dist_loss_columns_kernel")


@dataclass
class Kernel:
    """What is known of one kernel on one architecture."""

    name: str
    registers: int = 0
    spilled: int = 0  # bytes stored
    stack: int = 0
    loads: int = 0  # 128-bit
    stores: int = 0
    is_empty: bool = False  # of clusters, on an architecture without them

    @property
    def promises_vectors(self) -> bool:
        """Whether 128-bit accesses must be found."""
        if self.is_empty:
            return False
        width = re.search(r", (\d+)(?:, \d+)*>", self.name)
        return self.name.startswith(ALWAYS_VECTORS) or (width is not None and int(width[1]) > 1)

    @property
    def complaint(self) -> str:
        """What is wrong with it; empty where nothing is."""
        if self.spilled:
            return f"spills {self.spilled} bytes"
        if self.promises_vectors and self.loads == 0:
            return "no 128-bit load"
        if self.promises_vectors and self.stores == 0 and not self.name.startswith(READ_ONLY):
            return "no 128-bit store"
        return ""


def _build_script():
    """setup.py knows where CUDA is and which architectures are built by default."""
    spec = importlib.util.spec_from_file_location("dnkd_ext_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def find_disassembler(cuda_home: str) -> str | None:
    """cuobjdump of the toolkit, on PATH, or the one that triton brings."""
    candidates = [shutil.which("cuobjdump"), f"{cuda_home}/bin/cuobjdump"]
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        candidates.append(str(Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump"))
    return next((c for c in candidates if c and Path(c).is_file()), None)


def _demangled(names: list[str]) -> dict[str, str]:
    if not names or shutil.which("c++filt") is None:
        return {name: name for name in names}
    done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True)
    result = {}
    for name, plain in zip(names, done.stdout.splitlines(), strict=True):
        short = re.sub(r"\(anonymous namespace\)::|dnkd::|^void ", "", plain)
        result[name] = short.split("(")[0].strip()
    return result


def report(source: Path, architecture: str, cuda_home: str, disassembler: str) -> list[Kernel]:
    """The kernels of one file compiled for one architecture ("90")."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernels.cubin"
        log = _run(
            f"{cuda_home}/bin/nvcc", "-O3", "-std=c++17", "-DDNKD_WITH_CUDA", f"-I{ROOT}/csrc",
            f"-arch=sm_{architecture}", "-Xptxas", "-v", "-cubin", "-o", str(cubin), str(source),
        )  # fmt: skip
        assembly = _run(disassembler, "-sass", str(cubin))
    kernels: dict[str, Kernel] = {}
    current = None
    for line in log.splitlines():
        if entry := re.search(r"Compiling entry function '(\S+)'", line):
            current = kernels[entry[1]] = Kernel(entry[1])
        elif current and (spill := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill", line)):
            current.stack, current.spilled = int(spill[1]), int(spill[2])
        elif current and (used := re.search(r"Used (\d+) registers", line)):
            current.registers = int(used[1])
    current = None
    for line in assembly.splitlines():
        if entry := re.search(r"Function : (\S+)", line):
            current = kernels[entry[1]]
        elif current is not None:
            current.loads += bool(re.search(r"\bLDG?\.E\.\S*128", line))
            current.stores += bool(re.search(r"\bSTG\.E\.\S*128", line))
    names = _demangled(list(kernels))
    for mangled, kernel in kernels.items():
        kernel.name = names[mangled]
        # logit_loss_forward_kernel<..., width, threads, blocks of a cluster, registers>
        blocks = re.match(r"logit_loss_forward_kernel<.*, (\d+), \d+>", kernel.name)
        has_clusters = int(architecture.rstrip("af")) >= 90
        kernel.is_empty = blocks is not None and int(blocks[1]) > 1 and not has_clusters
    if not kernels:
        raise SystemExit(
            f"{source} holds no kernel for sm_{architecture}; is nvcc -Xptxas -v silent?"
        )
    return sorted(kernels.values(), key=lambda kernel: kernel.name)


def main() -> int:
    """Print the table; 1 where a kernel breaks a promise."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--arch", help='architectures, as in TORCH_CUDA_ARCH_LIST ("8.0;9.0"), which is the default'
    )
    arguments = parser.parse_args()
    build = _build_script()
    home, _ = build.find_cuda_home(None)
    if home is None:
        raise SystemExit("kernels_report needs the CUDA toolkit's nvcc; set CUDA_HOME")
    disassembler = find_disassembler(home)
    if disassembler is None:
        raise SystemExit("kernels_report needs cuobjdump (of the CUDA toolkit or of triton)")
    listed = arguments.arch or build.cuda_architectures(home)
    architectures = re.findall(r"(\d+)\.(\d+[a-z]?)", listed)
    if not architectures:
        raise SystemExit(f"no architecture in {listed!r}; write them as 8.0;9.0")
    failures = promises = 0
    for major, minor in architectures:
        architecture = major + minor
        print(f"sm_{architecture}{'':58}registers  stack  spilled  128-bit loads  stores")
        for source in sorted(ROOT.glob("csrc/**/*.cu")):
            for kernel in report(source, architecture, home, disassembler):
                failures += bool(kernel.complaint)
                promises += kernel.promises_vectors
                print(
                    f"  {kernel.name:62}{kernel.registers:>9}{kernel.stack:>7}{kernel.spilled:>9}"
                    f"{kernel.loads:>15}{kernel.stores:>8}  {kernel.complaint}"
                )
    print(
        f"{failures} complaints"
        if failures
        else "no kernel spills, and every vector kernel has 128-bit accesses"
    )
    if not promises:
        raise SystemExit("no kernel was recognised as reading vectors; is c++filt installed?")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
