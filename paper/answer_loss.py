"""Answer loss, or perplexity of plain text, against compute saved: several models in one table and one picture.

    python paper/answer_loss.py --model runs/gated --model runs/dense-3 --reference runs/dense --data arithmetic \\
        --policies frozen random --at 0 10 20 30 40 --out runs/loss.json --plot runs/loss.png

Answers are given and not generated, in the batches of the table at the end of train.py. Beside the three numbers stands
what is saved of the dense --reference on the same tokens: a model without some of its blocks shows there what that
saves. Each row is written as it comes, and the same command goes on where it was stopped.
"""
import json
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from console import InputError, pick_device, run
from flags import Parser, add_machine_flags, real, seed_number, whole

from tqdm import tqdm

from branches import picture
from budgets import budget_of_chance, evaluate
from curves import HEADER, line_of, lines_at, plot
from data import load_examples
from disk import only_one, write
from gates import SkipPolicy, check_budget
from load_weights import model_digest, read_json
from opened import check_own, dense_macs, open_model, open_with_items
from read_data import digest
from thresholds import make_policy

NUMBERS = ("skipped", "skipped_per_call", "macs_saved", "work_skipped")
TEXTS, FIGURES = ("model", "digest", "policy"), ("budget", "loss", "perplexity", "accuracy", *NUMBERS, "of_reference")


def plan(config, budgets, policies):
    """[(policy name, budget, SkipPolicy)] of a model's rows, in this order: random is None, until frozen has run."""
    chance, rows = "random" in policies, []
    if config.gate is None:                                      # nothing to rank tokens by
        return [("none", 1.0, SkipPolicy())] + [("random", b, None) for b in budgets or () if chance and b < 1.0]
    for b in budgets or sorted({1.0, *map(float, config.gateskip.get("thresholds", ()))}, reverse=True):
        rows.append(("none" if b >= 1.0 else "frozen", b, make_policy(config, "frozen", b)))
        rows += [("random", b, None)] * (chance and b < 1.0)
    return rows


def rows_in(file, made_with):
    """The rows of a stopped command; [] for a new file. InputError for rows of other settings, or another's file, or a
    damaged one."""
    stored = read_json(file) if file.exists() else {"made_with": made_with, "rows": []}
    was = stored.get("made_with")
    if not isinstance(was, dict):
        raise InputError(f"--out {file} is no file of this program: give another --out")
    if changed := [f"{key} {was.get(key)}, now {now}" for key, now in made_with.items() if was.get(key) != now]:
        raise InputError(f"--out {file} holds rows of other settings ({'; '.join(changed)}): give another --out")
    try:
        rows = stored["rows"]
        good = all(isinstance(r[key], str) for r in rows for key in TEXTS)
        good = good and all(math.isfinite(r[key]) for r in rows for key in FIGURES) and isinstance(rows, list)
        good = good and all(r["loss"] >= 0 and 0 < r["budget"] <= 1 and 0 <= r["accuracy"] <= 1
                            and max(r[key] for key in FIGURES[4:]) <= 1 for r in rows)
    except (KeyError, TypeError, OverflowError):
        good = False
    if not good:
        raise InputError(f"--out {file} is damaged: give another --out")
    return rows


def parse_args(argv):
    p = Parser("Answer loss against compute saved, of several models.")
    add = p.add_argument
    add("--model", action="append", required=True, metavar="RUN",
        help="folder, a run's --out, or hub id; may be given several times")
    add("--reference", required=True, metavar="MODEL", help="the model whose dense work is what may be saved")
    add("--data", required=True, help="arithmetic (its test problems), or a .jsonl, .parquet or .txt file")
    add("--limit", type=whole(0), help="the first N examples; 0: all; default: 256, of plain text all")
    add("--seq-len", type=whole(2), default=512, help="longer examples are left out, plain text is cut into windows")
    add("--budgets", type=check_budget, nargs="+", help="default: those that a model is calibrated for, and 1.0")
    add("--policies", choices=("frozen", "random"), nargs="+", default=["frozen"],
        help="random: beside frozen, skipping as much; of a dense model at --budgets")
    add("--seed", type=seed_number, default=0, help="of random skipping")
    add("--out", required=True, metavar="JSON", help="the file of the rows")
    add("--plot", type=picture, metavar="PNG", help="draw them")
    add("--at", type=real(0.0, 100.0), nargs="+", help="print the loss at these percentages of MACs saved")
    add_machine_flags(p)
    return p.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    check_own("--out", args.out, "made_with")
    if args.plot and Path(args.plot).resolve() == Path(args.out).resolve():
        raise InputError(f"--plot {args.plot} is --out, too: the picture would take the place of the rows")
    with only_one(f"{Path(args.out)}.lock"):                     # else two commands at once lose each other's rows
        return fill(args)


def fill(args):
    """Measure what --out lacks and print it all."""
    file, (device, dtype) = Path(args.out), pick_device(args.device, args.dtype)
    examples = load_examples(args.data, "test", args.limit or None)
    plain = isinstance(examples[0], str)
    limit = (0 if plain else 256) if args.limit is None else args.limit
    open_one = lambda source: open_with_items(source, examples, limit, args.seq_len, device, dtype)
    model, _, items, dropped = open_one(args.reference)
    all_work = dense_macs(model.config, items)
    made_with = {"reference": model_digest(model.source), "data": digest(args.data) or args.data, "limit": limit,
                 "seq_len": args.seq_len, "seed": args.seed, "dtype": args.dtype, "device": device.type}
    rows, todo = rows_in(file, made_with), []
    digests = {r["model"]: r["digest"] for r in rows}
    for source in args.model:                                    # all that may be wrong is said before the first row
        model, _, same_items, _ = open_one(source)
        name, digest_now = Path(source).absolute().name, model_digest(model.source)
        if same_items != items:
            raise InputError(f"--model {source} and --reference {args.reference} make different tokens of a text")
        if digests.setdefault(name, digest_now) != digest_now:
            raise InputError(f"two different models are called {name}, here or in --out {file}: rename a folder, or "
                             "give another --out")
        todo += [(name, model.source, *row) for row in plan(model.config, args.budgets, args.policies)]
    print(f"{len(items)} sequences of {args.data}; {dropped} longer than --seq-len {args.seq_len} left out")

    done = {(r["model"], r["policy"], r["budget"]): r for r in rows}
    for name, source, kind, budget, policy in tqdm(todo, desc="rows"):
        if (name, kind, budget) in done:
            continue
        if model.source != source:                               # one model at a time in memory
            model = open_model(source, device, dtype)
        if kind == "random":
            like = budget_of_chance(model.config, done[name, "frozen", budget]) if model.config.gate else budget
            policy = make_policy(model.config, "random", like, seed=args.seed)
        loss, accuracy, saved = evaluate(model, items, policy)
        if not loss < 700:                                       # NaN, too; exp(709) is the last that there is
            raise InputError(f"--model {source}, budget {budget:g}: its loss is {loss:.3g}: is it a damaged model?")
        rows.append({"model": name, "digest": digests[name], "policy": kind, "budget": budget, "loss": loss,
                     "perplexity": math.exp(loss), "accuracy": accuracy, **{key: saved[key] for key in NUMBERS},
                     "of_reference": 1 - saved["macs"] / all_work})
        done[name, kind, budget] = rows[-1]
        write(file, json.dumps({"settings": vars(args), "made_with": made_with, "rows": rows}, indent=1))
    print("", HEADER, *map(line_of, rows), *(lines_at(rows, args.at, plain) if args.at else ()), "", sep="\n")
    if args.plot and plot(rows, plain, args.plot):
        print(f"written: {args.plot}")
    print(f"written: {file}")
    return 0


if __name__ == "__main__":
    run(main, interrupted="stopped: the rows so far are in --out, and the same command goes on")
