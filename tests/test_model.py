"""Tests of model.py: the decoder against a loop by hand, against Hugging Face, and every way of running it.

Two paths that must agree (masked / compact, alone / in a batch) are compared in float64 to 1e-9, keep masks first; then
once in float32, one path's masks fed to the other, to 1e-4 of the largest logit.
"""
import copy
import math
import random
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import by_hand
from conftest import (VOCAB, Synchronisations, both_kv, both_ways, build, close_in_float32, families, frozen, gemma,
                      given, gradients, in_float32, llama, mixed, new_cache, on_devices, padding, same, same_masks,
                      tokens)
from console import InputError
from gates import GRANULARITIES, GateConfig, SkipPolicy, select_tokens, sparsity_loss
from load_weights import load_model
from model import Model

GOLDEN = Path(__file__).resolve().parent / "golden"
GOLDENS = sorted(path.parent.name for path in GOLDEN.glob("*/golden.safetensors"))


# What goes in and what comes out.

def test_unknown_compute_is_refused():
    """compute="compacted" running masked, and its saving reported as real."""
    with pytest.raises(InputError):
        build(llama())(tokens(1, 2), compute="compacted")


@torch.no_grad()
def test_places_before_last_and_all_without_either():
    """`if places` for `if places is not None`: place 0 alone is false, and so is no place at all; or last winning."""
    model, ids = build(llama()), tokens(2, 3)
    everything, trace = model(ids)
    assert everything.shape == (2, 3, VOCAB) and trace.logit_rows == 6
    assert torch.equal(model(ids, last=False, places=None)[0], everything)
    for places in ([0], [], [4, 4], [5, 2, 0]):
        for last in (False, True):
            some, trace = model(ids, last=last, places=torch.tensor(places, dtype=torch.long))
            assert trace.logit_rows == len(places)
            same(some, everything.flatten(0, 1)[places], 1e-12)


@on_devices
@both_ways
@families
@torch.no_grad()
def test_logits_where_asked(family, compute, device):
    """The last row that is not the last column, or flat places counted by column: both are rows of all the logits."""
    model, ids = build(family(), device=device), tokens(3, 6, device=device)
    valid = padding([6, 2, 4], 6, device=device)
    policy = frozen(model, ids, valid)
    everything, trace = model(ids, valid=valid, policy=policy, compute=compute)
    last, last_trace = model(ids, valid=valid, policy=policy, compute=compute, last=True)
    places = torch.tensor([5, 0, 17, 10], device=device)
    some, some_trace = model(ids, valid=valid, policy=policy, compute=compute, places=places)
    same(last, everything[:, -1], 1e-12)
    same(some, everything.flatten(0, 1)[places], 1e-12)
    assert (trace.logit_rows, last_trace.logit_rows, some_trace.logit_rows) == (18, 3, 4)


@pytest.mark.parametrize("shared", [False, True])
def test_gate_parameters_and_trace(shared):
    """Shared gates that are one per layer all the same, or a trace without a branch: names as on disk, 2L entries."""
    model = build(llama(GateConfig(shared=shared)))
    names = {name.rpartition("_gate.")[0] for name, _ in model.named_parameters() if "_gate." in name}
    layers = ["model."] if shared else [f"model.layers.{i}." for i in range(4)]
    assert names == {layer + kind for layer in layers for kind in ("self_attn", "mlp")}
    _, trace = model.train()(tokens(2, 5))
    assert len(trace.gates) == len(trace.scores) == len(trace.keep) == 8
    for g, s in zip(trace.gates, trace.scores):
        assert g.shape == (2, 5, 24) and s.shape == (2, 5)
        same(s, g.mean(-1))
    assert model.eval()(tokens(2, 5))[1].gates is None and model(tokens(2, 5), keep_gates=True)[1].gates is not None
    plain = build(llama(None)).train()(tokens(2, 5))[1]
    assert plain.gates is None and plain.scores is None and all(m.all() for m in plain.keep)


def test_tied_head_is_shared():
    """A copied head: it drifts from the embedding in training, and costs its memory twice."""
    for tied in (True, False):
        model = Model(llama(tie_word_embeddings=tied))
        assert (model.lm_head.weight.data_ptr() == model.model["embed_tokens"].weight.data_ptr()) is tied
        assert ("lm_head.weight" in dict(model.named_parameters())) is not tied
    for name in GOLDENS:
        model = load_model(GOLDEN / name)
        tied = name != "llama_untied"
        assert model.config.tie_word_embeddings is tied
        assert (model.lm_head.weight.data_ptr() == model.model["embed_tokens"].weight.data_ptr()) is tied


def test_fresh_model_starts_small():
    """A from-scratch initialisation that misses a parameter (torch.empty left in), or norms that start at 0."""
    for family in (llama, gemma):
        with torch.device("meta"):
            model = Model(family(hidden_size=64, intermediate_size=96))
        model = model.to_empty(device="cpu")
        for p in model.parameters():
            p.data.fill_(math.nan)
        model.init_weights(torch.Generator().manual_seed(0))
        for name, p in model.named_parameters():
            assert torch.isfinite(p).all(), name
            if "norm" in name:
                assert (p == (0 if family is gemma else 1)).all()
            elif "_gate." not in name:
                scale = 0.02 / 8 ** 0.5 if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.02
                assert p.std().item() == pytest.approx(scale, rel=0.1), name
        logits, trace = model(tokens(2, 8))
        assert logits.std() < 1 and min(s.min() for s in trace.scores) > 0.9


# The loops of by_hand.py.

GATES = [None, GateConfig(), GateConfig("scalar"), GateConfig(arch="lowrank", rank=3), GateConfig(arch="mlp"),
         GateConfig("scalar", "mlp"), GateConfig(shared=True), GateConfig(input="residual"),
         GateConfig(placement="before"), GateConfig(detach=True),
         GateConfig("scalar", input="residual", placement="before", shared=True, detach=True)]


class Given:
    """In a threshold's place in the loops: who passes is not decided but recorded."""

    def __init__(self, mask):
        self.skips, self.passes = iter([not keep for keep in mask]), iter(mask)

    def __ge__(self, _):                                         # g_bar[i] <= tau
        return next(self.skips)

    def __lt__(self, _):                                         # score > tau
        return next(self.passes)


def hand_config(gate=GateConfig(), **changes):
    # turns of 1, 1/4, 1/16, 1/64: exact in float32, as the table is
    return llama(gate, head_dim=8, rope_theta=256.0, **changes)


@on_devices
@both_ways
@torch.no_grad()
def test_runs_of_skips_copy_up_through_the_whole_run(compute, device):
    """A copy of the layer below's own K instead of what that had copied, at layer 0 the last layer's, or a key rotated
    again on the way: token 1 skips layers 1 to 3, token 2 layers 0 to 2, token 0 all, in one pass and by steps."""
    model, ids = build(hand_config(None), device=device), tokens(1, 5, device=device)
    skips = {1: [1, 2, 3], 2: [0, 1, 2], 0: [0, 1, 2, 3], 3: [2]}
    masks = [torch.ones(1, 5, dtype=torch.bool, device=device) for _ in range(8)]
    for token, layers in skips.items():
        for layer in layers:
            masks[2 * layer][0, token] = False
    taus = [Given(m[0].tolist()) for m in masks]
    hand, _, _, KV = by_hand.forward(copy.deepcopy(model).cpu(), ids[0].tolist(), thresholds=taus)
    for cuts in ([0, 5], [0, 2, 5], range(6)):
        cache, parts = new_cache(model, 1, 5), []
        for a, b in zip(cuts, cuts[1:]):
            parts.append(model(ids[:, a:b], cache=cache, policy=given([m[:, a:b] for m in masks]), compute=compute)[0])
        same(torch.cat(parts, dim=1)[0].cpu(), hand)
        for layer, positions in enumerate(KV):
            for t, (k, v) in enumerate(positions):
                same(cache.k[layer][0, :, t].cpu(), torch.stack(k))
                same(cache.v[layer][0, :, t].cpu(), torch.stack(v))
        at = lambda layer, t: cache.k[layer][0, :, t]
        assert torch.equal(at(1, 1), at(0, 1)) and torch.equal(at(3, 1), at(0, 1)) and torch.equal(at(2, 2), at(0, 2))
        assert not torch.equal(at(3, 2), at(2, 2)) and not torch.equal(at(1, 3), at(0, 3))


@on_devices
@both_ways
@both_kv
@pytest.mark.parametrize("gate", GATES[1:],
                         ids=lambda g: f"{g.form}-{g.arch}-{g.input}-{g.placement}{'-shared' * g.shared}")
@torch.no_grad()
def test_frozen_skipping_equals_the_loop_by_hand(gate, kv, compute, device):
    """Any deviation from the equations: K_l,i = K_l-1,i for skipped tokens, keys rotated at the absolute position, kept
    tokens attending to skipped ones, gate times output (or input), score the mean gate. A left-padded batch, cached."""
    model, lengths = build(hand_config(gate, num_hidden_layers=3), device=device), [5, 8, 3]
    ids, valid = tokens(3, 8, device=device), padding(lengths, 8, device=device)
    policy = frozen(model, ids, valid, share=0.4, kv=kv)
    cache = new_cache(model, 3, 10)
    logits, trace = model(ids, valid=valid, cache=cache, policy=policy, compute=compute)
    mixed(trace.keep, valid)
    plain = copy.deepcopy(model).cpu()
    for row, n in enumerate(lengths):
        hand, _, keep, KV = by_hand.forward(plain, ids[row, 8 - n:].tolist(), thresholds=policy.thresholds, kv=kv)
        assert [m[row, 8 - n:].tolist() for m in trace.keep] == keep
        same(logits[row, 8 - n:].cpu(), hand)
        for layer in range(3):
            for t in range(n):
                same(cache.k[layer][row, :, t].cpu(), torch.stack(KV[layer][t][0]))
                same(cache.v[layer][row, :, t].cpu(), torch.stack(KV[layer][t][1]))
            assert not cache.k[layer][row, :, n:].any() and not cache.v[layer][row, :, n:].any()


# Copy-up.

@both_ways
@torch.no_grad()
def test_layer_0_has_nothing_below(compute):
    """cache[layer - 1] at layer 0 is the last layer's: where every token skips attention 0, its K and V are its own."""
    model, ids = build(llama(None)), tokens(2, 4)
    masks = [torch.zeros(2, 1, dtype=torch.bool)] + [torch.ones(2, 1, dtype=torch.bool)] * 7
    cache = new_cache(model, 2, 4)
    model(ids[:, :3], cache=cache, policy=given([m.expand(2, 3) for m in masks]), compute=compute)
    model(ids[:, 3:], cache=cache, policy=given(masks), compute=compute)
    block = model.model["layers"][0]
    v = block.self_attn.v_proj(block.input_layernorm(model.model["embed_tokens"](ids)))                # (2, 4, Hkv * D)
    same(cache.v[0].transpose(1, 2).flatten(2), v)
    assert (cache.v[0] - cache.v[-1]).abs().amax((1, 3)).min() > 1e-3


@on_devices
@both_ways
@families
@torch.no_grad()
def test_copied_rows_are_those_of_the_layer_below(family, compute, device):
    """A copy that fails and is swallowed (the authors' did): every skipped token's K and V, in every layer above the
    first, are those below it bit for bit, and no kept token's are; with kv="dense" nobody's are."""
    model, ids = build(family(), device=device), tokens(3, 8, device=device)
    valid = padding([8, 3, 6], 8, device=device)
    for kv in ("copy_up", "dense"):
        cache, policy = new_cache(model, 3, 9), frozen(model, ids, valid, kv=kv)
        keep = model(ids, valid=valid, cache=cache, policy=policy, compute=compute)[1].keep
        # by slot: real tokens first
        keep = [torch.stack([m[row].roll(n) for row, n in enumerate((0, 3, 6))]) for m in keep]
        mixed(keep, padding([8, 3, 6], 8, "right", device=device))
        empty = padding([0, 5, 2], 8, device=device)             # slots without a token: zeros in every layer
        for layer in range(1, 4):
            for x in (cache.k, cache.v):
                copied = (x[layer] == x[layer - 1]).transpose(1, 2).flatten(2)[:, :8].all(-1)       # (B, slots)
                assert torch.equal(copied, ~keep[2 * layer] if kv == "copy_up" else empty)


@on_devices
@both_ways
def test_gradient_flows_through_a_copied_row(compute, device):
    """A copy that is detached (or made under no_grad): the layer that made K and V would not learn what its copies are
    used for. Layer 0's attention is skipped by all, so that only token 1's copy at layer 1 can carry gradient to it."""
    model, ids = build(llama(None, num_hidden_layers=2), device=device), tokens(1, 4, device=device)
    masks = [torch.tensor([m], dtype=torch.bool, device=device)
             for m in ([0, 0, 0, 0], [1, 1, 1, 1], [1, 0, 1, 1], [1, 1, 1, 1])]
    attention = model.model["layers"][0].self_attn
    kv = [attention.k_proj.weight, attention.v_proj.weight]
    loss = lambda: model(ids, policy=given(masks), compute=compute)[0][0, 3].square().sum()
    for weight, gradient in zip(kv, torch.autograd.grad(loss(), kv)):
        assert gradient.abs().max() > 1e-3
        change = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(device)
        values = []
        for step in (1e-6, -1e-6):
            with torch.no_grad():
                weight.add_(step * change)
                values.append(loss())
                weight.sub_(step * change)
        assert (gradient * change).sum().item() == pytest.approx((values[0] - values[1]).item() / 2e-6, rel=1e-5)
    masks[2][0, 1] = True                                        # nothing is copied: nothing flows
    assert all(g is None or not g.any() for g in torch.autograd.grad(loss(), kv, allow_unused=True))


# What a skip leaves alone.

def states(model, *arguments, **settings):
    """h before the first block and after every block, of one call."""
    seen, hooks = [], []
    hooks.append(model.model["layers"][0].register_forward_pre_hook(lambda _, a: seen.append(a[0])))
    for block in model.model["layers"]:
        hooks.append(block.register_forward_hook(lambda _, __, out: seen.append(out[0])))
    with torch.no_grad():
        model(*arguments, **settings)
    for hook in hooks:
        hook.remove()
    return seen


@on_devices
@both_ways
@families
def test_skipped_rows_keep_their_state_bit_for_bit(family, compute, device):
    """h = keep * (h + out) + (1 - keep) * h and the like: rounding in rows that nothing was done to."""
    model, ids = build(family(), dtype=torch.float32, device=device), tokens(3, 9, device=device)
    valid = padding([9, 4, 7], 9, device=device)
    generator = torch.Generator().manual_seed(0)
    masks = [(torch.rand(3, 9, generator=generator) < 0.5).to(device) for _ in range(8)]
    h = states(model, ids, valid=valid, policy=given(masks), compute=compute)
    for layer in range(4):
        untouched = ~(masks[2 * layer] & valid) & ~(masks[2 * layer + 1] & valid)
        assert untouched[valid].any() and torch.equal(h[layer][untouched], h[layer + 1][untouched])
        assert ((h[layer] != h[layer + 1]).any(-1) | untouched).all()


@on_devices
@families
def test_nan_in_a_skipped_row_stays_there(family, device):
    """Adding by keep * output: 0 * NaN is NaN. In masked mode all rows run; whatever the skipped ones give, even NaN,
    is left out of h and of K and V, and so of every other row."""
    model, ids = build(family(), device=device), tokens(3, 9, device=device)
    valid = padding([9, 4, 7], 9, device=device)
    policy = frozen(model, ids, valid, share=0.5)
    clean, trace = model(ids, valid=valid, policy=policy)
    mixed(trace.keep, valid)

    def spoil(mask):
        def hook(module, arguments, out):
            assert out.shape[:2] == mask.shape
            return torch.where(mask[..., None], out, math.nan)
        return hook

    for layer, block in enumerate(model.model["layers"]):
        attn, mlp = trace.keep[2 * layer], trace.keep[2 * layer + 1]
        block.self_attn.o_proj.register_forward_hook(spoil(attn))
        block.self_attn.q_proj.register_forward_hook(spoil(attn))
        block.mlp.down_proj.register_forward_hook(spoil(mlp))
        for projection in (block.self_attn.k_proj, block.self_attn.v_proj):
            projection.register_forward_hook(spoil(attn if layer else valid))
    cache = new_cache(model, 3, 9)
    logits, other = model(ids, valid=valid, policy=policy, cache=cache)
    same_masks(other.keep, trace.keep)
    assert torch.equal(logits, clean)
    assert all(torch.isfinite(x).all() for x in cache.k + cache.v)


@on_devices
@both_ways
@families
@pytest.mark.parametrize("kind", ["batch", "topk", "random", "frozen"])
@torch.no_grad()
def test_padding_touches_nothing(family, kind, compute, device):
    """Padding that is attended to, ranked, counted, or written to the cache: its embedding is NaN here, which would
    spread; and another token in its place must change no real row by a bit."""
    model, lengths = build(family(tie_word_embeddings=False), device=device), [9, 4, 7]
    valid, results = padding(lengths, 9, device=device), []
    ids = tokens(3, 9, device=device) % (VOCAB - 1)
    policy = frozen(model, ids, valid) if kind == "frozen" else SkipPolicy(kind, 0.6)
    for pad in (0, 7, VOCAB - 1):
        if pad == VOCAB - 1:
            model.model["embed_tokens"].weight[pad] = math.nan
        policy.generator = torch.Generator().manual_seed(3)
        cache = new_cache(model, 3, 12)
        logits, trace = model(torch.where(valid, ids, pad), valid=valid, policy=policy, cache=cache, compute=compute)
        step, after = model(ids[:, :1], cache=cache, policy=policy, compute=compute)
        results.append([*trace.keep, *after.keep, logits[valid], step, *cache.k, *cache.v])
        assert not any((m & ~valid).any() for m in trace.keep)
        for x in cache.k + cache.v:
            assert torch.isfinite(x).all()
            for row, n in enumerate(lengths):
                assert x[row, :, :n + 1].abs().amax((0, 2)).min() > 0 and not x[row, :, n + 1:].any()
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


def modules_run(model, *arguments, **settings):
    """Names of the Linear layers and norms that one call runs."""
    ran, hooks = set(), []
    for name, module in model.named_modules():
        if not list(module.children()):
            hooks.append(module.register_forward_pre_hook(lambda _, __, name=name: ran.add(name)))
    with torch.no_grad():
        out = model(*arguments, **settings)
    for hook in hooks:
        hook.remove()
    return ran, out


@on_devices
@both_kv
@families
@pytest.mark.parametrize("length", [1, 5])
def test_a_branch_that_nobody_needs_reads_no_weight(family, kv, length, device):
    """A product with zero rows that still fetches its weights (single-stream decoding is bound by that): the weights of
    what all rows skip are NaN here, and their modules must not be called."""
    model, ids, cache = build(family(), device=device), tokens(2, length, device=device), None
    keep = lambda yes: torch.full((2, length), bool(yes), device=device)
    masks = [keep(yes) for yes in (0, 1, 0, 0, 1, 0, 0, 1)]      # attn 0, mlp 0, attn 1, ...
    policy = SkipPolicy("given", kv=kv, masks=masks)
    expected = model(ids, policy=policy)[0]
    idle = set()
    for layer in range(4):
        p = f"model.layers.{layer}."
        if not masks[2 * layer].any():
            idle |= {p + f"self_attn.{x}_proj" for x in ("qo" if layer == 0 or kv == "dense" else "qkvo")}
            idle |= {p + "post_attention_layernorm"} if model.config.gemma else set()
        if not masks[2 * layer + 1].any():
            idle |= {p + f"mlp.{x}_proj" for x in ("gate", "up", "down")}
            idle |= {p + "post_feedforward_layernorm"} if model.config.gemma else set()
    with torch.no_grad():
        for name in idle:
            model.get_submodule(name).weight.fill_(math.nan)
    for cache in (None, new_cache(model, 2, length)):
        ran, (logits, _) = modules_run(model, ids, policy=policy, compute="compact", cache=cache)
        same(logits, expected)
        assert not ran & idle
        every = {name for name, m in model.named_modules() if not list(m.children())}
        assert ran == every - idle


# Gates and granularity.

def test_gate_detach():
    """gate_detach that detaches nothing, or everything: gates reach the backbone only where it is off, and do learn."""
    for detach in (False, True):
        model = build(llama(GateConfig(detach=detach)))
        _, trace = model(tokens(2, 5), keep_gates=True)
        sparsity_loss(trace.gates).backward()
        reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
        gates = {name for name, _ in model.named_parameters() if "_gate." in name}
        assert gates <= reached
        assert (reached == gates) is detach, reached - gates


def test_no_gradient_through_a_decision():
    """A score that keeps the graph alive through the threshold, or gates without a gradient from the cross-entropy."""
    model, ids = build(llama()), tokens(2, 6)
    policy = SkipPolicy("batch", 0.7)
    logits, trace = model(ids, policy=policy)
    assert not any(m.requires_grad for m in trace.keep)
    (logits ** 2).sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    (model(ids, policy=given(trace.keep))[0] ** 2).sum().backward()
    for name, p in model.named_parameters():
        assert p.grad.any() and torch.equal(p.grad, expected[name])


@both_ways
@families
@torch.no_grad()
def test_whole_layers_follow_their_attention(family, compute):
    """skip="layer" that asks the MLP's gate as well: its mask is the attention's, though its gate would differ."""
    model, ids = build(family()), tokens(3, 8)
    for policy in (SkipPolicy("batch", 0.6, "layer"), frozen(model, ids, skip="layer"),
                   SkipPolicy("random", 0.6, "layer", generator=torch.Generator().manual_seed(0))):
        trace = model(ids, policy=policy, compute=compute)[1]
        mixed(trace.keep, trace.valid)
        for layer in range(4):
            assert torch.equal(trace.keep[2 * layer], trace.keep[2 * layer + 1])
            assert not torch.equal(trace.keep[2 * layer + 1], select_tokens(trace.scores[2 * layer + 1], 0.6))


@pytest.mark.parametrize("skip", GRANULARITIES)
@families
@torch.no_grad()
def test_granularity_in_the_model(family, skip):
    """A granularity that the model does not obey: which branches skip anything at all. And layers that skip nothing
    beside layers that do: a mask made for all rows used for the gathered ones."""
    model, ids, policy = build(family(windows=[None] * 4)), tokens(3, 12), SkipPolicy("batch", 0.6, skip)
    caches = {compute: new_cache(model, 3, 12) for compute in ("masked", "compact")}
    for part in (ids[:, :8], ids[:, 8:]):
        logits, trace = model(part, policy=policy, cache=caches["masked"])
        skips = [bool((~m).any()) for m in trace.keep]
        assert skips == {"all": [True] * 8, "layer": [True] * 8, "attn": [True, False] * 4, "mlp": [False, True] * 4,
                         "alternate": [False, False, True, True] * 2}[skip]
        compact, other = model(part, policy=policy, cache=caches["compact"], compute="compact")
        same_masks(other.keep, trace.keep)
        same(compact, logits)


# Masked against compact.

def distinct(batch, length, generator):
    """(B, S) token ids, no two alike."""
    return torch.randperm(VOCAB, generator=generator)[:batch * length].view(batch, length)


def random_case(seed, device):
    """A random tiny model, batch and policy. Padding lies left, right or anywhere; a row may hold nothing else.

    No token stands there twice: one that sees only its like scores the same, and rounding alone would rank the two."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    family, gate, kv_heads = rng.choice([llama, gemma]), GATES[seed % len(GATES)], rng.choice([1, 2])
    sizes = dict(num_hidden_layers=rng.randint(1, 4), num_key_value_heads=kv_heads, head_dim=rng.choice([2, 4, 6]),
                 num_attention_heads=kv_heads * rng.choice([1, 2]), hidden_size=rng.choice([16, 24]))
    model = build(family(gate, **sizes), seed, device)
    batch, length = rng.randint(1, 4), rng.randint(1, 11)
    ids = distinct(batch, length, generator).to(device)
    side = rng.choice(["none", "left", "right", "anywhere"])
    valid = None
    if side == "anywhere":
        valid = torch.rand(batch, length, generator=generator) < 0.7
    elif side != "none":
        valid = padding([rng.randint(0, length) for _ in range(batch)], length, side)
    if valid is not None and not valid.any():
        valid[0, -1] = True
    valid = None if valid is None else valid.to(device)
    kind = rng.choice(["random"] if gate is None else ["batch", "frozen", "random", "topk"])
    budget = rng.choice([1.0, 0.9, 0.7, 0.5, 0.2, 0.02])
    skip, kv = rng.choice(GRANULARITIES), rng.choice(["copy_up", "dense"])
    policy = SkipPolicy(kind, budget, skip, kv, generator=torch.Generator().manual_seed(seed))
    if kind == "frozen" and budget < 1:
        policy.thresholds = frozen(model, ids, valid, 1 - budget).thresholds
    return model, ids, valid, policy


def test_random_cases_cover_the_space():
    """A generator of cases that never draws what breaks: every family, policy, granularity, kv and padding, and a row
    of nothing but padding."""
    models, _, valids, policies = zip(*(random_case(seed, "cpu") for seed in range(150)))
    assert {m.config.gemma for m in models} == {True, False}
    assert {repr(m.config.gate) for m in models} == {repr(g) for g in GATES}
    assert {p.kind for p in policies} == {"batch", "frozen", "random", "topk"}
    assert {p.skip for p in policies} == set(GRANULARITIES)
    assert {p.kv for p in policies} == {"copy_up", "dense"}
    assert {p.budget for p in policies} == {1.0, 0.9, 0.7, 0.5, 0.2, 0.02}
    assert any(v is None for v in valids) and any(v is not None and not v.any(1).all() for v in valids)


@on_devices
@pytest.mark.parametrize("seed", range(150))
def test_compact_equals_masked(seed, device):
    """Gathered rows put back in the wrong place, compacted positions, skipped tokens missing from later attention,
    padding in the rectangle, a gradient that stops at the gather: on random models, batches, policies and gates."""
    model, ids, valid, policy = random_case(seed, device)
    logits, trace = model(ids, valid=valid, policy=policy, compute="masked")
    recorded = given(trace.keep, policy) if policy.kind == "random" else policy
    compact, other = model(ids, valid=valid, policy=recorded, compute="compact")
    same_masks(other.keep, trace.keep)
    same(compact, logits)
    for a, b in zip(other.scores or [], trace.scores or [], strict=True):
        same(a, b)
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(device)
    expected = gradients(model, logits, weights)
    for name, gradient in gradients(model, compact, weights).items():
        same(gradient, expected[name])
    single = in_float32(model)
    with torch.no_grad():
        a, b = (single(ids, valid=valid, policy=given(trace.keep, policy), compute=c)[0] for c in ("compact", "masked"))
    close_in_float32(a, b)


@on_devices
@pytest.mark.parametrize("seed", range(150, 210))
@torch.no_grad()
def test_compact_equals_masked_with_a_cache(seed, device):
    """Copied-up rows, or rows that nobody computed, missing from the cache: prompt, a ragged second call and one more
    token, the caches compared layer by layer after each."""
    model, ids, valid, policy = random_case(seed, device)
    generator, (batch, length) = torch.Generator().manual_seed(seed), ids.shape
    more = lambda length: distinct(batch, length, generator).to(device)
    chunks = [(ids, valid), (more(3), padding([seed % 3 + 1] * batch, 3, "right", device)), (more(1), None)]
    caches = {compute: new_cache(model, batch, length + 7) for compute in ("masked", "compact")}
    for tokens_, real in chunks:
        logits, trace = model(tokens_, valid=real, cache=caches["masked"], policy=policy, compute="masked")
        recorded = given(trace.keep, policy) if policy.kind == "random" else policy
        compact, other = model(tokens_, valid=real, cache=caches["compact"], policy=recorded, compute="compact")
        same_masks(other.keep, trace.keep)
        same(compact, logits)
        assert torch.equal(caches["masked"].lengths, caches["compact"].lengths)
        for a, b in zip(caches["compact"].k + caches["compact"].v, caches["masked"].k + caches["masked"].v):
            same(a, b)


# Alone and in a batch.

def greedy(model, ids, valid, steps, compute, policy=None):
    """(B, steps) greedy ids from a cached loop, and the traces."""
    cache, new, traces = new_cache(model, len(ids), ids.shape[1] + steps), [], []
    with torch.no_grad():
        for _ in range(steps):
            logits, trace = model(ids, valid=valid, cache=cache, compute=compute, last=True, policy=policy)
            ids, valid = logits.argmax(-1)[:, None], None
            new.append(ids)
            traces.append(trace)
    return torch.cat(new, dim=1), traces


@on_devices
@torch.no_grad()
def test_batch_does_not_promise_that(device):
    """The paper's rule sold as reproducible: with a batch mate a token is ranked against it; alone it skips nothing
    while decoding. (Were `batch` to become independent of batch mates, its description would be wrong.)"""
    model, ids = build(llama(), device=device), tokens(2, 8, device=device)
    policy = SkipPolicy("batch", 0.7)
    _, alone = greedy(model, ids[:1], None, 4, "compact", policy)
    _, together = greedy(model, ids, None, 4, "compact", policy)
    assert all(m.all() for trace in alone[1:] for m in trace.keep)
    assert all((~m).sum() == 1 for trace in together[1:] for m in trace.keep)
    assert any(not torch.equal(a[0], b[0]) for a, b in zip(alone[0].keep, together[0].keep))


@on_devices
@both_ways
@families
@torch.no_grad()
def test_frozen_gives_a_prompt_the_same_tokens_in_any_batch(family, compute, device):
    """A decision, position or key that depends on batch mates: four prompts of unequal lengths, each alone and in every
    kind of company, make the same keep masks and the same tokens."""
    model, lengths, steps = build(family(), device=device), [7, 2, 5, 7], 6
    prompts = tokens(4, 7, device=device)
    policy = frozen(model, prompts)
    alone = [greedy(model, prompts[i:i + 1, 7 - n:], None, steps, compute, policy) for i, n in enumerate(lengths)]
    for members in ([0, 1, 2, 3], [3, 0], [1, 2], [2, 1, 0]):
        width = max(lengths[i] for i in members)
        ids, valid = prompts[members, 7 - width:], padding([lengths[i] for i in members], width, device=device)
        new, traces = greedy(model, ids, None if valid.all() else valid, steps, compute, policy)
        for row, i in enumerate(members):
            for step, trace in enumerate(traces):
                n = lengths[i] if step == 0 else 1
                same_masks([m[row, -n:] for m in trace.keep], [m[0] for m in alone[i][1][step].keep])
            assert torch.equal(new[row], alone[i][0][0])
    mixed([m[0] for m in alone[0][1][0].keep], torch.ones(7, dtype=torch.bool, device=device))
    single, valid = in_float32(model), padding(lengths, 7, device=device)
    masks = model(prompts, valid=valid, policy=policy)[1].keep
    together = single(prompts, valid=valid, policy=given(masks), compute=compute)[0]
    for i, n in enumerate(lengths):
        only = single(prompts[i:i + 1, 7 - n:], policy=given([m[i:i + 1, 7 - n:] for m in masks]), compute=compute)[0]
        close_in_float32(together[i, 7 - n:], only[0])


# Against Hugging Face.

@pytest.fixture(scope="module", params=GOLDENS)
def golden(request):
    return request.param, load_model(GOLDEN / request.param), load_file(GOLDEN / request.param / "golden.safetensors")


def test_goldens_are_there():
    """A clone without the goldens would pass every golden test by having none."""
    assert GOLDENS == ["gemma2", "llama_rope3", "llama_untied"]


@on_devices
@both_ways
def test_golden_logits(golden, compute, device):
    """Anything in the decoder that is not what Hugging Face computes: rope and its scaling, norms, activation,
    softcaps, windows, head_dim, an untied head; on a plain batch, 300 tokens, and the real tokens of a left-padded
    batch."""
    _, model, g = golden
    model, g = copy.deepcopy(model).to(device), {key: value.to(device) for key, value in g.items()}
    with torch.no_grad():
        assert (model(g["input_ids"], compute=compute)[0] - g["logits"]).abs().max() < 1e-3
        assert (model(g["long_input_ids"], compute=compute)[0][:, -16:] - g["long_logits_last16"]).abs().max() < 1e-3
        real = g["batch_attention_mask"].bool()
        logits = model(g["batch_input_ids"], valid=real, compute=compute)[0]
        assert (logits - g["batch_logits"])[real].abs().max() < 1e-3


def test_golden_hidden_states(golden):
    """Two mistakes that cancel in the logits, or an embedding scale in the wrong place: every layer's output."""
    _, model, g = golden
    states, hooks = [], []
    for layer in model.model["layers"]:
        hooks.append(layer.register_forward_pre_hook(lambda _, arguments: states.append(arguments[0])))
    hooks.append(model.model["norm"].register_forward_pre_hook(lambda _, arguments: states.append(arguments[0])))
    with torch.no_grad():
        model(g["input_ids"])
    for hook in hooks:
        hook.remove()
    for i, h in enumerate(states):
        assert (h - g[f"hidden.{i}"]).abs().max() < 1e-3, f"enters layer {i}"
    assert f"hidden.{len(states)}" not in g and len(states) == model.config.num_hidden_layers + 1


@on_devices
@both_ways
def test_golden_greedy_ids(golden, compute, device):
    """A cache that drifts: wrong slots or positions while decoding, after a plain and after a left-padded prompt."""
    _, model, g = golden
    model, g = copy.deepcopy(model).to(device), {key: value.to(device) for key, value in g.items()}
    assert torch.equal(greedy(model, g["greedy_prompt_ids"], None, 32, compute)[0], g["greedy_new_ids"])
    new = greedy(model, g["batch_input_ids"], g["batch_attention_mask"].bool(), 32, compute)[0]
    assert torch.equal(new, g["batch_greedy_new_ids"])


def test_both_styles_of_config_load_alike(golden, tmp_path):
    """rope_parameters read, rope_theta + rope_scaling not (or another family's defaults): other logits, no error."""
    name, model, g = golden
    for file in (GOLDEN / name).iterdir():
        if file.name not in ("config.json", "golden.safetensors"):
            shutil.copy(file, tmp_path / ("config.json" if file.name == "config.hub.json" else file.name))
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path)(g["long_input_ids"])[0], model(g["long_input_ids"])[0])


# Training.

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_gets_no_groups_that_its_kernel_does_not_know(dtype, monkeypatch):
    """Scores of every head and pair in memory, 34 GB of them for 4,096 tokens of a 1B model: there torch's kernels for
    float32, and with a mask, want as many heads of K and V as of q."""
    calls, attention = [], torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", lambda q, k, v, attn_mask, **how: (
        calls.append((attn_mask is not None, q.shape[1] == k.shape[1])), attention(q, k, v, attn_mask, **how))[1])
    model, ids = build(llama(), dtype=dtype), tokens(2, 6)
    valid = padding([6, 4], 6)
    with torch.no_grad():
        before = [model(ids, valid=v)[0] for v in (None, valid)]
        monkeypatch.setattr(torch.Tensor, "is_cuda", True)
        after = [model(ids, valid=v)[0] for v in (None, valid)]
    layers, there = model.config.num_hidden_layers, dtype == torch.float32
    assert calls == sum([[(masked, same)] * layers for masked, same in (
        (False, False), (True, False), (False, there), (True, True))], [])
    assert all(torch.allclose(a, b, atol=1e-2 if dtype == torch.bfloat16 else 1e-6) for a, b in zip(before, after))


@pytest.mark.parametrize("keep", [False, True])
def test_gates_that_nobody_asked_for_are_let_go(keep):
    """A forward pass that holds the vector gates of every branch to its end: 16 GB of an 8B model's batch."""
    model, made = build(llama()).eval(), []
    for block in model.model["layers"]:
        for gate in model.gates_of(block):
            gate.register_forward_hook(lambda module, x, out: made.append(
                weakref.ref(out[0] if isinstance(out, tuple) else out)))
    model.lm_head.register_forward_pre_hook(lambda *_: made.append([ref() is not None for ref in made]))
    with torch.no_grad():
        model(tokens(1, 5), keep_gates=keep)
    branches = 2 * model.config.num_hidden_layers
    assert len(made[-1]) == branches and sum(made[-1][:-2]) == (branches - 2 if keep else 0)


def test_checkpointing_stores_less():
    """checkpoint_blocks that is accepted and ignored: blocks run twice with a backward pass, and once without."""
    model, runs = build(llama()), 0

    def count(*_):
        nonlocal runs
        runs += 1

    model.model["layers"][2].mlp.register_forward_hook(count)
    model(tokens(1, 4), checkpoint_blocks=True)[0].sum().backward()
    assert runs == 2
    with torch.no_grad():
        model(tokens(1, 4), checkpoint_blocks=True)
    assert runs == 3


@on_devices
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", ["batch", "random"])
@families
def test_activation_checkpointing_changes_nothing(family, kind, padded, device):
    """Masks drawn or ranked anew in the recomputation: with `random` the backward pass would be another network's."""
    model, ids = build(family(), device=device).train(), tokens(3, 8, device=device)
    valid = padding([8, 3, 6], 8, device=device) if padded else None
    results = []
    for compute in ("masked", "compact"):
        for checkpointed in (False, True):
            generator = torch.Generator().manual_seed(4)
            policy = SkipPolicy(kind, 0.6, generator=generator)
            logits, trace = model(ids, valid=valid, policy=policy, compute=compute, checkpoint_blocks=checkpointed)
            loss = (logits ** 2).mean() + sparsity_loss(trace.gates, valid)
            model.zero_grad()
            loss.backward()
            grads = [p.grad.clone() for p in model.parameters()]
            results.append((trace.keep, loss.detach(), grads, generator.get_state()))
    mixed(results[0][0], trace.valid)
    for keep, loss, grads, state in results[1:]:
        same_masks(keep, results[0][0])
        same(loss, results[0][1], 1e-12)
        for a, b in zip(grads, results[0][2]):
            same(a, b, 1e-12)
        assert torch.equal(state, results[0][3])


@both_ways
@pytest.mark.parametrize("kind", ["batch", "random"])
@families
def test_whole_layers_are_asked_once_under_checkpointing(family, kind, compute, monkeypatch):
    """skip="layer" drawn anew in the recomputation, or an MLP that there follows another mask than its attention's:
    each layer is asked once, in the forward pass, and the gradients are those without checkpointing."""
    model, ids, valid = build(family()).train(), tokens(3, 8), padding([8, 3, 6], 8)
    asked, keep, results = [], SkipPolicy.keep, []
    monkeypatch.setattr(SkipPolicy, "keep", lambda self, branch, *a: asked.append(branch) or keep(self, branch, *a))
    for checkpointed in (False, True):
        policy = SkipPolicy(kind, 0.6, "layer", generator=torch.Generator().manual_seed(4))
        logits, trace = model(ids, valid=valid, policy=policy, compute=compute, checkpoint_blocks=checkpointed)
        results.append((trace.keep, gradients(model, logits, valid[..., None]), policy.generator.get_state()))
        assert asked == [0, 2, 4, 6]
        asked.clear()
    (plain, expected, state), (masks, grads, state_after) = results
    mixed(plain, valid)
    same_masks(plain[0::2], plain[1::2])
    same_masks(masks, plain)
    for name, gradient in grads.items():
        same(gradient, expected[name], 1e-12)
    assert torch.equal(state, state_after)


# Devices, dtypes, torch.compile.

@on_devices
@families
@pytest.mark.parametrize("kind", ["batch", "frozen", "random", "topk"])
@torch.no_grad()
def test_masked_never_waits_for_the_device(family, kind, device):
    """An .item(), a nonzero or an index by mask in masked mode: training would stall a GPU at every branch. Prompts
    with and without padding, and decoding after them."""
    model, ids = build(family(), device=device), tokens(3, 6, device=device)
    policy = frozen(model, ids) if kind == "frozen" else SkipPolicy(kind, 0.6)
    for valid in (None, padding([6, 2, 4], 6, device=device)):
        with Synchronisations() as host:
            model(ids, valid=valid, policy=policy)
        assert not host.seen
        cache = new_cache(model, 3, 8)
        model(ids, valid=valid, cache=cache, policy=policy)
        with Synchronisations() as host:
            model(ids[:, :1], cache=cache, policy=policy)
        assert not host.seen


@on_devices
@both_ways
@torch.no_grad()
def test_bfloat16_backbone_keeps_its_gates_in_float32(compute, device):
    """Gates cast with the backbone: scores in bfloat16 tie and their masks are noise."""
    for name in GOLDENS:
        model = load_model(GOLDEN / name, gate=GateConfig(), device=device, dtype=torch.bfloat16)
        assert {p.dtype for n, p in model.named_parameters() if "_gate." in n} == {torch.float32}
        assert {p.dtype for n, p in model.named_parameters() if "_gate." not in n} == {torch.bfloat16}
        ids, cache = tokens(2, 9, device=device), new_cache(model, 2, 10)
        policy = SkipPolicy("batch", 0.6)
        for part in (ids, ids[:, :1]):
            logits, trace = model(part, cache=cache, policy=policy, compute=compute, keep_gates=True)
            assert logits.dtype == cache.k[0].dtype == torch.bfloat16 and torch.isfinite(logits).all()
            assert {x.dtype for x in trace.scores + trace.gates} == {torch.float32}
        mixed(trace.keep, trace.valid)


@torch.no_grad()
def test_masked_compiles_in_one_piece():
    """A branch on the host or a shape that depends on the masks: torch.compile would cut masked mode into pieces, one
    or more per branch (fullgraph refuses any cut)."""
    model, ids, policy = build(llama(num_hidden_layers=2)), tokens(2, 6), SkipPolicy("batch", 0.6)
    expected, trace = model(ids, policy=policy)
    compiled, other = torch.compile(model, backend="eager", fullgraph=True)(ids, policy=policy)
    same_masks(other.keep, trace.keep)
    same(compiled, expected)
