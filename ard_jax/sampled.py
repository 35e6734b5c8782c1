"""What the samples on disk were drawn with: noted beside them, and held against what is asked for now."""

import pathlib
from collections.abc import Mapping
from typing import Any

import ml_collections

from ard_jax.config import keys_that_change, other_settings, plain
from ard_jax.files import tree_sha256, write_json
from ard_jax.models import AutoencoderKL
from ard_jax.types import Params
from ard_jax.workdir import read_config

# Settings by which a model's samples come out the same.
SAMPLED = keys_that_change("sample")


def drawn_with(told: Mapping[str, str], vae: tuple[AutoencoderKL, Params] | None, space: str) -> dict[str, str]:
    """Hashes of what samples are made with beside a model's weights.

    Args:
        told: what `captions.conditions.inputs_of` gives.
        vae: of `workdir.find_vae`; without one, latents are written.
        space: `data.space`; in "pixel" nothing is decoded.
    """
    decoder = {"vae": tree_sha256(vae[1]) if vae else ""} if space == "latent" else {}
    return {**told, **decoder}


def note_samples(directory: pathlib.Path, config: ml_collections.ConfigDict, inputs: Mapping[str, str]) -> None:
    """Writes down what the samples in a folder are drawn with.

    Args:
        directory: of one model's samples.
        config: the run's.
        inputs: `drawn_with`, and the weights' hash, "ema".
    """
    write_json(directory / "config.json", plain(config) | {"inputs": dict(inputs)})


def are_drawn(directory: pathlib.Path, made: Mapping[str, Any] | None, weights: str, decodes: bool) -> bool:
    """Whether the samples of a model lie in a folder, whatever their settings.

    Args:
        directory: of them.
        made: what sample/done.json says of the model, if anything.
        weights: hash of its averaged parameters as they are now.
        decodes: whether there is a VAE for latents now; samples that are latents are none then.
    """
    if made is None or made["ema_sha256"] != weights or (decodes and "grid.png" not in made["sha256"]):
        return False
    return all((directory / file).exists() for file in ("samples.npz", "config.json"))


def has_begun(directory: pathlib.Path, inputs: Mapping[str, str]) -> bool:
    """Whether samples in a folder were begun from these weights, and not as latents where there is a VAE now."""
    path = directory / "config.json"
    noted = read_config(path).get("inputs", {}) if path.exists() else {}
    return noted.get("ema") == inputs["ema"] and not (noted.get("vae") == "" and inputs.get("vae"))


def drawn_otherwise(
    directory: pathlib.Path,
    config: ml_collections.ConfigDict,
    inputs: Mapping[str, str],
    keys: tuple[str, ...] = SAMPLED,
) -> list[str]:
    """In words, in what the samples in a folder differ from those that would be drawn now; [] if they are the same.

    Args:
        directory, config, inputs: as in `note_samples`. Samples that were drawn before captions and decoders were
            noted may be of any.
        keys: how the keys of the settings begin that count.

    Raises:
        UserError: config.json is damaged.
    """
    recorded = read_config(directory / "config.json")
    other = other_settings(recorded, config, keys)
    for name in ("captions", "vae"):
        there, here = recorded.get("inputs", {}).get(name), inputs.get(name)
        if there and here and there != here:
            other.append(f"{name} of hash {there:.8} there, {here:.8} here")
    return other
