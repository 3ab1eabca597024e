"""Environment variables: their table and their strict parser.

An invalid value is an error at the first use of what the variable decides, never a silent default.
Values are read in any case; an empty variable counts as absent.
"""

from __future__ import annotations

import os
from functools import cache
from typing import NamedTuple

PREFIX = "CONVMIXER_FAST_"
_ON = ("1", "true", "yes", "on")
_OFF = ("0", "false", "no", "off")


class Variable(NamedTuple):
    """A variable: its name without the prefix, its valid values (none listed: any), their kind."""

    name: str
    values: tuple[str, ...]
    kind: str = "value"

    @property
    def full_name(self) -> str:
        return PREFIX + self.name


_SWITCH = (*_ON, *_OFF)

#: Variables of the running package.
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
#: Variables of ``setup.py`` and of the tests.
BUILD_VARIABLES = ("CPU", "CUDA", "CUTLASS", "BUILD_CACHE", "WERROR", "CI_OLDEST")
#: Variables that decide which kernels run.
_OF_KERNELS = ("ISA", "STRASSEN", "DISABLE_NATIVE", "DISABLE_TRITON", "DISABLE_CUDA", "VERIFY")


def read(name: str) -> str | None:
    """The value of a variable in `VARIABLES`, None where it is absent; choices in lower case.

    Raises:
        ValueError: the value is invalid; the message lists the valid ones.
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
    """The reason why a switch or an invalid value turns a part of the package off; else ""."""
    try:
        on = flag(name)
    except ValueError as error:
        return str(error)
    return f"switched off by {PREFIX}{name}" if on else ""


@cache
def check() -> None:
    """Raise if a variable that decides about kernels has an invalid value.

    The dispatcher calls it. Valid variables are read once a process.

    Raises:
        ValueError: see `read`.
    """
    for name in _OF_KERNELS:
        read(name)


def given() -> dict[str, str]:
    """The environment's variables with this package's prefix, sorted by name."""
    return {name: os.environ[name] for name in sorted(os.environ) if name.startswith(PREFIX)}


def problems() -> list[str]:
    """One line for each variable with this package's prefix that is unknown or invalid."""
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
