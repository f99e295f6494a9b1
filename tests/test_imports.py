"""The house: imports run one way, lines end at 120, nothing is imported for nothing."""
import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = {path.stem for path in ROOT.glob("*.py")}
MEASURE = {"answers", "bench", "bench_peer", "eval_gsm8k", "sweep"}
# what each room of the core may know of the others, design by design
ALLOWED = {
    "console": set(), "linear": set(), "rows": set(), "flags": {"console"}, "decoder_by_hand": set(),
    "by_hand": {"console", "decoder_by_hand"},
    "gates": {"console", "linear"}, "model": {"console", "gates", "rows", "linear"}, "savings": {"model", "gates"},
    "disk": {"console"}, "tokens": {"console"}, "problems": {"console"}, "read_data": {"console", "problems"},
    "thresholds": {"console", "gates"}, "price": {"gates"}, "read_config": {"console", "gates", "model"},
    "load_weights": {"console", "disk", "gates", "model", "read_config", "tokens"},
    "data": {"console", "disk", "flags", "problems", "read_data", "tokens"},
    "metrics": {"console", "disk"}, "adam_state": set(), "distill": {"console", "load_weights"},
    "dry_run": {"console", "data", "load_weights", "model", "read_config", "savings"},
    "checkpoint": {"console", "adam_state", "disk", "load_weights", "metrics"},
    "branches": {"console", "disk"}, "shards": {"console"},
    "skip_map": {"console", "disk", "gates", "savings"},
    "generate": {"console", "branches", "flags", "data", "gates", "load_weights", "rows", "savings", "skip_map",
                 "thresholds", "tokens"},
    "budgets": {"branches", "data", "gates", "generate", "load_weights", "savings", "thresholds"},
    "own_text": {"console", "data", "disk", "generate", "load_weights", "tokens"},
    "answers": {"console", "data", "tokens"}, "sweep": {"console", "disk", "load_weights"},
}
TORCH_ONLY = ("by_hand", "decoder_by_hand", "linear", "gates", "rows", "model", "savings", "thresholds", "price")


def imports(tree, everywhere=False):
    """The modules that a file imports when it is imported itself, or everywhere: in its functions too."""
    found, nodes = set(), list(tree.body)
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.split(".")[0])
        if everywhere or not isinstance(node, (ast.FunctionDef, ast.Lambda)):
            nodes += ast.iter_child_nodes(node)                  # into `if` and `try` and classes
    return found


def tree_of(name):
    return ast.parse((ROOT / f"{name}.py").read_text(encoding="utf-8"))


def circle(graph):
    """Those of {name: names} that need each other; empty if some order puts each behind all that it needs."""
    left = dict(graph)
    while ready := [name for name, needs in left.items() if not needs & set(left)]:
        for name in ready:
            del left[name]
    return set(left)


def test_imports_are_found_wherever_they_stand():
    """A checker that looks at the top of a file only and is content."""
    tree = ast.parse("import a.b as c\nif c:\n    from d import e\ntry:\n    import f\nexcept ImportError:\n    pass\n"
                     "def g():\n    import h\nclass I:\n    import j\n    def k(self):\n        from l.m import n\n")
    assert imports(tree) == {"a", "d", "f", "j"} and imports(tree, everywhere=True) == {"a", "d", "f", "h", "j", "l"}
    assert circle({"a": {"b"}, "b": {"c"}, "c": set()}) == set()
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == {"a", "b", "c"}


@pytest.mark.parametrize("name", ALLOWED)
def test_a_room_knows_its_neighbours_only(name):
    """The paper's file that imports a command, or rows that know of gates: one idea that is no longer one idea."""
    assert imports(tree_of(name)) & OURS <= ALLOWED[name]


@pytest.mark.parametrize("name", TORCH_ONLY)
def test_the_idea_needs_torch_only(name):
    """A library that a reader of the paper's own files has to know first."""
    assert imports(tree_of(name), everywhere=True) - OURS - set(sys.stdlib_module_names) <= {"torch"}


def test_no_circles():
    """Two files that can only be understood together, or that hide it by importing each other in a function."""
    assert circle({name: imports(tree_of(name), everywhere=True) & OURS for name in OURS}) == set()


def test_nothing_imports_what_measures():
    """The core that needs the benchmark or the evaluation."""
    for name in OURS - MEASURE:
        assert not imports(tree_of(name), everywhere=True) & MEASURE, name


def test_nothing_imports_the_comparisons():
    """The core that needs paper/ or interop/, whose files stand beside it on the path: one of the core's names would
    hide the other."""
    scripts = {path.stem for room in ("paper", "interop") for path in (ROOT / room).glob("*.py")}
    assert {"answer_loss", "export"} <= scripts and not scripts & OURS
    for name in OURS:
        assert not imports(tree_of(name), everywhere=True) & (scripts | {"paper", "interop"}), name


# House rules, of every file.

def files():
    """Every .py file of the repository, new ones too; without a repository those that lie here."""
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", "*.py"], cwd=ROOT, capture_output=True,
                            text=True).stdout.split()
    found = [ROOT / name for name in listed] or [*ROOT.glob("*.py"), *ROOT.glob("tests/*.py")]
    return [path for path in found if path.exists()]


def unused(text):
    """Names that Python source imports and never mentions again."""
    nodes = list(ast.walk(ast.parse(text)))
    names = [(alias.asname or alias.name).split(".")[0] for node in nodes
             if isinstance(node, (ast.Import, ast.ImportFrom)) for alias in node.names]
    used = {node.id for node in nodes if isinstance(node, ast.Name)}             # of an attribute the first
    used |= {node.arg for node in nodes if isinstance(node, ast.arg)}            # fixtures
    used |= {node.value for node in nodes if isinstance(node, ast.Constant)}     # usefixtures("...")
    return [name for name in names if name not in used]


def test_lines_end_at_120():
    """A line that one must scroll to read."""
    assert len(files()) > 30
    assert [f"{path.name}:{i}" for path in files()
            for i, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1) if len(line) > 120] == []


def test_unused_imports_are_seen():
    """A checker that is content with anything."""
    assert unused("import a.b, c\nfrom d import e, f as g\nimport h\nc.x(y)\ndef i(h): return z.e") == ["a", "e", "g"]


def test_no_unused_imports():
    """An import that nobody needs, left behind by a move."""
    left_over = {path.name: unused(path.read_text(encoding="utf-8")) for path in files()}
    assert {name: names for name, names in left_over.items() if names} == {}


def test_imports_are_written_as_imports():
    """`__import__("json")` in the middle of a line: no search for imports finds it."""
    for path in files():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert "__import__" not in {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}, path
