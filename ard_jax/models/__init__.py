"""Pure Flax modules: nothing here trains, reads or writes."""

from ard_jax.models.backbone import Backbone, Condition, Context, count_parameters, inputs_like, parameter_shapes
from ard_jax.models.clip import CLIP, clip_fields
from ard_jax.models.discriminator import Discriminator
from ard_jax.models.dit import DiT, size_fields
from ard_jax.models.masks import MASKS, visible_blocks
from ard_jax.models.pixart import PixArt
from ard_jax.models.student import ARDStudent, Network, default_block_times, init_from_teacher, network_shapes
from ard_jax.models.vae import AutoencoderKL
from ard_jax.types import Caption

__all__ = [
    "MASKS",
    "CLIP",
    "ARDStudent",
    "AutoencoderKL",
    "Backbone",
    "Caption",
    "Condition",
    "Context",
    "Discriminator",
    "DiT",
    "Network",
    "PixArt",
    "clip_fields",
    "count_parameters",
    "default_block_times",
    "init_from_teacher",
    "inputs_like",
    "network_shapes",
    "parameter_shapes",
    "size_fields",
    "visible_blocks",
]
