"""A run on disk: --out holds step-000500/, the one-line file `latest`, and metrics.jsonl (metrics.py) with its curves.

What was saved survives a kill, or a power cut, at any instant: a step is written under a temporary name, synced and
renamed, `latest` then names it, and only then the older step goes. One process at a time holds a run, and only names
that a run gives are ever touched.
"""
import os
import re
import shutil
import sys
import zipfile
from contextlib import contextmanager, suppress
from pathlib import Path

from console import InputError

import torch

from adam_state import restore
from disk import check_held, only_one, rename, sync, sync_tree, write
from load_weights import SAVED, checksums, find_folder, save_model
from metrics import metrics_lines

STEP = r"step-[0-9]{6,}"                                         # what may stand in --out; eval.* by eval_gsm8k.py
FILES = r"latest|metrics\.jsonl|metrics\.png|eval\.json|eval\.png|branches\.png"
LASTING, TEMPORARY = rf"{STEP}|{FILES}", rf"\.{STEP}\.tmp|({FILES})\.tmp"
RUN_FILES = rf"{LASTING}|{TEMPORARY}|\.lock"
WAY_OUT = "a new run can start from its weights: --model {}, another --out"


def _ours(out, names):
    found = [path for path in out.iterdir() if re.fullmatch(names, path.name)]
    return sorted(found, key=lambda path: (len(path.name), path.name))           # steps by their number


def _strange(path):
    """What is somebody else's under a run's name: the name of a file in a step's folder, or path's own; else ""."""
    if path.is_dir() != ("step-" in path.name):
        return path.name
    return next((f"{path.name}/{name}" for name in (os.listdir(path) if path.is_dir() else ())
                 if name.removesuffix(".tmp") not in (*SAVED, "train_state.pt")), "")


def _delete(out, names, but=()):
    """Delete what in out has such names, but for these names, and for what is somebody else's."""
    for old in (path for path in _ours(out, names) if path.name not in but):
        if strange := _strange(old):
            print(f"{old} stays: {strange} is not the run's", file=sys.stderr)
        else:
            shutil.rmtree(old, ignore_errors=True) if old.is_dir() else old.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------------------------------
# Holding and saving
# ---------------------------------------------------------------------------------------------------------------------

@contextmanager
def held(out):
    """Hold the folder --out (disk.only_one): an overwritten run comes back, and nothing half-done of ours stays."""
    name, out = str(out), Path(out)
    if not name or name != name.encode(errors="ignore").decode():
        raise InputError(f"--out {name!r} is no name that weights can be loaded from: give another, in UTF-8")
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out} is a file")
    with only_one(out):
        _end_overwrite(out)
        before = os.listdir(out)
        try:
            yield
        finally:
            check_held(out)
            _end_overwrite(out)
            _delete(out, TEMPORARY if (out / "latest").exists() else rf"{TEMPORARY}|metrics\.jsonl", but=before)


def _end_overwrite(out):
    """The run that was set aside goes if the one that overwrites it has saved; else it comes back."""
    aside = out / ".overwritten"
    names = os.listdir(aside) if aside.is_dir() else ["none"]
    if "latest" not in names and not all(re.fullmatch(LASTING, name) for name in names):
        return                                                   # or it is the user's own
    back = [] if (out / "latest").exists() else _ours(aside, LASTING)
    for old in sorted(back, key=lambda path: path.name == "latest"):             # which comes last
        _delete(out, re.escape(old.name))                        # the new run's of that name
        rename(old, out / old.name)
    _delete(aside, LASTING)
    with suppress(OSError):                                      # somebody's file is in it
        aside.rmdir()


def _set_aside(out):
    """Move the run that is being overwritten into a folder of --out: `latest` first: see _end_overwrite."""
    (out / ".overwritten").mkdir()
    for old in sorted(_ours(out, LASTING), key=lambda path: path.name != "latest"):
        rename(old, out / ".overwritten" / old.name)
        sync(out)


def save_checkpoint(out, step, model, tokenizer, optimizer, settings, quantile=None, ranks=None):
    """Write out/step-NNNNNN under a temporary name, rename it, point `latest` to it, then delete older ones.

    All is on the disk before the next thing is done: a kill or a power cut at any instant, or a full disk (OSError),
    leaves the last good state. InputError for weights that are not finite, or a folder lost. Returns the step's.
    ranks: those that hold a part of it (shards.py); all call this and the first writes."""
    check_held(out)
    final, temporary = out / f"step-{step:06d}", out / f".step-{step:06d}.tmp"
    weights, moments = ranks.whole(model, optimizer, out) if ranks else (dict(model.named_parameters()), None)
    if ranks and ranks.rank:
        return final
    if not torch.stack([end for p in weights.values() for end in p.detach().aminmax()]).isfinite().all():
        raise InputError(f"weights are not finite at step {step}: lower --lr; what was saved before stays")
    metrics, begun = out / "metrics.jsonl", out / "metrics.jsonl.tmp"            # see start_run
    try:
        temporary.mkdir(exist_ok=True)                           # and not its parents, if they have gone
        save_model(model, temporary, tokenizer, weights)
        state = {"step": step, "settings": settings, "optimizer": moments or optimizer.state_dict(),
                 "rng": torch.get_rng_state(), "sums": checksums(temporary), "quantile": quantile}
        torch.save(state, temporary / "train_state.pt")
        sync_tree(temporary)
        sync(begun if begun.exists() else metrics)               # has the lines up to this step
        check_held(out)                                          # that took a while
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
    _delete(out, STEP, but=[final.name])
    _end_overwrite(out)
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
        raise InputError(f"--out {out} already holds files: " + (
            "--resume goes on with that run, --overwrite deletes it" if any(re.fullmatch(RUN_FILES, n) for n in there)
            else f"{there[0]}, and none of a run: choose another --out"))
    for flag in ("model", "init_config", "data", "eval_data", "teacher"):
        value = getattr(args, flag)
        files = [Path(value), *Path(value).glob("*")] if there and value else []     # a folder's may be links
        if any(out.resolve() in (file.resolve(), *file.resolve().parents) for file in files):
            raise InputError(f"--overwrite would delete --{flag.replace('_', '-')} {value}, which lies in --out "
                             f"{out}: choose another --out")
    for name in there:
        if strange := _strange(out / name) if re.fullmatch(RUN_FILES, name) else name:
            raise InputError(f"--overwrite deletes runs only, and {out} also holds {strange}: move it away, or choose "
                             "another --out")
    return None, None


def _resume(out, settings):
    if not (out / "latest").is_file():
        steps, no_file = _ours(out, STEP), "delete that, and " * os.path.lexists(out / "latest")
        raise InputError(f"--resume: {out} has lost its file `latest`: {no_file}write {steps[-1].name} into it" if steps
                         else f"--resume: {out} holds no run that has saved; start one without --resume (with "
                         "--overwrite if files are there)")
    folder = find_folder(out)
    path, way_out = folder / "train_state.pt", WAY_OUT.format(folder)
    try:
        with zipfile.ZipFile(path) as parts:                     # torch compares no sums, and leaves "folders" unread
            whole = parts.testzip() is None and not any(part.external_attr for part in parts.infolist())
        state = torch.load(path, weights_only=True, map_location="cpu") if whole else {}
        was = dict(threshold="branch", sparsity_cost="equal", gate_lr_scale=1.0, teacher=None, distill_weight=None,
                   sparsity_weight_end=None)
        was |= state["settings"]                                 # older versions had fewer flags
        step, sums = int(state["step"]), dict(state.get("sums", {}))
    except Exception as error:  # zipfile's, pickle's and torch's are of many kinds
        if isinstance(error, MemoryError) or "allocate memory" in str(error):
            raise
        raise InputError(f"--resume: {path} is missing or damaged; {way_out}") from None
    digests, now = was.pop("digests", {}), dict(settings)
    for flag, digest in now.pop("digests", {}).items():
        if digests.get(flag, digest) != digest:                  # runs of older versions stored none
            raise InputError(f"--{flag.replace('_', '-')} {now[flag]} has changed since the run started: put the old "
                             f"file back, or: {way_out}")
    if different := [f"--{key.replace('_', '-')} {value} (was {was.get(key)})"
                     for key, value in now.items() if was.get(key) != value]:
        raise InputError(f"--resume: {out} was started with other settings: {', '.join(different)}: give "
                         f"those; {way_out}")
    if int(folder.name[5:]) != step:
        raise InputError(f"--resume: {path} is of step {step}, not of {folder.name}: {way_out}")
    if sums and (changed := dict(sums.items() ^ checksums(folder).items())):     # older versions stored none
        raise InputError(f"--resume: {folder / min(changed)} is not as it was saved: put that back, or start a new run")
    for strange in filter(None, (_strange(later) for later in _ours(out, STEP) if int(later.name[5:]) > step)):
        raise InputError(f"--resume: {out / strange} stands where a step will be saved: move it away")
    if (lines := len(metrics_lines(out))) < step:
        raise InputError(f"--resume: {out / 'metrics.jsonl'} has only {lines} good lines and the checkpoint is of "
                         f"step {step}; {way_out}")
    return state, folder


def start_run(out, state, folder, optimizer, ranks=None):
    """The first that writes, when all that may be wrong has loaded. Returns metrics.jsonl, open for the next lines.

    A resumed run (state, folder: open_run's) cleans first, for the disk may be full. One that overwrites another leaves
    that alone up to its own first save, and writes its metrics under a temporary name until then."""
    check_held(out)
    try:
        if state:
            restore(optimizer, state, ranks)
    except (LookupError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise InputError(f"--resume: {folder / 'train_state.pt'} is not of this run ({' '.join(str(error).split())}); "
                         f"{WAY_OUT.format(folder)}") from None
    if ranks:
        ranks.wait()                                             # all have read what is there
        if ranks.rank:
            return open(os.devnull, "w")
    _delete(out, TEMPORARY)
    if state is None:
        alone = os.listdir(out) == [".lock"]
        return open(out / ("metrics.jsonl" if alone else "metrics.jsonl.tmp"), "w", encoding="utf-8")
    _delete(out, STEP, but=[folder.name])
    write(out / "metrics.jsonl", "".join(line + "\n" for line in metrics_lines(out)[:state["step"]]))
    return open(out / "metrics.jsonl", "a", encoding="utf-8")
