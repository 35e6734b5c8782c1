"""JAX's random keys of one generator, whatever JAX_DEFAULT_PRNG_IMPL says: what a seed draws must not depend on it."""

import jax

GENERATOR = "threefry2x32"


def make_key(seed: int) -> jax.Array:
    return jax.random.key(seed, impl=GENERATOR)


def wrap_key(data: jax.Array) -> jax.Array:
    """The key of `jax.random.key_data`."""
    return jax.random.wrap_key_data(data, impl=GENERATOR)
