"""One product, x W^T + b, and oneDNN's way to it on a CPU."""
import os

import torch
import torch.nn.functional as F
from torch import nn

# weights: below, oneDNN's time per call is not repaid (NOTES.md: how much smaller its lead is without AVX-512)
SMALL = 2 ** (16 if "AVX512" in torch.backends.cpu.get_cpu_capability() else 21)
# oneDNN, and torch's layer above it, compile a program for each new number of rows and keep 1024 of them, a MB each
for _cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):         # read at the first product
    os.environ.setdefault(_cache, "256")


class Linear(nn.Linear):
    """x W^T + b, (..., in) -> (..., out). Construction draws no weights: init_weights or a checkpoint fills them."""

    def reset_parameters(self):
        pass

    def forward(self, x):
        if (x.device.type == "cpu" and x.dtype == torch.float32 and self.weight.numel() >= SMALL
                and not torch.is_grad_enabled() and torch.backends.mkldnn.is_available()):
            return onednn(x, self.weight, self.bias)
        return F.linear(x, self.weight, self.bias)


def onednn(x, weight, bias):
    """The product by oneDNN: float32 like PyTorch's default BLAS, but with AVX-512 1.3 to 3 times as fast for the few
    rows that skipping leaves (NOTES.md). It has no gradient. The operator is torch's own, made for torch.compile."""
    activation, its_scalars, its_algorithm = "none", [], ""      # it could also apply one to the product
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, its_scalars, its_algorithm)
