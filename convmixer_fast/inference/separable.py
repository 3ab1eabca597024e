"""The check that a model may be computed part by part instead of being called.

`Predictor`, `stream` and heatmaps run some of a model's parts themselves: the classifier image by
image, stem and blocks band by band, the pooling from sums. The result is that of ``model(x)`` only
while every part involved is exactly what its class says. This module alone decides, again at every
call, because users replace, wrap and hook modules at any time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from ..modules.blocks import MixerBlock
from ..modules.fusible import is_depthwise, is_patched, is_patchwise, is_pointwise, is_under_mode
from ..modules.halves import DepthwiseMix
from ..modules.model import GlobalPool
from ..modules.optimize import SequentialDepthwiseMix
from ..modules.stack import MixerStack
from ..modules.stem import PatchEmbed
from ..reference import DropPath

#: Models known to compute head(head_drop(global_pool(blocks(stem(x))))), by their classes' names:
#: timm need not be installed.
_KNOWN = ("convmixer_fast.modules.model.ConvMixer", "timm.models.convmixer.ConvMixer")
_KNOWN_POOLS = (
    "convmixer_fast.modules.model.GlobalPool",
    "timm.layers.adaptive_avgmax_pool.SelectAdaptivePool2d",
)
#: Methods that run when a module is called.
_CALL = ("__call__", "_wrapped_call_impl", "_call_impl", "__getattr__")
#: Methods that run when a known model is called.
_STEPS = (*_CALL, "forward", "forward_features", "forward_head", "_run_stem", "_run_block")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)
#: Activations that are elementwise, or pixelwise.
_ELEMENTWISE = (
    *(nn.CELU, nn.ELU, nn.GELU, nn.Hardshrink, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh),
    *(nn.Identity, nn.LeakyReLU, nn.LogSigmoid, nn.Mish, nn.PReLU, nn.ReLU, nn.ReLU6, nn.SELU),
    *(nn.SiLU, nn.Sigmoid, nn.Softplus, nn.Softshrink, nn.Softsign, nn.Tanh, nn.Tanhshrink),
    nn.Threshold,
)
#: Modules that are the identity in eval mode.
_IDLE = (nn.Dropout, nn.Dropout2d, nn.Identity, DropPath)


def check_eval(model: nn.Module) -> None:
    """Check that the model is in eval mode.

    Raises:
        ValueError: the model, or a module in it, is in training mode.
    """
    for name, module in model.named_modules():
        if module.training:
            where = f"the {type(module).__name__} {name} of the model" if name else "the model"
            raise ValueError(
                f"{where} is in training mode, and inference needs eval mode: "
                "call model.eval() first"
            )


def reason_called_otherwise(model: nn.Module) -> str:
    """Why calling ``model`` may be more than ``forward_head(forward_features(x))``, or ``""``.

    For an unknown class only changes to the object are checked: the two methods are its author's.
    """
    reason = _touched("the model", model)
    known = _known_base(type(model), _KNOWN)
    if not reason and known is not None and not _same(type(model), known, (*_CALL, "forward")):
        reason = f"{type(model).__name__} has a forward of its own"
    return reason


def reason_not_separable(model: nn.Module, *parts: str) -> str:
    """Why running ``parts`` of ``model`` by themselves may differ from ``model(x)``, or ``""``.

    Args:
        parts: children that the caller does not call as ``model(x)`` would. ``"head"``: image by
            image, or its weights are read. ``"head_drop"``: left out. ``"global_pool"``: computed
            from the map's means and maxima. ``"stem"``, ``"blocks"``: on bands of rows.
    """
    cls = type(model)
    known = _known_base(cls, _KNOWN)
    if known is None:
        return f"the parts of a {cls.__name__} are not known to be a ConvMixer's"
    if not _same(cls, known, _STEPS):
        return f"{cls.__name__} has a forward of its own"
    if is_under_mode():
        return "a dispatch or function mode sees its operators"
    if is_patched():
        return "a class or function of torch.nn was patched"
    reasons = (reason for part in parts for reason in _PARTS[part](model))
    reason = _touched("the model", model) or next(filter(None, reasons), "")
    return reason or next(filter(None, map(_replaced, _classes(model, known, parts))), "")


def _classes(model: nn.Module, known: type, parts: tuple[str, ...]) -> set[type]:
    """The classes whose code computes these parts."""
    return {known} | {type(m) for part in parts for m in getattr(model, part).modules()}


def _touched(name: str, module: nn.Module) -> str:
    """Why calling this object may run more than its class's forward, or ``""``."""
    own = module.__dict__
    if any(own[hooks] for hooks in _HOOKS) or _has_any_global_hook():
        return f"{name} has hooks"
    cls = type(module)
    for key, value in own.items():
        # A forward or another method set on the object; also the result of `Module.compile`.
        if callable(value) and hasattr(cls, key):
            return f"{name} has a {key} set on the object"
    return ""


def _known_base(cls: type, names: tuple[str, ...]) -> type | None:
    """The class of ``names`` that ``cls`` is or inherits from."""
    for base in cls.__mro__:
        if f"{base.__module__}.{base.__qualname__}" in names:
            return base
    return None


def _same(cls: type, base: type, names: tuple[str, ...]) -> bool:
    return all(getattr(cls, name, None) is getattr(base, name, None) for name in names)


def _replaced(cls: type) -> str:
    """The method of a class that is not defined by the class's own module, or ``""``.

    A function's globals are those of the module that defines it, under any name.
    """
    for base in cls.__mro__[:-1]:
        members = vars(base)
        for name in _CALL if base is nn.Module else members:
            if name.startswith("__") and name not in _CALL:
                continue
            method = getattr(members.get(name), "__func__", members.get(name))
            if not callable(method) or isinstance(method, type):
                continue
            if getattr(method, "__globals__", {}).get("__name__") != base.__module__:
                return f"the {name} of {cls.__name__} was replaced"
    return ""


def _plain(name: str, module: Any, classes: tuple[type, ...]) -> str:
    """Why ``module`` is not a plain instance of one of ``classes``, or ``""``."""
    if type(module) not in classes:
        return f"{name} is a {type(module).__name__}"
    return _touched(name, module)


def _norm(name: str, norm: Any) -> str:
    reason = _plain(name, norm, (*_NORMS, nn.Identity))
    if reason or type(norm) not in _NORMS:
        return reason
    if norm.running_mean is None or norm.running_var is None:
        return f"{name} has no running statistics"
    return ""


def _head(model: Any) -> Iterator[str]:
    head = model.head
    yield _plain("head", head, (nn.Linear, nn.Identity))
    if type(getattr(head, "weight", None)) not in (nn.Parameter, type(None)):
        yield f"the weight of head is a {type(head.weight).__name__}"


def _head_drop(model: Any) -> Iterator[str]:
    yield _plain("head_drop", model.head_drop, _IDLE)


def _global_pool(model: Any) -> Iterator[str]:
    pool: Any = model.global_pool
    for name, module in pool.named_modules(prefix="global_pool"):
        yield _touched(name, module)
    if f"{type(pool).__module__}.{type(pool).__qualname__}" not in _KNOWN_POOLS:
        yield f"global_pool is a {type(pool).__name__}"
        return
    # Its children can be replaced, so they are compared with those that its class makes.
    made = type(pool)(pool_type=pool.pool_type)
    names = {name: type(module) for name, module in made.named_modules()}
    for name, module in pool.named_modules():
        if name != "flatten" and names.get(name) is not type(module):
            yield f"global_pool.{name} is a {type(module).__name__}"
    # Its settings and its flatten are checked by its result.
    kind = GlobalPool(pool.pool_type)
    if not kind.is_identity():
        x = torch.tensor([[[[0.0, -1.0], [5.0, 2.0]]]], dtype=torch.float32, device="cpu")
        wanted = kind.of_statistics(x.mean((2, 3)), x.amax((2, 3)))
        try:
            found = pool(x)
        except RuntimeError as error:
            found = None
            yield f"global_pool cannot pool a map: {error}"
        if found is not None and (found.shape != wanted.shape or not torch.equal(found, wanted)):
            yield f"global_pool does not compute {pool.pool_type!r}"


def _blocks(model: Any) -> Iterator[str]:
    yield _plain("blocks", model.blocks, (MixerStack, nn.Sequential))
    for key, block in model.blocks._modules.items():
        yield from _block(f"blocks.{key}", block)


def _stem(model: Any) -> Iterator[str]:
    stem = model.stem
    yield _plain("stem", stem, (PatchEmbed, nn.Sequential))
    if len(stem) != 3:
        yield f"stem has {len(stem)} children, not convolution, activation and norm"
    conv, act, norm = stem
    yield _plain("stem.0", conv, (nn.Conv2d,))
    if not is_patchwise(conv):
        yield f"stem.0 is not a convolution of square patches that do not overlap: {conv}"
    yield _plain("stem.1", act, _ELEMENTWISE)
    yield _norm("stem.2", norm)


def _block(name: str, block: Any) -> Iterator[str]:
    if type(block) is not MixerBlock:
        yield (
            f"{name} is a {type(block).__name__}, not a MixerBlock: "
            "convmixer_fast.optimize(model) makes them"
        )
    yield _plain(name, block, (MixerBlock,))
    if len(block) != 4:
        yield f"{name} has {len(block)} children, not 4"
    spatial, conv, act, norm = block
    yield _plain(f"{name}.0", spatial, (DepthwiseMix, SequentialDepthwiseMix))
    yield from _branch(f"{name}.0", spatial)
    yield _plain(f"{name}.1", conv, (nn.Conv2d,))
    if not is_pointwise(conv):
        yield f"{name}.1 is not a dense 1x1 convolution: {conv}"
    yield _plain(f"{name}.2", act, _ELEMENTWISE)
    yield _norm(f"{name}.3", norm)


def _branch(name: str, spatial: Any) -> Iterator[str]:
    if spatial.drop_path is not None:
        yield _plain(f"{name}.drop_path", spatial.drop_path, _IDLE)
    name, branch = f"{name}.{spatial._branch}", getattr(spatial, spatial._branch)
    yield _plain(name, branch, (nn.Sequential,))
    if len(branch) != 3:
        yield f"{name} has {len(branch)} children, not convolution, activation and norm"
    conv, act, norm = branch
    yield _plain(f"{name}.0", conv, (nn.Conv2d,))
    if not is_depthwise(conv):
        yield f'{name}.0 is not a "same" depthwise convolution: {conv}'
    yield _plain(f"{name}.1", act, _ELEMENTWISE)
    yield _norm(f"{name}.2", norm)


_PARTS = {
    "head": _head,
    "head_drop": _head_drop,
    "global_pool": _global_pool,
    "stem": _stem,
    "blocks": _blocks,
}
