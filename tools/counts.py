"""Instruction counts of the kernels, compared with stored ones; machine noise cannot change them.

    python tools/counts.py            # count, and report differences from the stored counts
    python tools/counts.py --update   # store these counts, and report what changed

The CPU engine runs under valgrind's callgrind, with AVX2 (valgrind has no AVX-512); the Triton
kernels run in ptxsim. Counts depend on the compiler: they are stored under its version in
counts/cpu.json and counts/gpu.json, and compared under the same version only. A count is not a
time: it shows that code changed, `benchmarks/cpu.py` measures the effect.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
STORED = {"cpu": HERE / "counts" / "cpu.json", "gpu": HERE / "counts" / "gpu.json"}
#: How far a count may be from the stored one, either way.
TOLERANCE = 0.03
ISA = "avx2"

Counts = dict[str, int]


class Unavailable(Exception):
    """The counts or their comparison are unavailable; the message is the reason."""


def _depthwise(k: int, act: str, c: int, side: int, **more: Any) -> dict[str, Any]:
    shape = [1, c, side, side]
    return {"op": "depthwise_mix", "shape": shape, "k": k, "act": act, **more}


def _channel(c: int, c_out: int, side: int, k: int, strassen: int) -> dict[str, Any]:
    shape = [1, c, side, side]
    case = {"op": "pointwise", "shape": shape, "k": k, "act": "gelu", "c_out": c_out}
    return {**case, "strassen": strassen}


def _stack(c: int, side: int, k: int, act: str, strassen: int) -> dict[str, Any]:
    case = {"op": "mixer_stack", "shape": [1, c, side, side], "k": k, "act": act, "depth": 2}
    return {**case, "strassen": strassen}


#: Shapes of the published models with fewer channels, and odd ones.
CPU_CASES: dict[str, dict[str, Any]] = {
    "depthwise, k = 9, gelu, 32 x 32": _depthwise(9, "gelu", 16, 32),
    "depthwise, k = 9, gelu, 16 x 16": _depthwise(9, "gelu", 16, 16),
    "depthwise, k = 7, relu, 32 x 32": _depthwise(7, "relu", 16, 32),
    "depthwise, k = 5, gelu, 16 x 16": _depthwise(5, "gelu", 16, 16),
    "depthwise, k = 3, silu, 13 x 13": _depthwise(3, "silu", 16, 13),
    "depthwise, k = 4, hardswish, 13 x 13": _depthwise(4, "hardswish", 16, 13),
    "depthwise, k = 9, channels-last": _depthwise(9, "gelu", 16, 16, channels_last=True),
    "pointwise, 256 channels, direct": _channel(256, 256, 16, 1, 0),
    "pointwise, 256 channels, one level": _channel(256, 256, 16, 1, 1),
    "pointwise, 97 channels": _channel(97, 97, 13, 1, 1),
    "stem, patches of 7": _channel(3, 128, 56, 7, 1),
    "two blocks, 256 channels, k = 9, direct": _stack(256, 16, 9, "gelu", 0),
    "two blocks, 256 channels, k = 9, one level": _stack(256, 16, 9, "gelu", 1),
    "two blocks, 128 channels, k = 7, relu": _stack(128, 32, 7, "relu", 1),
}


def cpu_key() -> str:
    """The key of the CPU engine's counts: its compiler and the compiler's flags.

    Raises:
        Unavailable: there is no engine, or valgrind cannot count it.
    """
    from convmixer_fast.backends.cpu import native

    engine = native.load()
    if engine is None:
        raise Unavailable(native.why_unavailable())
    if ISA not in engine.isas():
        raise Unavailable(f"{ISA} was not built or is not supported here")
    info = engine.build_info()
    flags = [f for f in info["flags"].split() if not f.startswith("-W")]
    return " ".join([info["compiler"], *flags, info["isas"][ISA]])


def count_cpu() -> Counts:
    """Instructions of each case of the CPU engine, on one thread.

    Raises:
        Unavailable: no valgrind, no engine, or an engine without symbols.
        RuntimeError: valgrind failed, or did not see every case.
    """
    from convmixer_fast.backends.cpu import native

    cpu_key()
    valgrind = shutil.which("valgrind")
    if valgrind is None:
        raise Unavailable("no valgrind: apt-get install valgrind")
    engine = native.load()
    assert engine is not None
    with tempfile.TemporaryDirectory() as folder:
        cases, out = Path(folder, "cases.json"), Path(folder, "counts")
        cases.write_text(json.dumps(list(CPU_CASES.values())))
        # A part of the profile ends where a case's function returns.
        dumps = [f"--dump-after={name}" for name in _FUNCTIONS.values()]
        command = [valgrind, "-q", "--tool=callgrind", f"--callgrind-out-file={out}", *dumps]
        # -S: no site packages, which run code of their own at start.
        command += [sys.executable, "-S", "-E", "-s", str(HERE / "counts" / "cpu_probe.py")]
        command += [str(engine.__file__), str(cases), ISA]
        # A hash seed of its own would move the counts of dictionaries.
        clean = {k: v for k, v in os.environ.items() if not k.startswith("CONVMIXER_FAST_")}
        done = subprocess.run(command, env=clean, capture_output=True, text=True, timeout=600)
        if done.returncode:
            raise RuntimeError(f"valgrind: {(done.stderr or done.stdout).strip()[-500:]}")
        parts = sorted(Path(folder).glob("counts.*"), key=lambda p: int(p.suffix[1:]))
        if not parts:
            raise Unavailable(f"{engine.__file__} has no symbols to count by")
        if len(parts) != len(CPU_CASES):
            raise RuntimeError(f"valgrind saw {len(parts)} calls, not {len(CPU_CASES)}")
        return {
            name: inclusive(part.read_text(), _FUNCTIONS[case["op"]])
            for (name, case), part in zip(CPU_CASES.items(), parts, strict=True)
        }


#: A case's function as callgrind spells it; in full, since the names of its lambdas begin alike.
_FUNCTIONS = {
    name: f"convmixer_fast::{name}({parameters})"
    for name, parameters in {
        "depthwise_mix": "convmixer_fast::DepthwiseMix const&, convmixer_fast::Layout, int",
        "pointwise": "convmixer_fast::Pointwise const&, int",
        "mixer_stack": "convmixer_fast::MixerStack const&, long, long, int",
    }.items()
}


def inclusive(profile: str, function: str) -> int:
    """Instructions of the one call, in a profile of callgrind's, of the function so named.

    Raises:
        ValueError: there is no such call, or there are several.
    """
    # Names are written once and are numbers from then on.
    names = dict(re.findall(r"^c?fn=(\(\d+\)) (.+)$", profile, re.MULTILINE))
    found = re.findall(r"^cfn=(\(\d+\)).*\ncalls=(\d+) ?.*\n\S+ (\d+)$", profile, re.MULTILINE)
    calls = [
        (int(calls), int(cost)) for number, calls, cost in found if names.get(number) == function
    ]
    if [count for count, _ in calls] != [1]:
        raise ValueError(f"the profile has {calls} as calls of {function}, not one")
    return calls[0][1]


def gpu_key() -> str:
    """The key of the Triton kernels' counts.

    Raises:
        Unavailable: no Triton.
    """
    try:
        import triton
    except ImportError as error:
        raise Unavailable(f"Triton is not installed ({error})") from None
    return f"triton {triton.__version__}"


def count_gpu() -> Counts:
    """Warp instructions and memory sectors of the shipped kernels on a simulated sm_80.

    Every result is compared with PyTorch's first.

    Raises:
        Unavailable: no Triton.
    """
    import ptxsim
    import torch
    import torch.nn.functional as F

    from convmixer_fast import ops
    from convmixer_fast.backends.triton.kernels.depthwise import depthwise_mix, pack_taps
    from convmixer_fast.backends.triton.kernels.pointwise import pointwise_mix
    from convmixer_fast.backends.triton.kernels.stem import patch_embed

    gpu_key()
    counts: Counts = {}

    def add(name: str, run: Any, reference: Any) -> None:
        with ptxsim.triton_on_cpu(cc=80, strict=True) as log:
            ours = run()
        with ops.use_backend("reference"):
            torch.testing.assert_close(ours, reference(), rtol=0.03, atol=0.1)
        (stats,) = log
        counts[f"{name}, instructions"] = int(stats.warp_instructions)
        sectors = (stats.counters[f"global_{way}_sectors"] for way in ("ld", "st"))
        counts[f"{name}, sectors"] = int(sum(sectors))

    torch.manual_seed(0)
    c, side = 64, 16
    sizes = {
        torch.bfloat16: ((9, "gelu"), (7, "relu"), (5, "gelu")),
        torch.float16: ((9, "gelu"),),
        torch.float32: ((9, "gelu"), (7, "relu")),
    }
    for dtype, depthwise in sizes.items():
        shown = str(dtype).removeprefix("torch.")
        x = torch.randn(1, c, side, side, dtype=dtype)
        x = x.contiguous(memory_format=torch.channels_last)
        affine = (torch.randn(c, dtype=dtype), torch.rand(c) + 0.5, torch.randn(c))
        for k, act in depthwise:
            weight = (torch.randn(c, 1, k, k) / k).to(dtype)
            add(
                f"depthwise, {shown}, k = {k}, {act}",
                lambda a=(x, weight, *affine, act), k=k: depthwise_mix(
                    a[0], pack_taps(a[1]), *a[2:], k
                ),
                lambda a=(x, weight, *affine, act): ops.depthwise_mix(*a),
            )
        weight = (torch.randn(c, c, 1, 1) / c**0.5).to(dtype)
        arguments = (x, weight, *affine, "gelu")
        add(
            f"pointwise, {shown}",
            lambda a=arguments: pointwise_mix(*a),
            lambda a=arguments: ops.pointwise_mix(*a),
        )
    images = torch.randn(1, 3, 56, 56, dtype=dtype)
    weight = (torch.randn(c, 3, 7, 7) / 147**0.5).to(dtype)
    bias, scale, shift = affine

    def plain_stem() -> torch.Tensor:
        h = F.gelu(F.conv2d(images, weight, bias, stride=7))
        return h * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)

    add(
        f"stem, {shown}, patches of 7",
        lambda: patch_embed(images, weight, *affine, "gelu"),
        plain_stem,
    )
    return counts


def differences(stored: Mapping[str, int], now: Mapping[str, int]) -> list[str]:
    """A line for each count further than `TOLERANCE` from the stored one, and each new or gone.

    Lower counts are reported too: the stored one is then too lenient.
    """
    lines = []
    for name in dict.fromkeys([*stored, *now]):
        before, after = stored.get(name), now.get(name)
        if before is None or after is None:
            lines.append(f"{name}: {'not stored' if before is None else 'no longer counted'}")
        elif abs(after - before) > TOLERANCE * before:
            change = f"{100 * (after / before - 1):+.1f} %" if before else "from none"
            lines.append(f"{name}: {before:,} -> {after:,} ({change})")
    return lines


def load(kind: str) -> dict[str, Counts]:
    """The stored counts of ``cpu`` or ``gpu``, by compiler."""
    path = STORED[kind]
    return json.loads(path.read_text()) if path.exists() else {}


def compared(kind: str, key: str, now: Mapping[str, int]) -> list[str]:
    """`differences` from what is stored under that compiler.

    Raises:
        Unavailable: nothing is stored under it.
    """
    stored = load(kind)
    if key not in stored:
        known = "; ".join(stored) or "none at all"
        raise Unavailable(f"no counts are stored of {key}, only of: {known}")
    return differences(stored[key], now)


def update(kind: str, key: str, now: Counts) -> list[str]:
    """Replace the stored counts of the same compiler; returns the changes, line by line."""
    stored = load(kind)
    old = stored.get(key)
    lines = [f"{name}: stored as {count:,}" for name, count in now.items()]
    if old is not None:
        exact = [n for n in dict.fromkeys([*old, *now]) if old.get(n) != now.get(n)]
        lines = [f"{n}: {old.get(n, 'none')} -> {now.get(n, 'none')}" for n in exact]
    stored[key] = now
    STORED[kind].parent.mkdir(parents=True, exist_ok=True)
    STORED[kind].write_text(json.dumps(stored, indent=1) + "\n")
    return lines


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--update", action="store_true", help="store the counts")
    parser.add_argument("--only", choices=list(STORED), help="default: both")
    options = parser.parse_args(arguments)
    differs = False
    for kind in [options.only] if options.only else STORED:
        try:
            if kind == "cpu":
                key, now = cpu_key(), count_cpu()
            else:
                key, now = gpu_key(), count_gpu()
            lines = update(kind, key, now) if options.update else compared(kind, key, now)
        except Unavailable as why:
            print(f"{kind}: skipped: {why}")
            continue
        print(f"{kind}, {key}: {len(now)} counts, {len(lines) or 'none'} changed")
        print("".join(f"  {line}\n" for line in lines), end="")
        differs = differs or bool(lines)
    return int(differs and not options.update)


if __name__ == "__main__":
    sys.exit(main())
