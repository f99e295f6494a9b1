"""Tests of generate.py: sampling, shades, batched decoding, finished sequences, savings, and the command line."""
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import unicodedata

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import generate as program
from branches import lines_of, parts_of
from conftest import both_kv, both_ways, build, families, frozen, llama, on_devices, tokens
from console import InputError
from data import encode_prompt, prompt_text, target_text
from gates import GateConfig, SkipPolicy
from generate import COLOURS, GLYPHS, Generation, Sampling, generate, legend, main, shade
from load_weights import load_model, load_tokenizer, save_model
from problems import arithmetic
from savings import branch_costs, count_macs, savings_line
from test_tokens import around, llama2
from thresholds import calibrate, make_policy
from tokens import encode
from toy_runs import ROOT, toy, words

TRAINED = dict(skip="all", kv="copy_up", budget_start=1.0, budget_end=0.8, schedule="linear")
LENGTHS = (3, 9, 1, 6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A gated model with scores far apart, calibrated at 0.9 and 0.7 (below the 0.8 it says it was trained for)."""
    path = tmp_path_factory.mktemp("model")
    model, tokenizer = toy(path, GateConfig())
    model.load_state_dict(build(model.config, dtype=torch.float32).state_dict())
    sequences = [tokenizer.encode(" ".join(problem[:2])).ids for problem in arithmetic(12, "calibration")]
    model.config.gateskip = TRAINED | calibrate(model, sequences, [1.0, 0.9, 0.7])
    save_model(model, path, tokenizer)
    return path


@pytest.fixture(scope="module")
def dense(folder, tmp_path_factory):
    """The same model without gates."""
    path = tmp_path_factory.mktemp("dense") / "model"
    shutil.copytree(folder, path)
    toy(path)                                                    # its config.json has no gates
    weights = load_file(folder / "model.safetensors")
    save_file({key: p for key, p in weights.items() if "_gate." not in key}, path / "model.safetensors")
    return path


def prompts_of(lengths=LENGTHS, seed=5):
    return [tokens(1, n, seed + n)[0].tolist() for n in lengths]


def recorded(model, monkeypatch):
    """Every Trace of the model's calls from now on, and the number of rows of each call."""
    traces, rows, forward = [], [], type(model).forward

    def spy(self, input_ids, **kwargs):
        out, trace = forward(self, input_ids, **kwargs)
        traces.append(trace)
        rows.append(len(input_ids))
        return out, trace
    monkeypatch.setattr(type(model), "forward", spy)
    return traces, rows


# Sampling.

def reference(logits, temperature, top_k, top_p):
    """The distribution to draw from, token by token."""
    order = sorted(range(len(logits)), key=lambda i: -logits[i])
    if top_k:
        order = order[:top_k]
    p = {i: np.exp(logits[i] / temperature) for i in order}
    total, kept, mass = sum(p.values()), {}, 0.0
    for i in order:
        kept[i] = p[i]
        mass += p[i] / total
        if mass >= top_p:                                        # the token that crosses top_p is the last one kept
            break
    return np.array([kept.get(i, 0.0) for i in range(len(logits))]) / sum(kept.values())


@pytest.mark.parametrize("temperature, top_k, top_p", [
    (1.0, 0, 1.0), (0.5, 0, 1.0), (2.0, 3, 1.0), (1.0, 0, 0.6), (1.0, 0, 0.01), (0.7, 3, 0.9), (1.0, 1, 1.0),
    (1.0, 99, 0.97), (1.0, 2, 0.6)])
def test_samples_follow_the_distribution(temperature, top_k, top_p):
    """Top-p that drops the token which crosses it (or keeps one more), cuts before the temperature, ids in sorted
    order."""
    logits = np.log([0.05, 0.3, 0.02, 0.5, 0.13])
    expected, n = reference(logits, temperature, top_k, top_p), 20_000
    sampling = Sampling(temperature, top_k, top_p, torch.Generator().manual_seed(0))
    drawn = sampling.draw(torch.tensor(logits).expand(n, -1))
    share = np.bincount(drawn.numpy(), minlength=5) / n
    assert ((share > 0) == (expected > 0)).all()
    assert (np.abs(share - expected) <= 5 * np.sqrt(expected * (1 - expected) / n) + 1e-12).all(), (share, expected)


def test_sampling_is_seeded_and_greedy_is_not_random():
    """A generator that is not used: the same command prints another text each time."""
    model = build(llama())

    def draw(seed, **how):
        sampling = Sampling(generator=torch.Generator().manual_seed(seed), **how)
        return generate(model, prompts_of(), 6, sampling=sampling).tokens
    assert draw(1, temperature=2.0) == draw(1, temperature=2.0) != draw(2, temperature=2.0)
    assert draw(1) == draw(2) == draw(1, temperature=2.0, top_k=1) == draw(2, temperature=2.0, top_p=1e-6)
    assert draw(1) == generate(model, prompts_of(), 6).tokens    # the default is greedy
    for tiny in (1e-30, 1e-40, 1e-46, 5e-324):                   # 1e-46 is 0 in float32: nobody was left to draw from
        assert draw(1, temperature=2.0, top_p=tiny) == draw(1)
    assert Sampling(1e-3).draw(torch.tensor([[0.0, 3.0, 1.0]], dtype=torch.bfloat16)).tolist() == [1]


# What was skipped, to look at.

def test_shades():
    """A shade on the wrong side of its border, colours that run on to the end of a line, shades of tokens that never
    ran."""
    shares = [0.0, 0.59, 0.6, 0.75, 0.8, 0.95]
    plain = shade(list("abcdef") + ["new"], shares, colour=False)
    assert plain == "".join(c + g for c, g in zip("abcdef", [GLYPHS[i] for i in (0, 0, 1, 2, 3, 4)])) + "new"
    colours = shade(["x\ny", "z"], [0.95], colour=True)
    assert colours == f"\033[48;5;{COLOURS[4]};38;5;232mx\033[0m\nyz"
    assert all(mark in legend(False) for mark in GLYPHS.strip()) and "\033" not in legend(False)
    assert all(f"48;5;{c};" in legend(True) for c in COLOURS)


def test_marks_are_no_letters():
    """The mark of a skipped token ("·" was one) taken for text: a product, a list, a Catalan l·l. Five different block
    elements, one column each, the heavier the more of the branches ran."""
    assert len(GLYPHS) == len(set(GLYPHS)) == len(COLOURS) == 5
    assert all("BLOCK" in unicodedata.name(mark) or "SHADE" in unicodedata.name(mark) for mark in GLYPHS), GLYPHS
    assert all(unicodedata.category(mark) == "So" and unicodedata.east_asian_width(mark) in "AN" for mark in GLYPHS)
    problems = "".join(prompt_text(p.question) + target_text(*p[1:]) for p in arithmetic(50))
    assert not set(GLYPHS) & set(problems)
    levels = [shade(["x"], [share], colour=False)[1] for share in (0.0, 0.65, 0.75, 0.85, 1.0)]
    assert levels == list(GLYPHS) and levels[-1] == "\u2588"     # a full block for what ran


# Algorithm 2.

@on_devices
@pytest.mark.parametrize("kind", ["none", "frozen"])
@families
def test_a_batch_generates_what_each_prompt_generates_alone(family, kind, device):
    """Left padding that is attended, counted as a position or ranked; a cache row that belongs to another sequence."""
    model = build(family(), device=device)
    policy = frozen(model, tokens(4, 12, device=device)) if kind == "frozen" else None
    together = generate(model, prompts_of(), 10, policy)
    for i, prompt in enumerate(prompts_of()):
        alone = generate(model, [prompt], 10, policy)
        assert together.tokens[i] == alone.tokens[0] and len(alone.tokens[0]) == 10, i
        assert together.ran[i] == pytest.approx(alone.ran[0])
    skipped = together.savings.report()["skipped"]
    assert skipped > 0.1 if policy else skipped == 0
    assert generate(model, prompts_of(), 10, policy, compute="masked").tokens == together.tokens


@families
@both_kv
def test_greedy_equals_a_loop_without_a_cache(family, kv):
    """A token fed twice or never, logits of the wrong column, a cache that loses what a skipped token left there."""
    model = build(family())
    policy = frozen(model, tokens(4, 12), kv=kv)
    ids = prompts_of([5])[0]
    expected, share = list(ids), None
    for _ in range(9):
        logits, trace = model(torch.tensor([expected]), policy=policy)
        share = torch.stack(trace.keep).double().mean(0)[0]      # of the tokens before the last new one
        expected.append(logits[0, -1].argmax().item())
    result = generate(model, [ids], 9, policy)
    assert ids + result.tokens[0] == expected and result.ran[0] == pytest.approx(share.tolist())


@pytest.mark.parametrize("kind", ["none", "frozen"])
def test_finished_sequences_leave(monkeypatch, kind):
    """Sequences that run on after their end, take others with them, or leave their cache rows to their neighbours."""
    model = build(llama())
    policy = frozen(model, tokens(4, 12)) if kind == "frozen" else None
    endless = generate(model, prompts_of(), 8, policy).tokens
    for ends in ([endless[1][2]], [endless[0][0], endless[2][3], endless[3][4]]):      # one end token, and several
        cut = [row[:next((i + 1 for i, t in enumerate(row) if t in ends), 8)] for row in endless]
        assert len({len(row) for row in cut}) > 1
        with monkeypatch.context() as m:
            rows = recorded(model, m)[1]
            result = generate(model, prompts_of(), 8, policy, eos_ids=set(ends))
        assert result.tokens == cut
        assert rows == [sum(len(row) > step for row in cut) for step in range(max(map(len, cut)))]
        assert [len(ran) for ran in result.ran] == [n + len(row) - 1 for n, row in zip(LENGTHS, cut)]


def test_all_finished_at_once():
    """A call with no rows, or one more step after the last sequence has ended."""
    model = build(llama())
    first = generate(model, prompts_of(), 1).tokens
    result = generate(model, prompts_of(), 8, eos_ids={t for row in first for t in row})
    assert result.tokens == first and result.savings.report()["calls"] == 1


def test_batch_policy_skips_nothing_in_a_single_stream():
    """The quantile of one score is that score: printed as it stands, Algorithm 3 would never run a layer again."""
    model, policy = build(llama()), SkipPolicy("batch", 0.6)
    one = generate(model, prompts_of([7]), 6, policy)
    assert one.ran[0][7:] == [1.0] * 5 and min(one.ran[0][:7]) < 1               # the prompt is a pool of its own
    assert one.savings.report()["answer"]["skipped"] == 0 < one.savings.report()["prompt"]["skipped"]
    assert generate(model, prompts_of([1]), 6, policy).savings.report()["skipped"] == 0
    two = generate(model, [[11], [12]], 6, policy)
    assert two.savings.report()["skipped"] == 0.5                # one of two, at every branch: asked for 0.4


def recount(config, traces):
    """Savings.report() of traces but for "branches", by a plain loop."""
    pairs = skipped = work = macs = macs_dense = 0
    shares = []
    for trace in traces:
        for keep, cost in zip(trace.keep, branch_costs(config)):
            real = [k for keeps, valids in zip(keep.tolist(), trace.valid.tolist()) for k, v in zip(keeps, valids) if v]
            pairs, skipped = pairs + len(real), skipped + real.count(False)
            shares.append(real.count(False) / len(real))
            work += cost * real.count(False)
        keep, sizes = torch.stack(trace.keep), dict(keys=trace.keys, logit_rows=trace.logit_rows)
        macs += count_macs(config, keep, trace.valid, **sizes, gate=config.gate).item()
        macs_dense += count_macs(config, trace.valid.expand_as(keep), trace.valid, **sizes).item()
    return {"skipped": skipped / pairs, "skipped_per_call": sum(shares) / len(shares), "work_skipped": work / pairs,
            "calls": len(traces), "pairs": pairs, "macs": macs, "macs_dense": macs_dense,
            "macs_saved": 1 - macs / macs_dense}


def test_savings_are_recounted_by_a_plain_loop(monkeypatch):
    """Padding counted as skipped, finished sequences counted as run, averages of averages, prefill left out; the first
    generated token's call counted as the answer's, or another's as the prompt's."""
    model = build(llama())
    ends = {generate(model, prompts_of(), 7).tokens[1][2]}
    with monkeypatch.context() as m:
        traces, _ = recorded(model, m)
        result = generate(model, prompts_of(), 7, frozen(model, tokens(4, 12)), eos_ids=ends)
        traces = traces[1:]                                      # the first call was frozen()'s own
    report, whole = result.savings.report(), recount(model.config, traces)
    prompt, answer = report.pop("prompt"), report.pop("answer")
    for part in (report, prompt, answer):
        del part["branches"]                                     # see the next test
    assert report == pytest.approx(whole)
    assert prompt == pytest.approx(recount(model.config, traces[:1]))
    assert answer == pytest.approx(recount(model.config, traces[1:]))
    for key in ("calls", "pairs", "macs", "macs_dense"):
        assert prompt[key] + answer[key] == report[key] and min(prompt[key], answer[key]) > 0, key
    new = [len(row) - 1 for row in result.tokens]
    assert (prompt["pairs"], answer["pairs"]) == (8 * sum(LENGTHS), 8 * sum(new)) and 0 < report["skipped"] < 1
    assert abs(prompt["skipped"] - answer["skipped"]) > 0.01     # else a mix-up would not show
    assert sum(map(sum, result.ran)) == pytest.approx((1 - report["skipped"]) * report["pairs"] / 8)
    of_prompts = [share for ran, n in zip(result.ran, LENGTHS) for share in ran[:n]]
    assert sum(of_prompts) == pytest.approx((1 - prompt["skipped"]) * prompt["pairs"] / 8)


@both_ways
@pytest.mark.parametrize("skip", ["all", "layer", "alternate"])
def test_branches_are_recounted_by_a_plain_loop(monkeypatch, skip, compute):
    """Padding or finished sequences that count as tokens, attention's share given as the MLP's or as a neighbour's,
    the prompt's as the answer's; a branch that may not skip, or follows another, that gets what it did not run."""
    model = build(llama())
    policy, ends = frozen(model, tokens(4, 12), skip=skip), {generate(model, prompts_of(), 7).tokens[1][2]}
    with monkeypatch.context() as m:
        traces, _ = recorded(model, m)
        result = generate(model, prompts_of(), 7, policy, eos_ids=ends, compute=compute)
    assert 1 < len({len(row) for row in result.tokens}) and len({len(trace.valid) for trace in traces}) > 1
    ran, tokens_of, report = {}, {"prompt": 0, "answer": 0}, result.savings.report()
    for call, trace in enumerate(traces):
        part = "answer" if call else "prompt"
        for row, valid in enumerate(trace.valid.tolist()):
            for place, real_token in enumerate(valid):
                tokens_of[part] += real_token
                for branch in range(8) if real_token else ():
                    ran[part, branch] = ran.get((part, branch), 0) + trace.keep[branch][row, place].item()
    assert tokens_of["prompt"] == sum(LENGTHS)
    for part, n in tokens_of.items():
        assert report[part]["branches"] == pytest.approx([ran[part, branch] / n for branch in range(8)], abs=1e-12)
    both = [ran["prompt", branch] + ran["answer", branch] for branch in range(8)]
    assert report["branches"] == pytest.approx([n / sum(tokens_of.values()) for n in both], abs=1e-12)
    assert len(set(both)) > 2 and report["prompt"]["branches"] != report["answer"]["branches"]


def test_a_dense_models_branches_all_run():
    """0.9999 of every token, or no shares at all, where nothing can be skipped."""
    report = generate(build(llama(None)), prompts_of(), 5).savings.report()
    assert report["branches"] == report["prompt"]["branches"] == report["answer"]["branches"] == [1.0] * 8


def test_tokens_are_announced_in_order():
    """A stream that mixes up prompts once one of them has finished."""
    model, heard = build(llama()), []
    ends = {generate(model, prompts_of(), 7).tokens[0][1]}
    result = generate(model, prompts_of(), 7, eos_ids=ends, on_token=lambda i, token: heard.append((i, token)))
    by_step = itertools.zip_longest(*result.tokens)
    assert heard == [(i, token) for step in by_step for i, token in enumerate(step) if token is not None]
    assert len(heard) < 28


def test_a_prompt_ends_where_the_listener_says_so():
    """A text that has met its stop string and goes on being ranked and counted; an end of its neighbours, too."""
    model, heard = build(llama()), []
    whole = generate(model, prompts_of(), 7)
    cut = generate(model, prompts_of(), 7, on_token=lambda i, token: heard.append(i) or heard.count(1) == 3 and i == 1)
    assert cut.tokens == [new[:3] if i == 1 else new for i, new in enumerate(whole.tokens)]
    assert whole.savings.report()["pairs"] - cut.savings.report()["pairs"] == 4 * 8
    assert len(cut.ran[1]) == len(whole.ran[1]) - 4


def test_what_cannot_be_generated_is_refused():
    """Reading beyond the last position, an empty batch, a traceback for an empty prompt; a limit one too strict."""
    model = build(llama(max_position_embeddings=12))
    assert len(generate(model, prompts_of([9, 3]), 3).tokens[1]) == 3
    with pytest.raises(InputError, match="a prompt of 9 tokens and 4 new ones exceed the model's 12 positions"):
        generate(model, prompts_of([3, 9]), 4)
    for prompts in ([], [[1], []]):
        with pytest.raises(InputError, match="a prompt is empty"):
            generate(model, prompts, 3)
    with pytest.raises(InputError, match="at least 1"):
        generate(model, [[1]], 0)


# The command line.

def command(folder, *more, **flags):
    return words(*more, **{"model": folder, "device": "cpu", "max_new_tokens": 12, **flags})


def expected(folder, texts, budget=0.9, n=12, **how):
    """(tokenizer, Generation) of the library for what a command line asks."""
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    how = {"policy": make_policy(model.config, "auto", budget), "eos_ids": set(model.config.eos_ids), **how}
    return tokenizer, generate(model, [tokenizer.encode(text).ids for text in texts], n, **how)


def test_the_default_budget_is_one_that_is_calibrated(folder, tmp_path, capsys):
    """The command that train.py itself proposes, refused: 0.85 by default, where nothing below 0.9 was trained for."""
    shutil.copytree(folder, tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    for gone, expected in (("0.7", "frozen, budget 0.9: "), ("0.9", "none, budget 1.0: ")):      # only 1.0 is left
        del config["gateskip"]["thresholds"][gone]
        (tmp_path / "m" / "config.json").write_text(json.dumps(config))
        assert main(command(tmp_path / "m", "--prompt", "Tom has 12 eggs")) == 0
        assert expected in capsys.readouterr().out


def test_streamed_text_is_the_decoded_text(folder, capsys):
    """Text that is lost, doubled, or decoded token by token; numbers that are not this run's; a default budget other
    than the calibrated one nearest to 0.85."""
    assert main(command(folder, "--prompt", "Tom has 12 eggs")) == 0
    printed = capsys.readouterr()
    tokenizer, result = expected(folder, ["Tom has 12 eggs"])
    text, _, rest = printed.out.partition("\n\nfrozen, budget 0.9: ")
    assert text == "Tom has 12 eggs" + tokenizer.decode(result.tokens[0])
    report = result.savings.report()
    assert rest == savings_line(report) + "\n" and report["skipped"] > 0.05
    assert "\n  prompt tokens: skipped " in rest and "\n  generated tokens: skipped " in rest
    assert "12 tokens in " in printed.err and printed.err.startswith("device: cpu")


def test_a_character_of_several_tokens_waits_until_it_is_whole(folder, capsys, monkeypatch):
    """Question marks in the stream where a letter of another alphabet comes in two tokens; a torn one at the end that
    is lost."""
    tokenizer = load_tokenizer(folder)
    ids = tokenizer.encode("naïve 5 €", add_special_tokens=False).ids
    assert len(ids) > 9
    savings = expected(folder, ["A"], n=1)[1].savings
    for new in (ids, ids[:-1]):
        pieces = []

        def fake(*_, on_token, **how):
            for token in new:
                on_token(0, token)
                pieces.append(capsys.readouterr().out)
            return Generation([new], savings, [[]])
        monkeypatch.setattr(program, "generate", fake)
        assert main(command(folder, "--prompt", "A")) == 0
        assert "\ufffd" not in "".join(pieces) and pieces[0] and sum(map(bool, pieces)) > 5
        rest = capsys.readouterr().out.partition("\n\n")[0]
        assert "".join(pieces) + rest == "A" + tokenizer.decode(new)


@pytest.fixture
def as_of_llama_2(folder, tmp_path):
    """The model with a tokenizer whose decoder takes the first space off whatever it decodes."""
    path = tmp_path / "llama 2"
    shutil.copytree(folder, path)
    llama2().save(str(path / "tokenizer.json"))
    return path


@pytest.mark.parametrize("flags", [[], ["--show-compute"], ["--prompt", "his"], ["--prompt", "his", "--show-compute"]])
def test_spaces_between_prompt_and_answer(as_of_llama_2, flags, capsys, monkeypatch):
    """"Tomhasthis": a decoder that begins anew with the answer, or with each token, loses the spaces in front."""
    tokenizer, savings = load_tokenizer(as_of_llama_2), expected(as_of_llama_2, ["Tom"], n=1)[1].savings
    new = encode(tokenizer, " his é this", front=False)[1:]      # without the space that is put before a text

    def fake(_, prompts, *args, on_token, **how):
        for token in new if on_token else ():
            on_token(0, token)
        return Generation([new] * len(prompts), savings, [[]] * len(prompts))
    monkeypatch.setattr(program, "generate", fake)
    assert main(command(as_of_llama_2, "--prompt", "Tom", *flags)) == 0
    printed, bos = capsys.readouterr().out, "<s> " if "--show-compute" in flags else ""
    assert f"{bos}Tom his é this\n" in printed and ("his" not in flags or f"{bos}his his é this\n" in printed)


def test_what_the_tokenizer_puts_around_a_prompt(folder, tmp_path, monkeypatch):
    """<eos> between prompt and answer, after which nothing sensible comes; two <bos> for a prompt that brings its own;
    an index out of range for a token that has no row in the embedding, or a model refused for one that nobody uses."""
    other, asked = tmp_path / "other", []
    shutil.copytree(folder, other)
    tokenizer = load_tokenizer(folder)
    right = tokenizer.encode("Tom has").ids
    tokenizer.post_processor = around("<bos> $A <eos>", ("<bos>", 0), ("<eos>", 1))
    tokenizer.add_special_tokens(["[PAD]"])
    tokenizer.save(str(other / "tokenizer.json"))
    monkeypatch.setattr(program, "generate", lambda model, prompts, *_, **how: asked.extend(prompts) or sys.exit())
    with pytest.raises(SystemExit):
        main(command(other, "--prompt", "Tom has", "--prompt", "<bos>Tom has", "--question", "x"))
    assert asked[0] == asked[1] == right and asked[2].count(0) == 1 and 1 not in asked[2]
    with pytest.raises(InputError, match="'.PAD.' is token 482 of .*tokenizer.json.* take it out of the text"):
        main(command(other, "--prompt", "Tom has [PAD]"))


def test_several_prompts_and_questions(folder, capsys):
    """Answers under the wrong question, or all prompts before all questions; a template other than training's."""
    asked = ["--prompt", "Tom has", "--question", "How many?", "--prompt", "x", "--question", "Why?"]
    assert main(command(folder, *asked, budget=1.0)) == 0
    texts = ["Tom has", "Question: How many?\nAnswer:", "x", "Question: Why?\nAnswer:"]      # in the order given
    tokenizer, result = expected(folder, texts, 1.0)
    blocks = "".join(f"--- {i}\n{text}{tokenizer.decode(new)}\n"
                     for i, (text, new) in enumerate(zip(texts, result.tokens), 1))
    assert capsys.readouterr().out.startswith(blocks + "\nnone, budget 1.0: skipped 0.0% ")
    assert encode_prompt(tokenizer, "How many?") == tokenizer.encode(texts[1]).ids


def test_nothing_is_left_over_from_the_command_before(folder, capsys):
    """Flags collected in a list that all commands share: the first one's prompt answered once more by the second."""
    for text in ("Tom has", "x"):
        assert main(command(folder, "--prompt", text, budget=1.0)) == 0
        printed = capsys.readouterr().out
        assert printed.startswith(text) and "---" not in printed


def test_chat_uses_the_models_template(folder, tmp_path, monkeypatch):
    """A second BOS in front of the template's own; a model without a template that gets an invented one."""
    with pytest.raises(InputError, match="has no chat template: leave --chat out"):
        main(command(folder, "--chat", "--prompt", "Hi"))
    other = tmp_path / "chat"
    shutil.copytree(folder, other)
    template = "<bos>[{{ messages[0].role }}] {{ messages[0].content }} [assistant]"
    (other / "chat_template.jinja").write_text(template)
    asked = []
    monkeypatch.setattr(program, "generate", lambda model, prompts, *_, **how: asked.extend(prompts) or sys.exit())
    with pytest.raises(SystemExit):
        main(command(other, "--chat", "--prompt", "Hi", "--question", "Why?"))
    assert all(prompt.count(0) == 1 for prompt in asked)
    decode = load_tokenizer(folder).decode
    assert [decode(prompt[1:]) for prompt in asked] == ["[user] Hi [assistant]", "[user] Why? [assistant]"]


def test_show_compute(folder, capsys, monkeypatch):
    """Escape codes in a file or against NO_COLOR, a picture without a legend, shades of other tokens."""
    monkeypatch.delenv("NO_COLOR", raising=False)
    tokenizer, result = expected(folder, ["Tom has 12 eggs"], 0.75)
    argv = command(folder, "--prompt", "Tom has 12 eggs", "--show-compute", budget=0.75)
    ids = tokenizer.encode("Tom has 12 eggs").ids + result.tokens[0]
    pieces = [tokenizer.decode([t], skip_special_tokens=False) for t in ids]
    plain, colourful = (shade(pieces, result.ran[0], colour) for colour in (False, True))
    assert plain.startswith("<bos>") and len(set(result.ran[0])) > 2
    assert main(argv) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"{plain}\n\n{legend(False)}\nfrozen, budget 0.75: ") and "\033" not in printed
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert main(argv) == 0 and capsys.readouterr().out.startswith(f"{colourful}\n\n{legend(True)}\n")
    monkeypatch.setenv("NO_COLOR", "")                           # no-color.org: present and not empty
    assert main(argv) == 0 and capsys.readouterr().out.startswith(colourful)
    monkeypatch.setenv("NO_COLOR", "1")
    assert main(argv) == 0 and "\033" not in capsys.readouterr().out


def test_show_branches(folder, tmp_path, capsys):
    """Shares of another run, a picture that is drawn unasked or not at all, shares that nobody asked for."""
    argv = command(folder, "--prompt", "Tom has 12 eggs", budget=0.75)
    assert main(argv) == 0
    without = capsys.readouterr().out
    parts = parts_of(expected(folder, ["Tom has 12 eggs"], 0.75)[1].savings.report())
    lines = "\n" + "\n".join(lines_of("frozen, budget 0.75", parts)) + "\n"
    assert set(parts) == {"prompt", "answer"} and "\n    1 " in lines
    assert main([*argv, "--show-branches"]) == 0 and capsys.readouterr().out == without + lines
    assert main([*argv, "--show-branches", str(tmp_path / "b.png")]) == 0
    assert capsys.readouterr().out == f"{without}{lines}written: {tmp_path / 'b.png'}\n"
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG") and len(list(tmp_path.iterdir())) == 1


def test_bars_on_a_terminal_that_lacks_them(folder, tmp_path):
    """A UnicodeEncodeError after the text, on a cp1252 console: the numbers are there, and a bar is as long."""
    argv = words("--prompt", "Tom has 12 eggs", "--show-branches", model=folder, budget=0.75, max_new_tokens=4,
                 device="cpu")
    done = subprocess.run([sys.executable, ROOT / "generate.py", *argv], capture_output=True, timeout=600,
                          env={**os.environ, "PYTHONIOENCODING": "cp1252"})
    printed = done.stdout.decode("cp1252").splitlines()
    assert done.returncode == 0 and b"Traceback" not in done.stderr, done.stderr
    parts = parts_of(expected(folder, ["Tom has 12 eggs"], 0.75, 4)[1].savings.report())
    assert printed[-4:] == [line.replace("█", "?") for line in lines_of("frozen, budget 0.75", parts)]
    assert "??" in printed[-1]


def test_flags_arrive(folder, dense, capsys, monkeypatch):
    """A flag that is parsed and then forgotten."""
    outputs, asked, real = {}, [], generate

    def spy(model, prompts, n, policy, **how):
        asked.append((policy, how["compute"], model.lm_head.weight.dtype, n))
        return real(model, prompts, n, policy, **how)
    monkeypatch.setattr(program, "generate", spy)
    for name, flags in dict(
            greedy={}, hot=dict(temperature=3.0), again=dict(temperature=3.0), seed=dict(temperature=3.0, seed=1),
            k=dict(temperature=3.0, top_k=1), p=dict(temperature=3.0, top_p=1e-9), random=dict(policy="random"),
            bf16=dict(dtype="bfloat16"), masked=dict(compute="masked"), none=dict(policy="none"),
            dense=dict(model=dense), mlp=dict(policy="batch", skip="mlp", kv="dense")).items():
        assert main(command(folder, "--prompt", "Tom has 12 eggs", **{"max_new_tokens": 30, **flags})) == 0
        outputs[name] = capsys.readouterr().out
    seen = dict(zip(outputs, asked))
    assert {n for _, _, _, n in asked} == {30} and (seen["mlp"][0].skip, seen["mlp"][0].kv) == ("mlp", "dense")
    assert [name for name in seen if seen[name][1] == "masked"] == ["masked"]
    assert [name for name in seen if seen[name][2] == torch.bfloat16] == ["bf16"]
    text = {name: re.split(r"\n\n(?=\w+, budget )", out)[0] for name, out in outputs.items()}
    assert text["hot"] == text["again"] != text["seed"]
    assert text["k"] == text["p"] == text["greedy"] == text["masked"] != text["hot"]
    assert "random, budget 0.9" in outputs["random"] and "none, budget 1.0" in outputs["dense"]
    assert "batch, budget 0.9" in outputs["mlp"]
    assert outputs["masked"].count("MACs saved if run compact") == 3     # of all, of the prompt, of the answer
    assert "if run compact" not in outputs["greedy"]


@pytest.mark.parametrize("flags, complaint", [
    (dict(budget=0), "--budget: budget 0.0 is outside (0, 1]: "), (dict(budget=1.5), "--budget: budget 1.5"),
    (dict(budget="nan"), "--budget: budget nan"), (dict(budget=-1), "--budget: budget -1.0"),
    (dict(budget="inf"), "--budget: budget inf"), (dict(max_new_tokens=0), "--max-new-tokens: '0'"),
    (dict(temperature=-1), "--temperature: '-1'"), (dict(temperature="nan"), "--temperature: 'nan'"),
    (dict(top_k=-1), "--top-k: '-1'"), (dict(top_p=0), "--top-p: '0'"), (dict(top_p="nan"), "--top-p: 'nan'"),
    (dict(max_new_tokens=600), "positions"), (dict(budget=0.6), "smallest calibrated"),
    (dict(kv="dense"), "calibrated with"), (dict(model="missing"), "missing does not exist"),
    (dict(question="\ud800"), "a --question is not UTF-8 text"),
])
def test_bad_flags_are_told_in_one_line(folder, flags, complaint):
    """A traceback, or worse: a text that was generated with something else than asked."""
    with pytest.raises(InputError) as error:
        main(command(folder, "--prompt", "x", **flags))
    assert complaint in str(error.value) and "\n" not in str(error.value)


def test_nothing_to_do(folder):
    """An empty batch that runs into the model."""
    with pytest.raises(InputError, match="give --prompt TEXT or --question TEXT"):
        main(command(folder))


def test_the_program_exits_with_one_line(folder, tmp_path):
    """An exit code of 0 after an error, or a traceback in place of the line."""
    argv = words("--prompt", "x", model=folder, budget=0.6, device="cpu")
    bad = subprocess.run([sys.executable, ROOT / "generate.py", *argv], capture_output=True, text=True, timeout=600,
                         cwd=tmp_path)
    assert bad.returncode == 1 and bad.stdout == ""
    device, error = bad.stderr.splitlines()
    assert device.startswith("device: cpu")
    assert error.startswith("error: budget 0.6 is below the smallest calibrated one, 0.7")
