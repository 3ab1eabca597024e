"""A record of what fused modules choose, for `explain` and `tune`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

from torch import nn

from .dispatch import Choice
from .registry import Call

_log: ContextVar[list[Record] | None] = ContextVar("convmixer_fast_log", default=None)
_whole: ContextVar[bool] = ContextVar("convmixer_fast_whole", default=True)
_modes: ContextVar[int] = ContextVar("convmixer_fast_modes", default=0)


class Record(NamedTuple):
    """One call of a fused module: the module, the operator's name and the choice."""

    module: nn.Module
    op: str
    choice: Choice
    call: Call | None = None


@contextmanager
def recording(whole_blocks: bool = True, modes: int = 0) -> Iterator[list[Record]]:
    """Collect what fused modules report inside the block.

    Args:
        whole_blocks: False for what a compiler gets to see: each half of a block by itself.
        modes: dispatch modes that the caller sets himself, which watch nothing.
    """
    rows: list[Record] = []
    log, whole, own = _log.set(rows), _whole.set(whole_blocks), _modes.set(modes)
    try:
        yield rows
    finally:
        _log.reset(log)
        _whole.reset(whole)
        _modes.reset(own)


def has_whole_blocks() -> bool:
    """Whether blocks may be recorded, or run, as a whole."""
    return _whole.get()


def modes_of_recording() -> int:
    """How many dispatch modes are those of `recording` itself."""
    return _modes.get()


def is_recording() -> bool:
    return _log.get() is not None


def record(module: nn.Module, op: str, choice: Choice, call: Call | None = None) -> None:
    rows = _log.get()
    if rows is not None:
        rows.append(Record(module, op, choice, call))
