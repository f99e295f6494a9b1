"""Where does our decoder leave a reference? For whoever adds a model family.

    python tests/layer_diff.py MODEL_DIR REFERENCE.safetensors [--tolerance 1e-3]

compares the hidden states that enter layer 0 and leave each layer with recorded ones, and names the first layer that is
off. A reference holds input_ids (B, S) and hidden.0 ... hidden.L (B, S, H), as tests/golden/*/golden.safetensors does.
To record one from any transformers model `hf` (float32, attn_implementation="eager"), under torch.no_grad():

    seen, layers = {"input_ids": input_ids}, hf.model.layers
    layers[0].register_forward_pre_hook(lambda module, args: seen.update({"hidden.0": args[0]}))
    for i, layer in enumerate(layers, 1):      # not output_hidden_states: its last entry comes after the final norm
        layer.register_forward_hook(
            lambda m, a, out, i=i: seen.update({f"hidden.{i}": out[0] if isinstance(out, tuple) else out}))
    hf(input_ids); safetensors.torch.save_file(seen, "reference.safetensors")
"""
import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from console import InputError, run

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from load_weights import load_model


def hidden_states(model, input_ids):
    """[what enters layer 0, what leaves layer 0, ..., what leaves the last layer (no final norm)], (B, S, H) each."""
    seen, layers = [], model.model["layers"]
    hooks = [layers[0].register_forward_pre_hook(lambda block, args: seen.append(args[0]))]
    hooks += [block.register_forward_hook(lambda block, args, out: seen.append(out[0])) for block in layers]
    with torch.no_grad():
        model(input_ids)
    for hook in hooks:
        hook.remove()
    return seen


def named(place):
    return f"layer {place - 1}" if place else "embedding"


def look_at(place, position):
    """What may be wrong in the first place that differs, given the first token position that does."""
    if place == 0:
        return "look at the embedding and its scale (Gemma multiplies by sqrt(H))"
    if position == 0:
        return ("position 0 sees only itself, so rope, mask and attention scale are not to blame: look at the norms "
                "(eps, 1 + w, which one goes where), v_proj and o_proj, the MLP's activation, and this layer's weights")
    window = ", and whether this layer has a window" if position > 1 else ""
    return (f"positions 0 to {position - 1} are right, so norms, MLP and v_proj hardly are to blame: "
            f"look at rope (theta, scaling, pairing), the attention scale, the softcap, q_proj and k_proj{window}")


def main(argv=None):
    p = argparse.ArgumentParser(description="Compare hidden states layer by layer with a recorded reference.")
    p.add_argument("model")
    p.add_argument("reference")
    p.add_argument("--tolerance", type=float, default=1e-3, help="of a token's largest value, or of 1 if that is more")
    args = p.parse_args(argv)
    model = load_model(args.model)
    try:
        reference = load_file(args.reference)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{args.reference} is no safetensors file: {error}") from None
    names = ["input_ids"] + [f"hidden.{i}" for i in range(model.config.num_hidden_layers + 1)]
    missing = [name for name in names if name not in reference]
    if missing:
        raise InputError(f"{args.reference} lacks {', '.join(missing)}")

    first = None
    for place, ours in enumerate(hidden_states(model, reference["input_ids"])):
        theirs = reference[f"hidden.{place}"].float()
        if theirs.shape != ours.shape:
            raise InputError(f"{args.reference}: hidden.{place} has shape {tuple(theirs.shape)}, "
                             f"ours {tuple(ours.shape)}")
        off = (ours - theirs).abs() / theirs.abs().amax(-1, keepdim=True).clamp(min=1)      # (B, S, H)
        wrong = ~(off <= args.tolerance)                                                    # NaN is wrong
        print(f"{'[DIFF]' if wrong.any() else '[OK]  '} {named(place)} max {off.max():.1e}")
        if wrong.any() and first is None:
            first = place, int(wrong.any(0).any(-1).nonzero()[0])
    if first is None:
        return 0
    print(f"first off: {named(first[0])}, from position {first[1]} on; {look_at(*first)}")
    return 1


if __name__ == "__main__":
    run(main)
