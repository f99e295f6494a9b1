"""A Llama 3.x / Gemma 2 decoder with gated residual branches and a KV cache that copies up.

Read from top to bottom: config, norm, rotary positions, KV cache, what the blocks of one call share, attention, MLP,
the gated Block (the paper's change), the model. Parameter names are Hugging Face's.

Shapes: B batch, S sequence (the tokens of this call), T key positions, H hidden, L layers, V vocabulary, Hq / Hkv query /
key-value heads, D head dim, N rows that run in compact mode, M the most of them in one sequence.
"""
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from gates import Gate, GateConfig, InputError, Linear, SkipPolicy, Trace


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
    rope_scaling: dict = None               # llama3: factor, low_freq_factor, high_freq_factor, original_max_position_embeddings
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


def _llama(vocab, hidden, intermediate, layers, heads, kv_heads, head_dim, tied, theta=500000.0, factor=None, positions=131072):
    scaling = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 8192}
    return ModelConfig(vocab, hidden, intermediate, layers, heads, kv_heads, head_dim, rope_theta=theta, tie_word_embeddings=tied,
                       rope_scaling=scaling if factor else None, max_position_embeddings=positions)


# the true sizes of the models that this project is about, for counting on paper and on the meta device
SHAPES = {
    "llama-3.2-1b": _llama(128256, 2048, 8192, 16, 32, 8, 64, tied=True, factor=32.0),
    "llama-3.2-3b": _llama(128256, 3072, 8192, 28, 24, 8, 128, tied=True, factor=32.0),
    "llama-3.1-8b": _llama(128256, 4096, 14336, 32, 32, 8, 128, tied=False, factor=8.0),
    "gemma-2-2b": ModelConfig(256000, 2304, 9216, 26, 8, 4, 256, rms_norm_eps=1e-6, max_position_embeddings=8192, gemma=True,
                              attn_scale=256 ** -0.5, attn_softcap=50.0, final_softcap=30.0, windows=[4096, None] * 13),
    "smollm2-135m": _llama(49152, 576, 1536, 30, 9, 3, 64, tied=True, theta=100000.0, positions=8192),
}


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
    """cos and sin for positions 0 .. size-1, each (size, D/2): channels d and d + D/2 turn together (Hugging Face's layout).

    llama3 scaling: wavelengths longer than original / low_freq_factor are stretched by factor, those shorter than
    original / high_freq_factor are left alone, and between them the two are blended.
    """
    exponent = torch.arange(0, config.head_dim, 2, device=device, dtype=torch.float32) / config.head_dim
    freq = config.rope_theta ** -exponent                                        # (D/2,)
    if config.rope_scaling is not None:
        s = config.rope_scaling
        turns = s["original_max_position_embeddings"] * freq / (2 * torch.pi)    # full turns within the original length
        keep = ((turns - s["low_freq_factor"]) / (s["high_freq_factor"] - s["low_freq_factor"])).clamp(0, 1)
        freq = freq * ((1 - keep) / s["factor"] + keep)
    angles = torch.arange(size, device=device, dtype=torch.float32)[:, None] * freq     # (size, D/2)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x, cos, sin):
    """Rotate channel pairs (d, d + D/2). x (..., heads, D); cos, sin (..., 1, D/2)."""
    x1, x2 = x.chunk(2, dim=-1)                                                  # (..., heads, D/2) each
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1)


# ---------------------------------------------------------------------------------------------------------------------
# KV cache
# ---------------------------------------------------------------------------------------------------------------------

class KVCache:
    """One preallocated (B, Hkv, S_max, D) pair per layer. A token's slot is its absolute position in its own row."""

    def __init__(self, config, batch, max_length, device="cpu", dtype=torch.float32):
        shape = (batch, config.num_key_value_heads, max_length, config.head_dim)
        self.k = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.num_hidden_layers)]
        self.v = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.num_hidden_layers)]
        self.lengths = torch.zeros(batch, dtype=torch.long, device=device)       # tokens cached per row
        self.used = 0                # host-side upper bound of lengths: how many slots attention has to look at
        self.uniform = True          # every row holds exactly `used` tokens

    def write(self, layer, k, v, where):
        """Store k, v (B, S, Hkv, D). where: a slice of slots that all rows share, or (row, column, slot) index tensors."""
        if isinstance(where, slice):
            self.k[layer][:, :, where] = k.transpose(1, 2)
            self.v[layer][:, :, where] = v.transpose(1, 2)
        else:
            row, column, slot = where                                            # (tokens,) each
            self.k[layer][row, :, slot] = k[row, column]                         # (tokens, Hkv, D)
            self.v[layer][row, :, slot] = v[row, column]

    def select(self, rows):
        """Go on with these rows only, a (B',) index tensor: finished sequences leave the computation."""
        self.k, self.v = [k[rows] for k in self.k], [v[rows] for v in self.v]
        self.lengths = self.lengths[rows]


# ---------------------------------------------------------------------------------------------------------------------
# What the blocks of one forward call share
# ---------------------------------------------------------------------------------------------------------------------

class Rows:
    """The kept rows of a (B, S) mask, as indices. One host synchronisation: the mask travels once."""

    def __init__(self, keep):
        batch, length = keep.shape
        host = keep.cpu()                                                        # the synchronisation
        self.count = int(host.sum())                                             # N
        self.every = self.count == keep.numel()
        if self.every or self.count == 0:                                        # nothing to gather
            return
        seq, pos = host.nonzero(as_tuple=True)                                   # (N,), (N,) sorted by sequence
        self.longest = int(host.sum(1).max())                                    # M
        column = (host.cumsum(1) - 1)[seq, pos]                                  # place among its sequence's kept rows
        self.seq, self.pos, self.column = (i.to(keep.device, non_blocking=True) for i in (seq, pos, column))
        self.flat = self.seq * length + self.pos                                 # (N,)

    def take(self, x):
        """(B, S, ...) -> (N, ...)"""
        return x.flatten(0, 1).index_select(0, self.flat)

    def put(self, x, rows):
        """x (B, S, ...) with these rows replaced by rows (N, ...)"""
        return x.flatten(0, 1).index_copy(0, self.flat, rows).view_as(x)

    def pad(self, rows, batch):
        """(N, ...) -> (B, M, ...): each sequence's rows to the front"""
        return rows.new_zeros(batch, self.longest, *rows.shape[1:]).index_put((self.seq, self.column), rows)

    def unpad(self, x):
        """(B, M, ...) -> (N, ...)"""
        return x[self.seq, self.column]


@dataclass
class Call:
    """Everything about one forward call that its blocks share."""
    shape: tuple                    # (B, S)
    valid: torch.Tensor             # (B, S) bool, or None where every token is real
    policy: SkipPolicy
    compact: bool
    positions: torch.Tensor         # (B, S), or (1, S) where all rows agree
    cos: torch.Tensor               # (B or 1, S, 1, D/2)
    sin: torch.Tensor
    plain: bool                     # no padding, and every row at the same positions
    span: int                       # no position reaches this
    everyone: torch.Tensor          # valid, as a mask even where that is None
    valid_rows: Rows = None         # compact with padding: the rows of valid
    cache: KVCache = None
    fresh: bool = True              # nothing cached before this call: its own keys are all there is
    where: object = None            # where KVCache.write puts this call's tokens
    keep: dict = field(default_factory=dict)     # branch -> mask or None (keep all); recorded, so a recomputation
    masks: dict = field(default_factory=dict)    # under activation checkpointing finds it and does not redraw

    @property
    def keys(self):
        """How many key positions attention multiplies with."""
        return self.shape[1] if self.fresh else self.cache.used

    def decide(self, branch, scores):
        """keep mask (B, S) of a branch, or None where nothing is skipped or padded."""
        if branch not in self.keep:
            may_skip = self.policy.may_skip(branch)
            scores = None if scores is None else scores.detach()                 # no gradient through a decision
            self.keep[branch] = self.policy.keep(branch, scores, self.everyone) if may_skip else self.valid
        return self.keep[branch]

    def rows(self, keep):
        """Rows to gather for a keep mask; None means run every row (always in masked mode)."""
        if not self.compact or keep is None:
            return None
        rows = self.valid_rows if keep is self.valid else Rows(keep)
        return None if rows.every else rows

    def mask(self, window, rows, need_mask):
        """(additive mask (B or 1, 1, M, T) or None, is_causal). need_mask: soft-capped attention has no is_causal."""
        if window is not None and max(self.keys, self.span) <= window:
            window = None
        if self.plain and window is None:
            if self.shape[1] == 1:
                return None, False                                               # one query sees all there is
            if self.fresh and rows is None and not need_mask:
                return None, True
        if rows is None and window in self.masks:
            return self.masks[window], False
        query = self.positions                                                   # (B or 1, S)
        if rows is not None:
            query = rows.pad(rows.take(query.expand(self.shape)), self.shape[0])   # (B, M): absolute, not compacted
        if self.fresh:
            key = self.positions                                                 # keys lie in call order
        else:
            key = torch.arange(self.keys, device=query.device)[None]             # keys lie in slots = positions
        sees = key[:, None, :] <= query[:, :, None]                              # (B or 1, S or M, T)
        if window is not None:
            sees = sees & (key[:, None, :] > query[:, :, None] - window)
        if self.fresh and self.valid is not None:
            sees = sees & self.valid[:, None, :]
        # large and finite: a row that sees nothing must not become NaN
        low = torch.finfo(self.cos.dtype).min / 2
        mask = torch.zeros(sees.shape, dtype=self.cos.dtype, device=sees.device).masked_fill(~sees, low)[:, None]
        if rows is None:
            self.masks[window] = mask
        return mask, False


# ---------------------------------------------------------------------------------------------------------------------
# Attention and MLP
# ---------------------------------------------------------------------------------------------------------------------

def attend(q, k, v, mask, is_causal, scale, softcap):
    """q (B, Hq, M, D), k and v (B, Hkv, T, D) -> (B, Hq, M, D)"""
    if softcap is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, scale=scale,
                                              enable_gqa=q.shape[1] != k.shape[1])
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)  # (B, Hq, T, D)
    scores = softcap * torch.tanh(q @ k.transpose(-1, -2) * scale / softcap)     # (B, Hq, M, T): cap before mask
    if mask is not None:
        scores = scores + mask
    return scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype) @ v


class Attention(nn.Module):
    """Grouped-query attention. Tokens that skip it leave their K and V to the layer below (copy-up)."""

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

    def keys_values(self, x, keep, rows, below, call):
        """K and V of this call's tokens, (B, S, Hkv, D) each, keys rotated for their absolute positions.

        kv="copy_up": K_l,i = K_{l-1},i and V_l,i = V_{l-1},i where token i skips (section 3.3 of the paper); layer 0
        has nothing below and computes its own. kv="dense": computed for every token (Algorithm 1 as printed).
        """
        copies = call.policy.kv == "copy_up" and below is not None
        # whose K and V are computed here; None: everybody's
        own, rows = (keep, rows) if copies else (call.valid, call.rows(call.valid))
        if rows is not None and rows.count == 0:                 # no weight is read
            return below if copies else (x.new_zeros(*call.shape, self.k_proj.out_features // self.head_dim, self.head_dim),) * 2
        x, cos, sin = (x, call.cos, call.sin) if rows is None else (rows.take(x), *self.rope_rows(rows, call))
        k = rotate(self.k_proj(x).unflatten(-1, (-1, self.head_dim)), cos, sin)  # (B, S, Hkv, D) or (N, Hkv, D)
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim))
        if own is None or (rows is None and call.compact):
            return k, v
        fill = below if copies else (k.new_zeros(*call.shape, *k.shape[-2:]),) * 2   # padding: zeros, never garbage
        if rows is not None:
            return rows.put(fill[0], k), rows.put(fill[1], v)
        return torch.where(own[..., None, None], k, fill[0]), torch.where(own[..., None, None], v, fill[1])

    def rope_rows(self, rows, call):
        """cos and sin of the gathered rows, (N, 1, D/2): a kept token keeps its absolute position."""
        expand = lambda table: table.expand(*call.shape, -1, -1)
        return rows.take(expand(call.cos)), rows.take(expand(call.sin))

    def forward(self, x, keep, rows, below, call):
        """x (B, S, H) -> (branch output (B, S, H), or (N, H) for gathered rows, or None for none; this layer's (K, V))"""
        k, v = self.keys_values(x, keep, rows, below, call)      # (B, S, Hkv, D)
        if call.cache is not None:
            call.cache.write(self.layer, k, v, call.where)
        if rows is not None and rows.count == 0:
            return None, (k, v)
        if call.fresh:
            keys, values = k.transpose(1, 2), v.transpose(1, 2)  # (B, Hkv, S, D)
        else:
            keys, values = call.cache.k[self.layer][:, :, :call.keys], call.cache.v[self.layer][:, :, :call.keys]
        x, cos, sin = (x, call.cos, call.sin) if rows is None else (rows.take(x), *self.rope_rows(rows, call))
        q = rotate(self.q_proj(x).unflatten(-1, (-1, self.head_dim)), cos, sin)  # (B, S, Hq, D) or (N, Hq, D)
        q = (q if rows is None else rows.pad(q, call.shape[0])).transpose(1, 2)  # (B, Hq, S or M, D)
        mask, is_causal = call.mask(self.window, rows, self.softcap is not None)
        if rows is not None and call.shape[1] == 1 and q.device.type == "cpu":   # one query each: only the kept sequences'
            one = lambda x, b: x if x is None else x[b:b + 1]                    # keys are read (a GPU would pay for the launches)
            out = torch.cat([attend(one(q, b), one(keys, b), one(values, b), one(mask, b), False, self.scale, self.softcap)
                             for b in rows.seq.tolist()])[:, :, 0]               # (N, Hq, D)
        else:
            out = attend(q, keys, values, mask, is_causal, self.scale, self.softcap).transpose(1, 2)   # (B, S or M, Hq, D)
            out = out if rows is None else rows.unpad(out)       # (B, S, Hq, D) or (N, Hq, D)
        return self.o_proj(out.flatten(-2)), (k, v)


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
# The gated residual block: equation 2, lines 5-15 of Algorithm 1
# ---------------------------------------------------------------------------------------------------------------------

class Block(nn.Module):
    """Two gated branches:  h = where(keep, h + g * f(norm(h)), h).  Gemma 2 adds a norm after f, before the gate."""

    def __init__(self, config, layer):
        super().__init__()
        self.layer, self.config = layer, config
        self.self_attn, self.mlp = Attention(config, layer), MLP(config)
        self.input_layernorm = RMSNorm(config)
        self.post_attention_layernorm = RMSNorm(config)          # Llama: before the MLP. Gemma 2: after attention
        if config.gemma:
            self.pre_feedforward_layernorm = RMSNorm(config)
            self.post_feedforward_layernorm = RMSNorm(config)
        if config.gate is not None and not config.gate.shared:
            self.self_attn_gate = Gate(config.gate, config.hidden_size)
            self.mlp_gate = Gate(config.gate, config.hidden_size)

    def branch(self, number, h, f, norm, post_norm, gate, call, same_as=None):
        """One gated branch. f(x, keep, rows) -> (output, extra). Returns (h, extra, gate values, scores)."""
        x = norm(h)                                              # (B, S, H)
        g = scores = None
        if gate is not None:
            seen = h if self.config.gate.input == "residual" else x
            g, scores = gate(seen.detach() if self.config.gate.detach else seen)     # (B, S, H or 1), (B, S): lines 6-7,
            # where the box reads h: gate_input="residual"
            if self.config.gate.placement == "before":
                x = x * g.to(x.dtype)
        if same_as is None:
            keep = call.decide(number, scores)                   # line 8, and who passes in 9-15; None: everybody
        else:
            keep = call.keep[number] = call.keep[same_as]
        rows = call.rows(keep)                                   # None: run all rows
        out, extra = f(x, keep, rows)                            # line 5, after the decision: only kept rows need it
        if out is None:                                          # nobody needs this branch
            return h, extra, g, scores
        if post_norm is not None:
            out = post_norm(out)
        if gate is not None and self.config.gate.placement == "after":
            out = out * (g if rows is None else rows.take(g)).to(out.dtype)
        # lines 9-15: h + g * o where kept, h where skipped
        if rows is not None:                                     # compact: write the rows back to where they came from
            h = h.flatten(0, 1).index_add(0, rows.flat, out).view_as(h)
        elif keep is None or call.compact:
            h = h + out
        else:                                                    # masked: by where, so a NaN in a skipped row stays there
            h = torch.where(keep[..., None], h + out, h)
        return h, extra, g, scores

    def forward(self, h, below, attn_gate, mlp_gate, call):
        """h (B, S, H), below: (K, V) of the layer below or None -> h, (K, V), [gate values] * 2, [scores] * 2"""
        attn, mlp = 2 * self.layer, 2 * self.layer + 1
        after_attn, before_mlp, after_mlp = None, self.post_attention_layernorm, None
        if self.config.gemma:
            after_attn = self.post_attention_layernorm
            before_mlp, after_mlp = self.pre_feedforward_layernorm, self.post_feedforward_layernorm

        def run_attention(x, keep, rows):
            return self.self_attn(x, keep, rows, below, call)

        def run_mlp(x, keep, rows):
            if rows is None:
                return self.mlp(x), None
            return (self.mlp(rows.take(x)) if rows.count else None), None

        h, kv, g1, s1 = self.branch(attn, h, run_attention, self.input_layernorm, after_attn, attn_gate, call)
        follows = attn if call.policy.skip == "layer" else None  # whole layers: asked once, at attention
        h, _, g2, s2 = self.branch(mlp, h, run_mlp, before_mlp, after_mlp, mlp_gate, call, same_as=follows)
        return h, kv, [g1, g2], [s1, s2]


# ---------------------------------------------------------------------------------------------------------------------
# The model
# ---------------------------------------------------------------------------------------------------------------------

class Model(nn.Module):
    """Embedding, L gated blocks, final norm, head. The attribute names `model` and `lm_head` are Hugging Face's."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = nn.ModuleDict({
            "embed_tokens": nn.Embedding.from_pretrained(torch.empty(config.vocab_size, config.hidden_size), freeze=False),   # drawn later
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
            if "_gate." in name:
                continue
            if "norm" in name:
                p.fill_(0.0 if self.config.gemma else 1.0)
            else:
                ends_branch = name.endswith(("o_proj.weight", "down_proj.weight"))
                p.normal_(0, std / (2 * self.config.num_hidden_layers) ** 0.5 if ends_branch else std, generator=generator)
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
        if self.rope is None or self.rope[0].shape[0] < size or self.rope[0].device != like.device or self.rope[0].dtype != like.dtype:
            size = max(size, min(256, self.config.max_position_embeddings))
            self.rope = rope_table(self.config, 1 << (size - 1).bit_length(), like.device, like.dtype)
        return self.rope[0][positions][:, :, None], self.rope[1][positions][:, :, None]

    def forward(self, input_ids, positions=None, valid=None, cache=None, policy=None, compute="masked",
                logits="all", keep_gates=None, checkpoint_blocks=False):
        """One pass over the tokens of this call.

        input_ids (B, S) int64. positions (B, S): default the row's cached length plus the running count of its valid
        tokens. valid (B, S) bool: True = real token; None = all are. cache: KVCache, written and advanced. policy:
        SkipPolicy, default keeps all. compute: "masked" (every row runs, the oracle) | "compact" (kept rows only).
        logits: "all" -> (B, S, V); "last" -> (B, V) of the last column; (N,) int64, flat places b * S + s -> (N, V).
        keep_gates: put the gate values into the trace (default: while training). checkpoint_blocks: recompute each
        block in the backward pass instead of storing its activations.
        Returns (logits, Trace). ValueError when the cache is too short.
        """
        if compute not in ("masked", "compact"):
            raise InputError(f"compute {compute!r} is not one of masked, compact")
        policy = policy or SkipPolicy()
        B, S = input_ids.shape
        h = self.model["embed_tokens"](input_ids)                                # (B, S, H): h_0, line 2
        if self.config.gemma:
            h = h * torch.tensor(self.config.hidden_size ** 0.5, dtype=h.dtype, device=h.device)
        call = self.start_call(h, positions, valid, cache, policy, compute)

        below, gates, scores = None, [], []
        for block in self.model["layers"]:                                       # line 4, two branches at a time
            arguments = (h, below, *self.gates_of(block), call)
            if checkpoint_blocks and torch.is_grad_enabled():
                h, below, g, s = checkpoint(block, *arguments, use_reentrant=False)
            else:
                h, below, g, s = block(*arguments)
            gates, scores = gates + g, scores + s

        if isinstance(logits, torch.Tensor):
            h = h.flatten(0, 1)[logits]                                          # (N, H)
        elif logits == "last":
            h = h[:, -1]                                                         # (B, H)
        out = self.lm_head(self.model["norm"](h))                                # (B, S, V), (B, V) or (N, V)
        if self.config.final_softcap is not None:
            out = self.config.final_softcap * torch.tanh(out / self.config.final_softcap)

        keep_gates = self.training if keep_gates is None else keep_gates
        keep = [call.everyone if call.keep[b] is None else call.keep[b] for b in range(2 * len(self.model["layers"]))]
        trace = Trace(scores if self.config.gate is not None else None, keep,
                      gates if keep_gates and self.config.gate is not None else None,
                      call.everyone, call.keys, out[..., 0].numel(), policy.kv)
        return out, trace

    def start_call(self, h, positions, valid, cache, policy, compute):
        """Work out positions and slots once for all blocks, and advance the cache's lengths."""
        B, S = h.shape[:2]
        fresh, plain = cache is None or cache.used == 0, valid is None and positions is None
        if cache is not None and not cache.uniform:
            plain = False
        if positions is None:
            step = torch.arange(S, device=h.device)[None] if valid is None else (valid.cumsum(1) - 1).clamp(min=0)
            start = 0 if fresh else cache.used if cache.uniform else cache.lengths[:, None]
            positions = start + step                                             # (B or 1, S)
            end = S + (0 if cache is None else cache.used)
        else:
            end = max(int(positions.max()) + 1, 0 if cache is None else cache.used)   # a host synchronisation
        where = None
        if cache is not None:
            room = cache.k[0].shape[2]
            taken = positions + 1 if valid is None else torch.where(valid, positions + 1, 0)
            lengths = torch.maximum(cache.lengths, taken.amax(1))                # (B,)
            if end > room:                                                       # padding may have inflated the bound
                end = int(lengths.max())                                         # a host synchronisation
            if end > room:
                raise ValueError(f"the cache has {room} slots and this call needs {end}: make it longer")
            if plain:
                where = slice(end - S, end)
            elif valid is None:
                row = torch.arange(B, device=h.device)[:, None].expand(B, S).flatten()
                column = torch.arange(S, device=h.device).repeat(B)
                where = row, column, positions.expand(B, S).flatten()
            else:
                row, column = valid.nonzero(as_tuple=True)                       # a host synchronisation, with padding only
                where = row, column, positions[row, column]
            cache.used, cache.uniform, cache.lengths = end, plain, lengths
        cos, sin = self.rope_at(positions, end + 1, h)                           # + 1: padding after a full row
        everyone = torch.ones((B, S), dtype=torch.bool, device=h.device) if valid is None else valid
        compact = compute == "compact"
        valid_rows = Rows(valid) if compact and valid is not None else None
        return Call((B, S), valid, policy, compact, positions, cos, sin, plain, end, everyone, valid_rows, cache, fresh, where)
