"""Which sources are measured: their commit, and whether the compiled library is of them."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIBRARY_SUFFIXES = {".cpp", ".cu", ".h", ".cuh", ".inc"}
REBUILD = "python setup.py build_ext --inplace"


def commit() -> str:
    """The commit measured, with + and a hash of the sources where they differ from it.

    Without git it is that hash alone.
    """

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        # That of a repository around these files, as an archive is unpacked in one, is another's.
        is_own = Path(git("rev-parse", "--show-toplevel") or "nowhere").resolve() == ROOT
        revision = git("rev-parse", "--short=10", "HEAD") if is_own else ""
    except OSError:
        revision = ""
    if not revision:
        return f"files-{source_hash()}"
    generated = (":!benchmarks/results", ":!benchmarks/README.md")
    sources = ("csrc", "dnkd_ext", "benchmarks", "setup.py", "pyproject.toml")
    changed = git("status", "--porcelain", "--", *sources, *generated)
    return revision + (f"+{source_hash()}" if changed else "")


def source_hash() -> str:
    """What the sources are, whether committed or not."""
    digest = hashlib.sha1(usedforsecurity=False)
    suffixes = {".py", ".yaml", *LIBRARY_SUFFIXES}
    paths = [ROOT / "setup.py", ROOT / "pyproject.toml"]
    for folder in ("benchmarks", "csrc", "dnkd_ext", "tests"):
        paths += [p for p in sorted((ROOT / folder).rglob("*")) if p.suffix in suffixes]
    for path in paths:
        digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:10]


def library_hash() -> str:
    """What the library here would be compiled from, as setup.py writes it down."""
    digest = hashlib.sha256()
    paths = [p for p in (ROOT / "csrc").rglob("*") if p.suffix in LIBRARY_SUFFIXES]
    for path in [*sorted(paths), ROOT / "setup.py"]:
        digest.update(f"{path.relative_to(ROOT).as_posix()}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def library_obstacle(
    package: Path, device: str, torch: str, capability: tuple[int, int] | None = None
) -> str | None:
    """Why the compiled library of a package is not to be measured on a device; None where it may.

    Args:
        package: the folder that the build wrote to.
        device: ``"cpu"`` or ``"cuda"``.
        torch: the version of torch that is there.
        capability: the GPU's compute capability, for which there must be machine code: what the
            driver makes of PTX for an older one lacks the kernels that only newer ones have.
    """
    try:
        record = json.loads((package / "_build.json").read_text())
        built, cuda, of = (record.get(name) for name in ("sources", "cuda", "torch"))
        architectures = str(record.get("architectures") or "")
    except (OSError, ValueError, AttributeError):
        return f"there is no compiled library; build it: {REBUILD}"
    if built != library_hash():
        return f"the compiled library is of other sources than these; build it anew: {REBUILD}"
    if of != torch:
        return f"the compiled library is for torch {of}, here is {torch}; build it anew: {REBUILD}"
    if device == "cuda" and cuda is None:
        return (
            f"the compiled library has no CUDA kernels; build it with them: DNKD_CUDA=1 {REBUILD}"
        )
    if device == "cuda" and capability is not None:
        major, minor = capability
        known = [(int(a), int(b)) for a, b in re.findall(r"(\d+)\.(\d)", architectures)]
        # (Names of architectures are taken as they are.)
        if known and not any(own == major and least <= minor for own, least in known):
            return (
                f"the compiled library is for GPUs of {architectures}, here is {major}.{minor}; "
                f"build it anew: TORCH_CUDA_ARCH_LIST={major}.{minor} DNKD_CUDA=1 {REBUILD}"
            )
    return None
