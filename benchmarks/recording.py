"""Where do rows go while the suites run? Into the session's report, and into a file at once."""

from __future__ import annotations

from pathlib import Path

import pytest
import results
from machine import this_machine, this_software


class Recorder:
    """Takes the rows of each group that was measured.

    ``path`` is the file they are merged into, or None; with ``resume`` a group that the file has
    from this build of the engine is not measured again.
    """

    def __init__(self, path: Path | None, resume: bool) -> None:
        self.path, self.resume = path, resume
        self.machine, self.software = this_machine(), this_software()
        self.session: results.Report | None = None

    def wanted(self, suite: str, group: str) -> None:
        """Skip the test that asks, if its group is there already."""
        if self.resume and self.path is not None:
            there = results.groups(results.load(self.path), self.software["engine"])
            if (suite, group) in there:
                pytest.skip(f"{suite}, {group}: already in {self.path.name}")

    def __call__(self, suite: str, group: str, rows: list[results.Row]) -> None:
        """Add a group's rows, in the place of what was there of it."""
        rows = [{"suite": suite, "group": group, **row} for row in rows]
        new = results.new_report(self.machine, self.software, rows)
        self.session = results.merge(self.session, new)
        if self.path is not None:
            # Not at the end: a long run that is cut off has lost one group.
            results.save(results.merge(results.load(self.path), new), self.path)
