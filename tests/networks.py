"""Networks and draws as tests write them down: in one call."""

import dataclasses

from ard_jax.conditions import draw_numbers
from ard_jax.diffusion import Guidance, LinearVP
from ard_jax.models import ARDStudent, DiT
from ard_jax.sampling import Solve, draw_noise

OF_STUDENTS = {field.name for field in dataclasses.fields(ARDStudent)} - {"backbone", "parent", "name"}


def ard_student(**fields) -> ARDStudent:
    """A student of a DiT; fields of both."""
    own = {name: fields.pop(name) for name in OF_STUDENTS & fields.keys()}
    return ARDStudent(DiT(**fields), **own)


def draw_noise_and_labels(key, indices, shape, num_classes):
    """Noise (batch, height, width, channel) and labels (batch,) of the same indices."""
    return draw_noise(key, indices, shape), draw_numbers(key, indices, num_classes)


def solve_of(
    steps=25, guidance_scale=1.5, guided_channels=3, guidance_interval=(0.0, 1.0), solver="ddim", process=None
) -> Solve:
    """How a teacher is sampled, of single settings."""
    return Solve(process or LinearVP(), solver, steps, Guidance(guidance_scale, guided_channels, guidance_interval))
