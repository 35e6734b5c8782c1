import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from sklearn.datasets import load_digits

from ard_jax import evaluation
from ard_jax.errors import UserError
from ard_jax.evaluation import FeatureNet, FeatureStatistics, features, precision_recall
from ard_jax.files import tree_sha256


@pytest.fixture(scope="module")
def digits():
    data = load_digits()
    return np.round(data.images * 255 / 16).astype(np.uint8)[..., None], data.target


@pytest.fixture(scope="module")
def extractor(digits):
    return evaluation.train_feature_net(*digits, num_classes=10)


@pytest.fixture
def rng():
    return np.random.default_rng(7)


# Features


def test_classifier_learns_digits(extractor):
    assert extractor.held_out_accuracy >= 0.98
    assert extractor.train_accuracy >= 0.99
    assert extractor.image_shape == (8, 8, 1)


def test_reported_accuracy_is_of_the_extractors_own_network(extractor, digits):
    images, labels = digits
    _, logits = extractor.net.apply({"params": extractor.params}, images)
    right = np.asarray(logits).argmax(-1) == labels
    # 180 of the 1797 are held out; the two shares must add up to all images.
    assert right.sum() == round(extractor.train_accuracy * 1617) + round(extractor.held_out_accuracy * 180)


def test_training_is_a_function_of_its_arguments(digits):
    images, labels = digits[0][:300], digits[1][:300]

    def train(seed):
        return evaluation.train_feature_net(images, labels, 10, seed=seed, steps=8)

    first, again, other = train(0), train(0), train(1)
    assert tree_sha256(first.params) == tree_sha256(again.params)
    assert first.held_out_accuracy == again.held_out_accuracy
    assert tree_sha256(first.params) != tree_sha256(other.params)


class Recorded(np.ndarray):
    """Images that write down which rows are read from them."""

    def __array_finalize__(self, other):
        self.reads = []

    def __getitem__(self, rows):
        self.reads.append(rows)
        return np.asarray(self)[rows]


def rows_read(images, labels, steps):
    """Rows of each training batch, and those that train and held-out accuracy are of."""
    recorded = images.view(Recorded)
    evaluation.train_feature_net(recorded, labels, 10, steps=steps)
    reads = [rows for rows in recorded.reads if isinstance(rows, np.ndarray)]
    batches, scored = reads[:steps], reads[steps:]  # of which the held-out ones fit into the last batch
    assert max(map(len, batches)) <= 64 and max(map(len, scored)) <= 512
    return batches, np.concatenate(scored[:-1]), scored[-1]


def test_held_out_images_are_never_trained_on(digits):
    batches, train, held_out = rows_read(digits[0][:100], digits[1][:100], 20)
    assert len(train) == 90 and len(held_out) == 10 and not set(train) & set(held_out)
    assert set(np.concatenate(batches)) == set(train)


def test_an_epoch_shows_every_image_once(digits):
    batches, train, _ = rows_read(digits[0][:143], digits[1][:143], 4)  # 128 to train on, 2 batches of 64 an epoch
    for epoch in (batches[:2], batches[2:]):
        np.testing.assert_array_equal(np.sort(np.concatenate(epoch)), train)
    assert any((a != b).any() for a, b in zip(batches[:2], batches[2:], strict=True))


def test_shift_keeps_pixels_and_moves_at_most_an_eighth(rng):
    batch = np.zeros((1, 16, 16, 1), np.uint8)
    batch[0, 8, 8] = 200
    places = set()
    for _ in range(300):
        shifted = features.shift_at_random(batch, rng)
        assert shifted.shape == batch.shape and shifted.sum() == 200
        places.add(tuple(np.argwhere(shifted[0, :, :, 0])[0]))
    assert places == {(y, x) for y in range(6, 11) for x in range(6, 11)}


def test_scored_images_are_bounded_and_spread(monkeypatch, digits):
    _, all_train, _ = rows_read(*digits, 1)
    monkeypatch.setattr(features, "MAX_SCORED_IMAGES", 100)
    _, train, held_out = rows_read(*digits, 1)
    np.testing.assert_array_equal(train, all_train[::17])  # 1617 / 100, rounded up
    assert len(held_out) == 90


def test_features_are_the_penultimate_activations_whatever_the_batch(extractor, digits):
    images = digits[0][:37]
    expected, logits = extractor.net.apply({"params": extractor.params}, images)
    got = extractor(images, batch_size=16)
    assert got.shape == (37, 64) and got.dtype == np.float64
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(got, extractor(images), rtol=1e-4, atol=1e-4)
    dense = extractor.params["logits"]
    np.testing.assert_allclose(got @ np.asarray(dense["kernel"]) + dense["bias"], logits, rtol=1e-3, atol=1e-3)
    assert extractor(images[:0]).shape == (0, 64)


def test_of_a_single_class_turns_are_told_apart(digits):
    images = digits[0][digits[1] == 4]
    extractor = evaluation.train_feature_net(images, np.zeros(len(images), np.int32), 1, steps=300)
    assert extractor.held_out_accuracy > 0.8  # a quarter by chance
    assert extractor(images[:5]).shape == (5, 64)


def test_ragged_batches_compile_once(extractor, digits, compilations):
    extractor(digits[0][:50], batch_size=23)
    compiled = compilations.count
    extractor(digits[0][:3], batch_size=23)
    assert compilations.count == compiled > 0


@pytest.mark.parametrize(
    "shape, convolutions, flat",
    [
        ((4, 4, 1), 1, 4 * 4 * 32),
        ((8, 8, 3), 2, 4 * 4 * 64),
        ((28, 28, 1), 4, 4 * 4 * 64),
        ((32, 8, 4), 4, 4 * 4 * 64),
        ((256, 256, 3), 6, 4 * 4 * 64),
    ],
)
def test_net_takes_any_size_and_channels(shape, convolutions, flat):
    images = jax.ShapeDtypeStruct((2, *shape), jnp.uint8)
    (got, logits), variables = jax.eval_shape(FeatureNet(5).init_with_output, jax.random.key(0), images)
    params = variables["params"]
    assert got.shape == (2, 64) and logits.shape == (2, 5)
    assert sum(name.startswith("Conv") for name in params) == convolutions
    assert params["penultimate"]["kernel"].shape == (flat, 64)
    assert params["Conv_0"]["kernel"].shape == (3, 3, shape[-1], 32)


def test_a_handful_of_images_is_enough(rng):
    images = rng.integers(0, 256, (3, 4, 4, 2), dtype=np.uint8)
    trained = evaluation.train_feature_net(images, np.array([0, 1, 0]), 2, steps=1)
    assert trained.held_out_accuracy in (0.0, 1.0)
    assert trained.train_accuracy in (0.0, 0.5, 1.0)


IMAGES = np.zeros((4, 8, 8, 1), np.uint8)
LABELS = np.array([0, 1, 2, 3])


@pytest.mark.parametrize(
    "images, labels, num_classes, steps, sentence",
    [
        (IMAGES.astype(np.float32), LABELS, 4, 1, "images have dtype float32, but the feature network wants uint8"),
        (IMAGES[..., 0], LABELS, 4, 1, r"images have shape \(4, 8, 8\), but .* wants \(N, height, width, channel\)"),
        (IMAGES[:, :3], LABELS, 4, 1, r"images have shape \(4, 3, 8, 1\), but .* of at least 4"),
        (IMAGES[..., :0], LABELS, 4, 1, r"images have shape \(4, 8, 8, 0\)"),
        (IMAGES[:1], LABELS[:1], 4, 1, r"was given 1 image\(s\), but needs at least 2"),
        (IMAGES, LABELS[:3], 4, 1, r"labels have shape \(3,\) and dtype int64, but 4 images want integers"),
        (IMAGES, LABELS * 1.0, 4, 1, r"labels have shape \(4,\) and dtype float64"),
        (IMAGES, LABELS, 3, 1, "labels run from 0 to 3, but 3 classes want 0 to 2: correct num_classes"),
        (IMAGES, LABELS - 1, 4, 1, "labels run from -1 to 2, but 4 classes want 0 to 3"),
        (IMAGES, LABELS, 0, 1, "num_classes is 0, but there is at least 1"),
        (IMAGES, LABELS, 4, 0, "to train for 0 steps, but needs at least 1"),
    ],
)
def test_training_refuses(images, labels, num_classes, steps, sentence):
    with pytest.raises(UserError, match=sentence):
        evaluation.train_feature_net(images, labels, num_classes, steps=steps)


def test_extractor_refuses(extractor):
    with pytest.raises(UserError, match=r"shape .* = \(8, 8, 3\), but the feature network was trained on \(8, 8, 1\)"):
        extractor(np.zeros((2, 8, 8, 3), np.uint8))
    with pytest.raises(UserError, match="dtype int64, but the feature network wants uint8"):
        extractor(np.zeros((2, 8, 8, 1), np.int64))
    with pytest.raises(UserError, match="batch_size is 0, but it must be at least 1"):
        extractor(IMAGES, batch_size=0)


# Fréchet distance


def gaussian(rng, width, rank=None, scale=1.0):
    factor = rng.normal(size=(width, rank or width)) * scale
    return FeatureStatistics(rng.normal(size=width), factor @ factor.T, 1000)


def test_statistics_are_mean_and_unbiased_covariance_in_float64():
    got = evaluation.feature_statistics(np.array([[1, 0], [3, 0], [5, 6]], np.float32))
    np.testing.assert_array_equal(got.mean, [3, 2])
    np.testing.assert_array_equal(got.covariance, [[4, 6], [6, 12]])
    assert got.count == 3
    assert got.mean.dtype == got.covariance.dtype == np.float64


def test_statistics_are_summed_in_float64(rng):
    narrow = (rng.normal(size=(200, 3)) + 3000).astype(np.float32)
    np.testing.assert_allclose(
        evaluation.feature_statistics(narrow).covariance, np.cov(narrow.astype(np.float64).T), rtol=1e-12
    )


def test_statistics_of_a_single_feature():
    got = evaluation.feature_statistics(np.array([[0.0], [2.0]]))
    assert got.mean.tolist() == [1.0] and got.covariance.tolist() == [[2.0]]


def test_frechet_distance_of_axis_aligned_gaussians_is_analytic():
    a = FeatureStatistics(np.array([0.0, 1.0]), np.diag([4.0, 9.0]), 100)
    b = FeatureStatistics(np.array([3.0, 5.0]), np.diag([1.0, 25.0]), 100)
    # 3² + 4² between the means, (2 - 1)² + (3 - 5)² between the standard deviations
    assert evaluation.frechet_distance(a, b) == pytest.approx(30, rel=1e-13)


def test_frechet_distance_of_scaled_covariances_is_analytic(rng):
    a = gaussian(rng, 6)
    b = dataclasses.replace(a, covariance=9 * a.covariance)
    assert evaluation.frechet_distance(a, b) == pytest.approx(4 * np.trace(a.covariance), rel=1e-12)


def test_frechet_distance_agrees_with_sqrtm(rng):
    for width in (1, 5, 64):
        a, b = gaussian(rng, width), gaussian(rng, width)
        root = scipy.linalg.sqrtm(a.covariance @ b.covariance).real
        expected = np.sum((a.mean - b.mean) ** 2) + np.trace(a.covariance + b.covariance - 2 * root)
        assert evaluation.frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_is_symmetric_and_invariant(rng):
    a, b = gaussian(rng, 8), gaussian(rng, 8)
    rotation = np.linalg.qr(rng.normal(size=(8, 8)))[0]
    shift = rng.normal(size=8)

    def moved(s):
        return FeatureStatistics(rotation @ s.mean + shift, rotation @ s.covariance @ rotation.T, s.count)

    distance = evaluation.frechet_distance(a, b)
    assert distance > 1
    assert evaluation.frechet_distance(b, a) == pytest.approx(distance, rel=1e-12)
    assert evaluation.frechet_distance(moved(a), moved(b)) == pytest.approx(distance, rel=1e-12)
    scaled = [FeatureStatistics(3 * s.mean, 9 * s.covariance, s.count) for s in (a, b)]
    assert evaluation.frechet_distance(*scaled) == pytest.approx(9 * distance, rel=1e-12)


def test_frechet_distance_to_itself_is_nought_and_never_negative(rng):
    for rank in (None, 3):
        for scale in (1e-3, 1, 1e3):
            a = gaussian(rng, 16, rank, scale)
            assert 0 <= evaluation.frechet_distance(a, a) <= 1e-12 * np.trace(a.covariance)


def test_frechet_distance_of_singular_covariances(rng):
    # Two planes that share one axis: only that axis contributes to the cross term.
    a = FeatureStatistics(np.zeros(3), np.diag([4.0, 1.0, 0.0]), 100)
    b = FeatureStatistics(np.zeros(3), np.diag([9.0, 0.0, 1.0]), 100)
    rotation = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    turned = [dataclasses.replace(s, covariance=rotation @ s.covariance @ rotation.T) for s in (a, b)]
    assert evaluation.frechet_distance(a, b) == pytest.approx((3 - 2) ** 2 + 1 + 1, rel=1e-12)
    assert evaluation.frechet_distance(*turned) == pytest.approx(3, rel=1e-7)
    nothing = FeatureStatistics(np.zeros(3), np.zeros((3, 3)), 100)
    assert evaluation.frechet_distance(a, nothing) == pytest.approx(5, rel=1e-12)


def test_frechet_distance_tells_digits_from_noise(extractor, digits, rng):
    images = digits[0][rng.permutation(1797)]

    def statistics(of):
        return evaluation.feature_statistics(extractor(of))

    one, other = statistics(images[:898]), statistics(images[898:])
    noise = statistics(rng.integers(0, 256, (898, 8, 8, 1), dtype=np.uint8))
    grainy = np.clip(images[898:] + rng.normal(0, 40, (899, 8, 8, 1)), 0, 255).astype(np.uint8)
    halves = evaluation.frechet_distance(one, other)
    assert 0.1 < halves < 10
    assert evaluation.frechet_distance(one, noise) > 30 * halves
    assert 1.5 * halves < evaluation.frechet_distance(one, statistics(grainy)) < evaluation.frechet_distance(one, noise)


@pytest.mark.parametrize(
    "bad, sentence",
    [
        (np.zeros((64, 64)), "64 features were asked from 64 samples, whose covariance would be singular .* least 65"),
        (np.zeros(5), r"features have shape \(5,\), but \(sample, feature\) was expected"),
        (np.zeros((5, 0)), r"features have shape \(5, 0\)"),
        (np.array([[0.0], [1.0], [np.nan], [np.inf]]), "of 2 of 4 samples, first of sample 2, are not finite"),
    ],
)
def test_statistics_refuse(bad, sentence):
    with pytest.raises(UserError, match=sentence):
        evaluation.feature_statistics(bad)


def test_frechet_distance_refuses(rng):
    a = gaussian(rng, 4)
    with pytest.raises(UserError, match="first statistics have 4 features and the second 5, .* same feature network"):
        evaluation.frechet_distance(a, gaussian(rng, 5))
    with pytest.raises(UserError, match="second statistics hold non-finite values"):
        evaluation.frechet_distance(a, dataclasses.replace(a, covariance=np.full((4, 4), np.nan)))
    with pytest.raises(UserError, match="first statistics hold non-finite values"):
        evaluation.frechet_distance(dataclasses.replace(a, mean=np.full(4, np.inf)), a)
    with pytest.raises(UserError, match=r"second statistics have mean \(4,\) and covariance \(3, 3\)"):
        evaluation.frechet_distance(a, dataclasses.replace(a, covariance=np.eye(3)))


# Precision and recall


def brute_force(real, generated, k):
    """The two shares by definition, one distance at a time."""

    def coverage(manifold, samples):
        radii = []
        for i, point in enumerate(manifold):
            others = [np.linalg.norm(point - other) for j, other in enumerate(manifold) if j != i]
            radii.append(sorted(others)[k - 1])
        inside = [
            any(np.linalg.norm(s - p) <= radius for p, radius in zip(manifold, radii, strict=True)) for s in samples
        ]
        return sum(inside) / len(inside)

    return coverage(real, generated), coverage(generated, real)


def test_precision_recall_on_a_line():
    real = np.array([[0.0], [1.0], [2.0], [10.0]])
    # With k = 1 the balls reach [-1, 1], [0, 2], [1, 3] and [2, 18]: together [-1, 18].
    generated = np.array([[-1.0], [-1.5], [18.0], [18.5], [18.75]])
    # Around the generated: [-1.5, -0.5], [-2, -1], [17.5, 18.5], [18.25, 18.75], [18.5, 19]: no real one within.
    assert evaluation.precision_recall(real, generated, k=1) == (0.4, 0.0)
    assert evaluation.precision_recall(generated, real, k=1) == (0.0, 0.4)


def test_duplicates_are_neighbours_too():
    real = np.array([[0.0], [0.0], [0.0], [5.0], [6.0]])
    generated = np.array([[0.0], [0.5], [3.0], [3.5], [7.0]])
    # k = 2: the three at 0 have radius 0, 5 reaches [0, 10], 6 reaches [0, 12].
    assert evaluation.precision_recall(real, generated, k=2)[0] == 1.0
    # k = 1: the three at 0 have radius 0, 5 reaches [4, 6], 6 reaches [5, 7].
    assert evaluation.precision_recall(real, generated, k=1)[0] == 0.4


@pytest.mark.parametrize("k", [1, 3, 7])
@pytest.mark.parametrize("width", [1, 2, 20])
def test_precision_recall_agrees_with_brute_force(rng, k, width):
    real = rng.normal(size=(60, width))
    generated = rng.normal(size=(45, width)) * 0.6 + 0.7
    got = evaluation.precision_recall(real, generated, k=k)
    assert got == pytest.approx(brute_force(real, generated, k), abs=1e-12)
    assert all(type(share) is float for share in got)


def test_precision_recall_uses_three_neighbours(rng):
    real, generated = rng.normal(size=(40, 4)), rng.normal(size=(40, 4)) + 1
    assert evaluation.precision_recall(real, generated) == brute_force(real, generated, 3)
    assert brute_force(real, generated, 3) != brute_force(real, generated, 2)


def test_precision_and_recall_tell_collapse_from_noise(rng):
    real = rng.normal(size=(200, 8))
    collapsed = real[:1] + 0.01 * rng.normal(size=(200, 8))
    far = real + 100
    precision, recall = evaluation.precision_recall(real, collapsed)
    assert precision == 1.0 and recall < 0.05
    assert evaluation.precision_recall(real, far) == (0.0, 0.0)
    assert evaluation.precision_recall(real, real) == (1.0, 1.0)


def test_precision_recall_is_the_same_in_chunks(rng, monkeypatch):
    real, generated = rng.normal(size=(700, 5)), rng.normal(size=(600, 5)) * 0.7
    whole = evaluation.precision_recall(real, generated)
    rows = []
    chunked = precision_recall.__globals__["pairwise_distances_chunked"]

    def recording(*args, reduce_func, **kwargs):
        def record(distances, start):
            rows.append(len(distances))
            return reduce_func(distances, start)

        return chunked(*args, reduce_func=record, **kwargs)

    monkeypatch.setitem(precision_recall.__globals__, "pairwise_distances_chunked", recording)
    monkeypatch.setitem(precision_recall.__globals__, "CHUNK_MEBIBYTES", 1)
    assert evaluation.precision_recall(real, generated) == whole
    assert 0 < whole[1] < whole[0] <= 1
    assert sum(rows) == 1300 and max(rows) * 600 * 8 <= 2**20


@pytest.mark.parametrize(
    "real, generated, k, sentence",
    [
        (np.zeros((9, 2)), np.zeros((9, 3)), 3, "real samples have 2 features and the generated 3, .* same feature"),
        (
            np.zeros((9, 2)),
            np.zeros((3, 2)),
            3,
            "k = 3, but k must be .* below the number of samples, here 9 real and 3 generated",
        ),
        (np.zeros((9, 2)), np.zeros((9, 2)), 0, "k = 0, but k must be at least 1"),
        (np.zeros(9), np.zeros((9, 2)), 3, r"real features have shape \(9,\)"),
        (np.zeros((9, 2)), np.full((9, 2), np.nan), 3, "generated features of 9 of 9 samples, .* are not finite"),
    ],
)
def test_precision_recall_refuses(real, generated, k, sentence):
    with pytest.raises(UserError, match=sentence):
        evaluation.precision_recall(real, generated, k=k)


# Paired errors


def test_mean_squared_error_per_step_is_by_step():
    target = np.zeros((2, 3, 4, 5, 1), np.float32)
    prediction = target + np.array([0.5, 1, 2], np.float32).reshape(1, 3, 1, 1, 1)
    prediction[1] *= -2  # squares of the second sample are four times those of the first
    got = evaluation.mean_squared_error_per_step(prediction, target)
    np.testing.assert_array_equal(got, [0.625, 2.5, 10])
    assert got.dtype == np.float64


def test_mean_squared_error_widens_before_it_subtracts():
    target = jnp.full((1, 1, 2, 2, 1), 300, jnp.float16)
    # The difference 600 is exact in half precision, its square is not.
    np.testing.assert_array_equal(evaluation.mean_squared_error_per_step(-target, target), [360000])
    bright = jnp.ones((1, 1, 1, 1, 1), jnp.bfloat16)
    got = evaluation.mean_squared_error_per_step(bright, np.full((1, 1, 1, 1, 1), 1.001))
    np.testing.assert_allclose(got, [1e-6], rtol=1e-9)


def test_psnr():
    assert evaluation.psnr(4.0) == 0.0
    assert evaluation.psnr(0.04) == pytest.approx(20)
    assert evaluation.psnr(0.01, data_range=1.0) == pytest.approx(20)
    assert evaluation.psnr(0) == np.inf
    assert type(evaluation.psnr(0.5)) is float
    np.testing.assert_allclose(evaluation.psnr(np.array([[4, 0.4], [0, 0.04]])), [[0, 10], [np.inf, 20]], atol=1e-12)


def test_exposure_bias_is_rollout_less_forced(rng):
    teacher = rng.normal(size=(3, 2, 4, 4, 1))
    forced = teacher + np.array([0.1, 0.2]).reshape(1, 2, 1, 1, 1)
    rollout = teacher + np.array([0.1, 0.5]).reshape(1, 2, 1, 1, 1)
    got = evaluation.exposure_bias(teacher, forced, rollout)
    np.testing.assert_allclose(got.forced, [0.01, 0.04])
    np.testing.assert_allclose(got.rollout, [0.01, 0.25])
    np.testing.assert_allclose(got.difference, [0, 0.21], atol=1e-15)


POINTS = np.zeros((2, 3, 4, 4, 1))


@pytest.mark.parametrize(
    "prediction, target, sentence",
    [
        (
            POINTS,
            np.zeros((2, 4, 4, 4, 1)),
            r"shape \(2, 3, 4, 4, 1\) and the target \(2, 4, 4, 4, 1\), .* without the noise",
        ),
        (POINTS[0], POINTS[0], r"both must be the same \(batch, step, height, width, channel\)"),
        (POINTS[:0], POINTS[:0], "none empty"),
        (POINTS + np.array([0, np.nan, 0]).reshape(1, 3, 1, 1, 1), POINTS, "not finite at step 1"),
    ],
)
def test_paired_errors_refuse(prediction, target, sentence):
    with pytest.raises(UserError, match=sentence):
        evaluation.mean_squared_error_per_step(prediction, target)
    with pytest.raises(UserError, match=sentence):
        evaluation.exposure_bias(target, prediction, prediction)


def test_psnr_refuses():
    with pytest.raises(UserError, match="mean squared error is -1.0, but it must be at least 0"):
        evaluation.psnr(-1)
    with pytest.raises(UserError, match="it must be at least 0"):
        evaluation.psnr(np.array([1, np.nan]))
    with pytest.raises(UserError, match="data_range is 0, but it must be positive"):
        evaluation.psnr(1, data_range=0)
