"""How much time skipping saves: the same work in one run, interleaved, as ratios of medians.

    python bench.py --quick                                   # under a minute
    python bench.py                                           # four of Llama-3.2-1B's layers, random weights
    python bench.py --model FOLDER --peer transformers        # a real model, and the same weights in transformers
    python bench.py --counts                                  # parameters and MACs of every gate form, on paper

Speed does not depend on what the weights say: fresh gates rank the tokens and exactly the share asked for is skipped
(topk). A single stream has nothing to rank and skips recorded random branches, so that speed is not mixed up with accuracy.

Shapes: B batch, S sequence, L layers.
"""
import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from gates import Gate, GateConfig, InputError, SkipPolicy, count_macs
from generate import pick_device, pyplot
from load_weights import load_model
from model import SHAPES, KVCache, Model, ModelConfig

BENCH_SHAPES = {
    "llama-1b-block": replace(SHAPES["llama-3.2-1b"], num_hidden_layers=4, vocab_size=4096),
    "small": ModelConfig(512, 512, 1536, 4, 8, 4, 64),
}
GATES = {"none": None, "vector": GateConfig(), "lowrank": GateConfig(arch="lowrank"), "scalar": GateConfig("scalar")}
SKIPPED = (0.0, 0.15, 0.25, 0.35, 0.5, 0.7)
CONTEXT, STEPS = 256, 16                                         # of decoding


# ---------------------------------------------------------------------------------------------------------------------
# On paper
# ---------------------------------------------------------------------------------------------------------------------

def counts_table():
    """The paper's Table 13 with true sizes: lines of a Markdown table, a row per model and gate form.

    Saved: multiply-accumulates at 15% of (token, branch) pairs skipped, head included, gates paid; short context, so that
    query-key products (keys=0) do not count.
    """
    lines = ["| model | gate | gate parameters | of the model | of a block's MACs | MACs saved at 15%, K and V copied up / computed |",
             "|---|---|---|---|---|---|"]
    valid = torch.ones(1, 100, dtype=torch.bool)                 # (B, S)
    for name, shape in SHAPES.items():
        keep = (torch.arange(100) < 85).expand(2 * shape.num_hidden_layers, 1, 100)      # (2L, B, S)
        everyone = valid.expand_as(keep)
        dense = count_macs(shape, everyone, valid, 0, 100)
        block = count_macs(replace(shape, num_hidden_layers=1), everyone[:2], valid, 0, 0) / 100
        for form in [form for form in GATES if form != "none"]:
            gate, hidden = GATES[form], shape.hidden_size
            with torch.device("meta"):
                sizes = {key: p.numel() for key, p in Model(replace(shape, gate=gate)).named_parameters()}
            n_gates = sum(n for key, n in sizes.items() if "_gate." in key)
            saved = [1 - count_macs(shape, keep, valid, 0, 100, kv, gate) / dense for kv in ("copy_up", "dense")]
            label = f"vector, rank {gate.widths(hidden)[0]}" if form == "lowrank" else form
            lines.append(f"| {name} | {label} | {n_gates:,} | {n_gates / (sum(sizes.values()) - n_gates):.2%} | "
                         f"{2 * gate.macs(hidden) / block:.2%} | {saved[0]:+.1%} / {saved[1]:+.1%} |")
    return lines


# ---------------------------------------------------------------------------------------------------------------------
# The work: each maker prepares, and returns run() -> traces, which does it once
# ---------------------------------------------------------------------------------------------------------------------

def with_gate(model, form):
    """The same backbone, its parameters shared and not copied, under fresh gates of another form (a key of GATES)."""
    with torch.device("meta"):
        twin = Model(replace(model.config, gate=GATES[form]))
    device = model.model["embed_tokens"].weight.device
    for name, module in twin.named_modules():
        if isinstance(module, Gate):
            module.to_empty(device=device)
        elif module._parameters:                                 # a norm, a projection, the embedding, the head
            if "_gate." not in name:
                module._parameters = model.get_submodule(name)._parameters
    twin.init_gates(torch.Generator(device).manual_seed(0))
    return twin.eval()


def policies_for(model, batch, skipped, calls):
    """One SkipPolicy a call: topk, or for a single row masks that skip exactly this share of the (call, branch) pairs."""
    if skipped == 0 or batch > 1:
        return [SkipPolicy("topk", 1 - skipped)] * calls
    branches, device = 2 * model.config.num_hidden_layers, model.model["embed_tokens"].weight.device
    rank = torch.rand(calls * branches, generator=torch.Generator().manual_seed(0)).argsort().argsort()
    keep = (rank >= round(skipped * len(rank))).view(calls, branches, 1, 1).to(device)
    return [SkipPolicy("given", masks=list(masks)) for masks in keep]


def rewind(cache, length):
    """Forget what lies beyond the first `length` tokens of every row."""
    cache.used, cache.uniform, cache.lengths = length, True, torch.full_like(cache.lengths, length)


def prefill(model, ids, skipped, compute):
    """Read ids (B, S) into an empty cache; logits of the last position."""
    cache = KVCache(model.config, *ids.shape, ids.device, model.model["embed_tokens"].weight.dtype)
    policy = policies_for(model, ids.numel(), skipped, 1)[0]

    @torch.no_grad()
    def run():
        rewind(cache, 0)
        return [model(ids, cache=cache, policy=policy, compute=compute, logits="last")[1]]
    return run


def decode(model, ids, skipped, compute):
    """STEPS greedy steps after a context as long as ids (B, S); what K and V say does not matter, so they are drawn."""
    batch, context = ids.shape
    cache = KVCache(model.config, batch, context + STEPS, ids.device, model.model["embed_tokens"].weight.dtype)
    for stored in cache.k + cache.v:
        stored.normal_()
    policies = policies_for(model, batch, skipped, STEPS)

    @torch.no_grad()
    def run():
        rewind(cache, context)
        new, traces = ids[:, -1:], []                            # (B, 1)
        for policy in policies:
            logits, trace = model(new, cache=cache, policy=policy, compute=compute, logits="last")
            new = logits.argmax(-1, keepdim=True)                # (B, 1)
            traces.append(trace)
        return traces
    return run


def train(model, ids, skipped, compute):
    """One step on ids (B, S): forward, backward, clip, AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.001, fused=True)
    policy = policies_for(model, ids.numel(), skipped, 1)[0]

    def run():
        logits, trace = model(ids, policy=policy, compute=compute, keep_gates=False)
        F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return [trace]
    return run


MAKERS = {"prefill": prefill, "decode": decode, "train": train}


def measure(runs, repeats, device, label):
    """{key: run} -> {key: (median seconds, what run returned last)}: one round after another, every run once a round."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    seconds, last = {key: [] for key in runs}, {}
    for _ in tqdm(range(repeats), desc=label, leave=False):
        for key, run in runs.items():
            wait()
            started = time.perf_counter()
            last[key] = run()
            wait()                                               # the only synchronisation that timing adds
            seconds[key].append(time.perf_counter() - started)
    return {key: (statistics.median(values), last[key]) for key, values in seconds.items()}


def bench(models, main, work, ids, skipped, forms, args):
    """One kind of work under every setting, interleaved. models: {gate form: Model}. Returns rows (dicts) and prints them."""
    settings = [("none", 0.0, "compact")] + [(main, s, c) for s in skipped for c in ("compact", "masked")]
    settings += [(form, s, "compact") for form in forms for s in (0.0, 0.5)]
    settings = list(dict.fromkeys(settings))
    label = f"{work} {ids.shape[0]} x {ids.shape[1]}"
    timed = measure({s: MAKERS[work](models[s[0]], ids, *s[1:]) for s in settings}, args.repeats, ids.device, label)

    def macs(key):
        config = models[key[0]].config
        return sum(int(count_macs(config, torch.stack(t.keep), t.valid, t.keys, t.logit_rows, t.kv, config.gate)) for t in timed[key][1])

    rows = []
    for gate, share, compute in settings:
        key, full = (gate, share, compute), (gate, 0.0, "compact")
        kept = torch.cat([torch.stack(t.keep).flatten() for t in timed[key][1]]).double().mean().item()
        rows.append({"work": work, "batch": ids.shape[0], "length": ids.shape[1], "gate": gate, "compute": compute, "asked": share,
                     "skipped": round(1 - kept, 4), "seconds": timed[key][0], "ratio": timed[full][0] / timed[key][0],
                     "ideal": macs(full) / macs(key) if compute == "compact" else 1.0,
                     "over_ungated": timed["none", 0.0, "compact"][0] / timed[key][0], "peer": None})
    for r in rows:
        if r["compute"] == "masked":
            continue
        masked = next((m["seconds"] for m in rows if m["compute"] == "masked" and (m["gate"], m["asked"]) == (r["gate"], r["asked"])), None)
        print(f"{r['work']:8} {r['batch']:3} x {r['length']:<4} {r['gate']:8} {r['skipped']:7.1%} {'' if masked is None else f'{masked:.3f}':>9} "
              f"{r['seconds']:9.3f} {r['ratio']:7.2f} {r['ideal']:7.2f} {r['over_ungated']:8.2f}", flush=True)
    return rows


HEADER = "work     batch      gate     skipped  masked s  compact s  ratio   ideal  over ungated"


def plot(rows, path):
    """Ratio over budget 1.0 against what was skipped, with the ideal dashed."""
    plt = pyplot()
    if plt is None:
        return
    figure, axis = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    main = next(r["gate"] for r in rows if r["compute"] == "masked")
    for number, (work, batch) in enumerate(dict.fromkeys((r["work"], r["batch"]) for r in rows if not r["peer"])):
        line = lambda compute, key: zip(*sorted((100 * r["skipped"], r[key]) for r in rows if (
            r["work"], r["batch"], r["gate"], r["compute"], r["peer"]) == (work, batch, main, compute, None)))
        if number == 0:                                          # of the first work only: the others' lie on top of them
            axis.plot(*line("compact", "ideal"), "--", color="grey", label=f"ideal ({work}, MACs)")
            axis.plot(*line("masked", "ratio"), ":", color="grey", label=f"masked ({work})")
        axis.plot(*line("compact", "ratio"), "o-", color=f"C{number}", markersize=4, label=f"{work}, batch {batch}")
    axis.set(xlabel="(token, branch) pairs skipped, %", ylabel="times as fast as budget 1.0")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


# ---------------------------------------------------------------------------------------------------------------------
# The same weights elsewhere. A process of its own per peer, which does what a line on its standard input says
# ---------------------------------------------------------------------------------------------------------------------

def worker(kind, folder):
    """Load the model as `kind` ("ours", "eager", "sdpa": transformers), report time and memory, then time work on request."""
    def memory():                                                # MB, the most so far (Linux; getrusage would count the parent's)
        status = Path("/proc/self/status")
        return int(status.read_text().split("VmHWM:")[1].split()[0]) / 1024 if status.exists() else float("nan")

    if kind != "ours":
        from transformers import AutoModelForCausalLM
    before, started = memory(), time.perf_counter()
    if kind == "ours":
        load_model(folder)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=kind, dtype=torch.float32)
    print(json.dumps({"seconds": time.perf_counter() - started, "peak_mb": memory() - before}), flush=True)
    for line in sys.stdin:
        work, batch, length = json.loads(line)
        ids = torch.randint(0, model.config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            if work == "prefill":
                started = time.perf_counter()
                model(ids, use_cache=True, logits_to_keep=1)
            else:
                out = model(ids, use_cache=True, logits_to_keep=1)
                started = time.perf_counter()
                for _ in range(STEPS):
                    out = model(out.logits[:, -1].argmax(-1, keepdim=True), past_key_values=out.past_key_values, use_cache=True)
        print(json.dumps({"seconds": time.perf_counter() - started}), flush=True)


class Peer:
    """A worker process; ask() sends it work and waits for the seconds it took."""

    def __init__(self, kind, folder):
        self.process = subprocess.Popen([sys.executable, __file__, "--worker", kind, "--model", str(folder)],
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        self.loaded = self.answer()

    def answer(self):
        line = self.process.stdout.readline()
        if not line:
            raise InputError(f"the peer process stopped; to see why: python bench.py --worker sdpa --model FOLDER")
        return json.loads(line)

    def ask(self, *work):
        print(json.dumps(work), file=self.process.stdin, flush=True)
        return self.answer()["seconds"]

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def bench_peer(model, folder, works, args):
    """Ours without gates against transformers (eager, sdpa): loading, prefill, cached decoding. Rows; ratio > 1: ours is faster."""
    rows, loads = [], {"ours": [], "sdpa": []}
    for _ in range(args.repeats):                                # a fresh process each: the imports are not timed
        for kind in loads:
            peer = Peer(kind, folder)
            loads[kind].append((peer.loaded["seconds"], peer.loaded["peak_mb"]))
            peer.close()
    seconds = {kind: statistics.median(s for s, _ in values) for kind, values in loads.items()}
    memory = {kind: statistics.median(m for _, m in values) for kind, values in loads.items()}
    print(f"\nloading: ours {seconds['ours']:.2f} s, {memory['ours']:.0f} MB; transformers {seconds['sdpa']:.2f} s, {memory['sdpa']:.0f} MB: "
          f"ratio {seconds['sdpa'] / seconds['ours']:.2f}")
    rows.append({"work": "load", "batch": 0, "skipped": 0.0, "gate": "none", "compute": "compact", "ratio": seconds["sdpa"] / seconds["ours"],
                 "ideal": None, "peer": "from_pretrained", "seconds": seconds["sdpa"], "peak_mb": memory["sdpa"], "our_peak_mb": memory["ours"]})
    peers = {kind: Peer(kind, folder) for kind in ("eager", "sdpa")}
    for work, ids in works:
        mine = MAKERS[work](model, ids, 0.0, "compact")
        took = {"ours": [], "eager": [], "sdpa": []}
        for _ in tqdm(range(args.repeats), desc=f"{work} against transformers", leave=False):
            took["ours"].append(measure({0: mine}, 1, ids.device, "")[0][0])
            for kind, peer in peers.items():
                took[kind].append(peer.ask(work, *ids.shape))
        ours = statistics.median(took["ours"])
        for kind in peers:
            theirs = statistics.median(took[kind])
            print(f"{work:8} {ids.shape[0]:3} x {ids.shape[1]:<4} ours {ours:.3f} s, transformers {kind} {theirs:.3f} s: ratio {theirs / ours:.2f}", flush=True)
            rows.append({"work": work, "batch": ids.shape[0], "skipped": 0.0, "gate": "none", "compute": "compact", "ratio": theirs / ours,
                         "ideal": None, "peer": f"transformers {kind}", "seconds": theirs})
    for peer in peers.values():
        peer.close()
    return rows


def main(argv=None):
    p = argparse.ArgumentParser(description="How much time skipping saves.", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = p.add_argument
    add("--model", help="folder, a run's --out, or hub id; its own gates are replaced by fresh ones")
    add("--shape", choices=BENCH_SHAPES, default="llama-1b-block", help="random weights, where no --model is given")
    add("--gate", choices=[form for form in GATES if form != "none"], default="scalar",
        help="of the main rows; the others join at 0 and 50%%, except at batch 8 and in training")
    add("--work", nargs="+", choices=MAKERS, default=list(MAKERS))
    add("--repeats", type=int, default=3, help="interleaved rounds; medians are printed")
    add("--quick", action="store_true", help="the small shape, prefill of 2 x 256, 0 and 50%%")
    add("--counts", action="store_true", help="print the table of parameters and MACs, and stop")
    add("--peer", choices=("transformers",), help="also time the same weights there (pip install transformers; needs --model)")
    add("--json", metavar="FILE", help="write one row per measurement")
    add("--png", default="runs/bench.png", help="the curves")
    add("--device", help="default: cuda if there is one, else cpu")
    add("--dtype", choices=("float32", "bfloat16"), default="float32")
    add("--worker", help=argparse.SUPPRESS)
    args = p.parse_args(argv)
    if args.counts:
        print("\n".join(counts_table()))
        return 0
    if args.worker:
        return worker(args.worker, args.model)
    if args.repeats < 1:
        raise InputError("--repeats must be at least 1")
    if not args.png.endswith(".png"):
        raise InputError(f"--png {args.png} must end in .png")
    for path in filter(None, (args.png, args.json)):             # before the work, not after it
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    if args.peer and not args.model:
        raise InputError("--peer needs --model: a folder that transformers can open too")
    if args.peer and find_spec("transformers") is None:
        raise InputError("--peer transformers: it is not installed (pip install transformers)")

    device, dtype = pick_device(args.device, args.dtype)
    if args.model:
        model = load_model(args.model, device=device, dtype=dtype)
    else:
        with torch.device(device):
            model = Model(BENCH_SHAPES["small" if args.quick else args.shape]).to(dtype).eval()
        model.init_weights(torch.Generator(device).manual_seed(0))
    models = {form: with_gate(model, form) for form in GATES}
    ids = lambda *shape: torch.randint(0, model.config.vocab_size, shape, generator=torch.Generator().manual_seed(0)).to(device)
    others = [form for form in GATES if form not in ("none", args.gate)]
    if args.quick:
        plan = [("prefill", ids(2, 256), (0.0, 0.5), [])]
    else:
        plan = [("prefill", ids(8, 512), SKIPPED, others), ("decode", ids(1, CONTEXT), SKIPPED, others),
                ("decode", ids(8, CONTEXT), SKIPPED, []), ("decode", ids(32, CONTEXT), SKIPPED, others), ("train", ids(2, 256), (0.0, 0.3), [])]
    print(f"{args.model or ('small' if args.quick else args.shape)}, {torch.get_num_threads()} threads, medians of {args.repeats}\n\n{HEADER}")
    rows = []
    for work, tokens, skipped, forms in plan:
        if args.quick or work in args.work:
            rows += bench(models, args.gate, work, tokens, skipped, forms, args)
    if args.peer:
        rows += bench_peer(models["none"], args.model, [("prefill", ids(8, 512)), ("decode", ids(1, CONTEXT)), ("decode", ids(8, CONTEXT))], args)
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1))
    plot(rows, args.png)
    print(f"\nwritten: {args.png}" + (f", {args.json}" if args.json else ""))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (InputError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
