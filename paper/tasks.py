"""The benchmarks of the paper's tables, one short definition each: how a row is asked, and what counts.

Prompts, splits, examples and scores are those of EleutherAI's LM Evaluation Harness, so that figures compare.
A row is a dict with the columns of the published data set (task_rows.py). Its Doc holds texts: the pairs (context,
continuation) to score, one per choice; or a prompt to continue. Between a context and its continuation stands a space,
which belongs to the continuation.
"""
import random
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from console import InputError

from data import prompt_text

LETTERS = "ABCDE"
STEM = ("abstract_algebra anatomy astronomy college_biology college_chemistry college_computer_science "
        "college_mathematics college_physics computer_security conceptual_physics electrical_engineering "
        "elementary_mathematics high_school_biology high_school_chemistry high_school_computer_science "
        "high_school_mathematics high_school_physics high_school_statistics machine_learning").split()
OTHER_SUBJECTS = ("business_ethics clinical_knowledge college_medicine econometrics formal_logic global_facts "
                  "high_school_european_history high_school_geography high_school_government_and_politics "
                  "high_school_macroeconomics high_school_microeconomics high_school_psychology "
                  "high_school_us_history high_school_world_history human_aging human_sexuality international_law "
                  "jurisprudence logical_fallacies management marketing medical_genetics miscellaneous "
                  "moral_disputes moral_scenarios nutrition philosophy prehistory professional_accounting "
                  "professional_law professional_medicine professional_psychology public_relations "
                  "security_studies sociology us_foreign_policy virology world_religions").split()
SUBJECTS = sorted(STEM + OTHER_SUBJECTS)                         # of MMLU, as the hub's "all" has them
STOPS = ("Question:", "</s>", "<|im_end|>")                      # beside the end token


@dataclass(frozen=True)
class Doc:
    """One question. shot: how it looks as an example to others, with its right answer."""
    pairs: tuple = ()               # (context, continuation) of each choice, to be scored
    gold: object = None             # the number of the right choice, or of a generated answer the right text
    shot: str = ""
    prompt: str = ""                # to be continued
    size: str = ""                  # of a text that is scored as a whole: it as published, whose words are counted


@dataclass(frozen=True)
class Task:
    """doc: row -> Doc. rows: the data set's name in task_rows.SOURCES. strict, loose: what is an answer in a generated
    text, the first or the last match. draws: from how many examples more than asked for one equal to the question is
    dropped; None: the first of the split, the same for all."""
    kind: str                       # "choice", "word", "text" or "answer"
    rows: str
    doc: Callable
    split: str = "validation"
    shots: str = ""                 # split of the examples; "": none
    draws: object = 0
    norm: bool = True               # whether acc_norm means something
    describe: Callable = lambda row: ""          # what stands once before everything
    strict: str = ""
    loose: str = ""
    stops: tuple = STOPS
    bleu: bool = False


# ---------------------------------------------------------------------------------------------------------------------
# Log-likelihoods of choices
# ---------------------------------------------------------------------------------------------------------------------

def choice(question, choices, gold):
    """A Doc whose choices all continue one question."""
    return Doc(tuple((question, f" {c}") for c in choices), gold, f"{question} {choices[gold]}")


def lettered(question, texts):
    """The question, a line per choice ("A. ..."), and "Answer:"."""
    return question + "".join(f"\n{letter}. {text}" for letter, text in zip(LETTERS, texts)) + "\nAnswer:"


def mmlu(row):
    return choice(lettered(row["question"].strip(), row["choices"]), LETTERS[:4], int(row["answer"]))


def subject(row):
    return f"The following are multiple choice questions (with answers) about {row['subject'].replace('_', ' ')}.\n\n"


def csqa(row):
    labels, texts = row["choices"]["label"], row["choices"]["text"]
    return choice(lettered(f"Question: {row['question'].strip()}", texts), labels, labels.index(row["answerKey"]))


def clean(text):
    """HellaSwag's texts without the marks of its sources: "[title]" ends a sentence, other brackets go."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")                               # once: three blanks leave two


def hellaswag(row):
    whole = row["ctx"] if "ctx_a" not in row else f"{row['ctx_a']} {row['ctx_b'].capitalize()}"
    whole = f"{row['activity_label']}: {whole}" if row.get("activity_label") else whole
    return choice(clean(whole), [clean(ending) for ending in row["endings"]], int(row["label"]))


def piqa(row):
    return choice(f"Question: {row['goal']}\nAnswer:", [row["sol1"], row["sol2"]], int(row["label"]))


def openbookqa(row):
    labels = row["choices"]["label"]
    return choice(row["question_stem"], row["choices"]["text"], labels.index(row["answerKey"].lstrip()))


def winogrande(row):
    """The other way round: the context ends with the option, and what follows is the same for both."""
    before, after = row["sentence"].split("_")
    options, rest, gold = (row["option1"], row["option2"]), f" {after.strip()}", int(row["answer"]) - 1
    return Doc(tuple((before + option, rest) for option in options), gold, before + options[gold] + rest)


def lambada(row):
    """The last word of a text: right if it is what the model would write, token by token."""
    before, _, word = row["text"].rpartition(" ")
    return Doc(((before, f" {word}"),))


# wikitext sets its tokens apart by blanks; the harness scores it as prose again, by these replacements in this order
PROSE = [(re.compile(old), new) for old, new in (
    ("s '", "s'"), *((f" @[{mark}]@ ", mark) for mark in "-,."), *((f" [{mark}] ", f"{mark} ") for mark in ":;.!?,"),
    (r"\(\s*([^)]*?)\s*\)", r"(\1)"), (r"\[\s*([^]]*?)\s*\]", r"[\1]"), (r"{\s*([^}]*?)\s*}", r"{\1}"),
    (r'"\s*([^"]*?)\s*"', r'"\1"'), (r"'\s*([^']*?)\s*'", r"'\1'"),
    ("= = = =", "===="), ("= = =", "==="), ("= =", "=="), (" ° ", "°"), (" \n", "\n"), ("\n ", "\n"), (" N ", " 1 "),
    (" 's", "'s"))]


def text(row):
    prose = row["text"]
    for old, new in PROSE:
        prose = old.sub(new, prose)
    return Doc((("", prose),), size=row["text"])


# ---------------------------------------------------------------------------------------------------------------------
# Generated answers, zero-shot unless asked, in the template of training (the paper's Appendix I.2)
# ---------------------------------------------------------------------------------------------------------------------

def listed(question, texts):
    """A question with its choices as data.py trains on them."""
    return prompt_text(question + "".join(f"\n{letter}: {text}" for letter, text in zip(LETTERS, texts)))


def gsm8k(row):
    prompt = prompt_text(row["question"])
    return Doc(gold=normalise(row["answer"]), shot=f"{prompt} {row['answer']}", prompt=prompt)


def csqa_gen(row):
    return Doc(gold=row["answerKey"].lower(), prompt=listed(row["question"], row["choices"]["text"]))


def mmlu_gen(row):
    return Doc(gold=LETTERS[int(row["answer"])].lower(), prompt=listed(row["question"], row["choices"]))


def csqa_gen_theirs(row):
    """As the authors' task files ask, in another form than they train on."""
    return Doc(gold=row["answerKey"].lower(),
               prompt=lettered(f"Question: {row['question']}\n\nChoices:", row["choices"]["text"]))


def mmlu_gen_theirs(row):
    """As theirs: shown letters, the model is to answer with the number, 0 to 3."""
    return Doc(gold=str(int(row["answer"])), prompt=lettered(f"Question: {row['question']}", row["choices"]))


def piqa_gen(row):
    asked = f"{row['goal']}\n 0. {row['sol1']},\n1. {row['sol2']}. In the end, give either 0 or 1 as the answer."
    return Doc(gold=str(int(row["label"])), prompt=prompt_text(asked))           # the authors' words, and blank


def wmt16(row):
    pair = row["translation"]
    return Doc(gold=pair["ro"], prompt=f"translate English to Romanian: {pair['en']}\n")


def normalise(answer):
    """An answer without what makes it no other: commas, dollar signs, all up to the last "#### ", one full stop at the
    end, case."""
    return re.sub(r"(?s).*#### ", "", re.sub(r"[,$]", "", answer)).removesuffix(".").lower()


def extract(text, pattern, last=False):
    """The first or the last match of a pattern in a generated text, normalised; "[invalid]" without one."""
    found = [next(filter(None, m.groups())) for m in re.finditer(pattern, text)]
    return normalise(found[-1 if last else 0]) if found else "[invalid]"


NUMBER = dict(strict=r"#### (\-?[0-9\.\,]+)", loose=r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
LETTER = {last: dict(strict=rf"#### ([A-{last}])", loose=rf"\b([A-{last}])\b") for last in "DE"}

TASKS = {
    **{f"mmlu_{name}": Task("choice", f"mmlu/{name}", mmlu, "test", "dev", None, False, subject)
       for name in SUBJECTS},
    "hellaswag": Task("choice", "hellaswag", hellaswag, shots="train", draws=1),
    "commonsense_qa": Task("choice", "commonsense_qa", csqa, shots="train", draws=1, norm=False),
    "piqa": Task("choice", "piqa", piqa, shots="train", draws=1),
    "openbookqa": Task("choice", "openbookqa", openbookqa, "test", "train"),
    "winogrande": Task("choice", "winogrande", winogrande, shots="train", draws=1, norm=False),
    "lambada": Task("word", "lambada", lambada, "test"),
    "wikitext": Task("text", "wikitext", text, "test"),
    "gsm8k": Task("answer", "gsm8k", gsm8k, "test", "train", **NUMBER),
    "csqa_gen": Task("answer", "commonsense_qa", csqa_gen, **LETTER["E"]),
    "mmlu_gen": Task("answer", "mmlu/all", mmlu_gen, "test", **LETTER["D"]),
    "piqa_gen": Task("answer", "piqa", piqa_gen, **NUMBER),
    "wmt16_en_ro": Task("answer", "wmt16", wmt16, "test", stops=("\n",), bleu=True),
    # what the authors' task files ask in place of these
    "csqa_gen_theirs": Task("answer", "commonsense_qa", csqa_gen_theirs, **LETTER["E"]),
    "mmlu_gen_theirs": Task("answer", "mmlu/all", mmlu_gen_theirs, "test", **NUMBER),
    "wmt16_en_ro_theirs": Task("answer", "wmt16", wmt16, stops=("\n",), bleu=True),             # validation
}
GROUPS = {"mmlu": [name for name in TASKS if name.startswith("mmlu_") and not name.startswith("mmlu_gen")],
          "mmlu_stem": [f"mmlu_{name}" for name in STEM],
          "loglikelihood": ["mmlu_stem", "hellaswag", "commonsense_qa", "piqa", "openbookqa", "winogrande"],
          "generative": ["csqa_gen", "gsm8k"]}


def expand(names):
    """Task names, groups replaced by what they hold, each once, in order."""
    found = {}
    for name in names:
        found |= dict.fromkeys(expand(GROUPS[name]) if name in GROUPS else [name])
    return list(found)


def examples(task, doc, others, shots, draw):
    """The text of a question's examples: others (rows) drawn by draw, a random.Random that goes on from question to
    question; "" for none."""
    if not shots:
        return ""
    if task.draws is None:
        chosen = [task.doc(row) for row in others[:shots]]
    else:
        chosen = [task.doc(row) for row in draw.sample(others, shots + task.draws)]
        chosen = [other for other in chosen if not task.draws or other != doc][:shots]
    return "".join(f"{other.shot}\n\n" for other in chosen)


def with_examples(task, rows, others=(), shots=0, seed=1234):
    """rows -> their Docs, each x the description and `shots` examples from `others`, rows too."""
    draw, docs = random.Random(seed), []
    for number, row in enumerate(rows, 1):
        try:
            doc = task.doc(row)
            front = task.describe(row) + examples(task, doc, others, shots, draw)
            if not all(rest.strip() for _, rest in doc.pairs):
                raise ValueError("a choice, or a last word, is blank")
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise InputError(f"{task.rows}: row {number}, or an example for it, is not as published ({error!r:.80}): "
                             f"{row!r:.200}") from None
        pairs = tuple((front + context, rest) for context, rest in doc.pairs)
        docs.append(Doc(pairs, doc.gold, doc.shot, front + doc.prompt if doc.prompt else "", doc.size))
    return docs
