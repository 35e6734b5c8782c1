"""`ard_jax.workdir` under the name that it had in the first version, for those who import it from there."""

from ard_jax.workdir import *  # noqa: F403
