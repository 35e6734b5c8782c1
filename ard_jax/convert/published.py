"""Published PyTorch names (of the DiT, ARD and PixArt repositories) ↔ our parameter trees.

PyTorch's Linear weights are (out, in), ours (in, out); its patch convolution is (D, C, p, p), ours a matrix over
patches in the order (row, column, channel); our layers are stacked.
"""

import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from operator import getitem
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from ard_jax.errors import UserError
from ard_jax.models import ARDStudent, Backbone, DiT, Network, PixArt, network_shapes
from ard_jax.types import Params
from ard_jax.weights.lazy import Stored, dtypes_of, shapes_of
from ard_jax.weights.names import check_names


class Naming(NamedTuple):
    """Of one kind of backbone, ours: published; what is said of a module holds for its kernel and its bias.

    Attributes:
        what: it is, in words.
        arrays: outside blocks and heads, by the keys of a leaf.
        modules: the same by the keys of a module.
        block, final: modules of a block, and of a final layer.
        tables: arrays of a block and of a final layer alike.
        constants: published arrays that are no parameters of ours, and whether a state dict must have them.
    """

    what: str
    arrays: Mapping[tuple[str, ...], str]
    modules: Mapping[tuple[str, ...], str]
    block: Mapping[str, str]
    final: Mapping[str, str]
    tables: Mapping[str, str]
    constants: Mapping[str, bool]


Modules = dict[tuple[str, ...], str]
TIME_NAMES: Modules = {("time_embed", "mlp_in"): "t_embedder.mlp.0", ("time_embed", "mlp_out"): "t_embedder.mlp.2"}
SIZE_AND_CAPTION_NAMES: Modules = {
    (ours, layer): f"{theirs}.{number}"
    for ours, theirs, numbers in (
        ("caption_embed", "y_embedder.y_proj", ("fc1", "fc2")),
        ("size_embed", "csize_embedder.mlp", ("0", "2")),
        ("ratio_embed", "ar_embedder.mlp", ("0", "2")),
    )
    for layer, number in zip(("mlp_in", "mlp_out"), numbers, strict=True)
}
BLOCK_NAMES = {
    "modulation": "adaLN_modulation.1",
    "qkv": "attn.qkv",
    "attention_out": "attn.proj",
    "mlp_in": "mlp.fc1",
    "mlp_out": "mlp.fc2",
}
NULL_CAPTION = "y_embedder.y_embedding"  # PixArt's empty caption (token, channel), a buffer that is never trained
# What tells the sizes, and how many axes each has.
NEEDED = {"x_embedder.proj.weight": 4, "y_embedder.embedding_table.weight": 2, "final_layer.linear.weight": 2}
FINAL_NAMES = {"modulation": "adaLN_modulation.1", "linear": "linear"}
DIT = Naming(
    what="DiT or ARD",
    arrays={("label_embed", "embedding"): "y_embedder.embedding_table.weight"},
    modules=TIME_NAMES,
    block=BLOCK_NAMES,
    final=FINAL_NAMES,
    tables={},
    constants={"pos_embed": True},
)
PIXART = Naming(
    what="PixArt",
    arrays={},
    modules=TIME_NAMES | SIZE_AND_CAPTION_NAMES | {("modulation",): "t_block.1"},
    block={ours: theirs for ours, theirs in BLOCK_NAMES.items() if ours != "modulation"}
    | {"cross_query": "cross_attn.q_linear", "cross_kv": "cross_attn.kv_linear", "cross_out": "cross_attn.proj"},
    final={"linear": "linear"},
    tables={"scale_shift_table": "scale_shift_table"},
    constants={"pos_embed": False, NULL_CAPTION: False},
)

NAMINGS: dict[type[Backbone], Naming] = {DiT: DIT, PixArt: PIXART}

KINDS = {"kernel": "weight", "bias": "bias"}
THREADS = 4
STUDENT_FIELDS = ("mask", "heads", "block_times", "noise_time", "data_time")  # that no shape tells

# A leaf of ours by its keys: the published name, or the names of the slices that are stacked in it.
Places = dict[tuple[str, ...], str | list[str]]


def from_torch(
    state_dict: Mapping[str, np.ndarray], *, num_heads: int, history_layers: int = 6, **fields: Any
) -> tuple[Network, Params]:
    """Builds the model that a published state dict belongs to.

    Args:
        state_dict: published names to NumPy arrays.
        num_heads: attention heads, which no shape tells.
        history_layers: N, for a student.
        fields: further fields of the model, such as `mask` or `dtype`; `steps` says that a state dict with a single
            final layer is a student's.

    Returns:
        A `DiT`, or an `ARDStudent` when `final_layer2`, … are there (S = number of heads), and its parameters. The
        sizes come from the shapes, `image_size` from the position table's; types are kept.

    Raises:
        UserError: names are missing or unexpected, shapes do not fit, or the position table is not the fixed one.
    """
    model = make_model(shapes_of(state_dict), num_heads=num_heads, history_layers=history_layers, **fields)
    check_published(shapes_of(state_dict), model)
    return model, _read_tree(state_dict, model)


def parameters(
    state_dict: Mapping[str, np.ndarray],
    model: Network,
    array: Callable[[np.ndarray], jax.typing.ArrayLike] = jnp.asarray,
) -> Params:
    """A known model's parameters out of a published state dict.

    Args:
        state_dict: published names to NumPy arrays; `Tensors` are read one at a time.
        model: a teacher, or a student with heads of its own or a shared one, which is the one `final_layer`.
        array: what makes a leaf of a NumPy array; `np.asarray` keeps them on the host, and costs no second copy.

    Raises:
        UserError: names are missing or unexpected, shapes do not fit, or the position table is not the fixed one.
    """
    check_published(shapes_of(state_dict), model, "the config describes")
    return _read_tree(state_dict, model, array)


def to_torch(model: Network, params: Params) -> dict[str, np.ndarray]:
    """The inverse of `from_torch`: published names to arrays in PyTorch's layout, types kept.

    Args:
        model: a teacher or student; its `image_size` says how long the published position table is.
        params: its parameters.

    Raises:
        UserError: the model's `image_size` is None.
    """
    network = model.backbone
    if network.image_size is None:
        raise UserError(
            "the model's image_size is None, but the published position table needs it: "
            "clone the model with the side of its images, such as model.with_backbone(image_size=32)."
        )
    side = network.image_size // network.patch_size
    table = network.positions(side, side)[None]
    state_dict = {"pos_embed": table.astype(params["patch_embed"]["kernel"].dtype)}
    for keys, names in _places(model).items():
        leaf = functools.reduce(getitem, keys, params)
        slices = [leaf] if isinstance(names, str) else np.asarray(leaf)
        for name, array in zip([names] if isinstance(names, str) else names, slices, strict=True):
            state_dict[name] = np.ascontiguousarray(_to_theirs(keys, np.asarray(array), network))
    return state_dict


def make_model(
    shapes: Mapping[str, tuple[int, ...]],
    *,
    num_heads: int,
    history_layers: int = 6,
    steps: int | None = None,
    **fields: Any,
) -> Network:
    """The model that published shapes belong to; see `from_torch`.

    Raises:
        UserError: what tells the sizes is missing or has another number of axes, or `steps` is not that of the heads.
    """
    for name, axes in NEEDED.items():
        if name not in shapes:
            raise UserError(f"the state dict has no {name!r}, so it is not a DiT's: give one with the published names.")
        if len(shapes[name]) != axes or 0 in shapes[name]:
            raise UserError(
                f"the state dict's {name!r} has shape {shapes[name]} where a DiT's has {axes} axes: "
                f"give one with the published names and shapes."
            )
    width, channels, patch_size, _ = shapes["x_embedder.proj.weight"]
    tokens = math.prod(shapes.get("pos_embed", ())[:-1])
    fields = {
        "channels": channels,
        "patch_size": patch_size,
        "hidden_size": width,
        "depth": 1 + _highest(shapes, r"blocks\.(\d+)\.", none=-1),
        "num_heads": num_heads,
        "num_classes": shapes["y_embedder.embedding_table.weight"][0] - 1,
        "mlp_ratio": (shapes.get("blocks.0.mlp.fc1.weight") or (4 * width,))[0] / width,
        "learn_sigma": shapes["final_layer.linear.weight"][0] == 2 * channels * patch_size**2,
        "image_size": patch_size * math.isqrt(tokens),
        **fields,
    }
    heads = _highest(shapes, r"final_layer(\d+)\.", none=1)
    if heads == 1 and steps is None:
        return DiT(**fields)
    if heads > 1 and steps not in (None, heads):
        raise UserError(f"the state dict has {heads} final layers, so its student makes {heads} steps, not {steps}.")
    own = {name: fields.pop(name) for name in STUDENT_FIELDS if name in fields}
    if heads == 1 and steps is not None and steps > 1:
        own["heads"] = "shared"
    return ARDStudent(DiT(**fields), steps=steps or heads, history_layers=history_layers, **own)


def _highest(names: Iterable[str], pattern: str, none: int) -> int:
    """The highest number in names that start with `pattern`, so that a gap below it shows as missing names."""
    return max((int(found[1]) for name in names if (found := re.match(pattern, name))), default=none)


def _places(model: Network) -> Places:
    """Where each of our leaves lies in a published state dict."""
    naming, own = naming_of(model), network_shapes(model)
    blocks = [f"blocks.{layer}" for layer in range(model.backbone.depth)]

    def heads(name):
        names = [f"{head}.{name}" for head in _head_names(model)]
        return names if model.stacked_heads else names[0]

    found: Places = {("patch_embed", leaf): f"x_embedder.proj.{kind}" for leaf, kind in KINDS.items()}
    found |= naming.arrays
    for leaf, kind in KINDS.items():
        for keys, theirs in naming.modules.items():
            if keys[0] in own:  # a network may be without, as all but one PixArt are without a size
                found[*keys, leaf] = f"{theirs}.{kind}"
        for ours, theirs in naming.block.items():
            found["blocks", ours, leaf] = [f"{block}.{theirs}.{kind}" for block in blocks]
        for ours, theirs in naming.final.items():
            found["final_layer", ours, leaf] = heads(f"{theirs}.{kind}")
    for ours, theirs in naming.tables.items():
        found["blocks", ours] = [f"{block}.{theirs}" for block in blocks]
        found["final_layer", ours] = heads(theirs)
    return found


def naming_of(model: Network) -> Naming:
    """The published names of a network's kind.

    Raises:
        UserError: nobody has published one.
    """
    kind = type(model.backbone)
    if kind not in NAMINGS:
        known = " and ".join(naming.__name__ for naming in NAMINGS)
        raise UserError(f"a {kind.__name__} has no published names: only {known} have.")
    return NAMINGS[kind]


def _head_names(model: Network) -> list[str]:
    return ["final_layer"] + [f"final_layer{block}" for block in range(2, model.stacked_heads + 1)]


def _to_ours(keys: tuple[str, ...], array: np.ndarray) -> np.ndarray:
    """A published array in our layout, as a view where that can be."""
    if keys == ("patch_embed", "kernel"):
        return array.transpose(2, 3, 1, 0).reshape(-1, array.shape[0])
    return array.T if keys[-1] == "kernel" else array


def _to_theirs(keys: tuple[str, ...], array: np.ndarray, network: Backbone) -> np.ndarray:
    """The inverse of `_to_ours`."""
    if keys == ("patch_embed", "kernel"):
        return array.reshape(network.patch_size, network.patch_size, network.channels, -1).transpose(3, 2, 0, 1)
    return array.T if keys[-1] == "kernel" else array


def stored_parameters(state_dict: Mapping[str, np.ndarray], model: Network) -> Params:
    """`parameters` before they are read: each leaf is a `Stored`, so that they can be had one at a time.

    Raises:
        UserError: as `parameters`.
    """
    check_published(shapes_of(state_dict), model, "the config describes")
    return _stored_tree(state_dict, model)


def _read_tree(
    state_dict: Mapping[str, np.ndarray],
    model: Network,
    array: Callable[[np.ndarray], jax.typing.ArrayLike] = jnp.asarray,
) -> Params:
    """The parameters, once the names and shapes are known to be right."""
    return jax.tree.map(lambda leaf: array(leaf.read()), _stored_tree(state_dict, model))


def _stored_tree(state_dict: Mapping[str, np.ndarray], model: Network) -> Params:
    """The parameters as `Stored`, once the names and shapes are known to be right."""
    if "pos_embed" in state_dict:
        _check_position_table(np.asarray(state_dict["pos_embed"]), model)
    return stored_tree(state_dict, _places(model))


def stored_tree(state_dict: Mapping[str, np.ndarray], places: Places) -> dict[str, Any]:
    """Our leaves as `Stored`, of arrays in PyTorch's layout: a "kernel" is turned, the others stand as they are."""
    tree: dict[str, Any] = {}
    for keys, names in places.items():
        branch = tree
        for key in keys[:-1]:
            branch = branch.setdefault(key, {})
        branch[keys[-1]] = _stored_leaf(state_dict, keys, names)
    return tree


def _stored_leaf(state_dict: Mapping[str, np.ndarray], keys: tuple[str, ...], names: str | list[str]) -> Stored:
    """One leaf; each of its arrays will be read once and copied once, into its slice of a stack.

    Most of the time is the kernel's, which finds memory for it, so several threads share the slices.
    """
    shapes, dtypes = shapes_of(state_dict), dtypes_of(state_dict)

    def read(name):
        return _to_ours(keys, np.asarray(state_dict[name]))

    def shape(name):
        return _to_ours(keys, np.broadcast_to(np.empty(()), shapes[name])).shape

    if isinstance(names, str):
        return Stored(shape(names), dtypes[names], lambda: np.asarray(read(names), order="C"))
    stack = (len(names), *shape(names[0]))
    dtype = np.result_type(*(dtypes[name] for name in names))

    def stacked():
        leaf = np.empty(stack, dtype)
        with ThreadPoolExecutor(THREADS) as threads:
            for _ in threads.map(lambda layer: _fill(leaf[layer], read(names[layer])), range(len(names))):
                pass  # an error of a thread comes out here
        return leaf

    return Stored(stack, dtype, stacked)


def _fill(target: np.ndarray, array: np.ndarray, strip: int = 128) -> None:
    """target[...] = array, in strips of columns: a transposed matrix is copied three times as fast so, out of cache."""
    for first in range(0, array.shape[-1], strip):
        target[..., first : first + strip] = array[..., first : first + strip]


def expected_shapes(model: Network) -> dict[str, tuple[int, ...] | None]:
    """Published names and shapes of a model; None where any shape will do (the position table's length)."""
    ours: Any = network_shapes(model)
    constants = naming_of(model).constants
    shapes: dict[str, tuple[int, ...] | None] = {name: None for name, needed in constants.items() if needed}
    for keys, names in _places(model).items():
        shape = functools.reduce(getitem, keys, ours).shape
        slices, shape = ([names], shape) if isinstance(names, str) else (names, shape[1:])
        shapes |= dict.fromkeys(slices, _to_theirs(keys, np.broadcast_to(0, shape), model.backbone).shape)
    return shapes


def check_published(
    found: Mapping[str, tuple[int, ...]], model: Network, described: str = "its shapes suggest"
) -> None:
    """Raises UserError unless these are the published names and shapes of a model."""
    naming = naming_of(model)
    names = f"the published {naming.what} names"
    check_names(found, expected_shapes(model), described, names, optional=naming.constants)


def has_positions(table: np.ndarray, network: Backbone) -> bool:
    """Whether a position table is the fixed one of a network's image size, in whichever precision it was kept."""
    side = _table_side(table, network)
    fixed, given = network.positions(side, side), np.asarray(table, np.float32)
    kept = [fixed.astype(dtype).astype(np.float32) for dtype in (np.float32, np.float16, ml_dtypes.bfloat16)]
    return table.shape == (1, *fixed.shape) and any(np.allclose(given[0], known, rtol=0, atol=1e-6) for known in kept)


def _table_side(table: np.ndarray, network: Backbone) -> int:
    """Patches a side."""
    return network.image_size // network.patch_size if network.image_size else math.isqrt(math.prod(table.shape[:-1]))


def _check_position_table(table: np.ndarray, model: Network) -> None:
    """Raises UserError unless it is the fixed table of the model's image size."""
    side = _table_side(table, model.backbone)
    if not has_positions(table, model.backbone):
        raise UserError(
            f"the state dict's pos_embed {tuple(table.shape)} is not the fixed sin-cos table of a square grid "
            f"({side}×{side} here): only DiTs with the published table can be used."
        )
