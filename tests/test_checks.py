"""What a config must satisfy: names that are taken, and a warm-up that ends."""

import pytest

from ard_jax.checks import validate
from ard_jax.errors import UserError
from configs import smoke


@pytest.mark.parametrize("name", ["label", "held_out", "real", "noise", "source", "halves"])
@pytest.mark.parametrize("section", ["student", "finetune"])
def test_no_student_is_called_what_files_of_pictures_or_results_hold_beside_it(section, name):
    """In gallery.npz it would take the place of the captions, of which are held out, or of the data's own pictures."""
    config = smoke.get_config()
    validate(config)
    config[section].name = name
    with pytest.raises(UserError, match=f"{section}.name is '{name}', which .+ and none of .*{name}"):
        validate(config)


@pytest.mark.parametrize("objective", ["distribution_matching", "trajectory_matching"])
def test_a_student_that_moves_seldom_must_warm_up_within_its_own_steps(objective):
    """Of 60 steps it makes every fifth: 12, of which 11 may warm it up."""
    config = smoke.get_config()
    config.distill.update({"objective": objective, "steps": 60, objective: {"ratio": 5}})
    config.distill.optimizer.warmup_steps = 11
    validate(config)
    config.distill.optimizer.warmup_steps = 12
    with pytest.raises(UserError, match="of 12 steps that the optimiser makes: choose fewer") as error:
        validate(config)
    assert error.value.key == "distill.optimizer.warmup_steps"
    config.distill.objective = "ard"
    validate(config)
