"""Train the surrogates of Accelerated Smoothing (arXiv 2402.07498) as published, for a given time; save their predictions.

Example:
    python scripts/studies/paper_surrogate.py --counts train.parquet --test_counts test.parquet \\
        --dataset_name uoft-cs/cifar10 --seconds 600 --output_dir runs/paper

One ResNet-18 per noise level learns the class frequencies of clean images with the Jensen-Shannon loss, flips, and Adam at
1e-3. The paper halves the learning rate after every 20 of 200 epochs: here, after every tenth of the time.
OUTPUT_DIR/predictions.parquet holds the predictions for the test images, OUTPUT_DIR/results.json what was done.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torchvision.models import resnet18
from torchvision.transforms.v2.functional import pil_to_tensor

from hf_smoothing.core.modeling_count_prediction import jensen_shannon
from hf_smoothing.core.preprocessing import Preprocessing
from hf_smoothing.count_head.count_batches import group_counts_by_image, read_pixels
from hf_smoothing.count_head.measured_counts import MeasuredCounts, read_count_table
from hf_smoothing.count_head.prediction_tables import write_predictions
from hf_smoothing.utils.errors import exit_on_error
from hf_smoothing.utils.files import write_json
from hf_smoothing.utils.provenance import command_line, package_versions

HALVINGS = 10


def create_resnet(num_classes: int) -> nn.Module:
    """A ResNet-18 for images of 32 pixels a side: its first layers do not shrink them."""
    model = resnet18(num_classes=num_classes)
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return model.to(memory_format=torch.channels_last)


def read_images(counts: MeasuredCounts, indices: np.ndarray) -> torch.Tensor:
    """Pixels of images by their index in the split: uint8 `(images, 3, height, width)`."""
    preprocessing = Preprocessing(pil_to_tensor, None, None, None, "input")
    return read_pixels(counts.open_images().bind(counts.settings["label_names"], preprocessing), indices)


class Trainer:
    """
    Trains and applies a ResNet on a device.

    Args:
        device: where to compute.
        bf16: whether to compute in bfloat16 where autocast does.
        batch_size: images per update.
    """

    def __init__(self, device: str, bf16: bool, batch_size: int):
        self.device, self.bf16, self.batch_size = torch.device(device), bf16, batch_size

    def compute_logits(self, model: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
        """Logits of pixels, uint8."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            return model((pixels / 127.5 - 1).contiguous(memory_format=torch.channels_last)).float()

    def train(self, pixels: torch.Tensor, counts: torch.Tensor, seconds: float) -> tuple[nn.Module, dict[str, Any]]:
        """
        Train a new ResNet for some seconds.

        Args:
            pixels: `(images, 3, height, width)`, uint8.
            counts: `(images, classes)`.
            seconds: how long.

        Returns:
            The model, and figures of its training.
        """
        frequencies = (counts / counts.sum(1, keepdim=True)).to(self.device)
        pixels = pixels.to(self.device)
        model = create_resnet(counts.shape[1]).to(self.device).train()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        updates, spent, loss_value, started = 0, 0.0, float("nan"), time.monotonic()
        while spent < seconds:
            for batch in torch.randperm(len(pixels)).to(self.device).split(self.batch_size):
                optimizer.param_groups[0]["lr"] = 1e-3 * 0.5 ** int(HALVINGS * spent / seconds)
                flipped = torch.rand(len(batch), 1, 1, 1, device=self.device) < 0.5
                images = torch.where(flipped, pixels[batch].flip(-1), pixels[batch])
                loss = jensen_shannon(self.compute_logits(model, images), frequencies[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                # waits for the update
                updates, loss_value, spent = updates + 1, loss.item(), time.monotonic() - started
                if spent >= seconds:
                    break
        images_seen = updates * self.batch_size
        return model, {"updates": updates, "images_seen": images_seen, "seconds": spent, "final_loss": loss_value}

    @torch.inference_mode()
    def predict(self, model: nn.Module, pixels: torch.Tensor) -> np.ndarray:
        """Predicted class frequencies `(images, classes)`."""
        model.eval()
        batches = pixels.split(self.batch_size)
        logits = torch.cat([self.compute_logits(model, batch.to(self.device)).cpu() for batch in batches])
        return logits.double().softmax(1).numpy()


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", required=True, help="Parquet file with the counts of the training images")
    parser.add_argument("--test_counts", required=True, help="Parquet file with the counts of the test images")
    parser.add_argument("--dataset_name", required=True, help="dataset of both, with the splits train and test")
    parser.add_argument("--output_dir", required=True, help="folder for predictions and results")
    parser.add_argument("--seconds", type=float, required=True, help="training time of each ResNet")
    parser.add_argument("--sigmas", type=float, nargs="+", help="noise levels (default: all that were counted)")
    for flag, default, text in (
        ("--batch_size", 256, "images per update"),
        ("--seed", 0, "seed of weights, order and flips"),
        ("--device", "cpu", "device to compute on"),
    ):
        parser.add_argument(flag, type=type(default), default=default, help=f"{text} (default: {default})")
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    with exit_on_error():
        train, test = (
            read_count_table(Path(path), args.dataset_name, split)
            for path, split in ((args.counts, "train"), (args.test_counts, "test"))
        )
        if args.sigmas is not None:
            train, test = train.select_sigmas(args.sigmas), test.select_sigmas(args.sigmas)
        indices, targets = group_counts_by_image(train)
        test_indices, test_rows = np.unique(test.indices, return_inverse=True)
        pixels, test_pixels = read_images(train, indices), read_images(test, test_indices)
        trainer = Trainer(args.device, args.bf16, args.batch_size)
        probabilities, trainings = np.empty((len(test.indices), targets.shape[-1] - 1)), []
        for level, sigma in enumerate(np.unique(train.sigmas)):
            torch.manual_seed(args.seed)
            model, training = trainer.train(pixels, targets[:, level, 1:], args.seconds)
            trainings.append({"sigma": float(sigma), **training})
            rows = test.sigmas == sigma
            probabilities[rows] = trainer.predict(model, test_pixels)[test_rows[rows]]
            print(trainings[-1])
        folder = Path(args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        write_predictions(test, probabilities, folder / "predictions.parquet")
        results = {
            "command": command_line(),
            "settings": vars(args),
            "images": len(pixels),
            "trainings": trainings,
            "device": torch.cuda.get_device_name() if trainer.device.type == "cuda" else args.device,
            "num_threads": torch.get_num_threads(),
            "versions": package_versions("torchvision", "datasets"),
        }
        write_json(results, folder / "results.json")


if __name__ == "__main__":
    main()
