"""What each budget costs a trained model: its thresholds, and the table at the end of train.py."""
import torch
import torch.nn.functional as F

from branches import parts_of, show
from data import answer_places, collate
from gates import SkipPolicy, skippable_share
from generate import generate
from load_weights import save_config
from savings import Savings, branch_costs
from thresholds import calibrate, chunks, make_policy

BUDGETS = (0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.6, 0.5)            # calibrated as far down as training went
HELD_OUT, CONTINUE = 64, 96                                      # calibration sequences, tokens to continue each by


@torch.no_grad()
def evaluate(model, items, policy):
    """(answer loss, token accuracy, savings report) of teacher-forced items, in compact mode."""
    device, savings, loss, right, count = next(model.parameters()).device, Savings(model.config), 0.0, 0, 0
    for chunk in chunks(items, length=lambda item: len(item[0])):
        input_ids, loss_mask, valid = collate(chunk)                                 # (B, S) each
        places, targets = (x.to(device) for x in answer_places(input_ids, loss_mask))
        logits, trace = model(input_ids.to(device), valid=None if valid.all() else valid.to(device), policy=policy,
                              compute="compact", places=places)                      # (N, V)
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


def measured_in(config):
    """(key of Savings.report() in which this model's budgets are shares, how much of it may be skipped at all)."""
    skip = config.gateskip.get("skip", "all")
    if config.gateskip.get("threshold") == "global":
        costs = branch_costs(config, skip)
        return "work_skipped", sum(costs) / len(costs)
    return "skipped", skippable_share(skip, config.num_hidden_layers)


def budget_of_chance(config, saved):
    """The budget at which random skipping saves as much as `saved`, a Savings.report()."""
    measure, share = measured_in(config)
    return min(max(1.0 - saved[measure] / share, 1e-3), 1.0)


def realised(model, items, policy):
    """The share skipped, of what measured_in() names, while the model continues the items' prompts."""
    config, savings, prompts = model.config, Savings(model.config), [prompt_of(item) for item in items]
    room = config.max_position_embeddings - max(map(len, prompts))
    for chunk in chunks(prompts):
        savings += generate(model, chunk, min(CONTINUE, room), policy, set(config.eos_ids)).savings
    return savings.report()[measured_in(config)[0]]


def finish(model, args, sets, folder, quantile=None):
    """Calibrate, store the thresholds in the last step's folder, and print what each budget costs.

    With --show-branches also what each branch gets."""
    config, budgets = model.config, [1.0]
    if config.gate is not None:
        asked = args.calibrate or (*BUDGETS, args.budget_end)
        budgets += sorted({b for b in asked if args.budget_end <= b < 1.0}, reverse=True)
        print(f"calibrating on {len(sets['calibration'])} held-out sequences that the model continues")
        sequences = [ids for ids, _ in sets["calibration"]]
        share, in_use = measured_in(config)[1], lambda policy: realised(model, sets["calibration"], policy)
        config.gateskip.update(calibrate(model, sequences, budgets, args.skip, args.kv, in_use, quantile),
                               step=args.steps)
        save_config(model, folder)
        checked = {b: realised(model, sets["check"], make_policy(config, "frozen", b)) for b in budgets[1:]}
        print(f"{'of the work, ' * (quantile is not None)}skipped on a second held-out set, asked -> realised: "
              + ", ".join(f"{(1 - b) * share:.1%} -> {x:.1%}" for b, x in checked.items()))

    print(f"\n{len(sets['eval'])} held-out problems, answers given and not generated"
          + (", thresholds frozen\n" if config.gate is not None else "\n"))
    print("budget   answer loss   token accuracy   skipped   per call   macs_saved   answer loss, random skipping")
    kept = {}                                                    # budget -> what each branch ran
    for budget in budgets:
        loss, accuracy, saved = evaluate(model, sets["eval"], make_policy(config, "frozen", budget))
        kept[budget] = parts_of(saved)
        row = (f"{budget:6.3f}   {loss:11.4f}   {accuracy:14.1%}   {saved['skipped']:7.1%}   "
               f"{saved['skipped_per_call']:8.1%}   {saved['macs_saved']:+10.1%}")
        if budget < 1.0:
            chance = SkipPolicy("random", budget_of_chance(config, saved), args.skip, args.kv,
                                generator=torch.Generator().manual_seed(args.seed))
            row += f"   {evaluate(model, sets['eval'], chance)[0]:11.4f}"
        print(row)
    if args.show_branches is not None:
        show("answers given and not generated", kept, args.show_branches)
