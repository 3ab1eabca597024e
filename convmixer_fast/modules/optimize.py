"""Fused blocks for a model of another library, and the way back.

`optimize` finds ConvMixer blocks by what their modules compute, never by the name of a class or a
library: a container's forward is traced with torch.fx, its children taken as they are, and it is
replaced only where the trace is exactly the block. The fused module that takes a container's place
shares the dictionaries in which PyTorch keeps children, hooks and buffers, so names, state-dict
keys, tensors, hooks and their handles stay what they were, and `restore` puts the very container
back. No class and no library is changed.
"""

from __future__ import annotations

import copy
import operator
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.fx
from torch import nn

from ..arch import activation_name
from ..reference import NormalizedSequential, Residual, ResidualSequential
from .blocks import MixerBlock
from .cuda_graph import StackGraphs
from .for_inference import optimize_for_inference
from .fused import FusedModule, FusedSequential
from .fusible import CALL_PATH, has_its_forward, is_depthwise, is_pointwise, watch_classes
from .halves import DepthwiseMix, PointwiseMix
from .stack import MixerStack
from .stem import PatchEmbed


class SequentialDepthwiseMix(DepthwiseMix, FusedSequential):
    """A `DepthwiseMix` instead of a subclass of Sequential: indexed and iterated as one."""


_FUSED_TYPES = (
    DepthwiseMix,
    SequentialDepthwiseMix,
    PointwiseMix,
    PatchEmbed,
    MixerBlock,
    MixerStack,
)

#: What every module has: children, tensors, hooks, training. All else is the class's or the user's.
_STATE = frozenset(nn.Module().__dict__)
#: Attributes of the fused modules themselves.
_OWN = frozenset({*FusedModule.__jit_ignored_attributes__, "drop_path"})
#: Methods of `nn.Module` that a container may define without computing or storing anything else.
_HARMLESS = frozenset(
    {"__init__", "forward", "extra_repr", "__repr__", "_get_name", "__dir__"}
    # Bound to the class they are read from, so never the same object.
    | {"__init_subclass__", "__subclasshook__"}
)


class OptimizationRow(NamedTuple):
    """One module that is a ConvMixer block or nearly one.

    ``was`` and ``now`` are class names, equal where nothing was replaced; ``reason`` says why.
    """

    module: str
    was: str
    now: str
    reason: str


class OptimizationReport(list[OptimizationRow]):
    """Rows from the innermost modules outwards; printed, equal ones are one line."""

    @property
    def replaced(self) -> list[OptimizationRow]:
        return [row for row in self if row.was != row.now]

    @property
    def kept(self) -> list[OptimizationRow]:
        """What looks like a block and was not replaced, or was built with fused blocks."""
        return [row for row in self if row.was == row.now]

    def __str__(self) -> str:
        if not self:
            return "no ConvMixer blocks"
        grouped: dict[tuple[str, str, str], list[str]] = {}
        for row in self:
            grouped.setdefault((row.was, row.now, row.reason), []).append(row.module)
        lines = [
            (
                f"{was} -> {now}" if was != now else was,
                f"{len(names)} x",
                names[0] if len(names) == 1 else f"{names[0]} ... {names[-1]}",
                reason,
            )
            for (was, now, reason), names in grouped.items()
        ]
        change, where = (max(len(line[i]) for line in lines) for i in (0, 2))
        return "\n".join(
            f"{line[0]:<{change}}  {line[1]:>5}  {line[2]:<{where}}  {line[3]}".rstrip()
            for line in lines
        )


def optimize(
    model: nn.Module,
    *,
    inplace: bool = True,
    cuda_graph: bool | None = None,
    depth_first: bool | None = None,
    for_inference: bool = False,
) -> nn.Module:
    """Replace the ConvMixer blocks inside ``model`` by fused ones.

    Takes timm's, mmpretrain's and locuslab's ConvMixers in all their forms, and any network with
    such blocks in it, wrapped in DDP, DataParallel or torch.compile too. What it finds and proves:

    * a module that computes ``fn(x) + x`` with ``fn`` = Sequential("same" depthwise convolution,
      activation, BatchNorm) becomes a `DepthwiseMix`;
    * four modules in a row, that one and (1x1 convolution, activation, BatchNorm), become a
      `MixerBlock`; the latter three alone, where they keep the channel count, a `PointwiseMix`;
    * an nn.Sequential of such blocks and nothing else becomes a `MixerStack`.

    Parameters, buffers, convolutions, activations and norms stay the same objects, state-dict keys
    and module names stay as they are, and so do hooks, frozen parameters and each module's
    training mode. Only the class of a replaced container changes. What was replaced, what was not
    and why is in `optimization_report`; nothing is written on the model.

    Not while other threads run models: torch.fx intercepts every module call as long as it traces.

    Args:
        model: any module, in training or eval mode.
        inplace: False leaves ``model`` alone and works on a deep copy.
        cuda_graph: on a GPU, in inference, run the stack of blocks as one CUDA graph for batches of
            at most 8 images. Inputs and weights may change from call to call; each shape has a
            graph of its own, the 8 last used are kept, and each holds one more input and output.
            None leaves it as it is, which is off at first.
        depth_first: on a GPU, send as many images at a time through all blocks as leave their
            activations in the L2 cache. None as above.
        for_inference: call `optimize_for_inference` on the result: the model is in eval mode and
            its parameters do not change any more.

    Returns:
        ``model`` (or its copy); another object only where ``model`` itself is a block.

    Raises:
        TypeError: not a module.
        ValueError: ``for_inference`` of a model in training mode.

    Warns:
        UserWarning: no block was found.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"optimize takes a torch.nn.Module, got {type(model).__name__}: pass the model itself"
        )
    if not inplace:
        model = copy.deepcopy(model)
    findings = _survey(model)
    if not any(f.target or isinstance(f.module, FusedModule) for f in findings):
        reasons = dict.fromkeys(f.reason for f in findings)
        because = "; ".join(reasons) or "no module computes a residual depthwise half"
        warnings.warn(
            f"optimize: no ConvMixer block found in {type(model).__name__}, nothing was replaced: "
            f"{because}",
            stacklevel=2,
        )
    fused: dict[int, nn.Module] = {}
    for finding in findings:
        if finding.target is not None:
            fused[id(finding.module)] = _fuse(finding, fused)
    _substitute(model, fused)
    model = fused.get(id(model), model)
    _set_stacks(model, cuda_graph, depth_first)
    return optimize_for_inference(model) if for_inference else model


def _set_stacks(model: nn.Module, cuda_graph: bool | None, depth_first: bool | None) -> None:
    stacks = [module for module in model.modules() if isinstance(module, MixerStack)]
    if not stacks and (cuda_graph or depth_first):
        warnings.warn(
            f"optimize: {type(model).__name__} has no stack of blocks of its own for cuda_graph or "
            "depth_first to act on: put its blocks in one nn.Sequential",
            stacklevel=3,
        )
    for stack in stacks:
        if cuda_graph is not None:
            stack._graphs = StackGraphs() if cuda_graph else None
        if depth_first is not None:
            stack._depth_first = depth_first


def restore(model: nn.Module) -> nn.Module:
    """Undo `optimize` in place: plain modules, with the same tensors, keys and hooks.

    Where `optimize` took a container out, that same object comes back. Blocks that were built
    fused become plain Sequentials and residual modules.

    Args:
        model: any module; one without fused blocks is left as it is.

    Returns:
        ``model``; another object only where ``model`` itself is a block.
    """
    plain = {id(m): _unfuse(m) for m in list(model.modules()) if type(m) in _FUSED_TYPES}
    _substitute(model, plain)
    return plain.get(id(model), model)


def to_reference(model: nn.Module) -> nn.Module:
    """A deep copy of ``model`` from PyTorch's own modules only, for ONNX, TensorRT or TorchScript.

    Of a model wrapped in DDP, DataParallel or torch.compile, the copy is of the model inside.
    """
    return restore(copy.deepcopy(unwrapped(model)[0]))


def unwrapped(model: nn.Module) -> tuple[nn.Module, bool]:
    """The model inside DDP, DataParallel and torch.compile, and whether the last is among them."""
    compiled = False
    while True:
        inner = model._modules.get("_orig_mod")
        compiled = compiled or inner is not None
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            inner = model.module
        if inner is None:
            return model, compiled
        model = inner


def optimization_report(model: nn.Module) -> OptimizationReport:
    """What `optimize` replaced in ``model``, or would replace, and what it leaves and why.

    A function, not an attribute: nothing is added to a model that is not ours, the report follows
    copies, pickles and later changes, and before `optimize` it is a dry run.
    """
    rows = []
    for f in _survey(model):
        name = f.name or type(model).__name__
        now = type(f.module).__name__ if isinstance(f.module, FusedModule) else f.was
        rows.append(OptimizationRow(name, f.was, now, f.reason))
    return OptimizationReport(rows)


@dataclass(frozen=True)
class _Finding:
    """A module that is a block or looks like one, and the fused class to take its place, if any."""

    name: str
    module: nn.Module
    was: str
    target: type[DepthwiseMix | PointwiseMix | MixerBlock | MixerStack] | None
    reason: str


class _Refused(Exception):
    """Why a module that looks like a block is not replaced."""


def _survey(model: nn.Module) -> list[_Finding]:
    """Blocks, halves of blocks and what looks like one, children before their parents."""
    return list(_visit(model, "", set(), _Parts()))


class _Parts:
    """Ids of the modules that are fused, or that `optimize` would fuse."""

    def __init__(self) -> None:
        self.spatial: set[int] = set()
        self.blocks: set[int] = set()


def _visit(
    module: nn.Module, name: str, seen: set[int], parts: _Parts, compiled: bool = False
) -> Iterator[_Finding]:
    """``seen``: ids of modules not to look at again."""
    if id(module) in seen or isinstance(module, torch.jit.ScriptModule):
        return
    seen.add(id(module))
    branch = None if isinstance(module, FusedModule) else _depthwise_branch(module)
    if isinstance(module, MixerBlock):
        parts.blocks.add(id(module))
    if isinstance(module, DepthwiseMix):
        parts.spatial.add(id(module))
        seen.update(map(id, _children(module).values()))
    if branch is not None:
        finding = _judge(
            module, name, DepthwiseMix, compiled, lambda: _check_spatial(module, branch)
        )
        if finding.target is not None:
            # Its branch is part of it: never to be judged as something else.
            parts.spatial.add(id(module))
            seen.add(id(module._modules[branch]))
        yield finding
    for key, child in _children(module).items():
        path = f"{name}.{key}" if name else key
        yield from _visit(child, path, seen, parts, compiled=key == "_orig_mod")
    if isinstance(module, FusedModule):
        yield _Finding(name, module, *_history(module))
    elif branch is None:
        yield from _look_at(module, name, parts, compiled)


def _look_at(module: nn.Module, name: str, parts: _Parts, compiled: bool) -> Iterator[_Finding]:
    """What a module that is no spatial half is: a block, blocks, a channel half, or nearly one."""
    children = list(_children(module).values())
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
                yield _Finding(
                    f"{name}.{key}" if name else key,
                    children[i],
                    type(children[i]).__name__,
                    None,
                    "the channel half stands flat in a longer Sequential: "
                    "putting it in a module of its own would rename its keys",
                )
    elif len(children) == 3 and _resembles_depthwise(children[0]):
        yield from _look_at_unnested(module, name)


def _look_at_unnested(module: nn.Module, name: str) -> Iterator[_Finding]:
    conv, act, norm = module._modules
    try:
        formula = _formula(module)
    except _Refused:
        return
    if formula == f"{norm}({act}({conv}(x))) + x":
        yield _Finding(
            name,
            module,
            _class_name(module),
            None,
            "its convolution, activation and norm are not in one nn.Sequential",
        )


def _judge(
    module: nn.Module,
    name: str,
    target: type[DepthwiseMix | PointwiseMix | MixerBlock | MixerStack],
    compiled: bool,
    check: Callable[[], None],
) -> _Finding:
    try:
        if compiled:
            raise _Refused("torch.compile already holds its forward: optimize first, then compile")
        check()
    except _Refused as refusal:
        return _Finding(name, module, _class_name(module), None, str(refusal))
    return _Finding(
        name, module, _class_name(module), target, f"optimize makes it a {target.__name__}"
    )


def _history(module: nn.Module) -> tuple[str, None, str]:
    """Of a fused module: what stood there, no target, and what to know about it."""
    original = module.__dict__.get("_original")
    if original is None:
        return type(module).__name__, None, "built fused"
    notes = []
    extras = [key for key in original[0].__dict__ if key not in _STATE and key not in _OWN]
    if extras:
        notes.append(f"took over the attributes {', '.join(extras)}")
    methods = _own_methods(type(original[0]))
    if methods:
        notes.append(f"without the methods {', '.join(methods)}")
    return _class_name(original[0]), None, "; ".join(notes)


def _own_methods(cls: type[nn.Module]) -> list[str]:
    """Public methods that a container's class has beyond PyTorch's."""
    base = nn.Sequential if issubclass(cls, nn.Sequential) else nn.Module
    return [
        name
        for name in dir(cls)
        if not name.startswith("_") and callable(getattr(cls, name)) and not hasattr(base, name)
    ]


def _class_name(module: nn.Module) -> str:
    cls = type(module)
    # The short form of the original README makes a class whose name is empty.
    return cls.__name__ or f"subclass of {cls.__mro__[1].__name__}"


def _children(module: nn.Module) -> dict[str, nn.Module]:
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


def _depthwise_branch(module: nn.Module) -> str | None:
    """The child of a small module that is a Sequential beginning with a depthwise convolution."""
    if type(module) in (nn.Sequential, nn.ModuleList, nn.ModuleDict) or len(module._modules) > 3:
        return None
    for name, child in _children(module).items():
        if isinstance(child, nn.Sequential) and not isinstance(child, FusedModule):
            first = next(iter(child._modules.values()), None)
            if _resembles_depthwise(first):
                return name
    return None


def _check_spatial(module: nn.Module, branch: str) -> None:
    """Raise `_Refused` unless a `DepthwiseMix` around the child ``branch`` computes the same."""
    _check_container(module)
    fn = module._modules[branch]
    assert isinstance(fn, nn.Sequential)
    if type(fn) is not nn.Sequential:
        raise _Refused(f"its branch is a {_class_name(fn)}, not an nn.Sequential")
    _check_untouched(fn, "its branch")
    parts = list(fn._modules.values())
    if len(parts) != 3 or None in parts:
        raise _Refused(
            f"its branch holds {len(parts)} modules, not convolution, activation and norm"
        )
    conv, act, norm = fn
    _check_parts(conv, act, norm)
    if not is_depthwise(conv):
        raise _Refused(_why_not_depthwise(conv))
    if branch in _OWN or branch in _STATE or hasattr(DepthwiseMix, branch):
        raise _Refused(f"its branch has the name {branch}, which a DepthwiseMix uses itself")
    formula = _formula(module)
    drop_path = module._modules.get("drop_path")
    if drop_path is not None and formula == f"drop_path({branch}(x)) + x":
        _check_drop_path(drop_path)
        expected = {branch, "drop_path"}
    elif formula == f"{branch}(x) + x":
        expected = {branch}
    else:
        raise _Refused(f"its forward computes {formula}")
    idle = set(_children(module)) - expected
    if idle:
        raise _Refused(f"it has a child that its forward does not use: {', '.join(sorted(idle))}")


def _check_drop_path(drop_path: nn.Module) -> None:
    _check_untouched(drop_path, "its drop_path")
    # DepthwiseMix leaves it out in eval mode, so it must do nothing there.
    try:
        idle = type(drop_path) is nn.Identity or _formula(drop_path, (False,), settings=True) == "x"
    except _Refused:
        idle = False
    if not idle:
        raise _Refused(f"its {_class_name(drop_path)} does something in eval mode too")


def _check_chain(module: nn.Module) -> None:
    """Raise `_Refused` unless the last three children are a channel half and all run in turn."""
    _check_container(module)
    children = _children(module)
    if len(children) != len(module._modules):
        raise _Refused("it has an empty child")
    conv, act, norm = list(children.values())[-3:]
    _check_parts(conv, act, norm)
    if not is_pointwise(conv):
        raise _Refused(f"its 1x1 convolution is not a dense one of stride 1: {conv}")
    if type(module) is not nn.Sequential:
        expected = "x"
        for name in children:
            expected = f"{name}({expected})"
        formula = _formula(module)
        if formula != expected:
            raise _Refused(f"its forward computes {formula}")


def _check_untouched(module: nn.Module, what: str) -> None:
    """Raise `_Refused` where this object runs something else than its class's forward."""
    if module.__dict__.get("_compiled_call_impl") is not None:
        raise _Refused(f"{what} was compiled in place: optimize first, then compile")
    for name in CALL_PATH:
        if name in module.__dict__:
            raise _Refused(f"{what} has a {name} of its own, set on the object")


def _check_container(module: nn.Module) -> None:
    _check_untouched(module, "it")
    own = [*module._parameters, *module._buffers]
    if own:
        raise _Refused(f"it has parameters of its own: {', '.join(own)}")
    cls = type(module)
    base = nn.Sequential if isinstance(module, nn.Sequential) else nn.Module
    for name in dir(base):
        theirs = getattr(base, name)
        if callable(theirs) and name not in _HARMLESS and getattr(cls, name) is not theirs:
            raise _Refused(f"its class {_class_name(module)} has its own {name}")


def _check_parts(conv: nn.Module, act: nn.Module, norm: nn.Module) -> None:
    """Raise `_Refused` unless these are the plain modules whose work the operators do."""
    if type(conv) is not nn.Conv2d:
        what = "parametrized" if hasattr(conv, "parametrizations") else "not an nn.Conv2d"
        raise _Refused(f"its convolution is {what}: {type(conv).__name__}")
    for part, what in ((conv, "convolution"), (act, "activation"), (norm, "norm")):
        _check_untouched(part, f"its {what}")
    if activation_name(act) is None:
        raise _Refused(f"no fused form of its activation {act}")
    if type(norm) not in (nn.BatchNorm2d, nn.SyncBatchNorm):
        raise _Refused(f"its norm is a {type(norm).__name__}, not a BatchNorm2d")
    if norm.running_mean is None or norm.running_var is None:
        raise _Refused("its BatchNorm keeps no running statistics")
    for part, what in ((conv, "convolution"), (norm, "norm")):
        for name in ("weight", "bias"):
            tensor = getattr(part, name)
            if tensor is None:
                continue
            if part._parameters.get(name) is None:
                raise _Refused(
                    f"the {name} of its {what} is computed at each forward "
                    "(weight_norm, spectral_norm, pruning)"
                )
            if type(tensor) is not nn.Parameter:
                raise _Refused(f"the {name} of its {what} is a {type(tensor).__name__}")


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


class _Symbol(torch.fx.Proxy):
    """torch.fx records ``x += y`` as the sum ``x + y``; this keeps the two apart."""

    def __iadd__(self, other: Any) -> torch.fx.Proxy:
        return self.tracer.create_proxy("call_function", operator.iadd, (self, other), {})


class _OneLevel(torch.fx.Tracer):
    """Records calls of children, and never looks into them."""

    def proxy(self, node: torch.fx.Node) -> torch.fx.Proxy:
        return _Symbol(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def _formula(
    module: nn.Module, modes: tuple[bool, ...] = (True, False), settings: bool = False
) -> str:
    """What ``module`` computes of its input x, such as ``"fn(x) + x"``, in every mode of ``modes``.

    Names are those of its children; of a sum, the part that is x itself stands last.

    Args:
        module: to trace.
        modes: of ``training``.
        settings: its forward may read attributes of its own, as a probability.

    Raises:
        _Refused: it computes anything but calls of children and sums, or modes differ, or an
            attribute could change what it computes.
    """
    formulas = {_trace(module, training, settings) for training in modes}
    if len(formulas) > 1:
        raise _Refused("its forward is another one in training than in eval mode")
    return formulas.pop()


def _trace(module: nn.Module, training: bool, settings: bool) -> str:
    read: set[str] = set()

    class Shadow(type(module)):  # type: ignore[misc]
        """Of the same children: what a forward writes on self does not reach the module."""

        def __getattribute__(self, name: str) -> Any:
            value = super().__getattribute__(name)
            if not (callable(value) or name in _STATE or name.startswith("__")):
                read.add(name)
            return value

    shadow = object.__new__(Shadow)
    shadow.__dict__.update(module.__dict__)
    shadow.__dict__["training"] = training
    try:
        graph = _OneLevel().trace(shadow)
    except Exception as error:
        # Anything can go wrong in a forward that is not ours, run on a symbol.
        first = (str(error).strip().splitlines() or ["no message"])[0]
        raise _Refused(f"its forward cannot be traced ({type(error).__name__}: {first})") from error
    if read and not settings:
        # A fused module would not ask it again.
        raise _Refused(f"its forward depends on the attribute {', '.join(sorted(read))}")
    terms: dict[torch.fx.Node, str] = {}
    for node in graph.nodes:
        if node.op == "output":
            return _term(node.args[0], terms)
        if node.op == "placeholder":
            if terms:
                raise _Refused("its forward takes more than one argument")
            terms[node] = "x"
            continue
        if not node.users:
            raise _Refused(f"its forward drops the result of {node.target}")
        if node.op == "call_module" and len(node.args) == 1 and not node.kwargs:
            terms[node] = f"{node.target}({_term(node.args[0], terms)})"
        elif _is_sum(node):
            a, b = (_term(arg, terms) for arg in node.args)
            if node.target in _INPLACE_SUMS and a == "x":
                raise _Refused("its forward changes its input in place")
            a, b = sorted((a, b), key=lambda term: term == "x")
            terms[node] = f"{a} + {b}" if b == "x" else f"({a}) + ({b})"
        else:
            target = getattr(node.target, "__name__", node.target)
            raise _Refused(f"its forward also computes {target}")
    raise _Refused("its forward returns nothing")


_SUMS = (operator.add, torch.add, "add", operator.iadd, "add_")
_INPLACE_SUMS = (operator.iadd, "add_")


def _is_sum(node: torch.fx.Node) -> bool:
    return (
        node.op in ("call_function", "call_method")
        and node.target in _SUMS
        and len(node.args) == 2
        and not node.kwargs
    )


def _term(value: Any, terms: Mapping[torch.fx.Node, str]) -> str:
    if not isinstance(value, torch.fx.Node):
        raise _Refused(f"its forward also uses {value!r}")
    return terms[value]


def _fuse(finding: _Finding, fused: Mapping[int, nn.Module]) -> nn.Module:
    """The fused module for a finding; parts that are to be replaced themselves are in ``fused``."""
    old = finding.module
    parts = [fused.get(id(child), child) for child in _children(old).values()]
    new: nn.Module
    if finding.target is DepthwiseMix:
        branch = _depthwise_branch(old)
        assert branch is not None
        kind = SequentialDepthwiseMix if isinstance(old, nn.Sequential) else DepthwiseMix
        new = kind.from_parts(old._modules[branch], branch)  # type: ignore[arg-type]
        drop_path = old._modules.get("drop_path")
        if "drop_path" in old._modules:
            del new.__dict__["drop_path"]
        if drop_path is not None:
            new._idle_in_eval = type(drop_path)
            watch_classes(type(drop_path))
    else:
        assert finding.target is not None
        new = finding.target.from_parts(*parts)  # type: ignore[arg-type]
    _take_over(new, old)
    new.__dict__["_original"] = (old,)
    has_its_forward(type(old))
    return new


def _take_over(new: nn.Module, old: nn.Module) -> None:
    """Give ``new`` the very children and hooks of ``old``, its mode and the user's attributes."""
    for key, value in old.__dict__.items():
        if key in _STATE or key not in _OWN:
            new.__dict__[key] = value
    for hook in old._load_state_dict_pre_hooks.values():
        if getattr(hook, "with_module", False):
            # PyTorch keeps only a weak reference to the module that such a hook is called with.
            hook.module = weakref.ref(new)  # type: ignore[attr-defined]


def _unfuse(module: nn.Module) -> nn.Module:
    """The plain module for a fused one: the one `optimize` took out, or one that does the same."""
    original = module.__dict__.get("_original")
    drops = isinstance(module, DepthwiseMix) and not isinstance(
        module.drop_path, nn.Identity | None
    )
    plain: nn.Module
    if original is not None and not (drops and "drop_path(" not in _formula(original[0])):
        plain = original[0]
    elif isinstance(module, PatchEmbed) and module.normalize is not None:
        plain = NormalizedSequential(normalize=module.normalize)
    elif not isinstance(module, DepthwiseMix):
        plain = nn.Sequential()
    elif module._branch == "fn" and not drops:
        plain = Residual.__new__(Residual)
        nn.Module.__init__(plain)
    else:
        plain = ResidualSequential()
    _take_over(plain, module)
    if type(plain) is Residual and original is None:
        # Its own dictionary: without the Identity that stands for "no stochastic depth".
        children = {name: m for name, m in module._modules.items() if name != "drop_path"}
        plain.__dict__["_modules"] = children
    return plain


def _substitute(model: nn.Module, new: Mapping[int, nn.Module]) -> None:
    """Replace every m in ``model`` by ``new[id(m)]``, wherever it stands."""
    for container in [*model.modules(), *new.values()]:
        for name, child in container._modules.items():
            if id(child) in new:
                container._modules[name] = new[id(child)]


__all__ = [
    "NormalizedSequential",
    "OptimizationReport",
    "OptimizationRow",
    "ResidualSequential",
    "SequentialDepthwiseMix",
    "optimization_report",
    "optimize",
    "restore",
    "to_reference",
]
