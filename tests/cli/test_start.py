"""What importing the package and asking for help imports."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

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
    heavy = {"torch", "transformers", "datasets", "matplotlib", "gradio", "scipy"} & sys.modules.keys()
    assert not heavy, f"the help of {name or 'hf-smoothing'} imports {heavy}"
print("certify-dataset" in get_command(app).commands)
"""


def test_help_imports_neither_torch_nor_transformers():
    done = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("True\n", "")


WRONG = """
import sys
sys.argv = ["hf-smoothing", *sys.argv[1:]]
from hf_smoothing.cli.app import app
try:
    app()
finally:
    heavy = {"torch", "transformers", "datasets", "matplotlib", "gradio", "accelerate", "scipy"} & sys.modules.keys()
    print(*heavy)
"""
MODEL = "model_cards/mixed-noise-vit-nano-cifar10"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["certify", "gone.png", "--model", MODEL], "There is no image at 'gone.png'"),
        (["certify", __file__, "--model", "./gone"], "There is no './gone' here"),
        (["certify", __file__, "--model", MODEL, "--count-head", "/gone/head"], "There is no '/gone/head' here"),
        (
            ["certify-dataset", "--model", MODEL, "--sigma", "1", "--dataset", "gone.parquet", "--output-dir", "run"],
            "There is no 'gone.parquet' here",
        ),
        (["check", "../gone/model"], "There is no '../gone/model' here"),
        (["certify", __file__, "--model", "module:function"], "names a Python callable, which `check` takes"),
        (["report", "gone"], "'gone' does not exist"),
        (["audit", "gone"], "'gone' does not exist"),
        (["calibrate", ".", "gone"], "'gone' does not exist"),
        (["card", "gone"], "'gone' does not exist"),
        (["push", "gone", "user/model"], "'gone' does not exist"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_is_not_there_is_refused_before_heavy_imports(arguments, said):
    done = subprocess.run([sys.executable, "-c", WRONG, *arguments], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "\n")
    assert said in done.stderr


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
