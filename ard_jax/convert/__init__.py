"""PyTorch weights in and out."""

from ard_jax.convert.clip import clip_from_open_clip, clip_from_transformers
from ard_jax.convert.diffusers import dit_from_diffusers, dit_to_diffusers
from ard_jax.convert.pixart import (
    pixart_from_diffusers,
    pixart_from_published,
    pixart_to_diffusers,
    pixart_to_published,
)
from ard_jax.convert.published import from_torch, to_torch
from ard_jax.convert.t5 import t5_from_transformers, t5_to_transformers
from ard_jax.convert.vae import vae_from_diffusers, vae_to_diffusers

__all__ = [
    "clip_from_open_clip",
    "clip_from_transformers",
    "dit_from_diffusers",
    "dit_to_diffusers",
    "from_torch",
    "pixart_from_diffusers",
    "pixart_from_published",
    "pixart_to_diffusers",
    "pixart_to_published",
    "t5_from_transformers",
    "t5_to_transformers",
    "to_torch",
    "vae_from_diffusers",
    "vae_to_diffusers",
]
