"""What this machine is, what would go wrong on it, and what to run next: facts, and sentences about them."""

import dataclasses
import importlib.metadata
import os
import pathlib
import platform
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax

from ard_jax.chips import processors
from ard_jax.errors import first_line
from ard_jax.files import find_repository
from ard_jax.version import __version__

NVIDIA = pathlib.Path("/proc/driver/nvidia/version")
SHOWN = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "libtpu")
GIB = 2**30
LITTLE_MEMORY, LITTLE_DISK = 4 * GIB, 5 * GIB  # with less, a laptop swaps, and an installation of all extras fails
USES = {  # what is missed without an extra
    "train": "the stages that train, sample, measure and report",
    "text": "captions",
    "emoji": "OpenMoji, and with it launch/emoji.sh and the demo's shipped models",
    "demo": "python -m ard_jax demo",
    "convert": ".pt checkpoints",
    "tpu": "TPUs, and plans for them",
}


@dataclasses.dataclass(frozen=True)
class Facts:
    """What this machine is.

    Attributes:
        versions: of Python and of packages, by name; those that are not installed are left out.
        platform: of the devices that JAX works on, "" if it finds none.
        devices: what they are called, one each.
        device_memory: bytes of each, 0 where it is not told.
        failure: what JAX says if it finds none.
        driver: of an NVIDIA GPU, "" for none.
        cores: of the CPU that this process may use.
        memory, memory_free: bytes of the machine.
        disk, disk_free: bytes of the disk that the current folder is on.
        writable: whether files can be made in the current folder.
        cache: the folder of compiled programs, "" where each run keeps its own.
        missing: by extra, the packages of it that are not installed.
        repository: whether the launch scripts are beside the package.
        environment: the variables that change what JAX does.
    """

    versions: Mapping[str, str]
    platform: str = ""
    devices: Sequence[str] = ()
    device_memory: int = 0
    failure: str = ""
    driver: str = ""
    cores: int = 1
    memory: int = 0
    memory_free: int = 0
    disk: int = 0
    disk_free: int = 0
    writable: bool = True
    cache: str = ""
    missing: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)
    repository: bool = True
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)


def examine() -> Facts:
    """Looks at this machine, without importing what takes long."""
    disk, memory = shutil.disk_usage(pathlib.Path.cwd()), _memory()
    found = {name: version for name in SHOWN if (version := _version(name))}
    told = {key: os.environ[key] for key in ("JAX_PLATFORMS", "XLA_FLAGS", "JAX_ENABLE_X64") if os.environ.get(key)}
    return Facts(
        versions={"ard_jax": __version__, "Python": platform.python_version(), **found},
        **_devices(),
        driver=_driver(),
        cores=len(processors()),
        memory=memory.get("MemTotal", 0),
        memory_free=memory.get("MemAvailable", 0),
        disk=disk.total,
        disk_free=disk.free,
        writable=os.access(pathlib.Path.cwd(), os.W_OK),
        cache=os.environ.get("JAX_COMPILATION_CACHE_DIR", ""),
        missing={extra: [name for name in names if not _version(name)] for extra, names in extras().items()},
        repository=(find_repository() / "launch" / "quickstart.sh").is_file(),
        environment=told,
    )


def _devices() -> dict[str, Any]:
    """The fields of `Facts` that JAX knows."""
    try:
        devices = jax.local_devices()
    except Exception as error:  # of whatever kind the platform's own library raises
        return {"failure": first_line(error)}
    memory = (devices[0].memory_stats() or {}).get("bytes_limit", 0)
    kinds = [device.device_kind for device in devices]
    return {"platform": devices[0].platform, "devices": kinds, "device_memory": memory}


def _driver() -> str:
    found = re.search(r"Module\s+(?:for \S+\s+)?(\d[\d.]+)", NVIDIA.read_text()) if NVIDIA.is_file() else None
    return found[1] if found else ""


def _memory() -> dict[str, int]:
    """Bytes by the names that Linux has for them; elsewhere nothing is known."""
    path = pathlib.Path("/proc/meminfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    found = [re.match(r"(\w+):\s+(\d+) kB", line) for line in lines]
    return {match[1]: int(match[2]) * 1024 for match in found if match}


def _version(name: str) -> str:
    """Of an installed package, "" if it is not there."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def extras() -> dict[str, list[str]]:
    """The packages of each extra: of the repository's requirements/, or of what is installed where there is none."""
    root = find_repository()
    files = {extra: root / "requirements" / f"{extra}.txt" for extra in USES}
    if all(path.is_file() for path in files.values()):
        return {extra: _names(path.read_text().splitlines()) for extra, path in files.items()}
    try:
        required = importlib.metadata.requires("ard_jax") or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    return {extra: _names(line for line in required if re.search(rf"extra == .{extra}\b", line)) for extra in USES}


def _names(lines: Iterable[str]) -> list[str]:
    """Names of packages in lines of requirements; jax's own extra for TPUs is libtpu."""
    found = [re.match(r"([A-Za-z0-9._-]+)(\[tpu\])?", line) for line in lines]
    return ["libtpu" if match[2] else match[1] for match in found if match]


# ------------------------------------------------------------------------------------------------------ in words


def report(facts: Facts) -> str:
    """One screen: what it is, what would go wrong, what to run next."""
    packages = ", ".join(f"{name} {version}" for name, version in facts.versions.items())
    kinds = ", ".join(f"{facts.devices.count(kind)} × {kind}" for kind in dict.fromkeys(facts.devices))
    each = f", {_gib(facts.device_memory)} each" if facts.device_memory else ""
    driver = f", NVIDIA driver {facts.driver}" if facts.driver else ""
    there = [extra for extra, missing in facts.missing.items() if not missing]
    away = [f"{extra} ({', '.join(names[:3])})" for extra, names in facts.missing.items() if names]
    rows = {
        "versions": packages,
        "devices": f"{facts.platform}: {kinds}{each}{driver}" if facts.devices else f"none{driver}",
        "machine": f"{facts.cores} cores, {_gib(facts.memory)} of memory, {_gib(facts.memory_free)} free",
        "disk here": f"{_gib(facts.disk)}, {_gib(facts.disk_free)} free",
        "compiled": f"kept in {facts.cache}" if facts.cache else "kept in each run's own compile_cache/",
        "extras": ", ".join(there) or "none",
        "not there": ", ".join(away) or "nothing is missing",
    }
    wrong, following = problems(facts), next_steps(facts)
    lines = [f"{name:<10} {words}" for name, words in rows.items()]
    lines += ["", "what would go wrong:" if wrong else "nothing that would go wrong was found."]
    lines += [f"  - {sentence}" for sentence in wrong]
    return "\n".join([*lines, "", "next:", *(f"  {command}" for command in following)])


def problems(facts: Facts) -> list[str]:
    """A sentence on each thing that would go wrong, and what to do about it."""
    found, package = [], _package(facts)
    if facts.failure:
        found.append(f"JAX finds no device ({facts.failure}): see that jax is installed for it and that it is free.")
    if "JAX_PLATFORMS" in facts.environment and facts.failure:
        found.append(f"JAX_PLATFORMS is {facts.environment['JAX_PLATFORMS']!r}: unset it, and JAX takes what is there.")
    if facts.driver and facts.platform == "cpu" and "JAX_PLATFORMS" not in facts.environment:
        found.append("there is an NVIDIA GPU, but jax is installed for the CPU alone: pip install -U 'jax[cuda13]'.")
    if "libtpu" not in facts.versions and pathlib.Path("/dev/accel0").exists():
        found.append(f"there is a TPU, but libtpu is not installed: pip install '{package}[tpu]'.")
    if 0 < facts.memory < LITTLE_MEMORY:
        found.append(f"{_gib(facts.memory)} of memory are little for training: close other programs first.")
    if facts.disk_free < LITTLE_DISK:
        found.append(f"{_gib(facts.disk_free)} are free on this disk: give a --workdir on another, or free some space.")
    if not facts.writable:
        found.append("nothing can be written in this folder: give a --workdir elsewhere.")
    for extra in ("train", "text", "emoji"):
        if facts.missing.get(extra):
            found.append(f"{USES[extra]} will not run without the extra {extra}: pip install '{package}[{extra}]'.")
    return found


def next_steps(facts: Facts) -> list[str]:
    """Commands, each with what it does."""
    missing = {extra for extra, names in facts.missing.items() if names}
    steps = {}
    if "train" in missing:
        every = "-r requirements.txt" if facts.repository else f"'{_package(facts)}[train]'"
        steps[f"pip install {every}"] = "all stages"
    if "emoji" not in missing and facts.repository:
        if "demo" not in missing:
            steps["python -m ard_jax demo"] = "the shipped models in a page, to play with"
        if "train" not in missing:
            steps["launch/emoji.sh"] = "pictures from words at once, then students of your own"
    if "train" not in missing and facts.repository:
        steps["launch/quickstart.sh"] = "from nothing to a four-step student on real digits"
    if "demo" in missing:
        steps[f"pip install '{_package(facts)}[demo]'"] = "a page to play with models"
    width = max(map(len, steps), default=0)
    return [f"{command:<{width}}  # {words}" for command, words in steps.items()]


def _package(facts: Facts) -> str:
    """What pip is told to install, extras after it."""
    return "." if facts.repository else "ard_jax"


def _gib(number: int) -> str:
    return f"{number / GIB:,.1f} GiB" if number else "?"
