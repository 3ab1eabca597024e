"""The whole GPU suite in one command: measures, and writes tables and charts.

    python benchmarks/gpu.py                  # a look
    python benchmarks/gpu.py --preset full    # every peer and dtype, up to 4096 pixels

Writes gpu.json, gpu.md and the charts into benchmarks/results/GPU, named after the card. All else
is as in `cpu.py`: groups are merged as soon as they are measured, `--resume` goes on.
"""

from __future__ import annotations

import sys

import cpu

if __name__ == "__main__":
    sys.exit(cpu.main("cuda", __doc__ or ""))
