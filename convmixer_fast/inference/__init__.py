"""Images in, predictions out."""

from .batches import Batch, Prepare, image_batches, load_image
from .files import ResultFile
from .images import IMG_EXTENSIONS, ImageError, find_images, read_image, read_image_list
from .labels import class_labels, imagenet_labels, read_labels
from .predictor import Outcome, Predictor
from .preprocessing import INTERPOLATIONS, NativeSize, Preprocessing, preprocessing_for
from .results import Columns, Failure, Prediction, Vector, rows_of, top_predictions

__all__ = [
    "IMG_EXTENSIONS",
    "INTERPOLATIONS",
    "Batch",
    "Columns",
    "Failure",
    "ImageError",
    "NativeSize",
    "Outcome",
    "Prediction",
    "Predictor",
    "Prepare",
    "Preprocessing",
    "ResultFile",
    "Vector",
    "class_labels",
    "find_images",
    "image_batches",
    "imagenet_labels",
    "load_image",
    "preprocessing_for",
    "read_image",
    "read_image_list",
    "read_labels",
    "rows_of",
    "top_predictions",
]
