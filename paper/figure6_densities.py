"""Figure 6: how the mean gates of one branch are distributed, and those of all branches; with calibrated thresholds.

    python paper/figure6_densities.py --model RUN --out runs/figure6.png
    python paper/figure6_densities.py --model RUN --branch 5 --out runs/mlp2.png          # the MLP of layer 2

A density is a sum of Gaussians, one on each score, as wide as Scott's rule says: the standard deviation times n^(-1/5).
It smears what it shows, beyond 0 and 1 too. Where there are many tokens, --tokens of them are drawn at random.

Shapes: L layers, n scores of one curve, G places where a density is wanted.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from console import InputError, pyplot, run
from flags import seed_number, whole

import numpy as np
import torch

from collected import collect, figure_flags, keep, parsed, read_texts
from data import load_examples
from gates import may_skip
from thresholds import spread

PERCENTS = (0, 5, 10, 25, 50, 75, 90, 95, 100)
BRANCHES = ("attention", "MLP")


def bandwidth(x):
    """Scott's rule in one dimension. x (n,) -> the standard deviation of each Gaussian; never 0."""
    return max(x.std(ddof=1) * len(x) ** -0.2, 1e-6) if len(x) > 1 else 1e-6


def density(x, at):
    """The Gaussian kernel density of the scores x (n,) at the places `at` (G,) -> (G,)."""
    h = bandwidth(x)
    return np.array([np.exp(-0.5 * ((place - x) / h) ** 2).mean() for place in at]) / (h * (2 * np.pi) ** 0.5)


def places(x, count=400):
    """Where to draw: from five bandwidths below the smallest score to five above the largest."""
    return np.linspace(x.min() - 5 * bandwidth(x), x.max() + 5 * bandwidth(x), count)


def thresholds_of(config):
    """{budget: 2L thresholds, None where a branch never skips} of a calibrated model, high budgets first; else {}.

    Those of budget 1 are left out: they serve interpolation only."""
    known, skip = config.gateskip.get("thresholds", {}), config.gateskip.get("skip", "all")
    return {budget: [tau if may_skip(skip, b) else None for b, tau in
                     enumerate(spread(known[budget], 2 * config.num_hidden_layers))]
            for budget in sorted(known, key=float, reverse=True) if float(budget) < 1.0}


def draw(scores, branch, thresholds):
    """One branch, then attention in all layers, then the MLPs, with the pool of all. scores (2L, n) -> the figure.

    A threshold stands with one branch, and with all where it is the same for all."""
    plt, layers = pyplot(), len(scores) // 2
    figure, axes = plt.subplots(1, 3, layout="constrained", figsize=(15, 4.4))
    colours, marks = plt.cm.viridis(np.linspace(0, 0.95, layers)), plt.cm.cividis(np.linspace(0, 0.8, len(thresholds)))
    pool = scores.ravel()
    curve = lambda axis, x, **how: axis.plot(at := places(x), density(x, at), **how)
    curve(axes[0], scores[branch], color="#440154", label="density")
    for axis, first in zip(axes[1:], (0, 1)):
        for layer, colour in enumerate(colours):
            curve(axis, scores[2 * layer + first], color=colour, linewidth=1)
        curve(axis, pool, color="black", linewidth=2.5, label="all branches, pooled")
        axis.set(title=f"{BRANCHES[first]}, all layers", yscale="log", ylim=(1e-2, None))
    for (budget, taus), colour in zip(thresholds.items(), marks):
        for axis in axes if len({*taus} - {None}) == 1 else axes[:1]:
            if taus[branch] is not None:
                axis.axvline(taus[branch], color=colour, ls="--", label=f"threshold, budget {float(budget):g}")
    axes[0].set_title(f"{BRANCHES[branch % 2]}, layer {branch // 2}")
    axes[2].sharey(axes[1])
    for axis in axes:
        axis.set(xlabel="mean gate (0 to 1)", ylabel="density, per unit of gate")
        axis.legend(fontsize=8)
    figure.colorbar(plt.cm.ScalarMappable(plt.Normalize(0, layers - 1), plt.matplotlib.colors.ListedColormap(colours)),
                    ax=axes[1:], label="layer", pad=0.01)
    return figure


def main(argv=None):
    p = figure_flags("Densities of the mean gates of one branch and of all (Figure 6).")
    p.add_argument("--branch", type=whole(0), help="2 x layer, its MLP + 1; default: attention of the middle layer")
    p.add_argument("--tokens", type=whole(2), default=2000, help="so many at most, the same for each branch")
    p.add_argument("--seed", type=seed_number, default=0, help="of the choice of tokens")
    args = parsed(p, argv, "densities")
    model, _, policy, texts = read_texts(args, load_examples(args.data, "test", args.limit))
    branches = 2 * model.config.num_hidden_layers
    branch = 2 * (branches // 4) if args.branch is None else args.branch
    if branch >= branches:
        raise InputError(f"--branch {branch}: {args.model} has branches 0 to {branches - 1}")
    m = collect(model, texts, policy)
    order = torch.randperm(len(m.ids), generator=torch.Generator().manual_seed(args.seed))[:args.tokens]
    scores, thresholds = m.scores[:, order].numpy(), thresholds_of(model.config)                 # (2L, n)
    name_of = lambda b: f"{BRANCHES[b % 2]} {b // 2}"
    rows = {name_of(b): scores[b] for b in range(branches)} | {"pool": scores.ravel()}
    table = {name: np.percentile(x, PERCENTS).tolist() for name, x in rows.items()}
    print(f"{scores.shape[1]:,} of {len(m.ids):,} tokens; percentiles of the mean gate, and the bandwidth",
          "branch      " + "".join(f"{x:7}%" for x in PERCENTS) + "  bandwidth", sep="\n")
    for name in (name_of(branch), "pool"):
        print(f"{name:12}" + "".join(f"{x:8.4f}" for x in table[name]) + f"{bandwidth(rows[name]):11.5f}")
    for budget, taus in thresholds.items():
        print(f"threshold at budget {budget}: {taus[branch]}")
    keep(args, draw(scores, branch, thresholds), model, densities={
        "n": scores.shape[1], "branch": branch, "thresholds": thresholds, "percents": PERCENTS, "percentiles": table,
        "bandwidths": {name: bandwidth(x) for name, x in rows.items()}})
    return 0


if __name__ == "__main__":
    run(main)
