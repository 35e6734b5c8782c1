"""What the config.json of every diffusers transformer that is converted has in common, and how it is checked."""

from collections.abc import Mapping
from typing import Any

from ard_jax.errors import UserError
from ard_jax.models import Network

# What diffusers also asks of a config, and what changes nothing in these networks.
UNUSED = {"norm_num_groups": 32, "dropout": 0.0, "upcast_attention": False}
# What older versions called every transformer, as published folders still do, and what it is by its norm_type today.
OLD_CLASS = "Transformer2DModel"
BY_NORM = {"ada_norm_zero": "DiTTransformer2DModel", "ada_norm_single": "PixArtTransformer2DModel"}
TABLE = "pos_embed.pos_embed"  # the fixed positions, which older files hold


def transformer_class(config: Mapping[str, Any]) -> str:
    """What diffusers calls the transformer of a config.json today; "" for one that says no class."""
    name = str(config.get("_class_name", ""))
    return BY_NORM.get(str(config.get("norm_type")), name) if name == OLD_CLASS else name


def read_config(
    config: Mapping[str, Any], classes: tuple[str, ...], only: Mapping[str, Any], defaults: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings of a transformer's config.json, and those of our model's fields that all of them describe.

    Args:
        config: what config.json says.
        classes: that can be converted; those after the first must themselves say what is in `only`.
        only: settings that must have these values; the first class may leave them out.
        defaults: settings that are positive numbers, with what it means to leave them out.

    Raises:
        UserError: it is of another class, or describes what our model does not do.
    """
    name = config.get("_class_name", classes[0])
    if name not in classes:
        raise UserError(f"the transformer is a {name}, but only a {classes[0]} can be converted: give one.")
    for key, value in only.items():
        found = config.get(key, value if name == classes[0] else None)
        if found != value:
            raise UserError(f"the transformer's {key} is {found!r}, but only {value!r} can be converted: give another.")
    given = {key: config.get(key, default) for key, default in defaults.items()}
    given["out_channels"] = given["out_channels"] or given["in_channels"]
    for key, value in given.items():
        if not isinstance(value, (int, float) if isinstance(defaults[key], float) else int) or value <= 0:
            raise UserError(f"the transformer's {key} is {value!r} in its config: give a config with a number there.")
    channels, out = given["in_channels"], given["out_channels"]
    if out not in (channels, 2 * channels):
        raise UserError(
            f"the transformer's out_channels is {out} for {channels} channels: only {channels}, or {2 * channels} with "
            f"a learned variance, can be converted."
        )
    return given, {
        "channels": channels,
        "learn_sigma": out == 2 * channels,
        "hidden_size": given["num_attention_heads"] * given["attention_head_dim"],
        "num_heads": given["num_attention_heads"],
        "depth": given["num_layers"],
        "patch_size": given["patch_size"],
        "image_size": given["sample_size"],
    }


def written_sizes(model: Network, name: str) -> dict[str, Any]:
    """The inverse of `read_config`: what all transformers' configs say of a model, `name` in diffusers.

    Raises:
        UserError: it is a student, or its MLP is not four times as wide as its tokens.
    """
    if model.is_student:
        raise UserError("diffusers has no ARD students: export a student as a pipeline or as safetensors instead.")
    if model.mlp_ratio != 4:
        raise UserError(
            f"model.mlp_ratio is {model.mlp_ratio}, but diffusers' {name} has 4: export safetensors instead."
        )
    return {
        "num_attention_heads": model.num_heads,
        "attention_head_dim": model.hidden_size // model.num_heads,
        "in_channels": model.channels,
        "out_channels": model.channels * (2 if model.learn_sigma else 1),
        "num_layers": model.depth,
        "sample_size": model.image_size,
        "patch_size": model.patch_size,
    }
