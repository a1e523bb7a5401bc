"""Which device the pytest-benchmark entry points measure on."""

from __future__ import annotations


def pytest_addoption(parser):
    group = parser.getgroup("dnkd_ext")
    group.addoption("--device", default="cpu", choices=["cpu", "cuda"], help="where to measure")
