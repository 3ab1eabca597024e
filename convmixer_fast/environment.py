"""Environment variables: the table of them, and the one strict parser.

A value that a variable cannot have is an error at the first use of what it decides, never a silent
default. Names and switches are read in any case; an empty variable counts as absent.
"""

from __future__ import annotations

import os
from functools import cache
from typing import NamedTuple

PREFIX = "CONVMIXER_FAST_"
_ON = ("1", "true", "yes", "on")
_OFF = ("0", "false", "no", "off")


class Variable(NamedTuple):
    """A variable's name without its prefix, the values it can have (none: any), and their kind."""

    name: str
    values: tuple[str, ...]
    kind: str = "value"

    @property
    def full_name(self) -> str:
        return PREFIX + self.name


_SWITCH = (*_ON, *_OFF)

#: What the package reads while it runs.
VARIABLES = {
    v.name: v
    for v in (
        Variable("BACKEND", ("auto", "reference", "cpu", "triton", "cuda"), "backend"),
        Variable("ISA", ("baseline", "avx2", "avx512"), "instruction set"),
        Variable("STRASSEN", ("0", "1"), "number of levels"),
        Variable("DISABLE_NATIVE", _SWITCH, "switch"),
        Variable("DISABLE_TRITON", _SWITCH, "switch"),
        Variable("DISABLE_CUDA", _SWITCH, "switch"),
        Variable("VERIFY", _SWITCH, "switch"),
        Variable("CACHE", ()),
        Variable("DEBUG", _SWITCH, "switch"),
    )
}
#: What ``setup.py`` and the tests read.
BUILD_VARIABLES = ("CPU", "CUDA", "CUTLASS", "BUILD_CACHE", "WERROR", "PTXSIM", "CI_OLDEST")
#: What decides which kernels run.
_OF_KERNELS = ("ISA", "STRASSEN", "DISABLE_NATIVE", "DISABLE_TRITON", "DISABLE_CUDA", "VERIFY")


def read(name: str) -> str | None:
    """The value of a variable in `VARIABLES`, None where it is absent; choices in lower case.

    Raises:
        ValueError: it cannot have that value; the message names it and lists those it can have.
    """
    variable = VARIABLES[name]
    given = os.environ.get(variable.full_name)
    if not given:
        return None
    value = given.strip().lower()
    if not variable.values:
        return given
    if value not in variable.values:
        shown = " ".join(given.split()) if given.isprintable() else ascii(given)
        raise ValueError(
            f"{variable.full_name}: unknown {variable.kind} {shown}; use one of "
            f"{', '.join(variable.values)}"
        )
    return value


def flag(name: str, default: bool = False) -> bool:
    """Whether a switch is on.

    Raises:
        ValueError: see `read`.
    """
    value = read(name)
    return default if value is None else value in _ON


def why_off(name: str) -> str:
    """Why a part of the package that has a switch is off, or cannot be known to be on; else ""."""
    try:
        on = flag(name)
    except ValueError as error:
        return str(error)
    return f"switched off by {PREFIX}{name}" if on else ""


@cache
def check() -> None:
    """Raise if a variable that decides about kernels cannot have its value.

    Asked when kernels are chosen. Good variables are looked at once a process.

    Raises:
        ValueError: see `read`.
    """
    for name in _OF_KERNELS:
        read(name)


def given() -> dict[str, str]:
    """What the environment holds with this package's prefix, in the order of the names."""
    return {name: os.environ[name] for name in sorted(os.environ) if name.startswith(PREFIX)}


def problems() -> list[str]:
    """A line for each variable with this package's prefix that it does not know or cannot read."""
    found = []
    for full_name in given():
        name = full_name.removeprefix(PREFIX)
        if name in BUILD_VARIABLES:
            continue
        if name not in VARIABLES:
            known = ", ".join(v.full_name for v in VARIABLES.values())
            found.append(f"{full_name} is no variable of this package; there are {known}")
            continue
        try:
            read(name)
        except ValueError as error:
            found.append(str(error))
    return found
