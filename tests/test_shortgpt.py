"""Tests of paper/shortgpt.py: influence, what removal leaves, gates, thresholds, the command."""
import copy
import re
import sys
from pathlib import Path

import numpy
import pytest
import torch

import budgets
from conftest import build, complaint, families, frozen, gemma, llama, mixed, new_cache, on_devices, same, tokens
from gates import GateConfig, SkipPolicy
from load_weights import load_model, load_tokenizer, read_json, save_model
from test_paper import BLOCK, items_of, models, saved
from thresholds import make_policy
from toy_runs import ROOT, words

sys.path.insert(0, str(ROOT / "paper"))
import quantize
import shortgpt

GEMMA = dict(architectures=["Gemma2ForCausalLM"], model_type="gemma2", hidden_act=None, query_pre_attn_scalar=8,
             sliding_window=4)
GATES = {"none": None, "vector": GateConfig(), "scalar": GateConfig("scalar"), "shared": GateConfig(shared=True)}
gated_or_not = pytest.mark.parametrize("gate", GATES)


def command(**flags):
    return shortgpt.main(words(**dict(data="arithmetic", limit=6, blocks=1, seq_len=160, device="cpu") | flags))


def made(family, gate, device="cpu"):
    """A model of four blocks with what loading puts beside it."""
    model = build(family(GATES[gate]), device=device)
    model.raw_config = {"num_hidden_layers": 4}
    return model


def by_hand(model, ids, kept):
    """Logits (1, S, V) of a whole model of which only these blocks run."""
    h, call = model.begin(torch.tensor([ids]))
    below, cap = None, model.config.final_softcap
    for layer in kept:
        block = model.model["layers"][layer]
        h, below, _, _ = block(h, below, model.gates_of(block), call)
    logits = model.lm_head(model.model["norm"](h))
    return logits if cap is None else cap * torch.tanh(logits / cap)


# influence

@torch.no_grad()
@pytest.mark.parametrize("which", ["dense", "gated"])
def test_influence_by_a_plain_loop(models, which):
    """Padding that counts, a mean of sequences in place of tokens, states of the wrong side of a block, the last
    block's after the final norm, gates that do not multiply."""
    model, items = load_model(models[which], dtype=torch.float64), items_of(models[which], 5)
    found, cosines = shortgpt.block_influence(model, items), [[] for _ in range(4)]

    def record(block, args, out):
        for x, y in zip(args[0][0].numpy(), out[0][0].numpy(), strict=True):
            cosines[block.layer].append((x @ y) / (numpy.linalg.norm(x) * numpy.linalg.norm(y)))
    for block in model.model["layers"]:
        block.register_forward_hook(record)
    for ids, _ in items:                                         # each alone, and not padded
        model(torch.tensor([ids]))
    assert found == pytest.approx([1 - sum(c) / len(c) for c in cosines], abs=1e-10)


class Turned(torch.nn.Module):
    """A block that scales all states, and turns those of even places round."""

    def __init__(self, scale, turn):
        super().__init__()
        self.scale, self.turn = scale, turn

    def forward(self, h, below, gates, call):
        sign = torch.where(call.positions % 2 == 0, -1.0 if self.turn else 1.0, 1.0)             # (B or 1, S)
        return self.scale * sign[..., None] * h, below, [], []


@on_devices
def test_influence_lies_between_0_and_2_whatever_the_scale(device):
    """A distance in place of an angle, an absolute cosine: opposite states have influence 2, scaled ones 0."""
    model = made(llama, "none", device)
    model.model["layers"] = torch.nn.ModuleList([Turned(1.0, False), Turned(7.0, False), Turned(-3.0, False),
                                                 Turned(1e-3, True)])
    items = [(list(range(n)), [True] * n) for n in (4, 6, 10)]   # half of the places are even
    assert shortgpt.block_influence(model, items) == pytest.approx([0.0, 0.0, 2.0, 1.0], abs=1e-12)
    real = made(llama, "vector", device)
    found = shortgpt.block_influence(real, items)
    assert all(0 <= x <= 2 for x in found) and len(set(found)) == 4


# removal

@families
@gated_or_not
def test_nothing_removed_changes_nothing(family, gate):
    """A copy with other numbers, a config that says something else."""
    model = made(family, gate)
    before, config = copy.deepcopy(model.state_dict()), copy.deepcopy(model.config)
    shortgpt.remove(model, [])
    assert model.config == config and model.raw_config["num_hidden_layers"] == 4
    assert all(torch.equal(x, y) for x, y in zip(before.values(), model.state_dict().values(), strict=True))


@families
@gated_or_not
def test_what_is_left_is_the_same_in_order(family, gate):
    """Blocks in another order, copies, gates of a removed block that stay or of a kept one that go, a shared gate that
    goes with the first block."""
    model = made(family, gate)
    blocks, n = list(model.model["layers"]), sum(p.numel() for p in model.parameters())
    own, shared = [dict(block.named_parameters()) for block in blocks], model.gates_of(blocks[0])
    assert any("_gate." in key for key in own[0]) == (gate in ("vector", "scalar"))
    shortgpt.remove(model, {2, 0})
    left = list(model.model["layers"])
    assert left == [blocks[1], blocks[3]] and [block.layer for block in left] == [0, 1]
    for was, block in zip((own[1], own[3]), left):
        assert all(was[key] is p for key, p in block.named_parameters()) and len(was) == len(list(block.parameters()))
    gone = sum(p.numel() for layer in (0, 2) for p in own[layer].values())
    assert sum(p.numel() for p in model.parameters()) == n - gone
    if gate == "shared":
        assert model.gates_of(left[0]) == shared == model.gates_of(left[1])
    config = model.config
    assert config.num_hidden_layers == model.raw_config["num_hidden_layers"] == 2
    if family is gemma:
        assert config.windows == [block.self_attn.window for block in left] == [None, None]
        assert model.raw_config["layer_types"] == ["full_attention"] * 2


@torch.no_grad()
@gated_or_not
@pytest.mark.parametrize("changes, kept", [({}, [0, 3]), (GEMMA, [0, 2, 3]), (GEMMA, [1, 2])])
def test_what_is_left_runs_the_kept_blocks(tmp_path, changes, kept, gate):
    """Weights of a removed block, a window that moves to the block below, a gate of another block; in memory and from
    the folder. At full budget it is the gated model with those blocks left out."""
    path = saved(tmp_path / "all", GATES[gate], **changes)
    model, ids = load_model(path, dtype=torch.float64), items_of(path, 1)[0][0]
    expected = by_hand(model, ids, kept)
    shortgpt.remove(model, set(range(4)) - set(kept))
    same(model(torch.tensor([ids]))[0], expected, 1e-10)
    model.config.gateskip.pop("thresholds", None)
    save_model(model, tmp_path / "less", load_tokenizer(path))
    same(load_model(tmp_path / "less", dtype=torch.float64)(torch.tensor([ids]))[0], expected, 1e-10)


@torch.no_grad()
@on_devices
@families
@pytest.mark.parametrize("gate", ["none", "scalar"])
def test_decoding_with_a_cache_is_the_full_forward(family, gate, device):
    """Cache slots of the old layers, a decoder that counts them, masks of branches that are no longer there."""
    model, ids = made(family, gate, device), tokens(2, 12, device=device)
    shortgpt.remove(model, {1})
    policy = SkipPolicy() if gate == "none" else frozen(model, ids)
    expected, trace = model(ids, policy=policy)
    assert len(trace.keep) == 6
    if gate != "none":
        mixed(trace.keep, trace.valid)
    cache = new_cache(model, 2, 12)
    assert len(cache.k) == 3
    parts = [model(part, cache=cache, policy=policy, compute="compact")[0] for part in ids.split([7, 1, 1, 3], 1)]
    same(torch.cat(parts, 1), expected, 1e-10)


def test_what_is_skipped_is_said_of_both_depths():
    """A share of the pruned depth taken for one of the original: 1 - (1 - s)(1 - k / L)."""
    model, ids = made(llama, "scalar"), tokens(2, 12)
    shortgpt.remove(model, {1})
    trace = model(ids, policy=frozen(model, ids))[1]
    ran = sum(keep.sum().item() for keep in trace.keep)
    skipped = 1 - ran / (6 * ids.numel())                        # of what is left
    assert shortgpt.of_original(skipped, 1, 4) == pytest.approx(1 - ran / (8 * ids.numel()), abs=1e-12)
    assert shortgpt.of_original(0.2, 0, 4) == pytest.approx(0.2)


# the command

@torch.no_grad()
@pytest.mark.parametrize("gate", ["none", "scalar"])
def test_an_identity_goes_first_and_nothing_changes(tmp_path, capsys, monkeypatch, gate):
    """The most influential block removed, a table that marks another than the one that went, a share without the head
    or gates, other entries of config.json that change."""
    monkeypatch.setattr(budgets, "CONTINUE", 4)
    model, ids = load_model(saved(tmp_path / "all", GATES[gate])), torch.arange(50)[None]
    for branch in (model.model["layers"][2].self_attn.o_proj, model.model["layers"][2].mlp.down_proj):
        branch.weight.zero_()
    save_model(model, tmp_path / "all", load_tokenizer(tmp_path / "all"))
    assert command(model=tmp_path / "all", out=tmp_path / "new") == 0
    rows = re.findall(r"^ *(\d) +-?(\d\.\d{4})(.*)$", printed := capsys.readouterr().out, re.M)
    assert len(rows) == 4 and [row for row in rows if row[2]] == [("2", "0.0000", "   removed")]
    block = BLOCK + 2 * 32 * (gate == "scalar")
    assert f"1 of 4 blocks removed: {block / (4 * block + 32 * model.config.vocab_size):.1%} of a token's" in printed
    torch.testing.assert_close(load_model(tmp_path / "new")(ids)[0], model(ids)[0], atol=1e-5, rtol=1e-5)
    old, new = read_json(tmp_path / "all/config.json"), read_json(tmp_path / "new/config.json")
    if gate == "scalar":
        old["gateskip"] |= {key: new["gateskip"][key] for key in ("thresholds", "realised")}
    assert new == old | {"num_hidden_layers": 3}


def test_thresholds_are_those_of_what_is_left(models, tmp_path, monkeypatch, capsys):
    """Thresholds of the old depth, which no longer fit the branches, or of examples that influence was ranked on."""
    monkeypatch.setattr(budgets, "CONTINUE", 4)
    assert command(model=models["gated"], out=tmp_path / "new", blocks=2) == 0
    less, old = load_model(tmp_path / "new"), load_model(models["gated"]).config.gateskip
    assert {key: len(values) for key, values in less.config.gateskip["thresholds"].items()} == {"1.0": 4, "0.8": 4}
    assert less.config.gateskip["thresholds"]["0.8"] != old["thresholds"]["0.8"][:4]
    got = budgets.realised(less, items_of(models["gated"], 6, "calibration"), make_policy(less.config, "frozen", 0.8))
    assert less.config.gateskip["realised"]["0.8"] == pytest.approx(got, abs=1e-6)
    assert f"budget 0.8: skips {got:.1%} of what is left, and so {0.5 + got / 2:.1%} of" in capsys.readouterr().out


def test_what_cannot_be_removed_is_refused(models, tmp_path, monkeypatch):
    """A traceback, a model without blocks, a folder that is written over, a link that leads nowhere found after the
    work."""
    for why, flags in {"--blocks 4 of 4 leaves none: remove at most 3": dict(blocks=4),
                       "--blocks: '0' must be a whole number of at least 1": dict(blocks=0),
                       f"--out {tmp_path} exists: give the name of a new folder": dict(out=tmp_path)}.items():
        assert complaint(command, **dict(model=models["dense"], out=tmp_path / "new") | flags).startswith(why)
        assert not list(tmp_path.iterdir())
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    monkeypatch.setattr(shortgpt, "load_examples", None)
    assert "link exists: give" in complaint(command, model=models["dense"], out=tmp_path / "link")


def test_a_full_disk_leaves_nothing_in_the_way(models, tmp_path, monkeypatch):
    """Half a folder, because of which the same command is then refused."""
    def full(model, folder, *rest):
        Path(folder).mkdir()
        raise OSError(28, "No space left on device", str(folder))
    for module, name in ((shortgpt, "save_model"), (quantize, "save_quantized")):
        with monkeypatch.context() as m:
            m.setattr(module, name, full)
            flags = "--kind nf4" if module is quantize else "--data arithmetic --limit 2 --blocks 1"
            with pytest.raises(OSError):
                module.main([*flags.split(), "--model", str(models["dense"]), "--out", str(tmp_path / "new")])
        assert not list(tmp_path.iterdir())
