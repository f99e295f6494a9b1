"""What these scripts begin with: the file to write, a model, what it reads of a data file (as the table at the end of
train.py does), and the work that a dense model has with it.
"""
import os
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from console import InputError

import torch

import quantized
from bench import check_output
from data import batch_at, collate, encode_all
from disk import check_writable
from flags import add_machine_flags, whole
from load_weights import check_fit, load_model, load_tokenizer, read_json
from savings import count_macs
from thresholds import chunks


def check_own(flag, path, *keys):
    """InputError unless this JSON file can be written: it is new, or an object with these keys and so a script's own.
    The flag is what names it."""
    if not str(path):
        raise InputError(f"{flag} is empty: name a file")
    check_output(flag, path)
    try:
        ours = not Path(path).exists() or set(keys) <= set(read_json(path))
    except InputError:                                           # no JSON, or no object
        ours = False
    if not ours:
        raise InputError(f"{flag} {path} is no file of this program: give another {flag}")


def add_flags_of_a_new_model(p):
    """--limit and --seq-len of its --data, the --out folder that it goes to, and where it is made."""
    p.add_argument("--limit", type=whole(0), default=64, help="the first N examples of --data; 0: all")
    p.add_argument("--seq-len", type=whole(2), default=512, help="longer examples are left out, plain text is cut")
    p.add_argument("--out", required=True, help="the folder to write, which must not exist")
    add_machine_flags(p)


def check_new(out):
    """InputError unless a folder of this name can be made."""
    if not out:
        raise InputError("--out is empty: name a folder")
    if os.path.lexists(out):                                     # a link that leads nowhere is there, too
        raise InputError(f"--out {out} exists: give the name of a new folder")
    check_writable(Path(out).parent)


@contextmanager
def whole_or_none(folder):
    """Writing a new folder: what a failure leaves of it, which would be in the way of another try, is taken away."""
    try:
        yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def open_model(source, device="cpu", dtype=torch.float32):
    """load_model, and of what quantize.py wrote open_quantized."""
    opens = quantized.open_quantized if quantized.is_quantized(source) else load_model
    return opens(source, device=device, dtype=dtype)


def open_with_items(source, examples, limit, seq_len=None, device="cpu", dtype=torch.float32):
    """(model, its tokenizer, items: a list of (ids, loss_mask), how many examples were too long and left out).

    Items are the first `limit` examples (0: all); of plain text windows of up to seq_len tokens, from all over its
    first `limit` documents where that gives more; seq_len None: as many as the model has positions. InputError for what
    cannot be read with this model.
    """
    model, tokenizer = open_model(source, device, dtype), load_tokenizer(source)
    check_fit(model, tokenizer)
    if not model.config.eos_ids:
        raise InputError(f"{source} names no eos_token_id in config.json or generation_config.json: an answer needs a "
                         "token that ends it")
    seq_len = seq_len or model.config.max_position_embeddings
    if seq_len > model.config.max_position_embeddings:
        raise InputError(f"--seq-len {seq_len} exceeds {source}'s {model.config.max_position_embeddings} positions")
    items, dropped = encode_all(examples[:limit or None], tokenizer, model.config.eos_ids[0], seq_len)
    if limit and len(items) > limit:
        items = [items[i] for i in batch_at(len(items), limit, 0, 0)]            # as data.load_sets picks them
    return model, tokenizer, items, dropped


def settings_of(model):
    """The flags that a run was trained with, or the few that config.json keeps. InputError for a damaged state."""
    state = model.source / "train_state.pt"                      # some lack it
    try:
        return dict(torch.load(state, "cpu", weights_only=True, mmap=True)["settings"] if state.exists()
                    else model.config.gateskip)
    except (OSError, EOFError, LookupError, TypeError, ValueError, AttributeError, RuntimeError, UnpicklingError):
        raise InputError(f"{state} is damaged: move it away, and config.json is asked instead") from None


def dense_macs(config, items):
    """Multiply-accumulates of the ungated model of a config on all items, in the batches of budgets.evaluate: int."""
    total = 0
    for chunk in chunks(items, length=lambda item: len(item[0])):
        _, loss_mask, valid = collate(chunk)                                     # (B, S) each
        keep = valid.expand(2 * config.num_hidden_layers, *valid.shape)          # (2L, B, S)
        total += count_macs(config, keep, valid, keys=valid.shape[1], logit_rows=loss_mask[:, 1:].sum()).item()
    return total


def macs_of_answers(config, items):
    """(MACs of the prompts, MACs of the answers generated token by token) of a dense model on items (ids, mask)."""
    prompts = answers = 0
    count = lambda length, keys: count_macs(                     # one sequence, logits of its last token
        config, torch.ones(2 * config.num_hidden_layers, 1, length, dtype=torch.bool),
        torch.ones(1, length, dtype=torch.bool), keys=keys, logit_rows=1).item()
    one = [count(1, keys) for keys in range(1 + max(len(ids) for ids, _ in items))]
    for ids, mask in items:
        start = mask.index(True)
        prompts += count(start, start)
        answers += sum(one[start + 1:len(ids)])                  # the last token is never put in
    return prompts, answers
