"""Tests of the exercises of lesson/: their checks against solutions, stubs and mistakes of students; what the screen
says."""
import ast
import functools
import inspect
import itertools
import math
import os
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from conftest import build, given, llama, same, tokens
from gates import GateConfig, quantile_threshold
from lesson import exercises
from lesson.cases import CHECKS
from lesson.checks import verdict
from lesson.test_exercises import load
from savings import SHAPES, count_macs

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "lesson"))
import solutions


def defined(module):
    return [name for name, f in vars(module).items() if inspect.isfunction(f) and f.__module__ == module.__name__]


# Right, and not done.

def test_every_exercise_has_a_check_and_a_solution():
    """An exercise that nothing checks, or a solution under another name or with other parameters."""
    assert list(CHECKS) == defined(exercises) == defined(solutions)[:len(CHECKS)] and len(CHECKS) >= 10
    for name in CHECKS:
        asked, solved = (list(inspect.signature(getattr(m, name)).parameters) for m in (exercises, solutions))
        assert asked == solved == list(inspect.signature(CHECKS[name].right).parameters)[:len(asked)], name


@pytest.mark.parametrize("name", CHECKS)
def test_a_solution_is_right_and_a_stub_is_not_done(name):
    """A check that refuses what is right, or that takes a stub for a mistake."""
    assert verdict(name, getattr(solutions, name)) == "right"
    assert verdict(name, getattr(exercises, name)) == "not done yet"


@pytest.mark.parametrize("name", CHECKS)
def test_float32_is_no_mistake(name):
    """A check that asks for more digits than a student's float32 has."""
    def narrow(*arguments):
        made = getattr(solutions, name)(*arguments)
        less = lambda x: x.float() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        return tuple(map(less, made)) if isinstance(made, tuple) else less(made)
    assert verdict(name, narrow) == "right"


@pytest.mark.parametrize("name", CHECKS)
def test_a_docstring_suffices(name):
    """An exercise without its source, or one whose arguments the docstring does not speak of."""
    text = getattr(exercises, name).__doc__
    assert re.search(r"\b(eq\. \d|lines? \d|section\b|ours\b)", text, re.IGNORECASE), name
    if name != "mlp_macs":                                       # it says "the same"
        assert all(re.search(rf"\b{p}\b", text) for p in inspect.signature(getattr(exercises, name)).parameters), name


def test_the_stubs_have_no_body():
    """A solution left behind in what students are handed. (In your own copy it fails once you have begun.)"""
    for node in ast.parse((ROOT / "lesson" / "exercises.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef):
            assert [type(part) for part in node.body] == [ast.Expr, ast.Raise], node.name


# The solutions are the project's own answer: where the checks themselves are written by hand, against the real thing.

def test_copies_are_those_of_the_real_cache():
    """A rule of the exercise that is not the model's: the layer named must be the one whose K lies in the cache."""
    model, ids = build(llama()), tokens(1, 12)
    masks = [torch.rand(1, 12, generator=torch.Generator().manual_seed(b)) > 0.5 for b in range(8)]
    h, call = model.begin(ids, policy=given(masks), compact=True)
    below, layers = None, []
    for block in model.model["layers"]:
        h, below, _, _ = block(h, below, model.gates_of(block), call)
        layers.append(below[0][0])                               # (S, Hkv, D)
    source = solutions.kv_source(torch.cat(masks[::2]))
    assert 0 < (source != torch.arange(4)[:, None]).sum() < 36
    for layer, token in itertools.product(range(4), range(12)):
        equal = [bool((layers[other][token] == layers[layer][token]).all()) for other in range(layer + 1)]
        assert equal.index(True) == source[layer, token]


@pytest.mark.parametrize("form", ["vector", "scalar", None])
def test_macs_are_those_of_the_project(form):
    """Work that the exercise counts and savings.py does not: layer 1 of Llama-3.2-1B, one token of each sequence."""
    config, gate = SHAPES["llama-3.2-1b"], form and GateConfig(form)
    keep = torch.ones(2 * config.num_hidden_layers, 10, 1, dtype=torch.bool)
    count = lambda keep: count_macs(config, keep, keep[0] | True, keys=300, logit_rows=0, gate=gate)
    gate_width = {"vector": 2048, "scalar": 1, None: 0}[form]
    per_gate = 10 * 2048 * gate_width
    for branch, macs in ((2, solutions.attention_macs(2048, 32, 8, 64, 300, 10, 7, gate_width)),
                         (3, solutions.mlp_macs(2048, 8192, 10, 7, gate_width))):
        some, none = keep.clone(), keep.clone()
        some[branch, 7:], none[branch] = False, False
        assert int(count(some) - count(none)) + per_gate == macs


def test_speculation_leaves_the_large_model_its_distribution():
    """A rule that is accepted here and makes another text: over all u and draws the token must come with p."""
    p, q = torch.tensor([0.5, 0.2, 0.3, 0.0]).double(), torch.tensor([0.1, 0.4, 0.3, 0.2]).double()
    us = torch.arange(0.0, 1.0, 1 / 400, dtype=torch.float64)
    made = torch.zeros(4, dtype=torch.float64)
    for token in range(4):
        accepted = sum(solutions.accept_draft(p, q, token, u)[0] for u in us.tolist()) / len(us)
        made[token] += q[token] * accepted
        made += q[token] * (1 - accepted) * solutions.accept_draft(p, q, token, 0.5)[1]
    same(made, p, 1e-3)


# Mistakes, as students write them: (exercise, what they are told, what they wrote).

def per_token_gate(x, weight, bias):
    g = torch.stack([torch.sigmoid(weight.T @ row + bias) for row in x])
    return g, g.mean(1)


def no_bias(x, weight, bias):
    g = 1 / (1 + torch.exp(-F.linear(x, weight)))
    return g, g.sum(1) / g.shape[1]


def mean_of_tokens(x, weight, bias):
    g = torch.sigmoid(F.linear(x, weight, bias))
    return g, g.sum(0) / len(g)


def lower_neighbour(v, q):
    return sorted(v.tolist())[int(q * (len(v) - 1))]


def runs_off_the_end(v, q):
    s = sorted(v.tolist())
    i = int(q * (len(s) - 1))
    alpha = q * (len(s) - 1) - i
    return s[i] * (1 - alpha) + s[i + 1] * alpha


def wrong_way(v, q):
    s = sorted(v.tolist(), reverse=True)
    i = int(q * (len(s) - 1))
    alpha = q * (len(s) - 1) - i
    return s[i] + alpha * (s[min(i + 1, len(s) - 1)] - s[i])


def selector(compare=torch.gt, at_one=True, fallback=True, pool=lambda s, v: s[v], by=quantile_threshold):
    def choose(scores, budget, valid):
        if not valid.any() or at_one and budget == 1:
            return valid
        keep = compare(scores, by(pool(scores, valid), 1 - budget)) & valid
        return keep if keep.any() or not fallback else (scores == scores[valid].max()) & valid
    return choose


def top_rounded(scores, budget, valid):
    best = torch.where(valid, scores, -1).flatten().topk(round(budget * int(valid.sum()))).indices
    return torch.zeros(valid.numel(), dtype=torch.bool).scatter(0, best, True).view_as(valid)


def torchs_quantile(v, q):
    return torch.quantile(v, q)


def adds_in_place(h, g, o, keep):
    h[keep] += (g * o)[keep]
    return h


def cache_of_zero(keep):
    cache = [torch.full((keep.shape[1],), layer) for layer in range(len(keep))]
    for layer in range(len(keep)):
        cache[layer] = torch.where(keep[layer], cache[layer], cache[layer - 1])
    return torch.stack(cache)


def one_down(keep):
    return torch.tensor([[layer if kept else max(layer - 1, 0) for kept in row]
                         for layer, row in enumerate(keep.tolist())])


def along_the_tokens(keep):
    return torch.where(keep, torch.arange(len(keep))[:, None], 0).cummax(-1).values


def own(keep):
    return torch.tensor([[layer] * keep.shape[1] for layer in range(len(keep))])


def kl_by_torch(gates, valid, budget):
    m = gates[:, valid].mean((1, 2)).clamp(1e-6, 1 - 1e-6)
    b = torch.full_like(m, min(max(budget, 0.01), 0.99))
    log = lambda p: torch.stack([p, 1 - p]).log()
    return F.kl_div(log(m), log(b), reduction="sum", log_target=True)         # torch's first argument is the second


def kl_mean(gates, valid, budget):
    m, b = gates[:, valid].mean((1, 2)).clamp(1e-6, 1 - 1e-6), min(max(budget, 0.01), 0.99)
    return sum(x * math.log(x / b) + (1 - x) * math.log((1 - x) / (1 - b)) for x in m.tolist()) / len(m)


def kl_unclamped(gates, valid, budget):
    m = gates[:, valid].mean((1, 2)).clamp(1e-6, 1 - 1e-6)
    return (m * torch.log(m / budget) + (1 - m) * torch.log((1 - m) / (1 - budget))).sum()


def kl_barely_clamped(gates, valid, budget):
    return kl_unclamped(gates, valid, min(max(budget, 1e-6), 1 - 1e-6))


def macs(hidden, heads, kv_heads, head_dim, keys, tokens, kept, gate, edit):
    work = dict(qo=2 * hidden * heads * head_dim, kv=2 * hidden * kv_heads * head_dim, look=2 * heads * head_dim * keys)
    return kept * sum({**work, **edit}.values()) + tokens * hidden * gate


def freezer(below=torch.max, above=torch.min, tie=1e-6, margin=1e-4, low_first=lambda low, high: low <= high,
            low_counts=torch.le):
    def cut(scores, q):
        tau = quantile_threshold(scores, q)
        tied = [x for x in scores.tolist() if abs(x - tau) <= tie] or [tau]
        under, over = scores[scores < min(tied)], scores[scores > max(tied)]
        if tied == [tau] and tau not in scores:
            return (under.max() + over.min()) / 2
        low = (below(under) + min(tied)) / 2 if len(under) else min(tied) - margin
        high = (above(over) + max(tied)) / 2 if len(over) else max(tied) + margin
        off_low, off_high = (abs(share.double().mean() - q) for share in (low_counts(scores, low), scores <= high))
        return low if low_first(off_low, off_high) else high
    return cut


def always_low(scores, q):
    s, tau = sorted(scores.tolist()), float(quantile_threshold(scores, q))
    tied = [x for x in s if abs(x - tau) <= 1e-6] or [x for x in s if x > tau]
    below = [x for x in s if x < min(tied[0], tau)]
    return (below[-1] + tied[0]) / 2 if below else tied[0] - 1e-4


def counted(old, scores, costs, valid, points, weigh=True, first=None, keep_old=0.9):
    pairs = sorted((float(x), float(c) if weigh else 1.0) for row, c in zip(scores, costs) for x, ok in zip(row, valid)
                   if ok and c > 0)
    total, new = sum(w for _, w in pairs), []
    for k in range(points):
        so_far = 0.0
        for x, w in pairs:
            so_far += w
            if so_far >= k / (points - 1) * total:
                break
        new.append(x)
    new = torch.tensor(new, dtype=torch.float64)
    return (new if first is None else first * new) if old is None else keep_old * old + (1 - keep_old) * new


def unsorted(old, scores, costs, valid, points):
    s, weight = scores[:, valid][costs > 0].flatten(), costs[costs > 0].repeat_interleave(int(valid.sum())).cumsum(0)
    wanted = torch.linspace(0, 1, points, dtype=torch.float64) * weight[-1]
    new = s.sort().values[torch.searchsorted(weight, wanted).clamp(max=len(s) - 1)]
    return new if old is None else 0.9 * old + 0.1 * new


def with_padding(old, scores, costs, valid, points):
    return solutions.update_quantile(old, scores, costs, torch.ones_like(valid), points)


def drafter(accept, rest):
    def step(p, q, token, u):
        left = rest(p, q)
        return bool(accept(p[token].item(), q[token].item(), u)), left / left.sum() if left.any() else p
    return step


fair, over = (lambda p, q, u: u < min(1, p / q)), (lambda p, q: torch.relu(p - q))

WRONG = [
    ("gate_and_score", "W_G transposed", per_token_gate), ("gate_and_score", "the bias b_G is missing", no_bias),
    ("gate_and_score", "a mean over the tokens", mean_of_tokens),
    ("quantile_threshold", "s[i] alone", lower_neighbour),
    ("quantile_threshold", "s[i+1] asked for where there is none", runs_off_the_end),
    ("quantile_threshold", "sorted with the largest first", wrong_way),
    ("select_tokens", "`<` in place of `<=`", selector(torch.ge)),
    ("select_tokens", "no exception at budget 1", selector(at_one=False)),
    ("select_tokens", "nobody left", selector(fallback=False)),
    ("select_tokens", "the rule as printed", selector(at_one=False, fallback=False)),
    ("select_tokens", "padding ranked with the valid tokens", selector(pool=lambda s, v: s)),
    ("select_tokens", "counted and rounded: eq. 6", top_rounded),
    ("select_tokens", "left at 1.9999999999999996", selector(by=torchs_quantile)),
    ("gated_residual", "0 * NaN is NaN", lambda h, g, o, keep: h + (g * o) * keep[:, None].double()),
    ("gated_residual", "h lost where the token skips", lambda h, g, o, keep: torch.where(
        keep.unsqueeze(1), h + g * o, torch.zeros_like(h))),
    ("gated_residual", "no gate", lambda h, g, o, keep: torch.where(keep.unsqueeze(1), h + o, h)),
    ("gated_residual", "changes its arguments", adds_in_place),
    ("gated_residual", "raised RuntimeError", lambda h, g, o, keep: torch.where(keep, h + g * o, h)),
    ("kv_source", "which is the last layer", cache_of_zero),
    ("kv_source", "one layer down only", one_down), ("kv_source", "no copy", own),
    ("kv_source", "copied along the tokens", along_the_tokens),
    ("budget_at", "t / T", lambda step, total, start, end: start + (end - start) * (step + 1) / total),
    ("budget_at", "the last step is total - 1", lambda step, total, start, end: start + (end - start) * step / total),
    ("budget_at", "one step alone has budget end", lambda step, total, start, end: (
        start + (end - start) * step / (total - 1))),
    ("sparsity_l1", "padding counted: only", lambda gates, valid: torch.mean(torch.abs(gates))),
    ("sparsity_l1", "a sum over the branches", lambda gates, valid: sum(g[valid].mean() for g in gates)),
    ("sparsity_l2", "padding counted as zeros", lambda gates, valid: torch.mean((gates * valid[None, :, None]) ** 2)),
    ("sparsity_l2", "the mean squared", lambda gates, valid: torch.square(gates[:, valid].mean())),
    ("sparsity_l2_norm", "no division by sqrt(n)", lambda gates, valid: torch.linalg.vector_norm(
        gates[:, valid], dim=1).mean()),
    ("sparsity_l2_norm", "a norm over the channels", lambda gates, valid: torch.linalg.vector_norm(
        gates[:, valid], dim=-1).mean() / gates.shape[-1] ** 0.5),
    ("sparsity_l2_norm", "divide by the square root of the number", lambda gates, valid: (
        (gates * valid[:, None]).norm(dim=1) / len(valid) ** 0.5).mean()),
    ("sparsity_kl", "m_l comes first", kl_by_torch), ("sparsity_kl", "a mean over the branches", kl_mean),
    ("sparsity_kl", "budget 1 as it is", kl_unclamped), ("sparsity_kl", "it is [0.01, 0.99]", kl_barely_clamped),
    ("attention_macs", "a gate for kept tokens only", lambda hidden, heads, kv_heads, head_dim, keys, tokens, kept,
        gate: kept * (2 * head_dim * (hidden * (heads + kv_heads) + heads * keys) + hidden * gate)),
    ("attention_macs", "as many key-value heads as heads", lambda hidden, heads, kv_heads, head_dim, keys, tokens, kept,
        gate: kept * head_dim * heads * (4 * hidden + 2 * keys) + tokens * hidden * gate),
    ("attention_macs", "K and V made by skipped tokens too", lambda hidden, heads, kv_heads, head_dim, keys, tokens,
        kept, gate: 2 * head_dim * (kept * heads * (hidden + keys) + tokens * hidden * kv_heads)
        + tokens * hidden * gate),
    ("attention_macs", "W_k or W_v forgotten", lambda *a: macs(*a, dict(kv=a[0] * a[2] * a[3]))),
    ("attention_macs", "W_q and W_o of hidden x hidden", lambda *a: macs(*a, dict(qo=2 * a[0] * a[0]))),
    ("attention_macs", "hidden numbers for each key", lambda *a: macs(*a, dict(look=2 * a[0] * a[4]))),
    ("attention_macs", "head_dim forgotten", lambda *a: macs(*a, dict(look=2 * a[1] * a[4]))),
    ("mlp_macs", "two matrices", lambda hidden, inner, tokens, kept, gate: (
        kept * 2 * hidden * inner + tokens * hidden * gate)),
    ("mlp_macs", "all tokens run the branch", lambda hidden, inner, tokens, kept, gate: (
        tokens * hidden * (3 * inner + gate))),
    ("frozen_threshold", "it may lie on a score", torchs_quantile), ("frozen_threshold", "always low", always_low),
    ("frozen_threshold", "the next smaller", freezer(below=torch.min)),
    ("frozen_threshold", "the next larger", freezer(above=torch.max)),
    ("frozen_threshold", "those within 1e-6 are", freezer(tie=1e-4)),
    ("frozen_threshold", "low then", freezer(low_first=lambda low, high: low < high)),
    ("frozen_threshold", "the share above low", freezer(low_counts=torch.gt)),
    ("frozen_threshold", "1e-6 beyond the ends", freezer(margin=1e-6)),
    ("update_quantile", "each weighs the cost of its branch", lambda *a: counted(*a, weigh=False)),
    ("update_quantile", "weights left unsorted", unsorted),
    ("update_quantile", "padding among the scores", with_padding),
    ("update_quantile", "it is 0.9 * old", lambda *a: counted(*a, keep_old=0.1)),
    ("update_quantile", "in the first step", lambda *a: counted(*a, first=0.1)),
    ("accept_draft", "q / p: it is p / q", drafter(lambda p, q, u: u < (q / p if p else math.inf), over)),
    ("accept_draft", "what must never come", drafter(lambda p, q, u: u <= p / q, over)),
    ("accept_draft", "rest = p", drafter(fair, lambda p, q: p)),
    ("accept_draft", "0 / 0 where p equals q", lambda p, q, token, u: (u < p[token] / q[token], over(p, q)
                                                                        / over(p, q).sum())),
]


@pytest.mark.parametrize("name, told, function", WRONG, ids=[f"{name}: {told}" for name, told, _ in WRONG])
def test_a_wrong_solution_is_caught_and_its_mistake_named(name, told, function):
    """A check that a plausible mistake passes, or that calls it something else."""
    said = verdict(name, function)
    assert said.startswith("wrong: for ") and told in said and "\n" not in said and len(said) < 800, said


def test_every_exercise_has_wrong_solutions():
    """A check that nothing has tried to get past."""
    assert {name: sum(name == wrong for wrong, _, _ in WRONG) >= 2 for name in CHECKS} == dict.fromkeys(CHECKS, True)


@pytest.mark.parametrize("name, like", [(name, like) for name in CHECKS for like in CHECKS[name].mistakes])
def test_every_mistake_that_is_known_is_named(name, like):
    """A mistake in the list that no input shows, or that another one always hides."""
    mistake = CHECKS[name].mistakes[like]
    assert f"looks like {like}" in verdict(name, lambda *arguments: mistake(*arguments))


def test_what_is_not_known_gets_the_inputs_note():
    """A made-up likeness, or no help at all."""
    said = verdict("budget_at", lambda *_: 1.0)
    assert said == ("wrong: for step=10, total=11, start=1, end=0.8: expected 0.8, got 1; note: the last step")


# Whatever a student's function does.

class Odd:
    """An object that breaks at every touch."""
    def __repr__(self):
        raise RuntimeError

    __eq__ = __len__ = __float__ = __bool__ = __repr__


class Speechless(Exception):
    __str__ = Odd.__repr__


def thrower(error):
    def function(*_):
        raise error
    return function


def endless(*arguments):
    return endless(*arguments)


ODD = [math.nan, math.inf, -math.inf, 10 ** 400, 1j, "0.67", b"", [], [[1.0], 2.0], (), (1,), (None, None), {}, Odd(),
       Odd, (Odd(), Odd()), torch.tensor([]), torch.tensor(math.nan), torch.zeros(3, 0, 2), torch.tensor(1j),
       torch.full((40, 40), math.inf), torch.zeros(2, 2, device="meta"), torch.eye(2).to_sparse(), torch.tensor(True),
       (torch.zeros(3, device="meta"),) * 2, torch.ones(3, requires_grad=True), NotImplementedError()]


@pytest.mark.parametrize("name", ["budget_at", "gated_residual", "accept_draft"])        # a number, a tensor, a pair
def test_whatever_comes_back_is_one_line(name):
    """A check that itself falls over a wrong type, a wrong shape, infinity, or an object that breaks."""
    for value in ODD:
        said = verdict(name, lambda *_, value=value: value)
        assert said.startswith(("wrong: for ", "not done yet")) and "\n" not in said and len(said) < 1000, said


@pytest.mark.parametrize("name", CHECKS)
def test_whatever_is_raised_is_one_line(name):
    """A traceback, or a second error while the first is told."""
    for function in (thrower(ValueError("a\nb")), thrower(Speechless()), thrower(SystemExit(3)), endless, lambda: 1,
                     thrower(NotImplementedError("no kernel")), lambda *_: undefined):           # noqa: F821
        said = verdict(name, function)
        assert said.startswith("wrong: for ") and "raised" in said and "\n" not in said and len(said) < 1000, said
    assert verdict(name, None) == verdict(name, 3) == f"wrong: the file has no function {name}"


def test_an_exception_has_its_line_and_none_has_its_hint():
    """A traceback in place of a line, or an exception without the place where it happened."""
    line = thrower.__code__.co_firstlineno + 2
    assert f"raised KeyError: 'x' (line {line} of the file)" in verdict("budget_at", thrower(KeyError("x")))
    assert "got None (no `return`?)" in verdict("budget_at", lambda *_: None)
    assert "got None (no `return`?)" in verdict("accept_draft", lambda *_: None)
    assert "expected 2 values, got a number" in verdict("accept_draft", lambda *_: 1.0)
    assert "expected a tensor of shape (1,), got a tensor of shape (2,)" in verdict("gate_and_score", mean_of_tokens)
    assert "expected a bool tensor of shape (1, 4), got a tensor of shape (1, 4)" in verdict(
        "select_tokens", lambda *a: solutions.select_tokens(*a).double())


def test_an_exercise_that_waits_for_another_says_so():
    """`not done yet` of a function that is done, but calls one that is not."""
    said = verdict("select_tokens", lambda s, b, v: v & (s > exercises.quantile_threshold(s[v], 1 - b)))
    assert said == "not done yet: it calls quantile_threshold, which is not done"


def test_a_wrong_helper_is_named():
    """A student who looks for the mistake in select_tokens, and it is in the function that it calls."""
    def using(helper):
        return types.FunctionType(solutions.select_tokens.__code__, {**vars(solutions), "quantile_threshold": helper})
    assert verdict("select_tokens", using(quantile_threshold)) == "right"
    said = verdict("select_tokens", using(lambda v, q: v.mean()))
    assert said.startswith("wrong: for ") and said.endswith(" (your quantile_threshold is wrong too: mend that first)")
    cached = functools.cache(using(lambda v, q: v.mean()))                    # a function without a function's parts
    assert verdict("select_tokens", cached).endswith("mend that first)")
    assert "mend" not in verdict("select_tokens", selector(torch.ge))         # that calls the right one


def test_numbers_may_come_in_any_type():
    """What the text allows and a check refuses."""
    assert verdict("mlp_macs", lambda *a: float(solutions.mlp_macs(*a))) == "right"
    assert verdict("kv_source", lambda keep: solutions.kv_source(keep).double()) == "right"


# The screen.

def screen(*arguments, cwd):
    """(exit code, lines) of pytest in a folder, as a student sees them."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments], cwd=cwd, text=True,
                          env=environment, capture_output=True)
    assert done.stderr == ""
    return done.returncode, done.stdout.splitlines()


def test_the_screen_says_one_line_per_exercise(tmp_path):
    """Headers, dots and tracebacks in which a student must search; an exit code of 0 although not all is right."""
    folder = tmp_path / "lesson"
    folder.mkdir()
    for name in ("__init__", "conftest", "test_exercises", "checks", "cases", "exercises"):
        shutil.copy(ROOT / "lesson" / f"{name}.py", folder)
    done, wrong = ["quantile_threshold", "select_tokens", "mlp_macs"], "gated_residual"
    code = [inspect.getsource(getattr(solutions, name)) for name in done + [wrong]]
    code = "\n\n".join(code).replace("h + g * o", "print('hello') or h + o")
    (folder / "exercises.py").write_text(f"{(folder / 'exercises.py').read_text()}\n\n{code}")
    code, lines = screen(cwd=folder)
    assert code == 1 and len(lines) == len(CHECKS) + 1 and lines.pop() == f"{len(done)} of {len(CHECKS)} right"
    for name, line in zip(CHECKS, lines):
        if name == wrong:
            assert re.fullmatch(f"{name} +wrong: for h=.*: expected .*, got .*; looks like no gate: .*", line), line
        else:
            assert line == f"{name:<18}  {'right' if name in done else 'not done yet'}"


def test_an_endless_loop_is_named_when_it_is_interrupted(tmp_path):
    """Ctrl-C, and a line that says anything but which exercise was running."""
    folder = tmp_path / "lesson"
    shutil.copytree(ROOT / "lesson", folder, ignore=shutil.ignore_patterns("__pycache__", "test_bugs.py"))
    with open(folder / "exercises.py", "a") as file:
        file.write("\n\ndef quantile_threshold(v, q):\n    raise KeyboardInterrupt\n")
    code, lines = screen(cwd=folder)
    assert code == 2 and lines == ["gate_and_score      not done yet", "interrupted in quantile_threshold"]


def test_it_runs_beside_the_projects_tests():
    """Two files named conftest.py of which one hides the other, or a report that silences other tests."""
    code, lines = screen("-q", "tests/test_price.py", "lesson/test_exercises.py", "-k", "by_hand or mlp_macs", cwd=ROOT)
    assert code == 1 and re.match(r"1 failed, [1-9]\d* passed", lines[-1]), lines[-1]


def test_a_file_that_cannot_be_run_is_told_in_one_line(tmp_path):
    """A syntax error that ends in pytest's own traceback, or a line number of the wrong file."""
    file = tmp_path / "exercises.py"
    for text, told in (("import torch\ndef f(x):\n    return (\n", "line 3: SyntaxError: '(' was never closed"),
                       ("import torch\n\nx = torch.zeros(2) @ torch.zeros(3)\n", "line 3: RuntimeError: "),
                       ("import sys\nsys.exit('no')", "line 2: SystemExit: no")):
        file.write_text(text)
        assert load(file).startswith(f"cannot be run: exercises.py, {told}")
    file.write_text("def f():\n    return g()\n\n\ndef g():\n    return 3\n")
    assert load(file)["f"]() == 3
