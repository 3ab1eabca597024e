"""MkDocs hook: charts of all result files, drawn into the site and shown above their tables.

A page marks the place of a chart by `<!-- chart: MACHINE/FILE-NAME -->`, where `charts.CHARTS` has
NAME; `figures.measured` writes these marks. Without matplotlib the site has no charts.
"""

from __future__ import annotations

import importlib.util
import re
import tempfile
from pathlib import Path
from typing import Any

import charts
import results
from mkdocs.structure.files import File

RESULTS = Path(__file__).resolve().parent / "results"

_MARK = re.compile(r"<!-- chart: ([\w./-]+) -->\n?")


def on_files(files: Any, config: Any) -> Any:
    """Add a chart of each mark to the site's files."""
    if importlib.util.find_spec("matplotlib") is None:
        return files
    marked = {
        name
        for file in files.documentation_pages()
        for name in _MARK.findall(Path(file.abs_src_path).read_text())
    }
    for name in sorted(marked):
        place, _, stem = name.partition("/")
        source, _, chart = stem.rpartition("-")
        report = results.load(RESULTS / place / f"{source}.json")
        with tempfile.TemporaryDirectory() as folder:
            drawn = Path(folder) / "chart.svg"
            if report is not None and charts.draw(report, chart, drawn):
                files.append(
                    File.generated(config, f"charts/{name}.svg", content=drawn.read_text())
                )
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Replace each mark by its chart, or by nothing where it was not drawn."""
    up = "../" * page.file.src_uri.count("/")

    def shown(found: re.Match[str]) -> str:
        target = f"charts/{found[1]}.svg"
        if files.get_file_from_path(target) is None:
            return ""
        return f"![{found[1].rpartition('-')[2]}]({up}{target})\n"

    return _MARK.sub(shown, markdown)
