"""Losses that training adds to the cross-entropy."""

import math

import torch


def consistency_loss(logits: torch.Tensor, weight: float, entropy_weight: float = 0.5) -> torch.Tensor:
    """
    Penalize different answers to noisy copies of an image (Jeong and Shin 2020, arXiv 2006.04062).

    The loss is `weight` times the mean Kullback-Leibler divergence from the copies' mean probabilities to each copy's, plus
    `entropy_weight` times the entropy of that mean. It makes certified radii larger: a large radius needs a p_A near
    1, so the answers must agree.

    Args:
        logits: `(copies, batch, classes)`; the copies of an image have the same noise level. For clean copies only the
            entropy counts.
        weight: weight of the divergence, 0 or above.
        entropy_weight: weight of the entropy; the default is the paper's.

    Returns:
        A scalar, the mean over the batch.
    """
    log_p = logits.log_softmax(-1)
    log_mean = log_p.logsumexp(0) - math.log(len(logits))
    mean = log_mean.exp()
    divergence = (mean * (log_mean - log_p)).sum(-1).mean()
    entropy = -(mean * log_mean).sum(-1).mean()
    return weight * divergence + entropy_weight * entropy
