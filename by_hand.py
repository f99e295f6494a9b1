"""The paper's Algorithms 1, 2 and 3 for ONE sequence, in plain loops over branches and tokens. Read this file first.

It reads the weights of a real Model and runs nothing of it: slow, obvious, what the tests hold the fast path to.
`# line 5` is that line of the Algorithm that the docstring names, `A2 line 3` one of Algorithm 2.

Shapes: S tokens of this pass, H hidden, D head dim, V vocabulary. A token is a vector (H,); h, x and g are lists of S.
"""
import math
from pathlib import Path

from console import run

import torch

from decoder_by_hand import attention_of, cap, gate_of, heads, mlp_of, norm, rotate


def quantile_threshold(v, q):                                    # line 1
    """Algorithm 3: the q-quantile of the scores v (floats), on the straight line between two neighbours."""
    if len(v) <= 1 or min(v) == max(v):                          # line 2
        return v[0]
    s = sorted(v)                                                # line 3
    pos = q * (len(s) - 1)                                       # line 4: n = len(s), pos, i, alpha
    pos = round(pos) if abs(pos - round(pos)) < 1e-9 else pos    # (1 - 0.8) * 10 is 2, not 1.9999999999999996
    i, alpha = int(pos), pos - int(pos)
    tau = s[i] + alpha * (s[i + 1] - s[i]) if alpha else s[i]    # line 5; at i = n - 1 there is no s[i + 1]
    return tau                                                   # line 6; line 7: end


def threshold(g_bar, budget):
    """tau of one branch (eq. 6). As printed, somebody is always skipped, and a lone token always: we deviate twice."""
    if budget >= 1:
        return -math.inf                                         # budget 1 keeps all
    tau, largest = quantile_threshold(g_bar, 1 - budget), max(g_bar)
    if tau < largest:
        return tau
    return max((s for s in g_bar if s < largest), default=-math.inf)             # somebody is kept: those at the top


def forward(model, ids, budget=1.0, thresholds=None, skip="all", kv="copy_up", earlier=None):
    """Algorithm 1, h_0 of line 2 and lines 4-16, on the tokens of one pass. A2: the same in Algorithm 2.

    thresholds: a fixed tau per branch, no quantile. earlier: KV of the tokens before; it grows. Returns logits (S, V),
    g[branch][token] (H,) or (1,), keep[branch][token] bool, KV[layer][position] = keys and values, a (D,) per head.
    """
    c, layers, all_g, keep = model.config, model.model["layers"], [], []
    KV, scale = earlier or [[] for _ in layers], c.hidden_size ** 0.5 if c.gemma else 1.0
    h = [scale * model.model["embed_tokens"].weight[token] for token in ids]     # line 2, A2 line 1: h_0 = Embed(x)
    for branch in range(2 * len(layers)):                                        # line 4, A2 line 2
        layer, is_mlp = divmod(branch, 2)                                        # attn 0, mlp 0, attn 1, mlp 1, ...
        block, gate = layers[layer], model.gates_of(layers[layer])[is_mlp]
        norm_in, norm_out = block.input_layernorm, block.post_attention_layernorm        # norm_out: Gemma's only
        if is_mlp and c.gemma:
            norm_in, norm_out = block.pre_feedforward_layernorm, block.post_feedforward_layernorm
        elif is_mlp:
            norm_in = block.post_attention_layernorm                             # Llama's name of the MLP's
        x = [norm(h_i, norm_in, c) for h_i in h]                                 # S of (H,): what the module reads
        # S of (H,) or (1,), made from x; printed: from h (gate.config.input). Without gates 1, which is eq. 1
        g = [gate_of(gate, x_i, h_i) for x_i, h_i in zip(x, h)]                  # line 6, A2 line 4
        before = gate is not None and gate.config.placement == "before"          # then the gate multiplies the input
        x = [g_i * x_i for g_i, x_i in zip(g, x)] if before else x
        if skip != "layer" or not is_mlp:                                        # else the MLP goes by its attention's
            g_bar = [g_i.detach().mean().item() for g_i in g]                    # line 7, A2 line 5: S floats
            tau = thresholds[branch] if thresholds else threshold(g_bar, budget)                 # line 8, A2 line 6
        if {"attn": is_mlp, "mlp": not is_mlp, "alternate": layer % 2 == 0}.get(skip):
            tau = -math.inf                                                      # nobody may skip this branch
        for i in range(len(ids)):                                                # line 9, A2 line 7: for i in A
            skipped = g_bar[i] <= tau
            if not is_mlp and skipped and layer > 0 and kv == "copy_up":         # section 3.3: K and V are copied up
                KV[layer].append(KV[layer - 1][len(KV[layer])])                  # at i's position; layer 0: no below
            elif not is_mlp:                                                     # kv="dense": always, as printed
                k, v = heads(block.self_attn.k_proj, x[i], c), heads(block.self_attn.v_proj, x[i], c)
                KV[layer].append(([rotate(k_head, len(KV[layer]), c) for k_head in k], v))
            if skipped:                                                          # line 10, A2 line 8
                pass                                                             # line 11, A2 line 9: h_i unchanged
            else:                                                                # line 12, A2 line 10
                # line 5, A2 line 3: o (H,), printed above the gate; only those who pass need it
                o = mlp_of(block.mlp, x[i], c) if is_mlp else attention_of(block.self_attn, x[i], KV[layer], layer, c)
                o = norm(o, norm_out, c) if c.gemma else o
                h[i] = h[i] + (o if before else g[i] * o)                        # line 13, A2 line 11: eq. 2
            # line 14, A2 line 12: end if
        # line 15, A2 line 13: end for
        all_g, keep = all_g + [g], keep + [[score > tau for score in g_bar]]
    # line 16, A2 line 15: end for
    h = [norm(h_i, model.model["norm"], c) for h_i in h]                         # h_L
    return torch.stack([cap(model.lm_head.weight @ h_i, c.final_softcap) for h_i in h]), all_g, keep, KV


def training_step(model, ids, answer_from, step, total, lam=0.1, kind="l2", b_1=1.0, b_2=0.8, costs=None, **how):
    """Algorithm 1: the loss of one step (from 0) on one sequence; ids[answer_from:] is the answer. how: of forward.
    costs: what each branch weighs, with mean 1 (ours); printed: all the same."""
    t, T = step + 1, total                                                       # line 1: for t; line 2: (x, y) is ids
    b_t = b_1 - (b_1 - b_2) * (t - 1) / (T - 1) if t < T else b_2                # line 3
    logits, all_g, _, _ = forward(model, ids, b_t, **how)                        # (S, V), [branch][token] of (H,)
    answer = range(answer_from, len(ids))                                        # token s is predicted at s - 1
    L_CE = -sum(logits[s - 1].log_softmax(0)[ids[s]] for s in answer) / len(answer)              # line 17: eq. 3
    size = {"l1": lambda g: g.mean(),                                            # line 18 as printed: |g|
            "l2_norm": lambda g: g.pow(2).mean(0).sqrt().mean(),                 # eq. 4, here over sqrt(S)
            "l2": lambda g: g.pow(2).mean()}[kind]                               # the default: the authors' code
    costs = costs or [1.0] * len(all_g)
    L_S = sum(c * size(torch.stack(g)) for c, g in zip(costs, all_g)) / len(all_g)               # of (S, H) each
    return L_CE + lam * L_S                      # eq. 5; line 19: update by backward() and AdamW; line 20: end for t


@torch.no_grad()
def generate(model, prompt, steps, eos=(), b_hat=1.0, **how):
    """Algorithm 2, greedy, one pass a token. Fixed thresholds decide as a pass over the whole text would: causally.
    A quantile looks ahead in the prompt, and then keeps every token, since each is alone in its pass."""
    # A2 line 1: with one sequence, A holds it or nothing; ids are the tokens of its next pass
    ids, KV, new = list(prompt), None, []
    while ids and len(new) < steps:
        logits, _, _, KV = forward(model, ids, b_hat, earlier=KV, **how)
        new.append(logits[-1].argmax().item())                                   # A2 line 16
        ids = [] if new[-1] in eos else new[-1:]                                 # A2 line 14, once a pass
    return new


def main():
    from data import encode_prompt
    from generate import generate as fast_path
    from load_weights import load_model, load_tokenizer
    from problems import arithmetic

    v, tau = [0.61, 0.70, 0.64, 0.75], quantile_threshold([0.61, 0.70, 0.64, 0.75], 1 - 0.5)
    print(f"Four tokens, budget 0.5: g_bar = {v}, sorted {sorted(v)}\n"
          f"pos = (1 - 0.5) * (4 - 1) = 1.5, i = 1, alpha = 0.5, tau = 0.64 + 0.5 * (0.70 - 0.64) = {tau:.2f}")
    for token, g_bar in enumerate(v):
        print(f"token {token}: {g_bar:.2f} " + (f"<= {tau:.2f}, skipped" if g_bar <= tau else f" > {tau:.2f}, kept"))

    folder = Path(__file__).parent / "examples" / "tiny-llama"
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    prompt = encode_prompt(tokenizer, min((e.question for e in arithmetic(50, "test")), key=len))
    new = generate(model, prompt, 64, model.config.eos_ids)
    same = new == fast_path(model, [prompt], 64, eos_ids=model.config.eos_ids).tokens[0]
    print(f"\nThe embedded model in these loops, every token in every layer:\n{tokenizer.decode(prompt + new)}\n"
          f"The fast path generates {'the same' if same else 'OTHER'} {len(new)} tokens.")
    return 0


if __name__ == "__main__":
    run(main)
