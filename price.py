"""One threshold for the whole model (ours): a price, in place of the same budget for every branch.

With the penalty lambda sum_b c_b g^2 / P, of P gates, c_b the branch's work over the mean branch's, a gate settles
where -P dCE/dg is 2 lambda c_b g, on average over what looks the same to it: its value is what opening it further would
gain, per unit of work, over 2 lambda / P. So the gates of all branches are in one currency, and at a given total of
work one threshold, a price, loses least to first order: run a branch for a token if its gate exceeds it. (An L1 penalty
has a constant derivative and yields no such scale.) paper/gate_value.py measures how far this holds.

Shapes: L layers, N tokens of a step.
"""
import torch

from gates import SkipPolicy


class RunningQuantile:
    """The quantile function of the scores of all branches, weighted by their work: which price lets what share run.

    101 points, averaged over steps (0.9 old + 0.1 new).
    """

    def __init__(self, costs, points=None):
        """costs: 2L floats, 0 where nobody may skip. points: (101,) float64, as saved; None before the first step."""
        self.costs, self.points = torch.tensor(costs, dtype=torch.float64), points

    @torch.no_grad()
    def update(self, scores, valid):
        """scores (2L, N), valid (N,) bool of one step. A point is the smallest score that has a share q of the work at
        or below it, q = 0, 0.01, ..., 1. Everything stays on the device."""
        self.costs = self.costs.to(scores.device)
        work = self.costs[:, None] * valid                                                       # (2L, N)
        s, order = torch.where(work > 0, scores.double(), torch.inf).flatten().sort()
        total = work.flatten()[order].cumsum(0)
        at = torch.searchsorted(total, torch.linspace(0, 1, 101, dtype=torch.float64, device=s.device) * total[-1])
        now = s[torch.minimum(at, (work > 0).sum() - 1)]         # a GPU's cumsum may round past the last score
        self.points = now if self.points is None else 0.9 * self.points.to(now.device) + 0.1 * now

    def at(self, q):
        """The threshold that a share q of the work lies at or below, a float64 scalar tensor; linear between points."""
        place = min(max(q, 0.0), 1.0) * 100
        i = min(int(place), 99)
        return self.points[i] + (place - i) * (self.points[i + 1] - self.points[i])

    def beyond(self, q):
        """at(q) with price 0 at q = 0 and 1 at q = 1: means over steps lag behind gates, and calibration has to find
        prices that they do not reach, too."""
        points = self.points.clone()
        points[0], points[-1] = 0.0, 1.0
        return RunningQuantile([], points).at(q)

    def policy(self, budget, skip, kv):
        """The SkipPolicy of a training step: frozen at the price that lets `budget` of the work run. Before the first
        update, and at budget 1, nobody skips."""
        if self.points is None or budget >= 1.0:
            return SkipPolicy("none", 1.0, skip, kv)
        return SkipPolicy("frozen", budget, skip, kv, thresholds=[self.at(1.0 - budget)] * len(self.costs))
