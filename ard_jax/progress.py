"""How long work shows how far it is."""

import sys

import tqdm


def progress_bar(total: int, unit: str, initial: int = 0) -> tqdm.tqdm:
    """A bar with rate and remaining time on a terminal, a disabled one elsewhere (log lines serve there)."""
    return tqdm.tqdm(total=total, unit=unit, initial=initial, disable=not sys.stderr.isatty(), dynamic_ncols=True)
