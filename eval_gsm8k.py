"""Accuracy against compute saved: the sweep over budgets, the interpolation, the table and the plot.

    python eval_gsm8k.py --model runs/demo --dense examples/tiny-llama              # the built-in problems
    python eval_gsm8k.py --model runs/llama --data test.jsonl --max-new-tokens 400  # GSM8K

Zero-shot with the training template. An answer counts if the first `#### number` in it is the right one.
"""
import json
import os
import re
import time
from pathlib import Path

from console import InputError, pick_device, pyplot, run
from flags import Parser, add_machine_flags, seed_number, whole

from tqdm import tqdm

from data import encode_prompt, load_examples
from gates import check_budget
from generate import generate
from load_weights import check_fit, load_model, load_tokenizer, read_json
from savings import Savings
from thresholds import make_policy

BUDGETS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)
TARGETS = (0.0, 0.05, 0.10, 0.15, 0.20, 0.25)                    # the columns of the paper's Table 1


def normalise(answer):
    """Strip what does not make a number another one: commas, dollar signs, one full stop at the end, case."""
    return re.sub(r"[,$]", "", answer).strip().removesuffix(".").lower()


def extract_answer(text, flexible=False):
    """The answer in a generated text, normalised, or None.

    Strict: what follows the first "####": a number, or an option's letter. Flexible: the last number anywhere (the
    rules of the GSM8K task in EleutherAI's lm-evaluation-harness). Text after a new "Question:" is not looked at.
    """
    text = text.split("Question:")[0]
    if flexible:
        found = re.findall(r"-?[$0-9.,]{2,}|-?[0-9]+", text)
        return normalise(found[-1]) if found else None
    found = re.search(r"#### (-?[0-9.,]+|[A-E]\b)", text)
    return normalise(found[1]) if found else None


def interpolate(points, targets=TARGETS):
    """Accuracy at exact savings: piecewise linear between measured (skipped, accuracy) points, in any order.

    Points at the same saving are averaged. Outside the measured range there is no value (None), never a clamp.
    """
    by_x = {}
    for x, y in points:
        by_x.setdefault(x, []).append(y)
    xs = sorted(by_x)
    ys = [sum(by_x[x]) / len(by_x[x]) for x in xs]
    values = []
    for target in targets:
        value = next((y for x, y in zip(xs, ys) if abs(x - target) < 1e-9), None)
        for x0, y0, x1, y1 in zip(xs, ys, xs[1:], ys[1:]):
            if value is None and x0 < target < x1:
                value = y0 + (y1 - y0) * (target - x0) / (x1 - x0)
        values.append(value)
    return values


def run_row(name, model, tokenizer, examples, policy, budget, args):
    """One line of the table: generate answers to all examples under one policy and score them. A dict."""
    started, savings, strict, flexible = time.perf_counter(), Savings(model.config), 0, 0
    for start in tqdm(range(0, len(examples), args.batch_size), desc=f"{name} {budget:.2f}", leave=False):
        batch = examples[start:start + args.batch_size]
        prompts = [encode_prompt(tokenizer, e.question) for e in batch]
        result = generate(model, prompts, args.max_new_tokens, policy, set(model.config.eos_ids))
        for example, new in zip(batch, result.tokens):
            text, gold = tokenizer.decode(new), normalise(example.answer)
            strict += extract_answer(text) == gold
            flexible += extract_answer(text, flexible=True) == gold
        savings += result.savings
    n, p, saved = len(examples), strict / len(examples), savings.report()
    three = lambda report: {key: report[key] for key in ("skipped", "skipped_per_call", "macs_saved")}
    return {"row": name, "policy": policy.kind, "budget": budget, "n": n, "accuracy": p,
            "stderr": (p * (1 - p) / n) ** 0.5, "flexible": flexible / n, **three(saved),
            **{part: three(saved[part]) for part in ("prompt", "answer") if part in saved},
            "seconds": round(time.perf_counter() - started, 2)}


THREE = (("skipped", "skipped, %", ""), ("skipped_per_call", "averaged per call, %", ""),
         ("macs_saved", "MACs saved, %", "+"))                   # key, title, sign
HEADER = (" " * 51 + " ".join(f"{title:^21}" for _, title, _ in THREE) + "\n"
          + f"{'row':19} {'budget':6} {'accuracy (s.e.)':>15} {'flexible':>8}"
          + " ".join(["    all prompt answer"] * 3) + f" {'sec':>6}")


def line_of(r):
    """A row as printed: each of the three numbers for all tokens, for prompt tokens, and for generated tokens."""
    parts = r, r.get("prompt"), r.get("answer")
    three = ["".join(f"{100 * p[key]:{sign}7.1f}" if p else "      -" for p in parts) for key, _, sign in THREE]
    return (f"{r['row']:19} {r['budget']:6.3f} {r['accuracy']:8.1%} ({r['stderr']:4.1%}) {r['flexible']:8.1%}"
            + " ".join(three) + f" {r['seconds']:6.1f}")


def rows_of(file):
    """The GateSkip rows of an eval.json that this program wrote, named after its run. InputError if it is none."""
    try:
        stored = read_json(file)
        name = f"GateSkip, {Path(stored['settings']['model']).name}"
        needed = ("skipped", "macs_saved", "accuracy", "stderr")
        rows = [r for r in stored["rows"] if r["row"] == "GateSkip"]
        return [{"row": name, **{key: float(r[key]) for key in needed}} for r in rows]
    except (OSError, KeyError, TypeError, ValueError):
        raise InputError(f"--compare {file} is no eval.json of this program: give one from another run's "
                         "--out") from None


def plot(rows, path):
    """Accuracy against what was skipped, and against MACs saved, with standard errors."""
    plt = pyplot()
    if plt is None:
        return
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True, layout="constrained")
    for name in dict.fromkeys(r["row"] for r in rows):
        mine = sorted((r for r in rows if r["row"] == name), key=lambda r: r["skipped"])
        for axis, key in zip(axes, ("skipped", "macs_saved")):
            x, y, error = ([100 * r[k] for r in mine] for k in (key, "accuracy", "stderr"))
            axis.errorbar(x, y, error, label=name, marker="o", markersize=4, capsize=2, ls="-" if len(mine) > 1 else "")
    for axis, label in zip(axes, ("(token, branch) pairs skipped, %", "multiply-accumulates saved, gates paid, %")):
        axis.set(xlabel=label)
        axis.set_ylim(-3, 103)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(f"exact answers, % of {rows[0]['n']} held-out problems")
    axes[0].legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def parse_args(argv):
    p = Parser("Accuracy against compute saved.")
    add = p.add_argument
    add("--model", default="runs/demo", help="the gated model: folder, a run's --out, or hub id")
    add("--dense", help="the same model without gates: for the dense row and for random skipping")
    add("--data", default="arithmetic", help="arithmetic (its test problems), or a .jsonl or .parquet file")
    add("--limit", type=whole(1), default=200, help="the first N problems")
    add("--budgets", type=check_budget, nargs="+",
        help="default: 1.0 0.95 0.9 0.85 0.8 0.75, as far down as the model is calibrated")
    add("--policy", choices=("auto", "frozen", "batch", "topk"), default="auto",
        help="of the GateSkip row; batch depends on --batch-size")
    add("--batch-size", type=whole(1), default=100, help="problems that are generated together")
    add("--max-new-tokens", type=whole(1), default=96, help="of each answer")
    add("--compare", nargs="+", default=[], metavar="FILE",
        help="eval.json of other runs, whose GateSkip rows join the picture")
    add("--out", help="folder for eval.json and eval.png; default: the --model folder if it is local, else runs/eval")
    add("--seed", type=seed_number, default=0, help="of random skipping")
    add_machine_flags(p)
    return p.parse_args(argv)


def plan_rows(args, device, dtype, tokenizer, model):
    """[(row name, model, policy, budget)], every policy made before the first row: what cannot be run is said now."""
    if args.budgets is None:
        lowest = min(map(float, model.config.gateskip.get("thresholds", {"0": []})))
        args.budgets = [b for b in BUDGETS if b >= lowest]
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


def main(argv=None):
    args = parse_args(argv)
    others = [row for file in args.compare for row in rows_of(file)]
    examples = load_examples(args.data, "test", args.limit)
    if isinstance(examples[0], str):
        raise InputError(f"--data {args.data} is plain text: accuracy needs questions with answers")
    device, dtype = pick_device(args.device, args.dtype)
    out = Path(args.out or (args.model if Path(args.model).is_dir() else "runs/eval"))
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out} is a file: give a folder")
    out.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load_model(args.model, device=device, dtype=dtype), load_tokenizer(args.model)
    check_fit(model, tokenizer)
    plan = plan_rows(args, device, dtype, tokenizer, model)
    room = min(which.config.max_position_embeddings for _, which, _, _ in plan) - args.max_new_tokens
    fitting = [e for e in examples if len(encode_prompt(tokenizer, e.question)) <= room]
    if not fitting:
        raise InputError(f"every question is too long for the model with --max-new-tokens {args.max_new_tokens}: "
                         "lower it")
    note, too_long = "", len(examples) - len(fitting)
    if too_long:
        note = f"; {too_long} left out, longer than {room} tokens"

    batch = min(args.batch_size, len(fitting))
    print(f"\n{len(fitting)} problems of {args.data}{note}, batches of {batch}\n\n{HEADER}")
    rows = []
    for name, which, policy, budget in plan:
        rows.append(run_row(name, which, tokenizer, fitting, policy, budget, args))
        print(line_of(rows[-1]), flush=True)
        points = {}
        for r in rows:
            points.setdefault(r["row"], []).append((r["skipped"], r["accuracy"]))
        exact = {who: interpolate(measured) for who, measured in points.items()}
        result = {"settings": vars(args), "rows": rows, "at_exactly": list(TARGETS), "interpolated": exact}
        (out / "eval.tmp").write_text(json.dumps(result, indent=1))
        os.replace(out / "eval.tmp", out / "eval.json")
    print("\naccuracy at exactly    " + "".join(f"{t:>7.0%}" for t in TARGETS)
          + "   skipped (linear between the rows above; - is outside them)")
    for name, values in exact.items():
        print(f"{name:20}   " + "".join("      -" if v is None else f"{v:>7.1%}" for v in values))
    if others:                                                   # say whose rows are whose
        rows = [{**r, "row": f"GateSkip, {Path(args.model).name}"} if r["row"] == "GateSkip" else r for r in rows]
    plot(rows + others, out / "eval.png")
    print(f"\nwritten: {out / 'eval.json'}, {out / 'eval.png'}")
    return 0


if __name__ == "__main__":
    run(main, out_of_memory="lower --batch-size")
