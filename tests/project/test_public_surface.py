"""Programs written for 0.1.0 keep working: names, parameters, flags and state-dict keys."""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
from pathlib import Path
from typing import Any

import pytest

import convmixer_fast as cf
from convmixer_fast.cli import build_parser

#: What 0.1.0 had: parameters as [name, kind, default], the flags of each command, the keys of a
#: small model's state dict with their shapes.
PUBLIC = json.loads(Path(__file__).with_name("public_0_1_0.json").read_text())
NAMES = [(module, name) for module, names in PUBLIC["names"].items() for name in names]


def assert_parameters_kept(f: Any, before: list[list[str | None]] | None) -> None:
    """Each parameter is still there, and the positional ones in their order."""
    if before is None:
        return
    now = {p.name: p for p in inspect.signature(f).parameters.values()}
    for name, kind, default in before:
        assert name in now, f"{name} is gone"
        assert now[name].kind.name == kind
        found = now[name].default
        assert default == (None if found is inspect.Parameter.empty else repr(found))
    positional = [name for name, kind, _ in before if kind == "POSITIONAL_OR_KEYWORD"]
    assert list(now)[: len(positional)] == positional
    known = {name for name, _, _ in before}
    for name, parameter in now.items():
        required = parameter.default is inspect.Parameter.empty
        variable = parameter.kind.name.startswith("VAR_")
        assert name in known or not required or variable, f"{name} is new and required"


@pytest.mark.parametrize(("module", "name"), NAMES, ids=[".".join(row) for row in NAMES])
def test_a_name_and_its_parameters_are_kept(module: str, name: str) -> None:
    found = getattr(importlib.import_module(module), name)
    before = PUBLIC["names"][module][name]
    assert_parameters_kept(found, before.get("parameters"))
    for method, parameters in before.get("methods", {}).items():
        assert_parameters_kept(getattr(found, method), parameters)


def test_a_changed_parameter_is_noticed() -> None:
    before = [["a", "POSITIONAL_OR_KEYWORD", None], ["b", "POSITIONAL_OR_KEYWORD", "1"]]
    assert_parameters_kept(lambda a, b=1, c=2: None, before)
    for other in (lambda a: 0, lambda b=1, a=0: 0, lambda a, b=2: 0, lambda a, b=1, *, c: 0):
        with pytest.raises(AssertionError):
            assert_parameters_kept(other, before)


def test_commands_and_flags_are_kept() -> None:
    commands = next(
        action
        for action in build_parser()._actions
        if isinstance(action, argparse._SubParsersAction)
    ).choices
    for command, flags in PUBLIC["flags"].items():
        found = {o for a in commands[command]._actions for o in (a.option_strings or [a.dest])}
        assert set(flags) <= found


def test_keys_of_a_state_dict_are_kept() -> None:
    state = cf.ConvMixer(8, 2, 3, 4, num_classes=5).state_dict()
    assert {key: list(value.shape) for key, value in state.items()} == PUBLIC["state_dict"]
