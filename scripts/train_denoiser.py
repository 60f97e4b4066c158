"""Train a diffusion model as denoiser, for smoothing a classifier that was trained on clean images (arXiv 2206.10550).

Example:
    accelerate launch scripts/train_denoiser.py --dataset_name uoft-cs/cifar10 --num_train_epochs 40 --output_dir my-denoiser
    hf-smoothing certify-dataset --model my-classifier --dataset uoft-cs/cifar10 --denoiser my-denoiser --sigma 0.25 \\
        --output-dir run

It needs diffusers: pip install 'hf-smoothing[diffusers]'. The denoiser learns only the noise levels between sigma_min and
sigma_max, so it draws no pictures from pure noise. It is a `UNet2DModel` with a `DDPMScheduler`, as diffusers saves them.
If a training was interrupted, run its command again with `--resume_from_checkpoint latest`.
"""

from hf_smoothing.training.denoiser_training import DenoiserSettings, train_denoiser
from hf_smoothing.training.training_loop import TrainingSettings
from hf_smoothing.utils.argument_parser import argument_parser
from hf_smoothing.utils.errors import exit_on_error


def main() -> None:
    parser = argument_parser((DenoiserSettings, TrainingSettings), __doc__)
    parser.set_defaults(learning_rate=1e-3, weight_decay=0.0, ema_decay=0.999)
    with exit_on_error():
        denoiser, settings = parser.parse_args_into_dataclasses()
        results = train_denoiser(denoiser, settings, accelerator := settings.create_accelerator())
        accelerator.print(
            f"Trained {results['steps']:,} steps in {results['seconds']:.0f} s; loss {results['final_loss']:.4f}.\n"
            f"Wrote the denoiser and results/training.json to {settings.output_dir}."
        )
    accelerator.end_training()


if __name__ == "__main__":
    main()
