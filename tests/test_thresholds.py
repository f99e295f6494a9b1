"""Tests of thresholds.py: one frozen threshold, a table of them read between its budgets, calibration, and the policy
of a loaded model."""
import math
import random

import numpy as np
import pytest
import torch

from conftest import MAY_SKIP, both_kv, build, llama, on_devices, padding, same_masks
from console import InputError
from gates import GRANULARITIES, SkipPolicy, quantile_threshold, skippable_share
from price import RunningQuantile
from savings import branch_costs
import thresholds
from thresholds import calibrate, chunks, frozen_threshold, make_policy, one_pass, search, thresholds_at


# One threshold.

def test_frozen_threshold_beyond_the_ends():
    """No neighbour to take a midpoint with: an index error, or a tau on the lowest or highest score."""
    scores = torch.tensor([0.3, 0.5, 0.9], dtype=torch.float64)
    assert frozen_threshold(scores, 0.0) == pytest.approx(0.3 - 1e-4, abs=1e-12)
    assert frozen_threshold(scores, 1.0) == pytest.approx(0.9 + 1e-4, abs=1e-12)
    for q, tau in ((0.2, 0.4 - 1e-4), (0.8, 0.4 + 1e-4)):        # a single value, however often
        assert frozen_threshold(torch.full((50,), 0.4, dtype=torch.float64), q) == pytest.approx(tau, abs=1e-12)
    tied = torch.tensor([0.1, 0.4, 0.4, 0.4, 0.4, 0.8], dtype=torch.float64)
    assert frozen_threshold(tied, 0.3) == pytest.approx(0.25) and frozen_threshold(tied, 0.6) == pytest.approx(0.6)


def clusters(scores, tie=1e-6):
    """Sorted scores as runs of ties: a cut between two runs never splits one."""
    runs = []
    for s in sorted(scores.double().tolist()):
        runs.append(runs.pop() + [s]) if runs and s - runs[-1][-1] <= tie else runs.append([s])
    return runs


def test_frozen_threshold_lies_on_no_score_and_on_the_nearer_side():
    """A tau that equals tied scores (one rounding step flips all of them), or the cut on the wrong side of a tie."""
    rng = np.random.default_rng(0)
    for case in range(600):
        n = int(rng.integers(1, 60))
        scores = rng.random(n).astype(np.float32)
        if case % 3:                                             # ties as rounding leaves them: some float32 steps wide
            scores = np.round(scores, 1) + np.float32(6e-8) * rng.integers(0, 3, n).astype(np.float32)
        scores = torch.from_numpy(scores)
        q = float(rng.choice([0.0, 1.0, rng.random(), rng.integers(0, 21) / 20]))
        tau = frozen_threshold(scores, q)
        assert isinstance(tau, float) and (scores.double() - tau).abs().min() > 4e-7, (case, q)
        share = (scores.double() <= tau).double().mean().item()
        runs = clusters(scores)
        shares = np.cumsum([0] + [len(r) for r in runs]) / n     # every share that a cut between ties can have
        plain = quantile_threshold(scores, q).item()
        tied = [i for i, r in enumerate(runs) if r[0] - 1e-6 <= plain <= r[-1] + 1e-6]
        if tied:                                                 # the quantile is a score: the nearer of the two sides
            nearer = min(shares[tied[0]:tied[0] + 2], key=lambda s: abs(s - q))
            assert share == pytest.approx(nearer, abs=1e-12), (case, q)
        else:                                                    # between two scores: halfway, in the same gap
            below, above = max(r[-1] for r in runs if r[-1] < plain), min(r[0] for r in runs if r[0] > plain)
            assert tau == pytest.approx((below + above) / 2, abs=1e-12)


# Between two budgets.

def test_thresholds_between_budgets():
    """Interpolation in the wrong direction, a clamp below the smallest calibrated budget, or keys compared as text."""
    table = {"1.0": [0.1, 0.0], "0.95": [0.3, 0.0], "0.5": [0.6, 0.0]}
    for key, taus in table.items():
        assert thresholds_at(table, float(key)) == taus
    assert thresholds_at(table, 0.975) == pytest.approx([0.2, 0.0])
    assert thresholds_at(table, 0.99) == pytest.approx([0.14, 0.0])
    assert thresholds_at(table, 0.6) == pytest.approx([0.6 - 0.3 * 0.1 / 0.45, 0.0])
    assert thresholds_at(dict(reversed(table.items())), 0.6) == thresholds_at(table, 0.6)
    assert thresholds_at({"1.0": [0.1]}, 1.0) == [0.1]
    assert thresholds_at(table, 1.0 - 0.5 + 1e-12) == pytest.approx([0.6, 0.0])
    for budget in (0.49, 0.01):
        with pytest.raises(InputError) as error:
            thresholds_at(table, budget)
        assert f"with --resume --calibrate 0.95 0.5 {budget} measures it" in str(error.value)      # none of them lost
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("budget", [math.nan, 0, 0.0, -0.1, 1.0001, 15, math.inf])
def test_bad_budget_is_refused(budget):
    """--budget 15 (meant as percent) or NaN going through as some threshold of the table."""
    with pytest.raises(InputError) as error:
        thresholds_at({"1.0": [0.1]}, budget)
    assert "\n" not in str(error.value)


# The search.

def trials(response, target, rounds):
    """(what search returns, the shares that it asked for); its table is the share itself."""
    tried = []
    return search(lambda q: tried.append(q) or [q], lambda table: response(*table), target, target, 0.01, rounds), tried


def test_search_by_hand():
    """A correction in the wrong direction, or a try too many: what skips fourfold is asked for a quarter."""
    (table, got, q), tried = trials(lambda q: q, 0.25, 6)
    assert (table, got, q, tried) == ([0.25], 0.25, 0.25, [0.25])
    (table, got, q), tried = trials(lambda q: 4 * q, 0.25, 6)
    assert (table, got, q, tried) == ([0.0625], 0.25, 0.0625, [0.25, 0.0625])


# what is realised where the share q is asked of each branch
RESPONSES = {"as asked": lambda q: q, "1.6 times": lambda q: 1.6 * q, "half": lambda q: q / 2,
             "root": lambda q: q ** 0.5, "square": lambda q: q * q, "cube": lambda q: q ** 3,
             "cube root": lambda q: q ** (1 / 3), "fourth power": lambda q: q ** 4,
             "runs away": lambda q: min(1.0, q + 3 * q * q), "late": lambda q: max(0.0, 2 * q - 0.4)}


@pytest.mark.parametrize("name", RESPONSES)
def test_search_converges(name):
    """A bracket that loses the answer, or a table returned that is not the one measured: on what rises with q it comes
    within half of the tolerance."""
    for target in (0.05, 0.1, 0.2, 0.3, 0.4):
        (table, got, q), tried = trials(RESPONSES[name], target, 12)
        assert abs(got - target) <= 0.005 and got == RESPONSES[name](q), (target, tried)
        assert table == [q] and q == tried[-1] and len(tried) <= 12


@pytest.mark.parametrize("rounds", [1, 2, 6, 14])
def test_search_takes_the_nearest_of_what_it_tried(rounds):
    """The last try taken for the best, a try more than allowed, or all of a branch skipped (no quantile is above that):
    nothing ever skipped, everything always, nothing and then all at once, and noise."""
    noise = random.Random(0)
    for response in (lambda q: 0.0, lambda q: 1.0, lambda q: 0.02 if q < 0.3 else 0.6, lambda q: noise.random()):
        for target in (0.05, 0.2, 0.4):
            seen = []
            (table, got, q), tried = trials(lambda q: seen.append(response(q)) or seen[-1], target, rounds)
            assert len(tried) == rounds or abs(seen[-1] - target) <= 0.005
            nearest = min(range(len(seen)), key=lambda i: abs(seen[i] - target))
            assert got == seen[nearest] and table == [tried[nearest]] == [min(q, 0.999)]
            assert len(tried) <= rounds and 0 < min(tried) and max(tried) <= 0.999


# Calibration.

def sequences(total=60):
    """Six token lists of unequal lengths, no token twice among them: scores are distinct, even at attention 0."""
    ids = torch.randperm(total, generator=torch.Generator().manual_seed(0)).tolist()
    cuts = [total * share // 60 for share in (0, 4, 9, 23, 31, 47, 60)]
    return [ids[a:b] for a, b in zip(cuts, cuts[1:])]


def padded(seqs):
    longest = max(map(len, seqs))
    return torch.tensor([s + [0] * (longest - len(s)) for s in seqs]), padding([len(s) for s in seqs], longest, "right")


def share_skipped(model, seqs, policy):
    ids, valid = padded(seqs)
    keep = torch.stack(model(ids, valid=valid, policy=policy)[1].keep)
    return 1 - keep.sum().item() / (valid.sum().item() * len(keep))


def test_chunks_by_hand():
    """A slice that is longer than allowed, padding that is not counted, an item lost or alone too long to be taken."""
    cut = lambda *lengths: [[len(item) for item in chunk] for chunk in chunks([[0] * n for n in lengths], tokens=10)]
    assert cut() == [] and cut(11) == [[11]] and cut(5, 5) == [[5, 5]] and cut(5, 6, 1) == [[5], [6], [1]]
    assert cut(1, 1, 4, 3, 20, 1) == [[1, 1], [4, 3], [20], [1]]
    assert list(chunks("abc", length=lambda item: 2, tokens=4)) == ["ab", "c"]


@pytest.mark.parametrize("skip", GRANULARITIES)
def test_one_pass_in_chunks_is_one_pool(skip, monkeypatch):
    """All windows in one forward pass, which no memory holds; or a threshold of each chunk, or of the last one."""
    model, seqs = build(llama()), sequences()
    for q in (0.0, 0.3):
        whole, shapes, begin = one_pass(model, seqs, q, skip, "copy_up"), [], model.begin
        with monkeypatch.context() as m:
            m.setattr(thresholds, "chunks", lambda seqs: chunks(seqs, tokens=20))
            m.setattr(model, "begin", lambda ids, **how: shapes.append(ids.numel()) or begin(ids, **how))
            in_chunks = one_pass(model, seqs, q, skip, "copy_up")
        assert len(shapes) == 5 and max(shapes) <= 20
        assert np.allclose(whole, in_chunks, rtol=0, atol=1e-9) and any(whole[0])


def test_equal_lengths_need_no_mask(monkeypatch):
    """A mask of (S, S) kept for each chunk of windows without padding: 4 GB of them for 64 of 4,096 tokens."""
    model, calls = build(llama()), []
    begin = model.begin
    monkeypatch.setattr(thresholds, "chunks", lambda seqs: [seqs])
    monkeypatch.setattr(model, "begin", lambda ids, **how: calls.append(begin(ids, **how)) or calls[-1])
    one_pass(model, [list(range(1, 10)) for _ in range(3)], 0.3, "all", "copy_up")
    assert all(mask is None for mask in calls[0][1].mask_of.values())


def test_calibrate_without_gates_is_refused():
    """A traceback for whoever calibrates the plain model."""
    with pytest.raises(InputError):
        calibrate(build(llama(gate=None)), sequences(), [0.9])


def test_calibrate_with_repeated_tokens_stays_within_their_ties():
    """Equal tokens tie at attention 0: there the share may miss (1 - b) by the tie, and by no more."""
    model, seqs = build(llama()), [[7] * 10 + [3] * 6 + [11] * 4, [7] * 9 + [5] * 11]
    taus = calibrate(model, seqs, [0.7])["thresholds"]["0.7"]
    ids, valid = padded(seqs)
    trace = model(ids, valid=valid, policy=SkipPolicy("frozen", 0.7, thresholds=taus))[1]
    assert (~trace.keep[0]).sum().item() in {0, 4, 6, 10, 11, 15, 17}       # whole ties
    for scores, keep in zip(trace.scores, trace.keep):
        largest_tie = max(map(len, clusters(scores[valid])))
        assert abs((~keep[valid]).double().mean().item() - 0.3) <= max(largest_tie, 1) / 40 + 1e-9


def test_calibrate_says_what_it_cannot_reach(capsys):
    """A budget that no threshold realises, saved as if it were met: it must be said, and the nearest table kept."""
    model, seqs, seen = build(llama(), seed=1), sequences(), []

    def realised(policy):                                        # nothing, and then all at once
        seen.append(share_skipped(model, seqs, policy))
        return 0.02 if seen[-1] < 0.12 else 0.6

    result = calibrate(model, seqs, [0.8], realised=realised)
    said = capsys.readouterr().out
    assert result["realised"]["0.8"] == 0.02 and "NOT reached" in said and "2.0%" in said and "20.0%" in said
    assert result["missed"] == {"0.8": pytest.approx(0.2)}
    assert said.count("\n") == 1
    assert share_skipped(model, seqs, SkipPolicy("frozen", 0.8, thresholds=result["thresholds"]["0.8"])) < 0.12
    assert 1 < len(seen) <= 12


@pytest.mark.parametrize("skip", ["all", "attn", "alternate"])
def test_calibrate_corrects_a_table_that_runs_away(skip, capsys):
    """In use skips feed on themselves (a table for 25% realised 41% in a prototype): the closed loop must bring what is
    realised, here 1.6 times what is asked, within one point of the request, and store the table that did it."""
    model, seqs = build(llama(vocab_size=420), seed=1), sequences(420)

    def realised(policy):
        assert policy.kind == "frozen" and policy.skip == skip and policy.kv == "copy_up"
        return 1.6 * share_skipped(model, seqs, policy)

    result = calibrate(model, seqs, [0.95, 0.9, 0.8, 0.75], skip, realised=realised)
    said, share = capsys.readouterr().out.splitlines(), skippable_share(skip, 4)
    assert list(result["realised"]) == ["0.95", "0.9", "0.8", "0.75"] and len(said) == 4
    for key, got in result["realised"].items():
        target = (1 - float(key)) * share
        assert abs(got - target) <= 0.01, (key, got, target)
        policy = SkipPolicy("frozen", float(key), skip, thresholds=result["thresholds"][key])
        assert realised(policy) == got                           # the table stored is the one that was measured
    assert not any("NOT" in line for line in said) and result["missed"] == {}


@pytest.mark.parametrize("lag", [-0.3, 0.0, 1.0])
@pytest.mark.parametrize("skip", GRANULARITIES)
def test_one_threshold_realises_what_it_asks_for(skip, lag, capsys):
    """A share of pairs in place of work, of branches that may not skip; a price beyond those of training, which lag
    behind fast gates, that is never tried, though it alone would do."""
    model, seqs = build(llama(vocab_size=420), seed=1), sequences(420)
    costs, (ids, valid) = branch_costs(model.config, skip), padded(seqs)
    scores = torch.stack(model(ids, valid=valid)[1].scores)                      # (2L, B, S)
    quantile = RunningQuantile(costs)
    quantile.update(scores.flatten(1), valid.flatten())
    quantile.points = (quantile.points + lag * (quantile.points[50] - quantile.points[0])).clamp(0, 1)

    def realised(policy):
        assert (policy.kind, policy.skip, len(set(policy.thresholds))) == ("frozen", skip, 1)
        keep = torch.stack(model(ids, valid=valid, policy=policy)[1].keep)       # (2L, B, S)
        work = torch.tensor(costs)[:, None, None] * valid
        return (work * ~keep).sum().item() / (len(costs) * valid.sum().item())

    result = calibrate(model, seqs, [0.9, 0.7, 0.5], skip, realised=realised, quantile=quantile)
    prices = [result["thresholds"][key] for key in ("1.0", "0.9", "0.7", "0.5")]
    assert prices == sorted(prices) and {len(price) for price in prices} == {1}
    for key, got in result["realised"].items():
        assert got == pytest.approx((1 - float(key)) * sum(costs) / len(costs), abs=0.01), key
    assert "NOT" not in capsys.readouterr().out


def test_budgets_are_stored_as_they_were_asked_for():
    """A budget rounded on its way into the table: then it is below the smallest one, or the same as another."""
    model = build(llama())
    for budget in (2 / 3, 0.99997, 1e-5):
        table = calibrate(model, sequences(), [budget])["thresholds"]
        assert len(table) == 2 and thresholds_at(table, budget) == table[str(budget)]


@on_devices
@both_kv
@pytest.mark.parametrize("skip", GRANULARITIES)
def test_calibrate_realises_what_it_asks_for(skip, kv, device):
    """Thresholds from states that earlier skips did not shape, from padding, or of another branch: applied to the same
    sequences, the table skips (1 - b) of every branch that may skip, within one token."""
    model, seqs = build(llama(), device=device), sequences()
    result = calibrate(model, seqs, [0.9, 0.6, 1.0], skip, kv)
    assert (result["skip"], result["kv"]) == (skip, kv)
    assert set(result["thresholds"]) == {"1.0", "0.9", "0.6"} and result["realised"] == {}
    ids, valid = (x.to(device) for x in padded(seqs))
    for budget in (0.9, 0.6):
        taus = result["thresholds"][str(budget)]
        trace = model(ids, valid=valid, policy=SkipPolicy("frozen", budget, skip, kv, thresholds=taus))[1]
        for branch, keep in enumerate(trace.keep):
            skipped = (~keep[valid]).sum().item()
            if not MAY_SKIP[skip][branch]:
                followed = (~trace.keep[branch - 1][valid]).sum().item() if skip == "layer" else 0
                assert taus[branch] == 0 and skipped == followed
            else:
                assert abs(skipped - (1 - budget) * 60) <= 1 + 1e-9, (branch, skipped)
                assert (trace.scores[branch][valid] - taus[branch]).abs().min() > 1e-12
    scores = model(ids, valid=valid)[1].scores
    lowest = [s[valid].min().item() if MAY_SKIP[skip][branch] else 0.0 for branch, s in enumerate(scores)]
    assert result["thresholds"]["1.0"] == pytest.approx(lowest, abs=1e-12)


@on_devices
@torch.no_grad()
def test_one_token_repeated_alone_and_in_batches(device):
    """Equal tokens tie at attention 0; a tau on the tie flips with the last bit, which in float32 differs between batch
    sizes. Calibrated thresholds lie beside ties: 50 equal tokens, alone or in batches of 2, 3 and 33, get one mask."""
    model = build(llama(num_hidden_layers=3), dtype=torch.float32, device=device)
    table = calibrate(model, [[token] * 50 for token in (5, 9, 17, 33, 41)], [0.9, 0.7, 0.5])["thresholds"]
    skipped = 0
    for token in (5, 9, 17, 33, 41):
        for budget in (0.9, 0.8, 0.7, 0.5):
            policy = SkipPolicy("frozen", budget, thresholds=thresholds_at(table, budget))
            for compute in ("masked", "compact"):
                alone = model(torch.full((1, 50), token, device=device), policy=policy, compute=compute)[1].keep
                for batch in (2, 3, 33):
                    keep = model(torch.full((batch, 50), token, device=device), policy=policy, compute=compute)[1].keep
                    same_masks(keep, [m.expand(batch, 50) for m in alone])
            assert all(m.all() or not m.any() for m in alone)
            skipped += sum((~m).any().item() for m in alone)
    assert skipped >= 10                                         # of 5 x 4 x 6 (token, budget, branch)


# The policy of a loaded model.

TRAINED = dict(skip="all", kv="copy_up", budget_start=1.0, budget_end=0.8, schedule="linear")


@pytest.fixture(scope="module")
def configs():
    """Of a model calibrated at 0.9 and 0.7 (below the 0.8 it was trained for), of one without thresholds, and of one
    without gates."""
    table = calibrate(build(llama()), sequences(), [1.0, 0.9, 0.7])
    return {"calibrated": llama(gateskip=TRAINED | table), "trained": llama(gateskip=dict(TRAINED)),
            "plain": llama(gate=None)}


def test_policy_for_a_model(configs, capsys):
    """Thresholds of another budget, the batch quantile without a word, settings that are not the trained ones."""
    calibrated, plain, trained = configs["calibrated"], configs["plain"], configs["trained"]
    policy = make_policy(calibrated, "auto", 0.85)
    assert (policy.kind, policy.budget, policy.skip, policy.kv) == ("frozen", 0.85, "all", "copy_up")
    assert policy.thresholds == thresholds_at(calibrated.gateskip["thresholds"], 0.85)
    assert "budget 0.85 is not among the calibrated (1.0, 0.9, 0.7): thresholds interpolated" in capsys.readouterr().err
    assert make_policy(calibrated, "auto", 0.9).thresholds == calibrated.gateskip["thresholds"]["0.9"]
    assert make_policy(calibrated, "batch", 0.85, kv="dense").kv == "dense" and capsys.readouterr().err == ""
    assert make_policy(trained, "auto", 0.85).kind == "batch"
    assert "skips nothing in a decoding step of a single stream" in capsys.readouterr().err
    missed = llama(gateskip=calibrated.gateskip | {"realised": {"0.9": 0.105, "0.7": 0.423}, "missed": {"0.7": 0.3}})
    assert make_policy(missed, "auto", 0.9).kind == "frozen" and capsys.readouterr().err == ""
    make_policy(missed, "auto", 0.7)
    assert "budget 0.7 was not reached when this model was calibrated: it skips 42.3% where 30.0% is asked" in (
        capsys.readouterr().err)
    for config in (llama(gateskip=TRAINED | {"threshold": kind}) for kind in ("global", "branch")):
        for kind in ("batch", "topk", "auto"):
            make_policy(config, kind, 0.85)
            assert ("one threshold for all branches" in capsys.readouterr().err) == (
                config.gateskip["threshold"] == "global")
    for config, kind, budget in ((plain, "auto", 1.0), (calibrated, "frozen", 1.0), (calibrated, "none", 0.5)):
        assert make_policy(config, kind, budget).kind == "none"
    a, b, c = (make_policy(plain, "random", 0.5, seed=seed) for seed in (1, 1, 2))
    masks = [p.keep(0, None, torch.ones(1, 64, dtype=torch.bool)) for p in (a, b, c)]
    assert torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])


def test_settings_of_the_training_are_those_of_the_policy():
    """A model trained with attention skipped and K and V computed, that generation runs with all skipped, copied up."""
    config = llama(gateskip=dict(skip="attn", kv="dense"))
    for kind, budget in (("none", 1.0), ("random", 0.8), ("batch", 0.8), ("topk", 0.8)):
        for asked, kept in ((None, ("attn", "dense")), ("mlp", ("mlp", "dense"))):
            policy = make_policy(config, kind, budget, skip=asked)
            assert (policy.kind, policy.budget, policy.skip, policy.kv) == (kind, budget, *kept)


def test_policy_that_cannot_be(configs, capsys):
    """Thresholds used under settings they were not made for, or silently replaced by something else."""
    for name, kind, budget, settings, complaint in (
            ("calibrated", "auto", 0.85, dict(kv="dense"),
             "calibrated with --skip all --kv copy_up, not --skip all --kv dense"),
            ("calibrated", "frozen", 0.85, dict(skip="attn"), "not --skip attn --kv copy_up"),
            ("calibrated", "auto", 0.5, {}, "budget 0.5 is below the smallest calibrated one, 0.7"),
            ("trained", "frozen", 0.85, {}, "this model is not calibrated"),
            ("plain", "auto", 0.85, {}, "has no gates"), ("plain", "topk", 0.85, {}, "has no gates"),
            ("calibrated", "auto", float("nan"), {}, "budget nan"), ("calibrated", "none", 0.0, {}, "budget 0.0")):
        with pytest.raises(InputError) as error:
            make_policy(configs[name], kind, budget, **settings)
        assert complaint in str(error.value) and "\n" not in str(error.value)
    assert capsys.readouterr().err == ""                         # no warning beside an error
    make_policy(configs["calibrated"], "auto", 0.7)
    assert capsys.readouterr().err == "warning: budget 0.7 is below 0.8, the lowest this model was trained for\n"
