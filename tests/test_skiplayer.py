"""Tests of paper/skiplayer.py: a binary router per branch, its straight-through draw, its density."""
import pytest
import torch

from conftest import both_ways, families, llama, padding, same, same_masks, tokens
from gates import GateConfig, SkipPolicy
from routed_models import dense_like, policy_of, routed_model        # which puts paper/ on the path

from skiplayer import Router, SkipLayer, density_loss

NAME = "skiplayer"


def at(tau, layers=3):
    return SkipPolicy("frozen", 0.5, "all", "dense", thresholds=[tau] * (2 * layers))


def states(model, ids, policy):
    """h before each block and after the last, (B, S, H) each, and the branches' keep masks."""
    h, call = model.begin(ids, policy=policy)
    found, below = [h], None
    for block in model.model["layers"]:
        h, below, _, _ = block(h, below, model.gates_of(block), call)
        found.append(h)
    return found, call.keep


# Tests 1 and 2: the ends.

@families
@both_ways
@torch.no_grad()
def test_nobody_skips_at_0_and_everybody_at_1(family, compute):
    """A factor that stays at inference, or a branch that adds something though all skip: then the head reads the
    embedding."""
    model, ids, valid = routed_model(NAME, family), tokens(3, 8), padding([8, 3, 5], 8)
    dense = dense_like(model, family)
    logits = model(ids, valid=valid, policy=at(0.0), compute=compute)[0]
    same(logits[valid], dense(ids, valid=valid)[0][valid])
    h, _ = dense.begin(ids)
    embedding = dense.lm_head(dense.model["norm"](h))
    if family is not llama:
        embedding = 8.0 * torch.tanh(embedding / 8.0)            # final_softcap
    logits, trace = model(ids, valid=valid, policy=at(1.0), compute=compute)
    assert torch.equal(logits[valid], embedding[valid]) and not torch.stack(trace.keep).any()


@torch.no_grad()
def test_an_open_router_trains_as_the_dense_model():
    """A large bias: z is 1 whatever is drawn."""
    model, ids = routed_model(NAME).train(), tokens(2, 7)
    for block in model.model["layers"]:
        for router in (block.self_attn_gate, block.mlp_gate):
            router.out.weight.zero_()
            router.out.bias.copy_(torch.tensor([-1e4, 1e4]))
    same(model(ids, policy=SkipLayer.policy("batch", 0.5, "all", "dense"))[0], dense_like(model)(ids)[0])


# Test 3: what skips keeps its state.

@pytest.mark.parametrize("as_published_code", [False, True])
@torch.no_grad()
def test_skipped_rows_stay_bit_for_bit(as_published_code):
    """The normalised input on top of a token that skips: so it is in the authors' code, and so the switch does."""
    model, ids = routed_model(NAME, as_published_code=as_published_code), tokens(3, 9)
    policy = policy_of(NAME, routed_model(NAME), ids, share=0.6)
    found, keep = states(model, ids, policy)
    for layer, (h, after) in enumerate(zip(found, found[1:])):
        both = ~keep[2 * layer] & ~keep[2 * layer + 1]
        assert both.sum() > 2 and (h[both] == after[both]).all() == (not as_published_code)
        assert (h[~both] != after[~both]).any(-1).all()


@families
@pytest.mark.parametrize("training", [True, False])
@torch.no_grad()
def test_as_the_authors_published_it(family, training):
    """The deviation, by its formula and the modules alone: in training z f(x) + (1 - z) x on top of h, outside of it
    p f(x) for what runs and (1 - p) x for the rest."""
    model, ids = routed_model(NAME, family, as_published_code=True).train(training), tokens(2, 6)
    torch.manual_seed(3)
    policy = SkipLayer.policy("batch", 0.5, "all", "dense") if training else at(0.5)
    h, call = model.begin(ids, policy=policy)
    block = model.model["layers"][0]
    after, _, z, p = block(h, None, model.gates_of(block), call)
    dense = dense_like(model, family)
    for branch, (norm, f, norm_after) in enumerate(dense.model["layers"][0].branches()):
        x = norm(h)
        if branch == 0:
            _, plain = dense.begin(ids)
            k, v = f.keys_values(x, plain.real, None, plain)
            o = f(x, plain.real, *plain.store(0, k, v), plain)
        else:
            o = f(x)
        o = o if norm_after is None else norm_after(o)
        run, weight = (z[branch], z[branch]) if training else (call.keep[branch][..., None], p[branch][..., None])
        h = h + torch.where(run.bool(), weight * o, (1 - weight) * x)
    same(after, h)


# Test 4: the draw.

def test_the_draw_is_one_of_two_with_the_right_odds():
    """z that is soft, a draw without noise, or with another temperature: P(z_1) is softmax(a)_1, over 40000 draws."""
    router = Router(GateConfig("scalar"), 2).double()
    with torch.no_grad():
        router.out.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        router.out.bias.zero_()
    torch.manual_seed(0)
    x = torch.tensor([[0.3, 1.1], [2.0, -0.5], [0.0, 0.0]], dtype=torch.float64)             # logits themselves
    with torch.no_grad():
        z, p = router(x.expand(40000, 3, 2))
    want = 1 / (1 + torch.exp(x[:, 0] - x[:, 1]))
    same(p[0], want)
    assert z.shape == (40000, 3, 1) and set(z.unique().tolist()) == {0.0, 1.0}
    assert (z.mean(0)[:, 0] - want).abs().max() < 4 * 0.5 / 200  # four standard errors
    assert torch.equal(router.eval()(x[None])[0], torch.ones(1, 3, 1, dtype=torch.float64))


def test_the_gradient_reaches_w_for_both_decisions():
    """Tokens that skip and so teach nothing: then a router closes for good. The gradient is the soft draw's."""
    model, ids = routed_model(NAME).train(), tokens(2, 8)
    drawn = []
    for block in model.model["layers"]:
        for router in (block.self_attn_gate, block.mlp_gate):
            router.register_forward_hook(lambda _, __, found: (found[0].retain_grad(), drawn.append(found[0])) and None)
    logits, trace = model(ids, policy=SkipLayer.policy("batch", 0.5, "all", "dense"))
    logits.pow(2).sum().backward()
    for z in drawn:
        assert 0 < z.sum() < 16
        assert (z.grad[z == 0] != 0).any() and (z.grad[z == 1] != 0).any()
    assert len(drawn) == 6 and all(torch.equal(g, z) for g, z in zip(trace.gates, drawn))
    router, x = Router(GateConfig("scalar"), 3).double(), torch.randn(1, 4, 3, dtype=torch.float64)
    with torch.no_grad():
        router.out.weight.normal_()
        router.out.bias.normal_()
    torch.manual_seed(1)
    given = torch.autograd.grad(router(x)[0].sum(), router.out.weight)[0]
    torch.manual_seed(1)
    noise = -torch.empty(1, 4, 2, dtype=torch.float64).exponential_().log()
    soft = torch.softmax(router.out(x) + noise, -1)[..., 1]
    same(given, torch.autograd.grad(soft.sum(), router.out.weight)[0])


# Test 5: the density.

def test_the_density_loss_by_hand():
    """A mean over branches before the square, padding that counts, a gradient with the wrong sign."""
    valid = padding([4, 2], 4, "right")
    z = [torch.tensor([[1.0, 0, 0, 1], [1, 0, 1, 1]]), torch.tensor([[1.0, 1, 1, 1], [0, 0, 1, 1]])]
    z = [x[..., None].requires_grad_() for x in z]               # densities 3/6 and 4/6
    loss = density_loss(z, valid, "l2", 0.6, None)
    assert loss.item() == pytest.approx(((0.5 - 0.6) ** 2 + (4 / 6 - 0.6) ** 2) / 2)
    loss.backward()
    real = valid[..., None]
    assert (z[0].grad[real] < 0).all() and (z[1].grad[real] > 0).all() and (z[0].grad[~real] == 0).all()
    assert density_loss(z[:1], valid, "l2", 0.5, None).item() == 0.0
    assert density_loss(z[:1], None, "l2", 5 / 8, None).item() == 0.0


def test_a_fresh_router_runs_nearly_all():
    """Even logits drop half of a pretrained model at the first step."""
    torch.manual_seed(0)
    model = SkipLayer(llama(GateConfig("scalar")))
    model.init_weights()
    trace = model.eval()(tokens(2, 8))[1]
    assert all((s - 0.9933).abs().max() < 0.003 for s in trace.scores) and len(trace.scores) == 8


# Test 6: inference.

@torch.no_grad()
def test_inference_is_deterministic_and_causal():
    """Noise that stays at inference, or a later token that changes an earlier one."""
    model, ids = routed_model(NAME), tokens(2, 9)
    policy = policy_of(NAME, model, ids)
    whole, trace = model(ids, policy=policy)
    assert torch.equal(model(ids, policy=policy)[0], whole)
    for n in (1, 4, 8):
        other = ids.clone()
        other[:, n:] = (ids[:, n:] + 7) % 60
        logits, changed = model(other, policy=policy)
        same(logits[:, :n], whole[:, :n])
        same_masks([keep[:, :n] for keep in changed.keep], [keep[:, :n] for keep in trace.keep])
        assert not torch.equal(logits[:, n:], whole[:, n:])
