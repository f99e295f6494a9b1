"""A file of questions, or of plain text -> examples. Every complaint is one line that says where: the file and the line
(or the row, in parquet).
"""
import hashlib
import json
import re
import stat
from pathlib import Path

from console import InputError

from problems import Example


def read_examples(path):
    """Path of a .jsonl, .parquet or .txt file -> list[Example], or list[str] for plain text. Else InputError.

    The columns tell what a row is:
      question, answer                       GSM8K: the answer ends in "\\n#### 72"; its <<48/2=24>> marks are kept
      question, answer, reasoning            the same with the reasoning apart
      question, choices, answerKey           CommonsenseQA; `reasoning` may be there, with or without <reasoning> tags
      text                                   a document
    A column that is null in a row is not there. In a .txt file each paragraph is a document, with blank lines between.
    """
    path = Path(path)
    kind = path.suffix.lower()
    if kind not in READERS:
        raise InputError(f"{path}: the data must be a .jsonl, .parquet or .txt file, or the word arithmetic")
    rows = READERS[kind](path)  # (where, row), …
    examples = [example for example in (_to_example(row, where) for where, row in rows) if example != ""]
    if not examples:
        raise InputError(f"{path}: there are no examples in it")
    if len({type(example) for example in examples}) > 1:
        raise InputError(f"{path}: some rows are questions and some are plain text; put them into two files")
    return examples


def digest(path):
    """What tells a data file from another: 16 hex digits of its sha256; "" for no file (None, or the word arithmetic).

    InputError for a file that cannot be read."""
    return "" if path in (None, "arithmetic") else hashlib.sha256(_bytes(Path(path))).hexdigest()[:16]


def _bytes(path, n=-1):
    """The first n bytes, or all. InputError for what cannot be read, and for what might never end."""
    try:
        if not stat.S_ISREG(path.stat().st_mode) and not path.is_dir():
            raise InputError(f"{path}: a pipe, a socket or a device: save what it gives in a file")
        with open(path, "rb") as file:
            return file.read(n)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None


def _decode(path):
    """The text of a UTF-8 file, without byte order marks, which stand at the start of each of several files joined."""
    content = _bytes(path)
    try:
        if (nul := content.find(0)) >= 0:                        # UTF-16 without a mark, or a disk's empty blocks
            raise UnicodeDecodeError("utf-8", content, nul, nul + 1, "NUL")
        return ("\n" + content.decode()).replace("\n\ufeff", "\n")[1:]
    except UnicodeDecodeError as error:
        raise InputError(f"{path}, line {content[:error.start].count(10) + 1}: not UTF-8 text") from None


def _txt_rows(path):
    text = _decode(path).replace("\r\n", "\n")
    return [(path, {"text": paragraph.strip()}) for paragraph in re.split(r"\n\s*\n", text)]


def _jsonl_rows(path):
    for number, line in enumerate(_decode(path).split("\n"), 1):  # splitlines() would also cut at U+2028
        if line.strip():
            where = f"{path}, line {number}"
            try:
                yield where, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise InputError(f"{where}: not valid JSON: {error}") from None


COLUMNS = ("question", "answer", "reasoning", "reasoning_nemotron_70B", "choices", "answerKey", "text")


def _parquet_rows(path):
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise InputError(f"{path}: reading parquet needs pyarrow: pip install pyarrow") from None
    _bytes(path, 1)
    try:
        # Arrow's own file: a thread of Arrow that outlives Python aborts if it has a Python object to let go of. (A
        # path would be taken for an address where it can be.)
        with pyarrow.OSFile(str(path)) as file, parquet.ParquetFile(file) as table:
            columns = [name for name in table.schema_arrow.names if name in COLUMNS]
            rows = table.read(columns=columns).to_pylist()
    except (pyarrow.ArrowException, OSError, UnicodeError) as error:
        raise InputError(f"{path}: not a readable parquet file: {str(error).splitlines()[0]}") from None
    return [(f"{path}, row {number}", row) for number, row in enumerate(rows, 1)]


# What a row lacks, where rows of several kinds share a schema.
NULLS = (None, {"label": None, "text": None}, {"label": [], "text": []})
READERS = {".txt": _txt_rows, ".jsonl": _jsonl_rows, ".parquet": _parquet_rows}


def _to_example(row, where):
    """One row -> Example or str ("" for a blank document, which teaches nothing); InputError if it is neither."""
    if not isinstance(row, dict):
        raise InputError(f"{where}: expected an object with named fields, not {type(row).__name__}")
    row = {name: value for name, value in row.items() if value not in NULLS}
    if "text" in row and "question" not in row:
        text = _text(row["text"], "text", where)
        return text if text.strip() else ""
    needed = ("question", "choices", "answerKey") if "choices" in row else ("question", "answer")
    missing = [field for field in needed if field not in row]
    if missing:
        raise InputError(f"{where}: {' and '.join(missing)} missing; a row needs question and answer, "
                         f"or question, choices and answerKey, or text")
    question = _text(row["question"], "question", where)
    # The paper's CommonsenseQA traces stand in a column of the long name, between tags.
    column = next((name for name in ("reasoning", "reasoning_nemotron_70B") if name in row), None)
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
