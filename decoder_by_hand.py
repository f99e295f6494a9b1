"""The parts of a Llama, or of a Gemma 2 (c.gemma), for one token, in plain loops: what by_hand.py calls.

Shapes: H hidden, I intermediate, D head dim. c: model.config. A token is a vector x (H,).
"""
import math

import torch


def norm(x, module, c):                                                          # (H,) -> (H,); Gemma's w counts from 1
    return x / (x.pow(2).mean() + c.rms_norm_eps) ** 0.5 * (module.weight + (1 if c.gemma else 0))


def heads(projection, x, c):                                                     # (H,) -> a (D,) per head
    return (projection.weight @ x).split(c.head_dim)


def cap(z, limit):                                                               # Gemma's softcap
    return z if limit is None else limit * torch.tanh(z / limit)


def gate_of(gate, x, h):
    """g = sigmoid(W_G x + b_G), (H,) or (1,). Without gates it is 1."""
    if gate is None:
        return torch.ones_like(x[:1])
    z = h if gate.config.input == "residual" else x
    z = z.detach() if gate.config.detach else z
    if gate.inner is not None:
        z = gate.inner.weight @ z                                                # (2H,) or (rank,)
    if gate.config.arch == "mlp":
        z = (z + gate.inner.bias).clamp(min=0)
    return torch.sigmoid(gate.out.weight @ z + gate.out.bias)


def rotate(x, position, c):
    """Channels d and d + D/2 of a head (D,) turn by position * theta^(-2d/D); angles in float32, as Hugging Face's."""
    freq = c.rope_theta ** -(torch.arange(0, len(x), 2, dtype=torch.float32) / len(x))           # (D/2,)
    if c.rope_scaling is not None:                                               # llama3: slow turns are slowed down
        s = c.rope_scaling
        turns = s["original_max_position_embeddings"] * freq / (2 * math.pi)
        own = ((turns - s["low_freq_factor"]) / (s["high_freq_factor"] - s["low_freq_factor"])).clamp(0, 1)
        freq = freq * (own + (1 - own) / s["factor"])
    (a, b), cos, sin = x.chunk(2), (position * freq).cos().to(x.dtype), (position * freq).sin().to(x.dtype)
    return torch.cat([a * cos - b * sin, b * cos + a * sin])


def attention_of(module, x, KV, layer, c):
    """o (H,) of the newest token, over KV, this layer's keys and values of all so far: itself and skipped ones too."""
    scale, window, outs = c.attn_scale or c.head_dim ** -0.5, c.windows[layer] if c.windows else None, []
    seen = KV if window is None else KV[-window:]                                # (keys, values) of each position
    for n, q in enumerate(heads(module.q_proj, x, c)):
        q, m = rotate(q, len(KV) - 1, c), n * c.num_key_value_heads // c.num_attention_heads     # m: its key-value head
        weights = torch.stack([cap(scale * (q @ k[m]), c.attn_softcap) for k, _ in seen]).softmax(0)
        outs.append(sum(w * v[m] for w, (_, v) in zip(weights, seen)))           # (D,)
    return module.o_proj.weight @ torch.cat(outs)


def mlp_of(module, x, c):                                                        # SwiGLU, or Gemma's GeGLU (tanh)
    a = module.gate_proj.weight @ x                                              # (I,): no gate of GateSkip's
    gelu = 0.5 * a * (1 + torch.tanh((2 / math.pi) ** 0.5 * (a + 0.044715 * a ** 3)))
    return module.down_proj.weight @ ((gelu if c.gemma else a * torch.sigmoid(a)) * (module.up_proj.weight @ x))
