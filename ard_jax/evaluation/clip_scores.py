"""How well pictures fit their prompts, from the vectors that a CLIP has for both: each score by its own definition.

A score says nothing without the model that made the vectors, so a report names both. All take paired vectors as
`CLIP.encode_image` and `CLIP.encode_text` give them, of any length, and give one number a pair; papers report the mean.
"""

import math

import numpy as np

from ard_jax.errors import UserError
from ard_jax.evaluation._checks import check_features

CLIP_SCORE_PREFIX = "A photo depicts "  # before each caption, if the score shall be `clip_score`


def clip_score(images: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """CLIPScore, 2.5 · max(cos, 0), defined with OpenAI's ViT-B/32.

    Source: Hessel et al. 2021, arXiv 2104.08718, section 3, and clipscore.py of jmhessel/clipscore, where
    `CLIP_SCORE_PREFIX` stands before each caption and the images are cropped.

    Args:
        images: (pair, feature), any float type.
        texts: the same shape, of the captions with the prefix.

    Returns:
        (pair,) float64, from 0 to 2.5.

    Raises:
        UserError: shapes that differ or are no pairs, or vectors that are zero or not finite.
    """
    return 2.5 * np.maximum(_cosines(images, texts), 0)


def clip_similarity(images: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """100 · cos, what papers on text-to-image models call their CLIP score, mostly with OpenAI's ViT-L/14.

    No prefix before the prompts, and negative cosines stay. Source: SDXL (Podell et al. 2023, arXiv 2307.01952),
    figure 2, and others in its wake; no paper defines it.

    Args, Returns, Raises: as `clip_score`, from -100 to 100, of the bare prompts.
    """
    return 100 * _cosines(images, texts)


def pick_score(images: np.ndarray, texts: np.ndarray, logit_scale: float) -> np.ndarray:
    """PickScore, exp(logit_scale) · cos, by the CLIP-H that was trained on people's choices (PickScore_v1).

    Source: Kirstain et al. 2023, arXiv 2305.01569, section 3, and the README of yuvalkirstain/PickScore. The
    exponential of the published weights is about 100, and scores lie around 20.

    Args:
        images, texts: as in `clip_score`, of the bare prompts.
        logit_scale: the parameter of that name, a logarithm.

    Returns, Raises: as `clip_score`; a logit_scale that is not finite raises too.
    """
    if not math.isfinite(logit_scale):
        raise UserError(f"logit_scale is {logit_scale}, but it must be finite: give the parameter of PickScore's CLIP.")
    return math.exp(logit_scale) * _cosines(images, texts)


def hps_v2(images: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """HPSv2 and HPSv2.1, 100 · cos, by the CLIP-H that was trained on people's preferences; the versions are weights.

    Source: Wu et al. 2023, arXiv 2306.09341, section 4, and hpsv2/evaluation.py of tgxs002/HPSv2, whose benchmark
    prints a hundred times the cosine that its img_score.py gives. Its pictures are padded: `images_for_clip` with fit
    "pad".

    Args, Returns, Raises: as `clip_similarity`.
    """
    return 100 * _cosines(images, texts)


def compbench_non_spatial(images: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """T2I-CompBench's score of non-spatial relations: the cosine, by OpenAI's ViT-B/32.

    Source: Huang et al. 2023, arXiv 2307.06350, section 4, and CLIPScore_eval/CLIP_similarity.py of
    Karine-Huang/T2I-CompBench: no prefix, no factor, and negative cosines stay. The images are cropped.

    Args, Returns, Raises: as `clip_score`, from -1 to 1, of the bare prompts.
    """
    return _cosines(images, texts)


def _cosines(images: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """Of each image with its own text, (pair,) float64."""
    images, texts = check_features(images, "vectors of images"), check_features(texts, "vectors of texts")
    if images.shape != texts.shape:
        raise UserError(
            f"The vectors of images have shape {images.shape} and those of texts {texts.shape}, but both must be the "
            "same (pair, feature): encode both with one CLIP, a text for each image."
        )
    lengths = np.linalg.norm(images, axis=1), np.linalg.norm(texts, axis=1)
    for name, length in zip(("image", "text"), lengths, strict=True):
        if not length.all():
            raise UserError(
                f"The vector of {name} {length.argmin()} is zero, so it has no direction to compare: "
                f"look at the weights that it was encoded with."
            )
    return np.einsum("pf,pf->p", images, texts) / (lengths[0] * lengths[1])
