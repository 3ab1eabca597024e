"""Images in, predictions out."""

from .batches import Batch, image_batches, load_image
from .heatmap import Heatmap, class_activation_map, overlay, write_overlay
from .images import IMG_EXTENSIONS, ImageError, find_images, read_image
from .labels import class_labels, imagenet_labels, read_labels
from .preprocessing import INTERPOLATIONS, Preprocessing
from .results import Prediction, ResultFile, columns, top_predictions
from .sources import Source, open_source
from .streaming import StreamStats, stream

__all__ = [
    "IMG_EXTENSIONS",
    "INTERPOLATIONS",
    "Batch",
    "Heatmap",
    "ImageError",
    "Prediction",
    "Preprocessing",
    "ResultFile",
    "Source",
    "StreamStats",
    "class_activation_map",
    "class_labels",
    "columns",
    "find_images",
    "image_batches",
    "imagenet_labels",
    "load_image",
    "open_source",
    "overlay",
    "read_image",
    "read_labels",
    "stream",
    "top_predictions",
    "write_overlay",
]
