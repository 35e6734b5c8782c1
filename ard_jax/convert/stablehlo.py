"""A sampler as a folder that runs with jax and numpy alone: StableHLO modules, the weights beside them, and `run.py`.

The weights are arguments of the modules and no constants in them, since a serialised module cannot exceed 2 GB. A
module is lowered for all its platforms at once; its batch size is symbolic, or there is one module a size.
"""

import pathlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from ard_jax.convert import standalone
from ard_jax.errors import UserError
from ard_jax.files import file_sha256, write_json, write_npz
from ard_jax.sampling import draw_noise, sampling_key
from ard_jax.types import PyTree

PLATFORMS = ("cpu", "cuda", "tpu")
ANY = "any"  # the batch size of a module that takes every one

# (weights, noise, condition …) → images in [0, 1]
ExportedSampler = Callable[..., jax.Array]
# By name, what a program takes beside noise, of one example: shape, type, and the range of whole numbers or None.
Told = Mapping[str, tuple[tuple[int, ...], str, tuple[int, int] | None]]


def write_sampler(
    folder: pathlib.Path,
    sampler: ExportedSampler,
    weights: PyTree,
    *,
    shape: tuple[int, int, int],
    told: Told,
    names: Mapping[int, str],
    text_encoder: Mapping[str, Any] | None = None,
    batch_sizes: Sequence[int] = (),
    platforms: Sequence[str] = PLATFORMS,
) -> None:
    """Writes modules, weights.npz, run.py and signature.json into a folder.

    Args:
        folder: that is there.
        sampler: a pure function; its noise is (batch, height, width, channel), and what else it takes is in `told`.
        weights: a pytree of arrays, in the types that they are written in; written leaf by leaf.
        shape: (height, width, channel) of the noise.
        told: what it takes beside noise, such as labels.
        names: of the classes by number, as far as they are known.
        text_encoder: what `write_text_encoder` says of the one that lies there already.
        batch_sizes: one module each; () for one module that takes any.
        platforms: some of `PLATFORMS`.
    """
    modules = {str(size): f"model.batch{size}.stablehlo" for size in batch_sizes} or {ANY: "model.stablehlo"}
    leaves, structure = jax.tree.flatten(weights)

    def program(leaves, noise, *condition):
        return sampler(jax.tree.unflatten(structure, leaves), noise, *condition)

    for size, file in modules.items():
        exported = _export_program(program, leaves, {"noise": (shape, "float32", None), **told}, size, platforms)
        (folder / file).write_bytes(exported.serialize())
    (folder / "noise.stablehlo").write_bytes(_export_noise(shape, platforms).serialize())
    arrays = write_weights(folder / "weights.npz", weights)
    shutil.copyfile(standalone.__file__, folder / "run.py")
    image = exported.out_avals[0]
    write_json(
        folder / "signature.json",
        {
            "modules": modules,
            "platforms": list(platforms),
            "inputs": {
                "noise": {"shape": ["batch", *shape], "dtype": "float32"},
                **{
                    name: {"shape": ["batch", *own], "dtype": dtype} | ({"range": list(limits)} if limits else {})
                    for name, (own, dtype, limits) in told.items()
                },
            },
            "output": {"shape": ["batch", *image.shape[1:]], "dtype": image.dtype.name, "range": [0, 1]},
            "labels": {str(number): names[number] for number in sorted(names)},
            **({"text_encoder": dict(text_encoder)} if text_encoder else {}),
            "weights": arrays,
            "jax": jax.__version__,
            "sha256": {path.name: file_sha256(path) for path in sorted(folder.iterdir()) if path.is_file()},
        },
    )


def _export_program(
    program: Callable[..., jax.Array],
    leaves: list[jax.Array],
    inputs: Told,
    size: str,
    platforms: Sequence[str],
) -> export.Exported:
    """(list of leaves, inputs in their order) → what it makes, for one batch size or, with `ANY`, for every."""
    batch = export.symbolic_shape("batch")[0] if size == ANY else int(size)
    arrays = [jax.ShapeDtypeStruct((batch, *shape), dtype) for shape, dtype, _ in inputs.values()]
    weights = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves]
    return export.export(jax.jit(program), platforms=platforms)(weights, *arrays)


def write_text_encoder(
    folder: pathlib.Path,
    apply: Callable[[PyTree, jax.Array, jax.Array], jax.Array],
    params: PyTree,
    *,
    tokenizer: pathlib.Path,
    length: int,
    cleaning: str,
    platforms: Sequence[str] = PLATFORMS,
) -> dict[str, Any]:
    """Writes a text encoder beside a sampler: its module, its weights and its tokenizer's file.

    Args:
        folder: that is there.
        apply, params: (params, ids, mask) → vectors (batch, token, channel), and its weights.
        tokenizer: file to copy.
        length: tokens of a text at most, which all are padded to.
        cleaning: how texts were cleaned; `run.py` knows "none" and "lower".
        platforms: some of `PLATFORMS`.

    Returns:
        What the signature says of it.
    """
    leaves, structure = jax.tree.flatten(params)

    def program(leaves, ids, mask):
        return apply(jax.tree.unflatten(structure, leaves), ids, mask).astype(jnp.float32)

    inputs: Told = {"ids": ((length,), "int32", None), "mask": ((length,), "bool", None)}
    module = _export_program(program, leaves, inputs, ANY, platforms)
    (folder / "text_encoder.stablehlo").write_bytes(module.serialize())
    arrays = write_weights(folder / "text_encoder.npz", params)
    shutil.copyfile(tokenizer, folder / tokenizer.name)
    return {"tokenizer": tokenizer.name, "length": length, "cleaning": cleaning, "weights": arrays}


def _export_noise(shape: tuple[int, int, int], platforms: Sequence[str]) -> export.Exported:
    """(seed, image numbers (batch,)) → noise (batch, height, width, channel), as the pipeline draws it."""

    def draw(seed, index):
        return draw_noise(sampling_key(seed), index, shape)

    number = jax.ShapeDtypeStruct((), jnp.int32)
    index = jax.ShapeDtypeStruct(export.symbolic_shape("batch"), jnp.int32)
    return export.export(jax.jit(draw), platforms=platforms)(number, index)


def write_weights(path: pathlib.Path, weights: PyTree) -> list[dict[str, Any]]:
    """Writes every leaf, uncompressed; returns their names, shapes and types in the order of the leaves."""
    named = {
        jax.tree_util.keystr(place, simple=True, separator="/"): leaf
        for place, leaf in jax.tree_util.tree_leaves_with_path(weights)
    }
    write_npz(path, **{name: _storable(np.asarray(leaf)) for name, leaf in named.items()})
    return [{"name": name, "shape": list(leaf.shape), "dtype": leaf.dtype.name} for name, leaf in named.items()]


def _storable(array: np.ndarray) -> np.ndarray:
    """NumPy's files know no bfloat16: its bits are kept as integers."""
    return array.view(np.uint16) if array.dtype == jnp.bfloat16 else array


def parse_batch_sizes(text: str | None) -> tuple[int, ...]:
    """Batch sizes out of words: "1,8" → (1, 8); "symbolic", or None, → ().

    Raises:
        UserError: they are no positive whole numbers.
    """
    if text in (None, "symbolic"):
        return ()
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) for part in parts):
        raise UserError(f"--batch-sizes is {text!r}: give symbolic, or whole numbers of at least 1, such as 1,8.")
    return tuple(sorted({int(part) for part in parts}))


def parse_platforms(text: str | None) -> tuple[str, ...]:
    """Platforms out of words: "cpu,tpu" → ("cpu", "tpu"); None → all.

    Raises:
        UserError: one is unknown.
    """
    parts = PLATFORMS if text is None else tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    unknown = [part for part in parts if part not in PLATFORMS]
    if unknown:
        raise UserError(f"--platforms has {unknown[0]!r}: choose some of {', '.join(PLATFORMS)}.")
    return parts
