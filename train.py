"""Algorithm 1 as one top-to-bottom loop: FP32, AdamW, a shrinking budget.

    python train.py                                             # gates on the embedded model, minutes on a laptop
    python train.py --preset llama-3.2-1b --data train.jsonl    # Table 15 of the paper, one H100

First the recipe, then the loop (train), then what stands around it: opening the model, the flags. The sets of examples
are data.py's, calibration and the table at the end budgets.py's, what a run leaves on disk checkpoint.py's.
"""
import math
import os
import signal
import sys
from contextlib import nullcontext
from pathlib import Path

from console import InputError, pick_device, run
from flags import Parser, add_machine_flags, real, seed_number, whole

import torch
import torch.nn.functional as F
from tqdm import tqdm

from branches import SHOW_BRANCHES
from budgets import HELD_OUT, finish
from checkpoint import held, open_run, save_checkpoint, start_run
from combinations import check_combinations
from data import answer_places, batch_at, collate, load_sets
from distill import kl_divergence, open_teacher
from dry_run import dry_run
from gates import (ARCHS, FORMS, GATE_INPUTS, GRANULARITIES, KV_OF_SKIPPED, PLACEMENTS, SPARSITY_LOSSES, GateConfig,
                   SkipPolicy, budget_at, check_budget, skippable_share, sparsity_loss)
from load_weights import (check_fit, check_gates, find_folder, load_model, load_tokenizer, model_digest, new_model,
                          read_tokenizer)
from metrics import add_line, plot_metrics
from read_data import digest
from price import RunningQuantile
from savings import branch_costs

# Table 15 of the paper. What is a flag's name is that flag's default; the rest is used as it stands.
TABLE_15 = dict(
    betas=(0.9, 0.999), eps=1e-8, weight_decay=0.001, clip=1.0,  # AdamW, and the gradient's largest norm
    steps=15493, batch_size=1, seq_len=4096, warmup=1000,        # cosine to 0
    schedule="linear", budget_start=1.0, budget_end=0.8, sparsity_weight=0.1, dtype="float32",
    lr=3e-6,                                                     # NOT in the paper: the authors' job scripts
    sparsity_loss="l2")                                          # NOT in the paper (|g|, a 2-norm): the authors' code
# What a model needs otherwise.
PRESETS = {
    "tiny": dict(model="examples/tiny-llama", data="arithmetic", steps=1800, batch_size=8, seq_len=96, lr=1e-3,
                 warmup=50),
    "llama-3.2-1b": dict(model="meta-llama/Llama-3.2-1B"),
    "llama-3.2-3b": dict(model="meta-llama/Llama-3.2-3B", checkpoint_activations=True),
    "llama-3.1-8b": dict(model="meta-llama/Llama-3.1-8B", checkpoint_activations=True, freeze_backbone=True, lr=1e-4),
    "gemma-2-2b": dict(model="google/gemma-2-2b", checkpoint_activations=True),
    # our recipe, for two CPU cores: one threshold for the whole model
    "smollm2-135m": dict(model="HuggingFaceTB/SmolLM2-135M-Instruct", steps=1000, batch_size=2, seq_len=512, lr=3e-4,
                         warmup=50, gate="scalar", threshold="global", sparsity_cost="macs", gate_lr_scale=30.0,
                         sparsity_weight=1.0, schedule="uniform", budget_end=0.48, compute="compact", kv="dense",
                         calibration_sequences=16),
}


# ---------------------------------------------------------------------------------------------------------------------
# Algorithm 1
# ---------------------------------------------------------------------------------------------------------------------

def main(argv=None, ranks=None):
    args = parse_args(argv)
    gate = None
    if args.gate != "none":
        gate = GateConfig(form=args.gate, arch=args.gate_arch, rank=args.gate_rank, shared=args.gate_shared,
                          input=args.gate_input, placement=args.gate_placement, detach=args.gate_detach)
    device, dtype = pick_device(ranks.device(args) if ranks else args.device, args.dtype, args.tf32)
    if args.dry_run:
        return dry_run(args, gate, {preset["model"]: name for name, preset in PRESETS.items()})
    with nullcontext() if ranks and ranks.rank else held(args.out):              # one process at a time
        return train(args, gate, device, dtype, Path(args.out), ranks)


def train(args, gate, device, dtype, out, ranks=None):
    """Algorithm 1, and its table at the end. Returns the exit code: 0, or after a signal that of a shell.

    ranks: this process among several (shards.py), None in a plain run."""
    # the run, the model, the data
    torch.manual_seed(args.seed)
    settings = {key: value for key, value in vars(args).items() if key not in NOT_SETTINGS}
    settings["digests"] = {flag: digest(getattr(args, flag)) for flag in ("data", "eval_data")}
    if args.teacher:
        settings["digests"]["teacher"] = model_digest(find_folder(args.teacher))
    if ranks:
        ranks.wait()                                             # until the first holds --out
    state, saved = open_run(args, settings)                      # of the run to resume, and its folder; or None
    model, tokenizer = open_model(args, gate, "cpu" if ranks else device, dtype)
    if ranks:
        ranks.shard(model, device)
    teacher = open_teacher(args.teacher, model, tokenizer, args.seq_len) if args.teacher else None
    alpha = args.distill_weight if teacher else 0.0
    sets = load_sets(args, tokenizer, model.config.eos_ids[0], HELD_OUT)

    # what is trained, and how
    for name, p in model.named_parameters():
        p.requires_grad_("_gate." in name or not args.freeze_backbone)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    apart = lambda name: "_gate." in name and args.gate_lr_scale != 1.0
    groups = [{"params": [(name, p) for name, p in trained.items() if apart(name) == gates], "scale": scale}
              for gates, scale in ((False, 1.0), (True, args.gate_lr_scale))]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]],
                                  lr=args.lr, betas=TABLE_15["betas"], eps=TABLE_15["eps"],
                                  weight_decay=TABLE_15["weight_decay"], fused=True)
    costs = branch_costs(model.config) if args.sparsity_cost == "macs" else None
    quantile = None
    if gate and args.threshold == "global":
        quantile = RunningQuantile(branch_costs(model.config, args.skip), state and state["quantile"])
    metrics = start_run(out, state, saved, optimizer, ranks)     # writes from here on: all that can fail has loaded
    first = 0 if state is None else state["step"]
    say_sizes(model, trained.values(), f"step {first} of {args.steps}, out {out}")
    forward = torch.compile(model) if args.compile else model
    model.train()

    came = []                                                    # signals, Ctrl-C or SIGTERM: finish the step and save
    before = {number: signal.signal(number, lambda number, _: came.append(number))
              for number in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(number) is not signal.SIG_IGN}
    stop = came                                                  # the same list; with ranks, what all have agreed on
    bar = tqdm(range(first, args.steps), initial=first, total=args.steps, desc="train", mininterval=0.5)
    for step in bar:                                                                             # line 1
        picked = batch_at(len(sets["train"]), args.batch_size * args.grad_accum, args.seed, step)
        picked = [sets["train"][i] for i in picked]                                              # line 2: (x, y) ~ D
        b = budget_at(step, args.steps, args.budget_start, args.budget_end, args.schedule, args.seed)    # line 3: b_t
        policy = SkipPolicy("batch" if gate else "none", b, args.skip, args.kv)                  # line 8 is its keep()
        if quantile:
            policy = quantile.policy(b, args.skip, args.kv)      # ours: one threshold for all
        weight = sparsity_weight_at(step, args.steps, args.sparsity_weight, args.sparsity_weight_end)    # lambda
        rate = learning_rate(step, args.steps, args.lr, args.warmup)
        for group in optimizer.param_groups:
            group["lr"] = group.get("scale", 1.0) * rate

        answer_tokens, tokens = sum(sum(mask) for _, mask in picked), sum(len(ids) for ids, _ in picked)
        picked = picked[ranks.rank::ranks.world] if ranks else picked
        seen = []                                                # scores (2L, B * S) and valid (B * S) for the quantile
        sums = dict.fromkeys(("ce", "kl", "sparsity", "scores", "kept", "pairs"), torch.zeros((), device=device))
        for start in range(0, len(picked), args.batch_size):
            part = picked[start:start + args.batch_size]
            input_ids, loss_mask, valid = collate(part)                                          # (B, S) each
            places, targets = (x.to(device) for x in answer_places(input_ids, loss_mask))        # (A,), (A,)
            input_ids, valid = input_ids.to(device), None if valid.all() else valid.to(device)
            # model.py: Model.forward for h_0 of line 2 and the layers of line 4, Block.forward for lines 4-16
            logits, trace = forward(input_ids, valid=valid, policy=policy, compute=args.compute, places=places,
                                    checkpoint_blocks=args.checkpoint_activations)               # (A, V)
            ce = F.cross_entropy(logits.float(), targets, reduction="sum") / answer_tokens       # line 17: L_CE, eq. 3
            kl = sparsity = ce.new_zeros(())
            if teacher:                                          # ours: what another model would have said
                kl = kl_divergence(teacher, logits, input_ids, valid, places) / answer_tokens
            if gate is not None:              # line 18: L_S; printed: "l1" there, "l2_norm" in eq. 4, "l2" is neither
                share = sum(len(ids) for ids, _ in part) / tokens        # of the step's tokens, whatever --grad-accum
                sparsity = share * sparsity_loss(trace.gates, valid, args.sparsity_loss, b, costs)
            loss = (1 - alpha) * ce + alpha * kl + weight * sparsity                             # line 19: L, eq. 5
            (loss * ranks.world if ranks else loss).backward()   # FSDP takes the ranks' mean, and L is their sum
            with torch.no_grad():
                now = {"ce": ce, "kl": kl, "sparsity": sparsity, "kept": torch.stack(trace.keep).sum(),
                       "pairs": trace.valid.sum() * len(trace.keep)}
                if gate is not None:
                    now["scores"] = torch.stack(trace.scores).where(trace.valid, 0.0).sum()
                sums |= {key: sums[key] + value.float() for key, value in now.items()}
                if quantile:
                    seen.append((torch.stack(trace.scores).flatten(1), trace.valid.flatten()))
            del logits, trace                                    # before the next pass makes its own
        if quantile:
            seen = [torch.cat(x, -1) for x in zip(*seen)]
            quantile.update(*(ranks.gather(*seen) if ranks else seen))
        for p in trained.values():                               # no token ran the branch: none; 0, as in masked
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        norm = torch.nn.utils.clip_grad_norm_(trained.values(), TABLE_15["clip"])
        if ranks:
            sums, norm, stop = ranks.agree(sums, norm, came)
        # the loop waits for the device here, where it hands over a batch, and with compact once a branch
        *values, norm = torch.stack([*sums.values(), norm.float()]).tolist()
        sums = dict(zip(sums, values))
        loss = (1 - alpha) * sums["ce"] + alpha * sums["kl"] + weight * sums["sparsity"]
        row = {"step": step, "loss": loss, "ce": sums["ce"], **({"kl": sums["kl"]} if teacher else {}),
               "sparsity": sums["sparsity"], "gate_mean": sums["scores"] / sums["pairs"] if gate else None, "budget": b,
               "skipped": 1 - sums["kept"] / sums["pairs"], "lr": rate}
        if not math.isfinite(row["loss"] + norm):                # before the update that would spoil the weights
            cause = "look at --teacher" if math.isfinite(sums["ce"]) > math.isfinite(sums["kl"]) else (
                "lower --lr or --gate-lr-scale")
            raise InputError(f"the loss is {row['loss']}, its gradient's norm {norm} at step {step}: {cause}; "
                             "nothing was saved since the last checkpoint")
        optimizer.step()                                                                         # line 19: update
        optimizer.zero_grad(set_to_none=True)
        add_line(metrics, row)
        bar.set_postfix_str(f"loss {row['loss']:.3f} ce {row['ce']:.3f}" + (
            f" gate {row['gate_mean']:.3f} budget {b:.2f} skipped {row['skipped']:.1%}" if gate else ""))
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps or stop:
            saved = save_checkpoint(out, step + 1, model, tokenizer, optimizer, settings,
                                    quantile and quantile.points, ranks)
        if stop:
            break
    bar.close()                                                                                  # line 20: end for t
    metrics.close()
    for number, handler in before.items():
        signal.signal(number, handler)
    if ranks:
        ranks.leave(optimizer)
    if stop:
        print(f"stopped after step {int(saved.name[5:])}; saved in {out}. Go on with the same command and --resume")
        return 128 + stop[0]

    if ranks and ranks.rank:                                     # the rest is for one
        return 0
    model = load_model(saved, device=device, dtype=dtype) if ranks else model
    plot_metrics(out)
    finish(model.eval(), args, sets, saved, quantile)
    print(f"\nsaved in {out}; try: python generate.py --model {out} --show-compute --question \"...\"")
    return 0


def learning_rate(step, total, peak, warmup):
    """Linear warm-up, then cosine from peak to 0, clamped there (the authors' schedule rises again). step from 0."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = min((step - warmup) / max(total - 1 - warmup, 1), 1.0)
    return peak * 0.5 * (1.0 + math.cos(math.pi * progress))


def sparsity_weight_at(step, total, start, end):
    """lambda: `start`, or (ours) from the middle of the run on linearly to `end` at the last step; step from 0."""
    fallen = max(0.0, 2 * step / max(total - 1, 1) - 1)
    return start if end is None else start + (end - start) * fallen


# ---------------------------------------------------------------------------------------------------------------------
# Before the loop: model and data
# ---------------------------------------------------------------------------------------------------------------------

def open_model(args, gate, device, dtype):
    """(model with gates, tokenizer) that the flags ask for; InputError for what cannot be trained."""
    if args.resume:
        model, tokenizer = load_model(args.out, device=device, dtype=dtype), load_tokenizer(args.out)
    elif args.init_config:
        model = new_model(args.init_config, gate, device, dtype)
        tokenizer = read_tokenizer(Path(args.init_config).with_name("tokenizer.json"))
    else:
        model, tokenizer = load_model(args.model, gate, device, dtype), load_tokenizer(args.model)
    config = model.config
    check_gates(config.gate, gate, model.source)
    check_fit(model, tokenizer)
    if not config.eos_ids:
        raise InputError("config.json and generation_config.json name no eos_token_id: training needs a token that "
                         "ends an answer")
    if args.seq_len > config.max_position_embeddings:
        raise InputError(f"--seq-len {args.seq_len} exceeds the model's {config.max_position_embeddings} positions")
    if gate is not None and not skippable_share(args.skip, config.num_hidden_layers):
        raise InputError(f"--skip {args.skip} lets nobody skip in a model of {config.num_hidden_layers} layer")
    if gate is not None:                                         # an old calibration would not fit the weights to come
        config.gateskip = dict(skip=args.skip, kv=args.kv, budget_start=args.budget_start, budget_end=args.budget_end,
                               schedule=args.schedule, threshold=args.threshold, gate_lr_scale=args.gate_lr_scale,
                               sparsity_weight=args.sparsity_weight, sparsity_weight_end=args.sparsity_weight_end,
                               sparsity_loss=args.sparsity_loss, sparsity_cost=args.sparsity_cost)
    return model, tokenizer


def say_sizes(model, trained, where):
    gates = sum(p.numel() for name, p in model.named_parameters() if "_gate." in name)
    print(f"model: {sum(p.numel() for p in model.parameters()):,} parameters, {gates:,} of them gates; "
          f"{sum(p.numel() for p in trained):,} are trained; {where}")


# ---------------------------------------------------------------------------------------------------------------------
# The flags
# ---------------------------------------------------------------------------------------------------------------------

NOT_SETTINGS = ("resume", "overwrite", "out", "dry_run", "save_every",           # flags that a resumed run may change
                "eval_limit", "calibrate", "calibration_sequences", "show_branches", "checkpoint_activations")


def parse_args(argv):
    argv = sys.argv[1:] if argv is None else argv
    p = Parser("Fine-tune a model with residual gates (Algorithm 1). Defaults: Table 15 of the paper; --lr and "
               "--sparsity-loss: its authors' code; presets: "
               + "; ".join(f"{name} {changed}" for name, changed in PRESETS.items()))
    add = p.add_argument
    add("--preset", choices=PRESETS, help="defaults for a model; tiny if neither --model nor --init-config is given")
    # input and output
    add("--model", help="folder, a run's --out, or hub id")
    add("--init-config", metavar="FILE", help="start from scratch: this config.json (and the tokenizer.json beside it)")
    add("--data", help="arithmetic, or a .jsonl, .parquet or .txt file")
    add("--eval-data", help="file for the table at the end; default: problems held out from --data")
    add("--eval-limit", type=whole(1), default=200, help=f"problems in that table, {HELD_OUT} at most of --data's own")
    add("--calibration-sequences", type=whole(1), default=HELD_OUT,
        help=f"how many to calibrate on, of the {HELD_OUT} held out (a text's windows may be more)")
    add("--calibrate", type=check_budget, nargs="+", metavar="BUDGET",
        help="budgets to calibrate at the end, all anew; default: 0.95, 0.9, ... as far down as training went")
    add("--out", default="runs/demo", help="folder of this run: checkpoints, metrics.jsonl, curves")
    add("--save-every", type=whole(1), default=500, help="steps between checkpoints; the last step is always saved")
    add("--resume", action="store_true", help="go on with the run in --out (same flags)")
    add("--overwrite", action="store_true", help="replace the run in --out, once this one has saved")
    add("--dry-run", action="store_true", help="say what would be done, what it needs, and stop")
    # optimisation
    add("--steps", type=whole(1), help="updates of the weights")
    add("--batch-size", type=whole(1), help="sequences per forward pass; one quantile ranks all their tokens")
    add("--grad-accum", type=whole(1), default=1, help="forward passes per step")
    add("--seq-len", type=int, help="longer examples are dropped and counted")
    add("--lr", type=real(0.0, above=True), help="peak learning rate; cosine to 0")
    add("--warmup", type=whole(0), help="steps of linear warm-up")
    add("--seed", type=seed_number, default=1, help="of data order, gates, budgets")
    # the paper
    add("--schedule", choices=("linear", "uniform"), help="budget: Algorithm 1's decay, or drawn (each fourth full)")
    add("--budget-start", type=check_budget, help="share of tokens that a branch keeps at first (global: of the work)")
    add("--budget-end", type=check_budget, help="and at last; uniform draws between the two")
    add("--threshold", choices=("branch", "global"), default="branch",
        help="a quantile per branch (the paper), or one threshold for all branches (ours)")
    add("--sparsity-cost", choices=("equal", "macs"), default="equal", help="what a branch weighs in the sparsity loss")
    add("--gate-lr-scale", type=real(0.0, above=True), default=1.0, help="the gates' learning rate over the backbone's")
    add("--teacher", metavar="MODEL", help="learn from this model's distribution too; it must share the tokenizer")
    add("--distill-weight", type=real(0.0, 1.0), metavar="ALPHA",
        help="(1 - ALPHA) CE + ALPHA KL(teacher || model); default with --teacher: 0.5")
    add("--sparsity-weight", type=real(0.0), help="lambda")
    add("--sparsity-weight-end", type=real(0.0), help="what lambda falls to over the second half; default: it stays")
    add("--sparsity-loss", choices=SPARSITY_LOSSES, help="mean of g^2, mean of g, eq. 4, or towards the budget")
    add("--gate", choices=(*FORMS, "none"), default="vector", help="none: plain fine-tuning of the dense model")
    add("--gate-arch", choices=ARCHS, default="linear", help="lowrank: U V with a narrow middle; mlp: two layers")
    add("--gate-rank", type=whole(0, 65536), default=0, help="of lowrank; 0: 16 from width 1024 on, else width / 16")
    add("--gate-shared", action="store_true", help="one attention and one MLP gate for all layers")
    add("--gate-input", choices=GATE_INPUTS, default="normed",
        help="what the branch reads, or the residual stream (eq. 2 literally)")
    add("--gate-placement", choices=PLACEMENTS, default="after", help="multiply the branch's output, or its input")
    add("--gate-detach", action="store_true", help="no gradient into the backbone through the gate's input")
    add("--skip", choices=GRANULARITIES, default="all", help="which branches may be skipped")
    add("--kv", choices=KV_OF_SKIPPED, default="copy_up", help="K and V of a skipped token")
    add("--freeze-backbone", action="store_true", help="train the gates only")
    add("--show-branches", **SHOW_BRANCHES)
    # machine
    add("--compute", choices=("masked", "compact"), default="masked", help="run every row, or gather the kept rows")
    add("--checkpoint-activations", action="store_true", help="recompute blocks going backward: less memory, more time")
    add("--compile", action="store_true", help="torch.compile (masked only)")
    add("--tf32", action="store_true", help="let the GPU round matrix products to TF32")
    add_machine_flags(p)
    p.set_defaults(**{key: value for key, value in TABLE_15.items() if any(a.dest == key for a in p._actions)})
    chosen, _ = p.parse_known_args(argv)
    preset = chosen.preset or ("tiny" if not chosen.model and not chosen.init_config else None)
    p.set_defaults(preset=preset, **PRESETS.get(preset, {}))
    args = p.parse_args(argv)
    check_combinations(args, chosen)
    return args


if __name__ == "__main__":
    if "TORCHELASTIC_RUN_ID" in os.environ:                      # torchrun started this: several GPUs
        from shards import on_every_rank
        main = on_every_rank(main)
    run(main, interrupted="interrupted: what was saved in --out stays, --resume goes on with it",
        out_of_memory="add --checkpoint-activations, --resume takes it; or begin anew with a lower --batch-size or "
                      "--seq-len (and a higher --grad-accum)")
