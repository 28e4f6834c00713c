"""How small an effect these data can show, and how many more examples would decide."""

from __future__ import annotations

from math import ceil

from scipy.special import ndtri


def minimal_detectable_effect(se: float, alpha: float = 0.05, power: float = 0.8) -> float:
    """Smallest true effect that a two-sided test at `alpha` finds with probability `power`.

    MDE = (z_{1 - alpha/2} + z_power) * se   (Miller 2024, arXiv:2411.00640, sec. 5)

    Args:
        se: standard error of the effect; with clusters or seeds it must contain them.
    """
    return _total_z(alpha, power) * se


def more_examples(
    distance: float, se: float, n: int, alpha: float = 0.05, power: float = 0.8
) -> int | None:
    """Examples beyond `n` after which a limit would clear a bound that the estimate is `distance`
    from.

    The standard error falls with sqrt(n). None if the estimate lies on the wrong side (distance <=
    0): more examples of the same kind would not help."""
    if distance <= 0:
        return None
    needed = n * (_total_z(alpha, power) * se / distance) ** 2
    return max(0, ceil(needed - 1e-9) - n)


def _total_z(alpha: float, power: float) -> float:
    return float(ndtri(1 - alpha / 2) + ndtri(power))
