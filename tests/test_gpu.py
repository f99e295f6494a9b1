"""Commands on a pretended GPU (pretend_gpu.py): the same numbers as on the CPU, and no more waiting than told.

Each command is given twice, on either device. A real GPU rounds differently; what is tested is that every tensor is
where it must be.
"""
import json
import re
import sys
from functools import partial
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

import eval_gsm8k
import generate
import own_text
import toy_runs
from eval_gsm8k import run_row
from pretend_gpu import WAITS, OnGpu, pretended
from toy_runs import ROOT, Killed, at_step, folder, kill, last, metrics, undisturbed, words

sys.path.insert(0, str(ROOT / "paper"))
import answer_loss
import evaluate
import figure4_token_types
import gate_value
import layerskip
import quantize
import shortgpt
import speculative
import table1_baselines
import testbed

BOTH = "cpu", "cuda"
ABOUT = {"seconds", "device", "command", "settings", "made_with", "versions", "out",     # in files: of one run alone
         "plain_ms", "time", "least", "most", "step", "pass"}
QUESTION = "Tom has 31 red pens and 14 blue pens. Then he gives Ann 9. How many pens does Tom have now?"


def on(device, function, *args):
    """What a function makes of these on the CPU, or on the pretended GPU; there with what it waited for. On both, K and
    V are repeated for each query head, as `attend` does on a GPU."""
    if device == "cpu":
        with mock.patch.object(torch.Tensor, "is_cuda", True):
            return function(*args), {}
    with pretended() as seen:
        return function(*args), dict(seen)


def test_the_pretended_gpu_refuses_what_a_gpu_refuses():
    """A pretence under which nothing could fail."""
    with pretended() as seen:
        x, draw = torch.arange(4.0, device="cuda"), torch.Generator("cuda")
        assert (x.device.type, x[1:].device, (x + 1.0).is_cuda) == ("cuda", x.device, True) and isinstance(x * 2, OnGpu)
        assert torch.equal((x + torch.tensor(1.0)).cpu(), torch.arange(1.0, 5.0))        # a number may be the host's
        for wrong in (lambda: x + torch.ones(4), lambda: torch.stack([x[0], torch.tensor(1.0)]), lambda: x.numpy(),
                      lambda: torch.ones(4)[x.long()], lambda: x @ torch.ones(4), lambda: torch.cat([x, torch.ones(1)]),
                      lambda: torch.rand(2, generator=draw), lambda: torch.where(torch.ones(4) > 0, x, x),
                      lambda: torch.rand(2, device="cuda", generator=torch.Generator()),
                      lambda: x.clone().index_add_(0, torch.tensor([1]), x[:1])):
            with pytest.raises(AssertionError):
                wrong()
        seen.clear()
        assert float(x[2]) == 2.0 and x[x > 1].tolist() == [2.0, 3.0] and x[torch.tensor([1])].there.item() == 1.0
    assert sorted(what for what, _ in seen) == ["_local_scalar_dense", "index", "index from the host", "tolist"]
    w = torch.nn.Linear(3, 2)
    grads = []
    for device in BOTH:
        w.zero_grad()
        x = torch.ones(1, 3)
        (on(device, lambda: w.to(device)(x.to(device)).square().sum())[0]).backward()
        grads.append(getattr(w.weight.grad, "there", w.weight.grad).clone())
    assert torch.equal(*grads) and isinstance(w.weight, OnGpu)


# Training.

TRAININGS = {"global": toy_runs.SCHEDULES["global"], "dense": dict(gate="none"),
             "frozen": dict(distill_weight=0.5, kv="dense", budget_end=0.5, grad_accum=2)}


@pytest.fixture(scope="module")
def runs(folder, tmp_path_factory):
    """A function: (name, device) -> the folder of a training of three steps, and what it waited for."""
    made = {}

    def run(name, device):
        if (name, device) not in made:
            out, flags = tmp_path_factory.mktemp(name) / device, TRAININGS[name] | dict(steps=3, device=device)
            more = ["--checkpoint-activations", "--freeze-backbone", "--teacher", str(folder)] * (name == "frozen")
            code, seen = on(device, partial(toy_runs.run, folder, out, *more, **flags))
            assert code == 0
            made[name, device] = out, seen
        return made[name, device]
    return run


@pytest.mark.parametrize("name", TRAININGS)
def test_training(runs, name):
    """A tensor that stays on the CPU, or the host waiting for more than the metrics of a step and compact's counts."""
    (here, _), (there, seen) = (runs(name, device) for device in BOTH)
    assert metrics(here) == metrics(there)
    assert (last(here) / "model.safetensors").read_bytes() == (last(there) / "model.safetensors").read_bytes()
    assert seen["tolist", "train"] == 3 and not any(seen.get((wait, module), 0) for wait in WAITS for module in
                                                    ("model", "gates", "price", "train", "distill", "linear"))


def test_a_run_goes_on_there(folder, runs, tmp_path, monkeypatch):
    """The optimiser's moments, or the price, left where a checkpoint is read."""
    go = partial(toy_runs.run, folder, tmp_path / "run", **TRAININGS["global"] | dict(steps=3, device="cuda"))
    at_step(monkeypatch, 2, kill)
    with pytest.raises(Killed):
        on("cuda", go)
    undisturbed(monkeypatch)
    assert on("cuda", partial(go, "--resume"))[0] == 0
    files = [last(out) / "model.safetensors" for out in (tmp_path / "run", runs("global", "cpu")[0])]
    assert files[0].read_bytes() == files[1].read_bytes()


# Commands on a trained model.

def commands(model, folder, out):
    """{what: (main, command line)}: each writes into the folder `out`, or prints."""
    ask, short = ["--question", QUESTION], dict(model=model, max_new_tokens=5)
    few, rows = dict(model=model, data="arithmetic", limit=3), out / "rows.json"
    return {
        "generate": (generate.main, words("--show-compute", *ask, budget=0.7, **short)),
        "batch quantile": (generate.main, words(*ask, policy="batch", compute="masked", budget=0.7, **short)),
        "sampling": (generate.main, words(*ask, temperature=0.8, top_k=9, top_p=0.9, **short)),
        "sweep": (eval_gsm8k.main, words("--show-branches", dense=folder, out=out, max_new_tokens=5, **few)),
        "own text": (own_text.main, words(write_with=folder, n=3, max_new_tokens=5, batch_size=2, out=out / "o.jsonl")),
        "loss": (answer_loss.main, words("--policies", "frozen", "random", reference=folder, out=rows, **few)),
        "last word": (evaluate.main, words(selector="batch", model=model, tasks="lambada", data=out.parent, out=rows)),
        "choices": (evaluate.main, words(model=model, tasks="piqa", shots=0, data=out.parent, out=rows)),
        "figure": (figure4_token_types.main, words(model=model, limit=3, out=out / "types.png")),
        "value": (gate_value.main, words(model=model, limit=3, out=out / "value.png")),
        "pruned": (shortgpt.main, words(blocks=1, out=out / "pruned", **few)),
        "drafts": (speculative.main, words(limit=2, new_tokens=5, repeats=1, temperature=0.5, draft_budgets=0.8,
                                           gammas=2, model=model, out=rows)),
    }


def result(x):
    """Of JSON, what does not depend on the run."""
    if isinstance(x, dict):
        return {key: result(value) for key, value in x.items() if key not in ABOUT}
    return [result(y) for y in x] if isinstance(x, list) else x


@pytest.mark.parametrize("what", commands(ROOT, ROOT, ROOT))
def test_command(runs, folder, tmp_path, capsys, what):
    """Prompts, masks, thresholds, noise or counts on the other device; another text or number than on the CPU."""
    made, line = [], lambda row: 2 * (json.dumps(row) + "\n")
    (tmp_path / "piqa_valid.jsonl").write_text(line({"goal": "Tom has", "sol1": "9 pens", "sol2": "red", "label": 0}))
    (tmp_path / "lambada_test.jsonl").write_text(line({"text": "Ann has 9 red pens"}))
    model = runs("global", "cpu")[0]
    capsys.readouterr()                                          # what its training printed, if it is the first to ask
    for device in BOTH:
        (out := tmp_path / device).mkdir()
        main, flags = commands(model, folder, out)[what]
        assert not on(device, main, [*flags, "--device", device])[0]
        printed = re.sub(r"[\d.]+ (s|tokens/s)\b", "", capsys.readouterr().out)
        files = {path.relative_to(out): result(json.loads(path.read_text())) if path.suffix == ".json" else
                 path.read_bytes() for kind in ("json", "jsonl", "safetensors") for path in out.rglob(f"*.{kind}")}
        made.append(files or printed)
    assert made[0] == made[1] and made[0]


def test_four_bits(runs, folder, tmp_path):
    """Packed weights, their levels or scales on the other device."""
    model, four, rows = runs("global", "cpu")[0], tmp_path / "4", []
    quantize.main(words("--double", model=model, kind="nf4", out=four, data="arithmetic", limit=3, device="cpu"))
    for device in BOTH:
        line = words(model=four, reference=folder, data="arithmetic", limit=3, out=tmp_path / device, device=device)
        on(device, answer_loss.main, line)
        rows.append(result(json.loads((tmp_path / device).read_text())))
    assert rows[0] == rows[1]


def test_drafts_of_the_lower_blocks(runs):
    """The exit's states or its cache; the command compares the texts itself."""
    line = words(model=runs("dense", "cpu")[0], exit=1, gammas=2, limit=2, new_tokens=5, repeats=1, device="cuda")
    assert on("cuda", layerskip.main, line)[0] == 0


# The methods that the paper compares with.

@pytest.mark.parametrize("name", [name for name in table1_baselines.METHODS if "routers alone" not in name])
def test_method(folder, tmp_path, monkeypatch, name):
    """States, exits, masks or routers on the other device, in training and while they generate."""
    for where, changes in ((testbed, dict(START=folder, STEPS=2, PROBLEMS=2, CALIBRATION=2)),
                           (table1_baselines, dict(SAVINGS=(0.2,)))):
        for key, value in changes.items():
            monkeypatch.setattr(where, key, value)
    method, rows = table1_baselines.METHODS[name], []
    few = SimpleNamespace(batch_size=2, max_new_tokens=5)
    for device in BOTH:
        out = tmp_path / device
        row_of = lambda name, model, *about: run_row(name, model.to(device), *about[:-1], few)
        monkeypatch.setattr(table1_baselines, "run_row", row_of)
        stages = [[*method.flags.split(), "--device", device]]
        on(device, partial(testbed.trained, stages, 1, out, tried=method.training))
        rows.append(on(device, table1_baselines.sweep, method, out, 1)[0])
    files = [last(tmp_path / device) / "model.safetensors" for device in BOTH]
    assert files[0].read_bytes() == files[1].read_bytes() and rows[0] == rows[1]
