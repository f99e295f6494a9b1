"""The frozen thresholds of a model, measured anew: on other weights than training left, or on texts of another kind.

    python paper/recalibrate.py --model runs/smollm2 --data texts.jsonl --budgets 0.8 0.6 --out runs/smollm2-texts

A threshold is a quantile of scores, and scores are made from states that quantised weights or missing blocks change.
And of tokens: what skips a fifth of the work in long texts may skip next to none in short questions.
"""
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from console import InputError, pick_device, run
from flags import Parser

import torch

from budgets import realised
from data import collate, load_examples
from gates import check_budget
from load_weights import save_model
from opened import add_flags_of_a_new_model, check_new, open_with_items, whole_or_none
from price import RunningQuantile
from quantized import is_quantized
from savings import branch_costs
from thresholds import calibrate, chunks


@torch.no_grad()
def all_scores(model, items):
    """(scores (2L, N), valid (N,) bool) of all items at full budget, N with padding."""
    device, scores, valid = next(model.parameters()).device, [], []
    for chunk in chunks(items, length=lambda item: len(item[0])):
        input_ids, _, real = (x.to(device) for x in collate(chunk))              # (B, S) each
        trace = model(input_ids, valid=real, last=True)[1]
        scores.append(torch.stack(trace.scores).flatten(1))                      # (2L, B * S)
        valid.append(real.flatten())
    return torch.cat(scores, 1), torch.cat(valid)


def recalibrate(model, items):
    """Renew config.gateskip's thresholds, as train.py calibrates at its end; a model that has none stays as it is.

    items: list of (ids, loss_mask), held out; None: the old ones are dropped, and that is said. One threshold for all
    branches is read off the scores at full budget, for the quantile that training kept is of the old weights."""
    config, stored = model.config, model.config.gateskip
    budgets = list(stored.pop("thresholds", ()))
    stored.pop("realised", None)
    stored.pop("missed", None)
    if not budgets:
        return
    if items is None:
        print("thresholds dropped, which were of the weights as trained: give --data to calibrate anew")
        return
    quantile = None
    if stored.get("threshold") == "global":
        quantile = RunningQuantile(branch_costs(config, stored["skip"]))
        quantile.update(*all_scores(model, items))
    print(f"calibrating anew on {len(items)} sequences that the model continues")
    stored.update(calibrate(model, [ids for ids, _ in items], budgets, stored["skip"], stored["kv"],
                            partial(realised, model, items), quantile))


def parse_args(argv):
    p = Parser("Measure the frozen thresholds of a model with gates anew, on other texts.")
    add = p.add_argument
    add("--model", required=True, help="folder, a run's --out, or hub id, with gates")
    add("--data", required=True, help="the texts: arithmetic (its calibration problems), or a .jsonl, .parquet or .txt "
        "file")
    add("--budgets", type=check_budget, nargs="+", help="default: those that the model is calibrated for")
    add_flags_of_a_new_model(p)
    return p.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    check_new(args.out)
    device, dtype = pick_device(args.device, args.dtype)
    if is_quantized(args.model):
        raise InputError(f"--model {args.model} is quantised: quantize.py measures thresholds, on its --data")
    examples = load_examples(args.data, "calibration", args.limit or None)
    model, tokenizer, items, _ = open_with_items(args.model, examples, args.limit, args.seq_len, device, dtype)
    if model.config.gate is None:
        raise InputError(f"--model {args.model} has no gates: train some with train.py")
    stored = model.config.gateskip
    budgets = {*map(float, args.budgets or stored.get("thresholds", ()))} - {1.0}
    if not budgets:
        raise InputError(f"--model {args.model} is not calibrated: name --budgets below 1")
    model.config.gateskip = {"skip": "all", "kv": "copy_up"} | stored | {"thresholds": dict.fromkeys(budgets)}
    recalibrate(model, items)
    with whole_or_none(args.out):
        save_model(model, args.out, tokenizer)
    print(f"written: {args.out}")
    return 0


if __name__ == "__main__":
    run(main)
