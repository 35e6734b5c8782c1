"""Model FLOPs by formula.

A multiply-accumulate counts as two FLOPs and only matrix products count, as usual for utilisation figures. The formulas
are checked against XLA's cost analysis of the unrolled models in the tests.
"""

from ard_jax.models.discriminator import LOGIT_WIDTH, WINDOW
from ard_jax.models.dit import DiT
from ard_jax.models.masks import visible_blocks
from ard_jax.models.student import ARDStudent


def row_macs(model: DiT, tokens: int) -> int:
    """Multiply-accumulates of one row (image or block) without attention between tokens."""
    width, hidden = model.hidden_size, round(model.hidden_size * model.mlp_ratio)
    patch = model.patch_size**2 * model.channels
    out = patch * (2 if model.learn_sigma else 1)
    per_token = patch * width + model.depth * (4 * width**2 + 2 * width * hidden) + width * out
    modulation = model.depth * 6 * width**2 + 2 * width**2
    return tokens * per_token + modulation


def attention_macs(model: DiT, queries: int, keys: int) -> int:
    """Multiply-accumulates of one layer's attention."""
    return 2 * queries * keys * model.hidden_size


def time_macs(model: DiT) -> int:
    return 256 * model.hidden_size + model.hidden_size**2


def image_tokens(model: DiT, shape: tuple[int, int, int]) -> int:
    return (shape[0] // model.patch_size) * (shape[1] // model.patch_size)


def teacher_macs(model: DiT, shape: tuple[int, int, int]) -> int:
    """Multiply-accumulates of one forward pass of one image of (height, width, channel)."""
    tokens = image_tokens(model, shape)
    return row_macs(model, tokens) + time_macs(model) + model.depth * attention_macs(model, tokens, tokens)


def student_macs(model: ARDStudent, shape: tuple[int, int, int]) -> int:
    """The same of all S steps of one trajectory, in training or cached sampling: they cost the same."""
    tokens, history = image_tokens(model, shape), model.layers_with_history
    seen = sum(len(visible_blocks(model.mask, block)) for block in range(model.steps))
    attention = history * seen + (model.depth - history) * model.steps
    rows = model.steps * (row_macs(model, tokens) + time_macs(model))
    return rows + attention * attention_macs(model, tokens, tokens)


def discriminator_macs(model: DiT, heads: int, shape: tuple[int, int, int]) -> int:
    """The same of a discriminator's heads on the tokens of one image in the given teacher."""
    width = model.hidden_size
    per_token = (1 + WINDOW) * width**2 + width * LOGIT_WIDTH + LOGIT_WIDTH
    return heads * (image_tokens(model, shape) * per_token + width * LOGIT_WIDTH)


def rollout_macs(model: DiT, steps: int, shape: tuple[int, int, int]) -> int:
    """Multiply-accumulates of one image of a student."""
    return student_macs(model, shape) if isinstance(model, ARDStudent) else steps * teacher_macs(model, shape)
