"""Tests of paper/table7_9_smaller.py: every row is measured, and its savings are of the whole dense model."""
import json
import sys

import pytest

from conftest import complaint
from toy_runs import ROOT, folder

sys.path.insert(0, str(ROOT / "paper"))
import study
import table7_9_smaller as smaller
from test_table1 import small


@pytest.mark.parametrize("recipe", smaller.RECIPES)
def test_a_model_is_made_smaller_in_every_way(small, folder, monkeypatch, capsys, recipe):
    """Savings of what is left in place of the whole, a change that changes nothing, results that are not kept."""
    monkeypatch.setattr(smaller, "BUDGETS", (1.0, 0.8))
    monkeypatch.setattr(smaller, "REMOVED", {"1 block removed": 1})
    monkeypatch.delitem(smaller.ROWS, "2 blocks removed")        # of two
    entry = json.loads(json.dumps(smaller.one(recipe, 1, 1)))
    full = {r["row"]: r for r in entry["rows"] if r["asked"] == 0.0}
    gated = not recipe.startswith("dense")
    assert list(full) == list(smaller.ROWS) and len(entry["rows"]) == (1 + gated) * len(full)
    as_it_is = full["as it is"]["macs_saved"]
    assert -0.05 * gated <= as_it_is <= 0 and (as_it_is < 0) == gated                            # the gates
    assert all(full[row]["macs_saved"] == as_it_is for row in smaller.FOUR_BITS)
    assert 0.1 < full["1 block removed"]["macs_saved"] < 0.5     # a half but for the head
    bytes = entry["bytes"]
    assert bytes["as it is"] > bytes["NF4"] > bytes["NF4, double quantisation"]
    assert bytes["as it is"] > max(bytes["int4"], bytes["1 block removed"])
    assert not any(path.is_dir() for path in study.WORK.iterdir())

    assert "leave out --from-results" in complaint(smaller.main, ["--from-results"])
    study.keep(smaller.FILE, entry)
    smaller.main(["--from-results"])
    printed = capsys.readouterr().out
    assert [name for name in smaller.RECIPES if f"\n\n{name}\n" in printed] == [recipe]
    assert all(f"| {row} | 1 |" in printed for row in smaller.ROWS) and f"NF4 {bytes['NF4'] / 1e6:.2f}" in printed
    removed = full["1 block removed"]
    assert f"1 block removed {100 * removed['accuracy']:.1f} ({100 * removed['macs_saved']:.0f})" in printed


def test_savings_are_of_the_whole():
    """By hand: half of the work of a model that has half of the work is a quarter."""
    class Work:
        def __init__(self, prompts, answers):
            self.found = prompts, answers
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(smaller, "macs_of_answers", lambda config, items: config.found)
        row = {"macs_saved": 0.5, "answer": {"macs_saved": 0.2}}
        smaller.of_the_whole(row, Work(30, 10), Work(60, 20), None)
    assert row["macs_saved"] == 0.75 and row["answer"]["macs_saved"] == pytest.approx(0.6)
