"""The slices that a plan can be made for: a TPU's that is not there, or this machine's CPU."""

import importlib.util
import os
import re
from typing import NamedTuple

import jax
from jax.experimental import topologies

from ard_jax.chips import CHIPS, Chip, measured_copy_rate, measured_matmul_rate
from ard_jax.errors import UserError, first_line
from ard_jax.parallel import set_up_libtpu

# Shapes that Google Cloud offers; libtpu knows more.
FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
SOLID = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16")
SHAPES = {"v4": SOLID, "v5e": FLAT, "v5p": SOLID, "v6e": FLAT}

# What libtpu is told beside the name: hosts of another size than 2×2 chips, and that a v4 chip's two cores are one
# device, as on Cloud TPU.
OPTIONS: dict[str, dict[str, str | tuple[int, ...]]] = {
    **{f"{chip}:1x1": {"chips_per_host_bounds": (1, 1, 1)} for chip in ("v5e", "v6e")},
    **{f"{chip}:2x4": {"chips_per_host_bounds": (2, 4, 1)} for chip in ("v5e", "v6e")},
    **{f"v4:{shape}": {"chip_config_name": "megacore"} for shape in SOLID},
}

# libtpu is loaded as a compiler alone: it asks no metadata server, keeps no logs, and lets others load it as well.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_LOG_DIR": "disabled",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


class Slice(NamedTuple):
    """Devices to plan for.

    Attributes:
        name: as given, such as "v5e:4x4".
        devices: to lay meshes over.
        chip: what one of them can do.
        platform: "tpu" or "cpu".
    """

    name: str
    devices: list[jax.Device]
    chip: Chip
    platform: str

    @property
    def host(self) -> list[jax.Device]:
        """The devices of one host; of many, a slice of its own, since nothing compiles for a part of a slice."""
        if len({device.process_index for device in self.devices}) == 1:
            return self.devices
        chip = self.name.partition(":")[0]
        return find_slice(f"{chip}:{'2x2x1' if SHAPES[chip] is SOLID else '2x2'}").devices


def find_slice(name: str) -> Slice:
    """A slice by its name.

    Raises:
        UserError: there is no such slice, or libtpu is not installed or does not know it.
    """
    if name == "cpu":
        return Slice(name, jax.devices("cpu"), _cpu_chip(), "cpu")
    chip, _, shape = name.partition(":")
    axes = 3 if SHAPES.get(chip) is SOLID else 2
    if chip not in SHAPES or not re.fullmatch("x".join([r"[1-9]\d*"] * axes), shape):
        raise UserError(f"there is no topology {name!r}: choose {_known()}.")
    if importlib.util.find_spec("libtpu") is None and "TPU_LIBRARY_PATH" not in os.environ:
        raise UserError(
            f"planning for {name} needs libtpu, TPU's compiler, which is not installed: "
            f"pip install -e '.[tpu]' brings it, in an environment of its own if you like, or plan for --topology cpu."
        )
    for variable, value in ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    set_up_libtpu()
    options = OPTIONS.get(name, OPTIONS["v4:2x2x1"] if chip == "v4" else {})
    try:
        described = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
    except Exception as error:  # whatever libtpu does not like
        raise UserError(f"libtpu refuses {name} ({first_line(error)}): choose {_known()}.") from None
    return Slice(name, list(described.devices), CHIPS[chip], "tpu")


def _known() -> str:
    """The topologies that there are, in words."""
    return "; ".join(f"{chip}:{', '.join(shapes)}" for chip, shapes in SHAPES.items()) + "; or cpu"


def _cpu_chip() -> Chip:
    """What this machine's CPU can do, measured; its devices share its cores and its memory."""
    count = len(jax.devices("cpu"))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    bandwidth = measured_copy_rate() / count
    return Chip(measured_matmul_rate() / count, memory / count, bandwidth, ici_bandwidth=bandwidth)
