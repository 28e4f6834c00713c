"""Online learning that cannot make things worse: drift, canary, replay, penalties.

detector = DriftDetector()
if detector.update(score) is DriftStatus.DRIFT_DETECTED:
    print(detector.alarm)
"""

from bem.online.canary import Canary, CanaryStatus, Margins
from bem.online.drift import Alarm, DriftDetector, DriftStatus
from bem.online.input_drift import InputDrift, InputLook
from bem.online.kl_region import KlRegion
from bem.online.penalties import Fisher, OnlineEwc, Strength, exact_fisher, sampled_fisher
from bem.online.replay import Item, Replay

__all__ = [
    "Alarm",
    "Canary",
    "CanaryStatus",
    "DriftDetector",
    "DriftStatus",
    "Fisher",
    "InputDrift",
    "InputLook",
    "Item",
    "KlRegion",
    "Margins",
    "OnlineEwc",
    "Replay",
    "Strength",
    "exact_fisher",
    "sampled_fisher",
]
