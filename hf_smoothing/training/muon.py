"""Muon for the encoder's matrices, AdamW for all other parameters: one optimizer."""

from collections.abc import Callable
from typing import Any

import torch
from timm.optim.muon import zeropower_via_newtonschulz

_MOMENTUM = 0.95
_NEWTON_SCHULZ_STEPS = 3
_COEFFICIENTS = [(3.4445, -4.7750, 2.0315)]


class MuonAdamW(torch.optim.AdamW):
    """
    AdamW, but Muon for parameter groups with `muon=True`: Nesterov momentum, then an update with singular values near 1.

    A convolution counts as a matrix `(out, in * height * width)`. Updates are scaled by `sqrt(max(1, out / in))`. The
    Newton-Schulz iterations run in float32: in bfloat16, as in the optimizers of torch and timm, they take 25 times as long
    on a CPU without bfloat16 instructions, more than the model's own passes.

    Args:
        params: parameter groups, each with a `muon` of `True` or `False`; see [`group_parameters`].
        options: of AdamW, for all other groups.

    Source: Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks".
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"] if group["muon"] else ():
                if parameter.grad is not None:
                    self._step_muon(parameter, group["lr"], group["weight_decay"])
                    parameter.grad = None  # AdamW leaves it out
        super().step()
        return loss

    def _step_muon(self, parameter: torch.Tensor, learning_rate: float, weight_decay: float) -> None:
        gradient = parameter.grad
        assert gradient is not None
        state = self.state[parameter]
        if not state:
            # AdamW expects a number of steps in every state that it loads
            state.update(step=torch.tensor(0.0), momentum_buffer=torch.zeros_like(parameter))
        momentum = state["momentum_buffer"]
        momentum.lerp_(gradient, 1 - _MOMENTUM)
        matrix = gradient.lerp(momentum, _MOMENTUM).flatten(1)
        update = zeropower_via_newtonschulz(matrix, _NEWTON_SCHULZ_STEPS, _COEFFICIENTS, dtype=torch.float32)
        scale = max(1.0, matrix.shape[0] / matrix.shape[1]) ** 0.5
        parameter.mul_(1 - learning_rate * weight_decay).add_(
            update.view(parameter.shape), alpha=-learning_rate * scale
        )
