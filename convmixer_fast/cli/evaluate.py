"""What does ``convmixer-fast evaluate`` do?"""

from __future__ import annotations

import argparse
import csv
import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .common import (
    add_image_arguments,
    add_model_arguments,
    add_running_arguments,
    check_running,
    describe_predictor,
    load_model,
    make_predictor,
    note,
    note_left_out,
    output_file,
)

if TYPE_CHECKING:
    from ..inference import Failure, Predictor


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


def evaluate(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from ..inference import ImageError, LeftOut, read_labels
    from ..inference.evaluate import evaluate as count
    from ..inference.evaluate import labelled_images
    from ..inference.labels import stored_labels

    check_running(args)
    folder = args.data or args.data_dir
    if not folder or (args.data and args.data_dir):
        raise ValueError("name the folder of labelled images, once")
    model = load_model(args)
    classes = read_labels(args.class_map, model.num_classes) if args.class_map else None
    left_out = LeftOut()
    try:
        paths, targets, names = labelled_images(
            folder, model.num_classes, classes, args.suffixes, left_out, stored_labels(model)
        )
    finally:
        note_left_out(left_out)
    predictor = make_predictor(args, model, topk=5, labels=names)
    note(describe_predictor(predictor))
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

        found = count(predictor, paths, targets, names, workers=args.workers, progress=progress)
    results = {**found.metrics(), **_about(args, predictor, found.images, len(found.failures))}
    if args.confusion:
        found.write_confusion(args.confusion)
    if args.per_class:
        found.write_per_class(args.per_class)
    if args.results_file:
        _write(Path(args.results_file), results)
    # What scripts look for in the output of timm's validate.py.
    print(f"--result\n{json.dumps(results, indent=4)}")
    return 0


def _about(
    args: argparse.Namespace, predictor: Predictor, images: int, failed: int
) -> dict[str, Any]:
    """timm's further keys, and how many images there were."""
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
    from ..files import whole_or_absent

    with whole_or_absent(path) as file:
        if path.suffix.lower() == ".json":
            json.dump(results, file, indent=4)
            file.write("\n")
        else:
            writer = csv.DictWriter(file, list(results), lineterminator="\n")
            writer.writeheader()
            writer.writerow(results)
