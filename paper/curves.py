"""Rows of models at several budgets as curves: a table, the loss at given savings, and a picture.

A row is a dict: model, policy, budget, loss, perplexity, accuracy (of tokens), the three numbers skipped,
skipped_per_call and macs_saved, and of_reference: the share saved of another, dense model's work.
"""
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from console import pyplot

from disk import write_figure
from sweep import interpolate

HEADER = f"{'model':24} policy budget      loss perplexity accuracy  skipped per call macs_saved of reference"


def line_of(r):
    """A row as printed under HEADER."""
    return (f"{r['model']:24} {r['policy']:6} {r['budget']:6.3f} {r['loss']:9.4f} {r['perplexity']:10.4g} "
            f"{r['accuracy']:8.1%} {r['skipped']:8.1%} {r['skipped_per_call']:8.1%} {r['macs_saved']:+10.1%} "
            f"{r['of_reference']:+12.1%}")


def curves(rows):
    """{label: its rows, by of_reference}: one per model and policy; each has the row in which nobody skips ("none")."""
    found = {}
    for name in dict.fromkeys(r["model"] for r in rows):
        mine = sorted((r for r in rows if r["model"] == name), key=lambda r: r["of_reference"])
        for policy in sorted({r["policy"] for r in mine} - {"none"}) or ["none"]:
            label = name if policy == "none" else f"{name}, {policy}"
            found[label] = [r for r in mine if r["policy"] in (policy, "none")]
    return found


def lines_at(rows, percentages, plain):
    """Lines to print: the loss, and of plain text its exponential, at these percentages of the reference's MACs saved,
    interpolated linearly in the loss. Where nothing was measured on one side: "-"."""
    lines = []
    for title, of in (("loss", float), ("perplexity", math.exp))[:1 + plain]:
        lines += ["", f"{title + ' at % of MACs saved':36}" + "".join(f"{x:10g}" for x in percentages)]
        for label, mine in curves(rows).items():
            values = interpolate([(100 * r["of_reference"], r["loss"]) for r in mine], percentages)
            lines.append(f"{label:36}" + "".join("         -" if v is None else f"{of(v):10.4f}" for v in values))
    return lines


def plot(rows, plain, path):
    """Loss, or perplexity of plain text on a logarithmic axis, against MACs saved of the reference. True: drawn."""
    plt, key = pyplot(), "perplexity" if plain else "loss"
    if plt is None:
        return
    figure, axis = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for label, mine in curves(rows).items():
        axis.plot([100 * r["of_reference"] for r in mine], [r[key] for r in mine], "o-", markersize=4, label=label)
    axis.set(xlabel="multiply-accumulates saved of the dense reference, gates paid, %",
             ylabel="perplexity" if plain else "answer loss, nats", yscale="log" if plain else "linear")
    axis.grid(alpha=0.3)
    axis.legend()
    write_figure(path, figure)
    return True
