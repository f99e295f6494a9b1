"""A Llama 3.x / Gemma 2 decoder with gated residual branches. Attention copies a skipped token's K and V up.

Read from top to bottom: config, norm, rotary positions, attention, MLP, the gated Block (the paper's change), the
model. Parameter names are Hugging Face's. Which rows run, and where K and V lie, is in rows.py.

Shapes: B batch, S sequence (the tokens of this call), T key positions, H hidden, L layers, V vocabulary, Hq / Hkv
query / key-value heads, D head dim, N rows that run if they are gathered, M the most of them in one sequence, A
places of answer tokens.
"""
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from console import InputError
from gates import Gate, GateConfig, SkipPolicy
from linear import Linear
from rows import attention_mask, start_call


@dataclass
class ModelConfig:
    """The numbers that make a Llama or a Gemma 2; load_weights.py fills it from config.json."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: dict = None               # of llama3, as in config.json: factor, low_freq_factor, ...
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = True
    initializer_range: float = 0.02
    eos_ids: tuple = ()
    # what makes a Gemma 2
    gemma: bool = False                     # (1 + w) norms, scaled embeddings, GeGLU, norms after the branches
    attn_scale: float = None                # default head_dim ** -0.5; Gemma 2: query_pre_attn_scalar ** -0.5
    attn_softcap: float = None
    final_softcap: float = None
    windows: list = None                    # per layer: sliding window or None
    # GateSkip
    gate: GateConfig = None                 # None: the plain decoder
    gateskip: dict = field(default_factory=dict)   # config.json["gateskip"]: calibration and what it was trained for


class RMSNorm(nn.Module):
    """x / rms(x) * w, in float32 or wider. Gemma's weight is an offset from 1, added before the cast."""

    def __init__(self, config):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.hidden_size))
        self.eps, self.gemma = config.rms_norm_eps, config.gemma

    def forward(self, x):
        wide = x.to(torch.promote_types(x.dtype, torch.float32))                 # (..., H)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        if self.gemma:
            return (wide * (1 + self.weight.to(wide.dtype))).to(x.dtype)
        return self.weight * wide.to(x.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Rotary positions
# ---------------------------------------------------------------------------------------------------------------------

def rope_table(config, size, device, dtype):
    """cos and sin of positions 0 .. size-1, each (size, D/2). Channels d and d + D/2 turn together, Hugging Face's way.

    llama3 scaling: wavelengths longer than original / low_freq_factor are stretched by factor, those shorter than
    original / high_freq_factor are left alone, and between them the two are blended.
    """
    exponent = torch.arange(0, config.head_dim, 2, device=device, dtype=torch.float32) / config.head_dim
    freq = config.rope_theta ** -exponent                                        # (D/2,)
    if config.rope_scaling is not None:
        s = config.rope_scaling
        turns = s["original_max_position_embeddings"] * freq / (2 * torch.pi)    # full turns within the original length
        unscaled = ((turns - s["low_freq_factor"]) / (s["high_freq_factor"] - s["low_freq_factor"])).clamp(0, 1)
        freq = freq * ((1 - unscaled) / s["factor"] + unscaled)
    angles = torch.arange(size, device=device, dtype=torch.float32)[:, None] * freq     # (size, D/2)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x, cos, sin):
    """Rotate channel pairs (d, d + D/2). x (..., heads, D); cos, sin (..., 1, D/2)."""
    x1, x2 = x.chunk(2, dim=-1)                                                  # (..., heads, D/2) each
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1)


# ---------------------------------------------------------------------------------------------------------------------
# Attention and MLP
# ---------------------------------------------------------------------------------------------------------------------

def attend(q, k, v, mask, is_causal, scale, softcap):
    """q (B, Hq, M, D), k and v (B, Hkv, T, D), mask (B or 1, 1, M, T) or None -> (B, Hq, M, D)"""
    group = q.shape[1] // k.shape[1]
    # A GPU's kernel for float32, or with a mask, knows no groups: torch would make M x T weights per head instead.
    if softcap is not None or q.is_cuda and (q.dtype == torch.float32 or mask is not None):
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)              # (B, Hq, T, D)
    if softcap is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, scale=scale,
                                              enable_gqa=q.shape[1] != k.shape[1])
    weights = softcap * torch.tanh(q @ k.transpose(-1, -2) * scale / softcap)    # (B, Hq, M, T): cap before mask
    if mask is not None:
        weights = weights + mask
    return weights.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype) @ v


def attend_alone(sequences, q, k, v, mask, is_causal, scale, softcap):
    """attend for one query each of some sequences, (B, Hq, 1, D) -> (N, Hq, D): only these sequences' keys are read.
    A mask has all B sequences."""
    one = lambda x, b: x if x is None else x[b:b + 1]
    return torch.cat([attend(one(q, b), one(k, b), one(v, b), one(mask, b), is_causal, scale, softcap)
                      for b in sequences])[:, :, 0]


class Attention(nn.Module):
    """Grouped-query attention. Tokens that skip it take over the K and V of the layer below (copy_up)."""

    def __init__(self, config, layer):
        super().__init__()
        H, D = config.hidden_size, config.head_dim
        self.q_proj = Linear(H, config.num_attention_heads * D, bias=False)
        self.k_proj = Linear(H, config.num_key_value_heads * D, bias=False)
        self.v_proj = Linear(H, config.num_key_value_heads * D, bias=False)
        self.o_proj = Linear(config.num_attention_heads * D, H, bias=False)
        self.layer, self.head_dim, self.softcap = layer, D, config.attn_softcap
        self.scale = config.attn_scale or D ** -0.5
        self.window = config.windows[layer] if config.windows else None

    def keys_values(self, x, rows, below, call):
        """K and V of this call's tokens, (B, S, Hkv, D) each, keys rotated for their absolute positions.

        kv="copy_up": K_l,i = K_{l-1},i and V_l,i = V_{l-1},i where token i skips (section 3.3 of the paper); layer 0
        has nothing below and computes its own. kv="dense": computed for every token (Algorithm 1 as printed).
        """
        if below is None or call.policy.kv == "dense":           # everybody computes; what padding has is zeros
            zeros = x.new_zeros(*x.shape[:2], self.k_proj.out_features // self.head_dim, self.head_dim)
            rows, below = call.real, (zeros, zeros)
        if rows.none:                                            # no weight is read
            return below
        x = rows.take(x)                                         # (B, S, H) or (N, H)
        k = self.k_proj(x).unflatten(-1, (-1, self.head_dim))    # (B, S, Hkv, D) or (N, Hkv, D)
        k = rotate(k, rows.take(call.cos), rows.take(call.sin))
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim))
        return rows.put(k, below[0]), rows.put(v, below[1])      # copied up where skipped

    def forward(self, x, rows, k, v, call):
        """x of the rows that run (B, S, H) or (N, H); k, v (B, Hkv, T, D): all that may be looked at -> o like x"""
        q = self.q_proj(x).unflatten(-1, (-1, self.head_dim))    # (B, S, Hq, D) or (N, Hq, D)
        q = rotate(q, rows.take(call.cos), rows.take(call.sin))  # a kept token keeps its absolute position
        q = rows.pad(q).transpose(1, 2)                          # (B, Hq, S or M, D)
        sees = attention_mask(call, rows, self.window, self.softcap is not None)
        if rows.lone_queries:
            o = attend_alone(rows.lone_queries, q, k, v, *sees, self.scale, self.softcap)        # (N, Hq, D)
        else:
            o = rows.unpad(attend(q, k, v, *sees, self.scale, self.softcap).transpose(1, 2))     # (B, S or N, Hq, D)
        return self.o_proj(o.flatten(-2))                        # (B, S, H) or (N, H)


class MLP(nn.Module):
    """SwiGLU (Llama) or GeGLU with tanh (Gemma)."""

    def __init__(self, config):
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.gemma = config.gemma

    def forward(self, x):                                        # (..., H) -> (..., H)
        gate = self.gate_proj(x)                                 # not GateSkip's gate: the one in SwiGLU
        gate = F.gelu(gate, approximate="tanh") if self.gemma else F.silu(gate)
        return self.down_proj(gate * self.up_proj(x))


# ---------------------------------------------------------------------------------------------------------------------
# The gated residual block: equation 2, lines 4 to 16 of Algorithm 1
# ---------------------------------------------------------------------------------------------------------------------

class Block(nn.Module):
    """Two gated branches, attention and MLP:  h = h + g * f(norm(h)) for the tokens that pass; the others keep h."""

    def __init__(self, config, layer):
        super().__init__()
        self.layer, self.gate_config = layer, config.gate
        self.self_attn, self.mlp = Attention(config, layer), MLP(config)
        self.input_layernorm = RMSNorm(config)
        self.post_attention_layernorm = RMSNorm(config)          # Llama: before the MLP. Gemma 2: after attention
        self.gemma = config.gemma
        if config.gemma:
            self.pre_feedforward_layernorm = RMSNorm(config)
            self.post_feedforward_layernorm = RMSNorm(config)
        if config.gate is not None and not config.gate.shared:
            self.self_attn_gate = Gate(config.gate, config.hidden_size)
            self.mlp_gate = Gate(config.gate, config.hidden_size)

    def branches(self):
        """(norm before, f, norm after or None) of attention and of the MLP. Gemma 2 has one between f and its gate."""
        if self.gemma:
            return ((self.input_layernorm, self.self_attn, self.post_attention_layernorm),
                    (self.pre_feedforward_layernorm, self.mlp, self.post_feedforward_layernorm))
        return (self.input_layernorm, self.self_attn, None), (self.post_attention_layernorm, self.mlp, None)

    def forward(self, h, below, gates, call):
        """h (B, S, H), below: (K, V) of the layer below or None, gates: the Gates of attention and MLP, or None twice
        -> h, this layer's (K, V), [gate values] * 2, [scores] * 2"""
        kv, all_g, all_scores = None, [], []
        for branch, (norm, f, norm_after) in enumerate(self.branches(), 2 * self.layer):     # line 4
            x, g, scores, gate = norm(h), None, None, gates[branch % 2]          # (B, S, H)
            if gate is not None:                                                 # printed: of h, here of x by default
                g, scores = gate(h if gate.config.input == "residual" else x)    # (B, S, H or 1), (B, S): lines 6-7
                if gate.config.placement == "before":
                    x = x * g.to(x.dtype)
            if branch not in call.keep:                                          # else recomputed, or by one_pass
                follows = call.policy.skip == "layer" and branch % 2             # whole layers are decided at attention
                # line 8: SkipPolicy.keep in gates.py
                call.keep[branch] = call.keep[branch - 1] if follows else call.policy.keep(branch, scores, call.valid)
            rows = call.rows(call.keep[branch])                                  # rows.py: Everyone, Masked or Kept
            looked_at = ()
            if f is self.self_attn:
                kv = f.keys_values(x, rows, below, call)                         # (B, S, Hkv, D) each
                looked_at = rows, *call.store(self.layer, *kv), call
            if not rows.none:                                                    # else no weight is read
                o = f(rows.take(x), *looked_at)                                  # (B, S, H) or (N, H): line 5
                o = o if norm_after is None else norm_after(o)
                if gate is not None and gate.config.placement == "after":
                    o = o * rows.take(g).to(o.dtype)                             # eq. 2; without a gate it is eq. 1
                h = rows.add(h, o)                                               # lines 9-15, e.g. Masked.add
            all_g.append(g)
            all_scores.append(scores)
        return h, kv, all_g, all_scores                                          # line 16: end for


# ---------------------------------------------------------------------------------------------------------------------
# The model
# ---------------------------------------------------------------------------------------------------------------------

@dataclass
class Trace:
    """What one forward pass decided: lists over the 2L branches in execution order."""
    scores: list                # (B, S) float32 or wider; None without gates
    keep: list                  # (B, S) bool
    gates: list                 # (B, S, H) or (B, S, 1); None unless training or asked for
    valid: torch.Tensor         # (B, S) bool
    keys: int                   # how many key positions each query was multiplied with
    logit_rows: int             # rows that went through the head
    kv: str                     # the policy's kv setting
    more_macs: object = 0       # multiply-accumulates beside branches, gates and head, () int64: of methods in paper/


class Model(nn.Module):
    """Embedding, L gated blocks, final norm, head. The attribute names `model` and `lm_head` are Hugging Face's."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = nn.ModuleDict({
            "embed_tokens": nn.Embedding(config.vocab_size, config.hidden_size, _weight=torch.empty(
                config.vocab_size, config.hidden_size)),                         # drawn later
            "layers": nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers)),
            "norm": RMSNorm(config),
        })
        if config.gate is not None and config.gate.shared:
            self.model["self_attn_gate"] = Gate(config.gate, config.hidden_size)
            self.model["mlp_gate"] = Gate(config.gate, config.hidden_size)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model["embed_tokens"].weight              # shared, not copied
        self.rope = None

    @torch.no_grad()
    def init_weights(self, generator=None):
        """From scratch: Gaussian with config.initializer_range, branch outputs scaled down by sqrt(2L), norms 1."""
        std = self.config.initializer_range
        for name, p in self.named_parameters():
            if "_gate." in name:                                 # GateSkip's; mlp.gate_proj is none
                continue
            if "norm" in name:
                p.fill_(0.0 if self.config.gemma else 1.0)
            else:
                ends_branch = name.endswith(("o_proj.weight", "down_proj.weight"))
                scale = (2 * self.config.num_hidden_layers) ** -0.5 if ends_branch else 1.0
                p.normal_(0, std * scale, generator=generator)
        self.init_gates(generator)

    def init_gates(self, generator=None):
        """Fresh gates (section 3.4), in module order."""
        for module in self.modules():
            if isinstance(module, Gate):
                module.init_weights(generator)

    def gates_of(self, block):
        """(attention gate, MLP gate) that this block uses; (None, None) without gates."""
        if self.config.gate is None:
            return None, None
        owner = self.model if self.config.gate.shared else block._modules
        return owner["self_attn_gate"], owner["mlp_gate"]

    def rope_at(self, positions, size, like):
        """cos, sin (B or 1, S, 1, D/2), gathered by absolute position from a table that is built once and grows."""
        table = self.rope[0] if self.rope is not None else like.new_empty(0)
        if table.shape[0] < size or (table.device, table.dtype) != (like.device, like.dtype):
            size = max(size, min(256, self.config.max_position_embeddings))
            self.rope = rope_table(self.config, 1 << (size - 1).bit_length(), like.device, like.dtype)
        return self.rope[0][positions][:, :, None], self.rope[1][positions][:, :, None]

    def begin(self, input_ids, positions=None, valid=None, cache=None, policy=None, compact=False):
        """(h_0 (B, S, H), Call): what the first block gets. Arguments as of forward."""
        h = self.model["embed_tokens"](input_ids)                                # (B, S, H): h_0, line 2
        if self.config.gemma:
            h = h * torch.tensor(self.config.hidden_size ** 0.5, dtype=h.dtype)
        call = start_call(input_ids.shape, h.device, positions, valid, cache, policy or SkipPolicy(), compact)
        call.cos, call.sin = self.rope_at(call.positions, call.span + 1, h)      # + 1: padding after a full sequence
        return h, call

    def forward(self, input_ids, positions=None, valid=None, cache=None, policy=None, compute="masked", last=False,
                places=None, keep_gates=None, checkpoint_blocks=False):
        """One pass over the tokens of this call.

        input_ids (B, S) int64. positions (B, S): default the sequence's cached length plus the running count of its
        valid tokens. valid (B, S) bool: True = real token; None = all are. cache: KVCache, written and advanced.
        policy: default keeps all. compute: "masked" (every row runs, the oracle) | "compact" (kept rows only).
        last: logits of the last column only, (B, V). places (A,) int64: of the flat places b * S + s only, (A, V); it
        goes before last.
        keep_gates: put the gate values into the trace (default: while training). checkpoint_blocks: recompute each
        block in the backward pass instead of storing its activations.
        Returns (logits (B, S, V), Trace). ValueError when the cache is too short.
        """
        if compute not in ("masked", "compact"):
            raise InputError(f"compute {compute!r} is not one of masked, compact")
        h, call = self.begin(input_ids, positions, valid, cache, policy, compute == "compact")
        below, all_g, all_scores = None, [], []
        keep_gates = self.training if keep_gates is None else keep_gates
        for block in self.model["layers"]:                                       # line 4, two branches at a time
            arguments = h, below, self.gates_of(block), call
            if checkpoint_blocks and torch.is_grad_enabled():
                h, below, g, s = checkpoint(block, *arguments, use_reentrant=False)
            else:
                h, below, g, s = block(*arguments)
            all_g, all_scores = all_g + g if keep_gates else all_g, all_scores + s

        if places is not None:
            h = h.flatten(0, 1)[places]                                          # (A, H)
        elif last:
            h = h[:, -1]                                                         # (B, H)
        logits = self.lm_head(self.model["norm"](h))                             # (B, S, V), (B, V) or (A, V)
        if self.config.final_softcap is not None:
            logits = self.config.final_softcap * torch.tanh(logits / self.config.final_softcap)

        gated = self.config.gate is not None
        return logits, Trace(scores=all_scores if gated else None, keep=[call.keep[b] for b in range(len(all_scores))],
                             gates=all_g if gated and keep_gates else None, valid=call.valid, keys=call.keys,
                             logit_rows=logits[..., 0].numel(), kv=call.policy.kv)
