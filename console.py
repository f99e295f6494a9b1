"""What every command shares: one-line errors, the device, matplotlib, and the way out. Flags are in flags.py.

Every command begins by importing this file, which imports nothing slow, and ends in `run(main)`: in between, Ctrl-C, a
closed pipe and whatever the user can mend end the program with one line at most, and no traceback.
"""
import argparse
import os
import re
import shutil
import signal
import sys
import sysconfig
from pathlib import Path


class InputError(argparse.ArgumentTypeError, ValueError):
    """A mistake of the user's, told in one line with the way out; the commands print no traceback for it."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, as a cluster sends it before it kills: the same as Ctrl-C but for the exit code."""


given = {}                                                       # flag -> value, of the command line (flags.py)


def pick_device(name=None, dtype="float32", tf32=False):
    """(torch.device, torch.dtype), said aloud with the reason. InputError for a device that is not there."""
    import torch
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise InputError(f"--device {name} is no device that torch knows: cpu, cuda, cuda:1, ...") from None
    if device.type not in ("cpu", "cuda") or str(device).startswith("cpu:"):
        raise InputError(f"--device {name}: only cpu, cuda, cuda:1, ... have been tried; thresholds need float64")
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise InputError(f"--device {name}: torch sees no such GPU here; leave --device out")
    reason = "asked for" if name else "a GPU is here" if device.type == "cuda" else "no GPU here"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    exactly = "as on disk or cast to it" if device.type == "cpu" else "TF32 products" if tf32 else "no TF32"
    print(f"device: {device} ({reason}); {dtype} ({exactly}); gates and scores in float32 or wider", file=sys.stderr)
    return device, getattr(torch, dtype)


def check_compiler():
    """InputError unless torch.compile finds what it builds with: a C++ compiler, and Python's headers."""
    missing = {"C++ compiler (g++)": shutil.which((os.environ.get("CXX") or "g++").split()[0]),
               "Python.h (python3-dev)": Path(sysconfig.get_path("include"), "Python.h").exists()}
    for what, found in missing.items():
        if not found:
            raise InputError(f"--compile needs a {what} and there is none here: install it, or leave --compile out")


def pyplot():
    """matplotlib.pyplot, drawing to files; None, and one line that says so, where it is not installed."""
    try:
        import matplotlib
        matplotlib.use("Agg")
        from matplotlib import pyplot as plt
    except ImportError:
        return print("no picture: matplotlib is not installed (pip install matplotlib)")
    return plt


def told(error):
    """The one line of an error; an OSError about a file is told with the flag that named it, or a folder above it."""
    if not isinstance(error, OSError) or not isinstance(error.filename, (str, os.PathLike)):
        return str(error)
    path, nearest, named = Path(error.filename).absolute(), (False, 0), ""
    for flag, value in given.items():
        place = Path(value).absolute() if isinstance(value, str) and value else Path("/")
        above = place in (path, *path.parents)
        below = path in place.parents and os.sep in value        # a folder on the way to it could not be made
        if (above or below) and (above, len(place.parts)) > nearest and len(place.parts) > 1:
            nearest, named = (above, len(place.parts)), f"{flag} {value}: "
    return f"{named}{error.strerror}: {error.filename}"


def _terminated(process):
    if os.getpid() != process:                                   # forked by a library, whose pool ends so
        os._exit(143)
    raise Terminated


def run(main, interrupted="", out_of_memory="make the batch smaller"):
    """Run a command and leave the process. What the user can mend is one line on stderr, told after any progress bar.

    interrupted: what to say after Ctrl-C. out_of_memory: the way out of it. Exit code: what main returns; 1 after an
    error, 130 after Ctrl-C, 143 after SIGTERM, 141 where the reader of our output has gone, as after `| head`.
    """
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))    # closed: >&-
    for stream in (sys.stdout, sys.stderr):                      # a terminal may lack a character
        stream.reconfigure(errors="replace")
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:    # as under nohup
        signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_, mine=os.getpid(): _terminated(mine))
    try:
        try:
            status = main()
        finally:
            sys.stdout.flush()                                   # here, and not where nobody can catch what it raises
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 141
    except (InputError, OSError) as error:
        status = f"error: {told(error)}"
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, MemoryError) and not re.search("allocate memory|out of memory", str(error)):
            raise
        status = f"error: out of memory: {out_of_memory}"
    except KeyboardInterrupt as error:
        status = 143 if isinstance(error, Terminated) else 130
        if interrupted:
            print(f"\n{interrupted}", file=sys.stderr)
    for number in signal.SIGINT, signal.SIGTERM:                 # nothing is left to save
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    sys.exit(status)


# A command of ours is starting, and has imported nothing else yet: Ctrl-C has nothing to save before run() takes over.
_here, _names = Path(__file__).resolve().parent, "by_hand train generate data own_text eval_gsm8k bench bench_peer"
_commands = [*(_here / f"{name}.py" for name in _names.split()), *_here.glob("paper/*.py"), *_here.glob("interop/*.py")]
if (Path(getattr(sys.modules["__main__"], "__file__", None) or "/").resolve() in _commands
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler):
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
