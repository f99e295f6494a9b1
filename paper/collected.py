"""What the figures of gates share: the mean gate of every (token, branch) of held-out texts, and the way to disk.

Real tokens only, never padding, and of each text all but the last token, which no pass of generation reads. A pass over
a finished text sees the gates that its generation saw: frozen thresholds look at nothing but the token's own score.

Shapes: B batch, S sequence, L layers, N tokens of all texts, one text after the other.
"""
import json
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from console import InputError, pick_device
from flags import Parser, add_machine_flags, whole

import torch

from branches import picture
from budgets import prompt_of
from data import collate
from disk import write, write_figure
from gates import check_budget
from generate import generate
from load_weights import model_digest
from opened import check_own, open_with_items
from thresholds import chunks, make_policy
from tokens import pieces


@dataclass
class Collected:
    """Of all texts that a model read."""
    scores: torch.Tensor        # (2L, N) float64: a token's mean gate at attn 0, mlp 0, attn 1, ...
    kept: torch.Tensor          # (2L, N) bool: the branch ran for the token
    ids: torch.Tensor           # (N,) int64: its vocabulary id
    positions: torch.Tensor     # (N,) int64: its place in its own text; 0 is the BOS, or without one the first token
    answer: torch.Tensor        # (N,) bool: of the answer, not of the prompt


@torch.no_grad()
def collect(model, texts, policy=None):
    """texts: a list of (ids, answer: bools), equally long -> Collected."""
    device, parts = next(model.parameters()).device, []
    for chunk in chunks(texts, length=lambda text: len(text[0])):
        ids, answer, valid = collate(chunk)                      # (B, S) each
        trace = model(ids.to(device), valid=valid.to(device), policy=policy, compute="compact", last=True)[1]
        scores, kept = (torch.stack(x).cpu() for x in (trace.scores, trace.keep))                # (2L, B, S) each
        positions = torch.arange(ids.shape[1]).expand_as(ids)
        parts.append([x[..., valid] for x in (scores.double(), kept, ids, positions, answer)])
    return Collected(*(torch.cat(x, -1) for x in zip(*parts)))


def figure_flags(what, limit=200, of="problems"):
    p = Parser(what)
    add = p.add_argument
    add("--model", required=True, help="a gated model: folder, a run's --out, or hub id")
    add("--data", default="arithmetic", help="arithmetic (its test problems), or a .jsonl, .parquet or .txt file")
    add("--limit", type=whole(1), default=limit, help=f"the first N {of}")
    add("--answers", choices=("gold", "generated"), default="gold", help="which the model reads behind the prompts")
    add("--max-new-tokens", type=whole(1), default=96, help="of a generated answer")
    add("--budget", type=check_budget, default=1.0, help="below 1: under the model's frozen thresholds")
    add("--out", type=picture, required=True, metavar="PNG", help="the numbers go beside it, as .json")
    add_machine_flags(p)
    return p


def parsed(p, argv, key):
    """The flags. InputError where the JSON beside --out is not a figure's own, which has its numbers under this key."""
    args = p.parse_args(argv)
    check_own("--out", args.out and Path(args.out).with_suffix(".json"), "command", key)
    return args


def read_texts(args, examples):
    """(model, tokenizer, policy, texts as collect takes them) of the flags. Of plain text all is prompt."""
    device, dtype = pick_device(args.device, args.dtype)
    model, tokenizer, items, _ = open_with_items(args.model, examples, 0, device=device, dtype=dtype)
    if model.config.gate is None:
        raise InputError(f"--model {args.model} has no gates: give a model that was trained with them")
    if args.budget < 1.0 and "thresholds" not in model.config.gateskip:
        raise InputError(f"--budget {args.budget}: {args.model} is not calibrated: leave it out")
    policy, plain = make_policy(model.config, "frozen", args.budget, device=device), isinstance(examples[0], str)
    if args.answers == "gold":
        texts = [(ids[:-1], [mine and not plain for mine in mask[:-1]]) for ids, mask in items]
    elif plain:
        raise InputError("--answers generated: plain text has no questions to answer")
    else:
        texts, prompts = [], [prompt_of(item) for item in items]
        for chunk in chunks(prompts, length=lambda prompt: len(prompt) + args.max_new_tokens):
            made = generate(model, chunk, args.max_new_tokens, policy, set(model.config.eos_ids)).tokens
            texts += [(a + b[:-1], [False] * len(a) + [True] * (len(b) - 1)) for a, b in zip(chunk, made)]
    return model, tokenizer, policy, texts


def visible(text):
    """A token's text as a label: blanks and line ends are seen, and "$" is no formula to matplotlib."""
    shown = text.replace(" ", "␣").replace("\n", "↵").replace("\t", "⇥")
    return "".join(c if c.isprintable() else "�" for c in shown).replace("$", r"\$")


def spelled(tokenizer, token):
    """What a vocabulary id adds to a text, with its space in front: alone some tokenizers would lose it."""
    return pieces(tokenizer, [token, token])[1] or tokenizer.id_to_token(token)


def keep(args, figure, model, **numbers):
    """Write the numbers, and the picture."""
    head = {"command": " ".join(["python", *sys.argv]), **vars(args), "digest": model_digest(model.source)}
    write(Path(args.out).with_suffix(".json"), json.dumps(head | numbers, indent=1, ensure_ascii=False))
    write_figure(args.out, figure)
    print(f"written: {args.out}, and the numbers beside it")
