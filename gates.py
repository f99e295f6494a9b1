"""GateSkip in one file: gate, threshold, selection, budget, loss, calibration, what a skip saves.

"What Layers When: Learning to Skip Compute in LLMs with Residual Gates", arXiv 2510.13876.
A decoder with L layers has 2L residual branches, numbered attn 0, mlp 0, attn 1, mlp 1, ...
In every mask True means kept and False means skipped.

Shapes: B batch, S sequence, H hidden, L layers.
"""
import random
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn


class InputError(ValueError):
    """A mistake of the user's, told in one line with the way out; the command lines print no traceback for it."""


def check_budget(budget):
    """Return budget as a float in (0, 1]; InputError otherwise (NaN included)."""
    budget = float(budget)
    if not 0.0 < budget <= 1.0:
        raise InputError(f"budget {budget} is outside (0, 1]: it is the share of tokens a branch keeps, for example 0.85")
    return budget


class Linear(nn.Linear):
    """x W^T + b, (..., in) -> (..., out). Construction draws no weights: init_weights or a checkpoint fills them.

    Without gradients on a CPU large products are oneDNN's: float32 like PyTorch's default, but 1.3 to 3 times as fast for
    the few rows that skipping leaves (NOTES.md). Below 2^16 weights its 15 us per call would outweigh that.
    """

    def reset_parameters(self):
        pass

    def forward(self, x):
        if (x.device.type == "cpu" and x.dtype == torch.float32 and self.weight.numel() >= 2 ** 16
                and not torch.is_grad_enabled() and torch.backends.mkldnn.is_available()):
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return F.linear(x, self.weight, self.bias)


# ---------------------------------------------------------------------------------------------------------------------
# The gate: equation 2 and section 3.4
# ---------------------------------------------------------------------------------------------------------------------

FORMS, ARCHS = ("vector", "scalar"), ("linear", "mlp", "lowrank")


@dataclass
class GateConfig:
    """What a gate looks like. Saved in config.json["gateskip"]["gate"]."""
    form: str = "vector"        # "vector": one value per channel (the paper) | "scalar": one per token
    arch: str = "linear"        # "linear" (the paper) | "mlp": H -> 2H -> out | "lowrank" (ours): W_G = U V
    rank: int = 0               # of "lowrank"; 0 means 16 where H >= 1024 and H / 16 below
    shared: bool = False        # one attention gate and one MLP gate for all layers
    input: str = "normed"       # what the gate reads: "normed" (what the branch reads) | "residual" (eq. 2 literally)
    placement: str = "after"    # the gate multiplies the branch's output | "before": its input (ablation)
    detach: bool = False        # True: no gradient into the backbone through the gate's input (the authors' code)

    def __post_init__(self):
        choices = {"form": FORMS, "arch": ARCHS,
                   "input": ("normed", "residual"), "placement": ("after", "before")}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise InputError(f"gate {name} {getattr(self, name)!r} is not one of {', '.join(allowed)}")
        if self.arch == "lowrank" and self.form == "scalar":
            raise InputError("a low-rank gate with a scalar output is a scalar gate with more parameters: use --gate-arch linear")
        if not 0 <= self.rank <= 65536:
            raise InputError(f"gate rank {self.rank} is not between 0 (the default rank) and 65536")

    def widths(self, hidden):
        """(inner width or 0, output width) of the gate on a model of width hidden."""
        out = hidden if self.form == "vector" else 1
        rank = self.rank or (16 if hidden >= 1024 else max(1, hidden // 16))
        return {"linear": 0, "mlp": 2 * hidden, "lowrank": rank}[self.arch], out

    def macs(self, hidden):
        """Multiply-accumulates of one gate for one token, kept or skipped: H^2, H, 2Hr, ..."""
        inner, out = self.widths(hidden)
        return inner * (hidden + out) if inner else hidden * out


class Gate(nn.Module):
    """g = sigmoid(W_G x + b_G) (eq. 2), and its mean over channels, the token's score.

    Parameters stay in float32 (or wider): scores differ in the third decimal, bfloat16 could not rank them.
    """

    def __init__(self, config, hidden):
        super().__init__()
        inner, out = config.widths(hidden)
        self.arch = config.arch
        self.inner = Linear(hidden, inner, bias=config.arch == "mlp") if inner else None
        self.out = Linear(inner or hidden, out)

    def forward(self, x):
        """x (B, S, H) -> gate (B, S, H) or (B, S, 1), scores (B, S); both in the gate's dtype."""
        x = x.to(self.out.weight.dtype)
        if self.inner is not None:
            x = self.inner(x)                                    # (B, S, inner)
            x = torch.relu(x) if self.arch == "mlp" else x
        g = torch.sigmoid(self.out(x))                           # (B, S, H) or (B, S, 1)
        return g, g.mean(-1)                                     # scores: the paper's g-bar, (B, S)

    @torch.no_grad()
    def init_weights(self, generator=None):
        """Section 3.4: weights Gaussian with std 0.01 and bias 5, so that a fresh gate is nearly open (0.993)."""
        std = 0.01
        if self.arch == "mlp":                                   # PyTorch's default for the first layer
            bound = self.inner.in_features ** -0.5
            self.inner.weight.uniform_(-bound, bound, generator=generator)
            self.inner.bias.uniform_(-bound, bound, generator=generator)
        elif self.arch == "lowrank":                             # U V x has the statistics of a full W_G x
            hidden, rank = self.inner.in_features, self.inner.out_features
            self.inner.weight.normal_(0, hidden ** -0.5, generator=generator)
            std = 0.01 * (hidden / rank) ** 0.5
        self.out.weight.normal_(0, std, generator=generator)
        self.out.bias.fill_(5.0)


# ---------------------------------------------------------------------------------------------------------------------
# Which tokens are kept: Algorithm 3, and lines 8-15 of Algorithm 1
# ---------------------------------------------------------------------------------------------------------------------

def quantile_threshold(scores, q, valid=None):
    """Algorithm 3: the q-quantile of the scores, interpolated linearly between order statistics.

    scores: any shape; q in [0, 1]; valid: bool of the same shape or None. Returns a float64 scalar tensor, equal to
    numpy.quantile(scores[valid], q, method="linear"). Everything stays on the device. Line 2 of the box (one score,
    or all equal: return it) needs no line of its own. ValueError if scores is empty or q outside [0, 1].
    """
    if scores.numel() == 0 or not 0.0 <= q <= 1.0:
        raise ValueError(f"quantile {q} of {scores.numel()} scores: needs at least one score and q in [0, 1]")
    v = scores.double().flatten()
    if valid is None:
        n = torch.tensor(v.numel(), device=v.device)
    else:
        v, n = v.masked_fill(~valid.flatten(), torch.inf), valid.sum()   # what is not valid sorts behind the n valid ones
    s = v.sort().values                                          # line 3
    pos = q * (n - 1).double()                                   # line 4
    pos = torch.where((pos - pos.round()).abs() < 1e-9, pos.round(), pos)   # 0.15 * 20 is 3, not 2.9999999999999996
    i = pos.floor().clamp(min=0).long()
    alpha = pos - i
    below, above = s.take(i), s.take(torch.minimum(i + 1, n - 1).clamp(min=0))   # at i = n-1 there is no s[i+1], and alpha is 0
    return torch.where(alpha > 0, below + alpha * (above - below), below)        # line 5; take: s[i] would go to the host


def select_tokens(scores, budget, valid=None):
    """Keep the tokens whose score lies above the (1 - budget)-quantile of all valid tokens (eq. 6).

    scores (B, S), valid (B, S) bool or None -> keep (B, S) bool. Of n distinct scores it skips
    floor((1 - budget)(n - 1)) + 1. Deviates from the printed `score <= tau` twice: budget 1 keeps every valid token
    (printed: drops the lowest), and where nothing would be kept (one token, or all scores equal) those with the largest
    score stay (printed: a single stream would never run a layer).
    """
    valid = torch.ones_like(scores, dtype=torch.bool) if valid is None else valid
    if check_budget(budget) >= 1.0 or scores.numel() == 0:
        return valid
    tau = quantile_threshold(scores, 1.0 - budget, valid)        # Algorithm 1 line 8, Algorithm 2 line 6
    keep = valid & (scores.double() > tau)                       # Algorithm 1 lines 9-15: g-bar <= tau is skipped
    largest = scores.masked_fill(~valid, -torch.inf).max()
    return torch.where(keep.any(), keep, valid & (scores == largest))


def keep_highest(ranking, count, valid):
    """Keep exactly count of the valid tokens, those ranked highest, the earlier first among equals. (B, S) -> (B, S)."""
    order = ranking.double().masked_fill(~valid, -torch.inf).flatten().argsort(descending=True, stable=True)
    rank = order.argsort().view_as(valid)                        # (B, S): 0 for the highest
    return valid & (rank < count)


GRANULARITIES = ("all", "attn", "mlp", "layer", "alternate")


@dataclass
class SkipPolicy:
    """Decides which tokens skip which branch. Stateless between calls except for its random generator.

    kind    batch   quantile over all valid tokens of the call (the paper): depends on batch mates, looks ahead inside
                    a prompt, skips nothing when one sequence is left
            frozen  a fixed threshold per branch (calibrate below): causal, the same alone or in any batch
            random  the baseline: floor((1 - b) n + u) tokens at random, u ~ U[0, 1) per branch and call
            topk    exactly ceil(b n) tokens with the highest scores (speed measurements)
            given   recorded masks (tests)
            none    keeps all
    skip    granularity: "all" | "attn" | "mlp" | "layer" (MLP follows its attention) | "alternate" (layers 1, 3, 5, ...)
    kv      "copy_up": a skipped token's K and V are those of the layer below | "dense": they are computed all the same
    """
    kind: str = "none"
    budget: float = 1.0
    skip: str = "all"
    kv: str = "copy_up"
    thresholds: list = None                                      # frozen: one tau per branch
    masks: list = None                                           # given: one (B, S) mask per branch
    generator: torch.Generator = None                            # random

    def __post_init__(self):
        self.budget = check_budget(self.budget)
        for name, allowed in {"kind": ("batch", "frozen", "random", "topk", "given", "none"), "skip": GRANULARITIES,
                              "kv": ("copy_up", "dense")}.items():
            if getattr(self, name) not in allowed:
                raise InputError(f"{name} {getattr(self, name)!r} is not one of {', '.join(allowed)}")

    def may_skip(self, branch):
        """Whether any token may skip this branch at all, known without looking at a score."""
        if self.kind == "none" or (self.budget >= 1.0 and self.kind != "given"):
            return False
        layer, is_mlp = divmod(branch, 2)
        return {"all": True, "attn": not is_mlp, "mlp": bool(is_mlp), "layer": not is_mlp,
                "alternate": layer % 2 == 1}[self.skip]

    def skippable_share(self, layers):
        """The share of the 2L branches that a budget acts on: 1, 1/2, or for "alternate" floor(L/2) / L."""
        return {"all": 1.0, "layer": 1.0, "alternate": (layers // 2) / layers}.get(self.skip, 0.5)

    def keep(self, branch, scores, valid):
        """scores (B, S) or None where there are no gates, valid (B, S) bool -> keep (B, S) bool."""
        if not self.may_skip(branch):
            return valid
        if self.kind == "given":
            return valid & self.masks[branch]
        if self.kind == "random":
            source = self.generator.device if self.generator is not None else valid.device
            noise = torch.rand(valid.shape, generator=self.generator, device=source).to(valid.device)
            u = torch.rand((), generator=self.generator, device=source, dtype=torch.float64).to(valid.device)
            n = valid.sum().double()
            return keep_highest(noise, n - torch.floor((1.0 - self.budget) * n + u), valid)
        if scores is None:
            raise InputError(f"policy {self.kind!r} ranks tokens by their gates and this model has none: use random or none")
        if self.kind == "topk":
            return keep_highest(scores, torch.ceil(self.budget * valid.sum().double() - 1e-9), valid)
        if self.kind == "frozen":                                # float64: tau may lie between two neighbouring floats
            return valid & (scores.double() > self.thresholds[branch])
        return select_tokens(scores, self.budget, valid)


# ---------------------------------------------------------------------------------------------------------------------
# Training: budget (Algorithm 1 line 3) and sparsity loss (line 18)
# ---------------------------------------------------------------------------------------------------------------------

def budget_at(step, total, start=1.0, end=0.8, schedule="linear", seed=0):
    """The budget of training step `step` of `total`, counted from 0.

    linear: Algorithm 1 line 3, exactly start at the first step and end at the last. uniform (ours): every fourth step
    start, else drawn from U[end, start] by (seed, step), so that the model never forgets the budgets it has left behind.
    """
    if schedule == "uniform":
        return start if step % 4 == 0 else random.Random(f"budget {seed} {step}").uniform(end, start)
    if total == 1 or step >= total - 1:
        return end
    return start - (start - end) * step / (total - 1)


def sparsity_loss(gates, valid=None, kind="l2", budget=1.0):
    """What pulls the gates shut, over all branches and valid tokens. A scalar tensor.

    gates: list of (B, S, H) or (B, S, 1), one per branch (a shared gate counts once per use); valid (B, S) bool or None.
    l2       mean of g^2 (the authors' code)         l1   mean of g (Algorithm 1 line 18)
    l2_norm  eq. 4: per channel the 2-norm over the tokens, here divided by sqrt(n_valid) so that lambda means the same
             at every length                         kl   sum over branches of KL(Bern(g-bar) || Bern(budget))
    """
    n = gates[0][..., 0].numel() if valid is None else valid.sum().clamp(min=1)
    total = 0.0
    for g in gates:
        g = g if valid is None else torch.where(valid[..., None], g, 0.0)     # (B, S, H)
        if kind == "l2":
            total = total + (g * g).sum() / (n * g.shape[-1])
        elif kind == "l1":
            total = total + g.sum() / (n * g.shape[-1])
        elif kind == "l2_norm":
            total = total + ((g * g).sum((0, 1)) / n).sqrt().mean()
        elif kind == "kl":
            mean, b = g.sum() / (n * g.shape[-1]), min(max(budget, 0.01), 0.99)
            mean = mean.clamp(1e-6, 1 - 1e-6)
            total = total + mean * (mean / b).log() + (1 - mean) * ((1 - mean) / (1 - b)).log()
        else:
            raise InputError(f"sparsity loss {kind!r} is not one of l2, l1, l2_norm, kl")
    return total if kind == "kl" else total / len(gates)


# ---------------------------------------------------------------------------------------------------------------------
# Frozen thresholds: the quantile measured once, then fixed
# ---------------------------------------------------------------------------------------------------------------------

def frozen_threshold(scores, q, tie=1e-6):
    """A threshold that skips about a share q of these scores and lies on none of them. 1-d scores -> float.

    Equal tokens have equal scores at attention 0, so a quantile tends to fall on a tie that one rounding step would
    flip. It moves to the midpoint of the nearest gap, on the side whose share is nearer q; beyond the ends by 1e-4.
    """
    s = scores.double().flatten().sort().values
    tau = quantile_threshold(s, q)
    on_tau = s[(s - tau).abs() <= tie]
    low, high = (on_tau[0], on_tau[-1]) if len(on_tau) else (tau, tau)
    below, above = s[s < low], s[s > high]
    if not len(on_tau):
        return float((below[-1] + above[0]) / 2)
    cuts = (float((below[-1] + low) / 2) if len(below) else float(low) - 1e-4,
            float((high + above[0]) / 2) if len(above) else float(high) + 1e-4)
    return min(cuts, key=lambda cut: abs(float((s <= cut).double().mean()) - q))


@dataclass
class _Calibrator(SkipPolicy):
    """Sets each branch's threshold from the scores it sees there, and applies it before the next branch runs."""
    table: dict = field(default_factory=dict)
    lowest: dict = field(default_factory=dict)

    def may_skip(self, branch):
        return SkipPolicy("topk", 0.5, self.skip).may_skip(branch)

    def keep(self, branch, scores, valid):
        pool = scores[valid]
        self.lowest[branch] = float(pool.min())
        self.table[branch] = frozen_threshold(pool, 1.0 - self.budget)
        return valid & (scores.double() > self.table[branch]) if self.budget < 1.0 else valid


@torch.no_grad()
def calibrate(model, sequences, budgets, skip="all", kv="copy_up", realised=None, tolerance=0.01, rounds=6, say=print):
    """One frozen threshold per branch and budget.

    sequences: list of token id lists. Per budget one pass over all of them as one pool, branch by branch in execution
    order. Skipping changes the states that later scores are made from, so a table can run away in use; therefore, when
    `realised(policy) -> skipped share` is given (run the policy on prompts that the model continues), the quantile asked
    for is corrected until the share is within `tolerance` of (1 - budget) x the skippable share, in at most `rounds`.

    Returns {"skip", "kv", "thresholds": {"1.0": [...], "0.95": [2L floats], ...}, "realised": {"0.95": share, ...}}; a
    branch that may not skip has threshold 0. thresholds["1.0"] holds the smallest scores and serves interpolation only.
    """
    branches, device = 2 * model.config.num_hidden_layers, next(model.parameters()).device
    if model.config.gate is None:
        raise InputError("this model has no gates to calibrate: train it first (python train.py --model ...)")
    longest = max(map(len, sequences))
    ids = torch.tensor([s + [0] * (longest - len(s)) for s in sequences], device=device)              # (B, S)
    valid = torch.tensor([[True] * len(s) + [False] * (longest - len(s)) for s in sequences], device=device)

    def one_pass(q):
        policy = _Calibrator("frozen", 1.0 - q, skip, kv)
        model(ids, valid=valid, policy=policy, compute="compact", logits="last")
        return ([policy.table.get(b, 0.0) for b in range(branches)], [policy.lowest.get(b, 0.0) for b in range(branches)])

    result = {"skip": skip, "kv": kv, "thresholds": {"1.0": one_pass(0.0)[1]}, "realised": {}}
    correction = 1.0                                             # of the last budget: a good guess for the next
    for budget in sorted((b for b in map(check_budget, budgets) if b < 1.0), reverse=True):
        share = SkipPolicy(skip=skip).skippable_share(branches // 2)
        target, q, low, high, best = (1.0 - budget) * share, (1.0 - budget) * correction, 0.0, 1.0, None
        for _ in range(rounds):
            table = one_pass(min(q, 0.999))[0]
            got = target if realised is None else realised(SkipPolicy("frozen", budget, skip, kv, thresholds=table))
            if best is None or abs(got - target) < abs(best[1] - target):
                best = (table, got, q)
            if abs(got - target) <= tolerance / 2:               # aim at half, so that other prompts stay within one
                break
            low, high = (low, q) if got > target else (q, high)
            guess = q * target / max(got, 1e-3)
            q = guess if low < guess < high else (low + high) / 2
        table, got, q = best
        correction = q / (1.0 - budget)
        key = str(round(budget, 4))
        result["thresholds"][key] = table
        if realised is not None:
            result["realised"][key] = got
            reached = "" if abs(got - target) <= tolerance else f"  target {target:.1%} NOT reached: skipping here feeds on itself"
            say(f"calibrated budget {budget:.2f}: skips {got:.1%} of what it is asked to continue{reached}")
    return result


def thresholds_at(table, budget):
    """The frozen thresholds (list of 2L floats) at any budget between the calibrated ones, interpolated linearly.

    table: {"1.0": [...], "0.95": [...], ...}. InputError below the smallest calibrated budget.
    """
    known = sorted((float(key), values) for key, values in table.items())
    budget = check_budget(budget)
    if budget < known[0][0] - 1e-9:
        raise InputError(f"budget {budget} is below the smallest calibrated one, {known[0][0]}: "
                         f"train with a lower --budget-end, or use --policy batch")
    for (b0, tau0), (b1, tau1) in zip(known, known[1:]):
        if budget <= b1 + 1e-9:
            w = min(max((budget - b0) / (b1 - b0), 0.0), 1.0)
            return [(1 - w) * x + w * y for x, y in zip(tau0, tau1)]
    return known[-1][1]


# ---------------------------------------------------------------------------------------------------------------------
# What a skip saves
# ---------------------------------------------------------------------------------------------------------------------

@dataclass
class Trace:
    """What one forward call decided: lists over the 2L branches in execution order."""
    scores: list                # (B, S) float32 or wider, None without gates
    keep: list                  # (B, S) bool
    gates: list                 # (B, S, H) or (B, S, 1); None unless training or asked for
    valid: torch.Tensor         # (B, S) bool
    keys: int                   # how many key positions each query was multiplied with
    logit_rows: int             # rows that went through the head
    kv: str                     # the policy's kv setting


def count_macs(config, keep, valid, keys, logit_rows, kv="copy_up", gate=None):
    """Multiply-accumulates that one call executes on the compact path. int64 scalar tensor, on the device.

    config: the model's; keep (2L, B, S) bool; valid (B, S) bool; keys: key positions per query; gate: GateConfig or None.
    Scores and weighted sum are counted as the rectangles that are really multiplied, ragged padding included; of one query
    per sequence only the kept (a GPU runs the others along, which is not counted).
    Agrees with half of FlopCounterMode's FLOPs under sdpa_kernel(SDPBackend.MATH). The ungated dense model: keep = valid.
    """
    H, D = config.hidden_size, config.head_dim
    batch, length = valid.shape
    rows = keep.flatten(1).sum(-1)                               # (2L,) rows that run
    queries = rows if length == 1 else batch * keep.sum(-1).amax(-1)     # (2L,) the ragged rectangle: most rows of one sequence
    attn, mlp = rows[0::2], rows[1::2]                           # (L,) each
    kv_rows = attn if kv == "copy_up" else valid.sum().expand_as(attn)
    kv_rows = torch.cat([valid.sum()[None], kv_rows[1:]])        # layer 0 has nothing below to copy from
    macs = (attn * 2 * H * config.num_attention_heads * D + kv_rows * 2 * H * config.num_key_value_heads * D
            + queries[0::2] * keys * 2 * config.num_attention_heads * D
            + mlp * 3 * H * config.intermediate_size).sum()
    gates = 0 if gate is None else len(keep) * batch * length * gate.macs(H)
    return macs + gates + logit_rows * config.vocab_size * H


class Savings:
    """The three numbers of a run, accumulated on the device call by call.

    skipped           skipped (token, branch) pairs over all valid pairs
    skipped_per_call  the paper's: the share per forward call and branch, all weighing the same
    macs_saved        1 - executed MACs / MACs of the ungated dense model; negative where gates cost more than they save
    """

    def __init__(self, config):
        self.config, self.calls, self.sums = config, 0, None

    def add(self, trace):
        """Count one call's Trace."""
        keep, n = torch.stack(trace.keep), trace.valid.sum()     # (2L, B, S)
        kept = keep.flatten(1).sum(-1)                           # (2L,)
        dense = count_macs(self.config, trace.valid.expand_as(keep), trace.valid, trace.keys, trace.logit_rows)
        run = count_macs(self.config, keep, trace.valid, trace.keys, trace.logit_rows, trace.kv, self.config.gate)
        now = torch.stack([x.double() for x in (kept.sum(), n * len(keep), (1 - kept / n).mean(), run, dense)])
        self.sums = now if self.sums is None else self.sums + now
        self.calls += 1

    def report(self):
        """dict of the three numbers (floats) and the sums behind them; one host synchronisation."""
        kept, pairs, per_call, run, dense = self.sums.tolist()
        return {"skipped": 1 - kept / pairs, "skipped_per_call": per_call / self.calls, "macs_saved": 1 - run / dense,
                "calls": self.calls, "pairs": pairs, "macs": run, "macs_dense": dense}
