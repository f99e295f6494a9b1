"""Self-speculative decoding: the gated model drafts at a low budget, and itself at full budget verifies.

    python paper/speculative.py --model runs/demo --draft-budgets 0.8 0.7 --gammas 2 4 6 --out runs/speculative.json

Zhang et al. 2023 (Draft & Verify, arXiv 2309.08168) draft with some blocks left out. Here a drafted token skips what
its gates and frozen thresholds say (a quantile of the batch skips nothing in a single stream). A round, batch 1:

    1. draft gamma tokens at the draft budget, one step each, with K and V behind the verified ones;
    2. forget those K and V: they come from states that skipped;
    3. verify: one pass at full budget over the last token and the draft. Nobody skips, gates still multiply;
    4. keep the drafted tokens that stand, a of them, and one more from the verifier.

The text is what the model at full budget writes, token for token (greedy; up to ties that another order of summation
breaks), or distributed alike (sampling: arXiv 2211.17192). So accuracy stays, scores of given texts are not touched,
and multiply-accumulates only rise: over plain (gamma c + gamma + 1) / (E[a] + 1) > 1 for a draft of cost c > 0. What
may fall is time, where a pass over gamma + 1 tokens takes less than as many steps.
The GateSkip authors' code of that name drafts a whole answer with a fifth skipped, runs one full pass over it, and
returns the draft as it is. Read in: the abstract of 2309.08168, LayerSkip's and the authors' code.

Shapes: S sequence, V vocabulary, gamma drafted tokens of a round.
"""
import json
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from time import perf_counter

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from console import InputError, run
from flags import Parser, real, seed_number

import torch

from against_plain import add_flags, compare, open_prompts
from bench import rewind
from disk import write
from gates import check_budget
from generate import Sampling
from load_weights import model_digest
from opened import check_own
from rows import KVCache
from savings import macs_of
from thresholds import make_policy


def probabilities(logits, temperature):
    """What sampling draws from: (..., V) -> (..., V) float64."""
    return (logits.double() / temperature).softmax(-1)


def accept(draft, q, logits, temperature=0.0, generator=None):
    """How many of the drafted tokens stand, and the verifier's token behind them: (a, token), Python ints.

    draft: list of gamma ids; of none, the token is just drawn. q (gamma, V) float64: what each was drawn from, None if
    greedy. logits (gamma + 1, V): the verifier's at the draft's places and behind it. generator: on their device.
    Greedy (temperature 0): the draft stands as far as it is the verifier's argmax. Sampling: x stands with probability
    min(1, p(x) / q(x)), and in place of the first that falls one is drawn from max(p - q, 0), normalised: each token is
    then distributed as p, whatever q is (arXiv 2211.17192).
    """
    if temperature < 1e-4:                                       # as in generate.Sampling
        best, a = logits.argmax(-1).tolist(), 0                  # a host synchronisation
        while a < len(draft) and draft[a] == best[a]:
            a += 1
        return a, best[a]
    p, a = probabilities(logits, temperature), 0                 # (gamma + 1, V)
    left = p
    if draft:
        x = torch.tensor(draft, device=p.device)[:, None]        # (gamma, 1)
        u = torch.rand(x.shape, generator=generator, dtype=p.dtype, device=p.device)
        stands = u * q.gather(1, x) < p[:-1].gather(1, x)        # (gamma, 1): u < p / q
        a = int(stands.cumprod(0).sum())                         # a host synchronisation
        left = torch.cat([(p[:-1] - q).clamp(min=0), p[-1:]])    # (gamma + 1, V)
    left = torch.where(left[a].any(), left[a], p[a])             # nothing is left where p is q but for rounding
    return a, int(torch.multinomial(left, 1, generator=generator))


@dataclass
class Speculation:
    """What speculate returns. The first token is the prefill's; all others come from rounds."""
    tokens: list = field(default_factory=list)                   # new ids, the end token included
    rounds: int = 0
    drafted: int = 0
    accepted: int = 0                                            # of the drafted
    drafting: float = 0.0                                        # seconds, and those of verifying
    verifying: float = 0.0


@torch.no_grad()
def speculate(model, prompt, max_new_tokens, gamma, draft, verify, eos_ids=(), temperature=0.0, generator=None):
    """Continue a prompt (list of ids) by at most max_new_tokens: a Speculation.

    draft(cache, token, n) -> (at most n ids behind the token, q as of accept): may write behind what is cached.
    verify(cache, ids) -> logits behind each of the ids (S, V), or of a prompt the last alone: caches K and V of all.
    InputError for an empty prompt and for a length beyond the model's positions.
    """
    room, weight = len(prompt) + max_new_tokens, model.model["embed_tokens"].weight
    if not prompt or max_new_tokens < 1 or room > model.config.max_position_embeddings:
        raise InputError(f"a prompt of {len(prompt)} tokens and {max_new_tokens} new ones: give at least one of each, "
                         f"and no more than the model's {model.config.max_position_embeddings} positions")
    cache, found = KVCache(model.config, 1, room, weight.device, weight.dtype), Speculation()
    new = [accept([], None, verify(cache, prompt)[-1:], temperature, generator)[1]]
    while True:
        for token in new:
            found.tokens.append(token)
            if token in eos_ids or len(found.tokens) == max_new_tokens:
                return found                                     # an end token ends the text where it was drafted, too
        verified, started = cache.used, perf_counter()           # all tokens but the last
        guess, q = draft(cache, token, min(gamma, max_new_tokens - len(found.tokens) - 1))
        drafted = perf_counter()
        rewind(cache, verified)
        a, follows = accept(guess, q, verify(cache, [token, *guess]), temperature, generator)
        rewind(cache, verified + 1 + a)                          # K and V of tokens that fell go
        new = [*guess[:a], follows]
        found.rounds, found.drafted, found.accepted = found.rounds + 1, found.drafted + len(guess), found.accepted + a
        found.drafting += drafted - started
        found.verifying += perf_counter() - drafted


def draft_steps(model, policy, passes, eos_ids, cache, token, n, temperature=0.0, generator=None):
    """Up to n tokens under the policy, step by step, no further than an end token. ("draft", Trace) goes to passes."""
    draft, q = [], []
    while len(draft) < n and token not in eos_ids:
        ids = torch.tensor([[token]], device=cache.lengths.device)               # (1, 1)
        logits, trace = model(ids, cache=cache, policy=policy, compute="compact", last=True)     # (1, V)
        passes.append(("draft", trace))
        token = accept([], None, logits, temperature, generator)[1]
        draft.append(token)
        q += [probabilities(logits, temperature)] if temperature else []
    return draft, torch.cat(q) if q else None


def verify_pass(model, passes, cache, ids):
    """Logits at full budget behind each of the ids, of a prompt behind its last. To passes: "verify", "prompt"."""
    prompt = cache.used == 0
    ids = torch.tensor([ids], device=cache.lengths.device)                       # (1, S)
    logits, trace = model(ids, cache=cache, compute="compact", last=prompt)
    passes.append(("prompt" if prompt else "verify", trace))
    return logits.flatten(0, -2)                                                 # (S, V), or (1, V)


def one(model, policy, gamma, new_tokens, eos_ids, prompt, sampling=Sampling()):
    """Speculate: (Speculation, MACs of its rounds)."""
    passes, how = [], dict(temperature=sampling.temperature, generator=sampling.generator)
    found = speculate(model, prompt, new_tokens, gamma, partial(draft_steps, model, policy, passes, eos_ids, **how),
                      partial(verify_pass, model, passes), eos_ids, **how)
    return found, int(sum(macs_of(model.config, trace) for part, trace in passes if part != "prompt"))


def main(argv=None):
    p = Parser("Self-speculative decoding against plain decoding of the same model at full budget.")
    add = p.add_argument
    add("--model", required=True, metavar="RUN", help="a calibrated model with gates: folder, a run's --out, or hub id")
    add("--draft-budgets", type=check_budget, nargs="+", default=[0.8, 0.7], metavar="B", help="of the frozen table")
    add("--temperature", type=real(0.0), default=0.0, help="of both; 0 is greedy")
    add("--seed", type=seed_number, default=0, help="of sampling")
    add("--out", required=True, metavar="JSON", help="the file of the rows")
    add_flags(p)
    args = p.parse_args(argv)
    check_own("--out", args.out, "digest", "threads", "drafts")
    policies, n = {}, args.new_tokens

    def check(model):
        if "thresholds" not in model.config.gateskip:
            raise InputError(f"--model {args.model} has no gates with frozen thresholds: give a run that train.py "
                             "finished")
        policies.update({budget: make_policy(model.config, "frozen", budget) for budget in args.draft_budgets})

    model, prompts, eos = open_prompts(args, check)
    device = model.model["embed_tokens"].weight.device
    sampling = Sampling(args.temperature, generator=torch.Generator(device).manual_seed(args.seed))
    ways = {(f"budget {budget:g}", gamma): partial(one, model, policy, gamma, n, eos, sampling=sampling)
            for budget, policy in policies.items() for gamma in args.gammas}
    rows = compare(model, ways, prompts, n, eos, args.repeats, sampling)
    write(args.out, json.dumps({"command": " ".join(map(str, argv or sys.argv)), "digest": model_digest(model.source),
                                "threads": torch.get_num_threads(), "drafts": rows}, indent=1))
    print(f"written: {args.out}")
    return 0


if __name__ == "__main__":
    run(main)
