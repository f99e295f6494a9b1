"""GateSkip in Hugging Face transformers: a Llama or a Gemma 2 with a sigmoid gate on every attention and MLP branch.

    model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)
    model.config.gateskip["budget"] = 0.8            # the share of tokens, or of work, that runs; 1.0 skips nothing

A token whose gate is low skips the branch: its hidden state stays, and its keys and values are those of the layer
below. Skipped rows are not computed: the others are gathered, run, and put back. This file travels with the weights
that interop/export.py writes and needs torch and transformers only; the weights lie in transformers' own modules.

Shapes: B batch, S sequence (the tokens of this call), C columns (of this call and those before it, padding too), T of
them with a key in the cache, H hidden, Hq / Hkv query / key-value heads, D head dim, N rows that run a branch, M the
most of them in one sequence.
"""
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import nn
from transformers import (DynamicCache, Gemma2Config, Gemma2ForCausalLM, Gemma2Model, LlamaConfig, LlamaForCausalLM,
                          LlamaModel)
from transformers.modeling_outputs import BaseModelOutputWithPast

# what the output calls the cache: "cache" in transformers 5.2x, before that "past_key_values"
CACHE = ({"cache", "past_key_values"} & {field.name for field in fields(BaseModelOutputWithPast)}).pop()


class GateSkipLlamaConfig(LlamaConfig):
    model_type = "gateskip_llama"
    gateskip: dict = None       # budget, thresholds {budget: one, or one per branch}, skip, kv, gate {form, arch, ...}


class GateSkipGemma2Config(Gemma2Config):
    model_type = "gateskip_gemma2"
    gateskip: dict = None


# ---------------------------------------------------------------------------------------------------------------------
# Who runs a branch
# ---------------------------------------------------------------------------------------------------------------------

def thresholds_at(gateskip, branches):
    """One threshold per branch at gateskip["budget"], linear between the calibrated budgets; None: nobody skips."""
    budget = gateskip["budget"]
    if not isinstance(budget, (int, float)):
        raise ValueError(f"gateskip budget {budget!r} is no number")
    known = sorted((float(key), values) for key, values in gateskip["thresholds"].items())
    if not known[0][0] - 1e-9 <= budget <= 1.0:
        raise ValueError(f"gateskip budget {budget} is not between {known[0][0]}, the smallest calibrated one, and 1.0")
    if budget == 1.0:
        return None
    for (b0, low), (b1, high) in zip(known, known[1:]):
        if budget <= b1 + 1e-9:
            w = min(max((budget - b0) / (b1 - b0), 0.0), 1.0)
            taus = [(1 - w) * x + w * y for x, y in zip(low, high)]
            return taus * branches if len(taus) == 1 else taus           # one for all branches, or one for each


def may_skip(skip, layer, is_mlp):
    """Whether tokens are asked at this branch. "layer" asks at attention, and the MLP follows (GateSkip.layer)."""
    return {"all": True, "attn": not is_mlp, "mlp": is_mlp, "layer": not is_mlp, "alternate": layer % 2 == 1}[skip]


class Gate(nn.Module):
    """g = sigmoid(W x + b), and its mean over the channels, the token's score. In float32: scores differ in the third
    decimal. A model that is made from a config alone gets gates like any other Linear: train with the project's own."""

    def __init__(self, gate, hidden):
        super().__init__()
        out = hidden if gate["form"] == "vector" else 1
        rank = gate["rank"] or (16 if hidden >= 1024 else max(1, hidden // 16))
        inner = {"linear": 0, "mlp": 2 * hidden, "lowrank": rank}[gate["arch"]]
        self.inner = nn.Linear(hidden, inner, bias=gate["arch"] == "mlp") if inner else None
        self.out = nn.Linear(inner or hidden, out)
        self.relu, self.detach = gate["arch"] == "mlp", gate["detach"]

    def forward(self, x):
        """x (B, S, H) -> g (B, S, H) or (B, S, 1), scores (B, S)"""
        x = (x.detach() if self.detach else x).to(self.out.weight.dtype)
        if self.inner is not None:
            x = self.inner(x)
            x = torch.relu(x) if self.relu else x
        g = torch.sigmoid(self.out(x))
        return g, g.mean(-1)


class Rows:
    """The tokens that run a branch, N of B x S, gathered; where all of them run, nothing is copied."""

    def __init__(self, keep):                                            # (B, S) bool
        self.shape, self.place = keep.shape, keep.flatten().nonzero()[:, 0]      # (N,): b * S + s
        self.none, self.every = len(self.place) == 0, len(self.place) == keep.numel()
        if not (self.none or self.every):
            self.sequence, self.longest = self.place // keep.shape[1], int(keep.sum(1).max())    # (N,), M
            self.column = (keep.cumsum(1) - 1).flatten()[self.place]     # (N,): its place among those of its sequence

    def take(self, x):
        """(B, S, ...) -> (N, ...)"""
        return x.flatten(0, 1) if self.every else x.flatten(0, 1).index_select(0, self.place)

    def put(self, new, old):
        """(N, ...), (B, S, ...) -> (B, S, ...): old, with new where a token runs"""
        return new.view_as(old) if self.every else old.flatten(0, 1).index_copy(0, self.place, new).view_as(old)

    def add(self, h, o):
        """(B, S, H), (N, H) -> (B, S, H): h, with o added where a token runs"""
        return h + o.view_as(h) if self.every else h.flatten(0, 1).index_add(0, self.place, o).view_as(h)

    def pad(self, x, fill):
        """(N, ...) -> (B, M, ...): each sequence's rows in front"""
        if self.every:
            return x.unflatten(0, self.shape)
        padded = x.new_full((self.shape[0], self.longest, *x.shape[1:]), fill)
        return padded.index_put((self.sequence, self.column), x)

    def unpad(self, x):
        """(B, M, ...) -> (N, ...)"""
        return x.flatten(0, 1) if self.every else x[self.sequence, self.column]


# ---------------------------------------------------------------------------------------------------------------------
# The decoder
# ---------------------------------------------------------------------------------------------------------------------

@dataclass
class Call:
    """What the layers of one forward pass share."""
    valid: torch.Tensor         # (B, S) bool: no padding
    everyone: Rows              # those that are valid
    taus: list                  # one threshold per branch | None
    cos: torch.Tensor           # (B, S, 1, D/2)
    sin: torch.Tensor
    sees: dict                  # sliding window or None -> (B, S, C) bool: which columns a token may look at
    cache: object               # transformers' | None


def rotate(x, cos, sin):
    """Rotary positions: channels d and d + D/2 turn together. x (N, heads, D); cos, sin (N, 1, D/2)"""
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1)


class GateSkip:
    """In front of LlamaModel or Gemma2Model: the same modules and gates, and a forward pass that skips."""
    _keep_in_fp32_modules = _keep_in_fp32_modules_strict = ["self_attn_gate", "mlp_gate"]
    supports_gradient_checkpointing = False

    def __init__(self, config):
        super().__init__(config)
        gate = config.gateskip["gate"]
        for owner in [self] if gate["shared"] else self.layers:          # the names are those of the project's weights
            owner.self_attn_gate = Gate(gate, config.hidden_size)
            owner.mlp_gate = Gate(gate, config.hidden_size)
        kinds = getattr(config, "layer_types", None) or ["sliding_attention", "full_attention"] * len(self.layers)
        window = getattr(config, "sliding_window", None)                 # of Gemma 2
        self.windows = [window if kind == "sliding_attention" else None for _, kind in zip(self.layers, kinds)]
        self.gemma = isinstance(self, Gemma2Model)
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, inputs_embeds=None,
                use_cache=None, output_hidden_states=None, return_dict=None, cache=None, **_):
        """transformers' arguments and output. attention_mask: (B, C), 0 for padding; positions come from it where none
        are given. ValueError for a cache of fixed size, and for a budget that is not calibrated."""
        gateskip = self.config.gateskip
        h = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds                 # (B, S, H)
        if self.gemma and not hasattr(self.embed_tokens, "embed_scale"):         # the newest embedding does it
            h = h * torch.tensor(self.config.hidden_size ** 0.5, dtype=h.dtype, device=h.device)
        cache = past_key_values if cache is None else cache
        if cache is None and (self.config.use_cache if use_cache is None else use_cache):
            cache = DynamicCache()
        if cache is not None and not isinstance(cache, DynamicCache):
            raise ValueError(f"{type(cache).__name__} is no DynamicCache, and may have its tokens in other columns: "
                             "leave cache_implementation out")
        (B, S), past = h.shape[:2], 0 if cache is None else cache.get_seq_length()
        real = attention_mask if attention_mask is not None else h.new_ones(B, past + S)             # (B, C)
        if real.shape != (B, past + S):
            raise ValueError(f"attention_mask is {tuple(real.shape)}, not {(B, past + S)}: one column per token so far")
        real = real.bool()
        place = (real.cumsum(1) - 1).clamp(min=0)                                # (B, C): positions, padding left out
        position_ids = place[:, past:] if position_ids is None else position_ids.expand(B, S)
        valid, sees = real[:, past:], {}
        for window in set(self.windows):
            sees[window] = real[:, None] & (place[:, None] <= place[:, past:, None])                 # (B, S, C)
            if window is not None:
                sees[window] &= place[:, None] > place[:, past:, None] - window
        rotary = getattr(self, "rotary_emb", None) or self.layers[0].self_attn.rotary_emb            # as in 4.45
        cos, sin = (x.chunk(2, dim=-1)[0][:, :, None] for x in rotary(h, position_ids))              # (B, S, 1, D/2)
        call = Call(valid, Rows(valid), thresholds_at(gateskip, 2 * len(self.layers)), cos, sin, sees, cache)

        below, states = None, [h]
        for number, layer in enumerate(self.layers):
            h, below = self.layer(number, layer, h, below, call)
            states.append(h)
        h = self.norm(h)
        output = BaseModelOutputWithPast(last_hidden_state=h, **{CACHE: cache})
        if output_hidden_states:
            output["hidden_states"] = (*states[:-1], h)
        return output.to_tuple() if return_dict is False else output

    def layer(self, number, layer, h, below, call):
        """h = h + g f(norm(h)) twice, for the tokens that pass. h (B, S, H), below: (K, V) of the layer below, each
        (B, S, Hkv, D), or None -> h, and this layer's (K, V)"""
        gateskip, owner = self.config.gateskip, self if self.config.gateskip["gate"]["shared"] else layer
        if self.gemma:                                                   # (before the branch, after it)
            norms = ((layer.input_layernorm, layer.post_attention_layernorm),
                     (layer.pre_feedforward_layernorm, layer.post_feedforward_layernorm))
        else:
            norms = (layer.input_layernorm, None), (layer.post_attention_layernorm, None)
        for is_mlp, gate in enumerate((owner.self_attn_gate, owner.mlp_gate)):
            norm, norm_after = norms[is_mlp]
            x = norm(h)                                                                              # (B, S, H)
            g, scores = gate(h if gateskip["gate"]["input"] == "residual" else x)        # (B, S, H or 1), (B, S)
            if gateskip["gate"]["placement"] == "before":
                x = x * g.to(x.dtype)
            if call.taus is not None and may_skip(gateskip["skip"], number, bool(is_mlp)):
                rows = Rows(call.valid & (scores.double() > call.taus[2 * number + is_mlp]))
            elif not (is_mlp and gateskip["skip"] == "layer"):           # that MLP has the rows of its attention
                rows = call.everyone
            if not is_mlp:
                below = self.keys_values(layer.self_attn, x, rows, below, call)
                keys, values = (kv.transpose(1, 2) for kv in below)              # (B, Hkv, S, D)
                if call.cache is not None:                               # what skips is copied up already
                    keys, values = call.cache.update(keys, values, number)       # (B, Hkv, T, D)
            if rows.none:                                                # no weight of the branch is read
                continue
            o = rows.take(x)                                                                         # (N, H)
            if is_mlp:
                o = layer.mlp(o)
            else:
                o = self.attend(layer.self_attn, o, rows, keys, values, self.windows[number], call)
            o = o if norm_after is None else norm_after(o)
            if gateskip["gate"]["placement"] == "after":
                o = o * rows.take(g).to(o.dtype)
            h = rows.add(h, o)
        return h, below

    def keys_values(self, attn, x, rows, below, call):
        """K and V of this call's tokens, (B, S, Hkv, D) each: computed for the rows that run, copied up for the others.

        Layer 0, which has none below, computes them for everyone, and so do all layers with kv "dense"."""
        head_dim = attn.head_dim
        if below is None or self.config.gateskip["kv"] == "dense":
            zeros = x.new_zeros(*x.shape[:2], attn.k_proj.out_features // head_dim, head_dim)        # what padding has
            rows, below = call.everyone, (zeros, zeros)
        if rows.none:
            return below
        x = rows.take(x)                                                                             # (N, H)
        k = rotate(attn.k_proj(x).unflatten(-1, (-1, head_dim)), rows.take(call.cos), rows.take(call.sin))
        v = attn.v_proj(x).unflatten(-1, (-1, head_dim))                                             # (N, Hkv, D)
        return rows.put(k, below[0]), rows.put(v, below[1])

    def attend(self, attn, x, rows, k, v, window, call):
        """x (N, H): of the rows that run; k, v (B, Hkv, T, D): all that may be looked at -> (N, H)"""
        sees, head_dim, cap = call.sees[window], attn.head_dim, getattr(self.config, "attn_logit_softcapping", None)
        sees = rows.pad(rows.take(sees[:, :, -k.shape[2]:]), True)[:, None]      # (B, 1, M, T); a cache may forget
        scale = (self.config.query_pre_attn_scalar if self.gemma else head_dim) ** -0.5
        q = rotate(attn.q_proj(x).unflatten(-1, (-1, head_dim)), rows.take(call.cos), rows.take(call.sin))
        q = rows.pad(q, 0.0).transpose(1, 2)                                     # (B, Hq, M, D)
        group = q.shape[1] // k.shape[1]
        # With a mask a GPU's kernels know no groups of heads.
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)                  # (B, Hq, T, D)
        if cap is None:
            o = F.scaled_dot_product_attention(q, k, v, attn_mask=sees, scale=scale)
        else:
            weights = cap * torch.tanh(q @ k.transpose(-1, -2) * scale / cap)                        # (B, Hq, M, T)
            o = weights.masked_fill(~sees, torch.finfo(q.dtype).min).softmax(-1) @ v
        return attn.o_proj(rows.unpad(o.transpose(1, 2)).flatten(-2))


# ---------------------------------------------------------------------------------------------------------------------
# The two families
# ---------------------------------------------------------------------------------------------------------------------

class GateSkipLlamaModel(GateSkip, LlamaModel):
    config_class = GateSkipLlamaConfig


class GateSkipGemma2Model(GateSkip, Gemma2Model):
    config_class = GateSkipGemma2Config


class GateSkipLlamaForCausalLM(LlamaForCausalLM):
    config_class = GateSkipLlamaConfig

    def __init__(self, config):
        super().__init__(config)
        self.model = GateSkipLlamaModel(config)                          # in place of the plain one
        self.post_init()


class GateSkipGemma2ForCausalLM(Gemma2ForCausalLM):
    config_class = GateSkipGemma2Config

    def __init__(self, config):
        super().__init__(config)
        self.model = GateSkipGemma2Model(config)
        self.post_init()
