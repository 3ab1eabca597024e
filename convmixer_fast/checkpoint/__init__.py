"""Checkpoints: reading the ConvMixer files of other libraries, loading them, and writing them.

Each module imports only from those above it:

* `formats`: key names, their conversion, shapes.
* `structure`: the search for a ConvMixer among nested mappings.
* `storage`: safetensors files and pickles, opened without running code.
* `metadata`: activation, preprocessing and labels that a file states.
* `reading`: a source becomes a `Checkpoint`.
* `loading`: a checkpoint goes into a model.
* `saving`: a model goes into a file.

Dim, depth, kernel, patch, channels and classes follow from the shapes. The activation does not: it
comes from the metadata of the file, from the published variant, or from the user.
"""

from .formats import FORMATS, CheckpointError, convert_state_dict
from .loading import LoadResult, build_model_kwargs, load_checkpoint
from .metadata import RECIPE
from .reading import Checkpoint, read_checkpoint
from .saving import save_checkpoint
from .storage import Source
from .structure import detect_format

# Pickles and tracebacks carry the public path, which does not change when a class moves.
for _class in (Checkpoint, CheckpointError, LoadResult):
    _class.__module__ = __name__
del _class

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
