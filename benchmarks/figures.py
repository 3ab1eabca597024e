"""Figures of the README and the documentation, generated from the result files.

A pair of comments marks a place:

    <!-- figures: NAME -->
    <!-- end of figures -->

`python benchmarks/report.py --readme` fills each place with the text of `SNIPPETS[NAME]`, made from
the JSON files under benchmarks/, and draws `OVERVIEW`. A test fails where a page disagrees with the
files. No figure is typed by hand.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import charts
import report
import results
from results import Report, Row, is_peer, select

from convmixer_fast.arch import VARIANTS, Variant, find_variant

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
RESULTS = HERE / "results"
PUBLISHED = HERE / "published" / "timm.json"
#: The README's chart.
OVERVIEW = ROOT / "docs" / "overview.svg"
#: Names of result files.
FILES = ("cpu.json", "gpu.json", "inference.json", "streaming.json")
#: Written by `python tests/versions.py --record`.
VERSIONS = ROOT / "tests" / "versions.json"

_PLACE = re.compile(
    r"(<!-- figures: (?P<name>[\w-]+) -->\n)(?P<body>.*?)(<!-- end of figures -->)", re.DOTALL
)


def pages() -> list[Path]:
    """The README and the pages of the documentation."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def filled(text: str) -> str:
    """A page's text with every marked place filled.

    Raises:
        ValueError: a name that no snippet has, or a mark without its end.
    """

    def fill(found: re.Match[str]) -> str:
        name = found["name"]
        if name not in SNIPPETS:
            raise ValueError(f"unknown figures {name}: use {', '.join(SNIPPETS)}")
        return f"{found[1]}{SNIPPETS[name]().strip()}\n{found[4]}"

    if text.count("<!-- figures: ") != len(_PLACE.findall(text)):
        raise ValueError("a mark '<!-- figures: NAME -->' has no '<!-- end of figures -->'")
    return _PLACE.sub(fill, text)


def update() -> list[str]:
    """Fill every page and draw the chart; returns a line a file."""
    lines = []
    for page in pages():
        old = page.read_text()
        new = filled(old)
        if new != old:
            page.write_text(new)
        lines.append(f"{page.relative_to(ROOT)}: {'changed' if new != old else 'unchanged'}")
    charts.overview((measured for _, measured in _machines()), OVERVIEW)
    return [*lines, f"{OVERVIEW.relative_to(ROOT)}: drawn"]


def table(columns: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    """A Markdown table with cells as in the reports."""
    lines = ["| " + " | ".join(columns) + " |"]
    lines.append(re.sub(r"[^|]+", "---", lines[0]))
    lines += ["| " + " | ".join(report.cell(value) for value in row) + " |" for row in rows]
    return "\n".join(lines)


def _machines(folder: Path = RESULTS) -> list[tuple[Path, Report]]:
    found = [(path, results.load(path)) for path in sorted(folder.glob("*/cpu.json"))]
    return [(path, loaded) for path, loaded in found if loaded is not None]


def _software(measured: Report, rows: list[Row]) -> str:
    """Dates and versions of the runs that some rows come from."""
    runs = [measured["runs"][i] for i in sorted({row["run"] for row in rows})]
    names: dict[str, list[str]] = {
        key: [] for key in ("date", "torch", "onnxruntime", "openvino", "engine")
    }
    for run in runs:
        for key, values in names.items():
            if run.get(key) and run[key] not in values:
                values.append(run[key])
    return ", ".join(f"{key} {' and '.join(values)}" for key, values in names.items() if values)


def _range(values: Iterable[float]) -> str:
    shown = [f"{value:.2f}" for value in sorted(values)]
    return shown[0] if shown[0] == shown[-1] else f"{shown[0]} to {shown[-1]}"


def headline(folder: Path = RESULTS) -> str:
    """Each machine's speed against eager PyTorch and the fastest peer, slowest to fastest model."""
    lines = []
    for _, measured in _machines(folder):
        rows = select(measured["rows"], suite="models")
        found = charts.speeds(rows)
        if not found:
            continue
        ours = {name: speed["convmixer_fast"] for name, speed in found}
        peers = {
            name: max({"eager PyTorch": 1.0, **speed, "convmixer_fast": 0.0}.values())
            for name, speed in found
        }
        ratios = {name: ours[name] / peers[name] for name in ours}
        slower = [f"{name} ({ratio:.2f})" for name, ratio in ratios.items() if ratio < 1]
        machine = measured["machine"]
        date = max(measured["runs"][row["run"]]["date"] for row in rows)
        lines.append(
            f"* {machine['name']}, {machine['isa']}, {date}: {_range(ours.values())} times eager, "
            f"{_range(ratios.values())} times the fastest peer; "
            f"slower than a peer: {', '.join(slower) or 'none'}."
        )
    about = (
        "Speed of whole models in float32, from the lowest to the highest ratio, against eager "
        "PyTorch in its faster layout, and against the fastest of all peers:"
    )
    return "\n".join([about, "", *lines, "", hardware(folder)])


def hardware(folder: Path = RESULTS) -> str:
    """The kinds of hardware that figures come from."""
    gpus = sorted(
        {
            loaded["machine"]["gpu"]
            for path in folder.glob("*/gpu.json")
            if (loaded := results.load(path))
        }
    )
    if not gpus:
        return "All measured figures come from CPUs. **No GPU has been measured yet.**"
    return f"Measured figures come from CPUs and from GPUs: {', '.join(gpus)}."


#: Columns and cells of one suite's table.
_Cells = tuple[tuple[str, ...], list[list[Any]]]


def _against(own: tuple[str, ...]) -> Callable[[list[Row]], _Cells]:
    """A table with a row a group: ``own`` columns of ours, then its speed against each system."""

    def cells(rows: list[Row]) -> _Cells:
        rows = results.in_order(rows)
        systems = list(dict.fromkeys(row["system"] for row in filter(is_peer, rows)))
        columns = tuple(c for c in own if any(c in row for row in rows))
        lines = []
        for group in dict.fromkeys(row["group"] for row in rows):
            here = select(rows, group=group)
            for ours in select(here, system="ours"):
                if "ms" not in ours:
                    continue
                peers = [r for r in here if is_peer(r) and r.get("part") == ours.get("part")]
                times = {row["system"]: row["ms"] / ours["ms"] for row in peers}
                ratios = [f"{times[s]:.2f}" if s in times else "" for s in systems]
                ratios = [f"**{r}**" if r and float(r) < 1 else r for r in ratios]
                lines.append([*(ours.get(c) for c in columns), *ratios])
        return (*columns, *(f"x {system}" for system in systems)), lines

    return cells


def _columns(*columns: str) -> Callable[[list[Row]], _Cells]:
    """A table with these columns of every row that is ours or another system's."""

    def cells(rows: list[Row]) -> _Cells:
        shown = tuple(c for c in columns if any(c in row for row in rows))
        kept = [r for r in rows if not str(r.get("system", "")).startswith(("peak", "limit"))]
        return shown, [[row.get(c) for c in shown] for row in kept]

    return cells


#: Suite -> explanation and table, where the documentation shows less than the reports.
_SHORT: dict[str, tuple[str, Callable[[list[Row]], _Cells]]] = {
    "models": (
        "Every output is checked before it is timed.",
        _against(
            ("device", "dtype", "model", "batch", "threads", "img/s", "ms", "of peak", "of limit")
        ),
    ),
    "kernels": (
        "For every system the C library keeps freed memory, so that fresh outputs are not new "
        "pages.",
        _against(
            ("device", "dtype", "model", "batch", "threads", "part", "ms", "of peak", "of limit")
        ),
    ),
    "resolution": (
        "A patch is one position of the grid.",
        _against(
            *[
                (
                    "device",
                    "dtype",
                    "model",
                    "side",
                    "batch",
                    "threads",
                    "img/s",
                    "ns / patch",
                    "of peak",
                )
            ]
        ),
    ),
    "training": (
        "Forward, backward and SGD. While BatchNorm gathers batch statistics, the children of our "
        "modules run one by one, at PyTorch's speed.",
        _against(("device", "dtype", "model", "batch", "threads", "img/s", "ms")),
    ),
    "scaling": (
        "The rows of a model were measured in the same rounds. A patch is one position of the "
        "grid.",
        _columns("model", "side", "batch", "threads", "img/s", "of peak", "ns / patch", "ms"),
    ),
    "steps": (
        "Each row changes one thing in the row before it, in the same rounds. The last row is the "
        "model as it is used.",
        _columns("model", "batch", "threads", "system", "ms", "of peak"),
    ),
    "numerics": (
        "Of the logits, in float32. The rule allows twice eager PyTorch's largest and "
        "root-mean-square error.",
        _columns(
            *("model", "batch", "system", "max error", "max / eager's", "rms error"),
            *("rms / eager's", "within rule"),
        ),
    ),
}


def measured(folder: Path = RESULTS) -> str:
    """Every table of every machine, with a mark for each chart of the built documentation."""
    parts = []
    for place in sorted(folder.iterdir()):
        found = [(place / name, results.load(place / name)) for name in FILES]
        reports = [(path, loaded) for path, loaded in found if loaded is not None]
        if not reports:
            continue
        machine = reports[0][1]["machine"]
        cores = "1 core" if machine["cores"] == 1 else f"{machine['cores']} cores"
        parts.append(f"## {place.name}")
        parts.append(f"{machine['cpu']}, {cores}, {machine['isa']}, {machine['system']}.")
        for path, loaded in reports:
            for shown in report.tables(loaded):
                if shown.suite:
                    parts += _section(path, loaded, shown)
    return "\n\n".join(parts)


def _section(path: Path, loaded: Report, shown: report.Table) -> list[str]:
    """Title, source, chart marks and table of one suite."""
    rows = select(loaded["rows"], suite=shown.suite)
    if shown.suite in _SHORT:
        _, cells = _SHORT[shown.suite]
        lines = table(*cells(rows))
    else:
        lines = "\n".join(report.grid(shown))
    marks = [
        f"<!-- chart: {path.parent.name}/{path.stem}-{name} -->"
        for name, (suite, _) in charts.CHARTS.items()
        if suite == shown.suite
    ]
    source = f"{_software(loaded, rows)} (`{path.relative_to(path.parents[1])}`)."
    return [f"### {shown.title}", source[0].upper() + source[1:], *marks, lines]


def legend(folder: Path = RESULTS) -> str:
    """Explanations of the tables that `measured` shows, each once."""
    told: dict[str, str] = {}
    for path in sorted(path for name in FILES for path in folder.glob(f"*/{name}")):
        loaded = results.load(path)
        assert loaded is not None
        for shown in report.tables(loaded):
            about, _ = _SHORT.get(shown.suite, (shown.about, None))
            if shown.suite and about:
                told[shown.title] = about.strip()
    return "\n".join(f"* **{title}.** {about}" for title, about in told.items())


def _never_slower(folder: Path) -> list[tuple[str, list[report.Cell]]]:
    """Machines and their cells of the suite never_slower."""
    machines = [(path.parent.name, loaded) for path, loaded in _machines(folder)]
    found = [(name, report.cells(loaded["rows"])) for name, loaded in machines]
    return [(name, cells) for name, cells in found if cells]


def slower_count(folder: Path = RESULTS) -> str:
    """How many cells of the suite never_slower are below its bound, machine by machine."""
    counted = [
        f"{name}: {sum(cell.slower for cell in cells)} of {len(cells)} cells"
        for name, cells in _never_slower(folder)
    ]
    if not counted:
        return "No machine has been measured yet."
    return f"Below {report.NEVER_SLOWER} of stock PyTorch's speed, {'; '.join(counted)}."


def slower_cells(folder: Path = RESULTS) -> str:
    """Every cell of the suite never_slower below its bound, machine by machine."""
    rows = [
        (name, str(cell), f"{cell.ratio:.3f}", cell.by)
        for name, cells in _never_slower(folder)
        for cell in cells
        if cell.slower
    ]
    parts = [slower_count(folder)]
    if rows:
        parts.append(table(("machine", "call", "times stock's speed", "computed by"), rows))
    return "\n\n".join(parts)


def gpu_predicted() -> str:
    """Predicted images a second on GPUs, for bfloat16 at large batches."""
    path = RESULTS / "gpu-static" / "gpu_static.json"
    predicted = json.loads(path.read_text())["predicted"]
    gpus = list(next(iter(predicted.values())))
    rows = [
        (
            model,
            *(f"{found[g]['img_per_s']:.0f} ({found[g]['img_per_s_at_peak']:.0f})" for g in gpus),
        )
        for model, found in predicted.items()
    ]
    columns = ("predicted img/s (bound)", *gpus)
    return "\n\n".join(
        (
            table(columns, rows),
            "**Predictions, not measurements.** They are derived from instruction counts and the "
            "vendors' peak rates, for bfloat16, large batches, without the head; in brackets: at "
            f"100 % of the rates. The arithmetic: `{path.with_suffix('.md').relative_to(ROOT)}`.",
        )
    )


def _timm_columns(variant: Variant) -> tuple[str, str, str]:
    """Parameters, multiply-adds and activations in the units of timm's tables."""
    arch, side = variant.arch, variant.input_size[1]
    return (
        f"{arch.params / 1e6:.2f}",
        f"{arch.macs_timm(side) / 1e9:.2f}",
        f"{arch.macts_timm(side) / 1e6:.2f}",
    )


#: Precisions of timm's rows, and ours.
_PRECISIONS = {"amp float16": "amp", "amp bfloat16": "amp"}


def newest(rows: Iterable[Row]) -> list[Row]:
    """The rows of the newest torch of each card, mode, precision, layout, compiler and model."""
    kept: dict[tuple[Any, ...], Row] = {}
    keys = ("bench", "device", "precision", "layout", "torchcompile", "model")
    for row in sorted(rows, key=lambda r: [int(n) for n in r["torch"].split(".")]):
        kept[tuple(row[k] for k in keys)] = row
    return sorted(kept.values(), key=lambda r: [str(r[k]) for k in keys[:-1]])


def measured_on_same_card(row: Row, ours: Iterable[Row]) -> Row | None:
    """Our result on the hardware of a published row: same card, model, mode and side, or None.

    ``ours`` are results of `convmixer-fast benchmark`. The fastest counts, in any layout, batch and
    compiler: those of a published row describe timm's run.
    """
    rate, side = (f"{row['bench']}_{key}" for key in ("samples_per_sec", "img_size"))
    same = [
        r
        for r in ours
        if rate in r
        and find_variant(r["model"]) is find_variant(row["model"])
        and row["device"].lower() in r["device"].lower()
        and r[side] == row["img_size"]
        and r["precision"] == _PRECISIONS.get(row["precision"], row["precision"])
    ]
    return max(same, key=lambda r: r[rate], default=None)


def our_results() -> list[Row]:
    """Results of `convmixer-fast benchmark --results-format json` under results/*/timm/."""
    return [json.loads(p.read_text()) for p in sorted(RESULTS.glob("*/timm/*.json"))]


def timm_table() -> str:
    """Rows published by timm, next to ours from the same hardware where there are any."""
    published = json.loads(PUBLISHED.read_text())
    predicted = json.loads((RESULTS / "gpu-static" / "gpu_static.json").read_text())["predicted"]
    ours = our_results()
    lines = []
    for row in newest(published["rows"]):
        variant = find_variant(row["model"])
        mine = measured_on_same_card(row, ours)
        guess = predicted.get(variant.paper_name, {}).get(row["device"])
        setting = f"{row['bench']}, {row['precision']}, {row['layout']}"
        setting += ", torch.compile" if row["torchcompile"] else ""
        lines.append(
            (
                variant.name,
                row["img_size"],
                *_timm_columns(variant),
                row["device"],
                f"{setting}, torch {row['torch']}",
                row["batch_size"],
                f"{row['samples_per_sec']:.2f}",
                f"{mine[row['bench'] + '_samples_per_sec']:.2f}" if mine else "",
                f"{guess['img_per_s']:.0f}" if guess and row["bench"] == "infer" else "",
            )
        )
    columns = (
        *("model", "img_size", "param_count", "gmacs", "macts", "device", "timm's run"),
        *("batch_size", "samples_per_sec", "ours, measured", "ours, predicted"),
    )
    return "\n\n".join(
        (
            f"timm's rows: {published['source']}, commit {published['commit'][:12]}; the newest "
            "torch of each setting.",
            table(columns, lines),
            "`ours, measured`: results of `convmixer-fast benchmark` on the same card. `ours, "
            "predicted`: arithmetic (bfloat16, without the head), not a measurement.",
        )
    )


def roofline() -> str:
    """Cost of an image for each variant: multiply-adds, weights, and one map of activations."""
    rows = []
    for variant in VARIANTS.values():
        arch, side = variant.arch, variant.input_size[1]
        macs = arch.macs(side)
        height, width = arch.grid(side)
        floats = height * width * arch.dim
        rows.append(
            (
                variant.paper_name,
                f"{macs.total / 1e9:.2f}",
                f"{100 * macs.pointwise / macs.total:.1f} %",
                f"{100 * macs.depthwise / macs.total:.1f} %",
                f"{4 * arch.params / 1e6:.1f}",
                f"{4 * floats / 1e6:.2f}",
                # A fused half reads its map once and writes one: 8 bytes a value in float32.
                f"{arch.kernel_size**2 / 8:.0f}",
                f"{arch.dim / 8:.0f}",
            )
        )
    columns = (
        *("model", "GMAC an image", "pointwise", "depthwise", "weights, MB", "one map, MB"),
        *("MAC a byte, depthwise half", "MAC a byte, pointwise half"),
    )
    return table(columns, rows)


def versions(recorded: dict[str, dict[str, Any]] | None = None) -> str:
    """Results of the tests by torch, Triton and Python, and what could not be installed.

    ``recorded``: the entries of tests/versions.json, which are the default.
    """
    entries = json.loads(VERSIONS.read_text()) if recorded is None else recorded
    rows, notes = [], []
    for key, entry in entries.items():
        torch, python = key.split(":")
        if "reason" in entry:
            rows.append((torch, "", python, "", "", "", entry["date"]))
            notes.append(f"* torch {torch}, Python {python}: {entry['reason']}.")
            continue
        counts = (entry[name] for name in ("passed", "failed", "skipped"))
        rows.append(
            (entry["torch"], entry["triton"] or "none", entry["python"], *counts, entry["date"])
        )
        names = ", ".join(f"`{name}`" for name in entry["failures"])
        notes += [f"* torch {torch}, Python {python} fails {names}."] if names else []
    columns = ("torch", "Triton", "Python", "passed", "failed", "skipped", "date")
    return "\n\n".join([table(columns, rows), *(["\n".join(notes)] if notes else [])])


SNIPPETS: dict[str, Callable[[], str]] = {
    "headline": headline,
    "hardware": hardware,
    "legend": legend,
    "measured": measured,
    "slower-count": slower_count,
    "slower-cells": slower_cells,
    "gpu-predicted": gpu_predicted,
    "timm-table": timm_table,
    "roofline": roofline,
    "versions": versions,
}
