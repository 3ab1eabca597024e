"""Benchmarks collect rows; the run ends in one table, whatever its outcome."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from convmixer_fast.doctor import cpu_name

Row = dict[str, Any]
_ROWS: list[Row] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--variants", default="256/8,1024/20", help="models, separated by commas")
    parser.addoption("--batches", default="1,4", help="batch sizes, separated by commas")
    parser.addoption("--rounds", default=5, type=int, help="interleaved rounds of each system")
    parser.addoption("--no-compile", action="store_true", help="leave torch.compile out")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    option = metafunc.config.getoption
    if "variant" in metafunc.fixturenames:
        metafunc.parametrize("variant", option("--variants").split(","))
        metafunc.parametrize("batch", [int(b) for b in option("--batches").split(",")])


@pytest.fixture
def add_row() -> Any:
    """Called with the columns of one measured line."""
    return lambda **row: _ROWS.append(row)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if not _ROWS:
        return
    columns = list(dict.fromkeys(key for row in _ROWS for key in row))
    table = [columns, *[[str(row.get(c, "")) for c in columns] for row in _ROWS]]
    widths = [max(len(line[i]) for line in table) for i in range(len(columns))]
    terminalreporter.section("convmixer_fast beside its peers")
    terminalreporter.write_line(
        f"{cpu_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}; "
        "medians of interleaved rounds, outputs checked first"
    )
    for line in table:
        terminalreporter.write_line(
            "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
        )
