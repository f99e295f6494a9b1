"""Figure 3: the vocabulary's ten tokens with the highest mean gate, with the first token of a text and without it.

    python paper/figure3_top_tokens.py --model RUN --out runs/figure3.png

A token's gate is the mean over all 2L branches, and a vocabulary id's that over its occurrences in prompts and answers.
An id that is seen once or twice may top the list by chance: --min-count leaves such out. The error is the standard one
over occurrences, taken as independent, which those of one text are not quite.

Shapes: L layers, N tokens.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from console import InputError, pyplot, run
from flags import whole

import torch

from collected import collect, figure_flags, keep, parsed, read_texts, spelled, visible
from data import load_examples

PANELS = ("all positions", "without position 0")


def means_by_id(ids, gates):
    """ids (N,), gates (N,) float64 -> the V' ids that occur, and of each the count, the mean and its standard error
    (NaN for one occurrence): four tensors (V',)."""
    found, place, count = ids.unique(return_inverse=True, return_counts=True)
    total = lambda x: torch.zeros(len(found), dtype=torch.float64).index_add(0, place, x)
    mean = total(gates) / count
    variance = total((gates - mean[place]) ** 2) / (count - 1)
    return found, count, mean, (variance / count).sqrt()


def top(ids, gates, n, min_count):
    """[(id, count, mean, error)] of the n highest means of ids that occur min_count times, the highest first."""
    rows = [row for row in zip(*(x.tolist() for x in means_by_id(ids, gates))) if row[1] >= min_count]
    return sorted(rows, key=lambda row: -row[2])[:n]


def draw(panels, labels, overall):
    """Means and errors as points, a panel each. panels, labels: {name: rows of top}, {id: text}; overall: {name: the
    mean of all tokens}. -> the figure."""
    rows = max(map(len, panels.values()))
    figure, axes = pyplot().subplots(1, 2, sharex=True, layout="constrained", figsize=(11, 1.6 + 0.32 * rows))
    for axis, (name, found) in zip(axes, panels.items()):
        _, count, mean, error = zip(*found)
        axis.errorbar(mean, range(len(found)), xerr=error, fmt="o", color="#440154", capsize=3, markersize=4)
        axis.axvline(overall[name], color="#999999", linestyle=":", label="mean of all tokens")
        names = [f"{labels[row[0]]}   n = {n:,}" for row, n in zip(found, count)]
        axis.set_yticks(range(len(found)), names, family="monospace")
        axis.set(ylim=(rows - 0.5, -0.5), title=name, xlabel="mean gate of all branches (0 to 1) ± standard error")
        axis.grid(axis="x", alpha=0.3)
        axis.legend(fontsize=8)
    return figure


def main(argv=None):
    p = figure_flags("Tokens with the highest mean gate (Figure 3).")
    p.add_argument("--top", type=whole(1), default=10, help="how many tokens")
    p.add_argument("--min-count", type=whole(2), default=20, help="rarer ids are left out")
    args = parsed(p, argv, "tokens")
    model, tokenizer, policy, texts = read_texts(args, load_examples(args.data, "test", args.limit))
    m, panels, overall = collect(model, texts, policy), {}, {}
    gates = m.scores.mean(0)                                     # (N,): over the 2L branches
    for name, some in zip(PANELS, (m.positions >= 0, m.positions > 0)):
        panels[name] = top(m.ids[some], gates[some], args.top, args.min_count)
        overall[name] = gates[some].mean().item()
        if not panels[name]:
            raise InputError(f"--min-count {args.min_count}: no token occurs as often {name}: lower it, or raise "
                             f"--limit {args.limit}")
    labels = {row[0]: visible(spelled(tokenizer, row[0])) for rows in panels.values() for row in rows}
    for name, rows in panels.items():
        print(f"{name}: mean of all tokens {overall[name]:.4f}")
        print("token                    id   count   mean gate  error")
        print("".join(f"{labels[i]:20} {i:6} {n:7,} {mean:11.4f} {error:.4f}\n" for i, n, mean, error in rows))
    numbers = {name: {"mean": overall[name], "top": [dict(zip(("token", "id", "count", "mean", "error"),
               (labels[row[0]], *row))) for row in rows]} for name, rows in panels.items()}
    keep(args, draw(panels, labels, overall), model, tokens=numbers)
    return 0


if __name__ == "__main__":
    run(main)
