"""ConvMixer as fast as the hardware allows, a drop-in for timm, mmpretrain and the original."""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from .arch import ACTIVATIONS, VARIANTS, Arch
from .checkpoint import CheckpointError, load_checkpoint, read_checkpoint, save_checkpoint
from .diagnostics.explain import explain
from .diagnostics.tune import tune
from .modules.blocks import MixerBlock
from .modules.for_inference import optimize_for_inference
from .modules.halves import DepthwiseMix, PointwiseMix
from .modules.model import ConvMixer, create_model, list_models
from .modules.optimize import optimization_report, optimize, restore, to_reference
from .modules.stack import MixerStack, refresh
from .ops import BackendError, available_backends, use_backend

if TYPE_CHECKING:
    from .inference import Predictor, stream

# They need Pillow, which a model alone does not: imported when first asked for.
_LATER = {"Predictor": "inference", "stream": "inference"}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_LATER[name]}", __name__), name)


try:
    __version__ = version("convmixer_fast")
except PackageNotFoundError:  # run from a checkout that was never installed
    __version__ = "0+unknown"

__all__ = [
    "ACTIVATIONS",
    "VARIANTS",
    "Arch",
    "BackendError",
    "CheckpointError",
    "ConvMixer",
    "DepthwiseMix",
    "MixerBlock",
    "MixerStack",
    "PointwiseMix",
    "Predictor",
    "__version__",
    "available_backends",
    "create_model",
    "explain",
    "list_models",
    "load_checkpoint",
    "optimization_report",
    "optimize",
    "optimize_for_inference",
    "read_checkpoint",
    "refresh",
    "restore",
    "save_checkpoint",
    "stream",
    "to_reference",
    "tune",
    "use_backend",
]
