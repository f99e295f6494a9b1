"""Hugging Face folder or hub id -> model and tokenizer, and back.

A checkpoint is a Hugging Face folder: config.json (theirs, plus a "gateskip" object), model.safetensors or its shards,
tokenizer.json. Parameter names are the same on both sides, so loading is a check and not a translation: every key is
used, every parameter is filled, every shape is compared by name. What does not fit is an InputError of one line.
"""
import hashlib
import json
import re
import shutil
import zlib
from contextlib import suppress
from dataclasses import asdict
from functools import wraps
from pathlib import Path

from console import InputError

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer

from disk import write
from model import Model
from read_config import config_from_hf, end_tokens, named, read_json
from tokens import blame

# small files that belong to a model and travel with it unchanged
SIDE_FILES = ("generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
SAVED = ("config.json", "model.safetensors", "tokenizer.json", *SIDE_FILES)      # what save_model writes
WEIGHTS = ("config.json", "generation_config.json", "tokenizer.json", "*.safetensors")       # what makes a model itself


# ---------------------------------------------------------------------------------------------------------------------
# Where a model lies
# ---------------------------------------------------------------------------------------------------------------------

def find_folder(source):
    """source -> Path of a folder with config.json. source: such a folder, a run's --out (its `latest`), or a hub id.

    While a killed --overwrite has a run set aside (checkpoint.py), that run is still what its --out holds."""
    path, checkout = Path(source), Path(__file__).resolve().parent
    if not path.exists() and (checkout / path).exists():
        raise InputError(f"{source} does not exist here, but in {checkout}: start there, or give {checkout / path}")
    if not path.exists() and re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", str(source)):
        path = _download(str(source))
    if not path.is_dir():
        raise InputError(f"{source} {'is a file' if path.exists() else 'does not exist'}: "
                         f"give a folder, a run's --out, or a hub id like meta-llama/Llama-3.2-1B")
    latest = path / "latest"
    if not latest.exists() and (path / ".overwritten" / "latest").is_file():
        latest = path / ".overwritten" / "latest"
    if latest.is_file() and not (path / "config.json").is_file():        # DeepSpeed leaves one in model folders
        name, is_step = latest.read_text(errors="replace").strip(), re.compile("step-[0-9]+").fullmatch
        places = (latest.parent / name, path / name)             # it was moved, or not yet
        if not is_step(name) or not any(folder.is_dir() for folder in places):
            steps = sorted((p.name for p in path.glob("step-*") if is_step(p.name)), key=lambda step: int(step[5:]))
            raise InputError(f"{latest} names {name!r:.60}, which is {'not there' if is_step(name) else 'no step'}: "
                             f"write {steps[-1] if steps else 'the name of a step folder, like step-000500,'} into it")
        path = next(folder for folder in places if folder.is_dir())
    if not (path / "config.json").is_file():
        raise InputError(f"{path} has no config.json: it is no model folder, or a run that has not saved yet")
    return path


def _download(repo):
    """The needed files only, safetensors only, with huggingface_hub's own token and cache."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
    files, problem = ["config.json", "tokenizer.json", "model.safetensors*", "model-*.safetensors", *SIDE_FILES], None
    try:                                                         # snapshot_download alone would wait for ever
        HfApi().model_info(repo, timeout=10)                     # for a hub that never answers
    except Exception as error:  # of many kinds (httpx's have no common base); the cache may still have the model
        problem = error
    try:
        return Path(snapshot_download(repo, allow_patterns=files, local_files_only=problem is not None))
    except Exception as error:
        problem = problem or error
    reason = f"{type(problem).__name__}: {problem}".split("\n")[0]
    why = f"the hub did not deliver it ({reason}): check the network, or give a local folder"
    if isinstance(problem, GatedRepoError):
        why = "its hub model is gated: accept the licence on its page, then run `hf auth login`"
    elif isinstance(problem, RepositoryNotFoundError):
        why = "no such model on the hub (or it is private: run `hf auth login`)"
    raise InputError(f"no folder {repo} here{' (make demo creates it)' if repo == 'runs/demo' else ''}, and {why}")


# ---------------------------------------------------------------------------------------------------------------------
# Loading
# ---------------------------------------------------------------------------------------------------------------------

def weight_files(folder):
    """{tensor name: file} of a checkpoint: its model.safetensors, or the shards that the index names."""
    folder = Path(folder)
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return {key: single for key in _read(single)}
    if not index.is_file():
        pickles = [p for p in folder.iterdir() if p.suffix in (".bin", ".pth", ".pt") and p.name != "train_state.pt"]
        why = ": pickled weights are refused, because loading a pickle can run any code; get the safetensors version"
        raise InputError(f"{folder} has no model.safetensors and no {index.name}{why if pickles else ''}")
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict):
        raise InputError(f"{index} has no weight_map: download it again")
    for shard in shards.values():
        if not isinstance(shard, str) or shard != Path(shard).name:
            raise InputError(f"{index} names {shard!r:.60}, which is no file of this folder: download it again")
        if not (folder / shard).is_file():
            raise InputError(f"{folder} lacks the shard {shard} that {index.name} names: download it again")
    for shard in sorted(set(shards.values())):
        if lost := {key for key in shards if shards[key] == shard} - set(_read(folder / shard)):
            raise InputError(f"{index} names {min(lost)} in {shard}, which lacks it: download both again")
    return {key: folder / shard for key, shard in shards.items()}


def _read(path, key=None):
    """One tensor as it is on disk, or the list of names. The file is mapped for this one only: nothing read stays."""
    try:
        with safe_open(path, framework="pt", device="cpu") as f:
            return f.keys() if key is None else f.get_tensor(key)
    except (SafetensorError, OSError, RuntimeError) as error:    # of torch, which opens the file once more
        raise InputError(f"{path} is truncated, gone, or no safetensors file ({error}): get it again") from None


def _newest(load):
    """load(source) on its folder; anew where that fails because another process has saved, and deleted this step."""
    @wraps(load)
    def patient(source, *args, **kwargs):
        for _ in range(3):
            folder = None
            try:
                folder = find_folder(source)
                return load(folder, *args, **kwargs)
            except (InputError, OSError):
                if not (Path(source) / "latest").is_file() or find_folder(source) == folder:
                    raise
        raise InputError(f"{source} was saved anew three times while it was read: copy one of its steps and load that")
    return patient


@_newest
def load_model(folder, gate=None, device="cpu", dtype=torch.float32):
    """A Model with the weights of a folder, a run's --out or a hub id, in eval mode.

    gate: GateConfig to put fresh gates (from torch's global generator) on a checkpoint that has none; a checkpoint's
    own gates are always loaded. Built on the meta device and filled tensor by tensor, each cast on arrival: peak memory
    is one copy in `dtype` plus the largest tensor. Gates stay float32 or wider.
    """
    model = _meta_model(folder / "config.json", read_json(folder / "config.json"), gate)
    fresh = gate is not None and model.config.gateskip.get("gate") is None
    files, tied = weight_files(folder), model.config.tie_word_embeddings
    wanted = dict(model.named_parameters())                      # a tied head is listed once, as the embedding
    stored = {key for key in wanted if not (fresh and "_gate." in key)}
    head = files.pop("lm_head.weight", None) if tied else None
    unexpected = [key for key in files if key not in stored and not key.endswith("rotary_emb.inv_freq")]
    for what, keys in (("missing", sorted(stored - set(files))), ("unexpected", sorted(unexpected))):
        if keys:
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            raise InputError(f"{folder}: the weights do not fit config.json: {what} {', '.join(keys[:3])}{more}")
    for key, p in wanted.items():
        tensor = _read(files[key], key) if key in stored else torch.empty(p.shape)
        which = f"{files.get(key)}: tensor {key}"
        if tensor.shape != p.shape:
            raise InputError(f"{which} has shape {tuple(tensor.shape)}, config.json implies {tuple(p.shape)}")
        if tensor.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
            raise InputError(f"{which} is stored as {tensor.dtype}; take the original, unquantized checkpoint")
        if key in stored and not torch.stack(tensor.aminmax()).isfinite().all():
            raise InputError(f"{which} holds numbers that are not finite: get it again, or take an earlier step")
        _assign(model, key, tensor, dtype, device)
        del tensor                                               # before the next one is read
    if head is not None:                                         # stored although tied
        own, copy = model.lm_head.weight, _read(head, "lm_head.weight")
        pieces = zip(own.split(4096), copy.split(4096))          # a cast of the whole would be one copy more
        if own.shape != copy.shape or not all(torch.allclose(a.cpu().float(), b.float(), 2 ** -7, 2 ** -24)
                                              for a, b in pieces):                   # either may have been rounded
            raise InputError(f"{head}: lm_head.weight differs from the embedding, in spite of tie_word_embeddings")
    if fresh:
        model.init_gates()
    return model.eval()


def new_model(config_file, gate=None, device="cpu", dtype=torch.float32):
    """A Model from a config.json alone, with weights drawn from torch's global generator (train.py --init-config)."""
    if not Path(config_file).is_file():
        raise InputError(f"no such file: {config_file} (--init-config takes a config.json)")
    raw = {key: value for key, value in read_json(config_file).items() if key != "gateskip"}
    model = _meta_model(Path(config_file), raw, gate)
    try:                                                         # all at once: refused now, not after swapping
        torch.empty(sum(p.numel() for p in model.parameters()), dtype=dtype, device=device)
    except RuntimeError:
        raise InputError(f"{config_file} describes a model that is larger than the memory here") from None
    for key, p in dict(model.named_parameters()).items():
        _assign(model, key, torch.empty(p.shape), dtype, device)
    model.init_weights()
    return model.eval()


def _meta_model(config_file, raw, gate):
    """A Model without storage, and beside it what saving will need: source, raw_config, side_files."""
    config, folder = config_from_hf(raw, config_file), config_file.parent
    if gate is not None:
        check_gates(config.gate, gate, folder)
    config.gate = config.gate or gate
    generation = folder / "generation_config.json"               # knows better than config.json when to stop
    if generation.is_file():
        config.eos_ids = end_tokens(read_json(generation), generation) or config.eos_ids
    with torch.device("meta"):
        model = Model(config)
    model.source, model.raw_config = folder, raw
    model.side_files = {name: (folder / name).read_bytes() for name in SIDE_FILES if (folder / name).is_file()}
    return model


def check_gates(known, gate, source):
    """InputError if a model has gates, a GateConfig, and others are asked for, or none."""
    if known not in (None, gate):
        raise InputError(f"{source} has gates already: {known.flags()} goes on with them, other gates start from the "
                         "model without any")


def _assign(model, key, tensor, dtype, device):
    """Put a tensor in a parameter's place. Always a copy: a view of the file would change and vanish with the file."""
    name, _, leaf = key.rpartition(".")
    dtype = torch.promote_types(dtype, torch.float32) if "_gate." in key else dtype    # gates never go below float32
    setattr(model.get_submodule(name), leaf, torch.nn.Parameter(tensor.to(device, dtype, copy=True)))
    if key == "model.embed_tokens.weight" and model.config.tie_word_embeddings:
        model.lm_head.weight = model.model["embed_tokens"].weight                # shared, not copied


def check_fit(model, tokenizer):
    """InputError unless the embedding has rows for the end token and all but added tokens (tokens.encode's part)."""
    rows, end = model.config.vocab_size, max(model.config.eos_ids, default=0)
    size = 1 + max(tokenizer.get_vocab(with_added_tokens=False).values(), default=-1)
    if size > rows:
        raise InputError(f"the tokenizer has {size} tokens and {model.source} {rows}: they do not belong together")
    if end >= rows:
        raise InputError(f"{model.source}: eos_token_id {end} lies outside the vocabulary of {rows}")
    tokenizer.rows = rows


@_newest
def load_tokenizer(folder):
    """The tokenizers.Tokenizer of a folder, a run's --out or a hub id."""
    return read_tokenizer(folder / "tokenizer.json")


def read_tokenizer(path):
    """A tokenizers.Tokenizer of a file. It never truncates and never pads."""
    if not path.is_file():
        raise InputError(f"{path.parent} has no tokenizer.json")
    with blame(path, "is not a tokenizer"):
        tokenizer = Tokenizer.from_file(str(path))
    tokenizer.path = path                                        # for what tokens.py has to say
    tokenizer.no_truncation()                                    # the file may carry both from its training
    tokenizer.no_padding()
    return tokenizer


# ---------------------------------------------------------------------------------------------------------------------
# Saving
# ---------------------------------------------------------------------------------------------------------------------

def save_config(model, folder):
    """Write config.json, theirs plus the "gateskip" object and names that say so, replacing an old one in one step."""
    raw = {key: value for key, value in model.raw_config.items() if key != "gateskip"}
    raw |= named(raw["architectures"][0], gated=model.config.gate is not None)
    for key in {"dtype", "torch_dtype"} & set(raw) or ["torch_dtype"]:
        raw[key] = str(model.model["embed_tokens"].weight.dtype).removeprefix("torch.")
    gate = model.config.gate
    gateskip = model.config.gateskip | ({} if gate is None else {"gate": asdict(gate)})
    if gateskip:
        raw["gateskip"] = gateskip
    write(Path(folder) / "config.json", json.dumps(raw, indent=2) + "\n")


def save_model(model, folder, tokenizer=None, weights=None):
    """Write a Hugging Face folder: config.json with its "gateskip" object, model.safetensors, tokenizer and side files.

    A dense one opens in other tools; those that know no gates refuse the others (read_config.named). A tied head is
    stored once. Parameters keep their dtype. OSError on a full disk.
    weights: {name: tensor} where the model itself holds only a part of them (shards.py).
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {key: p.detach().cpu().contiguous() for key, p in (weights or dict(model.named_parameters())).items()}
    try:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{folder / 'model.safetensors'}: {error}") from None
    for name, content in model.side_files.items():
        (folder / name).write_bytes(content)
    if tokenizer is not None:                                    # not tokenizer.save: its errors are no OSError
        (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    save_config(model, folder)
    with suppress(OSError):                                      # safetensors shows it to nobody else
        shutil.copymode(folder / "config.json", folder / "model.safetensors")


def checksums(folder):
    """{name: CRC-32} of what save_model has written; of config.json without what a calibration adds later."""
    config, sums = read_json(folder / "config.json"), {}
    if isinstance(config.get("gateskip"), dict):
        config["gateskip"] = {key: value for key, value in config["gateskip"].items()
                              if key not in ("thresholds", "realised", "missed", "step")}
    for path in (folder / name for name in SAVED if (folder / name).is_file()):
        sums[path.name] = 0
        with open(path, "rb") as file:
            while piece := file.read(1 << 20):
                sums[path.name] = zlib.crc32(piece, sums[path.name])
    return sums | {"config.json": zlib.crc32(json.dumps(config, sort_keys=True).encode())}


def model_digest(folder):
    """Of all in a model's folder that may change an answer: 16 hex digits, the same for a copy. InputError for none."""
    total, paths = hashlib.sha256(), [path for pattern in WEIGHTS for path in sorted(Path(folder).glob(pattern))]
    if not paths:
        raise InputError(f"no model lies there, or no longer: {folder}")
    for path in paths:
        total.update(path.name.encode())
        with open(path, "rb") as file:
            while piece := file.read(1 << 20):
                total.update(piece)
    return total.hexdigest()[:16]
