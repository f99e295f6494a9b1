"""Tests of by_hand.py, the oracle: its arithmetic against numpy and Hugging Face, then every fast path against it.

Float64, tolerance 1e-9, keep masks first.
"""
import re
from pathlib import Path

import numpy
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from conftest import (MAY_SKIP, VOCAB, both_kv, both_ways, build, families, frozen, gemma, llama, mixed, new_cache,
                      padding, same, same_masks, tokens)

import by_hand
import decoder_by_hand
import gates
from gates import GRANULARITIES, GateConfig, SkipPolicy, select_tokens, sparsity_loss
from generate import generate
from load_weights import load_model
from model import MLP, Attention, Block, Model, RMSNorm

HERE = Path(__file__).resolve().parent
ROPE3 = dict(factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)
# every form, arch, input and placement once at least, gates of its own and shared
GATES = [GateConfig(), GateConfig("scalar"), GateConfig(arch="mlp"), GateConfig("scalar", "mlp", input="residual"),
         GateConfig(arch="lowrank", rank=3), GateConfig(shared=True), GateConfig(input="residual"),
         GateConfig(placement="before"), GateConfig(detach=True),
         GateConfig("scalar", input="residual", placement="before", shared=True, detach=True)]
name_of = lambda g: f"{g.form}-{g.arch}-{g.input}-{g.placement}{'-shared' * g.shared}{'-detach' * g.detach}"
all_gates = pytest.mark.parametrize("gate", GATES, ids=name_of)


def masks(keep):
    """keep[branch][token] of one sequence -> per branch (1, S) bool, as in a trace."""
    return [torch.tensor([row]) for row in keep]


def stacked(KV, layer, which):
    """The keys (0) or values (1) of a layer in the lists, (Hkv, S, D) as in a cache."""
    return torch.stack([torch.stack(pair[which]) for pair in KV[layer]], dim=1)


def agree(model, ids, policy, compute="compact"):
    """Assert that masks, gates, logits, keys and values are those of by_hand.forward. Returns the masks."""
    cache = new_cache(model, 1, len(ids))
    with torch.no_grad():
        logits, g, keep, KV = by_hand.forward(model, ids, policy.budget, policy.thresholds, policy.skip, policy.kv)
        fast, trace = model(torch.tensor([ids]), cache=cache, policy=policy, compute=compute, keep_gates=True)
    same_masks(trace.keep, masks(keep))
    same(fast[0], logits)
    for a, b in zip(trace.gates or [], g, strict=trace.gates is not None):
        same(a[0], torch.stack(b))
    for layer in range(len(KV)):
        same(cache.k[layer][0], stacked(KV, layer, 0))
        same(cache.v[layer][0], stacked(KV, layer, 1))
    return trace.keep


# The threshold.

def test_four_tokens():
    """A quantile from the wrong end, or a rule that keeps what should go: the README's example, by both paths."""
    scores = [0.61, 0.70, 0.64, 0.75]
    assert by_hand.quantile_threshold(scores, 0.5) == pytest.approx(0.67, abs=1e-15)
    assert [score > by_hand.threshold(scores, 0.5) for score in scores] == [False, True, False, True]
    assert select_tokens(torch.tensor([scores], dtype=torch.float64), 0.5).tolist() == [[False, True, False, True]]


def test_quantile_is_numpys():
    """An index off by one, rounding that misses a whole position, or s[n] behind the end: random scores, all of q."""
    generator = numpy.random.default_rng(0)
    for n in (1, 2, 3, 7, 20, 21, 50):
        for q in (0.0, 0.05, 0.15, 0.2, 0.5, 0.85, 1.0, generator.random()):
            for v in (generator.random(n), generator.integers(0, 3, n) / 7, numpy.full(n, 0.3)):
                ours = by_hand.quantile_threshold(v.tolist(), q)
                assert abs(ours - numpy.quantile(v, q, method="linear")) < 1e-12
                assert abs(ours - gates.quantile_threshold(torch.tensor(v), q).item()) < 1e-15


def test_a_whole_position_is_exact():
    """(1 - 0.8) * 10 is 1.9999999999999996: a tau just below the third score would keep one token too many."""
    scores = [i ** 0.5 for i in range(11)]
    assert (1 - 0.8) * 10 < 2 and by_hand.quantile_threshold(scores, 1 - 0.8) == scores[2]


@pytest.mark.parametrize("budget", [1.0, 0.8, 0.5, 0.2, 0.01])
def test_who_is_kept(budget):
    """The printed rule where it is not ours: budget 1, one token, equal scores, ties at tau and at the top."""
    generator = torch.Generator().manual_seed(0)
    cases = [[0.5], [0.5, 0.5], [0.3, 0.3, 0.3], [0.1, 0.9, 0.9, 0.9], [0.9, 0.1], [0.1, 0.1, 0.2]]
    cases += [torch.rand(n, generator=generator).double().tolist() for n in (2, 3, 8, 33)]
    cases += [(torch.randint(3, (n,), generator=generator).double() / 7).tolist() for n in (2, 3, 8, 33)]
    for scores in cases:
        tau = by_hand.threshold(scores, budget)
        assert any(score > tau for score in scores)
        keep = select_tokens(torch.tensor(scores, dtype=torch.float64), budget)
        assert [s > tau for s in scores] == keep.tolist(), scores


# The decoder, without gates.

@pytest.mark.parametrize("name", ["gemma2", "llama_rope3", "llama_untied"])
@torch.no_grad()
def test_hugging_faces_logits(name):
    """A mistake that both paths share: norms, rope and its scaling, activation, softcaps, windows, the head."""
    g = load_file(HERE / "golden" / name / "golden.safetensors")
    logits, _, keep, _ = by_hand.forward(load_model(HERE / "golden" / name), g["input_ids"][0].tolist())
    assert (logits - g["logits"][0]).abs().max() < 1e-3
    assert all(map(all, keep))


@families
def test_no_gates_is_equation_1(family):
    """A decoder without gates that is scaled, or skips: h' = h + o for every token, whatever budget is asked for."""
    model, ids = build(family(None)), tokens(1, 8)[0].tolist()
    agree(model, ids, SkipPolicy())
    with torch.no_grad():
        same(by_hand.forward(model, ids, 0.5)[0], by_hand.forward(model, ids)[0], 0.0)


@families
def test_rope_scaling(family):
    """llama3's scaling left out, or applied to the wrong wavelengths: long, middle and short ones are here."""
    config = family(head_dim=12, num_hidden_layers=2, rope_scaling=ROPE3)
    model, ids = build(config), tokens(1, 10)[0].tolist()
    agree(model, ids, SkipPolicy())
    model.config.rope_scaling = None
    assert (by_hand.forward(model, ids)[0] - model(torch.tensor([ids]))[0][0]).abs().max() > 1e-3


# Gates and skipping: lines 4 to 16.

@all_gates
@families
def test_every_gate(family, gate):
    """A gate that reads, multiplies or averages something else than eq. 2 says; and the skipping that comes of it."""
    model, ids = build(family(gate, num_hidden_layers=3), seed=1), tokens(1, 8)[0].tolist()
    for budget in (1.0, 0.8, 0.5, 0.2):
        keep = agree(model, ids, SkipPolicy("batch", budget))
        assert {round(8 * (1 - m.double().mean().item())) for m in keep} == {{1.0: 0, 0.8: 2, 0.5: 4, 0.2: 6}[budget]}


@both_kv
@pytest.mark.parametrize("skip", GRANULARITIES)
@families
def test_every_granularity(family, skip, kv):
    """Branches that skip without being asked, an MLP that does not follow its layer, K and V copied where they should
    be computed or the other way round: by quantile and by frozen thresholds."""
    model, ids = build(family()), tokens(1, 8)[0].tolist()
    for policy in (SkipPolicy("batch", 0.5, skip, kv), frozen(model, torch.tensor([ids]), None, 0.4, skip, kv)):
        keep = agree(model, ids, policy)
        follows = [MAY_SKIP[skip][b - b % 2 if skip == "layer" else b] for b in range(8)]
        assert all(may or m.all() for may, m in zip(follows, keep))
        assert any(not m.all() for m in keep)


@both_ways
@both_kv
@families
def test_runs_of_skips(family, kv, compute):
    """A copy from the layer below that takes its own K instead of what it had copied, or at layer 0 the last layer's:
    six layers, four fifths skipped."""
    model, ids = build(family(num_hidden_layers=6)), tokens(1, 9)[0].tolist()
    keep = agree(model, ids, SkipPolicy("batch", 0.2, kv=kv), compute)
    attention = torch.stack([m[0] for m in keep[::2]])                           # (L, S)
    assert (~attention[1:] & ~attention[:-1]).any() and (~attention[0]).any()


@both_ways
@both_kv
@families
@torch.no_grad()
def test_a_padded_batch(family, kv, compute):
    """Padding that is ranked, attended or given a position: three prompts of unequal lengths in one batch under frozen
    thresholds, each against the loops, which know of no batch. Padding leaves no trace in the cache."""
    model, lengths = build(family()), [5, 8, 3]
    ids, valid, cache = tokens(3, 8), padding(lengths, 8), new_cache(model, 3, 10)
    policy = frozen(model, ids, valid, share=0.4, kv=kv)
    logits, trace = model(ids, valid=valid, cache=cache, policy=policy, compute=compute)
    mixed(trace.keep, valid)
    for row, n in enumerate(lengths):
        how = dict(thresholds=policy.thresholds, kv=kv)
        loops, _, keep, KV = by_hand.forward(model, ids[row, 8 - n:].tolist(), **how)
        same_masks([m[row:row + 1, 8 - n:] for m in trace.keep], masks(keep))
        same(logits[row, 8 - n:], loops)
        for layer in range(4):
            same(cache.k[layer][row, :, :n], stacked(KV, layer, 0))
            same(cache.v[layer][row, :, :n], stacked(KV, layer, 1))
            assert not cache.k[layer][row, :, n:].any() and not cache.v[layer][row, :, n:].any()


@torch.no_grad()
def test_copied_up_or_not():
    """kv="dense" and "copy_up" that are one and the same in both paths: whose keys at layer 1 are those of layer 0."""
    model, ids = build(llama()), tokens(1, 8)[0].tolist()
    for kv in ("copy_up", "dense"):
        _, _, keep, KV = by_hand.forward(model, ids, 0.5, kv=kv)
        copied = [all(torch.equal(a, b) for a, b in zip(KV[1][i][0], KV[0][i][0])) for i in range(8)]
        assert copied == [kv == "copy_up" and not kept for kept in keep[2]] and not all(keep[2])


@torch.no_grad()
def test_skipped_tokens_are_untouched():
    """A skipped token whose state changes in the last bit: nobody passes, and the logits are the embedding's."""
    model, ids = build(llama()), tokens(1, 5)[0].tolist()
    never = [2.0] * 8
    logits, _, keep, _ = by_hand.forward(model, ids, 0.5, never)
    assert not any(map(any, keep))
    h = [by_hand.norm(model.model["embed_tokens"].weight[i], model.model["norm"], model.config) for i in ids]
    assert torch.equal(logits, torch.stack([model.lm_head.weight @ h_i for h_i in h]))
    agree(model, ids, SkipPolicy("frozen", 0.5, thresholds=never))


def test_float32_of_one_pass():
    """A loop that is only right in float64: the embedded model in float32, as the command runs it."""
    model = load_model(HERE.parent / "examples" / "tiny-llama")
    with torch.no_grad():
        logits = by_hand.forward(model, list(range(3, 15)))[0]
        fast = model(torch.tensor([list(range(3, 15))]))[0][0]
    assert logits.dtype == torch.float32 and (logits - fast).abs().max() < 1e-4 * fast.abs().max()


def test_the_oracle_is_independent(monkeypatch):
    """An oracle that calls what it is to judge agrees with any bug of it: every forward of model.py is taken away."""
    model, ids = build(gemma()), tokens(1, 5)[0].tolist()

    def forbidden(*_, **__):
        raise AssertionError("the fast path ran")
    for kind in (Model, Block, Attention, MLP, RMSNorm, gates.Gate):
        monkeypatch.setattr(kind, "forward", forbidden)
    for name in ("quantile_threshold", "select_tokens", "sparsity_loss", "may_skip", "budget_at"):
        monkeypatch.setattr(gates, name, forbidden)
    by_hand.training_step(model, ids, 2, 3, 4)
    by_hand.generate(model, ids, 2, b_hat=0.5)
    for module, allowed in ((by_hand, {"math", "pathlib", "console", "torch", "decoder_by_hand"}),
                            (decoder_by_hand, {"math", "torch"})):
        top = re.findall(r"^(?:import|from) (\w+)", Path(module.__file__).read_text(), re.M)
        assert set(top) == allowed


# Training: Algorithm 1.

@both_ways
@both_kv
@pytest.mark.parametrize("skip, kind", [("all", "l2"), ("all", "l1"), ("all", "l2_norm"), ("layer", "l2"),
                                        ("alternate", "l1")])
@families
def test_loss_and_gradients(family, skip, kind, kv, compute):
    """A loss on the question, off by one token, or averaged over something else; a sparsity loss of the wrong power, or
    costs that weigh nothing, or other branches; gradients that stop at a gather, a copied row or a skipped token. Every
    parameter, step 7 of 10."""
    model, ids = build(family(num_hidden_layers=3)).train(), tokens(1, 7)[0]
    policy = SkipPolicy("batch", gates.budget_at(7, 10, 1.0, 0.4), skip, kv)
    logits, trace = model(ids[None], policy=policy, compute=compute)
    costs = [2.0, 0.5, 0.0, 1.5, 0.25, 1.75]
    loss = F.cross_entropy(logits[0, 2:-1], ids[3:]) + 0.3 * sparsity_loss(trace.gates, kind=kind, costs=costs)
    loss.backward()
    fast = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    loops = by_hand.training_step(model, ids.tolist(), 3, 7, 10, 0.3, kind, b_2=0.4, costs=costs, skip=skip, kv=kv)
    loops.backward()
    assert any(not m.all() for m in trace.keep)
    same(loops, loss)
    for name, p in model.named_parameters():
        if p.grad is None or fast[name] is None:
            assert p.grad is fast[name] is None, name
        same(p.grad, fast[name])


def test_detached_gates():
    """gate_detach that the loops ignore: the gradients differ in the backbone only, the loss does not."""
    for gate in (GateConfig(detach=True), GateConfig(detach=True, input="residual")):
        model, ids = build(llama(gate, num_hidden_layers=2)).train(), tokens(1, 6)[0]
        logits, trace = model(ids[None])
        (F.cross_entropy(logits[0, 1:-1], ids[2:]) + sparsity_loss(trace.gates)).backward()
        fast = {name: p.grad.clone() for name, p in model.named_parameters()}
        model.zero_grad()
        by_hand.training_step(model, ids.tolist(), 2, 0, 1, 1.0, b_2=1.0).backward()
        for name, p in model.named_parameters():
            same(p.grad, fast[name])


def test_budget_of_a_step(monkeypatch):
    """b_t that starts a step late or ends above b_2 (line 3 counts from 1, step from 0); a single step, too."""
    seen, model = [], build(llama(num_hidden_layers=1))
    forward = by_hand.forward
    monkeypatch.setattr(by_hand, "forward", lambda model, ids, b: seen.append(b) or forward(model, ids, b))
    for total in (1, 2, 5):
        for step in range(total):
            by_hand.training_step(model, [1, 2, 3], 1, step, total)
            assert seen[-1] == pytest.approx(gates.budget_at(step, total), abs=1e-15)
    assert seen[:3] == [0.8, 1.0, 0.8]


# Generation: Algorithm 2.

@families
@torch.no_grad()
def test_frozen_decisions_are_causal(family):
    """K and V in another order, or positions that start anew: one pass over everything and token by token decide, see
    and compute the same under frozen thresholds."""
    model, ids = build(family()), tokens(1, 9)[0].tolist()
    policy = frozen(model, torch.tensor([ids]), share=0.4)
    logits, _, keep, KV = by_hand.forward(model, ids, thresholds=policy.thresholds)
    mixed(masks(keep), torch.ones(1, 9, dtype=torch.bool))
    earlier = None
    for i, token in enumerate(ids):
        one, _, kept, earlier = by_hand.forward(model, [token], thresholds=policy.thresholds, earlier=earlier)
        assert [k[0] for k in kept] == [k[i] for k in keep]
        same(one[0], logits[i])
    for layer in range(4):
        same(stacked(earlier, layer, 0), stacked(KV, layer, 0))


@both_kv
@families
def test_generate(family, kv):
    """Algorithm 2 and its batched fast path that part ways: dense, by frozen thresholds, and by the quantile over the
    tokens of a pass, which a lone token always survives; prompts alone and in one left-padded batch."""
    model, prompts = build(family()), [tokens(1, n, seed=n)[0].tolist() for n in (6, 3)]
    fixed = frozen(model, torch.tensor([prompts[0]]), share=0.4, kv=kv)
    for policy in (SkipPolicy(kv=kv), fixed, SkipPolicy("batch", 0.6, kv=kv)):
        how = dict(b_hat=policy.budget, thresholds=policy.thresholds, kv=kv)
        loops = [by_hand.generate(model, prompt, 5, **how) for prompt in prompts]
        assert [generate(model, [prompt], 5, policy).tokens[0] for prompt in prompts] == loops
        if policy.kind != "batch":
            assert generate(model, prompts, 5, policy).tokens == loops


def test_generate_stops():
    """An end token that is not returned, or does not end: A is empty after it, and never longer than steps."""
    model, prompt = build(llama()), tokens(1, 4)[0].tolist()
    new = by_hand.generate(model, prompt, 6)
    assert len(new) == 6 and all(0 <= token < VOCAB for token in new)
    ends = {new[3]}
    expected = new[:new.index(new[3]) + 1]
    assert by_hand.generate(model, prompt, 6, ends) == expected == generate(model, [prompt], 6, eos_ids=ends).tokens[0]


# What a reader sees.

def test_the_command(capsys):
    """A command that shows wrong numbers, or loops that part ways with the fast path on the embedded model."""
    by_hand.main()
    out = capsys.readouterr().out
    assert "tau = 0.64 + 0.5 * (0.70 - 0.64) = 0.67" in out
    assert re.findall(r"token \d: .* (\w+)$", out, re.M) == ["skipped", "kept", "skipped", "kept"]
    assert re.search(r"Question: .*\nAnswer: .*\n#### \d+\n", out)
    assert out.count("the same") == 1 and "OTHER" not in out
