"""Imports point down, and no two modules need each other to be imported."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "convmixer_fast"
#: From the bottom to the top; parts of one row know nothing of each other.
LAYERS = (
    ("arch", "environment", "files"),
    ("reference", "testing", "checkpoint"),
    ("backends",),
    ("ops",),
    ("implementations",),
    ("modules",),
    ("blocks", "model", "compat", "diagnostics", "inference"),
    ("demo",),
    ("cli",),
    ("__init__", "__main__"),
)
RANK = {part: i for i, parts in enumerate(LAYERS) for part in parts}


def name_of(file: Path) -> str:
    return ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts)


#: Folder and file of what implements an operator.
IMPLEMENTATIONS = {
    (file.parent.name, file.stem)
    for file in PACKAGE.glob("backends/*/*.py")
    if "ops.registry import" in file.read_text()
}

MODULES = {name_of(file): file for file in PACKAGE.rglob("*.py")}


def imports(name: str, nodes: Iterator[ast.AST]) -> Iterator[str]:
    """The package's own modules that import statements among ``nodes`` name."""
    package = name.split(".")[:-1]
    for node in nodes:
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        base = package[: len(package) - node.level + 1]
        target = ".".join(base + ([node.module] if node.module else []))
        for alias in node.names:
            inner = f"{target}.{alias.name}"
            found = [n for n in (inner, f"{inner}.__init__") if n in MODULES]
            found = found or [n for n in (target, f"{target}.__init__") if n in MODULES]
            yield from found


def at_import(tree: ast.Module) -> Iterator[ast.AST]:
    """Statements that run when the module is imported, except those for type checkers."""
    todo: list[ast.AST] = [tree]
    while todo:
        node = todo.pop()
        yield node
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            todo += node.orelse
            continue
        todo += ast.iter_child_nodes(node)


def part_of(name: str) -> str:
    """The part of the package; implementations of operators are above those, kernels below."""
    _, part, *inner = name.split(".")
    if part == "backends" and len(inner) == 2 and (inner[0], inner[1]) in IMPLEMENTATIONS:
        return "implementations"
    return part


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_point_down(name: str) -> None:
    tree = ast.parse(MODULES[name].read_text())
    own = part_of(name)
    assert own in RANK, f"{own} has no place in LAYERS"
    for other in imports(name, ast.walk(tree)):
        part = part_of(other)
        # The version is the one thing that the package itself has.
        if part == own or part == "__init__":
            continue
        assert RANK[part] < RANK[own], f"{name} imports {other}"


def test_no_circles() -> None:
    needs = {
        name: set(imports(name, at_import(ast.parse(file.read_text()))))
        for name, file in MODULES.items()
    }
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name in done:
            return
        for other in sorted(needs[name] - {name}):
            visit(other, (*path, name))
        done.add(name)

    for name in sorted(needs):
        visit(name, ())
