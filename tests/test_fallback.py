"""The package without its library, with one that does not fit, and with each instruction set.

Every test runs a new Python on a copy of the package, so that the installed one stays as it is.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dnkd_ext
from dnkd_ext import _extension
from dnkd_ext.losses import LOSSES
from tests.cases import CASES, DTYPES, convert, truth

PACKAGE = Path(dnkd_ext.__file__).parent
REBUILD = "pip install --no-build-isolation --force-reinstall --no-deps ."
INSTALLED = dnkd_ext.build_info()
TORCH = str(torch.__version__)
MAJOR, MINOR = TORCH.split(".")[:2]
# The operators that the library brings, its own and those behind them.
OPERATORS = [
    name
    for operator in dict.fromkeys(case.operator for case in CASES)
    for name in (operator, f"_{operator}_forward", f"_{operator}_reference")
]
needs_library = pytest.mark.skipif(
    not INSTALLED["loaded"], reason=f"compiled library not loaded: {INSTALLED['load_error']}"
)

# An editable install finds the library of the source folder for every package of this name.
PRELUDE = """
import json, sys, warnings
sys.meta_path[:] = [
    f for f in sys.meta_path if not getattr(f, "__module__", "").startswith("__editable__")
]
import torch
"""

# What is to be known about an import, as one line of JSON.
REPORT = """
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import dnkd_ext
    losses, gradients = [], []
    for name, args, kwargs in torch.load("arguments.pt"):
        result = getattr(dnkd_ext, name)(*args, **kwargs)
        loss = result if isinstance(result, torch.Tensor) else result.loss
        losses.append(loss.detach())
        gradients.append(torch.autograd.grad(loss, args[0])[0])
    torch.save((losses, gradients), "results.pt")
    before = dnkd_ext.build_info()
library = sys.modules.get("dnkd_ext._C")
print(json.dumps({
    "file": dnkd_ext.__file__,
    "library": library and library.__file__,
    "warnings": [[w.category.__name__, str(w.message), w.filename] for w in caught],
    "info": before,
    "operators": [name for name in OPERATORS if hasattr(torch.ops.dnkd_ext, name)],
}))
"""


class Copy:
    """A copy of the package in a folder of its own, and runs of Python that import it."""

    def __init__(self, folder: Path, generator: torch.Generator) -> None:
        self.folder = folder
        self.package = folder / "dnkd_ext"
        ignored = shutil.ignore_patterns("__pycache__", "_C.*", "_build.json")
        shutil.copytree(PACKAGE, self.package, ignore=ignored)
        self.arguments = [
            (case, *convert(case.variants[variant](generator, 7, 37, 5), dtype, "cpu"))
            for case in CASES
            for variant in case.smooth
            for dtype in DTYPES
        ]
        torch.save(
            [(case.name, *arguments) for case, *arguments in self.arguments],
            folder / "arguments.pt",
        )

    def add_library(self) -> Path:
        """Brings the library and the record of its build; returns the library."""
        (library,) = PACKAGE.glob("_C.*.so")
        shutil.copy(PACKAGE / "_build.json", self.package)
        return Path(shutil.copy(library, self.package))

    def python(self, code: str, **variables: str) -> subprocess.CompletedProcess:
        environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("DNKD_", "PYTHON"))
        }
        return subprocess.run(
            [sys.executable, "-c", PRELUDE + code],
            cwd=self.folder,
            env={**environment, "PYTHONPATH": str(self.folder), **variables},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    def report(self, **variables: str) -> dict:
        """What an import says, after checking that it was one of this copy."""
        done = self.python(f"OPERATORS = {OPERATORS}\n" + REPORT, **variables)
        assert done.returncode == 0, (done.returncode, done.stderr)
        report = json.loads(done.stdout)
        assert report["file"] == str(self.package / "__init__.py")
        return report

    def assert_results(self) -> None:
        """Losses and gradients of the last report against the definition, row by row."""
        losses, gradients = torch.load(self.folder / "results.pt")
        assert len(losses) == len(gradients) == len(self.arguments) > 4 * len(CASES)
        for given, loss, gradient in zip(self.arguments, losses, gradients, strict=True):
            case, *arguments = given
            dtype = arguments[0][0].dtype
            expected = truth(case, tuple(arguments), "mean")
            exact = 1e-12 if dtype == torch.float64 else 1e-5
            assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            assert gradient.dtype == dtype
            assert abs(expected.gradient).max() > 0.01 / 37
            assert expected.loss_error(loss) <= exact
            assert expected.gradient_error(gradient) <= max(exact, torch.finfo(dtype).eps)

    def assert_fallback(self, **variables: str) -> str:
        """One warning, no library, no operators, right results; returns the warning."""
        report = self.report(**variables)
        assert report["library"] is None
        assert report["operators"] == []
        ((category, message, _),) = report["warnings"]
        assert category == "UserWarning"
        assert message.startswith("dnkd_ext runs without its compiled kernels")
        assert message.endswith(REBUILD)
        info = report["info"]
        assert info["loaded"] is False
        assert info["load_error"]
        assert info["load_error"] in message
        assert info["torch"] == TORCH
        for key in ("compiler", "openmp", "threads", "cpu_isas", "cpu_isa", "cuda"):
            assert info[key] is None
        self.assert_results()
        return message


@pytest.fixture
def copy(tmp_path, generator):
    return Copy(tmp_path, generator)


# -- without a library that fits ------------------------------------------------------------------


def test_without_library(copy):
    message = copy.assert_fallback()
    assert f"no compiled library beside {copy.package}" in message


def test_the_warning_is_shown_once_by_default(copy):
    """Python's own filters show it on standard error, whatever is imported after."""
    done = copy.python("import dnkd_ext, dnkd_ext.reference, dnkd_ext.losses; print('done')")
    assert done.returncode == 0
    assert done.stdout == "done\n"
    assert done.stderr.count("UserWarning") == 1
    assert REBUILD in done.stderr


def test_the_warning_points_at_the_caller(copy):
    ((_, _, filename),) = copy.report()["warnings"]
    assert filename == "<string>"


def test_required_library(copy):
    done = copy.python("import dnkd_ext", DNKD_REQUIRE_EXT="1")
    assert done.returncode != 0
    error = done.stderr.strip().splitlines()[-1]
    assert error.startswith("ImportError: dnkd_ext runs without its compiled kernels")
    assert f"no compiled library beside {copy.package}" in error
    assert REBUILD in error
    assert "DNKD_REQUIRE_EXT is set" in error
    assert "UserWarning" not in done.stderr


def test_library_not_required(copy):
    copy.assert_fallback(DNKD_REQUIRE_EXT="0")


def test_everything_else_works_without_library(copy):
    """Module, class means, autocast, torch.func and half precision."""
    done = copy.python("""
warnings.simplefilter("ignore")
import dnkd_ext
means = dnkd_ext.ClassMeans(3, 4)
means.update(torch.eye(4)[:3], torch.arange(3))
criterion = dnkd_ext.NDLoss(means)
student = torch.eye(4)[:3].clone().requires_grad_()
with torch.autocast("cpu", dtype=torch.bfloat16):
    loss = criterion(student, torch.tensor([0, 1, 0]), teacher_norms=torch.full((3,), 2.0))
loss.backward()
rows = torch.func.vmap(lambda s, t: dnkd_ext.nd_loss(s, t, means.compute()))(
    student.detach(), torch.arange(3)
)
half = dnkd_ext.nd_loss(student.detach().half(), torch.arange(3), means.compute())
try:
    dnkd_ext.nd_loss(student, torch.tensor([0, 1, 3]), means.compute())
except IndexError as error:
    message = str(error)
print(json.dumps([loss.item(), student.grad.tolist(), rows.tolist(), half.item(), message]))
""")
    assert done.returncode == 0, done.stderr
    loss, gradient, rows, half, message = json.loads(done.stdout)
    # Rows of length 1 under a teacher of length 2: 1 - 1/2, 1 - 1/2 and 1 - 0.
    assert loss == pytest.approx(2 / 3)
    sixth = pytest.approx(-1 / 6)
    assert gradient == [[sixth, 0, 0, 0], [0, sixth, 0, 0], [sixth, 0, 0, 0]]
    assert rows == [0, 0, 0]
    assert half == 0
    assert message == "target[2] = 3 is out of range for 3 rows of class_means"


@needs_library
@pytest.mark.parametrize("version", ["1.0.0", f"{MAJOR}.{int(MINOR) + 1}.0+cpu"])
def test_library_of_another_torch(copy, version):
    """Not even tried: it might load and then corrupt memory."""
    copy.add_library()
    (copy.package / "_build.json").write_text(json.dumps({"torch": version, "cuda": None}))
    message = copy.assert_fallback()
    assert f"built for torch {version} but torch {TORCH} is installed" in message
    done = copy.python("import dnkd_ext", DNKD_REQUIRE_EXT="1")
    assert done.returncode != 0
    assert f"ImportError: {message}" in done.stderr


@needs_library
def test_library_of_a_patch_release(copy):
    """Within a minor version the C++ interface stays."""
    copy.add_library()
    other = f"{MAJOR}.{MINOR}.99+cu999"
    record = json.loads((copy.package / "_build.json").read_text())
    (copy.package / "_build.json").write_text(json.dumps({**record, "torch": other}))
    report = copy.report()
    assert report["warnings"] == []
    assert report["info"]["loaded"] is True
    assert report["info"]["built_for_torch"] == other


@needs_library
@pytest.mark.parametrize("size", [0, 4096])
def test_truncated_library(copy, size):
    """As an interrupted copy leaves it."""
    library = copy.add_library()
    assert library.stat().st_size > size
    with library.open("r+b") as file:
        file.truncate(size)
    message = copy.assert_fallback()
    assert TORCH in message


@needs_library
def test_library_of_something_else(copy):
    library = copy.add_library()
    library.write_bytes(bytes(range(256)) * 64)
    message = copy.assert_fallback()
    assert library.name in message


@needs_library
def test_library_without_record(copy):
    """Used, since nothing speaks against it."""
    copy.add_library()
    (copy.package / "_build.json").unlink()
    report = copy.report()
    assert report["warnings"] == []
    assert report["info"]["loaded"] is True
    assert report["info"]["built_for_torch"] is None


@pytest.mark.parametrize("record", ["{", "[]", '{"torch": 2}'])
def test_damaged_record(copy, record):
    """Counts as none."""
    (copy.package / "_build.json").write_text(record)
    assert "no compiled library" in copy.assert_fallback()


def test_all_operators_are_looked_for():
    """Those that Python calls, and those to which it brings a fake kernel or the reference."""
    used = set()
    for path in sorted(PACKAGE.rglob("*.py")):
        used |= set(
            re.findall(
                r'(?:"dnkd_ext::|torch\.ops\.dnkd_ext\.|_library\.impl\("|\boperator\(")(\w+)',
                path.read_text(encoding="utf-8"),
            )
        )
    assert {"nd_loss", "_dist_loss_moments", "_logit_loss_reference"} <= used
    assert sorted(_extension.OPERATORS) == sorted(used)


@needs_library
def test_library_of_other_sources(copy):
    """One that has not all operators, as after new sources were pulled, is not half in use."""
    copy.add_library()
    source = copy.package / "_extension.py"
    text = source.read_text()
    changed = text.replace("OPERATORS = (", 'OPERATORS = ("made_later", ')
    assert changed != text
    source.write_text(changed)
    report = copy.report()
    ((category, message, _),) = report["warnings"]
    assert category == "UserWarning"
    assert "the library was built from other sources and has no made_later" in message
    assert message.endswith(REBUILD)
    assert report["info"]["loaded"] is False
    copy.assert_results()
    done = copy.python("import dnkd_ext", DNKD_REQUIRE_EXT="1")
    assert done.returncode != 0
    assert f"ImportError: {message}" in done.stderr


# -- with the library -----------------------------------------------------------------------------


@needs_library
def test_with_library(copy):
    library = copy.add_library()
    report = copy.report(DNKD_REQUIRE_EXT="1")
    assert report["warnings"] == []
    assert report["library"] == str(library)
    assert report["operators"] == OPERATORS
    info = report["info"]
    assert info["loaded"] is True
    assert info["load_error"] is None
    assert info["torch"] == TORCH
    assert info["built_for_torch"] == json.loads((PACKAGE / "_build.json").read_text())["torch"]
    assert info["version"] == dnkd_ext.__version__
    assert info["cpu_isas"][0] == "baseline"
    assert info["cpu_isa"] == info["cpu_isas"][-1]  # the fastest
    assert info["threads"] >= 1
    assert info["compiler"]
    copy.assert_results()


@needs_library
@pytest.mark.parametrize("isa", INSTALLED["cpu_isas"] or ["baseline"])
def test_instruction_set(copy, isa):
    copy.add_library()
    report = copy.report(DNKD_CPU_ISA=isa)
    assert report["warnings"] == []
    assert report["info"]["cpu_isa"] == isa
    assert report["info"]["cpu_isas"] == INSTALLED["cpu_isas"]
    copy.assert_results()


@needs_library
@pytest.mark.parametrize("isa", ["nonsense", "AVX2"])
def test_unknown_instruction_set(copy, isa):
    """An error of the import that says what there is."""
    copy.add_library()
    done = copy.python("import dnkd_ext", DNKD_CPU_ISA=isa)
    assert done.returncode == 1
    available = ", ".join(INSTALLED["cpu_isas"])
    assert done.stderr.strip().splitlines()[-1] == (
        f"ValueError: DNKD_CPU_ISA={isa} cannot be used: this build on this CPU has {available}"
    )


@needs_library
def test_empty_instruction_set_is_none(copy):
    copy.add_library()
    assert copy.report(DNKD_CPU_ISA="")["info"]["cpu_isa"] == INSTALLED["cpu_isas"][-1]


@needs_library
@pytest.mark.parametrize("isa", INSTALLED["cpu_isas"] or ["baseline"])
def test_self_check_with_each_instruction_set(copy, isa):
    """Every operator, those without a LossCase among them, against its reference."""
    copy.add_library()
    code = "import sys; from dnkd_ext.cli import main; sys.exit(main(['info', '--check']))"
    done = copy.python(code, DNKD_CPU_ISA=isa)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in LOSSES:
        assert done.stdout.count(f"PASS {name} cpu") == len(DTYPES)
