"""Encodes captions with a text encoder and stores their vectors, once, for all stages that are told captions.

Reads the captions that `captions.source` names and writes `captions/`. Record i is a function of caption i's text and
of the text encoder alone: captions of like lengths are encoded together, every device always `captions.batch_size` of
them, padded to the same number of tokens wherever they stand. Started again, on any number of hosts, it makes just the
shards that are missing, truncated or altered.
"""

import logging
import pathlib
from typing import Any

import jax
import ml_collections
import numpy as np

from ard_jax.build import compute_dtype
from ard_jax.captions.store import LAYOUT, NULL, record_features
from ard_jax.captions.texts import read_texts, texts_sha256
from ard_jax.config import plain
from ard_jax.convert.families.pixart import NULL_CAPTION_FILE
from ard_jax.errors import UserError
from ard_jax.files import file_sha256, read_npz, write_npz
from ard_jax.hosts import wait_for_all
from ard_jax.parallel import batch_shards, equal_batches, is_first, make_mesh, put_batch
from ard_jax.progress import Stopwatch
from ard_jax.sharded import DTYPES, Shard, describe, number_of_shards
from ard_jax.text_encoders import ENCODER_MESH, TextEncoder, open_text_encoder, pad_tokens
from ard_jax.version import __version__
from ard_jax.workdir import captions_folder, claim, teacher_folder, write_done

log = logging.getLogger("ard_jax")


def run(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
    """Makes the store.

    Raises:
        UserError: there are no captions or no text encoder, or the workdir belongs to another config.
    """
    watch, settings, mesh = Stopwatch(), config.captions, make_mesh(ENCODER_MESH, jax.local_devices())
    directory = captions_folder(config, workdir)
    texts, held_out = read_texts(config)
    dtype = compute_dtype(config.model.dtype)
    encoder = open_text_encoder(settings.encoder, settings.length, settings.cleaning, dtype, mesh)
    claim(directory, config, "captions", encoder=encoder.sha256, texts=texts_sha256(texts))
    ids, cut = encoder.tokenize(texts)
    if cut:
        log.warning("%d of %d captions have over %d tokens and are cut.", cut, len(texts), settings.length)
    stored = DTYPES[settings.dtype]
    if is_first():
        write_npz(directory / NULL, vectors=encoder.null().astype(stored).astype(np.float32))

    def records(numbers, _, bar):
        found = _encode(encoder, [ids[number] for number in numbers], settings.batch_size * batch_shards(mesh), mesh)
        for number, vectors in zip(numbers, found, strict=True):
            vectors = vectors.astype(stored)
            if not np.isfinite(vectors.astype(np.float32)).all():
                raise UserError(
                    f"the vectors of caption {number} are not finite in {settings.dtype}: set captions.dtype=bfloat16, "
                    f"or see that the text encoder's weights are whole."
                )
            yield {"vectors": vectors, "text": texts[number], "index": int(number)}
            bar.update()

    features = record_features(encoder.width, settings.dtype)
    LAYOUT.make_shards(
        directory,
        features,
        len(texts),
        settings.shard_size,
        records,
        "captions",
        jax.process_index(),
        jax.process_count(),
    )
    wait_for_all("all shards are written")
    if not is_first():
        return
    described = describe(directory, number_of_shards(len(texts), settings.shard_size))
    LAYOUT.finish(directory, features, described, _manifest(config, encoder, ids, cut, held_out, described, directory))
    log.info("%d captions of %.1f tokens on average.", len(texts), np.mean([len(own) for own in ids]))
    _compare_null(teacher_folder(config, workdir) / NULL_CAPTION_FILE, encoder.null())
    write_done(directory, {shard["file"]: shard["sha256"] for shard in described}, watch(), records=len(texts))


def _encode(encoder: TextEncoder, ids: list[np.ndarray], batch_size: int, mesh: jax.sharding.Mesh) -> list[np.ndarray]:
    """The vectors of each caption's own tokens, (token, width); captions that are padded alike are encoded together."""
    padded_to = np.array([pad_tokens([own], encoder.length)[0].shape[1] for own in ids])
    found: list[np.ndarray] = [np.empty(0)] * len(ids)
    for length in np.unique(padded_to):
        for rows, count in equal_batches(np.flatnonzero(padded_to == length), batch_size):
            batch = pad_tokens([ids[row] for row in rows], encoder.length)
            vectors = np.asarray(encoder.vectors(*put_batch(batch, mesh)))[:count]
            for row, own in zip(rows[:count], vectors, strict=True):
                found[row] = own[: len(ids[row])].copy()  # and not a view that keeps the padding
    return found


def _compare_null(path: pathlib.Path, ours: np.ndarray) -> None:
    """Says how far the empty caption that came with a PixArt's file is from the text encoder's own."""
    if not path.is_file():
        return
    theirs = read_npz(path)["vectors"]
    own = np.concatenate([ours, np.repeat(ours[-1:], max(len(theirs) - len(ours), 0), axis=0)])[: len(theirs)]
    apart = float(np.linalg.norm(theirs - own) / np.linalg.norm(own))
    log.info("the empty caption that came with the teacher is %.3g of its size away from this encoder's.", apart)


def _manifest(
    config: ml_collections.ConfigDict,
    encoder: TextEncoder,
    ids: list[np.ndarray],
    cut: int,
    held_out: int,
    shards: list[Shard],
    directory: pathlib.Path,
) -> dict[str, Any]:
    """How the store was made."""
    return {
        "format": 1,
        "code_version": __version__,
        "encoder": encoder.name,
        "encoder_sha256": encoder.sha256,
        "settings": plain(config)["captions"],
        "width": encoder.width,
        "longest": max(len(own) for own in ids),
        "tokens": sum(len(own) for own in ids),
        "cut": cut,
        "null_sha256": file_sha256(directory / NULL),
        "records": len(ids),
        "held_out": held_out,
        "shards": shards,
    }
