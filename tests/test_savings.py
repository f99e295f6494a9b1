"""Tests of savings.py: the count of what a call executes, the three numbers of a run, the true sizes of the models, and
the tables on paper."""
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from conftest import (VOCAB, Synchronisations, both_kv, build, everyone, families, frozen, gemma, llama, mask,
                      new_cache, on_devices, padding, tokens)
from gates import GateConfig, SkipPolicy
from model import Model, ModelConfig, Trace
from rows import KVCache
from savings import (GATE_FORMS, SHAPES, Savings, count_macs, counts_table, macs_of, memory_on_paper, memory_table,
                     savings_line)

ROOT = Path(__file__).parents[1]


# One call.

def small(layers, gate=None):
    return ModelConfig(vocab_size=10, hidden_size=8, intermediate_size=12, num_hidden_layers=layers,
                       num_attention_heads=2, num_key_value_heads=1, head_dim=4, gate=gate)


def test_count_by_hand():
    """A wrong term: every number written out. H 8, I 12, 2 heads, 1 kv head, D 4, V 10, 2 layers, 3 real tokens."""
    config, valid = small(2), mask([1, 1, 0, 0], [1, 0, 0, 0])
    keep = torch.stack([valid & branch for branch in (
        mask([1, 0, 0, 0], [1, 0, 0, 0]), mask([1, 1, 0, 0], [0, 0, 0, 0]),      # attn 0, mlp 0
        mask([0, 1, 1, 1], [0, 1, 1, 1]), mask([0, 0, 0, 0], [0, 0, 0, 0]))])    # attn 1, mlp 1
    q_o, k_v, mlp, head = 2 * 8 * 2 * 4, 2 * 8 * 1 * 4, 3 * 8 * 12, 10 * 8
    pair = 2 * 2 * 4                                             # score and weighted sum of a query and key, both heads
    base = 2 * q_o + 1 * q_o + 2 * mlp + 5 * head                # rows: attn 0 two, attn 1 one, mlp 0 two, mlp 1 none
    rectangles = (2 * 1 * 6 + 2 * 1 * 6) * pair                  # 2 sequences x most rows of one x 6 keys, per layer
    count = lambda kv, gate=None: count_macs(config, keep, valid, keys=6, logit_rows=5, kv=kv, gate=gate).item()
    assert count("copy_up") == base + rectangles + (3 + 1) * k_v     # layer 0 computes K and V of all 3, layer 1 of one
    assert count("dense") == base + rectangles + (3 + 3) * k_v
    vector = 4 * 8 * 64                                          # 4 branches x 8 rows, padding included, x H^2
    assert count("copy_up", GateConfig()) == count("copy_up") + vector
    assert count("copy_up", GateConfig("scalar")) == count("copy_up") + 4 * 8 * 8
    assert count("copy_up", GateConfig(arch="lowrank", rank=3)) == count("copy_up") + 4 * 8 * 2 * 8 * 3
    assert count_macs(config, keep, valid, keys=6, logit_rows=5).dtype == torch.int64


GATES = {"ungated": None, "vector": GateConfig(), "scalar": GateConfig("scalar"),
         "lowrank": GateConfig(arch="lowrank", rank=3), "mlp": GateConfig(arch="mlp")}


@both_kv
@pytest.mark.parametrize("gate", GATES)
@families
def test_count_equals_the_flop_counter(family, gate, kv):
    """A masked branch whose cost is called saved, projections of skipped rows that run after all, or a count that has
    drifted from the code: prefill with and without padding, a cached chunk and decoding steps, by torch's counter."""
    model = build(family(GATES[gate], num_hidden_layers=2))
    config, lengths = model.config, [7, 3, 5]

    def agrees(share, cache, ids, valid, **logits):
        policy = SkipPolicy("none", kv=kv) if share == 0 else SkipPolicy(
            "random", 1 - share, kv=kv, generator=torch.Generator().manual_seed(3))
        counter = FlopCounterMode(display=False)
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
            trace = model(ids, valid=valid, cache=cache, policy=policy, compute="compact", **logits)[1]
        counted = count_macs(config, torch.stack(trace.keep), trace.valid, keys=trace.keys, logit_rows=trace.logit_rows,
                             kv=trace.kv, gate=config.gate)
        assert 2 * counted.item() == counter.get_total_flops(), (share, logits)
        assert counted == macs_of(config, trace)
        if share:
            assert not torch.stack(trace.keep).all()

    for share in (0.0, 0.5):
        agrees(share, None, tokens(3, 7), None)
        agrees(share, None, tokens(3, 7), padding(lengths, 7), last=True)
        cache = KVCache(config, 3, 14, dtype=torch.float64)
        agrees(share, cache, tokens(3, 7), padding(lengths, 7), last=True)
        agrees(share, cache, tokens(3, 4), None, last=True)
        agrees(share, cache, tokens(3, 1), None, places=torch.tensor([0, 2]))
        agrees(share, cache, tokens(3, 1), torch.tensor([[True], [False], [True]]), last=True)


# A run.

def test_savings_by_hand():
    """The paper's per-call mean passed off as the share of pairs: a call of 4 tokens and a call of 1 weigh 4 to 1 in
    `skipped` and equally in `skipped_per_call`. Padding counts in neither."""
    first = Trace(None, [mask([0, 1, 0], [0, 1, 1]), mask([0, 0, 1], [0, 1, 1])], None, mask([0, 1, 1], [0, 1, 1]),
                  keys=3, logit_rows=2, kv="copy_up")
    second = Trace(None, [mask([0]), mask([1])], None, mask([1]), keys=4, logit_rows=1, kv="copy_up")
    savings = Savings(small(1, gate=GateConfig("scalar")))
    savings.add(first)
    savings.add(second)
    report = savings.report()
    assert report["skipped"] == pytest.approx(3 / 10, abs=1e-12)                        # 2 of 8 pairs and 1 of 2
    assert report["skipped_per_call"] == pytest.approx((1 / 4 + 1 / 2) / 2, abs=1e-6)   # 25% and 50%, equally
    q_o, k_v, pair, mlp, head, gate = 128, 64, 16, 288, 80, 8
    dense = (4 * q_o + 4 * k_v + 2 * 2 * 3 * pair + 4 * mlp + 2 * head) + (q_o + k_v + 4 * pair + mlp + head)
    run = (3 * q_o + 4 * k_v + 2 * 2 * 3 * pair + 3 * mlp + 2 * head + 2 * 6 * gate) + (k_v + mlp + head + 2 * gate)
    assert (report["macs"], report["macs_dense"]) == (run, dense)
    assert report["macs_saved"] == pytest.approx(1 - run / dense, abs=1e-12)
    assert (report["calls"], report["pairs"]) == (2, 10)
    assert report["branches"] == [3 / 5, 4 / 5]                  # of 5 tokens attention ran 3 + 0, the MLP 3 + 1


def total(config, traces, part="all"):
    savings = Savings(config)
    for trace in traces:
        savings.add(trace, part)
    return savings


def test_prompt_and_answer_by_hand():
    """A prompt's calls counted as the answer's: 2 of its 4 pairs are skipped, of the answer's 1 of 2, then 0 of 2."""
    trace = lambda valid, *keep: Trace(None, list(keep), None, valid, keys=2, logit_rows=1, kv="copy_up")
    savings, one = Savings(small(1)), mask([1])
    savings.add(trace(mask([1, 1]), mask([0, 1]), mask([0, 1])), "prompt")
    savings.add(trace(one, mask([0]), one), "answer")
    savings.add(trace(one, one, one), "answer")
    report = savings.report()
    numbers = lambda part: (part["skipped"], part["skipped_per_call"], part["calls"], part["pairs"])
    assert numbers(report["prompt"]) == (2 / 4, 1 / 2, 1, 4) and numbers(report["answer"]) == (1 / 4, 1 / 4, 2, 4)
    assert numbers(report) == pytest.approx((3 / 8, 1 / 3, 3, 8), abs=1e-12)
    assert [report["prompt"]["branches"], report["answer"]["branches"]] == [[1 / 2, 1 / 2], [1 / 2, 1]]
    assert report["branches"] == [1 / 2, 3 / 4]
    assert set(report) - {"prompt", "answer"} == set(total(small(1), [trace(one, one, one)]).report())
    assert set(report["answer"]) == set(report) - {"prompt", "answer"} and "all" not in report["answer"]


def test_savings_can_be_negative():
    """A clamp at zero: open vector gates cost more than no skipping saves, and that has to show."""
    model, savings = build(llama()), Savings(llama())
    savings.add(model(tokens(2, 5), policy=frozen(model, tokens(2, 5), share=0.02))[1])
    assert savings.report()["macs_saved"] < -0.05


@pytest.fixture
def a_run():
    """A model's config and the traces of a left-padded prompt and three more tokens, some of which are skipped."""
    model, valid = build(llama(GateConfig("scalar"))), padding([7, 3, 5], 7)
    cache = new_cache(model, 3, 10)
    policy = SkipPolicy("random", 0.7, generator=torch.Generator().manual_seed(3))
    ids, traces = tokens(3, 10), []
    for a, b in ((0, 7), (7, 8), (8, 9), (9, 10)):
        traces.append(model(ids[:, a:b], valid=valid if a == 0 else None, cache=cache, policy=policy, last=True)[1])
    return model.config, traces


def agree(report, expected):
    """Two reports are equal: counts exactly, shares but for the order of their additions."""
    assert set(report) == set(expected)
    for name, value in expected.items():
        assert report[name] == pytest.approx(value, rel=1e-12, abs=1e-15), name
    for name in ("calls", "pairs", "macs", "macs_dense"):
        assert report[name] == expected[name], name


def test_parts_sum_to_the_whole(a_run):
    """A whole that forgets a part, averages the parts' shares (three calls against one), or depends on the split."""
    config, traces = a_run
    savings = total(config, traces[:1], "prompt")
    for trace in traces[1:]:
        savings.add(trace, "answer")
    report, whole = savings.report(), total(config, traces).report()
    agree(report.pop("prompt"), total(config, traces[:1]).report())
    agree(report.pop("answer"), total(config, traces[1:]).report())
    agree(report, whole)
    assert whole["calls"] == 4 and 0.1 < whole["skipped"] < 0.6
    assert whole["macs"] == sum(macs_of(config, trace).item() for trace in traces)
    assert whole["macs_dense"] == sum(macs_of(config, trace, dense=True).item() for trace in traces)


def test_runs_add_up(a_run):
    """+= that drops a part which one side lacks, or shares its sums with the other side: later calls count twice."""
    config, traces = a_run
    left, right = total(config, traces[:2], "prompt"), total(config, traces[2:3], "answer")
    right.add(traces[3], "prompt")
    before, runs = (left.report(), right.report()), Savings(config)
    for run in (left, right):
        runs += run
    expected = total(config, traces[:2], "prompt")
    expected.add(traces[2], "answer")
    expected.add(traces[3], "prompt")
    report, expected = runs.report(), expected.report()
    for part in ("prompt", "answer"):
        agree(report.pop(part), expected.pop(part))
    agree(report, expected)
    runs.add(traces[0], "answer")
    runs += left
    assert (left.report(), right.report()) == before


def test_counts_stay_on_the_device():
    """A count that stops the GPU at every step: only Savings.report may."""
    config, valid = llama(GateConfig("scalar")), padding([9, 4], 9)
    savings, other = Savings(config), Savings(config)
    with Synchronisations() as host:
        for part in ("prompt", "answer", "answer"):
            savings.add(Trace(None, [valid] * 8, None, valid, 9, 2, "copy_up"), part)
        other += savings
    assert not host.seen
    nowhere = Savings(config)                                    # no value can be had there, by .tolist() neither
    nowhere.add(Trace(None, [valid.to("meta")] * 8, None, valid.to("meta"), 9, 2, "copy_up"))
    with Synchronisations() as host:
        other.report()
    assert host.seen in ([], ["_local_scalar_dense"])            # .tolist() is one, and torch does not show it


@on_devices
def test_savings_of_a_run(device):
    """Counting that leaves the device or breaks on it; the numbers of a masked run are those of the compact one."""
    model, ids = build(llama(GateConfig("scalar")), device=device), tokens(3, 9, device=device)
    policy, reports = frozen(model, ids), []
    for compute in ("masked", "compact"):
        savings = Savings(model.config)
        trace = model(ids, policy=policy, compute=compute)[1]
        savings.add(trace)
        assert all(sums.device.type == device for sums in savings.sums.values()) and len(savings.sums) == 1
        reports.append(savings.report())
    assert reports[0] == reports[1]
    by_masks = 1 - torch.stack(trace.keep).double().mean().item()
    assert reports[0]["skipped"] == pytest.approx(by_masks, abs=1e-12) and reports[0]["skipped"] > 0.2


def test_savings_in_a_line():
    """A number that stands alone, a cost shown without its sign, a masked run's saving told as saved, parts swapped."""
    numbers = lambda skipped, per_call, macs: dict(skipped=skipped, skipped_per_call=per_call, macs_saved=macs)
    alone = numbers(0.1494, 0.0551, -0.123)
    assert savings_line(alone) == ("skipped 14.9% of (token, branch) pairs, 5.5% averaged per call; "
                                   "MACs saved -12.3%, gates paid")
    assert savings_line(alone, "masked") == savings_line(alone).replace("MACs saved", "MACs saved if run compact")
    apart = alone | dict(prompt=numbers(0.3, 0.31, 0.2), answer=numbers(0.05, 0.06, 0.04))
    assert savings_line(apart).splitlines() == [
        savings_line(alone), "  prompt tokens: " + savings_line(apart["prompt"]),
        "  generated tokens: " + savings_line(apart["answer"])]
    assert savings_line(apart, "masked").count("if run compact") == 3
    assert savings_line(alone | dict(prompt=apart["prompt"])).count("\n") == 1  # one new token is the prompt's work


# The true models.

PARAMETERS = {"llama-3.2-1b": 1_235_814_400, "llama-3.2-3b": 3_212_749_824, "llama-3.1-8b": 8_030_261_248,
              "gemma-2-2b": 2_614_341_888, "smollm2-135m": 134_515_008}


@pytest.mark.parametrize("name", SHAPES)
def test_true_sizes(name):
    """Table 13's sizes (24 x 1024) taken for Llama-3.2-1B's: vector gates are 134,283,264 parameters there, not 25
    million. The backbones have the published numbers of parameters, so their shapes are right."""
    with torch.device("meta"):
        model = Model(replace(SHAPES[name], gate=GateConfig()))
    gates = sum(p.numel() for key, p in model.named_parameters() if "_gate." in key)
    L, H = SHAPES[name].num_hidden_layers, SHAPES[name].hidden_size
    assert sum(p.numel() for p in model.parameters()) - gates == PARAMETERS[name] and gates == 2 * L * (H * H + H)
    assert name != "llama-3.2-1b" or gates == 134_283_264


FORMS = {"vector": GateConfig(), "rank 16": GateConfig(arch="lowrank", rank=16), "scalar": GateConfig("scalar")}


@pytest.mark.parametrize("form, kv, percent", [
    ("vector", "copy_up", 0.9), ("rank 16", "copy_up", 11.6), ("scalar", "copy_up", 11.8),
    ("vector", "dense", 0.5), ("rank 16", "dense", 11.2), ("scalar", "dense", 11.4)])
def test_net_saving_on_llama_1b(form, kv, percent):
    """A saving that forgets the gates or the head: of a nominal 15%, vector gates leave next to nothing (design, 6)."""
    config, valid = replace(SHAPES["llama-3.2-1b"], gate=FORMS[form]), everyone(100)
    policy = SkipPolicy("random", 0.85, generator=torch.Generator().manual_seed(0))
    savings = Savings(config)
    savings.add(Trace(None, [policy.keep(branch, None, valid) for branch in range(32)], None, valid, 100, 100, kv))
    report = savings.report()
    assert report["skipped"] == pytest.approx(0.15, abs=1e-9)
    assert 100 * report["macs_saved"] == pytest.approx(percent, abs=0.2)


# Memory on paper.

class Live(TorchDispatchMode):
    """Counts the bytes of tensors that are alive, new ones only."""

    def __init__(self, known):
        super().__init__()
        self.known, self.sizes, self.now = {t.untyped_storage()._cdata for t in known}, {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            storage = t.untyped_storage() if isinstance(t, torch.Tensor) else None
            if storage is not None and storage._cdata not in self.known and storage._cdata not in self.sizes:
                self.sizes[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                weakref.finalize(storage, self.freed, storage._cdata)
        return out

    def freed(self, key):
        self.now -= self.sizes.pop(key)


def activations(config, frozen=False, checkpointing=False, length=192):
    """(bytes that autograd saves, bytes alive after the forward pass, what the formula says) of one masked step."""
    model = build(config, dtype=torch.float32).train()
    for name, p in model.named_parameters():
        p.requires_grad_("_gate." in name or not frozen)
    ids, saved = tokens(1, length), {}
    model(ids)                                                   # the rope table is there once and for all
    live = Live([*model.parameters(), *model.rope])

    def pack(t):
        if t.untyped_storage()._cdata not in live.known:
            saved[t.untyped_storage()._cdata] = t.untyped_storage().nbytes()
        return t

    with live, torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        policy = SkipPolicy("batch" if config.gate else "none", 0.8)
        logits, trace = model(ids, policy=policy, places=torch.arange(4), checkpoint_blocks=checkpointing)
    paper = memory_on_paper(config, length, 4, frozen, checkpointing)["activations"]
    return sum(saved.values()), live.now, paper


@families
@pytest.mark.parametrize("gate", [GateConfig(), GateConfig(form="scalar"), None], ids=["vector", "scalar", "none"])
def test_memory_on_paper_is_what_autograd_keeps(family, gate, monkeypatch):
    """A README that promises a run which does not fit: a term forgotten or counted twice, without and with
    recomputation."""
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)           # what is kept there: K and V once for each query head
    shape = dict(hidden_size=48, intermediate_size=144, head_dim=12)
    few, many = family(gate, **shape, num_hidden_layers=2), family(gate, **shape, num_hidden_layers=6)
    for checkpointing, measured in ((False, 0), (True, 1)):
        a, b = activations(few, checkpointing=checkpointing), activations(many, checkpointing=checkpointing)
        assert b[measured] - a[measured] == pytest.approx(b[2] - a[2], rel=0.04), checkpointing      # per layer
        assert checkpointing or b[0] == pytest.approx(b[2], rel=0.04)                                # and in all
    if gate is not None:
        saved, _, paper = activations(many, frozen=True)
        assert 0.5 * paper < saved <= paper


def test_memory_of_what_is_trained():
    """Gradients and Adam's moments of a frozen backbone, float32 counted as 2 bytes, logits of the question."""
    model = Model(llama())
    everything = sum(p.numel() for p in model.parameters())
    gates = sum(p.numel() for name, p in model.named_parameters() if "_gate." in name)
    for frozen_backbone, trained in ((False, everything), (True, gates)):
        parts = memory_on_paper(model.config, 50, 7, frozen_backbone)
        assert (parts["weights"], parts["gradients"], parts["Adam"]) == (4 * everything, 4 * trained, 8 * trained)
        assert parts["logits"] == 3 * 4 * 7 * 60                 # three times (answer tokens, V)


def test_memory_of_several_sequences():
    """Eight texts of 512 tokens taken for one of 4,096, whose soft-capped scores are eight times as large; Gemma's
    tanh of the logits, which stays for the backward pass."""
    for make, kept in ((llama, 3), (gemma, 4)):
        one, eight = (memory_on_paper(make(), n * 512, 7, length=512) for n in (1, 8))
        assert eight["activations"] == 8 * one["activations"] and one["logits"] == kept * 4 * 7 * VOCAB
    assert memory_on_paper(gemma(), 4096, 7)["activations"] > eight["activations"]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_memory_in_lines(checkpointing):
    """Totals that are not the sum of what stands beside them, or the arrow at the other line."""
    head, *lines = memory_table(SHAPES["llama-3.2-1b"], 4096, False, checkpointing)
    assert "4096 tokens" in head
    assert [line.endswith("<- this run") for line in lines] == [not checkpointing, checkpointing]
    for line, way in zip(lines, (False, True), strict=True):
        parts = memory_on_paper(SHAPES["llama-3.2-1b"], 4096, 4096, False, way)
        assert all(f"{name} {size / 1e9:.1f}" in line for name, size in parts.items())
        assert f" = {sum(parts.values()) / 1e9:.1f}" in line and line.startswith("  with   " if way else "  without")


# The table of counts.

def test_counts_are_those_of_the_models():
    """A table of parameters that drifts from the code: Table 13 of the paper is of no Llama-3.2-1B."""
    lines = counts_table()[2:]
    assert len(lines) == 3 * len(SHAPES) and list(GATE_FORMS) == ["vector", "lowrank", "scalar"]
    forms = {"vector": GateConfig(), "scalar": GateConfig("scalar")}
    for line in lines:
        name, form, n_gates, share, of_block, saved = (cell.strip() for cell in line.strip("|").split("|"))
        shape = replace(SHAPES[name], gate=forms.get(form, GateConfig(arch="lowrank")))
        with torch.device("meta"):
            every, plain = (sum(p.numel() for p in Model(c).parameters()) for c in (shape, SHAPES[name]))
        assert n_gates == f"{every - plain:,}" and share == f"{(every - plain) / plain:.2%}"
        H, I, D = shape.hidden_size, shape.intermediate_size, shape.head_dim
        block = 2 * H * D * (shape.num_attention_heads + shape.num_key_value_heads) + 3 * H * I
        assert of_block == f"{2 * shape.gate.macs(H) / block:.2%}"
        if name == "llama-3.2-1b":                               # design figures, from an independent count
            assert saved == {"vector": "+0.9% / +0.5%", "scalar": "+11.8% / +11.4%"}.get(form, "+11.6% / +11.2%")


def test_the_readme_shows_the_counts():
    """Figures in the README or NOTES.md that the command beside them no longer prints."""
    table = counts_table()
    of_1b = [line for line in table if line.startswith("| llama-3.2-1b |")]
    assert "\n".join(table) in (ROOT / "NOTES.md").read_text(encoding="utf-8")
    assert "\n".join([*table[:2], *of_1b]) in (ROOT / "README.md").read_text(encoding="utf-8") and len(of_1b) == 3
