"""Many hosts: how their processes find each other, see that they are about to do the same, and stop together."""

import contextlib
import ctypes
import glob
import importlib.util
import json
import logging
import os
import pathlib
import secrets
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from ard_jax.errors import UserError, first_line
from ard_jax.version import __version__

log = logging.getLogger("ard_jax")

FLAGS = {  # of the command line
    "--coordinator": dict(metavar="HOST:PORT"),
    "--num-processes": dict(metavar="N"),
    "--process-id": dict(metavar="I"),
}
FRESH = 15  # seconds since a waiting host was last heard of, at most
SKEW = 5  # seconds by which clocks may differ
FOREVER = 7 * 24 * 3600  # seconds; a host that dies is noticed by its missing heartbeats long before


class ProcessPlace(NamedTuple):
    """A process among all.

    Attributes:
        index: its number, from 0.
        count: how many there are.
        coordinator: HOST:PORT where process 0 listens; None where JAX finds it by the environment.
    """

    index: int  # type: ignore[assignment]  # tuple's own methods of these names are not used
    count: int  # type: ignore[assignment]
    coordinator: str | None = None


def place_by_flags(coordinator: str | None, count: str | None, index: str | None) -> ProcessPlace | None:
    """What the `FLAGS` say; None if none of them is there.

    Raises:
        UserError: one of them is missing or cannot be used, or names a host that is not there.
    """
    if coordinator is count is index is None:
        return None
    if coordinator is None or count is None or index is None:
        raise UserError(f"{', '.join(FLAGS)} belong together: give all of them, or none.")
    if not coordinator.rpartition(":")[0] or not coordinator.rpartition(":")[2].isdecimal():
        raise UserError(f"--coordinator is {coordinator!r}: give HOST:PORT of process 0, such as 10.0.0.2:8476.")
    if not (count.isdecimal() and index.isdecimal() and int(index) < int(count)):
        raise UserError(
            f"--process-id {index} of --num-processes {count} does not work: number the processes from 0 to one less "
            f"than there are."
        )
    host, _, port = coordinator.rpartition(":")
    try:
        socket.getaddrinfo(host.strip("[]"), int(port))
    except OSError as error:
        raise UserError(
            f"--coordinator is {coordinator!r}, but no host of that name is found ({first_line(error)}): give the name "
            f"or the address of process 0 as this machine knows it."
        ) from None
    return ProcessPlace(int(index), int(count), coordinator)


def is_one_of_several(arguments: list[str]) -> bool:
    """Whether a command line or this process's environment says that there are other hosts, rightly or not."""
    given = {argument.partition("=")[0] for argument in arguments}
    try:
        return bool(given & set(FLAGS)) or place_by_environment() is not None
    except UserError:
        return True


def place_by_environment() -> ProcessPlace | None:
    """This process's place on Slurm (in a step of several tasks) or on a Cloud TPU of several hosts, or None.

    Raises:
        UserError: Slurm's variables do not go together.
    """
    environment = os.environ
    count = environment.get("SLURM_STEP_NUM_TASKS", "1")
    if count != "1":
        # all of these are what JAX finds process 0 by
        needed = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_LOCALID")
        missing = [name for name in needed if not environment.get(name)]
        index = environment.get("SLURM_PROCID", "")
        if missing or not (count.isdecimal() and index.isdecimal()):
            raise UserError(
                f"SLURM_STEP_NUM_TASKS is {count!r}, but {', '.join(missing or ['SLURM_PROCID'])} cannot be used: "
                f"start the tasks with srun, or unset Slurm's variables, or give {', '.join(FLAGS)}."
            )
        return ProcessPlace(int(index), int(count))
    has_chips = glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*")
    if has_chips and importlib.util.find_spec("libtpu") and "cpu" not in environment.get("JAX_PLATFORMS", ""):
        names = environment.get("TPU_WORKER_HOSTNAMES", "").split(",")
        return ProcessPlace(int(environment.get("TPU_WORKER_ID", 0)), len(names))
    return None


def start(place: ProcessPlace | None, folder: pathlib.Path, timeout: float) -> None:
    """Joins the other processes, before anything asks JAX for its devices; alone where there are no others.

    Args:
        place: see `place_by_flags` and `place_by_environment`.
        folder: that all hosts see, where those that wait say so.
        timeout: seconds to wait for the others. Then the process ends with status 2 and a sentence that names those
            who did not come.

    Raises:
        UserError: JAX cannot join them.
    """
    if place is None or jax.distributed.is_initialized():  # by an earlier stage of this process
        return
    options: dict[str, Any] = {}
    if place.coordinator:
        # process 0 listens where it was told to and nowhere else
        options = {"coordinator_address": place.coordinator, "coordinator_bind_address": place.coordinator}
        options |= {"num_processes": place.count, "process_id": place.index, "cluster_detection_method": "deactivate"}
    try:
        with _roll_call(place, folder, timeout):
            jax.distributed.initialize(
                **options, initialization_timeout=int(timeout) + 60, shutdown_timeout_seconds=FOREVER
            )
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"host {place.index} cannot join the others ({first_line(error)}): see that all run the same command and "
            f"reach {place.coordinator or 'each other'}."
        ) from None


@contextlib.contextmanager
def _roll_call(place: ProcessPlace, folder: pathlib.Path, timeout: float) -> Iterator[None]:
    """Ends the process if the block, in which it waits for the others, takes longer than `timeout`.

    JAX would end it without a word on who is missing. Those that wait touch a file each until they have met.
    """
    if place.count == 1:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    mine, met = folder / str(place.index), threading.Event()

    def watch() -> None:
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            mine.touch()
            if met.wait(min(1.0, timeout / 4)):
                return
        there = {index for index in range(place.count) if is_fresh(folder / str(index), mine)}
        missing = [str(index) for index in range(place.count) if index not in there]
        who = f"host {missing[0]} has" if len(missing) == 1 else f"hosts {', '.join(missing) or 'unknown'} have"
        sentence = f"{who} not joined the {place.count} that this run has within {timeout:g} seconds"
        print(f"ard_jax: {sentence}: see why in the log there, and start all of them again.", file=sys.stderr)
        leave(2)  # the file stays, or a host that gives up a moment later would name this one

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        met.set()
        watcher.join()
        mine.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # others are still there
            folder.rmdir()


def is_fresh(path: pathlib.Path, than: pathlib.Path) -> bool:
    """Whether a file was touched lately by the clock of the file system; those of killed runs were not."""
    with contextlib.suppress(FileNotFoundError):
        return than.stat().st_mtime - path.stat().st_mtime < FRESH
    return False


@contextlib.contextmanager
def handlers_put_back(numbers: Iterable[int]) -> Iterator[None]:
    """Puts the handlers of signals back in the end.

    Those too that are not Python's, which `signal` cannot: on several hosts SIGTERM is JAX's, by which a training that
    another stage of this process goes before saves its state.
    """
    library = ctypes.CDLL(None)
    size = 256  # bytes, more than any system's struct sigaction
    before = {number: (signal.getsignal(number), ctypes.create_string_buffer(size)) for number in numbers}
    for number, (_, action) in before.items():
        library.sigaction(number, None, action)
    try:
        yield
    finally:
        for number, (handler, action) in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
            library.sigaction(number, action, None)


def leave_others(status: int, error: BaseException | None = None) -> None:
    """`leave`, with the traceback of an error, if this process is one of several; else nothing."""
    if jax.distributed.is_initialized():  # asking for the number of processes would ask for devices first
        if error is not None:
            traceback.print_exception(error)
        leave(status)


def leave(status: int) -> None:
    """Ends this process at once: an orderly end would wait for the other hosts, which wait for this one."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def check_same_settings(settings: dict[str, Any]) -> None:
    """Compares the settings of all hosts, and says once if their versions or clocks differ.

    Args:
        settings: of this host, flat: dotted keys to plain values.

    Raises:
        UserError: another host has other settings; the sentence names the first keys.
    """
    if jax.process_count() == 1:
        return
    multihost_utils.sync_global_devices("every host has its settings")  # so that the clocks are read together
    versions = {"jax": jax.__version__, "ard_jax": __version__, "Python": sys.version.split()[0]}
    everyone = gather_json({"settings": settings, "versions": versions, "time": time.time()})
    first, here = everyone[0], everyone[jax.process_index()]
    for host, other in enumerate(everyone):
        if differing := _differences(other["settings"], first["settings"]):
            raise UserError(f"host {host} was started with another config ({differing}): give all hosts the same.")
    if here is not first:
        return
    for name in versions:
        found = sorted({other["versions"][name] for other in everyone})
        if len(found) > 1:
            log.warning("the hosts have different versions of %s (%s): install the same.", name, " and ".join(found))
    times = [other["time"] for other in everyone]
    if max(times) - min(times) > SKEW:
        log.warning("the hosts' clocks differ by %.0f seconds: their logs do too.", max(times) - min(times))


def _differences(other: Mapping[str, Any], first: Mapping[str, Any]) -> str:
    """The first keys that a host has otherwise than host 0, in words; "" if there are none."""
    keys = [key for key in sorted(first.keys() | other.keys()) if other.get(key) != first.get(key)]
    return "; ".join(f"{key} {other.get(key)!r:.80} there, {first.get(key)!r:.80} on host 0" for key in keys[:3])


def check_same_inputs(found: Mapping[str, Any], directory: pathlib.Path) -> None:
    """Compares what each host is about to make a folder of; all hosts call it.

    Args:
        found: on this host, as JSON: hashes of its data, of a teacher, of a store.
        directory: the folder.

    Raises:
        UserError: on all hosts, if one has others; the sentence names it and the first keys.
    """
    if jax.process_count() == 1:
        return
    everyone = gather_json(found)
    for host, other in enumerate(everyone):
        if differing := _differences(other, everyone[0]):
            raise UserError(
                f"host {host} has other inputs for {directory} than host 0 ({differing}): let all hosts read the same "
                f"files."
            )


def check_same_workdir(workdir: pathlib.Path) -> None:
    """Sees that all hosts find in the workdir what host 0 writes there; all hosts call it.

    Raises:
        UserError: on all hosts, if one does not, or host 0 cannot write there.
    """
    if jax.process_count() == 1:
        return
    first = jax.process_index() == 0
    # a name that nobody has asked a network's file system for, which might remember that it was not there
    token, said = workdir / f".seen-{secrets.token_hex(8)}", ""
    try:
        if first:
            try:
                workdir.mkdir(parents=True, exist_ok=True)
                token.touch()
            except OSError as error:
                said = f"host 0 cannot write to {workdir} ({first_line(error)}): mend that, or give another --workdir."
        folder, name, said = gather_json([str(workdir), token.name, said])[0]
        if said:
            raise UserError(said)
        blind = [host for host, sees in enumerate(gather_json(os.path.exists(workdir / name))) if not sees]
    finally:
        if first:
            with contextlib.suppress(OSError):  # it could not even be written
                token.unlink()
    if blind:
        raise UserError(
            f"host {blind[0]} does not see {folder} as host 0 does: give a folder that all hosts share, such as one of "
            f"a bucket that is mounted on each."
        )


def wait_for_all(what: str) -> None:
    """Until all processes are here, of which one may have written what is said."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def of_first(value: Any) -> Any:
    """The first process's value, which is JSON, on all of them."""
    return gather_json(value)[0] if jax.process_count() > 1 else value


def gather_json(value: object) -> list[Any]:
    """Every process's value, in the order of the processes."""
    mine = np.frombuffer(json.dumps(value).encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.asarray(len(mine)))
    padded = np.zeros(lengths.max(), np.uint8)
    padded[: len(mine)] = mine
    rows = multihost_utils.process_allgather(padded)
    return [json.loads(bytes(row[:length])) for row, length in zip(rows, lengths.ravel(), strict=True)]
