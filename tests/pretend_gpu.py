"""A GPU that is not there: tensors that say they are on `cuda`, hold the CPU's numbers, and refuse what a GPU refuses.

    with pretended() as seen:
        train.main([..., "--device", "cuda"])

An operation on tensors of both devices, numpy of a tensor there and the other device's generator raise AssertionError,
as they would fail on a GPU. `seen` counts what makes the host and a GPU wait or talk, by the line that asked for it.
Numbers are the CPU's, so a command that runs here must give what it gives there. Beneath autograd a tensor is the
CPU's: what torch itself decides by its device is decided as on a CPU, and speed and memory mean nothing.
"""
import contextlib
import sys
from collections import Counter
from pathlib import Path
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode

GPU, CPU = torch.device("cuda:0"), torch.device("cpu")
ROOT = Path(__file__).resolve().parents[1]
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique_dim", "bincount")
MOVES = ("copy_", "_to_copy")                                    # between devices is what they are for
BY_INDEX = ("index", "index_put", "index_put_", "_index_put_impl_")              # a CPU's index is taken along


class OnGpu(torch.Tensor):
    """Wraps the CPU tensor `there`."""

    @staticmethod
    def __new__(cls, there, requires_grad=False):
        return cls._make_wrapper_subclass(cls, there.size(), strides=there.stride(), dtype=there.dtype, device=CPU,
                                          storage_offset=there.storage_offset(), requires_grad=requires_grad)

    def __init__(self, there, requires_grad=False):
        self.there = there

    device, is_cuda = property(lambda self: GPU), property(lambda self: True)

    def __repr__(self):
        return f"{self.there}, on a GPU"

    def __reduce_ex__(self, protocol):                           # files of a GPU's tensors are read with map_location
        return self.there.__reduce_ex__(protocol)

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        name, kwargs = op._schema.name.split("::")[1], {k: v for k, v in (kwargs or {}).items() if k != "device"}
        tensors, indices = [], [i for i in args[1] if i is not None] if name in BY_INDEX else []
        there = lambda x: tensors.append(x) or getattr(x, "there", x)
        words, flags = each(there, args), {key: each(there, value) for key, value in kwargs.items()}
        strangers = [x for x in tensors if not isinstance(x, OnGpu) and (x.dim() or name in ("cat", "stack"))]
        if strangers and name not in MOVES:
            assert indices and isinstance(args[0], OnGpu), f"{op}: tensors of the CPU and of the GPU: {tensors}"
        if name in WAITS or any(i.dtype == torch.bool for i in indices):         # how many are true?
            note(name)
        elif strangers:
            note(f"{name} from the host")
        out = op(*words, **flags)
        return args[0] if out is not None and op._schema.is_mutable else each(OnGpu, out)


def each(change, x):
    """x with its tensors changed, in lists and tuples too."""
    return change(x) if is_tensor(x) else type(x)(each(change, y) for y in x) if type(x) in (list, tuple) else x


is_tensor = lambda x: isinstance(x, torch.Tensor)
is_gpu = lambda device: isinstance(device, (str, torch.device)) and torch.device(device).type == "cuda"


class Up(torch.autograd.Function):
    forward, backward = staticmethod(lambda _, x: OnGpu(x.detach().clone())), staticmethod(lambda _, g: g.there)


class Down(torch.autograd.Function):
    forward, backward = staticmethod(lambda _, x: x.there.detach().clone()), staticmethod(lambda _, g: OnGpu(g))


def moved(x, name, *args, **kwargs):
    """x.to(...), x.cpu() or x.cuda()."""
    given = [*args, *kwargs.values()]
    like = next((y for y in given if is_tensor(y)), None)
    target = {"cpu": CPU, "cuda": GPU}.get(name) or next((y for y in given if isinstance(y, (str, torch.device))), None)
    if like is not None:
        target, given = like.device, [like.dtype]
    dtype = next((y for y in given if isinstance(y, torch.dtype)), x.dtype)
    x = torch.Tensor.to(x, dtype, copy=kwargs.get("copy", False))
    if target is None or is_gpu(target) == isinstance(x, OnGpu):
        return x
    note("to the GPU" if is_gpu(target) else "to the host")
    return (Up if is_gpu(target) else Down).apply(x)


class Calls(TorchFunctionMode):
    """What Python calls of torch, above autograd: here a device can be named."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name, kwargs = getattr(function, "__name__", ""), dict(kwargs or {})
        mine = bool(args) and isinstance(args[0], OnGpu)
        if name in ("to", "cpu", "cuda"):
            return moved(args[0], name, *args[1:], **kwargs)
        if name == "tolist" and mine:
            note("tolist")
            return args[0].there.tolist()
        assert not (mine and name in ("numpy", "__array__")), "numpy of a tensor that is on a GPU"
        there = is_gpu(kwargs.get("device"))
        if kwargs.get("generator") is not None:
            of = any(isinstance(x, OnGpu) for x in args) or there
            assert is_gpu(kwargs["generator"].device) == of, f"{name}: the other device's generator"
        if not there:
            return function(*args, **kwargs)
        if name in ("tensor", "as_tensor"):
            note("to the GPU")
        grad = kwargs.pop("requires_grad", False)
        return OnGpu(function(*args, **kwargs | {"device": CPU}), grad)


class Generator(torch.Generator):
    def __new__(cls, device="cpu"):
        new = super().__new__(cls, "cpu")
        new.on_gpu = is_gpu(device)
        return new

    device = property(lambda self: GPU if self.on_gpu else CPU)


SEEN = Counter()


def note(what):
    """Count it for the project's line that asked for it."""
    frame = sys._getframe(1)
    while frame and (Path(frame.f_code.co_filename).parent not in (ROOT, ROOT / "paper")):
        frame = frame.f_back
    SEEN[what, Path(frame.f_code.co_filename).stem if frame else ""] += 1


@contextlib.contextmanager
def pretended():
    """A context with one GPU, the default device of the commands; yields a Counter of (what, module)."""
    SEEN.clear()
    with Calls(), mock.patch.object(torch.__future__, "_overwrite_module_params_on_conversion", True), \
            mock.patch.object(torch, "Generator", Generator), \
            mock.patch.object(torch.cuda, "is_available", lambda: True), \
            mock.patch.object(torch.cuda, "device_count", lambda: 1), \
            mock.patch.object(torch.cuda, "synchronize", lambda device=None: note("synchronize")):
        yield SEEN
