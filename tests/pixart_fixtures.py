"""A tiny random PixArt, its text encoder and VAE, as diffusers' pipelines keep them on disk, made without diffusers."""

import json
import pathlib

import jax
import numpy as np
from convert_fixtures import WEIGHTS

from ard_jax.convert import pixart_to_diffusers, t5_to_transformers, vae_to_diffusers
from ard_jax.convert.t5 import t5_model
from ard_jax.models import AutoencoderKL, PixArt, network_shapes, parameter_shapes
from ard_jax.weights.tensors import write_tensors

T5 = {
    "model_type": "t5",
    "architectures": ["T5EncoderModel"],
    "vocab_size": 100,
    "d_model": 20,
    "d_kv": 6,
    "d_ff": 20,
    "num_layers": 2,
    "num_heads": 2,
    "feed_forward_proj": "gated-gelu",
}
SCHEDULER = {
    "_class_name": "DPMSolverMultistepScheduler",
    "algorithm_type": "dpmsolver++",
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "final_sigmas_type": "zero",
    "solver_order": 2,
    "timestep_spacing": "linspace",
}
WORDS = ("red", "apple", "a", "green", "blue", "circle", "square")


def random_like(shapes, seed=0, scale=0.2):
    leaves, tree = jax.tree.flatten(shapes)
    random = np.random.default_rng(seed)
    return tree.unflatten([(scale * random.standard_normal(leaf.shape)).astype(np.float32) for leaf in leaves])


def small_pixart(**fields):
    sizes = dict(patch_size=2, hidden_size=24, depth=2, num_heads=2, caption_width=20, image_size=8, interpolation=0.5)
    return PixArt(**(sizes | fields))


def word_tokenizer(path: pathlib.Path, words=WORDS) -> pathlib.Path:
    """A tokenizer.json of whole words that ends a text as T5's do."""
    import tokenizers

    vocabulary = {word: number for number, word in enumerate(("<pad>", "</s>", "<unk>", *words))}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, "<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    path.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path))
    return path


def write_text_encoder(folder: pathlib.Path, tokenizer: pathlib.Path | None = None, seed=1) -> pathlib.Path:
    """A T5's folder; its tokenizer in it, or where it is said."""
    model = t5_model(T5)
    ids = jax.ShapeDtypeStruct((1, 1), "int32")
    state_dict = t5_to_transformers(model, random_like(parameter_shapes(model, ids, ids), seed, 0.4))
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / "model.safetensors", state_dict, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(T5))
    word_tokenizer((tokenizer or folder) / "tokenizer.json")
    return folder


def write_pixart(folder: pathlib.Path, kind="PixArtSigmaPipeline", **fields) -> pathlib.Path:
    """A pipeline's folder: transformer, vae, scheduler, text_encoder and tokenizer."""
    model = small_pixart(**fields)
    state_dict, config = pixart_to_diffusers(model, random_like(network_shapes(model)))
    vae = AutoencoderKL(block_out_channels=(4, 4), norm_num_groups=2, layers_per_block=1, mid_block_add_attention=False)
    image = jax.ShapeDtypeStruct((1, 8, 8, 3), "float32")
    vae_state, vae_config = vae_to_diffusers(vae, random_like(parameter_shapes(vae, image), 2))
    for name, arrays, described in (("transformer", state_dict, config), ("vae", vae_state, vae_config)):
        (folder / name).mkdir(parents=True)
        write_tensors(folder / name / WEIGHTS, arrays, {"format": "pt"})
        (folder / name / "config.json").write_text(json.dumps(described))
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER))
    write_text_encoder(folder / "text_encoder", folder / "tokenizer")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": kind}))
    return folder
