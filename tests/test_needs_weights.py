"""Numbers that were published, for whoever has the files that they are of (docs/EVALUATION.md)."""

import os

import pytest

from ard_jax.evaluation import adm_metrics

# Environment variables, and the files that they name.
NEEDED = {
    "ARD_JAX_INCEPTION": "torch-fidelity's weights-inception-2015-12-05-6726825d.pth",
    "ARD_JAX_REFERENCE": "ADM's VIRTUAL_imagenet256_labeled.npz",
    "ARD_JAX_SAMPLES": "ADM's admnet_guided_upsampled_imagenet256.npz",
}
# As guided-diffusion's evaluations/README.md has them; ports to other frameworks differ by as much as is allowed here.
PUBLISHED = {
    "fid": pytest.approx(3.943, abs=0.005),
    "sfid": pytest.approx(6.140, abs=0.005),
    "inception_score": pytest.approx(215.84, abs=0.2),
    "precision": pytest.approx(0.8265, abs=0.0005),
    "recall": pytest.approx(0.5309, abs=0.0005),
}


@pytest.mark.needs_weights
def test_adms_own_samples_have_the_published_numbers():
    missing = [f"{name} ({file})" for name, file in NEEDED.items() if not os.environ.get(name)]
    if missing:
        pytest.skip(f"needs files that are not ours to ship: set {', '.join(missing)}")
    found = adm_metrics(*(os.environ[name] for name in ("ARD_JAX_SAMPLES", "ARD_JAX_REFERENCE", "ARD_JAX_INCEPTION")))
    assert found == PUBLISHED
