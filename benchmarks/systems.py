"""What else runs a ConvMixer on a CPU? Each with the same weights, or why it is not here.

Each is built for ``torch.get_num_threads()`` threads, all of them at work on one batch, and keeps
its own defaults otherwise: torch sets its OpenMP team at each call, Inductor writes the number into
the code it compiles, ONNX Runtime and OpenVINO make a pool of that size. Both pools stay within the
cores that the process may use; OpenVINO ties its workers to single ones of them.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from convmixer_fast.testing import ERROR_RATIO, ErrorReport, error_report

Run = Callable[[], Tensor]

#: How many times eager PyTorch's own error a peer's may be, see `check_peer`.
PEER_ERROR_RATIO = 8.0


class Unavailable(Exception):
    """Why a peer cannot be measured here."""


def check_peer(output: Tensor, eager_output: Tensor, oracle: Tensor) -> ErrorReport:
    """Does a peer compute the same model in float32?

    A peer is not held to our numerics rule (twice PyTorch's error): an honest float32 product that
    sums in another order can be a little worse, and is timed. Its largest and its root-mean-square
    error against float64 may be `PEER_ERROR_RATIO` times eager PyTorch's, plus the rule's floor.
    bfloat16 or float16 inside would be thousands of times, another model millions.

    Raises:
        Unavailable: it is worse than that.
    """
    report = error_report(output, eager_output, oracle)
    extra = PEER_ERROR_RATIO - ERROR_RATIO
    ok = (
        report.max_error <= report.max_bar + extra * report.torch_max_error
        and report.rms_error <= report.rms_bar + extra * report.torch_rms_error
    )
    if not ok:
        raise Unavailable(f"not timed, it does not compute this model in float32: {report}")
    return report


def eager(model: nn.Module, x: Tensor) -> Run:
    return lambda: model(x)


def eager_channels_last(model: nn.Module, x: Tensor) -> Run:
    twin = copy.deepcopy(model).to(memory_format=torch.channels_last)
    last = x.contiguous(memory_format=torch.channels_last)
    return lambda: twin(last)


def _compiled(model: nn.Module, x: Tensor, **options: bool) -> Run:
    # The thread count is a constant of the generated code: as an option it is part of the key under
    # which Inductor finds code of earlier runs.
    threads = {"cpp.threads": torch.get_num_threads()}
    graph = torch.compile(copy.deepcopy(model), options={**threads, **options})
    return lambda: graph(x)


def compiled(model: nn.Module, x: Tensor) -> Run:
    return _compiled(model, x)


def compiled_freezing(model: nn.Module, x: Tensor) -> Run:
    return _compiled(model, x, freezing=True)


def onnx_runtime(model: nn.Module, x: Tensor) -> Run:
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  torch's exporter needs it
    except ImportError as error:
        raise Unavailable(f'{error.name} is missing: pip install "convmixer_fast[bench]"') from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder, "model.onnx"))
        torch.onnx.export(copy.deepcopy(model), (x,), path, input_names=["x"], verbose=False)
        session = onnxruntime.InferenceSession(path, options, ["CPUExecutionProvider"])
    feed = {"x": x.contiguous().numpy()}
    return lambda: torch.from_numpy(session.run(None, feed)[0])


def openvino(model: nn.Module, x: Tensor) -> Run:
    try:
        import openvino as ov
    except ImportError as error:
        raise Unavailable(f'{error.name} is missing: pip install "convmixer_fast[bench]"') from None
    config = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": "f32",
        # One request at a time gets all threads.
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
    }
    converted = ov.convert_model(copy.deepcopy(model), example_input=x)
    converted.reshape(list(x.shape))
    infer = ov.Core().compile_model(converted, "CPU", config)
    array = x.contiguous().numpy()
    return lambda: torch.from_numpy(infer(array)[0])


EAGER = "eager NCHW"

SYSTEMS: dict[str, Callable[[nn.Module, Tensor], Run]] = {
    EAGER: eager,
    "eager channels-last": eager_channels_last,
    "torch.compile": compiled,
    "torch.compile + freezing": compiled_freezing,
    "ONNX Runtime": onnx_runtime,
    "OpenVINO": openvino,
}
