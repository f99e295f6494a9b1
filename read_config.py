"""A model's config.json -> ModelConfig. What this decoder cannot compute is refused, never ignored."""
import json
from dataclasses import fields
from pathlib import Path

from console import InputError

from gates import GRANULARITIES, KV_OF_SKIPPED, GateConfig, check_budget
from model import ModelConfig

SUPPORTED = ("LlamaForCausalLM", "Gemma2ForCausalLM")            # with gates "GateSkip" stands in front: named()
# keys of config.json: read here, of Gemma 2 only, and those that change nothing of what a model computes
READ = """architectures model_type vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads
    num_key_value_heads head_dim hidden_act hidden_activation rms_norm_eps rope_theta rope_scaling rope_parameters
    max_position_embeddings tie_word_embeddings initializer_range eos_token_id quantization_config gateskip""".split()
GEMMA = ["layer_types", "sliding_window", "query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping"]
HARMLESS = """bos_token_id pad_token_id dtype torch_dtype transformers_version use_cache pretraining_tp auto_map
    return_dict cache_implementation sliding_window_size max_sequence_length model_max_length tokenizer_class id2label
    label2id task_specific_params is_llama_config transformers.js_config unsloth_version unsloth_fixed max_length
    do_sample num_beams temperature top_k top_p repetition_penalty length_penalty num_beam_groups num_return_sequences
    typical_p output_attentions output_hidden_states gradient_checkpointing attn_implementation torchscript""".split()
# of related decoders, where 1 changes nothing; of any other key null, false, 0 and empty change nothing
NEUTRAL = "partial_rotary_factor residual_multiplier embedding_multiplier logits_scaling logit_scale is_causal".split()


def read_json(path):
    """A JSON object from a file; InputError naming the file if it is none."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} holds a {type(value).__name__}, not a JSON object")
    return value


def named(arch, gated):
    """{"architectures", "model_type"} for config.json: Hugging Face's own, or those of a model with gates.

    A program that knows no gates so refuses the folder, where it would have dropped them. Earlier versions gave both
    kinds Hugging Face's names, and are read like the new ones."""
    arch = arch.removeprefix("GateSkip")
    kind = "gemma2" if arch == "Gemma2ForCausalLM" else "llama"
    return {"architectures": ["GateSkip" * gated + arch], "model_type": "gateskip_" * gated + kind}


def config_from_hf(raw, name="config.json"):
    """Hugging Face's config dict -> ModelConfig. Reads both styles: rope_theta + rope_scaling, and rope_parameters.

    Absent and null fields get transformers' defaults; what this decoder cannot compute is refused, never ignored.
    """
    kinds = {int: "a positive integer", float: "a positive number", bool: "true or false", dict: "a JSON object",
             list: "a list"}

    def get(key, kind=int, default=None, of=raw):
        value = default if of.get(key) is None else of[key]
        fits = type(value) is kind or (kind is float and type(value) is int)     # true is no integer
        if not fits or (kind in (int, float) and not 0 < value < 2 ** 40):
            raise InputError(f"{name}: {key} is {'missing' if value is None else f'{value!r:.60}'}; "
                             f"it must be {kinds[kind]}")
        return value

    def refuse_if(wrong, what):
        if wrong:
            raise InputError(f"{name}: {what}")

    arch = (get("architectures", list, []) or [None])[0]
    gated = isinstance(arch, str) and arch.startswith("GateSkip")
    arch = arch.removeprefix("GateSkip") if gated else arch
    refuse_if(arch not in SUPPORTED, f"architecture {arch!r:.60} is not supported; supported: {', '.join(SUPPORTED)}")
    gemma = arch == "Gemma2ForCausalLM"
    kind, known = ("gemma2", READ + HARMLESS + GEMMA) if gemma else ("llama", READ + HARMLESS)
    names = named(arch, gated)
    refuse_if((raw.get("model_type") or names["model_type"]) != names["model_type"],
              f"{names['architectures'][0]} has model_type {names['model_type']}, not {raw.get('model_type')!r}")
    unread = [key for key, value in raw.items() if key not in known and value is not None and key[:1] != "_"
              and (value != 1 if key in NEUTRAL else value)]
    refuse_if(unread, f"{', '.join(unread[:3])} is not supported: this decoder does not read it, and it may change "
              f"what the model computes (delete it from the file if it does not)")
    layers, hidden, heads = get("num_hidden_layers"), get("hidden_size"), get("num_attention_heads")
    kv_heads = get("num_key_value_heads", default=None if gemma else heads)
    refuse_if(raw.get("head_dim") is None and hidden % heads,
              f"hidden_size {hidden} is no multiple of num_attention_heads {heads}")
    head_dim = get("head_dim", default=None if gemma else hidden // heads)
    refuse_if(heads % kv_heads, f"num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}")
    refuse_if(head_dim % 2, f"head_dim {head_dim} is odd, but rotary positions turn pairs of channels")
    size = hidden * (get("vocab_size") + layers * (2 * (heads + kv_heads) * head_dim + 3 * get("intermediate_size")))
    refuse_if(layers > 1000 or size > 2 ** 40, f"num_hidden_layers {layers}, {size:.0e} weights: no machine holds that")

    styles = [{"rope_type": style.get("type", "default"), **style} for key in ("rope_parameters", "rope_scaling")
              if (style := get(key, dict, {}))]
    ropes = [{key: style[key] for key in style if key not in ("type", "rope_theta")} for style in styles]
    thetas = [of["rope_theta"] for of in (raw, *styles) if of.get("rope_theta") is not None]
    refuse_if(any(rope != ropes[0] for rope in ropes) or any(theta != thetas[0] for theta in thetas),
              "rope_parameters, rope_scaling and rope_theta disagree: delete what is wrong")
    rope = {"rope_type": "default", "rope_theta": (thetas or [None])[0], **(ropes or [{}])[0]}
    rope_type, llama3 = rope["rope_type"], "factor low_freq_factor high_freq_factor original_max_position_embeddings"
    scaling = {key: get(key, float, of=rope) for key in llama3.split()} if rope_type == "llama3" else None
    refuse_if(scaling and scaling["high_freq_factor"] <= scaling["low_freq_factor"],
              "high_freq_factor must exceed low_freq_factor")
    usual = "gelu_pytorch_tanh" if gemma else "silu"
    others = [raw[key] for key in ("hidden_act", "hidden_activation") if raw.get(key) not in (None, usual)]
    for what, present in {
            f"rope type {rope_type!r:.60}": rope_type not in ("default", "llama3"),
            **{f"rope {key}": value not in (None, 1) for key, value in rope.items()
               if key not in ("rope_type", "rope_theta", *(scaling or ()))},
            "a quantized checkpoint (take the original one): quantization_config": raw.get("quantization_config"),
            f"activation {(others or [usual])[0]!r:.60}": others}.items():
        refuse_if(present, f"{what} is not supported")

    family = {}
    if gemma:
        kinds_of_layer = ("sliding_attention", "full_attention")                 # window on layers 0, 2, 4, ...
        types = get("layer_types", list, [kinds_of_layer[i % 2] for i in range(layers)])
        refuse_if(len(types) != layers or any(t not in kinds_of_layer for t in types),
                  f"layer_types must be a list of {layers}, each one of {', '.join(kinds_of_layer)}")
        cap = lambda key, default: get(key, float, default) if raw.get(key, default) is not None else None  # null: off
        family = dict(
            gemma=True, attn_scale=get("query_pre_attn_scalar", float, 256) ** -0.5,
            attn_softcap=cap("attn_logit_softcapping", 50.0), final_softcap=cap("final_logit_softcapping", 30.0),
            windows=[get("sliding_window", default=4096) if t == "sliding_attention" else None for t in types])
    gateskip = get("gateskip", dict, {})
    return ModelConfig(
        vocab_size=get("vocab_size"), hidden_size=hidden, intermediate_size=get("intermediate_size"), head_dim=head_dim,
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads, rope_scaling=scaling,
        rms_norm_eps=get("rms_norm_eps", float, 1e-6), rope_theta=float(get("rope_theta", float, 10000.0, rope)),
        max_position_embeddings=get("max_position_embeddings", default=8192 if gemma else 2048), gateskip=gateskip,
        tie_word_embeddings=get("tie_word_embeddings", bool, gemma), gate=_gate_config(gateskip, 2 * layers, name),
        initializer_range=get("initializer_range", float, 0.02), eos_ids=end_tokens(raw, name), **family)


def end_tokens(raw, name):
    """The ids that end a text, of a config.json or generation_config.json: a tuple of ints. InputError for others."""
    given = raw.get("eos_token_id")
    ids = () if given is None else tuple(given) if isinstance(given, list) else (given,)
    if any(type(i) is not int or i < 0 for i in ids):
        raise InputError(f"{name}: eos_token_id is {given!r:.60}; it must be a token id or a list of them")
    return ids


def _gate_config(stored, branches, name):
    """config.json["gateskip"] -> its GateConfig or None. Also checks the thresholds, which generation will rely on."""
    try:
        gate = GateConfig(**stored["gate"]) if stored.get("gate") is not None else None
        for field in fields(GateConfig) if gate else ():
            if type(getattr(gate, field.name)) is not field.type:
                raise ValueError(f"gate {field.name} is {getattr(gate, field.name)!r:.60}")
        if "thresholds" in stored:
            for key, allowed in (("skip", GRANULARITIES), ("kv", KV_OF_SKIPPED)):
                if stored.get(key) not in allowed:
                    raise ValueError(f"{key} {stored.get(key)!r:.60} is not one of {', '.join(allowed)}")
            for budget, values in stored["thresholds"].items():
                check_budget(budget)
                wanted = 1 if stored.get("threshold", "branch") == "global" else branches
                if len(values) != wanted or not all(type(v) in (int, float) and -0.01 < v < 1.01 for v in values):
                    raise ValueError(f"budget {budget} needs thresholds from 0 to 1, {wanted} of them")
            if len(set(map(float, stored["thresholds"]))) < len(stored["thresholds"]):
                raise ValueError("the thresholds name a budget twice")
            if stored.get("threshold", "branch") not in ("branch", "global"):
                raise ValueError(f"threshold {stored['threshold']!r:.60} is neither branch nor global")
            if 1.0 not in map(float, stored["thresholds"]):
                raise ValueError("no thresholds of budget 1.0")
            if type(stored.get("budget_end", 1)) not in (int, float) or not 0 < stored.get("budget_end", 1) <= 1:
                raise ValueError(f"budget_end is {stored['budget_end']!r:.60}")
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        raise InputError(f'{name}: "gateskip" is not what this version writes ({error}): '
                         f'train the gates again') from None
    return gate
