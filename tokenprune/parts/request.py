"""`RequestHead`: whether to ask for the full picture, by what a first pass has made of the small one."""

from __future__ import annotations

from torch import Tensor, nn

from tokenprune.parts.learned import Host, Learned

DIM = 32
"""Numbers between its two layers."""


class RequestHead(Learned):
    """A learned request for the full picture: two layers on the last hidden state of the prompt, of a first pass.

    That state predicts the first word of the answer, so it knows of the question and of what the small picture showed.
    VisionThink (arXiv:2507.13348) trains the language model to ask in words; this leaves the model as it is. It is no
    part of a stage: `again.weights` of a recipe names its weights, and `tokenprune fit` makes them.

    Untrained it asks with probability 1/2 whatever it reads, the balanced start that the paper asks for; as that is not
    above 1/2, it never does.
    """

    role, suffix = "learned", "Head"

    def __init__(self) -> None:
        super().__init__()
        self.title = "the learned request (again.weights)"

    def make(self, host: Host) -> None:
        self.norm = nn.LayerNorm(host.width)
        self.hidden = nn.Linear(host.width, DIM)
        self.out = nn.Linear(DIM, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, states: Tensor) -> Tensor:
        """``[B]`` log-odds of asking.

        Args:
            states: ``[B, D]`` hidden states of the last position of prompts, as the model's output layer reads them.
        """
        odds: Tensor = self.out(nn.functional.gelu(self.hidden(self.norm(states.float()))))
        return odds.squeeze(-1)

    @property
    def products(self) -> int:
        """Multiply-adds for one question."""
        assert self.host is not None, "nothing runs without parameters"
        return self.host.width * DIM + DIM
