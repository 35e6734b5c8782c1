"""Says in one screen what this machine is, what would go wrong on it, and what to run next.

Devices, versions, memory, disk, where compiled programs are kept, which extras are installed. It needs no flags, makes
no file and runs nothing.
"""

import argparse

from ard_jax.doctor import examine, report


def run(args: argparse.Namespace) -> None:
    """Prints the screen."""
    print(report(examine()), flush=True)


FLAGS: dict[str, dict] = {}
