"""Inference on images: reading, preprocessing, prediction, evaluation, heatmaps, streaming."""

from .batches import Batch, Prepare, image_batches, load_image
from .files import ResultFile
from .heatmap import (
    Heatmap,
    HeatmapFolder,
    class_activation_map,
    overlay,
    write_overlay,
    write_scores,
)
from .images import (
    IMG_EXTENSIONS,
    ImageError,
    LeftOut,
    find_images,
    read_image,
    read_image_list,
    readable_formats,
    readable_suffixes,
)
from .labels import class_labels, imagenet_labels, read_labels
from .predictor import Outcome, Predictor
from .preprocessing import INTERPOLATIONS, NativeSize, Preprocessing, preprocessing_for
from .results import Columns, Failure, Prediction, Vector, rows_of, top_predictions
from .sources import Source, open_source
from .streaming import StreamStats, stream

__all__ = [
    "IMG_EXTENSIONS",
    "INTERPOLATIONS",
    "Batch",
    "Columns",
    "Failure",
    "Heatmap",
    "HeatmapFolder",
    "ImageError",
    "LeftOut",
    "NativeSize",
    "Outcome",
    "Prediction",
    "Predictor",
    "Prepare",
    "Preprocessing",
    "ResultFile",
    "Source",
    "StreamStats",
    "Vector",
    "class_activation_map",
    "class_labels",
    "find_images",
    "image_batches",
    "imagenet_labels",
    "load_image",
    "open_source",
    "overlay",
    "preprocessing_for",
    "read_image",
    "read_image_list",
    "read_labels",
    "readable_formats",
    "readable_suffixes",
    "rows_of",
    "stream",
    "top_predictions",
    "write_overlay",
    "write_scores",
]
