"""A file of questions, or of plain text -> examples. Every complaint is one line that says where: the file and the line
(or the row, in parquet).
"""
import json
import re
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
    """One row -> Example or str ("" for a blank document, which teaches nothing); InputError if it is neither."""
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
