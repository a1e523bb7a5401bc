"""Collects the rows of the ladders and ends the run with their table."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import results

ROWS = pytest.StashKey[list]()


def pytest_addoption(parser):
    group = parser.getgroup("dnkd_ext")
    group.addoption("--device", default="cpu", choices=["cpu", "cuda"], help="where to measure")
    group.addoption("--ladder-seconds", type=float, default=1.0, help="time per peer and size")
    group.addoption("--csv", default=None, help="append the ladders to this CSV file")


def pytest_configure(config):
    config.stash[ROWS] = []


@pytest.fixture
def ladder(request):
    """Measures all peers of a case in turn; the rows go to the table and the CSV file."""

    def run(case, warm):
        rows = results.measure_case(
            case, warm=warm, seconds=request.config.getoption("ladder_seconds")
        )
        request.config.stash[ROWS] += rows
        if request.config.getoption("csv"):  # at once, so that an interruption keeps it
            results.append(rows, Path(request.config.getoption("csv")))
        return {row["peer"]: row["median_us"] for row in rows}

    return run


def pytest_terminal_summary(terminalreporter, config):
    rows = config.stash[ROWS]
    if rows:
        first = rows[0]
        terminalreporter.section("losses against their peers")
        terminalreporter.write_line(
            f"{first['hardware']}; torch {first['torch']}; dnkd_ext {first['version']} at "
            f"{first['commit']}, {first['kernels']} kernels"
        )
        terminalreporter.write_line(results.table(rows))
