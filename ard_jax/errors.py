"""The exceptions that the command line answers with a sentence, and how other errors are quoted in one."""

import contextlib
import re
from collections.abc import Iterator


class UserError(Exception):
    """Something the user handed over is wrong.

    The message is one sentence: what was wrong, what was expected, what to do. One about a setting, an argument or a
    flag begins with its name. The command line prints it without a traceback and exits with status 2. It is no
    ValueError, since flag parsers catch and reword those.
    """

    @property
    def key(self) -> str:
        """The setting ("model.depth"), argument or flag that the sentence is about; "" if it is about none."""
        found = re.match(r"(?:--)?[a-z]\w*(?:[.-]\w+)*(?= (?:is|has|\d))", str(self))
        return found[0] if found else ""


@contextlib.contextmanager
def settings_of(section: str) -> Iterator[None]:
    """Puts a section of the config before the field that a `UserError` raised inside is about.

    Raises:
        UserError: "model.remat is …" for a module's own "remat is …".
    """
    try:
        yield
    except UserError as error:
        if not error.key or error.key.startswith(f"{section}."):
            raise
        raise UserError(f"{section}.{error}") from None


class Preempted(Exception):
    """The run was asked to stop, has saved its state, and goes on when started again.

    Attributes:
        by_hand: with Ctrl-C, so that no script goes on as if it had ended well.
    """

    def __init__(self, words: str, by_hand: bool = False):
        super().__init__(words)
        self.by_hand = by_hand


def first_line(error: Exception) -> str:
    """What a library's error says, short enough for one sentence."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
