"""Charts of measured rows: one SVG a suite, two of whole models, and the README's overview."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from presets import VARIANTS
from results import Report, Row, display_name, in_order, is_peer, select

#: Systems of the overview: name and colour. Of several settings of one system the fastest is drawn.
OVERVIEW = {
    "torch.compile": "C0",
    "ONNX Runtime": "C2",
    "OpenVINO": "C4",
    "convmixer_fast": "C3",
}


def _prepare() -> None:
    """Set up matplotlib: SVG files, equal for equal rows, with text as text."""
    import matplotlib

    matplotlib.use("svg")
    # Ids are derived from this and not random.
    matplotlib.rcParams["svg.hashsalt"] = "convmixer_fast"
    matplotlib.rcParams["svg.fonttype"] = "none"


def draw(report: Report, name: str, path: Path) -> bool:
    """Draw a chart of `CHARTS`; False, with no file written, where there are no rows for it."""
    _prepare()
    from matplotlib import pyplot

    suite, chart = CHARTS[name]
    rows = [r for r in select(report["rows"], suite=suite) if not _is_limit(r)]
    figure = chart(rows) if rows else None
    if figure is None:
        return False
    machine = report["machine"]
    where = machine.get("gpu") or f"{machine['cpu']}, float32"
    figure.suptitle(f"{where}, {report['runs'][-1]['date']}")
    figure.savefig(path, metadata={"Date": None, "Creator": None})
    pyplot.close(figure)
    return True


def speeds(rows: Iterable[Row]) -> list[tuple[str, dict[str, float]]]:
    """Whole models: "MODEL, batch N" and each system's speed as a multiple of eager PyTorch's.

    Eager PyTorch is the faster of its two layouts. Of one system's settings the fastest counts, of
    several thread counts the largest.
    """
    found = []
    places = {name: i for i, name in enumerate(VARIANTS)}
    rows = in_order(select(rows, suite="models"))
    most = max((row.get("threads", 0) for row in rows), default=0)
    rows = [row for row in rows if row.get("threads", most) == most]
    rows.sort(key=lambda row: places.get(row["model"], len(places)))
    for group in dict.fromkeys(row["group"] for row in rows):
        here = select(rows, group=group)
        ours = [row for row in here if row["system"] == "ours" and "ms" in row]
        peers = list(filter(is_peer, here))
        eager = [row["ms"] for row in peers if row["system"].startswith("eager")]
        if not ours or not eager:
            continue
        best = {"convmixer_fast": min(eager) / ours[0]["ms"]}
        for row in peers:
            name = row["system"].partition(" + ")[0]
            if not name.startswith("eager"):
                best[name] = max(best.get(name, 0.0), min(eager) / row["ms"])
        found.append((f"{ours[0]['model']}, batch {ours[0]['batch']}", best))
    return found


def overview(reports: Iterable[Report], path: Path) -> None:
    """Draw the speed of whole models on every machine, a panel each.

    The file's description holds the drawn figures as JSON: a test compares it with the rows.
    """
    _prepare()
    from matplotlib import pyplot

    panels = overview_data(reports)
    columns = min(2, len(panels))
    lines = max(len(panel["speeds"]) for panel in panels)
    figure, grid = pyplot.subplots(
        -(-len(panels) // columns),
        columns,
        figsize=(4.6 * columns, (0.28 * lines + 0.9) * -(-len(panels) // columns) + 0.7),
        layout="constrained",
        squeeze=False,
        sharex=True,
    )
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for panel, axes in zip(panels, grid.flat, strict=False):
        names = [name for name, _ in panel["speeds"]]
        for system, colour in OVERVIEW.items():
            points = [(s[system], i) for i, (_, s) in enumerate(panel["speeds"]) if system in s]
            ours = system == "convmixer_fast"
            if points:
                xs, ys = zip(*points, strict=True)
                axes.scatter(
                    *(xs, ys), s=70 if ours else 30, color=colour, label=system, zorder=2 + ours
                )
        axes.axvline(1.0, color="black", linewidth=0.8, label="eager PyTorch, faster layout")
        axes.set_yticks(range(len(names)), names, fontsize="small")
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.grid(axis="y", linewidth=0.4)
        axes.set_title(panel["machine"], fontsize="small")
    for axes in grid[-1]:
        axes.set_xlabel("speed, eager PyTorch = 1, more is better", fontsize="small")
    handles, labels = _legend(grid.flat)
    named = dict(zip(labels, handles, strict=True))
    figure.legend(
        named.values(), named.keys(), loc="outside lower center", ncols=3, fontsize="small"
    )
    told = json.dumps(panels)
    figure.savefig(path, metadata={"Date": None, "Creator": None, "Description": told})
    pyplot.close(figure)


def overview_data(reports: Iterable[Report]) -> list[dict[str, Any]]:
    """The figures of `overview`: of each report the machine, the date and `speeds`, rounded."""
    panels = []
    for report in reports:
        rows = select(report["rows"], suite="models")
        rounded = [(n, {s: round(v, 3) for s, v in at.items()}) for n, at in speeds(rows)]
        if rounded:
            machine = report["machine"]
            date = max(report["runs"][row["run"]]["date"] for row in rows)
            where = f"{machine['name']}, {machine['isa']}, float32, {date}"
            panels.append({"machine": where, "speeds": rounded})
    return panels


def _is_limit(row: Row) -> bool:
    return str(row.get("system")).startswith(("peak", "limit"))


def _share(row: Row) -> float | None:
    """Of the machine's peak, or of what a GPU's rates allow."""
    return row.get("of peak", row.get("of limit"))


def _setting(row: Row) -> str:
    return str(row["dtype"]) if "dtype" in row else _threads(row["threads"])


def _speed(rows: list[Row]) -> Any:
    """Bars of img/s: a panel for each model (and dtype), a group a batch, a bar a system."""
    rows = [r for r in in_order(rows) if "img/s" in r]
    most = max((r.get("threads", 0) for r in rows), default=0)
    rows = [r for r in rows if r.get("threads", most) == most]
    if not rows:
        return None
    from matplotlib import pyplot

    panels = list(dict.fromkeys((r["model"], _setting(r)) for r in rows))
    systems = list(dict.fromkeys(r["system"] for r in rows))
    figure, grid = pyplot.subplots(
        len(panels), figsize=(8.0, 2.3 * len(panels) + 1.0), layout="constrained", squeeze=False
    )
    width = 0.85 / len(systems)
    for (model, setting), axes in zip(panels, grid[:, 0], strict=True):
        here = [r for r in rows if (r["model"], _setting(r)) == (model, setting)]
        batches = sorted({r["batch"] for r in here})
        for i, system in enumerate(systems):
            found = {r["batch"]: r["img/s"] for r in select(here, system=system)}
            offset = (i - (len(systems) - 1) / 2) * width
            places = [g + offset for g, batch in enumerate(batches) if batch in found]
            heights = [found[batch] for batch in batches if batch in found]
            bars = axes.bar(places, heights, width, label=system, color=f"C{i}")
            axes.bar_label(bars, fmt="{:.3g}", fontsize="xx-small", rotation=90, padding=2)
        axes.margins(y=0.25)
        axes.set_xticks(range(len(batches)), [f"batch {b}" for b in batches], fontsize="small")
        axes.set_ylabel("img/s, more is better", fontsize="small")
        axes.set_title(f"{model}, {setting}", fontsize="medium")
    named = dict(zip(*reversed(_legend(grid[:, 0])), strict=True))
    figure.legend(
        named.values(), named.keys(), loc="outside lower center", ncols=3, fontsize="small"
    )
    return figure


def _legend(axes: Any) -> tuple[list[Any], list[str]]:
    """Handles and labels of all panels: a panel may lack systems."""
    pairs = [pair for one in axes for pair in zip(*one.get_legend_handles_labels(), strict=True)]
    return [handle for handle, _ in pairs], [label for _, label in pairs]


def _of_peak(rows: list[Row]) -> Any:
    """Bars of the share of the machine's limit: a panel for each thread count or dtype (and half of
    a block), a group for each model and batch."""
    rows = [r for r in rows if _share(r) is not None]
    if not rows:
        return None
    from matplotlib import pyplot

    key: Callable[[Row], tuple[Any, Any]] = lambda r: (r["model"], r["batch"])  # noqa: E731
    limit = "peak" if any("of peak" in r for r in rows) else "limit"
    panels = list(dict.fromkeys((_setting(r), r.get("part", "")) for r in rows))
    names = list(dict.fromkeys(key(r) for r in in_order(rows)))
    systems = list(dict.fromkeys(r["system"] for r in rows))
    size = (3.0 + 0.19 * len(names) * (len(systems) + 1), 3.2 * len(panels))
    figure, grid = pyplot.subplots(
        len(panels), figsize=size, layout="constrained", squeeze=False, sharex=True, sharey=True
    )
    width = 0.85 / len(systems)
    for (setting, part), axes in zip(panels, grid[:, 0], strict=True):
        here = [r for r in rows if (_setting(r), r.get("part", "")) == (setting, part)]
        for i, system in enumerate(systems):
            shares = {key(r): 100 * (_share(r) or 0.0) for r in here if r["system"] == system}
            offset = (i - (len(systems) - 1) / 2) * width
            places = [g + offset for g, name in enumerate(names) if name in shares]
            heights = [shares[name] for name in names if name in shares]
            # One colour a system, also in panels that lack some systems.
            axes.bar(places, heights, width, label=system, color=f"C{i}")
        axes.axhline(100, color="black", linewidth=0.8, linestyle="--")
        axes.set_ylabel(f"% of {limit}")
        axes.set_title(f"{display_name(part) + ', ' if part else ''}{setting}", fontsize="medium")
    # Strassen's algorithm does fewer multiply-adds than are counted: bars may exceed 100.
    axes.set_ylim(0, max(105.0, 105.0 * max(_share(r) or 0.0 for r in rows)))
    axes.set_xticks(
        range(len(names)),
        [f"{m}\nbatch {b}".replace(", ", "\n") for m, b in names],
        fontsize="small",
    )
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize="small")
    return figure


def _waterfall(rows: list[Row]) -> Any:
    """A panel for each model: the first step's time, then what each step removes or adds."""
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
        axes.set_yticks(
            range(len(here)), [display_name(r["system"]) for r in here], fontsize="small"
        )
        axes.invert_yaxis()
        axes.set_xlim(0, 1.12 * max(r["ms"] for r in here))
        axes.set_xlabel("milliseconds", fontsize="small")
        axes.set_title(group, fontsize="medium")
    return figure


def _memory(rows: list[Row]) -> Any:
    """Bars of a process's memory above its imports."""
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

    rows = [r for r in rows if "ns / patch" in r]
    if not rows:
        return None
    panels: list[tuple[str, str, list[Row]]] = []
    for model, setting in dict.fromkeys((r["model"], _setting(r)) for r in rows):
        mine = [r for r in rows if (r["model"], _setting(r)) == (model, setting)]
        name = f"{model}, {setting}" if "dtype" in mine[0] else model
        panels.append((f"{name}, batch 1", "side", select(mine, batch=1)))
        usual = [r["side"] for r in mine if r["batch"] > 1]
        if usual:
            panels.append((f"{name}, {usual[-1]} px", "batch", select(mine, side=usual[-1])))
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


#: Name of a chart -> its suite, and how those rows are drawn.
CHARTS: dict[str, tuple[str, Callable[[list[Row]], Any]]] = {
    "models": ("models", _of_peak),
    "speed": ("models", _speed),
    "kernels": ("kernels", _of_peak),
    "steps": ("steps", _waterfall),
    "memory": ("memory", _memory),
    "resolution": ("resolution", _resolution),
}
