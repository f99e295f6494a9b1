"""What the tests of the routed comparisons share: random models of each method, dense ones alike, their policies."""
import sys

import torch

from conftest import build, frozen, llama
from gates import GateConfig
from toy_runs import ROOT, run

sys.path.insert(0, str(ROOT / "paper"))
import mindskip
import mixture_of_depths
import skiplayer

METHODS = {"mixture_of_depths": mixture_of_depths, "mindskip": mindskip, "skiplayer": skiplayer}
CLASSES = {"mixture_of_depths": mixture_of_depths.MixtureOfDepths, "mindskip": mindskip.MindSkip,
           "skiplayer": skiplayer.SkipLayer}
HOW = {"mixture_of_depths": dict(skip="layer", kv="copy_up"), "mindskip": dict(skip="attn", kv="copy_up"),
       "skiplayer": dict(skip="all", kv="dense")}                # what SkipPolicy gets


SHORT = dict(sparsity_weight=0.1, budget_end=0.6, calibrate=0.9, calibration_sequences=3)


def train_toy(name, folder, out, *switches, settings={}, **flags):
    """A short run of train.main on the model in folder, by a method; switches stand behind the method's own flags."""
    with METHODS[name].training(**settings):
        return run(folder, out, *METHODS[name].FLAGS.split(), *switches, **{**SHORT, **flags})


def backbone(model):
    return {key: p for key, p in model.state_dict().items() if "_gate." not in key}


def routed_model(name, family=llama, seed=0, **settings):
    """A float64 model of a method in eval mode, three layers, whose routers have pre-activations of std about 2."""
    model = CLASSES[name](family(GateConfig("scalar"), num_hidden_layers=3), **settings).double()
    model.load_state_dict(backbone(build(family(None, num_hidden_layers=3), seed)), strict=False)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for key, p in model.named_parameters():
            if "_gate." in key:
                p.normal_(0, 0.1 if key.endswith("bias") else 2 * p.shape[1] ** -0.5, generator=generator)
    return model.eval()


def dense_like(model, family=llama):
    """The core's model without gates, with the same other weights."""
    dense = build(family(None, num_hidden_layers=3))
    dense.load_state_dict(backbone(model))
    return dense


def policy_of(name, model, ids, valid=None, share=0.35):
    """A frozen policy that skips about this share of these tokens where this method asks."""
    return frozen(model, ids, valid, share, **HOW[name])
