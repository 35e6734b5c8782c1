"""Forward processes x_t = α_t·x_0 + σ_t·ε, and the grids of times on which a teacher's ODE is solved.

A process says three things: α, σ and network time on a grid (`grid`), how the network's output becomes predictions of
x_0 and ε (`predict`), and what a network is trained on (`noised`, `target`). Solvers need no more than that.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ard_jax.errors import UserError

SPACINGS = ("linspace", "leading", "trailing", "dpm")


class Grid(NamedTuple):
    """Nodes of an ODE solve in the order walked, noise first. K network calls, K + 1 states, the last one the data.

    Attributes:
        times: network time of each call, (K,).
        alpha, sigma: coefficients of each state, (K + 1,), ending in 1 and 0.
    """

    times: np.ndarray
    alpha: np.ndarray
    sigma: np.ndarray

    @property
    def steps(self) -> int:
        return len(self.times)


class Prediction(NamedTuple):
    """E[x_0 | x_t] and E[ε | x_t], each (batch, height, width, channel)."""

    x0: jax.Array
    noise: jax.Array


def per_row(values: jax.Array, like: jax.Array) -> jax.Array:
    """(batch,) → (batch, 1, 1, …), to scale the rows of `like`."""
    return values.reshape(-1, *[1] * (like.ndim - 1))


@dataclasses.dataclass(frozen=True)
class LinearVP:
    """Variance-preserving process with linear β (DDPM; docs/METHOD.md section 2); the network predicts ε.

    Attributes:
        train_steps: number of timesteps, the network times being 0 … train_steps − 1.
        beta_start, beta_end: β of the first and the last.
        spacing: which timesteps a respaced solve keeps: "linspace" (DiT, respace.py: both ends), "leading" or
            "trailing" (diffusers' words: whole strides from the data end, or from the noise end), or "dpm" (what
            "linspace" is in diffusers' DPM-Solver: both ends and steps − 1 between them, without the data's).
    """

    train_steps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02
    spacing: str = "linspace"

    data_time = 0.0  # network time of data; a class attribute

    def __post_init__(self):
        if self.spacing not in SPACINGS:
            raise UserError(f"spacing is {self.spacing!r}: choose one of {', '.join(SPACINGS)}.")

    @property
    def noise_time(self) -> float:
        """Network time of pure noise."""
        return float(self.train_steps - 1)

    def alphas_cumprod(self) -> np.ndarray:
        """ᾱ of each timestep, float64 (train_steps,)."""
        betas = np.linspace(self.beta_start, self.beta_end, self.train_steps, dtype=np.float64)
        return np.cumprod(1.0 - betas)

    def timestep_map(self, steps: int) -> np.ndarray:
        """The timesteps that respacing keeps, rising.

        "linspace" keeps round(i · (T−1) / (steps−1)); "leading" i · ⌊T/steps⌋; "trailing" round((i+1) · T/steps) − 1;
        "dpm" round((i+1) · (T−1) / steps).

        Raises:
            UserError: not 1 ≤ steps ≤ train_steps.
        """
        if not 1 <= steps <= self.train_steps:
            raise UserError(
                f"steps is {steps}, but the process has {self.train_steps} timesteps: "
                f"choose a number from 1 to {self.train_steps}."
            )
        if self.spacing == "leading":
            return np.arange(steps) * (self.train_steps // steps)
        if self.spacing == "trailing":
            return np.array([round((i + 1) * self.train_steps / steps) - 1 for i in range(steps)])
        if self.spacing == "dpm":
            return np.array([round((i + 1) * (self.train_steps - 1) / steps) for i in range(steps)])
        stride = (self.train_steps - 1) / max(steps - 1, 1)
        return np.array([round(i * stride) for i in range(steps)]) if steps > 1 else np.array([self.train_steps - 1])

    def grid(self, steps: int) -> Grid:
        """The grid of a respaced solve."""
        times = self.timestep_map(steps)[::-1]
        signal = self.alphas_cumprod()[times]
        return Grid(
            times=times.astype(np.float64),
            alpha=np.append(np.sqrt(signal), 1.0),
            sigma=np.append(np.sqrt(1.0 - signal), 0.0),
        )

    def predict(self, output: jax.Array, x: jax.Array, alpha: jax.Array, sigma: jax.Array) -> Prediction:
        """Predictions from the network's output ε at state x."""
        return Prediction(x0=(x - sigma * output) / alpha, noise=output)

    def sample_times(self, key: jax.Array, batch: int) -> jax.Array:
        """Network times to train on, uniform over the timesteps, (batch,)."""
        return jax.random.randint(key, (batch,), 0, self.train_steps).astype(jnp.float32)

    def noised(self, x0: jax.Array, noise: jax.Array, times: jax.Array) -> jax.Array:
        """x_t = √ᾱ·x_0 + √(1−ᾱ)·ε."""
        signal = self.alphas_cumprod()  # 1 − ᾱ is taken in float64: it starts at 1e-4
        alpha, sigma = (jnp.asarray(np.sqrt(s), x0.dtype)[times.astype(jnp.int32)] for s in (signal, 1.0 - signal))
        return per_row(alpha, x0) * x0 + per_row(sigma, x0) * noise

    def target(self, x0: jax.Array, noise: jax.Array) -> jax.Array:
        """What the network is trained to put out: ε."""
        return noise


class VelocityVP(LinearVP):
    """The same process for a network that predicts v = α·ε − σ·x_0 (Salimans and Ho 2022, appendix D).

    At the noise end, where a prediction of ε says next to nothing of x_0, v is −x_0; at the data end x̂_0 is x itself,
    whatever the network says.
    """

    def predict(self, output: jax.Array, x: jax.Array, alpha: jax.Array, sigma: jax.Array) -> Prediction:
        """x̂_0 = α·x − σ·v, ε̂ = σ·x + α·v."""
        return Prediction(x0=alpha * x - sigma * output, noise=sigma * x + alpha * output)


@dataclasses.dataclass(frozen=True)
class FlowMatching:
    """Straight-line process x_t = (1−t)·x_0 + t·ε; the network predicts the velocity v = ε − x_0.

    Attributes:
        time_scale: length of the network's time (1000 for SD3-style networks, 1 for SiT).
        reversed: the network counts time from the noise (0) to the data (`time_scale`) and predicts x_0 − ε, as SiT
            does (arXiv 2401.08740; transport/path.py).
    """

    time_scale: float = 1000.0
    reversed: bool = False

    @property
    def noise_time(self) -> float:
        """Network time of pure noise."""
        return 0.0 if self.reversed else self.time_scale

    @property
    def data_time(self) -> float:
        """Network time of data."""
        return self.time_scale if self.reversed else 0.0

    @property
    def sign(self) -> int:
        """Of the network's output, as a multiple of ε − x_0."""
        return -1 if self.reversed else 1

    def grid(self, steps: int) -> Grid:
        """Uniform in t from 1 to 0.

        Raises:
            UserError: steps < 1.
        """
        if steps < 1:
            raise UserError(f"steps is {steps}: choose a number of at least 1.")
        t = np.linspace(1.0, 0.0, steps + 1)
        times = self.time_scale * (1.0 - t if self.reversed else t)
        return Grid(times=times[:-1], alpha=1.0 - t, sigma=t)

    def predict(self, output: jax.Array, x: jax.Array, alpha: jax.Array, sigma: jax.Array) -> Prediction:
        """x̂_0 = x_t − t·v, ε̂ = x_t + (1−t)·v."""
        velocity = self.sign * output
        return Prediction(x0=x - sigma * velocity, noise=x + alpha * velocity)

    def sample_times(self, key: jax.Array, batch: int) -> jax.Array:
        """Network times to train on, uniform in t, (batch,)."""
        return self.time_scale * jax.random.uniform(key, (batch,))

    def noised(self, x0: jax.Array, noise: jax.Array, times: jax.Array) -> jax.Array:
        """x_t = (1−t)·x_0 + t·ε."""
        t = times / self.time_scale
        t = per_row(1 - t if self.reversed else t, x0)
        return (1 - t) * x0 + t * noise

    def target(self, x0: jax.Array, noise: jax.Array) -> jax.Array:
        """What the network is trained to put out: v = ε − x_0, or x_0 − ε."""
        return self.sign * (noise - x0)


Process = LinearVP | FlowMatching


def few_step_process(process: Process) -> Process:
    """The process of a student that is conditioned on time: of a VP teacher's, one that predicts v.

    Its grid of S steps is at T·(S−b)/S, where `ARDStudent`'s blocks are: that of 2S steps has every node of it.
    """
    if not isinstance(process, LinearVP):
        return process
    return VelocityVP(process.train_steps, process.beta_start, process.beta_end, "trailing")
