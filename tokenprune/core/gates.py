"""Gates: a choice of tokens that a gradient can go through, for training what chooses.

In training nothing is removed. Each token has a gate, 0 or 1, and the logarithm of it is added to every attention logit
with its key: at 0 the token is as good as gone. The value of a gate is hard, its gradient that of a soft one
(straight-through), and noise on the scores lets tokens be tried that would not have been chosen.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tokenprune.core import ops

EPSILON = {torch.float32: 1e-6, torch.bfloat16: 1e-6, torch.float16: 1e-4}
"""What a closed gate counts as: the logarithm of 0 would give no gradient. Smaller is nearer to removal; float16 needs
more, or its gradients round to nothing."""


def noisy_top_k(
    scores: Tensor, counts: Sequence[int], *, temperature: float = 1.0, generator: torch.Generator | None = None
) -> Tensor:
    """Gates ``[B, N]`` that are 1 for exactly ``counts[i]`` tokens of row i: the best under Gumbel noise.

    Its gradient is that of ``sigmoid((z - threshold) / temperature)``, where z are the noisy scores and the threshold
    lies halfway between the last that is kept and the first that is not.

    Args:
        scores: ``[B, N]`` float32, -inf on padding.
        counts: tokens to keep of each row, at most its real ones.
        temperature: of the gradient, and of the noise; higher explores more.
        generator: of the noise; PyTorch's own when left out.

    Source: top-k by perturbation (Kool et al., arXiv:1903.06059), straight-through.
    """
    noise = -torch.empty_like(scores).exponential_(generator=generator).log()  # Gumbel
    noisy = scores + temperature * noise
    hard = ops.mask_of(ops.top_k(noisy.detach(), tuple(counts)), scores.shape[1], padded=True).to(scores.dtype)
    kept = noisy.detach().masked_fill(hard == 0, torch.inf).amin(1, keepdim=True)
    gone = noisy.detach().masked_fill(hard == 1, -torch.inf).amax(1, keepdim=True)
    # Where all or none are kept one side has no token, and the other alone sets the threshold.
    gone = torch.where(gone.isfinite(), gone, kept)
    kept = torch.where(kept.isfinite(), kept, gone)
    return _straight_through(hard, torch.sigmoid((noisy - (kept + gone) / 2) / temperature))


def gumbel(scores: Tensor, *, temperature: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
    """Gates ``[B, N]`` that are 1 where a score under logistic noise is above 0: adaptive counts.

    Args:
        scores: ``[B, N]`` float32 logits of keeping a token, -inf on padding.
        temperature: of the gradient, and of the noise.
        generator: of the noise; PyTorch's own when left out.

    Source: binary Gumbel-softmax (Jang et al., arXiv:1611.01144), straight-through.
    """
    uniform = torch.empty_like(scores).uniform_(1e-6, 1 - 1e-6, generator=generator)
    noisy = scores + temperature * torch.logit(uniform)
    return _straight_through((noisy > 0).to(scores.dtype), torch.sigmoid(noisy / temperature))


def batch_threshold(scores: Tensor, share: float) -> Tensor:
    """The score that `share` of all real tokens of the batch lie above, a scalar with a gradient.

    Halfway between the last that is above and the first that is not. An adaptive gate that is centred there meets its
    budget on average, and each sample as it needs.

    Args:
        scores: ``[B, N]`` float32, -inf on padding.
        share: of the tokens, in (0, 1].
    """
    real = scores[scores.isfinite()].sort(descending=True).values
    count = min(len(real), max(1, round(share * len(real))))
    return (real[count - 1] + real[min(count, len(real) - 1)]) / 2


def log_gate(gate: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The bias ``[B, N]`` that a gate adds to attention: 0 for an open one; `dtype` is that of the attention."""
    return torch.log(gate + EPSILON[dtype]) - torch.log(torch.ones_like(gate) + EPSILON[dtype])


def _straight_through(hard: Tensor, soft: Tensor) -> Tensor:
    return hard + (soft - soft.detach())  # the bracket is exactly 0
