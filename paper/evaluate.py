"""The paper's benchmarks on a model, at several budgets: scores, standard errors, and what was skipped for them.

    python paper/evaluate.py --model runs/smol --tasks piqa lambada --budgets 1.0 0.8 0.6 --limit 500 --data qa \\
        --out runs/smol-eval.json

Tasks are defined in tasks.py, their rows read by task_rows.py and scored by task_scores.py. Results are written as they
come, with the score of every question, and the same command goes on where it was stopped. Under --selector frozen (the
thresholds of the run) no answer depends on --batch-size or on the order; under batch, the paper's quantile, all do, so
compare rows of one batch size only.
"""
import hashlib
import json
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from console import InputError, pick_device, run
from flags import Parser, add_machine_flags, seed_number, whole

import torch
from tqdm import tqdm

from disk import only_one, write
from gates import check_budget
from load_weights import check_fit, load_tokenizer, model_digest, read_json
from opened import check_own, open_model
from savings import Savings
from study import COMMIT
from sweep import interpolate
from task_rows import rows as rows_of
from task_scores import asked_of, bleu, generated_scores, log_scores, summary
from tasks import GROUPS, TASKS, expand, with_examples
from thresholds import make_policy

NUMBERS, AT = ("skipped", "skipped_per_call", "macs_saved"), (0.0, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4)
MAIN = ("acc", "bleu", "word_perplexity")                        # what a task is known by, and what stands beside it
BESIDE = ("acc_norm", "perplexity", "flexible", "token_perplexity")
HEADER = (f"{'task':36} {'budget':>6} {'n':>6} {'score':>15} {'beside it':>26} {'skipped':>8} {'per call':>8} "
          f"{'macs_saved':>10}")


def line_of(r):
    def told(name):
        if r.get(f"{name}_stderr") is None:
            return f"{r[name]:.4g}"
        return f"{r[name]:.2%} ± {r[f'{name}_stderr']:.2%}"
    main, beside = (next((name for name in names if name in r), None) for names in (MAIN, BESIDE))
    return (f"{r['task']:36} {r['budget']:6.3f} {r['n']:6} {told(main):>15} "
            f"{f'{beside} {told(beside)}' if beside else '':>26} {r['skipped']:8.1%} {r['skipped_per_call']:8.1%} "
            f"{r['macs_saved']:+10.1%}")


def grouped(rows):
    """Rows of MMLU and its STEM subjects, where all are there: micro means over all their questions."""
    found = []
    for group in ("mmlu", "mmlu_stem"):
        for budget in dict.fromkeys(r["budget"] for r in rows):
            mine = [r for r in rows if r["budget"] == budget and r["task"] in GROUPS[group]]
            if len(mine) == len(GROUPS[group]):
                n = sum(r["n"] for r in mine)
                mean = lambda key: sum(r[key] * r["n"] for r in mine) / n
                found.append({"task": group, "budget": budget, "n": n, "acc": mean("acc"),
                              "acc_stderr": (mean("acc") * (1 - mean("acc")) / max(n - 1, 1)) ** 0.5,
                              **{key: mean(key) for key in NUMBERS}})
    return found


def lines_at(rows):
    """Lines to print: each task's score at exact savings, linear between the rows, "-" outside them."""
    lines = []
    for key in ("skipped", "macs_saved"):
        lines += ["", f"score at exactly ({key})" + " " * (36 - 20 - len(key)) + "".join(f"{x:>8.0%}" for x in AT)]
        for name in dict.fromkeys(r["task"] for r in rows):
            mine = [r for r in rows if r["task"] == name]
            main = next(m for m in MAIN if m in mine[0])
            values = interpolate([(r[key], r[main]) for r in mine], AT)
            told = "{:8.1%}" if main == "acc" else "{:8.2f}"
            lines.append(f"{name:36}" + "".join("       -" if v is None else told.format(v) for v in values))
    return lines


def digest_of(docs):
    return hashlib.sha256(repr(docs).encode()).hexdigest()[:16]


def rows_in(file, made_with):
    """The rows of a stopped command; [] for a new file. InputError for those of other settings, or a damaged file."""
    stored = read_json(file) if file.exists() else {"made_with": made_with, "rows": []}
    try:
        rows, changed = list(stored["rows"]), [f"{key} {stored['made_with'].get(key)}, now {now}"
                                               for key, now in made_with.items() if stored["made_with"].get(key) != now]
        for r in rows:
            line_of(r)
            if not (r["task"] in TASKS and isinstance(r["data_digest"], str) and r["n"] >= 1 and 0 < r["budget"] <= 1
                    and all(math.isfinite(r[key]) for key in NUMBERS) and 0 <= r.get("acc", 0) <= 1):
                raise ValueError
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError, StopIteration):
        raise InputError(f"--out {file} is damaged: give another --out") from None
    if changed:
        raise InputError(f"--out {file} holds rows of other settings ({'; '.join(changed)}): give another --out")
    return rows


def parse_args(argv):
    p = Parser("The paper's benchmarks on a model, at several budgets.")
    add = p.add_argument
    add("--model", required=True, help="folder, a run's --out, or hub id, with gates or without")
    add("--tasks", nargs="+", required=True, metavar="TASK",
        help=f"{', '.join(name for name in TASKS if not name.startswith('mmlu_') or name == 'mmlu_gen')}, a subject as "
        f"mmlu_anatomy, or a group: {', '.join(GROUPS)}")
    add("--budgets", type=check_budget, nargs="+", help="default: those that the model is calibrated for, and 1.0")
    add("--selector", choices=("frozen", "batch", "random"), default="frozen", help="who skips below budget 1.0")
    add("--shots", type=whole(0), default=0, help="examples before each question of a log-likelihood task")
    add("--limit", type=whole(0), default=0, help="the first N questions of each task; 0: all")
    add("--batch-size", type=whole(1), default=16, help="rows that run together")
    add("--data", metavar="DIR", help="folder with files of the data sets; what is not there comes from the hub")
    add("--max-new-tokens", type=whole(1), default=256, help="of a generated answer")
    add("--bos", action="store_true", help="BOS in front of every text where the tokenizer puts none")
    add("--seed", type=seed_number, default=1234, help="of the examples, and of random skipping")
    add("--out", required=True, metavar="JSON", help="the file of the rows")
    add_machine_flags(p)
    return p.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    names = expand(args.tasks)
    if unknown := [name for name in names if name not in TASKS]:
        raise InputError(f"--tasks {' '.join(unknown)}: not known; --help lists the tasks")
    check_own("--out", args.out, "made_with")
    with only_one(f"{Path(args.out)}.lock"):                     # else two commands at once lose each other's rows
        return fill(args, names)


def fill(args, names):
    """Measure what --out lacks and print it all."""
    file, (device, dtype) = Path(args.out), pick_device(args.device, args.dtype)
    model, tokenizer = open_model(args.model, device, dtype), load_tokenizer(args.model)
    check_fit(model, tokenizer)
    args.bos_id = model.raw_config.get("bos_token_id")
    if args.bos and args.bos_id is None:
        raise InputError(f"--bos: {args.model} names no bos_token_id: leave --bos out")
    known = sorted({1.0, *map(float, model.config.gateskip.get("thresholds", ()))}, reverse=True)
    budgets = list(dict.fromkeys(args.budgets or known))
    policy = lambda b: make_policy(model.config, args.selector if b < 1.0 else "none", b, seed=args.seed, device=device)
    try:
        for b in budgets:
            policy(b)
    except InputError as error:
        raise InputError(str(error).replace("budget ", "--budgets ", 1).replace("policy", "selector")) from None
    docs, asked, origins = {}, {}, {}
    for name in names:                                           # all that may be wrong is said before the first row
        task = TASKS[name]
        shots = args.shots if task.shots else 0
        found, origins[name] = rows_of(task.rows, task.split, args.data)
        others = rows_of(task.rows, task.shots, args.data)[0] if shots else ()
        if shots and len(others) < shots + (task.draws or 0):
            raise InputError(f"--shots {shots}: {name} has only {len(others)} examples to draw from")
        docs[name] = with_examples(task, found[:args.limit or None], others, shots, args.seed)
        asked[name] = asked_of(model, tokenizer, task, docs[name], args)
        if task.bleu:
            bleu(["a"], ["a"])
    made_with = {"model": model_digest(model.source), "selector": args.selector, "shots": args.shots,
                 "limit": args.limit, "batch_size": args.batch_size, "max_new_tokens": args.max_new_tokens,
                 "bos": args.bos, "seed": args.seed, "dtype": args.dtype, "device": device.type}
    rows, same = rows_in(file, made_with), {name: digest_of(docs[name]) for name in names}
    if changed := [r["task"] for r in rows if r["data_digest"] != same.get(r["task"], r["data_digest"])]:
        raise InputError(f"--out {file}: the questions of {changed[0]} were others when its rows were made: give "
                         "another --out")
    versions = {"python": sys.version.split()[0], "torch": torch.__version__, "commit": COMMIT}
    done = {(r["task"], r["budget"]) for r in rows}
    print(f"\n{HEADER}", *map(line_of, rows), sep="\n", flush=True)
    todo = [(name, b) for name in names for b in budgets if (name, b) not in done]
    for name, b in tqdm(todo, desc="tasks x budgets"):
        task, savings = TASKS[name], Savings(model.config)
        mine = docs[name], asked[name], policy(b), args, savings     # anew: chance starts at its seed for each row
        if task.kind == "answer":
            metrics, scores = generated_scores(model, tokenizer, task, *mine)
        else:
            metrics, scores = log_scores(model, task, *mine)
        saved = savings.report()
        rows.append({"task": name, "budget": b, "n": len(docs[name]), "data": origins[name], "data_digest": same[name],
                     **summary(task, docs[name], metrics, scores), **{key: saved[key] for key in NUMBERS},
                     "scores": scores, "versions": versions})
        write(file, json.dumps({"settings": {**vars(args), "order": "as in the file; longest first in batches"},
                                "made_with": made_with, "rows": rows}, indent=1))
        tqdm.write(line_of(rows[-1]))
    groups = grouped(rows)
    print(*map(line_of, groups), *lines_at(rows + groups), f"\nwritten: {file}", sep="\n")
    return 0


if __name__ == "__main__":
    run(main, interrupted="stopped: the rows so far are in --out, and the same command goes on")
