"""Train a mixed-noise ViT on an image-classification dataset, from scratch or from a model trained so before.

    accelerate launch scripts/pretrain.py --dataset_name uoft-cs/cifar10 --sigmas 0 0.25 0.5 1 --output_dir my-model

The dataset is held in memory (decoded once), so this script is for small images.
"""

import argparse
import json
import math
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from datasets import load_dataset
from torch.utils.data import DataLoader, TensorDataset
from torchvision.transforms.v2.functional import pil_to_tensor
from tqdm import tqdm
from transformers import ViTImageProcessor, get_cosine_schedule_with_warmup

from hf_smoothing import MixedNoiseViTConfig, MixedNoiseViTForImageClassification
from hf_smoothing.noise import NoiseMixture


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--dataset_name", required=True, help="name on the Hub, or a local folder")
    parser.add_argument(
        "--model_name_or_path", help="go on from this mixed-noise ViT; the flags of its size are ignored"
    )
    parser.add_argument("--split", default="train")
    parser.add_argument("--image_column", default="img")
    parser.add_argument("--label_column", default="label")
    parser.add_argument(
        "--sigmas", type=float, nargs="+", default=[0, 0.25, 0.5, 1], help="noise levels, [0, 1] pixels"
    )
    parser.add_argument("--sigma_weights", type=float, nargs="+", help="their relative frequencies (default: equal)")
    parser.add_argument("--image_size", type=int, default=32)
    parser.add_argument("--patch_size", type=int, default=4)
    parser.add_argument("--hidden_size", type=int, default=128)
    parser.add_argument("--num_hidden_layers", type=int, default=4)
    parser.add_argument("--num_attention_heads", type=int, default=4)
    parser.add_argument("--stem", choices=["patch", "conv"], default="conv")
    parser.add_argument("--num_train_epochs", type=int, default=10)
    parser.add_argument("--max_train_steps", type=int, help="overrides --num_train_epochs")
    parser.add_argument("--per_device_train_batch_size", type=int, default=128)
    parser.add_argument("--learning_rate", type=float, default=1.5e-3)
    parser.add_argument("--weight_decay", type=float, default=0.05)
    parser.add_argument("--warmup_ratio", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", required=True)
    return parser.parse_args()


def augment(images: torch.Tensor, padding: int = 4) -> torch.Tensor:
    """Random crops of the padded images and random horizontal flips, each image on its own; uint8 in and out."""
    batch, _, height, width = images.shape
    padded = torch.nn.functional.pad(images, [padding] * 4)
    top, left = torch.randint(0, 2 * padding + 1, (2, batch, 1))
    rows, columns = top + torch.arange(height), left + torch.arange(width)
    columns = torch.where(torch.rand(batch, 1) < 0.5, columns, columns.flip(1))
    picture = torch.arange(batch).view(-1, 1, 1)
    return padded.permute(0, 2, 3, 1)[picture, rows[:, :, None], columns[:, None]].permute(0, 3, 1, 2)


def build_model(
    args: argparse.Namespace, images: torch.Tensor, names: list[str]
) -> MixedNoiseViTForImageClassification:
    config = MixedNoiseViTConfig(
        image_size=args.image_size,
        patch_size=args.patch_size,
        hidden_size=args.hidden_size,
        num_hidden_layers=args.num_hidden_layers,
        num_attention_heads=args.num_attention_heads,
        stem=args.stem,
        image_mean=(images.float().mean((0, 2, 3)) / 255).tolist(),
        image_std=(images.float().std((0, 2, 3)) / 255).tolist(),
        id2label=dict(enumerate(names)),
        label2id={name: index for index, name in enumerate(names)},
    )
    return MixedNoiseViTForImageClassification(config)


def main() -> None:
    args = parse_args()
    accelerator = Accelerator()
    set_seed(args.seed, device_specific=True)  # each process its own noise; the weights are made equal by `prepare`
    mixture = NoiseMixture(tuple(args.sigmas), tuple(args.sigma_weights) if args.sigma_weights else None)
    dataset = load_dataset(args.dataset_name, split=args.split)
    names = dataset.features[args.label_column].names
    images = torch.stack([pil_to_tensor(image.convert("RGB")) for image in tqdm(dataset[args.image_column])])
    loader = DataLoader(
        TensorDataset(images, torch.tensor(dataset[args.label_column])),
        batch_size=args.per_device_train_batch_size,
        shuffle=True,
        drop_last=True,
    )
    if args.model_name_or_path:
        model = MixedNoiseViTForImageClassification.from_pretrained(args.model_name_or_path, dtype=torch.float32)
    else:
        model = build_model(args, images, names)
    model = model.to(memory_format=torch.channels_last)
    decayed = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": args.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=args.learning_rate,
    )
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    steps = args.max_train_steps or args.num_train_epochs * len(loader)
    scheduler = get_cosine_schedule_with_warmup(optimizer, math.ceil(args.warmup_ratio * steps), steps)

    output_dir = Path(args.output_dir)
    processor = ViTImageProcessor(
        size={"height": args.image_size, "width": args.image_size}, do_normalize=False, do_convert_rgb=True
    )
    losses, started, step = [], time.time(), 0
    bar = tqdm(total=steps, disable=not accelerator.is_local_main_process)
    while step < steps:
        model.train()
        for batch_images, labels in loader:
            clean = augment(batch_images.cpu()).to(accelerator.device).float() / 255
            loss = model(mixture.add_to(clean), labels=labels).loss
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
            step += 1
            bar.update()
            if step % 50 == 0:
                bar.set_postfix(loss=f"{torch.stack(losses[-50:]).mean():.3f}")
            if step == steps:
                break
        if accelerator.is_main_process:  # every epoch: a training that is cut short leaves a usable model
            accelerator.unwrap_model(model).save_pretrained(output_dir)
            processor.save_pretrained(output_dir)
    if accelerator.is_main_process:
        results = {
            "command": " ".join(["scripts/pretrain.py", *sys.argv[1:]]),
            "settings": vars(args),
            "steps": steps,
            "images_seen": steps * args.per_device_train_batch_size * accelerator.num_processes,
            "final_loss": torch.stack(losses[-100:]).mean().item(),
            "seconds": time.time() - started,
            "device": str(accelerator.device),
            "num_processes": accelerator.num_processes,
            "num_threads": torch.get_num_threads(),
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "versions": {name: version(name) for name in ("torch", "transformers", "timm", "accelerate", "datasets")},
        }
        before = Path(args.model_name_or_path or "") / "results" / "training.json"
        if args.model_name_or_path and before.exists():
            results["continues"] = json.loads(before.read_text())
        path = output_dir / "results" / "training.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(results, indent=2) + "\n")
    accelerator.end_training()


if __name__ == "__main__":
    main()
