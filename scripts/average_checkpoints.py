"""Average the weights of models that were trained one from the other (the end points of their cosine schedules).

    python scripts/average_checkpoints.py stage-2 stage-3 --output_dir averaged

Source: Izmailov et al. 2018, "Averaging Weights Leads to Wider Optima and Better Generalization".
"""

import argparse
import json
import shutil
from pathlib import Path

import torch

from hf_smoothing import MixedNoiseViTForImageClassification
from hf_smoothing.utils.provenance import command_line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path, help="model folders, the last one trained last")
    parser.add_argument("--output_dir", type=Path, required=True)
    args = parser.parse_args()
    models = [
        MixedNoiseViTForImageClassification.from_pretrained(folder, dtype=torch.float32) for folder in args.models
    ]
    states = [model.state_dict() for model in models]
    mean = {name: torch.stack([state[name] for state in states]).mean(0) for name in states[0]}
    models[-1].load_state_dict(mean)
    models[-1].save_pretrained(args.output_dir)
    shutil.copy(args.models[-1] / "preprocessor_config.json", args.output_dir)
    results = json.loads((args.models[-1] / "results" / "training.json").read_text())
    results["averaged"] = command_line()
    (args.output_dir / "results").mkdir(parents=True, exist_ok=True)
    (args.output_dir / "results" / "training.json").write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
