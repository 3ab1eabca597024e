"""``convmixer-fast doctor``: the installation, and a check of every backend that runs."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass

from .common import Command, add_output_format, note, output_file


@dataclass(frozen=True, kw_only=True)
class DoctorArguments:
    """The flags of `add_doctor`."""

    gpu: bool
    output: str
    format: str


def add_doctor(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--gpu",
        action="store_true",
        help="check and time every operator on the GPU, some minutes, and write one JSON file",
    )
    sub.add_argument(
        "--output",
        type=output_file,
        metavar="FILE",
        default="convmixer_fast-gpu.json",
        help="of --gpu (default: %(default)s)",
    )
    add_output_format(sub)


def doctor(args: DoctorArguments) -> int:
    if args.gpu:
        return _doctor_gpu(args)
    from ..diagnostics import doctor

    report = doctor.examine()
    print(json.dumps(report, indent=2) if args.format == "json" else doctor.render(report))
    return 0 if doctor.healthy(report) else 1


def _doctor_gpu(args: DoctorArguments) -> int:
    from ..diagnostics import gpu_report

    as_json = args.format == "json"
    report = gpu_report.report(progress=note if as_json else lambda line: print(line, flush=True))
    gpu_report.write(report, args.output)
    if as_json:
        print(json.dumps(report, indent=2))
    note(f"wrote {args.output}")
    return 0 if gpu_report.healthy(report) else 1


COMMAND = Command(
    "doctor",
    "say what is installed, which backends run, and check them",
    add_doctor,
    DoctorArguments,
    doctor,
)
