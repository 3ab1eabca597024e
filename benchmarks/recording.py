"""Where do rows go while the suites run? Into the session's report, a file, and `extra_info`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import results
from machine import this_machine, this_software


class Recorder:
    """Takes the rows of each group that was measured.

    ``path`` is the file they are merged into, or None; with ``resume`` a group that the file has
    from this build of the engine is not measured again. ``gpu`` is the name of the one that is
    measured too, if any.
    """

    def __init__(self, path: Path | None, resume: bool, gpu: str = "") -> None:
        self.path, self.resume = path, resume
        self.machine, self.software = this_machine(gpu), this_software(gpu)
        self.session: results.Report | None = None

    def wanted(self, suite: str, group: str) -> None:
        """Skip the test that asks, if its group is there already."""
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
        """Add a group's rows, in the place of what was there of it."""
        rows = [{"suite": suite, "group": group, **row} for row in rows]
        new = results.new_report(self.machine, self.software, rows)
        self.session = results.merge(self.session, new)
        if self.path is not None:
            # Not at the end: a long run that is cut off has lost one group.
            results.save(results.merge(results.load(self.path), new), self.path)


#: What tells the rows of a group apart, as far as they differ in it.
_KEYS = ("part", "what", "model", "side", "batch", "threads", "system")


def extra_info(machine: results.Row, software: results.Row, rows: list[results.Row]) -> results.Row:
    """What pytest-benchmark keeps of a group beside its own numbers.

    Returns:
        ``device``, ``machine``, ``versions``, ``threads`` where all rows have the same, and
        ``systems``: every row's own columns under what tells it from the others, like "ours".
    """
    told = [
        key
        for key in _KEYS
        if any(key in row for row in rows)
        and (key == "system" or len({row.get(key) for row in rows if key in row}) > 1)
    ]
    systems = {}
    for row in rows:
        name = ", ".join(str(row[key]) for key in told if key in row)
        systems[name or str(row["group"])] = {
            key: value
            for key, value in row.items()
            if key not in (*told, "suite", "group", "device", "dtype")
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
        # Where a test measures several groups, it keeps the systems of all.
        info["systems"] = {**self.benchmark.extra_info.get("systems", {}), **info["systems"]}
        self.benchmark.extra_info.update(info)
