"""Tests of eval_gsm8k.py: reading an answer, interpolating, scoring a row, and the table, the JSON and the picture."""
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import eval_gsm8k
from conftest import build
from console import InputError
from data import encode_prompt
from eval_gsm8k import HEADER, TARGETS, extract_answer, interpolate, line_of, main, normalise, plot, run_row
from gates import GateConfig, SkipPolicy
from generate import Generation, generate
from load_weights import load_model, load_tokenizer, new_model, read_json, save_model
from problems import Example, arithmetic
from savings import Savings
from thresholds import calibrate, make_policy

ROOT = Path(__file__).parents[1]
TOY = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{"gated": a calibrated model, "dense": another one without gates}."""
    base, folders = tmp_path_factory.mktemp("models"), {}
    for name, gate in (("gated", GateConfig(form="scalar")), ("dense", None)):
        folders[name] = path = base / name
        path.mkdir()
        (path / "config.json").write_text(json.dumps(read_json(ROOT / "examples/tiny-llama/config.json") | TOY))
        shutil.copy(ROOT / "examples/tiny-llama/tokenizer.json", path)
        model, tokenizer = new_model(path / "config.json", gate), load_tokenizer(path)
        model.load_state_dict(build(model.config, dtype=torch.float32).state_dict())
        if gate is not None:
            sequences = [encode_prompt(tokenizer, problem.question) for problem in arithmetic(8, "calibration")]
            model.config.gateskip = dict(skip="all", kv="copy_up", budget_end=0.8) | calibrate(
                model, sequences, [1.0, 0.8]
            )
        save_model(model, path, tokenizer)
    return folders


def evaluate(folders, out, *more, **flags):
    flags = dict(model=folders["gated"], out=out, limit=5, batch_size=3, max_new_tokens=6, device="cpu") | flags
    assert (
        main([w for name, value in flags.items() for w in (f"--{name.replace('_', '-')}", str(value))] + list(more))
        == 0
    )
    return json.loads((out / "eval.json").read_text())


# Reading an answer.


@pytest.mark.parametrize(
    "text, strict, flexible",
    [
        ("He pays 3 * 6 = $18.\n#### 18", "18", "18"),
        ("#### 1,234.", "1234", "1234"),
        ("The answer is 42.", None, "42"),
        ("#### $18", None, "18"),
        ("#### 18.00", "18.00", "18.00"),
        ("#### -7\n", "-7", "-7"),
        ("#### B", "b", None),
        ("#### B.", "b", None),
        ("#### Because", None, None),
        ("#### 5 apples, so 6\n#### 7", "5", "7"),
        (" 4 + 4 = 8\n#### 8\nQuestion: 9? #### 9", "8", "8"),
        ("####18", None, "18"),
        ("", None, None),
        ("no number at all", None, None),
        ("#### 3.5", "3.5", "3.5"),
        ("it costs $1,200.", None, "1200"),
    ],
)
def test_answers_are_read_as_the_harness_reads_them(text, strict, flexible):
    """A dollar sign or a comma that makes a right answer wrong, the last #### in place of the first, a number out of
    a new question."""
    assert extract_answer(text) == strict and extract_answer(text, flexible=True) == flexible


def test_gold_answers_are_normalised_alike():
    """1,000 in the data that 1000 in the text does not match; 18.00 that is taken for 18."""
    assert normalise("1,000") == normalise("1000.") == normalise(" $1,000") == "1000" and normalise("C") == "c"
    assert extract_answer("#### 18.00") != normalise("18")


# Accuracy at exactly so much skipped.

def test_interpolation_by_hand():
    """A clamp where nothing was measured, points taken in the order of the file, a knot that is missed by a rounding
    error."""
    a, c = 0.9, 0.5
    assert interpolate([(0.0, a), (0.4, c)], (0.1,)) == pytest.approx([a + (c - a) / 4])
    knots = [(0.3, 0.2), (0.0, 0.8), (0.1 + 0.2 - 0.2, 0.6)]     # unsorted; the last is not quite 0.1
    assert interpolate(knots, (0.0, 0.1, 0.3)) == [0.8, 0.6, 0.2]
    assert interpolate(knots, (0.05, 0.2)) == pytest.approx([0.7, 0.4])
    assert interpolate(knots, (-0.01, 0.31)) == [None, None] == interpolate([], (0.0, 0.1))
    assert interpolate([(0.2, 0.4), (0.0, 1.0), (0.2, 0.6)], (0.1, 0.2)) == pytest.approx(
        [0.75, 0.5]
    )  # the same saving twice: their mean
    assert interpolate([(0.0, 0.7)]) == [0.7] + [None] * 5 and TARGETS == (0.0, 0.05, 0.10, 0.15, 0.20, 0.25)


# One row.

def test_a_row_of_known_answers(folders, monkeypatch):
    """Scores of one batch counted for another, a standard error without its root, savings averaged over batches of
    unequal size."""
    tokenizer = load_tokenizer(folders["gated"])
    examples = [Example(f"q{i}", "", gold) for i, gold in enumerate(("18", "1,234", "-3", "7", "9"))]
    replies = ["#### 18", "so 1234", " 5 - 8 = -3\n#### -3.", "#### 8", "#### 9"]
    asked, savings = [], []
    for parts in (
        {"prompt": (60, 70, 0.1, 1, 500, 600), "answer": (30, 30, 0.7, 3, 400, 400)},  # kept, pairs, per
        {"prompt": (150, 250, 0.5, 1, 2000, 2400), "answer": (60, 50, 0.2, 1, 500, 600)},
    ):  # call, calls, MACs
        savings.append(Savings(None))
        savings[-1].sums = {name: torch.tensor(sums, dtype=torch.float64) for name, sums in parts.items()}

    def fake(model, prompts, max_new_tokens, policy, eos_ids):
        first = len([p for batch in asked for p in batch])
        asked.append(prompts)
        assert (max_new_tokens, policy.kind, eos_ids) == (6, "random", {1})
        new = [tokenizer.encode(r, add_special_tokens=False).ids + [1] for r in replies[first:first + len(prompts)]]
        return Generation(new, savings[len(asked) - 1], [])
    monkeypatch.setattr(eval_gsm8k, "generate", fake)
    row = run_row("random, dense", load_model(folders["dense"]), tokenizer, examples, SkipPolicy("random", 0.8), 0.8,
                  SimpleNamespace(batch_size=3, max_new_tokens=6))
    assert [len(batch) for batch in asked] == [3, 2] and asked[1][1] == encode_prompt(tokenizer, "q4")
    assert row.pop("seconds") >= 0
    three = lambda *values: pytest.approx(dict(zip(("skipped", "skipped_per_call", "macs_saved"), values)))
    assert row.pop("prompt") == three(110 / 320, 0.6 / 2, 1 - 2500 / 3000)
    assert row.pop("answer") == three(-10 / 80, 0.9 / 4, 1 - 900 / 1000)
    assert row == pytest.approx(
        {
            "row": "random, dense",
            "policy": "random",
            "budget": 0.8,
            "n": 5,
            "accuracy": 3 / 5,
            "flexible": 4 / 5,
            "stderr": (0.6 * 0.4 / 5) ** 0.5,
            "skipped": 100 / 400,
            "skipped_per_call": 1.5 / 6,
            "macs_saved": 1 - 3400 / 4000,
        }
    )


# The whole sweep.

def test_the_rows(folders, tmp_path, capsys):
    """Random skipping on the wrong model, a GateSkip row under another policy, savings that are asked for and not
    measured."""
    result = evaluate(folders, tmp_path, "--budgets", "1.0", "0.9", "0.8", dense=folders["dense"])
    rows = result["rows"]
    assert [(r["row"], r["policy"], r["budget"]) for r in rows] == [
        ("GateSkip", "none", 1.0),
        ("GateSkip", "frozen", 0.9),
        ("GateSkip", "frozen", 0.8),
        ("dense", "none", 1.0),
        ("random, dense", "random", 0.9),
        ("random, dense", "random", 0.8),
        ("random ranks, gated", "random", 0.9),
        ("random ranks, gated", "random", 0.8),
    ]
    by = {(r["row"], r["budget"]): r for r in rows}
    assert (
        by["GateSkip", 1.0]["skipped"]
        == by["dense", 1.0]["skipped"]
        == by["dense", 1.0]["macs_saved"]
        == 0
        > by["GateSkip", 1.0]["macs_saved"]
    )
    for name in ("random, dense", "random ranks, gated"):
        assert by[name, 0.8]["skipped"] == pytest.approx(0.2, abs=0.03) and by[name, 0.9]["skipped"] == pytest.approx(
            0.1, abs=0.03
        )
    assert by["random, dense", 0.8]["macs_saved"] > 0.05
    model, tokenizer = load_model(folders["gated"]), load_tokenizer(folders["gated"])
    problems = arithmetic(5, "test")                             # what the GateSkip row at 0.8 must have done
    parts = [
        generate(
            model,
            [encode_prompt(tokenizer, p.question) for p in batch],
            6,
            make_policy(model.config, "frozen", 0.8),
            {1},
        ).savings.report()
        for batch in (problems[:3], problems[3:])
    ]
    assert by["GateSkip", 0.8]["macs_saved"] == pytest.approx(
        1 - sum(s["macs"] for s in parts) / sum(s["macs_dense"] for s in parts)
    )
    assert by["GateSkip", 0.8]["skipped"] == pytest.approx(
        sum(s["pairs"] * s["skipped"] for s in parts) / sum(s["pairs"] for s in parts)
    )

    assert result["settings"]["budgets"] == [1.0, 0.9, 0.8] and result["at_exactly"] == list(TARGETS)
    for name, values in result["interpolated"].items():
        assert values == interpolate([(r["skipped"], r["accuracy"]) for r in rows if r["row"] == name])
    assert (tmp_path / "eval.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    for r in rows:
        assert line_of(r) in printed and HEADER in printed
        for part in (r, r["prompt"], r["answer"]):               # the three numbers, for all tokens and apart
            assert f"{100 * part['skipped']:7.1f}" in line_of(r) and f"{100 * part['macs_saved']:+7.1f}" in line_of(r)
        assert line_of(r).startswith(f"{r['row']:19} {r['budget']:6.3f} {r['accuracy']:7.1%} ({r['stderr']:4.1%})")
    assert (
        "dense                     0.0%      -      -      -      -      -\n" in printed
        and "5 problems of arithmetic" in printed
    )


def test_the_json_is_complete_after_each_row(folders, tmp_path, monkeypatch):
    """Hours of evaluation that one interruption loses."""
    rows = []

    def spoilt(name, model, tokenizer, examples, policy, budget, args):
        if len(rows) == 2:
            raise KeyboardInterrupt
        if rows:
            assert json.loads((tmp_path / "eval.json").read_text())["rows"] == rows
        rows.append(
            dict(
                row=name,
                policy=policy.kind,
                budget=budget,
                n=5,
                accuracy=0.5,
                stderr=0.1,
                flexible=0.5,
                skipped=1 - budget,
                skipped_per_call=0.0,
                macs_saved=0.0,
                seconds=0.1,
            )
        )
        return rows[-1]
    monkeypatch.setattr(eval_gsm8k, "run_row", spoilt)
    with pytest.raises(KeyboardInterrupt):
        evaluate(folders, tmp_path)
    assert json.loads((tmp_path / "eval.json").read_text())["rows"] == rows and len(rows) == 2


def test_a_model_without_gates_gives_its_dense_row_only(folders, tmp_path, capsys, monkeypatch):
    """Budgets that mean nothing on a model that cannot rank; a crash where 1.0 is not among them."""
    monkeypatch.setattr(eval_gsm8k, "plot", lambda rows, path: None)
    for budgets in (["1.0", "0.8"], ["0.8"]):
        rows = evaluate(folders, tmp_path, "--budgets", *budgets, model=folders["dense"])["rows"]
        assert [(r["row"], r["policy"], r["budget"], r["skipped"]) for r in rows] == [("model", "none", 1.0, 0)]


def test_results_go_beside_a_local_model(folders, tmp_path, monkeypatch):
    """Results of one model that overwrite another's."""
    monkeypatch.setattr(eval_gsm8k, "plot", lambda rows, path: path.write_text(rows[0]["row"]))
    shutil.copytree(folders["dense"], tmp_path / "model")
    assert main(["--model", str(tmp_path / "model"), "--limit", "1", "--max-new-tokens", "1", "--device", "cpu"]) == 0
    assert (tmp_path / "model" / "eval.json").is_file() and (tmp_path / "model" / "eval.png").read_text() == "model"


def test_other_runs_join_the_picture(folders, tmp_path, monkeypatch):
    """A comparison that draws the other run's baselines too, or mixes the rows into this run's table; a foreign file
    with a traceback."""
    drawn = []
    monkeypatch.setattr(
        eval_gsm8k, "plot", lambda rows, path: drawn.append([(r["row"], round(r["skipped"], 1)) for r in rows])
    )
    row = {"row": "GateSkip", "budget": 0.9, "skipped": 0.1, "accuracy": 0.5, "stderr": 0.1, "macs_saved": 0.0, "n": 5}
    (tmp_path / "other.json").write_text(
        json.dumps({"settings": {"model": "runs/linear"}, "rows": [row, {**row, "row": "dense"}]})
    )
    result = evaluate(folders, tmp_path, "--budgets", "0.8", "--compare", str(tmp_path / "other.json"))
    assert (
        drawn
        == [[(f"GateSkip, {folders['gated'].name}", 0.2), ("random ranks, gated", 0.2), ("GateSkip, linear", 0.1)]]
        and len(result["rows"]) == 2
    )
    for bad in ('{"rows": []}', "[]", "{", '{"settings": {"model": "x"}, "rows": [{"row": "GateSkip"}]}'):
        (tmp_path / "other.json").write_text(bad)
        with pytest.raises(InputError, match="other.json"):
            evaluate(folders, tmp_path / "new", "--compare", str(tmp_path / "other.json"))


def test_no_picture_without_matplotlib(folders, tmp_path, monkeypatch, capsys):
    """A traceback after hours of evaluation because matplotlib is missing."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    plot([], tmp_path / "eval.png")
    assert capsys.readouterr().out == "no picture: matplotlib is not installed (pip install matplotlib)\n" and not list(
        tmp_path.iterdir()
    )


def test_questions_of_a_file(folders, tmp_path, monkeypatch):
    """Files that are read past --limit, or whose gold answers never reach the score."""
    monkeypatch.setattr(eval_gsm8k, "plot", lambda rows, path: None)
    rows = [{"question": p.question, "answer": f"{p.reasoning}\n#### {p.answer}"} for p in arithmetic(4)]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer, golds = load_tokenizer(folders["gated"]), [row["answer"].split("#### ")[1] for row in rows]

    def right(model, prompts, *_):
        asked = [
            next(i for i, row in enumerate(rows) if encode_prompt(tokenizer, row["question"]) == p) for p in prompts
        ]
        return Generation(
            [tokenizer.encode(f"#### {golds[i]}", add_special_tokens=False).ids for i in asked],
            generate(model, [[5]], 1).savings,
            [],
        )
    monkeypatch.setattr(eval_gsm8k, "generate", right)
    result = evaluate(folders, tmp_path, "--budgets", "1", data=tmp_path / "test.jsonl", limit=3)["rows"][0]
    assert (result["n"], result["accuracy"], result["flexible"], result["stderr"]) == (3, 1.0, 1.0, 0.0)


@pytest.mark.parametrize(
    "flags, complaint",
    [
        (dict(budgets=0), "budget 0.0"),
        (dict(budgets="nan"), "budget nan"),
        (dict(limit=0), "--limit"),
        (dict(batch_size=0), "--batch-size"),
        (dict(max_new_tokens=0), "--max-new-tokens"),
        (dict(data="gone.jsonl"), "gone.jsonl"),
        (dict(model="gone"), "gone does not exist"),
        (dict(budgets=0.5), "smallest calibrated"),
        (dict(max_new_tokens=600), "--max-new-tokens 600: lower it"),
    ],
)
def test_bad_flags_are_told_in_one_line(folders, tmp_path, flags, complaint):
    """A table of something else than asked, or a traceback."""
    with pytest.raises(InputError) as error:
        evaluate(folders, tmp_path / "out", **flags)
    assert (
        complaint in str(error.value) and "\n" not in str(error.value) and not (tmp_path / "out" / "eval.json").exists()
    )


def test_nothing_is_measured_before_every_budget_is_known_to_run(folders, tmp_path):
    """A table that ends in an error at its last budget, over the complete one of an earlier run; default budgets that
    fail by default."""
    before = evaluate(folders, tmp_path, "--budgets", "1.0", "0.9")
    with pytest.raises(InputError, match="smallest calibrated"):
        evaluate(folders, tmp_path, "--budgets", "1.0", "0.3")
    assert json.loads((tmp_path / "eval.json").read_text()) == before
    lowest = min(map(float, load_model(folders["gated"]).config.gateskip["thresholds"]))
    assert evaluate(folders, tmp_path)["settings"]["budgets"] == [b for b in eval_gsm8k.BUDGETS if b >= lowest] != []


def test_questions_too_long_for_the_model_are_said(folders, tmp_path, capsys, monkeypatch):
    """One long question that ends the whole evaluation, or is dropped in silence."""
    monkeypatch.setattr(eval_gsm8k, "plot", lambda rows, path: None)
    rows = [{"question": "Why? " * n, "answer": "#### 1"} for n in (1, 600, 2)]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert evaluate(folders, tmp_path, "--budgets", "1", data=tmp_path / "test.jsonl")["rows"][0]["n"] == 2
    assert "2 problems of" in (printed := capsys.readouterr().out) and "; 1 left out, longer than 506 tokens" in printed


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
