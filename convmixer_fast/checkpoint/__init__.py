"""Checkpoints: reading the ConvMixer files of other libraries, loading them, and writing them."""

from .reading import (
    FORMATS,
    RECIPE,
    Checkpoint,
    CheckpointError,
    LoadResult,
    Source,
    build_model_kwargs,
    convert_state_dict,
    detect_format,
    load_checkpoint,
    read_checkpoint,
    save_checkpoint,
)

__all__ = [
    "FORMATS",
    "RECIPE",
    "Checkpoint",
    "CheckpointError",
    "LoadResult",
    "Source",
    "build_model_kwargs",
    "convert_state_dict",
    "detect_format",
    "load_checkpoint",
    "read_checkpoint",
    "save_checkpoint",
]
