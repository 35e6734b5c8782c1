"""Students beside their teacher: what each of their steps is held against."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ard_jax.build import make_teacher
from ard_jax.conditions import Labels
from ard_jax.models import network_shapes
from ard_jax.paired import Paired
from ard_jax.parallel import make_mesh
from ard_jax.workdir import Loaded
from configs import smoke


@pytest.mark.parametrize("kind", ["stochastic", "deterministic"])
def test_a_student_without_a_history_is_held_against_predictions_whatever_its_target(kind):
    """Its steps end in x0-predictions, which no noisy point is like: `student.target` is that of a history."""
    config = smoke.get_config()
    config.student.kind = kind
    model, rng = make_teacher(config), np.random.default_rng(0)

    def draw(leaf):
        return jnp.asarray(0.1 * rng.normal(size=leaf.shape), jnp.float32)

    teacher, params = (jax.tree.map(draw, network_shapes(model)) for _ in range(2))

    def student(target):
        own = config.copy_and_resolve_references()
        own.student.target = target
        return Loaded(model, params, "", own)

    clean, noisy = student("x0"), student("xt")
    paired = Paired(config, Loaded(model, teacher, "", config), {"rival": clean}, Labels(10), None, make_mesh())
    (expected, pictures), (errors, same) = (paired.compare(one, 2) for one in (clean, noisy))
    assert errors == expected and errors["target"] == "x0"
    assert errors["psnr_per_step"][-1] == errors["psnr"] and np.array_equal(same, pictures)
