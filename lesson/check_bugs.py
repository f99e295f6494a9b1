"""Does each test of find_the_bug.py tell the right code from the wrong?

    python lesson/check_bugs.py                # all, one line each
    python lesson/check_bugs.py 3 5            # these two

Each test runs on the project as it is, with its bug in, and on the project as it is once more. Exit code 0 if all are
caught.
"""
import random
import runpy
import sys
from pathlib import Path

sys.path[:0] = map(str, Path(__file__).resolve().parents[:2])       # lesson/ and what it is about

from console import InputError, run
from flags import Parser

import torch

from bugs import BUGS, mistake

TESTS, NOT_YET = Path(__file__).with_name("find_the_bug.py"), "not written yet"


def first_line(error):
    """Exception -> its type and the first line of what it says."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:100]}".rstrip(": ")


def load(path):
    """{name: object} of a student's file, read anew each time. InputError where it cannot be run, OSError unread."""
    path.open().close()
    try:
        return runpy.run_path(str(path))
    except SyntaxError as error:
        raise InputError(f"{path}, line {error.lineno}: {error.msg}") from None
    except (Exception, SystemExit) as error:
        raise InputError(f"{path} ends in {first_line(error)} before any test runs") from None


def failure(test):
    """None if the test passes, else the exception that it ends in. Random numbers are the same each time."""
    random.seed(0)
    torch.manual_seed(0)
    try:
        test()
    except KeyboardInterrupt:
        raise
    except BaseException as error:                               # pytest.fail and sys.exit raise no Exception
        return error
    return None


def verdict(number, test):
    """What there is to say of a test of bug `number`, in one line: "caught", or what is missing. test: may be None."""
    if not callable(test):
        return f"there is no test_{number}"
    error = failure(test)
    if isinstance(error, NotImplementedError):
        return NOT_YET
    if error is not None:
        return f"fails on the original: {first_line(error)}"
    with mistake(number):
        caught = failure(test)
    error = failure(test)
    if error is not None:
        return f"passes on the original, but not a second time: {first_line(error)}"
    if caught is None:
        return "passes on the mutant: not caught"
    return "caught" if isinstance(caught, AssertionError) else f"caught, by {first_line(caught)}"


def a_bug(text):
    """The argparse type of a number of BUGS."""
    if text not in map(str, BUGS):
        raise InputError(f"bug {text!r} is none of 0 to {max(BUGS)}")
    return int(text)


def main(argv=None):
    p = Parser("Check the tests of find_the_bug.py: each must pass on the project and fail on its bug.")
    p.add_argument("bugs", nargs="*", type=a_bug, metavar="N", help="numbers of bugs; default: all")
    p.add_argument("--tests", default=str(TESTS), metavar="FILE", help="where the tests stand")
    args = p.parse_args(argv)
    tests, numbers, caught = load(Path(args.tests)), args.bugs or list(BUGS), 0
    for number in numbers:
        said = verdict(number, tests.get(f"test_{number}"))
        caught += said.startswith("caught")
        print(f"bug {number:2}  {said}", flush=True)
    print(f"{caught} of {len(numbers)} caught")
    return 0 if caught == len(numbers) else 1


if __name__ == "__main__":
    run(main, interrupted="interrupted; the project is as it was")
