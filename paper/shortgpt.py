"""ShortGPT (Men et al. 2024, arXiv 2403.03853; Table 9): remove the blocks that turn the hidden states least.

    python paper/shortgpt.py --model runs/dense --data train.jsonl --blocks 3 --out runs/dense-3
    python paper/shortgpt.py --model runs/gated --data train.jsonl --blocks 3 --out runs/gated-3

The influence of a block is 1 - E_t[cos(x_t, y_t)], between what goes in (x_t) and what comes out (y_t; of the last
block too before the final norm), over all tokens of the examples. The n blocks of the lowest influence are removed at
once, without training, and what is left is saved as a Hugging Face folder like any other. Influence is that of the
model that is to be used: with its gates, where it has some, at full budget. A block takes its own gates along; shared
gates stay; frozen thresholds are measured anew.

The authors of ShortGPT remove about a quarter, 9 of 32 blocks and 10 of 40 (README of github.com/icip-cas/ShortGPT).
Those of GateSkip measured on 512 tokens, padding included, and the last block after the final norm, which makes it look
important: here it can go like any other. What their table calls saved compute comes on top of the blocks removed.

Shapes: B batch, S sequence, H hidden, L layers.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from console import InputError, pick_device, run
from flags import Parser, whole

import torch
import torch.nn.functional as F
from torch import nn

from data import collate, encode_all, load_examples
from load_weights import save_model
from opened import add_flags_of_a_new_model, check_new, open_with_items, whole_or_none
from quantized import is_quantized
from recalibrate import recalibrate
from savings import count_macs
from thresholds import chunks


@torch.no_grad()
def block_influence(model, items):
    """1 - mean cosine of a block's input and output, over the tokens of all items, padding left out: L floats."""
    device, blocks = next(model.parameters()).device, model.model["layers"]
    cosines, tokens = torch.zeros(len(blocks), dtype=torch.float64, device=device), 0
    for chunk in chunks(items, length=lambda item: len(item[0])):
        input_ids, _, valid = (x.to(device) for x in collate(chunk))             # (B, S) each
        h, call = model.begin(input_ids, valid=valid)                            # (B, S, H)
        below = None
        for layer, block in enumerate(blocks):
            before = h
            h, below, _, _ = block(h, below, model.gates_of(block), call)
            cosines[layer] += F.cosine_similarity(before.double(), h.double(), dim=-1)[valid].sum()
        tokens += valid.sum()
    return (1 - cosines / tokens).tolist()


def remove(model, removed):
    """Take blocks (their numbers) out of a model, in place, with the gates that they own; those above move down.

    Gemma 2 alternates between windows and full attention: each block that stays keeps its own, written as layer_types.
    No other entry of config.json that is read here is per layer, but the thresholds: see recalibrate.py.
    """
    config, blocks = model.config, model.model["layers"]
    kept = [layer for layer in range(len(blocks)) if layer not in removed]
    model.model["layers"] = nn.ModuleList(blocks[layer] for layer in kept)       # their names count anew
    for layer, block in enumerate(model.model["layers"]):                        # and so do branches and cache
        block.layer = block.self_attn.layer = layer
    config.num_hidden_layers = model.raw_config["num_hidden_layers"] = len(kept)
    if config.gemma:
        config.windows = [config.windows[layer] for layer in kept]
        model.raw_config["layer_types"] = ["full_attention" if window is None else "sliding_attention"
                                           for window in config.windows]


def of_original(skipped, blocks, layers):
    """The share of the original branches that do not run where `skipped` of those left do not, `blocks` of `layers`
    removed: 1 - (1 - s)(1 - k / L). Of work as of (token, branch) pairs: blocks cost the same."""
    return 1 - (1 - skipped) * (1 - blocks / layers)


def macs_of_a_token(config, layers):
    """MACs of this model with so many layers, one token, head and gates included, in a context so short that keys cost
    none."""
    token = torch.ones(1, 1, dtype=torch.bool)                                   # (B, S)
    return count_macs(config, token.expand(2 * layers, 1, 1), token, keys=0, logit_rows=1, gate=config.gate).item()


def parse_args(argv):
    p = Parser("Remove the blocks of the lowest influence from a model, with or without gates.")
    add = p.add_argument
    add("--model", required=True, help="folder, a run's --out, or hub id")
    add("--data", required=True, help="what influence is measured on, and thresholds: arithmetic (thresholds on its "
        "calibration problems), or a .jsonl, .parquet or .txt file")
    add("--blocks", type=whole(1), required=True, metavar="N", help="how many to remove")
    add_flags_of_a_new_model(p)
    return p.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    check_new(args.out)
    device, dtype = pick_device(args.device, args.dtype)
    examples = load_examples(args.data, "train", args.limit or None)
    model, tokenizer, items, _ = open_with_items(args.model, examples, args.limit, args.seq_len, device, dtype)
    config, layers = model.config, model.config.num_hidden_layers
    if is_quantized(args.model):
        raise InputError(f"--model {args.model} is quantised: remove blocks of the one it was made from, then quantise")
    if args.blocks >= layers:
        raise InputError(f"--blocks {args.blocks} of {layers} leaves none: remove at most {layers - 1}")
    influence = block_influence(model, items)
    removed = sorted(range(layers), key=lambda layer: influence[layer])[:args.blocks]
    print(f"influence on {sum(len(ids) for ids, _ in items)} tokens of {len(items)} sequences of {args.data}\n")
    print("block   influence")
    for layer, value in enumerate(influence):
        print(f"{layer:5}   {value:9.4f}" + "   removed" * (layer in removed))
    saved = 1 - macs_of_a_token(config, layers - args.blocks) / macs_of_a_token(config, layers)
    remove(model, removed)
    print(f"\n{args.blocks} of {layers} blocks removed: {saved:.1%} of a token's multiply-accumulates saved, head "
          "included, short context")
    if "thresholds" in config.gateskip:
        if args.data == "arithmetic":                            # held out: neither trained nor ranked on
            items, _ = encode_all(load_examples("arithmetic", "calibration", args.limit or None), tokenizer,
                                  config.eos_ids[0], args.seq_len)
        recalibrate(model, items)
        for budget, skipped in config.gateskip["realised"].items():
            print(f"budget {budget}: skips {skipped:.1%} of what is left, and so "
                  f"{of_original(skipped, args.blocks, layers):.1%} of what was there does not run")
    with whole_or_none(args.out):
        save_model(model, args.out, tokenizer)
    print(f"written: {args.out}")
    return 0


if __name__ == "__main__":
    run(main)
