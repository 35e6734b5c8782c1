"""The trajectory store and the job that makes it: what a record is, whole or absent, the same whoever makes it."""

import functools
import json
import os
import pathlib
import resource
import shutil
import signal
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds
import tqdm
from array_record.python import array_record_data_source
from networks import draw_noise_and_labels
from pipeline_fixtures import ROOT, copy, done, files, sentence, smoke

from ard_jax.build import make_solve
from ard_jax.conditions import Labels
from ard_jax.data.memory import Readers
from ard_jax.errors import UserError
from ard_jax.files import file_sha256, read_json, write_json
from ard_jax.parallel import make_mesh
from ard_jax.sampling import sample_teacher, trajectory_key
from ard_jax.trajectories import generate, store
from ard_jax.trajectories.generate import make_store
from ard_jax.workdir import Loaded, load_teacher
from configs import smoke as smoke_config


def records(count=5, points=3, dtype="float16", keep_noisy=True, shape=(4, 4, 2)):
    rng = np.random.default_rng(0)

    def tensor(*size):
        return rng.normal(size=size).astype(store.DTYPES[dtype])

    made = []
    for index in range(count):
        record = {"noise": tensor(*shape), "x0": tensor(points, *shape), "label": index % 3, "index": 10 * index}
        made.append(record | ({"xt": tensor(points, *shape)} if keep_noisy else {}))
    return made


def write(directory, some, dtype="float16", shard=0, shards=1, keep_noisy=True):
    features = store.record_features((4, 4, 2), 3, dtype, keep_noisy)
    store.write_shard(directory, shard, shards, features, iter(some), [])
    return features


def bits(record):
    """A record as bytes, which compare NaN and -0 too."""
    return {name: (np.asarray(value).dtype.str, np.asarray(value).tobytes()) for name, value in record.items()}


def read(directory):
    """The records of a store by their index, through TFDS alone."""
    source = tfds.builder_from_directory(directory / "1.0.0").as_data_source("train")
    return {int(record["index"]): record for record in source}


def shard_hashes(directory):
    return [file_sha256(path) for path in sorted((directory / "1.0.0").glob("*array_record*"))]


# ------------------------------------------------------------------------------------------------- one shard


@pytest.mark.parametrize("keep_noisy", [True, False])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_a_record_comes_back_bit_for_bit(tmp_path, dtype, keep_noisy):
    some = records(dtype=dtype, keep_noisy=keep_noisy)
    some[0]["noise"].flat[:4] = [0.0, -0.0, np.finfo("float16").max, 6e-8]  # 6e-8 is subnormal in float16
    features = write(tmp_path, some, dtype, keep_noisy=keep_noisy)
    store.finish(tmp_path, features, store.describe(tmp_path, 1), {"shards": store.describe(tmp_path, 1)})
    source = store.Store(tmp_path, store.read_manifest(tmp_path))
    assert len(source) == 5
    for row, record in enumerate(some):
        back = source[row]
        assert set(back) == set(record)
        assert back["noise"].dtype == back["x0"].dtype == store.DTYPES[dtype]
        assert bits({k: back[k] for k in back if k not in ("label", "index")}) == bits(
            {k: record[k] for k in record if k not in ("label", "index")}
        )
        assert (back["label"], back["index"]) == (record["label"], record["index"])


def test_anybody_can_open_it(tmp_path, pipeline):
    """With TFDS alone: nothing of ours, and no TensorFlow, in a process that could not even find ard_jax."""
    features = write(tmp_path, records(dtype="bfloat16"), "bfloat16")
    store.finish(tmp_path, features, store.describe(tmp_path, 1), {})
    code = """if True:
        import json, sys
        import numpy as np
        import ml_dtypes  # tells NumPy what bfloat16 is; TFDS would import TensorFlow to learn it
        import tensorflow_datasets as tfds
        for folder in sys.argv[1:]:
            source = tfds.builder_from_directory(folder).as_data_source("train")
            record = {name: np.asarray(value) for name, value in source[1].items()}
            kinds = {name: [str(value.dtype), list(value.shape)] for name, value in record.items()}
            print(json.dumps([len(source), kinds, float(record["x0"].astype("float32").sum())]))
        assert "tensorflow" not in sys.modules and "ard_jax" not in sys.modules
    """
    folders = [tmp_path / "1.0.0", pipeline / "trajectories" / "1.0.0"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", code, *folders]
    opened = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert opened.returncode == 0, opened.stderr
    ours, job = map(json.loads, opened.stdout.splitlines())
    assert ours[:2] == [5, dict(noise=["bfloat16", [4, 4, 2]], x0=["bfloat16", [3, 4, 4, 2]],
                                xt=["bfloat16", [3, 4, 4, 2]], label=["int64", []], index=["int64", []])]  # fmt: skip
    assert ours[2] == records(dtype="bfloat16")[1]["x0"].astype("float32").sum()
    assert job[:2] == [24, dict(noise=["float16", [8, 8, 1]], x0=["float16", [4, 8, 8, 1]],
                                xt=["float16", [4, 8, 8, 1]], label=["int64", []], index=["int64", []])]  # fmt: skip


def test_shards_are_opened_side_by_side(tmp_path, monkeypatch):
    """On a bucket each takes a while; TFDS's own source would open one after another."""
    some = records(count=7)
    for shard, part in enumerate((some[:4], some[4:])):
        features = write(tmp_path, part, shard=shard, shards=2)
    store.finish(tmp_path, features, store.describe(tmp_path, 2), {"shards": store.describe(tmp_path, 2)})
    source = store.Store(tmp_path, store.read_manifest(tmp_path))
    both, opened = threading.Barrier(2), array_record_data_source.array_record_module.ArrayRecordReader

    def open_slowly(*arguments, **options):
        both.wait(30)  # until the other is being opened as well
        return opened(*arguments, **options)

    monkeypatch.setattr(array_record_data_source.array_record_module, "ArrayRecordReader", open_slowly)
    read_back = Readers(2).read(source, np.arange(7))
    assert [int(record["index"]) for record in read_back] == [10 * index for index in range(7)]
    with pytest.raises(IndexError):
        source[7]


def test_the_same_records_give_the_same_file(tmp_path):
    for name in ("a", "b"):
        write(tmp_path / name, records(count=40))
    assert shard_hashes(tmp_path / "a") == shard_hashes(tmp_path / "b")
    assert read_json(tmp_path / "a" / "shards" / "00000.json")["sha256"] == shard_hashes(tmp_path / "a")[0]


def test_a_shard_killed_in_the_middle_is_not_there(tmp_path):
    code = """if True:
        import os, pathlib, signal, sys
        import test_trajectories
        def some():
            yield from test_trajectories.records(count=3)
            os.kill(os.getpid(), signal.SIGKILL)
        test_trajectories.write(pathlib.Path(sys.argv[1]), some())
    """
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    killed = subprocess.run([sys.executable, "-c", code, tmp_path], env=environment, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    (leftover,) = files(tmp_path)  # the temporary file, and no description either
    assert pathlib.Path(leftover).name.startswith(".partial-")
    assert store.whole_shards(tmp_path, 1, [0]) == set()
    write(tmp_path, records())
    assert files(tmp_path) == ["1.0.0/trajectories-train.array_record-00000-of-00001", "shards/00000.json"]
    assert store.whole_shards(tmp_path, 1, [0]) == {0}


def test_what_a_killed_run_left_of_a_shard_goes_though_the_store_has_grown(tmp_path):
    """The names of the same shard of two stores end in their numbers of shards; others may be being written."""
    (tmp_path / "1.0.0").mkdir()
    own, other = (f"1.0.0/.partial-0123.array_record-{shard}-of-00001" for shard in ("00000", "00001"))
    (tmp_path / own).touch(), (tmp_path / other).touch()
    write(tmp_path, records(), shards=2)
    assert files(tmp_path) == [other, "1.0.0/trajectories-train.array_record-00000-of-00002", "shards/00000.json"]


def test_a_shard_that_fails_in_the_middle_is_not_there(tmp_path):
    def some():
        yield from records(count=2)
        raise RuntimeError("the teacher fell over")

    with pytest.raises(RuntimeError, match="fell over"):
        write(tmp_path, some())
    assert files(tmp_path) == []


# --------------------------------------------------------------------------------------------------- the job


@pytest.fixture(scope="module")
def teacher(pipeline):
    """The pipeline's teacher and its parameters."""
    return load_teacher(smoke_config.get_config(), pipeline, make_mesh())[:2]


@pytest.fixture(scope="module")
def job(teacher):
    """job(directory, processes=1, **trajectories): runs the job and reads the store back, by index."""

    def make(directory, processes=1, **settings):
        config = smoke_config.get_config()
        config.trajectories.update(settings)
        for process in range(processes):
            make_store(
                *teacher,
                Labels(config.data.num_classes),
                config,
                directory,
                make_mesh(),
                process_index=process,
                process_count=processes,
            )
        shards = store.describe(directory, -(-config.trajectories.count // config.trajectories.shard_size))
        store.finish(directory, store.record_features((8, 8, 1), 4, "float16", True), shards, {"shards": shards})
        return read(directory)

    return make


@pytest.fixture(scope="module")
def reference(pipeline):
    return read(pipeline / "trajectories")


def test_a_record_is_the_teachers_trajectory(teacher, reference):
    """Number i has noise and label number i of the seed, and the points of the teacher's solve from there."""
    config = smoke_config.get_config()
    (model, params), rows = teacher, [reference[index] for index in range(4)]
    noise, label = draw_noise_and_labels(trajectory_key(0), np.arange(4), (8, 8, 1), 10)
    solution = jax.jit(functools.partial(sample_teacher, model, how=make_solve(config)))(params, noise, condition=label)
    walked = [1, 2, 3, 4]  # five steps are 4 … 0 respaced; the points are 3, 2, 1, 0
    for name in ("x0", "xt"):
        expected = np.asarray(getattr(solution, name))[:, walked]
        np.testing.assert_allclose(np.stack([r[name] for r in rows]), expected, rtol=2e-3, atol=2e-3)
    np.testing.assert_array_equal(np.stack([r["noise"] for r in rows]), np.asarray(noise, np.float16))
    np.testing.assert_array_equal([r["label"] for r in rows], label)
    noise = np.stack([record["noise"] for record in reference.values()]).astype(float)
    assert abs(noise.mean()) < 0.1 and 0.95 < noise.std() < 1.05 and len(np.unique(noise[:, 0, 0])) > 20


@pytest.mark.parametrize("layout", [dict(shard_size=5), dict(processes=2), dict(count=10), dict(shard_size=24)])
def test_a_record_is_the_same_in_every_layout(job, reference, tmp_path, layout):
    made = job(tmp_path, **layout)
    assert sorted(made) == list(range(layout.get("count", 24)))
    assert all(bits(made[index]) == bits(reference[index]) for index in made)


def test_processes_share_the_shards_out(teacher, tmp_path):
    for process, shards in ((1, {1}), (0, {0, 1, 2})):
        make_store(
            *teacher,
            Labels(10),
            smoke_config.get_config(),
            tmp_path,
            make_mesh(),
            process_index=process,
            process_count=2,
        )
        assert store.whole_shards(tmp_path, 3, range(3)) == shards


def test_a_record_hardly_depends_on_the_batch_size(job, reference, tmp_path):
    """Not at all in noise and label, to rounding in the solve."""
    made = job(tmp_path, batch_size=3)
    for index, record in reference.items():
        same = ("noise", "label", "index")
        assert bits({k: made[index][k] for k in same}) == bits({k: record[k] for k in same})
        np.testing.assert_allclose(made[index]["x0"], record["x0"], rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("optimised", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_store_is_the_same_on_any_number_of_devices(pipeline, tmp_path, optimised):
    """One, two and four devices, in another process: the very bytes of the shards."""
    code = """if True:
        import pathlib, sys
        import jax
        from ard_jax.parallel import make_mesh
        from ard_jax.conditions import Labels
        from ard_jax.workdir import load_teacher
        from ard_jax.trajectories.generate import make_store
        from configs import smoke
        workdir, target = map(pathlib.Path, sys.argv[1:])
        for count in (1, 2, 4):
            mesh = make_mesh(devices=jax.devices()[:count])
            assert mesh.size == count
            model, params, *_ = load_teacher(smoke.get_config(), workdir, mesh)
            config = smoke.get_config()
            make_store(model, params, Labels(config.data.num_classes), config, target / str(count), mesh)
    """
    flags = "--xla_force_host_platform_device_count=4 " + ("" if optimised else os.environ["XLA_FLAGS"])
    environment = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code, pipeline, tmp_path], env=environment, check=True, capture_output=True)
    one, two, four = (shard_hashes(tmp_path / count) for count in ("1", "2", "4"))
    assert len(one) == 3 and one == two == four
    if not optimised:
        assert one == shard_hashes(pipeline / "trajectories")


def test_trajectories_out_of_bounds_are_counted_and_the_others_keep_their_numbers(job, reference, tmp_path, pipeline):
    largest = {index: np.abs(record["x0"]).max() for index, record in reference.items()}
    limit = float(np.median(list(largest.values())))
    expected = sorted(index for index in largest if largest[index] > limit)
    assert 0 < len(expected) < 24
    made = job(tmp_path / "a", max_abs=limit)
    assert sorted(made) == sorted(set(range(24)) - set(expected))
    assert all(bits(made[index]) == bits(reference[index]) for index in made)
    described = store.describe(tmp_path / "a", 3)
    assert sorted(index for shard in described for index in shard["dropped"]) == expected
    assert sum(shard["records"] for shard in described) == 24 - len(expected)
    # shards that are left without a record do no harm, at the ends or between
    assert sorted(job(tmp_path / "b", max_abs=limit, shard_size=1)) == sorted(made)
    # and the stage says so, in its manifest and in done.json
    workdir = copy(pipeline, tmp_path / "c", "teacher")
    assert smoke("trajectories", workdir, f"trajectories.max_abs={limit!r}").status == 0
    manifest = read_json(workdir / "trajectories" / "manifest.json")
    assert (manifest["tried"], manifest["kept"], manifest["dropped"]) == (24, 24 - len(expected), len(expected))
    assert [done(workdir / "trajectories")[key] for key in ("kept", "dropped")] == [manifest["kept"], len(expected)]


def test_one_trajectory_that_is_nan_is_dropped_though_it_is_solved_alone():
    def solved(broken):
        for number in range(12):
            x0 = np.full((1, 2, 2, 2, 1), np.nan if number in broken else 0.0)
            yield {"x0": x0, "index": np.array([number])}, np.array([number not in broken])

    dropped = []
    kept = list(generate.drop_out_of_bounds(solved({0, 5}), dropped, tqdm.tqdm(disable=True)))
    assert dropped == [0, 5] and [int(record["index"]) for record in kept] == [1, 2, 3, 4, *range(6, 12)]
    with pytest.raises(UserError, match="trajectories are NaN: it has diverged"):
        list(generate.drop_out_of_bounds(solved(range(4, 12)), [], tqdm.tqdm(disable=True)))


def test_a_teacher_that_gives_nothing_finite_gives_no_store(pipeline, tmp_path, teacher, monkeypatch):
    workdir, (model, params) = copy(pipeline, tmp_path, "teacher"), teacher
    broken = jax.tree.map(lambda leaf: leaf * np.nan, params)
    monkeypatch.setattr("ard_jax.stages.trajectories.load_teacher", lambda *_: Loaded(model, broken, "sha", None))
    outcome = smoke("trajectories", workdir)
    assert outcome.status == 2 and "Traceback" not in outcome.err
    said = outcome.err.strip().splitlines()[-1]
    assert "the teacher's trajectories are NaN: it has diverged" in said
    assert files(workdir / "trajectories") == ["config.json"]


def test_a_teacher_whose_trajectories_all_leave_the_bounds_gives_no_store(pipeline, tmp_path):
    workdir = copy(pipeline, tmp_path, "teacher")
    outcome = smoke("trajectories", workdir, "trajectories.max_abs=1e-6")
    said = outcome.err.strip().splitlines()[-1]
    assert outcome.status == 2 and "all 24 trajectories leave" in said and "train the teacher longer" in said
    described = store.describe(workdir / "trajectories", 3)
    assert [index for shard in described for index in shard["dropped"]] == list(range(24))
    assert sum(shard["records"] for shard in described) == 0
    assert not (workdir / "trajectories" / "manifest.json").exists()
    assert not (workdir / "trajectories" / "done.json").exists()


def test_the_manifest_says_how_the_store_was_made(pipeline):
    manifest = read_json(pipeline / "trajectories" / "manifest.json")
    assert manifest["teacher_sha256"] == done(pipeline / "teacher")["sha256"]["ema"]
    assert manifest["seed"] == 0 and manifest["points"] == [3, 2, 1, 0] and manifest["dtype"] == "float16"
    assert manifest["settings"]["diffusion.solver"] == "ddim" and manifest["settings"]["diffusion.steps"] == 5
    assert manifest["settings"]["diffusion.guidance_scale"] == 1.5
    assert [shard["sha256"] for shard in manifest["shards"]] == shard_hashes(pipeline / "trajectories")
    assert [shard["records"] for shard in manifest["shards"]] == [8, 8, 8]


# ------------------------------------------------------------------------------------------- damage and repair


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def flip_bit(path):
    content = bytearray(path.read_bytes())
    content[3000] ^= 1
    path.write_bytes(content)


@pytest.fixture
def second(pipeline, tmp_path):
    """A copy of the teacher and the store, and its second shard."""
    workdir = copy(pipeline, tmp_path, "teacher", "trajectories")
    return workdir, workdir / "trajectories" / "1.0.0" / "trajectories-train.array_record-00001-of-00003"


@pytest.mark.parametrize(
    ("damage", "problem"),
    [(pathlib.Path.unlink, "is missing"), (truncate, "bytes instead of"), (flip_bit, "checksum")],
)
def test_the_trainer_names_a_broken_shard_and_the_job_remakes_it_alone(second, damage, problem):
    workdir, shard = second
    folder = workdir / "trajectories"
    before = {path: (path.stat().st_mtime_ns, file_sha256(path)) for path in shard.parent.glob("*array_record*")}
    damage(shard)
    said = sentence(smoke("distill", workdir), "distill")
    assert str(shard) in said and problem in said
    assert "run the stage 'trajectories' again" in said
    assert not (workdir / "distill").exists()
    assert smoke("trajectories", workdir).status == 0
    after = {path: (path.stat().st_mtime_ns, file_sha256(path)) for path in shard.parent.glob("*array_record*")}
    assert {path for path in before if before[path][0] != after[path][0]} == {shard}
    assert {path: value[1] for path, value in before.items()} == {path: value[1] for path, value in after.items()}
    store.check_shards(folder, store.read_manifest(folder), checksums=True)
    assert not [name for name in files(folder) if ".partial" in name]


def test_a_job_started_again_makes_nothing_twice(second):
    workdir, shard = second
    before = {path: path.stat().st_mtime_ns for path in shard.parent.glob("*array_record*")}
    assert smoke("trajectories", workdir).status == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_job_that_was_interrupted_makes_what_is_missing(pipeline, tmp_path, monkeypatch):
    workdir = copy(pipeline, tmp_path, "teacher")
    keep = generate.drop_out_of_bounds

    def interrupted(batches, dropped, bar):
        for record in keep(batches, dropped, bar):
            if record["index"] == 12:  # in the middle of the second shard
                raise KeyboardInterrupt
            yield record

    monkeypatch.setattr(generate, "drop_out_of_bounds", interrupted)
    assert smoke("trajectories", workdir).status == 130
    (first,) = (workdir / "trajectories" / "1.0.0").iterdir()
    before = first.stat().st_mtime_ns
    assert not (workdir / "trajectories" / "manifest.json").exists()
    monkeypatch.setattr(generate, "drop_out_of_bounds", keep)
    assert smoke("trajectories", workdir).status == 0
    assert first.stat().st_mtime_ns == before
    assert shard_hashes(workdir / "trajectories") == shard_hashes(pipeline / "trajectories")


def test_a_bit_flipped_in_a_store_too_large_to_be_hashed_is_met_while_reading(second):
    workdir, shard = second
    flip_bit(shard)
    source = store.Store(workdir / "trajectories", store.read_manifest(workdir / "trajectories"))
    for index in range(24):
        try:
            source[index]
        except UserError as error:
            assert str(shard) in str(error) and "run the stage 'trajectories' again" in str(error)
            assert 8 <= index < 16  # the second shard's records
            break
    else:
        pytest.fail("the flipped bit was read as if nothing were wrong")


def test_a_store_remade_after_damage_lets_a_finished_student_go_on(pipeline, tmp_path):
    """The shards' hashes are part of what a student belongs to: a remade shard must not orphan it."""
    workdir = copy(pipeline, tmp_path, "teacher", "trajectories", "distill")
    next((workdir / "trajectories" / "1.0.0").glob("*00002-of-00003")).unlink()
    assert smoke("trajectories", workdir).status == 0
    assert smoke("distill", workdir).status == 0
    assert done(workdir / "distill")["sha256"] == done(pipeline / "distill")["sha256"]


@pytest.mark.parametrize("way", ["limit", "disk"])
def test_a_full_disk_ends_in_one_sentence(pipeline, tmp_path, way):
    """Nothing half-written lies under a final name, and what is there is whole."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if way == "disk":
        mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", folder], capture_output=True)
        if mount.returncode:
            pytest.skip("only root can mount a small disk")
    try:
        workdir = copy(pipeline, folder / "run", "teacher")
        if way == "disk":  # what is left holds one shard of 128 kB, of three
            (folder / "ballast").write_bytes(bytes(shutil.disk_usage(folder).free - 200_000))
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        if way == "limit":
            resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, before[1]))
        try:
            outcome = smoke("trajectories", workdir)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert outcome.status == 2 and "Traceback" not in outcome.err
        said = outcome.err.strip().splitlines()[-1]
        assert said.startswith("ard_jax trajectories: the disk of ") and "free some space" in said
        made = workdir / "trajectories"
        assert not [name for name in files(made) if ".partial" in name]
        described = [int(path.stem) for path in (made / "shards").glob("*.json")]
        there = [path.name for path in (made / "1.0.0").glob("*array_record*")]
        assert len(there) < 3 and len(there) <= len(described)
        assert store.whole_shards(made, 3, range(3)) == {int(name.split("-")[-3]) for name in there}
        assert not (made / "manifest.json").exists() and not (made / "done.json").exists()
        if way == "disk":
            (folder / "ballast").unlink()
        assert smoke("trajectories", workdir).status == 0
        assert shard_hashes(made) == shard_hashes(pipeline / "trajectories")
    finally:
        if way == "disk":
            subprocess.run(["umount", "-l", folder], check=True)


# -------------------------------------------------------------------------------------- stores that do not fit


def edit_manifest(workdir, **changes):
    path = workdir / "trajectories" / "manifest.json"
    write_json(path, read_json(path) | changes)


def test_a_store_of_another_teacher_is_refused(second):
    workdir, _ = second
    edit_manifest(workdir, teacher_sha256="0123456789abcdef")
    said = sentence(smoke("distill", workdir), "distill")
    assert "made by another teacher" in said and "0123456789ab" in said
    assert done(workdir / "teacher")["sha256"]["ema"][:12] in said
    assert not (workdir / "distill").exists()


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("diffusion.solver=heun", "diffusion.solver 'ddim' there, 'heun' here"),
        ("diffusion.guidance_scale=2.0", "diffusion.guidance_scale 1.5 there, 2.0 here"),
        ("diffusion.steps=6", "diffusion.steps 5 there, 6 here"),
    ],
)
def test_a_store_of_another_solve_is_refused(second, override, named):
    workdir, _ = second
    said = sentence(smoke("distill", workdir, override), "distill")
    assert "the trajectory store does not fit this config" in said and named in said
    assert not (workdir / "distill").exists()


def test_points_that_the_store_lacks_are_refused(second):
    workdir, _ = second
    said = sentence(smoke("distill", workdir, "trajectories.points=(4,3,0)", "student.points=(4,3,0)"), "distill")
    assert "student.points has [4], but the trajectory store keeps [3, 2, 1, 0]" in said
    assert not (workdir / "distill").exists()


def test_a_store_without_noisy_points_is_refused_where_they_are_the_target(second):
    workdir, _ = second
    edit_manifest(workdir, keep_noisy=False)
    said = sentence(smoke("distill", workdir, "student.target=xt"), "distill")
    assert "student.target is 'xt', but the trajectory store keeps no noisy points" in said
    assert not (workdir / "distill").exists()


def test_a_store_that_is_not_whole_is_refused(second):
    workdir, _ = second
    (workdir / "trajectories" / "manifest.json").unlink()
    said = sentence(smoke("distill", workdir), "distill")
    assert "no whole trajectory store" in said and "run the stage 'trajectories' first" in said
    assert not (workdir / "distill").exists()


@pytest.mark.parametrize("count", [30, 32, 40])
def test_a_store_grows_to_what_a_larger_one_would_be(pipeline, tmp_path, count):
    # 20 are two shards of 8 and one of 4, which is made anew
    small, large = (copy(pipeline, tmp_path / name, "teacher") for name in ("small", "large"))
    assert smoke("trajectories", small, "trajectories.count=20").status == 0
    kept = small / "trajectories" / "1.0.0" / "trajectories-train.array_record-00000-of-00003"
    written = kept.stat().st_mtime_ns
    for workdir in (small, large):
        assert smoke("trajectories", workdir, f"trajectories.count={count}").status == 0
    assert done(small / "trajectories")["sha256"] == done(large / "trajectories")["sha256"]
    first = f"trajectories-train.array_record-00000-of-{-(-count // 8):05d}"
    assert (small / "trajectories" / "1.0.0" / first).stat().st_mtime_ns == written
    names = [files(workdir / "trajectories" / "1.0.0") for workdir in (small, large)]
    assert names[0] == names[1]
    manifests = [read_json(workdir / "trajectories" / "manifest.json") for workdir in (small, large)]
    assert manifests[0] == manifests[1]
    said = sentence(smoke("trajectories", small, "trajectories.count=8"), "trajectories")
    assert f"trajectories.count {count} there, 8 here" in said


def test_a_smaller_batch_makes_the_same_store_but_for_rounding(pipeline, tmp_path):
    workdir = copy(pipeline, tmp_path, "teacher", "trajectories")
    assert smoke("trajectories", workdir, "trajectories.batch_size=2").status == 0
    assert done(workdir / "trajectories")["sha256"] == done(pipeline / "trajectories")["sha256"]
