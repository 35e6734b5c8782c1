"""Labelled images, and the endless, resumable stream of batches that training reads.

A *source*, `Source`, is random-access as Grain's are: `len(source)` records, `source[i]` a dict of arrays.
`image_source` makes one from digits, TFDS or a folder; the trajectory store is another; `stream` batches any of them.
"""

from ard_jax.data.memory import InMemory, Source, in_memory
from ard_jax.data.pixels import MODES, center_crop, to_uint8
from ard_jax.data.sources import IMAGE_SUFFIXES, class_names, image_source, labels_and_images
from ard_jax.data.stream import Joined, stream

__all__ = [
    "IMAGE_SUFFIXES",
    "MODES",
    "InMemory",
    "Joined",
    "Source",
    "center_crop",
    "class_names",
    "image_source",
    "in_memory",
    "labels_and_images",
    "stream",
    "to_uint8",
]
