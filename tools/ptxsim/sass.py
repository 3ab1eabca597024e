"""Static facts about compiled kernels, from a cubin, with the disassembler that Triton ships.

``analyse(cubin)`` gives one `KernelReport` per kernel; ``aot(fn, ...)`` compiles a @triton.jit
function for an architecture without a driver and analyses it.
"""

import collections
import dataclasses
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

ARCHITECTURES = (75, 80, 86, 87, 89, 90, 100, 103, 120, 121)
_FMA = {"FFMA", "FFMA2", "FHFMA"}  # FFMA2 (sm_100) does two; FHFMA multiplies halves into float32
_FP32 = _FMA | {"FADD", "FADD2", "FMUL", "FMUL2", "FHADD"}
_HALF2 = {"HFMA2", "HADD2", "HMUL2", "HMNMX2"}
_MATRIX = {
    "HMMA",
    "IMMA",
    "QMMA",
    "OMMA",
    "DMMA",
    "HGMMA",
    "IGMMA",
    "QGMMA",
    "UTCHMMA",
    "UTCIMMA",
    "UTCQMMA",
}
_INTEGER = {
    "IMAD",
    "IADD",
    "IADD3",
    "LEA",
    "LOP3",
    "SHF",
    "ISETP",
    "IMNMX",
    "VIADD",
    "SEL",
    "PRMT",
    "IABS",
    "SGXT",
}
_SPECIAL = {"MUFU"}
_MEMORY = {
    "LDG",
    "STG",
    "LDS",
    "STS",
    "LDL",
    "STL",
    "LDSM",
    "STSM",
    "LDGSTS",
    "LD",
    "ST",
    "RED",
    "ATOMG",
    "ATOMS",
    "UTMALDG",
    "UTMASTG",
    "LDTM",
    "STTM",
}


def tool(name):
    """Path of cuobjdump / nvdisasm: Triton's own copy, else PATH; None when absent."""
    try:
        from triton.backends import nvidia

        path = Path(nvidia.__file__).parent / "bin" / name
        if path.exists():
            return str(path)
    except ImportError:
        pass
    return shutil.which(name)


@dataclasses.dataclass
class Sass:
    """One machine instruction."""

    address: int
    predicate: str
    opcode: str  # with modifiers, e.g. LDG.E.128.CONSTANT
    operands: str

    @property
    def base(self):
        return self.opcode.split(".")[0]

    @property
    def width(self):
        """Bits per lane of a load or store, from the opcode's modifiers."""
        parts = self.opcode.split(".")
        for size in ("256", "128", "64"):
            if size in parts:
                return int(size)
        return 8 if {"U8", "S8"} & set(parts) else 16 if {"U16", "S16"} & set(parts) else 32


@dataclasses.dataclass
class Loop:
    """Instructions between a backward branch and its target."""

    start: int
    end: int
    instructions: list
    innermost: bool = True

    @property
    def histogram(self):
        return collections.Counter(i.base for i in self.instructions)

    @property
    def size(self):
        return len(self.instructions)

    def share(self, *bases):
        """Fraction of the loop's instructions with one of these base opcodes."""
        return sum(i.base in bases for i in self.instructions) / max(1, len(self.instructions))

    def mix(self):
        """Fractions of instruction classes; 'fp32_fma' bounds the share of the FP32 peak."""
        n = max(1, len(self.instructions))
        classes = {
            "fp32_fma": _FMA,
            "fp32": _FP32,
            "half2": _HALF2,
            "matrix": _MATRIX,
            "integer": _INTEGER,
            "special": _SPECIAL,
            "memory": _MEMORY,
        }
        return {k: sum(i.base in v for i in self.instructions) / n for k, v in classes.items()}

    def __str__(self):
        top = " ".join(f"{k}:{v}" for k, v in self.histogram.most_common(9))
        shares = " ".join(f"{k} {v:.0%}" for k, v in self.mix().items() if v)
        return f"loop {self.start:#x}-{self.end:#x} {self.size} instructions [{shares}] {top}"


@dataclasses.dataclass
class KernelReport:
    """Static facts of one kernel.

    Registers and stack are per thread, shared is the static part in bytes, ``sass`` is in program
    order. ``spill_loads``/``spill_stores`` are LDL/STL instructions; local arrays indexed at run
    time count too.
    """

    name: str
    arch: int
    registers: int
    stack: int
    shared: int
    local: int
    sass: list

    @property
    def histogram(self):
        return collections.Counter(i.base for i in self.sass)

    @property
    def spill_loads(self):
        return self.histogram["LDL"]

    @property
    def spill_stores(self):
        return self.histogram["STL"]

    @property
    def spills(self):
        return self.spill_loads + self.spill_stores

    def has(self, *prefixes):
        """True when some opcode starts with one of the prefixes, e.g. has('HMMA.16816.F32')."""
        return any(i.opcode.startswith(prefixes) for i in self.sass)

    def count(self, *prefixes):
        return sum(i.opcode.startswith(prefixes) for i in self.sass)

    def widths(self, base, instructions=None):
        """Counter bits -> number of instructions, e.g. widths('LDG')."""
        return collections.Counter(i.width for i in (instructions or self.sass) if i.base == base)

    @property
    def features(self):
        """Which of the matrix and copy instruction families occur."""
        names = (
            "HMMA",
            "IMMA",
            "QMMA",
            "HGMMA",
            "QGMMA",
            "UTCHMMA",
            "LDSM",
            "STSM",
            "LDGSTS",
            "UTMALDG",
            "UTMASTG",
            "MUFU",
            "CALL",
            "BAR",
        )
        present = self.histogram
        return {n: present[n] for n in names if present[n]}

    @property
    def loops(self):
        """Loops found from backward branches, in address order."""
        out = []
        for position, i in enumerate(self.sass):
            m = re.search(r"0x([0-9a-f]+)\s*$", i.operands) if i.base == "BRA" else None
            if m and int(m.group(1), 16) < i.address:
                start = int(m.group(1), 16)
                body = [j for j in self.sass[: position + 1] if j.address >= start]
                out.append(Loop(start, i.address, body))
        for a in out:
            a.innermost = not any(b is not a and a.start <= b.start and b.end <= a.end for b in out)
        return sorted(out, key=lambda loop: loop.start)

    @property
    def hot_loop(self):
        """The innermost loop with most arithmetic (FMA, half2, matrix); None without loops."""
        inner = [x for x in self.loops if x.innermost]
        work = _FP32 | _HALF2 | _MATRIX
        return max(
            inner, key=lambda x: (sum(i.base in work for i in x.instructions), x.size), default=None
        )

    def as_dict(self):
        hot = self.hot_loop
        return {
            "name": self.name,
            "arch": self.arch,
            "registers": self.registers,
            "stack": self.stack,
            "shared": self.shared,
            "spill_loads": self.spill_loads,
            "spill_stores": self.spill_stores,
            "instructions": len(self.sass),
            "histogram": dict(self.histogram.most_common()),
            "features": self.features,
            "load_widths": dict(self.widths("LDG")),
            "store_widths": dict(self.widths("STG")),
            "loops": len(self.loops),
            "hot_loop": None
            if hot is None
            else {
                "start": hot.start,
                "end": hot.end,
                "size": hot.size,
                "mix": hot.mix(),
                "histogram": dict(hot.histogram.most_common()),
            },
        }

    def __str__(self):
        lines = [
            f"{self.name} sm_{self.arch}: {self.registers} registers, stack {self.stack}, "
            f"static shared "
            f"{self.shared}, spills {self.spill_loads} LDL / {self.spill_stores} STL, "
            f"{len(self.sass)} instructions",
            "  " + " ".join(f"{k}:{v}" for k, v in self.histogram.most_common(14)),
            "  features " + (" ".join(f"{k}:{v}" for k, v in self.features.items()) or "none"),
        ]
        for base in ("LDG", "STG", "LDGSTS"):
            if self.histogram[base]:
                lines.append(
                    f"  {base} bits "
                    + " ".join(f"{k}:{v}" for k, v in sorted(self.widths(base).items()))
                )
        hot = self.hot_loop
        lines += [
            f"  {'hot ' if x.start == hot.start and x.end == hot.end else ''}{x}"
            for x in self.loops
            if x.innermost
        ]
        return "\n".join(lines)


def disassemble(cubin):
    """The texts of cuobjdump -sass and -res-usage for a cubin given as path or bytes."""
    program = tool("cuobjdump")
    if program is None:
        raise RuntimeError("cuobjdump not found: install triton or put the CUDA toolkit on PATH")
    env = dict(os.environ)
    env["PATH"] = os.path.dirname(program) + os.pathsep + env.get("PATH", "")
    with tempfile.TemporaryDirectory(prefix="ptxsim") as work:
        path = Path(work, "kernel.cubin")
        path.write_bytes(
            cubin if isinstance(cubin, (bytes, bytearray)) else Path(cubin).read_bytes()
        )
        texts = []
        for flag in ("-sass", "-res-usage"):
            result = subprocess.run(
                [program, flag, str(path)], capture_output=True, text=True, env=env
            )
            if result.returncode:
                raise RuntimeError(f"cuobjdump {flag} failed: {result.stderr or result.stdout}")
            texts.append(result.stdout)
    return tuple(texts)


_LINE = re.compile(
    r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:\{\s*)?(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?)\s*(?:&.*)?;", re.M
)


def analyse(cubin):
    """List of `KernelReport` for a cubin given as path or bytes."""
    sass, usage = disassemble(cubin)
    resources = {}
    for m in re.finditer(
        r"Function (\S+):\s*\n\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage
    ):
        resources[m.group(1)] = tuple(int(x) for x in m.groups()[1:])
    arch = re.search(r"code for sm_(\d+)", sass)
    reports = []
    for part in re.split(r"\n\s*Function : ", sass)[1:]:
        name = part.split(None, 1)[0]
        code = [
            Sass(int(a, 16), (p or "").strip(), op, rest) for a, p, op, rest in _LINE.findall(part)
        ]
        last = max(
            (i for i, s in enumerate(code) if s.base not in ("NOP", "BRA") or not _self_branch(s)),
            default=-1,
        )
        while last >= 0 and (code[last].base == "NOP" or _self_branch(code[last])):
            last -= 1
        registers, stack, shared, local = resources.get(name, (0, 0, 0, 0))
        reports.append(
            KernelReport(
                name,
                int(arch.group(1)) if arch else 0,
                registers,
                stack,
                shared,
                local,
                code[: last + 1],
            )
        )
    return reports


def _self_branch(s):
    m = re.search(r"0x([0-9a-f]+)\s*$", s.operands)
    return s.base == "BRA" and m is not None and int(m.group(1), 16) == s.address


@dataclasses.dataclass
class Compiled:
    """Result of `aot`. ``shared`` is what Triton asks for at launch (bytes)."""

    name: str
    arch: int
    ptx: str
    cubin: bytes
    shared: int
    num_warps: int
    num_stages: int
    report: KernelReport
    kernel: object  # triton's CompiledKernel (asm['ttgir'], metadata, ...)


def aot(fn, signature, constexprs, arch=80, num_warps=4, num_stages=3, divisible=(), **options):
    """Compile a @triton.jit function for sm_<arch> without a driver and disassemble it.

    signature : argument name -> Triton type ('*bf16', 'i32', 'fp32').  constexprs : name -> value.
    divisible : names of integer arguments to specialise as multiples of 16 (pointers always are).
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = list(fn.arg_names)
    missing = [n for n in names if n not in signature and n not in constexprs]
    if missing:
        raise ValueError(f"no type or value for arguments {missing} of {fn.__name__}")
    types = {
        n: signature.get(n, "constexpr") if n not in constexprs else "constexpr" for n in names
    }
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, n in enumerate(names)
        if types[n].startswith("*") or n in divisible
    }
    source = ASTSource(
        fn=fn,
        signature=types,
        constexprs={(names.index(k),): v for k, v in constexprs.items()},
        attrs=attributes,
    )
    built = triton.compile(
        source,
        target=GPUTarget("cuda", arch, 32),
        options=dict(num_warps=num_warps, num_stages=num_stages, **options),
    )
    cubin = built.asm["cubin"]
    report = next(r for r in analyse(cubin) if r.name == built.metadata.name)
    return Compiled(
        built.metadata.name,
        arch,
        built.asm["ptx"],
        cubin,
        built.metadata.shared,
        built.metadata.num_warps,
        num_stages,
        report,
        built,
    )
