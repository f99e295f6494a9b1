"""The built-in word problems: endless, worked out step by step, no download.

An opening, some events, an ending; every step needs the number before it. All numbers lie in 2…99 and the vocabulary is
small, so that 1.6 million parameters can learn it.
"""
import hashlib
import random
from typing import NamedTuple

from console import InputError

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers


class Example(NamedTuple):
    """One question with a worked answer. Plain text needs no such thing: a document is a str."""
    question: str
    reasoning: str  # may be empty
    answer: str     # what stands after "####": a number, or the letter of an option


SPLITS = ("train", "calibration", "test")

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
    if split not in SPLITS:
        raise InputError(f"split must be one of {', '.join(SPLITS)}, not {split}")
    if n > 200_000:
        raise InputError(f"{n} built-in problems are too many: at most 200000 of a split")
    rng = random.Random(seed)
    problems = {}  # by question: keeps the order, refuses repetitions
    while len(problems) < n:
        problem = _problem(rng)
        if problem and split_of(problem.question) == split:
            problems.setdefault(problem.question, problem)
    return list(problems.values())


def train_tokenizer(texts):
    """-> a byte-level BPE tokenizer with at most 512 tokens, trained here.

    Each digit is its own token, so that numbers are spelled and not memorised; any text survives the round trip.
    <bos> is 0 and <eos> is 1; <bos> is put in front of what is encoded, as Llama 3's tokenizer does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True),
                                                       pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=512, special_tokens=["<bos>", "<eos>"], show_progress=False,
                                  initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", pair="<bos> $A $B",
                                                             special_tokens=[("<bos>", 0)])
    return tokenizer
