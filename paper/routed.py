"""What the routed comparisons share: blocks with routers, trained by train.py's own loop, and the folders it saves.

A method (mixture_of_depths.py, mindskip.py, skiplayer.py) is a subclass of Routed: its block, the flags of train.py
that it needs, its loss, its choice of tokens in training. training() patches train.py from outside, as testbed.TRIED
does. Routers stand where gates stand, self_attn_gate and mlp_gate: --freeze-backbone trains them alone, and
--gate-lr-scale is theirs. config.json names the method; load_model refuses a key that it does not read, and open_model
here reads it.

Shapes: B batch, S sequence (the tokens of a call), T key positions, L layers.
"""
import contextlib
import math
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from console import InputError

import torch
from torch import nn

import load_weights
import train
from budgets import realised
from gates import GateConfig, SkipPolicy
from load_weights import find_folder, load_model, read_json
from model import Block, Model
from rows import KVCache
from testbed import ROUNDS, TOLERANCE
from thresholds import calibrate

HALF = math.nextafter(0.5, 0.0)                                  # a probability above it is one of at least 0.5


# ---------------------------------------------------------------------------------------------------------------------
# The model
# ---------------------------------------------------------------------------------------------------------------------

class RoutedCache(KVCache):
    """The core's, and per layer `kept` (B, S_max) bool: the positions whose tokens went through attention there."""

    def note(self, layer, keep, slots):
        """keep (B, S) bool of this call's tokens; slots as of KVCache.write."""
        if isinstance(slots, slice):
            self.kept[layer][:, slots] = keep
        else:
            row, column, slot = slots                            # (tokens,) each
            self.kept[layer][row, slot] = keep[row, column]

    def select(self, rows):
        super().select(rows)
        self.kept = [kept[rows] for kept in self.kept]


class Routed(Model):
    """A Model of other blocks. generate, Savings, calibrate and train.py's loop take it as it is.

    settings: what a method may choose (defaults), kept in config.json. InputError unless config.gate is a plain scalar
    gate, the place that routers take.
    """
    name, block, defaults = "", Block, {}
    # of train.py: what they may be. The method's own loss reads neither of the last two
    flags = {"threshold": ("branch",), "sparsity_loss": ("l2",), "sparsity_cost": ("equal",)}
    loss = None                                                  # in place of gates.sparsity_loss, its arguments

    def __init__(self, config, **settings):
        super().__init__(config)
        if config.gate != GateConfig("scalar"):
            raise InputError(f"{self.name} has routers in the places of gates: give --gate scalar and leave the other "
                             "--gate flags out but --gate-lr-scale")
        self.settings = self.defaults | settings
        layers = range(config.num_hidden_layers)
        self.model["layers"] = nn.ModuleList(self.block(config, layer, **self.settings) for layer in layers)
        paid = self.router_macs(config.hidden_size)
        config.gate = replace(config.gate)                       # its caller's stays what it was
        config.gate.macs = lambda hidden: paid                   # count_macs charges it per token and branch

    def router_macs(self, hidden):
        """Multiply-accumulates of the routers for one token, per branch, kept or skipped."""
        raise NotImplementedError

    @staticmethod
    def policy(kind, budget, skip, kv):
        """What train.py's loop gets for SkipPolicy(...): nobody skips, the router's own factor is 0 or 1."""
        return SkipPolicy("none", 1.0, skip, kv)

    def begin(self, input_ids, positions=None, valid=None, cache=None, policy=None, compact=False):
        if cache is not None and cache.used == 0:
            cache.__class__ = RoutedCache
            batch, _, room, _ = cache.k[0].shape
            cache.kept = [torch.zeros(batch, room, dtype=torch.bool, device=input_ids.device) for _ in cache.k]
        return super().begin(input_ids, positions, valid, cache, policy, compact)


# ---------------------------------------------------------------------------------------------------------------------
# Training, and what it saves
# ---------------------------------------------------------------------------------------------------------------------

@contextlib.contextmanager
def _built(method, settings):
    """load_weights.py makes models of this method, and reads a config.json that names it."""
    read = load_weights.config_from_hf
    without = lambda raw, name: read({key: value for key, value in raw.items() if key != method.name}, name)
    with mock.patch.object(load_weights, "Model", partial(method, **settings)), \
            mock.patch.object(load_weights, "config_from_hf", without):
        yield


@contextlib.contextmanager
def training(method, **settings):
    """A context in which train.main trains this method: testbed.trained(..., tried=partial(training, method)).

    lambda of its loss is --sparsity-weight; the budget b_t of train.py is the share that it keeps (of MindSkip, which
    decides by itself, nothing). InputError for flags of another method, and for a run that is resumed with other
    settings."""
    open_dense = train.open_model

    def open_model(args, gate, device, dtype):
        for flag, allowed in method.flags.items():
            if (given := getattr(args, flag)) not in allowed:
                flag = f"--{flag.replace('_', '-')}"
                raise InputError(f"{method.name} needs {flag}" if allowed == (True,) else
                                 f"{flag} {given}: {method.name} needs {flag} {' or '.join(allowed)}")
        with _built(method, settings):
            model, tokenizer = open_dense(args, gate, device, dtype)
        named = {"opens with": f"paper/{method.name}.py", **model.settings}
        if model.raw_config.setdefault(method.name, named) != named:
            raise InputError(f"{model.source} was trained with {model.raw_config[method.name]}, not {named}")
        return model, tokenizer

    with mock.patch.object(train, "open_model", open_model), mock.patch.object(train, "sparsity_loss", method.loss), \
            mock.patch.object(train, "SkipPolicy", method.policy):
        yield


def open_model(method, folder, device="cpu", dtype=torch.float32):
    """The model that training() has saved in a folder or a run's --out, in eval mode. InputError for another's."""
    named = read_json(find_folder(folder) / "config.json").get(method.name)
    if not isinstance(named, dict) or named.keys() != {"opens with", *method.defaults}:
        raise InputError(f"{folder} was not trained by paper/{method.name}.py: open it as what it is")
    with _built(method, {key: named[key] for key in method.defaults}):
        return load_model(folder, device=device, dtype=dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Inference: thresholds
# ---------------------------------------------------------------------------------------------------------------------

def policies(model, items, budgets):
    """{budget: SkipPolicy}: per layer the quantile of the scores over calibration sequences, corrected until the model
    skips the share asked for in texts that it continues (thresholds.calibrate). items: (ids, loss_mask), held out."""
    skip, kv = model.config.gateskip["skip"], model.config.gateskip["kv"]
    found = calibrate(model, [ids for ids, _ in items], budgets, skip, kv, partial(realised, model, items),
                      tolerance=TOLERANCE, rounds=ROUNDS)["thresholds"]
    return {b: SkipPolicy("frozen" if b < 1.0 else "none", b, skip, kv, thresholds=found.get(str(b)))
            for b in map(float, budgets)}


def as_trained(model):
    """The SkipPolicy of the router's own decision: a token runs where its probability is at least 0.5."""
    skip, kv = model.config.gateskip["skip"], model.config.gateskip["kv"]
    return SkipPolicy("frozen", 0.5, skip, kv, thresholds=[HALF] * (2 * model.config.num_hidden_layers))
