"""Trust region policy optimisation (TRPO; arXiv:1502.05477, appendix C).

    maximise   mean[ pi(a|s) / mu(a|s) * A ]      subject to   mean KL(pi_old || pi) <= delta

with behaviour policy mu and advantages A normalised in the batch. One step:

    g    gradient of the surrogate at the old weights
    F    Hessian of mean KL(pi_old || pi) there (the Fisher matrix), only as products F v
    x    conjugate gradient on (F + damping I) x = g
    step sqrt(2 delta / x^T (F + damping I) x) x, shortened until the exact KL is at most delta, the
         surrogate has improved and everything is finite

If no candidate passes, the weights are what they were, bit for bit, and the result says why.
Rows whose every head has one option carry no decision and are left out, so that they thin out
neither the mean KL nor the scale of the advantages.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from bem.errors import Diverged
from bem.routing.distribution import HeadsDistribution

Operator = Callable[[Tensor], Tensor]
_PER_ROW = ("log_probs", "advantages")


@runtime_checkable
class Policy(Protocol):
    """What TRPO asks of a policy: deterministic (no dropout) and twice differentiable."""

    def distribution(self, obs: Tensor, masks: Sequence[Tensor], /) -> HeadsDistribution:
        """Distribution of the actions in each row of obs (n, d), masks bool (n, n_h) per head."""
        ...

    def parameters(self) -> Iterable[nn.Parameter]:
        """Everything that `distribution` depends on and that may learn."""
        ...


@dataclass(frozen=True)
class Batch:
    """Decisions taken by the behaviour policy; n rows."""

    obs: Tensor
    """(n, d)"""
    masks: tuple[Tensor, ...]
    """bool (n, n_h) per head: the masks under which the actions were drawn."""
    actions: Tensor
    """int64 (n, heads)"""
    log_probs: Tensor
    """(n,) of `actions` under the policy that drew them."""
    advantages: Tensor
    """(n,), not normalised."""

    def rows(self, index: Tensor) -> Batch:
        """The rows that `index` (numbers, or bool (n,)) selects."""
        masks = tuple(mask[index] for mask in self.masks)
        rest = (self.actions[index], self.log_probs[index], self.advantages[index])
        return Batch(self.obs[index], masks, *rest)


@dataclass(frozen=True)
class PolicyStep:
    """What one step did. Means are over rows in which there was something to choose."""

    accepted: bool
    kl: float
    """Mean KL(old || new), nats; 0 if refused, for nothing has changed."""
    surrogate: float
    """Gain of the surrogate, in standard deviations of the advantage; 0 if refused."""
    entropy: float
    """Mean entropy of the policy after the step, nats."""
    backtracks: int
    """How often the step was shortened."""
    step_norm: float
    """Length of the step in parameter space; 0 if refused."""
    cg_residual: float
    """|| (F + damping I) x - g || / || g ||; 1 if conjugate gradient did not start."""
    reason: str
    """Why the step was refused; '' if accepted."""


class TRPOOptimizer:
    """Takes natural-gradient steps that stay inside the trust region. Deterministic, no state."""

    def __init__(
        self,
        policy: Policy,
        delta: float = 0.01,
        damping: float = 0.1,
        cg_iterations: int = 10,
        backtracks: int = 10,
        shrink: float = 0.8,
    ):
        """
        Args:
            delta: largest mean KL(old || new) of a step, nats.
            damping: added to the Fisher matrix's diagonal.
            cg_iterations: conjugate-gradient iterations, one Fisher-vector product each.
            backtracks: how often a candidate may be shortened.
            shrink: factor of each shortening, in (0, 1).
        """
        if not (delta > 0 and damping >= 0 and cg_iterations > 0 and backtracks >= 0):
            raise ValueError(
                f"need delta > 0, damping >= 0, cg_iterations > 0, backtracks >= 0; got {delta}, "
                f"{damping}, {cg_iterations}, {backtracks}."
            )
        if not 0 < shrink < 1:
            raise ValueError(f"shrink must lie strictly between 0 and 1, got {shrink}.")
        self.policy, self.delta, self.damping = policy, delta, damping
        self.cg_iterations, self.backtracks, self.shrink = cg_iterations, backtracks, shrink

    def step(self, batch: Batch) -> PolicyStep:
        """Improve the policy on one batch, or leave it as it is and say why.

        Raises:
            ValueError: shapes that do not fit, or an action that its mask calls impossible.
            Diverged: observations, log-probabilities or advantages that are not finite.
        """
        _check(batch)
        batch = _decisions(batch)
        if len(batch.obs) == 0:
            return _refused("no row leaves anything to choose", entropy=0.0)
        batch = _normalised(batch)
        parameters = _trainable(self.policy)
        new = self.policy.distribution(batch.obs, batch.masks)
        old, entropy = new.detach(), new.entropy().mean().item()
        surrogate = _surrogate(new, batch)
        gradient = _flat_gradient(surrogate, parameters)
        if not torch.isfinite(gradient).all():
            return _refused("the gradient of the surrogate is not finite", entropy)
        if not gradient.any():
            return _refused("the gradient is zero: no advantage differs, or no head can", entropy)
        fisher = fisher_vector_product(self.policy, batch.obs, batch.masks, self.damping)
        direction, residual = conjugate_gradient(fisher, gradient, self.cg_iterations)
        curvature = torch.dot(direction, fisher(direction)).item()
        unchanged = _refused(f"the curvature along the step is {curvature:g}", entropy, residual)
        if not 0 < curvature < math.inf:
            return unchanged
        full = direction * math.sqrt(2 * self.delta / curvature)
        return self._line_search(batch, parameters, old, surrogate.item(), full, unchanged)

    def _line_search(
        self,
        batch: Batch,
        parameters: Sequence[nn.Parameter],
        old: HeadsDistribution,
        before: float,
        full: Tensor,
        unchanged: PolicyStep,
    ) -> PolicyStep:
        """Leave the policy at the longest acceptable step, or exactly where it was."""
        saved = [p.detach().clone() for p in parameters]
        accepted, kl, gain = None, math.nan, math.nan
        try:
            for k in range(self.backtracks + 1):
                step = full * self.shrink**k
                _set(parameters, saved, step)
                kl, gain, entropy = self._measure(batch, old, before)
                # a NaN fails every comparison, so it is never accepted
                if kl <= self.delta and 0 < gain < math.inf and _all_finite(parameters):
                    length = torch.linalg.norm(step).item()
                    residual = unchanged.cg_residual
                    accepted = PolicyStep(True, kl, gain, entropy, k, length, residual, "")
                    return accepted
        finally:  # also if the policy raised at a candidate
            if accepted is None:
                _set(parameters, saved)
        reason = (
            f"no candidate kept KL <= {self.delta:g} and improved the surrogate; the last of "
            f"{self.backtracks + 1} had KL {kl:.3g} and gain {gain:.3g}"
        )
        return replace(unchanged, backtracks=self.backtracks, reason=reason)

    @torch.no_grad()
    def _measure(
        self, batch: Batch, old: HeadsDistribution, before: float
    ) -> tuple[float, float, float]:
        """Exact mean KL, gain of the surrogate, and entropy, of the weights as they are now."""
        new = self.policy.distribution(batch.obs, batch.masks)
        kl = old.kl(new).double().mean().item()
        return kl, _surrogate(new, batch).item() - before, new.entropy().mean().item()


def fisher_vector_product(
    policy: Policy, obs: Float[Tensor, "n d"], masks: Sequence[Tensor], damping: float = 0.0
) -> Operator:
    """v -> (F + damping I) v, F the policy's mean Fisher matrix over the rows of obs.

    F = mean_s sum_a pi(a|s) grad log pi(a|s) grad log pi(a|s)^T is the Hessian of
    mean KL(pi_old || pi) at pi = pi_old, so F v is the gradient of (grad KL . v): two passes
    backwards, and F is never formed. v is flat, in the order of `policy.parameters()`.
    """
    parameters = _trainable(policy)
    new = policy.distribution(obs, masks)
    kl = new.detach().kl(new).mean()
    slope = _flat_gradient(kl, parameters, create_graph=True)

    def product(v: Tensor) -> Tensor:
        return _flat_gradient(torch.dot(slope, v), parameters, retain_graph=True) + damping * v

    return product


def conjugate_gradient(
    product: Operator, b: Float[Tensor, " n"], iterations: int, tolerance: float = 1e-5
) -> tuple[Float[Tensor, " n"], float]:
    """Approximate solution of A x = b from x = 0, and the relative residual ||A x - b|| / ||b||.

    Stops early at `tolerance`, or where p^T A p <= 0: rounding has left A indefinite along p, and
    going on would go uphill.
    """
    x, r, p = torch.zeros_like(b), b.clone(), b.clone()
    start = squared = torch.dot(r, r)
    for _ in range(iterations):
        image = product(p)
        curvature = torch.dot(p, image)
        if not curvature > 0:  # also true for NaN
            break
        step = squared / curvature
        x, r = x + step * p, r - step * image
        before, squared = squared, torch.dot(r, r)
        if squared <= tolerance**2 * start:
            break
        p = r + (squared / before) * p
    return x, (squared / start).sqrt().item()


def _surrogate(new: HeadsDistribution, batch: Batch) -> Tensor:
    ratio = (new.log_prob(batch.actions) - batch.log_probs).exp()
    return (ratio * batch.advantages).mean()


def _trainable(policy: Policy) -> list[nn.Parameter]:
    return [p for p in policy.parameters() if p.requires_grad]


def _flat_gradient(
    scalar: Tensor, parameters: Sequence[nn.Parameter], create_graph=False, retain_graph=None
) -> Tensor:
    """Gradient as one vector; 0 for parameters that the scalar does not depend on."""
    gradients = torch.autograd.grad(
        scalar,
        parameters,
        create_graph=create_graph,
        retain_graph=retain_graph,
        allow_unused=True,
        materialize_grads=True,
    )
    return torch.cat([g.reshape(-1) for g in gradients])


@torch.no_grad()
def _set(
    parameters: Sequence[nn.Parameter], saved: Sequence[Tensor], step: Tensor | None = None
) -> None:
    """Write the saved weights, plus a flat step if there is one."""
    start = 0
    for parameter, weight in zip(parameters, saved, strict=True):
        parameter.copy_(weight)
        if step is not None:
            parameter += step[start : start + weight.numel()].view_as(weight)
            start += weight.numel()


def _all_finite(parameters: Sequence[nn.Parameter]) -> bool:
    return all(bool(torch.isfinite(p).all()) for p in parameters)


def _check(batch: Batch) -> None:
    n, heads = len(batch.obs), len(batch.masks)
    shapes = {name: tuple(getattr(batch, name).shape) for name in ("actions", *_PER_ROW)}
    if shapes != {"actions": (n, heads), **dict.fromkeys(_PER_ROW, (n,))}:
        raise ValueError(
            f"{n} rows of obs and {heads} masks need actions ({n}, {heads}), log_probs ({n},) and "
            f"advantages ({n},); got {shapes}."
        )
    for name in ("obs", *_PER_ROW):
        count = int((~torch.isfinite(getattr(batch, name))).sum())
        if count:
            raise Diverged(f"{count} of {name} are not finite: look at the critic and the rewards.")


def _decisions(batch: Batch) -> Batch:
    """Rows in which at least one head has more than one option."""
    return batch.rows(torch.stack([mask.sum(-1) > 1 for mask in batch.masks]).any(0))


def _normalised(batch: Batch) -> Batch:
    """Advantages with mean 0 and standard deviation 1; all 0 if they differ by rounding only."""
    centred = batch.advantages - batch.advantages.mean()
    spread = centred.square().mean().sqrt()
    differ = spread > 1e-6 * batch.advantages.abs().max()
    return replace(batch, advantages=torch.where(differ, centred / spread, 0.0))


def _refused(reason: str, entropy: float, residual: float = 1.0) -> PolicyStep:
    return PolicyStep(False, 0.0, 0.0, entropy, 0, 0.0, residual, reason)
