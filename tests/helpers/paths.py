"""Places in the repository."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
SHIPPED_MODEL = ROOT / "model_cards" / "mixed-noise-vit-nano-cifar10"
DEMO_IMAGES = ROOT / "hf_smoothing" / "data" / "cifar10_demo.parquet"
