"""What a CLIP is shown, against transformers' processors, and the scores that are made of its vectors."""

import json
import math

import numpy as np
import pytest
from PIL import Image

from ard_jax.errors import UserError
from ard_jax.evaluation import (
    CLIP_SCORE_PREFIX,
    clip_score,
    clip_similarity,
    compbench_non_spatial,
    hps_v2,
    images_for_clip,
    pick_score,
)
from ard_jax.evaluation.clip_images import MEAN, STANDARD_DEVIATION
from ard_jax.text import open_tokenizer, tokens_for_clip

TEXTS = [
    "",
    "a red apple",
    "A  Red\nAPPLE's two!",
    "naïve café 12345 🍎",
    "a red " * 60,
    "<|endoftext|> as words",
]

# ---------------------------------------------------------------------------------------------------------- scores


def vectors():
    """Of 5 images and 5 texts, the first pair far apart, the fourth near, and lengths that shall not count."""
    random = np.random.default_rng(0)
    images, texts = random.normal(size=(2, 5, 7))
    texts[0], texts[3] = 0.1 * texts[0] - 2 * images[0], texts[3] + images[3]
    return (images * 3).astype(np.float32), (texts * 0.2).astype(np.float32)


def cosine(image, text):
    dot = sum(float(a) * float(b) for a, b in zip(image, text, strict=True))
    return dot / math.sqrt(sum(float(a) ** 2 for a in image)) / math.sqrt(sum(float(b) ** 2 for b in text))


def test_each_score_has_its_own_definition():
    images, texts = vectors()
    cosines = np.array([cosine(image, text) for image, text in zip(images, texts, strict=True)])
    assert cosines.min() == cosines[0] < -0.9 and (cosines > 0.1).any()
    expected = {
        clip_score: 2.5 * np.where(cosines > 0, cosines, 0),
        clip_similarity: 100 * cosines,
        hps_v2: 100 * cosines,
        compbench_non_spatial: cosines,
    }
    for score, values in expected.items():
        found = score(images, texts)
        assert found.dtype == np.float64
        np.testing.assert_allclose(found, values, rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(pick_score(images, texts, 4.5), 90.017131300521811 * cosines, rtol=1e-12)
    assert CLIP_SCORE_PREFIX == "A photo depicts "


def test_equal_vectors_have_the_highest_scores():
    images, _ = vectors()
    np.testing.assert_allclose(clip_score(images, 5 * images), np.full(5, 2.5), rtol=1e-12)
    np.testing.assert_allclose(pick_score(images, images, math.log(100)), np.full(5, 100), rtol=1e-12)


def test_vectors_that_cannot_be_compared_are_refused():
    images, texts = vectors()
    with pytest.raises(UserError, match=r"images have shape \(5, 7\) and those of texts \(4, 7\), but both must be"):
        clip_score(images, texts[:4])
    with pytest.raises(UserError, match=r"The vectors of texts have shape \(7,\)"):
        hps_v2(images, texts[0])
    with pytest.raises(UserError, match="The vector of text 2 is zero, so it has no direction"):
        clip_similarity(images, texts * (np.arange(5) != 2)[:, None])
    images[3, 1] = np.nan
    with pytest.raises(UserError, match="The vectors of images of 1 of 5 samples, first of sample 3, are not finite"):
        compbench_non_spatial(images, texts)
    with pytest.raises(UserError, match="logit_scale is inf, but it must be finite"):
        pick_score(texts, texts, math.inf)


# ---------------------------------------------------------------------------------------------------------- images


def picture(width, height, channels=3):
    """Noise over a slope, so that filters and shifts show."""
    random = np.random.default_rng(width * height)
    slope = np.linspace(0, 200, width)[None, :, None] * np.linspace(1, 0.3, height)[:, None, None]
    return (slope + random.integers(0, 56, size=(height, width, channels))).astype(np.uint8)


SIZES = [(224, 224), (300, 224), (224, 301), (97, 61), (61, 98), (640, 333), (500, 333), (1, 9), (37, 37)]


@pytest.mark.oracle
@pytest.mark.parametrize("side", [224, 31])
def test_pictures_are_cropped_as_in_transformers(side):
    from transformers import CLIPImageProcessor

    processor = CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    pictures = [Image.fromarray(picture(*size)) for size in SIZES]
    pictures += [Image.fromarray(picture(90, 60)[:, :, 0]), Image.fromarray(picture(90, 60)).quantize(16)]
    pictures += [Image.fromarray(picture(60, 90, 4), "RGBA")]
    theirs = np.stack(processor(pictures)["pixel_values"])
    ours = images_for_clip(pictures, side)
    assert ours.shape == (len(pictures), side, side, 3) and ours.dtype == np.float32
    apart = np.abs(ours - theirs.transpose(0, 2, 3, 1)).reshape(len(pictures), -1).max(axis=1)
    assert apart.max() < 1e-5 < 1 / 255
    arrays = images_for_clip([picture(*size) for size in SIZES], side)
    np.testing.assert_array_equal(arrays, ours[: len(SIZES)])


def unnormalised(images):
    """Back to 0 … 255."""
    return np.rint((images * np.array(STANDARD_DEVIATION) + np.array(MEAN)) * 255).astype(int)


def test_a_picture_of_the_right_size_is_only_normalised():
    image = picture(16, 16)
    (found,) = images_for_clip([image], 16)
    np.testing.assert_allclose(found[3, 5], (image[3, 5] / 255 - MEAN) / STANDARD_DEVIATION, rtol=1e-5)
    np.testing.assert_array_equal(unnormalised(found), image)
    np.testing.assert_array_equal(images_for_clip([image], 16, "pad")[0], found)


@pytest.mark.parametrize(("width", "height", "place"), [(40, 25, (3, 0, 10, 16)), (25, 40, (0, 3, 16, 10))])
def test_a_padded_picture_is_whole_and_in_the_middle(width, height, place):
    """HPSv2's: 40×25 becomes 16×10, with 3 black rows above and 3 below."""
    top, left, rows, columns = place
    image = Image.fromarray(np.maximum(picture(width, height), 30))
    found = unnormalised(images_for_clip([image], 16, "pad")[0])
    inside = found[top : top + rows, left : left + columns]
    np.testing.assert_array_equal(inside, np.asarray(image.resize((columns, rows), Image.Resampling.BICUBIC)))
    assert found.sum() == inside.sum() and inside.min() > 0


def test_the_odd_row_of_padding_is_below():
    image = np.full((9, 16, 3), 255, np.uint8)
    found = unnormalised(images_for_clip([image], 16, "pad")[0])[:, 4, 1]
    assert found.tolist() == [0] * 3 + [255] * 9 + [0] * 4
    assert unnormalised(images_for_clip([np.full((1, 90, 3), 255, np.uint8)], 16, "pad"))[0, :, 4, 1].sum() == 255


def test_one_channel_and_transparency():
    grey = picture(20, 16, 1)
    np.testing.assert_array_equal(images_for_clip([grey], 16), images_for_clip([grey.repeat(3, axis=2)], 16))
    clear = Image.fromarray(np.concatenate([picture(16, 16), np.zeros((16, 16, 1), np.uint8)], axis=2), "RGBA")
    assert (unnormalised(images_for_clip([clear], 16)) == 255).all()


def test_what_is_no_picture_is_refused():
    with pytest.raises(UserError, match="fit is 'stretch', which does not exist: choose one of crop, pad"):
        images_for_clip([picture(4, 4)], 16, "stretch")
    with pytest.raises(UserError, match="side is 0, but it must be at least 1"):
        images_for_clip([picture(4, 4)], 0)
    with pytest.raises(UserError, match="There is no image to show to a CLIP"):
        images_for_clip([])
    for wrong in (picture(4, 4) / 255, picture(4, 4)[0], picture(4, 4).transpose(2, 0, 1), picture(4, 0)):
        with pytest.raises(UserError, match=r"An image is \w+ of shape .*, but uint8 \(height, width, channel\)"):
            images_for_clip([wrong])
    with pytest.raises(UserError, match="An image has I;16 pixels, but 8 bits a channel are needed"):
        images_for_clip([Image.fromarray(np.zeros((4, 4), np.uint16))])


# ---------------------------------------------------------------------------------------------------------- tokens


def vocabulary():
    """Bytes, bytes that end a word, some merges, and CLIP's start and end: the highest ids."""
    tokenizers = pytest.importorskip("tokenizers")
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    merges = [("r", "e"), ("re", "d</w>"), ("a", "p"), ("ap", "p"), ("l", "e</w>"), ("app", "le</w>"), ("t", "w")]
    names = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in merges)]
    names += ["<|startoftext|>", "<|endoftext|>"]
    return {name: number for number, name in enumerate(names)}, merges


@pytest.fixture
def tokenizer_json(tmp_path):
    """A small tokenizer.json of whole words, between a start and an end, that pads as some files do."""
    tokenizers = pytest.importorskip("tokenizers")
    words = {"<pad>": 0, "red": 1, "apple": 2, "<start>": 3, "<end>": 4}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "<pad>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.RobertaProcessing(("<end>", 4), ("<start>", 3))
    tokenizer.enable_padding(length=30)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


@pytest.mark.oracle
def test_ids_are_those_of_transformers(tmp_path):
    from transformers import CLIPTokenizer

    names, merges = vocabulary()
    theirs = CLIPTokenizer(vocab=names, merges=merges)
    theirs.save_pretrained(tmp_path)
    for length in (77, 9):
        ids, mask, cut = tokens_for_clip(open_tokenizer(tmp_path), TEXTS, length)
        expected = theirs(TEXTS, truncation=True, max_length=length, padding="max_length")
        assert ids.shape == mask.shape == (len(TEXTS), length) and ids.dtype == np.int32
        np.testing.assert_array_equal(mask, np.array(expected["attention_mask"]) > 0)
        np.testing.assert_array_equal(ids[mask], np.array(expected["input_ids"])[mask])
        assert cut == sum(len(row) > length for row in theirs(TEXTS)["input_ids"]) > 0
        assert (ids[~mask] == 0).all() and (ids.max(axis=1) == names["<|endoftext|>"]).all()


def test_long_texts_are_cut_before_their_end_and_counted(tokenizer_json):
    ids, mask, cut = tokens_for_clip(open_tokenizer(tokenizer_json), ["red", "", "red apple apple red"], 5)
    assert ids.tolist() == [[3, 1, 4, 0, 0], [3, 4, 0, 0, 0], [3, 1, 2, 2, 4]]
    assert mask.tolist() == [[True] * 3 + [False] * 2, [True] * 2 + [False] * 3, [True] * 5] and cut == 1
    ids, mask, cut = tokens_for_clip(open_tokenizer(tokenizer_json), ["red " * 75])
    assert ids.shape == (1, 77) and mask.all() and cut == 0
    ids, mask, cut = tokens_for_clip(open_tokenizer(tokenizer_json), [])
    assert ids.shape == mask.shape == (0, 77) and cut == 0


def test_a_tokenizer_without_an_end_is_refused(tokenizer_json):
    with pytest.raises(UserError, match="length is 2, but a start, a token and an end need 3"):
        tokens_for_clip(open_tokenizer(tokenizer_json), ["red"], 2)
    bare = json.loads(tokenizer_json.read_text()) | {"post_processor": None}
    tokenizer_json.write_text(json.dumps(bare))
    with pytest.raises(UserError, match="tokenizer.json has 0 tokens for an empty text, but a CLIP's has a start"):
        tokens_for_clip(open_tokenizer(tokenizer_json), ["red"])
