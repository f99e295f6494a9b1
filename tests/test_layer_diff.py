"""Tests of layer_diff.py, the tool for whoever adds a model family."""
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import layer_diff
from console import InputError
from load_weights import load_model, save_model

GOLDEN = Path(__file__).parent / "golden"


def diff(capsys, folder, golden):
    """(exit code, printed lines) of the tool."""
    code = layer_diff.main([str(folder), str(GOLDEN / golden / "golden.safetensors")])
    return code, capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("golden", ["llama_rope3", "llama_untied", "gemma2"])
def test_goldens_agree(golden, capsys):
    """A tool that compares the wrong states (before Gemma's embedding scale, after the final norm) cries wolf."""
    code, lines = diff(capsys, GOLDEN / golden, golden)
    layers = load_model(GOLDEN / golden).config.num_hidden_layers
    assert code == 0 and len(lines) == layers + 1
    assert all(line.startswith("[OK]") for line in lines)
    assert lines[0].split()[1] == "embedding" and lines[-1].split()[1:3] == ["layer", str(layers - 1)]


@pytest.mark.parametrize("weight, first, position, hint", [
    ("layers.1.mlp.gate_proj.weight", "layer 1", 0, "activation"),
    ("layers.1.self_attn.q_proj.weight", "layer 1", 1, "rope"),
    ("layers.0.input_layernorm.weight", "layer 0", 0, "norms"),
    ("embed_tokens.weight", "embedding", 0, "scale"),
])
def test_first_wrong_layer_is_named(weight, first, position, hint, tmp_path, capsys):
    """A tool that names the last or the largest difference, or counts layers from 1: its user looks elsewhere."""
    model = load_model(GOLDEN / "gemma2")
    with torch.no_grad():
        model.get_parameter(f"model.{weight}").mul_(1.5)
    save_model(model, tmp_path)
    code, lines = diff(capsys, tmp_path, "gemma2")
    places = ["embedding", "layer 0", "layer 1", "layer 2", "layer 3"]
    wrong = [f"[DIFF] {place} " in line for place, line in zip(places, lines)]
    assert code == 1 and wrong == [i >= places.index(first) for i in range(5)]
    assert lines[-1].startswith(f"first off: {first}, from position {position} on") and hint in lines[-1]


def test_a_wrong_window_shows_where_it_begins(tmp_path, capsys):
    """A tool without positions: a window too short looks like any other mistake."""
    shutil.copytree(GOLDEN / "gemma2", tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "sliding_window": 8}))
    code, lines = diff(capsys, tmp_path, "gemma2")
    assert code == 1 and lines[-1].startswith("first off: layer 0, from position 8 on") and "window" in lines[-1]


def test_what_overflows_differs(tmp_path, capsys):
    """`difference > tolerance` is false for NaN: a decoder that overflows would pass."""
    model = load_model(GOLDEN / "llama_rope3")
    with torch.no_grad():
        model.get_parameter("model.layers.2.mlp.up_proj.weight")[:] = 3e38
    save_model(model, tmp_path)
    code, lines = diff(capsys, tmp_path, "llama_rope3")
    assert code == 1 and lines[3].startswith("[DIFF] layer 2 ") and lines[2].startswith("[OK]")


def test_unusable_reference_is_one_line(tmp_path):
    """A reference of another model, or one recorded without all layers, ends in a KeyError or a broadcast."""
    golden = load_file(GOLDEN / "llama_rope3" / "golden.safetensors")
    file = tmp_path / "reference.safetensors"
    wrong = {"lacks hidden.1": {k: v for k, v in golden.items() if k != "hidden.1"},
             "has shape": {**golden, "hidden.0": golden["hidden.0"][..., :1].contiguous()}}
    for words, tensors in wrong.items():
        save_file(tensors, file)
        with pytest.raises(InputError, match=words):
            layer_diff.main([str(GOLDEN / "llama_rope3"), str(file)])
    file.write_text("no tensors")
    with pytest.raises(InputError, match="reference.safetensors is no safetensors file"):
        layer_diff.main([str(GOLDEN / "llama_rope3"), str(file)])
