"""The promise that a model does not change any more."""

from __future__ import annotations

import warnings
from typing import TypeVar

from torch import nn

from .fused import FusedModule
from .route import Promise
from .stack import refresh

M = TypeVar("M", bound=nn.Module)


def is_promised(model: nn.Module) -> bool:
    """Whether ``model`` was given to `optimize_for_inference` and has kept the promise since."""
    promises = [module._promise for module in model.modules() if isinstance(module, FusedModule)]
    return bool(promises) and all(promise and promise.is_kept for promise in promises)


def optimize_for_inference(model: M) -> M:
    """Run the fused modules of ``model`` without comparing their settings and parameters.

    An ordinary fused model compares both with its packed copies at every call, so that any write
    is seen. After this call it compares inputs, modules and hooks only, which matters for small
    models and batches. The results are the same.

    `train()`, `load_state_dict()`, `to()` and its relatives, `refresh()`, and children, parameters
    or hooks that are replaced, added or removed are still seen; the first three end the promise.
    A write into a parameter or buffer that stays in its place (an optimizer step, ``copy_``,
    ``.data``), another ``eps`` or ``padding``, and a method patched on an object or class are not
    seen, as after `torch.jit.freeze`: call `optimize_for_inference` again after them, or
    `refresh`.

    Args:
        model: any module with fused modules in it, in eval mode (see `optimize`).

    Returns:
        ``model`` itself.

    Raises:
        TypeError: not a module.
        ValueError: a module inside is in training mode.

    Warns:
        UserWarning: ``model`` has no fused module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"optimize_for_inference takes a torch.nn.Module, got {type(model).__name__}: "
            "pass the model itself"
        )
    training = [name for name, module in model.named_modules() if module.training]
    if training:
        raise ValueError(
            f"optimize_for_inference takes a model in eval mode, {training[0] or 'the model'!r} is "
            "in training mode: call model.eval() first"
        )
    fused = [module for module in model.modules() if isinstance(module, FusedModule)]
    if not fused:
        warnings.warn(
            f"optimize_for_inference: {type(model).__name__} has no fused module, nothing changed: "
            "call convmixer_fast.optimize(model, for_inference=True)",
            stacklevel=2,
        )
    promise = Promise()
    for module in fused:
        module._promise = promise
    # The next call packs again: a write that no comparison sees may have come before.
    refresh(model)
    return model
