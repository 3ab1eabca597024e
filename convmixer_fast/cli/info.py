"""``convmixer-fast info``: the published models, their size and cost."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .common import Command, add_output_format, positive

if TYPE_CHECKING:
    from ..arch import Variant

#: One row of the table: a name, and the text of a variant's cell.
_Row = tuple[str, Callable[[dict[str, Any]], str]]


@dataclass(frozen=True, kw_only=True)
class InfoArguments:
    """The flags of `add_info`."""

    models: list[str]
    img_size: int | None
    format: str


def add_info(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "models", nargs="*", metavar="MODEL", help="timm's or the paper's name (default: all)"
    )
    sub.add_argument("--img-size", type=positive, metavar="N", help="side of the image in pixels")
    add_output_format(sub)


def info(args: InfoArguments) -> int:
    from ..arch import VARIANTS, find_variant

    variants = [find_variant(name) for name in args.models] or list(VARIANTS.values())
    found = [describe(v, args.img_size) for v in variants]
    if args.format == "json":
        print(json.dumps(found, indent=2))
        return 0
    print(_columns([(name, [cell(d) for d in found]) for name, cell in _ROWS]))
    print(
        "\nBoth libraries leave the depthwise convolutions out and count some elementwise work "
        "instead.\nTrue MACs are those of all convolutions of one image; their parts are rounded "
        "so that they add up.\n--format json has every figure in full."
    )
    return 0


COMMAND = Command(
    "info", "list the published models, their size and cost", add_info, InfoArguments, info
)


def describe(variant: Variant, img_size: int | None = None) -> dict[str, Any]:
    """A published variant: its architecture, and the cost of one image by three ways to count."""
    arch = variant.arch
    size = (img_size, img_size) if img_size else variant.input_size[1:]
    rows, cols = arch.grid(size)
    if min(rows, cols) < 1:
        raise ValueError(
            f"{variant.name}: an image of {size[0]}x{size[1]} px is smaller than its patch of "
            f"{arch.patch_size}x{arch.patch_size}"
        )
    macs = arch.macs(size)
    convolutions = macs.pointwise + macs.depthwise + macs.stem
    return {
        "model": variant.name,
        "paper_name": variant.paper_name,
        "dim": arch.dim,
        "depth": arch.depth,
        "kernel_size": arch.kernel_size,
        "patch_size": arch.patch_size,
        "act": arch.act,
        "num_classes": arch.num_classes,
        "param_count": arch.params,
        "img_size": list(size),
        "grid": [rows, cols],
        "gmacs_timm": round(arch.macs_timm(size) / 1e9, 2),
        "macs_mmpretrain": arch.macs_mmpretrain(size),
        "macs": convolutions,
        "macs_pointwise": macs.pointwise,
        "macs_depthwise": macs.depthwise,
        "macs_stem": macs.stem,
    }


def rounded_parts(parts: Sequence[int], unit: int) -> list[int]:
    """``parts`` in whole ``unit``s whose sum is the rounded sum of ``parts``.

    Each part is rounded down, and the parts with the largest remainders get one unit more until
    the sum is reached: a printed column adds up, and each figure is off by less than one unit.
    """
    floors = [part // unit for part in parts]
    missing = round(sum(parts) / unit) - sum(floors)
    by_remainder = sorted(range(len(parts)), key=lambda i: -(parts[i] % unit))
    return [f + (i in by_remainder[:missing]) for i, f in enumerate(floors)]


def _columns(rows: Sequence[tuple[str, Sequence[str]]]) -> str:
    """Rows as aligned text: names flush left, cells flush right."""
    widths = [max(map(len, cells)) for cells in zip(*(cells for _, cells in rows), strict=True)]
    first = max(len(name) for name, _ in rows)
    return "\n".join(
        f"{name:<{first}}"
        + "".join(f"  {cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
        for name, cells in rows
    )


def _part(i: int) -> Callable[[dict[str, Any]], str]:
    """Cell of one kind of convolution, rounded so that the three kinds add up."""
    keys = ("macs_pointwise", "macs_depthwise", "macs_stem")
    return lambda d: f"{rounded_parts([d[k] for k in keys], 10**7)[i] / 100:.2f} G"


_ROWS: tuple[_Row, ...] = (
    ("model", lambda d: d["model"]),
    ("name in the paper", lambda d: d["paper_name"]),
    ("dim / depth", lambda d: f"{d['dim']} / {d['depth']}"),
    ("kernel / patch", lambda d: f"{d['kernel_size']} / {d['patch_size']}"),
    ("activation", lambda d: d["act"]),
    ("parameters", lambda d: f"{d['param_count']:,}"),
    ("classes", lambda d: str(d["num_classes"])),
    ("image", lambda d: "x".join(map(str, d["img_size"])) + " px"),
    ("grid of patches", lambda d: "x".join(map(str, d["grid"]))),
    ("MACs as timm counts", lambda d: f"{d['gmacs_timm']:.2f} G"),
    ("MACs as mmpretrain counts", lambda d: f"{d['macs_mmpretrain']:,}"),
    ("true MACs", lambda d: f"{d['macs'] / 1e9:.2f} G"),
    ("  pointwise", _part(0)),
    ("  depthwise", _part(1)),
    ("  stem", _part(2)),
)
