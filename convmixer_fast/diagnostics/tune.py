"""Measure which kernel is fastest on this GPU at a model's shapes, only when asked.

For every fused operator that a model calls: our kernel with the shipped tile and with its
neighbours, and PyTorch's own operators in both layouts, the conversions counted. The fastest
computes that operator at that shape from then on, in this process and, through a file
(`convmixer_fast.backends.tuning_cache`), in later ones.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..backends import gpu, self_check, tuning_cache
from ..backends.kernel_key import UINT8_STEM, Case
from ..backends.triton import configs, support
from ..ops import BackendError, depthwise, pointwise, registry, stem
from .explain import recorded_calls
from .timing import gpu_seconds

#: Another candidate than the shipped kernel must be faster by this factor: less is noise.
MARGIN = 1.02

#: Each kernel's operator in PyTorch's own calls.
REFERENCES: dict[str, Callable[..., Tensor]] = {
    "depthwise_mix": depthwise._reference,
    "pointwise_mix": pointwise._reference,
    "patch_embed": pointwise._reference,
    UINT8_STEM: stem._reference,
}
#: Operators whose kernel size is a stride.
STEMS = ("patch_embed", UINT8_STEM)
#: In which PyTorch's own operators are tried.
LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}


class TuneRow(NamedTuple):
    """One kind of call, and the fastest candidate. ``skipped``: candidates that cannot run here."""

    case: Case
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
    why_not = support.why_not(device)
    if why_not:
        raise BackendError(f"tune measures GPU kernels, which cannot run: {why_not}")
    dtype = torch.float32 if parameter is None else parameter.dtype
    calls: dict[tuple[Case, tuple[int, int, int]], None] = {}
    for given in shapes:
        if not isinstance(given, Tensor):
            # Memory of its own: strides are part of a stem's form.
            given = torch.empty(tuple(given), dtype=dtype, device=device)
        for call in recorded_calls(model, given):
            calls[call.case._replace(tile=""), call.shape] = None
    report = TuneReport()
    found: dict[tuple[Case, tuple[int, int, int]], tuning_cache.TunedEntry] = {}
    for case, shape in calls:
        with torch.no_grad(), support.on_device(device):
            row = _measure(case, shape, timer or gpu_seconds)
        found[case, shape] = row.verdict
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


def _measure(
    case: Case, shape: tuple[int, int, int], timer: Callable[[Callable[[], Any]], float]
) -> TuneRow:
    operands = gpu.operands_for(case, shape)
    wanted = layout_of(case, operands[0])
    reference = REFERENCES[case.op]
    seconds: dict[str, float] = {}
    tiles: dict[str, tuning_cache.Config | None] = {}
    skipped: dict[str, str] = {}
    for config in _candidates(case, shape):
        name = "triton" if config is None else str(config)
        if isinstance(config, configs.DepthwiseConfig | configs.PointwiseConfig):
            name = f"triton {config}"
        tiles[name] = config
        why = self_check.left(case, config)
        try:
            if not why:
                with self_check.trying(case, config):
                    why = gpu.check(case, reference, config)
        except (torch.OutOfMemoryError, self_check.ContextLostError):
            raise
        except Exception as error:  # a tile that does not fit this GPU is no candidate
            why = self_check.describe(error)
        if why:
            skipped[name] = why
            continue
        with self_check.trying(case, config):
            seconds[name] = timer(gpu.launcher(case, operands, config))
    for name, memory_format in LAYOUTS.items():
        arguments = (memory_format, wanted, reference, *operands)
        seconds[name] = timer(partial(gpu.in_layout, *arguments))
    fastest = min(seconds, key=lambda name: seconds[name])
    if "triton" in seconds and seconds["triton"] <= MARGIN * seconds[fastest]:
        fastest = "triton"
    winner = fastest.split(" ")[0]
    entry = tuning_cache.TunedEntry(winner, tiles.get(fastest), seconds)
    return TuneRow(case, shape, entry, skipped)


def layout_of(case: Case, x: Tensor) -> torch.memory_format:
    """The layout that the operator of ``case`` gives its result for activations ``x``."""
    return gpu.stem_format(x, case.kernel_size if case.op in STEMS else 1)


def _candidates(case: Case, shape: tuple[int, int, int]) -> Iterator[tuning_cache.Config | None]:
    """The shipped tile (None), then others that may suit this GPU better."""
    if registry.uses_library_gemm(case.op, case.dtype):
        yield configs.ProductConfig()
        return
    yield None
    found: list[tuning_cache.Config] = []
    if case.op == "depthwise_mix":
        shipped = configs.lookup_depthwise(case.dtype, case.kernel_size, case.channels)
        found += [row.config for row in configs.DEPTHWISE if case.kernel_size in row.kernel_sizes]
        # Fewer registers and more programs at once; taller tiles, which read less of their borders.
        found += [replace(shipped, columns=4), replace(shipped, rows=2 * shipped.rows)]
        found = [config for config in found if config != shipped]
    elif case.op == "pointwise_mix":
        device = torch.device(case.device)
        found += gpu.pointwise_tiles(device, case.dtype)
        found += [configs.ProductConfig(), *registry.cuda_candidates(case, shape)]
    yield from dict.fromkeys(found)


__all__ = ["TuneReport", "TuneRow", "tune"]
