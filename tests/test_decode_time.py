"""Tests of paper/decode_time.py: what is compared with what, under fake times."""
import json
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch

from conftest import build, complaint
from data import encode_prompt
from gates import GateConfig
from generate import generate
from load_weights import load_model, load_tokenizer, save_model
from problems import arithmetic
from thresholds import calibrate, make_policy
from toy_runs import ROOT, TINY, toy, words

sys.path.insert(0, str(ROOT / "paper"))
import decode_time

PROMPTS = [encode_prompt(load_tokenizer(TINY), problem.question) for problem in arithmetic(2, "test")]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of toys with weights of unit scale, for which every token ends a text."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("model", "dense")}
    for name, gate in ("model", GateConfig("scalar")), ("dense", None):
        model, tokenizer = toy(folders[name], gate, num_hidden_layers=4, eos_token_id=list(range(482)))
        model.load_state_dict(build(model.config).float().state_dict())
        model.config.gateskip = calibrate(model, PROMPTS, [0.8, 0.5]) if gate else {}
        save_model(model, folders[name], tokenizer)
    return folders


def timed(out, *saved, **flags):
    flags = dict(data="arithmetic", prompts=2, new_tokens=8, repeats=3, out=out) | flags
    assert decode_time.main(words("--saved", *saved, **flags)) == 0
    return {r["setting"]: r for r in json.loads(out.read_text())["rows"]}


def test_each_is_decoded_alone_to_the_same_length_without_its_prefill(models, monkeypatch):
    """The first token's time, or that between prompts; an answer that its end token cuts short; prompts in a batch."""
    monkeypatch.setattr(decode_time, "perf_counter", iter([1000, 1004, 1009, 5000, 5001, 5003]).__next__)
    policy = make_policy((model := load_model(models["model"])).config, "frozen", 0.8)
    seconds, saved, count = decode_time.decode(model, PROMPTS, policy, 3)
    macs = sum(generate(model, [prompt], 3, policy).savings.report()["answer"]["macs"] for prompt in PROMPTS)
    assert (seconds, count, saved["answer"]["calls"], saved["answer"]["macs"]) == (4 + 5 + 1 + 2, 6, 4, macs)


def test_budgets_realise_the_shares_asked_for(models, tmp_path, capsys):
    """Shares of prompts or of pairs, numbers of another policy; a share that nothing reaches, and nobody says so."""
    rows, out = timed(tmp_path / "rows.json", "0.17", "0.9", **models), capsys.readouterr().out
    for name, r in rows.items():
        model = load_model(models["dense" if name == "dense" else "model"])
        saved = decode_time.decode(model, PROMPTS, make_policy(model.config, "frozen", r["budget"]), 8)[1]
        assert (r["prompt"], r["answer"], r["tokens"]) == (saved["prompt"], saved["answer"], 2 * 8)
        assert r["ideal"] == rows["budget 1.0"]["answer"]["macs"] / saved["answer"]["macs"]
        if "asked" in name:
            assert (abs(saved["answer"]["macs_saved"] - float(name.split("%")[0]) / 100) <= 0.02) == (name[0] == "1")
    assert list(rows) == ["budget 1.0", "dense", "17% asked", "90% asked"] and out.count("out of range") == 1
    assert f"--saved 0.9 is out of range: budget {r['budget']:.4f} is nearest" in out


def test_ratios_are_of_medians_of_the_same_rounds(models, tmp_path, monkeypatch):
    """A mean of ratios, one upside down, one setting after the other; a peer asked for other work, or left behind."""
    costs = {"budget 1.0": [4, 9, 5], "dense": [3, 3, 30], "20% asked": [2, 3, 10], "transformers": [8, 7, 6]}
    turns, turn = [], lambda *this: turns.append(this) or costs[this[0]][turns.count(this) - 1]  # seconds for a prompt
    def fake(model, prompts, policy, n, decode=decode_time.decode):
        name = "dense" if model.config.gate is None else "budget 1.0" if policy.budget == 1.0 else "20% asked"
        return [turn(name, len(prompts[0]))] if len(prompts) == 1 else decode(model, prompts, policy, n)
    peer = SimpleNamespace(ask=lambda *work: turn("transformers", work[2]) if work[::3] == ("decode", 7) else None,
                           close=lambda: turns.append(("closed",)))
    for name, of in dict(Peer=lambda *about: turns.append(about) or peer, find_spec=bool, decode=fake).items():
        monkeypatch.setattr(decode_time, name, of)
    r = timed(tmp_path / "rows.json", "0.2", peer="transformers", **models)["20% asked"]
    in_turn = [(name, len(prompt)) for prompt in PROMPTS for name in costs]
    assert turns == [("sdpa", models["dense"], torch.device("cpu"), torch.float32), *3 * in_turn, ("closed",)]
    assert (r["seconds"], r["ms_per_token"]) == ([4, 6, 20], pytest.approx(1000 * 6 / (2 * 7)))
    assert r["over"] == {"budget 1.0": [5 / 3, 0.5, 3], "dense": [3 / 3, 1, 3], "transformers": [7 / 3, 0.6, 4]}


def test_what_cannot_be_timed_is_refused_before_the_work(models, tmp_path, monkeypatch):
    """Minutes of decoding before a file cannot be written; gates where the dense model is asked for, or none."""
    for name, of in dict(generate=None, find_spec=lambda name: None).items():
        monkeypatch.setattr(decode_time, name, of)
    for said, flags in {"no gates with": dict(model=models["dense"]), "has gates": dict(dense=models["model"]),
                        "is plain text": dict(data=ROOT / "requirements.txt"), "cannot be written": dict(out=tmp_path),
                        "--new-tokens 600: the longest prompt leaves the model room for 4": dict(new_tokens=600),
                        "--peer transformers: it is not installed": dict(peer="transformers")}.items():
        assert said in complaint(timed, flags.pop("out", tmp_path / "rows.json"), "0.2", **models | flags)
    assert "two shares that print alike" in complaint(timed, tmp_path / "rows.json", "0.2", "0.2000000001", **models)
    assert [*tmp_path.iterdir()] == []


def test_only_its_own_file_is_written_over(models, tmp_path, monkeypatch):
    """A run's config.json, or another script's rows, gone for a table of times; its own file refused."""
    file = tmp_path / "rows.json"
    file.write_text('{"command": "", "digest": "", "rows": []}')
    timed(file, "0.2", repeats=1, **models)
    timed(file, "0.2", repeats=1, **models)
    monkeypatch.setattr(decode_time, "generate", None)
    shutil.copy(models["model"] / "config.json", tmp_path)
    for name, text in {"config.json": None, "eval.json": '{"made_with": {}, "rows": []}', "list.json": "[]",
                       "notes.txt": "my own", "empty": ""}.items():
        if text is not None:
            (tmp_path / name).write_text(text)
        before = (tmp_path / name).read_bytes()
        assert "is no file of this program: give another --out" in complaint(timed, tmp_path / name, "0.2", **models)
        assert (tmp_path / name).read_bytes() == before
