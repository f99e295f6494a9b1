"""LayerSkip (Elhoushi et al. 2024, arXiv 2404.16710): any prefix of the blocks learns to predict; then all tokens exit
after block E, or the blocks below E draft and those above verify.

    python paper/layerskip.py --model runs/study/LayerSkip-s4 --exit 4 --gammas 2 4 6 --data arithmetic --limit 20

Training: samples pass whole blocks by, the upper ones more often (layer dropout), and several states are predicted from
through the one final norm and head (early-exit loss); a curriculum says which. Self-speculation: the draft's K and V,
and its states at E, are the verifier's own, so that no block runs twice.
Read in: the abstract, a review of the paper, torchtune (its exits weigh otherwise than the paper's, which are here),
LayerSkip's generator. Dropout that grows over the steps is for pre-training: not here. The GateSkip authors trained two
exits alike (6 and 16 of 16 blocks), no curriculum; their dropout acts only where all tokens drop at once; all exit
after 6 at every budget; their self-speculation returns what block 6 drafts, unverified.

Shapes: B batch, S sequence, H hidden, V vocabulary, L blocks, N answer positions of a training step.
"""
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from console import InputError, run
from flags import Parser, whole

import torch
from torch import nn

from against_plain import add_flags, compare, open_prompts
from bench import rewind
from early_exit import EarlyExit, through, training, unembed
from model import Model
from savings import count_macs
from speculative import accept, probabilities, speculate


def dropout_scale(layer, layers):
    """D(l) = exp(l ln 2 / (L - 1)) - 1: 0 in the first block, 1 in the last."""
    return 2 ** (layer / max(layers - 1, 1)) - 1


def loss_weights(layers, step, steps, e_scale=1.0, rotation=None):
    """What the exit after each block weighs at a step (from 0): L floats that sum to 1, 0 for those that are off.

    rotation R: a block is on once in R steps; None: the upper first, all from the middle on; the last always."""
    last = layers - 1
    on = [layer == last or ((layer - step) % rotation == 0 if rotation else
                            2 * layers * step >= (layers - layer) * steps) for layer in range(layers)]
    e = [e_scale * layer * (layer + 1) / 2 for layer in range(last)]             # 0 + 1 + ... + l: 0 in the first
    e.append(max(last, 1) + e_scale * (last - 1) * last / 2)                     # max: a single block has its loss, too
    e = [x * is_on for x, is_on in zip(e, on)]
    return [x / sum(e) for x in e]


class LayerSkip(EarlyExit):
    """The model in training. The paper fine-tunes with p_max 0.1 to 0.2, e_scale 1, R = 16 or gradual."""
    p_max, e_scale, rotation = 0.1, 1.0, None                    # gradual; the tests alone rotate

    def sits_out(self, layer, valid):
        """Each sample by itself passes block l by with probability D(l) p_max: (B, S) bool, the same in a row."""
        p = self.p_max * dropout_scale(layer, self.config.num_hidden_layers)
        if not self.training or not p:
            return None
        return (torch.rand(len(valid), 1) < p).to(valid.device).expand_as(valid) # the host's: a resumed run goes on


def exits_loss(model, targets):
    """The cross-entropies at the exits that are on, weighted; each is summed over the targets (N,). A scalar."""
    weights = loss_weights(model.config.num_hidden_layers, model.step, model.steps, model.e_scale, model.rotation)
    logits = lambda h: unembed(model, h.flatten(0, 1)[model.places])             # (B, S, H) -> (N, V)
    return sum(w * nn.functional.cross_entropy(logits(h), targets, reduction="sum")
               for w, h in zip(weights, model.states[1:]) if w)


recipe = partial(training, exits_loss, LayerSkip)                # recipe(p_max=0.2): a context for train.py --gate none


class ExitAt(Model):
    """The lower blocks of a model, whose savings count against all L: made by exit_at."""

    def forward(self, *args, **how):
        """As the core's, but that the policy is left alone. Above, the cache stays empty and no K and V is counted."""
        logits, trace = super().forward(*args, **how | {"policy": None})
        trace.keep += [torch.zeros_like(trace.valid)] * (2 * self.config.num_hidden_layers - len(trace.keep))
        return logits, trace


def check_exit(config, exit):
    """InputError for an exit that is not there, and for a model with gates, which would not be asked."""
    if config.gate is not None or not 1 <= exit <= config.num_hidden_layers:
        raise InputError(f"--exit {exit}: give 1 to {config.num_hidden_layers}, and a --model without gates")


def exit_at(model, exit):
    """A model that leaves after block `exit`, 1 ... L, and shares the weights. InputError as check_exit."""
    check_exit(model.config, exit)
    with torch.device("meta"):
        short = ExitAt(model.config)
    short.model = nn.ModuleDict({**model.model, "layers": model.model["layers"][:exit]})
    short.lm_head = model.lm_head
    return short.eval()


def exits(model):
    """{share of blocks saved: model} of all exits, 1 - E / L for E = 1 ... L. Nothing lies between them."""
    layers = model.config.num_hidden_layers
    return {1 - exit / layers: exit_at(model, exit) for exit in range(1, layers + 1)}


def pass_through(model, blocks, cache, ids, h=None):
    """(1, S, H): h, or the embeddings of S ids, after these blocks; K and V are cached from cache.used on."""
    h_0, call = model.begin(torch.tensor([ids], device=cache.lengths.device), cache=cache)
    return through(blocks, h_0 if h is None else h, call)[0]


def self_speculate(model, exit, gamma, new_tokens, eos_ids, prompt, temperature=0.0, generator=None):
    """Continue a prompt (list of ids) as the whole model would: (speculative.Speculation, MACs of its rounds, an int).

    MACs are those of one pass over the positions of a round, and of the draft's own use of the head. InputError as
    check_exit."""
    check_exit(model.config, exit)
    gamma = min(gamma, new_tokens)                               # no round drafts more
    lower, upper, states, passes = model.model["layers"][:exit], model.model["layers"][exit:], [], []

    def draft(cache, token, n):
        """At most n ids that follow the token, no further than an end; what each was drawn from, (n, V) or None."""
        ids, q = [], []
        while len(ids) < n and token not in eos_ids:
            states.append(pass_through(model, lower, cache, [token]))            # (1, 1, H), of the token that is read
            logits = unembed(model, states[-1][:, 0])                            # (1, V)
            token = accept([], None, logits, temperature, generator)[1]
            ids.append(token)
            q += [probabilities(logits, temperature)] if temperature else []
        return ids, torch.cat(q) if q else None

    def verify(cache, ids):
        """Logits behind each of the ids (S, V), of a prompt behind its last; caches all K and V, from cache.used on.
        The lower blocks run for what the draft has not read: its own last id, or the prompt."""
        start, read = cache.used, len(states)
        rewind(cache, start + read)
        h = torch.cat([*states, pass_through(model, lower, cache, ids[read:])], 1)               # (1, S, H)
        rewind(cache, start)
        states.clear()
        h = pass_through(model, upper, cache, ids, h)
        passes.append((len(ids), cache.used))
        return unembed(model, h[0] if start else h[0, -1:])

    found = speculate(model, prompt, new_tokens, gamma, draft, verify, eos_ids, temperature, generator)
    everyone = torch.ones(2 * model.config.num_hidden_layers, 1, gamma + 1, dtype=torch.bool)
    return found, int(sum(count_macs(model.config, everyone[..., :n], everyone[0, :, :n], keys=keys,
                                     logit_rows=2 * n - 1) for n, keys in passes[1:]))       # the first is the prompt's


def main(argv=None):
    p = Parser("LayerSkip's self-speculative decoding against plain greedy decoding of the same model.")
    add = p.add_argument
    add("--model", required=True, metavar="RUN", help="folder, a run's --out, or hub id; without gates")
    add("--exit", type=whole(1), required=True, metavar="E", help="how many blocks draft")
    add_flags(p)
    args = p.parse_args(argv)
    model, prompts, eos = open_prompts(args, lambda model: check_exit(model.config, args.exit))
    ways = {(f"exit {args.exit}", gamma): partial(self_speculate, model, args.exit, gamma, args.new_tokens, eos)
            for gamma in args.gammas}
    compare(model, ways, prompts, args.new_tokens, eos, args.repeats)
    return 0


if __name__ == "__main__":
    run(main)
