"""Write the small reference outputs ("goldens") that the tests compare our decoder with.

    pip install torch==2.13.0 transformers==5.23.0 safetensors numpy
    python tests/golden/make_golden.py

Nothing else in the project needs `transformers`: the tests read what this script wrote.
It draws three tiny random models, saves each the way Hugging Face does, and records what
transformers computes for it (eager attention, float32, one CPU thread). Running it again
with the same versions and CPU writes the same bytes (on another CPU, the last digits may
differ). README.md says what the keys are.

A golden is only as good as what it can tell apart, so the script refuses to write one where
  * float32 rounding reaches 3e-4 (the tests allow 1e-3),
  * a greedy step had a runner-up within 1e-2 (another machine might pick it), or
  * switching off a feature in BITES moves no logit by 1e-2.
"""

import json
import shutil
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig

HERE = Path(__file__).resolve().parent
NEW, PAD = 32, 0                                 # greedy tokens to record; id of left padding

LLAMA3 = dict(rope_type="llama3", rope_theta=10000.0, factor=32.0, low_freq_factor=1.0,
              high_freq_factor=4.0, original_max_position_embeddings=256)
PLAIN = dict(rope_type="default", rope_theta=10000.0)
SLIDE, FULL = "sliding_attention", "full_attention"

# Of the 6 rope frequencies of llama_rope3, wavelengths 6 and 29 (< 256/4) stay, 135 is blended,
# 628 and up (> 256/1) are stretched 32 times. Its eos is a list, as in Llama-3.x-Instruct.
CONFIGS = dict(
    llama_rope3=LlamaConfig(
        vocab_size=128, hidden_size=48, intermediate_size=64, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-5, rope_parameters=LLAMA3,
        max_position_embeddings=8192, tie_word_embeddings=True, bos_token_id=1, eos_token_id=[2, 3]),
    llama_untied=LlamaConfig(                    # 4 heads of 16 on a residual stream of 40
        vocab_size=128, hidden_size=40, intermediate_size=56, num_hidden_layers=3, head_dim=16,
        num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-2, rope_parameters=PLAIN,
        max_position_embeddings=2048, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2),
    gemma2=Gemma2Config(
        vocab_size=128, hidden_size=48, intermediate_size=64, num_hidden_layers=4, head_dim=16,
        num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-2, rope_parameters=PLAIN,
        max_position_embeddings=8192, sliding_window=16, query_pre_attn_scalar=24,
        attn_logit_softcapping=50.0, final_logit_softcapping=30.0,
        bos_token_id=2, eos_token_id=1, pad_token_id=PAD))
SEEDS = dict(llama_rope3=38, llama_untied=31, gemma2=2)    # with a clear greedy lead and varied text
SAVE = dict(llama_untied=dict(max_shard_size="90KB"))            # three shards and an index
DISK = dict(gemma2=torch.bfloat16)

# name -> {what to get wrong: config fields that do so}
SHARED = {"rope_theta 20000": dict(rope_parameters=PLAIN | {"rope_theta": 20000.0}),
          "rms_norm_eps 1e-6": dict(rms_norm_eps=1e-6)}
BITES = dict(
    llama_rope3={
        "rope_theta 20000": dict(rope_parameters=LLAMA3 | {"rope_theta": 20000.0}),
        "rope scaling off": dict(rope_parameters=PLAIN),
        "rope factor 8": dict(rope_parameters=LLAMA3 | {"factor": 8.0}),
        "rope linear": dict(rope_parameters=PLAIN | {"rope_type": "linear", "factor": 32.0}),
        "rope high_freq 1.5": dict(rope_parameters=LLAMA3 | {"high_freq_factor": 1.5}),
        "gelu": dict(hidden_act="gelu")},
    llama_untied=SHARED | {"tied head": dict(tie_word_embeddings=True), "gelu": dict(hidden_act="gelu")},
    gemma2=SHARED | {
        "attention softcap off": dict(attn_logit_softcapping=None),
        "final softcap off": dict(final_logit_softcapping=None),
        "query_pre_attn_scalar": dict(query_pre_attn_scalar=16),
        "window 15": dict(sliding_window=15), "window 17": dict(sliding_window=17),
        "window nowhere": dict(layer_types=[FULL] * 4), "window everywhere": dict(layer_types=[SLIDE] * 4),
        "window on odd layers": dict(layer_types=[FULL, SLIDE] * 2),
        "silu": dict(hidden_activation="silu"), "exact gelu": dict(hidden_activation="gelu")})


def build(config, dtype=torch.float32):
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=dtype).eval()


def load(folder, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=dtype).eval()


def randomise(model, seed):
    """Draw every weight large enough that scores, softcaps and norms are far from trivial."""
    gemma, draw = model.config.model_type == "gemma2", torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=draw)
        if p.ndim == 1:                          # a norm: w for Llama, 1 + w for Gemma
            centre = 0.0 if gemma else 1.0
            if gemma and name == "model.norm.weight":
                centre = 2.5                     # logits that the final softcap bends
            elif gemma and "post_" in name:
                centre = 1.5                     # layers that outweigh the (tied) embedding
            p.copy_(centre + 0.3 * noise)
        elif "embed" in name or "lm_head" in name:
            p.copy_((0.15 if gemma else 0.3) * noise)
        else:
            gain = 2.2 if gemma and ("q_proj" in name or "k_proj" in name) else 1.5
            p.copy_(gain * p.shape[1] ** -0.5 * noise)


def hub_config(config):
    """The dict of a config.json, said the way configs from before transformers 5 say it."""
    rope, gemma = dict(config["rope_parameters"]), config["model_type"] == "gemma2"
    drop = {"rope_parameters", "dtype", "transformers_version"}
    drop |= {"layer_types", "tie_word_embeddings", "use_bidirectional_attention"} if gemma else set()
    if config["head_dim"] * config["num_attention_heads"] == config["hidden_size"]:
        drop.add("head_dim")                     # as Llama-3.1's: hidden / heads is the default
    old = {k: v for k, v in config.items() if k not in drop}
    old |= {"rope_theta": rope.pop("rope_theta"), "torch_dtype": config["dtype"]}
    if gemma:
        old |= {"cache_implementation": "hybrid", "hidden_act": config["hidden_activation"]}
    else:
        old["rope_scaling"] = rope if rope["rope_type"] != "default" else None
    return dict(sorted(old.items()))


def logits_of(model, ids, mask=None):
    return model(input_ids=ids, attention_mask=mask, use_cache=False).logits


def hidden_of(model, ids):
    """What enters layer 0, 1, …, and what leaves the last layer (= enters the final norm)."""
    states, stack = [], model.model
    hooks = [m.register_forward_pre_hook(lambda m, args: states.append(args[0].clone()))
             for m in [*stack.layers, stack.norm]]
    logits_of(model, ids)
    for hook in hooks:
        hook.remove()
    return states


def greedy(model, ids, mask=None):
    """NEW argmax tokens, with no stop at eos, and the smallest lead of a best logit on the way."""
    mask = torch.ones_like(ids) if mask is None else mask
    start, lead = ids.shape[1], float("inf")
    model.generation_config.eos_token_id = None
    cached = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False,
                            pad_token_id=PAD)[:, start:]
    for _ in range(NEW):                         # the same without a cache, watching the runner-up
        best = logits_of(model, ids, mask)[:, -1].topk(2)
        lead = min(lead, (best.values[:, 0] - best.values[:, 1]).min().item())
        ids = torch.cat([ids, best.indices[:, :1]], 1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
    assert torch.equal(cached, ids[:, start:]), "cached and uncached greedy decoding differ"
    return cached, lead


@torch.no_grad()
def make(name, folder):
    """Write one golden folder; return its measurements."""
    shutil.rmtree(folder, ignore_errors=True)
    model = build(CONFIGS[name])
    randomise(model, SEEDS[name])
    model.to(DISK.get(name, torch.float32)).save_pretrained(folder, **SAVE.get(name, {}))
    (folder / "generation_config.json").unlink(missing_ok=True)
    model = load(folder)                         # float32, whatever is on disk

    draw = torch.Generator().manual_seed(1000 + SEEDS[name])
    ids, long_ids, batch_ids = (torch.randint(4, model.config.vocab_size, shape, generator=draw)
                                for shape in ((2, 48), (1, 300), (3, 24)))
    mask = (torch.arange(24) >= 24 - torch.tensor([[5], [24], [17]])).long()
    batch_ids = batch_ids.where(mask.bool(), PAD)
    new_ids, lead = greedy(model, ids[:, :20])
    batch_new_ids, batch_lead = greedy(model, batch_ids, mask)
    hidden, long_logits = hidden_of(model, ids), logits_of(model, long_ids)
    golden = dict(
        input_ids=ids, logits=logits_of(model, ids),
        long_input_ids=long_ids, long_logits_last16=long_logits[:, -16:],
        batch_input_ids=batch_ids, batch_attention_mask=mask, batch_logits=logits_of(model, batch_ids, mask),
        greedy_prompt_ids=ids[:, :20], greedy_new_ids=new_ids, batch_greedy_new_ids=batch_new_ids)
    golden |= {f"hidden.{i}": h for i, h in enumerate(hidden)}
    save_file({k: v.contiguous() for k, v in golden.items()}, folder / "golden.safetensors")

    # The older config must mean the same model.
    new_style = (folder / "config.json").read_text()
    hub = json.dumps(hub_config(json.loads(new_style)), indent=2) + "\n"
    (folder / "config.json").write_text(hub)
    assert torch.equal(logits_of(load(folder), ids), golden["logits"]), "config.hub.json differs"
    (folder / "config.json").write_text(new_style)
    (folder / "config.hub.json").write_text(hub)

    def change(other):                           # largest change of a logit
        return max((logits_of(other, ids) - golden["logits"]).abs().max().item(),
                   (logits_of(other, long_ids) - long_logits)[:, -16:].abs().max().item())

    alone = [logits_of(model, row[m.bool()][None])[0] for row, m in zip(batch_ids, mask)]
    rounding = max(change(load(folder, torch.float64)), *(
        (a - b[m.bool()]).abs().max().item() for a, b, m in zip(alone, golden["batch_logits"], mask)))
    bites = {}
    for what, fields in BITES[name].items():
        other = build(type(model.config)(**(model.config.to_dict() | fields)))
        other.load_state_dict(model.state_dict())
        bites[what] = change(other)
    for path in folder.iterdir():
        path.chmod(0o644)                        # safetensors writes 0600
    return dict(params=model.num_parameters(), std=golden["logits"].std().item(), rounding=rounding,
                lead=min(lead, batch_lead), bites=bites, top=golden["logits"].abs().max().item(),
                distinct=min(len(set(row)) for row in [*new_ids.tolist(), *batch_new_ids.tolist()]))


def main():
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    print(f"torch {torch.__version__}, transformers {transformers.__version__}")
    print("| model | params | logits std / max | rounding | smallest greedy lead | distinct greedy ids |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name in CONFIGS:
        m = make(name, HERE / name)
        print(f"| {name} | {m['params']:,} | {m['std']:.2f} / {m['top']:.1f} | {m['rounding']:.1e} "
              f"| {m['lead']:.1e} | {m['distinct']} of {NEW} |", flush=True)
        print("  " + ", ".join(f"{k}: {v:.2g}" for k, v in m["bites"].items()))
        assert m["rounding"] < 3e-4 and m["lead"] > 1e-2 and min(m["bites"].values()) > 1e-2, name


if __name__ == "__main__":
    main()
