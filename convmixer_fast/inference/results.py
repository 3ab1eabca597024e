"""Rows of results: the most likely classes of an image, or a vector, and their columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

#: What a row can hold: probabilities or logits of the classes, or the pooled features.
OUTPUT_TYPES = ("prob", "logit", "embedding")


class Prediction(NamedTuple):
    """The most likely classes of one image in descending order; sequences of equal length."""

    filename: str
    indices: tuple[int, ...]
    labels: tuple[str, ...]
    scores: tuple[float, ...]


class Vector(NamedTuple):
    """All numbers of one image: scores of every class, or its embedding. (D,), float32."""

    filename: str
    values: npt.NDArray[np.float32]


Row = Prediction | Vector


class Failure(NamedTuple):
    """An image that could not be read, and the reason in one line."""

    filename: str
    error: str


@dataclass(frozen=True)
class Columns:
    """The columns of rows.

    Args:
        output_type: one of `OUTPUT_TYPES`.
        topk: classes in a row; None: the scores of all classes, as one vector.
    """

    output_type: str = "prob"
    topk: int | None = 5

    def __post_init__(self) -> None:
        if self.output_type not in OUTPUT_TYPES:
            raise ValueError(
                f"unknown output_type {self.output_type!r}: use one of {', '.join(OUTPUT_TYPES)}"
            )
        if self.topk is not None and self.topk < 1:
            raise ValueError(f"topk must be at least 1, or None for all scores, got {self.topk}")

    @property
    def is_vector(self) -> bool:
        return self.topk is None or self.output_type == "embedding"

    @property
    def names(self) -> list[str]:
        """timm's names: ``filename, index, label, prob``, with ``_0 .. _{k-1}`` when k > 1.

        The order is that of timm's ``--results-separate-col``: all indices, all labels, all scores.
        A vector is one column.
        """
        if self.topk is None or self.output_type == "embedding":
            return ["filename", self.output_type]
        ranks = [""] if self.topk == 1 else [f"_{i}" for i in range(self.topk)]
        kinds = ("index", "label", self.output_type)
        return ["filename", *(f"{kind}{i}" for kind in kinds for i in ranks)]

    def cells(self, row: Row) -> list[Any]:
        """The values of a row, in the order of `names`; scores are Python floats."""
        if isinstance(row, Vector):
            return [row.filename, row.values]
        return [row.filename, *row.indices, *row.labels, *row.scores]

    def arrays(self, rows: Sequence[Row]) -> dict[str, npt.NDArray[Any]]:
        """Every column except the file's name, as an array with one entry a row.

        int64 for indices, objects (str) for labels, float32 for scores; a vector column is (N, D).
        """
        if self.is_vector:
            values = [row.values for row in rows if isinstance(row, Vector)]
            stacked = np.stack(values) if values else np.zeros((0, 0), np.float32)
            return {self.output_type: stacked}
        columns = list(zip(*(self.cells(row) for row in rows), strict=True))
        found: dict[str, npt.NDArray[Any]] = {}
        for i, name in enumerate(self.names[1:], 1):
            values_ = columns[i] if columns else ()
            found[name] = np.array(values_, dtype=self.dtype(name))
        return found

    def row(self, filename: str, arrays: dict[str, npt.NDArray[Any]], at: int) -> Row:
        """The inverse of `arrays`: entry ``at`` of every column, as a row."""
        if self.is_vector:
            return Vector(filename, np.asarray(arrays[self.output_type][at], dtype=np.float32))
        cells = [arrays[name][at] for name in self.names[1:]]
        k = len(cells) // 3
        return Prediction(
            filename,
            tuple(map(int, cells[:k])),
            tuple(map(str, cells[k : 2 * k])),
            tuple(map(float, cells[2 * k :])),
        )

    def dtype(self, name: str) -> Any:
        """NumPy's dtype of a column."""
        kind = name.rsplit("_", 1)[0] if name not in self.names[:1] else name
        return {"filename": object, "index": np.int64, "label": object}.get(kind, np.float32)


def rows_of(
    filenames: Sequence[str], scores: Tensor, labels: Sequence[str], columns: Columns
) -> list[Row]:
    """A row for each line of ``scores``: (N, num_classes) logits, or (N, D) embeddings.

    Raises:
        ValueError: a line is not finite.
    """
    if not columns.is_vector:
        assert columns.topk is not None
        found = top_predictions(filenames, scores, labels, columns.topk, columns.output_type)
        return list(found)
    scores = _finite(filenames, scores.float())
    values = scores.softmax(dim=1) if columns.output_type == "prob" else scores
    pairs = zip(filenames, values.cpu().numpy(), strict=True)
    return [Vector(name, vector) for name, vector in pairs]


def top_predictions(
    filenames: Sequence[str],
    logits: Tensor,
    labels: Sequence[str],
    topk: int,
    output_type: str = "prob",
) -> list[Prediction]:
    """The ``topk`` classes of each row of ``logits`` (N, num_classes), any floating dtype.

    Scores are softmax probabilities (computed in float32) or the logits themselves.

    Raises:
        ValueError: a row is not finite.
    """
    logits = _finite(filenames, logits.float())
    scores = logits.softmax(dim=1) if output_type == "prob" else logits
    values, indices = scores.topk(min(topk, logits.shape[1]), dim=1)
    rows = zip(filenames, indices.tolist(), values.tolist(), strict=True)
    return [
        Prediction(name, tuple(row), tuple(labels[i] for i in row), tuple(score))
        for name, row, score in rows
    ]


def _finite(filenames: Sequence[str], scores: Tensor) -> Tensor:
    finite = scores.isfinite().all(dim=1)
    if not finite.all():
        bad = filenames[int((~finite).nonzero()[0])]
        raise ValueError(
            f"the model's output for {bad} is not finite: the weights hold NaN or infinity, "
            "or overflow in this precision"
        )
    return scores
