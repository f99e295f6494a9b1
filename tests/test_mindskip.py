"""Tests of paper/mindskip.py: one decision per layer and sequence, routers that learn alone, the token-level row."""
import pytest
import torch

from conftest import families, llama, new_cache, padding, same, tokens
from gates import GateConfig, SkipPolicy
from generate import generate
from load_weights import load_model
from routed_models import backbone, dense_like, policy_of, routed_model, train_toy
from toy_runs import folder, same_bits

import mindskip
import mixture_of_depths
from mindskip import MindSkip, Router, mean_loss
from routed import HALF

NAME = "mindskip"


def at(tau, layers=3):
    return SkipPolicy("frozen", 0.5, "attn", thresholds=[tau] * (2 * layers))


# Test 1: only routers learn.

def test_the_backbone_stays_bit_for_bit(folder, tmp_path):
    """A backbone that moves, or routers that do not."""
    torch.manual_seed(0)
    assert train_toy(NAME, folder, tmp_path / "run", lr=0.1) == 0
    model = mindskip.open_model(tmp_path / "run")
    same_bits(backbone(model), dict(load_model(folder).state_dict()))
    own = [key for key, _ in model.named_parameters() if "_gate." in key]
    assert own == [f"model.layers.{layer}.self_attn_gate.out.weight" for layer in (0, 1)]
    assert all(model.get_parameter(key).abs().max() > 0 for key in own)


def test_the_token_level_row_is_mixture_of_depths_on_a_frozen_backbone(folder, tmp_path):
    """Flags that train the backbone, or that train nothing."""
    assert train_toy("mixture_of_depths", folder, tmp_path / "run", *mindskip.TOKEN_FLAGS.split()) == 0
    model = mixture_of_depths.open_model(tmp_path / "run")
    same_bits(backbone(model), dict(load_model(folder).state_dict()))
    moved = [(p - 5).abs().max() > 0 for key, p in model.named_parameters() if key.endswith("self_attn_gate.out.bias")]
    assert all(moved) and len(moved) == 2


# Tests 2 and 3: the ends.

@families
@torch.no_grad()
def test_a_threshold_of_0_is_the_dense_model_and_above_1_attention_is_gone(family):
    """A factor that stays at inference; an MLP that is routed; K and V of a layer that is not there, seen."""
    model, ids, valid = routed_model(NAME, family), tokens(3, 8), padding([8, 3, 5], 8)
    dense = dense_like(model, family)
    same(model(ids, valid=valid, policy=at(0.0))[0][valid], dense(ids, valid=valid)[0][valid])
    for block in dense.model["layers"]:
        block.self_attn.o_proj.weight.zero_()
    logits, trace = model(ids, valid=valid, policy=at(1.5))
    same(logits[valid], dense(ids, valid=valid)[0][valid])
    assert [keep.sum().item() for keep in trace.keep] == [0, 16] * 3


# Test 4: forward 0 or 1, backward the identity.

def test_straight_through():
    """A soft factor, a threshold that lets no gradient through, or a mean that counts padding; p by hand."""
    router = Router(GateConfig("scalar"), 4).double()
    with torch.no_grad():
        router.out.weight.copy_(torch.tensor([[0.5, -1.0, 2.0, 0.25]]))
    x = torch.randn(3, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    valid = padding([5, 2, 3], 5)
    x[~valid] = 1e6
    z, p = router(x, valid)
    want = torch.stack([1 / (1 + torch.exp(-router.out.weight[0] @ x[b, 5 - n:].mean(0)))
                        for b, n in enumerate([5, 2, 3])])       # (B,)
    same(p, want[:, None].expand(3, 5))
    assert z.shape == (3, 5, 1) and torch.equal(z[..., 0], (want >= 0.5).double()[:, None].expand(3, 5))
    assert 0 < z[:, 0].sum() < 3
    wanted = torch.autograd.grad(want.sum(), router.out.weight)[0]
    same(torch.autograd.grad(z[:, 0].sum(), router.out.weight)[0], wanted)       # dz/dp = 1
    assert torch.equal(router.eval()(x, valid)[0], torch.ones(3, 5, 1, dtype=torch.float64))


def test_z_multiplies_attention_in_training():
    """A loss that z does not enter: h + z A(norm(h)), and the MLP for all."""
    model, ids = routed_model(NAME).train(), tokens(4, 7)
    logits, trace = model(ids, policy=MindSkip.policy("batch", 0.5, "attn", "copy_up"))
    z = [g.detach().bool() for g in trace.gates[0::2]]           # (B, S, 1)
    assert 0 < sum(x[:, 0].sum().item() for x in z) < 12
    keep = [m for x in z for m in (x[..., 0], torch.ones(4, 7, dtype=torch.bool))]
    same(logits, model.eval()(ids, policy=SkipPolicy("given", skip="attn", masks=keep))[0])


def test_the_loss_is_the_mean_of_z():
    """MLP branches that count, or a gradient with the wrong sign: less attention is less loss."""
    z = torch.tensor([[1.0], [0.0], [1.0]], requires_grad=True)
    gate, always = z[:, None].expand(3, 5, 1), torch.ones(3, 5, 1)
    loss = mean_loss([gate, always, torch.zeros(3, 5, 1), always], torch.ones(3, 5, dtype=torch.bool), "l2", 0.5, None)
    assert loss.item() == pytest.approx(1 / 3)
    loss.backward()
    assert torch.allclose(z.grad, torch.full((3, 1), 1 / 6))


# Test 5: the prompt decides.

@torch.no_grad()
def test_a_decision_holds_for_a_generation():
    """A decision taken anew for each token, or by a token alone; and what the prompt decided is by its own mean."""
    model, seen = routed_model(NAME), []
    prompts = [list(map(int, tokens(1, n, seed=n)[0])) for n in (6, 3, 9)]
    policy = policy_of(NAME, model, tokens(3, 9))
    generate(model, prompts, 6, policy, on_pass=seen.append)
    first = torch.stack(seen[0].keep)[:, :, -1:]                 # (2L, B, 1), the last column is a real token
    assert 0 < (~first[0::2]).sum() < 9 and first[1::2].all() and len(seen) == 6
    for trace in seen:
        assert torch.equal(torch.stack(trace.keep), first & trace.valid)
    for b, prompt in enumerate(prompts):
        alone = model(torch.tensor([prompt]), policy=policy)[1]
        assert torch.equal(torch.stack(alone.keep)[:, 0, -1], first[:, b, 0])


@torch.no_grad()
def test_a_single_token_after_the_prompt_is_not_asked():
    """A router that runs in every step for nothing, or is not paid: H a layer and sequence, once."""
    model, ids, asked = routed_model(NAME), tokens(2, 6), []
    for block in model.model["layers"]:
        block.self_attn_gate.register_forward_pre_hook(lambda *_: asked.append(1))
    cache = new_cache(model, 2, 8)
    _, trace = model(ids, cache=cache, policy=at(0.5))
    assert len(asked) == 3 and trace.more_macs == 2 * 3 * model.config.hidden_size
    _, trace = model(ids[:, :1], cache=cache, policy=at(0.5))
    assert len(asked) == 3 and trace.more_macs == 0


# Test 6 and thresholds.

@torch.no_grad()
def test_a_fresh_router_leaves_all_on():
    """w = 0 gives p = 0.5, and that is on: in training and at inference."""
    torch.manual_seed(0)
    model = MindSkip(llama(GateConfig("scalar"), num_hidden_layers=3))
    model.init_weights()
    ids = tokens(2, 6)
    trace = model.train()(ids)[1]
    assert all((g == 1).all() for g in trace.gates) and all((s == 0.5).all() for s in trace.scores[0::2])
    assert torch.stack(model.eval()(ids, policy=at(HALF))[1].keep).all()
    assert not torch.stack(model(ids, policy=at(0.5))[1].keep[0::2]).any()


@torch.no_grad()
def test_the_calibration_pool_is_every_prompt_in_every_layer():
    """Scores of padding, or of one layer; each prompt alone gives the same."""
    model, prompts = routed_model(NAME), [list(map(int, tokens(1, n, seed=n)[0])) for n in (6, 3, 9, 5)]
    want = [s[0, 0] for prompt in prompts for s in model(torch.tensor([prompt]))[1].scores[0::2]]
    pool = mindskip.scores_of(model, prompts)
    assert pool.shape == (12,)
    same(pool.sort().values, torch.stack(want).sort().values)


@torch.no_grad()
def test_one_threshold_for_all_layers():
    """A threshold per layer would drop a layer for some sequences each, and never one for all; the lower, the fewer."""
    model = routed_model(NAME)
    model.config.gateskip = dict(skip="attn", kv="copy_up")
    items = [(list(map(int, tokens(1, n, seed=n)[0])), [False] * (n - 1) + [True]) for n in (6, 4, 9, 5)]
    found = mindskip.policies(model, items, [1.0, 0.7, 0.4])
    assert found[1.0].kind == "none" and all(len(set(found[b].thresholds)) == 1 for b in (0.7, 0.4))
    assert found[0.7].thresholds[0] < found[0.4].thresholds[0]
