"""The model class of the LM Evaluation Harness, beside the harness's own `hf` on the same dense weights, and beside a
plain loop of ours on a gated model. Tiny random models and tasks of this folder; no network.
"""
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "interop")]
FIXTURES = ROOT / "interop/tests/fixtures"
CACHE = tempfile.TemporaryDirectory()
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_DATASETS_CACHE": CACHE.name}

import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from conftest import complaint, frozen, mixed, padding
from gates import GateConfig, SkipPolicy
from generate import generate
from lm_eval_adapter import GateSkipLM
from load_weights import load_model, load_tokenizer, new_model, read_json, save_model
from thresholds import make_policy
from tokens import decode, encode, pieces
from toy_runs import TINY, TOY

CHATML = ("{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] + '\n' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}")
PAIRS = [("Question: Tom has 31 red pens.\nAnswer:", " 36"), ("Question: Tom has 31 red pens.\nAnswer:", " 5"),
         ("Question: Tom has 31 red pens.\nAnswer: ", "36 pens, and Ann has 9"), ("", "Tom has 31 pens"),
         ("How", " many?"), ("", "<bos>Tom has pens"), ("<bos>Ann has 9 books.", " How many"), (" \n", "pens"),
         ("Ann has 9 books. " * 20, "How many?")]
TEXTS = ["Tom has 31 red pens.", "", "x", "<bos>Ann has 9.", "Then he gives Ann 9. How many pens does Tom have? " * 6]
PROMPTS = ["Question: Tom has 31 red pens. How many?\nAnswer:", "Ann", "A box holds 12 apples.", "Ann " * 60]


def save(path, config, gate=None, bos=True, **described):
    """A folder with a random model whose pre-activations have std about 1, so that its answers differ. Returns (folder,
    model). bos=False: the tokenizer puts nothing in front."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps({**config, "vocab_size": 482, "bos_token_id": 0, "eos_token_id": 1}))
    tokenizer = read_json(TINY / "tokenizer.json")
    (path / "tokenizer.json").write_text(json.dumps(tokenizer if bos else {**tokenizer, "post_processor": None}))
    (path / "tokenizer_config.json").write_text(json.dumps(
        {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<bos>", "eos_token": "<eos>", **described}))
    model, generator = new_model(path / "config.json", gate, dtype=torch.float64), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 2:
                p.normal_(0.0, 0.3 if "embed" in name else p.shape[1] ** -0.5, generator=generator)
            elif "gate" in name:
                p.normal_(0.5, 0.5, generator=generator)
    save_model(model, path, load_tokenizer(path))
    return path, model


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{name: folder}: dense of both families, one without a BOS in front, one gated with thresholds and one without."""
    at = tmp_path_factory.mktemp("models")
    llama = {**read_json(TINY / "config.json"), **TOY, "max_position_embeddings": 64}
    gemma = read_json(ROOT / "tests/golden/gemma2/config.json") | {"max_position_embeddings": 64}
    made = {"llama": save(at / "llama", llama, chat_template=CHATML), "gemma": save(at / "gemma", gemma),
            "bare": save(at / "bare", llama, bos=False, chat_template=CHATML),
            "uncalibrated": save(at / "uncalibrated", llama, GateConfig("scalar")),
            "gated": save(at / "gated", llama, GateConfig("scalar"))}
    folder, model = made["gated"]
    ids = torch.tensor([encode(load_tokenizer(folder), TEXTS[4])[:60]])
    tables = {str(b): frozen(model, ids, share=1 - b).thresholds for b in (0.99, 0.6)}
    model.config.gateskip = {"skip": "all", "kv": "copy_up", "threshold": "branch",
                             "thresholds": {"1.0": tables["0.99"], "0.6": tables["0.6"]}}
    save_model(model, folder)
    return {name: str(folder) for name, (folder, _) in made.items()}


def ours(folder, batch_size=1, **arguments):
    return GateSkipLM(folder, batch_size=batch_size, device="cpu", **arguments)


def theirs(folder, batch_size=1, **arguments):
    return HFLM(folder, batch_size=batch_size, device="cpu", dtype="float32", **arguments)


def asked(kind, arguments):
    return [Instance(kind, {}, a if isinstance(a, tuple) else (a,), i) for i, a in enumerate(arguments)]


def scores(lm, pairs=PAIRS):
    return lm.loglikelihood(asked("loglikelihood", pairs), disable_tqdm=True)


def rolled(lm, texts=TEXTS):
    return lm.loglikelihood_rolling(asked("loglikelihood_rolling", texts), disable_tqdm=True)


def written(lm, prompts=PROMPTS, **gen_kwargs):
    gen_kwargs = {"until": ["\n\n"], "max_gen_toks": 16, **gen_kwargs}
    return lm.generate_until(asked("generate_until", [(p, gen_kwargs) for p in prompts]), disable_tqdm=True)


def same_scores(a, b, tolerance):
    for (x, x_greedy), (y, y_greedy) in zip(a, b, strict=True):
        assert abs(x - y) < tolerance and x_greedy == y_greedy


def distance(a, b):
    """The largest difference between two lists of scores, or of (score, is greedy)."""
    first = lambda x: x[0] if isinstance(x, tuple) else x
    return max(abs(first(x) - first(y)) for x, y in zip(a, b, strict=True))


def answers(result, task):
    """What a task's documents were answered, in order: texts or log-likelihoods."""
    found = [response for sample in sorted(result["samples"][task], key=lambda sample: sample["doc_id"])
             for (response,) in sample["resps"]]
    return [r if isinstance(r, (str, float)) else float(r[0]) for r in found]


# Beside the harness's own model class.


@pytest.mark.parametrize("name", ["llama", "gemma", "bare"])
@pytest.mark.parametrize("add_bos_token", [None, True, False])
def test_log_likelihoods_are_those_of_hf(folders, name, add_bos_token):
    """A shifted target, a second BOS or none, a context cut on the wrong side, padding that is read."""
    pairs = [pair for pair in PAIRS if pair[0] != " \n"]         # hf fails where the tokenizer makes no token of that
    a, b = (scores(make(folders[name], 4, add_bos_token=add_bos_token), pairs) for make in (ours, theirs))
    same_scores(a, b, 1e-4)
    assert max(x for x, _ in a) - min(x for x, _ in a) > 10


@pytest.mark.parametrize("name", ["llama", "gemma", "bare"])
@pytest.mark.parametrize("max_length", [None, 7])
def test_rolling_log_likelihoods_are_those_of_hf(folders, name, max_length):
    """A token at a window's border that is scored twice, or never."""
    texts = [text for text in TEXTS if text]
    a, b = (rolled(make(folders[name], 3, max_length=max_length), texts) for make in (ours, theirs))
    assert max(abs(x - y) for x, y in zip(a, b, strict=True)) < 1e-4 * max(map(abs, b))


@pytest.mark.parametrize("name", ["llama", "gemma", "bare"])
@pytest.mark.parametrize("until", [["\n\n"], ["e"], ["s", "o", "<eos>"]])
def test_greedy_texts_are_those_of_hf(folders, name, until):
    """A stop string that is left in, a prompt that is cut on the wrong side, a batch mate that ends too early."""
    for size in (1, 3):
        assert written(ours(folders[name], size), until=until) == written(theirs(folders[name], size), until=until)


def test_greedy_means_what_hf_means_by_it(folders):
    """is_greedy that is always False: a random model's answers never are."""
    lm, prompt = ours(folders["llama"]), "Ann has"
    told = written(lm, [prompt], max_gen_toks=3)[0]
    pairs = [(prompt, told), (prompt, " pens")]
    a, b = ([greedy for _, greedy in scores(model, pairs)] for model in (lm, theirs(folders["llama"])))
    assert a == b and a[0] is True


def test_chat_prompts_are_those_of_hf(folders):
    """The wrong template, an assistant's turn that is closed where a task wants it continued."""
    a, b = ours(folders["llama"]), theirs(folders["llama"])
    talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "How many pens?"}]
    assert (a.apply_chat_template(talk) == b.apply_chat_template(talk)
            == "<system>Be brief.\n<user>How many pens?\n<assistant>")
    talk += [{"role": "assistant", "content": "Answer:"}]
    prompt = a.apply_chat_template(talk, add_generation_prompt=False)
    assert prompt == b.apply_chat_template(talk, add_generation_prompt=False)
    assert prompt.endswith("<assistant>Answer:")
    assert a.chat_template(True) == b.chat_template(True) == CHATML
    assert a.tokenizer_name == b.tokenizer_name


def test_a_template_without_system_messages(folders, tmp_path):
    """Gemma's, which fails on one: the message is left out, as hf does."""
    refuses = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
    folder = tmp_path / "refuses"
    shutil.copytree(folders["gemma"], folder)
    settings = read_json(folder / "tokenizer_config.json")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": refuses}))
    talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "How many?"}]
    assert (ours(str(folder)).apply_chat_template(talk) == theirs(str(folder)).apply_chat_template(talk)
            == "<user>How many?\n<assistant>")
    assert "leave --apply_chat_template out" in complaint(ours(folders["gemma"]).apply_chat_template, talk)


def test_tasks_of_the_harness(folders, monkeypatch):
    """Answers that come back in the wrong order, or for another document."""
    monkeypatch.chdir(ROOT)
    a, b = (simple_evaluate(lm, tasks=["tiny_choices", "tiny_text", "tiny_words"], bootstrap_iters=0,
                            task_manager=TaskManager(include_path=str(FIXTURES), include_defaults=False))
            for lm in (ours(folders["llama"], 4), theirs(folders["llama"], 4)))
    for task, documents in {"tiny_choices": 6, "tiny_text": 3, "tiny_words": 6}.items():
        assert len(a["samples"][task]) == documents
        for x, y in zip(answers(a, task), answers(b, task), strict=True):
            assert x == y if isinstance(x, str) else abs(x - y) < 1e-3


# Beside a plain loop of ours.


@torch.no_grad()
def alone(folder, context, continuation, thresholds):
    """The log-likelihood of one request by itself, every row run and selected: the oracle. None: nothing skipped."""
    model, tokenizer = load_model(folder, dtype=torch.float64), load_tokenizer(folder)
    before, whole = encode(tokenizer, context), encode(tokenizer, context + continuation)
    policy = thresholds and SkipPolicy("frozen", 0.6, thresholds=thresholds)
    logits, trace = model(torch.tensor([whole[-64 - 1:-1]]), policy=policy)      # (1, S, V)
    mixed(trace.keep, trace.valid) if thresholds else None
    target, n = torch.tensor(whole[len(before):]), len(whole) - len(before)
    return logits[0, -n:].log_softmax(-1).gather(1, target[:, None]).sum().item()


@pytest.mark.parametrize("size", [1, 3, 8])
def test_a_gated_model_answers_as_alone(folders, size):
    """Thresholds of another budget, padding that is skipped in place of tokens, a batch that changes an answer."""
    pairs = [(context, rest) for context, rest in PAIRS if context.strip() and not context.endswith(" ")]
    thresholds = read_json(Path(folders["gated"], "config.json"))["gateskip"]["thresholds"]["0.6"]
    got = scores(ours(folders["gated"], size, budget=0.6, dtype="float64"), pairs)
    for (score, _), pair in zip(got, pairs, strict=True):
        assert abs(score - alone(folders["gated"], *pair, thresholds)) < 1e-9
        assert abs(score - alone(folders["gated"], *pair, None)) > 1e-3


def test_frozen_answers_do_not_depend_on_the_batch_and_those_of_batch_do(folders):
    """A table of results that another batch size would change, without a word."""
    for ask in (scores, rolled, written):
        frozen_1, frozen_8, batch_1, batch_8 = (
            ask(ours(folders["gated"], size, budget=0.6, selector=selector, dtype="float64"))
            for selector in ("frozen", "batch") for size in (1, 8))
        if ask is written:
            assert frozen_1 == frozen_8 and batch_1 != batch_8
        else:
            assert distance(frozen_1, frozen_8) < 1e-9 and distance(batch_1, batch_8) > 0.1


def test_texts_are_those_of_generate(folders):
    """A policy that generation does not get."""
    lm = ours(folders["gated"], 4, budget=0.6, dtype="float64")
    prompts = [encode(lm.tokenizer, p)[-48:] for p in PROMPTS]
    alone = [generate(lm.model, [p], 16, make_policy(lm.model.config, "frozen", 0.6), {1}).tokens[0] for p in prompts]
    assert written(lm, until=[]) == [decode(lm.tokenizer, ids) for ids in alone]
    assert written(lm, until=[]) != written(ours(folders["gated"], 4, dtype="float64"), until=[])


def test_padding_has_no_vote(folders):
    """Padding in the quantile of a batch: here it stands on the other side, and other tokens stand in it."""
    pairs, thought = [("How many pens does Tom have?", " 36"), ("Ann", " has 9 books")], []
    lm = ours(folders["gated"], 2, budget=0.6, selector="batch", dtype="float64")
    whole = [encode(lm.tokenizer, context + rest) for context, rest in pairs]
    longest = max(map(len, whole)) - 1
    ids = torch.tensor([[7] * (longest + 1 - len(w)) + w[:-1] for w in whole])
    logp = lm.model(ids, valid=padding([len(w) - 1 for w in whole], longest), policy=lm.policy)[0].log_softmax(-1)
    for row, w, (context, _) in zip(logp, whole, pairs):
        n = len(w) - len(encode(lm.tokenizer, context))
        thought.append((row[-n:].gather(1, torch.tensor(w[-n:])[:, None]).sum().item(), False))
    same_scores(scores(lm, pairs), thought, 1e-9)


def test_a_stop_string_across_tokens(folders):
    """A comparison of the stop string with one token at a time; a text that goes on because its mate does."""
    lm = ours(folders["gated"], 2, budget=0.6, dtype="float64")
    whole = written(lm, until=[])
    prompt, stop, needed = next(
        (prompt, text[at:at + 2], calls) for prompt, text in zip(PROMPTS, whole)
        for ids in [generate(lm.model, [encode(lm.tokenizer, prompt)[-48:]], 16, lm.policy).tokens[0]]
        for at in range(3, len(text) - 1) if text.index(text[at:at + 2]) == at and "\ufffd" not in text[at:at + 2]
        if not any(text[at:at + 2] in part for part in pieces(lm.tokenizer, ids))
        for calls in [next(n for n in range(17) if text[at:at + 2] in decode(lm.tokenizer, ids[:n]))])
    assert written(lm, until=stop) == [text.split(stop)[0] for text in whole]
    before = lm.savings.report()["calls"]
    written(lm, [prompt], until=[stop])
    assert lm.savings.report()["calls"] - before == needed < 16  # until the stop string was whole, and no longer


def test_an_end_token_ends_a_text(folders):
    """A text that runs on behind its end."""
    lm = ours(folders["gated"], 2, budget=0.6, dtype="float64")
    ids = generate(lm.model, [encode(lm.tokenizer, PROMPTS[0])], 16, lm.policy).tokens[0]
    lm.eos = ids[4]
    assert written(lm, PROMPTS[:1], until=[]) == [decode(lm.tokenizer, ids[:ids.index(ids[4]) + 1])]


def test_how_a_token_is_drawn(folders):
    """A temperature that is ignored, or one that is heeded although do_sample is off."""
    lm = ours(folders["llama"], 4)
    greedy = written(lm)
    drawn = []
    for _ in range(2):
        torch.manual_seed(1)
        drawn.append(written(lm, do_sample=True, temperature=2.0))
    assert drawn[0] == drawn[1] != greedy and written(lm, do_sample=False, temperature=2.0) == greedy
    assert written(lm, do_sample=True, temperature=2.0, top_k=1) == greedy == written(lm, num_beams=1)
    assert "num_beams" in complaint(written, lm, num_beams=4)
    assert "repetition_penalty" in complaint(written, lm, repetition_penalty=1.1)
    assert "max_gen_toks=64" in complaint(written, lm, max_gen_toks=64)


def test_what_was_saved_is_told(folders, capsys):
    """Numbers of the last batch only, or of nothing."""
    lm = ours(folders["gated"], 2, budget=0.6)
    assert "skipped" not in lm.get_model_info()["gateskip"]
    scores(lm), written(lm)
    told = lm.get_model_info()["gateskip"]
    assert told["budget"] == 0.6 and told["selector"] == "frozen" and 0.15 < told["skipped"] < 0.85
    assert told["calls"] > 5 + 2 * 2 and {"macs_saved", "skipped_per_call"} <= set(told["prompt"]) & set(told["answer"])
    assert f"frozen, budget 0.6: skipped {told['skipped']:.1%} of" in capsys.readouterr().err
    json.dumps(told)


# The command, and what it is given.


def command(folder, *flags, **arguments):
    """The documented command on tasks of this folder. Without the harness's own, whose thousands of files it would read
    first, for half a minute."""
    start = ("import functools, runpy, sys, lm_eval.tasks as t\nt.TaskManager = functools.partial(t.TaskManager, "
             "include_defaults=False)\nsys.argv = sys.argv[1:]\nrunpy.run_path(sys.argv[0], run_name='__main__')")
    given = ",".join(f"{key}={value}" for key, value in {"pretrained": folder, **arguments}.items())
    return subprocess.run([sys.executable, "-c", start, "interop/lm_eval_adapter.py", "--model", "gateskip",
                           "--model_args", given, "--include_path", str(FIXTURES), "--batch_size", "4",
                           *flags], cwd=ROOT, capture_output=True, text=True)


def test_the_command(folders, tmp_path):
    """A class that the harness's command line does not find, or results without what was saved."""
    done = command(folders["gated"], "--tasks", "tiny_choices,tiny_words", "--output_path", str(tmp_path), budget=0.6)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "|tiny_choices|" in done.stdout and "frozen, budget 0.6: skipped" in done.stderr
    results = json.loads(next(tmp_path.rglob("results_*.json")).read_text())
    assert set(results["results"]) == {"tiny_choices", "tiny_words"} and 0.15 < results["config"]["gateskip"]["skipped"]


def test_a_mistake_on_the_command_line_is_one_line(folders):
    """A traceback through the whole harness."""
    failed = command(folders["gated"], "--tasks", "tiny_choices", selector="some")
    assert failed.returncode == 1 and "Traceback" not in failed.stderr
    assert failed.stderr.splitlines()[-1] == "error: selector=some is not one of frozen, batch, none"


@pytest.mark.parametrize("name, arguments, said", [
    ("gated", {"selector": "topk"}, "selector=topk is not one of frozen, batch, none"),
    ("gated", {"budget": 1.2}, "budget 1.2 is outside (0, 1]"),
    ("gated", {"budget": 0}, "budget 0.0 is outside (0, 1]"),
    ("gated", {"budget": "much"}, "budget 'much' is no number"),
    ("gated", {"budget": 0.5}, "thresholds only for budgets from 0.6 on: give such a budget, or selector=batch"),
    ("gated", {"budget": 0.6, "selector": "none"}, "leave one of them out"),
    ("uncalibrated", {"budget": 0.6}, "no thresholds, which train.py measures at its end: let it finish, or"),
    ("llama", {"budget": 0.6}, "no gates to decide what to skip: leave budget out"),
    ("llama", {"batch_size": "auto"}, "batch_size=auto is not known here: give a number"),
    ("llama", {"max_length": 65}, "max_length: '65' must be a whole number of at least 1 and at most 64"),
    ("llama", {"max_length": 0}, "max_length: '0'"), ("llama", {"dtype": "int8"}, "dtype=int8 is not one of"),
    ("llama", {"device": "tpu"}, "--device tpu"), ("llama", {"add_bos_token": "yes"}, "add_bos_token=yes"),
    ("llama", {"budgets": 0.6}, "budgets is no argument of gateskip"),
    (None, {"budget": 0.8}, "pretrained is missing")])
def test_wrong_arguments(folders, name, arguments, said):
    """A traceback, or a run at another budget than the one that was asked for."""
    assert said in complaint(GateSkipLM, name and folders[name], **{"device": "cpu", **arguments})


def test_the_paper_selector_needs_no_thresholds(folders):
    """A calibration that is asked for where none is read."""
    skipping = scores(ours(folders["uncalibrated"], 4, budget=0.6, selector="batch"))
    assert distance(skipping, scores(ours(folders["uncalibrated"], 4))) > 0.1


def test_what_cannot_be_scored(folders):
    """A score of 0, the best of all, for an answer that has no tokens; a text that starts nowhere."""
    lm = ours(folders["llama"], max_length=8)
    assert "a continuation of 0 tokens" in complaint(scores, lm, [("How many?", "")])
    assert "max_length=8" in complaint(scores, lm, [("How many?", " pens" * 9)])
    lm.bos = lm.eos = None
    assert "names neither a BOS nor an end token" in complaint(rolled, lm)
