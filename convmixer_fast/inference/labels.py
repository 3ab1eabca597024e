"""Names of classes: from a file, from the model, or ImageNet's."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def _from_json(content: Any, path: Path) -> list[str]:
    if isinstance(content, list):
        return [str(name) for name in content]
    if not isinstance(content, dict):
        raise ValueError(
            f"{path}: a JSON label file is a list of names or a mapping, not {content!r:.40}"
        )
    by_index: dict[int, str] = {}
    for key, value in content.items():
        if isinstance(value, int):  # {"cat": 0}
            key, value = value, key
        elif isinstance(value, list) and value:  # {"0": ["n01440764", "tench"]}
            value = value[-1]
        try:
            index = int(key)
        except ValueError:
            raise ValueError(f"{path}: {key!r} is not a class index") from None
        if index in by_index:
            raise ValueError(f"{path}: class index {index} is named twice")
        by_index[index] = str(value)
    missing = next((i for i in range(len(by_index)) if i not in by_index), None)
    if missing is not None:
        raise ValueError(f"{path}: class index {missing} has no name")
    return [by_index[i] for i in range(len(by_index))]


def read_labels(path: str | os.PathLike[str], num_classes: int) -> list[str]:
    """The names of all classes, from a text file (one a line, timm's class map) or a JSON file.

    JSON: a list, or a mapping index -> name, index -> [..., name], or name -> index.

    Raises:
        ValueError: the file cannot be understood, or has not exactly ``num_classes`` names.
        OSError: the file cannot be read.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: a label file is UTF-8 text or JSON ({error.reason})") from error
    if text.lstrip()[:1] in ("[", "{") or path.suffix.lower() == ".json":
        try:
            names = _from_json(json.loads(text), path)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}: not valid JSON ({error})") from error
    else:
        names = [line.strip() for line in text.rstrip().splitlines()]
    if len(names) != num_classes:
        raise ValueError(f"{path}: {len(names)} names for a model of {num_classes} classes")
    return names


def imagenet_labels() -> list[str] | None:
    """ImageNet-1k's class names from an installed timm or torchvision, else None."""
    try:
        from timm.data.imagenet_info import ImageNetInfo

        return list(ImageNetInfo("imagenet-1k").label_descriptions())
    except Exception:  # a broken optional library must not prevent predictions
        pass
    try:
        from torchvision.models import ResNet18_Weights

        return list(ResNet18_Weights.IMAGENET1K_V1.meta["categories"])
    except Exception:
        return None


def stored_labels(model: Any) -> list[str] | None:
    """The classes' names in a model's ``pretrained_cfg``, if there is one for each class."""
    names = (getattr(model, "pretrained_cfg", None) or {}).get("label_names")
    return list(names) if names and len(names) == getattr(model, "num_classes", None) else None


def labels_for(model: Any, path: str | os.PathLike[str] | None = None) -> list[str]:
    """A name for each class of a model: the model's own, else those of `class_labels`.

    Raises:
        ValueError: see `read_labels`.
        OSError: the file cannot be read.
    """
    names = stored_labels(model) if path is None else None
    if names is None:
        return class_labels(model.num_classes, path)
    described = model.pretrained_cfg.get("label_descriptions") or {}
    return [str(described.get(name, name)) for name in names]


def class_labels(num_classes: int, path: str | os.PathLike[str] | None = None) -> list[str]:
    """A name for each class: from ``path``, else ImageNet-1k's for 1000 classes, else the index.

    Raises:
        ValueError: see `read_labels`.
        OSError: the file cannot be read.
    """
    if path is not None:
        return read_labels(path, num_classes)
    names = imagenet_labels() if num_classes == 1000 else None
    return names or [str(i) for i in range(num_classes)]
