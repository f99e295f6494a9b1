"""Tests of skip_map.py and its page: the numbers in it, what a text may hold, what it must not need, and its flags."""
import json
import re
from base64 import b64decode
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import by_hand
import generate as program
import skip_map
from branches import lines_of
from conftest import Synchronisations, both_kv, build, complaint, families, frozen, llama, tokens
from gates import SkipPolicy
from generate import generate, main
from load_weights import load_model, load_tokenizer
from savings import savings_line
from skip_map import page, run_of, sources, write_page
from test_generate import command, folder
from thresholds import make_policy
from tokens import encode

assert folder                                                    # a fixture: a calibrated model of two layers


class Page(HTMLParser):
    """A page as a browser takes it apart: tags, ids, links, and the JSON in its <script id="data">."""

    def __init__(self, path):
        super().__init__()
        self.text = path.read_text(encoding="utf-8")
        self.tags, self.ids, self.links, self.scripts = [], [], [], []
        self.feed(self.text)
        self.close()
        self.data = json.loads(self.scripts[0])

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.ids += [value for name, value in attributes if name == "id"]
        self.links += [value for name, value in attributes if name in ("src", "href", "action", "srcset", "data")]
        self.scripts += [""] if tag == "script" else []

    def handle_data(self, text):
        if self.tags and self.tags[-1] == "script":
            self.scripts[-1] += text


def unpacked(text, rows):
    return np.frombuffer(b64decode(text), "<u2").reshape(rows, -1).tolist()


def mapped(model, policy, prompt, n=8):
    """(token ids that ran, run_of): a generation watched, its tokens spelled as numbers."""
    traces = []
    new = generate(model, [prompt], n, policy, on_pass=traces.append).tokens[0]
    spelled = [str(token) for token in prompt + new]
    return prompt + new[:-1], run_of(model.config, policy, traces, spelled, len(prompt), "")


# Numbers.

@families
@both_kv
def test_numbers_are_those_of_one_pass_over_the_text(family, kv, tmp_path):
    """Scores of another token or branch, attention taken for the MLP, the answer's columns shifted by one, a share of
    work that counts branches: a frozen policy decides in one pass over prompt and answer as it did step by step."""
    model = build(family())
    policy = frozen(model, tokens(4, 12), kv=kv)
    ids, run = mapped(model, policy, tokens(1, 7, 5)[0].tolist())
    write_page(tmp_path / "m.html", "toy", [run])
    (run,), trace = Page(tmp_path / "m.html").data["runs"], model(torch.tensor([ids]), policy=policy)[1]
    assert run["tokens"][:-1] == [str(token) for token in ids] and (run["prompt"], len(run["work"])) == (7, len(ids))
    assert run["keep"] == ["".join("01"[k] for k in keep[0].tolist()) for keep in trace.keep]
    for row, scores in zip(unpacked(run["scores"], 8), trace.scores, strict=True):
        assert [s / 10000 for s in row] == pytest.approx(scores[0].tolist(), abs=5.01e-5)
    assert run["thresholds"] == pytest.approx(policy.thresholds, abs=5.01e-5)
    c = model.config
    costs = [2 * c.hidden_size * (c.num_attention_heads + c.num_key_value_heads) * c.head_dim,
             3 * c.hidden_size * c.intermediate_size] * 4
    for token, share in enumerate(run["work"]):
        ran = sum(cost for cost, keep in zip(costs, trace.keep) if keep[0, token])
        assert share == pytest.approx(ran / sum(costs), abs=5.01e-5)
    assert 0 < min(run["work"]) < max(run["work"]) and costs[0] != costs[1]


@both_kv
def test_keys_and_values_come_from_where_the_loops_took_them(kv):
    """A run of skips that copies from the layer next below, which has only a copy; layer 0 that copies from the last;
    K and V of `dense` called copies."""
    model = build(llama())
    policy = frozen(model, tokens(4, 12), share=0.6, kv=kv)
    ids, run = mapped(model, policy, tokens(1, 7, 5)[0].tolist())
    KV = by_hand.forward(model, ids, thresholds=policy.thresholds, kv=kv)[3]
    first = lambda layer, token: next(low for low in range(layer + 1) if KV[low][token] is KV[layer][token])
    expected = [[first(layer, token) for token in range(len(ids))] for layer in range(4)]
    assert unpacked(run["source"], 4) == expected
    depth = max(layer - low for layer, row in enumerate(expected) for low in row)
    assert depth >= 2 if kv == "copy_up" else depth == 0


def test_sources_by_hand():
    """The MLPs' masks read as attention's."""
    no, yes = [False, True], [True, False]                       # attention by layer: yes, no, no, yes; MLPs: all no
    none = [False, False]
    assert sources([yes, none, no, none, no, none, yes, none], "copy_up") == [[0, 0], [0, 1], [0, 2], [3, 2]]
    assert sources([no, none, none, none], "copy_up") == [[0, 0], [0, 0]]        # layer 0 computes its own
    assert sources([no, none, none, none], "dense") == [[0, 0], [1, 1]]


@pytest.mark.parametrize("policy, expected", [
    (SkipPolicy(), ["-"] * 8), (SkipPolicy("batch", 0.6), ["-"] * 8), (SkipPolicy("topk", 0.6), ["-"] * 8),
    (SkipPolicy("random", 0.6, generator=torch.Generator().manual_seed(0)), ["-"] * 8),
    (SkipPolicy("frozen", 0.6, "mlp", thresholds=[0.5, 0.12344, 0, 0.2, 0, 0.3, 0, 1.0]),
     ["never skipped", 0.1234, "never skipped", 0.2, "never skipped", 0.3, "never skipped", 1.0]),
    (SkipPolicy("frozen", 0.6, "layer", thresholds=[0.5] * 8), [0.5, "as its attention"] * 4),
    (SkipPolicy("batch", 0.6, "alternate"), ["never skipped", "never skipped", "-", "-"] * 2)])
def test_what_stands_where_no_threshold_is(policy, expected):
    """A threshold that nobody was held to."""
    ids, run = mapped(build(llama()), policy, tokens(1, 9)[0].tolist(), 3)
    assert run["thresholds"] == expected and len(unpacked(run["scores"], 8)[0]) == len(ids) == 11


def test_a_model_without_gates_has_no_scores():
    """A crash, or scores that were never made."""
    policy = SkipPolicy("random", 0.6, generator=torch.Generator().manual_seed(0))
    _, run = mapped(build(llama(None)), policy, [3, 4, 5, 6])
    assert run["scores"] is None and {*"".join(run["keep"])} == {"0", "1"}


def test_a_score_that_is_no_number_is_said_to_be_none():
    """A traceback after the whole generation, or NaN in the JSON, which no browser reads."""
    traces = [SimpleNamespace(scores=[torch.tensor([[float("nan"), 0.5]])] * 8, keep=[torch.ones(1, 2).bool()] * 8)]
    run = run_of(llama(), SkipPolicy(), traces, ["a", "b", "c"], 2, "")
    assert unpacked(run["scores"], 8) == [[65535, 5000]] * 8


def test_watching_costs_no_synchronisation():
    """A host that waits for the device once more in each pass, watched or not."""
    model, counts = build(llama()), []
    policy = frozen(model, tokens(4, 12))
    for watch in (None, [].append):
        with Synchronisations() as spy:
            generate(model, [[3, 4, 5]], 4, policy, on_pass=watch)
        counts.append(len(spy.seen))
    assert counts[0] == counts[1] > 0


# The page.

NASTY = ["</script><script>alert(1)</script>", "<!--", "&amp;", "\"'`\\", "\n", "\r\n", "\u2028\u2029", "", "日本", "\0",
         "DATA", "]]>", "\u202e", "a"]


def nasty_run(S=len(NASTY) - 1, branches=8, config=llama(), budget=1.0):
    scores = list(torch.rand(branches, 1, S, generator=torch.Generator().manual_seed(0)))
    traces = [SimpleNamespace(scores=scores, keep=[s > 1 - budget for s in scores])]
    return run_of(config, SkipPolicy("frozen", budget, thresholds=[1 - budget] * branches), traces,
                  [NASTY[i % len(NASTY)] for i in range(S + 1)], S // 2, "<b>\u2028")


def test_no_text_ends_the_data(tmp_path):
    """A token that closes the script and runs as one, or is shown as another; a line that ends a string."""
    run = nasty_run()
    write_page(tmp_path / "m.html", "</title>\udc80", [run])
    shown = Page(tmp_path / "m.html")
    assert shown.data == {"model": "</title>\udc80", "runs": [run]} and run["tokens"] == NASTY
    assert shown.tags.count("script") == 2 and "alert" not in "".join(shown.scripts[1:])
    assert shown.scripts[0].isascii() and "<" not in shown.scripts[0]
    plain = skip_map.PAGE.read_text(encoding="utf-8").split("DATA")
    assert len(plain) == 2 and [shown.text.index(plain[0]), shown.text.endswith(plain[1])] == [0, True]


def test_a_long_text_in_a_deep_model_is_a_small_page(tmp_path):
    """A page of many megabytes: 400 tokens, 60 branches, at seven budgets."""
    config = llama(num_hidden_layers=30)
    runs = [nasty_run(400, 60, config, budget) for budget in (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.45)]
    for some, most in ((runs[:1], 200_000), (runs, 1_000_000)):
        write_page(tmp_path / "m.html", "x", some)
        assert (tmp_path / "m.html").stat().st_size < most


def test_the_page_needs_nothing_else(tmp_path):
    """A script, a style, a font or a picture from elsewhere; a browser that would be allowed to fetch one."""
    write_page(tmp_path / "m.html", "x", [mapped(build(llama()), SkipPolicy(), [1, 2])[1]])
    shown = Page(tmp_path / "m.html")
    assert shown.links == ["data:,"] and not re.search(r"https?:|url\(|@import|fetch\(|XMLHttp|[\"'`]//", shown.text)
    assert "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:" in shown.text
    assert not {"iframe", "img", "object", "embed", "base", "form"} & set(shown.tags)


def test_script_and_page_know_each_other(tmp_path):
    """An element renamed on one side, which shows in a browser only; a number that nothing shows."""
    run = nasty_run()
    write_page(tmp_path / "m.html", "x", [run])
    shown = Page(tmp_path / "m.html")
    asked = set(re.findall(r'\$\("(\w+)"\)', shown.scripts[1]))
    assert asked <= set(shown.ids) and len(asked) > 8 and len(shown.ids) == len(set(shown.ids))
    assert [key for key in run if not re.search(rf"\b(?:run|r)\.{key}\b", shown.scripts[1])] == []


# The command line.

def shown_by(tmp_path):
    assert [path.name for path in tmp_path.iterdir()] == ["m.html"]
    return Page(tmp_path / "m.html")


def test_a_page_for_several_budgets(folder, tmp_path, capsys):
    """A budget under another's number, texts of one budget under all, an order that is not the one asked for; a page
    that says something else than the terminal."""
    asked = ["--budgets", "0.9", "1.0", "0.7", "0.9"]
    assert main(command(folder, *asked, prompt="Tom has 12 eggs", html=tmp_path / "m.html", temperature=9.0)) == 0
    printed, data = capsys.readouterr().out, shown_by(tmp_path).data
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    ids = encode(tokenizer, "Tom has 12 eggs")
    assert data["model"] == str(folder) and [run["budget"] for run in data["runs"]] == [0.9, 1.0, 0.7]
    blocks = re.split(r"--- budget (\S+)\n", printed.removesuffix(f"written: {tmp_path / 'm.html'}\n"))
    assert blocks[0] == "" and blocks[1::2] == ["0.9", "1", "0.7"]
    for run, block in zip(data["runs"], blocks[2::2], strict=True):
        sampling = program.Sampling(9.0, generator=torch.Generator().manual_seed(0))
        policy = make_policy(model.config, "auto", run["budget"])
        result = generate(model, [ids], 12, policy, set(model.config.eos_ids), sampling)
        assert "".join(run["tokens"]) == tokenizer.decode(ids + result.tokens[0], skip_special_tokens=False)
        assert run["summary"] == (f"{policy.kind}, budget {policy.budget}: " + savings_line(result.savings.report()))
        assert block == f"{tokenizer.decode(ids + result.tokens[0])}\n\n{run['summary']}\n"
        counts = [sum(keep[token] == "1" for keep in run["keep"]) / 4 for token in range(len(result.ran[0]))]
        assert counts == pytest.approx(result.ran[0]) and run["prompt"] == len(ids)
    assert len({tuple(run["tokens"]) for run in data["runs"]}) > 1


def test_the_same_command_writes_the_same_page(folder, tmp_path, capsys):
    """A date, or an order that changes; a text that --html changes."""
    argv = command(folder, prompt="Tom has 12 eggs", policy="random", budget=0.7)
    assert main(argv) == 0
    without, pages = capsys.readouterr().out, []
    for _ in range(2):
        assert main([*argv, "--html", str(tmp_path / "m.html")]) == 0
        assert capsys.readouterr().out == without + f"written: {tmp_path / 'm.html'}\n"
        pages.append(shown_by(tmp_path).text)
    assert pages[0] == pages[1]


def test_half_characters_and_the_only_budget(folder, tmp_path):
    """A character of several tokens that is lost or shown as question marks; budgets that come to the same twice."""
    flags = dict(prompt="naïve 5 €", policy="none", html=tmp_path / "m.html")
    assert main(command(folder, "--budgets", "1.0", "0.7", **flags)) == 0
    (run,) = shown_by(tmp_path).data["runs"]
    assert run["budget"] == 1.0 and "" in run["tokens"] and "".join(run["tokens"]).startswith("<bos>naïve 5 €")
    assert "\ufffd" not in "".join(run["tokens"][:run["prompt"]])


def test_shares_of_each_branch_for_each_budget(folder, tmp_path, capsys):
    """A picture that each budget overwrites, and the kind of the last one over all of them."""
    files = dict(html=tmp_path / "m.html", show_branches=tmp_path / "b.png")
    assert main(command(folder, "--budgets", "0.7", "1.0", prompt="Tom has", **files)) == 0
    printed = capsys.readouterr().out
    assert re.findall(r"\n(\w+, budget \S+): share", printed) == ["frozen, budget 0.7", "frozen, budget 1"]
    assert lines_of("frozen, budget 1", {"all": [1.0] * 4})[0] in printed and (tmp_path / "b.png").stat().st_size > 0


def test_refused_before_a_model_is_loaded(tmp_path, monkeypatch):
    """Minutes of generation for a page that cannot be written, or shows one of several texts; a folder made on the way,
    or a file left behind."""
    monkeypatch.setattr(program, "load_model", None)
    (tmp_path / "d.html").mkdir()
    (tmp_path / "kept.html.tmp").touch()                         # the user's own
    (tmp_path / "file").touch()
    good = tmp_path / "m.html"
    for argv, why in (
            (["--html", tmp_path / "m.htm"], "m.htm must end in .html"), (["--html", ""], "must end in .html"),
            (["--html", tmp_path / "none" / "m.html"], "m.html cannot be written (there is no folder"),
            (["--html", tmp_path / "file" / "m.html"], "cannot be written (Not a directory)"),
            (["--html", tmp_path / "d.html"], "d.html cannot be written (it is a folder)"),
            (["--html", tmp_path / ("a" * 252 + ".html")], "(File name too long)"),
            (["--html", tmp_path / "kept.html"], "kept.html.tmp is in the way)"),
            (["--html", good, "--prompt", "y"], "m.html shows one text: give one --prompt or --question"),
            (["--html", good, "--budget", 0.9, "--budgets", 0.8], "--budgets: not allowed with argument --budget"),
            (["--html", good, "--budgets", 0.9, 1.5], "--budgets: budget 1.5 is outside (0, 1]"),
            (["--html", good, "--budgets"], "--budgets: expected at least one argument"),
            (["--budgets", 0.9], "--budgets is for --html FILE")):
        assert why in complaint(main, command("m", "--prompt", "x", *map(str, argv)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d.html", "file", "kept.html.tmp"]
    good.write_text("old")
    assert page(str(good)) == str(good) and good.read_text() == "old" and len(list(tmp_path.iterdir())) == 4


def test_nothing_is_left_of_what_failed(folder, tmp_path, monkeypatch):
    """A budget that cannot be run, found out after the first ones; half a page, or the old one gone, when one fails."""
    flags = dict(prompt="Tom has", html=tmp_path / "m.html")
    (tmp_path / "m.html").write_text("old")
    with monkeypatch.context() as m:
        m.setattr(program, "generate", None)                     # nothing is generated
        said = complaint(main, command(folder, "--budgets", "1.0", "0.6", **flags))
    assert said.startswith("budget 0.6 is below the smallest calibrated one, 0.7")
    run, real = [], generate

    def fails(*args, **how):
        run.append(1)
        if len(run) == 2:
            raise KeyboardInterrupt
        return real(*args, **how)
    monkeypatch.setattr(program, "generate", fails)
    with pytest.raises(KeyboardInterrupt):
        main(command(folder, "--budgets", "1.0", "0.7", **flags))
    assert len(run) == 2 and shown_old(tmp_path)
    monkeypatch.setattr(program, "generate", real)
    monkeypatch.setattr("skip_map.PAGE", SimpleNamespace(read_text=lambda **_: (_ for _ in ()).throw(OSError(5, "x"))))
    with pytest.raises(OSError):
        main(command(folder, **flags))
    assert shown_old(tmp_path)


def shown_old(tmp_path):
    return [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("m.html", "old")]
