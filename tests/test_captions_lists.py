"""Benchmarks' lists of prompts, and folders for their tools: told from what those do with the names of files."""

import json

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from ard_jax.captions.layouts import LAYOUTS, check_layout, write_layout
from ard_jax.captions.lists import Prompt, read_prompts
from ard_jax.captions.texts import read_texts
from ard_jax.data.captioned import lines_of
from ard_jax.errors import UserError

GENEVAL = [
    {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
    {"tag": "counting", "include": [{"class": "cow", "count": 2}], "prompt": "a photo of two cows"},
]
PROMPTS = [Prompt(line["prompt"], f"{number:05d}", line) for number, line in enumerate(GENEVAL)]


def written(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def images(each, size=4):
    """Of prompt p and repetition r, all pixels are 10 · p + r."""
    rows = 10 * np.arange(2)[:, None] + np.arange(each)
    return [np.tile(own[:, None, None, None], (1, size, size, 3)).astype(np.uint8) for own in rows]


def value(path):
    (found,) = np.unique(np.asarray(Image.open(path)))
    return int(found)


# ------------------------------------------------------------------------------------------------------------- lists


def test_a_text_file_has_a_prompt_a_line(tmp_path):
    path = tmp_path / "color_val.txt"
    path.write_text("a green bench\tcolor\n\n a  red car \n")
    assert read_prompts(path) == [Prompt("a green bench", "00000"), Prompt("a red car", "00001")]


# What str.splitlines cuts at, and JSON and people's texts may have within a line.
INNER = "\v\f\x1c\x1d\x1e\x85\u2028\u2029"


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_line_ends_at_a_newline_alone(tmp_path, inner, end):
    texts = [f"a red{inner}heart", "a blue one"]
    objects = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    for name, lines in (("a.txt", texts), ("a.jsonl", objects)):
        path = tmp_path / name
        path.write_bytes(b"\xef\xbb\xbf" + "".join(line + end for line in lines).encode())
        assert [prompt.text for prompt in read_prompts(path)] == ["a red heart", "a blue one"]
        config = ConfigDict({"captions": {"source": "file", "path": str(path)}, "data": {"caption_key": "text"}})
        assert read_texts(config).texts == texts


def test_lines_of_a_text():
    for text, lines in (("", []), ("a", ["a"]), ("a\n", ["a"]), ("\na\r\n\r\n b", ["", "a", "", " b"])):
        assert lines_of(text) == lines


def test_lines_of_objects_keep_what_they_say(tmp_path):
    path = tmp_path / "evaluation_metadata.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in [*GENEVAL, {"text": "more"}]))
    assert read_prompts(path) == [*PROMPTS, Prompt("more", "00002", {"text": "more"})]


def test_an_image_of_coco_has_its_first_caption(tmp_path):
    path = tmp_path / "captions_val2014.json"
    annotations = [(7, 42, "third"), (5, 42, "A man\n rides."), (6, 9, "A dog.")]
    told = [{"id": number, "image_id": image, "caption": text} for number, image, text in annotations]
    path.write_text(json.dumps({"info": {}, "annotations": told}))
    assert read_prompts(path) == [Prompt("A dog.", "000000000009"), Prompt("A man rides.", "000000000042")]


def test_a_folder_has_a_prompt_a_file(tmp_path):
    for name, text in (("partiprompts1", "a fox\nin snow"), ("COCOval1", "two cups")):
        (tmp_path / f"{name}.txt").write_text(text)
    (tmp_path / "README.md").write_text("no prompt")
    assert read_prompts(tmp_path) == [Prompt("two cups", "COCOval1"), Prompt("a fox in snow", "partiprompts1")]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", None, "sample.prompts is '.*a.txt', which is not there: give a list"),
        ("a.txt", "\n \n", "a.txt holds no prompt: give at least one"),
        ("a.jsonl", '{"tag": "x"}', 'line 1 of .*a.jsonl has no string "prompt" or "text": give it one'),
        ("a.jsonl", '{"prompt": "x"}\n{"prompt": " "}', r"a.jsonl has an empty prompt \(00001\)"),
        ("a.json", '{"annotations": [{"id": 1}]}', "a.json is damaged .*captions_"),
    ],
)
def test_what_is_no_list(tmp_path, name, content, said):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=said):
        read_prompts(tmp_path / name)


# ----------------------------------------------------------------------------------------------------------- layouts


def test_t2i_compbench_reads_the_prompt_off_the_name_and_sorts_by_its_number(tmp_path):
    write_layout(tmp_path / "out", "compbench", PROMPTS, images(10))
    names = [path.name for path in (tmp_path / "out" / "samples").iterdir()]
    assert written(tmp_path / "out") == [f"samples/{name}" for name in sorted(names)] and len(names) == 20
    in_order = sorted(names, key=lambda name: int(name.split("_")[-1].split(".")[0]))
    assert [name.split("_")[0] for name in in_order] == [p.text for p in PROMPTS for _ in range(10)]
    shown = [value(tmp_path / "out" / "samples" / name) for name in in_order]
    assert shown == [*range(10), *range(10, 20)]
    assert in_order[0] == "a photo of a bench_000000.png"


def test_geneval_has_a_folder_a_prompt_with_its_line(tmp_path):
    write_layout(tmp_path / "out", "geneval", PROMPTS, images(4))
    assert written(tmp_path / "out") == [
        f"0000{prompt}/{file}"
        for prompt in range(2)
        for file in ("metadata.jsonl", *(f"samples/0000{repetition}.png" for repetition in range(4)))
    ]
    for number, line in enumerate(GENEVAL):
        assert json.loads((tmp_path / "out" / f"0000{number}" / "metadata.jsonl").read_text()) == line
        assert value(tmp_path / "out" / f"0000{number}" / "samples" / "00003.png") == 10 * number + 3


def test_dpg_bench_has_four_images_in_one(tmp_path):
    write_layout(tmp_path / "out", "dpg", PROMPTS, images(4))
    assert written(tmp_path / "out") == ["00000.png", "00001.png"]
    whole = np.asarray(Image.open(tmp_path / "out" / "00001.png"))
    assert whole.shape == (8, 8, 3)
    parts = [whole[:4, :4], whole[:4, 4:], whole[4:, :4], whole[4:, 4:]]  # as the tool cuts them for --resolution 4
    assert [np.unique(part).tolist() for part in parts] == [[10], [11], [12], [13]]
    write_layout(tmp_path / "one", "dpg", PROMPTS, images(1))
    assert np.asarray(Image.open(tmp_path / "one" / "00001.png")).shape == (4, 4, 3)


def test_coco_is_a_folder_of_images_by_their_numbers(tmp_path):
    prompts = [Prompt("A dog.", "000000000009"), Prompt("A man.", "000000000042")]
    write_layout(tmp_path / "out", "coco", prompts, images(1))
    assert written(tmp_path / "out") == ["000000000009.png", "000000000042.png"]  # nothing that is no image


def test_a_folder_says_which_image_is_of_what(tmp_path):
    write_layout(tmp_path / "out", "folder", PROMPTS, images(2))
    lines = [json.loads(line) for line in (tmp_path / "out" / "metadata.jsonl").read_text().splitlines()]
    assert [line["file_name"] for line in lines] == ["00000_00.png", "00000_01.png", "00001_00.png", "00001_01.png"]
    assert [line["text"] for line in lines] == [prompt.text for prompt in PROMPTS for _ in range(2)]
    assert value(tmp_path / "out" / lines[3]["file_name"]) == 11


def test_a_folder_that_is_not_filled_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="shorter"):
        write_layout(tmp_path / "out", "coco", PROMPTS, images(1)[:1])
    assert not list(tmp_path.iterdir())


def test_each_benchmark_has_its_number_of_images():
    assert {name: layout.each for name, layout in LAYOUTS.items()} == {
        "folder": 1, "coco": 1, "compbench": 10, "geneval": 4, "dpg": 4
    }  # fmt: skip


@pytest.mark.parametrize(
    ("layout", "prompt", "each", "said"),
    [
        ("compbench", Prompt("a or/and b", "0"), 1, "'a or/and b' cannot be the name of a file of T2I-CompBench"),
        ("compbench", Prompt("a_b", "0"), 1, "cannot be the name"),
        ("compbench", Prompt("é" * 130, "0"), 1, "at most 255 bytes"),
        ("geneval", Prompt("a", "0", {"prompt": "a"}), 1, "has no tag and include.*evaluation_metadata.jsonl"),
        ("dpg", Prompt("a", "0"), 3, "sample.per_prompt is 3, but DPG-Bench's tool takes 4 or 1"),
        ("dpg", Prompt("a", "a.b"), 4, "'a.b' has a dot in its name"),
        ("hps", Prompt("a", "0"), 1, "sample.layout is 'hps': choose one of folder, coco, compbench, geneval, dpg"),
    ],
)
def test_prompts_that_have_no_place(layout, prompt, each, said):
    with pytest.raises(UserError, match=said):
        check_layout(layout, [PROMPTS[0], prompt], each)
