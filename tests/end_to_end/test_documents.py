"""Every snippet of the documents works.

- Python blocks of a document run in one process, in order, in a temporary folder. There the names that documents use stand
  for small models, datasets and runs: see `prepare_folder`. The variables of `PREAMBLE` are set.
- Commands in bash blocks are parsed by their real parsers: commands, options and types of values must exist.

A comment on the line before a block changes this:

    <!-- test: run -->                       run the commands of a bash block too
    <!-- test: skip because it needs ... --> do not run a Python block
    <!-- test: replace 100_000 by 500 -->    run with other text; repeat it, or combine it with `run`, by `;`
"""

import json
import re
import shlex
import shutil
from dataclasses import dataclass

import pytest
from helpers.paths import ROOT, SHIPPED_MODEL
from typer._click.exceptions import UsageError
from typer.main import get_command

from hf_smoothing.cli.app import app

DOCUMENTS = [
    ROOT / "README.md",
    *(path / "README.md" for path in (ROOT / "hf_smoothing", ROOT / "scripts", ROOT / "model_cards")),
    *sorted(ROOT.glob("model_cards/*/README.md")),
]
DOCUMENTS = [path for path in DOCUMENTS if path.is_file()]

PREAMBLE = """
import torch, hf_smoothing
from transformers import pipeline, AutoModel, AutoModelForImageClassification
from hf_smoothing import *
images = [hf_smoothing.load_demo_images()[index]["image"] for index in (6, 8)]
labels, stream, pixel_values = [6, 8], images, torch.rand(2, 3, 32, 32)
for name, image in zip(("frog.png", "ship.png"), images): image.save(name)
my_function = lambda pixels: pixels.flatten(1)[:, :3]
defaults = SequentialRule.__init__.__defaults__  # 10,000 draws take 15 seconds
SequentialRule.__init__.__defaults__ = tuple(400 if value == 10_000 else value for value in defaults)
"""

OTHER_COMMANDS = {"cd", "git", "hf", "pip", "source", "python -m venv", "python -m pip", "python -m pytest"}
"""Commands of other projects, which are not parsed."""

PARSE_SCRIPTS = """
import argparse, json, pathlib, runpy, sys
class Parsed(BaseException): pass
original = argparse.ArgumentParser.parse_known_args
def parse_known_args(self, *args, **kwargs):
    namespace, rest = original(self, *args, **kwargs)
    if rest:
        self.error(f"unknown arguments: {rest}")
    raise Parsed
argparse.ArgumentParser.parse_known_args = parse_known_args
for words in json.loads(sys.argv[1]):
    print(" ".join(words), file=sys.stderr)
    sys.argv, sys.path[0] = words, str(pathlib.Path(words[0]).parent)
    try:
        runpy.run_path(words[0], run_name="__main__")
    except Parsed:
        continue
    except SystemExit as end:
        if end.code not in (0, None):
            raise
        continue
    sys.exit("it has no parser")
"""


@dataclass
class Block:
    """A fenced block: its language, the comment before it, the number of its first line, its text."""

    language: str
    comment: str
    line: int
    text: str

    def __post_init__(self):
        for old, new in re.findall(r"replace (\S+) by (\S+)", self.comment):
            assert old in self.text, f"line {self.line}: there is no {old} to replace"
            self.text = self.text.replace(old, new)

    def commands(self):
        """The commands of a bash block, each as a list of words, without variables that are set for it."""
        for line in self.text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            for part in re.split(r"\0(?:&&|;|\||&)\0", "\0".join(["", *words, ""])):
                command = [word for word in part.strip("\0").split("\0") if word]
                while command and re.fullmatch(r"[A-Z_]+=.*", command[0]):
                    command.pop(0)
                if command:
                    yield command


def read_blocks(path):
    pattern = r"^(?:<!-- test: (?P<comment>.*?) -->\n)?```(?P<language>\w+)\n(?P<text>.*?)^```$"
    text = path.read_text()
    return [
        Block(match["language"], match["comment"] or "", text.count("\n", 0, match.start("text")) + 1, match["text"])
        for match in re.finditer(pattern, text, re.MULTILINE | re.DOTALL)
    ]


def strip_launcher(command):
    """The command that a launcher starts: a script and its arguments, or the command as it is."""
    if command[0] in ("python", "torchrun") or command[:2] == ["accelerate", "launch"]:
        scripts = [place for place, word in enumerate(command) if word.endswith(".py")]
        return command[scripts[0] :] if scripts else command
    return command


def prepare_folder(folder, model, parquet):
    """Give the names that documents use a meaning, relative to `folder`."""
    for name in ("hf_smoothing", "model_cards", "scripts"):
        (folder / name).symlink_to(ROOT / name)
    models = {path.name: path for path in SHIPPED_MODEL.parent.iterdir() if path.is_dir()}
    counts = models[f"{SHIPPED_MODEL.name}-counts"]
    models |= dict.fromkeys(("foundation", "my-model", "user/my-model", "user/repo"), SHIPPED_MODEL)
    models |= dict.fromkeys(("my-counts", "user/my-counts"), counts)
    models |= dict.fromkeys(("google/vit-base-patch16-224", "microsoft/resnet-18", "user/vit-224"), model)
    for name, target in models.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).symlink_to(target)
    for name in ("uoft-cs/cifar10", "held-out", "my-images"):
        (folder / name).mkdir(parents=True)
        for split in ("train", "test"):
            (folder / name / f"{split}.parquet").symlink_to(parquet)
    for name in ("runs/cifar10", "my-run", "another-run"):
        shutil.copytree(SHIPPED_MODEL / "results" / "cifar10" / "sigma-0.25", folder / name)


def name_of(path):
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_snippets_run(processes, model, parquet, tmp_path, path):
    blocks = read_blocks(path)
    lines = [""] * (len(path.read_text().splitlines()) + 1)
    for block in blocks:
        if block.language == "python" and not block.comment.startswith("skip"):
            text = block.text.splitlines()
            lines[block.line - 1 : block.line - 1 + len(text)] = text
    prepare_folder(tmp_path, model, parquet)
    if any(lines):
        # the lines keep their numbers, so that an error names the line of the document
        (tmp_path / "snippets.py").write_text("\n".join(lines))
        run = f"{PREAMBLE}\nexec(compile(open('snippets.py').read(), {name_of(path)!r}, 'exec'))"
        done = processes.run("-c", run, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    for block in blocks:
        if block.language in ("bash", "sh") and "run" in re.split(r"\W+", block.comment):
            for command in block.commands():
                done = processes.run(*strip_launcher(command), cwd=tmp_path)
                assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_commands_are_known_to_their_parsers(processes, path):
    commands = get_command(app).commands
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    scripts = []
    for block in read_blocks(path):
        for command in block.commands() if block.language in ("bash", "sh") else ():
            words = strip_launcher(command)
            if words[0].endswith(".py"):
                assert (ROOT / words[0]).is_file(), f"line {block.line}: {words[0]}"
                scripts.append(words)
            elif words[0] == "hf-smoothing":
                if words[1:] != ["--help"]:
                    assert words[1] in commands, f"line {block.line}: {' '.join(words)}"
                    if "--help" not in words:
                        try:
                            commands[words[1]].make_context(words[1], words[2:])
                        except UsageError as error:  # files of examples are not there
                            if not re.search(r"does not exist|There is no", error.message):
                                raise
            elif words[0] == "make":
                assert set(words[1:]) <= set(targets), f"line {block.line}: {' '.join(words)}"
            else:
                known = words[0] in OTHER_COMMANDS or " ".join(words[:3]) in OTHER_COMMANDS
                assert known, f"line {block.line}: {' '.join(words)}"
    done = processes.run("-c", PARSE_SCRIPTS, json.dumps(scripts))
    assert done.returncode == 0, done.stderr
