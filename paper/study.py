"""Trainings that are never run twice: a file of results, one entry a line, and a pool that makes what it lacks.

An entry is a dict with "model" and "seed", by which it is known, and "rows", what was measured.
"""
import contextlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from console import InputError

import torch
from filelock import FileLock
from tqdm import tqdm

from disk import check_writable, only_one, write
from load_weights import read_json

ROOT = Path(__file__).resolve().parents[1]
WORK, RESULTS = Path("runs/study"), ROOT / "paper" / "results"


def commit():
    """Of the code, "+" behind it where it was changed since, results apart; "" without a repository, or git."""
    git = ["git", "-C", str(ROOT)]
    try:
        told = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True).stdout.strip()
        code = [*git, "diff", "--quiet", "HEAD", "--", ".", ":!paper/results"]
        return told + "+" * (told != "" and subprocess.run(code, capture_output=True).returncode)
    except FileNotFoundError:
        return ""


COMMIT = commit()                                                # as this process began: of the code that it runs


def entries(file):
    """Those of a results file so far, [] without one; InputError for a file that is none of ours."""
    file = RESULTS / file
    if not file.exists():
        return []
    runs = read_json(file).get("runs")
    if not isinstance(runs, list):
        raise InputError(f"{file} is no file of this program: move it away")
    for i, r in enumerate(runs):
        if not (isinstance(r, dict) and isinstance(r.get("model"), str) and type(r.get("seed")) is int
                and isinstance(r.get("rows"), list) and all(map(_measured, r["rows"]))):
            raise InputError(f"{file}: entry {i + 1} is not as this program writes it: mend it, or take it out")
        if (r["model"], r["seed"]) in [(known["model"], known["seed"]) for known in runs[:i]]:
            raise InputError(f"{file}: entry {i + 1} is seed {r['seed']} of {r['model']!r:.60} once more: take one out")
    return runs


def _measured(row):
    """Whether a row has its name, and numbers where tables read them: shares, and savings, which gates may turn below
    0."""
    within = lambda x, least: type(x) in (int, float) and least <= x <= 1
    return isinstance(row, dict) and isinstance(row.get("row"), str) and isinstance(row.get("answer"), dict) and (
        within(row.get("accuracy"), 0) and within(row.get("skipped"), 0) and within(row.get("macs_saved"), -1000)
        and within(row["answer"].get("macs_saved"), -1000))


def keep(file, entry):
    """Add an entry, in place of one of the same model and seed. Another process may write the file too; InputError
    where it has been damaged meanwhile, the entry on stderr."""
    with FileLock(RESULTS / ".lock"):
        try:
            earlier = entries(file)
        except InputError as error:
            tqdm.write(json.dumps(entry), file=sys.stderr)
            raise InputError(f"{error}; then add the entry that is printed above") from None
        runs = [r for r in earlier if (r["model"], r["seed"]) != (entry["model"], entry["seed"])] + [entry]
        write(RESULTS / file, ('{"runs": [\n' + ",\n".join(map(json.dumps, runs)) + "\n]}\n").encode())


def _while_parent_lives(one, *args):
    """one(*args) in a process that ends with its parent's: what a killed study began is nobody's, and in the next
    one's way."""
    if parent := multiprocessing.parent_process():
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    return one(*args)


def study(file, rounds, one, jobs):
    """Make what the results file lacks: one(model, seed, threads) -> entry, or None for what is no result.

    rounds: lists of (model, seed), each begun when the one before is done; jobs at a time share torch's threads, each
    in a process of its own. A model that cannot be had, such as a training whose loss is not finite, is told and the
    others go on; InputError in the end. Any other error in one, or Ctrl-C: those that run end, and what they found is
    kept; none of those that wait begins. InputError where another study works in WORK, OSError where results could not
    be kept."""
    known, threads = {(r["model"], r["seed"]) for r in entries(file)}, max(1, torch.get_num_threads() // jobs)
    rounds, failed = [[run for run in dict.fromkeys(runs) if run not in known] for runs in rounds], []
    check_writable(RESULTS)
    tqdm.monitor_interval = 0                                    # its thread would take a Ctrl-C that is blocked below
    with only_one(WORK, "folder"), tqdm(total=sum(map(len, rounds)), desc="models", smoothing=0) as bar:
        def kept(done, model, seed):
            try:
                entry = done.result()                            # or the error that ended it
            except InputError as error:
                failed.append(f"{model!r}, seed {seed}: {error}")
                tqdm.write(f"failed: {failed[-1]}", file=sys.stderr)
                entry = None
            if entry:
                keep(file, entry)
            bar.update()

        for runs in rounds:
            with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
                running = {}
                try:
                    while runs or running:
                        while runs and len(running) < jobs:      # no more: what a pool holds ready cannot be recalled
                            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})    # handed down: Ctrl-C waits
                            run = runs.pop(0)
                            running[pool.submit(_while_parent_lives, one, *run, threads)] = run
                            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # till a child has imported
                        for done in wait(running, return_when=FIRST_COMPLETED).done:
                            kept(done, *running.pop(done))
                finally:
                    if running:                                  # an error, or a signal
                        tqdm.write(f"waiting for what still runs ({len(running)}): its result is kept",
                                   file=sys.stderr)
                    for done in wait(running).done:
                        if done.exception() is None:
                            kept(done, *running[done])
    if failed:
        raise InputError(f"{len(failed)} of the models could not be had ({failed[0]}); the others are kept")


def folder_of(name, seed):
    """Where a model of that name is trained."""
    return WORK / f"{name.replace(',', '').replace(' ', '-')}-s{seed}"


@contextlib.contextmanager
def logged(folder, threads):
    """With so many of torch's threads; what is printed meanwhile goes to the end of FOLDER.log."""
    torch.set_num_threads(threads)
    with open(f"{folder}.log", "a", encoding="utf-8") as log, contextlib.redirect_stdout(log), \
            contextlib.redirect_stderr(log):
        yield


def entry_of(name, seed, **measured):
    """An entry, with today's date and the commit whose code ran."""
    return {"model": name, "seed": seed, "date": str(date.today()), "commit": COMMIT, **measured}


def mean_std(values):
    """"mean±sample deviation" of numbers, one per seed; "-" if a seed has None."""
    if None in values or not values:
        return "-"
    mean = sum(values) / len(values)
    if len(values) == 1:
        return f"{mean:.1f}"
    return f"{mean:.1f}±{(sum((v - mean) ** 2 for v in values) / (len(values) - 1)) ** 0.5:.1f}"
