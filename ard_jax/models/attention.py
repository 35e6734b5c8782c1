"""Softmax attention, within a row and across the blocks of a trajectory: the one place where it is computed.

Backends, chosen by `model.attention`:
- "xla": matrix products and a softmax, anywhere and in any type; the reference.
- "cudnn": NVIDIA's fused kernel, in half precision.
- "splash": JAX's own Pallas kernel for TPUs (`jax.experimental.pallas.ops.tpu.splash_attention`), which never forms the
  logits and skips the tiles of blocks that are not seen.
- "splash_interpreted": the same kernel run by JAX's interpreter on any device; very slow, for tests.
- "auto": the fused kernel of the device where it applies, else "xla".
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from ard_jax.errors import UserError
from ard_jax.models.masks import TILES, visible_blocks

BACKENDS = ("auto", "xla", "cudnn", "splash", "splash_interpreted")
LONG = 1024  # tokens from which "auto" takes the TPU kernel
KEYS = 256  # at once on a CPU, where XLA makes one operation of both products and the softmax while these fit its cache


def _why_unsupported(backend: str, platform: str, dtype: jnp.dtype, tokens: int, head_dim: int) -> str | None:
    """What keeps a backend from running there, None if nothing does; arguments as in `choose_backend`."""
    if backend == "cudnn":
        if platform not in ("gpu", "cuda"):
            return f"it needs an NVIDIA GPU, and this is {platform}"
        if (found := compute_capability()) and found < (8, 0):  # where JAX itself ends in an error
            here = ".".join(map(str, found))
            return f"it needs a GPU of compute capability 8.0 (Ampere) or newer, and here it is {here}"
        if dtype not in (jnp.bfloat16, jnp.float16):
            return f"it computes in bfloat16 or float16, not in {jnp.dtype(dtype).name}"
        if head_dim % 8 or head_dim > 128:
            return f"its heads are multiples of 8 up to 128 wide, not {head_dim}"
    if backend == "splash" and platform != "tpu":
        return f"it needs a TPU, and this is {platform}"
    if backend in ("splash", "splash_interpreted"):
        if dtype not in (jnp.bfloat16, jnp.float32):
            return f"it computes in bfloat16 or float32, not in {jnp.dtype(dtype).name}"
        if tokens % TILES[-1]:
            return f"its blocks are multiples of {TILES[-1]} tokens, not {tokens}"
    return None


def compute_capability() -> tuple[int, ...] | None:
    """The least of this machine's NVIDIA GPUs, such as (7, 5); None where there is none: others may be planned for."""
    try:
        return min(tuple(map(int, gpu.compute_capability.split("."))) for gpu in jax.local_devices(backend="gpu"))
    except (RuntimeError, ValueError):  # there is no GPU, or it is AMD's, which has a name there
        return None


def choose_backend(backend: str, platform: str, dtype: jnp.dtype, tokens: int, head_dim: int) -> str:
    """The backend that computes attention.

    Args:
        backend: a name in `BACKENDS`.
        platform: "cpu", "gpu" (NVIDIA's; or "cuda"), "rocm" or "tpu".
        dtype: of queries, keys and values.
        tokens: of a block.
        head_dim: width of a head.

    Raises:
        UserError: there is no such backend, or it was asked for by name and cannot run.
    """
    if backend not in BACKENDS:
        raise UserError(f"attention is {backend!r}: choose one of {', '.join(BACKENDS)}.")
    if backend == "auto":
        wanted = ["cudnn"] + ["splash"] * (tokens >= LONG)
        able = [name for name in wanted if not _why_unsupported(name, platform, dtype, tokens, head_dim)]
        return (*able, "xla")[0]
    reason = _why_unsupported(backend, platform, dtype, tokens, head_dim)
    if reason:
        raise UserError(f"attention is {backend!r}, which cannot run here: {reason}; choose auto.")
    return backend


def target_platform() -> str:
    """What the program is traced for: the devices of its mesh, which need not be here, else the default backend."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    kind = device.device_kind.lower() if device else ""
    if kind.startswith("tpu"):
        return "tpu"
    platform = jax.default_backend()
    is_amd = platform == "gpu" and "rocm" in jax.devices()[0].client.platform_version.lower()
    return "rocm" if is_amd else platform


def attention(q: jax.Array, k: jax.Array, v: jax.Array, backend: str = "xla") -> jax.Array:
    """Every query meets every key of its row: (rows, query or key, heads, head width).

    Raises:
        UserError: what `choose_backend` raises.
    """
    tokens = math.gcd(q.shape[1], k.shape[1])
    backend = choose_backend(backend, target_platform(), q.dtype, tokens, q.shape[-1])
    if backend == "xla":
        return xla_attention(q, k, v)
    if backend == "cudnn":
        return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")
    from ard_jax.models.splash import BlockMask, splash_attention

    key_blocks = k.shape[1] // tokens
    everything = BlockMask((tuple(range(key_blocks)),) * (q.shape[1] // tokens), key_blocks, tokens)
    return splash_attention(q, k, v, everything, interpret=backend == "splash_interpreted")


def cross_attention(q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array, backend: str = "xla") -> jax.Array:
    """Every query meets the first `lengths` keys of its example, such as a caption's; no mask over all pairs is formed.

    Args:
        q: (row, query, heads, head width), an example's rows side by side.
        k, v: (batch, key, heads, head width).
        lengths: how many keys an example has, (batch,), 1 at least; those after them are padding.
        backend: a name in `BACKENDS`.

    Returns:
        Of the shape of `q`.

    Raises:
        UserError: what `choose_backend` raises.
    """
    rows = q.reshape(k.shape[0], -1, *q.shape[2:])  # which may be symbolic
    backend = choose_backend(backend, target_platform(), q.dtype, q.shape[1], q.shape[-1])
    if backend == "xla":
        output = xla_attention(rows, k, v, lengths)
    elif backend == "cudnn":
        output = jax.nn.dot_product_attention(
            rows, k, v, key_value_seq_lengths=lengths.astype(jnp.int32), implementation="cudnn"
        )
    else:
        from ard_jax.models.splash import splash_cross_attention

        output = splash_cross_attention(rows, k, v, lengths, interpret=backend == "splash_interpreted")
    return output.reshape(q.shape)


def block_attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: str, steps: int, backend: str = "xla") -> jax.Array:
    """Each block's queries meet the keys of just the blocks that it sees; no mask over S·T tokens is formed.

    Args:
        q, k, v: (batch · block, token, heads, head width).
        mask: which blocks, see `masks.visible_blocks`.
        steps: S, the number of blocks.
        backend: a name in `BACKENDS`.

    Raises:
        UserError: what `choose_backend` raises.
    """
    tokens, platform = q.shape[1], target_platform()
    backend = choose_backend(backend, platform, q.dtype, tokens, q.shape[-1])
    if backend.startswith("splash"):
        from ard_jax.models.splash import BlockMask, splash_attention

        q_rows, k_rows, v_rows = (x.reshape(-1, steps * tokens, *x.shape[2:]) for x in (q, k, v))
        blocks = BlockMask(tuple(visible_blocks(mask, block) for block in range(steps)), steps, tokens)
        interpret = backend == "splash_interpreted"
        return splash_attention(q_rows, k_rows, v_rows, blocks, interpret).reshape(q.shape)
    q, k, v = (x.reshape(-1, steps, *x.shape[1:]) for x in (q, k, v))
    at_once = max(1, KEYS // tokens) if (backend, platform) == ("xla", "cpu") else steps
    outputs = []
    for block in range(steps):
        seen = visible_blocks(mask, block)
        groups = [seen[i : i + at_once] for i in range(0, len(seen), at_once)]
        keys, values = ([jnp.concatenate([x[:, b] for b in group], axis=1) for group in groups] for x in (k, v))
        if backend == "xla":
            outputs.append(_xla_attention(q[:, block], keys, values))
        else:
            outputs.append(attention(q[:, block], keys[0], values[0], backend))
    return jnp.stack(outputs, axis=1).reshape(-1, *q.shape[2:])


def block_mass(q: jax.Array, k: jax.Array, mask: str, steps: int) -> jax.Array:
    """The share of each block's attention that falls on each block, (batch, query block, key block).

    Args:
        q, k: (batch · block, token, heads, head width).
        mask, steps: as in `block_attention`.

    Returns:
        Means over queries and heads, at least float32; they sum to 1 over the blocks that are seen, others have 0.
    """
    at_least_float32 = jnp.promote_types(q.dtype, jnp.float32)
    q, k = (x.reshape(-1, steps, *x.shape[1:]) for x in (q * q.shape[-1] ** -0.5, k))
    rows = []
    for block in range(steps):
        seen = jnp.asarray(visible_blocks(mask, block))
        logits = jnp.einsum("rqhd,rbkhd->rhqbk", q[:, block], k[:, seen], preferred_element_type=at_least_float32)
        weights = jax.nn.softmax(logits, axis=(-2, -1)).sum(axis=-1).mean(axis=(1, 2))
        rows.append(jnp.zeros((len(q), steps), at_least_float32).at[:, seen].set(weights))
    return jnp.stack(rows, axis=1)


# Of one block in one layer, what later blocks attend to: keys and values, each (rows, heads, token, head width).
KeysAndValues = tuple[jax.Array, jax.Array]


def cached_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, earlier: tuple[KeysAndValues, ...], backend: str = "xla"
) -> tuple[jax.Array, KeysAndValues]:
    """A block's queries meet the keys of earlier blocks and its own: a step of the cached sampler.

    Args:
        q, k, v: of the block, (rows, token, heads, head width).
        earlier: of the earlier blocks that it sees, as this function handed them back.
        backend: a name in `BACKENDS`.

    Returns:
        The output, (rows, token, heads, head width), and what to keep of this block.

    Raises:
        UserError: what `choose_backend` raises.
    """
    own = k.swapaxes(1, 2), v.swapaxes(1, 2)
    seen = (*earlier, own)
    if choose_backend(backend, target_platform(), q.dtype, q.shape[1], q.shape[-1]) != "xla":
        keys, values = (jnp.concatenate(blocks, axis=2).swapaxes(1, 2) for blocks in zip(*seen, strict=True))
        return attention(q, keys, values, backend), own
    # block by block, so that the cache is neither put together nor turned around in each step
    q = (q * q.shape[-1] ** -0.5).swapaxes(1, 2)
    return _weigh([_logits(q, keys) for keys, _ in seen], [values for _, values in seen]).swapaxes(1, 2), own


def xla_attention(q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array | None = None) -> jax.Array:
    """Softmax attention, (rows, query or key, heads, head width); of a row's keys the first `lengths` count, (rows,).

    The softmax is at least float32, and float64 for float64 inputs, which `jax.nn.dot_product_attention` is not: the
    reference numbers are checked in float64.
    """
    return _xla_attention(q, [k], [v], lengths)


def _xla_attention(
    q: jax.Array, keys: Sequence[jax.Array], values: Sequence[jax.Array], lengths: jax.Array | None = None
) -> jax.Array:
    """`xla_attention` to keys and values that come in pieces; `lengths` are of a single piece."""
    # heads before tokens: XLA's CPU backend is up to four times slower when a product's batch axes are apart
    q = (q * q.shape[-1] ** -0.5).swapaxes(1, 2)
    logits = [_logits(q, k.swapaxes(1, 2)) for k in keys]
    if lengths is not None:
        is_padding = jnp.arange(logits[0].shape[-1]) >= lengths[:, None]
        logits = [jnp.where(is_padding[:, None, None], -jnp.inf, logits[0])]
    return _weigh(logits, [v.swapaxes(1, 2) for v in values]).swapaxes(1, 2)


def _logits(q: jax.Array, k: jax.Array) -> jax.Array:
    """q · kᵀ, (rows, heads, query, key), at least float32, of (rows, heads, token, head width)."""
    at_least_float32 = jnp.promote_types(q.dtype, jnp.float32)
    return jnp.einsum("rhqd,rhkd->rhqk", q, k, preferred_element_type=at_least_float32)


def _weigh(logits: Sequence[jax.Array], values: Sequence[jax.Array]) -> jax.Array:
    """Softmax over the keys of all pieces, times their values, (rows, heads, query, width).

    The sum of the weights divides the output, which is smaller than they are: one pass over all pairs less.
    """
    highest = functools.reduce(jnp.maximum, [piece.max(axis=-1, keepdims=True) for piece in logits])
    weights = [jnp.exp(piece - jax.lax.stop_gradient(highest)) for piece in logits]
    total = functools.reduce(jnp.add, [piece.sum(axis=-1, keepdims=True) for piece in weights])
    products = [
        jnp.einsum("rhqk,rhkd->rhqd", piece.astype(v.dtype), v, preferred_element_type=piece.dtype)
        for piece, v in zip(weights, values, strict=True)
    ]
    return (functools.reduce(jnp.add, products) / total).astype(values[0].dtype)
