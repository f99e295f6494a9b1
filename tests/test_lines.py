"""The paper can be found: each equation and each numbered line of its Algorithms has the place where it happens."""
import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAST = {1: 20, 2: 16, 3: 7}                                      # lines of each Algorithm


def source(*names):
    return "".join((ROOT / f"{name}.py").read_text() for name in names)


def functions(text):
    """{name: its source} of a module's functions, decorators and all."""
    lines = text.splitlines(keepends=True)
    return {node.name: "".join(lines[node.lineno - 1:node.end_lineno]) for node in ast.walk(ast.parse(text))
            if isinstance(node, ast.FunctionDef)}


def numbers(text, ranges=True):
    """The n of `line n`; with ranges also those of `lines n-m`, `lines n to m` and `lines n, m`."""
    found = {int(n) for n in re.findall(r"\bline (\d+)", text)}
    for a, b in re.findall(r"\blines (\d+)(?:-| to |, )(\d+)", text) if ranges else ():
        found |= set(range(int(a), int(b) + 1))
    return found


def by_hand(text):
    """{Algorithm: lines} of by_hand.py, each on a line of its own: those of Algorithm 2 begin with A2."""
    parts = functions(text)
    second = re.compile(r"A2 (line \d+)")
    loops = "".join(parts[name] for name in ("forward", "training_step", "generate"))
    return {1: numbers(second.sub("", loops), ranges=False), 2: numbers(" ".join(second.findall(loops)), ranges=False),
            3: numbers(parts["quantile_threshold"], ranges=False)}


def fast_path(texts):
    """{Algorithm: lines}: of 1 in the loop and what it calls, of 2 in generate, of 3 in quantile_threshold."""
    gates, model, train, generate = texts
    block = model[model.index("class Block"):model.index("class Trace")]
    gate = gates[gates.index("class Gate("):gates.index("def quantile_threshold")]
    return {1: numbers(functions(train)["main"]), "1 in Block and Gate": numbers(block + gate),
            2: numbers(functions(generate)["generate"]), 3: numbers(functions(gates)["quantile_threshold"])}


def missing(found, last):
    return sorted(set(range(1, last + 1)) - found)


@pytest.mark.parametrize("algorithm", LAST)
def test_every_line_stands_in_the_loops(algorithm):
    """A reader who searches by_hand.py for the paper's `line 12` and finds none."""
    assert missing(by_hand(source("by_hand"))[algorithm], LAST[algorithm]) == []


@pytest.mark.parametrize("algorithm", LAST)
def test_every_line_stands_in_the_fast_path(algorithm):
    """A box of the paper that cannot be followed through train.py or generate.py, line by line."""
    texts = [source(name) for name in ("gates", "model", "train", "generate")]
    assert missing(fast_path(texts)[algorithm], LAST[algorithm]) == []


def test_the_block_says_its_lines_itself():
    """Lines 4 to 16 that the loop only points to, and that nobody finds there."""
    found = fast_path([source(n) for n in ("gates", "model", "train", "generate")])["1 in Block and Gate"]
    assert set(range(4, 17)) <= found


def test_every_equation_stands_in_both():
    """An equation without a place."""
    for text in (source("by_hand"), source("gates", "model", "train")):
        assert {int(n) for n in re.findall(r"\beq\. (\d)", text)} == set(range(1, 7))


def test_the_collector_misses_what_is_missing():
    """A collector that is content with anything: each number is taken out of the source once."""
    text = source("by_hand")
    for algorithm, last in LAST.items():
        for n in range(1, last + 1):
            tag = {1: rf"(?<!A2 )\bline {n}\b", 2: rf"A2 line {n}\b", 3: rf"(?<!A2 )\bline {n}\b"}[algorithm]
            function = "quantile_threshold" if algorithm == 3 else None
            cut = text
            for name, body in functions(text).items():
                if (name == function) if function else name in ("forward", "training_step", "generate"):
                    cut = cut.replace(body, re.sub(tag, "", body))
            assert missing(by_hand(cut)[algorithm], last) == [n]
