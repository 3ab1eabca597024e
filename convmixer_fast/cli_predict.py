"""What does ``convmixer-fast predict`` do?"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from contextlib import ExitStack, nullcontext
from typing import TYPE_CHECKING, Any

from .cli_common import (
    add_model_arguments,
    add_running_arguments,
    device_of,
    load_model,
    note,
    preprocessing_of,
    printable,
)

if TYPE_CHECKING:
    from .inference import Prediction


def add_predict(sub: argparse.ArgumentParser) -> None:
    sub.epilog = (
        "Exit code: 0 when at least one image was classified (the others are named on stderr), "
        "2 when none was, or with --on-error stop at the first that cannot be read."
    )
    sub.add_argument(
        "paths", nargs="*", metavar="PATH", help="images, and folders of .png, .jpg, .jpeg"
    )
    sub.add_argument("--data-dir", metavar="DIR", help="another folder of images")

    add_model_arguments(sub)
    output = sub.add_argument_group("results")
    output.add_argument(
        "--topk", type=int, default=5, metavar="N", help="classes shown (default: 5)"
    )
    output.add_argument(
        "--class-map",
        "--label-file",
        metavar="FILE",
        help="class names: text, one a line, or JSON (default: ImageNet's for 1000 classes, "
        "where timm or torchvision is installed)",
    )
    output.add_argument("--output-type", choices=("prob", "logit"), default="prob")
    output.add_argument(
        "--results-file",
        metavar="FILE",
        help="CSV: filename, index, label, prob (index_0, index_1, ... when --topk > 1)",
    )
    output.add_argument("--no-console-results", action="store_true", help="print no table")
    output.add_argument(
        "--on-error", choices=("skip", "stop"), default="skip", help="for a bad image"
    )

    add_running_arguments(sub)


def _table(row: Prediction, output_type: str) -> str:
    """A file's name, and its classes below."""
    lines = [printable(row.filename)]
    width = max(len(str(i)) for i in row.indices)
    for index, label, score in zip(row.indices, row.labels, row.scores, strict=True):
        shown = f"{score:8.2%}" if output_type == "prob" else f"{score:8.3f}"
        name = "" if label == str(index) else f"  {label}"
        lines.append(f"  {shown}  {index:>{width}}{name}")
    return "\n".join(lines)


def predict(args: argparse.Namespace) -> int:
    import torch
    from tqdm import tqdm

    from .inference import ResultFile, class_labels, find_images, image_batches, top_predictions
    from .ops import use_backend
    from .ops.backends import recording

    if args.topk < 1:
        raise ValueError(f"--topk must be at least 1, got {args.topk}")
    if args.batch_size < 1:
        raise ValueError(f"--batch-size must be at least 1, got {args.batch_size}")
    if args.workers < 0:
        raise ValueError(f"--workers must not be negative, got {args.workers}")
    inputs = [*args.paths, *([args.data_dir] if args.data_dir else [])]
    if not inputs:
        raise ValueError("no images: name files or folders")
    paths = find_images(inputs)
    device = device_of(args.device)
    model = load_model(args)
    preprocessing = preprocessing_of(args, model)
    labels = class_labels(model.num_classes, args.class_map)
    topk = min(args.topk, model.num_classes)
    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    model = model.to(device).to(memory_format=layout)
    size = "x".join(map(str, preprocessing.input_size))
    note(
        f"{model.arch} on {device}; images as {size}, crop {preprocessing.crop_pct:g}, "
        f"{preprocessing.interpolation}"
    )

    amp: Any = nullcontext()
    if args.amp or args.amp_dtype:
        default = "float16" if device.type == "cuda" else "bfloat16"
        amp = torch.autocast(device.type, dtype=getattr(torch, args.amp_dtype or default))
    console = not args.no_console_results
    done = failed = 0
    kernels: set[str] = set()
    start = time.perf_counter()
    with ExitStack() as stack:
        # Pillow's remarks about odd files (a palette with transparency) are no failure.
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", category=UserWarning, module="PIL")
        results = None
        if args.results_file:
            results = stack.enter_context(ResultFile(args.results_file, topk, args.output_type))
        stack.enter_context(use_backend(args.backend))
        stack.enter_context(torch.inference_mode())
        # Where results scroll by on the same screen, they are the progress.
        quiet = not sys.stderr.isatty() or (console and sys.stdout.isatty())
        bar = stack.enter_context(tqdm(total=len(paths), unit="img", disable=quiet))
        for batch in image_batches(paths, preprocessing, args.batch_size, args.workers):
            for error in batch.failures:
                if args.on_error == "stop":
                    raise error
                failed += 1
                bar.clear()
                note(f"skipped {error}")
            if batch.images is not None:
                images = batch.images.to(device=device, memory_format=layout)
                with amp, recording() as calls:
                    logits = model(images)
                kernels.update(call.choice.backend for call in calls)
                names = [str(path) for path in batch.paths]
                for row in top_predictions(names, logits, labels, topk, args.output_type):
                    if results:
                        results.write(row)
                    if console:
                        try:
                            print(_table(row, args.output_type), flush=True)
                        except BrokenPipeError:
                            if not results:
                                raise
                            console = False  # the reader has seen enough; the file has not
                done += len(names)
            bar.update(len(batch.paths) + len(batch.failures))
        if not done:
            raise ValueError(f"no image could be read, of {len(paths)}")
    seconds = time.perf_counter() - start
    skipped = f", {failed} skipped" if failed else ""
    written = f"; wrote {args.results_file}" if args.results_file else ""
    used = " and ".join(sorted(kernels))
    count = "1 image" if done == 1 else f"{done} images"
    note(
        f"{count}{skipped} in {seconds:.1f} s ({done / seconds:.1f} img/s, {used} kernels){written}"
    )
    return 0
