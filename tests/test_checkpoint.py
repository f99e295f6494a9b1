"""Tests of checkpoint.py, a run on disk: saved, resumed, killed, interrupted, damaged, overwritten; metrics and curves.

The model is a two-layer Llama of width 32 on the built-in problems; a run of a few steps takes half a second.
"""
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
from itertools import count
from pathlib import Path
from time import sleep
from types import SimpleNamespace

import pytest
import torch

import budgets
import checkpoint
import load_weights
import train
from checkpoint import RUN_FILES, held, open_run, save_checkpoint, start_run
from console import InputError, pyplot
from load_weights import load_model, load_tokenizer, read_json
from metrics import metrics_lines, plot_metrics
from toy_runs import (FLAGS, ROOT, SCHEDULES, Killed, at_step, folder, kill, last, metrics, run, same_bits, state,
                      unbroken, undisturbed, words)


# What a run leaves.

def test_files_of_a_run(unbroken):
    """An older step that is left behind, or a file that --overwrite would take for a stranger's."""
    out = unbroken["linear"]
    assert sorted(p.name for p in out.iterdir()) == [".lock", "latest", "metrics.jsonl", "step-000006"]
    assert (out / "latest").read_text() == "step-000006\n"
    assert sorted(p.name for p in last(out).iterdir()) == ["config.json", "model.safetensors", "tokenizer.json",
                                                           "train_state.pt"]
    assert all(re.fullmatch(RUN_FILES, p.name) for p in out.iterdir())


def some_lines(number, loss=1.0):
    """The text of a metrics.jsonl."""
    return "".join(json.dumps(dict(step=i, loss=loss, ce=1.0, budget=1, skipped=0.0)) + "\n" for i in range(number))


ONE, TWO = some_lines(2).encode().splitlines(keepends=True)


@pytest.mark.parametrize("content, good", [
    (None, 0), (b"", 0), (ONE, 1), (ONE + TWO + b'{"a"', 2), (ONE + b"none\n" + TWO, 1), (ONE + b"\xff\n", 1)])
def test_metrics_end_at_the_first_damaged_line(tmp_path, content, good):
    """A half-written last line that stops a resume with a traceback, or a gap in the middle that is jumped over."""
    if content is not None:
        (tmp_path / "metrics.jsonl").write_bytes(content)
    lines = metrics_lines(tmp_path)
    assert len(lines) == good and all(isinstance(json.loads(line), dict) for line in lines)


def drawn(monkeypatch, out):
    """{title: {label: ([steps], [values])}} of the curves that plot_metrics(out) draws."""
    plt, seen = pyplot(), {}
    monkeypatch.setattr(plt, "close", lambda figure: seen.update({axis.get_title(): {
        line.get_label(): tuple(map(list, line.get_data())) for line in axis.lines} for axis in figure.axes}))
    monkeypatch.setattr("metrics.pyplot", lambda: plt)
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
        "budget, and share of pairs kept": {"budget": column("budget"),
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


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_says_where_and_resumes(folder, unbroken, tmp_path, monkeypatch, capsys, number, code):
    """Ctrl-C, or a cluster's SIGTERM, that loses the steps since the last checkpoint, or saves another state than the
    run's own; a second one of either kind that spoils the save."""
    def save(real):                                              # in the middle of it
        def hooked(*args):
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGINT)
            real(*args)
        return hooked
    at_step(monkeypatch, 2, lambda: os.kill(os.getpid(), number))
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as m:
        m.setattr(torch, "save", save(torch.save))
        assert run(folder, tmp_path / "run", **SCHEDULES["linear"] | dict(save_every=9)) == code
    assert f"stopped after step 3; saved in {tmp_path / 'run'}" in capsys.readouterr().out
    assert last(tmp_path / "run").name == "step-000003"
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
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
        real_bytes(path / "model.safetensors", b"\x00" * 99)

    def half_deleted(path, ignore_errors=False):
        for file in list(Path(path).glob("model.safetensors")):
            file.unlink()

    real_bytes = Path.write_bytes
    wrap(checkpoint, "save_model", half_a_model)
    wrap(load_weights, "save_config")
    wrap(torch, "save", lambda obj, path: real_bytes(path, b"PK"))
    wrap(os, "replace")
    wrap(os, "fsync")
    wrap(Path, "write_bytes", lambda path, content: real_bytes(path, b""))
    wrap(Path, "mkdir")
    wrap(shutil, "rmtree", half_deleted)


@pytest.fixture
def saver(folder):
    """(set_to(value): weights and Adam's moments of that value after `step` updates; save(out, step); its optimizer)"""
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    optimizer = torch.optim.AdamW(model.named_parameters())

    def set_to(value, step):
        for p in model.parameters():
            p.data.fill_(value)
            optimizer.state[p] = {"step": torch.tensor(float(step)), "exp_avg": torch.full_like(p, value),
                                  "exp_avg_sq": torch.zeros_like(p)}

    def save(out, step, value=None):
        set_to(step if value is None else value, step)
        return save_checkpoint(out, step, model, tokenizer, optimizer, {})
    return save, optimizer


def resumed(out, optimizer):
    """What --resume finds and makes of out: train_state."""
    with held(out):
        found, step = open_run(SimpleNamespace(out=out, resume=True), {})
        start_run(out, found, step, optimizer).close()
    return found


def names(out):
    return sorted(p.name for p in out.iterdir())


def killed_at_each_instant(base, place, monkeypatch, action):
    """(how many, folder): copies of base, action(copy) killed at its first write, its second, ..., up to its last."""
    for instant in count():
        out = place / str(instant)
        shutil.copytree(base, out)
        with monkeypatch.context() as m:
            dying(m, instant)
            try:
                return action(out)
            except Killed:
                pass
        yield instant + 1, out


OLD, NEW = 11, 12                                                # what the weights are filled with


@pytest.mark.parametrize("step, overwrites", [(4, False), (4, True), (2, True)])
def test_a_kill_at_any_instant_of_saving_leaves_a_good_state(saver, tmp_path, monkeypatch, step, overwrites):
    """`latest` written before the folder is whole, an old checkpoint deleted too early, rubbish that stays for ever; an
    overwritten run that is gone before the new one has saved, or whose metrics or evaluation pass for the new one's."""
    save, optimizer = saver
    base, left = tmp_path / "base", set()
    base.mkdir()
    (base / ".lock").touch()
    (base / "metrics.jsonl").write_text(some_lines(4))
    save(base, 2, OLD)
    if overwrites:                                               # another run with steps of the same names
        (base / "eval.json").write_text("{}")
        (base / "metrics.jsonl.tmp").write_text(some_lines(step, 2.0))
    for instants, out in killed_at_each_instant(base, tmp_path, monkeypatch, lambda out: save(out, step, NEW)):
        found, kept = resumed(out, optimizer), load_model(out).lm_head.weight.unique().item()
        assert found["optimizer"]["state"][0]["exp_avg"].unique().item() == kept
        assert found["step"] == {OLD: 2, NEW: step}[kept]
        lines = some_lines(found["step"], 2.0 if overwrites and kept == NEW else 1.0)
        assert (out / "metrics.jsonl").read_text() == lines
        evaluated = ["eval.json"] if overwrites and kept == OLD else []
        assert names(out) == [".lock", *evaluated, "latest", "metrics.jsonl", f"step-{found['step']:06d}"]
        left.add(kept)
        save(out, 6)
        assert names(out) == [".lock", *evaluated, "latest", "metrics.jsonl", "step-000006"]
    assert left == {OLD, NEW} and instants > 20


def test_a_kill_while_an_overwritten_run_comes_back(saver, tmp_path, monkeypatch):
    """`latest` that is back before the steps are: the next start takes what is still set aside for rubbish."""
    save, optimizer = saver
    base = tmp_path / "base"
    base.mkdir()
    (base / ".lock").touch()
    (base / "metrics.jsonl").write_text(some_lines(2))
    (base / "eval.json").write_text("{}")
    save(base, 2, OLD)
    checkpoint._set_aside(base)
    (base / "metrics.jsonl").write_text(some_lines(4, 2.0))
    shutil.copytree(base / ".overwritten" / "step-000002", base / "step-000002")
    for instants, out in killed_at_each_instant(base, tmp_path, monkeypatch, checkpoint._end_overwrite):
        assert resumed(out, optimizer)["step"] == 2 and (out / "metrics.jsonl").read_text() == some_lines(2)
        assert names(out) == [".lock", "eval.json", "latest", "metrics.jsonl", "step-000002"]
    assert instants == 10


def test_what_is_on_the_disk_before_what(saver, tmp_path, monkeypatch):
    """A machine that stops hard: a name that is on the disk before the bytes that it stands for, an older step that is
    gone before `latest` is there. Each sync and each place in the order counts."""
    save, _ = saver
    done = []

    def record(owner, name, said):
        real = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, **how: (done.append(said(*args)), real(*args, **how))[1])

    def short(path):
        return os.path.relpath(path, tmp_path).replace(".step-000004.tmp", "new")
    (tmp_path / "metrics.jsonl").write_text(some_lines(4))
    save(tmp_path, 2)
    record(os, "fsync", lambda descriptor: f"sync {short(os.readlink(f'/proc/self/fd/{descriptor}'))}")
    record(os, "replace", lambda old, new: f"{short(old)} -> {short(new)}")
    record(shutil, "rmtree", lambda path, **_: f"delete {short(path)}")
    save(tmp_path, 4)
    config, tree, rest = done[:-12], done[-12:-7], done[-7:]
    assert config in ([], ["sync new/config.json.tmp", "new/config.json.tmp -> new/config.json", "sync new"])
    assert sorted(tree) == ["sync new", "sync new/config.json", "sync new/model.safetensors", "sync new/tokenizer.json",
                            "sync new/train_state.pt"]
    assert rest == ["sync metrics.jsonl", "new -> step-000004", "sync .",
                    "sync latest.tmp", "latest.tmp -> latest", "sync .", "delete step-000002"]


def test_a_kill_between_the_two_renames(saver, tmp_path, monkeypatch):
    """`latest` replaced before the step has its name: the newest step named and not there. And after it: a step that
    nothing names, which must not be resumed from, nor stay."""
    save, optimizer = saver
    (tmp_path / ".lock").touch()
    (tmp_path / "metrics.jsonl").write_text(some_lines(4))
    save(tmp_path, 2)
    real, renamed = os.replace, []

    def replace(old, new):
        if Path(new).parent == tmp_path and renamed:
            raise Killed
        real(old, new)
        renamed.extend([Path(new).name] * (Path(new).parent == tmp_path))
    with monkeypatch.context() as m:
        m.setattr(os, "replace", replace)
        with pytest.raises(Killed):
            save(tmp_path, 4)
    assert renamed == ["step-000004"] and (tmp_path / "latest").read_text() == "step-000002\n"
    assert {"step-000002", "step-000004"} < set(names(tmp_path))
    assert resumed(tmp_path, optimizer)["step"] == 2 and last(tmp_path).name == "step-000002"
    assert names(tmp_path) == [".lock", "latest", "metrics.jsonl", "step-000002"]


def test_resume_cleans_before_it_writes(folder, unbroken, tmp_path, monkeypatch):
    """A disk that a kill left full: steps that nothing names stay for ever, and --resume dies of what it writes first.
    A refused --resume has deleted one of them, which may be all that is left of the run."""
    out = tmp_path / "run"
    shutil.copytree(unbroken["linear"], out)
    for orphan in ("step-000004", "step-000008", ".step-000008.tmp"):
        shutil.copytree(last(out), out / orphan)
    (out / "latest.tmp").write_text("step-0000")
    (out / "step-000006-best").mkdir()                           # the user's
    with pytest.raises(InputError, match="other settings"):
        run(folder, out, "--resume", **SCHEDULES["linear"] | dict(lr=2e-3))
    assert {"step-000004", "step-000008", "step-000006-best"} < set(names(out))

    def write(*args):
        assert names(out) == [".lock", "latest", "metrics.jsonl", "step-000006", "step-000006-best"]
        raise Killed
    monkeypatch.setattr(checkpoint, "write", write)
    with pytest.raises(Killed):
        run(folder, out, "--resume", **SCHEDULES["linear"])


def test_only_steps_are_deleted_by_a_save(saver, tmp_path):
    """The user's copy of a good step, gone with the next save."""
    save, _ = saver
    (tmp_path / "metrics.jsonl").write_text(some_lines(4))
    save(tmp_path, 2)
    for name in ("step-000002-best", "step-2", "step-000002.bak", "old-step-000002"):
        shutil.copytree(tmp_path / "step-000002", tmp_path / name)
    save(tmp_path, 4)
    assert names(tmp_path) == ["latest", "metrics.jsonl", "old-step-000002", "step-000002-best", "step-000002.bak",
                               "step-000004", "step-2"]


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
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [".lock", "latest", "metrics.jsonl", "step-000002"]
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
    different = r"other settings: --lr 0.002 \(was 0.001\), --gate-shared True \(was False\): give those; a new run can"
    with pytest.raises(InputError, match=different):
        run(folder, tmp_path / "run", "--resume", "--gate-shared", **SCHEDULES["linear"] | dict(lr=2e-3))
    same_bits(state(tmp_path / "run"), before)


def test_a_run_that_memory_ended_goes_on_with_recomputed_activations(folder, unbroken, tmp_path, monkeypatch):
    """The way out that train.py tells, refused by --resume; or other numbers there."""
    at_step(monkeypatch, 4, kill)
    with pytest.raises(Killed):
        run(folder, tmp_path / "run", **SCHEDULES["global"])
    undisturbed(monkeypatch)
    assert run(folder, tmp_path / "run", "--resume", "--checkpoint-activations", **SCHEDULES["global"]) == 0
    same_bits(state(tmp_path / "run"), state(unbroken["global"]))


def test_a_damaged_train_state_is_told_in_one_line(folder, unbroken, tmp_path):
    """A traceback out of the zip reader."""
    shutil.copytree(unbroken["linear"], tmp_path / "run")
    whole = (last(tmp_path / "run") / "train_state.pt").read_bytes()
    complaint = "train_state.pt is missing or damaged; a new run can start from its weights: --model "
    for content in (b"", b"nonsense", whole[:-500]):
        (last(tmp_path / "run") / "train_state.pt").write_bytes(content)
        with pytest.raises(InputError, match=complaint):
            run(folder, tmp_path / "run", "--resume", **SCHEDULES["linear"])


def test_every_single_flipped_bit_is_harmless_or_told(unbroken, tmp_path):
    """A bit that a disk or a copy has lost: Adam goes on with other moments, or torch's zip reader crashes."""
    shutil.copytree(unbroken["linear"], tmp_path / "run")
    path, args = last(tmp_path / "run") / "train_state.pt", SimpleNamespace(out=tmp_path / "run", resume=True)
    whole, (right, _) = bytearray(path.read_bytes()), open_run(args, {})
    bits, told, end = random.Random(1), 0, whole.rindex(b"PK\5\6")
    places = [bits.randrange(len(whole)) for _ in range(60)] + list(range(end - 60, end)) + list(range(50))
    flips = [(place, 1 << bits.randrange(8)) for place in places]                # anywhere; in the zip's directory; in
    for place, flip in [*flips, (whole.rindex(b"train_state/data/5") - 8, 16)]:  # its first header; "it is a folder"
        whole[place] ^= flip
        path.write_bytes(whole)
        whole[place] ^= flip
        try:
            found, _ = open_run(args, {})
        except InputError as error:
            assert f"{path} is missing or damaged; a new run can start from its weights: --model {path.parent}" in str(
                error) and "\n" not in str(error)
            told += 1
        else:
            same_bits(found, right)
    assert told > 100


def reverse(saved):
    saved["state"] = dict(zip(saved["state"], reversed(saved["state"].values())))


def rename_first(saved):
    saved["param_groups"][0]["param_names"][:2] = reversed(saved["param_groups"][0]["param_names"][:2])


@pytest.mark.parametrize("damage", [
    reverse, rename_first, lambda saved: saved["state"].pop(3), lambda saved: saved["state"].update({99: {}}),
    lambda saved: saved["param_groups"][0]["params"].pop(), lambda saved: saved["param_groups"][0]["params"].reverse(),
    lambda saved: saved["param_groups"].append(saved["param_groups"][0]), lambda saved: saved.pop("param_groups"),
    lambda saved: saved["param_groups"][0].update(betas=(0.8, 0.999)),
    lambda saved: saved["param_groups"][0].update(eps=1e-6), lambda saved: saved["param_groups"][0].pop("betas"),
    lambda saved: saved["param_groups"][0].update(weight_decay=0.1),
    lambda saved: saved["param_groups"][0].update(maximize=True),
    lambda saved: saved["state"][3].update(step=torch.tensor(5.0)),
    lambda saved: saved["state"][3].update(step=torch.ones(7)), lambda saved: saved["state"][3].pop("step"),
    lambda saved: saved["state"][3].update(exp_avg=torch.zeros(2, 3)), lambda saved: saved["state"][3].pop("exp_avg"),
    lambda saved: saved["state"][3].update(exp_avg=saved["state"][3]["exp_avg"].double()),
    lambda saved: saved["state"][3]["exp_avg"].view(-1)[0].fill_(torch.nan),
    lambda saved: saved["state"][3]["exp_avg_sq"].view(-1)[0].fill_(torch.inf),
    lambda saved: saved["state"][3]["exp_avg_sq"].view(-1)[0].fill_(-1.0),
])
def test_an_optimizer_that_is_not_this_runs(folder, unbroken, tmp_path, damage):
    """A traceback out of load_state_dict, a crash in AdamW, or training that goes on with others' moments."""
    shutil.copytree(unbroken["linear"], tmp_path / "run")
    path = last(tmp_path / "run") / "train_state.pt"
    stored = torch.load(path, weights_only=True)
    damage(stored["optimizer"])
    torch.save(stored, path)
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file() and p.name != ".lock"}
    with pytest.raises(InputError) as error:
        run(folder, tmp_path / "run", "--resume", **SCHEDULES["linear"])
    assert re.fullmatch(rf"--resume: {path} is not of this run \(.+\); a new run can start from its weights: "
                        rf"--model {path.parent}, another --out", str(error.value))
    assert all(p.read_bytes() == content for p, content in before.items())


def test_a_random_state_that_is_none(folder, unbroken, tmp_path):
    """A traceback out of torch's generator."""
    shutil.copytree(unbroken["linear"], tmp_path / "run")
    path = last(tmp_path / "run") / "train_state.pt"
    torch.save(torch.load(path, weights_only=True) | {"rng": torch.zeros(3, dtype=torch.uint8)}, path)
    with pytest.raises(InputError, match="train_state.pt is not of this run"):
        run(folder, tmp_path / "run", "--resume", **SCHEDULES["linear"])


def test_a_run_of_an_older_version_goes_on(folder, unbroken, tmp_path, monkeypatch):
    """Names, digests, sums or flags that were not stored yet, demanded all the same: no run from before resumes."""
    at_step(monkeypatch, 5, kill)
    with pytest.raises(Killed):
        run(folder, tmp_path / "run", **SCHEDULES["linear"])
    path = last(tmp_path / "run") / "train_state.pt"
    stored = torch.load(path, weights_only=True)
    for newer in ("digests", "threshold", "sparsity_cost", "gate_lr_scale", "teacher", "distill_weight"):
        del stored["settings"][newer]
    (group,) = stored["optimizer"]["param_groups"]
    del group["param_names"], group["scale"], stored["sums"], stored["quantile"]
    torch.save(stored, path)
    undisturbed(monkeypatch)
    assert run(folder, tmp_path / "run", "--resume", **SCHEDULES["linear"]) == 0
    resumed_state = state(tmp_path / "run")
    resumed_state["train"]["optimizer"]["param_groups"][0]["scale"] = 1.0
    same_bits(resumed_state, state(unbroken["linear"]))


def some_data(tmp_path):
    file = tmp_path / "some.jsonl"
    file.write_text("".join(json.dumps({"question": f"{i} + 1?", "answer": f"{i + 1}"}) + "\n" for i in range(40)))
    return file


@pytest.mark.parametrize("flag", ["data", "eval_data"])
def test_data_that_was_replaced(folder, tmp_path, monkeypatch, flag):
    """Half a run on one data set and half on another, or a table of other problems, under one name."""
    monkeypatch.setattr(train, "finish", lambda *_: None)
    file = some_data(tmp_path)
    rows = file.read_text().splitlines(keepends=True)
    assert run(folder, tmp_path / "run", steps=2, **{flag: file}) == 0
    assert run(folder, tmp_path / "run", "--resume", steps=2, **{flag: file}) == 0
    file.write_text("".join(rows[::-1]))
    complaint = (f"--{flag.replace('_', '-')} {re.escape(str(file))} has changed since the run started: put the old "
                 "file back, or: a new run")
    with pytest.raises(InputError, match=complaint):
        run(folder, tmp_path / "run", "--resume", steps=2, **{flag: file})


@pytest.mark.parametrize("name", ["{elsewhere}", "../elsewhere/step-000006", "step-000006/../../elsewhere", ".", ""])
def test_latest_names_a_step_of_its_own_run(folder, unbroken, tmp_path, name):
    """A path in `latest` that makes --resume read, and write into, a folder that is not of this run."""
    for run_of in ("run", "elsewhere"):
        shutil.copytree(unbroken["linear"], tmp_path / run_of)
    (tmp_path / "run" / "latest").write_text(name.format(elsewhere=last(tmp_path / "elsewhere")))
    before = {p: (p.stat().st_mtime_ns, p.stat().st_ino) for p in tmp_path.rglob("*") if p.name not in ("run", ".lock")}
    with pytest.raises(InputError, match="latest names .* which is no step"):
        run(folder, tmp_path / "run", "--resume", **SCHEDULES["linear"])
    assert all((p.stat().st_mtime_ns, p.stat().st_ino) == was for p, was in before.items())


@pytest.mark.parametrize("damage, complaint", [
    (lambda out: (out / "latest").unlink(), "lost its file `latest`: write step-000006 into it"),
    (lambda out: (out / "latest").write_bytes(b"\xff\xfe\0"),
     "which is no step: write step-000006 into it"),
    (lambda out: (out / "latest").write_text("step-000002"), "names 'step-000002', which is not there"),
    (lambda out: (last(out) / "train_state.pt").unlink(), "train_state.pt is missing or damaged"),
    (lambda out: torch.save({"a": 1}, last(out) / "train_state.pt"), "train_state.pt is missing or damaged"),
    (lambda out: (out / "metrics.jsonl").unlink(), "has only 0 good lines and the checkpoint is of step 6"),
    (lambda out: (out / "metrics.jsonl").write_bytes(ONE + TWO + b"{\xff\n" + 3 * ONE),
     "has only 2 good lines and the checkpoint is of step 6"),
])
def test_resume_of_a_damaged_run_says_the_way_out(folder, unbroken, tmp_path, damage, complaint):
    """A traceback, a bare errno, a gap in the metrics that is not told, or advice that deletes a good checkpoint."""
    shutil.copytree(unbroken["linear"], tmp_path / "run")
    damage(tmp_path / "run")
    with pytest.raises(InputError) as error:
        run(folder, tmp_path / "run", "--resume", **SCHEDULES["linear"])
    assert complaint in str(error.value) and "\n" not in str(error.value) and "--overwrite" not in str(error.value)


# --overwrite.

def test_out_that_holds_another_run(folder, unbroken, tmp_path):
    """A second run that mixes its files with the first one's; --overwrite that deletes what is no run, or keeps old
    metrics."""
    out = tmp_path / "run"
    shutil.copytree(unbroken["linear"], out)
    with pytest.raises(InputError, match="already holds files: --resume .* --overwrite"):
        run(folder, out)
    same_bits(state(out), state(unbroken["linear"]))
    with pytest.raises(InputError, match="config.json, and none of a run: choose another --out"):        # a model's
        run(folder, folder)
    assert run(folder, out, "--overwrite", steps=1) == 0
    assert sorted(p.name for p in out.iterdir()) == [".lock", "latest", "metrics.jsonl", "step-000001"]
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
    (last(out) / "train.jsonl").touch()
    for flags in (dict(model=out), dict(model=last(out)), dict(data=last(out) / "train.jsonl")):
        with pytest.raises(InputError, match=r"--overwrite would delete --\w+ .* which lies in --out"):
            run(folder, out, "--overwrite", **flags)
    (last(out) / "train.jsonl").unlink()                         # still there
    for name in ("thesis.txt", "latest-thoughts.md", "step-by-step.md", "step-000006-best", "step-6", "metrics.jsonl~",
                 "eval.csv", ".step-by-step", "my-step-000006"):
        (out / name).write_text("years of work")
        with pytest.raises(InputError, match=f"also holds {name}: move it away"):
            run(folder, out, "--overwrite")
        (out / name).unlink()                                    # still there
    same_bits(state(out), state(unbroken["linear"]))


@pytest.mark.parametrize("flags", [dict(data="missing.jsonl"), dict(model="missing"), dict(seq_len=9)])
def test_overwrite_deletes_nothing_before_the_rest_has_loaded(folder, unbroken, tmp_path, flags):
    """A typing error in another flag that costs the old run."""
    shutil.copytree(unbroken["linear"], tmp_path / "run")
    with pytest.raises(InputError):
        run(folder, tmp_path / "run", "--overwrite", **flags)
    same_bits(state(tmp_path / "run"), state(unbroken["linear"]))


@pytest.fixture
def start(folder, tmp_path):
    """start(out, switches, flags): train.py in a process of its own, for longer than anybody waits."""
    processes = []

    def popen(out, *switches, **flags):
        flags = FLAGS | dict(model=folder, out=out, data=some_data(tmp_path), steps=10 ** 6) | flags
        processes.append(subprocess.Popen([sys.executable, ROOT / "train.py", *words(*switches, **flags)], text=True,
                                          stdout=subprocess.PIPE, stderr=subprocess.PIPE))
        return processes[-1]
    yield popen
    for process in processes:
        process.kill()
        process.communicate()


def out_of_memory():
    raise RuntimeError("[enforce fail at alloc_cpu.cpp:114] DefaultCPUAllocator: can't allocate memory")


def ctrl_c():
    raise KeyboardInterrupt


@pytest.mark.parametrize("name, value", [
    ("load_model", ctrl_c), ("clip_grad_norm_", out_of_memory), ("clip_grad_norm_", ctrl_c), ("save", out_of_memory),
    ("replace", out_of_memory)])
def test_overwrite_deletes_nothing_before_the_new_run_has_saved(folder, unbroken, tmp_path, monkeypatch, name, value):
    """Out of memory at step 0, Ctrl-C while the model loads, a full disk at the first save: neither run is left. Or the
    old one lies where no command looks for it."""
    out = tmp_path / "run"
    shutil.copytree(unbroken["linear"], out)
    owner = {"load_model": train, "clip_grad_norm_": torch.nn.utils, "save": torch, "replace": os}[name]
    seen = []

    def failing(*args):
        if name == "replace" and (seen or Path(args[1]) != out / "latest"):
            return real(*args)                                   # also when the old run comes back
        seen.append(6 if name == "replace" else load_model(out).config.gateskip["step"])
        value()
    real = getattr(owner, name)
    with monkeypatch.context() as m:
        m.setattr(owner, name, failing)
        with pytest.raises((RuntimeError, OSError, KeyboardInterrupt)):
            run(folder, out, "--overwrite", steps=4, seed=2)
    assert seen == [6]                                           # the old run was there all the time
    shutil.rmtree(out / "step-000002", ignore_errors=True)       # a step of the new run that came to no more
    same_bits(state(out), state(unbroken["linear"]))
    assert run(folder, out, "--overwrite", steps=4, seed=2) == 0
    assert names(out) == [".lock", "latest", "metrics.jsonl", "step-000004"] and len(metrics(out)) == 4


def test_a_killed_overwrite_leaves_the_old_run_to_resume(start, folder, unbroken, tmp_path):
    """A new run that was killed before its first save, and has left the old one's weights with its own metrics."""
    out = tmp_path / "run"
    shutil.copytree(unbroken["linear"], out)
    process = start(out, "--overwrite", save_every=10 ** 6)
    while not (out / "metrics.jsonl.tmp").exists() or not (out / "metrics.jsonl.tmp").read_text():
        sleep(0.01)
        assert process.poll() is None
    process.kill()
    process.wait()
    assert load_model(out).config.gateskip["step"] == 6
    assert run(folder, out, "--resume", **SCHEDULES["linear"]) == 0
    same_bits(state(out), state(unbroken["linear"]))


# One at a time, and on a disk that works.

def test_of_two_processes_one_runs(start, tmp_path):
    """One seed's weights under the other's thresholds, both with exit code 0. The other names the one that runs. And
    SIGTERM, as it comes from outside."""
    out = tmp_path / "run"
    both = [start(out, seed=seed) for seed in (1, 2)]
    while all(process.poll() is None for process in both):
        sleep(0.01)
    refused, runs = sorted(both, key=lambda process: process.poll() is None)
    lines = refused.communicate()[1].splitlines()
    assert refused.returncode == 1 and lines[-1].startswith(
        f"error: --out {out} is being written by process {runs.pid} on ")
    while not (out / "latest").exists():
        sleep(0.01)
        assert runs.poll() is None
    runs.terminate()
    said = runs.communicate()[0]
    assert runs.returncode == 143 and "stopped after step" in said
    stored = torch.load(last(out) / "train_state.pt", weights_only=True)
    assert stored["settings"]["seed"] == both.index(runs) + 1 and len(metrics(out)) == stored["step"]
    assert names(out) == [".lock", "latest", "metrics.jsonl", f"step-{stored['step']:06d}"]


def test_the_lock_holds_to_the_end(folder, tmp_path, monkeypatch):
    """A second run that starts while the first one calibrates, and is saved over; a lock that a failed run keeps."""
    def finish(model, args, sets, step, quantile):
        with pytest.raises(InputError, match=f"is being written by process {os.getpid()} on"):
            run(folder, tmp_path / "run", "--overwrite")
        raise Killed
    monkeypatch.setattr(train, "finish", finish)
    with pytest.raises(Killed):
        run(folder, tmp_path / "run")
    with held(tmp_path / "run"):
        pass


def test_thresholds_go_into_their_own_step(folder, unbroken, tmp_path, monkeypatch):
    """Thresholds that are written into whatever `latest` names by the time that they are ready."""
    real, out = budgets.calibrate, tmp_path / "run"

    def calibrate(*args, **how):
        (out / "step-000099").mkdir()
        (out / "latest").write_text("step-000099\n")
        return real(*args, **how)
    monkeypatch.setattr(budgets, "calibrate", calibrate)
    assert run(folder, out, **SCHEDULES["linear"]) == 0
    assert list((out / "step-000099").iterdir()) == []
    same_bits(read_json(out / "step-000006" / "config.json"), read_json(last(unbroken["linear"]) / "config.json"))


def test_an_out_that_cannot_be_written_is_told_before_the_model_loads(folder, tmp_path, monkeypatch):
    """Minutes of loading, or hours of training, before it turns out that nothing can be saved."""
    monkeypatch.setattr(train, "load_model", lambda *_, **__: pytest.fail("loaded"))
    (tmp_path / "file").touch()
    for out in ("/proc", tmp_path / "file" / "run"):
        with pytest.raises(OSError):
            run(folder, out)


def test_weights_that_are_not_finite_are_not_saved(folder, tmp_path, monkeypatch):
    """The last good step replaced by NaN: --lr 1e39 spoils the weights in an update, and no loss shows it yet."""
    with pytest.raises(InputError, match="^weights are not finite at step 1: lower --lr; what was saved before stays$"):
        run(folder, tmp_path / "run", lr=1e39, warmup=0, save_every=1)
    assert not (tmp_path / "run").exists()                       # there is nothing to go on with
    for value in (torch.nan, torch.inf, -torch.inf):
        model = load_model(folder)
        list(model.parameters())[-1].data.view(-1)[-1] = value
        with pytest.raises(InputError, match="not finite at step 7"):
            save_checkpoint(tmp_path / "run", 7, model, None, None, {})
