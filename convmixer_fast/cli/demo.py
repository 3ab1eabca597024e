"""``convmixer-fast demo``: real scans and photographs, classified fused and plain."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass

from .common import Command, add_output_format


@dataclass(frozen=True, kw_only=True)
class DemoArguments:
    """The flags of `add_demo`."""

    rounds: int
    format: str


def add_demo(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--rounds", type=int, default=3, metavar="N", help="timed rounds (default: 3)")
    add_output_format(sub)


def demo(args: DemoArguments) -> int:
    from .. import demo

    if args.rounds < 1:
        raise ValueError(f"--rounds must be at least 1, got {args.rounds}")
    report = demo.run(rounds=args.rounds)
    print(json.dumps(report, indent=2) if args.format == "json" else demo.render(report))
    return 0 if demo.agrees(report) else 1


COMMAND = Command(
    "demo",
    "classify real scans and photographs, fused and plain, side by side",
    add_demo,
    DemoArguments,
    demo,
)
