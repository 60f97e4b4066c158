"""Count heads with known errors, simulated without a model."""

import numpy as np


def simulate_head(kind, images, generator):
    """
    Predicted log-odds of images, and what Monte-Carlo would allow (see `Calibration`).

    A `good` head errs by half a unit, and by the class for one image in ten; a `useless` one knows nothing of an image; an
    `adversarial` one is surest where least can be proved; a `sure` one says nearly 1 of every image.
    """
    truth = generator.normal(1.5, 2.0, images)
    allowed = np.where(generator.random(images) < 0.1, 0.0, np.maximum(truth, 0.0))
    predicted = {
        "good": truth + generator.normal(0, 0.5, images),
        "useless": generator.normal(1.5, 2.0, images),
        "adversarial": -allowed + generator.normal(0, 0.5, images) + 4,
        "sure": np.full(images, 9.0),
    }[kind]
    return predicted, allowed
