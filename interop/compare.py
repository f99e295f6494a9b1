"""Do they give the same answers, and how fast: an exported folder under transformers' generate, and its run here.

    python interop/compare.py --model runs/demo --exported runs/demo-hf --dense examples/tiny-llama

Greedy, with frozen thresholds, the same batches (left-padded there), which take turns: budget by budget, then the next
batch. Times are per new token, prompts included. transformers opens --dense, the model without gates, as its own
Llama or Gemma 2.
"""
import sys
from pathlib import Path
from time import perf_counter

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from console import InputError, pick_device, run
from flags import Parser, add_machine_flags, whole

import torch
from tqdm import tqdm
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM

from answers import is_right
from data import encode_prompt, load_examples
from export import CODE
from gates import check_budget
from generate import generate
from load_weights import check_fit, find_folder, load_model, load_tokenizer
from thresholds import make_policy
from tokens import decode


def opened(folder, device, dtype):
    """The model of a folder in transformers. InputError where that cannot be."""
    folder = find_folder(folder)                                 # of a run the newest step
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, torch_dtype=dtype)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(f"{folder}: transformers does not open it ({' '.join(str(error).split())[:160]})") from None
    return model.to(device).eval()


def theirs(model, prompts, new_tokens, ends):
    """Continue prompts (lists of ids) by transformers' generate: lists of new ids, up to the first end."""
    longest, device = max(map(len, prompts)), model.device
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=device)           # (B, S)
    real = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
    out = model.generate(ids, attention_mask=real, max_new_tokens=new_tokens, do_sample=False, pad_token_id=0,
                         eos_token_id=sorted(ends))[:, longest:].tolist()
    stop = lambda new: next((i + 1 for i, token in enumerate(new) if token in ends), len(new))
    return [new[:stop(new)] for new in out]


def parse_args(argv):
    p = Parser("An exported folder under transformers' generate, and its run here: the same answers, and how fast.")
    add = p.add_argument
    add("--model", default="runs/demo", help="the run: folder, a run's --out, or hub id")
    add("--exported", required=True, help="the folder that export.py made of it")
    add("--dense", required=True, help="the model without gates, in Hugging Face format")
    add("--data", default="arithmetic", help="arithmetic (its test problems), or a file of questions")
    add("--limit", type=whole(1), default=200, help="the first N problems")
    add("--budgets", type=check_budget, nargs="+", default=[1.0, 0.8, 0.6], help="calibrated ones, or between them")
    add("--batch-size", type=whole(1), default=8, help="problems that are answered together")
    add("--max-new-tokens", type=whole(1), default=96, help="of each answer")
    add_machine_flags(p)
    return p.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    device, dtype = pick_device(args.device, args.dtype)
    examples = load_examples(args.data, "test", args.limit)
    if isinstance(examples[0], str):
        raise InputError(f"--data {args.data} is plain text: give a file of questions")
    model, tokenizer = load_model(args.model, device=device, dtype=dtype), load_tokenizer(args.model)
    check_fit(model, tokenizer)
    if "thresholds" not in model.config.gateskip:
        raise InputError(f"--model {args.model} has no gates with frozen thresholds: give a run that train.py finished")
    try:
        policies = {b: make_policy(model.config, "frozen", b) for b in dict.fromkeys(args.budgets)}
    except InputError as error:
        raise InputError(str(error).replace("budget ", "--budgets ", 1)) from None
    if not (find_folder(args.exported) / CODE.name).is_file():
        raise InputError(f"--exported {args.exported} is no export: export.py --model {args.model} --out FOLDER "
                         "makes one")
    exported, dense = opened(args.exported, device, dtype), opened(args.dense, device, dtype)
    if getattr(dense.config, "gateskip", {}).get("gate"):
        raise InputError(f"--dense {args.dense} has gates: give the model without them")
    if getattr(exported.config, "gateskip", {}).get("thresholds") != model.config.gateskip["thresholds"]:
        raise InputError(f"--exported {args.exported} is not of --model {args.model}: export.py --model {args.model}")

    def at(budget):
        exported.config.gateskip["budget"] = budget
        return exported
    n, ends = args.max_new_tokens, model.config.eos_ids
    ways = {("dense", None): lambda batch: theirs(dense, batch, n, ends)}
    for b, policy in policies.items():
        ways["ours", b] = lambda batch, policy=policy: generate(model, batch, n, policy, set(ends)).tokens
        ways["theirs", b] = lambda batch, b=b: theirs(at(b), batch, n, ends)
    seconds, answers = dict.fromkeys(ways, 0.0), {way: [] for way in ways}
    prompts = [encode_prompt(tokenizer, e.question) for e in examples]
    for answer in ways.values():                                 # warms up
        answer(prompts[:1])
    for start in tqdm(range(0, len(prompts), args.batch_size), desc="batches", leave=False):
        batch = prompts[start:start + args.batch_size]
        for way, answer in ways.items():
            began = perf_counter()
            answers[way] += answer(batch)
            seconds[way] += perf_counter() - began
    right = {way: sum(is_right(decode(tokenizer, new), e.answer) for new, e in zip(answers[way], examples))
             for way in ways}
    ms = {way: 1000 * seconds[way] / sum(map(len, answers[way])) for way in ways}
    print(f"\n{len(prompts)} problems of {args.data}, batches of {args.batch_size}, threads: "
          f"{torch.get_num_threads()}\n"
          "\n"
          "                       right     same tokens   ms a token   as fast as dense there   as here\n"
          f"dense, there        {right['dense', None]:8}               {ms['dense', None]:11.2f}")
    for b in policies:
        same = sum(x == y for x, y in zip(answers["ours", b], answers["theirs", b]))
        for who, label in (("ours", "here"), ("theirs", "exported, there")):
            way = who, b
            print(f"{b:5.3f} {label:15} {right[way]:6} {same:15} {ms[way]:12.2f} {ms['dense', None] / ms[way]:24.2f}"
                  + f"{ms['ours', b] / ms[way]:10.2f}" * (who == "theirs"))
    return 0


if __name__ == "__main__":
    run(main)
