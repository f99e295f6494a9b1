"""Tests of linear.py: one product, whoever computes it."""
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import linear as linear_py
from conftest import OperatorNames
from linear import Linear


def test_product_by_hand():
    """x W for x W^T, or a bias left out: (1, 2) times rows (3, 4), (5, 6), (7, 8), plus (0.5, 0, -1)."""
    linear = Linear(2, 3)
    linear.weight.data, linear.bias.data = torch.tensor([[3., 4.], [5., 6.], [7., 8.]]), torch.tensor([0.5, 0., -1.])
    assert linear(torch.tensor([[1., 2.]])).tolist() == [[11.5, 17., 22.]]


def test_construction_draws_nothing():
    """Weights drawn for nothing: seconds on a 1B model, and a random state that depends on how it was built."""
    before = torch.get_rng_state()
    Linear(300, 300)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("size, dtype, with_gradients, taken", [
    ((256, 256), torch.float32, False, True), ((257, 255), torch.float32, False, False),     # 2^16 weights; one fewer
    ((256, 256), torch.float32, True, False), ((256, 256), torch.float64, False, False),
    ((256, 256), torch.bfloat16, False, False)])
def test_onednn_only_where_it_may_and_pays(monkeypatch, size, dtype, with_gradients, taken):
    """oneDNN without a gradient in training, in a dtype it was not measured with, or for products too small to gain."""
    monkeypatch.setattr(linear_py, "SMALL", 2 ** 16)
    linear = Linear(*size).to(dtype)
    for p in linear.parameters():
        p.data.zero_()
    with OperatorNames() as names, torch.set_grad_enabled(with_gradients):
        out = linear(torch.ones(3, size[0], dtype=dtype))
    assert ("_linear_pointwise" in names.seen) == (taken and torch.backends.mkldnn.is_available())
    assert out.shape == (3, size[1]) and out.dtype == dtype and not out.any() and out.requires_grad == with_gradients


@pytest.mark.parametrize("cpu, small", [("AVX512", 2 ** 16), ("AVX2", 2 ** 21), ("DEFAULT", 2 ** 21)])
def test_what_is_small_depends_on_the_cpu(monkeypatch, cpu, small):
    """oneDNN for SmolLM2's blocks on a CPU without AVX-512, where it is the slower one."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: cpu)
    assert runpy.run_path(linear_py.__file__)["SMALL"] == small


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 320), (17, 320), (2, 5, 320), (3, 1, 320), (0, 320)])
def test_linear_is_the_same_product_on_every_path(monkeypatch, bias, shape):
    """oneDNN fed a strided view or no rows, no bias, less precision, lost gradients, or the path never taken."""
    monkeypatch.setattr(linear_py, "SMALL", 2 ** 16)
    generator = torch.Generator().manual_seed(0)
    linear = Linear(320, 256, bias=bias)
    for p in linear.parameters():
        p.data = torch.randn(p.shape, generator=generator)
    x = torch.randn(*shape[:-1], 640, generator=generator)[..., ::2]     # every other channel: not contiguous
    exact = x.double() @ linear.weight.double().T + (linear.bias.double() if bias else 0)
    with OperatorNames() as names, torch.no_grad():
        out = linear(x)
    assert ("_linear_pointwise" in names.seen) == torch.backends.mkldnn.is_available()
    assert out.shape == exact.shape and ((out - exact).abs() < 1e-4).all()
    out = linear(x)                                              # with gradients
    assert out.requires_grad and ((out - exact).abs() < 1e-4).all()
    with torch.no_grad():
        assert ((linear.double()(x.double()) - exact).abs() < 1e-9).all()


RAGGED = """
import torch
import linear
from linear import Linear
linear.SMALL = 0
memory = lambda: int(open("/proc/self/statm").read().split()[1]) * 4096 / 2 ** 20
layers = [Linear(256, 256), Linear(256, 512)]
with torch.no_grad():
    for layer in layers:
        layer.weight.zero_()
        layer.bias.zero_()
    for rows in range(1, 900):
        for layer in layers:
            layer(torch.zeros(rows, 256))
        if rows == 400:
            before = memory()
print(memory() - before)
"""


def test_memory_does_not_grow_with_every_new_number_of_rows():
    """A program compiled and kept for each number of rows: gigabytes after some thousand ragged batches."""
    done = subprocess.run([sys.executable, "-c", RAGGED], cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert float(done.stdout) < 250, done.stderr                 # MB; 22 to 107 of nine runs, without a bound 558
