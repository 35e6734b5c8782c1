"""Words into vectors: tokenisers, the cleaning of captions, and T5; `text_encoders` puts them behind one interface.

What CLIP reads is here too; CLIP itself, which sees as well, is in `models`.
"""

from ard_jax.text.cleaning import CLEANINGS, clean_caption
from ard_jax.text.clip import tokens_for_clip
from ard_jax.text.t5 import T5Encoder
from ard_jax.text.tokenizers import Tokenizer, open_tokenizer

__all__ = [
    "CLEANINGS",
    "T5Encoder",
    "Tokenizer",
    "clean_caption",
    "open_tokenizer",
    "tokens_for_clip",
]
