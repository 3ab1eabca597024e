"""The vector machine: strands of lanes, schedulers, barriers, launches.

A *batch* is a set of CTAs that run together. Its threads are grouped into *strands*; all lanes of a
strand execute one instruction as one numpy operation. Divergence inside a strand is handled by
groups of lanes with equal program counter, lowest counter first.

* ``order='lockstep'``: one strand holds every thread of the batch (fastest).
* ``order='warp' | 'reverse' | 'random'``: one strand per warp position. A strand runs until all its
  lanes wait at a barrier or have exited; then another strand runs. A missing barrier then gives
  wrong results, not only a race report. 'random' picks warps by ``seed``, differently in every CTA.
"""

import dataclasses
import time

import numpy as np

from . import ops
from .checks import SharedChecker, shared_unit
from .memory import Device
from .parse import BARRIER, BRANCH, EXIT, TABLE_BRANCH
from .stats import Stats
from .types import DTYPE, UINT, PTXError, RaceError

_END = 1 << 60
ORDERS = ("lockstep", "warp", "reverse", "random")


@dataclasses.dataclass
class Options:
    """Settings of a launch.

    race : check shared-memory hazards.
    init : report reads of uninitialised memory.
    counters : count memory transactions and bank conflicts (instruction counts are always kept).
    order, seed : scheduling, see above.
    strict : raise RaceError when a check fired.
    max_ctas : run only this many CTAs, spread evenly over the grid (the result is then incomplete).
    poison : names (Triton) or positions (CUDA) of pure output arguments: filled with NaN bits
        before the launch, reads before writes are reported, bytes never written are counted in
        ``Stats.unwritten``.
    exact_fma : correctly rounded float32 fma (otherwise through float64, which may round twice).
    batch_lanes : threads simulated at once.
    arena : bytes of device memory.
    max_steps : give up after so many vector instructions in one strand (a spin lock never ends).
    """

    race: bool = True
    init: bool = True
    counters: bool = True
    order: str = "lockstep"
    seed: int = 0
    strict: bool = False
    max_ctas: int | None = None
    poison: tuple = ()
    exact_fma: bool = False
    batch_lanes: int = 16384
    arena: int = 1 << 28
    max_steps: int = 20_000_000

    def replace(self, **changes):
        new = dataclasses.replace(self, **changes)
        if new.order not in ORDERS:
            raise ValueError(f"order must be one of {ORDERS}, not {new.order!r}")
        return new


class Strand:
    """Lanes that execute together, with their registers, local memory and cp.async queue."""

    def __init__(self, batch, cta, thread):
        """Create lanes.

        cta : index of each lane's CTA within the batch.
        thread : linear thread index in the CTA.
        """
        self.batch, self.kernel, self.stats = batch, batch.kernel, batch.stats
        self.device, self.params, self.options = batch.device, batch.params, batch.options
        self.cta, self.thread = cta, thread
        self.lanes = cta.size
        self.index = np.arange(self.lanes)
        self.lane = thread & 31
        self.alive = thread < batch.threads
        self.all_alive = bool(self.alive.all())
        self.alive_mask = None if self.all_alive else self.alive
        self.exited = ~self.alive
        self.warp = (cta * batch.warps + thread // 32).astype(np.int32)
        self.cta_base = cta.astype(np.int64) * batch.shared_stride
        self.regular = batch.lockstep  # lanes are [cta][thread]
        self.special = _special_registers(self)
        zero = {
            w: np.zeros(self.lanes, np.bool_ if w == 1 else UINT[w]) for w in (1, 8, 16, 32, 64)
        }
        self.regs = [zero[w] for w in self.kernel.slot_widths]
        self.local_stride = max(16, (self.kernel.local_size + 15) // 16 * 16)
        self.local = np.zeros(self.lanes * self.local_stride, np.uint8)
        self.async_group = np.zeros(self.lanes, np.int32)
        self.async_copies = []  # (lane index, group, shared offset, data, size)
        self.ready = {0: self.alive.copy()}
        self.waiting = {}  # barrier -> lanes
        self.resume = np.zeros(self.lanes, np.int64)
        self.vote = np.zeros(self.lanes, np.bool_)
        self.pc = 0
        self.steps = 0

    def active(self, mask):
        """Boolean lane array for a mask that may be None."""
        return self.alive if mask is None else mask

    def lanes_of(self, mask):
        """The pair (mask or None, lane indices or None); None means that every lane takes part."""
        if mask is None:
            mask = self.alive_mask
        return mask, None if mask is None else np.flatnonzero(mask)

    def epochs(self, index):
        return self.batch.epoch[self.cta if index is None else self.cta[index]]

    def warps(self, index):
        return self.warp if index is None else self.warp[index]

    def finding(self, text):
        self.stats.races[text] += 1

    def _park(self, pc, mask):
        self.ready[pc] = self.ready[pc] | mask if pc in self.ready else mask

    def wake(self, barrier, ctas):
        """Make the lanes that wait at ``barrier`` in the given CTAs ready again."""
        waiting = self.waiting.get(barrier)
        if waiting is None:
            return
        released = waiting & ctas[self.cta]
        if not released.any():
            return
        self.waiting[barrier] = waiting & ~released
        targets = np.unique(self.resume[released])
        for pc in targets:
            self._park(int(pc), released if targets.size == 1 else released & (self.resume == pc))

    def run(self):
        """Execute until no lane is ready."""
        code, ready = self.kernel.code, self.ready
        warp_count, thread_count = self.stats._warp, self.stats._thread
        end, limit = len(code), self.options.max_steps
        while ready:
            pc = min(ready)
            mask = ready.pop(pc)
            following = min(ready) if ready else _END
            full, lanes, warps = self._census(mask)
            while True:
                if pc == following:  # reconverge with a waiting group
                    mask = mask | ready.pop(pc)
                    following = min(ready) if ready else _END
                    full, lanes, warps = self._census(mask)
                elif pc > following:
                    self._park(pc, mask)
                    break
                if pc >= end:
                    self._exit(mask)
                    break
                ins = code[pc]
                self.pc = pc
                self.steps += 1
                warp_count[pc] += warps
                if ins.pred is None:
                    taken, taken_full = mask, full
                    thread_count[pc] += lanes
                else:
                    p = self.regs[ins.pred]
                    taken = mask & (~p if ins.pred_negated else p)
                    count = int(np.count_nonzero(taken))
                    taken_full = full and count == self.lanes
                    thread_count[pc] += lanes if ins.kind == BRANCH else count
                kind = ins.kind
                if kind == 0:
                    if taken_full:
                        ins.run(self, None)
                    elif ins.pred is None or count:
                        ins.run(self, taken)
                    pc += 1
                elif kind == BRANCH:
                    if self.steps > limit:
                        raise PTXError(
                            f"{self.kernel.name}: more than {limit} steps; endless or spin loop?"
                        )
                    if ins.pred is None or count == lanes:
                        pc = ins.run
                    elif count == 0:
                        pc += 1
                    else:
                        self.stats.counters["divergent_branches"] += 1
                        self._park(ins.run, taken)
                        self._park(pc + 1, mask & ~taken)
                        break
                elif kind == EXIT:
                    self._exit(taken)
                    mask = mask & ~taken
                    if not mask.any():
                        break
                    pc += 1
                    following = min(ready) if ready else _END
                    full, lanes, warps = self._census(mask)
                elif kind == BARRIER:
                    skipped = mask & ~taken if ins.pred is not None else None
                    if skipped is not None and skipped.any():
                        self._park(pc + 1, skipped)
                    if taken.any():
                        self._arrive(ins, taken, pc)
                    break
                elif kind == TABLE_BRANCH:
                    index, targets = ins.run
                    choice = index(self)
                    for i, target in enumerate(targets):
                        group = mask & (choice == i)
                        if group.any():
                            self._park(target, group)
                    break

    def _census(self, mask):
        lanes = int(np.count_nonzero(mask))
        if lanes == self.lanes:
            return True, lanes, lanes // 32
        return False, lanes, int(np.count_nonzero(mask.reshape(-1, 32).any(1)))

    def _exit(self, mask):
        self.exited = self.exited | mask
        self.batch.exited += np.bincount(self.cta[mask], minlength=self.batch.ctas)
        self.batch.release()

    def _arrive(self, ins, mask, pc):
        barrier, threads, predicate = ins.run
        if threads is not None and threads != self.batch.threads:
            raise PTXError(
                f"partial barrier ({threads} of {self.batch.threads} threads): {ins.text}"
            )
        if "arrive" in ins.mods:
            raise PTXError("bar.arrive is not supported: " + ins.text)
        old = self.waiting.get(barrier)
        self.waiting[barrier] = mask if old is None else old | mask
        self.resume[mask] = pc + 1
        if predicate is not None:
            self.vote[mask] = np.broadcast_to(predicate(self), (self.lanes,))[mask]
        self.batch.arrive(barrier, np.bincount(self.cta[mask], minlength=self.batch.ctas), ins)


def _special_registers(strand):
    batch, thread, lane = strand.batch, strand.thread, strand.lane.astype(np.uint64)
    bx, by, _ = batch.block
    values = {
        "%tid.x": thread % bx,
        "%tid.y": thread // bx % by,
        "%tid.z": thread // (bx * by),
        "%laneid": lane,
        "%warpid": thread // 32,
        "%clock": 0,
        "%smid": 0,
        "%nsmid": 1,
        "%gridid": 0,
        "%nwarpid": batch.warps,
        "%clock_hi": 0,
        "%globaltimer_lo": 0,
        "%dynamic_smem_size": batch.dynamic,
        "%total_smem_size": batch.shared_size,
        "%cluster_ctarank": 0,
        "%cluster_nctarank": 1,
    }
    for i, axis in enumerate("xyz"):
        values["%ntid." + axis] = batch.block[i]
        values["%nctaid." + axis] = batch.grid[i]
        values["%ctaid." + axis] = batch.ids[strand.cta, i]
        values["%clusterid." + axis] = values["%ctaid." + axis]
        values["%nclusterid." + axis] = batch.grid[i]
        values["%cluster_ctaid." + axis] = 0
        values["%cluster_nctaid." + axis] = 1
    one = np.uint64(1)
    equal, less = one << lane, (one << lane) - one
    everything = np.uint64(0xFFFFFFFF)
    values.update(
        {
            "%lanemask_eq": equal,
            "%lanemask_lt": less,
            "%lanemask_le": less | equal,
            "%lanemask_ge": everything ^ less,
            "%lanemask_gt": everything ^ (less | equal),
        }
    )
    spread = {
        k: np.ascontiguousarray(np.broadcast_to(np.asarray(v), (strand.lanes,)).astype(np.uint32))
        for k, v in values.items()
        if k in batch.program.specials
    }
    for name in ("%clock64", "%globaltimer"):
        spread[name] = np.zeros(strand.lanes, np.uint64)
    return spread


class Batch:
    """CTAs that run together: shared memory, barriers and the strands."""

    def __init__(self, program, device, ids, grid, block, params, dynamic, stats, options, rng):
        self.program, self.kernel, self.device = program, program.kernel, device
        self.params, self.stats, self.options = params, stats, options
        self.ids = np.array(ids, np.int64).reshape(-1, 3)
        self.ctas, self.grid, self.block, self.dynamic = len(ids), grid, block, dynamic
        self.threads = block[0] * block[1] * block[2]
        self.warps = (self.threads + 31) // 32
        self.lockstep = options.order == "lockstep"
        self.shared_size = (self.kernel.shared_size + dynamic + 15) // 16 * 16
        self.shared_stride = self.shared_size + 16
        self.shared = np.full(self.ctas * self.shared_stride, 0xFF, np.uint8)
        self.shared_init = np.zeros(self.ctas * self.shared_stride, np.bool_)
        self.checker = None
        if options.race and self.shared_size:
            self.checker = SharedChecker(self.shared.size, program.shared_unit, stats.races)
        self.epoch = np.zeros(self.ctas, np.int32)
        self.exited = np.zeros(self.ctas, np.int64)
        self.arrived, self.reductions = {}, {}
        self.rng = rng
        self.strands = self._strands()

    def _strands(self):
        lanes = self.warps * 32
        if self.lockstep:
            return [
                Strand(
                    self,
                    np.repeat(np.arange(self.ctas), lanes),
                    np.tile(np.arange(lanes), self.ctas),
                )
            ]
        warps = np.tile(np.arange(self.warps), (self.ctas, 1))
        if self.options.order == "random":
            warps = self.rng.permuted(warps, axis=1)
        cta = np.repeat(np.arange(self.ctas), 32)
        return [
            Strand(self, cta, (warps[:, i, None] * 32 + np.arange(32)).reshape(-1))
            for i in range(self.warps)
        ]

    def arrive(self, barrier, counts, ins):
        if "red" in ins.mods:
            self.reductions[barrier] = ins
        self.arrived[barrier] = self.arrived.get(barrier, 0) + counts
        self.release()

    def release(self):
        """Open every barrier at which all live threads of a CTA have arrived."""
        for barrier, count in self.arrived.items():
            done = (count > 0) & (count + self.exited >= self.threads)
            if done.any():
                self.epoch = self.epoch + done
                self.arrived[barrier] = np.where(done, 0, count)
                if barrier in self.reductions:
                    self._reduce(barrier, done)
                for strand in self.strands:
                    strand.wake(barrier, done)

    def _reduce(self, barrier, done):
        """Deliver the result of bar.red to the lanes that are about to be released."""
        ins = self.reductions[barrier]
        yes, total = np.zeros(self.ctas, np.int64), np.zeros(self.ctas, np.int64)
        for s in self.strands:
            lanes = s.waiting.get(barrier, np.zeros(s.lanes, bool))
            yes += np.bincount(s.cta[lanes & s.vote], minlength=self.ctas)
            total += np.bincount(s.cta[lanes], minlength=self.ctas)
        result = yes if "popc" in ins.mods else (yes > 0) if "or" in ins.mods else yes == total
        for s in self.strands:
            if barrier in s.waiting:
                ops.barrier_result(s, ins, result[s.cta], s.waiting[barrier] & done[s.cta])

    def run(self):
        order = self.options.order
        while True:
            live = [s for s in self.strands if s.ready]
            if not live:
                break
            pick = (
                self.rng.integers(len(live))
                if order == "random"
                else -1
                if order == "reverse"
                else 0
            )
            live[pick].run()
        if any(w.any() for s in self.strands for w in s.waiting.values()):
            where = sorted(
                {
                    self.kernel.code[int(p) - 1].text
                    for s in self.strands
                    for w in s.waiting.values()
                    for p in np.unique(s.resume[w])
                }
            )
            raise PTXError(
                f"{self.kernel.name}: deadlock, some threads wait at {where} and the others "
                "never arrive"
            )
        if any((s.exited | ~s.alive).sum() != s.lanes for s in self.strands):
            raise PTXError("internal error: lanes lost by the scheduler")
        if self.checker is not None:
            self.checker.finish()


class Program:
    """A kernel compiled to closures; reusable for any number of launches."""

    def __init__(self, kernel):
        self.kernel = kernel
        self.globals = None
        self.specials = set()
        self.pointers = {}
        ops.compile_kernel(self)
        self.shared_unit = shared_unit(kernel.code)


def pack_params(kernel, args):
    """Raw bytes of every kernel parameter."""
    if len(args) > len(kernel.params):
        raise PTXError(f"{kernel.name} takes {len(kernel.params)} parameters, {len(args)} given")
    out = {}
    for (name, kind, size), value in zip(kernel.params, args, strict=False):
        if isinstance(value, (bytes, bytearray)):
            if len(value) != size:
                raise PTXError(
                    f"parameter {name} of {kernel.name} has {size} bytes, {len(value)} given"
                )
            out[name] = bytes(value)
        elif kind in ("f16", "f32", "f64"):
            out[name] = np.array([value], DTYPE[kind]).tobytes()
        elif isinstance(value, float):
            out[name] = np.array(
                [value], {2: np.float16, 4: np.float32, 8: np.float64}[size]
            ).tobytes()
        else:
            out[name] = (int(value) & ((1 << (8 * size)) - 1)).to_bytes(size, "little")
    for name, _, size in kernel.params[len(args) :]:
        out[name] = bytes(size)  # Triton's scratch pointers
    return out


def _triple(x):
    x = (x,) if isinstance(x, int) else tuple(int(v) for v in x)
    return x + (1,) * (3 - len(x))


def launch(program, device, grid, block, args, dynamic_smem=0, options=None):
    """Run a kernel on a `Device` and return Stats; ``args`` are addresses, numbers or raw bytes."""
    options = (options or Options()).replace()
    kernel = program.kernel
    grid, block = _triple(grid), _triple(block)
    threads = block[0] * block[1] * block[2]
    if not 0 < threads <= 1024 or min(grid) < 0:
        raise PTXError(f"invalid launch of {kernel.name}: grid {grid}, block {block}")
    if kernel.max_threads and threads > kernel.max_threads:
        raise PTXError(
            f"{kernel.name} allows {kernel.max_threads} threads per CTA, {threads} launched"
        )
    total = grid[0] * grid[1] * grid[2]
    linear = np.arange(total)
    if options.max_ctas is not None and options.max_ctas < total:
        linear = np.unique(np.linspace(0, total - 1, options.max_ctas).astype(np.int64))
    rng = np.random.default_rng(options.seed)
    if options.order == "reverse":
        linear = linear[::-1]
    elif options.order == "random":
        linear = rng.permutation(linear)
    ids = np.stack(
        [linear % grid[0], linear // grid[0] % grid[1], linear // (grid[0] * grid[1])], 1
    )
    program.pointers = {k: device.put(v) for k, v in kernel.globals.items()}
    stats = Stats(
        kernel,
        grid,
        block,
        total,
        len(ids),
        device.top,
        kernel.shared_size + dynamic_smem,
        options.counters,
    )
    params = pack_params(kernel, args)
    per_cta = (threads + 31) // 32 * 32
    lanes = options.batch_lanes * (1 if options.order == "lockstep" else 2)
    lanes = min(lanes, (256 << 20) // max(1, kernel.register_bytes + kernel.local_size))
    ctas = max(1, lanes // per_cta)
    ctas = max(1, min(ctas, (256 << 20) // max(1, kernel.shared_size + dynamic_smem)))
    start = time.perf_counter()
    with np.errstate(all="ignore"):
        for i in range(0, len(ids), ctas):
            Batch(
                program,
                device,
                ids[i : i + ctas],
                grid,
                block,
                params,
                dynamic_smem,
                stats,
                options,
                rng,
            ).run()
    stats.seconds = time.perf_counter() - start
    stats.finish()
    raise_if_strict(stats, options)
    return stats


def raise_if_strict(stats, options):
    """Raise RaceError in strict mode when a check fired or a poisoned output was left unwritten."""
    problems = list(stats.races)
    if stats.ctas == stats.ctas_total:
        problems += [
            f"{n} bytes of output {k} never written" for k, n in stats.unwritten.items() if n
        ]
    if options.strict and problems:
        raise RaceError(f"{stats.kernel}: " + "; ".join(problems))


def compile_kernel(module, name):
    """The `Program` of a kernel of a parsed module, compiled once per module."""
    kernel = module[name]
    if kernel.program is None:
        kernel.program = Program(kernel)
    return kernel.program


__all__ = [
    "ORDERS",
    "Device",
    "Options",
    "Program",
    "compile_kernel",
    "launch",
    "pack_params",
    "raise_if_strict",
]
