"""Tests of paper/speculative.py and paper/against_plain.py: same texts, same distribution, an exact cache, counts."""
import json
import shutil
import sys
from functools import partial
from itertools import product
from types import SimpleNamespace

import pytest
import torch

from conftest import VOCAB, build, complaint, families, frozen, llama, mixed, new_cache, same, tokens
from data import encode_prompt
from gates import GateConfig, SkipPolicy
from generate import generate
from load_weights import load_model, load_tokenizer, save_model
from problems import arithmetic
from savings import Savings, macs_of
from thresholds import calibrate, make_policy
from toy_runs import ROOT, TINY, toy, words

sys.path.insert(0, str(ROOT / "paper"))
import against_plain
import score
import speculative
from speculative import accept, draft_steps, probabilities, speculate, verify_pass

PROMPT, NEW = tokens(1, 9)[0].tolist(), 14
PROMPTS = [encode_prompt(load_tokenizer(TINY), problem.question) for problem in arithmetic(3, "test")]


def gated(family=llama, skip="all", kv="copy_up", share=0.35, **changes):
    """(a random model in float64, a frozen policy that skips about this share); tied, it would repeat itself."""
    model = build(family(tie_word_embeddings=False, **changes))
    ids = tokens(3, 20, seed=1) % model.config.vocab_size
    return model, frozen(model, ids, share=share, skip=skip, kv=kv)


def greedy(model, prompt, n, eos_ids=()):
    """The oracle: a forward pass over the whole text for each new token, nobody skips."""
    text = list(prompt)
    while len(text) < len(prompt) + n and not (len(text) > len(prompt) and text[-1] in eos_ids):
        text.append(model(torch.tensor([text]))[0][0, -1].argmax().item())
    return text[len(prompt):]


def run(model, policy, gamma, prompt=PROMPT, n=NEW, eos_ids=(), draft=None, **sampling):
    passes = []
    draft = draft or partial(draft_steps, model, policy, passes, eos_ids, **sampling)
    return speculate(model, prompt, n, gamma, draft, partial(verify_pass, model, passes), eos_ids, **sampling), passes


# 1 to 4 of the specification: greedy.

@families
@pytest.mark.parametrize("skip, kv, share", [("all", "copy_up", 0.3), ("all", "dense", 0.3), ("layer", "dense", 0.15)])
def test_greedy_text_is_that_of_the_full_budget(family, skip, kv, share):
    """(1) K or V of skipped states that a later pass reads, a verifier that skips, a place off by one, a text longer
    than asked. Drafts that always agree, or never, would show none of it."""
    model, policy = gated(family, skip, kv, share)
    wanted, stood, drafted = greedy(model, PROMPT, NEW), 0, 0
    assert len(set(wanted)) > NEW / 2
    for gamma, n in ((1, NEW), (2, NEW), (3, 1), (3, 2), (3, 9), (5, NEW)):
        found = run(model, policy, gamma, n=n)[0]
        assert found.tokens == wanted[:n]
        stood, drafted = stood + found.accepted, drafted + found.drafted
    assert 0.1 < stood / drafted < 0.95


def test_the_full_budget_agrees_with_itself():
    """(2) A draft at budget 1 that falls, or a round that gives fewer than gamma + 1 tokens."""
    model, _ = gated()
    for gamma in (1, 3, 6):
        found = run(model, SkipPolicy(), gamma, n=1 + 2 * (gamma + 1))[0]
        assert (found.rounds, found.drafted, found.accepted) == (2, 2 * gamma, 2 * gamma)
        assert len(found.tokens) == 1 + 2 * (gamma + 1)


def test_garbage_costs_rounds_and_no_tokens():
    """(3) A draft that is believed; a round without a token; garbage left in the cache."""
    model, _ = gated()
    noise, wanted = torch.Generator().manual_seed(0), greedy(model, PROMPT, NEW)

    def garbage(cache, token, n):
        for stored in cache.k + cache.v:
            stored[:, :, cache.used:].normal_(generator=noise)
        cache.used += n
        return torch.randint(VOCAB, (n,), generator=noise).tolist(), None
    found = run(model, None, 4, draft=garbage)[0]
    assert found.tokens == wanted and found.rounds == NEW - 1 - found.accepted > 0
    never = next(x for x in range(VOCAB) if x not in wanted)
    found = run(model, None, 3, draft=lambda cache, token, n: ([never] * n, None))[0]
    assert found.tokens == wanted and (found.rounds, found.accepted) == (NEW - 1, 0)


@families
def test_the_cache_is_that_of_a_prefill(family):
    """(4) K or V of a draft or of a token that fell, and a length that does not say so, after any round."""
    model, policy = gated(family)
    text = PROMPT + greedy(model, PROMPT, NEW)

    def draft(cache, token, n):
        """Looks at what the rounds before have left, then drafts."""
        fresh, length = new_cache(model, 1, cache.used), cache.used
        model(torch.tensor([text[:length]]), cache=fresh)
        assert (cache.uniform, cache.lengths.tolist(), token) == (True, [length], text[length])
        for a, b in zip(cache.k + cache.v, fresh.k + fresh.v):
            same(a[:, :, :length], b, 1e-10)
        lengths.append(length)
        return draft_steps(model, policy, [], (), cache, token, n)
    lengths = []
    found = run(model, policy, 3, draft=draft)[0]
    assert 0 < found.accepted < found.drafted and len(lengths) == found.rounds and lengths[0] == len(PROMPT)


def test_an_end_token_ends_the_text_wherever_it_comes():
    """An end token in the middle of an accepted draft that the text runs over; drafts behind it; one in the prompt."""
    model, _ = gated()
    text = greedy(model, PROMPT, NEW)
    for at, gamma in product((0, 1, 2, 3, 5, 10), (2, 5)):
        wanted, ends = text[:text.index(text[at]) + 1], {text[at], PROMPT[0]}
        found, passes = run(model, SkipPolicy(), gamma, n=NEW + 10, eos_ids=ends)
        steps = sum(part == "draft" for part, _ in passes)
        assert found.tokens == wanted == greedy(model, PROMPT, NEW + 10, ends)
        assert found.drafted == steps == sum((i - 1) % (gamma + 1) < gamma for i in range(1, len(wanted)))
        beyond = lambda cache, token, n: (text[cache.used - len(PROMPT) + 1:][:n], None)         # runs over it itself
        assert run(model, None, gamma, eos_ids=ends, draft=beyond)[0].tokens == wanted


# 5: sampling.

def chi_square(counts, p):
    """Of observed counts against probabilities, both flat."""
    wanted = sum(counts) * torch.tensor(p, dtype=torch.float64)
    assert wanted.min() > 5
    return ((torch.tensor(counts, dtype=torch.float64) - wanted) ** 2 / wanted).sum().item()


def test_each_token_is_distributed_as_the_verifier_says():
    """(5) Three tokens, drafts of two from a very different q: a token that falls redrawn from p, a residual of the
    wrong place, p and q the other way round, the last token drawn from q, rows off by one."""
    logits = torch.tensor([[0.0, 1.0, 2.0], [2.0, 0.5, 0.0], [0.0, 2.0, 1.0]], dtype=torch.float64)
    p, q = probabilities(logits, 2.0), torch.tensor([[0.6, 0.3, 0.1], [0.1, 0.2, 0.7]], dtype=torch.float64)
    noise, counts, stood = torch.Generator().manual_seed(1), torch.zeros(3, 3, dtype=torch.long), 0
    for _ in range(2500):
        draft = torch.multinomial(q, 1, generator=noise)[:, 0].tolist()
        a, token = accept(draft, q, logits, 2.0, noise)
        for place, x in enumerate([*draft[:a], token]):
            counts[place, x] += 1
        stood += a > 0
    for place in range(3):
        assert chi_square(counts[place].tolist(), p[place].tolist()) < 18.4      # 2 degrees: 1 in 10,000
    assert abs(stood / 2500 - torch.minimum(p[0], q[0]).sum()) < 0.03


def test_sampled_texts_are_distributed_as_the_verifier_says():
    """(5) The loop around it: a token of the draft in the verifier's place, a next token that is forgotten or comes
    twice. All texts of four tokens in a vocabulary of three, of which each depends on the one before."""
    model, heat = build(llama(num_hidden_layers=1)), 1.5
    full, low = torch.randn(2, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    p, texts = probabilities(full, heat), [*product(range(3), repeat=4)]
    wanted = [p[1, a] * p[a, b] * p[b, c] * p[c, d] for a, b, c, d in texts]
    noise, counts, drafted, accepted = torch.Generator().manual_seed(2), dict.fromkeys(texts, 0), 0, 0

    def draft(cache, token, n):
        ids, q = [token], probabilities(low, heat)
        for _ in range(n):
            ids.append(torch.multinomial(q[ids[-1]], 1, generator=noise).item())
        return ids[1:], q[ids[:-1]]

    def verify(cache, ids):
        cache.used += len(ids)
        return full[ids]
    for _ in range(1500):
        found = speculate(model, [0, 1], 4, 2, draft, verify, temperature=heat, generator=noise)
        counts[tuple(found.tokens)] += 1
        drafted, accepted = drafted + found.drafted, accepted + found.accepted
    rare = [i for i, x in enumerate(wanted) if x * 1500 < 8]     # counted as one
    often = [i for i in range(81) if i not in rare]
    pool = lambda x: [x[i] for i in often] + [sum(x[i] for i in rare)]
    assert len(often) > 40 and 0.3 < accepted / drafted < 0.8
    assert chi_square(pool([counts[text] for text in texts]), pool(wanted)) < len(often) + 4 * (2 * len(often)) ** 0.5


@families
def test_the_draft_says_what_it_was_drawn_from(family):
    """(5) q of another temperature, of the full budget, or of the place behind; K and V where verified ones lie."""
    model, policy = gated(family)
    cache, fresh, noise = new_cache(model, 1, 40), new_cache(model, 1, 40), torch.Generator().manual_seed(0)
    for one in (cache, fresh):
        model(torch.tensor([PROMPT]), cache=one)
    draft, q = draft_steps(model, policy, [], (), cache, 5, 6, 1.5, noise)
    logits, trace = model(torch.tensor([[5, *draft[:-1]]]), cache=fresh, policy=policy)          # all at once
    mixed(trace.keep, trace.valid)
    same(q, (logits[0] / 1.5).softmax(-1), 1e-10)
    assert draft == [torch.multinomial(row, 1, generator=noise).item()
                     for noise in [torch.Generator().manual_seed(0)] for row in q]
    for a, b in zip(cache.k + cache.v, fresh.k + fresh.v):
        same(a, b, 1e-10)


def test_a_draft_of_the_verifier_itself_stands():
    """q = p that falls now and then; nothing left to draw from where both differ by a rounding error; temperature 0 of
    a quotient that overflows; a seed that says nothing."""
    logits = torch.randn(4, 7, generator=torch.Generator().manual_seed(0))
    p = probabilities(logits, 1.0)
    for seed in range(50):
        noise = torch.Generator().manual_seed(seed)
        draft = torch.multinomial(p[:3], 1, generator=noise)[:, 0].tolist()
        state = noise.get_state()
        assert accept(draft, p[:3], logits, 1.0, noise)[0] == 3
        assert accept(draft, p[:3], logits, 1.0, noise.set_state(state)) == accept(
            draft, p[:3], logits, 1.0, noise.set_state(state))
    with pytest.MonkeyPatch.context() as m:
        m.setattr(torch, "rand", lambda shape, dtype, **_: torch.ones(shape, dtype=dtype))       # u < 1 in truth
        assert accept([2, 2, 2], p[:3], logits, 1.0)[0] == 0
    best = logits.argmax(-1).tolist()
    for temperature in (0.0, 1e-5):
        assert accept(best[:3], None, logits, temperature) == (3, best[3])
        assert accept([best[0], (best[1] + 1) % 7, best[2]], None, logits, temperature) == (1, best[1])
        assert accept([], None, logits[:1], temperature) == (0, best[0])


# 6: scores of given texts.

def test_scores_of_given_texts_are_not_touched():
    """(6) Something left behind in the model; a pass over a draft whose logits are of other places."""
    model, policy = gated()
    rest = tokens(1, 5, seed=3)[0].tolist()
    ask = lambda: score.log_likelihoods(model, SkipPolicy(), [[(PROMPT, rest)]], 1, Savings(model.config))[0][0][0]
    before, passes = ask(), []

    def verify(cache, ids):
        passes.append((ids, verify_pass(model, [], cache, ids)))
        return passes[-1][1]
    speculate(model, PROMPT, NEW, 4, lambda cache, token, n: (rest[1:][:n], None), verify)       # drafts a given text
    assert ask() == before
    run(model, policy, 3)
    assert ask() == before
    ids, logits = passes[1]
    whole = model(torch.tensor([PROMPT + ids]))[0][0, len(PROMPT):]
    same(logits, whole, 1e-10)
    assert ids[1:] == rest[1:]


# What is counted and compared.

def test_work_is_that_of_the_rounds(monkeypatch):
    """The prefill counted, or a draft for nothing; fewer multiply-accumulates than plain decoding, which cannot be."""
    model, policy = gated()
    _, plain_macs, _ = against_plain.plain(model, PROMPT, NEW, ())
    traces, forward = [], type(model).forward

    def spy(self, *args, **kwargs):
        logits, trace = forward(self, *args, **kwargs)
        traces.append(trace)
        return logits, trace
    monkeypatch.setattr(type(model), "forward", spy)
    for gamma in (1, 4):
        traces.clear()
        found, macs = speculative.one(model, policy, gamma, NEW, (), PROMPT)
        assert len(traces) == 1 + found.drafted + found.rounds
        assert macs == sum(macs_of(model.config, trace).item() for trace in traces[1:]) > plain_macs
        drafts = [trace.keep for trace in traces[1:] if trace.logit_rows == 1 and not torch.stack(trace.keep).all()]
        assert len(drafts) > 3
        mixed([torch.cat(branch, 1) for branch in zip(*drafts)], torch.ones(1, len(drafts), dtype=torch.bool))


def test_plain_leaves_the_prefill_out(monkeypatch):
    """The first token's time or work in what a token costs; the work of an answer that is an end token alone."""
    model, _ = gated()
    monkeypatch.setattr(against_plain, "perf_counter", iter([100, 104, 109, 7]).__next__)
    work = generate(model, [PROMPT], 3).savings.report()["answer"]["macs"]
    wanted = greedy(model, PROMPT, 3)
    assert against_plain.plain(model, PROMPT, 3, ()) == (wanted, work, 9)
    assert against_plain.plain(model, PROMPT, 3, {wanted[0]}) == (wanted[:1], 0, 0)


def test_ratios_are_of_medians_and_all_take_turns(monkeypatch, capsys):
    """A mean of ratios, one upside down, tokens of the prefill in them; one way after the other; texts that differ."""
    turns, texts = [], {"a": [1, 2, 3, 4, 5], "b": [1, 2, 3]}                                    # 4 and 2 tokens, timed
    seconds = {"plain": iter([4, 2, 7, 2, 1, 2]), "way": iter([(1, 1), (2, 2), (5, 2), (0, 2), (1, 1), (1, 1)])}

    def plain(model, prompt, new_tokens, eos_ids, sampling):
        turns.append(("plain", prompt, new_tokens, eos_ids))
        return texts[prompt], 60, next(seconds["plain"])

    def once(prompt):
        turns.append(("way", prompt))
        drafting, verifying = next(seconds["way"])
        text = texts[prompt] if prompt == "a" else [1, 2, 9]
        return SimpleNamespace(tokens=text, rounds=2, drafted=4, accepted=1, drafting=drafting, verifying=verifying), 90
    monkeypatch.setattr(against_plain, "plain", plain)
    row, = against_plain.compare(None, {("half", 2): once}, ["a", "b"], 5, {7}, 3)
    assert turns == 3 * [("plain", "a", 5, {7}), ("way", "a"), ("plain", "b", 5, {7}), ("way", "b")]
    # plain 6, 9, 3 seconds; the way 6, 9, 4: 3, 5, 2 of drafting, 3, 4, 2 of verifying; 6 tokens, 8 drafted, 4 rounds
    assert row == {"draft": "half", "gamma": 2, "tokens": 6, "acceptance": 2 / 8, "tokens_per_round": 6 / 4,
                   "passes_per_token": 4 / 6, "macs": pytest.approx(1.5), "plain_ms": 1000.0, "time": 1.0, "least": 1.0,
                   "most": pytest.approx(4 / 3), "step": 3 / 8, "pass": 3 / 4, "same": 3, "of": 6}
    assert "3 of 6" in capsys.readouterr().out
    seconds["plain"], texts["a"] = iter([1]), [7]
    assert "first token" in complaint(against_plain.compare, None, {}, ["a"], 5, {7}, 1)
    seconds["plain"], texts["a"] = iter([1]), [1, 7]             # sampled, the way's text may be shorter
    nothing = lambda prompt: (SimpleNamespace(tokens=[7], rounds=0, drafted=0, accepted=0, drafting=0, verifying=0), 0)
    assert "first token" in complaint(against_plain.compare, None, {("half", 2): nothing}, ["a"], 5, {7}, 1)


# The command.

@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of toys with weights of unit scale: calibrated, with gates only, without gates."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("calibrated", "gates", "dense")}
    for name, path in folders.items():
        gate = None if name == "dense" else GateConfig("scalar")
        model, tokenizer = toy(path, gate, tie_word_embeddings=False)
        model.load_state_dict(build(model.config).float().state_dict())
        model.config.gateskip = calibrate(model, PROMPTS, [0.8, 0.5]) if name == "calibrated" else {}
        save_model(model, path, tokenizer)
    return folders


def measured(out, *switches, **flags):
    flags = dict(data="arithmetic", limit=2, new_tokens=9, repeats=2, device="cpu", out=out) | flags
    assert speculative.main(words(*switches, **flags)) == 0
    return json.loads(out.read_text())["drafts"]


def test_the_command_measures_what_was_asked(models, tmp_path):
    """Budgets or gammas in another order, thresholds of another budget, the answer in the prompt, texts that differ."""
    rows = measured(tmp_path / "rows.json", "--draft-budgets", "1", "0.5", "--gammas", "2", "3",
                    model=models["calibrated"])
    model = load_model(models["calibrated"])
    for r, (budget, gamma) in zip(rows, product((1.0, 0.5), (2, 3)), strict=True):
        made = [speculative.one(model, make_policy(model.config, "frozen", budget), gamma, 9, set(model.config.eos_ids),
                                prompt) for prompt in PROMPTS[:2]]
        base = sum(against_plain.plain(model, prompt, 9, set(model.config.eos_ids))[1] for prompt in PROMPTS[:2])
        total = lambda name: sum(getattr(found, name) for found, _ in made)
        assert (r["draft"], r["gamma"], r["same"], r["of"]) == (f"budget {budget:g}", gamma, 4, 4)
        assert (r["acceptance"], r["tokens"]) == (total("accepted") / total("drafted"), 16)
        assert r["macs"] == pytest.approx(sum(macs for _, macs in made) / base) and r["macs"] > 1
    assert rows[0]["acceptance"] == 1.0 > rows[2]["acceptance"]


def test_the_command_samples(models, tmp_path, monkeypatch, capsys):
    """Greedy drafts or verifying under a temperature, another seed, a count of texts that chance made the same."""
    asked = []
    plain = against_plain.plain
    monkeypatch.setattr(against_plain, "plain", lambda *args: asked.append(args[-1]) or plain(*args))
    flags = dict(model=models["calibrated"], draft_budgets=0.5, gammas=2, temperature=2)
    first, again, other = ([{key: row[key] for key in ("tokens", "acceptance", "macs", "same")}
                            for row in measured(tmp_path / "rows.json", **flags, seed=seed)] for seed in (1, 1, 2))
    assert first == again != other and first[0]["same"] is None and {s.temperature for s in asked} == {2.0}
    assert " -\n" in capsys.readouterr().out


def test_what_cannot_be_measured_is_refused_before_the_work(models, tmp_path, monkeypatch):
    """Minutes of decoding before a file cannot be written; a draft that is the verifier, because nothing is frozen."""
    monkeypatch.setattr(speculative, "compare", None)
    text = tmp_path / "text.txt"
    text.write_text("no questions")
    before, long = sorted(tmp_path.iterdir()), dict(new_tokens=600)
    for said, flags in {"no gates with frozen thresholds": dict(model=models["dense"]),
                        "has no gates with frozen": dict(model=models["gates"]), "is plain text": dict(data=text),
                        "cannot be written": dict(out=tmp_path), "leaves the model room for": long,
                        "below the smallest calibrated": dict(draft_budgets=0.3),
                        "outside (0, 1]": dict(draft_budgets=1.5), "'2' must be": dict(new_tokens=2)}.items():
        flags = dict(model=models["calibrated"]) | flags
        assert said in complaint(measured, flags.pop("out", tmp_path / "rows.json"), **flags)
    assert sorted(tmp_path.iterdir()) == before
    model, _ = gated()
    for prompt, n in (([], 3), (PROMPT, 0), (PROMPT, 5000)):
        assert "positions" in complaint(run, model, SkipPolicy(), 2, prompt, n)


def test_only_its_own_file_is_written_over(models, tmp_path, monkeypatch):
    """A run's config.json, or another script's rows, gone for a table of drafts; its own file refused."""
    file = tmp_path / "rows.json"
    for _ in range(2):
        measured(file, "--gammas", "2", repeats=1, limit=1, draft_budgets=0.5, model=models["calibrated"])
    shutil.copy(models["calibrated"] / "config.json", tmp_path)
    (tmp_path / "time.json").write_text('{"command": "", "digest": "", "rows": []}')
    monkeypatch.setattr(speculative, "compare", None)
    for name in ("config.json", "time.json"):
        before = (tmp_path / name).read_bytes()
        assert "is no file of this program" in complaint(measured, tmp_path / name, model=models["calibrated"])
        assert (tmp_path / name).read_bytes() == before
