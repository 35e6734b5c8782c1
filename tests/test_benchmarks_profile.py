"""The profile knows what an operation is for and what it multiplies, and what goes on after its call."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import profile
from benchmarks.parts import Span
from benchmarks.profile import ATTENTION, GRADIENTS, WEIGHTS, Product

ROWS, WIDTH, HIDDEN, BATCH = 64, 32, 48, 6


def program(x, weight, q, k):
    """A product with a weight and its gradient, and one of queries with keys with its softmax."""

    def loss(weight):
        return jnp.sum(jnp.tanh(x @ weight) ** 2)

    weights = jax.nn.softmax(jnp.einsum("bqd,bkd->bqk", q, k), axis=-1)
    return jax.value_and_grad(loss)(weight), weights


@pytest.fixture(scope="module")
def compiled():
    rng = np.random.default_rng(0)
    shapes = (ROWS, WIDTH), (WIDTH, HIDDEN), (BATCH, ROWS, WIDTH), (BATCH, ROWS, WIDTH)
    args = [jnp.asarray(rng.standard_normal(shape, np.float32)) for shape in shapes]
    made = jax.jit(program).lower(*args).compile()
    return made, lambda: made(*args)


def test_products_are_those_of_the_program(compiled):
    known = profile.operations(compiled[0].as_text())
    taken, times = profile.profiled(compiled[1], known)
    found = {product.kind: product for name in times for product in known[name].products}
    assert {kind: product.flops for kind, product in found.items()} == {
        WEIGHTS: 2 * ROWS * WIDTH * HIDDEN,
        GRADIENTS: 2 * ROWS * WIDTH * HIDDEN,
        ATTENTION: 2 * BATCH * ROWS * ROWS * WIDTH,
    }
    assert "gelu" in {known[name].kind for name in times}
    assert all(times[name] == 1 for name in taken if name) and sum(taken.values()) > 0


def test_a_product_s_sizes():
    product = Product((4, 9, 8), (4, 7, 8), ((2,), (2,)), ((0,), (0,)))
    assert product.sizes == (4, 9, 8, 7) and str(product) == "4 times (9×8) · 8×7"
    transposed = Product((8, 9), (8, 7), ((0,), (0,)), ((), ()))
    assert transposed.sizes == (1, 9, 8, 7) and str(transposed) == "(9×8)ᵀ · 8×7"
    assert profile.names_of([product, transposed, product]) == f"2 of {product}, {transposed}"


def test_a_product_that_goes_on_after_its_call_ends_where_that_is_said():
    known = {"dot": profile.Operation(WEIGHTS, (Product((2, 2), (2, 2), ((1,), (0,)), ((), ())),))}
    known["add"] = profile.Operation("sums", ())
    caller = [(0, 2, "dot"), (3, 4, "add"), (10, 11, "dot"), (14, 16, "dot")]
    other = [(6, 6.1, "end: dot"), (7, 7.1, "end: add"), (17, 18, "end: dot")]
    assert [*profile.spans_of([caller, other], known)] == [
        Span(0, 6, "dot"),
        Span(3, 4, "add"),
        Span(10, 11, "dot"),
        Span(14, 17, "dot"),
    ]


def test_an_instant_is_shared_by_products_first():
    spans = [(Span(0, 6, "dot"), True), (Span(4, 8, "other"), True), (Span(5, 10, "add"), False)]
    spans.append((Span(12, 13, "dot"), True))
    assert profile.by_the_clock(spans) == {"dot": 4 + 1 + 1, "other": 1 + 2, "add": 2, "": 2}


def test_the_report_counts_the_model_s_work(compiled):
    text = profile.report(*compiled, flops=1e9, seconds=0.0)
    assert "(64×32) · 32×48" in text and "GFLOP/s here" in text and "utilisation" in text
