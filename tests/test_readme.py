"""The code that is shown runs: README.md's blocks, one after another, and docstrings' examples."""

from __future__ import annotations

import doctest
import inspect
import re
from pathlib import Path

import pytest
import torch

import dnkd_ext

README = Path(__file__).resolve().parents[1] / "README.md"


def test_code_blocks(tmp_path, monkeypatch):
    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 3
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "readme"}
    for number, block in enumerate(blocks, 1):
        exec(compile(block, f"README.md, block {number}", "exec"), namespace)
    assert namespace["loss"].isfinite()
    assert namespace["features"].grad.abs().sum() > 0
    result = namespace["result"]  # of the task object for timm's loop
    expected = result["ce"] + 2.5 * result["kd"] + result["nd"]
    torch.testing.assert_close(result["loss"], expected)
    assert result["output"].shape == (128, 10)
    assert namespace["moving"].missing == []


PUBLIC = {name: getattr(dnkd_ext, name) for name in dnkd_ext.__all__}
WITH_EXAMPLES = [name for name, value in PUBLIC.items() if ">>>" in (inspect.getdoc(value) or "")]


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_examples_of_docstrings(name, tmp_path, monkeypatch):
    """They use torch, nn and the names of the package, and give what they show ("..." for any)."""
    monkeypatch.chdir(tmp_path)
    names = {**PUBLIC, "torch": torch, "nn": torch.nn}
    found = doctest.DocTestFinder(recurse=False).find(PUBLIC[name], name, globs=names)
    report: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    for examples in found:
        runner.run(examples, out=report.append)
    assert runner.tries >= 1
    assert runner.failures == 0, "".join(report)


def test_losses_and_criteria_have_examples():
    """As everything public that is called in a training loop."""
    called = {name for name in PUBLIC if name.endswith(("_loss", "PlusPlus", "Loss", "Projector"))}
    assert len(called) >= 12
    assert called <= set(WITH_EXAMPLES)


def test_commands_exist():
    """Every make target and dnkd command that README names is there."""
    text = README.read_text()
    makefile = (README.parent / "Makefile").read_text()
    targets = set(re.findall(r"\bmake ([a-z-]+)\b", text))
    assert {"demo", "test"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    from dnkd_ext.cli import _parser

    usage = _parser().format_help()
    for command in set(re.findall(r"\bdnkd ([a-z-]+)", text)):
        assert command in usage
