"""One test for each exercise: python -m pytest lesson. What it says comes from checks.py."""
import runpy
import traceback
from pathlib import Path

import pytest

from lesson.checks import CHECKS, RIGHT, verdict

FILE = Path(__file__).with_name("exercises.py")


def load(path):
    """{name: object} of a file, read anew and not from a cache, or what to say of a file that cannot be run."""
    try:
        return runpy.run_path(str(path), run_name="exercises")
    except (Exception, SystemExit) as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        lines, said = ([error.lineno], error.msg) if isinstance(error, SyntaxError) else (lines, error)
        place = f", line {lines[-1]}" if lines else ""
        return f"cannot be run: {path.name}{place}: {type(error).__name__}: {said}"


@pytest.fixture(scope="module")
def functions():
    return load(FILE)


@pytest.mark.parametrize("name", CHECKS)
def test_exercise(name, functions):
    """A function that is not yet what its docstring says, or a file that cannot be run."""
    said = functions if isinstance(functions, str) else verdict(name, functions.get(name))
    if said != RIGHT:
        pytest.fail(said, pytrace=False)
