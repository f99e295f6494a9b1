"""Thresholds that do not move: the quantile measured once on calibration data, then fixed.

A quantile of the batch depends on batch mates, looks ahead inside a prompt and skips nothing in a single stream; a
frozen threshold per branch, or one for all branches (price.py), does none of that. First one threshold, then a table of
them (one pass, and the search that corrects it), then what generation reads out of the table.

Shapes: B batch, S sequence, L layers.
"""
import sys

import torch

from console import InputError
from gates import SkipPolicy, check_budget, may_skip, quantile_threshold, skippable_share


def frozen_threshold(scores, q, tie=1e-6):
    """A threshold that skips about a share q of these scores and lies on none of them. 1-d scores -> float.

    Equal tokens have equal scores at attention 0, so a quantile tends to fall on a tie that one rounding step would
    flip. It moves to the midpoint of the nearest gap, on the side whose share is nearer q; beyond the ends by 1e-4.
    """
    s = scores.double().flatten().sort().values
    tau = quantile_threshold(s, q)
    on_tau = s[(s - tau).abs() <= tie]
    low, high = (on_tau[0], on_tau[-1]) if len(on_tau) else (tau, tau)
    below, above = s[s < low], s[s > high]
    if not len(on_tau):
        return float((below[-1] + above[0]) / 2)
    cuts = (float((below[-1] + low) / 2) if len(below) else float(low) - 1e-4,
            float((high + above[0]) / 2) if len(above) else float(high) + 1e-4)
    return min(cuts, key=lambda cut: abs(float((s <= cut).double().mean()) - q))


def chunks(items, length=len, tokens=4096):
    """Consecutive slices of a list, each of at most `tokens` tokens when padded to its longest, and one item at least.

    So what follows training takes no more memory than a training batch, however much there is to measure.
    """
    start, longest = 0, 0
    for end, item in enumerate(items):
        longest = max(longest, length(item))
        if end > start and longest * (end + 1 - start) > tokens:
            yield items[start:end]
            start, longest = end, length(item)
    if items:
        yield items[start:]


@torch.no_grad()
def one_pass(model, sequences, q, skip, kv):
    """(thresholds that skip the share q of these tokens, smallest scores): 2L floats each, 0 where nobody may skip.

    sequences: lists of token ids, all of them one pool; in memory are the states of all and the activations of one
    chunk. Each branch's threshold is set from the scores that it sees, and applied before the next branch runs, which
    thus sees states that earlier skips have shaped.
    """
    device, runs = next(model.parameters()).device, []
    for chunk in chunks(sequences):
        longest = max(map(len, chunk))
        ids = torch.tensor([s + [0] * (longest - len(s)) for s in chunk], device=device)         # (B, S)
        valid = torch.arange(longest, device=device) < torch.tensor([[len(s)] for s in chunk], device=device)
        valid = valid if min(map(len, chunk)) < longest else None    # without it attention needs no mask
        runs.append(model.begin(ids, valid=valid, policy=SkipPolicy("none", 1.0, skip, kv), compact=True))
    branches = range(2 * model.config.num_hidden_layers)
    thresholds, smallest = dict.fromkeys(branches, 0.0), dict.fromkeys(branches, 0.0)
    runs = [(h, None, call) for h, call in runs]
    for layer, block in enumerate(model.model["layers"]):
        gates = model.gates_of(block)
        for branch in (2 * layer, 2 * layer + 1):
            if not may_skip(skip, branch):
                continue
            # a block's scores depend on earlier decisions alone; its own, left in call.keep, are dropped below
            scores = [block(h, below, gates, call)[3][branch % 2] for h, below, call in runs]    # (B, S) each
            pool = torch.cat([s[call.valid] for s, (_, _, call) in zip(scores, runs)])
            smallest[branch], thresholds[branch] = float(pool.min()), frozen_threshold(pool, q)
            for s, (_, _, call) in zip(scores, runs):
                passes = s.double() > thresholds[branch] if q > 0.0 else call.valid
                call.keep = {**{b: k for b, k in call.keep.items() if b < branch}, branch: call.valid & passes}
        runs = [(*block(h, below, gates, call)[:2], call) for h, below, call in runs]
    return list(thresholds.values()), list(smallest.values())


def search(table_at, share_of, target, q, tolerance, rounds):
    """Correct q until share_of(table_at(q)), which rises with q, is target: by regula falsi and bisection in turn.

    Returns the nearest (table, realised share, q) of at most `rounds` tries. It aims at half of the tolerance, so that
    other prompts stay within all of it.
    """
    low, high, best = (0.0, 0.0), (1.0, 1.0), None               # (q, share)
    for tries in range(rounds):
        table = table_at(min(q, 0.999))
        got = share_of(table)
        if best is None or abs(got - target) < abs(best[1] - target):
            best = (table, got, q)
        if abs(got - target) <= tolerance / 2:
            break
        low, high = (low, (q, got)) if got > target else ((q, got), high)
        width, rise = high[0] - low[0], max(high[1] - low[1], 1e-9)
        q = low[0] + width * (0.5 if tries % 2 else min(max((target - low[1]) / rise, 0.1), 0.9))
    return best


def calibrate(model, sequences, budgets, skip="all", kv="copy_up", realised=None, quantile=None, tolerance=0.01,
              rounds=12):
    """Frozen thresholds for each budget: measured on the sequences in one pass, or read from the RunningQuantile of
    training, then, if asked, corrected by a search.

    Skipping changes the states that later scores are made from, so a table can run away in use; therefore, when
    `realised(policy) -> skipped share` is given (run the policy on prompts that the model continues), the quantile
    asked for is corrected until the share is within `tolerance` of (1 - budget) x the share that may be skipped.
    Shares are of (token, branch) pairs, and of work where a quantile is given.

    Returns {"skip", "kv", "threshold", "thresholds": {"1.0": [...], "0.95": [2L floats, or one], ...}, "realised":
    {"0.95": share, ...}, "missed": {of those that are not within tolerance: share asked}}; a branch that may not skip
    has threshold 0. thresholds["1.0"] holds the smallest scores (or price) and serves interpolation only.
    """
    if model.config.gate is None:
        raise InputError("this model has no gates to calibrate: train it first (python train.py --model ...)")
    branches = 2 * model.config.num_hidden_layers
    if quantile is None:
        share, smallest = skippable_share(skip, branches // 2), one_pass(model, sequences, 0.0, skip, kv)[1]
        table_at = lambda q: one_pass(model, sequences, q, skip, kv)[0]
    else:
        share, smallest = float(quantile.costs.mean()), [float(quantile.at(0.0))]
        table_at = lambda q: [float(quantile.beyond(q))]
    what = "(token, branch) pairs" if quantile is None else "the work"
    result = {"skip": skip, "kv": kv, "threshold": "branch" if quantile is None else "global",
              "thresholds": {"1.0": smallest}, "realised": {}, "missed": {}}
    correction = 1.0                                             # of the last budget: a good guess for the next
    for budget in sorted((b for b in map(check_budget, budgets) if b < 1.0), reverse=True):
        key, target, q = str(budget), (1.0 - budget) * share, min((1.0 - budget) * correction, 0.99)
        if realised is None:
            result["thresholds"][key] = table_at(1.0 - budget)
            continue
        in_use = lambda table: realised(SkipPolicy("frozen", budget, skip, kv, thresholds=spread(table, branches)))
        result["thresholds"][key], got, q = search(table_at, in_use, target, q, tolerance, rounds)
        result["realised"][key], correction = got, q / (1.0 - budget)
        line = f"calibrated budget {budget:.2f}: skips {got:.1%} of {what} in texts that it continues"
        if abs(got - target) > tolerance:
            result["missed"][key] = target
            line += f"  target {target:.1%} NOT reached: the nearest of {rounds} tries"
        print(line)
    if quantile is not None:
        result["thresholds"]["1.0"] = min(result["thresholds"].values())
    return result


def spread(table, branches):
    """One threshold for all branches, or one for each -> one for each."""
    return table * branches if len(table) == 1 else table


def thresholds_at(table, budget):
    """The frozen thresholds (2L floats, or one) at any budget between the calibrated ones, interpolated linearly.

    table: {"1.0": [...], "0.95": [...], ...}. InputError below the smallest calibrated budget.
    """
    known = sorted((float(key), values) for key, values in table.items())
    budget = check_budget(budget)
    if budget < known[0][0] - 1e-9:
        again = " ".join(str(b) for b, _ in [*known[-2::-1], (budget, None)])    # --calibrate replaces all of them
        raise InputError(f"budget {budget} is below the smallest calibrated one, {known[0][0]}: the training command "
                         f"with --resume --calibrate {again} measures it; below its --budget-end train anew")
    for (b0, tau0), (b1, tau1) in zip(known, known[1:]):
        if budget <= b1 + 1e-9:
            w = min(max((budget - b0) / (b1 - b0), 0.0), 1.0)
            return [(1 - w) * x + w * y for x, y in zip(tau0, tau1)]
    return known[-1][1]


def make_policy(config, kind, budget, skip=None, kv=None, seed=0, device="cpu"):
    """The SkipPolicy for a loaded model. kind "auto": frozen where the model is calibrated, else batch.

    skip and kv default to what the model was trained with. InputError for a calibration made under other settings and
    for a policy that needs gates where there are none; one line on stderr where a choice may surprise.
    """
    stored, budget = config.gateskip, check_budget(budget)
    skip, kv = skip or stored.get("skip", "all"), kv or stored.get("kv", "copy_up")
    if budget >= 1.0 or kind == "none":
        return SkipPolicy("none", 1.0, skip, kv)
    if kind == "random":
        return SkipPolicy("random", budget, skip, kv, generator=torch.Generator(device).manual_seed(seed))
    if config.gate is None:
        raise InputError(f"budget {budget}: this model has no gates to decide what to skip: train some with train.py; "
                         "the random policy needs none")
    if kind == "auto":
        kind = "frozen" if "thresholds" in stored else "batch"
        if kind == "batch":
            print("no calibration in this model (the training command with --resume makes it): using the quantile of "
                  "each batch, which skips nothing in a decoding step of a single stream", file=sys.stderr)
    if kind in ("batch", "topk") and stored.get("threshold") == "global":
        print(f"this model was trained under one threshold for all branches; {kind} gives each branch the same share "
              "of tokens, so its budget is another", file=sys.stderr)
    if kind == "frozen":
        if "thresholds" not in stored:
            raise InputError("this model is not calibrated (train.py does it at its end), as the frozen policy needs; "
                             "the batch policy does not")
        if (skip, kv) != (stored["skip"], stored["kv"]):
            raise InputError(f"the thresholds were calibrated with --skip {stored['skip']} --kv {stored['kv']}, not "
                             f"--skip {skip} --kv {kv}: leave these out, or take the batch policy")
    thresholds = None
    if kind == "frozen":
        thresholds = spread(thresholds_at(stored["thresholds"], budget), 2 * config.num_hidden_layers)
    if thresholds and all(abs(float(known) - budget) > 1e-4 for known in stored["thresholds"]):
        print(f"budget {budget} is not among the calibrated ({', '.join(stored['thresholds'])}): thresholds "
              "interpolated, more or less may be skipped than asked", file=sys.stderr)
    for known, asked in stored.get("missed", {}).items() if thresholds else ():
        if abs(float(known) - budget) <= 1e-4:
            print(f"budget {budget} was not reached when this model was calibrated: it skips "
                  f"{stored['realised'][known]:.1%} where {asked:.1%} is asked", file=sys.stderr)
    if budget < stored.get("budget_end", 0.0) - 1e-9:
        print(f"warning: budget {budget} is below {stored['budget_end']}, the lowest this model was trained for",
              file=sys.stderr)
    return SkipPolicy(kind, budget, skip, kv, thresholds=thresholds)
