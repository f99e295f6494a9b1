"""Mixture-of-Depths (Raposo et al. 2024, arXiv 2404.02258): a block runs only the tokens that its router ranks highest.

r_i = w h_i + b ranks the n tokens of a sequence; the k = floor(C n) highest, T, go through the block together and
attend to each other alone, at their own positions, and the others keep their state:

    h'_i = h_i + sigmoid(r_i) f_i(h_T)  for i in T,  else h'_i = h_i     f: attention and MLP, no outer residual

The k highest look ahead, so a causal substitute decides at inference, by a threshold on its probability. substitute:
"predictor"  a small MLP on a detached h is taught by cross-entropy who is in T; the backbone feels nothing of it
"router"     r itself is taught that by the same loss; a token runs where r > 0

The original (its abstract; the rest from memory) trains from scratch with r itself as the factor, C = 12.5 %
and a router in every other block. On a pretrained model sigmoid(r), open at first, begins near the dense one, and every
block is routed here, as in the GateSkip authors' code, where C falls to 0.8. It computes K and V for all tokens (--kv
dense). In training it multiplies the residual too, h' = sigmoid(r) (h + f), and nothing at evaluation:
as_published_code here. It evaluates by the quantile of the predictor over the batch: SkipPolicy("batch").

Shapes: B batch, S sequence, T key positions, H hidden, N rows that run, M the most of them in one sequence.
"""
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from console import InputError

import torch
import torch.nn.functional as F

import routed
from gates import Gate, SkipPolicy
from linear import Linear
from model import Attention, Block, attend, attend_alone, rotate
from rows import attention_mask

FLAGS = "--gate scalar --threshold branch --skip layer --kv copy_up --sparsity-weight 0.01"      # and a --budget-end
SUBSTITUTES = ("predictor", "router")


class TopK(SkipPolicy):
    """In training: the floor(budget * n) of each sequence's n tokens with the highest scores, one at least."""

    @torch.no_grad()
    def keep(self, branch, scores, valid):
        """scores, valid (B, S) -> (B, S) bool: T."""
        if self.budget >= 1.0:
            return valid
        k = torch.floor(self.budget * valid.sum(1, keepdim=True).double() + 1e-9).clamp(min=1)       # (B, 1)
        order = scores.double().masked_fill(~valid, -torch.inf).argsort(dim=1, descending=True, stable=True)
        return valid & (order.argsort(dim=1) < k)                # (B, S)


class Router(Gate):
    """r = w h + b in the place of a gate, with a gate's beginning: sigmoid(5) = 0.993."""

    def forward(self, h):                                        # (B, S, H) -> (B, S), float32 or wider
        return self.out(h.to(self.out.weight.dtype))[..., 0]


class Predictor(Gate):
    """H -> H / 2, SiLU -> 1: the logit of being in T."""

    def __init__(self, config, hidden):
        super(Gate, self).__init__()
        self.inner, self.out = Linear(hidden, hidden // 2), Linear(hidden // 2, 1)

    def forward(self, h):                                        # (B, S, H) -> (B, S)
        return self.out(F.silu(self.inner(h.to(self.out.weight.dtype))))[..., 0]

    @torch.no_grad()
    def init_weights(self, generator=None):
        bound = self.inner.in_features ** -0.5
        for p in self.inner.parameters():
            p.uniform_(-bound, bound, generator=generator)
        self.out.weight.normal_(0, 0.01, generator=generator)
        self.out.bias.zero_()


class AmongChosen(Attention):
    """The core's attention, in which nobody sees a token that bypassed the block: it has no K and V there.

    They are omitted by a mask; K and V of a bypassing token are not computed, but in layer 0, where the core computes
    them for everybody (and savings.py counts them)."""

    def forward(self, x, rows, k, v, call):
        if call.policy.kv == "dense":                            # the authors' code: all have them
            return super().forward(x, rows, k, v, call)
        q = self.q_proj(x).unflatten(-1, (-1, self.head_dim))    # (B, S, Hq, D) or (N, Hq, D)
        q = rows.pad(rotate(q, rows.take(call.cos), rows.take(call.sin))).transpose(1, 2)        # (B, Hq, S or M, D)
        chosen = call.keep[2 * self.layer] if call.fresh else call.cache.kept[self.layer][:, :call.keys]     # (B, T)
        sees = torch.zeros(chosen.shape, dtype=q.dtype, device=q.device)
        sees = sees.masked_fill(~chosen, torch.finfo(q.dtype).min / 2)[:, None, None]            # (B, 1, 1, T)
        causal, _ = attention_mask(call, rows, self.window, True)                # (B or 1, 1, M, T); None: sees all
        looked_at = k, v, sees if causal is None else sees + causal, False, self.scale, self.softcap
        if rows.lone_queries:
            o = attend_alone(rows.lone_queries, q, *looked_at)                                   # (N, Hq, D)
        else:
            o = rows.unpad(attend(q, *looked_at).transpose(1, 2))                # (B, S, Hq, D) or (N, Hq, D)
        return self.o_proj(o.flatten(-2))


class RoutedBlock(Block):
    """h' = h + sigmoid(r) f(h) for the tokens that are chosen, once for attention and MLP; the others keep h."""

    def __init__(self, config, layer, substitute, as_published_code):
        super().__init__(config, layer)
        if substitute not in SUBSTITUTES:
            raise InputError(f"substitute {substitute!r} is not one of {', '.join(SUBSTITUTES)}")
        self.as_published_code, self.self_attn = as_published_code, AmongChosen(config, layer)
        self.self_attn_gate = Router(config.gate, config.hidden_size)
        self.mlp_gate = Predictor(config.gate, config.hidden_size) if substitute == "predictor" else None

    def forward(self, h, below, gates, call):
        """As Block.forward, but for what trace.gates gets: [(B, S, 2): the substitute's logit, membership in T] * 2"""
        router, predictor = gates
        (norm, attention, after_attention), (mlp_norm, mlp, after_mlp) = self.branches()
        r, branch = router(h), 2 * self.layer                                    # (B, S)
        guess = r if predictor is None else predictor(h.detach())                # (B, S)
        scores = (r if self.training else guess).sigmoid()
        if branch not in call.keep:                              # ranked by r, which does not saturate
            call.keep[branch] = call.policy.keep(branch, r if self.training else scores, call.valid)
        keep = call.keep[branch + 1] = call.keep[branch]                         # (B, S): the block is the unit
        rows, x = call.rows(keep), norm(h)
        kv = attention.keys_values(x, rows, below, call)                         # (B, S, Hkv, D) each
        if call.cache is not None:
            call.cache.note(self.layer, keep, call.slots)
        looked_at = call.store(self.layer, *kv)
        if not rows.none:
            inside = rows.take(h)                                                # (B, S, H) or (N, H)
            a = attention(rows.take(x), rows, *looked_at, call)
            a = a if after_attention is None else after_attention(a)
            m = mlp(mlp_norm(inside + a))
            f = a + (m if after_mlp is None else after_mlp(m))                   # without the outer residual
            weight = rows.take(r.sigmoid()[..., None]).to(f.dtype)
            if not self.as_published_code:
                f = weight * f
            elif self.training:                                  # the residual too, and nothing outside of training
                f = weight * (inside + f) - inside
            h = rows.add(h, f)
        return h, kv, [torch.stack([guess, keep.to(guess.dtype)], -1)] * 2, [scores] * 2


def membership_loss(gates, valid=None, kind=None, budget=None, costs=None):
    """Cross-entropy of the substitute's logit against membership in T, mean over valid tokens and blocks. A scalar.

    gates: per branch (B, S, 2) as RoutedBlock gives them; the other arguments are gates.sparsity_loss's."""
    total = 0.0
    for logit, chosen in (g.unbind(-1) for g in gates[0::2]):                    # (B, S) each
        loss = F.binary_cross_entropy_with_logits(logit, chosen, reduction="none")
        total = total + (loss.mean() if valid is None else torch.where(valid, loss, 0.0).sum() / valid.sum())
    return total / len(gates[0::2])


class MixtureOfDepths(routed.Routed):
    """settings: substitute, one of SUBSTITUTES; as_published_code."""
    name, block, defaults = "mixture_of_depths", RoutedBlock, {"substitute": "predictor", "as_published_code": False}
    flags = {**routed.Routed.flags, "skip": ("layer",), "kv": ("copy_up", "dense")}
    loss = staticmethod(membership_loss)
    policy = staticmethod(lambda kind, budget, skip, kv: TopK("topk", budget, skip, kv))         # C = b_t

    def router_macs(self, hidden):
        """H for the router and H H / 2 + H / 2 for the predictor, once a block: half of it per branch."""
        predictor = hidden // 2 * (hidden + 1) if self.settings["substitute"] == "predictor" else 0
        return -(-(hidden + predictor) // 2)


training = partial(routed.training, MixtureOfDepths)             # (substitute=, as_published_code=)
open_model = partial(routed.open_model, MixtureOfDepths)         # (folder, device, dtype)
policies, as_trained = routed.policies, routed.as_trained
