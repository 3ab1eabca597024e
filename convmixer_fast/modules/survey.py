"""The blocks of a model of another library, and what only looks like one.

A block is found by what its modules compute, never by the name of a class or a library: a
container's forward is traced with torch.fx, its children taken as they are (`formula.formula_of`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.fx
from torch import nn

from ..arch import activation_name
from .blocks import MixerBlock
from .formula import STATE_OF_A_MODULE, Refused, formula_of
from .fused import FusedModule
from .fusible import CALL_PATH, is_depthwise, is_pointwise
from .halves import DepthwiseMix, PointwiseMix
from .stack import MixerStack

#: Attributes of the fused modules themselves.
OWN_ATTRIBUTES = frozenset({*FusedModule.__jit_ignored_attributes__, "drop_path"})


#: Methods of `nn.Module` that a container may define without computing or storing anything else.
_HARMLESS = frozenset(
    {"__init__", "forward", "extra_repr", "__repr__", "_get_name", "__dir__"}
    # Bound to the class they are read from, so never the same object.
    | {"__init_subclass__", "__subclasshook__"}
)


@dataclass(frozen=True)
class Finding:
    """A module that is a block or looks like one, and the fused class to take its place, if any."""

    name: str
    module: nn.Module
    was: str
    target: type[DepthwiseMix | PointwiseMix | MixerBlock | MixerStack] | None
    reason: str


def survey(model: nn.Module) -> list[Finding]:
    """Blocks, halves of blocks and what looks like one, children before their parents."""
    return list(_visit(model, "", set(), _Parts()))


class _Parts:
    """Ids of the modules that are fused, or that `optimize` would fuse."""

    def __init__(self) -> None:
        self.spatial: set[int] = set()
        self.blocks: set[int] = set()


def _visit(
    module: nn.Module, name: str, seen: set[int], parts: _Parts, compiled: bool = False
) -> Iterator[Finding]:
    """``seen``: ids of modules not to look at again."""
    if id(module) in seen or isinstance(module, torch.jit.ScriptModule):
        return
    seen.add(id(module))
    branch = None if isinstance(module, FusedModule) else depthwise_branch(module)
    if isinstance(module, MixerBlock):
        parts.blocks.add(id(module))
    if isinstance(module, DepthwiseMix):
        parts.spatial.add(id(module))
        seen.update(map(id, children_of(module).values()))
    if branch is not None:
        finding = _judge(
            module, name, DepthwiseMix, compiled, lambda: _check_spatial(module, branch)
        )
        if finding.target is not None:
            # Its branch is part of it: never to be judged as something else.
            parts.spatial.add(id(module))
            seen.add(id(module._modules[branch]))
        yield finding
    for key, child in children_of(module).items():
        path = f"{name}.{key}" if name else key
        yield from _visit(child, path, seen, parts, compiled=key == "_orig_mod")
    if isinstance(module, FusedModule):
        yield Finding(name, module, *_history(module))
    elif branch is None:
        yield from _look_at(module, name, parts, compiled)


def _look_at(module: nn.Module, name: str, parts: _Parts, compiled: bool) -> Iterator[Finding]:
    """What a module that is no spatial half is: a block, blocks, a channel half, or nearly one."""
    children = list(children_of(module).values())
    spatial = parts.spatial
    if len(children) == 4 and id(children[0]) in spatial and isinstance(children[1], nn.Conv2d):
        finding = _judge(module, name, MixerBlock, compiled, lambda: _check_chain(module))
        if finding.target is not None:
            parts.blocks.add(id(module))
        yield finding
    elif (
        type(module) is nn.Sequential
        and children
        and all(id(child) in parts.blocks for child in children)
    ):
        yield _judge(module, name, MixerStack, compiled, lambda: _check_container(module))
    elif len(children) == 3 and _resembles_pointwise(children):
        yield _judge(module, name, PointwiseMix, compiled, lambda: _check_chain(module))
    elif type(module) is nn.Sequential and any(id(child) in spatial for child in children):
        for i in range(len(children) - 2):
            if _resembles_pointwise(children[i : i + 3]):
                key = list(module._modules)[i]
                yield Finding(
                    f"{name}.{key}" if name else key,
                    children[i],
                    type(children[i]).__name__,
                    None,
                    "the channel half stands flat in a longer Sequential: "
                    "putting it in a module of its own would rename its keys",
                )
    elif len(children) == 3 and _resembles_depthwise(children[0]):
        yield from _look_at_unnested(module, name)


def _look_at_unnested(module: nn.Module, name: str) -> Iterator[Finding]:
    conv, act, norm = module._modules
    try:
        formula = formula_of(module)
    except Refused:
        return
    if formula == f"{norm}({act}({conv}(x))) + x":
        yield Finding(
            name,
            module,
            class_name(module),
            None,
            "its convolution, activation and norm are not in one nn.Sequential",
        )


def _judge(
    module: nn.Module,
    name: str,
    target: type[DepthwiseMix | PointwiseMix | MixerBlock | MixerStack],
    compiled: bool,
    check: Callable[[], None],
) -> Finding:
    try:
        if compiled:
            raise Refused("torch.compile already holds its forward: optimize first, then compile")
        check()
    except Refused as refusal:
        return Finding(name, module, class_name(module), None, str(refusal))
    return Finding(
        name, module, class_name(module), target, f"optimize makes it a {target.__name__}"
    )


def _history(module: nn.Module) -> tuple[str, None, str]:
    """Of a fused module: what stood there, no target, and what to know about it."""
    original = module.__dict__.get("_original")
    if original is None:
        return type(module).__name__, None, "built fused"
    notes = []
    extras = [
        key
        for key in original[0].__dict__
        if key not in STATE_OF_A_MODULE and key not in OWN_ATTRIBUTES
    ]
    if extras:
        notes.append(f"took over the attributes {', '.join(extras)}")
    methods = own_methods(type(original[0]))
    if methods:
        notes.append(f"without the methods {', '.join(methods)}")
    return class_name(original[0]), None, "; ".join(notes)


def own_methods(cls: type[nn.Module]) -> list[str]:
    """Public methods that a container's class has beyond PyTorch's."""
    base = nn.Sequential if issubclass(cls, nn.Sequential) else nn.Module
    return [
        name
        for name in dir(cls)
        if not name.startswith("_") and callable(getattr(cls, name)) and not hasattr(base, name)
    ]


def class_name(module: nn.Module) -> str:
    cls = type(module)
    # The short form of the original README makes a class whose name is empty.
    return cls.__name__ or f"subclass of {cls.__mro__[1].__name__}"


def children_of(module: nn.Module) -> dict[str, nn.Module]:
    return {name: child for name, child in module._modules.items() if child is not None}


def _resembles_depthwise(module: nn.Module | None) -> bool:
    return isinstance(module, nn.Conv2d) and module.groups == module.in_channels


def _resembles_pointwise(children: list[nn.Module]) -> bool:
    """Whether these three are a channel half in outline: a square 1x1, something, and a norm."""
    conv, act, norm = children
    return (
        isinstance(conv, nn.Conv2d)
        and conv.kernel_size == (1, 1)
        and conv.groups == 1
        and conv.in_channels == conv.out_channels
        and not list(act.parameters())
        and isinstance(norm, nn.modules.batchnorm._NormBase | nn.GroupNorm)
    )


def depthwise_branch(module: nn.Module) -> str | None:
    """The child of a small module that is a Sequential beginning with a depthwise convolution."""
    if type(module) in (nn.Sequential, nn.ModuleList, nn.ModuleDict) or len(module._modules) > 3:
        return None
    for name, child in children_of(module).items():
        if isinstance(child, nn.Sequential) and not isinstance(child, FusedModule):
            first = next(iter(child._modules.values()), None)
            if _resembles_depthwise(first):
                return name
    return None


def _check_spatial(module: nn.Module, branch: str) -> None:
    """Raise `Refused` unless a `DepthwiseMix` around the child ``branch`` computes the same."""
    _check_container(module)
    fn = module._modules[branch]
    assert isinstance(fn, nn.Sequential)
    if type(fn) is not nn.Sequential:
        raise Refused(f"its branch is a {class_name(fn)}, not an nn.Sequential")
    _check_untouched(fn, "its branch")
    parts = list(fn._modules.values())
    if len(parts) != 3 or None in parts:
        raise Refused(
            f"its branch holds {len(parts)} modules, not convolution, activation and norm"
        )
    conv, act, norm = fn
    _check_parts(conv, act, norm)
    if not is_depthwise(conv):
        raise Refused(_why_not_depthwise(conv))
    if branch in OWN_ATTRIBUTES or branch in STATE_OF_A_MODULE or hasattr(DepthwiseMix, branch):
        raise Refused(f"its branch has the name {branch}, which a DepthwiseMix uses itself")
    formula = formula_of(module)
    drop_path = module._modules.get("drop_path")
    if drop_path is not None and formula == f"drop_path({branch}(x)) + x":
        _check_drop_path(drop_path)
        expected = {branch, "drop_path"}
    elif formula == f"{branch}(x) + x":
        expected = {branch}
    else:
        raise Refused(f"its forward computes {formula}")
    idle = set(children_of(module)) - expected
    if idle:
        raise Refused(f"it has a child that its forward does not use: {', '.join(sorted(idle))}")


def _check_drop_path(drop_path: nn.Module) -> None:
    _check_untouched(drop_path, "its drop_path")
    # DepthwiseMix leaves it out in eval mode, so it must do nothing there.
    try:
        idle = (
            type(drop_path) is nn.Identity or formula_of(drop_path, (False,), settings=True) == "x"
        )
    except Refused:
        idle = False
    if not idle:
        raise Refused(f"its {class_name(drop_path)} does something in eval mode too")


def _check_chain(module: nn.Module) -> None:
    """Raise `Refused` unless the last three children are a channel half and all run in turn."""
    _check_container(module)
    children = children_of(module)
    if len(children) != len(module._modules):
        raise Refused("it has an empty child")
    conv, act, norm = list(children.values())[-3:]
    _check_parts(conv, act, norm)
    if not is_pointwise(conv):
        raise Refused(f"its 1x1 convolution is not a dense one of stride 1: {conv}")
    if type(module) is not nn.Sequential:
        expected = "x"
        for name in children:
            expected = f"{name}({expected})"
        formula = formula_of(module)
        if formula != expected:
            raise Refused(f"its forward computes {formula}")


def _check_untouched(module: nn.Module, what: str) -> None:
    """Raise `Refused` where this object runs something else than its class's forward."""
    if module.__dict__.get("_compiled_call_impl") is not None:
        raise Refused(f"{what} was compiled in place: optimize first, then compile")
    for name in CALL_PATH:
        if name in module.__dict__:
            raise Refused(f"{what} has a {name} of its own, set on the object")


def _check_container(module: nn.Module) -> None:
    _check_untouched(module, "it")
    own = [*module._parameters, *module._buffers]
    if own:
        raise Refused(f"it has parameters of its own: {', '.join(own)}")
    cls = type(module)
    base = nn.Sequential if isinstance(module, nn.Sequential) else nn.Module
    for name in dir(base):
        theirs = getattr(base, name)
        if callable(theirs) and name not in _HARMLESS and getattr(cls, name) is not theirs:
            raise Refused(f"its class {class_name(module)} has its own {name}")


def _check_parts(conv: nn.Module, act: nn.Module, norm: nn.Module) -> None:
    """Raise `Refused` unless these are the plain modules whose work the operators do."""
    if type(conv) is not nn.Conv2d:
        what = "parametrized" if hasattr(conv, "parametrizations") else "not an nn.Conv2d"
        raise Refused(f"its convolution is {what}: {type(conv).__name__}")
    for part, what in ((conv, "convolution"), (act, "activation"), (norm, "norm")):
        _check_untouched(part, f"its {what}")
    if activation_name(act) is None:
        raise Refused(f"no fused form of its activation {act}")
    if type(norm) not in (nn.BatchNorm2d, nn.SyncBatchNorm):
        raise Refused(f"its norm is a {type(norm).__name__}, not a BatchNorm2d")
    if norm.running_mean is None or norm.running_var is None:
        raise Refused("its BatchNorm keeps no running statistics")
    for part, what in ((conv, "convolution"), (norm, "norm")):
        for name in ("weight", "bias"):
            tensor = getattr(part, name)
            if tensor is None:
                continue
            if part._parameters.get(name) is None:
                raise Refused(
                    f"the {name} of its {what} is computed at each forward "
                    "(weight_norm, spectral_norm, pruning)"
                )
            if type(tensor) is not nn.Parameter:
                raise Refused(f"the {name} of its {what} is a {type(tensor).__name__}")


def _why_not_depthwise(conv: nn.Module) -> str:
    assert isinstance(conv, nn.Conv2d)
    k = conv.kernel_size[0]
    if conv.in_channels != conv.out_channels:
        return f"its convolution maps {conv.in_channels} channels to {conv.out_channels}"
    if conv.stride != (1, 1):
        return f"its convolution has stride {conv.stride}"
    if conv.dilation != (1, 1):
        return f"its convolution has dilation {conv.dilation}"
    if conv.padding_mode != "zeros":
        return f"its convolution pads with {conv.padding_mode!r}, not zeros"
    if conv.kernel_size != (k, k):
        return f"its kernel is not square: {conv.kernel_size}"
    if k > 31:
        return f"its kernel of {k} x {k} is larger than 31 x 31"
    return f'its padding {conv.padding} of a {k} x {k} kernel is not "same"'
