"""Tests of lesson/: bugs.py, find_the_bug.py, solutions.py and their checker, check_bugs.py."""
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gates
import generate
import lesson.test_bugs
import model
import rows
import savings
from conftest import complaint, same
from gates import SkipPolicy, select_tokens

LESSON = Path(__file__).parents[1] / "lesson"
sys.path.insert(0, str(LESSON))
import check_bugs
from solutions import given
from bugs import BUGS, mistake, mutant
from check_bugs import TESTS, load, main, verdict
from tiny import tiny_cache, tiny_ids, tiny_model

ANSWERS = LESSON / "solutions.py"
LEARNED, FOUND = load(TESTS), load(ANSWERS)
ROOMS = (gates, generate, model, rows, savings)
# what a report must not say, because it is the answer, or nearly
GIVES_AWAY = {
    1: "<=|lowest|smallest|quantile|drop", 2: "pad|valid|quantile|rank", 3: "gate", 4: "norm|head",
    5: "multipl|residual", 6: "add|input|norm|residual", 7: "multipl|where", 8: "try|except|fails|silen",
    9: "mask|key|missing|omit", 10: "- 1|last|wrap|below", 11: "position|rotat|compacted|place|gather",
    12: "rank|quantile|active|finished"}


def code_of_all():
    """{name: code object} of every function of the rooms that have bugs, under their decorators too."""
    found = {}
    for room in ROOMS:
        owners = [room, *(c for c in vars(room).values() if inspect.isclass(c) and c.__module__ == room.__name__)]
        for owner in owners:
            for name, f in vars(owner).items():
                if inspect.isfunction(f) and f.__module__ == room.__name__:
                    found[f"{owner.__name__}.{name}"] = inspect.unwrap(f).__code__
    return found


@pytest.fixture(autouse=True)
def as_it_was():
    """A mistake that stays in the project, for all tests to come."""
    before = code_of_all()
    yield
    assert code_of_all() == before


def logits(m, policy, **how):
    return m(tiny_ids(), policy=policy, **how)[0]


# Bugs, reports and answers.

def test_every_bug_has_a_report_and_an_answer():
    """A bug without a stub, a stub without a bug, or an answer that is forgotten."""
    for tests in LEARNED, FOUND:
        assert [int(name[5:]) for name in tests if name.startswith("test_")] == list(BUGS) == list(range(13))


@pytest.mark.parametrize("number", BUGS)
def test_the_answer_catches_its_bug(number):
    """A bug that changes nothing or has gone stale, and an answer that fails on the right code or passes on the
    wrong."""
    assert verdict(number, FOUND[f"test_{number}"]) == "caught"


@pytest.mark.parametrize("number", BUGS)
def test_stubs_are_empty(number):
    """An answer left in the students' file, or the worked example that works no longer."""
    assert verdict(number, LEARNED[f"test_{number}"]) == ("caught" if number == 0 else "not written yet")


@pytest.mark.parametrize("number", BUGS)
def test_an_answer_says_what_and_where(number):
    """An answer that says neither what the mistake is nor who made it."""
    said = inspect.getdoc(FOUND[f"test_{number}"])
    assert re.fullmatch(r"(?s)Mistake: .{30,}\nMade in: .{30,}", said), said
    assert re.search("paper|authors|SkipGPT|mixture-of-depths", said.partition("Made in")[2], re.IGNORECASE)


@pytest.mark.parametrize("number", GIVES_AWAY)
def test_a_report_names_a_file_and_not_the_mistake(number):
    """A report that gives the answer away, or leaves the student with the whole project to read."""
    report = inspect.getdoc(LEARNED[f"test_{number}"])
    file, _, symptom = report.partition(".py. ")
    assert {inspect.unwrap(f).__module__ for f in BUGS[number]} == {file}
    assert not re.search(GIVES_AWAY[number], symptom, re.IGNORECASE), symptom


# What a user reported is what each bug does: what its answer does not show already.

def test_nobody_skips_and_all_is_well():
    """Bugs 6, 8, 9, 10 or 11 that also show where nobody skips: another bug than the reported one."""
    m = tiny_model()
    right = logits(m, None)
    for number in 6, 8, 9, 10, 11:
        with mistake(number):
            same(logits(m, None), right)


def test_a_copy_that_fails_is_dense():
    """Bug 8 that differs from kv="dense" in the last bit."""
    m, copied = tiny_model(), given((2, 0), (4, 4), length=8)
    dense = SkipPolicy("given", masks=copied.masks, kv="dense")
    with mistake(8):
        assert torch.equal(logits(m, copied), logits(m, dense))
    assert not torch.allclose(logits(m, copied), logits(m, dense))


def test_forgotten_under_dense_too():
    """Bug 9 that shows under kv="copy_up" only."""
    m, policy = tiny_model(), SkipPolicy("given", masks=given((2, 0), length=8).masks, kv="dense")
    right = logits(m, policy)
    with mistake(9):
        assert not torch.allclose(logits(m, policy), right)


def test_the_cache_matters_at_the_first_branch_only():
    """Bug 10 that shows without a cache, or above layer 0."""
    m, first, second = tiny_model(), given((0, 2), length=8), given((2, 2), (4, 2), length=8)
    right = [logits(m, policy) for policy in (first, second)]
    with mistake(10):
        same(logits(m, first), right[0])
        same(logits(m, second, cache=tiny_cache(m)), right[1])


def test_new_tokens_one_at_a_time_agree():
    """Bug 11 that shows in masked, or in a decoding step."""
    m, policy, made = tiny_model(), given((2, 0), (2, 3), (4, 4), length=8), []
    right = logits(m, policy)
    with mistake(11):
        same(logits(m, policy), right)
        cache = tiny_cache(m)
        for i in range(8):
            step = SkipPolicy("given", masks=[keep[:, i:i + 1] for keep in policy.masks])
            made.append(m(tiny_ids()[:, i:i + 1], cache=cache, policy=step, compute="compact")[0])
    same(torch.cat(made, 1), right)


@pytest.mark.parametrize("compute", ["masked", "compact"])
def test_an_overflow_shows_in_masked_only(compute):
    """Bug 7 that a user of compact would notice too, or nobody."""
    m = tiny_model()
    m.model["layers"][1].mlp.register_forward_hook(      # of token 2, where it runs
        lambda mlp, x, o: o.index_fill(1, torch.tensor([2]), torch.nan) if o.dim() == 3 else o)
    with mistake(7):
        bad = logits(m, given((3, 2), length=8), compute=compute).isnan()
    assert bad.all() if compute == "masked" else not bad.any()
    assert not logits(m, given((3, 2), length=8)).isnan().any()


# Putting a mistake in, and taking it out.

def test_who_imported_the_function_has_the_mistake():
    """A mistake put into one module, which those who have imported the function from there never see."""
    scores = torch.tensor([[0.1, 0.2, 0.3]])
    with mistake(1):
        assert select_tokens(scores, 1.0).tolist() == [[False, True, True]]
    assert select_tokens(scores, 1.0).all()


@pytest.mark.parametrize("number", BUGS)
def test_the_source_looks_the_same(number):
    """A test that need only read which source it got."""
    functions = [inspect.unwrap(f) for f in BUGS[number]]
    before = [(inspect.getsource(f), f.__code__.co_filename, f.__code__.co_firstlineno) for f in functions]
    with mistake(number):
        assert [(inspect.getsource(f), f.__code__.co_filename, f.__code__.co_firstlineno) for f in functions] == before


@pytest.mark.parametrize("edits", [[("never stood there", "")], [("scores", "tau")],
                                   [("return valid", "return None"), ("return valid", "")]],
                         ids=["none", "several", "gone"])
def test_a_stale_bug_is_told(edits):
    """A function that has changed, and a bug that does not fit it any more and silently is none."""
    said = complaint(mutant, select_tokens, edits)
    assert "gates.py" in said and "select_tokens is not what this bug was made for" in said


@pytest.mark.parametrize("end", [ValueError, KeyboardInterrupt, SystemExit])
def test_taken_out_however_it_ends(end):
    """Ctrl-C in a test, and a project that stays wrong."""
    before = code_of_all()
    with pytest.raises(end), mistake(12):
        assert code_of_all() != before
        raise end
    assert code_of_all() == before


# Students' tests.

def always_fails():
    assert 1 == 2, "one is not two\nand a second line"


def slips_on_the_mutant():
    assert select_tokens(torch.tensor([[0.1, 0.2]]), 1.0).all(), massage


def reads_the_source():
    assert "check_budget(budget) >= 1.0" in inspect.getsource(select_tokens)


def needs_a_fixture(tmp_path):
    pass


def test_what_is_said_of_poor_tests():
    """A test that is good for nothing and counts as caught."""
    said = lambda test: verdict(1, test)
    assert said(always_fails) == "fails on the original: AssertionError: one is not two"
    assert said(lambda: None) == "passes on the mutant: not caught"
    assert said(lambda: pytest.fail("no")) == "fails on the original: Failed: no"
    assert said(lambda: sys.exit(3)) == "fails on the original: SystemExit: 3"
    assert said(reads_the_source) == "passes on the mutant: not caught"
    assert said(needs_a_fixture).startswith("fails on the original: TypeError: needs_a_fixture() missing 1 required")
    assert said(slips_on_the_mutant) == "caught, by NameError: name 'massage' is not defined"
    assert said(None) == said("no function") == "there is no test_1"


def test_a_test_that_passes_once_only():
    """A test that leaves something behind, fails on the mutant for that reason and would fail on anything."""
    calls = []

    def test():
        calls.append(1)
        assert len(calls) == 1

    assert verdict(1, test).startswith("passes on the original, but not a second time: AssertionError")


def test_random_numbers_are_the_same_each_time():
    """A test that fails by chance, and catches a bug by chance."""
    drawn = []
    verdict(1, lambda: drawn.append((torch.rand(()).item(), check_bugs.random.random())))
    assert len(drawn) == 3 and len(set(drawn)) == 1


def test_ctrl_c_gets_through():
    """A test without end that cannot be stopped."""
    def test():
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        verdict(1, test)


# The command.

def test_the_command(capsys):
    """Other bugs than those asked for, and an exit code that says all is well where something is missing."""
    assert main(["7", "3", "--tests", str(ANSWERS)]) == 0
    assert capsys.readouterr().out == "bug  7  caught\nbug  3  caught\n2 of 2 caught\n"
    assert main(["0", "5"]) == 1
    assert capsys.readouterr().out == "bug  0  caught\nbug  5  not written yet\n1 of 2 caught\n"


@pytest.mark.parametrize("text, says", [("def test_1(:\n    pass\n", "mine.py, line 1: "),
                                        ("\n\nimport no_such_thing\n", "ModuleNotFoundError: No module named"),
                                        ("exit(0)\n", "SystemExit: 0"), ("x = '\0'\n", "null bytes")])
def test_a_file_that_does_not_run(tmp_path, text, says):
    """A student's typing mistake that ends in a traceback of ours, or counts as a bug caught."""
    (tmp_path / "mine.py").write_text(text)
    said = complaint(main, ["--tests", str(tmp_path / "mine.py")])
    assert "mine.py" in said and says in said


def test_bad_arguments(tmp_path):
    """A number of no bug that is checked as if it were one, or a file that is not there."""
    for number in "13", "-1", "x", "1.0":
        assert "none of 0 to 12" in complaint(main, [number])
    with pytest.raises(FileNotFoundError):
        main(["--tests", str(tmp_path / "missing.py")])
    with pytest.raises(IsADirectoryError):
        main(["--tests", str(tmp_path)])


def test_as_a_part_of_pytest_lesson():
    """A line in `python -m pytest lesson` that says "right" of a bug that nobody has caught."""
    assert lesson.test_bugs.test_bug(0) is None
    with pytest.raises(pytest.fail.Exception, match="^not written yet$"):
        lesson.test_bugs.test_bug(1)


def test_from_anywhere(tmp_path):
    """A checker that finds the project only where it is started, or lets a test's bug end in a traceback."""
    (tmp_path / "mine.py").write_text("from tiny import tiny_model\ndef test_4():\n    assert tiny_model() is None\n")
    done = subprocess.run([sys.executable, str(LESSON / "check_bugs.py"), "4", "--tests", "mine.py"], cwd=tmp_path,
                          capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout.splitlines() == ["bug  4  fails on the original: AssertionError", "0 of 1 caught"]
