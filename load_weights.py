"""Hugging Face folder or hub id -> model and tokenizer, and back.

A checkpoint is a Hugging Face folder: config.json (theirs, plus a "gateskip" object), model.safetensors or its shards,
tokenizer.json. Parameter names are the same on both sides, so loading is a check and not a translation: every key is
used, every parameter is filled, every shape is compared by name.
"""
import json
import os
import re
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer

from gates import GateConfig, InputError
from model import Model, ModelConfig

SUPPORTED = ("LlamaForCausalLM", "Gemma2ForCausalLM")
# small files that belong to a model and travel with it unchanged
SIDE_FILES = ("generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


# ---------------------------------------------------------------------------------------------------------------------
# Where a model lies
# ---------------------------------------------------------------------------------------------------------------------

def find_folder(source):
    """source -> Path of a folder with config.json. source: such a folder, a run's --out (its `latest`), or a hub id.

    From the hub only the needed files are fetched, safetensors only, with huggingface_hub's own token and cache.
    InputError in one line otherwise.
    """
    path = Path(source)
    if path.is_dir():
        if (path / "latest").is_file():
            path = path / (path / "latest").read_text().strip()
        if not (path / "config.json").is_file():
            raise InputError(f"{path} has no config.json: not a model folder (a run that has not saved yet has none)")
        return path
    if path.exists():
        raise InputError(f"{source} is a file: --model takes a folder, a run's --out, or a hub id like meta-llama/Llama-3.2-1B")
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", str(source)):
        raise InputError(f"no folder {source}, and that is no hub id either (owner/name, like meta-llama/Llama-3.2-1B)")
    return _download(str(source))


def _download(repo):
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
    try:
        folder = Path(snapshot_download(repo, allow_patterns=["config.json", "tokenizer.json", "model.safetensors.index.json",
                                                              "model.safetensors", "model-*.safetensors", *SIDE_FILES]))
    except GatedRepoError:
        raise InputError(f"{repo} is gated: accept its licence on its hub page, then run `hf auth login`") from None
    except RepositoryNotFoundError:
        raise InputError(f"no folder {repo}, and no such model on the hub (or it is private: run `hf auth login`)") from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"no folder {repo}, and the hub could not be reached for it ({reason}): "
                         f"check the network, or give a local folder") from None
    if not (folder / "config.json").is_file():
        raise InputError(f"hub model {repo} has no config.json")
    return folder


def read_json(path):
    """A JSON object from a file; InputError naming the file if it is none."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} holds a {type(value).__name__}, not a JSON object")
    return value


# ---------------------------------------------------------------------------------------------------------------------
# config.json
# ---------------------------------------------------------------------------------------------------------------------

def config_from_hf(raw, name="config.json"):
    """Hugging Face's config dict -> ModelConfig. Reads both styles: rope_theta + rope_scaling, and rope_parameters."""
    architecture = (raw.get("architectures") or [None])[0]
    if architecture not in SUPPORTED:
        raise InputError(f"{name}: architecture {architecture} is not supported; supported: {', '.join(SUPPORTED)}")
    gemma = architecture == "Gemma2ForCausalLM"
    fields = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
    missing = [f for f in fields if not isinstance(raw.get(f), int) or raw[f] < 1]
    if missing:
        raise InputError(f"{name}: {', '.join(missing)} missing or not a positive integer")
    if not raw.get("head_dim") and raw["hidden_size"] % raw["num_attention_heads"]:
        raise InputError(f"{name}: hidden_size {raw['hidden_size']} is no multiple of num_attention_heads and there is no head_dim")

    rope = raw.get("rope_parameters") or {**(raw.get("rope_scaling") or {}), "rope_theta": raw.get("rope_theta", 10000.0)}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    activation = raw.get("hidden_activation") or raw.get("hidden_act") or ("gelu_pytorch_tanh" if gemma else "silu")
    unsupported = {
        f"rope type {rope_type!r}": rope_type not in ("default", "llama3"),
        f"activation {activation!r}": activation != ("gelu_pytorch_tanh" if gemma else "silu"),
        "attention_bias": raw.get("attention_bias"), "mlp_bias": raw.get("mlp_bias"),
        "quantization_config": raw.get("quantization_config"),
        "use_bidirectional_attention": raw.get("use_bidirectional_attention"),
    }
    for what, present in unsupported.items():
        if present:
            raise InputError(f"{name}: {what} is not supported")

    layers, heads = raw["num_hidden_layers"], raw["num_attention_heads"]
    kv_heads = raw.get("num_key_value_heads") or heads
    if heads % kv_heads:
        raise InputError(f"{name}: num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}")
    windows = None
    if gemma:
        types = raw.get("layer_types") or ["full_attention" if i % 2 else "sliding_attention" for i in range(layers)]
        windows = [raw.get("sliding_window", 4096) if kind == "sliding_attention" else None for kind in types]
    eos = raw.get("eos_token_id")
    gateskip = raw.get("gateskip") or {}
    try:
        gate = GateConfig(**gateskip["gate"]) if gateskip.get("gate") else None
    except TypeError as error:
        raise InputError(f"{name}: \"gateskip\" was written by another version of this project ({error})") from None
    return ModelConfig(
        vocab_size=raw["vocab_size"], hidden_size=raw["hidden_size"], intermediate_size=raw["intermediate_size"],
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads,
        head_dim=raw.get("head_dim") or raw["hidden_size"] // heads,
        rms_norm_eps=raw.get("rms_norm_eps", 1e-6),
        rope_theta=float(rope.get("rope_theta", 10000.0)),
        rope_scaling={k: v for k, v in rope.items() if k != "rope_theta"} if rope_type == "llama3" else None,
        max_position_embeddings=raw.get("max_position_embeddings", 8192 if gemma else 2048),
        tie_word_embeddings=raw.get("tie_word_embeddings", gemma),           # Gemma's default is True, Llama's False
        initializer_range=raw.get("initializer_range", 0.02),
        eos_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
        gemma=gemma,
        attn_scale=raw.get("query_pre_attn_scalar", 256) ** -0.5 if gemma else None,
        attn_softcap=raw.get("attn_logit_softcapping", 50.0) if gemma else None,
        final_softcap=raw.get("final_logit_softcapping", 30.0) if gemma else None,
        windows=windows, gate=gate, gateskip=gateskip)


# ---------------------------------------------------------------------------------------------------------------------
# Loading
# ---------------------------------------------------------------------------------------------------------------------

def weight_files(folder):
    """{tensor name: file} of a checkpoint. InputError for a missing shard or a pickle-only folder."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise InputError(f"{index} has no weight_map")
        for name in sorted(set(weight_map.values())):
            if not (folder / name).is_file():
                raise InputError(f"{folder} lacks the shard {name} that {index.name} names: download it again")
        return {key: folder / name for key, name in weight_map.items()}
    if single.is_file():
        with open_weights(single) as f:
            return {key: single for key in f.keys()}
    if list(folder.glob("*.bin")) + list(folder.glob("*.pt")) + list(folder.glob("*.pth")):
        raise InputError(f"{folder} holds pickled weights only, and loading a pickle can run any code: "
                         f"get the safetensors version, or convert it with a tool that you trust")
    raise InputError(f"{folder} has no model.safetensors and no model.safetensors.index.json")


def open_weights(path):
    """safetensors' reader, its errors told as ours."""
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is truncated or no safetensors file ({error}): download it again") from None


def load_model(source, gate=None, device="cpu", dtype=torch.float32):
    """A Model with the weights of `source` (folder, run's --out, or hub id), in eval mode.

    gate: GateConfig to put fresh gates (from torch's global generator) on a checkpoint that has none; a checkpoint's own
    gates are always loaded. Built on the meta device and filled tensor by tensor, each cast on arrival: peak memory is
    one copy in `dtype` plus the largest tensor. Gates stay float32 or wider. InputError for anything that does not fit.
    """
    folder = find_folder(source)
    config = config_from_hf(read_json(folder / "config.json"), folder / "config.json")
    fresh_gates = gate is not None and config.gate is None
    if gate is not None and config.gate is not None and gate != config.gate:
        raise InputError(f"{folder} already has gates, of another kind ({config.gate}): leave the gate flags out, or start from the ungated model")
    config.gate = gate if fresh_gates else config.gate
    with torch.device("meta"):
        model = Model(config)
    model.source = folder
    generation = folder / "generation_config.json"
    eos = read_json(generation).get("eos_token_id") if generation.is_file() else None
    if eos is not None:
        config.eos_ids = tuple(eos) if isinstance(eos, list) else (eos,)
    model.side_files = {name: (folder / name).read_bytes() for name in SIDE_FILES if (folder / name).is_file()}
    model.raw_config = read_json(folder / "config.json")

    files = weight_files(folder)
    wanted = dict(model.named_parameters())                      # a tied head is listed once, as the embedding
    tied = "lm_head.weight" in files and config.tie_word_embeddings
    known = set(wanted) | ({"lm_head.weight"} if tied else set())
    unknown = sorted(key for key in files if key not in known and not key.endswith("rotary_emb.inv_freq"))
    missing = sorted(key for key in wanted if key not in files and not (fresh_gates and "_gate." in key))
    if unknown or missing:
        raise InputError(f"{folder} does not fit its config.json: "
                         + "; ".join(f"{what} {', '.join(keys[:3])}{f' and {len(keys) - 3} more' if len(keys) > 3 else ''}"
                                     for what, keys in (("missing", missing), ("unexpected", unknown)) if keys))
    by_file = {}
    for key, path in files.items():
        by_file.setdefault(path, []).append(key)
    for path, keys in by_file.items():
        with open_weights(path) as f:
            for key in keys:
                if key in wanted:
                    _assign(model, key, _read(f, key, path), gate_dtype(key, dtype), device)
    for key, p in wanted.items():
        if key not in files:                                     # fresh gates
            _assign(model, key, torch.empty(p.shape), gate_dtype(key, dtype), device)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model["embed_tokens"].weight
        if tied:
            with open_weights(files["lm_head.weight"]) as f:
                if not torch.equal(_read(f, "lm_head.weight", files["lm_head.weight"]).to(dtype), model.lm_head.weight.cpu()):
                    raise InputError(f"{folder}: config.json ties the head to the embedding, but lm_head.weight differs from it")
    if fresh_gates:
        model.init_gates()
    return model.eval()


def new_model(config_file, gate=None, device="cpu", dtype=torch.float32):
    """A Model from a config.json alone, with weights drawn from torch's global generator (train.py --init-config)."""
    if not Path(config_file).is_file():
        raise InputError(f"no such file: {config_file} (--init-config takes a config.json)")
    raw = {key: value for key, value in read_json(config_file).items() if key != "gateskip"}
    config = config_from_hf(raw, config_file)
    config.gate = gate
    with torch.device("meta"):
        model = Model(config)
    for key, p in list(model.named_parameters()):
        _assign(model, key, torch.empty(p.shape), gate_dtype(key, dtype), device)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model["embed_tokens"].weight
    folder = Path(config_file).parent
    model.source, model.raw_config = folder, raw
    model.side_files = {name: (folder / name).read_bytes() for name in SIDE_FILES if (folder / name).is_file()}
    model.init_weights()
    return model.eval()


def gate_dtype(key, dtype):
    """The dtype of a parameter: gates never go below float32."""
    return torch.promote_types(dtype, torch.float32) if "_gate." in key else dtype


def _read(f, key, path):
    try:
        return f.get_tensor(key)
    except SafetensorError as error:
        raise InputError(f"{path}: tensor {key} cannot be read ({error})") from None


def _assign(model, key, tensor, dtype, device):
    module = model.get_submodule(key.rpartition(".")[0])
    leaf = key.rpartition(".")[2]
    expected = getattr(module, leaf).shape
    if tensor.shape != expected:
        raise InputError(f"tensor {key} has shape {tuple(tensor.shape)}, config.json implies {tuple(expected)}")
    setattr(module, leaf, torch.nn.Parameter(tensor.to(device=device, dtype=dtype)))


def load_tokenizer(source):
    """The tokenizers.Tokenizer of a folder, a run's --out or a hub id."""
    path = find_folder(source) / "tokenizer.json"
    if not path.is_file():
        raise InputError(f"{path.parent} has no tokenizer.json")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the Rust side raises bare Exception
        raise InputError(f"{path} is not a tokenizer: {error}") from None


def chat_template(model, messages):
    """The prompt text of a chat by the model's own template, or InputError if it has none.

    messages: [{"role": "user", "content": "..."}]. jinja2 (which torch needs anyway) renders it, sandboxed.
    """
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    settings = json.loads(model.side_files.get("tokenizer_config.json", b"{}"))
    template = model.side_files.get("chat_template.jinja", b"").decode() or settings.get("chat_template")
    if not isinstance(template, str):
        raise InputError(f"{model.source} has no chat template: leave --chat out")
    text = lambda token: token["content"] if isinstance(token, dict) else token or ""
    return ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(template).render(
        messages=messages, add_generation_prompt=True,
        bos_token=text(settings.get("bos_token")), eos_token=text(settings.get("eos_token")))


# ---------------------------------------------------------------------------------------------------------------------
# Saving
# ---------------------------------------------------------------------------------------------------------------------

def save_config(model, folder):
    """Write config.json, theirs plus the "gateskip" object, replacing an old one in one step."""
    raw = {key: value for key, value in model.raw_config.items() if key != "gateskip"}
    raw["dtype" if "dtype" in raw else "torch_dtype"] = str(model.model["embed_tokens"].weight.dtype).removeprefix("torch.")
    gateskip = dict(model.config.gateskip)
    if model.config.gate is not None:
        gateskip["gate"] = asdict(model.config.gate)
    if gateskip:
        raw["gateskip"] = gateskip
    temporary = Path(folder) / "config.json.tmp"
    temporary.write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, Path(folder) / "config.json")


def save_model(model, folder, tokenizer=None):
    """Write a Hugging Face folder: config.json with its "gateskip" object, model.safetensors, tokenizer and side files.

    The backbone opens in other tools. A tied head is stored once. Parameters are written in the dtype that they have.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {key: p.detach().cpu().contiguous() for key, p in model.named_parameters()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    for name, content in model.side_files.items():
        (folder / name).write_bytes(content)
    if tokenizer is not None:
        tokenizer.save(str(folder / "tokenizer.json"))
    save_config(model, folder)
