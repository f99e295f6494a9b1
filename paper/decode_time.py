"""Wall time per generated token of a single stream, over budget 1.0, over the dense model and over transformers.

    python paper/decode_time.py --model runs/smollm2 --data test.jsonl --peer transformers --out runs/time.json

Each question is answered alone, greedily, with a KV cache and the run's frozen thresholds. The budget for each share of
MACs saved in generated tokens (gates paid) is found first, on these prompts. Then all settings take turns at each
prompt, round after round. The texts of two settings may differ, because skipping changes them; their number of tokens
does not: nothing ends a text. The first token, which is the prefill's, is not timed; what generate.py counts on the way
is. transformers continues random tokens, as many as each prompt has.
"""
import io
import json
import sys
from contextlib import redirect_stderr
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from time import perf_counter

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from console import InputError, pick_device, run
from flags import Parser, add_machine_flags, real, whole

import torch
from tqdm import tqdm

from bench import with_gate
from bench_peer import Peer
from data import encode_prompt, load_examples
from disk import write
from generate import generate
from load_weights import check_fit, load_model, load_tokenizer, model_digest
from opened import check_own
from savings import Savings
from thresholds import make_policy


def decode(model, prompts, policy, new_tokens):
    """Continue each prompt alone: (seconds without the prefills, report of the Savings, how many tokens were made)."""
    seconds, savings, count = 0.0, Savings(model.config), 0
    for prompt in prompts:
        times = []                                               # when each new token came
        savings += generate(model, [prompt], new_tokens, policy,
                            on_token=lambda *_: times.append(perf_counter())).savings
        seconds, count = seconds + times[-1] - times[0], count + len(times)
    return seconds, savings.report(), count


def main(argv=None):
    p = Parser("Wall time per generated token of a single stream.")
    add = p.add_argument
    add("--model", required=True, metavar="RUN", help="a calibrated model with gates: folder, a run's --out, or hub id")
    add("--dense", metavar="MODEL", help="a model without gates; default: RUN's backbone")
    add("--data", required=True, help="arithmetic (its test problems), or a .jsonl or .parquet file of questions")
    add("--prompts", type=whole(1), default=8, help="the first N questions")
    add("--new-tokens", type=whole(2), default=48, help="of each answer; the first is not timed")
    add("--saved", type=real(0.0, 1.0, above=True), nargs="+", default=[0.2, 0.3], help="of generated tokens' MACs")
    add("--repeats", type=whole(1), default=5, help="rounds")
    add("--peer", choices=("transformers",), help="also time the dense weights there (pip install it)")
    add("--out", required=True, metavar="JSON", help="the file of the rows")
    add_machine_flags(p)
    args = p.parse_args(argv)
    if args.peer and find_spec("transformers") is None:
        raise InputError("--peer transformers: it is not installed (pip install transformers)")
    if len({f"{share:g}" for share in args.saved}) < len(args.saved):
        raise InputError("--saved has two shares that print alike: leave one out")
    check_own("--out", args.out, "command", "digest", "rows")
    where = pick_device(args.device, args.dtype)
    model, tokenizer = load_model(args.model, None, *where), load_tokenizer(args.model)
    check_fit(model, tokenizer)
    if "thresholds" not in model.config.gateskip:
        raise InputError(f"--model {args.model} has no gates with frozen thresholds: give a run that train.py finished")
    dense, n = load_model(args.dense, None, *where) if args.dense else with_gate(model, "none"), args.new_tokens
    if dense.config.gate is not None or dense.config.vocab_size != model.config.vocab_size:
        raise InputError(f"--dense {args.dense} has gates, or another vocabulary than --model: leave it out")
    examples = load_examples(args.data, "test", args.prompts)
    if isinstance(examples[0], str):
        raise InputError(f"--data {args.data} is plain text: give a file of questions")
    prompts = [encode_prompt(tokenizer, example.question) for example in examples]
    room = min(m.config.max_position_embeddings for m in (model, dense)) - max(map(len, prompts))
    if n > room:
        raise InputError(f"--new-tokens {n}: the longest prompt leaves the model room for {max(room, 0)}")
    peer = Peer("sdpa", getattr(dense, "source", model.source), *where) if args.peer else None
    print(f"{args.model}: {len(prompts)} prompts of {sum(map(len, prompts)) / len(prompts):.0f} tokens on average, {n} "
          f"new ones each, {args.repeats} rounds, {torch.get_num_threads()} threads")
    lowest = min(map(float, model.config.gateskip["thresholds"]))
    ours = {"budget 1.0": (model, 1.0), "dense": (dense, 1.0)}
    saved_at = lambda b: decode(model, prompts, make_policy(model.config, "frozen", b), n)[1]["answer"]["macs_saved"]
    with redirect_stderr(io.StringIO()):                         # a note on each budget that is interpolated
        tried = {lowest: saved_at(lowest)}                       # budget -> share
        for share in args.saved:
            low, high, miss = lowest, 1.0, lambda budget: abs(tried[budget] - share)
            while tried[lowest] > share and high - low > 1e-3 and min(map(miss, tried)) > 0.005:
                middle = (low + high) / 2
                tried[middle] = saved_at(middle)
                low, high = (middle, high) if tried[middle] > share else (low, middle)
            nearest = min(tried, key=miss)
            if miss(nearest) > 0.02:                             # or a jump: another threshold may be another text
                print(f"--saved {share:g} is out of range: budget {nearest:.4f} is nearest, with {tried[nearest]:.1%}")
            ours[f"{100 * share:g}% asked"] = model, nearest
    settings, rows = {}, []
    for name, (which, budget) in ours.items():
        policy = make_policy(which.config, "frozen", budget)
        _, saved, count = decode(which, prompts, policy, n)      # before the clock runs: it warms up, too
        settings[name] = lambda prompt, which=which, policy=policy: decode(which, [prompt], policy, n)[0]
        rows.append({"setting": name, "budget": budget, "tokens": count, **{k: saved[k] for k in ("prompt", "answer")}})
    if peer:                                                     # it multiplies what the dense model does
        settings["transformers"] = lambda prompt: peer.ask("decode", 1, len(prompt), n - 1)
        rows.append(rows[1] | {"setting": "transformers"})
    seconds = {name: [0.0] * args.repeats for name in settings}
    for i in tqdm(range(args.repeats), desc="rounds", leave=False):
        for prompt in prompts:
            for name, once in settings.items():
                seconds[name][i] += once(prompt)
    if peer:
        peer.close()
    others = [name for name in ("budget 1.0", "dense", "transformers") if name in seconds]
    print("\ntimes as fast: ratio of medians (least to greatest of a round); ideal: over budget 1.0, by MACs alone\n"
          "setting       budget ms/token" + "".join(f"{'over ' + name:>20}" for name in others)
          + "  ideal  MACs saved: generated  prompt  tokens")
    for r in rows:
        mine = seconds[r["setting"]]
        r |= {"seconds": mine, "ms_per_token": 1000 * median(mine) / (len(prompts) * (n - 1)),
              "ideal": rows[0]["answer"]["macs"] / r["answer"]["macs"],
              "over": {name: [median(seconds[name]) / median(mine), *(f(a / b for a, b in zip(seconds[name], mine))
                                                                      for f in (min, max))] for name in others}}
        print("{setting:13} {budget:6.4f} {ms_per_token:8.2f}".format(**r)
              + "".join("{:8.2f} ({:.2f}-{:.2f})".format(*ratios) for ratios in r["over"].values())
              + "{ideal:7.2f} {answer[macs_saved]:+22.1%} {prompt[macs_saved]:+7.1%} {tokens:7}".format(**r))
    write(args.out, json.dumps({"command": " ".join(map(str, argv or sys.argv)), "digest": model_digest(model.source),
                                "settings": vars(args) | {"threads": torch.get_num_threads()}, "rows": rows}, indent=1))
    print(f"\nwritten: {args.out}")
    return 0


if __name__ == "__main__":
    run(main)
