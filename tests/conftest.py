"""The repo root on sys.path, and what several test files share: tiny random models, masks, comparisons and spies.

Two paths are compared in float64 with gates whose pre-activations have std 1: their scores lie far apart, so that no
rounding can flip a keep mask. (Fresh gates give scores of std 7e-5, where it would.) Once more in float32, one path's
masks are fed to the other.
"""
import copy
import signal
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from console import InputError
from gates import GateConfig, SkipPolicy
from model import Model, ModelConfig
from rows import KVCache
from thresholds import frozen_threshold

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:            # `make test &`: some tests send Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
VOCAB = 60

# Models and what they read.


def llama(gate=GateConfig(), **changes):
    """A Llama with grouped queries and a head_dim other than hidden / heads."""
    sizes = dict(vocab_size=VOCAB, hidden_size=24, intermediate_size=20, num_hidden_layers=4, num_attention_heads=4,
                 num_key_value_heads=2, head_dim=4)
    return ModelConfig(**{**sizes, "gate": gate, **changes})


def gemma(gate=GateConfig(), **changes):
    """A Gemma 2 with both softcaps and a sliding window of 4 on every other layer."""
    config = llama(gate, **{**dict(gemma=True, attn_scale=0.4, attn_softcap=3.0, final_softcap=8.0), **changes})
    config.windows = config.windows or [None if layer % 2 else 4 for layer in range(config.num_hidden_layers)]
    return config


def build(config, seed=0, device="cpu", dtype=torch.float64):
    """A random Model whose branches, attention weights and gates all have pre-activations of std about 1."""
    generator, model = torch.Generator().manual_seed(seed), Model(config).to(torch.float64)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name:
                p.normal_(0.0 if config.gemma else 1.0, 0.2, generator=generator)
            elif name.endswith("bias"):
                p.normal_(0.5, 0.5, generator=generator)
            else:
                unit = "embed_tokens" in name and not config.gemma     # Gemma scales its embeddings itself
                p.normal_(0.0, 1.0 if unit else p.shape[1] ** -0.5, generator=generator)
    return model.to(device=device, dtype=dtype).eval()


def tokens(batch, length, seed=0, device="cpu"):
    """(B, S) random token ids, all different within a row where the vocabulary allows."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randperm(VOCAB, generator=generator)[torch.arange(length) % VOCAB] for _ in range(batch)]
    return torch.stack(rows).to(device)


def padding(lengths, total, side="left", device="cpu"):
    """(B, S) bool with lengths[b] real tokens in row b, the padding on the given side."""
    place, n = torch.arange(total, device=device)[None], torch.tensor(lengths, device=device)[:, None]
    return place >= total - n if side == "left" else place < n


def new_cache(model, batch, room):
    weight = model.model["embed_tokens"].weight
    return KVCache(model.config, batch, room, weight.device, weight.dtype)


# Decisions.

def distinct(n, seed=0):
    """(1, n) scores in random order, all different."""
    return (torch.randperm(n, generator=torch.Generator().manual_seed(seed)).double()[None] + 1) / (n + 1)


def everyone(n):
    return torch.ones(1, n, dtype=torch.bool)


def mask(*rows):
    """(B, S) bool, written out."""
    return torch.tensor(rows, dtype=torch.bool)


# who is asked in a model of 4 layers: attn 0, mlp 0, attn 1, ...; the MLPs of "layer" are not, they follow
MAY_SKIP = {"all": [True] * 8, "attn": [True, False] * 4, "mlp": [False, True] * 4, "layer": [True, False] * 4,
            "alternate": [False, False, True, True] * 2}


@torch.no_grad()
def frozen(model, ids, valid=None, share=0.35, skip="all", kv="copy_up"):
    """A frozen policy that skips roughly this share of these tokens; its thresholds lie on no score."""
    trace = model(ids, valid=valid)[1]
    taus = [frozen_threshold(scores[trace.valid], share) for scores in trace.scores]
    return SkipPolicy("frozen", 1 - share, skip, kv, thresholds=taus)


def given(masks, like=SkipPolicy()):
    """Recorded masks, with the granularity and kv of another policy."""
    return SkipPolicy("given", skip=like.skip, kv=like.kv, masks=masks)


# Comparisons.

def same(a, b, tolerance=1e-9):
    """Assert that two tensors agree within tolerance x max(1, their largest value). NaN is never equal."""
    worst = (a - b).abs().max().item() if a.numel() else 0.0
    assert a.shape == b.shape and worst <= tolerance * max(1.0, b.abs().max().item() if b.numel() else 0.0), worst


def same_masks(a, b):
    """Assert that two lists of masks are equal, naming the first branch that differs."""
    for branch, (x, y) in enumerate(zip(a, b, strict=True)):
        assert torch.equal(x, y), f"branch {branch}: {(x != y).nonzero().tolist()}"


def mixed(masks, valid):
    """Assert that masks (list over branches) neither keep nor skip nearly everything: comparing them says something."""
    share = sum((~m & valid).sum().item() for m in masks) / (len(masks) * valid.sum().item())
    assert 0.15 < share < 0.85, share


def in_float32(model):
    return copy.deepcopy(model).float()


def close_in_float32(a, b):
    same(a / b.abs().max(), b / b.abs().max(), 1e-4)


def gradients(model, logits, weights):
    """{name: gradient} of a weighted sum of logits, zeros where a parameter took no part."""
    model.zero_grad()
    (logits * weights).sum().backward()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}


# Spies.

class OperatorNames(TorchDispatchMode):
    """Lists the names of the operators inside its `with`."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


class Synchronisations(OperatorNames):
    """Only those for which a GPU would have to stop and tell the host a value."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put") and any(i is not None and i.dtype == torch.bool for i in args[1])
        if by_mask or name in ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero"):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


# What a test is run for.

on_devices = pytest.mark.parametrize("device", DEVICES)
families = pytest.mark.parametrize("family", [llama, gemma])
both_kv = pytest.mark.parametrize("kv", ["copy_up", "dense"])
both_ways = pytest.mark.parametrize("compute", ["masked", "compact"])


def complaint(call, *args, **kwargs):
    """The message of the InputError that a call ends in: one line, not endless."""
    with pytest.raises(InputError) as caught:
        call(*args, **kwargs)
    text = str(caught.value)
    assert "\n" not in text and len(text) < 600
    return text
