"""Tests of paper/gate_value.py: a gate's value against the benefit of its branch."""
import json
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from conftest import build, complaint, llama
from data import answer_places, collate
from gates import Gate, GateConfig, SkipPolicy, sparsity_loss
from load_weights import save_model
from savings import branch_costs
from toy_runs import ROOT, toy

sys.path.insert(0, str(ROOT / "paper"))
from gate_value import HOW, compare, correlations, main, mean_of, measure

ITEMS = [([5, 9, 13, 20, 7, 3], [False, False, True, True, True, True]), ([8, 11, 30, 2], [False, False, True, True])]
WEIGHT, PAIRS = 0.3, 4 * 10                                      # of the branches and tokens of ITEMS


def small(form="scalar", instead=None):
    """A float64 model of four branches, always the same; instead(branch, gate): another gate in a gate's place."""
    model, calls = build(llama(GateConfig(form), num_hidden_layers=2)), []

    def hook(module, x, out):
        calls.append(instead(len(calls) % 4, out[0]))
        return calls[-1], calls[-1].mean(-1)
    [gate.register_forward_hook(hook) for gate in model.modules() if instead and isinstance(gate, Gate)]
    return model


def step(model, kind, costs):
    """(CE, sparsity, gates, valid) as train.py's loop has them for a step that runs everything."""
    (ids, mask, valid), (places, targets) = collate(ITEMS), answer_places(*collate(ITEMS)[:2])
    logits, trace = model(ids, valid=valid, places=places, keep_gates=True)
    return F.cross_entropy(logits, targets), sparsity_loss(trace.gates, valid, kind, 1.0, costs), trace.gates, valid


@torch.no_grad()
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("kind, form", [("l2", "scalar"), ("l2", "vector"), ("l1", "scalar")])
def test_benefits_are_differences_of_the_loss(how, kind, form):
    """Another sign or constant, gates that follow where they are held, padding in the count, tokens out of order."""
    model, costs = small(form), branch_costs(small().config)
    model.config.gate.detach = True
    m = torch.enable_grad()(measure)(model, ITEMS, SkipPolicy(), WEIGHT, kind, costs)
    own, valid = step(model, kind, costs)[2:]
    assert torch.equal(m["gate"], torch.stack([g[valid].mean(-1) for g in own])) and model.config.gate.detach
    for branch, row, place in ((0, 0, 1), (1, 1, 2), (2, 0, 0), (3, 1, 2)):
        def loss(difference):
            def gate(b, g):
                g = (g if how == "followed" else own[b]).clone()
                g[row, place] += difference * (b == branch)
                return g
            ce, sparsity, gates, _ = step(small(form, gate), kind, costs)        # less what this gate itself pays:
            pays = gates[branch][row, place].pow(2 if kind == "l2" else 1).mean()
            return PAIRS * (ce + WEIGHT * sparsity) - WEIGHT * costs[branch] * pays
        assert m[how][branch, 6 * row + place].item() == pytest.approx(float(loss(-1e-5) - loss(1e-5)) / 2e-5, abs=1e-6)


@pytest.mark.parametrize("kind, form, cost", [("l2", "scalar", "equal"), ("l2", "vector", "macs"),
                                              ("l1", "scalar", "equal"), ("l1", "scalar", "macs")])
def test_free_gates_settle_at_their_price(kind, form, cost):
    """A price with half the constant, of tokens or answers for pairs, without the cost, of the other loss."""
    free = [torch.full((2, 6, 24 if form == "vector" else 1), 0.3).double().requires_grad_() for _ in range(4)]
    model = small(form, lambda b, g: free[b] if kind == "l2" else free[b].sigmoid())     # l1 has no bottom
    costs = branch_costs(model.config) if cost == "macs" else [1.0] * 4

    def loss():
        total = sum(part * x for part, x in zip((1, WEIGHT), step(model, kind, costs)))
        for gate, gradient in zip(free, torch.autograd.grad(total, free)):
            gate.grad = gradient
        return total
    torch.optim.LBFGS(free, 1, 150, 300, 2e-7, 1e-14, 30, "strong_wolfe").step(loss)
    m = measure(model, ITEMS, SkipPolicy(), WEIGHT, kind, costs)
    inside = (m["gate"] > 0.01) & (m["gate"] < 0.99) | (kind == "l2")            # l1 drives most to an end
    assert inside.sum() > 1
    for how in HOW:                                              # with another constant it does not hold
        off = [(m[how] - factor * m["due"])[inside].abs().max() for factor in (1, 2)]
        assert off[0] < 1e-3 and off[1] > 0.02
    assert kind == "l1" or compare(m, "held")["slope"][0] == pytest.approx(1, abs=1e-3)


def test_statistics_are_numpys():
    """Ranks of equals in order of appearance; a hundred copies of a problem that count as a hundred problems."""
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 9, 80) / 8, rng.normal(size=80)
    rank = lambda v: np.array([(v < a).sum() + ((v == a).sum() + 1) / 2 for a in v])
    assert correlations(torch.tensor(x), torch.tensor(y)) == pytest.approx(
        [np.corrcoef(*pair)[0, 1] for pair in ((x, y), (rank(x), rank(y)))], abs=1e-12)
    for copies in (1, 100):
        mean = mean_of(torch.tensor([1.0, 2, 4]).repeat(copies), torch.ones(3 * copies), torch.arange(3).repeat(copies))
        assert mean == pytest.approx([7 / 3, np.std([1, 2, 4]) / 3 ** 0.5])


def test_skipped_pairs_are_left_out():
    """Pairs without a benefit that drag every mean to zero."""
    keep = torch.arange(6).expand(2, 6) > 2
    m = measure(small(), ITEMS, SkipPolicy("given", masks=[keep] * 4), WEIGHT, "l2", [1.0] * 4)
    kept = keep[collate(ITEMS)[2]].expand(4, 10)
    assert torch.equal(m["kept"], kept) and m["held"][~kept].abs().max() < 1e-12
    assert compare(m, "held")["pairs"] == correlations(m["value"][kept], m["held"][kept])


def test_command(tmp_path, monkeypatch):
    """Flags of another run; what is not there found after the work, or as a traceback; a kill that leaves half a file;
    somebody else's .json beside the picture written over."""
    for name, gate in (("run", GateConfig("scalar")), ("dense", None)):
        model, tokenizer = toy(tmp_path / "made", gate)
        save_model(model, tmp_path / name, tokenizer)
    flags = lambda *names, to="a.png": [*"--limit 3 --sparsity-weight 0.1 --sparsity-loss l2 l1 --out".split(),
                                        str(tmp_path / to), "--model", *(str(tmp_path / name) for name in names)]
    main(flags("run", "run"))
    file, written = tmp_path / "a.json", {}
    assert [r["title"][:7] for r in json.loads(file.read_text())["runs"]] == ["run: l2", "run: l1"]
    for write in ("gate_value.write", "disk.write"):             # of the numbers, and of the picture
        monkeypatch.setattr(write, lambda path, content: written.update({str(path)[-5:]: content[:4]}))
    main(flags("run", "run"))                                    # its own numbers may be written over
    assert written == {".json": '{\n "', "a.png": (tmp_path / "a.png").read_bytes()[:4]}
    monkeypatch.undo()
    alone = lambda *more, to: [*flags("run", to=to), "--sparsity-loss", "l2", *more]
    main(alone("--without", "0", "2", to="mlp.png"))             # a panel without attention
    for said, more in (("no number comes of it", "--sparsity-weight 1e300"), ("or one branch", "--without 0 1 2")):
        assert said in complaint(main, alone(*more.split(), to="no.png"))
    assert not list(tmp_path.glob("no.*"))
    monkeypatch.setattr("gate_value.measure", None)
    (tmp_path / "b.json").mkdir()
    for said, words in {"has no gates": flags("dense", "dense"), "dense has no gates": flags("run", "dense"),
                        "config.json": flags("", ""),
                        "not recorded": flags("run")[7:], "one per run": flags("run", "run", "run"),
                        "--sparsity-loss: 2 values, 1 runs": flags("run"), "is empty": [*flags("run"), "--out", ""],
                        "--without 4: ": [*flags("run"), *"--sparsity-loss l2 --without 0 4".split()],
                        "b.json cannot be": flags("run", to="b.png"), "written": flags("run", to="no/a.png")}.items():
        assert said in complaint(main, words), said
    for text in '{"rows": [], "made_with": {}}', "mine":
        file.write_text(text)
        assert f"--out {file} is no file of this" in complaint(main, flags("run")) and file.read_text() == text


def test_what_a_run_recorded_may_be_of_no_use(tmp_path):
    """A traceback, or a table of NaN, for no price, no end token, thresholds that nothing passes, or half a state."""
    (model, tokenizer), state = toy(tmp_path / "run", GateConfig("scalar")), tmp_path / "run" / "train_state.pt"
    good = dict(sparsity_weight=0.1, skip="all", kv="copy_up", thresholds={"1.0": [0.0] * 4, "0.5": [1.0] * 4})
    go = lambda: main(f"--model {tmp_path}/run --sparsity-loss l2 --limit 3 --budget .5 --out {tmp_path}/a.png".split())
    for key, said, *values in (("sparsity_weight", "--sparsity-weight: not rec", 0, -1, "0.1", True, float("nan")),
                               ("sparsity_cost", "--sparsity-cost: not rec", "flops", ["macs"]),
                               ("eos", "names no eos", None), ("eos", "outside", 999), ("eos", "nothing runs", 1)):
        for value in values:
            model.config.gateskip = good | {key: value}
            model.raw_config["eos_token_id"] = model.config.gateskip.pop("eos", 1)
            save_model(model, tmp_path / "run", tokenizer)
            assert said in complaint(go), (key, value)
    torch.save({"settings": 3}, state)
    for content in state.read_bytes(), state.read_bytes()[:100], b"":
        state.write_bytes(content)
        assert complaint(go).startswith(f"{state} is damaged: move it away")
