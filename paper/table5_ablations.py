"""Table 5 and what it leaves out: one choice at a time, on the embedded model, over seeds, with what it costs.

    python paper/table5_ablations.py --jobs 2                    # all that paper/results/table5.json lacks yet
    python paper/table5_ablations.py --rows "ours, equal costs" "paper" --seeds 1 2
    python paper/table5_ablations.py --from-results              # the tables again, without training

A study that was stopped goes on with the same command. What is trained lies under runs/study until it is measured.
"""
import contextlib
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from console import InputError, run
from flags import Parser, seed_number, whole

import study
import testbed
from sweep import interpolate

FILE, TARGETS = "table5.json", (0, 5, 10, 15, 20, 25, 30, 40, 50)                # of paper/results; %

# ---------------------------------------------------------------------------------------------------------------------
# The rows
# ---------------------------------------------------------------------------------------------------------------------

PAPER = "--gate vector --budget-end 0.6 --compute compact"       # else Table 15, which ends at 0.8
OURS = ("--gate scalar --threshold global --sparsity-cost macs --sparsity-weight 1 --compute compact "
        "--schedule uniform --budget-end 0.4")                   # the rows vary this
LINEAR = f"{OURS} --schedule linear --budget-end 0.5"            # with the paper's budget, which only falls
PAPER_BUT = {                                                    # "{}" stands for the dense model that was tuned alike
    "scalar gates": "--gate scalar", "shared gates": "--gate-shared", "MLP gates": "--gate-arch mlp",
    "low-rank gates, 4": "--gate-arch lowrank --gate-rank 4", "low-rank gates, 8": "--gate-arch lowrank --gate-rank 8",
    "low-rank gates, 16": "--gate-arch lowrank --gate-rank 16",
    "gate before the module": "--gate-placement before", "gate reads the residual": "--gate-input residual",
    "no gradient through gate inputs": "--gate-detach", "every second layer": "--skip alternate",
    "attention only": "--skip attn", "MLP only": "--skip mlp", "layers, by attention's gate": "--skip layer",
    "lambda 0.01": "--sparsity-weight 0.01", "lambda 1": "--sparsity-weight 1",
    "L1": "--sparsity-loss l1", "KL": "--sparsity-loss kl", "L2 norm": "--sparsity-loss l2_norm",
    "gates at 10 times the rate": "--gate-lr-scale 10", "gates at 30 times the rate": "--gate-lr-scale 30",
    "budget to 0.8": "--budget-end 0.8", "budget to 0.4": "--budget-end 0.4", "uniform budget": "--schedule uniform",
    "MAC costs": "--sparsity-cost macs", "one threshold": "--threshold global",
    "one threshold, MAC costs": "--threshold global --sparsity-cost macs", "three times the steps": "--steps 1800",
    "from the tuned model": "--model {}", "from the tuned model, frozen": "--model {} --freeze-backbone",
}
FASTER_BUT = ("scalar gates", "shared gates", "MLP gates", "gate before the module", "L1", "KL", "attention only",
              "MLP only", "every second layer", "one threshold", "from the tuned model, frozen")     # where it works
OURS_BUT = {
    "per branch": "--threshold branch", "equal costs": "--sparsity-cost equal", "vector gates": "--gate vector",
    "lambda 0.1": "--sparsity-weight 0.1", "lambda 0.3": "--sparsity-weight 0.3",
    "lambda 0.1, K and V dense": "--sparsity-weight 0.1 --kv dense",
    "lambda 0.03, K and V dense": "--sparsity-weight 0.03 --kv dense",
    "per branch, lambda 0.1, K and V dense": "--threshold branch --sparsity-weight 0.1 --kv dense",
    "per branch, gates at 30 times the rate": "--threshold branch --gate-lr-scale 30",
    "per branch, lambda 0.1, K and V dense, gates at 30 times the rate":
        "--threshold branch --sparsity-weight 0.1 --kv dense --gate-lr-scale 30",
    "gates at 10 times the rate": "--gate-lr-scale 10", "budget to 0.5": "--budget-end 0.5",
    "teacher": "--teacher {} --distill-weight 0.5", "from the tuned model": "--model {}",
    "from the tuned model, its pupil": "--model {} --teacher {} --distill-weight 0.5",
    "no gradient through gate inputs": "--gate-detach", "falling lambda": "--sparsity-weight-end 0.1",
    "falling lambda, K and V dense": "--sparsity-weight-end 0.1 --kv dense",
    "falling lambda, K and V dense, from the tuned model": "--sparsity-weight-end 0.1 --kv dense --model {}",
}
BEST = ("falling lambda, K and V dense", "lambda 0.1, K and V dense")
LINEAR_BUT = ("per branch", "equal costs", "lambda 0.3", "gates at 10 times the rate", "teacher",
              "from the tuned model, its pupil")
TUNED = "tuned"                                                  # the dense model's training alone


@dataclass
class Model:
    """What is trained and how it is looked at. stages: flags of train.py; views: {row of the table: view of it}."""
    stages: list
    views: dict
    seeds: int = 3
    tried: str = ""                                              # a key of testbed.TRIED


def models():
    """{name: Model}, in the order of the table."""
    return {
        "dense": Model(["--gate none"], {"dense": "none", "dense, random": "random",
                                         "dense, random, first position kept": "first_kept"}, 5),
        "dense, trained with random skipping": Model(["--gate none --budget-end 0.6"], {
            "dense, trained with random skipping": "random"}, tried="random skipping"),
        "paper": Model([PAPER], {"paper": "frozen", "paper, batch quantile": "batch",
                                 "paper, random tokens": "allocation", "paper, random tokens, even": "random",
                                 "paper, K and V dense at inference": "frozen dense"}, 5),
        **{f"paper, {name}": Model([f"{PAPER} {flags}"], {f"paper, {name}": "frozen"})
           for name, flags in PAPER_BUT.items()},
        **{f"paper, gates at 30 times the rate, {name}": Model(
            [f"{PAPER} --gate-lr-scale 30 {PAPER_BUT[name]}"], {f"paper, gates at 30 times the rate, {name}": "frozen"})
           for name in FASTER_BUT},
        "paper, K and V dense": Model([f"{PAPER} --kv dense"], {
            "paper, K and V dense": "frozen", "paper, K and V dense in training": "frozen copy_up"}),
        "ours": Model([OURS], {"ours": "frozen", "ours, random tokens": "allocation",
                               "ours, random tokens, even": "random"}, 5),
        **{f"ours, {name}": Model([f"{OURS} {flags}"], {f"ours, {name}": "frozen"}, 5 if name in BEST else 3)
           for name, flags in OURS_BUT.items()},
        "ours, K and V dense": Model([f"{OURS} --kv dense"], {
            "ours, K and V dense": "frozen", "ours, K and V dense in training": "frozen copy_up"}),
        "ours, gates first": Model([f"{OURS} --freeze-backbone --lr 1e-2 --steps 200", OURS],
                                   {"ours, gates first": "frozen"}),
        **{f"{name}, threshold of the last step{after}": Model(
            [flags], {f"{name}, threshold of the last step{after}": "frozen"}, tried=tried)
           for after, tried in (("", "last step"), (", after warm-up", "patient"))
           for name, flags in (("ours", OURS), ("linear", LINEAR))},
        "ours, ramp": Model([OURS], {"ours, ramp": "frozen"}, tried="ramp"),
        "linear": Model([LINEAR], {"linear": "frozen", "linear, random tokens": "allocation",
                                   "linear, random tokens, even": "random"}),
        **{f"linear, {name}": Model([f"{LINEAR} {OURS_BUT[name]}"], {f"linear, {name}": "frozen"})
           for name in LINEAR_BUT},
    }


# ---------------------------------------------------------------------------------------------------------------------
# Training and measuring, one model and seed at a time
# ---------------------------------------------------------------------------------------------------------------------

def one(name, seed, threads):
    """Train and measure: an entry. The tuned dense model stays for those that begin with it; TUNED measures nothing."""
    stays, started = name in (TUNED, "dense"), time.perf_counter()
    model, folder = models()["dense" if stays else name], study.folder_of(TUNED if stays else name, seed)
    with study.logged(folder, threads):
        if not (stays and testbed.finished(folder)):
            stages = [flags.replace("{}", str(study.folder_of(TUNED, seed))).split() for flags in model.stages]
            tried = testbed.TRIED[model.tried] if model.tried else contextlib.nullcontext
            testbed.trained(stages, seed, folder, tried=tried)
        if name == TUNED:
            return None
        trained = time.perf_counter() - started
        found = testbed.sweep(folder, model.views.values(), seed)
    if not stays:
        shutil.rmtree(folder)
    names = {view: row for row, view in model.views.items()}
    return study.entry_of(name, seed, flags=model.stages, tried=model.tried, testbed=[testbed.STEPS, testbed.PROBLEMS],
                          seconds=[round(trained), round(time.perf_counter() - started - trained)],
                          rows=[{"row": names[r["view"]], **r} for r in found])


# ---------------------------------------------------------------------------------------------------------------------
# The tables
# ---------------------------------------------------------------------------------------------------------------------

def curve(points):
    """y at exactly TARGETS, all in %, of one seed; None outside of what was measured."""
    return [v if v is None else 100 * v for v in interpolate([(100 * x, y) for x, y in points], TARGETS)]


def table(runs, key, names):
    """Markdown lines: accuracy (%, mean ± sample deviation over seeds) of each named row where exactly so much of `key`
    was saved, "skipped" (beside it the net MACs saved there) or "macs_saved"."""
    what = {"skipped": "(token, branch) pairs skipped", "macs_saved": "MACs saved, gates paid"}[key]
    lines = [f"| {what} | seeds | " + " | ".join(f"{t}%" for t in TARGETS) + " |", "|---" * (len(TARGETS) + 2) + "|"]
    for name in names:
        seeds = [found for r in runs if (found := [row for row in r["rows"] if row["row"] == name])]
        if not seeds:
            continue
        at, paid = (list(zip(*(curve([(r[x], r[y]) for r in found]) for found in seeds)))
                    for x, y in ((key, "accuracy"), ("skipped", "macs_saved")))
        cells = [study.mean_std(a) + (f" ({sum(m) / len(m):.0f})" if key == "skipped" and None not in m else "")
                 for a, m in zip(at, paid)]
        lines.append(f"| {name} | {len(seeds)} | " + " | ".join(cells) + " |")
    return lines


def parse_args(argv):
    p, names = Parser("One choice at a time, on the embedded model, over seeds."), list(models())
    p.add_argument("--rows", nargs="+", metavar="MODEL", help="of: " + "; ".join(names) + " (default: all)")
    p.add_argument("--seeds", type=seed_number, nargs="+", help="default: 1 2 3; dense, paper, ours, its best: to 5")
    p.add_argument("--jobs", type=whole(1), default=1, help="models at a time; they share torch's threads")
    p.add_argument("--from-results", action="store_true", help="print the tables of all that is there, train nothing")
    args = p.parse_args(argv)
    if unknown := [name for name in args.rows or () if name not in names]:
        raise InputError(f"--rows {unknown[0]!r} is no row: --help names them all")
    return args


def main(argv=None):
    args, known = parse_args(argv), models()
    wanted = [(name, seed) for name, model in known.items() if not args.rows or name in args.rows
              for seed in args.seeds or range(1, model.seeds + 1)]
    if not args.from_results:
        done = {(r["model"], r["seed"]) for r in study.entries(FILE)}
        tuned = [(TUNED, seed) for name, seed in wanted
                 if (name, seed) not in done and any("{}" in flags for flags in known[name].stages)]
        study.study(FILE, [tuned, wanted], one, args.jobs)
    if not (runs := study.entries(FILE)):
        raise InputError(f"{study.RESULTS / FILE} holds no results yet: leave out --from-results")
    print("exact answers, %, mean ± sample deviation over seeds; in brackets the MACs saved, %\n")
    rows = list(dict.fromkeys(row for model in known.values() for row in model.views))
    print("\n".join([*table(runs, "skipped", rows), "", *table(runs, "macs_saved", rows)]))


if __name__ == "__main__":
    run(main, interrupted="the study stands as it is; the same command goes on with it")
