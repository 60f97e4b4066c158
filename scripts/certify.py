"""Certify the images of a dataset, on all devices there are; go on with a run that was cut short.

    accelerate launch scripts/certify.py --model_name_or_path user/repo --dataset_name uoft-cs/cifar10 --every 20 \\
        --sigma 0.25 0.5 1 --output_dir runs/cifar10

On CPUs, several processes take `torchrun --nproc_per_node 2 -- scripts/certify.py ...`: `accelerate launch --cpu` starts one
process, and without the `--` torchrun takes `--n` for an option of its own.
Writes OUTPUT_DIR/certificates.parquet, one row an image and sigma, and OUTPUT_DIR/run.json. Run again, it goes on.
"""

import argparse
import signal
import sys

from hf_smoothing.core.preprocessing import read_resolution
from hf_smoothing.runs.dataset_run import DTYPES, RunSettings, certify_dataset
from hf_smoothing.utils.processes import start_processes


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", required=True, help="name on the Hub, or a local folder")
    parser.add_argument("--revision", help="revision of the model: a branch, tag or commit")
    parser.add_argument(
        "--dataset_name", required=True, help="name on the Hub, a local folder (pictures too), or a Parquet file"
    )
    parser.add_argument("--dataset_config_name", help="configuration of the dataset")
    parser.add_argument("--split", default="test", help="split of the dataset (default: test)")
    parser.add_argument("--image_column", help="default: img or image")
    parser.add_argument("--label_column", help="default: label, labels or fine_label")
    parser.add_argument("--every", type=int, default=1, help="certify every this many images, from the first one on")
    parser.add_argument("--max_samples", type=int, help="certify no more images than this")
    parser.add_argument("--streaming", action="store_true", help="read the dataset as a stream, without storing it")
    parser.add_argument("--sigma", type=float, nargs="+", required=True, help="noise levels, in [0, 1] pixels")
    parser.add_argument(
        "--radii",
        type=float,
        nargs="+",
        help="decide these radii; without them each image's radius is found "
        "(surrogate: with --delta, to claim the largest of them that can be)",
    )
    parser.add_argument(
        "--method",
        default="sequential",
        help="sequential (default); fixed: the usual protocol; surrogate: ask the count head alone; counts: only count",
    )
    parser.add_argument(
        "--count_head", help="count head, on the Hub or in a local folder: sequential looks where it says first"
    )
    parser.add_argument(
        "--delta", type=float, help="share of the images that a calibrated count head may be wrong about (surrogate)"
    )
    parser.add_argument(
        "--alpha", type=float, default=0.001, help="probability that a certificate is wrong (default: 0.001)"
    )
    parser.add_argument("--max_draws", type=int, help="the most draws for one image")
    parser.add_argument("--n0", type=int, help="draws that choose the class (fixed)")
    parser.add_argument("--n", type=int, help="draws that bound its probability (fixed), or are counted (counts)")
    parser.add_argument(
        "--tolerance", type=float, help="relative tolerance of the radius (sequential, without --radii)"
    )
    parser.add_argument(
        "--noise_resolution",
        type=read_resolution,
        default="input",
        help="where noise is added: input (the network's), native (the picture's own size), or pixels a side",
    )
    parser.add_argument("--denoiser", help="denoiser in front of the model, part of what is certified: wiener")
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise (default: 0)")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32", help="of the forward passes")
    parser.add_argument("--batch_size", type=int, default=128, help="draws in one forward pass (default: 128)")
    parser.add_argument("--output_dir", required=True, help="a new folder, or one with a run to go on with")
    parser.add_argument(
        "--resume",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="go on with the run in --output_dir if there is one (default)",
    )
    return parser.parse_args()


def main() -> None:
    args = vars(parse_args())
    run = {name: args.pop(name) for name in ("output_dir", "batch_size", "streaming", "resume")}
    radii, sigmas = args.pop("radii"), tuple(args.pop("sigma"))
    accelerator = start_processes()
    try:
        settings = RunSettings(sigmas=sigmas, radii=None if radii is None else tuple(radii), **args)
        summary = certify_dataset(settings, accelerator=accelerator, **run)
    except KeyboardInterrupt as error:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # torchrun sends another
        if accelerator.is_main_process:
            print(f"\n{error}" if error.args else "\nstopped", file=sys.stderr)
        sys.exit(130)
    except (OSError, RuntimeError, ValueError) as error:
        # without end_training: it might wait for processes that are still at work; launchers end those
        sys.exit(f"error: {error}")
    if summary is not None:
        print(summary)
    accelerator.end_training()


if __name__ == "__main__":
    main()
