"""Top-1 and top-5 accuracy over a folder of class folders, with timm's keys."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..files import whole_or_absent
from .images import IMG_EXTENSIONS, LeftOut, find_images, natural_key
from .predictor import Predictor
from .remote import Location, folder_name
from .results import Failure, Prediction


@dataclass
class Evaluation:
    """Counts of an evaluation.

    Attributes:
        classes: names of the model's outputs.
        confusion: (C, C) images by true class (rows) and most likely class (columns).
        among_five: (C,) images whose class is one of the five most likely.
        failures: images that could not be read.
        waited: seconds for which the model waited for images.
    """

    classes: list[str]
    confusion: npt.NDArray[np.int64]
    among_five: npt.NDArray[np.int64]
    failures: list[Failure] = field(default_factory=list)
    waited: float = 0.0

    @property
    def images(self) -> int:
        return int(self.confusion.sum())

    def metrics(self) -> dict[str, float]:
        """timm's ``top1, top1_err, top5, top5_err``, in per cent.

        Raises:
            ValueError: no image was read.
        """
        if not self.images:
            raise ValueError("no image could be read: there is nothing to rate")
        top1 = 100 * float(np.trace(self.confusion)) / self.images
        top5 = 100 * float(self.among_five.sum()) / self.images
        named = {"top1": top1, "top1_err": 100 - top1, "top5": top5, "top5_err": 100 - top5}
        return {name: round(value, 4) for name, value in named.items()}

    def per_class(self) -> list[dict[str, Any]]:
        """A row for each class with images or predictions: recall as top1, and precision."""
        rows = []
        for i, name in enumerate(self.classes):
            images, predicted = int(self.confusion[i].sum()), int(self.confusion[:, i].sum())
            if not images and not predicted:
                continue
            right = int(self.confusion[i, i])
            rows.append(
                {
                    "index": i,
                    "label": name,
                    "images": images,
                    "predicted": predicted,
                    "top1": round(100 * right / images, 4) if images else "",
                    "top5": round(100 * int(self.among_five[i]) / images, 4) if images else "",
                    "precision": round(100 * right / predicted, 4) if predicted else "",
                }
            )
        return rows

    def write_per_class(self, path: str | os.PathLike[str]) -> None:
        """Write `per_class` as CSV, atomically."""
        with whole_or_absent(Path(path)) as file:
            names = ("index", "label", "images", "predicted", "top1", "top5", "precision")
            writer = csv.DictWriter(file, names, lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.per_class())

    def write_confusion(self, path: str | os.PathLike[str]) -> None:
        """Write the counts as CSV: a line for each true class, a column for each predicted one."""
        with whole_or_absent(Path(path)) as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["true \\ predicted", *self.classes])
            for name, counts in zip(self.classes, self.confusion.tolist(), strict=True):
                writer.writerow([name, *counts])


def labelled_images(
    folder: str | os.PathLike[str],
    num_classes: int,
    class_map: Sequence[str] | None = None,
    suffixes: str | Iterable[str] = IMG_EXTENSIONS,
    left_out: LeftOut | None = None,
    stored: Sequence[str] | None = None,
) -> tuple[list[Location], list[int], list[str]]:
    """The images of an ImageFolder, their class indices, and the names of all classes.

    The class of an image is the name of its folder. Its index is its place in
    ``class_map``, else in ``stored`` (the model's own names) if all folders are named there, else
    among the folders in natural order, as in timm. ``suffixes`` and ``left_out`` are those of
    `find_images`.

    Raises:
        ValueError: a folder is no class of ``class_map``, or, without one, there are not as many
            folders as classes: the indices would then be wrong.
        ImageError: there are no images.
    """
    paths = find_images([folder], suffixes, left_out)
    present = sorted({folder_name(path) for path in paths}, key=natural_key)
    if class_map is None and stored is not None and set(present) <= set(stored):
        class_map = stored
    if class_map is None:
        if len(present) != num_classes:
            raise ValueError(
                f"{folder} has {len(present)} folders of images and the model {num_classes} "
                "classes: pass --class-map, which names the folders in the order of the classes"
            )
        names = present
    else:
        names = list(class_map)
        unknown = [name for name in present if name not in set(names)]
        if unknown:
            raise ValueError(
                f"{unknown[0]!r} in {folder} is no class of the class map, which goes "
                f"{', '.join(names[:3])}...: it must name the folders"
            )
    index = {name: i for i, name in enumerate(names)}
    return paths, [index[folder_name(path)] for path in paths], names


def evaluate(
    predictor: Predictor,
    paths: Sequence[Location],
    targets: Sequence[int],
    classes: Sequence[str],
    *,
    workers: int = 2,
    progress: Callable[[int, Sequence[Failure]], object] | None = None,
) -> Evaluation:
    """Count the predictor's answers on labelled images.

    Args:
        predictor: its ``topk`` must be at least 5, or the number of classes.
        paths, targets: files and the index of each one's class.
        classes: the names of all classes.
        progress: called after every batch with its number of files and its failures.
    """
    count = len(classes)
    topk = predictor.columns.topk
    if predictor.columns.is_vector or topk is None or topk < min(5, count):
        raise ValueError(f"the predictor must give the {min(5, count)} likeliest classes")
    found = Evaluation(list(classes), np.zeros((count, count), np.int64), np.zeros(count, np.int64))
    target: Mapping[str, int] = {str(p): t for p, t in zip(paths, targets, strict=True)}
    for outcome in predictor.predict_files(paths, workers):
        for row in outcome.rows:
            assert isinstance(row, Prediction)
            true = target[row.filename]
            found.confusion[true, row.indices[0]] += 1
            found.among_five[true] += true in row.indices[:5]
        found.failures += outcome.failures
        found.waited += outcome.waited
        if progress:
            progress(len(outcome.rows) + len(outcome.failures), outcome.failures)
    return found
