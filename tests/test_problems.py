"""Tests of problems.py: the built-in word problems are right, varied, many, and split and seeded for good."""
import random
import re
from collections import Counter

import pytest

from console import InputError
from problems import SPLITS, THINGS, Example, _problem, arithmetic, split_of

EQUATION = r"\d+[-+*/]\d+=\d+"
ANY_THING = "|".join(THINGS)


@pytest.fixture(scope="module")
def problems():
    return {split: arithmetic(600, split) for split in SPLITS}


def test_problems_are_seeded(problems):
    """Problems that change between calls or with global random state, or that are the same for every seed."""
    random.seed(99)
    before = random.getstate()
    assert arithmetic(50, "test", seed=0) == problems["test"][:50]
    # The committed model was trained on these problems: whoever changes them has to train it anew.
    assert problems["test"][0] == Example(
        "In each of 2 bags Leo has 9 stamps. Ben has twice as many. How many do they have together?",
        "Leo has 2*9=18 stamps. Ben has 18*2=36. Together 18+36=54.", "54")
    assert random.getstate() == before
    assert not set(arithmetic(50, "test", seed=1)) & set(problems["test"])


def test_splits_are_disjoint_and_follow_the_hash(problems):
    """A test problem that is also a training problem; a split that depends on the seed or on Python's salted hash()."""
    # The last decimal digit of the three sha256 sums, worked out with sha256sum and bc: 0, 1, 2.
    assert [split_of(text) for text in ("Max", "eggs", "cups")] == ["test", "calibration", "train"]
    for split, examples in problems.items():
        assert {split_of(e.question) for e in examples} == {split}
        assert len({e.question for e in examples}) == len(examples) == 600


def test_what_cannot_be_drawn_is_refused():
    """A KeyError for a split that there is not; a search without end for more problems than there are."""
    with pytest.raises(InputError, match="split must be one of train, calibration, test, not validation"):
        arithmetic(1, "validation")
    with pytest.raises(InputError, match="200001 built-in problems are too many: at most 200000"):
        arithmetic(200_001)


def test_problems_are_all_needed_and_varied(problems):
    """A generator stuck on one story, operation or length; a question with numbers that the answer does not use."""
    text = " ".join(p.reasoning for p in problems["train"])
    assert all(len(re.findall(rf"\d{re.escape(op)}\d", text)) > 100 for op in "+-*/")
    assert min(Counter(p.reasoning.count("=") for p in problems["train"]).values()) > 100
    assert len({re.sub(r"\d+", "#", p.question) for p in problems["train"]}) > 500
    for question, reasoning, _ in problems["train"]:
        assert set(re.findall(r"\d+", question)) <= set(re.findall(r"\d+", reasoning))
        assert "{" not in question + reasoning


def test_the_problem_space_is_large():
    """So few possible problems that a model could learn them by heart: 2,000 draws would then repeat many."""
    rng = random.Random(5)
    draws = [problem.question for problem in (_problem(rng) for _ in range(3200)) if problem]
    assert len(draws) > 1500 and len(draws) - len(set(draws)) <= 3     # about 0.7 are expected of 3.5 million problems


@pytest.mark.parametrize("split", SPLITS)
def test_problems_are_right(problems, split):
    """A wrong equation, a number not taken over from the question or the step before, a wrong or too large answer."""
    operators = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__, "/": int.__truediv__}
    for question, reasoning, answer in problems[split]:
        found = re.findall(r"(\d+)([-+*/])(\d+)=(\d+)", reasoning)
        equations = [(int(a), op, int(b), int(c)) for a, op, b, c in found]
        assert re.fullmatch(rf"\w+ has {EQUATION} ({ANY_THING})\."
                            rf"( (Now|\w+ has|Together|S?[Hh]e \w+) {EQUATION}( bags| dollars)?\.)+", reasoning)
        assert re.search(ANY_THING, question)[0] == re.search(ANY_THING, reasoning)[0]
        assert 2 <= len(equations) <= 3 and int(answer) == equations[-1][3]
        known = {int(number) for number in re.findall(r"\d+", question)} | ({2} if "twice" in question else set())
        for i, (a, op, b, c) in enumerate(equations):
            assert operators[op](a, b) == c and all(2 <= number <= 99 for number in (a, b, c))
            # Every step but the first starts from the result before it, or ("Together") ends with it.
            assert a in known and b in known and (i == 0 or equations[i - 1][3] in (a, b))
            known.add(c)
