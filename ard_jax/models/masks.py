"""Which earlier blocks a block sees in the history layers (docs/METHOD.md section 4, the paper's figure of masks).

Block 0 is the noise; block b > 0 is the b-th point of the trajectory after it.
"""

from ard_jax.errors import UserError

MASKS = ("diagonal", "window", "noise_and_own", "causal")


def visible_blocks(mask: str, block: int) -> tuple[int, ...]:
    """The blocks that `block` sees, in rising order, its own included.

    Args:
        mask: "diagonal" (M1: itself), "window" (M2: the one before and itself), "noise_and_own" (M3: the noise and
            itself) or "causal" (M4: every block up to itself).
        block: its index, 0 for the noise.

    Raises:
        UserError: the mask has no such name.
    """
    if mask == "diagonal":
        return (block,)
    if mask == "window":
        return tuple(range(max(block - 1, 0), block + 1))
    if mask == "noise_and_own":
        return (0, block) if block else (0,)
    if mask == "causal":
        return tuple(range(block + 1))
    raise UserError(f"mask is {mask!r}, which does not exist: choose one of {', '.join(MASKS)}.")


TILES = (512, 256, 128)  # tokens that the TPU kernel works on at a time: the first that divides a block
