"""Streaming: one image of any size through a ConvMixer, row by row, in memory that does not grow.

* run.py: `stream`, which opens images and groups those of one size.
* one_pass.py: one pass of an image through the model, in bands from top to bottom.
* model.py: the model's parts, checked.
* pixels.py: stored values as input of the stem.
* outputs.py: what is collected from the last block: sums for the pool, cells of a heatmap, the map.
* state.py: the file from which an interrupted stream continues.

The arithmetic of the bands is in `inference.bands`.
"""

from .model import OUTPUTS, reason_not_streamable, whole_image_bytes
from .one_pass import HEATMAP_CELLS, StreamStats
from .outputs import PICTURE_PIXELS
from .pixels import Pixels, default_preprocessing
from .run import CHECKPOINT_ROWS, stream

__all__ = [
    "CHECKPOINT_ROWS",
    "HEATMAP_CELLS",
    "OUTPUTS",
    "PICTURE_PIXELS",
    "Pixels",
    "StreamStats",
    "default_preprocessing",
    "reason_not_streamable",
    "stream",
    "whole_image_bytes",
]
