"""Tests of branches.py: the shares per branch as lines and as a picture, its flag, and the tables that show them."""
import re
import sys
from types import SimpleNamespace

import pytest
import torch

import branches
import budgets
import eval_gsm8k
import generate
import train
from branches import SHARE, draw, lines_of, parts_of, picture, show
from conftest import build, complaint
from data import encode_all
from flags import Parser
from gates import GateConfig
from problems import arithmetic
from thresholds import make_policy
from toy_runs import toy, words

# two layers, all eight shares different: attn 0, mlp 0, attn 1, mlp 1
PROMPT, ANSWER = [1.0, 0.25, 0.5, 0.0], [0.9, 0.35, 0.76, 0.04]
PARTS = {"prompt": PROMPT, "answer": ANSWER}


# Printed.

def test_lines_by_hand():
    """Attention's share under the MLP's title, a prompt's under the generated tokens', a layer's in another's line, a
    bar that says something else than its number."""
    head, titles, *lines = lines_of("frozen, budget 0.85", PARTS)
    assert head == "frozen, budget 0.85: share of tokens that ran the branch"
    assert re.split("  +", titles) == ["layer", "attention, prompt", "attention, generated", "MLP, prompt",
                                       "MLP, generated"]
    assert [line.split() for line in lines] == [
        ["0", "100.0%", "█" * 10, "90.0%", "█" * 9, "25.0%", "█" * 2, "35.0%", "█" * 4],
        ["1", "50.0%", "█" * 5, "76.0%", "█" * 8, "0.0%", "4.0%"]]
    assert lines_of("x", {"all": ANSWER})[1:] == ["layer  attention, all         MLP, all",
                                                  "    0   90.0% █████████        35.0% ████",
                                                  "    1   76.0% ████████          4.0%"]


def test_many_layers_stand_in_columns():
    """Numbers that have slid away from their titles, a line per branch, or a line that a terminal breaks."""
    shares = [i / 159 for i in range(160)]
    _, titles, *lines = lines_of("x", {"prompt": shares, "answer": shares[::-1]})
    starts = [titles.index(title) for title in ("attention, p", "attention, g", "MLP, p", "MLP, g")]
    assert len(lines) == 80 and max(map(len, lines)) <= 100
    for layer, line in enumerate(lines):
        assert line[:5] == f"{layer:5}"
        shown = [shares[2 * layer], shares[159 - 2 * layer], shares[2 * layer + 1], shares[158 - 2 * layer]]
        line = line.ljust(100)
        for start, share in zip(starts, shown):
            assert line[start:start + 7] == f"{share:6.1%} " and line[start - 1] == " "
            assert line[start + 7:start + 18].strip() == "█" * round(10 * share)


def test_nothing_skipped_is_one_line():
    """Eighty lines of 100.0%, or one skipped token that goes unsaid."""
    assert lines_of("none, budget 1", {"prompt": [1.0] * 160}) == [f"none, budget 1: {SHARE}: 100% in every layer"]
    assert len(lines_of("x", {"prompt": [1.0] * 4, "answer": [1.0, 1.0, 1.0, 0.9999]})) == 4


def test_every_budget_is_shown(tmp_path, capsys):
    """A budget over another's shares, a picture that is drawn unasked, or is said to be written and is not."""
    show("GateSkip", {0.9: {"all": PROMPT}, 0.75: {"all": ANSWER}})
    lines = ["", *lines_of("GateSkip, budget 0.9", {"all": PROMPT}), "",
             *lines_of("GateSkip, budget 0.75", {"all": ANSWER})]
    assert capsys.readouterr().out == "\n".join(lines) + "\n" and not list(tmp_path.iterdir())
    show("GateSkip", {0.9: PARTS}, str(tmp_path / "b.png"))
    assert capsys.readouterr().out.endswith(f"\nwritten: {tmp_path / 'b.png'}\n")
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")


def test_parts_of_a_report():
    """Prompt and answer thrown together, or a table of given answers that has neither."""
    of = lambda *shares: {"branches": list(shares)}
    assert parts_of(of(0.5) | {"prompt": of(0.3), "answer": of(0.7)}) == {"prompt": [0.3], "answer": [0.7]}
    assert parts_of(of(0.3) | {"prompt": of(0.3)}) == {"prompt": [0.3]}          # one new token
    assert parts_of(of(0.5)) == {"all": [0.5]}


# Drawn.

@pytest.fixture
def figure(tmp_path, monkeypatch):
    """Draws, and returns the figure as it was when it was saved."""
    from matplotlib.figure import Figure
    saved, savefig = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **how: (saved.append(self), savefig(self, *args, **how)))

    def drawn(kept):
        assert draw("GateSkip", kept, tmp_path / "b.png")
        return saved[-1]
    return drawn


def test_one_budget_is_bars(figure):
    """Panels swapped, layers from the bottom up, prompt tokens drawn as generated ones, bars without their number."""
    drawn = figure({0.85: PARTS})
    assert drawn.get_suptitle() == "GateSkip, budget 0.85: generated tokens"
    for axis, title, shares in zip(drawn.axes, ("attention", "MLP"), (ANSWER[::2], ANSWER[1::2]), strict=True):
        assert (axis.get_title(), axis.get_xlabel()) == (title, SHARE)
        assert [bar.get_width() for bar in axis.patches] == shares
        assert [bar.get_y() + bar.get_height() / 2 for bar in axis.patches] == pytest.approx([0, 1])
        assert [text.get_text() for text in axis.texts] == [f"{share:.1%}" for share in shares]
        assert axis.get_ylim() == (1.5, -0.5) and axis.get_xlim()[1] > 1         # layer 0 on top, room for 100.0%
    assert drawn.axes[0].get_ylabel() == "layer"


def test_several_budgets_are_a_heat_map(figure):
    """A map with its axes swapped, budgets over other columns, colours that differ between panels or pictures."""
    drawn = figure({1.0: {"prompt": PROMPT, "answer": [1.0] * 4}, 0.9: PARTS, 0.75: {"answer": PROMPT}})
    *panels, bar = drawn.axes
    assert drawn.get_suptitle() == "GateSkip: generated tokens" and bar.get_ylabel() == SHARE
    for first, (axis, title) in enumerate(zip(panels, ("attention", "MLP"), strict=True)):
        image, = axis.images
        expected = [[column[2 * layer + first] for column in ([1.0] * 4, ANSWER, PROMPT)] for layer in (0, 1)]
        assert image.get_array().tolist() == expected            # layers x budgets
        assert image.get_clim() == (0, 1) and image.get_cmap().name == "viridis" and axis.get_ylim() == (1.5, -0.5)
        assert {text.get_position(): text.get_text() for text in axis.texts} == {
            (x, layer): f"{share:.0%}" for layer, row in enumerate(expected) for x, share in enumerate(row)}
        assert [text.get_text() for text in axis.get_xticklabels()] == ["1", "0.9", "0.75"]
        assert (axis.get_title(), axis.get_xlabel()) == (title, "budget")


def test_the_picture_says_whose_tokens(figure):
    """"generated tokens" over a picture of others: where only one token was generated, or the answers were given."""
    for parts, whose in (({"prompt": PROMPT}, "prompt"), ({"all": PROMPT}, "all")):
        assert figure({0.9: parts}).get_suptitle() == f"GateSkip, budget 0.9: {whose} tokens"
    drawn = figure({0.9: PARTS, 0.5: {"prompt": ANSWER}})        # at 0.5 every answer ended at once
    assert drawn.get_suptitle() == "GateSkip: prompt tokens"
    assert drawn.axes[0].images[0].get_array().tolist() == [[PROMPT[0], ANSWER[0]], [PROMPT[2], ANSWER[2]]]


@pytest.mark.parametrize("layers, n_budgets", [(2, 2), (30, 9), (80, 1)])
def test_many_layers_do_not_overlap(figure, layers, n_budgets):
    """Eighty layers, or nine budgets, squeezed into the room of a few: numbers over numbers."""
    drawn = figure({1 - i / 20: {"all": [1.0] * 2 * layers} for i in range(n_budgets)})
    drawn.canvas.draw()                                          # in the resolution that is asked for below
    for axis in drawn.axes[:2]:
        boxes = [text.get_window_extent() for text in axis.texts]
        assert len(boxes) == layers * n_budgets and all(axis.bbox.contains(*box.get_points()[1]) for box in boxes)
        ticks = [label.get_window_extent() for label in drawn.axes[0].get_yticklabels()]
        for placed in (boxes, ticks):
            assert not any(a.overlaps(b) for i, a in enumerate(placed) for b in placed[i + 1:i + 1 + layers])


def test_no_picture_without_matplotlib(tmp_path, monkeypatch, capsys):
    """A traceback at the end of a run, or `written: ` of a file that is not there."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    show("x", {0.9: PARTS}, str(tmp_path / "b.png"))
    printed = capsys.readouterr().out
    assert printed.endswith("no picture: matplotlib is not installed (pip install matplotlib)\n")
    assert printed.startswith("\nx, budget 0.9: ") and not list(tmp_path.iterdir())


# The flag.

def test_the_flag_with_and_without_a_file(tmp_path):
    """Printing that draws, drawing that needs two flags, a check that leaves a file behind or spoils the old one."""
    p, file = Parser("A command."), tmp_path / "b.png"
    p.add_argument("--show-branches", **branches.SHOW_BRANCHES)
    parsed = lambda *argv: p.parse_args(["--show-branches", *map(str, argv)]).show_branches
    assert p.parse_args([]).show_branches is None and parsed() == "" and parsed(file) == str(file)
    assert not list(tmp_path.iterdir())
    file.write_bytes(b"old")
    assert parsed(file) == str(file) and file.read_bytes() == b"old" and list(tmp_path.iterdir()) == [file]


def test_a_picture_that_could_not_be_written_is_refused(tmp_path, monkeypatch):
    """A mistyped folder, found out after hours of work, or made; weights that a picture is written over."""
    (tmp_path / "d.png").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "kept.png.tmp").touch()                          # the user's own
    for name, why in (("none/b.png", "written (there is no folder"), ("file/b.png", "written (Not a directory"),
                      ("d.png", "cannot be written (it is a folder)"), ("a" * 252 + ".png", "(File name too long)"),
                      ("model.safetensors", "must end in .png"), ("file", "must end in .png"),
                      ("eval.png", "(a run's curves have that name)"), ("metrics.png", "curves have that name"),
                      ("kept.png", "kept.png.tmp is in the way")):
        assert f"{tmp_path / name} " in (said := complaint(picture, str(tmp_path / name))) and why in said
    with monkeypatch.context() as m:
        m.setattr("pathlib.Path.touch", lambda *_, **k: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
        assert "cannot be written (Permission denied)" in complaint(picture, str(tmp_path / "b.png"))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "matplotlib is not installed (pip install matplotlib)" in complaint(picture, str(tmp_path / "b.png"))
    assert picture("") == ""                                     # printing needs none
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d.png", "file", "kept.png.tmp"]


@pytest.mark.parametrize("command, flags", [(generate, dict(prompt="x")), (eval_gsm8k, {}), (train, {})])
def test_commands_refuse_it_before_the_work(tmp_path, monkeypatch, command, flags):
    """A model loaded, or an --out made, before it turns out that there is no such folder."""
    monkeypatch.setattr(command, "load_model", None)             # nothing is loaded
    monkeypatch.chdir(tmp_path)
    said = complaint(command.main, words(model="m", show_branches="none/b.png", **flags))
    assert said.startswith("--show-branches: none/b.png cannot be written (there is no folder none): give another")
    assert not list(tmp_path.iterdir())


# The table at the end of train.py.

def test_a_runs_table_shows_what_each_branch_ran(tmp_path, monkeypatch):
    """Random skipping's shares in place of the gates', a budget under another's number, padding that counts."""
    model, tokenizer = toy(tmp_path, GateConfig("scalar"))
    model.load_state_dict(build(model.config, dtype=torch.float32).state_dict())
    items = encode_all(arithmetic(6, "calibration"), tokenizer, 1, 160)[0]
    assert len({len(ids) for ids, _ in items}) > 1               # so that there is padding
    monkeypatch.setattr(budgets, "BUDGETS", (0.9,))
    monkeypatch.setattr(budgets, "CONTINUE", 4)
    monkeypatch.setattr(budgets, "save_config", lambda *_: None)
    shown, file = [], str(tmp_path / "b.png")
    monkeypatch.setattr(budgets, "show", lambda *how: shown.append(how))
    args = SimpleNamespace(skip="all", kv="copy_up", calibrate=None, budget_end=0.7, steps=1, seed=0)
    for args.show_branches in (None, "", file):
        budgets.finish(model, args, dict(calibration=items, check=items, eval=items), tmp_path)
    (_, kept, no_path), (_, again, path) = shown                 # not shown unless asked
    assert (no_path, path) == ("", file) and kept == again and list(kept) == [1.0, 0.9, 0.7]
    assert kept[1.0] == {"all": [1.0] * 4}
    for budget in (0.9, 0.7):
        ran = [0] * 4
        for ids, _ in items:                                     # each alone: a frozen threshold decides the same
            for branch, keep in enumerate(model(torch.tensor([ids]), policy=make_policy(model.config, "frozen", budget),
                                                compute="compact")[1].keep):
                ran[branch] += keep.sum().item()
        assert kept[budget] == {"all": pytest.approx([n / sum(len(ids) for ids, _ in items) for n in ran])}
        assert len(set(ran)) > 1
