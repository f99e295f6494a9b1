"""What a skip saves: multiply-accumulates (MACs), the three numbers of a run, and the tables on paper.

Everything is counted from what a forward call decided (model.Trace), on the device; nothing is timed here (bench.py).

Shapes: B batch, S sequence, L layers.
"""
from dataclasses import replace

import torch

from gates import GateConfig, may_skip
from model import Model, ModelConfig


def llama(theta=500000.0, factor=None, max_position_embeddings=131072, **sizes):
    scaling = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 8192}
    return ModelConfig(rope_theta=theta, rope_scaling=scaling if factor else None,
                       max_position_embeddings=max_position_embeddings, **sizes)


# the true sizes of the models that this project is about, for counting on paper and on the meta device
SHAPES = {
    "llama-3.2-1b": llama(vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
                          num_attention_heads=32, num_key_value_heads=8, head_dim=64, factor=32.0),
    "llama-3.2-3b": llama(vocab_size=128256, hidden_size=3072, intermediate_size=8192, num_hidden_layers=28,
                          num_attention_heads=24, num_key_value_heads=8, head_dim=128, factor=32.0),
    "llama-3.1-8b": llama(vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
                          num_attention_heads=32, num_key_value_heads=8, head_dim=128, factor=8.0,
                          tie_word_embeddings=False),
    "gemma-2-2b": ModelConfig(vocab_size=256000, hidden_size=2304, intermediate_size=9216, num_hidden_layers=26,
                              num_attention_heads=8, num_key_value_heads=4, head_dim=256, rms_norm_eps=1e-6,
                              max_position_embeddings=8192, gemma=True, attn_scale=256 ** -0.5, attn_softcap=50.0,
                              final_softcap=30.0, windows=[4096, None] * 13),
    "smollm2-135m": llama(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
                          num_attention_heads=9, num_key_value_heads=3, head_dim=64, theta=100000.0,
                          max_position_embeddings=8192),
}
GATE_FORMS = {"vector": GateConfig(), "lowrank": GateConfig(arch="lowrank"), "scalar": GateConfig("scalar")}


def count_macs(config, keep, valid, *, keys, logit_rows, kv="copy_up", gate=None):
    """Multiply-accumulates that one call executes on the compact path. int64 scalar tensor, on the device.

    config: the model's; keep (2L, B, S) bool; valid (B, S) bool; keys: key positions per query; logit_rows: rows that
    go through the head; gate: GateConfig or None. The ungated dense model: keep = valid.
    Scores and weighted sum are counted as the rectangles that are really multiplied, ragged padding included; of one
    query per sequence only the kept (a GPU runs the others along, which is not counted).
    Agrees with half of FlopCounterMode's FLOPs under sdpa_kernel(SDPBackend.MATH).
    """
    H, D = config.hidden_size, config.head_dim
    batch, length = valid.shape
    rows = keep.flatten(1).sum(-1)                               # (2L,) rows that run
    queries = rows if length == 1 else batch * keep.sum(-1).amax(-1)     # (2L,) rectangle: most rows of one sequence
    attn, mlp = rows[0::2], rows[1::2]                           # (L,) each
    kv_rows = attn if kv == "copy_up" else valid.sum().expand_as(attn)
    kv_rows = torch.cat([valid.sum()[None], kv_rows[1:]])        # layer 0 has nothing below to copy from
    macs = (attn * 2 * H * config.num_attention_heads * D + kv_rows * 2 * H * config.num_key_value_heads * D
            + queries[0::2] * keys * 2 * config.num_attention_heads * D
            + mlp * 3 * H * config.intermediate_size).sum()
    gates = 0 if gate is None else len(keep) * batch * length * gate.macs(H)
    return macs + gates + logit_rows * config.vocab_size * H


def branch_costs(config, skip="all"):
    """The work that is decided at each of the 2L branches: MACs of products with weights for one token, with mean 1.

    Then 0 where nobody may skip, so that their mean is the share of work that may be skipped; "layer" decides on the
    MLP at attention. Query-key products, which grow with the text, are left out, and so are gates; K and V count as
    attention's even where kv="dense" computes them all the same.
    """
    H, layers = config.hidden_size, config.num_hidden_layers
    attention = 2 * H * (config.num_attention_heads + config.num_key_value_heads) * config.head_dim
    mlp = 3 * H * config.intermediate_size
    work = ([attention + mlp, 0] if skip == "layer" else [attention, mlp]) * layers
    return [2 * layers * w * may_skip(skip, b) / sum(work) for b, w in enumerate(work)]


def macs_of(config, trace, dense=False):
    """count_macs of one call's Trace; dense: of the ungated model on the same tokens, which skips nothing."""
    keep, sizes = torch.stack(trace.keep), dict(keys=trace.keys, logit_rows=trace.logit_rows)        # (2L, B, S)
    if dense:
        return count_macs(config, trace.valid.expand_as(keep), trace.valid, **sizes)
    return count_macs(config, keep, trace.valid, **sizes, kv=trace.kv, gate=config.gate) + trace.more_macs


class Savings:
    """The three numbers of a run, accumulated on the device over calls, and with += over runs.

    skipped           skipped (token, branch) pairs over all valid pairs
    skipped_per_call  the paper's: the share per forward call and branch, all weighing the same
    macs_saved        1 - executed MACs / MACs of the ungated dense model; negative where gates cost more than they save

    And work_skipped, what a budget under one threshold for all branches means: pairs weighted by branch_costs.
    """

    def __init__(self, config):
        self.config, self.sums = config, {}                      # part -> (7 + 2L,) float64: arguments of _numbers
        self.costs = None                                        # branch_costs (2L,), on the device

    def add(self, trace, part="all"):
        """Count one call's Trace. part: whose work it was, where that is told apart: "prompt" or "answer"."""
        kept, n = torch.stack(trace.keep).flatten(1).sum(-1), trace.valid.sum()              # (2L,), ()
        if self.costs is None:
            self.costs = torch.tensor(branch_costs(self.config), dtype=torch.float64, device=kept.device)
        now = torch.stack([x.double() for x in (kept.sum(), n * len(kept), (1 - kept / n).mean(), torch.ones_like(n),
                                                macs_of(self.config, trace), macs_of(self.config, trace, dense=True),
                                                kept.double() @ self.costs)])
        now = torch.cat([now, kept.double()])
        self.sums[part] = self.sums[part] + now if part in self.sums else now

    def __iadd__(self, other):
        for part, sums in other.sums.items():
            self.sums[part] = self.sums[part] + sums if part in self.sums else sums
        return self

    def report(self):
        """dict of the three numbers (floats) and the sums behind them; where there are parts, also {part: such a dict}.

        "branches": 2L floats, the share of tokens that ran each branch. One host synchronisation.
        """
        parts = dict(zip(self.sums, torch.stack(list(self.sums.values())).tolist()))
        report = self._numbers(*map(sum, zip(*parts.values())))
        return report | {part: self._numbers(*sums) for part, sums in parts.items() if part != "all"}

    @staticmethod
    def _numbers(kept, pairs, per_call, calls, run, dense, work, *ran):
        return {"skipped": 1 - kept / pairs, "skipped_per_call": per_call / calls, "macs_saved": 1 - run / dense,
                "work_skipped": 1 - work / pairs, "calls": int(calls), "pairs": pairs, "macs": run, "macs_dense": dense,
                "branches": [n * len(ran) / pairs for n in ran]}


def savings_line(saved, compute="compact"):
    """The three numbers of a report, never one alone; for generated text two more lines, prompt and answer apart."""
    label = "" if compute == "compact" else " if run compact"
    return "\n".join(f"{name}skipped {part['skipped']:.1%} of (token, branch) pairs, {part['skipped_per_call']:.1%} "
                     f"averaged per call; MACs saved{label} {part['macs_saved']:+.1%}, gates paid"
                     for name, part in (("", saved), ("  prompt tokens: ", saved.get("prompt")),
                                        ("  generated tokens: ", saved.get("answer"))) if part)


# ---------------------------------------------------------------------------------------------------------------------
# On paper
# ---------------------------------------------------------------------------------------------------------------------

def counts_table():
    """The paper's Table 13 with true sizes: lines of a Markdown table, a row per model and gate form.

    Saved: multiply-accumulates at 15% of (token, branch) pairs skipped, head included, gates paid; short context, so
    that query-key products (keys=0) do not count.
    """
    lines = ["| model | gate | gate parameters | of the model | of a block's MACs | "
             "MACs saved at 15%, K and V copied up / computed |", "|---|---|---|---|---|---|"]
    valid = torch.ones(1, 100, dtype=torch.bool)                 # (B, S)
    for name, shape in SHAPES.items():
        keep = (torch.arange(100) < 85).expand(2 * shape.num_hidden_layers, 1, 100)      # (2L, B, S)
        everyone = valid.expand_as(keep)
        dense = count_macs(shape, everyone, valid, keys=0, logit_rows=100)
        block = count_macs(replace(shape, num_hidden_layers=1), everyone[:2], valid, keys=0, logit_rows=0) / 100
        for form, gate in GATE_FORMS.items():
            hidden = shape.hidden_size
            with torch.device("meta"):
                sizes = {key: p.numel() for key, p in Model(replace(shape, gate=gate)).named_parameters()}
            n_gates = sum(n for key, n in sizes.items() if "_gate." in key)
            saved = [1 - count_macs(shape, keep, valid, keys=0, logit_rows=100, kv=kv, gate=gate) / dense
                     for kv in ("copy_up", "dense")]
            label = f"vector, rank {gate.widths(hidden)[0]}" if form == "lowrank" else form
            lines.append(f"| {name} | {label} | {n_gates:,} | {n_gates / (sum(sizes.values()) - n_gates):.2%} | "
                         f"{2 * gate.macs(hidden) / block:.2%} | {saved[0]:+.1%} / {saved[1]:+.1%} |")
    return lines


def memory_on_paper(config, tokens, answer_tokens, frozen=False, checkpointing=False, length=None):
    """{part: bytes} of an FP32 training step (masked) of `tokens` in sequences of `length` (default: one), counted from
    what autograd keeps on a GPU; an upper bound if frozen.

    Per token and layer autograd keeps 10 H + 4 Hq D + 4 I numbers: per branch the residual stream, the norm's two
    products, the gate and (without gates not) the branch's output; q, attention's output, and K and V, repeated for
    each query head; four of the MLP's width. Gemma 2 adds 4 H for its second norms and two S x S matrices per head and
    sequence for the soft-capping. With checkpointing only each block's inputs and the gates stay, and one block at a
    time is recomputed. Logits: the product, its softmax, its gradient, and Gemma's tanh. Not counted: what the backward
    pass of one operation holds for a moment.
    """
    with torch.device("meta"):
        model = Model(config)
    n_all = sum(p.numel() for p in model.parameters())
    n_trained = sum(p.numel() for name, p in model.named_parameters() if "_gate." in name or not frozen)
    H, D, heads, kv_heads = config.hidden_size, config.head_dim, config.num_attention_heads, config.num_key_value_heads
    gates = 0 if config.gate is None else 2 * config.gate.widths(H)[1]
    block = (8 if gates else 6) * H + gates + 4 * heads * D + 4 * config.intermediate_size
    if config.gemma:
        block += 4 * H + 2 * heads * (length or tokens)
    kept = H + 2 * kv_heads * D + gates
    activations = kept * config.num_hidden_layers + block if checkpointing else block * config.num_hidden_layers
    logits = (4 if config.final_softcap else 3) * answer_tokens * config.vocab_size
    return {"weights": 4 * n_all, "gradients": 4 * n_trained, "Adam": 8 * n_trained,
            "activations": 4 * tokens * activations, "logits": 4 * logits}


def memory_table(config, tokens, frozen, checkpointing, length=None):
    """memory_on_paper without and with checkpointing, every token an answer token: lines to print."""
    lines = [f"memory on paper, FP32, {tokens} tokens at once, every one an answer token (GB):"]
    for name, way in (("without", False), ("with   ", True)):
        parts = memory_on_paper(config, tokens, tokens, frozen, way, length)
        lines.append(f"  {name} --checkpoint-activations: " + ", ".join(f"{k} {v / 1e9:.1f}" for k, v in parts.items())
                     + f" = {sum(parts.values()) / 1e9:.1f}" + ("  <- this run" if way == checkpointing else ""))
    return lines
