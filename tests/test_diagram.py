"""Tests of examples/diagram.py: what it reads is what the plain loops say, and what it draws is what it read."""
import re
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from itertools import combinations

import pytest
import torch

from conftest import complaint, same
from toy_runs import ROOT

import by_hand

sys.path.insert(0, str(ROOT / "examples"))
import diagram


@pytest.fixture(scope="module")
def day():
    return diagram.Day()


@pytest.fixture
def drawn(day, monkeypatch):
    """{file name: figure}"""
    monkeypatch.setattr(diagram, "Day", lambda: day)
    return diagram.pictures()


def content(svg):
    """(Counter of the texts, Counter of (colour, dashed) of the shapes) in the bytes of an SVG."""
    elements = [*ElementTree.fromstring(svg).iter()]
    styles = [e.get("style", "") for e in elements if e.tag.endswith(("}path", "}use"))]
    shapes = Counter((fill[1], "stroke-dasharray" in style) for style in styles
                     if (fill := re.search("fill: (#[0-9a-f]{6})", style)))
    return Counter(e.text for e in elements if e.tag.endswith("}text")), shapes


def content_of(figure):
    return content(diagram.svg_of(figure))


def made_by(KV):
    """[layer][token]: the layer that made what the lists of by_hand.forward hold. A copy is the very same object."""
    found = [[0] * len(KV[0])]
    for layer in range(1, len(KV)):
        found.append([below if KV[layer][i] is KV[layer - 1][i] else layer for i, below in enumerate(found[-1])])
    return found


# What is read from the runs.

@pytest.mark.parametrize("skips", [diagram.SKIPS, {}, {0: [0, 1, 2, 3, 4], 1: [0, 4], 2: [0, 1, 2, 3, 4]}])
def test_the_cache_is_that_of_the_plain_loops(skips, monkeypatch):
    """A copy from another layer or of another token, a run of skips that stops after one, layer 0 with a layer below;
    K compared and V not."""
    model, ids, keep, source = diagram.cache_of_a_run(skips)
    wanted = [[token not in skips.get(layer, []) for token in ids] for layer in range(diagram.LAYERS)]
    assert keep.tolist() == wanted
    gates = iter([float(kept) for row in wanted for kept in row + [True] * len(ids)])        # the MLPs run
    monkeypatch.setattr(by_hand, "gate_of", lambda *_: torch.tensor([next(gates)], dtype=torch.float64))
    with torch.no_grad():
        *_, KV = by_hand.forward(model, ids, thresholds=[0.5] * 2 * diagram.LAYERS)
    assert source.tolist() == made_by(KV)


def test_a_copy_is_a_copy_of_both():
    """A slot called copied whose keys agree with those below and whose values do not."""
    cache = diagram.KVCache(diagram.cache_of_a_run()[0].config, 1, 2)            # all zeros
    assert diagram.sources(cache).tolist() == [[0, 0]] * 3
    cache.v[1][0, 0, 1] = 1.0
    assert diagram.sources(cache).tolist() == [[0, 0], [0, 1], [0, 2]]


def test_the_day_is_that_of_the_plain_loops(day):
    """Scores of one branch at another's place, masks of the run that made the thresholds, a cache that another run
    filled, the token that runs least called the busy one."""
    with torch.no_grad():
        _, g, keep, KV = by_hand.forward(day.model, day.ids, thresholds=day.thresholds)
    assert day.keep.tolist() == keep and day.sources.tolist() == made_by(KV)
    same(day.scores, torch.stack([torch.cat(row) for row in g]))
    ran = [sum(row[token] for row in keep) for token in range(len(day.ids))]
    words = [token for token, word in enumerate(day.words) if word.isalpha()]
    assert ran[day.busy] == max(ran[i] for i in words) > min(ran[i] for i in words) == ran[day.idle]
    assert 0.4 < sum(ran) / day.keep.numel() < 0.7 and len(keep) == 16


# What is drawn.

def test_the_day_is_drawn_as_read(day, drawn):
    """The score, the count or the K and V of another token or layer, a skipped branch in the colour of one that ran."""
    texts, shapes = content_of(drawn["day.svg"])
    two = [day.busy, day.idle]
    keep, scores, sources = day.keep[:, two], day.scores[:, two], day.sources[:, two]
    for token in range(2):
        assert texts[f"runs {keep[:, token].sum()} of 16"] >= 1 and texts[f"“{day.words[two[token]]}”"] == 1
    assert Counter(f"{score:.2f}" for score in scores.flatten().tolist()) == \
        Counter({text: n for text, n in texts.items() if re.fullmatch(r"\d\.\d\d", text)})
    assert Counter([f"K V of {layer}" for layer in sources.flatten().tolist()] + ["K V of 0"]) == \
        Counter({text: n for text, n in texts.items() if text.startswith("K V of ")})        # + 1: how to read it
    copied = int((sources < torch.arange(8)[:, None]).sum())
    assert shapes[diagram.ORANGE, True] == copied + 1 and shapes[diagram.ORANGE, False] == 0
    assert shapes[diagram.BLUE, False] == keep[1::2].sum() and shapes[diagram.BLUE, True] == 0
    own = int((sources == torch.arange(8)[:, None]).sum())
    assert shapes[diagram.GREEN, False] + shapes[diagram.GREEN, True] == keep[::2].sum() + own + 1
    assert shapes[diagram.GREEN, True] == (~keep[0]).sum()       # layer 0: its own, though it skips


def test_the_branch_says_what_two_tokens_did(day, drawn):
    """Numbers of another branch than the one that is named; a token that passes with a score below the threshold."""
    text = " ".join(content_of(drawn["branch.svg"])[0])
    branch, tau = 2 * int(re.search(r"at attention (\d)", text)[1]), float(re.search(r"τ = (0\.\d\d)", text)[1])
    assert branch > 0 and tau == round(day.thresholds[branch], 2)
    for token, says, passes in ((day.busy, "> τ, passes", True), (day.idle, "≤ τ, skips", False)):
        assert f"“{day.words[token]}”: {day.scores[branch, token]:.2f} {says}" in text
        assert bool(day.scores[branch, token] > day.thresholds[branch]) is passes


def test_another_mask_is_another_picture(day):
    """A picture of a mask that is written into the script."""
    before = content_of(diagram.draw_cache(*diagram.cache_of_a_run()[2:]))
    after = content_of(diagram.draw_cache(*diagram.cache_of_a_run(diagram.SKIPS | {2: [1, 2, 4]})[2:]))
    assert before[0] - after[0] == {"of 2": 1} and after[0] - before[0] == {"of 1": 1}       # token 4 skips layer 2
    assert before[1] - after[1] == {(diagram.GREEN, False): 1}
    assert after[1] - before[1] == {(diagram.ORANGE, True): 1, (diagram.BROWN, False): 1}    # an arrow more
    fewer = diagram.Day(share=0.2)
    assert fewer.keep.sum() > day.keep.sum()
    assert content_of(diagram.draw_day(fewer)) != content_of(diagram.draw_day(day))


def test_the_same_bytes_twice(day, drawn):
    """A date, a random name or a version in the file: every run would be a change to commit."""
    for name, figure in drawn.items():
        svg = diagram.svg_of(figure)
        again = {"branch.svg": lambda: diagram.draw_branch(day), "day.svg": lambda: diagram.draw_day(day),
                 "cache.svg": lambda: diagram.draw_cache(*diagram.cache_of_a_run()[2:])}[name]()
        assert diagram.svg_of(again) == svg and len(svg) < 80_000
        assert b"atplotlib" not in svg


def test_the_pictures_beside_the_script_are_those_it_draws(drawn):
    """Pictures that have fallen behind the script, the embedded model or its problems."""
    assert set(drawn) == {"branch.svg", "cache.svg", "day.svg"}
    for name, figure in drawn.items():
        committed = (ROOT / "examples" / name).read_bytes()
        assert content(committed) == content_of(figure), f"{name}: run python examples/diagram.py"


def test_texts_lie_on_the_sheet_in_their_boxes_and_not_on_each_other(drawn):
    """A longer word, a larger letter or one branch more, and two texts can no longer be read."""
    for name, figure in drawn.items():
        inside = lambda a, b: b.x0 <= a.x0 and a.x1 <= b.x1 and b.y0 <= a.y0 and a.y1 <= b.y1
        boxes = [p.get_window_extent() for p in figure.axes[0].patches if p.get_edgecolor()[3]]
        texts = [(t.get_text(), t.get_window_extent()) for t in [*figure.texts, *figure.axes[0].texts] if t.get_text()]
        assert len(texts) > 12
        for text, place in texts:
            assert all(inside(place, box) for box in [figure.bbox, *boxes] if place.overlaps(box)), (name, text)
        assert [(a[0], b[0]) for a, b in combinations(texts, 2) if a[1].overlaps(b[1])] == [], name
        diagram.plt.close(figure)


# The command.

def test_the_command_writes_three_files(drawn, monkeypatch, capsys):
    """A file that is forgotten or written under another's name; a flag that is ignored; no word where no picture."""
    written = {}
    monkeypatch.setattr(diagram, "write", lambda path, svg: written.update({path: content(svg)}))
    monkeypatch.setattr(sys, "argv", ["diagram.py"])
    assert diagram.main() == 0
    assert written == {ROOT / "examples" / name: content_of(figure) for name, figure in drawn.items()}
    assert capsys.readouterr().out == "".join(f"written: {path}\n" for path in written)
    monkeypatch.setattr(sys, "argv", ["diagram.py", "--out", "x.svg"])
    assert "--out" in complaint(diagram.main)
    monkeypatch.setattr(sys, "argv", ["diagram.py"])
    monkeypatch.setattr(diagram, "plt", None)
    assert diagram.main() == 1
