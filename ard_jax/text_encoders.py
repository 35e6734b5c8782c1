"""Text encoders behind one interface: strings in, ragged vectors out.

Two kinds are known by what a folder holds: T5 v1.1 as diffusers and transformers write it (a pipeline's folder with
text_encoder/ and tokenizer/, or such an encoder's own folder with its tokenizer in it or beside it), and "wordllama",
a table of word vectors that the package of that name ships, for laptops.
"""

import dataclasses
import hashlib
import importlib.util
import json
import pathlib
import re
from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ard_jax.config import WORDLLAMA
from ard_jax.convert.families.folders import PART, PIPELINE, part_files, read_description
from ard_jax.convert.hub import fetch_source
from ard_jax.convert.t5 import stored_t5, t5_model
from ard_jax.errors import UserError
from ard_jax.files import file_sha256
from ard_jax.models.layers import sinusoids
from ard_jax.parallel import on_mesh, sharding_of
from ard_jax.text import Tokenizer, clean_caption, open_tokenizer
from ard_jax.types import PyTree
from ard_jax.weights.tensors import open_tensors

# Of the devices of a host, each of which keeps a part of every matrix: T5-XXL's are 9.5 GB.
ENCODER_MESH = {"data": 1, "fsdp": -1, "tensor": 1}
BUCKET = 16  # tokens: texts are padded to multiples, so that few programs are compiled


@dataclasses.dataclass(frozen=True, eq=False)
class TextEncoder:
    """Strings into vectors, a string's a function of it and of `sha256` alone, up to the rounding of its batch.

    Attributes:
        name: what it is, in words.
        width: channels of a vector.
        length: tokens of a text at most; longer ones are cut.
        sha256: hash of its weights, of its tokenizer, and of how texts are cleaned and cut.
        cleaning: a name in `text.CLEANINGS`.
        tokenizer: texts into ids.
        apply: (params, ids, mask), the last two (batch, token) → (batch, token, width): a pure function.
        params: its weights, on the devices.
    """

    name: str
    width: int
    length: int
    sha256: str
    cleaning: str
    tokenizer: Tokenizer
    apply: Callable[[PyTree, jax.typing.ArrayLike, jax.typing.ArrayLike], jax.Array]
    params: PyTree

    def vectors(self, ids: jax.typing.ArrayLike, mask: jax.typing.ArrayLike) -> jax.Array:
        """Ids and which of them are a text's own, each (batch, token) → (batch, token, width), on the devices."""
        return self.apply(self.params, ids, mask)

    def tokenize(self, texts: Sequence[str]) -> tuple[list[np.ndarray], int]:
        """The ids of each text, with those that stand before and after it, and how many texts were too long.

        Raises:
            UserError: a text has half a character in it, which JSON can say and no tokenizer takes.
        """
        for text in texts:
            if half := re.search("[\ud800-\udfff]", text):
                raise UserError(
                    f"the text {text[:40]!r} has {half[0]!r} in it, which is half a character: leave that out, or "
                    f"give the whole one."
                )
        return self.tokenizer.encode([clean_caption(text, self.cleaning) for text in texts], self.length)

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The vectors of each text's own tokens, (token, width) float32."""
        ids, _ = self.tokenize(texts)
        return self.encode_tokens(ids)

    def encode_tokens(self, ids: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The same of ids, all in one batch."""
        padded, mask = pad_tokens(ids, self.length)
        vectors = np.asarray(self.vectors(padded, mask)).astype(np.float32)
        return [row[: len(own)] for row, own in zip(vectors, ids, strict=True)]

    def null(self, text: str = "") -> np.ndarray:
        """The empty text's own vectors, and last the one that pads it, (vector, width) float32; see `types.Caption`.

        Or those of another text, from which guidance then moves away.
        """
        (ids,), _ = self.tokenize([text])
        padded, mask = pad_tokens([ids], self.length, spare=1)
        return np.asarray(self.vectors(padded, mask))[0, : len(ids) + 1].astype(np.float32)


def pad_tokens(ids: Sequence[np.ndarray], length: int, spare: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Ragged ids as int32 (batch, token), and which are their own, bool; a multiple of `BUCKET`, or `length` tokens.

    `spare` tokens of padding follow the longest at least.
    """
    longest = max(len(own) for own in ids) + spare
    width = max(longest, min(-(-longest // BUCKET) * BUCKET, length))
    padded, mask = np.zeros((len(ids), width), np.int32), np.zeros((len(ids), width), bool)
    for row, own in enumerate(ids):
        padded[row, : len(own)], mask[row, : len(own)] = own, True
    return padded, mask


def open_text_encoder(
    source: str, length: int, cleaning: str, dtype: jnp.dtype | None = None, mesh: Mesh | None = None
) -> TextEncoder:
    """Opens a text encoder.

    Args:
        source: "wordllama", a folder as the module's docstring says, or hf:ORG/NAME.
        length: tokens of a text at most.
        cleaning: a name in `text.CLEANINGS`.
        dtype: compute type, bfloat16 or float32; None for the weights'.
        mesh: that its parameters lie on, by the same rules as a teacher's; None for the default device.

    Raises:
        UserError: it is not said, is not there or cannot be used, or its tokenizer has other ids than it.
    """
    if length < 2:
        raise UserError(f"length is {length}: a text has at least 2 tokens, its first and its end.")
    clean_caption("", cleaning)  # raises before anything is read
    if not source:
        raise UserError(f"captions.encoder is '': give {WORDLLAMA}, the folder of a pipeline or a T5, or hf:ORG/NAME.")
    if source == WORDLLAMA:
        return _open_wordllama(length, cleaning)
    folder = fetch_source(source) if source.startswith("hf:") else pathlib.Path(source)
    return _open_t5(folder, length, cleaning, dtype, mesh)


def _open_wordllama(length: int, cleaning: str) -> TextEncoder:
    """The package's table and tokenizer, as files; its vectors know no order, so positions are added to them.

    Raises:
        UserError: the package is not installed, or is of another version than we know.
    """
    spec = importlib.util.find_spec(WORDLLAMA)
    if spec is None or spec.origin is None:
        raise UserError(f"the text encoder {WORDLLAMA!r} is not installed: install ard_jax[text].")
    folder = pathlib.Path(spec.origin).parent
    table_path = folder / "weights" / "l2_supercat_256.safetensors"
    token_path = folder / "tokenizers" / "l2_supercat_tokenizer_config.json"
    tokenizer = open_tokenizer(token_path)
    table = open_tensors(table_path)["embedding.weight"].astype(np.float32)
    _check_vocabulary(tokenizer, len(table), table_path)
    width = table.shape[1]

    @jax.jit
    def look_up(table, ids, mask):
        positions = sinusoids(jnp.arange(ids.shape[1], dtype=jnp.float32), width)
        return jnp.where((mask != 0)[..., None], table[ids] + positions, 0.0)

    files = (table_path, token_path)
    return TextEncoder(
        name=WORDLLAMA,
        width=width,
        length=length,
        sha256=_identity(files, length, cleaning),
        cleaning=cleaning,
        tokenizer=tokenizer,
        apply=look_up,
        params=jnp.asarray(table),
    )


def _open_t5(
    folder: pathlib.Path, length: int, cleaning: str, dtype: jnp.dtype | None, mesh: Mesh | None
) -> TextEncoder:
    """T5 as diffusers or transformers write it.

    Raises:
        UserError: it is not there, not whole, no T5 v1.1, or its tokenizer has other ids.
    """
    if not folder.is_dir():
        raise UserError(
            f"the text encoder {str(folder)!r} is not there: give {WORDLLAMA!r}, or the folder of a pipeline or a T5."
        )
    part = folder / "text_encoder" if (folder / PIPELINE).is_file() else folder
    model = t5_model(read_description(part / PART), dtype=dtype)
    beside = part.parent / "tokenizer"
    tokenizer = open_tokenizer(beside if beside.is_dir() else part)
    _check_vocabulary(tokenizer, model.vocabulary, part)
    stored = stored_t5(open_tensors(part), model)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), stored)
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    shardings = jax.tree.map(lambda leaf: here, shapes) if mesh is None else sharding_of(shapes, mesh)

    def place(path, leaf, sharding):  # a leaf at a time, so that the host never has all of it
        is_matrix = path[-1].key in ("kernel", "embedding")  # which are multiplied in the compute type anyway
        array = leaf.read().astype(dtype if dtype is not None and is_matrix else leaf.dtype, copy=False)
        return jax.device_put(array, sharding)

    params = jax.tree_util.tree_map_with_path(place, stored, shardings)

    def apply(params, ids, mask):
        return model.apply({"params": params}, ids, mask)

    return TextEncoder(
        name=f"T5 of {model.depth} layers",
        width=model.width,
        length=length,
        sha256=_identity((*part_files(part), tokenizer.path), length, cleaning),
        cleaning=cleaning,
        tokenizer=tokenizer,
        apply=jax.jit(apply if mesh is None else on_mesh(mesh)(apply)),
        params=params,
    )


def _check_vocabulary(tokenizer: Tokenizer, vocabulary: int, path: pathlib.Path) -> None:
    """Raises UserError if the tokenizer has ids that the encoder has no vectors of."""
    if tokenizer.vocabulary > vocabulary:
        raise UserError(
            f"{tokenizer.path} has {tokenizer.vocabulary} tokens, but {path} has vectors of {vocabulary}: "
            f"give the tokenizer that this text encoder was trained with."
        )


def _identity(files: Iterable[pathlib.Path], length: int, cleaning: str) -> str:
    """Of what a text's vectors depend on beside itself."""
    said = {"files": [file_sha256(path) for path in files], "length": length, "cleaning": cleaning}
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()
