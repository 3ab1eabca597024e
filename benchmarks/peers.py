"""What else runs a ConvMixer on a CPU? Each with the same weights, or why it is not here."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

Run = Callable[[], Tensor]


class Unavailable(Exception):
    """Why a peer cannot be measured here."""


def eager(model: nn.Module, x: Tensor) -> Run:
    return lambda: model(x)


def eager_channels_last(model: nn.Module, x: Tensor) -> Run:
    twin = copy.deepcopy(model).to(memory_format=torch.channels_last)
    last = x.contiguous(memory_format=torch.channels_last)
    return lambda: twin(last)


def compiled(model: nn.Module, x: Tensor) -> Run:
    torch._dynamo.reset()
    graph = torch.compile(copy.deepcopy(model))
    return lambda: graph(x)


def compiled_freezing(model: nn.Module, x: Tensor) -> Run:
    torch._dynamo.reset()
    graph = torch.compile(copy.deepcopy(model), options={"freezing": True})
    return lambda: graph(x)


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
    config = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": "f32"}
    converted = ov.convert_model(copy.deepcopy(model), example_input=x)
    converted.reshape(list(x.shape))
    infer = ov.Core().compile_model(converted, "CPU", config)
    array = x.contiguous().numpy()
    return lambda: torch.from_numpy(infer(array)[0])


PEERS: dict[str, Callable[[nn.Module, Tensor], Run]] = {
    "eager NCHW": eager,
    "eager channels-last": eager_channels_last,
    "torch.compile": compiled,
    "torch.compile, freezing": compiled_freezing,
    "ONNX Runtime": onnx_runtime,
    "OpenVINO": openvino,
}
