"""tasks.py and task_rows.py: prompts to the letter, examples as the harness draws them, and every published format."""
import bz2
import json
import re
import sys

import pytest

from conftest import complaint
from toy_runs import ROOT

sys.path.insert(0, str(ROOT / "paper"))

import task_rows
from task_rows import options, rows
from task_table import grouped
from tasks import GROUPS, STEM, SUBJECTS, TASKS, clean, expand, extract, normalise, with_examples

STRICT, LOOSE = TASKS["gsm8k"].strict, TASKS["gsm8k"].loose


# Golden facts.

@pytest.mark.parametrize("name, n, draws", [
    ("commonsense_qa", 9741, ([7220, 1914, 122, 1485, 9539], [1375, 1612, 5810, 3879, 285])),
    ("hellaswag", 39905, ([28883, 7657, 490, 5940, 38156],)), ("winogrande", 40398, ([28883, 7657, 490, 5940, 38156],)),
    ("piqa", 16113, ([15834, 12749, 7220, 1914, 122],)), ("openbookqa", 4957, ([3610, 957, 61, 742, 4769],)),
    ("gsm8k", 7473, ([6374, 3610, 957, 61, 742],))])
def test_examples_are_those_of_the_harness(name, n, draws):
    """Another seed, one draw for all questions or a seed for each, a sixth example where the harness draws five, or the
    other way."""
    asked, others = ([row_of(name, i) for i in range(*ends)] for ends in ((n, n + len(draws)), (0, n)))
    for doc, wanted in zip(with_examples(TASKS[name], asked, others, 5), draws, strict=True):
        *drawn, _ = map(int, re.findall(r"\d+", doc.prompt or doc.pairs[0][0]))
        assert drawn == wanted


def row_of(name, i):
    return {"hellaswag": {"activity_label": f"L{i}", "ctx_a": "So.", "ctx_b": "the MAN Walks", "endings": list("abcd"),
                          "label": "1"},
            "gsm8k": {"question": f"q{i}", "answer": "so\n#### x"},
            "piqa": {"goal": f"goal {i}", "sol1": "x", "sol2": "y", "label": 1},
            "commonsense_qa": {"question": f"q{i} ", "choices": {"label": list("ABCDE"), "text": list("vwxyz")},
                               "answerKey": "C"},
            "openbookqa": {"question_stem": f"stem {i}", "choices": {"label": list("ABCD"), "text": list("stuv")},
                           "answerKey": "D"},
            "winogrande": {"sentence": f"The {i} fits _ here .", "option1": "cup", "option2": "box", "answer": "2"},
            "mmlu_anatomy": {"subject": "college_biology", "question": f" q{i}", "choices": list("wxyz"), "answer": 2},
            "lambada": {"text": f"a b{i} c"}}[name]


EXPECTED = {
    "hellaswag": ("L0: So. The man walks", (" a", " b", " c", " d"), 1, "L7: So. The man walks b\n\n"),
    "piqa": ("Question: goal 0\nAnswer:", (" x", " y"), 1, "Question: goal 7\nAnswer: y\n\n"),
    "commonsense_qa": ("Question: q0\nA. v\nB. w\nC. x\nD. y\nE. z\nAnswer:", (" A", " B", " C", " D", " E"), 2,
                       "Question: q7\nA. v\nB. w\nC. x\nD. y\nE. z\nAnswer: C\n\n"),
    "openbookqa": ("stem 0", (" s", " t", " u", " v"), 3, "stem 7 v\n\n"),
    "mmlu_anatomy": ("q0\nA. w\nB. x\nC. y\nD. z\nAnswer:", (" A", " B", " C", " D"), 2,
                     "q7\nA. w\nB. x\nC. y\nD. z\nAnswer: C\n\n"),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_prompts(name):
    """A blank too many or too few, letters for texts, the answer of an example left out."""
    question, rests, gold, shot = EXPECTED[name]
    front = ("The following are multiple choice questions (with answers) about college biology.\n\n"
             if name == "mmlu_anatomy" else "")
    for shots in (0, 1):
        doc, = with_examples(TASKS[name], [row_of(name, 0)], [row_of(name, 7)] * 2, shots)
        assert doc.pairs == tuple((front + shot * shots + question, rest) for rest in rests) and doc.gold == gold


def test_an_example_equal_to_the_question_is_dropped():
    """A question that finds its own answer among its examples."""
    same, other = row_of("piqa", 0), row_of("piqa", 1)
    for seed in range(6):
        doc, = with_examples(TASKS["piqa"], [same], [same, other], 1, seed)
        assert doc.pairs[0][0].startswith("Question: goal 1\nAnswer: y\n\nQuestion: goal 0")


def test_winogrande_is_scored_the_other_way_round():
    """Different continuations, or a "_" that is left in an example."""
    doc, = with_examples(TASKS["winogrande"], [row_of("winogrande", 0)], [row_of("winogrande", i) for i in range(9)], 5)
    (one, rest), (two, same) = doc.pairs
    assert rest == same == " here ." and one.endswith("The 0 fits cup") and two.endswith("The 0 fits box")
    assert "_" not in one and one.count("\n\n") == 5 and " fits box here .\n\n" in one and doc.gold == 1


def test_lambada_and_hellaswag_texts():
    assert with_examples(TASKS["lambada"], [{"text": "a b c"}])[0].pairs == (("a b", " c"),)
    assert clean("Home and Garden: [header] How to clean [title] Use soap. [step] Rub  it. Then he") == (
        "Home and Garden: How to clean. Use soap. Rub it. Then he")


@pytest.mark.parametrize("text, strict, loose", [
    (".. $18.\n#### 18", "18", "18"), ("#### 1,234.", "1234", "1234"), ("The answer is 42.", "[invalid]", "42"),
    ("#### $18", "[invalid]", "18"), ("#### 18.00", "18.00", "18.00"), ("#### -7 and #### 9", "-7", "9"),
    ("nothing", "[invalid]", "[invalid]")])
def test_answers_of_gsm8k(text, strict, loose):
    assert (extract(text, STRICT), extract(text, LOOSE, last=True)) == (strict, loose)


def test_golds():
    """A gold answer that no answer can equal."""
    assert normalise("He has 3.\n#### 1,234") == "1234" and normalise("$5.") == "5"
    assert with_examples(TASKS["gsm8k"], [{"question": "q", "answer": "x\n#### 1,000"}])[0].gold == "1000"
    letter = with_examples(TASKS["csqa_gen"], [row_of("commonsense_qa", 0)])[0]
    assert letter.prompt == "Question: q0 \nA: v\nB: w\nC: x\nD: y\nE: z\nAnswer:" and letter.gold == extract(
        "so\n#### C", TASKS["csqa_gen"].strict)
    assert with_examples(TASKS["mmlu_gen"], [row_of("mmlu_anatomy", 0)])[0].gold == "c"
    assert extract("#### E, or #### D", TASKS["mmlu_gen"].strict) == "d"         # an answer that is no choice
    either = with_examples(TASKS["piqa_gen"], [row_of("piqa", 0)])[0]
    assert either.prompt == ("Question: goal 0\n 0. x,\n1. y. In the end, give either 0 or 1 as the answer.\nAnswer:")
    assert either.gold == extract("so\n#### 1", TASKS["piqa_gen"].strict) == "1"
    theirs = with_examples(TASKS["csqa_gen_theirs"], [row_of("commonsense_qa", 0)])[0]
    assert (theirs.prompt, theirs.gold) == ("Question: q0 \n\nChoices:\nA. v\nB. w\nC. x\nD. y\nE. z\nAnswer:", "c")
    number = with_examples(TASKS["mmlu_gen_theirs"], [row_of("mmlu_anatomy", 0)])[0]
    assert number.prompt.endswith("\nA. w\nB. x\nC. y\nD. z\nAnswer:") and number.gold == extract(
        "so\n#### 2", TASKS["mmlu_gen_theirs"].strict) == "2"
    assert extract("#### C", TASKS["mmlu_gen_theirs"].strict) == "[invalid]"     # letters, which they train on
    assert (TASKS["wmt16_en_ro_theirs"].split, TASKS["wmt16_en_ro"].split) == ("validation", "test")
    shot = with_examples(TASKS["gsm8k"], [row_of("gsm8k", 0)], [row_of("gsm8k", 7)], 1)[0]
    assert shot.prompt == "Question: q7\nAnswer: so\n#### x\n\nQuestion: q0\nAnswer:"
    pair = {"translation": {"en": "A cat.", "ro": "O pisică."}}
    doc = with_examples(TASKS["wmt16_en_ro"], [pair])[0]
    assert (doc.prompt, doc.gold) == ("translate English to Romanian: A cat.\n", "O pisică.")


def test_groups():
    """A subject lost, or counted twice."""
    assert len(STEM) == len(set(expand(["mmlu_stem"]))) == 19 and len(expand(["mmlu"])) == 57
    assert expand(["piqa", "loglikelihood"])[0] == "piqa" and len(expand(["piqa", "loglikelihood"])) == 24
    assert set(GROUPS["mmlu_stem"]) < set(GROUPS["mmlu"]) and all(name in TASKS for name in expand(list(GROUPS)))


def test_wikitext_is_scored_as_prose():
    """Marks whose blanks overlap missed ("Jr . ,"), replacements in another order, words counted in the changed text.
    Expected is what lm_eval 0.4.13 makes of it; so it does of 122 real articles (NOTES.md)."""
    row = {"text": " = A = = B = \n Tim , Jr . , was 1 @,@ 000 ( or 5 @-@ 6 @.@ 5 ) ; he said \" no ! \" at 4 ° C or N "
                   "times \n the dogs ' bone 's"}
    doc = TASKS["wikitext"].doc(row)
    assert doc.pairs == (("", " = A == B =\nTim, Jr., was 1,000 (or 5-6.5); he said \"no!\" at 4°C or 1 times\n"
                              "the dogs'bone's"),)
    assert doc.size == row["text"]


STEM_SIZES = dict(                                               # questions in each test file, as published
    abstract_algebra=100, anatomy=135, astronomy=152, college_biology=144, college_chemistry=100,
    college_computer_science=100, college_mathematics=100, college_physics=102, computer_security=100,
    conceptual_physics=235, electrical_engineering=145, elementary_mathematics=378, high_school_biology=310,
    high_school_chemistry=203, high_school_computer_science=100, high_school_mathematics=270, high_school_physics=151,
    high_school_statistics=216, machine_learning=112)


def test_mmlu_stem_has_3153_questions():
    """A subject lost, or another in its place; a macro mean, in which 100 questions weigh as much as 300."""
    assert set(STEM_SIZES) == set(STEM) and sum(STEM_SIZES.values()) == 3153
    row = lambda name, n, acc: {"task": f"mmlu_{name}", "budget": 1.0, "n": n, "acc": acc, "pairs": n, "calls": 1,
                                "macs_dense": n, "skipped": 0.0, "skipped_per_call": 0.0, "macs_saved": 0.0}
    whole, = grouped([row(name, n, float(name == "anatomy")) for name, n in STEM_SIZES.items()])
    assert whole["n"] == 3153 and whole["acc"] == pytest.approx(135 / 3153)


# Files.

def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())


FILES = [                                                        # data set, split, name of the file, what is in it
    ("piqa", "validation", "piqa_valid.jsonl", '{"goal": "g", "sol1": "x", "sol2": "y"}\n'),
    ("openbookqa", "test", "openbookqa/test.tsv", "ID\tQuestion Stem\tChoices\tComplete Question\tAnswer Key\n"
     "1\ta \"stem\tlong\t(A) x (B) y z (C) u (D) v\tall\tB\n".replace("\tlong", "")),
    ("commonsense_qa", "validation", "dev_rand_split.jsonl", json.dumps({
        "answerKey": "B", "question": {"stem": "s", "choices": [{"label": c, "text": c.lower()} for c in "ABCDE"]}})),
    ("hellaswag", "validation", "hellaswag_val_full.txt.bz2", bz2.compress(b"Do: it\n2\na\nb\nc\nd\nTry: on\n0\n"
                                                                           b"e\nf\ng\nh\n")),
    ("mmlu/anatomy", "test", "test/anatomy_test.csv", 'question,choice0,choice1,choice2,choice3,answer\n"q, ""r""",1,2,'
     '3,4,3\n'),
    ("mmlu/anatomy", "dev", "mmlu/anatomy_dev.csv", '"q\nr",1,2,3,4,D\n'),
    ("lambada", "test", "lambada_test.jsonl", '{"text": "a\\u2028b c"}\n'),
    ("wikitext", "test", "wiki.test.tokens", " \n = One = \n \n a b \n = = Part = = \n c \n = Two = \n \n d \n"),
    ("winogrande", "validation", "dev.jsonl", '{"sentence": "s _ t", "option1": "a", "option2": "b", "answer": "1"}'),
]


def test_every_format(tmp_path):
    """A header read as a question, a quotation mark that swallows lines, a label lost, an article cut in two."""
    for _, _, name, content in FILES:
        write(tmp_path / name, content)
    write(tmp_path / "piqa_valid-labels.lst", "1\n")
    found = {f"{name} {split}": rows(name, split, tmp_path)[0] for name, split, _, _ in FILES}
    assert found["piqa validation"] == [{"goal": "g", "sol1": "x", "sol2": "y", "label": "1"}]
    assert found["openbookqa test"] == [{"question_stem": 'a "stem', "answerKey": "B", "choices": {
        "label": list("ABCD"), "text": ["x", "y z", "u", "v"]}}]
    assert found["commonsense_qa validation"][0]["choices"] == {"label": list("ABCDE"), "text": list("abcde")}
    assert [r["ctx"] for r in found["hellaswag validation"]] == ["Do: it", "Try: on"]
    assert TASKS["hellaswag"].doc(found["hellaswag validation"][0]).pairs[2] == ("Do: it", " c")
    assert found["mmlu/anatomy test"] == [{"subject": "anatomy", "question": 'q, "r"', "choices": list("1234"),
                                           "answer": 3}]
    assert found["mmlu/anatomy dev"][0]["question"] == "q\nr" and found["mmlu/anatomy dev"][0]["answer"] == 3
    assert found["lambada test"][0]["text"] == "a\u2028b c"
    assert [r["text"] for r in found["wikitext test"]] == [" = One = \n \n a b \n = = Part = = \n c ",
                                                           " = Two = \n \n d \n"]
    assert options("(A) one (two) (B) (B2) three") == (["A", "B"], ["one (two)", "(B2) three"])


def test_parquet(tmp_path):
    """Nested columns that come out as something else than the hub's."""
    import pyarrow
    from pyarrow import parquet
    row = row_of("commonsense_qa", 0)
    path = tmp_path / "data" / "validation-00000-of-00001.parquet"
    path.parent.mkdir()
    parquet.write_table(pyarrow.Table.from_pylist([row]), path)
    assert rows("commonsense_qa", "validation", tmp_path) == ([row], str(path))


def test_a_subject_is_its_own(tmp_path):
    """One test.parquet of all subjects, asked 57 times, each time as another subject."""
    import pyarrow
    from pyarrow import parquet
    row = {"question": "q", "choices": ["1", "2", "3", "4"], "answer": 0}
    both = [row | {"subject": "anatomy"}, row | {"subject": "virology"}]
    (tmp_path / "mmlu" / "anatomy").mkdir(parents=True)
    for name in ("mmlu/test.parquet", "mmlu/anatomy/test-00000-of-00001.parquet"):
        parquet.write_table(pyarrow.Table.from_pylist(both), tmp_path / name)
    assert task_rows.find_local("mmlu/virology", "test", tmp_path) is None
    assert rows("mmlu/all", "test", tmp_path)[0] == both
    assert "row 2: a question of 'virology', not of mmlu/anatomy" in complaint(rows, "mmlu/anatomy", "test", tmp_path)


def test_the_folder_of_a_data_set_comes_first(tmp_path):
    """GSM8K's train.jsonl beside the folders, taken for PIQA's."""
    write(tmp_path / "train.jsonl", '{"question": "q", "answer": "a"}\n')
    write(tmp_path / "piqa" / "train.jsonl", '{"goal": "g", "sol1": "x", "sol2": "y", "label": 0}\n')
    assert rows("piqa", "train", tmp_path)[0][0]["goal"] == "g"
    assert rows("gsm8k", "train", tmp_path)[0][0]["question"] == "q"


def test_a_file_in_the_way_is_named(tmp_path):
    """GSM8K's train.jsonl beside the folders, in PIQA's way, and not a word of how to get it out."""
    write(tmp_path / "train.jsonl", '{"question": "q", "answer": "a"}\n')
    told = complaint(rows, "piqa", "train", tmp_path)
    assert told.endswith(f"it has question, answer; if it is of gsm8k, move it into {tmp_path / 'gsm8k'}")
    write(tmp_path / "gsm8k" / "train.jsonl", (tmp_path / "train.jsonl").read_text())
    (tmp_path / "train.jsonl").unlink()
    assert task_rows.find_local("piqa", "train", tmp_path) is None and rows("gsm8k", "train", tmp_path)[0]


@pytest.mark.parametrize("where", ["test", "mmlu/test", "mmlu", "."])
def test_all_of_mmlu_is_its_subjects(tmp_path, where):
    """A file that nobody published asked for; 56 subjects taken for 57; another order than the hub's."""
    for name in reversed(SUBJECTS):
        write(tmp_path / where / f"{name}_test.csv", f"of {name},1,2,3,4,D\n")
    found, origin = rows("mmlu/all", "test", tmp_path)
    assert [row["subject"] for row in found] == SUBJECTS == sorted(SUBJECTS) and len(SUBJECTS) == 57
    assert found[3]["question"] == f"of {SUBJECTS[3]}" and origin == str(tmp_path)
    (tmp_path / where / "virology_test.csv").unlink()
    assert task_rows.find_local("mmlu/all", "test", tmp_path) is None


def test_the_hubs_commit_is_recorded(tmp_path, monkeypatch):
    """The name of a blob in the hub's cache, to which its link leads, in the place of the commit."""
    def cached(repo, file, repo_type, revision):
        link = tmp_path / "snapshots" / revision / file
        write(tmp_path / "blobs" / "0123456789abcdef", '{"text": "a b"}\n')
        link.parent.mkdir(parents=True)
        link.symlink_to(tmp_path / "blobs" / "0123456789abcdef")
        return str(link)
    import huggingface_hub
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", cached)
    assert rows("lambada", "test") == ([{"text": "a b"}], "EleutherAI/lambada_openai@"
                                       f"{task_rows.SOURCES['lambada'].revision}")


def test_other_texts_than_the_hubs_are_told(tmp_path, capsys):
    """Figures that nobody can compare, without a word; the raw text, which can be, refused or cut."""
    for name in ("wiki.test.tokens", "wiki.test.raw"):
        write(tmp_path / name, " \n = One = \n \n a b \n = Two = \n \n d \n")
    raw, origin = rows("wikitext", "test", tmp_path)
    assert origin.endswith("wiki.test.raw") and not capsys.readouterr().err
    (tmp_path / "wiki.test.raw").unlink()
    words, origin = rows("wikitext", "test", tmp_path)
    assert words == raw and "rare words are <unk>" in origin and "CAUTION" in capsys.readouterr().err
    assert [len(re.split(r"\s+", r["text"])) for r in raw] == [7, 6]              # an empty one at each end


@pytest.mark.parametrize("name, content, said", [
    ("piqa_valid.jsonl", "{broken", "not readable in its format"), ("piqa_valid.jsonl", "", "no rows in it"),
    ("piqa_valid.jsonl", '{"goal": "g"}', "row 1: no column sol1, sol2, label; it has goal"),
    ("piqa_valid.jsonl", b"\xff\xfe", "not readable in its format")])
def test_bad_files(tmp_path, name, content, said):
    write(tmp_path / name, content)
    assert said in complaint(rows, "piqa", "validation", tmp_path)


@pytest.mark.parametrize("name, changed, said", [
    ("piqa", {"label": -1}, "label is -1, none of 0, 1"), ("piqa", {"label": True}, "label is True"),
    ("piqa", {"sol1": ""}, "sol1 is '', not a text"), ("piqa", {"goal": None}, "goal is None, not a text"),
    ("commonsense_qa", {"answerKey": "F"}, "answerKey is 'F', none of A, B, C, D, E"),
    ("commonsense_qa", {"choices": {"label": ["A"], "text": []}}, "not as many labels as texts"),
    ("winogrande", {"answer": "0"}, "answer is '0', none of 1, 2"), ("hellaswag", {"endings": "abcd"}, "no text"),
    ("hellaswag", {"label": "4"}, "label is '4'"), ("lambada", {"text": " "}, "text is ' ', not a text")])
def test_wrong_rows(tmp_path, name, changed, said):
    """An answer that nobody can give, or None read as a word: the file and the row are named."""
    task = TASKS[name]
    lines = "".join(json.dumps(row) + "\n" for row in (row_of(name, 1), row_of(name, 0) | changed))
    file = task_rows.SOURCES[task.rows].files[task.split][0]
    write(tmp_path / file, lines)
    told = complaint(rows, task.rows, task.split, tmp_path)
    assert f"{file}, row 2" in told and said in told


@pytest.mark.parametrize("name, content, said", [
    ("piqa_valid.jsonl", '{"goal": "g", "sol1": "x", "sol2": "y", "label": 1}\n[1, 2]', "line 2: not readable"),
    ("dev_rand_split.jsonl", '{"answerKey": "A", "question": {"choices": []}}', "row 1: not as it was published"),
    ("hellaswag_val_full.txt.bz2", bz2.compress(b"a\n1\nb\nc\nd\ne\nf\n"), "7 lines, and a question has six"),
    ("anatomy_test.csv", "q,1,2,3,4,E\n", "row 1: not readable"), ("anatomy_test.csv", "q,1,2\n", "six columns")])
def test_broken_files(tmp_path, name, content, said):
    write(tmp_path / name, content)
    asked = {"p": "piqa", "d": "commonsense_qa", "h": "hellaswag", "a": "mmlu/anatomy"}[name[0]]
    assert said in complaint(rows, asked, "test" if name[0] == "a" else "validation", tmp_path)


def test_line_ends_of_others(tmp_path):
    """U+0085 and U+2028 inside of a published text taken for the end of a line; a mark at the start of a file."""
    write(tmp_path / "anatomy_test.csv", "\ufeffquestion,choice0,choice1,choice2,choice3,answer\nq\u0085r,1,2,3,4,2\n")
    write(tmp_path / "hellaswag_val_full.txt.bz2", bz2.compress("a\u2028b\n1\nc\nd\ne\nf\n".encode()))
    assert rows("mmlu/anatomy", "test", tmp_path)[0][0]["question"] == "q\u0085r"
    assert rows("hellaswag", "validation", tmp_path)[0][0]["ctx"] == "a\u2028b"


@pytest.mark.parametrize("name, changed", [("piqa", {"label": "x"}), ("commonsense_qa", {"answerKey": "F"}),
                                           ("winogrande", {"sentence": "no gap"}), ("hellaswag", {"endings": None}),
                                           ("hellaswag", {"endings": ["[x]", "a", "b", "c"]})])
def test_rows_that_are_not_as_published(name, changed):
    """A traceback, or an answer that is wrong whatever the model says."""
    row = row_of(name, 0) | changed
    assert "row 2, or an example for it, is not as published" in complaint(
        with_examples, TASKS[name], [row_of(name, 1), row])


def test_what_is_not_there(tmp_path, monkeypatch):
    """A traceback of the hub's, or a split that does not exist asked from it."""
    import huggingface_hub
    asked = []

    def no_network(repo, file, **how):
        asked.append((repo, file, how))
        raise OSError("no network")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", no_network)
    assert "baber/piqa cannot be had (no network)" in complaint(rows, "piqa", "validation", tmp_path)
    assert asked == [("baber/piqa", "piqa_validation.parquet", {
        "repo_type": "dataset", "revision": "142f6d7367fd9877f0fb3b5734ea6a545f54cdd1"})]
    assert "has no split called dev" in complaint(rows, "piqa", "dev", tmp_path)
    loose = [name for name, source in task_rows.SOURCES.items() if not re.fullmatch("[0-9a-f]{40}", source.revision)]
    assert loose == ["wmt16"]                                    # whose commit is recorded, as all are
    write(tmp_path / "piqa_valid.jsonl", '{"goal": "g", "sol1": "x", "sol2": "y"}\n' * 2)
    write(tmp_path / "piqa_valid-labels.lst", "1\n")
    assert "2 rows and 1 labels" in complaint(rows, "piqa", "validation", tmp_path)
    assert "its format is not known" in complaint(task_rows.read, tmp_path / "a.zip")
