"""The rows of a sweep, kept in eval.json: the same command goes on with them, other settings leave them alone.

And what is said of rows: how far chance may have moved an accuracy, and what lies between two of them.
"""
import hashlib
import json
import sys
from pathlib import Path

from console import InputError
from disk import write
from load_weights import read_json

TARGETS = (0.0, 0.05, 0.10, 0.15, 0.20, 0.25, 0.30, 0.40, 0.50)  # up to 25% the columns of the paper's Table 1


def wilson(p, n, z=1.959964):
    """(low, high): Wilson's 95% interval around a share p of n tries. At 0 and at 1 it does not shrink to nothing."""
    centre, half = p + z * z / (2 * n), z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    low, high = ((centre + side) / (1 + z * z / n) for side in (-half, half))
    return max(0.0, min(low, p)), min(1.0, max(high, p))         # rounding: 0 of n begins at 0


def interpolate(points, targets=TARGETS):
    """Accuracy at exact savings: piecewise linear between measured (skipped, accuracy) points, in any order.

    Points at the same saving are averaged. Outside the measured range there is no value (None), never a clamp.
    """
    by_x = {}
    for x, y in points:
        by_x.setdefault(x, []).append(y)
    xs = sorted(by_x)
    ys = [sum(by_x[x]) / len(by_x[x]) for x in xs]
    values = []
    for target in targets:
        value = next((y for x, y in zip(xs, ys) if abs(x - target) < 1e-9), None)
        for x0, y0, x1, y1 in zip(xs, ys, xs[1:], ys[1:]):
            if value is None and x0 < target < x1:
                value = y0 + (y1 - y0) * (target - x0) / (x1 - x0)
        values.append(value)
    return values


# ---------------------------------------------------------------------------------------------------------------------
# What a row depends on, beside its name and its budget
# ---------------------------------------------------------------------------------------------------------------------

def data_digest(examples):
    """Of the questions and answers, in their order: 16 hex digits."""
    return hashlib.sha256(json.dumps([(e.question, e.answer) for e in examples]).encode()).hexdigest()[:16]


# ---------------------------------------------------------------------------------------------------------------------
# eval.json
# ---------------------------------------------------------------------------------------------------------------------

NUMBERS = ("skipped", "macs_saved", "accuracy", "n")             # what a row of every version has
MORE = (*NUMBERS, "budget", "skipped_per_call", "low", "high", "flexible", "cut", "seconds")
PARTS = ("skipped", "skipped_per_call", "macs_saved")            # of "prompt" and "answer", where it has them


def read_rows(file, numbers=NUMBERS):
    """(all of an eval.json, its rows with these keys as float, path of its model). ValueError if it is none of ours."""
    try:
        stored, floats = read_json(file), lambda r, keys: {key: r[key] + 0.0 for key in keys}    # TypeError for "0.9"
        rows = [{"row": r["row"], **floats(r, numbers), **{part: floats(r[part], PARTS) for part in ("prompt", "answer")
                                                           if r.get(part)}} for r in stored["rows"]]
        json.dumps(rows, allow_nan=False)                        # ValueError
        shares = [r["branches"] for r in stored["rows"] if "branches" in r]
        sizes = {(r["row"], len(part)) for r in stored["rows"] if "branches" in r       # --dense may be a deeper model
                 for part in (r["branches"]["prompt"], *r["branches"].values())}
        shares = [x for parts in shares for part in parts.values() for x in part]
        if (all(r["n"] >= 1 and 0 <= r["accuracy"] <= 1 and isinstance(r["row"], str) for r in rows)
                and len(dict(sizes)) == len(sizes) and all(dict(sizes).values()) and all(0 <= x <= 1 for x in shares)
                and isinstance(stored.get("made_with", {}), dict)):
            return stored, rows, Path(stored["settings"]["model"])
    except (AttributeError, KeyError, TypeError, OverflowError):
        pass
    raise ValueError


OWN = ("GateSkip", "model")                                      # rows of the --model itself, with gates and without


def rows_of(file):
    """(the rows of an eval.json's own model, the path of that). InputError if this program did not write it."""
    try:
        stored, rows, model = read_rows(file)
    except (OSError, ValueError):
        raise InputError(f"--compare {file} is no eval.json of this program: give one from another run's "
                         "--out") from None
    if not stored.get("complete", True):
        print(f"--compare {file} is of a sweep that was not finished", file=sys.stderr)
    return [r for r in rows if r["row"] in OWN], model


def joined(sweeps):
    """Rows of one picture. sweeps: [(rows, path of their model, folder of their eval.json)]; their own rows are named
    after the model, with as much of its path as tells them apart, or of the folder's, if one model is there twice."""
    _, *places = zip(*sweeps)
    ends = (["/".join(Path(path).absolute().parts[-n:]) for path in paths] for paths in places for n in range(1, 99))
    names = next((names for names in ends if len(set(names)) == len(names)), range(len(sweeps)))
    return [{**r, "row": f"{r['row']}, {name}"} if r["row"] in OWN else r
            for (rows, *_), name in zip(sweeps, names) for r in rows]


def check_compared(file, made_with):
    """Say on stderr where a --compare file was measured on something else, or, of an earlier version, on who knows."""
    was = read_json(file).get("made_with", {})
    if differs := [f"{key} {was.get(key, 'unknown')}, here {made_with[key]}"
                   for key in ("data", "problems", "max new tokens") if was.get(key) != made_with[key]]:
        print(f"CAUTION: --compare {file} was measured otherwise ({'; '.join(differs)})", file=sys.stderr)


def open_sweep(file, settings, made_with, wanted, overwrite=False):
    """The sweep that `file` is to hold: a dict with the rows that are there already. Writes nothing.

    settings: of the command. made_with: all that changes a row's figures; None for what its rows do not depend on.
    wanted: [row name, budget] of each row. InputError where the file's rows were made with something else.
    """
    rows, missing = [], []
    if file.exists() and not overwrite:
        way_out = "choose another --out, or --overwrite it"
        try:
            stored = read_rows(file, MORE)[0]
            rows, was = list(stored["rows"]), stored["made_with"]
            missing = [[name, budget + 0.0] for name, budget in stored["missing"]]
        except (KeyError, TypeError, ValueError, OverflowError):
            raise InputError(f"{file} is damaged, of an earlier version, or no file of this program: "
                             f"{way_out}") from None
        if changed := [f"{key} {was.get(key)}, now {now}" for key, now in made_with.items()
                       if None not in (now, was.get(key, "unknown")) and was.get(key) != now]:
            raise InputError(f"{file} holds rows of other settings ({'; '.join(changed)}): {way_out}")
        made_with = {key: was.get(key) if now is None else now for key, now in made_with.items()}
    sweep = {"complete": False, "settings": settings, "made_with": made_with, "missing": missing + wanted, "rows": rows}
    return settle(sweep)


def settle(sweep):
    """What follows from the rows, brought up to date in place; returns the sweep."""
    done, names = [[r["row"], r["budget"]] for r in sweep["rows"]], dict.fromkeys(r["row"] for r in sweep["rows"])
    sweep["missing"] = [key for i, key in enumerate(sweep["missing"])
                        if key not in done and key not in sweep["missing"][:i]]
    sweep["complete"], sweep["at_exactly"] = not sweep["missing"], list(TARGETS)
    sweep["interpolated"], sweep["interpolated_macs"] = (
        {name: interpolate([(r[key], r["accuracy"]) for r in sweep["rows"] if r["row"] == name]) for name in names}
        for key in ("skipped", "macs_saved"))
    return sweep


def add_row(file, sweep, row):
    """Add a row and write the file, in one step: what was measured survives whatever comes next."""
    sweep["rows"].append(row)
    write(file, json.dumps(settle(sweep), indent=1))
