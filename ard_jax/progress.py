"""How long work shows how far it is."""

import sys
import time

import tqdm


def progress_bar(total: int, unit: str, initial: int = 0) -> tqdm.tqdm:
    """A bar with rate and remaining time on a terminal, a disabled one elsewhere (log lines serve there)."""
    return tqdm.tqdm(total=total, unit=unit, initial=initial, disable=not sys.stderr.isatty(), dynamic_ncols=True)


class Stopwatch:
    """Seconds since it was made."""

    def __init__(self):
        self.start = time.monotonic()

    def __call__(self) -> float:
        return time.monotonic() - self.start
