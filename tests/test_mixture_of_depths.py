"""Tests of paper/mixture_of_depths.py: what a block computes, who is chosen, what teaches the substitute."""
import copy

import numpy
import pytest
import torch

from conftest import complaint, families, gemma, given, llama, mask, padding, same, same_masks, tokens
from gates import GateConfig, SkipPolicy
from routed_models import dense_like, policy_of, routed_model        # which puts paper/ on the path

from mixture_of_depths import MixtureOfDepths, TopK, membership_loss

NAME = "mixture_of_depths"


def open_routers(model):
    """sigmoid(r) = 1 exactly, whatever h is."""
    with torch.no_grad():
        for block in model.model["layers"]:
            block.self_attn_gate.out.weight.zero_()
            block.self_attn_gate.out.bias.fill_(40.0)
    return model


def states(model, ids, valid=None, policy=None):
    """h before each block and after the last, (B, S, H) each, and the blocks' keep masks."""
    h, call = model.begin(ids, valid=valid, policy=policy)
    found, below = [h], None
    for block in model.model["layers"]:
        h, below, _, _ = block(h, below, model.gates_of(block), call)
        found.append(h)
    return found, [call.keep[2 * layer] for layer in range(len(found) - 1)]


# What a block computes.

@families
@pytest.mark.parametrize("training", [True, False])
@torch.no_grad()
def test_full_capacity_and_open_routers_are_the_dense_model(family, training):
    """Test 1: the residual multiplied, a branch multiplied twice, a router that is missing at inference."""
    model, ids, valid = open_routers(routed_model(NAME, family)), tokens(3, 9), padding([9, 4, 6], 9)
    policy = TopK("topk", 1.0, "layer") if training else SkipPolicy("none", 1.0, "layer")
    logits = model.train(training)(ids, valid=valid, policy=policy)[0]
    same(logits[valid], dense_like(model, family)(ids, valid=valid)[0][valid])


@families
@torch.no_grad()
def test_chosen_tokens_are_a_shorter_sequence(family):
    """Tests 3 and 2: each block by another way, the core's dense block on the chosen tokens alone at their own
    positions. A bypassing token that is seen, positions counted anew, r that multiplies the wrong token, an inner
    residual that is multiplied; and the others keep their state, bit for bit."""
    model, dense = (m.train() for m in (routed_model(NAME, family), dense_like(routed_model(NAME, family), family)))
    ids, valid = tokens(3, 9), padding([9, 5, 6], 9, "right")
    found, keeps = states(model, ids, valid, TopK("topk", 0.6, "layer"))
    for layer, (h, after, keep) in enumerate(zip(found, found[1:], keeps)):
        assert keep.sum(1).tolist() == [5, 3, 3]
        assert torch.equal(h[~keep], after[~keep]) and (h[keep] != after[keep]).any(-1).all()
        gate = model.model["layers"][layer].self_attn_gate.out
        for b in range(3):
            at = keep[b].nonzero()[:, 0]                                         # (k,)
            inside = h[b:b + 1, at]                                              # (1, k, H)
            _, call = dense.begin(ids[b:b + 1, at], positions=at[None])
            outside = dense.model["layers"][layer](inside, None, (None, None), call)[0]
            r = 1 / (1 + torch.exp(-(inside @ gate.weight[0] + gate.bias)))      # (1, k)
            same(after[b:b + 1, at], inside + r[..., None] * (outside - inside))


@torch.no_grad()
def test_what_bypasses_a_block_is_not_seen_in_it():
    """K and V of a token that bypasses, seen after all (kv "dense" shows them), in this call or out of the cache."""
    model, ids = routed_model(NAME), tokens(1, 6)
    other = ids.clone()
    other[0, 2] = (ids[0, 2] + 1) % 60
    keep = [torch.arange(6)[None] != 2] * 6                      # token 2 bypasses every block
    seen = {}
    for kv in ("copy_up", "dense"):
        policy = lambda: given(keep, SkipPolicy("none", 1.0, "layer", kv))
        a, b = (model(x, policy=policy())[0] for x in (ids, other))
        seen[kv] = [bool((a[0, i] != b[0, i]).any()) for i in range(6)]
    assert seen == {"copy_up": [False, False, True, False, False, False],
                    "dense": [False, False, True, True, True, True]}


@torch.no_grad()
def test_as_the_authors_published_it():
    """The deviation, by its formula: in training r (h + f), outside of it h + f. And it is off by default."""
    for training in (True, False):
        model = routed_model(NAME, as_published_code=True).train(training)
        plain = routed_model(NAME).train(training)
        plain.load_state_dict(model.state_dict())
        ids = tokens(2, 7)
        policy = TopK("topk", 0.6, "layer") if training else policy_of(NAME, plain, ids)
        h, call = model.begin(ids, policy=policy)
        block, other = model.model["layers"][0], plain.model["layers"][0]
        theirs = block(h, None, model.gates_of(block), call)[0]
        ours = other(h, None, plain.gates_of(other), call)[0]                    # the same call: the same tokens
        keep, r = call.keep[0], block.self_attn_gate(h).sigmoid()[..., None]
        f = (ours - h) / r
        want = r * (h + f) if training else h + f
        same(theirs, torch.where(keep[..., None], want, h))
        assert (theirs - ours).abs().max() > 0.1


# Who is chosen.

@pytest.mark.parametrize("budget", [0.07, 0.3, 0.5, 0.7, 0.99, 1.0])
def test_the_k_highest_of_each_sequence(budget):
    """Test 2: a ranking over the batch, padding that is chosen or counted, k = 0, floor(0.7 * 10) = 6; by numpy."""
    scores, valid = torch.randn(4, 10, generator=torch.Generator().manual_seed(0)), padding([10, 3, 7, 1], 10)
    keep = TopK("topk", budget, "layer").keep(2, scores.masked_fill(~valid, 99.0), valid)
    for b, n in enumerate([10, 3, 7, 1]):
        k = max(1, {0.7: [7, 2, 4, 0]}.get(budget, [int(budget * m) for m in (10, 3, 7, 1)])[b])
        row = numpy.where(valid[b], scores[b].numpy(), -numpy.inf)
        assert set(keep[b].nonzero()[:, 0].tolist()) == set(numpy.argsort(-row)[:k].tolist())


def test_equal_scores_choose_k_and_not_more():
    """A threshold in place of a ranking."""
    scores, valid = torch.zeros(2, 6), mask([1] * 6, [0, 0, 1, 1, 1, 1])
    assert TopK("topk", 0.5, "layer").keep(0, scores, valid).sum(1).tolist() == [3, 2]
    assert TopK("topk", 0.57, "layer").keep(0, torch.rand(1, 100), mask([1] * 100)).sum() == 57      # 0.57 * 100 < 57


@pytest.mark.parametrize("substitute", ["predictor", "router"])
@torch.no_grad()
def test_inference_asks_the_substitute_and_training_the_router(substitute):
    """The router's ranking at inference, a predictor that nobody asks, or one that reads what the norm made of h."""
    model, ids = routed_model(NAME, substitute=substitute), tokens(2, 7)
    h, call = model.begin(ids)
    block = model.model["layers"][0]
    r, s = block.self_attn_gate.out, block.mlp_gate
    router = h @ r.weight[0] + r.bias
    inner = None if s is None else h @ s.inner.weight.T + s.inner.bias
    guess = router if s is None else (inner * torch.sigmoid(inner)) @ s.out.weight[0] + s.out.bias
    same(block(h, None, model.gates_of(block), call)[3][0], guess.sigmoid())
    model.train()
    same(block(h, None, model.gates_of(block), call)[3][0], router.sigmoid())
    assert "'bogus' is not one of" in complaint(MixtureOfDepths, llama(GateConfig("scalar")), substitute="bogus")


@torch.no_grad()
def test_a_step_agrees_with_one_pass():
    """Test 6: with fixed thresholds; a decision that looks ahead. test_routed.py has batches, padding and caches."""
    model, ids = routed_model(NAME), tokens(2, 9)
    policy = policy_of(NAME, model, ids)
    whole, trace = model(ids, policy=policy)
    for n in range(1, 9):
        logits, part = model(ids[:, :n], policy=policy)
        same(logits, whole[:, :n])
        same_masks(part.keep, [keep[:, :n] for keep in trace.keep])


# What is learned.

def test_the_gradient_reaches_r_of_chosen_tokens():
    """Test 4: a router that cannot learn, because its value does not multiply, or that gets a gradient for others."""
    model, ids, seen = routed_model(NAME).train(), tokens(2, 8), []
    for block in model.model["layers"]:
        block.self_attn_gate.register_forward_hook(lambda _, __, r: (r.retain_grad(), seen.append(r)) and None)
    logits, trace = model(ids, policy=TopK("topk", 0.5, "layer"))
    logits.pow(2).sum().backward()
    for r, keep in zip(seen, trace.keep[0::2], strict=True):
        assert (r.grad[~keep] == 0).all() and keep.sum() == 8
        assert (r.grad[keep] != 0).all()


@pytest.mark.parametrize("substitute", ["predictor", "router"])
def test_what_the_substitutes_loss_reaches(substitute):
    """Test 5: the predictor's loss reaches the predictor alone; the router's, as in the original, whatever made h."""
    model, ids = routed_model(NAME, substitute=substitute).train(), tokens(2, 8)
    trace = model(ids, policy=TopK("topk", 0.5, "layer"))[1]
    membership_loss(trace.gates).backward()
    moved = {key for key, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    taught = "mlp_gate" if substitute == "predictor" else "self_attn_gate"
    assert {key for key, _ in model.named_parameters() if f".{taught}." in key} <= moved
    others = {key for key in moved if f".{taught}." not in key}
    assert not others if substitute == "predictor" else "model.embed_tokens.weight" in others


@pytest.mark.parametrize("padded", [True, False])
def test_the_loss_by_hand(padded):
    """Padding that counts, a sum, or the blocks' mean taken over branches; and membership that is not T."""
    model, ids = routed_model(NAME).train(), tokens(2, 6)
    valid = padding([6, 4], 6, "right") if padded else None
    trace = model(ids, valid=valid, policy=TopK("topk", 0.5, "layer"))[1]
    losses = []
    for gate, keep in zip(trace.gates[0::2], trace.keep[0::2], strict=True):
        p = (1 / (1 + numpy.exp(-gate[..., 0].detach().numpy())))
        assert torch.equal(gate[..., 1].bool(), keep)
        each = numpy.where(keep.numpy(), -numpy.log(p), -numpy.log(1 - p))
        losses.append(each[trace.valid.numpy()].mean())
    assert membership_loss(trace.gates, valid).item() == pytest.approx(numpy.mean(losses), abs=1e-12)


def test_the_start_is_near_dense():
    """A fresh router that halves every update: sigmoid(5), and a predictor that knows nothing yet."""
    torch.manual_seed(0)
    model = MixtureOfDepths(gemma(GateConfig("scalar")))
    model.init_weights()
    model.eval()
    h, call = model.begin(tokens(2, 6))
    for block in model.model["layers"]:
        assert (block.self_attn_gate(h).sigmoid() - 0.9933).abs().max() < 0.01
        assert (block.mlp_gate(h).sigmoid() - 0.5).abs().max() < 0.1
    assert copy.deepcopy(model).config.gate.macs(24) == model.config.gate.macs(24)
