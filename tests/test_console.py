"""Tests of console.py: flags and their types, the device, errors in one line, and how a command ends."""
import importlib
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import console
from console import InputError, Terminated, pick_device, pyplot, run, told
from flags import Parser, real, seed_number, whole

ROOT = Path(console.__file__).resolve().parent
COMMANDS = ("data.py", "train.py", "generate.py", "eval_gsm8k.py", "bench.py")


@pytest.fixture(autouse=True)
def state(monkeypatch):
    """What parsers and run() leave behind in the process is put back."""
    monkeypatch.setattr(console, "given", {})
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def parsed(*words, **flags):
    """What a parser with these flags, {name: keywords of add_argument}, makes of a command line."""
    p = Parser("A command.")
    for name, how in flags.items():
        p.add_argument(f"--{name.replace('_', '-')}", **how)
    return p.parse_args([str(word) for word in words])


# Flags.

@pytest.mark.parametrize("convert, good, bad", [
    (whole(1), {"1": 1, "007": 7, "123456789": 123456789}, ["0", "-1", "1.0", "1e3", "nan", "inf", "", "one"]),
    (whole(2, 4), {"2": 2, "4": 4}, ["1", "5"]),
    (seed_number, {"0": 0, str(2 ** 63 - 1): 2 ** 63 - 1}, ["-1", str(2 ** 63), "9" * 5000]),
    (real(), {"0": 0.0, "1e-3": 1e-3, "7": 7.0}, ["-1e-9", "nan", "inf", "-inf", "1e999", "", "x", "1,5"]),
    (real(above=True), {"1e-9": 1e-9}, ["0", "0.0", "-1", "nan", "inf"]),
    (real(0, 1), {"0": 0.0, "1": 1.0}, ["-0.1", "1.1", "nan"]),
    (real(0, 1, above=True), {"0.5": 0.5, "1": 1.0}, ["0", "1.001"]),
], ids=["whole", "whole range", "seed", "real", "above", "share", "share above"])
def test_numbers_and_their_bounds(convert, good, bad):
    """A bound that is off by one, NaN that passes every comparison, an infinite rate, text that ends in a traceback."""
    for text, value in good.items():
        assert convert(text) == value and type(convert(text)) is type(value)
    for text in bad:
        with pytest.raises(InputError) as error:
            convert(text)
        assert "\n" not in str(error.value) and "number" in str(error.value)


def test_seeds_are_what_generators_take():
    """A seed that passes the flag and that torch then refuses with a traceback."""
    torch.Generator().manual_seed(seed_number(str(2 ** 63 - 1)))


@pytest.mark.parametrize("words, complaint", [
    (["--n", "0"], "--n: '0' must be"), (["--n", "x"], "--n: 'x' must be"), (["--n"], "--n: expected one argument"),
    (["--rate", "nan"], "--rate: 'nan' must be"), (["--kind", "c"], "--kind: invalid choice: 'c'"),
    (["--nope"], "--nope"), (["stray"], "stray")])
def test_a_bad_flag_is_one_line_that_names_it(words, complaint):
    """argparse's page of usage, or a complaint without the flag: "'0' must be at least 1", but what?"""
    with pytest.raises(InputError) as error:
        parsed(*words, n=dict(type=whole(1)), rate=dict(type=real()), kind=dict(choices="ab"))
    text = str(error.value)
    assert complaint in text and text.endswith("; --help lists the flags") and "\n" not in text


def test_help_shows_defaults_where_there_are_any(capsys):
    """(default: None), which says nothing; a default that is set and not shown."""
    with pytest.raises(SystemExit) as stop:
        parsed("--help", out=dict(help="a folder"), files=dict(default=[], nargs="+", help="several"),
               steps=dict(type=int, default=7, help="how many"), seed=dict(type=int, default=0, help="of all"))
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0 and "A command." in text and "a folder --files" in text
    assert "several --steps" in text and "how many (default: 7)" in text and "of all (default: 0)" in text


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command(command, capsys):
    """A --help that crashes on a per cent sign, or shows a default of None or []."""
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(command.removesuffix(".py")).main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0 and "--help" in text and not re.search(r"\(default: (None|\[\])\)", text)


# The machine.

def test_device_and_reason_are_said(capsys, monkeypatch):
    """A run on another device than one thinks."""
    assert pick_device("cpu", "bfloat16") == (torch.device("cpu"), torch.bfloat16)
    assert capsys.readouterr().err.startswith("device: cpu (asked for); bfloat16")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device()[0].type == "cpu" and "(no GPU here)" in capsys.readouterr().err
    for name in ("abacus", "cuda", "mps", "cpu:7"):
        with pytest.raises(InputError, match=f"--device {name}"):
            pick_device(name)


def test_a_gpu_that_is_here_is_taken(capsys, monkeypatch):
    """A GPU left idle without a word; the second of two refused; the third of two found out in mid-run."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device()[0] == torch.device("cuda") and "device: cuda (a GPU is here)" in capsys.readouterr().err
    assert pick_device("cuda:1")[0] == torch.device("cuda:1") and "(asked for)" in capsys.readouterr().err
    with pytest.raises(InputError, match="--device cuda:2: torch sees no such GPU"):
        pick_device("cuda:2")


def test_tf32_is_said_and_set_both_ways(capsys):
    """Rounded products that nobody asked for, because an earlier call left them on; said of a CPU, which has none."""
    for tf32 in (True, False):
        pick_device("cpu", tf32=tf32)
        assert "float32 (as on disk or cast to it)" in capsys.readouterr().err
        assert torch.backends.cuda.matmul.allow_tf32 is torch.backends.cudnn.allow_tf32 is tf32


def test_pictures_need_no_display(capsys, monkeypatch):
    """A window on a machine that has no screen; a traceback at the end of a long run where matplotlib is missing."""
    assert pyplot().get_backend().lower() == "agg" and capsys.readouterr().out == ""
    monkeypatch.setitem(sys.modules, "matplotlib", None)         # makes `import matplotlib` fail
    assert pyplot() is None
    assert capsys.readouterr().out == "no picture: matplotlib is not installed (pip install matplotlib)\n"


# Errors in one line.

def test_told_names_the_flag_of_a_file(tmp_path, monkeypatch):
    """An errno without the file, a file without the flag that is to be changed, or the flag of another file."""
    monkeypatch.chdir(tmp_path)
    parsed("--out", "run", "--plot", tmp_path / "run" / "pictures", "--n", "3", "--name", "",
           "--json", "made/by/us", out={}, plot={}, n=dict(type=int), name={}, json={}, log={})
    def of(file):
        return told(PermissionError(13, "Permission denied", file))
    assert of("run") == "--out run: Permission denied: run"                                  # the file itself
    assert of("run/step-1/x") == "--out run: Permission denied: run/step-1/x"                # a file in its folder
    inside = tmp_path / "run" / "pictures" / "x.png"
    assert of(inside) == f"--plot {tmp_path}/run/pictures: Permission denied: {inside}"      # the longest of two
    assert of("made") == "--json made/by/us: Permission denied: made"                        # a folder on the way to it
    assert of(tmp_path / "run") == f"--out run: Permission denied: {tmp_path / 'run'}"       # not the way to --plot
    assert of("runs/x") == "Permission denied: runs/x"                                       # a name is no prefix
    assert of(tmp_path.parent / "x") == f"Permission denied: {tmp_path.parent / 'x'}"        # nor is --name ""


def test_told_of_what_is_about_no_file():
    """"None: None" for an error without a file."""
    parsed("--out", "run", out={})
    assert told(InputError("--n: too large")) == "--n: too large"
    assert told(OSError(28, "No space left on device")) == "[Errno 28] No space left on device"
    assert told(OSError("model.safetensors: I/O error")) == "model.safetensors: I/O error"
    assert told(OSError(9, "Bad file descriptor", 3)) == "[Errno 9] Bad file descriptor: 3"  # a number, no name


# How a command ends.

def ended(main, **how):
    """What run(main) gives to sys.exit: a code, or a text, which is printed and exits with 1."""
    with pytest.raises(SystemExit) as stop:
        run(main, **how)
    return stop.value.code


def raising(error):
    def main():
        raise error
    return main


def test_normal_codes(capsys):
    """An exit code that is lost, so that a script goes on after what went wrong; --help that counts as a failure."""
    assert [ended(lambda: code) for code in (None, 0, 1, 2)] == [None, 0, 1, 2]
    assert ended(lambda: parsed("--help")) == 0 and capsys.readouterr().err == ""


def test_mistakes_are_one_line(tmp_path):
    """A page of traceback for a mistyped flag or path."""
    assert ended(lambda: parsed("--n", "0", n=dict(type=whole(1)))).startswith("error: --n: '0' must be a whole number")
    assert ended(raising(InputError("too short"))) == "error: too short"
    file = tmp_path / "none" / "file"

    def main():
        file.write_text(parsed("--out", file, out={}).out)
    assert ended(main) == f"error: --out {file}: No such file or directory: {file}"


def test_ctrl_c_unwinds_and_says_what_was_saved(capsys):
    """A handler for the imports that is still there: no `finally` runs, no lock is let go, no last words."""
    heard = []
    signal.signal(signal.SIGINT, lambda *_: heard.append("the imports' handler"))

    def main():
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            heard.append("cleaned up")
    assert ended(main, interrupted="interrupted: --resume goes on") == 130
    assert heard == ["cleaned up"] and capsys.readouterr().err == "\ninterrupted: --resume goes on\n"
    assert ended(main) == 130 and capsys.readouterr().err == ""


def test_sigterm_is_as_ctrl_c(capsys):
    """A cluster's SIGTERM that ends the program in the middle of a write, without a word of what was saved."""
    unwound = []

    def main():
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            unwound.append(True)
    assert ended(main, interrupted="saved") == 143 and unwound and capsys.readouterr().err == "\nsaved\n"


def test_a_forked_process_ends_in_silence(capfd):
    """A data library's pool: each of its workers tells of the SIGTERM that ends it, by a traceback."""
    def main():
        with multiprocessing.get_context("fork").Pool(1) as pool:
            assert pool.map(abs, [-1]) == [1]
        pool.join()
    assert ended(main, interrupted="saved") is None and capfd.readouterr().err == ""


def test_nohup_stays_in_force():
    """A run under nohup, or in the background of a script, that the Ctrl-C for another program ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    assert ended(lambda: signal.raise_signal(signal.SIGINT)) is None
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_a_signal_after_the_end_is_quiet():
    """A second SIGTERM while the interpreter leaves, whose exception nobody is there to catch."""
    for main in (lambda: None, raising(Terminated())):
        ended(main)
        assert signal.getsignal(signal.SIGTERM) == signal.getsignal(signal.SIGINT) == signal.SIG_DFL


@pytest.mark.parametrize("main", [
    raising(MemoryError()), raising(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0")),
    lambda: torch.empty(2 ** 50)], ids=["Python's", "GPU's", "CPU's"])
def test_out_of_memory_is_told_with_the_way_out(main):
    """A page of C++ in place of the flag that would help."""
    assert ended(main) == "error: out of memory: make the batch smaller"
    assert ended(main, out_of_memory="lower --batch-size") == "error: out of memory: lower --batch-size"


@pytest.mark.parametrize("error", [RuntimeError("shapes cannot be multiplied"), KeyError("step"), ValueError("7")])
def test_bugs_keep_their_traceback(error):
    """A bug of ours told as a mistake of the user's, in one line and without a place."""
    with pytest.raises(type(error)) as caught:
        run(raising(error))
    assert caught.value is error


# The same, in processes of their own.

def start(*command, **how):
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "cwd": ROOT, **how}
    return subprocess.Popen([sys.executable, *map(str, command)], text=True, **how)


def test_codes_and_streams_of_a_process(tmp_path):
    """An error on standard output or with exit code 0; a name in another alphabet that ends in a traceback."""
    (tmp_path / "a.txt").write_text("Thr\u00e9e.", encoding="utf-8")
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}    # as on a terminal without accents
    right = start("data.py", "--data", tmp_path / "a.txt", env=environment)
    wrong = start("data.py", "--data", "\u00e9.txt", env={**environment, "PYTHONUTF8": "1"})
    assert right.communicate() == ("Thr?e.\n\n", "") and right.returncode == 0
    assert wrong.communicate() == ("", "error: ?.txt: cannot be read: No such file or directory\n")
    assert wrong.returncode == 1


def test_closed_pipes_are_quiet():
    """`python data.py --n 20000 | head -1`: a traceback, or "Exception ignored in", after the line that was wanted."""
    head, others = start("data.py", "--n", 2_000), {}
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    for command in COMMANDS:
        reader, writer = os.pipe()
        os.close(reader)                                         # nobody is there from the start
        others[command] = start(command, "--help", stdout=writer, env=buffered)
        os.close(writer)
    assert head.stdout.readline().startswith("Question: ")
    head.stdout.close()
    assert head.stderr.read() == "" and head.wait() == 141
    for command, process in others.items():
        assert (process.communicate()[1], process.returncode) == ("", 141), command


INTERRUPT = """
import os, signal, sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == os.environ["INTERRUPT_AT"]:
            Swallowed() if "SWALLOWED" in os.environ else signal.raise_signal(signal.SIGINT)

class Swallowed:
    def __del__(self):                                           # what it raises is printed, and the program goes on
        signal.raise_signal(signal.SIGINT)

signal.signal(signal.SIGINT, signal.default_int_handler)
sys.meta_path.insert(0, Finder())
"""


@pytest.mark.parametrize("command, module, how", [
    *[(command, "torch", "RAISED") for command in (*COMMANDS, "bench_peer.py")],
    ("data.py", "torch", "SWALLOWED"),                           # as in C, or in a destructor
    ("data.py", "tokenizers", "RAISED"), ("data.py", "problems", "RAISED"),                  # the last import of all
    ("data.py --data a.parquet", "pyarrow", "RAISED")])          # in main: run's own
def test_ctrl_c_is_quiet_from_the_first_import_on(command, module, how, tmp_path):
    """Ctrl-C in the seconds that torch takes to load: a page of traceback, or a program that goes on all the same."""
    (tmp_path / "sitecustomize.py").write_text(INTERRUPT)        # which Python imports first
    file, *flags = command.split()
    (tmp_path / "a.parquet").touch()
    process = start(ROOT / file, *flags, cwd=tmp_path,
                    env={**os.environ, "PYTHONPATH": str(tmp_path), "INTERRUPT_AT": module, how: "1"})
    assert process.communicate() == ("", "") and process.returncode == 130


def test_only_our_commands_get_the_handler(tmp_path):
    """`import console` in a notebook, a test or a program of the user's that takes its Ctrl-C away from it."""
    assert getattr(signal.getsignal(signal.SIGINT), "__module__", None) != "console"         # this is pytest
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    show = (f"import signal, sys; sys.path.insert(0, {str(ours)!r}); import console; "
            "handler = signal.getsignal(signal.SIGINT); print(handler.__module__, repr(handler))")
    for folder in (ours, theirs):
        folder.mkdir()
        (folder / "train.py").write_text(show)
    shutil.copy(console.__file__, ours)
    (ours / "my_experiment.py").write_text(show)                 # a program of the user's, beside ours
    (theirs / "link.py").symlink_to(ours / "train.py")

    def handler(*command, before=signal.SIG_DFL):
        process = start(*command, cwd=tmp_path, preexec_fn=lambda: signal.signal(signal.SIGINT, before))
        out, err = process.communicate()
        assert err == "" and process.returncode == 0
        return out
    for command in ("ours/train.py", ours / "train.py", "theirs/../ours/train.py", "theirs/link.py"):
        assert handler(command).startswith("console "), command
    for command in (["theirs/train.py"], ["ours/my_experiment.py"], ["-c", show]):
        assert "default_int_handler" in handler(*command), command
    assert "SIG_IGN" in handler("ours/train.py", before=signal.SIG_IGN)                      # as under nohup


def test_errors_name_only_flags_that_are_paths(tmp_path, monkeypatch):
    """--dtype blamed for a folder that cannot be read, a folder on the way to --json that goes unnamed, a bare word."""
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(console, "given", {"--dtype": "float32", "--json": "file/rows.json"})
    assert told(NotADirectoryError(20, "Not a directory", "file")) == "--json file/rows.json: Not a directory: file"
    monkeypatch.setattr(console, "given", {"--dtype": "float32"})
    assert told(PermissionError(13, "Permission denied", str(tmp_path))) == f"Permission denied: {tmp_path}"
    p = Parser("A command.")
    p.add_argument("model")
    assert p.parse_args(["here"]).model == "here" and console.given["model"] == "here"
    with pytest.raises(InputError) as error:
        p.parse_args(["a", "b\nc"])
    assert "\n" not in str(error.value)


def test_half_a_matplotlib_is_none(capsys, monkeypatch):
    """A traceback at the end of a run from a matplotlib that imports and cannot draw."""
    monkeypatch.delattr(sys.modules[pyplot().__package__], "pyplot")
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    assert pyplot() is None and capsys.readouterr().out.startswith("no picture: ")


def test_a_closed_output_is_no_error(tmp_path):
    """`python data.py >&-`: sys.stdout is None, and None has no reconfigure."""
    done = subprocess.run(f"exec {sys.executable} data.py --n 1 >&-", shell=True, cwd=ROOT, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (0, b"")
    command = f"exec {sys.executable} generate.py --model examples/tiny-llama --prompt 1 --max-new-tokens 1 2>&-"
    done = subprocess.run(command, shell=True, cwd=ROOT, stdout=subprocess.PIPE)
    assert done.returncode == 0 and b"MACs saved" in done.stdout
