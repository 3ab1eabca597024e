"""Lower bounds of a launch's time on named GPUs, from the counters of a simulated launch.

Every bound is work divided by a peak rate; the launch cannot be faster than the largest one.
Nothing here is a measurement: latency, occupancy, launch overhead, clock behaviour, cache misses
beyond the footprint, wave quantisation and everything the hardware cannot overlap are left out. A
real kernel is slower.

Bounds
------
fp32      float32 add/mul/fma thread operations / (lanes per clock and SM); of the add and mul
          without a rounding modifier only the more frequent kind, because the assembler may fuse
          pairs of them
half2     packed f16x2/bf16x2 and scalar f16/bf16 arithmetic
fp64      float64 arithmetic
special   ex2, lg2, rcp, rsqrt, sqrt, sin, cos, tanh (16 per clock and SM)
tensor    mma flops by operand type
shared    shared-memory wavefronts and global requests through the 128 B/clock/SM data path of L1
          (cp.async counts once, as a global request)
l2        32-byte sectors requested from global memory / L2 bandwidth (as if L1 never hit)
dram      distinct sectors touched / DRAM bandwidth (as if every sector moved exactly once, caches
          cold)
issue     warp instructions that reach the pipes (arithmetic, memory, mma, shuffle, barrier) / issue
          slots

Caches can break two of them. Hits in L1 do not reach L2: 'l2' is reported but not used for the
bound unless ``l1_hits=False``. Data that is still in L2 from the kernel before does not come from
DRAM: ``cold=False`` leaves 'dram' out (compare the footprint with ``GPU.l2_mib``). Counts are of
PTX: the assembler may merge or drop instructions that are not in the list above, which is why
moves, integer and address arithmetic do not count as issue slots.
"""

import dataclasses

WARP = 32


@dataclasses.dataclass(frozen=True)
class GPU:
    """Peak rates. Lanes per clock and SM unless the name says otherwise."""

    name: str
    sms: int
    ghz: float  # boost clock
    fp32: int  # float32 FMA
    half2: int  # packed half FMA instructions (two FMA each)
    fp64: int
    tensor_tflops: dict  # dense, float32 accumulation
    l2_bytes_per_clock: int
    dram_gbs: float
    l2_mib: float
    issue: int = 4  # warp instructions
    special: int = 16
    l1_bytes: int = 128


# Vendor figures (architecture white papers and data sheets). L2 bandwidth is published for A100
# only (5120 B/clock); for the others it is the SM-side ceiling of 64 B/clock/SM, which keeps the
# bound a bound.
GPUS = {
    g.name: g
    for g in (
        GPU(
            "A100",
            108,
            1.410,
            64,
            128,
            32,
            {"f16": 312e12, "bf16": 312e12, "tf32": 156e12, "int8": 624e12},
            5120,
            2039,
            40,
        ),
        GPU(
            "RTX 3090",
            82,
            1.695,
            128,
            64,
            2,
            {"f16": 71e12, "bf16": 71e12, "tf32": 35.6e12, "int8": 284e12},
            82 * 64,
            936,
            6,
        ),
        GPU(
            "RTX 4090",
            128,
            2.520,
            128,
            64,
            2,
            {"f16": 165.2e12, "bf16": 165.2e12, "tf32": 82.6e12, "int8": 660.6e12},
            128 * 64,
            1008,
            72,
        ),
        GPU(
            "H100",
            132,
            1.980,
            128,
            128,
            64,
            {"f16": 989.4e12, "bf16": 989.4e12, "tf32": 494.7e12, "int8": 1978.9e12},
            132 * 64,
            3350,
            50,
        ),
    )
}

_ARITHMETIC = ("add", "sub", "mul", "mad", "fma")
_SPECIAL = ("ex2", "lg2", "rcp", "rsqrt", "sqrt", "sin", "cos", "tanh")
_ISSUED = (
    "ld",
    "st",
    "atom",
    "red",
    "mma",
    "ldmatrix",
    "stmatrix",
    "shfl",
    "bar",
    "barrier",
    "vote",
    "redux",
)


@dataclasses.dataclass
class Bound:
    """Lower bounds in seconds for the whole grid.

    ``limit`` names the largest, ``seconds`` is its value.
    """

    gpu: str
    times: dict
    limit: str
    seconds: float
    scale: float  # grid CTAs / simulated CTAs
    flops: float  # float32, half and tensor operations of the whole grid (FMA = 2)

    @property
    def fractions(self):
        """Each bound relative to the largest: how close the other resources come to limiting."""
        return {k: v / self.seconds for k, v in self.times.items()} if self.seconds else {}

    def fraction_of(self, measured_seconds):
        """Fraction of the bound that a measured time reaches (1.0 = at the bound)."""
        return self.seconds / measured_seconds

    def __str__(self):
        rows = " ".join(
            f"{k} {v * 1e6:.2f}" for k, v in sorted(self.times.items(), key=lambda x: -x[1]) if v
        )
        return (
            f"{self.gpu}: at least {self.seconds * 1e6:.2f} us, limited by {self.limit} "
            f"(us: {rows}; a bound)"
        )


def _float_kind(opcode):
    """Register format of a floating-point arithmetic opcode, else None."""
    kinds = [
        m
        for m in opcode.split(".")[1:]
        if m in ("f16", "bf16", "f16x2", "bf16x2", "f32", "f32x2", "f64")
    ]
    return kinds[0] if kinds else None


def work(stats):
    """Unscaled work of the simulated CTAs, by resource."""
    w = {"fp32": 0, "half2": 0, "fp64": 0, "special": 0, "issued": 0, "flops": 0}
    fusible = {"add": 0, "mul": 0}
    for opcode, warps in stats.warp.items():
        base = opcode.split(".")[0]
        lanes = warps * WARP  # a predicated-off lane costs its slot all the same
        kind = _float_kind(opcode) if base in _ARITHMETIC else None
        if (
            kind == "f32"
            and base in ("add", "sub", "mul")
            and not {"rn", "rz", "rm", "rp"} & set(opcode.split("."))
        ):
            fusible["mul" if base == "mul" else "add"] += warps
            w["flops"] += stats.thread[opcode]
            continue
        if kind:
            slot = {"f64": "fp64", "f32": "fp32", "f32x2": "fp32"}.get(kind, "half2")
            wide = 2 if "x2" in kind else 1
            w[slot] += lanes * (2 if kind == "f32x2" else 1)
            w["flops"] += stats.thread[opcode] * wide * (2 if base in ("fma", "mad") else 1)
        elif base in _SPECIAL:
            w["special"] += lanes
        if kind or base in _SPECIAL or base in _ISSUED or opcode.startswith("cp.async.c"):
            w["issued"] += warps
    w["fp32"] += max(fusible.values()) * WARP
    w["issued"] += max(fusible.values())
    c = stats.counters
    w["flops"] += c["mma_flops"]
    w["tensor"] = {k[10:]: v for k, v in c.items() if k.startswith("mma_flops_")}
    w["l2_sectors"] = c["global_ld_sectors"] + c["global_st_sectors"] + c["global_atom_sectors"]
    w["dram_sectors"] = c["footprint_ld_sectors"] + c["footprint_st_sectors"]
    shared = sum(
        v
        for k, v in c.items()
        if k.startswith("shared_") and k.endswith("_wavefronts") and "cpasync" not in k
    )
    requests = sum(v for k, v in c.items() if k.startswith("global_") and k.endswith("_requests"))
    w["l1_wavefronts"] = shared + max(requests, w["l2_sectors"] / 4)
    return w


def bound(stats, gpu, scale=None, l1_hits=True, cold=True):
    """Lower bound of the time of the launch described by ``stats`` on a GPU of `GPUS`.

    When only a sample of CTAs was run, all work is multiplied by grid CTAs / simulated CTAs (or
    ``scale``). The footprint scales the same way, which overstates shared data (weights, halos):
    'dram' is then an estimate. Needs counters=True.
    """
    g = GPUS[gpu] if isinstance(gpu, str) else gpu
    if not stats.enabled:
        raise ValueError("the launch was run with counters=False")
    scale = stats.ctas_total / max(1, stats.ctas) if scale is None else scale
    w = work(stats)
    clock = g.ghz * 1e9 * g.sms
    times = {
        "fp32": w["fp32"] / (g.fp32 * clock),
        "half2": w["half2"] / (g.half2 * clock),
        "fp64": w["fp64"] / (g.fp64 * clock),
        "special": w["special"] / (g.special * clock),
        "issue": w["issued"] / (g.issue * clock),
        "tensor": sum(v / g.tensor_tflops[k] for k, v in w["tensor"].items()),
        "shared": w["l1_wavefronts"] * 128 / (g.l1_bytes * clock),
        "l2": w["l2_sectors"] * 32 / (g.l2_bytes_per_clock * g.ghz * 1e9),
        "dram": w["dram_sectors"] * 32 / (g.dram_gbs * 1e9),
    }
    times = {k: v * scale for k, v in times.items()}
    usable = {
        k: v
        for k, v in times.items()
        if not ((k == "l2" and l1_hits) or (k == "dram" and not cold))
    }
    limit = max(usable, key=usable.get)
    return Bound(g.name, times, limit, usable[limit], scale, w["flops"] * scale)


def table(stats, gpus=None):
    """Bounds on several GPUs as text."""
    return "\n".join(str(bound(stats, g)) for g in (gpus or GPUS))
