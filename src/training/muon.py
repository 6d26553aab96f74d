"""Muon for the matrices of the blocks and AdamW for the rest, as one optimizer."""

from collections.abc import Callable

import torch
from torch.optim import AdamW, Muon, Optimizer


class MuonAdamW(Optimizer):
    """PyTorch's Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) and AdamW on their own parameters.

    The groups of both, Muon's first, are the groups of this optimizer, and all state is kept here: whatever schedules,
    clips, saves or restores one optimizer does so with both. Muon multiplies in bfloat16, whatever the precision.
    """

    def __init__(self, muon: Muon, adamw: AdamW) -> None:
        super().__init__([*muon.param_groups, *adamw.param_groups], {})
        self._parts = ((muon, len(muon.param_groups)), (adamw, len(adamw.param_groups)))

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = iter(self.param_groups)
        for part, count in self._parts:
            # handed over at each step, since load_state_dict puts new ones in their place
            part.param_groups = [next(groups) for _ in range(count)]
            part.state = self.state
            part.step()
        return loss
