"""JAX's attention kernel for TPUs with the structure of blocks; loaded only where it is used, since that takes time."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

# This one comes with jax, at jax's version; tokamax's would be one more dependency to keep in step with it.
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask import FullMask, Mask, MultiHeadMask
from jax.sharding import PartitionSpec

from ard_jax.models.masks import TILES
from ard_jax.models.partition import divisible_spec


@dataclasses.dataclass(frozen=True)
class BlockMask(Mask):
    """Which of S·T keys a query sees, computed a tile at a time.

    A tile never crosses a block, so that it is seen whole or not at all and the kernel masks nothing inside of one.

    Attributes:
        seen: of each block of queries, the blocks of keys that it sees.
        key_blocks: how many there are.
        tokens: of a block.
    """

    seen: tuple[tuple[int, ...], ...]
    key_blocks: int
    tokens: int

    @property
    def shape(self) -> tuple[int, int]:
        """(queries, keys)."""
        return len(self.seen) * self.tokens, self.key_blocks * self.tokens

    def __getitem__(self, index: tuple[slice, slice]) -> np.ndarray:
        queries, keys = (np.arange(size)[part] // self.tokens for size, part in zip(self.shape, index, strict=True))
        table = np.asarray([[key in seen for key in range(self.key_blocks)] for seen in self.seen])
        return table[queries[:, None], keys[None]]


def splash_attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: BlockMask, interpret: bool) -> jax.Array:
    """The TPU kernel, float32 inside: (rows, query or key, heads, head width)."""
    return _run(q, k, v, None, mask, mask.tokens, mask.tokens, interpret)


def splash_cross_attention(q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array, interpret: bool) -> jax.Array:
    """The same of all queries and the first `lengths` keys of a row, (rows,); keys are padded to whole tiles."""
    padded = -(-k.shape[1] // TILES[-1]) * TILES[-1]
    k, v = (jnp.pad(x, ((0, 0), (0, padded - x.shape[1]), (0, 0), (0, 0))) for x in (k, v))
    return _run(q, k, v, lengths, FullMask((q.shape[1], padded)), q.shape[1], padded, interpret)


def _run(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lengths: jax.Array | None,
    mask: Mask,
    queries: int,
    keys: int,
    interpret: bool,
) -> jax.Array:
    """The kernel on tiles that divide `queries` and `keys`; of a row's keys the first `lengths` count, or all."""
    tile_q, tile_kv = (next(size for size in TILES if tokens % size == 0) for tokens in (queries, keys))
    sizes = splash.BlockSizes(
        block_q=tile_q,
        block_kv=tile_kv,
        block_q_dkv=tile_q,
        block_kv_dkv=tile_kv,
        block_q_dq=tile_q,
        block_kv_dq=tile_kv,
    )

    def local(q, k, v, lengths):  # of one device: a kernel cannot be split by the compiler
        heads_mask = MultiHeadMask([mask] * q.shape[2])
        kernel = splash.make_splash_mha(
            heads_mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret
        )
        q, k, v = (x.swapaxes(1, 2) for x in (q * q.shape[-1] ** -0.5, k, v))
        if lengths is None:
            return jax.vmap(kernel)(q, k, v).swapaxes(1, 2)
        # a query meets the keys of its own segment: 0 are the caption's, 1 is padding
        own = jnp.zeros((len(q), q.shape[2]), jnp.int32)
        padding = (jnp.arange(k.shape[2]) >= lengths[:, None]).astype(jnp.int32)
        return jax.vmap(kernel)(q, k, v, splash.SegmentIds(own, padding)).swapaxes(1, 2)

    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not nn.get_logical_axis_rules():
        return local(q, k, v, lengths)
    axes = nn.logical_to_mesh_axes(("batch", None, "heads", None))
    assert axes is not None  # Flax has None for no names alone
    spec = divisible_spec(axes, q.shape, mesh)
    specs = (spec, spec, spec, None if lengths is None else PartitionSpec(spec[0]))
    return jax.shard_map(local, in_specs=specs, out_specs=spec, check_vma=False)(q, k, v, lengths)
