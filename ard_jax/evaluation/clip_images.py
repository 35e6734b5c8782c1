"""Pictures as a CLIP is shown them: a square of its side, normalised. NumPy and Pillow alone."""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from ard_jax.errors import UserError

# Of the pictures that OpenAI trained on, red, green and blue in [0, 1]; LAION, PickScore and HPSv2 kept them.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STANDARD_DEVIATION = (0.26862954, 0.26130258, 0.27577711)
FITS = ("crop", "pad")


def images_for_clip(images: Sequence[Image.Image | np.ndarray], side: int = 224, fit: str = "crop") -> np.ndarray:
    """Pictures of any sizes → one batch for `CLIP.encode_image`.

    Args:
        images: pictures, at least one: Pillow's, or uint8 arrays (height, width, channel) of 1 or 3 channels. What is
            transparent is shown on white.
        side: of the model's images, its `image_size`.
        fit: "crop" brings the shortest side to `side` and cuts the middle out (transformers' `CLIPImageProcessor`);
            "pad" brings the longest side to it and fills up with black on both sides (HPSv2's `ResizeMaxSize`). Both
            resize by Pillow's bicubic filter.

    Returns:
        float32 (batch, side, side, 3), minus `MEAN`, over `STANDARD_DEVIATION`.

    Raises:
        UserError: there is no picture, `fit` or `side` is none, or an array is no picture.
    """
    if fit not in FITS:
        raise UserError(f"fit is {fit!r}, which does not exist: choose one of {', '.join(FITS)}.")
    if side < 1:
        raise UserError(f"side is {side}, but it must be at least 1: give the image_size of the CLIP.")
    if not len(images):
        raise UserError("There is no image to show to a CLIP: give at least one.")
    square = _crop if fit == "crop" else _pad
    pixels = np.stack([np.asarray(square(_picture(image), side)) for image in images])
    mean, deviation = (np.array(numbers, np.float32) for numbers in (MEAN, STANDARD_DEVIATION))
    return (pixels.astype(np.float32) / 255 - mean) / deviation


def _picture(image: Image.Image | np.ndarray) -> Image.Image:
    """In red, green and blue, on white where it is transparent."""
    if not isinstance(image, Image.Image):
        array = np.asarray(image)
        if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] not in (1, 3) or not array.size:
            raise UserError(
                f"An image is {array.dtype} of shape {array.shape}, but uint8 (height, width, channel) of 1 or 3 "
                f"channels was expected: bring it to 0 … 255 and put its channels last."
            )
        return Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array).convert("RGB")
    if image.mode.startswith(("I", "F")):  # convert() would clip those to 255 without a word
        raise UserError(f"An image has {image.mode} pixels, but 8 bits a channel are needed: convert it.")
    if not image.has_transparency_data:
        return image.convert("RGB")
    page = Image.new("RGBA", image.size, "white")
    page.alpha_composite(image.convert("RGBA"))
    return page.convert("RGB")


def _crop(image: Image.Image, side: int) -> Image.Image:
    """The middle square. Sizes and the left upper corner are rounded down, as in transformers."""
    shortest = min(image.size)
    width, height = (side * length // shortest for length in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - side) // 2, (height - side) // 2
    return image.crop((left, top, left + side, top + side))


def _pad(image: Image.Image, side: int) -> Image.Image:
    """The whole picture on black, the odd pixel of it to the right and below."""
    scale = side / max(image.size)
    width, height = (max(1, round(length * scale)) for length in image.size)
    page = Image.new("RGB", (side, side))
    page.paste(image.resize((width, height), Image.Resampling.BICUBIC), ((side - width) // 2, (side - height) // 2))
    return page
