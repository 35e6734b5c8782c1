"""The judge of captions: it tells right ones from wrong ones, also where they differ by a word or by its place."""

import numpy as np
import pytest

from ard_jax.errors import UserError
from ard_jax.evaluation import disturb, train_judge
from ard_jax.evaluation.judge import RIVALS, _rivals

COLOURS = {"red": (220, 30, 30), "green": (30, 160, 30), "blue": (30, 30, 220), "black": (0, 0, 0)}


def patches():
    """16×16 pictures of two colours, "left A right B", and their captions."""
    images, captions = [], []
    for left in COLOURS:
        for right in COLOURS:
            image = np.full((16, 16, 3), 255, np.uint8)
            image[4:12, 2:7], image[4:12, 9:14] = COLOURS[left], COLOURS[right]
            images.append(image)
            captions.append(f"{left} beside {right}")
    return np.stack(images), captions


@pytest.fixture(scope="module")
def judge():
    return train_judge(*patches(), steps=150)


def test_it_finds_the_captions_of_real_images(judge):
    images, captions = patches()
    assert judge.recall(images, captions) == {1: 1.0, 5: 1.0}
    assert judge.recall(disturb(images, np.random.default_rng(5)), captions)[1] >= 0.9


def test_wrong_captions_are_found_wrong(judge):
    images, captions = patches()
    turned = [" beside ".join(reversed(caption.split(" beside "))) for caption in captions]
    same = sum(caption == other for caption, other in zip(captions, turned, strict=True))
    assert judge.recall(images, turned)[1] == same / len(captions)  # "red beside blue" is not "blue beside red"
    assert judge.recall(images, captions[1:] + captions[:1])[1] == 0


def test_recall_counts_the_place_of_the_own_caption(judge):
    images, captions = patches()
    moved = captions[1:] + captions[:1]
    shares = judge.recall(images, moved, ks=(1, 4, 16))
    assert 0 == shares[1] <= shares[4] < shares[16] == 1


def test_it_is_a_function_of_what_it_is_given():
    images, captions = patches()
    one, two, other = (train_judge(images, captions, seed=seed, steps=5) for seed in (0, 0, 1))
    assert np.array_equal(one(images), two(images)) and not np.allclose(one(images), other(images))


def test_its_features_are_those_of_images_alone(judge):
    images, _ = patches()
    features = judge(images)
    assert features.shape == (16, judge.num_features) and features.dtype == np.float64
    assert np.allclose(judge(images[3:5]), features[3:5], atol=1e-5)
    with pytest.raises(UserError, match="the judge was trained on \\(16, 16, 3\\)"):
        judge(np.zeros((1, 8, 8, 3), np.uint8))


@pytest.mark.parametrize("count", [RIVALS + 1, RIVALS + 100, RIVALS + 256, 2 * RIVALS])
def test_rivals_are_always_as_many_and_any_caption_may_be_one(count):
    own, rng = np.repeat(np.arange(128, dtype=np.int32), 2), np.random.default_rng(0)
    drawn = [_rivals(own, count, rng) for _ in range(30)]
    for shown, places in drawn:
        assert len(set(shown.tolist())) == len(shown) == RIVALS and np.array_equal(shown[places], own)
    assert set().union(*(shown.tolist() for shown, _ in drawn)) == set(range(count))


def test_captions_that_several_images_share():
    images, captions = patches()
    judge = train_judge(np.concatenate([images, images]), captions * 2, steps=60)
    assert len(judge.captions) == 16 and judge.recall(images, captions)[5] > 0.9


@pytest.mark.parametrize(
    ("images", "captions", "steps", "said"),
    [
        (16, ["a"] * 16, 1, "16 images and 1 captions, but needs one an image, and two that differ"),
        (16, ["a", "b"], 1, "16 images and 2 captions"),
        (2, ["a", "b"], 0, "train for 0 steps, but needs at least 1"),
    ],
)
def test_what_no_judge_can_learn_from(images, captions, steps, said):
    with pytest.raises(UserError, match=said):
        train_judge(np.zeros((images, 8, 8, 3), np.uint8), captions, steps=steps)


def test_disturbed_images_stay_close_and_change():
    images, _ = patches()
    changed = disturb(images, np.random.default_rng(0))
    assert changed.dtype == np.uint8 and changed.shape == images.shape
    assert 0 < np.abs(changed.astype(int) - images).mean() < 40
