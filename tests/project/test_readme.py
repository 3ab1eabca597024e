"""The README runs as printed, and its two set-up commands are what CI and users type."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[2] / "README.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("code", BLOCKS, ids=[f"block{i}" for i in range(len(BLOCKS))])
def test_python_blocks_run(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, str(README), "exec"), {})


def test_there_are_blocks_and_exactly_two_set_up_commands():
    assert len(BLOCKS) >= 3
    commands = re.findall(r"^pip install .*$", README.read_text(), re.MULTILINE)
    assert commands == [
        'pip install ".[demo]" && convmixer-fast demo',
        'pip install ".[test]" && pytest',
    ]
