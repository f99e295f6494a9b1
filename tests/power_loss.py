"""Power loss for real: a run on an ext4 image whose file is copied at random instants. By hand, as root, five minutes:

    python tests/power_loss.py [CHECKOUT]

A copy is what a machine that stops hard at that instant would leave: the file holds what the kernel has sent to the
disk, and nothing of what it still keeps in memory. Each copy is mounted, which replays the journal, and resumed. It
must go on from the newest step that `latest` had named by then, or from the one before it, and equal the unbroken run
bit for bit. CHECKOUT: another version of train.py, to see it fail. Exit code 0 if all copies are good.
"""
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
COPIES, SAVES, EVERY = 20, 20, 60                                # the first copy may come after the second save
FLAGS = (f"--data arithmetic --gate scalar --batch-size 4 --steps {2 * SAVES * EVERY} --warmup 50 "
         f"--save-every {EVERY} --device cpu")


@contextmanager
def mounted(image):
    """The folder where the image is mounted."""
    with tempfile.TemporaryDirectory() as place:
        subprocess.run(["mount", "-o", "loop", image, place], check=True)
        try:
            yield Path(place)
        finally:
            subprocess.run(["umount", place], check=True)


@contextmanager
def training(checkout, out, *more):
    """train.py in a process that is killed in the end; what it says is in process.log."""
    with tempfile.TemporaryFile("w+") as log:
        command = [sys.executable, checkout / "train.py", *FLAGS.split(), "--out", out, *more]
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
        process.log = log
        try:
            yield process
        finally:
            process.kill()
            process.wait()


@contextmanager
def stopped(process):
    process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        process.send_signal(signal.SIGCONT)


def newest(out, than=0, process=None):
    """The number of the step that `latest` names, once it is above `than`; 0 if the process has ended before."""
    while process is None or process.poll() is None:
        named = (out / "latest").read_text().strip()[5:] if (out / "latest").exists() else "0"
        if named.isdigit() and int(named) > than or process is None:
            return int(named) if named.isdigit() else 0
        time.sleep(0.02)
    return 0


def image_at_this_instant(image):
    """Its bytes, all of one instant: read twice, until nothing was written in between."""
    last = image.read_bytes()
    while (now := image.read_bytes()) != last:
        last = now
    return last


def content(out, step):
    """All that a step consists of."""
    folder = out / f"step-{step:06d}"
    state = torch.load(folder / "train_state.pt", weights_only=True)
    moments = [value for entry in state["optimizer"]["state"].values() for value in entry.values()]
    return ((folder / "model.safetensors").read_bytes(), (folder / "config.json").read_bytes(),
            (folder / "tokenizer.json").read_bytes(), [m.numpy().tobytes() for m in (*moments, state["rng"])],
            (out / "metrics.jsonl").read_text().splitlines()[:step])


def check(copy, checkout, announced, unbroken):
    """What is wrong with a copy of the image, or None."""
    with mounted(copy) as place:
        out = place / "run"
        found = newest(out)
        if found not in (announced, announced - EVERY):
            return f"latest names step {found}"
        try:
            if content(out, found) != unbroken[found]:
                return f"step {found} is another"
        except Exception as error:  # whatever half a file leads to
            return f"step {found}: {type(error).__name__}: {error}"
        with training(checkout, out, "--resume") as process:
            reached = newest(out, found, process)
            if not reached:
                process.log.seek(0)
                return f"does not resume: {process.log.read().splitlines()[-1]}"
        return None if content(out, reached) == unbroken[reached] else f"step {reached} differs after the resume"


def main():
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))      # unmounts
    checkout = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT).resolve()
    with tempfile.TemporaryDirectory() as home:
        image, unbroken, copies, step = Path(home) / "disk.img", {}, [], 0
        with training(checkout, Path(home) / "run") as process:  # what each step is, two more than are needed
            while len(unbroken) < SAVES + 2:
                step = newest(Path(home) / "run", step, process)
                with stopped(process):
                    unbroken[step] = content(Path(home) / "run", step)
        subprocess.run(["truncate", "-s", "96M", image], check=True)
        subprocess.run(["mkfs.ext4", "-q", image], check=True)
        with mounted(image) as place, training(checkout, place / "run") as process:
            newest(place / "run", EVERY, process)
            pace = (SAVES - 2) * EVERY / COPIES                  # steps from one copy to the next, on average
            due = 2 * EVERY + random.uniform(0, 2 * pace)
            while len(copies) < COPIES:
                lines = (place / "run" / "metrics.jsonl").read_bytes().count(b"\n")
                if lines < due:
                    time.sleep(random.uniform(0, 0.02))
                    continue
                with stopped(process):
                    announced = newest(place / "run")
                    copies.append((Path(home) / f"{len(copies)}.img", announced, lines))
                    copies[-1][0].write_bytes(image_at_this_instant(image))
                due += random.uniform(0, 2 * pace)
            print(f"{COPIES} copies during {announced // EVERY} saves")
        bad = 0
        for number, (copy, announced, lines) in enumerate(copies, 1):
            wrong = check(copy, checkout, announced, unbroken)
            bad += wrong is not None
            print(f"copy {number} in step {lines}, step {announced} announced: {wrong or 'good'}", flush=True)
            os.unlink(copy)
    print(f"{COPIES - bad} of {COPIES} copies are good")
    return bad > 0


if __name__ == "__main__":
    sys.exit(main())
