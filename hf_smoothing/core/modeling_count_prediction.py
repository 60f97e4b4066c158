"""The count head: class frequencies under noise, predicted from one pass over the clean image (arXiv 2402.07498)."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.utils import ModelOutput

from .configuration_mixed_noise_vit import MixedNoiseViTConfig
from .modeling_mixed_noise_vit import MixedNoiseViTModel, MixedNoiseViTPreTrainedModel

_EPSILON = 1e-6
"""Tolerance of noise levels, which come in float32, and the variance of a single token."""


@dataclass
class CountPredictionOutput(ModelOutput):
    """
    Args:
        loss: only if counts were given.
        logits: `(batch, num_labels)`, or `(batch, levels, num_labels)` where each image has several noise levels.
        probabilities: softmax of the logits: the expected share of each class among noisy copies. After training with
            [`probit_error`] or [`logistic_normal`] they are typical values rather than means, nearer to 0 or 1.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    probabilities: torch.Tensor | None = None


def jensen_shannon(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """
    Mean Jensen-Shannon divergence between predicted and measured frequencies, in nats (at most ln 2).

    Frequencies measured with few draws bias it towards 0 and 1: for p = .97 a perfect head learns about .985 from 16 draws,
    and about .97 from 1,000. [`soft_cross_entropy`] is linear in the frequencies and has no such bias.

    Args:
        logits: `(batch, classes)`.
        targets: `(batch, classes)`, of sum 1.
    """
    log_predicted = logits.log_softmax(1)
    # in logarithms: a share that underflows must not make the gradient of another one NaN
    log_middle = torch.logaddexp(log_predicted, targets.log()) - math.log(2)
    to_middle = torch.xlogy(targets, targets) - targets * log_middle
    from_predicted = log_predicted.exp() * (log_predicted - log_middle)
    return (to_middle + from_predicted).sum(1).mean() / 2


def soft_cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of the predicted against the measured frequencies, in nats; arguments as [`jensen_shannon`]."""
    return nn.functional.cross_entropy(logits, targets)


def logistic_normal(logits: torch.Tensor, counts: torch.Tensor, log_spread: torch.Tensor) -> torch.Tensor:
    """
    Mean negative log-likelihood of the counts, in nats per draw, for logits with normal errors.

    The other losses learn the mean of the possible frequencies of an image. Where p is near 1, the mean is well below the
    typical value, and radii become too small. Here the logits are the centre of the possible values, and errors of a learned
    size explain the rest. It needs [`LOGISTIC_NORMAL_DRAWS`] per image: a single draw cannot tell errors of the logits from
    random draws, and with many draws few of the sampled errors explain the counts.

    Args:
        logits: `(batch, classes)`.
        counts: `(batch, classes)`, numbers of draws.
        log_spread: `(batch,)`, logarithm of the standard deviation of the errors (torch's generator), clamped to [-4, 2].
    """
    errors = torch.randn(len(logits), _ERRORS // 2, logits.shape[1], dtype=logits.dtype, device=logits.device)
    errors = log_spread.clamp(-4, 2).exp()[:, None, None] * torch.cat([errors, -errors], 1)
    likelihoods = ((logits[:, None] + errors).log_softmax(-1) * counts[:, None]).sum(-1)
    return -((likelihoods.logsumexp(1) - math.log(_ERRORS)) / counts.sum(1)).mean()


_ERRORS = 128
"""Number of sampled errors over which the likelihood of an image's counts is averaged."""

LOGISTIC_NORMAL_DRAWS = range(2, 17)
"""Draws per image for which [`logistic_normal`] works. With a hundred it overestimates the spread and underestimates the
centre."""


def kullback_leibler(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """
    Mean Kullback-Leibler divergence of the measured from the predicted frequencies: [`soft_cross_entropy`] minus the entropy
    of the measured ones. It has the same gradient, and is 0 for a right prediction. Arguments as [`jensen_shannon`].
    """
    return nn.functional.kl_div(logits.log_softmax(1), targets, reduction="batchmean")


def probit_error(logits: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """
    Mean absolute error of the probits `Phi^-1(p)` of the classes, each weighted with the larger one of its predicted and
    measured frequencies.

    The radius is sigma times the probit of the top class: this is the error of the radius, in units of sigma. An absolute
    error is least at the median of the possible values, and the radius of the median is the median of the radii. The mean
    frequency, which [`soft_cross_entropy`] and [`jensen_shannon`] teach, gives smaller radii where the head is unsure of p.
    The weights keep the head from spending its capacity on classes that hardly occur. With few draws the probits of
    measured frequencies are random themselves: it takes [`PROBIT_DRAWS`] or more.

    Args:
        logits: `(batch, classes)`.
        counts: `(batch, classes)`, numbers of draws; half a draw is added to each, because 0 and 1 have no probit.
    """
    frequencies = (counts + 0.5) / (counts.sum(1, keepdim=True) + 1)
    others = logits[:, None].masked_fill(torch.eye(logits.shape[1], dtype=torch.bool, device=logits.device), -math.inf)
    log_odds = logits - others.logsumexp(-1)
    errors = (_probit(log_odds) - torch.special.ndtri(frequencies)).abs()
    weights = torch.maximum(logits.softmax(1).detach(), frequencies)
    return (weights * errors).sum(1).mean()


def _probit(log_odds: torch.Tensor) -> torch.Tensor:
    """The probit of probabilities, from their log-odds, which keep the digits of those near 1."""
    bounded = log_odds.clamp(-_LARGEST_LOG_ODDS, _LARGEST_LOG_ODDS)
    sign = torch.where(bounded < 0, 1, -1)  # never 0, where the gradient would vanish
    inside = sign * torch.special.ndtri(torch.sigmoid(sign * bounded))
    # further out a straight line, so that the gradient does not vanish; its slope is about that of the probit
    return inside + 0.2 * (log_odds - bounded)


_LARGEST_LOG_ODDS = 15.0

PROBIT_DRAWS = 100
"""Draws per image from which on [`probit_error`] works."""

FREQUENCY_LOSSES = {"jensen_shannon": jensen_shannon, "cross_entropy": soft_cross_entropy, "kl": kullback_leibler}
"""Losses that depend on the frequencies only, not on the number of draws."""

LOSSES = (*FREQUENCY_LOSSES, "probit", "logistic_normal")


class CountHead(nn.Module):
    """
    From the features of an image and a noise level to class logits.

    It starts from the base classifier's logits, at a temperature that depends on the noise level. A small network, modulated
    by the level, adds a correction. Its features come from all layers of the encoder, since the last one keeps little
    information about the effect of noise on an image.
    """

    def __init__(self, hidden_size: int, num_hidden_layers: int, num_labels: int):
        super().__init__()
        parts = 1 + 2 * num_hidden_layers
        width = parts * hidden_size
        self.norm = nn.GroupNorm(parts, width)  # each part on its own: layers differ in scale
        self.modulation = nn.Sequential(nn.Linear(3, 64), nn.GELU(), nn.Linear(64, 2 * width + 1))
        self.hidden = nn.Linear(width, hidden_size)
        self.output = nn.Linear(hidden_size, num_labels + 1)
        self.act = nn.GELU()

    def forward(
        self, features: torch.Tensor, logits: torch.Tensor, sigma: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Class logits, and the logarithm of the spread of their errors, which only [`logistic_normal`] uses."""
        level = torch.log2(sigma)[..., None]
        modulation = self.modulation(torch.cat([level, level**2 / 4, sigma[..., None]], -1))
        scale, shift, log_gain = modulation.split([features.shape[1], features.shape[1], 1], -1)
        normed = self.norm(features)
        if sigma.ndim == 2:  # several levels per image
            normed, logits = normed[:, None], logits[:, None]
        added = self.output(self.act(self.hidden(normed * (1 + scale) + shift)))
        return logits * log_gain.exp() + added[..., :-1], added[..., -1]


class MixedNoiseViTForCountPrediction(MixedNoiseViTPreTrainedModel):
    """
    Predicts from a clean image how often each class is predicted among its noisy copies: an estimate, with no guarantee.

    One head serves every noise level from the smallest to the largest of `config.count_sigmas`. Encoder and classifier may
    be those of the base classifier (frozen: one pass gives prediction and estimate) or trained with the head.

    Source: Accelerated Smoothing (arXiv 2402.07498).
    """

    def __init__(self, config: MixedNoiseViTConfig):
        super().__init__(config)
        if config.count_sigmas is None:
            raise ValueError("The config has no count_sigmas: set the noise levels that the count head is for.")
        self.mixed_noise_vit = MixedNoiseViTModel(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.count_head = CountHead(config.hidden_size, config.num_hidden_layers, config.num_labels)
        self.post_init()

    def features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """
        The features of clean images: the pooled output, then mean and standard deviation over the tokens of each block,
        `(batch, (1 + 2 * num_hidden_layers) * hidden_size)`.
        """
        encoded = self.mixed_noise_vit(pixel_values, output_hidden_states=True)
        features = [encoded.pooler_output]
        for tokens in encoded.hidden_states:
            # a single token has no variance, and the root has no gradient at 0
            features += [tokens.mean(1), (tokens.var(1, correction=0) + _EPSILON).sqrt()]
        return torch.cat(features, 1)

    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        sigma: float | torch.Tensor = 0.0,
        counts: torch.Tensor | None = None,
        features: torch.Tensor | None = None,
        loss: str = "jensen_shannon",
        return_dict: bool | None = None,
    ) -> CountPredictionOutput:
        """
        Args:
            pixel_values: clean images `(batch, channels, height, width)` in `[0, 1]`.
            sigma: noise level in `[0, 1]` pixels: a single one, `(batch,)`, or `(batch, levels)` for several levels per
                image, which goes through the encoder only once.
            counts: measured counts of the shape of the logits; with them the output holds the loss.
            features: the output of [`features`], instead of the images.
            loss: one of [`LOSSES`].
            return_dict: `False` for a plain tuple.

        Raises:
            ValueError: for a noise level outside the trained range, an unknown loss, counts of another shape; without images
                and features.
        """
        if loss not in LOSSES:
            raise ValueError(f"loss={loss!r} is unknown: use {', '.join(LOSSES)}.")
        if features is None:
            if pixel_values is None:
                raise ValueError("Give pixel_values or features.")
            features = self.features(pixel_values)
        sigma = torch.as_tensor(sigma, dtype=features.dtype, device=features.device)
        if sigma.ndim < 2:
            sigma = sigma.expand(len(features))
        levels = self.config.count_sigmas or ()
        if not bool(((sigma >= min(levels) - _EPSILON) & (sigma <= max(levels) + _EPSILON)).all()):
            asked = dict.fromkeys(f"{level:g}" for level in (float(sigma.min()), float(sigma.max())))
            raise ValueError(
                f"sigma={' to '.join(asked)} is outside what the count head was trained for "
                f"({min(levels):g} to {max(levels):g})."
            )
        pooled = features[:, : self.config.hidden_size]
        logits, log_spread = self.count_head(features, self.classifier(pooled), sigma)
        loss_value: Any = None
        if counts is not None:
            if counts.shape != logits.shape:
                raise ValueError(f"counts have shape {tuple(counts.shape)}, the logits {tuple(logits.shape)}.")
            # forward passes may be in 16 bits, but sums over draws and differences of their logarithms may not
            exact = torch.promote_types(logits.dtype, torch.float32)
            rows, targets = logits.to(exact).flatten(0, -2), counts.to(exact).flatten(0, -2)
            if loss in FREQUENCY_LOSSES:
                loss_value = FREQUENCY_LOSSES[loss](rows, targets / targets.sum(-1, keepdim=True))
            elif loss == "probit":
                loss_value = probit_error(rows, targets)
            else:
                loss_value = logistic_normal(rows, targets, log_spread.to(exact).flatten())
        output = CountPredictionOutput(loss=loss_value, logits=logits, probabilities=logits.softmax(-1))
        return output if return_dict is not False else output.to_tuple()


__all__ = ["CountPredictionOutput", "MixedNoiseViTForCountPrediction"]
