"""What the benchmarks share: options, the table at the end, and its rows as JSON."""

from __future__ import annotations

import datetime
import json
import platform
from pathlib import Path
from typing import Any

import pytest
import torch

import convmixer_fast
from convmixer_fast import _native
from convmixer_fast.doctor import cpu_name

Row = dict[str, Any]
_ROWS: list[Row] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("convmixer_fast")
    group.addoption("--variants", default="256/8,1024/20", help="models, separated by commas")
    group.addoption("--batches", default="1,4", help="batch sizes, separated by commas")
    group.addoption("--threads", default="", help="thread counts; default: what torch uses")
    group.addoption("--peers", default="eager NCHW,eager channels-last", help="peers, or 'all'")
    group.addoption("--rounds", default=5, type=int, help="interleaved rounds of each system")
    group.addoption("--rows", type=Path, help="write every measured row to this JSON file")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    option = metafunc.config.getoption
    lists = {
        "variant": option("--variants").split(","),
        "batch": [int(b) for b in option("--batches").split(",")],
        "threads": [
            int(t) for t in (option("--threads") or str(torch.get_num_threads())).split(",")
        ],
    }
    for name, values in lists.items():
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, values)


@pytest.fixture
def add_row() -> Any:
    """Called with the columns of one measured line."""
    return lambda **row: _ROWS.append(row)


def machine() -> Row:
    return {
        "cpu": cpu_name(),
        "cores": torch.get_num_threads(),
        "isa": _native.isa() or "no engine",
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "convmixer_fast": convmixer_fast.__version__,
        "date": datetime.date.today().isoformat(),
    }


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if not _ROWS:
        return
    about = machine()
    terminalreporter.section("convmixer_fast beside its peers")
    terminalreporter.write_line(
        f"{about['cpu']} ({about['isa']}), torch {about['torch']}; medians of interleaved rounds, "
        "outputs checked first"
    )
    columns = list(dict.fromkeys(key for row in _ROWS for key in row))
    table = [columns, *[[_text(row.get(c, "")) for c in columns] for row in _ROWS]]
    widths = [max(len(line[i]) for line in table) for i in range(len(columns))]
    for line in table:
        terminalreporter.write_line(
            "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
        )
    path = config.getoption("--rows")
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"machine": about, "rows": _ROWS}, indent=1) + "\n")
        terminalreporter.write_line(f"rows written to {path}")


def _text(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
