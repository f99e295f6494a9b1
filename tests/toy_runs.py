"""What test_train.py and test_checkpoint.py share: toy runs of train.py, and what they leave on disk.

The model is a two-layer Llama of width 32 on the built-in problems; a run of a few steps takes half a second.
"""
import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train
from gates import budget_at
from load_weights import load_tokenizer, new_model, read_json, save_model

ROOT = Path(__file__).parents[1]
TOY = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8
)
FLAGS = dict(
    data="arithmetic", steps=6, batch_size=2, seq_len=160, lr=1e-3, warmup=2, save_every=2, eval_limit=4, device="cpu"
)


@pytest.fixture(scope="module")
def small():
    """A short calibration at the end of every run: one budget beside the trained one, few sequences, few new tokens."""
    with pytest.MonkeyPatch.context() as m:
        for name, value in dict(BUDGETS=(0.9,), HELD_OUT=3, CONTINUE=4, plot_metrics=lambda out: None).items():
            m.setattr(train, name, value)
        yield


@pytest.fixture
def ctrl_c():
    """A run that ends in an error leaves its handler behind; a program would be gone by then."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pretrained model without gates."""
    path = tmp_path_factory.mktemp("model")
    (path / "config.json").write_text(json.dumps(read_json(ROOT / "examples/tiny-llama/config.json") | TOY))
    shutil.copy(ROOT / "examples/tiny-llama/tokenizer.json", path)
    torch.manual_seed(0)
    save_model(new_model(path / "config.json"), path, load_tokenizer(path))
    return path


def run(folder, out, *switches, **flags):
    """train.main on the model in folder; flags as keywords, switches such as --resume as they are."""
    flags = {"model": folder, "out": out, **FLAGS, **flags}
    words = [w for name, value in flags.items() for w in (f"--{name.replace('_', '-')}", str(value))]
    return train.main([*words, *switches])


def metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def last(out):
    return out / (out / "latest").read_text().strip()


def state(out):
    """Everything that a run leaves: weights, optimizer and random state, metrics, config with its calibration."""
    return {
        "weights": load_file(last(out) / "model.safetensors"),
        "train": torch.load(last(out) / "train_state.pt", weights_only=True),
        "metrics": (out / "metrics.jsonl").read_text(),
        "config": read_json(last(out) / "config.json"),
        "files": sorted(p.name for p in out.iterdir()),
    }


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


def at_step(monkeypatch, wanted, action):
    """Run action() in the middle of step `wanted` of the next run."""
    def hooked(step, *rest):
        if step == wanted:
            action()
        return budget_at(step, *rest)
    monkeypatch.setattr(train, "budget_at", hooked)


def kill():
    raise Killed


SCHEDULES = {
    "linear": dict(schedule="linear", grad_accum=2),
    "uniform": dict(schedule="uniform", budget_end=0.7, gate="scalar"),
}


@pytest.fixture(scope="module")
def unbroken(folder, small, tmp_path_factory):
    """For each schedule, a run that nothing disturbed; and what it printed."""
    runs = {}
    for name, flags in SCHEDULES.items():
        runs[name] = tmp_path_factory.mktemp("unbroken") / "run"
        assert run(folder, runs[name], **flags) == 0
    return runs
