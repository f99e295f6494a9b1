"""The answers to exercises.py, and further down to find_the_bug.py. One way of several: the functions are shorter than
the project's own, which also batch and run on a GPU.

    python lesson/check_bugs.py --tests lesson/solutions.py

"The authors" are those of the paper (arXiv 2510.13876), "their code" is their repository Thiggel/GateSkip. Others are
named by their repositories. None of this is said to blame anybody: each of these mistakes runs without complaint.
"""
import torch

import by_hand
import gates
from gates import GateConfig, SkipPolicy
from generate import generate
from rows import Masked
from savings import Savings
from tiny import tiny_cache, tiny_ids, tiny_model


def gate_and_score(x, weight, bias):
    g = torch.sigmoid(x @ weight.T + bias)                       # (S, H) or (S, 1)
    return g, g.mean(-1)


def quantile_threshold(v, q):
    s = v.sort().values
    pos = q * (len(s) - 1)
    pos = round(pos) if abs(pos - round(pos)) < 1e-9 else pos
    i = int(pos)
    alpha = pos - i
    return s[i] if alpha == 0 else (1 - alpha) * s[i] + alpha * s[i + 1]


def select_tokens(scores, budget, valid):
    if budget >= 1 or not valid.any():
        return valid.clone()
    tau, largest = quantile_threshold(scores[valid], 1 - budget), scores[valid].max()
    return valid & (scores > tau if tau < largest else scores == largest)


def gated_residual(h, g, o, keep):
    return torch.where(keep[:, None], h + g * o, h)              # 0 * NaN is NaN: no product with a mask


def kv_source(keep):
    source = torch.zeros(keep.shape, dtype=torch.long)           # layer 0 makes its own
    for layer in range(1, len(keep)):
        source[layer] = torch.where(keep[layer], layer, source[layer - 1])
    return source


def budget_at(step, total, start, end):
    return end if total == 1 else start - (start - end) * step / (total - 1)


def sparsity_l1(gates, valid):
    return gates[:, valid].mean()


def sparsity_l2(gates, valid):
    return gates[:, valid].pow(2).mean()


def sparsity_l2_norm(gates, valid):
    return gates[:, valid].pow(2).mean(1).sqrt().mean()          # the mean over tokens has the division by n in it


def sparsity_kl(gates, valid, budget):
    m, b = gates[:, valid].mean((1, 2)).clamp(1e-6, 1 - 1e-6), min(max(budget, 0.01), 0.99)      # (N,)
    return (m * (m / b).log() + (1 - m) * ((1 - m) / (1 - b)).log()).sum()


def attention_macs(hidden, heads, kv_heads, head_dim, keys, tokens, kept, gate):
    projections = 2 * hidden * heads * head_dim + 2 * hidden * kv_heads * head_dim
    looking = 2 * heads * head_dim * keys                        # scores, and the sum of values
    return kept * (projections + looking) + tokens * hidden * gate


def mlp_macs(hidden, inner, tokens, kept, gate):
    return kept * 3 * hidden * inner + tokens * hidden * gate


def frozen_threshold(scores, q):
    tau = quantile_threshold(scores, q)
    tied = scores[(scores - tau).abs() <= 1e-6]
    below, above = scores[scores < tau - 1e-6], scores[scores > tau + 1e-6]
    if len(tied) == 0:
        return (below.max() + above.min()) / 2
    low = (below.max() + tied.min()) / 2 if len(below) else tied.min() - 1e-4
    high = (above.min() + tied.max()) / 2 if len(above) else tied.max() + 1e-4
    return min(low, high, key=lambda cut: abs((scores <= cut).double().mean() - q))


def update_quantile(old, scores, costs, valid, points):
    weights = costs[:, None] * valid                             # (N, S)
    s, order = scores[weights > 0].sort()
    weight = weights[weights > 0][order].cumsum(0)               # of all scores that are not larger
    wanted = torch.linspace(0, 1, points, dtype=weight.dtype) * weight[-1]
    new = s[torch.searchsorted(weight, wanted)]                  # the first that reaches it
    return new if old is None else 0.9 * old + 0.1 * new


def accept_draft(p, q, token, u):
    rest = (p - q).clamp(min=0)
    rest = rest / rest.sum() if rest.sum() > 0 else p.clone()
    return bool(u < p[token] / q[token]), rest


# ---------------------------------------------------------------------------------------------------------------------
# Find the bug: a test that catches it, what the mistake is, and where it was made
# ---------------------------------------------------------------------------------------------------------------------

def head(model, h):
    """Logits of a state h (..., H) behind the last layer."""
    return model.lm_head(model.model["norm"](h))


def given(*skipped, length):
    """A policy under which these (branch, token) pairs are skipped: masks of one sequence and 8 branches."""
    masks = torch.ones(8, 1, length, dtype=torch.bool)
    for branch, token in skipped:
        masks[branch, 0, token] = False
    return SkipPolicy("given", masks=list(masks))


def test_0():
    """Mistake: the gate multiplies the branch's input and its output too.
    Made in: the authors' code, whose wrapper scales the input for this ablation and then scales the output as ever: the
    row of the paper's table is "before and after"."""
    model, ids = tiny_model(GateConfig(placement="before")), tiny_ids(1, 6)
    assert torch.allclose(model(ids)[0][0], by_hand.forward(model, ids[0].tolist())[0])


def test_1():
    """Mistake: `<=` against the quantile at budget 1. The quantile at 0 is the lowest score, so one token of each
    branch is skipped always.
    Made in: the paper, Algorithms 1 and 2 as printed (line 10 and line 8). The authors' code has a special case."""
    model, ids = tiny_model(), tiny_ids()
    assert torch.equal(model(ids, policy=SkipPolicy("batch", 1.0))[0], model(ids)[0])


def test_2():
    """Mistake: padding is ranked with the real tokens, and the quantile is one of both.
    Made in: the authors' code, whose random skipping overrides what protects padding, and whose pruning averages over
    it. A plain top-k over a padded sequence, as in Mixture-of-Depths, falls into it too."""
    scores = torch.tensor([[0.1, 0.2, 0.3, 0.5, 0.6, 0.7, 0.8]])                 # three of padding, four of tokens
    keep = gates.select_tokens(scores, 0.5, scores > 0.4)
    assert keep[0].tolist() == [False] * 5 + [True, True], "of four tokens at budget 0.5 the upper two are kept"


def test_3():
    """Mistake: the gates' own multiplications are not counted, though skipped tokens pay for them too.
    Made in: the paper. "Compute saved" there is the share of skipped tokens, and its vector gates, H^2 a branch, are
    about a seventh of the work of a block of Llama-3.2-1B."""
    model = tiny_model()
    savings = Savings(model.config)
    savings.add(model(tiny_ids())[1])
    assert savings.report()["macs_saved"] < 0, "who skips nothing and has gates, multiplies more than without"


def test_4():
    """Mistake: the head reads the last state without the final norm.
    Made in: early-exit code. The authors' comparison methods (CALM, FREE, LayerSkip) apply lm_head to states that come
    from the middle of the model, which in transformers have not been through the norm; the last one has."""
    model, ids, last = tiny_model(), tiny_ids(), []
    model.model["layers"][-1].register_forward_hook(lambda block, inputs, outputs: last.append(outputs[0]))
    logits = model(ids)[0]
    assert torch.allclose(logits, head(model, last[0]))


def test_5():
    """Mistake: the gate multiplies what the branch gives *and* the residual, g * (h + f(x)) in place of h + g * f(x).
    Made in: the authors' Mixture-of-Depths, which scales the whole output of a block. A router that starts with bias 1
    so takes the stream times 0.73 at each block."""
    model, ids = tiny_model(), tiny_ids()
    for block in model.model["layers"]:                          # no branch has anything to say
        block.self_attn.o_proj.weight.data.zero_()
        block.mlp.down_proj.weight.data.zero_()
    h_0 = model.model["embed_tokens"](ids)
    assert torch.allclose(model(ids)[0], head(model, h_0)), "what every branch leaves alone comes out as it went in"


def test_6():
    """Mistake: a skipped token is not left as it is: the branch's normalised input is added to it.
    Made in: the authors' SkipLayer. It wraps attention and MLP and returns their input for skipped tokens, and the
    caller adds that to the residual. In the paper's tables SkipLayer solves next to nothing."""
    model, ids = tiny_model(), tiny_ids()
    logits = model(ids, policy=given(*((branch, 3) for branch in range(8)), length=8))[0]
    h_0 = model.model["embed_tokens"](ids)
    assert torch.allclose(logits[0, 3], head(model, h_0[0, 3])), "who skips every branch comes out as it went in"


def test_7():
    """Mistake: a mask by multiplication. 0 * NaN is NaN, and 0 * inf too.
    Made in: routers that multiply the branch's output with a hard gate of 0 or 1, such as SkipGPT's."""
    keep, h, o = torch.tensor([[True, False]]), torch.ones(1, 2, 3), torch.ones(1, 2, 3)
    o[0, 1] = torch.nan
    assert Masked(keep).add(h, o).tolist() == [[[2.0] * 3, [1.0] * 3]]


def test_8():
    """Mistake: the copy raises inside a `try`, and what was computed for everybody stays.
    Made in: the authors' code. Their wrapper takes the second thing that attention returns for the cache. In
    transformers 4.51 that is the attention weights; indexing it fails, each time, and the `except` says nothing."""
    model, ids, i = tiny_model(), tiny_ids(), 3
    cache = tiny_cache(model)
    model(ids, cache=cache, policy=given((2, i), (4, i), length=8))              # the attention of layers 1 and 2
    for pair in (cache.k, cache.v):
        assert torch.equal(pair[1][:, :, i], pair[0][:, :, i]) and torch.equal(pair[2][:, :, i], pair[0][:, :, i])


def test_9():
    """Mistake: tokens that skip an attention are missing from it, as keys too.
    Made in: code that gathers the kept tokens and lets them look at each other only. In Mixture-of-Depths that is the
    method; in GateSkip it is a mistake, which one version of the authors' code makes where all tokens of a call skip:
    no row is then written at all."""
    model, ids = tiny_model(), tiny_ids()
    taus = [0.6] * 8
    logits, trace = model(ids, policy=SkipPolicy("frozen", 0.5, thresholds=taus))
    assert not all(keep.all() for keep in trace.keep[::2]), "nobody skips attention: this would show nothing"
    assert torch.allclose(logits[0], by_hand.forward(model, ids[0].tolist(), thresholds=taus)[0])


def test_10():
    """Mistake: `cache[layer - 1]` at layer 0 is `cache[-1]`, the last layer.
    Made in: the authors' code, where it never took effect, because that copy failed before (bug 8)."""
    model, ids = tiny_model(), tiny_ids()
    policy = given((0, 2), (0, 5), length=8)
    assert torch.allclose(model(ids, cache=tiny_cache(model), policy=policy)[0], model(ids, policy=policy)[0])


def test_11():
    """Mistake: kept tokens are turned by their place among the kept ones and not by their place in the text.
    Made in: sramshetty/mixture-of-depths, which gathers the kept tokens and gives them the first rows of the table of
    angles."""
    model, ids, policy = tiny_model(), tiny_ids(), given((2, 0), (2, 3), (4, 4), length=8)
    masked, compact = (model(ids, policy=policy, compute=compute)[0] for compute in ("masked", "compact"))
    assert torch.allclose(masked, compact)


def test_12():
    """Mistake: finished sequences stay in the batch; their next tokens are ranked, and push those of others up or down.
    Made in: the paper. Algorithm 2 as printed takes them out in line 14 inside the loop over layers, where it can mean
    nothing. The authors' code feeds them padding and knows it by its token id, which may be that of a real token."""
    model, prompts = tiny_model(), tiny_ids(2, 6).tolist()
    policy = SkipPolicy("batch", 0.5)
    end = generate(model, prompts, 1, policy).tokens[0][0]       # the first token of the first answer shall end it
    result = generate(model, prompts, 6, policy, eos_ids={end})
    alone = result.ran[1][len(prompts[1]):]                      # shares of the branches that ran, token by token
    assert len(result.tokens[0]) == 1 and alone, "the second answer never was alone"
    assert alone == [1.0] * len(alone)
