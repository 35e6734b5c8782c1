"""JAX's attention kernel for TPUs with the structure of blocks; loaded only where it is used, since that takes time."""

import dataclasses

import flax.linen as nn
import jax
import numpy as np

# This one comes with jax, at jax's version; tokamax's would be one more dependency to keep in step with it.
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask import Mask, MultiHeadMask

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
    tile = next(size for size in TILES if mask.tokens % size == 0)
    names = ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq")
    sizes = splash.BlockSizes(**dict.fromkeys(names, tile))  # type: ignore[arg-type]  # none of its other fields

    def local(q, k, v):  # of one device: a kernel cannot be split by the compiler
        heads_mask = MultiHeadMask([mask] * q.shape[2])
        kernel = splash.make_splash_mha(
            heads_mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret
        )
        q, k, v = (x.swapaxes(1, 2) for x in (q * q.shape[-1] ** -0.5, k, v))
        return jax.vmap(kernel)(q, k, v).swapaxes(1, 2)

    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not nn.get_logical_axis_rules():
        return local(q, k, v)
    axes = nn.logical_to_mesh_axes(("batch", None, "heads", None))
    assert axes is not None  # Flax has None for no names alone
    spec = divisible_spec(axes, q.shape, mesh)
    return jax.shard_map(local, in_specs=(spec,) * 3, out_specs=spec, check_vma=False)(q, k, v)
