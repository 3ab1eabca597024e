"""Measure which kernel is fastest on this GPU at a model's shapes, only when asked.

For every fused operator that a model calls: our kernel with the shipped tile and with its
neighbours, and PyTorch's own operators in both layouts, the conversions counted. The fastest
computes that operator at that shape from then on, in this process and, through a file
(`convmixer_fast.backends.tuning_cache`), in later ones.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..backends import self_check, tuning_cache
from ..backends.kernel_key import KernelKey
from ..backends.layout import Shape, in_layout
from ..backends.triton.support import on_device
from ..ops import BackendError, execution
from ..ops.registry import OPERATORS, Call, Implementation, backends, implementations
from .explain import recorded_calls
from .timing import gpu_seconds

#: Another candidate than the shipped kernel must be faster by this factor: less is noise.
MARGIN = 1.02

#: In which PyTorch's own operators are tried.
LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}


class TuneRow(NamedTuple):
    """One kind of call, and the fastest candidate. ``skipped``: candidates that cannot run here."""

    case: KernelKey
    shape: tuple[int, int, int]
    verdict: tuning_cache.TunedEntry
    skipped: dict[str, str]


class TuneReport(list[TuneRow]):
    """A row for each kind of call; ``path``: where the entries are kept, "" for nowhere."""

    path: str = ""

    def __str__(self) -> str:
        if not self:
            return "nothing to tune: no fused operator of the model runs on a GPU"
        lines = []
        for case, shape, verdict, skipped in self:
            tile = f" {verdict.config}" if verdict.config is not None else ""
            lines.append(
                f"{case}, {' x '.join(map(str, shape))}: {verdict.winner}{tile} "
                f"({verdict.reason()}{f'; {len(skipped)} cannot run' if skipped else ''})"
            )
        return "\n".join([*lines, f"kept in {self.path}" if self.path else "not kept"])


def tune(
    model: nn.Module,
    shapes: Iterable[Sequence[int] | Tensor],
    *,
    timer: Callable[[Callable[[], Any]], float] | None = None,
    save: bool = True,
) -> TuneReport:
    """Measure the fastest implementation of each fused operator of a model, and use it from now on.

    Takes about a second for each candidate that has to be compiled, a few seconds for each kind of
    call. The model itself is not run and not changed. Every candidate is checked before it is
    timed.

    Args:
        model: on a GPU, in eval mode (of a training model nothing is fused). Its dtype counts.
        shapes: inputs to tune for: shapes (N, C, H, W), or tensors of any strides. Verdicts hold
            for exactly these shapes.
        timer: takes a call and returns its seconds; by default measures on the GPU
            (`convmixer_fast.diagnostics.timing.gpu_seconds`).
        save: False for this process alone.

    Returns:
        What was measured; printed, one line for each kind of call.

    Raises:
        BackendError: no GPU kernels can run here, with the reason.
        TypeError: not a module.

    Warns:
        RuntimeWarning: the file cannot be written; the entries hold for this process.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"tune takes a torch.nn.Module, got {type(model).__name__}")
    parameter = next(iter(model.parameters()), None)
    device = torch.device("cpu") if parameter is None else parameter.device
    why_not = reason_nothing_compiles(device)
    if why_not:
        raise BackendError(f"tune measures GPU kernels, which cannot run: {why_not}")
    dtype = torch.float32 if parameter is None else parameter.dtype
    calls: dict[tuple[KernelKey, Shape], Call] = {}
    for given in shapes:
        if not isinstance(given, Tensor):
            # Memory of its own: strides are part of a stem's form.
            given = torch.empty(tuple(given), dtype=dtype, device=device)
        for call in recorded_calls(model, given):
            assert call.key is not None
            assert call.shape is not None
            calls[call.key, call.shape] = call
    report = TuneReport()
    found: dict[tuple[KernelKey, Shape], tuning_cache.TunedEntry] = {}
    for (key, shape), call in calls.items():
        with torch.no_grad(), on_device(device):
            row = _measure(call, key, shape, timer or gpu_seconds)
        found[key, shape] = row.verdict
        report.append(row)
    if found:
        try:
            path = tuning_cache.keep(device, found, save=save)
            report.path = str(path) if save else ""
        except OSError as error:
            warnings.warn(
                f"tune: the tuning_cache hold for this process only: {error}",
                RuntimeWarning,
                stacklevel=2,
            )
    return report


def reason_nothing_compiles(device: torch.device) -> str:
    """Why no backend compiles kernels for tensors of ``device``; ``""`` where one does."""
    known = backends()
    compiling = [known[name] for name in known if _compiles(name, device)]
    reasons = [backend.unavailable(device) for backend in compiling]
    if not reasons:
        return f"the tensors are on {device.type}"
    return "" if "" in reasons else reasons[0]


def _compiles(backend: str, device: torch.device) -> bool:
    found = (i for operator in OPERATORS.values() for i in implementations(operator))
    return any(i.backend == backend and i.compiles_for(device) for i in found)


def _measure(
    call: Call, key: KernelKey, shape: Shape, timer: Callable[[Callable[[], Any]], float]
) -> TuneRow:
    operator = call.operator
    operands = execution.sample(key, shape)
    wanted = operator.result_format(*operands[:2])
    seconds: dict[str, float] = {}
    tiles: dict[str, tuning_cache.Config | None] = {}
    skipped: dict[str, str] = {}
    for implementation, config in _candidates(call):
        name = _name_of(implementation, config)
        tiles[name] = config
        why = self_check.left(key, config)
        try:
            if not why:
                with self_check.trying(key, config):
                    why = execution.check(implementation, key, config)
        except (torch.OutOfMemoryError, self_check.ContextLostError):
            raise
        except Exception as error:  # a tile that does not fit this GPU is no candidate
            why = self_check.describe(error)
        if why:
            skipped[name] = why
            continue
        with self_check.trying(key, config):
            seconds[name] = timer(execution.launcher(implementation, operands, config))
    for name, memory_format in LAYOUTS.items():
        arguments = (memory_format, wanted, operator.reference, *operands)
        seconds[name] = timer(partial(in_layout, *arguments))
    fastest = min(seconds, key=lambda name: seconds[name])
    shipped = next((name for name, config in tiles.items() if config is None), "")
    if shipped in seconds and seconds[shipped] <= MARGIN * seconds[fastest]:
        fastest = shipped
    winner = fastest.split(" ")[0]
    entry = tuning_cache.TunedEntry(winner, tiles.get(fastest), seconds)
    return TuneRow(key, shape, entry, skipped)


def _name_of(implementation: Implementation, config: tuning_cache.Config | None) -> str:
    """A candidate's name, which begins with one of `tuning_cache.WINNERS`."""
    if config is None:
        return implementation.name
    own = config == implementation.config
    return str(config) if own else f"{implementation.name} {config}"


def _candidates(call: Call) -> Iterator[tuple[Implementation, tuning_cache.Config | None]]:
    """The implementations that can compute a call, each with the shipped tile and with others."""
    for implementation in implementations(call.operator):
        if not implementation.compiles_for(call.device) or implementation.unavailable(call):
            continue
        for config in implementation.candidates(call):
            yield implementation, config


__all__ = ["TuneReport", "TuneRow", "tune"]
