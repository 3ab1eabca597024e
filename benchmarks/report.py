"""Which picture do the measured rows make? A Markdown table and a bar chart beside their JSON.

pytest benchmarks/test_models.py --rows benchmarks/results/MACHINE/models.json ...
python benchmarks/report.py benchmarks/results/MACHINE/models.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

COLUMNS = ("model", "batch", "threads", "system", "img/s", "ms", "p20 ms", "p80 ms", "of peak")


def text(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def markdown(report: dict[str, Any]) -> str:
    about = report["machine"]
    lines = [
        f"{about['cpu']}, {about['isa']}, {about['system']}, torch {about['torch']}, "
        f"convmixer_fast {about['convmixer_fast']}, {about['date']}.",
        "",
        "float32. Medians of interleaved rounds in one process, every output checked first. "
        '"of peak": all multiply-adds of the model against a register-only loop of multiply-adds, '
        "measured in the same rounds.",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|" + "---|" * len(COLUMNS),
    ]
    for row in report["rows"]:
        cells = [text(row.get(column, "")) for column in COLUMNS]
        if "note" in row:
            cells[4] = row["note"].replace("|", "/")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def chart(report: dict[str, Any], path: Path) -> None:
    """Bars of the share of the machine's peak, a group for each model, batch and thread count."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "convmixer_fast"
    rows = [row for row in report["rows"] if "of peak" in row and "img/s" in row]
    groups = list(dict.fromkeys((row["model"], row["batch"], row["threads"]) for row in rows))
    systems = list(dict.fromkeys(row["system"] for row in rows))
    figure, axes = pyplot.subplots(figsize=(1.5 + 1.4 * len(groups), 4), layout="constrained")
    width = 0.8 / len(systems)
    for i, system in enumerate(systems):
        shares = {
            (row["model"], row["batch"], row["threads"]): row["of peak"]
            for row in rows
            if row["system"] == system
        }
        places = [g + (i - (len(systems) - 1) / 2) * width for g in range(len(groups))]
        heights = [100 * shares.get(group, 0.0) for group in groups]
        axes.bar(places, heights, width, label=system)
    axes.set_xticks(range(len(groups)), [f"{m}\nbatch {b}, {t} thr." for m, b, t in groups])
    axes.set_ylabel("% of the machine's multiply-add peak")
    axes.set_ylim(0, 100)
    axes.set_title(f"{report['machine']['cpu']}, {report['machine']['date']}, float32")
    axes.legend(fontsize="small", ncols=2)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", type=Path, nargs="+", help="JSON files written by --rows")
    for path in parser.parse_args().rows:
        report = json.loads(path.read_text())
        path.with_suffix(".md").write_text(markdown(report))
        chart(report, path.with_suffix(".svg"))
        print(f"{path.with_suffix('.md')}, {path.with_suffix('.svg')}")


if __name__ == "__main__":
    main()
