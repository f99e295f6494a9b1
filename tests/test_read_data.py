"""Tests of read_data.py: what a row of a file becomes, and complaints that say where."""
import hashlib
import json
import os
import socket
import subprocess
import sys

import pyarrow
import pytest
from pyarrow import parquet

import data
from console import InputError
from problems import Example
from read_data import digest, read_examples

ROOT = os.path.dirname(os.path.abspath(data.__file__))


def write(path, *rows):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def write_parquet(path, rows):
    path.parent.mkdir(exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


# Rows.

def test_plain_text(tmp_path):
    """Paragraphs glued together or lost, a byte order mark or \\r\\n in the text, blank documents kept as examples."""
    (tmp_path / "a.txt").write_bytes("\ufeffOne\r\ntwo.\r\n \r\n\r\nThrée.\n".encode("utf-8"))
    assert read_examples(tmp_path / "a.txt") == ["One\ntwo.", "Thrée."]
    assert read_examples(write(tmp_path / "a.jsonl", {"text": " x\n\ny "}, {"text": "\n"})) == [" x\n\ny "]


def test_gsm8k_rows(tmp_path):
    """Reasoning and answer split at the wrong place, calculator marks lost, `reasoning` ignored, a cut at U+2028."""
    path = write(tmp_path / "a.jsonl",
                 {"question": "How many?", "answer": "48/2 = <<48/2=24>>24 clips.\nSo 24.\n#### 1,024"}, "",
                 {"question": "How\u2028many?", "answer": "7", "reasoning": "<reasoning>Count\nthem.</reasoning>"},
                 {"question": "Q", "answer": "worked out\n#### 3", "reasoning": None})
    path.write_text(path.read_text(encoding="utf-8").replace("\\u2028", "\u2028"), encoding="utf-8")
    examples = read_examples(path)
    assert examples == [Example("How many?", "48/2 = <<48/2=24>>24 clips.\nSo 24.", "1,024"),
                        Example("How\u2028many?", "Count\nthem.", "7"), Example("Q", "worked out", "3")]
    assert data.target_text(*examples[0][1:]) == " 48/2 = <<48/2=24>>24 clips.\nSo 24.\n#### 1,024"


def test_commonsenseqa_rows(tmp_path):
    """Options missing from the prompt or in another form than in training; the answer's text in place of its letter."""
    row = {"id": "1", "question": "Where?", "choices": {"label": ["A", "B"], "text": ["bank", "mall"]},
           "answerKey": "B"}
    path = write(tmp_path / "a.JSONL", row, {**row, "reasoning_nemotron_70B": "<reasoning>\nShops.\n</reasoning>"})
    plain, traced = read_examples(path)
    assert plain == Example("Where?\nA: bank\nB: mall", "", "B")
    assert traced == plain._replace(reasoning="Shops.")
    assert data.prompt_text(plain.question) == "Question: Where?\nA: bank\nB: mall\nAnswer:"


GOOD = {"question": "q", "answer": "1"}
CSQA = {"question": "q", "choices": {"label": ["A", "B"], "text": ["x", "y"]}, "answerKey": "A"}
NO_CHOICES, ONE = {"label": None, "text": None}, {"label": ["A"], "text": ["x"]}
QUESTION, CHOICE, DOCUMENT = Example("q", "", "1"), Example("q\nA: x", "", "A"), "a document"


@pytest.mark.parametrize("row, expected", [
    ({"question": "q", "answer": "1", "choices": None, "answerKey": None, "text": None}, QUESTION),
    ({"question": "q", "answer": "1", "choices": NO_CHOICES}, QUESTION),
    ({"question": "q", "answer": "1", "choices": {"label": [], "text": []}, "answerKey": None}, QUESTION),
    ({"question": "q", "answer": None, "choices": ONE, "answerKey": "A", "reasoning": None}, CHOICE),
    ({"question": None, "answer": None, "choices": NO_CHOICES, "text": "a document"}, DOCUMENT),
])
def test_null_columns_are_absent(tmp_path, row, expected):
    """Rows of several kinds under one schema, the columns of the others null: a good row that is refused for them."""
    assert read_examples(write(tmp_path / "a.jsonl", row)) == [expected]
    full = {"question": "q", "answer": "1", "text": "t", "choices": ONE, "answerKey": "A", "reasoning": "r"}
    table = pyarrow.Table.from_pylist([row], schema=pyarrow.Table.from_pylist([full]).schema)
    parquet.write_table(table, tmp_path / "a.parquet")
    assert read_examples(tmp_path / "a.parquet") == [expected]


def test_parquet_has_the_same_columns(tmp_path, monkeypatch):
    """Parquet read by other rules than JSONL; a traceback where pyarrow is missing or the file is damaged."""
    rows = [{"question": "Where?", "choices": {"label": ["A", "B"], "text": ["bank", "mall"]}, "answerKey": "B",
             "reasoning": "r"}]
    path = write_parquet(tmp_path / "a.parquet", rows)
    assert read_examples(path) == read_examples(write(tmp_path / "a.jsonl", *rows))
    text = pyarrow.StringArray.from_buffers(1, pyarrow.py_buffer(b"\0\0\0\0\1\0\0\0"), pyarrow.py_buffer(b"\xff"))
    parquet.write_table(pyarrow.table({"text": text}), tmp_path / "c.parquet")
    (tmp_path / "b.parquet").write_bytes(b"PAR1 and no more")
    (tmp_path / "d.parquet").write_bytes(path.read_bytes()[:-20])
    for name in "bcd":
        with pytest.raises(InputError, match=rf"^[^\n]*{name}\.parquet: not a readable parquet file[^\n]*$"):
            read_examples(tmp_path / f"{name}.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)  # makes `import pyarrow` fail
    with pytest.raises(InputError, match="pip install pyarrow"):
        read_examples(path)


@pytest.mark.parametrize("name", ["s3:/a.parquet", "text=1/a.parquet", "file:a.parquet", "a%20b c.parquet"])
def test_a_name_is_a_name(tmp_path, monkeypatch, name):
    """A file's name that is taken for an address, or its folder's for one more column."""
    monkeypatch.chdir(tmp_path)
    write_parquet(tmp_path / name, [{"text": "a document"}])
    assert read_examples(name) == [DOCUMENT]


def test_leaving_after_parquet(tmp_path):
    """A thread of Arrow that lets go of a Python object when there is no Python any more: all is read, all is printed,
    and the exit code is that of an abort. So in 9 of 10 runs on one CPU, with the modules of a command to tear down."""
    program = """if True:
        import os, sys, torch, read_data
        os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
        print(len(read_data.read_examples(sys.argv[1])))"""
    path = write_parquet(tmp_path / "a.parquet", [GOOD] * 5)
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", program, path], cwd=ROOT, capture_output=True, text=True)
        assert (done.returncode, done.stdout, done.stderr) == (0, "5\n", "")


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
    ({"question": "q \ud800", "answer": "1"}, "question holds half a surrogate pair"),
    ({"question": "q", "answer": "\udfff"}, "answer holds half a surrogate pair"),
    ({"question": "q", "answer": "1", "reasoning": "\ud800"}, "reasoning holds half a surrogate pair"),
    ({"text": "\ud800"}, "text holds half a surrogate pair"),
    ({**CSQA, "choices": {"label": ["\ud800"], "text": ["x"]}}, "label holds half a surrogate pair"),
    ({**CSQA, "choices": {"label": ["A"], "text": ["\udc00"]}}, "text holds half a surrogate pair"),
    ({**CSQA, "answerKey": "\ud800"}, r"answerKey is '\ud800', which is none of the labels A, B"),
    ({"text": None}, "question and answer missing"),
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
        read_examples(path)
    text = str(error.value)
    assert text.startswith(f"{path}, line 3: ") and complaint in text and "\n" not in text


# Files.

@pytest.mark.parametrize("name, content, complaint", [
    ("a.jsonl", b"", "no examples"),
    ("a.txt", b" \n\n \n", "no examples"),
    ("a.jsonl", b'{"text": "x"}\n{"text": "\xff"}\n', "a.jsonl, line 2: not UTF-8"),
    ("a.txt", b"one\n\ntwo \xe9", "a.txt, line 3: not UTF-8"),
    ("a.txt", b"one\n\xed\xa0\x80", "a.txt, line 2: not UTF-8"),                     # half a surrogate pair
    ("a.txt", "one\ntwo".encode("utf-16-le"), "a.txt, line 1: not UTF-8"),            # NUL after each letter
    ("a.jsonl", b'{"text": "x"}\n' + bytes(9), "a.jsonl, line 2: not UTF-8"),          # as a power cut leaves it
    ("a.jsonl", b'{"text": "x"}\n{"question": "q", "answer": "1"}\n',
     "some rows are questions and some are plain text"),
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
        read_examples(path)
    assert str(path) in str(error.value) and complaint in str(error.value) and "\n" not in str(error.value)


def test_files_joined_from_several(tmp_path):
    """A byte order mark in the middle, where the second file began: text, or no JSON. An escaped NUL is a character."""
    mark, row = "\ufeff".encode(), json.dumps({"text": "a\0\ufeffb"}).encode() + b"\r\n"
    (tmp_path / "a.jsonl").write_bytes((mark + row) * 2)
    assert read_examples(tmp_path / "a.jsonl") == ["a\0\ufeffb"] * 2
    (tmp_path / "a.txt").write_bytes((mark + b"one\r\n\r\n") * 2)
    assert read_examples(tmp_path / "a.txt") == ["one", "one"]


def test_what_might_never_end_is_refused(tmp_path):
    """A pipe that is waited for, a device that fills the memory, a socket: none of them a file that can be read again.
    A link to a file is one, and so is the standard input where it is one."""
    os.mkfifo(tmp_path / "pipe.jsonl")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket.jsonl"))
    for suffix in ("jsonl", "txt", "parquet"):
        (tmp_path / f"zero.{suffix}").symlink_to("/dev/zero")
    (tmp_path / "in.jsonl").symlink_to("/dev/stdin")
    (tmp_path / "link.jsonl").symlink_to(write(tmp_path / "a.jsonl", GOOD))
    program = """if True:
        import resource, sys, read_data
        resource.setrlimit(resource.RLIMIT_AS, (2 ** 31, 2 ** 31))
        for call in (read_data.read_examples, read_data.digest):
            try:
                print(type(call(sys.argv[1])).__name__)
            except read_data.InputError as error:
                print(error)"""
    for name in sorted(path.name for path in tmp_path.iterdir()):
        refused = f"{tmp_path / name}: a pipe, a socket or a device: save what it gives in a file\n" * 2
        with open(tmp_path / "a.jsonl") as file:
            for stdin in ((subprocess.PIPE, file) if name == "in.jsonl" else (file,)):
                process = subprocess.Popen([sys.executable, "-c", program, tmp_path / name], cwd=ROOT, stdin=stdin,
                                           stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
                try:
                    said = process.communicate(timeout=20)[0]
                finally:
                    process.kill()
                right = name in ("a.jsonl", "link.jsonl") or name == "in.jsonl" and stdin is file
                assert said == ("list\nstr\n" if right else refused), name


def test_digest_tells_files_apart(tmp_path):
    """A resumed run on other data than before: the digest of the name, of a part, of the text, or of nothing."""
    content = b"question " * 1_000_000
    for name, with_ in {"a.jsonl": content, "b.txt": content, "c.jsonl": content[:-1] + b"!"}.items():
        (tmp_path / name).write_bytes(with_)
    first, same, other = (digest(str(tmp_path / name)) for name in ("a.jsonl", "b.txt", "c.jsonl"))
    assert first == same == hashlib.sha256(content).hexdigest()[:16] != other
    assert digest(None) == digest("arithmetic") == ""
    with pytest.raises(InputError, match="none.jsonl: cannot be read: No such file or directory"):
        digest(tmp_path / "none.jsonl")
