"""Prompts of a pipeline that is told captions: words, or vectors that somebody has encoded, into a `Caption`."""

import logging
import os
import pathlib
import shutil
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from ard_jax.config import WORDLLAMA
from ard_jax.convert.families.folders import PIPELINE
from ard_jax.errors import UserError
from ard_jax.pipeline.inputs import resolve_prompts
from ard_jax.text.tokenizers import FILES
from ard_jax.text_encoders import BUCKET, TextEncoder, open_text_encoder, pad_tokens
from ard_jax.types import Caption

log = logging.getLogger("ard_jax")

# The text encoders that pipelines have open: a T5 is larger than the models of a demo, which all have the same.
_open: weakref.WeakValueDictionary[object, TextEncoder] = weakref.WeakValueDictionary()


class Prompts:
    """The text encoder of a pipeline, opened when it is first needed.

    Attributes:
        source: "wordllama", a folder, or "hf:ORG/NAME"; "" where there is none, and vectors have to be given.
    """

    def __init__(self, source: str, captions: ml_collections.ConfigDict, width: int, dtype: jnp.dtype | None = None):
        """`dtype` is the text encoder's compute type, None for its weights'."""
        self.source, self._settings, self._width, self._dtype = source, captions, width, dtype
        self._encoder: TextEncoder | None = None

    @property
    def encoder(self) -> TextEncoder:
        """The opened text encoder.

        Raises:
            UserError: there is none, or it is another than the network was trained with.
        """
        if self._encoder is None:
            if not self.source:
                raise UserError(
                    "this pipeline has no text encoder: give prompt_embeds with prompt_attention_mask, or open it from "
                    "a folder that has one."
                )
            opened = _shared_encoder(self.source, self._settings.length, self._settings.cleaning, self._dtype)
            if opened.width != self._width:
                raise UserError(
                    f"the text encoder {self.source} makes vectors of {opened.width} channels, but the network reads "
                    f"{self._width}: give the one that it was trained with."
                )
            self._encoder = opened
        return self._encoder

    def drop(self) -> None:
        """Lets go of the text encoder, whose memory is free once no pipeline has it; it is opened again when needed."""
        self._encoder = None

    def resolve(
        self, asked: Any, words: Mapping[str, Any], is_guided: bool, is_student: bool
    ) -> tuple[np.ndarray, Caption]:
        """What images are called, and what the network is told of them, of a call's arguments.

        Args:
            asked: the call's first argument, a prompt or several.
            words: its arguments of words and vectors by name, None where they are left out.
            is_guided: whether the empty caption is needed.
            is_student: whether negative prompts mean nothing.

        Raises:
            UserError: not just one of them says what to draw, or they cannot be used.
        """
        prompt, embeds = words.get("prompt"), words.get("prompt_embeds")
        if sum(value is not None for value in (asked, prompt, embeds)) != 1:
            raise UserError("give one of prompt, prompt_embeds and the first argument, which is a prompt here too.")
        wrong = [name for name, value in words.items() if name.startswith("negative") and value is not None]
        if wrong and is_student:
            raise UserError(f"{wrong[0]} is a teacher's, and this is a student, which is not guided: leave it out.")
        negative = words.get("negative_prompt")
        if not isinstance(negative, str | None):
            raise UserError(f"negative_prompt is {negative!r}: give one string, which is for all images.")
        null = self.null(negative, words.get("negative_prompt_embeds")) if is_guided else None
        if embeds is not None:
            caption = self.caption(None, embeds, words.get("prompt_attention_mask"), null)
            return np.array([f"prompt {number}" for number in range(len(caption.tokens))]), caption
        texts = resolve_prompts(asked if prompt is None else prompt)
        return np.array(texts), self.caption(texts, None, None, null)

    def caption(
        self,
        prompts: Sequence[str] | None,
        embeds: jax.typing.ArrayLike | None,
        mask: jax.typing.ArrayLike | None,
        null: np.ndarray | None,
    ) -> Caption:
        """What the network is told, leaves (prompt, …).

        Args:
            prompts: words; or None and
            embeds, mask: vectors (prompt, token, channel), and which are the prompt's own (prompt, token).
            null: of `null`, where the network is guided.

        Raises:
            UserError: the vectors or their mask cannot be used.
        """
        if prompts is not None:
            ids, cut = self.encoder.tokenize(prompts)
            self._warn(cut, len(prompts))
            padded, own = pad_tokens(ids, self._settings.length)
            tokens = np.where(own[..., None], np.asarray(self.encoder.vectors(padded, own)).astype(np.float32), 0)
        else:
            tokens, own = np.asarray(embeds), np.asarray(mask)
            is_float = jnp.issubdtype(tokens.dtype, jnp.floating)
            if tokens.ndim != 3 or tokens.shape[-1] != self._width or own.shape != tokens.shape[:2] or not is_float:
                raise UserError(
                    f"prompt_embeds is {tokens.shape} of {tokens.dtype} with a prompt_attention_mask {own.shape}, but "
                    f"floats (prompt, token, {self._width}) and (prompt, token) were expected: encode the prompts with "
                    f"the text encoder that the network was trained with."
                )
            tokens, own = tokens.astype(np.float32), own != 0
        if not own.any(axis=1).all():
            raise UserError("a prompt's mask is all zeros: even the empty prompt has a token, its end.")
        shortest = len(null) if null is not None else 0  # the empty caption must fit
        length = max(-(-max(tokens.shape[1], shortest) // BUCKET) * BUCKET, BUCKET)
        spare = ((0, 0), (0, length - tokens.shape[1]))
        tokens, own = np.pad(tokens, (*spare, (0, 0))), np.pad(own, spare)
        nulls = None if null is None else np.broadcast_to(null, (len(tokens), *null.shape)).copy()
        return Caption(tokens, own, nulls)

    def count_cut(self, prompts: Sequence[str]) -> int:
        """How many prompts have more tokens than the network is told."""
        _, cut = self.encoder.tokenize(prompts)
        return cut

    def _warn(self, cut: int, count: int) -> None:
        if cut:
            log.warning("%d of %d prompts have over %d tokens and are cut.", cut, count, self._settings.length)

    def null(self, negative: str | None, embeds: jax.typing.ArrayLike | None) -> np.ndarray:
        """The empty caption's vectors, or a negative prompt's, and last the one that pads it: (vector, channel).

        Args:
            negative: words; "" or None is the empty caption.
            embeds: or the own vectors of one that is encoded already, (token, channel).

        Raises:
            UserError: the vectors cannot be used.
        """
        if embeds is None:
            if negative:
                self._warn(self.count_cut([negative]), 1)
            return self.encoder.null(negative or "")
        vectors = np.asarray(embeds, np.float32)
        if vectors.ndim != 2 or vectors.shape[1] != self._width or not len(vectors):
            raise UserError(
                f"negative_prompt_embeds is {vectors.shape}, but (token, {self._width}) was expected: one prompt's own "
                f"vectors, for all images."
            )
        return np.concatenate([vectors, np.zeros_like(vectors[:1])])


def _shared_encoder(source: str, length: int, cleaning: str, dtype: jnp.dtype | None) -> TextEncoder:
    """An opened text encoder, the same for all who ask while somebody has it and its files are as they were.

    Raises:
        UserError: as `open_text_encoder`.
    """
    folder = pathlib.Path(source).absolute()
    files = sorted(path for path in folder.rglob("*") if path.is_file()) if _is_folder(source) else ()
    seen = tuple((os.fspath(path), path.stat().st_mtime_ns) for path in files)
    key = source, seen, length, cleaning, dtype
    opened = _open.get(key)
    if opened is None:
        opened = _open[key] = open_text_encoder(source, length, cleaning, dtype)
    return opened


def _is_folder(source: str) -> bool:
    return source != WORDLLAMA and not source.startswith("hf:")


def describe_encoder(source: str) -> tuple[str, Any]:
    """How a pipeline's index names its text encoder: copied into the folder, or by a name that is known elsewhere.

    Raises:
        UserError: it is in a folder that is not there.
    """
    if not _is_folder(source):
        return "named", ["ard_jax", source]
    if not pathlib.Path(source).is_dir():
        raise UserError(
            f"the text encoder's folder {source!r}, which captions.encoder names, is not there to be copied: put it "
            f"there, or start this where 'captions' was started if it is a relative path."
        )
    return "copied", ["transformers", "T5EncoderModel"]


def copy_encoder(source: str, folder: pathlib.Path) -> None:
    """Copies a text encoder, and its tokenizer from beside or in it, into a pipeline's folder as diffusers has them."""
    path = pathlib.Path(source)
    part = path / "text_encoder" if (path / PIPELINE).is_file() else path
    beside = part.parent / "tokenizer"
    is_beside = beside.is_dir()
    of_encoder = None if is_beside else shutil.ignore_patterns(*FILES)
    shutil.copytree(part, folder / "text_encoder", symlinks=False, ignore=of_encoder)
    if is_beside:
        shutil.copytree(beside, folder / "tokenizer", symlinks=False)
        return
    (folder / "tokenizer").mkdir()
    for name in FILES:
        if (part / name).is_file():
            shutil.copyfile(part / name, folder / "tokenizer" / name)
