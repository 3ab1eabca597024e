"""The choice of an implementation for a call, and its reason.

``auto`` takes the first implementation that can run: what `convmixer_fast.tune` measured, else the
operator's order, else that of the backends; PyTorch's own operators (``reference``) where none can.
A backend that is asked for by name and cannot run raises and says why. The variable
``CONVMIXER_FAST_BACKEND`` overrides `use_backend`, so that a user can switch kernels off in a
program that is not theirs.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor

from .. import environment
from ..backends import self_check, tuning_cache
from ..backends.kernel_key import KernelKey
from ..backends.tuning_cache import Config, TunedEntry
from .registry import (
    BACKENDS,
    Call,
    Implementation,
    Operator,
    backends,
    implementations,
)

ENVIRONMENT = "CONVMIXER_FAST_BACKEND"

_requested: ContextVar[str] = ContextVar("convmixer_fast_backend", default="auto")
_LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}


class BackendError(RuntimeError):
    """A backend was asked for by name and cannot run."""


class Choice(NamedTuple):
    """The backend of a call, and why it and no faster one.

    ``implementation``: None for PyTorch's operators; ``memory_format``: the layout in which those
    were found to be fastest, if known; ``key``, ``config``: the kernel, where one is compiled.
    """

    backend: str
    reason: str
    implementation: Implementation | None = None
    memory_format: torch.memory_format | None = None
    key: KernelKey | None = None
    config: Config | None = None


def _check_name(name: str, where: str) -> str:
    wanted = name.strip().lower() or "auto"
    if wanted not in ("auto", *BACKENDS) and wanted not in backends():
        names = ", ".join(dict.fromkeys(("auto", *BACKENDS, *backends())))
        raise BackendError(f"{where}: unknown backend {name!r}: one of {names}")
    return wanted


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Ask for a backend by name (or ``"auto"``) inside a ``with`` block, in this thread and task.

    ``CONVMIXER_FAST_BACKEND``, where set, wins.

    Raises:
        BackendError: no backend has that name.
    """
    token = _requested.set(_check_name(name, "use_backend"))
    try:
        yield
    finally:
        _requested.reset(token)


def requested_backend() -> str:
    """What the environment or `use_backend` asks for: a backend's name, or ``"auto"``."""
    environment.check()
    asked = os.environ.get(ENVIRONMENT)
    return _check_name(asked.strip().lower(), ENVIRONMENT) if asked else _requested.get()


def available_backends() -> dict[str, str]:
    """Every backend, with ``""`` where it can run on this machine, else the reason why not."""
    return {"reference": ""} | {name: b.unavailable_here() for name, b in backends().items()}


def automatic_backends(device: torch.device) -> tuple[str, ...]:
    """The backends that ``auto`` considers for tensors of a device."""
    return tuple(name for name, backend in backends().items() if backend.is_automatic(device))


def call_of(
    operator: Operator,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    act: str,
    dtype: torch.dtype | None = None,
) -> Call:
    """The `Call` of an operator on ``x``.

    Args:
        dtype: that is computed in, where it is not that of ``x``.
    """
    if weight.shape[-1] == 1:
        operator = operator.of_stride_one or operator
    plain = Call(operator, x.device, dtype or x.dtype, weight.shape[0])
    if not any(i.compiles_for(x.device) for i in implementations(operator)):
        return plain
    key = operator.key_of(x, weight, bias, act, dtype)
    shape = (x.shape[0], x.shape[2], x.shape[3])
    return plain._replace(key=key, shape=shape, tuned=tuning_cache.lookup(key, shape))


def choose(call: Call) -> Choice:
    """Who computes a call.

    Raises:
        BackendError: the backend asked for by name cannot run, with the reason.
    """
    asked = requested_backend()
    if asked == "reference":
        return Choice("reference", "asked for by name")
    return _choose_automatically(call) if asked == "auto" else _choose_named(asked, call)


def _choose_automatically(call: Call) -> Choice:
    allowed = automatic_backends(call.device)
    found = [i for i in implementations(call.operator) if i.backend in allowed]
    refused: dict[str, str] = {}
    tuned = call.tuned
    if tuned is not None:
        because = f"; tuned: {tuned.reason()}"
        if tuned.winner in _LAYOUTS:
            return Choice("reference", because[2:], memory_format=_LAYOUTS[tuned.winner])
        # Tuned in another build, or with TF32 allowed, it may be of none.
        measured = [i for i in found if _is_winner(i, tuned) and not i.unavailable(call)][:1]
        choice = _first_right(call, measured, tuned, because, refused)
        if choice is not None or measured:
            return choice or _by_pytorch(refused)
    order, because = call.operator.order(call), ""
    named = {i.name: i for i in found}
    if order is not None and named.keys() & set(order.names):
        found = [named.pop(name) for name in order.names if name in named]
        because = f"; {order.reason}"
    choice = _first_right(call, found, None, because, refused)
    if choice is not None:
        return choice
    # Others could run, but are expected to be slower than PyTorch.
    left_out = any(not i.unavailable(call) for i in named.values() if i not in found)
    return _by_pytorch(refused, because if left_out else "")


def _by_pytorch(refused: dict[str, str], because: str = "") -> Choice:
    # A reason that several share, such as no GPU, is given once.
    distinct = {why: name for name, why in reversed(refused.items())}
    reasons = [f"{name}: {why}" for why, name in reversed(distinct.items())]
    if not reasons:
        return Choice("reference", "no backend computes this operator here")
    return Choice("reference", "; ".join(reasons) + because)


def _choose_named(asked: str, call: Call) -> Choice:
    backend, operator = backends()[asked], call.operator
    _require(asked, backend.unavailable(call.device))
    found = [i for i in implementations(operator) if i.backend == asked]
    note = ""
    if not found:
        note = f"the {asked} backend has no kernel for {operator.name}: "
        found = [i for i in implementations(operator) if i.backend == backend.extends]
    refused = {i.label: why for i in found if (why := i.unavailable(call))}
    able = [i for i in found if i.label not in refused]
    able = [i for i in able if i.is_whole] or able
    because = "" if call.tuned is None else f"; tuned: {call.tuned.reason()}"
    choice = _first_right(call, able, call.tuned, because, refused, note)
    if choice is not None:
        return choice._replace(reason=f"asked for by name: {choice.reason}")
    if not note:
        _require(asked, "; ".join(dict.fromkeys(refused.values())))
    return Choice("reference", note + _by_pytorch(refused).reason)


def _first_right(
    call: Call,
    found: list[Implementation],
    tuned: TunedEntry | None,
    because: str,
    refused: dict[str, str],
    note: str = "",
) -> Choice | None:
    """The first implementation that can run and was not found to be wrong.

    Args:
        tuned: what was measured, if that counts.
        because: the end of the reason.
        note: the beginning of the reason.
        refused: gets the others' names and why they do not.
    """
    for i in found:
        config = tuned.config if tuned is not None and _is_winner(i, tuned) else i.config
        key = call.key if i.compiles_for(call.device) else None
        if key is not None and config is not None:
            key = key._replace(tile=str(config))
        # First the reason for which no kernel would be wanted.
        why = ("" if tuned is not None else _slower(i, call)) or i.unavailable(call)
        why = why or (self_check.result(key) if key is not None else "") or ""
        if why:
            refused[i.label] = why
            continue
        rest = "".join(f"; not {name}: {why}" for name, why in refused.items())
        checked = f", {_check_state(key)}" if i.compiles_for(call.device) else ""
        reason = f"{note}{i.what}{checked}{because}{rest}"
        return Choice(i.backend, reason, i, None, key, config)
    return None


def _is_winner(implementation: Implementation, tuned: TunedEntry) -> bool:
    names = (implementation.name, implementation.backend)
    return tuned.winner in names and implementation.takes(tuned.config)


def _slower(implementation: Implementation, call: Call) -> str:
    return implementation.slower(call) if requested_backend() == "auto" else ""


def _check_state(key: KernelKey | None) -> str:
    if key is not None and self_check.result(key) == "":
        _, why = self_check.fallback_tile(key)
        plain = f", without the copy engine: {why}" if why else ""
        return f"checked against PyTorch{plain}"
    return "to be checked at its first use" if self_check.is_on() else "not checked"


def composed(reason: str) -> Choice:
    """PyTorch's own operators, for what no backend computes as one operator.

    Raises:
        BackendError: the backend asked for by name is not on this machine.
    """
    asked = requested_backend()
    if asked not in ("auto", "reference"):
        _require(asked, backends()[asked].unavailable_here())
    return Choice("reference", reason)


def require_fallback(operator: Operator, choice: Choice) -> None:
    """Refuse the fallback from a kernel that failed its self-check if its backend was named.

    Raises:
        BackendError: the kernel's backend was asked for by name.
    """
    if requested_backend() != choice.backend:
        return
    why = self_check.result(choice.key) if choice.key is not None else None
    _require(
        choice.backend,
        why
        or f"the kernel of {operator.name} could not be checked here (a CUDA graph is being "
        "captured, or memory is short): run the model once before",
    )


def _require(asked: str, why_not: str) -> None:
    if why_not:
        raise BackendError(
            f"backend {asked!r} was asked for but cannot run: {why_not}. "
            f"Use backend 'auto', or unset {ENVIRONMENT}"
        )


def runs(operator: Operator, device: torch.device, dtype: torch.dtype, channels: int) -> bool:
    """Whether an implementation computes such calls, as far as is known before one. Never raises.

    Args:
        channels: of the result.
    """
    asked, call = requested_backend(), Call(operator, device, dtype, channels)
    allowed = automatic_backends(device) if asked == "auto" else (asked,)
    return any(
        i.backend in allowed and not i.unavailable(call) and not _slower(i, call)
        for i in implementations(operator)
    )


def reason_left_to_pytorch(
    operator: Operator, device: torch.device, dtype: torch.dtype, channels: int
) -> str:
    """Why ``auto`` leaves calls to PyTorch, which is faster; ``""`` where it does not."""
    if requested_backend() != "auto":
        return ""
    allowed, call = automatic_backends(device), Call(operator, device, dtype, channels)
    reasons = (i.slower(call) for i in implementations(operator) if i.backend in allowed)
    return next(filter(None, reasons), "")


def has_gpu_implementation(device: torch.device, dtype: torch.dtype, operator: Operator) -> bool:
    """Whether kernels that are compiled at first use compute such calls, as far as is known before.

    Under ``auto`` only on a GPU; by name on CPU tensors too, where kernels are emulated.
    """
    found = [i for i in implementations(operator) if i.compiles_for(device)]
    if not found:
        return False
    asked, call = requested_backend(), Call(operator, device, dtype, 0)
    allowed: tuple[str, ...] = ()
    if asked == "auto":
        allowed = automatic_backends(device)
    elif asked != "reference":
        allowed = (asked, backends()[asked].extends)
    return any(i.backend in allowed and not i.unavailable(call) for i in found)


def runs_whole(call: Call) -> bool:
    """Whether no part of a call is PyTorch's, where kernels compute it."""
    order = call.operator.order(call)
    if order is None or requested_backend() != "auto":
        return True
    return all(i.is_whole for i in implementations(call.operator) if i.name in order.names)
