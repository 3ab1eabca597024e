"""PTX text -> Module / Kernel / Instr.

The parser understands what Triton and nvcc emit for a single translation unit: ``.entry`` kernels,
module variables, scoped register blocks, labels, predicates, vector operands and branch tables.
"""

import re

import numpy as np

from .types import DTYPE, SIZE, UINT, PTXError

PLAIN, BRANCH, EXIT, BARRIER, TABLE_BRANCH = range(5)
_KIND = {"bra": BRANCH, "ret": EXIT, "exit": EXIT, "brx": TABLE_BRANCH}


class Instr:
    """One instruction; ``run(strand, mask)`` is filled in by `ptxsim.ops`."""

    __slots__ = (
        "kind",
        "mods",
        "op",
        "opcode",
        "operands",
        "pc",
        "pred",
        "pred_negated",
        "run",
        "text",
    )

    def __repr__(self):
        return self.text


class Module:
    """All kernels of one PTX file: ``module.kernels[name]``."""

    def __init__(self, kernels, source):
        self.kernels, self.source = kernels, source

    def __getitem__(self, name):
        """Kernel by exact name, or by a substring that occurs in exactly one (mangled) name."""
        if name in self.kernels:
            return self.kernels[name]
        found = [k for k in self.kernels if name in k]
        if len(found) != 1:
            raise KeyError(
                f"kernel {name!r} not found or ambiguous; this PTX has {sorted(self.kernels)}"
            )
        return self.kernels[found[0]]


class Kernel:
    """A parsed kernel: parameters, memory layout, registers and code."""

    def __init__(self, name):
        self.name = name
        self.params = []  # (name, type, bytes)
        self.globals = {}  # module variables: name -> initial numpy array
        self.shared, self.shared_size = {}, 0
        self.local, self.local_size = {}, 0
        self.tables = {}  # branch tables: label -> [labels]
        self.code, self.labels = [], {}
        self.max_threads = None  # from .reqntid / .maxntid
        self.program = None  # compiled form, see machine.compile_kernel
        self._widths, self._prefixes, self._slots = {}, {}, {}
        self.slot_widths = []
        self.register_bytes = 0  # bytes per lane of all declared registers

    def is_register(self, operand):
        return operand[0] == "%" or operand in self._widths

    def width(self, register):
        """Register width in bits (1 for predicates)."""
        width = self._widths.get(register)
        if width is None:
            m = re.match(r"(%?[A-Za-z_$]+)\d+$", register)
            width = self._prefixes.get(m.group(1)) if m else None
            if width is None:
                raise PTXError(f"unknown register {register} in {self.name}")
            self._widths[register] = width
        return width

    def slot(self, register):
        """Index of the register in a strand's register file."""
        slot = self._slots.get(register)
        if slot is None:
            self.slot_widths.append(self.width(register))
            slot = self._slots[register] = len(self._slots)
        return slot

    def declare_registers(self, kind, names):
        width = 1 if kind == "pred" else SIZE[kind] * 8
        for name in names.split(","):
            name = name.strip()
            m = re.match(r"(%?[\w$]+)<(\d+)>", name)
            if m:
                self._prefixes[m.group(1)] = width
                self.register_bytes += int(m.group(2)) * max(1, width // 8)
            else:
                if self._widths.get(name, width) != width:
                    raise PTXError(f"register {name} declared with two widths in {self.name}")
                self._widths[name] = width
                self.register_bytes += max(1, width // 8)


def split_operands(text):
    """Split at commas outside braces, brackets and parentheses."""
    out, depth, current = [], 0, ""
    for ch in text:
        depth += ch in "{[("
        depth -= ch in "}])"
        if ch == "," and depth == 0:
            out.append(current.strip())
            current = ""
        else:
            current += ch
    if current.strip():
        out.append(current.strip())
    return out


def vector(operand):
    """Registers of an operand that may be a brace list."""
    return [x.strip() for x in operand[1:-1].split(",")] if operand[0] == "{" else [operand]


def _strip(source):
    source = re.sub(r"/\*.*?\*/", "", source, flags=re.S)
    source = re.sub(r"//[^\n]*", "", source)
    source = re.sub(r"\.section[^{]*\{[^}]*\}", "", source)
    drop = re.compile(r"\s*\.(loc|file|version|target|address_size)\b")
    return "\n".join(line for line in source.split("\n") if not drop.match(line))


def _matching_brace(text, start):
    depth = 0
    for m in re.compile(r"[{}]").finditer(text, start):
        depth += 1 if m.group() == "{" else -1
        if depth == 0:
            return m.start()
    raise PTXError("unbalanced braces in PTX")


def parse(source):
    """Parse PTX text into a `Module`."""
    text = _strip(source)
    entries, pieces, last = [], [], 0
    for m in re.finditer(r"\.entry\s+([\w$]+)\s*(\()?", text):
        close = text.index(")", m.end()) if m.group(2) else m.end() - 1
        params = text[m.end() : close] if m.group(2) else ""
        start = text.index("{", close)
        end = _matching_brace(text, start)
        entries.append((m.group(1), params, text[close + 1 : start], text[start + 1 : end]))
        pieces.append(text[last : m.start()])
        last = end + 1
    top = "".join(pieces) + text[last:]
    variables = _module_variables(top)
    return Module({e[0]: _kernel(*e, top, variables) for e in entries}, source)


def _module_variables(top):
    out = {}
    pattern = (
        r"\.(?:global|const)\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)((?:\[\d*\])*)"
        r"(?:\s*=\s*(\{[^}]*\}|[^;{]+))?\s*;"
    )
    for m in re.finditer(pattern, top):
        dtype = DTYPE[m.group(2)]
        init = [x.strip() for x in (m.group(5) or "").strip("{} \n").split(",") if x.strip()]
        count = 1
        for dim in re.findall(r"\[(\d*)\]", m.group(4)):
            count *= int(dim) if dim else len(init)
        array = np.zeros(max(count, 1), dtype)
        raw = array.view(UINT[array.dtype.itemsize * 8])
        for i, item in enumerate(init):
            hexfloat = re.match(r"0[fFdD]([0-9a-fA-F]+)$", item)
            try:
                number = int(hexfloat.group(1), 16) if hexfloat else int(item, 0)
            except ValueError:
                raise PTXError(f"initialiser {item!r} of {m.group(3)} is not a number") from None
            raw[i] = number & ((1 << (8 * array.dtype.itemsize)) - 1)
        out[m.group(3)] = array
    return out


def _round_up(n, align):
    return (n + align - 1) // align * align


def _shared_layout(kernel, top, body):
    dynamic = []
    pattern = (
        r"(\.extern\s+)?\.shared\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)((?:\[\d*\])*)\s*;"
    )
    for text, module_scope in ((top, True), (body, False)):
        for m in re.finditer(pattern, text):
            align, name = int(m.group(2) or 4), m.group(4)
            if m.group(1):
                dynamic.append((name, align))
                continue
            if module_scope and not re.search(re.escape(name) + r"(?![\w$])", body):
                continue
            size = SIZE[m.group(3)]
            for dim in re.findall(r"\[(\d*)\]", m.group(5)):
                size *= int(dim or 0)
            kernel.shared_size = _round_up(kernel.shared_size, align)
            kernel.shared[name] = kernel.shared_size
            kernel.shared_size += size
    for name, align in dynamic:  # all dynamic arrays start where the static ones end
        kernel.shared_size = _round_up(kernel.shared_size, align)
        kernel.shared[name] = kernel.shared_size


def _kernel(name, params, attributes, body, top, variables):
    kernel = Kernel(name)
    kernel.globals = {
        k: v for k, v in variables.items() if re.search(re.escape(k) + r"(?![\w$])", body)
    }
    for p in split_operands(params):
        m = re.match(
            r"\.param\s+(?:\.align\s+\d+\s+)?\.(\w+)(?:\s+\.ptr\s*(?:\.\w+\s*)?(?:\.align\s+\d+)?)?"
            r"\s+([\w$]+)(?:\[(\d+)\])?",
            p.strip(),
        )
        if not m:
            raise PTXError(f"cannot parse parameter {p!r} of {name}")
        kernel.params.append((m.group(2), m.group(1), SIZE[m.group(1)] * int(m.group(3) or 1)))
    m = re.search(r"\.(?:reqntid|maxntid)\s+([\d,\s]+)", attributes)
    if m:
        kernel.max_threads = int(np.prod([int(x) for x in m.group(1).split(",") if x.strip()]))
    _shared_layout(kernel, top, body)
    for m in re.finditer(r"\.local\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)\[(\d+)\]\s*;", body):
        kernel.local_size = _round_up(kernel.local_size, 16)
        kernel.local[m.group(3)] = kernel.local_size
        kernel.local_size += SIZE[m.group(2)] * int(m.group(4))
    for m in re.finditer(r"\.reg\s+\.(\w+)\s+([^;]*);", body):
        kernel.declare_registers(m.group(1), m.group(2))
    for m in re.finditer(r"([\w$]+):\s*\.branchtargets\s+([^;]*);", body):
        kernel.tables[m.group(1)] = [x.strip() for x in m.group(2).split(",")]
    body = re.sub(r"[\w$]+:\s*\.branchtargets[^;]*;", "", body)
    body = re.sub(
        r"(?m)(^|(?<=[\s;{}]))\.(reg|shared|local|pragma|extern|param)\b[^;\n]*;", "", body
    )
    for statement in body.split(";"):
        _statement(kernel, statement.strip())
    return kernel


def _statement(kernel, text):
    while text:  # scope braces and labels in front of the instruction
        m = re.match(r"([\w$]+)\s*:\s*(?!:)", text)
        if m:
            kernel.labels[m.group(1)] = len(kernel.code)
            text = text[m.end() :].strip()
        elif text[0] in "{}":
            text = text[1:].strip()
        else:
            break
    if not text or text.startswith("."):
        return
    ins = Instr()
    ins.text = " ".join(text.split())
    ins.pred, ins.pred_negated, ins.run = None, False, None
    m = re.match(r"@(!?)(%?[\w$]+)\s+", text)
    if m:
        ins.pred, ins.pred_negated = m.group(2), bool(m.group(1))
        text = text[m.end() :]
    m = re.match(r"([a-z0-9_]+(?:\.[\w:]+)*)\s*(.*)$", text, re.S)
    if not m:
        raise PTXError(f"cannot parse statement {ins.text!r} in {kernel.name}")
    ins.opcode = m.group(1).replace("shared::cta", "shared")
    ins.op, *ins.mods = ins.opcode.split(".")
    ins.operands = split_operands(m.group(2))
    ins.kind = _KIND.get(ins.op, PLAIN)
    if ins.op in ("bar", "barrier") and "warp" not in ins.mods:
        ins.kind = BARRIER
    ins.pc = len(kernel.code)
    kernel.code.append(ins)
