"""PyTorch weights in and out."""

from ard_jax.convert.diffusers import dit_from_diffusers, dit_to_diffusers
from ard_jax.convert.published import from_torch, to_torch
from ard_jax.convert.vae import vae_from_diffusers, vae_to_diffusers

__all__ = ["dit_from_diffusers", "dit_to_diffusers", "from_torch", "to_torch", "vae_from_diffusers", "vae_to_diffusers"]
