"""Tests of paper/layerskip.py: the recipe, the exit, and a self-speculation that verifies. (n): of baselines.md."""
import math
import sys
from itertools import product

import pytest
import torch
import torch.nn.functional as F

from budgets import evaluate
from conftest import both_ways, build, complaint, families, gradients, llama, new_cache, padding, same, tokens
from data import encode_all
from eval_gsm8k import run_row
from gates import GateConfig, SkipPolicy
from generate import generate
from load_weights import load_model, load_tokenizer, save_model
from problems import arithmetic
from savings import count_macs
from toy_runs import ROOT, TINY, Killed, at_step, folder, kill, metrics, run, same_bits, state, toy, undisturbed, words

sys.path.insert(0, str(ROOT / "paper"))
import layerskip
from early_exit import early
from layerskip import LayerSkip, dropout_scale, exit_at, exits, exits_loss, loss_weights, self_speculate
from testbed import trained

EXP = lambda layer, layers: math.exp(layer * math.log(2) / (layers - 1)) - 1


def model_of(family=llama, **changes):
    """A random dense model in float64; with tied embeddings it would repeat itself."""
    return build(family(None, tie_word_embeddings=False, **changes))


def training_model(seed=0, **of):
    """(a model in training under the recipe, the same one as it was)"""
    model = build(llama(None), seed)
    return early(build(llama(None), seed), LayerSkip, **of).train(), model


def by_hand(model, ids, out):
    """States h_0 ... h_L (B, S, H) where sample b passes the blocks in out[b] by: a plain loop, a sample at a time."""
    states = []
    for row, left_out in zip(ids, out):
        h, call = model.begin(row[None])
        states.append([h])
        for block in model.model["layers"]:
            h = h if block.layer in left_out else block(h, None, (None, None), call)[0]
            states[-1].append(h)
    return [torch.cat(rows) for rows in zip(*states)]


def head(model, h):
    logits = model.lm_head(model.model["norm"](h))
    cap = model.config.final_softcap
    return logits if cap is None else cap * torch.tanh(logits / cap)


def greedy(model, prompt, n, eos_ids=()):
    """The oracle: a pass of the core over the whole text for each new token."""
    text = list(prompt)
    while len(text) < len(prompt) + n and not (len(text) > len(prompt) and text[-1] in eos_ids):
        text.append(model(torch.tensor([text]))[0][0, -1].argmax().item())
    return text[len(prompt):]


# The recipe.

def test_dropout_grows_from_nothing_to_all():
    """(2) Half of ln 2, a base of e, a last block below p_max, a first one that drops."""
    for layers in (2, 4, 16, 33):
        scale = [dropout_scale(layer, layers) for layer in range(layers)]
        assert scale == pytest.approx([EXP(layer, layers) for layer in range(layers)], abs=1e-12)
        assert scale[0] == 0.0 and scale[-1] == 1.0 and all(a < b for a, b in zip(scale, scale[1:]))
    assert [round(dropout_scale(layer, 16), 2) for layer in (5, 10)] == [0.26, 0.59] and dropout_scale(0, 1) == 0.0


@both_ways
@torch.no_grad()
def test_a_dropped_block_is_the_identity_of_its_sample(compute):
    """A draw for the whole batch or for each token, a dropped sample that still attends, one that is scaled, a kept one
    that is changed by its neighbour; dropout in evaluation."""
    model, dense = training_model(p_max=0.9)
    ids = tokens(6, 7)
    torch.manual_seed(0)
    dropped = []                                                 # per block (B,)
    ask = model.sits_out
    model.sits_out = lambda layer, valid: dropped.append(ask(layer, valid)) or dropped[-1]
    model(ids, compute=compute)
    assert dropped[0] is None and all(torch.equal(d, d[:, :1].expand(6, 7)) for d in dropped[1:])
    out = [{layer for layer in (1, 2, 3) if dropped[layer][row, 0]} for row in range(6)]
    assert len(set(map(frozenset, out))) > 2
    for found, wanted in zip(model.states, by_hand(dense, ids, out), strict=True):
        same(found, wanted, 1e-12)
    model.eval()
    logits, trace = model(ids, compute=compute)
    assert dropped[4:] == [None] * 4 and torch.equal(logits, dense(ids)[0]) and torch.stack(trace.keep).all()


def test_blocks_drop_as_often_as_they_should():
    """p_max without D(l) or with D(l) of the block above, one draw that all blocks share."""
    model, _ = training_model(p_max=0.6)
    torch.manual_seed(0)
    n, valid = 20000, torch.ones(20000, 1, dtype=torch.bool)
    drawn = {layer: model.sits_out(layer, valid)[:, 0].double() for layer in (1, 2, 3)}
    for layer, p in ((layer, 0.6 * EXP(layer, 4)) for layer in drawn):
        assert abs(drawn[layer].mean() - p) < 4 * (p * (1 - p) / n) ** 0.5
    both = (drawn[2] * drawn[3]).mean() / (drawn[2].mean() * drawn[3].mean())
    assert abs(both - 1) < 0.05


def test_weights_of_exits_by_the_formula():
    """(3) Weights that do not sum to 1, e(l) of the block above, the last scaled by e_scale, a sum one term longer; a
    last exit that is off; an exit of weight 0 in a single block."""
    for layers, e_scale, rotation, steps in product((1, 2, 4, 7), (0.0, 0.2, 1.0), (None, 1, 3, 8), (1, 9)):
        e = [e_scale * sum(range(layer + 1)) for layer in range(layers - 1)]
        e.append(layers - 1 + e_scale * sum(range(layers - 1)) if layers > 1 else 1.0)
        for step in range(steps):
            on = [1.0 if layer == layers - 1 else float((layer - step) % rotation == 0) if rotation else
                  float(step / steps >= 0.5 * (layers - layer) / layers - 1e-12) for layer in range(layers)]
            total = sum(c * x for c, x in zip(on, e))
            found = loss_weights(layers, step, steps, e_scale, rotation)
            assert found == pytest.approx([c * x / total for c, x in zip(on, e)], abs=1e-12)
            assert sum(found) == pytest.approx(1, abs=1e-12) and found[-1] > 0


def test_each_exit_takes_its_turn():
    """(4) A rotation over the last exit, one that stands still, or that leaves a block out. (The first block's weight
    is e(0) = 0 at all times.)"""
    for layers, rotation in ((8, 4), (9, 4), (8, 8), (4, 16)):
        on = [[w > 0 for w in loss_weights(layers, step, 100, 1.0, rotation)] for step in range(40)]
        for start in range(40 - rotation):
            counts = [sum(column) for column in zip(*on[start:start + rotation])]
            assert counts == [0] + [1] * (layers - 2) + [rotation]
    assert not any(loss_weights(8, 0, 100, 1.0, 4)[i] for i in (1, 2, 3, 5, 6))


def test_exits_come_on_from_above():
    """All from the first step on, or only at the end; the lower before the upper."""
    layers, steps = 8, 160
    on = [sum(w > 0 for w in loss_weights(layers, step, steps)) for step in range(steps)]
    assert on == sorted(on) and on[0] == 1 and on[80] == on[-1] == layers - 1
    first = [on.index(n) for n in range(1, layers)]              # when the n-th comes on, from above: every T / 2L
    assert first == [0] + [10 * n for n in range(2, layers)]
    assert [w > 0 for w in loss_weights(layers, 25, steps)] == [False] * 6 + [True] * 2


@pytest.mark.parametrize("of", [dict(), dict(rotation=3, step=2), dict(e_scale=0.2), dict(step=4)])
def test_the_loss_by_hand(of):
    """(3) A mean in place of a sum, an exit without the final norm, the state below the exit, another step's weights,
    places of other tokens."""
    of = dict(p_max=0.0, steps=10, step=7) | of
    model, dense = training_model(**of)
    ids, places = tokens(3, 8), torch.tensor([1, 2, 6, 9, 15, 20])
    targets = torch.arange(6)
    model(ids, places=places)
    weights = loss_weights(4, of["step"], 10, of.get("e_scale", 1.0), of.get("rotation"))
    assert sum(w > 0 for w in weights) > 1
    wanted = 0.0
    for w, h in zip(weights, by_hand(dense, ids, [()] * 3)[1:]):
        p = head(dense, h).flatten(0, 1)[places].log_softmax(-1)
        wanted = wanted - w * sum(p[i, t] for i, t in enumerate(targets))
    same(exits_loss(model, targets), wanted, 1e-10)


@pytest.mark.parametrize("step", [0, 9])
def test_without_dropout_and_exits_it_is_plain_training(step):
    """(1) Exits that weigh something at e_scale 0, or a last one that weighs less than all: loss and gradients."""
    model, dense = training_model(p_max=0.0, e_scale=0.0, step=step, steps=10)
    ids, places, targets = tokens(3, 8), torch.tensor([1, 2, 6, 9, 15, 20]), torch.arange(6)
    found, wanted = exits_loss((model(ids, places=places), model)[1], targets), dense(ids, places=places)[0]
    wanted = F.cross_entropy(wanted, targets, reduction="sum")
    assert torch.equal(found, wanted)
    found, wanted = gradients(model, found, 1.0), gradients(dense, wanted, 1.0)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_train_runs_the_recipe(folder, tmp_path, monkeypatch):
    """(1) A run of train.py that is not plain training where nothing of the recipe is on; a context that leaves
    something behind; a loss that does not know how far training is, or the recipe's settings."""
    with layerskip.recipe(p_max=0.0, e_scale=0.0):
        assert run(folder, tmp_path / "off", gate="none") == 0
    asked = []
    monkeypatch.setattr(layerskip, "loss_weights", lambda *args: asked.append(args) or loss_weights(*args))
    with layerskip.recipe(p_max=0.5, rotation=2):
        assert run(folder, tmp_path / "on", gate="none") == 0
    assert asked == [(2, step, 6, 1.0, 2) for step in range(6)]
    assert run(folder, tmp_path / "dense", gate="none") == 0
    same_bits(state(tmp_path / "off")["weights"], state(tmp_path / "dense")["weights"])
    assert metrics(tmp_path / "off") == metrics(tmp_path / "dense") != metrics(tmp_path / "on")


def test_a_resumed_run_draws_the_same_blocks(folder, tmp_path, monkeypatch):
    """Dropout that a stop and --resume turn into another: its draws are none of those that a checkpoint keeps."""
    recipe = lambda: layerskip.recipe(p_max=0.8)
    with recipe():
        assert run(folder, tmp_path / "whole", gate="none") == 0
    at_step(monkeypatch, 5, kill)
    with pytest.raises(Killed), recipe():
        run(folder, tmp_path / "killed", gate="none")
    undisturbed(monkeypatch)
    with recipe():
        assert run(folder, tmp_path / "killed", "--resume", gate="none") == 0
    same_bits(state(tmp_path / "killed"), state(tmp_path / "whole"))


def test_the_testbed_takes_the_recipe(folder, tmp_path, monkeypatch):
    """A context that testbed.trained cannot enter."""
    monkeypatch.setattr("testbed.START", folder)
    trained([["--gate", "none", "--steps", "2", "--seq-len", "160", "--device", "cpu"]], 1, tmp_path / "run",
            layerskip.recipe)
    assert (tmp_path / "run" / "latest").read_text().strip() == "step-000002"


# Exit at E.

@families
@both_ways
@torch.no_grad()
def test_exit_at_e_runs_the_blocks_below_and_no_others(family, compute):
    """(1) E = L that is not the dense model; an exit without the final norm, a block too many or too few; K and V in
    layers that nobody runs; blocks above that run all the same; savings of the wrong depth."""
    model, ids = model_of(family), tokens(2, 6)
    dense, trace = model(ids, compute=compute)
    ran = []
    for block in model.model["layers"]:
        block.register_forward_hook(lambda block, *_: ran.append(block.layer))
    for exit in (1, 2, 3, 4):
        short, cache = exit_at(model, exit), new_cache(model, 2, 6)
        wanted = head(model, by_hand(model, ids, [()] * 2)[exit])
        ran.clear()
        logits, found = short(ids, cache=cache, compute=compute, policy=SkipPolicy("random", 0.5))
        assert ran == [*range(exit)] and [bool(k.any()) for k in cache.k] == [n < exit for n in range(4)]
        assert [bool(v.any()) for v in cache.v] == [n < exit for n in range(4)]
        same(logits, wanted, 1e-12)
        assert [bool(k.all()) for k in found.keep] == [n < 2 * exit for n in range(8)] and len(found.keep) == 8
        assert exit < 4 or torch.equal(logits, dense)
    assert len(model.model["layers"]) == 4 and torch.equal(model(ids, compute=compute)[0], dense)
    assert {share: len(short.model["layers"]) for share, short in exits(model).items()} == {
        0.75: 1, 0.5: 2, 0.25: 3, 0.0: 4}


@torch.no_grad()
def test_an_exit_generates_and_counts_against_the_whole_model():
    """Batches with padding that end at different times, caches; savings against the blocks that are there only; K and V
    above that are counted as computed."""
    model, lengths = model_of(), [9, 4, 6]
    ids = tokens(3, 9)
    prompts = [row[-n:].tolist() for row, n in zip(ids, lengths)]
    for exit in (1, 3):
        short = exit_at(model, exit)
        wanted = [greedy(short, prompt, 6, {7}) for prompt in prompts]
        cut = build(llama(None, tie_word_embeddings=False, num_hidden_layers=exit))
        cut.load_state_dict(model.state_dict(), strict=False)    # the same model, saved without the blocks above
        assert wanted == [greedy(cut, prompt, 6, {7}) for prompt in prompts]
        done = generate(short, prompts, 6, eos_ids={7})
        assert done.tokens == wanted
        report, alone = done.savings.report(), generate(cut, prompts, 6, eos_ids={7}).savings.report()
        assert (report["skipped"], report["skipped_per_call"]) == (pytest.approx(1 - exit / 4), pytest.approx(
            1 - exit / 4)) and report["branches"] == [1.0] * 2 * exit + [0.0] * 2 * (4 - exit)
        assert report["macs"] == alone["macs"]
        dense = generate(model, prompts, 6, eos_ids={7})         # other texts, and of the same lengths
        assert list(map(len, dense.tokens)) == list(map(len, done.tokens))
        assert report["macs_dense"] == dense.savings.report()["macs_dense"]
    valid = padding(lengths, 9)
    _, trace = exit_at(model, 2)(ids, valid=valid, compute="compact")
    keep = valid.expand(4, 3, 9)
    half = count_macs(cut.config, keep, valid, keys=9, logit_rows=27)
    found = count_macs(model.config, torch.stack(trace.keep), valid, keys=9, logit_rows=27, kv=trace.kv)
    assert found == half and trace.kv == "copy_up"


def test_an_exit_is_evaluated_like_any_model(folder):
    """A model that run_row, or the table at the end of train.py, cannot take as it is."""
    model, tokenizer = toy(folder.parent / "other")
    args = type("", (), {"batch_size": 3, "max_new_tokens": 5})
    row = run_row("exit", exit_at(model, 1), tokenizer, arithmetic(4, "test"), SkipPolicy(), 1.0, args)
    assert row["skipped"] == row["answer"]["skipped"] == 0.5 and 0.1 < row["macs_saved"] < 0.5
    items, _ = encode_all(arithmetic(3, "test"), tokenizer, 1, 160)
    assert evaluate(exit_at(model, 1), items, SkipPolicy())[2]["skipped"] == 0.5


def test_exits_that_are_not_there():
    """A wrong depth that is cut to one that exists, gates that nobody asks."""
    for exit in (0, 5):
        assert f"--exit {exit}: give 1 to 4," in complaint(exit_at, model_of(), exit)
        assert f"--exit {exit}: give 1 to 4," in complaint(self_speculate, model_of(), exit, 2, 2, (), [1])
    assert "a --model without gates" in complaint(exit_at, build(llama(GateConfig("scalar"))), 2)


# Self-speculation.

@families
@pytest.mark.parametrize("exit", [1, 2, 3])
def test_greedy_text_is_the_dense_model_s(family, exit):
    """(5) A state or K, V of another token, a window or position off by one, a rejected token that stays in the cache,
    a text that goes on behind its end or the limit; on many prompts, with drafts that stand and that fall."""
    model, drafted, accepted = model_of(family), 0, 0
    for i in range(5):
        prompt, gamma, n = tokens(1, 1 + 3 * i, seed=i)[0].tolist(), 1 + i % 4, (9, 1, 2, 10, 10)[i]
        free = greedy(model, prompt, n)
        assert generate(model, [prompt], n).tokens == [free]
        for end in (None, free[n // 2]):
            wanted = free[:free.index(end) + 1] if end is not None else free
            found, _ = self_speculate(model, exit, gamma, n, {end}, prompt)
            assert found.tokens == wanted
            drafted, accepted = drafted + found.drafted, accepted + found.accepted
    assert 0 < accepted < drafted


def test_no_more_is_drafted_than_is_wanted():
    """Memory for a draft of any length, where the limit leaves room for a few tokens."""
    model, prompt = model_of(), tokens(1, 5)[0].tolist()
    (much, macs), (six, wanted) = (self_speculate(model, 2, gamma, 6, (), prompt) for gamma in (10 ** 11, 6))
    assert (much.tokens, much.drafted, macs) == (six.tokens, six.drafted, wanted)


def test_a_round_gives_all_or_one(monkeypatch):
    """(6) A round whose drafts all stand and that gives fewer than gamma + 1 tokens, or whose first falls and that
    gives more or less than the verifier's one; a token that is believed unverified."""
    model, prompt = model_of(), tokens(1, 5)[0].tolist()
    for gamma in (1, 3, 6):
        found, _ = self_speculate(model, 4, gamma, 1 + 2 * (gamma + 1), (), prompt)      # E = L
        assert (found.rounds, found.drafted, found.accepted) == (2, 2 * gamma, 2 * gamma)
    wanted = greedy(model, prompt, 9)
    found, _ = self_speculate(model, 4, 6, 9, {wanted[2]}, prompt)               # nothing is drafted behind an end
    assert (found.tokens, found.drafted) == (wanted[:3], 2)
    monkeypatch.setattr(layerskip, "accept", lambda draft, q, logits, *_: (0, logits.argmin().item()))
    found, _ = self_speculate(model, 2, 3, 9, (), prompt)        # the least likely is drafted
    assert found.tokens == wanted and (found.rounds, found.accepted) == (8, 0)


@torch.no_grad()
def test_the_cache_is_that_of_a_prefill_and_no_block_runs_twice(monkeypatch):
    """Drafted K and V of one token too many or too few, layers above that lag behind; a verifier that runs the lower
    blocks again, or the upper ones for what is verified already; MACs without the draft's head, or without keys."""
    model, prompt, seen, rows, macs = model_of(), tokens(1, 7)[0].tolist(), [], [0] * 4, 0
    real, c = layerskip.speculate, model.config

    def watched(model, prompt, n, gamma, draft, verify, *rest):
        def look(cache, *args):
            seen.append((cache.used, [x[:, :, :cache.used].clone() for x in cache.k + cache.v]))
            return draft(cache, *args)

        def counted(cache, ids):
            nonlocal macs
            logits, n, q, kv = verify(cache, ids), len(ids), c.num_attention_heads, c.num_key_value_heads
            block = c.hidden_size * (2 * (q + kv) * c.head_dim + 3 * c.intermediate_size)
            block += 2 * q * c.head_dim * cache.used
            macs += (4 * n * block + (2 * n - 1) * c.vocab_size * c.hidden_size) * (len(seen) > 0)
            return logits
        return real(model, prompt, n, gamma, look, counted, *rest)

    def count(block, args, _):
        rows[block.layer] += args[0].shape[1]
    hooks = [block.register_forward_hook(count) for block in model.model["layers"]]
    monkeypatch.setattr(layerskip, "speculate", watched)
    found, its_macs = self_speculate(model, 2, 3, 15, (), prompt)
    assert rows == [len(prompt) + found.drafted + found.rounds] * 4 and 0 < found.accepted < found.drafted
    assert its_macs == macs and isinstance(its_macs, int)
    [hook.remove() for hook in hooks]
    text = prompt + found.tokens
    for used, now in seen:
        cache = new_cache(model, 1, used)
        model(torch.tensor([text[:used]]), cache=cache)
        for a, b in zip(now, cache.k + cache.v):
            same(a, b, 1e-12)
    assert len(seen) == found.rounds and len({used for used, _ in seen}) == found.rounds


@torch.no_grad()
def test_the_draft_says_what_it_was_drawn_from(monkeypatch):
    """q of another temperature, of the whole model, or of the place behind."""
    model, prompt, seen, real = model_of(), tokens(1, 7)[0].tolist(), [], layerskip.speculate
    def watched(model, prompt, n, gamma, draft, *rest):
        look = lambda cache, *args: seen.append((cache.used, draft(cache, *args))) or seen[-1][1]
        return real(model, prompt, n, gamma, look, *rest)
    monkeypatch.setattr(layerskip, "speculate", watched)
    text = prompt + self_speculate(model, 2, 3, 12, (), prompt, 0.5, torch.Generator().manual_seed(0))[0].tokens
    for used, (ids, q) in seen:
        logits, _ = exit_at(model, 2)(torch.tensor([text[:used + 1] + ids]))
        same(q, (logits[0, used:-1] / 0.5).softmax(-1), 1e-12)
    assert len(seen) > 3 and all(len(q) == len(ids) for _, (ids, q) in seen)


def chi_square(counts, p):
    """Of counts and probabilities: (statistic, degrees of freedom). Cells that expect less than 5 are pooled."""
    n = sum(counts)
    cells = [(c, n * x) for c, x in zip(counts, p) if n * x >= 5]
    cells.append((n - sum(c for c, _ in cells), n - sum(x for _, x in cells)))
    return sum((c - x) ** 2 / x for c, x in cells if x > 1e-9), len(cells) - 1


def test_sampled_text_is_distributed_as_the_dense_model_s():
    """Drafts that stand too often or not often enough, a replacement drawn from p in place of what is left of it, q of
    another place; the prompt's own token left to the draft. 3 tokens of a vocabulary of 3: 27 texts."""
    model, prompt, temperature = model_of(vocab_size=3, num_hidden_layers=2), [0, 1, 2, 1], 1.3
    counts, drafted, accepted = dict.fromkeys(product(range(3), repeat=3), 0), 0, 0
    generator = torch.Generator().manual_seed(0)
    for _ in range(400):
        found, _ = self_speculate(model, 1, 2, 3, (), prompt, temperature, generator)
        counts[tuple(found.tokens)] += 1
        drafted, accepted = drafted + found.drafted, accepted + found.accepted
    assert 0.3 < accepted / drafted < 0.9

    def exact(model):
        p = []
        for text in counts:
            ids = torch.tensor([prompt + list(text)])
            logits = model(ids)[0][0, len(prompt) - 1:-1] / temperature
            p.append(logits.softmax(-1)[torch.arange(3), torch.tensor(text)].prod().item())
        return p
    (found, degrees), (far, _) = (chi_square(counts.values(), exact(m)) for m in (model, exit_at(model, 1)))
    limit = degrees + 3.1 * (2 * degrees) ** 0.5 + 5             # above the 99.9% quantile
    assert found < limit and far > 2 * limit                     # and the draft's own would not pass


# The command.

def command(**flags):
    return layerskip.main(words(**dict(exit=1, gammas=2, limit=2, new_tokens=8, repeats=1, device="cpu") | flags))


def test_the_command_compares_what_was_asked_for(folder, capsys, monkeypatch):
    """Another exit, gamma or length than the flags say, or texts that go on behind an end token."""
    asked = []
    monkeypatch.setattr(layerskip, "compare", lambda model, ways, prompts, *rest: asked.append((prompts, rest, {
        way: once(prompts[0]) for way, once in ways.items()})))
    assert command(model=folder, gammas=3) == 0 and "2 prompts, 1 rounds of timing" in capsys.readouterr().out
    (prompts, rest, found), = asked
    tokenizer = load_tokenizer(TINY)
    assert prompts == [ids[:mask.index(True)] for ids, mask in encode_all(arithmetic(2, "test"), tokenizer, 1, 500)[0]]
    (wanted, macs), (found, its_macs) = self_speculate(load_model(folder), 1, 3, 8, {1}, prompts[0]), found["exit 1", 3]
    assert (found.tokens, found.drafted, its_macs) == (wanted.tokens, wanted.drafted, macs) and rest == (8, {1}, 1)
    monkeypatch.undo()
    assert command(model=folder) == 0 and "2 of 2" in capsys.readouterr().out


def test_what_cannot_be_measured_is_refused(folder, tmp_path, monkeypatch):
    """Minutes before a depth that is not there, plain text, gates or a text without room."""
    monkeypatch.setattr(layerskip, "compare", None)
    refused = lambda **flags: complaint(command, **dict(model=folder) | flags)
    assert "--exit 3: give 1 to 2," in refused(exit=3)
    assert "is plain text" in refused(data=ROOT / "requirements.txt")
    assert "the longest prompt of --data leaves the model room for" in refused(new_tokens=600)
    model, tokenizer = toy(tmp_path / "gated", GateConfig("scalar"))
    save_model(model, tmp_path / "gated", tokenizer)
    assert "a --model without gates" in refused(model=tmp_path / "gated")
