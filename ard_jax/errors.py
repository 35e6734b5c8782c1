"""The exceptions that the command line answers with a sentence, and how other errors are quoted in one."""


class UserError(Exception):
    """Something the user handed over is wrong.

    The message is one sentence: what was wrong, what was expected, what to do.
    The command line prints it without a traceback and exits with status 2. It is no ValueError, since flag parsers
    catch and reword those.
    """


class Preempted(Exception):
    """The run was asked to stop, has saved its state, and goes on when started again."""


def first_line(error: Exception) -> str:
    """What a library's error says, short enough for one sentence."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
