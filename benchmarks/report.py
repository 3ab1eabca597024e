"""Which picture do the measured rows make? Tables, the bars they are held against, and charts.

    python benchmarks/report.py benchmarks/results/MACHINE/cpu.json

writes cpu.md, cpu-models.svg and cpu-kernels.svg beside the file. (`cpu.py` does so by itself.)
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import results
from presets import BATCH, THREADS
from results import Report, Row

#: Of the machine's peak, (at least, aim).
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

#: What CONVMIXER_FAST_STRASSEN asks for. A default that is one of these is not told twice.
UNSET = "variable not set"
PRODUCTS = {
    "0": "direct products",
    "1": "Strassen, one level",
    "2": "Strassen, two levels",
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

    def row(self) -> Row:
        sign = "<=" if self.at_most else ">="
        row: Row = {"what": self.what, "bar": f"{sign} {self.bar:.2f}"}
        row["aim"] = "" if self.aim is None else f"{sign} {self.aim:.2f}"
        row["measured"] = "not measured" if self.measured is None else f"{self.measured:.2f}"
        # The bar is asked of the figure itself; where two decimals hide the difference, show three.
        if self.measured is not None and row["measured"] == f"{self.bar:.2f}":
            row["measured"] = f"{self.measured:.3f}"
        return {**row, "met": self.met, "detail": self.detail}


def _select(rows: Iterable[Row], **wanted: Any) -> list[Row]:
    return [row for row in rows if all(row.get(k) == v for k, v in wanted.items())]


def _value(rows: Iterable[Row], column: str, **wanted: Any) -> float | None:
    found = [row[column] for row in _select(rows, **wanted) if column in row]
    return found[0] if found else None


def _ratio(a: float | None, b: float | None) -> float | None:
    return None if a is None or not b else a / b


def _best_peer(rows: list[Row]) -> Row | None:
    peers = [r for r in rows if "ms" in r and r["system"] not in ("ours", "peak")]
    return min(peers, key=lambda row: row["ms"], default=None)


def summary(report: Report) -> list[Line]:
    """Every promise, in the order of their weight, held against the rows."""
    rows = report["rows"]
    whole = _select(rows, suite="models", batch=BATCH, threads=THREADS)
    at = f"batch {BATCH}, {THREADS} threads"
    lines = [
        Line(f"{model}, of peak, {at}", _value(whole, "of peak", model=model, system="ours"), *bars)
        for model, bars in OF_PEAK.items()
    ]
    for model, bars in SPEED_UP.items():
        group = _select(whole, model=model)
        best, ours = _best_peer(group), _value(group, "ms", system="ours")
        detail = ""
        if best is not None:
            timed = len([r for r in group if "ms" in r and r["system"] not in ("ours", "peak")])
            missing = [r["system"] for r in group if "note" in r]
            detail = f"best of {timed}: {best['system']}"
            detail += f"; not timed: {', '.join(missing)}" if missing else ""
        speed_up = _ratio(best["ms"] if best else None, ours)
        lines.append(
            Line(f"{model}, speed against the best peer, {at}", speed_up, *bars, detail=detail)
        )

    scaling = _select(rows, suite="scaling", system="ours")
    for model in OF_PEAK:
        mine = [r for r in _select(scaling, model=model) if "side" not in r]
        full = _value(mine, "img/s", batch=BATCH, threads=THREADS)
        one = _value(mine, "img/s", batch=1, threads=THREADS)
        what = f"{model}, batch 1 against batch {BATCH}, {THREADS} threads"
        lines.append(Line(what, _ratio(one, full), BATCH_1))
    for model in OF_PEAK:
        mine = [r for r in _select(scaling, model=model) if "side" not in r]
        full = _value(mine, "img/s", batch=BATCH, threads=2)
        single = _value(mine, "img/s", batch=BATCH, threads=1)
        peaks = _select(rows, suite="scaling", group=model, system="peak")
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

    halves = _select(rows, suite="kernels", part="depthwise half", system="ours", threads=THREADS)
    for row in halves:
        what = f"depthwise half, {row['model']}, batch {row['batch']}, of peak"
        lines.append(Line(what, row.get("of peak"), *DEPTHWISE))
    if not halves:
        lines.append(Line("depthwise half, of peak", None, *DEPTHWISE))

    memory = _select(rows, suite="memory")
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
    for row in _select(rows, suite="numerics"):
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


@dataclass(frozen=True)
class Table:
    """What is shown of one suite."""

    title: str
    about: str
    columns: tuple[str, ...]
    rows: list[Row]


def _columns(text: str) -> tuple[str, ...]:
    return tuple(text.split(", "))


#: suite -> title, what the reader must know, columns.
_SUITES: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "models": (
        "Whole models",
        "Medians of interleaved rounds in one process, every output checked first. `cores`: CPU "
        "seconds a second, which is what the thread count came to; `error / eager's`: the largest "
        "error against float64.",
        _columns(
            "model, batch, threads, system, img/s, GMAC/s, of peak, ours is faster, ms, p20 ms, "
            "p80 ms, rounds, cores, error / eager's, note"
        ),
    ),
    "kernels": (
        "One block and its halves",
        "The C library keeps freed memory, so that fresh outputs are not new pages, on all sides; "
        "`faults`: page faults a call.",
        _columns(
            "model, batch, threads, part, system, GMAC/s, of peak, ours is faster, ms, p20 ms, "
            "p80 ms, rounds, cores, faults, note"
        ),
    ),
    "scaling": (
        "Ours against itself",
        "Each model's lines were measured in the same rounds. A patch is one position of the grid.",
        _columns(
            "model, side, batch, threads, system, img/s, of peak, GMAC/s, ns / patch, ms, p20 ms, "
            "p80 ms, rounds, cores"
        ),
    ),
    "memory": (
        "Peak memory",
        "Of a fresh process that builds the model and runs it twice: all of it, and what it has "
        "above the imports.",
        _columns("model, batch, system, MiB, MiB above imports"),
    ),
    "numerics": (
        "Error against float64",
        "Of the logits; the rule is twice eager PyTorch's largest and root-mean-square error.",
        _columns(
            "model, batch, system, max error, max / eager's, rms error, rms / eager's, "
            "within rule, note"
        ),
    ),
    "overheads": (
        "Overheads",
        "",
        _columns("what, model, batch, ms, p20 ms, p80 ms, of forward"),
    ),
}


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
        compared = mine is not None and "ms" in row and row["system"] not in ("ours", "peak")
        out.append({**row, "ours is faster": row["ms"] / mine} if compared else row)
    return out


def _in_order(rows: list[Row]) -> list[Row]:
    """Model by model as first measured, batch by batch; a group's rows keep their order."""
    models = list(dict.fromkeys(r.get("model") for r in rows))
    return sorted(
        rows,
        key=lambda r: (models.index(r.get("model")), r.get("batch") or 0, -(r.get("threads") or 0)),
    )


def tables(report: Report, unmeasured: bool = True) -> list[Table]:
    """The summary, with or without the promises no row tells of, and a table for each suite."""
    found = []
    for suite, (title, about, columns) in _SUITES.items():
        rows = _select(report["rows"], suite=suite)
        if suite in ("models", "kernels"):
            rows = _in_order(_with_speed_up(rows))
        if rows:
            shown = tuple(c for c in columns if any(c in row for row in rows))
            found.append(Table(title, about, shown, rows))
    lines = [line.row() for line in summary(report) if unmeasured or line.measured is not None]
    about = (
        f"float32, batch {BATCH} and {THREADS} threads unless a line says otherwise. Of peak: all "
        "multiply-adds of the model against a loop of them on registers alone, in the same rounds."
    )
    first = Table(
        "What it shows", about, ("what", "bar", "aim", "measured", "met", "detail"), lines
    )
    return [first, *found] if lines else found


def cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.0f}" if 1000 <= abs(value) < 1e7 else f"{value:.3g}"
    return "" if value is None else str(value)


def _threads(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"


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
        parts.append("\n".join([table.title, *body]))
    return "\n\n".join(parts)


def grid(table: Table) -> list[str]:
    """The lines of a table in Markdown, without its title."""
    lines = ["| " + " | ".join(table.columns) + " |", "|" + "---|" * len(table.columns)]
    for row in table.rows:
        cells = [cell(row.get(c)).replace("|", "/") for c in table.columns]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def markdown(report: Report, charts: Sequence[str] = ()) -> str:
    """Everything as Markdown, with links to the charts."""
    lines = ["# " + report["machine"]["name"], ""]
    lines += ["\n\n".join(heading(report))]
    for table in tables(report):
        lines += ["", f"## {table.title}", ""]
        lines += [table.about, ""] if table.about else []
        lines += [f"![{c}]({c})" for c in charts if c.endswith(f"-{_CHARTED.get(table.title)}.svg")]
        lines += ["" for c in charts if c.endswith(f"-{_CHARTED.get(table.title)}.svg")]
        lines += grid(table)
    return "\n".join(lines) + "\n"


#: Title of a table -> the suite whose chart stands above it.
_CHARTED = {"Whole models": "models", "One block and its halves": "kernels"}


def chart(report: Report, suite: str, path: Path) -> bool:
    """Bars of the share of the machine's peak: a panel for each thread count (and half of a block),
    a group for each model and batch. Returns False, and writes nothing, where there are no rows."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "convmixer_fast"
    rows = [
        r for r in _select(report["rows"], suite=suite) if "of peak" in r and r["system"] != "peak"
    ]
    if not rows:
        return False
    key: Callable[[Row], tuple[Any, Any]] = lambda r: (r["model"], r["batch"])  # noqa: E731
    panels = list(dict.fromkeys((r["threads"], r.get("part", "")) for r in rows))
    names = list(dict.fromkeys(key(r) for r in _in_order(rows)))
    systems = list(dict.fromkeys(r["system"] for r in rows))
    size = (3.0 + 0.19 * len(names) * (len(systems) + 1), 3.2 * len(panels))
    figure, grid = pyplot.subplots(
        len(panels), figsize=size, layout="constrained", squeeze=False, sharex=True, sharey=True
    )
    width = 0.85 / len(systems)
    for (threads, part), axes in zip(panels, grid[:, 0], strict=True):
        here = [r for r in rows if (r["threads"], r.get("part", "")) == (threads, part)]
        for i, system in enumerate(systems):
            shares = {key(r): 100 * r["of peak"] for r in here if r["system"] == system}
            offset = (i - (len(systems) - 1) / 2) * width
            places = [g + offset for g, name in enumerate(names) if name in shares]
            heights = [shares[name] for name in names if name in shares]
            # The colour goes with the system, also in a panel that lacks some.
            axes.bar(places, heights, width, label=system, color=f"C{i}")
        axes.axhline(100, color="black", linewidth=0.8, linestyle="--")
        axes.set_ylabel("% of peak")
        axes.set_title(f"{part + ', ' if part else ''}{_threads(threads)}", fontsize="medium")
    # Strassen's algorithm does fewer multiply-adds than are counted: bars may pass 100.
    axes.set_ylim(0, max(105.0, 105.0 * max(r["of peak"] for r in rows)))
    axes.set_xticks(
        range(len(names)),
        [f"{m}\nbatch {b}".replace(", ", "\n") for m, b in names],
        fontsize="small",
    )
    figure.suptitle(f"{report['machine']['cpu']}, {report['runs'][-1]['date']}, float32")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize="small")
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
    return True


def write(path: Path) -> list[Path]:
    """Write the Markdown and the charts of a JSON file beside it; returns what was written.

    Raises:
        ValueError: the file is missing, or is no report.
    """
    report = results.load(path)
    if report is None:
        raise ValueError(f"there is no {path}")
    charts = [path.with_name(f"{path.stem}-{suite}.svg") for suite in _CHARTED.values()]
    charts = [
        c for c, suite in zip(charts, _CHARTED.values(), strict=True) if chart(report, suite, c)
    ]
    table = path.with_suffix(".md")
    table.write_text(markdown(report, [c.name for c in charts]))
    return [table, *charts]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("rows", type=Path, nargs="+", help="JSON files written by --rows")
    for path in parser.parse_args().rows:
        try:
            print(", ".join(str(p) for p in write(path)))
        except ValueError as error:
            parser.error(str(error))


if __name__ == "__main__":
    main()
