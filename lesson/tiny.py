"""A random model, a text for it and a cache, small enough for a test. In float64: two ways to one result agree to 1e-9.

Shapes: B batch, S sequence, H hidden.
"""
import torch

from gates import GateConfig
from model import Model, ModelConfig
from rows import KVCache


@torch.no_grad()
def tiny_model(gate=GateConfig(), seed=0, **changes):
    """A Llama of 4 layers (8 branches), H = 24, with random weights: gates spread over (0, 1), scores lie far apart.

    gate: GateConfig, or None for the plain decoder. changes: other fields of ModelConfig.
    """
    sizes = dict(vocab_size=60, hidden_size=24, intermediate_size=20, num_hidden_layers=4, num_attention_heads=4,
                 num_key_value_heads=2, head_dim=4)
    model, generator = Model(ModelConfig(**{**sizes, "gate": gate, **changes})).double(), torch.Generator()
    generator.manual_seed(seed)
    for name, p in model.named_parameters():
        if "norm" in name:
            p.normal_(1.0, 0.2, generator=generator)
        elif name.endswith("bias"):
            p.normal_(0.5, 0.5, generator=generator)
        else:                                                    # what goes in has std 1, and what comes out again
            p.normal_(0.0, 1.0 if "embed_tokens" in name else p.shape[1] ** -0.5, generator=generator)
    return model.eval()


def tiny_ids(batch=1, length=8, seed=0):
    """(B, S) token ids, all different within a row."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(60, generator=generator)[:length] for _ in range(batch)])


def tiny_cache(model, batch=1, room=16):
    """An empty KV cache of `room` slots a sequence, in the model's dtype."""
    return KVCache(model.config, batch, room, dtype=torch.float64)
