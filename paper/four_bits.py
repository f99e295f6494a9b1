"""Numbers of 4 bits, two to a byte, with a scale for each block of weights: what quantize.py makes matrices of.

nf4   NormalFloat, of QLoRA (Dettmers et al. 2023, arXiv 2305.14314): blocks of 64 along the flattened matrix; 16 levels
      that are quantiles of a normal distribution, times the block's largest magnitude. Double quantisation: those
      magnitudes, less their mean, in 8 bits, with one scale for 256 (QLoRA's are 8-bit floats, these whole numbers).
int4  16 even steps from a group's smallest weight to its largest, 0 among them; groups of 128 along a row.

The levels are made as by create_normal_map in bitsandbytes, the groups as in nn/qmodule.py of optimum-quanto.

Shapes: O, I output and input width of a matrix; G blocks of `size` weights that share a scale.
"""
from functools import cache
from statistics import NormalDist

import torch
import torch.nn.functional as F


def nf4_levels():
    """The 16 levels, rising: quantiles at 8 even steps on one side, at 7 on the other, and 0, over the largest."""
    quantile, end = NormalDist().inv_cdf, (1 - 1 / 32 + 1 - 1 / 30) / 2
    side = lambda n: [quantile(end + (0.5 - end) * i / n) for i in range(n)]
    return [x / quantile(end) for x in sorted([*side(8), 0.0, *(-x for x in side(7))])]


LEVELS = {"nf4": torch.tensor(nf4_levels()), "int4": torch.arange(16.0)}         # what a code stands for


def pack(codes):
    """(n,) of 0 .. 15 -> (ceil(n / 2),) uint8, the first of two in the upper half."""
    pairs = F.pad(codes.to(torch.uint8), (0, len(codes) % 2)).view(-1, 2)
    return pairs[:, 0] << 4 | pairs[:, 1]


@cache
def levels_of_bytes(kind, device):
    """(256, 2) float32: the two levels that each byte stands for."""
    return torch.cartesian_prod(LEVELS[kind], LEVELS[kind]).to(device)


def unpack(packed, n, kind):
    """Packed codes -> the levels that they stand for, (n,) float32. One look-up a byte."""
    return F.embedding(packed.int(), levels_of_bytes(kind, packed.device)).flatten()[:n]


def size_of_blocks(kind, width):
    """How many weights share a scale: 64 of nf4; of int4 128, less 32 until that divides a row of this width, or else
    the row."""
    return 64 if kind == "nf4" else next((size for size in (128, 96, 64, 32) if width % size == 0), width)


def blocks_of(weight, kind):
    """(O, I) -> (G, size) float32; zeros fill up the last block of nf4."""
    size = size_of_blocks(kind, weight.shape[1])
    return F.pad(weight.float().flatten(), (0, -weight.numel() % size)).view(-1, size)


def nf4(blocks):
    """(G, 64) -> (codes like it, absmax (G,)): the nearest level to w / absmax."""
    absmax = blocks.abs().amax(1)
    unit = blocks / absmax.where(absmax > 0, 1.0)[:, None]       # a block of zeros stays one
    levels = LEVELS["nf4"].to(blocks.device)
    return torch.bucketize(unit, (levels[1:] + levels[:-1]) / 2), absmax


def int4(blocks):
    """(G, size) -> (codes like it, scale (G,) float32, zero (G,) uint8): w is nearly (code - zero) * scale."""
    low, high = blocks.amin(1).clamp(max=0), blocks.amax(1).clamp(min=0)
    scale = (high - low) / 15
    scale = scale.where(scale > 0, 1.0)
    zero = (-low / scale).round()
    return ((blocks / scale[:, None]).round() + zero[:, None]).clamp(0, 15), scale, zero.to(torch.uint8)


def eight_bits(absmax):
    """Double quantisation: (G,) -> (codes (G,) int8, scale (ceil(G / 256),) float32, mean ())."""
    mean = absmax.mean()
    off = F.pad(absmax - mean, (0, -len(absmax) % 256)).view(-1, 256)            # what fills up is 0
    scale = off.abs().amax(1) / 127
    codes = (off / scale.where(scale > 0, 1.0)[:, None]).round().to(torch.int8)
    return codes.flatten()[:len(absmax)].clone(), scale, mean    # a view would keep what fills up in memory


def from_eight_bits(codes, scale, mean):
    """(G,) float32: the magnitudes again. One rounded below 0 would turn signs round."""
    return (codes * scale.repeat_interleave(256)[:len(codes)] + mean).clamp(min=0)


def bits_on_paper(kind, double, size):
    """What a weight takes: 4.5 bits of nf4, 4.127 of it with double quantisation, 4.3125 of int4 in groups of 128."""
    if kind == "int4":
        return 4 + (32 + 8) / size
    return 4 + (8 / size + 32 / (256 * size) if double else 32 / size)
