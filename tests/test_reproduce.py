"""reproduce.sh: its commands in order, at toy size, what it does after a stop, and what can be had."""
import bz2
import json
import os
import shlex
import subprocess
import sys

import pytest
import torch

import budgets
import train
from conftest import complaint
from load_weights import save_model
from problems import arithmetic
from toy_runs import ROOT, toy

sys.path.insert(0, str(ROOT / "paper"))

import can_be_had
import evaluate
import task_scores
from tasks import STEM, SUBJECTS

SMALL = {"train.py": "--steps 2 --batch-size 2 --seq-len 160 --warmup 1 --eval-limit 4 --device cpu --calibrate 0.9",
         "paper/evaluate.py": "--limit 1 --shots 0 --max-new-tokens 2"}
LOGGED = """#!/bin/sh
{ printf "'%s' " "$@"; echo; } >> "$LOG"
[ "$1" != "$STOP_AT" ]
"""


@pytest.fixture
def script(tmp_path, monkeypatch):
    """run(*arguments) -> the commands that the script gave, which did nothing: `python` writes them down."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_text(LOGGED)
    (tmp_path / "bin" / "python").chmod(0o755)
    for name, value in dict(LOG=tmp_path / "log", DATA=tmp_path / "data", RUNS=tmp_path / "runs",
                            PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}").items():
        monkeypatch.setenv(name, str(value))

    def run(*arguments, code=0, **environment):
        (tmp_path / "log").write_text("")
        done = subprocess.run(["bash", "paper/reproduce.sh", *arguments], cwd=ROOT, capture_output=True, text=True,
                              env={**os.environ, **environment})
        assert done.returncode == code, done.stderr
        run.printed = done.stdout + done.stderr
        return [shlex.split(line) for line in (tmp_path / "log").read_text().splitlines()]
    return run


def write_data(folder):
    """Two rows or more of every data set, in the formats in which they were published."""
    lines = lambda rows: "".join(json.dumps(row) + "\n" for row in rows)
    problems = [{"question": e.question, "answer": f"{e.reasoning}\n#### {e.answer}"} for e in arithmetic(40)]
    page = "a man is sitting\n1\none\ntwo\nthree\nfour\n" * 2
    csqa = {"question": "q", "choices": {"label": list("ABCDE"), "text": list("vwxyz")}, "answerKey": "C"}
    stem = "ID\tQuestion Stem\tChoices\tComplete Question\tAnswer Key\n1\ta stem\t(A) x (B) y (C) u (D) v\tall\tB\n"
    gap = {"sentence": "The _ is red.", "option1": "pen", "option2": "book", "answer": "2"}
    pens = {"goal": "write", "sol1": "pen", "sol2": "book"}
    files = {"traces.jsonl": lines(problems), "fineweb.jsonl": lines({"text": p["question"] * 3} for p in problems),
             "wmt16.jsonl": lines({"text": p["question"]} for p in problems), "test.jsonl": lines(problems[:2]),
             "hellaswag_val_full.txt.bz2": bz2.compress(page.encode()), "dev_rand_split.jsonl": lines([csqa] * 2),
             "piqa_valid.jsonl": lines([pens] * 2), "piqa_valid-labels.lst": "1\n0\n", "test.tsv": stem,
             "dev.jsonl": lines([gap] * 2), "lambada_test.jsonl": lines([{"text": "Tom has red pens"}] * 2),
             **{f"test/{name}_test.csv": "question,choice0,choice1,choice2,choice3,answer\nq,1,2,3,4,2\n"
                for name in SUBJECTS}}
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    import pyarrow
    from pyarrow import parquet
    (folder / "ro-en").mkdir()
    parquet.write_table(pyarrow.Table.from_pylist([{"translation": {"en": "a pen", "ro": "un stilou"}}] * 2),
                        folder / "ro-en" / "test-00000-of-00001.parquet")


def test_every_command_at_toy_size(script, tmp_path, monkeypatch):
    """A flag that has gone, a run that is read before it is made, a task whose data has another name."""
    write_data(tmp_path / "data")
    torch.manual_seed(0)
    model, tokenizer = toy(tmp_path / "base")
    save_model(model, tmp_path / "base", tokenizer)
    monkeypatch.setattr(budgets, "CONTINUE", 2)
    monkeypatch.setattr(train, "HELD_OUT", 2)
    commands = script("llama-3.2-1b", MODEL=str(tmp_path / "base"))
    assert [c[0] for c in commands] == ["train.py"] * 4 + ["paper/evaluate.py"] * 11
    for name, *argv in commands:
        main = train.main if name == "train.py" else evaluate.main
        if name == "train.py" and "--steps" in argv:
            assert "fineweb" in " ".join(argv)
        assert main(argv + shlex.split(SMALL[name])) == 0, argv
    results = {path.stem: json.loads(path.read_text())["rows"]
               for path in (tmp_path / "runs" / "llama-3.2-1b").glob("*.json")}
    assert len(results) == 11 and all(results.values())
    assert {r["task"] for r in results["scored"]} >= {"hellaswag", "winogrande", *(f"mmlu_{name}" for name in STEM)}
    assert any(r["skipped"] > 0 for r in results["scored"]) and results["translated"][0]["bleu"] >= 0.0
    assert "sacrebleu" in results["translated"][0]["versions"]
    groups = json.loads((tmp_path / "runs" / "llama-3.2-1b" / "scored.json").read_text())["groups"]
    assert [(r["task"], r["budget"]) for r in groups] == [("mmlu_stem", b) for b in (1.0, 0.85, 0.7, 0.55, 0.4)]
    assert script("llama-3.2-1b", MODEL=str(tmp_path / "base")) == []            # all of it is there
    assert script("llama-3.2-1b", code=1) == [] and "was begun with MODEL=" in script.printed


def test_a_stopped_script_goes_on(script, tmp_path):
    """A run that was stopped taken for a whole one, or begun anew."""
    write_data(tmp_path / "data")
    assert [c[0] for c in script("gemma-2-2b", code=1, STOP_AT="paper/evaluate.py")] == ["train.py"] * 4 + [
        "paper/evaluate.py"]
    script("gemma-2-2b", code=1, STOP_AT="train.py", RUNS=str(tmp_path / "other"))
    (tmp_path / "other" / "gemma-2-2b" / "traces").mkdir()
    (tmp_path / "other" / "gemma-2-2b" / "traces" / "latest").write_text("step-000500\n")
    first, second, *_ = script("gemma-2-2b", RUNS=str(tmp_path / "other"))
    assert "--resume" in first and "--resume" not in second
    assert [c[0] for c in script("gemma-2-2b")] == ["paper/evaluate.py"] * 11


def test_each_model(script, tmp_path):
    """The 8B model tuned whole, which does not fit; a name that is none; data that is not made."""
    ran = [" ".join(command) for command in script("llama-3.1-8b")]
    assert [command.split()[1] for command in ran[:3]] == ["traces", "fineweb", "wmt16"]
    assert not any("--gate none" in command for command in ran) and "--model meta-llama/Llama-3.1-8B " in ran[3]
    (tmp_path / "a model").mkdir()
    assert str(tmp_path / "a model") in script("gemma-2-2b", MODEL=str(tmp_path / "a model"))[3]
    sizes = {model: {command[command.index("--batch-size") + 1] for command in script(model)
                     if command[0] == "paper/evaluate.py"}
             for model in ("llama-3.2-1b", "llama-3.2-3b")}
    assert sizes == {"llama-3.2-1b": {"128"}, "llama-3.2-3b": {"64"}} and "--batch-size 32 " in ran[-1]
    assert script("llama-3.2-1b", "--dry-run", "more", code=1) == []
    assert script("llama-4", code=1) == [] and "error: give llama-3.2-1b" in script.printed
    assert script("llama-3.2-1b", "--dry", code=1) == [] and "only --dry-run may follow" in script.printed


def test_table_3_has_its_own_model(script, tmp_path):
    """Another model than the paper's, or budgets that end before its last column, 45%; what else it would train."""
    traces, dense, *evaluated = map(" ".join, script("llama-3.2-3b-instruct")[1:])
    assert "--preset llama-3.2-3b --model meta-llama/Llama-3.2-3B-Instruct " in traces and "--budget-end 0.5" in traces
    assert "--gate none" in dense and len(evaluated) == 3
    assert all("--tasks generative --budgets" in command for command in evaluated)
    assert "--budgets 1.0 0.9 0.8 0.7 0.6 0.5 " in evaluated[0] and "--budgets 0.9 " in evaluated[1]


def test_dry_run_makes_nothing(script, tmp_path):
    """A folder made, or a command that needs what is not there."""
    asked, = script("llama-3.2-3b", "--dry-run")
    assert asked[0] == "paper/can_be_had.py" and "meta-llama/Llama-3.2-3B" in asked
    assert script("llama-3.2-3b", "--dry-run", code=1, STOP_AT="paper/can_be_had.py") == [asked]
    assert not (tmp_path / "runs").exists() and not (tmp_path / "data").exists()


def test_what_can_be_had(tmp_path, monkeypatch, capsys):
    """A data set asked for that lies in --data, or one that is not asked for; a no that ends as a yes."""
    asked = []

    class Api:
        def auth_check(self, repo, repo_type):
            asked.append((repo_type, repo))
            if repo == "baber/piqa":
                raise PermissionError("gated")
    import huggingface_hub
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    write_data(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    had = lambda *tasks: can_be_had.main(["--model", str(tmp_path), "--data", str(tmp_path), "--tasks", *tasks])
    assert had("lambada", "openbookqa") == 0 and asked == [("dataset", "allenai/openbookqa")]
    assert had("lambada", "gsm8k", "--training-data") == 0 and len(asked) == 1   # zero-shot: no file to train on
    assert "no folder of a model" in complaint(can_be_had.main, ["--model", str(tmp_path / "traces.jsonl")])
    assert had("piqa") == 1 and "NO  dataset  baber/piqa" in capsys.readouterr().out


def test_bleu():
    """Another tokenizer, another smoothing, an average over sentences (facts of sacrebleu 2.6.0)."""
    cat = "the cat is on the mat"
    for texts, references, score in (([cat], [cat], 100.0), ([cat], ["the cat sat on the mat"], 37.9918),
                                     (["the cat"], ["the cat sat on the mat"], 0.0),
                                     (["Pisica stă pe covor.", "Bună ziua!"],
                                      ["Pisica stă pe covor .", "Bună ziua, domnule!"], 69.2463),
                                     (["Costă 1,234.5 lei (10-12%)."], ["Costă 1,234.5 lei ( 10 - 12 % ) ."], 100.0)):
        assert task_scores.bleu(texts, references) == pytest.approx(score, abs=1e-4)
