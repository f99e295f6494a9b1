"""Several GPUs: `torchrun --nproc-per-node N train.py …`, through torch's own FSDP2. A plain run never imports this.

A rank is one of the N processes. It holds 1/N of every weight, gradient and moment, and runs its own N-th of a step's
examples; the weights of a block are gathered while it runs. Rank 0 alone writes and prints.
"""
import mmap
import os
import re
import sys
import tempfile
import warnings
from contextlib import suppress
from datetime import timedelta

from console import InputError

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils import serialization


class Ranks:
    """This process among all of them: what the loop asks for (train.py), and what is saved (checkpoint.py)."""

    def __init__(self, rank, world):
        self.rank, self.world = rank, world
        serialization.config.load.mmap = True                    # saved moments stay on disk until cut

    def device(self, args):
        """The name of this rank's device. InputError for flags that several ranks cannot follow."""
        examples = args.batch_size * args.grad_accum
        if examples % self.world:
            raise InputError(f"--batch-size {args.batch_size} times --grad-accum {args.grad_accum}: {self.world} ranks "
                             f"cannot share {examples} examples evenly: make it a multiple of {self.world}")
        if args.compile:
            raise InputError("--compile has not been tried with several ranks: leave it out")
        kind = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
        if ":" in kind:
            raise InputError(f"--device {kind} for all ranks: leave the number out, each takes its own")
        return f"cuda:{os.environ['LOCAL_RANK']}" if kind == "cuda" else kind

    def shard(self, model, device):
        """Cut a model that lies whole on the CPU of each rank; block by block, so that no GPU ever holds the whole."""
        if device.type == "cuda":
            torch.cuda.set_device(device)
        warnings.filterwarnings("ignore", "FSDP2-wrapped module")        # V is a view; nothing writes into it
        mesh = dist.device_mesh.init_device_mesh(device.type, (self.world,))
        for block in model.model["layers"]:
            block.register_forward_hook(_hang)                   # comes before FSDP's own
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)

    def wait(self):
        """Until all are here: a sum of nothing, on the CPU, since no GPU may have been chosen yet."""
        dist.all_reduce(torch.zeros(()))

    def _gather(self, x):
        """x of the same shape on every rank -> the list of all ranks' x."""
        pieces = [torch.empty_like(x) for _ in range(self.world)]
        dist.all_gather(pieces, x)
        return pieces

    def gather(self, scores, valid):
        """scores (2L, n), valid (n,) of this rank, n its own -> those of all ranks with some padding, (2L, N), (N,)."""
        most = max(self._gather(torch.tensor(len(valid), device=valid.device))).item()
        mine = F.pad(torch.cat([scores, valid[None]]), (0, most - len(valid)))   # (2L + 1, most): padding is not valid
        joined = torch.cat(self._gather(mine), -1)
        return joined[:-1], joined[-1] > 0

    def agree(self, sums, norm, came):
        """(sums over all ranks, norm as a plain tensor, the signal that came to any rank): the same on each."""
        signal = sums["ce"].new_tensor(max(came, default=0))
        everyone = torch.stack(self._gather(torch.stack([*sums.values(), signal])))              # (ranks, sums + 1)
        signal = int(everyone[:, -1].max())
        return dict(zip(sums, everyone.sum(0))), norm.full_tensor(), [signal] if signal else []

    def whole(self, model, optimizer, folder):
        """({name: weight}, the optimizer's state) of rank 0, sent there piece by piece: in nameless files in `folder`
        and not in memory. The others get None for each tensor. OSError on a full disk."""
        saved = optimizer.state_dict()
        saved["state"] = {i: {key: self._whole(x, folder) for key, x in entry.items()}
                          for i, entry in saved["state"].items()}
        return {name: self._whole(p.detach(), folder) for name, p in model.named_parameters()}, saved

    def _whole(self, x, folder):
        if not isinstance(x, DTensor):                           # a count of steps
            return x
        piece = x.to_local().cpu()                               # its rows: none where there are fewer than ranks
        if self.rank:
            return dist.send(piece, 0) if len(piece) else None
        with tempfile.TemporaryFile(dir=folder) as file:
            size = x.numel() * x.element_size()
            os.posix_fallocate(file.fileno(), 0, size)           # a full disk is an error here, and later a SIGBUS
            whole = torch.frombuffer(mmap.mmap(file.fileno(), size), dtype=x.dtype).view(x.shape)
        for rank, rows in enumerate(whole.chunk(self.world)):
            dist.recv(rows, rank) if rank else rows.copy_(piece)
        return whole

    def cut(self, optimizer, saved):
        """Replace whole moments, as saved, by this rank's pieces of them."""
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        for p, entry in zip(trained, saved["state"].values()):
            for key in ("exp_avg", "exp_avg_sq"):
                entry[key] = distribute_tensor(entry[key].to(p.device), p.device_mesh, p.placements,
                                               src_data_rank=None).clone()       # not a view of the whole

    def leave(self, optimizer):
        """Part from the others, and with the memory."""
        dist.destroy_process_group()
        optimizer.state.clear()


def _hang(block, _, output):
    """Hang the trained weights of a block on its h, with no effect: a branch that one rank skips has no gradients
    there, and all must reduce the same ones."""
    h, *rest = output
    hung = [p.flatten()[:0] for p in block.parameters() if p.requires_grad]
    return h + torch.cat(hung).sum() if hung else h, *rest


def on_every_rank(main):
    """The main of a rank, for console.run: of all that end with an error, one says why."""
    def ranked():
        store, rank, world = next(dist.rendezvous("env://"))
        streams, patience = (sys.stdout, sys.stderr), timedelta(days=1)          # torchrun sees who dies
        if rank:
            sys.stdout = sys.stderr = open(os.devnull, "w")
        try:
            dist.init_process_group(store=dist.PrefixStore("train", store), rank=rank, world_size=world,
                                    timeout=patience)
            return main(ranks=Ranks(rank, world))
        except (Exception, KeyboardInterrupt) as error:
            sys.stdout, sys.stderr = streams
            with suppress(RuntimeError):                         # torchrun has gone too
                if store.add("told", 1) > 1:
                    raise SystemExit(1) from None
            if isinstance(error, RuntimeError) and re.search("gloo|NCCL|c10d", str(error)):
                why = " ".join(str(error).split())[:200]
                raise InputError(f"another rank has died: --resume goes on from what was saved last ({why})") from None
            raise
    return ranked
