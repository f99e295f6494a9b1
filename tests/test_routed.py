"""Tests of paper/routed.py, with each method that stands on it: the ways of running it, its cost, runs and folders."""
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import load_weights
import train
from conftest import (Synchronisations, both_ways, complaint, families, given, llama, mixed, new_cache, on_devices,
                      padding, same, same_masks, tokens)
from data import encode_all, load_examples
from eval_gsm8k import run_row
from gates import GateConfig, SkipPolicy, sparsity_loss
from generate import generate
from load_weights import load_model, load_tokenizer, read_json, save_model
from routed_models import CLASSES, HOW, METHODS, SHORT, policy_of, routed_model, train_toy
from savings import count_macs, macs_of
from thresholds import one_pass
from toy_runs import Killed, at_step, folder, kill, last, metrics, run, same_bits, state, undisturbed

import routed

each = pytest.mark.parametrize("name", METHODS)


@pytest.fixture(scope="module")
def runs(folder, tmp_path_factory):
    """A short run of each method."""
    found = {}
    for name in METHODS:
        found[name] = tmp_path_factory.mktemp("routed") / name
        assert train_toy(name, folder, found[name]) == 0
    return found


# The ways of running a model.

@each
@families
@torch.no_grad()
def test_compact_equals_masked(name, family):
    """A row that runs and should not, or one that is written to another's place; with and without padding."""
    model, ids = routed_model(name, family), tokens(3, 9)
    for valid in (None, padding([9, 4, 6], 9), padding([9, 4, 6], 9, "right")):
        policy = policy_of(name, model, ids, valid)
        (a, trace), (b, other) = (model(ids, valid=valid, policy=policy, compute=c) for c in ("masked", "compact"))
        same_masks(trace.keep, other.keep)
        if name != "mindskip":                                   # of 3 sequences a share is coarse
            mixed(trace.keep, trace.valid)
        same(a[trace.valid], b[trace.valid])


@each
@families
@both_ways
@on_devices
@pytest.mark.parametrize("lengths", [[7, 3, 5], [7, 7, 7]])
@torch.no_grad()
def test_cached_equals_one_pass(name, family, compute, device, lengths):
    """A key that the cache shows though its token bypassed, a decision taken anew, a slot off by one: prompts,
    left-padded if unequal, then token by token; in one pass each alone, under the masks that were decided."""
    model, ids, new = routed_model(name, family).to(device), tokens(3, 12, device=device), 5
    valid = None if min(lengths) == 7 else padding(lengths, 7, device=device)
    policy = policy_of(name, model, ids[:, :7], valid)
    cache = new_cache(model, 3, 12)
    calls = [model(ids[:, :7], valid=valid, cache=cache, policy=policy, compute=compute)]
    calls += [model(ids[:, i:i + 1], cache=cache, policy=policy, compute=compute) for i in range(7, 7 + new)]
    logits = torch.cat([x for x, _ in calls], 1)                                 # (B, S + new, V)
    for b, n in enumerate(lengths):
        keep = [torch.cat([trace.keep[branch][b:b + 1] for _, trace in calls], 1)[:, 7 - n:] for branch in range(6)]
        alone = ids[b:b + 1, 7 - n:]
        whole, trace = model(alone, policy=given(keep, policy))
        same(logits[b:b + 1, 7 - n:], whole)
        if name != "mindskip":                                   # and they are what one pass decides by itself
            same_masks(model(alone, policy=policy)[1].keep, keep)


@each
@families
@torch.no_grad()
def test_a_batch_is_generated_as_each_alone(name, family):
    """Batch mates or padding that change an answer, and what a cache keeps lost when a sequence leaves."""
    model = routed_model(name, family)
    prompts = [list(map(int, tokens(1, n, seed=n)[0])) for n in (6, 3, 9)]
    policy = policy_of(name, model, tokens(3, 9))
    first = generate(model, prompts, 8, policy).tokens
    ends = {first[0][2], first[1][4]}                            # so that sequences leave at different steps
    together = generate(model, prompts, 8, policy, ends)
    alone = [generate(model, [prompt], 8, policy, ends).tokens[0] for prompt in prompts]
    assert together.tokens == alone and len(set(map(len, alone))) > 1
    assert 0.05 < together.savings.report()["skipped"] < 0.95


@each
def test_training_is_the_same_with_recomputed_blocks_and_gathered_rows(name):
    """A decision, or a random draw, that a backward pass makes anew; a gradient that gathering loses."""
    model, ids, valid = routed_model(name).train(), tokens(3, 9), padding([9, 4, 6], 9, "right")
    policy, found = CLASSES[name].policy("batch", 0.6, **HOW[name]), []
    for way in (dict(), dict(checkpoint_blocks=True), dict(compute="compact")):
        torch.manual_seed(5)
        model.zero_grad()
        logits, trace = model(ids, valid=valid, policy=policy, **way)
        (logits[valid].pow(2).mean() + CLASSES[name].loss(trace.gates, valid, "l2", 0.6, None)).backward()
        found.append({key: torch.zeros_like(p) if p.grad is None else p.grad for key, p in model.named_parameters()})
    for key, grad in found[0].items():
        same(found[1][key], grad)
        same(found[2][key], grad)
    assert all(grad.abs().max() > 0 for key, grad in found[0].items() if "_gate." in key)


@each
@torch.no_grad()
def test_masked_decoding_never_waits(name):
    """A router that asks the host in every block: a GPU would stand still."""
    model, ids = routed_model(name), tokens(2, 6)
    policy = policy_of(name, model, ids)
    with Synchronisations() as seen:
        cache = new_cache(model, 2, 8)
        model(ids, cache=cache, policy=policy)
        model(ids[:, :1], cache=cache, policy=policy)
    assert seen.seen == []


# What it costs.

@each
@families
@torch.no_grad()
def test_count_equals_the_flop_counter(name, family):
    """A router that is not paid, K and V of bypassing tokens that are computed after all."""
    model, ids = routed_model(name, family), tokens(3, 7)
    policy = policy_of(name, model, ids)

    def agrees(ids, valid=None, cache=None):
        counter = FlopCounterMode(display=False)
        with sdpa_kernel(SDPBackend.MATH), counter:
            trace = model(ids, valid=valid, cache=cache, policy=policy, compute="compact", last=True)[1]
        assert not torch.stack(trace.keep).all() or ids.shape[1] == 1
        assert counter.get_total_flops() == 2 * macs_of(model.config, trace).item()

    agrees(ids)
    cache = new_cache(model, 3, 12)
    agrees(ids, padding([7, 3, 5], 7), cache)
    for _ in range(3):
        agrees(tokens(3, 1), cache=cache)


@pytest.mark.parametrize("name, settings, charged", [
    ("mixture_of_depths", {}, 24 + 24 * 12 + 12), ("mixture_of_depths", {"substitute": "router"}, 24),
    ("mindskip", {}, 0), ("skiplayer", {}, 2 * 2 * 24)])
def test_what_a_block_is_charged_for_its_routers(name, settings, charged):
    """A predictor that is free, or a router that counts once a branch: multiply-accumulates of a token, width 24."""
    config = CLASSES[name](llama(GateConfig("scalar")), **settings).config
    valid = torch.ones(1, 1, dtype=torch.bool)
    count = lambda gate: count_macs(config, valid.expand(8, 1, 1), valid, keys=0, logit_rows=0, gate=gate).item()
    assert count(config.gate) - count(None) == 4 * charged


# Runs and their folders.

@each
def test_a_run_trains_and_its_folder_says_whose_it_is(name, runs, folder):
    """A backbone or a router that stays as it was, and a folder that load_model takes for a GateSkip model."""
    out, method = runs[name], METHODS[name]
    model = method.open_model(out)
    assert type(model) is CLASSES[name] and not model.training
    text = complaint(load_model, out)
    assert f"{name} is not supported" in text and "config.json" in text
    before, after = load_model(folder).state_dict(), model.state_dict()
    moved = {key: not torch.equal(p, after[key]) for key, p in before.items()}
    assert not any(moved.values()) if "--freeze-backbone" in method.FLAGS else all(moved.values())
    rows = metrics(out)
    assert len(rows) == 6 and all(row["sparsity"] >= 0 for row in rows)
    assert read_json(last(out) / "config.json")[name] == {"opens with": f"paper/{name}.py", **model.settings}
    others = [other for other in METHODS if other != name]
    assert all("open it as what it is" in complaint(METHODS[other].open_model, out) for other in others)
    assert "open it as what it is" in complaint(method.open_model, folder)


@each
def test_a_folder_gives_the_same_model(name, runs, tmp_path):
    """A weight, or a setting, that saving and opening loses."""
    model, ids = METHODS[name].open_model(runs[name]), tokens(2, 7)
    save_model(model, tmp_path)
    again = METHODS[name].open_model(tmp_path, dtype=torch.float64)
    same_bits(dict(model.double().state_dict()), dict(again.state_dict()))
    policy = policy_of(name, again, ids)
    assert torch.equal(again(ids, policy=policy)[0], model(ids, policy=policy)[0])


@pytest.mark.parametrize("name, settings", [("mixture_of_depths", dict(substitute="router", as_published_code=True)),
                                            ("skiplayer", dict(as_published_code=True))])
def test_a_folder_keeps_what_was_chosen(name, settings, folder, tmp_path):
    """A model that opens with a method's defaults: the published code's deviation trained, and then undone."""
    assert train_toy(name, folder, tmp_path / "run", settings=settings, steps=2) == 0
    model = METHODS[name].open_model(tmp_path / "run")
    assert model.settings == settings and all(block.as_published_code for block in model.model["layers"])
    assert name == "skiplayer" or not any(".mlp_gate." in key for key in model.state_dict())


@each
def test_a_resumed_run_is_the_unbroken_one(name, runs, folder, tmp_path, monkeypatch):
    """A router that begins anew, a draw that differs; and a run that goes on as another than it began."""
    at_step(monkeypatch, 4, kill)
    with pytest.raises(Killed):
        train_toy(name, folder, tmp_path / "run")
    undisturbed(monkeypatch)
    if name != "mindskip":
        text = complaint(train_toy, name, folder, tmp_path / "run", "--resume", settings=dict(as_published_code=True))
        assert "was trained with" in text
    assert train_toy(name, folder, tmp_path / "run", "--resume") == 0
    one, other = state(runs[name]), state(tmp_path / "run")
    same_bits(one["weights"], other["weights"])
    same_bits(one["config"]["gateskip"], other["config"]["gateskip"])


@each
def test_flags_that_mean_nothing_are_refused(name, folder, tmp_path):
    """A vector gate, another granularity, one threshold for all: trained under a method's name and not the method."""
    for flags in (dict(gate="vector"), dict(gate="none", gate_lr_scale=1.0), dict(gate_arch="mlp"),
                  dict(skip="alternate"), dict(threshold="global"), dict(sparsity_loss="l1"),
                  dict(sparsity_cost="macs")):
        words = [w for flag, value in flags.items() for w in (f"--{flag.replace('_', '-')}", str(value))]
        if flags.get("gate") == "none" and "--freeze-backbone" in METHODS[name].FLAGS:
            continue                                             # train.py itself refuses
        text = complaint(train_toy, name, folder, tmp_path / "run", *words)
        assert name in text and "--" in text
    if name == "mindskip":                                       # its backbone trained, too, under its name
        with METHODS[name].training():
            words = METHODS[name].FLAGS.replace("--freeze-backbone", "").split()
            assert "mindskip needs --freeze-backbone" in complaint(run, folder, tmp_path / "run", *words, **SHORT)
    assert not (tmp_path / "run" / "latest").exists()


def test_the_core_is_what_it_was():
    """A patch that stays: the next run of train.py would train routers."""
    before = train.open_model, train.SkipPolicy, load_weights.Model, load_weights.config_from_hf
    for method in METHODS.values():
        with method.training():
            assert train.open_model is not before[0] and load_weights.Model is before[2]
    assert before == (train.open_model, train.SkipPolicy, load_weights.Model, load_weights.config_from_hf)
    assert train.sparsity_loss is sparsity_loss


def test_a_gate_of_the_caller_stays_what_it_was():
    """A charge that a GateConfig keeps after the model is gone."""
    gate = GateConfig("scalar")
    model = CLASSES["skiplayer"](llama(gate))
    assert gate.macs(24) == 24 and model.config.gate.macs(24) == 48 and model.config.gate == gate


# Thresholds.

@each
def test_policies_skip_what_is_asked(name, runs):
    """A quantile of the wrong end, thresholds of the wrong branches, a policy of another granularity or kv."""
    model = METHODS[name].open_model(runs[name])
    with torch.no_grad():                                        # routers that tell tokens apart
        for key, p in model.named_parameters():
            if "_gate." in key and key.endswith("weight"):
                p.normal_(0, p.shape[1] ** -0.5, generator=torch.Generator().manual_seed(len(key)))
    items, _ = encode_all(load_examples("arithmetic", "calibration", 8, 0), load_tokenizer(runs[name]), 1, 160)
    found = METHODS[name].policies(model, items, [1.0, 0.75, 0.5])
    assert list(found) == [1.0, 0.75, 0.5] and found[1.0].kind == "none"
    assert {(p.skip, p.kv) for p in found.values()} == {tuple(HOW[name].values())}
    skipped = {b: routed.realised(model, items, policy) for b, policy in found.items()}
    share = 0.5 if name == "mindskip" else 1.0
    assert skipped[1.0] == 0.0 < skipped[0.75] < skipped[0.5]
    assert all(abs(skipped[b] - (1 - b) * share) < 0.08 for b in found)


@each
@torch.no_grad()
def test_calibration_sees_what_it_has_decided(name):
    """A block that decides anew where calibration has decided: later layers' thresholds would be those of states that
    no skipping has shaped, and skip other shares than asked."""
    model, lengths = routed_model(name), list(range(4, 16))
    ids, valid = tokens(12, 15), padding(lengths, 15, "right")
    taus, _ = one_pass(model, [ids[b, :n].tolist() for b, n in enumerate(lengths)], 0.4, **HOW[name])
    trace = model(ids, valid=valid, policy=SkipPolicy("frozen", 0.6, **HOW[name], thresholds=taus))[1]
    for branch, keep in enumerate(trace.keep):
        skipped = (~keep & valid).sum().item() / valid.sum().item()
        if name == "mindskip" and branch % 2:
            assert skipped == 0
        else:                                                    # a sequence is a twelfth
            assert abs(skipped - 0.4) < (0.1 if name == "mindskip" else 0.011), (branch, skipped)


@each
def test_the_router_decides_at_one_half(name):
    """p = 0.5 exactly, and what is below and above."""
    model = routed_model(name)
    model.config.gateskip = HOW[name]
    policy, valid = METHODS[name].as_trained(model), torch.ones(1, 3, dtype=torch.bool)
    assert policy.keep(0, torch.tensor([[0.4999999, 0.5, 0.6]]), valid).tolist() == [[False, True, True]]


@each
def test_answers_are_scored_and_counted(name, runs):
    """A model that eval_gsm8k.run_row cannot take."""
    model, tokenizer = METHODS[name].open_model(runs[name]), load_tokenizer(runs[name])
    args = SimpleNamespace(batch_size=3, max_new_tokens=5)
    problems = load_examples("arithmetic", "test", 4)
    policy = SkipPolicy("frozen", 0.5, **HOW[name], thresholds=[2.0] * 4)        # all that may skip
    row = run_row(name, model, tokenizer, problems, policy, 0.5, args)
    assert row["n"] == 4 and row["skipped"] == (0.5 if name == "mindskip" else 1.0) and row["macs_saved"] > 0.1
