"""The class-conditional diffusion transformer (DiT, Peebles and Xie 2023, arXiv 2212.09748).

The same backbone serves noise-predicting (VP) and velocity (flow-matching) teachers: what the output means is the
business of `ard_jax.diffusion`.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from ard_jax.errors import UserError
from ard_jax.models import layers
from ard_jax.models.backbone import Backbone, Context, check_channels
from ard_jax.models.layers import Dense, DiTBlock, FinalLayer, TimeEmbedder
from ard_jax.models.partition import name_axes

# Name: width, depth, heads (DiT, table 1); the published names add "/2", "/4" or "/8", the patch size.
SIZES = {"DiT-S": (384, 12, 6), "DiT-B": (768, 12, 12), "DiT-L": (1024, 24, 16), "DiT-XL": (1152, 28, 16)}
PATCH_SIZES = (2, 4, 8)

name_axes(label_embed=(None, None))  # a thousandth of the parameters: looked up, so better whole on every device


def size_fields(name: str) -> dict[str, int]:
    """Fields of a published size: "DiT-XL/2" → {"patch_size": 2, "hidden_size": 1152, "depth": 28, "num_heads": 16}.

    Raises:
        UserError: no such size.
    """
    size, _, patch = name.partition("/")
    if size not in SIZES or patch not in map(str, PATCH_SIZES):
        known = ", ".join(f"{size}/{patch}" for size in SIZES for patch in PATCH_SIZES)
        raise UserError(f"name is {name!r}, which is not a published size: choose one of {known}, or set the fields.")
    width, depth, heads = SIZES[size]
    return {"patch_size": int(patch), "hidden_size": width, "depth": depth, "num_heads": heads}


class DiT(Backbone):
    """DiT: (images, times, labels) → predictions; a condition is a label, int32 (batch,).

    Attributes (beside those of `Backbone`):
        num_heads: attention heads; must divide `hidden_size`.
        num_classes: classes; index `num_classes` is the null class of classifier-free guidance.
        mlp_ratio: width of the MLP over `hidden_size`.
        label_init_std: standard deviation of the label table at initialisation.
        time_init_std: the same for the timestep MLP.
        frequency_shift: see `layers.sinusoids`; 0 as published, 1 in diffusers' DiT.
        mlp_norm_eps: eps of the layer norm before the MLP; 1e-6 as published, 1e-5 in diffusers' DiT.
    """

    num_heads: int = 16
    num_classes: int = 1000
    mlp_ratio: float = 4.0
    label_init_std: float = 0.02
    time_init_std: float = 0.02
    frequency_shift: float = 0.0
    mlp_norm_eps: float = 1e-6

    def __post_init__(self):
        if self.hidden_size % self.num_heads or self.hidden_size % 4:
            raise UserError(
                f"hidden_size {self.hidden_size} with {self.num_heads} heads does not work: "
                f"it must be a multiple of the number of heads and of 4."
            )
        super().__post_init__()

    def setup(self):
        self.patch_embed = Dense(self.hidden_size, kernel_init=layers.xavier, dtype=self.dtype)
        self.time_embed = TimeEmbedder(self.hidden_size, self.time_init_std, self.dtype, self.frequency_shift)
        self.label_embed = nn.Embed(
            self.num_classes + 1,
            self.hidden_size,
            embedding_init=nn.initializers.normal(self.label_init_std),
            dtype=self.dtype,
        )
        block = self.rematerialised(DiTBlock)
        self.blocks = block(self.num_heads, self.mlp_ratio, self.dtype, self.mlp_norm_eps)
        out_channels = self.channels * (2 if self.learn_sigma else 1)
        self.final_layer = FinalLayer(self.patch_size**2 * out_channels, self.dtype)

    @property
    def condition_shapes(self) -> jax.ShapeDtypeStruct:
        """A label."""
        return jax.ShapeDtypeStruct((), jnp.int32)

    def unconditional(self, condition: jax.Array) -> jax.Array:
        """The null class."""
        return jnp.full_like(condition, self.num_classes)

    def embed(self, images: jax.Array) -> jax.Array:
        """(row, height, width, channel) → tokens (row, token, width) with their positions."""
        check_channels(images, self.channels)
        x = self.patch_embed(layers.patchify(images, self.patch_size))
        grid = images.shape[1] // self.patch_size, images.shape[2] // self.patch_size
        return x + self.positions(*grid).astype(x.dtype)

    def context(self, times: jax.Array, condition: jax.Array) -> Context:
        """The sum of time and label embedding, and its SiLU, which modulates the tokens of a row."""
        time = self.time_embed(times.reshape(-1)).reshape(*times.shape, -1)
        summary = (time + self.label_embed(condition)[:, None]).reshape(-1, self.hidden_size)
        return Context(rows=nn.silu(summary), summary=summary)
