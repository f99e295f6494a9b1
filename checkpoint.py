"""A run on disk: --out holds step-000500/, the one-line file `latest`, and metrics.jsonl with its curves.

What was saved survives a kill at any instant: a step is written under a temporary name and renamed, `latest` then names
it, and only then the older step goes.
"""
import json
import os
import pickle
import shutil
from pathlib import Path

from console import InputError, pyplot

import torch

from load_weights import find_folder, save_model

RUN_FILES = ("step-", ".step-", "latest", "metrics.", "eval.")   # how names in --out begin (eval.* by eval_gsm8k.py)


def save_checkpoint(out, step, model, tokenizer, optimizer, settings):
    """Write out/step-NNNNNN under a temporary name, rename it, point `latest` to it, then delete older ones.

    A kill at any instant, or a full disk (OSError), leaves the last good state.
    """
    final, temporary = out / f"step-{step:06d}", out / f".step-{step:06d}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        save_model(model, temporary, tokenizer)
        state = {"step": step, "settings": settings, "optimizer": optimizer.state_dict(), "rng": torch.get_rng_state()}
        torch.save(state, temporary / "train_state.pt")
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, (OSError, RuntimeError)):           # torch.save calls a full disk a RuntimeError
            raise OSError(f"{final} could not be saved, is the disk full? What was saved before stays "
                          f"({' '.join(str(error).split())})") from None
        raise
    shutil.rmtree(final, ignore_errors=True)
    os.replace(temporary, final)
    (out / "latest.tmp").write_text(final.name + "\n")
    os.replace(out / "latest.tmp", out / "latest")
    for old in out.glob("step-*"):
        if old != final:
            shutil.rmtree(old, ignore_errors=True)
    return final


# ---------------------------------------------------------------------------------------------------------------------
# Opening a run
# ---------------------------------------------------------------------------------------------------------------------

def open_run(args, settings):
    """Refuse --out or continue it. Returns the loaded train_state of a resumed run, else None. Deletes no run yet.

    args: train.py's; settings: those that a resumed run must share.
    """
    out = Path(args.out)
    if args.resume:
        return _resume(out, settings)
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out} is a file")
    if out.is_dir() and any(out.iterdir()):
        if not args.overwrite:
            raise InputError(f"--out {out} already holds files: --resume goes on with that run, --overwrite deletes it")
        foreign = [p.name for p in out.iterdir() if not p.name.startswith(RUN_FILES)]
        if foreign:
            raise InputError(f"--overwrite deletes runs only, and {out} also holds {foreign[0]}: move it away, or "
                             "choose another --out")
        for flag in ("model", "init_config", "data", "eval_data"):
            value = getattr(args, flag)
            if value and out.resolve() in (Path(value).resolve(), *Path(value).resolve().parents):
                raise InputError(f"--overwrite would delete --{flag.replace('_', '-')} {value}, which lies in --out "
                                 f"{out}: choose another --out")
    return None


def _resume(out, settings):
    if not (out / "latest").is_file():
        steps = sorted(p.name for p in out.glob("step-*"))
        raise InputError(f"--resume: {out} has lost its file `latest`: write {steps[-1]} into it" if steps else
                         f"--resume: {out} holds no run that has saved; start one without --resume (with --overwrite "
                         "if files are there)")
    path = find_folder(out) / "train_state.pt"
    way_out = f"a new run can start from its weights: --model {path.parent}, another --out"
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
        was, step = state["settings"], state["step"]
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, KeyError, TypeError):
        raise InputError(f"--resume: {path} is missing or damaged; {way_out}") from None
    different = [f"--{key.replace('_', '-')} {value} (was {was.get(key)})"
                 for key, value in settings.items() if was.get(key) != value]
    if different:
        raise InputError(f"--resume: {out} was started with other settings: {', '.join(different)}")
    lines = metrics_lines(out)[:step]                            # cut back to the checkpoint
    if len(lines) < step:
        raise InputError(f"--resume: {out / 'metrics.jsonl'} has only {len(lines)} good lines and the checkpoint is of "
                         f"step {step}; {way_out}")
    (out / "metrics.tmp").write_text("".join(line + "\n" for line in lines))
    os.replace(out / "metrics.tmp", out / "metrics.jsonl")
    for left in out.glob(".step-*.tmp"):                         # by a kill while saving
        shutil.rmtree(left, ignore_errors=True)
    return state


def resume_optimizer(optimizer, state, out):
    """Put the saved optimizer and random state back."""
    try:
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        raise InputError(f"--resume: train_state.pt in {out} is not of this run ({error}): start again with another "
                         "--out") from None


# ---------------------------------------------------------------------------------------------------------------------
# Metrics
# ---------------------------------------------------------------------------------------------------------------------

def metrics_lines(out):
    """The lines of out/metrics.jsonl up to the first that is missing or damaged."""
    lines = []
    try:
        for line in (out / "metrics.jsonl").read_text(encoding="utf-8", errors="replace").splitlines():
            json.loads(line)
            lines.append(line)
    except (OSError, ValueError):
        pass
    return lines


def plot_metrics(out, name="metrics.png"):
    """out/metrics.jsonl as curves."""
    plt = pyplot()
    if plt is None:
        return
    rows = [json.loads(line) for line in metrics_lines(out)]
    rows = [{**row, "kept": 1 - row["skipped"], "cross-entropy": row["ce"]} for row in rows]
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
    dots, line = dict(linewidth=0, marker=".", markersize=3), dict(linewidth=1)
    for axis, keys, title, style in zip(axes, (("loss", "cross-entropy"), ("gate_mean",), ("budget", "kept")),
                                        ("loss", "mean gate", "share of (token, branch) pairs"), (line, line, dots)):
        for key in keys:
            axis.plot([r["step"] for r in rows if key in r], [r[key] for r in rows if key in r],
                      label=key.replace("_", " "), **style)
        axis.set(xlabel="step", title=title)
        axis.legend()
        axis.ticklabel_format(axis="y", useOffset=False)
    axes[0].set_yscale("log")
    figure.savefig(out / name, dpi=120)
    plt.close(figure)
