"""Draw examples/branch.svg: one gated branch, and a KV cache in which one token's keys are copied up.

    python examples/diagram.py

The right half is not invented: it runs a tiny model and colours what its cache holds.
"""
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import torch

from console import pyplot, run
from gates import SkipPolicy
from model import Model, ModelConfig
from rows import KVCache

INK, PAPER, GREEN, ORANGE, GREY = "#1f2933", "#fbfaf7", "#8fd3b6", "#f3b562", "#c9d1d9"
plt = pyplot() or sys.exit(1)
LAYERS, TOKENS, SKIPPED = 3, 5, 2                                # token 2 skips the attention of the upper two layers


def cache_of_a_run():
    """A real cache: bool (LAYERS, TOKENS), True where a token's keys are those of the layer below."""
    model = Model(ModelConfig(vocab_size=8, hidden_size=8, intermediate_size=16, num_hidden_layers=LAYERS,
                              num_attention_heads=2, num_key_value_heads=1, head_dim=4))
    model.init_weights(torch.Generator().manual_seed(0))
    everyone = torch.ones(1, TOKENS, dtype=torch.bool)
    but_one = everyone.clone()
    but_one[0, SKIPPED] = False
    masks = [everyone if branch % 2 or branch == 0 else but_one for branch in range(2 * LAYERS)]
    cache = KVCache(model.config, 1, TOKENS)
    with torch.no_grad():
        model(torch.arange(TOKENS)[None], cache=cache, policy=SkipPolicy("given", masks=masks), compute="compact")
    keys = torch.stack(cache.k)[:, 0, 0]                         # (LAYERS, TOKENS, D)
    return torch.cat([torch.zeros(1, TOKENS, dtype=torch.bool), (keys[1:] == keys[:-1]).all(-1)])


def box(axis, x, y, text, colour=PAPER, width=2.5, height=0.8):
    axis.text(x, y, text, ha="center", va="center", fontsize=10.5, color=INK, zorder=3)
    axis.add_patch(plt.Rectangle((x - width / 2, y - height / 2), width, height, facecolor=colour, edgecolor=INK,
                                 linewidth=1.2, zorder=2))


def arrow(axis, *points, text="", colour=INK, side=0.12):
    for a, b in zip(points, points[1:-1]):
        axis.plot(*zip(a, b), color=colour, linewidth=1.4, solid_capstyle="round")
    axis.annotate("", points[-1], points[-2], arrowprops=dict(arrowstyle="-|>", color=colour, linewidth=1.4, shrinkA=0,
                                                              shrinkB=0))
    if text:
        axis.text(points[-2][0] + side, points[-2][1] + side, text, fontsize=9.5, color=INK, ha="left", va="bottom")


def draw_branch(axis):
    axis.set(xlim=(-0.6, 9.6), ylim=(-0.6, 8.4))
    axis.set_title("one branch (attention or MLP), one token", fontsize=11.5, color=INK, pad=2)
    axis.plot((0.6, 0.6), (0.0, 7.2), color=INK, linewidth=2.6, zorder=1)
    axis.annotate("", (0.6, 8.0), (0.6, 7.1), arrowprops=dict(arrowstyle="-|>", color=INK, linewidth=2.6))
    axis.text(0.6, -0.35, "h, the residual stream", ha="left", va="center", fontsize=10, color=INK)
    box(axis, 3.4, 1.0, "x = norm(h)")
    box(axis, 7.4, 2.6, "g = σ(W x + b)", GREY, 3.0)
    box(axis, 7.4, 4.2, "ḡ = mean of g\nḡ > τ ?", GREY, 3.0, 1.1)
    box(axis, 3.4, 4.2, "o = f(x)", GREEN)
    box(axis, 3.4, 6.4, "g ⊙ o", GREEN)
    arrow(axis, (0.6, 1.0), (2.15, 1.0))
    arrow(axis, (4.65, 1.0), (7.4, 1.0), (7.4, 2.2))
    arrow(axis, (7.4, 3.0), (7.4, 3.65))
    arrow(axis, (3.4, 1.4), (3.4, 3.8), text="only if it passes", side=0.15)
    arrow(axis, (5.9, 4.2), (4.65, 4.2), text="yes", side=-0.75)
    axis.texts[-1].set_position((5.05, 4.3))
    arrow(axis, (3.4, 4.6), (3.4, 6.0))
    arrow(axis, (8.2, 4.75), (8.2, 7.3), (0.85, 7.3), colour="#b35c00")
    axis.text(8.05, 7.45, "no: h stays; of attention, K and V are copied up", ha="right",
              va="bottom", fontsize=9.5, color=INK)
    arrow(axis, (6.9, 3.0), (6.9, 3.35), (5.6, 3.35), (5.6, 6.4), (4.65, 6.4))
    arrow(axis, (2.15, 6.4), (0.85, 6.4))
    axis.plot(0.6, 6.4, "o", color=PAPER, markeredgecolor=INK, markersize=15, zorder=4)
    axis.text(0.6, 6.4, "+", ha="center", va="center", fontsize=13, color=INK, zorder=5)


def draw_cache(axis, copied):
    axis.set(xlim=(-1.9, TOKENS + 0.4), ylim=(-2.5, 5.9))
    axis.set_title("the KV cache", fontsize=11.5, color=INK, pad=2)
    for layer in range(LAYERS):
        axis.text(-0.15, layer * 1.5 + 0.5, f"layer {layer}", ha="right", va="center", fontsize=10, color=INK)
        for token in range(TOKENS):
            is_copy = bool(copied[layer, token])
            axis.add_patch(plt.Rectangle((token + 0.08, layer * 1.5 + 0.08), 0.84, 0.84, linewidth=1.2, edgecolor=INK,
                                         facecolor=ORANGE if is_copy else GREEN))
            source = max(below for below in range(layer + 1) if not copied[below, token])
            axis.text(token + 0.5, layer * 1.5 + 0.5, f"K V\nof {source}", ha="center", va="center", fontsize=8.5,
                      color=INK)
            if is_copy:
                arrow(axis, (token + 0.5, layer * 1.5 - 0.56), (token + 0.5, layer * 1.5 + 0.06), colour="#b35c00")
    for token in range(TOKENS):
        axis.text(token + 0.5, -0.3, f"token {token}", ha="center", va="center", fontsize=8.5, color=INK)
    axis.add_patch(plt.Rectangle((-1.7, -1.35), 0.4, 0.4, facecolor=GREEN, edgecolor=INK))
    axis.text(-1.15, -1.15, "computed: the token passed", va="center", fontsize=9.5, color=INK)
    axis.add_patch(plt.Rectangle((-1.7, -2.05), 0.4, 0.4, facecolor=ORANGE, edgecolor=INK))
    axis.text(-1.15, -1.85, "copied up: the token skipped this layer's attention", va="center", fontsize=9.5, color=INK)
    axis.text(-1.7, 5.3, "later tokens still attend to every slot", va="center", fontsize=9.5, color=INK)


def main():
    plt.rcParams.update({"svg.hashsalt": "branch", "svg.fonttype": "path"})      # the same bytes each time
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6), width_ratios=(1.35, 1), layout="constrained",
                                         facecolor=PAPER)        # a light sheet: readable on a dark page too
    draw_branch(left)
    draw_cache(right, cache_of_a_run())
    for axis in (left, right):
        axis.axis("off")
    figure.savefig(HERE / "branch.svg", metadata={"Date": None}, facecolor=PAPER)
    print(f"written: {HERE / 'branch.svg'}")
    return 0


if __name__ == "__main__":
    run(main)
