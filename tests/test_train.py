"""Tests of train.py: Table 15, Algorithm 1 step by step, the variants, bad input, the end of a run, dry runs.

The model is a two-layer Llama of width 32 on the built-in problems; a run of a few steps takes half a second. What a
run leaves on disk is in test_checkpoint.py.
"""
import inspect
import json
import math
import re
import shutil
import subprocess
import sys
import sysconfig

import pytest
import torch
from safetensors.torch import load_file

import budgets
import data
import load_weights
import thresholds
import train
from conftest import on_devices
from console import InputError
from gates import GRANULARITIES, GateConfig, SkipPolicy, skippable_share, sparsity_loss
from load_weights import load_model, load_tokenizer, read_json, save_model
from model import MLP, Model
from problems import arithmetic
from savings import branch_costs
from thresholds import make_policy
from toy_runs import FLAGS, ROOT, SCHEDULES, folder, last, metrics, run, state, toy, unbroken, words

PAPER = dict(betas=(0.9, 0.999), eps=1e-8, weight_decay=0.001, clip=1.0, steps=15493, batch_size=1, seq_len=4096,
             warmup=1000, schedule="linear", budget_start=1.0, budget_end=0.8, sparsity_weight=0.1, dtype="float32")
NOT_IN_THE_PAPER = dict(lr=3e-6, sparsity_loss="l2")


# Table 15.

def test_table_15_is_the_papers():
    """A number that drifts from the paper's, or one of the authors' that passes for the paper's."""
    assert train.TABLE_15 == PAPER | NOT_IN_THE_PAPER
    table = inspect.getsource(train).partition("\nTABLE_15 = ")[2].partition("\nPRESETS = ")[0]
    marked = [line.partition("#")[0] for line in table.splitlines() if "NOT in the paper" in line]
    assert [re.findall(r"(\w+)=", line) for line in marked] == [[name] for name in NOT_IN_THE_PAPER]


def test_table_15_is_what_the_flags_default_to(capsys):
    """A default that is written a second time and differs; --help that shows another, or None."""
    args = vars(train.parse_args(words(model="somewhere", data="arithmetic")))
    beside = {"betas", "eps", "weight_decay", "clip"}            # no flags
    assert {name: args[name] for name in train.TABLE_15 if name not in beside} == {
        name: value for name, value in (PAPER | NOT_IN_THE_PAPER).items() if name not in beside}
    assert not beside & set(args)
    with pytest.raises(SystemExit):
        train.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for name, value in (PAPER | NOT_IN_THE_PAPER).items():
        flag = f"--{name.replace('_', '-')} "                    # of the list, not of the usage line
        shown = re.search(rf"(?<!\[){flag}(?:(?! --).)*\(default: ([^)]*)\)", text.partition("options:")[2])
        assert name in beside or shown[1] == str(value), name


def test_presets_leave_table_15_alone():
    """A preset of the paper's models that quietly trains by another recipe: each says all that it changes."""
    for name in ("llama-3.2-1b", "llama-3.2-3b", "llama-3.1-8b", "gemma-2-2b"):
        args = vars(train.parse_args(words(preset=name, data="arithmetic")))
        changed = {key for key, value in train.TABLE_15.items() if key in args and args[key] != value}
        assert changed == ({"lr"} if name == "llama-3.1-8b" else set()), name
        assert {key: args[key] for key in train.PRESETS[name]} == train.PRESETS[name]
    assert train.parse_args(words(preset="llama-3.2-1b", steps=7, data="arithmetic")).steps == 7     # a flag wins
    nothing_asked = train.parse_args([])
    assert (nothing_asked.preset, nothing_asked.model) == ("tiny", "examples/tiny-llama")


def test_table_15_reaches_the_optimizer(folder, tmp_path, monkeypatch):
    """AdamW with PyTorch's own betas or weight decay (0.01): the table would be an ornament."""
    changed = dict(betas=(0.8, 0.95), eps=1e-5, weight_decay=0.25)
    for name, value in changed.items():
        monkeypatch.setitem(train.TABLE_15, name, value)
    made, real = {}, torch.optim.AdamW
    monkeypatch.setattr(torch.optim, "AdamW", lambda trained, **how: made.update(how) or real(trained, **how))
    monkeypatch.setattr(train, "finish", lambda *_: None)
    assert run(folder, tmp_path / "run", steps=1) == 0
    assert {name: made[name] for name in changed} == changed and made["lr"] == 1e-3
    group = state(tmp_path / "run")["train"]["optimizer"]["param_groups"][0]
    assert {name: tuple(group[name]) if name == "betas" else group[name] for name in changed} == changed


def test_table_15_clips_the_gradient(folder, tmp_path, monkeypatch):
    """A clip that is written down and not done: a gradient cut to nothing leaves only the weight decay."""
    monkeypatch.setattr(train, "finish", lambda *_: None)
    before, after = load_file(folder / "model.safetensors"), {}
    for clip in (1.0, 1e-13):
        monkeypatch.setitem(train.TABLE_15, "clip", clip)
        assert run(folder, tmp_path / str(clip), gate="none", steps=1, warmup=1) == 0
        after[clip] = load_file(last(tmp_path / str(clip)) / "model.safetensors")
    decayed = {key: p * (1 - 1e-3 * 0.001) for key, p in before.items()}
    moved = {clip: max((p - decayed[key]).abs().max().item() for key, p in weights.items())
             for clip, weights in after.items()}
    assert moved[1e-13] < 2e-7 and 5e-4 < moved[1.0] < 1.1e-3


# Algorithm 1.

def test_gates_learn_at_their_own_rate(folder, tmp_path, monkeypatch):
    """--gate-lr-scale that moves nothing, or all; a learning rate on record that is the gates'. Adam's first step is as
    long as the rate."""
    monkeypatch.setattr(train, "finish", lambda *_: None)
    monkeypatch.setitem(train.TABLE_15, "weight_decay", 0.0)
    before, flags = load_file(folder / "model.safetensors"), dict(steps=1, warmup=1, lr=1e-4, seed=0)
    for frozen in ((), ("--freeze-backbone",)):
        moved = {}
        for scale in (1, 30):
            assert run(folder, out := tmp_path / f"{scale}{len(frozen)}", *frozen, gate_lr_scale=scale, **flags) == 0
            assert [row["lr"] for row in metrics(out)] == [1e-4]
            after = load_file(last(out) / "model.safetensors")
            moved[scale] = (max((p - before[key]).abs().max().item() for key, p in after.items() if key in before),
                            max((p - 5.0).abs().max().item() for key, p in after.items() if "_gate.out.bias" in key))
        assert moved[1][0] == moved[30][0] == pytest.approx(0 if frozen else 1e-4, rel=0.01), moved
        assert moved[1][1] == pytest.approx(1e-4, rel=0.01) and moved[30][1] == pytest.approx(3e-3, rel=0.01), moved


def test_the_work_of_branches_reaches_the_loss(folder, tmp_path, monkeypatch):
    """--sparsity-cost macs that weighs all branches the same."""
    monkeypatch.setattr(train, "finish", lambda *_: None)
    seen, real = [], train.sparsity_loss
    monkeypatch.setattr(train, "sparsity_loss", lambda *given: seen.append(given[4]) or real(*given))
    for cost in ("equal", "macs"):
        assert run(folder, tmp_path / cost, sparsity_cost=cost, steps=1) == 0
    assert seen == [None, branch_costs(load_model(folder).config)] and len(set(seen[1])) == 2


def test_learning_rate_by_hand():
    """A warm-up that starts at 0 or ends late, a cosine that ends above 0 or rises again."""
    by_hand = [1, 2, 3, 3, 3 * (0.5 + 2 ** 0.5 / 4), 1.5, 3 * (0.5 - 2 ** 0.5 / 4), 0, 0, 0]
    for step, expected in enumerate(by_hand):
        assert train.learning_rate(step, 8, 3.0, 3) == pytest.approx(expected, abs=1e-12), step
    assert train.learning_rate(0, 1, 3.0, 0) == 3.0


def test_sparsity_weight_by_hand():
    """A fall that starts early, or ends before or after the last step; one that nobody asked for."""
    assert [train.sparsity_weight_at(step, 9, 2.0, 0.4) for step in range(9)] == pytest.approx(
        [2.0] * 5 + [1.6, 1.2, 0.8, 0.4])
    assert [train.sparsity_weight_at(step, 4, 2.0, 0.0) for step in range(4)] == pytest.approx([2, 2, 4 / 3, 0])
    assert [train.sparsity_weight_at(step, 9, 2.0, None) for step in range(9)] == [2.0] * 9
    assert train.sparsity_weight_at(0, 1, 2.0, 0.4) == 2.0


def test_a_sparsity_weight_that_falls(folder, tmp_path):
    """--sparsity-weight-end that the loss, or what is printed and written of it, does not follow; a wrong record."""
    assert run(folder, tmp_path / "run", sparsity_weight=3, sparsity_weight_end=1, steps=5, budget_end=0.8) == 0
    for row, weight in zip(metrics(tmp_path / "run"), (3, 3, 3, 2, 1), strict=True):
        assert row["loss"] == pytest.approx(row["ce"] + weight * row["sparsity"])
    stored = load_model(tmp_path / "run").config.gateskip
    assert (stored["sparsity_weight"], stored["sparsity_weight_end"]) == (3, 1)
    moved = {}
    for end in (0.0, 3.0):                                       # two runs that part at the last step but one
        run(folder, tmp_path / f"{end}", sparsity_weight=3, sparsity_weight_end=end, steps=4, budget_end=0.8, lr=1e-2)
        moved[end] = load_file(last(tmp_path / f"{end}") / "model.safetensors")
    gates = [key for key in moved[0.0] if "_gate." in key]
    assert gates and any((moved[0.0][key] != moved[3.0][key]).any() for key in gates)


def test_metrics_follow_algorithm_1(unbroken):
    """A budget that is off by one step, a learning rate that lags, a loss that does not add up, a skip not counted."""
    rows = metrics(unbroken["linear"])
    assert [row["budget"] for row in rows] == pytest.approx([1.0, 0.96, 0.92, 0.88, 0.84, 0.8])
    assert (rows[0]["budget"], rows[-1]["budget"]) == (1.0, 0.8)
    assert [row["lr"] for row in rows] == [train.learning_rate(step, 6, 1e-3, 2) for step in range(6)]
    assert rows[-1]["lr"] == 0
    for row in rows:
        assert row["loss"] == pytest.approx(row["ce"] + 0.1 * row["sparsity"])
        assert row["ce"] == pytest.approx(math.log(504), abs=0.6)
        assert row["gate_mean"] == pytest.approx(0.9933, abs=1e-3)
        assert row["sparsity"] == pytest.approx(0.9867, abs=2e-3)
        asked = 1 - row["budget"]                                # tokens tied at the threshold go too
        assert row["skipped"] == 0 if asked == 0 else asked < row["skipped"] < asked + 0.1
    budgets = [row["budget"] for row in metrics(unbroken["uniform"])]
    assert budgets[0] == budgets[4] == 1.0 and all(0.7 <= b < 1.0 for b in budgets[1:4] + budgets[5:])
    assert len(set(budgets)) == 5


def test_a_run_without_gates_has_no_mean_gate(folder, unbroken, tmp_path, monkeypatch):
    """A mean gate of 1, or of 0, drawn for a model that has none."""
    monkeypatch.setattr(train, "finish", lambda *_: None)
    assert run(folder, tmp_path / "run", gate="none", steps=2) == 0
    gated, dense = metrics(unbroken["linear"]), metrics(tmp_path / "run")
    assert all(set(row) == set(gated[0]) - {"gate_mean"} for row in dense) and "gate_mean" in gated[0]
    assert all((row["sparsity"], row["skipped"], row["loss"]) == (0, 0, row["ce"]) for row in dense)


def by_hand(model, tokenizer, problems, budget):
    """(answer loss, mean of g^2) of problems as one batch, token by token, on the template written out here."""
    rows, answers = [], []
    for p in problems:
        prompt = tokenizer.encode(f"Question: {p.question}\nAnswer:").ids
        answer = tokenizer.encode(f" {p.reasoning}\n#### {p.answer}", add_special_tokens=False).ids + [1]
        rows.append(prompt + answer)
        answers.append(len(answer))
    longest = max(map(len, rows))
    ids = torch.tensor([row + [7] * (longest - len(row)) for row in rows])
    real = torch.tensor([[True] * len(row) + [False] * (longest - len(row)) for row in rows])
    assert not real.all()
    logits, trace = model(ids, valid=real, policy=SkipPolicy("batch", budget), keep_gates=True)
    assert budget == 1.0 or any((~k & real).any() for k in trace.keep)
    ce = squares = 0.0
    for b, row in enumerate(rows):
        for place in range(len(row) - answers[b], len(row)):
            ce = ce - logits[b, place - 1].log_softmax(-1)[row[place]] / sum(answers)
        for g in trace.gates:
            squares = squares + (g[b, :len(row)] ** 2).sum()
    return ce, squares / (4 * 32 * sum(map(len, rows)))


@pytest.mark.parametrize("budget", [1.0, 0.8])
def test_two_steps_by_hand(folder, tmp_path, monkeypatch, budget):
    """Loss on the question or not on the EOS, a mean over the wrong tokens, padding that counts, another lambda, AdamW
    or clipping."""
    monkeypatch.setattr(train, "pick_device", lambda *_: (torch.device("cpu"), torch.float64))
    assert run(folder, tmp_path / "run", "--gate-shared", steps=2, batch_size=3, lr=1e-2, warmup=3, budget_start=budget,
               budget_end=budget, sparsity_weight=0.5, save_every=1) == 0

    torch.manual_seed(1)
    model, tokenizer = load_model(folder, GateConfig(shared=True), dtype=torch.float64), load_tokenizer(folder)
    problems, weights = arithmetic(6, "train", 1), dict(model.named_parameters())
    m, v = ({name: torch.zeros_like(p) for name, p in weights.items()} for _ in range(2))
    smallest, norms = {name: torch.full_like(p, torch.inf) for name, p in weights.items()}, []
    for step in range(2):
        ce, sparsity = by_hand(model, tokenizer, [problems[i] for i in data.batch_at(6, 3, 1, step)], budget)
        model.zero_grad()
        (ce + 0.5 * sparsity).backward()
        row = metrics(tmp_path / "run")[step]
        assert row["ce"] == pytest.approx(ce.item(), abs=1e-6)
        assert row["sparsity"] == pytest.approx(sparsity.item(), abs=1e-6)
        norms.append(sum(p.grad.square().sum() for p in weights.values()).sqrt().item())
        lr = 1e-2 * (step + 1) / 3
        with torch.no_grad():
            for name, p in weights.items():
                g = p.grad * min(1.0, 1.0 / norms[-1])
                smallest[name] = torch.minimum(smallest[name], g.abs().where(g != 0, torch.inf))
                m[name] = 0.9 * m[name] + 0.1 * g
                v[name] = 0.999 * v[name] + 0.001 * g * g
                p.mul_(1 - lr * 0.001)
                root = (v[name] / (1 - 0.999 ** (step + 1))).sqrt()
                p.sub_(lr * (m[name] / (1 - 0.9 ** (step + 1))) / (root + 1e-8))
    assert min(norms) > 1.0 and max(norms) / min(norms) > 1.05   # else no clipping would show
    saved = load_file(last(tmp_path / "run") / "model.safetensors")
    assert saved.keys() == weights.keys()
    for name, p in weights.items():                              # Adam divides by the gradient: where that is as small
        clear = smallest[name] > 1e-6                            # as the loss's float32 rounding, the step is noise
        assert (saved[name] - p)[clear].abs().max() < 1e-6 and clear.double().mean() > 0.9, name


def test_accumulation_is_one_batch(folder, tmp_path):
    """A mean of means: answers of unequal length would weigh differently in two half batches than in one whole, and
    so would the gates of sequences of unequal length. (At budget 1: half a batch has another quantile.)"""
    for name, flags in dict(whole=dict(batch_size=4), halves=dict(batch_size=2, grad_accum=2)).items():
        assert run(folder, tmp_path / name, steps=3, warmup=3, budget_end=1.0, **flags) == 0
    whole, halves = (state(tmp_path / name) for name in ("whole", "halves"))
    for key, p in whole["weights"].items():
        assert (p - halves["weights"][key]).abs().max() < 2e-5, key
    for a, b in zip(metrics(tmp_path / "whole"), metrics(tmp_path / "halves"), strict=True):
        assert a["ce"] == pytest.approx(b["ce"], abs=1e-5) and a["skipped"] == 0
        assert a["sparsity"] == pytest.approx(b["sparsity"], abs=2e-7) and a["sparsity"] > 0.9


def test_frozen_backbone(folder, tmp_path):
    """A backbone that moves after all (weight decay), or gates that do not learn."""
    assert run(folder, tmp_path / "run", "--freeze-backbone", steps=2) == 0
    before, after = load_file(folder / "model.safetensors"), state(tmp_path / "run")["weights"]
    torch.manual_seed(1)
    fresh = dict(load_model(folder, GateConfig()).named_parameters())
    for key, p in after.items():
        assert torch.equal(p, before[key]) if key in before else not torch.equal(p, fresh[key]), key


VARIANTS = {
    "none": dict(gate="none"), "mlp": dict(gate_arch="mlp"), "scalar mlp": dict(gate="scalar", gate_arch="mlp"),
    "low rank": dict(gate_arch="lowrank", gate_rank=3), "shared": dict(gate_shared=True),
    "residual": dict(gate_input="residual"), "before": dict(gate_placement="before"), "detach": dict(gate_detach=True),
    "dense": dict(kv="dense"), **{f"skip {skip}": dict(skip=skip) for skip in GRANULARITIES},
    **{f"loss {kind}": dict(sparsity_loss=kind) for kind in ("l1", "l2_norm", "kl")},
    "checkpointed": dict(checkpoint_activations=True),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_trains_saves_and_is_the_same_compact(folder, tmp_path, monkeypatch, name):
    """A flag that never reaches the gate, a gate that cannot be loaded again, a compact path with other gradients."""
    monkeypatch.setattr(train, "pick_device", lambda *_: (torch.device("cpu"), torch.float64))
    monkeypatch.setattr(train, "finish", lambda *_: None)
    variant, modes, forward = VARIANTS[name], [], Model.forward
    flags = {key: value for key, value in variant.items() if value is not True}
    switches = [f"--{key.replace('_', '-')}" for key, value in variant.items() if value is True]

    def spy(*args, **how):
        modes.append((how["compute"], how["policy"].kv))
        return forward(*args, **how)
    monkeypatch.setattr(Model, "forward", spy)
    for compute in ("masked", "compact"):                        # one sequence: no ties between rows of a batch
        assert run(folder, tmp_path / compute, *switches, steps=3, batch_size=1, warmup=3, budget_start=0.9,
                   budget_end=0.7, compute=compute, **flags) == 0
    kv, skip = variant.get("kv", "copy_up"), variant.get("skip", "all")
    assert modes == [("masked", kv)] * 3 + [("compact", kv)] * 3
    masked, compact = metrics(tmp_path / "masked"), metrics(tmp_path / "compact")
    for a, b in zip(masked, compact, strict=True):
        assert a["skipped"] == b["skipped"] and a["loss"] == pytest.approx(b["loss"], abs=1e-5)
    model, saved = load_model(tmp_path / "masked", dtype=torch.float64), state(tmp_path / "compact")["weights"]
    for key, p in model.named_parameters():
        assert (saved[key] - p).abs().max() < 1e-5, key
    wanted = {key.removeprefix("gate_"): value for key, value in variant.items() if key.startswith("gate_")}
    if name == "none":
        assert model.config.gate is None and masked[-1]["skipped"] == 0
    else:
        assert model.config.gate == GateConfig(form=variant.get("gate", "vector"), **wanted)
        assert model.config.gateskip["skip"] == skip and model.config.gateskip["kv"] == kv
    share = skippable_share(skip, 2) * (name != "none")
    assert 0.29 * share <= masked[-1]["skipped"] < 0.45 * share or share == 0


def test_each_sparsity_loss_and_weight_arrives(folder, tmp_path, monkeypatch):
    """--sparsity-loss or --sparsity-weight that is parsed and then forgotten."""
    monkeypatch.setattr(train, "finish", lambda *_: None)
    g = torch.full((1, 2, 32), 0.99330)
    for kind in ("l2", "l1", "l2_norm", "kl"):
        assert run(folder, tmp_path / kind, sparsity_loss=kind, sparsity_weight=3, steps=1, budget_end=0.8) == 0
        row = metrics(tmp_path / kind)[0]
        assert row["sparsity"] == pytest.approx(sparsity_loss([g] * 4, None, kind, 0.8).item(), rel=0.01)
        assert row["loss"] == pytest.approx(row["ce"] + 3 * row["sparsity"])


def test_recomputing_activations_changes_nothing(folder, unbroken, tmp_path, monkeypatch):
    """Keep masks or gates that come out differently in the recomputation; a flag that recomputes nothing."""
    monkeypatch.setattr(train, "finish", lambda *_: None)
    calls, forward = [], MLP.forward
    monkeypatch.setattr(MLP, "forward", lambda self, x: calls.append(x.shape) or forward(self, x))
    assert run(folder, tmp_path / "run", "--checkpoint-activations", **SCHEDULES["linear"]) == 0
    assert len(calls) == 6 * 2 * 2 * 2                           # steps, forward passes, layers; and each once more
    for a, b in zip(metrics(tmp_path / "run"), metrics(unbroken["linear"]), strict=True):
        assert a == pytest.approx(b, rel=1e-6)


def test_bfloat16_keeps_the_gates_in_float32(folder, tmp_path):
    """Gates rounded to bfloat16, whose scores could not rank tokens; or a dtype flag that does nothing. A backbone in
    bfloat16 that is said to be trained: most of its updates are less than half a rounding step, and nothing moves."""
    for gates in ((), ("--gate", "none")):
        with pytest.raises(InputError, match="--dtype bfloat16 rounds .* --freeze-backbone"):
            run(folder, tmp_path / "run", *gates, steps=2, dtype="bfloat16")
    assert run(folder, tmp_path / "run", "--freeze-backbone", steps=2, dtype="bfloat16") == 0
    for key, p in state(tmp_path / "run")["weights"].items():
        assert p.dtype == (torch.float32 if "_gate." in key else torch.bfloat16), key
    assert 0 < metrics(tmp_path / "run")[1]["skipped"] < 0.4


@on_devices
def test_a_run_on_each_device(folder, tmp_path, device):
    """A tensor left behind on the CPU; a run from scratch, continued as a model of its own by a second run."""
    (tmp_path / "config").mkdir()
    for name, here in (("config.json", "small.json"), ("tokenizer.json", "tokenizer.json")):
        shutil.copy(folder / name, tmp_path / "config" / here)
    flags = FLAGS | dict(device=device, steps=2, grad_accum=2)
    scratch, gated = tmp_path / "scratch", tmp_path / "gated"
    assert train.main(words(init_config=tmp_path / "config" / "small.json", gate="none", out=scratch, **flags)) == 0
    assert train.main(words("--checkpoint-activations", model=scratch, out=gated, **flags)) == 0
    assert load_model(scratch).config.gate is None and load_model(gated).config.gate == GateConfig()
    assert metrics(gated)[0]["ce"] < metrics(scratch)[0]["ce"]


def test_compiled_steps_are_the_same(folder, tmp_path, monkeypatch):
    """--compile that breaks on a policy or a trace, or forgets the mask. (Traced only: compiling takes a minute.)"""
    monkeypatch.setattr(train, "finish", lambda *_: None)
    real, compiled = torch.compile, []
    monkeypatch.setattr(torch, "compile", lambda model: compiled.append(real(model, backend="eager")) or compiled[0])
    assert run(folder, tmp_path / "run", "--compile", steps=2, warmup=2, budget_start=0.9) == 0
    assert run(folder, tmp_path / "plain", steps=2, warmup=2, budget_start=0.9) == 0
    assert len(compiled) == 1
    for a, b in zip(metrics(tmp_path / "run"), metrics(tmp_path / "plain"), strict=True):
        assert a == pytest.approx(b, rel=1e-6)


def test_compile_without_a_compiler_is_told_in_one_line(folder, tmp_path, monkeypatch):
    """A page of traceback out of TorchInductor after the model has loaded."""
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(InputError, match="--compile needs a C.. compiler"):
        run(folder, tmp_path / "run", "--compile")
    monkeypatch.setattr(shutil, "which", lambda name: name)
    (tmp_path / "Python.h").unlink()
    with pytest.raises(InputError, match="--compile needs a Python.h"):
        run(folder, tmp_path / "run", "--compile")


def test_a_warm_up_longer_than_the_run_is_said(capsys):
    """--steps 20 with Table 15's warm-up of 1000: the learning rate never comes near its peak, without a word."""
    train.parse_args(words(preset="llama-3.2-1b", data="arithmetic", steps=20))
    assert "CAUTION: --warmup 1000 is longer than the run of 20 steps" in capsys.readouterr().err
    train.parse_args(words(preset="llama-3.2-1b", data="arithmetic", steps=1000))
    assert capsys.readouterr().err == ""


# Bad input.

@pytest.mark.parametrize("flags, complaint", [
    (dict(budget_end="nan"), "--budget-end: budget nan"), (dict(budget_end=0), "--budget-end: budget 0.0"),
    (dict(budget_start=1.5), "--budget-start: budget 1.5 is outside (0, 1]"),
    (dict(budget_start=0.7), "--budget-end 0.8 is above"),
    (dict(steps=0), "--steps: '0' must be a whole number of at least 1; --help lists the flags"),
    (dict(steps=2 ** 63), "of at least 1 and at most 9223372036854775807"),
    (dict(lr="1e999"), "above 0.0 and at most 1.79"),
    (dict(grad_accum=0), "--grad-accum: '0'"), (dict(lr="nan"), "--lr: 'nan'"), (dict(lr=0), "--lr: '0'"),
    (dict(warmup="1" + "0" * 400), "--warmup: '1000"),
    (dict(sparsity_weight=0.1, sparsity_weight_end=1), "--sparsity-weight-end 1.0 is above --sparsity-weight 0.1"),
    (dict(sparsity_weight="inf"), "--sparsity-weight: 'inf'"), (dict(warmup=-1), "--warmup: '-1'"),
    (dict(calibrate=0.5), "--calibrate 0.5 is below --budget-end 0.8"), (dict(calibrate=0), "--calibrate: budget 0.0"),
    (dict(seq_len=999), "--seq-len 999 exceeds the model's 512"),
    (dict(seq_len=9), "no example fits into --seq-len 9"), (dict(init_config="config.json"), "give one of them"),
    (dict(gate="scalar", gate_arch="lowrank"), "low-rank gate with a scalar"),
    (dict(eval_data="gone.jsonl"), "gone.jsonl"), (dict(distill_weight=1.5), "--distill-weight: '1.5'"),
    (dict(threshold="global", gate="none"), "--threshold global with --gate none"),
    (dict(sparsity_cost="macs", gate="none"), "--sparsity-cost macs with --gate none"),
    (dict(gate_lr_scale=30, gate="none"), "--gate-lr-scale 30.0 with --gate none"),
    (dict(threshold="global", budget_end=1), "nobody skips, so no threshold"),
    (dict(threshold="global", sparsity_loss="kl"), "pulls every branch to the same budget"),
    (dict(kv="dense", skip="mlp"), "nobody skips attention"),
])
def test_bad_flags_are_told_in_one_line(folder, tmp_path, flags, complaint):
    """A mistake that is only noticed after hours, by a traceback."""
    with pytest.raises(InputError) as error:
        run(folder, tmp_path / "run", **flags)
    assert complaint in str(error.value) and "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_combinations_that_make_no_sense(folder, unbroken, tmp_path):
    """Flags that would be ignored silently."""
    for switches, flags, complaint in (
            (["--freeze-backbone"], dict(gate="none"), "nothing to train"),
            (["--compile"], dict(compute="compact"), "static"), (["--resume", "--overwrite"], {}, "give one of them"),
            ([], dict(gate="none", model=unbroken["linear"]), "has gates already"),
            (["--gate-shared"], dict(model=unbroken["linear"]), "has gates already"),
            (["--gate-shared", "--dry-run"], dict(model=unbroken["linear"]), "has gates already"),
            (["--dry-run"], dict(gate="none", model=unbroken["linear"]), "has gates already")):
        with pytest.raises(InputError, match=complaint):
            run(folder, tmp_path / "run", *switches, **flags)
    with pytest.raises(InputError, match="--data is missing"):
        train.main(["--preset", "llama-3.2-1b"])


def test_a_preset_with_gates_can_train_the_dense_model():
    """--gate none refused for what only the preset asks for; or a price left to a model without gates."""
    args = train.parse_args(words(preset="smollm2-135m", data="arithmetic", gate="none"))
    assert (args.threshold, args.sparsity_cost, args.gate_lr_scale, args.steps) == ("branch", "equal", 1.0, 1000)
    args = train.parse_args(words(preset="smollm2-135m", data="arithmetic"))
    assert (args.threshold, args.sparsity_cost, args.gate_lr_scale, args.gate) == ("global", "macs", 30.0, "scalar")
    for skip, kv in (("mlp", "copy_up"), ("attn", "dense")):     # --kv dense refused, which nobody gave
        assert train.parse_args(words(preset="smollm2-135m", data="arithmetic", skip=skip)).kv == kv


def test_a_granularity_that_lets_nobody_skip(folder, tmp_path):
    """A run to its end, and a division by 0 in its table: every second layer of a single one."""
    (tmp_path / "config.json").write_text(json.dumps(read_json(folder / "config.json") | {"num_hidden_layers": 1}))
    shutil.copy(folder / "tokenizer.json", tmp_path)
    with pytest.raises(InputError, match="--skip alternate lets nobody skip in a model of 1 layer"):
        train.main(words(init_config=tmp_path / "config.json", out=tmp_path / "run", skip="alternate", **FLAGS))


def test_a_model_that_does_not_fit_its_tokenizer(folder, tmp_path):
    """Token ids beyond the embedding, and an answer that no token ends."""
    for number, (change, complaint) in enumerate((
            (dict(vocab_size=400), "the tokenizer has 482 tokens and .* 400: they do not belong together"),
            (dict(eos_token_id=None), "no eos_token_id"))):
        save_model(toy(tmp_path / str(number), **change)[0], tmp_path / str(number))
        with pytest.raises(InputError, match=complaint):
            run(tmp_path / str(number), tmp_path / "run")


def test_too_long_examples_are_counted_and_said(folder, tmp_path, capsys, monkeypatch):
    """An answer cut silently, or a count that is wrong."""
    monkeypatch.setattr(train, "finish", lambda *_: None)
    assert run(folder, tmp_path / "run", steps=20, batch_size=1, seq_len=68) == 0
    tokenizer, calibration = load_tokenizer(folder), arithmetic(6, "calibration", 1)
    sets = {"train": arithmetic(20, "train", 1), "calibration": calibration[:3], "check": calibration[3:],
            "eval": arithmetic(4, "test")}
    fit = {name: sum(len(data.encode_example(tokenizer, e, 1)[0]) <= 68 for e in examples)
           for name, examples in sets.items()}
    assert 0 < fit["train"] < 20
    said = ", ".join(f"{n} {name}" for name, n in fit.items())
    left_out = f"{30 - sum(fit.values())} longer than --seq-len 68 left out"
    assert f"data: {said}; {left_out}\n" in capsys.readouterr().out


def test_a_loss_that_is_no_number_stops_the_program(folder, tmp_path):
    """A run that goes on with NaN weights and saves them over the good ones; a traceback; an error line behind the
    progress bar."""
    flags = FLAGS | dict(model=folder, out=tmp_path / "run", lr=1e30, warmup=0, save_every=1)
    done = subprocess.run([sys.executable, ROOT / "train.py", *words(**flags)], capture_output=True, text=True,
                          timeout=600)
    lines = [line for line in done.stderr.splitlines()
             if line and not line.startswith(("device:", "train:")) and "it/s" not in line]
    assert done.returncode == 1 and len(lines) == 1 and "Traceback" not in done.stderr
    assert lines[0].startswith("error: the loss is ") and "norm nan at step 1: lower --lr" in lines[0]
    assert done.stderr.endswith(lines[0] + "\n")
    assert last(tmp_path / "run").name == "step-000001" and load_model(tmp_path / "run")


def test_no_update_from_a_loss_or_gradient_that_is_no_number(folder, tmp_path, monkeypatch):
    """Weights that are spoiled first and looked at afterwards."""
    updates, step = [], torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: updates.append(1) or step(self))
    for spoiled in ("loss", "gradient"):
        updates.clear()
        with monkeypatch.context() as m:
            if spoiled == "loss":
                real = train.F.cross_entropy
                m.setattr(train.F, "cross_entropy", lambda *a, **k: real(*a, **k) * (math.nan if updates else 1.0))
            else:
                clip = torch.nn.utils.clip_grad_norm_
                m.setattr(torch.nn.utils, "clip_grad_norm_", lambda *a: clip(*a) + (math.inf if updates else 0.0))
            with pytest.raises(InputError, match="at step 1: lower --lr"):
                run(folder, tmp_path / spoiled)
        assert updates == [1], spoiled


# The end of a run.

def test_a_prompt_is_what_comes_before_the_answer():
    """A calibration that continues behind the answer, or an empty prompt for plain text."""
    assert budgets.prompt_of(([5, 6, 7, 8, 9], [False, False, False, True, True])) == [5, 6, 7]
    assert budgets.prompt_of(([5, 6, 7, 8, 9], [False, True, True, True, True])) == [5, 6]
    assert budgets.prompt_of(([5, 6], [False, True])) == [5]


def test_evaluate_by_hand(folder, monkeypatch):
    """A mean over batches instead of tokens, a prediction compared with the token that it was made from, padding that
    counts."""
    items = data.encode_all(arithmetic(5, "test"), load_tokenizer(folder), 1, 160)[0]
    model = load_model(folder)
    with torch.no_grad():
        model.model["embed_tokens"].weight[1] *= 30              # answers it is sure of, some of them right
    monkeypatch.setattr(budgets, "chunks", lambda *how, **more: thresholds.chunks(*how, **more, tokens=120))
    loss, accuracy, savings = budgets.evaluate(model, items, SkipPolicy())
    losses, right = [], []
    for ids, mask in items:
        logits = model(torch.tensor([ids]))[0][0].log_softmax(-1)
        for place in range(1, len(ids)):
            if mask[place]:
                losses.append(-logits[place - 1, ids[place]].item())
                right.append(logits[place - 1].argmax().item() == ids[place])
    assert loss == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert accuracy == pytest.approx(sum(right) / len(right)) and accuracy > 0
    assert savings["skipped"] == 0 and savings["pairs"] == 4 * sum(len(ids) for ids, _ in items)


def test_the_end_of_a_run(folder, unbroken, capsys):
    """Thresholds that generation does not find or that other settings may use; budgets missing from the table or below
    training's."""
    stored = read_json(last(unbroken["linear"]) / "config.json")["gateskip"]
    assert {key: stored[key] for key in ("skip", "kv", "step", "budget_start", "budget_end", "schedule")} == dict(
        skip="all", kv="copy_up", step=6, budget_start=1.0, budget_end=0.8, schedule="linear")
    assert list(stored["thresholds"]) == ["1.0", "0.9", "0.8"]
    assert {len(t) for t in stored["thresholds"].values()} == {4}
    config = load_model(unbroken["linear"]).config
    policy = make_policy(config, "auto", 0.9)
    assert policy.kind == "frozen" and policy.thresholds == stored["thresholds"]["0.9"]
    for other in (dict(kv="dense"), dict(skip="mlp")):
        with pytest.raises(InputError, match="calibrated with --skip all --kv copy_up"):
            make_policy(config, "auto", 0.9, **other)

    capsys.readouterr()
    assert run(folder, unbroken["linear"], "--resume", **SCHEDULES["linear"]) == 0   # a finished run: calibrates again
    printed = capsys.readouterr().out.splitlines()
    head = next(i for i, line in enumerate(printed) if line.startswith("budget "))
    for column in ("answer loss", "token accuracy", "skipped", "per call", "macs_saved", "random skipping"):
        assert column in printed[head]
    rows = [line.split() for line in printed[head + 1:head + 4]]
    assert [row[0] for row in rows] == ["1.000", "0.900", "0.800"] and [len(row) for row in rows] == [6, 7, 7]
    skipped, macs = ([float(row[i].rstrip("%")) for row in rows] for i in (3, 5))
    assert skipped[0] == 0 < skipped[1] < skipped[2]
    assert macs[0] < 0 and macs[0] < macs[1] < macs[2]           # open gates only cost
    assert any("10.0% ->" in line and "20.0% ->" in line for line in printed)
    assert read_json(last(unbroken["linear"]) / "config.json")["gateskip"] == stored


def test_the_trained_budget_is_calibrated_and_a_share_is_asked_for_as_such(folder, tmp_path, capsys):
    """--budget-end 0.93 that generation then refuses; 7% announced where only half the branches may skip 7%."""
    assert run(folder, tmp_path / "run", steps=1, skip="attn", budget_end=0.93) == 0
    assert list(read_json(last(tmp_path / "run") / "config.json")["gateskip"]["thresholds"]) == ["1.0", "0.93"]
    assert ": 3.5% ->" in capsys.readouterr().out


def test_calibration_fits_into_the_models_positions(folder, tmp_path, monkeypatch):
    """A run that trains for hours and then fails because a prompt and its continuation are too long for the model."""
    (tmp_path / "model").mkdir()
    for name in ("tokenizer.json", "model.safetensors"):
        shutil.copy(folder / name, tmp_path / "model")
    config = read_json(folder / "config.json") | {"max_position_embeddings": 160}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(budgets, "CONTINUE", 96)
    monkeypatch.setattr(budgets, "BUDGETS", ())
    assert run(tmp_path / "model", tmp_path / "run", steps=1) == 0


# What it needs, on paper.

def test_dry_run_touches_neither_network_nor_out(folder, tmp_path, monkeypatch, capsys):
    """A dry run that downloads 16 GB, deletes a run, or shows the gates of the dry run before it."""
    def reached(*_, **__):
        raise AssertionError("the network was asked")
    monkeypatch.setattr(load_weights, "_download", reached)
    monkeypatch.setattr("socket.socket.connect", reached)
    monkeypatch.chdir(tmp_path)                                  # no examples/ and no meta-llama/ here
    monkeypatch.setitem(train.PRESETS["tiny"], "model", str(folder))
    totals = {}
    for preset in train.PRESETS:
        for gate in ("vector", "none"):
            more = dict(gate=gate, dtype="float32")              # 8B: frozen in bfloat16, with gates
            assert train.main(words("--dry-run", "--overwrite", preset=preset, data="arithmetic", **more)) == 0
            printed = capsys.readouterr().out
            assert "<- this run" in printed
            totals[preset, gate] = [float(line.split(" = ")[1].split()[0])
                                    for line in printed.splitlines() if " = " in line]
    assert not list(tmp_path.iterdir())
    with_gates, without = totals["llama-3.2-1b", "vector"], totals["llama-3.2-1b", "none"]
    assert with_gates == pytest.approx([43.5, 31.1], abs=2)
    gates = 134_283_264 * 16 / 1e9                               # weights, gradients and Adam of the gates, and their
    assert with_gates[0] - without[0] == pytest.approx(gates + 16 * 4 * 2048 * 4096 * 4 / 1e9, abs=0.1)       # values
    monkeypatch.setitem(train.PRESETS["tiny"], "model", "examples/tiny-llama")
    with pytest.raises(InputError, match="does not exist here, but in .*: start there, or give"):
        train.main(["--dry-run"])
    for asked in (["--model", "some/model"], ["--preset", "llama-3.2-1b", "--model", "some/model"]):
        with pytest.raises(InputError, match="does not ask the hub for some/model"):
            train.main([*asked, "--data", "arithmetic", "--dry-run"])
