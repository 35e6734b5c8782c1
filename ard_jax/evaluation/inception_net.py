"""The Inception network that FID is computed with (Szegedy et al. 2015, arXiv 1512.00567), channels last.

It is the graph that was published on 2015-12-05, which is not the Inception v3 of other libraries: its average pools
leave the padding out of the mean, its last block pools by maximum, and it has 1008 classes. Modules carry the names of
the published state dict. Batch norm (epsilon 1e-3) is folded into the convolutions when weights are read.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

SIDE = 299
NUM_FEATURES = 2048
NUM_CLASSES = 1008
# sFID's features: so many channels of what Mixed_6d.branch1x1 gives on its grid of 17x17
SPATIAL_CHANNELS = 7
NUM_SPATIAL = 17 * 17 * SPATIAL_CHANNELS

# TPUs would multiply float32 in bfloat16, which moves FID by a tenth.
PRECISION = jax.lax.Precision.HIGHEST


@functools.cache
def resize_matrix(size: int, side: int = SIDE) -> np.ndarray:
    """The bilinear resize of TensorFlow 1 along one axis, as a matrix.

    Pixel i of the result lies at i · size / side of the source: neither shifted by half a pixel nor smoothed where it
    shrinks, unlike any resize of today. Places are float32 as there, so that rounding takes the same neighbours.

    Args:
        size: pixels of the source.
        side: pixels of the result.

    Returns:
        (side, size) float32, whose rows sum to 1.
    """
    place = np.arange(side, dtype=np.float32) * np.float32(size / side)
    low = np.minimum(place.astype(np.int64), size - 1)
    high = np.minimum(low + 1, size - 1)  # beyond the last pixel lies that pixel again
    share = place - low.astype(np.float32)
    matrix = np.zeros((side, size), np.float32)
    rows = np.arange(side)
    matrix[rows, low] = 1 - share
    matrix[rows, high] += share
    return matrix


def convolve(
    x: jax.Array,
    name: str,
    features: int,
    size: int | tuple[int, int] = 1,
    stride: int = 1,
    padded: bool = True,
) -> jax.Array:
    """A convolution with bias and its ReLU in x's type; where it is `padded`, a stride of 1 keeps height and width."""
    height, width = (size, size) if isinstance(size, int) else size
    reach = (height // 2, width // 2) if padded else (0, 0)
    padding = [(side, side) for side in reach]
    convolution = nn.Conv(
        features,
        (height, width),
        strides=(stride, stride),
        padding=padding,
        dtype=x.dtype,
        precision=PRECISION,
        name=name,
    )
    return nn.relu(convolution(x))


def average_pool(x: jax.Array) -> jax.Array:
    """The mean of the pixels among 3x3 that there are, in x's type: padding does not count."""
    return nn.avg_pool(x, (3, 3), padding=[(1, 1), (1, 1)], count_include_pad=False).astype(x.dtype)


def maximum_pool(x: jax.Array) -> jax.Array:
    """The maximum of 3x3, of the same size."""
    return nn.max_pool(x, (3, 3), padding=[(1, 1), (1, 1)])


def halve(x: jax.Array) -> jax.Array:
    """The maximum of 3x3 at every other pixel, without padding."""
    return nn.max_pool(x, (3, 3), strides=(2, 2))


class InceptionA(nn.Module):
    """Mixed_5b, 5c, 5d: (batch, 35, 35, channel) → (…, 224 + `pooled`)."""

    pooled: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        single = convolve(x, "branch1x1", 64)
        five = convolve(x, "branch5x5_1", 48)
        five = convolve(five, "branch5x5_2", 64, 5)
        three = convolve(x, "branch3x3dbl_1", 64)
        three = convolve(three, "branch3x3dbl_2", 96, 3)
        three = convolve(three, "branch3x3dbl_3", 96, 3)
        pool = convolve(average_pool(x), "branch_pool", self.pooled)
        return jnp.concatenate([single, five, three, pool], axis=-1)


class InceptionB(nn.Module):
    """Mixed_6a: (batch, 35, 35, channel) → (batch, 17, 17, 480 + channel)."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        single = convolve(x, "branch3x3", 384, 3, stride=2, padded=False)
        double = convolve(x, "branch3x3dbl_1", 64)
        double = convolve(double, "branch3x3dbl_2", 96, 3)
        double = convolve(double, "branch3x3dbl_3", 96, 3, stride=2, padded=False)
        return jnp.concatenate([single, double, halve(x)], axis=-1)


class InceptionC(nn.Module):
    """Mixed_6b to 6e: (batch, 17, 17, channel) → (batch, 17, 17, 768), of which the first 192 are `branch1x1`'s."""

    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        row, column = (1, 7), (7, 1)
        single = convolve(x, "branch1x1", 192)
        seven = convolve(x, "branch7x7_1", self.width)
        seven = convolve(seven, "branch7x7_2", self.width, row)
        seven = convolve(seven, "branch7x7_3", 192, column)
        double = convolve(x, "branch7x7dbl_1", self.width)
        double = convolve(double, "branch7x7dbl_2", self.width, column)
        double = convolve(double, "branch7x7dbl_3", self.width, row)
        double = convolve(double, "branch7x7dbl_4", self.width, column)
        double = convolve(double, "branch7x7dbl_5", 192, row)
        pool = convolve(average_pool(x), "branch_pool", 192)
        return jnp.concatenate([single, seven, double, pool], axis=-1)


class InceptionD(nn.Module):
    """Mixed_7a: (batch, 17, 17, channel) → (batch, 8, 8, 512 + channel)."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        three = convolve(x, "branch3x3_1", 192)
        three = convolve(three, "branch3x3_2", 320, 3, stride=2, padded=False)
        seven = convolve(x, "branch7x7x3_1", 192)
        seven = convolve(seven, "branch7x7x3_2", 192, (1, 7))
        seven = convolve(seven, "branch7x7x3_3", 192, (7, 1))
        seven = convolve(seven, "branch7x7x3_4", 192, 3, stride=2, padded=False)
        return jnp.concatenate([three, seven, halve(x)], axis=-1)


class InceptionE(nn.Module):
    """Mixed_7b and 7c: (batch, 8, 8, channel) → (batch, 8, 8, 2048).

    Attributes:
        maximum: pools by maximum, as 7c does, instead of by mean.
    """

    maximum: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        row, column = (1, 3), (3, 1)
        single = convolve(x, "branch1x1", 320)
        three = convolve(x, "branch3x3_1", 384)
        threes = [convolve(three, "branch3x3_2a", 384, row), convolve(three, "branch3x3_2b", 384, column)]
        double = convolve(x, "branch3x3dbl_1", 448)
        double = convolve(double, "branch3x3dbl_2", 384, 3)
        doubles = [convolve(double, "branch3x3dbl_3a", 384, row), convolve(double, "branch3x3dbl_3b", 384, column)]
        pooled = maximum_pool(x) if self.maximum else average_pool(x)
        pool = convolve(pooled, "branch_pool", 192)
        return jnp.concatenate([single, *threes, *doubles, pool], axis=-1)


class InceptionNet(nn.Module):
    """Images to the features of FID, of sFID and of the Inception score, all float32.

    Attributes:
        dtype: that the convolutions compute in; published numbers are those of float32.
    """

    dtype: str = "float32"

    @nn.compact
    def __call__(self, images: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Resizes images to 299x299 and looks at them.

        Args:
            images: (batch, height, width, 3) uint8, of any size.

        Returns:
            Features (batch, 2048); spatial features (batch, 2023), flattened from (height, width, channel); logits
            (batch, 1008), without the classifier's bias.
        """
        height, width = (resize_matrix(size) for size in images.shape[1:3])
        x = jnp.einsum("ph,bhwc->bpwc", height, images.astype(jnp.float32), precision=PRECISION)
        x = jnp.einsum("qw,bpwc->bpqc", width, x, precision=PRECISION)
        x = ((x - 128) / 128).astype(self.dtype)
        x = convolve(x, "Conv2d_1a_3x3", 32, 3, stride=2, padded=False)
        x = convolve(x, "Conv2d_2a_3x3", 32, 3, padded=False)
        x = convolve(x, "Conv2d_2b_3x3", 64, 3)
        x = convolve(halve(x), "Conv2d_3b_1x1", 80)
        x = convolve(x, "Conv2d_4a_3x3", 192, 3, padded=False)
        x = halve(x)
        for name, pooled in (("Mixed_5b", 32), ("Mixed_5c", 64), ("Mixed_5d", 64)):
            x = InceptionA(pooled, name=name)(x)
        x = InceptionB(name="Mixed_6a")(x)
        for name, channels in (("Mixed_6b", 128), ("Mixed_6c", 160), ("Mixed_6d", 160)):
            x = InceptionC(channels, name=name)(x)
        spatial = x[..., :SPATIAL_CHANNELS].reshape(len(x), -1).astype(jnp.float32)  # branch1x1's come first
        x = InceptionC(192, name="Mixed_6e")(x)
        x = InceptionD(name="Mixed_7a")(x)
        x = InceptionE(maximum=False, name="Mixed_7b")(x)
        x = InceptionE(maximum=True, name="Mixed_7c")(x)
        features = x.mean(axis=(1, 2), dtype=jnp.float32)
        logits = nn.Dense(NUM_CLASSES, use_bias=False, precision=PRECISION, name="fc")(features)
        return features, spatial, logits
