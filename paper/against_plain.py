"""Ways of writing what plain decoding writes (speculative.py, layerskip.py), timed against it, in turns.

Decoding alone is timed: what was run is counted when the clock stands still, for plain decoding and for all ways.

Shapes: R rounds of timing.
"""
import sys
from pathlib import Path
from statistics import median
from time import perf_counter

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from console import InputError, pick_device
from flags import add_machine_flags, whole

import torch
from tqdm import tqdm

from data import load_examples
from generate import Sampling
from opened import open_with_items
from rows import KVCache
from savings import macs_of


def add_flags(p):
    """Those of every command that drafts."""
    add = p.add_argument
    add("--gammas", type=whole(1), nargs="+", default=[2, 4, 6], metavar="N", help="drafted tokens of a round")
    add("--data", default="arithmetic", help="arithmetic (its test problems), or a .jsonl or .parquet file")
    add("--limit", type=whole(1), default=20, help="the first N questions")
    add("--new-tokens", type=whole(3), default=48, help="of an answer, at most; the first is the prefill's, not timed")
    add("--repeats", type=whole(1), default=5, help="rounds of timing")
    add_machine_flags(p)


def open_prompts(args, check):
    """(the model of --model, lists of ids that ask --data's questions, ids that end an answer) as those flags say.

    check(model) raises InputError for a model that cannot draft so. InputError, too, for questions without room."""
    examples = load_examples(args.data, "test", args.limit)
    if isinstance(examples[0], str):
        raise InputError(f"--data {args.data} is plain text: give a file of questions")
    model, _, items, _ = open_with_items(args.model, examples, 0, None, *pick_device(args.device, args.dtype))
    check(model)
    prompts = [ids[:mask.index(True)] for ids, mask in items]
    room = model.config.max_position_embeddings - max(map(len, prompts), default=0)
    if not prompts or args.new_tokens > room:
        raise InputError(f"--new-tokens {args.new_tokens}: the longest prompt of --data leaves the model room for "
                         f"{room}")
    print(f"{args.model}: {len(prompts)} prompts, {args.repeats} rounds of timing, {torch.get_num_threads()} threads")
    return model, prompts, set(model.config.eos_ids)


@torch.no_grad()
def plain(model, prompt, new_tokens, eos_ids, sampling=Sampling()):
    """Full budget, token by token: (new ids, MACs, seconds); the prefill and its token are left out of the last two."""
    weight, ids, tokens, traces, times = model.model["embed_tokens"].weight, prompt, [], [], []
    cache = KVCache(model.config, 1, len(prompt) + new_tokens, weight.device, weight.dtype)
    while not tokens or tokens[-1] not in eos_ids and len(tokens) < new_tokens:
        logits, trace = model(torch.tensor([ids], device=weight.device), cache=cache, compute="compact", last=True)
        ids = [sampling.draw(logits).item()]                     # a host synchronisation: the token has come
        times.append(perf_counter())
        tokens += ids
        traces.append(trace)
    return tokens, int(sum(macs_of(model.config, trace) for trace in traces[1:])), times[-1] - times[0]


def compare(model, ways, prompts, new_tokens, eos_ids, repeats, sampling=Sampling()):
    """Print a table of ways against plain and return its rows, dicts. All take turns at each prompt, R = repeats times.

    ways: {(name, gamma): once}; once(prompt) -> (speculative.Speculation, MACs of its rounds), drawn as sampling says.
    The prefill and its token are left out. Times are ratios of medians; beside them the least and the greatest of a
    round. Sampled texts differ by chance: "same" is None. InputError where one of them has nothing to draft.
    """
    base, same = torch.zeros(repeats, 3, dtype=torch.float64), dict.fromkeys(ways, 0)        # tokens, MACs, seconds
    sums = {way: torch.zeros(repeats, 7, dtype=torch.float64) for way in ways}   # (R, 7), named where they are read
    for i in tqdm(range(repeats * len(prompts)), leave=False):
        turn, which = divmod(i, len(prompts))
        ids, macs, seconds = plain(model, prompts[which], new_tokens, eos_ids, sampling)
        base[turn] += torch.tensor([len(ids) - 1, macs, seconds], dtype=torch.float64)
        for way, once in ways.items():
            f, macs = once(prompts[which])
            same[way] += f.tokens == ids
            sums[way][turn] += torch.tensor([len(f.tokens) - 1, f.rounds, f.drafted, f.accepted, macs, f.drafting,
                                             f.verifying], dtype=torch.float64)
    if not all(turns[:, 0].all() for turns in (base, *sums.values())):
        raise InputError("in one round every answer ends at its first token, and nothing can be drafted: raise --limit")
    seconds, macs, rows = base[:, 2] / base[:, 0], (base[:, 1].sum() / base[:, 0].sum()).item(), []      # (R,)
    step = median(seconds.tolist())
    print(f"plain: {1000 * step:.2f} ms, {macs / 1e6:.2f} M multiply-accumulates (MACs) a token. Over plain, per token:"
          "\nMACs (always above 1: each token is verified), time. In plain steps: a draft step, a verifier's pass"
          "\ndraft         gamma accepted tokens/round passes/token  MACs  time (least-most)   step  pass  same texts")
    for (name, gamma), turns in sums.items():
        made, rounds, drafted, accepted, work = turns[:, :5].mean(0).tolist()    # of a round
        ours = turns[:, 5:].sum(1) / turns[:, 0]                                 # (R,) seconds per token
        rows.append({"draft": name, "gamma": gamma, "tokens": made, "acceptance": accepted / drafted,
                     "tokens_per_round": made / rounds, "passes_per_token": rounds / made, "macs": work / made / macs,
                     "plain_ms": 1000 * step, "time": median(ours.tolist()) / step,
                     "least": (ours / seconds).min().item(), "most": (ours / seconds).max().item(),
                     "step": median(turns[:, 5].tolist()) / drafted / step,
                     "pass": median(turns[:, 6].tolist()) / rounds / step,
                     "same": None if sampling.temperature else same[name, gamma], "of": repeats * len(prompts)})
        print("{draft:13} {gamma:5} {acceptance:8.1%} {tokens_per_round:12.2f} {passes_per_token:12.2f} {macs:5.2f} "
              "{time:5.2f} ({least:.2f}-{most:.2f}) {step:6.2f} {pass:5.2f}  ".format(**rows[-1])
              + ("-" if sampling.temperature else "{same} of {of}".format(**rows[-1])))
    return rows
