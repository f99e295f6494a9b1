"""Which of train.py's flags mean something together: what does not is one line, before anything is read or trained."""
import sys

from console import InputError, check_compiler


def check_combinations(args, chosen):
    """InputError for flags that do not go together. args: all of them, with a preset's; chosen: as they were given.

    What a preset says of gates is set back under --gate none; --distill-weight gets its default beside --teacher."""
    if min(args.calibrate or [1.0]) < args.budget_end:
        raise InputError(f"--calibrate {min(args.calibrate)} is below --budget-end {args.budget_end}, the lowest that "
                         "is trained for")
    if args.budget_end > args.budget_start:
        raise InputError(f"--budget-end {args.budget_end} is above --budget-start {args.budget_start}: the budget "
                         "shrinks")
    if args.sparsity_weight_end is not None and args.sparsity_weight_end > args.sparsity_weight:
        raise InputError(f"--sparsity-weight-end {args.sparsity_weight_end} is above --sparsity-weight "
                         f"{args.sparsity_weight}: lambda falls")
    if chosen.init_config and chosen.model:
        raise InputError("--init-config starts from scratch and --model from a checkpoint: give one of them")
    if args.data is None:
        raise InputError("--data is missing: a .jsonl, .parquet or .txt file, or the word arithmetic")
    plain = dict(threshold="branch", sparsity_cost="equal", gate_lr_scale=1.0, sparsity_weight_end=None)
    for flag, value in plain.items() if args.gate == "none" else ():
        if getattr(chosen, flag) != value:
            raise InputError(f"--{flag.replace('_', '-')} {getattr(args, flag)} with --gate none: there are no gates")
        setattr(args, flag, value)                               # a preset's
    if args.threshold == "global" and args.budget_end == 1.0:
        raise InputError("--threshold global with --budget-end 1.0: nobody skips, so no threshold is to be found")
    if args.threshold == "global" and args.sparsity_loss == "kl":
        raise InputError("--threshold global with --sparsity-loss kl, which pulls every branch to the same budget: "
                         "take l2")
    if chosen.kv == "dense" and args.skip == "mlp":
        raise InputError("--kv dense with --skip mlp: nobody skips attention, so every K and V is computed anyway")
    args.kv = "copy_up" if args.skip == "mlp" else args.kv       # a preset's
    if args.teacher == "":
        raise InputError("--teacher is empty: give a folder, a run's --out, or a hub id")
    if args.distill_weight is not None and not args.teacher:
        raise InputError(f"--distill-weight {args.distill_weight} without --teacher: there is nobody to learn from")
    if args.teacher and args.distill_weight is None:
        args.distill_weight = 0.5
    if chosen.freeze_backbone and args.gate == "none":
        raise InputError("--freeze-backbone with --gate none leaves nothing to train: leave one of them out")
    args.freeze_backbone &= args.gate != "none"                  # a preset's
    if args.compile and args.compute == "compact":
        raise InputError("--compile needs static shapes: use --compute masked")
    if args.dtype != "float32" and not args.freeze_backbone:
        raise InputError("--dtype bfloat16 rounds most updates of the weights away: train in float32, or give "
                         "--freeze-backbone (gates are float32 always)")
    if args.warmup > args.steps:
        print(f"CAUTION: --warmup {args.warmup} is longer than the run of {args.steps} steps: the learning rate ends "
              f"at {args.lr * args.steps / args.warmup:.2g}, and not at --lr {args.lr}", file=sys.stderr)
    if args.compile:
        check_compiler()
    if args.resume and args.overwrite:
        raise InputError("--resume keeps the run in --out and --overwrite deletes it: give one of them")
