"""Tables of measured rows.

    python benchmarks/report.py benchmarks/results/MACHINE/cpu.json

writes cpu.md and its charts next to the file, as `cpu.py` does by itself.

    python benchmarks/report.py --readme

puts the figures of all result files into README.md and docs/, and draws the README's chart.

The file is long because the columns and the text of every suite stand in one table.
"""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import charts
import results
from presets import BATCH, THREADS
from results import Report, Row, display_name, in_order, is_peer, select

#: A CPU's speed as a multiple of the fastest of stock PyTorch, at least, in every cell of the
#: suite never_slower.
NEVER_SLOWER = 0.97
#: The numerics rule: error against float64 as a multiple of eager PyTorch's, at most.
ERROR = 2.0

#: Values of CONVMIXER_FAST_STRASSEN, and the products they select. Where the default gives the same
#: bits as one of the others, findings leave it out.
UNSET = "variable not set"
PRODUCTS = {
    "0": "direct products",
    "1": "Strassen, one level",
    "": UNSET,
}


@dataclass(frozen=True)
class Finding:
    """One headline of a report.

    ``promise``: the bound that the documentation states for it, if any; ``kept_by_rule``: the
    outcome where a rule with more terms than that bound decides.
    """

    what: str
    measured: float
    promise: float | None = None
    at_most: bool = False
    detail: str = ""
    kept_by_rule: bool | None = None

    @property
    def kept(self) -> str:
        """``yes``, ``no``, or "" where nothing is promised."""
        if self.promise is None:
            return ""
        kept = self.kept_by_rule
        if kept is None:
            worse = self.measured > self.promise if self.at_most else self.measured < self.promise
            kept = not worse
        return "yes" if kept else "no"

    def row(self) -> Row:
        shown = f"{self.measured:.2f}"
        if self.promise is None:
            return {"what": self.what, "measured": shown, "detail": self.detail}
        promise = f"{self.promise:.2f}"
        # The unrounded figure decides. Where two decimals hide the difference, three are shown.
        if shown == promise:
            shown = f"{self.measured:.3f}"
        promise = f"{'<=' if self.at_most else '>='} {promise}"
        return {
            **{"what": self.what, "measured": shown, "promise": promise},
            **{"kept": self.kept, "detail": self.detail},
        }


def _value(rows: Iterable[Row], column: str, **wanted: Any) -> float | None:
    found = [row[column] for row in select(rows, **wanted) if column in row]
    return found[0] if found else None


def _ratio(a: float | None, b: float | None) -> float | None:
    return None if a is None or not b else a / b


def best_peer(rows: list[Row]) -> Row | None:
    """The row of the fastest other system."""
    return min(filter(is_peer, rows), key=lambda row: row["ms"], default=None)


def _against_peers(what: str, group: list[Row]) -> list[Finding]:
    """Ours against the fastest other system of a group, where both were timed."""
    best = best_peer(group)
    ratio = stock_ratio(group)
    if best is None or ratio is None:
        return []
    missing = [row["system"] for row in group if "note" in row]
    detail = f"best of {len(list(filter(is_peer, group)))}: {best['system']}"
    detail += f"; not timed: {', '.join(missing)}" if missing else ""
    return [Finding(what, ratio, detail=detail)]


@dataclass(frozen=True)
class Cell:
    """One call of the suite never_slower.

    ``ratio``: speed as a multiple of the fastest of stock PyTorch, None where either was not run;
    ``by``: the backends that compute ours.
    """

    model: str
    dtype: str
    threads: int
    batch: int
    side: int
    ratio: float | None
    by: str

    @property
    def slower(self) -> bool:
        return self.ratio is not None and self.ratio < NEVER_SLOWER

    def __str__(self) -> str:
        at = f"batch {self.batch}, {self.side} px, threads {self.threads}"
        return f"{self.model}, {self.dtype}, {at}"


def computed_by(explanation: Iterable[Any]) -> str:
    """Backends and reasons of an `Explanation`, each once, with its operators."""
    ops: dict[tuple[str, str], list[str]] = {}
    for row in explanation:
        names = ops.setdefault((row.backend, row.reason), [])
        if row.op not in names:
            names.append(row.op)
    return "; ".join(f"{', '.join(names)}: {b} ({why})" for (b, why), names in ops.items())


def stock_ratio(cell: list[Row]) -> float | None:
    """Speed of ours as a multiple of the fastest other system of a group."""
    best = best_peer(cell)
    return _ratio(best["ms"] if best else None, _value(cell, "ms", system="ours"))


def cells(rows: Iterable[Row]) -> list[Cell]:
    """Every cell of the suite never_slower, in the order of the rows."""
    groups: dict[str, list[Row]] = {}
    for row in select(rows, suite="never_slower"):
        groups.setdefault(row["group"], []).append(row)
    found = []
    for group in groups.values():
        ours = next(row for row in group if row["system"] == "ours")
        at = {key: ours[key] for key in ("model", "dtype", "threads", "batch", "side")}
        found.append(Cell(**at, ratio=stock_ratio(group), by=ours.get("computed by", "")))
    return found


def cell_table(found: Iterable[Cell]) -> tuple[tuple[str, ...], list[Row]]:
    """Columns and rows of the cells: a row for each model, dtype and thread count.

    A ratio below `NEVER_SLOWER` is bold; "not run": ours, or all of stock PyTorch, was not.
    """
    found = list(found)
    places = sorted({(c.batch, c.side) for c in found})
    lines: dict[tuple[str, str, int], list[Cell]] = {}
    for c in found:
        lines.setdefault((c.model, c.dtype, c.threads), []).append(c)
    rows = []
    for (model, dtype, threads), line in lines.items():
        row: Row = {"model": model, "dtype": dtype, "threads": threads}
        computed: dict[str, list[str]] = {}
        for c in line:
            name = f"{c.batch} x {c.side}"
            text = "not run" if c.ratio is None else f"{c.ratio:.2f}"
            row[name] = f"**{c.ratio:.3f}**" if c.slower else text
            if c.by:
                computed.setdefault(c.by, []).append(name)
        most = max(computed, key=lambda by: len(computed[by]), default="")
        others = [f"{', '.join(at)}: {by}" for by, at in computed.items() if by != most]
        row["computed by"] = ". ".join([most, *others])
        rows.append(row)
    columns = (*("model", "dtype", "threads"), *(f"{b} x {side}" for b, side in places))
    return (*columns, "computed by"), rows


def _found(what: str, measured: float | None, detail: str = "") -> list[Finding]:
    """A finding without a promise; none where nothing was measured."""
    return [] if measured is None else [Finding(what, measured, detail=detail)]


def cpu_findings(report: Report) -> list[Finding]:
    """Headlines of a CPU's suites, in the order of their weight."""
    rows = [row for row in report["rows"] if "device" not in row]
    whole = select(rows, suite="models", batch=BATCH, threads=THREADS)
    models = list(dict.fromkeys(row["model"] for row in whole))
    at = f"batch {BATCH}, {THREADS} threads"
    found: list[Finding] = []
    for model in models:
        share = _value(whole, "of peak", model=model, system="ours")
        found += _found(f"{model}, of peak, {at}", share)
    for model in models:
        what = f"{model}, speed against the best peer, {at}"
        found += _against_peers(what, select(whole, model=model))
    found += _scaling_findings(rows)

    measured = [cell for cell in cells(rows) if cell.ratio is not None]
    for model in dict.fromkeys(cell.model for cell in measured):
        own = {cell: cell.ratio for cell in measured if cell.model == model}
        slowest = min(own, key=lambda cell: cell.ratio or 0.0)
        what = f"{model}, slowest cell against the best of stock PyTorch"
        detail = f"{slowest}; {sum(c.slower for c in own)} of {len(own)} cells are below"
        found.append(Finding(what, own[slowest] or 0.0, NEVER_SLOWER, detail=detail))

    for row in select(rows, suite="kernels", part="depthwise half", system="ours", threads=THREADS):
        what = f"depthwise half, {row['model']}, batch {row['batch']}, of peak"
        found += _found(what, row.get("of peak"))
    found += _memory_findings(rows)
    for row in select(rows, suite="numerics"):
        products = row["system"].removeprefix("ours, ")
        if "within rule" not in row or (products == UNSET and "note" in row):
            continue
        worst = max(row["max / eager's"], row["rms / eager's"])
        what = f"{row['model']}, error against eager's, {products}"
        detail = f"max {row['max error']:.1e}, rms {row['rms error']:.1e}"
        detail += f"; {row['note']}" if "note" in row else ""
        found.append(Finding(what, worst, ERROR, True, detail, row["within rule"]))
    return found


def _scaling_findings(rows: list[Row]) -> list[Finding]:
    """Batch 1 against a batch, two threads against one, a large image against the usual size."""
    scaling = select(rows, suite="scaling", system="ours")
    models = list(dict.fromkeys(row["model"] for row in scaling))
    found: list[Finding] = []
    for model in models:
        mine = [r for r in select(scaling, model=model) if "side" not in r]
        full = _value(mine, "img/s", batch=BATCH, threads=THREADS)
        one = _value(mine, "img/s", batch=1, threads=THREADS)
        what = f"{model}, batch 1 against batch {BATCH}, {THREADS} threads"
        found += _found(what, _ratio(one, full))
    for model in models:
        mine = [r for r in select(scaling, model=model) if "side" not in r]
        full = _value(mine, "img/s", batch=BATCH, threads=2)
        single = _value(mine, "img/s", batch=BATCH, threads=1)
        peaks = select(rows, suite="scaling", group=model, system="peak")
        own = _ratio(_value(peaks, "GMAC/s", threads=2), _value(peaks, "GMAC/s", threads=1))
        detail = "" if own is None else f"the loop of multiply-adds itself: {own:.2f}"
        what = f"{model}, 2 threads against 1, batch {BATCH}"
        found += _found(what, _ratio(full, single), detail)
    for model in models:
        sides = [r for r in select(scaling, model=model, threads=THREADS) if "side" in r]
        if not sides:
            continue
        big, usual = (pick(sides, key=lambda r: r["side"]) for pick in (max, min))
        what = f"{model}, {big['side']} px against {usual['side']} px, time for a patch"
        detail = f"1 image against {usual['batch']}: about the same number of patches"
        found += _found(what, _ratio(big["ns / patch"], usual["ns / patch"]), detail)
    return found


def _memory_findings(rows: list[Row]) -> list[Finding]:
    memory = select(rows, suite="memory")
    found: list[Finding] = []
    for model in dict.fromkeys(r["model"] for r in memory):
        mine = select(memory, model=model)
        ratios = {}
        for batch in dict.fromkeys(r["batch"] for r in mine):
            ours, eager = (
                _value(mine, "MiB", batch=batch, system=s) for s in ("ours", "eager NCHW")
            )
            ratio = _ratio(ours, eager)
            if ratio is not None:
                ratios[batch] = ratio
        if ratios:
            worst = max(ratios, key=lambda batch: ratios[batch])
            detail = f"worst of batches {', '.join(map(str, ratios))}: {worst}"
            what = f"{model}, peak memory of the process against eager"
            found += _found(what, ratios[worst], detail)
    return found


def gpu_findings(report: Report) -> list[Finding]:
    """Whole models on a GPU against the fastest other system."""
    rows = [row for row in select(report["rows"], suite="models") if "device" in row]
    groups = dict.fromkeys(row["group"] for row in rows)
    found: list[Finding] = []
    for group in groups:
        found += _against_peers(f"{group}, speed against the best peer", select(rows, group=group))
    return found


def inference_findings(report: Report) -> list[Finding]:
    """Headlines of files to results."""
    rows = report["rows"]
    found: list[Finding] = []
    for row in select(rows, suite="pipeline"):
        what = f"{row['model']} model, CPU ms an image besides decoding and the model"
        found += _found(what, row["overhead ms"])
        what = f"{row['model']} model, files to results against the model alone"
        detail = f"decoding alone {row['decode ms']:.1f} ms, the model {row['model ms']:.1f} ms"
        # Where decoding takes longer than the model, decoding is the limit.
        keeps_up = row["cores"] > 1 and row["decode ms"] <= row["model ms"] * (row["cores"] - 1)
        measured = row["of the model alone"] if keeps_up else row["of the limit"]
        if not keeps_up:
            detail += "; against the limit of decoding and the model together"
        elif row.get("of the model beside"):
            beside = row["of the model beside"]
            detail += f"; against the model while other cores decode: {beside:.2f}"
        found += _found(what, measured, detail)
    for row in select(rows, suite="kills"):
        lost = float(row["missing"] + row["repeated"] + row["wrongly failed"])
        kills = f"{row['kills']} kills, {row['results']}"
        what = f"images lost, doubled or wrongly failed after {kills}"
        detail = f"of {row['images']}: {row['rows']} rows, {row['errors']} errors"
        found.append(Finding(what, lost, 0.0, True, detail))
    actors = select(rows, suite="ray")
    # The start is included: the first images of several actors come out together, uncounted.
    two, one = (
        next((r["img/s with start"] for r in actors if r["system"].startswith(f"Ray, {n} ")), None)
        for n in (2, 1)
    )
    found += _found("Ray, 2 actors against 1, with the start", _ratio(two, one))
    return found


def streaming_findings(report: Report) -> list[Finding]:
    """Headlines of streams: memory and time by height, time against the whole image."""
    found: list[Finding] = []
    heights = select(report["rows"], suite="heights", system="stream")
    for group in dict.fromkeys(row["group"] for row in heights):
        mine = select(heights, group=group)
        detail = f"heights {', '.join(str(row['height']) for row in mine)}"
        for column, what in (("MiB", "peak memory"), ("us a row", "time of a row")):
            values = [row[column] for row in mine]
            ratio = _ratio(max(values), min(values))
            found += _found(f"stream, {what}, most / least, {group}", ratio, detail)
    times = select(report["rows"], suite="times")
    for group in dict.fromkeys(row["group"] for row in times):
        mine = select(times, group=group)
        stream, whole = (_value(mine, "s", system=s) for s in ("stream", "whole"))
        found += _found(f"time of a stream / of the whole image, {group}", _ratio(stream, whole))
    return found


def findings(report: Report) -> list[Finding]:
    """Headlines of every suite that the report has rows of."""
    parts = (cpu_findings, gpu_findings, inference_findings, streaming_findings)
    return [finding for part in parts for finding in part(report)]


@dataclass(frozen=True)
class Table:
    """Title, text, columns and rows of one suite."""

    title: str
    about: str
    columns: tuple[str, ...]
    rows: list[Row]
    suite: str = ""


def column_names(text: str) -> tuple[str, ...]:
    return tuple(text.split(", "))


#: suite -> title, explanation, columns.
_SUITES: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "models": (
        "Whole models",
        "Medians of interleaved rounds in one process. Every output is checked first. `ours is "
        "faster`: speed of ours as a multiple of that system's. `of peak`: all multiply-adds, "
        "against a loop of multiply-adds on registers. `of limit`: on a GPU, the time that its "
        "measured rates of arithmetic and memory allow, divided by the time taken. `GB/s`: bytes "
        "that each half of a block must move once. `cores`: CPU seconds a second. `peak MiB`: "
        "memory of the whole process, on a GPU of its allocator, while the system ran. `error / "
        "eager's`: the largest error against float64, as a multiple of eager PyTorch's.",
        column_names(
            "device, dtype, model, batch, threads, system, img/s, ours is faster, GMAC/s, GB/s, "
            "of peak, of limit, ms, p20 ms, p80 ms, rounds, cores, peak MiB, error / eager's, note"
        ),
    ),
    "kernels": (
        "One block and its halves",
        "For every system the C library keeps freed memory, so that fresh outputs are not new "
        "pages. `faults`: page faults a call.",
        column_names(
            "device, dtype, model, batch, threads, part, system, ours is faster, GMAC/s, GB/s, "
            "of peak, of limit, ms, p20 ms, p80 ms, rounds, cores, peak MiB, faults, note"
        ),
    ),
    "scaling": (
        "Ours against itself",
        "The rows of a model were measured in the same rounds. A patch is one position of the "
        "grid.",
        column_names(
            "model, side, batch, threads, system, img/s, of peak, GMAC/s, GB/s, ns / patch, ms, "
            "p20 ms, p80 ms, rounds, cores, peak MiB"
        ),
    ),
    "steps": (
        "Step by step",
        "Each row changes one thing in the row before it, in the same rounds. The last row is the "
        "model as it is used.",
        column_names(
            "device, dtype, model, batch, threads, system, ms, of peak, of limit, GMAC/s, GB/s, "
            "img/s, p20 ms, p80 ms, rounds, peak MiB"
        ),
    ),
    "training": (
        "A training step",
        "Forward, backward and SGD. While BatchNorm gathers batch statistics, our modules run "
        "their children one by one, at PyTorch's speed. `GMAC/s` counts the forward pass and both "
        "gradients.",
        column_names(
            "device, dtype, model, batch, threads, system, img/s, ours is faster, GMAC/s, GB/s, "
            "of peak, ms, p20 ms, p80 ms, rounds, peak MiB"
        ),
    ),
    "resolution": (
        "Larger images and batches",
        "A patch is one position of the grid. Equal cost for each patch is the ideal.",
        column_names(
            "device, dtype, model, side, batch, threads, system, img/s, ours is faster, GMAC/s, "
            "GB/s, of peak, of limit, ns / patch, ms, p20 ms, p80 ms, rounds, peak MiB, note"
        ),
    ),
    "never_slower": (
        "Never slower than stock PyTorch",
        "Speed of ours under `auto` as a multiple of eager PyTorch's in its faster layout, NCHW "
        "or channels-last. Medians of interleaved rounds. Every output is checked first. Columns: "
        f"batch x side in pixels. Bold: below {NEVER_SLOWER}. not run: one call of stock PyTorch, "
        "or of both, would take too long; the notes of the rows say how long. dtype: that of model "
        "and images; autocast is a float32 model under torch.autocast in bfloat16; reduced is a "
        "float32 model whose GEMMs oneDNN may compute in bfloat16. `computed by`: the rows of "
        "`explain` for most cells, then for the others.",
        (),
    ),
    "memory": (
        "Peak memory",
        "Of a fresh process that builds the model and runs it twice: in total, and above the "
        "imports.",
        column_names("model, batch, system, MiB, MiB above imports"),
    ),
    "numerics": (
        "Error against float64",
        "Of the logits. The rule allows twice eager PyTorch's largest and root-mean-square error.",
        column_names(
            "model, batch, system, max error, max / eager's, rms error, rms / eager's, "
            "within rule, note"
        ),
    ),
    "pipeline": (
        "Files to results",
        "The model on one thread, decoders on the other cores. `model ms`: the model alone. `model "
        "beside ms`: the model while the other cores decode unrelated images, because cores share "
        "caches, memory and power. `of the limit`: against the model and decoding in parallel on "
        "these cores. `waiting`: share of the time in which the model waits for images. `overhead "
        "ms`: CPU time an image, less decoding alone and the model alone.",
        column_names(
            "model, shape, images, cores, model ms, model beside ms, decode ms, whole ms, img/s, "
            "of the model alone, of the model beside, of the limit, waiting, CPU ms, overhead ms"
        ),
    ),
    "kills": (
        "Every image once",
        "`convmixer-fast predict --resume`, killed by kill -9 at random moments and started again.",
        column_names(
            "results, images, broken, kills, rows, errors, missing, repeated, wrongly failed, "
            "left over, seconds"
        ),
    ),
    "ray": (
        "Ray",
        "An actor decodes and computes on one core. `start s`: time until the first images come "
        "out; img/s is counted from there.",
        column_names("system, model, images, img/s, start s, img/s with start"),
    ),
    "overheads": (
        "Overheads",
        "",
        column_names("what, model, batch, ms, p20 ms, p80 ms, of forward"),
    ),
    "heights": (
        "Streams: memory and time by height",
        "Peak memory of a process: in total, and above its memory before the image. `formula "
        "MiB`: the stream's buffers by arithmetic. `seconds` of a stream: one image, the median "
        "of `turns` turns of equally many rows.",
        column_names(
            "model, height, width, system, bands, formula MiB, MiB above start, MiB, seconds, "
            "us a row, turns, note"
        ),
    ),
    "times": (
        "Streams: time against the whole image",
        "The same model in one process, in turns. `us/kpx`: microseconds for a thousand classified "
        "pixels; a tile with a halo of exact width classifies its middle only. `work`: computed "
        "pixels for each classified one. `off`: the largest difference of the logits from the "
        "whole image's, relative to the largest logit.",
        column_names(
            "model, height, width, system, bands, exact, off, s, p20, p80, us/kpx, "
            "against whole, halo px, work"
        ),
    ),
}


#: Suites whose groups have rows of ours and of others.
_COMPARED = ("models", "kernels", "training", "resolution")


def _with_speed_up(rows: list[Row]) -> list[Row]:
    """Rows with ``ours is faster``: speed of ours as a multiple of that row's system."""
    ours = {
        (r["group"], r.get("part")): r["ms"]
        for r in rows
        if r.get("system") == "ours" and "ms" in r
    }
    out = []
    for row in rows:
        mine = ours.get((row["group"], row.get("part")))
        compared = mine is not None and is_peer(row)
        out.append({**row, "ours is faster": row["ms"] / mine} if compared else row)
    return out


def _with_whole_image(rows: list[Row]) -> list[Row]:
    """Rows with ``against whole``: time for a pixel, divided by the whole image's."""
    whole = {row["group"]: row["us/kpx"] for row in rows if row["system"] == "whole"}
    return [{**row, "against whole": row["us/kpx"] / whole[row["group"]]} for row in rows]


#: Explanation of the first table.
_HOW_TO_READ = (
    "Ratios where no unit is given; 1.00 means equal. `promise`: the bound that the documentation "
    "states, >= at least or <= at most. `kept`: whether the figure is within it."
)
#: Suites whose findings are for one thread count and batch.
_SET_UP = {"models", "scaling", "kernels"}


def tables(report: Report) -> list[Table]:
    """The findings, and a table for each suite."""
    found = []
    for suite, (title, about, columns) in _SUITES.items():
        rows = select(report["rows"], suite=suite)
        if suite in _COMPARED:
            rows = in_order(_with_speed_up(rows))
        if suite == "times":
            rows = _with_whole_image(rows)
        if suite == "never_slower":
            columns, rows = cell_table(cells(rows))
        if rows:
            shown = tuple(c for c in columns if any(c in row for row in rows))
            found.append(Table(title, about, shown, rows, suite))
    lines = [finding.row() for finding in findings(report)]
    about = _HOW_TO_READ
    if any(row["suite"] in _SET_UP and "device" not in row for row in report["rows"]):
        about += (
            f" On a CPU float32, batch {BATCH} and {THREADS} threads unless a row says otherwise. "
            "of peak: all multiply-adds of the model, against a loop of multiply-adds on registers "
            "in the same rounds."
        )
    columns = column_names("what, measured, promise, kept, detail")
    shown = tuple(c for c in columns if any(row.get(c) for row in lines))
    return [Table("Summary", about, shown, lines), *found] if lines else found


def cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.0f}" if 1000 <= abs(value) < 1e7 else f"{value:.3g}"
    return "" if value is None else display_name(str(value))


def heading(report: Report) -> list[str]:
    """The machine, and a line of software for each run."""
    machine = report["machine"]
    cores = "1 core" if machine["cores"] == 1 else f"{machine['cores']} cores"
    first = f"{machine['cpu']}, {cores}, {machine['isa']}, {machine['system']}."
    lines = [first]
    for run in report["runs"]:
        lines.append(", ".join(f"{k} {v}" for k, v in run.items() if v) + ".")
    engines = {run.get("engine") for run in report["runs"]}
    if len(engines) > 1:
        lines.append(
            f"The rows come from {len(engines)} builds of the engine: measure again to compare."
        )
    return lines


def text(report: Report, shown: Iterable[Table]) -> str:
    """Tables of a report as plain text for a terminal."""
    parts = ["\n".join(heading(report))]
    for table in shown:
        lines = [list(table.columns)]
        lines += [[cell(row.get(c)) for c in table.columns] for row in table.rows]
        widths = [max(len(line[i]) for line in lines) for i in range(len(table.columns))]
        body = [
            "  ".join(part.ljust(width) for part, width in zip(line, widths, strict=True)).rstrip()
            for line in lines
        ]
        about = textwrap.wrap(table.about.replace("`", ""), width=100)
        parts.append("\n".join([table.title, *about, *body]))
    return "\n\n".join(parts)


def grid(table: Table) -> list[str]:
    """The lines of a table in Markdown, without its title."""
    lines = ["| " + " | ".join(table.columns) + " |", "|" + "---|" * len(table.columns)]
    for row in table.rows:
        cells = [cell(row.get(c)).replace("|", "/") for c in table.columns]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def markdown(report: Report, drawn: Sequence[str] = ()) -> str:
    """All tables as Markdown, with links to the charts."""
    lines = ["# " + report["machine"]["name"], ""]
    lines += ["\n\n".join(heading(report))]
    for table in tables(report):
        lines += ["", f"## {table.title}", ""]
        lines += [table.about, ""] if table.about else []
        for name in drawn:
            chart = name.removesuffix(".svg").rpartition("-")[2]
            if charts.CHARTS[chart][0] == table.suite:
                lines += [f"![{name}]({name})", ""]
        lines += grid(table)
    return "\n".join(lines) + "\n"


def write(path: Path) -> list[Path]:
    """Write the Markdown and the charts of a JSON file next to it; returns their paths.

    Raises:
        ValueError: the file is missing, or is no report.
    """
    report = results.load(path)
    if report is None:
        raise ValueError(f"there is no {path}")
    drawn = [
        chart
        for name in charts.CHARTS
        for chart in [path.with_name(f"{path.stem}-{name}.svg")]
        if charts.draw(report, name, chart)
    ]
    table = path.with_suffix(".md")
    table.write_text(markdown(report, [c.name for c in drawn]))
    return [table, *drawn]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("rows", type=Path, nargs="*", help="JSON files written by --rows")
    parser.add_argument(
        "--readme", action="store_true", help="update the figures of README.md and docs/"
    )
    options = parser.parse_args()
    if not options.rows and not options.readme:
        parser.error("name JSON files, or pass --readme")
    if options.readme:
        # The figures are made of this module's tables: the import cannot stand at the top.
        import figures

        print("\n".join(figures.update()))
    for path in options.rows:
        try:
            print(", ".join(str(p) for p in write(path)))
        except ValueError as error:
            parser.error(str(error))


if __name__ == "__main__":
    main()
