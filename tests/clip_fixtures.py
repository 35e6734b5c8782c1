"""What the tests of CLIP share: a tiny one's config, and arrays with transformers' names."""

import numpy as np

from ard_jax.convert.clip import transformers_shapes
from ard_jax.convert.clip_config import fields_of_transformers
from ard_jax.models import CLIP

# Every size differs, so that none can stand for another; of 30 pixels a side, patches of 8 leave 6 over.
TEXT = {
    "vocab_size": 50,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 12,
    "bos_token_id": 48,
    "eos_token_id": 2,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 30,
    "patch_size": 8,
}


def config(text=None, vision=None, **changes):
    return {
        "model_type": "clip",
        "projection_dim": 20,
        "text_config": TEXT | (text or {}),
        "vision_config": VISION | (vision or {}),
        **changes,
    }


def random_state_dict(seed=0, **changes):
    """A state dict with transformers' names and shapes, random everywhere, and its config."""
    settings = config(**changes)
    random = np.random.default_rng(seed)
    shapes = transformers_shapes(CLIP(**fields_of_transformers(settings)))
    # the shape is asked for by itself, since of no axes comes a float
    arrays = {name: np.asarray(0.3 * random.normal(size=shape), np.float32) for name, shape in shapes.items()}
    return arrays, settings
