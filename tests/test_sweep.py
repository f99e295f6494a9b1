"""Tests of sweep.py: rows that are kept, reused and told apart, intervals, and interpolation."""
import json
import shutil
from pathlib import Path

import pytest

import disk
import sweep
from console import InputError
from load_weights import model_digest, save_model
from problems import Example, arithmetic
from sweep import TARGETS, add_row, check_compared, data_digest, interpolate, joined, open_sweep, rows_of, wilson
from toy_runs import toy

MADE = {"model": "aa", "dense": None, "data": "dd", "problems": 200, "policy": "frozen", "seed": 0}
WANTED = [["GateSkip", 1.0], ["GateSkip", 0.9], ["random ranks, gated", 0.9]]


def row_of(name="GateSkip", budget=0.9, **changes):
    three = dict(skipped=1 - budget, skipped_per_call=0.1, macs_saved=0.1)
    return {"row": name, "policy": "frozen", "budget": budget, "n": 200, "accuracy": 0.5, "low": 0.4, "high": 0.6,
            "stderr": 0.01, "flexible": 0.5, "cut": 0, **three, "seconds": 1.0, **changes}


def stored(file, rows, wanted=WANTED, **made):
    """A file with these rows of a sweep that wanted more, or not."""
    content = open_sweep(file, {"model": "runs/x"}, MADE | made, wanted)
    for row in rows:
        add_row(file, content, row)
    return file.read_text()


# Intervals.

@pytest.mark.parametrize("right, n, low, high", [
    (81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)])
def test_wilson_as_published(right, n, low, high):
    """Another interval under Wilson's name: the examples of Newcombe (1998), table I, method 3."""
    assert wilson(right / n, n) == pytest.approx((low, high), abs=5e-5)


def test_wilson_by_hand():
    """No doubt left at 0% and at 100%; ends beyond them, or on the wrong side of the share, by a rounding error."""
    z = 1.959964
    for n in (1, 7, 200, 1319):
        assert wilson(0.0, n) == (0.0, pytest.approx(z * z / (n + z * z)))
        assert wilson(1.0, n) == (pytest.approx(n / (n + z * z)), 1.0)
        for right in range(n + 1):
            low, high = wilson(right / n, n)
            assert 0 <= low <= right / n <= high <= 1 and high - low > 0.0005
            for edge in {low, high} - {0.0, 1.0}:                # as far as the score test lets it
                assert abs(right / n - edge) == pytest.approx(z * (edge * (1 - edge) / n) ** 0.5)


# Accuracy at exactly so much skipped.

def test_interpolation_by_hand():
    """A clamp where nothing was measured, points taken in the order of the file, a knot missed by a rounding error."""
    a, c = 0.9, 0.5
    assert interpolate([(0.0, a), (0.4, c)], (0.1,)) == pytest.approx([a + (c - a) / 4])
    knots = [(0.3, 0.2), (0.0, 0.8), (0.1 + 0.2 - 0.2, 0.6)]     # unsorted; the last is not quite 0.1
    assert interpolate(knots, (0.0, 0.1, 0.3)) == [0.8, 0.6, 0.2]
    assert interpolate(knots, (0.05, 0.2)) == pytest.approx([0.7, 0.4])
    assert interpolate(knots, (-0.01, 0.31)) == [None, None] == interpolate([], (0.0, 0.1))
    twice = [(0.2, 0.4), (0.0, 1.0), (0.2, 0.6)]                 # the same saving twice: their mean
    assert interpolate(twice, (0.1, 0.2)) == pytest.approx([0.75, 0.5])
    assert interpolate([(0.0, 0.7)]) == [0.7] + [None] * 8 and TARGETS[:6] == (0.0, 0.05, 0.10, 0.15, 0.20, 0.25)


# What a row depends on.

def test_a_model_is_known_by_its_bytes(tmp_path):
    """A model trained further in the same folder that passes for the old one; a copy that does not."""
    model, tokenizer = toy(tmp_path / "a")
    save_model(model, tmp_path / "a", tokenizer)
    before = model_digest(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    for name in ("eval.json", "train_state.pt", ".lock"):
        (tmp_path / "a" / name).write_text("what a run leaves beside it")
    assert model_digest(tmp_path / "b") == before == model_digest(tmp_path / "a") and len(before) == 16

    def changed(name, old, new):
        shutil.rmtree(tmp_path / "b")
        shutil.copytree(tmp_path / "a", tmp_path / "b")
        content = (tmp_path / "b" / name).read_bytes() if old else b""
        assert old in content
        (tmp_path / "b" / name).write_bytes(content.replace(old, new, 1) if old else new)
        return model_digest(tmp_path / "b") != before
    assert changed("config.json", b'"rms_norm_eps"', b'"gateskip": {"step": 1}, "rms_norm_eps"')
    assert changed("tokenizer.json", b"apples", b"apple5") and changed("generation_config.json", b"", b"{}")
    last = (tmp_path / "a" / "model.safetensors").read_bytes()[-64:]
    assert changed("model.safetensors", last, last[:-1] + bytes([last[-1] ^ 1]))             # one bit, the same size


def test_no_files_are_no_model(tmp_path):
    """The digest of nothing, the same for every model whose folder has gone: one's rows taken for another's."""
    (tmp_path / "README.md").write_text("weights to follow")
    for folder in (tmp_path / "gone", tmp_path):
        with pytest.raises(InputError, match=f"no model lies there, or no longer: {folder}$"):
            model_digest(folder)


def test_data_is_known_by_its_questions_and_answers():
    """Rows over the first two problems taken for rows over all, or over the same questions with other answers."""
    problems = arithmetic(4)
    others = (problems[:2], problems[::-1], [*problems[:3], problems[3]._replace(answer="x")],
              [Example(p.question + " ", *p[1:]) for p in problems], [])
    digests = {data_digest(examples) for examples in (problems, *others)}
    assert len(digests) == 6 and data_digest(list(problems)) in digests
    assert data_digest([p._replace(reasoning="") for p in problems]) == data_digest(problems)     # nobody reads it


# eval.json.

def test_rows_are_kept_and_the_missing_ones_named(tmp_path):
    """A killed sweep whose file looks complete; rows that are measured twice, or that a smaller command throws away."""
    file = tmp_path / "eval.json"
    stored(file, [row_of(budget=1.0, accuracy=1.0), row_of()])
    content = json.loads(file.read_text())
    assert (content["complete"], content["missing"]) == (False, [["random ranks, gated", 0.9]])
    assert content["settings"] == {"model": "runs/x"} and content["at_exactly"] == list(TARGETS)
    assert content["interpolated"] == {"GateSkip": [1.0, 0.75, 0.5] + [None] * 6}
    assert content["interpolated_macs"] == {"GateSkip": interpolate(
        [(r["macs_saved"], r["accuracy"]) for r in content["rows"]])} != content["interpolated"]

    less = open_sweep(file, {"model": "runs/x"}, MADE, [["GateSkip", 0.9]])                  # a smaller command
    assert less["rows"] == content["rows"] and less["missing"] == content["missing"]
    more = open_sweep(file, {"model": "runs/x"}, MADE, [*WANTED, ["GateSkip", 0.8], ["GateSkip", 0.8]])
    assert more["missing"] == [["random ranks, gated", 0.9], ["GateSkip", 0.8]] and not more["complete"]
    assert json.loads(file.read_text()) == content                                           # opening writes nothing
    add_row(file, more, row_of("random ranks, gated"))
    assert json.loads(file.read_text())["missing"] == [["GateSkip", 0.8]]
    add_row(file, more, row_of(budget=0.8))
    content = json.loads(file.read_text())
    assert content["complete"] is True and content["missing"] == [] and len(content["rows"]) == 4
    assert [p.name for p in tmp_path.iterdir()] == ["eval.json"]


@pytest.mark.parametrize("made, complaint", [
    (dict(model="bb"), "model aa, now bb"), (dict(data="ee", problems=2), "data dd, now ee; problems 200, now 2"),
    (dict(seed=1), "seed 0, now 1"), (dict(policy="batch"), "policy frozen, now batch"),
    (dict(dense="c0"), "dense cc, now c0")])
def test_rows_of_other_settings_are_left_alone(tmp_path, made, complaint):
    """`--limit 2` that replaces a full evaluation without a word; a retrained model's row between the old one's."""
    file = tmp_path / "eval.json"
    before = stored(file, [row_of()], dense="cc")
    with pytest.raises(InputError) as error:
        open_sweep(file, {}, MADE | made, WANTED)
    assert f"eval.json holds rows of other settings ({complaint}): choose another --out, or --overwrite it" \
        in str(error.value)
    fresh = open_sweep(file, {}, MADE | made, WANTED, overwrite=True)
    assert file.read_text() == before and fresh["rows"] == [] and fresh["missing"] == WANTED     # until a row is there
    add_row(file, fresh, row_of(budget=1.0))
    assert json.loads(file.read_text())["made_with"] == MADE | made


def test_what_no_row_depends_on_may_come_later(tmp_path):
    """A file without dense rows to which --dense could never be added; a command without it that forgets with which
    model they were made."""
    file = tmp_path / "eval.json"
    stored(file, [row_of(budget=1.0)], policy=None)
    with_dense = open_sweep(file, {"model": "runs/x"}, MADE | {"dense": "cc"}, WANTED)
    assert with_dense["made_with"] == MADE | {"dense": "cc"} and len(with_dense["rows"]) == 1
    add_row(file, with_dense, row_of())
    assert open_sweep(file, {}, MADE | {"policy": None}, WANTED)["made_with"] == MADE | {"dense": "cc"}


OLD = {"settings": {"model": "runs/x"}, "rows": [{"row": "GateSkip", "budget": 0.9, "n": 5, "accuracy": 0.4,
                                                  "stderr": 0.2, "skipped": 0.1, "macs_saved": 0.05}]}
FOREIGN = ["", "{", "[]", "{}", '{"rows": []}', '{"rows": [3], "settings": {"model": "x"}}', "\udcff",
           json.dumps(OLD | {"rows": [OLD["rows"][0] | {"accuracy": 1.5}]}),
           json.dumps(OLD | {"rows": [OLD["rows"][0] | {"n": 0}]}),
           json.dumps(OLD | {"rows": [OLD["rows"][0] | {"row": ["GateSkip"]}]}),
           json.dumps(OLD | {"rows": [OLD["rows"][0] | {"skipped": "0.1"}]}), json.dumps(OLD | {"made_with": 7}),
           json.dumps(OLD | {"settings": {"model": None}}), "[" * 100_000]


@pytest.mark.parametrize("content", [*FOREIGN, json.dumps(OLD)])
def test_a_damaged_or_foreign_file_is_left_alone(tmp_path, content):
    """Somebody's own eval.json, or one cut short by a full disk, replaced by the first row; a traceback."""
    file = tmp_path / "eval.json"
    file.write_bytes(content.encode(errors="surrogateescape"))
    before = file.read_bytes()
    with pytest.raises(InputError) as error:
        open_sweep(file, {}, MADE, WANTED)
    assert str(error.value) == (f"{file} is damaged, of an earlier version, or no file of this program: choose another "
                                "--out, or --overwrite it")
    assert open_sweep(file, {}, MADE, WANTED, overwrite=True)["rows"] == [] and file.read_bytes() == before


@pytest.mark.parametrize("damage", [
    lambda c: c.pop("made_with"), lambda c: c.pop("missing"), lambda c: c.update(made_with=7),
    lambda c: c.update(rows=7), lambda c: c["rows"][0].pop("low"), lambda c: c["rows"][0].update(seconds="x"),
    lambda c: c["rows"].append(None), lambda c: c.update(made_with=[]),
    lambda c: c["rows"][0].update(budget="0.9"), lambda c: c["rows"][0].update(budget=None),
    lambda c: c["rows"][0].update(skipped=float("nan")), lambda c: c["rows"][0].update(seconds=float("inf")),
    lambda c: c["rows"][0].update(n=10 ** 400), lambda c: c["rows"][0].update(prompt=5),
    lambda c: c["rows"][0].update(answer={"skipped": 0.1}),
    lambda c: c["rows"][0].update(prompt=dict(skipped=0.1, skipped_per_call=0.1, macs_saved="+")),
    lambda c: c["rows"][0].update(branches={"answer": [0.5, 0.5]}), lambda c: c["rows"][0].update(branches={}),
    lambda c: c["rows"][0].update(branches={"prompt": [0.5, 0.5], "answer": [0.5]}),
    lambda c: c["rows"][0].update(branches={"prompt": [], "answer": []}),
    lambda c: c["rows"][0].update(branches=7), lambda c: c["rows"][0].update(branches={"answer": [0.5, 1.5]}),
    lambda c: c["rows"][0].update(branches={"answer": ["x"]}), lambda c: c["rows"][0].update(branches={"all": 7}),
    lambda c: c.update(missing="abc"), lambda c: c.update(missing=[["GateSkip"]]),
    lambda c: c.update(missing=[["GateSkip", "0.9"]]), lambda c: c.update(missing=["ab"])])
def test_a_file_changed_by_hand_is_damaged(tmp_path, damage):
    """A row that nobody can print, found out after hours."""
    file = tmp_path / "eval.json"
    content = json.loads(stored(file, [row_of()]))
    damage(content)
    file.write_text(json.dumps(content))
    with pytest.raises(InputError, match="is damaged"):
        open_sweep(file, {}, MADE, WANTED)


def test_rows_for_a_comparison(tmp_path, capsys):
    """Files of earlier versions that --compare no longer reads; half a sweep compared with a whole one in silence."""
    file = tmp_path / "eval.json"
    file.write_text(json.dumps(OLD))
    assert rows_of(file) == ([{"row": "GateSkip", "skipped": 0.1, "macs_saved": 0.05, "accuracy": 0.4, "n": 5.0}],
                             Path("runs/x"))
    assert capsys.readouterr().err == ""
    for content in FOREIGN:
        file.write_bytes(content.encode(errors="surrogateescape"))
        with pytest.raises(InputError, match="is no eval.json of this program: give one from another run's --out"):
            rows_of(file)
    with pytest.raises(InputError, match="gone.json is no eval.json"):
        rows_of(tmp_path / "gone.json")
    file.unlink()
    stored(file, [row_of(), row_of("random ranks, gated"), row_of("model", budget=1.0)])
    assert [r["row"] for r in rows_of(file)[0]] == ["GateSkip", "model"]
    assert capsys.readouterr().err == f"--compare {file} is of a sweep that was not finished\n"


@pytest.mark.parametrize("sweeps, names", [
    ([("runs/a", "runs/a"), ("runs/b", "runs/b")], ["a", "b"]), ([("a/run", "o"), ("b/run", "o")], ["a/run", "b/run"]),
    ([("a/x/step-1", "o"), ("b/x/step-1", "p")], ["a/x/step-1", "b/x/step-1"]), ([("a", "o"), ("a", "p")], ["o", "p"]),
    ([("here/a", "o"), (".", "p")], ["a", Path().absolute().name]), ([("a", "o"), ("a", "o")], [0, 1])])
def test_two_runs_are_two_curves(sweeps, names):
    """Points of two runs of one name in one curve; a curve that is called nothing."""
    rows = [r["row"] for r in joined([([row_of(), row_of("dense")], *sweep) for sweep in sweeps])]
    assert rows == [x for name in names for x in (f"GateSkip, {name}", "dense")]


def test_a_dense_model_of_another_depth(tmp_path):
    """Rows that this program wrote and then calls damaged."""
    file, shares = tmp_path / "eval.json", lambda layers: {"prompt": [1.0] * 2 * layers, "answer": [0.5] * 2 * layers}
    stored(file, [row_of() | {"branches": shares(2)}, row_of("dense") | {"branches": shares(8)}])
    assert len(open_sweep(file, {}, MADE, WANTED)["rows"]) == 2
    stored(file, [row_of() | {"branches": shares(2)}, row_of(budget=0.7) | {"branches": shares(8)}])
    with pytest.raises(InputError, match="is damaged"):
        open_sweep(file, {}, MADE, WANTED)


def test_what_an_old_file_was_measured_on_is_unknown(tmp_path, capsys):
    """A comparison that passes for one on the same problems because the file does not say on which."""
    file = tmp_path / "eval.json"
    file.write_text(json.dumps(OLD))
    check_compared(file, MADE | {"max new tokens": 96})
    assert capsys.readouterr().err == (f"CAUTION: --compare {file} was measured otherwise (data unknown, here dd; "
                                       "problems unknown, here 200; max new tokens unknown, here 96)\n")


def test_a_row_is_on_the_disk_before_the_next(tmp_path, monkeypatch):
    """Rows that a power cut takes back: the file goes through disk.write, which syncs it."""
    wrote, write = [], disk.write
    monkeypatch.setattr(sweep, "write", lambda path, content: (wrote.append(path), write(path, content)))
    stored(tmp_path / "eval.json", [row_of(), row_of(budget=1.0)])
    assert wrote == [tmp_path / "eval.json"] * 2
