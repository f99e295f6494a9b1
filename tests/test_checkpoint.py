"""Tests of checkpoint.py: opening a run, what a kill or a full disk leaves, resume, the curves."""
import os
import resource
import shutil
import signal
import sys
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import checkpoint
import load_weights
import train
from console import InputError
from gates import budget_at
from load_weights import load_model, load_tokenizer, read_json
from toy_runs import (SCHEDULES, Killed, at_step, ctrl_c, folder, kill, last, metrics, run, same_bits, small, state,
                      unbroken)

pytestmark = pytest.mark.usefixtures("small", "ctrl_c")


# Opening a run.

def test_resume_where_no_run_is(folder, tmp_path):
    """--resume that silently starts from scratch."""
    with pytest.raises(InputError, match="holds no run that has saved"):
        run(folder, tmp_path / "run", "--resume")
    assert not (tmp_path / "run").exists()


def test_a_damaged_train_state_is_told_in_one_line(folder, unbroken, tmp_path):
    """A traceback out of the zip reader."""
    shutil.copytree(unbroken["linear"], tmp_path / "run")
    whole = (last(tmp_path / "run") / "train_state.pt").read_bytes()
    for content in (b"", b"nonsense", whole[:-500]):
        (last(tmp_path / "run") / "train_state.pt").write_bytes(content)
        with pytest.raises(
            InputError, match="train_state.pt is missing or damaged; a new run can start from its weights: --model "
        ):
            run(folder, tmp_path / "run", "--resume", **SCHEDULES["linear"])


def test_resume_with_other_settings_names_both_values(folder, unbroken, tmp_path):
    """Half a run with one learning rate and half with another, which no record shows."""
    shutil.copytree(unbroken["linear"], tmp_path / "run")
    before = state(tmp_path / "run")
    with pytest.raises(
        InputError, match=r"other settings: --lr 0.002 \(was 0.001\), --gate-shared True \(was False\)$"
    ):
        run(folder, tmp_path / "run", "--resume", "--gate-shared", **SCHEDULES["linear"] | dict(lr=2e-3))
    same_bits(state(tmp_path / "run"), before)


def test_out_that_holds_another_run(folder, unbroken, tmp_path):
    """A second run that mixes its files with the first one's; --overwrite that deletes what is no run, or keeps old
    metrics."""
    out = tmp_path / "run"
    shutil.copytree(unbroken["linear"], out)
    with pytest.raises(InputError, match="already holds files: --resume .* --overwrite"):
        run(folder, out)
    same_bits(state(out), state(unbroken["linear"]))
    assert run(folder, out, "--overwrite", steps=1) == 0
    assert len(metrics(out)) == 1 and sorted(p.name for p in out.iterdir()) == [
        "latest",
        "metrics.jsonl",
        "step-000001",
    ]
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.txt").write_text("years of work")
    for switches in ([], ["--overwrite"]):
        with pytest.raises(InputError):
            run(folder, home, *switches)
    assert (home / "thesis.txt").read_text() == "years of work"
    with pytest.raises(InputError, match="is a file"):
        run(folder, home / "thesis.txt", "--overwrite")


def test_overwrite_deletes_neither_strangers_nor_its_own_input(folder, unbroken, tmp_path):
    """A file of the user's that stood in the run's folder, or the very model that the new run was to start from,
    gone."""
    out = tmp_path / "run"
    shutil.copytree(unbroken["linear"], out)
    for flags in (dict(model=out), dict(model=last(out)), dict(data=last(out) / "train.jsonl")):
        with pytest.raises(InputError, match=r"--overwrite would delete --\w+ .* which lies in --out"):
            run(folder, out, "--overwrite", **flags)
    (out / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="also holds thesis.txt"):
        run(folder, out, "--overwrite")
    (out / "thesis.txt").unlink()                                # still there
    same_bits(state(out), state(unbroken["linear"]))


@pytest.mark.parametrize("flags", [dict(data="missing.jsonl"), dict(model="missing"), dict(seq_len=9)])
def test_overwrite_deletes_nothing_before_the_rest_has_loaded(folder, unbroken, tmp_path, flags):
    """A typing error in another flag that costs the old run."""
    shutil.copytree(unbroken["linear"], tmp_path / "run")
    with pytest.raises(InputError):
        run(folder, tmp_path / "run", "--overwrite", **flags)
    same_bits(state(tmp_path / "run"), state(unbroken["linear"]))


@pytest.mark.parametrize(
    "damage, complaint",
    [
        (lambda out: (out / "latest").unlink(), "lost its file `latest`: write step-000006 into it"),
        (
            lambda out: (out / "latest").write_bytes(b"\xff\xfe\0"),
            "which is not there: write the name of a step folder into it",
        ),
        (lambda out: (out / "latest").write_text("step-000002"), "names 'step-000002', which is not there"),
        (lambda out: (last(out) / "train_state.pt").unlink(), "train_state.pt is missing or damaged"),
        (lambda out: torch.save({"a": 1}, last(out) / "train_state.pt"), "train_state.pt is missing or damaged"),
        (lambda out: (out / "metrics.jsonl").unlink(), "has only 0 good lines and the checkpoint is of step 6"),
        (
            lambda out: (out / "metrics.jsonl").write_bytes(b"{}\n{}\n{\xff\n{}\n{}\n{}\n"),
            "has only 2 good lines and the checkpoint is of step 6",
        ),
    ],
)
def test_resume_of_a_damaged_run_says_the_way_out(folder, unbroken, tmp_path, damage, complaint):
    """A traceback, a bare errno, a gap in the metrics that nobody is told of, or advice that deletes a good
    checkpoint."""
    shutil.copytree(unbroken["linear"], tmp_path / "run")
    damage(tmp_path / "run")
    with pytest.raises(InputError) as error:
        run(folder, tmp_path / "run", "--resume", **SCHEDULES["linear"])
    assert complaint in str(error.value) and "\n" not in str(error.value) and "--overwrite" not in str(error.value)


def test_an_optimizer_of_another_model(folder, unbroken, tmp_path):
    """A traceback out of load_state_dict."""
    shutil.copytree(unbroken["linear"], tmp_path / "run")
    stored = torch.load(last(tmp_path / "run") / "train_state.pt", weights_only=True)
    stored["optimizer"]["param_groups"][0]["params"].pop()
    torch.save(stored, last(tmp_path / "run") / "train_state.pt")
    with pytest.raises(InputError, match="is not of this run"):
        run(folder, tmp_path / "run", "--resume", **SCHEDULES["linear"])


def test_curves(unbroken, tmp_path, monkeypatch, capsys):
    """A picture that is never written; a traceback at the end of a run because matplotlib is missing."""
    shutil.copy(unbroken["linear"] / "metrics.jsonl", tmp_path)
    checkpoint.plot_metrics(tmp_path)
    picture = (tmp_path / "metrics.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 10_000
    (tmp_path / "metrics.png").unlink()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    checkpoint.plot_metrics(tmp_path)
    assert (
        capsys.readouterr().out == "no picture: matplotlib is not installed (pip install matplotlib)\n"
        and not (tmp_path / "metrics.png").exists()
    )


# Kill and resume.

@pytest.mark.parametrize("schedule", SCHEDULES)
def test_killed_and_resumed_equals_unbroken(folder, unbroken, tmp_path, monkeypatch, schedule):
    """Data order, budget, learning rate, Adam's moments or metrics that do not continue where the checkpoint was."""
    at_step(monkeypatch, 5, kill)                                # one step and its line of metrics are lost
    with pytest.raises(Killed):
        run(folder, tmp_path / "run", **SCHEDULES[schedule])
    assert len(metrics(tmp_path / "run")) == 5 and last(tmp_path / "run").name == "step-000004"
    monkeypatch.setattr(train, "budget_at", budget_at)
    assert run(folder, tmp_path / "run", "--resume", **SCHEDULES[schedule]) == 0
    same_bits(state(tmp_path / "run"), state(unbroken[schedule]))
    assert [row["step"] for row in metrics(tmp_path / "run")] == list(range(6))


def test_ctrl_c_saves_says_where_and_resumes(folder, unbroken, tmp_path, monkeypatch, capsys):
    """Ctrl-C that loses the steps since the last checkpoint, or a checkpoint that is not what the run would have
    been."""
    at_step(monkeypatch, 2, lambda: os.kill(os.getpid(), signal.SIGINT))
    before = signal.getsignal(signal.SIGINT)
    assert run(folder, tmp_path / "run", **SCHEDULES["linear"]) == 130
    assert f"stopped after step 3; saved in {tmp_path / 'run'}" in capsys.readouterr().out
    assert last(tmp_path / "run").name == "step-000003" and signal.getsignal(signal.SIGINT) is before
    monkeypatch.setattr(train, "budget_at", budget_at)
    assert run(folder, tmp_path / "run", "--resume", **SCHEDULES["linear"]) == 0
    same_bits(state(tmp_path / "run"), state(unbroken["linear"]))


def test_ctrl_c_in_the_last_step_does_not_calibrate(folder, unbroken, tmp_path, monkeypatch, capsys):
    """Ctrl-C that is swallowed, so that the program goes on calibrating; a calibration that --resume then leaves
    out."""
    at_step(monkeypatch, 5, lambda: os.kill(os.getpid(), signal.SIGINT))
    assert run(folder, tmp_path / "run", **SCHEDULES["linear"]) == 130
    assert (
        "calibrating" not in capsys.readouterr().out
        and "thresholds" not in read_json(last(tmp_path / "run") / "config.json")["gateskip"]
    )
    assert run(folder, tmp_path / "run", "--resume", **SCHEDULES["linear"]) == 0
    same_bits(state(tmp_path / "run"), state(unbroken["linear"]))


@pytest.mark.parametrize("limit", [1_000, 200_000])              # bytes: in the weights, in the optimizer state
def test_a_full_disk_loses_nothing(folder, unbroken, tmp_path, monkeypatch, limit):
    """A half-written folder that takes the place of the last checkpoint; a traceback (torch.save raises
    RuntimeError)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    at_step(monkeypatch, 3, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard)))
    try:
        with pytest.raises(OSError, match="step-000004 could not be saved, is the disk full") as error:
            run(folder, tmp_path / "run", **SCHEDULES["linear"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(error.value)
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["latest", "metrics.jsonl", "step-000002"]
    monkeypatch.setattr(train, "budget_at", budget_at)
    assert run(folder, tmp_path / "run", "--resume", **SCHEDULES["linear"]) == 0
    same_bits(state(tmp_path / "run"), state(unbroken["linear"]))


def dying(monkeypatch, instant):
    """From the given instant on, every write fails with Killed: in the middle of a file, or before the operation."""
    seen = []

    def wrap(owner, name, half=None):
        real = getattr(owner, name)

        def operation(*args, **kwargs):
            for step in ("before", "half") if half else ("before",):
                seen.append(name)
                if len(seen) > instant:
                    if step == "half" and len(seen) == instant + 1:
                        half(*args)
                    raise Killed
            return real(*args, **kwargs)
        monkeypatch.setattr(owner, name, operation)

    def half_a_model(model, path, tokenizer):
        path.mkdir()
        (path / "model.safetensors").write_bytes(b"\x00" * 99)

    def half_deleted(path, ignore_errors=False):
        for file in list(Path(path).glob("model.safetensors")):
            file.unlink()

    wrap(checkpoint, "save_model", half_a_model)
    wrap(load_weights, "save_config")
    wrap(torch, "save", lambda obj, path: path.write_bytes(b"PK"))
    wrap(os, "replace")
    wrap(Path, "write_text", lambda path, text, **_: path.open("w").close())
    wrap(shutil, "rmtree", half_deleted)
    return seen


def test_a_kill_at_any_instant_of_saving_leaves_a_good_state(folder, tmp_path, monkeypatch):
    """`latest` written before the folder is whole, an old checkpoint deleted too early, rubbish of a kill that stays
    for ever."""
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    optimizer = torch.optim.AdamW(model.parameters())

    def set_to(value):                                           # weights and optimizer of step `value`
        for p in model.parameters():
            p.data.fill_(value)
            optimizer.state[p] = {
                "step": torch.tensor(float(value)),
                "exp_avg": torch.full_like(p, value),
                "exp_avg_sq": torch.zeros_like(p),
            }

    base, left = tmp_path / "base", set()
    base.mkdir()
    set_to(2)
    checkpoint.save_checkpoint(base, 2, model, tokenizer, optimizer, {})
    (base / "metrics.jsonl").write_text("{}\n" * 4)
    for instant in count():
        out = tmp_path / str(instant)
        shutil.copytree(base, out)
        set_to(4)
        with monkeypatch.context() as m:
            dying(m, instant)
            try:
                checkpoint.save_checkpoint(out, 4, model, tokenizer, optimizer, {})
                break                                            # it never came to this instant
            except Killed:
                pass
        found = checkpoint.open_run(SimpleNamespace(out=out, resume=True), {})
        kept = load_model(out).lm_head.weight
        assert (kept == found["step"]).all() and (found["optimizer"]["state"][0]["exp_avg"] == found["step"]).all()
        assert len((out / "metrics.jsonl").read_text().splitlines()) == found["step"]
        assert not list(out.glob(".*"))
        left.add(found["step"])
        set_to(6)
        checkpoint.save_checkpoint(out, 6, model, tokenizer, optimizer, {})
        assert {p.name for p in out.iterdir()} == {"step-000006", "latest", "metrics.jsonl"}
    assert left == {2, 4} and instant > 10
