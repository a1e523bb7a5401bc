"""Builds the compiled kernels of dnkd_ext and prints every decision it takes.

Environment variables:
  DNKD_CUDA             auto (default): CUDA kernels where a CUDA build of torch and a matching
                        nvcc are found; 0: never; 1: always, and a missing piece is an error.
  CUDA_HOME             the CUDA toolkit; otherwise it is looked for.
  TORCH_CUDA_ARCH_LIST  CUDA architectures, as torch reads it ("8.0;9.0+PTX").
  MAX_JOBS              how many files to compile at once (with ninja).
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent
DEFAULT_CUDA_HOME = "/usr/local/cuda"
# Every architecture a data centre or a desk may hold; those that nvcc does not know are dropped.
DEFAULT_ARCHITECTURES = ("7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0")


def say(message: str) -> None:
    print(f"dnkd_ext: {message}", file=sys.stderr, flush=True)


def output_of(*command: str) -> str:
    """What the command printed, or nothing where it cannot be run."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout + done.stderr


def import_torch():
    try:
        import torch
    except ImportError as error:
        raise SystemExit(
            "dnkd_ext: setup.py cannot import torch, against which the extension is compiled.\n"
            "Install torch 2.11 or newer first, then build in the same environment:\n"
            '    pip install torch "setuptools>=77" wheel\n'
            "    pip install --no-build-isolation .\n"
            "(without --no-build-isolation, pip builds in an empty environment that has no torch)"
        ) from error
    release = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
    if release < (2, 11):
        raise SystemExit(f"dnkd_ext: torch 2.11 or newer is needed, found {torch.__version__}")
    return torch


def find_cuda_home(torch_guess: str | None) -> tuple[str | None, str]:
    """The CUDA toolkit and how it was found.

    torch takes the parent of the folder of the nvcc on PATH, which is wrong where that nvcc is a
    script that calls the real one; nvcc itself knows where it is.
    """
    candidates = [(os.environ.get(name), f"${name}") for name in ("CUDA_HOME", "CUDA_PATH")]
    if shutil.which("nvcc"):
        dry_run = output_of("nvcc", "--dryrun", "-x", "cu", "-c", os.devnull)
        top = re.search(r"^#\$ TOP=(.+)$", dry_run, re.MULTILINE)
        if top:
            candidates.append((os.path.realpath(top.group(1).strip()), "nvcc --dryrun"))
    candidates += [(torch_guess, "torch.utils.cpp_extension"), (DEFAULT_CUDA_HOME, "default path")]
    for home, source in candidates:
        if home and all(Path(home, part).exists() for part in ("bin/nvcc", "include/cuda.h")):
            return home, source
        if home:
            say(f"{home} (from {source}) is no CUDA toolkit: it lacks bin/nvcc or include/cuda.h")
    return None, "not found"


def cuda_obstacle(torch, cuda_home: str | None) -> str | None:
    """Why CUDA kernels cannot be built, or None where they can."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA"
    if cuda_home is None:
        return "no CUDA toolkit was found (set CUDA_HOME)"
    release = re.search(r"release (\d+)\.(\d+)", output_of(f"{cuda_home}/bin/nvcc", "--version"))
    if release is None:
        return f"{cuda_home}/bin/nvcc does not run"
    if release.group(1) != torch.version.cuda.split(".")[0]:
        return (
            f"nvcc is of CUDA {release.group(1)}.{release.group(2)} but torch "
            f"{torch.__version__} is of CUDA {torch.version.cuda}"
        )
    return None


def cuda_architectures(cuda_home: str) -> str:
    """TORCH_CUDA_ARCH_LIST, or the default architectures that this nvcc knows, the newest + PTX."""
    if os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return os.environ["TORCH_CUDA_ARCH_LIST"]
    known = re.findall(r"compute_(\d+)", output_of(f"{cuda_home}/bin/nvcc", "--list-gpu-arch"))
    chosen = [a for a in DEFAULT_ARCHITECTURES if a.replace(".", "") in known]
    return ";".join(chosen) + "+PTX"


def decide_cuda(torch, cpp_extension) -> str | None:
    """The CUDA toolkit to build with, or None for a CPU-only build."""
    wish = os.environ.get("DNKD_CUDA", "auto").lower()
    if wish not in {"auto", "0", "1"}:
        raise SystemExit(f"dnkd_ext: DNKD_CUDA must be auto, 0 or 1, got {wish!r}")
    if wish == "0":
        say("CUDA kernels: no (DNKD_CUDA=0)")
        return None
    home, source = find_cuda_home(cpp_extension.CUDA_HOME)
    obstacle = cuda_obstacle(torch, home)
    if obstacle is not None:
        if wish == "1":
            raise SystemExit(f"dnkd_ext: DNKD_CUDA=1, but {obstacle}")
        say(f"CUDA kernels: no, because {obstacle}")
        return None
    os.environ["CUDA_HOME"] = home
    os.environ["TORCH_CUDA_ARCH_LIST"] = cuda_architectures(home)
    cpp_extension.CUDA_HOME = home  # torch decided at import
    say(f"CUDA kernels: yes, with the toolkit in {home} (from {source})")
    say(f"CUDA architectures: {os.environ['TORCH_CUDA_ARCH_LIST']}")
    return home


def compiler() -> str | None:
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and shutil.which(name.split()[0]):
            return name
    return None


def extension(torch, cpp_extension):
    cuda_home = decide_cuda(torch, cpp_extension)
    sources = [
        *glob.glob("csrc/*.cpp"),
        *glob.glob("csrc/common/*.cpp"),
        *glob.glob("csrc/ops/*.cpp"),
        *glob.glob("csrc/ops/cpu/*.cpp"),
    ]
    cxx = [
        "-O3",
        "-std=c++20",
        "-fvisibility=hidden",
        "-Wall",
        "-Wno-psabi",
        "-Wno-maybe-uninitialized",
        "-Wno-unknown-warning-option",  # clang's, which does not know the one before
        "-fno-math-errno",
        "-g0",  # Python's own flags ask for debug information, fifteen times the library's size
    ]
    link = []
    if sys.platform == "darwin":
        say("OpenMP: no (Apple's compiler brings none); the CPU kernels run on one thread")
    else:
        say("OpenMP: yes, -fopenmp")
        cxx.append("-fopenmp")
        link.append("-fopenmp")
    x86 = platform.machine().lower() in {"x86_64", "amd64"}
    say(f"CPU kernels: {'baseline, AVX2 and AVX-512, chosen at run time' if x86 else 'baseline'}")
    macros = []
    flags = {"cxx": cxx}
    kind = cpp_extension.CppExtension
    if cuda_home is not None:
        kind = cpp_extension.CUDAExtension
        sources += [*glob.glob("csrc/common/*.cu"), *glob.glob("csrc/ops/cuda/*.cu")]
        flags["nvcc"] = ["-O3", "-std=c++17", "--threads=2", "-lineinfo"]
        macros += [
            ("DNKD_WITH_CUDA", None),
            ("DNKD_CUDA_VERSION", f'"{torch.version.cuda}"'),
            ("DNKD_CUDA_ARCHITECTURES", f'"{os.environ["TORCH_CUDA_ARCH_LIST"]}"'),
        ]
    return kind(
        name="dnkd_ext._C",
        sources=sorted(sources),
        depends=[str(path.relative_to(ROOT)) for path in source_files()],
        include_dirs=[str(ROOT / "csrc")],
        define_macros=macros,
        extra_compile_args=flags,
        extra_link_args=link,
    )


def source_files() -> list[Path]:
    """What a library depends on, this file among it."""
    suffixes = {".cpp", ".cu", ".h", ".cuh", ".inc"}
    paths = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in suffixes]
    return [*sorted(paths), ROOT / "setup.py"]


def sources_hash() -> str:
    """Of all that is compiled: whether a library is of these sources."""
    digest = hashlib.sha256()
    for path in source_files():
        digest.update(f"{path.relative_to(ROOT).as_posix()}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def must_begin_anew(record: dict, path: Path, library: Path) -> bool:
    """Whether the times of files, by which the build decides, do not show what is to be compiled.

    That is where the library was built for something else than the record says, or of other sources
    that are older than it, as an archive or a copy may leave them.
    """
    try:
        known = json.loads(path.read_text())
        built = library.stat().st_mtime
    except (OSError, ValueError):  # what there is of a build that did not end may be gone on with
        return False
    if not isinstance(known, dict):
        return True
    if any(known.get(name) != record[name] for name in ("torch", "cuda", "architectures")):
        return True
    return known.get("sources") != record["sources"] and all(
        source.stat().st_mtime <= built for source in source_files()
    )


def build_arguments() -> dict:
    torch = import_torch()
    from torch.utils import cpp_extension

    say(
        f"Python {platform.python_version()}, torch {torch.__version__} "
        f"in {Path(torch.__file__).parent}"
    )
    name = compiler()
    if name is None and os.environ.get("DNKD_CUDA") == "1":
        raise SystemExit("dnkd_ext: DNKD_CUDA=1, but no C++ compiler was found (CXX, c++, g++)")
    if name is None:
        say("compiler: none found (CXX, c++, g++, clang++); installing as pure Python")
        return {}
    version = (output_of(*name.split(), "--version").splitlines() or ["does not run"])[0]
    say(f"compiler: {name}, {version}")
    os.environ["CXX"] = name  # torch would call c++ whether it exists or not

    class Build(cpp_extension.BuildExtension):
        """Also writes what it built against, for the message when the library does not load."""

        def run(self):
            with_cuda = any(
                ("DNKD_WITH_CUDA", None) in ext.define_macros for ext in self.extensions
            )
            record = {
                "torch": torch.__version__,
                "cuda": torch.version.cuda if with_cuda else None,
                "architectures": os.environ["TORCH_CUDA_ARCH_LIST"] if with_cuda else None,
                "sources": sources_hash(),  # not of what is changed while it compiles
            }
            folder = (ROOT if self.inplace else Path(self.build_lib)) / "dnkd_ext"
            path = folder / "_build.json"
            library = folder / Path(self.get_ext_filename("dnkd_ext._C")).name
            if must_begin_anew(record, path, library):
                say("compiling everything anew: the library there is of something else")
                shutil.rmtree(self.build_temp, ignore_errors=True)
                self.force = True
            super().run()
            record["library_bytes"] = library.stat().st_size
            path.write_text(json.dumps(record, indent=1) + "\n")
            say(f"wrote {path}")

    return {
        "ext_modules": [extension(torch, cpp_extension)],
        "cmdclass": {"build_ext": Build.with_options(use_ninja=shutil.which("ninja") is not None)},
    }


# Metadata alone can be asked for without torch; a build cannot.
METADATA_COMMANDS = {"egg_info", "dist_info", "sdist", "clean"}
if __name__ == "__main__":
    asked = [argument for argument in sys.argv[1:] if not argument.startswith("-")]
    only_metadata = bool(asked) and set(asked) <= METADATA_COMMANDS
    setup(**({} if only_metadata else build_arguments()))
