"""What these scripts begin with: a model, what it reads of a data file (as the table at the end of train.py does), and
the work that a dense model has with it.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from console import InputError

from data import batch_at, collate, encode_all
from load_weights import check_fit, load_model, load_tokenizer
from savings import count_macs
from thresholds import chunks


def open_with_items(source, examples, limit, seq_len, device, dtype):
    """(model, its tokenizer, items: a list of (ids, loss_mask), how many examples were too long and left out).

    Items are the first `limit` examples (0: all); of plain text windows of up to seq_len tokens, from all over its
    first `limit` documents where that gives more. InputError for what cannot be read with this model.
    """
    model, tokenizer = load_model(source, device=device, dtype=dtype), load_tokenizer(source)
    check_fit(model, tokenizer)
    if not model.config.eos_ids:
        raise InputError(f"{source} names no eos_token_id in config.json or generation_config.json: an answer needs a "
                         "token that ends it")
    if seq_len > model.config.max_position_embeddings:
        raise InputError(f"--seq-len {seq_len} exceeds {source}'s {model.config.max_position_embeddings} positions")
    items, dropped = encode_all(examples[:limit or None], tokenizer, model.config.eos_ids[0], seq_len)
    if limit and len(items) > limit:
        items = [items[i] for i in batch_at(len(items), limit, 0, 0)]            # as data.load_sets picks them
    return model, tokenizer, items, dropped


def dense_macs(config, items):
    """Multiply-accumulates of the ungated model of a config on all items, in the batches of budgets.evaluate: int."""
    total = 0
    for chunk in chunks(items, length=lambda item: len(item[0])):
        _, loss_mask, valid = collate(chunk)                                     # (B, S) each
        keep = valid.expand(2 * config.num_hidden_layers, *valid.shape)          # (2L, B, S)
        total += count_macs(config, keep, valid, keys=valid.shape[1], logit_rows=loss_mask[:, 1:].sum()).item()
    return total
