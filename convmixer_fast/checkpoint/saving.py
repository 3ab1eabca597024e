"""From a model to a file, in any of the formats."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from ..arch import VARIANTS, Arch
from ..files import replacement
from .formats import CheckpointError, convert_state_dict, one_line
from .loading import activations
from .metadata import LABELS, RECIPE, encode, without_labels
from .reading import Checkpoint, read_checkpoint, require_values


def save_checkpoint(
    model: nn.Module | Checkpoint | Mapping[str, Any],
    path: str | os.PathLike[str],
    format: str = "timm",
    *,
    preprocessing: Any = None,
    labels: Sequence[str] | None = None,
) -> None:
    """Write the weights of a ConvMixer to a file, in any of the formats.

    A name that ends in ``.safetensors`` makes a safetensors file. Its metadata carries the format,
    the activation, and where they are known the preprocessing, the labels and the normalisation of
    uint8 images: `Predictor` and the command line then prepare images as the model was trained. Any
    other name makes a PyTorch file: the bare state dict, as timm and locuslab publish them, or
    ``{"state_dict": ...}`` for mmpretrain. The write is atomic: an earlier file is replaced only
    once the new one is whole.

    Args:
        model: a model that `load_checkpoint` takes, a `Predictor`, what `read_checkpoint` returned,
            or a state dict in any format.
        path: the file to write; its folder must exist.
        format: one of `FORMATS`.
        preprocessing: a `Preprocessing`, a `NativeSize`, or a mapping under timm's names
            (``input_size``, ``crop_pct``, ``interpolation``, ``mean``, ``std``); default: the
            Predictor's, else the model's ``pretrained_cfg``.
        labels: a name for each class; default: likewise.

    Warns:
        UserWarning: the model's own preprocessing is not the published one, and the file is no
            safetensors file, the only kind that can keep it.

    Raises:
        CheckpointError: an unknown format, not a whole ConvMixer, the file cannot be written, or
            ``preprocessing`` or ``labels`` cannot be kept.
    """
    is_explicit = preprocessing is not None or labels is not None
    if not isinstance(model, nn.Module | Mapping | Checkpoint) and hasattr(model, "preprocessing"):
        # A Predictor, whose module imports this one.
        preprocessing = model.preprocessing if preprocessing is None else preprocessing
        labels = model.labels if labels is None else labels
        model = model.model
    recipe, normalize = _recipe_of(model, preprocessing, labels)
    if isinstance(model, Checkpoint):
        checkpoint, act = model, model.arch.act
    elif isinstance(model, nn.Module):
        checkpoint = read_checkpoint(model.state_dict())
        act = " and ".join(sorted(activations(model)))
    else:
        checkpoint = read_checkpoint(model)
        act = checkpoint.arch.act
    converted = convert_state_dict(checkpoint.state_dict, format)
    require_values(checkpoint.source, checkpoint.state_dict)
    names = recipe.get("label_names")
    if names is not None and len(names) != checkpoint.arch.num_classes:
        if labels is not None:
            classes = checkpoint.arch.num_classes
            raise CheckpointError(f"{len(names)} labels for a model of {classes} classes")
        recipe = without_labels(recipe)
    has_metadata = Path(os.path.realpath(path)).suffix.lower() == ".safetensors"
    if not has_metadata:
        _check_nothing_is_lost(recipe, checkpoint.arch, path, is_explicit)
    # Copies: safetensors refuses tensors that share memory or are slices of larger ones, and
    # PyTorch stores the whole memory that they are slices of.
    tensors = {
        key: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for key, tensor in converted.items()
    }
    try:
        with replacement(Path(path)) as unfinished:
            if has_metadata:
                save_file(tensors, unfinished, encode(format, act, recipe, normalize))
            else:
                held = {"state_dict": tensors} if format == "mmpretrain" else tensors
                torch.save(held, unfinished)
    except (OSError, RuntimeError, SafetensorError) as e:
        reason = e.strerror if isinstance(e, OSError) and e.strerror else one_line(e)
        raise CheckpointError(
            f"cannot write {path}: {reason}; nothing was written, choose a folder that exists, "
            "is writable and has room"
        ) from None


def _recipe_of(
    model: Any, preprocessing: Any, labels: Sequence[str] | None
) -> tuple[dict[str, Any], Any]:
    """The recipe of a model, overridden by the arguments, and its normalisation of uint8 images."""
    known: Mapping[str, Any] = {}
    normalize = None
    if isinstance(model, Checkpoint):
        known, normalize = model.pretrained_cfg, model.normalize
    elif isinstance(model, nn.Module):
        modules = list(model.modules())
        known = next(filter(None, (getattr(m, "pretrained_cfg", None) for m in modules)), {})
        normalize = next(filter(None, (getattr(m, "normalize", None) for m in modules)), None)
        if not isinstance(normalize, tuple) or len(normalize) != 2:
            normalize = None
    recipe = _stated(known)
    if normalize is not None:
        recipe.setdefault("mean", normalize[0])
        recipe.setdefault("std", normalize[1])
    if preprocessing is not None:
        recipe = {key: recipe[key] for key in LABELS if key in recipe}
        if not isinstance(preprocessing, Mapping):
            if not hasattr(preprocessing, "mean") or not hasattr(preprocessing, "std"):
                raise CheckpointError(
                    f"a {type(preprocessing).__name__} cannot be kept in a file: pass a "
                    "Preprocessing, or a mapping with input_size, crop_pct, mean and std"
                )
            native = {} if hasattr(preprocessing, "input_size") else {"native_size": True}
            preprocessing = {k: getattr(preprocessing, k, None) for k in RECIPE} | native
        recipe |= _stated(preprocessing)
    if labels is not None and list(labels) != [str(i) for i in range(len(labels))]:
        recipe = without_labels(recipe) | {"label_names": list(map(str, labels))}
    return recipe, normalize


def _stated(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of `RECIPE` that a mapping has."""
    return {key: cfg[key] for key in RECIPE if cfg.get(key) is not None}


def _check_nothing_is_lost(
    recipe: Mapping[str, Any], arch: Arch, path: str | os.PathLike[str], is_explicit: bool
) -> None:
    """Warn the caller's caller if a PyTorch file, which holds weights only, loses a recipe.

    Raises:
        CheckpointError: the recipe was given explicitly.
    """
    lost = f"{path} has no place for preprocessing and labels: name a .safetensors file"
    if is_explicit:
        raise CheckpointError(lost)
    usual = next((v.pretrained_cfg for v in VARIANTS.values() if v.arch.shape == arch.shape), {})
    if any(_as_list(usual.get(key)) != _as_list(value) for key, value in recipe.items()):
        warnings.warn(f"{lost}, or pass them where the file is used", UserWarning, stacklevel=3)


def _as_list(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
