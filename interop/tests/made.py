"""What these tests share: small random models with gates and thresholds, as train.py leaves them, and exported.

The models are those of tests/conftest.py: pre-activations of std 1, so that scores lie far apart and no rounding flips
a decision."""
import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
for place in (ROOT, ROOT / "tests", ROOT / "interop", ROOT / "paper"):
    sys.path.insert(0, str(place))
os.environ.update(HF_HUB_OFFLINE="1", HF_MODULES_CACHE=tempfile.mkdtemp())       # before transformers is imported

import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoModelForCausalLM

import export
from conftest import VOCAB, build, gemma, llama, tokens
from gates import GateConfig
from load_weights import load_model, save_model
from thresholds import frozen_threshold, make_policy

NEW = hasattr(transformers.PreTrainedModel, "_keep_in_fp32_modules_strict")
FAMILIES = {"llama": llama, "gemma": lambda gate, **changes: gemma(gate, attn_scale=0.5, **changes)}
GATES = {"vector": GateConfig(), "scalar": GateConfig("scalar"), "mlp": GateConfig(arch="mlp", detach=True),
         "scalar mlp": GateConfig("scalar", arch="mlp"), "lowrank": GateConfig(arch="lowrank"),
         "lowrank 3": GateConfig(arch="lowrank", rank=3), "shared": GateConfig("scalar", shared=True),
         "residual": GateConfig("scalar", input="residual"), "before": GateConfig(placement="before"),
         "all of it": GateConfig("vector", "lowrank", 2, True, "residual", "before")}
BUDGETS, END = (1.0, 0.8, 0.7, 0.6), 7                           # 0.7 lies between two calibrated ones; the end token


def raw_config(c):
    """Hugging Face's config of a ModelConfig."""
    same = """vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads
        head_dim rms_norm_eps rope_theta rope_scaling max_position_embeddings tie_word_embeddings""".split()
    raw = dict(architectures=["Gemma2ForCausalLM" if c.gemma else "LlamaForCausalLM"],
               model_type="gemma2" if c.gemma else "llama", eos_token_id=END, bos_token_id=1, pad_token_id=0,
               torch_dtype="float32", **{key: getattr(c, key) for key in same})
    if c.gemma:
        raw.update(query_pre_attn_scalar=round(c.attn_scale ** -2), attn_logit_softcapping=c.attn_softcap,
                   final_logit_softcapping=c.final_softcap, sliding_window=4, hidden_activation="gelu_pytorch_tanh")
    return raw


@torch.no_grad()
def table(model, threshold):
    """{budget: thresholds}, that skip about 20% and 45% of some tokens."""
    scores = [s.flatten() for s in model(tokens(3, 40, seed=5))[1].scores]
    pools = [torch.cat(scores)] if threshold == "global" else scores
    return {key: [frozen_threshold(pool, q) if q else pool.min().item() for pool in pools]
            for key, q in (("1.0", 0.0), ("0.8", 0.2), ("0.6", 0.45))}


def tokenizer():
    words = WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0")
    made = Tokenizer(words)
    made.pre_tokenizer = WhitespaceSplit()
    return made


def run_folder(folder, config, threshold="branch", skip="all", kv="copy_up", thresholds=None):
    """A model of this config on disk, as train.py leaves it."""
    model = build(config, dtype=torch.float32)
    if config.gate is not None:
        config.gateskip = {"skip": skip, "kv": kv, "threshold": threshold,
                           "thresholds": thresholds or table(model, threshold)}
    model.source, model.raw_config, model.side_files = folder, raw_config(config), {}
    save_model(model, folder, tokenizer())
    return folder


def opened(folder):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()


def pair(path, config, **settings):
    """(our model, the exported one in transformers)"""
    run_folder(path / "run", config, **settings)
    assert export.main(["--model", str(path / "run"), "--out", str(path / "out")]) == 0
    return load_model(path / "run"), opened(path / "out")


def policy(model, budget):
    return make_policy(model.config, "frozen", budget)
