"""Online learning: feedback, a learner on a shadow, trials, promotion and rollback, drift.

detector = DriftDetector()
if detector.update(score) is DriftStatus.DRIFT_DETECTED:
    print(detector.alarm.text)

What needs torch is imported from its own module (`loop`, `adapter_trainee`, `router_trainee`, `penalties`, `kl_region`);
so is the log, which needs the extra `online` (`feedback`).
"""

from bem.online.canary import Canary, CanaryStatus, Margins
from bem.online.drift import Alarm, DriftDetector, DriftStatus
from bem.online.input_drift import InputDrift, InputLook
from bem.online.replay import Item, Replay

__all__ = [
    "Alarm",
    "Canary",
    "CanaryStatus",
    "DriftDetector",
    "DriftStatus",
    "InputDrift",
    "InputLook",
    "Item",
    "Margins",
    "Replay",
]
