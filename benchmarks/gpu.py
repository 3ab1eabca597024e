"""Run the whole GPU suite: measure, and write tables and charts.

    python benchmarks/gpu.py                  # minutes
    python benchmarks/gpu.py --preset full    # every peer and dtype, up to 4096 pixels

Writes gpu.json, gpu.md and the charts into benchmarks/results/GPU, named after the card.
Everything else is as in `cpu.py`: groups are merged as soon as they are measured, and `--resume`
continues.
"""

from __future__ import annotations

import sys

import cpu

if __name__ == "__main__":
    sys.exit(cpu.main("cuda", __doc__ or ""))
