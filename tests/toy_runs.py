"""What the tests of the commands share: a toy model on disk, command lines, and short runs of train.py on the toy.

It is a two-layer Llama of width 32 with the tokenizer of the built-in problems; a run of six steps takes half a second.
"""
import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import budgets
import train
from gates import budget_at
from load_weights import load_tokenizer, new_model, read_json, save_model

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "examples" / "tiny-llama"
TOY = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
           head_dim=8)


def toy(path, gate=None, **changes):
    """(a new model, its tokenizer); the config that they are made of is written into the folder `path`."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps({**read_json(TINY / "config.json"), **TOY, **changes}))
    shutil.copy(TINY / "tokenizer.json", path)
    return new_model(path / "config.json", gate), load_tokenizer(path)


def words(*switches, **flags):
    """A command line: save_every=2 is --save-every 2; switches and the like stand behind the flags, as they are."""
    return [*(word for name, value in flags.items() for word in (f"--{name.replace('_', '-')}", str(value))), *switches]


# Runs of train.py.

FLAGS = dict(data="arithmetic", steps=6, batch_size=2, seq_len=160, lr=1e-3, warmup=2, save_every=2, eval_limit=4,
             device="cpu")
SCHEDULES = {"linear": dict(schedule="linear", grad_accum=2),
             "uniform": dict(schedule="uniform", budget_end=0.7, gate="scalar"),
             "global": dict(schedule="uniform", budget_end=0.7, gate="scalar", threshold="global", compute="compact",
                            sparsity_cost="macs", gate_lr_scale=10)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pretrained model without gates. While it is there, runs end in a short calibration: one budget beside the
    trained one, few sequences, few new tokens; and without a picture."""
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    model, tokenizer = toy(path)
    save_model(model, path, tokenizer)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(budgets, "BUDGETS", (0.9,))
        m.setattr(budgets, "CONTINUE", 4)
        m.setattr(train, "HELD_OUT", 3)
        m.setattr(train, "plot_metrics", lambda out: None)
        yield path


@pytest.fixture(scope="module")
def unbroken(folder, tmp_path_factory):
    """For each schedule, a run that nothing disturbed."""
    runs = {}
    for name, flags in SCHEDULES.items():
        runs[name] = tmp_path_factory.mktemp("unbroken") / "run"
        assert run(folder, runs[name], **flags) == 0
    return runs


def run(folder, out, *switches, **flags):
    """train.main on the model in folder; flags as keywords, switches such as --resume as they are."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        return train.main(words(*switches, **{"model": folder, "out": out, **FLAGS, **flags}))
    except BaseException:                                        # it leaves its own behind: a program would be gone
        for number, handler in handlers.items():
            signal.signal(number, handler)
        raise


def metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def last(out):
    return out / (out / "latest").read_text().strip()


def state(out):
    """Everything that a run leaves: weights, optimizer and random state, metrics, config with its calibration."""
    return {"weights": load_file(last(out) / "model.safetensors"),
            "train": torch.load(last(out) / "train_state.pt", weights_only=True),
            "metrics": (out / "metrics.jsonl").read_text(), "config": read_json(last(out) / "config.json"),
            "files": sorted(p.name for p in out.iterdir())}


def same_bits(a, b, where="state"):
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            same_bits(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list):
        assert len(a) == len(b), where
        for i, pair in enumerate(zip(a, b)):
            same_bits(*pair, f"{where}[{i}]")
    else:
        assert a == b, where


class Killed(BaseException):
    """The process is gone; nothing catches it."""


def kill():
    raise Killed


def at_step(monkeypatch, wanted, action):
    """Do action() in the middle of step `wanted` of the next run; undone by `undisturbed`."""
    def hooked(step, *rest):
        if step == wanted:
            action()
        return budget_at(step, *rest)
    monkeypatch.setattr(train, "budget_at", hooked)


def undisturbed(monkeypatch):
    monkeypatch.setattr(train, "budget_at", budget_at)
