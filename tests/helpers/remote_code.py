"""What users of a published model do who have neither this package nor what only its other parts need.

    python remote_code.py MODEL COUNT_HEAD PICTURE ...

Prints what they find as JSON.
"""

import json
import sys

for name in ("hf_smoothing", "datasets", "evaluate", "accelerate", "pyarrow", "pandas", "typer", "rich", "matplotlib"):
    sys.modules[name] = None  # type: ignore[assignment]  # as if not installed

import torch  # noqa: E402
from transformers import AutoModel, AutoModelForImageClassification, pipeline  # noqa: E402

model, count_head, *pictures = sys.argv[1:]

head = AutoModel.from_pretrained(count_head, trust_remote_code=True)
certify = pipeline(model=model, trust_remote_code=True, sigma=0.25)
classifier = AutoModelForImageClassification.from_pretrained(model, trust_remote_code=True)
settings = {"max_draws": 60, "radius": 0.1, "seed": 0}
pixels = torch.linspace(0, 1, 3 * head.config.image_size**2).view(1, 3, head.config.image_size, -1)
with torch.inference_mode():
    print(
        json.dumps(
            {
                "task": certify.task,
                "module": type(classifier).__module__,
                "certificates": certify(pictures, **settings),
                "with_count_head": certify(pictures, count_head=count_head, **settings),
                "counts": head.eval()(pixels, sigma=0.25).probabilities.tolist(),
            }
        )
    )
