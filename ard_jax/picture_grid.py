"""Pictures laid out in a grid (Pillow)."""

import numpy as np
from PIL import Image

from ard_jax.errors import UserError

GUTTER = 2  # pixels


def check_images(images: np.ndarray) -> np.ndarray:
    """Returns `images` as an array if it is uint8 (N, H, W, C) with N ≥ 1 and C of 1 or 3.

    Raises:
      UserError: if it is anything else.
    """
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3) or 0 in images.shape:
        raise UserError(
            f"Pictures of type {images.dtype} and shape {images.shape} cannot be shown: hand over uint8 pictures "
            "(number, height, width, channel) with 1 or 3 channels."
        )
    return images


def enlarge(images: np.ndarray, side: int) -> np.ndarray:
    """Repeats pixels of (N, H, W, C) by the smallest whole factor that brings the longer side to `side` or more."""
    factor = max(1, -(-side // max(images.shape[1:3])))
    return images.repeat(factor, axis=1).repeat(factor, axis=2)


def image_grid(images: np.ndarray, columns: int, side: int = 64) -> Image.Image:
    """Lays pictures out in rows, left to right and top to bottom, with thin white gutters between them.

    Args:
      images: uint8 (N, H, W, C), C = 1 gray or 3 RGB.
      columns: pictures in a row; the last row may be short.
      side: small pictures are enlarged by whole pixels until their longer side has at least so many.

    Raises:
      UserError: if `images` or `columns` cannot be laid out.
    """
    images = check_images(images)
    if columns < 1:
        raise UserError(f"A grid of {columns} columns holds no picture: ask for 1 column or more.")
    images = enlarge(images, side)
    count, height, width, channels = images.shape
    columns = min(columns, count)
    rows = -(-count // columns)
    down, across = height + GUTTER, width + GUTTER
    canvas = np.full((rows * down - GUTTER, columns * across - GUTTER, channels), 255, np.uint8)
    for index, image in enumerate(images):
        top, left = index // columns * down, index % columns * across
        canvas[top : top + height, left : left + width] = image
    return to_pillow(canvas)


def to_pillow(image: np.ndarray) -> Image.Image:
    """A picture (H, W, C), with C of 1 or 3."""
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
