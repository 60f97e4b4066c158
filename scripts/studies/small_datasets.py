"""Write two small datasets in the layout of the Hub, for finetuning without a network.

Examples:
    python scripts/studies/small_datasets.py --output_dir data            # needs scikit-learn, for its digits
    python scripts/studies/small_datasets.py --output_dir data --fashion_mnist_dir /usr/share/datasets/fashion-mnist

The second command also converts the files of Debian's package `dataset-fashion-mnist`. Each dataset is a folder for
`load_dataset`, with splits `train` and `test` and columns `image` and `label`.
"""

import argparse
import gzip
from pathlib import Path

import datasets
import numpy as np
from PIL import Image

FASHION = (
    "T - shirt / top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip


def read_idx(path: Path) -> np.ndarray:
    """Read an array from a compressed file in the IDX format of MNIST (unsigned bytes)."""
    content = gzip.decompress(path.read_bytes())
    if content[:3] != b"\x00\x00\x08":
        raise ValueError(f"{path} is not an IDX file of unsigned bytes.")
    dimensions = content[3]
    shape = np.frombuffer(content, ">u4", dimensions, offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape)


def write_split(
    folder: Path, split: str, pixels: np.ndarray, labels: np.ndarray, class_names: tuple[str, ...]
) -> None:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(class_names))})
    rows = {"image": [Image.fromarray(image) for image in pixels], "label": labels.tolist()}
    folder.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / f"{split}.parquet")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for the folders of the datasets")
    parser.add_argument("--fashion_mnist_dir", type=Path, help="folder with the four IDX files of Fashion-MNIST")
    args = parser.parse_args()
    from sklearn.datasets import load_digits  # imported here, because the package does not need it

    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    for split, part in (("train", order[360:]), ("test", order[:360])):
        write_split(args.output_dir / "digits", split, pixels[part], digits.target[part], tuple("0123456789"))
    if args.fashion_mnist_dir is not None:
        for split, stem in (("train", "train"), ("test", "t10k")):
            images = read_idx(args.fashion_mnist_dir / f"{stem}-images-idx3-ubyte.gz")
            labels = read_idx(args.fashion_mnist_dir / f"{stem}-labels-idx1-ubyte.gz")
            write_split(args.output_dir / "fashion_mnist", split, images, labels, FASHION)


if __name__ == "__main__":
    main()
