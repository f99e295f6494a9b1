"""Text in, (token ids, loss mask) out: every prompt that training and evaluation see is built here.

The paper's template (Appendix I.2), with the loss on everything after `Answer:`

    Question: {question}\\nAnswer: {reasoning}\\n#### {answer}<eos>

Data is a file (GSM8K or CommonsenseQA as JSONL or parquet, or plain text) or the built-in arithmetic word
problems, which need no download. `python data.py` shows some; `python data.py --data FILE` shows how a file is read.
"""
import hashlib
import random
import subprocess
import sys
import unicodedata
from functools import lru_cache
from pathlib import Path

from console import InputError, run
from flags import Parser, add_machine_flags, real, seed_number, whole

import torch

import disk
from problems import SPLITS, arithmetic, train_tokenizer
from read_data import read_examples
from tokens import encode


# ---------------------------------------------------------------------------------------------------------------------
# The template. Prompt and target are always encoded apart, so that no token straddles the border between them
# ---------------------------------------------------------------------------------------------------------------------

def prompt_text(question):
    """question -> "Question: …\\nAnswer:", without a trailing space: the target brings it."""
    return f"Question: {question}\nAnswer:"


def target_text(reasoning, answer):
    """(reasoning, answer) -> " {reasoning}\\n#### {answer}"; an empty reasoning leaves no stray space."""
    return (f" {reasoning}" if reasoning else "") + f"\n#### {answer}"


def encode_prompt(tokenizer, question):
    """-> list[int]: the prompt, with what the tokenizer's post-processor puts in front (BOS for Llama 3 and Gemma)."""
    return encode(tokenizer, prompt_text(question))


def encode_example(tokenizer, example, eos_id):
    """Example or str -> (ids list[int], loss_mask list[bool]), equally long; True where the token is to be predicted.

    Example: the target and its EOS are predicted, the prompt is not. Document: all but the first token."""
    if isinstance(example, str):
        ids = encode(tokenizer, example)
        ids += [eos_id] * (ids[-1:] != [eos_id])                 # a text may spell its end
        return ids, [False] + [True] * (len(ids) - 1)
    prompt = encode_prompt(tokenizer, example.question)
    target = encode(tokenizer, target_text(example.reasoning, example.answer), front=False) + [eos_id]
    return prompt + target, [False] * len(prompt) + [True] * len(target)


def encode_all(examples, tokenizer, eos_id, seq_len):
    """list of Example or str -> (items: list of (ids, loss_mask), dropped: int); no item is longer than seq_len.

    An Example that is too long is dropped and counted: cut, it would teach an answer without its end.
    A document is cut into windows that share one token, so that each token but the first is predicted exactly once.
    InputError if nothing is left."""
    if seq_len < 2:
        raise InputError(f"--seq-len must be at least 2, not {seq_len}: nothing predicts the first token")
    items, dropped, shortest = [], 0, None
    for example in examples:
        ids, mask = encode_example(tokenizer, example, eos_id)
        if isinstance(example, str):
            for i in range(0, len(ids) - 1, seq_len - 1):
                items.append((ids[i:i + seq_len], [False] + mask[i + 1:i + seq_len]))
        elif len(ids) <= seq_len:
            items.append((ids, mask))
        else:
            dropped += 1
            shortest = min(len(ids), shortest or len(ids))
    if not items:
        raise InputError(f"no example fits into --seq-len {seq_len}: the shortest of {dropped} has {shortest} tokens; "
                         f"raise --seq-len to at least that" if dropped else "no examples to encode")
    return items, dropped


# ---------------------------------------------------------------------------------------------------------------------
# Batches
# ---------------------------------------------------------------------------------------------------------------------

def collate(items):
    """list of B (ids, loss_mask) -> input_ids (B, S) int64, loss_mask (B, S) bool, valid (B, S) bool.

    S is the longest of the batch; shorter rows are padded with id 0 on the right. `valid` is True on real tokens."""
    S = max(len(ids) for ids, _ in items)
    input_ids = torch.zeros(len(items), S, dtype=torch.int64)  # (B, S)
    loss_mask = torch.zeros(len(items), S, dtype=torch.bool)   # (B, S)
    valid = torch.zeros(len(items), S, dtype=torch.bool)       # (B, S)
    for row, (ids, mask) in enumerate(items):
        input_ids[row, :len(ids)] = torch.tensor(ids)
        loss_mask[row, :len(ids)] = torch.tensor(mask)
        valid[row, :len(ids)] = True
    return input_ids, loss_mask, valid


def answer_places(input_ids, loss_mask):
    """Where the answer's tokens are predicted: flat places b * S + s (A,), and the ids that follow there (A,)."""
    places = loss_mask[:, 1:].nonzero()                          # (A, 2): token s+1 is to be predicted at s
    return places[:, 0] * input_ids.shape[1] + places[:, 1], input_ids[:, 1:][loss_mask[:, 1:]]


@lru_cache(maxsize=2)  # a batch touches the epoch it is in, and at a border the next one
def _epoch_order(n, seed, epoch):
    order = list(range(n))
    random.Random(f"{seed} {epoch}").shuffle(order)
    return order


def batch_at(n, batch_size, seed, step):
    """-> list[int]: which of n items are in batch `step` (from 0). A pure function of its arguments, so a resumed
    run needs no saved state: the batches walk through one fresh permutation of the items after another."""
    positions = range(step * batch_size, (step + 1) * batch_size)
    return [_epoch_order(n, seed, p // n)[p % n] for p in positions]


def _text(example):
    return example if isinstance(example, str) else example.question


def question_of(example):
    """What two examples share if one gives the other away: the question, or the document, without what may differ
    where someone has copied it: case, blanks, the punctuation at its end, Unicode's other forms of a character."""
    return " ".join(unicodedata.normalize("NFKC", _text(example)).casefold().split()).rstrip(" .,:;!?\"'。؟।")


def hold_out(examples, *sizes):
    """-> (rest, set1, set2, …): one held-out list of each size, but at most 1/8 of the examples in each.

    Those whose question (or document) has the smallest sha256: the same ones in any order of the file, and examples
    that share it (question_of) stay together, so none leaks from one list into another. InputError if a list stays
    empty."""
    groups, limit = {}, len(examples) // 8
    for example in examples:
        groups.setdefault(question_of(example), []).append(example)
    first = lambda question: min(hashlib.sha256(_text(example).encode()).digest() for example in groups[question])
    held = [[] for _ in sizes]
    for question in sorted(groups, key=first):
        for part, size in zip(held, sizes):
            if len(part) + len(groups[question]) <= min(size, limit):
                part += groups.pop(question)
                break
    if any(size > 0 and not part for part, size in zip(held, sizes)):
        raise InputError(f"{len(examples)} examples are too few to hold some out: at least 8 different ones are needed")
    return [example for group in groups.values() for example in group], *held


def load_sets(args, tokenizer, eos_id, held_out):
    """{"train", "calibration", "check", "eval"}: lists of (ids, loss_mask), disjoint. Says what was dropped.

    args: train.py's flags; its limits count items: what fits into one row of a batch, however long the documents are.
    held_out: how many examples are put aside for each of calibration, check and eval."""
    if args.data == "arithmetic":
        held, n = load_examples("arithmetic", "calibration", 2 * held_out, args.seed), args.batch_size * args.grad_accum
        texts = {"train": load_examples("arithmetic", "train", min(args.steps * n, 200_000), args.seed),
                 "calibration": held[:held_out], "check": held[held_out:],
                 "eval": load_examples("arithmetic", "test", args.eval_limit)}
    else:
        names = ("train", "calibration", "check") + (() if args.eval_data else ("eval",))
        texts = dict(zip(names, hold_out(load_examples(args.data), *(held_out,) * (len(names) - 1))))
    if args.eval_data:
        texts["eval"] = load_examples(args.eval_data, "test", args.eval_limit)
    sets, dropped = {}, 0
    limits = {"calibration": args.calibration_sequences, "check": args.calibration_sequences, "eval": args.eval_limit}
    for name, examples in texts.items():
        limit = limits.get(name)                                 # None: all of them
        items, n = encode_all(examples[:limit], tokenizer, eos_id, args.seq_len)
        if limit and len(items) > limit:                         # windows: from all over the documents
            items = [items[i] for i in _epoch_order(len(items), 0, 0)[:limit]]
        sets[name], dropped = items, dropped + n
    note = f"; {dropped} longer than --seq-len {args.seq_len} left out" if dropped else ""
    trained_on = set(map(question_of, texts["train"]))
    if shared := sum(question_of(example) in trained_on for example in texts["eval"]):
        note += f"; CAUTION: {shared} of the eval problems are trained on, they are in --data too"
    print("data: " + ", ".join(f"{len(items)} {name}" for name, items in sets.items()) + note)
    return sets


def load_examples(name, split="train", n=None, seed=0):
    """-> the first n examples of `name`: "arithmetic", or the path of a file (which is its own split)."""
    if n is not None and n < 1:
        raise InputError(f"the number of examples must be at least 1, not {n}")
    if str(name) == "arithmetic":
        return arithmetic(n or (20_000 if split == "train" else 1_000), split, seed)
    return read_examples(name)[:n]


def make_tokenizer():
    """The tokenizer of the built-in problems, always the same."""
    return train_tokenizer(prompt_text(p.question) + target_text(p.reasoning, p.answer) for p in arithmetic(4_000))


def parse_args(argv):
    p = Parser("Show examples as the model sees them, write the built-in tokenizer, or let a model write texts.")
    add = p.add_argument
    add("--data", default="arithmetic", help="arithmetic, or a .jsonl, .parquet or .txt file")
    add("--split", default="train", choices=SPLITS, help="of the arithmetic problems")
    add("--n", type=whole(1, 10 ** 9), default=3, help="how many")
    add("--seed", type=seed_number, default=0, help="of the arithmetic problems, and of the texts")
    add("--make-tokenizer", metavar="FILE", help="write the tokenizer of the arithmetic problems and stop")
    add("--write-with", metavar="MODEL", help="folder, a run's --out, or hub id: let it write --n texts into --out")
    add("--out", metavar="FILE", help="a .jsonl file for --data; the same command goes on with what is there")
    add("--prompts", metavar="FILE", help="as --data: documents to go on with, questions to answer; default: none")
    add("--max-new-tokens", type=whole(1), default=256, help="of each text")
    add("--batch-size", type=whole(1), default=16, help="texts that are written together")
    add("--temperature", type=real(0.0), default=1.0, help="1 is the model's own distribution, 0 greedy")
    add("--overwrite", action="store_true", help="replace the texts in --out")
    add_machine_flags(p)
    args = p.parse_args(argv)
    if empty := [name for name in ("data", "write_with", "prompts") if getattr(args, name) == ""]:
        raise InputError(f"--{empty[0].replace('_', '-')} is empty: name what it is to read, or leave it out")
    own = "out prompts max_new_tokens batch_size temperature overwrite device dtype".split()
    for name in own if args.write_with is None else ("data", "split", "make_tokenizer"):
        if getattr(args, name) != p.get_default(name):
            raise InputError(f"--{name.replace('_', '-')} goes {'only' if name in own else 'not'} with --write-with")
    return args


def main(argv=None):
    args = parse_args(argv)
    if args.write_with is not None:                              # a program apart: its generate.py needs this file
        return subprocess.call([sys.executable, Path(__file__).with_name("own_text.py"), *(argv or sys.argv[1:])])
    if args.make_tokenizer is not None:
        path = Path(args.make_tokenizer)
        if path.exists() and not path.is_file():
            raise InputError(f"--make-tokenizer {path}: a folder or a device: give the name of a file")
        try:
            disk.write(path, make_tokenizer().to_str(pretty=True))
        except OSError as error:
            raise InputError(f"--make-tokenizer {path}: {error.strerror}: give a file that can be written") from None
        return 0
    for example in load_examples(args.data, args.split, args.n, args.seed):
        text = example if isinstance(example, str) else prompt_text(example.question) + target_text(*example[1:])
        print(text, end="\n\n")
    return 0


if __name__ == "__main__":
    run(main)
