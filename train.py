"""Algorithm 1 as one top-to-bottom loop: FP32, AdamW, a shrinking budget, checkpoints, resume.

    python train.py                                             # gates on the embedded model, minutes on a laptop
    python train.py --preset llama-3.2-1b --data train.jsonl    # Table 15 of the paper, one H100

At the end it calibrates the frozen thresholds and prints what each budget costs on held-out problems.
"""
import argparse
import json
import math
import os
import pickle
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from data import batch_at, collate, encode_all, hold_out, load_examples
from gates import ARCHS, FORMS, GRANULARITIES, GateConfig, InputError, Savings, SkipPolicy, budget_at, calibrate, check_budget, sparsity_loss
from generate import generate, make_policy, pick_device, pyplot, seed_number
from load_weights import check_fit, config_from_hf, find_folder, load_model, load_tokenizer, new_model, read_json, save_config, save_model
from model import SHAPES, Model

# The defaults of the flags are Table 15 of the paper; a preset changes what its model needs.
PRESETS = {
    "tiny": dict(model="examples/tiny-llama", data="arithmetic", steps=1800, batch_size=8, seq_len=96, lr=1e-3, warmup=50),
    "llama-3.2-1b": dict(model="meta-llama/Llama-3.2-1B"),
    "llama-3.2-3b": dict(model="meta-llama/Llama-3.2-3B", checkpoint_activations=True),
    "llama-3.1-8b": dict(model="meta-llama/Llama-3.1-8B", checkpoint_activations=True, freeze_backbone=True, lr=1e-4),
    "gemma-2-2b": dict(model="google/gemma-2-2b", checkpoint_activations=True),
}
BUDGETS = (0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.6, 0.5)            # calibrated as far down as training went
HELD_OUT, CONTINUE = 64, 96                                      # calibration sequences, tokens to continue each by
NOT_SETTINGS = ("resume", "overwrite", "out", "dry_run", "save_every",           # flags that a resumed run may change
                "eval_limit", "calibrate", "calibration_sequences")


def parse_args(argv):
    p = argparse.ArgumentParser(description="Fine-tune a model with residual gates (Algorithm 1). The defaults shown are "
                                "Table 15 of the paper; a preset changes some: " + "; ".join(f"{name} {changed}" for name, changed in PRESETS.items()),
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = p.add_argument
    add("--preset", choices=PRESETS, help="flag defaults for a model; tiny if neither --model nor --init-config is given")
    # input and output
    add("--model", help="folder, a run's --out, or hub id")
    add("--init-config", metavar="FILE", help="start from scratch with this config.json (and the tokenizer.json beside it)")
    add("--data", help="arithmetic, or a .jsonl, .parquet or .txt file")
    add("--eval-data", help="file for the table at the end; default: problems held out from --data")
    add("--eval-limit", type=int, default=200, help="problems in that table")
    add("--calibration-sequences", type=int, default=HELD_OUT, help="how many of the held-out ones to calibrate on")
    add("--calibrate", type=float, nargs="+", metavar="BUDGET", help="budgets to calibrate at the end; default: 0.95, 0.9, ... as far down as training went")
    add("--out", default="runs/demo", help="folder of this run: checkpoints, metrics.jsonl, curves")
    add("--save-every", type=int, default=500, help="steps between checkpoints; the last step is always saved")
    add("--resume", action="store_true", help="go on with the run in --out (same flags)")
    add("--overwrite", action="store_true", help="delete the run in --out first")
    add("--dry-run", action="store_true", help="say what would be done, what it needs, and stop")
    # optimisation
    add("--steps", type=int, default=15493)
    add("--batch-size", type=int, default=1, help="sequences per forward pass; one quantile ranks all their tokens")
    add("--grad-accum", type=int, default=1, help="forward passes per step")
    add("--seq-len", type=int, default=4096, help="longer examples are dropped and counted")
    add("--lr", type=float, default=3e-6, help="peak learning rate; cosine to 0")
    add("--warmup", type=int, default=1000, help="steps of linear warm-up")
    add("--seed", type=seed_number, default=1)
    # the paper
    add("--schedule", choices=("linear", "uniform"), default="linear", help="budget: Algorithm 1's decay, or drawn anew each step")
    add("--budget-start", type=float, default=1.0, help="share of tokens that a branch keeps at first")
    add("--budget-end", type=float, default=0.8, help="and at last; uniform draws between the two")
    add("--sparsity-weight", type=float, default=0.1, help="lambda")
    add("--sparsity-loss", choices=("l2", "l1", "l2_norm", "kl"), default="l2", help="mean of g^2, mean of g, eq. 4, or towards the budget")
    add("--gate", choices=(*FORMS, "none"), default="vector", help="none: plain fine-tuning of the dense model")
    add("--gate-arch", choices=ARCHS, default="linear", help="lowrank: U V with a narrow middle; mlp: two layers")
    add("--gate-rank", type=int, default=0, help="of lowrank; 0: 16 where the model is at least 1024 wide, else width / 16")
    add("--gate-shared", action="store_true", help="one attention and one MLP gate for all layers")
    add("--gate-input", choices=("normed", "residual"), default="normed", help="what the branch reads, or the residual stream (eq. 2 literally)")
    add("--gate-placement", choices=("after", "before"), default="after", help="the gate multiplies the branch's output or its input")
    add("--gate-detach", action="store_true", help="no gradient into the backbone through the gate's input")
    add("--skip", choices=GRANULARITIES, default="all", help="which branches may be skipped")
    add("--kv", choices=("copy_up", "dense"), default="copy_up", help="K and V of a skipped token")
    add("--freeze-backbone", action="store_true", help="train the gates only")
    # machine
    add("--compute", choices=("masked", "compact"), default="masked", help="run every row and select, or gather the kept rows")
    add("--checkpoint-activations", action="store_true", help="recompute each block in the backward pass: less memory, more time")
    add("--compile", action="store_true", help="torch.compile (masked only)")
    add("--tf32", action="store_true", help="let the GPU round matrix products to TF32")
    add("--device", help="default: cuda if there is one, else cpu")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the backbone; gates stay float32")
    chosen, _ = p.parse_known_args(argv)
    preset = chosen.preset or ("tiny" if not chosen.model and not chosen.init_config else None)
    p.set_defaults(preset=preset, **PRESETS.get(preset, {}))
    args = p.parse_args(argv)

    for budget in (args.budget_start, args.budget_end, *(args.calibrate or ())):
        check_budget(budget)
    if min(args.calibrate or [1.0]) < args.budget_end:
        raise InputError(f"--calibrate {min(args.calibrate)} is below --budget-end {args.budget_end}, the lowest that is trained for")
    if args.budget_end > args.budget_start:
        raise InputError(f"--budget-end {args.budget_end} is above --budget-start {args.budget_start}: the budget shrinks")
    for name in ("steps", "batch_size", "grad_accum", "save_every", "eval_limit", "calibration_sequences"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} {getattr(args, name)} must be at least 1")
    if not (math.isfinite(args.lr) and args.lr > 0 and math.isfinite(args.sparsity_weight) and args.sparsity_weight >= 0 and args.warmup >= 0):
        raise InputError("--lr must be positive, --sparsity-weight and --warmup at least 0, all finite")
    if chosen.init_config and chosen.model:
        raise InputError("--init-config starts from scratch and --model from a checkpoint: give one of them")
    if args.data is None:
        raise InputError("--data is missing: a .jsonl, .parquet or .txt file, or the word arithmetic")
    if args.freeze_backbone and args.gate == "none":
        raise InputError("--freeze-backbone with --gate none leaves nothing to train")
    if args.compile and args.compute == "compact":
        raise InputError("--compile needs static shapes: use --compute masked")
    if args.compile and not shutil.which((os.environ.get("CXX") or "g++").split()[0]):
        raise InputError("--compile needs a C++ compiler and there is no g++ here: install one, or leave --compile out")
    if args.resume and args.overwrite:
        raise InputError("--resume keeps the run in --out and --overwrite deletes it: give one of them")
    return args


def learning_rate(step, total, peak, warmup):
    """Linear warm-up, then cosine from peak to 0, clamped there (the authors' schedule rises again). step from 0."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = min((step - warmup) / max(total - 1 - warmup, 1), 1.0)
    return peak * 0.5 * (1.0 + math.cos(math.pi * progress))


# ---------------------------------------------------------------------------------------------------------------------
# A run on disk: --out holds step-000500/, the one-line file `latest`, and metrics.jsonl
# ---------------------------------------------------------------------------------------------------------------------

RUN_FILES = ("step-", ".step-", "latest", "metrics.", "eval.")   # how the names in --out begin (eval.* by eval_gsm8k.py)


def save_checkpoint(out, step, model, tokenizer, optimizer, settings):
    """Write out/step-NNNNNN under a temporary name, rename it, point `latest` to it, then delete older ones.

    A kill at any instant, or a full disk (OSError), leaves the last good state.
    """
    final, temporary = out / f"step-{step:06d}", out / f".step-{step:06d}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        save_model(model, temporary, tokenizer)
        torch.save({"step": step, "settings": settings, "optimizer": optimizer.state_dict(), "rng": torch.get_rng_state()},
                   temporary / "train_state.pt")
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, (OSError, RuntimeError)):           # torch.save calls a full disk a RuntimeError
            raise OSError(f"{final} could not be saved, is the disk full? What was saved before stays ({' '.join(str(error).split())})") from None
        raise
    shutil.rmtree(final, ignore_errors=True)
    os.replace(temporary, final)
    (out / "latest.tmp").write_text(final.name + "\n")
    os.replace(out / "latest.tmp", out / "latest")
    for old in out.glob("step-*"):
        if old != final:
            shutil.rmtree(old, ignore_errors=True)
    return final


def open_run(args, settings):
    """Refuse --out or continue it. Returns the loaded train_state of a resumed run, else None. Deletes no run yet."""
    out = Path(args.out)
    if args.resume:
        if not (out / "latest").is_file():
            steps = sorted(p.name for p in out.glob("step-*"))
            raise InputError(f"--resume: {out} has lost its file `latest`: write {steps[-1]} into it" if steps else
                             f"--resume: {out} holds no run that has saved; start one without --resume (with --overwrite if files are there)")
        path = find_folder(out) / "train_state.pt"
        try:
            state = torch.load(path, weights_only=True, map_location="cpu")
            was, step = state["settings"], state["step"]
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, KeyError, TypeError):
            raise InputError(f"--resume: {path} is missing or damaged; a new run can start from its weights: --model {path.parent}, another --out") from None
        different = [f"--{key.replace('_', '-')} {value} (was {was.get(key)})" for key, value in settings.items() if was.get(key) != value]
        if different:
            raise InputError(f"--resume: {out} was started with other settings: {', '.join(different)}")
        lines = _metrics(out)[:step]                             # cut back to the checkpoint
        if len(lines) < step:
            raise InputError(f"--resume: {out / 'metrics.jsonl'} has only {len(lines)} good lines and the checkpoint is of step {step}; "
                             f"a new run can start from its weights: --model {path.parent}, another --out")
        (out / "metrics.tmp").write_text("".join(line + "\n" for line in lines))
        os.replace(out / "metrics.tmp", out / "metrics.jsonl")
        for left in out.glob(".step-*.tmp"):                     # by a kill while saving
            shutil.rmtree(left, ignore_errors=True)
        return state
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out} is a file")
    if out.is_dir() and any(out.iterdir()):
        if not args.overwrite:
            raise InputError(f"--out {out} already holds files: --resume goes on with that run, --overwrite deletes it")
        foreign = [p.name for p in out.iterdir() if not p.name.startswith(RUN_FILES)]
        if foreign:
            raise InputError(f"--overwrite deletes runs only, and {out} also holds {foreign[0]}: move it away, or choose another --out")
        for flag in ("model", "init_config", "data", "eval_data"):
            value = getattr(args, flag)
            if value and out.resolve() in (Path(value).resolve(), *Path(value).resolve().parents):
                raise InputError(f"--overwrite would delete --{flag.replace('_', '-')} {value}, which lies in --out {out}: choose another --out")
    return None


def _metrics(out):
    """The lines of out/metrics.jsonl up to the first that is missing or damaged."""
    lines = []
    try:
        for line in (out / "metrics.jsonl").read_text(encoding="utf-8", errors="replace").splitlines():
            json.loads(line)
            lines.append(line)
    except (OSError, ValueError):
        pass
    return lines


def plot_metrics(out, name="metrics.png"):
    """out/metrics.jsonl as curves."""
    plt = pyplot()
    if plt is None:
        return
    rows = [json.loads(line) for line in _metrics(out)]
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
    for axis, keys, title in zip(axes, (("loss", "ce"), ("gate_mean",), ("budget", "kept")),
                                 ("loss", "mean gate", "share of (token, branch) pairs")):
        for key in keys:
            values = [1 - r["skipped"] if key == "kept" else r[key] for r in rows]
            style = dict(linewidth=0, marker=".", markersize=3) if title.startswith("share") else dict(linewidth=1)
            axis.plot([r["step"] for r in rows], values, label={"ce": "cross-entropy"}.get(key, key.replace("_", " ")), **style)
        axis.set(xlabel="step", title=title)
        axis.legend()
        axis.ticklabel_format(axis="y", useOffset=False)
    axes[0].set_yscale("log")
    figure.savefig(out / name, dpi=120)
    plt.close(figure)


# ---------------------------------------------------------------------------------------------------------------------
# Held-out problems
# ---------------------------------------------------------------------------------------------------------------------

def answer_places(input_ids, loss_mask):
    """Where the answer's tokens are predicted: flat places b * S + s (N,), and the ids that follow there (N,)."""
    places = loss_mask[:, 1:].nonzero()                          # (N, 2): token s+1 is to be predicted at s
    return places[:, 0] * input_ids.shape[1] + places[:, 1], input_ids[:, 1:][loss_mask[:, 1:]]


@torch.no_grad()
def evaluate(model, items, policy, batch_size=16):
    """(answer loss, token accuracy, savings report) of teacher-forced items, in compact mode."""
    device, savings, loss, right, count = next(model.parameters()).device, Savings(model.config), 0.0, 0, 0
    for start in range(0, len(items), batch_size):
        input_ids, loss_mask, valid = collate(items[start:start + batch_size])       # (B, S) each
        places, targets = answer_places(input_ids, loss_mask)
        logits, trace = model(input_ids.to(device), valid=None if valid.all() else valid.to(device), policy=policy,
                              compute="compact", logits=places.to(device))           # (N, V)
        targets = targets.to(device)
        loss += F.cross_entropy(logits.float(), targets, reduction="sum").item()
        right += (logits.argmax(-1) == targets).sum().item()
        count += len(targets)
        savings.add(trace)
    return loss / count, right / count, savings.report()


def prompt_of(item):
    """The part of an item that the model is to continue: up to the answer, or half of a plain text."""
    ids, mask = item
    start = mask.index(True)
    return ids[:start] if start > 1 else ids[:max(1, len(ids) // 2)]


def finish(model, args, sets, out, step, say):
    """Calibrate, store the thresholds in the last checkpoint, and print what each budget costs."""
    config = model.config
    budgets = [1.0]
    if config.gate is not None:
        eos = set(config.eos_ids)

        def realised(policy, items=sets["calibration"]):
            prompts = [prompt_of(i) for i in items]
            room = config.max_position_embeddings - max(map(len, prompts))
            return generate(model, prompts, min(CONTINUE, room), policy, eos).savings["skipped"]

        budgets += sorted({b for b in args.calibrate or (*BUDGETS, args.budget_end) if args.budget_end <= b < 1.0}, reverse=True)
        print(f"calibrating on {len(sets['calibration'])} held-out sequences that the model continues")
        result = calibrate(model, [ids for ids, _ in sets["calibration"]], budgets, args.skip, args.kv, realised, say=say)
        config.gateskip.update(result, step=step)
        save_config(model, out / (out / "latest").read_text().strip())
        checked = {b: realised(make_policy(config, "frozen", b), sets["check"]) for b in budgets[1:]}
        share = SkipPolicy(skip=args.skip).skippable_share(config.num_hidden_layers)
        print("skipped on a second held-out set, asked -> realised: "
              + ", ".join(f"{(1 - b) * share:.1%} -> {x:.1%}" for b, x in checked.items()))

    print(f"\n{len(sets['eval'])} held-out problems, answers given and not generated"
          + (", thresholds frozen\n" if config.gate is not None else "\n"))
    print("budget   answer loss   token accuracy   skipped   per call   macs_saved   random skipping, same share: answer loss")
    for budget in budgets:
        policy = make_policy(config, "frozen", budget)
        loss, accuracy, saved = evaluate(model, sets["eval"], policy)
        row = f"{budget:6.3f}   {loss:11.4f}   {accuracy:14.1%}   {saved['skipped']:7.1%}   {saved['skipped_per_call']:8.1%}   {saved['macs_saved']:+10.1%}"
        if budget < 1.0:
            share = saved["skipped"] / policy.skippable_share(config.num_hidden_layers)
            chance = SkipPolicy("random", max(1.0 - share, 1e-3), args.skip, args.kv, generator=torch.Generator().manual_seed(args.seed))
            row += f"   {evaluate(model, sets['eval'], chance)[0]:11.4f}"
        print(row)


def load_sets(args, tokenizer, eos_id):
    """{"train", "calibration", "check", "eval"}: lists of (ids, loss_mask), disjoint. Says what was dropped."""
    if args.data == "arithmetic":
        held = load_examples("arithmetic", "calibration", 2 * HELD_OUT, args.seed)
        texts = {"train": load_examples("arithmetic", "train", min(args.steps * args.batch_size * args.grad_accum, 200_000), args.seed),
                 "calibration": held[:HELD_OUT], "check": held[HELD_OUT:], "eval": load_examples("arithmetic", "test", args.eval_limit)}
    else:
        names = ("train", "calibration", "check") + (() if args.eval_data else ("eval",))
        texts = dict(zip(names, hold_out(load_examples(args.data), *(HELD_OUT,) * (len(names) - 1))))
    if args.eval_data:
        texts["eval"] = load_examples(args.eval_data, "test", args.eval_limit)
    sets, dropped = {}, 0
    for name in ("calibration", "check"):
        texts[name] = texts[name][:args.calibration_sequences]
    for name, examples in texts.items():
        sets[name], n = encode_all(examples, tokenizer, eos_id, args.seq_len)
        dropped += n
    note = f"; {dropped} longer than --seq-len {args.seq_len} left out" if dropped else ""
    if shared := len(set(texts["train"]) & set(texts["eval"])):
        note += f"; CAUTION: {shared} of the eval problems are trained on, they are in --data too"
    print("data: " + ", ".join(f"{len(items)} {name}" for name, items in sets.items()) + note)
    return sets


# ---------------------------------------------------------------------------------------------------------------------
# Algorithm 1
# ---------------------------------------------------------------------------------------------------------------------

def main(argv=None):
    args = parse_args(sys.argv[1:] if argv is None else argv)
    settings = {key: value for key, value in vars(args).items() if key not in NOT_SETTINGS}
    device, dtype = pick_device(args.device, args.dtype, args.tf32)
    torch.manual_seed(args.seed)
    gate = None
    if args.gate != "none":
        gate = GateConfig(args.gate, args.gate_arch, args.gate_rank, args.gate_shared, args.gate_input, args.gate_placement, args.gate_detach)
    if args.dry_run:
        return dry_run(args, gate)

    # open the run, load model and data
    out = Path(args.out)
    state = open_run(args, settings)
    if args.resume:
        model, tokenizer = load_model(out, device=device, dtype=dtype), load_tokenizer(out)
    elif args.init_config:
        model, tokenizer = new_model(args.init_config, gate, device, dtype), load_tokenizer(Path(args.init_config).parent)
    else:
        model, tokenizer = load_model(args.model, gate, device, dtype), load_tokenizer(args.model)
    config = model.config
    if config.gate != gate:
        raise InputError(f"--gate none, but {model.source} has gates: start from the model without them, or leave --gate out")
    check_fit(model, tokenizer)
    if not config.eos_ids:
        raise InputError("config.json and generation_config.json name no eos_token_id: training needs a token that ends an answer")
    if args.seq_len > config.max_position_embeddings:
        raise InputError(f"--seq-len {args.seq_len} exceeds the model's {config.max_position_embeddings} positions")
    sets = load_sets(args, tokenizer, config.eos_ids[0])
    if gate is not None:
        config.gateskip = dict(skip=args.skip, kv=args.kv, budget_start=args.budget_start, budget_end=args.budget_end,
                               schedule=args.schedule)   # an older calibration would not fit the weights to come

    if args.overwrite and out.exists():                          # not before everything that may be wrong has loaded
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)

    # AdamW, Table 15
    for name, p in model.named_parameters():
        p.requires_grad_("_gate." in name or not args.freeze_backbone)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.001, fused=True)
    first = 0
    if state is not None:
        try:
            optimizer.load_state_dict(state["optimizer"])
            torch.set_rng_state(state["rng"])
        except (KeyError, ValueError, TypeError, RuntimeError) as error:
            raise InputError(f"--resume: train_state.pt in {out} is not of this run ({error}): start again with another --out") from None
        first = state["step"]
    n_gates = sum(p.numel() for name, p in model.named_parameters() if "_gate." in name)
    n_all = sum(p.numel() for p in model.parameters())
    print(f"model: {n_all:,} parameters, {n_gates:,} of them gates; {sum(p.numel() for p in trained):,} are trained; "
          f"step {first} of {args.steps}, out {out}")

    stop = []
    previous = signal.signal(signal.SIGINT, lambda *_: stop.append(True))       # Ctrl-C: finish the step, save, leave
    run = torch.compile(model) if args.compile else model
    model.train()
    metrics = open(out / "metrics.jsonl", "a", encoding="utf-8")
    bar = tqdm(range(first, args.steps), initial=first, total=args.steps, desc="train", mininterval=0.5)
    for step in bar:                                                            # line 1
        b = budget_at(step, args.steps, args.budget_start, args.budget_end, args.schedule, args.seed)     # line 3
        policy = SkipPolicy("none" if gate is None else "batch", b, args.skip, args.kv)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.lr, args.warmup)

        picked = [sets["train"][i] for i in batch_at(len(sets["train"]), args.batch_size * args.grad_accum, args.seed, step)]   # line 2
        answer_tokens = sum(sum(mask) for _, mask in picked)
        totals = torch.zeros(5, device=device)                                  # ce, sparsity, gate sum, kept, pairs
        for start in range(0, len(picked), args.batch_size):
            input_ids, loss_mask, valid = collate(picked[start:start + args.batch_size])                  # (B, S) each
            places, targets = (x.to(device) for x in answer_places(input_ids, loss_mask))                 # (N,), (N,)
            valid = None if valid.all() else valid.to(device)
            logits, trace = run(input_ids.to(device), valid=valid, policy=policy, compute=args.compute,   # lines 4-16, and Embed of line 2
                                logits=places, checkpoint_blocks=args.checkpoint_activations)             # (N, V)
            ce = F.cross_entropy(logits.float(), targets, reduction="sum") / answer_tokens                # line 17: L_CE
            sparsity = ce.new_zeros(())
            if gate is not None:
                sparsity = sparsity_loss(trace.gates, valid, args.sparsity_loss, b) / args.grad_accum     # line 18: L_S
            (ce + args.sparsity_weight * sparsity).backward()                                             # line 19
            with torch.no_grad():
                keep = torch.stack(trace.keep)                                                            # (2L, B, S)
                score = torch.stack(trace.scores).where(trace.valid, 0.0).sum() if gate is not None else keep.sum()
                totals += torch.stack([ce, sparsity, score.float(), keep.sum().float(), trace.valid.sum().float() * len(keep)])
        norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        ce, sparsity, score, kept, pairs, norm = torch.cat([totals, norm.float()[None]]).tolist()     # the one host synchronisation of a step
        row = {"step": step, "loss": ce + args.sparsity_weight * sparsity, "ce": ce, "sparsity": sparsity,
               "gate_mean": score / pairs, "budget": b, "skipped": 1 - kept / pairs, "lr": optimizer.param_groups[0]["lr"]}
        metrics.write(json.dumps(row) + "\n")
        metrics.flush()
        bar.set_postfix_str(f"loss {row['loss']:.3f} ce {ce:.3f} gate {row['gate_mean']:.3f} budget {b:.2f} skipped {row['skipped']:.1%}")
        if not math.isfinite(row["loss"] + norm):                               # the weights are spoilt: do not save them
            raise InputError(f"the loss is {row['loss']}, its gradient's norm {norm} at step {step}: lower --lr; nothing was saved since the last checkpoint")
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps or stop:
            save_checkpoint(out, step + 1, model, tokenizer, optimizer, settings)
        if stop:
            bar.close()
            signal.signal(signal.SIGINT, previous)
            print(f"stopped after step {step + 1}; saved in {out}. Go on with the same command and --resume")
            return 130
    metrics.close()
    signal.signal(signal.SIGINT, previous)

    plot_metrics(out)
    model.eval()
    finish(model, args, sets, out, args.steps, say=print)
    print(f"\nsaved in {out}; try: python generate.py --model {out} --show-compute --question \"...\"")
    return 0


# ---------------------------------------------------------------------------------------------------------------------
# What it needs, on paper
# ---------------------------------------------------------------------------------------------------------------------

def memory_on_paper(config, tokens, answer_tokens, frozen=False, checkpointing=False):
    """{part: bytes} of an FP32 training step (masked), counted from what autograd keeps; an upper bound if frozen.

    Per token and layer autograd keeps 10 H + 2 (Hq + Hkv) D + 4 I numbers: per branch the residual stream, the norm's
    two products, the gate and (without gates not) the branch's output; q, k, v and attention's output; four of the MLP's
    width. Gemma 2 adds 4 H for its second norms and two S x S matrices per head for the soft-capping. With checkpointing
    only each block's inputs and the gates stay, and one block at a time is recomputed. Logits: the product, its softmax,
    its gradient. Not counted: what the backward pass of one operation holds for a moment.
    """
    with torch.device("meta"):
        model = Model(config)
    n_all = sum(p.numel() for p in model.parameters())
    n_trained = sum(p.numel() for name, p in model.named_parameters() if "_gate." in name or not frozen)
    H, D, heads, kv_heads = config.hidden_size, config.head_dim, config.num_attention_heads, config.num_key_value_heads
    gates = 0 if config.gate is None else 2 * config.gate.widths(H)[1]
    block = (8 if gates else 6) * H + gates + 2 * (heads + kv_heads) * D + 4 * config.intermediate_size
    if config.gemma:
        block += 4 * H + 2 * (heads - kv_heads) * D + 2 * heads * tokens
    kept = H + 2 * kv_heads * D + gates
    activations = kept * config.num_hidden_layers + block if checkpointing else block * config.num_hidden_layers
    return {"weights": 4 * n_all, "gradients": 4 * n_trained, "Adam": 8 * n_trained,
            "activations": 4 * tokens * activations, "logits": 3 * 4 * answer_tokens * config.vocab_size}


def dry_run(args, gate):
    """Say what would be trained on what, and the memory it takes on paper; touch neither network nor --out."""
    source = args.init_config or args.model
    if args.init_config or Path(source).is_dir():
        path = Path(args.init_config or find_folder(source) / "config.json")
        config = config_from_hf(read_json(path), path)
    elif args.preset in SHAPES and source == PRESETS[args.preset]["model"]:
        config = replace(SHAPES[args.preset])                    # a copy: it is about to get gates
    else:
        raise InputError(f"--dry-run does not ask the hub for {source}: give a local folder or a --preset")
    config.gate = gate or config.gate
    examples = load_examples(args.data, "train", None if args.data != "arithmetic" else 1000, args.seed)
    tokens = args.batch_size * args.seq_len
    print(f"{source}: {config.num_hidden_layers} layers of width {config.hidden_size}, gate {gate or 'none'}")
    print(f"data {args.data}: " + ("made as needed" if args.data == "arithmetic" else f"{len(examples)} examples"))
    print(f"{args.steps} steps of {args.grad_accum} x {args.batch_size} sequences up to {args.seq_len} tokens, lr {args.lr}, "
          f"budget {args.budget_start} -> {args.budget_end} ({args.schedule})")
    print(f"memory on paper, FP32, {tokens} tokens at once, every one an answer token (GB):")
    for checkpointing in (False, True):
        parts = memory_on_paper(config, tokens, tokens, args.freeze_backbone, checkpointing)
        mine = "  <- this run" if checkpointing == args.checkpoint_activations else ""
        print(f"  {'with' if checkpointing else 'without':7} --checkpoint-activations: "
              + ", ".join(f"{name} {size / 1e9:.1f}" for name, size in parts.items()) + f" = {sum(parts.values()) / 1e9:.1f}{mine}")
    return 0


if __name__ == "__main__":
    try:
        status = main()
    except (InputError, OSError) as error:
        status = f"error: {error}"                               # said below, when the progress bar is gone
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        status = "error: out of memory: lower --batch-size or --seq-len (and raise --grad-accum), or add --checkpoint-activations"
    except KeyboardInterrupt:                                    # before the first step or after the last
        print("\ninterrupted: what was saved in --out stays, --resume goes on with it", file=sys.stderr)
        status = 130
    sys.exit(status)
