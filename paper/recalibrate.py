"""The frozen thresholds of a model whose weights were changed after training, measured anew at the budgets that it had.

A threshold is a quantile of scores, and scores are made from states that quantised weights or missing blocks change.
"""
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from budgets import realised
from data import collate
from price import RunningQuantile
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
