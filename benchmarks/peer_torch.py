"""The student as published, in plain PyTorch, against ours: python -m benchmarks.peer_torch [--only ITEM …] [--quick]

sampler    the cached sampler's S steps, at batch 8 and at batch 1
training   forward, backward, clipping, AdamW and the running average, at batch 4
products   GFLOP/s of each product of a block, and of attention, in XLA and in PyTorch

The published formulation (docs/METHOD.md sections 4 and 7): one modulation a token; in training one dense mask over the
tokens of all blocks, in every layer; one final layer a step. Attention is PyTorch's `scaled_dot_product_attention`,
AdamW its fused one. Both sides have the same random weights, float32 and all threads, and run in turn in one
process, eager and by `torch.compile`; what comes out is compared first. Times are medians over the turns
(least–greatest), ratios are taken within a turn. It needs PyTorch: pip install -e '.[convert]'.

PyTorch multiplies by MKL, which on processors that are not Intel's may not use all that they have: `products` shows it.
With --onednn it multiplies by oneDNN, which does; PyTorch calls that setting "bf16", but on a processor without AMX
oneDNN stays in float32, which the printed differences show.
"""

import functools
import logging
import math
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from ard_jax.build import example_shape, make_student
from ard_jax.command_line import parse_flags, set_up_logging
from ard_jax.convert import to_torch
from ard_jax.errors import UserError
from ard_jax.models import ARDStudent, default_block_times, network_shapes, visible_blocks
from ard_jax.models.attention import xla_attention
from ard_jax.models.backbone import REMAT_POLICIES
from ard_jax.models.flops import student_macs
from ard_jax.objectives.ard import ard
from ard_jax.sampling import sample_student
from ard_jax.training.state import learning_rate
from benchmarks import dense
from benchmarks.measure import in_turns, spread, table
from benchmarks.speed import Step, compiled, giga, inputs, settings
from configs import smoke

# ----------------------------------------------------------------------------------------------------- the peer


def per_token_modulation(width: int, count: int) -> nn.Sequential:
    return nn.Sequential(nn.SiLU(), nn.Linear(width, count * width))


def modulated(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """Layer norm and its per-token affine part, all (batch, token, width)."""
    return F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale) + shift


class Block(nn.Module):
    """A layer: x and condition (batch, token, width)."""

    def __init__(self, width: int, heads: int, hidden: int, mlp_norm_eps: float):
        super().__init__()
        self.heads, self.mlp_norm_eps = heads, mlp_norm_eps
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, hidden), "fc2": nn.Linear(hidden, width)})
        self.adaLN_modulation = per_token_modulation(width, 6)

    def forward(self, x, condition, mask=None, earlier=None):
        """`mask` is added to the logits; `earlier` holds keys and values of blocks that x sees before its own.

        Returns:
            x of the same shape, and the keys and values of its tokens.
        """
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(condition).chunk(6, dim=-1)
        qkv = self.attn["qkv"](modulated(x, shift_a, scale_a))
        q, k, v = qkv.view(*x.shape[:2], 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        seen = [*(earlier or ()), (k, v)]
        keys, values = (torch.cat(parts, dim=2) if len(parts) > 1 else parts[0] for parts in zip(*seen, strict=True))
        h = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
        x = x + gate_a * self.attn["proj"](h.transpose(1, 2).reshape(x.shape))
        h = F.gelu(self.mlp["fc1"](modulated(x, shift_m, scale_m, self.mlp_norm_eps)), approximate="tanh")
        return x + gate_m * self.mlp["fc2"](h), (k, v)


class FinalLayer(nn.Module):
    def __init__(self, width: int, features: int):
        super().__init__()
        self.adaLN_modulation, self.linear = per_token_modulation(width, 2), nn.Linear(width, features)

    def forward(self, x, condition):
        return self.linear(modulated(x, *self.adaLN_modulation(condition).chunk(2, dim=-1)))


class Peer(nn.Module):
    """The published student, with its names and of the sizes of ours; images are (batch, channel, height, width)."""

    def __init__(self, student: ARDStudent, side: int):
        super().__init__()
        network = student.backbone
        width, patch, tokens = network.hidden_size, network.patch_size, (side // network.patch_size) ** 2
        features = patch**2 * network.channels * (2 if network.learn_sigma else 1)
        self.student, self.steps, self.history, self.tokens = (
            student,
            student.steps,
            student.layers_with_history,
            tokens,
        )
        self.x_embedder = nn.ModuleDict({"proj": nn.Conv2d(network.channels, width, patch, patch)})
        self.t_embedder = nn.ModuleDict(
            {"mlp": nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))}
        )
        self.y_embedder = nn.ModuleDict({"embedding_table": nn.Embedding(network.num_classes + 1, width)})
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, width), requires_grad=False)
        sizes = width, network.num_heads, round(width * network.mlp_ratio), network.mlp_norm_eps
        self.blocks = nn.ModuleList(Block(*sizes) for _ in range(network.depth))
        for step in range(self.steps):
            setattr(self, f"final_layer{step + 1 if step else ''}", FinalLayer(width, features))
        times = default_block_times(self.steps, student.noise_time, student.data_time)
        angles = torch.tensor(times)[:, None] * torch.exp(-np.log(10_000) * torch.arange(128) / 128)
        self.register_buffer("times", torch.cat([angles.cos(), angles.sin()], dim=-1).float(), persistent=False)
        masks = torch.from_numpy(dense.masks(student, tokens))
        self.register_buffer("masks", torch.zeros(masks.shape).masked_fill(~masks, -torch.inf), persistent=False)

    def condition(self, y, blocks: slice):
        """Time of the block + label, of every token: (batch, block · token, width)."""
        time, label = self.t_embedder["mlp"](self.times[blocks]), self.y_embedder["embedding_table"](y)
        return (time[None] + label[:, None]).repeat_interleave(self.tokens, dim=1)

    def embed(self, images):
        return self.x_embedder["proj"](images).flatten(2).transpose(1, 2) + self.pos_embed

    def predict(self, step: int, x, condition, side: int):
        """The next point by the final layer of a step; the learned variance is dropped."""
        network = self.student.backbone
        patch, grid = network.patch_size, side // network.patch_size
        patches = getattr(self, f"final_layer{step + 1 if step else ''}")(x, condition)
        images = patches.view(len(x), grid, grid, patch, patch, -1).permute(0, 5, 1, 3, 2, 4)
        return images.reshape(len(x), -1, side, side)[:, : network.channels]

    def forward(self, points, y):
        """(batch, block, channel, height, width) → predictions of the next points, of the same shape."""
        batch, side = len(points), points.shape[-1]
        x = self.embed(points.flatten(0, 1)).reshape(batch, self.steps * self.tokens, -1)
        condition = self.condition(y, slice(None))
        for number, block in enumerate(self.blocks):
            x, _ = block(x, condition, self.masks[int(number < self.history)])
        parts = zip(x.split(self.tokens, dim=1), condition.split(self.tokens, dim=1), strict=True)
        return torch.stack([self.predict(step, *part, side) for step, part in enumerate(parts)], dim=1)

    def step(self, number: int, x, y, cache):
        """The next point, and what later steps attend to: of each history layer its keys and values."""
        h, condition, kept = self.embed(x), self.condition(y, slice(number, number + 1)), []
        seen = visible_blocks(self.student.mask, number)[:-1]
        for layer, block in enumerate(self.blocks):
            earlier = [cache[b][layer] for b in seen] if layer < self.history else None
            h, own = block(h, condition, None, earlier)
            kept += [own] if layer < self.history else []
        return self.predict(number, h, condition, x.shape[-1]), kept


def make_peer(student: ARDStudent, params: Any, side: int) -> Peer:
    """With our parameters, by their published names."""
    peer = Peer(student, side)
    state = to_torch(student.with_backbone(image_size=side), params)
    peer.load_state_dict({name: torch.from_numpy(np.array(array)) for name, array in state.items()})
    return peer


def sampler(peer: Peer, step: Callable[..., Any], noise: torch.Tensor, y: torch.Tensor) -> Callable[[], torch.Tensor]:
    """The S cached steps, (batch, channel, height, width) → the last point; `step` is the peer's, compiled or not."""

    @torch.inference_mode()
    def run():
        x, cache = noise, []
        for number in range(peer.steps):
            x, kept = step(number, x, y, cache)
            cache = [*cache, kept]
        return x

    return run


class Training:
    """Steps of training, each going on from the last, as `speed.Step` does ours."""

    def __init__(self, peer: Peer, config: ml_collections.ConfigDict, batch: dict[str, np.ndarray], compiled: bool):
        self.forward = torch.compile(peer, dynamic=False) if compiled else peer
        self.params = [leaf for leaf in peer.parameters() if leaf.requires_grad]
        self.settings, self.rates = (
            config.distill.optimizer,
            learning_rate(config.distill.optimizer, config.distill.steps),
        )
        # fused: one pass over the parameters, several times as fast as the default on a CPU
        self.optimizer = torch.optim.AdamW(self.params, weight_decay=self.settings.weight_decay, fused=True)
        self.ema = [leaf.detach().clone() for leaf in self.params]
        noise, self.targets = (channels_first(batch[name]) for name in ("noise", "x0"))
        self.points = torch.cat([noise[:, None], self.targets[:, :-1]], dim=1)
        self.y = torch.from_numpy(batch["condition"])
        self.step = 0

    def __call__(self) -> torch.Tensor:
        for group in self.optimizer.param_groups:
            group["lr"] = float(self.rates(self.step))
        loss = ((self.forward(self.points, self.y) - self.targets) ** 2).mean()
        loss.backward()
        if self.settings.clip:
            nn.utils.clip_grad_norm_(self.params, self.settings.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        decay = min(self.settings.ema, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(self.ema, self.params, 1 - decay)
        self.step += 1
        return loss.detach()


# --------------------------------------------------------------------------------------------------- comparison


def channels_first(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.moveaxis(images.astype(np.float32), -1, -3).copy())


def random_params(student: ARDStudent) -> Any:
    """Parameters that all matter, as trained ones do: at the start of training, zeros hide most of the network."""
    rng = np.random.default_rng(0)

    def draw(leaf):
        scale = leaf.shape[-2] ** -0.5 if leaf.ndim > 1 else 0.02
        return jnp.asarray(scale * rng.standard_normal(leaf.shape, np.float32))

    return jax.tree.map(draw, network_shapes(student))


def difference(ours: Any, theirs: Any) -> float:
    """The largest, over the largest value."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


# ------------------------------------------------------------------------------------------------------- items


def comparison(
    what: str, batch: int, runs: dict[str, Callable[[], Any]], macs: list[int], seconds: float, turn: Any = None
) -> str:
    """Rows of runs in turns, ours the first; `macs` are one example's."""
    turns, rows = in_turns(runs, jnp.float32, seconds, turn), []
    for name, own in zip(runs, macs, strict=True):
        used = f"{turns.utilisation(name, 2 * batch * own):.3f}"
        times = spread(turns.seconds[name] / batch * 1e3, 1), spread(turns.ratio(name, "ours"))
        rows.append((what, batch, name, giga(own), f"{own / macs[0]:.3f}", *times, used))
    header = ("what", "batch", "by", "GMAC each", "FLOPs ÷ ours", "ms each", "time ÷ ours", "of XLA's product rate")
    return table(header, rows)


def sampling(config: ml_collections.ConfigDict, batch: int, seconds: float) -> str:
    student, shape = make_student(config), example_shape(config)
    params, text = random_params(student), []
    peer = make_peer(student, params, shape[0])
    # eager stays eager: compiling changes nothing in the peer itself
    steps = {"PyTorch": peer.step, "PyTorch, compiled": torch.compile(peer.step, dynamic=False)}
    alone = student.clone(history_layers=0)
    macs = [student_macs(student, shape), student_macs(alone, shape)]
    macs += [dense.dense_macs(student, shape, training=False)] * len(steps)
    for rows in dict.fromkeys((batch, 1)):
        given = inputs(config, rows)
        noise, y = jnp.asarray(given["noise"], jnp.float32), jnp.asarray(given["condition"], jnp.int32)
        ours = {
            name: compiled(lambda *args, own=own: sample_student(own, *args)[:, -1], params, noise, y)
            for name, own in (("ours", student), ("ours, N = 0", alone))
        }
        images, labels = channels_first(given["noise"]), torch.from_numpy(given["condition"])
        theirs = {name: sampler(peer, step, images, labels) for name, step in steps.items()}
        expected = np.moveaxis(np.asarray(ours["ours"]()), -1, -3)
        apart = max(difference(run(), expected) for run in theirs.values())
        turn = (*ours, *reversed(ours), *theirs)  # whichever came first would pay for what PyTorch did to the caches
        rows_of_table = comparison("sampler", rows, ours | theirs, macs, seconds, turn)
        text += [f"Samples differ by {apart:.1e} of the largest value.", rows_of_table]
    return "\n\n".join(text)


def training(config: ml_collections.ConfigDict, batch: int, seconds: float) -> str:
    student, shape, given = make_student(config), example_shape(config), inputs(config, batch)
    params = random_params(student)
    own = Step(ard(student, target="x0", columns=tuple(range(student.steps))), params, config, given)
    peers = {
        name: Training(make_peer(student, params, shape[0]), config, given, is_compiled)
        for name, is_compiled in (("PyTorch", False), ("PyTorch, compiled", True))
    }
    losses = [float(own()[1]["loss"])] + [float(run()) for run in peers.values()]
    apart = max(abs(loss / losses[0] - 1) for loss in losses[1:])
    macs = [3 * student_macs(student, shape)] + [3 * dense.dense_macs(student, shape, training=True)] * len(peers)
    rows = comparison("training step", batch, {"ours": own, **peers}, macs, seconds)
    return f"Remat {config.model.remat}; losses of the first step differ by {apart:.1e}.\n\n{rows}"


def products(config: ml_collections.ConfigDict, batch: int, seconds: float) -> str:
    """What `batch` images meet in a block, one product after the other."""
    network = make_student(config).backbone
    width, heads = network.hidden_size, network.num_heads
    tokens, hidden = (
        (example_shape(config)[0] // network.patch_size) ** 2,
        round(network.hidden_size * network.mlp_ratio),
    )
    sizes = dict(i=batch * tokens, w=width, n=3 * width, m=hidden, s=2048, t=2048, u=2048)
    sizes |= dict(b=batch, h=heads, q=tokens, k=tokens, d=width // heads)
    rng, rows = np.random.default_rng(0), []

    def row(name, macs, ours, theirs, *shapes):
        given = [rng.standard_normal(shape, np.float32) for shape in shapes]
        tensors = [torch.from_numpy(array) for array in given]
        runs = {"XLA": compiled(ours, *map(jnp.asarray, given)), "PyTorch": lambda: theirs(*tensors)}
        with torch.inference_mode():
            turns = in_turns(runs, jnp.float32, seconds / 10)
        rates = [spread(2 * macs / turns.seconds[run] / 1e9, 0) for run in runs]
        rows.append((name, *rates, spread(turns.ratio("PyTorch", "XLA"))))

    for name, equation in EQUATIONS.items():
        shapes = [[sizes[axis] for axis in factor] for factor in equation.split("->")[0].split(",")]
        macs = math.prod(sizes[axis] for axis in set(equation) & set(sizes))
        row(name, macs, functools.partial(jnp.einsum, equation), functools.partial(torch.einsum, equation), *shapes)
    shape = [batch, heads, tokens, width // heads]

    def attend(q, k, v):
        return xla_attention(*(x.swapaxes(1, 2) for x in (q, k, v))).swapaxes(1, 2)

    macs = 2 * math.prod(shape) * tokens
    row("attention as a whole", macs, attend, F.scaled_dot_product_attention, shape, shape, shape)
    return table(("product", "GFLOP/s, XLA", "GFLOP/s, PyTorch", "time, PyTorch ÷ XLA"), rows)


EQUATIONS = {
    "2048 × 2048 · 2048 × 2048": "st,tu->su",
    "x · W, qkv": "iw,wn->in",
    "x · W, into the MLP": "iw,wm->im",
    "x · W, out of the MLP": "im,mw->iw",
    "dy · Wᵀ, into the MLP": "im,wm->iw",
    "xᵀ · dy, into the MLP": "iw,im->wm",
    "q · kᵀ": "bhqd,bhkd->bhqk",
    "softmax · v": "bhqk,bhkd->bhqd",
}
ITEMS = {"sampler": (sampling, 8), "training": (training, 4), "products": (products, 8)}  # and how many rows at a time


# ------------------------------------------------------------------------------------------------ command line

FLAGS = {
    "--only": dict(nargs="+", choices=ITEMS, default=[*ITEMS], metavar="ITEM", help=", ".join(ITEMS)),
    "--size": dict(default="DiT-B/2", help="a published size such as DiT-S/2"),
    "--batch": dict(type=int, help="rows at a time, in place of each item's own number"),
    "--seconds": dict(type=float, default=30.0, help="turns start for so long, and there are two at least"),
    "--remat": dict(choices=REMAT_POLICIES, default="dots", help="what our backward pass keeps of a block"),
    "--onednn": dict(action="store_true", help="PyTorch multiplies by oneDNN instead of MKL"),
    "--quick": dict(action="store_true", help="a tiny network instead, to see that both sides agree"),
}


def quick_config() -> ml_collections.ConfigDict:
    """The smoke config's network, with the paper's steps and points."""
    config = smoke.get_config()
    config.diffusion.steps = 25
    config.trajectories.points = config.student.points = (15, 10, 5, 0)
    config.data.source = "tfds"
    return config


def main(arguments: list[str]) -> int:
    set_up_logging()
    logging.getLogger("ard_jax").setLevel(logging.WARNING)
    try:
        args = parse_flags(FLAGS, arguments, prog="python -m benchmarks.peer_torch", description=__doc__)
        config = quick_config() if args.quick else settings(args.size)
    except UserError as error:
        print(f"benchmarks.peer_torch: {error}", file=sys.stderr)
        return 2
    config.model.update(dtype="float32", remat=args.remat)
    if args.onednn:
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    size, products_by = "a tiny network" if args.quick else args.size, "oneDNN" if args.onednn else "MKL"
    peer = f"torch {torch.__version__} ({torch.backends.cpu.get_cpu_capability()}, {products_by})"
    about = f"{size}, float32, {torch.get_num_threads()} threads, jax {jax.__version__}, {peer}."
    print(f"# Beside PyTorch\n\n{about}", flush=True)
    for item in args.only:
        function, batch = ITEMS[item]
        print(f"\n## {item.capitalize()}\n\n{function(config, args.batch or batch, args.seconds)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
