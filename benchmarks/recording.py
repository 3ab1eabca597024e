"""Recording of measured rows: into the session's report, a file, and `extra_info`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import results
from machine import this_machine, this_software


class Recorder:
    """Collects the rows of each measured group.

    Args:
        path: file that the rows are merged into, or None.
        resume: do not measure groups again that the file has from this build of the engine.
        gpu: name of the measured GPU, if any.
    """

    def __init__(self, path: Path | None, resume: bool, gpu: str = "") -> None:
        self.path, self.resume = path, resume
        self.machine, self.software = this_machine(gpu), this_software(gpu)
        self.session: results.Report | None = None

    def wanted(self, suite: str, group: str) -> None:
        """Skip the calling test if its group is measured already."""
        if self.resume and self.path is not None:
            there = results.groups(results.load(self.path), self.software["engine"])
            if (suite, group) in there:
                pytest.skip(f"{suite}, {group}: already in {self.path.name}")

    def rows(self, suite: str) -> list[results.Row]:
        """Every row of a suite in the session and, with ``resume``, in the file."""
        there = results.load(self.path) if self.resume and self.path is not None else None
        return [
            row
            for report in (there, self.session)
            if report is not None
            for row in results.select(report["rows"], suite=suite)
        ]

    def __call__(self, suite: str, group: str, rows: list[results.Row]) -> None:
        """Add a group's rows; they replace earlier ones of the group."""
        rows = [{"suite": suite, "group": group, **row} for row in rows]
        new = results.new_report(self.machine, self.software, rows)
        self.session = results.merge(self.session, new)
        if self.path is not None:
            # After every group: an interrupted run has lost one group.
            results.save(results.merge(results.load(self.path), new), self.path)


#: Columns that identify a row within its group, as far as their values differ.
_KEYS = ("part", "what", "model", "side", "batch", "threads", "system")


def extra_info(machine: results.Row, software: results.Row, rows: list[results.Row]) -> results.Row:
    """The `extra_info` that pytest-benchmark stores with a group.

    Returns:
        ``device``, ``machine``, ``versions``, ``threads`` if all rows have the same, and
        ``systems``: every row's own columns under the name that identifies it, like "ours".
    """
    keys = [
        key
        for key in _KEYS
        if any(key in row for row in rows)
        and (key == "system" or len({row.get(key) for row in rows if key in row}) > 1)
    ]
    systems = {}
    for row in rows:
        name = ", ".join(str(row[key]) for key in keys if key in row)
        systems[name or str(row["group"])] = {
            key: value
            for key, value in row.items()
            if key not in (*keys, "suite", "group", "device", "dtype")
        }
    devices = {row.get("device", machine["cpu"]) for row in rows}
    info: dict[str, Any] = {
        "suite": rows[0]["suite"],
        "group": rows[0]["group"],
        "device": " and ".join(sorted(devices)),
        "machine": machine,
        "versions": software,
        "systems": systems,
    }
    for key in ("dtype", "threads"):
        found = {row[key] for row in rows if key in row}
        if len(found) == 1:
            info[key] = found.pop()
    return info


@dataclass(frozen=True)
class BenchmarkRecorder:
    """A `Recorder` for one test: the rows are also the `extra_info` of its ``benchmark``."""

    recorder: Recorder
    benchmark: Any

    def wanted(self, suite: str, group: str) -> None:
        self.recorder.wanted(suite, group)

    def __call__(self, suite: str, group: str, rows: list[results.Row]) -> None:
        self.recorder(suite, group, rows)
        rows = [{"suite": suite, "group": group, **row} for row in rows]
        info = extra_info(self.recorder.machine, self.recorder.software, rows)
        # A test of several groups stores the systems of all.
        info["systems"] = {**self.benchmark.extra_info.get("systems", {}), **info["systems"]}
        self.benchmark.extra_info.update(info)
