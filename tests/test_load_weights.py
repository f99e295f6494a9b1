"""Tests of load_weights.py: config styles, shards, casts, round trips, a run that goes on, one line for bad input."""
import fnmatch
import json
import os
import shutil
import weakref
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

import load_weights
from conftest import complaint
from gates import GateConfig
from load_weights import (check_fit, config_from_hf, find_folder, load_model, load_tokenizer, new_model, read_json,
                          save_config, save_model, weight_files)
from tokens import chat_template, encode

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
    """Older tools store it, some rounded: refusing an equal one locks such models out, ignoring a different one
    changes the model."""
    folder, embed = checkpoint(tmp_path), "model.embed_tokens.weight"
    exact = on_disk(folder)[embed]
    change_weights(folder, lambda t: t.update({"lm_head.weight": t[embed].clone()}))
    model = load_model(folder, dtype=torch.bfloat16)
    assert model.lm_head.weight is model.model["embed_tokens"].weight
    for wrong in (lambda t: t[embed] * (1 + (torch.arange(128) == 127)[:, None]), lambda t: t[embed][:100]):
        change_weights(folder, lambda t: t.update({"lm_head.weight": wrong(t)}))
        text = complaint(load_model, folder)
        assert "lm_head.weight" in text and "model.safetensors" in text and "tie_word_embeddings" in text
    for rounded in (torch.bfloat16, torch.float16):              # either of the two, by a tool that saved it so
        for key, other in ((embed, "lm_head.weight"), ("lm_head.weight", embed)):
            change_weights(folder, lambda t: t.update({embed: exact, "lm_head.weight": exact, key: exact.to(rounded)}))
            for dtype in (torch.float32, torch.bfloat16):
                model = load_model(folder, dtype=dtype)
                assert torch.equal(model.lm_head.weight, (exact.to(rounded) if key == embed else exact).to(dtype))
    for wrong in (exact * 1.01, exact + 1e-4, -exact, exact * (torch.arange(128) != 5)[:, None]):
        change_weights(folder, lambda t: t.update({embed: exact, "lm_head.weight": wrong}))
        assert "lm_head.weight differs" in complaint(load_model, folder)
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
    assert text.startswith(f"{tmp_path} has gates already: --gate scalar goes on with them, other gates start from")


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
        thresholds = {key: [0.1 * b for b in range(2 * len(model.model["layers"]))] for key in ("1.0", "0.9")}
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
    if gate:                                                     # a program that knows no gates refuses the folder
        arch, kind = theirs.pop("architectures")[0], theirs.pop("model_type")
        assert (ours.pop("architectures"), ours.pop("model_type")) == ([f"GateSkip{arch}"], f"gateskip_{kind}")
    assert ours == theirs
    assert stored == (gate and {**model.config.gateskip, "gate": asdict(GATES[gate])})
    assert load_tokenizer(tmp_path / "saved").encode("a b").ids == [0, 1]
    assert not list((tmp_path / "saved").glob("*.tmp"))


@pytest.mark.parametrize("name", ["llama_rope3", "gemma2"])
def test_names_of_a_gated_model(name, tmp_path):
    """A run of an earlier version, with Hugging Face's names, that no longer opens; a dense model that only we open."""
    plain = json.loads((GOLDEN / name / "config.json").read_text())
    plain = {key: plain[key] for key in ("architectures", "model_type")}
    torch.manual_seed(0)
    model = load_model(GOLDEN / name, gate=GateConfig("scalar"))
    save_model(model, tmp_path / "new")
    raw = json.loads((tmp_path / "new" / "config.json").read_text())
    assert not set(map(str, plain.values())) & {str(raw[key]) for key in plain}
    shutil.copytree(tmp_path / "new", tmp_path / "earlier")
    (tmp_path / "earlier" / "config.json").write_text(json.dumps(raw | plain))
    earlier = load_model(tmp_path / "earlier")
    assert torch.equal(logits(earlier, name), logits(model, name))
    save_model(earlier, tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == raw
    save_model(new_model(tmp_path / "new" / "config.json"), tmp_path / "dense")  # drawn from a gated model's config
    assert {key: json.loads((tmp_path / "dense" / "config.json").read_text())[key] for key in plain} == plain
    for key in plain:                                            # half of the names
        (tmp_path / "earlier" / "config.json").write_text(json.dumps(raw | {key: plain[key]}))
        assert "has model_type" in complaint(load_model, tmp_path / "earlier")


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
    before, real_write, synced = (tmp_path / "config.json").read_bytes(), Path.write_bytes, []
    with monkeypatch.context() as m:
        m.setattr("disk.sync", synced.append)
        save_config(model, tmp_path)
    assert synced == [tmp_path / "config.json.tmp", tmp_path]    # a rename may outrun what it names

    def half(path, content):
        real_write(path, content[:len(content) // 2])
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(OSError):
        save_config(model, tmp_path)
    assert (tmp_path / "config.json").read_bytes() == before and not (tmp_path / "config.json.tmp").exists()


def test_weights_are_as_open_as_the_rest(tmp_path):
    """safetensors makes its file 0600: a model in a shared folder whose weights nobody else can read."""
    before = os.umask(0o027)
    try:
        save_model(load_model(GOLDEN / "llama_rope3"), tmp_path, tokenizer())
    finally:
        os.umask(before)
    modes = {file.name: file.stat().st_mode & 0o777 for file in tmp_path.iterdir()}
    assert set(modes.values()) == {0o640} and "model.safetensors" in modes, modes


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
    assert "no tokenizer.json" in complaint(load_tokenizer, GOLDEN / "gemma2")


@pytest.mark.parametrize("name, words", [
    ("step-000009", "which is not there"), ("step-000001-best", "which is no step"), ("best", "which is no step"),
    ("", "which is no step"), ("..", "which is no step"), (".", "which is no step"), ("{other}", "which is no step"),
    ("../other", "which is no step"), ("step-000001/../../other", "which is no step"), ("step-", "which is no step"),
    ("step-\u0661", "which is no step"), ("step-000001\nstep-000002", "which is no step"),
    ("step-000001\udcff", "which is no step")])
def test_latest_names_steps_only(name, words, tmp_path):
    """A path in `latest` that leads out of the run: another model is loaded, and by --resume written to. The way out
    must be one that works: the newest step by number, and no copy of the user's."""
    run, other = tmp_path / "run", tmp_path / "other"
    checkpoint(other)
    run.mkdir()
    (run / "latest").write_bytes(name.replace("{other}", str(other)).encode("utf-8", "surrogateescape"))
    assert "write the name of a step folder, like step-000500, into it" in complaint(load_model, run)
    for step in ("step-999999", "step-1000000", "step-000001", "step-000001-best", "step-2000000-best"):
        checkpoint(run / step)
    text = complaint(load_model, run)
    assert text.startswith(f"{run / 'latest'} names ") and words in text and "write step-1000000 into it" in text
    (run / "latest").write_text("step-1000000")                  # as the line says
    assert load_model(run).source == run / "step-1000000"


def test_a_path_of_the_checkout(tmp_path, monkeypatch):
    """examples/tiny-llama from another folder asked for at the hub: a wait for the network, and "no such model"."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(load_weights, "_download", lambda repo: pytest.fail("asked the hub"))
    checkout = Path(load_weights.__file__).parent
    for path in ("examples/tiny-llama", "tests/golden", "examples"):
        text = complaint(load_model, path)
        assert f"{path} does not exist here" in text and str(checkout / path) in text
    checkpoint(tmp_path / "examples" / "tiny-llama")             # what is here is what is meant
    assert load_model("examples/tiny-llama").config.num_hidden_layers == 3


# While a run goes on.

class Run:
    """A run's --out whose trainer saves a new step and deletes the one before at given calls of a function."""

    def __init__(self, out, monkeypatch, function, calls):
        self.out, self.step, self.count, real = out, 0, 0, getattr(load_weights, function)
        self.save()

        def meanwhile(*args, **kwargs):
            self.count += 1
            if self.count in calls:
                self.save()
            return real(*args, **kwargs)
        monkeypatch.setattr(load_weights, function, meanwhile)

    def save(self):
        self.step += 1
        folder = checkpoint(self.out / f"step-{self.step:06d}", eos_token_id=self.step)
        tokenizer().save(str(folder / "tokenizer.json"))
        (self.out / "latest").write_text(folder.name)
        shutil.rmtree(self.out / f"step-{self.step - 1:06d}", ignore_errors=True)


@pytest.mark.parametrize("function, call",
                         [("read_json", 1), ("weight_files", 1), ("_read", 1), ("_read", 2), ("_read", 9)])
def test_loading_while_another_process_saves(function, call, tmp_path, monkeypatch):
    """"truncated, get it again", for a run that is in the best of health: the step went while it was being read."""
    run = Run(tmp_path / "out", monkeypatch, function, {call})
    model = load_model(tmp_path / "out", GateConfig())
    assert run.step == 2 and model.source == run.out / "step-000002" and model.config.eos_ids == (2,)
    for key, t in on_disk(GOLDEN / "llama_rope3").items():
        assert torch.equal(model.get_parameter(key), t)


def test_a_step_that_goes_while_its_file_is_opened(tmp_path, monkeypatch):
    """safetensors opens the file and then has torch open it again, whose error is of another kind: a traceback in one
    load of fifty beside a process that saves five times a second."""
    run, real, opened = Run(tmp_path / "out", monkeypatch, "read_json", ()), load_weights.safe_open, []

    def opens_twice(path, **how):
        opened.append(path)
        if len(opened) == 9:
            run.save()
            torch.UntypedStorage.from_file(str(path), shared=False, nbytes=8)
        return real(path, **how)
    monkeypatch.setattr(load_weights, "safe_open", opens_twice)
    assert load_model(tmp_path / "out").source == run.out / "step-000002"


def test_latest_moves_between_its_reading_and_its_folders(tmp_path, monkeypatch):
    """`latest` read just before it is replaced: "names step-000001, which is not there", and nothing to mend."""
    run, real = Run(tmp_path / "out", monkeypatch, "read_json", ()), Path.read_text

    def late(path, *args, **kwargs):
        text = real(path, *args, **kwargs)
        if path.name == "latest" and run.step == 1:
            run.save()
        return text
    monkeypatch.setattr(Path, "read_text", late)
    assert load_tokenizer(tmp_path / "out").path == run.out / "step-000002" / "tokenizer.json"
    assert run.step == 2


def test_a_tokenizer_read_while_another_process_saves(tmp_path, monkeypatch):
    """The same for the tokenizer, which is read after the model."""
    run = Run(tmp_path / "out", monkeypatch, "blame", {1})
    assert load_tokenizer(tmp_path / "out").path == run.out / "step-000002" / "tokenizer.json"


def test_a_run_that_saves_all_the_time(tmp_path, monkeypatch):
    """A loader that tries for ever, or says "truncated" in the end."""
    Run(tmp_path / "out", monkeypatch, "_read", range(2, 1000))
    text = complaint(load_model, tmp_path / "out")
    assert text.startswith(f"{tmp_path / 'out'} was saved anew three times while it was read: ")


def test_a_damaged_step_is_read_once(tmp_path, monkeypatch):
    """A damaged file read three times over, or its own message lost."""
    run, reads, real = Run(tmp_path / "out", monkeypatch, "weight_files", ()), [], load_weights._read
    cut(run.out / "step-000001", 100)
    monkeypatch.setattr(load_weights, "_read", lambda *args: reads.append(args) or real(*args))
    assert "is truncated" in complaint(load_model, run.out) and len(reads) == 1


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

def test_tokens_beyond_the_embedding(tmp_path):
    """A padding token that somebody added and no text contains: the model refused. And the tokenizer of another model
    accepted: an index out of range at the first rare word."""
    model, made = load_model(GOLDEN / "llama_rope3"), tokenizer()
    made.add_special_tokens(["[PAD]"])
    assert made.get_vocab_size() == 4
    model.config.vocab_size, model.config.eos_ids = 3, (2,)
    check_fit(model, made)
    assert encode(made, "a b") == [0, 1] and "'[PAD]' is token 3" in complaint(encode, made, "a [PAD]")
    model.config.vocab_size = 2
    assert "the tokenizer has 3 tokens and" in complaint(check_fit, model, tokenizer())
    model.config.vocab_size, sparse = 99, Tokenizer(models.WordLevel({"a": 0, "?": 99}, unk_token="?"))
    assert "do not belong together" in complaint(check_fit, model, sparse)       # few, but one of them is far out
    model.config.eos_ids = (99,)
    assert "eos_token_id 99 lies outside the vocabulary of 99" in complaint(check_fit, model, tokenizer())


def test_a_tokenizer_that_panics(tmp_path):
    """A PanicException of the Rust side, which is no Exception: a traceback for a damaged file."""
    folder = checkpoint(tmp_path)
    normalizer = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    (folder / "tokenizer.json").write_text(json.dumps({**json.loads(tokenizer().to_str()), "normalizer": normalizer}))
    text = complaint(load_tokenizer, folder)
    assert text.startswith(f"{folder / 'tokenizer.json'} is not a tokenizer (")


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


def test_chat_template_of_a_folder(tmp_path):
    """Side files not read when the model is loaded, or lost on saving: --chat works on the original only."""
    folder = checkpoint(tmp_path / "a")
    assert f"{folder} has no chat template: leave --chat out" in complaint(chat_template, load_model(folder), [])
    (folder / "chat_template.jinja").write_text("é{{ messages[0].content }}", encoding="utf-8")
    save_model(load_model(folder), tmp_path / "b")
    assert chat_template(load_model(tmp_path / "b"), [{"role": "user", "content": "hi"}]) == "éhi"


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
     "rope full_attention is not supported"),
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
    # what is too large for any machine
    (dict(num_hidden_layers=10 ** 6), "num_hidden_layers 1000000, "),
    (dict(num_hidden_layers=2 ** 39), "weights: no machine"),
    *[({key: 2 ** 39}, "weights: no machine holds that") for key in ("vocab_size", "intermediate_size", "head_dim")],
    (dict(hidden_size=2 ** 39, vocab_size=2 ** 39), "weights: no machine holds that"),
    (dict(num_attention_heads=2 ** 39, num_key_value_heads=2 ** 39), "weights: no machine holds that"),
    # in both styles, but not the same
    *[(dict(changes), "rope_parameters, rope_scaling and rope_theta disagree") for changes in (
        dict(rope_scaling={"rope_type": "default"}), dict(rope_scaling={**SCALING, "factor": 8.0}),
        dict(rope_scaling={"type": "linear", "factor": 2.0}), dict(rope_theta=5e5),
        dict(rope_scaling={**SCALING, "rope_theta": 5e5}),
        dict(rope_parameters={"rope_type": "default", "rope_theta": 1e4}, rope_scaling=SCALING),
        dict(rope_parameters={"rope_theta": 1e4}, rope_scaling=SCALING),
        dict(rope_parameters={"rope_type": "default"}, rope_scaling={"rope_theta": 1e4}, rope_theta=1e6))],
    (dict(rope_parameters={"rope_theta": 1e4, "factor": 8.0}), "rope factor is not supported"),
    (dict(model_type="mistral"), "has model_type llama, not 'mistral'"),
])
def test_bad_llama_config(changes, words, tmp_path):
    """A KeyError, TypeError or division by zero for a wrong field; worse, a wrong model from one that is ignored."""
    folder = checkpoint(tmp_path, **changes)
    text = complaint(load_model, folder)
    assert text.startswith(f"{folder / 'config.json'}: ") and words in text


@pytest.mark.parametrize("changes", [
    dict(rope_scaling=SCALING), dict(rope_scaling=SCALING, rope_theta=10000), dict(rope_theta=10000.0),
    dict(rope_scaling={"type" if key == "rope_type" else key: value for key, value in SCALING.items()}),
    dict(rope_scaling={**SCALING, "type": "llama3", "rope_theta": 1e4}), dict(rope_scaling={}, rope_theta=None),
    dict(rope_parameters=SCALING, rope_theta=1e4), dict(rope_scaling=None), dict(model_type=None)])
def test_both_rope_styles_that_agree(changes, tmp_path):
    """A config.json that says the same twice, as tools write it for old and new readers, refused."""
    right = config_from_hf(read_json(checkpoint(tmp_path / "right") / "config.json"))
    assert config_from_hf(read_json(checkpoint(tmp_path / "twice", **changes) / "config.json")) == right


@pytest.mark.parametrize("key, value", [
    ("attention_bias", True), ("mlp_bias", True), ("partial_rotary_factor", 0.5), ("sliding_window", 4096),
    ("use_sliding_window", True), ("max_window_layers", 28), ("layer_types", ["sliding_attention"] * 3),
    ("query_pre_attn_scalar", 256), ("attn_logit_softcapping", 50.0), ("final_logit_softcapping", 30.0),
    ("logit_scale", 0.0625), ("logits_scaling", 8.0), ("residual_multiplier", 0.22), ("embedding_multiplier", 12.0),
    ("attention_multiplier", 0.0078125), ("scale_embeddings", True), ("clip_qkv", 8.0), ("use_qk_norm", True),
    ("qk_layernorm", True), ("no_rope_layers", [1, 0, 1]), ("no_rope_layer_interval", 4), ("num_experts", 8),
    ("num_local_experts", 8), ("attention_dropout", 0.1), ("resid_pdrop", 0.1), ("is_causal", False),
    ("quantization", {"bits": 4}), ("rope_interleaved", True), ("rope_local_base_freq", 10000.0),
    ("parallel_residual", True), ("add_cross_attention", True), ("pruned_heads", {"0": [1]}),
    ("position_embedding_type", "alibi")])
def test_what_would_change_the_computation_is_refused(key, value, tmp_path):
    """Another model than the one saved, fluent and wrong: a key of a related decoder, or of a later one, not read."""
    folder = checkpoint(tmp_path, **{key: value})
    text = complaint(load_model, folder)
    assert text.startswith(f"{folder / 'config.json'}: {key} is not supported") and "delete it from the file" in text


HUB = {     # what is in config.json on the hub, beside the sizes
    "Llama 3.2": dict(model_type="llama", attention_bias=False, attention_dropout=0.0, bos_token_id=128000,
                      eos_token_id=128001, hidden_act="silu", mlp_bias=False, pretraining_tp=1, torch_dtype="bfloat16",
                      transformers_version="4.45.0.dev0", use_cache=True, head_dim=12, rope_scaling=SCALING),
    "Llama 2": dict(_name_or_path="meta-llama/Llama-2-7b-hf", bos_token_id=1, pad_token_id=0, pretraining_tp=2,
                    max_length=4096, torch_dtype="float16", transformers_version="4.31.0.dev0", rope_scaling=SCALING),
    "Vicuna": dict(_name_or_path="vicuna-7b-v1.5", max_sequence_length=2048, temperature=0.9, top_p=0.6, use_cache=True,
                   do_sample=True),
    "TinyLlama": dict(attention_bias=False, pretraining_tp=1, transformers_version="4.35.0", use_cache=True),
    "SmolLM2": dict(is_llama_config=True, rope_interleaved=False, pad_token_id=2, use_cache=True, attention_dropout=0.0,
                    **{"transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}}}),
    "others": dict(unsloth_version="2024.9", unsloth_fixed=True, _attn_implementation_autoset=True,
                   auto_map={"AutoModelForCausalLM": "modelling.Model"}, tokenizer_class="LlamaTokenizer",
                   return_dict=True, id2label={"0": "LABEL_0"}, label2id={"LABEL_0": 0}),
    "neighbours, switched off": dict(
        use_sliding_window=False, sliding_window=None, partial_rotary_factor=1.0, clip_qkv=None, logit_scale=1.0,
        residual_multiplier=1, num_experts=0, quantization_config=None, use_qk_norm=False, no_rope_layers=[],
        attn_logit_softcapping=None, layer_types=None, is_causal=True, pruned_heads={}),
}


@pytest.mark.parametrize("name", HUB)
def test_what_changes_nothing_is_accepted(name, tmp_path):
    """A model of the hub refused for the name of the tool that wrote it, or for a switch that is off."""
    right = config_from_hf(read_json(checkpoint(tmp_path / "right") / "config.json"))
    config = config_from_hf(read_json(checkpoint(tmp_path / "hub", **HUB[name]) / "config.json"))
    assert replace(config, eos_ids=right.eos_ids) == right


def test_gemma_2_of_the_hub(tmp_path):
    """The same for Gemma 2, which has a key twice, and two activations."""
    right = config_from_hf(read_json(checkpoint(tmp_path / "right", "gemma2") / "config.json"))
    hub = dict(sliding_window_size=4096, hidden_act="gelu_pytorch_tanh", cache_implementation="hybrid",
               _name_or_path="google/gemma-2-2b", transformers_version="4.42.0.dev0")
    assert config_from_hf(read_json(checkpoint(tmp_path / "hub", "gemma2", **hub) / "config.json")) == right


@pytest.mark.parametrize("name, change", [
    (name, change) for name in NAMES for change in (
        dict(num_hidden_layers=10 ** 6), dict(num_hidden_layers=2 ** 39), dict(vocab_size=2 ** 39),
        dict(hidden_size=2 ** 39, vocab_size=2 ** 39), dict(intermediate_size=2 ** 39), dict(head_dim=2 ** 38))])
def test_a_huge_config_is_refused_before_a_model_is_built(name, change, tmp_path, monkeypatch):
    """Minutes and gigabytes for a million layers, a list of 2^39 layer types, or a product that overflows in torch."""
    monkeypatch.setattr(load_weights, "Model", lambda config: pytest.fail("built"))
    folder = checkpoint(tmp_path, name, layer_types=GONE, **change)
    for call, file in ((load_model, folder), (new_model, folder / "config.json")):
        text = complaint(call, file)
        assert text.startswith(f"{folder / 'config.json'}: ") and "no machine holds that" in text


def test_a_new_model_that_does_not_fit_into_memory(tmp_path, monkeypatch):
    """A trillion weights drawn until the system kills the process, or a RuntimeError."""
    model, real = new_model(checkpoint(tmp_path) / "config.json"), torch.empty

    def small(*size, **how):
        tensor = real(*size, **how)
        if tensor.numel() >= sum(p.numel() for p in model.parameters()) and not tensor.is_meta:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return tensor
    monkeypatch.setattr(torch, "empty", small)
    text = complaint(new_model, tmp_path / "config.json")
    assert text == f"{tmp_path / 'config.json'} describes a model that is larger than the memory here"


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
    (dict(hidden_act="gelu", hidden_activation="silu"), "activation 'gelu' is not supported"),
    (dict(use_bidirectional_attention=True), "use_bidirectional_attention"),
    (dict(mlp_bias=True, rope_local_base_freq=1e4), "mlp_bias, rope_local_base_freq is not supported"),
    (dict(model_type="gemma3_text"), "has model_type gemma2, not 'gemma3_text'"),
    (dict(rope_scaling={"type": "linear", "factor": 8.0}), "disagree"), (dict(rope_theta=1e6), "disagree"),
    (dict(rope_parameters=GONE, rope_scaling={"type": "linear", "factor": 8.0}), "rope type 'linear'"),
])
def test_bad_gemma_config(changes, words, tmp_path):
    """Fields that only Gemma has: the same."""
    folder = checkpoint(tmp_path, "gemma2", **changes)
    text = complaint(load_model, folder)
    assert text.startswith(f"{folder / 'config.json'}: ") and words in text


GATE, TABLE = asdict(GateConfig()), {"1.0": [0.1] * 6, "0.9": [0.5] * 6}
RULE = {"gate": GATE, "skip": "all", "kv": "copy_up"}


@pytest.mark.parametrize("gateskip, words", [
    ("on", "gateskip is 'on'; it must be a JSON object"), ({"gate": "vector"}, "mapping"),
    ({"gate": {**GATE, "depth": 2}}, "depth"),
    ({"gate": {**GATE, "form": "matrix"}}, "gate form 'matrix' is not one of vector, scalar"),
    ({"gate": {**GATE, "rank": "16"}}, "'<=' not supported"),
    ({"gate": {**GATE, "rank": 2.5}}, "gate rank is 2.5"), ({"gate": {**GATE, "shared": "no"}}, "gate shared is 'no'"),
    ({**RULE, "thresholds": {"0.9": [0.5] * 5}}, "budget 0.9 needs thresholds from 0 to 1, 6 of them"),
    ({**RULE, "thresholds": {**TABLE, "0.8": [0.5] * 5 + [NAN]}}, "budget 0.8 needs thresholds from 0 to 1, 6 of them"),
    ({**RULE, "thresholds": {"0.9": 0.5}}, "len()"), ({**RULE, "thresholds": {"0.9": ["0.5"] * 6}}, "0.9 needs"),
    ({**RULE, "thresholds": {"1.5": [0.5] * 6}}, "budget 1.5"),
    ({**RULE, "thresholds": {"most": [0.5] * 6}}, "'most'"), ({**RULE, "thresholds": [TABLE]}, "items"),
    ({**RULE, "thresholds": {}}, "no thresholds of budget 1.0"),
    ({**RULE, "thresholds": {"0.9": [0.5] * 6}}, "no thresholds of budget 1.0"),     # 0.95 would skip as 0.9 does
    ({**RULE, "thresholds": {"0.9": [0.5] * 6, "0.999": [0.5] * 6}}, "no thresholds of budget 1.0"),
    ({**RULE, "thresholds": TABLE, "budget_end": "0.8"}, "budget_end is '0.8'"),
    ({**RULE, "thresholds": {**TABLE, "1.00": [0.5] * 6}}, "name a budget twice"),
    ({**RULE, "thresholds": TABLE, "budget_end": float("nan")}, "budget_end is nan"),
    ({**RULE, "thresholds": TABLE, "threshold": "global"}, "budget 1.0 needs thresholds from 0 to 1, 1 of them"),
    ({**RULE, "thresholds": {**TABLE, "0.7": [0.5]}}, "budget 0.7 needs thresholds from 0 to 1, 6 of them"),
    ({**RULE, "thresholds": TABLE, "threshold": "sideways"}, "'sideways' is neither branch nor global"),
    ({**RULE, "thresholds": {**TABLE, "0.7": [True] * 6}}, "budget 0.7 needs"),
    ({**RULE, "thresholds": {**TABLE, "0.7": [5.0] * 6}}, "budget 0.7 needs"),
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


def changed(key, value):
    return lambda folder: change_weights(folder, lambda t: t.update({key: value(t[key])}))


NORM = "model.layers.1.input_layernorm.weight"


@pytest.mark.parametrize("damage, words", [
    (lambda f: (f / "model.safetensors").unlink(), "has no model.safetensors and no model.safetensors.index.json"),
    (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
     "pickled weights are refused, because loading a pickle can run any code"),
    (lambda f: (f / "model.safetensors").rename(f / "consolidated.00.pth"), "get the safetensors version"),
    (lambda f: (f / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1"),
     "model.safetensors is truncated, gone, or no safetensors file"),
    (lambda f: cut(f, 0), "model.safetensors is truncated"), (lambda f: cut(f, 100), "model.safetensors is truncated"),
    (lambda f: cut(f, -1), "model.safetensors is truncated"),
    (lambda f: change_weights(f, lambda t: t.pop(NORM)), f"the weights do not fit config.json: missing {NORM}"),
    (lambda f: change_weights(f, lambda t: t.clear()), "missing model.embed_tokens.weight, "
     "model.layers.0.input_layernorm.weight, model.layers.0.mlp.down_proj.weight and 26 more"),
    (lambda f: change_weights(f, lambda t: t.update(extra=torch.ones(2))), "unexpected extra"),
    (lambda f: change_weights(f, lambda t: t.update({"model.layers.3.self_attn.q_proj.weight": torch.ones(2)})),
     "unexpected model.layers.3.self_attn"),
    (changed(NORM, lambda t: t[:40]), f"model.safetensors: tensor {NORM} has shape (40,), config.json implies (48,)"),
    (changed(NORM, lambda t: t[None]), f"tensor {NORM} has shape (1, 48), config.json implies (48,)"),
    (changed(NORM, lambda t: t.to(torch.int8)),
     f"model.safetensors: tensor {NORM} is stored as torch.int8; take the original, unquantized"),
    (changed(NORM, lambda t: t.index_fill(0, torch.tensor([3]), NAN)), f"tensor {NORM} holds numbers that are"),
    (changed(NORM, lambda t: t.index_fill(0, torch.tensor([3]), INF)), f"tensor {NORM} holds numbers that are"),
    (changed(NORM, lambda t: t.to(torch.float8_e4m3fn)), f"tensor {NORM} is stored as torch.float8_e4m3fn"),
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
    """A download that broke off: the shard by name, and a tensor that the index promises but its shard lacks, which is
    no truncated file."""
    folder = checkpoint(tmp_path, "llama_untied")
    held = sorted(load_file(folder / LAST))[0]
    change_weights(folder, lambda t: t.pop(held), LAST)
    text = complaint(load_model, folder)
    assert text.startswith(f"{folder / 'model.safetensors.index.json'} names {held} in {LAST}, which lacks it")
    (folder / LAST).unlink()
    text = complaint(load_model, folder)
    assert str(folder) in text and LAST in text and "download it again" in text
