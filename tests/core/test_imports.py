"""What core may import: transformers copies its files flat, and the command line needs its rules without torch."""

import ast
import sys
from pathlib import Path

import pytest
from transformers.dynamic_module_utils import get_imports

import hf_smoothing.core

CORE = Path(hf_smoothing.core.__file__).parent
MODULES = {path.stem: ast.parse(path.read_text()) for path in CORE.glob("*.py")}
KNOWN_TO_A_PUBLISHED_MODEL = {
    "huggingface_hub", "numpy", "PIL", "safetensors", "scipy", "timm", "torch", "torchvision", "tqdm", "transformers",
}  # fmt: skip
OPTIONAL = {"diffusion_denoiser": {"diffusers"}}
"""Imported inside `try`, where transformers does not demand it of everybody who loads a published model."""

WITHOUT_TORCH = (
    "agreement", "bets", "bounds", "calibration", "certificates", "count_rule", "fixed_rule", "rule_protocols", "rules",
    "selection", "sequential_rule", "surrogate_rule", "two_stage_plan", "two_stage_rule", "validation",
)  # fmt: skip


def imports_of(module):
    """Relative imports as `(level, module)`, and the top-level packages of absolute ones."""
    relative, packages = set(), set()
    for node in ast.walk(MODULES[module]):
        if isinstance(node, ast.ImportFrom) and node.level:
            relative.add((node.level, node.module))
        elif isinstance(node, ast.ImportFrom):
            packages.add(node.module.split(".")[0])
        elif isinstance(node, ast.Import):
            packages.update(alias.name.split(".")[0] for alias in node.names)
    return relative, packages


@pytest.mark.parametrize("module", MODULES)
def test_core_imports_only_siblings_and_what_a_published_model_needs(module):
    """`from .sibling import name`: transformers follows no other form. No datasets, accelerate, evaluate, typer or rich."""
    relative, packages = imports_of(module)
    for level, sibling in relative:
        assert level == 1
        assert sibling in MODULES
    assert packages <= KNOWN_TO_A_PUBLISHED_MODEL | OPTIONAL.get(module, set()) | sys.stdlib_module_names
    assert not OPTIONAL.get(module, set()) & set(get_imports(CORE / f"{module}.py"))


def test_rules_do_not_load_torch():
    reached, waiting = set(), set(WITHOUT_TORCH)
    while waiting:
        module = waiting.pop()
        reached.add(module)
        relative, packages = imports_of(module)
        assert packages <= {"numpy", "scipy"} | sys.stdlib_module_names, module
        waiting |= {sibling for _, sibling in relative} - reached
    assert reached == set(WITHOUT_TORCH)
