"""``convmixer-fast stream``: classify one image of any size, with time and memory reported."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .common import (
    BACKENDS,
    Command,
    add_target_argument,
    memory_size,
    note,
    output_file,
    output_folder,
    positive,
    table,
)
from .groups import ModelArguments, add_model_arguments, device_of, load_model

if TYPE_CHECKING:
    from ..inference import StreamStats

# As in `inference.sources`, which the tests compare: help needs no import of torch.
LAYOUTS = ("HW", "HWC", "CHW", "NHWC", "NCHW")


@dataclass(frozen=True, kw_only=True)
class StreamArguments(ModelArguments):
    """The flags of `add_stream`."""

    image: str
    layout: str | None
    topk: int
    class_map: str | None
    output_type: str
    output: str | None
    heatmap: str | None
    target: int | None
    overwrite: bool
    max_memory: int | None
    scratch: str | None
    resume: bool
    state: str | None
    device: str | None
    backend: str

    @property
    def what(self) -> str:
        """The ``output`` of `inference.stream`."""
        return "features" if self.output else "heatmap" if self.heatmap else "logits"

    @property
    def array(self) -> Path | None:
        """The file of the heatmap's values, next to its picture."""
        return Path(self.heatmap).with_suffix(".npy") if self.heatmap else None

    @property
    def state_file(self) -> Path:
        return Path(self.state or f"{Path(self.image).name}.stream-state")


def add_stream(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("image", metavar="IMAGE", help=".npy, .zarr, TIFF, or any image file")
    sub.add_argument(
        "--layout",
        choices=LAYOUTS,
        help="how the file's axes are ordered; a TIFF's values are then taken as they are stored, "
        "16 bits and floats too, and not as Pillow makes 8 bits of them",
    )
    add_model_arguments(sub)
    _add_results(sub)
    _add_running(sub)


def _add_results(sub: argparse.ArgumentParser) -> None:
    output = sub.add_argument_group("results")
    output.add_argument(
        "--topk", type=positive, default=5, metavar="N", help="classes shown (default: 5)"
    )
    output.add_argument("--class-map", metavar="FILE", help="class names: text or JSON")
    output.add_argument("--output-type", choices=("prob", "logit"), default="prob")
    what = output.add_mutually_exclusive_group()
    what.add_argument(
        "--output",
        type=output_file,
        metavar="FILE",
        help="write the map of features as it comes: .npy or .zarr",
    )
    what.add_argument(
        "--heatmap",
        type=output_file,
        metavar="FILE",
        help="write where the class comes from: a PNG over the image, and the map itself as .npy",
    )
    add_target_argument(output)
    output.add_argument("--overwrite", action="store_true", help="replace files that are there")


def _add_running(sub: argparse.ArgumentParser) -> None:
    running = sub.add_argument_group("running")
    running.add_argument(
        "--max-memory", type=memory_size, metavar="SIZE", help="for its buffers, like 2GB"
    )
    running.add_argument(
        "--scratch",
        type=output_folder,
        metavar="DIR",
        help="folder for what does not fit in memory",
    )
    running.add_argument(
        "--resume",
        action="store_true",
        help="keep the state in a file as it goes, and go on from it if it is there",
    )
    running.add_argument(
        "--state",
        type=output_file,
        metavar="FILE",
        help="that file (default: IMAGE's name and .stream-state, here)",
    )
    running.add_argument("--device", metavar="NAME", help="default: cuda if there is one, else cpu")
    running.add_argument(
        "--backend", choices=BACKENDS, default="auto", help="kernels (default: auto)"
    )


def peak_memory() -> int:
    """Bytes of this process's largest resident memory so far."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def stream(args: StreamArguments) -> int:
    from .. import inference
    from ..inference.labels import labels_for
    from ..inference.preprocessing import preprocessing_for
    from ..ops import use_backend

    _check(args)
    device = device_of(args.device)
    model = load_model(args).to(device)
    labels = labels_for(model, args.class_map)
    preprocessing_for(model, native=True)  # warns if the mean and deviation are assumed
    note(f"{model.arch} on {device}")
    stats = inference.StreamStats()
    with use_backend(args.backend):
        result: Any = inference.stream(
            model,
            args.image,
            args.what,
            layout=args.layout,
            out=args.output,
            max_memory=args.max_memory,
            scratch=args.scratch,
            checkpoint=args.state_file if args.resume else None,
            target=args.target,
            progress=sys.stderr.isatty(),
            stats=stats,
        )
    if args.output:
        note(f"wrote {args.output}: {args.what} {tuple(result.shape)}")
    else:
        logits = result.logits if args.heatmap else result
        rows = inference.top_predictions(
            [args.image], logits.cpu(), labels, args.topk, args.output_type
        )
        print(table(rows[0], args.output_type), flush=True)
    if args.heatmap:
        _write_heatmap(args, result)
    note(_summary(stats))
    return 0


COMMAND = Command(
    "stream",
    "classify one image of any size, in memory that does not grow",
    add_stream,
    StreamArguments,
    stream,
)


def _check(args: StreamArguments) -> None:
    """Check the flags against each other, and that no file would be lost.

    Raises:
        ValueError: two flags contradict each other.
        FileExistsError: an output is there, and neither ``--overwrite`` nor a state to resume.
    """
    if args.heatmap:
        if Path(args.heatmap).suffix.lower() != ".png":
            raise ValueError(f"--heatmap {args.heatmap}: the picture is a .png")
    elif args.target is not None:
        raise ValueError("--target is for --heatmap")
    if args.state and not args.resume:
        raise ValueError("--state is for --resume")
    for path in (args.output, args.heatmap, args.array):
        going_on = args.resume and args.state_file.exists()
        if path and Path(path).exists() and not (args.overwrite or going_on):
            raise FileExistsError(f"{path} is there already: pass --overwrite to replace it")


def _write_heatmap(args: StreamArguments, result: Any) -> None:
    from PIL import Image

    from ..inference import write_overlay, write_scores

    assert args.heatmap is not None
    assert args.array is not None
    write_scores(args.array, result.scores[0])
    write_overlay(args.heatmap, result.scores[0], Image.fromarray(result.pictures[0]))
    note(
        f"wrote {args.heatmap} and {args.array}: class {int(result.classes[0])}, a value for each "
        f"{result.cell} x {result.cell} px"
    )


def _summary(stats: StreamStats) -> str:
    """Size, time, memory and cut of the stream, in one line."""
    plan = stats.plan
    assert plan is not None
    speed = stats.rows / max(stats.seconds, 1e-9)
    went_on = f", went on at row {stats.resumed_at:,}" if stats.resumed_at else ""
    cut = f"strips of {plan.columns} patches, " if plan.spilled else ""
    return (
        f"{stats.height:,} x {stats.width:,} px in {stats.seconds:.1f} s "
        f"({speed:,.0f} rows/s{went_on}); peak memory {peak_memory() / 1e6:,.0f} MB, "
        f"{plan.bytes / 1e6:,.0f} MB of it the stream's ({cut}bands of {plan.rows} patches, "
        f"backend {stats.backend})"
    )
