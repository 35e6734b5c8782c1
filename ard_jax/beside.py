"""Commands side by side: what `python -m ard_jax run … beside …` does on a CPU.

A network that is small enough for a CPU does not keep several processors busy: two students on one processor each take
less time than one after the other on both. Each command runs in a process of its own, which starts as it would alone,
on its share of the processors; what it prints comes out line by line, with its number before it.
"""

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Sequence
from typing import NamedTuple, TextIO

import jax

from ard_jax import hosts
from ard_jax.chips import processors
from ard_jax.command_line import check_devices
from ard_jax.errors import UserError
from ard_jax.parallel import set_up_libtpu

MODULE = "ard_jax"  # that takes the commands
LONGEST_LINE = 2**20  # bytes
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Ended(NamedTuple):
    """What came of the commands: an exit status, and whether they were asked to stop."""

    status: int
    stopped: bool


def shares(every: Sequence[int], count: int) -> list[list[int]]:
    """The processors of each of `count` commands, or of as many as can run at once; some may be left over."""
    count = min(count, len(every))
    each = len(every) // count
    return [list(every[first * each : (first + 1) * each]) for first in range(count)]


def is_possible(arguments: list[str]) -> bool:
    """Whether commands with these arguments may run side by side here: on a CPU of several processors, on one host."""
    if len(processors()) < 2 or hosts.is_one_of_several(arguments):
        return False
    set_up_libtpu()
    try:
        check_devices()
    except UserError:  # which a stage says
        return False
    return jax.default_backend() == "cpu"


def run_beside(commands: Sequence[tuple[str, Sequence[str]]]) -> Ended:
    """Runs commands side by side, as many at once as there are processors.

    SIGINT, SIGTERM and SIGHUP are handed on to all of them, which save what they have, and no other is started; the
    same where one fails, by SIGTERM.

    Args:
        commands: what stands before each line of one, and its words after `python -m ard_jax`.

    Returns:
        The status of the first that failed. If they were stopped it is 130 after Ctrl-C, and else that of one that had
        nothing to save, or 0.
    """
    return asyncio.run(_run(commands))


async def _run(commands: Sequence[tuple[str, Sequence[str]]]) -> Ended:
    loop, running = asyncio.get_running_loop(), set[asyncio.subprocess.Process]()
    asked: list[int] = []  # signals, in their order
    failed: list[int] = []  # statuses, in theirs
    free: asyncio.Queue[list[int]] = asyncio.Queue()
    for share in shares(processors(), len(commands)):
        free.put_nowait(share)

    def hand_on(number: int, *to: asyncio.subprocess.Process) -> None:
        for process in to or running:
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                process.send_signal(number)

    def stop(number: int) -> None:
        asked.append(number)
        hand_on(number)

    async def run(label: str, words: Sequence[str]) -> int:
        share = await free.get()
        try:
            if asked or failed:
                return 0
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", MODULE, *words),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                limit=LONGEST_LINE,
                env=os.environ | {"NPROC": str(len(share))},  # from which XLA takes its number of threads
                start_new_session=True,  # a terminal's Ctrl-C would come to it twice
            )
            running.add(process)
            try:
                if hasattr(os, "sched_setaffinity"):
                    os.sched_setaffinity(process.pid, share)
                if asked or failed:  # while it was being started
                    hand_on((asked or [signal.SIGTERM])[0], process)
                await asyncio.gather(
                    _hand_through(process.stdout, label, sys.stdout), _hand_through(process.stderr, label, sys.stderr)
                )
                ended = await process.wait()
            finally:
                running.discard(process)
            status = ended if ended >= 0 else 128 - ended  # as a shell says that a signal ended it
            if status and not asked and not failed:
                hand_on(signal.SIGTERM)
                failed.append(status)
            return status
        finally:
            free.put_nowait(share)

    numbers = [number for number in STOPS if signal.getsignal(number) != signal.SIG_IGN]  # as nohup has SIGHUP
    for number in numbers:
        loop.add_signal_handler(number, stop, number)
    try:
        statuses = await asyncio.gather(*(run(label, words) for label, words in commands))
    finally:
        hand_on(signal.SIGTERM)  # none is left running, whatever was raised
        for number in numbers:
            loop.remove_signal_handler(number)
    if failed:
        return Ended(failed[0], False)
    if asked:
        return Ended(130 if asked[0] == signal.SIGINT else max(statuses), True)
    return Ended(0, False)


async def _hand_through(source: asyncio.StreamReader | None, label: str, target: TextIO) -> None:
    assert source is not None  # it is a pipe
    async for line in source:
        print(f"{label}{line.decode(errors='replace').rstrip()}", file=target, flush=True)
