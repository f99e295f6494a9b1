"""Tests of paper/answer_loss.py (with opened.py and curves.py)."""
import json
import math
import re
import sys

import pytest
import torch
from matplotlib.figure import Figure

from conftest import build, complaint
from data import batch_at, encode_all, load_examples
from gates import GateConfig
from load_weights import load_model, load_tokenizer, read_json, save_model
from problems import arithmetic
from thresholds import calibrate
from toy_runs import ROOT, SCHEDULES, Killed, folder, kill, run, toy, words

sys.path.insert(0, str(ROOT / "paper"))
import answer_loss
import quantize
import recalibrate
import shortgpt
from curves import curves, lines_at, plot
from opened import dense_macs, open_with_items

BLOCK = 32 * (2 * 32 + 2 * 16) + 3 * 32 * 48                     # multiply-accumulates of a toy's block for one token


items_of = lambda path, n, split="test": encode_all(arithmetic(n, split), load_tokenizer(path), 1, 160)[0]


def saved(path, gate=None, **changes):
    """A toy of four blocks with weights of unit scale, in a folder; with gates it is calibrated."""
    model, tokenizer = toy(path, gate, **dict(num_hidden_layers=4) | changes)
    model.load_state_dict(build(model.config, dtype=torch.float32).state_dict())
    if gate is not None:
        model.config.gateskip = calibrate(model, [ids for ids, _ in items_of(path, 6, "calibration")], [0.8])
    save_model(model, path, tokenizer)
    return path


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    base = tmp_path_factory.mktemp("models")
    return {"dense": saved(base / "dense"), "gated": saved(base / "gated", GateConfig("scalar")),
            "small": saved(base / "small", num_hidden_layers=2)}


def measure(out, *switches, **flags):
    """Run answer_loss.py; the rows of its file."""
    flags = dict(data="arithmetic", limit=6, seq_len=160, device="cpu", out=out) | flags
    flags = {name: value for name, value in flags.items() if value is not None}
    assert answer_loss.main(words(*map(str, switches), **flags)) == 0
    return json.loads(out.read_text())["rows"]


@pytest.mark.parametrize("schedule", ["uniform", "global"])
def test_rows_are_those_of_the_table_after_training(folder, tmp_path, capsys, schedule):
    """Other problems, other batches, a budget that means something else, random skipping at another saving."""
    assert run(folder, tmp_path / "run", **SCHEDULES[schedule]) == 0
    table = capsys.readouterr().out.split("answer loss, random skipping\n")[1].split("\n\n")[0].splitlines()
    rows = measure(tmp_path / "r", "--policies", "random", model=tmp_path / "run", reference=folder, limit=4, seed=1)
    lines = [f"{r['budget']:.3f} {r['loss']:.4f} {r['accuracy']:.1%} {r['skipped']:.1%} {r['skipped_per_call']:.1%} "
             f"{r['macs_saved']:+.1%}".split() for r in rows]
    assert [r["policy"] for r in rows] == ["none", "frozen", "random", "frozen", "random"]
    assert [line.split() for line in table] == [lines[0], [*lines[1], lines[2][1]], [*lines[3], lines[4][1]]]


@torch.no_grad()
def test_perplexity_of_a_text_by_hand(models, tmp_path):
    """Windows that lose a token between them, or predict one twice; a mean over windows; a part taken for the text; a
    --limit that lets a long text pass, or takes other windows than train.py."""
    text, model, tokenizer = tmp_path / "text.txt", load_model(models["dense"]), load_tokenizer(models["dense"])
    text.write_text("\n\n".join(" ".join(problem.question for problem in arithmetic(n)) for n in (20, 36, 27)))
    log_p, flags = [], dict(model=models["dense"], reference=models["dense"], data=text, seq_len=9)
    for document in load_examples(text):
        (ids, _), = encode_all([document], tokenizer, 1, 10 ** 6)[0]
        for start in range(0, len(ids) - 1, 8):                  # windows of 9 that share one token
            p = model(torch.tensor([ids[start:start + 9]]))[0][0].log_softmax(-1)
            log_p += [p[i, token].item() for i, token in enumerate(ids[start + 1:start + 9])]
    for limit in (None, 0):                                      # without it: all, and not 256
        r, = measure(tmp_path / f"{limit}.json", **flags, limit=limit)
        assert r["loss"] == pytest.approx(-sum(log_p) / len(log_p), rel=1e-5)
        assert r["perplexity"] == pytest.approx(math.exp(-sum(log_p) / len(log_p)), rel=1e-4)
    some = lambda limit: open_with_items(models["dense"], load_examples(text), limit, 9, "cpu", torch.float32)[2]
    assert some(3) == [some(0)[i] for i in batch_at(len(some(0)), 3, 0, 0)] != some(0)[:3]       # as data.load_sets


def test_work_saved_of_the_reference_by_hand(models, tmp_path):
    """A model of two blocks that saves nothing because it is compared with itself; a head, or padding, not counted."""
    rows = measure(tmp_path / "rows.json", "--model", models["gated"], "--model", models["dense"],
                   model=models["small"], reference=models["dense"])
    items, config = items_of(models["dense"], 6), load_model(models["dense"]).config
    B, S, n = len(items), max(len(ids) for ids, _ in items), sum(len(ids) for ids, _ in items)   # one batch, padded
    block, head = n * BLOCK + B * S * S * 2 * 32, sum(sum(mask) for _, mask in items) * 32 * config.vocab_size
    assert dense_macs(config, items) == 4 * block + head and n < B * S
    of = {(r["model"], r["policy"]): r["of_reference"] for r in rows}
    assert of["small", "none"] == pytest.approx(2 * block / (4 * block + head)) and rows[0]["macs_saved"] == 0
    assert of["gated", "none"] == pytest.approx(-8 * B * S * 32 / (4 * block + head)) and of["dense", "none"] == 0
    assert rows[2]["policy"] == "frozen" and of["gated", "frozen"] == pytest.approx(rows[2]["macs_saved"]) != 0


def test_a_stopped_command_goes_on(models, tmp_path, monkeypatch):
    """Rows lost by a stop, measured twice, or in another order; random skipping that depends on where it was stopped;
    a model that has changed since, or rows of other settings, taken for the same."""
    file, other, calls, evaluate = tmp_path / "rows.json", tmp_path / "other.json", [], answer_loss.evaluate
    go = lambda out, **changes: measure(
        out, "--model", models["dense"], "--policies", "frozen", "random", "--budgets", 1.0, 0.8,
        **dict(model=models["gated"], reference=models["dense"]) | changes)
    rows = go(file)
    assert [(r["model"], r["policy"], r["budget"]) for r in rows] == [
        ("gated", "none", 1.0), ("gated", "frozen", 0.8), ("gated", "random", 0.8), ("dense", "none", 1.0),
        ("dense", "random", 0.8)] and len({r["loss"] for r in rows}) == 5

    third = lambda: calls.append(1) or len(calls) == 3
    monkeypatch.setattr(answer_loss, "evaluate", lambda *args: kill() if third() else evaluate(*args))
    with pytest.raises(Killed):
        go(other)
    assert json.loads(other.read_text())["rows"] == rows[:2]
    assert go(other) == rows and len(calls) == 3 + 3
    assert file.read_text() == (before := other.read_text()).replace(str(other), str(file))
    assert "holds rows of other settings (limit 6, now 5; seed 0, now 3): give" in complaint(go, other, limit=5, seed=3)
    save_model(load_model(models["small"]), tmp_path / "gated", load_tokenizer(models["small"]))
    assert complaint(go, other, model=tmp_path / "gated").startswith("two different models are called gated")
    assert other.read_text() == before and len(calls) == 6
    file.write_text('{"rows": []}')
    assert complaint(go, file) == f"--out {file} is no file of this program: give another --out"


@pytest.mark.parametrize("loss", (float("nan"), float("inf"), 710.0))
def test_a_loss_that_is_none(models, tmp_path, monkeypatch, loss):
    """A traceback of exp(710), or a file that the same command then calls damaged."""
    measured = answer_loss.evaluate
    monkeypatch.setattr(answer_loss, "evaluate", lambda *args: (loss, *measured(*args)[1:]))
    told = complaint(measure, tmp_path / "rows.json", model=models["dense"], reference=models["dense"])
    assert f"dense, budget 1: its loss is {loss:.3g}" in told and not (tmp_path / "rows.json").exists()


def test_two_commands_with_one_file(models, tmp_path, monkeypatch):
    """Rows of the one that are lost when the other writes; a lock of this file that holds up another file."""
    file, evaluate, said = tmp_path / "rows.json", answer_loss.evaluate, []
    go = lambda out: measure(out, model=models["dense"], reference=models["dense"])

    def meanwhile(*args):
        monkeypatch.setattr(answer_loss, "evaluate", evaluate)
        said.append(complaint(go, file))
        assert len(go(tmp_path / "other.json")) == 1
        return evaluate(*args)
    monkeypatch.setattr(answer_loss, "evaluate", meanwhile)
    assert len(go(file)) == 1 and "is being written by process" in said[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.json", "rows.json"]


def test_a_damaged_file_of_rows_is_refused_before_the_work(models, tmp_path, monkeypatch):
    """A traceback, before the first row or after the last; a loss that cannot be drawn as a curve."""
    file, go = tmp_path / "rows.json", lambda: measure(file, model=models["dense"], reference=models["dense"])
    row, = go()
    made_with = json.loads(file.read_text())["made_with"]
    monkeypatch.setattr(answer_loss, "evaluate", None)
    for rows in [{}, None, 3, [5], ["row"], [[]], [row | {"loss": "1.0"}], *(
            [row | {key: x}] for key, x in [("loss", math.nan), ("loss", -1.0), ("accuracy", 1.5), ("budget", 0.0),
                                            ("skipped", 1.5), ("of_reference", 2.0)]), *(
            [{key: x for key, x in row.items() if key != lost}] for lost in row)]:
        file.write_text(json.dumps({"made_with": made_with, "rows": rows}))
        assert complaint(go) == f"--out {file} is damaged: give another --out"
    file.write_text(json.dumps({"made_with": made_with}))
    assert complaint(go) == f"--out {file} is damaged: give another --out"


def test_what_cannot_be_compared_is_refused_before_the_work(models, tmp_path, monkeypatch):
    """Hours of rows before the last model turns out to have another tokenizer, or no calibration."""
    monkeypatch.setattr(answer_loss, "evaluate", None)
    path = saved(tmp_path / "other")
    (path / "tokenizer.json").write_text(json.dumps(read_json(path / "tokenizer.json") | {"pre_tokenizer": None}))
    for why, more in {"make different tokens of a text": ["--model", path], "exceeds": ["--seq-len", 600],
                      "is below the smallest calibrated one": ["--budgets", 0.5],
                      "must end in .png": ["--plot", tmp_path / "x.jpg"],
                      "is --out, too": ["--out", tmp_path / "x.png", "--plot", tmp_path / "other" / ".." / "x.png"],
                      "--out is empty: name a file": ["--out", ""]}.items():
        assert why in complaint(measure, tmp_path / "rows.json", "--model", models["gated"], *more,
                                model=models["dense"], reference=models["dense"])
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_curves_what_lies_between_and_the_picture(tmp_path, monkeypatch):
    """Curves without their beginning, in the order of the file, or of two policies in one; a clamp beyond the ends;
    axes swapped or without a name, shares taken for per cent, perplexity under the name of a loss."""
    rows = [{"model": m, "policy": p, "budget": 1.0, "of_reference": x, "loss": y, "perplexity": math.exp(y)}
            for m, p, x, y in [("a", "frozen", 0.3, 2.0), ("a", "none", -0.01, 1.0), ("a", "random", 0.2, 5.2),
                               ("a", "frozen", 0.1, 1.2), ("b", "none", 0.08, 1.5)]]
    expected = {"a, frozen": [(-0.01, 1.0), (0.1, 1.2), (0.3, 2.0)], "a, random": [(-0.01, 1.0), (0.2, 5.2)],
                "b": [(0.08, 1.5)]}
    assert {label: [(r["of_reference"], r["loss"]) for r in mine] for label, mine in curves(rows).items()} == expected
    lines = lines_at(rows, [10, 15, 31], True)
    assert [" ".join(line.split()[-3:]) for line in lines[2:5]] == ["1.2000 1.4000 -", "3.2000 4.2000 -", "- - -"]
    assert lines[7].split() == ["a,", "frozen", f"{math.exp(1.2):.4f}", f"{math.exp(1.4):.4f}", "-"]

    drawn, savefig = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **how: (drawn.append(self), savefig(self, *args, **how)))
    for plain, *name, of in ((False, "answer loss, nats", "linear", float), (True, "perplexity", "log", math.exp)):
        assert plot(rows, plain, tmp_path / "x.png") and (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
        axis, = drawn.pop().axes
        assert [text.get_text() for text in axis.get_legend().get_texts()] == list(expected)
        assert [[*zip(*line.get_data())] for line in axis.lines] == [
            [(pytest.approx(100 * x), of(y)) for x, y in points] for points in expected.values()]
        assert "saved" in axis.get_xlabel() and [axis.get_ylabel(), axis.get_yscale()] == name


def test_the_commands_of_the_readme_parse():
    """A flag that is not there, or no longer."""
    readme = re.sub("--plot \\S+", "", (ROOT / "paper" / "README.md").read_text())       # its folder is not there
    for script in (shortgpt, quantize, recalibrate, answer_loss):
        commands = re.findall(rf"^python paper/{script.__name__}\.py (.*)$", readme, re.M)
        assert commands and all(script.parse_args(flags.split()) for flags in commands)
