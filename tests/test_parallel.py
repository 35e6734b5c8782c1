"""How arrays lie on several devices; in a process of its own, since a process has as many as it started with."""

import json
import os
import subprocess
import sys

from pipeline_fixtures import ROOT

TURNS = """
import json

import jax
import jax.numpy as jnp
import numpy as np

from ard_jax.parallel import in_turns, make_mesh, put_batch

mesh = make_mesh()
rows = np.arange(48, dtype=np.float32).reshape(24, 2)
made = []


def double(part):
    made.append(part.shape)
    return jnp.stack([part, 2 * part], axis=-1)


for limit in (1, 4, 5, 100):  # of the six rows that each of four devices has
    run = jax.jit(lambda batch, limit=limit: in_turns(double, batch, mesh, limit))
    batch = put_batch(rows, mesh)
    results = run(batch)
    np.testing.assert_array_equal(results, np.stack([rows, 2 * rows], axis=-1))
    assert results.sharding.spec == batch.sharding.spec, results.sharding
    program = run.lower(batch).compile().as_text()
    assert not any(name in program for name in ("all-gather", "all-reduce", "all-to-all", "collective-permute"))
print(json.dumps(made))
"""


def test_a_batch_in_turns_stays_on_its_devices():
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    done = subprocess.run([sys.executable, "-c", TURNS], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [[4, 2], [12, 2], [12, 2], [24, 2]]
