"""``convmixer-fast predict``: classify images."""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .common import (
    Command,
    add_target_argument,
    note,
    note_left_out,
    output_file,
    output_folder,
    positive,
    table,
)
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
    from ..inference import Failure, HeatmapFolder, Outcome, Predictor, ResultFile
    from ..inference.remote import Location
    from ..inference.results import Row

# As in `inference.files.FORMATS` and `inference.results.OUTPUT_TYPES`, which the tests compare:
# help and usage errors need no import of torch.
RESULT_FORMATS = ("csv", "json", "jsonl", "parquet")
OUTPUT_TYPES = ("prob", "logit", "embedding")


@dataclass(frozen=True, kw_only=True)
class PredictArguments(PredictorArguments):
    """The flags of `add_predict`."""

    paths: list[str]
    data_dir: str | None
    image_list: str | None
    image_column: str | None
    topk: int
    class_map: str | None
    output_type: str
    results_file: str | None
    results_dir: str | None
    results_format: str | None
    errors_file: str | None
    resume: bool
    overwrite: bool
    heatmap: str | None
    target: int | None
    part_seconds: float
    include_index: bool
    fullname: bool
    no_console_results: bool
    on_error: str
    engine: str
    ray_address: str | None
    actors: int | None
    gpus_per_actor: float | None


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
    _add_results(sub)
    add_running_arguments(sub)
    _add_ray(sub)


def _add_results(sub: argparse.ArgumentParser) -> None:
    output = sub.add_argument_group("results")
    output.add_argument(
        "--topk", type=int, default=5, metavar="N", help="classes shown (default: 5)"
    )
    _add_label_argument(output)
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
        help="CSV of the images that cannot be read: filename, error (default: next to "
        "the results, NAME.errors.csv)",
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


def _add_ray(sub: argparse.ArgumentParser) -> None:
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


def _add_label_argument(group: Any) -> None:
    group.add_argument(
        "--class-map",
        "--label-file",
        metavar="FILE",
        help="class names: text, one a line, or JSON (default: ImageNet's for 1000 classes, "
        "where timm or torchvision is installed)",
    )


def predict(args: PredictArguments) -> int:
    target = _checked_results_path(args)
    paths = _images(args)
    heatmaps = _heatmaps(args, paths)
    predictor = _predictor(args)
    note(describe_predictor(predictor))
    if heatmaps:
        predictor.check_heatmaps(heatmaps.target)
    with (
        warnings.catch_warnings(),
        _results(args, target, predictor) if target else nullcontext() as results,
    ):
        # Pillow warns of odd files (a palette with transparency) that it reads correctly.
        warnings.filterwarnings("ignore", category=UserWarning, module="PIL")
        run = _Run(args, predictor, paths, heatmaps, results)
        run()
    run.report()
    return 0


COMMAND = Command("predict", "classify images", add_predict, PredictArguments, predict)


class _Run:
    """One run over all images: prints and writes each outcome, and counts images.

    Args:
        results: the file that results go to, open; None: the terminal only.
    """

    def __init__(
        self,
        args: PredictArguments,
        predictor: Predictor,
        paths: list[Location],
        heatmaps: HeatmapFolder | None,
        results: ResultFile | None,
    ) -> None:
        self.args, self.predictor = args, predictor
        self.paths, self.heatmaps, self.results = paths, heatmaps, results
        self.console = not (args.no_console_results or args.output_type == "embedding")
        self.seen = self.skipped = 0
        self.waited = self.seconds = 0.0
        done = {str(path) for path in paths if results and results.is_done(str(path))}
        # Images with a row and no heatmap, of a run without --heatmap or whose heatmaps were
        # moved: drawn now, and their rows stay.
        self.undrawn: set[str] = set()
        if results and heatmaps:
            self.undrawn = {f for f in done - results.unread if not heatmaps.holds(f)}
        self.todo = [p for p in paths if str(p) not in done or str(p) in self.undrawn]
        self.before = len(paths) - len(self.todo)

    def __call__(self) -> None:
        """Predict what is left to do.

        Raises:
            ImageError: an image cannot be read, with ``--on-error stop``.
            BrokenPipeError: nothing reads stdout, and there is no file of results.
        """
        with self._progress_bar() as bar:
            start = time.perf_counter()
            try:
                for outcome in self._outcomes():
                    self._take(outcome, bar)
                if self.results:
                    self.results.flush()
            except BaseException:
                results = self.results
                if results and results.parts and (results.kept or self.seen):
                    bar.clear()
                    note(f"what was done is kept in {results.parts}: --resume goes on with it")
                raise
            self.seconds = time.perf_counter() - start

    def _progress_bar(self) -> Any:
        from tqdm import tqdm

        # Results that scroll by on the same terminal show the progress themselves.
        quiet = not sys.stderr.isatty() or (self.console and sys.stdout.isatty())
        return tqdm(total=len(self.paths), initial=self.before, unit="img", disable=quiet)

    def _outcomes(self) -> Iterator[Outcome]:
        args = self.args
        if args.engine == "local":
            return self.predictor.predict_files(self.todo, args.workers, self.heatmaps)
        from ..inference.ray import predict_files

        return predict_files(
            self.predictor,
            self.todo,
            actors=args.actors,
            workers=args.workers,
            address=args.ray_address,
            gpus_per_actor=args.gpus_per_actor,
        )

    def _take(self, outcome: Outcome, bar: Any) -> None:
        """Write, print and count one outcome."""
        self.waited += outcome.waited
        self._write(outcome)
        for failure in outcome.failures:
            bar.clear()
            note(f"skipped {failure.filename}: {failure.error}")
        if self.console and not _show(outcome.rows, self.args.output_type):
            if not self.results:
                raise BrokenPipeError
            # Nothing reads stdout any more; the file still gets every row.
            self.console = False
        self.seen += len(outcome.rows)
        self.skipped += len(outcome.failures)
        bar.update(len(outcome.rows) + len(outcome.failures))

    def _write(self, outcome: Outcome) -> None:
        from ..inference import ImageError

        stop = self.args.on_error == "stop" and outcome.failures
        if self.results:
            rows = [row for row in outcome.rows if row.filename not in self.undrawn]
            failures: Sequence[Failure] = ()
            if not stop:
                failures = [f for f in outcome.failures if f.filename not in self.undrawn]
            self.results.write(rows, failures)
        if stop:
            raise ImageError.about(*outcome.failures[0])

    def report(self) -> None:
        """Print how much was done, how fast, and where it was written.

        Raises:
            ValueError: no image could be read.
        """
        results = self.results
        if not (results.kept if results else self.seen):
            why = f": see {results.errors_file}" if results and results.errors_file else ""
            raise ValueError(f"no image could be read, of {len(self.paths)}{why}")
        note(self._summary())
        if results:
            told = results.failed and results.errors_file
            bad = f"; {results.errors_file} names what could not be read" if told else ""
            note(f"wrote {results.path} ({_count(results.kept)}){bad}")
        if self.heatmaps and self.seen:
            note(f"wrote {self.heatmaps.folder}: a .png and a .npy for each of {_count(self.seen)}")

    def _summary(self) -> str:
        seconds = max(self.seconds, 1e-9)
        figures = [f"{(self.seen + self.skipped) / seconds:.1f} img/s"]
        if self.args.engine == "local":
            figures.append(f"{self.waited / seconds:.0%} of the time waiting for images")
        if self.predictor.kernels:
            figures.append(f"{' and '.join(sorted(self.predictor.kernels))} kernels")
        line = _count(self.seen) + (f", {self.skipped} skipped" if self.skipped else "")
        line += f" in {self.seconds:.1f} s ({', '.join(figures)})"
        return line + (f"; {self.before} were there already" if self.before else "")


def _count(images: int) -> str:
    return "1 image" if images == 1 else f"{images} images"


def _checked_results_path(args: PredictArguments) -> Path | None:
    """Where results go, after a check of the flags against each other; None: the terminal only."""
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
    return target


def _results_path(args: PredictArguments) -> Path | None:
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


def _predictor(args: PredictArguments) -> Predictor:
    from ..inference.labels import labels_for

    model = load_model(args, embedding=args.output_type == "embedding")
    labels = labels_for(model, args.class_map) if model.num_classes else None
    return make_predictor(args, model, topk=args.topk, output_type=args.output_type, labels=labels)


def _images(args: PredictArguments) -> list[Location]:
    """Every image that the flags name, once, in order."""
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


def _heatmaps(args: PredictArguments, paths: list[Location]) -> HeatmapFolder | None:
    """The folder of ``--heatmap``, checked; None without the flag."""
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


def _results(args: PredictArguments, target: Path, predictor: Predictor) -> ResultFile:
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


def _show(rows: list[Row], output_type: str) -> bool:
    """Print rows; False if nothing reads stdout any more."""
    try:
        for row in rows:
            print(table(row, output_type), flush=True)  # type: ignore[arg-type]
    except BrokenPipeError:
        return False
    return True
