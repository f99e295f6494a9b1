"""train.py --dry-run: what would be trained on what, and the memory it takes on paper."""
from dataclasses import replace
from pathlib import Path

from console import InputError

import torch

from data import load_examples
from load_weights import check_gates, find_folder
from model import Model
from read_config import config_from_hf, read_json
from savings import SHAPES, memory_table


def config_of(source, models):
    """The ModelConfig of a config.json, a folder or a preset's model (models: {its id: preset}), not of the hub."""
    path, shapes = Path(source), {hub: SHAPES[name] for hub, name in models.items() if name in SHAPES}
    if path.is_dir() or (Path(__file__).resolve().parent / path).is_dir():        # which says where it is
        path = find_folder(source) / "config.json"
    elif not path.exists() and path.suffix != ".json":
        if source in shapes:
            return replace(shapes[source])                       # a copy: it may be about to get gates
        raise InputError(f"--dry-run does not ask the hub for {source}: give a local folder or a --preset")
    return config_from_hf(read_json(path), path)


def dry_run(args, gate, models):
    """Say what would be trained on what, and the memory it takes on paper; touch neither network nor --out."""
    source = args.init_config or args.model
    config, teacher = config_of(source, models), config_of(args.teacher, models) if args.teacher else None
    if teacher and teacher.vocab_size != config.vocab_size:
        raise InputError(f"--teacher {args.teacher}: a vocabulary of {teacher.vocab_size} against {config.vocab_size}")
    if not 2 <= args.seq_len <= config.max_position_embeddings:
        raise InputError(f"--seq-len {args.seq_len} does not fit {config.max_position_embeddings} positions")
    check_gates(config.gate, gate, source)
    config.gate = gate
    examples = load_examples(args.data, "train", None if args.data != "arithmetic" else 1000, args.seed)
    tokens = args.batch_size * args.seq_len
    print(f"{source}: {config.num_hidden_layers} layers of width {config.hidden_size}, gate {gate or 'none'}")
    print(f"data {args.data}: " + ("made as needed" if args.data == "arithmetic" else f"{len(examples)} examples"))
    print(f"{args.steps} steps of {args.grad_accum} x {args.batch_size} sequences up to {args.seq_len} tokens, "
          f"lr {args.lr}, budget {args.budget_start} -> {args.budget_end} ({args.schedule})"
          + ", one threshold for all branches" * (args.threshold == "global"))
    print("\n".join(memory_table(config, tokens, args.freeze_backbone, args.checkpoint_activations, args.seq_len)))
    if teacher:
        with torch.device("meta"):
            weights = 4 * sum(p.numel() for p in Model(teacher).parameters())
        print(f"and the teacher's weights, {weights / 1e9:.1f}, and its logits, as large as the model's")
    return 0
