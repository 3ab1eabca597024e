"""Counters of one launch: instructions, memory transactions, bank conflicts, findings."""

import collections

import numpy as np

from .types import GLOBAL_BASE

SECTOR = 32  # bytes of a global-memory sector
BANKS = 32  # shared-memory banks of four bytes


def distinct_per_warp(keys, mask):
    """Sum over warps of the number of distinct keys among the active lanes."""
    rows = keys.reshape(-1, 32)
    if mask is None:
        step = rows[:, 1:] - rows[:, :-1]
        if (step >= 0).all():
            return int(np.count_nonzero(step)) + rows.shape[0]
        rows = np.sort(rows, 1)
        return int(np.count_nonzero(rows[:, 1:] != rows[:, :-1])) + rows.shape[0]
    active = mask.reshape(-1, 32)
    some = active.any(1)
    if not some.all():
        rows, active = rows[some], active[some]
    if not rows.shape[0]:
        return 0
    rows = np.sort(np.where(active, rows, -1), 1)
    distinct = (rows[:, 1:] != rows[:, :-1]).sum(1) + 1 - (rows[:, 0] == -1)
    return int(distinct.sum())


def wavefronts(addresses, mask, size):
    """The pair (wavefronts, ideal) of a shared-memory access of ``size`` bytes per lane.

    An access of 4 bytes or less is processed for 32 lanes at once, 8 bytes in two halves, 16 bytes
    in four quarters; a phase costs as many wavefronts as the busiest bank has distinct words.
    """
    lanes = 32 if size <= 4 else 16 if size == 8 else 8
    words = max(1, size // 4)
    rows = addresses.reshape(-1, lanes)
    word = (rows[:, :, None] >> 2) + np.arange(words)
    if mask is not None:
        active = mask.reshape(-1, lanes)
        word = np.where(active[:, :, None], word, -1)
        word = word.reshape(rows.shape[0], -1)[active.any(1)]
    else:
        word = word.reshape(rows.shape[0], -1)
    if word.shape[0] == 0:
        return 0, 0
    word = np.sort(word, 1)
    first = np.ones(word.shape, bool)
    first[:, 1:] = word[:, 1:] != word[:, :-1]
    first &= word >= 0
    key = np.arange(word.shape[0])[:, None] * BANKS + (word & (BANKS - 1))
    busiest = np.bincount(key[first], minlength=word.shape[0] * BANKS).reshape(-1, BANKS).max(1)
    return int(busiest.sum()), int(busiest.size)


class Stats:
    """Counters and findings of one launch.

    Attributes
    ----------
    kernel, grid, block : launch configuration; ``ctas`` of ``ctas_total`` CTAs were run.
    warp, thread : Counter opcode -> executions by warps / by threads with a true predicate.
    counters : Counter; see README for the keys.
    races : Counter finding -> occurrences. Empty means that no check fired.
    unwritten : bytes of each poisoned argument that the kernel never wrote.
    """

    def __init__(self, kernel, grid, block, ctas_total, ctas, arena, shared_bytes, enabled=True):
        self.kernel, self.grid, self.block = kernel.name, grid, block
        self.ctas_total, self.ctas = ctas_total, ctas
        self.shared_bytes = shared_bytes
        self.counters = collections.Counter()
        self.races = collections.Counter()
        self.unwritten = {}
        self.seconds = 0.0
        self.enabled = enabled
        self._code = kernel.code
        self._warp = [0] * len(kernel.code)
        self._thread = [0] * len(kernel.code)
        self._memory = {}  # pc -> [requests, sectors or wavefronts, ideal or bytes]
        self._touched = {k: np.zeros(arena // SECTOR + 1, bool) for k in ("ld", "st")}
        self.warp, self.thread = collections.Counter(), collections.Counter()

    def global_access(self, pc, kind, addresses, mask, size):
        """Count one global access; ``mask`` None means that all lanes take part."""
        sectors = distinct_per_warp(addresses >> 5, mask)
        if mask is None:
            requests, lanes, offsets = addresses.size // 32, addresses.size, addresses - GLOBAL_BASE
        else:
            requests, lanes = int(mask.reshape(-1, 32).any(1).sum()), int(np.count_nonzero(mask))
            offsets = addresses[mask] - GLOBAL_BASE
        c = self.counters
        c[f"global_{kind}_requests"] += requests
        c[f"global_{kind}_sectors"] += sectors
        c[f"global_{kind}_bytes"] += lanes * size
        row = self._memory.setdefault(pc, [0, 0, 0])
        row[0] += requests
        row[1] += sectors
        row[2] += lanes * size
        self._touched["ld" if kind == "ld" else "st"][offsets >> 5] = True

    def shared_access(self, pc, kind, addresses, mask, size, ctas):
        """Count one shared access. Equal address patterns in all CTAs are evaluated only once."""
        if ctas > 1 and mask is None:
            rows = addresses.reshape(ctas, -1)
            if (rows == rows[0]).all():
                took, ideal = wavefronts(rows[0], None, size)
                took, ideal = took * ctas, ideal * ctas
            else:
                took, ideal = wavefronts(addresses, None, size)
        else:
            took, ideal = wavefronts(addresses, mask, size)
        self.counters[f"shared_{kind}_wavefronts"] += took
        self.counters[f"shared_{kind}_ideal"] += ideal
        row = self._memory.setdefault(pc, [0, 0, 0])
        row[0] += ideal
        row[1] += took
        row[2] += ideal

    def finish(self):
        for ins, w, t in zip(self._code, self._warp, self._thread, strict=False):
            if w:
                self.warp[ins.opcode] += w
                self.thread[ins.opcode] += t
        for kind, touched in self._touched.items():
            self.counters[f"footprint_{kind}_sectors"] = int(np.count_nonzero(touched))
        both = self._touched["ld"] | self._touched["st"]
        self.counters["footprint_sectors"] = int(np.count_nonzero(both))
        del self._touched

    @property
    def warp_instructions(self):
        return sum(self.warp.values())

    @property
    def thread_instructions(self):
        return sum(self.thread.values())

    @property
    def ok(self):
        """True when no check reported anything."""
        return not self.races

    def by_op(self):
        """Warp instructions grouped by base opcode, most frequent first."""
        out = collections.Counter()
        for opcode, n in self.warp.items():
            out[opcode.split(".")[0]] += n
        return dict(out.most_common())

    def matching(self, *prefixes):
        """Warp instructions of all opcodes that start with one of the prefixes."""
        return sum(n for opcode, n in self.warp.items() if opcode.startswith(prefixes))

    def bank_conflicts(self):
        """{kind: (wavefronts, ideal)} for every kind of shared access that occurred."""
        kinds = {k.split("_")[1] for k in self.counters if k.startswith("shared_")}
        return {
            k: (self.counters[f"shared_{k}_wavefronts"], self.counters[f"shared_{k}_ideal"])
            for k in kinds
        }

    def sectors_per_request(self, kind="ld"):
        requests = self.counters[f"global_{kind}_requests"]
        return self.counters[f"global_{kind}_sectors"] / requests if requests else 0.0

    def reread(self):
        """Loaded sectors divided by the distinct sectors loaded: the reuse asked of the caches."""
        footprint = self.counters["footprint_ld_sectors"]
        return self.counters["global_ld_sectors"] / footprint if footprint else 0.0

    def hot(self, n=10, key="warp"):
        """The n instructions with most warp executions, or with ``key='memory'`` most traffic."""
        rows = []
        for pc, ins in enumerate(self._code):
            if self._warp[pc]:
                requests, units, _ = self._memory.get(pc, (0, 0, 0))
                rows.append(
                    {
                        "pc": pc,
                        "warp": self._warp[pc],
                        "thread": self._thread[pc],
                        "requests": requests,
                        "units": units,
                        "text": ins.text,
                    }
                )
        return sorted(rows, key=lambda r: -r["warp" if key == "warp" else "units"])[:n]

    def as_dict(self):
        return dict(
            kernel=self.kernel,
            grid=self.grid,
            block=self.block,
            ctas=self.ctas,
            ctas_total=self.ctas_total,
            shared_bytes=self.shared_bytes,
            seconds=self.seconds,
            warp_instructions=self.warp_instructions,
            thread_instructions=self.thread_instructions,
            by_op=self.by_op(),
            races=dict(self.races),
            unwritten=dict(self.unwritten),
            **self.counters,
        )

    def __str__(self):
        lines = [
            f"{self.kernel} grid={self.grid} block={self.block} ctas={self.ctas}/{self.ctas_total} "
            f"shared={self.shared_bytes} B",
            f"  warp instructions {self.warp_instructions:,}  thread {self.thread_instructions:,}",
        ]
        lines += ["  " + "  ".join(f"{k} {v:,}" for k, v in list(self.by_op().items())[:12])]
        lines += [f"  {k} = {v:,}" for k, v in sorted(self.counters.items())]
        lines += [f"  unwritten bytes of {k}: {v}" for k, v in self.unwritten.items()]
        lines += [f"  FINDING {k} (x{v})" for k, v in self.races.items()]
        return "\n".join(lines)
