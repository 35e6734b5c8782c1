"""Labelled images, and the endless, resumable stream of batches that training reads.

A *source*, `Source`, is random-access as Grain's are: `len(source)` records, `source[i]` a dict of arrays.
`image_source` makes one from digits, TFDS or a folder, with classes or captions; the trajectory store is another;
`data.stream`, which alone imports Grain, batches any of them.
"""

from ard_jax.data.captioned import lines_of, read_lines, read_text
from ard_jax.data.memory import InMemory, Source, check_records, in_memory
from ard_jax.data.pixels import MODES, as_shown, center_crop, to_uint8
from ard_jax.data.real import check_real, open_real
from ard_jax.data.sources import (
    Identity,
    PixelRows,
    captions_of,
    identify,
    image_source,
    labels_and_images,
    tfds_texts,
)

__all__ = [
    "MODES",
    "Identity",
    "InMemory",
    "PixelRows",
    "Source",
    "as_shown",
    "captions_of",
    "center_crop",
    "check_real",
    "check_records",
    "identify",
    "image_source",
    "in_memory",
    "labels_and_images",
    "lines_of",
    "open_real",
    "read_lines",
    "read_text",
    "tfds_texts",
    "to_uint8",
]
