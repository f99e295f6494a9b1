"""What each exercise is held to: the right answer, inputs from easy to odd, and mistakes that are easily made.

The right answer is the project's own function wherever it has one. A mistake is a function too, that makes it: if on
the first wrong input it returns what the student's function returned, that is what the student is told.

Shapes: as in exercises.py.
"""
import math
from dataclasses import dataclass
from typing import Callable

import torch

from gates import Gate, GateConfig, budget_at, keep_highest, quantile_threshold, select_tokens, sparsity_loss
from price import RunningQuantile
from thresholds import frozen_threshold


@dataclass
class Check:
    right: Callable             # its parameters are named in what a student reads
    cases: list                 # (arguments, what is special about them), in the order in which they are tried
    mistakes: dict              # what it looks like -> a function that makes it


def t(*values):
    return torch.tensor(values, dtype=torch.float64)


def mask(*values):
    return torch.tensor(values, dtype=torch.bool)


def draw(*shape, seed=0):
    """Random numbers from 0 to 1, always the same, with few digits, so that they can be read."""
    numbers = torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (numbers * 1000).round() / 1000


def gate_of(x, weight, bias):
    """gate_and_score by the project's Gate."""
    gate = Gate(GateConfig(form="scalar" if len(weight) == 1 else "vector"), x.shape[1]).double()
    gate.out.weight.data, gate.out.bias.data = weight, bias
    return tuple(value.detach()[0] for value in gate(x[None]))


def gate_like(g, score=lambda g: g.mean(-1)):
    """gate_and_score with the mistakes g(z, x, weight, bias) and score(g); z is W_G x + b_G."""
    def mistake(x, weight, bias):
        made = g(x @ weight.T + bias, x, weight, bias)
        return made, score(made)
    return mistake


def sigmoid(z, *_):
    return torch.sigmoid(z)


def quantile(v, q, minus=1, rounded=True, ordered=True, beyond=True):
    """Algorithm 3 with its mistakes: n for n - 1, no rounding of pos, no sorting, s[n] asked for."""
    s, pos = v.sort().values if ordered else v, q * (len(v) - minus)
    pos = round(pos) if rounded and abs(pos - round(pos)) < 1e-9 else pos
    i, alpha = int(pos), pos - int(pos)
    return (1 - alpha) * s[i] + alpha * s[i + 1] if beyond or alpha else s[i]


def neighbour(v, q, down=True):
    """One of the two neighbours in place of the line between them."""
    pos = q * (len(v) - 1)
    return v.sort().values[math.floor(pos) if down else math.ceil(pos)]


def select(scores, budget, valid, at_one=True, somebody=True, ties=False, ranked=None, q=None, by=quantile_threshold):
    """select_tokens with its mistakes, switch by switch."""
    if at_one and budget >= 1 or not valid.any():
        return valid
    tau = by(scores[valid if ranked is None else ranked], 1 - budget if q is None else q)
    keep = valid & (scores >= tau if ties else scores > tau)
    return valid & (scores == scores[valid].max()) if somebody and not keep.any() else keep


def rows_apart(scores, budget, valid):
    return torch.cat([select(s[None], budget, v[None]) for s, v in zip(scores, valid)])


def padding_kept(scores, budget, valid):
    return torch.ones_like(valid) if budget >= 1 else scores > quantile_threshold(scores[valid], 1 - budget)


def residual(h, g, o, keep):
    return torch.where(keep[:, None], h + g * o, h)


def residual_like(kept, skipped=lambda h, g, o: h):
    return lambda h, g, o, keep: torch.where(keep[:, None], kept(h, g, o), skipped(h, g, o))


def copied(keep, at_zero=0, far=True):
    """kv_source; with its mistakes: what lies under layer 0, and one layer down only."""
    source = [torch.where(keep[0], 0, torch.tensor(at_zero))]
    for layer in range(1, len(keep)):
        source.append(torch.where(keep[layer], layer, source[-1] if far else torch.tensor(layer - 1)))
    return torch.stack(source)                                   # (L, S)


def loss(kind):
    """The project's sparsity loss of one sequence: gates (N, S, H), valid (S,)."""
    return lambda gates, valid, budget=1.0: sparsity_loss([g[None] for g in gates], valid[None], kind, budget)


def kl(m, budget, low=1e-6, least=0.01, backwards=False):
    """KL(m || budget) of each m, both moved away from 0 and 1."""
    m, b = m.clamp(low, 1 - low), torch.as_tensor(budget, dtype=m.dtype).clamp(least, 1 - least)
    m, b = (b, m) if backwards else (m, b)
    return m * (m / b).log() + (1 - m) * ((1 - m) / (1 - b)).log()


def means(gates, valid):
    return gates[:, valid].mean((1, 2))                          # (N,)


def attention(hidden, heads, kv_heads, head_dim, keys, tokens, kept, gate, looks=2, out=2, pair=2, kv=None, gated=None,
              wide=None, look=None):
    """attention_macs; with its mistakes: products left out, K and V or the gate for the wrong tokens, another width of
    W_q and W_o, other numbers per key."""
    width = heads * head_dim
    q, k = hidden * (wide or width), hidden * kv_heads * head_dim
    return (kept * (out * q + looks * (look or width) * keys) + (kept if kv is None else kv) * pair * k
            + (tokens if gated is None else gated) * hidden * gate)


def mlp(hidden, inner, tokens, kept, gate, matrices=3, gated=None):
    return kept * matrices * hidden * inner + (tokens if gated is None else gated) * hidden * gate


def share(scores, cut):
    return (scores <= cut).double().mean()


def freeze(scores, q, pick=min, tie=1e-6, end=1e-4, below_by=torch.max, above_by=torch.min, shares=(share, share)):
    """frozen_threshold with its mistakes: the wrong one of the two cuts, another tie, another way out at the ends, a
    neighbour that is none, other shares of low and high."""
    tau = quantile_threshold(scores, q)
    tied = scores[(scores - tau).abs() <= tie]
    low, high = (tied.min(), tied.max()) if len(tied) else (tau, tau)
    below, above = scores[scores < low], scores[scores > high]
    if not len(tied):
        return (below.max() + above.min()) / 2
    cuts = ((below_by(below) + low) / 2 if len(below) else low - end,
            (above_by(above) + high) / 2 if len(above) else high + end)
    return pick(cuts, key=lambda cut: abs(shares[cut > tau](scores, cut) - q))


def quantile_step(old, scores, costs, valid, points, mix=0.9, equal=False, free=False, ordered=True):
    """update_quantile; with its mistakes: the mixture, equal weights, branches that cost nothing among the others,
    weights that stay where they were when the scores are sorted."""
    weights = costs[:, None] * valid                             # (N, S)
    counted = valid.expand_as(weights) if free else weights > 0
    s, order = scores[counted].sort()
    each = (torch.ones_like(weights) if equal else weights)[counted]
    total = (each[order] if ordered else each).cumsum(0)
    wanted = torch.linspace(0, 1, points, dtype=total.dtype) * total[-1]
    new = s[torch.searchsorted(total, wanted).clamp(max=len(s) - 1)]
    return new if old is None else mix * old + (1 - mix) * new


def running(old, scores, costs, valid, points):
    """update_quantile: at its 101 points by the project's RunningQuantile."""
    if points != 101:
        return quantile_step(old, scores, costs, valid, points)
    project = RunningQuantile(costs.tolist(), old)
    project.update(scores, valid)
    return project.points


def straight(old, scores, costs, valid, points):
    """The plain quantile of Algorithm 3 in place of the weighted one."""
    pool = scores[(costs[:, None] * valid) > 0]
    new = torch.stack([quantile_threshold(pool, k / (points - 1)) for k in range(points)])
    return new if old is None else 0.9 * old + 0.1 * new


def speculate(p, q, token, u, accepts=lambda p, q, u: u < p / q, left=lambda p, q: (p - q).clamp(min=0),
              divided=True, empty=lambda p: p):
    """accept_draft, the rule of Leviathan et al.; with its mistakes."""
    rest = left(p, q)
    if rest.sum() == 0:
        rest = empty(p)
    return bool(accepts(p[token], q[token], u)), rest / rest.sum() if divided else rest


FOUR = t(0.61, 0.70, 0.64, 0.75)
EIGHT = t(0.1, 0.2, 0.3, 0.5, 0.5, 0.5, 0.8, 0.9)
THREE = (t([1.0, 2.0], [3.0, 4.0], [5.0, 6.0]), t([0.5, 0.25], [0.9, 0.8], [0.7, 0.6]),
         t([2.0, 4.0], [1.0, 1.0], [3.0, 5.0]))                  # h, g, o of three tokens: (3, 2) each
GATES = t([[0.2, 0.4], [0.6, 0.8]], [[0.5, 0.7], [0.9, 0.1]])                                    # (2, 2, 2)
PADDED = torch.cat([GATES, torch.full((2, 1, 2), 0.95, dtype=torch.float64)], 1)                 # (2, 3, 2)
LOSS_CASES = [((GATES, mask(True, True)), ""), ((PADDED, mask(True, True, False)), "the last token is padding"),
              ((draw(3, 6, 4), mask(True, False, True, True, True, False)), "")]
# mistakes of several exercises
PADDING = "padding counted: only valid tokens are"
ZEROS = "padding counted as zeros: divide by the number of valid tokens"
SUMMED = "a sum over the branches: it is a mean over them"
TOTAL = "a sum over everything: it is a mean"
GATE_OF_KEPT = "a gate for kept tokens only: it decides who is kept, so it runs for every token"
NO_GATE = "the gate forgotten"
EVERYONE = "all tokens run the branch: only those that are kept do"
ONE_TOKEN = "the work of one token: there are several"
FLOPS = "FLOPs: a multiply-accumulate counts once, not twice"

CHECKS = {
    "gate_and_score": Check(
        gate_of,
        [((t([math.log(3), 5.0]), t([1.0, 0.0], [-1.0, 0.0]), t(0.0, 0.0)), ""),
         ((t([1.0, 2.0], [0.0, -1.0], [3.0, 0.5]), t([0.5, -1.0], [2.0, 0.3]), t(0.1, -0.2)), ""),
         ((t([1.0, 2.0], [0.0, -1.0], [3.0, 0.5]), t([0.5, -1.0]), t(5.0)), "a scalar gate: one value per token"),
         ((draw(4, 3) * 4 - 2, draw(3, 3, seed=1) * 2 - 1, draw(3, seed=2)), "")],
        {"the bias b_G is missing": gate_like(lambda z, x, w, b: sigmoid(x @ w.T)),
         "W_G transposed: W_G x_i for all tokens at once is x @ weight.T": gate_like(
             lambda z, x, w, b: sigmoid(x @ w + b)),
         "a softmax over the channels: each channel has a sigmoid of its own": gate_like(
             lambda z, *_: z.softmax(-1)),
         "the sigmoid is missing": gate_like(lambda z, *_: z),
         "a mean over the tokens: a score is the mean over the channels of one token": gate_like(
             sigmoid, lambda g: g.mean(0)),
         "one score for all tokens: each token has its own": gate_like(sigmoid, lambda g: g.mean()),
         "a sum over the channels: a score is their mean": gate_like(sigmoid, lambda g: g.sum(-1)),
         "the mean taken before the sigmoid": gate_like(sigmoid, lambda g: g.logit().mean(-1).sigmoid())}),

    "quantile_threshold": Check(
        lambda v, q: quantile_threshold(v, q),
        [((FOUR, 0.5), "pos = 1.5"), ((FOUR, 0.2), "pos = 0.6"), ((t(0.3, 0.1, 0.2), 0.5), "pos = 1: alpha is 0"),
         ((FOUR, 0.0), "the smallest"), ((FOUR, 1.0), "the largest: there is no s[i+1]"),
         ((t(0.4), 0.3), "one score"), ((t(0.4, 0.4, 0.4), 0.3), "all equal"), ((draw(11), 0.85), "")],
        {"s[i] alone: tau lies on the straight line from s[i] to s[i+1]": neighbour,
         "s[i+1] alone: tau lies on the straight line from s[i] to s[i+1]": lambda v, q: neighbour(v, q, False),
         "the middle of s[i] and s[i+1], whatever alpha is": lambda v, q: (
             (neighbour(v, q) + neighbour(v, q, False)) / 2),
         "alpha and 1 - alpha exchanged": lambda v, q: (
             neighbour(v, q) + neighbour(v, q, False) - quantile_threshold(v, q)),
         "v not sorted": lambda v, q: quantile(v, q, ordered=False, beyond=False),
         "sorted with the largest first: it is the smallest": lambda v, q: quantile_threshold(v, 1 - q),
         "pos = q * n: it is q * (n - 1)": lambda v, q: quantile(v, q, 0, beyond=False),
         "s[i+1] asked for where there is none: at alpha = 0 it is not needed": quantile,
         "s[int(q * n)]: there is a straight line between s[i] and s[i+1], and pos is q * (n - 1)":
             lambda v, q: v.sort().values[min(int(q * len(v)), len(v) - 1)]}),

    "select_tokens": Check(
        select_tokens,
        [((FOUR[None], 0.5, mask([True] * 4)), "tau = 0.67"), ((FOUR[None], 0.75, mask([True] * 4)), "tau = 0.6325"),
         ((t([0.1, 0.5, 0.5, 0.9, 0.9]), 0.5, mask([True] * 5)), "tau = 0.5, which two tokens have"),
         ((t([0.2, 0.4], [0.6, 0.8]), 0.5, mask([True] * 2, [True] * 2)), "tau = 0.5 for all four tokens"),
         ((t([0.1, 0.2, 0.3, 0.9, 0.95]), 0.5, mask([True, True, True, False, False])), "the last two are padding"),
         ((t([0.01, 0.0, 0.5, 0.6, 0.7]), 0.75, mask([False, False, True, True, True])), "the first two are padding"),
         ((t([0.61, 0.70, 0.64]), 1.0, mask([True, True, False])), "budget 1 keeps every valid token"),
         ((t([0.7, 0.2]), 0.5, mask([True, False])), "a lone valid token is kept"),
         ((t([0.4, 0.4, 0.4]), 0.8, mask([True] * 3)), "all scores are equal: all are kept"),
         ((t([0.1, 0.9, 0.9]), 0.1, mask([True] * 3)), "tau is the largest score: those that have it are kept"),
         ((t([0.9, 0.4], [0.9, 0.4]), 0.5, mask([False, True], [False, True])), "equal scores, and higher padding"),
         ((t([0.3, 0.4]), 0.5, mask([False, False])), "no token is valid: nobody is kept"),
         ((t([0.1, 0.0, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]), 0.8, mask([True] * 11)),
          "tau = 0.2: (1 - 0.8) * 10 is to be 2"),
         ((draw(2, 5), 0.7, mask([True] * 5, [False, True, True, True, True])), "")],
        {"`<` in place of `<=`: a token whose score equals tau is skipped": lambda *a: select(*a, ties=True),
         "no exception at budget 1: there tau is the lowest score, which `<=` skips": lambda *a: select(
             *a, at_one=False),
         "the rule as printed, without the exceptions": lambda *a: select(*a, at_one=False, somebody=False),
         "nobody left: where the rule keeps nobody, those with the largest score are kept": lambda *a: select(
             *a, somebody=False),
         "padding ranked with the valid tokens": lambda s, b, v: select(s, b, v, ranked=torch.ones_like(v)),
         "padding kept: only valid tokens are": padding_kept,
         "the quantile of the budget: it is that of 1 - budget": lambda s, b, v: select(s, b, v, q=b),
         "a quantile for each sequence: there is one for all valid tokens": rows_apart,
         "the mask of the skipped tokens: True is kept": lambda s, b, v: v & ~select(s, b, v),
         "the share `budget` of the tokens, counted: eq. 6 compares with a quantile":
             lambda s, b, v: keep_highest(s, math.ceil(b * v.sum() - 1e-9), v),
         "the share `budget` of the tokens, counted and rounded: eq. 6 compares with a quantile":
             lambda s, b, v: keep_highest(s, round(b * int(v.sum())), v),
         "the share `budget` of the tokens, counted and rounded down: eq. 6 compares with a quantile":
             lambda s, b, v: keep_highest(s, int(b * int(v.sum())), v),
         "pos = (1 - 0.8) * 10 left at 1.9999999999999996: see quantile_threshold": lambda *a: select(
             *a, by=lambda v, q: quantile(v, q, rounded=False, beyond=False))}),

    "gated_residual": Check(
        residual,
        [(THREE + (mask(True, True, True),), ""), (THREE + (mask(True, False, True),), ""),
         ((t([1.0, 2.0], [3.0, 4.0]), t([0.5], [0.9]), t([2.0, 4.0], [1.0, 1.0]), mask(True, False)), "a scalar gate"),
         ((t([1.0, 2.0], [3.0, 4.0]), t([0.5, 0.25], [0.9, 0.8]), t([2.0, 4.0], [math.nan] * 2), mask(True, False)),
          "the skipped token's o is NaN"),
         ((t([1.0], [3.0]), t([0.5], [0.9]), t([2.0], [math.inf]), mask(True, False)), "")],
        {"a product with the mask: 0 * NaN is NaN, so choose with torch.where":
             lambda h, g, o, keep: h + keep[:, None] * g * o,
         "no gate: o is added as it is (eq. 1)": residual_like(lambda h, g, o: h + o),
         "h multiplied by the gate: only o is": residual_like(lambda h, g, o: g * (h + o)),
         "h lost where the token skips": residual_like(lambda h, g, o: h + g * o, lambda h, g, o: 0 * h),
         "the mask the wrong way round: True is kept": residual_like(lambda h, g, o: h, lambda h, g, o: h + g * o),
         "h weighed by 1 - g: the stream passes whole": residual_like(lambda h, g, o: (1 - g) * h + g * o),
         "g * o added for skipped tokens too": lambda h, g, o, keep: h + g * o,
         "h forgotten: g * o is added to it": residual_like(lambda h, g, o: g * o)}),

    "kv_source": Check(
        copied,
        [((mask([True, True], [True, False], [True, True]),), ""),
         ((mask([True], [False], [False], [True]),), "a run of two skips: both have what layer 0 made"),
         ((mask([True], [True], [False], [False]),), "a run of two skips: both have what layer 1 made"),
         ((mask([False, True], [True, False], [False, False]),), "layer 0 makes K and V, skipped or not"),
         ((mask([False], [False], [False]),), "skipped everywhere"), ((mask([False, True]),), "one layer"),
         ((draw(5, 4) > 0.55,), "")],
        {"one layer down only: in a run of skips the layer below has copied too": lambda k: copied(k, far=False),
         "cache[layer - 1] at layer 0, which is the last layer: layer 0 makes its own": lambda k: copied(
             k, at_zero=len(k) - 1),
         "-1 under layer 0: it makes its own": lambda k: copied(k, at_zero=-1),
         "the mask the wrong way round: True ran the attention": lambda k: copied(~k),
         "copied along the tokens: the copies go up, from layer to layer": lambda k: (
             torch.where(k, torch.arange(len(k))[:, None], 0).cummax(1).values),
         "no copy: a token that skips makes neither key nor value": lambda k: (
             torch.arange(len(k))[:, None].expand(k.shape)),
         "copied down from the layers above": lambda k: len(k) - 1 - copied(k.flip(0)).flip(0),
         "layer 0 for every skipped token: it is the nearest layer below that ran": lambda k: (
             torch.where(k, torch.arange(len(k))[:, None], 0))}),

    "budget_at": Check(
        budget_at,
        [((0, 11, 1.0, 0.8), "the first step"), ((10, 11, 1.0, 0.8), "the last step"), ((5, 11, 1.0, 0.8), "half-way"),
         ((3, 5, 0.9, 0.5), ""), ((0, 1, 1.0, 0.8), "a training of one step"), ((1, 3, 0.5, 1.0), "a rising budget")],
        {"t / T: it is (t - 1) / (T - 1)": lambda s, n, a, b: a - (a - b) * (s + 1) / n,
         "step / total: the last step is total - 1": lambda s, n, a, b: a - (a - b) * s / n,
         "step taken for t: t is step + 1": lambda s, n, a, b: a - (a - b) * (s - 1) / (n - 1) if n > 1 else b,
         "t / (T - 1): it is (t - 1) / (T - 1)": lambda s, n, a, b: a - (a - b) * (s + 1) / (n - 1) if n > 1 else b,
         "start and end exchanged": lambda s, n, a, b: b - (b - a) * s / (n - 1) if n > 1 else a,
         "a division by total - 1 = 0: one step alone has budget end": lambda s, n, a, b: a - (a - b) * s / (n - 1),
         "start: one step alone has budget end": lambda s, n, a, b: a - (a - b) * s / max(n - 1, 1)}),

    "sparsity_l1": Check(
        lambda gates, valid: loss("l1")(gates, valid), LOSS_CASES,
        {PADDING: lambda g, v: g.mean(), ZEROS: lambda g, v: (g * v[:, None]).mean(),
         SUMMED: lambda g, v: means(g, v).sum(), TOTAL: lambda g, v: g[:, v].sum(),
         "g squared: |g| is not": lambda g, v: g[:, v].pow(2).mean(),
         "a sum over the channels: it is a mean over them": lambda g, v: g[:, v].sum(-1).mean()}),

    "sparsity_l2": Check(
        lambda gates, valid: loss("l2")(gates, valid), LOSS_CASES,
        {PADDING: lambda g, v: g.pow(2).mean(), ZEROS: lambda g, v: (g * v[:, None]).pow(2).mean(),
         SUMMED: lambda g, v: means(g.pow(2), v).sum(), TOTAL: lambda g, v: g[:, v].pow(2).sum(),
         "the mean squared: square first": lambda g, v: g[:, v].mean() ** 2,
         "each token's score squared: square each channel": lambda g, v: g[:, v].mean(-1).pow(2).mean(),
         "a root taken: g^2 has none": lambda g, v: g[:, v].pow(2).mean().sqrt(),
         "g not squared": lambda g, v: g[:, v].mean()}),

    "sparsity_l2_norm": Check(
        lambda gates, valid: loss("l2_norm")(gates, valid), LOSS_CASES,
        {PADDING: lambda g, v: g.pow(2).mean(1).sqrt().mean(),
         "padding counted as zeros: divide by the square root of the number of valid tokens": lambda g, v: (
             (g * v[:, None]).pow(2).mean(1).sqrt().mean()),
         SUMMED: lambda g, v: g[:, v].pow(2).mean(1).sqrt().mean(-1).sum(),
         "no division by sqrt(n)": lambda g, v: g[:, v].norm(dim=1).mean(),
         "a division by n: it is by sqrt(n)": lambda g, v: g[:, v].norm(dim=1).mean() / v.sum(),
         "a norm over the channels: it is over the tokens": lambda g, v: g[:, v].pow(2).mean(2).sqrt().mean(),
         "one norm over tokens and channels: each channel has its own": lambda g, v: means(g.pow(2), v).sqrt().mean(),
         "no root taken: a norm has one": lambda g, v: g[:, v].pow(2).mean()}),

    "sparsity_kl": Check(
        lambda gates, valid, budget: loss("kl")(gates, valid, budget),
        [((GATES, mask(True, True), 0.8), ""), ((PADDED, mask(True, True, False), 0.6), "the last token is padding"),
         ((GATES, mask(True, True), 1.0), "budget 1 is moved to 0.99"),
         ((torch.ones_like(GATES), mask(True, True), 0.8), "a mean gate of 1 is moved to 1 - 1e-6"),
         ((draw(3, 6, 4), mask(True, False, True, True, True, False), 0.7), "")],
        {PADDING: lambda g, v, b: kl(g.mean((1, 2)), b).sum(),
         ZEROS: lambda g, v, b: kl((g * v[:, None]).mean((1, 2)), b).sum(),
         "the two exchanged: m_l comes first": lambda g, v, b: kl(means(g, v), b, backwards=True).sum(),
         "a mean over the branches: here it is a sum": lambda g, v, b: kl(means(g, v), b).mean(),
         "one mean over all branches: each branch has its own m_l": lambda g, v, b: kl(g[:, v].mean(), b),
         "a KL for each gate value, and then the mean: the mean m_l comes first": lambda g, v, b: (
             kl(g[:, v], b).mean((1, 2)).sum()),
         "logarithms to base 2": lambda g, v, b: kl(means(g, v), b).sum() / math.log(2),
         "the second term forgotten": lambda g, v, b: (means(g, v) * (means(g, v) / b).log()).sum(),
         "budget 1 as it is: that divides by 1 - 1": lambda g, v, b: kl(means(g, v), b, least=0.0).sum(),
         "the budget moved into [1e-6, 1 - 1e-6]: it is [0.01, 0.99]": lambda g, v, b: (
             kl(means(g, v), b, least=1e-6).sum()),
         "every m_l moved into [0.01, 0.99]: it is [1e-6, 1 - 1e-6]": lambda g, v, b: (
             kl(means(g, v), b, low=0.01).sum()),
         "a mean gate of 1 as it is: 0 * log(0) is NaN": lambda g, v, b: kl(means(g, v), b, low=0.0).sum()}),

    "attention_macs": Check(
        attention,
        [((24, 6, 2, 4, 0, 1, 1, 0), "W_q and W_o take 24 x 24, W_k and W_v 24 x 8; no keys"),
         ((24, 6, 2, 4, 10, 1, 1, 0), "10 keys"), ((20, 6, 2, 4, 0, 1, 1, 0), "hidden is not heads * head_dim"),
         ((20, 6, 2, 4, 10, 1, 1, 0), "hidden is not heads * head_dim"), ((24, 6, 2, 4, 10, 5, 3, 0), "3 of 5 tokens"),
         ((24, 6, 2, 4, 10, 5, 3, 24), "a vector gate"), ((24, 6, 2, 4, 10, 5, 0, 1), "nobody is kept"),
         ((2048, 32, 8, 64, 512, 100, 85, 2048), "Llama-3.2-1B")],
        {"as many key-value heads as heads: W_k and W_v have kv_heads * head_dim columns":
             lambda h, a, k, d, n, *rest: attention(h, a, a, d, n, *rest),
         "W_q or W_o forgotten": lambda *a: attention(*a, out=1),
         "W_k or W_v forgotten": lambda *a: attention(*a, pair=1),
         "W_q and W_o of hidden x hidden: they have heads * head_dim on one side": lambda *a: attention(*a, wide=a[0]),
         "hidden numbers for each key: they are heads * head_dim": lambda *a: attention(*a, look=a[0]),
         "hidden taken for heads * head_dim": lambda *a: attention(*a, wide=a[0], look=a[0]),
         "head_dim forgotten in the products with keys and values": lambda *a: attention(*a, look=a[1]),
         "the products of one head with keys and values: every head has its own": lambda *a: attention(*a, look=a[3]),
         "the products with the keys or the sum of the values forgotten": lambda *a: attention(*a, looks=1),
         "no work for the keys and values looked at": lambda *a: attention(*a, looks=0),
         "only kv_heads look at the keys: every head does": lambda h, a, k, d, n, t, kept, g: (
             attention(h, a, k, d, 0, t, kept, g) + kept * 2 * k * d * n),
         GATE_OF_KEPT: lambda *a: attention(*a, gated=a[6]), NO_GATE: lambda *a: attention(*a, gated=0),
         "K and V made by skipped tokens too: theirs are copied": lambda *a: attention(*a, kv=a[5]),
         EVERYONE: lambda h, a, k, d, n, t, kept, g: attention(h, a, k, d, n, t, t, g),
         ONE_TOKEN: lambda h, a, k, d, n, t, kept, g: attention(h, a, k, d, n, 1, 1, g),
         FLOPS: lambda *a: 2 * attention(*a)}),

    "mlp_macs": Check(
        mlp,
        [((8, 20, 1, 1, 0), ""), ((8, 20, 5, 3, 0), "3 of 5 tokens"), ((8, 20, 5, 3, 8), "a vector gate"),
         ((8, 20, 5, 0, 1), "nobody is kept"), ((2048, 8192, 100, 85, 2048), "Llama-3.2-1B")],
        {"two matrices: SwiGLU has three": lambda *a: mlp(*a, matrices=2),
         GATE_OF_KEPT: lambda *a: mlp(*a, gated=a[3]), NO_GATE: lambda *a: mlp(*a, gated=0),
         EVERYONE: lambda h, i, t, kept, g: mlp(h, i, t, t, g), ONE_TOKEN: lambda h, i, t, kept, g: mlp(h, i, 1, 1, g),
         FLOPS: lambda *a: 2 * mlp(*a)}),

    "frozen_threshold": Check(
        frozen_threshold,
        [((FOUR, 0.5), "tau = 0.67 lies between 0.64 and 0.70"), ((FOUR, 0.4), "tau = 0.652 lies in the same gap"),
         ((t(0.1, 0.4, 0.4, 0.4, 0.4, 0.8), 0.3), "tau = 0.4 is a tie; low skips 1/6, high 5/6"),
         ((t(0.1, 0.4, 0.4, 0.4, 0.4, 0.8), 0.6), "tau = 0.4 is a tie; low skips 1/6, high 5/6"),
         ((EIGHT, 0.45), "tau = 0.5 is a tie; low skips 3/8, high 6/8"),
         ((EIGHT, 0.7), "tau = 0.5 is a tie; low skips 3/8, high 6/8"),
         ((t(0.1, 0.4, 0.4, 0.8), 0.5), "tau = 0.4 is a tie; low skips 1/4, high 3/4: both are as near to q"),
         ((t(0.3, 0.5, 0.9), 0.0), "tau is the smallest score"), ((t(0.3, 0.5, 0.9), 1.0), "tau is the largest score"),
         ((t(0.4, 0.4, 0.4), 0.2), "all scores are equal; low skips nobody, high all"),
         ((t(0.4, 0.4, 0.4), 0.8), "all scores are equal; low skips nobody, high all"),
         ((t(0.1, 0.4, 0.4 + 3e-7, 0.8), 0.6), "two scores 3e-7 apart are tied"),
         ((t(0.1, 0.4, 0.40001, 0.8), 0.5), "tau is 5e-6 from its neighbours: nothing is tied"),
         ((t(0.8, 0.2, 0.2, 0.6), 0.4), ""), ((draw(9), 0.7), "")],
        {"the quantile itself: it may lie on a score": quantile_threshold,
         "always low, whichever share is nearer to q": lambda s, q: freeze(s, q, lambda cuts, key: cuts[0]),
         "always high, whichever share is nearer to q": lambda s, q: freeze(s, q, lambda cuts, key: cuts[1]),
         "the cut whose share is farther from q": lambda s, q: freeze(s, q, max),
         "the cut that lies nearer to tau: its share is to be nearer to q": lambda s, q: freeze(
             s, q, lambda cuts, key: min(cuts, key=lambda cut: abs(cut - quantile_threshold(s, q)))),
         "a quantile moved by 1e-4: a threshold lies in the middle of a gap": lambda s, q: (
             quantile_threshold(s, q) + 1e-4),
         "high, where both shares are as near to q: low then": lambda s, q: freeze(
             s, q, lambda cuts, key: min(cuts[::-1], key=key)),
         "the share above the cut: it is that of the scores <= cut": lambda s, q: freeze(
             s, q, shares=(lambda *a: 1 - share(*a),) * 2),
         "the share above low: it is that of the scores <= low": lambda s, q: freeze(
             s, q, shares=(lambda *a: 1 - share(*a), share)),
         "low drawn to the smallest score of all: it is the middle to the next smaller": lambda s, q: freeze(
             s, q, below_by=torch.min),
         "high drawn to the largest score of all: it is the middle to the next larger": lambda s, q: freeze(
             s, q, above_by=torch.max),
         "infinity beyond the ends: it is 1e-4 from the last score": lambda s, q: freeze(s, q, end=math.inf),
         "1e-6 beyond the ends: it is 1e-4 from the last score": lambda s, q: freeze(s, q, end=1e-6),
         "only equal scores tied: those within 1e-6 of tau are": lambda s, q: freeze(s, q, tie=0.0),
         "scores within 1e-4 of tau tied: those within 1e-6 are": lambda s, q: freeze(s, q, tie=1e-4)}),

    "update_quantile": Check(
        running,
        [((None, t([0.4, 0.1, 0.3, 0.2]), t(1.0), mask(True, True, True, True), 5), ""),
         ((None, t([0.4, 0.1], [0.2, 0.3]), t(0.5, 1.5), mask(True, True), 5),
          "0.1, 0.2, 0.3 and 0.4 weigh 0.5, 1.5, 1.5 and 0.5"),
         ((None, t([0.5, 0.7, 0.6], [0.1, 0.2, 0.3]), t(2.0, 0.0), mask(True, True, True), 3),
          "the second branch costs nothing: its scores are left out"),
         ((None, t([0.5, 0.7, 0.1, 0.9]), t(1.0), mask(True, True, False, False), 3), "the last two are padding"),
         ((t(0.0, 0.5, 1.0), t([0.4, 0.6, 0.2]), t(1.0), mask(True, True, True), 3), "not the first step"),
         ((draw(101).sort().values, draw(4, 7, seed=3), t(0.53, 1.49, 0.0, 1.97), mask(True, True, False, *[True] * 4),
           101), "the costs have more digits than float32 holds")],
        {"scores that all weigh the same: each weighs the cost of its branch": lambda *a: quantile_step(*a, equal=True),
         "weights left unsorted: each goes with its score": lambda *a: quantile_step(*a, ordered=False),
         "padding among the scores": lambda old, s, c, v, n: quantile_step(old, s, c, torch.ones_like(v), n),
         "a branch that costs nothing among the scores": lambda *a: quantile_step(*a, free=True),
         "0.1 * old + 0.9 * new: it is 0.9 * old + 0.1 * new": lambda *a: quantile_step(*a, mix=0.1),
         "old forgotten": lambda old, *a: quantile_step(None, *a),
         "new forgotten": lambda old, *a: quantile_step(None, *a) if old is None else old,
         "a straight line between two scores: a point is always one of them": straight,
         "0.1 * new in the first step: there it is new itself": lambda old, s, c, v, n: quantile_step(
             torch.zeros(n, dtype=s.dtype) if old is None else old, s, c, v, n)}),

    "accept_draft": Check(
        lambda p, q, token, u: speculate(p, q, token, u),
        [((t(0.5, 0.3, 0.2), t(0.2, 0.3, 0.5), 2, 0.3), "p / q = 0.4"),
         ((t(0.5, 0.3, 0.2), t(0.2, 0.3, 0.5), 2, 0.6), "p / q = 0.4"),
         ((t(0.5, 0.3, 0.2), t(0.2, 0.3, 0.5), 0, 0.9), "p / q = 2.5: always accepted"),
         ((t(0.1, 0.4, 0.3, 0.2), t(0.4, 0.1, 0.1, 0.4), 0, 0.2), "p / q = 0.25"),
         ((t(0.6, 0.4, 0.0), t(0.1, 0.3, 0.6), 2, 0.0), "p is 0: never accepted"),
         ((t(0.5, 0.5), t(0.5, 0.5), 1, 0.99), "p equals q: rest is p")],
        {"q / p: it is p / q": lambda *a: speculate(*a, accepts=lambda p, q, u: u < q / p),
         "u > p / q: a token is accepted where u < p / q": lambda *a: speculate(
             *a, accepts=lambda p, q, u: u > p / q),
         "u <= p / q: at p = 0 and u = 0 that accepts what must never come": lambda *a: speculate(
             *a, accepts=lambda p, q, u: u <= p / q),
         "accepted wherever p >= q, and only there": lambda *a: speculate(*a, accepts=lambda p, q, u: p >= q),
         "u < p: it is compared with p / q": lambda *a: speculate(*a, accepts=lambda p, q, u: u < p),
         "rest = p: what the cheap model draws often enough must be left out": lambda *a: speculate(
             *a, left=lambda p, q: p),
         "|p - q|: below 0 it is 0": lambda *a: speculate(*a, left=lambda p, q: (p - q).abs()),
         "q - p: it is p - q": lambda *a: speculate(*a, left=lambda p, q: (q - p).clamp(min=0)),
         "rest not divided by its sum": lambda *a: speculate(*a, divided=False),
         "0 / 0 where p equals q: there rest is p": lambda *a: speculate(*a, empty=lambda p: 0 * p),
         "nothing left where p equals q: there rest is p": lambda *a: speculate(
             *a, divided=(a[0] != a[1]).any(), empty=lambda p: 0 * p)}),
}
