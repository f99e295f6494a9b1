"""Algorithm 2: batched decoding that really skips, and a command line that shows what was skipped.

    python generate.py --model runs/demo --question "Tom has 31 red pens and 4 blue pens. ..." --budget 0.85 --show-compute

Prompts of unequal length are left-padded; finished sequences leave the computation.
"""
import argparse
import math
import os
import re
import sys
import time
from dataclasses import dataclass

import torch

from data import prompt_text
from gates import GRANULARITIES, InputError, Savings, SkipPolicy, check_budget, thresholds_at
from load_weights import chat_template, check_fit, load_model, load_tokenizer
from model import KVCache


@dataclass
class Generation:
    """What generate returns, in the order of the prompts."""
    tokens: list        # per prompt the new token ids, the end token included
    savings: dict       # skipped, skipped_per_call, macs_saved, ... (gates.Savings.report)
    ran: list           # per prompt the share of branches that ran, for each prompt token and each new one but the last


def sample(logits, temperature=0.0, top_k=0, top_p=1.0, generator=None):
    """Next token ids (B,) from logits (B, V). temperature 0 is greedy; top_k 0 and top_p 1 are off."""
    if temperature < 1e-4:                                       # the quotient would overflow; greedy is its limit
        return logits.argmax(-1)
    ordered, order = (logits.float() / temperature).sort(dim=-1, descending=True)        # (B, V)
    if top_k:
        ordered[:, top_k:] = -torch.inf
    p = ordered.softmax(-1)
    p = torch.where(p.cumsum(-1) - p < top_p, p, 0.0)            # drop what comes after the first top_p of the mass
    return order.gather(-1, torch.multinomial(p, 1, generator=generator))[:, 0]


@torch.no_grad()
def generate(model, prompts, max_new_tokens, policy=None, eos_ids=(), temperature=0.0, top_k=0, top_p=1.0,
             generator=None, compute="compact", on_token=None):
    """Continue every prompt (a list of token ids) by at most max_new_tokens; returns a Generation.

    on_token(i, id) is called for each new token of prompt i as it comes. InputError for an empty prompt, and for a
    length beyond the model's positions.
    """
    device, config, lengths = next(model.parameters()).device, model.config, [len(p) for p in prompts]
    if not prompts or min(lengths) == 0:
        raise InputError("a prompt is empty: there is nothing to continue")
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
    longest = max(lengths)                                       # S
    if longest + max_new_tokens > config.max_position_embeddings:
        raise InputError(f"a prompt of {longest} tokens and {max_new_tokens} new ones exceed the model's "
                         f"{config.max_position_embeddings} positions: shorten the prompt or --max-new-tokens")
    ids = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts], device=device)          # (B, S)
    valid = None                                                 # left padding is not valid
    if min(lengths) < longest:
        valid = torch.tensor([[False] * (longest - n) + [True] * n for n in lengths], device=device)  # (B, S)
    cache = KVCache(config, len(prompts), longest + max_new_tokens, device, model.model["embed_tokens"].weight.dtype)
    savings, tokens, calls = Savings(config), [[] for _ in prompts], []
    active = list(range(len(prompts)))                           # line 1: A, the sequences that go on

    for _ in range(max_new_tokens):
        logits, trace = model(ids, valid=valid, cache=cache, policy=policy, compute=compute, logits="last")   # lines 2-13
        savings.add(trace)
        calls.append((active, trace.valid, torch.stack(trace.keep).float().mean(0)))                  # (B, S)
        ids, valid = sample(logits, temperature, top_k, top_p, generator)[:, None], None              # line 16: (B, 1)
        new = ids[:, 0].tolist()                                 # the one host synchronisation of a step: who has finished
        for i, token in zip(active, new):
            tokens[i].append(token)
            if on_token is not None:
                on_token(i, token)
        going = [row for row, token in enumerate(new) if token not in eos_ids]
        if not going:
            break
        if len(going) < len(active):                             # line 14, once per step: printed inside the layer loop,
            rows = torch.tensor(going, device=device)            # where it can mean nothing
            cache.select(rows)
            ids, active = ids[rows], [active[row] for row in going]

    ran = [[] for _ in prompts]
    for members, real, share in calls:
        for i, r, s in zip(members, real.tolist(), share.tolist()):
            ran[i] += [x for x, ok in zip(s, r) if ok]
    return Generation(tokens, savings.report(), ran)


def make_policy(config, kind, budget, skip=None, kv=None, seed=0, device="cpu"):
    """The SkipPolicy for a loaded model. kind "auto": frozen where the model is calibrated, else batch.

    skip and kv default to what the model was trained with. InputError for a calibration made under other settings and
    for a policy that needs gates where there are none; one line on stderr where a choice may surprise.
    """
    stored, budget = config.gateskip, check_budget(budget)
    skip, kv = skip or stored.get("skip", "all"), kv or stored.get("kv", "copy_up")
    if budget >= 1.0 or kind == "none":
        return SkipPolicy("none", 1.0, skip, kv)
    if kind == "random":
        return SkipPolicy("random", budget, skip, kv, generator=torch.Generator(device).manual_seed(seed))
    if config.gate is None:
        raise InputError(f"--budget {budget}: this model has no gates to decide what to skip; train some with train.py, or use --policy random")
    if kind == "auto":
        kind = "frozen" if "thresholds" in stored else "batch"
        if kind == "batch":
            print("no calibration in this model: using the quantile of each batch, which skips nothing in a decoding step of a single stream", file=sys.stderr)
    if kind == "frozen":
        if "thresholds" not in stored:
            raise InputError("--policy frozen: this model is not calibrated (train.py does it at its end); use --policy batch")
        if (skip, kv) != (stored["skip"], stored["kv"]):
            raise InputError(f"the thresholds were calibrated with --skip {stored['skip']} --kv {stored['kv']}, not --skip {skip} --kv {kv}: "
                             f"other settings need a calibration of their own")
    thresholds = thresholds_at(stored["thresholds"], budget) if kind == "frozen" else None
    if thresholds and all(abs(float(known) - budget) > 1e-4 for known in stored["thresholds"]):
        print(f"budget {budget} is not among the calibrated ({', '.join(stored['thresholds'])}): thresholds interpolated, less may be skipped "
              f"than asked", file=sys.stderr)
    if budget < stored.get("budget_end", 0.0) - 1e-9:
        print(f"warning: budget {budget} is below {stored['budget_end']}, the lowest this model was trained for", file=sys.stderr)
    return SkipPolicy(kind, budget, skip, kv, thresholds=thresholds)


def seed_number(text):
    """The type of --seed: what every random generator here takes."""
    value = int(text)
    if not 0 <= value < 2 ** 63:
        raise ValueError
    return value


def pick_device(name=None, dtype="float32", tf32=False):
    """(torch.device, torch.dtype), said aloud with the reason. InputError for a device that is not there."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise InputError(f"--device {name} is no device that torch knows: cpu, cuda, cuda:1, ...") from None
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"--device {name}: the thresholds need float64, which only cpu and cuda have been tried with")
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise InputError(f"--device {name}: torch sees no such GPU here; leave --device out")
    reason = "asked for" if name else "a GPU is here" if device.type == "cuda" else "no GPU here"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    exactly = "TF32 products" if tf32 else "no TF32" if device.type == "cuda" else "as on disk or cast to it"
    print(f"device: {device} ({reason}); {dtype} ({exactly}); gates and scores in float32", file=sys.stderr)
    return device, getattr(torch, dtype)


def pyplot():
    """matplotlib.pyplot, drawing to files; None, and one line that says so, where it is not installed."""
    try:
        import matplotlib
    except ImportError:
        print("no picture: matplotlib is not installed (pip install matplotlib)")
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    return plt


def savings_line(saved, compute="compact"):
    """The three numbers, never one alone."""
    label = "" if compute == "compact" else " if run compact"
    return (f"skipped {saved['skipped']:.1%} of (token, branch) pairs, {saved['skipped_per_call']:.1%} averaged per call; "
            f"MACs saved{label} {saved['macs_saved']:+.1%}, gates paid")


# ---------------------------------------------------------------------------------------------------------------------
# What was skipped, to look at
# ---------------------------------------------------------------------------------------------------------------------

LEVELS = (0.6, 0.7, 0.8, 0.9)                                    # borders between five shades
COLOURS, GLYPHS = (236, 239, 242, 246, 251), "·░▒▓█"             # a terminal's background greys; marks where there is none


def shade(pieces, shares, colour):
    """Text in which each piece shows the share of branches that ran for it. pieces: strings; shares: floats, may be fewer."""
    out = ""
    for i, piece in enumerate(pieces):
        if i >= len(shares):
            out += piece
            continue
        level = sum(shares[i] >= border for border in LEVELS)
        lines = piece.split("\n")                                # a background must not run on to the line's end
        text = f"\033[48;5;{COLOURS[level]};38;5;{232 if level > 2 else 255}m{lines[0]}\033[0m" if colour else lines[0] + GLYPHS[level]
        out += "\n".join([text, *lines[1:]])
    return out


def legend(colour):
    names = ["under 60%", "60%", "70%", "80%", "90% and more"]
    marks = shade([f" {n} " for n in names], [0.5, 0.6, 0.7, 0.8, 0.9], colour)
    return f"share of the branches that ran for a token{'' if colour else ' (the mark behind it)'}: {marks}"


def main(argv=None):
    p = argparse.ArgumentParser(description="Generate with token-wise skipping (Algorithm 2).",
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = p.add_argument
    add("--model", default="runs/demo", help="folder, a run's --out, or hub id")
    add("--prompt", action="append", default=[], help="text to continue; may be given several times")
    add("--question", action="append", default=[], help="a question, put into the training template; may be given several times")
    add("--chat", action="store_true", help="put each prompt into the model's own chat template")
    add("--budget", type=float, help="share of tokens a branch keeps, in (0, 1]; default 0.85 with gates, 1 without")
    add("--policy", choices=("auto", "frozen", "batch", "random", "topk", "none"), default="auto", help="auto: frozen if calibrated, else batch")
    add("--skip", choices=GRANULARITIES, help="default: as trained")
    add("--kv", choices=("copy_up", "dense"), help="default: as trained")
    add("--compute", choices=("compact", "masked"), default="compact", help="run kept rows only, or every row (the oracle)")
    add("--max-new-tokens", type=int, default=128)
    add("--temperature", type=float, default=0.0, help="0 is greedy")
    add("--top-k", type=int, default=0, help="0 is off")
    add("--top-p", type=float, default=1.0, help="1 is off")
    add("--seed", type=seed_number, default=0)
    add("--show-compute", action="store_true", help="shade every token by the share of branches that ran for it")
    add("--device", help="default: cuda if there is one, else cpu")
    add("--dtype", choices=("float32", "bfloat16"), default="float32")
    args = p.parse_args(argv)
    if not args.prompt and not args.question:
        raise InputError("nothing to do: give --prompt TEXT or --question TEXT")
    if args.max_new_tokens < 1 or not 0 <= args.temperature < math.inf or args.top_k < 0 or not 0 < args.top_p <= 1:
        raise InputError("--max-new-tokens must be at least 1, --temperature and --top-k at least 0, --top-p in (0, 1]")
    if args.budget is not None:
        check_budget(args.budget)
    if any(re.search("[\ud800-\udfff]", text) for text in args.prompt + args.question):
        raise InputError("a --prompt or --question is not UTF-8 text")

    device, dtype = pick_device(args.device, args.dtype)
    model, tokenizer = load_model(args.model, device=device, dtype=dtype), load_tokenizer(args.model)
    check_fit(model, tokenizer)
    budget = args.budget if args.budget is not None else 0.85 if model.config.gate is not None else 1.0
    policy = make_policy(model.config, args.policy, budget, args.skip, args.kv, args.seed, device)
    if args.chat:
        texts = [chat_template(model, [{"role": "user", "content": t}]) for t in args.prompt + args.question]
    else:
        texts = args.prompt + [prompt_text(q) for q in args.question]
    prompts = [tokenizer.encode(t, add_special_tokens=not args.chat).ids for t in texts]    # a chat template brings its own

    stream, streamed, shown = len(prompts) == 1 and not args.show_compute, [], [""]

    def on_token(i, token):
        text = tokenizer.decode(streamed + [token])
        streamed.append(token)
        if not text.endswith("\ufffd"):                          # half a character waits for its other half
            print(text[len(shown[0]):], end="", flush=True)
            shown[0] = text

    if stream:
        print(texts[0], end="", flush=True)
    started = time.perf_counter()
    draw = torch.Generator(device).manual_seed(args.seed)
    result = generate(model, prompts, args.max_new_tokens, policy, set(model.config.eos_ids), args.temperature,
                      args.top_k, args.top_p, draw, args.compute, on_token if stream else None)
    seconds = time.perf_counter() - started

    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    for i, (prompt, new) in enumerate(zip(prompts, result.tokens)):
        if args.show_compute:
            if len(prompts) > 1:
                print(f"--- {i + 1}")
            pieces = [tokenizer.decode([t], skip_special_tokens=False) for t in prompt + new]
            print(shade(pieces, result.ran[i], colour))
        elif not stream:
            print(f"--- {i + 1}\n{texts[i]}{tokenizer.decode(new)}")
    if stream:
        print(tokenizer.decode(result.tokens[0])[len(shown[0]):])   # what was still waiting
    count = sum(map(len, result.tokens))
    print(f"\n{legend(colour)}" if args.show_compute else "")
    print(f"{policy.kind}, budget {budget}: {savings_line(result.savings, args.compute)}")
    print(f"{count} tokens in {seconds:.2f} s, {count / seconds:.1f} tokens/s", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")                     # a terminal without these characters
    try:
        sys.exit(main())
    except (InputError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
