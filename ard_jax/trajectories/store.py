"""The trajectory store: one record a trajectory; sharded.py says how it lies on disk and how anybody opens it."""

import hashlib
import os
import pathlib
from collections.abc import Mapping
from typing import Any, Required, TypedDict

import ml_collections
import numpy as np
import tensorflow_datasets as tfds

from ard_jax.config import flatten, keys_that_change, plain
from ard_jax.errors import UserError, first_line
from ard_jax.files import read_json
from ard_jax.sharded import DTYPES as DTYPES
from ard_jax.sharded import Layout, Shard, data_folder, first_problem, open_records, tensor
from ard_jax.sharded import describe as describe
from ard_jax.workdir import store_folder

LAYOUT = Layout("trajectories", "ODE trajectories of a diffusion teacher, for distillation.")
write_shard, whole_shards, finish = LAYOUT.write_shard, LAYOUT.whole_shards, LAYOUT.finish


def record_features(
    shape: tuple[int, int, int], points: int, dtype: str, keep_noisy: bool
) -> tfds.features.FeaturesDict:
    """The record: noise (H, W, C), x0 (P, H, W, C), optionally xt (P, H, W, C), label and index."""
    features = {
        "noise": tensor(shape, dtype),
        "x0": tensor((points, *shape), dtype),
        "label": tfds.features.Scalar(dtype=np.int64),
        "index": tfds.features.Scalar(dtype=np.int64),
    }
    if keep_noisy:
        features["xt"] = tensor((points, *shape), dtype)
    return tfds.features.FeaturesDict(features)


class Manifest(TypedDict, total=False):
    """What those who read a store ask of its manifest."""

    shards: Required[list[Shard]]
    teacher_sha256: str
    captions_sha256: str
    settings: dict[str, Any]
    points: list[int]
    keep_noisy: bool


def read_manifest(directory: pathlib.Path) -> Manifest:
    """The manifest of a whole store.

    Raises:
        UserError: there is none, or it is damaged.
    """
    path = directory / "manifest.json"
    if not path.exists():
        raise UserError(
            f"there is no whole trajectory store in {directory} (no manifest.json): run the stage 'trajectories' "
            f"first, with the same config, or set trajectories.dir to a store."
        )
    return read_json(path, Manifest)


def check_shards(directory: pathlib.Path, manifest: Manifest, checksums: bool) -> None:
    """Compares every shard with the manifest: its size, and with `checksums` its SHA-256.

    Raises:
        UserError: a shard is missing, truncated or altered; the sentence names it and says how to remake it alone.
    """
    if found := first_problem(directory, manifest["shards"], checksums):
        shard, problem = found
        raise _broken_shard(data_folder(directory) / shard["file"], problem)


def _broken_shard(path: pathlib.Path, problem: str) -> UserError:
    return UserError(f"shard {path} {problem}: run the stage 'trajectories' again, which makes only what is missing.")


class Store:
    """A whole store as a random-access source of records (dicts of arrays); see `check_shards`.

    Reading a record raises UserError if its bytes are not those that were written, as ArrayRecord's checksums tell.
    """

    def __init__(self, directory: pathlib.Path, manifest: Manifest):
        folder = data_folder(directory)
        try:
            self.records = open_records(tfds.builder_from_directory(os.fspath(folder)))
        except Exception as error:  # what TFDS and protobuf raise of a file that is cut
            raise UserError(
                f"TFDS cannot read the dataset_info.json and features.json in {folder} ({first_line(error)}): run the "
                f"stage 'trajectories' again, which writes them anew."
            ) from error
        self.paths = [data_folder(directory) / shard["file"] for shard in manifest["shards"]]
        self.ends = np.cumsum([shard["records"] for shard in manifest["shards"]])

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        try:
            return self.records[index]
        except RuntimeError as error:
            path = self.paths[np.searchsorted(self.ends, index, side="right")]
            raise _broken_shard(path, f"cannot be read ({first_line(error)})") from error


def open_store(
    config: ml_collections.ConfigDict, workdir: pathlib.Path, teacher_hash: str, told: Mapping[str, str]
) -> tuple[Store, Manifest]:
    """The trajectory store and its manifest.

    Args:
        config, workdir: of the run that trains on it.
        teacher_hash: of the averaged parameters.
        told: what `captions.conditions.inputs_of` gives of the conditions that its records number.

    Raises:
        UserError: there is none, it does not fit the config, or a shard is broken.
    """
    folder = store_folder(config, workdir)
    manifest = read_manifest(folder)
    _check_store(manifest, config, teacher_hash, told)
    check_shards(folder, manifest, checksums=_total_bytes(manifest) <= config.run.in_memory)
    return Store(folder, manifest), manifest


def store_hash(manifest: Manifest) -> str:
    """One hash for all shards of a store."""
    return hashlib.sha256("".join(shard["sha256"] for shard in manifest["shards"]).encode()).hexdigest()


def _total_bytes(manifest: Manifest) -> int:
    return sum(shard["bytes"] for shard in manifest["shards"])


def same_captions(manifest: Manifest, told: Mapping[str, str]) -> bool:
    """Whether the numbers of a store's records are of these captions; one that does not say may be of any."""
    return manifest.get("captions_sha256", told.get("captions")) == told.get("captions")


def _check_store(
    manifest: Manifest, config: ml_collections.ConfigDict, teacher_hash: str, told: Mapping[str, str]
) -> None:
    """Compares a store with the config that wants to train on it.

    Raises:
        UserError: it was made by another teacher, of other captions or with other settings, or lacks a point.
    """
    remedy = "make a store with this config, or use the config that the store was made with"
    if manifest["teacher_sha256"] != teacher_hash:
        raise UserError(
            f"the trajectory store was made by another teacher (weights {manifest['teacher_sha256'][:12]}…, "
            f"the teacher here has {teacher_hash[:12]}…): {remedy}."
        )
    if not same_captions(manifest, told):
        raise UserError(
            f"the trajectory store was made of other captions (hash {manifest['captions_sha256'][:12]}…, those here "
            f"have {told.get('captions', 'none')[:12]}…), which its records number: {remedy}."
        )
    here = stored_settings(plain(config))
    differing = [
        f"{key} {value!r} there, {here.get(key)!r} here"
        for key, value in manifest["settings"].items()
        if here.get(key) != value
    ]
    if differing:
        raise UserError(f"the trajectory store does not fit this config ({'; '.join(differing[:3])}): {remedy}.")
    missing = [point for point in config.student.points if point not in manifest["points"]]
    if missing:
        raise UserError(
            f"student.points has {missing}, but the trajectory store keeps {manifest['points']}: "
            f"choose points out of the store's, or {remedy}."
        )
    if config.student.target == "xt" and not manifest["keep_noisy"]:
        raise UserError(f"student.target is 'xt', but the trajectory store keeps no noisy points: {remedy}.")


def stored_settings(config: dict[str, Any]) -> dict[str, Any]:
    """What a store must share with whoever trains on it, by dotted key; takes and gives plain JSON values."""
    values = flatten(config)
    return {key: values[key] for begin in keys_that_change("store") for key in values if key.startswith(begin)}
