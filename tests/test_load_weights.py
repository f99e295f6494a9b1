"""Tests of load_weights.py: both config styles, shards, casts, round trips, chat templates, one line for bad input."""
import fnmatch
import json
import os
import shutil
import weakref
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

import load_weights
from console import InputError
from gates import GateConfig
from load_weights import (config_from_hf, find_folder, load_model, load_tokenizer, new_model, read_json,
                          save_config, save_model, weight_files)
from tokens import chat_template

GOLDEN = Path(__file__).resolve().parent / "golden"
NAMES = ("llama_rope3", "llama_untied", "gemma2")
GATES = {"vector": GateConfig(), "scalar": GateConfig("scalar"), "mlp": GateConfig(arch="mlp"),
         "lowrank": GateConfig(arch="lowrank", rank=3), "shared": GateConfig("scalar", shared=True, input="residual"),
         "detached": GateConfig(placement="before", detach=True)}
GONE = "a field to delete"


def checkpoint(folder, name="llama_rope3", style="config.json", **changes):
    """A copy of a golden checkpoint with fields of its config.json changed (GONE: deleted)."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in (GOLDEN / name).glob("model*"):
        shutil.copy(file, folder)
    config = {**json.loads((GOLDEN / name / style).read_text()), **changes}
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v != GONE}))
    return folder


def change_weights(folder, change, file="model.safetensors"):
    """Rewrite a weight file after change(tensors)."""
    tensors = load_file(folder / file)
    change(tensors)
    save_file({key: t.contiguous().clone() for key, t in tensors.items()}, folder / file, metadata={"format": "pt"})
    return folder


def on_disk(folder):
    """All tensors of a golden checkpoint, read without the code under test."""
    return {k: t for file in sorted(folder.glob("model*.safetensors")) for k, t in load_file(file).items()}


def complaint(call, *args, **kwargs):
    """The message of the InputError that a call ends in: one line, not endless."""
    with pytest.raises(InputError) as caught:
        call(*args, **kwargs)
    text = str(caught.value)
    assert "\n" not in text and len(text) < 600
    return text


def tokenizer():
    made = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return made


def logits(model, name="llama_rope3"):
    with torch.no_grad():
        return model(load_file(GOLDEN / name / "golden.safetensors")["input_ids"])[0]


# Loading what is right.

@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_comes_from_the_file(name):
    """A tensor left as torch.empty or on the meta device, or put in another's place."""
    tensors, model = on_disk(GOLDEN / name), load_model(GOLDEN / name)
    parameters = dict(model.named_parameters())
    assert set(parameters) == set(tensors) and not model.training
    for key, p in parameters.items():
        assert p.dtype == torch.float32 and p.requires_grad and torch.equal(p, tensors[key].float()), key


@pytest.mark.parametrize("name", NAMES)
def test_both_config_styles_say_the_same(name, tmp_path):
    """One style's rope, dtype, tie or layer_types read wrongly or left at a default: wrong logits, no error."""
    new, old = (checkpoint(tmp_path / style, name, style) for style in ("config.json", "config.hub.json"))
    assert config_from_hf(read_json(new / "config.json")) == config_from_hf(read_json(old / "config.json"))
    expected = load_file(GOLDEN / name / "golden.safetensors")["logits"]
    ours = logits(load_model(new), name)
    assert torch.equal(ours, logits(load_model(old), name))
    assert (ours - expected).abs().max() < 1e-3


def test_llama_defaults():
    """An old Llama config without kv heads, head_dim, eps or tie (Llama 1) read with another family's defaults."""
    fields = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    c = config_from_hf({"architectures": ["LlamaForCausalLM"], **dict(zip(fields, (100, 48, 64, 2, 4)))})
    assert (c.num_key_value_heads, c.head_dim, c.rms_norm_eps, c.rope_theta) == (4, 12, 1e-6, 10000.0)
    assert (c.tie_word_embeddings, c.rope_scaling, c.max_position_embeddings, c.eos_ids) == (False, None, 2048, ())
    assert (c.attn_scale, c.attn_softcap, c.final_softcap, c.windows, c.gemma) == (None, None, None, None, False)


def test_gemma_defaults():
    """Hub configs of Gemma 2 leave these out; the Llama defaults in their place give a wrong but fluent model."""
    raw = json.loads((GOLDEN / "gemma2" / "config.hub.json").read_text())
    bare = {k: v for k, v in raw.items() if k not in (
        "sliding_window", "attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar",
        "max_position_embeddings")}
    c = config_from_hf(bare)
    assert c.tie_word_embeddings and c.windows == [4096, None, 4096, None]
    assert (c.attn_softcap, c.final_softcap, c.attn_scale, c.max_position_embeddings) == (50.0, 30.0, 1 / 16, 8192)
    off = config_from_hf({**raw, "attn_logit_softcapping": None, "final_logit_softcapping": None})
    assert off.attn_softcap is None and off.final_softcap is None    # null is not absent here
    c = config_from_hf({**raw, "layer_types": ["full_attention"] * 3 + ["sliding_attention"]})
    assert c.windows == [None, None, None, 16]


def test_where_to_stop(tmp_path):
    """eos ids from config.json although generation_config.json adds the end-of-turn token: chats never end."""
    folder = checkpoint(tmp_path)
    assert load_model(folder).config.eos_ids == (2, 3)
    for written, ids in ((7, (7,)), ([7, 8], (7, 8)), (None, (2, 3))):
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": written}))
        assert load_model(folder).config.eos_ids == new_model(folder / "config.json").config.eos_ids == ids


def test_new_model(tmp_path):
    """Weights from scratch that are not reproducible or uninitialised, or gates of the config's owner carried over."""
    config = checkpoint(tmp_path, gateskip={"gate": asdict(GateConfig("scalar")), "skip": "attn"}) / "config.json"
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(new_model(config))
    one, same, other = (dict(m.named_parameters()) for m in drawn)
    assert drawn[0].config.gate is None and drawn[0].config.gateskip == {} and not drawn[0].training
    assert all(torch.equal(p, same[key]) for key, p in one.items())
    assert not torch.equal(one["model.embed_tokens.weight"], other["model.embed_tokens.weight"])
    gated = new_model(config, GateConfig(), dtype=torch.bfloat16)
    assert gated.get_parameter("model.layers.0.mlp_gate.out.weight").dtype == torch.float32
    assert "no such file" in complaint(new_model, tmp_path / "none.json")
    assert "--init-config" in complaint(new_model, tmp_path)


def test_tying_is_sharing(tmp_path):
    """A tied head that is a copy drifts from the embedding in training; an untied one that is shared overwrites it."""
    config = json.loads((GOLDEN / "llama_rope3" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    tied = [load_model(GOLDEN / "llama_rope3"), load_model(GOLDEN / "gemma2"), new_model(tmp_path / "config.json"),
            load_model(GOLDEN / "llama_rope3", dtype=torch.bfloat16)]
    for model in tied:
        assert model.lm_head.weight is model.model["embed_tokens"].weight
        assert "lm_head.weight" not in dict(model.named_parameters())
    model = load_model(GOLDEN / "llama_untied")
    assert model.lm_head.weight.data_ptr() != model.model["embed_tokens"].weight.data_ptr()


def test_single_file_and_shards_give_the_same(tmp_path):
    """A reader that takes every tensor from the first shard, or forgets the index."""
    single = checkpoint(tmp_path / "single", "llama_untied")
    tensors = on_disk(single)
    for file in single.glob("model*"):
        file.unlink()
    save_file(tensors, single / "model.safetensors")
    assert set(weight_files(single).values()) == {single / "model.safetensors"}
    assert len(set(weight_files(GOLDEN / "llama_untied").values())) == 3
    assert torch.equal(logits(load_model(single)), logits(load_model(GOLDEN / "llama_untied")))


def test_saved_file_wins_over_old_shards(tmp_path):
    """Saving over a sharded checkpoint leaves its index; a reader that prefers it would load the old weights."""
    folder = checkpoint(tmp_path, "llama_untied")
    model = load_model(folder)
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    save_model(model, folder)
    assert (folder / "model.safetensors.index.json").is_file()
    assert torch.equal(load_model(folder).lm_head.weight, model.lm_head.weight)


def test_a_head_stored_although_tied(tmp_path):
    """Older tools store it: refusing an equal one locks such models out, ignoring a different one changes the model."""
    folder, embed = checkpoint(tmp_path), "model.embed_tokens.weight"
    change_weights(folder, lambda t: t.update({"lm_head.weight": t[embed].clone()}))
    model = load_model(folder, dtype=torch.bfloat16)
    assert model.lm_head.weight is model.model["embed_tokens"].weight
    for wrong in (lambda t: t[embed] * (1 + (torch.arange(128) == 127)[:, None]), lambda t: t[embed][:100]):
        change_weights(folder, lambda t: t.update({"lm_head.weight": wrong(t)}))
        text = complaint(load_model, folder)
        assert "lm_head.weight" in text and "model.safetensors" in text and "tie_word_embeddings" in text
    long = checkpoint(tmp_path / "long", vocab_size=4100) / "config.json"        # compared piece by piece
    save_model(new_model(long), folder)
    change_weights(folder, lambda t: t.update({"lm_head.weight": t[embed][:4096]}))
    assert "lm_head.weight differs" in complaint(load_model, folder)


def test_fresh_gates_follow_the_seed():
    """Gates left uninitialised, not reproducible, or drawn at the cost of the backbone's weights."""
    def load(seed):
        torch.manual_seed(seed)
        return load_model(GOLDEN / "gemma2", gate=GateConfig())
    one, same, other, plain = load(1), load(1), load(2), dict(load_model(GOLDEN / "gemma2").named_parameters())
    for key, p in one.named_parameters():
        assert torch.equal(p, same.get_parameter(key))
        if "_gate." not in key:
            assert torch.equal(p, plain[key])
        elif key.endswith("bias"):
            assert (p == 5).all()
        else:
            assert 0.005 < p.std() < 0.02 and not torch.equal(p, other.get_parameter(key))


def test_casts_on_arrival(tmp_path):
    """A dtype taken from the file instead of the caller; gates below float32, where they could not rank tokens."""
    tensors = on_disk(GOLDEN / "gemma2")
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        model = load_model(GOLDEN / "gemma2", gate=GateConfig(), dtype=dtype)
        for key, p in model.named_parameters():
            gate = "_gate." in key
            assert p.dtype == (torch.promote_types(dtype, torch.float32) if gate else dtype), key
            assert gate or torch.equal(p, tensors[key].to(dtype))
    down = load_model(GOLDEN / "llama_rope3", dtype=torch.bfloat16)
    for key, t in on_disk(GOLDEN / "llama_rope3").items():
        assert torch.equal(down.get_parameter(key), t.bfloat16())
    save_model(load_model(GOLDEN / "llama_rope3", gate=GateConfig()), tmp_path)
    change_weights(tmp_path, lambda t: t.update({k: v.bfloat16() for k, v in t.items()}))
    gate = load_model(tmp_path, dtype=torch.bfloat16).get_parameter("model.layers.1.mlp_gate.out.weight")
    assert gate.dtype == torch.float32


def test_a_checkpoints_own_gates_stay(tmp_path):
    """Trained gates drawn anew because gate flags were given, or silently replaced by another kind."""
    saved = load_model(GOLDEN / "llama_rope3", gate=GateConfig("scalar"))
    save_model(saved, tmp_path)
    for gate in (None, GateConfig("scalar")):
        model = load_model(tmp_path, gate=gate)
        assert all(torch.equal(p, saved.get_parameter(key)) for key, p in model.named_parameters())
        assert model.config.gate == GateConfig("scalar")
    text = complaint(load_model, tmp_path, gate=GateConfig("vector"))
    assert str(tmp_path) in text and "already has gates" in text and "form='scalar'" in text
    assert "leave the gate flags out" in text


def test_gates_without_gateskip_in_config_are_not_thrown_away(tmp_path):
    """The original config.json copied over ours: loading with gate flags would draw new gates over the trained ones."""
    save_model(load_model(GOLDEN / "llama_rope3", gate=GateConfig()), tmp_path)
    shutil.copy(GOLDEN / "llama_rope3" / "config.json", tmp_path)
    for gate in (None, GateConfig()):
        assert "unexpected model.layers.0.mlp_gate" in complaint(load_model, tmp_path, gate=gate)


def test_weights_do_not_hang_on_the_file(tmp_path):
    """Parameters that are views of the mapped file: another program that rewrites it changes the model, or kills us."""
    folder = checkpoint(tmp_path)
    model, file = load_model(folder), folder / "model.safetensors"
    with open(file, "r+b") as f:
        f.write(b"\0" * file.stat().st_size)
    for key, t in on_disk(GOLDEN / "llama_rope3").items():
        assert torch.equal(model.get_parameter(key), t)


@pytest.mark.parametrize("stored_head", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_raw_tensor_at_a_time(dtype, stored_head, tmp_path, monkeypatch):
    """A whole file read at once, a last tensor kept while the next is read, a parameter that is a view of its file, or
    a model first built in memory: an 8B checkpoint would need twice its memory."""
    folder = checkpoint(tmp_path)
    if stored_head:
        change_weights(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    alive, counts, real_open, real_model = [], [], load_weights.safe_open, load_weights.Model

    class Buffer(bytearray):        # memory that a weak reference can watch: gone when no tensor uses it any more
        pass

    class Reader:
        def __init__(self, *args, **kwargs):
            self.file = real_open(*args, **kwargs)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def keys(self):
            return self.file.keys()

        def get_tensor(self, key):
            t = self.file.get_tensor(key)
            buffer = Buffer(t.view(torch.uint8).numpy().tobytes())
            alive.append(weakref.ref(buffer))
            counts.append(sum(ref() is not None for ref in alive))
            return torch.frombuffer(buffer, dtype=t.dtype).view(t.shape)

    def model_on_meta(config):
        model = real_model(config)
        assert all(p.is_meta for p in model.parameters())
        return model

    monkeypatch.setattr(load_weights, "safe_open", Reader)
    monkeypatch.setattr(load_weights, "Model", model_on_meta)
    model = load_model(folder, dtype=dtype)
    assert len(counts) == len(dict(model.named_parameters())) + stored_head and max(counts) == 1
    assert not any(ref() is not None for ref in alive)


# Saving.

def test_side_files_travel_unchanged(tmp_path):
    """A saved chat model that has lost its template, its stop tokens or its special tokens."""
    folder = checkpoint(tmp_path / "a")
    for name in load_weights.SIDE_FILES:
        (folder / name).write_text(json.dumps({"from": name}) + " \n")
    save_model(load_model(folder), tmp_path / "b")
    save_model(new_model(folder / "config.json"), tmp_path / "c")
    for name in load_weights.SIDE_FILES:
        first = (folder / name).read_bytes()
        assert first == (tmp_path / "b" / name).read_bytes() == (tmp_path / "c" / name).read_bytes()
    assert not (tmp_path / "b" / "tokenizer.json").exists()      # none was given


@pytest.mark.parametrize("name, gate", [(name, None) for name in NAMES] + [("llama_rope3", g) for g in GATES] +
                         [("gemma2", "vector")])
def test_round_trip(name, gate, tmp_path):
    """A parameter lost, renamed, cast or stored twice on the way to disk and back; a config.json for us only."""
    torch.manual_seed(0)
    model = load_model(GOLDEN / name, gate=gate and GATES[gate])
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape))
    if gate:
        thresholds = {"0.9": [0.1 * b for b in range(2 * len(model.model["layers"]))]}
        model.config.gateskip = {"skip": "all", "kv": "dense", "thresholds": thresholds}
    save_model(model, tmp_path / "saved", tokenizer())

    again = load_model(tmp_path / "saved")
    parameters = dict(model.named_parameters())
    assert set(parameters) == set(dict(again.named_parameters()))
    assert set(parameters) == set(load_file(tmp_path / "saved" / "model.safetensors"))
    assert all(torch.equal(p, again.get_parameter(key)) for key, p in parameters.items())
    assert again.config.gate == model.config.gate and torch.equal(logits(again, name), logits(model, name))

    theirs, ours = (json.loads((f / "config.json").read_text()) for f in (GOLDEN / name, tmp_path / "saved"))
    assert ours.pop("dtype") == "float32" and theirs.pop("dtype")
    stored = ours.pop("gateskip", None)
    assert ours == theirs
    assert stored == (gate and {**model.config.gateskip, "gate": asdict(GATES[gate])})
    assert load_tokenizer(tmp_path / "saved").encode("a b").ids == [0, 1]
    assert not list((tmp_path / "saved").glob("*.tmp"))


@pytest.mark.parametrize("style, key", [("config.json", "dtype"), ("config.hub.json", "torch_dtype")])
def test_saved_dtype_is_named_in_its_own_style(style, key, tmp_path):
    """A config that still says bfloat16 beside float32 weights: other tools would load a trained model rounded."""
    save_model(load_model(checkpoint(tmp_path / "a", "gemma2", style)), tmp_path / "b")
    saved = json.loads((tmp_path / "b" / "config.json").read_text())
    assert saved[key] == "float32" and len({"dtype", "torch_dtype"} & set(saved)) == 1
    save_model(load_model(tmp_path / "b", GateConfig(), dtype=torch.bfloat16), tmp_path / "c")
    assert json.loads((tmp_path / "c" / "config.json").read_text())[key] == "bfloat16"
    for key, t in load_file(tmp_path / "c" / "model.safetensors").items():
        assert t.dtype == (torch.float32 if "_gate." in key else torch.bfloat16)


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json", "generation_config.json", "config.json"])
def test_a_failed_save_is_an_oserror(file, tmp_path):
    """The Rust writers raise errors of their own, which train.py would not catch: no last line, no clean-up."""
    model = load_model(GOLDEN / "llama_rope3")
    model.side_files["generation_config.json"] = b"{}"
    (tmp_path / file).mkdir()                                    # a write that fails everywhere, for root as well
    with pytest.raises(OSError, match=file):
        save_model(model, tmp_path, tokenizer())


def test_full_disk(tmp_path, monkeypatch):
    """What safetensors says on a full disk, not as an OSError with the path; a config.json, so that it looks whole."""
    def full(*args, **kwargs):
        raise load_weights.SafetensorError("I/O error: No space left on device (os error 28)")
    monkeypatch.setattr(load_weights, "save_file", full)
    with pytest.raises(OSError, match="model.safetensors: I/O error: No space left"):
        save_model(load_model(GOLDEN / "llama_rope3"), tmp_path / "new")
    assert "no config.json" in complaint(load_model, tmp_path / "new")


def test_config_is_replaced_in_one_step(tmp_path, monkeypatch):
    """A disk that fills while thresholds are added to a finished checkpoint: a half-written config.json loses it."""
    model = load_model(GOLDEN / "llama_rope3", gate=GateConfig())
    save_model(model, tmp_path)
    before, real_write = (tmp_path / "config.json").read_bytes(), Path.write_text

    def half(path, text, *args, **kwargs):
        real_write(path, text[:len(text) // 2])
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(OSError):
        save_config(model, tmp_path)
    assert (tmp_path / "config.json").read_bytes() == before


# Where a model lies.

def test_latest_is_followed(tmp_path):
    """A run's --out given as a model: its newest step, not an error and not an older one."""
    for step in ("step-000001", "step-000002"):
        save_model(load_model(GOLDEN / "llama_rope3"), tmp_path / "out" / step, tokenizer())
    (tmp_path / "out" / "latest").write_text("step-000002\n")
    assert load_model(tmp_path / "out").source == find_folder(str(tmp_path / "out")) == tmp_path / "out" / "step-000002"
    assert load_tokenizer(tmp_path / "out").get_vocab_size() == 3
    (tmp_path / "out" / "step-000001" / "latest").write_text("global_step7")     # DeepSpeed leaves one in model folders
    assert find_folder(tmp_path / "out" / "step-000001").name == "step-000001"


def test_wrong_places(tmp_path):
    """A traceback, or a search on the hub, for a mistyped path."""
    file = tmp_path / "model.bin"
    file.touch()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").touch()
    hint = "give a folder, a run's --out, or a hub id like meta-llama/Llama-3.2-1B"
    for source, words in ((tmp_path / "none", "does not exist"), ("just-a-name", "does not exist"),
                          ("../a/b", "does not exist"), (file, "is a file")):
        text = complaint(load_model, source)
        assert str(source) in text and words in text and hint in text
    text = complaint(load_model, tmp_path / "run")
    assert f"{tmp_path / 'run'} has no config.json" in text and "a run that has not saved yet" in text
    (tmp_path / "run" / "latest").write_bytes(b"step-000009\xff\nmore")
    text = complaint(load_model, tmp_path / "run")
    assert str(tmp_path / "run" / "latest") in text and "step-000009" in text and "not there" in text
    assert "no tokenizer.json" in complaint(load_tokenizer, GOLDEN / "gemma2")


def test_only_needed_files_are_fetched(monkeypatch):
    """Pickles, or a second copy of the weights in another format: gigabytes, and code that could run."""
    import huggingface_hub
    asked = {}

    def fetch(repo, allow_patterns, local_files_only):
        asked.update(repo=repo, patterns=allow_patterns, local=local_files_only)
        return str(GOLDEN / "llama_rope3")
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *args, **kwargs: None)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert load_model("meta-llama/Llama-3.2-1B").source == GOLDEN / "llama_rope3"
    assert asked["repo"] == "meta-llama/Llama-3.2-1B" and asked["local"] is False
    wanted = ["config.json", "tokenizer.json", "model.safetensors", "model-00001-of-00004.safetensors",
              "model.safetensors.index.json", "generation_config.json", "tokenizer_config.json", "chat_template.jinja"]
    unwanted = ["pytorch_model.bin", "original/consolidated.00.pth", "consolidated.safetensors",
                "onnx/model.safetensors", "tf_model.h5", "tokenizer.model", "README.md", "model.py",
                "flax_model.msgpack", "gemma-2-2b.gguf"]
    fetched = [name for name in wanted + unwanted if any(fnmatch.fnmatch(name, p) for p in asked["patterns"])]
    assert fetched == wanted


def hub_error(name, message="some words\nmore words"):
    from huggingface_hub import errors
    if name == "OSError":
        return OSError(28, "No space left on device")
    if name == "RuntimeError":
        return RuntimeError()
    if name == "LocalEntryNotFoundError":
        return errors.LocalEntryNotFoundError(message)
    return getattr(errors, name)(message, response=SimpleNamespace(headers={}, request=None, status_code=403))


@pytest.mark.parametrize("error, words", [
    ("GatedRepoError", ["gated", "licence", "hf auth login"]),
    ("RepositoryNotFoundError", ["no such model", "private"]),
    ("LocalEntryNotFoundError", ["some words", "check the network", "local folder"]),
    ("HfHubHTTPError", ["some words", "network"]), ("DisabledRepoError", ["DisabledRepoError", "some words"]),
    ("OSError", ["No space left", "local folder"]), ("RuntimeError", ["RuntimeError"])])
@pytest.mark.parametrize("where", ["asking", "fetching"])
def test_hub_errors_are_one_line(where, error, words, monkeypatch):
    """Each of the hub client's errors, on the first question or in mid-download, as a page of traceback."""
    import huggingface_hub
    asked, cache_only = [], []

    def ask(self, repo, timeout=None):
        asked.append(timeout)
        if where == "asking":
            raise hub_error(error)

    def fetch(repo, allow_patterns, local_files_only):
        cache_only.append(local_files_only)
        raise hub_error("LocalEntryNotFoundError", "not in the cache") if local_files_only else hub_error(error)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", ask)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    text = complaint(load_model, "Owner/Name")
    assert text.startswith("no folder Owner/Name here") and "more words" not in text
    assert all(word in text for word in words)
    assert cache_only == [where == "asking"]
    assert asked == [10]             # without a time limit, a network that swallows packets means waiting for ever


def test_cached_model_without_network(tmp_path, monkeypatch):
    """The hub client's cache is symlinks into blobs/: a loader that resolves or refuses them, or needs the network."""
    from huggingface_hub import constants
    repo = tmp_path / "models--Owner--Name"
    snapshot, blobs = repo / "snapshots" / ("0" * 40), repo / "blobs"
    for folder in (snapshot, blobs, repo / "refs"):
        folder.mkdir(parents=True)
    (repo / "refs" / "main").write_text("0" * 40)
    for i, file in enumerate(checkpoint(tmp_path / "m", "llama_untied").iterdir()):
        shutil.copy(file, blobs / f"blob{i}")
        os.symlink(f"../../blobs/blob{i}", snapshot / file.name)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert torch.equal(logits(load_model("Owner/Name")), logits(load_model(GOLDEN / "llama_untied")))
    text = complaint(load_model, "OwnerX/NoSuchModel")           # the client itself, not a stand-in
    assert "no folder OwnerX/NoSuchModel" in text and "check the network" in text


# Tokenizer and chat.

def test_tokenizer_neither_cuts_nor_pads(tmp_path):
    """Truncation and padding that a tokenizer.json brings from its training: long prompts lose their end in silence."""
    folder, made = checkpoint(tmp_path), tokenizer()
    made.enable_truncation(3)
    made.enable_padding(length=8)
    made.save(str(folder / "tokenizer.json"))
    assert load_tokenizer(folder).encode("a b a b a b").ids == [0, 1] * 3
    assert [len(e.ids) for e in load_tokenizer(folder).encode_batch(["a", "a b"])] == [1, 2]


@pytest.mark.parametrize("content", ["", "{}", "[]", "not json", '{"model": {"type": "none"}}'])
def test_corrupt_tokenizer(content, tmp_path):
    """tokenizers raises bare Exception, which no command line catches."""
    folder = checkpoint(tmp_path)
    (folder / "tokenizer.json").write_text(content)
    text = complaint(load_tokenizer, folder)
    assert str(folder / "tokenizer.json") in text and "not a tokenizer" in text


def chat(template=None, **settings):
    """chat_template on a stand-in for a model, with a chat_template.jinja and tokenizer_config fields."""
    files = {"tokenizer_config.json": json.dumps(settings).encode()} if settings else {}
    files.update({"chat_template.jinja": template.encode()} if template is not None else {})
    model = SimpleNamespace(source="folder", side_files=files)
    return chat_template(model, [{"role": "user", "content": "a <b> & 'c'"}])


def test_chat_template_of_a_folder(tmp_path):
    """Side files not read when the model is loaded, or lost on saving: --chat works on the original only."""
    folder = checkpoint(tmp_path / "a")
    assert f"{folder} has no chat template: leave --chat out" in complaint(chat_template, load_model(folder), [])
    (folder / "chat_template.jinja").write_text("é{{ messages[0].content }}", encoding="utf-8")
    save_model(load_model(folder), tmp_path / "b")
    assert chat_template(load_model(tmp_path / "b"), [{"role": "user", "content": "hi"}]) == "éhi"


CHAT = ("{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m.content }}{{ eos_token }}\n{% endfor %}"
        "{% if add_generation_prompt %}[bot]{% endif %}")


def test_chat_template_renders():
    """A template not found, rendered as HTML, without its special tokens, or without the turn that the model begins."""
    want = "<s>[user]a <b> & 'c'</s>\n[bot]"
    assert chat(CHAT, bos_token="<s>", eos_token={"content": "</s>"}) == want
    assert chat(chat_template=CHAT, bos_token={"content": "<s>"}, eos_token="</s>") == want
    assert chat(CHAT, chat_template="old", bos_token="<s>", eos_token="</s>") == want      # the file is the newer place
    assert chat(CHAT, bos_token=None) == chat(CHAT) == "[user]a <b> & 'c'\n[bot]"
    assert chat("{% if true %}\n  {% set x = 1 %}\nx{{ x }}{% endif %}") == "x1"           # trim_blocks, lstrip_blocks
    assert chat("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}") == "01"
    assert chat("{% if tools is not none %}tools{% endif %}{{ strftime_now('%Y')|int > 2000 }}") == "True"


def test_broken_tokenizer_config():
    """A traceback from --chat for a tokenizer_config.json that is no JSON, or holds something else."""
    for content in (b"{", b"[]", b"\xff"):
        model = SimpleNamespace(source="folder", side_files={"tokenizer_config.json": content})
        assert "folder" in complaint(chat_template, model, [])
    for nothing in (None, "", [{"name": "default", "template": "x"}]):
        assert "no chat template" in complaint(chat, "", chat_template=nothing)


@pytest.mark.parametrize("template, words", [
    ("{{ raise_exception('only system\nfirst') }}", "only system first"), ("{% if %}", "Expected"),
    ("{{ nobody.name }}", "nobody"), ("{{ 1 / 0 }}", "division"), ("{{ ''.__class__.__mro__ }}", "unsafe"),
    ("{{ strftime_now.__globals__.keys() }}", "unsafe"), ("{{ lipsum.__globals__['os'].getcwd() }}", "unsafe"),
    ("{{ raise_exception.__globals__['__builtins__'] }}", "unsafe"), ("{{ messages.append(1) }}", "unsafe"),
    ("{{ '{0.__class__.__mro__}'.format(1) }}", "unsafe"), ("{% set _ = messages[0].update(x=1) %}", "unsafe"),
    ("{% for i in range(10 ** 9) %}{% endfor %}", "Range too big"), ("{% include '/etc/passwd' %}", "no loader")])
def test_chat_templates_are_not_trusted(template, words):
    """A template is a program from the hub: an escape from the sandbox, or a traceback when it refuses a chat."""
    text = complaint(chat, template)
    assert text.startswith("folder: its chat template failed") and words in text


# Bad input: config.json.

SCALING = json.loads((GOLDEN / "llama_rope3" / "config.hub.json").read_text())["rope_scaling"]
NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("changes, words", [
    (dict(architectures=["MistralForCausalLM"]),
     "'MistralForCausalLM' is not supported; supported: LlamaForCausalLM, Gemma2ForCausalLM"),
    (dict(architectures=[]), "architecture None"), (dict(architectures=GONE), "architecture None"),
    (dict(architectures="LlamaForCausalLM"), "architectures is 'LlamaForCausalLM'; it must be a list"),
    *[({key: GONE}, f"{key} is missing; it must be a positive integer") for key in
      ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")],
    *[(dict(num_hidden_layers=value), f"num_hidden_layers is {value!r}; it must be a positive integer")
      for value in (-1, 0, "3", 2.5, True, [3])],
    (dict(vocab_size=None), "vocab_size is missing"),
    (dict(num_key_value_heads=3), "num_attention_heads 4 is no multiple of num_key_value_heads 3"),
    (dict(num_key_value_heads=-2), "num_key_value_heads is -2"),
    (dict(num_attention_heads=5, num_key_value_heads=5, head_dim=GONE),
     "hidden_size 48 is no multiple of num_attention_heads 5"),
    (dict(head_dim=0), "head_dim is 0"), (dict(head_dim=13), "head_dim 13 is odd"),
    *[(dict(rms_norm_eps=value), f"rms_norm_eps is {value!r}; it must be a positive number")
      for value in ("1e-5", NAN, INF, -1e-5, False)],
    (dict(max_position_embeddings=2048.0), "max_position_embeddings is 2048.0"),
    (dict(tie_word_embeddings="yes"), "tie_word_embeddings is 'yes'; it must be true or false"),
    (dict(initializer_range={}), "initializer_range is {}"),
    *[(dict(eos_token_id=value), "eos_token_id is") for value in ("</s>", -1, [2, None], 2.0, True)],
    (dict(hidden_act="gelu"), "activation 'gelu' is not supported"),
    (dict(attention_bias=True), "attention_bias is not supported"),
    (dict(mlp_bias=True), "mlp_bias is not supported"),
    (dict(quantization_config={"quant_method": "gptq"}),
     "a quantized checkpoint (take the original one): quantization_config is not supported"),
    # rope, in the new style
    (dict(rope_parameters={"rope_type": "yarn"}), "rope type 'yarn' is not supported"),
    (dict(rope_parameters={"rope_type": None}), "rope type None is not supported"),
    (dict(rope_parameters=[1]), "rope_parameters is [1]; it must be a JSON object"),
    (dict(rope_parameters={"rope_type": "default", "rope_theta": "1e4"}),
     "rope_theta is '1e4'; it must be a positive number"),
    (dict(rope_parameters={"full_attention": {"rope_type": "default"}}),
     "rope_parameters per layer type is not supported"),
    (dict(rope_parameters={"rope_type": "default", "partial_rotary_factor": 0.5}),
     "partial_rotary_factor is not supported"),
    # and in the old one
    *[(dict(rope_parameters=GONE, rope_scaling=scaling), words) for scaling, words in (
        ({"rope_type": "yarn"}, "rope type 'yarn'"), ({"type": "linear", "factor": 2.0}, "rope type 'linear'"),
        ("llama3", "rope_scaling is 'llama3'"),
        *[({k: v for k, v in SCALING.items() if k != key}, f"{key} is missing; it must be a positive number")
          for key in SCALING if key != "rope_type"],
        *[({**SCALING, key: 0}, f"{key} is 0; it must be a positive number")
          for key in SCALING if key != "rope_type"],
        ({**SCALING, "high_freq_factor": 1.0}, "high_freq_factor must exceed low_freq_factor"))],
    (dict(rope_parameters=GONE, rope_theta=-1), "rope_theta is -1"),
])
def test_bad_llama_config(changes, words, tmp_path):
    """A KeyError, TypeError or division by zero for a wrong field; worse, a wrong model from one that is ignored."""
    folder = checkpoint(tmp_path, **changes)
    text = complaint(load_model, folder)
    assert text.startswith(f"{folder / 'config.json'}: ") and words in text


@pytest.mark.parametrize("changes, words", [
    (dict(layer_types=["full_attention"] * 3), "layer_types must be a list of 4"),
    (dict(layer_types=["full_attention"] * 3 + ["linear_attention"]), "each one of sliding_attention, full_attention"),
    (dict(layer_types="full"), "layer_types is 'full'; it must be a list"),
    (dict(layer_types=[[]] * 4), "layer_types must be"),
    (dict(head_dim=GONE), "head_dim is missing"), (dict(num_key_value_heads=GONE), "num_key_value_heads is missing"),
    (dict(sliding_window=0), "sliding_window is 0"), (dict(query_pre_attn_scalar=-1), "query_pre_attn_scalar is -1"),
    (dict(attn_logit_softcapping="50"), "attn_logit_softcapping is '50'"),
    (dict(final_logit_softcapping=0.0), "final_logit_softcapping is 0.0"),
    (dict(hidden_activation="gelu"), "activation 'gelu' is not supported"),
    (dict(use_bidirectional_attention=True), "use_bidirectional_attention"),
])
def test_bad_gemma_config(changes, words, tmp_path):
    """Fields that only Gemma has: the same."""
    folder = checkpoint(tmp_path, "gemma2", **changes)
    text = complaint(load_model, folder)
    assert text.startswith(f"{folder / 'config.json'}: ") and words in text


GATE, TABLE = asdict(GateConfig()), {"0.9": [0.5] * 6}
RULE = {"gate": GATE, "skip": "all", "kv": "copy_up"}


@pytest.mark.parametrize("gateskip, words", [
    ("on", "gateskip is 'on'; it must be a JSON object"), ({"gate": "vector"}, "mapping"),
    ({"gate": {**GATE, "depth": 2}}, "depth"),
    ({"gate": {**GATE, "form": "matrix"}}, "gate form 'matrix' is not one of vector, scalar"),
    ({"gate": {**GATE, "rank": "16"}}, "'<=' not supported"),
    ({"gate": {**GATE, "rank": 2.5}}, "gate rank is 2.5"), ({"gate": {**GATE, "shared": "no"}}, "gate shared is 'no'"),
    ({**RULE, "thresholds": {"0.9": [0.5] * 5}}, "thresholds of budget 0.9 are not 6 numbers"),
    ({**RULE, "thresholds": {**TABLE, "0.8": [0.5] * 5 + [NAN]}}, "thresholds of budget 0.8 are not 6 numbers"),
    ({**RULE, "thresholds": {"0.9": 0.5}}, "len()"), ({**RULE, "thresholds": {"0.9": ["0.5"] * 6}}, "real number"),
    ({**RULE, "thresholds": {"1.5": [0.5] * 6}}, "budget 1.5"),
    ({**RULE, "thresholds": {"most": [0.5] * 6}}, "'most'"), ({**RULE, "thresholds": [TABLE]}, "items"),
    ({**RULE, "thresholds": {}}, "no thresholds"),
    ({**RULE, "thresholds": TABLE, "budget_end": "0.8"}, "a budget_end that is no number"),
    ({"gate": GATE, "thresholds": TABLE}, "skip None"),
    ({**RULE, "skip": "some", "thresholds": TABLE}, "skip 'some' is not one of all, attn"),
    ({**RULE, "kv": 1, "thresholds": TABLE}, "kv 1 is not one of copy_up, dense"),
])
def test_bad_gateskip(gateskip, words, tmp_path):
    """A table of another depth or a gate of a later version, found in the middle of a generation or never."""
    folder = checkpoint(tmp_path, gateskip=gateskip)
    text = complaint(load_model, folder)
    assert text.startswith(f"{folder / 'config.json'}: ") and "gateskip" in text and words in text


@pytest.mark.parametrize("content, words", [
    (b"", "is not JSON"), (b"{", "is not JSON"), (b'{"a": 1,}', "is not JSON"), (b"\xff\xfe", "is not JSON"),
    (b"9" * 5000, "is not JSON"),
    (b"[]", "holds a list, not a JSON object"), (b"null", "holds a NoneType, not a JSON object")])
@pytest.mark.parametrize("file", ["config.json", "generation_config.json", "model.safetensors.index.json"])
def test_not_json(file, content, words, tmp_path):
    """A JSONDecodeError that does not say which of the files."""
    folder = checkpoint(tmp_path, "llama_untied")
    (folder / file).write_bytes(content)
    assert f"{folder / file} {words}" in complaint(load_model, folder)


# Bad input: weights.

def cut(folder, keep):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])


def replace(key, value):
    return lambda folder: change_weights(folder, lambda t: t.update({key: value(t[key])}))


NORM = "model.layers.1.input_layernorm.weight"


@pytest.mark.parametrize("damage, words", [
    (lambda f: (f / "model.safetensors").unlink(), "has no model.safetensors and no model.safetensors.index.json"),
    (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
     "pickled weights are refused, because loading a pickle can run any code"),
    (lambda f: (f / "model.safetensors").rename(f / "consolidated.00.pth"), "get the safetensors version"),
    (lambda f: (f / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1"),
     "model.safetensors is truncated or no safetensors file"),
    (lambda f: cut(f, 0), "model.safetensors is truncated"), (lambda f: cut(f, 100), "model.safetensors is truncated"),
    (lambda f: cut(f, -1), "model.safetensors is truncated"),
    (lambda f: change_weights(f, lambda t: t.pop(NORM)), f"the weights do not fit config.json: missing {NORM}"),
    (lambda f: change_weights(f, lambda t: t.clear()), "missing model.embed_tokens.weight, "
     "model.layers.0.input_layernorm.weight, model.layers.0.mlp.down_proj.weight and 26 more"),
    (lambda f: change_weights(f, lambda t: t.update(extra=torch.ones(2))), "unexpected extra"),
    (lambda f: change_weights(f, lambda t: t.update({"model.layers.3.self_attn.q_proj.weight": torch.ones(2)})),
     "unexpected model.layers.3.self_attn"),
    (replace(NORM, lambda t: t[:40]), f"model.safetensors: tensor {NORM} has shape (40,), config.json implies (48,)"),
    (replace(NORM, lambda t: t[None]), f"tensor {NORM} has shape (1, 48), config.json implies (48,)"),
    (replace(NORM, lambda t: t.to(torch.int8)),
     f"model.safetensors: tensor {NORM} is stored as torch.int8; take the original, unquantized"),
    (replace(NORM, lambda t: t.to(torch.float8_e4m3fn)), f"tensor {NORM} is stored as torch.float8_e4m3fn"),
])
def test_bad_weights(damage, words, tmp_path):
    """A damaged, quantized or foreign file: a Rust or a broadcast error, or random weights in place of missing ones."""
    folder = checkpoint(tmp_path)
    damage(folder)
    text = complaint(load_model, folder)
    assert str(folder) in text and words in text


def test_a_runs_own_state_is_no_pickled_model(tmp_path):
    """train_state.pt beside a lost model.safetensors: "pickled weights" would send its owner the wrong way."""
    folder = checkpoint(tmp_path)
    (folder / "model.safetensors").rename(folder / "train_state.pt")
    assert "pickle" not in complaint(load_model, folder)


def test_rotary_buffers_of_old_checkpoints_are_no_weights(tmp_path):
    """Llama 1 and 2 files store inv_freq in every layer; calling them unexpected locks those models out."""
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6)}
    load_model(change_weights(checkpoint(tmp_path), lambda t: t.update(buffer)))


LAST = "model-00003-of-00003.safetensors"


@pytest.mark.parametrize("index, words", [
    ({}, "has no weight_map"), ({"weight_map": [LAST]}, "has no weight_map"),
    ({"weight_map": {"lm_head.weight": 3}}, "names 3"), ({"weight_map": {"lm_head.weight": [LAST]}}, "names ['model-"),
    ({"weight_map": {"lm_head.weight": f"../{LAST}"}}, f"names '../{LAST}', which is no file of this folder"),
    ({"weight_map": {"lm_head.weight": "/etc/passwd"}}, "names '/etc/passwd'"),
    ({"weight_map": {"lm_head.weight": ""}}, "lacks the shard"),
    ({"weight_map": {"lm_head.weight": ".."}}, "lacks the shard"),
    ({"weight_map": {"lm_head.weight": "other.safetensors"}}, "lacks the shard other.safetensors"),
    ({"weight_map": {}}, "missing lm_head.weight"),
    ({"weight_map": {"lm_head.weight": LAST}}, "missing model.embed_tokens.weight"),
])
def test_bad_index(index, words, tmp_path):
    """An index that sends the reader out of its folder, or ends in an AttributeError."""
    folder = checkpoint(tmp_path / "m", "llama_untied")
    shutil.copy(folder / LAST, tmp_path)                         # ../ would be there
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    text = complaint(load_model, folder)
    assert str(folder) in text and words in text


def test_bad_shards(tmp_path):
    """A download that broke off: the shard by name, and a tensor that the index promises but its shard lacks."""
    folder = checkpoint(tmp_path, "llama_untied")
    held = sorted(load_file(folder / LAST))[0]
    change_weights(folder, lambda t: t.pop(held), LAST)
    text = complaint(load_model, folder)
    assert str(folder / LAST) in text and held in text
    (folder / LAST).unlink()
    text = complaint(load_model, folder)
    assert str(folder) in text and LAST in text and "download it again" in text
