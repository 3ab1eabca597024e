"""What does ``convmixer-fast predict`` do?"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .common import (
    add_image_arguments,
    add_model_arguments,
    add_running_arguments,
    add_target_argument,
    check_running,
    describe_predictor,
    load_model,
    make_predictor,
    note,
    note_left_out,
    output_file,
    output_folder,
    positive,
    table,
)

if TYPE_CHECKING:
    from ..inference import HeatmapFolder, Outcome, Predictor, ResultFile
    from ..inference.remote import Location
    from ..inference.results import Row

# As in `inference.files.FORMATS` and `inference.results.OUTPUT_TYPES`, which the tests compare:
# help and errors of usage need no import of torch.
RESULT_FORMATS = ("csv", "json", "jsonl", "parquet")
OUTPUT_TYPES = ("prob", "logit", "embedding")


def add_predict(sub: argparse.ArgumentParser) -> None:
    sub.epilog = (
        "Exit code: 0 when at least one image was classified (the others are named on stderr), "
        "2 when none was, or with --on-error stop at the first that cannot be read."
    )
    sub.add_argument(
        "paths",
        nargs="*",
        metavar="PATH",
        help="images, folders of them (see --suffixes), and patterns such as 'photos/**/*.webp'; "
        "also as URLs, such as s3://bucket/photos/ (needs s3fs; gcsfs for gs://, adlfs for az://)",
    )
    sub.add_argument(
        "--data-dir", metavar="DIR", help="another folder of images; with --image-list, its root"
    )
    sub.add_argument(
        "--image-list",
        metavar="FILE",
        help="images named in a table (CSV, Parquet) or a text file, one a line",
    )
    sub.add_argument(
        "--image-column", metavar="NAME", help="of the table (default: filename, path...)"
    )
    add_model_arguments(sub)
    add_image_arguments(sub)
    output = sub.add_argument_group("results")
    output.add_argument(
        "--topk", type=int, default=5, metavar="N", help="classes shown (default: 5)"
    )
    add_label_argument(output)
    output.add_argument("--output-type", choices=OUTPUT_TYPES, default="prob")
    output.add_argument(
        "--results-file",
        type=output_file,
        metavar="FILE",
        help="filename, index, label, prob (index_0, index_1, ... when --topk > 1); written in "
        "parts while it is computed, and whole at the end",
    )
    output.add_argument(
        "--results-dir",
        type=output_folder,
        metavar="DIR",
        help="folder of --results-file (default name: predictions.FORMAT)",
    )
    output.add_argument(
        "--results-format",
        choices=RESULT_FORMATS,
        help="default: by the file's suffix, else csv; parquet needs pyarrow",
    )
    output.add_argument(
        "--errors-file",
        type=output_file,
        metavar="FILE",
        help="CSV of the images that cannot be read: filename, error (default: beside the "
        "results, NAME.errors.csv)",
    )
    output.add_argument(
        "--resume", action="store_true", help="go on with what an earlier run has written"
    )
    output.add_argument("--overwrite", action="store_true", help="replace what is there")
    output.add_argument(
        "--heatmap",
        type=output_folder,
        metavar="DIR",
        help="write where each image's class comes from: a PNG over the image as the model saw it, "
        "and the map itself as .npy, under the image's name with its folders",
    )
    add_target_argument(output)
    output.add_argument(
        "--part-seconds",
        type=float,
        default=5.0,
        metavar="S",
        help="what a kill can cost, at most, or a hundredth of the run (default: 5)",
    )
    for flag in ("--include-index", "--fullname"):
        output.add_argument(flag, action="store_true", help="always so; for timm's command lines")
    output.add_argument("--no-console-results", action="store_true", help="print no table")
    output.add_argument(
        "--on-error", choices=("skip", "stop"), default="skip", help="for a bad image"
    )
    add_running_arguments(sub)
    ray = sub.add_argument_group("past one machine (pip install 'convmixer_fast[ray]')")
    ray.add_argument("--engine", choices=("local", "ray"), default="local")
    ray.add_argument(
        "--ray-address", metavar="ADDRESS", help="of a running cluster (default: one of its own)"
    )
    ray.add_argument(
        "--actors", type=positive, metavar="N", help="copies of the model (default: as many as fit)"
    )
    ray.add_argument(
        "--gpus-per-actor", type=float, metavar="X", help="default: 1 where this machine has one"
    )


def add_label_argument(group: Any) -> None:
    group.add_argument(
        "--class-map",
        "--label-file",
        metavar="FILE",
        help="class names: text, one a line, or JSON (default: ImageNet's for 1000 classes, "
        "where timm or torchvision is installed)",
    )


def predict(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from ..inference import ImageError
    from ..inference.labels import labels_for

    if args.topk < 1:
        raise ValueError(f"--topk must be at least 1, got {args.topk}")
    if args.resume and args.overwrite:
        raise ValueError("--resume goes on with what --overwrite would replace: pass one of them")
    check_running(args)
    target = _results_path(args)
    if args.resume and target is None:
        raise ValueError("--resume needs the --results-file of the run to go on with")
    if args.output_type == "embedding" and target is None:
        raise ValueError("embeddings are not for the screen: pass --results-file")
    if args.target is not None and not args.heatmap:
        raise ValueError("--target is for --heatmap")
    paths = _images(args)
    heatmaps = _heatmaps(args, paths)
    model = load_model(args)
    labels = labels_for(model, args.class_map) if model.num_classes else None
    options = {"topk": args.topk, "output_type": args.output_type, "labels": labels}
    predictor = make_predictor(args, model, **options)
    note(describe_predictor(predictor))
    if heatmaps:
        predictor.check_heatmaps(heatmaps.target)

    console = not (args.no_console_results or args.output_type == "embedding")
    seen = skipped = 0
    waited = 0.0
    with ExitStack() as stack:
        # Pillow's remarks about odd files (a palette with transparency) are no failure.
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", category=UserWarning, module="PIL")
        results = stack.enter_context(_results(args, target, predictor)) if target else None
        done = {str(path) for path in paths if results and results.is_done(str(path))}
        # Rows of a run without heatmaps, or whose heatmaps were moved, are there and stay.
        undrawn: set[str] = set()
        if results and heatmaps:
            undrawn = {f for f in done - results.unread if not heatmaps.holds(f)}
        todo = [path for path in paths if str(path) not in done or str(path) in undrawn]
        before = len(paths) - len(todo)
        # Where results scroll by on the same screen, they are the progress.
        quiet = not sys.stderr.isatty() or (console and sys.stdout.isatty())
        bar = stack.enter_context(tqdm(total=len(paths), initial=before, unit="img", disable=quiet))
        start = time.perf_counter()
        try:
            for outcome in _outcomes(args, predictor, todo, heatmaps):
                waited += outcome.waited
                stop = args.on_error == "stop" and outcome.failures
                if results:
                    rows = [row for row in outcome.rows if row.filename not in undrawn]
                    failures = [f for f in outcome.failures if f.filename not in undrawn]
                    results.write(rows, () if stop else failures)
                if stop:
                    raise ImageError.about(*outcome.failures[0])
                for failure in outcome.failures:
                    bar.clear()
                    note(f"skipped {failure.filename}: {failure.error}")
                if console and not _show(outcome.rows, args.output_type):
                    if not results:
                        raise BrokenPipeError
                    console = False  # the reader has seen enough; the file has not
                seen += len(outcome.rows)
                skipped += len(outcome.failures)
                bar.update(len(outcome.rows) + len(outcome.failures))
            if results:
                results.flush()
        except BaseException:
            if results and results.parts and (results.kept or seen):
                bar.clear()
                note(f"what was done is kept in {results.parts}: --resume goes on with it")
            raise
        seconds = time.perf_counter() - start
        kept = results.kept if results else seen
    if not kept:
        why = f": see {results.errors_file}" if results and results.errors_file else ""
        raise ValueError(f"no image could be read, of {len(paths)}{why}")
    note(_summary(args, predictor, seen, skipped, before, seconds, waited))
    if results:
        told = results.failed and results.errors_file
        bad = f"; {results.errors_file} names what could not be read" if told else ""
        note(f"wrote {results.path} ({_count(results.kept)}){bad}")
    if heatmaps and seen:
        note(f"wrote {heatmaps.folder}: a .png and a .npy for each of {_count(seen)}")
    return 0


def _count(images: int) -> str:
    return "1 image" if images == 1 else f"{images} images"


def _summary(
    args: argparse.Namespace,
    predictor: Predictor,
    seen: int,
    skipped: int,
    before: int,
    seconds: float,
    waited: float,
) -> str:
    figures = [f"{(seen + skipped) / max(seconds, 1e-9):.1f} img/s"]
    if args.engine == "local":
        figures.append(f"{waited / max(seconds, 1e-9):.0%} of the time waiting for images")
    if predictor.kernels:
        figures.append(f"{' and '.join(sorted(predictor.kernels))} kernels")
    line = _count(seen) + (f", {skipped} skipped" if skipped else "")
    line += f" in {seconds:.1f} s ({', '.join(figures)})"
    return line + (f"; {before} were there already" if before else "")


def _results_path(args: argparse.Namespace) -> Path | None:
    from ..inference.remote import is_url

    for flag in ("results_file", "results_dir", "errors_file", "heatmap"):
        name = getattr(args, flag)
        if name and is_url(name):
            raise ValueError(
                f"--{flag.replace('_', '-')} {name}: results are written on this machine: name a "
                "file there, and copy it when it is finished"
            )
    name = args.results_file
    if name is None:
        if args.results_dir is None:
            return None
        name = f"predictions.{args.results_format or 'csv'}"
    return Path(args.results_dir or "", name)


def _images(args: argparse.Namespace) -> list[Location]:
    from ..inference import LeftOut, find_images, read_image_list

    left_out = LeftOut()
    inputs = list(args.paths)
    listed: list[Location] = []
    if args.image_list:
        listed = read_image_list(args.image_list, args.image_column, args.data_dir or "", left_out)
    elif args.data_dir:
        inputs.append(args.data_dir)
    if not inputs and not listed:
        raise ValueError("no images: name files, folders or an --image-list")
    found = dict.fromkeys([*find_images(inputs, args.suffixes, left_out), *listed])
    left_out.files = [file for file in left_out.files if file not in found]
    note_left_out(left_out)
    return list(found)


def _heatmaps(args: argparse.Namespace, paths: list[Location]) -> HeatmapFolder | None:
    from ..inference import HeatmapFolder

    if not args.heatmap:
        return None
    if args.engine != "local":
        raise ValueError(f"--heatmap is drawn on this machine: leave --engine {args.engine} out")
    folder = Path(args.heatmap)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--heatmap {folder} is a file: name a folder")
    searched = [*args.paths, *([args.data_dir] if args.data_dir and not args.image_list else [])]
    for given in map(Path, searched):
        if given.is_dir() and folder.resolve().is_relative_to(given.resolve()):
            raise ValueError(
                f"--heatmap {folder} lies in {given}, where its pictures would be images to "
                "predict the next time: name another folder"
            )
    heatmaps = HeatmapFolder(folder, args.target)
    heatmaps.check(map(str, paths), replace=args.resume or args.overwrite)
    return heatmaps


def _results(args: argparse.Namespace, target: Path, predictor: Predictor) -> ResultFile:
    from ..inference import ResultFile
    from ..inference.identity import model_digest

    return ResultFile(
        target,
        predictor.columns,
        format=args.results_format,
        resume=args.resume,
        overwrite=args.overwrite,
        settings={
            "model": model_digest(predictor.model, predictor.labels),
            "preprocessing": repr(predictor.preprocessing),
            "amp": str(args.amp_dtype or args.amp),
            "target": args.target,
        },
        errors_file=args.errors_file,
        part_seconds=args.part_seconds,
    )


def _outcomes(
    args: argparse.Namespace,
    predictor: Predictor,
    paths: list[Location],
    heatmaps: HeatmapFolder | None,
) -> Iterator[Outcome]:
    if args.engine == "local":
        return predictor.predict_files(paths, args.workers, heatmaps)
    from ..inference.ray import predict_files

    return predict_files(
        predictor,
        paths,
        actors=args.actors,
        workers=args.workers,
        address=args.ray_address,
        gpus_per_actor=args.gpus_per_actor,
    )


def _show(rows: list[Row], output_type: str) -> bool:
    """Print rows; False when nobody reads them any more."""
    try:
        for row in rows:
            print(table(row, output_type), flush=True)  # type: ignore[arg-type]
    except BrokenPipeError:
        return False
    return True
