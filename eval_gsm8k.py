"""Accuracy against compute saved: the sweep over budgets, the interpolation, the table and the plot.

    python eval_gsm8k.py --model runs/demo --dense examples/tiny-llama              # the built-in problems
    python eval_gsm8k.py --model runs/llama --data test.jsonl --max-new-tokens 400  # GSM8K

Zero-shot with the training template. An answer counts if the first `#### number` in it is the right one (answers.py).
A sweep that was stopped goes on with the same command (sweep.py).
"""
import re
import sys
import time
from pathlib import Path

from console import InputError, pick_device, pyplot, run
from flags import Parser, add_machine_flags, seed_number, whole

from tqdm import tqdm

from answers import check_golds, extract_answer, is_right, normalise
from branches import SHOW_BRANCHES, parts_of, show
from checkpoint import STEP, held
from data import encode_prompt, load_examples
from disk import check_writable, write_figure
from gates import check_budget
from generate import generate
from load_weights import check_fit, find_folder, load_model, load_tokenizer, model_digest
from savings import Savings
from sweep import OWN, TARGETS, add_row, check_compared, data_digest, joined, open_sweep, rows_of, wilson
from thresholds import make_policy
from tokens import decode

BUDGETS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)


def run_row(name, model, tokenizer, examples, policy, budget, args):
    """One line of the table: generate answers to all examples under one policy and score them. A dict."""
    started, savings, strict, flexible, cut = time.perf_counter(), Savings(model.config), 0, 0, 0
    ends = set(model.config.eos_ids)
    for start in tqdm(range(0, len(examples), args.batch_size), desc=f"{name} {budget:.2f}", leave=False):
        batch = examples[start:start + args.batch_size]
        prompts = [encode_prompt(tokenizer, e.question) for e in batch]
        result = generate(model, prompts, args.max_new_tokens, policy, ends)
        for example, new in zip(batch, result.tokens):
            text = decode(tokenizer, new)
            strict += is_right(text, example.answer)
            flexible += extract_answer(text, flexible=True) == normalise(example.answer)
            cut += new[-1] not in ends
        savings += result.savings
    n, p, saved = len(examples), strict / len(examples), savings.report()
    low, high = wilson(p, n)
    three = lambda report: {key: report[key] for key in ("skipped", "skipped_per_call", "macs_saved")}
    return {"row": name, "policy": policy.kind, "budget": budget, "n": n, "accuracy": p, "low": low, "high": high,
            "stderr": (p * (1 - p) / n) ** 0.5, "flexible": flexible / n, "cut": cut, **three(saved),
            **{part: three(saved[part]) for part in ("prompt", "answer") if part in saved},
            "branches": {part: [round(share, 4) for share in shares] for part, shares in parts_of(saved).items()},
            "seconds": round(time.perf_counter() - started, 2)}


THREE = (("skipped", "skipped, %", ""), ("skipped_per_call", "averaged per call, %", ""),
         ("macs_saved", "MACs saved, %", "+"))                   # key, title, sign
HEADER = (" " * 55 + " ".join(f"{title:^21}" for _, title, _ in THREE) + "\n"
          + f"{'row':19} {'budget':6} {'accuracy (95%)':>19} {'flexible':>8}"
          + " ".join(["    all prompt answer"] * 3) + f" {'sec':>6}")


def line_of(r):
    """A row as printed: each of the three numbers for all tokens, for prompt tokens, and for generated tokens."""
    parts = r, r.get("prompt"), r.get("answer")
    three = ["".join(f"{100 * p[key]:{sign}7.1f}" if p else "      -" for p in parts) for key, _, sign in THREE]
    accuracy = f"{r['accuracy']:.1%} ({100 * r['low']:.1f}-{100 * r['high']:.1f})"
    return (f"{r['row']:19} {r['budget']:6.3f} {accuracy:>19} {r['flexible']:8.1%}" + " ".join(three)
            + f" {r['seconds']:6.1f}" + (f"  {r['cut']} cut" if r["cut"] else ""))


def plot(rows, path):
    """Accuracy against what was skipped, and against MACs saved, with 95% intervals. True if it was drawn."""
    plt = pyplot()
    if plt is None:
        return
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True, layout="constrained")
    for name in dict.fromkeys(r["row"] for r in rows):
        mine = sorted((r for r in rows if r["row"] == name), key=lambda r: r["skipped"])
        label = name.encode(errors="replace").decode().replace("$", r"\$")       # $...$ is a formula to matplotlib
        for axis, key in zip(axes, ("skipped", "macs_saved")):
            x, y = ([100 * r[k] for r in mine] for k in (key, "accuracy"))
            low, high = zip(*(wilson(r["accuracy"], r["n"]) for r in mine))
            error = [a - 100 * b for a, b in zip(y, low)], [100 * b - a for a, b in zip(y, high)]
            axis.errorbar(x, y, error, label=label, marker="o", markersize=4, capsize=2,
                          ls="-" if len(mine) > 1 else "")
    for axis, label in zip(axes, ("(token, branch) pairs skipped, %", "multiply-accumulates saved, gates paid, %")):
        axis.set(xlabel=label)
        axis.set_ylim(-3, 103)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(f"exact answers, % of {rows[0]['n']} held-out problems")
    axes[0].legend()
    write_figure(path, figure)
    return True


def show_branches(rows, path):
    """What each branch got in the rows of the model itself, by budget; rows of an earlier version do not say."""
    mine = sorted((r for r in rows if r["row"] in OWN), key=lambda r: -r["budget"])
    if lack := [f"{r['row']} {r['budget']:g}" for r in mine if not r.get("branches")]:
        print(f"\nno shares per branch in rows of an earlier version: {', '.join(lack)} (--overwrite measures anew)")
    if kept := {r["budget"]: r["branches"] for r in mine if r.get("branches")}:
        show(mine[0]["row"], kept, path)


def parse_args(argv):
    p = Parser("Accuracy against compute saved.")
    add = p.add_argument
    add("--model", default="runs/demo", help="the gated model: folder, a run's --out, or hub id")
    add("--dense", help="the same model without gates: for the dense row and for random skipping")
    add("--data", default="arithmetic", help="arithmetic (its test problems), or a .jsonl or .parquet file")
    add("--limit", type=whole(1), default=200, help="the first N problems")
    add("--budgets", type=check_budget, nargs="+",
        help="default: those that the model is calibrated for; if it is not, 1.0 0.95 0.9 0.85 0.8 0.75")
    add("--policy", choices=("auto", "frozen", "batch", "topk"), default="auto",
        help="of the GateSkip row; batch depends on --batch-size")
    add("--batch-size", type=whole(1), default=100, help="problems that are generated together")
    add("--max-new-tokens", type=whole(1), default=96, help="of each answer")
    add("--compare", nargs="+", default=[], metavar="FILE",
        help="eval.json of other runs, whose own rows join the picture")
    add("--out", help="folder for eval.json and eval.png; default: the --model folder if it is local (of a step: its "
        "run's), else runs/eval")
    add("--overwrite", action="store_true", help="measure every row anew, in place of what eval.json holds")
    add("--seed", type=seed_number, default=0, help="of random skipping")
    add("--show-branches", **SHOW_BRANCHES)
    add_machine_flags(p)
    return p.parse_args(argv)


def plan_rows(args, device, dtype, tokenizer, model):
    """[(row name, model, policy, budget)], every policy made before the first row: what cannot be run is said now."""
    if args.budgets is None:
        args.budgets = sorted({1.0, *map(float, model.config.gateskip.get("thresholds", BUDGETS))}, reverse=True)
    less = [b for b in args.budgets if b < 1.0]
    if model.config.gate:
        plan = [("GateSkip", model, args.policy, b) for b in args.budgets]
    else:                                                        # nothing to rank tokens by
        plan = [("model", model, "none", 1.0)]
    if args.dense:
        dense = load_model(args.dense, device=device, dtype=dtype)
        if dense.config.gate:
            raise InputError(f"--dense {args.dense} has gates: give the model without them")
        check_fit(dense, tokenizer)
        plan += [("dense", dense, "none", 1.0)] + [("random, dense", dense, "random", b) for b in less]
    if model.config.gate:
        plan += [("random ranks, gated", model, "random", b) for b in less]
    return [(name, which, make_policy(which.config, kind, b, seed=args.seed, device=device), b)
            for name, which, kind, b in plan]


def made_with(args, plan, problems, device):
    """All that a row's figures depend on, beside its name and budget; None: no row of this plan depends on it."""
    kind = next((policy.kind for name, _, policy, budget in plan if name == "GateSkip" and budget < 1.0), None)
    dense = next((model_digest(which.source) for name, which, _, _ in plan if name == "dense"), None)
    return {"model": model_digest(plan[0][1].source), "dense": dense, "policy": kind, "seed": args.seed,
            "data": data_digest(problems), "problems": len(problems), "max new tokens": args.max_new_tokens,
            "batch size": min(args.batch_size, len(problems)), "dtype": args.dtype, "device": device.type}


def main(argv=None):
    args = parse_args(argv)
    others = [(*rows_of(file), Path(file).parent) for file in args.compare]
    examples = load_examples(args.data, "test", args.limit)
    if isinstance(examples[0], str):
        raise InputError(f"--data {args.data} is plain text: accuracy needs questions with answers")
    out = Path(args.out or (args.model if Path(args.model).is_dir() else "runs/eval"))
    for step in (out.resolve(), *out.resolve().parents):         # which the run deletes when it saves the next
        if re.fullmatch(STEP, step.name) and (step.parent / "metrics.jsonl").exists():
            if args.out:
                raise InputError(f"--out {out} goes when that run saves its next step: give {step.parent}")
            out = step.parent
    try:                                                         # before the work, not after it
        check_writable(out)
    except OSError as error:
        raise InputError(f"--out {out} cannot be written ({error.strerror}): give another folder") from None
    with held(out):                                              # if a run's: no train.py goes on meanwhile
        return evaluate(args, examples, out, others)


def evaluate(args, examples, out, others):
    """The sweep: what is not in out/eval.json yet is measured, row by row. others: rows that join the picture."""
    device, dtype = pick_device(args.device, args.dtype)
    before = {key: model_digest(find_folder(vars(args)[key])) for key in ("model", "dense") if vars(args)[key]}
    tokenizer = load_tokenizer(args.model)
    note = check_golds(examples, tokenizer, args.data)
    model = load_model(args.model, device=device, dtype=dtype)
    check_fit(model, tokenizer)
    plan = plan_rows(args, device, dtype, tokenizer, model)
    room = min(which.config.max_position_embeddings for _, which, _, _ in plan) - args.max_new_tokens
    fitting = [e for e in examples if len(encode_prompt(tokenizer, e.question)) <= room]
    if not fitting:
        raise InputError(f"every question is too long for the model with --max-new-tokens {args.max_new_tokens}: "
                         "lower it")
    if too_long := len(examples) - len(fitting):
        note = f"; {too_long} left out, longer than {room} tokens{note}"

    made = made_with(args, plan, fitting, device)
    for key in before:
        if made[key] != before[key]:
            raise InputError(f"--{key} {vars(args)[key]} was replaced while it was loaded: start again")
    for other in args.compare:
        check_compared(other, made)
    file, wanted = out / "eval.json", [[name, budget] for name, _, _, budget in plan]
    sweep = open_sweep(file, vars(args), made, wanted, args.overwrite)
    rows, batch = sweep["rows"], min(args.batch_size, len(fitting))
    if rows:
        print(f"rows already in {file}: {len(rows)}; to go: {len(sweep['missing'])}")
    print(f"\n{len(fitting)} problems of {args.data}{note}, batches of {batch}\n\n{HEADER}")
    print("".join(line_of(r) + "\n" for r in rows), end="", flush=True)
    try:
        for name, which, policy, budget in plan:
            if [name, budget] in sweep["missing"]:
                add_row(file, sweep, run_row(name, which, tokenizer, fitting, policy, budget, args))
                print(line_of(rows[-1]), flush=True)
    except KeyboardInterrupt:
        if rows:
            print(f"\ninterrupted: the rows so far are in {file}; the same command "
                  f"{'without --overwrite ' * args.overwrite}goes on", file=sys.stderr)
        raise
    if any(r["cut"] for r in rows):
        print(f"cut: how many answers had not ended after --max-new-tokens {args.max_new_tokens}; raise it")
    for what, interpolated in (("skipped", sweep["interpolated"]), ("MACs saved", sweep["interpolated_macs"])):
        print("\naccuracy at exactly    " + "".join(f"{t:>7.0%}" for t in TARGETS)
              + f"   {what} (linear between the rows above; - is outside them)")
        for name, values in interpolated.items():
            print(f"{name:20}   " + "".join("      -" if v is None else f"{v:>7.1%}" for v in values))
    if args.show_branches is not None:
        show_branches(rows, args.show_branches)
    rows = joined([(rows, args.model, out), *others]) if others else rows
    drawn, left = plot(rows, out / "eval.png"), len(sweep["missing"])
    print(f"\nwritten: {file}" + f", {out / 'eval.png'}" * bool(drawn)
          + f"; rows that an earlier command lacks still: {left}" * bool(left))
    return 0


if __name__ == "__main__":
    run(main, out_of_memory="lower --batch-size (if rows are there already: with another --out)")
