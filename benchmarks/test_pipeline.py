"""From files to results: the model alone, decoding alone, and both at once with writing.

The same as `python benchmarks/inference.py --suites pipeline`, with the preset's number of
photographs. Every image is counted; `inference.py` also kills runs and compares Ray's actors.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import inference
import photographs
from presets import Preset
from recording import BenchmarkRecorder


def test_files_to_results(
    benchmark: Any, preset: Preset, record: BenchmarkRecorder, tmp_path: Path
) -> None:
    for model in inference.MODELS:
        record.wanted("pipeline", model)
    folder = tmp_path / "photographs"
    photographs.write_folder(folder, preset.photographs, inference.SIZES, 0)
    paths = sorted(folder.rglob("*.jpg"))
    assert len(paths) == preset.photographs
    with warnings.catch_warnings():
        # Pillow warns of the broken ones.
        warnings.filterwarnings("ignore", category=UserWarning, module="PIL")
        benchmark.pedantic(inference.pipeline, args=(paths, record, tmp_path), rounds=1)
