"""PixArt: a `PixArtSigmaPipeline` or `PixArtAlphaPipeline` of diffusers, its transformer, or the authors' file."""

import dataclasses
import math
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from ard_jax.convert import pixart
from ard_jax.convert.families.base import STUDENT_HINTS, Hints, Source, config_of_model
from ard_jax.convert.families.diffusers_folder import scheduler_settings
from ard_jax.convert.families.folders import (
    PART,
    PIPELINE,
    find_text_encoder,
    folder_class,
    folder_license,
    holds_transformer,
    part_files,
    read_description,
)
from ard_jax.convert.published import NULL_CAPTION, check_published, has_positions
from ard_jax.errors import UserError
from ard_jax.models import PixArt
from ard_jax.models.pixart import LATENT_SIDE, SIZES
from ard_jax.weights.lazy import Tensors
from ard_jax.weights.tensors import open_tensors, to_float32

PIPELINES = ("PixArtSigmaPipeline", "PixArtAlphaPipeline")
CAPTION = "y_embedder.y_proj.fc1.weight"  # of the authors' names, which no DiT has
SIZE = "csize_embedder.mlp.0.weight"
NULL_CAPTION_FILE = "null_caption.npz"  # the empty caption of the authors' file, which goes out with it again
HEADS = {1152: 16}  # of the published width
INTERPOLATIONS = (0.5, 1.0, 2.0, 4.0)
# Longest caption and how captions are cleaned, of Σ and of α.
TEXT = {True: {"length": 300, "cleaning": "none"}, False: {"length": 120, "cleaning": "clean"}}
GUIDANCE, STEPS = 4.5, 20  # what both pipelines have


def recognise(path: pathlib.Path, hints: Hints) -> Source | None:
    """A pipeline's folder, or a transformer's.

    Raises:
        UserError: it is not whole, describes a network or a scheduler that we do not have, or contradicts `hints`.
    """
    if folder_class(path, PIPELINE) in PIPELINES:
        return _open_pipeline(path, hints)
    if holds_transformer(path, pixart.CLASS):
        return _open_transformer(path, hints, is_sigma=None)
    return None


def _open_pipeline(folder: pathlib.Path, hints: Hints) -> Source:
    index, scheduler, vae = folder / PIPELINE, folder / "scheduler" / "scheduler_config.json", folder / "vae"
    is_sigma = folder_class(folder, PIPELINE) == PIPELINES[0]
    source = _open_transformer(folder / "transformer", hints, is_sigma)
    assert source.config is not None
    source.config.diffusion.update(scheduler_settings(read_description(scheduler), scheduler, True))
    read_description(vae / PART)
    source.config.captions.encoder = find_text_encoder(folder)
    return dataclasses.replace(
        source,
        what=f"a {folder_class(folder, PIPELINE)} of diffusers",
        files=(index, scheduler, *source.files),
        vae=vae,
        license=hints.license or folder_license(folder),
    )


def _open_transformer(folder: pathlib.Path, hints: Hints, is_sigma: bool | None) -> Source:
    """`is_sigma` is None where nothing but its shapes tell."""
    described, tensors = read_description(folder / PART), open_tensors(folder)
    has_size = "adaln_single.emb.resolution_embedder.linear_1.weight" in tensors.shapes
    if is_sigma:  # what diffusers makes of an interpolation that is left out is not Σ's at 256 px
        scale = described.get("interpolation_scale")
        described["interpolation_scale"] = described.get("sample_size", 128) / 64 if scale is None else scale
    described["use_additional_conditions"] = has_size  # left out, it means that a side of 128 is told its size
    model = pixart.pixart_model(described)
    hints.check_agreement(folder, num_heads=model.num_heads, objective="noise")
    hints.check_absent(f"{folder} holds a teacher of diffusers", "weights", "frequency_shift", *STUDENT_HINTS)
    return Source(
        what="a PixArt transformer of diffusers",
        files=part_files(folder),
        config=_config(model, hints, is_sigma is not False and not has_size),
        model=model,
        tensors=pixart.published_names(to_float32(tensors, folder), model),
        license=hints.license or folder_license(folder),
    )


def _config(model: PixArt, hints: Hints, is_sigma: bool) -> Any:
    """A config that makes this model, and draws as the published pipelines do."""
    config = config_of_model(model, hints)
    config.data.space = "latent"
    config.captions.update(TEXT[is_sigma])
    config.diffusion.update(guidance_scale=GUIDANCE, guided_channels=0, solver="dpm++2m", spacing="dpm", steps=STEPS)
    return config


def open_published(path: pathlib.Path, tensors: Tensors, container: str, hints: Hints) -> Source:
    """The authors' file, once its arrays are known.

    Args:
        path: of the file, whose name may tell which published network it is.
        tensors: by the authors' names, float32.
        container: the words for what held them.
        hints: of the user.

    Raises:
        UserError: the names or shapes are no PixArt's, or nothing tells its heads or how its positions are scaled.
    """
    hints.check_absent(f"{path} holds a PixArt teacher", "frequency_shift", *STUDENT_HINTS)
    hints.check_agreement(path, objective="noise")
    name = next((name for name in SIZES if re.match(rf"{re.escape(name)}(?![\w-])", path.name)), None)
    model = published_model(tensors, name, hints.num_heads)
    check_published(tensors.shapes, model)
    length = tensors.shapes[NULL_CAPTION][0] if NULL_CAPTION in tensors.shapes else None
    config = _config(model, hints, is_sigma="Sigma" in name if name else length != TEXT[False]["length"])
    return Source(
        what=f"PixArt teacher{f' {name}' if name else ''}, {container} with the published names",
        files=(path,),
        config=config,
        model=model,
        tensors=tensors,
        null_caption=tensors.stored.get(NULL_CAPTION),
        license=hints.license,
    )


def published_model(tensors: Mapping[str, np.ndarray], name: str | None, num_heads: int | None) -> PixArt:
    """The network of the authors' arrays.

    Args:
        tensors: by the authors' names.
        name: of a published network, if it is known to be one.
        num_heads: if the user says it.

    Raises:
        UserError: nothing tells its heads, or how its positions are scaled.
    """
    shapes = tensors.shapes if isinstance(tensors, Tensors) else {key: np.shape(a) for key, a in tensors.items()}
    width, channels, patch_size, _ = shapes["x_embedder.proj.weight"]
    heads = num_heads or HEADS.get(width)
    if not heads:
        raise UserError(f"nothing tells the attention heads of this PixArt of width {width}: give --num-heads.")
    blocks = [int(found[1]) for key in shapes if (found := re.match(r"blocks\.(\d+)\.", key))]
    fields: dict[str, Any] = {
        "channels": channels,
        "patch_size": patch_size,
        "hidden_size": width,
        "depth": 1 + max(blocks, default=0),
        "num_heads": heads,
        "mlp_ratio": (shapes.get("blocks.0.mlp.fc1.weight") or (4 * width,))[0] / width,
        "learn_sigma": shapes["final_layer.linear.weight"][0] == 2 * channels * patch_size**2,
        "caption_width": shapes[CAPTION][1],
        "size_conditioning": SIZE in shapes,
        "null_mask": "caption",
    }
    if name:
        pixels, interpolation, _, _ = SIZES[name]
        return PixArt(**fields, image_size=pixels // LATENT_SIDE, interpolation=interpolation)
    if "pos_embed" in shapes:
        table, side = np.asarray(tensors["pos_embed"]), math.isqrt(math.prod(shapes["pos_embed"][:-1]))
        for interpolation in INTERPOLATIONS:
            model = PixArt(**fields, image_size=side * patch_size, interpolation=interpolation)
            if has_positions(table, model):
                return model
    raise UserError(
        f"nothing tells how this PixArt's positions are scaled: name its file as it was published, such as "
        f"{next(reversed(SIZES))}.pth, or convert its diffusers folder."
    )
