"""The rows of the benchmarks' data sets, from the hub or from files in the formats in which they were published.

rows("piqa", "validation", folder) looks into a folder given with --data for a file of one of the names in SOURCES, in
it or in its folder of the data set's name; without a folder, or a file, the hub is asked. Whatever the format, a row
comes out with the columns of the hub's data set, which is what tasks.py reads.
"""
import bz2
import csv
import io
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from console import InputError
from tasks import SUBJECTS


@dataclass(frozen=True)
class Source:
    """Where a data set is. hub: {split: file in the repository}; files: {split: names of a file at hand}."""
    repo: str
    hub: dict
    files: dict
    revision: str               # a commit, on which other projects agree; main: its newest (the results name it)
    columns: tuple


def parquet(folder, *splits):
    """{split: file} in the hub's usual layout."""
    return {split: f"{folder}/{split}-00000-of-00001.parquet" for split in splits}


SOURCES = {
    "mmlu": Source("cais/mmlu", {}, {}, "c30699e8356da336a370243923dbaf21066bb9fe",
                   ("question", "choices", "answer")),           # see source_of
    "hellaswag": Source("Rowan/hellaswag", parquet("data", "train", "validation"), {
        "train": ("hellaswag_train.jsonl",), "validation": ("hellaswag_val.jsonl", "hellaswag_val_full.txt.bz2")},
        "218ec52e09a7e7462a5400043bb9a69a41d06b76", ("endings", "label")),
    "commonsense_qa": Source("tau/commonsense_qa", parquet("data", "train", "validation"), {
        "train": ("train_rand_split.jsonl", "commonsenseqa_train.jsonl"),
        "validation": ("dev_rand_split.jsonl", "commonsenseqa_dev.jsonl")},
        "94630fe30dad47192a8546eb75f094926d47e155", ("question", "choices", "answerKey")),
    "piqa": Source("baber/piqa", {s: f"piqa_{s}.parquet" for s in ("train", "validation")}, {
        "train": ("piqa_train.jsonl", "train.jsonl"), "validation": ("piqa_valid.jsonl", "valid.jsonl")},
        "142f6d7367fd9877f0fb3b5734ea6a545f54cdd1", ("goal", "sol1", "sol2", "label")),
    "openbookqa": Source("allenai/openbookqa", parquet("main", "train", "validation", "test"), {
        "train": ("openbookqa_train.tsv", "train.tsv"), "validation": ("openbookqa_dev.tsv", "dev.tsv"),
        "test": ("openbookqa_test.tsv", "test.tsv")},
        "388097ea7776314e93a529163e0fea805b8a6454", ("question_stem", "choices", "answerKey")),
    "winogrande": Source("allenai/winogrande", parquet("winogrande_xl", "train", "validation"), {
        "train": ("train_xl.jsonl",), "validation": ("dev.jsonl",)},
        "01e74176c63542e6b0bcb004dcdea22d94fb67b5", ("sentence", "option1", "option2", "answer")),
    "lambada": Source("EleutherAI/lambada_openai", {"test": "data/lambada_test.jsonl"}, {
        "test": ("lambada_test.jsonl",)}, "900124bf3b8235c6daf21033af9948b3f07346c4", ("text",)),
    "wikitext": Source("EleutherAI/wikitext_document_level", {
        s: f"wikitext-2-raw-v1/wikitext-2-raw-v1-{s}.parquet" for s in ("validation", "test")}, {
        s: (f"wiki.{s[:5]}.raw", f"wiki.{s[:5]}.tokens", f"wikitext2_{s[:5]}.txt") for s in ("validation", "test")},
        "647234772b9554e208af6c826f23b99e3cac88c8", ("text",)),
    "gsm8k": Source("openai/gsm8k", parquet("main", "train", "test"), {
        "train": ("train.jsonl",), "test": ("test.jsonl",)},
        "740312add88f781978c0658806c59bc2815b9866", ("question", "answer")),
    "wmt16": Source("wmt/wmt16", parquet("ro-en", "train", "validation", "test"), {}, "main", ("translation",)),
}


def source_of(name):
    """The Source of a data set; of "mmlu/anatomy", a subject of it, or of "mmlu/all"."""
    if not name.startswith("mmlu/"):
        return SOURCES[name]
    part, whole = name[5:], SOURCES["mmlu"]
    return Source(whole.repo, parquet(part, "dev", "validation", "test"), {
        split: (f"{split}/{part}_{split}.csv", f"{part}_{split}.csv") for split in ("dev", "test") if part != "all"},
        whole.revision, whole.columns)


def wrong_with(row):
    """ "" or what cannot be asked of a row: a text that is none or blank, an answer beside the choices."""
    for key in ("question", "question_stem", "goal", "sol1", "sol2", "sentence", "option1", "option2", "text",
                "activity_label", "ctx", "ctx_a", "answerKey"):
        if key in row and (not isinstance(row[key], str) or not row[key].strip() and key != "activity_label"):
            return f"{key} is {row[key]!r:.60}, not a text"
    if "translation" in row and not all(str(row["translation"].get(key) or "").strip() for key in ("en", "ro")):
        return "translation lacks en or ro"
    if "question" in row and "choices" not in row and not str(row.get("answer") or "").strip():
        return f"answer is {row.get('answer')!r:.40}, not a text"
    choices, golds = row.get("choices", row.get("endings", ())), None
    if isinstance(choices, dict):
        golds, choices = choices.get("label"), choices.get("text")
        if not (isinstance(golds, list) and isinstance(choices, list) and len(golds) == len(choices) > 1):
            return "choices has not as many labels as texts"
        if str(row.get("answerKey")).strip() not in golds:
            return f"answerKey is {row.get('answerKey')!r:.40}, none of {', '.join(map(str, golds))}"
    if not (isinstance(choices, (list, tuple)) and all(isinstance(c, str) and c.strip() for c in choices)):
        return f"a choice is no text: {choices!r:.80}"
    most = len(choices) or 2
    for key, allowed in (("label", range(most)), ("answer", range(1, 3) if "sentence" in row else range(most))):
        if key in row and not (key == "answer" and "choices" not in row and "sentence" not in row):
            if isinstance(row[key], (bool, float)) or str(row[key]) not in map(str, allowed):
                return f"{key} is {row[key]!r:.40}, none of {', '.join(map(str, allowed))}"
    return ""


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------

def read(path):
    """A file -> list of dicts, one per row. InputError for a format that is not known, and for what cannot be read."""
    name = path.name
    if not name.endswith((".parquet", ".jsonl", ".csv", ".tsv", ".txt", ".txt.bz2", ".tokens", ".raw")):
        raise InputError(f"{path}: its format is not known: parquet, jsonl, csv, tsv, txt and txt.bz2 are")
    where = path
    try:
        if name.endswith(".parquet"):
            try:
                from pyarrow.parquet import read_table
            except ImportError:
                raise InputError(f"{path}: reading parquet needs pyarrow: pip install pyarrow") from None
            return read_table(path).to_pylist()
        text = (bz2.decompress(path.read_bytes()) if name.endswith(".bz2") else path.read_bytes()).decode("utf-8-sig")
        if name.endswith(".jsonl"):
            found = []
            for number, line in enumerate(text.split("\n"), 1): # splitlines() would also cut at U+2028 and U+0085
                where = f"{path}, line {number}"
                if line.strip():
                    found.append(dict(json.loads(line)))
            return found
        if name.endswith(".csv"):
            found = []
            for number, line in enumerate(filter(any, csv.reader(io.StringIO(text, newline=""))), 1):
                where = f"{path}, row {number}"
                if line[0] != "question" or number > 1:          # MMLU's has a header, or none
                    found.append(mmlu_row(line))
            return found
        if name.endswith(".tsv"):
            return list(csv.DictReader(io.StringIO(text, newline=""), delimiter="\t", quoting=csv.QUOTE_NONE))
        if name.endswith(".txt.bz2"):                            # six lines each: context, number of the right, endings
            lines = text.removesuffix("\n").split("\n")
            if len(lines) % 6:
                raise ValueError(f"{len(lines)} lines, and a question has six")
            return [{"ctx": lines[i], "label": lines[i + 1], "endings": lines[i + 2:i + 6]}
                    for i in range(0, len(lines), 6)]
        pages = re.split(r"\n(?= = [^=].*[^=] = *\n)", f"\n{text}")            # each begins with " = Its title = "
        return [{"text": page} for page in pages if page.strip()]              # words are counted with its blanks
    except (OSError, EOFError, UnicodeDecodeError, ValueError, TypeError, RecursionError, csv.Error) as error:
        raise InputError(f"{where}: not readable in its format: {' '.join(str(error).split())[:160]}") from None


def mmlu_row(line):
    """Columns question, four choices, answer: 0 to 3, or A to D. ValueError for anything else."""
    if len(line) != 6 or line[5] not in [*"0123", *"ABCD"]:
        raise ValueError(f"six columns, the last of them 0 to 3 or A to D, and not {line!r:.80}")
    return {"question": line[0], "choices": line[1:5], "answer": "0123ABCD".index(line[5]) % 4}


def options(text):
    """"(A) one (B) two" -> (["A", "B"], ["one", "two"])"""
    marks = list(re.finditer(r"\(([A-D])\) ", text))
    ends = [m.start() for m in marks[1:]] + [len(text)]
    return [m[1] for m in marks], [text[m.end():end].strip() for m, end in zip(marks, ends)]


def as_on_the_hub(row, labels, number):
    """A row with the hub's columns, whatever the published file calls them. labels: of PIQA's second file."""
    if labels:
        row = row | {"label": labels[number]}
    if "Question Stem" in row:
        letters, texts = options(row["Choices"])
        row = {"question_stem": row["Question Stem"], "choices": {"label": letters, "text": texts},
               "answerKey": row["Answer Key"]}
    if "page" in row:                                            # wikitext by documents
        row = {"text": row["page"]}
    if isinstance(row.get("question"), dict):
        found = row["question"]["choices"]
        row = row | {"question": row["question"]["stem"],
                     "choices": {key: [choice[key] for choice in found] for key in ("label", "text")}}
    return row


def find_local(name, split, folder):
    """The file of a split in a folder, or None; of "mmlu/all" the folder itself if it has each subject's."""
    source = source_of(name)
    parts = [Path(folder) / name.split("/")[0], Path(folder)] if folder else []      # its own, where names say less
    plain = f"{split}.parquet" * (not name.startswith("mmlu/") or name == "mmlu/all")
    names = [file for file in (*source.files.get(split, ()), source.hub.get(split), plain) if file]
    tried = [part / file for part in parts for file in names]
    if folder and name == "mmlu/all" and all(find_local(f"mmlu/{part}", split, folder) for part in SUBJECTS):
        tried.append(Path(folder))
    return next((path for path in tried if path.exists()), None)


def find(name, split, folder):
    """(path of the split, where it came from). The hub's are kept in its own cache. InputError where there is none."""
    if folder is not None and not Path(folder).is_dir():
        raise InputError(f"--data {folder}: no such folder")
    source, path = source_of(name), find_local(name, split, folder)
    if path:
        return path, str(path)
    if split not in source.hub:
        raise InputError(f"{name} has no split called {split}" + (f" in --data {folder}" if folder else ""))
    from huggingface_hub import hf_hub_download
    try:
        path = Path(hf_hub_download(source.repo, source.hub[split], repo_type="dataset", revision=source.revision))
    except Exception as error:  # of many kinds: no network, no such file, a licence
        names = ", ".join(source.files.get(split, ())) or source.hub[split]
        here = f"not in --data {folder}, where {names} would do, and " if folder else ""
        raise InputError(f"{name}, split {split}: {here}the hub's {source.repo} cannot be had "
                         f"({' '.join(str(error).split())[:120]}): download it and give its folder by --data") from None
    return path, f"{source.repo}@{path.parts[-len(Path(source.hub[split]).parts) - 1]}"   # in the folder of its commit


def unlike_the_hub(path):
    """ "" or what a published file has otherwise than the hub's data set, which the harness asks."""
    if path.name.endswith(".txt.bz2"):
        return "second sentences of contexts are not capitalised, as the harness has them"
    return "rare words are <unk>, and in the harness's raw text they are not" * path.name.endswith((".txt", ".tokens"))


def rows(name, split, folder=None):
    """(list of rows of a split, where they came from: a path, or the repository with its commit).

    name: a key of SOURCES, or "mmlu/SUBJECT". InputError for a split, a format or a column that it lacks."""
    path, origin = find(name, split, folder)
    if path.is_dir():                                            # a file per subject: MMLU as published
        return [row for subject in SUBJECTS for row in rows(f"mmlu/{subject}", split, folder)[0]], origin
    found, beside = read(path), path.with_name(f"{path.stem}-labels.lst")        # PIQA has a file of answers
    labels = beside.read_bytes().decode(errors="replace").split() if beside.is_file() else []
    if labels and len(labels) != len(found):
        raise InputError(f"{path}: {len(found)} rows and {len(labels)} labels in {beside}")
    if not found:
        raise InputError(f"{path}: there are no rows in it")
    subject, rows_found = {"subject": name[5:]} if name.startswith("mmlu/") else {}, []
    for number, row in enumerate(found):
        where = f"{path}, row {number + 1}" + f", or its label in {beside.name}" * bool(labels)
        try:
            row = as_on_the_hub(row, labels, number)
        except (LookupError, TypeError, AttributeError):
            raise InputError(f"{where}: not as it was published: {row!r:.160}") from None
        if lacking := [column for column in source_of(name).columns if column not in row]:
            whose = [other for other, s in SOURCES.items() if other != name and path.name in s.files.get(split, ())]
            raise InputError(f"{where}: no column {', '.join(lacking)}; it has {', '.join(map(str, row))}" + "".join(
                f"; if it is of {other}, move it into {Path(folder) / other}" for other in whose))
        if wrong := wrong_with(row):
            raise InputError(f"{where}: {wrong}")
        if subject and row.get("subject", name[5:]) != name[5:] != "all":
            raise InputError(f"{where}: a question of {row['subject']!r:.40}, not of {name}")
        rows_found.append(subject | row)
    if other := unlike_the_hub(path):
        print(f"CAUTION: {path}: {other}", file=sys.stderr)
        origin += f" ({other})"
    return rows_found, origin
