"""The paper's benchmarks on a model, at several budgets: scores, standard errors, and what was skipped for them.

    python paper/evaluate.py --model runs/smollm2 --tasks piqa lambada --budgets 1.0 0.8 0.6 --limit 500 --data qa \\
        --out runs/tasks.json

Tasks are defined in tasks.py, their rows read by task_rows.py and scored by task_scores.py; task_table.py has what is
printed. Results are written as they come, with the score of every question, and the same command goes on where it was
stopped. Under --selector frozen (the thresholds of the run) no answer depends on --batch-size or on the order; under
batch, the paper's quantile, all do, so compare rows of one batch size only.
"""
import hashlib
import json
import math
import sys
from importlib.metadata import version
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
from task_rows import rows as rows_of
from task_scores import asked_of, bleu, generated_scores, log_scores, summary
from task_table import AT, HEADER, WEIGHTS, exactly, grouped, line_of, lines_at
from tasks import GROUPS, TASKS, expand, with_examples
from thresholds import make_policy


def digest_of(docs):
    return hashlib.sha256(repr(docs).encode()).hexdigest()[:16]


def rows_in(file, made_with):
    """The rows of a stopped command; [] for a new file. InputError for those of other settings, or a damaged file."""
    stored = read_json(file) if file.exists() else {"made_with": made_with, "rows": []}
    try:
        rows, changed = list(stored["rows"]), [f"{key} {stored['made_with'].get(key)}, now {now}"
                                               for key, now in made_with.items() if stored["made_with"].get(key) != now]
        if changed:
            raise InputError(f"--out {file} holds rows of other settings ({'; '.join(changed)}): give another --out")
        for r in rows:
            line_of(r)
            if not (r["task"] in TASKS and isinstance(r["data_digest"], str) and r["n"] >= 1 and 0 < r["budget"] <= 1
                    and all(math.isfinite(r[key]) and r[by] > 0 for key, by in WEIGHTS.items())
                    and 0 <= r.get("acc", 0) <= 1):
                raise ValueError
    except InputError:                                           # a ValueError, too
        raise
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError, StopIteration):
        raise InputError(f"--out {file} is damaged: give another --out") from None
    return rows


def parse_args(argv):
    p = Parser("The paper's benchmarks on a model, at several budgets.")
    add = p.add_argument
    add("--model", required=True, help="folder, a run's --out, or hub id, with gates or without")
    add("--tasks", nargs="+", required=True, metavar="TASK",
        help=f"{', '.join(name for name in TASKS if not name.startswith('mmlu_') or 'gen' in name)}, a subject as "
        f"mmlu_anatomy, or a group: {', '.join(GROUPS)}")
    add("--budgets", type=check_budget, nargs="+", help="default: those that the model is calibrated for, and 1.0")
    add("--selector", choices=("frozen", "batch", "random"), default="frozen", help="who skips below budget 1.0")
    add("--shots", type=whole(0), help="examples before each question; default: 5 where choices are scored, else 0")
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
    docs, asked, about = {}, {}, {}
    for name in names:                                           # all that may be wrong is said before the first row
        task = TASKS[name]
        shots = 5 * (task.kind == "choice") if args.shots is None else args.shots
        if shots and not task.shots:
            raise InputError(f"--shots {shots}: {name} has no examples: leave --shots out, or {name}")
        found, origin = rows_of(task.rows, task.split, args.data)
        try:
            others, theirs = rows_of(task.rows, task.shots, args.data) if shots else ((), "")
        except InputError as error:
            raise InputError(f"{error}; or --shots 0, without examples") from None
        if shots and len(others) < shots + (task.draws or 0):
            raise InputError(f"--shots {shots}: {name} has only {len(others)} examples to draw from")
        docs[name] = with_examples(task, found[:args.limit or None], others, shots, args.seed)
        asked[name], straddled = asked_of(model, tokenizer, task, docs[name], args)
        if straddled:
            print(f"{name}: {straddled} continuations begin within a token, which is scored whole", file=sys.stderr)
        if task.bleu:
            bleu(["a"], ["a"])
        about[name] = {"n": len(docs[name]), "shots": shots, "data": origin, "examples": theirs, "straddled": straddled,
                       "data_digest": digest_of(docs[name])}
    made_with = {"model": model_digest(model.source), "selector": args.selector, "shots": args.shots,
                 "limit": args.limit, "batch_size": args.batch_size, "max_new_tokens": args.max_new_tokens,
                 "bos": args.bos, "seed": args.seed, "dtype": args.dtype, "device": device.type,
                 "format": 2}                                    # 2: generated texts count up to their stop
    rows = rows_in(file, made_with)
    if changed := [r["task"] for r in rows if r["data_digest"] != about.get(r["task"], r)["data_digest"]]:
        raise InputError(f"--out {file}: the questions of {changed[0]} were others when its rows were made: give "
                         "another --out")
    versions = {"python": sys.version.split()[0], "torch": torch.__version__, "tokenizers": version("tokenizers"),
                "commit": COMMIT}
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
        rows.append({"task": name, "budget": b, **about[name], **summary(task, docs[name], metrics, scores),
                     **{key: saved[key] for key in (*WEIGHTS, *WEIGHTS.values())}, "scores": scores,
                     "versions": versions | ({"sacrebleu": version("sacrebleu")} if task.bleu else {})})
        groups = grouped(rows)
        write(file, json.dumps({"settings": {**vars(args), "order": "as in the file; longest first in batches"},
                                "made_with": made_with, "rows": rows, "groups": groups, "exactly_at": AT,
                                "exactly": exactly(rows + groups)}, indent=1))
        tqdm.write(line_of(rows[-1]))
    groups = grouped(rows)
    print(*map(line_of, groups), *lines_at(rows + groups), f"\nwritten: {file}", sep="\n")
    return 0


if __name__ == "__main__":
    run(main, interrupted="stopped: the rows so far are in --out, and the same command goes on")
