"""The discriminator's heads against the reference numbers, and what spectral norm and grouped batch norm promise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import keystr, tree_leaves_with_path
from quick import quick_jit

from ard_jax.models import Discriminator, DiT, parameter_shapes
from ard_jax.models.discriminator import (
    NORMALISED,
    norm_groups,
    normalise_kernels,
    power_iteration,
    random_vectors,
    spectral_norms,
)
from ard_jax.models.partition import logical_axes

PUBLISHED = {
    "pointwise": "main.0.0",
    "pointwise_norm": "main.0.1",
    "windowed": "main.1.fn.0",
    "windowed_norm": "main.1.fn.1",
    "logit": "cls",
    "condition": "cmapper",
}


def kernel_of(weight):
    """(out, in, window) → (window, in, out), or without the axis of a window of 1; Linear's (out, in) → (in, out)."""
    kernel = np.transpose(weight)
    return kernel[0] if kernel.shape[0] == 1 else kernel


def from_published(arrays, dtype=np.float32):
    """The parameters of a discriminator of one head."""
    heads = {}
    for layer, name in PUBLISHED.items():
        bias = arrays[f"param/{name}.bias"].astype(dtype)
        if layer.endswith("_norm"):
            heads[layer] = {"scale": arrays[f"param/{name}.weight"].astype(dtype), "bias": bias}
        else:
            suffix = ".weight_orig" if layer in NORMALISED else ".weight"
            heads[layer] = {"kernel": kernel_of(arrays[f"param/{name}{suffix}"].astype(dtype)), "bias": bias}
    return {"heads": jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], heads)}


def vectors_of(arrays, source, dtype=np.float32):
    """Published vectors: v runs over (in, window) there, and over (window, in) here."""

    def right(layer):
        v = arrays[f"{source}/{PUBLISHED[layer]}.weight_v"].astype(dtype)
        inputs = arrays[f"param/{PUBLISHED[layer]}.weight_orig"].shape[1]
        return jnp.asarray(v.reshape(inputs, -1).T.reshape(1, -1))

    left = {
        layer: jnp.asarray(arrays[f"{source}/{PUBLISHED[layer]}.weight_u"].astype(dtype)[None]) for layer in NORMALISED
    }
    return {"u": left, "v": {layer: right(layer) for layer in NORMALISED}}


@quick_jit
def judge(params, vectors, tokens, condition):
    return Discriminator(len(tokens)).apply({"params": normalise_kernels(params, vectors)}, tokens, condition)


@pytest.mark.parametrize("rows", [4, 12, 16])
def test_logits_equal_the_reference(golden, rows):
    arrays = golden("disc_tiny")
    inputs = arrays[f"x_b{rows}"][None], arrays[f"c_b{rows}"]
    logits = judge(from_published(arrays), vectors_of(arrays, "param"), *inputs)
    np.testing.assert_allclose(logits[0], arrays[f"out_b{rows}"][:, 0], rtol=0, atol=3e-6)


@pytest.mark.parametrize("rows", [4, 12, 16])
def test_logits_equal_the_reference_in_float64(golden, x64, rows):
    arrays = golden("disc_tiny")
    inputs = arrays[f"x_b{rows}"][None].astype(np.float64), arrays[f"c_b{rows}"].astype(np.float64)
    logits = judge(from_published(arrays, np.float64), vectors_of(arrays, "param", np.float64), *inputs)
    np.testing.assert_allclose(logits[0], arrays[f"out_b{rows}_f64"][:, 0], rtol=0, atol=1e-10)


def test_normalised_kernels_and_sigma_equal_the_reference(golden):
    arrays = golden("disc_tiny")
    params, vectors = from_published(arrays), vectors_of(arrays, "param")
    sigma = spectral_norms(params, vectors)
    np.testing.assert_allclose([sigma[layer][0] for layer in NORMALISED], arrays["sigma"], rtol=1e-6)
    heads = normalise_kernels(params, vectors)["heads"]
    for layer in NORMALISED:
        expected = kernel_of(arrays[f"effective/{PUBLISHED[layer]}.weight"])
        np.testing.assert_allclose(heads[layer]["kernel"][0], expected, rtol=0, atol=1e-6)


def test_one_training_pass_turns_the_vectors_once(golden):
    arrays = golden("disc_tiny")
    params = from_published(arrays)
    after = power_iteration(params, vectors_of(arrays, "init"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), after, vectors_of(arrays, "after_train1"))
    logits = judge(params, after, arrays["x_b4"][None], arrays["c_b4"])
    np.testing.assert_allclose(logits[0], arrays["out_train1_b4"][:, 0], rtol=0, atol=3e-6)


# ------------------------------------------------------------------------------------------------- spectral norm


def drawn(heads=3, width=8):
    """A discriminator of several heads, its parameters and fresh vectors."""
    model = Discriminator(heads)
    inputs = jnp.zeros((heads, 2, 4, width)), jnp.zeros((2, 6))
    params = model.init(jax.random.key(0), *inputs)["params"]
    return model, params, random_vectors(params, jax.random.key(1))


def test_warm_vectors_give_the_largest_singular_value_and_fresh_ones_do_not():
    _, params, vectors = drawn()
    largest = {}
    for layer in NORMALISED:
        kernel = np.asarray(params["heads"][layer]["kernel"])
        matrices = kernel.reshape(len(kernel), -1, kernel.shape[-1])
        largest[layer] = np.linalg.svd(matrices, compute_uv=False)[:, 0]
    fresh, warm = (spectral_norms(params, power_iteration(params, vectors, times)) for times in (0, 200))
    for layer in NORMALISED:
        np.testing.assert_allclose(warm[layer], largest[layer], rtol=1e-3)
        assert (np.abs(fresh[layer]) < 0.7 * largest[layer]).all()


def test_the_gradient_of_sigma_goes_through_the_kernel_alone():
    """dσ/dW = v·uᵀ: the vectors are constants."""
    _, params, vectors = drawn()
    gradient = jax.grad(lambda params, vectors: spectral_norms(params, vectors)["windowed"].sum(), argnums=(0, 1))
    to_params, to_vectors = gradient(params, vectors)
    u, v = np.asarray(vectors["u"]["windowed"]), np.asarray(vectors["v"]["windowed"])
    kernel = to_params["heads"]["windowed"]["kernel"]
    np.testing.assert_allclose(kernel, np.einsum("hi,ho->hio", v, u).reshape(kernel.shape), atol=1e-6)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(to_vectors))


# -------------------------------------------------------------------------------------- heads and groups


def test_heads_are_the_same_as_each_alone():
    _, params, vectors = drawn()
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.normal(size=(3, 2, 4, 8)), jnp.float32)
    condition = jnp.asarray(rng.normal(size=(2, 6)), jnp.float32)
    vectors = power_iteration(params, vectors, 30)
    together = judge(params, vectors, tokens, condition)
    for head in range(3):
        own, own_vectors = jax.tree.map(lambda leaf, head=head: leaf[head : head + 1], (params, vectors))
        alone = judge(own, own_vectors, tokens[head : head + 1], condition)
        np.testing.assert_allclose(together[head], alone[0], rtol=0, atol=1e-5)
    assert np.abs(together[0] - together[1]).max() > 0.1  # each was drawn by itself


def test_groups_are_as_few_as_divide_the_batch():
    groups = [norm_groups(rows) for rows in (1, 7, 8, 9, 12, 16, 48, 20, 13, 22)]
    assert groups == [1, 1, 1, 3, 2, 2, 6, 4, 13, 11]


def test_samples_share_statistics_with_their_own_group_alone():
    _, params, vectors = drawn()
    vectors = power_iteration(params, vectors, 30)
    rng = np.random.default_rng(0)
    tokens = rng.normal(size=(3, 16, 4, 8)).astype(np.float32)
    condition = jnp.asarray(rng.normal(size=(16, 6)), jnp.float32)
    before = judge(params, vectors, jnp.asarray(tokens), condition)
    tokens[:, 15] += rng.normal(size=(3, 4, 8))
    moved = np.abs(judge(params, vectors, jnp.asarray(tokens), condition) - before).max(axis=(0, 2))
    assert not moved[:8].any() and (moved[8:] > 1e-3).all()


# ------------------------------------------------------------------------------------- the teacher's features


def test_features_are_what_the_blocks_put_out(golden):
    from ard_jax.convert import from_torch

    arrays = golden("dit_strong")
    model, params = from_torch(arrays.state_dict(), num_heads=4)
    inputs = arrays.images("x"), arrays["t"], arrays["y"]

    def features(chosen):
        return quick_jit(lambda params: model.apply({"params": params}, *inputs, chosen, method="features"))(params)

    tokens, condition = features(())
    assert len(tokens) == model.depth
    for block in range(model.depth):
        np.testing.assert_allclose(tokens[block], arrays[f"inter_f64/block{block}"], rtol=0, atol=1e-3)
    embedded = arrays["inter_f64/t_emb"] + arrays["inter_f64/y_emb"]
    np.testing.assert_allclose(condition, embedded, rtol=0, atol=1e-4)  # before SiLU
    some, _ = features((1, 0))
    np.testing.assert_allclose(some, tokens[jnp.asarray([1, 0])], rtol=0, atol=1e-4)


def test_blocks_after_the_last_chosen_one_are_not_run():
    model = DiT(channels=1, hidden_size=8, num_heads=2, depth=3, num_classes=2)
    inputs = jnp.ones((1, 4, 4, 1)), jnp.zeros(1), jnp.zeros(1, jnp.int32)
    params = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.1), parameter_shapes(model, *inputs))
    broken = params | {"blocks": jax.tree.map(lambda leaf: leaf.at[2].set(jnp.nan), params["blocks"])}
    tokens, _ = model.apply({"params": broken}, *inputs, (0, 1), method="features")
    assert tokens.shape == (2, 1, 4, 8) and np.isfinite(tokens).all()


def test_kernels_are_split_over_their_inputs_and_vectors_are_whole():
    _, params, vectors = drawn()
    axes = {keystr(path): logical_axes(path, leaf.ndim) for path, leaf in tree_leaves_with_path(params)}
    assert axes["['heads']['windowed']['kernel']"] == ("head", "window", "embed", "feature")
    for layer in ("pointwise", "logit", "condition"):
        assert axes[f"['heads']['{layer}']['kernel']"] == ("head", "embed", "feature")
    for path, leaf in tree_leaves_with_path(vectors):
        assert logical_axes(path, leaf.ndim) == (None, None)
