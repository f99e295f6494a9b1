"""The exported folder in transformers computes what this project computes: logits, cache, tokens, and no more work."""
import json

import made

import pytest
import torch

import export
from conftest import mixed, padding, tokens
from generate import generate
from load_weights import load_model, read_json
from made import BUDGETS, END, FAMILIES, GATES, opened, pair, policy, run_folder
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, DynamicCache, StaticCache

families = pytest.mark.parametrize("family", FAMILIES)


def near(a, b):
    """Within 1e-4, the bound that the README gives."""
    worst = (a - b).abs().max().item()
    assert a.shape == b.shape and worst < 1e-4, worst


@torch.no_grad()
def same_logits(ours, theirs, ids, valid=None):
    """At every budget, and the decisions of each leave something to compare."""
    real = torch.ones_like(ids, dtype=torch.bool) if valid is None else valid
    for budget in BUDGETS:
        theirs.config.gateskip["budget"] = budget
        expected, trace = ours(ids, valid=valid, policy=policy(ours, budget), compute="compact")
        near(theirs(ids, attention_mask=None if valid is None else valid.long()).logits[real], expected[real])
        if budget == 0.6:
            share = sum((~keep & real).sum().item() for keep in trace.keep) / (len(trace.keep) * real.sum().item())
            assert share > 0.1, share


def layers_of_cache(cache):
    """[(K, V)] of transformers' cache, each (B, Hkv, C, D), whatever this version calls them."""
    if hasattr(cache, "layers"):
        return [(layer.keys, layer.values) for layer in cache.layers]
    return list(zip(cache.key_cache, cache.value_cache))


def calls_of(model, run):
    """{module name: rows of each call} while run() lasts."""
    seen, hooks = {}, []
    for name, module in model.named_modules():
        hooks.append(module.register_forward_pre_hook(
            lambda _, args, name=name: seen.setdefault(name, []).append(args[0].shape[:-1].numel()) if args else None))
    run()
    for hook in hooks:
        hook.remove()
    return seen


# The same numbers.

@families
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("threshold", ["branch", "global"])
def test_logits_of_every_gate(tmp_path, family, gate, threshold):
    """A form of gate that this file builds, reads or multiplies in another way; a threshold of another branch."""
    ours, theirs = pair(tmp_path, FAMILIES[family](GATES[gate]), threshold=threshold)
    same_logits(ours, theirs, tokens(2, 13))


@families
@pytest.mark.parametrize("kv", ["copy_up", "dense"])
@pytest.mark.parametrize("skip", ["attn", "mlp", "layer", "alternate"])
def test_logits_of_every_granularity(tmp_path, family, kv, skip):
    """An MLP that decides for itself where whole layers skip; a branch that is asked although it may not skip."""
    ours, theirs = pair(tmp_path, FAMILIES[family](GATES["scalar"]), skip=skip, kv=kv)
    same_logits(ours, theirs, tokens(2, 13))


@families
def test_padding_does_not_matter(tmp_path, family):
    """Padding that runs, shifts positions, or is looked at: on either side, whatever its tokens are."""
    ours, theirs = pair(tmp_path, FAMILIES[family](GATES["vector"]))
    for side in ("left", "right"):
        valid, ids = padding([13, 5, 9], 13, side), tokens(3, 13)
        same_logits(ours, theirs, ids, valid)
        with torch.no_grad():
            a, b = (theirs(x, attention_mask=valid.long()).logits[valid] for x in (ids, ids.where(valid, 3)))
        assert torch.equal(a, b)
        rows = calls_of(theirs, lambda: theirs(ids, attention_mask=valid.long()))
        assert rows["model.layers.0.self_attn.k_proj"] == [27]   # the real tokens


def test_rope_in_either_style(tmp_path):
    """The longer contexts of Llama 3 in the notation of transformers 5, which older ones would read as no scaling."""
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 16}
    numbers = {key: value for key, value in scaling.items() if key != "rope_type"}
    folder = run_folder(tmp_path / "run", FAMILIES["llama"](GATES["scalar"], rope_theta=500.0, rope_scaling=numbers))
    raw = read_json(folder / "config.json")
    del raw["rope_theta"], raw["rope_scaling"]
    raw["rope_parameters"] = {**scaling, "rope_theta": 500.0}
    (folder / "config.json").write_text(json.dumps(raw))
    assert export.main(["--model", str(folder), "--out", str(tmp_path / "out")]) == 0
    same_logits(load_model(folder), opened(tmp_path / "out"), tokens(2, 40))


# The same cache, and the work that is saved.

@families
def test_skipped_keys_are_copied_up_before_the_cache(tmp_path, family):
    """A cache that holds what was computed for all, or zeros: later tokens would look at that."""
    ours, theirs = pair(tmp_path, FAMILIES[family](GATES["vector"]))
    ids, cache = tokens(2, 13), DynamicCache()
    theirs.config.gateskip["budget"] = 0.6
    with torch.no_grad():
        keep = ours(ids, policy=policy(ours, 0.6))[1].keep
        theirs(ids, past_key_values=cache, use_cache=True)
    mixed(keep, torch.ones_like(ids, dtype=torch.bool))
    layers = layers_of_cache(cache)
    for number in range(1, 4):
        for here, below in zip(layers[number], layers[number - 1]):
            copied = (here == below).all(-1).all(1)              # (B, C)
            assert torch.equal(copied, ~keep[2 * number]), number


@families
def test_a_branch_that_nobody_needs_is_not_run(tmp_path, family):
    """Rows that are computed and thrown away, or a product with no rows at all."""
    taus = [0.3, 1.005, 1.005, 0.2, 1.005, 0.6, 0.55, 1.005]     # attn 0, mlp 0, ...; no score exceeds 1.005
    ours, theirs = pair(tmp_path, FAMILIES[family](GATES["vector"]),
                        thresholds={"1.0": [0.0] * 8, "0.5": taus})
    ids = tokens(2, 13)
    theirs.config.gateskip["budget"] = 0.5
    with torch.no_grad():
        kept = [int(keep.sum()) for keep in ours(ids, policy=policy(ours, 0.5))[1].keep]
        rows = calls_of(theirs, lambda: theirs(ids))
    assert kept[1] == kept[2] == kept[4] == kept[7] == 0 and 0 < min(kept[3], kept[5], kept[6]) < 26, kept
    for number in range(4):
        name = f"model.layers.{number}"
        attention, mlp = ([n] if n else None for n in kept[2 * number:2 * number + 2])
        # of attention a product gets the gathered rows of all sequences
        for part in ("self_attn.q_proj", "self_attn.o_proj"):
            assert rows.get(f"{name}.{part}") == attention, (number, part)
        assert rows.get(f"{name}.self_attn.k_proj") == (attention if number else [26])
        assert rows.get(f"{name}.mlp") == mlp


# The same tokens.

@families
@pytest.mark.parametrize("threshold", ["branch", "global"])
def test_generate_gives_our_tokens(tmp_path, family, threshold):
    """A decoding step that sees other keys or positions than ours; a batch that changes what its members say."""
    untied = FAMILIES[family](GATES["vector"], tie_word_embeddings=False)        # tied: random models repeat themselves
    ours, theirs = pair(tmp_path, untied, threshold=threshold)
    prompts = [tokens(1, n, seed=n)[0].tolist() for n in (3, 11, 6)]
    ids = torch.tensor([[0] * (11 - len(p)) + p for p in prompts])
    said = set()
    for budget in (1.0, 0.8, 0.6):
        theirs.config.gateskip["budget"] = budget
        expected = generate(ours, prompts, 12, policy(ours, budget), eos_ids={END}).tokens
        ask = dict(max_new_tokens=12, do_sample=False, pad_token_id=0)
        batch = theirs.generate(ids, attention_mask=padding([3, 11, 6], 11).long(), **ask)[:, 11:].tolist()
        for prompt, together, wanted in zip(prompts, batch, expected):
            alone = theirs.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)).long(), **ask)
            assert alone[0, len(prompt):].tolist() == wanted
            assert together[:len(wanted)] == wanted and set(together[len(wanted):]) <= {0}
        said.add(str(expected))
    assert len(said) > 1                                         # the budget changes what is said


@families
def test_cached_steps_are_the_whole(tmp_path, family):
    """Pieces of several tokens after the first: columns, windows and positions that hold for one token only."""
    ours, theirs = pair(tmp_path, FAMILIES[family](GATES["vector"]))
    ids, valid = tokens(3, 13), padding([13, 5, 9], 13)
    theirs.config.gateskip["budget"] = 0.6
    with torch.no_grad():
        whole, _ = ours(ids, valid=valid, policy=policy(ours, 0.6))
        cache, parts = DynamicCache(), []
        for start, end in ((0, 6), (6, 7), (7, 11), (11, 13)):
            parts.append(theirs(ids[:, start:end], attention_mask=valid[:, :end].long(), past_key_values=cache).logits)
    near(torch.cat(parts, dim=1)[valid], whole[valid])


# What else transformers' users do.

@families
def test_save_and_load_again(tmp_path, family):
    """Weights, gates, code or budget that save_pretrained leaves behind; a folder that only transformers can read."""
    ours, theirs = pair(tmp_path, FAMILIES[family](GATES["all of it"]), threshold="global")
    theirs.config.gateskip["budget"] = 0.7
    theirs.save_pretrained(tmp_path / "again")
    again = opened(tmp_path / "again")
    assert again.config.gateskip == theirs.config.gateskip
    assert again.state_dict().keys() == theirs.state_dict().keys()
    with torch.no_grad():
        assert torch.equal(again(tokens(2, 13)).logits, theirs(tokens(2, 13)).logits)
    same_logits(ours, again, tokens(2, 13))


@families
def test_auto_classes(tmp_path, family):
    """An auto_map that names what is not there; a base model without the gates."""
    _, theirs = pair(tmp_path, FAMILIES[family](GATES["scalar"]))
    config = AutoConfig.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert config.model_type.startswith("gateskip_") and config.gateskip["budget"] == 0.8
    base = AutoModel.from_pretrained(tmp_path / "out", trust_remote_code=True).eval()
    with torch.no_grad():
        h = base(tokens(2, 13), output_hidden_states=True)
        assert torch.equal(h.last_hidden_state, theirs.model(tokens(2, 13)).last_hidden_state)
    assert len(h.hidden_states) == 5 and torch.equal(h.hidden_states[-1], h.last_hidden_state)
    assert AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True)("w5 w9 w5")["input_ids"] == [5, 9, 5]
    fresh = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    assert fresh(tokens(1, 3)).logits.isfinite().all()


@families
def test_gradients(tmp_path, family):
    """A row that sees nothing becomes NaN in the backward pass; a gate that learns nothing."""
    _, theirs = pair(tmp_path, FAMILIES[family](GATES["vector"]))
    theirs.config.gateskip["budget"] = 0.6
    ids, valid = tokens(3, 13), padding([13, 5, 9], 13)
    theirs(ids, attention_mask=valid.long(), labels=ids.where(valid, -100)).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in theirs.parameters())
    assert theirs.model.layers[2].mlp_gate.out.weight.grad.abs().max() > 0


def test_gates_stay_in_float32(tmp_path):
    """Gates in bfloat16, which cannot rank scores. (Older transformers cast them: the README says since when not.)"""
    pair(tmp_path, FAMILIES["llama"](GATES["vector"]))
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True,
                                                     torch_dtype=torch.bfloat16).eval()
    assert half.lm_head.weight.dtype == torch.bfloat16
    if made.NEW:
        assert half.model.layers[1].mlp_gate.out.weight.dtype == torch.float32
    assert half(tokens(1, 5)).logits.isfinite().all()


def test_wrong_use_is_told(tmp_path):
    """A budget that nobody calibrated, or a cache whose columns are others, answered with numbers."""
    _, theirs = pair(tmp_path, FAMILIES["llama"](GATES["scalar"]))
    ids = tokens(1, 5)
    for budget in (0.5, 1.1, float("nan")):
        theirs.config.gateskip["budget"] = budget
        with pytest.raises(ValueError, match="is not between 0.6, the smallest calibrated one, and 1.0"):
            theirs(ids)
    theirs.config.gateskip["budget"] = 0.8
    with pytest.raises(ValueError, match="one column per token so far"):
        theirs(ids, attention_mask=torch.ones(1, 4))
    static = StaticCache(config=theirs.config, max_cache_len=32, **({} if made.NEW else {"batch_size": 1}))
    with pytest.raises(ValueError, match="leave cache_implementation out"):
        theirs(ids, past_key_values=static)
