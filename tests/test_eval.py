"""Tests of eval_gsm8k.py: scoring a row, the table, the JSON that goes on where it was stopped, and the picture."""
import json
import os
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import eval_gsm8k
from branches import lines_of
from checkpoint import _set_aside, held
from conftest import build
from console import InputError
from data import encode_prompt
from disk import only_one
from eval_gsm8k import HEADER, line_of, main, plot, run_row
from gates import GateConfig, SkipPolicy
from generate import Generation, generate
from load_weights import load_model, load_tokenizer, save_model
from problems import Example, arithmetic
from savings import Savings
from sweep import TARGETS, interpolate, wilson
from thresholds import calibrate, make_policy
from toy_runs import ROOT, toy, words

THREE = ("skipped", "skipped_per_call", "macs_saved")
BUDGETS = ("--budgets", "1", "0.95", "0.9", "0.85", "0.8")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{"gated": a calibrated model, "dense": another one without gates}."""
    base, folders = tmp_path_factory.mktemp("models"), {}
    for name, gate in (("gated", GateConfig(form="scalar")), ("dense", None)):
        folders[name] = base / name
        model, tokenizer = toy(base / name, gate)
        model.load_state_dict(build(model.config, dtype=torch.float32).state_dict())
        if gate is not None:
            sequences = [encode_prompt(tokenizer, problem.question) for problem in arithmetic(8, "calibration")]
            table = calibrate(model, sequences, [1.0, 0.8])
            model.config.gateskip = dict(skip="all", kv="copy_up", budget_end=0.8) | table
        save_model(model, base / name, tokenizer)
    return folders


def evaluate(folders, out, *more, **flags):
    flags = dict(model=folders["gated"], out=out, limit=5, batch_size=3, max_new_tokens=6, device="cpu") | flags
    assert main(words(*more, **flags)) == 0
    return json.loads((out / "eval.json").read_text())


# One row.

def test_a_row_of_known_answers(folders, monkeypatch):
    """Scores of one batch counted for another, a standard error without its root, savings averaged over batches of
    unequal size or over prompts and answers."""
    tokenizer = load_tokenizer(folders["gated"])
    examples = [Example(f"q{i}", "", gold) for i, gold in enumerate(("18", "1,234", "-3", "7", "3/4"))]
    replies = ["#### 18", "so 1234", " 5 - 8 = -3\n#### -3.", "#### 8", "#### 3/4"]
    asked, savings = [], []
    for parts in ({"prompt": (55, 60, 0.1, 1, 500, 550, 50, 30, 25), "answer": (35, 40, 0.7, 3, 400, 450, 30, 20, 15)},
                  {"prompt": (210, 300, 0.7, 1, 2500, 3000, 200, 140, 70)}):     # kept, pairs, shares of calls, calls,
        # MACs, work, and what ran attention and MLP of the one layer
        savings.append(Savings(None))
        savings[-1].sums = {name: torch.tensor(sums, dtype=torch.float64) for name, sums in parts.items()}

    def fake(model, prompts, max_new_tokens, policy, eos_ids):
        first = len([p for batch in asked for p in batch])
        asked.append(prompts)
        assert (max_new_tokens, policy.kind, eos_ids) == (6, "random", {1})
        new = [tokenizer.encode(r, add_special_tokens=False).ids + [1] for r in replies[first:first + len(prompts)]]
        new[-1].pop()                                            # one of each batch has no end
        return Generation(new, savings[len(asked) - 1], [])
    monkeypatch.setattr(eval_gsm8k, "generate", fake)
    row = run_row("random, dense", load_model(folders["dense"]), tokenizer, examples, SkipPolicy("random", 0.8), 0.8,
                  SimpleNamespace(batch_size=3, max_new_tokens=6))
    assert [len(batch) for batch in asked] == [3, 2] and asked[1][1] == encode_prompt(tokenizer, "q4")
    assert row.pop("seconds") >= 0
    three = lambda *values: pytest.approx(dict(zip(THREE, values)))
    assert row.pop("prompt") == three(95 / 360, 0.8 / 2, 1 - 3000 / 3550)
    assert row.pop("answer") == three(5 / 40, 0.7 / 3, 1 - 400 / 450)
    assert row.pop("branches") == {"prompt": [round(170 / 180, 4), round(95 / 180, 4)], "answer": [1.0, 0.75]}
    assert row == pytest.approx({
        "row": "random, dense", "policy": "random", "budget": 0.8, "n": 5, "accuracy": 3 / 5,
        "low": 0.2307, "high": 0.8824, "stderr": (0.6 * 0.4 / 5) ** 0.5, "flexible": 4 / 5, "cut": 2,
        "skipped": 100 / 400, "skipped_per_call": 1.5 / 5, "macs_saved": 1 - 3400 / 4000}, abs=5e-5)


def row_of(name="random ranks, gated", scale=1.0, **changes):
    """A row whose numbers all differ."""
    three = lambda *values: dict(zip(THREE, (scale * value for value in values)))
    return {"row": name, "policy": "frozen", "budget": 0.85, "n": 200, "accuracy": 0.975, "low": 0.943,
            "high": 0.989, "stderr": 0.011, "flexible": 0.98, "cut": 0, **three(0.149, 0.055, 0.121),
            "prompt": three(0.251, 0.262, 0.213), "answer": three(0.038, 0.047, 0.019), "seconds": 12.3, **changes}


def test_a_row_as_printed():
    """A number under another's title, prompt and answer swapped, a cost without its sign, a part that was not there."""
    assert line_of(row_of()).split() == ("random ranks, gated 0.850 97.5% (94.3-98.9) 98.0% 14.9 25.1 3.8 5.5 26.2 4.7 "
                                         "+12.1 +21.3 +1.9 12.3").split()
    assert line_of(row_of(scale=-1)).split()[-4:-1] == ["-12.1", "-21.3", "-1.9"]
    only_prompt = {key: value for key, value in row_of().items() if key != "answer"}
    assert line_of(only_prompt).split()[-10:] == "14.9 25.1 - 5.5 26.2 - +12.1 +21.3 - 12.3".split()
    assert line_of(row_of(cut=3)) == line_of(row_of()) + "  3 cut"


@pytest.mark.parametrize("row", [row_of(), row_of("dense", 0.0), row_of("GateSkip", -6.6, seconds=9876.5),
                                 row_of("model", accuracy=1.0, low=0.981, high=1.0, flexible=1.0), row_of(answer=None)])
def test_columns_stand_under_their_titles(row):
    """Numbers that have slid away from their titles, or a table that a terminal breaks: each word of the header ends
    where its column ends, and each group's title stands over its three columns."""
    titles, header, line = *HEADER.split("\n"), line_of(row)
    word, group = r"accuracy \(95%\)|\S+", r"\S+(?: \S+)*"
    ends = [m.end() for m in re.finditer(word, header)][1:]      # `row` stands on the left
    assert [m[0] for m in re.finditer(word, header)] == ["row", "budget", "accuracy (95%)", "flexible",
                                                         *["all", "prompt", "answer"] * 3, "sec"]
    values = [m.end() for m in re.finditer(r"\S+ \(\s*\S+\)|\S+", line) if m.start() >= 19]
    assert values == ends and line.startswith(row["row"]) and header.startswith("row")
    assert len(line) == len(header) <= 127 and len(titles) <= 127
    spans = {m[0]: m.span() for m in re.finditer(group, titles)}
    assert list(spans) == ["skipped, %", "averaged per call, %", "MACs saved, %"]
    for number, (left, right) in enumerate(spans.values()):      # ends: budget, accuracy, flexible, then three a group
        before, after = ends[2 + 3 * number], ends[5 + 3 * number]
        assert before <= left and right <= after and abs((left + right) - (before + after)) <= 2


# The whole sweep.

def test_the_rows(folders, tmp_path, capsys):
    """Random skipping on the wrong model, a GateSkip row under another policy, savings that are asked for and not
    measured."""
    result = evaluate(folders, tmp_path, "--budgets", "1.0", "0.9", "0.8", dense=folders["dense"])
    rows = result["rows"]
    assert [(r["row"], r["policy"], r["budget"]) for r in rows] == [
        ("GateSkip", "none", 1.0), ("GateSkip", "frozen", 0.9), ("GateSkip", "frozen", 0.8), ("dense", "none", 1.0),
        ("random, dense", "random", 0.9), ("random, dense", "random", 0.8), ("random ranks, gated", "random", 0.9),
        ("random ranks, gated", "random", 0.8)]
    by = {(r["row"], r["budget"]): r for r in rows}
    gated, dense = by["GateSkip", 1.0], by["dense", 1.0]
    assert gated["skipped"] == dense["skipped"] == dense["macs_saved"] == 0 > gated["macs_saved"]
    for name in ("random, dense", "random ranks, gated"):
        assert by[name, 0.8]["skipped"] == pytest.approx(0.2, abs=0.03)
        assert by[name, 0.9]["skipped"] == pytest.approx(0.1, abs=0.03)
    assert by["random, dense", 0.8]["macs_saved"] > 0.05

    model, tokenizer = load_model(folders["gated"]), load_tokenizer(folders["gated"])
    problems, policy = arithmetic(5, "test"), make_policy(model.config, "frozen", 0.8)
    parts = []                                                   # what the GateSkip row at 0.8 must have done
    for batch in (problems[:3], problems[3:]):
        prompts = [encode_prompt(tokenizer, p.question) for p in batch]
        parts.append(generate(model, prompts, 6, policy, {1}).savings.report())
    for row, reports in [(by["GateSkip", 0.8], parts)] + [
            (by["GateSkip", 0.8][part], [report[part] for report in parts]) for part in ("prompt", "answer")]:
        total = {key: sum(s[key] for s in reports) for key in ("pairs", "calls", "macs", "macs_dense")}
        assert row["macs_saved"] == pytest.approx(1 - total["macs"] / total["macs_dense"])
        assert row["skipped"] == pytest.approx(sum(s["pairs"] * s["skipped"] for s in reports) / total["pairs"])
        assert row["skipped_per_call"] == pytest.approx(
            sum(s["calls"] * s["skipped_per_call"] for s in reports) / total["calls"])

    assert result["settings"]["budgets"] == [1.0, 0.9, 0.8] and result["at_exactly"] == list(TARGETS)
    for name, values in result["interpolated"].items():
        assert values == interpolate([(r["skipped"], r["accuracy"]) for r in rows if r["row"] == name])
        assert result["interpolated_macs"][name] == interpolate(
            [(r["macs_saved"], r["accuracy"]) for r in rows if r["row"] == name])
    assert (tmp_path / "eval.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert f"\n{HEADER}\n" + "".join(line_of(r) + "\n" for r in rows) in printed
    for r in rows:
        assert line_of(r).startswith(f"{r['row']:19} {r['budget']:6.3f} ")
        assert f" {r['accuracy']:.1%} ({100 * r['low']:.1f}-{100 * r['high']:.1f}) " in line_of(r)
        assert (r["low"], r["high"]) == wilson(r["accuracy"], 5) and r["low"] < r["high"]
    assert printed.count("dense                     0.0%      -      -      -      -      -") == 2   # pairs, and MACs
    assert "5 problems of arithmetic" in printed


def test_prompts_and_answers_make_up_the_whole(folders, tmp_path):
    """A saving on the user's side of the page sold as one on ours: the JSON tells both apart, in all rows, and together
    they are the row's own three numbers."""
    rows = evaluate(folders, tmp_path, "--budgets", "1.0", "0.8", dense=folders["dense"])["rows"]
    tokenizer, problems = load_tokenizer(folders["gated"]), arithmetic(5, "test")
    asked = sum(len(encode_prompt(tokenizer, p.question)) for p in problems)                 # prompt tokens
    for r in rows:
        assert set(r["prompt"]) == set(r["answer"]) == set(THREE)
        prompt, answer = r["prompt"]["skipped"], r["answer"]["skipped"]
        for key in ("skipped", "macs_saved"):
            low, high = sorted((r["prompt"][key], r["answer"][key]))
            assert low - 1e-9 <= r[key] <= high + 1e-9
        if prompt != answer:                                     # the share of pairs that were a prompt's
            new = asked * (r["skipped"] - prompt) / (answer - r["skipped"])                  # generated tokens run
            assert new == pytest.approx(round(new), abs=1e-6) and 5 <= round(new) <= 5 * 5
        per_call = (2 * r["prompt"]["skipped_per_call"] + 10 * r["answer"]["skipped_per_call"]) / 12
        assert r["skipped_per_call"] == pytest.approx(per_call)  # two batches: 2 calls for prompts, 5 steps each
    skipping = [r for r in rows if r["budget"] < 1.0]
    assert len(skipping) == 3 and all(r["prompt"] != r["answer"] for r in skipping)


def test_shares_per_branch_are_in_the_file(folders, tmp_path, capsys):
    """Shares of other rows, of prompts and answers together, or of one batch, in the JSON; a table of budgets in
    another order than theirs; hours of measuring once more because a picture was not asked for at first."""
    from_the_start = evaluate(folders, tmp_path / "shown", "--budgets", "0.8", "1.0", "--show-branches")
    printed = capsys.readouterr().out
    assert not list((tmp_path / "shown").glob("b*.png"))
    rows = evaluate(folders, tmp_path, "--budgets", "0.8", "1.0", dense=folders["dense"])["rows"]
    assert "share of tokens that ran" not in capsys.readouterr().out
    model, tokenizer = load_model(folders["gated"]), load_tokenizer(folders["gated"])
    problems, savings = arithmetic(5, "test"), Savings(model.config)
    for batch in (problems[:3], problems[3:]):
        prompts = [encode_prompt(tokenizer, p.question) for p in batch]
        savings += generate(model, prompts, 6, make_policy(model.config, "frozen", 0.8), {1}).savings
    kept = {(r["row"], r["budget"]): r["branches"] for r in rows}
    report, full = savings.report(), {"prompt": [1.0] * 4, "answer": [1.0] * 4}
    mine = {part: [round(share, 4) for share in report[part]["branches"]] for part in ("prompt", "answer")}
    assert kept["GateSkip", 0.8] == mine and mine["prompt"] != mine["answer"]
    assert kept["dense", 1.0] == kept["GateSkip", 1.0] == full
    assert kept["random ranks, gated", 0.8]["prompt"] == pytest.approx([0.8] * 4, abs=0.05)
    assert [r["branches"] for r in from_the_start["rows"][:2]] == [mine, full]

    lines = [*lines_of("GateSkip, budget 1", full), "", *lines_of("GateSkip, budget 0.8", mine)]
    assert "\n\n" + "\n".join(lines) + "\n\nwritten: " in printed
    picture = tmp_path / "b.png"                                 # from the rows that are there
    evaluate(folders, tmp_path, "--budgets", "0.8", "--show-branches", str(picture), dense=folders["dense"])
    printed = capsys.readouterr().out
    assert "to go: 0" in printed and "\n".join(lines) + f"\nwritten: {picture}\n" in printed
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_rows_of_an_earlier_version_say_no_shares(folders, tmp_path, monkeypatch, capsys):
    """A KeyError after the last row of a sweep that was begun before rows had shares, or rows that are missing from the
    picture without a word."""
    monkeypatch.setattr(eval_gsm8k, "plot", lambda rows, path: None)
    result, file = evaluate(folders, tmp_path, "--budgets", "1.0", "0.9"), tmp_path / "eval.json"
    for row in result["rows"]:
        del row["branches"]
    file.write_text(json.dumps(result))
    again = evaluate(folders, tmp_path, "--budgets", "0.8", "--show-branches", str(tmp_path / "b.png"))
    printed, new = capsys.readouterr().out, {(r["row"], r["budget"]): r for r in again["rows"]}["GateSkip", 0.8]
    lack = ("\nno shares per branch in rows of an earlier version: GateSkip 1, GateSkip 0.9 "
            "(--overwrite measures anew)\n")
    assert lack in printed and "\n".join(lines_of("GateSkip, budget 0.8", new["branches"])) in printed
    assert (tmp_path / "b.png").exists()
    file.write_text(json.dumps(result))                          # none has any
    evaluate(folders, tmp_path, "--budgets", "0.9", "--show-branches", str(tmp_path / "c.png"))
    assert lack in (printed := capsys.readouterr().out) and "share of tokens" not in printed
    assert not (tmp_path / "c.png").exists()


def measured(monkeypatch, stop_after=99):
    """Spy on run_row: the list of (row, budget) that it fills; Ctrl-C comes in the row after stop_after."""
    rows = []

    def spy(name, model, tokenizer, examples, policy, budget, args):
        if len(rows) == stop_after:
            raise KeyboardInterrupt
        rows.append((name, budget))
        return run_row(name, model, tokenizer, examples, policy, budget, args)
    monkeypatch.setattr(eval_gsm8k, "run_row", spy)
    return rows


def without_seconds(rows):
    return [{key: value for key, value in r.items() if key != "seconds"} for r in rows]


def test_a_stopped_sweep_goes_on(folders, tmp_path, monkeypatch, capsys):
    """Hours of evaluation that one interruption loses, a stopped sweep that looks complete, rows that are measured
    again or, drawn at random, come out otherwise than in a sweep that nobody stopped."""
    whole = evaluate(folders, tmp_path / "whole", *BUDGETS, dense=folders["dense"])
    measured(monkeypatch, stop_after=6)
    with pytest.raises(KeyboardInterrupt):
        evaluate(folders, tmp_path / "stopped", *BUDGETS, dense=folders["dense"])
    file = tmp_path / "stopped" / "eval.json"
    stopped = json.loads(file.read_text())
    assert without_seconds(stopped["rows"]) == without_seconds(whole["rows"][:6]) and whole["complete"]
    assert stopped["complete"] is False
    assert stopped["missing"] == [[r["row"], r["budget"]] for r in whole["rows"][6:]] and len(whole["rows"]) == 14
    assert capsys.readouterr().err.endswith(f"\ninterrupted: the rows so far are in {file}; the same command goes on\n")

    again = measured(monkeypatch)
    result = evaluate(folders, tmp_path / "stopped", *BUDGETS, dense=folders["dense"])
    assert [list(pair) for pair in again] == stopped["missing"]
    assert without_seconds(result["rows"]) == without_seconds(whole["rows"]) and result["rows"][:6] == stopped["rows"]
    assert result["complete"] is True and result["interpolated"] == whole["interpolated"]
    printed = capsys.readouterr().out
    assert f"rows already in {file}: 6; to go: 8\n" in printed
    assert f"\n{HEADER}\n" + "".join(line_of(r) + "\n" for r in result["rows"]) in printed   # the table is whole
    evaluate(folders, tmp_path / "stopped", *BUDGETS, dense=folders["dense"])
    assert len(again) == 8 and "eval.json: 14; to go: 0\n" in capsys.readouterr().out


def test_fewer_and_more_budgets_share_a_file(folders, tmp_path, monkeypatch, capsys):
    """`--budgets 0.9` that throws the other rows away; a killed sweep that a smaller command calls complete."""
    monkeypatch.setattr(eval_gsm8k, "plot", lambda rows, path: None)
    measured(monkeypatch, stop_after=2)
    with pytest.raises(KeyboardInterrupt):
        evaluate(folders, tmp_path, "--budgets", "1.0", "0.9", "0.8")
    rows = measured(monkeypatch)
    assert evaluate(folders, tmp_path, "--budgets", "0.9", "0.9")["missing"] == [
        ["GateSkip", 0.8], ["random ranks, gated", 0.8]] and rows == [("random ranks, gated", 0.9)]
    assert "; rows that an earlier command lacks still: 2\n" in capsys.readouterr().out
    result = evaluate(folders, tmp_path, "--budgets", "0.85", "0.8", dense=folders["dense"])
    assert result["complete"] and len(result["rows"]) == 10 and "lacks still" not in capsys.readouterr().out


@pytest.mark.parametrize("flags, complaint", [
    (dict(limit=2), "problems 5, now 2"), (dict(seed=1), "seed 0, now 1"), (dict(batch_size=2), "batch size 3, now 2"),
    (dict(max_new_tokens=5), "max new tokens 6, now 5"), (dict(dtype="bfloat16"), "dtype float32, now bfloat16"),
    (dict(policy="batch"), "policy frozen, now batch")])
def test_other_settings_do_not_replace_a_file(folders, tmp_path, monkeypatch, flags, complaint):
    """`--limit 2 --budgets 0.9` over a full evaluation in the model's folder, without a word."""
    monkeypatch.setattr(eval_gsm8k, "plot", lambda rows, path: None)
    before, rows = evaluate(folders, tmp_path, "--budgets", "1.0", "0.9"), measured(monkeypatch)
    with pytest.raises(InputError) as error:
        evaluate(folders, tmp_path, "--budgets", "0.9", **flags)
    assert complaint in str(error.value) and "choose another --out, or --overwrite it" in str(error.value)
    assert not rows and json.loads((tmp_path / "eval.json").read_text()) == before
    after = evaluate(folders, tmp_path, "--budgets", "0.9", "--overwrite", **flags)
    assert len(after["rows"]) == len(rows) == 2


def test_a_model_trained_further_gets_rows_of_its_own(folders, tmp_path, monkeypatch):
    """The old model's accuracy beside the new one's, in one table, because both lay in the same folder."""
    monkeypatch.setattr(eval_gsm8k, "plot", lambda rows, path: None)
    shutil.copytree(folders["gated"], tmp_path / "model")
    evaluate(folders, tmp_path, "--budgets", "1.0", model=tmp_path / "model")
    evaluate(folders, tmp_path, "--budgets", "0.9", model=folders["gated"])                  # a copy is the same model
    model, tokenizer = load_model(tmp_path / "model"), load_tokenizer(tmp_path / "model")
    with torch.no_grad():
        model.model["norm"].weight[0] += 1e-6
    save_model(model, tmp_path / "model", tokenizer)
    with pytest.raises(InputError, match=r"other settings \(model \w{16}, now \w{16}\): choose another --out"):
        evaluate(folders, tmp_path, "--budgets", "0.9", model=tmp_path / "model")


def test_one_evaluation_of_a_folder_at_a_time(folders, tmp_path):
    """Two sweeps that replace each other's rows, or one that measures a run whose steps are being replaced."""
    with only_one(tmp_path):
        with pytest.raises(InputError, match=f"--out {tmp_path} is being written by process"):
            evaluate(folders, tmp_path)
    assert not (tmp_path / "eval.json").exists()


def test_a_folder_that_cannot_be_written_is_said_first(folders, tmp_path, monkeypatch):
    """A read-only --out, found out when the first row is done."""
    monkeypatch.setattr(eval_gsm8k, "load_model", None)          # nothing is loaded
    (tmp_path / "file").touch()
    for out, why in ((tmp_path / "file", "File exists"), (tmp_path / "file" / "out", "Not a directory")):
        with pytest.raises(InputError, match=f"--out {out} cannot be written .{why}.: give another folder"):
            evaluate(folders, out)

    def read_only(dir):
        raise OSError(30, "Read-only file system", "tmp1234")
    monkeypatch.setattr("tempfile.TemporaryFile", read_only)
    with pytest.raises(InputError, match=f"--out {folders['gated']} cannot be written .Read-only file system."):
        main(words(model=folders["gated"], limit=1))             # the default; --model was given, --out is the way out


def test_a_model_without_gates_gives_its_dense_row_only(folders, tmp_path, monkeypatch):
    """Budgets that mean nothing on a model that cannot rank; a crash where 1.0 is not among them."""
    monkeypatch.setattr(eval_gsm8k, "plot", lambda rows, path: None)
    for budgets in (["1.0", "0.8"], ["0.8"]):
        rows = evaluate(folders, tmp_path, "--budgets", *budgets, model=folders["dense"])["rows"]
        assert [(r["row"], r["policy"], r["budget"], r["skipped"]) for r in rows] == [("model", "none", 1.0, 0)]


def test_results_go_beside_a_local_model(folders, tmp_path, monkeypatch):
    """Results of one model that overwrite another's; files of the user's that the tidying of runs takes for its own."""
    monkeypatch.setattr(eval_gsm8k, "plot", lambda rows, path: path.write_text(rows[0]["row"]))
    shutil.copytree(folders["dense"], tmp_path / "model")
    for name in ("latest", "notes.tmp", ".cache", "step-000002"):
        (tmp_path / "model" / name).write_text("not a run's")
    before = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    assert main(words(model=tmp_path / "model", limit=1, max_new_tokens=1, device="cpu")) == 0
    assert (tmp_path / "model" / "eval.json").is_file() and (tmp_path / "model" / "eval.png").read_text() == "model"
    assert before.items() <= {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}.items()


@pytest.fixture
def a_run(folders, tmp_path, monkeypatch):
    """A run's folder that has saved the gated model as step-000002; no pictures are drawn."""
    monkeypatch.setattr(eval_gsm8k, "plot", lambda rows, path: None)
    shutil.copytree(folders["gated"], tmp_path / "run" / "step-000002")
    (tmp_path / "run" / "latest").write_text("step-000002\n")
    (tmp_path / "run" / "metrics.jsonl").write_text("{}\n{}\n")
    return tmp_path / "run"


def test_no_results_in_a_step_that_the_run_deletes(folders, a_run, tmp_path):
    """eval.json in runs/x/step-000080, which the next save of that run deletes with the folder."""
    step, flags = a_run / "step-000002", dict(limit=1, max_new_tokens=1, budgets=1.0, device="cpu")
    (tmp_path / "link").symlink_to(step)
    before = sorted(step.iterdir())
    for given in (step, tmp_path / "link"):
        assert main(words(model=given, **flags)) == 0
        (a_run / "eval.json").unlink()
    for out in (step, step / "eval", tmp_path / "link"):
        with pytest.raises(InputError) as error:
            main(words(model=folders["gated"], out=out, **flags))
        assert str(error.value) == f"--out {out} goes when that run saves its next step: give {a_run}"
    assert sorted(step.iterdir()) == before
    shutil.copytree(step, tmp_path / "kept" / step.name)         # nobody deletes a copy
    assert main(words(model=tmp_path / "kept" / step.name, **flags)) == 0
    assert (tmp_path / "kept" / step.name / "eval.json").is_file()


def test_a_run_that_was_set_aside_comes_back_first(folders, a_run):
    """Rows that are measured while a killed `train.py --overwrite` has the old run set aside: with that run its old
    eval.json comes back, over them."""
    old = evaluate(folders, a_run, "--budgets", "1.0", model=a_run)
    _set_aside(a_run)                                            # and killed
    more = evaluate(folders, a_run, "--budgets", "0.9", model=a_run)
    assert more["rows"][:1] == old["rows"] and len(more["rows"]) == 3
    with held(a_run):                                            # the next train.py
        assert json.loads((a_run / "eval.json").read_text()) == more
    assert sorted(p.name for p in a_run.iterdir()) == [".lock", "eval.json", "latest", "metrics.jsonl", "step-000002"]


@pytest.mark.parametrize("which", ["model", "dense"])
@pytest.mark.parametrize("change", [lambda folder: (folder / "config.json").write_text("{} "), shutil.rmtree])
def test_a_model_replaced_while_it_loads_is_said(folders, tmp_path, monkeypatch, which, change):
    """The old model's accuracy kept under the digest of the one that replaced it, or of no file at all."""
    copies = {name: shutil.copytree(folders[kind], tmp_path / name) for name, kind in (("model", "gated"),
                                                                                      ("dense", "dense"))}
    def load_and_change(folder, **flags):
        model = load_model(folder, **flags)
        change(copies[which]) if model.source == copies[which] else None
        return model
    monkeypatch.setattr(eval_gsm8k, "load_model", load_and_change)
    with pytest.raises(InputError) as error:
        evaluate(folders, tmp_path / "out", "--budgets", "1.0", **copies)
    assert "replaced while it was loaded: start again" in str(error.value) or "no model lies there" in str(error.value)
    assert str(copies[which]) in str(error.value) and not (tmp_path / "out" / "eval.json").exists()


def test_a_comparison_with_other_problems_is_said(folders, tmp_path, monkeypatch, capsys):
    """Accuracy on 2 problems drawn beside accuracy on 5 others in one picture, without a word."""
    monkeypatch.setattr(eval_gsm8k, "plot", lambda rows, path: None)
    evaluate(folders, tmp_path / "same", "--budgets", "1.0", seed=1)
    evaluate(folders, tmp_path / "less", "--budgets", "1.0", limit=2, max_new_tokens=5)
    files = [str(tmp_path / name / "eval.json") for name in ("same", "less")]
    capsys.readouterr()
    evaluate(folders, tmp_path, "--budgets", "1.0", "--compare", *files)
    caution, = (line for line in capsys.readouterr().err.splitlines() if "CAUTION" in line)
    assert re.fullmatch(rf"CAUTION: --compare {files[1]} was measured otherwise \(data \w{{16}}, here \w{{16}}; "
                        r"problems 2, here 5; max new tokens 5, here 6\)", caution)


def test_other_runs_join_the_picture(folders, tmp_path, monkeypatch):
    """A comparison that draws the other run's baselines too, or mixes the rows into this run's table; a foreign file
    with a traceback."""
    drawn, other = [], tmp_path / "other.json"
    short = lambda rows: [(r["row"], round(r["skipped"], 1)) for r in rows]
    monkeypatch.setattr(eval_gsm8k, "plot", lambda rows, path: drawn.append(short(rows)))
    row = {"row": "GateSkip", "budget": 0.9, "skipped": 0.1, "accuracy": 0.5, "stderr": 0.1, "macs_saved": 0.0, "n": 5}
    other.write_text(json.dumps({"settings": {"model": "runs/linear"}, "rows": [row, {**row, "row": "dense"}]}))
    result = evaluate(folders, tmp_path, "--budgets", "0.8", "--compare", str(other))
    assert drawn == [[(f"GateSkip, {folders['gated'].name}", 0.2), ("random ranks, gated", 0.2),
                      ("GateSkip, linear", 0.1)]]
    assert len(result["rows"]) == 2
    for bad in ('{"rows": []}', "[]", "{", '{"settings": {"model": "x"}, "rows": [{"row": "GateSkip"}]}'):
        other.write_text(bad)
        with pytest.raises(InputError, match="other.json"):
            evaluate(folders, tmp_path / "new", "--compare", str(other))


def test_the_pictures_error_bars_are_the_intervals(tmp_path, monkeypatch):
    """No bar at 0% and at 100%; a bar below 0%; another run's rows, of an earlier version, that cannot be drawn."""
    from matplotlib.axes import Axes
    bars = []
    monkeypatch.setattr(Axes, "errorbar", lambda self, x, y, error, **_: bars.append((x, y, error)))
    old = {"row": "GateSkip, linear", "skipped": 0.1, "macs_saved": 0.2, "accuracy": 0.0, "n": 20.0}
    monkeypatch.setattr(Axes, "legend", lambda self: None)       # there is nothing in it now
    plot([row_of("dense", accuracy=81 / 263, n=263), row_of("dense", accuracy=1.0, n=20, skipped=0.3), old],
         tmp_path / "eval.png")
    (x, y, (below, above)), _, (_, old_y, (old_below, old_above)), (macs, *_) = bars
    assert (x, y) == (pytest.approx([14.9, 30.0]), pytest.approx([100 * 81 / 263, 100.0]))
    assert below == pytest.approx([100 * 81 / 263 - 25.53, 16.11], abs=0.01)
    assert above == pytest.approx([36.62 - 100 * 81 / 263, 0.0], abs=0.01) and min(below + above) >= 0
    assert (old_y, macs) == ([0.0], [20.0]) and (old_below, old_above) == ([0.0], pytest.approx([16.11], abs=0.01))


def test_no_picture_without_matplotlib(tmp_path, monkeypatch, capsys):
    """A traceback after hours of evaluation because matplotlib is missing."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert not plot([], tmp_path / "eval.png")
    assert capsys.readouterr().out == "no picture: matplotlib is not installed (pip install matplotlib)\n"
    assert not list(tmp_path.iterdir())


def test_only_what_is_written_is_named(folders, tmp_path, monkeypatch, capsys):
    """`written: eval.json, eval.png` where no picture was drawn."""
    evaluate(folders, tmp_path, "--budgets", "1.0")
    file, picture = tmp_path / "eval.json", tmp_path / "eval.png"
    assert f"\nwritten: {file}, {picture}\n" in capsys.readouterr().out
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    evaluate(folders, tmp_path, "--budgets", "1.0")
    assert f"\nwritten: {file}\n" in capsys.readouterr().out


def test_half_a_picture_replaces_none(tmp_path, monkeypatch):
    """A disk that fills up, or a kill, while the picture is written over the old one."""
    from matplotlib.figure import Figure

    def half(self, file, **_):
        with file if hasattr(file, "write") else open(file, "wb") as opened:
            opened.write(b"half")
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(Figure, "savefig", half)
    (tmp_path / "eval.png").write_bytes(b"old")
    with pytest.raises(OSError, match="No space left"):
        plot([row_of()], tmp_path / "eval.png")
    assert (tmp_path / "eval.png").read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("name", ["GateSkip, \udcff", r"GateSkip, a$\b$", "GateSkip, $5"])
def test_every_name_can_be_drawn(tmp_path, monkeypatch, name):
    """A traceback after the last row: a model's folder whose name is no UTF-8, or a formula to matplotlib."""
    from matplotlib.figure import Figure
    texts, savefig = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **flags: (
        texts.append(self.axes[0].get_legend().get_texts()[0].get_text()), savefig(self, *args, **flags)))
    assert plot([row_of(name)], tmp_path / "eval.png")
    assert (tmp_path / "eval.png").read_bytes().startswith(b"\x89PNG")
    assert texts == [name.replace("\udcff", "?").replace("$", r"\$")]


def test_questions_of_a_file(folders, tmp_path, monkeypatch):
    """Files that are read past --limit, or whose gold answers never reach the score."""
    monkeypatch.setattr(eval_gsm8k, "plot", lambda rows, path: None)
    rows = [{"question": p.question, "answer": f"{p.reasoning}\n#### {p.answer}"} for p in arithmetic(4)]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer, golds = load_tokenizer(folders["gated"]), [row["answer"].split("#### ")[1] for row in rows]
    known = [encode_prompt(tokenizer, row["question"]) for row in rows]

    def right(model, prompts, *_):
        new = [tokenizer.encode(f"#### {golds[known.index(p)]}", add_special_tokens=False).ids for p in prompts]
        return Generation(new, generate(model, [[5]], 1).savings, [])
    monkeypatch.setattr(eval_gsm8k, "generate", right)
    result = evaluate(folders, tmp_path, "--budgets", "1", data=tmp_path / "test.jsonl", limit=3)["rows"][0]
    assert (result["n"], result["accuracy"], result["flexible"], result["stderr"]) == (3, 1.0, 1.0, 0.0)


def test_cut_answers_are_said(folders, tmp_path, monkeypatch, capsys):
    """`--max-new-tokens 8`, and 0.0% without a word: the answers stop before they come to the number."""
    row = evaluate(folders, tmp_path / "cut", "--budgets", "1.0")["rows"][0]                 # it never ends by itself
    cut = capsys.readouterr().out
    assert row["cut"] == 5 and f"\n{line_of(row)}\n" in cut and line_of(row).endswith("  5 cut")
    assert "cut: how many answers had not ended after --max-new-tokens 6; raise it\n" in cut
    savings = generate(load_model(folders["gated"]), [[5]], 1).savings
    monkeypatch.setattr(eval_gsm8k, "generate", lambda model, prompts, *_: Generation([[5, 1] for _ in prompts],
                                                                                      savings, []))
    assert evaluate(folders, tmp_path / "ended", "--budgets", "1.0")["rows"][0]["cut"] == 0
    assert " cut" not in capsys.readouterr().out


def test_golds_that_nothing_can_equal_are_said(folders, tmp_path, monkeypatch, capsys):
    """A data set whose answers cannot be recognised: hours of work for a 0% that was certain before."""
    monkeypatch.setattr(eval_gsm8k, "plot", lambda rows, path: None)
    bad = {"question": "Why?", "answer": "#### 5 at first\n#### 7"}
    golds = ("$18", "50%", "3/4", "12 apples", "F", "a")
    good = [{"question": "Why?", "answer": f"So.\n#### {gold}"} for gold in golds]
    data = tmp_path / "test.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in (*good, bad)))
    assert evaluate(folders, tmp_path, "--budgets", "1", data=data, limit=9)["rows"][0]["n"] == 7
    assert "7 problems of " in (printed := capsys.readouterr().out)
    assert "; CAUTION: gold answers that can never count: 1, such as '7', batches of 3\n" in printed
    data.write_text(json.dumps(bad) + "\n")
    monkeypatch.setattr(eval_gsm8k, "load_model", None)          # nothing is loaded
    with pytest.raises(InputError, match="no answer could ever count, such as '7'"):
        evaluate(folders, tmp_path, "--budgets", "1", data=data)


@pytest.mark.parametrize("flags, complaint", [
    (dict(budgets=0), "--budgets: budget 0.0"), (dict(budgets="nan"), "--budgets: budget nan"),
    (dict(limit=0), "--limit: '0'"), (dict(compare="gone.json"), "gone.json"),
    (dict(batch_size=0), "--batch-size: '0'"), (dict(max_new_tokens=0), "--max-new-tokens: '0'"),
    (dict(data="gone.jsonl"), "gone.jsonl"), (dict(model="gone"), "gone does not exist"),
    (dict(budgets=0.5), "smallest calibrated"), (dict(max_new_tokens=600), "--max-new-tokens 600: lower it"),
])
def test_bad_flags_are_told_in_one_line(folders, tmp_path, flags, complaint):
    """A table of something else than asked, or a traceback."""
    with pytest.raises(InputError) as error:
        evaluate(folders, tmp_path / "out", **flags)
    assert complaint in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "out" / "eval.json").exists()


def test_nothing_is_measured_before_every_budget_is_known_to_run(folders, tmp_path):
    """A table that ends in an error at its last budget, over the complete one of an earlier run; default budgets that
    fail by default."""
    before = evaluate(folders, tmp_path, "--budgets", "1.0", "0.9")
    with pytest.raises(InputError, match="smallest calibrated"):
        evaluate(folders, tmp_path, "--budgets", "1.0", "0.3")
    assert json.loads((tmp_path / "eval.json").read_text()) == before
    known = sorted(map(float, load_model(folders["gated"]).config.gateskip["thresholds"]), reverse=True)
    assert evaluate(folders, tmp_path)["settings"]["budgets"] == known and len(known) > 1


def test_questions_too_long_for_the_model_are_said(folders, tmp_path, capsys, monkeypatch):
    """One long question that ends the whole evaluation, or is dropped in silence."""
    monkeypatch.setattr(eval_gsm8k, "plot", lambda rows, path: None)
    rows = [{"question": "Why? " * n, "answer": "#### 1"} for n in (1, 600, 2)]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert evaluate(folders, tmp_path, "--budgets", "1", data=tmp_path / "test.jsonl")["rows"][0]["n"] == 2
    printed = capsys.readouterr().out
    assert "2 problems of" in printed and "; 1 left out, longer than 506 tokens" in printed


def test_a_gated_model_is_not_the_dense_one(folders, tmp_path):
    """A baseline that has gates itself."""
    with pytest.raises(InputError, match="has gates: give the model without them"):
        evaluate(folders, tmp_path, dense=folders["gated"])


def test_plain_text_ends_the_program_with_one_line(folders, tmp_path):
    """Accuracy over documents, which have no answers; an exit code of 0, or a traceback."""
    (tmp_path / "notes.txt").write_text("one\n\ntwo\n")
    done = subprocess.run([sys.executable, ROOT / "eval_gsm8k.py", "--model", folders["gated"], "--data", "notes.txt"],
                          capture_output=True, text=True, timeout=600, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: --data notes.txt is plain text: accuracy needs questions with answers\n"


def test_a_terminal_that_lacks_characters(folders, tmp_path):
    """A UnicodeEncodeError on a cp1252 console, at the first line that names a file or shows an answer."""
    data = tmp_path / "\u03a9.jsonl"
    golds = ("\u2192\u00e9\n5", "7")                            # the first can never count, and is shown
    data.write_text("".join(json.dumps({"question": "Why?", "reasoning": "So.", "answer": gold}) + "\n"
                            for gold in golds))
    flags = words(model=folders["gated"], data=data, out=tmp_path / "\u4e2d", limit=2, max_new_tokens=2, device="cpu",
                  budgets=0.9)
    done = subprocess.run([sys.executable, ROOT / "eval_gsm8k.py", *flags], capture_output=True, timeout=600,
                          env={**os.environ, "PYTHONIOENCODING": "cp1252"})
    printed, told = done.stdout.decode("cp1252"), done.stderr.decode("cp1252")
    assert done.returncode == 0 and "Traceback" not in told, told
    assert "?.jsonl; CAUTION: gold answers that can never count: 1, such as '?\u00e9\\n5'" in printed
    assert "written: " in printed and (tmp_path / "\u4e2d" / "eval.json").is_file()
