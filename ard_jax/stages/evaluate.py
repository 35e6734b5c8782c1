"""Measures the samples of the teacher and of every student that has been sampled and is still there.

    python -m ard_jax evaluate --samples FILE.npz --reference FILE.npz --weights FILE
measures anybody's images instead, as ADM does: FID, sFID, Inception score, precision, recall (add --help for more).
    python -m ard_jax evaluate --config FILE --workdir DIR --make-reference OUT.npz
makes what they are held against of the real images of a config (add --help for more).

Samples of other settings, and students of another teacher or solver, are refused.

Reads `sample/` and the real images (of `data`, or of `encode` for models of latents) and writes, in `evaluate/`,
`results.json`, `pictures.npz`, `edits.npz` and of captioned images `gallery.npz`: Fréchet distance, precision and
recall in the features of a small network that is trained on the same data (so they compare models here, and with
nothing else; few images have no Fréchet distance): a classifier, or of captioned images a judge, which also says how
often the right caption is among those that fit an image best, of captions that were trained on and of those held out.
With `evaluate.features=inception`, which needs `evaluate.weights` and `evaluate.reference`, they are what ADM's
evaluator gives for the samples, and nothing is trained. With `evaluate.draw` it draws the samples of `sample.models`
itself while it looks at them, on all devices of all hosts, and keeps none: `sample` is not needed. Beside each Fréchet
distance stand those of two halves of the same samples and of two halves of the real images, and its interval by
bootstrap; beside what a student's has over its teacher's, the interval of that, of pairs of the same noise and
condition. It also measures each student's error to the teacher from the same noise, step by step; and of ARD students
- the exposure bias, the error of each step with the teacher's history against its own;
- `trained_mse`, the former on trajectories that the student was trained on, if their store still lies in the workdir,
  and `times_seen`, how often its training saw each: far smaller errors there mean that it has too few of them;
- `given_psnr`, of the final image to the teacher's when the first 0, 1, …, S−1 points are the teacher's;
- `attention_mass` (layer, query block, key block), how a block shares its attention out, on the student's own points;
- in `edits.npz`, the teacher's images `source` turned into the class `label`, under the student's name (image, S,
  height, width, channel): without the source, then with it in place of the prediction of step 1, …, S−1
  (docs/METHOD.md section 4).

With `sample.prompts`, measures how well the images of that list fit their prompts, by the CLIP in `evaluate.clip`, and
writes `prompts/NAME/evaluate/adherence.json`.
"""

import concurrent.futures
import contextlib
import dataclasses
import json
import logging
import pathlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
from jax.sharding import Mesh

from ard_jax.captions.conditions import check_text_encoder, inputs_of, load_conditions
from ard_jax.checks import listed_labels
from ard_jax.conditions import Conditions
from ard_jax.config import keys_that_change, other_settings, plain
from ard_jax.data import identify
from ard_jax.drawing import drawable, make_decoder, open_real_images
from ard_jax.errors import UserError
from ard_jax.evaluation import difference_interval
from ard_jax.files import file_sha256, read_npz, write_json, write_npz
from ard_jax.measuring import Held, Samples, draw_samples, forget_parts, open_yardstick, read_samples
from ard_jax.methods import columns_of
from ard_jax.models import AutoencoderKL
from ard_jax.paired import Paired, can_edit
from ard_jax.parallel import is_first, local_mesh
from ard_jax.progress import Stopwatch
from ard_jax.prompted import judge, open_list
from ard_jax.results import Measured, Results, add_degradation, degradation_ratios, main_target
from ard_jax.sampled import drawn_with
from ard_jax.trajectories.store import Store, read_manifest, same_captions, store_hash
from ard_jax.types import Params
from ard_jax.workdir import (
    Loaded,
    check_identity,
    find_vae,
    load_student,
    load_teacher,
    occupy,
    require_done,
    store_folder,
    teacher_folder,
    vae_folder,
    write_done,
)

log = logging.getLogger("ard_jax")


def run(config: ml_collections.ConfigDict, workdir: pathlib.Path, models: Collection[str] = ()) -> None:
    """Evaluates.

    Args:
        config, workdir: the run's.
        models: names of those to measure; () for all that have been sampled, or are drawn here.

    Raises:
        UserError: nothing has been sampled, the samples are latents, of other settings or of students of another
            teacher, or there are too few images for neighbours.
    """
    if config.sample.prompts:
        return judge(open_list(config, workdir), config.evaluate)
    watch, directory, mesh = Stopwatch(), workdir / "evaluate", local_mesh(config.mesh)
    vae = find_vae(config, workdir)
    if config.data.space == "latent" and vae is None:
        raise UserError(
            f"evaluate compares images, but there is no VAE in {vae_folder(config, workdir)} to decode latents with: "
            f"convert one into the workdir, or set vae.dir, and run 'sample' again."
        )
    names = _models(config, workdir, models)
    teacher = load_teacher(config, workdir, mesh)
    students = {name: load_student(workdir / "distill" / name, mesh) for name in names if name != "teacher"}
    _check_students(config, teacher, students)
    conditions = load_conditions(config, workdir)
    samples = _samples(config, workdir, {name: students.get(name, teacher) for name in names}, conditions, vae, mesh)
    # a reference stands for the real images, which whoever has its file need not have
    real_images = None if config.evaluate.features == "inception" else open_real_images(config, vae)
    same = all(teacher.config.data[key] == config.data[key] for key in ("source", "name", "split"))
    if real_images is not None and vae is None and same:  # others may be compared with, but not by chance
        check_identity(teacher_folder(config, workdir), identify(config.data, real_images))
    chosen = set(listed_labels(config.sample))
    if chosen and len(chosen) < len(conditions):
        log.warning(
            "samples are of %d of %d %s, and the real images of all: what is far from them may just be missing.",
            len(chosen),
            len(conditions),
            "classes" if config.data.num_classes else "captions",
        )
    parts = directory / "parts"  # which a stage that was killed goes on with
    yardstick = open_yardstick(config, real_images, vae, conditions, parts / "reference")
    occupy(directory)
    paired = Paired(config, teacher, students, conditions, make_decoder(vae, config, mesh), mesh)
    given = _trajectories(config, workdir, students.values(), inputs_of(conditions), paired.count)

    def beside_teacher(name):
        of = {"config": plain(config), "teacher": teacher.sha256, "student": students[name].sha256}
        return _beside_teacher(paired, name, students[name], given, workdir, of)

    # on a laptop small networks are compiled for longer than they run, one core a program; elsewhere memory is dearer,
    # and programs of several devices would wait for each other
    at_once = mesh.size == 1 and jax.default_backend() == "cpu"
    with _threads(2) as pool:
        beside = (pool.map if at_once else map)(beside_teacher, students)
        held = {name: yardstick.measure(own, parts / name) for name, own in samples.items()}
        pictures = paired.teacher_pictures(config.evaluate.pictures)
        edits = paired.edit_sources(config.evaluate.pictures)
        found = dict(zip(students, beside, strict=True))
    measured = {
        name: Measured(**own.facts, **held[name].numbers, kind="teacher" if name == "teacher" else "student")
        for name, own in samples.items()
    }
    for name, (errors, shown) in found.items():
        measured[name] = dataclasses.replace(measured[name], **errors)
        pictures[name] = shown["pictures"]
        if "edits" in shown:
            edits[name] = shown["edits"]
    measured = _add_intervals(add_degradation(measured), held)
    ratios = degradation_ratios(measured)
    results = Results(
        features=yardstick.about,
        real_images=yardstick.real_images,
        samples=max((own.compared for own in held.values()), default=None),  # all models have the same conditions
        labels="chosen" if chosen else config.sample.labels or "uniform",
        paired=paired.count,
        models=measured,
        degradation_ratio=ratios.get(main_target(measured)),
        degradation_ratios=ratios,
        measured_with=yardstick.facts,
        halves=yardstick.halves,
        judge=yardstick.judged,
        config=plain(config),
    )
    files = ["results.json", "pictures.npz", "edits.npz"]
    if is_first():  # every host has computed the same
        write_json(directory / "results.json", results.to_json())
        write_npz(directory / "pictures.npz", **pictures)
        write_npz(directory / "edits.npz", **edits)
        if yardstick.judged is not None:
            pictures = _gallery(yardstick.examples, samples, conditions, config.evaluate.pictures)
            write_npz(directory / "gallery.npz", **pictures)
            files.append("gallery.npz")
    forget_parts(parts)  # no sooner: on a full disk they are what the next start goes on with
    if is_first():
        write_done(directory, {file: file_sha256(directory / file) for file in files}, watch())


@contextlib.contextmanager
def _threads(count: int) -> Iterator[concurrent.futures.Executor]:
    """Threads that work beside the body; where that ends early, they do not begin with what is left."""
    pool = concurrent.futures.ThreadPoolExecutor(count)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _models(config: ml_collections.ConfigDict, workdir: pathlib.Path, asked: Collection[str]) -> list[str]:
    """Names of the models to measure: those asked for, else all that are drawn or have been; UserError for none."""
    if config.evaluate.draw:
        return list(asked or config.sample.models)
    sampled = require_done(workdir / "sample", "sample")["models"]
    if asked:
        return [name for name in sampled if name in asked]
    gone = [name for name in sampled if name != "teacher" and not (workdir / "distill" / name).exists()]
    if gone:
        log.info("%s: sampled, but no longer in distill/, so left out.", ", ".join(gone))
    return [name for name in sampled if name not in gone]


def _check_students(config: ml_collections.ConfigDict, teacher: Loaded, students: Mapping[str, Loaded]) -> None:
    """Raises UserError for a student of other trajectories than those that it would be held against."""
    for name, student in students.items():
        theirs = student.config.get("inputs", {}).get("teacher")
        if not theirs:  # converted, or trained before it was noted
            continue
        other = other_settings(plain(student.config), config, keys_that_change("store"))
        if theirs != teacher.sha256:
            other.insert(0, f"a teacher of hash {theirs:.8} there, {teacher.sha256:.8} here")
        if other:
            raise UserError(
                f"{name} was distilled from another teacher or solver than this config's ({'; '.join(other[:3])}): "
                f"give 'evaluate' those, or move distill/{name} away and distil it from these."
            )


def _samples(
    config: ml_collections.ConfigDict,
    workdir: pathlib.Path,
    models: Mapping[str, Loaded],
    conditions: Conditions,
    vae: tuple[AutoencoderKL, Params] | None,
    mesh: Mesh,
) -> dict[str, Samples]:
    """The samples of models, out of their files, or with `evaluate.draw` drawn as they are looked at."""
    if not config.evaluate.draw:
        sampled, folder = require_done(workdir / "sample", "sample")["models"], workdir / "sample"
        inputs = drawn_with(inputs_of(conditions), vae, config.data.space)
        return {
            name: read_samples(folder / name, sampled[name], loaded.sha256, config, inputs)
            for name, loaded in models.items()
        }
    check_text_encoder(config, workdir, conditions)
    return {
        name: draw_samples(drawable(config, loaded, name == "teacher"), conditions, vae, config, mesh)
        for name, loaded in models.items()
    }


def _add_intervals(measured: Mapping[str, Measured], held: Mapping[str, Held]) -> dict[str, Measured]:
    """Adds how well each degradation is known: samples of a student and the teacher are pairs of one noise."""

    def add(name: str, model: Measured) -> Measured:
        if model.degradation is None:
            return model
        own, teacher = held[name].influence, held["teacher"].influence
        if own is None or teacher is None:
            return model
        interval = difference_interval(model.degradation, own - teacher)
        return dataclasses.replace(model, degradation_interval=interval)

    return {name: add(name, model) for name, model in measured.items()}


class _Trajectories(NamedTuple):
    """Some of the run's trajectories: `records` spread evenly over a store of so `many`, its hash and its points."""

    store: str
    many: int
    points: list[int]
    records: list[dict[str, np.ndarray]]


def _trajectories(
    config: ml_collections.ConfigDict,
    workdir: pathlib.Path,
    students: Iterable[Loaded],
    told: Mapping[str, str],
    count: int,
) -> _Trajectories | None:
    """`count` trajectories of the store that some student was trained on, if it lies there and is of these captions."""
    folder, wanted = store_folder(config, workdir), {_store_of(student) for student in students} - {""}
    try:
        if not wanted or (sha256 := store_hash(manifest := read_manifest(folder))) not in wanted:
            return None
        if not same_captions(manifest, told):
            return None
        store = Store(folder, manifest)
        places = np.linspace(0, len(store) - 1, min(len(store), count)).astype(int)
        records = [store[place] for place in places.tolist()]
    except UserError as error:  # whoever evaluates need not have them
        log.info("errors on trajectories that students were trained on are not measured: %s", error)
        return None
    return _Trajectories(sha256, len(store), manifest["points"], records)


def _store_of(student: Loaded) -> str:
    """The hash of the store that an ARD student was trained on; "" where it has none, or is another kind."""
    return student.config.get("inputs", {}).get("store", "") if student.config.student.kind == "history" else ""


def _on_trained(
    paired: Paired, name: str, student: Loaded, given: _Trajectories | None, workdir: pathlib.Path
) -> dict[str, Any]:
    """What `Measured` says of trajectories that a student was trained on; {} if it was not on those that are given."""
    if given is None or _store_of(student) != given.store:
        return {}
    target, columns = student.config.student.target, list(columns_of(given.points, student.config))
    noise = np.stack([record["noise"] for record in given.records]).astype(np.float32)
    points = np.stack([record[target][columns] for record in given.records]).astype(np.float32)
    label = np.array([record["label"] for record in given.records], np.int32)
    examples = require_done(workdir / "distill" / name, "distill").get("examples")  # a snapshot's does not say
    # one that starts from another student has seen what that one saw, too
    seen = None if examples is None or "start" in student.config.inputs else examples / given.many
    return {"trained_mse": paired.error_given(student, noise, label, points), "times_seen": seen}


def _beside_teacher(
    paired: Paired,
    name: str,
    student: Loaded,
    given: _Trajectories | None,
    workdir: pathlib.Path,
    of: Mapping[str, Any],
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """A student's errors to its teacher, and its "pictures" and perhaps "edits".

    They are found once and kept in a file, which holds what they are `of`: a stage that was killed goes on from there.
    """
    path = workdir / "evaluate" / "parts" / "paired" / f"{name}.npz"
    count, known = paired.config.evaluate.pictures, json.dumps(of, sort_keys=True)
    if path.exists():
        found = read_npz(path)
        if str(found.pop("of")) == known:
            return json.loads(str(found.pop("errors"))), found
    errors, pictures = paired.compare(student, count)
    errors |= _on_trained(paired, name, student, given, workdir)
    shown = {"pictures": pictures} | ({"edits": paired.edits(student, count)} if can_edit(student) else {})
    if is_first():
        write_npz(path, of=np.array(known), errors=np.array(json.dumps(errors)), **shown)
    return errors, shown


def _gallery(
    examples: Mapping[str, np.ndarray], samples: Mapping[str, Samples], conditions: Conditions, count: int
) -> dict[str, np.ndarray]:
    """The first images of captions that were trained on, and of those held out, of all models: see `build_report`."""
    labels = next(iter(samples.values())).labels
    is_trained = labels < conditions.for_training
    rows = np.concatenate([np.flatnonzero(is_trained)[:count], np.flatnonzero(~is_trained)[:count]])
    words = [conditions.words(int(number)) for number in labels[rows]]
    shown = {"label": np.array(words), "held_out": ~is_trained[rows]}
    if all(word in examples for word in words):
        shown["real"] = np.stack([examples[word] for word in words])
    return shown | {name: model.images.rows(rows) for name, model in samples.items()}
