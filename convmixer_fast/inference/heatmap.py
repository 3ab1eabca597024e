"""Class activation maps: a class's score at every position of an image, and pictures of them.

With a mean pool, the classifier of the mean is the mean of the classifier over all positions: the
map of a class's scores is exact, and its mean is the class's logit.

Source: Zhou et al., "Learning Deep Features for Discriminative Localization", 2016.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from ..files import whole_or_absent
from ..modules.fusible import is_patchwise
from .ambient import autocast
from .separable import check_eval, reason_not_separable

#: Colours from a map's lowest to its highest value, dark to bright.
_COLOURS = np.array(
    [[8, 8, 40], [50, 20, 120], [150, 40, 120], [220, 80, 60], [250, 170, 40], [255, 250, 180]],
    dtype=np.float32,
)


class Heatmap(NamedTuple):
    """A class's score at every cell of an image.

    Attributes:
        scores: (N, cells down, cells across), float32, on the CPU.
        classes: (N,) the class of each map.
        logits: (N, num_classes).
        cell: pixels along a cell's side; the last cells may be smaller.
        size: (height, width) in pixels that the cells cover.
        pictures: (N, height, width, 3) bytes, the images at reduced scale, to lay the maps over;
            None if the caller has the images.
    """

    scores: Tensor
    classes: Tensor
    logits: Tensor
    cell: int
    size: tuple[int, int]
    pictures: np.ndarray[Any, Any] | None = None

    def mean(self) -> Tensor:
        """(N,) the area-weighted mean over the cells: the logits of ``classes``."""

        def sides(size: int) -> Tensor:
            begins = torch.arange(0, size, self.cell, dtype=torch.int64, device="cpu")
            return (size - begins).clamp(max=self.cell).double() / size

        area = sides(self.size[0])[:, None] * sides(self.size[1])
        return (self.scores.double() * area).sum((1, 2)).float()


def check_mean_pooling(model: nn.Module) -> None:
    """Check for a mean pool and a linear classifier, which a class activation map needs.

    Raises:
        ValueError: the model has others, or calling it does more than its parts.
    """
    pool: Any = getattr(model, "global_pool", None)
    kind = getattr(pool, "pool_type", "avg")
    if kind != "avg":
        raise ValueError(f"a class activation map needs mean pooling, the model has {kind!r}")
    head = getattr(model, "head", None)
    if not isinstance(head, nn.Linear):
        raise ValueError(
            "a class activation map needs a linear classifier, the model has "
            f"{type(head).__name__}: reset_classifier(num_classes) makes one"
        )
    reason = reason_not_separable(model, "global_pool", "head_drop", "head")
    stem: Any = getattr(model, "stem", None)
    first = next(iter(stem.children()), stem) if isinstance(stem, nn.Sequential) else stem
    if not reason and not is_patchwise(first):
        reason = f"its stem does not begin with square patches that do not overlap: {first}"
    if reason:
        raise ValueError(f"there is no class activation map of this model: {reason}")


def check_target(head: nn.Linear, target: int | None) -> None:
    """Check that the model has the class.

    Raises:
        ValueError: there is no such class.
    """
    count = head.weight.shape[0]
    if target is not None and not 0 <= target < count:
        raise ValueError(f"there is no class {target}: the model has 0 to {count - 1}")


def class_scores(
    head: nn.Linear, maps: Tensor, logits: Tensor, target: int | None
) -> tuple[Tensor, Tensor]:
    """The classifier of one class at every position of ``maps``.

    Args:
        head: (num_classes, C).
        maps: (N, C, h, w).
        logits: (N, num_classes).
        target: the class; None: the most likely one of each image.

    Returns:
        Scores (N, h, w), float32 on the CPU, and the classes (N,).

    Raises:
        ValueError: there is no such class.
    """
    check_target(head, target)
    if target is None:
        classes = logits.argmax(1)
    else:
        classes = torch.full((maps.shape[0],), target, dtype=torch.int64, device=maps.device)
    weight = head.weight.detach()[classes].float()
    with autocast(maps.device):
        scores = torch.einsum("nchw,nc->nhw", maps.float(), weight)
    if head.bias is not None:
        scores = scores + head.bias.detach()[classes].float()[:, None, None]
    return scores.cpu(), classes.cpu()


@torch.inference_mode()
def class_activation_map(model: nn.Module, x: Tensor, target: int | None = None) -> Heatmap:
    """The score of a class at every patch of images; its mean is the class's logit.

    Args:
        model: a `ConvMixer` in eval mode with mean pooling and a classifier.
        x: (N, in_chans, H, W), as the model takes it.
        target: the class; None: the most likely one of each image.

    Returns:
        A `Heatmap` of (N, H // p, W // p) scores.

    Raises:
        ValueError: the model pools in another way, has no classifier, no class ``target``, or
            hooks or replaced parts that the map would leave out, or is in training mode.
    """
    check_eval(model)
    check_mean_pooling(model)
    parts: Any = model
    maps: Tensor = parts.forward_features(x)
    return heatmap_of(model, maps, parts.forward_head(maps), target)


def heatmap_of(model: nn.Module, maps: Tensor, logits: Tensor, target: int | None) -> Heatmap:
    """`class_activation_map` from a model's last maps (N, C, h, w) and its logits."""
    parts: Any = model
    scores, classes = class_scores(parts.head, maps, logits, target)
    patch = int(parts.stem[0].kernel_size[0])
    size = (maps.shape[2] * patch, maps.shape[3] * patch)
    return Heatmap(scores, classes, logits, patch, size)


def overlay(
    scores: Tensor | np.ndarray[Any, Any], image: Image.Image | None = None, strength: float = 0.6
) -> Image.Image:
    """A picture of a map, the lowest value dark and the highest bright, over the image if given.

    Args:
        scores: (cells down, cells across).
        image: of any size; the map is stretched over it. Without one, a map of at least 256
            pixels a side comes out by itself.
        strength: of the colours over the image, 0 to 1.
    """
    values = np.asarray(scores, dtype=np.float32)
    if values.ndim != 2 or values.size == 0:
        raise ValueError(f"scores must be (rows, columns) of one image, got shape {values.shape}")
    finite = np.isfinite(values)
    low, high = (values[finite].min(), values[finite].max()) if finite.any() else (0.0, 0.0)
    values = np.where(finite, values, low)
    if image is None:
        scale = max(1, -(-256 // max(values.shape)))
        size = (values.shape[1] * scale, values.shape[0] * scale)
    else:
        size = image.size
    levels = (values - low) / (high - low) if high > low else np.zeros_like(values)
    smooth = torch.from_numpy(np.ascontiguousarray(levels))[None, None]
    stretched = F.interpolate(smooth, size=size[::-1], mode="bilinear", align_corners=False)[0, 0]
    at = stretched.clamp(0, 1).numpy() * (len(_COLOURS) - 1)
    colours = np.stack(
        [np.interp(at, np.arange(len(_COLOURS)), _COLOURS[:, i]) for i in range(3)], axis=-1
    )
    if image is not None:
        base = np.asarray(image.convert("RGB"), dtype=np.float32)
        colours = (1 - strength) * base + strength * colours
    return Image.fromarray(colours.round().astype(np.uint8), "RGB")


def write_overlay(
    path: str | os.PathLike[str],
    scores: Tensor | np.ndarray[Any, Any],
    image: Image.Image | None = None,
) -> None:
    """Write `overlay` as a PNG file, atomically.

    Raises:
        OSError: the file cannot be written.
        ValueError: ``scores`` is no map of one image.
    """
    picture = overlay(scores, image)
    with whole_or_absent(Path(path), "wb") as file:
        picture.save(file, format="PNG")


def write_scores(path: str | os.PathLike[str], scores: Tensor | np.ndarray[Any, Any]) -> None:
    """Write a map as a .npy file, atomically.

    Raises:
        OSError: the file cannot be written.
    """
    with whole_or_absent(Path(path), "wb") as file:
        np.save(file, np.asarray(scores))


class HeatmapFolder:
    """A picture and an array for every image of a run, in one folder.

    For ``photos/cat.jpg`` they are ``FOLDER/photos/cat.jpg.png``, the map over the image as the
    model saw it, and ``FOLDER/photos/cat.jpg.npy``, the scores (cells down, cells across), float32.

    Args:
        folder: created if absent.
        target: the class; None: the most likely one of each image.
    """

    def __init__(self, folder: str | os.PathLike[str], target: int | None = None) -> None:
        self.folder, self.target = Path(folder), target

    def places(self, filename: str) -> tuple[Path, Path]:
        """The picture and the array of an image."""
        _, tail = os.path.splitdrive(os.path.normpath(filename))
        steps = ["__" if step == ".." else step for step in Path(tail).parts if step != os.sep]
        place = Path(self.folder, *steps)
        return place.with_name(f"{place.name}.png"), place.with_name(f"{place.name}.npy")

    def holds(self, filename: str) -> bool:
        """Whether an image has both files."""
        return all(place.exists() for place in self.places(filename))

    def check(self, filenames: Iterable[str], replace: bool) -> None:
        """Check before a run that no file would replace another.

        Raises:
            FileExistsError: something is there already, and it is not to be replaced.
            ValueError: two images would have the same name here.
        """
        taken: dict[Path, str] = {}
        for filename in filenames:
            places = self.places(filename)
            other = taken.setdefault(places[0], filename)
            if other != filename:
                raise ValueError(
                    f"the heatmaps of {other} and {filename} would both be {places[0]}: "
                    "give them a folder each"
                )
            for place in places:
                if not replace and place.exists():
                    raise FileExistsError(
                        f"{place} is there already: pass --overwrite to replace it"
                    )

    def write(self, filename: str, heatmap: Heatmap, image: Image.Image | None) -> None:
        """Write the map of one image (N = 1), over ``image`` of the map's size if given.

        Raises:
            OSError: the folder cannot be written, or the disk is full.
        """
        picture, array = self.places(filename)
        picture.parent.mkdir(parents=True, exist_ok=True)
        write_scores(array, heatmap.scores[0])
        write_overlay(picture, heatmap.scores[0], image)
