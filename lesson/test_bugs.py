"""One line for each bug of find_the_bug.py: python -m pytest lesson. What it says comes from check_bugs.py."""
import pytest

from lesson.check_bugs import BUGS, TESTS, load, verdict


@pytest.mark.parametrize("number", BUGS)
def test_bug(number):
    """A test that is not written yet, or does not tell the right code from the wrong."""
    said = verdict(number, load(TESTS).get(f"test_{number}"))
    if not said.startswith("caught"):
        pytest.fail(said, pytrace=False)
