"""`python -m ard_jax convert`: what it makes, that it is whole or absent, and that the later stages take it."""

import json
import re
import weakref

import jax
import numpy as np
import pytest
from convert_fixtures import (
    WEIGHTS,
    assert_equal_trees,
    assert_same,
    published_shapes,
    sparse,
    state_dict,
    teacher,
    tiny_vae,
    write_dit_pipeline,
    write_vae,
)
from networks import ard_student
from pipeline_fixtures import done, files, run, sentence

from ard_jax.convert import from_torch, vae_from_diffusers
from ard_jax.convert.write import save_parameters
from ard_jax.files import file_sha256, tree_sha256
from ard_jax.models import ARDStudent, DiT
from ard_jax.parallel import make_mesh
from ard_jax.training.checkpoints import load_parameters
from ard_jax.weights.lazy import Stored
from ard_jax.weights.tensors import read_tensors, write_tensors
from ard_jax.workdir import load_student, load_teacher, recorded_config

TEACHER = ("--num-heads", "2", "--objective", "noise")
STUDENT = ("--num-heads", "2", "--history-layers", "1")


@pytest.fixture
def workdir(tmp_path):
    return tmp_path / "runs" / "mine"


@pytest.fixture
def teacher_file(tmp_path):
    write_tensors(tmp_path / "teacher.safetensors", teacher())
    return tmp_path / "teacher.safetensors"


@pytest.fixture
def student_file(tmp_path):
    write_tensors(tmp_path / "student.safetensors", state_dict(channels=4, out=8, hidden=32, side=2))
    return tmp_path / "student.safetensors"


def convert_source(source, workdir, *flags):
    return run("convert", "--source", source, "--workdir", workdir, *flags)


def converted(source, workdir, *flags):
    outcome = convert_source(source, workdir, *flags)
    assert outcome.status == 0, outcome.err
    return outcome.out


def refused(source, workdir, *flags):
    return sentence(convert_source(source, workdir, *flags), "convert")


def loaded_teacher(workdir):
    config = recorded_config(workdir / "teacher")
    return load_teacher(config, workdir, make_mesh())[:3]


def sample(workdir, *overrides):
    flags = [f"--config.{override}" for override in ("sample.count=2", "sample.batch_size=2", *overrides)]
    outcome = run("sample", "--config", workdir / "config.py", "--workdir", workdir, *flags)
    assert outcome.status == 0, outcome.err
    return done(workdir / "sample")["models"]


# ----------------------------------------------------------------------------------------------------- what is made


def test_a_teacher(teacher_file, workdir):
    out = converted(teacher_file, workdir, *TEACHER, "--license", "cc-by-4.0")
    assert f"done: {workdir}/teacher: python -m ard_jax sample --config {workdir}/config.py --workdir {workdir}" in out
    model, params, sha256 = loaded_teacher(workdir)
    expected = from_torch(teacher(), num_heads=2)
    assert model.with_backbone(dtype=None) == expected[0]
    assert_equal_trees(params, expected[1])
    assert sha256 == done(workdir / "teacher")["sha256"]["ema"] == tree_sha256(expected[1])
    said = json.loads((workdir / "teacher" / "source.json").read_text())
    assert said == {"source": str(teacher_file), "sha256": file_sha256(teacher_file), "license": "cc-by-4.0"}
    assert sorted({name.split("/")[0] for name in files(workdir)}) == ["config.py", "teacher"]
    assert not (workdir / "teacher" / "labels.json").exists()


def test_the_later_stages_take_a_teacher(teacher_file, workdir):
    converted(teacher_file, workdir, *TEACHER)
    made = sample(workdir, "diffusion.steps=2", "trajectories.points=(1, 0)", "student.points=(1, 0)")
    assert made["teacher"]["ema_sha256"] == done(workdir / "teacher")["sha256"]["ema"]
    with np.load(workdir / "sample" / "teacher" / "samples.npz") as arrays:
        assert arrays["latents"].shape == (2, 4, 4, 4) and np.isfinite(arrays["latents"]).all()


def test_a_student_and_its_teacher(teacher_file, student_file, workdir):
    converted(student_file, workdir, *STUDENT, "--mask", "window", "--name", "mine")
    model, params, _, config = load_student(workdir / "distill" / "mine", make_mesh())
    expected, given = from_torch(read_tensors(student_file), num_heads=2, history_layers=1, mask="window")
    assert model.with_backbone(dtype=None) == expected and isinstance(model, ARDStudent)
    assert_equal_trees(params, given)
    assert config.student.points == (10, 0) or list(config.student.points) == [10, 0]
    assert list(done(workdir / "distill")["models"]) == ["mine"]
    assert sample(workdir)["mine"]["network_calls"] == 2  # with no teacher there
    converted(teacher_file, workdir, *TEACHER)
    assert "models=('mine',)" in (workdir / "config.py").read_text()
    converted(student_file, workdir, *STUDENT, "--name", "again")
    assert "models=('teacher', 'again')" in (workdir / "config.py").read_text()
    assert sorted(done(workdir / "distill")["models"]) == ["again", "mine"]


def test_sit_is_sampled_as_sit(teacher_file, workdir):
    converted(teacher_file, workdir, "--num-heads", "2", "--objective", "velocity")
    text = (workdir / "config.py").read_text()
    assert "process='flow'" in text and "reversed=True" in text and "time_scale=1.0" in text
    assert "teacher" in sample(workdir, "diffusion.steps=2", "trajectories.points=(1, 0)", "student.points=(1, 0)")


def test_a_dit_pipeline(tmp_path, workdir):
    folder = write_dit_pipeline(tmp_path / "pipeline", np.float16, id2label={"0": "tench", "1": "goldfish"})
    out = converted(folder, workdir)
    assert "a DiTPipeline of diffusers" in out
    model, params, _ = loaded_teacher(workdir)
    assert (model.backbone.frequency_shift, model.backbone.mlp_norm_eps, model.backbone.image_size) == (1.0, 1e-5, 4)
    half = {name: array.astype(np.float16).astype(np.float32) for name, array in teacher().items()}
    assert_equal_trees(params, from_torch(half | {"pos_embed": teacher()["pos_embed"]}, num_heads=2)[1])
    names = json.loads((workdir / "teacher" / "labels.json").read_text())
    assert names == ["tench", "goldfish", "class 2", "class 3", "class 4"]
    vae, vae_params = tiny_vae()
    here, found = vae_from_diffusers(
        read_tensors(workdir / "vae" / WEIGHTS), json.loads((workdir / "vae" / "config.json").read_text())
    )
    assert here == vae
    assert_equal_trees(found, jax.tree.map(lambda leaf: leaf.astype(np.float16).astype(np.float32), vae_params))


def test_a_vae_alone_joins_a_teacher(tmp_path, teacher_file, workdir):
    folder = write_vae(tmp_path / "sd-vae")
    out = converted(folder, workdir)
    assert out.endswith(f"done: {workdir}/vae\n") and not (workdir / "config.py").exists()
    converted(teacher_file, workdir, *TEACHER)
    assert_same(read_tensors(workdir / "vae"), read_tensors(folder))
    assert sorted({name.split("/")[0] for name in files(workdir)}) == ["config.py", "teacher", "vae"]


def test_config_py_is_the_config_of_the_weights(tmp_path, teacher_file, student_file):
    """Every setting that the source settles, however it differs from the defaults."""
    odd = {"num_train_timesteps": 500, "beta_start": 0.0002, "beta_end": 0.03, "timestep_spacing": "trailing"}
    sources = {
        "diffusers": (write_dit_pipeline(tmp_path / "pipeline", **odd), (), "teacher"),
        "sit": (teacher_file, ("--num-heads", "2", "--objective", "velocity"), "teacher"),
        "student": (student_file, (*STUDENT, "--mask", "window", "--points", "12,0"), "distill/ard"),
    }
    for name, (source, flags, place) in sources.items():
        converted(source, tmp_path / name, *flags)
        scope = {}
        exec((tmp_path / name / "config.py").read_text(), scope)
        written, recorded = scope["get_config"](), recorded_config(tmp_path / name / place)
        for section in ("data", "model", "diffusion", "trajectories", "student", "sample"):
            assert json.dumps(written[section].to_dict()) == json.dumps(recorded[section].to_dict()), (name, section)
        assert [path.name for path in (tmp_path / name).glob("vae")] == (["vae"] if name == "diffusers" else [])


def test_a_source_with_quotes_in_its_name(tmp_path, workdir):
    """config.py is code: a name must stay a name in it."""
    name = "'''\"\"\"\nimport os #.safetensors"
    write_tensors(tmp_path / name, teacher())
    converted(tmp_path / name, workdir, *TEACHER)
    scope = {}
    exec((workdir / "config.py").read_text(), scope)
    assert scope["SOURCE"] == str(tmp_path / name) and "os" not in scope


# ------------------------------------------------------------------------------------------------- whole or absent


def everything(folder):
    return {name: (folder / name).read_bytes() for name in files(folder)}


def test_the_same_source_again_does_nothing(tmp_path, student_file, workdir):
    pipeline = write_dit_pipeline(tmp_path / "pipeline")
    for source, name, flags in ((pipeline, "teacher", ()), (student_file, "distill/ard", STUDENT)):
        folder = workdir / source.stem
        converted(source, folder, *flags)
        before = everything(folder / name)
        assert f"{folder / name} holds this already." in converted(source, folder, *flags)
        assert everything(folder / name) == before


def test_another_source_is_refused(tmp_path, teacher_file, workdir):
    converted(teacher_file, workdir, *TEACHER)
    before = everything(workdir)
    other = tmp_path / "other.safetensors"
    write_tensors(other, {name: array + (name != "pos_embed") for name, array in teacher().items()})
    said = f"{workdir}/teacher was converted from another source ({teacher_file}): choose another --workdir, or move"
    assert said in refused(other, workdir, *TEACHER)
    said = refused(teacher_file, workdir, *TEACHER, "--frequency-shift", "1")
    assert "belongs to another config (model.frequency_shift 0.0 there, 1.0 here)" in said
    assert everything(workdir) == before


def test_a_trained_teacher_is_not_replaced(teacher_file, workdir):
    (workdir / "teacher").mkdir(parents=True)
    assert f"{workdir}/teacher was not made by convert: choose another" in refused(teacher_file, workdir, *TEACHER)


def test_a_student_of_another_teacher_is_refused(tmp_path, teacher_file, workdir):
    converted(teacher_file, workdir, *TEACHER)
    before = everything(workdir)
    write_tensors(tmp_path / "wide.safetensors", state_dict(width=16, channels=4, out=8, hidden=64, side=2))
    assert "model.hidden_size 8 there, 16 here" in refused(tmp_path / "wide.safetensors", workdir, *STUDENT)
    assert everything(workdir) == before


def test_somebody_elses_config_is_not_replaced(teacher_file, workdir):
    workdir.mkdir(parents=True)
    (workdir / "config.py").write_text("mine")
    assert "config.py is not as convert wrote it, and this model's would" in refused(teacher_file, workdir, *TEACHER)
    assert files(workdir) == ["config.py"]


EDITS = {
    "a setting": lambda text: text.replace("    return config\n", "    config.seed = 3\n    return config\n"),
    "a line at the end": lambda text: text + "MINE = 1\n",
    "no hash": lambda text: "".join(line for line in text.splitlines(keepends=True) if not line.startswith("#")) + "#",
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_a_config_that_somebody_changed_is_never_replaced(tmp_path, teacher_file, student_file, workdir, edit):
    file, steps = workdir / "config.py", ((teacher_file, TEACHER), (student_file, STUDENT))
    for source, flags in steps:
        converted(source, workdir, *flags)
    edited = edit(file.read_text())
    assert edited != file.read_text()
    file.write_text(edited)
    for source, flags in steps:  # as a script does that is run again
        assert "holds this already." in converted(source, workdir, *flags)
        assert file.read_text() == edited
    converted(write_vae(tmp_path / "sd-vae"), workdir)
    before = everything(workdir)
    said = refused(student_file, workdir, *STUDENT, "--name", "again")
    assert f"{file} is not as convert wrote it, and this model's would replace it: move it away, run the same" in said
    assert everything(workdir) == before and file.read_text() == edited
    file.rename(workdir / "mine.py")
    converted(student_file, workdir, *STUDENT, "--name", "again")
    assert "models=('teacher', 'again')" in file.read_text()


def test_a_config_of_an_older_version(teacher_file, student_file, workdir):
    """It does not tell whether it was changed: another model's replaces it, the same model again does not."""
    converted(teacher_file, workdir, *TEACHER)
    old = '"""Written by `python -m ard_jax convert` from the source below, for the later stages"""\n'
    (workdir / "config.py").write_text(old)
    converted(teacher_file, workdir, *TEACHER)
    assert (workdir / "config.py").read_text() == old
    converted(student_file, workdir, *STUDENT)
    assert "models=('teacher', 'ard')" in (workdir / "config.py").read_text()


def test_a_run_that_was_killed_before_its_config(teacher_file, student_file, workdir):
    """What it left is the teacher's, and as it was written."""
    converted(teacher_file, workdir, *TEACHER)
    left = (workdir / "config.py").read_bytes()
    converted(student_file, workdir, *STUDENT)
    expected = (workdir / "config.py").read_bytes()
    (workdir / "config.py").write_bytes(left)
    converted(student_file, workdir, *STUDENT)
    assert left != expected == (workdir / "config.py").read_bytes()


@pytest.mark.parametrize(
    "moment",
    [
        "stages.convert.save_parameters",
        "stages.convert.write_tensors",
        "convert.write.hash_leaf",
        "stages.convert.write_text",
    ],
)
def test_a_failure_leaves_nothing_half_written(tmp_path, workdir, monkeypatch, moment):
    """Whatever fails, the run can be started again, and ends as if nothing had happened."""
    source = write_dit_pipeline(tmp_path / "pipeline")

    def fail(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(f"ard_jax.{moment}", fail)
        assert "is full: free some space and run the same command again" in refused(source, workdir)
    if moment == "stages.convert.write_text":
        assert done(workdir / "teacher")
    else:
        assert not workdir.parent.exists()
    converted(source, workdir)
    assert sorted({name.split("/")[0] for name in files(workdir)}) == ["config.py", "teacher", "vae"]


def test_memory_holds_the_array_that_is_written_and_the_next(tmp_path):
    """Of twelve; a thread may yet have to let go of the one before them."""
    arrays = {
        name: {"kernel": np.random.default_rng(place).random((3, 4))} for place, name in enumerate("lfbkdaicjehg")
    }
    alive, most = [], []

    def stored(array):
        def read():
            copy = array.copy()
            alive.append(weakref.ref(copy))
            most.append(sum(reference() is not None for reference in alive))
            return copy

        return Stored(array.shape, array.dtype, read)

    sha256 = save_parameters(tmp_path / "checkpoints", jax.tree.map(stored, arrays), lambda name, array: None)
    assert len(most) == 12
    assert max(most) <= 3
    assert sha256 == tree_sha256(arrays)
    like = jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), arrays)
    with jax.enable_x64(True):
        assert_equal_trees(load_parameters(tmp_path / "checkpoints", "ema", like), arrays)


def test_what_a_killed_run_left_is_cleared(teacher_file, workdir):
    (workdir / ".partial-convert" / "model").mkdir(parents=True)
    (workdir / ".partial-convert" / "model" / "done.json").write_text("{}")
    converted(teacher_file, workdir, *TEACHER)
    assert sorted({name.split("/")[0] for name in files(workdir)}) == ["config.py", "teacher"]


@pytest.mark.parametrize("part", ["vae", "transformer"])
def test_a_part_that_does_not_fit_is_refused_before_anything_is_written(tmp_path, workdir, part):
    folder = write_dit_pipeline(tmp_path / "pipeline") / part
    arrays = read_tensors(folder)
    name = sorted(arrays)[3]
    del arrays[name]
    write_tensors(folder / WEIGHTS, arrays)
    assert f"(missing: {name})" in refused(folder.parent, workdir)
    assert not workdir.parent.exists()


def test_embedders_that_differ(tmp_path, workdir):
    folder = write_dit_pipeline(tmp_path / "pipeline") / "transformer"
    arrays = read_tensors(folder)
    name = "transformer_blocks.1.norm1.emb.timestep_embedder.linear_1.bias"
    write_tensors(folder / WEIGHTS, arrays | {name: arrays[name] + 1})
    assert "differ: only DiTs whose blocks share their time and label embedders" in refused(folder.parent, workdir)
    assert not workdir.parent.exists()


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (("--num-heads", "0"), "argument --num-heads: '0' is no whole number from 1"),
        (("--points", "3,x"), "argument --points: '3,x' is no list of whole numbers such as 15,10,5,0"),
        (("--mask", "dense"), "argument --mask: invalid choice: 'dense'"),
        (("--num-head", "2"), "there is no flag --num-head: did you mean --num-heads"),
        (("--num-heads", "3", "--history-layers", "1"), "hidden_size 8 with 3 heads does not work"),
        (("--points", "0,3", *STUDENT), "student.points is (0, 3): give strictly falling indices"),
        (("--name", "teacher", *STUDENT), "student.name is 'teacher', which cannot name a student's folder"),
        (("--name", "../up", *STUDENT), "student.name is '../up', which cannot name a student's folder"),
    ],
)
def test_flags_that_cannot_be(student_file, workdir, flags, sentence):
    assert sentence in refused(student_file, workdir, *flags)
    assert not workdir.parent.exists()


def test_sources_that_are_not_there(tmp_path, workdir):
    assert "/nowhere.pt is not there: give a file, a folder or hf:ORG/NAME" in refused(tmp_path / "nowhere.pt", workdir)
    (tmp_path / "empty").mkdir()
    assert "empty is no pipeline, since it has no model_index.json" in refused(tmp_path / "empty", workdir)
    assert not workdir.parent.exists()


@pytest.mark.oracle
def test_a_hostile_pickle(tmp_path, workdir):
    import os

    import torch

    class Hostile:
        def __reduce__(self):
            return os.system, (f"touch '{tmp_path}/it ran'",)

    torch.save({"ema": {"x": Hostile()}}, tmp_path / "x.pt")
    said = refused(tmp_path / "x.pt", workdir)
    assert "(posix.system), so it was refused and nothing in it was run" in said
    assert not (tmp_path / "it ran").exists() and not workdir.parent.exists()


# ------------------------------------------------------------------------------------------------------- dry runs


def dry_run(source, workdir, *flags):
    out = converted(source, workdir, "--dry-run", *flags)
    assert not workdir.parent.exists()
    return out


def test_a_dry_run_writes_nothing(tmp_path, teacher_file, workdir):
    out = dry_run(teacher_file, workdir, *TEACHER)
    count = sum(array.size for array in teacher().values())
    assert out.splitlines() == [
        f"{teacher_file}: DiT teacher, a state dict with the published names",
        "  images      4×4×4 (latent), 5 classes",
        "  model       width 8, depth 2, 2 heads, patch 2, predicts noise",
        f"  parameters  {count:,} with the position table of 4 tokens",
        "  licence     unknown: --license says it",
        f"  goes to     {workdir}/teacher",
    ]
    out = dry_run(write_dit_pipeline(tmp_path / "pipeline"), workdir)
    assert f"  goes to     {workdir}/vae, {workdir}/teacher" in out and f"  parameters  {count:,} with" in out


XL = DiT(image_size=32)
SIZES = [
    ("DiT-XL-2-256x256", XL, "675,129,632 with the position table of 256 tokens"),
    ("DiT-XL-2-512x512", XL.clone(image_size=64), "676,014,368 with the position table of 1024 tokens"),
    ("ARD-XL-2", ard_student(image_size=32, steps=4), "683,209,856 with the position table of 256 tokens"),
]


@pytest.mark.parametrize("name, model, parameters", SIZES)
def test_a_dry_run_at_full_size(tmp_path, workdir, name, model, parameters):
    """From shapes alone: the files are 2.7 GB long and take no room."""
    out = dry_run(sparse(tmp_path / f"{name}.safetensors", model), workdir)
    assert f"  parameters  {parameters}\n" in out and "width 1152, depth 28, 16 heads, patch 2, predicts noise" in out
    student = "  student     4 steps (points 15, 10, 5, 0), 6 history layers, causal mask, separate heads"
    assert (student in out) == (name == "ARD-XL-2") and ("CC-BY-NC-4.0" in out) == name.startswith("DiT")


@pytest.mark.oracle
@pytest.mark.parametrize("name, model, parameters", SIZES)
def test_a_dry_run_of_pytorch_files_at_full_size(tmp_path, workdir, name, model, parameters):
    """torch keeps the room of the arrays in the file without writing them, and maps it without reading it."""
    import torch

    arrays = {name: torch.empty(shape) for name, shape in published_shapes(model).items()}
    with torch.serialization.skip_data():
        torch.save({"model": arrays, "ema": arrays, "opt": {}}, tmp_path / f"{name}.pt")
    assert (tmp_path / f"{name}.pt").stat().st_blocks < 2**15  # of 512 bytes
    assert re.search(f"parameters +{parameters}", dry_run(tmp_path / f"{name}.pt", workdir))
