"""``convmixer-fast convert``: a checkpoint in another library's keys."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace

from .common import ACTIVATIONS, FORMATS, Command, note, output_file, printable


@dataclass(frozen=True, kw_only=True)
class ConvertArguments:
    """The flags of `add_convert`."""

    source: str
    target: str
    format: str
    act: str | None


def add_convert(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("source", metavar="SRC", help="checkpoint in any published format")
    sub.add_argument(
        "target", type=output_file, metavar="DST", help="file to write: .safetensors, or .pth"
    )
    sub.add_argument("--format", choices=FORMATS, required=True, help="keys of the file written")
    sub.add_argument("--act", choices=ACTIVATIONS, help="activation to record, where unknown")


def convert(args: ConvertArguments) -> int:
    from ..checkpoint import read_checkpoint, save_checkpoint

    held = read_checkpoint(args.source)
    if args.act:
        usual = held.arch.act
        if usual and usual != args.act:
            raise ValueError(
                f"{args.source} was trained with {usual}: --act {args.act} contradicts it"
            )
        held = replace(held, arch=replace(held.arch, act=args.act))
    save_checkpoint(held, args.target, args.format)
    tensors = held.state_dict.values()
    print(
        f"read   {printable(args.source)}\n"
        f"       {held.format} keys, {held.arch}\n"
        f"wrote  {printable(args.target)}\n"
        f"       {args.format} keys, {len(tensors)} tensors, "
        f"{sum(t.numel() for t in tensors):,} numbers"
    )
    if held.arch.act is None:
        note("the activation is not recorded: pass --act, or readers will have to be told")
    return 0


COMMAND = Command(
    "convert",
    "rewrite a checkpoint in another library's keys",
    add_convert,
    ConvertArguments,
    convert,
)
