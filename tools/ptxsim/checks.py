"""Shared-memory hazards between barriers.

Every unit of shared memory remembers the barrier interval (epoch) and the warp of its last write
and of its reads. Two accesses by different warps in the same epoch, at least one of them a write,
are a race. Accesses within one warp are taken as ordered. A copy that cp.async has issued but no
wait has completed makes its destination pending: any access to it is a race.
"""

import numpy as np

MANY = -2  # read by more than one warp in this epoch


class SharedChecker:
    """Hazard shadow of the shared memory of one batch of CTAs."""

    def __init__(self, size, unit, findings):
        n = size // unit
        self.unit, self.findings = unit, findings
        self.write_epoch = np.full(n, -1, np.int32)
        self.write_warp = np.full(n, -1, np.int32)
        self.read_epoch = np.full(n, -1, np.int32)
        self.read_warp = np.full(n, -1, np.int32)
        self.pending = np.zeros(n, np.int16)

    def _expand(self, offsets, size, warp, epoch):
        count = max(1, size // self.unit)
        units = offsets // self.unit
        if count > 1:
            units = (units[:, None] + np.arange(count)).reshape(-1)
            warp, epoch = np.repeat(warp, count), np.repeat(epoch, count)
        return units, warp, epoch, count

    def read(self, offsets, size, warp, epoch, text):
        units, warp, epoch, _ = self._expand(offsets, size, warp, epoch)
        raw = (self.write_epoch[units] == epoch) & (self.write_warp[units] != warp)
        if raw.any():
            self.findings["RAW race in shared memory: " + text] += 1
        if self.pending[units].any():
            self.findings["RAW race, read of an unfinished cp.async: " + text] += 1
        many = (self.read_epoch[units] == epoch) & (self.read_warp[units] != warp)
        self.read_epoch[units] = epoch
        self.read_warp[units] = warp
        many |= self.read_warp[units] != warp
        self.read_warp[units[many]] = MANY

    def write(self, offsets, size, warp, epoch, text, changes=None):
        """Record a write.

        ``changes()`` gives per lane whether the value differs from the one in memory; an overwrite
        with the same value is not reported.
        """
        units, warp_u, epoch_u, count = self._expand(offsets, size, warp, epoch)
        waw = (self.write_epoch[units] == epoch_u) & (self.write_warp[units] != warp_u)
        if waw.any():
            lanes = waw.reshape(-1, count).any(1)
            if changes is None or (lanes & changes()).any():
                self.findings["WAW race in shared memory: " + text] += 1
        if self.pending[units].any():
            self.findings["WAW race, write over an unfinished cp.async: " + text] += 1
        self._check_readers(units, warp_u, epoch_u, text)
        self.write_epoch[units] = epoch_u
        self.write_warp[units] = warp_u

    def _check_readers(self, units, warp, epoch, text):
        if ((self.read_epoch[units] == epoch) & (self.read_warp[units] != warp)).any():
            self.findings["WAR race in shared memory: " + text] += 1

    def async_issue(self, offsets, size, warp, epoch, text):
        units, warp, epoch, _ = self._expand(offsets, size, warp, epoch)
        if ((self.write_epoch[units] == epoch) & (self.write_warp[units] != warp)).any():
            self.findings["WAW race in shared memory: " + text] += 1
        if self.pending[units].any():
            self.findings["WAW race, two unfinished cp.async to one address: " + text] += 1
        self._check_readers(units, warp, epoch, text)
        self.pending[units] += 1

    def async_done(self, offsets, size, warp, epoch):
        units, warp, epoch, _ = self._expand(offsets, size, warp, epoch)
        self.pending[units] -= 1
        self.write_epoch[units] = epoch
        self.write_warp[units] = warp

    def finish(self):
        if (self.pending > 0).any():
            self.findings["cp.async not waited for before exit"] += 1


def shared_unit(code):
    """Largest unit (bytes) that every shared or generic access of the kernel covers whole."""
    unit = 16
    for ins in code:
        size = _shared_access_size(ins)
        if size:
            unit = min(unit, size)
    return unit


def _shared_access_size(ins):
    from .types import SIZE

    mods = ins.mods
    if ins.op == "cp" and "async" in mods:
        return int(ins.operands[2], 0) if len(ins.operands) > 2 else None
    if ins.op in ("ld", "ldu", "st", "atom", "red") and not {
        "global",
        "local",
        "param",
        "const",
    } & set(mods):
        lanes = 4 if "v4" in mods else 2 if "v2" in mods else 8 if "v8" in mods else 1
        return SIZE.get(mods[-1], 4) * (lanes if ins.op in ("ld", "ldu", "st") else 1)
    return None
