"""ShortGPT (Men et al. 2024, arXiv 2403.03853): remove the blocks that turn the hidden states least.

    python paper/remove_blocks.py --model runs/dense --data train.jsonl --blocks 3 --out runs/dense-3

The influence of a block is 1 - E_t[cos(x_t, y_t)], between what goes in (x_t) and what comes out (y_t; of the last
block too before the final norm), over all tokens of the examples. The n blocks of the lowest influence are removed at
once, without training, and what is left is saved as a Hugging Face folder like any other.

Shapes: B batch, S sequence, H hidden, L layers.
"""
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from console import InputError, pick_device, run
from flags import Parser, add_machine_flags, whole

import torch
import torch.nn.functional as F
from torch import nn

from data import collate, load_examples
from disk import check_writable
from load_weights import save_model
from opened import open_with_items
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


def save_without(model, tokenizer, removed, out):
    """Take blocks (their numbers) out of a model and save it; those above move down. Load the folder to use it.

    Gemma 2 alternates between windows and full attention: each block that stays keeps its own, written as layer_types.
    No other entry of config.json that is read here is per layer.
    """
    config, blocks = model.config, model.model["layers"]
    kept = [layer for layer in range(len(blocks)) if layer not in removed]
    model.model["layers"] = nn.ModuleList(blocks[layer] for layer in kept)       # their names count anew
    model.raw_config["num_hidden_layers"] = len(kept)
    if config.gemma:
        model.raw_config["layer_types"] = ["full_attention" if config.windows[layer] is None else "sliding_attention"
                                           for layer in kept]
    save_model(model, out, tokenizer)


def macs_of_a_token(config, layers):
    """MACs of this model with so many layers: one token, head included, in a context so short that keys cost none."""
    token = torch.ones(1, 1, dtype=torch.bool)                                   # (B, S)
    return count_macs(config, token.expand(2 * layers, 1, 1), token, keys=0, logit_rows=1).item()


def parse_args(argv):
    p = Parser("Remove the blocks of the lowest influence from a dense model.")
    add = p.add_argument
    add("--model", required=True, help="folder, a run's --out, or hub id; without gates")
    add("--data", required=True, help="what influence is measured on: arithmetic, or a .jsonl, .parquet or .txt file")
    add("--limit", type=whole(0), default=64, help="the first N examples of it; 0: all")
    add("--seq-len", type=whole(2), default=512, help="longer examples are left out, plain text is cut")
    add("--blocks", type=whole(1), required=True, metavar="N", help="how many to remove")
    add("--out", required=True, help="the folder to write, which must not exist")
    add_machine_flags(p)
    return p.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    if os.path.lexists(args.out or "."):                         # a link that leads nowhere is there, too
        raise InputError(f"--out {args.out} exists: give the name of a new folder")
    check_writable(Path(args.out).parent)
    device, dtype = pick_device(args.device, args.dtype)
    examples = load_examples(args.data, "train", args.limit or None)
    model, tokenizer, items, _ = open_with_items(args.model, examples, args.limit, args.seq_len, device, dtype)
    layers = model.config.num_hidden_layers
    if model.config.gate is not None:
        raise InputError(f"--model {args.model} has gates: give the dense model, and train gates on what is left")
    if args.blocks >= layers:
        raise InputError(f"--blocks {args.blocks} of {layers} leaves none: remove at most {layers - 1}")
    influence = block_influence(model, items)
    removed = sorted(range(layers), key=lambda layer: influence[layer])[:args.blocks]
    print(f"influence on {sum(len(ids) for ids, _ in items)} tokens of {len(items)} sequences of {args.data}\n")
    print("block   influence")
    for layer, value in enumerate(influence):
        print(f"{layer:5}   {value:9.4f}" + "   removed" * (layer in removed))
    saved = 1 - macs_of_a_token(model.config, layers - args.blocks) / macs_of_a_token(model.config, layers)
    save_without(model, tokenizer, removed, args.out)
    print(f"\n{args.blocks} of {layers} blocks removed: {saved:.1%} of a token's multiply-accumulates saved, head "
          f"included, short context\nwritten: {args.out}")
    return 0


if __name__ == "__main__":
    run(main)
