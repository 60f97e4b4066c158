"""Seeds of training: the randomness of a step depends only on the seed of the training and the number of the step."""

import numpy as np
from accelerate.utils import set_seed


def derive_seed(*key: int) -> int:
    """One seed from several numbers, such as (seed, epoch, batch, process); other numbers give another random stream."""
    return int(np.random.SeedSequence(key).generate_state(1)[0])


def seed_everything(*key: int) -> None:
    """Seed the generators of Python, numpy and torch (all devices) with [`derive_seed`]."""
    set_seed(derive_seed(*key))
