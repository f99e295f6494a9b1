"""MindSkip by router tuning (He et al. 2024, arXiv 2410.13184): a frozen model whose routers drop whole attentions.

One decision per layer and sequence, from the mean of what attention would read, over the tokens t of the sequence:

    p = sigmoid(w mean_t norm(h_t)),  z = 1[p >= 0.5],  h' = h + z A(norm(h))      backward dz/dp = 1; w = 0 at first

Only w is trained. The loss adds lambda times the mean of z over layers and sequences (--sparsity-weight; 0 in their
script), which pushes attention out. At inference the prompt decides, and that holds for all that is generated; a layer
without attention has no K and V of this sequence (but layer 0, where the core computes them for everybody, and counts
them). For other savings 0.5 moves to a quantile of p over calibration prompts and layers. Where an answer is given and
not generated, as in training, all of the text decides.

The method is read from its code (CASE-Lab-UMD/Router-Tuning). The GateSkip paper has a row of router-tuned MoD; its job
names a case that no version of their code that we read has, and nothing in that code decides for a sequence. What they
most likely ran is Mixture-of-Depths with a frozen backbone, token by token: mixture_of_depths.training(), TOKEN_FLAGS.

Shapes: B batch, S sequence, H hidden, L layers.
"""
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import mixture_of_depths
import routed
from budgets import prompt_of, realised
from data import collate
from gates import Gate, SkipPolicy, skippable_share
from linear import Linear
from model import Block
from testbed import ROUNDS, TOLERANCE
from thresholds import chunks, frozen_threshold, search

FLAGS = "--gate scalar --threshold branch --skip attn --kv copy_up --freeze-backbone"
TOKEN_FLAGS = f"{mixture_of_depths.FLAGS} --freeze-backbone"


class Router(Gate):
    """p of a sequence, in the place of attention's gate."""

    def __init__(self, config, hidden):
        super(Gate, self).__init__()
        self.config, self.out = config, Linear(hidden, 1, bias=False)

    def forward(self, x, valid):
        """x (B, S, H), valid (B, S) -> z (B, S, 1), p (B, S), the same for all tokens of a sequence. Outside of
        training z is 1: the policy tells, from p, who skips."""
        x = torch.where(valid[..., None], x, 0.0).to(self.out.weight.dtype)
        p = torch.sigmoid(self.out(x.sum(1) / valid.sum(1, keepdim=True)))       # (B, 1)
        z = (p >= 0.5).to(p.dtype) + (p - p.detach()) if self.training else torch.ones_like(p)
        return z[..., None].expand(*x.shape[:2], 1), p.expand(x.shape[:2])

    @torch.no_grad()
    def init_weights(self, generator=None):
        self.out.weight.zero_()


class Always(Gate):
    """In the place of the MLP's gate, and of attention's where its router has spoken: open, and without parameters."""

    def __init__(self, config):
        super(Gate, self).__init__()
        self.config = config

    def forward(self, x):
        one = x.new_ones(x.shape[:2], dtype=torch.promote_types(x.dtype, torch.float32))
        return one[..., None], one                               # (B, S, 1), (B, S)

    def init_weights(self, generator=None):
        pass


class RoutedBlock(Block):
    """The core's block, whose attention asks its router once a sequence."""

    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.self_attn_gate, self.mlp_gate = Router(config.gate, config.hidden_size), Always(config.gate)

    def forward(self, h, below, gates, call):
        router, always = gates
        asked = partial(router, valid=call.valid)                # the mean leaves padding out
        asked.config = router.config                             # which the core's Block reads
        found = super().forward(h, below, (asked if call.fresh else always, always), call)
        if call.cache is not None:
            call.cache.note(self.layer, call.keep[2 * self.layer], call.slots)
        return found


def mean_loss(gates, valid=None, kind=None, budget=None, costs=None):
    """The mean of z over layers and sequences: the share of attention that runs, with the gradient of mean p. A scalar.

    gates: per branch (B, S, 1), as RoutedBlock gives them; the other arguments are gates.sparsity_loss's, unused."""
    return torch.stack(gates[0::2])[:, :, 0].mean()


class MindSkip(routed.Routed):
    """Nothing to choose: attention alone is routed."""
    name, block, loss = "mindskip", RoutedBlock, staticmethod(mean_loss)
    flags = {**routed.Routed.flags, "skip": ("attn",), "kv": ("copy_up",), "freeze_backbone": (True,)}

    def begin(self, *args, **named):
        """As the core's; after the prompt it is settled who has attention."""
        h, call = super().begin(*args, **named)
        if not call.fresh:                                       # slot 0 holds what was decided of the whole sequence
            call.keep = {2 * layer: call.valid & kept[:, :1] for layer, kept in enumerate(call.cache.kept)}
        return h, call

    def forward(self, input_ids, positions=None, valid=None, cache=None, **how):
        """As the core's; a sequence pays its routers once, H a layer."""
        asked = cache is None or cache.used == 0
        logits, trace = super().forward(input_ids, positions, valid, cache, **how)
        routers = asked * len(input_ids) * self.config.num_hidden_layers * self.config.hidden_size
        return logits, replace(trace, more_macs=routers)

    def router_macs(self, hidden):
        """Nothing per token: see forward."""
        return 0


@torch.no_grad()
def scores_of(model, prompts):
    """p of each layer for each prompt (a list of token ids) where nothing is skipped: (L * prompts,)."""
    device, found = next(model.parameters()).device, []
    for chunk in chunks(prompts):
        ids, _, valid = (x.to(device) for x in collate([(prompt, [False] * len(prompt)) for prompt in chunk]))
        found.append(torch.stack(model(ids, valid=valid, last=True)[1].scores[0::2])[:, :, 0].flatten())     # (L * B,)
    return torch.cat(found)


def policies(model, items, budgets):
    """{budget: SkipPolicy}: one threshold for all layers, a quantile of p over calibration prompts and layers, then
    corrected until a share (1 - budget) of attention is skipped in texts that the model continues. As routed.policies.
    """
    layers, found = model.config.num_hidden_layers, {}
    pool, share = scores_of(model, [prompt_of(item) for item in items]), skippable_share("attn", layers)
    policy = lambda b, tau: SkipPolicy("frozen", b, "attn", thresholds=[tau] * (2 * layers))
    for b in map(float, budgets):
        found[b] = SkipPolicy("none", 1.0, "attn")
        if b < 1.0:
            skipped = lambda tau: realised(model, items, policy(b, tau))
            tau, _, _ = search(partial(frozen_threshold, pool), skipped, (1 - b) * share, 1 - b, TOLERANCE, ROUNDS)
            found[b] = policy(b, tau)
    return found


training = partial(routed.training, MindSkip)
open_model = partial(routed.open_model, MindSkip)                # (folder, device, dtype)
as_trained = routed.as_trained
