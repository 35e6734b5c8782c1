"""Pipelines in the forms of others: a folder that diffusers opens, and one that runs without ard_jax."""

import logging
import pathlib
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from ard_jax.build import example_shape
from ard_jax.convert.diffusers import dit_to_diffusers
from ard_jax.convert.diffusers_pipeline import pipeline_class, scheduler_config
from ard_jax.convert.pixart import pixart_to_diffusers
from ard_jax.convert.stablehlo import Told, write_sampler, write_text_encoder
from ard_jax.convert.vae import vae_to_diffusers
from ard_jax.errors import UserError
from ard_jax.files import write_json
from ard_jax.pipeline.files import WEIGHTS
from ard_jax.pipeline.pipeline import ARDPipeline
from ard_jax.pipeline.prompts import copy_encoder, describe_encoder
from ard_jax.types import Caption
from ard_jax.weights.tensors import write_tensors

log = logging.getLogger("ard_jax")


def write_diffusers(pipe: ARDPipeline, folder: pathlib.Path) -> None:
    """A `DiTPipeline`, or PixArt's, with its text encoder if that is in a folder.

    Raises:
        UserError: the text encoder's folder is not there.
    """
    assert pipe.vae is not None  # `export` refuses latents that cannot be decoded
    source = pipe.prompts.source if pipe.prompts else ""
    has_encoder = bool(source) and describe_encoder(source)[0] == "copied"
    to_diffusers = dit_to_diffusers if pipe.prompts is None else pixart_to_diffusers
    parts = {
        "transformer": to_diffusers(pipe.model, pipe.params),
        "vae": vae_to_diffusers(pipe.vae, pipe.vae_params),
    }
    for name, (state_dict, config) in parts.items():
        write_json(folder / name / "config.json", config)
        write_tensors(folder / name / WEIGHTS, state_dict, {"format": "pt"})
    scheduler = scheduler_config(pipe.config)
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    index: dict[str, Any] = {
        "_class_name": pipeline_class(pipe.config),
        "scheduler": ["diffusers", scheduler["_class_name"]],
        "transformer": ["diffusers", parts["transformer"][1]["_class_name"]],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    if pipe.prompts is None:
        index["id2label"] = label_names(pipe)
    elif has_encoder:
        copy_encoder(source, folder)
        index |= {"text_encoder": ["transformers", "T5EncoderModel"], "tokenizer": ["transformers", "T5Tokenizer"]}
    else:
        log.warning("diffusers' folder has no text encoder: prompts must be given there as prompt_embeds.")
        index |= {"text_encoder": [None, None], "tokenizer": [None, None]}
    write_json(folder / "model_index.json", index)


def label_names(pipe: ARDPipeline) -> dict[str, str]:
    """Names by class number, as JSON keeps them."""
    return {str(number): name for number, name in pipe.id2label.items()}


def write_stablehlo(
    pipe: ARDPipeline, folder: pathlib.Path, batch_sizes: Sequence[int], platforms: Sequence[str]
) -> None:
    """The program that the pipeline runs, see `stablehlo.write_sampler`.

    Raises:
        UserError: a teacher of captions has no text encoder, or it cannot be opened.
    """
    if pipe.prompts is not None and not pipe.is_student and not pipe.prompts.source:
        raise UserError(
            "captions.encoder is '', but a teacher's guidance needs the vectors of the empty caption: run the stage "
            "'captions' with the text encoder that it was trained with, or choose another --format."
        )
    pipe.model = pipe.model.with_backbone(attention="xla")  # a kernel of the device at hand would run on no other
    generate = pipe.generate_function()
    decoding = {name: leaf for name, leaf in (pipe.vae_params or {}).items() if name in ("decoder", "post_quant_conv")}

    weights = {"network": pipe.params} | ({"vae": decoding} if decoding else {})
    told: Told = {"labels": ((), "int32", (0, pipe.config.data.num_classes - 1))}
    about = None
    if pipe.prompts is not None:
        length, width = pipe.config.captions.length, pipe.model.backbone.condition_shapes.tokens.shape[-1]
        told = {"tokens": ((length, width), "float32", None), "mask": ((length,), "bool", None)}
        if not pipe.is_student:  # guidance's empty caption is a constant of the folder
            weights["null"] = jnp.asarray(pipe.prompts.null(None, None))
        if pipe.prompts.source:
            encoder = pipe.prompts.encoder
            about = write_text_encoder(
                folder,
                encoder.apply,
                encoder.params,
                tokenizer=encoder.tokenizer.path,
                length=length,
                cleaning=encoder.cleaning,
                platforms=platforms,
            )

    def sampler(weights, noise, *condition):
        if len(condition) == 1:
            return generate(weights["network"], weights.get("vae"), noise, *condition)
        (tokens, mask), null = condition, weights.get("null")
        nulls = None if null is None else jnp.broadcast_to(null, (noise.shape[0], *null.shape))
        return generate(weights["network"], weights.get("vae"), noise, Caption(tokens, mask, nulls))

    write_sampler(
        folder,
        sampler,
        weights,
        shape=example_shape(pipe.config),
        told=told,
        names=pipe.id2label,
        text_encoder=about,
        batch_sizes=batch_sizes,
        platforms=platforms,
    )
