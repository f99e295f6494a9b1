"""The frontier: accuracy against multiply-accumulates saved, of gates and of what is simpler: a smaller dense model.

    python paper/frontier.py --jobs 2                            # trains the smaller models that are not there yet
    python paper/frontier.py --from-results                      # table and picture again, without training

Gated models and random skipping are those of table5_ablations.py. Smaller models: the tuned one without the blocks that
turn the hidden states least (shortgpt.py), tuned again; and models of fewer layers or less width, trained from
scratch as the embedded one was, on as many problems, and then tuned as the dense one is. And both at once: gates on two
of these, as larger_models.py trains them.
"""
import json
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from console import InputError, pyplot, run
from flags import Parser, seed_number, whole

import torch

import shortgpt
import study
import table5_ablations
import testbed
import train
from branches import picture
from data import encode_all, load_examples
from disk import write_figure
from load_weights import load_model, load_tokenizer, read_json
from opened import macs_of_answers
from sweep import interpolate

FILE, LARGER, TARGETS = "frontier.json", "larger.json", (0, 10, 20, 30, 40, 50, 60, 70, 75, 80)     # %
STEPS = 2200                                                     # of the embedded model's own training; the rest of it:
SCRATCH = "--gate none --batch-size 32 --seq-len 160 --lr 2e-3 --warmup 200 --eval-limit 4".split()
SMALLER = {                                                      # curve -> {model: blocks to remove, or sizes}
    "blocks removed, tuned again": {f"{n} blocks removed": n for n in (0, 1, 2, 3, 4)},
    "fewer layers, from scratch": {f"{n} layers": dict(num_hidden_layers=n) for n in (6, 4)},
    "narrower, from scratch": {f"width {h}": dict(hidden_size=h, intermediate_size=3 * h) for h in (104, 72, 48)},
}
GATED = {"one threshold, K and V computed, λ 0.1": "ours, lambda 0.1, K and V dense",
         "a quantile per branch, faster gates":                  # faster: 30 times the backbone's rate
             "ours, per branch, lambda 0.1, K and V dense, gates at 30 times the rate",
         "one threshold, four layers from scratch": "4 layers", "one threshold, width 72 from scratch": "width 72",
         "one threshold, K and V copied, λ 1": "ours", "the paper's recipe": "paper, budget to 0.8",
         "the paper's, faster gates": "paper, gates at 30 times the rate",
         "random, dense model": "dense, random", "random, trained with it": "dense, trained with random skipping"}


# ---------------------------------------------------------------------------------------------------------------------
# Smaller models
# ---------------------------------------------------------------------------------------------------------------------

def without_blocks(blocks, seed):
    """The folder of the tuned model, which is there, without so many blocks."""
    tuned = study.folder_of(table5_ablations.TUNED, seed)
    if not blocks:
        return tuned                                             # as many steps as the others, all blocks
    folder = study.folder_of(f"{blocks} blocks removed, start", seed)
    shutil.rmtree(folder, ignore_errors=True)
    shortgpt.main(["--model", str(tuned), "--data", "arithmetic", "--limit", "200", "--blocks", str(blocks),
                   "--out", str(folder)])
    return folder


def from_scratch(name, size, seed):
    """The folder of a model of another size, trained as the embedded one was where it is not there yet. It stays:
    larger_models.py begins with it, too."""
    folder = study.folder_of(f"{name}, from scratch", seed)
    if not testbed.finished(folder, STEPS):
        shape = folder.with_name(f"{folder.name}-shape")
        shape.mkdir(exist_ok=True)
        (shape / "config.json").write_text(json.dumps(read_json(testbed.START / "config.json") | size))
        shutil.copy(testbed.START / "tokenizer.json", shape)
        if train.main(["--init-config", str(shape / "config.json"), "--data", "arithmetic", *SCRATCH,
                       "--steps", str(STEPS), "--seed", str(seed), "--out", str(folder), "--overwrite"]):
            raise KeyboardInterrupt                              # a signal came, and was obeyed
        shutil.rmtree(shape)
    return folder


def one(name, seed, threads):
    """Make, tune and measure a smaller model: an entry of the results. TUNED: as of table5_ablations."""
    if name == table5_ablations.TUNED:
        return table5_ablations.one(name, seed, threads)
    size = next(sizes[name] for sizes in SMALLER.values() if name in sizes)
    folder = study.folder_of(name, seed)
    with study.logged(folder, threads):
        start = without_blocks(size, seed) if isinstance(size, int) else from_scratch(name, size, seed)
        testbed.trained([["--gate", "none", "--model", str(start)]], seed, folder)
        row = testbed.sweep(folder, ["none"], seed)[0]
        items, _ = encode_all(load_examples("arithmetic", "test", testbed.PROBLEMS), load_tokenizer(folder), 1, 160)
        work, dense = (torch.tensor(macs_of_answers(load_model(where).config, items))
                       for where in (folder, testbed.START))
    shutil.rmtree(folder)
    if isinstance(size, int) and size:
        shutil.rmtree(start)
    saved = [1 - a / b for a, b in ((work.sum(), dense.sum()), (work[1], dense[1]))]
    made = f"shortgpt.py --blocks {size}" if isinstance(size, int) else f"{' '.join(SCRATCH)} --steps {STEPS}"
    return study.entry_of(name, seed, flags=[made, "--gate none"], testbed=[testbed.STEPS, testbed.PROBLEMS],
                          rows=[{**row, "row": name, "macs_saved": saved[0].item(),
                                 "answer": {"macs_saved": saved[1].item()}}])


# ---------------------------------------------------------------------------------------------------------------------
# The picture
# ---------------------------------------------------------------------------------------------------------------------

def on_smaller(smaller):
    """Entries of larger_models.py, gates on a smaller model: savings are of the embedded one's work, not its own."""
    sizes = {row["row"]: row for e in smaller for row in e["rows"]}
    both = lambda row, size: {"macs_saved": 1 - (1 - row["macs_saved"]) * (1 - size["macs_saved"])}
    return [{**e, "rows": [{**row, **both(row, size), "answer": both(row["answer"], size["answer"])}
                           for row in e["rows"]]}
            for e in study.entries(LARGER) if (size := sizes.get(e["model"]))]


def curves(gated, smaller, of):
    """{label: {saved %: accuracies %, one per seed}}: gated models at exactly TARGETS and as far as every seed goes,
    smaller ones at what each saves. of: entry -> the MACs that it saves, of all tokens or of generated ones."""
    found = {}
    for label, name in GATED.items():
        rows = [[(100 * of(r), 100 * r["accuracy"]) for r in e["rows"] if r["row"] == name] for e in gated]
        rows = [points for points in rows if points]
        end = min((max(points)[0] for points in rows), default=0)
        targets = sorted({*(t for t in TARGETS if t < end), min(end, TARGETS[-1])})
        found[label] = {t: seeds for t, *seeds in zip(targets, *(interpolate(points, targets) for points in rows))
                        if seeds and None not in seeds}
    for label, sizes in SMALLER.items():
        mine = [[row for r in smaller for row in r["rows"] if row["row"] == name] for name in sizes]
        found[label] = {100 * of(m[0]): [100 * r["accuracy"] for r in m] for m in mine if m}
    return {label: points for label, points in found.items() if points}


PARTS = {"all tokens": lambda r: r["macs_saved"], "generated tokens": lambda r: r["answer"]["macs_saved"]}


def plot(gated, smaller, path):
    """All tokens left, generated ones right, the upper end above; bars: sample deviation over seeds. True if drawn."""
    plt = pyplot()
    if plt is None:
        return
    figure, axes = plt.subplots(2, 2, figsize=(12, 9), sharex="col", sharey="row", layout="constrained")
    for axis in axes.flat:
        axis.set_prop_cycle(color=[*plt.get_cmap("tab10").colors, "black", "navy"])      # one for each curve
    for (above, below), (part, of) in zip(axes.T, PARTS.items()):
        for label, points in curves(gated, smaller, of).items():
            y = [torch.tensor(seeds) for seeds in points.values()]
            fewest, most = min(map(len, y)), max(map(len, y))
            for axis in (above, below):
                axis.errorbar(list(points), [x.mean() for x in y], [x.std() if len(x) > 1 else float("nan") for x in y],
                              capsize=2, marker="s" if label in SMALLER else "o", ls="--" if label in SMALLER else "-",
                              label=f"{label} ({most if fewest == most else f'{fewest} to {most}'})")
        above.set(ylim=(78, 101))
        below.set(xlabel=f"MACs saved of the dense model, gates paid, {part}, %", ylim=(-3, 103))
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    figure.supylabel("exact answers, % (below: seeds in brackets)")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize="small")
    write_figure(path, figure)
    return True


def parse_args(argv):
    p = Parser("Accuracy against multiply-accumulates saved: gates, random skipping, smaller dense models.")
    names = [name for sizes in SMALLER.values() for name in sizes]
    p.add_argument("--models", nargs="+", choices=names, default=names, help="smaller models to train (default: all)")
    p.add_argument("--seeds", type=seed_number, nargs="+", default=[1, 2, 3], help="of the smaller models")
    p.add_argument("--jobs", type=whole(1), default=1, help="models at a time; they share torch's threads")
    p.add_argument("--from-results", action="store_true", help="draw what is there, train nothing")
    p.add_argument("--out", type=picture, default=str(study.RESULTS / "frontier.png"), help="the picture")
    return p.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    if not args.out:
        raise InputError("--out is empty: name a file")
    if not args.from_results:
        wanted = [(name, seed) for name in args.models for seed in args.seeds]
        done = {(r["model"], r["seed"]) for r in study.entries(FILE)}
        tuned = [(table5_ablations.TUNED, seed) for name, seed in wanted
                 if (name, seed) not in done and name in SMALLER["blocks removed, tuned again"]]
        study.study(FILE, [tuned, wanted], one, args.jobs)
    smaller = study.entries(FILE)
    gated = study.entries(table5_ablations.FILE) + on_smaller(smaller)
    if not gated and not smaller:
        raise InputError(f"{study.RESULTS} holds no results yet: leave out --from-results")
    for part, of in PARTS.items():
        print(f"\nexact answers, %, at % of MACs saved, {part}: mean±sample deviation over seeds (number of seeds)")
        for label, points in curves(gated, smaller, of).items():
            print(f"{label:40}" + "  ".join(f"{x:.1f}: {study.mean_std(y)} ({len(y)})" for x, y in points.items()))
    if plot(gated, smaller, args.out):
        print(f"\nwritten: {args.out}")


if __name__ == "__main__":
    run(main, interrupted="what is finished stands; the same command goes on with it")
