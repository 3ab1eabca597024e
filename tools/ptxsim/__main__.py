"""Command line: ``python -m ptxsim sass file.cubin`` and ``python -m ptxsim ptx file.ptx``."""

import argparse
import collections
import json
import sys
from pathlib import Path

from . import ops, sass
from .parse import parse


def summarise(path):
    """Facts about every kernel of a PTX file."""
    out = []
    for name, kernel in parse(Path(path).read_text()).kernels.items():
        census = collections.Counter(i.opcode for i in kernel.code)
        bases = collections.Counter(i.op for i in kernel.code)
        known = set(ops.BUILDERS) | {"bra", "brx", "ret", "exit"}
        out.append(
            {
                "name": name,
                "instructions": len(kernel.code),
                "opcodes": dict(census.most_common()),
                "by_op": dict(bases.most_common()),
                "parameters": [(n, t, s) for n, t, s in kernel.params],
                "shared": kernel.shared_size,
                "local": kernel.local_size,
                "labels": len(kernel.labels),
                "barriers": bases["bar"] + bases["barrier"],
                "unsupported": sorted(set(bases) - known),
            }
        )
    return out


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m ptxsim", description=__doc__)
    parser.add_argument("command", choices=("sass", "ptx"))
    parser.add_argument("file")
    parser.add_argument("--json", action="store_true", help="machine-readable output")
    args = parser.parse_args(argv)
    from . import ops_bits, ops_convert, ops_memory, ops_warp  # noqa: F401  (fill the opcode list)

    try:
        if args.command == "sass":
            reports = sass.analyse(args.file)
            print(
                json.dumps([r.as_dict() for r in reports], indent=1)
                if args.json
                else "\n".join(str(r) for r in reports)
            )
            return 0
        rows = summarise(args.file)
    except (OSError, RuntimeError) as error:
        print(f"ptxsim: {error}", file=sys.stderr)
        return 1
    if args.json:
        print(json.dumps(rows, indent=1))
        return 0
    for r in rows:
        print(
            f"{r['name']}: {r['instructions']} instructions, {len(r['opcodes'])} opcodes, "
            f"{len(r['parameters'])} parameters, static shared {r['shared']} B, "
            f"local {r['local']} B/thread, {r['barriers']} barriers"
        )
        print("  " + " ".join(f"{k}:{v}" for k, v in list(r["by_op"].items())[:16]))
        if r["unsupported"]:
            print("  not supported: " + " ".join(r["unsupported"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
