"""How are predictions kept? As rows of the likeliest classes, in a CSV file, whole or absent."""

from __future__ import annotations

import csv
import errno
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, NamedTuple

import numpy as np
from torch import Tensor

OUTPUT_TYPES = ("prob", "logit")


class Prediction(NamedTuple):
    """The most likely classes of one image, the likeliest first; equally long sequences."""

    filename: str
    indices: tuple[int, ...]
    labels: tuple[str, ...]
    scores: tuple[float, ...]


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
    logits = logits.float()
    finite = logits.isfinite().all(dim=1)
    if not finite.all():
        bad = filenames[int((~finite).nonzero()[0])]
        raise ValueError(
            f"the model's output for {bad} is not finite: the weights hold NaN or infinity, "
            "or overflow in this precision"
        )
    scores = logits.softmax(dim=1) if output_type == "prob" else logits
    values, indices = scores.topk(min(topk, logits.shape[1]), dim=1)
    rows = zip(filenames, indices.tolist(), values.tolist(), strict=True)
    return [
        Prediction(name, tuple(row), tuple(labels[i] for i in row), tuple(score))
        for name, row, score in rows
    ]


def columns(topk: int, output_type: str = "prob") -> list[str]:
    """timm's column names: ``filename, index, label, prob``, with ``_0 .. _{k-1}`` when k > 1.

    The order is that of timm's ``--results-separate-col``: all indices, all labels, all scores.
    """
    ranks = [""] if topk == 1 else [f"_{i}" for i in range(topk)]
    return ["filename", *(f"{name}{i}" for name in ("index", "label", output_type) for i in ranks)]


class ResultFile:
    """A CSV file of predictions that appears under its name only when it is complete.

    Used in a ``with`` block: rows go to a hidden file in the same folder, which takes the place of
    ``path`` at the end of the block and is deleted if the block fails.

    Raises:
        OSError: the folder cannot be written, the disk is full, ``path`` is a folder.
    """

    def __init__(self, path: str | os.PathLike[str], topk: int, output_type: str = "prob") -> None:
        self.path = Path(path)
        if self.path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(self.path))
        # A device or a pipe cannot be replaced by a file: it is written to.
        self._direct = self.path.exists() and not stat.S_ISREG(self.path.stat().st_mode)
        target = Path(os.path.realpath(self.path))
        self._target = target
        self._partial = (
            self.path if self._direct else target.with_name(f".{target.name}.{os.getpid()}.partial")
        )
        try:
            self._file: IO[str] = open(  # noqa: SIM115 - closed in __exit__
                self._partial, "w", newline="", encoding="utf-8", errors="surrogateescape"
            )
        except OSError as error:
            # The user knows the name that was asked for, not the hidden one.
            raise type(error)(error.errno, error.strerror, str(self.path)) from error
        self._writer = csv.writer(self._file, lineterminator="\n")
        self._writer.writerow(columns(topk, output_type))

    def write(self, row: Prediction) -> None:
        # The shortest text that gives the same float32 back.
        scores = (str(np.float32(score)) for score in row.scores)
        self._writer.writerow([row.filename, *row.indices, *row.labels, *scores])

    def __enter__(self) -> ResultFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            with self._file:
                if kind is None and not self._direct:
                    self._file.flush()
                    os.fsync(self._file.fileno())
            if kind is None and not self._direct:
                os.replace(self._partial, self._target)
        finally:
            if not self._direct:
                self._partial.unlink(missing_ok=True)
