"""What is done to a caption before it is encoded.

PixArt-α cleans its captions as DeepFloyd IF did: web addresses, tags, names of files, numbers of articles and
advertisements go, dashes and quotes become plain. PixArt-Σ takes them raw.
"""

import html
import re
import urllib.parse
from collections.abc import Callable

from ard_jax.errors import UserError

CLEANINGS = ("none", "lower", "clean")

_ENDINGS = "png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4"
_SITE = r"[a-zA-Z0-9.\-]+[.](?:com|co|ru|net|org|edu|gov|it)[\w/-]*\b\/?(?!@)"
# In this order: a pattern, and what stands in its place.
_BEFORE_TAGS = [(rf"\b((?:{scheme}:(?:/{{1,3}}|[a-zA-Z0-9%])|{_SITE}))", "") for scheme in ("https?", "www")]
_AFTER_TAGS = [
    (r"@[\w\d]+\b", ""),  # nicknames
    ("[\u31c0-\u4dff\u4e00-\u9fff]+", ""),  # Chinese, and what stands before it in Unicode
    (  # dashes of every kind
        "[-\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40\u301c\u3030\u30a0\ufe31\ufe32\ufe58"
        "\ufe63\uff0d]+",
        "-",
    ),
    ("[`´«»“”¨]", '"'),
    ("[‘’]", "'"),
    (r"&quot;?|&amp", ""),
    (r"\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}", " "),  # addresses of machines
    (r"\d:\d\d\s+$", ""),  # times at the end
    (r"\\n", " "),
    (r"#\d{1,3}\b", ""),
    (r"#\d{5,}\b", ""),
    (r"\b\d{6,}\b", ""),
    (rf"[\S]+\.(?:{_ENDINGS})", ""),  # names of files
    (r"[\"']{2,}", '"'),
    (r"[.]{2,}", " "),
    (r"[#®•©™&@·º½¾¿¡§~()\[\]{}|\\/*]+", " "),
    (r"\s+\.\s+", " "),
]
_AFTER_ENTITIES = [
    (r"\b[a-zA-Z]{1,3}\d{3,15}\b", ""),  # numbers of articles
    (r"\b[a-zA-Z]+\d+[a-zA-Z]+\b", ""),
    (r"\b\d+[a-zA-Z]+\d+\b", ""),
    (r"(worldwide\s+)?(free\s+)?shipping", ""),
    (r"(free\s)?download(\sfree)?", ""),
    (r"\bclick\b\s(?:for|on)\s\w+", ""),
    (rf"\b(?:{_ENDINGS})(\simage[s]?)?", ""),
    (r"\bpage\s+\d+\b", ""),
    (r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b", " "),
    (r"\b\d+\.?\d*[xх×]\d+\.?\d*\b", ""),  # sizes
    (r"\b\s+:\s+", ": "),
    (r"(\D[,./])\b", r"\1 "),
    (r"\s+", " "),
    (r"^[\"']([\w\W]+)[\"']$", r"\1"),
    (r"^['_,\-:;]", ""),
    (r"['_,\-:+]$", ""),
    (r"^\.\S+$", ""),
]
_JOINTS = re.compile("[-_]")


def clean_caption(text: str, how: str) -> str:
    """The caption as it is encoded.

    Args:
        text: as somebody wrote it.
        how: "none"; "lower", which also strips it; or "clean", as PixArt-α was trained, which is done twice.

    Raises:
        UserError: there is no such cleaning, or what it needs is not installed.
    """
    if how == "none":
        return text
    if how == "lower":
        return text.lower().strip()
    if how == "clean":
        return _clean(_clean(text))
    raise UserError(f"cleaning is {how!r}: choose one of {', '.join(CLEANINGS)}.")


def _clean(text: str) -> str:
    without_tags, repair = _libraries()
    text = urllib.parse.unquote_plus(text).strip().lower().replace("<person>", "person")
    text = _replace(text, _BEFORE_TAGS)
    text = _replace(without_tags(text), _AFTER_TAGS)
    if len(_JOINTS.findall(text)) > 3:  # this-is-one-caption
        text = _JOINTS.sub(" ", text)
    text = html.unescape(html.unescape(repair(text)))
    return _replace(text, _AFTER_ENTITIES).strip()


def _replace(text: str, rules: list[tuple[str, str]]) -> str:
    for pattern, replacement in rules:
        text = re.sub(pattern, replacement, text)
    return text


def _libraries() -> tuple[Callable[[str], str], Callable[[str], str]]:
    """What takes the tags out of a text, and what repairs its characters."""
    try:
        import bs4
        import ftfy
    except ImportError as error:
        raise UserError(f"cleaning is 'clean', which needs {error.name}: install ard_jax[text].") from None
    return lambda text: bs4.BeautifulSoup(text, features="html.parser").text, ftfy.fix_text
