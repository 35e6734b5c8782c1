"""A judge of captions: a small dual encoder of images and captions, trained on the data set that is being modelled.

Nothing that is published was trained on emoji or on a user's own pictures, and weights cannot be shipped for every data
set, so the judge is trained here, in a minute or two, as a function of the images, their captions and a seed alone. It
answers how often an image's right caption is among the k that fit it best (recall at k), and its image features are
those that the Fréchet distance of captioned images is taken in.
"""

import dataclasses
import functools
import re
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from ard_jax.errors import UserError
from ard_jax.evaluation.features import BATCH_SIZE, FINAL_GRID, NUM_FEATURES, ImageRows, batch_size_of, check_images
from ard_jax.files import tree_sha256
from ard_jax.keys import make_key
from ard_jax.types import Params

WORD_WIDTH = 96
JUDGE_BATCH = 4 * BATCH_SIZE
PEAK_LEARNING_RATE = 2e-3
TEMPERATURE = 0.05
NOISE = 16.0  # grey levels, at most, that a training image is disturbed by
RIVALS = 4096  # captions that an image is held against in training, at most
SHIFT = 16
MAX_SIDE = 64  # of the images that it looks at; larger ones are averaged down to it


class _Images(nn.Module):
    """uint8 or float images in 0 … 255, (batch, height, width, channel) → features (batch, 64)."""

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        conv = functools.partial(nn.Conv, precision=jax.lax.Precision.HIGHEST)
        dense = functools.partial(nn.Dense, precision=jax.lax.Precision.HIGHEST)
        x = images.astype(jnp.float32) / 127.5 - 1
        x = nn.gelu(conv(48, (4, 4), strides=2)(x))
        width = 96
        while max(x.shape[1:3]) > FINAL_GRID:
            strides = tuple(2 if side > FINAL_GRID else 1 for side in x.shape[1:3])
            x = nn.gelu(nn.LayerNorm()(conv(width, (3, 3), strides=strides)(x)))
            width = min(2 * width, 192)
        return dense(NUM_FEATURES)(nn.gelu(nn.LayerNorm()(dense(4 * NUM_FEATURES)(x.reshape(len(x), -1)))))


class _Captions(nn.Module):
    """Words by number, 0 for none, (caption, word) → (caption, 64); words in another order are another caption."""

    vocabulary: int

    @nn.compact
    def __call__(self, words: jax.Array) -> jax.Array:
        dense = functools.partial(nn.Dense, precision=jax.lax.Precision.HIGHEST)
        x = nn.Embed(self.vocabulary, WORD_WIDTH, embedding_init=nn.initializers.normal(1.0))(words)
        # a word's vector is turned by its place before the sum, which is then cheap enough for all captions at once
        x = x * (1 + self.param("places", nn.initializers.normal(0.3), (words.shape[1], WORD_WIDTH)))
        is_word = (words > 0)[..., None]
        x = (x * is_word).sum(axis=1) / jnp.sqrt(is_word.sum(axis=1))
        return dense(NUM_FEATURES)(nn.gelu(dense(4 * NUM_FEATURES)(x)))


@dataclasses.dataclass(frozen=True, eq=False)
class Judge:
    """A trained dual encoder: call it with images to get features.

    Attributes:
        captions: all that an image's own is looked for among, each once.
        image_shape: (height, width, channel) of the images that it was trained on.
        params: that look at images.
        embedded: the captions, (caption, 64) float64 of length 1.
    """

    captions: tuple[str, ...]
    image_shape: tuple[int, ...]
    params: Params
    embedded: np.ndarray

    num_features = NUM_FEATURES

    def __call__(self, images: ImageRows) -> np.ndarray:
        """Image features, not normalised: (N, height, width, channel) uint8 → (N, 64) float64.

        Raises:
            UserError: images of another dtype or shape.
        """
        images = check_images(images)
        if images.shape[1:] != self.image_shape:
            raise UserError(
                f"The images have shape (height, width, channel) = {images.shape[1:]}, but the judge was trained on "
                f"{self.image_shape}: hand over images of that shape."
            )
        found = np.empty((len(images), NUM_FEATURES), np.float64)
        size = self.batch_size
        for start in range(0, len(images), size):
            batch = _seen(images[start : start + size])
            padding = [(0, size - len(batch))] + [(0, 0)] * 3  # one size compiles once
            found[start : start + len(batch)] = np.asarray(_apply(self.params, np.pad(batch, padding)))[: len(batch)]
        return found

    @property
    def batch_size(self) -> int:
        """Images on the device at once."""
        return batch_size_of(self.image_shape)

    @property
    def sha256(self) -> str:
        """Of the parameters that look at images."""
        return tree_sha256(self.params)

    def recall(self, images: ImageRows, captions: Sequence[str], ks: Sequence[int] = (1, 5)) -> dict[int, float]:
        """Share of the images whose own caption is among the k that fit them best, by k.

        Args:
            images: (N, height, width, channel) uint8.
            captions: of each of them, out of `self.captions`.
            ks: each at least 1.
        """
        return self.recall_of_features(self(images), captions, ks)

    def recall_of_features(
        self, features: np.ndarray, captions: Sequence[str], ks: Sequence[int] = (1, 5)
    ) -> dict[int, float]:
        """`recall` of images whose features (N, 64) are known."""
        place = {caption: number for number, caption in enumerate(self.captions)}
        own = np.array([place[caption] for caption in captions])
        better = np.empty(len(own), np.int64)
        features = _normalised(features)
        for start in range(0, len(own), JUDGE_BATCH):
            rows = slice(start, start + JUDGE_BATCH)
            likeness = features[rows] @ self.embedded.T
            theirs = np.take_along_axis(likeness, own[rows, None], axis=1)
            better[rows] = (likeness > theirs).sum(axis=1)
        return {k: float((better < k).mean()) for k in ks}


def train_judge(images: ImageRows, captions: Sequence[str], *, seed: int = 0, steps: int = 1000) -> Judge:
    """Trains the judge on real images and their captions, by InfoNCE both ways (CLIP, arXiv 2103.00020, section 2.3).

    An image is held against all captions, or against its batch's and `RIVALS` others where there are more of them: the
    hardest are those that differ from its own by a word, of which a batch has hardly any. Each batch is shifted at
    random over its border's colour, by up to a sixteenth of the image, blurred a little or not, and noised, since
    generated pictures are not as clean as real ones. The result is a function of the arguments alone on one kind of
    device with as many cores, by whose number a CPU orders its sums.

    Args:
        images: (N, height, width, channel) uint8, height and width at least 4.
        captions: of each of them.
        seed: of the initial weights, the order of the batches and what is done to images.
        steps: of AdamW with cosine decay, each on up to 256 images.

    Raises:
        UserError: wrong dtype or shape, fewer than 2 captions, or fewer than 1 step.
    """
    images = check_images(images)
    distinct = tuple(dict.fromkeys(captions))
    if len(captions) != len(images) or len(distinct) < 2:
        raise UserError(
            f"The judge was given {len(images)} images and {len(distinct)} captions, but needs one an image, and two "
            "that differ: hand over captioned images."
        )
    if steps < 1:
        raise UserError(f"The judge was to train for {steps} steps, but needs at least 1: set steps=1000.")
    place = {caption: number for number, caption in enumerate(distinct)}
    own = np.array([place[caption] for caption in captions], np.int32)
    words, vocabulary = _spell(distinct)
    rng = np.random.default_rng(seed)
    image_net, caption_net = _Images(), _Captions(vocabulary)
    image_key, caption_key = jax.random.split(make_key(seed))
    params = {
        "images": jax.jit(image_net.init)(image_key, jnp.zeros((1, *_seen(images[:1]).shape[1:])))["params"],
        "captions": jax.jit(caption_net.init)(caption_key, words[:1])["params"],
    }
    optimizer = optax.adamw(optax.cosine_decay_schedule(PEAK_LEARNING_RATE, steps), weight_decay=1e-2)
    state = optimizer.init(params)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, batch, own, words, rivals):
        def loss(params):
            seen = jnp.asarray(image_net.apply({"params": params["images"]}, batch))
            said = jnp.asarray(caption_net.apply({"params": params["captions"]}, words))
            likeness = _unit(seen) @ _unit(said).T / TEMPERATURE  # (image, caption)
            to_caption = optax.softmax_cross_entropy_with_integer_labels(likeness, own)
            # of the captions that the batch has images of, each against all images; its own ones count alike
            is_own = own[:, None] == rivals
            to_image = jax.nn.logsumexp(likeness, axis=0) - jax.nn.logsumexp(likeness, axis=0, where=is_own)
            is_here = is_own.any(axis=0)
            return (to_caption.mean() + jnp.where(is_here, to_image, 0).sum() / is_here.sum()) / 2

        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    for rows in _batches(len(images), min(JUDGE_BATCH, len(images)), steps, rng):
        batch = _seen(disturb(images[rows], rng))
        shown, places = _rivals(own[rows], len(distinct), rng)
        params, state = step(params, state, batch, places, words[shown], np.arange(len(shown)))
    embedded = jax.jit(lambda words: caption_net.apply({"params": params["captions"]}, words))(words)
    return Judge(distinct, images.shape[1:], params["images"], _normalised(np.asarray(embedded, np.float64)))


def disturb(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Images as generated ones may be: shifted, perhaps blurred, and noised; uint8 as they came."""
    height, width = images.shape[1:3]
    reach = max(1, min(height, width) // SHIFT)
    padded = np.pad(images, [(0, 0), (reach, reach), (reach, reach), (0, 0)], mode="edge").astype(np.float32)
    down, right = rng.integers(0, 2 * reach + 1, size=2)
    x = padded[:, down : down + height, right : right + width]
    weight = rng.uniform(0, 0.25, (len(x), 1, 1, 1)).astype(np.float32)
    for axis in (1, 2):  # a kernel of 3, from none to (1/4, 1/2, 1/4)
        before, after = np.roll(x, 1, axis), np.roll(x, -1, axis)
        x = x + weight * (before + after - 2 * x)
    noise = rng.uniform(0, NOISE, (len(x), 1, 1, 1)) * rng.standard_normal(x.shape, np.float32)
    return np.clip(np.rint(x + noise), 0, 255).astype(np.uint8)


def _spell(captions: Sequence[str]) -> tuple[np.ndarray, int]:
    """Captions as numbers of words, int32 (caption, word) filled up with 0, and how many numbers there are."""
    split = [re.findall(r"\w+|[^\w\s]", caption.lower()) or ["·"] for caption in captions]
    numbers = {word: number for number, word in enumerate(sorted({word for words in split for word in words}), 1)}
    spelled = np.zeros((len(split), max(map(len, split))), np.int32)
    for row, words in zip(spelled, split, strict=True):
        row[: len(words)] = [numbers[word] for word in words]
    return spelled, len(numbers) + 1


def _rivals(own: np.ndarray, count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Captions that a batch is held against, always as many, and the place of each image's own among them."""
    if count <= RIVALS:
        return np.arange(count), own
    here = np.unique(own)
    others = rng.choice(np.setdiff1d(np.arange(count), here), RIVALS - len(here), replace=False)
    return np.concatenate([here, others]), np.searchsorted(here, own).astype(np.int32)


def _batches(count, size, steps, rng):
    """Yields `steps` batches of rows, epoch after epoch, each in a new order."""
    for step in range(steps):
        position = step % (count // size)
        if position == 0:
            order = rng.permutation(count)
        yield order[position * size : (position + 1) * size]


def _seen(images: np.ndarray) -> np.ndarray:
    """Images as the network sees them: averaged down by a whole number where they are large."""
    factor = -(-max(images.shape[1:3]) // MAX_SIDE)
    if factor == 1:
        return images
    count, height, width, channels = images.shape
    cut = images[:, : height - height % factor, : width - width % factor].astype(np.float32)
    return cut.reshape(count, height // factor, factor, width // factor, factor, channels).mean(axis=(2, 4))


@jax.jit
def _apply(params, images):
    return _Images().apply({"params": params}, images)


def _unit(x: jax.Array) -> jax.Array:
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def _normalised(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)
