"""Figure 4: the mean gate by token type and layer, attention and MLP apart, prompts and answers apart.

    python paper/figure4_token_types.py --model RUN --out runs/figure4.png

A type is read off the decoded text, so that any tokenizer will do:
  number         digits, with points and commas between them
  function word  a word of the list below, in any case
  other word     letters, an apostrophe between them too
  mark           punctuation and operators
  blank          a token of spaces and line ends only
  special        what the tokenizer calls so: BOS, ...
A token has the type of the first character in it that is no blank; where it ends no character (the first bytes of one)
that of the character it begins. So the parts of a word share its type.

Shapes: L layers, N tokens, K types that occur.
"""
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from console import pyplot, run

import torch
import torch.nn.functional as F

from collected import collect, figure_flags, keep, parsed, read_texts
from data import load_examples
from tokens import pieces

TYPES = ("number", "function word", "other word", "mark", "blank", "special")
FUNCTION = set("""
    a an the this that these those each every all both some any no how what which who whose when where why
    i you he she it we they me him her us them my your his its our their there
    about after at before between by for from in into of off on out over per than to under until up with without
    and as but if or so then while because
    am are be been can could did do does had has have is may might must not now shall should was were will would
""".split())
CHARACTERS = re.compile(r"(?P<number>\d+(?:[.,]\d+)*)|(?P<word>[^\W\d_]+(?:['’][^\W\d_]+)*)|(?P<mark>\S)")
BRANCHES = ("attention", "MLP")


def types_of(tokenizer, ids):
    """The type of each of a text's ids, a number into TYPES: a list as long."""
    special = {token for token, added in tokenizer.get_added_tokens_decoder().items() if added.special}
    parts = pieces(tokenizer, ids)                               # what each adds to the whole
    text, types, end = "".join(parts), [], 0
    of = ["blank"] * len(text)                                   # the type of each character
    for found in CHARACTERS.finditer(text):
        kind = found.lastgroup
        if kind == "word":
            kind = "function word" if found[0].lower() in FUNCTION else "other word"
        of[found.start():found.end()] = [kind] * len(found[0])
    for token, part in zip(ids, parts):
        start, end = end, end + len(part)
        its = [kind for kind in of[start:max(end, start + 1)] if kind != "blank"] or ["blank"]
        types.append(TYPES.index("special" if token in special else its[0]))
    return types


def means_by_type(scores, groups, n):
    """scores (2L, N), groups (N,) numbers below n -> (means (2L, n), counts (n,)); NaN for a group without tokens."""
    member = F.one_hot(groups, n).double()                       # (N, n)
    return scores @ member / member.sum(0), member.sum(0).long()


def draw(means, names):
    """Type by layer, a panel for attention and one for the MLP, each with its own colours. means (2L, K) -> a figure"""
    layers = len(means) // 2
    figure, axes = pyplot().subplots(1, 2, sharey=True, layout="constrained",
                                     figsize=(6 + 0.3 * max(layers, 8), 1.6 + 0.34 * len(names)))
    for branch, axis in enumerate(axes):
        table = means[branch::2].T                               # (K, L)
        image = axis.imshow(table.numpy(), cmap="viridis", aspect="auto", interpolation="nearest")
        middle = (table.min() + table.max()) / 2
        for row, values in enumerate(table.tolist() if layers <= 16 else ()):
            for layer, x in enumerate(values):
                axis.text(layer, row, f"{x:.2f}".lstrip("0"), ha="center", va="center", fontsize=7,
                          color="white" if x < middle else "black")
        axis.set(title=BRANCHES[branch], xlabel="layer", xticks=range(0, layers, 1 + layers // 17),
                 yticks=range(len(names)), yticklabels=names)
        figure.colorbar(image, ax=axis, label="mean gate (0 to 1)")
    return figure


def main(argv=None):
    args = parsed(figure_flags("Mean gate by token type and layer (Figure 4)."), argv, "types")
    model, tokenizer, policy, texts = read_texts(args, load_examples(args.data, "test", args.limit))
    m, types = collect(model, texts, policy), [kind for ids, _ in texts for kind in types_of(tokenizer, ids)]
    groups = torch.tensor(types) + len(TYPES) * m.answer         # (N,): first the prompt's types, then the answer's
    means, counts = means_by_type(m.scores, groups, 2 * len(TYPES))
    rows = counts.nonzero()[:, 0].tolist()                       # K that occur
    names = [f"{('prompt', 'answer')[i // len(TYPES)]}: {TYPES[i % len(TYPES)]}" for i in rows]
    means, counts = means[:, rows], counts[rows].tolist()
    print(f"{'type':23} {'tokens':>9}" + "".join(f"{name:>12}: mean  (layers low to high)" for name in BRANCHES))
    for name, n, gates in zip(names, counts, means.T):
        cells = (f"{x.mean():16.4f} ({x.min():8.4f} - {x.max():.4f})" for x in (gates[0::2], gates[1::2]))
        print(f"{name:23} {n:9,}  {' '.join(cells)}")
    figure = draw(means, [f"{name}  n = {n:,}" for name, n in zip(names, counts)])
    keep(args, figure, model, types={name: {"count": n, "attention": gates[0::2].tolist(), "MLP": gates[1::2].tolist()}
                                     for name, n, gates in zip(names, counts, means.T)})
    return 0


if __name__ == "__main__":
    run(main)
