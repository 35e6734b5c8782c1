"""Every attention backend computes the reference's numbers, and is chosen or refused as it should be."""

import importlib.util
import os
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import ard_student

from ard_jax.errors import UserError
from ard_jax.models import MASKS, init_from_teacher
from ard_jax.models.attention import attention, block_attention, choose_backend
from ard_jax.models.dit import DiT
from ard_jax.models.masks import visible_blocks
from ard_jax.models.splash import BlockMask
from ard_jax.plan.topology import ENVIRONMENT

TOKENS, HEADS, WIDTH = 128, 2, 8
CAPABILITY = "ard_jax.models.attention.compute_capability"


def inputs(rows, dtype="float32", lengths=(TOKENS, TOKENS, TOKENS)):
    rng = np.random.default_rng(rows)
    return [jnp.asarray(rng.normal(size=(rows, size, HEADS, WIDTH)), dtype) for size in lengths]


def dense_mask(mask, steps, tokens):
    blocks = np.asarray([[k in visible_blocks(mask, q) for k in range(steps)] for q in range(steps)])
    return np.kron(blocks, np.ones((tokens, tokens), bool)).astype(bool)


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("mask", MASKS)
def test_the_lazy_mask_is_the_dense_one(mask, steps):
    seen = tuple(visible_blocks(mask, block) for block in range(steps))
    lazy, dense = BlockMask(seen, steps, 3), dense_mask(mask, steps, 3)
    assert lazy.shape == dense.shape
    np.testing.assert_array_equal(lazy[:, :], dense)
    np.testing.assert_array_equal(lazy[2 : 3 * steps, 1:3], dense[2:, 1:3])


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("mask", MASKS)
def test_splash_is_the_reference_forward_and_backward(mask, steps):
    q, k, v = inputs(steps)

    def run(backend):
        def loss(q, k, v):
            out = block_attention(q, k, v, mask, steps, backend)
            return (jnp.sin(out) * (1 + out)).sum(), out

        return jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(q, k, v)

    for ours, reference in zip(jax.tree.leaves(run("splash_interpreted")), jax.tree.leaves(run("xla")), strict=True):
        np.testing.assert_allclose(ours, reference, atol=2e-5)


@pytest.mark.parametrize("tokens", [64, 128, 300])  # all keys at once, two pieces, one a block
@pytest.mark.parametrize("mask", MASKS)
def test_blocks_in_pieces_are_a_dense_softmax_forward_and_backward(mask, tokens, x64):
    steps = 4
    q, k, v = inputs(steps, "float64", (tokens,) * 3)
    seen = dense_mask(mask, steps, tokens)

    def dense(q, k, v):
        q, k, v = (x.reshape(1, steps * tokens, HEADS, WIDTH) for x in (q, k, v))
        logits = jnp.einsum("rqhd,rkhd->rhqk", q, k) / WIDTH**0.5
        weights = jax.nn.softmax(jnp.where(seen, logits, -jnp.inf))
        return jnp.einsum("rhqk,rkhd->rqhd", weights, v).reshape(steps, tokens, HEADS, WIDTH)

    def run(attend):
        def loss(q, k, v):
            out = attend(q, k, v)
            return (jnp.sin(out) * (1 + out)).sum(), out

        return jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(q, k, v)

    ours, reference = run(lambda *given: block_attention(*given, mask, steps, "xla")), run(dense)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12), ours, reference)


def test_splash_in_bfloat16_is_the_reference_within_rounding():
    q, k, v = inputs(2, "bfloat16")
    exact = block_attention(*(x.astype("float32") for x in (q, k, v)), "causal", 2, "xla")
    ours = block_attention(q, k, v, "causal", 2, "splash_interpreted")
    assert ours.dtype == jnp.bfloat16
    np.testing.assert_allclose(ours.astype("float32"), exact, atol=2**-6)


def test_splash_with_more_keys_than_queries_is_the_reference():
    q, k, v = inputs(2, lengths=(TOKENS, 3 * TOKENS, 3 * TOKENS))
    ours, reference = (attention(q, k, v, backend) for backend in ("splash_interpreted", "xla"))
    np.testing.assert_allclose(ours, reference, atol=1e-5)


FIELDS = dict(channels=1, patch_size=1, hidden_size=8, depth=2, num_heads=1, num_classes=3, learn_sigma=False)


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_a_student_and_its_sampler_are_the_same_by_splash(remat):
    rng = np.random.default_rng(0)
    points, y = jnp.asarray(rng.normal(size=(1, 2, 8, 16, 1)), "float32"), jnp.asarray([1])
    shapes = jax.eval_shape(DiT(**FIELDS).init, jax.random.key(0), points[:, 0], jnp.zeros(1), y)["params"]
    params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * 0.3, "float32"), shapes)

    def run(backend):
        model = ard_student(**FIELDS, steps=2, history_layers=1, remat=remat, attention=backend)
        start = init_from_teacher(params, model)

        def loss(params):
            out = model.apply({"params": params}, points, y)
            return (out**2).mean(), out

        grads, out = jax.jit(jax.grad(loss, has_aux=True))(start)
        first, cache = model.apply({"params": start}, points[:, 0], y, method="step")
        second, _ = model.apply({"params": start}, points[:, 1], y, cache, method="step")
        return grads, out, jnp.stack([first, second], axis=1)

    ours, reference = run("splash_interpreted"), run("xla")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5), ours, reference)
    np.testing.assert_allclose(ours[1], ours[2], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(
    "platform, dtype, tokens, head_dim, chosen",
    [
        ("cpu", "float32", 4096, 64, "xla"),
        ("cpu", "bfloat16", 4096, 64, "xla"),
        ("gpu", "bfloat16", 256, 72, "cudnn"),
        ("gpu", "float16", 256, 64, "cudnn"),
        ("gpu", "float32", 256, 64, "xla"),
        ("gpu", "bfloat16", 256, 12, "xla"),
        ("tpu", "bfloat16", 1024, 72, "splash"),
        ("tpu", "float32", 4096, 64, "splash"),
        ("tpu", "bfloat16", 256, 72, "xla"),
        ("tpu", "bfloat16", 1032, 72, "xla"),
    ],
)
def test_auto_takes_the_kernel_of_the_device_where_it_applies(platform, dtype, tokens, head_dim, chosen, monkeypatch):
    monkeypatch.setattr(CAPABILITY, lambda: None)  # whatever GPU is here
    assert choose_backend("auto", platform, jnp.dtype(dtype), tokens, head_dim) == chosen


@pytest.mark.parametrize(
    "capability, chosen", [((7, 5), "xla"), ((8, 0), "cudnn"), ((10, 0), "cudnn"), (None, "cudnn")]
)
def test_cudnn_is_for_gpus_that_have_its_kernel(capability, chosen, monkeypatch):
    monkeypatch.setattr(CAPABILITY, lambda: capability)
    assert choose_backend("auto", "gpu", jnp.dtype("bfloat16"), 256, 64) == chosen
    if chosen == "cudnn":
        assert choose_backend("cudnn", "gpu", jnp.dtype("bfloat16"), 256, 64) == "cudnn"
        return
    with pytest.raises(
        UserError, match=r"compute capability 8\.0 \(Ampere\) or newer, and here it is 7\.5; choose auto"
    ):
        choose_backend("cudnn", "gpu", jnp.dtype("bfloat16"), 256, 64)


@pytest.mark.parametrize(
    "said, capability",
    [(["7.5"], (7, 5)), (["10.0"], (10, 0)), (["8.6", "7.5"], (7, 5)), (["gfx90a"], None), ([], None)],
)
def test_the_compute_capability_is_that_of_the_least_gpu_here(said, capability, monkeypatch):
    def local_devices(backend):
        assert backend == "gpu"
        if not said:
            raise RuntimeError(
                "Unknown backend: 'gpu' requested, but no platforms that are instances of gpu are present."
            )
        return [SimpleNamespace(compute_capability=one) for one in said]

    monkeypatch.setattr(jax, "local_devices", local_devices)
    assert importlib.import_module("ard_jax.models.attention").compute_capability() == capability


@pytest.mark.parametrize(
    "backend, platform, dtype, tokens, words",
    [
        ("cudnn", "cpu", "bfloat16", 256, "it needs an NVIDIA GPU, and this is cpu"),
        ("cudnn", "gpu", "float32", 256, "bfloat16 or float16, not in float32"),
        ("splash", "gpu", "bfloat16", 1024, "it needs a TPU, and this is gpu"),
        ("splash", "tpu", "bfloat16", 100, "multiples of 128 tokens, not 100"),
        ("flash", "tpu", "bfloat16", 1024, "'flash': choose one of auto, xla"),
    ],
)
def test_a_backend_that_cannot_run_is_refused(backend, platform, dtype, tokens, words):
    with pytest.raises(UserError, match=words):
        choose_backend(backend, platform, jnp.dtype(dtype), tokens, 64)


def run_alone(program, **environment):
    done = subprocess.run([sys.executable, "-c", program], env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


SPLIT = """
import jax, jax.numpy as jnp, numpy as np
from ard_jax.models.attention import block_attention
from ard_jax.parallel import make_mesh, on_mesh
mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
rng = np.random.default_rng(0)
q, k, v = (jnp.asarray(rng.normal(size=(8, 128, 2, 8)), "float32") for _ in range(3))
def grads(backend):
    return jax.grad(lambda *x: jnp.sin(block_attention(*x, "causal", 2, backend)).sum(), argnums=(0, 1, 2))
program = jax.jit(on_mesh(mesh)(grads("splash_interpreted")))
assert "shard_map" in str(jax.make_jaxpr(program)(q, k, v))
split = jax.NamedSharding(mesh, jax.P(("data", "fsdp"), None, "tensor"))
ours = program(*(jax.device_put(x, split) for x in (q, k, v)))
for a, b in zip(ours, grads("xla")(q, k, v)):
    assert a.sharding.shard_shape(a.shape) == (2, 128, 1, 8), a.sharding
    np.testing.assert_allclose(a, b, atol=2e-5)
"""


@pytest.mark.slow
def test_splash_splits_batch_and_heads_over_a_mesh():
    run_alone(SPLIT, XLA_FLAGS="--xla_force_host_platform_device_count=8")


AHEAD = """
import sys, jax, jax.numpy as jnp
from jax.experimental import topologies
from ard_jax.models.attention import block_attention
from ard_jax.parallel import make_mesh, on_mesh
devices = topologies.get_topology_desc(platform="tpu", topology_name=sys.argv[1]).devices
head_dim = int(sys.argv[2])
mesh = make_mesh({"data": 2, "fsdp": 1, "tensor": 2}, devices)
split = jax.NamedSharding(mesh, jax.P(("data", "fsdp"), None, "tensor"))
x = jax.ShapeDtypeStruct((8, 1024, 16, head_dim), jnp.bfloat16, sharding=split)
def loss(*x):
    return jnp.sin(block_attention(*x, "causal", 4, "auto").astype("float32")).sum()
done = jax.jit(on_mesh(mesh)(jax.value_and_grad(loss, argnums=(0, 1, 2)))).lower(x, x, x).compile()
assert done.as_text().count("tpu_custom_call") >= 3
memory = done.memory_analysis().temp_size_in_bytes
print(sys.argv[1], head_dim, memory)
assert memory < 4096 * 4096 * 8 * 2, memory  # one bfloat16 array (heads of a device, S T, S T)
"""


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="needs libtpu, the compiler for TPUs")
@pytest.mark.parametrize("head_dim", [64, 72])
@pytest.mark.parametrize("topology", ["v5e:2x2", "v6e:2x2"])
def test_splash_compiles_for_tpus_and_holds_no_logits(topology, head_dim):
    program = f"import sys; sys.argv = ['', {topology!r}, '{head_dim}']\n{AHEAD}"
    run_alone(program, XLA_FLAGS="", **ENVIRONMENT)
