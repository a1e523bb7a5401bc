"""What setup.py decides. The build itself is what every other test runs on."""

from __future__ import annotations

import importlib.util
import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import sources

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("dnkd_ext_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def executable(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def toolkit(folder: Path, release: str) -> Path:
    """A CUDA toolkit as far as setup.py looks at one."""
    executable(
        folder / "bin/nvcc",
        f'case "$1" in --dryrun) echo "#\\$ TOP={folder}/bin/.." >&2;; '
        f"--version) echo 'release {release}, V{release}.1';; "
        f"--list-gpu-arch) printf 'compute_80\\ncompute_90\\n';; esac",
    )
    (folder / "include").mkdir()
    (folder / "include/cuda.h").touch()
    return folder


@pytest.fixture
def clean_environment(monkeypatch, tmp_path):
    for name in ("CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST", "DNKD_CUDA", "CXX"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "path").mkdir()
    for tool in ("sh", "printf", "env"):
        (tmp_path / "path" / tool).symlink_to(
            f"/bin/{tool}" if Path(f"/bin/{tool}").exists() else f"/usr/bin/{tool}"
        )
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    return tmp_path / "path"


def torch_like(cuda):
    return SimpleNamespace(__version__="9.9.0", version=SimpleNamespace(cuda=cuda))


def test_cuda_home_behind_a_wrapper(script, clean_environment, tmp_path):
    """The nvcc on PATH may be a script that calls the real one: its parent is no toolkit."""
    home = toolkit(tmp_path / "cuda-13.0", "13.0")
    executable(clean_environment / "nvcc", f'exec {home}/bin/nvcc "$@"')
    guess = str(clean_environment.parent)  # what torch makes of it
    assert script.find_cuda_home(guess) == (str(home), "nvcc --dryrun")


def test_cuda_home_from_the_environment(script, clean_environment, tmp_path, monkeypatch, capsys):
    good = toolkit(tmp_path / "good", "13.0")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "nowhere"))
    monkeypatch.setenv("CUDA_PATH", str(good))
    assert script.find_cuda_home(None) == (str(good), "$CUDA_PATH")
    assert "nowhere (from $CUDA_HOME) is no CUDA toolkit" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("torch_cuda", "release", "obstacle"),
    [
        ("13.2", "13.0", None),
        ("12.8", "13.0", "nvcc is of CUDA 13.0 but torch 9.9.0 is of CUDA 12.8"),
        (None, "13.0", "torch 9.9.0 was built without CUDA"),
        ("13.0", None, "no CUDA toolkit was found (set CUDA_HOME)"),
    ],
)
def test_decision(
    script, clean_environment, tmp_path, monkeypatch, capsys, torch_cuda, release, obstacle
):
    """auto builds without CUDA and says why; 1 fails; 0 never looks."""
    if release is not None:
        monkeypatch.setenv("CUDA_HOME", str(toolkit(tmp_path / "cuda", release)))
    monkeypatch.setattr(script, "DEFAULT_CUDA_HOME", str(tmp_path / "nowhere"))
    cpp_extension = SimpleNamespace(CUDA_HOME=None)
    torch = torch_like(torch_cuda)
    home = script.decide_cuda(torch, cpp_extension)
    said = capsys.readouterr().err
    if obstacle is None:
        assert home == cpp_extension.CUDA_HOME == os.environ["CUDA_HOME"]
        assert os.environ["TORCH_CUDA_ARCH_LIST"] == "8.0;9.0+PTX"  # what this nvcc knows
        assert "CUDA kernels: yes" in said
    else:
        assert home is None
        assert f"CUDA kernels: no, because {obstacle}" in said
        monkeypatch.setenv("DNKD_CUDA", "1")
        with pytest.raises(SystemExit, match="DNKD_CUDA=1, but "):
            script.decide_cuda(torch, cpp_extension)
    monkeypatch.setenv("DNKD_CUDA", "0")
    assert script.decide_cuda(torch, cpp_extension) is None
    monkeypatch.setenv("DNKD_CUDA", "yes")
    with pytest.raises(SystemExit, match="DNKD_CUDA must be auto, 0 or 1, got 'yes'"):
        script.decide_cuda(torch, cpp_extension)


def test_architectures_are_honoured(script, clean_environment, tmp_path, monkeypatch):
    home = toolkit(tmp_path / "cuda", "13.0")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0a")
    assert script.cuda_architectures(str(home)) == "9.0a"


def test_the_library_knows_its_sources_by_the_hash_that_benchmarks_ask_for(script):
    assert script.sources_hash() == sources.library_hash()
    assert "setup.py" in {path.name for path in script.source_files()}


def test_everything_is_compiled_anew_where_times_of_files_do_not_tell(
    script, tmp_path, monkeypatch
):
    source, library, path = (tmp_path / name for name in ("a.cpp", "_C.so", "_build.json"))
    monkeypatch.setattr(script, "source_files", lambda: [source])
    record = {"torch": "2.11.0", "cuda": None, "architectures": None, "sources": "1"}

    def begins_anew(**now):
        return script.must_begin_anew({**record, **now}, path, library)

    source.write_text("1")
    assert not begins_anew()  # there is nothing yet, or a part of a build that did not end
    library.write_text("")
    os.utime(source, (1, 1))
    assert not begins_anew()
    path.write_text(json.dumps(record))
    assert not begins_anew()
    for name, value in (("torch", "2.12.0"), ("cuda", "13.0"), ("architectures", "9.0")):
        assert begins_anew(**{name: value})
    # Of other sources: where they are newer than the library the build sees it.
    assert begins_anew(sources="2")
    os.utime(source)
    os.utime(library, (2, 2))
    assert not begins_anew(sources="2")
    path.write_text("[]")
    assert begins_anew()


def test_no_compiler_installs_as_pure_python(script, clean_environment, capsys):
    assert script.compiler() is None
    assert script.build_arguments() == {}
    assert "installing as pure Python" in capsys.readouterr().err


def test_without_torch_it_explains(tmp_path):
    """In pip's isolated environment there is no torch: say what to do instead of a traceback."""
    (tmp_path / "torch.py").write_text("raise ImportError('no torch here')")
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert "pip install --no-build-isolation ." in done.stderr
    assert "Traceback" not in done.stderr
