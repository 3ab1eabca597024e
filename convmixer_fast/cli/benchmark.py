"""``convmixer-fast benchmark``: the speed of one model, with timm's flags and result keys.

The result is the JSON that timm's ``benchmark.py`` prints after ``--result`` for its bulk scripts:
``infer_samples_per_sec``, ``infer_step_time`` (ms), ``infer_batch_size``, ``infer_img_size``,
``infer_gmacs``, ``infer_macts``, the same with ``train_``, and ``param_count`` (millions).
timm's counts omit the depthwise convolutions; ``infer_gmacs_true`` includes them. As in timm, a
batch that does not fit into memory is made smaller.

``--compare`` checks that the plain PyTorch model computes the same, then times both in turn.
"""

from __future__ import annotations

import argparse
import csv
import gc
import io
import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..files import write_whole
from .common import ACTIVATIONS, BACKENDS, DEFAULT_MODEL, Command, note, output_file, positive
from .groups import device_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from ..arch import Arch, Variant

PRECISIONS = ("float32", "float16", "bfloat16", "amp")
MODES = ("inference", "train", "both")
#: Default batch sizes; the GPU's is timm's.
BATCH_SIZE = {"cuda": 256, "cpu": 4}


@dataclass(frozen=True, kw_only=True)
class BenchmarkArguments:
    """The flags of `add_benchmark`."""

    model: str
    bench: str
    act: str | None
    num_classes: int | None
    compare: bool
    backend: str
    batch_size: int | None
    img_size: int | None
    input_size: list[int] | None
    channels_last: bool
    precision: str
    amp: bool
    amp_dtype: str | None
    device: str | None
    num_warm_iter: int
    num_bench_iter: int
    torchcompile: str | None
    no_retry: bool
    grad_checkpointing: bool
    opt: str
    detail: bool
    results_file: str | None
    results_format: str


def add_benchmark(sub: argparse.ArgumentParser) -> None:
    """Add the flags; those that timm has keep its names and meanings."""
    sub.epilog = (
        "The result is printed as JSON after a line '--result', as timm's benchmark.py prints it. "
        "Exit code 1, and an 'error' in the result, where not even one image fits into memory."
    )
    _add_model(sub)
    _add_input(sub)
    _add_running(sub)
    _add_results(sub)


def _add_model(sub: argparse.ArgumentParser) -> None:
    what = sub.add_argument_group("what")
    what.add_argument(
        "-m",
        "--model",
        metavar="NAME",
        default=DEFAULT_MODEL,
        help="timm's or the paper's name (default: %(default)s)",
    )
    what.add_argument(
        "--bench",
        choices=MODES,
        default="inference",
        help="default: %(default)s",
    )
    what.add_argument("--act", choices=ACTIVATIONS, help="default: the published one")
    what.add_argument("--num-classes", type=positive, metavar="N")
    what.add_argument(
        "--compare", action="store_true", help="against the plain PyTorch model, outputs checked"
    )
    what.add_argument("--backend", choices=BACKENDS, default="auto", help="default: auto")


def _add_input(sub: argparse.ArgumentParser) -> None:
    size = sub.add_argument_group("input")
    defaults = ", ".join(f"{n} on {device}" for device, n in BATCH_SIZE.items())
    size.add_argument("-b", "--batch-size", type=positive, metavar="N", help=f"default: {defaults}")
    size.add_argument("--img-size", type=positive, metavar="N", help="default: the model's")
    size.add_argument("--input-size", type=positive, nargs=3, metavar=("C", "H", "W"))
    size.add_argument("--channels-last", action="store_true", help="NHWC memory layout")
    size.add_argument(
        "--precision", choices=PRECISIONS, default="float32", help="default: %(default)s"
    )
    size.add_argument("--amp", action="store_true", help="--precision amp")
    size.add_argument(
        "--amp-dtype",
        choices=("float16", "bfloat16"),
        help="default: float16 on cuda, else bfloat16",
    )


def _add_running(sub: argparse.ArgumentParser) -> None:
    run = sub.add_argument_group("running")
    run.add_argument("--device", metavar="NAME", help="default: cuda where there is one, else cpu")
    run.add_argument("--num-warm-iter", type=positive, default=10, metavar="N", help="default: 10")
    run.add_argument("--num-bench-iter", type=positive, default=40, metavar="N", help="default: 40")
    run.add_argument(
        "--torchcompile",
        nargs="?",
        const="inductor",
        metavar="BACKEND",
        help="torch.compile (default backend: inductor)",
    )
    run.add_argument("--no-retry", action="store_true", help="fail where memory runs out")
    run.add_argument("--grad-checkpointing", action="store_true", help="in training")
    run.add_argument("--opt", choices=("sgd", "adamw"), default="sgd", help="default: sgd")
    run.add_argument("--detail", action="store_true", help="forward, backward and optimizer apart")


def _add_results(sub: argparse.ArgumentParser) -> None:
    output = sub.add_argument_group("results")
    output.add_argument(
        "--results-file", type=output_file, metavar="FILE", help="write them there too"
    )
    output.add_argument("--results-format", choices=("csv", "json"), default="csv")


def benchmark(args: BenchmarkArguments) -> int:
    """Run the command; prints the result and returns the exit code."""
    from ..arch import find_variant

    device = device_of(args.device)
    variant = find_variant(args.model)
    if args.compare and args.bench == "train":
        raise ValueError("--compare times inference: leave --bench train out, or take both")
    bench = Benchmark.of(args, variant, device)
    results = {"model": variant.name, **_measured(args, bench), **bench.surroundings()}
    if args.results_file:
        write_results(args.results_file, results, args.results_format)
    # The marker by which timm's bulk scripts find the result.
    print(f"--result\n{json.dumps(results, indent=4)}")
    if args.results_file:
        note(f"wrote {args.results_file}")
    if "error" in results:
        note(f"error: {results['error']}")
        return 1
    return 0


COMMAND = Command(
    "benchmark",
    "time one model, with timm's flags and result keys",
    add_benchmark,
    BenchmarkArguments,
    benchmark,
)


def _measured(args: BenchmarkArguments, bench: Benchmark) -> dict[str, Any]:
    """The figures that ``--bench`` names, or ``error`` where not even one image fits."""
    from ..ops import use_backend

    results: dict[str, Any] = {}
    batch = args.batch_size or BATCH_SIZE.get(bench.device.type, BATCH_SIZE["cpu"])
    runs = {"infer": bench.inference, "train": bench.training}
    if args.bench != "both":
        del runs["train" if args.bench == "inference" else "infer"]
    with use_backend(args.backend):
        for prefix, measure in runs.items():
            try:
                found = with_smaller_batches(measure, batch, retry=not args.no_retry)
            except OutOfMemory as error:
                return {**results, "error": str(error)}
            results |= {f"{prefix}_{key}": value for key, value in found.items()}
    return {**results, "param_count": round(bench.arch.params / 1e6, 2)}


class OutOfMemory(Exception):
    """Memory ran out at a batch of one image, or with ``--no-retry``."""


def smaller_batch(batch: int) -> int:
    """The next batch to try: the next power of two below, or half-way to it. 1 gives 0.

    timm's steps: 64, 48, 32, 24, 16, 12, 8, 6, 4, 3, 2, 1.
    """
    power = 1 << (batch.bit_length() - 1)
    if batch == power:
        return power * 3 // 4 if power > 2 else power - 1
    half_way = power * 3 // 2
    return half_way if batch > half_way else power


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a GPU or on the host."""
    import torch

    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(
        words in text for words in ("out of memory", "can't allocate memory", "not enough memory")
    )


def with_smaller_batches(
    measure: Callable[[int], dict[str, Any]], batch: int, retry: bool = True
) -> dict[str, Any]:
    """``measure(batch)``, with smaller batches while memory runs out.

    Raises:
        OutOfMemory: it ran out at 1 image, or at the first try without ``retry``.
    """
    import torch

    while True:
        try:
            return measure(batch)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            # MemoryError often has no message.
            reason = (str(error) or type(error).__name__).splitlines()[0]
            told = f"out of memory at batch {batch}: {reason}"
        # After the handler, because its traceback keeps the tensors of the failed try alive.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        next_batch = smaller_batch(batch)
        if not retry or not next_batch:
            raise OutOfMemory(told)
        note(f"{told}; trying {next_batch}")
        batch = next_batch


class Benchmark:
    """The measurements of one model; each builds the model again.

    Args:
        fresh: builds the model.
        arch: of the model.
        input_size: (C, H, W).
        precision: one of `PRECISIONS`.
    """

    def __init__(
        self,
        args: BenchmarkArguments,
        fresh: Callable[[], Any],
        arch: Arch,
        input_size: tuple[int, int, int],
        device: torch.device,
        precision: str,
    ) -> None:
        import torch

        self.args, self.fresh, self.arch, self.input_size = args, fresh, arch, input_size
        self.device, self.precision = device, precision
        self.dtype = getattr(torch, "float32" if precision == "amp" else precision)
        default = "float16" if device.type == "cuda" else "bfloat16"
        self.amp_dtype = getattr(torch, args.amp_dtype or default)
        self.layout = torch.channels_last if args.channels_last else torch.contiguous_format

    @classmethod
    def of(cls, args: BenchmarkArguments, variant: Variant, device: torch.device) -> Benchmark:
        """The benchmark of a published variant, with the flags' changes.

        Raises:
            ValueError: the image is smaller than a patch.
        """
        from ..modules.model import create_model

        in_chans, height, width = args.input_size or variant.input_size
        if args.img_size:
            height = width = args.img_size
        kwargs: dict[str, Any] = {"in_chans": in_chans}
        if args.act:
            kwargs["act_layer"] = args.act
        if args.num_classes:
            kwargs["num_classes"] = args.num_classes

        def fresh() -> Any:
            return create_model(variant.name, **kwargs)

        arch = fresh().arch
        if min(height, width) < arch.patch_size:
            raise ValueError(
                f"an image of {height}x{width} px is smaller than a patch of "
                f"{arch.patch_size}x{arch.patch_size}: raise --img-size"
            )
        precision = "amp" if args.amp or args.amp_dtype else args.precision
        return cls(args, fresh, arch, (in_chans, height, width), device, precision)

    def inference(self, batch: int) -> dict[str, Any]:
        """Images a second in eval mode, and the cost of one image."""
        import torch

        from ..diagnostics.explain import explain
        from ..diagnostics.timing import interleaved_times
        from ..modules.for_inference import optimize_for_inference
        from ..modules.optimize import to_reference

        model = optimize_for_inference(self._model().eval())
        x = self._images(batch)
        network = self._compiled(model)
        with torch.no_grad(), self._autocast():
            backends = sorted({row.backend for row in explain(network, x)})
        runs: dict[str, Any] = {"ours": self._call(network, x)}
        errors: dict[str, float] = {}
        if self.args.compare:
            plain = to_reference(model)
            runs["eager"] = self._call(plain, x)
            with torch.inference_mode():
                errors = self._checked(runs["ours"](), plain, x)
        compared = ", compared with eager PyTorch" if "eager" in runs else ""
        size = "x".join(map(str, self.input_size))
        note(f"infer: batches of {batch} x {size} on {self.device}{compared}")
        with torch.inference_mode():
            times = interleaved_times(
                runs, self.args.num_bench_iter, warmup=self.args.num_warm_iter
            )
        return self._inference_result(times, batch, backends) | errors

    def _inference_result(
        self, times: dict[str, Any], batch: int, backends: list[str]
    ) -> dict[str, Any]:
        size = self.input_size[1:]
        ours = _rates(times["ours"], batch)
        result = {
            **ours,
            "batch_size": batch,
            "img_size": size[-1],
            "gmacs": round(self.arch.macs_timm(size) / 1e9, 2),
            "macts": round(self.arch.macts_timm(size) / 1e6, 2),
            "gmacs_true": round(self.arch.macs(size).total / 1e9, 2),
            "backend": "+".join(backends),
        }
        if "eager" in times:
            eager = _rates(times["eager"], batch)
            result |= {f"eager_{key}": value for key, value in eager.items()}
            result["speedup"] = round(eager["step_time"] / ours["step_time"], 3)
        return result

    def training(self, batch: int) -> dict[str, Any]:
        """Images a second of a whole step: forward, loss, backward, optimizer."""
        from ..diagnostics.timing import timestamps

        parts = self._training_step(batch)
        for _ in range(self.args.num_warm_iter):
            timestamps(parts, self._synchronize)
        seconds: list[list[float]] = []
        for i in range(self.args.num_bench_iter):
            # Without --detail, no clock is read and no device is waited for within a step.
            between = self._synchronize if self.args.detail else None
            seconds.append(timestamps(parts, self._synchronize, between))
            self._report_progress("train", i + 1, batch, sum(map(sum, seconds)))
        result = {
            **_rates([sum(step) for step in seconds], batch),
            "batch_size": batch,
            "img_size": self.input_size[-1],
        }
        if self.args.detail:
            names = ("fwd_time", "bwd_time", "opt_time")
            columns = zip(*seconds, strict=True)
            result |= {
                name: round(1e3 * sum(column) / len(seconds), 3)
                for name, column in zip(names, columns, strict=True)
            }
        return result

    def _training_step(self, batch: int) -> tuple[Callable[..., Any], ...]:
        """Forward, backward and optimizer step; each takes the result of the one before."""
        import torch
        from torch import nn

        model = self._model().train()
        if self.args.grad_checkpointing:
            model.set_grad_checkpointing()
        x = self._images(batch)
        target = torch.randint(model.num_classes, (batch,), dtype=torch.int64, device=self.device)
        loss_of = nn.CrossEntropyLoss()
        optimizer: torch.optim.Optimizer
        if self.args.opt == "sgd":
            optimizer = torch.optim.SGD(
                model.parameters(), lr=1e-4, momentum=0.9, weight_decay=1e-4
            )
        else:
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        network = self._compiled(model)

        def forward() -> Tensor:
            optimizer.zero_grad()
            with self._autocast():
                loss: Tensor = loss_of(network(x), target)
            return loss

        return forward, lambda loss: loss.backward(), lambda _: optimizer.step()

    def surroundings(self) -> dict[str, Any]:
        """The device, precision and software that the figures belong to."""
        import torch

        from ..diagnostics.doctor import cpu_name

        on_gpu = self.device.type == "cuda"
        name = torch.cuda.get_device_name(self.device) if on_gpu else cpu_name()
        return {
            "device": name,
            "threads": torch.get_num_threads(),
            "precision": self.precision,
            "channels_last": self.args.channels_last,
            "torchcompile": self.args.torchcompile or "",
            "torch": torch.__version__,
        }

    def _model(self) -> Any:
        from ..testing import trained_like_

        model = self.fresh()
        # With freshly initialised weights the values of a deep network grow to infinity in
        # float16, and no output could be checked.
        trained_like_(model, (4, self.input_size[0], *[4 * model.arch.patch_size] * 2))
        return model.to(device=self.device, dtype=self.dtype, memory_format=self.layout)

    def _images(self, batch: int) -> Tensor:
        import torch

        x = torch.randn((batch, *self.input_size), device=self.device, dtype=self.dtype)
        return x.contiguous(memory_format=self.layout)

    def _compiled(self, model: nn.Module) -> nn.Module:
        import torch

        if not self.args.torchcompile:
            return model
        compiled: nn.Module = torch.compile(model, backend=self.args.torchcompile)  # type: ignore[assignment]
        return compiled

    def _autocast(self) -> AbstractContextManager[Any]:
        import torch

        if self.precision != "amp":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.amp_dtype)

    def _synchronize(self) -> None:
        import torch

        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _call(self, model: nn.Module, x: Tensor) -> Callable[[], Tensor]:
        def call() -> Tensor:
            with self._autocast():
                y: Tensor = model(x)
            self._synchronize()
            return y

        return call

    def _checked(self, ours: Tensor, plain: nn.Module, x: Tensor) -> dict[str, float]:
        """Largest errors for the first image against float64, ours and eager PyTorch's.

        Raises:
            RuntimeError: our result is outside the numerics rule.
        """
        import copy

        from ..testing import error_report

        one = x[:1]
        exact = copy.deepcopy(plain).double()(one.double())
        report = error_report(ours[:1], self._call(plain, one)(), exact)
        if not report.ok:
            raise RuntimeError(f"no speed for a wrong result, outside the numerics rule: {report}")
        return {"max_error": report.max_error, "eager_max_error": report.torch_max_error}

    def _report_progress(self, what: str, done: int, batch: int, seconds: float) -> None:
        total = self.args.num_bench_iter
        if done % max(1, total // 5) == 0:
            note(f"{what}: step {done} of {total}, {done * batch / seconds:.2f} img/s")


def _rates(seconds: list[float], batch: int) -> dict[str, float]:
    """timm's two columns, over all steps: images a second, and milliseconds a step."""
    total = sum(seconds)
    return {
        "samples_per_sec": round(len(seconds) * batch / total, 2),
        "step_time": round(1e3 * total / len(seconds), 3),
    }


def write_results(path: str, results: dict[str, Any], format: str) -> None:
    """Write one result as a table of one row or as JSON, atomically.

    Raises:
        OSError: the file cannot be written.
    """
    if format == "json":
        write_whole(path, json.dumps(results, indent=4) + "\n")
        return
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, results, lineterminator="\n")
    writer.writeheader()
    writer.writerow(results)
    write_whole(path, text.getvalue())
