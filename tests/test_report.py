"""The report: pixels where they belong, numbers in their cells, nothing fetched, nothing that crashes it."""

import base64
import io
import math
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from ard_jax import report
from ard_jax.errors import UserError
from ard_jax.picture_grid import image_grid
from ard_jax.report import words
from ard_jax.report.figures import GUTTER, PALETTE, Series, block_maps, line_chart, thin
from ard_jax.report.page import build_sweep
from ard_jax.results import Measured, Results, pair


def build_report(title, results, *shown):
    return report.build_report(title, Results.from_json(results), *shown)


def teaser(pictures, results, *gallery):
    return report.teaser(pictures, Results.from_json(results), *gallery)


def headline(results):
    return words.headline(Results.from_json(results))


VOID = {"meta", "img", "br", "hr", "link", "input"}
STEPS, COUNT, SIDE = 4, 5, 8


class Page(HTMLParser):
    """The parsed page: checks nesting, keeps images, links, ids, table cells and the text of each section.

    Of the text runs of white space become one space, as a browser shows them; of the cells none, which may keep them.
    """

    def __init__(self, html: str):
        super().__init__()
        self.open, self.images, self.links, self.ids, self.rows, self.text = [], [], [], [], [], {}
        self.section = "top"
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self._keep(tag, dict(attrs))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self._keep(tag, dict(attrs))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text[self.section] = self.text.get(self.section, "") + re.sub(r"\s+", " ", data)
        if self.rows and self.open[-1:] in (["th"], ["td"]):
            self.rows[-1][-1] += data

    def _keep(self, tag, attrs):
        self.links += [attrs[key] for key in ("src", "href", "srcset", "action", "data") if key in attrs]
        if "id" in attrs:
            self.ids.append(attrs["id"])
        if tag == "section":
            self.section = attrs["id"]
        if tag == "img":
            self.images.append(attrs)
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.rows[-1].append("")

    def row(self, heading: str) -> list[str]:
        return next(row for row in self.rows if row[0] == heading)


def student(target, mask, fd, degradation, **more):
    measured = {"precision": 0.91, "recall": 0.7244, "psnr": 26.14, "network_calls": 4, "parameters": 480512}
    costs = {"gmac_per_image": 0.02914, "seconds_per_image": 0.000312}
    by_step = {"psnr_per_step": [27, 26, 26, 26.1], "forced_mse": [0.002, 0.001, 0.001, 0.001]}
    by_step |= {"rollout_mse": [0.002, 0.003, 0.004, 0.005], "given_psnr": [26.1, 27, 28.5, 30]}
    if mask == "causal":
        seen = np.tril(np.ones((2, STEPS, STEPS)))
        by_step["attention_mass"] = (seen / seen.sum(axis=-1, keepdims=True)).tolist()
    return {"kind": "student", "target": target, "mask": mask, "history_layers": 2, "steps": STEPS} | (
        measured | costs | by_step | {"fd": fd, "degradation": degradation} | more
    )


@pytest.fixture
def results():
    teacher = {"kind": "teacher", "fd": 17.604, "precision": 0.934, "recall": 0.8, "network_calls": 50, "steps": 25}
    return {
        "features": "64 features of a small classifier",
        "real_images": 1797,
        "samples": 3072,
        "models": {
            "teacher": teacher | {"parameters": 467216, "gmac_per_image": 3.531, "seconds_per_image": 0.0041},
            "ard": student("x0", "causal", 22.914, 5.31),
            "step": student("x0", "diagonal", 59.524, 41.92),
            "ard_noisy": student("xt", "causal", 17.9, 0.3),
            "step_noisy": student("xt", "diagonal", 18.3, 0.7),
        },
        "degradation_ratio": 7.894,
        "degradation_ratios": {"x0": 7.894, "xt": 2.333},
        "seconds": {"teacher": 80.0, "distill/ard": 40.0},
        "config": {"seed": 3, "data": "<digits>"},
    }


@pytest.fixture
def pictures():
    rng = np.random.default_rng(0)
    points = {
        name: rng.integers(0, 256, (COUNT, STEPS, SIDE, SIDE, 1), dtype=np.uint8)
        for name in ("teacher", "ard", "step", "ard_noisy", "step_noisy")
    }
    noise = rng.integers(0, 256, (COUNT, SIDE, SIDE, 1), dtype=np.uint8)
    return points | {"noise": noise, "label": np.arange(COUNT) + 4}


@pytest.fixture
def edits():
    rng = np.random.default_rng(1)
    made = rng.integers(0, 256, (COUNT, STEPS, SIDE, SIDE, 1), dtype=np.uint8)
    source = rng.integers(0, 256, (COUNT, SIDE, SIDE, 1), dtype=np.uint8)
    return {"source": source, "label": np.arange(COUNT) + 2, "ard": made}


@pytest.fixture
def curves():
    rows = [{"step": 10 * (i + 1), "loss": 1 / (i + 1), "samples_per_s": 1000.0 + i} for i in range(9)]
    return {"teacher": rows, "ard": rows, "step": rows}


@pytest.fixture
def gallery():
    rng = np.random.default_rng(2)
    words = np.array(["red heart", "cat <face>", "fire", "woman astronaut", "man astronaut"])
    drawn = {
        name: rng.integers(0, 256, (5, SIDE, SIDE, 3), dtype=np.uint8) for name in ("real", "teacher", "ard", "step")
    }
    return drawn | {"label": words, "held_out": np.array([False, False, False, True, True])}


def decoded(image: dict) -> Image.Image:
    head, data = image["src"].split(",", 1)
    assert head == "data:image/png;base64"
    return Image.open(io.BytesIO(base64.b64decode(data, validate=True)))


def test_grid_puts_every_pixel_in_its_place():
    images = np.arange(3 * 2 * 2, dtype=np.uint8).reshape(3, 2, 2, 1)
    grid = np.asarray(image_grid(images, columns=2, side=4))  # pixels become 2×2
    expected = np.full((4 + GUTTER + 4, 4 + GUTTER + 4), 255, np.uint8)
    for index, (top, left) in enumerate([(0, 0), (0, 4 + GUTTER), (4 + GUTTER, 0)]):
        expected[top : top + 4, left : left + 4] = np.kron(images[index, ..., 0], np.ones((2, 2), np.uint8))
    np.testing.assert_array_equal(grid, expected)


def test_grid_enlarges_only_small_pictures_and_keeps_colour():
    assert image_grid(np.zeros((1, 8, 8, 1), np.uint8), 4).size == (64, 64)
    large = np.random.default_rng(0).integers(0, 256, (2, 100, 80, 3), dtype=np.uint8)
    grid = image_grid(large, 2)
    assert grid.mode == "RGB"
    assert grid.size == (160 + GUTTER, 100)
    np.testing.assert_array_equal(np.asarray(grid)[:, 80 + GUTTER :], large[1])


@pytest.mark.parametrize(
    ("images", "columns", "said"),
    [
        (np.zeros((2, 8, 8, 1)), 2, "type float64"),
        (np.zeros((8, 8, 1), np.uint8), 2, r"shape \(8, 8, 1\)"),
        (np.zeros((0, 8, 8, 1), np.uint8), 2, r"shape \(0, 8, 8, 1\)"),
        (np.zeros((2, 8, 8, 4), np.uint8), 2, "1 or 3 channels"),
        (np.zeros((2, 8, 8, 1), np.uint8), 0, "0 columns"),
    ],
)
def test_grid_refuses_what_it_cannot_lay_out(images, columns, said):
    with pytest.raises(UserError, match=said):
        image_grid(images, columns)


def test_page_is_well_formed_and_fetches_nothing(results, pictures, curves, edits):
    html = build_report("Digits", results, pictures, curves, edits)
    page = Page(html)
    assert not re.search(r"https?:|//[a-z]|url\((?!#)|@import|<script|<link", re.sub(r'"data:[^"]*"', "", html))
    assert all(link.startswith(("data:image/png;base64,", "#")) for link in page.links)
    assert {link[1:] for link in page.links if link.startswith("#")} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    sections = ["pictures", "measurements", "points", "psnr", "exposure", "given", "attention", "edits"]
    assert [name for name in page.text if name != "top"] == [*sections, "training", "time", "made"]
    # PSNR, exposure bias and error accumulation by kind of point, attention of two students, losses of all
    assert html.count("<svg") == 2 + 2 + 2 + 2 + 2
    assert not [light for light, _ in PALETTE.values() if light in html.split("</style>")[1]]


def test_a_film_strip_shows_what_a_model_drew_after_so_many_steps(results):
    rng = np.random.default_rng(3)
    frames = {step: rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8) for step in range(0, 1200, 100)}
    progress = {"teacher": frames, "ard": {0: frames[0], 70: frames[300]}, "step": {}}
    page = Page(build_report("Digits", results, {}, {}, {}, {}, (), progress))
    by_alt = {image["alt"]: np.asarray(decoded(image))[::8, ::8] for image in page.images}
    shown = [0, 200, 300, 500, 600, 800, 900, 1100]  # eight of twelve, the first and the last too
    assert list(by_alt) == [f"Teacher after step {step}" for step in shown] + ["ARD after step 0", "ARD after step 70"]
    for step in shown:
        np.testing.assert_array_equal(by_alt[f"Teacher after step {step}"], frames[step])
    np.testing.assert_array_equal(by_alt["ARD after step 70"], frames[300])
    assert "Teacher, training step 0 200 300 500 600 800 900 1,100 ARD, " in re.sub(" +", " ", page.text["training"])
    assert "While they learned" not in build_report("Digits", results, {}, {})


def test_every_picture_of_the_page_decodes_to_what_was_handed_over(results, pictures, curves):
    page = Page(build_report("Digits", results, pictures, curves))
    # Finals: teacher, 2 students and their differences, twice. Progressions: noise and 4 steps by 3 rows for 4 samples
    # with x0 points, 2 with noisy ones, where the teacher's row (x0 points alone are here) shows only the last.
    assert len(page.images) == 2 * 5 * COUNT + 4 * 3 * (1 + STEPS) + 2 * (2 * (1 + STEPS) + 2)
    assert {decoded(image).size for image in page.images} == {(64, 64)}
    by_alt = {image["alt"]: np.asarray(decoded(image))[::8, ::8] for image in page.images}
    np.testing.assert_array_equal(by_alt["ARD, sample 2"], pictures["ard"][1, -1, ..., 0])
    np.testing.assert_array_equal(by_alt["ARD, sample 2, step 3 of 4"], pictures["ard"][1, 2, ..., 0])
    np.testing.assert_array_equal(by_alt["noise 3"], pictures["noise"][2, ..., 0])
    apart = np.abs(pictures["step"][0, -1].astype(int) - pictures["teacher"][0, -1])[..., 0]
    np.testing.assert_array_equal(by_alt["Step distillation, difference, sample 1"], np.minimum(3 * apart, 255))


def test_edits_stand_under_the_step_that_the_source_replaced(results, edits):
    page = Page(build_report("Digits", results, {}, {}, edits))
    by_alt = {image["alt"]: np.asarray(decoded(image))[::8, ::8] for image in page.images}
    assert len(page.images) == len(by_alt) == COUNT * (1 + STEPS)
    np.testing.assert_array_equal(by_alt["source 2"], edits["source"][1, ..., 0])
    np.testing.assert_array_equal(by_alt["ARD, edit 2, after step 3"], edits["ard"][1, 3, ..., 0])
    np.testing.assert_array_equal(by_alt["ARD, edit 2, no source"], edits["ard"][1, 0, ..., 0])
    assert "into 3" in page.text["edits"]


def test_pictures_stand_under_their_captions_those_held_out_apart(results, gallery):
    page = Page(build_report("Emoji", results, {}, {}, {}, gallery))
    by_alt = {image["alt"]: np.asarray(decoded(image))[::8, ::8] for image in page.images}
    assert len(page.images) == len(by_alt) == 4 * 5
    np.testing.assert_array_equal(by_alt["ARD: cat <face>"], gallery["ard"][1])
    np.testing.assert_array_equal(by_alt["The data’s own: man astronaut"], gallery["real"][4])
    said = page.text["captions"]
    trained, held_out = said.split("Captions held out of training")
    assert "fire" in trained and "woman astronaut" in held_out and "woman astronaut" not in trained
    assert not Page(build_report("Digits", results, {}, {}, {})).text.get("captions")


def test_distances_under_pictures_are_those_of_the_tables(results, pictures, gallery):
    """Those of small networks lie far below 1: with two decimals models would look alike."""
    for name, fd in {"teacher": 0.137, "step": 0.141, "ard": 0.1444, "ard_noisy": 1.444}.items():
        results["models"][name]["fd"] = fd
    page = Page(build_report("Emoji", results, pictures, {}, {}, gallery))
    assert [page.row(title)[1] for title in ("Teacher", "Step distillation", "ARD")] == ["0.137", "0.141", "0.144"]
    for section in ("pictures", "captions"):
        assert {"FD 0.137", "FD 0.141", "FD 0.144"} <= {*re.findall(r"FD [\d.]+", page.text[section])}
    assert "FD 1.44" in page.text["pictures"] and "FD 1.444" not in page.text["pictures"]


@pytest.mark.parametrize(("count", "said"), [(1797, "1,797 real images"), (None, "real images")])
def test_what_distances_are_between_is_said_whether_or_not_real_images_were_counted(results, count, said):
    """Of ADM's reference file nobody says how many there were."""
    results["real_images"] = count
    text = Page(build_report("Digits", results, {}, {})).text["top"]
    assert f"FD between 3,072 samples of each model and {said}, in 64 features" in text
    compared = {"quick": {}, "seeds": [0], "features": ["f"], "samples": 3072, "rows": [], "config": {}}
    text = report.markdown(compared | {"real_images": count})
    assert f"between 3,072 samples of each model and {said}, in f." in text


def test_the_recall_of_captions_stands_in_the_table(results):
    results["models"]["ard"] |= {"recall_at_1": {"trained": 0.314}, "recall_at_5": {"trained": 0.618, "held_out": 0.4}}
    results["judge"] = {
        "real": {"recall_at_1": {"trained": 0.9, "held_out": 0.8}, "recall_at_5": {"trained": 0.99, "held_out": 0.97}}
    }
    page = Page(build_report("Emoji", results, {}, {}, {}, {}))
    place = page.row("Model").index("Caption in first 5, trained / held out\u00a0↑")
    assert page.row("ARD")[place - 1 : place + 1] == ["31 %", "62 % / 40 %"] and page.row("Teacher")[place] == "–"
    assert not any("Caption" in cell for cell in Page(build_report("", results | {"models": {}}, {}, {})).rows)


def test_attention_is_written_in_percent_into_the_cells_of_the_blocks_that_are_seen():
    mass = np.array([[[1.0 + 1e-8, 0, 0], [0.25, 0.75, 0], [0.5, 0.125, 0.375]]])  # a mean of float32, rounded up
    svg = block_maps("mass", mass)
    said = [node.text for node in ElementTree.fromstring(svg).iter("text")]
    assert said == ["noise", "1", "2"] * 2 + ["100", "25", "75", "50", "12", "38", "layer 1"]
    faint = [float(alpha) for alpha in re.findall(r"var\(--ard\); opacity: ([0-9.]+)", svg)]
    np.testing.assert_allclose(faint, [0.08 + 0.92 * share for share in (0.25, 0.75, 0.5, 0.125, 0.375)])


def test_page_of_a_sweep(results, pictures):
    """Two workdirs, each with a teacher of its own; FD along a setting, a line for what is alike in the others."""
    teacher = results["models"]["teacher"]
    entries = {
        f"{mask}_{layers}": {
            "workdir": f"x/{mask}",
            "settings": {"student.history_layers": layers, "student.mask": mask},
            "over": layers,
            "teacher": teacher | {"fd": teacher["fd"] + (mask == "window")},
            "results": student("x0", "causal", 20.0 + layers, 3.0),
        }
        for mask in ("causal", "window")
        for layers in (2, 0, 1)
    }
    drawn = {
        f"x/{mask}": {"teacher": pictures["teacher"]} | {f"{mask}_{n}": pictures["ard"] for n in (0, 1)}
        for mask in ("causal", "window")
    }
    about = "Layers & masks\n\nWhat is\nasked.\n\nTwo minutes."
    table = (("Entry", "FD"), [["teacher", "17.60"], ["causal_2", "22.00"]])
    found = {"sweep": "a.py", "config": "b.py", "settings": {}, "entries": entries}
    html = build_sweep(about, table, found, drawn, "student.history_layers")
    page = Page(html)
    assert len(page.ids) == len(set(page.ids)) and "Layers & masks" in page.text["top"] and "What is asked." in html
    assert page.row("causal_2") == ["causal_2", "22.00"]
    chart = html[html.index('id="over"') : html.index('id="workdir-0"')]
    assert [len(re.findall(rf"<use [^>]*--{colour}", chart)) for colour in ("ard", "step", "teacher")] == [3, 3, 6]
    assert "mask causal" in chart and "mask window" in chart
    assert len(page.images) == 2 * (COUNT + 2 * 2 * COUNT)  # the teacher, two students and their differences, twice
    assert html.count("layer 1") == 6 and "over" not in Page(build_sweep(about, table, found, {}, None)).text


def test_a_sweep_whose_images_were_too_few_for_a_distance(results):
    teacher = {key: value for key, value in results["models"]["teacher"].items() if key != "fd"}
    student_ = {key: value for key, value in student("x0", "causal", 20.0, 3.0).items() if key != "fd"}
    entry = {"workdir": "x", "settings": {"student.steps": 2}, "over": 2, "teacher": teacher, "results": student_}
    found = {"sweep": "a.py", "config": "b.py", "settings": {}, "entries": {"two": entry}}
    page = Page(build_sweep("About.", (("Entry", "FD"), [["two", "–"]]), found, {}, "student.steps"))
    assert page.row("two") == ["two", "–"] and "The entries have no Fréchet distances" in page.text["over"]


def test_large_colour_pictures_are_reduced(results):
    rng = np.random.default_rng(0)
    points = rng.integers(0, 256, (10, STEPS, 256, 256, 3), dtype=np.uint8)
    page = Page(build_report("Large", results, {"teacher": points, "ard": points}, {}))
    assert {(decoded(image).size, decoded(image).mode) for image in page.images} == {((160, 160), "RGB")}
    assert len(page.images) == 3 * 8 + 4 * 2 * STEPS
    assert all(np.asarray(decoded(image)).max() == 0 for image in page.images if "difference" in image["alt"])


def test_fewer_steps_stand_where_the_trajectory_has_got_to(results, pictures):
    pictures["ard"] = pictures["ard"][:, [1, 3]]
    html = build_report("Digits", results, pictures, {})
    block = html.split('class="progression"')[1]
    cells = re.findall(r'<span></span>|alt="(ARD, sample 1[^"]*)"', block[block.index(">ARD<") :])
    assert cells[:4] == ["", "ARD, sample 1, step 1 of 2", "", "ARD, sample 1, step 2 of 2"]


def test_noisy_points_of_the_teacher_are_shown_where_they_are_given(results, pictures):
    pictures["teacher_xt"] = pictures["teacher"][::-1].copy()
    page = Page(build_report("Digits", results, pictures, {}))
    shown = [np.asarray(decoded(i))[::8, ::8] for i in page.images if i["alt"] == "Teacher, sample 1, step 2 of 4"]
    np.testing.assert_array_equal(shown, [pictures["teacher"][0, 1, ..., 0], pictures["teacher_xt"][0, 1, ..., 0]])


def test_table_cells(results):
    page = Page(build_report("Digits", results, {}, {}))
    none = words.ABSENT
    assert page.row("Teacher") == ["Teacher", "17.60", none, "0.934", "0.800", none, "50", "3.53", "4.10", "467,216"]
    ard = ["ARD", "22.91", "5.31", "0.910", "0.724", "26.1", "4", "0.0291", "0.312", "480,512"]
    assert page.row("ARD") == ard
    assert page.row("Step distillation, noisy points")[:3] == ["Step distillation, noisy points", "18.30", "0.700"]
    assert page.row("x0 points") == ["x0 points", "+41.92", "+5.31", "7.9"]
    assert page.row("Noisy points") == ["Noisy points", "+0.700", "+0.300", "2.3"]
    assert page.row("distill/ard") == ["distill/ard", "", "40.0 s"]
    assert page.row("total") == ["total", "", "2 min 0 s"]


def test_noise_stands_in_the_table_beside_the_models(results):
    results["models"]["teacher"] |= {"fd_interval": [17.1, 18.2], "fd_halves": 1.25, "fd_least": 0.75}
    results["halves"] = {"fd": 0.5}
    results["models"]["ard"] |= {"degradation": 5.31, "degradation_interval": [4.5, 6.12]}
    results["models"]["ard_noisy"] |= {"degradation": 0.4, "degradation_interval": [-0.125, 0.9]}
    page, none = Page(build_report("Digits", results, {}, {})), words.ABSENT
    assert page.row("Model")[1:5] == ["FD\u00a0↓", "95 % interval", "Degradation\u00a0↓", "its 95 % interval"]
    assert page.row("ARD")[3:5] == ["5.31", "4.50–6.12"]
    assert page.row("ARD, noisy points")[4] == "\N{MINUS SIGN}0.125 to 0.900"
    assert "pairs of the same noise and condition" in page.text["measurements"]
    assert page.row("Teacher")[1:3] == ["17.60", "17.10–18.20"] and page.row("ARD")[2] == none
    assert page.row("Two halves of the real images") == ["Two halves of the real images", "0.500", *[none] * 10]
    assert page.row("Two halves of the teacher’s samples")[:3] == ["Two halves of the teacher’s samples", "1.25", none]
    assert page.row("Real pictures of the samples’ captions")[1:3] == ["0.750", none]
    assert "draws that makes no mistake" in page.text["measurements"]
    assert "are apart by chance alone" in page.text["measurements"] and "by bootstrap" in page.text["measurements"]
    assert "Paper: ARD, 4 steps" not in [row[0] for row in page.rows]


IMAGENET = {"data": {"num_classes": 1000, "image_size": 32, "space": "latent"}}


@pytest.mark.parametrize(
    "published, config, dtype",
    [
        (True, IMAGENET, "float32"),
        (True, IMAGENET, "bfloat16"),
        (False, IMAGENET, "float32"),
        (True, {"data": {}}, "float32"),
    ],
)
def test_the_paper_s_rows_stand_beside_what_was_measured_alike(results, published, config, dtype):
    fid = {"fid": 17.604, "sfid": 6.5, "inception_score": 226.04}
    results["models"]["teacher"] |= fid
    results |= {"config": config, "measured_with": {"published_weights": published, "dtype": dtype}}
    page = Page(build_report("ImageNet", results, {}, {}))
    assert page.row("Model")[1:5] == ["FID\u00a0↓", "sFID\u00a0↓", "IS\u00a0↑", "Degradation\u00a0↓"]
    assert page.row("Teacher")[1:4] == ["17.60", "6.50", "226.0"]
    alike = published and config is IMAGENET and dtype == "float32"
    assert alike == ("Paper: ARD, 4 steps" in [row[0] for row in page.rows])
    assert alike == ("in the features that they are of" in page.text["top"])
    if alike:
        none = words.ABSENT
        assert page.row("Paper: ARD, 4 steps")[1:7] == ["4.32", none, "209.0", none, "0.770", "0.574"]


def test_headline_says_the_ratio_and_whose_the_other_one_is(results):
    lead, detail = headline(results)
    assert lead == "Distilled to 4 steps, step distillation falls 7.9 times as far behind its teacher as ARD does."
    assert detail == (
        "In Fréchet distance (FD), step distillation stands at +41.92 against the teacher’s 17.60, ARD at +5.31."
    )
    top = Page(build_report("Digits", results, {}, {})).text["top"]
    assert "7.9×" in top
    assert "Measured here, on this data" in top
    assert "The paper (arXiv 2504.11295) reports for ImageNet 256×256" in top
    assert "5.1. Those are the paper’s numbers" in top


@pytest.mark.parametrize(
    ("changes", "ratio", "said"),
    [
        ({"ard": -0.4}, None, "No degradation ratio can be given: ARD is no worse than the teacher by this measure."),
        ({"ard": -0.4, "step": -1}, 2.5, "step distillation and ARD are no worse than the teacher by this measure."),
        ({"ard": math.nan}, math.nan, "The two students cannot be compared here."),
        ({}, None, "No degradation ratio was computed for these results."),
        ({}, 0.5, "ARD falls 2.0 times as far behind its teacher as step distillation does."),
        ({}, 1.02, "ARD and step distillation fall about equally far behind their teacher."),
    ],
)
def test_headline_does_not_claim_more_than_there_is(results, changes, ratio, said):
    results["degradation_ratio"] = results["degradation_ratios"]["x0"] = ratio
    for name, value in changes.items():
        results["models"][name]["degradation"] = value
    page = Page(build_report("Digits", results, {}, {}))
    assert headline(results)[0].endswith(said)
    assert said in page.text["top"]
    if changes:
        assert "×" not in page.text["top"].replace("256×256", "")
        assert page.row("x0 points")[-1] == "none"


@pytest.mark.parametrize(("levels", "said"), [(("ard",), "ARD"), (("step", "ard"), "step distillation and ARD")])
def test_a_ratio_of_what_may_be_nothing_is_no_headline(results, levels, said):
    for name in levels:
        results["models"][name]["degradation_interval"] = [-0.5, 60.0]
    page = Page(build_report("Digits", results, {}, {}))
    lead = f"No degradation ratio can be given: {said} cannot be told from the teacher by these samples."
    assert headline(results)[0] == lead and lead in page.text["top"] and "7.9×" not in page.text["top"]
    for name in levels:
        results["models"][name]["degradation_interval"] = [0.5, 60.0]
    assert "7.9×" in Page(build_report("Digits", results, {}, {})).text["top"]


def test_missing_baseline_is_named(results):
    del results["models"]["step"]
    lead, _ = headline(results)
    assert lead == "These results hold no step distillation with x0 points, so the two cannot be compared here."
    assert Page(build_report("Digits", results, {}, {})).row("x0 points") == ["x0 points", "–", "+5.31", "–"]


def test_a_run_of_noisy_points_alone_is_about_them(results, pictures):
    for name in ("ard", "step"):
        del results["models"][name], pictures[name]
    results["degradation_ratio"] = results["degradation_ratios"]["xt"]
    page = Page(build_report("Digits", results, pictures, {}))
    lead = "Distilled to 4 steps with noisy points, step distillation falls 2.3 times as far behind its teacher"
    assert headline(results)[0] == f"{lead} as ARD does." and lead in page.text["top"]
    assert "2.3×" in page.text["top"] and "18.30" in page.text["top"] and "17.90" in page.text["top"]
    del results["models"]["step_noisy"]
    assert headline(results)[0].startswith("These results hold no step distillation with noisy points, so")


def test_all_text_is_escaped(results, pictures, curves):
    evil = '<script>alert("1")</script>&'
    results["features"] = results["models"]["ard"]["title"] = evil
    results["models"][evil] = results["models"].pop("ard") | {"parameters": evil}
    results["seconds"][evil] = 1.0
    results["config"][evil] = evil
    pictures[evil] = pictures.pop("ard")
    pictures["label"] = np.array([evil] * COUNT)
    curves[evil] = curves.pop("ard")
    html = build_report(evil, results, pictures, curves)
    page = Page(html)
    assert "<script" not in html
    assert {"script", "/script"}.isdisjoint(page.open)
    for section in ("top", "pictures", "measurements", "psnr", "exposure", "training", "time"):
        assert evil in page.text[section]
    assert page.row(evil)[-1] == evil
    assert f"{evil}, sample 1" in [image["alt"] for image in page.images]
    assert '"data": "<digits>"' in page.text["made"]


def test_titles_are_escaped(results):
    title, escaped = '<b>&"x"</b>', "&lt;b&gt;&amp;&#34;x&#34;&lt;/b&gt;"
    entry = {"workdir": "x", "settings": {}, "over": 0, "teacher": results["models"]["teacher"]}
    entry["results"] = results["models"]["ard"]
    sweep = build_sweep(f"{title}\n\n{title}", (("Entry",), [[title]]), {"entries": {title: entry}}, {}, None)
    for page, times in ((build_report(title, results, {}, {}), 2), (sweep, 6)):
        assert title not in page and f"<h1>{escaped}</h1>" in page and page.count(escaped) >= times


@pytest.mark.parametrize("results_", [{}, {"models": {}, "seconds": None, "degradation_ratios": None}])
def test_nothing_at_all_still_makes_a_page(results_):
    page = Page(build_report("Empty", results_, None, None))
    assert "hold no step distillation and no ARD" in page.text["top"]
    assert "needs a decoder" in page.text["pictures"]
    assert "No model was measured." in page.text["measurements"]
    assert "hold no student with x0 points" in page.text["points"]
    assert "hold no student with noisy points" in page.text["points"]
    assert "was not measured" in page.text["psnr"]
    assert "were not measured" in page.text["exposure"]
    assert "No student was run from" in page.text["given"]
    assert "hold no student whose attention" in page.text["attention"]
    assert "hold no edited images" in page.text["edits"]
    assert "no loss curves" in page.text["training"]
    assert "not recorded" in page.text["time"]
    assert "not handed over" in page.text["made"]


def _paths(value, path=()):
    if isinstance(value, dict):
        for key, child in value.items():
            yield (*path, key)
            yield from _paths(child, (*path, key))


@pytest.mark.slow
def test_no_single_missing_key_breaks_the_page(results, pictures, curves, edits):
    for name in ("ard_noisy", "step_noisy"):  # to be quick; they pass through the same code
        del results["models"][name], pictures[name]
    pictures |= {name: images[:1, :, :1, :1] for name, images in pictures.items() if images.ndim == 5}
    given = {"results": results, "pictures": pictures, "curves": curves, "edits": edits}
    paths = [path for path in _paths(given) if len(path) > 1 and "step" not in path[:-1]]
    assert ("results", "models", "ard", "psnr_per_step") in paths
    for *parents, key in paths:
        holder = given
        for parent in parents:
            holder = holder[parent]
        kept = dict(holder)
        del holder[key]
        Page(build_report("Digits", results, pictures, curves, edits))
        holder.clear()
        holder.update(kept)


def test_numbers_that_are_not_finite_are_words(results, curves):
    results["models"]["ard"] |= {"fd": math.nan, "degradation": math.nan, "precision": math.inf, "psnr": -math.inf}
    results["models"]["ard"] |= {"seconds_per_image": math.nan, "gmac_per_image": None}
    results["models"]["ard"] |= {"psnr_per_step": [math.nan] * 4, "rollout_mse": [0.1, None, math.inf, 0.2]}
    results["seconds"]["distill/ard"] = math.nan
    curves["ard"] = [{"step": 1, "loss": math.nan}, {"step": 2, "loss": None}, {"loss": 1.0}]
    html = build_report("Digits", results, {}, curves)
    row = Page(html).row("ARD")
    assert row[1:4] == ["not a number", "not a number", "infinite"]
    assert row[5:9] == ["minus infinite", "4", "–", "not a number"]
    assert Page(html).row("distill/ard") == ["distill/ard", "", "not a number"]
    assert Page(html).row("total") == ["total", "", "1 min 20 s"]
    assert not re.search(r"\bnan\b|\binf\b", html)


@pytest.mark.parametrize(
    ("said", "value"),
    [
        (words.number(-1234.5), "−1,234.50"),
        (words.number(None), "–"),
        (words.number(np.float32(0.5), ".3f"), "0.500"),
        (words.significant(5931.2), "5,931"),
        (words.significant(0.00123456), "0.00123"),
        (words.significant(47.26), "47.3"),
        (words.duration(4.24), "4.2 s"),
        (words.duration(59.97), "1 min 0 s"),
        (words.duration(3599.7), "1 h 0 min"),
        (words.duration(2 * 3600 + 299), "2 h 5 min"),
        (words.duration(None), "–"),
    ],
)
def test_numbers_as_people_write_them(said, value):
    assert said == value


def test_models_of_one_title_are_told_apart():
    models = {"teacher": {"kind": "teacher"}, "a": {"title": "ARD"}, "b": {"title": "ARD"}, "s": {"mask": "diagonal"}}
    models["n"] = {"title": "ARD", "target": "xt"}
    named = words.titles({name: Measured.from_json(model) for name, model in models.items()})
    assert named == {
        "teacher": "Teacher",
        "a": "ARD (a)",
        "b": "ARD (b)",
        "s": "Step distillation",
        "n": "ARD, noisy points",
    }


def test_chart_draws_its_points_and_nothing_that_has_no_place():
    svg = line_chart("loss", [Series("a", "ard", [1, 2, 3], [1.0, 0.0, 0.1])], "step", "loss", log=True, markers=True)
    assert len(re.findall(r"<use [^>]*--ard", svg)) == 2  # markers; zero has no logarithm
    assert 'aria-label="loss by step: a"' in svg
    assert all(name.startswith("loss-") for name in re.findall(r' id="([^"]*)"', svg))
    assert line_chart("none", [Series("a", "ard", [1, 2], [math.nan, -1.0])], "step", "loss", log=True) is None


def test_long_curves_become_means():
    rows = [{"step": i, "loss": 2.0 if i % 2 else 1.0} for i in range(600)]
    steps, losses = thin(rows)
    assert steps == [2 * i + 0.5 for i in range(300)]
    assert losses == [1.5] * 300
    assert thin(rows[:3] + [{"step": 3, "loss": math.nan}, {"step": 4}]) == ([0, 1, 2], [1, 2, 1])


def test_teaser_shows_the_three_rows_pixel_for_pixel(results, pictures):
    image = np.asarray(Image.open(io.BytesIO(teaser(pictures, results))).convert("L"))
    strip, margin, gap, left = 96, 24, 14, 330
    assert image.shape == (2 * margin + 3 * strip + 2 * gap, left + COUNT * (strip + GUTTER) - GUTTER + margin)
    for row, name in enumerate(["teacher", "step", "ard"]):
        top = margin + row * (strip + gap)
        cell = image[top : top + strip, left + 2 * (strip + GUTTER) :][:, :strip]
        np.testing.assert_array_equal(cell[6::12, 6::12], pictures[name][2, -1, ..., 0])
        assert image[top : top + strip, :left].min() < 100  # the row has a title


def test_teaser_of_captions_has_them_under_its_columns(results, pictures, gallery):
    image = np.asarray(Image.open(io.BytesIO(teaser(pictures, results, gallery))).convert("RGB"))
    strip, margin, gap, left = 128, 24, 14, 330
    foot = image.shape[0] - (2 * margin + 3 * strip + 2 * gap)
    assert foot > 20 and image.shape[1] == left + 5 * (strip + GUTTER) - GUTTER + margin
    for row, name in enumerate(["teacher", "ard", "step"]):
        cell = image[margin + row * (strip + gap) :, left + 3 * (strip + GUTTER) :][:strip, :strip]
        np.testing.assert_array_equal(cell[8::16, 8::16], gallery[name][3])
    below = image[margin + 3 * strip + 2 * gap :, left + 3 * (strip + GUTTER) :][:, :strip]
    assert below.min() < 160  # the caption


def test_what_people_write_is_drawn_as_they_wrote_it(results, pictures, gallery):
    r"""Two dollars are no formula: \foo is none that matplotlib knows, and it would stop at it."""
    plain = teaser(pictures, results, gallery)
    gallery["label"] = np.array(["a $\\foo$ b", *gallery["label"][1:]])
    results["models"]["ard"]["title"] = "ARD $\\foo$"
    assert teaser(pictures, results, gallery) != plain and teaser(pictures, results)


def test_teaser_without_a_student_says_what_it_needs(results, pictures):
    with pytest.raises(UserError, match=r"got \['noise', 'teacher'\]: evaluate them first"):
        teaser({"teacher": pictures["teacher"], "noise": pictures["noise"]}, results)


def rival(objective, fd):
    """A student of another objective as evaluate measures it: without mask, history and forced errors."""
    model = student("x0", None, fd, fd - 17.604, objective=objective)
    return {key: value for key, value in model.items() if key not in ("mask", "history_layers")} | {
        "forced_mse": None,
        "rollout_mse": None,
    }


def test_rivals_are_named_and_never_taken_for_ard(results, pictures):
    names = {"cd": "consistency", "dm": "distribution_matching", "mine": "my.method"}
    rivals = {name: rival(objective, 20.0 + i) for i, (name, objective) in enumerate(names.items())}
    before = results["models"]
    results["models"] = {"teacher": before["teacher"], **rivals, **before}
    pictures |= {name: pictures["ard"] for name in rivals}
    page = Page(build_report("t", results, pictures, {}))
    assert page.row("Consistency distillation")[1] == "20.00"
    assert page.row("Distribution matching")[1] == "21.00" and page.row("my.method")[1] == "22.00"
    assert page.row("ARD")[1] == "22.91"
    assert pair(Results.from_json(results).models, "x0") == ("step", "ard")
    assert "step distillation falls 7.9 times as far behind" in headline(results)[0]
    assert "Consistency distillation, rollout" not in page.text["exposure"]
    assert "ARD, rollout" in page.text["exposure"]


def test_the_page_says_which_students_have_learnt_their_trajectories_by_heart(results, pictures):
    results["models"]["ard"] |= {"trained_mse": [0.0019, 0.0004, 0.001, 0.0008], "times_seen": 9.37}
    results["models"]["step"] |= {"trained_mse": [0.0018, 0.0007, 0.001, 0.001]}  # 1.43 times at most
    results["models"]["ard_noisy"] |= {"trained_mse": [0.0, None, 0.0001, 0.001], "times_seen": None}
    said = Page(build_report("t", results, pictures, {})).text["exposure"]
    assert (
        "ARD errs 2.5 times as much on fresh noise, at step 2, as on trajectories that it was trained on, each of "
        "which it saw 9.4 times: more trajectories (trajectories.count) would help it more than more training."
    ) in said
    assert "ARD, noisy points errs 10.0 times as much on fresh noise, at step 3, as on trajectories that it " in said
    assert said.count("as much on fresh noise") == 2 and "trained on: more trajectories" in said


def test_a_run_of_rivals_alone(results, pictures):
    results["models"] = {"teacher": results["models"]["teacher"], "cd": rival("consistency", 20.0)}
    pictures = {name: pictures[name] for name in ("teacher", "noise", "label")} | {"cd": pictures["step"]}
    page = Page(build_report("t", results, pictures, {}))
    assert "no step distillation and no ARD with x0 points" in page.text["top"] + "".join(page.text.values())
    assert "Errors by step were not measured" in page.text["exposure"]
    with_ard = results | {"models": {"teacher": results["models"]["teacher"], "step": student("x0", "diagonal", 1, 1)}}
    expected = teaser(pictures | {"step": pictures["cd"]}, with_ard)
    image, other = (
        np.asarray(Image.open(io.BytesIO(data)).convert("L")) for data in (teaser(pictures, results), expected)
    )
    np.testing.assert_array_equal(image[:, 330:], other[:, 330:])  # the same pictures, under another title
    assert (image[:, :330] != other[:, :330]).any()
