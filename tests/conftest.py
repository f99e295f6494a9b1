"""The repo root on sys.path, and the tiny random models that test_gates.py and test_model.py share.

Two paths are compared in float64 with gates whose pre-activations have std 1: their scores lie far apart, so that no
rounding can flip a keep mask. (Fresh gates give scores of std 7e-5, where it would.)
"""
import sys
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gates import GateConfig, SkipPolicy, frozen_threshold
from model import Model, ModelConfig

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
VOCAB = 60


def llama(gate=GateConfig(), **changes):
    """A Llama with grouped queries and a head_dim other than hidden / heads."""
    return ModelConfig(**{**dict(vocab_size=VOCAB, hidden_size=24, intermediate_size=20, num_hidden_layers=4, num_attention_heads=4,
                                 num_key_value_heads=2, head_dim=4, gate=gate), **changes})


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
    return torch.stack([torch.randperm(VOCAB, generator=generator)[torch.arange(length) % VOCAB] for _ in range(batch)]).to(device)


def padding(lengths, total, side="left", device="cpu"):
    """(B, S) bool with lengths[b] real tokens in row b, the padding on the given side."""
    place, n = torch.arange(total, device=device)[None], torch.tensor(lengths, device=device)[:, None]
    return place >= total - n if side == "left" else place < n


@torch.no_grad()
def frozen(model, ids, valid=None, share=0.35, skip="all", kv="copy_up"):
    """A frozen policy that skips roughly this share of these tokens; its thresholds lie on no score."""
    trace = model(ids, valid=valid)[1]
    taus = [frozen_threshold(scores[trace.valid], share) for scores in trace.scores]
    return SkipPolicy("frozen", 1 - share, skip, kv, thresholds=taus)


def same(a, b, tolerance=1e-9):
    """Assert that two tensors agree within tolerance x max(1, their largest value). NaN is never equal."""
    worst = (a - b).abs().max().item() if a.numel() else 0.0
    assert a.shape == b.shape and worst <= tolerance * max(1.0, b.abs().max().item() if b.numel() else 0.0), worst


def same_masks(a, b):
    """Assert that two lists of masks are equal, naming the first branch that differs."""
    for branch, (x, y) in enumerate(zip(a, b, strict=True)):
        assert torch.equal(x, y), f"branch {branch}: {(x != y).nonzero().tolist()}"


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
