"""Tests of bench_peer.py: the worker and what it answers, and the ratios of its times. transformers itself is no
dependency: a module of that name, which notes what it is asked, stands in its place."""
import json
import sys
from pathlib import Path

import pytest
import torch

import bench_peer
from bench_peer import Peer
from console import InputError
from load_weights import load_model

FOLDER = Path(__file__).resolve().parent / "golden" / "llama_rope3"

STAND_IN = '''
import json, os
from types import SimpleNamespace
import torch

def note(*what):
    with open(os.environ["NOTES_OF_THE_STAND_IN"], "a") as file:
        print(json.dumps(what), file=file)

class Model:
    config = SimpleNamespace(vocab_size=7)

    def to(self, device):
        note(str(device))
        return self

    def __call__(self, ids, past_key_values=None, **how):
        note(list(ids.shape), past_key_values, how, torch.is_grad_enabled(), int(ids.max()) < 7)
        length = (past_key_values or 0) + ids.shape[1]           # what is cached: how long the context is
        return SimpleNamespace(logits=torch.zeros(len(ids), 1, 7), past_key_values=length)

class AutoModelForCausalLM:
    @staticmethod
    def from_pretrained(folder, attn_implementation, dtype):
        note(folder, attn_implementation, str(dtype))
        return Model()
'''


@pytest.fixture
def notes(tmp_path, monkeypatch):
    """A function: what transformers' stand-in was asked in the processes that were started since."""
    (tmp_path / "transformers.py").write_text(STAND_IN)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("NOTES_OF_THE_STAND_IN", str(tmp_path / "notes"))
    return lambda: [json.loads(line) for line in (tmp_path / "notes").read_text().splitlines()]


# The worker.

def test_worker_loads_in_a_process_of_its_own():
    """A loading time that counts the imports, or a worker that hangs after it has answered."""
    peer = Peer("ours", FOLDER)
    peer.close()
    assert 0 < peer.loaded["seconds"] and peer.loaded["peak_mb"] >= 0 and peer.process.returncode == 0
    assert load_model(FOLDER).config.gate is None
    with pytest.raises(InputError, match="peer process stopped"):
        Peer("ours", "no/such/folder")


def test_worker_does_the_work_it_is_asked_for(notes):
    """A peer that computes all logits, keeps no cache, works with gradients, or decodes one step more or less; a
    context that is timed along with the steps; another device or dtype than asked for."""
    peer = Peer("sdpa", FOLDER, torch.device("cpu"), torch.bfloat16)
    assert peer.ask("prefill", 2, 5, 3) > 0 and peer.ask("decode", 4, 6, 3) > 0
    peer.close()
    assert peer.process.returncode == 0
    first, cached = {"use_cache": True, "logits_to_keep": 1}, {"use_cache": True}
    assert notes() == [
        [str(FOLDER), "sdpa", "torch.bfloat16"], ["cpu"], [[2, 5], None, first, False, True],
        [[4, 6], None, first, False, True], *([[4, 1], length, cached, False, True] for length in (6, 7, 8))]


def test_a_worker_that_has_stopped_is_told(notes):
    """A command that waits for ever for an answer, or ends in a broken pipe's traceback."""
    peer = Peer("eager", FOLDER)
    peer.process.kill()
    peer.process.wait()
    with pytest.raises(InputError, match="stopped; to see why: python bench_peer.py sdpa FOLDER cpu float32"):
        peer.ask("prefill", 1, 2, 3)


# The rows.

def test_rows_of_the_comparison(monkeypatch, capsys):
    """A ratio upside down (above 1: we are faster), a mean in place of the median, the peers' times swapped, or a
    process that is left behind."""
    open_now, asked = [], []
    theirs = {"eager": iter([0.6, 9.0, 0.4, 4.0, 6.0, 5.0]), "sdpa": iter([0.2, 0.1, 0.3, 1.0, 1.0, 1.0])}
    loads = {"ours": iter([1.0, 2.0, 30.0]), "sdpa": iter([5.0, 4.0, 90.0, 0.0]), "eager": iter([0.0])}

    class Stub:
        def __init__(self, kind, *about):
            assert about == ("folder", "cuda:1", torch.float32)
            self.kind, self.loaded = kind, {"seconds": next(loads[kind]), "peak_mb": 10.0 if kind == "ours" else 20.0}
            open_now.append(self)

        def ask(self, *work):
            asked.append((self.kind, *work))
            return next(theirs[self.kind])

        def close(self):
            open_now.remove(self)

    monkeypatch.setattr(bench_peer, "Peer", Stub)
    ours = iter([0.4, 0.1, 0.2, 2.0, 2.0, 2.0])
    works = [("prefill", (8, 512), lambda: next(ours)), ("decode", (1, 256), lambda: next(ours))]
    rows = bench_peer.bench_peer("folder", works, 16, 3, "cuda:1", torch.float32)
    assert not open_now and next(ours, None) is None
    assert asked == [(kind, *work, 16) for work in (("prefill", 8, 512), ("decode", 1, 256))
                     for _ in range(3) for kind in ("eager", "sdpa")]
    load, *rest = rows
    assert (load["work"], load["peer"], load["seconds"], load["peak_mb"], load["our_peak_mb"]) == (
        "load", "from_pretrained", 5.0, 20.0, 10.0)
    assert load["ratio"] == 5.0 / 2.0
    assert [(r["work"], r["batch"], r["peer"], r["seconds"], r["ratio"]) for r in rest] == [
        ("prefill", 8, "transformers eager", 0.6, 0.6 / 0.2), ("prefill", 8, "transformers sdpa", 0.2, 0.2 / 0.2),
        ("decode", 1, "transformers eager", 5.0, 5.0 / 2.0), ("decode", 1, "transformers sdpa", 1.0, 1.0 / 2.0)]
    for r in rows:
        assert (r["skipped"], r["gate"], r["compute"], r["ideal"]) == (0.0, "none", "compact", None)
    printed = capsys.readouterr().out
    assert "loading: ours 2.00 s, 10 MB; transformers 5.00 s, 20 MB: ratio 2.50" in printed
    assert printed.count("ratio") == 5 and "transformers" not in sys.modules
