"""Tests of paper/frontier.py: the work of a dense model, smaller models, the curves."""
import sys

import pytest
import torch

from conftest import complaint, llama
from load_weights import load_model
from toy_runs import ROOT, folder, words

sys.path.insert(0, str(ROOT / "paper"))
import frontier
import study
from model import Model
from rows import KVCache
from savings import Savings
from test_table5 import entry, small


def test_the_work_of_answers_is_that_of_generating_them():
    """A token too many, keys that are not there yet, logits of the whole prompt, prompts counted as answers."""
    model = Model(llama(None)).double().eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    items = [(list(range(1, 8)), [False] * 4 + [True] * 3), (list(range(3, 14)), [False] * 6 + [True] * 5)]
    savings = Savings(model.config)
    for ids, mask in items:
        start, cache = mask.index(True), KVCache(model.config, 1, len(ids), "cpu", torch.float64)
        savings.add(model(torch.tensor([ids[:start]]), cache=cache, last=True)[1], "prompt")
        for token in ids[start:-1]:
            savings.add(model(torch.tensor([[token]]), cache=cache, last=True)[1], "answer")
    report = savings.report()
    assert frontier.macs_of_answers(model.config, items) == (report["prompt"]["macs"], report["answer"]["macs"])


@pytest.mark.parametrize("name, change", [("0 blocks removed", {"num_hidden_layers": 2}),
                                          ("1 blocks removed", {"num_hidden_layers": 1}),
                                          ("4 layers", {"num_hidden_layers": 4}), ("width 72", {"hidden_size": 72})])
def test_a_smaller_model_is_made_tuned_and_measured(small, monkeypatch, name, change):
    """A model that is as large as before, savings of the wrong sign, folders that stay."""
    monkeypatch.setattr(frontier, "STEPS", 3)
    monkeypatch.setattr(frontier, "SCRATCH", [*frontier.SCRATCH[:2], *words(
        batch_size=2, seq_len=160, lr=1e-3, warmup=1, eval_limit=3)])
    made = []
    sweep = frontier.testbed.sweep
    monkeypatch.setattr(frontier.testbed, "sweep", lambda folder, *args: made.append(load_model(folder).config)
                        or sweep(folder, *args))
    assert frontier.one("tuned", 1, 1) is None
    found, = frontier.one(name, 1, 1)["rows"]
    assert {key: getattr(made[0], key) for key in change} == change
    dense = load_model(frontier.testbed.START).config
    assert study.folder_of("tuned", 1).exists()
    smaller = made[0].hidden_size * made[0].num_hidden_layers < dense.hidden_size * dense.num_hidden_layers
    assert (found["macs_saved"] > 0) == smaller and (found["answer"]["macs_saved"] > 0) == smaller
    assert (found["row"], found["n"]) == (name, 3)
    stays = {path.name for path in study.WORK.iterdir() if path.is_dir()} - {"tuned-s1"}
    assert stays == (set() if "removed" in name else {f"{name.replace(' ', '-')}-from-scratch-s1"})
    monkeypatch.setattr(frontier.train, "main", None)            # a second time it is there
    assert all(frontier.from_scratch(name, change, 1).name in stays for _ in stays)


def test_curves_keep_seeds_apart(small, capsys):
    """A mean of means, a seed that lacks a point left out in silence, a smaller model at another's savings."""
    gated = [entry("ours", 1, [(0.0, 1.0), (0.4, 0.8)]), entry("paper, budget to 0.8", 1, [(0.0, 0.5)]),
             entry("ours", 2, [(0.0, 0.9), (0.3, 0.9)])]        # as far as this seed goes, and no further
    smaller = [{"model": "2 blocks removed", "seed": seed, "rows": [
        {"row": "2 blocks removed", "accuracy": y, "n": 9, "skipped": 0.0, "macs_saved": 0.25,
         "answer": {"macs_saved": 0.26}}]} for seed, y in ((1, 0.7), (2, 0.6))]
    found = frontier.curves(gated, smaller, frontier.PARTS["all tokens"])
    assert found == {"one threshold, K and V copied, λ 1": {0: [100.0, 90.0], 10: [90.0, 90.0], 15: [85.0, 90.0]},
                     "the paper's recipe": {0: [50.0]},
                     "blocks removed, tuned again": {25.0: [70.0, 60.0]}}
    for e in gated:
        study.keep("table5.json", e)
    for e in smaller:
        study.keep("frontier.json", e)
    out = small / "frontier.png"
    frontier.main(["--from-results", "--out", str(out)])
    assert out.read_bytes()[:4] == b"\x89PNG" and "26.0: 65.0±7.1 (2)" in capsys.readouterr().out


def test_gates_on_a_smaller_model_save_on_top(small):
    """By hand: half of what is left of a half is three quarters; another size's savings, one of unknown size."""
    smaller = [entry(name, 1, [(saved, 1.0)]) for name, saved in (("4 layers", 0.5), ("6 layers", 0.25))]
    for name, points in (("4 layers", [(0.0, 0.9), (0.5, 0.8)]), ("5 layers", [(0.0, 0.9)])):
        study.keep(frontier.LARGER, entry(name, 1, points))
    found, = frontier.on_smaller(smaller)
    assert [(r["macs_saved"], r["answer"]["macs_saved"], r["accuracy"]) for r in found["rows"]] == [
        (0.25, 0.5, 0.9), (0.4375, 0.75, 0.8)]


def test_nothing_to_draw_is_said(small):
    """An empty picture."""
    assert "leave out --from-results" in complaint(lambda: frontier.main(["--from-results"]))
    assert "--out is empty" in complaint(lambda: frontier.main(["--from-results", "--out", ""]))
