"""``convmixer-fast evaluate``: accuracy on a folder of labelled images."""

from __future__ import annotations

import argparse
import csv
import json
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .common import Command, note, note_left_out, output_file
from .groups import (
    PredictorArguments,
    add_image_arguments,
    add_model_arguments,
    add_running_arguments,
    check_running,
    describe_predictor,
    load_model,
    make_predictor,
)

if TYPE_CHECKING:
    from ..inference import Failure, Predictor
    from ..inference.evaluate import Evaluation
    from ..inference.remote import Location
    from ..modules.model import ConvMixer


@dataclass(frozen=True, kw_only=True)
class EvaluateArguments(PredictorArguments):
    """The flags of `add_evaluate`."""

    data: str | None
    data_dir: str | None
    class_map: str | None
    results_file: str | None
    confusion: str | None
    per_class: str | None
    on_error: str


def add_evaluate(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "data", nargs="?", metavar="DIR", help="a folder for each class, with its images"
    )
    sub.add_argument("--data-dir", metavar="DIR", help="the same")
    add_model_arguments(sub)
    add_image_arguments(sub)
    output = sub.add_argument_group("results")
    output.add_argument(
        "--class-map",
        metavar="FILE",
        help="the folders' names in the order of the classes: text, one a line, or JSON "
        "(default: the folders in natural order)",
    )
    output.add_argument(
        "--results-file",
        type=output_file,
        metavar="FILE",
        help="what is printed, as CSV, or JSON if it ends so",
    )
    output.add_argument(
        "--confusion",
        type=output_file,
        metavar="FILE",
        help="CSV: images by true and by predicted class",
    )
    output.add_argument(
        "--per-class",
        type=output_file,
        metavar="FILE",
        help="CSV: images, top1, top5, precision of each class",
    )
    output.add_argument(
        "--on-error", choices=("skip", "stop"), default="skip", help="for a bad image"
    )
    add_running_arguments(sub)


def evaluate(args: EvaluateArguments) -> int:
    check_running(args)
    folder = args.data or args.data_dir
    if not folder or (args.data and args.data_dir):
        raise ValueError("name the folder of labelled images, once")
    model = load_model(args)
    paths, targets, names = _labelled_images(args, folder, model)
    predictor = make_predictor(args, model, topk=5, labels=names)
    note(describe_predictor(predictor))
    found = _counted(args, predictor, paths, targets, names)
    results = {**found.metrics(), **_about(args, predictor, found.images, len(found.failures))}
    if args.confusion:
        found.write_confusion(args.confusion)
    if args.per_class:
        found.write_per_class(args.per_class)
    if args.results_file:
        _write(Path(args.results_file), results)
    # The marker by which scripts find the result of timm's validate.py.
    print(f"--result\n{json.dumps(results, indent=4)}")
    return 0


COMMAND = Command(
    "evaluate",
    "measure accuracy on a folder of classes",
    add_evaluate,
    EvaluateArguments,
    evaluate,
)


def _labelled_images(
    args: EvaluateArguments, folder: str, model: ConvMixer
) -> tuple[Any, Any, Any]:
    """Paths, class indices and class names of the images in ``folder``."""
    from ..inference import LeftOut, read_labels
    from ..inference.evaluate import labelled_images
    from ..inference.labels import stored_labels

    classes = read_labels(args.class_map, model.num_classes) if args.class_map else None
    left_out = LeftOut()
    try:
        return labelled_images(
            folder, model.num_classes, classes, args.suffixes, left_out, stored_labels(model)
        )
    finally:
        note_left_out(left_out)


def _counted(
    args: EvaluateArguments,
    predictor: Predictor,
    paths: list[Location],
    targets: Any,
    names: Any,
) -> Evaluation:
    """The counts of right and wrong answers over all images, with a progress bar."""
    from tqdm import tqdm

    from ..inference import ImageError
    from ..inference.evaluate import evaluate as count

    with (
        warnings.catch_warnings(),
        tqdm(total=len(paths), unit="img", disable=not sys.stderr.isatty()) as bar,
    ):
        warnings.filterwarnings("ignore", category=UserWarning, module="PIL")

        def progress(files: int, failures: Sequence[Failure]) -> None:
            for failure in failures:
                if args.on_error == "stop":
                    raise ImageError.about(*failure)
                bar.clear()
                note(f"skipped {failure.filename}: {failure.error}")
            bar.update(files)

        return count(predictor, paths, targets, names, workers=args.workers, progress=progress)


def _about(
    args: EvaluateArguments, predictor: Predictor, images: int, failed: int
) -> dict[str, Any]:
    """The other keys of timm's result, and the number of images."""
    model: Any = predictor.model
    prepare: Any = predictor.preprocessing
    return {
        "model": args.model or args.checkpoint or "",
        "param_count": round(sum(p.numel() for p in model.parameters()) / 1e6, 2),
        "img_size": prepare.input_size[-1] if hasattr(prepare, "input_size") else None,
        "crop_pct": getattr(prepare, "crop_pct", None),
        "interpolation": getattr(prepare, "interpolation", None),
        "images": images,
        "failed": failed,
    }


def _write(path: Path, results: dict[str, Any]) -> None:
    """Write one row, as JSON if the file's suffix says so, else as CSV."""
    from ..files import whole_or_absent

    with whole_or_absent(path) as file:
        if path.suffix.lower() == ".json":
            json.dump(results, file, indent=4)
            file.write("\n")
        else:
            writer = csv.DictWriter(file, list(results), lineterminator="\n")
            writer.writeheader()
            writer.writerow(results)
