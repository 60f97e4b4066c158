"""Two processes gather certificates and the first computes the metric: started by `test_certified_accuracy.py`.

Imports nothing of the package: the metric comes by `evaluate.load`, as on a machine that has only that.
"""

import json
import sys
from pathlib import Path

for name in [name for name in sys.modules if name.split(".")[0] == "hf_smoothing"] + ["hf_smoothing"]:
    sys.modules[name] = None  # type: ignore[assignment]  # as if it were not installed

import evaluate  # noqa: E402
import torch  # noqa: E402
from accelerate import Accelerator  # noqa: E402

folder, certificates, output = sys.argv[1:]
columns = json.loads(Path(certificates).read_text())
accelerator = Accelerator(cpu=True)
metric = evaluate.load(folder)
rows = list(zip(columns["predictions"], columns["references"], columns["radii"]))
# an odd number in batches of 4: the last batch is filled up with repeated images, which gather_for_metrics takes out
for batch in accelerator.prepare(torch.utils.data.DataLoader(rows, batch_size=4)):
    predictions, references, radii = accelerator.gather_for_metrics(tuple(batch))
    if accelerator.is_main_process:
        metric.add_batch(predictions=predictions, references=references, radii=radii)
if accelerator.is_main_process:
    found = {"processes": accelerator.num_processes, **metric.compute(thresholds=[0, 0.25, 0.5])}
    Path(output).write_text(json.dumps(found))
accelerator.end_training()
