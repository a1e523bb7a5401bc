"""The code that is shown runs: README.md's blocks, one after another, and docstrings' examples.

And what the Markdown files name is there.
"""

from __future__ import annotations

import doctest
import inspect
import re
from pathlib import Path

import pytest
import torch

import dnkd_ext

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]


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
    """Every make target and dnkd command that README and the pages beside it name is there."""
    text = "\n".join(page.read_text() for page in PAGES)
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"\bmake ([a-z-]+)\b", text))
    assert {"demo", "test", "bench", "gpu-check"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    from dnkd_ext.cli import _parser

    usage = _parser().format_help()
    for command in set(re.findall(r"\bdnkd ([a-z-]+)", text)):
        assert command in usage


def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(
    "page", [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "benchmarks/README.md"], ids=lambda p: p.name
)
def test_links_lead_somewhere(page):
    """Those within the repository, to a heading of the page where they name one."""
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    assert links or page != README
    for link in links:
        if re.match(r"[a-z]+:", link):
            continue
        path, _, heading = link.partition("#")
        found = (page.parent / path) if path else page
        assert found.exists(), link
        assert not heading or heading in anchors(found), link
