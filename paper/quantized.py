"""A model whose matrices of attention and MLP are in 4 bits (four_bits.py), and its folder.

Embeddings, head, norms and gates stay as they are: scores are told apart by their third decimal. The authors of
GateSkip ran int4 of optimum-quanto on gates, too, on all but the head. Saved is memory, and no multiply-accumulates.

Shapes: O, I output and input width of a matrix; G blocks of weights that share a scale.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from console import InputError

import torch
import torch.nn.functional as F
from torch import nn

import load_weights
from four_bits import blocks_of, eight_bits, from_eight_bits, int4, nf4, pack, size_of_blocks, unpack
from linear import Linear
from read_config import read_json

KINDS, METHOD = ("nf4", "int4"), "gateskip"                      # METHOD: this file in config.json


# ---------------------------------------------------------------------------------------------------------------------
# A model of such weights
# ---------------------------------------------------------------------------------------------------------------------

class QuantLinear(nn.Module):
    """In a Linear's place: x W^T + b, (..., I) -> (..., O), with W in 4 bits. No gradient reaches W.

    Scales are float32, whatever W was and x is: float16 could overflow."""

    def __init__(self, linear, kind, double=False):
        super().__init__()
        self.kind, self.double, self.bias = kind, double, linear.bias
        self.out_features, self.in_features = linear.weight.shape
        blocks = blocks_of(linear.weight.detach(), kind)         # (G, size)
        if kind == "int4":
            codes, self.scale, self.zero = map(nn.Buffer, int4(blocks))
        else:
            codes, absmax = nf4(blocks)
            if double:
                self.scale, self.scale_of_scale, self.mean_of_scale = map(nn.Buffer, eight_bits(absmax))
            else:
                self.scale = nn.Buffer(absmax)                   # (G,)
        self.codes = nn.Buffer(pack(codes.flatten()))            # (G * size / 2,) uint8

    def dequantised(self):
        """W, (O, I) float32."""
        scale = from_eight_bits(self.scale, self.scale_of_scale, self.mean_of_scale) if self.double else self.scale
        size = size_of_blocks(self.kind, self.in_features)
        levels = unpack(self.codes, len(scale) * size, self.kind).view(-1, size)                 # (G, size)
        if self.kind == "int4":
            levels = levels - self.zero[:, None]
        w = (levels * scale[:, None]).flatten()
        return w[:self.out_features * self.in_features].view(self.out_features, self.in_features)

    def forward(self, x):
        return F.linear(x, self.dequantised().to(x.dtype), self.bias)


def matrices(model, of):
    """[(module, its attribute, the matrix)] of attention and MLP in all blocks; gates stand beside these."""
    return [(owner, name, matrix) for block in model.model["layers"] for owner in (block.self_attn, block.mlp)
            for name, matrix in owner.named_children() if isinstance(matrix, of)]


@torch.no_grad()
def quantize(model, kind, double=False):
    """Put a QuantLinear in the place of each matrix of attention and MLP, in place. kind: "nf4" | "int4"; double: of
    nf4 only. Frozen thresholds are then those of other weights (recalibrate.py). InputError for another kind, and for
    a model that is quantised."""
    if kind not in KINDS or double not in (True, False) or (double and kind != "nf4"):
        raise InputError(f"kind {kind!r:.60}, double {double!r:.60}: there are nf4, nf4 double, and int4")
    if matrices(model, QuantLinear):
        raise InputError("this model is quantised: take the one that it was made from")
    for owner, name, linear in matrices(model, Linear):
        setattr(owner, name, QuantLinear(linear, kind, double))


def tensors_of(module):
    """{name: tensor} of all that a module is made of, a tied head once."""
    return dict(module.named_parameters()) | dict(module.named_buffers())


def memory_of(*modules):
    """Bytes that are held for the tensors of modules, as measured: the storages behind them, each once."""
    storages = [tensor.untyped_storage() for module in modules for tensor in tensors_of(module).values()]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


# ---------------------------------------------------------------------------------------------------------------------
# Its folder
# ---------------------------------------------------------------------------------------------------------------------

def save_quantized(model, folder, tokenizer=None):
    """save_model of a quantised model. By quantization_config in its config.json other programs know to refuse it."""
    of = matrices(model, QuantLinear)[0][2]
    model.raw_config["quantization_config"] = {"quant_method": METHOD, "kind": of.kind, "double": of.double}
    load_weights.save_model(model, folder, tokenizer, tensors_of(model))


def is_quantized(source):
    """Whether a folder (a run's --out, or hub id) names save_quantized in its config.json."""
    how = read_json(load_weights.find_folder(source) / "config.json").get("quantization_config")
    return isinstance(how, dict) and how.get("quant_method") == METHOD


def open_quantized(folder, device="cpu", dtype=torch.float32):
    """The Model that save_quantized wrote, in eval mode; no matrix is ever there in full. dtype: of embeddings, norms
    and products; gates stay float32. InputError for a folder of another kind, or a damaged one."""
    folder = load_weights.find_folder(folder)
    raw = read_json(folder / "config.json")
    how = raw.pop("quantization_config", None)
    if not is_quantized(folder):
        raise InputError(f"{folder} was not written by paper/quantize.py: it opens like any other model, or nowhere")
    model = load_weights._meta_model(folder / "config.json", raw, None)
    quantize(model, how.get("kind"), how.get("double"))          # on the meta device: names, shapes and dtypes only
    model.raw_config = raw | {"quantization_config": how}
    files, wanted = load_weights.weight_files(folder), tensors_of(model)
    if odd := sorted(set(files) ^ set(wanted)):
        raise InputError(f"{folder}: the weights do not fit config.json, such as {odd[0]}: quantise again")
    for key, like in wanted.items():
        tensor, its = load_weights._read(files[key], key), isinstance(like, nn.Parameter)
        fits = tensor.is_floating_point() if its else tensor.dtype == like.dtype # a parameter is cast
        if tensor.shape != like.shape or not fits:
            raise InputError(f"{files[key]}: tensor {key} is {tensor.dtype} {tuple(tensor.shape)}, config.json implies "
                             f"{like.dtype} {tuple(like.shape)}: quantise again")
        if not tensor.isfinite().all():
            raise InputError(f"{files[key]}: tensor {key} holds numbers that are not finite: quantise again")
        if its:
            load_weights._assign(model, key, tensor, dtype, device)
        else:
            name, _, leaf = key.rpartition(".")
            setattr(model.get_submodule(name), leaf, tensor.to(device, copy=True))
    return model.eval()
