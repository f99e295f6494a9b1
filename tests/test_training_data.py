"""training_data.py: the paper's counts from files of the real sizes, what is held out, and the hub's ways to fail."""
import json
import sys
from types import SimpleNamespace

import huggingface_hub
import pytest

from conftest import complaint
from data import load_examples
from toy_runs import ROOT

sys.path.insert(0, str(ROOT / "paper"))

import training_data
from training_data import merged


def gsm8k(i):
    return {"question": f"g{i}", "answer": f"short\n#### {i}", "reasoning_nemotron_70B": f"<reasoning>r{i}</reasoning>"}


def csqa(i):
    return {"question": f"c{i}", "choices": {"label": list("ABCDE"), "text": list("vwxyz")},
            "answerKey": "ABCDE"[i % 5], "reasoning_nemotron_70B": f"<reasoning>because {i}</reasoning>"}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def files(tmp_path):
    return ["--gsm8k", write(tmp_path / "g.jsonl", map(gsm8k, range(7473))), "--commonsense-qa",
            write(tmp_path / "c.jsonl", map(csqa, range(9741)))]


def test_the_papers_counts(files, tmp_path, capsys):
    """A tenth rounded up, a set lost in the merge, reasoning or options that do not come back from the file."""
    out, held = tmp_path / "out.jsonl", tmp_path / "held.jsonl"
    assert training_data.main(["traces", *files, "--out", str(out), "--held-out", str(held)]) == 0
    rest, left = load_examples(str(out)), load_examples(str(held))
    assert (len(rest), len(left)) == (15_493, 1_721) and "15493 examples; held out: 1721" in capsys.readouterr().out
    everyone = {e.question: e for e in rest + left}
    assert len(everyone) == 17_214
    assert (everyone["g7"].reasoning, everyone["g7"].answer) == ("r7", "7")
    asked = everyone["c7\nA: v\nB: w\nC: x\nD: y\nE: z"]
    assert (asked.reasoning, asked.answer) == ("because 7", "C")
    first = [e.question[0] for e in rest[:300]]
    assert 100 < first.count("g") < 200                          # merged, and not one behind the other


def test_the_order_is_drawn_by_the_seed():
    """Another split with the same seed, or the same with another."""
    a, b, c = merged(range(100), 1), merged(range(100), 1), merged(range(100), 2)
    assert a == b != c and sorted(a[0] + a[1]) == list(range(100)) and len(a[1]) == 10
    assert merged(range(19), 1)[1] != [] and len(merged(range(19), 1)[1]) == 1


class Hub:
    """A hub of local files, in place of HfFileSystem."""

    def __init__(self, files, broken=False):
        self.files, self.broken = files, broken

    def glob(self, pattern):
        start = pattern.removesuffix("/*.parquet").removesuffix("*.parquet")
        return [name for name in self.files if name.startswith(start)]

    def open(self, name):
        if self.broken and name != min(self.files):
            raise OSError("connection lost")
        return open(self.files[name], "rb")


@pytest.fixture
def shards(tmp_path):
    """Two files of FineWeb and one of WMT16, three rows each, in row groups of two."""
    import pyarrow
    from pyarrow import parquet
    found, page = {}, lambda *texts: [{"text": text, "url": "u"} for text in texts]
    for name, rows in ((f"{training_data.FINEWEB}/000", page("aaaa", "b", "cccc")),
                       (f"{training_data.FINEWEB}/001", page("dddd", "e", "ffff")),
                       ("wmt/wmt16@5ha/ro-en/train-0", [{"translation": {"en": f"e{i}", "ro": f"r{i}"}}
                                                    for i in range(3)])):
        path = tmp_path / f"{len(found)}.parquet"
        parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=2)
        found[f"datasets/{name}.parquet"] = path
    return found


class Api:
    """What HfApi says of every data set."""

    def dataset_info(self, repo):
        return SimpleNamespace(sha="5ha")

    def list_repo_files(self, repo, repo_type, revision):
        return [f"data/{split}-0.parquet" for split in ("train", "test")]


def test_traces_are_read_at_one_commit(files, tmp_path, monkeypatch, capsys):
    """A listing of one commit and files of another, or a commit that nobody can look up afterwards."""
    asked = []
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repo, name, repo_type, revision: (
        asked.append((name, revision)), files[1 if "gsm8k" in repo else 3])[1])
    assert training_data.main(["traces", "--out", str(tmp_path / "out.jsonl")]) == 0
    assert asked == [("data/train-0.parquet", "5ha")] * 2
    out = capsys.readouterr().out
    assert all(f"reading {repo}@5ha\n" in out for repo in training_data.TRACES.values())


def test_fineweb_and_wmt16(shards, tmp_path, monkeypatch, capsys):
    """Short documents that come along, a file or a row group left out, a limit that is none."""
    monkeypatch.setattr(huggingface_hub, "HfFileSystem", lambda: Hub(shards))
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    made = lambda *argv: (training_data.main([*argv, "--out", str(tmp_path / f"{len(argv)}.jsonl")]),
                          load_examples(str(tmp_path / f"{len(argv)}.jsonl")))[1]
    assert made("fineweb", "--min-chars", "2") == ["aaaa", "cccc", "dddd", "ffff"]
    assert made("fineweb", "--min-chars", "2", "--n", "3") == ["aaaa", "cccc", "dddd"]
    assert made("wmt16") == [f"translate English to Romanian: e{i}\nr{i}" for i in range(3)]
    assert "reading wmt/wmt16@5ha\n" in capsys.readouterr().out
    monkeypatch.setattr(huggingface_hub, "HfFileSystem", lambda: Hub(shards, broken=True))
    out = tmp_path / "cut.jsonl"
    told = complaint(training_data.main, ["fineweb", "--min-chars", "2", "--out", str(out)])
    assert "connection lost" in told and "2 texts are in" in told and not out.exists()
    assert (tmp_path / "cut.jsonl.part").read_text().count("\n") == 2
    monkeypatch.setattr(huggingface_hub, "HfFileSystem", lambda: Hub(shards))
    assert "no text of --min-chars 99" in complaint(
        training_data.main, ["fineweb", "--min-chars", "99", "--out", str(out)]) and not out.exists()


def test_bad_input(files, tmp_path, monkeypatch):
    """A traceback of the hub's, or a file written over."""
    def offline(*_, **__):
        raise OSError("offline")
    monkeypatch.setattr(huggingface_hub, "HfApi", offline)
    monkeypatch.setattr(huggingface_hub, "HfFileSystem", offline)
    out = ["--out", str(tmp_path / "new.jsonl")]
    assert "multi-domain-reasoning/gsm8k cannot be had from the hub (offline)" in complaint(
        training_data.main, ["traces", *out])
    assert "cannot be read from the hub to its end (offline)" in complaint(training_data.main, ["fineweb", *out])
    assert "are for traces" in complaint(training_data.main, ["wmt16", *files[:2], *out])
    assert "give the name of a new" in complaint(training_data.main, ["traces", *files, "--out", files[1]])
    (tmp_path / "plain.txt").write_text("a b c")
    assert "plain text" in complaint(training_data.main, ["traces", "--gsm8k", str(tmp_path / "plain.txt"), *files[2:],
                                                          *out])
    assert "is --out, too" in complaint(training_data.main, ["traces", *files, *out, "--held-out",
                                                            str(tmp_path / "a" / ".." / "new.jsonl")])
    assert "--out : give the name" in complaint(training_data.main, ["traces", *files, "--out", ""])
    assert not (tmp_path / "new.jsonl").exists()
