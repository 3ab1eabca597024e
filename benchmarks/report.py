"""Which picture do the measured rows make? Tables, the bars they are held against, and charts.

    python benchmarks/report.py benchmarks/results/MACHINE/cpu.json

writes cpu.md and the charts beside the file (`cpu.py` does so by itself).

    python benchmarks/report.py --readme

puts the figures of all results into README.md and docs/ again.
"""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import charts
import figures
import results
from presets import BATCH, THREADS
from results import Report, Row, in_order, select

#: Of a CPU's measured peak, (at least, aim).
OF_PEAK = {"1536/20": (0.90, 1.00), "768/32": (0.88, 0.95), "1024/20": (0.85, 0.92)}
#: Times faster than the best of all peers in the same group.
SPEED_UP = {"1536/20": (1.3, 1.45), "768/32": (1.3, 1.45), "1024/20": (1.45, 1.6)}
#: Of the peak, the depthwise half alone.
DEPTHWISE = (0.55, 0.75)
#: Images a second at batch 1, as a share of those at `BATCH`.
BATCH_1 = 0.90
#: Images a second on 2 threads against 1.
TWO_THREADS = 1.9
#: At most: time for a patch of a large image against the usual size.
LARGE = 1.1
#: At most: peak memory of the process against eager PyTorch's.
MEMORY = 1.0
#: At most: error against float64 as a multiple of eager PyTorch's.
ERROR = 2.0

#: On a CPU, times the speed of the best of stock PyTorch, in every cell of the suite never_slower.
NEVER_SLOWER = 0.97

#: On a GPU, times faster than the best of what stock PyTorch and TensorRT offer: never slower.
GPU_SPEED_UP = 1.0

#: Images a second of files to results, as a share of the model alone.
OF_MODEL = 0.95
#: At most: CPU milliseconds for an image, besides decoding and the model.
PIPELINE_MS = 2.0

#: What CONVMIXER_FAST_STRASSEN asks for. A default that is one of these is not told twice.
UNSET = "variable not set"
PRODUCTS = {
    "0": "direct products",
    "1": "Strassen, one level",
    "": UNSET,
}


@dataclass(frozen=True)
class Line:
    """One promise and what became of it. ``measured`` is None where no row tells."""

    what: str
    measured: float | None
    bar: float
    aim: float | None = None
    at_most: bool = False
    detail: str = ""
    met_by_rule: bool | None = None

    @property
    def met(self) -> str:
        """yes, no, or "" where nothing was measured."""
        if self.measured is None:
            return ""
        if self.met_by_rule is not None:
            return "yes" if self.met_by_rule else "no"
        if self.at_most:
            return "yes" if self.measured <= self.bar else "no"
        return "yes" if self.measured >= self.bar else "no"

    def shortfall(self) -> float:
        """How many times the figure is worse than the bar; below 1 where it is better."""
        assert self.measured is not None
        worse = (self.measured, self.bar) if self.at_most else (self.bar, self.measured)
        return worse[0] / worse[1] if worse[1] else float("inf")

    def row(self) -> Row:
        sign = "<=" if self.at_most else ">="
        row: Row = {"what": self.what, "bar": f"{sign} {self.bar:.2f}"}
        row["aim"] = "" if self.aim is None else f"{sign} {self.aim:.2f}"
        row["measured"] = "not measured" if self.measured is None else f"{self.measured:.2f}"
        # The bar is asked of the figure itself; where two decimals hide the difference, show three.
        if self.measured is not None and row["measured"] == f"{self.bar:.2f}":
            row["measured"] = f"{self.measured:.3f}"
        return {**row, "met": self.met, "detail": self.detail}


def _value(rows: Iterable[Row], column: str, **wanted: Any) -> float | None:
    found = [row[column] for row in select(rows, **wanted) if column in row]
    return found[0] if found else None


def _ratio(a: float | None, b: float | None) -> float | None:
    return None if a is None or not b else a / b


def is_peer(row: Row) -> bool:
    """Whether a row is a measured one of another system than ours: neither limits nor notes are."""
    return "ms" in row and not row["system"].startswith(("ours", "peak", "limit"))


def best_peer(rows: list[Row]) -> Row | None:
    return min(filter(is_peer, rows), key=lambda row: row["ms"], default=None)


def _against_peers(what: str, group: list[Row], *bars: float) -> Line:
    """Ours against the fastest other system of a group."""
    best = best_peer(group)
    detail = ""
    if best is not None:
        missing = [r["system"] for r in group if "note" in r]
        detail = f"best of {len(list(filter(is_peer, group)))}: {best['system']}"
        detail += f"; not timed: {', '.join(missing)}" if missing else ""
    speed_up = _ratio(best["ms"] if best else None, _value(group, "ms", system="ours"))
    return Line(what, speed_up, *bars, detail=detail)


@dataclass(frozen=True)
class Cell:
    """One call of the suite never_slower.

    ``ratio``: times the speed of the best of stock PyTorch, None where either was not run; ``by``:
    what computes ours.
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
    """Backends and reasons of an `Explanation`, each once, with the operators they are of."""
    ops: dict[tuple[str, str], list[str]] = {}
    for row in explanation:
        names = ops.setdefault((row.backend, row.reason), [])
        if row.op not in names:
            names.append(row.op)
    return "; ".join(f"{', '.join(names)}: {b} ({why})" for (b, why), names in ops.items())


def stock_ratio(cell: list[Row]) -> float | None:
    """Times the speed of the best of stock PyTorch, of one cell's rows."""
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


def summary(report: Report) -> list[Line]:
    """Every promise, in the order of their weight, held against the rows."""
    rows = report["rows"]
    whole = select(rows, suite="models", batch=BATCH, threads=THREADS)
    at = f"batch {BATCH}, {THREADS} threads"
    lines = [
        Line(f"{model}, of peak, {at}", _value(whole, "of peak", model=model, system="ours"), *bars)
        for model, bars in OF_PEAK.items()
    ]
    for model, bars in SPEED_UP.items():
        what = f"{model}, speed against the best peer, {at}"
        lines.append(_against_peers(what, select(whole, model=model), *bars))

    scaling = select(rows, suite="scaling", system="ours")
    for model in OF_PEAK:
        mine = [r for r in select(scaling, model=model) if "side" not in r]
        full = _value(mine, "img/s", batch=BATCH, threads=THREADS)
        one = _value(mine, "img/s", batch=1, threads=THREADS)
        what = f"{model}, batch 1 against batch {BATCH}, {THREADS} threads"
        lines.append(Line(what, _ratio(one, full), BATCH_1))
    for model in OF_PEAK:
        mine = [r for r in select(scaling, model=model) if "side" not in r]
        full = _value(mine, "img/s", batch=BATCH, threads=2)
        single = _value(mine, "img/s", batch=BATCH, threads=1)
        peaks = select(rows, suite="scaling", group=model, system="peak")
        own = _ratio(_value(peaks, "GMAC/s", threads=2), _value(peaks, "GMAC/s", threads=1))
        detail = "" if own is None else f"the loop of multiply-adds itself: {own:.2f}"
        what = f"{model}, 2 threads against 1, batch {BATCH}"
        lines.append(Line(what, _ratio(full, single), TWO_THREADS, detail=detail))
    large = [r for r in scaling if "side" in r and r["threads"] == THREADS]
    for model in dict.fromkeys(r["model"] for r in large) or ["large image"]:
        big, usual = (
            pick([r for r in large if r["model"] == model], key=lambda r: r["side"], default=None)
            for pick in (max, min)
        )
        if big is None or usual is None:
            lines.append(
                Line(
                    "a large image against the usual size, time for a patch",
                    None,
                    LARGE,
                    at_most=True,
                )
            )
            continue
        what = f"{model}, {big['side']} px against {usual['side']} px, time for a patch"
        detail = f"1 image against {usual['batch']}: about the same number of patches"
        ratio = _ratio(big["ns / patch"], usual["ns / patch"])
        lines.append(Line(what, ratio, LARGE, at_most=True, detail=detail))

    measured = [cell for cell in cells(rows) if cell.ratio is not None]
    for model in dict.fromkeys(cell.model for cell in measured):
        own = {cell: cell.ratio for cell in measured if cell.model == model}
        slowest = min(own, key=lambda cell: cell.ratio or 0.0)
        what = f"{model}, slowest cell against the best of stock PyTorch"
        detail = f"{slowest}; {sum(c.slower for c in own)} of {len(own)} cells are below"
        lines.append(Line(what, own[slowest], NEVER_SLOWER, detail=detail))

    halves = select(rows, suite="kernels", part="depthwise half", system="ours", threads=THREADS)
    for row in halves:
        what = f"depthwise half, {row['model']}, batch {row['batch']}, of peak"
        lines.append(Line(what, row.get("of peak"), *DEPTHWISE))
    if not halves:
        lines.append(Line("depthwise half, of peak", None, *DEPTHWISE))

    memory = select(rows, suite="memory")
    for model in dict.fromkeys(r["model"] for r in memory):
        pairs = {
            batch: _ratio(
                *(_value(memory, "MiB", model=model, batch=batch, system=s) for s in pair)
            )
            for batch in dict.fromkeys(r["batch"] for r in memory if r["model"] == model)
            for pair in [("ours", "eager NCHW")]
        }
        known = {batch: ratio for batch, ratio in pairs.items() if ratio is not None}
        if known:
            worst = max(known, key=lambda batch: known[batch])
            detail = f"worst of batches {', '.join(map(str, known))}: {worst}"
            what = f"{model}, peak memory of the process against eager"
            lines.append(Line(what, known[worst], MEMORY, at_most=True, detail=detail))
    for row in select(rows, suite="numerics"):
        products = row["system"].removeprefix("ours, ")
        if "within rule" not in row or (products == UNSET and "note" in row):
            continue
        worst_error = max(row["max / eager's"], row["rms / eager's"])
        what = f"{row['model']}, error against eager's, {products}"
        detail = f"max {row['max error']:.1e}, rms {row['rms error']:.1e}"
        detail += f"; {row['note']}" if "note" in row else ""
        rule = row["within rule"]
        lines.append(Line(what, worst_error, ERROR, at_most=True, detail=detail, met_by_rule=rule))
    return lines


def gpu_summary(report: Report) -> list[Line]:
    """The same of whole models on a GPU."""
    rows = [row for row in select(report["rows"], suite="models") if "device" in row]
    lines = []
    for group in dict.fromkeys(row["group"] for row in rows):
        here = select(rows, group=group)
        what = f"{group}, speed against the best peer"
        lines.append(_against_peers(what, here, GPU_SPEED_UP))
    return lines


def inference_summary(report: Report) -> list[Line]:
    """The same of files to results."""
    rows = report["rows"]
    lines = []
    for row in select(rows, suite="pipeline"):
        what = f"{row['model']} model, CPU ms an image besides decoding and the model"
        lines.append(Line(what, row["overhead ms"], PIPELINE_MS, at_most=True))
        what = f"{row['model']} model, files to results against the model alone"
        detail = f"decoding alone {row['decode ms']:.1f} ms, the model {row['model ms']:.1f} ms"
        # Where decoding takes longer than the model, it decides.
        keeps_up = row["cores"] > 1 and row["decode ms"] <= row["model ms"] * (row["cores"] - 1)
        measured = row["of the model alone"] if keeps_up else row["of the limit"]
        if not keeps_up:
            detail += "; of what decoding and the model allow together"
        elif row.get("of the model beside"):
            detail += f"; of the model while other cores decode: {row['of the model beside']:.2f}"
        lines.append(Line(what, measured, OF_MODEL, detail=detail))
    for row in select(rows, suite="kills"):
        lost = float(row["missing"] + row["repeated"] + row["wrongly failed"])
        what = (
            f"images lost, doubled or wrongly failed after {row['kills']} kills, {row['results']}"
        )
        detail = f"of {row['images']}: {row['rows']} rows, {row['errors']} errors"
        lines.append(Line(what, lost, 0.0, at_most=True, detail=detail))
    actors = select(rows, suite="ray")
    # With the start: the first images of several actors come out together, and are not counted.
    two, one = (
        next((r["img/s with start"] for r in actors if r["system"].startswith(f"Ray, {n} ")), None)
        for n in (2, 1)
    )
    if two is not None:
        lines.append(Line("Ray, 2 actors against 1, with the start", _ratio(two, one), 1.0))
    return lines


@dataclass(frozen=True)
class Table:
    """What is shown of one suite."""

    title: str
    about: str
    columns: tuple[str, ...]
    rows: list[Row]
    suite: str = ""


def column_names(text: str) -> tuple[str, ...]:
    return tuple(text.split(", "))


#: suite -> title, what the reader must know, columns.
_SUITES: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "models": (
        "Whole models",
        "Medians of interleaved rounds in one process, every output checked first. `ours is "
        "faster`: so many times than that system; `of peak`: all multiply-adds against a loop of "
        "them on registers; `of limit`: on a GPU, the time that its measured rates of arithmetic "
        "and memory allow by the time it took; `GB/s`: of bytes that must be moved once for each "
        "half of a block; `cores`: CPU seconds a second, which is what the thread count came to; "
        "`peak MiB`: memory of the whole process, on a GPU of its allocator, while the system ran; "
        "`error / eager's`: the largest error against float64.",
        column_names(
            "device, dtype, model, batch, threads, system, img/s, ours is faster, GMAC/s, GB/s, "
            "of peak, of limit, ms, p20 ms, p80 ms, rounds, cores, peak MiB, error / eager's, note"
        ),
    ),
    "kernels": (
        "One block and its halves",
        "The C library keeps freed memory, so that fresh outputs are not new pages, on all sides; "
        "`faults`: page faults a call.",
        column_names(
            "device, dtype, model, batch, threads, part, system, ours is faster, GMAC/s, GB/s, "
            "of peak, of limit, ms, p20 ms, p80 ms, rounds, cores, peak MiB, faults, note"
        ),
    ),
    "scaling": (
        "Ours against itself",
        "Each model's lines were measured in the same rounds. A patch is one position of the grid.",
        column_names(
            "model, side, batch, threads, system, img/s, of peak, GMAC/s, GB/s, ns / patch, ms, "
            "p20 ms, p80 ms, rounds, cores, peak MiB"
        ),
    ),
    "steps": (
        "Step by step",
        "Each line is the one before it with one thing changed, in the same rounds; the last is "
        "the model as it is used.",
        column_names(
            "device, dtype, model, batch, threads, system, ms, of peak, of limit, GMAC/s, GB/s, "
            "img/s, p20 ms, p80 ms, rounds, peak MiB"
        ),
    ),
    "training": (
        "A training step",
        "Forward, backward and SGD. While BatchNorm gathers batch statistics our modules run their "
        "children one by one: equal speed is what to expect. `GMAC/s` counts the forward pass and "
        "both gradients.",
        column_names(
            "device, dtype, model, batch, threads, system, img/s, ours is faster, GMAC/s, GB/s, "
            "of peak, ms, p20 ms, p80 ms, rounds, peak MiB"
        ),
    ),
    "resolution": (
        "Larger images and batches",
        "A patch is one position of the grid: equal cost for each is what to expect.",
        column_names(
            "device, dtype, model, side, batch, threads, system, img/s, ours is faster, GMAC/s, "
            "GB/s, of peak, of limit, ns / patch, ms, p20 ms, p80 ms, rounds, peak MiB, note"
        ),
    ),
    "never_slower": (
        "Never slower than stock PyTorch",
        "Ours under `auto` against the faster of eager PyTorch in NCHW and channels-last: times "
        "its speed, from medians of interleaved rounds, every output checked first. Columns: batch "
        f"x side in pixels. Bold: below {NEVER_SLOWER}. not run: one call of stock PyTorch, or of "
        "both, would take too long (the notes of the rows say how long). dtype: that of model and "
        "images; autocast is a float32 model under torch.autocast in bfloat16; reduced is a "
        "float32 model whose products oneDNN may compute in bfloat16. `computed by`: what "
        "`explain` says of most cells, then of the others.",
        (),
    ),
    "memory": (
        "Peak memory",
        "Of a fresh process that builds the model and runs it twice: all of it, and what it has "
        "above the imports.",
        column_names("model, batch, system, MiB, MiB above imports"),
    ),
    "numerics": (
        "Error against float64",
        "Of the logits; the rule is twice eager PyTorch's largest and root-mean-square error.",
        column_names(
            "model, batch, system, max error, max / eager's, rms error, rms / eager's, "
            "within rule, note"
        ),
    ),
    "pipeline": (
        "Files to results",
        "The model on one thread, decoders on the other cores. `model ms`: alone; `model beside "
        "ms`: while the other cores decode images that nobody waits for, for cores share caches, "
        "memory and power; `of the limit`: against the model and decoding side by side on these "
        "cores; `waiting`: share of the time in which the model waits for images; `overhead ms`: "
        "CPU time of the whole less that of decoding alone and of the model alone, an image.",
        column_names(
            "model, shape, images, cores, model ms, model beside ms, decode ms, whole ms, img/s, "
            "of the model alone, of the model beside, of the limit, waiting, CPU ms, overhead ms"
        ),
    ),
    "kills": (
        "Every image once",
        "`convmixer-fast predict --resume`, ended by kill -9 at random moments and started again.",
        column_names(
            "results, images, broken, kills, rows, errors, missing, repeated, wrongly failed, "
            "left over, seconds"
        ),
    ),
    "ray": (
        "Ray",
        "An actor has one core, on which it decodes and computes. `start s`: until the first "
        "images come out; img/s is counted from there.",
        column_names("system, model, images, img/s, start s, img/s with start"),
    ),
    "overheads": (
        "Overheads",
        "",
        column_names("what, model, batch, ms, p20 ms, p80 ms, of forward"),
    ),
}


#: Suites whose groups have rows of ours and of others.
_COMPARED = ("models", "kernels", "training", "resolution")


def _with_speed_up(rows: list[Row]) -> list[Row]:
    """``ours is faster``: times, than that row's system, of the same group and part."""
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


#: Suites of `inference.py`, whose promises are others.
_INFERENCE = {"pipeline", "kills", "ray"}
#: What the first table says of itself.
_HOW_TO_READ = (
    "One promise a line: `measured` is held against `bar`, >= at least or <= at most, and `met` "
    "says how that ended; `aim` is what was hoped for beyond it. Ratios, 1.00 being equal, where "
    "no unit stands."
)


def promises(report: Report, unmeasured: bool = True) -> list[Line]:
    """Those of every suite that the report has rows of; with ``unmeasured`` also those of a CPU's
    whole models that no row tells of."""
    suites = {row["suite"] for row in report["rows"]}
    lines = gpu_summary(report) + (inference_summary(report) if suites & _INFERENCE else [])
    if suites - _INFERENCE or not suites:
        on_cpu = [line for line in summary(report) if unmeasured or line.measured is not None]
        # A GPU's own file says nothing of the processor beside it.
        if any("device" not in r for r in report["rows"]) or not suites:
            lines = on_cpu + lines
    return [line for line in lines if unmeasured or line.measured is not None]


def tables(report: Report, unmeasured: bool = True) -> list[Table]:
    """The promises, with or without those no row tells of, and a table for each suite."""
    found = []
    for suite, (title, about, columns) in _SUITES.items():
        rows = select(report["rows"], suite=suite)
        if suite in _COMPARED:
            rows = in_order(_with_speed_up(rows))
        if suite == "never_slower":
            columns, rows = cell_table(cells(rows))
        if rows:
            shown = tuple(c for c in columns if any(c in row for row in rows))
            found.append(Table(title, about, shown, rows, suite))
    lines = [line.row() for line in promises(report, unmeasured)]
    about = _HOW_TO_READ
    if {row["suite"] for row in report["rows"]} - _INFERENCE:
        about += (
            f" On a CPU float32, batch {BATCH} and {THREADS} threads unless a line says otherwise; "
            "of peak: all multiply-adds of the model against a loop of them on registers alone, in "
            "the same rounds."
        )
    columns = column_names("what, bar, aim, measured, met, detail")
    shown = tuple(c for c in columns if any(row.get(c) for row in lines))
    return [Table("What it shows", about, shown, lines), *found] if lines else found


def cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.0f}" if 1000 <= abs(value) < 1e7 else f"{value:.3g}"
    return "" if value is None else str(value)


def heading(report: Report) -> list[str]:
    """The machine and the software, a line for each run."""
    machine = report["machine"]
    cores = "1 core" if machine["cores"] == 1 else f"{machine['cores']} cores"
    first = f"{machine['cpu']}, {cores}, {machine['isa']}, {machine['system']}."
    lines = [first]
    for run in report["runs"]:
        lines.append(", ".join(f"{k} {v}" for k, v in run.items() if v) + ".")
    engines = {run.get("engine") for run in report["runs"]}
    if len(engines) > 1:
        lines.append(
            f"The rows are of {len(engines)} builds of the engine: measure again to mend it."
        )
    return lines


def text(report: Report, shown: Iterable[Table]) -> str:
    """Tables of a report as plain text, for a terminal."""
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
    """Everything as Markdown, with links to the charts."""
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
    """Write the Markdown and the charts of a JSON file beside it; returns what was written.

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
        "--readme", action="store_true", help="put the figures into README.md and docs/ again"
    )
    options = parser.parse_args()
    if not options.rows and not options.readme:
        parser.error("name JSON files, or pass --readme")
    if options.readme:
        print("\n".join(figures.update()))
    for path in options.rows:
        try:
            print(", ".join(str(p) for p in write(path)))
        except ValueError as error:
            parser.error(str(error))


if __name__ == "__main__":
    main()
