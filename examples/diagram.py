"""Draw branch.svg, cache.svg and day.svg, beside this file: one gated branch, a KV cache, a token's way up.

    python examples/diagram.py

Every number, colour and "K V of n" is read from a run. branch and day: the embedded model with gates drawn at random
(not trained), one prompt. cache: a tiny random model under given masks.
"""
import io
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from console import pyplot, run
from flags import Parser

import torch

from data import encode_prompt
from disk import write
from gates import Gate, GateConfig, SkipPolicy
from load_weights import load_model, load_tokenizer
from model import Model, ModelConfig
from problems import arithmetic
from rows import KVCache
from thresholds import frozen_threshold
from tokens import pieces

INK, FAINT, PAPER, BROWN = "#1f2933", "#5f6b76", "#fbfaf7", "#b35c00"
GREEN, BLUE, ORANGE, GREY = "#8fd3b6", "#a9c9ef", "#f3b562", "#d5dbe1"
plt = pyplot()

# ---------------------------------------------------------------------------------------------------------------------
# The runs
# ---------------------------------------------------------------------------------------------------------------------

LAYERS, TOKENS = 3, 5
SKIPS = {0: [4], 1: [1, 3], 2: [1, 2]}                           # layer: tokens that skip its attention; 1 skips a run


def sources(cache):
    """(L, S) int: the layer that made the K and V in each slot of sequence 0, told by comparing with the slot below."""
    kv = torch.cat([torch.stack(cache.k), torch.stack(cache.v)], -1)[:, 0]       # (L, Hkv, S, 2D)
    found = torch.arange(len(kv))[:, None].repeat(1, kv.shape[2])                # each its own
    for layer in range(1, len(kv)):
        copied = (kv[layer] == kv[layer - 1]).all(-1).all(0)                     # (S,)
        found[layer] = torch.where(copied, found[layer - 1], layer)
    return found


def cache_of_a_run(skips=SKIPS):
    """A tiny model under given masks: (model, ids, keep per layer's attention (L, S) bool, sources (L, S))."""
    model = Model(ModelConfig(vocab_size=8, hidden_size=8, intermediate_size=16, num_hidden_layers=LAYERS,
                              num_attention_heads=2, num_key_value_heads=1, head_dim=4)).double()
    model.init_weights(torch.Generator().manual_seed(0))
    masks = [torch.ones(1, TOKENS, dtype=torch.bool) for _ in range(2 * LAYERS)]
    for layer, tokens in skips.items():
        masks[2 * layer][0, tokens] = False
    cache, ids = KVCache(model.config, 1, TOKENS, dtype=torch.float64), list(range(TOKENS))
    with torch.no_grad():
        _, trace = model(torch.tensor([ids]), cache=cache, policy=SkipPolicy("given", masks=masks), compute="compact")
    return model, ids, torch.cat(trace.keep)[::2], sources(cache)


class Day:
    """The embedded model with scalar gates drawn at random reads a prompt under frozen thresholds, one per branch.

    scores, keep (2L, S), thresholds (2L floats), sources (L, S), words (S strings); busy, idle: the tokens drawn.
    """

    def __init__(self, share=0.45, seed=0):                      # share: what the thresholds are to skip, about
        folder, generator = HERE / "tiny-llama", torch.Generator().manual_seed(seed)
        self.model, tokenizer = load_model(folder, GateConfig("scalar"), dtype=torch.float64), load_tokenizer(folder)
        with torch.no_grad():
            for gate in (module for module in self.model.modules() if isinstance(module, Gate)):
                gate.out.weight.normal_(0, gate.out.in_features ** -0.5, generator=generator)
                gate.out.bias.zero_()
            self.ids = encode_prompt(tokenizer, min((e.question for e in arithmetic(50, "test")), key=len))
            self.words = [piece.strip() for piece in pieces(tokenizer, self.ids)]
            cache = KVCache(self.model.config, 1, len(self.ids), dtype=torch.float64)
            everyone = self.model(torch.tensor([self.ids]))[1]   # fresh thresholds: from a run that skips nothing
            self.thresholds = [frozen_threshold(scores[0], share) for scores in everyone.scores]
            policy = SkipPolicy("frozen", 1 - share, thresholds=self.thresholds)
            _, trace = self.model(torch.tensor([self.ids]), cache=cache, policy=policy, compute="compact")
        self.scores, self.keep, self.sources = torch.cat(trace.scores), torch.cat(trace.keep), sources(cache)
        ran = {token: int(self.keep[:, token].sum()) for token, word in enumerate(self.words) if word.isalpha()}
        self.busy, self.idle = max(ran, key=ran.get), min(ran, key=ran.get)


# ---------------------------------------------------------------------------------------------------------------------
# The pictures
# ---------------------------------------------------------------------------------------------------------------------

def sheet(width, height, title):
    """(figure, axis) in inches from the lower left: a light sheet, readable on a dark page too."""
    figure = plt.figure(figsize=(width, height), facecolor=PAPER)
    axis = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(0, height))
    axis.axis("off")
    figure.suptitle(title, x=0.5, y=1 - 0.12 / height, va="top", fontsize=13.5, color=INK)
    return figure, axis


def say(axis, x, y, text, ha="left", size=12.5):
    lines = text.split("\n")                                     # each its own text: centred in any reader's font
    for i, line in enumerate(lines):
        axis.text(x, y + 0.2 * ((len(lines) - 1) / 2 - i), line, ha=ha, va="center", fontsize=size, color=INK, zorder=3)


def fill(axis, x, y, width, height, colour, **how):
    """A rectangle with its lower left corner at (x, y)."""
    axis.add_patch(plt.Rectangle((x, y), width, height, facecolor=colour, clip_on=False, **how))


def box(axis, x, y, text, colour, width, height, dashed=False):
    """Around (x, y). Dashed: what the token skips."""
    fill(axis, x - width / 2, y - height / 2, width, height, colour, edgecolor=INK, linewidth=1.2,
         linestyle=(0, (3, 2)) if dashed else "-", zorder=2)
    if text:
        say(axis, x, y, text, "center")


def arrow(axis, *points, colour=INK, head=11, width=1.4):
    """A line through points (x, y), with a head at the last."""
    if len(points) > 2:
        axis.plot(*zip(*points[:-1]), color=colour, linewidth=width, solid_capstyle="round", clip_on=False, zorder=1)
    axis.annotate("", points[-1], points[-2], zorder=1, arrowprops=dict(
        arrowstyle="-|>", color=colour, linewidth=width, shrinkA=0, shrinkB=0, mutation_scale=head))


def draw_branch(day):
    """One gated branch, and what two tokens of the day did at one."""
    figure, axis = sheet(6.2, 5.75, "one branch (attention or MLP), one token")
    bus = 0.45                                                   # x of the residual stream
    arrow(axis, (bus, 1.2), (bus, 5.2), width=2.8, head=18)
    say(axis, 0.2, 1.02, "h, the residual stream")
    box(axis, 2.1, 1.7, "x = norm(h)", PAPER, 1.45, 0.45)
    box(axis, 4.8, 2.35, "g = σ(W x + b)", GREY, 1.9, 0.45)
    box(axis, 4.8, 3.25, "score = mean of g\nscore > τ ?", GREY, 1.9, 0.65)
    box(axis, 2.1, 3.25, "o = f(x)", GREEN, 1.45, 0.45)
    box(axis, 2.1, 4.2, "g * o", GREEN, 1.45, 0.45)
    arrow(axis, (bus, 1.7), (1.375, 1.7))
    arrow(axis, (2.825, 1.7), (4.8, 1.7), (4.8, 2.125))
    arrow(axis, (4.8, 2.575), (4.8, 2.925))
    arrow(axis, (2.1, 1.925), (2.1, 3.025))
    say(axis, 2.0, 2.4, "only if\nit passes", "right")
    arrow(axis, (3.85, 3.25), (2.825, 3.25))
    say(axis, 3.15, 3.42, "yes", "center")
    arrow(axis, (2.1, 3.475), (2.1, 3.975))
    arrow(axis, (3.85, 2.35), (3.5, 2.35), (3.5, 4.2), (2.825, 4.2))
    say(axis, 3.42, 2.72, "g", "right")
    arrow(axis, (1.375, 4.2), (bus + 0.15, 4.2))
    axis.plot(bus, 4.2, "o", color=PAPER, markeredgecolor=INK, markersize=19, zorder=2)
    say(axis, bus, 4.2, "+", "center", 15)
    arrow(axis, (5.35, 3.575), (5.35, 4.75), (bus + 0.06, 4.75), colour=BROWN)
    say(axis, 5.25, 4.2, "no", "right")
    say(axis, 0.7, 4.97, "skipped: h stays; attention's K and V are copied up")
    branch = next(b for b in range(2, len(day.keep), 2) if day.keep[b, day.busy] and not day.keep[b, day.idle])
    say(axis, 0.2, 0.6, f"for example two tokens at attention {branch // 2}, with τ = {day.thresholds[branch]:.2f}:")
    for x, token in ((0.2, day.busy), (3.1, day.idle)):
        passes = "> τ, passes" if day.keep[branch, token] else "≤ τ, skips"
        say(axis, x, 0.28, f"“{day.words[token]}”: {day.scores[branch, token]:.2f} {passes}")
    return figure


def draw_cache(keep, source):
    """keep (L, S) bool of the attentions, source (L, S): of cache_of_a_run."""
    layers, tokens = keep.shape
    figure, axis = sheet(5.6, 2.05 + 1.1 * layers, "the KV cache: who made what a slot holds")
    for layer in range(layers):
        y = 2.1 + 1.1 * layer
        say(axis, 0.15, y, f"layer {layer}")
        for token in range(tokens):
            x, copied = 1.35 + 0.9 * token, source[layer, token] < layer
            box(axis, x, y, f"K V\nof {source[layer, token]}", ORANGE if copied else GREEN, 0.72, 0.62,
                dashed=not keep[layer, token])
            if copied:
                arrow(axis, (x, y - 0.79), (x, y - 0.31), colour=BROWN)
    for token in range(tokens):
        say(axis, 1.35 + 0.9 * token, 1.6, f"token {token}", "center")
    for y, colour, dashed, text in ((1.2, GREEN, False, "runs this attention: K and V are its own"),
                                    (0.86, ORANGE, True, "skips it: K and V come up from the layer below"),
                                    (0.52, GREEN, True, "skips layer 0: nothing is below, so its own")):
        box(axis, 0.35, y, "", colour, 0.36, 0.22, dashed)
        say(axis, 0.68, y, text)
    say(axis, 0.15, 0.19, "Later tokens look at every slot, copied or not.")
    return figure


def draw_day(day):
    """The way of two tokens up through all branches."""
    branches, step, foot = len(day.keep), 0.42, 2.25             # inches per branch; y of the first
    top = foot + step * branches
    figure, axis = sheet(6.2, top + 0.95, f"the day of two tokens: up through {branches} branches")
    for layer in range(0, branches // 2, 2):                     # a band behind every other layer
        fill(axis, 0, foot + step * (2 * layer - 0.5), 6.2, 2 * step, "#eef0ee", zorder=0)
    for left, token in ((0.1, day.busy), (3.2, day.idle)):
        slot, bus, boxes, gauge = left + 0.4, left + 0.96, left + 1.52, left + 1.95
        say(axis, left, top + 0.42, f"“{day.words[token]}”", size=13.5)
        say(axis, left, top + 0.12, f"runs {int(day.keep[:, token].sum())} of {branches}")
        say(axis, gauge + 0.27, top + 0.12, "score", "center")
        say(axis, bus, foot - 0.5, "h", "center")
        arrow(axis, (bus, foot - 0.37), (bus, top - 0.03), width=2.8, head=16)
        for branch in range(branches):
            (layer, is_mlp), y = divmod(branch, 2), foot + step * branch
            ran, score, tau = bool(day.keep[branch, token]), float(day.scores[branch, token]), day.thresholds[branch]
            name, colour = (f"mlp {layer}", BLUE) if is_mlp else (f"attn {layer}", GREEN)
            box(axis, boxes, y, name, colour if ran else PAPER, 0.66, 0.3, dashed=not ran)
            if ran:
                arrow(axis, (bus, y - 0.08), (boxes - 0.33, y - 0.08), head=7, width=1.1)
                arrow(axis, (boxes - 0.33, y + 0.08), (bus + 0.02, y + 0.08), head=7, width=1.1)
            fill(axis, gauge, y - 0.06, 0.54, 0.12, GREY, zorder=1)
            fill(axis, gauge, y - 0.06, 0.54 * score, 0.12, INK if ran else FAINT, zorder=2)
            fill(axis, gauge + 0.54 * tau - 0.015, y - 0.14, 0.03, 0.28, BROWN, zorder=3)
            say(axis, gauge + 0.59, y, f"{score:.2f}")
            if not is_mlp:
                source = int(day.sources[layer, token])
                box(axis, slot, y, f"K V of {source}", ORANGE if source < layer else GREEN, 0.8, 0.3, dashed=not ran)
                if source < layer:
                    arrow(axis, (slot, y - 2 * step + 0.15), (slot, y - 0.15), colour=BROWN)
    box(axis, 0.5, 1.4, "attn 1", GREEN, 0.66, 0.3)
    say(axis, 1.0, 1.4, "score > τ: it runs, and g * f(x) is added to h")
    box(axis, 0.5, 1.03, "attn 1", PAPER, 0.66, 0.3, dashed=True)
    say(axis, 1.0, 1.03, "score ≤ τ: skipped, h walks by unchanged")
    box(axis, 0.5, 0.66, "K V of 0", ORANGE, 0.8, 0.3, dashed=True)
    say(axis, 1.0, 0.66, "its K and V there: copied up (layer 0: its own)")
    fill(axis, 0.485, 0.15, 0.03, 0.28, BROWN)
    say(axis, 1.0, 0.29, "τ of the branch, frozen (gates drawn at random)")
    return figure


def svg_of(figure):
    """The bytes of a figure, the same each time; its texts are text."""
    buffer = io.BytesIO()
    with plt.rc_context({"svg.hashsalt": "gateskip", "svg.fonttype": "none",
                         "font.sans-serif": ["DejaVu Sans", "Verdana"]}):        # what a reader has: of equal widths
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    plt.close(figure)
    return buffer.getvalue()


def pictures():
    """{file name: figure}"""
    day = Day()
    return {"branch.svg": draw_branch(day), "cache.svg": draw_cache(*cache_of_a_run()[2:]), "day.svg": draw_day(day)}


def main():
    Parser("Draw the diagrams: branch.svg, cache.svg and day.svg.").parse_args()
    if plt is None:
        return 1
    for name, figure in pictures().items():
        write(HERE / name, svg_of(figure))
        print(f"written: {HERE / name}")
    return 0


if __name__ == "__main__":
    run(main)
