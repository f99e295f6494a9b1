"""The paper's method, and what little is ours marked so: gate, threshold, selection, budget, sparsity loss.

"What Layers When: Learning to Skip Compute in LLMs with Residual Gates", arXiv 2510.13876.
A decoder with L layers has 2L residual branches, numbered attn 0, mlp 0, attn 1, mlp 1, ...
In every mask True means kept and False means skipped. by_hand.py says the same in plain loops.

Shapes: B batch, S sequence, H hidden, L layers.
"""
import random
from dataclasses import dataclass

import torch
from torch import nn

from console import InputError
from linear import Linear


def check_budget(budget):
    """Return budget as a float in (0, 1]; InputError otherwise (NaN included). Also the type of every --budget flag."""
    try:
        budget = float(budget)
    except ValueError:
        raise InputError(f"budget {budget!r} is no number") from None
    if not 0.0 < budget <= 1.0:
        raise InputError(f"budget {budget} is outside (0, 1]: it is the share of tokens or work kept, such as 0.85")
    return budget


# ---------------------------------------------------------------------------------------------------------------------
# The gate: equation 2 and section 3.4
# ---------------------------------------------------------------------------------------------------------------------

FORMS, ARCHS = ("vector", "scalar"), ("linear", "mlp", "lowrank")
GATE_INPUTS, PLACEMENTS = ("normed", "residual"), ("after", "before")


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
        choices = {"form": FORMS, "arch": ARCHS, "input": GATE_INPUTS, "placement": PLACEMENTS}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise InputError(f"gate {name} {getattr(self, name)!r} is not one of {', '.join(allowed)}")
        if self.arch == "lowrank" and self.form == "scalar":
            raise InputError("a low-rank gate with a scalar output is a scalar gate with more parameters: "
                             "use --gate-arch linear")
        if not 0 <= self.rank <= 65536:
            raise InputError(f"gate rank {self.rank} is not between 0 (the default rank) and 65536")

    def flags(self):
        """What asks train.py for such a gate."""
        changed = {name: value for name, value in vars(self).items() if value != getattr(GateConfig, name)}
        return " ".join([f"--gate {self.form}", *(f"--gate-{name}" + f" {value}" * (value is not True)
                                                  for name, value in changed.items() if name != "form")])

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
        self.config = config
        self.inner = Linear(hidden, inner, bias=config.arch == "mlp") if inner else None
        self.out = Linear(inner or hidden, out)

    def forward(self, x):
        """x (B, S, H) -> gate (B, S, H) or (B, S, 1), scores (B, S); both in the gate's dtype."""
        x = (x.detach() if self.config.detach else x).to(self.out.weight.dtype)
        if self.inner is not None:
            x = self.inner(x)                                    # (B, S, inner)
            x = torch.relu(x) if self.config.arch == "mlp" else x
        g = torch.sigmoid(self.out(x))                           # (B, S, H) or (B, S, 1): line 6, eq. 2
        return g, g.mean(-1)                                     # scores, the paper's g-bar, (B, S): line 7

    @torch.no_grad()
    def init_weights(self, generator=None):
        """Section 3.4: weights Gaussian with std 0.01 and bias 5, so that a fresh gate is nearly open (0.993)."""
        std = 0.01
        if self.config.arch == "mlp":                            # the first layer has PyTorch's default
            bound = self.inner.in_features ** -0.5
            self.inner.weight.uniform_(-bound, bound, generator=generator)
            self.inner.bias.uniform_(-bound, bound, generator=generator)
        elif self.config.arch == "lowrank":                      # U V x has the statistics of a full W_G x
            hidden, rank = self.inner.in_features, self.inner.out_features
            self.inner.weight.normal_(0, hidden ** -0.5, generator=generator)
            std = 0.01 * (hidden / rank) ** 0.5
        self.out.weight.normal_(0, std, generator=generator)
        self.out.bias.fill_(5.0)


# ---------------------------------------------------------------------------------------------------------------------
# Which tokens are kept: Algorithm 3 and equation 6
# ---------------------------------------------------------------------------------------------------------------------

def quantile_threshold(scores, q, valid=None):
    """Algorithm 3: the q-quantile of the scores, interpolated linearly between order statistics.

    scores: any shape; q in [0, 1]; valid: bool of the same shape or None. Returns a float64 scalar tensor, equal to
    numpy.quantile(scores[valid], q, method="linear"). Everything stays on the device, whatever the scores are.
    ValueError if scores is empty or q outside [0, 1].
    """
    if scores.numel() == 0 or not 0.0 <= q <= 1.0:
        raise ValueError(f"quantile {q} of {scores.numel()} scores: needs at least one score and q in [0, 1]")
    v = scores.double().flatten()                                # line 1: v, (n,)
    if valid is None:
        n = torch.tensor(v.numel(), device=v.device)
    else:                                                        # what is not valid sorts behind the n valid ones
        v, n = v.masked_fill(~valid.flatten(), torch.inf), valid.sum()
    s = v.sort().values                                          # line 3. One score, all equal: no need of line 2
    pos = q * (n - 1).double()                                   # line 4
    pos = torch.where((pos - pos.round()).abs() < 1e-9, pos.round(), pos) # (1 - 0.8) * 10 is 2, not 1.9999999999999996
    i = pos.floor().clamp(min=0).long()
    alpha = pos - i
    last = (n - 1).clamp(min=0)                                  # at i = n - 1 there is no s[i + 1], and alpha is 0
    below, above = s.take(i), s.take(torch.minimum(i + 1, last))             # take: s[i] would go to the host
    return torch.where(alpha > 0, below + alpha * (above - below), below)    # lines 5-7


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
    tau = quantile_threshold(scores, 1.0 - budget, valid)        # line 8 of Algorithm 1, line 6 of Algorithm 2: eq. 6
    keep = valid & (scores.double() > tau)                       # line 10 of Algorithm 1: g-bar <= tau is skipped
    largest = scores.masked_fill(~valid, -torch.inf).max()
    return torch.where(keep.any(), keep, valid & (scores == largest))


def keep_highest(ranking, count, valid):
    """Keep exactly count of the valid tokens, the highest in ranking, the earlier among equals. (B, S) -> (B, S)."""
    order = ranking.double().masked_fill(~valid, -torch.inf).flatten().argsort(descending=True, stable=True)
    rank = order.argsort().view_as(valid)                        # (B, S): 0 for the highest
    return valid & (rank < count)


# ---------------------------------------------------------------------------------------------------------------------
# Who may skip, and who decides
# ---------------------------------------------------------------------------------------------------------------------

GRANULARITIES = ("all", "attn", "mlp", "layer", "alternate")     # layer: the MLP follows its attention
KV_OF_SKIPPED = ("copy_up", "dense")


def may_skip(skip, branch):
    """Whether it is decided at this branch who skips. skip: one of GRANULARITIES; branch: 0 ... 2L-1.

    "layer" decides at attention only and "alternate" in layers 1, 3, 5, ..., so that layer 0 always runs.
    """
    layer, is_mlp = divmod(branch, 2)
    return {"all": True, "attn": not is_mlp, "mlp": is_mlp == 1, "layer": not is_mlp, "alternate": layer % 2 == 1}[skip]


def skippable_share(skip, layers):
    """The share of the 2L branches that a budget acts on: 1, 1/2, or for "alternate" floor(L/2) / L."""
    return {"all": 1.0, "layer": 1.0, "alternate": (layers // 2) / layers}.get(skip, 0.5)


@dataclass
class SkipPolicy:
    """Decides which tokens skip which branch. Stateless between calls except for its random generator.

    kind    batch   quantile over all valid tokens of the call (the paper): depends on batch mates, looks ahead inside
                    a prompt, skips nothing when one sequence is left
            frozen  a fixed threshold per branch, or one for all (thresholds.py): causal, the same in any batch
            random  the baseline: skips floor((1 - b) n + u) tokens, u ~ U[0, 1) per branch and call
            topk    keeps exactly ceil(b n) tokens, the highest scores (speed measurements)
            given   recorded masks (tests)
            none    keeps all
    skip    granularity, one of GRANULARITIES
    kv      "copy_up": a skipped token's K and V are those of the layer below | "dense": they are computed all the same
    """
    kind: str = "none"
    budget: float = 1.0                                          # at 1 nobody skips, whatever the thresholds say
    skip: str = "all"
    kv: str = "copy_up"
    thresholds: list = None                                      # frozen: one tau per branch
    masks: list = None                                           # given: one (B, S) mask per branch
    generator: torch.Generator = None                            # random

    def __post_init__(self):
        self.budget = check_budget(self.budget)
        for name, allowed in {"kind": ("batch", "frozen", "random", "topk", "given", "none"), "skip": GRANULARITIES,
                              "kv": KV_OF_SKIPPED}.items():
            if getattr(self, name) not in allowed:
                raise InputError(f"{name} {getattr(self, name)!r} is not one of {', '.join(allowed)}")

    @torch.no_grad()                                             # no gradient through a decision
    def keep(self, branch, scores, valid):
        """scores (B, S) or None where there are no gates, valid (B, S) bool -> keep (B, S) bool.

        Returns valid itself where nobody may skip. InputError for a ranking without scores.
        """
        if self.kind == "none" or (self.budget >= 1.0 and self.kind != "given") or not may_skip(self.skip, branch):
            return valid
        if scores is None and self.kind not in ("random", "given"):
            raise InputError(f"policy {self.kind!r} ranks tokens by gates and this model has none: use random or none")
        if self.kind == "batch":                                 # the paper: line 8 of Algorithm 1
            return select_tokens(scores, self.budget, valid)
        if self.kind == "frozen":                                # float64: tau may lie between two neighbouring floats
            return valid & (scores.double() > self.thresholds[branch])
        if self.kind == "given":
            return valid & self.masks[branch]
        if self.kind == "topk":
            return keep_highest(scores, torch.ceil(self.budget * valid.sum().double() - 1e-9), valid)
        source = self.generator.device if self.generator is not None else valid.device
        noise = torch.rand(valid.shape, generator=self.generator, device=source).to(valid.device)
        u = torch.rand((), generator=self.generator, device=source, dtype=torch.float64).to(valid.device)
        n = valid.sum().double()
        return keep_highest(noise, n - torch.floor((1.0 - self.budget) * n + u), valid)


# ---------------------------------------------------------------------------------------------------------------------
# Training: budget (line 3 of Algorithm 1) and sparsity loss (line 18)
# ---------------------------------------------------------------------------------------------------------------------

def budget_at(step, total, start=1.0, end=0.8, schedule="linear", seed=0):
    """The budget of training step `step` of `total`, counted from 0.

    linear: line 3 of Algorithm 1, exactly start at the first step and end at the last. uniform (ours): every fourth
    step start, else drawn from U[end, start] by (seed, step), so that no budget is forgotten that was left behind.
    """
    if schedule == "uniform":
        return start if step % 4 == 0 else random.Random(f"budget {seed} {step}").uniform(end, start)
    if total == 1 or step >= total - 1:
        return end
    return start - (start - end) * step / (total - 1)


SPARSITY_LOSSES = ("l2", "l1", "l2_norm", "kl")


def sparsity_loss(gates, valid=None, kind="l2", budget=1.0, costs=None):
    """What pulls the gates shut, over all branches and valid tokens. A scalar tensor.

    gates: list of (B, S, H) or (B, S, 1), one per branch (a shared gate counts once a use); valid (B, S) bool or None.
    costs: what each branch weighs, with mean 1 (ours: savings.branch_costs); None: all the same (the paper).
    l2       mean of g^2 (the authors' code)         l1   mean of g (line 18 of Algorithm 1)
    l2_norm  eq. 4: per channel the 2-norm over the tokens, here divided by sqrt(n_valid) so that lambda means the same
             at every length                         kl   sum over branches of KL(Bern(g-bar) || Bern(budget))
    """
    n = gates[0][..., 0].numel() if valid is None else valid.sum().clamp(min=1)
    total = 0.0
    for g, cost in zip(gates, costs or [1.0] * len(gates)):
        g = g if valid is None else torch.where(valid[..., None], g, 0.0)     # (B, S, H)
        if kind == "l2":
            total = total + cost * (g * g).sum() / (n * g.shape[-1])
        elif kind == "l1":
            total = total + cost * g.sum() / (n * g.shape[-1])   # line 18 of Algorithm 1, as printed
        elif kind == "l2_norm":
            total = total + cost * ((g * g).sum((0, 1)) / n).sqrt().mean()    # eq. 4
        elif kind == "kl":
            mean, b = g.sum() / (n * g.shape[-1]), min(max(budget, 0.01), 0.99)
            mean = mean.clamp(1e-6, 1 - 1e-6)
            total = total + cost * (mean * (mean / b).log() + (1 - mean) * ((1 - mean) / (1 - b)).log())
        else:
            raise InputError(f"sparsity loss {kind!r} is not one of {', '.join(SPARSITY_LOSSES)}")
    return total if kind == "kl" else total / len(gates)
