"""The README does what it says: its worked example is run as a doctest, its commands are run at toy size."""
import doctest
import importlib.metadata
import re
import shlex
import shutil
import subprocess

import pytest

import bench
import budgets
import by_hand
import data
import eval_gsm8k
import generate
import train
from load_weights import save_model
from problems import arithmetic
from toy_runs import ROOT, toy

README = (ROOT / "README.md").read_text(encoding="utf-8")
# argparse takes the last value: what makes a command small enough for a test
SMALL = {"train.py": "--steps 2 --batch-size 4 --seq-len 160 --warmup 1 --save-every 2 --eval-limit 8",
         "eval_gsm8k.py": "--limit 4 --max-new-tokens 8 --budgets 1.0 0.8", "generate.py": "--max-new-tokens 8",
         "bench.py": "--repeats 1 --device cpu", "paper/gate_value.py": "--limit 4",
         "paper/answer_loss.py": "--limit 4"}


def readme_commands():
    """Every line of the README's ```sh blocks, `make demo` replaced by what it runs."""
    blocks = re.findall(r"```sh\n(.*?)```", README, flags=re.DOTALL)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines() if line.strip()]
    recipe = re.search(r"^demo: .*?\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)[1]
    demo = recipe.replace("\\\n", " ").replace("$(PY)", "python").splitlines()
    at = lines.index("make demo")
    return lines[:at] + [line.strip() for line in demo] + lines[at + 1:]


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A folder that looks like the repository: every model is a toy and every data set a handful of problems."""
    shutil.copytree(ROOT / "tests" / "golden", tmp_path / "tests" / "golden")
    folder = tmp_path / "examples" / "tiny-llama"
    model, tokenizer = toy(folder)
    save_model(model, folder, tokenizer)
    import pyarrow
    from pyarrow import parquet
    rows = [{"question": e.question, "answer": f"{e.reasoning}\n#### {e.answer}"} for e in arithmetic(40)]
    for name in ("train", "test"):
        path = tmp_path / "data" / "gsm8k" / "main" / f"{name}-00000-of-00001.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    for preset in train.PRESETS.values():
        monkeypatch.setitem(preset, "model", "examples/tiny-llama")
    for name in bench.BENCH_SHAPES:
        monkeypatch.setitem(bench.BENCH_SHAPES, name, model.config)
    monkeypatch.setattr(bench, "find_spec", lambda name: name)
    monkeypatch.setattr(bench, "bench_peer", lambda *_: [])      # transformers is no dependency
    monkeypatch.setattr(bench, "STEPS", 2)
    monkeypatch.setattr(budgets, "BUDGETS", (0.8,))
    monkeypatch.setattr(train, "HELD_OUT", 4)
    monkeypatch.setattr(budgets, "CONTINUE", 4)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_worked_example():
    """The four tokens by hand would show other numbers than the code gives."""
    result = doctest.testfile(str(ROOT / "README.md"), module_relative=False)
    assert result.attempted >= 10 and result.failed == 0


def test_commands(checkout, monkeypatch):
    """A README command that has gone stale: a flag renamed, a file moved, an order that cannot work."""
    import layer_diff
    monkeypatch.syspath_prepend(ROOT / "paper")
    import answer_loss
    import gate_value
    mains = {"train.py": train.main, "eval_gsm8k.py": eval_gsm8k.main, "generate.py": generate.main,
             "bench.py": bench.main, "data.py": data.main, "by_hand.py": lambda argv: by_hand.main(),
             "tests/layer_diff.py": layer_diff.main, "paper/gate_value.py": gate_value.main,
             "paper/answer_loss.py": answer_loss.main}
    ran = []
    for line in readme_commands():
        program, *argv = shlex.split(line)
        if program == "torchrun":                                # one process here: test_shards.py has two
            program, argv = "python", argv[argv.index("train.py"):]
        if program == "make":
            subprocess.run(["make", "-n", *argv], cwd=ROOT, check=True, capture_output=True)
        elif program == ".":                                     # the environment that make has made
            assert argv == [".venv/bin/activate"]
        elif program == "hf":                                    # needs the network: at least it is installed
            assert "hf" in {e.name for e in importlib.metadata.entry_points(group="console_scripts")}, line
        else:
            assert program == "python", f"the README runs {line!r}, which this test does not know"
            script = argv.pop(0)
            extra = [] if "--dry-run" in argv else shlex.split(SMALL.get(script, ""))
            assert mains[script](argv + extra) in (0, None), line
        ran.append(program if program != "python" else script)
    assert {"make", "hf", *mains} <= set(ran)


def test_every_flag_is_real():
    """Prose that names a flag which no command has."""
    commands = ("train.py", "generate.py", "eval_gsm8k.py", "data.py", "bench.py", "flags.py")
    parsers = " ".join((ROOT / name).read_text() for name in commands)
    for flag in set(re.findall(r"`(--[a-z0-9-]+)", README)):
        assert f'"{flag}"' in parsers, flag


def test_pictures_and_files_exist():
    """A picture or a file that the README shows and the repository lacks."""
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", README)
    cells = re.findall(r"^\| (`[\w./]+`(?:, `[\w./]+`)*) \|", README, flags=re.MULTILINE)   # one file, or several
    for name in pictures + re.findall(r"[\w./]+", " ".join(cells)):
        assert (ROOT / name).exists(), name
    assert pictures and len(cells) > 10
