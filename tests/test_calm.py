"""Tests of paper/calm.py: what all exits learn, who leaves where, and the thresholds that save what is wanted."""
import sys
from types import SimpleNamespace

import numpy
import pytest
import torch
import torch.nn.functional as F

from conftest import (build, complaint, families, in_float32, llama, mixed, new_cache, padding, same, same_masks,
                      tokens)
from data import encode_all, load_examples
from eval_gsm8k import run_row
from gates import GateConfig, SkipPolicy
from generate import generate
from load_weights import load_model, load_tokenizer, save_model
from model import rotate
from savings import Savings
from thresholds import frozen_threshold
from toy_runs import ROOT, folder, last, metrics, run, toy

sys.path.insert(0, str(ROOT / "paper"))
import calm
from calm import Calm, loss, open_calm, thresholds, train_context, weights
from early_exit import early, unembed

both = pytest.mark.parametrize("confidence", calm.CONFIDENCES)


@torch.no_grad()
def toy_calm(family, confidence, threshold="middle", seed=0, **of):
    """A random Calm; "middle": a threshold between the confidences of whole passes, so that some leave at each exit."""
    model = early(build(family(None), seed), Calm, confidence=confidence, **of)
    model.threshold = threshold
    if threshold == "middle":
        h = [h.flatten(0, 1) for h in states(model, tokens(3, 9))]
        c = [calm.CONFIDENCES[confidence](model, h[i], h[i - 1]) for i in (1, 2, 3)]
        model.threshold = frozen_threshold(torch.cat(c), 0.6)
    return model


def skipped(model, trace):
    savings = Savings(model.config)
    savings.add(trace)
    return savings.report()["skipped"]


@torch.no_grad()
def states(model, ids):
    """h_0 ... h_L of the whole model, by a plain loop."""
    h, call = model.begin(ids)
    found, below = [h], None
    for block in model.model["layers"]:
        h, below, _, _ = block(h, below, (None, None), call)
        found.append(h)
    return found


def probabilities(model, h):
    """Softmax of what states predict, in numpy. (..., H) -> (..., V)"""
    h, w = h.double().numpy(), model.model["norm"].weight.detach().double().numpy()
    h = h / numpy.sqrt((h * h).mean(-1, keepdims=True) + model.config.rms_norm_eps)
    logits = h * (1 + w if model.config.gemma else w) @ model.lm_head.weight.detach().double().numpy().T
    if cap := model.config.final_softcap:
        logits = cap * numpy.tanh(logits / cap)
    p = numpy.exp(logits - logits.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


# Who leaves.

@families
@both
@pytest.mark.parametrize("lengths", [None, (9, 4, 6)], ids=["whole", "padded"])
def test_above_one_nobody_leaves(family, confidence, lengths):
    """A confidence above 1, an exit that costs the dense model a bit of its logits, or a softmax that is not paid."""
    dense, model, ids = build(family(None)), toy_calm(family, confidence, 1.0 + 1e-9), tokens(3, 9)
    valid, caches = lengths and padding(lengths, 9), [new_cache(dense, 3, 9) for _ in range(2)]
    (a, _), (b, trace) = (m(ids, valid=valid, cache=cache) for m, cache in zip((dense, model), caches))
    assert torch.equal(a, b) and all(map(torch.equal, caches[0].k + caches[0].v, caches[1].k + caches[1].v))
    assert skipped(model, trace) == 0.0
    savings = Savings(model.config)
    savings.add(trace)
    assert (savings.report()["macs_saved"] < 0) == (confidence == "softmax")


@families
@pytest.mark.parametrize("first", [1, 2, 3, 4])
def test_at_zero_all_leave_at_the_first_exit(family, first):
    """Exits counted from 0, an exit that is not asked, logits of another block's state; after the last block there is
    nothing to leave."""
    model, ids = toy_calm(family, "softmax", 0.0, first=first), tokens(2, 7)
    logits, trace = model(ids, compute="compact")
    assert skipped(model, trace) == (4 - first) / 4
    same(logits, unembed(model, states(model, ids)[first]))


@torch.no_grad()
@families
@both
def test_each_leaves_at_the_first_confident_block(family, confidence, monkeypatch):
    """By hand, token by token: a strict >, a confidence of the wrong state or without the final norm (of the softmax),
    the block's input for its output, the last confident block for the first; rows that go through the head mixed up."""
    monkeypatch.setattr(calm, "ROWS", 5)
    model, ids = toy_calm(family, confidence), tokens(2, 9)
    logits, trace = model(ids)
    seen = []                                                    # h_0 ... h_L under these exits
    h, call = model.begin(ids, policy=SkipPolicy(kv="dense"))
    seen, below, call.keep = [h], None, dict(enumerate(trace.keep))
    for block in model.model["layers"]:
        h, below, _, _ = block(h, below, (None, None), call)
        seen.append(h)
    for b, s in numpy.ndindex(2, 9):
        exit = 4
        for i in (3, 2, 1):
            x, y = seen[i][b, s], seen[i - 1][b, s]
            p = numpy.sort(probabilities(model, x))
            c = p[-1] - p[-2] if confidence == "softmax" else float(x @ y / (x.norm() * y.norm()))
            exit = i if c >= model.threshold else exit
        assert [bool(keep[b, s]) for keep in trace.keep[0::2]] == [i < exit for i in range(4)]
    mixed(trace.keep, trace.valid)


@torch.no_grad()
@both
def test_a_confidence_of_lambda_itself_is_enough(confidence):
    """c > lambda; a lambda that is rounded to the confidences' float32 before it is compared."""
    model, ids = in_float32(toy_calm(llama, confidence, None)), tokens(1, 1)
    before, h = states(model, ids)[:2]
    c = float(calm.CONFIDENCES[confidence](model, h[0], before[0]))
    for model.threshold, ran in ((c, 1), (c + 1e-12, 2)):
        assert sum(bool(keep) for keep in model(ids)[1].keep[0:4:2]) == ran


@both
def test_once_gone_it_stands_still(confidence):
    """h_l is h_e bit for bit above the exit, and K and V there are projected from it: not copied up, not missing, and
    rotated at the token's own position."""
    model, ids, valid, put = toy_calm(llama, confidence), tokens(2, 8), padding((8, 5), 8), []
    for block in model.model["layers"]:
        block.register_forward_hook(lambda block, given, got: put.append(got[0]))
    cache = new_cache(model, 2, 8)
    _, trace = model(ids, valid=valid, cache=cache, compute="compact")
    mixed(trace.keep, valid)
    position = (valid.cumsum(1) - 1).clamp(min=0)
    cos, sin = model.rope_at(position, 8, put[0])                                # (B, S, 1, D/2)
    for layer in range(1, 4):
        gone, block = valid & ~trace.keep[2 * layer], model.model["layers"][layer]
        assert torch.equal(put[layer][gone], put[layer - 1][gone])
        x = block.input_layernorm(put[layer - 1])
        k = rotate(block.self_attn.k_proj(x).unflatten(-1, (2, 4)), cos, sin)    # (B, S, Hkv, D)
        v = block.self_attn.v_proj(x).unflatten(-1, (2, 4))
        assert gone.any() or layer == 1                          # cosines with the embedding are low
        for b, s in gone.nonzero().tolist():
            same(cache.k[layer][b, :, position[b, s]], k[b, s])
            same(cache.v[layer][b, :, position[b, s]], v[b, s])


@families
@both
def test_one_pass_is_the_cached_loop(family, confidence):
    """A confidence that looks at other tokens of the call; padding that is asked; a batch mate that matters. In float32
    within 1e-5."""
    model, ids, lengths = toy_calm(family, confidence), tokens(2, 10), (10, 6)
    for model, tolerance in ((model, 1e-9), (in_float32(model), 1e-5)):
        cache, steps = new_cache(model, 2, 10), []
        whole, trace = model(ids)
        for i in range(10):
            logits, own = model(ids[:, i:i + 1], cache=cache, compute="compact")
            steps.append(logits)
            same_masks([keep[:, i:i + 1] for keep in trace.keep], own.keep)
        same(torch.cat(steps, 1), whole, tolerance)
        mixed(trace.keep, trace.valid)
        padded, beside = model(ids, valid=padding(lengths, 10), compute="compact")
        for row, n in enumerate(lengths):
            alone, own = model(ids[row:row + 1, -n:])
            same(padded[row, -n:], alone[0], tolerance)
            same_masks([keep[0] for keep in own.keep], [keep[row, -n:] for keep in beside.keep])


@families
@both
def test_compact_is_masked_and_asks_whoever_is_there(family, confidence):
    """A softmax of tokens that have left, or of padding; work that is not counted, or counted at the last block too."""
    model, ids, valid = toy_calm(family, confidence), tokens(3, 8), padding((8, 3, 6), 8)
    rows, caches = [], [new_cache(model, 3, 8) for _ in range(2)]
    model.lm_head.register_forward_hook(lambda head, given, got: rows.append(len(given[0])))
    (a, masked), (b, compact) = (model(ids, valid=valid, cache=cache, compute=compute, last=True)
                                 for cache, compute in zip(caches, ("masked", "compact")))
    same_masks(masked.keep, compact.keep)
    same(a, b)
    for x, y in zip(caches[0].k + caches[0].v, caches[1].k + caches[1].v):
        same(x, y)
    asked = [int(keep.sum()) for keep in compact.keep[0:6:2]] if confidence == "softmax" else []
    assert rows == 2 * [*asked, 3]                               # and three rows of logits
    assert masked.more_macs == compact.more_macs == 60 * 24 * sum(asked)


@both
def test_a_higher_threshold_saves_less(confidence):
    """A comparison the wrong way round."""
    for seed in range(3):
        model, ids, saved = toy_calm(llama, confidence, seed=seed), tokens(4, 12, seed), []
        for model.threshold in numpy.linspace(-1.0, 1.01, 12):
            saved.append(skipped(model, model(ids)[1]))
        assert saved == sorted(saved, reverse=True) and saved[0] == 0.75 and saved[-1] == 0.0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_block_that_changes_nothing_saturates(dtype):
    """A cosine of equal states that is rounded to less than 1, or to more."""
    model, ids = toy_calm(llama, "state", 1.0), tokens(3, 9)
    for p in (model.model["layers"][1].self_attn.o_proj.weight, model.model["layers"][1].mlp.down_proj.weight):
        p.data.zero_()
    model = model.to(dtype)
    _, trace = model(ids)
    assert [bool(keep.all()) for keep in trace.keep[0::2]] == [True, True, False, False]
    assert not trace.keep[4].any()
    model.threshold = 1.0 + 1e-12
    assert skipped(model, model(ids)[1]) == 0.0


# What is learnt.

def test_weights_of_the_exits():
    """Weights that do not sum to 1, begin at 0 (an exit at the embedding) or fall with depth."""
    for blocks in (1, 2, 7, 16):
        assert sum(weights(blocks)) == pytest.approx(1.0, abs=1e-12) and len(weights(blocks)) == blocks
        assert weights(blocks)[-1] / weights(blocks)[0] == pytest.approx(blocks)
        assert numpy.diff(weights(blocks)) == pytest.approx(weights(blocks)[0])
    assert weights(1) == [1.0] and [round(weights(16)[i - 1], 4) for i in (1, 8, 16)] == [0.0074, 0.0588, 0.1176]


def trained_pass(model, ids, places):
    model.train()(ids, places=places)
    return model


@families
def test_loss_by_hand(family):
    """An exit without the final norm, one at the embedding, places of another order, a mean for the sum."""
    model, ids, places = toy_calm(family, "softmax", 0.0), tokens(2, 6), torch.tensor([9, 1, 4])
    targets, expected = torch.tensor([3, 7, 7]), 0.0
    for i, h in enumerate(states(model, ids)[1:], 1):
        p = probabilities(model, h.flatten(0, 1)[places])
        expected += i / 10 * -numpy.log(p[numpy.arange(3), targets.numpy()]).sum()
    value = loss(trained_pass(model, ids, places), targets)
    assert value.item() == pytest.approx(expected, rel=1e-5)     # train.py's cross-entropy is in float32
    value.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_of_one_block_it_is_the_cross_entropy():
    """L = 1: nothing but train.py's own loss."""
    model, ids = early(build(llama(None, num_hidden_layers=1)), Calm), tokens(2, 6)
    places, targets = torch.tensor([2, 7]), torch.tensor([5, 8])
    logits, _ = model.train()(ids, places=places)
    assert loss(model, targets).item() == F.cross_entropy(logits.float(), targets, reduction="sum").item()


@both
def test_nobody_leaves_while_it_is_trained(confidence):
    """Exits in training, whose tokens' later states would learn nothing; a head that runs for nothing."""
    model, ids = toy_calm(llama, confidence, -1.0), tokens(2, 6)
    _, trace = model.train()(ids)
    assert torch.stack(trace.keep).all() and trace.more_macs == 0


# As the authors ran it.

def test_as_published_heads_lack_the_norm():
    """A final norm at an inner exit after all, or none at the last."""
    model, ids, places = toy_calm(llama, "softmax", as_published_code=True), tokens(2, 6), torch.arange(12)
    targets, total = ids.flatten(), 0.0
    found = [h.flatten(0, 1) for h in states(model, ids)]
    for i in (1, 2, 3):
        total += i / 10 * F.cross_entropy(found[i] @ model.lm_head.weight.T, targets, reduction="sum").item()
    total += 4 / 10 * F.cross_entropy(unembed(model, found[4]), targets, reduction="sum").item()
    assert loss(trained_pass(model, ids, places), targets).item() == pytest.approx(total, rel=1e-5)
    gap = calm.softmax_gap(model, found[2], None)
    p = (found[2] @ model.lm_head.weight.T).softmax(-1).sort(-1).values
    same(gap, p[:, -1] - p[:, -2])


@torch.no_grad()
@both
def test_as_published_nobody_goes_before_all_do(confidence):
    """A state that stops while another token's goes on; who was ready at an earlier block and is forgotten."""
    model, ids = toy_calm(llama, confidence, as_published_code=True), tokens(8, 1)
    dense, ready = states(model, ids), torch.zeros(8, 1, dtype=torch.bool)
    c = [calm.CONFIDENCES[confidence](model, dense[i].flatten(0, 1), dense[i - 1].flatten(0, 1)).view(8, 1)
         for i in (1, 2, 3)]
    model.threshold = float(torch.stack(c).max(0).values.min())  # the last token is ready just once
    for exit, at in enumerate(c, 1):
        ready |= at >= model.threshold
        if ready.all():
            break
    assert not (c[exit - 1] >= model.threshold).all()            # some were ready before, and are not now
    logits, trace = model(ids)
    assert [keep.all() for keep in trace.keep[0::2]] == [i < exit for i in range(4)]
    assert [keep.any() for keep in trace.keep[0::2]] == [i < exit for i in range(4)]
    same(logits, unembed(model, dense[exit]))
    model.threshold += 1e-9
    assert skipped(model, model(ids)[1]) == 0.0


# From a folder to a table.

@pytest.fixture(scope="module")
def tuned(folder, tmp_path_factory):
    """A toy that was trained for six steps with an exit behind each block."""
    out = tmp_path_factory.mktemp("calm") / "run"
    with train_context():
        assert run(folder, out, *calm.FLAGS.split(), eval_limit=2) == 0
    return out


@pytest.fixture(scope="module")
def items(tuned):
    return encode_all(load_examples("arithmetic", "calibration", 5), load_tokenizer(tuned), 1, 160)[0]


def test_training_is_by_the_weighted_loss(folder, tuned, tmp_path):
    """A context that changes nothing: the metrics of the dense training."""
    assert run(folder, tmp_path / "dense", gate="none", eval_limit=2) == 0
    ours, dense = metrics(tuned), metrics(tmp_path / "dense")
    assert ours[0]["ce"] != dense[0]["ce"] and ours[-1]["ce"] < ours[0]["ce"]
    assert all(row["skipped"] == 0.0 for row in ours)


@both
def test_what_is_opened_answers_questions(tuned, confidence):
    """eval_gsm8k.run_row and generate, which know nothing of it; a model that is left in training."""
    model, tokenizer = open_calm(tuned, confidence=confidence), load_tokenizer(tuned)
    problems, args = load_examples("arithmetic", "test", 4), SimpleNamespace(batch_size=4, max_new_tokens=5)
    whole = run_row("CALM", model, tokenizer, problems, SkipPolicy(), 1.0, args)
    model.threshold = -1.0
    row = run_row("CALM", model, tokenizer, problems, SkipPolicy(), 0.5, args)
    assert whole["skipped"] == 0.0 and row["skipped"] == row["answer"]["skipped"] == 0.5
    assert row["macs_saved"] < (0.0 if confidence == "softmax" else 0.5)     # of the toy a softmax is half a block
    assert not model.training and generate(model, [[2, 3]], 3).savings.report()["skipped"] == 0.5


@both
def test_thresholds_save_what_is_wanted(tmp_path, items, confidence):
    """Another share than was asked for, of other texts or of the whole model; a saving out of reach that is clamped; a
    model that is left with the last threshold tried."""
    torch.manual_seed(0)
    model, tokenizer = toy(tmp_path / "made", num_hidden_layers=4)
    model.load_state_dict(build(model.config, dtype=torch.float32).state_dict())
    save_model(model, tmp_path / "model", tokenizer)
    model = open_calm(tmp_path / "model", confidence=confidence, threshold=0.5)
    found = thresholds(model, items, [0.1, 0.4, 0.0, 0.75, 0.9])
    assert found.pop(0.9) is None and model.threshold == 0.5     # one exit of four saves 0.75
    assert list(found) == [0.1, 0.4, 0.0, 0.75] and None not in found.values()
    for wanted, model.threshold in found.items():
        savings = Savings(model.config)
        for ids, _ in items:
            savings.add(model(torch.tensor([ids]))[1])
        assert abs(savings.report()["skipped"] - wanted) <= calm.TOLERANCE
    model.first = 3
    assert thresholds(model, items, [0.5, 0.25])[0.5] is None


def test_a_saving_between_two_ties_is_none(tuned, items):
    """All tokens equally confident: nobody can be told from the others, and no share of them can leave."""
    model = open_calm(tuned, confidence="state")
    for block in model.model["layers"]:
        block.self_attn.o_proj.weight.data.zero_()
        block.mlp.down_proj.weight.data.zero_()
    found = thresholds(model, items, [0.0, 0.2, 0.5])
    assert found[0.2] is None and found[0.0] > 1.0 >= found[0.5]


def test_what_cannot_be_opened(tuned, tmp_path):
    """A stack trace for a misspelt confidence, or for a gated model."""
    assert "softmax, state" in complaint(open_calm, tuned, confidence="cosine")
    model, tokenizer = toy(tmp_path / "made", GateConfig())
    save_model(model, tmp_path / "gated", tokenizer)
    assert "needs a dense model" in complaint(open_calm, tmp_path / "gated")
    assert load_model(last(tuned)).config.gate is None           # and what was trained is a plain dense model
