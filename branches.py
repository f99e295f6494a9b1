"""What each branch gets: the share of tokens that ran it, by layer, attention and MLP apart, printed and drawn.

Under one threshold for the whole model the budget is far from uniform. Here L layers have 2L shares in [0, 1], in the
order attn 0, mlp 0, attn 1, ...; `parts` is {"prompt": 2L, "answer": 2L}, or {"all": 2L} where that is not told apart.
"""
from importlib.util import find_spec
from pathlib import Path

from console import InputError, pyplot
from disk import check_file, write_figure

SHARE = "share of tokens that ran the branch"
NAMES = {"prompt": "prompt", "answer": "generated", "all": "all"}
BAR = "█"                                                        # one character only: a terminal may lack it


def picture(path):
    """The type of --show-branches [PNG]: the path, "" without one. InputError for what could not be drawn later."""
    if path:
        if not path.endswith(".png"):
            raise InputError(f"{path} must end in .png")
        if find_spec("matplotlib") is None:
            raise InputError(f"{path}: matplotlib is not installed (pip install matplotlib), or leave the file out")
        if Path(path).name in ("eval.png", "metrics.png"):
            raise InputError(f"{path} cannot be written (a run's curves have that name): give another file")
        check_file(path)
    return path


SHOW_BRANCHES = dict(nargs="?", const="", type=picture, metavar="PNG",           # the same in every command
                     help="print the share of tokens that ran each branch, and draw it into this file if one is named")


def parts_of(report):
    """The parts of a Savings.report()."""
    return ({part: report[part]["branches"] for part in ("prompt", "answer") if part in report}
            or {"all": report["branches"]})


def show(title, kept, path=""):
    """Print the shares of each budget, and draw them where there is a path. kept: {budget: parts}."""
    for budget, parts in kept.items():
        print("", *lines_of(f"{title}, budget {budget:g}", parts), sep="\n")
    if path and draw(title, kept, path):
        print(f"written: {path}")


def lines_of(title, parts):
    """Lines to print: what it is, the columns, one line per layer; where nothing was skipped, one line in all."""
    head = f"{title}: {SHARE}"
    if all(share == 1.0 for shares in parts.values() for share in shares):
        return [f"{head}: 100% in every layer"]
    columns = {f"{branch}, {NAMES[part]}": shares[first::2] for first, branch in enumerate(("attention", "MLP"))
               for part, shares in parts.items()}                # L shares each
    lines = [head, "layer  " + "".join(f"{name:23}" for name in columns).rstrip()]
    for layer, row in enumerate(zip(*columns.values())):
        cells = [f"{share:6.1%} {BAR * round(10 * share):16}" for share in row]
        lines.append(f"{layer:5}  {''.join(cells)}".rstrip())
    return lines


def draw(title, kept, path):
    """The shares as a PNG: bars for one budget, else a heat map; of generated tokens where told apart. True: drawn."""
    plt = pyplot()
    if plt is None:
        return
    part = next(p for p in ("answer", "prompt", "all") if all(p in parts for parts in kept.values()))
    shares = [parts[part] for parts in kept.values()]            # a row of 2L per budget
    layers, several = len(shares[0]) // 2, len(shares) > 1
    figure, axes = plt.subplots(1, 2, sharey=True, layout="constrained",
                                figsize=(max(8, 3 + 0.9 * len(shares)), 1.8 + 0.24 * max(layers, 8)))
    for first, (axis, branch) in enumerate(zip(axes, ("attention", "MLP"))):
        by_budget = [row[first::2] for row in shares]            # L each
        if several:
            image = axis.imshow([*zip(*by_budget)], cmap="viridis", vmin=0, vmax=1, aspect="auto")
            for x, column in enumerate(by_budget):
                for layer, share in enumerate(column):
                    axis.text(x, layer, f"{share:.0%}", ha="center", va="center", fontsize=7,
                              color="white" if share < 0.6 else "black")
            axis.set(xlabel="budget", xticks=range(len(kept)), xticklabels=[f"{budget:g}" for budget in kept])
        else:
            bars = axis.barh(range(layers), by_budget[0])
            axis.bar_label(bars, [f"{share:.1%}" for share in by_budget[0]], padding=2, fontsize=7)
            axis.set(xlabel=SHARE, xlim=(0, 1.2), xticks=[0, 0.25, 0.5, 0.75, 1])
        axis.set(title=branch, yticks=range(layers), ylim=(layers - 0.5, -0.5))                  # layer 0 on top
    axes[0].set_ylabel("layer")
    if several:
        figure.colorbar(image, ax=axes, label=SHARE, format="{x:.0%}")
    whose = title if several else f"{title}, budget {next(iter(kept)):g}"
    figure.suptitle(f"{whose}: {NAMES[part]} tokens")
    write_figure(path, figure)
    return True
