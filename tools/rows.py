"""Result files with one row a line, for readers and for diffs."""

from __future__ import annotations

import json
from typing import Any


def as_json(result: dict[str, Any]) -> str:
    """Each row of a table on a line of its own."""
    parts: list[str] = []
    for name, value in result.items():
        rows = isinstance(value, list)
        text = "[\n" + ",\n".join(map(json.dumps, value)) + "\n]" if rows else json.dumps(value)
        parts.append(f"{json.dumps(name)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}\n"
