"""What several test files share: the CPU, float64 for one test, and the reference numbers of tests/golden/."""

import gc
import importlib.util
import os
import pathlib

import jax
import numpy as np
import pytest
from pipeline_fixtures import compilations, compile_cache, pipeline  # noqa: F401 (fixtures)

jax.config.update("jax_platforms", "cpu")  # the tests never ask for an accelerator, whatever the machine has
os.environ["JAX_PLATFORMS"] = "cpu"  # nor do the processes that they start
# Compiling is most of the time that tests take: each flag halves it. Slow tests run some programs optimised.
FLAGS = ["--xla_backend_optimization_level=0"]
if jax.__version_info__ < (0, 11):  # later ones have no other emitters, and end at a flag that they do not know
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ.setdefault("XLA_FLAGS", " ".join(FLAGS))

gc.set_threshold(100_000)  # tracing makes many small objects that live; looking through them took a tenth of the time

# Files that take longest, which begin first, or one of them would go on alone at the end.
LONGEST = ("test_stages_kills", "test_plan", "test_hosts", "test_stages_compare", "test_models", "test_stages_finetune")

GOLDEN = pathlib.Path(__file__).parent / "golden"


def pytest_collection_finish():
    gc.freeze()  # what was imported is there to stay


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))
    if not all(importlib.util.find_spec(name) for name in ("torch", "diffusers")):
        reason = "needs the oracles: pip install torch==2.13.0, then pip install -e '.[oracles]'"
        for item in items:
            if item.get_closest_marker("oracle"):
                item.add_marker(pytest.mark.skip(reason=reason))


class Golden(dict):
    """The arrays of one golden file by name; see tests/golden/README.md."""

    def images(self, name: str) -> np.ndarray:
        """An array of channels-first images (…, C, H, W) as channels last, (…, H, W, C)."""
        return np.moveaxis(self[name], -3, -1)

    def state_dict(self, dtype=np.float32) -> dict[str, np.ndarray]:
        """The weights by their published names."""
        return {name.removeprefix("param/"): self[name].astype(dtype) for name in self if name.startswith("param/")}


@pytest.fixture(scope="session")
def golden():
    """golden("dit_tiny") → a `Golden`."""
    files = {}

    def load(name: str) -> Golden:
        if name not in files:
            with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as arrays:
                files[name] = Golden(arrays)
        return files[name]

    return load


@pytest.fixture
def x64():
    """float64 in JAX for one test."""
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", before)
