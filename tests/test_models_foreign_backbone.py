"""A backbone that ard_jax has never seen: another block, no classes, cross-attention to a condition of two arrays.

It is trained as a teacher, its trajectories are stored, a student is distilled from them and sampled, through the same
public functions as DiT's, with nothing in ard_jax changed.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ard_jax.build import make_process, make_solve
from ard_jax.data import InMemory
from ard_jax.files import tree_sha256
from ard_jax.models import ARDStudent, Backbone, Context, init_from_teacher, inputs_like, parameter_shapes
from ard_jax.models.attention import attention
from ard_jax.models.flops import student_macs, teacher_macs
from ard_jax.models.layers import Dense, TimeEmbedder, layer_norm, patchify
from ard_jax.models.partition import name_axes
from ard_jax.objectives import Given, Method, find_method
from ard_jax.objectives.denoising import denoising
from ard_jax.parallel import make_mesh
from ard_jax.sampling import sample_student, sample_teacher
from ard_jax.sharded import number_of_shards
from ard_jax.training.fit import Task, fit
from ard_jax.trajectories import store
from ard_jax.trajectories.generate import features_of, make_store
from configs import smoke

name_axes(
    query=("embed", "heads"),
    key=("embed", "heads"),
    value=("embed", "heads"),
    word_key=("word", "heads"),
    word_value=("word", "heads"),
)

SHAPE, WORDS, WORD_WIDTH = (8, 8, 1), 3, 5


class Captions:
    """Conditions of two arrays: word vectors, and which of them are there."""

    def __init__(self, count=6):
        rng = np.random.default_rng(0)
        self.tokens = rng.standard_normal((count, WORDS, WORD_WIDTH)).astype(np.float32)
        self.mask = np.arange(WORDS)[None] < rng.integers(1, WORDS + 1, count)[:, None]

    def __len__(self):
        return len(self.tokens)

    in_memory = True

    @property
    def for_training(self):
        return len(self)

    def rows(self, numbers):
        return {"tokens": self.tokens[numbers], "mask": self.mask[numbers]}

    def words(self, number):
        return f"caption {number}"


class CrossBlock(nn.Module):
    """Post-norm self-attention, cross-attention to an example's words from all its rows at once, no modulation."""

    heads: int

    @nn.compact
    def __call__(self, x, context, memory, attend):
        width = x.shape[-1]

        def heads_of(x):
            return x.reshape(*x.shape[:2], self.heads, -1)

        q, k, v = (heads_of(Dense(width, name=name)(x)) for name in ("query", "key", "value"))
        h, memory = attend(q, k, v, memory)
        x = layer_norm(x + Dense(width, name="attention_out")(h.reshape(x.shape)) + context.rows[:, None], None)
        words, mask = context.examples["tokens"], context.examples["mask"]
        keys, values = (heads_of(Dense(width, name=name)(words)) for name in ("word_key", "word_value"))
        shared = x.reshape(len(words), -1, width)  # the rows of an example lie side by side
        logits = jnp.einsum("bqhd,bkhd->bhqk", heads_of(shared), keys)
        weights = jax.nn.softmax(jnp.where(mask[:, None, None], logits, -1e9), axis=-1)
        told = jnp.einsum("bhqk,bkhd->bqhd", weights, values).reshape(x.shape)
        return layer_norm(x + told, None), memory


class Reader(nn.Module):
    features: int

    @nn.compact
    def __call__(self, h, context):
        return Dense(self.features, name="linear")(h + context.rows[:, None])


class CaptionNet(Backbone):
    """The whole of what a new backbone has to say."""

    def setup(self):
        self.patch_embed = Dense(self.hidden_size)
        self.time_embed = TimeEmbedder(self.hidden_size)
        self.blocks = self.rematerialised(CrossBlock)(2)
        self.final_layer = Reader(self.patch_size**2 * self.channels)

    @property
    def condition_shapes(self):
        return {
            "tokens": jax.ShapeDtypeStruct((WORDS, WORD_WIDTH), jnp.float32),
            "mask": jax.ShapeDtypeStruct((WORDS,), jnp.bool_),
        }

    def unconditional(self, condition):
        first = jnp.zeros_like(condition["mask"]).at[..., 0].set(True)
        return {"tokens": jnp.zeros_like(condition["tokens"]), "mask": first}

    def embed(self, images):
        return self.patch_embed(patchify(images, self.patch_size))

    def context(self, times, condition):
        batch = len(condition["tokens"])
        time = jnp.broadcast_to(times, (batch, times.shape[1])).reshape(-1)
        rows = self.time_embed(time)
        return Context(rows, condition, summary=rows)


NETWORK = CaptionNet(channels=1, patch_size=4, hidden_size=16, depth=2, learn_sigma=False)
CAPTIONS = Captions()


@pytest.fixture(scope="module")
def config():
    config = smoke.get_config()
    config.diffusion.update(steps=4, guidance_scale=2.0, guided_channels=0)
    config.trajectories.update(count=32, points=(2, 1, 0), batch_size=16, shard_size=16, max_abs=0.0, keep_noisy=False)
    config.student.points = (2, 1, 0)
    config.teacher.update(steps=3, batch_size=16)
    config.distill.update(steps=3, batch_size=16)
    config.run.loggers = ()
    return config


@pytest.fixture(scope="module")
def teacher(config, tmp_path_factory):
    """The trained parameters, and their hash."""
    directory, rng = tmp_path_factory.mktemp("teacher"), np.random.default_rng(1)
    images = InMemory({"image": rng.uniform(-1, 1, (24, *SHAPE)).astype(np.float32), "label": np.arange(24) % 6})
    loss = denoising(NETWORK, make_process(config), label_dropout=0.1, horizontal_flip=False)
    params = init(NETWORK)
    task = Task(images, Method(loss, 6 * teacher_macs(NETWORK, SHAPE)), CAPTIONS)
    return finished(task, params, config, config.teacher, directory)


def init(network):
    image, time, condition = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), inputs_like(network))
    return jax.jit(network.init)(jax.random.key(0), image, time, condition)["params"]


def finished(task, params, config, settings, directory):
    """Trains; the averaged parameters out of the last checkpoint."""
    from ard_jax.parallel import with_shardings
    from ard_jax.training.checkpoints import load_parameters

    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
    start = tree_sha256(params)
    made = fit(task, params, config, settings, directory, make_mesh(), lambda: 0.0)
    ema = load_parameters(directory / "checkpoints", "ema", with_shardings(shapes, make_mesh()))
    assert made["step"] == settings.steps and tree_sha256(ema) == made["sha256"]["ema"] != start
    return ema


@pytest.fixture(scope="module")
def trajectories(config, teacher, tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    make_store(NETWORK, teacher, CAPTIONS, config, folder, make_mesh())
    described = store.describe(folder, number_of_shards(32, 16))
    store.finish(folder, features_of(config), described, {"shards": described})
    return store.Store(folder, {"shards": described})


def test_a_stored_trajectory_is_the_teacher_s_of_its_caption(config, teacher, trajectories):
    records = [trajectories[row] for row in range(len(trajectories))]
    numbers = np.array([record["label"] for record in records])
    assert set(numbers) == set(range(6)) and records[0].keys() == {"noise", "x0", "label", "index"}
    noise = np.stack([record["noise"] for record in records]).astype(np.float32)

    def last(condition):
        solve = jax.jit(lambda params, noise, c: sample_teacher(NETWORK, params, noise, c, make_solve(config)))
        return np.asarray(solve(teacher, noise, condition).x0[:, -1])

    stored = np.stack([record["x0"][-1] for record in records]).astype(np.float32)
    scale = np.abs(stored).max()
    np.testing.assert_allclose(last(CAPTIONS.rows(numbers)), stored, rtol=0, atol=2e-2 * scale)
    assert np.abs(last(CAPTIONS.rows((numbers + 1) % 6)) - stored).max() > 5e-2 * scale  # the words do matter


@pytest.mark.parametrize("heads", ["separate", "shared"])
def test_a_student_is_distilled_and_sampled(config, teacher, trajectories, tmp_path, heads):
    student = ARDStudent(NETWORK, steps=3, history_layers=1, heads=heads)
    params = jax.tree.map(jnp.copy, init_from_teacher(teacher, student))  # a training frees them
    given = Given(
        student=student,
        kind="history",
        teacher=NETWORK,
        solve=make_solve(config),
        shape=SHAPE,
        points=(2, 1, 0),
        target="x0",
        columns=(0, 1, 2),
        start=None,
        max_abs=0.0,
        seed=0,
        options=config.distill.ard,
    )
    method = find_method("ard")(given)
    assert method.flops == 6 * student_macs(student, SHAPE) > 0
    trained = finished(Task(trajectories, method, CAPTIONS), params, config, config.distill, tmp_path)
    noise, numbers = jax.random.normal(jax.random.key(1), (4, *SHAPE)), np.array([0, 1, 2, 5])
    roll = jax.jit(lambda params, noise, condition: sample_student(student, params, noise, condition))
    points = roll(trained, noise, CAPTIONS.rows(numbers))
    # the cached sampler is the training forward on its own predictions
    inputs = jnp.concatenate([noise[:, None], points[:, :-1]], axis=1)
    forced = jax.jit(student.apply)({"params": trained}, inputs, CAPTIONS.rows(numbers))
    np.testing.assert_allclose(forced, points, rtol=0, atol=2e-5 * np.abs(points).max())
    other = roll(trained, noise, CAPTIONS.rows(numbers[::-1].copy()))
    assert np.abs(other - points).max() > 1e-3  # it heeds what it is told
    own = parameter_shapes(student, jnp.zeros((1, 3, *SHAPE)), jax.tree.map(lambda x: x[:1], CAPTIONS.rows(numbers)))
    assert jax.tree.map(lambda leaf: leaf.shape, own) == jax.tree.map(lambda leaf: leaf.shape, trained)


def test_attention_backends_are_the_backbone_s_own():
    """The block's own attention is what `attend` is, so that a fused kernel serves a new backbone too."""
    q = jax.random.normal(jax.random.key(0), (2, 4, 2, 8))
    attend = NETWORK.attend_within_rows()
    np.testing.assert_array_equal(attend(q, q, q, None)[0], attention(q, q, q, "auto"))
