"""Algorithm 2: batched decoding that really skips, and a command line that shows what was skipped.

    python generate.py --model runs/demo --budget 0.6 --show-compute --question "Tom has 31 red pens and 4 ..."

Prompts of unequal length are left-padded; finished sequences leave the computation.
"""
import os
import re
import sys
import time
from dataclasses import dataclass

from console import InputError, pick_device, run
from flags import Parser, add_machine_flags, real, seed_number, whole

import torch

from branches import SHOW_BRANCHES, parts_of, show
from data import prompt_text
from gates import GRANULARITIES, KV_OF_SKIPPED, check_budget
from load_weights import check_fit, load_model, load_tokenizer
from rows import KVCache
from savings import Savings, savings_line
from skip_map import page, run_of, write_page
from thresholds import make_policy
from tokens import chat_template, continuation, encode, pieces


@dataclass
class Sampling:
    """How the next token is drawn. The default is greedy."""
    temperature: float = 0.0        # 0: the most likely one
    top_k: int = 0                  # only the k most likely; 0: all
    top_p: float = 1.0              # only the first of them that hold this share of the probability
    generator: torch.Generator = None

    def draw(self, logits):
        """Next token ids (B,) from logits (B, V)."""
        if self.temperature < 1e-4:                              # the quotient would overflow; greedy is its limit
            return logits.argmax(-1)
        ordered, order = (logits.float() / self.temperature).sort(dim=-1, descending=True)       # (B, V)
        if self.top_k:
            ordered[:, self.top_k:] = -torch.inf
        p = ordered.softmax(-1)
        top_p = max(self.top_p, 1e-30)                           # less may be 0 in float32, and nobody would be left
        p = torch.where(p.cumsum(-1) - p < top_p, p, 0.0)        # drop what comes after the first top_p of the mass
        return order.gather(-1, torch.multinomial(p, 1, generator=self.generator))[:, 0]


@dataclass
class Generation:
    """What generate returns, in the order of the prompts."""
    tokens: list        # per prompt the new token ids, the end token included
    savings: Savings    # with the parts "prompt" and "answer": what prompt tokens and what generated tokens skipped
    ran: list           # per prompt the share of branches that ran, for each prompt token and each new one but the last


@torch.no_grad()
def generate(model, prompts, max_new_tokens, policy=None, eos_ids=(), sampling=Sampling(), compute="compact",
             on_token=None, on_pass=None):
    """Algorithm 2. Continue every prompt (a list of token ids) by at most max_new_tokens; returns a Generation.

    on_token(i, id) is called for each new token of prompt i as it comes, and on_pass(trace) after each pass with its
    model.Trace. Where on_token returns True prompt i ends, as behind an end token. InputError for an empty prompt, and
    for a length beyond the model's positions.
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
    active = list(range(len(prompts)))                           # A2 line 1: A, the sequences that go on

    for step in range(max_new_tokens):
        # A2: h_0 of line 1, and lines 2-13
        logits, trace = model(ids, valid=valid, cache=cache, policy=policy, compute=compute, last=True)
        savings.add(trace, "answer" if step else "prompt")
        if on_pass is not None:
            on_pass(trace)
        calls.append((active, trace.valid, torch.stack(trace.keep).float().mean(0)))                  # (B, S)
        ids, valid = sampling.draw(logits)[:, None], None        # A2 line 16: (B, 1)
        new = ids[:, 0].tolist()                                 # a host synchronisation; compact has one a branch too
        stopped = set()
        for i, token in zip(active, new):
            tokens[i].append(token)
            if on_token is not None and on_token(i, token):
                stopped.add(i)
        going = [row for row, token in enumerate(new) if token not in eos_ids and active[row] not in stopped]
        if not going:
            break
        # A2 line 14, once a step: printed before line 15, inside the loop over layers, where no token is out yet
        if len(going) < len(active):
            rows = torch.tensor(going, device=device)
            cache.select(rows)
            ids, active = ids[rows], [active[row] for row in going]

    ran = [[] for _ in prompts]
    for members, real_token, share in calls:
        for i, r, s in zip(members, real_token.tolist(), share.tolist()):
            ran[i] += [x for x, ok in zip(s, r) if ok]
    return Generation(tokens, savings, ran)


# ---------------------------------------------------------------------------------------------------------------------
# What was skipped, to look at
# ---------------------------------------------------------------------------------------------------------------------

LEVELS = (0.6, 0.7, 0.8, 0.9)                                    # borders between five shades
COLOURS, GLYPHS = (236, 239, 242, 246, 251), "▁░▒▓█"             # background greys; marks where there is no colour


def shade(pieces, shares, colour):
    """Text in which each piece shows the share of branches that ran for it. pieces: strings; shares: may be fewer."""
    out = ""
    for i, piece in enumerate(pieces):
        if i >= len(shares):
            out += piece
            continue
        level = sum(shares[i] >= border for border in LEVELS)
        first, *others = piece.split("\n")                       # a background must not run on to the line's end
        if colour:
            first = f"\033[48;5;{COLOURS[level]};38;5;{232 if level > 2 else 255}m{first}\033[0m"
        else:
            first += GLYPHS[level]
        out += "\n".join([first, *others])
    return out


def legend(colour):
    names = ["under 60%", "60%", "70%", "80%", "90% and more"]
    marks = shade([f" {n} " for n in names], [0.5, 0.6, 0.7, 0.8, 0.9], colour)
    return f"share of the branches that ran for a token{'' if colour else ' (the mark behind it)'}: {marks}"


class Stream:
    """Prints what follows the prompt's ids as its tokens come; half a character waits for its other half."""

    def __init__(self, tokenizer, prompt):
        self.tokenizer, self.prompt, self.ids, self.shown = tokenizer, prompt, [], ""

    def add(self, _, token):
        self.ids.append(token)
        text = continuation(self.tokenizer, self.prompt, self.ids)
        if not text.endswith("\ufffd"):
            print(text[len(self.shown):], end="", flush=True)
            self.shown = text

    def end(self):
        print(continuation(self.tokenizer, self.prompt, self.ids)[len(self.shown):])


def parse_args(argv):
    p = Parser("Generate with token-wise skipping (Algorithm 2).")
    add = p.add_argument
    add("--model", default="runs/demo", help="folder, a run's --out, or hub id")
    asked = dict(dest="asked", action="append", default=[], metavar="TEXT")      # both flags, in the order given
    add("--prompt", type=lambda text: ("prompt", text), **asked, help="text to continue; may be given several times")
    add("--question", type=lambda text: ("question", text), **asked,
        help="a question, put into the training template; may be given several times")
    add("--chat", action="store_true", help="put each of them into the model's own chat template instead")
    one_or_many = p.add_mutually_exclusive_group()
    one_or_many.add_argument(
        "--budget", type=check_budget,
        help="share of tokens a branch keeps, or of work that runs; default: of those calibrated the nearest to 0.85")
    one_or_many.add_argument("--budgets", type=check_budget, nargs="+", metavar="B",
                             help="with --html: generate at each of them, in the order of its slider")
    add("--policy", choices=("auto", "frozen", "batch", "random", "topk", "none"), default="auto",
        help="auto: frozen if calibrated, else batch")
    add("--skip", choices=GRANULARITIES, help="default: as trained")
    add("--kv", choices=KV_OF_SKIPPED, help="default: as trained")
    add("--compute", choices=("compact", "masked"), default="compact", help="run kept rows only, or every row")
    add("--max-new-tokens", type=whole(1), default=128, help="of each text")
    add("--temperature", type=real(0.0), default=0.0, help="0 is greedy")
    add("--top-k", type=whole(0), default=0, help="0 is off")
    add("--top-p", type=real(0.0, 1.0, above=True), default=1.0, help="1 is off")
    add("--seed", type=seed_number, default=0, help="of sampling and of random skipping")
    add("--show-compute", action="store_true", help="shade every token by the share of branches that ran for it")
    add("--show-branches", **SHOW_BRANCHES)
    add("--html", type=page, metavar="FILE", help="draw what was skipped into this web page; for one text")
    add_machine_flags(p)
    args = p.parse_args(argv)
    if not args.asked:
        raise InputError("nothing to do: give --prompt TEXT or --question TEXT")
    for flag, text in args.asked:
        if re.search("[\ud800-\udfff]", text):
            raise InputError(f"a --{flag} is not UTF-8 text")
    if args.html and len(args.asked) > 1:
        raise InputError(f"--html {args.html} shows one text: give one --prompt or --question")
    if args.budgets and not args.html:
        raise InputError("--budgets is for --html FILE: give that too, or one --budget")
    return args


def main(argv=None):
    args = parse_args(argv)
    device, dtype = pick_device(args.device, args.dtype)
    model, tokenizer = load_model(args.model, device=device, dtype=dtype), load_tokenizer(args.model)
    check_fit(model, tokenizer)
    known = [b for b in map(float, model.config.gateskip.get("thresholds", ())) if b < 1.0] or (
        [1.0] if "thresholds" in model.config.gateskip else [0.85])
    default = min(known, key=lambda b: abs(b - 0.85)) if model.config.gate is not None else 1.0
    policies = [make_policy(model.config, args.policy, budget, args.skip, args.kv, args.seed, device)
                for budget in args.budgets or [args.budget or default]]
    policies = list({policy.budget: policy for policy in policies}.values())     # each once; of "none" there is but one
    if args.chat:
        texts = [chat_template(model, [{"role": "user", "content": text}]) for _, text in args.asked]
    else:
        texts = [prompt_text(text) if flag == "question" else text for flag, text in args.asked]
    prompts = [encode(tokenizer, text, front=not args.chat) for text in texts]   # a chat template brings its own BOS

    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    branches, maps = {}, []                                      # {budget: parts of each branch}, a skip map per budget
    for policy in policies:
        stream, traces = Stream(tokenizer, prompts[0]) if len(prompts) == 1 and not args.show_compute else None, []
        if len(policies) > 1:
            print(f"--- budget {policy.budget:g}")
        if stream:
            print(texts[0], end="", flush=True)
        started = time.perf_counter()
        draw = Sampling(args.temperature, args.top_k, args.top_p, torch.Generator(device).manual_seed(args.seed))
        result = generate(model, prompts, args.max_new_tokens, policy, eos_ids=set(model.config.eos_ids), sampling=draw,
                          compute=args.compute, on_token=stream and stream.add, on_pass=args.html and traces.append)
        seconds = time.perf_counter() - started

        if stream:
            stream.end()
        for i, (prompt, new) in enumerate(zip(prompts, result.tokens) if not stream else ()):
            if len(prompts) > 1:
                print(f"--- {i + 1}")
            if args.show_compute:
                print(shade(pieces(tokenizer, prompt + new), result.ran[i], colour))
            else:
                print(f"{texts[i]}{continuation(tokenizer, prompt, new)}")
        count = sum(map(len, result.tokens))
        print(f"\n{legend(colour)}" if args.show_compute else "")
        report = result.savings.report()
        saved = f"{policy.kind}, budget {policy.budget}: {savings_line(report, args.compute)}"
        print(saved)
        branches[policy.budget] = parts_of(report)
        if args.html:
            tokens = pieces(tokenizer, prompts[0] + result.tokens[0])
            maps.append(run_of(model.config, policy, traces, tokens, len(prompts[0]), saved))
        print(f"{count} tokens in {seconds:.2f} s, {count / seconds:.1f} tokens/s", file=sys.stderr)
    if args.show_branches is not None:
        show(min(policies, key=lambda policy: policy.budget).kind, branches, args.show_branches)
    if args.html:
        write_page(args.html, args.model, maps)
        print(f"written: {args.html}")
    return 0


if __name__ == "__main__":
    run(main, out_of_memory="give fewer prompts at a time, or a lower --max-new-tokens")
