"""Tests of own_text.py: what rows hold, where texts begin and end, and a file that goes on whatever stopped it."""
import errno
import hashlib
import json
import os
import socket
import subprocess

import pytest
import torch

import data
import generate
import own_text
from console import InputError
from disk import only_one
from gates import GateConfig
from load_weights import load_model, load_tokenizer, save_model
from problems import Example, arithmetic
from read_data import read_examples
from test_read_data import write
from tokens import encode
from toy_runs import Killed, folder, run, toy, words

EOS = 1
FLAGS = dict(n=7, batch_size=3, max_new_tokens=6, device="cpu", seed=5)


@pytest.fixture(scope="module")
def gated(tmp_path_factory):
    """A model with gates that is calibrated to skip nearly everything below budget 1."""
    path = tmp_path_factory.mktemp("gated")
    torch.manual_seed(1)
    model, tokenizer = toy(path, GateConfig(form="scalar"))
    model.config.gateskip = {"skip": "all", "kv": "copy_up", "budget_end": 0.9,
                             "thresholds": {"1.0": [0.0] * 4, "0.9": [1.0] * 4}}
    save_model(model, path, tokenizer)
    return path


def own(model, where, *switches, **flags):
    return own_text.main(words(*switches, **{"write_with": model, "out": where, **FLAGS, **flags}))


def rows(out):
    return [json.loads(line) for line in out.read_text(encoding="utf-8").split("\n")[:-1]]


def files(folder):
    """{name: content} of a folder and the folders in it, but for locks."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*"))
            if path.is_file() and path.name != ".lock"}


def says(monkeypatch, *texts):
    """From now on the model writes these, batch by batch in turn: token ids, as generate returns them."""
    calls = []

    def spoken(model, prompts, *rest):
        start = sum(map(len, calls))
        calls.append(prompts)
        return generate.Generation([list(texts[(start + i) % len(texts)]) for i in range(len(prompts))], None, [])
    monkeypatch.setattr(own_text, "generate", spoken)
    return calls


# Rows.

@pytest.mark.parametrize("start, text, ended, row", [
    ("", "Hi.", True, {"text": "Hi."}), ("Once", " upon", False, {"text": "Once upon", "cut": True}),
    ("", "", True, None), ("", " \n", False, None), ("Once", "", True, None),
    ("Q", " 3 + 4\n#### 7", True, {"question": "q", "answer": "3 + 4\n#### 7"}),
    ("Q", "\n#### 7", True, {"question": "q", "answer": "#### 7"}),
    ("Q", " 3 + 4\n#### 7", False, None), ("Q", " 3 + 4 = 7", True, None), ("Q", " 3\n#### \n", True, None),
    ("Q", "", True, None)])
def test_rows(start, text, ended, row):
    """An empty row, a prompt that stands alone for a text, an answer cut in the middle of its number or without one."""
    start = Example("q", "ignored", "9") if start == "Q" else start
    assert own_text.row_of(start, text, ended) == row


def test_what_is_of_no_use_is_counted(folder, tmp_path, monkeypatch, capsys):
    """Empty texts as empty rows, which training drops in silence; counts of what the model ended that are wrong."""
    tokenizer = load_tokenizer(folder)
    a, b = (encode(tokenizer, text, front=False) for text in ("é\u2028 one", "two"))
    says(monkeypatch, a + [EOS], [EOS], b)
    assert own(folder, tmp_path / "a.jsonl") == 0
    assert rows(tmp_path / "a.jsonl") == ([{"text": "é\u2028 one"}, {"text": "two", "cut": True}] * 3)[:5]
    assert read_examples(tmp_path / "a.jsonl") == (["é\u2028 one", "two"] * 3)[:5]
    said, count = capsys.readouterr().out, 3 * len(a) + 2 * len(b) + 5
    assert f"5 texts, 2 of no use left out; {count} tokens, " in said
    assert "5 of 7 ended by the model" in said and said.count("\n") == 1


def test_answers_read_back_as_they_were_written(folder, tmp_path, monkeypatch):
    """Another prompt than the one that the model was trained on; a loss on the prompt; an answer that training sees
    with other blanks, or behind a second #### where the model wrote one."""
    tokenizer, problems = load_tokenizer(folder), arithmetic(5)
    answers = [data.encode_example(tokenizer, problem, EOS)[0] for problem in problems]
    news = [ids[len(data.encode_prompt(tokenizer, problem.question)):] for ids, problem in zip(answers, problems)]
    path = write(tmp_path / "q.jsonl", *({"question": p.question, "answer": "#### 0"} for p in problems))
    calls = says(monkeypatch, *news)
    assert own(folder, tmp_path / "a.jsonl", prompts=path, n=7) == 0     # 7 texts of 5 prompts: in turn
    prompts = [data.encode_prompt(tokenizer, p.question) for p in problems]
    assert [prompt for batch in calls for prompt in batch] == prompts + prompts[:2]
    assert read_examples(tmp_path / "a.jsonl") == problems + problems[:2]


def test_documents_are_continued(folder, tmp_path, monkeypatch):
    """A prompt's text that is lost, doubled, or ends in a token of its own."""
    path = write(tmp_path / "p.jsonl", {"text": "Tom has "}, {"text": "Ann"})
    tokenizer = load_tokenizer(folder)
    calls = says(monkeypatch, encode(tokenizer, "3 <eos>", front=False))
    assert own(folder, tmp_path / "a.jsonl", prompts=path, n=3) == 0
    assert rows(tmp_path / "a.jsonl") == [{"text": "Tom has 3 "}, {"text": "Ann3 "}, {"text": "Tom has 3 "}]
    assert calls[0] == [encode(tokenizer, text) for text in ("Tom has ", "Ann", "Tom has ")]


def test_training_reads_it(folder, tmp_path):
    """Rows that train.py refuses or drops."""
    assert own(folder, tmp_path / "own.jsonl", n=24, batch_size=24) == 0
    assert run(folder, tmp_path / "run", data=tmp_path / "own.jsonl", steps=1, gate="none") == 0


# Where a text begins, and how it is drawn.

@pytest.mark.parametrize("front, generation, config, start", [
    (True, None, 7, [0]), (False, None, 7, [7]), (False, 8, 7, [8]), (False, None, None, None),
    (False, None, 999, None), (False, None, "<bos>", None), (False, -1, 7, None)])
def test_a_text_begins_where_the_models_own_do(tmp_path, monkeypatch, front, generation, config, start):
    """A second start token, the wrong file's, a traceback where there is none."""
    model, tokenizer = toy(tmp_path / "m", bos_token_id=config)
    (tmp_path / "m/generation_config.json").write_text(json.dumps({"bos_token_id": generation, "eos_token_id": EOS}))
    stored = json.loads(tokenizer.to_str())
    (tmp_path / "m/tokenizer.json").write_text(json.dumps(stored if front else stored | {"post_processor": None}))
    save_model(model, tmp_path / "m")
    calls = says(monkeypatch, [9, 9])
    if start is None:
        with pytest.raises(InputError, match="m has no bos_token_id for a text to start from: give --prompts"):
            own(tmp_path / "m", tmp_path / "a.jsonl")
        assert not list(tmp_path.glob("a*"))
    else:
        assert own(tmp_path / "m", tmp_path / "a.jsonl") == 0
        assert [prompt for batch in calls for prompt in batch] == [start] * 7


@pytest.fixture
def results(monkeypatch):
    """What generate returns from now on."""
    seen = []

    def spied(*args):
        seen.append(generate.generate(*args))
        return seen[-1]
    monkeypatch.setattr(own_text, "generate", spied)
    return seen


def test_texts_are_drawn_from_the_whole_model(gated, tmp_path, results):
    """A gated model that skips while it writes; greedy text; the same draws in each batch; ends that are overrun."""
    assert own(gated, tmp_path / "a.jsonl", n=6) == 0
    drawn = [tuple(new) for result in results for new in result.tokens]
    assert len(results) == 2 and len(set(drawn)) == 6
    assert [result.savings.report()["skipped"] for result in results] == [0.0, 0.0]
    assert all(len(new) == 6 or new[-1] == EOS for new in drawn) and not any(EOS in new[:-1] for new in drawn)
    assert own(gated, tmp_path / "greedy.jsonl", n=6, temperature=0) == 0
    assert len({tuple(new) for result in results[2:] for new in result.tokens}) == 1


@pytest.mark.parametrize("temperature", [1.0, 0.1])
def test_draws_follow_the_models_distribution(folder, tmp_path, results, temperature):
    """A temperature that never reaches the draw, or a share of the tokens that is cut off."""
    assert own(folder, tmp_path / "a.jsonl", n=4000, batch_size=2000, max_new_tokens=1, temperature=temperature) == 0
    with torch.no_grad():
        p = (load_model(folder)(torch.tensor([[0]]))[0][0, -1] / temperature).softmax(-1).double()
    seen = torch.tensor([new for result in results for new, in result.tokens]).bincount(minlength=len(p)) / 4000
    for part in p.argsort().chunk(4):
        want = p[part].sum().item()
        assert abs(seen[part].sum().item() - want) < 4.5 * (want * (1 - want) / 4000) ** 0.5 + 1e-9


# A file that goes on.

def test_it_goes_on_after_a_kill_anywhere(folder, tmp_path, monkeypatch):
    """Rows lost, doubled or drawn anew after a kill between any two writes, or after half a line; progress on the disk
    before its rows are; a finished file that is written once more."""
    (tmp_path / "whole").mkdir()
    assert own(folder, tmp_path / "whole/a.jsonl") == 0
    whole, tails = files(tmp_path / "whole"), (b"", b'{"text": "ha', b'{"text": "whole"}\n')
    assert len(rows(tmp_path / "whole/a.jsonl")) == 7
    for point in range(100):
        part, done, sizes = tmp_path / str(point), [], []
        part.mkdir()

        def killed(name, of):
            def call(*args):
                if len(done) == point:
                    raise Killed
                done.append(name)
                if name == "sync" and args[0].is_file():
                    sizes.append(args[0].stat().st_size)
                return of(*args)
            return call
        with monkeypatch.context() as m:
            for name in ("write", "generate", "sync"):
                m.setattr(own_text, name, killed(name, getattr(own_text, name)))
            try:
                assert own(folder, part / "a.jsonl") == 0
                break
            except Killed:
                pass
        if (part / "a.jsonl").exists():                          # its last batch torn: a whole one stays as it is
            recorded = json.loads((part / "a.jsonl.state/progress.json").read_text())["counts"].get("bytes", 0)
            if (part / "a.jsonl").stat().st_size == recorded:
                (part / "a.jsonl").write_bytes((part / "a.jsonl").read_bytes() + tails[point % 3])
        assert own(folder, part / "a.jsonl") == 0
        assert files(part) == whole, point
    assert done == ["generate", "sync", "write", "sync", "write", *("generate", "sync", "write") * 2]
    assert 0 < sizes[0] < sizes[1] < sizes[2] == len(whole["a.jsonl"])   # before it is synced, and not at its closing
    calls = says(monkeypatch, [5])
    assert own(folder, tmp_path / "whole/a.jsonl") == 0 and not calls and files(tmp_path / "whole") == whole


@pytest.mark.parametrize("changed", [
    dict(n=8), dict(seed=6), dict(temperature=0.5), dict(max_new_tokens=7), dict(batch_size=2), dict(prompts=True),
    dict(dtype="bfloat16"), dict(write_with=True)], ids=lambda changed: next(iter(changed)))
def test_other_settings_leave_it_alone(folder, gated, tmp_path, changed):
    """Half a file at one temperature or of one model and half of another."""
    out, prompts = tmp_path / "a.jsonl", write(tmp_path / "p.jsonl", {"text": "Tom"})
    changed = {key: {"prompts": prompts, "write_with": gated}.get(key, value) for key, value in changed.items()}
    assert own(folder, out) == 0
    before, key = files(tmp_path), "model" if "write_with" in changed else next(iter(changed))
    with pytest.raises(InputError) as error:
        own(folder, out, **changed)
    told = str(error.value)
    assert told.startswith(f"--out {out} was begun with other settings ({key} ") and told.endswith("or --overwrite it")
    assert "\n" not in told and files(tmp_path) == before
    assert json.loads(before["a.jsonl.state/progress.json"])["settings"]["device"] == "cpu"
    assert own(folder, out, "--overwrite", **changed) == 0
    assert own(folder, tmp_path / "b.jsonl", **changed) == 0
    after = files(tmp_path)
    assert after["a.jsonl"] == after["b.jsonl"] and after["a.jsonl.state/progress.json"] != before[
        "a.jsonl.state/progress.json"]


def test_what_is_not_ours_is_left_alone(folder, tmp_path):
    """A data set of the user's that texts are added to or that is cut off, a file that was edited and goes on."""
    out, state = tmp_path / "a.jsonl", tmp_path / "a.jsonl.state/progress.json"
    out.write_text("mine\n")
    with pytest.raises(InputError, match=r"a.jsonl is there, but not .*progress.json, which would tell .* --overwrite"):
        own(folder, out)
    assert files(tmp_path) == {"a.jsonl": b"mine\n"} and not state.parent.exists()
    assert own(folder, out, "--overwrite") == 0 and len(rows(out)) == 7
    whole = files(tmp_path)
    for content in ("mine\n", out.read_text()[:-1], out.read_text().replace('"text"', '"test"', 1), "x" * 5000):
        out.write_text(content)
        with pytest.raises(InputError, match="a.jsonl is no longer what was written there: choose .* --overwrite"):
            own(folder, out)
        assert out.read_text() == content
    out.unlink()
    assert own(folder, out) == 0 and files(tmp_path) == whole            # nothing is there to be harmed


def test_rows_of_the_users_are_not_cut_off(folder, tmp_path):
    """A row that the user appended to a complete file, or many to one that was interrupted, truncated in silence."""
    out, state = tmp_path / "a.jsonl", tmp_path / "a.jsonl.state/progress.json"
    assert own(folder, out) == 0
    whole = files(tmp_path)
    lines, progress = whole["a.jsonl"].splitlines(True), json.loads(state.read_text())
    assert len(lines) == 7
    for drawn, rest in ((7, b"m"), (7, b'{"text": "mine"}\n'), (7, b"\n"), (3, b"mine\n" * 3 + b"m"),
                        (6, b"mine\n" * 2)):
        content = b"".join(lines[:drawn])
        counts = dict(drawn=drawn, texts=drawn, bytes=len(content), tokens=6 * drawn, ended=0)
        state.write_text(json.dumps(progress | {"counts": counts, "sha256": hashlib.sha256(content).hexdigest()}))
        out.write_bytes(content + rest)
        before = files(tmp_path)
        with pytest.raises(InputError, match="a.jsonl is no longer what was written there: choose .* --overwrite"):
            own(folder, out)
        assert files(tmp_path) == before
        out.write_bytes(content)                                 # with them taken out, it goes on
        assert own(folder, out) == 0 and out.read_bytes() == whole["a.jsonl"]


def test_an_overwritten_file_is_there_until_the_new_one_begins(folder, tmp_path, monkeypatch):
    """An old file that is gone before the first batch is written; a kill that leaves the old file to a new state, or
    the new one to the old state, so that nothing goes on."""
    (tmp_path / "new").mkdir()
    assert own(folder, tmp_path / "new/a.jsonl", seed=6) == 0
    new, told = files(tmp_path / "new"), []
    for point in range(100):
        part, left = tmp_path / str(point), [point]
        part.mkdir()
        assert own(folder, part / "a.jsonl", max_new_tokens=9) == 0
        old = files(part)

        def killed(of):
            def call(*args, **kwargs):
                if not left[0]:
                    raise Killed
                left[0] -= 1
                return of(*args, **kwargs)
            return call
        with monkeypatch.context() as m:
            for place, name in ((own_text, "write"), (own_text, "generate"), (own_text, "sync"),
                                (type(part), "unlink"), (own_text, "continuation")):
                m.setattr(place, name, killed(getattr(place, name)))
            try:
                assert own(folder, part / "a.jsonl", "--overwrite", seed=6) == 0
                break
            except Killed:
                pass
        if (part / "a.jsonl").exists() and (part / "a.jsonl").read_bytes() == old["a.jsonl"]:
            assert files(part) == old
            assert own(folder, part / "a.jsonl", max_new_tokens=9) == 0 and files(part) == old
            told.append("old")
        else:
            assert own(folder, part / "a.jsonl", seed=6) == 0 and files(part) == new, point
            told.append("new")
    assert files(part) == new and told == sorted(told, reverse=True) and told.count("old") >= 4


def test_a_link_stays_a_link(folder, tmp_path):
    """A link to another disk that --overwrite replaces by a file."""
    (tmp_path / "disk").mkdir()
    out, real = tmp_path / "a.jsonl", tmp_path / "disk/b.jsonl"
    out.symlink_to(real)
    for seed in (5, 6):
        assert own(folder, out, "--overwrite", seed=seed) == 0 and out.is_symlink() and len(rows(real)) == 7


DAMAGES = {"missing": lambda s: s.pop("counts"), "sum": lambda s: s.pop("sha256"),
           "settings": lambda s: s.pop("settings"),
           **{f"{key} {value!r}": lambda s, key=key, value=value: s.update({key: value})
              for key in ("counts", "sha256", "settings") for value in ([], None, "x", 7, 0.5)},
           **{f"{key} {value!r}": lambda s, key=key, value=value: s["counts"].update({key: value})
              for key in ("drawn", "texts", "bytes", "tokens", "ended") for value in ("3", 3.0, -1, None, [])},
           **{f"no {key}": lambda s, key=key: s["counts"].pop(key)
              for key in ("drawn", "texts", "bytes", "tokens", "ended")},
           "drawn > n": lambda s: s["counts"].update(drawn=8), "texts > drawn": lambda s: s["counts"].update(drawn=6),
           "ended > drawn": lambda s: s["counts"].update(ended=8)}


@pytest.fixture(scope="module")
def complete(folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("complete")
    assert own(folder, path / "a.jsonl") == 0
    return path, files(path)


@pytest.mark.parametrize("damage", ["", "[]", "[", "{}", "null", "7", "\ud800", "[" * 100_000, *DAMAGES],
                         ids=lambda damage: damage[:20] or "empty")
def test_a_damaged_state_is_told(folder, complete, damage):
    """A traceback, texts drawn from a wrong place on, or nonsense counted as done."""
    complete, before = complete
    out, state = complete / "a.jsonl", complete / "a.jsonl.state/progress.json"
    out.write_bytes(before["a.jsonl"])
    if damage in DAMAGES:
        stored = json.loads(before["a.jsonl.state/progress.json"])
        DAMAGES[damage](stored)
        damage = json.dumps(stored)
    state.write_bytes(damage.encode(errors="surrogatepass"))
    damaged = files(complete)
    with pytest.raises(InputError) as error:
        own(folder, out)
    assert str(error.value) == f"--out {out}: {state} is damaged: choose another --out, or --overwrite it"
    assert files(complete) == damaged
    assert own(folder, out, "--overwrite") == 0 and files(complete) == before


def test_one_text_is_counted_as_one(folder, tmp_path, capsys):
    """"True texts"."""
    assert own(folder, tmp_path / "a.jsonl", n=1) == 0
    assert " 1 texts; 6 tokens" in capsys.readouterr().out


def test_one_process_at_a_time(folder, tmp_path):
    """Two processes whose rows are mixed."""
    with only_one(tmp_path / "a.jsonl.state"), pytest.raises(InputError) as error:
        own(folder, tmp_path / "a.jsonl")
    assert f"a.jsonl.state is being written by process {os.getpid()}" in str(error.value)
    assert own(folder, tmp_path / "b.jsonl") == 0


@pytest.mark.parametrize("name", ["sync", "write"])
def test_a_full_disk_is_told_and_mended(folder, tmp_path, monkeypatch, name):
    """A traceback, or an error that names no file, after hours; what was written before it lost."""
    of, left = getattr(own_text, name), [1]

    def full(*args):
        if not left[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        left[0] -= 1
        return of(*args)
    (tmp_path / "whole").mkdir()
    assert own(folder, tmp_path / "whole/a.jsonl") == 0
    with monkeypatch.context() as m, pytest.raises(InputError) as error:
        m.setattr(own_text, name, full)
        own(folder, tmp_path / "a.jsonl")
    assert str(error.value) == (f"--out {tmp_path}/a.jsonl: No space left on device: with that mended, the same "
                                "command goes on")
    assert own(folder, tmp_path / "a.jsonl") == 0
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "whole/a.jsonl").read_bytes()


# The command.

@pytest.mark.parametrize("flags, told", [
    (dict(out="no/a.jsonl"), "--out no/a.jsonl: --write-with needs a .jsonl file in a folder: no pipe, and not"),
    *((dict(out=f"{name}.jsonl"), f"--out {name}.jsonl: --write-with needs") for name in (
        "pipe", "device", "socket")),
    *((dict(out="own.jsonl", prompts=name), "--out own.jsonl: --write-with needs") for name in (
        "own.jsonl", "./own.jsonl", "link.jsonl")),
    (dict(prompts=""), "--prompts is empty: "), (dict(write_with=""), "--write-with is empty: "),
    (dict(data=""), "--data is empty: "), (dict(n=10 ** 9 + 1), "--n: '1000000001' must be"),
    (dict(out="a.txt"), "--out a.txt: --write-with needs"), (dict(out=""), "--out : --write-with needs"),
    (dict(out="d.jsonl"), "--out d.jsonl: --write-with needs"), (dict(n=0), "--n: '0' must be"),
    (dict(max_new_tokens=512), "--max-new-tokens 512: the longest prompt leaves the model room for 511"),
    (dict(prompts="long.txt"), "--max-new-tokens 6: the longest prompt leaves the model room for 0"),
    (dict(prompts="none.txt"), "none.txt: cannot be read"), (dict(write_with="none"), "none does not exist"),
    (dict(temperature=-1), "--temperature"), (dict(data="arithmetic2"), "--data goes not with --write-with")])
def test_bad_input_is_one_line(folder, tmp_path, monkeypatch, flags, told):
    """A traceback, a text that fails hours later, a folder or a file that is left behind."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d.jsonl").mkdir()
    (tmp_path / "long.txt").write_text("1" * 600)
    write(tmp_path / "own.jsonl", {"text": "Tom"})
    os.mkfifo("pipe.jsonl")
    (tmp_path / "device.jsonl").symlink_to("/dev/null")
    (tmp_path / "link.jsonl").symlink_to("own.jsonl")
    with socket.socket(socket.AF_UNIX) as there:
        there.bind("socket.jsonl")
    before = sorted(tmp_path.rglob("*"))
    for switches in ([], ["--overwrite"]):
        with pytest.raises(InputError) as error:
            own(folder, flags.get("out", "a.jsonl"), *switches, **flags)
        assert str(error.value).startswith(told) and "\n" not in str(error.value)
        assert sorted(tmp_path.rglob("*")) == before
    assert read_examples("own.jsonl") == ["Tom"]
    with pytest.raises(InputError, match="--out None: --write-with needs"):
        own_text.main([])


def test_data_py_hands_over(folder, tmp_path, monkeypatch, capfd):
    """A flag or an exit code that is lost on the way; errors that end in a traceback there."""
    assert data.main(words(write_with="none", out=tmp_path / "a.jsonl")) == 1
    out, err = capfd.readouterr()
    assert err.splitlines()[-1].startswith("error: none does not exist") and "Traceback" not in err and out == ""
    monkeypatch.setattr(subprocess, "call", lambda command: own_text.main(command[2:]))
    assert data.main(words(write_with=folder, out=tmp_path / "a.jsonl", **FLAGS)) == 0
    own(folder, tmp_path / "b.jsonl")
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
