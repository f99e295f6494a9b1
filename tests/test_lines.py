"""The paper can be found: each equation and each numbered line of its Algorithms has the place where it happens."""
import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAST = {1: 20, 2: 16, 3: 7}                                      # lines of each Algorithm
MEANT = {"gates": 1, "model": 1}                                 # where no docstring around a comment names one
FAST = {1: ("train", "model", "gates"), 2: ("generate",), 3: ("gates",)}                 # where each can be followed


def source(name):
    return (ROOT / f"{name}.py").read_text(encoding="utf-8")


def comments(text):
    """[(line number, comment)] of Python source; docstrings and other strings are none."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return [(t.start[0], t.string) for t in tokens if t.type == tokenize.COMMENT]


def named(node):
    """The number of the Algorithm that the docstring of a module, class or function names first, or None."""
    found = re.search(r"Algorithm (\d)", ast.get_docstring(node) or "")
    return int(found[1]) if found else None


def algorithm_at(tree, number, meant):
    """Which Algorithm a comment on this line of the file is about: that of the innermost docstring around it."""
    around = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))
              and node.lineno <= number <= node.end_lineno]
    inside_out = sorted(around, key=lambda node: node.end_lineno - node.lineno)
    return next((named(node) for node in [*inside_out, tree] if named(node)), meant)


def lines_of(text, meant=None, ranges=True):
    """{Algorithm: the numbers of its lines} that the comments of a module name.

    `line 5`; with ranges also `lines 5-7` and `lines 5 to 7`, expanded. `A2 line 5` and `line 5 of Algorithm 2` are of
    the Algorithm that they say, others of the one that the docstring of their function says.
    """
    tree, found = ast.parse(text), {algorithm: set() for algorithm in LAST}
    for number, comment in comments(text):
        for prefix, first, last, said in re.findall(
                r"(?:\bA(\d) )?\blines? (\d+)(?:(?:-| to )(\d+))?(?: of Algorithm (\d))?", comment):
            if not last or ranges:
                algorithm = int(prefix or said or 0) or algorithm_at(tree, number, meant)
                found[algorithm] |= set(range(int(first), int(last or first) + 1))
    return found


def missing(algorithm, texts, ranges=True):
    """The lines of an Algorithm that no comment in {module name: source} names."""
    found = [lines_of(text, MEANT.get(name), ranges)[algorithm] for name, text in texts.items()]
    return sorted(set(range(1, LAST[algorithm] + 1)).difference(*found))


def test_lines_are_collected_from_comments_by_their_docstring():
    """A collector that takes `line 12` for `line 1`, a docstring for a place, or the wrong Algorithm's line."""
    text = '''"""Algorithm 2 in brief."""
def f(x):  # line 1
    """Algorithm 3: lines 4-6, line 7."""
    return x  # lines 2-3, line 12; lines 8 to 9: "line 13" of A1 line 14, line 15 of Algorithm 1
def g():
    return "# line 16"  # line 4
'''
    assert lines_of(text) == {3: {1, 2, 3, 8, 9, 12, 13}, 1: {14, 15}, 2: {4}}
    assert lines_of(text, ranges=False) == {3: {1, 12, 13}, 1: {14, 15}, 2: {4}}
    assert missing(3, {"x": text}) == [4, 5, 6, 7] and missing(2, {"x": text}, ranges=False)[:4] == [1, 2, 3, 5]


@pytest.mark.parametrize("algorithm", LAST)
def test_every_line_stands_in_the_loops(algorithm):
    """A reader who searches by_hand.py for the paper's `line 12` and finds none, or a range."""
    assert missing(algorithm, {"by_hand": source("by_hand")}, ranges=False) == []


@pytest.mark.parametrize("algorithm", LAST)
def test_every_line_stands_in_the_fast_path(algorithm):
    """A box of the paper that cannot be followed through train.py or generate.py, line by line."""
    assert missing(algorithm, {name: source(name) for name in FAST[algorithm]}) == []


def test_the_loop_itself_names_every_line():
    """A top-to-bottom loop with a hole that only another file fills."""
    assert missing(1, {"train": source("train")}) == []


def test_the_block_says_its_lines_itself():
    """Lines 4 to 16 that the loop only points to, and that nobody finds there."""
    assert set(range(4, 17)) & set(missing(1, {name: source(name) for name in ("model", "gates")})) == set()


@pytest.mark.parametrize("names", [("by_hand",), ("gates", "model", "train")], ids=["loops", "fast path"])
def test_every_equation_stands_in_both(names):
    """An equation without a place."""
    text = "".join(map(source, names))
    assert [n for n in range(1, 7) if not re.search(rf"\beq\. {n}\b", text)] == []


@pytest.mark.parametrize("algorithm", LAST)
def test_the_collector_misses_what_is_missing(algorithm):
    """A collector that is content with anything: each line is taken out of by_hand.py once, and only that is missed."""
    text, tag = source("by_hand"), r"(?<=A2 )\bline" if algorithm == 2 else r"(?<!A2 )\bline"
    tree = ast.parse(text)
    its = [(number, comment) for number, comment in comments(text)
           if algorithm in (2, algorithm_at(tree, number, None))]
    for n in range(1, LAST[algorithm] + 1):
        cut = text.splitlines()
        for number, comment in its:
            cut[number - 1] = cut[number - 1].replace(comment, re.sub(rf"{tag} {n}\b", "", comment))
        assert missing(algorithm, {"by_hand": "\n".join(cut)}, ranges=False) == [n]


@pytest.mark.parametrize("algorithm, name, comment, gone", [
    (1, "train", "line 1", [1]), (1, "train", "line 17", [17]), (1, "train", "line 19", [19]),
    (1, "train", "line 20", [20]), (2, "generate", "lines 2-13", list(range(2, 14))), (2, "generate", "line 15", [15]),
    (2, "generate", "line 16", [16]), (3, "gates", "line 3", [3]), (3, "gates", "lines 5-7", [5, 6, 7])])
def test_the_collector_misses_what_the_fast_path_lacks(algorithm, name, comment, gone):
    """The same, where ranges stand and where several files share the lines."""
    texts = {other: source(other) for other in FAST[algorithm]}
    assert re.search(rf"\b{comment}\b", texts[name])
    texts[name] = re.sub(rf"\b{comment}\b", "", texts[name])
    assert missing(algorithm, texts) == gone
