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
import warnings
import weakref
from collections.abc import Mapping
from typing import NamedTuple

from torch import nn

from ..reference import NormalizedSequential, Residual, ResidualSequential
from .blocks import MixerBlock
from .cuda_graph import StackGraphs
from .for_inference import optimize_for_inference
from .formula import STATE_OF_A_MODULE, formula_of
from .fused import FusedModule, FusedSequential
from .fusible import has_its_forward, watch_classes
from .halves import DepthwiseMix, PointwiseMix
from .stack import MixerStack
from .stem import PatchEmbed
from .survey import OWN_ATTRIBUTES, Finding, children_of, depthwise_branch, survey


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
    findings = survey(model)
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
    for f in survey(model):
        name = f.name or type(model).__name__
        now = type(f.module).__name__ if isinstance(f.module, FusedModule) else f.was
        rows.append(OptimizationRow(name, f.was, now, f.reason))
    return OptimizationReport(rows)


def _fuse(finding: Finding, fused: Mapping[int, nn.Module]) -> nn.Module:
    """The fused module for a finding; parts that are to be replaced themselves are in ``fused``."""
    old = finding.module
    parts = [fused.get(id(child), child) for child in children_of(old).values()]
    new: nn.Module
    if finding.target is DepthwiseMix:
        branch = depthwise_branch(old)
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
        if key in STATE_OF_A_MODULE or key not in OWN_ATTRIBUTES:
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
    if original is not None and not (drops and "drop_path(" not in formula_of(original[0])):
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
