"""export.py: what it writes, what it refuses, and who refuses a run that was not exported."""
import ast
import json
import os

import made

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import export
from conftest import complaint, tokens
from gates import GateConfig
from load_weights import load_model, load_tokenizer, read_json, save_model
from made import FAMILIES, ROOT, opened, pair, run_folder
from test_imports import imports

families = pytest.mark.parametrize("family", FAMILIES)


def write(*words):
    return export.main([str(word) for word in words])


# A run that was not exported.

@families
def test_a_gated_run_is_refused(tmp_path, family):
    """transformers that drops the gates, with no more than a list of unexpected keys, and answers."""
    folder = run_folder(tmp_path / "run", FAMILIES[family](GateConfig("scalar")))
    for auto in (AutoConfig, AutoModelForCausalLM):
        with pytest.raises((ValueError, KeyError), match="gateskip_"):
            auto.from_pretrained(folder)


@families
def test_a_dense_run_is_a_plain_model(tmp_path, family):
    """A dense run that only this project can open."""
    folder = run_folder(tmp_path / "run", FAMILIES[family](None))
    plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert "GateSkip" not in type(plain).__name__
    with torch.no_grad():
        assert (plain(tokens(2, 13)).logits - load_model(folder)(tokens(2, 13))[0]).abs().max() < 1e-4


@families
def test_a_run_of_an_earlier_version(tmp_path, family):
    """The names that gated runs had before: export reads them, and gives them the new ones."""
    ours, theirs = pair(tmp_path, FAMILIES[family](GateConfig("scalar")))
    raw = read_json(tmp_path / "run" / "config.json")
    raw.update(made.raw_config(ours.config))
    assert "GateSkip" not in json.dumps(raw)
    (tmp_path / "run" / "config.json").write_text(json.dumps(raw))
    write("--model", tmp_path / "run", "--out", tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(opened(tmp_path / "out")(tokens(2, 13)).logits, theirs(tokens(2, 13)).logits)


@families
def test_an_export_is_refused_without_its_code(tmp_path, family):
    """A plain model where the code of the folder is not trusted."""
    pair(tmp_path, FAMILIES[family](GateConfig("scalar")))
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=False)


# What is written.

def test_the_folder(tmp_path, capsys):
    """A file too many or missing; a budget that is not the one asked for; our own loader, which cannot read it."""
    ours, _ = pair(tmp_path, FAMILIES["gemma"](GateConfig("scalar")), threshold="global")
    said = capsys.readouterr().out.splitlines()[-1]
    assert said == f"written: {tmp_path / 'out'}, budget 0.8; calibrated: 0.6, 0.8, 1.0"
    assert sorted(os.listdir(tmp_path / "out")) == ["README.md", "config.json", "model.safetensors",
                                                    "modeling_gateskip.py", "tokenizer.json", "tokenizer_config.json"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "share of work that runs, is 0.8; calibrated are 0.6, 0.8, 1.0" in card and "drops the" in card
    again = load_model(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(again(tokens(2, 13))[0], ours(tokens(2, 13))[0])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("w1", "w7", "w7")
    inputs = tokenizer("w2 w3", return_tensors="pt")             # as they go into generate, which refuses others
    assert sorted(inputs) == ["attention_mask", "input_ids"]
    opened(tmp_path / "out").generate(**inputs, max_new_tokens=2)
    # an export gives way to the next, and may be exported itself
    assert write("--model", tmp_path / "out", "--out", tmp_path / "out", "--budget", "0.7") == 0
    assert opened(tmp_path / "out").config.gateskip["budget"] == 0.7
    assert sorted(os.listdir(tmp_path)) == ["out", "run"]


def test_generation_config(tmp_path):
    """Gemma 2's own asks for a cache of fixed size."""
    folder = run_folder(tmp_path / "run", FAMILIES["gemma"](GateConfig("scalar")))
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 9], "cache_implementation": "hybrid"}')
    write("--model", folder, "--out", tmp_path / "out")
    model = opened(tmp_path / "out")
    assert model.generation_config.eos_token_id == [7, 9] and model.generation_config.cache_implementation is None
    model.generate(tokens(1, 5), max_new_tokens=3, pad_token_id=0)


def test_bfloat16_stays(tmp_path):
    """Weights that take twice the room after the export; gates that lose their digits."""
    folder = run_folder(tmp_path / "run", FAMILIES["llama"](GateConfig("scalar")))
    half = load_model(folder, dtype=torch.bfloat16)
    save_model(half, tmp_path / "half", load_tokenizer(folder))
    write("--model", tmp_path / "half", "--out", tmp_path / "out")
    exported, stored = (tmp_path / name / "model.safetensors" for name in ("out", "half"))
    assert exported.read_bytes() == stored.read_bytes()


# What is refused.

def test_wrong_input_is_one_line(tmp_path):
    """A traceback, a half-written folder, or somebody else's that is gone."""
    folder = run_folder(tmp_path / "run", FAMILIES["llama"](GateConfig("scalar")))
    dense = run_folder(tmp_path / "dense", FAMILIES["llama"](None))
    raw = read_json(folder / "config.json")
    bare = run_folder(tmp_path / "bare", FAMILIES["llama"](GateConfig("scalar")))
    del raw["gateskip"]["thresholds"]
    (bare / "config.json").write_text(json.dumps(raw))
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "letter.txt").write_text("dear")
    (tmp_path / "file").write_text("dear")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    before = sorted(os.listdir(tmp_path))
    out = tmp_path / "out"
    for words, expected in [
            (("--model", dense, "--out", out), f"has no gates: transformers opens {dense} as it is"),
            (("--model", bare, "--out", out), "has no thresholds, and in transformers nothing else decides"),
            (("--model", tmp_path / "none", "--out", out), "does not exist"),
            (("--model", folder, "--out", tmp_path / "theirs"), "exists and is no export of this program"),
            (("--model", folder, "--out", folder), "exists and is no export of this program"),
            (("--model", folder, "--out", tmp_path / "file"), "exists and is no export of this program"),
            (("--model", folder, "--out", tmp_path / "link"), "exists and is no export of this program"),
            (("--model", folder, "--out", ""), "exists and is no export of this program"),
            (("--model", folder, "--out", out, "--budget", "0.5"),
             "--budget 0.5 is below the smallest calibrated one, 0.6"),
            (("--model", folder, "--out", out, "--budget", "2"), "outside (0, 1]"), (("--model", folder), "--out")]:
        assert expected in complaint(write, *words), words
    assert sorted(os.listdir(tmp_path)) == before


def test_an_export_with_more_in_it_stays(tmp_path):
    """A note that someone wrote into an export, deleted with it."""
    pair(tmp_path, FAMILIES["llama"](GateConfig("scalar")))
    (tmp_path / "out" / "notes.txt").write_text("mine")
    assert "holds notes.txt beside an export: move it away" in complaint(
        write, "--model", tmp_path / "run", "--out", tmp_path / "out")
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"


def test_a_link_to_an_export_stays_a_link(tmp_path):
    """A link that is replaced by a folder, while its own keeps the older export."""
    pair(tmp_path, FAMILIES["llama"](GateConfig("scalar")))
    (tmp_path / "link").symlink_to(tmp_path / "out")
    write("--model", tmp_path / "run", "--out", tmp_path / "link", "--budget", "0.6")
    assert (tmp_path / "link").is_symlink() and opened(tmp_path / "out").config.gateskip["budget"] == 0.6
    assert sorted(os.listdir(tmp_path)) == ["link", "out", "run"]


def test_an_empty_folder_will_do(tmp_path):
    """mkdir before the command, and a refusal."""
    folder = run_folder(tmp_path / "run", FAMILIES["llama"](GateConfig("scalar")))
    (tmp_path / "out").mkdir()
    write("--model", folder, "--out", tmp_path / "out")
    assert (tmp_path / "out" / "config.json").is_file()


def test_a_full_disk_leaves_the_older_export(tmp_path, monkeypatch):
    """Half of a folder under the name of a whole one."""
    pair(tmp_path, FAMILIES["llama"](GateConfig("scalar")))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "sync_tree", full)
    with pytest.raises(OSError):
        write("--model", tmp_path / "run", "--out", tmp_path / "out", "--budget", "0.6")
    assert sorted(os.listdir(tmp_path)) == ["out", "run"] and opened(tmp_path / "out").config.gateskip["budget"] == 0.8


def test_the_code_needs_nothing_else():
    """A modelling file that imports this project: the folder would open only here."""
    text = (ROOT / "interop" / "modeling_gateskip.py").read_text()
    assert imports(ast.parse(text), everywhere=True) == {"dataclasses", "torch", "transformers"}
    assert len(text.splitlines()) < 300
