"""The same weights in Hugging Face transformers, for bench.py --peer: a process of its own per way to run them.

A worker does what a line on its standard input says and answers with the seconds that it took.
"""
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from console import InputError, run

import torch
from tqdm import tqdm

from load_weights import load_model


def wait_for(device):
    """Until a GPU has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def worker(kind, folder, device, dtype):
    """Load the model as `kind` ("ours", or "eager", "sdpa" of transformers), report time and memory of the host; then,
    but for "ours", time the work that each line of standard input asks for."""
    device, dtype = torch.device(device), getattr(torch, dtype)

    def memory():                                                # MB, the most so far (Linux; getrusage: its parent's)
        status = Path("/proc/self/status")
        return int(status.read_text().split("VmHWM:")[1].split()[0]) / 1024 if status.exists() else float("nan")

    if kind == "ours":
        load = lambda: load_model(folder, device=device, dtype=dtype)
    else:
        from transformers import AutoModelForCausalLM
        load = lambda: AutoModelForCausalLM.from_pretrained(folder, attn_implementation=kind, dtype=dtype).to(device)
    before, started = memory(), time.perf_counter()
    model = load()
    wait_for(device)
    print(json.dumps({"seconds": time.perf_counter() - started, "peak_mb": memory() - before}), flush=True)
    for line in sys.stdin if kind != "ours" else ():
        work, batch, length, steps = json.loads(line)
        draw = torch.Generator().manual_seed(0)
        ids = torch.randint(0, model.config.vocab_size, (batch, length), generator=draw).to(device)
        with torch.no_grad():
            if work == "prefill":
                started = time.perf_counter()
                model(ids, use_cache=True, logits_to_keep=1)
            else:
                out = model(ids, use_cache=True, logits_to_keep=1)
                wait_for(device)
                started = time.perf_counter()
                for _ in range(steps):
                    new = out.logits[:, -1].argmax(-1, keepdim=True)
                    out = model(new, past_key_values=out.past_key_values, use_cache=True)
        wait_for(device)
        print(json.dumps({"seconds": time.perf_counter() - started}), flush=True)


class Peer:
    """A worker process; ask() sends it work and waits for the seconds it took. dtype: a torch.dtype."""

    def __init__(self, kind, folder, device="cpu", dtype=torch.float32):
        command = [sys.executable, __file__, kind, str(folder), str(device), str(dtype).removeprefix("torch.")]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        stderr=subprocess.DEVNULL, text=True)
        self.loaded = self.answer()

    def answer(self):
        line = self.process.stdout.readline()
        if not line:
            raise InputError("the peer process stopped; to see why: python bench_peer.py sdpa FOLDER cpu float32")
        return json.loads(line)

    def ask(self, *work):
        try:
            print(json.dumps(work), file=self.process.stdin, flush=True)
        except BrokenPipeError:                                  # it has stopped: answer() says so
            pass
        return self.answer()["seconds"]

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def bench_peer(folder, works, steps, repeats, *where):
    """Ours without gates against transformers: loading, prefill, cached decoding. Rows; ratio > 1: ours is faster.

    works: [("prefill" or "decode", (B, S), ours() -> seconds)]; steps: of decoding; where: device and dtype of both.
    """
    loads = {"ours": [], "sdpa": []}
    for _ in range(repeats):                                     # a fresh process each: the imports are not timed
        for kind in loads:
            peer = Peer(kind, folder, *where)
            loads[kind].append((peer.loaded["seconds"], peer.loaded["peak_mb"]))
            peer.close()
    (ours, our_mb), (theirs, their_mb) = ([statistics.median(column) for column in zip(*loads[kind])] for kind in loads)
    print(f"\nloading: ours {ours:.2f} s, {our_mb:.0f} MB; transformers {theirs:.2f} s, {their_mb:.0f} MB: "
          f"ratio {theirs / ours:.2f}")
    same = {"skipped": 0.0, "gate": "none", "compute": "compact", "ideal": None}
    rows = [{"work": "load", "batch": 0, **same, "ratio": theirs / ours, "peer": "from_pretrained", "seconds": theirs,
             "peak_mb": their_mb, "our_peak_mb": our_mb}]
    peers = {kind: Peer(kind, folder, *where) for kind in ("eager", "sdpa")}
    for work, (batch, length), ours in works:
        took = {"ours": [], "eager": [], "sdpa": []}
        for _ in tqdm(range(repeats), desc=f"{work} against transformers", leave=False):
            took["ours"].append(ours())
            for kind, peer in peers.items():
                took[kind].append(peer.ask(work, batch, length, steps))
        mine = statistics.median(took["ours"])
        for kind in peers:
            theirs = statistics.median(took[kind])
            print(f"{work:8} {batch:3} x {length:<4} ours {mine:.3f} s, transformers {kind} {theirs:.3f} s: "
                  f"ratio {theirs / mine:.2f}", flush=True)
            rows.append({"work": work, "batch": batch, **same, "ratio": theirs / mine,
                         "peer": f"transformers {kind}", "seconds": theirs})
    for peer in peers.values():
        peer.close()
    return rows


if __name__ == "__main__":
    run(lambda: worker(*sys.argv[1:]))
