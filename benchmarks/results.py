"""Files of measured rows: one JSON file a machine, filled group by group.

    {"machine": {...}, "runs": [{date, versions, ...}, ...], "rows": [{...}, ...]}

Rows with the same ``suite`` and ``group`` were measured in one process in interleaved rounds;
``run`` is an index into ``runs``. Groups are added and replaced as a whole, so that all rows of a
group were measured together.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Report = dict[str, Any]


def new_report(machine: Row, run: Row, rows: Iterable[Row]) -> Report:
    """A report of one run."""
    return {"machine": machine, "runs": [run], "rows": [{**row, "run": 0} for row in rows]}


def merge(old: Report | None, new: Report) -> Report:
    """``old`` with its groups replaced by those of ``new``; no other row is lost.

    Raises:
        ValueError: they are of different machines.
    """
    if old is None:
        return new
    if old["machine"] != new["machine"]:
        raise ValueError(
            f"rows of different machines do not mix: {old['machine']} and {new['machine']}: "
            "name another folder with --out"
        )
    replaced = groups(new)
    runs: list[Row] = []
    rows = []
    for report in (old, new):
        for row in report["rows"]:
            if report is old and (row["suite"], row["group"]) in replaced:
                continue
            run = report["runs"][row["run"]]
            if run not in runs:
                runs.append(run)
            rows.append({**row, "run": runs.index(run)})
    return {"machine": old["machine"], "runs": runs, "rows": rows}


def groups(report: Report | None, engine: str | None = None) -> set[tuple[str, str]]:
    """(suite, group) of every row, or of the rows of one build of the engine."""
    if report is None:
        return set()
    return {
        (row["suite"], row["group"])
        for row in report["rows"]
        if engine is None or report["runs"][row["run"]].get("engine") == engine
    }


def load(path: Path) -> Report | None:
    """The report in a file, None where there is no file.

    Raises:
        ValueError: the file holds something else.
    """
    if not path.exists():
        return None
    report: Report = json.loads(path.read_text())
    rows = report.get("rows", []) if isinstance(report, dict) else []
    if not {"machine", "runs"} <= set(report) or not all(
        {"suite", "group"} <= set(r) for r in rows
    ):
        raise ValueError(
            f"{path} is no report of these benchmarks: its rows name no suite and group"
        )
    return report


def save(report: Report, path: Path) -> None:
    """Write a report; an interrupted write leaves the file as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".part")
    # One line a row, for readers and for diffs.
    rows = ",\n".join("  " + json.dumps(row) for row in report["rows"])
    head = {key: value for key, value in report.items() if key != "rows"}
    text = json.dumps(head, indent=1)[:-2]
    partial.write_text(f'{text},\n "rows": [\n{rows}\n ]\n}}\n')
    os.replace(partial, path)


def select(rows: Iterable[Row], **wanted: Any) -> list[Row]:
    """The rows whose columns have these values."""
    return [row for row in rows if all(row.get(k) == v for k, v in wanted.items())]


def is_peer(row: Row) -> bool:
    """Whether a row is a measurement of another system: not ours, no limit, no note."""
    return "ms" in row and not row["system"].startswith(("ours", "peak", "limit"))


def display_name(name: str) -> str:
    """Name of a part or step in tables and charts; stored rows say "channel half"."""
    return name.replace("channel half", "pointwise half")


def in_order(rows: list[Row]) -> list[Row]:
    """Model by model as first measured, batch by batch; a group's rows keep their order."""
    models = list(dict.fromkeys(r.get("model") for r in rows))
    return sorted(
        rows,
        key=lambda r: (models.index(r.get("model")), r.get("batch") or 0, -(r.get("threads") or 0)),
    )
