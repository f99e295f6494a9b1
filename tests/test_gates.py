"""Tests of gates.py: gate, threshold, selection, who may skip, policies, budget, sparsity losses."""
import math
from fractions import Fraction

import numpy as np
import pytest
import torch

import train
from conftest import MAY_SKIP, Synchronisations, distinct, everyone, on_devices, padding, same
from console import InputError
from gates import (GRANULARITIES, Gate, GateConfig, SkipPolicy, budget_at, check_budget, keep_highest, may_skip,
                   quantile_threshold, select_tokens, skippable_share, sparsity_loss)


# The gate.

def test_gate_by_hand():
    """A gate without its sigmoid or bias, or transposed: sigmoid(ln 3) = 3/4, sigmoid(-ln 3) = 1/4, their mean 1/2."""
    gate = Gate(GateConfig(), 2).double()
    gate.out.weight.data = torch.tensor([[1.0, 0.0], [-2.0, 0.0]], dtype=torch.float64)
    gate.out.bias.data = torch.tensor([0.0, math.log(3)], dtype=torch.float64)
    g, scores = gate(torch.tensor([[[math.log(3), 7.0]]], dtype=torch.float64))
    assert g[0, 0].tolist() == pytest.approx([0.75, 0.25], abs=1e-12) and scores.item() == pytest.approx(0.5, abs=1e-12)


@pytest.mark.parametrize("form, arch, shape", [
    ("vector", "linear", (2, 3, 32)), ("scalar", "linear", (2, 3, 1)), ("vector", "mlp", (2, 3, 32)),
    ("scalar", "mlp", (2, 3, 1)), ("vector", "lowrank", (2, 3, 32))])
def test_gate_shapes_and_parameters(form, arch, shape):
    """A scalar gate of width H, a score that is not the mean over channels, or a MAC count that is not its weights."""
    config = GateConfig(form=form, arch=arch)
    gate = Gate(config, 32)
    gate.init_weights(torch.Generator().manual_seed(0))
    g, scores = gate(torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(1)))
    assert g.shape == shape and scores.shape == (2, 3)
    same(scores, g.mean(-1), 1e-7)
    weights = {"linear": 32 * shape[-1], "mlp": 64 * (32 + shape[-1]), "lowrank": 2 * (32 + 32)}[arch]   # rank 32 / 16
    assert config.macs(32) == weights == sum(p.numel() for p in gate.parameters() if p.ndim == 2)


@pytest.mark.parametrize("flags, config", [
    ("--gate vector", GateConfig()), ("--gate scalar --gate-shared --gate-detach", GateConfig(
        "scalar", shared=True, detach=True)), ("--gate vector --gate-arch lowrank --gate-rank 3 --gate-input residual "
                                               "--gate-placement before", GateConfig(
        arch="lowrank", rank=3, input="residual", placement="before"))])
def test_flags_that_ask_for_it(flags, config):
    """A way out that leads to another gate."""
    args = vars(train.parse_args([*flags.split(), "--data", "arithmetic"]))
    made = {name: args["gate" if name == "form" else f"gate_{name}"] for name in vars(config)}
    assert config.flags() == flags and GateConfig(**made) == config


def test_low_rank_defaults():
    """A default rank that makes the gate as dear as the full one, or zero on a tiny model."""
    config = GateConfig(arch="lowrank")
    assert [config.widths(hidden)[0] for hidden in (8, 128, 512, 1024, 2048)] == [1, 8, 32, 16, 16]
    assert GateConfig(arch="lowrank", rank=3).widths(128) == (3, 128)


@pytest.mark.parametrize("settings", [
    dict(arch="lowrank", form="scalar"), dict(form="matrix"), dict(arch="cnn"), dict(input="logits"),
    dict(placement="inside"), dict(arch="lowrank", rank=-1)])
def test_bad_gate_is_refused(settings):
    """A misspelt gate setting that silently becomes another gate."""
    with pytest.raises(InputError) as error:
        GateConfig(**settings)
    assert "\n" not in str(error.value)


def test_gate_never_drops_below_float32():
    """Scores in bfloat16 have steps of 0.004: no ranking is left. The model's bfloat16 must not reach the gate."""
    gate = Gate(GateConfig(), 16)
    gate.init_weights(torch.Generator().manual_seed(0))
    g, scores = gate(torch.randn(2, 3, 16).bfloat16())
    assert g.dtype == scores.dtype == torch.float32
    assert gate.double()(torch.randn(2, 3, 16).bfloat16())[1].dtype == torch.float64


def test_mlp_gate_starts_with_pytorchs_first_layer():
    """First layer drawn with std 0.01 as well: its gates would all be equal and rank nothing."""
    gate = Gate(GateConfig(arch="mlp"), 64)
    gate.init_weights(torch.Generator().manual_seed(0))
    assert gate.inner.weight.abs().max().item() == pytest.approx(1 / 8, rel=0.01)
    assert gate.inner.weight.std().item() == pytest.approx(1 / 8 / 3 ** 0.5, rel=0.03)
    assert gate.inner.bias.abs().max() <= 1 / 8 and gate.inner.bias.std() > 0.05
    assert gate.out.weight.std().item() == pytest.approx(0.01, rel=0.05) and (gate.out.bias == 5).all()
    x = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(1))
    by_hand = torch.sigmoid(torch.relu(x @ gate.inner.weight.T + gate.inner.bias) @ gate.out.weight.T + gate.out.bias)
    same(gate(x)[0], by_hand, 1e-6)


def test_fresh_gate_is_nearly_open():
    """A wrong bias or std: fine-tuning would not start from the pretrained model (sigmoid(5) = 0.9933)."""
    gate = Gate(GateConfig(), 128)
    gate.init_weights(torch.Generator().manual_seed(0))
    assert gate.out.weight.shape == (128, 128) and gate.out.weight.mean().abs() < 3e-4
    assert gate.out.weight.std().item() == pytest.approx(0.01, rel=0.03)
    assert torch.equal(gate.out.bias, torch.full((128,), 5.0))
    g, scores = gate(torch.randn(4, 50, 128, generator=torch.Generator().manual_seed(1)))
    assert scores.mean().item() == pytest.approx(0.9933, abs=2e-4) and g.min() > 0.98


def test_low_rank_gate_starts_like_a_linear_one():
    """A forgotten sqrt(H / r): the low-rank gate would rank tokens by scores of another spread than the paper's."""
    x = torch.randn(1, 400, 256, generator=torch.Generator().manual_seed(1))
    spread = {}
    for arch in ("linear", "lowrank"):
        gate = Gate(GateConfig(arch=arch, rank=16), 256)
        gate.init_weights(torch.Generator().manual_seed(0))
        spread[arch] = torch.logit(gate(x)[0].double()).std(unbiased=False).item()
    assert spread["linear"] == pytest.approx(0.01 * 256 ** 0.5, rel=0.03)
    assert spread["lowrank"] == pytest.approx(spread["linear"], rel=0.08)
    assert gate.inner.weight.std().item() == pytest.approx(256 ** -0.5, rel=0.05)


@pytest.mark.parametrize("config", [
    dict(), dict(form="scalar"), dict(arch="mlp"), dict(arch="lowrank", rank=2)], ids=repr)
def test_detached_gate_learns_alone(config):
    """detach that reaches the gate's parameters as well, or not the gate's input, or that changes what it computes."""
    gates, xs = [Gate(GateConfig(**config, detach=detach), 8) for detach in (False, True)], []
    gates[0].init_weights(torch.Generator().manual_seed(0))
    gates[1].load_state_dict(gates[0].state_dict())
    for gate in gates:
        xs.append(torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(1)).requires_grad_())
        g, scores = gate(xs[-1])
        (g.square().sum() + scores.sum()).backward()
    assert xs[0].grad.any() and xs[1].grad is None
    for a, b in zip(gates[0].parameters(), gates[1].parameters(), strict=True):
        assert a.grad.any() and torch.equal(a.grad, b.grad)


# Algorithm 3.

def test_four_tokens_by_hand():
    """The README's example: pos = 0.5 * 3 = 1.5, tau = 0.64 + 0.5 * (0.70 - 0.64) = 0.67, tokens 1 and 3 stay."""
    scores = torch.tensor([[0.61, 0.70, 0.64, 0.75]], dtype=torch.float64)
    assert quantile_threshold(scores, 0.5).item() == pytest.approx(0.67, abs=1e-12)
    assert select_tokens(scores, 0.5).tolist() == [[False, True, False, True]]
    # another: pos = 0.25 * 3 = 0.75, tau = 0.1 + 0.75 * (0.2 - 0.1) = 0.175: token 0 goes
    scores = torch.tensor([[0.1, 0.2, 0.3, 0.4]], dtype=torch.float64)
    assert quantile_threshold(scores, 0.25).item() == pytest.approx(0.175, abs=1e-12)
    assert select_tokens(scores, 0.75).tolist() == [[False, True, True, True]]
    # beside four rows of padding that nobody masks tau is 0.05: they take the whole budget, and masked none of it
    padded, real = torch.cat([scores, scores.new_full((1, 4), 0.05)], 1), torch.tensor([[True] * 4 + [False] * 4])
    assert quantile_threshold(padded, 0.25).item() == pytest.approx(0.05, abs=1e-12)
    assert select_tokens(padded, 0.75).tolist() == [[True] * 4 + [False] * 4]
    assert quantile_threshold(padded, 0.25, real).item() == pytest.approx(0.175, abs=1e-12)
    assert select_tokens(padded, 0.75, real).tolist() == [[False, True, True, True] + [False] * 4]


@pytest.mark.parametrize("scores, q", [([], 0.5), ([0.1], -0.01), ([0.1], 1.01), ([0.1], math.nan)])
def test_quantile_refuses_nonsense(scores, q):
    """An index error or NaN threshold deep inside a run instead of a clear refusal."""
    with pytest.raises(ValueError):
        quantile_threshold(torch.tensor(scores), q)


def test_position_within_1e_9_of_an_integer_is_that_integer():
    """(1 - 0.8) * 10 and (1 - 0.9) * 10 are not integers in binary: without the rule tau falls short of a score and one
    token too few is skipped, depending on the last bit of the budget."""
    scores = distinct(21)[0]
    ordered = scores.sort().values
    for q in (0.15, 1 - 0.85, 0.15 - 4e-12, 0.15 + 4e-12):
        assert quantile_threshold(scores, q) == ordered[3]
    assert quantile_threshold(scores, 0.15 - 1e-9) < ordered[3] < quantile_threshold(scores, 0.15 + 1e-9)


def random_quantile(rng):
    """(scores, q): length 1 to 500, often with ties, q at the ends or between."""
    scores = rng.random(rng.integers(1, 501))
    if rng.random() < 0.4:
        scores = np.round(scores, rng.integers(0, 3))            # ties, up to all of them equal
    return scores, float(rng.choice([0.0, 1.0, rng.random(), rng.integers(0, 101) / 100]))


def test_quantile_equals_numpy():
    """Any other interpolation, an unsorted list, a step beyond the last score: 10,000 random cases, ties included."""
    rng = np.random.default_rng(0)
    for _ in range(10_000):
        scores, q = random_quantile(rng)
        ours = quantile_threshold(torch.from_numpy(scores), q)
        assert ours.dtype == torch.float64
        assert abs(ours.item() - np.quantile(scores, q, method="linear")) <= 1e-12, (q, scores)


def test_quantile_takes_any_shape_and_float32():
    """A quantile along one dimension only, or arithmetic in float32: between close scores tau would be a step off."""
    rng = np.random.default_rng(2)
    for _ in range(200):
        scores, q = rng.standard_normal((3, 4)).astype(np.float32), rng.random()
        expected = np.quantile(scores.astype(np.float64), q)
        assert abs(quantile_threshold(torch.from_numpy(scores), q).item() - expected) <= 1e-12


@on_devices
def test_quantile_ignores_what_is_not_valid(device):
    """Padding that is ranked, or that counts in n: low, high, infinite or NaN scores there change nothing."""
    rng = np.random.default_rng(1)
    for case in range(1000):
        scores, q = random_quantile(rng)
        valid = rng.random(len(scores)) < rng.random()
        valid[rng.integers(len(scores))] = True
        expected = np.quantile(scores[valid], q, method="linear")
        scores[~valid] = rng.choice([-9.0, 9.0, np.inf, -np.inf, np.nan, 0.5])
        ours = quantile_threshold(torch.tensor(scores, device=device), q, torch.tensor(valid, device=device))
        assert abs(ours.item() - expected) <= 1e-12, (case, q)


# Selection.

@pytest.mark.parametrize("n, budget, skipped", [
    (8, 0.95, 1), (8, 0.85, 2), (8, 0.5, 4), (8, 0.05, 7), (2, 0.99, 1), (2, 0.01, 1), (3, 0.5, 2),
    (21, 0.85, 4), (11, 0.9, 2), (101, 0.95, 6), (100, 0.95, 5), (8, 1.0, 0), (1, 0.5, 0)])
def test_number_skipped_by_hand(n, budget, skipped):
    """An off-by-one in the rule: what is asked is not what is saved (5% of 8 tokens skips 1, 15% skips 2)."""
    assert (~select_tokens(distinct(n), budget)).sum().item() == skipped


def test_ties():
    """Tokens tied at tau are skipped together; where nothing would be left, the tied best stay together."""
    t = lambda *values: torch.tensor([values], dtype=torch.float64)
    keep = select_tokens(t(0.2, 0.2, 0.2, 0.9), 0.75)            # tau 0.2: three for one
    assert keep.tolist() == [[False, False, False, True]]
    keep = select_tokens(t(0.2, 0.9, 0.9, 0.9), 0.5)             # tau 0.9 would take all
    assert keep.tolist() == [[False, True, True, True]]
    assert select_tokens(t(0.9, 0.2, 0.9), 0.1).tolist() == [[True, False, True]]


def test_nothing_skipped_where_there_is_nothing_to_rank():
    """The printed rule drops the lowest token at budget 1, a single stream's only token, and all of equal scores."""
    assert select_tokens(distinct(9), 1.0).all()
    for budget in (1e-6, 0.3, 0.999, 1.0):
        assert select_tokens(torch.tensor([[0.4]]), budget).all()
        assert select_tokens(torch.full((3, 5), 0.4), budget).all()
        valid = torch.tensor([[True, False, True]])              # the padding scores highest
        assert torch.equal(select_tokens(torch.tensor([[0.4, 0.9, 0.4]]), budget, valid), valid)


def test_keep_highest_is_exact_and_stable():
    """Ties that make it keep more or fewer than count, later ones kept before earlier ones, or padding kept."""
    ranking = torch.tensor([[0.5, 0.9, 0.5], [0.5, 0.1, 0.9]])
    keep = keep_highest(ranking, 3, torch.ones(2, 3, dtype=torch.bool))
    assert keep.tolist() == [[True, True, False], [False, False, True]]
    valid = torch.tensor([[False, True, True], [True, True, False]])
    assert keep_highest(ranking, 2, valid).tolist() == [[False, True, True], [False, False, False]]
    assert keep_highest(ranking, 0, valid).sum() == 0 and torch.equal(keep_highest(ranking, 9, valid), valid)


@pytest.mark.parametrize("budget", [math.nan, 0, 0.0, -0.1, 1.0001, 15, math.inf])
def test_bad_budget_is_refused(budget):
    """--budget 15 (meant as percent) or NaN going through as "keep all" or "skip all"."""
    for use in (check_budget, lambda b: SkipPolicy("batch", b), lambda b: select_tokens(distinct(4), b)):
        with pytest.raises(InputError) as error:
            use(budget)
        assert "\n" not in str(error.value)


def test_number_skipped_is_exact():
    """Rounding of 1 - budget: skips exactly floor((1 - b)(n - 1)) + 1, the lowest, for every b in percent and n."""
    for n in [*range(2, 22), 41, 61, 101]:
        scores = distinct(n, n)
        for percent in range(1, 100, 2 if n > 21 else 4):
            keep, skip = select_tokens(scores, percent / 100), math.floor(Fraction(100 - percent, 100) * (n - 1)) + 1
            assert (~keep).sum().item() == skip, (n, percent)
            assert scores[~keep].max() < scores[keep].min()


@on_devices
def test_padding_is_neither_ranked_nor_counted(device):
    """Padding soaking up the budget (it skips for free and the real tokens all stay), or being kept."""
    rng = torch.Generator().manual_seed(0)
    for case in range(50):
        valid = (torch.rand(3, 12, generator=rng) < 0.6).index_fill(1, torch.tensor([0]), True)
        real = torch.rand(int(valid.sum()), generator=rng)
        scores = torch.full((3, 12), (-1.0, 2.0, math.inf, -math.inf, math.nan)[case % 5]).masked_scatter(valid, real)
        keep = select_tokens(scores.to(device), 0.7, valid.to(device)).cpu()
        assert not (keep & ~valid).any()
        assert torch.equal(keep[valid], select_tokens(real[None], 0.7)[0])
    nobody = torch.zeros_like(valid, device=device)              # no valid token at all
    assert not select_tokens(scores.to(device), 0.7, nobody).any()


# Who may skip, and who decides.

def test_who_may_skip():
    """A granularity that asks the wrong branches: MLPs in "attn", layer 0 in "alternate", the MLPs of "layer"."""
    assert set(MAY_SKIP) == set(GRANULARITIES)
    for skip, expected in MAY_SKIP.items():
        assert [may_skip(skip, branch) for branch in range(8)] == expected, skip


def test_skippable_share():
    """A share that counts the branches asked ("layer": its MLPs follow), or rounds up an odd number of layers."""
    shares = {"all": 1, "layer": 1, "attn": 0.5, "mlp": 0.5, "alternate": 0.5}
    assert {skip: skippable_share(skip, 4) for skip in GRANULARITIES} == shares
    assert [skippable_share("alternate", layers) for layers in (1, 2, 3, 5)] == [0, 1 / 2, 1 / 3, 0.4]
    for skip in GRANULARITIES:
        for layers in range(1, 9):
            acted_on = sum(may_skip(skip, branch) for branch in range(2 * layers)) * (2 if skip == "layer" else 1)
            assert skippable_share(skip, layers) == acted_on / (2 * layers), (skip, layers)


def test_given_and_none():
    """A recorded mask applied to another branch, or one that keeps padding alive."""
    masks = [torch.tensor([[True, False, True]]), torch.tensor([[False, True, True]])]
    valid = torch.tensor([[True, True, False]])
    policy = SkipPolicy("given", masks=masks)
    assert policy.keep(0, None, valid).tolist() == [[True, False, False]]
    assert policy.keep(1, None, valid).tolist() == [[False, True, False]]
    assert torch.equal(SkipPolicy("none", 0.5).keep(0, torch.rand(1, 3), valid), valid)


@pytest.mark.parametrize("settings", [
    dict(kind="quantile"), dict(skip="heads"), dict(kv="copy"), dict(kind="batch", budget=0.0)])
def test_bad_policy_is_refused(settings):
    """A misspelt policy that silently keeps everything and reports 0% skipped."""
    with pytest.raises(InputError):
        SkipPolicy(**settings)


@pytest.mark.parametrize("kind", ["batch", "frozen", "topk"])
def test_ranking_without_gates_is_refused(kind):
    """A traceback about None for whoever skips on a model that has no gates."""
    with pytest.raises(InputError):
        SkipPolicy(kind, 0.5, thresholds=[0.5]).keep(0, None, everyone(3))


@pytest.mark.parametrize("skip", GRANULARITIES)
def test_granularity(skip):
    """A granularity that lets layer 0 skip in "alternate", or MLPs in "attn"; or a copy of valid where nobody may skip,
    for which every row would be gathered."""
    valid = everyone(4)
    for policy in (SkipPolicy("batch", 0.5, skip), SkipPolicy("random", 0.5, skip), SkipPolicy("topk", 0.5, skip),
                   SkipPolicy("frozen", 0.5, skip, thresholds=[0.5] * 8),
                   SkipPolicy("given", 1.0, skip, masks=[distinct(4) > 0.5] * 8)):
        masks = [policy.keep(branch, distinct(4), valid) for branch in range(8)]
        assert [bool((~keep).any()) for keep in masks] == MAY_SKIP[skip], policy.kind
        assert [keep is not valid for keep in masks] == MAY_SKIP[skip], policy.kind
    for kind in ("batch", "random", "topk", "frozen", "none"):
        policy = SkipPolicy(kind, 1.0 if kind != "none" else 0.5, skip)
        assert all(policy.keep(branch, distinct(4), valid) is valid for branch in range(8))


def test_topk_keeps_exactly_the_ceiling():
    """ceil(0.07 * 100) is 8 in binary where 7 is meant; or a count that includes padding."""
    for n in (1, 2, 7, 50, 100):
        scores = distinct(n)
        for percent in range(1, 100, 1 if n == 100 else 7):
            keep = SkipPolicy("topk", percent / 100).keep(0, scores, everyone(n))
            assert keep.sum() == math.ceil(Fraction(percent, 100) * n), (n, percent)
            assert keep.all() or scores[keep].min() > scores[~keep].max()
    valid = torch.tensor([[True, True, False, False]])
    keep = SkipPolicy("topk", 0.5).keep(0, torch.tensor([[0.1, 0.2, 0.8, 0.9]]), valid)
    assert keep.tolist() == [[False, True, False, False]]


def test_frozen_compares_in_float64():
    """tau rounded to float32 falls onto a score that it was put just beside."""
    low = torch.tensor([[0.7]])
    high = torch.nextafter(low, torch.tensor(1.0))
    tau = (low.double() + high.double()).item() / 2
    policy = SkipPolicy("frozen", 0.5, thresholds=[tau])
    assert policy.keep(0, high, everyone(1)).item() and not policy.keep(0, low, everyone(1)).item()


def test_random_is_seeded_and_differs_between_branches():
    """One mask for all branches (whole tokens dropped: another baseline), or draws from torch's global generator."""
    def draw(seed):
        policy = SkipPolicy("random", 0.5, generator=torch.Generator().manual_seed(seed))
        return [policy.keep(branch, None, everyone(40)) for branch in range(6)]
    before = torch.get_rng_state()
    a, b, c = draw(1), draw(1), draw(2)
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(x, y) for x, y in zip(a, b)) and not all(torch.equal(x, y) for x, y in zip(a, c))
    assert len({tuple(x[0].tolist()) for x in a}) == 6


def test_random_never_keeps_padding():
    """A baseline that spends its kept tokens on padding."""
    valid, policy = padding([2, 9, 5], 9), SkipPolicy("random", 0.5, generator=torch.Generator().manual_seed(0))
    for branch in range(50):
        keep = policy.keep(branch, None, valid)
        assert not (keep & ~valid).any() and keep.sum() == 8


@pytest.mark.parametrize("n", [1, 2, 7, 40])
def test_random_skips_the_share_asked_for(n):
    """A baseline that saves less than it says: at n = 1, rounding (1 - b) n would never skip. Exact in the mean, every
    call within one of it, every token equally often, and never anything that is not valid."""
    valid = torch.zeros(2, 30, dtype=torch.bool).index_fill(1, torch.arange(30 - (n + 1) // 2, 30), True)
    valid[1, -1] = n % 2 == 0
    assert valid.sum() == n
    policy, draws = SkipPolicy("random", 0.85, generator=torch.Generator().manual_seed(5)), 3000
    skipped = torch.stack([valid & ~policy.keep(i % 4, None, valid) for i in range(draws)])             # (draws, 2, 30)
    counts = skipped.sum((1, 2))
    assert counts.min() >= math.floor(0.15 * n) and counts.max() <= math.ceil(0.15 * n)
    assert counts.double().mean().item() == pytest.approx(0.15 * n, abs=4 * 0.5 / draws ** 0.5)
    each = skipped.double().mean(0)[valid]
    assert (each - 0.15).abs().max() < 4.5 * (0.15 * 0.85 / draws) ** 0.5


@on_devices
def test_frozen_is_causal_and_the_same_in_any_batch(device):
    """A threshold that looks at other tokens: a prompt's would depend on what comes later, or on batch mates."""
    scores = torch.rand(5, 20, generator=torch.Generator().manual_seed(0)).to(device)
    valid = padding([20, 3, 11, 1, 8], 20, device=device)
    policy = SkipPolicy("frozen", 0.5, thresholds=[0.9, 0.4])
    keep = policy.keep(1, scores, valid)
    assert torch.equal(keep, valid & (scores > 0.4))
    for row in range(5):
        for end in range(1, 21):
            part = slice(row, row + 1), slice(end)
            assert torch.equal(policy.keep(1, scores[part], valid[part]), keep[part])


@pytest.mark.parametrize("kind", ["batch", "frozen", "random", "topk", "given", "none"])
def test_decisions_stay_on_the_device(kind):
    """A 0-d index tensor or an .item() in a decision: a GPU would stop 2L times a call, masked and in training too."""
    valid, scores = padding([9, 4], 9), torch.rand(2, 9)
    policy = SkipPolicy(kind, 0.6, thresholds=[0.5], masks=[valid], generator=torch.Generator().manual_seed(0))
    with Synchronisations() as host:
        policy.keep(0, scores, valid)
    assert not host.seen


# Budget.

def test_one_step_and_defaults():
    """Division by zero at a single step, or defaults other than Algorithm 1's 100% to 80%."""
    assert budget_at(0, 1) == 0.8
    assert budget_at(0, 11) == 1.0 and budget_at(5, 11) == pytest.approx(0.9) and budget_at(10, 11) == 0.8


@pytest.mark.parametrize("total", [2, 3, 7, 1000, 15493])
@pytest.mark.parametrize("start, end", [(1.0, 0.8), (0.95, 0.7), (1.0, 0.3), (0.9, 0.9)])
def test_linear_budget_is_exact_at_both_ends(total, start, end):
    """t / T for (t - 1) / (T - 1): the last step would never reach the end, or 1.0 be 0.9999 and skip at the first."""
    budgets = [budget_at(step, total, start, end) for step in range(total)]
    assert budgets[0] == start and budgets[-1] == end
    assert all(a >= b for a, b in zip(budgets, budgets[1:]))
    assert budgets[total // 2] == pytest.approx(start - (start - end) * (total // 2) / (total - 1), abs=1e-12)


def test_uniform_budget():
    """Every fourth step exactly start, else spread over [end, start], from (seed, step) alone: a resumed run must draw
    what the unbroken one would have drawn."""
    draw = lambda step, seed=3: budget_at(step, 1000, 1.0, 0.7, "uniform", seed)
    forward = [draw(step) for step in range(1000)]
    assert [draw(step) for step in reversed(range(1000))] == forward[::-1]
    assert all(forward[step] == 1.0 for step in range(0, 1000, 4))
    rest = [b for step, b in enumerate(forward) if step % 4]
    assert all(0.7 <= b <= 1.0 for b in rest) and len(set(rest)) == len(rest)
    assert sum(rest) / len(rest) == pytest.approx(0.85, abs=0.015) and min(rest) < 0.71 and max(rest) > 0.99
    assert rest != [b for step in range(1000) if step % 4 for b in [draw(step, 4)]]


# Sparsity loss.

def test_kl_is_zero_at_its_budget_and_l2_is_the_default():
    """KL with its arguments swapped, or another default than the authors' g^2."""
    gates = [torch.full((2, 3, 4), 0.8, dtype=torch.float64)] * 2
    assert sparsity_loss(gates, None, "kl", 0.8).item() == pytest.approx(0, abs=1e-12)
    assert sparsity_loss(gates).item() == pytest.approx(0.64, abs=1e-12)
    halved, by_hand = [g * 0.5 for g in gates], 2 * (0.4 * math.log(0.5) + 0.6 * math.log(3))
    assert sparsity_loss(halved, None, "kl", 0.8).item() == pytest.approx(by_hand, abs=1e-12)
    with pytest.raises(InputError):
        sparsity_loss(gates, None, "l3")


@pytest.fixture
def three_gates():
    """Three branches' gates, one of them scalar, and a valid mask with padding in it."""
    rng = torch.Generator().manual_seed(0)
    return [torch.rand(2, 5, width, generator=rng, dtype=torch.float64) for width in (6, 6, 1)], padding([5, 2], 5)


def by_numpy(gates, valid, kind, budget):
    real = [g.numpy()[valid.numpy()] for g in gates]             # (tokens, width) each
    if kind == "l2":
        return np.mean([(g ** 2).mean() for g in real])
    if kind == "l1":
        return np.mean([np.abs(g).mean() for g in real])
    if kind == "l2_norm":
        return np.mean([(np.linalg.norm(g, axis=0) / np.sqrt(len(g))).mean() for g in real])
    m, b = np.array([g.mean() for g in real]), np.clip(budget, 0.01, 0.99)
    return (m * np.log(m / b) + (1 - m) * np.log((1 - m) / (1 - b))).sum()


@pytest.mark.parametrize("budget", [0.8, 1.0, 0.001])
@pytest.mark.parametrize("kind", ["l2", "l1", "l2_norm", "kl"])
def test_sparsity_loss_by_numpy(three_gates, kind, budget):
    """Padding counted in the mean, a sum for a mean over branches, or KL's b = 1 giving infinity."""
    gates, valid = three_gates
    for real, argument in ((valid, valid), (torch.ones_like(valid), None)):
        expected = by_numpy(gates, real, kind, budget)
        assert sparsity_loss(gates, argument, kind, budget).item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("kind", ["l2", "l1", "l2_norm", "kl"])
def test_sparsity_gradient_stays_out_of_padding(three_gates, kind):
    """A loss that trains the gates on padding, or that a NaN there destroys; and one whose scale grows with length."""
    gates, valid = three_gates
    spoilt = [g.masked_fill(~valid[..., None], math.nan).requires_grad_() for g in gates]
    loss = sparsity_loss(spoilt, valid, kind, 0.8)
    loss.backward()
    assert torch.isfinite(loss)
    for g in spoilt:
        assert (g.grad[~valid] == 0).all() and (g.grad[valid] != 0).all()
    twice = [torch.cat([g, g], dim=1) for g in gates]
    same(sparsity_loss(twice, torch.cat([valid, valid], dim=1), kind, 0.8), loss.detach(), 1e-12)


def test_losses_stay_on_the_device():
    """A loss that stops the GPU at every step."""
    valid, gates = padding([9, 4], 9), [torch.rand(2, 9, 1) for _ in range(8)]
    with Synchronisations() as host:
        for kind in ("l2", "l1", "l2_norm", "kl"):
            sparsity_loss(gates, valid, kind, 0.8)
    assert not host.seen
