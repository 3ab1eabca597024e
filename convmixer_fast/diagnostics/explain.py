"""The backend of every fused operator of a model on an input, and the reason."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ..modules.optimize import unwrapped
from ..ops.recording import Record, recording
from ..ops.registry import Call


class Row(NamedTuple):
    """One fused operator of a model: its module, its name, its backend and the reason."""

    module: str
    op: str
    backend: str
    reason: str


class Explanation(list[Row]):
    """Rows in the order of the forward pass; printed, equal neighbours are one line."""

    def __str__(self) -> str:
        if not self:
            return "no fused modules: convmixer_fast.optimize(model) puts them in"
        lines: list[tuple[str, str, str, str, int]] = []
        grouped: dict[tuple[str, str, str], list[str]] = {}
        for row in self:
            grouped.setdefault((row.op, row.backend, row.reason), []).append(row.module)
        for (op, backend, reason), names in grouped.items():
            where = names[0] if len(names) == 1 else f"{names[0]} ... {names[-1]}"
            lines.append((op, where, backend, reason, len(names)))
        width = max(len(line[1]) for line in lines)
        return "\n".join(
            f"{op:<14} {count:>3} x  {where:<{width}}  {backend:<9}  {reason}"
            for op, where, backend, reason, count in lines
        )


def explain(model: nn.Module, x: Tensor) -> Explanation:
    """The backend of every fused operator of ``model`` on inputs like ``x``, and the reason.

    Runs the forward pass on fake tensors: nothing is computed, and parameters and BatchNorm
    statistics stay as they are, in training mode too.

    Args:
        model: any module; only `DepthwiseMix`, `PointwiseMix` and `MixerBlock` inside it report. Of
            one wrapped in DDP, DataParallel or torch.compile, the model inside is asked.
        x: an input; only its shape, strides, dtype and device matter.

    Raises:
        BackendError: a backend asked for by name cannot run.
        TypeError: not a module and a tensor.
    """
    if not isinstance(model, nn.Module) or not isinstance(x, Tensor):
        raise TypeError(
            "explain takes a torch.nn.Module and an input tensor, "
            f"got {type(model).__name__} and {type(x).__name__}"
        )
    names: dict[nn.Module, str] = {}
    for name, module in model.named_modules():
        names.setdefault(module, name or type(module).__name__)
    return Explanation(
        Row(names.get(r.module, type(r.module).__name__), r.op, r.choice.backend, r.choice.reason)
        for r in _records(model, x)
    )


def recorded_calls(model: nn.Module, x: Tensor) -> list[Call]:
    """Every call that GPU kernels may compute in a forward of ``model`` on inputs like ``x``."""
    calls = (record.call for record in _records(model, x) if record.call is not None)
    return [call for call in calls if call.key is not None]


def _records(model: nn.Module, x: Tensor) -> list[Record]:
    model, compiled = unwrapped(model)
    fake = FakeTensorMode()
    state: dict[str, Tensor] = {
        name: fake.from_tensor(tensor)
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]
    }
    with fake, recording(whole_blocks=not compiled, modes=1) as records:
        torch.func.functional_call(model, state, (fake.from_tensor(x),))
    return records
