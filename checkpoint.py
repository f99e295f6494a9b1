"""A run on disk: --out holds step-000500/, the one-line file `latest`, and metrics.jsonl with its curves.

What was saved survives a kill, or a power cut, at any instant: a step is written under a temporary name, synced and
renamed, `latest` then names it, and only then the older step goes. One process at a time holds a run, and only names
that a run gives are ever touched.
"""
import io
import json
import re
import shutil
import zipfile
from contextlib import contextmanager, suppress
from pathlib import Path

from console import InputError, pyplot

import torch

from disk import only_one, rename, sync, sync_tree, write
from load_weights import find_folder, save_model

STEP = r"step-[0-9]{6,}"                                         # what may stand in --out; eval.* by eval_gsm8k.py
LASTING = rf"{STEP}|latest|metrics\.jsonl|metrics\.png|eval\.json|eval\.png"
TEMPORARY = rf"\.{STEP}\.tmp|({LASTING})\.tmp"
RUN_FILES = rf"{LASTING}|{TEMPORARY}|\.lock"
WAY_OUT = "a new run can start from its weights: --model {}, another --out"


def _ours(out, names):
    return [path for path in sorted(out.iterdir()) if re.fullmatch(names, path.name)]


# ---------------------------------------------------------------------------------------------------------------------
# Holding and saving
# ---------------------------------------------------------------------------------------------------------------------

@contextmanager
def held(out):
    """Hold the folder --out (disk.only_one); before and after, what a kill or an error left half-done is undone."""
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out} is a file")
    with only_one(out):
        try:
            _tidy(out)
            yield
        finally:
            _tidy(out)


def _tidy(out):
    """Delete temporary files; bring back a run that was set aside, unless the one that overwrites it has saved."""
    aside = out / ".overwritten"
    if aside.is_dir() and not (out / "latest").exists():
        for old in sorted(aside.iterdir(), key=lambda path: path.name == "latest"):              # which comes last
            shutil.rmtree(out / old.name, ignore_errors=True)    # the new run's step of that name
            rename(old, out / old.name)
    shutil.rmtree(aside, ignore_errors=True)
    for left in _ours(out, TEMPORARY):
        shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)


def _set_aside(out):
    """Move the run that is being overwritten into a folder of --out: `latest` first, whose absence tells _tidy."""
    (out / ".overwritten").mkdir()
    for old in sorted(_ours(out, LASTING), key=lambda path: path.name != "latest"):
        rename(old, out / ".overwritten" / old.name)
        sync(out)


def save_checkpoint(out, step, model, tokenizer, optimizer, settings):
    """Write out/step-NNNNNN under a temporary name, rename it, point `latest` to it, then delete older ones.

    All is on the disk before the next thing is done: a kill or a power cut at any instant, or a full disk (OSError),
    leaves the last good state. InputError for weights that are not finite. Returns the step's folder."""
    final, temporary = out / f"step-{step:06d}", out / f".step-{step:06d}.tmp"
    if not torch.stack([end.isfinite() for p in model.parameters() for end in p.detach().aminmax()]).all():
        raise InputError(f"weights are not finite at step {step}: lower --lr; what was saved before stays")
    metrics, begun = out / "metrics.jsonl", out / "metrics.jsonl.tmp"            # see start_run
    try:
        save_model(model, temporary, tokenizer)
        state = {"step": step, "settings": settings, "optimizer": optimizer.state_dict(), "rng": torch.get_rng_state()}
        torch.save(state, temporary / "train_state.pt")
        sync_tree(temporary)
        sync(begun if begun.exists() else metrics)               # has the lines up to this step
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, (OSError, RuntimeError)):           # torch.save calls a full disk a RuntimeError
            raise OSError(f"{final} could not be saved, is the disk full? What was saved before stays "
                          f"({' '.join(str(error).split())})") from None
        raise
    if begun.exists():
        _set_aside(out)
        rename(begun, metrics)
    rename(temporary, final)
    write(out / "latest", final.name + "\n")
    for old in {out / ".overwritten", *_ours(out, STEP)} - {final}:
        shutil.rmtree(old, ignore_errors=True)
    return final


# ---------------------------------------------------------------------------------------------------------------------
# Opening a run
# ---------------------------------------------------------------------------------------------------------------------

def open_run(args, settings):
    """Refuse --out or continue it; writes nothing. Returns (train_state, its folder) of a resumed run, else two None.

    args: train.py's; settings: those that a resumed run must share, and the "digests" of its data."""
    out = Path(args.out)
    if args.resume:
        return _resume(out, settings)
    there = sorted(path.name for path in out.iterdir() if path.name != ".lock")
    if there and not args.overwrite:
        raise InputError(f"--out {out} already holds files: --resume goes on with that run, --overwrite deletes it")
    foreign = [name for name in there if not re.fullmatch(RUN_FILES, name)]
    if foreign:
        raise InputError(f"--overwrite deletes runs only, and {out} also holds {foreign[0]}: move it away, or choose "
                         "another --out")
    for flag in ("model", "init_config", "data", "eval_data"):
        value = getattr(args, flag)
        if there and value and out.resolve() in (Path(value).resolve(), *Path(value).resolve().parents):
            raise InputError(f"--overwrite would delete --{flag.replace('_', '-')} {value}, which lies in --out "
                             f"{out}: choose another --out")
    return None, None


def _resume(out, settings):
    if not (out / "latest").is_file():
        steps = _ours(out, STEP)
        raise InputError(f"--resume: {out} has lost its file `latest`: write {steps[-1].name} into it" if steps else
                         f"--resume: {out} holds no run that has saved; start one without --resume (with --overwrite "
                         "if files are there)")
    folder = find_folder(out)
    path, way_out = folder / "train_state.pt", WAY_OUT.format(folder)
    try:
        with zipfile.ZipFile(path) as parts:
            damaged = parts.testzip()                            # torch does not compare the check sums
        state = torch.load(path, weights_only=True, map_location="cpu") if damaged is None else {}
        was, step = dict(state["settings"]), int(state["step"])
    except Exception as error:  # zipfile's, pickle's and torch's are of many kinds
        if isinstance(error, MemoryError) or "allocate memory" in str(error):
            raise
        raise InputError(f"--resume: {path} is missing or damaged; {way_out}") from None
    digests, now = was.pop("digests", {}), dict(settings)
    for flag, digest in now.pop("digests", {}).items():
        if digests.get(flag, digest) != digest:                  # runs of older versions stored none
            raise InputError(f"--{flag.replace('_', '-')} {now[flag]} has changed since the run started: put the old "
                             f"file back, or: {way_out}")
    different = [f"--{key.replace('_', '-')} {value} (was {was.get(key)})"
                 for key, value in now.items() if was.get(key) != value]
    if different:
        raise InputError(f"--resume: {out} was started with other settings: {', '.join(different)}")
    lines = len(metrics_lines(out))
    if lines < step:
        raise InputError(f"--resume: {out / 'metrics.jsonl'} has only {lines} good lines and the checkpoint is of "
                         f"step {step}; {way_out}")
    return state, folder


def start_run(out, state, folder, optimizer):
    """The first that writes, when all that may be wrong has loaded. Returns metrics.jsonl, open for the next lines.

    A resumed run (state, folder: open_run's) cleans first, for the disk may be full. One that overwrites another leaves
    that alone up to its own first save, and writes its metrics under a temporary name until then."""
    if state is None:
        alone = [path.name for path in out.iterdir()] == [".lock"]
        return open(out / ("metrics.jsonl" if alone else "metrics.jsonl.tmp"), "w", encoding="utf-8")
    resume_optimizer(optimizer, state, folder)
    for left in set(_ours(out, STEP)) - {folder}:
        shutil.rmtree(left, ignore_errors=True)
    write(out / "metrics.jsonl", "".join(line + "\n" for line in metrics_lines(out)[:state["step"]]))
    return open(out / "metrics.jsonl", "a", encoding="utf-8")


def resume_optimizer(optimizer, state, folder):
    """Put the saved optimizer and random state back. InputError unless they fit: load_state_dict compares nothing."""
    try:
        _check_fit(optimizer, state["optimizer"], state["step"])
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
    except (LookupError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise InputError(f"--resume: {folder / 'train_state.pt'} is not of this run ({' '.join(str(error).split())}); "
                         f"{WAY_OUT.format(folder)}") from None


def _check_fit(optimizer, saved, step):
    """ValueError, or what comes of other types, unless the saved state can be this optimizer's after `step` updates."""
    (group,), (was,) = optimizer.param_groups, saved["param_groups"]
    names, places = group["param_names"], list(range(len(group["params"])))
    if was.get("param_names", names) != names or not was["params"] == list(saved["state"]) == places:
        raise ValueError("it is of other parameters")            # older versions stored no names
    for key in ("betas", "eps", "weight_decay", "amsgrad", "maximize"):
        if was[key] != group[key]:
            raise ValueError(f"{key} was {was[key]} and is {group[key]}")
    for name, p, entry in zip(names, group["params"], saved["state"].values()):
        if entry["step"].item() != step:
            raise ValueError(f"{name} has had {entry['step'].item()} updates, not {step}")
        for key in ("exp_avg", "exp_avg_sq"):
            if (entry[key].shape, entry[key].dtype) != (p.shape, p.dtype):
                raise ValueError(f"{key} of {name} has another shape or dtype")
            low, high = (value.item() for value in entry[key].aminmax())
            if not -torch.inf < low <= high < torch.inf or key == "exp_avg_sq" and low < 0:
                raise ValueError(f"{key} of {name} reaches from {low} to {high}")


# ---------------------------------------------------------------------------------------------------------------------
# Metrics
# ---------------------------------------------------------------------------------------------------------------------

def metrics_lines(out):
    """The lines of out/metrics.jsonl up to the first that is missing or damaged."""
    lines = []
    with suppress(OSError, ValueError):
        for line in (out / "metrics.jsonl").read_text(encoding="utf-8", errors="replace").splitlines():
            json.loads(line)
            lines.append(line)
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
    picture = io.BytesIO()
    figure.savefig(picture, dpi=120)
    write(out / name, picture.getvalue())
    plt.close(figure)
