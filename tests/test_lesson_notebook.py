"""The notebook runs from its first code cell to its last, without Jupyter, and what is stored in it is of today."""
import io
import json
import re
from contextlib import redirect_stdout

import matplotlib
import pytest

from toy_runs import ROOT

NOTEBOOK = ROOT / "lesson" / "gateskip.ipynb"
CELLS = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]
# what makes it short: (as it stands, as the test runs it)
SHORT = [('STEPS, RUN = 600, "runs/lesson"', "STEPS, RUN = 2, OUT"), ("ROUNDS = 5", "ROUNDS = 1"),
         ('"--eval-limit", 32, "--calibration-sequences", 32', '"--eval-limit", 2, "--calibration-sequences", 2'),
         ('"--calibrate", 0.9, 0.8, 0.7, 0.6', '"--calibrate", 0.6'),
         ('"test", 200)', '"test", 8)'), ('"test", 64)', '"test", 8)'), ("time.sleep(5)", "time.sleep(0.5)"),
         ("prompts, 64, policy", "prompts, 8, policy"), ("prompts, 64, make_policy", "prompts, 8, make_policy"),
         ("linspace(0.05, 0.95, 11)", "linspace(0.05, 0.95, 3)")]


def printed(cell):
    return "".join("".join(output["text"]) for output in cell["outputs"] if output["output_type"] == "stream")


def test_every_cell_runs_in_order(tmp_path, monkeypatch):
    """A cell that needs a name which the project no longer has, or an earlier cell that was deleted; source code stored
    in an output which is no longer that of the project."""
    matplotlib.use("Agg")
    monkeypatch.setattr("matplotlib.pyplot.show", lambda: matplotlib.pyplot.close("all"))
    monkeypatch.chdir(NOTEBOOK.parent)
    space, text = {"OUT": str(tmp_path / "run")}, ["".join(cell["source"]) for cell in CODE]
    for standing, shorter in SHORT:
        assert sum(t.count(standing) for t in text) == 1, standing
        text = [t.replace(standing, shorter) for t in text]
    sources = []

    def shown(*arguments):                                       # in place of the notebook's source()
        with redirect_stdout(io.StringIO()) as out:
            show(*arguments)
        sources.append(arguments)
        assert out.getvalue() in printed(cell), f"code cell {number} shows old code: run the notebook anew"

    for number, (cell, code) in enumerate(zip(CODE, text)):
        exec(compile(code, f"code cell {number}", "exec"), space)
        if number == 0:
            show, space["source"] = space["source"], shown
    assert len(sources) > 8


def test_it_is_stored_with_its_outputs():
    """A notebook that shows nothing in a viewer, or an error, or a path of the machine that it was run on."""
    assert len(CODE) > 15 and [cell["execution_count"] for cell in CODE] == [*range(1, len(CODE) + 1)]
    outputs = [output for cell in CODE for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error" or output.get("name") == "stderr"]
    pictures = [output["data"]["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) >= 8 and all(len(picture) > 4000 for picture in pictures)
    for cell in CODE:
        assert not re.search(r"(?:^|[\s\"'(])/\w+/", printed(cell), re.MULTILINE), cell["id"]


@pytest.mark.parametrize("number", range(1, 13))
def test_sections_in_order(number):
    """A section that was lost, or numbers that README's plan names and the notebook lacks."""
    heads = [line for cell in CELLS if cell["cell_type"] == "markdown" for line in "".join(cell["source"]).splitlines()
             if line.startswith("## ")]
    assert [head for head in heads if head.startswith(f"## {number}. ")], number
