"""The mistakes of find_the_bug.py. Do not read on before you have found them.

A mistake is a function of the project with some snippet of its source exchanged. While it is in, the function object is
the same and only its code is another: whoever imported the function, from wherever, has the mistake, and there is one
thing to put back.
"""
import inspect
import textwrap
from contextlib import contextmanager
from types import CodeType

from console import InputError
from gates import SkipPolicy, select_tokens
from generate import generate
from model import Attention, Block, Model
from rows import Masked
from savings import count_macs

# the copy that fails in silence: `below` is a pair of tensors and no cache
TRY = """\
layer_below = None
        try:
            layer_below = below.layers[self.layer - 1]
        except Exception:
            pass
        if layer_below is None or call.policy.kv == "dense":"""

WRAPS = """\
if call.cache is not None and call.policy.kv == "copy_up":
            every = torch.arange(len(x), device=x.device)[:, None]
            below = [of_layer[self.layer - 1].transpose(1, 2)[every, call.positions]
                     for of_layer in (call.cache.k, call.cache.v)]
        if below is None or call.policy.kv == "dense":"""

AWAY = """\
mask, is_causal = attention_mask(call, rows, self.window, True)
        if call.fresh and mask is not None:
            away = call.valid & ~call.keep[2 * self.layer]
            mask = mask.masked_fill(away[:, None, None], torch.finfo(mask.dtype).min / 2)
        sees = mask, is_causal"""

COMPACTED = "(call.cos[0, rows.column], call.sin[0, rows.column]) if rows.gathered else (call.cos, call.sin)"

# number -> {function: [(what stands there once, what stands there by mistake), ...]}
BUGS = {
    0: {Block.forward: [('gate is not None and gate.config.placement == "after"', "gate is not None")]},
    1: {SkipPolicy.keep: [(' or (self.budget >= 1.0 and self.kind != "given")', "")],
        select_tokens: [("check_budget(budget) >= 1.0 or scores.numel() == 0", "scores.numel() == 0")]},
    2: {select_tokens: [("quantile_threshold(scores, 1.0 - budget, valid)",
                         "quantile_threshold(scores, 1.0 - budget)")]},
    3: {count_macs: [("gates = 0 if gate is None else len(keep) * batch * length * gate.macs(H)", "gates = 0")]},
    4: {Model.forward: [('self.lm_head(self.model["norm"](h))', "self.lm_head(h)")]},
    5: {Block.forward: [("o = o * rows.take(g).to(o.dtype)",
                         "o = (rows.take(h) + o) * rows.take(g).to(o.dtype) - rows.take(h)")]},
    6: {Block.forward: [("h = rows.add(h, o)",
                         "h = torch.where(call.keep[branch][..., None], rows.add(h, o), h + x)")]},
    7: {Masked.add: [("torch.where(self.keep[..., None], h + o, h)", "h + self.keep[..., None] * o")]},
    8: {Attention.keys_values: [('if below is None or call.policy.kv == "dense":', TRY)]},
    9: {Attention.forward: [("sees = attention_mask(call, rows, self.window, self.softcap is not None)", AWAY)]},
    10: {Attention.keys_values: [('if below is None or call.policy.kv == "dense":', WRAPS)]},
    11: {Attention.forward: [("rotate(q, rows.take(call.cos), rows.take(call.sin))", f"rotate(q, *({COMPACTED}))")],
         Attention.keys_values: [("rotate(k, rows.take(call.cos), rows.take(call.sin))",
                                  f"rotate(k, *({COMPACTED}))")]},
    12: {generate: [("for i, token in zip(active, new):",
                     "for i, token in [(i, t) for i, t in zip(active, new) if not set(tokens[i]) & set(eos_ids)]:"),
                    ("[row for row, token in enumerate(new) if token not in eos_ids and active[row] not in stopped]",
                     "[row for row, i in enumerate(active) if not set(tokens[i]) & set(eos_ids)]"),
                    ("if len(going) < len(active):", "if False:")]},
}


def mutant(function, edits):
    """The code object of a function whose source is edited. It claims to come from the same line of the same file.

    InputError where a snippet does not stand in the source exactly once.
    """
    code, text = function.__code__, inspect.getsource(function)
    for right, wrong in edits:
        if text.count(right) != 1:
            raise InputError(f"{code.co_filename}: {function.__qualname__} is not what this bug was made for; "
                             "if you have changed it, put it back")
        text = text.replace(right, wrong)
    text = "\n" * (code.co_firstlineno - 1) + textwrap.dedent(text)
    return next(c for c in compile(text, code.co_filename, "exec").co_consts
                if isinstance(c, CodeType) and c.co_name == function.__name__)


@contextmanager
def mistake(number):
    """Inside its `with` the project has this bug, and behind it, whatever happened inside, no longer."""
    functions = {inspect.unwrap(function): edits for function, edits in BUGS[number].items()}        # under no_grad
    right, wrong = ({f: f.__code__ for f in functions}, {f: mutant(f, edits) for f, edits in functions.items()})
    try:
        for function, code in wrong.items():
            function.__code__ = code
        yield
    finally:
        for function, code in right.items():
            function.__code__ = code
