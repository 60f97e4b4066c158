"""What importing the package and asking for help imports."""

import ast
import subprocess
import sys
from pathlib import Path

import hf_smoothing

HELP = """
import sys
sys.argv = ["hf-smoothing"]
from typer.main import get_command
from typer.testing import CliRunner
from hf_smoothing.cli.app import app
for name in (None, *get_command(app).commands):
    shown = CliRunner().invoke(app, [*([name] if name else []), "--help"])
    assert shown.exit_code == 0, shown.output
    heavy = {"torch", "transformers", "datasets", "scipy"} & sys.modules.keys()
    assert not heavy, f"the help of {name or 'hf-smoothing'} imports {heavy}"
print("certify-dataset" in get_command(app).commands)
"""


def test_help_imports_neither_torch_nor_transformers():
    done = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("True\n", "")


def test_the_installed_command_starts():
    done = subprocess.run([Path(sys.executable).with_name("hf-smoothing"), "--help"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "certify-dataset" in done.stdout


def test_public_names_are_those_that_type_checkers_see():
    tree = ast.parse(Path(hf_smoothing.__file__).read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    seen = {alias.name: node.module for node in block.body for alias in node.names}
    assert seen == hf_smoothing._MODULES
    assert sorted(seen) == hf_smoothing.__all__
    for name, module in seen.items():
        value = getattr(hf_smoothing, name)
        assert getattr(value, "__module__", f"hf_smoothing.{module}").startswith(f"hf_smoothing.{module}")
    assert set(hf_smoothing.__all__) <= set(dir(hf_smoothing))
