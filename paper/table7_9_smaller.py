"""Tables 7 and 9: gates on a model that is made smaller after training, by 4-bit weights or by blocks removed.

    python paper/table7_9_smaller.py --jobs 2                    # all that paper/results/table7_9.json lacks yet
    python paper/table7_9_smaller.py --from-results              # the table again, without training

Two recipes of table5_ablations.py on the embedded model, the demo's first, and the dense model tuned alike, beside
which what happens to gates can be judged; of each training every row, with thresholds measured anew. Savings are of the
whole dense model's MACs: what a removed block saves is in them, which the paper's Table 9 leaves out ("saved compute"
there is of what is left); 4-bit weights save none, but memory. Larger models: quantize.py or shortgpt.py, then
answer_loss.py. Table 8 is speculative.py.
"""
import contextlib
import shutil
import sys
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from console import InputError, run
from flags import Parser, seed_number, whole

import shortgpt
import study
import table1_baselines
import table5_ablations
import testbed
from data import encode_all, load_examples
from load_weights import load_model, load_tokenizer
from opened import macs_of_answers
from quantized import memory_of, quantize
from recalibrate import recalibrate
from thresholds import make_policy

FILE = "table7_9.json"
RECIPES = {f"{name}, made smaller": table5_ablations.models()[name].stages[0]
           for name in ("ours, lambda 0.1, K and V dense", "ours", "dense")}
BUDGETS = (1.0, 0.8, 0.7, 0.6, 0.5, 0.4)
FOUR_BITS = {"NF4": ("nf4", False), "NF4, double quantisation": ("nf4", True), "int4": ("int4", False)}
REMOVED = {"1 block removed": 1, "2 blocks removed": 2}


# ---------------------------------------------------------------------------------------------------------------------
# The rows
# ---------------------------------------------------------------------------------------------------------------------

def without(blocks, model, tokenizer):
    """Remove the blocks of the lowest influence on 200 problems of training."""
    items, _ = encode_all(load_examples("arithmetic", "train", 200), tokenizer, model.config.eos_ids[0], 160)
    influence = shortgpt.block_influence(model, items)
    shortgpt.remove(model, sorted(range(len(influence)), key=influence.__getitem__)[:blocks])


ROWS = {"as it is": lambda model, tokenizer: None,
        **{name: lambda model, tokenizer, how=how: quantize(model, *how) for name, how in FOUR_BITS.items()},
        **{name: partial(without, blocks) for name, blocks in REMOVED.items()}}


def made_smaller(change, sizes, folder, items):
    """Yields (saving, model, policy), for table1_baselines.sweep. sizes: a list that gets the model's bytes and config.
    """
    model = load_model(folder).eval()
    change(model, load_tokenizer(folder))
    sizes.append((memory_of(model), model.config))
    if model.config.gate is None:
        yield 0.0, model, make_policy(model.config, "none", 1.0)
        return
    model.config.gateskip["thresholds"] = dict.fromkeys(map(str, BUDGETS[1:]))
    recalibrate(model, items)
    for budget in BUDGETS:
        yield 1.0 - budget, model, make_policy(model.config, "frozen", budget)


def of_the_whole(row, config, dense, items):
    """A row's MACs saved, of the dense model's of that config in place of its own."""
    work, all_of_it = (macs_of_answers(c, items) for c in (config, dense))       # of prompts, of answers
    left = lambda saved, share: 1 - (1 - saved) * share
    row["macs_saved"] = left(row["macs_saved"], sum(work) / sum(all_of_it))
    row["answer"]["macs_saved"] = left(row["answer"]["macs_saved"], work[1] / all_of_it[1])


def one(name, seed, threads):
    """Train, make smaller in every way, and measure: an entry of the results, "bytes" of each row with it."""
    started, folder = time.perf_counter(), study.folder_of(name, seed)
    sizes = {row: [] for row in ROWS}
    views = {row: partial(made_smaller, change, sizes[row]) for row, change in ROWS.items()}
    method = table1_baselines.Method(RECIPES[name], contextlib.nullcontext, views)
    with study.logged(folder, threads):
        testbed.trained([method.flags.split()], seed, folder)
        trained = time.perf_counter() - started
        rows = table1_baselines.sweep(method, folder, seed)
        dense, tokenizer = load_model(folder).config, load_tokenizer(folder)
        items, _ = encode_all(load_examples("arithmetic", "test", testbed.PROBLEMS), tokenizer, dense.eos_ids[0], 160)
    for row in rows:
        of_the_whole(row, sizes[row["row"]][0][1], dense, items)
    shutil.rmtree(folder)
    return study.entry_of(name, seed, flags=method.flags, testbed=[testbed.STEPS, testbed.PROBLEMS],
                          seconds=[round(trained), round(time.perf_counter() - started - trained)],
                          bytes={row: found[0][0] for row, found in sizes.items()}, rows=rows)


# ---------------------------------------------------------------------------------------------------------------------
# The table
# ---------------------------------------------------------------------------------------------------------------------

def main(argv=None):
    p = Parser("Gates on a model made smaller after training: 4-bit weights, blocks removed.")
    p.add_argument("--seeds", type=seed_number, nargs="+", default=[1, 2, 3], help="of the trainings")
    p.add_argument("--jobs", type=whole(1), default=1, help="models at a time; they share torch's threads")
    p.add_argument("--from-results", action="store_true", help="print the table of all that is there, train nothing")
    args = p.parse_args(argv)
    if not args.from_results:
        study.study(FILE, [[(name, seed) for name in RECIPES for seed in args.seeds]], one, args.jobs)
    if not (runs := study.entries(FILE)):
        raise InputError(f"{study.RESULTS / FILE} holds no results yet: leave out --from-results")
    print("exact answers, %, mean ± sample deviation over seeds; savings are of the whole dense model's MACs; -: not "
          "reached")
    for name in RECIPES:
        if not (of_it := [r for r in runs if r["model"] == name]):
            continue
        print(f"\n{name}\n\n" + "\n".join(table5_ablations.table(of_it, "macs_saved", ROWS)))
        print("\nat full budget (MACs saved, %): " + ", ".join(
            f"{row} {study.mean_std([100 * r['accuracy'] for r in found])} ({100 * found[0]['macs_saved']:.0f})"
            for row in ROWS if (found := [r for e in of_it for r in e["rows"] if r["row"] == row and not r["asked"]])))
        sizes = of_it[0].get("bytes")
        if not isinstance(sizes, dict) or not all(type(size) is int and 0 < size < 2 ** 60 for size in sizes.values()):
            raise InputError(f"{study.RESULTS / FILE}: \"bytes\" of {name!r} is not as this program writes it: mend it")
        print(f"\nmemory of all tensors, MB: {', '.join(f'{row} {size / 1e6:.2f}' for row, size in sizes.items())}")


if __name__ == "__main__":
    run(main, interrupted="the table stands as it is; the same command goes on with it")
