"""Errors of whole models against float64, with and without Strassen's algorithm.

Each runs in a process of its own, with ``CONVMIXER_FAST_STRASSEN`` set as a user would set it.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import fresh_python
from presets import BATCH
from recording import BenchmarkRecorder
from report import PRODUCTS

#: Where the script finds the benchmarks' modules.
PATH = os.pathsep.join(
    filter(None, (str(Path(__file__).resolve().parent), os.environ.get("PYTHONPATH")))
)
SCRIPT = """
import dataclasses, hashlib, json, os, sys
strassen, variant, batch = sys.argv[1], sys.argv[2], int(sys.argv[3])
os.environ.pop("CONVMIXER_FAST_STRASSEN", None)
if strassen:
    os.environ["CONVMIXER_FAST_STRASSEN"] = strassen
import torch
from cases import case, oracle
from convmixer_fast.testing import error_report

model = case(variant)
x = model.images(batch)
with torch.no_grad():
    out = model.ours(x)
    report = error_report(out, model.plain(x), oracle(variant, batch))
digest = hashlib.blake2b(out.numpy().tobytes(), digest_size=8).hexdigest()
print(json.dumps({**dataclasses.asdict(report), "ok": report.ok, "digest": digest}))
"""


def test_error_of_whole_models(variant: str, benchmark: Any, record: BenchmarkRecorder) -> None:
    record.wanted("numerics", variant)

    def errors(strassen: str) -> dict[str, Any]:
        arguments = ("-c", SCRIPT, strassen, variant, str(BATCH))
        result = fresh_python.run(*arguments, env={"PYTHONPATH": PATH}, timeout=1800)
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout)

    found = benchmark.pedantic(lambda: {s: errors(s) for s in PRODUCTS}, rounds=1)
    place = {"model": variant, "batch": BATCH}
    rows = []
    for strassen, report in found.items():
        row = {**place, "system": f"ours, {PRODUCTS[strassen]}"}
        for kind in ("max", "rms"):
            error, torch_error = report[f"{kind}_error"], report[f"torch_{kind}_error"]
            row |= {f"{kind} error": error, f"{kind} / eager's": error / torch_error}
        row["within rule"] = report["ok"]
        same = [
            PRODUCTS[s]
            for s in found
            if s and s != strassen and found[s]["digest"] == report["digest"]
        ]
        if same:
            row["note"] = f"the same bits as with {' and '.join(same)}"
        rows.append(row)
    eager = {f"{kind} error": found["0"][f"torch_{kind}_error"] for kind in ("max", "rms")}
    record("numerics", variant, [*rows, {**place, "system": "eager NCHW", **eager}])
