"""Table 1: GateSkip beside every method that the paper compares with, on the embedded model, over seeds.

    python paper/table1_baselines.py --jobs 2                    # all that paper/results/table1.json lacks yet
    python paper/table1_baselines.py --rows CALM SkipLayer --seeds 1
    python paper/table1_baselines.py --from-results              # the table again, without training

Every row is trained by train.py's own loop from the same model, for as many steps on the same data, and measured by the
answers it generates; each method's own work (its routers, its softmax tests) is paid. GateSkip and random are those of
table5_ablations.py; dense is random at 0. Stopped, it goes on with the same command.
"""
import shutil
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Callable

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from console import InputError, run
from flags import Parser, seed_number, whole

from tqdm import tqdm

import calm
import free
import layerskip
import mindskip
import mixture_of_depths
import skiplayer
import study
import table5_ablations
import testbed
from eval_gsm8k import run_row
from gates import SkipPolicy
from load_weights import load_model, load_tokenizer

FILE, OF_TABLE_5 = "table1.json", ("dense, random", "paper", "ours", "ours, lambda 0.1, K and V dense")
SAVINGS = (0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5)             # asked for; the table is read at what came of it
FALLING = "--budget-end 0.6"                                     # of routers, as of gates in the paper's row of Table 5
FROZEN = "--lr 1e-2 --sparsity-weight 0.1"                       # a thousandth moves no router in so few steps


# ---------------------------------------------------------------------------------------------------------------------
# The rows: how a method is trained, and how it is brought to save a given share
# ---------------------------------------------------------------------------------------------------------------------

def by_threshold(opened, thresholds, folder, items):
    """Early exits. Yields (saving asked for, model, policy), the model's threshold set as its turn comes. CALM as their
    code: at the thresholds that would save so much if who leaves did not wait for the others."""
    model = opened(folder)
    model.waits = False                                          # CALM's alone
    found = thresholds(model, items, SAVINGS)
    model.waits = True
    for saving, tau in found.items():
        if tau is not None:                                      # else out of this method's reach
            model.threshold = tau
            yield saving, model, SkipPolicy()


def by_exit(folder, items):
    """LayerSkip: all tokens leave after block E, for each E. Yields as by_threshold."""
    for saving, model in layerskip.exits(load_model(folder)).items():
        yield saving, model, SkipPolicy()


def by_policy(method, folder, items):
    """Routers: frozen thresholds, then the router's own decision (saving None). Yields as by_threshold; of MindSkip
    shares of attention, half as much of all."""
    model = method.open_model(folder)
    for budget, policy in method.policies(model, items, [1.0 - s for s in SAVINGS]).items():
        yield 1.0 - budget, model, policy
    yield None, model, method.as_trained(model)


@dataclass
class Method:
    """A training, and the rows that are read off what it made."""
    flags: str                                                   # of train.py
    training: Callable                                           # () -> a context for it
    views: dict                                                  # row -> (folder, items) -> saving, model, policy


MODS = partial(by_policy, mixture_of_depths)
METHODS = {
    "CALM": Method(calm.FLAGS, calm.train_context, {f"CALM, {name}": partial(
        by_threshold, partial(calm.open_calm, confidence=name), calm.thresholds) for name in calm.CONFIDENCES}),
    "FREE": Method("--gate none", free.training, {f"FREE, {name}": partial(
        by_threshold, partial(free.open_free, confidence=name), free.thresholds) for name in free.CONFIDENCES}),
    "LayerSkip": Method("--gate none", layerskip.recipe, {"LayerSkip": by_exit}),
    "Mixture-of-Depths": Method(f"{mixture_of_depths.FLAGS} {FALLING}", mixture_of_depths.training,
                                {"Mixture-of-Depths": MODS}),
    "Mixture-of-Depths, by its router": Method(
        f"{mixture_of_depths.FLAGS} {FALLING}", partial(mixture_of_depths.training, substitute="router"),
        {"Mixture-of-Depths, by its router": MODS}),
    "Mixture-of-Depths, routers alone": Method(
        f"{mindskip.TOKEN_FLAGS} {FROZEN} {FALLING}", mixture_of_depths.training,
        {"Mixture-of-Depths, routers alone": MODS}),
    "MindSkip": Method(f"{mindskip.FLAGS} {FROZEN}", mindskip.training,
                       {"MindSkip": partial(by_policy, mindskip)}),
    "SkipLayer": Method(f"{skiplayer.FLAGS} {FALLING}", skiplayer.training,
                        {"SkipLayer": partial(by_policy, skiplayer)}),
}
AS_PUBLISHED = {                                                 # the one-line deviations of the authors' code
    "CALM, as their code": Method(calm.FLAGS, partial(calm.train_context, True), {
        f"CALM, {name}, as their code": partial(by_threshold, partial(
            calm.open_calm, confidence=name, as_published_code=True), calm.thresholds) for name in calm.CONFIDENCES}),
    "Mixture-of-Depths, as their code": Method(
        f"{mixture_of_depths.FLAGS} --kv dense {FALLING}", partial(mixture_of_depths.training, as_published_code=True),
        {"Mixture-of-Depths, as their code": MODS}),
    "SkipLayer, as their code": Method(
        f"{skiplayer.FLAGS} {FALLING}", partial(skiplayer.training, as_published_code=True),
        {"SkipLayer, as their code": partial(by_policy, skiplayer)}),
}
EVERY = METHODS | AS_PUBLISHED


# ---------------------------------------------------------------------------------------------------------------------
# Training and measuring, one method and seed at a time
# ---------------------------------------------------------------------------------------------------------------------

def sweep(method, folder, seed):
    """Rows of {"row", "asked", *testbed.KEPT, "answer": {...}}: exact answers that the model generates."""
    tokenizer, rows = load_tokenizer(folder), []
    held, problems, how = testbed.held_out(tokenizer, seed)
    for name, view in method.views.items():
        for saving, model, policy in view(folder, held):
            row = run_row(name, model, tokenizer, problems, policy, 1.0 - (saving or 0.0), how)
            rows.append({"row": name, "asked": saving, **testbed.rounded(row)})
            rows[-1]["budget"] = None if saving is None else rows[-1]["budget"]
    return rows


def one(name, seed, threads, stays=False):
    """Train and measure: an entry of the results. stays: the trained folder, too, and its name is printed."""
    started, method, folder = time.perf_counter(), EVERY[name], study.folder_of(name, seed)
    with study.logged(folder, threads):
        testbed.trained([method.flags.split()], seed, folder, tried=method.training)
        trained = time.perf_counter() - started
        rows = sweep(method, folder, seed)
    if stays:
        tqdm.write(f"{name}, seed {seed}: {folder}")
    else:
        shutil.rmtree(folder)
    return study.entry_of(name, seed, flags=method.flags, testbed=[testbed.STEPS, testbed.PROBLEMS], rows=rows,
                          seconds=[round(trained), round(time.perf_counter() - started - trained)])


# ---------------------------------------------------------------------------------------------------------------------
# The table
# ---------------------------------------------------------------------------------------------------------------------

def own_decisions(runs, names):
    """Markdown lines: what the routers of each named row do by themselves, a point on no curve of thresholds."""
    lines = ["| as the router decides | seeds | accuracy | pairs skipped | MACs saved |", "|---" * 5 + "|"]
    for name in names:
        if points := [row for r in runs for row in r["rows"] if (row["row"], row.get("asked", 0.0)) == (name, None)]:
            cells = [study.mean_std([100 * row[key] for row in points])
                     for key in ("accuracy", "skipped", "macs_saved")]
            lines.append(f"| {name} | {len(points)} | " + " | ".join(cells) + " |")
    return lines


def parse_args(argv):
    p = Parser("GateSkip beside every method that the paper compares with, on the embedded model, over seeds.")
    p.add_argument("--rows", nargs="+", choices=EVERY, metavar="METHOD",
                   help="of: " + "; ".join(EVERY) + " (default: all but the last three)")
    p.add_argument("--seeds", type=seed_number, nargs="+", default=[1, 2, 3], help="of each method")
    p.add_argument("--as-published-code", action="store_true", help="also the last three, which differ from the "
                   "methods in the line that the GateSkip authors' code does")
    p.add_argument("--stays", action="store_true", help=f"leave what is trained in {study.WORK}; without it, it goes "
                   "once it is measured")
    p.add_argument("--jobs", type=whole(1), default=1, help="methods at a time; they share torch's threads")
    p.add_argument("--from-results", action="store_true", help="print the tables of all that is there, train nothing")
    return p.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    names = args.rows or [*METHODS, *(AS_PUBLISHED if args.as_published_code else ())]
    if not args.from_results:
        study.study(FILE, [[(name, seed) for name in names for seed in args.seeds]],
                    partial(one, stays=args.stays), args.jobs)
    if not (found := study.entries(FILE)):
        raise InputError(f"{study.RESULTS / FILE} holds no results yet: leave out --from-results")
    curves = study.entries(table5_ablations.FILE) + [
        {**r, "rows": [row for row in r["rows"] if row.get("asked", 0.0) is not None]} for r in found]
    rows = [*OF_TABLE_5, *(row for method in EVERY.values() for row in method.views)]
    print("exact answers, %, mean ± sample deviation over seeds; in brackets the MACs saved, %; -: not reached\n")
    print("\n".join([*table5_ablations.table(curves, "skipped", rows), "",
                      *table5_ablations.table(curves, "macs_saved", rows), "", *own_decisions(found, rows)]))


if __name__ == "__main__":
    run(main, interrupted="the table stands as it is; the same command goes on with it")
