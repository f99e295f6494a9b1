"""Tests of data.py: the template and its mask, batches, the sets and what is held out, the tokenizer, the command."""
import errno
import hashlib
import json
import os
import random
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors

import console
import data
from console import InputError
from problems import Example, arithmetic
from test_read_data import GOOD, write

BOS, EOS = 0, 1
PARIS = Example("What is 2 + 3?", "2 + 3 = <<2+3=5>>5.", "5")


@pytest.fixture(scope="module")
def tokenizer():
    return data.make_tokenizer()


# The template and the mask.

def test_template_is_the_papers():
    """A changed space or newline: a model tuned elsewhere on the paper's template would meet unknown text."""
    assert data.prompt_text("Why?") == "Question: Why?\nAnswer:"
    assert data.target_text("Because.", "42") == " Because.\n#### 42"
    assert data.target_text("", "B") == "\n#### B"


def test_loss_covers_target_and_eos_only(tokenizer):
    """A mask that is off by one, includes the question, or forgets EOS (the model would never learn to stop)."""
    ids, mask = data.encode_example(tokenizer, PARIS, EOS)
    assert len(ids) == len(mask)
    prompt = [i for i, m in zip(ids, mask) if not m]
    target = [i for i, m in zip(ids, mask) if m]
    assert mask == sorted(mask)  # one block of False, then one of True
    assert tokenizer.decode(prompt) == "Question: What is 2 + 3?\nAnswer:"
    assert target[-1] == EOS and tokenizer.decode(target[:-1]) == " 2 + 3 = <<2+3=5>>5.\n#### 5"


def test_training_and_evaluation_see_the_same_prompt(tokenizer):
    """BOS in training but not in evaluation (or twice, or in the middle), as happened to the paper's authors."""
    prompt = data.encode_prompt(tokenizer, PARIS.question)
    ids, mask = data.encode_example(tokenizer, PARIS, EOS)
    assert ids[:mask.index(True)] == prompt
    assert prompt[0] == BOS and ids.count(BOS) == 1 and ids.count(EOS) == 1


def test_document_is_predicted_from_its_second_token_on(tokenizer):
    """A document treated as a prompt (no loss at all), or a loss on BOS, which nothing comes before."""
    ids, mask = data.encode_example(tokenizer, "Two apples.", EOS)
    assert ids[0] == BOS and ids[-1] == EOS and tokenizer.decode(ids[1:-1]) == "Two apples."
    assert mask == [False] + [True] * (len(ids) - 1)


def test_long_examples_are_dropped_and_counted(tokenizer):
    """Cutting a long question silently, or dropping one of exactly seq_len tokens."""
    long = Example("What is 2 + 3? " * 9, *PARIS[1:])
    ids, mask = data.encode_example(tokenizer, PARIS, EOS)
    items, dropped = data.encode_all([PARIS, long, PARIS], tokenizer, EOS, seq_len=len(ids))
    assert items == [(ids, mask)] * 2 and dropped == 1
    with pytest.raises(InputError, match=rf"--seq-len {len(ids) - 1}: the shortest of 2 has {len(ids)} tokens"):
        data.encode_all([long, PARIS], tokenizer, EOS, seq_len=len(ids) - 1)
    with pytest.raises(InputError, match="at least 2"):
        data.encode_all([PARIS], tokenizer, EOS, seq_len=1)


@pytest.mark.parametrize("seq_len", [2, 3, 7, 8, 100])
def test_windows_predict_every_token_once(tokenizer, seq_len):
    """Text lost at the borders of windows, predicted twice, or a last window with nothing to predict: a loss of NaN."""
    document = "abcdefghijklm 1234"
    ids, mask = data.encode_example(tokenizer, document, EOS)
    items, dropped = data.encode_all([document], tokenizer, EOS, seq_len)
    assert dropped == 0 and all(len(i) <= seq_len and any(m) and not m[0] for i, m in items)
    assert [token for i, m in items for token, predicted in zip(i, m) if predicted] == ids[1:]
    assert all(before[0][-1] == after[0][0] for before, after in zip(items, items[1:]))


def test_border_token_is_not_merged(tokenizer):
    """Prompt and target encoded together: a merge across the border would hand the model a prompt it never sees."""
    letters = {letter: 3 + i for i, letter in enumerate("Questionwer Asq#1")}
    merging = Tokenizer(models.BPE(vocab={":": 0, "\n": 1, ":\n": 2, **letters}, merges=[(":", "\n")]))
    merging.pre_tokenizer = pre_tokenizers.Split("never", "isolated")
    ids, mask = data.encode_example(merging, Example("q", "", "1"), 99)
    assert 2 not in ids and ids[:mask.index(True)] == data.encode_prompt(merging, "q")
    assert merging.encode("Answer:\n").ids[-1] == 2  # it does merge where it may


@pytest.mark.parametrize("front", ["", "<bos>"])
@pytest.mark.parametrize("behind", ["", "<eos>"])
def test_one_bos_and_one_eos(front, behind):
    """The end token of a tokenizer that appends one between prompt and answer, or twice at a document's end; a second
    BOS where the text spells its own."""
    words = ["<bos>", "<eos>", "q", "Question:", "Answer:", "r", "####", "7"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="7"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<bos>", "<eos>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{front} $A {behind}".strip(), special_tokens=[("<bos>", BOS), ("<eos>", EOS)])
    bos = [BOS] * bool(front)
    assert tokenizer.encode("q r").ids == bos + [2, 5] + [EOS] * bool(behind)   # it does what it is built for
    prompt, target = bos + [3, 2, 4], [5, 6, 7, EOS]
    assert data.encode_prompt(tokenizer, "q") == prompt
    assert data.encode_example(tokenizer, Example("q", "r", "7"), EOS) == (
        prompt + target, [False] * len(prompt) + [True] * len(target))
    for text, document in {"q r": bos + [2, 5, EOS], "q r<eos>": bos + [2, 5, EOS], "<bos>q": [BOS, 2, EOS]}.items():
        assert data.encode_example(tokenizer, text, EOS) == (document, [False] + [True] * (len(document) - 1)), text


# Batches.

def test_collate_pads_on_the_right():
    """Padding on the wrong side, a loss on padding, `valid` guessed from ids: here a real token is 0 as padding is."""
    input_ids, loss_mask, valid = data.collate([([5, 0, 7], [False, True, True]), ([0, 9], [False, True])])
    assert input_ids.tolist() == [[5, 0, 7], [0, 9, 0]] and input_ids.dtype == torch.int64
    assert loss_mask.tolist() == [[False, True, True], [False, True, False]] and loss_mask.dtype == torch.bool
    assert valid.tolist() == [[True] * 3, [True, True, False]] and valid.dtype == torch.bool


def test_places_are_those_before_the_answers_tokens():
    """A shift by one, or places of another row: the model would learn to repeat its input."""
    ids = torch.tensor([[10, 11, 12, 13], [20, 21, 22, 0]])
    mask = torch.tensor([[False, False, True, True], [False, True, True, False]])
    places, targets = data.answer_places(ids, mask)
    assert places.tolist() == [1, 2, 4, 5] and targets.tolist() == [12, 13, 21, 22]


@pytest.mark.parametrize("n, batch_size", [(10, 3), (10, 5), (4, 9), (1, 2)])
def test_every_epoch_visits_every_item_once(n, batch_size):
    """Items skipped or repeated where a batch crosses the end of an epoch, or where a batch is larger than the data."""
    stream = [i for step in range(3 * n) for i in data.batch_at(n, batch_size, seed=7, step=step)]
    assert len(stream) == 3 * n * batch_size
    assert all(sorted(stream[start:start + n]) == list(range(n)) for start in range(0, len(stream), n))


def test_batches_depend_on_seed_epoch_and_step_only():
    """A resumed run with other batches than the unbroken one; every epoch in the same order; global random state."""
    forward = [data.batch_at(50, 8, 3, step) for step in range(30)]
    data._epoch_order.cache_clear()
    random.seed(1), torch.manual_seed(1)
    before = random.getstate()
    assert [data.batch_at(50, 8, 3, step) for step in reversed(range(30))] == forward[::-1]
    assert random.getstate() == before
    stream = [i for batch in forward for i in batch]
    assert stream[:50] != stream[50:100] and stream[:50] != list(range(50))
    assert data.batch_at(50, 50, 4, 0) != data.batch_at(50, 50, 3, 0)
    assert data.batch_at(50, 50, 4, 0) != data.batch_at(50, 50, 3, 1)  # seed + epoch would make them equal


# What is held out.

@pytest.mark.parametrize("examples", [["a"] * 7, [str(i) for i in range(7)], ["same"] * 50])
def test_hold_out_of_too_little_is_refused(examples):
    """An empty held-out set: thresholds calibrated on nothing."""
    with pytest.raises(InputError, match="too few"):
        data.hold_out(examples, 4)


def test_hold_out_is_disjoint_and_blind_to_file_order():
    """A held-out set that changes with the order of the file, overlaps another, or loses examples."""
    examples = arithmetic(200)
    rest, first, second = data.hold_out(examples, 20, 10)
    assert (len(rest), len(first), len(second)) == (170, 20, 10)
    assert sorted(rest + first + second) == sorted(examples)
    shuffled = random.Random(0).sample(examples, len(examples))
    assert [sorted(part) for part in data.hold_out(shuffled, 20, 10)] == [sorted(rest), sorted(first), sorted(second)]
    assert data.hold_out(examples, 64)[1] == data.hold_out(examples, 25)[1]  # 1/8 of 200 at most


def test_hold_out_keeps_equal_questions_together():
    """A question that occurs twice in the file and is both trained on and tested on."""
    examples = [Example(f"q{i % 30}", str(i), "1") for i in range(100)] + ["a document"]
    parts = data.hold_out(examples, 12, 12)
    questions = [{e if isinstance(e, str) else e.question for e in part} for part in parts]
    assert sum(map(len, parts)) == 101 and sum(map(len, questions)) == len(set.union(*questions)) == 31
    assert all(0 < len(part) <= 12 for part in parts[1:])


VARIANTS = ("How many?", "how MANY?", " How  many?\n", "How\u00a0many", "How many ?", "\uff28ow many\uff1f",
            "How many...")


def test_questions_are_the_same_however_they_are_written():
    """A copy that a blank, a capital or a full-width letter hides; other numbers or signs taken for the same."""
    for wrap in (lambda text: text, lambda text: Example(text, "r", text)):
        assert len({data.question_of(wrap(text)) for text in VARIANTS}) == 1
        others = ("2 + 3", "2 - 3", "2 + 3%", "1.5", "15", "1 5", "$5", "5", "-", "*", "a b", "ab")
        assert len({data.question_of(wrap(text)) for text in others}) == len(others)
    assert data.question_of(Example("Q", "r", "1")) == data.question_of(Example("Q", "other", "2")) == "q"


def test_hold_out_chooses_by_the_sum_of_the_exact_text():
    """A held-out set that is another one for a file whose questions differ: a run resumed after an update would test
    on what it was trained on."""
    examples = arithmetic(200)
    by_sum = sorted(examples, key=lambda e: hashlib.sha256(e.question.encode()).hexdigest())
    rest = [e for e in examples if e not in by_sum[:30]]
    assert data.hold_out(examples, 20, 10) == (rest, by_sum[:20], by_sum[20:30])


def test_hold_out_never_splits_variants():
    """A question trained on, and held out in another spelling."""
    examples = [Example(f"{i} {text}", "", str(i)) for i in range(40) for text in VARIANTS]
    random.Random(0).shuffle(examples)
    parts = data.hold_out(examples, 21, 14)
    numbers = [{e.answer for e in part} for part in parts]
    assert [len(part) for part in parts] == [245, 21, 14]
    assert sum(map(len, numbers)) == 40 == len(set.union(*numbers))


@pytest.mark.parametrize("source", ["arithmetic", "file", "file and eval file"])
def test_the_sets_are_disjoint(tokenizer, tmp_path, capsys, source):
    """Thresholds or tables made on training problems."""
    def file(name, examples):
        rows = [{"question": p.question, "answer": f"{p.reasoning}\n#### {p.answer}"} for p in examples]
        return str(write(tmp_path / name, *rows))

    examples = arithmetic(90)
    args = SimpleNamespace(data="arithmetic", eval_data=None, eval_limit=20, calibration_sequences=8, seed=1, steps=30,
                           batch_size=2, grad_accum=1, seq_len=160)
    if source != "arithmetic":
        args.data = file("data.jsonl", examples + examples[:20])         # some twice
    if source == "file and eval file":
        args.eval_data = file("eval.jsonl", arithmetic(20, "test") + examples[40:43])
        args.eval_limit = 23
    sets = data.load_sets(args, tokenizer, EOS, 8)
    text = {name: {tuple(ids) for ids, _ in items} for name, items in sets.items()}
    assert list(text) == ["train", "calibration", "check", "eval"] and all(text.values())
    assert min(len(sets["calibration"]), len(sets["check"])) >= 7
    for a, b in ((a, b) for a in text for b in text if a < b):
        if source != "file and eval file" or "eval" not in (a, b):
            assert not text[a] & text[b], (a, b)
    shared, said = len(text["train"] & text["eval"]), capsys.readouterr().out
    cautioned = f"CAUTION: {shared} of the eval problems are trained on" in said
    assert cautioned == (shared > 0) == (source == "file and eval file")


@pytest.mark.parametrize("variant", [
    *[lambda e, change=change: e._replace(question=change(e.question)) for change in
      (str, str.upper, "{} ".format, lambda text: text.replace(" ", "  "), lambda text: text.rstrip("?."))],
    lambda e: Example(e.question, "Guessed.", "1")],
    ids=["exact", "case", "blank", "blanks", "no mark", "other answer"])
@pytest.mark.parametrize("documents", [False, True])
def test_leaks_are_told(tokenizer, tmp_path, capsys, variant, documents):
    """A test set that is trained on and passes for held out, since an answer, a capital or a blank differs."""
    def rows(examples):
        return [{"text": e.question} if documents else {"question": e.question, "answer": e.answer} for e in examples]

    examples = arithmetic(40)
    kept = data.hold_out([e.question for e in examples], 5, 5)[0]
    leaked = [variant(e) for e in examples if e.question in kept][:3]
    args = SimpleNamespace(data=str(write(tmp_path / "a.jsonl", *rows(examples))), eval_limit=9,
                           eval_data=str(write(tmp_path / "b.jsonl", *rows(leaked + arithmetic(4, "test")))),
                           calibration_sequences=5, seq_len=160)
    data.load_sets(args, tokenizer, EOS, 5)
    assert "CAUTION: 3 of the eval problems are trained on" in capsys.readouterr().out


@pytest.mark.parametrize("eval_file", [False, True])
def test_limits_count_windows(tokenizer, tmp_path, eval_file):
    """A document of 100 windows that counts as one: out of memory in the calibration, after all training; or windows of
    the first document only, windows of a trained-on one, others on every run, fewer than are there."""
    texts = [" ".join(f"{chr(97 + n)}{i % 10}" for i in range(400)) for n in range(16)]
    path = str(write(tmp_path / "a.jsonl", *({"text": text} for text in texts)))
    test = str(write(tmp_path / "b.jsonl", *({"text": text.upper()} for text in texts))) if eval_file else None

    def load(calibration, evaluation):
        args = SimpleNamespace(data=path, eval_data=test, calibration_sequences=calibration, eval_limit=evaluation,
                               seq_len=16)
        return data.load_sets(args, tokenizer, EOS, 2)

    letters = lambda items: set(re.sub("[^a-zA-Z]", "", tokenizer.decode([i for ids, _ in items for i in ids])))
    small, again, large = load(20, 10), load(20, 10), load(40, 10_000)
    assert small == again
    assert [len(small[name]) for name in ("calibration", "check", "eval")] == [20, 20, 10]
    assert [len(large[name]) for name in ("calibration", "check")] == [40, 40] and len(large["eval"]) > 100
    assert len(small["train"]) == len(large["train"]) > 500                      # no limit of it
    of = {name: letters(items) for name, items in large.items()}
    assert sum(map(len, of.values())) == len(set.union(*of.values())) == (32 if eval_file else 16)
    assert [len(letters(small[name])) > 1 for name in ("calibration", "check", "eval")] == [True] * 3
    assert all(item in large[name] for name in ("calibration", "check", "eval") for item in small[name])


def test_the_sets_have_the_sizes_asked_for(tokenizer, capsys):
    """--calibration-sequences that shrinks the training set or leaves the check alone; other problems at another limit;
    a set of the built-in problems that is another split's; steps or batches that do not count."""
    args = SimpleNamespace(data="arithmetic", eval_data=None, eval_limit=5, calibration_sequences=3, seed=1, steps=7,
                           batch_size=2, grad_accum=3, seq_len=160)
    sets = data.load_sets(args, tokenizer, EOS, 8)
    assert {name: len(items) for name, items in sets.items()} == {"train": 42, "calibration": 3, "check": 3, "eval": 5}
    assert capsys.readouterr().out == "data: 42 train, 3 calibration, 3 check, 5 eval\n"
    held = arithmetic(16, "calibration", 1)
    for name, examples in {"train": arithmetic(42, "train", 1), "calibration": held[:3], "check": held[8:11],
                           "eval": arithmetic(5, "test")}.items():
        assert sets[name] == data.encode_all(examples, tokenizer, EOS, 160)[0], name


def test_load_examples(tmp_path):
    """n ignored for files or for the built-in problems, or n = 0 taken for "all"."""
    path = write(tmp_path / "a.jsonl", GOOD, GOOD, GOOD)
    assert len(data.load_examples(path, "test", 2)) == 2 and len(data.load_examples(str(path), "train")) == 3
    assert data.load_examples("arithmetic", "test", 5, seed=3) == arithmetic(5, "test", 3)
    with pytest.raises(InputError, match="at least 1, not 0"):
        data.load_examples(path, "train", 0)


# The tokenizer.

def test_tokenizer_spells_numbers_and_keeps_every_text(tokenizer):
    """Digits merged into numbers (or with the space before them), text that is changed, more tokens than promised."""
    assert tokenizer.encode(" 12", add_special_tokens=False).tokens[-2:] == ["1", "2"]
    assert not any(re.search(r"\d.|.\d", token) for token in tokenizer.get_vocab() if token not in ("<bos>", "<eos>"))
    for text in (" 12", "x  \n\t y ", "naïve 𝄞 ½ Ⅷ", "12 + 34 = 46\n#### 46", "\x00\u2028"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert tokenizer.get_vocab_size() <= 512
    assert tokenizer.token_to_id("<bos>") == BOS and tokenizer.token_to_id("<eos>") == EOS
    assert set(tokenizer.encode("".join(map(chr, range(0x400)))).tokens[1:]) <= set(tokenizer.get_vocab())


def test_problems_fit_the_demo(tokenizer):
    """Stories grown so long that the demo's 96 tokens no longer hold them, or that training takes twice as long."""
    items, dropped = data.encode_all(arithmetic(600), tokenizer, EOS, seq_len=96)
    assert dropped == 0 and sum(len(ids) for ids, _ in items) / len(items) < 70


def test_command_line_writes_the_same_tokenizer_everywhere(tokenizer, tmp_path):
    """A tokenizer that differs from process to process: the committed model would not understand a new one."""
    command = [sys.executable, data.__file__, "--make-tokenizer", tmp_path / "t.json"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert json.loads((tmp_path / "t.json").read_text(encoding="utf-8")) == json.loads(tokenizer.to_str())


def test_a_console_that_lacks_the_characters(tmp_path):
    """Output redirected to a file on Windows, where it is cp1252: a UnicodeEncodeError in the middle of the data."""
    path = write(tmp_path / "日.jsonl", {"text": "naïve €5"}, {"text": "日本 → 𝄞"})
    environment = {**os.environ, "PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "1"}
    run = subprocess.run([sys.executable, data.__file__, "--data", path], capture_output=True, env=environment)
    assert (run.returncode, run.stdout, run.stderr) == (0, b"na\xefve \x805\n\n?? ? ?\n\n", b"")


def test_the_tokenizer_is_written_in_one_step(tmp_path, monkeypatch):
    """A full disk that leaves half a tokenizer where a whole one was; a folder or a device that is replaced."""
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "t.json"
    path.write_text("old")
    with monkeypatch.context() as m, pytest.raises(InputError) as error:
        m.setattr(os, "fsync", full)
        data.main(["--make-tokenizer", str(path)])
    assert str(error.value).startswith(f"--make-tokenizer {path}: No space left on device")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    (tmp_path / "device").symlink_to("/dev/null")
    for name in ("device", ""):
        with pytest.raises(InputError, match="a folder or a device: give the name of a file"):
            data.main(["--make-tokenizer", str(tmp_path / name)])
    assert os.readlink(tmp_path / "device") == "/dev/null" and len(list(tmp_path.iterdir())) == 2
    with pytest.raises(InputError, match="--make-tokenizer"):
        data.main(["--make-tokenizer", ""])


def test_command_line(tmp_path, capsys):
    """A --help that crashes, samples in another form than the model's, bad input that is a traceback or a success,
    flags that are ignored."""
    def run(*args):
        with pytest.raises(SystemExit) as stop:
            console.run(lambda: data.main([str(arg) for arg in args]))
        return stop.value.code, capsys.readouterr().out
    assert run("--help")[0] == 0
    assert run("--n", 2, "--split", "test")[1].count("Question: ") == 2
    assert run("--data", write(tmp_path / "a.jsonl", {"text": "A document."})) == (0, "A document.\n\n")
    for flag, value, told in (("--data", tmp_path / "none.jsonl", f"{tmp_path}/none.jsonl: cannot be read"),
                              ("--make-tokenizer", tmp_path / "no" / "t.json", "--make-tokenizer"), ("--n", 0, "--n"),
                              ("--split", "validation", "--split"),
                              *((flag, value, f"{flag} goes only with --write-with") for flag, value in (
                                  ("--out", "a.jsonl"), ("--prompts", "a.txt"), ("--max-new-tokens", 9),
                                  ("--batch-size", 9), ("--temperature", 0), ("--device", "cpu"),
                                  ("--dtype", "bfloat16")))):
        code, _ = run(flag, value)
        assert code.startswith(f"error: {told}") and "\n" not in code           # sys.exit(text) exits with 1
    assert run("--overwrite")[0] == "error: --overwrite goes only with --write-with"
    for flag, value in (("--data", "a.jsonl"), ("--split", "test"), ("--make-tokenizer", "t.json")):
        assert run("--write-with", "none", "--out", "a.jsonl", flag, value)[0] == (
            f"error: {flag} goes not with --write-with")
