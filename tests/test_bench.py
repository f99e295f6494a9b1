"""Tests of bench.py: that what is timed is the work it says. No time is asserted."""
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import bench
import disk
from conftest import build, complaint, llama, same, tokens
from console import InputError
from gates import GateConfig
from load_weights import load_model, save_model
from rows import KVCache
from savings import count_macs, counts_table

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """Every shape small, and few decoding steps."""
    for name in bench.BENCH_SHAPES:
        monkeypatch.setitem(bench.BENCH_SHAPES, name, llama(None))
    monkeypatch.setattr(bench, "STEPS", 3)


@pytest.mark.parametrize("form", bench.GATES)
@pytest.mark.parametrize("tied", [True, False])
def test_twins_share_the_backbone(form, tied):
    """Gate forms timed on other weights, a second copy of 1B parameters, a parameter left without storage."""
    model = build(llama(GateConfig(), tie_word_embeddings=tied), dtype=torch.float32)
    twin = bench.with_gate(model, form)
    mine = dict(model.named_parameters())
    for name, p in twin.named_parameters():
        assert p.device.type == "cpu" and ("_gate." in name or p is mine[name]), name
    assert twin.config.gate == bench.GATES[form] and model.config.gate == GateConfig()
    logits = twin(tokens(2, 5))[0]
    assert logits.isfinite().all()
    if form == "none":
        assert not any("_gate." in name for name, _ in twin.named_parameters())


@pytest.mark.parametrize("skipped", [0.15, 0.5, 0.7])
def test_a_single_stream_skips_exactly_its_share(skipped):
    """A batch of one that skips nothing (topk of one token keeps it), or other branches in the masked run than in the
    compact one."""
    model = bench.with_gate(build(llama(None), dtype=torch.float32), "scalar")
    traces = {c: bench.decode(model, tokens(1, 6), skipped, c)() for c in ("compact", "masked")}
    keep = {c: torch.stack([torch.stack(t.keep).flatten() for t in ts]) for c, ts in traces.items()}
    assert torch.equal(keep["compact"], keep["masked"]) and keep["compact"].shape == (3, 8)
    assert (~keep["compact"]).sum().item() == round(skipped * 24)


@pytest.mark.parametrize("work", bench.MAKERS)
def test_every_round_is_the_same_work(work):
    """A cache that grows from round to round, or a second round that starts where the first ended."""
    model = bench.with_gate(build(llama(None), dtype=torch.float32), "lowrank")
    run = bench.MAKERS[work](model, tokens(3, 6), 0.5, "compact")
    first, second = run(), run()
    assert [t.keys for t in first] == [t.keys for t in second] == ([7, 8, 9] if work == "decode" else [6])
    kept = [torch.stack(t.keep).float().mean().item() for t in first]
    assert kept == pytest.approx([2 / 3 if work == "decode" else 0.5] * len(kept))       # ceil(1.5) of 3, 9 of 18
    if work != "train":
        assert all(torch.equal(a, b) for x, y in zip(first, second) for a, b in zip(x.keep, y.keep))


def test_rewind():
    """Decoding after a rewind that still sees, or is placed behind, what the round before has written."""
    model, ids = build(llama(GateConfig())), tokens(2, 9)
    cache = KVCache(model.config, 2, 9, dtype=torch.float64)
    with torch.no_grad():
        model(ids[:, :4], cache=cache)
        first = model(ids[:, 4:6], cache=cache)[0]
        bench.rewind(cache, 4)
        model(ids[:, 6:9], cache=cache)
        bench.rewind(cache, 4)
        same(model(ids[:, 4:6], cache=cache)[0], first)


def test_rows(tmp_path, capsys, monkeypatch):
    """A row without what a reader needs, a ratio upside down, an ideal that is not count_macs', a picture that is not
    drawn."""
    monkeypatch.setattr(bench, "SKIPPED", (0.0, 0.5))
    monkeypatch.setattr(bench, "CONTEXT", 6)
    files = ["--json", str(tmp_path / "b.json"), "--png", str(tmp_path / "b.png")]
    assert bench.main([*files, "--repeats", "1", "--gate", "lowrank", "--device", "cpu"]) == 0
    rows = json.loads((tmp_path / "b.json").read_text())
    assert {(r["work"], r["batch"]) for r in rows} == {("prefill", 8), ("decode", 1), ("decode", 8), ("decode", 32),
                                                       ("train", 2)}
    of = {(r["work"], r["batch"], r["gate"], r["asked"], r["compute"]): r for r in rows}
    assert len(of) == len(rows)
    for r in rows:
        assert {"work", "batch", "skipped", "gate", "ratio", "ideal", "peer", "seconds"} <= set(r)
        full = of[r["work"], r["batch"], r["gate"], 0.0, "compact"]
        assert r["ratio"] == pytest.approx(full["seconds"] / r["seconds"]) and r["seconds"] > 0
    config, row = replace(llama(None), gate=GateConfig(arch="lowrank")), of["decode", 8, "lowrank", 0.5, "compact"]
    everyone = torch.ones(8, 8, 1, dtype=torch.bool)             # (2L, B, S)
    half = (torch.arange(8) < 4).view(1, 8, 1).expand(8, 8, 1)
    full, run = (sum(int(count_macs(config, keep, everyone[0], keys=keys, logit_rows=8, gate=config.gate))
                     for keys in (7, 8, 9)) for keep in (everyone, half))
    assert row["ideal"] == pytest.approx(full / run) and row["skipped"] == 0.5
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert printed.count("\n") >= 5 * 3 and "lowrank" in printed


def test_quick_and_a_model_of_ones_own(tmp_path, capsys):
    """--quick that does everything, or --model that times random weights."""
    model = ROOT / "tests/golden/llama_rope3"
    assert bench.main(["--quick", "--repeats", "1", "--model", str(model), "--png", str(tmp_path / "b.png")]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("prefill", "decode", "train"))]
    assert len(lines) == 3 and all("2 x 256" in line for line in lines)


def test_bad_input_is_refused(monkeypatch):
    """A traceback where transformers is missing, or a peer compared with other weights than ours."""
    monkeypatch.setattr(bench, "find_spec", lambda name: None)
    for argv, complaint in ((["--repeats", "0"], "--repeats: '0'"),
                            (["--peer", "transformers"], "--peer needs --model"),
                            (["--peer", "transformers", "--model", "somewhere"], "pip install transformers"),
                            (["--png", "curves.pdf"], "--png curves.pdf must end in .png")):
        with pytest.raises(InputError, match=complaint):
            bench.main(argv)


def test_a_file_of_another_is_kept(tmp_path, monkeypatch):
    """Rows written over somebody's text, or over by the picture; a good picture cut short by a full disk; "written"
    where nothing was."""
    monkeypatch.setattr(bench, "pick_device", None)              # no work begins
    png, other = tmp_path / "b.png", tmp_path / "a.json"
    for text in ("mine", "{}", "[1]"):
        other.write_text(text)
        with pytest.raises(InputError, match="is no file of this program"):
            bench.main(["--json", str(other), "--png", str(png)])
        assert other.read_text() == text
    for argv, why in ((["--json", str(png), "--png", str(png)], "is --png, too"),
                      (["--quick", "--work", "train"], "leave --work out")):
        with pytest.raises(InputError, match=why):
            bench.main(argv)
    png.write_bytes(b"old")
    monkeypatch.setattr(disk, "write", lambda path, content: 1 / 0)
    row = dict(work="prefill", batch=1, skipped=0.0, gate="scalar", ratio=1.0, ideal=1.0, peer=None)
    with pytest.raises(ZeroDivisionError):
        bench.plot([{**row, "compute": compute} for compute in ("compact", "masked")], png)
    assert png.read_bytes() == b"old"
    monkeypatch.setattr(bench, "pyplot", lambda: None)
    assert not bench.plot([], png)


def test_what_cannot_be_written_is_said_first(tmp_path, monkeypatch):
    """Thirteen minutes of timing, and then --json turns out to be a folder, or to lie where nobody may write."""
    monkeypatch.setattr(bench, "pick_device", None)              # no work begins
    (tmp_path / "file").touch()
    for name in "folder.png", "c.json.tmp":
        (tmp_path / name).mkdir()
    for flag, path, why in (("--json", tmp_path, "no file"), ("--json", tmp_path / "file" / "b.json", "File exists"),
                            ("--json", tmp_path / "file" / "a" / "b.json", "Not a directory"),
                            ("--json", tmp_path / "c.json", "c.json.tmp is in the way"),
                            ("--png", tmp_path / "folder.png", "no file"), ("--json", "/dev/null", "no file")):
        with pytest.raises(InputError, match=f"{flag} {path} cannot be written .{why}.*: give another file"):
            bench.main(["--png", str(tmp_path / "b.png"), flag, str(path)])

    def read_only(dir):
        raise OSError(30, "Read-only file system", "tmp1234")
    monkeypatch.setattr("tempfile.TemporaryFile", read_only)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="--png b.png cannot be written .Read-only file system.: give another file"):
        bench.main(["--png", "b.png"])
    monkeypatch.undo()
    monkeypatch.setattr(bench, "pick_device", None)
    monkeypatch.setattr(bench.os, "access", lambda path, mode: mode != os.W_OK)
    with pytest.raises(InputError, match="may not be written"):
        bench.main(["--png", str(tmp_path / "b.png"), "--json", str(tmp_path / "file")])
    assert (tmp_path / "file").read_bytes() == b"" and not (tmp_path / "b.png").exists()


def test_counts_only(capsys, monkeypatch):
    """--counts that goes on to time everything, or prints another table than savings.py makes."""
    monkeypatch.setattr(bench, "bench", None)
    assert bench.main(["--counts"]) == 0
    assert capsys.readouterr().out == "\n".join(counts_table()) + "\n"


def test_the_peer_is_asked_for_the_same_work(tmp_path, monkeypatch):
    """A peer that reads other batches, decodes another number of steps or does it elsewhere than we do, or rows that
    never reach the file."""
    asked, folder = [], ROOT / "tests/golden/llama_rope3"

    def peer(model, works, steps, repeats, device, dtype):
        asked.append((model, steps, repeats, [(work, tuple(shape)) for work, shape, _ in works], device.type, dtype))
        assert all(ours() > 0 for _, _, ours in works)
        return [{"work": "load", "peer": "from_pretrained"}]
    monkeypatch.setattr(bench, "find_spec", lambda name: name)
    monkeypatch.setattr(bench, "bench_peer", peer)
    monkeypatch.setattr(bench, "bench", lambda *_: [])
    monkeypatch.setattr(bench, "plot", lambda rows, path: None)
    monkeypatch.setattr(bench, "CONTEXT", 6)
    argv = ["--peer", "transformers", "--model", str(folder), "--repeats", "2", "--device", "cpu"]
    assert bench.main([*argv, "--json", str(tmp_path / "b.json"), "--png", str(tmp_path / "b.png")]) == 0
    works = [("prefill", (8, 512)), ("decode", (1, 6)), ("decode", (8, 6))]
    assert asked == [(folder, 3, 2, works, "cpu", torch.float32)]
    assert json.loads((tmp_path / "b.json").read_text()) == [{"work": "load", "peer": "from_pretrained"}]


def test_a_peer_for_a_gated_model_is_refused_first(tmp_path, monkeypatch):
    """Minutes of timing before transformers says that it knows no such model."""
    save_model(load_model(ROOT / "tests/golden/llama_rope3", GateConfig("scalar")), tmp_path / "gated")
    monkeypatch.setattr(bench, "find_spec", lambda name: name)
    monkeypatch.setattr(bench, "bench", None)                    # no work begins
    assert "knows no gates, and --model" in complaint(bench.main, [
        "--peer", "transformers", "--model", str(tmp_path / "gated"), "--png", str(tmp_path / "b.png")])


def test_a_failing_peer_costs_no_row_of_ours(tmp_path, monkeypatch):
    """Minutes of our own timing, gone with a model that transformers cannot open."""
    def peer(*_):
        raise InputError("the peer process stopped")
    own = [{"work": "prefill", "seconds": 1.0}]
    for name, value in dict(find_spec=bool, bench_peer=peer, bench=lambda *_: own, plot=lambda *_: True).items():
        monkeypatch.setattr(bench, name, value)
    with pytest.raises(InputError, match="the peer process stopped"):
        bench.main(["--peer", "transformers", "--model", str(ROOT / "tests/golden/llama_rope3"), "--work", "prefill",
                    "--json", str(tmp_path / "b.json"), "--png", str(tmp_path / "b.png")])
    assert json.loads((tmp_path / "b.json").read_text()) == own
