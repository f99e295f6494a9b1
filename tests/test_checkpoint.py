"""Tests of checkpoint.py, a run on disk: saved, resumed, killed, interrupted, damaged, overwritten; metrics and curves.

The model is a two-layer Llama of width 32 on the built-in problems; a run of a few steps takes half a second.
"""
import json
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
from checkpoint import RUN_FILES, metrics_lines, open_run, plot_metrics, save_checkpoint
from console import InputError
from load_weights import load_model, load_tokenizer, read_json
from toy_runs import (SCHEDULES, Killed, at_step, folder, kill, last, metrics, run, same_bits, state, unbroken,
                      undisturbed)


# What a run leaves.

def test_files_of_a_run(unbroken):
    """An older step that is left behind, or a file that --overwrite would take for a stranger's."""
    out = unbroken["linear"]
    assert sorted(p.name for p in out.iterdir()) == ["latest", "metrics.jsonl", "step-000006"]
    assert (out / "latest").read_text() == "step-000006\n"
    assert sorted(p.name for p in last(out).iterdir()) == ["config.json", "model.safetensors", "tokenizer.json",
                                                           "train_state.pt"]
    assert all(p.name.startswith(RUN_FILES) for p in out.iterdir())


@pytest.mark.parametrize("content, good", [
    (None, 0), (b"", 0), (b"{}\n", 1), (b'{"a": 1}\n{"a": 2}\n{"a"', 2), (b"{}\nnone\n{}\n", 1), (b"{}\n\xff\n", 1)])
def test_metrics_end_at_the_first_damaged_line(tmp_path, content, good):
    """A half-written last line that stops a resume with a traceback, or a gap in the middle that is jumped over."""
    if content is not None:
        (tmp_path / "metrics.jsonl").write_bytes(content)
    lines = metrics_lines(tmp_path)
    assert len(lines) == good and all(isinstance(json.loads(line), dict) for line in lines)


def drawn(monkeypatch, out):
    """{title: {label: ([steps], [values])}} of the curves that plot_metrics(out) draws."""
    plt, seen = checkpoint.pyplot(), {}
    monkeypatch.setattr(plt, "close", lambda figure: seen.update({axis.get_title(): {
        line.get_label(): tuple(map(list, line.get_data())) for line in axis.lines} for axis in figure.axes}))
    monkeypatch.setattr(checkpoint, "pyplot", lambda: plt)
    plot_metrics(out)
    return seen


def test_curves(unbroken, tmp_path, monkeypatch, capsys):
    """A picture that is never written; a traceback at the end of a run because matplotlib is missing."""
    shutil.copy(unbroken["linear"] / "metrics.jsonl", tmp_path)
    plot_metrics(tmp_path)
    picture = (tmp_path / "metrics.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 10_000
    (tmp_path / "metrics.png").unlink()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    plot_metrics(tmp_path)
    assert capsys.readouterr().out == "no picture: matplotlib is not installed (pip install matplotlib)\n"
    assert not (tmp_path / "metrics.png").exists()


def test_what_the_curves_show(unbroken, tmp_path, monkeypatch):
    """A curve under another's name, skipped drawn for kept, a crash where a run had no gates or left half a line."""
    rows = metrics(unbroken["uniform"])
    lines = [json.dumps({k: v for k, v in row.items() if k != "gate_mean" or row["step"] > 2}) for row in rows]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, "{"]))
    steps, column = list(range(6)), lambda key: (list(range(6)), [row[key] for row in rows])
    assert drawn(monkeypatch, tmp_path) == {
        "loss": {"loss": column("loss"), "cross-entropy": column("ce")},
        "mean gate": {"gate mean": ([3, 4, 5], [row["gate_mean"] for row in rows[3:]])},
        "share of (token, branch) pairs": {"budget": column("budget"),
                                           "kept": (steps, [1 - row["skipped"] for row in rows])}}


# Killed, interrupted, out of space.

@pytest.mark.parametrize("schedule", SCHEDULES)
def test_killed_and_resumed_equals_unbroken(folder, unbroken, tmp_path, monkeypatch, schedule):
    """Data order, budget, learning rate, Adam's moments or metrics that do not continue where the checkpoint was."""
    at_step(monkeypatch, 5, kill)                                # one step and its line of metrics are lost
    with pytest.raises(Killed):
        run(folder, tmp_path / "run", **SCHEDULES[schedule])
    assert len(metrics(tmp_path / "run")) == 5 and last(tmp_path / "run").name == "step-000004"
    undisturbed(monkeypatch)
    assert run(folder, tmp_path / "run", "--resume", **SCHEDULES[schedule]) == 0
    same_bits(state(tmp_path / "run"), state(unbroken[schedule]))
    assert [row["step"] for row in metrics(tmp_path / "run")] == list(range(6))


def test_ctrl_c_saves_says_where_and_resumes(folder, unbroken, tmp_path, monkeypatch, capsys):
    """Ctrl-C that loses the steps since the last checkpoint, or saves another state than the run's own."""
    at_step(monkeypatch, 2, lambda: os.kill(os.getpid(), signal.SIGINT))
    before = signal.getsignal(signal.SIGINT)
    assert run(folder, tmp_path / "run", **SCHEDULES["linear"]) == 130
    assert f"stopped after step 3; saved in {tmp_path / 'run'}" in capsys.readouterr().out
    assert last(tmp_path / "run").name == "step-000003" and signal.getsignal(signal.SIGINT) is before
    undisturbed(monkeypatch)
    assert run(folder, tmp_path / "run", "--resume", **SCHEDULES["linear"]) == 0
    same_bits(state(tmp_path / "run"), state(unbroken["linear"]))


def test_ctrl_c_in_the_last_step_does_not_calibrate(folder, unbroken, tmp_path, monkeypatch, capsys):
    """Ctrl-C that is swallowed, so that the program calibrates; a calibration that --resume then leaves out."""
    at_step(monkeypatch, 5, lambda: os.kill(os.getpid(), signal.SIGINT))
    assert run(folder, tmp_path / "run", **SCHEDULES["linear"]) == 130
    assert "calibrating" not in capsys.readouterr().out
    assert "thresholds" not in read_json(last(tmp_path / "run") / "config.json")["gateskip"]
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


def test_a_kill_at_any_instant_of_saving_leaves_a_good_state(folder, tmp_path, monkeypatch):
    """`latest` written before the folder is whole, an old checkpoint deleted too early, rubbish that stays for ever."""
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    optimizer = torch.optim.AdamW(model.parameters())

    def set_to(value):                                           # weights and optimizer of step `value`
        for p in model.parameters():
            p.data.fill_(value)
            optimizer.state[p] = {"step": torch.tensor(float(value)), "exp_avg": torch.full_like(p, value),
                                  "exp_avg_sq": torch.zeros_like(p)}

    base, left = tmp_path / "base", set()
    base.mkdir()
    set_to(2)
    save_checkpoint(base, 2, model, tokenizer, optimizer, {})
    (base / "metrics.jsonl").write_text("{}\n" * 4)
    for instant in count():
        out = tmp_path / str(instant)
        shutil.copytree(base, out)
        set_to(4)
        with monkeypatch.context() as m:
            dying(m, instant)
            try:
                save_checkpoint(out, 4, model, tokenizer, optimizer, {})
                break                                            # it never came to this instant
            except Killed:
                pass
        found = open_run(SimpleNamespace(out=out, resume=True), {})
        kept = load_model(out).lm_head.weight
        assert (kept == found["step"]).all() and (found["optimizer"]["state"][0]["exp_avg"] == found["step"]).all()
        assert len((out / "metrics.jsonl").read_text().splitlines()) == found["step"]
        assert not list(out.glob(".*"))
        left.add(found["step"])
        set_to(6)
        save_checkpoint(out, 6, model, tokenizer, optimizer, {})
        assert {p.name for p in out.iterdir()} == {"step-000006", "latest", "metrics.jsonl"}
    assert left == {2, 4} and instant > 10


@pytest.mark.parametrize("limit", [1_000, 200_000])              # bytes: in the weights, in the optimizer state
def test_a_full_disk_loses_nothing(folder, unbroken, tmp_path, monkeypatch, limit):
    """A half-written folder in the place of the last checkpoint; a traceback (torch.save raises RuntimeError)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    at_step(monkeypatch, 3, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard)))
    try:
        with pytest.raises(OSError, match="step-000004 could not be saved, is the disk full") as error:
            run(folder, tmp_path / "run", **SCHEDULES["linear"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(error.value)
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["latest", "metrics.jsonl", "step-000002"]
    undisturbed(monkeypatch)
    assert run(folder, tmp_path / "run", "--resume", **SCHEDULES["linear"]) == 0
    same_bits(state(tmp_path / "run"), state(unbroken["linear"]))


# --resume refused.

def test_resume_where_no_run_is(folder, tmp_path):
    """--resume that silently starts from scratch."""
    with pytest.raises(InputError, match="holds no run that has saved"):
        run(folder, tmp_path / "run", "--resume")
    assert not (tmp_path / "run").exists()


def test_resume_with_other_settings_names_both_values(folder, unbroken, tmp_path):
    """Half a run with one learning rate and half with another, which no record shows."""
    shutil.copytree(unbroken["linear"], tmp_path / "run")
    before = state(tmp_path / "run")
    different = r"other settings: --lr 0.002 \(was 0.001\), --gate-shared True \(was False\)$"
    with pytest.raises(InputError, match=different):
        run(folder, tmp_path / "run", "--resume", "--gate-shared", **SCHEDULES["linear"] | dict(lr=2e-3))
    same_bits(state(tmp_path / "run"), before)


def test_a_damaged_train_state_is_told_in_one_line(folder, unbroken, tmp_path):
    """A traceback out of the zip reader."""
    shutil.copytree(unbroken["linear"], tmp_path / "run")
    whole = (last(tmp_path / "run") / "train_state.pt").read_bytes()
    complaint = "train_state.pt is missing or damaged; a new run can start from its weights: --model "
    for content in (b"", b"nonsense", whole[:-500]):
        (last(tmp_path / "run") / "train_state.pt").write_bytes(content)
        with pytest.raises(InputError, match=complaint):
            run(folder, tmp_path / "run", "--resume", **SCHEDULES["linear"])


@pytest.mark.parametrize("damage, complaint", [
    (lambda out: (out / "latest").unlink(), "lost its file `latest`: write step-000006 into it"),
    (lambda out: (out / "latest").write_bytes(b"\xff\xfe\0"),
     "which is not there: write the name of a step folder into it"),
    (lambda out: (out / "latest").write_text("step-000002"), "names 'step-000002', which is not there"),
    (lambda out: (last(out) / "train_state.pt").unlink(), "train_state.pt is missing or damaged"),
    (lambda out: torch.save({"a": 1}, last(out) / "train_state.pt"), "train_state.pt is missing or damaged"),
    (lambda out: (out / "metrics.jsonl").unlink(), "has only 0 good lines and the checkpoint is of step 6"),
    (lambda out: (out / "metrics.jsonl").write_bytes(b"{}\n{}\n{\xff\n{}\n{}\n{}\n"),
     "has only 2 good lines and the checkpoint is of step 6"),
])
def test_resume_of_a_damaged_run_says_the_way_out(folder, unbroken, tmp_path, damage, complaint):
    """A traceback, a bare errno, a gap in the metrics that is not told, or advice that deletes a good checkpoint."""
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


# --overwrite.

def test_out_that_holds_another_run(folder, unbroken, tmp_path):
    """A second run that mixes its files with the first one's; --overwrite that deletes what is no run, or keeps old
    metrics."""
    out = tmp_path / "run"
    shutil.copytree(unbroken["linear"], out)
    with pytest.raises(InputError, match="already holds files: --resume .* --overwrite"):
        run(folder, out)
    same_bits(state(out), state(unbroken["linear"]))
    assert run(folder, out, "--overwrite", steps=1) == 0
    assert sorted(p.name for p in out.iterdir()) == ["latest", "metrics.jsonl", "step-000001"]
    assert len(metrics(out)) == 1
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
    """A file of the user's that stood in the run's folder, or the model that the new run was to start from, gone."""
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
