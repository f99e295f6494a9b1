"""Hugging Face folder or hub id -> model and tokenizer, and back.

A checkpoint is a Hugging Face folder: config.json (theirs, plus a "gateskip" object), model.safetensors or its shards,
tokenizer.json. Parameter names are the same on both sides, so loading is a check and not a translation: every key is
used, every parameter is filled, every shape is compared by name. What does not fit is an InputError of one line.
"""
import json
import math
import re
import shutil
from contextlib import suppress
from dataclasses import asdict, fields
from functools import wraps
from pathlib import Path

from console import InputError

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer

from disk import write
from gates import GRANULARITIES, KV_OF_SKIPPED, GateConfig, check_budget
from model import Model, ModelConfig
from tokens import blame

SUPPORTED = ("LlamaForCausalLM", "Gemma2ForCausalLM")
# small files that belong to a model and travel with it unchanged
SIDE_FILES = ("generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")

# keys of config.json: read here, of Gemma 2 only, and those that change nothing of what a model computes
READ = """architectures model_type vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads
    num_key_value_heads head_dim hidden_act hidden_activation rms_norm_eps rope_theta rope_scaling rope_parameters
    max_position_embeddings tie_word_embeddings initializer_range eos_token_id quantization_config gateskip""".split()
GEMMA = ["layer_types", "sliding_window", "query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping"]
HARMLESS = """bos_token_id pad_token_id dtype torch_dtype transformers_version use_cache pretraining_tp auto_map
    return_dict cache_implementation sliding_window_size max_sequence_length model_max_length tokenizer_class id2label
    label2id task_specific_params is_llama_config transformers.js_config unsloth_version unsloth_fixed max_length
    do_sample num_beams temperature top_k top_p repetition_penalty length_penalty num_beam_groups num_return_sequences
    typical_p output_attentions output_hidden_states gradient_checkpointing attn_implementation torchscript""".split()
# of related decoders, where 1 changes nothing; of any other key null, false, 0 and empty change nothing
NEUTRAL = "partial_rotary_factor residual_multiplier embedding_multiplier logits_scaling logit_scale is_causal".split()


# ---------------------------------------------------------------------------------------------------------------------
# Where a model lies
# ---------------------------------------------------------------------------------------------------------------------

def find_folder(source):
    """source -> Path of a folder with config.json. source: such a folder, a run's --out (its `latest`), or a hub id."""
    path, checkout = Path(source), Path(__file__).resolve().parent
    if not path.exists() and (checkout / path).exists():
        raise InputError(f"{source} does not exist here, but in {checkout}: start there, or give {checkout / path}")
    if not path.exists() and re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", str(source)):
        path = _download(str(source))
    if not path.is_dir():
        raise InputError(f"{source} {'is a file' if path.exists() else 'does not exist'}: "
                         f"give a folder, a run's --out, or a hub id like meta-llama/Llama-3.2-1B")
    latest = path / "latest"
    if latest.is_file() and not (path / "config.json").is_file():        # DeepSpeed leaves one in model folders
        name, is_step = latest.read_text(errors="replace").strip(), re.compile("step-[0-9]+").fullmatch
        if not is_step(name) or not (path / name).is_dir():
            steps = sorted((p.name for p in path.glob("step-*") if is_step(p.name)), key=lambda step: int(step[5:]))
            raise InputError(f"{latest} names {name!r:.60}, which is {'not there' if is_step(name) else 'no step'}: "
                             f"write {steps[-1] if steps else 'the name of a step folder, like step-000500,'} into it")
        path = path / name
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


def read_json(path):
    """A JSON object from a file; InputError naming the file if it is none."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} holds a {type(value).__name__}, not a JSON object")
    return value


# ---------------------------------------------------------------------------------------------------------------------
# config.json
# ---------------------------------------------------------------------------------------------------------------------

def config_from_hf(raw, name="config.json"):
    """Hugging Face's config dict -> ModelConfig. Reads both styles: rope_theta + rope_scaling, and rope_parameters.

    Absent and null fields get transformers' defaults; what this decoder cannot compute is refused, never ignored.
    """
    kinds = {int: "a positive integer", float: "a positive number", bool: "true or false", dict: "a JSON object",
             list: "a list"}

    def get(key, kind=int, default=None, of=raw):
        value = default if of.get(key) is None else of[key]
        fits = type(value) is kind or (kind is float and type(value) is int)     # true is no integer
        if not fits or (kind in (int, float) and not 0 < value < 2 ** 40):
            raise InputError(f"{name}: {key} is {'missing' if value is None else f'{value!r:.60}'}; "
                             f"it must be {kinds[kind]}")
        return value

    def refuse_if(wrong, what):
        if wrong:
            raise InputError(f"{name}: {what}")

    arch = (get("architectures", list, []) or [None])[0]
    refuse_if(arch not in SUPPORTED, f"architecture {arch!r:.60} is not supported; supported: {', '.join(SUPPORTED)}")
    gemma = arch == "Gemma2ForCausalLM"
    kind, known = ("gemma2", READ + HARMLESS + GEMMA) if gemma else ("llama", READ + HARMLESS)
    refuse_if((raw.get("model_type") or kind) != kind, f"{arch} has model_type {kind}, not {raw.get('model_type')!r}")
    unread = [key for key, value in raw.items() if key not in known and value is not None and key[:1] != "_"
              and (value != 1 if key in NEUTRAL else value)]
    refuse_if(unread, f"{', '.join(unread[:3])} is not supported: this decoder does not read it, and it may change "
              f"what the model computes (delete it from the file if it does not)")
    layers, hidden, heads = get("num_hidden_layers"), get("hidden_size"), get("num_attention_heads")
    kv_heads = get("num_key_value_heads", default=None if gemma else heads)
    refuse_if(raw.get("head_dim") is None and hidden % heads,
              f"hidden_size {hidden} is no multiple of num_attention_heads {heads}")
    head_dim = get("head_dim", default=None if gemma else hidden // heads)
    refuse_if(heads % kv_heads, f"num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}")
    refuse_if(head_dim % 2, f"head_dim {head_dim} is odd, but rotary positions turn pairs of channels")
    size = hidden * (get("vocab_size") + layers * (2 * (heads + kv_heads) * head_dim + 3 * get("intermediate_size")))
    refuse_if(layers > 1000 or size > 2 ** 40, f"num_hidden_layers {layers}, {size:.0e} weights: no machine holds that")

    styles = [{"rope_type": style.get("type", "default"), **style} for key in ("rope_parameters", "rope_scaling")
              if (style := get(key, dict, {}))]
    ropes = [{key: style[key] for key in style if key not in ("type", "rope_theta")} for style in styles]
    thetas = [of["rope_theta"] for of in (raw, *styles) if of.get("rope_theta") is not None]
    refuse_if(any(rope != ropes[0] for rope in ropes) or any(theta != thetas[0] for theta in thetas),
              "rope_parameters, rope_scaling and rope_theta disagree: delete what is wrong")
    rope = {"rope_type": "default", "rope_theta": (thetas or [None])[0], **(ropes or [{}])[0]}
    rope_type, llama3 = rope["rope_type"], "factor low_freq_factor high_freq_factor original_max_position_embeddings"
    scaling = {key: get(key, float, of=rope) for key in llama3.split()} if rope_type == "llama3" else None
    refuse_if(scaling and scaling["high_freq_factor"] <= scaling["low_freq_factor"],
              "high_freq_factor must exceed low_freq_factor")
    activation = raw.get("hidden_activation") or raw.get("hidden_act") or ("gelu_pytorch_tanh" if gemma else "silu")
    for what, present in {
            f"rope type {rope_type!r:.60}": rope_type not in ("default", "llama3"),
            **{f"rope {key}": value not in (None, 1) for key, value in rope.items()
               if key not in ("rope_type", "rope_theta", *(scaling or ()))},
            "a quantized checkpoint (take the original one): quantization_config": raw.get("quantization_config"),
            f"activation {activation!r:.60}": activation != ("gelu_pytorch_tanh" if gemma else "silu")}.items():
        refuse_if(present, f"{what} is not supported")

    family = {}
    if gemma:
        kinds_of_layer = ("sliding_attention", "full_attention")                 # window on layers 0, 2, 4, ...
        types = get("layer_types", list, [kinds_of_layer[i % 2] for i in range(layers)])
        refuse_if(len(types) != layers or any(t not in kinds_of_layer for t in types),
                  f"layer_types must be a list of {layers}, each one of {', '.join(kinds_of_layer)}")
        cap = lambda key, default: get(key, float, default) if raw.get(key, default) is not None else None  # null: off
        family = dict(
            gemma=True, attn_scale=get("query_pre_attn_scalar", float, 256) ** -0.5,
            attn_softcap=cap("attn_logit_softcapping", 50.0), final_softcap=cap("final_logit_softcapping", 30.0),
            windows=[get("sliding_window", default=4096) if t == "sliding_attention" else None for t in types])
    gateskip = get("gateskip", dict, {})
    return ModelConfig(
        vocab_size=get("vocab_size"), hidden_size=hidden, intermediate_size=get("intermediate_size"), head_dim=head_dim,
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads, rope_scaling=scaling,
        rms_norm_eps=get("rms_norm_eps", float, 1e-6), rope_theta=float(get("rope_theta", float, 10000.0, rope)),
        max_position_embeddings=get("max_position_embeddings", default=8192 if gemma else 2048), gateskip=gateskip,
        tie_word_embeddings=get("tie_word_embeddings", bool, gemma), gate=_gate_config(gateskip, 2 * layers, name),
        initializer_range=get("initializer_range", float, 0.02), eos_ids=_eos_ids(raw, name), **family)


def _eos_ids(raw, name):
    given = raw.get("eos_token_id")
    ids = () if given is None else tuple(given) if isinstance(given, list) else (given,)
    if any(type(i) is not int or i < 0 for i in ids):
        raise InputError(f"{name}: eos_token_id is {given!r:.60}; it must be a token id or a list of them")
    return ids


def _gate_config(stored, branches, name):
    """config.json["gateskip"] -> its GateConfig or None. Also checks the thresholds, which generation will rely on."""
    try:
        gate = GateConfig(**stored["gate"]) if stored.get("gate") is not None else None
        for field in fields(GateConfig) if gate else ():
            if type(getattr(gate, field.name)) is not field.type:
                raise ValueError(f"gate {field.name} is {getattr(gate, field.name)!r:.60}")
        if "thresholds" in stored:
            for key, allowed in (("skip", GRANULARITIES), ("kv", KV_OF_SKIPPED)):
                if stored.get(key) not in allowed:
                    raise ValueError(f"{key} {stored.get(key)!r:.60} is not one of {', '.join(allowed)}")
            for budget, values in stored["thresholds"].items():
                check_budget(budget)
                if len(values) != branches or not all(math.isfinite(v) for v in values):
                    raise ValueError(f"the thresholds of budget {budget} are not {branches} numbers, one per branch")
            if 1.0 not in map(float, stored["thresholds"]) or type(stored.get("budget_end", 0)) not in (int, float):
                raise ValueError("no thresholds of budget 1.0, or a budget_end that is no number")
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        raise InputError(f'{name}: "gateskip" is not what this version writes ({error}): '
                         f'train the gates again') from None
    return gate


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
    if gate is not None and config.gate not in (None, gate):
        raise InputError(f"{folder} already has gates, of another kind ({config.gate}): "
                         f"leave the gate flags out, or start from the ungated model")
    config.gate = config.gate or gate
    generation = folder / "generation_config.json"               # knows better than config.json when to stop
    if generation.is_file():
        config.eos_ids = _eos_ids(read_json(generation), generation) or config.eos_ids
    with torch.device("meta"):
        model = Model(config)
    model.source, model.raw_config = folder, raw
    model.side_files = {name: (folder / name).read_bytes() for name in SIDE_FILES if (folder / name).is_file()}
    return model


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
    """The tokenizers.Tokenizer of a folder, a run's --out or a hub id. It never truncates and never pads."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise InputError(f"{folder} has no tokenizer.json")
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
    """Write config.json, theirs plus the "gateskip" object, replacing an old one in one step."""
    raw = {key: value for key, value in model.raw_config.items() if key != "gateskip"}
    for key in {"dtype", "torch_dtype"} & set(raw) or ["torch_dtype"]:
        raw[key] = str(model.model["embed_tokens"].weight.dtype).removeprefix("torch.")
    gate = model.config.gate
    gateskip = model.config.gateskip | ({} if gate is None else {"gate": asdict(gate)})
    if gateskip:
        raw["gateskip"] = gateskip
    write(Path(folder) / "config.json", json.dumps(raw, indent=2) + "\n")


def save_model(model, folder, tokenizer=None):
    """Write a Hugging Face folder: config.json with its "gateskip" object, model.safetensors, tokenizer and side files.

    The backbone opens in other tools. A tied head is stored once. Parameters keep their dtype. OSError on a full disk.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {key: p.detach().cpu().contiguous() for key, p in model.named_parameters()}
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
