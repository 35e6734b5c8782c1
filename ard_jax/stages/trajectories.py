"""Solves the teacher's ODE from numbered noises and stores the trajectories as a TFDS dataset.

Reads the teacher and writes `trajectories/`. Started again, on any number of hosts, it makes just the shards that are
missing, truncated or altered.
"""

import logging
import pathlib
from typing import Any

import jax
import ml_collections

from ard_jax.captions.conditions import check_text_encoder, inputs_of, load_conditions
from ard_jax.config import plain
from ard_jax.errors import UserError
from ard_jax.files import read_json
from ard_jax.hosts import wait_for_all
from ard_jax.parallel import is_first, local_mesh
from ard_jax.progress import Stopwatch
from ard_jax.sharded import number_of_shards
from ard_jax.trajectories import store
from ard_jax.trajectories.generate import features_of, make_store, manifest
from ard_jax.trajectories.store import stored_settings
from ard_jax.workdir import (
    claim,
    load_teacher,
    write_done,
)

log = logging.getLogger("ard_jax")


def run(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
    """Makes the store.

    Raises:
        UserError: there is no teacher, the workdir belongs to another config, or every trajectory was dropped.
    """
    watch, directory = Stopwatch(), workdir / "trajectories"
    mesh = local_mesh(config.mesh)
    model, params, teacher_hash, _ = load_teacher(config, workdir, mesh)
    conditions = load_conditions(config, workdir)
    check_text_encoder(config, workdir, conditions)
    inputs = {"teacher": teacher_hash, **inputs_of(conditions)}
    claim(directory, config, "trajectories", **inputs)
    path = directory / "manifest.json"
    if is_first() and path.exists() and read_json(path, dict[str, Any]).get("tried") != config.trajectories.count:
        path.unlink()  # nobody shall read a store that grows
    make_store(
        model,
        params,
        conditions,
        config,
        directory,
        mesh,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    wait_for_all("all shards are written")
    if not is_first():
        return
    described = store.describe(directory, number_of_shards(config.trajectories.count, config.trajectories.shard_size))
    made = manifest(config, stored_settings(plain(config)), inputs, described)
    if not made["kept"]:
        raise UserError(
            f"all {made['tried']} trajectories leave [-{config.trajectories.max_abs}, {config.trajectories.max_abs}]: "
            f"train the teacher longer, or raise trajectories.max_abs."
        )
    store.finish(directory, features_of(config), described, made)
    log.info("%d trajectories kept, %d dropped.", made["kept"], made["dropped"])
    hashes = {shard["file"]: shard["sha256"] for shard in described}
    write_done(directory, hashes, watch(), kept=made["kept"], dropped=made["dropped"])
