"""The rules of the repository: what may import what, where files lie, how long they are, and which words they use.

What the files of `core` may import is in `core/test_imports.py`.
"""

import ast
import re
from graphlib import TopologicalSorter

import pytest
from helpers.paths import ROOT

PACKAGE = ROOT / "hf_smoothing"
ALLOWED = {
    "core": set(),
    "utils": set(),
    "metrics": {"core", "utils"},
    "data": {"core", "utils"},
    "runs": {"core", "utils", "data"},
    "training": {"core", "utils", "metrics", "data", "runs"},
    "reporting": {"core", "utils", "metrics", "data", "runs"},
}
UPPER = {"core", "utils", "metrics", "data", "runs", "training", "reporting"}
ALLOWED |= {
    "count_head": UPPER,
    "diagnostics": UPPER,
    "hub": UPPER | {"count_head"},
    "space": UPPER | {"count_head", "diagnostics", "hub"},
    "cli": UPPER | {"count_head", "diagnostics", "hub", "space"},
}
"""Folders of the package, and the folders from which their files may import."""

MODULES = sorted(PACKAGE.rglob("*.py"))
CODE = [*MODULES, *sorted((ROOT / "scripts").rglob("*.py"))]
CARDS = sorted(ROOT.glob("model_cards/*/README.md"))
GUIDES = [PACKAGE / "README.md", ROOT / "scripts" / "README.md", ROOT / "model_cards" / "README.md"]


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES = {module_name(path): path for path in MODULES}


def imported_modules(path, at_start=False):
    """
    The modules of the package that a file imports.

    Args:
        path: of the file.
        at_start: leave out imports inside functions and those for type checkers.
    """
    tree = ast.parse(path.read_text())
    if at_start:
        for node in ast.walk(tree):
            type_checking = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or type_checking:
                node.body = []
    package = module_name(path).split(".")
    package = package if path.name == "__init__.py" else package[:-1]
    modules = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *(node.module or "").split(".")]).strip(".")
            modules |= {f"{source}.{alias.name}" for alias in node.names} | {source}
    return {name for name in modules if name in NAMES and NAMES[name] != path}


def test_imports_between_folders_point_one_way():
    wrong = []
    for path in MODULES:
        folder = path.relative_to(PACKAGE).parts[0]
        for name in imported_modules(path):
            target = NAMES[name].relative_to(PACKAGE).parts[0]
            # the package itself holds no code, only public names
            if folder != "__init__.py" and target not in {folder, "__init__.py", *ALLOWED[folder]}:
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert wrong == []


def test_no_modules_import_each_other():
    graph = {module_name(path): imported_modules(path, at_start=True) for path in MODULES if path.parent != PACKAGE}
    for name in graph:
        graph[name] &= {other for other in graph if NAMES[other].name != "__init__.py"}
    TopologicalSorter(graph).prepare()  # raises CycleError


def test_every_file_lies_in_its_folder():
    entries = {path.name for path in PACKAGE.iterdir() if path.name != "__pycache__"}
    assert entries - set(ALLOWED) <= {"__init__.py", "README.md", "py.typed"}
    assert set(ALLOWED) <= entries
    tests = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert tests <= {*ALLOWED, "end_to_end", "helpers"}


@pytest.mark.parametrize("path", CODE, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_are_short(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            start = node.body[1].lineno if ast.get_docstring(node) and len(node.body) > 1 else node.body[0].lineno
            signature = node.body[0].lineno - node.lineno
            assert node.end_lineno - start + 1 + signature <= 80, f"{node.name} is too long"


@pytest.mark.parametrize("path", [ROOT / "README.md", *CARDS], ids=lambda path: str(path.relative_to(ROOT)))
def test_readme_and_cards_are_short(path):
    body = re.sub(r"\A---\n.*?\n---\n", "", path.read_text(), flags=re.DOTALL)
    assert len(body.splitlines()) <= 150


def test_the_guides_are_there():
    assert [path.relative_to(ROOT) for path in GUIDES if not path.is_file()] == []


WORDS = {
    "resume": r"(goes|go|going|gone|went) on (with|where|from)|goes on\b|begun? anew|(starts?|trained) anew",
    "fix": r"\bmend(s|ed|ing)?\b",
    "compute": r"\breckon",
    "work queue": r"\bcrew\b",
    "after the noise": r"behind the noise",
    "per image": r"\b(draws|passes|rows?|seconds|records?) an image\b",
    "distribute": r"\b(hand|hands|handed) (out|images)\b",
    "of": r"\bof which\b|\bfor one in\b|\bis to be\b|\bwhat it is to\b",
    "a local name of what it holds": r"^\s*found\b[^=\n]*=[^=]",
}
"""What to write, and what not."""

TEXTS = [
    path
    for folder in ("hf_smoothing", "scripts", "model_cards")
    for path in sorted((ROOT / folder).rglob("*"))
    if path.suffix in (".py", ".jinja", ".md") and path.is_file() and "results" not in path.parts
]


@pytest.mark.parametrize("word", WORDS)
def test_one_word_for_one_thing(word):
    pattern = re.compile(WORDS[word], re.IGNORECASE | re.MULTILINE)
    uses = []
    for path in [ROOT / "README.md", *TEXTS]:
        if path.is_symlink():
            continue
        uses += [
            f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
            for number, line in enumerate(path.read_text().splitlines(), 1)
            if pattern.search(line)
        ]
    assert uses == []
