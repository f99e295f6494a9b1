"""The testbed of the study: the embedded model, trained by train.py under some flags and swept over budgets.

A model is a list of stages, each a list of train.py's flags; a view is one way of choosing tokens on it at inference.
trained() makes the first, sweep() measures the second on held-out problems whose answers it generates.
"""
import contextlib
import shutil
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import train
from budgets import realised
from data import encode_all, load_examples
from eval_gsm8k import run_row
from gates import SkipPolicy
from load_weights import load_model, load_tokenizer, read_json
from price import RunningQuantile
from savings import branch_costs
from thresholds import calibrate, spread

ROOT = Path(__file__).resolve().parents[1]
START = ROOT / "examples" / "tiny-llama"
STEPS, PROBLEMS, CALIBRATION = 600, 300, 32                      # of a stage; held-out; sequences for thresholds
BUDGETS = (1.0, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
TOLERANCE, ROUNDS = 0.02, 4                                      # of thresholds: the table is read at realised savings
KEPT = ("budget", "accuracy", "n", "skipped", "macs_saved")      # of eval_gsm8k's rows
OF_ANSWERS = ("skipped", "macs_saved")                           # of generated tokens, too


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------

def trained(stages, seed, out, tried=contextlib.nullcontext):
    """Train the embedded model into the folder `out`: each stage begins where the one before ended.

    stages: lists of flags of train.py; tried: a context in which the last stage runs, one of TRIED below."""
    start = START
    for i, flags in enumerate(stages):
        last = i + 1 == len(stages)
        folder = out if last else out.with_name(f"{out.name}-stage{i + 1}")
        command = ["--preset", "tiny", "--model", str(start), "--steps", str(STEPS), "--seed", str(seed), "--calibrate",
                   "0.99", "--calibration-sequences", "4", "--eval-limit", "4", *flags, "--out", str(folder),
                   "--overwrite"]
        with tried() if last else contextlib.nullcontext():
            if train.main(command):
                raise KeyboardInterrupt                          # a signal came, and was obeyed
        start = folder
    for i in range(len(stages) - 1):
        shutil.rmtree(out.with_name(f"{out.name}-stage{i + 1}"))


def finished(out, steps=None):
    """Whether a training of so many steps (None: of trained()) has come to its end there."""
    return (out / "latest").exists() and (out / "latest").read_text().strip() == f"step-{steps or STEPS:06d}"


def random_skipping():
    """Training skips at random what the budget says, whatever gates say: a dense model meets what it will be tested
    with."""
    generator = torch.Generator().manual_seed(0)
    return mock.patch.object(train, "SkipPolicy", lambda kind, budget, skip, kv: SkipPolicy(
        "random", budget, skip, kv, generator=generator))


def ramp():
    """The lowest budget that may be drawn falls from 1 to its end over the first half of the steps."""
    at = train.budget_at
    return mock.patch.object(train, "budget_at", lambda step, total, start, end, schedule, seed: at(
        step, total, start, max(end, start - (start - end) * 2 * step / (total - 1)), schedule, seed))


class LastStep(RunningQuantile):
    """What the scores of the step before say alone, in place of an average that is behind while gates move."""

    def update(self, scores, valid):
        self.points = None
        super().update(scores, valid)


def last_step():
    return mock.patch.object(train, "RunningQuantile", LastStep)


class Patient(LastStep):
    """And nobody skips during the warm-up (50 steps of the testbed), in which gates tell nothing apart yet."""
    steps = 0

    def policy(self, budget, skip, kv):
        self.steps += 1
        return super().policy(budget if self.steps > 50 else 1.0, skip, kv)


def patient():
    return mock.patch.object(train, "RunningQuantile", Patient)


TRIED = {"last step": last_step, "patient": patient, "random skipping": random_skipping, "ramp": ramp}


# ---------------------------------------------------------------------------------------------------------------------
# Views: how tokens are chosen at inference
# ---------------------------------------------------------------------------------------------------------------------

class Allocation(SkipPolicy):
    """Random tokens, but each branch runs the share that the model's own thresholds let it run: what is left of a gate
    that no longer tells tokens apart. masks: {"prompt", "answer": 2L shares}."""

    def keep(self, branch, scores, valid):
        share = self.masks["prompt" if valid.shape[1] > 1 else "answer"][branch]
        some = SkipPolicy("random", max(share, 1e-6), self.skip, self.kv, generator=self.generator)
        return some.keep(branch, scores, valid)


class FirstKept(SkipPolicy):
    """Random tokens, but never the first of a prompt, which attention falls back on."""

    def keep(self, branch, scores, valid):
        first = valid & (valid.cumsum(1) == 1) & (valid.shape[1] > 1)            # (B, S)
        return super().keep(branch, scores, valid) | first


def thresholds_of(model, items, kv):
    """{budget: 2L floats}, as train.py calibrates at its end; coarser, and as deep as asked."""
    config, quantile = model.config, None
    skip = config.gateskip["skip"]
    if config.gateskip["threshold"] == "global":
        points = torch.load(model.source / "train_state.pt", "cpu", weights_only=True, mmap=True)["quantile"]
        quantile = RunningQuantile(branch_costs(config, skip), points)
    found = calibrate(model, [ids for ids, _ in items], BUDGETS, skip, kv, partial(realised, model, items), quantile,
                      TOLERANCE, ROUNDS)
    return {float(b): spread(table, 2 * config.num_hidden_layers) for b, table in found["thresholds"].items()}


def policies_of(view, model, items, seed, rows):
    """{budget: SkipPolicy} of a view: the kind of choice and, if another than in training, what becomes of K and V.

    none | frozen | batch | random | first_kept | allocation (which reads the rows of frozen); "frozen dense" and so on.
    items: (ids, loss_mask), held out, for thresholds."""
    kind, _, kv = view.partition(" ")
    skip, kv = model.config.gateskip.get("skip", "all"), kv or model.config.gateskip.get("kv", "copy_up")
    taus, less = thresholds_of(model, items, kv) if kind == "frozen" else {}, [b for b in BUDGETS if b < 1.0]
    of = {"first_kept": FirstKept, "allocation": Allocation}.get(kind, SkipPolicy)
    name = kind if kind in ("frozen", "batch") else "random"
    found = {1.0: SkipPolicy("none", 1.0, skip, kv)}
    for b in less if kind != "none" else ():
        shares = next((r["branches"] for r in rows if r["view"] == "frozen" and r["budget"] == b), None)
        found[b] = of(name, b, skip, kv, taus.get(b), shares, torch.Generator().manual_seed(seed))
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Measuring
# ---------------------------------------------------------------------------------------------------------------------

def held_out(tokenizer, seed):
    """((ids, loss_mask) of the sequences for thresholds, the test problems, how eval_gsm8k.run_row asks them)."""
    held, _ = encode_all(load_examples("arithmetic", "calibration", CALIBRATION, seed), tokenizer,
                         read_json(START / "config.json")["eos_token_id"], 96)
    how = SimpleNamespace(batch_size=PROBLEMS, max_new_tokens=48)                # the longest right answer has 42
    return held, load_examples("arithmetic", "test", PROBLEMS), how


def sweep(folder, views, seed):
    """Rows of {"view", *KEPT, "answer": {...}} for each view and budget: exact answers that the model generates."""
    model, tokenizer, rows = load_model(folder).eval(), load_tokenizer(folder), []
    held, problems, how = held_out(tokenizer, seed)
    for view in views:
        for budget, policy in policies_of(view, model, held, seed, rows).items():
            known = next((r for r in rows if budget == 1.0 and r["budget"] == 1.0), None)
            row = known or run_row(view, model, tokenizer, problems, policy, budget, how)
            rows.append({**row, "view": view})
    return [{"view": r["view"], **rounded(r)} for r in rows]


def rounded(row):
    """What is kept of a row of eval_gsm8k.py."""
    return {**{key: round(row[key], 5) for key in KEPT},
            "answer": {key: round(row["answer"][key], 5) for key in OF_ANSWERS}}
