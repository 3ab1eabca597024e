"""From an operator's call to its result: the choice, the self-check, the launch, the fallback."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..backends import self_check
from ..backends.kernel_key import KernelKey
from ..backends.layout import Shape, in_layout
from ..backends.operands import Packed
from ..backends.triton.support import on_device
from ..backends.tuning_cache import Config
from ..testing import ErrorReport, error_report
from .dispatch import Choice, call_of, choose, require_fallback
from .registry import OPERATORS, Implementation, Operator


def run(
    operator: Operator,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    act: str,
    *more: Any,
    dtype: torch.dtype | None = None,
    choice: Choice | None = None,
    prepared: Tensor | None = None,
) -> Tensor:
    """The result of an operator by the implementation that `dispatch.choose` names.

    Args:
        x, weight, bias, scale, shift, act, more: the operator's arguments; checked, and not empty.
        dtype: that is computed in, where it is not that of ``x``.
        choice: for this call, where it was made already.
        prepared: of the packed copy, by the implementation that was chosen.
    """
    operands = (weight, bias, scale, shift, act, *more)
    call = call_of(operator, x, weight, bias, act, dtype)
    operator = call.operator
    choice = choice or choose(call)
    while choice.implementation is not None:
        out = _computed(choice, prepared, x, *operands)
        if out is not None:
            return out
        prepared = None
        # What was just found to be bad has a second choice; what could not be checked has not.
        require_fallback(operator, choice)
        tried, choice = choice.key, choose(call)
        if choice.key == tried:
            break
    if choice.memory_format is None and operator.composed is not None:
        return operator.composed(x, *operands)
    # Operands have the dtype they are to be computed in: autocast has nothing to add.
    with torch.autocast(x.device.type, enabled=False):
        wanted = operator.result_format(x, weight)
        return in_layout(choice.memory_format, wanted, operator.reference, x, *operands)


def _computed(choice: Choice, prepared: Tensor | None, x: Tensor, *operands: Any) -> Tensor | None:
    """The result by the chosen implementation; None where its kernel is wrong or unchecked."""
    implementation, key, config = choice.implementation, choice.key, choice.config
    assert implementation is not None
    if key is None:
        return implementation.run(x, *operands, config=config, prepared=prepared)
    with on_device(x.device):
        if not self_check.ready(
            key,
            lambda tile: check(implementation, key, config if tile is None else tile),
            lambda: implementation.plainer(key, config),
        ):
            return None
    config = self_check.fallback_tile(key)[0] or config
    return launch(implementation, key, config, x, *operands, prepared=prepared)


def launch(
    implementation: Implementation,
    key: KernelKey,
    config: Config | None,
    x: Tensor,
    *operands: Any,
    prepared: Any = None,
) -> Tensor | None:
    """The result of a kernel that was found right, or None where it could not be launched."""
    with on_device(x.device):
        try:
            return implementation.run(x, *operands, config=config, prepared=prepared)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a launch can fail in as many ways as a first one
            if not self_check.is_on():
                raise
            self_check.fail(key, error)
            return None


def check(implementation: Implementation, key: KernelKey, config: Config | None = None) -> str:
    """What is wrong with a kernel on a small random input; ``""`` for nothing."""
    report = measure_errors(implementation, key, config)
    return "" if report.ok else f"wrong numbers, {report}"


def measure_errors(
    implementation: Implementation, key: KernelKey, config: Config | None = None
) -> ErrorReport:
    """Errors of a kernel on a small random input, against float64."""
    operator, device = implementation.operator, torch.device(key.device)
    config = implementation.form_of_sample(key, config)
    autocast = torch.autocast(device.type, enabled=False)
    with torch.no_grad(), autocast, on_device(device):
        operands = operator.sample(key, operator.sample_shape(key))
        ours = implementation.run(*operands, config=config)
        theirs = operator.reference(*operands)
        wide = (t.double() if isinstance(t, Tensor) else t for t in operands)
        return error_report(ours, theirs, operator.reference(*wide))


def launcher(
    implementation: Implementation, operands: list[Any], config: Config | None = None
) -> Callable[[], Tensor]:
    """A call of a kernel on an operator's arguments, as a module launches it.

    Parameters are prepared here, once, as a module keeps them.
    """
    x = operands[0]
    prepared = implementation.pack(Packed(*operands[1:5]), None).prepared

    def call() -> Tensor:
        with on_device(x.device):
            return implementation.run(*operands, config=config, prepared=prepared)

    return call


def sample(key: KernelKey, shape: Shape) -> list[Any]:
    """Random arguments for the operator of a key: x, weight, bias, scale, shift, act, and those of
    its own. x (N, C, H, W) is channels-last; of a stem it lies as `KernelKey.form` says."""
    return OPERATORS[key.op].sample(key, shape)


__all__ = ["check", "launch", "launcher", "measure_errors", "run", "sample"]
