"""What counts as an answer: the rules of the GSM8K task in EleutherAI's lm-evaluation-harness, with one difference.

A number that goes on is another number: where the harness takes 3/4 for 3, nothing here does.
"""
import re

from console import InputError

from data import target_text
from tokens import decode, encode

# 5, and 3/4, 3 1/2, 3½, 12:30, 3-5, 2*4, 1e5 as a whole; what follows otherwise is a unit: 5%, 5 apples
NUMBER = r"-?[0-9.,]+(?:(?: [0-9]+)? ?[-+*/^:ex×]+ ?[0-9.,]+)*[¼½¾]?"
ANYWHERE = r"(?:-?[$0-9.,]{2,}|-?[0-9]+)(?: ?/ ?[$0-9.,]+)?"     # 48/2=24 ends in 24


def normalise(answer):
    """Strip what does not make a number another one: commas, dollar signs, one full stop at the end, case."""
    return re.sub(r"[,$]", "", answer).strip().removesuffix(".").lower()


def extract_answer(text, flexible=False):
    """The answer in a generated text, normalised, or None. Text after a new "Question:" is not looked at.

    Strict: the number or the option's letter behind the first "####" that has one. Flexible: the last number anywhere.
    """
    text = text.split("Question:")[0]
    if flexible:
        found = re.findall(ANYWHERE, text)
        return normalise(found[-1]) if found else None
    found = re.search(rf"#### ({NUMBER}|[A-J]\b)", text)
    return normalise(found[1]) if found else None


def is_right(text, answer):
    """Whether a generated text gives the gold answer (str), strictly.

    A number or a letter A to J is compared with extract_answer: GSM8K and CommonsenseQA have no other. Any other gold
    answer ($18, 50%, 12 apples, b, yes) has to be all that stands behind the first "####" on its line.
    """
    gold = normalise(answer)
    if extract_answer(f"#### {answer}") == gold:
        return extract_answer(text) == gold
    _, mark, rest = text.split("Question:")[0].partition("#### ")
    return bool(mark) and normalise(rest.split("\n")[0]) == gold


def check_golds(examples, tokenizer, data):
    """Words for the gold answers that would not count even if a model wrote exactly what the data has; "" if none.

    data: --data. InputError where that is all of them.
    """
    def counts(example):
        ids = encode(tokenizer, target_text(example.reasoning, example.answer), front=False)
        return is_right(decode(tokenizer, ids), example.answer)
    never = [f"{e.answer!r:.40}" for e in examples if not counts(e)]
    if len(never) == len(examples):
        raise InputError(f"--data {data}: no answer could ever count, such as {never[0]}: each must be one line behind "
                         "the only #### of its text, in characters that the tokenizer gives back")
    return f"; CAUTION: gold answers that can never count: {len(never)}, such as {never[0]}" if never else ""
