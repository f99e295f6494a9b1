"""compare.py: what it says of two that agree, and of two that do not."""
import json
import shutil

import made

import pytest
import torch

import compare
import export
from conftest import complaint
from gates import GateConfig
from load_weights import read_json, save_model
from toy_runs import toy, words


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A run, its export `out`, and `dense`, with the tokenizer of the built-in problems."""
    base = tmp_path_factory.mktemp("compare")
    torch.manual_seed(0)
    for name, gate in (("dense", None), ("run", GateConfig("scalar"))):
        model, tokenizer = toy(base / name, gate)
        if gate:
            model.config.gateskip = {"skip": "all", "kv": "copy_up", "threshold": "branch",
                                     "thresholds": made.table(model, "branch")}
        save_model(model, base / name, tokenizer)
    assert export.main(["--model", str(base / "run"), "--out", str(base / "out")]) == 0
    return base


def table(capsys, base, **flags):
    """{(budget, where): (right, same tokens or None)} as printed."""
    assert compare.main(words(**{"model": base / "run", "exported": base / "out", "dense": base / "dense", "limit": 6,
                                 "batch_size": 4, "max_new_tokens": 6, **flags})) == 0
    lines = capsys.readouterr().out.split("as here\n")[1].splitlines()
    assert lines[0].startswith("dense, there") and len(lines) == 7
    return [line.split() for line in lines[1:]]


def test_the_same_tokens(folders, capsys):
    """Rows of another budget, or of another way, under a budget's name; unequal answers that count as equal."""
    rows = table(capsys, folders)
    assert [row[:2] for row in rows] == [[b, who] for b in ("1.000", "0.800", "0.600") for who in ("here", "exported,")]
    assert all("6" in row[3:5] for row in rows)


def test_other_tokens(folders, capsys, monkeypatch):
    """A comparison that cannot fail."""
    real = compare.theirs
    monkeypatch.setattr(compare, "theirs", lambda model, batch, n, ends: [[*new[:-1], new[-1] + 1] for new in
                                                                          real(model, batch, n, ends)])
    assert all(row[3 if row[1] == "here" else 4] == "0" for row in table(capsys, folders))


def test_a_folder_of_another_run(folders, tmp_path, monkeypatch):
    """Thresholds of an older calibration, compared as if they were the run's."""
    flags = dict(model=folders / "run", dense=folders / "dense", limit=2)
    shutil.copytree(folders / "out", tmp_path / "old")
    config = read_json(tmp_path / "old" / "config.json")
    config["gateskip"]["thresholds"] = {"1.0": [0.0] * 4}
    (tmp_path / "old" / "config.json").write_text(json.dumps(config))
    assert "is not of --model" in complaint(compare.main, words(exported=tmp_path / "old", **flags))
    for name in ("dense", "run"):
        assert "is no export: export.py" in complaint(compare.main, words(exported=folders / name, **flags))
    assert "--dense" in complaint(compare.main, words(exported=folders / "out", **{**flags, "dense": folders / "out"}))
    assert "has no gates with frozen" in complaint(compare.main, words(exported=folders / "out", **{
        **flags, "model": folders / "dense"}))
    assert complaint(compare.main, words("--budgets", "0.1", exported=folders / "out", **flags)).startswith(
        "--budgets 0.1 is below")
    shutil.copytree(folders / "out", tmp_path / "cut")
    (tmp_path / "cut" / "model.safetensors").write_bytes((tmp_path / "cut" / "model.safetensors").read_bytes()[:999])
    assert "transformers does not open it" in complaint(compare.main, words(exported=tmp_path / "cut", **flags))
    (tmp_path / "none").mkdir()
    assert "has no config.json" in complaint(compare.main, words(exported=tmp_path / "none", **flags))
