"""From a file, or the object that a file holds, to the weights of a ConvMixer in timm's names."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..arch import Arch, known_activation
from . import metadata as file_metadata
from .formats import (
    PADDLE_LEAVES,
    CheckpointError,
    few,
    is_counter,
    is_head,
    key_table,
    read_arch,
    tensor_shapes,
)
from .storage import Source, open_source
from .structure import flatten, identify, is_tensor


@dataclass(frozen=True)
class Checkpoint:
    """The weights of a ConvMixer under timm's key names, and what their shapes say.

    Attributes:
        state_dict: every tensor of the network, in the network's order, as it was stored.
        arch: read from the shapes; ``num_classes`` is 0 without a classifier and ``act`` is None
            where nothing states the activation.
        format: the key format it was read from, one of `FORMATS`.
        source: where it came from, for messages.
        pretrained_cfg: how images are prepared and what the classes are called, under timm's names
            (`RECIPE`); what the file does not say is absent.
        normalize: of a model that takes uint8 images, see `ConvMixer`.
    """

    state_dict: dict[str, Tensor]
    arch: Arch
    format: str
    source: str
    pretrained_cfg: dict[str, Any] = field(default_factory=dict)
    normalize: tuple[tuple[float, ...], tuple[float, ...]] | None = None


@dataclass(frozen=True)
class Parsed:
    """A checkpoint sorted by timm's names, not yet checked for completeness.

    Attributes:
        unexpected, unrelated: see `structure.Network`.
        act_is_stated: the file states its activation; ``act`` is then None for one without a name.
    """

    source: str
    format: str
    depth: int
    tensors: dict[str, Tensor]
    unexpected: list[str]
    unrelated: list[str]
    act: str | None
    act_is_stated: bool
    recipe: dict[str, Any]
    normalize: Any

    def activation(self, arch: Arch) -> str | None:
        """The activation that the file states, else that of the published variant."""
        return self.act if self.act_is_stated else known_activation(arch)


def read_checkpoint(source: Source, *, use_ema: bool = True) -> Checkpoint:
    """Read a whole ConvMixer from a file or from a state dict, whatever its names and wrappers.

    Files are judged by their content: safetensors, PyTorch's zip files and its old pickles. The
    weights are found by structure: the mapping, at any depth and under any names, whose keys
    behind one common prefix are a ConvMixer's. Of several ConvMixers the averaged weights are
    taken, those below a name with the word "ema", "swa" or "averaged" in it, as in
    ``state_dict_ema`` and ``ema_model.``; where that leaves more than one, the error names them.
    Nothing in a file is executed. Tensors keep their dtype and, where possible, their memory; they
    are on the CPU when they come from a file. Where no ``num_batches_tracked`` is stored at all,
    zeros are filled in, as PyTorch does. PaddleViT's names and its transposed classifier are
    understood in mappings, also of numpy arrays.

    Args:
        source: a path, or what such a file holds: names to tensors, in any wrapper.
        use_ema: take the averaged weights where there are any.

    Warns:
        UserWarning: the source holds parameters outside the ConvMixer, or weights hold NaN or
            infinity.

    Raises:
        CheckpointError: not a checkpoint, damaged, unsafe, not a ConvMixer or several, keys missing
            or left over, shapes that contradict each other.
    """
    parsed = parse(source, use_ema)
    arch = check_whole(parsed)
    warn_of_unrelated(parsed)
    warn_if_not_finite(parsed)
    return Checkpoint(
        parsed.tensors, arch, parsed.format, parsed.source, parsed.recipe, parsed.normalize
    )


def parse(source: Source, use_ema: bool) -> Parsed:
    """The ConvMixer in a source.

    Raises:
        CheckpointError: no weights, not those of one ConvMixer, or values that are no weights.
    """
    held, metadata, label = open_source(source)
    leaves = flatten(held)
    if not any(is_tensor(leaf.value) for leaf in leaves):
        raise CheckpointError(_no_state_dict(label, held))
    network = identify(leaves, label, use_ema)
    tensors = {
        name: _dense_tensor(leaf.value, f"{label}: {few([leaf.key])}", is_counter(name))
        for name, leaf in network.known.items()
    }
    if any(leaf.key.split(".")[-1] in PADDLE_LEAVES for leaf in network.known.values()):
        head = tensors.get("head.weight")
        if head is not None and head.ndim == 2:
            tensors["head.weight"] = head.t().contiguous()
    if not any(map(is_counter, tensors)):
        for name in [name for name in tensors if name.endswith(".running_mean")]:
            counter = torch.zeros((), dtype=torch.int64, device=tensors[name].device)
            tensors[name.replace("running_mean", "num_batches_tracked")] = counter
    act, act_is_stated = file_metadata.read_activation(metadata)
    return Parsed(
        source=label,
        format=network.format,
        depth=network.depth,
        tensors={
            name: tensors[name] for name in key_table("timm", network.depth) if name in tensors
        },
        unexpected=network.unexpected,
        unrelated=network.unrelated,
        act=act,
        act_is_stated=act_is_stated,
        recipe=file_metadata.read_recipe(source, metadata, tensors, label),
        normalize=file_metadata.read_normalize(metadata, label),
    )


def as_parsed(checkpoint: Checkpoint) -> Parsed:
    """What `read_checkpoint` returned, in the form that it was made from."""
    return Parsed(
        source=checkpoint.source,
        format=checkpoint.format,
        depth=checkpoint.arch.depth,
        tensors=checkpoint.state_dict,
        unexpected=[],
        unrelated=[],
        act=checkpoint.arch.act,
        act_is_stated=True,
        recipe=checkpoint.pretrained_cfg,
        normalize=checkpoint.normalize,
    )


def check_whole(parsed: Parsed) -> Arch:
    """The architecture of a checkpoint, from its shapes and its activation.

    Raises:
        CheckpointError: a tensor is missing, left over or of another shape.
    """
    tensors, label = parsed.tensors, parsed.source
    has_head = any(map(is_head, tensors))
    missing = [
        theirs
        for theirs, ours in key_table(parsed.format, parsed.depth).items()
        if ours not in tensors and (has_head or not is_head(ours))
    ]
    if missing or parsed.unexpected:
        faults = [f"{few(missing)} missing"] if missing else []
        if parsed.unexpected:
            faults.append(f"{few([*parsed.unrelated, *parsed.unexpected])} left over")
        raise CheckpointError(
            f"{label} is not a whole ConvMixer of depth {parsed.depth} in the {parsed.format} "
            f"format: {' and '.join(faults)}; load_checkpoint(..., strict=False) takes what fits"
        )
    try:
        arch = read_arch(tensors, parsed.depth)
    except CheckpointError as e:
        raise CheckpointError(f"{label}: {e}") from None
    shapes = tensor_shapes(arch)
    wide = (arch.num_classes, 2 * arch.dim)
    if has_head and tuple(tensors["head.weight"].shape) == wide:
        # With global_pool="catavgmax" the classifier gets the mean and the maximum of each channel.
        shapes["head.weight"] = wide
    wrong = [
        f"{n} is {tuple(tensors[n].shape)} and should be {shape}"
        for n, shape in shapes.items()
        if tuple(tensors[n].shape) != shape
    ]
    if wrong:
        raise CheckpointError(f"{label} is not a ConvMixer, by its shapes: {few(wrong)}")
    return replace(arch, act=parsed.activation(arch))


def require_values(label: str, tensors: Mapping[str, Tensor]) -> None:
    """Check that no tensor is on the device "meta".

    Raises:
        CheckpointError: some are.
    """
    empty = [key for key, tensor in tensors.items() if tensor.is_meta]
    if empty:
        raise CheckpointError(
            f"{label} holds no values for {few(empty)} (device 'meta'): make it on a real device"
        )


def warn_of_unrelated(parsed: Parsed) -> None:
    """Warn the caller's caller of parameters outside the network."""
    if parsed.unrelated:
        warnings.warn(
            f"{parsed.source} holds parameters beside the ConvMixer's, which are left out: "
            f"{few(parsed.unrelated)}; if the network needs them, results will be wrong",
            UserWarning,
            stacklevel=3,
        )


def warn_if_not_finite(parsed: Parsed) -> None:
    """Warn the caller's caller of weights that hold NaN or infinity."""
    bad = [
        key
        for key, tensor in parsed.tensors.items()
        if tensor.is_floating_point() and not tensor.is_meta and not tensor.isfinite().all()
    ]
    if bad:
        warnings.warn(
            f"{parsed.source} holds NaN or infinity in {few(bad)}: its training diverged or the "
            "file is damaged, and every result will be NaN; take an earlier checkpoint",
            UserWarning,
            stacklevel=3,
        )


def _dense_tensor(value: Any, what: str, is_integer: bool) -> Tensor:
    """A stored value as a tensor without gradient.

    Raises:
        CheckpointError: it is no dense tensor, or one of integers that should be floating-point.
    """
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(np.array(value))
    if not isinstance(value, Tensor) or value.layout is not torch.strided:
        kind = value.layout if isinstance(value, Tensor) else type(value).__name__
        raise CheckpointError(f"{what} is a {kind}, not a dense tensor")
    if not (value.is_floating_point() or is_integer):
        raise CheckpointError(
            f"{what} is {value.dtype}, not floating-point: convert it from the "
            "checkpoint it was quantised from"
        )
    return value.detach()


def _no_state_dict(label: str, held: Any) -> str:
    kind = f"has {few(map(str, held))}" if isinstance(held, Mapping) and held else "is empty"
    if not isinstance(held, Mapping):
        kind = f"is a {type(held).__name__}"
    return (
        f"{label} holds no state dict (it {kind}): tensors are looked for at any depth, at the top "
        "as below names such as state_dict and model_ema"
    )
