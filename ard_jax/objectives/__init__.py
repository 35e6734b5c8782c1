"""Training objectives, one small file each.

An objective is built once from its settings and is then a pure function
(params, frozen, batch, key) → (loss, metrics): `frozen` holds parameters that are read but not trained (None where
there are none), `key` is the run's random key, the same at every step, and whatever is drawn for an example is drawn
from that key and the example's position in the endless stream of data.
"""

from collections.abc import Callable
from typing import Any

import jax

Metrics = dict[str, jax.Array]
Objective = Callable[[Any, Any, dict[str, jax.Array], jax.Array], tuple[jax.Array, Metrics]]
