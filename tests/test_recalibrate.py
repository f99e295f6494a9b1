"""Tests of paper/recalibrate.py as a command; what it measures is tested in test_quantize.py."""
import json
import sys

import pytest
import torch

import budgets
from conftest import complaint
from load_weights import load_model, read_json
from test_paper import items_of, models
from thresholds import make_policy
from toy_runs import ROOT, words

sys.path.insert(0, str(ROOT / "paper"))
import quantize
import recalibrate


def command(*switches, **flags):
    return recalibrate.main(words(*switches, **dict(data="arithmetic", limit=6, seq_len=160, device="cpu") | flags))


def test_other_texts_other_thresholds_the_same_weights(models, tmp_path, monkeypatch, capsys):
    """Thresholds of the old texts, budgets that are not asked for any more, weights or gates that change on the way."""
    monkeypatch.setattr(budgets, "CONTINUE", 4)
    rows = [{"text": f"{'one two ' * n}three"} for n in range(1, 7)]
    (tmp_path / "texts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert command("--budgets", "0.7", "1.0", "0.9", model=models["gated"], data=tmp_path / "texts.jsonl",
                   out=tmp_path / "texts") == 0
    assert command(model=models["gated"], out=tmp_path / "same") == 0
    assert f"written: {tmp_path / 'same'}" in capsys.readouterr().out
    old, texts, same = (load_model(path) for path in (models["gated"], tmp_path / "texts", tmp_path / "same"))
    assert set(texts.config.gateskip["thresholds"]) == {"1.0", "0.9", "0.7"}
    assert set(same.config.gateskip["thresholds"]) == set(old.config.gateskip["thresholds"]) == {"1.0", "0.8"}
    got = budgets.realised(same, items_of(models["gated"], 6, "calibration"), make_policy(same.config, "frozen", 0.8))
    assert same.config.gateskip["realised"]["0.8"] == pytest.approx(got, abs=1e-6)
    weights = old.state_dict()
    assert all(torch.equal(weights[name], w) for new in (texts, same) for name, w in new.state_dict().items())
    kept = {key: value for key, value in old.config.gateskip.items()
            if key not in ("thresholds", "realised", "missed")}
    assert kept.items() <= texts.config.gateskip.items()


def test_a_folder_that_was_never_calibrated(models, tmp_path, monkeypatch):
    """A model of which only the gates are known: nothing but what is asked for, under the paper's settings."""
    monkeypatch.setattr(budgets, "CONTINUE", 4)
    bare = tmp_path / "bare"
    assert command(model=models["gated"], out=bare) == 0
    config = read_json(bare / "config.json")
    config["gateskip"] = {"gate": config["gateskip"]["gate"]}
    (bare / "config.json").write_text(json.dumps(config))
    assert "is not calibrated: name --budgets" in complaint(command, model=bare, out=tmp_path / "new")
    assert command("--budgets", "0.8", model=bare, out=tmp_path / "new") == 0
    stored = load_model(tmp_path / "new").config.gateskip
    assert stored["skip"] == "all" and stored["kv"] == "copy_up" and set(stored["thresholds"]) == {"1.0", "0.8"}


def test_what_cannot_be_calibrated_is_refused(models, tmp_path):
    """A traceback, a folder written over, hours of work before an error."""
    quantize.main(words(model=models["gated"], kind="nf4", data="arithmetic", limit=2, seq_len=160, device="cpu",
                        out=tmp_path / "nf4"))
    for why, flags in {"has no gates: train some": dict(model=models["dense"]),
                       "is quantised: quantize.py measures": dict(model=tmp_path / "nf4"),
                       "is not calibrated: name --budgets below 1": dict(budgets=1.0),
                       "--budgets: budget 2.0 is outside": dict(budgets=2),
                       "--out is empty: name": dict(out=""),
                       f"--out {tmp_path} exists": dict(out=tmp_path)}.items():
        assert why in complaint(command, **dict(model=models["gated"], out=tmp_path / "new") | flags)
        assert not (tmp_path / "new").exists()
