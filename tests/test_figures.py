"""Tests of paper/collected.py and of the figures of gates: figure2_heat_map.py to figure6_densities.py."""
import json
import re
import sys

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from conftest import build, complaint, llama
from data import encode_example, make_tokenizer
from gates import GateConfig, SkipPolicy
from generate import generate
from load_weights import save_model
from problems import arithmetic
from thresholds import frozen_threshold
from toy_runs import ROOT, toy

sys.path.insert(0, str(ROOT / "paper"))
import figure2_heat_map
import figure3_top_tokens
import figure4_token_types
import figure6_densities
from collected import collect, read_texts, spelled, visible
from figure3_top_tokens import means_by_id, top
from figure4_token_types import TYPES, means_by_type, types_of
from figure6_densities import bandwidth, density, places, thresholds_of

TEXTS = [([5, 9, 13, 20, 7, 3], [False, False, True, True, True, True]), ([8, 11, 30, 2], [False, False, True, True]),
         ([0, 5, 13], [False, False, False])]                    # id 0 is what padding is written as, too
IDS = [i for ids, _ in TEXTS for i in ids]
FIGURES = {figure2_heat_map: "heat_map", figure3_top_tokens: "tokens", figure4_token_types: "types",
           figure6_densities: "densities"}


# What is collected.

@torch.no_grad()
@pytest.mark.parametrize("form", ["vector", "scalar"])
def test_collected_equals_one_text_after_the_other(form):
    """Padding that is collected, or told from tokens by its id; texts, tokens or branches out of order; a sum over
    channels for their mean; positions of the batch; skipped pairs that are said to have run."""
    model, scores, kept = build(llama(GateConfig(form), num_hidden_layers=2)), [[] for _ in range(4)], []
    taus = [frozen_threshold(s.flatten(), 0.4) for s in model(torch.tensor([TEXTS[0][0]]))[1].scores]
    policy = SkipPolicy("frozen", 0.6, thresholds=taus)
    for ids, _ in TEXTS:
        trace = model(torch.tensor([ids]), policy=policy, keep_gates=True)[1]
        for branch, gate in enumerate(trace.gates):
            for token in range(len(ids)):
                scores[branch].append(sum(gate[0, token].tolist()) / gate.shape[-1])
        kept.append(torch.cat(trace.keep))
    m = collect(model, TEXTS, policy)
    assert m.scores.shape == (4, 13) and m.scores.dtype == torch.float64 and 0 < m.scores.min() < m.scores.max() < 1
    assert (m.scores - torch.tensor(scores, dtype=torch.float64)).abs().max() < 1e-12
    assert torch.equal(m.kept, torch.cat(kept, 1)) and not m.kept.all()
    assert m.ids.tolist() == IDS and m.positions.tolist() == [*range(6), *range(4), *range(3)]
    assert m.answer.tolist() == [x for _, answer in TEXTS for x in answer]


def test_fresh_gates_are_nearly_open(tmp_path):
    """Gates read before the sigmoid, or the bias forgotten: a fresh one is sigmoid(5) = 0.9933."""
    model = toy(tmp_path, GateConfig())[0]
    assert (collect(model, TEXTS).scores - torch.tensor(5.0).sigmoid()).abs().max() < 1e-3


def test_texts_are_what_generation_reads(tmp_path):
    """Gold answers in place of generated ones; the last token, which no pass reads, among the rest; gates of a finished
    text that are not those of its generation; prompts counted as answers."""
    model, tokenizer = toy(tmp_path / "run", GateConfig("scalar"))
    model.load_state_dict(build(model.config, dtype=torch.float32).state_dict())
    save_model(model, tmp_path / "run", tokenizer)
    args = figure3_top_tokens.figure_flags("x").parse_args(
        f"--model {tmp_path}/run --out {tmp_path}/a.png --answers generated --max-new-tokens 5 --device cpu".split())
    examples, traces = arithmetic(3, "test"), []
    model, tokenizer, policy, texts = read_texts(args, examples)
    m, n = collect(model, texts, policy), len(texts[0][0])
    prompt = texts[0][0][:texts[0][1].index(True)]
    new = generate(model, [prompt], 5, policy, set(model.config.eos_ids), on_pass=traces.append).tokens[0]
    assert texts[0] == (prompt + new[:-1], [False] * len(prompt) + [True] * (len(new) - 1)) and len(new) > 1
    seen = torch.cat([torch.stack(trace.scores)[:, 0] for trace in traces], 1)
    assert seen.shape == (4, n) and (m.scores[:, :n] - seen).abs().max() < 1e-5
    args.answers = "gold"
    assert read_texts(args, examples)[3] == [
        (ids[:-1], mask[:-1]) for ids, mask in (encode_example(tokenizer, e, 1) for e in examples)]
    assert not any(read_texts(args, ["Tom has 3 pens."])[3][0][1])               # plain text has no answer
    args.answers = "generated"
    assert "--answers generated" in complaint(read_texts, args, ["Tom has 3 pens."])


# What is made of it.

def test_means_by_id_equal_a_loop():
    """Another token's gates, position 0 left in, the population's deviation, a rare token on top, the lowest first."""
    gates = torch.rand(13, generator=torch.Generator().manual_seed(0)).double()
    ids, of = torch.tensor(IDS), {i: [] for i in IDS}
    for i, gate in zip(IDS, gates.tolist()):
        of[i].append(gate)
    for i, count, mean, error in zip(*(x.tolist() for x in means_by_id(ids, gates))):
        x = of.pop(i)
        assert (count, mean) == (len(x), pytest.approx(np.mean(x), abs=1e-12))
        assert error == pytest.approx(np.std(x, ddof=1) / len(x) ** 0.5) if count > 1 else np.isnan(error)
    assert not of
    both = sorted((float(gates[ids == i].mean()) for i in (5, 13)), reverse=True)
    assert [row[2] for row in top(ids, gates, 9, 2)] == pytest.approx(both) and len(top(ids, gates, 3, 1)) == 3


def test_means_by_type_equal_a_loop():
    """A mean over layers or over types of means; a type without tokens that is 0 or takes another's place."""
    scores, groups = torch.rand(4, 13, generator=torch.Generator().manual_seed(0)).double(), [0, 3, 0, 1] * 3 + [3]
    means, counts = means_by_type(scores, torch.tensor(groups), 5)
    for group in range(5):
        at = [i for i, g in enumerate(groups) if g == group]
        assert counts[group] == len(at)
        for branch in range(4):
            expected = sum(scores[branch, i].item() for i in at) / len(at) if at else float("nan")
            assert means[branch, group].item() == pytest.approx(expected, abs=1e-12, nan_ok=True)


def of_bytes():
    """A tokenizer whose every token is one byte, and <bos>."""
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(False, use_regex=False), decoders.ByteLevel()
    tokenizer.add_special_tokens(["<bos>"])
    return tokenizer


def test_each_part_of_a_word_has_the_words_type():
    """Types read off single tokens ("o" and "f" are no "of"); half a character of no type; BOS as a mark and a word."""
    tokenizer, word, blank = of_bytes(), "other word", "blank"
    text = [("Of", "function word"), (" ", blank), ("the", "function word"), (" ", blank), ("1,250.5", "number"),
            (" ", blank), ("cafés", word), (" ", blank), ("$", "mark"), ("3", "number"), (" ", blank), ("isn’t", word),
            (" ", blank), ("x", word), ("÷=", "mark"), ("2", "number"), (".\n", "mark"), ("Official", word)]
    ids = [tokenizer.token_to_id("<bos>"), *tokenizer.encode("".join(part for part, _ in text)).ids]
    wanted = ["special", *(kind for part, kind in text for _ in part.encode())]
    wanted[-len("\nOfficial")] = blank                           # a token of its own here
    assert [TYPES[i] for i in types_of(tokenizer, ids)] == wanted
    for n in range(len(ids)):                                    # some end within a character
        assert len(types_of(tokenizer, ids[:n])) == n


def test_types_of_the_built_in_problems():
    """A space of its own in front of a number, digit by digit, told from the number or from a mark."""
    tokenizer = make_tokenizer()
    ids = tokenizer.encode("Question: Tom has 31 pens.\n#### 4").ids
    said = "special, other word, mark, other word, function word, blank, number, number, other word, " \
           "mark, blank, mark, blank, number"
    assert [TYPES[i] for i in types_of(tokenizer, ids)] == said.split(", ")


def test_density_is_a_double_loop_and_integrates_to_one():
    """A constant, a power or a deviation of another rule; a grid that cuts a tail off; a division by zero."""
    rng = np.random.default_rng(0)
    two = np.concatenate([rng.normal(0.1, 0.01, 60), rng.normal(0.9, 0.02, 30)])
    h = (sum((a - two.mean()) ** 2 for a in two) / 89) ** 0.5 * 90 ** -0.2
    assert bandwidth(two) == pytest.approx(h)
    at = places(two)
    loop = [sum(np.exp(-(place - a) ** 2 / (2 * h * h)) / (2 * np.pi * h * h) ** 0.5 for a in two) / 90 for place in at]
    assert np.abs(density(two, at) - loop).max() < 1e-12
    outlier = np.append(rng.normal(0.02, 0.001, 2000), 1.0)
    for x in two, outlier, np.full(7, 0.5), np.array([0.3]):
        assert density(x, at := places(x)).sum() * (at[1] - at[0]) == pytest.approx(1, abs=1e-3)


def test_thresholds_are_those_of_branches_that_skip():
    """A line at 0 for a branch that never skips, at budget 1, or budgets ordered as text; one threshold not for all."""
    config = llama(num_hidden_layers=2)
    assert thresholds_of(config) == {}
    config.gateskip = {"skip": "attn", "thresholds": {"1.0": [0.0] * 4, "5e-05": [0.2, 0, 0.3, 0], "0.95": [0.1] * 4}}
    assert list(thresholds_of(config).items()) == [("0.95", [0.1, None] * 2), ("5e-05", [0.2, None, 0.3, None])]
    config.gateskip = {"thresholds": {"1.0": [0.1], "0.5": [0.2]}}
    assert thresholds_of(config) == {"0.5": [0.2] * 4}


def test_labels_can_be_read():
    """A label of blanks, a formula in place of dollars, tokens that lose the space in front of them."""
    assert visible(" $5\n\t\x07") == r"␣\$5↵⇥�"
    tokenizer = of_bytes()
    assert [spelled(tokenizer, tokenizer.token_to_id(name)) for name in ("<bos>", "Ġ", "a")] == ["<bos>", " ", "a"]
    embedded = make_tokenizer()
    assert [spelled(embedded, i) for i in embedded.encode("Tom has 3").ids][-3:] == [" has", " ", "3"]


# The commands.

@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with a calibrated toy, one that is not calibrated, and one without gates."""
    base = tmp_path_factory.mktemp("runs")
    for name, gate in (("gated", GateConfig("scalar")), ("plain", GateConfig("scalar")), ("dense", None)):
        model, tokenizer = toy(base / name, gate)
        if gate:                                                 # the toy's own would all be alike
            model.load_state_dict(build(model.config, dtype=torch.float32).state_dict())
        if name == "gated":
            model.config.gateskip = {"skip": "all", "kv": "copy_up", "thresholds": {"1.0": [0.1] * 4, "0.6": [0.6] * 4}}
        save_model(model, base / name, tokenizer)
    return base


def words(base, out, *more, model="gated"):
    return ["--model", str(base / model), "--limit", "12", "--device", "cpu", "--out", str(out), *map(str, more)]


@pytest.mark.parametrize("script", FIGURES, ids=lambda script: script.__name__)
def test_commands_write_a_picture_and_its_numbers(script, runs, tmp_path, capsys):
    """A command that ends in a traceback, or without numbers to read again; its own files that it will not replace."""
    for more in ((), ("--budget", "0.6")):
        all_of_them = ("--top", 400, "--min-count", 12) if script is figure3_top_tokens else ()
        assert script.main(words(runs, tmp_path / "a.png", *more, *all_of_them)) == 0
        stored = json.loads((tmp_path / "a.json").read_text())
        assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG" and stored["digest"] and stored["limit"] == 12
        numbers, printed = stored[FIGURES[script]], capsys.readouterr().out
        assert len(printed.splitlines()) > 4 and str(tmp_path / "a.png") in printed
        if script is figure2_heat_map:
            assert [len(numbers[key]) for key in ("tokens", "attention", "MLP", "kept")] == [12, 2, 2, 4]
            assert (0 in sum(numbers["kept"], [])) == bool(more)
        elif script is figure3_top_tokens:
            with_first, without = ([row["token"] for row in panel["top"]] for panel in numbers.values())
            assert [token for token in with_first if token not in without] == ["<bos>"] and len(without) > 9
        elif script is figure4_token_types:
            assert {len(row["MLP"]) for row in numbers.values()} == {2} and numbers["prompt: special"]["count"] == 12
        else:
            assert numbers["branch"] == 2 and numbers["thresholds"] == {"0.6": [0.6] * 4}
            assert len(numbers["percentiles"]) == 5


def test_a_text_of_ones_own(runs, tmp_path):
    """--text put into the template, without its BOS, or with an end token that nobody wrote."""
    figure2_heat_map.main(words(runs, tmp_path / "a.png", "--text", "Tom has 3 pens."))
    found = json.loads((tmp_path / "a.json").read_text())["heat_map"]
    assert found["ids"] == make_tokenizer().encode("Tom has 3 pens.").ids and not any(found["answer"])


@pytest.mark.parametrize("script", FIGURES, ids=lambda script: script.__name__)
def test_what_is_wrong_is_said_in_one_line(script, runs, tmp_path, monkeypatch):
    """A traceback; a mistake that is found after the work; somebody else's file written over."""
    monkeypatch.setattr(script, "collect", None)
    (tmp_path / "mine.json").write_text('{"command": "mine"}')
    good = tmp_path / "a.png"
    cases = {"has no gates": words(runs, good, model="dense"), "--out": words(runs, tmp_path / "no" / "a.png"),
             "must end in .png": words(runs, tmp_path / "a.pdf"), "--limit": words(runs, good, "--limit", 0),
             "is no file of this": words(runs, tmp_path / "mine.png"), "is empty": words(runs, ""),
             "is not calibrated": words(runs, good, "--budget", "0.6", model="plain"),
             "below the smallest": words(runs, good, "--budget", "0.3"), "nothing.jsonl": words(
                 runs, good, "--data", tmp_path / "nothing.jsonl")}
    for said, command in cases.items():
        assert said in complaint(script.main, command), said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.json"]


@pytest.mark.parametrize("script, flag, value", [(figure2_heat_map, "--problem", 1001),
                                                 (figure3_top_tokens, "--min-count", 9999),
                                                 (figure6_densities, "--branch", 4)])
def test_more_than_there_is(script, flag, value, runs, tmp_path):
    """An empty figure, or an index that is out of range: the flag is named."""
    data = tmp_path / "few.jsonl"
    data.write_text("".join(json.dumps({"question": e.question, "answer": f"{e.reasoning}\n#### {e.answer}"}) + "\n"
                            for e in arithmetic(3, "test")))
    said = complaint(script.main, words(runs, tmp_path / "a.png", "--data", data, flag, value))
    assert re.match(f"{flag} {value}: ", said)
