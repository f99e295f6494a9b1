"""score.py and evaluate.py: scores against a plain loop, what sharing and batches may change, and the command."""
import json
import math
import shutil
import sys

import pytest
import torch

from conftest import VOCAB, build, complaint, frozen, gemma, llama, tokens
from gates import SkipPolicy
from generate import Generation, generate
from load_weights import load_model, load_tokenizer, save_model
from savings import Savings
from thresholds import make_policy
from toy_runs import ROOT, TINY, toy, words

sys.path.insert(0, str(ROOT / "paper"))

import evaluate
import score
import task_scores
import task_table
from score import batches, common, encode_pair, log_likelihoods
from tasks import TASKS, Doc

FAMILIES = {"llama": llama, "gemma": gemma}


def questions():
    """Ids of questions with choices: of one token, of several, of other contexts, equal ones, one a part of another."""
    draw = torch.Generator().manual_seed(3)
    ids = lambda n: torch.randint(0, VOCAB, (n,), generator=draw).tolist()
    long, short = ids(9), ids(3)
    return [[(long, [a]) for a in (5, 6, 7)], [(short, ids(n)) for n in (4, 1, 6)], [(long + [1], [8, 9]), (long, [1])],
            [(long[:4] + ids(2), [3, 4]), (long[:4] + ids(3), [3, 4])], [(short, [11, 12]), (short, [11, 12, 13])],
            [(ids(2), [2]), (ids(5), [2, 3])], [(long, [5])]]


def by_hand(model, policy):
    """One row at a time, whole, masked; the sum of log-softmax picks."""
    found = []
    for question in questions():
        found.append([])
        for context, rest in question:
            logp = model(torch.tensor([context + rest]), policy=policy)[0][0].double().log_softmax(-1)       # (S, V)
            at = range(len(context) - 1, len(context) + len(rest) - 1)
            found[-1].append((sum(logp[i, token].item() for i, token in zip(at, rest)),
                              all(logp[i].argmax() == token for i, token in zip(at, rest))))
    return found


def same(a, b, tolerance=1e-8):
    return all(len(x) == len(y) and all(abs(s - t) < tolerance and g == h for (s, g), (t, h) in zip(x, y))
               for x, y in zip(a, b, strict=True))


def run_all(model, policy, size, share=True, order=None):
    savings, asked = Savings(model.config), questions()
    return log_likelihoods(model, policy, [asked[i] for i in order or range(7)], size, savings, share), savings.report()


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["none", "frozen"])
def test_frozen_scores_are_those_of_a_plain_loop(family, kind):
    """A choice that reads another's rest, a border off by one, padding that is seen, a batch that matters."""
    model = build(FAMILIES[family](max_position_embeddings=32))
    policy = SkipPolicy() if kind == "none" else frozen(model, tokens(3, 12))
    wanted = by_hand(model, policy)
    for size in (1, 3, 8, 100):
        for share in (True, False):
            found, saved = run_all(model, policy, size, share)
            assert same(found, wanted), (size, share)
            assert (saved["skipped"] > 0.1) == (kind == "frozen")


@torch.no_grad()
@pytest.mark.parametrize("kind", ["none", "frozen"])
def test_frozen_scores_do_not_depend_on_the_order(kind):
    """A score, or a saving, that another order of the questions changes."""
    model = build(llama(max_position_embeddings=32))
    policy = SkipPolicy() if kind == "none" else frozen(model, tokens(3, 12))
    found, saved = run_all(model, policy, 3)
    for order in ([6, 5, 4, 3, 2, 1, 0], [3, 0, 6, 2, 5, 1, 4]):
        others, again = run_all(model, policy, 3, order=order)
        assert same(others, [found[i] for i in order]) and again["skipped"] == saved["skipped"]


@torch.no_grad()
def test_batch_scores_depend_on_the_batch():
    """A quantile that is none of the batch's, and a promise that nobody could keep."""
    model = build(llama(max_position_embeddings=32))
    policy = make_policy(model.config, "batch", 0.7)
    one, again, other = (run_all(model, policy, size)[0] for size in (3, 3, 8))
    assert same(one, again) and not same(one, other, 1e-3)
    assert same(run_all(model, make_policy(model.config, "batch", 1.0), 3)[0], by_hand(model, SkipPolicy()))


@torch.no_grad()
def test_what_choices_share_is_read_once():
    """A prefix per choice, or a row per letter."""
    model = build(llama(max_position_embeddings=32))
    alone, shared = (run_all(model, SkipPolicy(), 4, share)[1]["pairs"] / 8 for share in (False, True))
    rows = [{tuple((c + r)[:-1]) for c, r in question} for question in questions()]
    assert alone == sum(map(len, set().union(*rows)))            # every row once, whoever asks
    assert shared == 9 + (3 + 3 + 0 + 5) + (9 + 2) + (4 + 3 + 4) + (4 + 0 + 1) + (2 + 6)


@torch.no_grad()
def test_too_long_loses_tokens_on_the_left():
    """A continuation that is cut, or a question that is refused for its length."""
    model = build(llama(max_position_embeddings=6))
    context, rest = list(range(20, 30)), [3, 4, 5]
    (((found, _),),) = log_likelihoods(model, SkipPolicy(), [[(context, rest)]], 4, Savings(model.config))
    logp = model(torch.tensor([(context + rest)[-7:-1]]))[0][0].log_softmax(-1)
    assert found == pytest.approx(sum(logp[i, token].item() for i, token in zip((3, 4, 5), rest)))
    for question in ([([], [1])], [([1], [])], [([1], list(range(7)))]):
        assert "--bos" in complaint(log_likelihoods, model, SkipPolicy(), [question], 4, Savings(model.config))


def test_batches_and_prefixes():
    assert list(batches([(1,), (2, 2), (3,), (4, 4, 4, 4)], 3)) == [[(1,), (2, 2)], [(3,)], [(4, 4, 4, 4)]]
    assert common(((1, 2, 3), (1, 2), (1, 2, 4))) == 2 and common(((1,), (2,))) == 0


def test_context_and_continuation_are_encoded_together():
    """Blanks at the border that make other tokens; a second BOS; a token that straddles and is lost."""
    tokenizer = load_tokenizer(TINY)                             # it puts a BOS in front
    whole = score.encode(tokenizer, "Answer: 36")
    for pair in (("Answer:", " 36"), ("Answer: ", "36")):
        first, rest, straddles = encode_pair(tokenizer, *pair)
        assert first + rest == whole and first == score.encode(tokenizer, "Answer:") and not straddles
        assert encode_pair(tokenizer, *pair, bos=whole[0])[:2] == (first, rest)
    first, rest, straddles = encode_pair(tokenizer, "Answ", "er: 36")
    assert first + rest == whole and rest and straddles == (score.encode(tokenizer, "Answ") != whole[:len(first)])


def test_metrics_by_hand():
    """acc_norm by tokens, or with the space; the last of equals; a deviation over n."""
    docs = [Doc((("q", " ab"), ("q", " abcdefgh")), gold) for gold in (0, 1)]
    found = [[(-10.0, False), (-12.0, False)]] * 2
    metrics = task_scores.score_choices(TASKS["piqa"], docs, found)
    assert metrics == {"acc": [1.0, 0.0], "acc_norm": [0.0, 1.0]}
    assert task_scores.score_choices(TASKS["piqa"], docs[:1], [[(-3.0, False)] * 2])["acc"] == [1.0]
    out = task_scores.summary(TASKS["piqa"], docs, metrics, None)
    assert out["acc"] == 0.5 and out["acc_stderr"] == pytest.approx(0.5)         # sqrt(0.5) / sqrt(2)
    words = [Doc(), Doc(), Doc()]
    out = task_scores.summary(TASKS["lambada"], words, {"acc": [1.0, 0.0, 0.0], "log_likelihood": [-1, -2, -3]}, None)
    assert out["perplexity"] == pytest.approx(math.e ** 2)
    out = task_scores.summary(TASKS["wikitext"], words[:1], {"log_likelihood": [-6.0], "tokens": [3], "words": [2],
                                                          "bytes": [12]}, None)
    assert [out[f"{unit}_perplexity"] for unit in ("token", "word", "byte")] == pytest.approx(
        [math.exp(x) for x in (2, 3, 0.5)])


def test_windows_score_each_token_once():
    for n in (1, 4, 5, 8, 9):
        ids = list(range(10, 10 + n))
        found = task_scores.windows(ids, 7, 4)
        assert [token for _, rest in found for token in rest] == ids
        assert found[0][0] == [7] and all(context[-1] == rest[0] - 1 for context, rest in found[1:])
        assert all(len(rest) <= 4 for _, rest in found) and all(len(c) + len(r) == 5 for c, r in found[1:])


def test_groups_are_micro_means():
    """A subject of 100 questions that weighs as much as one of 300; savings that count questions, and not work."""
    three = {key: value for pair in zip(task_table.WEIGHTS.items(), (900, 2, 5000)) for key, value in zip(
        pair[0], (0.1, pair[1]))}
    rows = [{"task": name, "budget": 1.0, "n": 300, "acc": 0.0, **three} for name in task_table.GROUPS["mmlu_stem"]]
    rows[0] |= {"n": 100, "acc": 1.0, "pairs": 1800, "calls": 4, "macs_dense": 30_000, **dict.fromkeys(
        task_table.WEIGHTS, 0.4)}
    row, = task_table.grouped(rows)
    assert row["n"] == 5500 and row["acc"] == pytest.approx(100 / 5500)
    assert [row[key] for key in task_table.WEIGHTS] == pytest.approx([0.1 + 0.3 * x for x in (2 / 20, 2 / 20, 6 / 24)])
    assert task_table.grouped(rows[1:]) == []


# Generated answers.

def test_a_text_ends_at_its_stop_and_stops_nobody_else(tmp_path, monkeypatch):
    """A stop string left in, one that ends the batch, an end token in the text."""
    torch.manual_seed(0)
    model, tokenizer = toy(tmp_path)
    says = {0: "One.Question: two three", 1: "A longer answer than the other one", 2: "Ends here"}
    ids = {i: score.encode(tokenizer, text, front=False) for i, text in says.items()}
    ids[2] = ids[2] + [model.config.eos_ids[0], 5, 5]
    given = [0, 0, 0]

    def generate(model, prompts, room, policy, ends, on_token):
        for i in range(len(prompts)):
            for token in ids[i][:room]:
                given[i] += 1
                if on_token(i, token) or token in ends:
                    break
        return Generation([], Savings(model.config), [])
    monkeypatch.setattr(task_scores, "generate", generate)
    counted = Savings(model.config)
    texts = task_scores.written(model, tokenizer, [[1], [1], [1]], 100, None, ("Question:", "</s>"), counted)
    assert texts == ["One.", says[1], says[2]] and given[0] < len(ids[0]) and given[1] == len(ids[1])
    assert given[2] == len(ids[2]) - 2


def test_what_follows_a_stop_is_not_counted(base):
    """A text that ran on, ranked and counted, until the longest of its batch had ended."""
    model, tokenizer = load_model(base / "run"), load_tokenizer(base / "run")
    policy, prompts = make_policy(model.config, "frozen", 0.7), [score.encode(tokenizer, text) for text in (
        "Tom has 3 pens", "Ann")]
    found, (early, late) = [], generate(model, prompts, 12, policy).tokens
    stops = (task_scores.decode(tokenizer, early[:3], special=True),)
    assert stops[0] not in task_scores.decode(tokenizer, late, special=True)
    for asked in ([prompts[0]], [prompts[1]], prompts):
        found.append(savings := Savings(model.config))
        task_scores.written(model, tokenizer, asked, 12, policy, stops, savings)
    one, other, both = (savings.report() for savings in found)
    assert one["answer"]["pairs"] == 2 * 4 and other["answer"]["pairs"] == 11 * 4
    for part in ("prompt", "answer"):
        kept = [(1 - r[part]["skipped"]) * r[part]["pairs"] for r in (one, other, both)]
        assert both[part]["pairs"] == one[part]["pairs"] + other[part]["pairs"]
        assert kept[0] + kept[1] == pytest.approx(kept[2])


# The command.

@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A gated toy model with thresholds, and data of three tasks."""
    base = tmp_path_factory.mktemp("evaluate")
    torch.manual_seed(0)
    from gates import GateConfig
    model, tokenizer = toy(base / "run", GateConfig("scalar"))
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(0.0, 0.3, generator=torch.Generator().manual_seed(len(name)))
        table = frozen(model, tokens(2, 40) % 400, share=0.3).thresholds
    model.config.gateskip = {"skip": "all", "kv": "copy_up", "threshold": "branch",
                             "thresholds": {"1.0": [0.0] * 4, "0.7": table}}
    save_model(model, base / "run", tokenizer)
    lines = lambda rows: "".join(json.dumps(row) + "\n" for row in rows)
    (base / "piqa_valid.jsonl").write_text(lines({"goal": f"Tom has {i} pens", "sol1": "red", "sol2": "blue pens",
                                                  "label": i % 2} for i in range(7)))
    (base / "lambada_test.jsonl").write_text(lines({"text": f"Ann has {i} red pens"} for i in range(5)))
    (base / "test.jsonl").write_text(lines({"question": f"What is {i}?", "answer": f"#### {i}"} for i in range(4)))
    return base


def command(base, out, *switches, **flags):
    return words(*switches, **{"model": base / "run", "data": base, "out": out, "batch_size": 3, "max_new_tokens": 6,
                               "shots": 0, **flags})


def stored(out):
    return json.loads(out.read_text())["rows"]


def test_the_command(base, tmp_path, capsys, monkeypatch):
    """A row lost, measured twice, or of another task; figures that do not follow from the scores beside them."""
    tasks = ["--tasks", "piqa", "lambada", "gsm8k"]
    assert evaluate.main(command(base, tmp_path / "a.json", *tasks, "--budgets", "1.0", "0.7", limit=4)) == 0
    rows, printed = stored(tmp_path / "a.json"), capsys.readouterr().out
    assert [(r["task"], r["budget"], r["n"]) for r in rows] == [(t, b, 4) for t in tasks[1:] for b in (1.0, 0.7)]
    assert all((r["skipped"] > 0.05) == (r["budget"] < 1) for r in rows)
    whole = json.loads((tmp_path / "a.json").read_text())        # what is printed is stored, too
    assert whole["groups"] == [] and whole["exactly_at"][0] == whole["exactly_at"][1] - 0.05 == 0.0
    assert whole["exactly"]["skipped"]["piqa"][0] == rows[0]["acc"]
    assert whole["exactly"]["macs_saved"]["gsm8k"][-1] is None
    assert {"python", "torch", "tokenizers", "commit"} == set(rows[0]["versions"])
    for r in rows[:2]:
        assert r["acc"] == sum(max(range(2), key=s.__getitem__) == i % 2 for i, s in enumerate(r["scores"])) / 4
    assert "score at exactly" in printed and all(printed.count(f"\n{t} ") == 4 for t in tasks[1:])

    monkeypatch.setattr(evaluate, "log_scores", None)            # what is there is not measured again
    monkeypatch.setattr(evaluate, "generated_scores", None)
    assert evaluate.main(command(base, tmp_path / "a.json", *tasks, "--budgets", "1.0", "0.7", limit=4)) == 0
    assert stored(tmp_path / "a.json") == rows
    assert "holds rows of other settings (limit 4, now 3)" in complaint(
        evaluate.main, command(base, tmp_path / "a.json", *tasks, limit=3))


def test_frozen_figures_do_not_depend_on_the_batch_size(base, tmp_path):
    for selector in ("frozen", "batch"):
        found = []
        for size in (1, 3, 50):
            out = tmp_path / f"{selector}{size}.json"
            evaluate.main(command(base, out, "--tasks", "piqa", "gsm8k", "--budgets", "0.7", selector=selector,
                                  batch_size=size))
            found.append(stored(out))
        scores = [torch.tensor(rows[0]["scores"]) for rows in found]
        texts = [rows[1]["scores"] for rows in found]
        if selector == "frozen":
            assert all((s - scores[0]).abs().max() < 1e-4 for s in scores) and texts[0] == texts[1] == texts[2]
        else:
            assert (scores[0] - scores[2]).abs().max() > 1e-3


def test_a_stopped_command_goes_on(base, tmp_path, monkeypatch):
    out, real, calls = tmp_path / "a.json", evaluate.log_scores, []
    argv = command(base, out, "--tasks", "piqa", "lambada", "--budgets", "1.0", "0.7")

    def stop(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args)
    monkeypatch.setattr(evaluate, "log_scores", stop)
    with pytest.raises(KeyboardInterrupt):
        evaluate.main(argv)
    assert len(stored(out)) == 2
    assert evaluate.main(argv) == 0 and len(calls) == 5 and len(stored(out)) == 4


def test_chance_does_not_depend_on_the_tasks_before(base, tmp_path):
    """Random rows of a stopped command, or of one task less, that no seed makes again."""
    both, alone = tmp_path / "both.json", tmp_path / "alone.json"
    for out, tasks in ((both, ["lambada", "piqa"]), (alone, ["piqa"])):
        evaluate.main(command(base, out, "--tasks", *tasks, "--budgets", "0.7", selector="random"))
    assert stored(both)[1]["scores"] == stored(alone)[0]["scores"]


@pytest.mark.parametrize("switches, flags, said", [
    (("--tasks", "piqa", "nothing"), {}, "--tasks nothing: not known"),
    (("--tasks", "lambada"), dict(shots=1), "--shots 1: lambada has no examples: leave --shots out, or lambada"),
    (("--tasks", "csqa_gen"), dict(shots=5), "--shots 5: csqa_gen has no examples"),
    (("--tasks", "piqa"), dict(shots=1), "train.jsonl, train.jsonl would do, and the hub's baber/piqa cannot be had"),
    (("--tasks", "piqa"), dict(shots=1), "or --shots 0, without examples"),
    (("--tasks", "piqa", "--budgets", "0.2"), {}, "--budgets 0.2 is below"),
    (("--tasks", "piqa"), dict(batch_size=0), "--batch-size")])
def test_bad_input(base, tmp_path, monkeypatch, switches, flags, said):
    """Found out after an hour, or a traceback."""
    import huggingface_hub
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: (_ for _ in ()).throw(OSError("offline")))
    argv = command(base, tmp_path / "a.json", *switches, **flags)
    assert said in complaint(evaluate.main, argv) and not (tmp_path / "a.json").exists()


def test_five_examples_where_choices_are_scored(base, tmp_path):
    """A default of none, where the harness and the paper ask with five; a row that does not say whence they came."""
    for file, source in (("piqa_train.jsonl", "piqa_valid.jsonl"), ("train.jsonl", "test.jsonl")):
        shutil.copy(base / source, tmp_path / file)
    for file in ("piqa_valid.jsonl", "lambada_test.jsonl", "test.jsonl"):
        shutil.copy(base / file, tmp_path)
    argv = words("--tasks", "piqa", "lambada", "gsm8k", "--budgets", "1.0", model=base / "run", data=tmp_path, limit=2,
                 max_new_tokens=2, out=tmp_path / "a.json")
    assert evaluate.main(argv) == 0
    rows = stored(tmp_path / "a.json")
    assert [r["shots"] for r in rows] == [5, 0, 0]
    assert [r["examples"] for r in rows] == [str(tmp_path / "piqa_train.jsonl"), "", ""]
    assert evaluate.main([*argv, "--shots", "2", "--out", str(tmp_path / "b.json"), "--tasks", "gsm8k"]) == 0
    assert stored(tmp_path / "b.json")[0]["examples"] == str(tmp_path / "train.jsonl")


def test_tokens_across_the_border_are_counted(base, tmp_path, monkeypatch, capsys):
    """A continuation that lost its first letters to the context's last token, without a word."""
    model, tokenizer = load_model(base / "run"), load_tokenizer(base / "run")
    args = evaluate.parse_args(command(base, tmp_path / "a.json", tasks="piqa"))
    args.bos_id, docs = None, [Doc((("Answ", "er: 36"), ("Answer:", " 36")), 0)]
    asked, straddled = task_scores.asked_of(model, tokenizer, TASKS["piqa"], docs, args)
    assert straddled == 1 and len(asked[0]) == 2
    real = evaluate.asked_of
    monkeypatch.setattr(evaluate, "asked_of", lambda *args: (real(*args)[0], 3))
    evaluate.main(command(base, tmp_path / "a.json", "--budgets", "1.0", tasks="piqa"))
    assert stored(tmp_path / "a.json")[0]["straddled"] == 3
    assert "piqa: 3 continuations begin within a token" in capsys.readouterr().err


def test_rows_of_an_older_version(base, tmp_path):
    """Rows whose savings count what ran behind a stop, beside others; or called damaged."""
    argv = command(base, tmp_path / "a.json", "--budgets", "1.0", tasks="piqa")
    evaluate.main(argv)
    whole = json.loads((tmp_path / "a.json").read_text())
    del whole["made_with"]["format"], whole["rows"][0]["pairs"], whole["rows"][0]["macs_dense"]
    (tmp_path / "a.json").write_text(json.dumps(whole))
    assert "holds rows of other settings (format None, now 2)" in complaint(evaluate.main, argv)


def test_questions_that_have_changed(base, tmp_path):
    """Rows of two data sets in one table; a budget measured twice."""
    data = tmp_path / "data"
    shutil.copytree(base, data)
    argv = command(base, tmp_path / "a.json", "--tasks", "piqa", "--budgets", "0.7", "1.0", "0.7", data=data)
    assert evaluate.main(argv) == 0 and [r["budget"] for r in stored(tmp_path / "a.json")] == [0.7, 1.0]
    (data / "piqa_valid.jsonl").write_text((data / "piqa_valid.jsonl").read_text().replace("red", "green"))
    assert "the questions of piqa were others" in complaint(evaluate.main, argv)


@pytest.mark.parametrize("change", [dict(acc=17), dict(acc="x"), dict(acc=None), dict(n=0), dict(budget=7),
                                    dict(macs_saved=float("nan")), dict(task="theirs"), dict(data_digest=3)])
def test_rows_changed_by_hand(base, tmp_path, change):
    """A figure that cannot be, printed as if it were a result, or a traceback."""
    out = tmp_path / "a.json"
    evaluate.main(command(base, out, "--budgets", "1.0", tasks="piqa", limit=2))
    whole = json.loads(out.read_text())
    whole["rows"][0] |= change
    out.write_text(json.dumps(whole))
    assert "is damaged" in complaint(evaluate.main, command(base, out, "--budgets", "1.0", tasks="piqa", limit=2))


def test_what_does_not_fit_is_said_first(base, tmp_path):
    """An hour of other tasks before the first question that is too long."""
    row = {"goal": "g", "sol1": "x", "sol2": "pens " * 600, "label": 1}
    (tmp_path / "piqa_valid.jsonl").write_text(json.dumps(row))
    (tmp_path / "test.jsonl").write_text(json.dumps({"question": "pens " * 600, "answer": "#### 1"}))
    for task, said in (("piqa", "piqa, question 1: a choice has more tokens"), ("gsm8k", "gsm8k, question 1: ")):
        told = complaint(evaluate.main, command(base, tmp_path / "a.json", tasks=task, data=tmp_path))
        assert said in told and "positions" in told and not (tmp_path / "a.json").exists()


def test_a_perplexity_beyond_all_bounds():
    """An overflow after the work is done."""
    out = task_scores.summary(TASKS["lambada"], [Doc()], {"acc": [0.0], "log_likelihood": [-5000.0]}, None)
    assert out["perplexity"] == math.inf


def test_bos(base, tmp_path):
    """A BOS twice in front of every text, where the tokenizer puts one there anyway."""
    for name, switches in (("a", ()), ("b", ("--bos",))):
        evaluate.main(command(base, tmp_path / name, "--budgets", "1.0", *switches, tasks="piqa"))
    assert stored(tmp_path / "a")[0]["scores"] == stored(tmp_path / "b")[0]["scores"]


def test_files_of_others(base, tmp_path):
    """Somebody's file written over, a damaged one read as results."""
    (tmp_path / "theirs.json").write_text('{"a": 1}')
    assert "no file of this program" in complaint(evaluate.main, command(base, tmp_path / "theirs.json", tasks="piqa"))
    evaluate.main(command(base, tmp_path / "a.json", "--budgets", "1.0", tasks="piqa"))
    whole = json.loads((tmp_path / "a.json").read_text())
    del whole["rows"][0]["macs_dense"]
    (tmp_path / "a.json").write_text(json.dumps(whole))
    assert "is damaged" in complaint(evaluate.main, command(base, tmp_path / "a.json", tasks="piqa"))
