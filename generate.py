"""Algorithm 2: batched decoding that really skips, and a command line that shows what was skipped.

    python generate.py --model examples/tiny-llama --question "Tom has 3 red pens and 4 blue pens. ..." --show-compute

Prompts of unequal length are left-padded; finished sequences leave the computation.
"""
import argparse
import sys
from dataclasses import dataclass

import torch

from data import prompt_text
from gates import GRANULARITIES, InputError, SkipPolicy, Savings, check_budget, gate_settings, thresholds_at
from load_weights import chat_template, load_model, load_tokenizer
from model import KVCache


@dataclass
class Generation:
    """tokens: per prompt the new token ids, the end token included. savings: the three numbers of Savings.report().
    ran: per prompt the share of branches that ran for each token, prompt and new (the last new one never runs)."""
    tokens: list
    savings: dict
    ran: list


def sample(logits, temperature=0.0, top_k=0, top_p=1.0, generator=None):
    """Next token ids (B,) from logits (B, V). temperature 0 is greedy; top_k 0 and top_p 1 are off."""
    if temperature == 0.0:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    ordered, order = logits.sort(dim=-1, descending=True)        # (B, V)
    if top_k:
        ordered[:, top_k:] = -torch.inf
    p = ordered.softmax(-1)
    p = torch.where(p.cumsum(-1) - p < top_p, p, 0.0)            # drop what comes after the first top_p of the mass
    pick = torch.multinomial(p, 1, generator=generator)          # (B, 1); multinomial normalises
    return order.gather(-1, pick)[:, 0]


@torch.no_grad()
def generate(model, prompts, max_new_tokens, policy=None, eos_ids=(), temperature=0.0, top_k=0, top_p=1.0,
             generator=None, compute="compact", on_token=None):
    """Continue every prompt (list of token ids) by up to max_new_tokens; returns a Generation.

    on_token(i, id) is called for each new token of prompt i as it comes. InputError for an empty prompt, and for a
    length beyond the model's positions.
    """
    device, config = next(model.parameters()).device, model.config
    lengths = [len(p) for p in prompts]
    if not prompts or min(lengths) == 0:
        raise InputError("a prompt is empty: nothing to continue")
    longest = max(lengths)                                       # S
    if longest + max_new_tokens > config.max_position_embeddings:
        raise InputError(f"a prompt of {longest} tokens and {max_new_tokens} new ones exceed the model's "
                         f"{config.max_position_embeddings} positions: shorten the prompt or --max-new-tokens")
    ids = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts], device=device)          # (B, S)
    valid = None
    if min(lengths) < longest:
        valid = torch.tensor([[False] * (longest - n) + [True] * n for n in lengths], device=device)  # (B, S)
    cache = KVCache(config, len(prompts), longest + max_new_tokens, device, model.model["embed_tokens"].weight.dtype)
    savings, tokens, calls = Savings(config), [[] for _ in prompts], []
    active = list(range(len(prompts)))                           # line 1: A, here the sequences not yet finished

    for _ in range(max_new_tokens):
        logits, trace = model(ids, valid=valid, cache=cache, policy=policy, compute=compute, logits="last")   # lines 2-13
        savings.add(trace)
        calls.append((active, trace.valid, torch.stack(trace.keep).float().mean(0)))                  # (B, S)
        ids = sample(logits, temperature, top_k, top_p, generator)[:, None]                           # line 16, (B, 1)
        new, valid = ids[:, 0].tolist(), None                    # the one host synchronisation of a step: who has finished
        for i, token in zip(active, new):
            tokens[i].append(token)
            if on_token is not None:
                on_token(i, token)
        going = [row for row, token in enumerate(new) if token not in eos_ids]
        if not going:
            break
        if len(going) < len(active):                             # line 14: once per step, not inside the layer loop
            rows = torch.tensor(going, device=device)
            cache.select(rows)
            ids, active = ids[rows], [active[row] for row in going]

    ran = [[] for _ in prompts]
    for members, real, share in calls:
        for i, r, s in zip(members, real.tolist(), share.tolist()):
            ran[i] += [x for x, ok in zip(s, r) if ok]
    return Generation(tokens, savings.report(), ran)


def pick_device(name=None, dtype="float32", tf32=False):
    """(torch.device, torch.dtype), said aloud with the reason. InputError for a device that is not there."""
    device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"--device {name}: torch sees no GPU here; leave --device out")
    reason = "asked for" if name else "a GPU is here" if device.type == "cuda" else "no GPU here"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    precision = f"{dtype}" + (" with TF32 products" if tf32 and device.type == "cuda" else "")
    print(f"device: {device} ({reason}), {precision}; gates and scores in float32", file=sys.stderr)
    return device, getattr(torch, dtype)
