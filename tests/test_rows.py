"""Tests of rows.py: which rows run, where keys and values lie, what a query may see."""
import math
import random

import pytest
import torch

from conftest import (both_kv, both_ways, build, close_in_float32, families, frozen, gemma, given, gradients,
                      in_float32, llama, mask, mixed, new_cache, on_devices, padding, same, same_masks, tokens)
from gates import SkipPolicy
from rows import Everyone, Kept, KVCache, Masked, attention_mask, rows_of, start_call


# Three kinds of rows.

def test_kept_by_hand():
    """Rows in another order than the tokens', or a column that counts the skipped: every index written out."""
    rows = Kept(mask([1, 0, 1], [0, 0, 1]))
    assert (rows.seq.tolist(), rows.column.tolist(), rows.flat.tolist()) == ([0, 0, 1], [0, 1, 0], [0, 2, 5])
    assert rows.longest == 2 and rows.gathered and not rows.none and not rows.every
    h = torch.tensor([[[10.], [20.], [30.]], [[40.], [50.], [60.]]])         # (2, 3, 1)
    x = rows.take(h)
    assert x.tolist() == [[10.], [30.], [60.]]
    assert rows.pad(x).tolist() == [[[10.], [30.]], [[60.], [0.]]]
    assert rows.unpad(rows.pad(x)).tolist() == x.tolist()
    assert rows.put(-x, h).tolist() == [[[-10.], [20.], [-30.]], [[40.], [50.], [-60.]]]
    assert rows.add(h, x + 1).tolist() == [[[21.], [20.], [61.]], [[40.], [50.], [121.]]]


def test_everyone_is_the_identity():
    """A copy where nobody skips: the plain model's way would cost more than the plain model."""
    rows, x, old = Everyone(), torch.randn(2, 3, 4), torch.zeros(2, 3, 4)
    assert all(way(x) is x for way in (rows.take, rows.pad, rows.unpad)) and rows.put(x, old) is x
    assert torch.equal(rows.add(x, x), 2 * x)
    assert (rows.none, rows.gathered, rows.lone_queries) == (False, False, None)


def test_which_kind_of_rows():
    """A gather where all are kept, a branch that runs where nobody is, or a choice of masked mode's on the host."""
    every, some, nobody = mask([1, 1], [1, 1]), mask([1, 0], [1, 1]), mask([0, 0], [0, 0])
    assert [type(rows_of(keep, True)) for keep in (every, some, nobody)] == [Everyone, Kept, Kept]
    assert [rows_of(keep, True).none for keep in (every, some, nobody)] == [False, False, True]
    assert [type(rows_of(keep, False)) for keep in (every, some, nobody)] == [Masked] * 3
    assert not any(rows_of(keep, False).none or rows_of(keep, False).gathered for keep in (every, some, nobody))


@pytest.mark.parametrize("valid, compact, kind", [
    (None, True, Everyone), (None, False, Everyone), (mask([1, 1], [0, 1]), True, Kept),
    (mask([1, 1], [0, 1]), False, Masked), (mask([1, 1], [1, 1]), True, Everyone)])
def test_rows_of_a_call_in_which_nobody_skips(valid, compact, kind):
    """Padding that runs, or a gather per branch for rows that are known once for all branches."""
    call = start_call((2, 2), "cpu", None, valid, None, SkipPolicy(), compact)
    assert type(call.real) is kind and call.rows(call.valid) is call.real
    assert type(call.rows(mask([1, 0], [0, 1]))) is (Kept if compact else Masked)


def test_masked_keeps_nan_out():
    """keep * new + (1 - keep) * old: what a skipped row's branch gives, even NaN, must not reach what is kept of it."""
    keep = mask([1, 0], [0, 1])
    rows, old = Masked(keep), torch.randn(2, 2, 3, 4, dtype=torch.float64)
    new = torch.randn(2, 2, 3, 4, dtype=torch.float64).masked_fill(~keep[..., None, None], math.nan)
    put, h = rows.put(new, old), rows.add(old[:, :, 0], new[:, :, 0])
    assert torch.equal(put[keep], new[keep]) and torch.equal(put[~keep], old[~keep])
    assert torch.equal(h[keep], old[keep][:, 0] + new[keep][:, 0]) and torch.equal(h[~keep], old[~keep][:, 0])


def random_mask(seed, device):
    """(B, S) bool, keeping and skipping at least one row."""
    generator, sizes = torch.Generator().manual_seed(seed), random.Random(seed)
    keep = torch.rand(sizes.randint(1, 4), sizes.randint(2, 6), generator=generator) < 0.5
    keep[0, 0], keep[-1, -1] = True, False
    return keep.to(device), lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(device)


@on_devices
@pytest.mark.parametrize("seed", range(30))
def test_kept_equals_a_plain_loop(seed, device):
    """A row taken from, put back to or padded into another place, a shared table (leading 1) that gives every sequence
    the first's rows, or an argument written to: on random masks, against loops over sequences and tokens."""
    keep, draw = random_mask(seed, device)
    (batch, length), N = keep.shape, int(keep.sum())
    rows, x, shared, h = Kept(keep), draw(batch, length, 2, 3), draw(1, length, 3), draw(batch, length, 3)
    new, o = draw(N, 2, 3), draw(N, 3)
    arguments = [a.clone() for a in (x, shared, h, new, o)]
    n, taken, of_shared, put, added = 0, [], [], x.clone(), h.clone()
    padded = torch.zeros(batch, max(sum(row) for row in keep.tolist()), 2, 3, dtype=torch.float64, device=device)
    for b in range(batch):
        column = 0
        for s in range(length):
            if keep[b, s]:
                taken.append(x[b, s])
                of_shared.append(shared[0, s])
                put[b, s], added[b, s], padded[b, column] = new[n], h[b, s] + o[n], new[n]
                n, column = n + 1, column + 1
    assert torch.equal(rows.take(x), torch.stack(taken)) and torch.equal(rows.take(shared), torch.stack(of_shared))
    assert torch.equal(rows.put(new, x), put) and torch.equal(rows.add(h, o), added)
    assert torch.equal(rows.pad(new), padded) and torch.equal(rows.unpad(padded), new)
    assert all(torch.equal(a, before) for a, before in zip((x, shared, h, new, o), arguments))


@on_devices
@pytest.mark.parametrize("seed", range(30))
def test_the_kinds_agree(seed, device):
    """Two kinds of rows that mean something else: one branch, written once as Block and Attention write it, by each."""
    keep, draw = random_mask(seed, device)
    x, h, g, below = (draw(*keep.shape, *more) for more in ((4,), (4,), (4,), (2, 3)))
    table, key, f = draw(1, keep.shape[1], 4), draw(4, 6), lambda x: torch.tanh(3 * x)

    def branch(rows):
        o = rows.unpad(rows.pad(f(rows.take(x) + rows.take(table))))
        return rows.add(h, o * rows.take(g)), rows.put((rows.take(x) @ key).unflatten(-1, (2, 3)), below)

    for masked, kept in zip(branch(Masked(keep)), branch(Kept(keep))):
        same(kept, masked, 1e-12)
    for old, result in zip((h, below), branch(Kept(keep))):
        assert torch.equal(result[~keep], old[~keep]) and (result[keep] != old[keep]).all()
    for masked, everyone in zip(branch(Masked(torch.ones_like(keep))), branch(Everyone())):
        assert torch.equal(masked, everyone)


@on_devices
def test_lone_queries(device):
    """One query a sequence that still reads the keys of all sequences, several queries cut down to one, or a launch per
    sequence on a GPU."""
    lone = lambda *rows: Kept(mask(*rows).to(device)).lone_queries
    assert lone([1], [0], [1]) == ([0, 2] if device == "cpu" else None)
    assert lone([1, 0], [0, 0], [0, 1]) is None and lone([1, 1]) is None
    assert lone([0], [0]) is None and lone([1], [1]) is None
    assert rows_of(mask([1], [0]).to(device), compact=False).lone_queries is None


@on_devices
@both_ways
@torch.no_grad()
def test_nothing_is_gathered_at_budget_1(compute, device, monkeypatch):
    """A gather, a mask tensor or a ranking in the plain path: at budget 1, prefill and decoding run the plain model."""
    calls = []
    monkeypatch.setattr(Kept, "__init__", lambda *_: pytest.fail("a gather"))
    for config in (llama(), llama(None)):
        model, ids = build(config, device=device), tokens(2, 6, device=device)
        model.model["layers"][1].register_forward_pre_hook(lambda _, arguments: calls.append(arguments[-1]))
        cache, plain = new_cache(model, 2, 6), new_cache(model, 2, 6)
        for part in (ids[:, :5], ids[:, 5:]):
            logits = model(part, policy=SkipPolicy("batch", 1.0), cache=cache, compute=compute)[0]
            assert torch.equal(logits, model(part, cache=plain)[0])
    assert len(calls) == 8
    for call in calls:
        assert call.mask_of == {} and not call.padded and type(call.real) is Everyone
        assert all(keep is call.valid for keep in call.keep.values()) and set(call.keep) == set(range(8))


@on_devices
@families
@torch.no_grad()
def test_one_gather_per_branch(family, device, monkeypatch):
    """A second gather per branch, or one in masked mode: each stalls a GPU. Masked makes none; compact one per branch
    that may skip, and one for the padding."""
    model, ids, gathers, init = build(family(), device=device), tokens(3, 6, device=device), [], Kept.__init__
    monkeypatch.setattr(Kept, "__init__", lambda self, keep: gathers.append(keep) or init(self, keep))
    for valid in (None, padding([6, 2, 4], 6, device=device)):
        for skip, branches in (("all", 8), ("attn", 4), ("alternate", 4), ("layer", 8)):
            for kv in ("copy_up", "dense"):
                for compute in ("masked", "compact"):
                    gathers.clear()
                    model(ids, valid=valid, policy=SkipPolicy("batch", 0.6, skip, kv), compute=compute)
                    most = branches + (valid is not None) if compute == "compact" else 0
                    assert len(gathers) <= most, (skip, kv, compute)


# Cache and slots.

def test_what_is_written_lies_in_its_slots():
    """Rows, slots or layers swapped, or K in the place of V: by a slice that all rows share, and by index."""
    cache = KVCache(llama(num_hidden_layers=2), 2, 5)
    k = torch.arange(1., 2 * 3 * 2 * 4 + 1).view(2, 3, 2, 4)     # (B, S, Hkv, D)
    cache.write(1, k, -k, slice(1, 4))
    for b in range(2):
        for s in range(3):
            assert torch.equal(cache.k[1][b, :, 1 + s], k[b, s]) and torch.equal(cache.v[1][b, :, 1 + s], -k[b, s])
    assert not cache.k[0].any() and not cache.v[0].any() and not cache.k[1][:, :, [0, 4]].any()
    row, column, slot = torch.tensor([0, 1, 0]), torch.tensor([2, 0, 0]), torch.tensor([4, 0, 1])
    cache.write(0, k, -k, (row, column, slot))
    for b, s, at in ((0, 2, 4), (1, 0, 0), (0, 0, 1)):
        assert torch.equal(cache.k[0][b, :, at], k[b, s]) and torch.equal(cache.v[0][b, :, at], -k[b, s])
    assert cache.k[0].count_nonzero() == cache.v[0].count_nonzero() == 3 * 2 * 4
    cache.select(torch.tensor([1]))
    assert cache.k[0].shape == (1, 2, 5, 4) and torch.equal(cache.v[1][0, :, 1], -k[1, 0])


def test_positions_and_slots_by_hand():
    """Positions that count padding, a second call that starts at 0 or at its batch mate's length: all written out."""
    cache = KVCache(llama(), 2, 9)
    start = lambda length, valid=None: start_call((2, length), "cpu", None, valid, cache, SkipPolicy(), False)
    slots_of = lambda call: [tuple(index.tolist()) for index in call.slots]
    call = start(4, mask([0, 0, 1, 1], [1, 1, 1, 1]))            # a left-padded prompt
    assert call.positions[call.valid].tolist() == [0, 1, 0, 1, 2, 3] and (call.fresh, call.padded) == (True, True)
    assert slots_of(call) == [(0, 0, 1, 1, 1, 1), (2, 3, 0, 1, 2, 3), (0, 1, 0, 1, 2, 3)]
    assert cache.lengths.tolist() == [2, 4] and call.keys == 4
    call = start(2)                                              # two tokens each
    assert call.positions.tolist() == [[2, 3], [4, 5]] and (call.fresh, call.padded) == (False, False)
    assert slots_of(call) == [(0, 0, 1, 1), (0, 1, 0, 1), (2, 3, 4, 5)]
    assert cache.lengths.tolist() == [4, 6] and call.keys == 6
    call = start(2, mask([1, 0], [1, 1]))                        # one and two
    assert call.positions[call.valid].tolist() == [4, 6, 7]
    assert slots_of(call) == [(0, 1, 1), (0, 0, 1), (4, 6, 7)]
    assert cache.lengths.tolist() == [5, 8] and call.keys == 8
    cache = KVCache(llama(), 2, 9)                               # without padding: slices, and positions shared by all
    for length, first in ((3, 0), (2, 3), (1, 5)):
        call = start(length)
        assert call.positions.tolist() == [list(range(first, first + length))] and call.plain and cache.uniform
        assert call.slots == slice(first, first + length) and cache.lengths.tolist() == [first + length] * 2


@both_ways
@torch.no_grad()
def test_cache_too_short(compute):
    """Silently wrapping or clamping at the end of the cache: it must be said; up to the last slot it must work."""
    model, ids = build(llama()), tokens(2, 6)
    with pytest.raises(ValueError):
        model(ids, cache=new_cache(model, 2, 5), compute=compute)
    cache = new_cache(model, 2, 6)
    model(ids[:, :5], cache=cache, compute=compute)
    same(model(ids[:, 5:], cache=cache, compute=compute)[0], model(ids)[0][:, 5:])
    with pytest.raises(ValueError):
        model(ids[:, :1], cache=cache, compute=compute)


@torch.no_grad()
def test_a_full_row_that_only_pads_does_not_need_room():
    """A padded place of a row whose slots are all used counted as a token: refused, although all tokens fit."""
    model, ids = build(llama()), tokens(2, 4)
    cache = new_cache(model, 2, 4)
    model(ids, valid=padding([4, 2], 4, "right"), cache=cache)
    logits, _ = model(ids[:, 2:3], valid=torch.tensor([[False], [True]]), cache=cache)
    same(logits[1, 0], model(ids[1:, :3])[0][0, 2])


@torch.no_grad()
def test_a_waiting_row_keeps_its_slots_in_sight():
    """A bound on the used slots that follows only the rows that move: a longer row that waits for one call would then
    not see its own last slots."""
    model, ids = build(llama()), tokens(2, 4)
    cache = new_cache(model, 2, 4)
    model(ids, valid=padding([3, 1], 4, "right"), cache=cache)
    model(ids[:, 1:2], valid=torch.tensor([[False], [True]]), cache=cache)
    logits, _ = model(torch.stack([ids[0, 3:], ids[1, 2:3]]), cache=cache)
    same(logits[0], model(ids[:1])[0][0, 3:])
    same(logits[1], model(ids[1:, :3])[0][0, 2:])


# What a query may see.

# what one call after another brings: a number of tokens without padding, or a mask of the real ones
CALLS = {"plain": [5], "one token": [1], "left": [mask([0, 0, 1, 1, 1], [1, 1, 1, 1, 1])],
         "right": [mask([1, 1, 0, 0], [1, 1, 1, 0])], "anywhere": [mask([0, 1, 0, 1, 1, 0], [1, 0, 0, 1, 0, 1])],
         "steps": [4, 3, 1, 1], "steps after padding": [mask([0, 0, 1, 1], [0, 1, 1, 1]), 1, 2, 1],
         "ragged": [mask([1, 1, 1, 1], [1, 0, 0, 0]), mask([0, 0, 0], [1, 1, 0]), mask([1], [0]), 1, 3],
         "an empty row": [mask([0, 0, 0], [1, 1, 1]), mask([1, 0], [1, 1]), 1]}


def seen(call, rows, window, as_tensor):
    """What attention_mask lets each query see, (B, M, T) bool, whichever form its answer takes."""
    additive, is_causal = attention_mask(call, rows, window, as_tensor)
    batch, length = call.valid.shape
    shape = batch, rows.longest if rows.gathered else length, call.keys
    if additive is None:
        assert not (is_causal and as_tensor)
        everything = torch.ones(shape, dtype=torch.bool)
        return everything.tril() if is_causal else everything
    assert not is_causal and additive.dtype == call.cos.dtype and torch.isfinite(additive).all()
    assert ((additive == 0) | (additive < -1e300)).all()
    return (additive == 0)[:, 0].expand(shape)


def agree_with_a_loop(call, place, keys, generator):
    """Compare attention_mask with the rule: a query at p sees a key at j iff j <= p, in a window also j > p - window.

    place (B lists of S): the position of each token of the call; keys (B lists of T): the position that each key
    stands for, None where there is none. All windows in turn, for all real tokens and for some: masks are kept.
    """
    call.cos = torch.zeros(0, dtype=torch.float64)               # its dtype is the masks'
    some = call.valid & (torch.rand(call.valid.shape, generator=generator) < 0.6)
    for window in (None, 1, 2, 4, 40, None):
        for as_tensor in (False, True):
            for keep in (call.valid, some, call.valid):
                rows = call.rows(keep)
                sees = seen(call, rows, window, as_tensor).tolist() if not rows.none else None
                for b, kept in enumerate(keep.tolist()):
                    queries = [s for s, passes in enumerate(kept) if passes]
                    for i, s in enumerate(queries):
                        p = place[b][s]
                        expected = [j is not None and j <= p and (window is None or j > p - window) for j in keys[b]]
                        assert any(expected) and sees[b][i if rows.gathered else s] == expected, (window, b, s)


@both_ways
@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_mask_equals_a_loop_over_queries_and_keys(name, cached, compute):
    """Masks off by one at the window or the cache's end, padding in sight, compacted positions of kept queries, or a
    mask kept for another window or other rows: every (query, key) of every call, with and without a cache."""
    cache, done, generator = KVCache(llama(), 2, 16) if cached else None, [0, 0], torch.Generator().manual_seed(0)
    for number, valid in enumerate(CALLS[name]):
        length, valid = (valid, None) if isinstance(valid, int) else (valid.shape[1], valid)
        call = start_call((2, length), "cpu", None, valid, cache, SkipPolicy(), compute == "compact")
        place, keys = [], []
        for b, real in enumerate(call.valid.tolist()):
            place.append([done[b] + sum(real[:s]) for s in range(length)])
            # keys lie in call order where all there is to see came with this call, else in slots: slot = position
            fresh = [p if is_real else None for p, is_real in zip(place[b], real)]
            keys.append(list(range(call.keys)) if cached and number else fresh)
            done[b] += sum(real) if cached else 0
        agree_with_a_loop(call, place, keys, generator)
        assert not cached or cache.lengths.tolist() == done


@both_ways
@pytest.mark.parametrize("padded", [False, True])
def test_mask_of_given_positions(padded, compute):
    """The order of the call taken for the order of the text, or a window dropped because there are few keys."""
    place, valid = [[0, 1, 30, 31], [8, 7, 6, 2]], mask([1, 1, 0, 1], [0, 1, 1, 1]) if padded else None
    call = start_call((2, 4), "cpu", torch.tensor(place), valid, None, SkipPolicy(), compute == "compact")
    keys = [[p if real else None for p, real in zip(*both)] for both in zip(place, call.valid.tolist())]
    agree_with_a_loop(call, place, keys, torch.Generator().manual_seed(0))


@families
@torch.no_grad()
def test_positions_in_another_order(family):
    """A mask from the order of the call where positions say otherwise: a text listed backwards is the same text."""
    model, ids = build(family()), tokens(2, 9)
    backwards = torch.arange(8, -1, -1)[None].expand(2, 9)
    for compute in ("masked", "compact"):
        same(model(ids.flip(1), positions=backwards, compute=compute)[0].flip(1), model(ids)[0])


@torch.no_grad()
def test_positions_with_a_gap_respect_the_window():
    """The window dropped because a call has few keys, though they lie far apart: with a gap wider than the window (4)
    the tokens after it must not see those before it in a windowed layer."""
    model, ids = build(gemma(windows=[4, 4, 4, 4])), tokens(1, 4)
    place = torch.tensor([[0, 1, 30, 31]])
    for compute in ("masked", "compact"):
        same(model(ids, positions=place, compute=compute)[0][:, 2:], model(ids[:, 2:])[0], 1e-5)


@on_devices
@families
@torch.no_grad()
def test_explicit_positions(family, device):
    """positions= ignored, or taken for the call's own order: the default spelt out is the default, with and without a
    cache; shifted by a constant the logits stay (rope is relative)."""
    model, ids = build(family(), device=device), tokens(2, 9, device=device)
    policy = frozen(model, ids)
    expected, trace = model(ids, policy=policy)
    place = torch.arange(9, device=device).expand(2, 9)
    for compute in ("masked", "compact"):
        logits, other = model(ids, positions=place, policy=policy, compute=compute)
        same_masks(other.keep, trace.keep)
        same(logits, expected)
        cache = new_cache(model, 2, 9)
        parts = [model(ids[:, a:b], positions=place[:, a:b], cache=cache, policy=policy, compute=compute)[0]
                 for a, b in ((0, 5), (5, 8), (8, 9))]
        same(torch.cat(parts, dim=1), expected)
        at = lambda positions: model(ids, positions=positions, policy=given(trace.keep), compute=compute)[0]
        same(at(place + 5), expected, 1e-5)                      # tables are float32
        assert (at(place * 2) - expected).abs().max() > 1e-2


@on_devices
@both_ways
@families
def test_rows_of_nothing_but_padding(family, compute, device):
    """-inf in the mask: a query that sees no key at all becomes NaN, in the backward pass for everybody. A row without
    one real token, at first and later."""
    model, ids = build(family(), device=device), tokens(3, 6, device=device)
    valid = padding([6, 0, 2], 6, device=device)
    policy, cache, others = SkipPolicy("batch", 0.6), new_cache(model, 3, 9), [0, 2]
    logits, trace = model(ids, valid=valid, policy=policy, compute=compute)
    assert torch.isfinite(logits).all() and all(torch.isfinite(s).all() for s in trace.scores)
    without = model(ids[others], valid=valid[others], policy=policy, compute=compute)[0]
    same(logits[others][valid[others]], without[valid[others]])
    expected = gradients(model, without, valid[others][..., None])
    for name, gradient in gradients(model, logits, valid[..., None]).items():
        same(gradient, expected[name])
    with torch.no_grad():
        model(ids, valid=valid, policy=policy, cache=cache, compute=compute)
        before, nobody = [x.clone() for x in cache.k], torch.zeros(3, 1, dtype=torch.bool, device=device)
        assert torch.isfinite(model(ids[:, :1], valid=nobody, policy=policy, cache=cache, compute=compute)[0]).all()
    assert all(torch.equal(x, y) for x, y in zip(before, cache.k)) and cache.lengths.tolist() == [6, 0, 2]


# Cached against full.

@on_devices
@torch.no_grad()
def test_rows_that_go_on_after_others_have_finished(device):
    """KVCache.select that mixes up rows, or leaves lengths behind: after two of four sequences finish, the others go on
    as if nothing had been, also from a left-padded prompt."""
    for valid in (None, padding([9, 4, 7, 6], 9, device=device)):
        model, ids = build(gemma(), device=device), tokens(4, 12, device=device)
        policy, whole, cache = frozen(model, ids), new_cache(model, 4, 12), new_cache(model, 4, 12)
        rows = torch.tensor([3, 1], device=device)
        for c in (whole, cache):
            model(ids[:, :9], valid=valid, cache=c, policy=policy)
        cache.select(rows)
        assert cache.k[0].shape[0] == 2 and len(cache.k) == len(cache.v) == 4
        for s in range(9, 12):
            expected, everything = model(ids[:, s:s + 1], cache=whole, policy=policy)
            logits, trace = model(ids[rows, s:s + 1], cache=cache, policy=policy, compute="compact")
            same_masks(trace.keep, [m[rows] for m in everything.keep])
            same(logits, expected[rows])
        same(cache.k[2], whole.k[2][rows])
        assert cache.lengths.tolist() == whole.lengths[rows].tolist()


@on_devices
@both_ways
@torch.no_grad()
def test_ragged_chunks_equal_each_row_alone(compute, device):
    """Chunks of a prompt that are padded on the right, unequally per row: slots or positions that count the padding, or
    a bound on the used slots that runs past the end of the cache."""
    for family in (llama, gemma):
        model = build(family(), device=device)
        lengths = [[4, 1, 3], [0, 4, 2], [2, 0, 1], [1, 1, 1]]   # real tokens of each row in each call
        totals = [sum(column) for column in zip(*lengths)]       # 7, 6, 7
        rows = tokens(3, 7, device=device)
        policy = frozen(model, rows)
        cache, done = new_cache(model, 3, 7), [0, 0, 0]
        alone = [model(rows[i:i + 1, :totals[i]], policy=policy) for i in range(3)]
        for real in lengths:
            width = max(real)
            ids = torch.zeros(3, width, dtype=torch.long, device=device)
            for i, n in enumerate(real):
                ids[i, :n] = rows[i, done[i]:done[i] + n]
            valid = None if real == [1, 1, 1] else padding(real, width, "right", device)
            logits, trace = model(ids, valid=valid, cache=cache, policy=policy, compute=compute)
            for i, n in enumerate(real):
                part = slice(done[i], done[i] + n)
                same_masks([m[i, :n] for m in trace.keep], [m[0, part] for m in alone[i][1].keep])
                same(logits[i, :n], alone[i][0][0, part])
                done[i] += n
        assert cache.lengths.tolist() == totals


@on_devices
@both_ways
@both_kv
@pytest.mark.parametrize("lengths", [None, [11, 3, 14]])
@pytest.mark.parametrize("skipping", [False, True])
@families
@torch.no_grad()
def test_step_by_step_equals_one_pass(family, skipping, lengths, kv, compute, device):
    """A cache that is off by one, loses copied-up rows, or forgets that a query past the window no longer sees the
    first keys; prompts in one piece and in chunks, then token by token, against one pass over everything."""
    model, S = build(family(), device=device), 14
    ids = tokens(3, S, device=device)
    valid = None if lengths is None else padding(lengths, S, device=device)
    policy = frozen(model, ids, valid, kv=kv) if skipping else SkipPolicy(kv=kv)
    everyone = torch.ones_like(ids, dtype=torch.bool) if valid is None else valid
    whole = new_cache(model, 3, S)
    full, expected = model(ids, valid=valid, policy=policy, cache=whole)
    if skipping:
        mixed(expected.keep, everyone)
    assert S > 2 * 4 + 1                                         # well past the window
    single, single_full = in_float32(model), None
    for cuts in ([0, 6, *range(7, S + 1)], [0, 2, 7, 9, S], [*range(S + 1)]):
        cache, cache32, logits32 = new_cache(model, 3, S), new_cache(single, 3, S), []
        for a, b in zip(cuts, cuts[1:]):
            part = None if valid is None or valid[:, a:b].all() else valid[:, a:b]
            logits, trace = model(ids[:, a:b], valid=part, policy=policy, cache=cache, compute=compute)
            same_masks(trace.keep, [m[:, a:b] for m in expected.keep])
            same(logits[everyone[:, a:b]], full[:, a:b][everyone[:, a:b]])
            masks = given([m[:, a:b] for m in expected.keep], policy)
            logits32.append(single(ids[:, a:b], valid=part, policy=masks, cache=cache32, compute=compute)[0])
        for x, y in zip(cache.k + cache.v, whole.k + whole.v):
            same(x, y)
        assert cache.lengths.tolist() == whole.lengths.tolist() == everyone.sum(1).tolist()
        single_full = single(ids, valid=valid, policy=given(expected.keep, policy))[0]
        close_in_float32(torch.cat(logits32, dim=1)[everyone], single_full[everyone])
