"""Do larger models gain more from gates? The embedded model at three depths and a width, over seeds.

    python paper/larger_models.py --jobs 2                       # all that paper/results/larger.json lacks yet
    python paper/larger_models.py --from-results                 # the tables again, without training

The smaller ones are those that frontier.py trains from scratch; then each is tuned twice, dense and by our recipe. Of
8 layers are the embedded model's own runs, which table5_ablations.py keeps. Savings are of each model's own dense work:
the second table asks what gates cost a model of that size.
"""
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from console import InputError, run
from flags import Parser, seed_number, whole

import frontier
import study
import table5_ablations
import testbed
from table5_ablations import TARGETS, curve, models, table

FILE, OURS = frontier.LARGER, "ours, lambda 0.1, K and V dense"
RECIPE = models()[OURS].stages[0]
SIZES = {name: next(sizes[name] for sizes in frontier.SMALLER.values() if name in sizes)
         for name in ("4 layers", "6 layers", "width 72")}
EMBEDDED = "8 layers"


def one(name, seed, threads):
    """Make a model of that size, tune and measure it with gates and without: an entry of the results."""
    folder, rows = study.folder_of(f"larger {name}", seed), []
    with study.logged(folder, threads):
        start = frontier.from_scratch(name, SIZES[name], seed)
        for row, flags, view in ((name, RECIPE, "frozen"), (f"{name}, dense", "--gate none", "none")):
            testbed.trained([[*flags.split(), "--model", str(start)]], seed, folder)
            rows += [{"row": row, **r} for r in testbed.sweep(folder, [view], seed)]
    shutil.rmtree(folder)
    return study.entry_of(name, seed, flags=RECIPE, testbed=[testbed.STEPS, testbed.PROBLEMS], rows=rows)


def embedded():
    """Entries of 8 layers, as one() makes them: of each seed that table5_ablations has with gates and without."""
    rows = {(e["model"], e["seed"]): e["rows"] for e in study.entries(table5_ablations.FILE)}
    named = lambda model, seed, name: [{**r, "row": name} for r in rows[model, seed] if r["row"] == model]
    return [{"model": EMBEDDED, "seed": seed,
             "rows": named(OURS, seed, EMBEDDED) + named("dense", seed, f"{EMBEDDED}, dense")}
            for model, seed in rows if model == OURS and ("dense", seed) in rows]


def of_dense(runs):
    """Markdown lines: what is left of the dense accuracy of the same size and seed, %, at exactly TARGETS."""
    lines = ["| of its own dense model | seeds | " + " | ".join(f"{t}%" for t in TARGETS) + " |",
             "|---" * (len(TARGETS) + 2) + "|"]
    for name in (*SIZES, EMBEDDED):
        left = []
        for r in (r for r in runs if r["model"] == name):
            dense = next((row["accuracy"] for row in r["rows"] if row["row"] == f"{name}, dense"), None)
            gated = [row for row in r["rows"] if row["row"] == name]
            left.append(curve([(row["macs_saved"], row["accuracy"] / dense) for row in gated] if dense else []))
        if left:
            lines.append(f"| {name} | {len(left)} | " + " | ".join(map(study.mean_std, zip(*left))) + " |")
    return lines


def main(argv=None):
    p = Parser("Gates on models of several sizes: what they cost at the same share of MACs saved.")
    p.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES), help="to train (default: all)")
    p.add_argument("--seeds", type=seed_number, nargs="+", default=[1, 2, 3], help="of the trainings")
    p.add_argument("--jobs", type=whole(1), default=1, help="models at a time; they share torch's threads")
    p.add_argument("--from-results", action="store_true", help="print the tables of what is there, train nothing")
    args = p.parse_args(argv)
    if not args.from_results:
        study.study(FILE, [[(name, seed) for seed in args.seeds for name in args.sizes]], one, args.jobs)
    if not (runs := study.entries(FILE) + embedded()):
        raise InputError(f"{study.RESULTS / FILE} holds no results yet: leave out --from-results")
    print("exact answers, %, mean ± sample deviation over seeds; -: not reached\n")
    rows = [row for name in (*SIZES, EMBEDDED) for row in (f"{name}, dense", name)]
    print("\n".join([*table(runs, "macs_saved", rows), "", *of_dense(runs)]))


if __name__ == "__main__":
    run(main, interrupted="the tables stand as they are; the same command goes on with them")
