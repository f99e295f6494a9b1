"""Tests of data.py: the template and its mask, batches, files and their complaints, the built-in problems."""
import json
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import data
from data import Example
from gates import InputError

BOS, EOS = 0, 1
PARIS = Example("What is 2 + 3?", "2 + 3 = <<2+3=5>>5.", "5")


@pytest.fixture(scope="module")
def tokenizer():
    return data.make_tokenizer()


@pytest.fixture(scope="module")
def problems():
    return {split: data.arithmetic(600, split) for split in ("train", "calibration", "test")}


def write(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8")
    return path


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


def test_border_token_is_not_merged(tokenizer):
    """Prompt and target encoded together: a merge across the border would hand the model a prompt it never sees."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    merging = Tokenizer(models.BPE(vocab={":": 0, "\n": 1, ":\n": 2, **{c: 3 + i for i, c in enumerate("Questionwer Asq#1")}},
                                   merges=[(":", "\n")]))
    merging.pre_tokenizer = pre_tokenizers.Split("never", "isolated")
    ids, mask = data.encode_example(merging, Example("q", "", "1"), 99)
    assert 2 not in ids and ids[:mask.index(True)] == data.encode_prompt(merging, "q")
    assert merging.encode("Answer:\n").ids[-1] == 2  # it does merge where it may


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
    """Text lost at the borders of windows, predicted twice, or a last window with nothing to predict (its mean loss is NaN)."""
    document = "abcdefghijklm 1234"
    ids, mask = data.encode_example(tokenizer, document, EOS)
    items, dropped = data.encode_all([document], tokenizer, EOS, seq_len)
    assert dropped == 0 and all(len(i) <= seq_len and any(m) and not m[0] for i, m in items)
    assert [token for i, m in items for token, predicted in zip(i, m) if predicted] == ids[1:]
    assert all(before[0][-1] == after[0][0] for before, after in zip(items, items[1:]))


# Batches.

def test_collate_pads_on_the_right():
    """Padding on the wrong side, a loss on padding, or `valid` guessed from ids: here a real token is 0 like the padding."""
    input_ids, loss_mask, valid = data.collate([([5, 0, 7], [False, True, True]), ([0, 9], [False, True])])
    assert input_ids.tolist() == [[5, 0, 7], [0, 9, 0]] and input_ids.dtype == torch.int64
    assert loss_mask.tolist() == [[False, True, True], [False, True, False]] and loss_mask.dtype == torch.bool
    assert valid.tolist() == [[True] * 3, [True, True, False]] and valid.dtype == torch.bool


@pytest.mark.parametrize("n, batch_size", [(10, 3), (10, 5), (4, 9), (1, 2)])
def test_every_epoch_visits_every_item_once(n, batch_size):
    """Items skipped or repeated where a batch crosses the end of an epoch, or where a batch is larger than the data."""
    stream = [i for step in range(3 * n) for i in data.batch_at(n, batch_size, seed=7, step=step)]
    assert len(stream) == 3 * n * batch_size
    assert all(sorted(stream[start:start + n]) == list(range(n)) for start in range(0, len(stream), n))


def test_batches_depend_on_seed_epoch_and_step_only():
    """A resumed run that sees other batches than the unbroken one; every epoch in the same order; global random state."""
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


def test_hold_out_is_disjoint_and_blind_to_file_order(problems):
    """A held-out set that changes with the order of the file, overlaps another, or loses examples."""
    examples = problems["train"][:200]
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


@pytest.mark.parametrize("examples", [["a"] * 7, [str(i) for i in range(7)], ["same"] * 50])
def test_hold_out_of_too_little_is_refused(examples):
    """An empty held-out set: thresholds calibrated on nothing."""
    with pytest.raises(InputError, match="too few"):
        data.hold_out(examples, 4)


# Files.

def test_gsm8k_rows(tmp_path):
    """Reasoning and answer split at the wrong place, calculator marks lost, `reasoning` ignored, U+2028 taken for a line end."""
    path = write(tmp_path / "a.jsonl",
                 {"question": "How many?", "answer": "48/2 = <<48/2=24>>24 clips.\nSo 24.\n#### 1,024"}, "",
                 {"question": "How\u2028many?", "answer": "7", "reasoning": "<reasoning>Count\nthem.</reasoning>"},
                 {"question": "Q", "answer": "worked out\n#### 3", "reasoning": None})
    path.write_text(path.read_text(encoding="utf-8").replace("\\u2028", "\u2028"), encoding="utf-8")
    examples = data.read_examples(path)
    assert examples == [Example("How many?", "48/2 = <<48/2=24>>24 clips.\nSo 24.", "1,024"),
                        Example("How\u2028many?", "Count\nthem.", "7"), Example("Q", "worked out", "3")]
    assert data.target_text(*examples[0][1:]) == " 48/2 = <<48/2=24>>24 clips.\nSo 24.\n#### 1,024"


def test_commonsenseqa_rows(tmp_path):
    """Options missing from the prompt or in another form than in training; the answer's text in place of its letter."""
    row = {"id": "1", "question": "Where?", "choices": {"label": ["A", "B"], "text": ["bank", "mall"]}, "answerKey": "B"}
    path = write(tmp_path / "a.JSONL", row, {**row, "reasoning_nemotron_70B": "<reasoning>\nShops.\n</reasoning>"})
    plain, traced = data.read_examples(path)
    assert plain == Example("Where?\nA: bank\nB: mall", "", "B")
    assert traced == plain._replace(reasoning="Shops.")
    assert data.prompt_text(plain.question) == "Question: Where?\nA: bank\nB: mall\nAnswer:"


def test_plain_text(tmp_path):
    """Paragraphs glued together or lost, a byte order mark or \\r\\n in the text, blank documents kept as examples."""
    (tmp_path / "a.txt").write_bytes("\ufeffOne\r\ntwo.\r\n \r\n\r\nThrée.\n".encode("utf-8"))
    assert data.read_examples(tmp_path / "a.txt") == ["One\ntwo.", "Thrée."]
    assert data.read_examples(write(tmp_path / "a.jsonl", {"text": " x\n\ny "}, {"text": "\n"})) == [" x\n\ny "]


def test_parquet_has_the_same_columns(tmp_path, monkeypatch):
    """Parquet read by other rules than JSONL; a traceback where pyarrow is missing or the file is damaged."""
    import pyarrow
    from pyarrow import parquet
    rows = [{"question": "Where?", "choices": {"label": ["A", "B"], "text": ["bank", "mall"]}, "answerKey": "B", "reasoning": "r"}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert data.read_examples(tmp_path / "a.parquet") == data.read_examples(write(tmp_path / "a.jsonl", *rows))
    (tmp_path / "b.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(InputError, match=r"^[^\n]*b\.parquet: not a readable parquet file[^\n]*$"):
        data.read_examples(tmp_path / "b.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)  # makes `import pyarrow` fail
    with pytest.raises(InputError, match="pip install pyarrow"):
        data.read_examples(tmp_path / "a.parquet")


GOOD = {"question": "q", "answer": "1"}
CSQA = {"question": "q", "choices": {"label": ["A", "B"], "text": ["x", "y"]}, "answerKey": "A"}


@pytest.mark.parametrize("row, complaint", [
    ('{"question": "q", "ans', "not valid JSON"),
    ("[" * 100_000, "not valid JSON"),
    ("[1, 2]", "expected an object with named fields, not list"),
    ({"answer": "1"}, "question missing"),
    ({"id": 5}, "question and answer missing"),
    ({"question": "q", "answer": None}, "answer missing"),
    ({"question": 5, "answer": "1"}, "question must be a string, not int"),
    ({"question": "q", "answer": 72}, "answer must be a string, not int"),
    ({"question": "q", "answer": "1", "reasoning": ["r"]}, "reasoning must be a string, not list"),
    ({"question": " ", "answer": "1"}, "the question is empty"),
    ({"question": "q", "answer": "so\n#### "}, "the answer is empty"),
    ({"question": "q \ud800", "answer": "1"}, "half a surrogate pair"),
    ({"text": 5}, "text must be a string, not int"),
    ({"question": "q", "choices": CSQA["choices"]}, "answerKey missing"),
    ({**CSQA, "choices": ["x", "y"]}, "choices must hold two lists"),
    ({**CSQA, "choices": {"label": ["A"], "text": ["x", "y"]}}, "choices must hold two lists"),
    ({**CSQA, "choices": {"label": ["A", "B"], "text": ["x", 5]}}, "text must be a string, not int"),
    ({**CSQA, "answerKey": ""}, "answerKey is '', which is none of the labels A, B"),
])
def test_a_bad_row_is_named_in_one_line(tmp_path, row, complaint):
    """A traceback, or a complaint that does not say where: line 3 of the file (line 2 is blank and counts)."""
    path = write(tmp_path / "bad.jsonl", GOOD, "", row, GOOD)
    with pytest.raises(InputError) as error:
        data.read_examples(path)
    assert str(error.value).startswith(f"{path}, line 3: ") and complaint in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name, content, complaint", [
    ("a.jsonl", b"", "no examples"),
    ("a.txt", b" \n\n \n", "no examples"),
    ("a.jsonl", b'{"text": "x"}\n{"text": "\xff"}\n', "a.jsonl, line 2: not UTF-8"),
    ("a.txt", b"one\n\ntwo \xe9", "a.txt, line 3: not UTF-8"),
    ("a.jsonl", b'{"text": "x"}\n{"question": "q", "answer": "1"}\n', "some rows are questions and some are plain text"),
    ("a.csv", b"x", ".jsonl, .parquet or .txt"),
    ("folder.jsonl", None, "cannot be read: Is a directory"),
    ("missing.txt", None, "cannot be read: No such file or directory"),
])
def test_a_bad_file_is_named_in_one_line(tmp_path, name, content, complaint):
    """An empty, unreadable or unknown file that ends in a traceback, or passes as a data set of nothing."""
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    elif name.startswith("folder"):
        path.mkdir()
    with pytest.raises(InputError) as error:
        data.read_examples(path)
    assert str(path) in str(error.value) and complaint in str(error.value) and "\n" not in str(error.value)


# The built-in problems.

EQUATION = r"\d+[-+*/]\d+=\d+"
THINGS = "|".join(data.THINGS)


@pytest.mark.parametrize("split", ["train", "calibration", "test"])
def test_problems_are_right(problems, split):
    """A wrong equation, a number not taken over from the question or the step before, a wrong or too large answer."""
    operators = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__, "/": int.__truediv__}
    for question, reasoning, answer in problems[split]:
        equations = [(int(a), op, int(b), int(c)) for a, op, b, c in re.findall(r"(\d+)([-+*/])(\d+)=(\d+)", reasoning)]
        assert re.fullmatch(rf"\w+ has {EQUATION} ({THINGS})\."
                            rf"( (Now|\w+ has|Together|S?[Hh]e \w+) {EQUATION}( bags| dollars)?\.)+", reasoning)
        assert re.search(THINGS, question)[0] == re.search(THINGS, reasoning)[0]
        assert 2 <= len(equations) <= 3 and int(answer) == equations[-1][3]
        known = {int(number) for number in re.findall(r"\d+", question)} | ({2} if "twice" in question else set())
        for i, (a, op, b, c) in enumerate(equations):
            assert operators[op](a, b) == c and all(2 <= number <= 99 for number in (a, b, c))
            # Every step but the first starts from the result before it, or ("Together") ends with it.
            assert a in known and b in known and (i == 0 or equations[i - 1][3] in (a, b))
            known.add(c)


def test_problems_are_all_needed_and_varied(problems):
    """A generator stuck on one story, operation or length, or a question that mentions numbers the answer does not use."""
    text = " ".join(p.reasoning for p in problems["train"])
    assert all(len(re.findall(rf"\d{re.escape(op)}\d", text)) > 100 for op in "+-*/")
    assert min(Counter(p.reasoning.count("=") for p in problems["train"]).values()) > 100
    assert len({re.sub(r"\d+", "#", p.question) for p in problems["train"]}) > 500
    for question, reasoning, _ in problems["train"]:
        assert set(re.findall(r"\d+", question)) <= set(re.findall(r"\d+", reasoning))
        assert "{" not in question + reasoning


def test_splits_are_disjoint_and_follow_the_hash(problems):
    """A test problem that is also a training problem; a split that depends on the seed or on Python's salted hash()."""
    # The last decimal digit of the three sha256 sums, worked out with sha256sum and bc: 0, 1, 2.
    assert [data.split_of(text) for text in ("Max", "eggs", "cups")] == ["test", "calibration", "train"]
    for split, examples in problems.items():
        assert {data.split_of(e.question) for e in examples} == {split}
        assert len({e.question for e in examples}) == len(examples) == 600
    with pytest.raises(InputError, match="split must be"):
        data.arithmetic(1, "validation")


def test_problems_are_seeded(problems):
    """Problems that change between calls or with global random state, or that are the same for every seed."""
    random.seed(99)
    before = random.getstate()
    assert data.arithmetic(50, "test", seed=0) == problems["test"][:50]
    # The committed model was trained on these problems: whoever changes them has to train it anew.
    assert problems["test"][0] == Example(
        "In each of 2 bags Leo has 9 stamps. Ben has twice as many. How many do they have together?",
        "Leo has 2*9=18 stamps. Ben has 18*2=36. Together 18+36=54.", "54")
    assert random.getstate() == before
    assert not set(data.arithmetic(50, "test", seed=1)) & set(problems["test"])


def test_the_problem_space_is_large():
    """So few possible problems that a model could learn them by heart: 2,000 draws would then repeat many."""
    rng = random.Random(5)
    draws = [problem.question for problem in (data._problem(rng) for _ in range(3200)) if problem]
    assert len(draws) > 1500 and len(draws) - len(set(draws)) <= 3  # about 0.7 are expected of 3.5 million problems


def test_problems_fit_the_demo(tokenizer, problems):
    """Stories grown so long that the demo's 96 tokens no longer hold them, or that training takes twice as long."""
    items, dropped = data.encode_all(problems["train"], tokenizer, EOS, seq_len=96)
    assert dropped == 0 and sum(len(ids) for ids, _ in items) / len(items) < 70


def test_load_examples(tmp_path):
    """n ignored for files or for the built-in problems, or n = 0 taken for "all"."""
    path = write(tmp_path / "a.jsonl", GOOD, GOOD, GOOD)
    assert len(data.load_examples(path, "test", 2)) == 2 and len(data.load_examples(str(path), "train")) == 3
    assert data.load_examples("arithmetic", "test", 5, seed=3) == data.arithmetic(5, "test", 3)
    with pytest.raises(InputError, match="at least 1, not 0"):
        data.load_examples(path, "train", 0)


# The tokenizer.

def test_tokenizer_spells_numbers_and_keeps_every_text(tokenizer):
    """Digits merged into numbers (or with the space before them), text that does not survive, more tokens than promised."""
    assert tokenizer.encode(" 12", add_special_tokens=False).tokens[-2:] == ["1", "2"]
    assert not any(re.search(r"\d.|.\d", token) for token in tokenizer.get_vocab() if token not in ("<bos>", "<eos>"))
    for text in (" 12", "x  \n\t y ", "naïve 𝄞 ½ Ⅷ", "12 + 34 = 46\n#### 46", "\x00\u2028"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert tokenizer.get_vocab_size() <= 512 and tokenizer.token_to_id("<bos>") == BOS and tokenizer.token_to_id("<eos>") == EOS
    assert set(tokenizer.encode("".join(map(chr, range(0x400)))).tokens[1:]) <= set(tokenizer.get_vocab())


def test_command_line_writes_the_same_tokenizer_everywhere(tokenizer, tmp_path):
    """A tokenizer that differs from process to process: the committed model would not understand a new one."""
    run = subprocess.run([sys.executable, data.__file__, "--make-tokenizer", tmp_path / "t.json"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert json.loads((tmp_path / "t.json").read_text(encoding="utf-8")) == json.loads(tokenizer.to_str())


def test_command_line(tmp_path, monkeypatch, capsys):
    """A --help that crashes, samples in another form than the model's, or bad input that ends in a traceback or in success."""
    def run(*args):
        monkeypatch.setattr(sys, "argv", ["data.py", *map(str, args)])
        try:
            return data.main(), capsys.readouterr().out
        except SystemExit as stop:
            return stop.code, capsys.readouterr().out
    assert run("--help")[0] == 0
    assert run("--n", 2, "--split", "test")[1].count("Question: ") == 2
    assert run("--data", write(tmp_path / "a.jsonl", {"text": "A document."})) == (None, "A document.\n\n")
    assert run("--split", "validation")[0] == 2
    for bad in (["--data", tmp_path / "none.jsonl"], ["--n", 0], ["--make-tokenizer", tmp_path / "no" / "t.json"]):
        code, _ = run(*bad)
        assert code.startswith("error: ") and "\n" not in code  # sys.exit(text) prints it and exits with 1
