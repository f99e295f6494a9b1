"""Tests of runs that somebody disturbs: folders taken away under them, files changed, strangers' files near by.

The model is a two-layer Llama of width 32 on the built-in problems; a run of a few steps takes half a second.
"""
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
from time import sleep

import pytest
import torch
from safetensors.torch import load_file, save_file

import budgets
import checkpoint
import console
import train
from checkpoint import metrics_lines
from console import InputError
from load_weights import find_folder, read_json
from toy_runs import FLAGS, ROOT, SCHEDULES, Killed, at_step, folder, last, metrics, run, unbroken, undisturbed, words


def content(out):
    """Everything in a folder: {path: its bytes, or None for a folder}."""
    return {str(p.relative_to(out)): p.read_bytes() if p.is_file() else None for p in sorted(out.rglob("*"))}


def names(out):
    return sorted(p.name for p in out.iterdir())


@pytest.fixture
def copy(unbroken, tmp_path):
    """A finished run of six steps that may be spoiled."""
    return shutil.copytree(unbroken["linear"], tmp_path / "run")


# The folder of a live run is taken away.

def replace_folder(out):
    """`rm -rf X`, and another process that has begun there."""
    shutil.rmtree(out)
    out.mkdir()
    replace_lock(out)


def replace_lock(out):
    (out / ".lock").unlink(missing_ok=True)
    (out / ".lock").write_text("process 1 on another\n")
    (out / "metrics.jsonl.tmp").write_text("another's")


@pytest.mark.parametrize("replace", [replace_folder, replace_lock])
@pytest.mark.parametrize("when", ["load_model", 1, 3, "calibrate", "plot_metrics"])
def test_what_another_has_taken_over_is_left_alone(folder, tmp_path, monkeypatch, replace, when):
    """Two runs in one folder, both with exit code 0: the older one makes the folder anew and writes its steps, metrics,
    thresholds or picture into it, or deletes it and what has been begun there."""
    out, found = tmp_path / "run", {}

    def take_over(*args, **flags):
        if not found:
            replace(out)
            found.update(content(out))
        return real(*args, **flags)
    if isinstance(when, int):
        real = lambda: None
        at_step(monkeypatch, when, take_over)
    else:
        owner = budgets if when == "calibrate" else train
        real = getattr(owner, when)
        if when == "plot_metrics":
            real = lambda out: checkpoint.write(out / "metrics.png", b"a picture")
        monkeypatch.setattr(owner, when, take_over)
    with pytest.raises(InputError, match=f"^{out} was deleted or taken over while this process worked in it"):
        run(folder, out)
    kept = {name: bits for name, bits in content(out).items() if name != "metrics.jsonl"}
    assert kept == {name: bits for name, bits in found.items() if name != "metrics.jsonl"}


def test_a_folder_that_is_gone_does_not_come_back(folder, tmp_path, monkeypatch):
    """A run that makes its folder anew, with the last step alone: neither resumable nor what was asked for."""
    at_step(monkeypatch, 3, lambda: shutil.rmtree(tmp_path / "run"))
    with pytest.raises(InputError, match="was deleted or taken over"):
        run(folder, tmp_path / "run")
    assert not (tmp_path / "run").exists()


# Files of a step changed between a stop and --resume.

def flip_a_bit(step):
    bits, weights = random.Random(1), bytearray((step / "model.safetensors").read_bytes())
    weights[-bits.randrange(1, 4000)] ^= 1
    (step / "model.safetensors").write_bytes(weights)


def other_weights(step):
    weights = load_file(step / "model.safetensors")
    save_file({key: t + 0.01 for key, t in weights.items()}, step / "model.safetensors", metadata={"format": "pt"})


def changed(**keys):
    return lambda step: (step / "config.json").write_text(json.dumps(read_json(step / "config.json") | keys))


@pytest.mark.parametrize("damage, name", [
    (flip_a_bit, "model.safetensors"), (other_weights, "model.safetensors"), (changed(rms_norm_eps=0.1), "config.json"),
    (changed(rope_theta=500.0), "config.json"), (changed(gateskip=5), "config.json"),
    (lambda step: (step / "tokenizer.json").write_text((step / "tokenizer.json").read_text() + "\n"), "tokenizer.json"),
    (lambda step: (step / "generation_config.json").write_text('{"eos_token_id": 1}'), "generation_config.json")])
def test_resume_compares_all_that_a_step_is_made_of(folder, copy, damage, name):
    """Half a run with these weights, or this epsilon, and half with others; no record shows it."""
    damage(last(copy))
    before = content(copy)
    with pytest.raises(InputError) as error:
        run(folder, copy, "--resume", **SCHEDULES["linear"])
    assert str(error.value) == (f"--resume: {last(copy) / name} is not as it was saved: put that back, or start a new "
                                "run") or name == "config.json" and "gateskip" in str(error.value)
    assert content(copy) == before


def test_an_older_state_in_a_newer_step(folder, copy, tmp_path):
    """Adam's moments of step 4 with the weights of step 6."""
    assert run(folder, tmp_path / "other", steps=4, **SCHEDULES["linear"]) == 0
    shutil.copy(last(tmp_path / "other") / "train_state.pt", last(copy))
    with pytest.raises(InputError, match="train_state.pt is of step 4, not of step-000006: a new run can start"):
        run(folder, copy, "--resume", **SCHEDULES["linear"] | dict(steps=4))


# Somebody's own files.

def test_a_step_with_somebodys_file_stays(folder, tmp_path, monkeypatch, capsys):
    """An evaluation, or a note, that was put into a step's folder and goes with it."""
    out = tmp_path / "run"
    note = out / "step-000002" / "notes.txt"
    at_step(monkeypatch, 3, lambda: note.write_text("the best one"))
    assert run(folder, out) == 0
    assert note.read_text() == "the best one" and {"model.safetensors", "train_state.pt"} < set(names(note.parent))
    assert names(out) == [".lock", "latest", "metrics.jsonl", "step-000002", "step-000006"]
    assert f"{note.parent} stays: step-000002/notes.txt is not the run's\n" in capsys.readouterr().err
    before = content(out)
    with pytest.raises(InputError, match="also holds step-000002/notes.txt: move it away"):
        run(folder, out, "--overwrite")
    assert content(out) == before
    undisturbed(monkeypatch)
    note.unlink()
    assert run(folder, out, "--overwrite", steps=2) == 0 and names(out)[-1] == "step-000002"


def test_a_note_that_comes_while_a_run_is_overwritten(folder, copy, monkeypatch):
    """The same, of a step that is set aside."""
    note = last(copy) / "notes.txt"
    at_step(monkeypatch, 1, lambda: note.write_text("the best one"))
    assert run(folder, copy, "--overwrite", steps=2) == 0
    assert (copy / ".overwritten" / "step-000006" / "notes.txt").read_text() == "the best one"
    assert last(copy).name == "step-000002"


def test_a_note_where_a_step_will_be_saved(folder, copy):
    """A run that trains up to a save that cannot succeed, each time anew."""
    (copy / "step-000008").mkdir()
    (copy / "step-000008" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="step-000008/notes.txt stands where a step will be saved: move it away"):
        run(folder, copy, "--resume", **SCHEDULES["linear"])


def strangers(out):
    """A folder of somebody's whose names look like those of a run."""
    for name in ("notes.txt", "latest.tmp", "metrics.jsonl.tmp", "eval.json.tmp", ".overwritten/notes.txt",
                 ".overwritten/eval.json", ".overwritten/mine/notes.txt", "mine/notes.txt", ".step-000001.tmp/x",
                 "step-000002/notes.txt"):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(name)


@pytest.mark.parametrize("switches", [(), ("--overwrite",), ("--resume",)])
@pytest.mark.parametrize("more", [{}, {".lock": "mine"}, {"latest": "thoughts"}])
def test_a_refused_command_changes_nothing(folder, tmp_path, more, switches):
    """--out that names a folder of the user's: files deleted, replaced by their namesakes, or left there, by a command
    that then says that it does nothing."""
    strangers(tmp_path / "own")
    for name, text in more.items():
        (tmp_path / "own" / name).write_text(text)
    before = content(tmp_path / "own")
    with pytest.raises(InputError):
        run(folder, tmp_path / "own", *switches)
    assert content(tmp_path / "own") == before


def test_out_of_nothing_and_of_here(folder, tmp_path, monkeypatch):
    """A lock, or a run, in the folder where one happens to stand; --resume that takes it for one."""
    (tmp_path / "notes.txt").write_text("mine")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="^--out '' is no name"):
        run(folder, "")
    with pytest.raises(InputError, match="--out . already holds files"):
        run(folder, ".")
    assert names(tmp_path) == ["notes.txt"]


def test_a_name_that_nothing_can_load(folder, tmp_path):
    """A run that trains to its end, and whose weights no command can open: safetensors takes UTF-8 only."""
    with pytest.raises(InputError, match=r"run\\udcff' is no name that weights can be loaded from"):
        run(folder, tmp_path / "run\udcff")
    assert names(tmp_path) == []


# What the metrics hold.

ROW = dict(step=1, loss=1.0, ce=1.0, sparsity=0.1, gate_mean=0.9, budget=1, skipped=0.0, lr=1e-3)


@pytest.mark.parametrize("line", [
    5, [], None, "x", {}, {k: v for k, v in ROW.items() if k != "skipped"}, {k: v for k, v in ROW.items() if k != "ce"},
    ROW | dict(loss="x"), ROW | dict(ce=None), ROW | dict(budget=True), ROW | dict(gate_mean="x"), ROW | dict(step=2),
    ROW | dict(step=0), ROW | dict(step="1"), ROW | dict(loss=float("nan")), ROW | dict(loss=float("inf")),
    ROW | dict(loss=10 ** 400), ROW | dict(skipped=[0.5])])
def test_a_damaged_line_of_the_metrics(tmp_path, line):
    """A traceback at the end of training, or a wrong curve."""
    lines = [json.dumps(ROW | dict(step=i)) for i in range(4)]
    lines[1] = json.dumps(line)
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert metrics_lines(tmp_path) == lines[:1]
    lines[1] = "[" * 100_000
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert metrics_lines(tmp_path) == lines[:1]


def test_metrics_that_have_no_room_are_told_with_their_file(folder, tmp_path, monkeypatch):
    """"[Errno 28] No space left on device" in the middle of a run, and no word of where."""
    file, (soft, hard) = tmp_path / "run" / "metrics.jsonl", resource.getrlimit(resource.RLIMIT_FSIZE)
    at_step(monkeypatch, 3, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (file.stat().st_size + 9, hard)))
    try:
        with pytest.raises(OSError) as error:
            run(folder, tmp_path / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    monkeypatch.setitem(console.given, "--out", str(tmp_path / "run"))
    assert console.told(error.value) == f"--out {tmp_path / 'run'}: File too large: {file}"


# Signals, kills and first steps.

def test_a_run_that_ignores_ctrl_c_goes_on(folder, tmp_path):
    """nohup, or `&` in a script: a Ctrl-C that is meant for another program stops the run in the background."""
    flags = FLAGS | dict(model=folder, out=tmp_path / "run", steps=2000, save_every=2000)
    command = [sys.executable, ROOT / "train.py", *words(**flags)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN))

    def lines(above):
        while process.poll() is None:
            if (tmp_path / "run" / "metrics.jsonl").exists() and len(metrics_lines(tmp_path / "run")) > above:
                return len(metrics_lines(tmp_path / "run"))
            sleep(0.01)
        pytest.fail("it has ended")
    try:
        seen = lines(0)
        process.send_signal(signal.SIGINT)
        lines(seen + 5)
        process.terminate()
        assert "stopped after step" in process.communicate()[0] and process.returncode == 143
    finally:
        process.kill()
        process.communicate()


def test_a_run_that_was_set_aside_is_still_found(copy, tmp_path, monkeypatch):
    """A kill while --overwrite moves the old run: "a run that has not saved yet", and its weights lie there."""
    real = os.replace
    for moved in range(1, 5):
        out, count = shutil.copytree(copy, tmp_path / str(moved)), []

        def replace(old, new):
            real(old, new)
            count.append(new)
            if len(count) == moved:
                raise Killed
        with monkeypatch.context() as m:
            m.setattr(os, "replace", replace)
            try:
                checkpoint._set_aside(out)
            except Killed:
                pass
        assert find_folder(out).name == "step-000006" and read_json(find_folder(out) / "config.json")["gateskip"]
    (out / "step-000006").mkdir()                                # the new run's, which `latest` has never named
    assert find_folder(out) == out / ".overwritten" / "step-000006"


@pytest.mark.parametrize("there", [False, True])
def test_a_first_step_that_fails_leaves_nothing(folder, tmp_path, monkeypatch, there):
    """Metrics of a run that never saved: the same command is refused, and --resume has nothing to go on with."""
    out = tmp_path / "run"
    if there:
        out.mkdir()
    at_step(monkeypatch, 1, lambda: torch.empty(1 << 60))
    with pytest.raises(RuntimeError):
        run(folder, out)
    assert out.exists() == there and names(tmp_path) == ["run"] * there and not (there and names(out))
    undisturbed(monkeypatch)
    assert run(folder, out) == 0 and len(metrics(out)) == 6


def test_a_latest_that_cannot_be_written_into(folder, copy):
    """"write step-000006 into it", of a folder or a pipe."""
    for remove, make in ((os.unlink, os.mkdir), (os.rmdir, os.mkfifo)):
        remove(copy / "latest")
        make(copy / "latest")
        with pytest.raises(InputError, match="has lost its file `latest`: delete that, and write step-000006 into it"):
            run(folder, copy, "--resume")


def test_steps_are_sorted_by_their_number(folder, copy):
    """step-1000000 before step-999999: advice that goes back by one save."""
    (copy / "latest").unlink()
    for step in (1000000, 999999):
        (copy / f"step-{step}").mkdir()
    with pytest.raises(InputError, match="write step-1000000 into it"):
        run(folder, copy, "--resume")
