"""Tests of paper/table1_baselines.py: each method is trained, brought to its savings and measured; the table."""
import sys

import pytest
import torch

from conftest import complaint
from toy_runs import ROOT, folder

sys.path.insert(0, str(ROOT / "paper"))
import study
import table1_baselines as table1
import testbed


@pytest.fixture
def small(monkeypatch, tmp_path, folder):
    """A study of a toy, of two steps and three problems, at two savings."""
    for name, value in dict(START=folder, STEPS=2, PROBLEMS=3, CALIBRATION=4).items():
        monkeypatch.setattr(testbed, name, value)
    monkeypatch.setattr(table1, "SAVINGS", (0.0, 0.2))
    for name in ("WORK", "RESULTS"):
        (tmp_path / name).mkdir()
        monkeypatch.setattr(study, name, tmp_path / name)
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    return tmp_path


@pytest.mark.parametrize("name", table1.EVERY)
def test_a_method_is_trained_and_measured(small, name):
    """Flags that train.py refuses, a model opened as another, a threshold of another saving, a folder that stays."""
    entry = table1.one(name, 1, 1)
    rows = entry["rows"]
    assert {r["row"] for r in rows} <= set(table1.EVERY[name].views) and entry["flags"] == table1.EVERY[name].flags
    assert all(r["n"] == 3 and 0.0 <= r["skipped"] < 1.0 and set(r["answer"]) == {"skipped", "macs_saved"}
               for r in rows)
    assert next(r["skipped"] for r in rows if r["asked"] == 0.0) == 0.0          # full depth is each method's own
    own = [r for r in rows if r["asked"] is None]                                # a router's own decision
    routed = any(getattr(view, "func", None) is table1.by_policy for view in table1.EVERY[name].views.values())
    assert len(own) == routed
    asked, skipped = zip(*((r["asked"], r["skipped"]) for r in rows if r["row"] == rows[0]["row"] and r not in own))
    if "as their code" not in name or not name.startswith("CALM"):               # there nobody stops alone
        assert [x for _, x in sorted(zip(asked, skipped))] == sorted(skipped)    # who is asked for more saves no less
    assert not any(path.is_dir() for path in study.WORK.iterdir())


def test_the_early_exits_of_a_row_share_a_model(small):
    """One training for each confidence, or thresholds of one confidence with the other."""
    views = table1.METHODS["CALM"].views
    assert [view.args[0].keywords["confidence"] for view in views.values()] == ["softmax", "state"]
    assert {row.split(", ")[1] for row in views} == {"softmax", "state"}


def test_the_table(small, capsys):
    """A row of the wrong file, a method that is measured and not printed, a router's own decision on a curve."""
    assert "leave out --from-results" in complaint(table1.main, ["--from-results"])
    row = lambda name, skipped, right, asked=0.0: {"row": name, "asked": asked, "skipped": skipped,
                                                   "macs_saved": skipped / 2, "accuracy": right,
                                                   "answer": {"macs_saved": 0.0}}
    own = row("SkipLayer", 0.1, 0.3, None)
    study.keep("table1.json", {"model": "SkipLayer", "seed": 1, "rows": [
        *(row("SkipLayer", x, 1 - x) for x in (0, 0.2)), own]})
    study.keep("table1.json", {"model": "MindSkip", "seed": 1, "rows": [row("MindSkip", 0, 1)]})
    study.keep("table5.json", {"model": "ours", "seed": 1, "rows": [row("ours", x, 1 - x / 2) for x in (0, 0.4)]})
    table1.main(["--from-results"])
    skipped, saved, owns = capsys.readouterr().out.split("\n\n")[1:]
    cells = {line.split(" | ")[0].strip("| "): line.split(" | ")[2:] for line in skipped.splitlines()}
    assert cells["SkipLayer"][:3] == ["100.0 (0)", "95.0 (2)", "90.0 (5)"] and cells["SkipLayer"][5] == "-"
    assert cells["ours"][6] == "85.0 (15)" and list(cells).index("ours") < list(cells).index("SkipLayer")
    assert [line for line in saved.splitlines() if line.startswith("| SkipLayer")][0].split(" | ")[4] == "80.0"
    assert owns.splitlines()[2:] == ["| SkipLayer | 1 | 30.0 | 10.0 | 5.0 |"]
