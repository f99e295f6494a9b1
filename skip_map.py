"""The skip map: one web page to see what a generation ran and what it skipped, token by token and branch by branch.

    python generate.py --model runs/demo --budgets 1.0 0.7 0.5 --html runs/map.html --question "Tom has 31 red pens ..."

Every number is worked out here; skip_map.html, the page that they are put into, only shows them. It needs no network.

Shapes: L layers, S tokens that ran: the prompt's, and the new ones but the last, which no pass has read.
"""
import json
import struct
from base64 import b64encode
from pathlib import Path

import torch

from console import InputError
from disk import check_file, write
from gates import may_skip
from savings import branch_costs

PAGE = Path(__file__).with_name("skip_map.html")


def page(path):
    """The type of --html FILE: the path. InputError for what could not be written later."""
    if not path.endswith(".html"):
        raise InputError(f"{path} must end in .html")
    check_file(path)
    return path


def sources(keep, kv):
    """The layer whose K and V each token has at each layer. keep: 2L rows of S bools; kv: the policy's -> L rows of S.

    Its own where attention ran, else, with copy_up, that of the layer below, through a whole run of skips. Layer 0 has
    nothing below, and kv="dense" computes K and V all the same.
    """
    rows = []
    for layer, attention in enumerate(keep[0::2]):
        own = lambda ran: ran or layer == 0 or kv == "dense"
        rows.append([layer if own(ran) else rows[-1][token] for token, ran in enumerate(attention)])
    return rows


def decided_by(policy, branch):
    """The threshold that a score at this branch must exceed, to four decimals, or what there is in its place."""
    if not may_skip(policy.skip, branch):
        return "as its attention" if policy.skip == "layer" else "never skipped"
    return round(policy.thresholds[branch], 4) if policy.kind == "frozen" else "-"       # batch: another in each call


def packed(numbers):
    """Whole numbers below 2 ** 16 -> base64 of two bytes each, the lower one first."""
    return b64encode(struct.pack(f"<{len(numbers)}H", *numbers)).decode()


def run_of(config, policy, traces, tokens, n_prompt, summary):
    """What the page shows of one generation, ready for JSON. traces: of its passes, for one text (B = 1); tokens: what
    each adds to the text (tokens.pieces), the first n_prompt of them the prompt's; summary: lines of text."""
    keep = torch.cat([torch.stack(trace.keep)[:, 0] for trace in traces], dim=1).tolist()        # (2L, S)
    scores, costs = None, branch_costs(config)                   # costs: with mean 1
    if traces[0].scores is not None:                             # else there are no gates
        scores = torch.cat([torch.stack(trace.scores)[:, 0] for trace in traces], dim=1).double()    # (2L, S)
        scores = (scores * 10000).round().nan_to_num(nan=65535).long().flatten().tolist()
    work = [sum(cost * ran for cost, ran in zip(costs, column)) / len(costs) for column in zip(*keep)]       # S
    return {"budget": policy.budget, "summary": summary, "tokens": tokens, "prompt": n_prompt,
            "work": [round(share, 4) for share in work],         # S
            "keep": ["".join("01"[ran] for ran in row) for row in keep],                         # 2L strings
            "scores": scores and packed(scores),                 # 2L x S, in ten thousandths; 65535: not a number
            "thresholds": [decided_by(policy, branch) for branch in range(len(keep))],
            "source": packed(sum(sources(keep, policy.kv), []))}                                 # L x S


def write_page(path, model, runs):
    """Write the page. model: its name; runs: run_of for each budget, in the order of the slider."""
    before, _, after = PAGE.read_text(encoding="utf-8").partition("DATA")
    data = json.dumps({"model": model, "runs": runs})            # ASCII: U+2028 and the like are escaped
    write(path, before + data.replace("<", "\\u003c") + after)   # no </script> and no <!-- in a text ends it
