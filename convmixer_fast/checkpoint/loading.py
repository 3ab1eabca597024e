"""From a checkpoint into a model, or to the arguments that build its model."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, NamedTuple

from torch import nn

from ..arch import ACTIVATIONS, Arch, activation_layer, activation_name
from .formats import CheckpointError, few, is_head, read_arch
from .metadata import RECIPE, without_labels
from .reading import (
    Checkpoint,
    Parsed,
    as_parsed,
    check_whole,
    parse,
    require_values,
    warn_if_not_finite,
    warn_of_unrelated,
)
from .storage import Source
from .structure import Network, flatten, identify


class LoadResult(NamedTuple):
    """What `load_checkpoint` left alone, and the key format of the checkpoint.

    ``missing_keys`` are the model's own names, the other two are named as in the checkpoint
    (timm's names where they have one). ``skipped`` is the classifier, when the model has none or
    one of another shape.
    """

    missing_keys: list[str]
    unexpected_keys: list[str]
    skipped: list[str]
    format: str


def load_checkpoint(
    model: nn.Module, source: Source | Checkpoint, *, strict: bool = True, use_ema: bool = True
) -> LoadResult:
    """Load a checkpoint of any format into a ConvMixer whose keys are in any format.

    The model may be a `ConvMixer`, timm's, mmpretrain's backbone or classifier, locuslab's
    Sequential, optimised or not, wrapped in DDP, DataParallel or torch.compile. Every key and shape
    is checked before the first tensor is written: on an error the model is unchanged. A model
    without a classifier takes a checkpoint that has one. Values are copied bit for bit where the
    dtypes agree and cast as by ``load_state_dict`` where they differ. What the file says about
    preprocessing and labels goes into the model's ``pretrained_cfg``, where it has one.

    Args:
        model: the model to fill, on any device but "meta".
        source: see `read_checkpoint`, or what it returned.
        strict: when False, missing and unexpected keys and a classifier of another shape are
            skipped and reported; other shapes that differ are still an error.
        use_ema: take the averaged weights where there are any.

    Warns:
        UserWarning: the model's activation is not the one the weights were trained with, the
            weights hold NaN or infinity, or (if strict) the source holds parameters outside the
            ConvMixer.

    Raises:
        CheckpointError: see `read_checkpoint`; or the checkpoint does not fit the model.
    """
    parsed = as_parsed(source) if isinstance(source, Checkpoint) else parse(source, use_ema)
    act = check_whole(parsed).act if strict else _activation_of_part(parsed)
    network = identify(flatten(model.state_dict()), "the model")
    slots = network.known
    misfits = [
        key
        for key, tensor in parsed.tensors.items()
        if key in slots and tensor.shape != slots[key].value.shape
    ]
    skipped: list[str] = []
    if not any(map(is_head, slots)) or (not strict and any(map(is_head, misfits))):
        skipped = list(filter(is_head, parsed.tensors))
        misfits = [key for key in misfits if key not in skipped]
    missing = [leaf.key for key, leaf in slots.items() if key not in parsed.tensors]
    missing += network.unexpected + network.unrelated
    unexpected = [k for k in parsed.tensors if k not in slots and k not in skipped]
    unexpected += parsed.unexpected
    if misfits or (strict and (missing or unexpected)):
        raise CheckpointError(_does_not_fit(parsed, network, misfits, missing, unexpected))
    unexpected += parsed.unrelated

    wanted = {k: v for k, v in parsed.tensors.items() if k in slots and k not in skipped}
    for key in wanted:
        if slots[key].value.is_meta:
            raise CheckpointError(
                f"the model has no memory for {slots[key].key} (device 'meta'): call "
                "model.to_empty(device=...) before loading"
            )
    require_values(parsed.source, wanted)
    if not isinstance(source, Checkpoint):  # `read_checkpoint` has warned already
        warn_if_not_finite(parsed)
        if strict:
            warn_of_unrelated(parsed)
    found = activations(model)
    if act is not None and found and act not in found:
        warnings.warn(
            f"the weights of {parsed.source} were trained with {act}, but the model's "
            f"activation is {' and '.join(sorted(found))}: results will be wrong; build the model "
            f"with {act} (act_layer=nn.{ACTIVATIONS[act].__name__})",
            UserWarning,
            stacklevel=2,
        )
    model.load_state_dict({slots[k].key: v for k, v in wanted.items()}, strict=False)
    _set_recipe(model, without_labels(parsed.recipe) if skipped else parsed.recipe)
    return LoadResult(missing, unexpected, skipped, parsed.format)


def build_model_kwargs(
    checkpoint: Checkpoint, act: str | Callable[[], nn.Module] | None = None
) -> dict[str, Any]:
    """The arguments of `ConvMixer` that make the model of a checkpoint.

    Args:
        checkpoint: what `read_checkpoint` returned.
        act: the activation, by name or as a module class, where the checkpoint does not state it.

    Warns:
        UserWarning: ``act`` is not the activation the weights were trained with.

    Raises:
        CheckpointError: the activation is not known and not given, or is no known name.
    """
    arch = checkpoint.arch
    if act is None and arch.act is None:
        raise CheckpointError(
            f"the activation of {checkpoint.source} cannot be read from its weights: pass "
            f"act='gelu' (the paper's default) or another of {', '.join(ACTIVATIONS)}"
        )
    try:
        act_layer = activation_layer(act if act is not None else arch.act or "")
    except ValueError as e:
        raise CheckpointError(str(e)) from None
    if act is not None and arch.act is not None and activation_name(act_layer()) != arch.act:
        given = act if isinstance(act, str) else getattr(act, "__name__", repr(act))
        warnings.warn(
            f"the weights of {checkpoint.source} were trained with {arch.act}, but act is {given}: "
            f"results will be wrong; leave act out or pass act={arch.act!r}",
            UserWarning,
            stacklevel=2,
        )
    kwargs: dict[str, Any] = {
        "dim": arch.dim,
        "depth": arch.depth,
        "kernel_size": arch.kernel_size,
        "patch_size": arch.patch_size,
        "in_chans": arch.in_chans,
        "num_classes": arch.num_classes,
        "act_layer": act_layer,
    }
    if arch.num_classes and checkpoint.state_dict["head.weight"].shape[1] == 2 * arch.dim:
        kwargs["global_pool"] = "catavgmax"
    if checkpoint.normalize is not None:
        kwargs["normalize"] = checkpoint.normalize
    return kwargs


def activations(model: nn.Module) -> set[str]:
    """Names of a model's activations: as in `ACTIVATIONS`, else how the module prints itself."""
    for m in model.modules():
        arch = getattr(m, "arch", None)
        if isinstance(arch, Arch) and arch.act is not None:
            return {arch.act}
    found = set()
    for m in model.modules():
        # Identity says nothing: it also stands for a dropped path or an absent classifier.
        if isinstance(m, nn.Identity) or next(m.children(), None) is not None:
            continue
        name = activation_name(m)
        if name is None and type(m).__module__.rpartition(".")[2].startswith("activation"):
            # timm has its own activation classes under PyTorch's names.
            plain = type(m).__name__.lower()
            is_torch = type(m).__module__.startswith("torch.")
            name = plain if plain in ACTIVATIONS and not is_torch else repr(m)
        if name is not None:
            found.add(name)
    return found


def _activation_of_part(parsed: Parsed) -> str | None:
    """The activation of a checkpoint that need not be whole, as far as it is known."""
    if parsed.act_is_stated:
        return parsed.act
    with contextlib.suppress(CheckpointError):
        return parsed.activation(read_arch(parsed.tensors, parsed.depth))
    return None


def _set_recipe(model: nn.Module, recipe: Mapping[str, Any]) -> None:
    """Put a file's recipe into the ``pretrained_cfg`` of a model that has one."""
    if not recipe:
        return
    for module in model.modules():
        held = getattr(module, "pretrained_cfg", None)
        if isinstance(held, dict):
            kept = {key: value for key, value in held.items() if key not in RECIPE}
            module.pretrained_cfg = {**kept, **recipe}  # type: ignore[assignment]
            return


def _does_not_fit(
    parsed: Parsed, network: Network, misfits: list[str], missing: list[str], unexpected: list[str]
) -> str:
    """One line on what a checkpoint and a model disagree on, as numbers of the architecture."""
    start = f"{parsed.source} does not fit the model"
    with contextlib.suppress(CheckpointError):
        file = read_arch(parsed.tensors, parsed.depth)
        ours = read_arch({k: leaf.value for k, leaf in network.known.items()}, network.depth)
        differ = [f.name for f in fields(Arch) if getattr(file, f.name) != getattr(ours, f.name)]
        if ours.num_classes == 0 or file.num_classes == 0:
            differ = [name for name in differ if name != "num_classes"]
        if differ:
            table = ", ".join(
                f"{n} is {getattr(file, n)} in the checkpoint and {getattr(ours, n)} in the model"
                for n in differ
            )
            remedy = ", ".join(f"{n}={getattr(file, n)}" for n in differ)
            if differ == ["num_classes"]:
                remedy += ", or keep its own classifier with load_checkpoint(..., strict=False)"
            return f"{start}: {table}; build the model with {remedy}"
    faults = [
        f"{n} is {tuple(parsed.tensors[n].shape)} in the checkpoint and "
        f"{tuple(network.known[n].value.shape)} in the model"
        for n in misfits
    ]
    parts = [few(faults)] if faults else []
    parts += [f"the checkpoint lacks {few(missing)}"] if missing else []
    parts += [f"the model has no {few(unexpected)}"] if unexpected else []
    remedy = "load_checkpoint(..., strict=False) takes what fits"
    if misfits:
        remedy = "build the model that the checkpoint was made for"
    return f"{start}: {' and '.join(parts)}; {remedy}"
