"""Text into token ids, by the file that a text encoder comes with."""

import dataclasses
import pathlib
import re
from collections.abc import Callable, Sequence

import numpy as np

from ard_jax.errors import UserError, first_line

SENTENCEPIECE = ("spiece.model", "tokenizer.model")
TOKENIZERS = "tokenizer.json"
# All that transformers keeps a tokenizer in.
FILES = (*SENTENCEPIECE, TOKENIZERS, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
END = 1  # T5's token after a text
SPECIAL = re.compile(r"<pad>|</s>|<unk>|<extra_id_\d+>")


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Text into token ids.

    Attributes:
        path: the file that it was read from.
        vocabulary: how many ids there are.
        encode: texts and the most tokens of one → the ids of each, and how many texts were cut.
    """

    path: pathlib.Path
    vocabulary: int
    encode: Callable[[Sequence[str], int], tuple[list[np.ndarray], int]]


def open_tokenizer(path: pathlib.Path) -> Tokenizer:
    """A tokeniser from its file, or from the folder that it lies in.

    T5's spiece.model is read by sentencepiece; its ids are those of the text, cut to one less than the most, and the
    end's. A tokenizer.json is read by tokenizers, and says itself which tokens stand before and after a text.

    Raises:
        UserError: there is none, it cannot be read, or what reads it is not installed.
    """
    if path.is_dir():
        found = [path / name for name in (*SENTENCEPIECE, TOKENIZERS) if (path / name).is_file()]
        if not found:
            names = ", ".join((*SENTENCEPIECE, TOKENIZERS))
            raise UserError(f"{path} holds no tokenizer: give a folder with one of {names}.")
        path = found[0]
    if not path.is_file():
        raise UserError(f"{path} is no tokenizer: give {SENTENCEPIECE[0]}, {TOKENIZERS} or the folder of one.")
    return _open_json(path) if path.suffix == ".json" else _open_sentencepiece(path)


def _open_sentencepiece(path: pathlib.Path) -> Tokenizer:
    try:
        import sentencepiece
    except ImportError:
        raise UserError(f"{path} needs sentencepiece: install ard_jax[text].") from None
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.load(str(path))
    except (OSError, RuntimeError) as error:
        raise UserError(f"{path} cannot be read as a sentencepiece model ({first_line(error)}).") from None

    known = {processor.id_to_piece(number): number for number in range(processor.vocab_size())}
    names = [piece for piece in known if SPECIAL.fullmatch(piece)]
    special = re.compile(f"({'|'.join(map(re.escape, names))})")

    def ids_of(text: str) -> list[int]:
        """Names of special tokens in a text stand for them, as in transformers."""
        found: list[int] = []
        for part in filter(None, special.split(text)):
            found += [known[part]] if part in names else processor.encode(part)
        return found

    def encode(texts: Sequence[str], longest: int) -> tuple[list[np.ndarray], int]:
        found = [ids_of(text) for text in texts]
        cut = sum(len(ids) > longest - 1 for ids in found)
        return [np.array([*ids[: longest - 1], END], np.int32) for ids in found], cut

    return Tokenizer(path, processor.vocab_size(), encode)


def _open_json(path: pathlib.Path) -> Tokenizer:
    try:
        import tokenizers
    except ImportError:
        raise UserError(f"{path} needs tokenizers: install ard_jax[text].") from None
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises no type of its own
        raise UserError(f"{path} cannot be read as a tokenizer ({first_line(error)}).") from None
    tokenizer.no_padding()

    def encode(texts: Sequence[str], longest: int) -> tuple[list[np.ndarray], int]:
        tokenizer.enable_truncation(longest)
        found = tokenizer.encode_batch(list(texts))
        return [np.array(one.ids, np.int32) for one in found], sum(bool(one.overflowing) for one in found)

    return Tokenizer(path, tokenizer.get_vocab_size(), encode)
