"""How likely a model finds a text's continuation: log-likelihoods of many (context, continuation) pairs.

Whoever is decided by frozen thresholds, or skips nothing, is decided alone: then the choices of one question share the
pass over the tokens that they have in common, and a row that two of them read is read once. The batch quantile of the
paper ranks whatever runs together, so there each row is read whole, in batches of one size and a fixed order.

Shapes: B rows of a batch, S tokens of the longest, N positions that are scored, V vocabulary.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from console import InputError

import torch
from tqdm import tqdm

from rows import KVCache
from tokens import encode


def encode_pair(tokenizer, context, continuation, bos=None):
    """(ids of the context, ids of the continuation, whether a token straddled the border between them).

    Both are encoded together and then split, and blanks at the context's end belong to the continuation: encoded alone
    it would be other tokens. bos: an id to put in front where the tokenizer puts none; never a second one."""
    stripped = context.rstrip()
    context, continuation = stripped, context[len(stripped):] + continuation
    front = [] if bos is None or encode(tokenizer, "")[:1] == [bos] else [bos]
    whole, first = (front + encode(tokenizer, text) for text in (context + continuation, context))
    first = [] if not context and bos is None and not encode(tokenizer, "") else first
    if straddles := whole[:len(first)] != first or len(whole) == len(first):
        first = whole[:min(len(first), len(whole)) - 1]
    return first, whole[len(first):], straddles


@torch.no_grad()
def log_likelihoods(model, policy, questions, batch_size, savings, share=True, title="questions"):
    """Per question, a list of (context ids, continuation ids), a list of (log-likelihood, is it what greedy decoding
    writes): floats and bools, in order.

    batch_size: rows that run together. savings: a Savings that counts what ran. share=False: every row by itself, as
    the batch quantile needs anyway. What exceeds the model's positions loses tokens on the left. InputError for a
    context without a token, which nothing can continue."""
    most = model.config.max_position_embeddings
    for question in questions:
        if any(not context or not rest or len(rest) > most for context, rest in question):
            raise InputError("a context or a continuation has no token, or the latter is too long: give --bos where "
                             "the tokenizer puts nothing in front")
    read = [[tuple((context + rest)[-most - 1:-1]) for context, rest in question] for question in questions]
    share = share and policy.kind in ("none", "frozen")
    units = set()                                                # rows that run together, behind what all begin with
    for mine in map(sorted, map(set, read)):
        units |= {tuple(mine)} if share and common(mine) else {(row,) for row in mine}
    units = sorted(units, key=lambda unit: (-max(map(len, unit)), unit))
    wanted = {}                                                  # row -> how many positions at its end are scored
    for mine, question in zip(read, questions):
        for row, (_, rest) in zip(mine, question):
            wanted[row] = max(wanted.get(row, 0), len(rest))
    asked = {}                                                   # row -> [(question, choice)]
    for q, mine in enumerate(read):
        for c, row in enumerate(mine):
            asked.setdefault(row, []).append((q, c))

    answers, bar = [[None] * len(question) for question in questions], tqdm(total=len(asked), desc=title, leave=False)
    for batch in batches(units, batch_size):
        for row, scores in rows_of_a_batch(model, policy, batch, wanted, savings):               # (n, V)
            for q, c in asked.get(row, ()):
                target = torch.tensor(questions[q][c][1], device=scores.device)                  # (n,)
                mine = scores[-len(target):]
                answers[q][c] = (mine.gather(1, target[:, None]).sum().item(),
                                 (mine.argmax(-1) == target).all().item())
            bar.update(len(asked.pop(row, ())) > 0)
    bar.close()
    return answers


def batches(units, size):
    """Consecutive units, of `size` rows together or fewer, and one unit at least."""
    batch, count = [], 0
    for unit in units:
        if batch and count + len(unit) > size:
            yield batch
            batch, count = [], 0
        batch, count = batch + [unit], count + len(unit)
    if batch:
        yield batch


def rows_of_a_batch(model, policy, units, wanted, savings):
    """[(row, log-probabilities at its last wanted[row] positions (n, V))] of units that run together.

    A unit of several rows is read up to where they part, once; from there each goes on in the cache."""
    rows, owner = zip(*[(row, u) for u, unit in enumerate(units) for row in unit])
    if len(rows) == len(units):
        return list(zip(rows, scored(model, policy, rows, [wanted[row] for row in rows], savings)))
    alike = [common(unit) for unit in units]                     # at least 1
    first = [max(0, max(wanted[row] - len(row) + n for row in unit)) for unit, n in zip(units, alike)]
    cache = KVCache(model.config, len(units), max(map(len, rows)), *like(model))
    begun = scored(model, policy, [unit[0][:n] for unit, n in zip(units, alike)], first, savings, cache)
    rests = [row[alike[u]:] for u, row in zip(owner, rows)]
    cache.select(torch.tensor(owner, device=cache.lengths.device))
    counts = [min(wanted[row], len(rest)) for row, rest in zip(rows, rests)]
    ended = [None] * len(rows)
    if any(rests):
        ended = scored(model, policy, rests, counts, savings, cache)
    found = []
    for row, u, n, end in zip(rows, owner, counts, ended):
        left = wanted[row] - n                                   # scored before the rows part
        parts = [begun[u][len(begun[u]) - left:]] * (left > 0) + [end] * (n > 0)
        found.append((row, torch.cat(parts)))
    return found


def common(unit):
    """How many tokens all rows of a unit begin with."""
    shortest, other = min(unit), max(unit)                       # of sorted tuples the first and the last differ most
    return next((i for i, (a, b) in enumerate(zip(shortest, other)) if a != b), min(len(shortest), len(other)))


def like(model):
    weight = model.model["embed_tokens"].weight
    return weight.device, weight.dtype


def scored(model, policy, rows, counts, savings, cache=None):
    """Read rows (tuples of ids, of any lengths) -> per row the log-probabilities at its last counts[i] positions."""
    longest, (device, _) = max(map(len, rows)), like(model)
    ids = torch.tensor([[*row] + [0] * (longest - len(row)) for row in rows], device=device)                 # (B, S)
    valid = torch.arange(longest, device=device) < torch.tensor([[len(row)] for row in rows], device=device)
    places = torch.cat([b * longest + torch.arange(len(row) - n, len(row), device=device)
                        for b, (row, n) in enumerate(zip(rows, counts))])                                    # (N,)
    logits, trace = model(ids, valid=None if valid.all() else valid, cache=cache, policy=policy, compute="compact",
                          places=places)                                                                     # (N, V)
    savings.add(trace)
    return logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32)).split(counts)
