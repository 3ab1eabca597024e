"""Run each case of the engine once, without torch; `counts.py` counts it under valgrind.

    python -S -E -s cpu_probe.py ENGINE.so CASES.json ISA

A case has the arguments of the engine's function; the buffers are allocated here.
"""

import array
import ctypes
import importlib.util
import json
import sys

#: Values between -1 and 1 whose length, a prime, shares no period with any shape.
_PATTERN = array.array("f", [((i * 7919) % 1009) / 504.5 - 1.0 for i in range(1009)]).tobytes()
_kept = []


def floats(count):
    """The address of ``count`` floats of the pattern, aligned to 64 bytes."""
    size = 4 * count
    buffer = ctypes.create_string_buffer(size + 64)
    start = -ctypes.addressof(buffer) % 64
    text = (_PATTERN * (size // len(_PATTERN) + 1))[:size]
    ctypes.memmove(ctypes.addressof(buffer) + start, text, size)
    _kept.append(buffer)
    return ctypes.addressof(buffer) + start


def strides(n, c, h, w, channels_last):
    return (c * h * w, 1, w * c, c) if channels_last else (c * h * w, h * w, w, 1)


def main():
    spec = importlib.util.spec_from_file_location("_cpu", sys.argv[1])
    engine = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(engine)
    engine.set_isa(sys.argv[3])
    acts = engine.activations()
    with open(sys.argv[2]) as file:
        cases = json.load(file)
    for case in cases:
        n, c, h, w = shape = tuple(case["shape"])
        k, act = case["k"], acts.index(case["act"])
        x, y = floats(n * c * h * w), floats(n * max(c, case.get("c_out", 0)) * h * w)
        if case["op"] == "depthwise_mix":
            last = case.get("channels_last", False)
            s = strides(*shape, last)
            vectors = [floats(c) for _ in range(3)]
            engine.depthwise_mix(
                x, s, y, s, shape, k, floats(c * k * k), *vectors, act, int(last), 1
            )
        elif case["op"] == "pointwise":
            out = case["c_out"]
            vectors = [floats(out) for _ in range(3)]
            weight = floats(out * c * k * k)
            s = strides(*shape, case.get("channels_last", False))
            levels = case["strassen"]
            engine.pointwise(x, s, y, shape, k, out, weight, *vectors, act, levels, 1)
        else:
            packed, weights = [], []
            for _ in range(case["depth"]):
                room = floats(engine.mixer_packed_floats(c, k))
                engine.mixer_pack([floats(c * k * k), *(floats(c) for _ in range(6))], c, k, room)
                packed.append(room)
                weights.append(floats(c * c))
            engine.mixer_stack(x, y, shape, k, packed, weights, act, case["strassen"], 1)


main()
