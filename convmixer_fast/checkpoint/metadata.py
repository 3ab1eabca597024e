"""What a file says next to the weights: activation, preprocessing, labels, normalisation.

`save_checkpoint` writes them into the metadata of safetensors files. Other files have a
``config.json`` of timm or Hugging Face in the same folder, or nothing.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..arch import activation_name
from .formats import CheckpointError, one_line
from .storage import Source

_FORMAT = "convmixer_fast.format"
_ACT = "convmixer_fast.act"
_RECIPE = "convmixer_fast.pretrained_cfg"
_NORMALIZE = "convmixer_fast.normalize"

#: What a file keeps of timm's ``pretrained_cfg``, and ``native_size``: images keep their size.
RECIPE = (
    "input_size", "crop_pct", "crop_mode", "interpolation", "mean", "std", "native_size",
    "label_names", "label_descriptions",
)  # fmt: skip
LABELS = ("label_names", "label_descriptions")


def encode(
    format: str, act: str | None, recipe: Mapping[str, Any], normalize: Any
) -> dict[str, str]:
    """The metadata of a safetensors file."""
    # An activation without a name is written as "unknown": a reader takes the published variant's
    # activation where the entry is missing.
    metadata = {"format": "pt", _FORMAT: format, _ACT: act or "unknown"}
    if recipe:
        metadata[_RECIPE] = json.dumps(recipe)
    if normalize:
        metadata[_NORMALIZE] = json.dumps(normalize)
    return metadata


def read_activation(metadata: Mapping[str, str]) -> tuple[str | None, bool]:
    """The activation's name in `ACTIVATIONS`, if it has one, and whether the file states it."""
    return activation_name(metadata.get(_ACT)), _ACT in metadata


def read_normalize(metadata: Mapping[str, str], label: str) -> Any:
    """The (mean, std) of a model that takes uint8 images, or None.

    Raises:
        CheckpointError: the entry is damaged.
    """
    if _NORMALIZE not in metadata:
        return None
    try:
        mean, std = json.loads(metadata[_NORMALIZE])
        return tuple(map(float, mean)), tuple(map(float, std))
    except (TypeError, ValueError):
        raise CheckpointError(f"{label}: the normalisation in its metadata is damaged") from None


def read_recipe(
    source: Source, metadata: Mapping[str, str], tensors: Mapping[str, Tensor], label: str
) -> dict[str, Any]:
    """The recipe in a file's metadata, else the one in ``config.json`` in the file's folder.

    Raises:
        CheckpointError: the JSON is damaged, or a value is of a wrong kind.
    """
    if _RECIPE in metadata:
        where = f"{label}: its metadata"
        return _checked(_json(metadata[_RECIPE], where), where)
    if isinstance(source, Mapping):
        return {}
    config = Path(source).with_name("config.json")
    try:
        text = config.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return {}
    return _from_config(_json(text, str(config)), tensors, str(config))


def without_labels(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe without the names of the classes."""
    return {key: value for key, value in recipe.items() if key not in LABELS}


def _from_config(
    held: Mapping[str, Any], tensors: Mapping[str, Tensor], label: str
) -> dict[str, Any]:
    """The recipe in a ``config.json``; empty if the file describes another model."""
    cfg = held.get("pretrained_cfg") or held
    if not isinstance(cfg, Mapping):
        return {}
    labels = {key: cfg.get(key) or held.get(key) for key in LABELS}
    by_index = held.get("id2label")
    if not labels["label_names"] and isinstance(by_index, Mapping):
        with contextlib.suppress(ValueError):
            labels["label_names"] = [by_index[i] for i in sorted(by_index, key=int)]
    recipe = _checked({**cfg, **labels}, label)
    architecture = str(held.get("architecture") or cfg.get("architecture") or "convmixer")
    stem, head = tensors.get("stem.0.weight"), tensors.get("head.weight")
    classes = cfg.get("num_classes") or held.get("num_classes")
    other = "convmixer" not in architecture.lower()
    other |= stem is not None and recipe.get("input_size", (stem.shape[1],))[0] != stem.shape[1]
    other |= head is not None and classes not in (None, head.shape[0])
    if other:
        return {}
    names = recipe.get("label_names")
    if names and (head is None or len(names) != head.shape[0]):
        recipe = without_labels(recipe)
    return recipe


def _checked(held: Mapping[str, Any], label: str) -> dict[str, Any]:
    """The keys of `RECIPE`, as timm has them.

    Raises:
        CheckpointError: a value is of a wrong kind.
    """
    kinds: dict[str, Any] = {
        "crop_pct": int | float,
        "crop_mode": str,
        "interpolation": str,
        "native_size": bool,
        "label_descriptions": dict,
    }
    recipe = {}
    for key in RECIPE:
        value = held.get(key)
        if value is None:
            continue
        if key in kinds:
            good = isinstance(value, kinds[key])
        else:
            item = str if key == "label_names" else int | float
            good = isinstance(value, list | tuple) and all(isinstance(v, item) for v in value)
            good = good and (key != "input_size" or len(value) == 3)
        if not good:
            raise CheckpointError(f"{label}: {key} is {one_line(value)[:80]}, which makes no sense")
        recipe[key] = tuple(value) if key in ("input_size", "mean", "std") else value
    return recipe


def _json(text: str, label: str) -> dict[str, Any]:
    try:
        held = json.loads(text)
    except ValueError as e:
        raise CheckpointError(f"{label} is no valid JSON ({one_line(e)})") from None
    return held if isinstance(held, dict) else {}
