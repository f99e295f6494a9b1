"""Tests of paper/free.py and paper/free_queue.py: FREE's loss, its exit in batches, its queue, its thresholds."""
import copy
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from conftest import build, complaint, families, llama, new_cache, padding, same, tokens
from data import load_examples
from eval_gsm8k import run_row
from gates import GateConfig, SkipPolicy
from generate import generate
from load_weights import load_tokenizer, save_model
from savings import Savings
from toy_runs import ROOT, folder, metrics, run, toy

sys.path.insert(0, str(ROOT / "paper"))
import free
from early_exit import early
from free import Free, alignment, distillation, open_free, thresholds
from free_queue import Adaptive, Stream, decode

E, L = 2, 4                                                      # of the models below
PROMPTS = [tokens(1, n, n)[0].tolist() for n in (3, 9, 1, 6)]
both = pytest.mark.parametrize("confidence", free.CONFIDENCES)
items_of = lambda rows: [(row, [True] * len(row)) for row in rows]


def model_of(confidence="softmax", share=None, threshold=1.0, family=llama):
    """A random FREE model of which, on random text, about this share of tokens leaves."""
    model = early(build(family(None, tie_word_embeddings=False)), Free, confidence=confidence, threshold=threshold)
    assert (model.shallow, model.config.num_hidden_layers) == (E, L)
    if share:
        (model.threshold,) = thresholds(model, items_of(tokens(20, 12, 9).tolist()), [share * (1 - E / L)]).values()
    return model


def dense(model):
    """(logits (B, S, V), states) of the plain loop over the blocks, and what it cached."""
    def forward(ids):
        cache = new_cache(model, len(ids), ids.shape[1])
        h, call = model.begin(ids, cache=cache)
        states, below = [h], None
        for block in model.model["layers"]:
            h, below, _, _ = block(h, below, (None, None), call)
            states.append(h)
        return free.unembed(model, h), states, cache
    return torch.no_grad()(forward)


def fed(model, ids, first, **of):
    """A Stream that has read ids, the first so many at once, and its logits, (calls, V)."""
    stream = Stream(model, len(ids), **of)
    return stream, torch.cat([stream.feed(part) for part in (ids[:first], *([i] for i in ids[first:]))])


# 1, 2: at the ends

@both
def test_nobody_leaves_above_every_confidence(confidence):
    """1. Logits, K and V or savings that are not the dense model's; a cosine that rounding puts above 1."""
    model, ids = model_of(confidence), tokens(3, 8)
    for name in ("self_attn.o_proj", "mlp.down_proj"):           # a block that changes nothing: a cosine of 1
        torch.nn.init.zeros_(model.model["layers"][E - 1].get_submodule(name).weight)
    logits, _, cache = dense(model)(ids)
    valid, own, saved = padding((8, 3, 5), 8), new_cache(model, 3, 8), Savings(model.config)
    with torch.no_grad():
        got, trace = model(ids, cache=own)
        ragged, told = model(ids, valid=valid)
    assert torch.equal(got, logits) and all(torch.equal(a, b) for a, b in zip(own.k + own.v, cache.k + cache.v))
    plain = copy.copy(model)
    plain.__class__ = Free.__base__.__base__
    assert torch.equal(ragged, plain(ids, valid=valid)[0])
    for t in (trace, told):
        saved.add(t)
    report, asked = saved.report(), {"softmax": (24 + 16) * 60 * 24, "cosine": 0}[confidence]
    assert (report["skipped"], report["skipped_per_call"]) == (0, 0)
    assert report["macs"] == report["macs_dense"] + asked
    stream, own_logits = fed(model, ids[0].tolist(), 4)
    same(own_logits, logits[0, 3:])
    assert len(stream.c) == stream.done == 8 and stream.queue.shape[1] == 0
    if confidence == "cosine":
        assert min(stream.c) > 1 - 1e-12


@both
def test_everybody_leaves_below(confidence):
    """2. Other logits than U(h^E), savings other than 1 - E/L, deep blocks that are called nevertheless."""
    model, ids = model_of(confidence, threshold=-2.0), tokens(3, 8)
    want = free.unembed(model, dense(model)(ids)[1][E])
    with torch.no_grad():
        got, trace = model(ids, valid=padding((8, 3, 5), 8))
        got_last, _ = model(ids, last=True)
        got_places, _ = model(ids, places=torch.tensor([2, 13]))
    same(got[0], want[0])
    same(got_last, want[:, -1])
    same(got_places, want.flatten(0, 1)[[2, 13]])
    saved = Savings(model.config)
    saved.add(trace)
    assert saved.report()["skipped"] == saved.report()["skipped_per_call"] == 1 - E / L
    for block in model.model["layers"][E:]:
        block.register_forward_pre_hook(lambda *_: pytest.fail("a deep block ran"))
    stream, logits = fed(model, ids[0].tolist(), 4)
    same(logits, want[0, 3:])
    assert stream.done == 0 and stream.queue.shape[1] == 8


# 3, 4: the queue

@families
@both
@pytest.mark.parametrize("first", [1, 4, 12])
def test_who_stays_sees_what_the_dense_model_sees(confidence, family, first):
    """3, 4. Wrong positions or masks in a flush, a queue out of order, lost or gone through twice, K and V of h^E."""
    model, left, waited = model_of(confidence, 0.5, family=family), 0, 0
    for seed in range(4):
        ids = tokens(1, 12, seed)
        logits, states, cache = dense(model)(ids)
        stream, got = fed(model, ids[0].tolist(), first)
        gone = torch.tensor(stream.c) > model.threshold
        want = torch.where(gone[:, None], free.unembed(model, states[E])[0], logits[0])
        same(got, want[first - 1:])
        assert stream.done == 1 + max(i for i in range(12) if not gone[i])
        assert stream.queue.shape[1] == 12 - stream.done
        left, waited = left + gone.sum(), waited + stream.queue.shape[1]
        for layer in range(L):
            cached = stream.done if layer >= E else 12
            for a, b in ((stream.cache.k, cache.k), (stream.cache.v, cache.v)):
                same(a[layer][:, :, :cached], b[layer][:, :, :cached])
                assert not a[layer][:, :, cached:].any()         # nobody who waits has been through
    assert 12 < left < 36 and waited


@families
@both
def test_batches_write_what_queues_write(confidence, family):
    """A token that leaves in one and not in the other, padding that counts, rows that are mixed up as texts end; and
    work that is charged to the wrong text, twice, never, or at the wrong number of keys."""
    model = model_of(confidence, 0.6, family=family)
    endless = generate(model, PROMPTS, 10).tokens
    length = lambda new, end: (new + [end]).index(end)
    ends = {max(range(60), key=lambda end: len({length(new, end) for new in endless}))}          # not all at once
    batch, streams = generate(model, PROMPTS, 10, eos_ids=ends), []
    assert len({len(new) for new in batch.tokens}) > 2
    saves = 0
    for prompt, new in zip(PROMPTS, batch.tokens):
        own, stream = decode(model, prompt, 10, ends)
        alone = generate(model, [prompt], 10, eos_ids=ends).savings.report()
        assert own == new and stream.macs == alone["macs"]
        streams, saves = [*streams, stream], saves + alone["macs_dense"] - alone["macs"]
    gone = sum(x > model.threshold for stream in streams for x in stream.c)
    read = sum(len(stream.c) for stream in streams)
    assert 0.2 < gone / read < 0.8 and any(stream.queue.shape[1] for stream in streams)
    report = batch.savings.report()
    assert report["skipped"] == pytest.approx(gone / read * (1 - E / L))
    assert report["macs_dense"] - report["macs"] == saves        # whatever the padding


@both
def test_the_queue_counts_what_it_multiplies(confidence):
    """Work of the queue that is not counted, or a head that is: against torch's own counter."""
    model, counter = model_of(confidence, 0.5), FlopCounterMode(display=False)
    for adaptive in (None, Adaptive()) if confidence == "softmax" else (None,):
        with sdpa_kernel(SDPBackend.MATH), counter:
            stream = decode(model, PROMPTS[3], 5, adaptive=adaptive)[1]
        assert 2 * stream.macs == counter.get_total_flops() and 0 < stream.done


# 5, 6: the loss

def test_teachers_find_the_nearest_student_below_the_last():
    """5. An alignment that crosses, from the wrong end, or that repeats where students were left."""
    generator, repeats = torch.Generator().manual_seed(0), 0
    for _ in range(300):
        distances = torch.rand(5, 5, generator=generator)
        want, last = [], 5
        for row in reversed(distances.tolist()):
            left = sorted(range(last), key=lambda s: row[s])
            last = left[0] if left else last
            want.insert(0, last)
        got = alignment(distances).tolist()
        assert got == want
        for a, b in zip(got, got[1:]):
            assert a < b or a == b == 0
        repeats += got.count(0) > 1
    assert 0 < repeats < 300


def test_distillation_is_a_mean_of_squares_that_pulls_students_only():
    """5. KD that is not 0 where shallow states are those of their teachers; sums; a teacher that is pulled along."""
    make = lambda: [torch.randn(6, 4, dtype=torch.float64, generator=g).requires_grad_() for _ in range(3)]
    g = torch.Generator().manual_seed(0)
    students, teachers = make(), make()
    assert distillation(teachers, teachers) == 0
    value = distillation(students, teachers)
    table = np.array([[((s - t) ** 2).mean().item() for s in students] for t in teachers])
    m = alignment(torch.tensor(table)).tolist()
    assert value.item() == pytest.approx(np.mean([table[i, m[i]] for i in range(3)]))
    value.backward()
    assert all(t.grad is None for t in teachers) and any(s.grad is not None and s.grad.any() for s in students)


def test_loss_weighs_by_depth():
    """6. Weights that are equal or swapped, a head without its norm, the embedding or a wrong layer as a state, a KD of
    all tokens or of raw states."""
    model = model_of(family=llama)
    ids, valid, places = tokens(2, 6), padding((6, 4), 6, "right"), torch.tensor([1, 2, 4, 7, 8])
    targets = torch.tensor([5, 9, 2, 11, 40])
    model.train()(ids, valid=valid, places=places)
    got = free.loss(model, targets)
    states = [x.flatten(0, 1)[places] for x in model.states]
    norm = lambda h: h / (h.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * model.model["norm"].weight
    ce = lambda h: -(norm(h) @ model.lm_head.weight.T).log_softmax(-1)[range(5), targets].sum()
    n = [norm(h) for h in states]
    distances = torch.tensor([[((n[s] - n[t]) ** 2).mean().item() for s in (1, 2)] for t in (2, 4)])
    # of the deepest the nearest, and of the other the one below it; where that is the first, the first again
    m = [0, 1] if distances[1, 1] < distances[1, 0] else [0, 0]
    kd = (distances[0, m[0]] + distances[1, m[1]]) / 2
    assert kd > 0 and got.item() == pytest.approx((2 / 6 * ce(states[2]) + 4 / 6 * ce(states[4]) + 0.5 * 5 * kd).item())


# Thresholds

@both
def test_thresholds_are_quantiles(confidence):
    """The lower quantile in place of the upper, padding among the confidences, a share that is no saving."""
    model, lengths = model_of(confidence), [5, *[12] * 18, 2]
    items = items_of(row[:n] for row, n in zip(tokens(20, 12, 3).tolist(), lengths))
    found, shares = thresholds(model, items, [0.0, 0.1, 0.25, 0.4, 0.5]), []
    for saving, model.threshold in found.items():
        traces = [model(torch.tensor([ids]))[1] for ids, _ in items]
        rows = [(~t.keep[-1]).sum().item() for t in traces]
        shares.append(sum(rows) / sum(t.valid.numel() for t in traces))
        assert shares[-1] * (1 - E / L) == pytest.approx(saving, abs=0.005)
    assert shares[0] == 0 and shares[-1] == 1 and list(found.values()) == sorted(found.values(), reverse=True)
    for saving in (0.51, -0.1, 1.0):
        assert "saves from 0% to 50.0%" in complaint(thresholds, model, items, [0.1, saving])
    same = [([1], [True])] * 9                                   # nine of one confidence: nobody or all
    assert [tau is None for tau in thresholds(model, same, [0.0, 0.2, 0.5]).values()] == [False, True, False]


def test_a_mixture_of_betas_by_moments():
    """Swapped kinds, a sample variance, the largest lambda, moments of a, b mixed up; a fit of nothing."""
    from math import exp, lgamma, log
    rng, a = np.random.default_rng(0), Adaptive()
    assert a.threshold() == 0.9
    a.found = {True: rng.beta(6, 2, 200).tolist() + [1.0, 0.0], False: [0.4]}
    assert a.threshold() == 0.9                                  # one is no distribution
    def density(values, x):
        c = np.clip(values, 1e-4, 1 - 1e-4)
        m, v = c.mean(), c.var()
        p = m * (m * (1 - m) / v - 1)
        q = p * (1 - m) / m
        return exp(lgamma(p + q) - lgamma(p) - lgamma(q) + (p - 1) * log(x) + (q - 1) * log(1 - x))
    posterior = lambda x: (right := density(a.found[True], x)) / (right + density(a.found[False], x))
    for n in (3, 4, 5, 200):
        a.found[False] = rng.beta(2, 3, n).tolist()
        lam = a.threshold()
        assert 0.3 < lam < 0.9 and posterior(lam) >= 0.4 > posterior(lam - 0.01)
        a.found[True] = rng.beta(6, 2, n).tolist()
    a.found = {True: [0.2, 0.25, 0.3], False: [0.7, 0.8, 0.9]}   # confidence that is wrong from the smallest on
    assert a.threshold() == 0.3 and posterior(0.3) >= 0.4
    a.found = {True: [0.1, 0.11, 0.12], False: [0.4, 0.6, 0.8]}
    assert a.threshold() == 0.9
    a.found = {True: [0.97, 0.971, 0.972], False: [0.95, 0.96]}  # densities of 0, both: of logs the second is larger
    assert a.threshold() == 0.9


def test_a_text_teaches_the_next():
    """Labels of other tokens, of the prompt, of those who wait, or of shallow against shallow; a threshold that moves
    within a text or never."""
    model, adaptive = model_of("softmax", 0.5), Adaptive()
    adaptive.threshold = lambda: model.threshold
    right, wrong = [], []
    for prompt in PROMPTS:
        new, stream = decode(model, prompt, 12, adaptive=adaptive)
        logits, states, _ = dense(model)(torch.tensor([stream.ids]))
        agree = (logits.argmax(-1) == free.unembed(model, states[E]).argmax(-1))[0].tolist()
        for i in range(len(prompt) - 1, stream.done):
            (right if agree[i] else wrong).append(stream.c[i])
        assert new == decode(model, prompt, 12)[0]
    assert adaptive.found == {True: right, False: wrong} and right and wrong
    adaptive.threshold = lambda: 0.123
    assert decode(model, PROMPTS[0], 12, adaptive=adaptive)[1].threshold == 0.123
    assert "not cosine" in complaint(decode, model_of("cosine"), PROMPTS[0], 3, (), adaptive)
    for prompt, n in (([], 3), (PROMPTS[0], 0), (PROMPTS[0], 2046)):
        assert "positions" in complaint(decode, model, prompt, n)


# From training to a row of a table

def test_train_open_and_evaluate(folder, tmp_path, monkeypatch):
    """A loss that train.py does not take, a model that stays dense, rows that generate or run_row cannot make; a model
    that is no FREE's, told in a traceback."""
    summed, loss = [], free.loss
    monkeypatch.setattr(free, "loss", lambda model, targets: summed.append(
        (loss(model, targets) / len(targets)).item()) or loss(model, targets))
    with free.training():
        assert run(folder, tmp_path / "run", gate="none") == 0
    assert [row["ce"] for row in metrics(tmp_path / "run")] == pytest.approx(summed, rel=1e-5) and len(summed) == 6
    tokenizer = load_tokenizer(tmp_path / "run")
    args = SimpleNamespace(batch_size=3, max_new_tokens=8)
    for confidence in free.CONFIDENCES:
        model = open_free(tmp_path / "run", confidence=confidence)
        saved = []
        for model.threshold in (1.0, -2.0):
            row = run_row("FREE", model, tokenizer, load_examples("arithmetic", "test", 5), SkipPolicy(), 1.0, args)
            saved.append((row["skipped"], row["answer"]["skipped_per_call"]))
        assert saved == [(0, 0), (0.5, 0.5)]                     # of two blocks, one
    assert "'entropy' is not one of softmax, cosine" in complaint(open_free, tmp_path / "run", confidence="entropy")
    for name, gate, changes in (("gated", GateConfig(), {}), ("one", None, {"num_hidden_layers": 1})):
        save_model(toy(tmp_path / "made", gate, **changes)[0], tmp_path / name, tokenizer)
        assert "Free needs a dense model of 2 or more blocks" in complaint(open_free, tmp_path / name)
