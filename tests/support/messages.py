"""Messages of the package: every string of its source, with … for values."""

from __future__ import annotations

import ast
import re
from pathlib import Path


def of(path: Path) -> list[str]:
    """The strings of a Python file."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.JoinedStr):
            parts = [v.value if isinstance(v, ast.Constant) else "…" for v in node.values]
            found.append("".join(map(str, parts)))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
    return found


def printed_by(message: str, sources: list[str]) -> bool:
    """True if one of the strings produces a message with … for its values.

    Values may be words or nothing; the words between them must occur in order.
    """
    pieces = [re.escape(" ".join(piece.split())) for piece in message.split("…")]
    pattern = re.compile(".*".join(pieces))
    return any(pattern.search(" ".join(source.split())) for source in sources)
