"""Tests of shards.py: two ranks on the CPU, started by torchrun, against one process on the same examples.

Most runs of two ranks share one start of torchrun: it runs this file, which calls train.main for each job, in float64.
"""
import ast
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import train
from conftest import complaint
from gates import GateConfig, SkipPolicy
from load_weights import load_model, save_model
from test_imports import OURS, imports, tree_of
from toy_runs import (FLAGS, Killed, ROOT, at_step, folder, kill, last, metrics, run, same_bits, state, toy,
                      undisturbed, words)

STEPS = dict(FLAGS, steps=8, batch_size=4, save_every=4)
GLOBAL = dict(STEPS, gate="scalar", threshold="global", schedule="uniform", budget_end=0.7, sparsity_cost="macs",
              gate_lr_scale=10)
ALL_RUN = dict(STEPS, steps=4, compute="compact", schedule="uniform", budget_end=1.0)
JOBS = {                                                         # name: flags, switches
    "compact": (dict(GLOBAL, compute="compact"), []), "masked": (dict(GLOBAL, grad_accum=2, batch_size=2), []),
    "Gemma 2": (dict(GLOBAL, compute="compact", gate="vector"), []),
    "two then one": (dict(GLOBAL, compute="compact"), []), "one then two": (dict(GLOBAL, compute="compact"), []),
    "skips": (ALL_RUN, []), "skips, frozen": (ALL_RUN, ["--freeze-backbone", "--checkpoint-activations"])}
BROKEN_AT = 6                                                    # two steps after the save


def of(folder, name):
    """The model that a job begins with: the Llama, or beside it the Gemma 2."""
    return folder.with_name("gemma") if name == "Gemma 2" else folder


def torchrun(*command, **how):
    """Two ranks of a program; a new port for each, and no thread more than the machine may have for this."""
    return subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
                             *map(str, command)], cwd=ROOT, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **how)


def skip_for_some(setattr, mine):
    """Nobody's own choice: attention and MLP of layer 1 for every second example, attention of layer 0 for the
    others. mine: the row's place in the step -> its rank, on which that is all or nothing."""
    def keep(self, branch, scores, valid):
        second = mine(torch.arange(len(valid))) == 1             # (B,)
        return valid & ~{0: ~second, 2: second, 3: second}.get(branch, second & False)[:, None]
    setattr(SkipPolicy, "keep", keep)


def in_float64(setattr):
    setattr(train, "pick_device", lambda name, *_: (torch.device(name), torch.float64))
    setattr(train, "finish", lambda *_: None)
    setattr(train, "plot_metrics", lambda _: None)


def one_rank(monkeypatch, folder, out, name, broken=False):
    flags, switches = JOBS[name]
    with monkeypatch.context() as m:
        in_float64(m.setattr)
        if "skips" in name:
            skip_for_some(m.setattr, lambda row: row % 2)
        if broken:
            at_step(m, BROKEN_AT, kill)
            with pytest.raises(Killed):
                run(folder, out, *switches, **flags)
        else:
            assert run(of(folder, name), out, *switches, **flags) == 0
    return out


@pytest.fixture(scope="module")
def pair(folder, tmp_path_factory):
    """A folder with the run of each job on two ranks; "two then one" is broken off, "one then two" resumed."""
    base = tmp_path_factory.mktemp("pair")
    torch.manual_seed(1)
    model, tokenizer = toy(of(folder, "Gemma 2"), architectures=["Gemma2ForCausalLM"], model_type="gemma2",
                           hidden_act="gelu_pytorch_tanh", sliding_window=16, query_pre_attn_scalar=12)
    save_model(model, of(folder, "Gemma 2"), tokenizer)
    with pytest.MonkeyPatch.context() as m:
        one_rank(m, folder, base / "one then two", "one then two", broken=True)
    process = torchrun(__file__, folder, base)
    try:
        output, errors = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 0, errors[-3000:]
    return base


def close(a, b):
    """Two runs whose numbers differ by rounding only, in every line, weight and moment."""
    for x, y in zip(metrics(a), metrics(b), strict=True):
        assert x.keys() == y.keys() and all(x[key] == pytest.approx(y[key], abs=1e-5) for key in x), (x, y)
    a, b = state(a), state(b)
    assert a["weights"].keys() == b["weights"].keys() and a["files"] == b["files"] and a["config"] == b["config"]
    for key, p in a["weights"].items():
        assert (p - b["weights"][key]).abs().max() < 1e-5, key
    a, b = a["train"], b["train"]
    same_bits(*({key: x[key] for key in ("step", "settings", "rng")} for x in (a, b)))
    same_bits(a["optimizer"]["param_groups"], b["optimizer"]["param_groups"])
    for i, entry in a["optimizer"]["state"].items():
        for key, x in entry.items():
            assert (x - b["optimizer"]["state"][i][key]).abs().max() < 1e-6, (i, key)
    if a["quantile"] is not None:
        assert (a["quantile"] - b["quantile"]).abs().max() < 1e-6


@pytest.mark.parametrize("name", ["compact", "masked", "Gemma 2"])
def test_two_ranks_are_one(pair, folder, tmp_path, monkeypatch, name):
    """A mean over the ranks for a sum, a price or a norm of one rank's own, a shard that is lost on the way to disk."""
    close(pair / name, one_rank(monkeypatch, folder, tmp_path / "run", name))
    rows = metrics(pair / name)
    assert len(rows) == 8 and max(row["skipped"] for row in rows) > 0.1


@pytest.mark.parametrize("name", ["skips", "skips, frozen"])
def test_a_branch_that_one_rank_skips(pair, folder, tmp_path, monkeypatch, name):
    """Ranks that reduce different gradients: a branch, and a whole block, that nobody passes on one of them."""
    close(pair / name, one_rank(monkeypatch, folder, tmp_path / "run", name))
    assert metrics(pair / name)[0]["skipped"] == pytest.approx(3 / 8, abs=0.05)


def test_resume_on_another_number_of_ranks(pair, folder, tmp_path, monkeypatch):
    """Moments of the wrong part of a weight, or of none; a piece saved for the whole."""
    whole = one_rank(monkeypatch, folder, tmp_path / "run", "compact")
    close(pair / "one then two", whole)
    assert last(pair / "two then one").name == "step-000004"
    JOBS["rest"] = (JOBS["compact"][0], ["--resume"])
    close(one_rank(monkeypatch, folder, pair / "two then one", "rest"), whole)


# Runs of the command itself.

def command(folder, out, **flags):
    return ["train.py", *words(**{**GLOBAL, "model": folder, "out": out, "steps": 300, **flags})]


def ended(process):
    """(exit code, what was printed, the lines that are ours of what else was said)"""
    try:
        output, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert 'train.py", line' not in errors and 'shards.py", line' not in errors, errors[-3000:]
    return process.returncode, output, re.findall(r"^(?:error|interrupted).*$", errors, re.M)


def wait_for(process, happened):
    until = time.monotonic() + 120
    while not happened():
        assert process.poll() is None and time.monotonic() < until, process.communicate(timeout=60)
        time.sleep(0.05)


def goes_on(folder, out, monkeypatch):
    """The last checkpoint of a broken run loads, and one rank goes on from it."""
    step = int(last(out).name[5:])
    assert load_model(out).config.gate == GateConfig(form="scalar")
    at_step(monkeypatch, step + 2, kill)
    with pytest.raises(Killed):
        run(folder, out, "--resume", **{**GLOBAL, "steps": 300})
    undisturbed(monkeypatch)
    assert [row["step"] for row in metrics(out)] == list(range(step + 2))
    return step


def test_a_rank_dies(folder, tmp_path, monkeypatch):
    """Ranks that wait for ever, a page of traceback from each, a checkpoint that is half of one."""
    out = tmp_path / "run"
    process = torchrun(*command(folder, out, save_every=2))
    wait_for(process, lambda: (out / "latest").exists() and last(out).name > "step-000002")
    ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    second = next(pid for pid in ranks if b"\0RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes())
    os.kill(int(second), signal.SIGKILL)
    code, _, lines = ended(process)
    assert code != 0 and len(lines) == 1 and "another rank has died" in lines[0] and "--resume" in lines[0]
    assert goes_on(folder, out, monkeypatch) >= 4


def test_a_signal_reaches_all(folder, tmp_path, monkeypatch):
    """One rank that leaves a step before the other; a run that ends without a save."""
    out = tmp_path / "run"
    process = torchrun(*command(folder, out, save_every=300))
    wait_for(process, lambda: (out / "metrics.jsonl").exists() and len(metrics(out)) > 2)
    process.terminate()
    code, output, lines = ended(process)
    assert code != 0 and lines == [] and output.count("stopped after step") == 1
    assert f"stopped after step {goes_on(folder, out, monkeypatch)};" in output


def test_examples_that_cannot_be_shared(folder, tmp_path):
    """A rank without an example, and the line once per rank."""
    code, _, lines = ended(torchrun(*command(folder, tmp_path / "run", batch_size=1)))
    assert code != 0 and not (tmp_path / "run").exists()
    assert len(lines) == 1 and "--batch-size 1" in lines[0] and "multiple of 2" in lines[0]


def test_flags_of_several_ranks(monkeypatch, request):
    """A flag that several ranks cannot follow, and that only hours later says so."""
    from shards import Ranks
    monkeypatch.setenv("LOCAL_RANK", "1")
    loads = torch.utils.serialization.config.load                # Ranks sets its mmap for the process; monkeypatch
    request.addfinalizer(lambda was=loads.mmap: setattr(loads, "mmap", was))     # would delete it, for good
    device = lambda **flags: Ranks(1, 2).device(train.parse_args(words(data="arithmetic", **flags)))
    assert (device(device="cpu"), device(device="cuda")) == ("cpu", "cuda:1")
    assert "--device cuda:1" in complaint(device, device="cuda:1")
    monkeypatch.setattr("combinations.check_compiler", lambda: None)
    parsed = train.parse_args(["--data", "arithmetic", "--compile"])
    assert "--compile" in complaint(Ranks(1, 2).device, parsed)


def test_a_plain_run_knows_nothing_of_it():
    """torch.distributed, imported where one process trains."""
    for name in OURS - {"shards"}:
        tree = tree_of(name)
        assert not any("distributed" in str(getattr(node, "module", "")) for node in ast.walk(tree)), name
        if name == "train":                                      # the last statement, which asks for torchrun
            assert "shards" in imports(ast.Module([tree.body.pop()], []))
        assert "shards" not in imports(tree, everywhere=True), name


def on_this_rank(folder, base):
    """Every job, one after another, as one of the two ranks."""
    import torch.distributed as dist
    from shards import Ranks
    dist.init_process_group("gloo")
    ranks = Ranks(dist.get_rank(), 2)
    Ranks.leave = lambda self, optimizer: None                   # the next job needs the others
    in_float64(setattr)
    real = SkipPolicy.keep, train.budget_at
    for name, (flags, switches) in JOBS.items():
        SkipPolicy.keep, train.budget_at = real
        if "skips" in name:
            skip_for_some(setattr, lambda row: torch.full_like(row, ranks.rank))
        if name == "two then one":
            train.budget_at = lambda step, *rest: kill() if step == BROKEN_AT else real[1](step, *rest)
        resume = ["--resume"] if name == "one then two" else []
        try:
            model = of(Path(folder), name)
            train.main(words(*switches, *resume, **{**flags, "model": model, "out": Path(base) / name}), ranks)
        except Killed:
            dist.barrier()


if __name__ == "__main__":
    on_this_rank(*sys.argv[1:])
