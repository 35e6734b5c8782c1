"""Networks of three numbers, and what the rival methods make of them, in NumPy and float64."""

import jax
import jax.numpy as jnp
import numpy as np
from networks import solve_of

from ard_jax.diffusion import FlowMatching, LinearVP
from ard_jax.objectives import Given
from ard_jax.objectives.few_steps import draw_nodes

KEY = jax.random.key(3)
SHAPE, ROWS, CLASSES, SCALE = (2, 4, 1), 24, 3, 1.5
PROCESSES = {"vp": LinearVP(), "flow": FlowMatching()}


# ------------------------------------------------------------------------------------- networks of three numbers


class Toy:
    """a·x + b·t/1000 + c[label], the last c being the null class's."""

    num_classes, channels, learn_sigma = CLASSES, 1, False

    def unconditional(self, condition):
        return jnp.full_like(condition, self.num_classes)

    def apply(self, variables, x, t=None, y=None, method=None):
        if method == "prepare":
            return x
        return toy_output(variables["params"], x, t, y, jnp)


def toy_output(params, x, t, y, np=np):
    by_label = np.asarray(params["c"])[y][:, None, None, None]
    return params["a"] * x + params["b"] * np.reshape(t, (-1, 1, 1, 1)) / 1000 + by_label


TEACHER = {"a": np.float32(0.7), "b": np.float32(0.2), "c": np.array([0.1, -0.3, 0.4, 0.05], np.float32)}
PARAMS = {"a": np.float32(0.4), "b": np.float32(-0.5), "c": np.array([0.3, 0.2, -0.6, 9.0], np.float32)}


class Exact:
    """A network that knows that every image of a class is one number: its prediction of x_0, whatever it is shown."""

    num_classes, channels, learn_sigma = CLASSES, 1, False

    def unconditional(self, condition):
        return jnp.full_like(condition, self.num_classes)

    def __init__(self, process, velocity):
        self.process, self.velocity = process, velocity

    def apply(self, variables, x, t=None, y=None, method=None):
        if method == "prepare":
            return x
        x0 = variables["params"]["c"][y][:, None, None, None]
        ones = jnp.ones((len(x), 1, 1, 1))
        alpha, sigma = self.process.noised(ones, 0 * ones, t), self.process.noised(0 * ones, ones, t)
        noise = (x - alpha * x0) / sigma
        return alpha * noise - sigma * x0 if self.velocity else noise


def given(process, points, *, teacher=None, student=None, start=None, scale=SCALE, **more):
    return Given(
        student=student or Toy(),
        teacher=teacher or Toy(),
        solve=solve_of(5, scale, 0, process=process),
        shape=SHAPE,
        points=points,
        target="x0",
        columns=(0, 2),
        start=start,
        max_abs=0.0,
        seed=0,
        **({"kind": "stochastic", "options": {}} | more),
    )


def make_batch():
    rng = np.random.default_rng(0)
    return {
        "noise": rng.normal(size=(ROWS, *SHAPE)).astype(np.float32),
        "x0": rng.uniform(-1, 1, (ROWS, 3, *SHAPE)).astype(np.float16),
        "condition": rng.integers(0, CLASSES, ROWS).astype(np.int32),
        "position": rng.choice(1000, ROWS, replace=False).astype(np.int32),
    }


# ---------------------------------------------------------------------------------- the same in NumPy and float64


def nodes_of(process, steps):
    """α and σ of the few-step grid's nodes and of the data, and the nodes' times."""
    if isinstance(process, FlowMatching):
        t = 1 - np.arange(steps + 1) / steps
        return 1 - t, t, 1000 * t[:-1]
    times = 1000 * (steps - np.arange(steps)) // steps - 1
    signal = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[times]
    return np.append(np.sqrt(signal), 1.0), np.append(np.sqrt(1 - signal), 0.0), times


def row(values, node):
    return np.asarray(values, np.float64)[node][:, None, None, None]


def predict(process, params, x, y, alpha, sigma, times, *, velocity, scale=1.0):
    """x̂_0 and ε̂, guided."""
    null = np.full_like(y, CLASSES)
    output = toy_output(params, x, times, null)
    output = output + scale * (toy_output(params, x, times, y) - output)
    if isinstance(process, FlowMatching):
        return x - sigma * output, x + alpha * output
    if velocity:
        return alpha * x - sigma * output, sigma * x + alpha * output
    return (x - sigma * output) / alpha, output


def at(process, steps, params, x, y, node, **how):
    """`predict` at nodes of the grid."""
    alpha, sigma, times = nodes_of(process, steps)
    times = np.append(times, 0)[node]
    return predict(process, float64(params), x, y, row(alpha, node), row(sigma, node), times, **how)


def float64(tree):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


def noised(process, steps, x0, noise, node):
    alpha, sigma, _ = nodes_of(process, steps)
    return row(alpha, node) * x0 + row(sigma, node) * noise


def drawn(key, batch, nodes):
    node, noise = draw_nodes(key, batch["position"], nodes, SHAPE)
    return np.asarray(node), np.asarray(noise, np.float64)
