"""Image files to arrays and back."""

import io
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from ard_jax.errors import UserError

MODES = {1: "L", 3: "RGB"}  # channels → Pillow's name of the mode


def decode(read_bytes: Callable[[], bytes], where: str, size: int, channels: int) -> np.ndarray:
    """An image file's bytes → float32 (size, size, channels) in [-1, 1]: what a viewer shows, on white."""
    try:
        image = Image.open(io.BytesIO(read_bytes()))
        image.load()
        shown = as_shown(image)
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error and more
        raise UserError(
            f"The image {where} cannot be read ({type(error).__name__}): repair it or remove it."
        ) from error
    if image.mode.startswith(("I", "F")):  # convert() would clip those to 255 without a word
        raise UserError(f"The image {where} has {image.mode} pixels, but 8 bits a channel are needed: convert it.")
    pixels = np.asarray(center_crop(shown.convert(MODES[channels]), size), np.float32)
    return pixels.reshape(size, size, channels) / 127.5 - 1


def as_shown(image: Image.Image) -> Image.Image:
    """A picture as viewers show it: turned as its EXIF orientation says, and on white where it is transparent."""
    image = ImageOps.exif_transpose(image)
    if not image.has_transparency_data or image.mode.startswith(("I", "F")):
        return image
    page = Image.new("RGBA", image.size, "white")
    page.alpha_composite(image.convert("RGBA"))
    return page.convert("RGB")


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """The middle square of an image, (size, size) pixels, shrunk as ADM and DiT do it.

    Halved with a box filter while the short side is at least twice `size`, then bicubic to it, then cut.
    Source: `center_crop_arr`, guided_diffusion/image_datasets.py (openai/guided-diffusion), train.py
    (facebookresearch/DiT); pixel for pixel the same, so that published teachers see what they learned from.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), resample=Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    image = image.resize((width, height), resample=Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))


def to_uint8(images: npt.ArrayLike) -> np.ndarray:
    """Images of any shape in [-1, 1] → uint8 grey levels 0 … 255, rounded; values outside are clipped.

    Raises:
      UserError: a pixel is NaN, which no grey level stands for.
    """
    levels = np.array(images, np.float32)  # of many images: nothing else as large is made
    levels += 1
    levels *= 127.5
    if levels.size and np.isnan(levels.max()):
        raise UserError(
            f"{np.isnan(levels).sum()} of {levels.size} pixels are NaN, but pictures need numbers: "
            "the model that made them has diverged, use an earlier checkpoint."
        )
    return np.clip(np.rint(levels, out=levels), 0, 255, out=levels).astype(np.uint8)
