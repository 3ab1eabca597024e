"""Which pictures do measured rows make? One SVG a suite."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from results import Report, Row, in_order, select


def draw(report: Report, suite: str, path: Path) -> bool:
    """Draw a suite's chart; returns False, and writes nothing, where there are no rows for it."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    # Ids made from this and not from chance: the same rows give the same file.
    matplotlib.rcParams["svg.hashsalt"] = "convmixer_fast"
    rows = [r for r in select(report["rows"], suite=suite) if r.get("system") != "peak"]
    figure = CHARTS[suite](rows) if rows else None
    if figure is None:
        return False
    figure.suptitle(f"{report['machine']['cpu']}, {report['runs'][-1]['date']}, float32")
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
    return True


def _of_peak(rows: list[Row]) -> Any:
    """Bars of the share of the machine's peak: a panel for each thread count (and half of a block),
    a group for each model and batch."""
    rows = [r for r in rows if "of peak" in r]
    if not rows:
        return None
    from matplotlib import pyplot

    key: Callable[[Row], tuple[Any, Any]] = lambda r: (r["model"], r["batch"])  # noqa: E731
    panels = list(dict.fromkeys((r["threads"], r.get("part", "")) for r in rows))
    names = list(dict.fromkeys(key(r) for r in in_order(rows)))
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
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize="small")
    return figure


def _waterfall(rows: list[Row]) -> Any:
    """A panel for each model: where it starts, what each step takes off or adds, where it ends."""
    from matplotlib import pyplot

    groups = list(dict.fromkeys(r["group"] for r in rows))
    steps = max(len(select(rows, group=group)) for group in groups)
    figure, grid = pyplot.subplots(
        len(groups),
        figsize=(8.0, 0.6 + (0.36 * steps + 0.9) * len(groups)),
        layout="constrained",
        squeeze=False,
    )
    for group, axes in zip(groups, grid[:, 0], strict=True):
        here = select(rows, group=group)
        before = 0.0
        for i, row in enumerate(here):
            now = row["ms"]
            left, length = (min(before, now), abs(now - before)) if i else (0.0, now)
            colour = "C7" if not i else "C2" if now <= before else "C3"
            axes.barh(i, length, left=left, color=colour)
            axes.text(max(before, now), i, f" {now:.4g}", va="center", fontsize="small")
            before = now
        axes.set_yticks(range(len(here)), [r["system"] for r in here], fontsize="small")
        axes.invert_yaxis()
        axes.set_xlim(0, 1.12 * max(r["ms"] for r in here))
        axes.set_xlabel("milliseconds", fontsize="small")
        axes.set_title(group, fontsize="medium")
    return figure


def _memory(rows: list[Row]) -> Any:
    """Bars of what a process has above its imports."""
    from matplotlib import pyplot

    rows = in_order(rows)
    names = list(dict.fromkeys((r["model"], r["batch"]) for r in rows))
    systems = list(dict.fromkeys(r["system"] for r in rows))
    figure, axes = pyplot.subplots(
        figsize=(2.0 + 0.3 * len(names) * (len(systems) + 1), 3.4), layout="constrained"
    )
    width = 0.85 / len(systems)
    for i, system in enumerate(systems):
        found = {(r["model"], r["batch"]): r for r in select(rows, system=system)}
        places = [
            g + (i - (len(systems) - 1) / 2) * width for g, n in enumerate(names) if n in found
        ]
        heights = [found[n]["MiB above imports"] for n in names if n in found]
        axes.bar(places, heights, width, label=system, color=f"C{i}")
    axes.set_ylabel("MiB above imports, at the peak")
    axes.set_xticks(range(len(names)), [f"{m}\nbatch {b}" for m, b in names], fontsize="small")
    axes.legend(fontsize="small")
    return figure


def _resolution(rows: list[Row]) -> Any:
    """Time for a patch against the side of one image, and against the batch at the usual side."""
    from matplotlib import pyplot

    usual = {r["model"]: r["side"] for r in rows if r["batch"] > 1}
    panels: list[tuple[str, str, list[Row]]] = []
    for model in dict.fromkeys(r["model"] for r in rows):
        mine = select(rows, model=model)
        panels.append((f"{model}, batch 1", "side", select(mine, batch=1)))
        if model in usual:
            side = usual[model]
            panels.append((f"{model}, {side} px", "batch", select(mine, side=side)))
    panels = [panel for panel in panels if panel[2]]
    figure, grid = pyplot.subplots(
        1, len(panels), figsize=(4.6 * len(panels), 3.6), layout="constrained", squeeze=False
    )
    for (title, axis, here), axes in zip(panels, grid[0], strict=True):
        for i, system in enumerate(dict.fromkeys(r["system"] for r in here)):
            line = sorted((r[axis], r["ns / patch"] / 1e3) for r in select(here, system=system))
            axes.plot(*zip(*line, strict=True), marker="o", label=system, color=f"C{i}")
        ticks = sorted({r[axis] for r in here})
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [str(t) for t in ticks], fontsize="small")
        axes.set_ylim(bottom=0)
        axes.set_xlabel("side in pixels" if axis == "side" else "images in a batch")
        axes.set_ylabel("microseconds for a patch")
        axes.set_title(title, fontsize="medium")
        axes.legend(fontsize="small")
    return figure


def _threads(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"


#: Suite -> how its rows are drawn.
CHARTS: dict[str, Callable[[list[Row]], Any]] = {
    "models": _of_peak,
    "kernels": _of_peak,
    "steps": _waterfall,
    "memory": _memory,
    "resolution": _resolution,
}
