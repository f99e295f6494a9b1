"""What the methods share whose tokens leave early: a loop over the model's own Blocks in which a token may stop.

A token that has left after block e keeps its state, h_l = h_e for l > e, and is predicted from there through the final
norm and the head. The blocks above only project that state to K and V, for later tokens to look at: kv="dense" of the
core, both branches skipped. All this is the token's own affair, so that one pass over a finished text decides as its
generation did, and generate.py, its savings and its batches work as they are.

Shapes: B batch, S sequence, H hidden, V vocabulary, L blocks, N answer positions of a training step.
"""
import sys
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from console import InputError

import torch
from torch.utils.checkpoint import checkpoint

import train
from gates import SkipPolicy
from load_weights import load_model
from model import Model, Trace

TOLERANCE = 0.01                                                 # of savings: as of budgets in thresholds.py


def through(blocks, h, call):
    """(state after these blocks, the one before the last of them), (B, S, H) each; K and V go where the call says."""
    below = before = None
    for block in blocks:
        before = h
        h, below, _, _ = block(h, below, (None, None), call)
    return h, before


def unembed(model, h):
    """What a state predicts: U(h), through the final norm, which early exits need as much as the last. (..., H) ->
    (..., V)."""
    logits = model.lm_head(model.model["norm"](h))
    cap = model.config.final_softcap
    return logits if cap is None else cap * torch.tanh(logits / cap)


class EarlyExit(Model):
    """A dense model, made one by `early(model)`. A method says who leaves (`leaves`), and who passes a block by
    (`sits_out`); in training it finds the states of all tokens in `states`."""
    confidences, least_blocks = (), 1                            # what `confidence` may be; of a model
    states, places = [], None       # of the last pass in training: L + 1 of (B, S, H), h_0 first; (N,) flat places
    step, steps = 0, 1              # of training

    def leaves(self, layer, h, before, active):
        """Who goes no further than this block: (B, S) bool, or None for nobody; MACs that the question cost, (), or 0.

        h, before (B, S, H): its output and input; active (B, S) bool: the others have left already."""
        return None, 0

    def sits_out(self, layer, valid):
        """Who passes this block by, now only: (B, S) bool, or None for nobody."""
        return None

    def forward(self, input_ids, positions=None, valid=None, cache=None, policy=None, compute="masked", last=False,
                places=None, keep_gates=None, checkpoint_blocks=False):
        """As the core's, but that the policy is left alone. Logits of those who left are those of their last state."""
        h, call = self.begin(input_ids, positions, valid, cache, SkipPolicy(kv="dense"), compute == "compact")
        call.rows = lru_cache(maxsize=1)(call.rows)              # both branches run the same: one synchronisation
        blocks, active, below, more, states = self.model["layers"], call.valid, None, 0, [h]
        for layer, block in enumerate(blocks):
            out = self.sits_out(layer, call.valid)                               # (B, S)
            runs = active if out is None else active & ~out
            call.keep[2 * layer] = call.keep[2 * layer + 1] = runs
            before, arguments = h, (h, below, (None, None), call)
            if checkpoint_blocks and torch.is_grad_enabled():
                h, below, _, _ = checkpoint(block, *arguments, use_reentrant=False)
            else:
                h, below, _, _ = block(*arguments)                               # (B, S, H)
            states.append(h)
            if layer + 1 < len(blocks):
                gone, macs = self.leaves(layer, h, before, active)
                active, more = active if gone is None else active & ~gone, more + macs
        if self.training:
            self.states, self.places = states, places
        h = h.flatten(0, 1)[places] if places is not None else h[:, -1] if last else h
        logits = unembed(self, h)                                                # (N, V), (B, V) or (B, S, V)
        return logits, Trace(scores=None, keep=[call.keep[b] for b in range(2 * len(blocks))], gates=None,
                             valid=call.valid, keys=call.keys, logit_rows=logits[..., 0].numel(), kv="dense",
                             more_macs=more)


def early(model, kind=EarlyExit, **of):
    """The same model, weights and all, as one of this kind; of: its attributes, e.g. a threshold. InputError for gates,
    too few blocks, and a confidence that the kind does not know."""
    if model.config.gate is not None or model.config.num_hidden_layers < kind.least_blocks:
        raise InputError(f"{kind.__name__} needs a dense model of {kind.least_blocks} or more blocks: train one with "
                         "--gate none")
    if of.get("confidence") not in (None, *kind.confidences):
        raise InputError(f"confidence {of['confidence']!r} is not one of {', '.join(kind.confidences)}")
    model.__class__ = kind
    for name, value in of.items():
        setattr(model, name, value)
    return model


def open_early(kind, folder, device="cpu", dtype=torch.float32, **of):
    """The model in a folder (a run's --out, or hub id) as one of this kind, in eval mode. InputError as early()."""
    return early(load_model(folder, device=device, dtype=dtype).eval(), kind, **of)


@contextmanager
def training(loss, kind=EarlyExit, **of):
    """Inside, train.py (--gate none) trains such a model: loss(model, targets (N,)) -> a scalar, summed over the N
    answer positions, takes the place of its cross-entropy. model.step and model.steps say how far it is."""
    models, open_model, budget_at = [], train.open_model, train.budget_at

    def opened(*args):
        model, tokenizer = open_model(*args)
        models.append(early(model, kind, **of))
        return model, tokenizer

    def budget(step, total, *rest):
        models[-1].step, models[-1].steps = step, total
        return budget_at(step, total, *rest)

    def cross_entropy(logits, targets, reduction):
        value = loss(models[-1], targets)
        models[-1].states, models[-1].places = [], None          # else they would outlive the step
        return value

    criterion = SimpleNamespace(cross_entropy=cross_entropy)
    with mock.patch.object(train, "open_model", opened), mock.patch.object(train, "budget_at", budget), \
            mock.patch.object(train, "F", criterion):
        yield
