"""FREE (Bae et al. 2023, arXiv 2310.05424): one exit, after E of L blocks; what exited tokens owe is made good later.

Training, one model that is two: with h^l the state after block l, at the N answer positions

    loss = (E CE(U(h^E)) + L CE(U(h^L))) / (E + L) + alpha KD,    alpha = 0.5

KD is the mean over E evenly spaced layers s (L/E, 2L/E, ..., L), whose states teach and get no gradient, of the mean
squared distance to the shallow state h^m(s), both behind the final norm. m(s) is found from the deepest s on: the
nearest of those below the one before; where none is left, that one again.

A token leaves after block E where its confidence exceeds lambda: the gap of its two likeliest tokens ("softmax"), or
the cosine of h^E and h^(E-1) ("cosine", the GateSkip authors'). Its deep K and V are not approximated: h^E waits in a
queue (free_queue.py) and goes through the deep blocks together with the next token that stays, before anybody looks at
them. Whoever stays so sees what it sees in the dense model, and computing the deep blocks for everyone gives the same
text: that is done here, in batches, and it is counted what the queue would have run.

The loss was read in FREE's code (6 of 24 blocks; the states of a decoder that reads no prompt; here the prompt's tokens
leave as others do). GateSkip's authors compared with 6 of 16 blocks, both CE alike, a KD of weight 1 whose teacher is
pulled along and may be any of the layers 6 to 16, no final norm at the exit, the batch's quantile as lambda, clamped,
no queue; and a block was passed by only where all tokens of a batch had left.

Shapes: B batch, S sequence, H hidden, V vocabulary, L blocks, E shallow ones, N answer positions.
"""
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from console import InputError

import torch
import torch.nn.functional as F

import early_exit
from data import collate
from early_exit import TOLERANCE, EarlyExit, open_early, through, unembed
from rows import KVCache
from savings import macs_of
from thresholds import chunks, frozen_threshold

ALPHA, CONFIDENCES = 0.5, ("softmax", "cosine")


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------

def alignment(distances):
    """m(s) for each teacher s: distances (E teachers, E students) -> (E,) int64, from 0; on the device."""
    index, last, found = torch.arange(distances.shape[1], device=distances.device), distances.shape[1], []
    for row in distances.flip(0):
        last = torch.where(index < last, row, torch.inf).argmin()                # all inf: 0 again
        found.append(last)
    return torch.stack(found[::-1])


def distillation(students, teachers):
    """KD of two lists of E states (N, H), the deepest last: a scalar. Teachers get no gradient."""
    distances = torch.stack([torch.stack([F.mse_loss(s, t.detach()) for s in students]) for t in teachers])
    return distances.gather(1, alignment(distances.detach())[:, None]).mean()


def loss(model, targets):
    """FREE's loss, summed over the N answer positions of the last pass: what early_exit.training asks for."""
    E, L = model.shallow, len(model.states) - 1
    h = [state.flatten(0, 1)[model.places] for state in model.states]            # L + 1 of (N, H), h_0 first
    ce = lambda state: F.cross_entropy(unembed(model, state).float(), targets, reduction="sum")
    normed = [model.model["norm"](state) for state in h]
    kd = distillation(normed[1:E + 1], [normed[round(k * L / E)] for k in range(1, E + 1)])
    return (E * ce(h[E]) + L * ce(h[L])) / (E + L) + ALPHA * len(targets) * kd


def training():
    """Inside, train.py --gate none trains a FREE model; for testbed.trained(tried=free.training)."""
    return early_exit.training(loss, Free)


# ---------------------------------------------------------------------------------------------------------------------
# Batches: everybody runs the deep blocks, and it is counted who would have, and when
# ---------------------------------------------------------------------------------------------------------------------

class Owing(KVCache):
    """A cache that knows how many tokens of each row have left and still wait, (B,)."""

    def select(self, rows):
        super().select(rows)
        self.owed = self.owed[rows]


class Free(EarlyExit):
    """A dense model with one exit. Its passes and Traces tell of the queue that it does not have."""
    confidences, least_blocks = CONFIDENCES, 2
    confidence, threshold = "softmax", 1.0                       # 1: nobody leaves

    @property
    def shallow(self):
        """E: 3 of 8 blocks, as 6 of 16."""
        return max(1, round(3 * self.config.num_hidden_layers / 8))

    def sure(self, h, before):
        """(confidence (B, S) float64, at most 1; U(h) (B, S, V) where it was needed, or None) of h = h^E."""
        wide = torch.promote_types(h.dtype, torch.float32)
        if self.confidence == "cosine":
            return F.cosine_similarity(h.to(wide), before.to(wide), dim=-1).double().clamp(max=1.0), None
        logits = unembed(self, h)
        top = logits.to(wide).softmax(-1).topk(2).values                         # (B, S, 2)
        return (top[..., 0] - top[..., 1]).double(), logits

    def leaves(self, layer, h, before, active):
        if layer + 1 == self.shallow:
            self.at_exit = h, before
        return None, 0                                           # K and V of all are made now: they are exact anyway

    def forward(self, input_ids, cache=None, last=False, places=None, **others):
        """As the core's. Trace.keep is what the paper counts: who has left runs no deep block. Trace.more_macs adds
        what its turn in the queue then costs, and each question of "softmax"."""
        if cache is not None and cache.used == 0:
            cache.__class__, cache.owed = Owing, torch.zeros_like(cache.lengths)
        logits, trace = super().forward(input_ids, cache=cache, last=last, places=places, **others)
        (h, before), self.at_exit = self.at_exit, None
        if self.training:
            return logits, trace
        pick = lambda x: x.flatten(0, 1)[places] if places is not None else x[:, -1] if last else x
        c, early_logits = self.sure(h, before)
        gone = trace.valid & (c > self.threshold)                                # (B, S)
        early_logits = unembed(self, pick(h)) if early_logits is None else pick(early_logits)
        return torch.where(pick(gone)[..., None], early_logits, logits), self.told(trace, gone, pick(gone), cache)

    def told(self, trace, gone, answered, cache):
        """The Trace of a pass in which these have left, gone (B, S); answered: those of them that logits are of."""
        config, E, deep_blocks = self.config, self.shallow, self.config.num_hidden_layers - self.shallow
        valid, stays, column = trace.valid, trace.valid & ~gone, torch.arange(gone.shape[1], device=gone.device)
        new = valid.sum(1)                                                       # (B,)
        owed, seen = (0, new) if cache is None else (cache.owed, cache.lengths)  # (B,) who waited; all tokens so far
        last = torch.where(stays, column, -1).amax(1)                            # (B,) the last that stays
        waits = (valid & (column > last[:, None])).sum(1) + torch.where(last < 0, owed, 0)       # (B,) from now on
        deep = owed + new - waits                                                # (B,) who goes through now, with it
        if cache is not None:
            cache.owed = waits

        H, width = config.hidden_size, config.num_attention_heads * config.head_dim
        token = 2 * H * (width + config.num_key_value_heads * config.head_dim) + 3 * H * config.intermediate_size
        more = (deep - new) * token + 2 * width * (deep * (seen - waits) - new * seen)           # (B,) than in dense
        asked = config.vocab_size * H * (valid.sum() - answered.sum()) if self.confidence == "softmax" else 0
        paper = replace(trace, keep=trace.keep[:2 * E] + [stays] * 2 * deep_blocks)
        dense = macs_of(config, trace) - macs_of(config, paper)
        return replace(paper, more_macs=dense + deep_blocks * more.sum() + asked)


open_free = partial(open_early, Free)                            # (folder, device, dtype, confidence=, threshold=)


# ---------------------------------------------------------------------------------------------------------------------
# Thresholds for wanted savings
# ---------------------------------------------------------------------------------------------------------------------

@torch.no_grad()
def thresholds(model, items, savings):
    """{saving: lambda} with (share of tokens that leave) x (1 - E/L) = saving, which is how the paper counts: quantiles
    of the confidences of all tokens of items (ids, loss_mask); None where ties leave it more than TOLERANCE away.
    InputError for more than 1 - E/L."""
    E, L, device, found = model.shallow, model.config.num_hidden_layers, next(model.parameters()).device, []
    for saving in savings:
        if not 0.0 <= saving <= 1 - E / L:
            raise InputError(f"a saving of {saving:.1%}: FREE with its exit after block {E} of {L} saves from 0% to "
                             f"{1 - E / L:.1%}: ask for that")
    for chunk in chunks(items, length=lambda item: len(item[0])):
        input_ids, _, valid = (x.to(device) for x in collate(chunk))             # (B, S) each
        found.append(model.sure(*through(model.model["layers"][:E], *model.begin(input_ids, valid=valid)))[0][valid])
    ends, c, found = {0.0: 1.0, 1.0: -2.0}, torch.cat(found), {}                 # nobody, everybody
    for saving in savings:
        share = saving / (1 - E / L)
        tau = ends.get(share) or frozen_threshold(c, 1 - share)
        saved = (c > tau).double().mean().item() * (1 - E / L)
        found[saving] = tau if abs(saved - saving) <= TOLERANCE else None
    return found
