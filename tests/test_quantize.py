"""Tests of paper/quantize.py and paper/recalibrate.py: a model of 4-bit matrices, its folder, the command."""
import copy
import json
import sys

import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file

import budgets
from conftest import build, complaint, families, frozen, llama, mixed, new_cache, on_devices, same, tokens
from gates import GateConfig, SkipPolicy
from linear import Linear
from load_weights import load_model, load_tokenizer, read_json, save_model
from price import RunningQuantile
from savings import branch_costs
from test_paper import items_of, models, saved
from thresholds import calibrate, make_policy
from toy_runs import ROOT, words

sys.path.insert(0, str(ROOT / "paper"))
import answer_loss
import opened
import quantize
import quantized
import shortgpt
from four_bits import nf4_levels
from quantized import QuantLinear, matrices, memory_of, open_quantized, save_quantized, tensors_of
from recalibrate import all_scores, recalibrate

KINDS = {"nf4": ("nf4", False), "double": ("nf4", True), "int4": ("int4", False)}
all_kinds = pytest.mark.parametrize("kind", KINDS)


def linear(out, width, bias=True, seed=0, dtype=torch.float32):
    made = Linear(width, out, bias=bias).to(dtype)
    for p in made.parameters():
        p.data.normal_(generator=torch.Generator().manual_seed(seed))
    return made


def read_by_hand(matrix):
    """The weight (O, I) in numpy, from what a file would hold."""
    kept = {name: buffer.cpu().numpy() for name, buffer in matrix.named_buffers()}
    codes = numpy.array([half for byte in kept["codes"].tolist() for half in (byte // 16, byte % 16)])
    scale, n = kept["scale"].astype(float), matrix.out_features * matrix.in_features
    if matrix.kind == "int4":
        size = n // len(scale)
        w = [(code - kept["zero"][i // size]) * scale[i // size] for i, code in enumerate(codes[:n].astype(float))]
    else:
        if matrix.double:
            scale = numpy.array([max(0, x * kept["scale_of_scale"][i // 256] + kept["mean_of_scale"])
                                 for i, x in enumerate(scale)])
        w = [nf4_levels()[code] * scale[i // 64] for i, code in enumerate(codes)]
    return numpy.array(w)[:n].reshape(matrix.out_features, matrix.in_features)


def command(*switches, **flags):
    return quantize.main(words(*switches, **dict(kind="nf4", limit=6, seq_len=160, device="cpu") | flags))


# a matrix

@on_devices
@all_kinds
@pytest.mark.parametrize("out, width", [(5, 13), (16, 64), (8, 576), (40, 640)])
def test_product_with_the_weight_read_by_hand(kind, out, width, device):
    """Rows and columns, halves of a byte or scales that change places, a last block that is not full, a lost bias."""
    dense = linear(out, width)
    matrix, x = QuantLinear(dense.to(device), *KINDS[kind]), torch.randn(2, 3, width)
    w = read_by_hand(matrix)
    assert matrix.dequantised().double().cpu().numpy() == pytest.approx(w, abs=1e-6)
    expected = x.double() @ torch.tensor(w).T + dense.bias.double().cpu()
    torch.testing.assert_close(matrix(x.to(device)).double().cpu(), expected, rtol=1e-5, atol=1e-4)
    assert numpy.abs(w - dense.weight.detach().cpu().double().numpy()).mean() < 0.1
    dense.weight.data = matrix.dequantised()
    if kind != "double":                                         # whose scales are rounded anew
        assert torch.equal(QuantLinear(dense, *KINDS[kind]).codes, matrix.codes)


@all_kinds
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_scales_do_not_overflow(kind, dtype):
    """Scales in the dtype of the weights, or of what is multiplied."""
    matrix = QuantLinear(linear(4, 64, dtype=dtype), *KINDS[kind])
    assert {buffer.dtype for buffer in matrix.buffers()} <= {torch.uint8, torch.int8, torch.float32}
    big = Linear(64, 4, bias=False)
    big.weight.data = torch.full((4, 64), 6e4) * torch.tensor([1.0, -1.0]).repeat(4, 32)
    out = QuantLinear(big, *KINDS[kind])(torch.eye(64, dtype=dtype))
    assert out.dtype == dtype and (out.double() / big.weight.T.double() - 1).abs().max() < 0.08


@pytest.mark.parametrize("kind, bits", [("nf4", 4.5), ("double", 4 + 8 / 64 + 32 / (64 * 256)), ("int4", 4.3125)])
def test_memory_is_what_the_paper_says(kind, bits):
    """Codes of a byte each, views that keep the dense weight in memory, a mean for each block."""
    matrix = QuantLinear(linear(256, 512, bias=False), *KINDS[kind])
    assert 8 * memory_of(matrix) == bits * 256 * 512 + 32 * (kind == "double")       # its one mean
    assert sum(t.numel() * t.element_size() for t in tensors_of(matrix).values()) == memory_of(matrix)


# a model

@families
@pytest.mark.parametrize("kind", ["double", "int4"])
@pytest.mark.parametrize("gate", [None, GateConfig("scalar", shared=True), GateConfig(arch="mlp")])
def test_gates_head_embeddings_and_norms_are_untouched(family, kind, gate):
    """A gate or a tied head that is quantised as well, a matrix that is not, a copy of the head."""
    model = build(family(gate))
    before, whole = {name: p.clone() for name, p in model.named_parameters()}, memory_of(model)
    quantized.quantize(model, *KINDS[kind])
    left, names = dict(model.named_parameters()), ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj",
                                                   "down_proj")
    assert set(before) - set(left) == {name for name in before if name.endswith(tuple(f"{n}.weight" for n in names))}
    assert all(torch.equal(p, before[name]) for name, p in left.items())
    assert model.lm_head.weight is model.model["embed_tokens"].weight and isinstance(model.lm_head, Linear)
    assert not matrices(model, Linear) and len(matrices(model, QuantLinear)) == 7 * 4
    dense = sum(p.numel() for name, p in before.items() if name not in left)
    assert memory_of(model) < whole - 7 * dense                  # of 8 bytes a weight less than one is left


@torch.no_grad()
@families
@all_kinds
@pytest.mark.parametrize("gate", [None, GateConfig()])
def test_it_computes_what_a_dense_model_of_its_weights_does(family, kind, gate):
    """A matrix in another's place; skipping, a cache, or gates that work with dense matrices only."""
    model, ids = build(family(gate)), tokens(2, 12)
    dense = copy.deepcopy(model)
    quantized.quantize(model, *KINDS[kind])
    for (_, _, matrix), (_, _, like) in zip(matrices(model, QuantLinear), matrices(dense, Linear), strict=True):
        assert not torch.equal(like.weight, matrix.dequantised().double())
        like.weight.data = matrix.dequantised().double()
    policy = SkipPolicy() if gate is None else frozen(dense, ids)
    expected, trace = dense(ids, policy=policy)
    if gate is not None:
        mixed(trace.keep, trace.valid)
    same(model(ids, policy=policy)[0], expected)
    cache = new_cache(model, 2, 12)
    parts = [model(part, cache=cache, policy=policy, compute="compact")[0] for part in ids.split([7, 1, 4], 1)]
    same(torch.cat(parts, 1), expected)


def test_what_is_no_kind_is_refused():
    """A model quantised twice, or half way; scales of scales that int4 does not have."""
    model = build(llama())
    assert "there are nf4, nf4 double, and int4" in complaint(quantized.quantize, model, "fp4")
    assert "there are nf4, nf4 double, and int4" in complaint(quantized.quantize, model, "int4", True)
    assert len(matrices(model, Linear)) == 28
    quantized.quantize(model, "nf4")
    assert "this model is quantised" in complaint(quantized.quantize, model, "int4")


# its folder

@torch.no_grad()
@pytest.mark.parametrize("kind, gate", [("nf4", None), ("double", GateConfig("scalar")),
                                        ("int4", GateConfig(shared=True))])
def test_a_folder_opens_as_it_was_saved(tmp_path, kind, gate):
    """A tensor that is lost or cast, gates in bfloat16, a folder that opens as something else."""
    path, ids = saved(tmp_path / "all", gate), tokens(1, 20)
    model, tokenizer = load_model(path), load_tokenizer(path)
    quantized.quantize(model, *KINDS[kind])
    save_quantized(model, tmp_path / "less", tokenizer)
    less = open_quantized(tmp_path / "less")
    assert not less.training and less.config == model.config
    assert all(torch.equal(t, less_t) and t.dtype == less_t.dtype
               for t, less_t in zip(tensors_of(model).values(), tensors_of(less).values(), strict=True))
    assert torch.equal(less(ids)[0], model(ids)[0])
    assert less.lm_head.weight is less.model["embed_tokens"].weight
    assert memory_of(less) == memory_of(model)
    half = open_quantized(tmp_path / "less", dtype=torch.bfloat16)
    assert half.model["norm"].weight.dtype == torch.bfloat16 and half(ids)[0].dtype == torch.bfloat16
    for name, t in tensors_of(half).items():
        was = tensors_of(less)[name].dtype
        assert t.dtype == (torch.bfloat16 if "embed" in name or "norm" in name else was)
    save_quantized(less, tmp_path / "again", tokenizer)
    assert read_json(tmp_path / "again" / "config.json") == read_json(tmp_path / "less" / "config.json")
    assert "a quantized checkpoint (take the original one)" in complaint(load_model, tmp_path / "less")
    assert "was not written by paper/quantize.py" in complaint(open_quantized, path)
    save_model(model, tmp_path / "wrong")                        # with save_model: without its matrices
    assert "quantized checkpoint" in complaint(load_model, tmp_path / "wrong")


@pytest.mark.parametrize("damage, why", [
    (lambda t: t.pop("model.layers.1.mlp.up_proj.codes"), "such as model.layers.1.mlp.up_proj.codes"),
    (lambda t: t.update(more=torch.zeros(1)), "such as more"),
    (lambda t: t.update({"model.norm.weight": torch.zeros(31)}), "model.norm.weight is torch.float32 (31,)"),
    (lambda t: t.update({"model.norm.weight": torch.zeros(32, dtype=torch.int8)}), "model.norm.weight is torch.int8"),
    (lambda t: t["model.layers.0.mlp.up_proj.scale"].fill_(torch.nan), "are not finite"),
    (lambda t: t.update({"model.layers.0.mlp.up_proj.scale": t["model.layers.0.mlp.up_proj.scale"].half()}),
     "up_proj.scale is torch.float16 (24,), config.json implies torch.float32 (24,)")])
def test_a_damaged_folder_is_refused(models, tmp_path, damage, why):
    """A traceback, or an answer of noise."""
    model = load_model(models["gated"])
    quantized.quantize(model, "nf4")
    save_quantized(model, tmp_path / "less")
    tensors = load_file(tmp_path / "less" / "model.safetensors")
    damage(tensors)
    save_file(tensors, tmp_path / "less" / "model.safetensors")
    assert why in complaint(open_quantized, tmp_path / "less")


@pytest.mark.parametrize("how", [None, {}, "nf4", {"quant_method": "bitsandbytes"}, {"quant_method": "gateskip"},
                                 {"quant_method": "gateskip", "kind": "int4", "double": "no"},
                                 {"quant_method": "gateskip", "kind": "nf4", "double": True}])
def test_another_programs_folder_is_refused(models, tmp_path, how):
    """Codes of one kind read as another's, a KeyError."""
    model = load_model(models["gated"])
    quantized.quantize(model, "nf4")
    save_quantized(model, tmp_path / "less")
    config = read_json(tmp_path / "less" / "config.json") | {"quantization_config": how}
    (tmp_path / "less" / "config.json").write_text(json.dumps(config))
    complaint(open_quantized, tmp_path / "less")


# thresholds

@torch.no_grad()
def test_scores_of_all_items_at_full_budget(models):
    """A chunk that is left out, scores of padding, tokens or branches in another order."""
    model, items = load_model(models["gated"], dtype=torch.float64), items_of(models["gated"], 60)
    scores, valid = all_scores(model, items)                     # more than one chunk
    expected = [torch.stack(model(torch.tensor([ids]))[1].scores)[:, 0] for ids, _ in items]
    same(scores[:, valid], torch.cat(expected, 1))
    assert sum(len(ids) for ids, _ in items) == valid.sum() < len(valid) > 4096


@pytest.mark.parametrize("threshold", ["branch", "global"])
def test_thresholds_are_those_of_the_new_weights(models, monkeypatch, threshold):
    """The quantile of training asked about weights that it has not seen, another budget, pairs taken for work."""
    monkeypatch.setattr(budgets, "CONTINUE", 4)
    model, items = load_model(models["gated"]), items_of(models["gated"], 8, "calibration")
    stored = model.config.gateskip = dict(model.config.gateskip, threshold=threshold, sparsity_weight=1.0)
    quantized.quantize(model, "nf4")
    quantile, share = None, "skipped" if threshold == "branch" else "work_skipped"
    if threshold == "global":
        quantile = RunningQuantile(branch_costs(model.config))
        quantile.update(*all_scores(model, items))
    got = lambda policy: budgets.realised(model, items, policy)
    expected = calibrate(model, [ids for ids, _ in items], [0.8], realised=got, quantile=quantile)
    recalibrate(model, items)
    assert stored == expected | {"gate": stored["gate"], "sparsity_weight": 1.0}
    assert stored["realised"]["0.8"] == got(make_policy(model.config, "frozen", 0.8))
    assert budgets.measured_in(model.config)[0] == share


# the command

@pytest.mark.parametrize("kind", KINDS)
def test_the_command_measures_thresholds_anew(models, tmp_path, monkeypatch, capsys, kind):
    """Old thresholds that are saved with new weights, bits that are said and not there, a folder in another dtype."""
    monkeypatch.setattr(budgets, "CONTINUE", 4)
    name, double = KINDS[kind]
    assert command(*["--double"] * double, model=models["gated"], kind=name, data="arithmetic",
                   out=tmp_path / "less") == 0
    printed, model = capsys.readouterr().out, open_quantized(tmp_path / "less")
    weights = 4 * (32 * (2 * 32 + 2 * 16) + 3 * 32 * 48)
    found = [matrix for *_, matrix in matrices(model, QuantLinear)]
    assert {(m.kind, m.double) for m in found} == {KINDS[kind]}
    assert f"{weights:,} weights of attention and MLP" in printed
    assert f", {8 * memory_of(*found) / weights:.3f} measured" in printed
    assert f"{memory_of(load_model(models['gated'])) / 1e6:.1f} MB -> {memory_of(model) / 1e6:.1f} MB" in printed
    old, new = load_model(models["gated"]).config.gateskip, model.config.gateskip
    assert new["thresholds"].keys() == old["thresholds"].keys() and new["thresholds"] != old["thresholds"]
    items = items_of(models["gated"], 6, "calibration")
    assert new["realised"]["0.8"] == budgets.realised(model, items, make_policy(model.config, "frozen", 0.8))


def test_without_data_old_thresholds_are_dropped(models, tmp_path, capsys):
    """Frozen thresholds of weights that are no longer there; a dense model that is told of thresholds."""
    assert command(model=models["gated"], out=tmp_path / "less") == 0
    assert "thresholds dropped" in capsys.readouterr().out
    assert not {"thresholds", "realised"} & set(open_quantized(tmp_path / "less").config.gateskip)
    assert command(model=models["dense"], out=tmp_path / "dense") == 0
    assert "thresholds" not in capsys.readouterr().out


def test_the_scripts_open_it(models, tmp_path):
    """A folder that nothing but a function opens; blocks that are taken from packed matrices; a plain one, refused."""
    assert command(model=models["gated"], data="arithmetic", out=tmp_path / "small") == 0
    flags = words(model=tmp_path / "small", reference=models["gated"], data="arithmetic", limit=4, device="cpu")
    assert answer_loss.main([*flags, "--out", str(tmp_path / "loss.json")]) == 0
    assert len(read_json(tmp_path / "loss.json")["rows"]) > 1
    assert isinstance(opened.open_model(models["gated"]).model["layers"][0].mlp.up_proj, Linear)
    assert "is quantised: remove blocks of the one" in complaint(shortgpt.main, words(
        model=tmp_path / "small", data="arithmetic", limit=4, blocks=1, out=tmp_path / "less"))
    assert not (tmp_path / "less").exists()


def test_what_cannot_be_quantised_is_refused(models, tmp_path, monkeypatch):
    """A traceback, a folder that is written over, work before a mistake is told."""
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    monkeypatch.setattr(quantize, "load_model", None)
    for why, switches, flags in [("--double is for --kind nf4", ["--double"], dict(kind="int4")),
                                 ("--kind: invalid choice: 'fp4'", [], dict(kind="fp4")),
                                 ("exists: give the name of a new folder", [], dict(out=tmp_path)),
                                 ("link exists: give", [], dict(out=tmp_path / "link"))]:
        assert why in complaint(command, *switches, **dict(model=models["dense"], out=tmp_path / "new") | flags)
    assert [path.name for path in tmp_path.iterdir()] == ["link"]
