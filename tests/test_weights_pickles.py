"""PyTorch's files: read by `weights_only` alone, so that nothing in them ever runs."""

import argparse
import os
import pathlib
import pickle
import re

import ml_dtypes
import numpy as np
import pytest

from ard_jax.errors import UserError
from ard_jax.weights.pickles import load, open_state_dict
from ard_jax.weights.tensors import open_tensors

pytestmark = pytest.mark.oracle


class Hostile:
    """Unpickling it would make a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.fixture
def torch():
    import torch

    return torch


@pytest.mark.parametrize("zipped", [True, False])
def test_a_state_dict(tmp_path, torch, zipped):
    given = {
        "a": torch.arange(30_000, dtype=torch.float32).reshape(150, 200),
        "b": torch.arange(6, dtype=torch.float16).reshape(2, 3).T,
        "c": torch.arange(20_000).to(torch.bfloat16),
        "d": torch.arange(4, dtype=torch.float64),
    }
    given["e"] = given["a"]
    torch.save(given, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
    opened = open_tensors(tmp_path / "x.pt")
    assert opened.shapes == {"a": (150, 200), "b": (3, 2), "c": (20_000,), "d": (4,), "e": (150, 200)}
    assert [dtype.name for dtype in opened.dtypes.values()] == ["float32", "float16", "bfloat16", "float64", "float32"]
    for _ in range(2):  # a second reading finds what the first has let go
        for name, tensor in given.items():
            array = opened[name]
            assert array.dtype == opened.dtypes[name]
            np.testing.assert_array_equal(array.astype(np.float64), tensor.to(torch.float64).numpy(), err_msg=name)
    assert opened["c"].dtype == ml_dtypes.bfloat16


def test_reading_does_not_keep_the_file_in_memory(tmp_path, torch):
    """Mapped pages count as memory: a reader that keeps them needs twice the file's size."""
    torch.save({str(i): torch.full((2**20,), float(i)) for i in range(32)}, tmp_path / "x.pt")
    opened = open_state_dict(tmp_path / "x.pt")

    def resident():
        status = pathlib.Path("/proc/self/status")
        if not status.exists():
            pytest.skip("needs Linux's /proc to see the memory")
        return int(re.search(r"RssFile:\s+(\d+)", status.read_text())[1]) * 1024

    before = resident()
    assert [opened[name][-1] for name in opened] == list(range(32))
    assert resident() - before < 16 * 2**20 < 32 * 2**22


def test_arguments_of_a_training(tmp_path, torch):
    args = argparse.Namespace(model="DiT-XL/2", image_size=256, lr=1e-4)
    torch.save({"model": {"a": torch.ones(2)}, "args": args, "opt": {"state": {}, "lr": 0.1}}, tmp_path / "x.pt")
    assert load(tmp_path / "x.pt")["args"] == args
    with pytest.raises(UserError, match=r"is no state dict of names and tensors \(it has 'model', 'args', 'opt'\)"):
        open_state_dict(tmp_path / "x.pt")


def write_raw(path, content):
    with open(path, "wb") as file:
        pickle.dump(content, file, protocol=2)


@pytest.mark.parametrize("where", ["a state dict", "arguments", "raw", "raw of a new protocol"])
def test_a_hostile_pickle_is_refused_and_nothing_in_it_runs(tmp_path, torch, capfd, where):
    path, proof = tmp_path / "x.pt", tmp_path / "it ran"
    hostile = Hostile(f"'{proof}'")
    if where == "a state dict":
        torch.save({"a": torch.ones(2), "b": hostile}, path)
    elif where == "arguments":
        torch.save({"ema": {"a": torch.ones(2)}, "args": argparse.Namespace(path=hostile)}, path)
    elif where == "raw":
        write_raw(path, hostile)
    else:
        path.write_bytes(pickle.dumps(hostile))
    with pytest.raises(UserError) as refused:
        load(path)
    said = str(refused.value)
    assert said.startswith(f"{path} is corrupt or holds more than arrays and plain values")
    assert said.endswith("so it was refused and nothing in it was run: give a state dict or safetensors.")
    assert "\n" not in said and (where == "raw of a new protocol" or "(posix.system)" in said)
    assert not proof.exists() and capfd.readouterr() == ("", "")
    pickle.loads(pickle.dumps(hostile))  # so that it is known to be hostile
    assert proof.exists()


def test_classes_are_refused_by_name(tmp_path, torch):
    torch.save({"model": torch.nn.Linear(2, 2)}, tmp_path / "x.pt")
    with pytest.raises(UserError, match=r"plain values \(torch.nn.modules.linear.Linear\), so it was refused"):
        load(tmp_path / "x.pt")


@pytest.mark.parametrize("length", [0, 10, 1000, -10, -70_000])
def test_truncated(tmp_path, torch, length):
    path = tmp_path / "x.pt"
    torch.save({"a": torch.ones(20_000)}, path)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(UserError) as refused:
        load(path)
    said = str(refused.value)
    assert said.startswith(f"{path} is truncated or corrupt, or no PyTorch file (") and said.endswith(
        "): fetch it again."
    )
    assert "\n" not in said


def test_integers(tmp_path, torch):
    torch.save({"a": torch.ones(2), "b": torch.ones(2, dtype=torch.int8)}, tmp_path / "x.pt")
    with pytest.raises(UserError, match=r"no floats of 16, 32 or 64 bits \(b is int8\): give the weights in one of"):
        open_state_dict(tmp_path / "x.pt")


def test_integers_that_are_left_out(tmp_path, torch):
    torch.save({"a": torch.ones(2), "bn.counter": torch.tensor(7)}, tmp_path / "x.pt")
    assert set(open_tensors(tmp_path / "x.pt", leave_out=".counter")) == {"a"}


@pytest.mark.parametrize("content", [[1, 2], {}, 3])
def test_what_is_no_state_dict(tmp_path, torch, content):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(UserError, match="x.pt is no state dict of names and tensors"):
        open_state_dict(tmp_path / "x.pt")
