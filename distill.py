"""Learn from all that another model would have said (ours): train.py --teacher MODEL --distill-weight ALPHA.

    loss = (1 - alpha) CE + alpha KL(teacher || model) + lambda sparsity        both at the answer positions

It serves text that the teacher wrote (data.py --write-with) or was tuned on; on text of others it pulls the wrong way.
"""
import json

import torch
import torch.nn.functional as F

from console import InputError
from load_weights import load_model, load_tokenizer


def open_teacher(source, model, tokenizer, seq_len):
    """The model of a folder, a run or a hub id, without gradients, on the device of `model` and in its dtype.

    InputError unless it has the same tokenizer: the same token ids must mean the same text."""
    if _rules(load_tokenizer(source)) != _rules(tokenizer):
        raise InputError(f"--teacher {source}: its tokenizer is not the model's: both must make the "
                         "same ids of a text")
    weight = model.model["embed_tokens"].weight
    teacher = load_model(source, device=weight.device, dtype=weight.dtype).eval().requires_grad_(False)
    if teacher.config.vocab_size != model.config.vocab_size:
        raise InputError(f"--teacher {source}: {teacher.config.vocab_size} logits against {model.config.vocab_size}: a "
                         "teacher must share the vocabulary")
    if seq_len > teacher.config.max_position_embeddings:
        raise InputError(f"--seq-len {seq_len} exceeds the {teacher.config.max_position_embeddings} positions of "
                         f"--teacher {source}")
    return teacher


def _rules(tokenizer):
    """All of a tokenizer but how it would truncate and pad, which this project leaves alone."""
    return {key: value for key, value in json.loads(tokenizer.to_str()).items() if key not in ("truncation", "padding")}


def kl_divergence(teacher, logits, input_ids, valid, places):
    """KL(teacher || model), summed over the places. logits (A, V) of the model there; a float32 scalar tensor.

    input_ids, valid (B, S) (or None) and places (A,): as the model was called. The teacher runs every branch."""
    with torch.no_grad():
        target, _ = teacher(input_ids, valid=valid, compute="compact", places=places)            # (A, V)
    return F.kl_div(logits.float().log_softmax(-1), target.float().log_softmax(-1), log_target=True, reduction="sum")
