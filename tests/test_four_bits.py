"""Tests of paper/four_bits.py: levels, codes, scales, and what they make of a block of weights."""
import bisect
import math
import sys

import numpy
import pytest
import torch

from conftest import on_devices
from toy_runs import ROOT

sys.path.insert(0, str(ROOT / "paper"))
from four_bits import (LEVELS, bits_on_paper, blocks_of, eight_bits, from_eight_bits, int4, nf4, nf4_levels, pack,
                       size_of_blocks, unpack)


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def back(blocks, kind):
    """Quantised and dequantised, in the plainest way."""
    codes, scale, *zero = {"nf4": nf4, "int4": int4}[kind](blocks)
    levels = LEVELS[kind][codes.long()]
    return (levels - zero[0][:, None] if zero else levels) * scale[:, None]


# 1: the levels

def test_sixteen_levels_that_are_quantiles():
    """A level too many on the lower side, no exact 0 or no exact ends, quantiles of another end or another step."""
    levels = nf4_levels()
    assert len(levels) == 16 and all(a < b for a, b in zip(levels, levels[1:]))
    assert (levels[0], levels[7], levels[15]) == (-1.0, 0.0, 1.0) and LEVELS["nf4"][7] == 0
    published = "-1 -.6962 -.5251 -.3949 -.2844 -.1848 -.09105 0 .0796 .1609 .2461 .3379 .4407 .5626 .7230 1".split()
    assert levels == pytest.approx([float(x) for x in published], abs=5e-5)
    end = 0.5 * (1 - 1 / 32) + 0.5 * (1 - 1 / 30)                # share of the normal distribution below the largest
    normal = lambda x: 0.5 * (1 + math.erf(x / 2 ** 0.5))
    widest = bisect.bisect(range(2 * 10 ** 9), end, key=lambda i: normal(i / 10 ** 9)) / 10 ** 9
    below = [normal(x * widest) for x in levels]
    assert numpy.diff(below[7:]) == pytest.approx([(end - 0.5) / 8] * 8, abs=1e-6)
    assert numpy.diff(below[:8]) == pytest.approx([(end - 0.5) / 7] * 7, abs=1e-6)


# 2 and 3: codes are the nearest, and stay what they are

@on_devices
@pytest.mark.parametrize("kind", LEVELS)
def test_codes_are_the_nearest_by_a_plain_loop(kind, device):
    """A border that is no midpoint, a code for another level, an error of more than half the widest gap."""
    blocks = gaussian(7, 64).to(device) * torch.logspace(-6, 6, 7, device=device)[:, None]
    codes, scale, *zero = {"nf4": nf4, "int4": int4}[kind](blocks)
    for b, block in enumerate(blocks.double().cpu().tolist()):
        shift = zero[0][b].item() if zero else 0
        levels = [(level - shift) * scale[b].item() for level in LEVELS[kind].double().tolist()]
        widest = max(b - a for a, b in zip(levels, levels[1:]))
        assert widest == pytest.approx((0.3038 if kind == "nf4" else 1) * scale[b].item(), rel=1e-3)
        for w, code in zip(block, codes[b].tolist(), strict=True):
            error = abs(levels[int(code)] - w)
            assert error <= min(abs(level - w) for level in levels) + 1e-6 * scale[b].item()
            assert error <= widest / 2 + 1e-6 * scale[b].item()
    if kind == "int4":
        assert {0, 15} == {int(codes[b].min()) for b in range(7)} | {int(codes[b].max()) for b in range(7)}


@pytest.mark.parametrize("kind", LEVELS)
def test_levels_come_back_as_themselves(kind):
    """Levels times a scale that move when they are quantised; a second quantisation that drifts."""
    once = back(gaussian(50, 64), kind)
    codes = {"nf4": nf4, "int4": int4}[kind](once)[0]
    again = back(once, kind)
    if kind == "nf4":
        assert torch.equal(again, once)
        exact = LEVELS["nf4"].repeat(1, 4) * torch.tensor([[1.0], [0.37], [3e-5]])
        assert torch.equal(back(exact, "nf4"), exact)
    else:                                                        # its scale is computed anew: up to rounding
        torch.testing.assert_close(again, once, rtol=1e-5, atol=1e-6)
        steps = (torch.arange(16.0).repeat(1, 4) - torch.tensor([[0.0], [7.0], [15.0]])) * 2 ** -5
        assert torch.equal(back(steps, "int4"), steps)           # a power of two is not rounded
    assert torch.equal({"nf4": nf4, "int4": int4}[kind](again)[0], codes)


# 4: nothing to scale

@pytest.mark.parametrize("kind", LEVELS)
def test_zeros_stay_zeros(kind):
    """NaN of a block of zeros, or of the smallest numbers there are; a neighbour that suffers; codes of a block of
    zeros that are other than 0 once its scale is rounded."""
    blocks = gaussian(4, 64)
    blocks[1], blocks[2] = 0.0, 1e-45
    out = back(blocks, kind)
    assert out.isfinite().all() and not out[1].any() and out[2].abs().max() <= 1e-44
    assert torch.equal(out[3], back(blocks[3:], kind)[0])
    codes, _, *zero = {"nf4": nf4, "int4": int4}[kind](blocks)
    assert not (LEVELS[kind][codes[1].long()] - (zero[0][1] if zero else 0)).any()


@pytest.mark.parametrize("sign", [1, -1])
def test_weights_of_one_sign_have_0_among_their_levels(sign):
    """A zero below 0 or above 15, which a byte turns into another."""
    blocks = sign * (gaussian(3, 64).abs() + 5)
    _, scale, zero = int4(blocks)
    assert scale.tolist() == pytest.approx((blocks.abs().amax(1) / 15).tolist()) and set(zero.tolist()) <= {0, 15}
    assert ((back(blocks, "int4") - blocks).abs() <= scale[:, None] / 2 + 1e-6).all()


# 5: what is lost of a normal distribution

def test_mean_squared_errors_of_gaussian_blocks():
    """Levels that fit nothing: of unit variance, blocks of 64, NF4 loses .0085, symmetric int4 .0116, affine .0083."""
    blocks = gaussian(4000, 64)
    step = blocks.abs().amax(1, keepdim=True) / 7
    symmetric = (blocks / step).round().clamp(-8, 7) * step
    losses = {kind: (back(blocks, kind) - blocks).pow(2).mean().item() for kind in LEVELS}
    assert losses["nf4"] == pytest.approx(0.0085, abs=1e-4) and losses["int4"] == pytest.approx(0.0083, abs=1e-4)
    assert (symmetric - blocks).pow(2).mean().item() == pytest.approx(0.0116, abs=1e-4)


# 6: two to a byte

@on_devices
@pytest.mark.parametrize("n", [0, 1, 2, 7, 256, 1001])
@pytest.mark.parametrize("kind", LEVELS)
def test_two_codes_to_a_byte(n, kind, device):
    """Halves that change places, an odd one that is lost, a byte for each code."""
    codes = torch.randint(16, (n,), generator=torch.Generator().manual_seed(n)).to(device)
    packed = pack(codes)
    assert packed.dtype == torch.uint8 and packed.numel() == packed.untyped_storage().nbytes() == (n + 1) // 2
    for i, code in enumerate(codes.tolist()):
        assert packed[i // 2].item() >> (4, 0)[i % 2] & 15 == code
    assert torch.equal(unpack(packed, n, kind), LEVELS[kind].to(device)[codes])


@pytest.mark.parametrize("kind, shape, size, filled", [
    ("nf4", (5, 13), 64, 63), ("nf4", (4, 32), 64, 0), ("int4", (3, 256), 128, 0), ("int4", (3, 576), 96, 0),
    ("int4", (2, 1536), 128, 0), ("int4", (2, 320), 64, 0), ("int4", (2, 160), 32, 0), ("int4", (3, 48), 48, 0),
    ("int4", (3, 7), 7, 0)])
def test_who_shares_a_scale(kind, shape, size, filled):
    """A group across two rows of int4, groups of a width that does not divide, an endless search for one that does."""
    weight = gaussian(*shape).bfloat16()
    blocks = blocks_of(weight, kind)
    assert size_of_blocks(kind, shape[1]) == size and blocks.shape[1] == size and blocks.dtype == torch.float32
    flat = weight.float().flatten()
    assert torch.equal(blocks.flatten()[:flat.numel()], flat) and blocks.numel() == flat.numel() + filled
    assert not blocks.flatten()[flat.numel():].any()


# double quantisation

@pytest.mark.parametrize("n", [1, 255, 256, 257, 1000])
def test_scales_in_eight_bits_by_a_plain_loop(n):
    """A mean of what fills up, a neighbour's scale, magnitudes below 0, storage for what fills up."""
    absmax = gaussian(n).abs() * 0.1
    absmax[0] = 0.0
    codes, scale, mean = eight_bits(absmax)
    assert codes.dtype == torch.int8 and codes.untyped_storage().nbytes() == n and len(scale) == -(-n // 256)
    found, off = from_eight_bits(codes, scale, mean), absmax.double().numpy() - absmax.double().numpy().mean()
    for i, x in enumerate(absmax.tolist()):
        group = numpy.abs(off[i // 256 * 256:i // 256 * 256 + 256]).max()
        assert scale[i // 256].item() == pytest.approx(group / 127, rel=1e-4, abs=1e-9)
        assert abs(found[i].item() - x) <= group / 254 + 1e-7 and found[i] >= 0
    same, equal = torch.full((300,), 0.25), eight_bits(torch.full((300,), 0.25))
    assert torch.equal(from_eight_bits(*equal), same)            # nothing is left to scale


def test_bits_on_paper():
    """Scales that are not counted, or counted once a weight."""
    assert bits_on_paper("nf4", False, 64) == 4.5 and bits_on_paper("int4", False, 128) == 4.3125
    assert bits_on_paper("nf4", True, 64) == pytest.approx(4.127, abs=5e-4)
