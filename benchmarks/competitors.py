"""Other systems that run a ConvMixer on a CPU or a GPU, with the same weights.

Each is built from the model on its device and `devices.Inputs`, whose copies its calls use in turn.

On a CPU each is built for ``torch.get_num_threads()`` threads, all working on one batch, and has
its own defaults otherwise: torch sets its OpenMP team at each call, Inductor writes the number into
the code it compiles, ONNX Runtime and OpenVINO create a pool of that size. Both pools stay within
the cores that the process may use; OpenVINO pins its workers to single cores.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from devices import Inputs
from torch import Tensor, nn

from convmixer_fast import optimize
from convmixer_fast.modules import cuda_graph
from convmixer_fast.testing import ERROR_RATIO, ErrorReport, error_report

Run = Callable[[], Tensor]

#: Largest error of a peer as a multiple of eager PyTorch's, see `check_peer`.
PEER_ERROR_RATIO = 8.0


class Unavailable(Exception):
    """A peer cannot be measured on this machine; the message is the reason."""


def check_peer(output: Tensor, eager_output: Tensor, oracle: Tensor) -> ErrorReport:
    """Check that a peer computes the same model in the same dtype.

    A peer is not held to our numerics rule (twice PyTorch's error): a GEMM that sums in another
    order can be slightly worse, and is timed. Its largest and its root-mean-square error against
    float64 may be `PEER_ERROR_RATIO` times eager PyTorch's, plus the rule's floor. bfloat16 inside
    a float32 model has thousands of times the error, another model millions of times.

    Raises:
        Unavailable: the error is larger.
    """
    report = error_report(output, eager_output, oracle)
    extra = PEER_ERROR_RATIO - ERROR_RATIO
    ok = (
        report.max_error <= report.max_bar + extra * report.torch_max_error
        and report.rms_error <= report.rms_bar + extra * report.torch_rms_error
    )
    if not ok:
        raise Unavailable(f"not timed, it does not compute this model in this dtype: {report}")
    return report


def eager(model: nn.Module, inputs: Inputs) -> Run:
    return lambda: model(inputs())


def eager_channels_last(model: nn.Module, inputs: Inputs) -> Run:
    twin = copy.deepcopy(model).to(memory_format=torch.channels_last)
    return eager(twin, inputs.channels_last())


def _searching(build: Callable[[nn.Module, Inputs], Run]) -> Callable[[nn.Module, Inputs], Run]:
    """The system with cuDNN's search for the fastest algorithm at the first call of a shape."""

    def searching(model: nn.Module, inputs: Inputs) -> Run:
        run = build(model, inputs)

        def call() -> Tensor:
            before = torch.backends.cudnn.benchmark
            torch.backends.cudnn.benchmark = True
            try:
                return run()
            finally:
                torch.backends.cudnn.benchmark = before

        return call

    return searching


def _compiled(model: nn.Module, inputs: Inputs, **options: bool) -> Run:
    # The thread count is a constant of the generated code; as an option it is part of the key of
    # Inductor's cache.
    threads = {"cpp.threads": torch.get_num_threads()}
    graph = torch.compile(copy.deepcopy(model), options={**threads, **options})
    return lambda: graph(inputs())


def compiled(model: nn.Module, inputs: Inputs) -> Run:
    return _compiled(model, inputs)


def compiled_layout_kept(model: nn.Module, inputs: Inputs) -> Run:
    """torch.compile without Inductor's conversion of convolutions to channels-last."""
    return _compiled(model, inputs, layout_optimization=False)


def compiled_freezing(model: nn.Module, inputs: Inputs) -> Run:
    return _compiled(model, inputs, freezing=True)


def onnx_runtime(model: nn.Module, inputs: Inputs) -> Run:
    x = inputs.first
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


def openvino(model: nn.Module, inputs: Inputs) -> Run:
    x = inputs.first
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


def tensorrt(model: nn.Module, inputs: Inputs) -> Run:
    try:
        import torch_tensorrt
    except ImportError as error:
        raise Unavailable(f"{error.name} is missing: pip install torch-tensorrt") from None
    x = inputs.first
    engine = torch_tensorrt.compile(
        copy.deepcopy(model), ir="dynamo", inputs=[x], enabled_precisions={x.dtype}
    )
    return lambda: engine(inputs())


def ours_as_graph(model: nn.Module, inputs: Inputs) -> Run:
    """Ours with `optimize(cuda_graph=True)`, for batches up to the largest graph."""
    if len(inputs.first) > cuda_graph.MAX_BATCH:
        raise Unavailable(f"CUDA graphs are for at most {cuda_graph.MAX_BATCH} images")
    return eager(optimize(model, inplace=False, cuda_graph=True), inputs)


EAGER = "eager NCHW"

#: Device -> name -> function that builds the system.
SYSTEMS: dict[str, Mapping[str, Callable[[nn.Module, Inputs], Run]]] = {
    "cpu": {
        EAGER: eager,
        "eager channels-last": eager_channels_last,
        "torch.compile": compiled,
        "torch.compile + layout_optimization=False": compiled_layout_kept,
        "torch.compile + freezing": compiled_freezing,
        "ONNX Runtime": onnx_runtime,
        "OpenVINO": openvino,
    },
    "cuda": {
        "ours + CUDA graph": ours_as_graph,
        EAGER: eager,
        "eager NCHW + cudnn.benchmark": _searching(eager),
        "eager channels-last": eager_channels_last,
        "eager channels-last + cudnn.benchmark": _searching(eager_channels_last),
        "torch.compile": compiled,
        "torch.compile + layout_optimization=False": compiled_layout_kept,
        "TensorRT": tensorrt,
    },
}


def build(
    names: Iterable[str],
    kind: str,
    model: nn.Module,
    inputs: Inputs,
    check: Callable[[Tensor], ErrorReport],
) -> tuple[dict[str, Run], dict[str, ErrorReport], dict[str, str]]:
    """The named systems that are available and correct, their errors, and why others are left out.

    Args:
        kind: of the device, a key of `SYSTEMS`.
        check: compares a system's first output with float64; raises `Unavailable`.
    """
    runs: dict[str, Run] = {}
    errors: dict[str, ErrorReport] = {}
    notes: dict[str, str] = {}
    for name in names:
        try:
            run = SYSTEMS[kind][name](model, inputs)
            errors[name] = check(run())
            runs[name] = run
        except Unavailable as reason:
            notes[name] = str(reason)
        except Exception as error:  # any failure of a peer is its note
            notes[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return runs, errors, notes
