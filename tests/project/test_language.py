"""Docstrings are statements (CONTRIBUTING.md, Language)."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("convmixer_fast", "benchmarks", "tools", "tests", "examples")
FILES = [
    ROOT / "setup.py",
    *(path for name in FOLDERS for path in sorted((ROOT / name).rglob("*.py"))),
]


def questions(source: str) -> Iterator[str]:
    """Summaries of docstrings that ask something."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            summary = (ast.get_docstring(node) or "").split("\n\n")[0]
            if "?" in summary:
                yield f"{getattr(node, 'name', 'module')}: {summary.splitlines()[0]}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_docstrings_ask_nothing(path):
    found = list(questions(path.read_text()))
    assert not found, found


def test_a_question_is_noticed():
    assert list(questions('"""Is it right? Tests of numbers."""')) == [
        "module: Is it right? Tests of numbers."
    ]
    assert not list(
        questions('"""Numbers."""\n\ndef f(x):\n    """Twice x.\n\n    Why? Because."""')
    )
