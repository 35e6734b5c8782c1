"""Named arrays in files: what is read is what was written, and what is not whole is refused in a sentence."""

import json
import logging
import pathlib
import re
import sys
import types

import ml_dtypes
import numpy as np
import pytest
from convert_fixtures import assert_same
from safetensors.numpy import load_file, save_file

from ard_jax.convert.hub import fetch_source, needed_files
from ard_jax.errors import UserError
from ard_jax.weights.lazy import Stored, Tensors, dtypes_of, shapes_of
from ard_jax.weights.tensors import open_tensors, read_tensors, to_float32, write_tensors

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def arrays(*dtypes):
    """One array a type, named by its place."""
    rng = np.random.default_rng(0)
    return {f"layer.{i}": rng.normal(size=(3, 4 + i)).astype(dtype) for i, dtype in enumerate(dtypes)}


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def write_shards(folder, tensors, index="diffusion_pytorch_model.safetensors.index.json"):
    """The tensors in two shards, as diffusers writes them."""
    folder.mkdir(exist_ok=True)
    shards = {f"diffusion_pytorch_model-0000{part + 1}-of-00002.safetensors": {} for part in (0, 1)}
    places = {}
    for number, (name, array) in enumerate(tensors.items()):
        shard = list(shards)[number % 2]
        shards[shard][name], places[name] = array, shard
    for shard, part in shards.items():
        save_file(part, folder / shard)
    (folder / index).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    return places


# ------------------------------------------------------------------------------------------------------ reading


@pytest.mark.parametrize("where", ["file", "folder", "shards"])
def test_types_are_kept(tmp_path, where):
    given = arrays(np.float32, np.float16, BFLOAT16, np.float64)
    if where == "shards":
        write_shards(tmp_path, given)
        path = tmp_path
    else:
        write_tensors(tmp_path / "diffusion_pytorch_model.safetensors", given, {"licence": "mit"})
        path = tmp_path if where == "folder" else tmp_path / "diffusion_pytorch_model.safetensors"
    assert_same(read_tensors(path), given)
    opened = open_tensors(path)
    assert shapes_of(opened) == shapes_of(given) and dtypes_of(opened) == dtypes_of(given)
    assert opened.metadata == ({} if where == "shards" else {"licence": "mit"})


def test_names_that_are_left_out_may_be_of_any_type(tmp_path):
    given = arrays(np.float32) | {"bn.counter": np.array(7), "counter.weight": np.ones(2, np.float32)}
    save_file(given, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="no floats of 16, 32 or 64 bits .bn.counter is I64"):
        open_tensors(tmp_path / "x.safetensors")
    assert set(open_tensors(tmp_path / "x.safetensors", leave_out=".counter")) == {"layer.0", "counter.weight"}
    given["position_ids"] = np.arange(3)
    write_shards(tmp_path / "shards", given)
    with pytest.raises(UserError, match="no floats of 16, 32 or 64 bits"):
        open_tensors(tmp_path / "shards")
    found = open_tensors(tmp_path / "shards", leave_out=(".counter", "position_ids"))
    assert set(found) == {"layer.0", "counter.weight"}


def test_arrays_are_read_when_they_are_asked_for(tmp_path):
    """Two gigabytes that take no room: the header is written, the arrays are a hole in the file."""
    header = {"big": {"dtype": "F32", "shape": [2**14, 2**15], "data_offsets": [0, 2**31]}}
    text = json.dumps(header).encode()
    path = tmp_path / "sparse.safetensors"
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + 2**31)
    opened = open_tensors(path)
    assert opened.shapes == {"big": (2**14, 2**15)} and opened.dtypes == {"big": np.dtype(np.float32)}
    assert len(opened) == 1 and list(opened) == ["big"]

    def fail():
        raise AssertionError("it was read")

    unread = Tensors({"x": Stored((1,), np.dtype(np.float16), fail)})
    assert "x" in unread and "y" not in unread and to_float32(unread, "here").shapes == {"x": (1,)}
    with pytest.raises(AssertionError, match="it was read"):
        unread["x"]


@pytest.mark.parametrize(
    "names, chosen",
    [
        (["diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.safetensors"], 1),
        (["diffusion_pytorch_model.fp16.safetensors"], 0),
        (["diffusion_pytorch_model.non_ema.safetensors", "diffusion_pytorch_model.fp16.safetensors"], 1),
        (["ard.safetensors"], 0),
    ],
)
def test_which_file_of_a_folder(tmp_path, names, chosen):
    for number, name in enumerate(names):
        write_tensors(tmp_path / name, {"x": np.full(2, number, np.float32)})
    assert open_tensors(tmp_path)["x"][0] == chosen


def test_a_folder_of_full_and_half_precision_shards(tmp_path):
    """diffusers names the index of a variant `….safetensors.index.fp16.json`."""
    given = arrays(np.float32, np.float32)
    write_shards(tmp_path, arrays(np.float16, np.float16), "diffusion_pytorch_model.safetensors.index.fp16.json")
    assert dtypes_of(open_tensors(tmp_path))["layer.0"] == np.float16
    write_shards(tmp_path, given)
    assert_same(read_tensors(tmp_path), given)


@pytest.mark.parametrize("length", [0, 4, 40, -1, -200])
def test_truncated(tmp_path, length):
    path = tmp_path / "model.safetensors"
    write_tensors(path, arrays(np.float32, np.float32) | {"big": np.ones(100, np.float32)})
    whole = path.read_bytes()
    path.write_bytes(whole[:length])
    with pytest.raises(UserError, match=f"^{re.escape(str(path))} is truncated or corrupt, or no safetens"):
        open_tensors(path)


def test_corrupt(tmp_path):
    path = tmp_path / "model.safetensors"
    write_tensors(path, arrays(np.float32))
    content = bytearray(path.read_bytes())
    content[8:12] = b"\xff\xff\xff\xff"
    path.write_bytes(content)
    with pytest.raises(UserError, match="model.safetensors is truncated or corrupt"):
        open_tensors(path)


def test_quantised_weights(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"a": np.ones(3, np.float32), "b": np.ones(3, np.int8)}, path)
    with pytest.raises(UserError, match=r"no floats of 16, 32 or 64 bits \(b is I8\): give the weights"):
        open_tensors(path)


def shards_without(tmp_path, change):
    places = write_shards(tmp_path, arrays(*[np.float32] * 4))
    change(tmp_path, places)
    with pytest.raises(UserError) as refused:
        open_tensors(tmp_path)
    return str(refused.value)


def rewrite(folder, text):
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(text)


def test_a_shard_that_is_missing(tmp_path):
    shard = "diffusion_pytorch_model-00002-of-00002.safetensors"
    said = shards_without(tmp_path, lambda folder, _: (folder / shard).unlink())
    assert said.startswith(f"the shard '{shard}' that {tmp_path}")
    assert said.endswith("is missing: fetch it again and put it beside the index.")


def test_an_array_that_its_shard_lacks(tmp_path):
    def change(folder, places):
        rewrite(folder, json.dumps({"weight_map": places | {"layer.9": places["layer.0"]}}))

    said = shards_without(tmp_path, change)
    assert "00001-of-00002.safetensors has no array 'layer.9', which diffusion_pytorch_model.safetensors.index" in said


def test_an_index_that_is_missing(tmp_path):
    said = shards_without(tmp_path, lambda folder, _: next(folder.glob("*.json")).unlink())
    assert said == f"{tmp_path} has shards such as {files(tmp_path)[0]} but not their index: fetch the index too."


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'])
def test_an_index_that_is_none(tmp_path, text):
    said = shards_without(tmp_path, lambda folder, _: rewrite(folder, text))
    assert said.endswith("is no index of shards (a JSON with a weight_map): fetch it again.")


def test_an_index_does_not_reach_out_of_its_folder(tmp_path):
    write_tensors(tmp_path / "outside.safetensors", {"layer.0": np.ones(2, np.float32)})
    folder = tmp_path / "model"

    def change(folder, _):
        rewrite(folder, '{"weight_map": {"layer.0": "../outside.safetensors"}}')

    assert "the shard '../outside.safetensors' that" in shards_without(folder, change)


def test_folders_without_one_choice(tmp_path):
    with pytest.raises(UserError, match="holds no weights: a .safetensors file, or shards with their index, belong"):
        open_tensors(tmp_path)
    for name in ("a", "b"):
        write_tensors(tmp_path / f"{name}.safetensors", arrays(np.float32))
    with pytest.raises(UserError, match=r"has several weights files \(a.safetensors, b.safetensors\): name the one"):
        open_tensors(tmp_path)
    with pytest.raises(UserError, match="c.safetensors is not there: give a .safetensors file, or a folder"):
        open_tensors(tmp_path / "c.safetensors")


# ------------------------------------------------------------------------------------------------------ writing


def test_arrays_that_are_views_are_written_as_they_read(tmp_path):
    """safetensors writes raw memory: a transposed view would come back scrambled."""
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    write_tensors(tmp_path / "x.safetensors", {"x": array.T})
    np.testing.assert_array_equal(load_file(tmp_path / "x.safetensors")["x"], array.T)


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("no space")

    monkeypatch.setattr("ard_jax.weights.tensors.save_file", fail)
    with pytest.raises(OSError):
        write_tensors(tmp_path / "x.safetensors", arrays(np.float32))
    assert files(tmp_path) == []


# ---------------------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize("lazy", [True, False])
def test_half_precision_becomes_float32_and_is_said_once(tmp_path, caplog, lazy):
    caplog.set_level(logging.INFO, logger="ard_jax")
    given = arrays(np.float16, BFLOAT16, np.float32)
    write_tensors(tmp_path / "x.safetensors", given)
    stored = open_tensors(tmp_path / "x.safetensors")
    found = to_float32(stored if lazy else given, "x")
    assert isinstance(found, Tensors) == lazy
    assert_same(found, {name: array.astype(np.float32) for name, array in given.items()})
    assert set(dtypes_of(found).values()) == {np.dtype(np.float32)}
    assert [r.getMessage() for r in caplog.records] == [
        "x holds bfloat16 and float16 weights, which become float32 here."
    ]


def test_full_precision_is_left_alone(caplog):
    caplog.set_level(logging.INFO, logger="ard_jax")
    given = arrays(np.float32)
    assert to_float32(given, "x") is given and not caplog.records


# ----------------------------------------------------------------------------------------------------- fetching


def test_paths(tmp_path):
    assert fetch_source(str(tmp_path)) == tmp_path
    with pytest.raises(UserError, match="/nowhere is not there: give a file, a folder or hf:ORG/NAME"):
        fetch_source(f"{tmp_path}/nowhere")
    for name in ("hf:", "hf:DiT", "hf:a/b/c", "hf:../x/y"):
        with pytest.raises(UserError, match=f"'{name}' names no repository: write hf:ORG/NAME"):
            fetch_source(name)


REPOSITORY = [
    ".gitattributes", "README.md", "LICENSE.txt", "model_index.json", "preview.png", "scheduler/scheduler_config.json",
    "transformer/config.json", "transformer/diffusion_pytorch_model.bin",
    "vae/config.json", "vae/diffusion_pytorch_model.bin", "vae/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model.fp16.safetensors",
]  # fmt: skip


def test_pickles_are_fetched_only_where_there_are_no_safetensors():
    left = {".gitattributes", "preview.png", "vae/diffusion_pytorch_model.bin",
            "vae/diffusion_pytorch_model.fp16.safetensors"}  # fmt: skip
    assert sorted(needed_files(REPOSITORY)) == sorted(set(REPOSITORY) - left)
    assert needed_files(["a.fp16.safetensors"]) == ["a.fp16.safetensors"]
    shards = [f"t/model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    assert needed_files([*shards, "t/model.safetensors.index.json"]) == ["t/model.safetensors.index.json", *shards]


def test_equal_files_have_equal_bytes(tmp_path):
    """safetensors itself writes the metadata in an order of chance."""
    words = {f"word {number}": "é" * number for number in range(8)}
    for number in range(4):
        write_tensors(tmp_path / f"{number}.safetensors", arrays(np.float32), words)
    assert len({(tmp_path / f"{number}.safetensors").read_bytes() for number in range(4)}) == 1
    tensors = open_tensors(tmp_path / "0.safetensors")
    assert tensors.metadata == words
    assert_same(dict(tensors), arrays(np.float32))


class Hub(types.ModuleType):
    """A stand-in for huggingface_hub, with or without a net and a cache."""

    def __init__(self, folder, net=True, cached=False):
        super().__init__("huggingface_hub")
        self.folder, self.net, self.cached, self.asked = folder, net, cached, []

    def model_info(self, repository, revision, timeout):
        if not self.net:
            raise ConnectionError("[Errno -2] Name or service not known")
        return types.SimpleNamespace(siblings=[types.SimpleNamespace(rfilename=file) for file in REPOSITORY])

    def snapshot_download(self, repository, revision, allow_patterns=None, local_files_only=False):
        self.asked.append((repository, revision, allow_patterns, local_files_only))
        if local_files_only and not self.cached:
            raise FileNotFoundError("no snapshot")
        return str(self.folder)


def test_a_repository(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub := Hub(tmp_path))
    assert fetch_source("hf:facebook/DiT-XL-2-256") == pathlib.Path(tmp_path)
    assert hub.asked == [("facebook/DiT-XL-2-256", None, needed_files(REPOSITORY), False)]


def test_no_net(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", Hub(tmp_path, net=False))
    with pytest.raises(UserError) as refused:
        fetch_source("hf:facebook/DiT-XL-2-256")
    assert str(refused.value) == (
        "hf:facebook/DiT-XL-2-256 cannot be downloaded ([Errno -2] Name or service not known): see that there is a net "
        "and that the name is right, or give a folder with a copy of it."
    )
    monkeypatch.setitem(sys.modules, "huggingface_hub", Hub(tmp_path, net=False, cached=True))
    assert fetch_source("hf:facebook/DiT-XL-2-256") == tmp_path
