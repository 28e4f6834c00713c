"""The policy's action distribution: independent categorical heads, each with a mask.

    log pi(a|s) = sum_h log softmax(z_h)[a_h]         softmax over the possible options of head h only
    KL(pi||rho) = sum_h sum_a pi_h(a) (log pi_h(a) - log rho_h(a))            (exact, not an estimate)

An impossible option has probability exactly 0 and adds 0, not 0 * inf, to every sum and gradient.
A head with one possible option is certain: it adds exactly 0 to log-probability, KL and entropy.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor


class HeadsDistribution:
    """Product of masked categorical distributions, twice differentiable in the logits.

    NaN in a possible option's logit comes out as NaN, so that a line search can see and refuse it;
    only drawing an action from it is an error.
    """

    def __init__(
        self, logits: Sequence[Tensor], masks: Sequence[Tensor], names: Sequence[str] = ()
    ):
        """
        Args:
            logits: (..., options) of each head.
            masks: bool, of the same shapes; True: possible.
            names: what errors call the heads; their numbers if empty.
        Raises:
            ValueError: shapes that do not fit, or a row with no possible option.
        """
        self.names = tuple(names) or tuple(str(h) for h in range(len(logits)))
        if not len(logits) == len(masks) == len(self.names) > 0:
            raise ValueError(
                f"{len(logits)} logits, {len(masks)} masks and {len(self.names)} names: one of each "
                "per head, and at least one head."
            )
        self.masks = tuple(masks)
        self._log_p = tuple(map(_masked_log_softmax, self.names, logits, masks))

    @property
    def log_probs(self) -> tuple[Tensor, ...]:
        """Log-probability of each option (..., n_h) per head; -inf where impossible."""
        return self._log_p

    @property
    def probs(self) -> tuple[Tensor, ...]:
        """Probability of each option (..., n_h) per head; exactly 0 where impossible."""
        return tuple(log_p.exp() for log_p in self._log_p)

    def detach(self) -> HeadsDistribution:
        """The same distribution as a constant."""
        return HeadsDistribution([p.detach() for p in self._log_p], self.masks, self.names)

    def sample(self, generator: torch.Generator) -> Int[Tensor, "*batch heads"]:
        """One action per row. The generator lives on the logits' device.

        Raises:
            ValueError: probabilities that are not finite.
        """
        drawn = []
        for name, p in zip(self.names, self.probs, strict=True):
            _check_finite(name, p)
            flat = torch.multinomial(p.reshape(-1, p.shape[-1]), 1, generator=generator)
            drawn.append(flat.reshape(p.shape[:-1]))
        return torch.stack(drawn, -1)

    def mode(self) -> Int[Tensor, "*batch heads"]:
        """Most likely action per row; of equal ones the first.

        Raises:
            ValueError: probabilities that are not finite.
        """
        for name, p in zip(self.names, self.probs, strict=True):
            _check_finite(name, p)
        return torch.stack([log_p.argmax(-1) for log_p in self._log_p], -1)

    def log_prob(self, actions: Int[Tensor, "*batch heads"]) -> Float[Tensor, "*batch"]:
        """Log-probability of actions.

        Raises:
            ValueError: an action that the mask calls impossible: it cannot have been executed.
        """
        total = torch.zeros((), dtype=self._log_p[0].dtype, device=actions.device)
        for h, (name, log_p) in enumerate(zip(self.names, self._log_p, strict=True)):
            chosen = actions[..., h : h + 1]
            if not self.masks[h].gather(-1, chosen).all():
                count = int((~self.masks[h].gather(-1, chosen)).sum())
                raise ValueError(
                    f"head {name}: {count} of {chosen.numel()} actions are masked as impossible. "
                    "Keep the mask under which an action was drawn beside the action."
                )
            total = total + log_p.gather(-1, chosen)[..., 0]
        return total

    def kl(self, other: HeadsDistribution) -> Float[Tensor, "*batch"]:
        """KL(self || other), summed over heads, in nats. Rounding can leave it just below 0.

        Raises:
            ValueError: the masks differ, so that KL could be infinite.
        """
        total = torch.zeros((), dtype=self._log_p[0].dtype, device=self._log_p[0].device)
        for h, mask in enumerate(self.masks):
            if not torch.equal(mask, other.masks[h]):
                raise ValueError(f"head {self.names[h]}: KL needs equal masks on both sides.")
            ours, theirs = _finite(self._log_p[h], mask), _finite(other._log_p[h], mask)
            total = total + (self._log_p[h].exp() * (ours - theirs)).sum(-1)
        return total

    def entropy(self) -> Float[Tensor, "*batch"]:
        """Entropy, summed over heads, in nats."""
        parts = [
            -(log_p.exp() * _finite(log_p, mask)).sum(-1)
            for log_p, mask in zip(self._log_p, self.masks, strict=True)
        ]
        return torch.stack(parts).sum(0)


def _masked_log_softmax(name: str, logits: Tensor, mask: Tensor) -> Tensor:
    if logits.shape != mask.shape or mask.dtype != torch.bool:
        raise ValueError(
            f"head {name}: logits {tuple(logits.shape)} need a bool mask of that shape, "
            f"got {mask.dtype} {tuple(mask.shape)}."
        )
    possible = mask.any(-1)
    if not possible.all():
        raise ValueError(
            f"head {name}: {int((~possible).sum())} of {possible.numel()} rows have no possible "
            "option. Leave at least one (for instance the current one) possible."
        )
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return wide.masked_fill(~mask, -torch.inf).log_softmax(-1)


def _finite(log_p: Tensor, mask: Tensor) -> Tensor:
    """0 for impossible options: 0 * 0 stays 0 in value and in both derivatives, 0 * -inf is NaN."""
    return log_p.masked_fill(~mask, 0.0)


def _check_finite(name: str, p: Tensor) -> None:
    if not torch.isfinite(p).all():
        rows = int((~torch.isfinite(p)).any(-1).sum())
        raise ValueError(f"head {name}: {rows} rows of logits are not finite: the policy diverged.")
