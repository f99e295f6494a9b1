"""4-bit weights (Table 7): a folder whose matrices of attention and MLP are NF4, or int4, dequantised to compute.

    python paper/quantize.py --model runs/gated --kind nf4 --double --data train.jsonl --out runs/gated-nf4

Frozen thresholds are measured anew on --data. Which scripts of this folder open such a folder (opened.py) is told in
README.md; load_model, and so generate.py and train.py, refuse it.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from console import InputError, pick_device, run
from flags import Parser

import torch

from data import load_examples
from four_bits import bits_on_paper, size_of_blocks
from linear import Linear
from load_weights import load_model, load_tokenizer
from opened import add_flags_of_a_new_model, check_new, open_with_items, whole_or_none
from quantized import KINDS, QuantLinear, matrices, memory_of, quantize, save_quantized
from recalibrate import recalibrate


def parse_args(argv):
    p = Parser("Quantise the matrices of attention and MLP to 4 bits.")
    add = p.add_argument
    add("--model", required=True, help="folder, a run's --out, or hub id")
    add("--kind", choices=KINDS, required=True, help="levels of a normal distribution, or even steps")
    add("--double", action="store_true", help="of nf4: the scales in 8 bits, too")
    add("--data", help="measure a gated model's thresholds anew on it: arithmetic (its calibration problems), or a "
        ".jsonl, .parquet or .txt file; without it they are dropped")
    add_flags_of_a_new_model(p)
    args = p.parse_args(argv)
    if args.double and args.kind != "nf4":
        raise InputError(f"--double is for --kind nf4: of {args.kind} the scales stay as they are")
    return args


def main(argv=None):
    args = parse_args(argv)
    check_new(args.out)
    (device, dtype), items = pick_device(args.device, args.dtype), None
    if args.data:
        examples = load_examples(args.data, "calibration", args.limit or None)
        model, tokenizer, items, _ = open_with_items(args.model, examples, args.limit, args.seq_len, device, dtype)
    else:
        model = load_model(args.model, device=device, dtype=dtype)
        tokenizer = load_tokenizer(args.model)
    sizes, before = [matrix.weight.shape for *_, matrix in matrices(model, Linear)], memory_of(model)
    weights = sum(map(torch.Size.numel, sizes))
    quantize(model, args.kind, args.double)
    on_paper = sum(size.numel() * bits_on_paper(args.kind, args.double, size_of_blocks(args.kind, size[1]))
                   for size in sizes) / weights
    measured = 8 * memory_of(*(matrix for *_, matrix in matrices(model, QuantLinear))) / weights
    print(f"{weights:,} weights of attention and MLP, bits of each: {on_paper:.3f} on paper, {measured:.3f} measured\n"
          f"memory of all tensors, embeddings and gates too: {before / 1e6:.1f} MB -> {memory_of(model) / 1e6:.1f} MB")
    recalibrate(model, items)
    with whole_or_none(args.out):
        save_quantized(model, args.out, tokenizer)
    print(f"written: {args.out}, {(Path(args.out) / 'model.safetensors').stat().st_size / 1e6:.1f} MB of weights")
    return 0


if __name__ == "__main__":
    run(main)
