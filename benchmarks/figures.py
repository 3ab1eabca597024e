"""Which figures stand in the README and the documentation? Those of the result files, put in anew.

A pair of comments marks a place:

    <!-- figures: NAME -->
    <!-- end of figures -->

`python benchmarks/report.py --readme` writes between them what `SNIPPETS` makes of the JSON files
under benchmarks/; a test fails where text and files disagree. No figure is typed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import report
import results
from presets import THREADS
from results import Report, Row, select

from convmixer_fast.arch import VARIANTS, Variant, find_variant

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
RESULTS = HERE / "results"
PUBLISHED = HERE / "published" / "timm.json"
#: Written by `python tests/versions.py --record`.
VERSIONS = ROOT / "tests" / "versions.json"

_PLACE = re.compile(
    r"(<!-- figures: (?P<name>[\w-]+) -->\n)(?P<body>.*?)(<!-- end of figures -->)", re.DOTALL
)


def pages() -> list[Path]:
    """The files that have figures or may have."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def filled(text: str) -> str:
    """A page's text with every marked place filled anew.

    Raises:
        ValueError: a name that no snippet has, or a mark without its end.
    """

    def fill(found: re.Match[str]) -> str:
        name = found["name"]
        if name not in SNIPPETS:
            raise ValueError(f"no figures are called {name}: use {', '.join(SNIPPETS)}")
        return f"{found[1]}{SNIPPETS[name]().strip()}\n{found[4]}"

    if text.count("<!-- figures: ") != len(_PLACE.findall(text)):
        raise ValueError("a mark '<!-- figures: NAME -->' has no '<!-- end of figures -->'")
    return _PLACE.sub(fill, text)


def update() -> list[str]:
    """Fill every page; what was done, a line a page."""
    told = []
    for page in pages():
        old = page.read_text()
        new = filled(old)
        if new != old:
            page.write_text(new)
        told.append(f"{page.relative_to(ROOT)}: {'changed' if new != old else 'as it was'}")
    return told


def table(columns: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    """Markdown of a table, its cells as everywhere in the reports."""
    lines = ["| " + " | ".join(columns) + " |"]
    lines.append(re.sub(r"[^|]+", "---", lines[0]))
    lines += ["| " + " | ".join(report.cell(value) for value in row) + " |" for row in rows]
    return "\n".join(lines)


def _machines() -> list[tuple[Path, Report]]:
    found = [(path, results.load(path)) for path in sorted(RESULTS.glob("*/cpu.json"))]
    return [(path, loaded) for path, loaded in found if loaded is not None]


def _where(path: Path, measured: Report, rows: list[Row]) -> str:
    """Machine and versions of some rows, and the file that they stand in."""
    machine = measured["machine"]
    runs = [measured["runs"][i] for i in sorted({row["run"] for row in rows})]
    names = {key: [] for key in ("date", "torch", "onnxruntime", "openvino")}
    for run in runs:
        for key, values in names.items():
            if run.get(key) and run[key] not in values:
                values.append(run[key])
    told = ", ".join(f"{key} {' and '.join(values)}" for key, values in names.items() if values)
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['isa']}; {told} "
        f"(`{path.with_suffix('.md').relative_to(ROOT)}`)."
    )


def whole_models() -> str:
    """Every whole model on every machine: speed, share of the peak, and against whom."""
    parts = []
    for path, measured in _machines():
        rows = select(measured["rows"], suite="models", threads=THREADS)
        lines = []
        for group in dict.fromkeys(row["group"] for row in results.in_order(rows)):
            here = select(rows, group=group)
            ours = next((r for r in here if r["system"] == "ours" and "ms" in r), None)
            if ours is None:
                continue
            eager = next((r for r in here if r["system"] == "eager NCHW" and "ms" in r), None)
            best = report.best_peer(here)
            lines.append(
                (
                    ours["model"],
                    ours["batch"],
                    f"{ours['img/s']:.3g}",
                    f"{100 * ours['of peak']:.0f} %",
                    f"{eager['ms'] / ours['ms']:.2f}" if eager else "",
                    f"{best['ms'] / ours['ms']:.2f} ({best['system']})" if best else "",
                )
            )
        if lines:
            columns = (
                *("model", "batch", "img/s", "of peak"),
                *("times eager NCHW's speed", "times the best peer's (which)"),
            )
            parts += [_where(path, measured, rows), table(columns, lines)]
    return "\n\n".join(parts)


def _promises(path: Path, measured: Report) -> list[report.Line]:
    """Those that a result file is held against."""
    if path.name == "streaming.json":
        # It takes the report's tables, and the report these figures.
        import streaming

        lines: list[report.Line] = streaming.lines(measured)
        return lines
    return report.promises(measured)


#: The files that hold promises.
_HELD = ("cpu.json", "gpu.json", "inference.json", "streaming.json")


def _held(folder: Path) -> Iterator[tuple[Path, list[report.Line]]]:
    """Every file that holds promises, and those of which something was measured."""
    for path in sorted(p for name in _HELD for p in folder.glob(f"*/{name}")):
        measured = results.load(path)
        assert measured is not None
        lines = [line for line in _promises(path, measured) if line.met]
        if lines:
            yield path, lines


def reached(folder: Path = RESULTS) -> str:
    """How many promises every machine's measurements keep, and which they miss by most."""
    rows = []
    for path, lines in _held(folder):
        short = [line for line in lines if line.met == "no"]
        worst = max(short, key=report.Line.shortfall).row() if short else None
        told = f"{worst['what']}: {worst['measured']} for {worst['bar']}" if worst else ""
        kept = f"{len(lines) - len(short)} of {len(lines)}"
        rows.append((f"{path.parent.name} (`{path.name}`)", kept, told))
    return table(("measured on", "aims reached", "missed by most"), rows)


def missed(folder: Path = RESULTS) -> str:
    """The promises that the measurements do not keep, file by file, of every machine."""
    parts = []
    for path, held in _held(folder):
        lines = [line.row() for line in held if line.met == "no"]
        if lines:
            rows = [(r["what"], r["bar"], r["measured"], r["detail"]) for r in lines]
            parts.append(f"Not reached on {path.parent.name} (`{path.name}`):")
            parts.append(table(("what", "aimed at", "measured", "detail"), rows))
    return "\n\n".join(parts) or "Every bar was reached."


def slower_cells(folder: Path = RESULTS) -> str:
    """Every cell of the suite never_slower below its bar, of every machine."""
    rows, counted = [], []
    for path in sorted(folder.glob("*/cpu.json")):
        measured = results.load(path)
        assert measured is not None
        found = report.cells(measured["rows"])
        slower = [cell for cell in found if cell.slower]
        if found:
            counted.append(f"{path.parent.name}: {len(slower)} of {len(found)} cells")
        rows += [(path.parent.name, str(c), f"{c.ratio:.3f}", c.by) for c in slower]
    if not counted:
        return "No machine was measured yet."
    parts = [f"Below {report.NEVER_SLOWER} of stock PyTorch's speed, {'; '.join(counted)}."]
    if rows:
        parts.append(table(("measured on", "call", "times stock's speed", "computed by"), rows))
    return "\n\n".join(parts)


#: Column of `gpu_static.json` and `cuda_static.json` -> the most that is aimed at, and what it is.
_STATIC_AIMS = {
    "spills": (0, "values spilled"),
    "stack": (0, "bytes of stack"),
    "unpack_per_load": (1, "conversions a loaded value"),
}


def gpu_exceptions(folder: Path = RESULTS / "gpu-static") -> str:
    """Compiled GPU kernels that miss a bar, or pass it by an exception that the check names."""
    found: dict[tuple[str, ...], list[str]] = {}
    for path in (folder / "gpu_static.json", folder / "cuda_static.json"):
        for row in json.loads(path.read_text())["static"]:
            told = [
                f"{row[column]:.3g} {what} (aimed at: {most})"
                for column, (most, what) in _STATIC_AIMS.items()
                if row.get(column, 0) > most
            ]
            told += row["broken_bars"]
            if told:
                name = f"{row['op']}, {row['kernel']}" if "op" in row else row["kernel"]
                key = (name, row.get("dtype", ""), "; ".join(told))
                found.setdefault(key, []).append(f"sm_{row['architecture']}")
    if not found:
        return "Every kernel meets every bar."
    rows = [(name, dtype, ", ".join(archs), what) for (name, dtype, what), archs in found.items()]
    return table(("compiled kernel", "dtype", "architectures", "what"), rows)


def halves() -> str:
    """The two halves of a block beside PyTorch's, batch 1."""
    parts = []
    for path, measured in _machines():
        rows = [
            r
            for r in select(measured["rows"], suite="kernels", threads=THREADS)
            if "ms" in r and r["system"] != "peak"
        ]
        lines = []
        for model, batch, part in dict.fromkeys((r["model"], r["batch"], r["part"]) for r in rows):
            here = {
                r["system"]: r["of peak"] for r in select(rows, model=model, batch=batch, part=part)
            }
            shares = [
                f"{100 * here[s]:.0f} %" if s in here else ""
                for s in ("ours", "eager NCHW", "eager channels-last")
            ]
            lines.append((model, batch, part, *shares))
        if lines:
            columns = ("block", "batch", "part", "ours", "eager NCHW", "eager channels-last")
            parts += [_where(path, measured, rows), table(columns, lines)]
    return "\n\n".join(parts)


def steps() -> str:
    """What each step of fusion bought."""
    parts = []
    for path, measured in _machines():
        rows = [r for r in select(measured["rows"], suite="steps") if r["system"] != "peak"]
        lines = [
            (r["model"], r["batch"], r["system"], r["ms"], f"{100 * r['of peak']:.0f} %")
            for r in rows
        ]
        if lines:
            columns = ("model", "batch", "up to this step", "ms", "of peak")
            parts += [_where(path, measured, rows), table(columns, lines)]
    return "\n\n".join(parts) or "Not measured yet: `python benchmarks/cpu.py --suites steps`."


def numerics() -> str:
    """Errors of whole models against float64, ours and PyTorch's."""
    parts = []
    for path, measured in _machines():
        rows = select(measured["rows"], suite="numerics")
        lines = [
            (
                r["model"],
                r["system"],
                f"{r['max error']:.1e}",
                _times(r.get("max / eager's")),
                f"{r['rms error']:.1e}",
                _times(r.get("rms / eager's")),
            )
            for r in rows
            if not r["system"].endswith(report.UNSET)
        ]
        if lines:
            columns = ("model", "products", "max error", "times eager's", "rms error")
            parts += [_where(path, measured, rows), table((*columns, "times eager's"), lines)]
    return "\n\n".join(parts)


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}"


def _with_bound(prediction: Row) -> str:
    return f"{prediction['img_per_s']:.0f} ({prediction['img_per_s_at_peak']:.0f})"


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
            "**Predictions, not measurements**: no GPU has run them. From instruction counts and "
            "the vendors' peak rates, bfloat16, large batches, without the head; in brackets at "
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


def measured_beside(row: Row, ours: Iterable[Row]) -> Row | None:
    """Our result on the hardware of a published row: same card, model, mode and side, or None.

    ``ours`` are results of `convmixer-fast benchmark`. The fastest counts, whatever its layout,
    batch and compiler: a published row says those of timm's run, not of ours.
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
    """Results of `convmixer-fast benchmark --results-format json`, kept under results/*/timm/."""
    return [json.loads(p.read_text()) for p in sorted(RESULTS.glob("*/timm/*.json"))]


def timm_table() -> str:
    """timm's published rows, ours measured beside them where that hardware ran ours."""
    published = json.loads(PUBLISHED.read_text())
    predicted = json.loads((RESULTS / "gpu-static" / "gpu_static.json").read_text())["predicted"]
    ours = our_results()
    lines = []
    for row in newest(published["rows"]):
        variant = find_variant(row["model"])
        mine = measured_beside(row, ours)
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
            "`ours, measured` is filled by `convmixer-fast benchmark` on that very card only; "
            "`ours, predicted` is arithmetic (bfloat16, without the head), no measurement.",
        )
    )


def roofline() -> str:
    """What an image of each variant costs: multiply-adds, weights, and one map of activations."""
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
    "whole-models": whole_models,
    "reached": reached,
    "missed": missed,
    "slower-cells": slower_cells,
    "gpu-exceptions": gpu_exceptions,
    "halves": halves,
    "steps": steps,
    "numerics": numerics,
    "gpu-predicted": gpu_predicted,
    "timm-table": timm_table,
    "roofline": roofline,
    "versions": versions,
}
