"""Tests of price.py: one threshold for the whole model."""
import numpy as np
import pytest
import torch

from conftest import build, llama, on_devices
from price import RunningQuantile
from savings import branch_costs


@on_devices
def test_running_quantile_is_numpys_weighted_quantile(device):
    """Padding or branches that may not skip in the pool, branches that all weigh the same, a point off by one."""
    rng = np.random.default_rng(0)
    for costs in ([1.0, 1.0], [0.5, 1.5, 0.0, 2.0]):
        scores, valid = rng.normal(size=(len(costs), 70)), rng.random(70) < 0.8
        running = RunningQuantile(costs)
        running.update(torch.tensor(scores, device=device), torch.tensor(valid, device=device))
        work = np.broadcast_to(np.array(costs)[:, None], scores.shape)[:, valid]
        pool, weights = scores[:, valid][work > 0], work[work > 0]
        wanted = [np.quantile(pool, q, weights=weights, method="inverted_cdf") for q in np.linspace(0, 1, 101)]
        assert np.abs(running.points.cpu().numpy() - wanted).max() < 1e-12
        assert running.points.device.type == torch.device(device).type


def test_running_quantile_averages_over_steps_and_is_a_line_between_its_points():
    """The newest step alone, an average that forgets as fast as it learns, a threshold of the next point."""
    running = RunningQuantile([1.0])
    for step, scale in enumerate((1.0, 2.0)):
        running.update(scale * torch.linspace(0, 1, 101)[None], torch.ones(101, dtype=torch.bool))
    assert float(running.at(1.0)) == pytest.approx(0.9 * 1.0 + 0.1 * 2.0) and float(running.at(0.0)) == 0.0
    for q in (0.3, 0.305, 0.999):
        assert float(running.at(q)) == pytest.approx(1.1 * q, abs=0.011), q
    assert float(running.at(0.305)) == pytest.approx(float(running.at(0.30) + running.at(0.31)) / 2)
    again = RunningQuantile([1.0], running.points)
    assert torch.equal(again.at(0.7), running.at(0.7))


def test_policy_of_a_step_is_one_price():
    """A price of its own for each branch; nothing kept, or everything skipped, before anything was measured."""
    running, scores = RunningQuantile([1.0, 1.0]), torch.rand(2, 50, generator=torch.Generator().manual_seed(0))
    assert running.policy(0.5, "all", "copy_up").kind == "none"
    running.update(scores, torch.ones(50, dtype=torch.bool))
    policy, valid = running.policy(0.6, "all", "copy_up"), torch.ones(1, 50, dtype=torch.bool)
    kept = [policy.keep(b, scores[b][None], valid).sum() for b in (0, 1)]
    assert policy.thresholds[0] is policy.thresholds[1] and sum(kept) == 60
    assert running.policy(1.0, "all", "dense").keep(0, scores[:1], valid) is valid


def test_costs_by_hand():
    """Keys and values left out, a mean other than 1, work of branches that nobody may skip; "layer" without its MLP."""
    config = llama()
    H, kv = config.hidden_size, config.num_key_value_heads * config.head_dim
    attention = 2 * H * (config.num_attention_heads * config.head_dim + kv)
    mlp, layers = 3 * H * config.intermediate_size, config.num_hidden_layers
    costs = branch_costs(config)
    assert len(costs) == 2 * layers and sum(costs) == pytest.approx(2 * layers)
    assert costs[0] / costs[1] == pytest.approx(attention / mlp) and costs[:2] * layers == costs
    assert branch_costs(config, "attn") == [c * (b % 2 == 0) for b, c in enumerate(costs)]
    assert branch_costs(config, "alternate") == [c * (b // 2 % 2) for b, c in enumerate(costs)]
    assert branch_costs(config, "layer") == pytest.approx([costs[0] + costs[1], 0.0] * layers)


@pytest.mark.parametrize("skip", ["all", "attn", "mlp", "layer", "alternate"])
def test_the_budget_is_the_share_of_work_that_runs(skip):
    """A share of pairs for a share of work; a price that branches which may not skip have a say in."""
    model, ids = build(llama()), torch.randint(0, 50, (4, 16), generator=torch.Generator().manual_seed(1))
    costs, valid = branch_costs(model.config, skip), torch.ones(1, 64, dtype=torch.bool)
    running, scores = RunningQuantile(costs), torch.stack(model(ids)[1].scores).flatten(1)       # (2L, N)
    running.update(scores, valid[0])
    policy = running.policy(0.7, skip, "copy_up")
    runs = [cost * policy.keep(b, scores[b][None], valid).double().mean() for b, cost in enumerate(costs)]
    assert abs(float(sum(runs)) / sum(costs) - 0.7) < 0.03


def test_a_sum_that_rounds_past_the_last_score(monkeypatch):
    """A GPU adds in another order: shares past the last entry with work, and infinity as the largest price for good."""
    exact = torch.Tensor.cumsum
    monkeypatch.setattr(torch.Tensor, "cumsum", lambda x, dim: exact(x, dim) * torch.linspace(1, 1 + 1e-9, len(x),
                                                                                              dtype=torch.float64))
    quantile = RunningQuantile([1.0, 0.0])                       # the second branch never skips: no work
    quantile.update(torch.tensor([[0.2, 0.4, 0.6, 0.9], [0.3, 0.3, 0.3, 0.3]]), torch.tensor([True, True, True, False]))
    assert quantile.at(1.0) == pytest.approx(0.6) and quantile.points.isfinite().all()
