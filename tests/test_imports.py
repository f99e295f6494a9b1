"""The house: imports run one way, lines end at 120, nothing is imported for nothing."""
import ast
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = {path.stem for path in ROOT.glob("*.py")}
# what each room of the core may know of the others, design by design
ALLOWED = {
    "console": set(), "linear": set(), "rows": set(), "flags": {"console"}, "decoder_by_hand": set(),
    "by_hand": {"console", "decoder_by_hand"},
    "gates": {"console", "linear"}, "model": {"console", "gates", "rows", "linear"}, "savings": {"model", "gates"},
    "thresholds": {"console", "gates"}, "load_weights": {"console", "gates", "model"}, "problems": {"console"},
    "data": {"console", "flags", "problems"}, "checkpoint": {"console", "load_weights"},
}


def imports(path, everywhere=False):
    """Our modules that a file imports, at its top or everywhere."""
    tree = ast.parse(path.read_text())
    nodes = ast.walk(tree) if everywhere else tree.body
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    return {name.split(".")[0] for name in names + [n.module for n in nodes if isinstance(n, ast.ImportFrom)]} & OURS


@pytest.mark.parametrize("name", ALLOWED)
def test_a_room_knows_its_neighbours_only(name):
    """The paper's file that imports a command, or rows that know of gates: what one idea needs is no longer one
    idea."""
    assert imports(ROOT / f"{name}.py") <= ALLOWED[name]


def test_no_circles():
    """Two files that can only be understood together."""
    left = {name: imports(ROOT / f"{name}.py") for name in OURS}
    while ready := [name for name, needs in left.items() if not needs & set(left)]:
        for name in ready:
            del left[name]
    assert not left


def test_nothing_imports_what_measures():
    """The core that needs the benchmark or the evaluation."""
    for name in OURS - {"bench", "bench_peer", "eval_gsm8k"}:
        assert not imports(ROOT / f"{name}.py", everywhere=True) & {"bench", "bench_peer", "eval_gsm8k"}, name


def tracked():
    names = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    return [ROOT / name for name in names] or [*ROOT.glob("*.py"), *ROOT.glob("tests/*.py")]       # no repository here


def test_lines_end_at_120():
    """A line that one must scroll to read."""
    long = [f"{path.name}:{i}" for path in tracked() if path.exists()
            for i, line in enumerate(path.read_text().splitlines(), 1) if len(line) > 120]
    assert long == []


def test_no_unused_imports():
    """An import that nobody needs, left behind by a move."""
    for path in tracked():
        tree = ast.parse(path.read_text())
        names = [(alias.asname or alias.name).split(".")[0] for node in ast.walk(tree)
                 if isinstance(node, (ast.Import, ast.ImportFrom)) for alias in node.names]
        used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        used |= {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}               # fixtures
        used |= {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}        # usefixtures("...")
        assert [name for name in names if name not in used] == [], path
