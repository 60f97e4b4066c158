# /// script
# requires-python = ">=3.11"
# dependencies = ["hf-smoothing"]
#
# [tool.uv.sources]
# hf-smoothing = { path = ".." }
# ///
"""Certify the images of a dataset on all available devices, or resume a run that was interrupted.

    accelerate launch scripts/certify.py --model_name_or_path user/repo --dataset_name uoft-cs/cifar10 --every 20 \\
        --sigma 0.25 0.5 1 --output_dir runs/cifar10

On CPUs, start several processes with `torchrun --nproc_per_node 2 -- scripts/certify.py ...`: `accelerate launch --cpu`
starts only one. The `--` keeps torchrun from reading `--n` as its own option.
The script writes OUTPUT_DIR/certificates.parquet (one row per image and sigma) and OUTPUT_DIR/run.json. The same command
resumes a run. In a clone, `uv run scripts/certify.py ...` installs what it needs in an environment of its own. Elsewhere
(`hf jobs uv run`) it needs `git = "https://..."`, the address of the repository, in place of `path = ".."` above.
"""

from dataclasses import asdict

from hf_smoothing.runs.dataset_run import certify_dataset
from hf_smoothing.runs.settings import ExecutionSettings, RunSettings
from hf_smoothing.utils.argument_parser import argument_parser
from hf_smoothing.utils.errors import exit_on_error
from hf_smoothing.utils.processes import start_processes


def main() -> None:
    parser = argument_parser((RunSettings, ExecutionSettings), __doc__)
    # on errors without end_training, which may wait for processes that still work; launchers end those
    with exit_on_error():
        settings, execution = parser.parse_args_into_dataclasses()
        accelerator = start_processes()
        summary = certify_dataset(settings, accelerator=accelerator, **asdict(execution))
    if summary is not None:
        print(summary)
    accelerator.end_training()


if __name__ == "__main__":
    main()
