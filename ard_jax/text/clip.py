"""Texts as a CLIP reads them: its byte pairs, between a start and an end, as many tokens as it has positions."""

from collections.abc import Sequence

import numpy as np

from ard_jax.errors import UserError
from ard_jax.text.tokenizers import Tokenizer

LENGTH = 77  # tokens, the start and the end among them
PADDING = 0  # OpenAI's; it is lower than any end, and nothing that follows the end is seen by it


def tokens_for_clip(
    tokenizer: Tokenizer, texts: Sequence[str], length: int = LENGTH
) -> tuple[np.ndarray, np.ndarray, int]:
    """Texts → ids for `CLIP.encode_text`.

    Args:
        tokenizer: of a CLIP's tokenizer.json (`open_tokenizer`), which says itself how texts are cleaned (lower case,
            single spaces) and what stands around them.
        texts: any number.
        length: most tokens of one, the model's `length`.

    Returns:
        ids, int32 (text, length); which of them are the text's own, bool of the same shape; and how many texts were
        cut. A text that is too long loses its last tokens, not its end.

    Raises:
        UserError: the tokenizer sets no start and end around a text, or `length` leaves no room between them.
    """
    if length < 3:
        raise UserError(f"length is {length}, but a start, a token and an end need 3: give the length of the CLIP.")
    (around,), _ = tokenizer.encode([""], length)
    if len(around) != 2:
        raise UserError(
            f"{tokenizer.path} has {len(around)} tokens for an empty text, but a CLIP's has a start and an end: "
            f"give the tokenizer.json that the CLIP came with."
        )
    rows, cut = tokenizer.encode(texts, length)
    mask = np.arange(length) < np.array([len(row) for row in rows], int)[:, None]
    ids = np.full(mask.shape, PADDING, np.int32)
    ids[mask] = np.concatenate([*rows, ids[:0, 0]])
    return ids, mask, cut
