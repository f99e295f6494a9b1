"""SkipLayer (Zeng et al. 2023, arXiv 2311.15436): a router per branch decides for each token, run or bypass.

    a = W x + b, two logits per token       z = onehot(argmax(a + Gumbel noise)) in training, straight through softmax
    h' = h + z_1 f(norm(h))                 at inference: run if softmax(a)_1 > tau, with no noise and no factor

No ranking, so it is causal. An auxiliary loss pins the density: mean over branches of (mean over tokens of z_1 - d)^2,
with lambda 0.1 and d the budget b_t of train.py. K and V of who bypasses attention are computed: others attend to it.

The idea is from the paper's abstract, the loss from the GateSkip authors' code, the rest from memory of the paper,
which trains from scratch. On a pretrained model the router begins nearly open, softmax([0, 5])_1 = 0.993: two even
logits would drop half of it. The GateSkip authors' code begins even and aims at density 1. It scales what runs by
softmax(a)_1 at evaluation, and for what bypasses it returns softmax(a)_0 times the branch's normalised input, which is
then added to the residual: a token that "skips" gets a full-sized vector. as_published_code does these last two.

Shapes: B batch, S sequence, H hidden.
"""
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import routed
from gates import Gate
from linear import Linear
from model import Block

FLAGS = "--gate scalar --threshold branch --skip all --kv dense --sparsity-weight 0.1"           # and a --budget-end


class Router(Gate):
    """Two logits in the place of a gate: the core's Block multiplies by z in training, and by 1 what runs later."""

    def __init__(self, config, hidden):
        super(Gate, self).__init__()
        self.config, self.out = config, Linear(hidden, 2)        # a_0: bypass, a_1: run

    def forward(self, x):
        """x (B, S, H) -> z_1 (B, S, 1), softmax(a)_1 (B, S); both in the router's dtype."""
        a = self.out(x.to(self.out.weight.dtype))                # (B, S, 2)
        p = a.softmax(-1)[..., 1]
        if not self.training:
            return torch.ones_like(p)[..., None], p
        gumbel = -torch.empty_like(a).exponential_().log()
        soft = (a + gumbel).softmax(-1)[..., 1:]                 # (B, S, 1), temperature 1
        return (soft > 0.5).to(soft.dtype) + (soft - soft.detach()), p

    @torch.no_grad()
    def init_weights(self, generator=None):
        self.out.weight.normal_(0, 0.01, generator=generator)
        self.out.bias.copy_(torch.tensor([0.0, 5.0]))


class RoutedBlock(Block):
    """The core's block with other gates; at inference under SkipPolicy("frozen", thresholds=tau, kv="dense")."""

    def __init__(self, config, layer, as_published_code):
        super().__init__(config, layer)
        self.as_published_code = as_published_code
        self.self_attn_gate = Router(config.gate, config.hidden_size)
        self.mlp_gate = Router(config.gate, config.hidden_size)

    def forward(self, h, below, gates, call):
        return (self.as_published if self.as_published_code else super().forward)(h, below, gates, call)

    def as_published(self, h, below, gates, call):
        """Block.forward, but for what happens to h."""
        kv, all_z, all_scores = None, [], []
        for branch, (norm, f, norm_after) in enumerate(self.branches(), 2 * self.layer):
            x = norm(h)                                                          # (B, S, H)
            z, p = gates[branch % 2](x)                                          # (B, S, 1), (B, S)
            if branch not in call.keep:
                call.keep[branch] = call.policy.keep(branch, p, call.valid)
            rows, looked_at = call.rows(call.keep[branch]), ()
            if f is self.self_attn:
                kv = f.keys_values(x, rows, below, call)                         # (B, S, Hkv, D) each
                looked_at = rows, *call.store(self.layer, *kv), call
            weight = (z if self.training else p[..., None]).to(h.dtype)          # (B, S, 1)
            bypasses = call.valid if self.training else ~call.keep[branch]       # of all that train 1 - z does
            h = torch.where(bypasses[..., None], h + (1 - weight) * x, h)        # the deviation: x, where nothing ran
            if not rows.none:
                o = f(rows.take(x), *looked_at)                                  # (B, S, H) or (N, H)
                h = rows.add(h, rows.take(weight) * (o if norm_after is None else norm_after(o)))
            all_z.append(z)
            all_scores.append(p)
        return h, kv, all_z, all_scores


def density_loss(gates, valid=None, kind=None, budget=1.0, costs=None):
    """Mean over branches of (mean over valid tokens of z_1 - budget)^2. A scalar.

    gates: per branch (B, S, 1), as Router gives them; the other arguments are gates.sparsity_loss's."""
    valid = torch.ones_like(gates[0][..., 0], dtype=torch.bool) if valid is None else valid
    densities = [torch.where(valid, z[..., 0], 0.0).sum() / valid.sum() for z in gates]
    return sum((density - budget) ** 2 for density in densities) / len(gates)


class SkipLayer(routed.Routed):
    """settings: as_published_code."""
    name, block, defaults = "skiplayer", RoutedBlock, {"as_published_code": False}
    flags = {**routed.Routed.flags, "skip": ("all",), "kv": ("dense",)}
    loss = staticmethod(density_loss)

    def router_macs(self, hidden):
        """Two logits a branch."""
        return 2 * hidden


training = partial(routed.training, SkipLayer)                   # (as_published_code=)
open_model = partial(routed.open_model, SkipLayer)               # (folder, device, dtype)
policies, as_trained = routed.policies, routed.as_trained
