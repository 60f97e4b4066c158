"""Train a router: it chooses the noise level of each picture, for sigma='auto'.

    accelerate launch scripts/train_router.py --count_head my-counts --dataset_name uoft-cs/cifar10 \\
        --output_dir my-counts/router

The count head predicts which radius each noise level certifies for each training image. From these predictions, the router
learns to choose a level from noisy copies of the picture. `--sigma auto` finds it in the folder `router` of the count head,
or of the model. A bad router makes radii smaller, but the certificates stay valid.
"""

import torch

from hf_smoothing.count_head.router_training import RouterSettings, train_router
from hf_smoothing.training.training_loop import TrainingSettings
from hf_smoothing.utils.argument_parser import argument_parser
from hf_smoothing.utils.errors import exit_on_error


def main() -> None:
    parser = argument_parser((RouterSettings, TrainingSettings), __doc__)
    parser.set_defaults(learning_rate=2e-3)
    with exit_on_error():
        router, settings = parser.parse_args_into_dataclasses()
        accelerator = settings.create_accelerator()
        torch.manual_seed(settings.seed)
        train_router(router, settings, accelerator)
        accelerator.print(f"Wrote the router and training.json to {settings.output_dir}.")
    accelerator.end_training()


if __name__ == "__main__":
    main()
