"""Text in, (token ids, loss mask) out: every prompt that training and evaluation see is built here.

The paper's template (Appendix I.2), with the loss on everything after `Answer:`

    Question: {question}\\nAnswer: {reasoning}\\n#### {answer}<eos>

Data is a file (GSM8K or CommonsenseQA as JSONL or parquet, or plain text) or the built-in arithmetic word
problems, which need no download. `python data.py` shows some; `python data.py --data FILE` shows how a file is read.
"""
import argparse
import hashlib
import json
import random
import re
import sys
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from gates import InputError


class Example(NamedTuple):
    """One question with a worked answer. Plain text needs no such thing: a document is a str."""
    question: str
    reasoning: str  # may be empty
    answer: str     # what stands after "####": a number, or the letter of an option


# ---------------------------------------------------------------------------------------------------
# The template. The prompt and the target are always encoded apart, in training as in evaluation, so
# that the model never meets a token that straddles the border between them.

def prompt_text(question):
    """question -> "Question: …\\nAnswer:", without a trailing space: the target brings it."""
    return f"Question: {question}\nAnswer:"


def target_text(reasoning, answer):
    """(reasoning, answer) -> " {reasoning}\\n#### {answer}"; an empty reasoning leaves no stray space."""
    return (f" {reasoning}" if reasoning else "") + f"\n#### {answer}"


def encode_prompt(tokenizer, question):
    """-> list[int]: the prompt, with what the tokenizer's post-processor puts in front (BOS for Llama 3 and Gemma)."""
    return tokenizer.encode(prompt_text(question)).ids


def encode_example(tokenizer, example, eos_id):
    """Example or str -> (ids list[int], loss_mask list[bool]), equally long; True where the token is to be predicted.

    Example: the target and its EOS are predicted, the prompt is not. Document: all but the first token."""
    if isinstance(example, str):
        ids = tokenizer.encode(example).ids + [eos_id]
        return ids, [False] + [True] * (len(ids) - 1)
    prompt = encode_prompt(tokenizer, example.question)
    target = tokenizer.encode(target_text(example.reasoning, example.answer), add_special_tokens=False).ids + [eos_id]
    return prompt + target, [False] * len(prompt) + [True] * len(target)


def encode_all(examples, tokenizer, eos_id, seq_len):
    """list of Example or str -> (items: list of (ids, loss_mask), dropped: int); no item is longer than seq_len.

    An Example that is too long is dropped and counted: cut, it would teach an answer without its end.
    A document is cut into windows that share one token, so that each token but the first is predicted exactly once.
    InputError if nothing is left."""
    if seq_len < 2:
        raise InputError(f"--seq-len must be at least 2, not {seq_len}: the first token has nothing to be predicted from")
    items, dropped, shortest = [], 0, None
    for example in examples:
        ids, mask = encode_example(tokenizer, example, eos_id)
        if isinstance(example, str):
            for i in range(0, len(ids) - 1, seq_len - 1):
                items.append((ids[i:i + seq_len], [False] + mask[i + 1:i + seq_len]))
        elif len(ids) <= seq_len:
            items.append((ids, mask))
        else:
            dropped += 1
            shortest = min(len(ids), shortest or len(ids))
    if not items:
        raise InputError(f"no example fits into --seq-len {seq_len}: the shortest of {dropped} has {shortest} tokens; "
                         f"raise --seq-len to at least that" if dropped else "no examples to encode")
    return items, dropped


# ---------------------------------------------------------------------------------------------------
# Batches.

def collate(items):
    """list of B (ids, loss_mask) -> input_ids (B, S) int64, loss_mask (B, S) bool, valid (B, S) bool.

    S is the longest of the batch; shorter rows are padded with id 0 on the right. `valid` is True on real tokens."""
    S = max(len(ids) for ids, _ in items)
    input_ids = torch.zeros(len(items), S, dtype=torch.int64)  # (B, S)
    loss_mask = torch.zeros(len(items), S, dtype=torch.bool)   # (B, S)
    valid = torch.zeros(len(items), S, dtype=torch.bool)       # (B, S)
    for row, (ids, mask) in enumerate(items):
        input_ids[row, :len(ids)] = torch.tensor(ids)
        loss_mask[row, :len(ids)] = torch.tensor(mask)
        valid[row, :len(ids)] = True
    return input_ids, loss_mask, valid


@lru_cache(maxsize=2)  # a batch touches the epoch it is in, and at a border the next one
def _epoch_order(n, seed, epoch):
    order = list(range(n))
    random.Random(f"{seed} {epoch}").shuffle(order)
    return order


def batch_at(n, batch_size, seed, step):
    """-> list[int]: which of n items are in batch `step` (from 0). A pure function of its arguments, so a resumed
    run needs no saved state: the batches walk through one fresh permutation of the items after another."""
    positions = range(step * batch_size, (step + 1) * batch_size)
    return [_epoch_order(n, seed, p // n)[p % n] for p in positions]


def hold_out(examples, *sizes):
    """-> (rest, set1, set2, …): one held-out list of each size, but at most 1/8 of the examples in each.

    Those whose question (or document) has the smallest sha256: the same ones in any order of the file, and examples
    with the same question stay together, so none leaks from one list into another. InputError if a list stays empty."""
    groups, limit = {}, len(examples) // 8
    for example in examples:
        text = example.question if isinstance(example, Example) else example
        groups.setdefault(hashlib.sha256(text.encode()).hexdigest(), []).append(example)
    held = [[] for _ in sizes]
    for digest in sorted(groups):
        for part, size in zip(held, sizes):
            if len(part) + len(groups[digest]) <= min(size, limit):
                part += groups.pop(digest)
                break
    if any(size > 0 and not part for part, size in zip(held, sizes)):
        raise InputError(f"{len(examples)} examples are too few to hold some out: at least 8 different ones are needed")
    return [example for group in groups.values() for example in group], *held


# ---------------------------------------------------------------------------------------------------
# Files. Every complaint is one line that says where: the file and the line (or the row, in parquet).

def load_examples(name, split="train", n=None, seed=0):
    """-> the first n examples of `name`: "arithmetic", or the path of a file (which is its own split)."""
    if n is not None and n < 1:
        raise InputError(f"the number of examples must be at least 1, not {n}")
    if str(name) == "arithmetic":
        return arithmetic(n or (20_000 if split == "train" else 1_000), split, seed)
    return read_examples(name)[:n]


def read_examples(path):
    """Path of a .jsonl, .parquet or .txt file -> list[Example], or list[str] for plain text. Else InputError.

    The columns tell what a row is:
      question, answer                       GSM8K: the answer ends in "\\n#### 72"; its <<48/2=24>> marks are kept
      question, answer, reasoning            the same with the reasoning apart
      question, choices, answerKey           CommonsenseQA; `reasoning` may be there, with or without <reasoning> tags
      text                                   a document
    A .txt file is one document per paragraph, with blank lines between them."""
    path = Path(path)
    kind = path.suffix.lower()
    if kind not in READERS:
        raise InputError(f"{path}: the data must be a .jsonl, .parquet or .txt file, or the word arithmetic")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    rows = READERS[kind](path, content)  # (where, row), …
    examples = [example for example in (_to_example(row, where) for where, row in rows) if example != ""]
    if not examples:
        raise InputError(f"{path}: there are no examples in it")
    if len({type(example) for example in examples}) > 1:
        raise InputError(f"{path}: some rows are questions and some are plain text; put them into two files")
    return examples


def _decode(path, content):
    try:
        return content.decode("utf-8-sig")  # -sig: a byte order mark is no content
    except UnicodeDecodeError as error:
        raise InputError(f"{path}, line {content[:error.start].count(10) + 1}: not UTF-8 text") from None


def _txt_rows(path, content):
    text = _decode(path, content).replace("\r\n", "\n")
    return [(path, {"text": paragraph.strip()}) for paragraph in re.split(r"\n\s*\n", text)]


def _jsonl_rows(path, content):
    for number, line in enumerate(_decode(path, content).split("\n"), 1):  # splitlines() would also cut at U+2028
        if line.strip():
            where = f"{path}, line {number}"
            try:
                yield where, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise InputError(f"{where}: not valid JSON: {error}") from None


COLUMNS = ("question", "answer", "reasoning", "reasoning_nemotron_70B", "choices", "answerKey", "text")


def _parquet_rows(path, content):
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise InputError(f"{path}: reading parquet needs pyarrow: pip install pyarrow") from None
    try:
        source = pyarrow.BufferReader(content)
        columns = [name for name in parquet.read_schema(source).names if name in COLUMNS]
        rows = parquet.read_table(source, columns=columns).to_pylist()
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a readable parquet file: {str(error).splitlines()[0]}") from None
    return [(f"{path}, row {number}", row) for number, row in enumerate(rows, 1)]


READERS = {".txt": _txt_rows, ".jsonl": _jsonl_rows, ".parquet": _parquet_rows}


def _to_example(row, where):
    """One row -> Example or str ("" for a blank document, which holds nothing to learn); InputError if it is neither."""
    if not isinstance(row, dict):
        raise InputError(f"{where}: expected an object with named fields, not {type(row).__name__}")
    if "text" in row and "question" not in row:
        text = _text(row["text"], "text", where)
        return text if text.strip() else ""
    needed = ("question", "choices", "answerKey") if "choices" in row else ("question", "answer")
    missing = [field for field in needed if row.get(field) is None]
    if missing:
        raise InputError(f"{where}: {' and '.join(missing)} missing; a row needs question and answer, "
                         f"or question, choices and answerKey, or text")
    question = _text(row["question"], "question", where)
    # The paper's CommonsenseQA traces stand in a column of the long name, between tags.
    column = next((name for name in ("reasoning", "reasoning_nemotron_70B") if row.get(name) is not None), None)
    reasoning = re.sub("</?reasoning>", "", _text(row[column], column, where)).strip() if column else ""
    if "choices" not in row:
        worked, _, answer = _text(row["answer"], "answer", where).rpartition("####")
        reasoning = reasoning or worked.strip()
    else:
        choices = row["choices"] if isinstance(row["choices"], dict) else {}
        labels, texts = choices.get("label"), choices.get("text")
        if not (isinstance(labels, list) and isinstance(texts, list) and len(labels) == len(texts)):
            raise InputError(f"{where}: choices must hold two lists, label and text, equally long")
        for label, text in zip(labels, texts):
            question += f"\n{_text(label, 'label', where)}: {_text(text, 'text', where)}"
        answer = row["answerKey"]
        if answer not in labels:
            raise InputError(f"{where}: answerKey is {answer!r}, which is none of the labels {', '.join(labels)}")
    if not question.strip() or not answer.strip():
        raise InputError(f"{where}: the {'answer' if question.strip() else 'question'} is empty")
    return Example(question, reasoning, answer.strip())


def _text(value, field, where):
    if not isinstance(value, str):
        raise InputError(f"{where}: {field} must be a string, not {type(value).__name__}")
    if re.search(r"[\ud800-\udfff]", value):  # JSON can spell them; no tokenizer takes them
        raise InputError(f"{where}: {field} holds half a surrogate pair, which is not text")
    return value


# ---------------------------------------------------------------------------------------------------
# The built-in problems: an opening, some events, an ending; every step needs the number before it.
# All numbers lie in 2…99 and the vocabulary is small, so that 1.6 million parameters can learn it.

BOYS = ("Tom", "Ben", "Sam", "Max", "Leo", "Dan")
GIRLS = ("Ann", "Eva", "Mia", "Zoe", "Sue", "Kim")
THINGS = ("apples", "books", "cards", "coins", "cups", "eggs", "nuts", "pens", "shells", "stamps", "stones", "toys")

OPENINGS = (  # x op k; in the answer: "Tom has {x}{op}{k}={y} apples."
    ("*", "{name} buys {x} boxes of {k} {things}."),
    ("*", "{name} finds {k} {things} a day for {x} days."),
    ("*", "In each of {x} bags {name} has {k} {things}."),
    ("+", "{name} has {x} red {things} and {k} blue {things}."),
    ("+", "{name} finds {x} {things} on Monday and {k} on Friday."),
    ("-", "{name} had {x} {things} and lost {k}."),
    ("-", "{name} buys all but {k} of {x} {things}."),
    ("/", "{name} and friends, {k} in all, share {x} {things}."),
)
EVENTS = (  # x is the number so far; in the answer: "Now {x}{op}{k}={y}."
    ("+", "Then {he} buys {k} more."),
    ("+", "{friend} gives {him} {k} more."),
    ("+", "Later {he} finds {k}."),
    ("-", "Then {he} gives {friend} {k}."),
    ("-", "On the way {he} lost {k}."),
    ("-", "Later {he} sells {k}."),
    ("*", "By Friday {he} has {times} as many."),
    ("/", "{He} keeps one of {k} equal piles."),
)
ENDINGS = (  # steps, op, question, answer
    (0, "", "How many {things} does {name} have now?", ""),
    (1, "*", "{He} sells all for {k} dollars each. How many dollars does {he} get?", "{He} gets {step} dollars."),
    (1, "/", "How many bags of {k} does {he} fill?", "{He} fills {step} bags."),
    (2, "+", "{friend} has {k} more. How many do they have together?", "{friend} has {step}."),
    (2, "-", "{friend} has {k} fewer. How many do they have together?", "{friend} has {step}."),
    (2, "*", "{friend} has {times} as many. How many do they have together?", "{friend} has {step}."),
)
OPERATIONS = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__, "/": int.__floordiv__}


def _operands(op, x):
    """The k for which x op k is allowed: results in 2…99, products and quotients out of the tables or by two."""
    if op == "+":
        return range(2, min(20, 99 - x) + 1)
    if op == "-":
        return range(2, min(20, x - 2) + 1)
    if op == "*":
        return [k for k in range(2, 10) if x * k <= 99 and (x <= 12 or k == 2)]
    return [k for k in range(2, 10) if x % k == 0 and 2 <= x // k and (x // k <= 12 or k == 2)]


def _problem(rng):
    """-> one random Example of 2 or 3 steps, or None if the numbers drawn lead into a dead end."""
    name, friend = rng.sample(BOYS + GIRLS, 2)
    he, him = ("he", "him") if name in BOYS else ("she", "her")
    words = dict(name=name, friend=friend, he=he, He=he.capitalize(), him=him, things=rng.choice(THINGS))
    steps = rng.randint(2, 3)
    ending_steps, ending_op, ending, ending_answer = rng.choice([e for e in ENDINGS if e[0] < steps])
    opening_op, opening = rng.choice(OPENINGS)
    story = [(opening_op, opening, "{name} has {step} {things}.")]
    story += [(*rng.choice(EVENTS), "Now {step}.") for _ in range(steps - 1 - ending_steps)]
    story += [(ending_op, ending, ending_answer)] if ending_op else []

    y = rng.randint(2, 12) if opening_op == "*" else rng.randint(10, 80)
    asked, worked = [], []
    for op, sentence, solution in story:
        x, choices = y, _operands(op, y)
        if not choices:
            return None
        k = rng.choice(choices)
        y = OPERATIONS[op](x, k)
        words.update(x=x, k=k, times="twice" if k == 2 else f"{k} times", step=f"{x}{op}{k}={y}")
        asked.append(sentence.format(**words))
        worked.append(solution.format(**words))
    if ending_steps == 0:
        asked.append(ending.format(**words))
    if ending_steps == 2:
        if x + y > 99:
            return None
        worked.append(f"Together {x}+{y}={x + y}.")
        y = x + y
    return Example(" ".join(asked), " ".join(worked), str(y))


def split_of(question):
    """-> "test" for one question in ten, "calibration" for another, else "train": decided by its sha256, so a
    problem is held out for good, whatever the seed."""
    return {0: "test", 1: "calibration"}.get(int(hashlib.sha256(question.encode()).hexdigest(), 16) % 10, "train")


def arithmetic(n, split="train", seed=0):
    """-> list of n different word problems (Example) of one split; the same for the same arguments, always."""
    if split not in ("train", "calibration", "test"):
        raise InputError(f"split must be train, calibration or test, not {split}")
    if n > 200_000:
        raise InputError(f"{n} built-in problems are too many: at most 200000 of a split")
    rng = random.Random(seed)
    problems = {}  # by question: keeps the order, refuses repetitions
    while len(problems) < n:
        problem = _problem(rng)
        if problem and split_of(problem.question) == split:
            problems.setdefault(problem.question, problem)
    return list(problems.values())


def make_tokenizer():
    """-> a byte-level BPE tokenizer with at most 512 tokens, trained here on training problems, always the same.

    Each digit is its own token, so that numbers are spelled and not memorised; any text survives the round trip.
    <bos> is 0 and <eos> is 1; <bos> is put in front of what is encoded, as Llama 3's tokenizer does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True),
                                                       pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=512, special_tokens=["<bos>", "<eos>"], show_progress=False,
                                  initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    texts = (prompt_text(p.question) + target_text(p.reasoning, p.answer) for p in arithmetic(4_000))
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", pair="<bos> $A $B",
                                                             special_tokens=[("<bos>", 0)])
    return tokenizer


def main():
    parser = argparse.ArgumentParser(description="Show examples as the model sees them, or write the built-in tokenizer.")
    parser.add_argument("--data", default="arithmetic", help="arithmetic, or a .jsonl, .parquet or .txt file")
    parser.add_argument("--split", default="train", choices=("train", "calibration", "test"), help="of the arithmetic problems")
    parser.add_argument("--n", type=int, default=3, help="how many")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--make-tokenizer", metavar="FILE", help="write the tokenizer of the arithmetic problems and stop")
    args = parser.parse_args()
    try:
        if args.make_tokenizer:
            Path(args.make_tokenizer).write_text(make_tokenizer().to_str(pretty=True), encoding="utf-8")
            return
        for example in load_examples(args.data, args.split, args.n, args.seed):
            text = example if isinstance(example, str) else prompt_text(example.question) + target_text(*example[1:])
            print(text, end="\n\n")
    except (InputError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
