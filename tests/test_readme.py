"""The code blocks of README.md run, one after another, as a reader would paste them."""

from __future__ import annotations

import re
from pathlib import Path

import torch

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
