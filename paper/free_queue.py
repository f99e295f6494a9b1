"""FREE's own decoding (free.py) of one text: a queue of tokens that have left, and a threshold that learns.

Synchronised parallel decoding: a token that leaves after block E is put into the queue and predicted at once. The next
that stays takes all that wait along through the deep blocks, each at its own position and seeing only what is before
it, so that their K and V are those of the dense model. Who still waits at the end of a text never goes, and that is all
that is saved; the rest is done later, many tokens at a time, which is quicker.

Those that go through also tell whether E blocks had said what L say. A Beta distribution is fitted, by moments, to the
confidences of either kind, and the next text's threshold is the smallest at which "the same" has a probability of zeta.

Read in the authors' code: equal priors, zeta = 0.4, thresholds of 0.3 to 0.9, a fit before each text. There the grid
has 10 points, here 61; there only those who go through in company teach, here all that predict an answer's token; there
the first 100 texts alone are learnt from, and "the same" is whichever distribution has the larger mean.

Shapes: S new tokens, M that go through the deep blocks, H hidden, V vocabulary, E of L blocks.
"""
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from console import InputError

import torch

from early_exit import through, unembed
from rows import KVCache
from savings import count_macs

ZETA, FIRST = 0.4, 0.9                                           # FIRST: the threshold while nothing is known


class Adaptive:
    """What deep blocks have told of confidences so far; of the softmax gap."""

    def __init__(self):
        self.found = {True: [], False: []}                       # {E blocks said what L say: confidences}

    def threshold(self):
        """The smallest with P(same | confidence) >= zeta; FIRST if there is none, or too little to fit."""
        grid, density = torch.linspace(0.3, 0.9, 61, dtype=torch.float64), {}
        for same, values in self.found.items():
            c = torch.tensor(values, dtype=torch.float64).clamp(1e-4, 1 - 1e-4)
            if len(set(c.tolist())) < 2:                         # no variance
                return FIRST
            mean = c.mean()
            nu = mean * (1 - mean) / c.var(correction=0) - 1                     # a + b of Beta(a, b)
            density[same] = torch.distributions.Beta(mean * nu, (1 - mean) * nu).log_prob(grid)      # (61,)
        right = grid[density[True] - density[False] >= math.log(ZETA / (1 - ZETA))]  # in logs: both may underflow
        return right[0].item() if len(right) else FIRST


class Stream:
    """A text that a Free model reads and continues. room: its tokens at most; adaptive: an Adaptive, which learns."""

    def __init__(self, model, room, adaptive=None):
        weight = model.model["embed_tokens"].weight
        self.model, self.adaptive = model, adaptive
        self.threshold = adaptive.threshold() if adaptive else model.threshold
        self.cache = KVCache(model.config, 1, room, weight.device, weight.dtype)
        self.ids, self.c, self.macs = [], [], 0                  # tokens, their confidences, work so far
        self.queue, self.done = [], 0                            # h^E of those who wait; how many have deep K and V

    def run(self, blocks, start, end, h=None):
        """These blocks, on tokens start to end: states (1, end - start, H) after and before the last of them. h: their
        states before, None: the embeddings."""
        self.cache.used = start                                  # from here on: slots, positions, what may be seen
        self.cache.lengths.fill_(start)
        embedded, call = self.model.begin(torch.tensor([self.ids[start:end]], device=self.cache.lengths.device),
                                          cache=self.cache)
        everyone = torch.ones(1, end - start, dtype=torch.bool)
        self.macs += count_macs(self.model.config, everyone.expand(2 * len(blocks), 1, -1), everyone, keys=call.keys,
                                logit_rows=0).item()
        return through(blocks, embedded if h is None else h, call)

    def head(self, h):
        self.macs += h[..., 0].numel() * self.model.lm_head.weight.numel()
        return unembed(self.model, h)

    @torch.no_grad()
    def feed(self, ids):
        """Read these tokens too, a list of S: logits (1, V) of what follows."""
        model, start, blocks = self.model, len(self.ids), self.model.model["layers"]
        E, self.ids, self.asked = model.shallow, self.ids + ids, self.asked if start else len(ids) - 1
        h, before = self.run(blocks[:E], start, len(self.ids))                   # (1, S, H)
        c, logits = model.sure(h, before)
        self.macs += 0 if logits is None else logits.numel() * model.config.hidden_size
        self.c += c[0].tolist()                                  # to the host: what is to run now depends on it
        self.queue = torch.cat([self.queue, h], 1) if len(self.queue) else h     # (1, M or more, H)
        stays = [i for i in range(start, len(self.ids)) if self.c[i] <= self.threshold]
        if stays:
            end, m = stays[-1] + 1, stays[-1] + 1 - self.done
            deep, _ = self.run(blocks[E:], self.done, end, self.queue[:, :m])    # (1, M, H)
            if self.adaptive:
                new = max(self.asked - self.done, 0)             # of the prompt only the last token predicts
                same = self.head(self.queue[:, new:m]).argmax(-1) == self.head(deep[:, new:]).argmax(-1)
                for i, known in enumerate(same[0].tolist(), self.done + new):
                    self.adaptive.found[known].append(self.c[i])
            self.queue, self.done = self.queue[:, m:], end
            if end == len(self.ids):
                return self.head(deep[:, -1])
        return self.head(h[:, -1]) if logits is None else logits[:, -1]


def decode(model, prompt, max_new_tokens, eos_ids=(), adaptive=None):
    """Continue a prompt (token ids) greedily: (new token ids, the end token included; the Stream: its c and macs).

    InputError for an empty prompt, a length beyond the model's positions, and adapting a confidence other than FREE's.
    """
    room = len(prompt) + max_new_tokens
    if not prompt or max_new_tokens < 1 or room > model.config.max_position_embeddings:
        raise InputError(f"a prompt of {len(prompt)} tokens and {max_new_tokens} new ones: give at least one of each, "
                         f"together no more than the model's {model.config.max_position_embeddings} positions")
    if adaptive and model.confidence != "softmax":
        raise InputError(f"an adaptive threshold is of the confidence softmax, not {model.confidence}")
    stream, tokens = Stream(model, room, adaptive), []
    while len(tokens) < max_new_tokens and (not tokens or tokens[-1] not in eos_ids):
        tokens.append(stream.feed(tokens[-1:] or list(prompt)).argmax(-1).item())
    return tokens, stream
