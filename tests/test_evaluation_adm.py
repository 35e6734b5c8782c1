"""ADM's metrics against plain NumPy, written from their definitions, and the files that they are measured of."""

import io
import logging
import zipfile

import numpy as np
import pytest
import scipy.linalg
from inception_fixtures import random_images, write_weights

from ard_jax import evaluation
from ard_jax.errors import UserError
from ard_jax.evaluation import InceptionFeatures, adm, adm_metrics
from ard_jax.evaluation.inception import Features
from ard_jax.evaluation.npz import NpzArray


@pytest.fixture
def rng():
    return np.random.default_rng(11)


def positive(rng, count, width, shift=0.0):
    """Features like Inception's: float32, not negative, correlated."""
    return np.maximum(rng.normal(size=(count, width)) @ rng.normal(size=(width, width)) / 4 + shift, 0).astype(
        np.float32
    )


# ------------------------------------------------------------------------------------------- Fréchet distances


def test_the_mean_is_float32_and_the_covariance_float64(rng):
    features = positive(rng, 300, 5)
    got = adm.gaussian(features)
    assert got.mean.dtype == np.float32 and got.covariance.dtype == np.float64
    np.testing.assert_array_equal(got.mean, features.mean(axis=0))
    centred = features.astype(np.float64) - features.astype(np.float64).mean(axis=0)
    np.testing.assert_allclose(got.covariance, centred.T @ centred / 299, rtol=1e-12)


@pytest.mark.parametrize("batch", [1, 64, 1000])
def test_running_statistics_are_those_of_all(rng, batch):
    features = positive(rng, 700, 6, shift=3000)  # squares about 0 would lose the variance even in float64
    running = adm.RunningGaussian()
    for start in range(0, 700, batch):
        running.add(features[start : start + batch])
    got, expected = running.gaussian(), adm.gaussian(features.astype(np.float64))
    assert running.count == 700
    np.testing.assert_allclose(got.mean, expected.mean, rtol=1e-12)
    np.testing.assert_allclose(got.covariance, expected.covariance, rtol=1e-9, atol=1e-9)


def test_frechet_distance_is_its_formula(rng):
    a, b = (adm.gaussian(positive(rng, 400, 12, shift)) for shift in (0, 0.3))
    root = scipy.linalg.sqrtm(a.covariance @ b.covariance)
    expected = ((a.mean - b.mean) ** 2).sum() + np.trace(a.covariance + b.covariance - 2 * root)
    assert adm.frechet_distance(a, b) == pytest.approx(expected, rel=1e-6) and expected > 0.1
    assert adm.frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
    ours = [evaluation.FeatureStatistics(g.mean.astype(np.float64), g.covariance, 400) for g in (a, b)]
    assert adm.frechet_distance(a, b) == pytest.approx(evaluation.frechet_distance(*ours), rel=1e-6)


def test_frechet_distance_is_analytic():
    a = adm.Gaussian(np.array([0.0, 1.0]), np.diag([4.0, 9.0]))
    b = adm.Gaussian(np.array([3.0, 5.0]), np.diag([1.0, 25.0]))
    assert adm.frechet_distance(a, b) == pytest.approx(3**2 + 4**2 + (2 - 1) ** 2 + (3 - 5) ** 2, rel=1e-12)


def test_the_diagonal_grows_only_where_the_root_is_not_finite(rng, monkeypatch):
    a, b = (adm.gaussian(positive(rng, 50, 3)) for _ in range(2))
    seen, true = [], adm._square_root

    def failing_once(product):
        seen.append(product)
        return true(product) if len(seen) > 1 else np.full_like(product, np.nan)

    expected = adm.frechet_distance(a, b)
    monkeypatch.setattr(adm, "_square_root", failing_once)
    assert adm.frechet_distance(a, b) == pytest.approx(expected, abs=1e-4)
    offset = 1e-6 * np.eye(3)
    np.testing.assert_allclose(seen[0], a.covariance @ b.covariance, rtol=1e-14)
    np.testing.assert_allclose(seen[1], (a.covariance + offset) @ (b.covariance + offset), rtol=1e-14)
    adm.frechet_distance(a, b)
    assert len(seen) == 3  # a finite root is taken as it is


def test_statistics_are_refused(rng, monkeypatch):
    a, b = adm.gaussian(positive(rng, 50, 3)), adm.gaussian(positive(rng, 50, 4))
    with pytest.raises(UserError, match=r"means of \(3,\) and \(4,\) .* compute both with the same network"):
        adm.frechet_distance(a, b)
    with pytest.raises(UserError, match=r"of 1 sample\(s\), but needs at least 2"):
        adm.gaussian(np.ones((1, 3), np.float32))
    running = adm.RunningGaussian()
    running.add(np.full((3, 2), np.nan))
    with pytest.raises(UserError, match="features are not finite"):
        running.gaussian()
    monkeypatch.setattr(adm, "_square_root", lambda product: product + 1j)
    with pytest.raises(UserError, match=r"3 features are too singular .* part of 1\): give more samples, at least 4"):
        adm.frechet_distance(a, a)


# --------------------------------------------------------------------------------------------- Inception score


def plain_inception_score(logits, split):
    scores = []
    for start in range(0, len(logits), split):
        share = np.array([np.exp(row) / np.exp(row).sum() for row in logits[start : start + split].astype(np.float64)])
        divergences = [(row * (np.log(row) - np.log(share.mean(axis=0)))).sum() for row in share]
        scores.append(np.exp(np.mean(divergences)))
    return np.mean(scores)


def test_inception_score_is_its_formula(rng):
    logits = (rng.normal(size=(23, 9)) * 3).astype(np.float32)
    got = adm.inception_score(logits, 5)  # splits of 5, 5, 5, 5 and 3
    assert got == pytest.approx(plain_inception_score(logits, 5), rel=1e-6) and got > 1.5
    sorted_by_class = logits[np.argsort(logits.argmax(axis=1))]  # the order of the file counts
    assert adm.inception_score(sorted_by_class, 5) < 0.9 * got
    assert adm.inception_score(sorted_by_class, 23) == pytest.approx(adm.inception_score(logits, 23), rel=1e-12)
    assert adm.inception_score.__defaults__ == (5000,)


def test_inception_score_of_certain_classes():
    assert adm.inception_score(np.eye(7, dtype=np.float32) * 1e4, 7) == pytest.approx(7)
    assert adm.inception_score(np.zeros((7, 4), np.float32), 7) == pytest.approx(1)


def test_inception_score_refuses(rng):
    with pytest.raises(UserError, match="of 4 samples in splits of 5000, .* give at least 5,000 samples"):
        adm.inception_score(np.zeros((4, 3), np.float32))
    with pytest.raises(UserError, match="in splits of 0, but a split has at least 1"):
        adm.inception_score(np.zeros((4, 3), np.float32), 0)
    with pytest.raises(UserError, match="logits of 1 of 4 samples, first of sample 2, are not finite"):
        adm.inception_score(np.array([[0], [0], [np.nan], [0]], np.float32), 2)


# ------------------------------------------------------------------------------------------ precision and recall


def plain_squares(u, v, dtype):
    """|u|² - 2 uv + |v|² of every pair, every step rounded to the type; sums of products are float32."""
    out = np.empty((len(u), len(v)), np.float32)
    for i, a in enumerate(u.astype(dtype)):
        for j, b in enumerate(v.astype(dtype)):
            norms = [dtype(np.sum([dtype(x * x) for x in c], dtype=np.float32)) for c in (a, b)]
            product = dtype(
                np.sum([np.float32(x) * np.float32(y) for x, y in zip(a, b, strict=True)], dtype=np.float32)
            )
            out[i, j] = max(dtype(dtype(norms[0] - dtype(2) * product) + norms[1]), dtype(0))
    return out


def plain_precision_recall(reference, samples, k, dtype):
    def radii(features):
        return np.sort(plain_squares(features, features, dtype), axis=1)[:, k]  # of which the first is its own

    between = plain_squares(reference, samples, dtype)
    precision = (between <= radii(reference)[:, None]).any(axis=0).mean()
    return precision, (between <= radii(samples)[None]).any(axis=1).mean()


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_are_their_definition(rng, dtype, k):
    # on a grid, float32's sums are exact, so that no order of them tips float16's last digit
    reference, samples = (
        np.round(128 * features) / 128 for features in (positive(rng, 40, 6), positive(rng, 30, 6) / 2)
    )
    half = dtype is np.float16
    expected = plain_squares(reference, samples, dtype)
    np.testing.assert_array_equal(adm.squared_distances(reference, samples, half), expected)
    assert half == (expected != plain_squares(reference, samples, np.float32)).any()
    got = adm.precision_recall(reference, samples, k, half=half)
    assert got == pytest.approx(plain_precision_recall(reference, samples, k, dtype), abs=1e-6)
    assert 0 < min(got) < 1


def test_in_float32_they_are_those_of_exact_distances(rng):
    reference, samples = positive(rng, 60, 8), positive(rng, 50, 8, 0.3)
    assert adm.precision_recall(reference, samples, half=False) == evaluation.precision_recall(reference, samples)
    assert adm.precision_recall(reference, samples, 2, half=False) != adm.precision_recall(
        reference, samples, half=False
    )


def test_float16_takes_in_what_float32_leaves_out():
    # Radii are 2048 in both; the first sample is 2049 away, which float16, counting by twos there, rounds to 2048.
    reference = np.array([[0, 0, 0, 0], [32, 32, 0, 0]], np.float32)
    samples = np.array([[-45, -4, -2, -2], [-100, -100, 0, 0]], np.float32)
    assert adm.precision_recall(reference, samples, 1)[0] == 0.5  # as ADM has it, by default
    assert adm.precision_recall(reference, samples, 1, half=False)[0] == 0


def test_what_float16_cannot_hold_is_float32(rng):
    near, far = rng.normal(size=(4, 3)).astype(np.float32), np.full((2, 3), 200, np.float32)  # 120,000 from 0
    assert (adm.squared_distances(near, near, True) != adm.squared_distances(near, near, False)).any()
    both = np.concatenate([near, far])
    np.testing.assert_array_equal(adm.squared_distances(both, both, True), adm.squared_distances(both, both, False))
    assert np.isfinite(adm.squared_distances(both, both, True)).all()


def test_the_surface_belongs_to_the_ball_and_twins_are_neighbours():
    reference = np.array([[0], [0], [4], [8]], np.float32)
    samples = np.array([[12], [12.5], [-4], [-4.5]], np.float32)
    # k = 2: squared radii 16, 16, 16 and 64; from 8 to 16 is not 64 away, so 0 … 16 and -4 … 8 are in.
    assert adm.precision_recall(reference, samples, 2) == (0.75, 1.0)
    # k = 1: of the twins 0
    assert adm.precision_recall(reference, samples, 1)[0] == 0.25


@pytest.mark.parametrize("block", [1, 7, 16])
def test_blocks_change_nothing(rng, monkeypatch, block):
    reference, samples = positive(rng, 30, 5), positive(rng, 41, 5, 0.2)
    whole = adm.precision_recall(reference, samples)
    monkeypatch.setattr(adm, "BLOCK", block)
    assert adm.precision_recall(reference, samples) == whole and 0 < whole[0] < 1


def test_neighbours_are_refused(rng):
    few, many = positive(rng, 3, 4), positive(rng, 9, 4)
    with pytest.raises(UserError, match="k = 3 of 3 reference images and 9 samples, but k must be .* below both"):
        adm.precision_recall(few, many)
    with pytest.raises(UserError, match="k = 0 of 9 reference"):
        adm.precision_recall(many, many, 0)
    with pytest.raises(UserError, match="reference has 4 features and the samples 2, .* one InceptionFeatures"):
        adm.precision_recall(many, many[:, :2])


# ------------------------------------------------------------------------------------------------------- npz files


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_batches_are_the_rows_in_their_order(tmp_path, rng, save):
    images = rng.integers(0, 256, (11, 4, 5, 3), np.uint8)
    save(tmp_path / "x.npz", images, labels=np.arange(11))
    opened = NpzArray(tmp_path / "x.npz")
    assert (opened.shape, opened.dtype, len(opened)) == ((11, 4, 5, 3), np.uint8, 11)
    batches = list(opened.batches(4))
    assert [len(batch) for batch in batches] == [4, 4, 3]
    np.testing.assert_array_equal(np.concatenate(batches), images)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_damaged_files_are_refused(tmp_path, rng, save):
    path, images = tmp_path / "x.npz", rng.integers(0, 256, (20, 9, 9, 3), np.uint8)
    save(path, images)
    whole = path.read_bytes()
    path.write_bytes(whole[:-300])
    with pytest.raises(UserError, match="x.npz cannot be read as npz .*: fetch it again, or save it anew"):
        NpzArray(path)
    altered = bytearray(whole)
    altered[len(whole) // 2] ^= 1
    path.write_bytes(altered)
    with pytest.raises(UserError, match="cannot be read as npz .*(CRC|decompressing)"):
        list(NpzArray(path).batches(7))
    with pytest.raises(UserError, match="nowhere.npz is not there"):
        NpzArray(tmp_path / "nowhere.npz")


def test_a_file_that_ends_before_its_rows(tmp_path):
    content = io.BytesIO()
    np.save(content, np.zeros((5, 2, 2, 3), np.uint8))
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("arr_0.npy", content.getvalue()[:-4])
    with pytest.raises(UserError, match="it ends after 4 of 5 rows"):
        list(NpzArray(tmp_path / "x.npz").batches(2))


@pytest.mark.parametrize(
    "array, sentence",
    [
        (np.array([{}, 2], object), "holds objects, which would have to be unpickled"),
        (np.asfortranarray(np.zeros((3, 2, 2, 3), np.uint8)), "holds columns first"),
    ],
)
def test_arrays_that_are_not_plain(tmp_path, array, sentence):
    np.savez(tmp_path / "x.npz", array)
    with pytest.raises(UserError, match=sentence):
        NpzArray(tmp_path / "x.npz")


# -------------------------------------------------------------------------------------------------- the whole of it


class Projection:
    """Stands in for Inception: features are sums over an image, by fixed weights."""

    is_published, dtype = True, "float32"

    def __init__(self, side=8):
        rng = np.random.default_rng(5)
        self.weights = [
            rng.normal(size=(side * side * 3, width)).astype(np.float32) / 255 for width in (2048, 2023, 1008)
        ]
        self.sizes = []

    def stream(self, batches, batch_size):
        for images in batches:
            self.sizes.append(len(images))
            yield self.of(images)

    def of(self, images):
        return Features(*(images.reshape(len(images), -1).astype(np.float32) @ weight for weight in self.weights))


@pytest.fixture(scope="module")
def network():
    return Projection()


SAMPLES, REAL = random_images(8, 100), random_images(8, 70, seed=1)


@pytest.fixture(scope="module")
def statistics():
    """mu, sigma, mu_s and sigma_s, as no set of images here has them."""
    made = {}
    for suffix, width in (("", 2048), ("_s", 2023)):
        made |= {f"mu{suffix}": np.arange(width, dtype=np.float32), f"sigma{suffix}": np.eye(width, dtype=np.float32)}
    return made


@pytest.fixture
def distances(monkeypatch):
    """Records what the Fréchet distances are of: their roots would take half a minute each."""
    pairs = []
    monkeypatch.setattr(adm, "frechet_distance", lambda a, b: pairs.append((a, b)) or 10.0 * len(pairs))
    return pairs


def files(folder, samples=SAMPLES, **reference):
    np.savez(folder / "samples.npz", samples)
    np.savez(folder / "reference.npz", **reference)
    return folder / "samples.npz", folder / "reference.npz"


def test_metrics_are_those_of_the_files(tmp_path, network, statistics, distances, caplog):
    with caplog.at_level(logging.WARNING, "ard_jax"):
        got = adm_metrics(*files(tmp_path, arr_0=REAL, **statistics), network, split_size=40)
    seen, known = network.of(SAMPLES), network.of(REAL)
    assert set(got) == {"fid", "sfid", "inception_score", "precision", "recall"}
    (of_pool, pool), (of_spatial, spatial) = distances
    assert (got["fid"], got["sfid"]) == (10, 20)
    for running, features in ((of_pool, seen.pool), (of_spatial, seen.spatial)):
        np.testing.assert_allclose(running.mean, features.mean(axis=0), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(running.covariance, np.cov(features.T), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(pool.mean, statistics["mu"])  # never those of arr_0
    np.testing.assert_array_equal(spatial.covariance, statistics["sigma_s"])
    assert got["inception_score"] == pytest.approx(plain_inception_score(seen.logits, 40), rel=1e-6)
    assert (got["precision"], got["recall"]) == adm.precision_recall(known.pool, seen.pool)
    assert "published ones are of 50,000, this of 100" in caplog.text and "left out" not in caplog.text
    assert max(network.sizes) <= 64


def test_float32_distances_are_a_switch(tmp_path, network, distances, monkeypatch):
    asked = []
    monkeypatch.setattr(adm, "precision_recall", lambda *args, half: asked.append((args[2], half)) or (0.0, 0.0))
    for settings in ({}, {"half": False, "k": 5}):
        adm_metrics(*files(tmp_path, arr_0=REAL), network, split_size=50, **settings)
    assert asked == [(3, True), (5, False)]


def test_what_the_reference_lacks_is_left_out(tmp_path, network, statistics, distances, caplog):
    without = {name: array for name, array in statistics.items() if not name.endswith("_s")}
    with caplog.at_level(logging.WARNING, "ard_jax"):
        got = adm_metrics(*files(tmp_path, **without), network, split_size=50)
    assert got["fid"] == 10 and got["sfid"] is got["precision"] is got["recall"] is None
    assert "reference.npz has nothing for sfid, precision, recall: left out." in caplog.text


def test_images_alone_are_measured_as_a_reference(tmp_path, network, distances, caplog):
    with caplog.at_level(logging.WARNING, "ard_jax"):
        got = adm_metrics(*files(tmp_path, arr_0=REAL), network, split_size=50)
    assert "has no statistics: FID and sFID are to its 70 images" in caplog.text and None not in got.values()
    np.testing.assert_allclose(distances[1][1].mean, network.of(REAL).spatial.mean(axis=0), rtol=1e-4, atol=1e-5)


def test_other_weights_are_said_to_be_others(tmp_path, network, distances, caplog):
    other = Projection()
    other.is_published = False
    with caplog.at_level(logging.WARNING, "ard_jax"):
        adm_metrics(*files(tmp_path, arr_0=REAL), other, split_size=50)
    assert "so these numbers compare with no published ones" in caplog.text and "computes in" not in caplog.text


@pytest.mark.parametrize(
    "change, sentence",
    [
        (
            {"samples": SAMPLES / np.float32(255)},
            r"samples in .*samples.npz \(arr_0\) have dtype float32, .* wants uint8",
        ),
        ({"samples": SAMPLES.transpose(0, 3, 1, 2)}, r"shape \(100, 3, 8, 8\), .* transpose them by \(0, 2, 3, 1\)"),
        ({"samples": SAMPLES[:49]}, "of 49 samples in splits of 50, .* give at least 5,000 samples"),
        ({"arr_0": REAL[:3]}, "k = 3 of 3 reference images and 100 samples"),
        ({"arr_0": REAL.astype(np.float32)}, r"reference images in .*reference.npz \(arr_0\) have dtype float32"),
        (
            {"arr_0": random_images(16, 70)},
            r"are 8x8 and the reference images in .* 16x16, but both must be of one size",
        ),
        ({"mu": np.zeros(64)}, r"mu and sigma of .* have shapes \(64,\) and .* \(2048,\) and \(2048, 2048\) were"),
        ({"mu_s": np.zeros(2048)}, r"mu_s and sigma_s of .* but \(2023,\) and \(2023, 2023\) were expected"),
        ({"mu": np.full(2048, np.nan)}, "mu or sigma of .* is not finite"),
        ({"sigma": None}, "reference.npz has mu but not both of mu and sigma"),
        ({"arr_0": None, "mu": None, "sigma": None}, r"has neither images \(arr_0\) nor statistics \(mu, sigma\)"),
    ],
)
def test_files_are_refused_before_anything_is_computed(tmp_path, statistics, monkeypatch, change, sentence):
    def fail(*_):
        raise AssertionError("it began to work")

    monkeypatch.setattr(InceptionFeatures, "from_file", fail)
    arrays = {"samples": SAMPLES, "arr_0": REAL, **statistics} | change
    paths = files(tmp_path, **{name: array for name, array in arrays.items() if array is not None})
    with pytest.raises(UserError, match=sentence) as refused:
        adm_metrics(*paths, tmp_path / "weights.pth", split_size=50)
    assert "\n" not in str(refused.value)


@pytest.mark.slow
def test_metrics_through_inception(tmp_path, monkeypatch):
    """Everything at once, against NumPy, in random weights."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    weights = write_weights(tmp_path)
    samples, real = random_images(32, 9), random_images(32, 7, seed=1)
    network = InceptionFeatures.from_file(weights)
    seen, known = network(samples, batch_size=4), network(real)
    given = {"mu": known.pool.mean(0), "sigma": np.cov(known.pool.T), "mu_s": known.spatial.mean(0)}
    given["sigma_s"] = np.cov(known.spatial.T)
    got = adm_metrics(*files(tmp_path, samples, arr_0=real, **given), weights, split_size=5)
    for name, a, b in (("fid", seen.pool, known.pool), ("sfid", seen.spatial, known.spatial)):
        # of few samples, tr (C_a C_b)^½ is the sum of the singular values of X_a X_bᵀ, which is small
        x, y = ((f - f.mean(0)).astype(np.float64) / np.sqrt(len(f) - 1) for f in (a, b))
        cross = np.linalg.svd(x @ y.T, compute_uv=False).sum()
        expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + (x**2).sum() + (y**2).sum() - 2 * cross
        assert got[name] == pytest.approx(expected, rel=1e-4), name
    assert got["inception_score"] == pytest.approx(plain_inception_score(seen.logits, 5), rel=1e-5)
    assert (got["precision"], got["recall"]) == adm.precision_recall(known.pool, seen.pool)
