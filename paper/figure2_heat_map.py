"""Figures 2 and 5: the mean gate of each token at each branch, for one text; attention and MLP apart.

    python paper/figure2_heat_map.py --model RUN --out runs/figure2.png
    python paper/figure2_heat_map.py --model RUN --text "Joe has 20 horses." --out runs/horses.png

Nothing is averaged but the channels of a gate. The text is a problem of --data with its answer, as training has it, or
--text as it stands; with the BOS where the tokenizer has one. Below budget 1, pairs that were skipped have a cross.
One text is an anecdote.

Shapes: L layers, S tokens.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from console import InputError, pyplot, run
from flags import whole

from collected import collect, figure_flags, keep, parsed, read_texts, visible
from data import load_examples
from tokens import pieces

BRANCHES = ("attention", "MLP")


def lines_of(labels, scores):
    """Lines to print: of each token the mean gate over layers, and the layers with its lowest and highest gate."""
    lines = ["token" + " " * 21 + "".join(f"{name:>10}: mean   lowest (layer)  highest (layer)" for name in BRANCHES)]
    for i, label in enumerate(labels):
        cells = ""
        for gates in (scores[0::2, i], scores[1::2, i]):         # (L,) each
            low, high = int(gates.argmin()), int(gates.argmax())
            cells += f"{gates.mean():16.4f}{gates[low]:10.4f} ({low:2}) {gates[high]:11.4f} ({high:2})"
        lines.append(f"{i:4} {label:20} {cells}")
    return lines


def draw(labels, scores, kept, first_new):
    """Two heat maps, layer by token; each has a colour scale of its own. first_new: where the answer begins, or None.

    labels: S strings; scores, kept (2L, S). -> the figure."""
    layers, count = len(scores) // 2, len(labels)
    figure, axes = pyplot().subplots(2, 1, sharex=True, layout="constrained",
                                     figsize=(max(6, 2 + 0.18 * count), 2.2 + 2 * max(1.3, 0.13 * layers)))
    for branch, axis in enumerate(axes):
        image = axis.imshow(scores[branch::2].numpy(), cmap="viridis", aspect="auto", interpolation="nearest")
        layer, token = (~kept[branch::2]).nonzero(as_tuple=True)
        axis.plot(token.tolist(), layer.tolist(), "x", color="white", markersize=3, markeredgewidth=0.7)
        axis.set(ylabel="layer", title=BRANCHES[branch], yticks=range(0, layers, 1 + layers // 12))
        if first_new is not None:
            axis.axvline(first_new - 0.5, color="white", linewidth=1.5, linestyle=":")
        figure.colorbar(image, ax=axis, label="mean gate (0 to 1)", pad=0.01)
    marks = ("the answer right of the dots", "x: skipped")
    said = [mark for mark, there in zip(marks, (first_new is not None, not kept.all())) if there]
    axes[1].set_xlabel("; ".join(["token", *said]))
    axes[1].set_xticks(range(count), labels, rotation=90, fontsize=8, family="monospace")
    return figure


def main(argv=None):
    p = figure_flags("Heat map of one text's gates (Figures 2 and 5).", 96, "tokens of the text")
    p.add_argument("--text", help="this text, in place of a problem of --data")
    p.add_argument("--problem", type=whole(1), default=1, help="which of --data's, counted from 1")
    args = parsed(p, argv, "heat_map")
    examples = load_examples(args.data, "test", args.problem) if args.text is None else [args.text] * args.problem
    if len(examples) < args.problem:
        raise InputError(f"--problem {args.problem}: {args.data} has only {len(examples)}")
    model, tokenizer, policy, texts = read_texts(args, examples[-1:])
    ids, answer = (part[:args.limit] for part in texts[0])
    m, labels = collect(model, [(ids, answer)], policy), [*map(visible, pieces(tokenizer, ids))]
    print(*lines_of(labels, m.scores), sep="\n")
    figure = draw(labels, m.scores, m.kept, answer.index(True) if True in answer else None)
    rows = {name: m.scores[branch::2].tolist() for branch, name in enumerate(BRANCHES)}          # L rows of S each
    keep(args, figure, model, heat_map={"tokens": labels, "ids": ids, "answer": answer, **rows,
                                        "kept": m.kept.int().tolist()})
    return 0


if __name__ == "__main__":
    run(main)
