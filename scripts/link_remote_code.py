"""Complete the folders in model_cards/: link the code that loads a model without this package into them.

    python scripts/link_remote_code.py

Afterwards `hf upload` of a folder publishes the model as `hf-smoothing push` would. The files are links to those of
hf_smoothing/core, and `config.json` names the classes in them.
"""

from pathlib import Path
from tempfile import TemporaryDirectory

from hf_smoothing.hub.publication import publication_of

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    for folder in sorted(path.parent for path in ROOT.glob("model_cards/*/config.json")):
        for link in folder.glob("*.py"):
            link.unlink()
        with TemporaryDirectory() as stage:
            publication_of(folder).stage(Path(stage), f"user/{folder.name}")
            for code in Path(stage).glob("*.py"):
                (folder / code.name).symlink_to(Path("../../hf_smoothing/core") / code.name)
            (folder / "config.json").write_text((Path(stage) / "config.json").read_text())


if __name__ == "__main__":
    main()
