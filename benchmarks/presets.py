"""Shapes, systems and time limits of the suites.

`PRESETS` are for CPUs, `GPU_PRESETS` for a GPU that torch sees.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

#: Batch size and thread count of the summary's figures.
BATCH, THREADS = 4, 2
#: Batch size that keeps a GPU busy.
GPU_BATCH = 64

#: Devices of the suites; those that torch does not see are left out.
DEVICES = ("cpu", "cuda")

#: Every model, from the quickest to the longest; 256/8 at its 32 pixels, the others at 224.
VARIANTS = ("256/8", "1024/20", "768/32", "1536/20")


@dataclass(frozen=True)
class BlockShape:
    """One block's input: (batch, channels, side, side)."""

    channels: int
    kernel_size: int
    side: int
    act: str

    def __str__(self) -> str:
        c, side = self.channels, self.side
        return f"{c} x {side} x {side}, k={self.kernel_size}, {self.act}"


#: The blocks of the published models at 224 pixels. 768/32 is trained with ReLU; GELU shows
#: the cost of the activation.
BLOCK_SHAPES = (
    BlockShape(1536, 9, 32, "gelu"),
    BlockShape(1024, 9, 16, "gelu"),
    BlockShape(768, 7, 32, "relu"),
    BlockShape(768, 7, 32, "gelu"),
)

#: Side of the large image of the scaling suite, in pixels.
LARGE_SIDE = 2048


@dataclass(frozen=True)
class Preset:
    """Extent of the measurements.

    ``systems`` are names in `competitors.SYSTEMS`; ``threads`` are a CPU's, ``dtypes`` a GPU's (a
    CPU's models are float32); ``large`` are the variants that get an image of `LARGE_SIDE`;
    ``resolution`` those that get one image of each of ``sides`` pixels, and ``resolution_batches``
    images of the usual size; ``photographs`` go through the batch pipeline. A group of systems that
    take turns is given as many rounds as fit into ``budget`` seconds, but at least ``least_rounds``
    and at most ``most_rounds``.

    The suite never_slower has a cell for each of ``cell_variants``, ``cell_settings`` (names in
    `settings.SETTINGS`), ``threads``, ``cell_batches`` and ``cell_sides``: ours against ``stock``,
    rounds within ``cell_budget`` seconds. A call that is expected to take more than
    ``cell_call_seconds`` is left out and noted.
    """

    variants: tuple[str, ...]
    batches: tuple[int, ...]
    threads: tuple[int, ...]
    block_batches: tuple[int, ...]
    memory_batches: tuple[int, ...]
    large: tuple[str, ...]
    resolution: tuple[str, ...]
    sides: tuple[int, ...]
    resolution_batches: tuple[int, ...]
    training_batches: tuple[int, ...]
    step_batches: tuple[int, ...]
    photographs: int
    systems: tuple[str, ...]
    least_rounds: int
    most_rounds: int
    budget: float
    cell_variants: tuple[str, ...]
    cell_settings: tuple[str, ...]
    cell_batches: tuple[int, ...]
    cell_sides: tuple[int, ...]
    cell_budget: float
    cell_call_seconds: float = 12.0
    stock: tuple[str, ...] = ("eager NCHW", "eager channels-last")
    dtypes: tuple[str, ...] = ("float32",)


PRESETS = {
    # Some minutes: no torch.compile, no model that takes seconds an image.
    "quick": Preset(
        variants=("256/8", "1024/20"),
        batches=(1, 4),
        threads=(THREADS,),
        block_batches=(1,),
        memory_batches=(1, 4),
        large=(),
        resolution=("1024/20",),
        sides=(64, 128, 256, 512),
        resolution_batches=(1, 2, 4, 8),
        training_batches=(4,),
        step_batches=(BATCH,),
        photographs=200,
        systems=("eager NCHW", "eager channels-last", "ONNX Runtime", "OpenVINO"),
        least_rounds=3,
        most_rounds=9,
        budget=10.0,
        cell_variants=("256/8", "1024/20"),
        cell_settings=("float32", "bfloat16"),
        cell_batches=(1,),
        cell_sides=(32, 64, 128),
        cell_budget=1.0,
    ),
    # All that the results in this repository contain.
    "full": Preset(
        variants=VARIANTS,
        batches=(1, 4, 16),
        threads=(THREADS, 1),
        block_batches=(1, 4),
        memory_batches=(1, 4, 16),
        large=("1024/20", "768/32"),
        resolution=("1024/20",),
        sides=(64, 128, 256, 512, 1024, 2048, 4096),
        resolution_batches=(1, 2, 4, 8, 16, 32, 64),
        training_batches=(4,),
        step_batches=(BATCH,),
        photographs=2000,
        systems=(
            "eager NCHW",
            "eager channels-last",
            "torch.compile",
            "torch.compile + layout_optimization=False",
            "torch.compile + freezing",
            "ONNX Runtime",
            "OpenVINO",
        ),
        least_rounds=3,
        most_rounds=15,
        budget=300.0,
        cell_variants=("256/8", "1024/20", "768/32"),
        cell_settings=("float32", "bfloat16", "autocast", "float16", "reduced"),
        cell_batches=(1, 4),
        cell_sides=(32, 64, 128, 224),
        cell_budget=1.5,
    ),
}

#: All that stock PyTorch has on a GPU: the best of these depends on model and card.
_GPU_SYSTEMS = (
    "ours + CUDA graph",
    "eager NCHW",
    "eager NCHW + cudnn.benchmark",
    "eager channels-last",
    "eager channels-last + cudnn.benchmark",
    "torch.compile",
    "torch.compile + layout_optimization=False",
    "TensorRT",
)

GPU_PRESETS = {
    "quick": dataclasses.replace(
        PRESETS["quick"],
        batches=(1, GPU_BATCH),
        block_batches=(GPU_BATCH,),
        resolution_batches=(1, 16, GPU_BATCH),
        training_batches=(GPU_BATCH,),
        step_batches=(GPU_BATCH,),
        systems=tuple(s for s in _GPU_SYSTEMS if s.startswith(("ours", "eager"))),
        dtypes=("bfloat16",),
    ),
    "full": dataclasses.replace(
        PRESETS["full"],
        batches=(1, GPU_BATCH, 256),
        block_batches=(1, GPU_BATCH),
        resolution_batches=(1, 2, 4, 8, 16, 32, 64, 128, 256),
        training_batches=(GPU_BATCH,),
        step_batches=(GPU_BATCH,),
        systems=_GPU_SYSTEMS,
        budget=30.0,
        dtypes=("bfloat16", "float16", "float32"),
    ),
}


def preset_of(name: str, device: str) -> Preset:
    return (PRESETS if device == "cpu" else GPU_PRESETS)[name]
