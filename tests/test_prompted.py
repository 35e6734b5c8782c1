"""Lists of prompts drawn by a converted PixArt, laid out, and judged by a CLIP of its own."""

import json
import shutil

import jax
import numpy as np
import pytest
from clip_fixtures import random_state_dict
from PIL import Image
from pipeline_fixtures import copy, done, files, run, sentence, smoke
from pixart_fixtures import write_pixart

from ard_jax.captions.store import open_captions
from ard_jax.convert import clip_from_transformers
from ard_jax.evaluation import clip_scores
from ard_jax.evaluation.clip_images import images_for_clip
from ard_jax.files import read_json, read_npz, write_json
from ard_jax.prompted import SCORES
from ard_jax.snapshots import link_folders
from ard_jax.text import open_tokenizer, tokens_for_clip
from ard_jax.weights.tensors import write_tensors

LINES = [
    {"tag": "colors", "include": [{"class": "apple", "count": 1, "color": "red"}], "prompt": "a red apple"},
    {"tag": "single_object", "include": [{"class": "circle", "count": 1}], "prompt": "green circle"},
    {"tag": "single_object", "include": [{"class": "square", "count": 1}], "prompt": "a blue square"},
]
TEXTS = [line["prompt"] for line in LINES]
TINY = ("diffusion.steps=2", "sample.batch_size=3", "sample.models=('teacher',)", "sample.per_prompt=2")
TINY += ("trajectories.points=(1,0)", "student.points=(1,0)", "student.history_layers=1")


def stage(name, run_folder, *overrides):
    settings = [f"--config.{override}" for override in (*TINY, *overrides)]
    return run(name, "--config", run_folder / "config.py", "--workdir", run_folder, *settings)


def write_prompts(folder):
    path = folder / "evaluation_metadata.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return path


def write_clip(folder):
    """A tiny random one as transformers publishes it, whose tokenizer knows the prompts' words."""
    import tokenizers

    arrays, config = random_state_dict()
    write_tensors(folder / "model.safetensors", arrays)
    write_json(folder / "config.json", config)
    names = ["<pad>", "A", "photo", "depicts", *sorted({word for text in TEXTS for word in text.split()})]
    words = {name: number for number, name in enumerate(names)} | {"<start>": 48, "<end>": 49}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "<pad>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.RobertaProcessing(("<end>", 49), ("<start>", 48))
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A workdir whose teacher has drawn a list, and that list; not to be written to."""
    root = tmp_path_factory.mktemp("prompted")
    write_pixart(root / "folder")
    outcome = run("convert", "--source", root / "folder", "--workdir", root / "run")
    assert outcome.status == 0, outcome.err
    prompts = write_prompts(root)
    outcome = stage("sample", root / "run", f"sample.prompts={prompts}", "sample.layout=geneval")
    assert outcome.status == 0, outcome.err
    assert outcome.out.endswith(f"done: {root / 'run' / 'prompts' / 'evaluation_metadata'}\n")
    return root / "run", prompts


def test_every_prompt_is_drawn_and_lies_where_the_tool_looks(drawn):
    """The captions are those of the list, and image i of prompt p is row 2p + i of the samples."""
    workdir, _ = drawn
    home = workdir / "prompts" / "evaluation_metadata"
    samples = read_npz(home / "sample" / "teacher" / "samples.npz")
    assert samples["labels"].tolist() == [0, 0, 1, 1, 2, 2]
    captions = open_captions(home / "captions")
    assert [captions.words(number) for number in range(3)] == TEXTS and captions.width == 20
    images = samples["arr_0"]
    assert len(np.unique(images.reshape(6, -1), axis=0)) == 6  # no two of a prompt are alike, nor two prompts'
    for row, image in enumerate(images):
        file = home / "geneval" / "teacher" / f"0000{row // 2}" / "samples" / f"0000{row % 2}.png"
        np.testing.assert_array_equal(np.asarray(Image.open(file)), image)
    assert done(home)["models"]["geneval/teacher"]["images"] == 6
    assert not (workdir / "sample").exists() and not (workdir / "captions").exists()  # the run's own are its own


def test_another_layout_draws_nothing_again(drawn, tmp_path, monkeypatch):
    workdir = copy(drawn[0], tmp_path, "teacher", "vae", "prompts")
    (workdir / "config.py").write_bytes((drawn[0] / "config.py").read_bytes())
    monkeypatch.setattr("ard_jax.stages.sample._draw", lambda *args: 1 / 0)
    asked = f"sample.prompts={drawn[1]}"
    assert stage("sample", workdir, asked, "sample.layout=compbench").status == 0
    home = workdir / "prompts" / "evaluation_metadata"
    names = [f"samples/{text}_{2 * number + i:06d}.png" for number, text in enumerate(TEXTS) for i in range(2)]
    assert files(home / "compbench" / "teacher") == sorted(names)
    before = (home / "geneval" / "teacher").stat().st_mtime_ns
    assert stage("sample", workdir, asked, "sample.layout=geneval").status == 0
    assert (home / "geneval" / "teacher").stat().st_mtime_ns == before


def made_run(root):
    (root / "teacher").mkdir(parents=True)
    home = root / "prompts" / "a"
    home.mkdir(parents=True)
    return root, home


def test_links_stay_right_where_a_run_is_moved(tmp_path):
    run_folder, home = made_run(tmp_path / "run")
    link_folders(run_folder, home, ("teacher", "vae"))
    assert [path.name for path in home.iterdir()] == ["teacher"]  # the run has no VAE
    moved = run_folder.rename(tmp_path / "moved")
    assert (moved / "prompts" / "a" / "teacher").samefile(moved / "teacher")


def test_links_that_lead_elsewhere_are_made_anew_and_no_others(tmp_path):
    """Those of a run that was moved, and of one that was copied, lead to where it was."""
    before, _ = made_run(tmp_path / "before")
    run_folder, home = made_run(tmp_path / "run")
    link = home / "teacher"
    for leads in (tmp_path / "gone" / "teacher", before / "teacher"):
        link.unlink(missing_ok=True)
        link.symlink_to(leads)
        link_folders(run_folder, home, ["teacher"])
        assert link.samefile(run_folder / "teacher")
        assert [path.name for path in home.iterdir()] == ["teacher"]
    link.unlink()
    link.symlink_to(run_folder / "teacher")
    (home / "vae").mkdir()
    (run_folder / "vae").mkdir()
    link_folders(run_folder, home, ["teacher", "vae"])
    assert link.readlink() == run_folder / "teacher" and not (home / "vae").is_symlink()


def test_links_from_elsewhere_are_whole_paths(tmp_path, monkeypatch):
    run_folder, _ = made_run(tmp_path / "run")
    (tmp_path / "view").mkdir()
    monkeypatch.chdir(tmp_path)
    link_folders(run_folder.relative_to(tmp_path), tmp_path / "view", ["teacher"])
    assert (tmp_path / "view" / "teacher").readlink() == run_folder / "teacher"


def test_a_run_that_was_moved_is_sampled(drawn, tmp_path, monkeypatch):
    """Its links as earlier versions made them, with whole paths."""
    workdir = shutil.copytree(drawn[0], tmp_path / "moved", symlinks=True)
    home = workdir / "prompts" / "evaluation_metadata"
    for name in ("teacher", "vae"):
        (home / name).unlink()
        (home / name).symlink_to(tmp_path / "run" / name)
    monkeypatch.setattr("ard_jax.stages.sample._draw", lambda *args: 1 / 0)
    outcome = stage("sample", workdir, f"sample.prompts={drawn[1]}", "sample.layout=geneval")
    assert outcome.status == 0, outcome.err
    assert (home / "teacher").samefile(workdir / "teacher")


def test_scores_are_those_of_the_vectors(drawn, tmp_path):
    """Each by its own definition: what stands before a prompt, and whether images are cropped or padded."""
    workdir, prompts = drawn
    folder = write_clip(tmp_path)
    asked = [f"sample.prompts={prompts}", f"evaluate.clip={folder}", f"evaluate.clip_scores={tuple(SCORES)}"]
    outcome = stage("evaluate", workdir, *asked)
    assert outcome.status == 0, outcome.err
    told = read_json(workdir / "prompts" / "evaluation_metadata" / "evaluate" / "adherence.json")
    model, params = clip_from_transformers(*random_state_dict())
    images = read_npz(workdir / "prompts" / "evaluation_metadata" / "sample" / "teacher" / "samples.npz")["arr_0"]
    tokenizer = open_tokenizer(folder / "tokenizer.json")

    def text(prefix=""):
        ids, mask, _ = tokens_for_clip(tokenizer, [prefix + text for text in TEXTS], model.length)
        rows = jax.jit(lambda: model.apply({"params": params}, ids, mask, method="encode_text"))()
        return np.asarray(rows)[[0, 0, 1, 1, 2, 2]]

    def image(fit="crop"):
        shown = images_for_clip(list(images), model.image_size, fit)
        return np.asarray(jax.jit(lambda: model.apply({"params": params}, shown, method="encode_image"))())

    bare = image(), text()
    expected = {
        "clip_score": clip_scores.clip_score(image(), text("A photo depicts ")),
        "clip_similarity": clip_scores.clip_similarity(*bare),
        "pick_score": clip_scores.pick_score(*bare, float(params["logit_scale"])),
        "hps_v2": clip_scores.hps_v2(image("pad"), text()),
        "compbench_non_spatial": clip_scores.compbench_non_spatial(*bare),
    }
    assert expected.keys() == SCORES.keys()
    for name, values in expected.items():
        assert told["models"]["teacher"][name] == pytest.approx(values.mean(), rel=1e-4), name
    assert told["models"]["teacher"]["ema_sha256"] == done(workdir / "teacher")["sha256"]["ema"]
    assert (told["prompts"], told["images_per_prompt"], told["cut"]) == (3, 2, 0) and len(told["clip_sha256"]) == 64
    assert "teacher clip_score " in outcome.out


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["evaluate.clip="], "evaluate.clip is '', but prompts are judged by a CLIP: give the folder of one."),
        (["evaluate.clip=nowhere"], "there is no CLIP in nowhere (no config.json): give a folder with its weights"),
        (["evaluate.clip_scores=('fid',)"], "evaluate.clip_scores is ('fid',): choose out of clip_score, "),
        (["evaluate.clip=CLIP", "sample.models=('ard',)"], "has no samples of 'ard': run 'sample' with this list"),
        (["evaluate.clip=CLIP", "sample.per_prompt=4"], "holds 6 images, which are not those of this list"),
    ],
)
def test_what_cannot_be_judged(drawn, tmp_path, overrides, said):
    overrides = [override.replace("CLIP", str(tmp_path)) for override in overrides]
    write_clip(tmp_path)
    assert said in sentence(stage("evaluate", drawn[0], f"sample.prompts={drawn[1]}", *overrides), "evaluate")


def test_what_cannot_be_drawn(drawn, tmp_path):
    workdir, prompts = drawn
    other = tmp_path / prompts.name
    other.write_text('{"prompt": "a red circle"}\n')
    said = sentence(stage("sample", workdir, f"sample.prompts={other}"), "sample")
    assert "prompts.txt is of another list of that name: rename the list, or move" in said
    said = sentence(stage("sample", workdir, f"sample.prompts={prompts}", "sample.layout=hps"), "sample")
    assert "sample.layout is 'hps': choose one of folder, coco, compbench, geneval, dpg." in said
    said = sentence(smoke("sample", tmp_path / "run", f"sample.prompts={prompts}"), "sample")
    assert "the networks are told 10 classes and no captions (data.num_classes): leave it out" in said
    assert not (tmp_path / "run").exists()
