"""Where captions come from: the data that a teacher is trained on, a file, a TFDS dataset, or the config itself."""

import hashlib
import json
import logging
from collections.abc import Callable
from typing import NamedTuple

from etils import epath
from ml_collections import ConfigDict

from ard_jax.data import Source, captions_of, image_source, lines_of, read_lines, read_text
from ard_jax.errors import UserError

log = logging.getLogger("ard_jax")


class Texts(NamedTuple):
    """Captions in their order, and how many of them, the last, are held out: sampled, but never trained on."""

    texts: list[str]
    held_out: int = 0


def read_texts(config: ConfigDict) -> Texts:
    """The captions that `config.captions.source` names, in their order; empty ones are left out but for the data's.

    Raises:
        UserError: there is no such source, it cannot be read, or it holds no caption.
    """
    source = config.captions.source
    readers: dict[str, Callable[[ConfigDict], Texts]] = {
        "data": texts_of_data,
        "file": _of_file,
        "tfds": _of_tfds,
        "prompts": lambda config: Texts([str(prompt) for prompt in config.captions.prompts]),
    }
    if source not in readers:
        raise UserError(f"captions.source is {source!r}: choose one of {', '.join(readers)}.")
    texts, held_out = readers[source](config)
    empty = sum(not text.strip() for text in texts)
    if empty and source == "data":  # each belongs to its picture
        log.warning("%d of %d captions are empty, and stand for no caption at all.", empty, len(texts))
    elif empty:
        log.warning("%d of %d captions are empty and left out.", empty, len(texts))
        texts = [text for text in texts if text.strip()]
    if not texts:
        raise UserError(f"captions.source is {source!r}, which holds no caption: give at least one.")
    return Texts(texts, held_out)


def texts_of_data(config: ConfigDict, source: Source | None = None) -> Texts:
    """Of the pictures of `data`, or of those that `encode` makes latents of; `source` is these, if they are open."""
    data = (config.encode if config.data.space == "latent" else config.data).copy_and_resolve_references()
    with data.unlocked():
        data.update(num_classes=0, space="pixel", channels=3, caption_key=config.data.caption_key)
    return Texts(*captions_of(data, image_source(data) if source is None else source))


def texts_sha256(texts: list[str]) -> str:
    """By which captions in their order are known again."""
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()


def _of_file(config: ConfigDict) -> Texts:
    """Lines of a text file, or of a JSONL file the strings under `data.caption_key`."""
    path, key = epath.Path(config.captions.path), config.data.caption_key
    if not path.is_file():
        raise UserError(f"captions.path is {str(path)!r}, which is no file: give a text file or a .jsonl.")
    if path.suffix != ".jsonl":
        return Texts([line.strip() for line in lines_of(read_text(path))])
    texts = []
    for where, line in read_lines(path):
        if not isinstance(line.get(key), str):
            raise UserError(f"{where} has no string {key!r}: give it one, or set data.caption_key.")
        texts.append(line[key])
    return Texts(texts)


def _of_tfds(config: ConfigDict) -> Texts:
    """A feature of a prepared TFDS dataset, which need not have pictures."""
    from ard_jax.data import tfds_texts

    data = config.data.copy_and_resolve_references()
    with data.unlocked():
        data.update(name=config.captions.name, dir=config.captions.path, split=config.captions.split)
    return Texts(tfds_texts(data))
