"""How much time skipping saves: the same work in one run, interleaved, as ratios of medians.

    python bench.py --quick                                   # under a minute
    python bench.py                                           # four of Llama-3.2-1B's layers, random weights
    python bench.py --model FOLDER --peer transformers        # a real model, and the same weights in transformers
    python bench.py --counts                                  # parameters and MACs of every gate form, on paper

Speed does not depend on what the weights say: fresh gates rank the tokens and exactly the share asked for is skipped
(topk). A single stream has nothing to rank and skips recorded random branches, so that speed is not mixed up with
accuracy.

Shapes: B batch, S sequence, L layers.
"""
import json
import os
import statistics
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from console import InputError, pick_device, pyplot, run
from flags import Parser, add_machine_flags, whole

import torch
import torch.nn.functional as F
from tqdm import tqdm

from bench_peer import bench_peer, wait_for
from disk import check_writable, write, write_figure
from gates import Gate, SkipPolicy
from load_weights import load_model
from model import Model, ModelConfig
from rows import KVCache
from savings import GATE_FORMS, SHAPES, counts_table, macs_of

BENCH_SHAPES = {
    "llama-1b-block": replace(SHAPES["llama-3.2-1b"], num_hidden_layers=4, vocab_size=4096),
    "small": ModelConfig(vocab_size=512, hidden_size=512, intermediate_size=1536, num_hidden_layers=4,
                         num_attention_heads=8, num_key_value_heads=4, head_dim=64),
}
GATES = {"none": None, **GATE_FORMS}
SKIPPED = (0.0, 0.15, 0.25, 0.35, 0.5, 0.7)
CONTEXT, STEPS = 256, 16                                         # of decoding


# ---------------------------------------------------------------------------------------------------------------------
# The work: each maker prepares, and returns once() -> traces, which does it once
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
    """One SkipPolicy a call: topk, or for a single row masks that skip exactly this share of (call, branch) pairs."""
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
    def once():
        rewind(cache, 0)
        return [model(ids, cache=cache, policy=policy, compute=compute, last=True)[1]]
    return once


def decode(model, ids, skipped, compute):
    """STEPS greedy steps after a context as long as ids (B, S); what K and V say does not matter, so they are drawn."""
    batch, context = ids.shape
    cache = KVCache(model.config, batch, context + STEPS, ids.device, model.model["embed_tokens"].weight.dtype)
    for stored in cache.k + cache.v:
        stored.normal_()
    policies = policies_for(model, batch, skipped, STEPS)

    @torch.no_grad()
    def once():
        rewind(cache, context)
        new, traces = ids[:, -1:], []                            # (B, 1)
        for policy in policies:
            logits, trace = model(new, cache=cache, policy=policy, compute=compute, last=True)
            new = logits.argmax(-1, keepdim=True)                # (B, 1)
            traces.append(trace)
        return traces
    return once


def train(model, ids, skipped, compute):
    """One step on ids (B, S): forward, backward, clip, AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.001, fused=True)
    policy = policies_for(model, ids.numel(), skipped, 1)[0]

    def once():
        logits, trace = model(ids, policy=policy, compute=compute, keep_gates=False)
        F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return [trace]
    return once


MAKERS = {"prefill": prefill, "decode": decode, "train": train}


def measure(runs, repeats, device, label):
    """{key: once} -> {key: (median seconds, what it returned last)}: round after round, every one once a round."""
    seconds, last = {key: [] for key in runs}, {}
    for _ in tqdm(range(repeats), desc=label, leave=False):
        for key, once in runs.items():
            wait_for(device)
            started = time.perf_counter()
            last[key] = once()
            wait_for(device)                                     # the only synchronisation that timing adds
            seconds[key].append(time.perf_counter() - started)
    return {key: (statistics.median(values), last[key]) for key, values in seconds.items()}


def bench(models, main_form, work, ids, skipped, forms, repeats):
    """One kind of work under every setting, interleaved. models: {gate form: Model}. Prints and returns rows."""
    settings = [("none", 0.0, "compact")] + [(main_form, s, c) for s in skipped for c in ("compact", "masked")]
    settings += [(form, s, "compact") for form in forms for s in (0.0, 0.5)]
    settings, (batch, length) = list(dict.fromkeys(settings)), ids.shape
    runs = {key: MAKERS[work](models[key[0]], ids, *key[1:]) for key in settings}
    timed = measure(runs, repeats, ids.device, f"{work} {batch} x {length}")
    seconds = {key: s for key, (s, _) in timed.items()}
    macs = {key: sum(int(macs_of(models[key[0]].config, t)) for t in traces) for key, (_, traces) in timed.items()}

    rows = []
    for key in settings:
        (gate, share, compute), full = key, (key[0], 0.0, "compact")
        kept = torch.cat([torch.stack(t.keep).flatten() for t in timed[key][1]]).double().mean().item()
        rows.append({"work": work, "batch": batch, "length": length, "gate": gate, "compute": compute, "asked": share,
                     "skipped": round(1 - kept, 4), "seconds": seconds[key], "ratio": seconds[full] / seconds[key],
                     "ideal": macs[full] / macs[key] if compute == "compact" else 1.0,
                     "over_ungated": seconds["none", 0.0, "compact"] / seconds[key], "peer": None})
    for r in rows:
        if r["compute"] == "compact":
            masked = seconds.get((r["gate"], r["asked"], "masked"))
            print(f"{work:8} {batch:3} x {length:<4} {r['gate']:8} {r['skipped']:7.1%} "
                  f"{'' if masked is None else f'{masked:.3f}':>9} {r['seconds']:9.3f} {r['ratio']:7.2f} "
                  f"{r['ideal']:7.2f} {r['over_ungated']:8.2f}", flush=True)
    return rows


HEADER = "work     batch      gate     skipped  masked s  compact s  ratio   ideal  over ungated"


def plot(rows, path):
    """Ratio over budget 1.0 against what was skipped, with the ideal dashed. True if drawn."""
    plt = pyplot()
    if plt is None:
        return
    figure, axis = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    main = next(r["gate"] for r in rows if r["compute"] == "masked")
    for number, (work, batch) in enumerate(dict.fromkeys((r["work"], r["batch"]) for r in rows if not r["peer"])):
        line = lambda compute, key: zip(*sorted((100 * r["skipped"], r[key]) for r in rows if (
            r["work"], r["batch"], r["gate"], r["compute"], r["peer"]) == (work, batch, main, compute, None)))
        if number == 0:                                          # of the first work only: the others' lie on top
            axis.plot(*line("compact", "ideal"), "--", color="grey", label=f"ideal ({work}, MACs)")
            axis.plot(*line("masked", "ratio"), ":", color="grey", label=f"masked ({work})")
        axis.plot(*line("compact", "ratio"), "o-", color=f"C{number}", markersize=4, label=f"{work}, batch {batch}")
    axis.set(xlabel="(token, branch) pairs skipped, %", ylabel="times as fast as budget 1.0")
    axis.grid(alpha=0.3)
    axis.legend()
    write_figure(path, figure)
    return True


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------

def parse_args(argv):
    p = Parser("How much time skipping saves.")
    add = p.add_argument
    add("--model", help="folder, a run's --out, or hub id; its own gates are replaced by fresh ones")
    add("--shape", choices=BENCH_SHAPES, default="llama-1b-block", help="random weights, where no --model is given")
    add("--gate", choices=list(GATE_FORMS), default="scalar",
        help="of the main rows; the others join at 0 and 50%%, except at batch 8 and in training")
    add("--work", nargs="+", choices=MAKERS, default=list(MAKERS), help="what to time")
    add("--repeats", type=whole(1), default=3, help="interleaved rounds; medians are printed")
    add("--quick", action="store_true", help="the small shape, prefill of 2 x 256, 0 and 50%%")
    add("--counts", action="store_true", help="print the table of parameters and MACs, and stop")
    add("--peer", choices=("transformers",), help="also time the same weights there (pip install it; needs --model)")
    add("--json", metavar="FILE", help="write one row per measurement")
    add("--png", default="runs/bench.png", help="the curves")
    add_machine_flags(p)
    args = p.parse_args(argv)
    if not args.png.endswith(".png"):
        raise InputError(f"--png {args.png} must end in .png")
    if args.json and Path(args.json).resolve() == Path(args.png).resolve():
        raise InputError(f"--json {args.json} is --png, too: the picture would take the place of the rows")
    if args.quick and args.work != list(MAKERS):
        raise InputError("--quick times prefill alone: leave --work out")
    if args.peer and not args.model:
        raise InputError("--peer needs --model: a folder that transformers can open too")
    if args.peer and find_spec("transformers") is None:
        raise InputError("--peer transformers: it is not installed (pip install transformers)")
    return args


def check_output(flag, path):
    """InputError where a file cannot be written: before the work, and not after it."""
    try:
        check_writable(Path(path).parent)
        if Path(path).exists() and not (Path(path).is_file() and os.access(path, os.W_OK)):
            raise OSError(0, "no file, or one that may not be written")
        if Path(f"{path}.tmp").is_dir():                         # under that name it is written first
            raise OSError(0, f"{Path(path).name}.tmp is in the way")
    except OSError as error:
        raise InputError(f"{flag} {path} cannot be written ({error.strerror}): give another file") from None


def rows_of(path):
    """What an earlier --json wrote, a list; None for another file."""
    try:
        held = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return None
    return held if isinstance(held, list) and all(isinstance(row, dict) and "work" in row for row in held) else None


def main(argv=None):
    args = parse_args(argv)
    if args.counts:
        print("\n".join(counts_table()))
        return 0
    check_output("--png", args.png)
    if args.json:
        check_output("--json", args.json)
        if Path(args.json).exists() and not rows_of(args.json):
            raise InputError(f"--json {args.json} is no file of this program: give another --json")
    device, dtype = pick_device(args.device, args.dtype)
    shape = "small" if args.quick else args.shape
    if args.model:
        model = load_model(args.model, device=device, dtype=dtype)
        if args.peer and model.config.gate:
            raise InputError(f"--peer {args.peer} knows no gates, and --model {args.model} has some: give one without")
    else:
        with torch.device(device):
            model = Model(BENCH_SHAPES[shape]).to(dtype).eval()
        model.init_weights(torch.Generator(device).manual_seed(0))
    models = {form: with_gate(model, form) for form in GATES}
    vocab, draw = model.config.vocab_size, torch.Generator()
    ids = lambda *size: torch.randint(0, vocab, size, generator=draw.manual_seed(0)).to(device)      # (B, S)
    others = [form for form in GATE_FORMS if form != args.gate]
    if args.quick:
        plan = [("prefill", ids(2, 256), (0.0, 0.5), [])]
    else:
        plan = [("prefill", ids(8, 512), SKIPPED, others), ("decode", ids(1, CONTEXT), SKIPPED, others),
                ("decode", ids(8, CONTEXT), SKIPPED, []), ("decode", ids(32, CONTEXT), SKIPPED, others),
                ("train", ids(2, 256), (0.0, 0.3), [])]
    print(f"{args.model or shape}, {torch.get_num_threads()} threads, medians of {args.repeats}\n\n{HEADER}")
    rows = []
    for work, tokens, skipped, forms in plan:
        if args.quick or work in args.work:
            rows += bench(models, args.gate, work, tokens, skipped, forms, args.repeats)
    try:
        if args.peer:
            works = []
            for work, tokens in (("prefill", ids(8, 512)), ("decode", ids(1, CONTEXT)), ("decode", ids(8, CONTEXT))):
                once = MAKERS[work](models["none"], tokens, 0.0, "compact")
                works.append((work, tokens.shape, lambda once=once: measure({0: once}, 1, device, work)[0][0]))
            rows += bench_peer(model.source, works, STEPS, args.repeats, device, dtype)
    finally:                                                     # ours stand where the peer fails
        if args.json:
            write(Path(args.json).resolve(), json.dumps(rows, indent=1))
        written = [path for path in (args.json, plot(rows, args.png) and args.png) if path]
        if written:
            print(f"\nwritten: {', '.join(written)}")
    return 0


if __name__ == "__main__":
    run(main)
