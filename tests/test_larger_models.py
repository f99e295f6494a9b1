"""Tests of paper/larger_models.py: each size is made and measured with gates and without; what is left of dense."""
import sys

import pytest

from conftest import complaint
from load_weights import load_model
from toy_runs import ROOT, folder, words

sys.path.insert(0, str(ROOT / "paper"))
import larger_models as larger
import study
from test_table5 import small


@pytest.mark.parametrize("name, key, size", [("4 layers", "num_hidden_layers", 4), ("width 72", "hidden_size", 72)])
def test_a_size_is_made_tuned_and_measured(small, monkeypatch, name, key, size):
    """A model of another size, gates where there should be none, folders that stay."""
    monkeypatch.setattr(larger.frontier, "STEPS", 3)
    monkeypatch.setattr(larger.frontier, "SCRATCH", [*larger.frontier.SCRATCH[:2], *words(
        batch_size=2, seq_len=160, lr=1e-3, warmup=1, eval_limit=3)])
    made, sweep = [], larger.testbed.sweep
    monkeypatch.setattr(larger.testbed, "sweep", lambda folder, *args: made.append(load_model(folder).config)
                        or sweep(folder, *args))
    entry = larger.one(name, 1, 1)
    assert [(getattr(c, key), bool(c.gateskip)) for c in made] == [(size, True), (size, False)]
    assert [r["row"] for r in entry["rows"]] == [name, name, f"{name}, dense"]
    stays = [path.name for path in study.WORK.iterdir() if path.is_dir()]
    assert stays == [f"{name.replace(' ', '-')}-from-scratch-s1"]


def test_what_is_left_is_of_the_same_size_and_seed(small, capsys):
    """Another seed's dense model, or accuracies in place of shares."""
    assert "leave out --from-results" in complaint(larger.main, ["--from-results"])
    for seed, dense, ends in ((1, 0.8, 0.4), (2, 0.5, 0.5)):
        row = lambda name, x, y: {"row": name, "macs_saved": x, "skipped": x, "accuracy": y,
                                  "answer": {"macs_saved": x}}
        rows = [row("4 layers", 0.0, dense), row("4 layers", 0.4, ends), row("4 layers, dense", 0.0, dense)]
        study.keep(larger.FILE, {"model": "4 layers", "seed": seed, "rows": rows})
    study.keep(larger.FILE, {"model": "6 layers", "seed": 1, "rows": []})        # nothing dense to compare with
    larger.main(["--from-results"])
    accuracy, left = capsys.readouterr().out.split("\n\n")[1:]
    assert "| 4 layers, dense | 2 | 65.0±21.2 | - |" in accuracy
    assert "| 4 layers | 2 | 100.0±0.0 |" in left and "| 75.0±35.4 | - |" in left          # at 40 and 50%


def test_the_embedded_model_is_that_of_the_ablations(small, capsys):
    """A seed without its dense model, another row of the same training, or another training."""
    row = lambda name, accuracy: {"row": name, "macs_saved": 0.0, "skipped": 0.0, "accuracy": accuracy,
                                  "answer": {"macs_saved": 0.0}}
    for name, seed, accuracy in ((larger.OURS, 1, 0.6), ("dense", 1, 0.8), (larger.OURS, 2, 0.1), ("ours", 1, 0.2),
                                 ("dense", 3, 0.3)):
        study.keep(larger.table5_ablations.FILE, {"model": name, "seed": seed,
                                                  "rows": [row(name, accuracy), row(f"{name}, random", 0.0)]})
    larger.main(["--from-results"])
    accuracy, left = capsys.readouterr().out.split("\n\n")[1:]
    assert "| 8 layers, dense | 1 | 80.0 | - |" in accuracy and "| 8 layers | 1 | 60.0 | - |" in accuracy
    assert "| 8 layers | 1 | 75.0 | - |" in left
