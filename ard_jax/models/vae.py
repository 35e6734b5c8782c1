"""The KL autoencoder of latent diffusion (Rombach et al. 2022, arXiv 2112.10752), channels last.

The reference is diffusers' `AutoencoderKL`. Modules carry its names, with `_` before a number, so that a parameter's
path tells its name there: `decoder/up_blocks_0/resnets_1/conv1/kernel` is `decoder.up_blocks.0.resnets.1.conv1.weight`.

*Raw* latents are what `encode` gives and `decode` takes, as in the reference; *latents* are what diffusion models see:
raw ones shifted and scaled to about unit variance.
"""

import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from ard_jax.errors import UserError
from ard_jax.models.attention import attention
from ard_jax.models.layers import Dense, Dtype
from ard_jax.types import Params

LOG_VARIANCE_BOUNDS = (-30.0, 20.0)


class Posterior(NamedTuple):
    """A normal distribution over raw latents, each number on its own.

    Attributes:
        mean: (batch, height, width, channel), at least float32.
        log_variance: the same, within `LOG_VARIANCE_BOUNDS`.
    """

    mean: jax.Array
    log_variance: jax.Array


def _convolution(features: int, size: int, dtype: Dtype | None, name: str | None = None) -> nn.Conv:
    """A convolution that keeps height and width."""
    return nn.Conv(features, (size, size), padding=size // 2, dtype=dtype, name=name)


def group_norm(groups: int, dtype: Dtype | None, name: str | None = None) -> nn.GroupNorm:
    """Group norm, eps 1e-6; its statistics are at least float32 whatever `dtype` is."""
    return nn.GroupNorm(groups, epsilon=1e-6, dtype=dtype, use_fast_variance=False, name=name)


class Resnet(nn.Module):
    """x + two convolutions of it, each after group norm and SiLU: (batch, height, width, channel) → `features`."""

    features: int
    groups: int
    dtype: Dtype | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        h = nn.silu(group_norm(self.groups, self.dtype, "norm1")(x))
        h = _convolution(self.features, 3, self.dtype, "conv1")(h)
        h = nn.silu(group_norm(self.groups, self.dtype, "norm2")(h))
        h = _convolution(self.features, 3, self.dtype, "conv2")(h)
        if x.shape[-1] != self.features:
            x = _convolution(self.features, 1, self.dtype, "conv_shortcut")(x)
        return x + h


class Attention(nn.Module):
    """x + attention of one head among its pixels: (batch, height, width, channel) → the same."""

    groups: int
    dtype: Dtype | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        batch, height, width, channels = x.shape
        h = group_norm(self.groups, self.dtype, "group_norm")(x).reshape(batch, height * width, channels)
        q, k, v = (Dense(channels, dtype=self.dtype, name=name)(h)[:, :, None] for name in ("to_q", "to_k", "to_v"))
        h = attention(q, k, v)[:, :, 0]
        return x + Dense(channels, dtype=self.dtype, name="to_out_0")(h).reshape(x.shape)


class MidBlock(nn.Module):
    """What lies between the halves of the encoder and the decoder, at the lowest resolution."""

    groups: int
    add_attention: bool = True
    dtype: Dtype | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = Resnet(x.shape[-1], self.groups, self.dtype, name="resnets_0")(x)
        if self.add_attention:
            x = Attention(self.groups, self.dtype, name="attentions_0")(x)
        return Resnet(x.shape[-1], self.groups, self.dtype, name="resnets_1")(x)


class Downsampler(nn.Module):
    """Halves height and width by a convolution of stride 2, padded with zeros at the bottom and the right alone."""

    dtype: Dtype | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        padding = ((0, 1), (0, 1))
        return nn.Conv(x.shape[-1], (3, 3), strides=2, padding=padding, dtype=self.dtype, name="conv")(x)


class Upsampler(nn.Module):
    """Doubles height and width: every pixel four times, then a convolution."""

    dtype: Dtype | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.repeat(2, axis=1).repeat(2, axis=2)
        return _convolution(x.shape[-1], 3, self.dtype, "conv")(x)


class Block(nn.Module):
    """Resnets at one resolution, then the way to the next one.

    Attributes:
        features: channels that come out.
        resnets: how many.
        groups: of the group norms.
        sampler: "downsamplers_0", "upsamplers_0", or "" at the last resolution.
        dtype: compute type.
    """

    features: int
    resnets: int
    groups: int
    sampler: str
    dtype: Dtype | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for i in range(self.resnets):
            x = Resnet(self.features, self.groups, self.dtype, name=f"resnets_{i}")(x)
        if self.sampler:
            sampler = Downsampler if self.sampler == "downsamplers_0" else Upsampler
            x = sampler(self.dtype, name=self.sampler)(x)
        return x


class _Half(nn.Module):
    """What the encoder and the decoder are made of.

    Attributes:
        out_channels: channels that come out.
        resnets: how many at each resolution.
        widths: channels at each resolution, the highest first.
        groups, add_attention, dtype: see `AutoencoderKL`.
    """

    out_channels: int
    resnets: int
    widths: tuple[int, ...]
    groups: int
    add_attention: bool = True
    dtype: Dtype | None = None


class Encoder(_Half):
    """Images (batch, height, width, channel) → 2 · latent channels at height / 2^(widths − 1)."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = _convolution(self.widths[0], 3, self.dtype, "conv_in")(x)
        for i, width in enumerate(self.widths):
            sampler = "downsamplers_0" if i + 1 < len(self.widths) else ""
            x = Block(width, self.resnets, self.groups, sampler, self.dtype, name=f"down_blocks_{i}")(x)
        x = MidBlock(self.groups, self.add_attention, self.dtype, name="mid_block")(x)
        x = nn.silu(group_norm(self.groups, self.dtype, "conv_norm_out")(x))
        return _convolution(self.out_channels, 3, self.dtype, "conv_out")(x)


class Decoder(_Half):
    """Raw latents (batch, height, width, channel) → images, sides times 2^(widths − 1)."""

    @nn.compact
    def __call__(self, z: jax.Array) -> jax.Array:
        x = _convolution(self.widths[-1], 3, self.dtype, "conv_in")(z)
        x = MidBlock(self.groups, self.add_attention, self.dtype, name="mid_block")(x)
        for i, width in enumerate(reversed(self.widths)):
            sampler = "upsamplers_0" if i + 1 < len(self.widths) else ""
            x = Block(width, self.resnets, self.groups, sampler, self.dtype, name=f"up_blocks_{i}")(x)
        x = nn.silu(group_norm(self.groups, self.dtype, "conv_norm_out")(x))
        return _convolution(self.out_channels, 3, self.dtype, "conv_out")(x)


class AutoencoderKL(nn.Module):
    """Images ↔ raw latents; the defaults are Stable Diffusion's.

    Attributes:
        in_channels, out_channels: channels of the images that go in and come out.
        latent_channels: channels of the latents.
        block_out_channels: channels at each resolution, the highest first; every one after the first halves the sides.
        layers_per_block: resnets at each resolution of the encoder; the decoder has one more.
        norm_num_groups: groups of the group norms; must divide the channels.
        mid_block_add_attention: whether the middle has attention.
        use_quant_conv, use_post_quant_conv: whether a 1×1 convolution follows the encoder, precedes the decoder.
        scaling_factor, shift_factor: latents are (raw latents − shift) · scale.
        sample_size, force_upcast: what diffusers' tiling and half-precision pipelines go by; kept for them.
        dtype: compute type; None takes it from the inputs and parameters. Parameters are float32.
    """

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    mid_block_add_attention: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    scaling_factor: float = 0.18215
    shift_factor: float | None = None
    sample_size: int = 512
    force_upcast: bool = True
    dtype: Dtype | None = None

    def __post_init__(self):
        if not self.block_out_channels or any(width % self.norm_num_groups for width in self.block_out_channels):
            raise UserError(
                f"block_out_channels {tuple(self.block_out_channels)} with {self.norm_num_groups} groups does not "
                f"work: give at least one number of channels, each a multiple of norm_num_groups."
            )
        super().__post_init__()

    @property
    def downscale(self) -> int:
        """Pixels a side of a latent pixel."""
        return 2 ** (len(self.block_out_channels) - 1)

    def setup(self):
        layers, moments = self.layers_per_block, 2 * self.latent_channels
        shared = tuple(self.block_out_channels), self.norm_num_groups, self.mid_block_add_attention, self.dtype
        self.encoder = Encoder(moments, layers, *shared)
        self.decoder = Decoder(self.out_channels, layers + 1, *shared)
        if self.use_quant_conv:
            self.quant_conv = _convolution(moments, 1, self.dtype)
        if self.use_post_quant_conv:
            self.post_quant_conv = _convolution(self.latent_channels, 1, self.dtype)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Images → the images that their mean latents decode to; `init` makes all parameters through it."""
        return self.decode(self.encode(images).mean)

    def encode(self, images: jax.Array) -> Posterior:
        """Images in [-1, 1], (batch, height, width, channel) → the distribution of their raw latents.

        Raises:
            UserError: the sides are no multiple of `downscale`, or the channels are not the model's.
        """
        _check_channels(images, self.in_channels, "images")
        height, width = images.shape[1:3]
        if height % self.downscale or width % self.downscale:
            raise UserError(
                f"images of {height}×{width} cannot be encoded: both sides must be multiples of {self.downscale}."
            )
        moments = self.encoder(images)
        if self.use_quant_conv:
            moments = self.quant_conv(moments)
        moments = moments.astype(jnp.promote_types(moments.dtype, jnp.float32))
        mean, log_variance = jnp.split(moments, 2, axis=-1)
        return Posterior(mean, jnp.clip(log_variance, *LOG_VARIANCE_BOUNDS))

    def decode(self, z: jax.Array) -> jax.Array:
        """Raw latents (batch, height, width, channel) → images, nominally in [-1, 1].

        Raw means: as diffusers' `vae.decode` takes them, not multiplied by `scaling_factor`; see `to_images`.

        Raises:
            UserError: the channels are not the model's.
        """
        _check_channels(z, self.latent_channels, "latents")
        if self.use_post_quant_conv:
            z = self.post_quant_conv(z)
        return self.decoder(z)


def _check_channels(x: jax.Array, channels: int, name: str) -> None:
    if x.shape[-1] != channels:
        raise UserError(
            f"{name} of {x.shape[-1]} channels were given to an autoencoder whose {name} have {channels}: "
            f"arrays are (batch, height, width, channel), channels last."
        )


def to_latents(model: AutoencoderKL, params: Params, images: jax.Array, key: jax.Array | None = None) -> jax.Array:
    """Images → latents as diffusion models see them; a pure function, to be jitted by the caller.

    Args:
        model, params: the autoencoder and its parameters.
        images: (batch, height, width, channel) in [-1, 1].
        key: None for the mean; a key, or keys (batch,), one an image, to sample with. An image's own key makes its
            latents independent of the batch that it is in.

    Returns:
        (batch, height / downscale, width / downscale, latent channel), at least float32.
    """
    mean: jax.Array
    log_variance: jax.Array
    # see layers.layer_norm
    mean, log_variance = model.apply({"params": params}, images, method="encode")  # type: ignore[assignment]
    if key is not None:
        draw = functools.partial(jax.random.normal, shape=mean.shape[key.ndim :], dtype=mean.dtype)
        noise = jax.vmap(draw)(key) if key.ndim else draw(key)
        mean = mean + jnp.exp(0.5 * log_variance) * noise
    return (mean - (model.shift_factor or 0)) * model.scaling_factor


def to_raw(model: AutoencoderKL, latents: jax.Array) -> jax.Array:
    """Latents as diffusion models see them → as `decode` takes them."""
    return latents / model.scaling_factor + (model.shift_factor or 0)


def to_images(model: AutoencoderKL, params: Params, latents: jax.Array) -> jax.Array:
    """Latents as diffusion models see them → images, nominally in [-1, 1]; a pure function, to be jitted by the caller.

    Args:
        model, params: the autoencoder and its parameters.
        latents: (batch, height, width, latent channel).

    Returns:
        (batch, height · downscale, width · downscale, channel).
    """
    return decode(model, params, to_raw(model, latents))


def decode(model: AutoencoderKL, params: Params, z: jax.Array) -> jax.Array:
    return model.apply({"params": params}, z, method="decode")  # type: ignore[return-value]  # see layers.layer_norm
