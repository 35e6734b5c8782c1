"""Measures anybody's samples as ADM's evaluator does: no config, no workdir, nothing of ours in the files.

SAMPLES holds `arr_0`, images (N, height, width, 3) uint8, of which published numbers have 50,000. REFERENCE is one of
those that ADM published, such as VIRTUAL_imagenet256_labeled.npz: `arr_0`, `mu`, `sigma`, `mu_s`, `sigma_s`. WEIGHTS is
torch-fidelity's weights-inception-2015-12-05-6726825d.pth, which pytorch-fid has too; the first time needs torch to
read it. Prints FID, sFID, Inception score, precision and recall, and with --json writes them beside what they are of.

What the reference has nothing for is left out. Precision and recall compare distances in float16, as ADM does, which
--float32 does not: published numbers move by a thousandth.
"""

import argparse
import pathlib

from ard_jax.evaluation import adm_metrics
from ard_jax.evaluation.adm import SPLIT_SIZE
from ard_jax.evaluation.inception import PUBLISHED_SHA256
from ard_jax.files import file_sha256, write_json
from ard_jax.version import __version__

WORDS = {
    "fid": "FID",
    "sfid": "sFID",
    "inception_score": "Inception score",
    "precision": "precision",
    "recall": "recall",
}


def run(args: argparse.Namespace) -> None:
    """Measures the files.

    Raises:
        UserError: what `adm_metrics` raises.
    """
    found = adm_metrics(args.samples, args.reference, args.weights, half=not args.float32, split_size=args.split)
    for name, value in found.items():
        print(f"{WORDS[name]:<16}", "left out: the reference has nothing for it" if value is None else f"{value:.4f}")
    if args.json:
        weights_sha256 = file_sha256(args.weights)
        told = {
            **found,
            "samples": str(args.samples),
            "samples_sha256": file_sha256(args.samples),
            "reference": str(args.reference),
            "reference_sha256": file_sha256(args.reference),
            "weights_sha256": weights_sha256,
            "published_weights": weights_sha256 == PUBLISHED_SHA256,
            "distances": "float32" if args.float32 else "float16",
            "split": args.split,
            "version": __version__,
        }
        write_json(args.json, told)
        print(f"written to {args.json}")


FLAGS = {
    "--samples": dict(type=pathlib.Path, required=True, metavar="FILE.npz", help="images to measure"),
    "--reference": dict(type=pathlib.Path, required=True, metavar="FILE.npz", help="what they are held against"),
    "--weights": dict(type=pathlib.Path, required=True, metavar="FILE", help="of FID's Inception"),
    "--json": dict(type=pathlib.Path, metavar="FILE", help="where the numbers are written, too"),
    "--float32": dict(action="store_true", help="distances of precision and recall in float32, not as ADM has them"),
    "--split": dict(type=int, default=SPLIT_SIZE, metavar="N", help="images of a split of the Inception score (5000)"),
}
