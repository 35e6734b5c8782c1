"""What a config must satisfy: names that are taken."""

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
