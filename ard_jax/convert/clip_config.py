"""What transformers' and open_clip's configs say of a CLIP → fields of our `CLIP`."""

from collections.abc import Mapping
from typing import Any

from ard_jax.errors import UserError
from ard_jax.models.clip import ACTIVATIONS, Tower

# transformers' key: its own default where a config leaves it out.
TEXT_DEFAULTS = {
    "hidden_size": 512,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "intermediate_size": 2048,
    "vocab_size": 49_408,
    "max_position_embeddings": 77,
}
VISION_DEFAULTS = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "image_size": 224,
    "patch_size": 32,
    "num_channels": 3,
}
TOWER = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
OLD_END = 2  # of configs from before the end was looked for by its id, whatever it was
END = 49_407

# The same of open_clip.
OPEN_TEXT_DEFAULTS = {"width": 512, "layers": 12, "heads": 8, "context_length": 77, "vocab_size": 49_408}
OPEN_VISION_DEFAULTS = {"width": 768, "layers": 12, "head_width": 64, "patch_size": 16, "image_size": 224}
MLP_RATIO = 4.0
# Settings that change no vector of a trained model, and such as have one value here; others may be there if they are
# off: None, False or 0.
OPEN_FREE = ("patch_dropout", "output_tokens", "pad_id", "eos_id")
OPEN_ONLY = {
    "vision_cfg": {"pool_type": "tok", "pos_embed_type": "learnable"},
    "text_cfg": {"pool_type": "argmax", "proj_type": "linear"},
}


def fields_of_transformers(config: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `CLIP` by a config.json of transformers' `CLIPModel`.

    Raises:
        UserError: it is another model's, or has a value that `CLIP` here does not have.
    """
    kind = config.get("model_type", "clip")
    if kind != "clip":
        raise UserError(f"the config is of a {kind!r}, but only a whole 'clip' can be converted: give one.")
    text, vision = (_part_of_transformers(config, part) for part in ("text_config", "vision_config"))
    sizes = _numbers(text, TEXT_DEFAULTS, "text_config")
    image_sizes = _numbers(vision, VISION_DEFAULTS, "vision_config")
    end = text.get("eos_token_id", END)
    if not isinstance(end, int):
        raise UserError(f"text_config has eos_token_id {end!r}, but a single id is needed: give a config with one.")
    return {
        "vision": _tower(vision, image_sizes, "vision_config"),
        "text": _tower(text, sizes, "text_config"),
        "projection": _numbers(config, {"projection_dim": 512}, "the config")["projection_dim"],
        "image_size": image_sizes["image_size"],
        "patch_size": image_sizes["patch_size"],
        "channels": image_sizes["num_channels"],
        "vocabulary": sizes["vocab_size"],
        "length": sizes["max_position_embeddings"],
        "end": None if end == OLD_END else end,
    }


def fields_of_open_clip(config: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `CLIP` by open_clip's config of a model, or by the open_clip_config.json that it lies in.

    Raises:
        UserError: it has a setting or a value that `CLIP` here does not have.
    """
    config = config.get("model_cfg", config)
    if "embed_dim" not in config:
        raise UserError("the config has no embed_dim, so it is not open_clip's of a model: give its ViT-….json.")
    text, vision = (_part_of_open_clip(config, part) for part in ("text_cfg", "vision_cfg"))
    sizes = _numbers(text, OPEN_TEXT_DEFAULTS, "text_cfg")
    image_sizes = _numbers(vision, OPEN_VISION_DEFAULTS, "vision_cfg")
    activation = "quick_gelu" if config.get("quick_gelu", False) else "gelu"

    def tower(part, width, depth, heads, where):
        return Tower(width, depth, heads, int(width * _positive(part, "mlp_ratio", MLP_RATIO, where)), activation)

    width = image_sizes["width"]
    return {
        "vision": tower(vision, width, image_sizes["layers"], width // image_sizes["head_width"], "vision_cfg"),
        "text": tower(text, sizes["width"], sizes["layers"], sizes["heads"], "text_cfg"),
        "projection": _numbers(config, {"embed_dim": 512}, "the config")["embed_dim"],
        "image_size": image_sizes["image_size"],
        "patch_size": image_sizes["patch_size"],
        "vocabulary": sizes["vocab_size"],
        "length": sizes["context_length"],
    }


def _part_of_open_clip(config: Mapping[str, Any], part: str) -> Mapping[str, Any]:
    """The config of a tower.

    Raises:
        UserError: it has a setting that is unknown here, or another value than the only one here.
    """
    found = config.get(part) or {}
    sizes = OPEN_TEXT_DEFAULTS if part == "text_cfg" else OPEN_VISION_DEFAULTS
    only = OPEN_ONLY[part]
    for key, value in found.items():
        if key in only and value != only[key]:
            raise UserError(f"{part} has {key} {value!r}, but only {only[key]!r} can be converted: use another CLIP.")
        if value and key not in (*sizes, *only, *OPEN_FREE, "mlp_ratio"):
            raise UserError(f"{part} has {key} {value!r}, which is unknown here: give one of a plain CLIP.")
    return found


def _part_of_transformers(config: Mapping[str, Any], part: str) -> Mapping[str, Any]:
    """The config of a tower; old files have it twice, and the one that transformers goes by is text_config_dict."""
    older = config.get(f"{part}_dict")
    return (config.get(part) or {}) if older is None else older


def _tower(part: Mapping[str, Any], sizes: Mapping[str, int], where: str) -> Tower:
    activation = part.get("hidden_act", "quick_gelu")
    if activation not in ACTIVATIONS:
        known = " and ".join(map(repr, ACTIVATIONS))
        raise UserError(f"{where} has hidden_act {activation!r}, but only {known} can be converted: use another CLIP.")
    width, depth, heads, mlp_width = (sizes[key] for key in TOWER)
    return Tower(width, depth, heads, mlp_width, activation, _positive(part, "layer_norm_eps", 1e-5, where))


def _positive(config: Mapping[str, Any], key: str, default: float, where: str) -> float:
    """A number of a config, or its default.

    Raises:
        UserError: it is none, or not positive.
    """
    value = config.get(key, default)
    if not isinstance(value, int | float) or not value > 0:
        raise UserError(f"{where} has {key} {value!r}, but a positive number is needed: give one.")
    return float(value)


def _numbers(config: Mapping[str, Any], defaults: Mapping[str, int], where: str) -> dict[str, int]:
    """Sizes of a config, or the defaults of those that it leaves out.

    Raises:
        UserError: one is no positive whole number.
    """
    found = {key: config.get(key, default) for key, default in defaults.items()}
    for key, value in found.items():
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            raise UserError(f"{where} has {key} {value!r}, but a positive whole number is needed: give one.")
    return found
