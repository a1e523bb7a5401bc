"""Which device the pytest-benchmark entry points measure on, and that they measure its kernels."""

from __future__ import annotations

import pytest


def pytest_addoption(parser):
    group = parser.getgroup("dnkd_ext")
    group.addoption("--device", default="cpu", choices=["cpu", "cuda"], help="where to measure")


def pytest_collection_finish(session):
    """No other library's figures, and not the reference's, under the name of ours."""
    from benchmarks import results, run

    try:
        if not session.config.option.collectonly:
            run.require_library(session.config.getoption("device"))
    except results.ResultsError as error:
        raise pytest.UsageError(str(error)) from None
