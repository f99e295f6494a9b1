"""CALM (Schuster et al. 2022, arXiv 2207.07061): a token leaves at the first block whose state looks final.

In training every block's state predicts the answer through the one final norm and head, and the loss is the mean of
these L cross-entropies, later ones weighing more. At inference a token leaves after the first block where its
confidence c reaches lambda, one number for all blocks, and its state is carried up and projected to K and V there
(early_exit.py). Two confidences: "softmax", how far the likeliest token is ahead of the second, for which each block's
state goes through the head (counted, and the head once more for who has left, as it is run); "state", the cosine of a
block's output and input. After the paper; weights and softmax gap as in FREE's code (arXiv 2310.05424). Left out: the
paper's third confidence (a trained classifier), the fall of lambda with the position, and its bound on what an exit may
cost: here lambda is what saves a given share.

What GateSkip's authors ran instead: the head without the final norm at all exits but the last, in the loss and in the
confidence, and a block that is passed by only when all tokens of the call have left; until then nobody's state stops,
though their savings count it (as_published_code, where savings count what really stops). Also, not here, an exit at
the embedding, and for lambda a quantile of each batch.

Shapes: B batch, S sequence, H hidden, V vocabulary, L blocks, N tokens of a step's answers, or that have not left.
"""
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from tqdm import tqdm

from budgets import evaluate
from early_exit import TOLERANCE, EarlyExit, open_early, training, unembed
from gates import SkipPolicy

FLAGS = "--gate none"                                            # of train.py, inside train_context()
ROWS = 1024                                                      # that go through the head at once: a prompt has many


def exit_logits(model, h):
    """What the state predicts if its token leaves here. (N, H) -> (N, V)."""
    return model.lm_head(h) if model.as_published_code else unembed(model, h)


# ---------------------------------------------------------------------------------------------------------------------
# Training: an exit behind every block
# ---------------------------------------------------------------------------------------------------------------------

def weights(blocks):
    """What the L cross-entropies weigh: i / (1 + 2 + ... + L) for i = 1 ... L."""
    return [2 * i / (blocks * (blocks + 1)) for i in range(1, blocks + 1)]


def loss(model, targets):
    """The weighted cross-entropy of all exits of the last pass, summed over the answers' tokens. targets (N,) -> ()"""
    total, states = 0.0, [h.flatten(0, 1)[model.places] for h in model.states[1:]]           # L of (N, H)
    for weight, h in zip(weights(len(states)), states):
        logits = unembed(model, h) if h is states[-1] else exit_logits(model, h)             # (N, V)
        total = total + weight * F.cross_entropy(logits.float(), targets, reduction="sum")
    return total


def train_context(as_published_code=False):
    """A context in which train.py, under FLAGS, trains all exits: testbed.trained(..., tried=train_context)."""
    return training(loss, Calm, as_published_code=as_published_code)


# ---------------------------------------------------------------------------------------------------------------------
# Inference: who leaves
# ---------------------------------------------------------------------------------------------------------------------

def softmax_gap(model, h, before):
    """p_(1) - p_(2) of what the states predict, in [0, 1]. h (N, H) -> (N,), float32 or wider."""
    wide, gaps = torch.promote_types(h.dtype, torch.float32), []
    for some in h.split(ROWS):
        likeliest = exit_logits(model, some).softmax(-1, dtype=wide).topk(2).values          # (ROWS, 2)
        gaps.append(likeliest[:, 0] - likeliest[:, 1])
    return torch.cat(gaps)


def saturation(model, h, before):
    """cos(h_i, h_{i-1}), exactly 1 where a block changed nothing. h, before (N, H) -> (N,), float32 or wider."""
    x, y = (s.to(torch.promote_types(s.dtype, torch.float32)) for s in (h, before))
    return (x * y).sum(-1) / ((x * x).sum(-1) * (y * y).sum(-1)).sqrt()


CONFIDENCES = {"softmax": softmax_gap, "state": saturation}


class Calm(EarlyExit):
    """A dense model whose tokens leave once c >= threshold; while it is trained nobody does."""
    confidences = tuple(CONFIDENCES)
    confidence, threshold = "softmax", None                      # a key of CONFIDENCES; lambda, None: nobody is asked
    first = 1                                                    # the earliest exit: after so many blocks
    as_published_code, waits = False, True                       # waits: there, nobody goes before all have left
    left = None                                                  # as published: (B, S), who would have gone so far

    def leaves(self, layer, h, before, active):
        """As of EarlyExit: (B, S) bool or None, MACs. A softmax costs V x H for each token that is still there."""
        if self.training or self.threshold is None or layer + 1 < self.first:
            return None, 0
        there = active.nonzero(as_tuple=True)                    # a host synchronisation, as a branch has one
        here = h[there]                                          # (N, H)
        c = CONFIDENCES[self.confidence](self, here, before[there])                          # (N,)
        gone = active.masked_scatter(active, c.double() >= self.threshold)                   # (B, S)
        if self.as_published_code and self.waits:
            self.left = gone if layer + 1 == self.first else self.left | gone
            gone = self.left & (self.left | ~active).all()
        return gone, here.numel() * self.config.vocab_size if self.confidence == "softmax" else 0


open_calm = partial(open_early, Calm)                             # (folder, device, dtype, confidence=, threshold=)


def thresholds(model, items, savings):
    """{saving: lambda} for shares of (token, branch) pairs to skip on held-out texts, by bisection; None where no
    lambda comes within TOLERANCE of it: more than the first exit saves, or between two values that ties leave.

    items: a list of (ids, loss_mask). One pass over a text decides as its generation did, so that nothing is generated.
    """
    measured, found, before = {}, {}, model.threshold

    def saved(at):
        if at not in measured:                                   # the first halvings are everybody's
            model.threshold = at
            measured[at] = evaluate(model, items, SkipPolicy())[2]["skipped"]
        return measured[at]

    for wanted in tqdm(savings, desc="thresholds", leave=False):
        low, high = -1.0, 2.0                                    # all leave at the first exit, nobody leaves
        while saved(low) - TOLERANCE / 10 > wanted > saved(high) + TOLERANCE / 10 and high - low > 1e-8:
            middle = (low + high) / 2
            low, high = (middle, high) if saved(middle) > wanted else (low, middle)
        nearest = min(low, high, key=lambda at: abs(saved(at) - wanted))
        found[wanted] = nearest if abs(saved(nearest) - wanted) <= TOLERANCE else None
    model.threshold = before
    return found
