"""Models on the hub, a stand-in on this machine: pushed, opened at any of their commits, and refused in sentences."""

import json
import os
import pathlib
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from pipeline_fixtures import ROOT, copy, run, sentence
from stubs.hub import TOKEN, Hub, serving

from ard_jax import ARDPipeline
from ard_jax.convert.card import choose_base_model
from ard_jax.errors import UserError

# Its own process, since huggingface_hub reads HF_ENDPOINT when it is imported; every step prints what came out.
PROGRAM = textwrap.dedent("""
    import json, pathlib, sys
    import numpy as np
    sys.path.insert(0, "tests")
    from pipeline_fixtures import run
    from ard_jax import ARDPipeline
    from ard_jax.errors import UserError

    workdir, home = map(pathlib.Path, sys.argv[1:])

    def export(*flags):
        outcome = run("export", "--workdir", workdir, "--model", "ard", "--format", "pipeline", *flags)
        return [outcome.status, outcome.out, outcome.err]

    def images(**settings):
        try:
            pipe = ARDPipeline.from_pretrained("me/ard", **settings)
            return np.asarray(pipe([3, 1], output_type="latent").images, float).tolist()
        except UserError as error:
            return str(error)

    said = {}
    said["first"] = export("--push", "me/ard", "--license", "cc-by-4.0", "--base-model", "me/teacher", "--public")
    first = said["first"][1].strip().rpartition("/")[2]
    said["second"] = export("--push", "me/ard", "--weights", "params")
    said["newest"], said["older"] = images(), images(revision=first)
    said["nowhere"] = images(revision="nonesuch")
    (home / "token").write_text("hf_another")
    said["refused"] = export("--push", "me/ard")
    (home / "token").unlink()
    said["without"] = export("--push", "me/other", "--output", str(workdir / "elsewhere"))
    print(json.dumps(said))
""")


@pytest.fixture(scope="module")
def pushed(pipeline, tmp_path_factory) -> tuple[Hub, dict, pathlib.Path]:
    folder = tmp_path_factory.mktemp("hub")
    workdir, home = copy(pipeline, folder / "run", "teacher", "distill"), folder / "home"
    home.mkdir()
    (home / "token").write_text(TOKEN)
    with serving() as hub:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        environment |= {"HF_ENDPOINT": hub.address, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1"}
        environment["HF_HUB_DISABLE_XET"] = "1"  # large files go by git's LFS, which the stand-in has
        command = [sys.executable, "-c", PROGRAM, workdir, home]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert TOKEN not in done.stdout + done.stderr
    return hub, json.loads(done.stdout.splitlines()[-1]), workdir


pytestmark = pytest.mark.slow


def test_what_is_pushed_is_the_export(pushed):
    hub, said, workdir = pushed
    status, out, _ = said["first"]
    (first, files), (second, newer) = hub.commits["me/ard"]
    folder = workdir / "export" / "ard" / "pipeline"
    assert status == 0 and out.splitlines()[1] == f"pushed: {hub.address}/me/ard/commit/{first}"
    there = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert newer.keys() == there.keys() == files.keys()
    assert (
        first != second
        and files["student/diffusion_pytorch_model.safetensors"] != newer["student/diffusion_pytorch_model.safetensors"]
    )
    assert [(made["organization"], made["name"], made["visibility"]) for made in hub.made[:2]] == [
        ("me", "ard", "public"), ("me", "ard", "private")
    ]  # fmt: skip


def test_the_card_has_what_the_hub_reads(pushed):
    hub, *_ = pushed
    card = hub.commits["me/ard"][0][1]["README.md"].decode()
    front = card.split("---")[1].strip().splitlines()
    for line in (
        "license: cc-by-4.0",
        "library_name: ard_jax",
        "pipeline_tag: unconditional-image-generation",
        "base_model: me/teacher",
    ):
        assert line in front
    assert 'ARDPipeline.from_pretrained("me/ard")\n' in card


def test_any_commit_can_be_opened(pushed):
    _, said, workdir = pushed
    images = np.asarray(ARDPipeline.from_pretrained(workdir / "distill" / "ard")([3, 1], output_type="latent").images)
    np.testing.assert_allclose(said["older"], images, atol=1e-5)
    assert np.abs(np.asarray(said["newest"]) - images).max() > 1e-3


def test_what_the_hub_refuses_is_said(pushed):
    hub, said, workdir = pushed
    assert "hf:me/ard at the revision 'nonesuch' cannot be downloaded (" in said["nowhere"]
    status, out, err = said["refused"]
    last = err.strip().splitlines()[-1]
    assert status == 2 and last.startswith(
        f"ard_jax export: {workdir / 'export' / 'ard' / 'pipeline'} is whole, but was"
    )
    assert "hf_another" not in out + err
    assert "401" in last and len(hub.commits["me/ard"]) == 2
    status, out, err = said["without"]
    assert status == 2 and out == "" and not (workdir / "elsewhere").exists()
    assert err.strip().endswith(
        "ard_jax export: --push needs a token that may write to the hub: log in with 'hf auth login' first."
    )


def test_names_that_are_none(pipeline, tmp_path):
    workdir = copy(pipeline, tmp_path / "run", "teacher")
    flags = ["--workdir", workdir, "--model", "teacher", "--format", "pipeline"]
    for flag in ("--push", "--base-model"):
        said = sentence(run("export", *flags, flag, "no name"), "export")
        assert said == f"ard_jax export: {flag} is 'no name', which names no repository: write ORG/NAME."
    with pytest.raises(UserError, match="revision is 'v1', but .* is a folder here and has just one: leave it out."):
        ARDPipeline.from_pretrained(workdir / "teacher", revision="v1")
    assert not (workdir / "export").exists()


def test_a_base_model_is_what_the_weights_came_from():
    assert choose_base_model({"source": "hf:facebook/DiT-XL-2-256"}, "") == "facebook/DiT-XL-2-256"
    assert choose_base_model({"source": "/home/me/DiT.pt"}, "") == "" and choose_base_model({}, "me/it") == "me/it"
