"""Images in, predictions out."""

from .batches import Batch, image_batches, load_image
from .images import IMG_EXTENSIONS, ImageError, find_images, read_image
from .labels import class_labels, imagenet_labels, read_labels
from .preprocessing import INTERPOLATIONS, Preprocessing
from .results import Prediction, ResultFile, columns, top_predictions

__all__ = [
    "IMG_EXTENSIONS",
    "INTERPOLATIONS",
    "Batch",
    "ImageError",
    "Prediction",
    "Preprocessing",
    "ResultFile",
    "class_labels",
    "columns",
    "find_images",
    "image_batches",
    "imagenet_labels",
    "load_image",
    "read_image",
    "read_labels",
    "top_predictions",
]
