"""A run as a folder that Hugging Face transformers opens, with its gates, thresholds and budget.

    python interop/export.py --model runs/demo --out runs/demo-hf --budget 0.8

    model = AutoModelForCausalLM.from_pretrained("runs/demo-hf", trust_remote_code=True)
    model.config.gateskip["budget"] = 0.7            # any that lies between the calibrated ones, at any time

In it lie the weights, config.json, the tokenizer, the generation config, a model card, and modeling_gateskip.py, the
code that transformers runs. This project's own commands open the folder, too.
"""
import json
import os
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from console import InputError, run
from flags import Parser

import torch

from disk import check_writable, rename, sync_tree
from gates import check_budget
from load_weights import SAVED, check_fit, find_folder, load_model, load_tokenizer, read_json, save_model
from thresholds import thresholds_at

CODE = Path(__file__).with_name("modeling_gateskip.py")
CARD = """---
library_name: transformers
---
A {family} with GateSkip gates (arXiv 2510.13876): tokens with a low gate skip attention or MLP branches. The budget,
the share of {unit} that runs, is {budget}; calibrated are {known}.

```python
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("FOLDER", trust_remote_code=True)     # runs its modeling_gateskip.py
model.config.gateskip["budget"] = {budget}
```

Without `trust_remote_code` it is refused. Do not open it by `{family}ForCausalLM.from_pretrained`: that drops the
gates, and what is left is not this model.
"""


def config_for_transformers(model, budget):
    """Change model.raw_config and the rest that save_model writes into what transformers, old and new, reads alike."""
    raw, config = model.raw_config, model.config
    family = "Gemma2" if config.gemma else "Llama"
    names = {"AutoConfig": "Config", "AutoModel": "Model", "AutoModelForCausalLM": "ForCausalLM"}
    raw["auto_map"] = {auto: f"{CODE.stem}.GateSkip{family}{end}" for auto, end in names.items()}
    raw.pop("rope_scaling", None)
    scaling = {"rope_type": "llama3", **config.rope_scaling} if config.rope_scaling else {}
    raw["rope_theta"] = config.rope_theta                        # the older style, and that of transformers 5
    raw["rope_parameters"] = {"rope_type": "default", "rope_theta": config.rope_theta, **scaling}
    raw |= {"rope_scaling": scaling} if scaling else {}
    raw["cache_implementation"] = None                           # the older one's cache for Gemma 2 has a fixed size
    config.gateskip["budget"] = budget
    if "generation_config.json" in model.side_files:
        generation = json.loads(model.side_files["generation_config.json"])
        generation.pop("cache_implementation", None)
        model.side_files["generation_config.json"] = json.dumps(generation, indent=2).encode()


def tokenizer_config(model, tokenizer):
    """tokenizer_config.json of the model, or a new one: without it transformers asks its own list of model types."""
    if "tokenizer_config.json" in model.side_files:
        stored = json.loads(model.side_files["tokenizer_config.json"])
    else:
        bos, end = model.raw_config.get("bos_token_id"), next(iter(model.config.eos_ids), None)
        ids = {"bos_token": bos, "eos_token": end, "pad_token": end}
        stored = {name: tokenizer.id_to_token(i) for name, i in ids.items() if i is not None}
    if stored.get("tokenizer_class") in (None, "TokenizersBackend"):             # its name in transformers 5
        stored["tokenizer_class"] = "PreTrainedTokenizerFast"
    stored.setdefault("model_input_names", ["input_ids", "attention_mask"])      # older ones add token_type_ids
    return json.dumps(stored, indent=2).encode()


def write_folder(model, tokenizer, card, out):
    """Write beside `out`, then give it the name: a reader sees all or nothing. An older export gives way."""
    new, old = (out.with_name(f"{out.name}.{which}-{os.getpid()}.tmp") for which in ("new", "old"))
    try:
        save_model(model, new, tokenizer)
        shutil.copy(CODE, new)
        (new / "README.md").write_text(card, encoding="utf-8")
        sync_tree(new)
        if out.exists():
            rename(out, old)
        rename(new, out)
    finally:
        for folder in (new, old if out.exists() else new):
            shutil.rmtree(folder, ignore_errors=True)


def check_out(out):
    """InputError unless `out` is new, an empty folder, or an earlier export and nothing else."""
    held = set(os.listdir(out)) if out.is_dir() else set()
    if os.path.lexists(out) and (not out.is_dir() or held and CODE.name not in held):
        raise InputError(f"--out {out} exists and is no export of this program: give the name of a new folder")
    if more := sorted(held - {*SAVED, CODE.name, "README.md"}):
        raise InputError(f"--out {out} holds {more[0]} beside an export: move it away, or give the name of a new "
                         "folder")
    check_writable(out.parent)


def parse_args(argv):
    p = Parser("Write a gated run as a folder for Hugging Face transformers.")
    add = p.add_argument
    add("--model", required=True, help="folder, a run's --out, or hub id; with gates and thresholds")
    add("--out", required=True, help="the folder to write; an earlier export is replaced")
    add("--budget", type=check_budget, help="what it opens with; default: of those calibrated the one nearest to 0.85")
    return p.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    out = Path(args.out or ".")
    check_out(out)
    folder = find_folder(args.model)
    config = read_json(folder / "config.json")
    dtype = config.get("dtype") or config.get("torch_dtype")     # as it is stored
    model = load_model(args.model, dtype=torch.bfloat16 if dtype == "bfloat16" else torch.float32)
    tokenizer = load_tokenizer(args.model)
    check_fit(model, tokenizer)
    stored = model.config.gateskip
    if model.config.gate is None:
        raise InputError(f"--model {args.model} has no gates: transformers opens {folder} as it is")
    if "thresholds" not in stored:
        raise InputError(f"--model {args.model} has no thresholds, and in transformers nothing else decides who skips: "
                         "train.py calibrates at its end")
    known = sorted(map(float, stored["thresholds"]))
    budget = args.budget or min([b for b in known if b < 1.0] or known, key=lambda b: abs(b - 0.85))
    try:
        thresholds_at(stored["thresholds"], budget)
    except InputError as error:
        raise InputError(f"--{error}") from None
    config_for_transformers(model, budget)
    model.side_files["tokenizer_config.json"] = tokenizer_config(model, tokenizer)
    card = CARD.format(family="Gemma2" if model.config.gemma else "Llama", budget=budget,
                       unit="work" if stored.get("threshold") == "global" else "tokens in each branch",
                       known=", ".join(map(str, known)))
    write_folder(model, tokenizer, card, out.resolve())          # a link stays one
    print(f"written: {out}, budget {budget}; calibrated: {', '.join(map(str, known))}")
    return 0


if __name__ == "__main__":
    run(main)
