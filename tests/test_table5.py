"""Tests of paper/testbed.py and paper/table5_ablations.py: what is tried, the views, what is kept, the tables."""
import json
import math
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch

import train
from conftest import complaint
from disk import only_one
from gates import SkipPolicy
from toy_runs import ROOT, folder, words

sys.path.insert(0, str(ROOT / "paper"))
import study
import table5_ablations as table5
import testbed


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# What is tried in training.

def test_random_skipping_is_what_training_gets():
    """A policy that still ranks, or that asks a dense model for gates."""
    with testbed.random_skipping():
        policy = train.SkipPolicy("none", 0.5, "all", "dense")
    assert (policy.kind, policy.budget, policy.kv) == ("random", 0.5, "dense") and policy.generator is not None
    assert train.SkipPolicy is SkipPolicy


def test_the_ramp_ends_at_half_of_the_steps():
    """The deepest budget from the first step on, or a ramp that never gets there."""
    with testbed.ramp():
        lowest = [train.budget_at(step, 101, 1.0, 0.4, "linear", 0) for step in range(101)]
        drawn = [train.budget_at(step, 101, 1.0, 0.4, "uniform", 0) for step in range(101)]
    assert lowest[0] == 1.0 and lowest[-1] == pytest.approx(0.4)
    assert all(b >= 1.0 - 0.6 * min(1.0, step / 50) - 1e-9 for step, b in enumerate(drawn)) and min(drawn[50:]) < 0.45


def test_the_last_step_stands_alone():
    """An average that still knows older steps, or the core's own changed for good."""
    with testbed.last_step():
        quantile = train.RunningQuantile([1.0, 1.0])
    valid = torch.ones(50, dtype=torch.bool)
    quantile.update(torch.rand(2, 50), valid)
    quantile.update(torch.full((2, 50), 0.25), valid)
    assert (quantile.points == 0.25).all() and train.RunningQuantile is not testbed.LastStep


def test_nobody_skips_in_the_warm_up():
    """A warm-up that is a step too short or too long, or an average after it."""
    with testbed.patient():
        quantile = train.RunningQuantile([1.0, 1.0])
    quantile.update(torch.rand(2, 50), torch.ones(50, dtype=torch.bool))
    kinds = [quantile.policy(0.5, "all", "copy_up").kind for _ in range(52)]
    assert kinds == ["none"] * 50 + ["frozen"] * 2


# Views.

def test_allocation_runs_each_branch_its_share():
    """Shares of the wrong branch or part, one share for all, or the same tokens every time."""
    shares = {"prompt": [0.25, 0.75], "answer": [1.0, 0.0]}
    policy = testbed.Allocation("random", 0.5, masks=shares, generator=generator())
    valid = torch.ones(4, 50, dtype=torch.bool)
    for branch, share in enumerate(shares["prompt"]):
        kept = [policy.keep(branch, None, valid) for _ in range(40)]
        assert torch.stack(kept).double().mean().item() == pytest.approx(share, abs=0.01)
        assert (kept[0] != kept[1]).any()
    one = torch.ones(4, 1, dtype=torch.bool)
    assert policy.keep(0, None, one).all() and not policy.keep(1, None, one).any()


def test_the_first_of_a_prompt_is_kept():
    """Padding in place of the first token, a first that is lost, or every token of a step that generates."""
    policy = testbed.FirstKept("random", 0.5, generator=generator())
    valid = torch.tensor([[False, False] + [True] * 8, [True] * 10])
    kept = torch.stack([policy.keep(0, None, valid) for _ in range(200)])        # (200, B, S)
    assert kept[:, 0, 2].all() and kept[:, 1, 0].all() and not kept[:, 0, :2].any()
    assert not kept[:, 1, 1].all() and kept[:, 1, 1].any()
    assert not torch.stack([policy.keep(0, None, torch.ones(2, 1, dtype=torch.bool)) for _ in range(50)]).all()


# From a training to the tables.

@pytest.fixture
def small(monkeypatch, tmp_path, folder):
    """A study of a toy, of two steps and three problems."""
    for name, value in dict(START=folder, STEPS=2, PROBLEMS=3, CALIBRATION=4, BUDGETS=(1.0, 0.7)).items():
        monkeypatch.setattr(testbed, name, value)
    for name in ("WORK", "RESULTS"):
        (tmp_path / name).mkdir()
        monkeypatch.setattr(study, name, tmp_path / name)
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    return tmp_path


@pytest.mark.parametrize("name", ["dense", "dense, trained with random skipping", "paper", "ours", "ours, gates first",
                                  "paper, K and V dense", "ours, from the tuned model, its pupil"])
def test_a_model_is_trained_and_measured(small, name):
    """A view that cannot run, a stage that begins anew, a folder that stays, flags that train.py refuses."""
    model = table5.models()[name]
    if any("{}" in flags for flags in model.stages):
        assert table5.one(table5.TUNED, 1, 1) is None and testbed.finished(table5.study.folder_of(table5.TUNED, 1))
    entry = table5.one(name, 1, 1)
    assert {r["row"] for r in entry["rows"]} == set(model.views) and entry["flags"] == model.stages
    assert [r["budget"] for r in entry["rows"]] == [
        b for view in model.views.values() for b in ((1.0,) if view == "none" else (1.0, 0.7))]
    assert all(r["n"] == 3 and 0.0 <= r["skipped"] < 1.0 and set(r["answer"]) == {"skipped", "macs_saved"}
               for r in entry["rows"])
    left = {path.name for path in study.WORK.iterdir() if path.is_dir()}
    assert left == ({"tuned-s1"} if name == "dense" or any("{}" in flags for flags in model.stages) else set())


def test_every_row_is_a_command_that_train_takes():
    """A flag of a row that no longer exists; and two rows of one name."""
    models = table5.models()
    for model in models.values():
        for flags in model.stages:
            train.parse_args(["--preset", "tiny", *flags.replace("{}", "examples/tiny-llama").split()])
    rows = [row for model in models.values() for row in model.views]
    assert len(rows) == len(set(rows)) and all(len(set(m.views.values())) == len(m.views) for m in models.values())


def entry(model, seed, points, row=None):
    return {"model": model, "seed": seed, "rows": [
        {"row": row or model, "view": "frozen", "budget": 1 - x, "accuracy": y, "n": 10, "skipped": x,
         "macs_saved": x / 2, "answer": {"skipped": x, "macs_saved": x}} for x, y in points]}


def test_results_are_kept_and_never_run_again(small, monkeypatch):
    """An entry lost, twice, or trained again; what others begin with not made first; another's file overwritten."""
    table5_keep = lambda *entry_of: study.keep("table5.json", entry(*entry_of))
    table5_keep("paper", 1, [(0.0, 1.0)])
    table5_keep("ours", 2, [(0.0, 0.5)])
    table5_keep("paper", 1, [(0.0, 0.9)])
    assert [(r["model"], r["seed"]) for r in study.entries("table5.json")] == [("ours", 2), ("paper", 1)]
    asked = []
    monkeypatch.setattr(table5, "one", lambda name, seed, threads: asked.append((name, seed)) or (
        None if name == table5.TUNED else entry(name, seed, [])))
    monkeypatch.setattr(study, "ProcessPoolExecutor", lambda jobs, context, max_tasks_per_child: Here())
    table5.main(words("--rows", "ours, teacher", "paper", "--seeds", "1", "2"))
    assert asked == [("tuned", 1), ("tuned", 2), ("paper", 2), ("ours, teacher", 1), ("ours, teacher", 2)]
    assert len(study.entries("table5.json")) == 5
    (study.RESULTS / "table5.json").write_text('{"rows": 1}')
    assert "move it away" in complaint(lambda: table5_keep("paper", 3, []))
    assert json.loads((study.RESULTS / "table5.json").read_text()) == {"rows": 1}


@pytest.mark.parametrize("wrong", [
    1, {"model": "ours"}, {"model": 1, "seed": 1, "rows": []}, {"model": "ours", "seed": "1", "rows": []},
    {"model": "ours", "seed": 1}, {"model": "ours", "seed": 1, "rows": {}}, {"model": "ours", "seed": 1, "rows": [1]},
    *(entry("ours", 1, [(0.0, accuracy)]) for accuracy in ("1", float("nan"), True, -5, 10 ** 400)),
    {"model": "ours", "seed": 1, "rows": [{"row": "ours", "accuracy": 1, "skipped": 0, "macs_saved": 0}]}])
def test_an_entry_that_is_none_of_ours(small, wrong):
    """A traceback of the first table that meets it, hours after a file was merged by hand."""
    held = json.dumps({"runs": [entry("paper", 1, [(0.0, 1.0)]), wrong]})
    (study.RESULTS / "table5.json").write_text(held)
    for command in (["--from-results"], ["--rows", "paper", "--seeds", "1"]):
        assert "table5.json: entry 2 is not as this program writes it" in complaint(table5.main, command)
    assert (study.RESULTS / "table5.json").read_text() == held


def test_a_seed_counts_once(small):
    """Two seeds and half the deviation, of one training that a merge by hand left twice."""
    (study.RESULTS / "table5.json").write_text(json.dumps({"runs": [entry("paper", 1, [(0.0, 1.0)])] * 2}))
    assert "entry 2 is seed 1 of 'paper' once more" in complaint(table5.main, ["--from-results"])


JOBS = """
import time
from pathlib import Path

def one(name, seed, threads):
    Path(name).touch()
    if name == "fails":
        raise ValueError("of no account")
    while not Path("fails").exists():
        time.sleep(0.01)
    time.sleep(0.5)                                              # until the failure has been told
    return {"model": name, "seed": seed, "rows": []}
"""


def test_a_failure_costs_no_result_and_begins_nothing(small, monkeypatch):
    """Minutes of a training beside the one that failed, thrown away; one that begins after it, for nothing."""
    (small / "jobs_of_a_study.py").write_text(JOBS)
    monkeypatch.syspath_prepend(small)
    monkeypatch.chdir(small)
    from jobs_of_a_study import one
    with pytest.raises(ValueError, match="of no account"):
        study.study("table5.json", [[("fails", 1), ("lasts", 1), ("waits", 1), ("waits", 2)], [("later", 1)]], one, 2)
    assert [r["model"] for r in study.entries("table5.json")] == ["lasts"]
    assert (small / "lasts").exists() and not (small / "waits").exists() and not (small / "later").exists()


DIVERGES = """
from console import InputError

def one(name, seed, threads):
    if name == "diverges":
        raise InputError("the loss is nan")
    return {"model": name, "seed": seed, "rows": []}
"""


def test_a_training_that_diverges_does_not_end_the_study(small, monkeypatch, capsys):
    """One of a hundred that is in the way of all others for good, under a message that does not say which."""
    (small / "one_that_diverges.py").write_text(DIVERGES)
    monkeypatch.syspath_prepend(small)
    from one_that_diverges import one
    for _ in range(2):
        told = complaint(lambda: study.study("table5.json", [[("diverges", 3), ("lasts", 1)], [("later", 1)]], one, 1))
        assert "1 of the models could not be had ('diverges', seed 3: the loss is nan); the others are kept" in told
        assert [r["model"] for r in study.entries("table5.json")] == ["lasts", "later"]
    assert "failed: 'diverges', seed 3: the loss is nan" in capsys.readouterr().err


def test_results_that_are_damaged_meanwhile_end_the_study(small, monkeypatch, capsys):
    """A merge by hand while the study runs: all that follows trained, thrown away, and called kept."""
    asked, file = [], study.RESULTS / "table5.json"
    monkeypatch.setattr(study, "ProcessPoolExecutor", lambda jobs, context, max_tasks_per_child: Here())

    def one(name, seed, threads):
        asked.append(name)
        file.write_text("<<<<<<<")
        return entry(name, seed, [])
    told = complaint(lambda: study.study("table5.json", [[("a", 1), ("b", 1)]], one, 1))
    assert asked == ["a"] and str(file) in told and "add the entry that is printed above" in told
    assert json.dumps(entry("a", 1, [])) in capsys.readouterr().err and file.read_text() == "<<<<<<<"


def test_one_study_at_a_time(small):
    """Two that train into one folder, and remove it under each other."""
    with only_one(study.WORK):
        assert "wait for it, or choose another folder" in complaint(
            lambda: study.study("table5.json", [[("paper", 1)]], None, 1))


def test_what_cannot_be_kept_is_not_begun(small, monkeypatch):
    """Minutes of training whose result nobody can write."""
    monkeypatch.setattr(study, "RESULTS", small / "a file")
    study.RESULTS.touch()
    with pytest.raises(OSError):
        study.study("table5.json", [[("paper", 1)]], None, 1)


ENDLESS = """
import os, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import study
from console import run

def one(name, seed, threads):
    Path("pid.tmp").write_text(str(os.getpid()))
    Path("pid.tmp").rename("pid")
    time.sleep(600)

if __name__ == "__main__":
    study.RESULTS = Path("results")
    run(lambda: study.study("table5.json", [[("endless", 1), ("waits", 1)]], one, 1))
"""


def test_a_worker_ends_with_its_study(tmp_path):
    """A killed study's training that goes on, in the way of the next, for a result that nobody waits for."""
    (tmp_path / "endless.py").write_text(ENDLESS)
    with subprocess.Popen([sys.executable, "endless.py", str(ROOT / "paper")], cwd=tmp_path, stderr=subprocess.DEVNULL,
                          env=os.environ | {"PYTHONPATH": str(tmp_path)}) as parent:
        try:
            within(120, (tmp_path / "pid").exists)
        finally:
            parent.kill()
    within(30, lambda: not alive(int((tmp_path / "pid").read_text())))


@pytest.mark.parametrize("when", ("imports", "works"))
def test_ctrl_c_is_told_once(tmp_path, when):
    """A traceback of a worker that still imports, between the bar and what the study says."""
    (tmp_path / "endless.py").write_text(ENDLESS)
    with subprocess.Popen([sys.executable, "endless.py", str(ROOT / "paper")], cwd=tmp_path, stderr=subprocess.PIPE,
                          env=os.environ | {"PYTHONPATH": str(tmp_path)}, start_new_session=True) as parent:
        try:
            within(120, lambda: "spawn_main" in commands_below(parent.pid) and (
                when == "imports" or (tmp_path / "pid").exists()))
            os.killpg(parent.pid, signal.SIGINT)
            said = parent.communicate(timeout=120)[1].decode()
        finally:
            parent.kill()
    assert parent.returncode == 130 and "waiting for what still runs (1)" in said and "Traceback" not in said


def commands_below(pid):
    """The command lines of a process's children."""
    try:
        return "".join(Path(f"/proc/{child}/cmdline").read_text()
                       for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
    except FileNotFoundError:                                    # one that has ended meanwhile
        return ""


def within(seconds, true):
    """Wait until it is."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


def alive(pid):
    """Whether a process runs; one that ended and that nobody has asked after yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] not in "ZX"
    except FileNotFoundError:
        return False


class Here:
    """A pool that works in this process."""
    def __enter__(self):
        return self

    def __exit__(self, *args):
        pass

    def submit(self, function, *args):
        done = Future()
        done.set_result(function(*args))
        return done

    shutdown = lambda self, **how: None


def test_the_table_reads_each_seed_at_exact_savings(small, capsys):
    """A mean of points at different savings, a value outside of what a seed measured, rows or seeds mixed up."""
    for name, seed, points in (("paper", 1, [(0.0, 1.0), (0.2, 0.8)]), ("ours", 1, [(0.0, 1.0)]),
                               ("paper", 2, [(0.0, 0.9), (0.4, 0.5)]), ("ours", 2, [(0.0, 1.0)])):
        study.keep("table5.json", entry(name, seed, points))
    assert table5.main(["--from-results"]) is None
    printed = capsys.readouterr().out
    skipped, macs = (line for line in printed.splitlines() if line.startswith("| paper |"))
    cells = [cell.strip() for cell in skipped.split("|")[2:-1]]
    sd = lambda a, b: abs(a - b) / math.sqrt(2)
    assert cells[:3] == ["2", f"95.0±{sd(100, 90):.1f} (0)", f"90.0±{sd(95, 85):.1f} (2)"]
    assert cells[3] == f"85.0±{sd(90, 80):.1f} (5)"
    assert cells[5:] == [f"75.0±{sd(80, 70):.1f} (10)", "-", "-", "-", "-"]
    assert [cell.strip() for cell in macs.split("|")[2:-1]][3] == f"75.0±{sd(80, 70):.1f}"


def test_what_is_asked_for_is_checked(small):
    """A row that does not exist, found out after hours; tables of nothing."""
    assert "--rows 'nothing'" in complaint(lambda: table5.main(words("--rows", "nothing")))
    assert "leave out --from-results" in complaint(lambda: table5.main(["--from-results"]))
