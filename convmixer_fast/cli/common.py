"""What all commands share: names, types of arguments, and messages on the terminal."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Generic, TypeVar

if TYPE_CHECKING:
    from ..inference import LeftOut, Prediction

PROG = "convmixer-fast"
DEFAULT_MODEL = "convmixer_768_32"

# Values that argparse lists in its help. The modules that own them are not imported here, so that
# help and usage errors need no import of torch; the tests compare both lists.
ACTIVATIONS = ("gelu", "relu", "silu", "hardswish", "identity")
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
BACKENDS = ("auto", "reference", "cpu", "triton", "cuda")
FORMATS = ("timm", "locuslab", "mmpretrain", "tweet")

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}

Arguments = TypeVar("Arguments")


@dataclass(frozen=True)
class Command(Generic[Arguments]):
    """One subcommand of ``convmixer-fast``.

    Args:
        name: the word on the command line.
        help: one line without a full stop, for ``--help``.
        add_arguments: adds the flags to the subcommand's parser.
        arguments: a dataclass with one field a flag.
        run: the command; returns the exit code.
    """

    name: str
    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    arguments: type[Arguments]
    run: Callable[[Arguments], int]

    def parsed(self, namespace: argparse.Namespace) -> Arguments:
        """The dataclass of what argparse has read."""
        names = [field.name for field in fields(self.arguments)]  # type: ignore[arg-type]
        return self.arguments(**{name: getattr(namespace, name) for name in names})

    def __call__(self, namespace: argparse.Namespace) -> int:
        return self.run(self.parsed(namespace))


def add_output_format(sub: argparse.ArgumentParser) -> None:
    """Add ``--format`` of the commands that print a report."""
    sub.add_argument("--format", choices=("text", "json"), default="text", help="default: text")


def note_left_out(left_out: LeftOut) -> None:
    """Print which files a search for images left out, and the flag that includes them."""
    if left_out:
        note(str(left_out))


def add_target_argument(group: Any) -> None:
    """Add ``--target`` of the commands that draw heatmaps."""
    group.add_argument(
        "--target", type=int, metavar="N", help="class of the heatmap (default: the likeliest)"
    )


def output_file(text: str) -> str:
    """Type of the options that name a file to write; `check_outputs` finds them by it."""
    return text


def output_folder(text: str) -> str:
    """Type of the options that name a folder to write files into."""
    return text


def check_outputs(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Check before the work that the files named for output can be written after it.

    Raises:
        OSError: with the file's name.
    """
    from ..files import check_output

    for action in parser._actions:
        name = getattr(args, action.dest, None)
        # URLs (s3://...) are not on this machine; the commands refuse them with a reason.
        if action.type is output_file and name not in (None, action.default) and "://" not in name:
            check_output(name)


def memory_size(text: str) -> int:
    """Bytes of a size like ``2GB``, ``512MiB`` or ``1000000``."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]?I?)B?\s*", text.upper())
    if found is None or found[2] not in _UNITS or float(found[1]) <= 0:
        raise argparse.ArgumentTypeError(f"must be a size like 2GB or 512MiB, got {text!r}")
    return int(float(found[1]) * _UNITS[found[2]])


def positive(text: str) -> int:
    """Type of the options that take a whole number of at least 1."""
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}") from None
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def printable(text: str) -> str:
    """``text`` as one line, control characters escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(text.splitlines()))


def note(text: str) -> None:
    """Print a line to stderr, so that stdout holds results only."""
    print(f"{PROG}: {printable(text)}", file=sys.stderr, flush=True)


def table(row: Prediction, output_type: str) -> str:
    """One image's result as text: the file's name, and a line for each class."""
    lines = [printable(row.filename)]
    width = max(len(str(i)) for i in row.indices)
    for index, label, score in zip(row.indices, row.labels, row.scores, strict=True):
        shown = f"{score:8.2%}" if output_type == "prob" else f"{score:8.3f}"
        name = "" if label == str(index) else f"  {label}"
        lines.append(f"  {shown}  {index:>{width}}{name}")
    return "\n".join(lines)
