"""BEM: adapt a frozen language model chunk by chunk, and know whether the new version is better.

The names below load what they need when first used: `import bem` itself stays light. It makes PEFT know
BEM's method, so that `PeftModel.from_pretrained` loads what was saved.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from bem.adapters.peft_hook import register_with_peft

if TYPE_CHECKING:
    from bem.adapters.attach import Attached, attach, from_peft, load
    from bem.adapters.checks import check_adapter
    from bem.adapters.peft_method import BemConfig
    from bem.bases.load import load_base
    from bem.engine.engine import Engine
    from bem.engine.grammar import Grammar
    from bem.engine.request import Request, Sampling
    from bem.experts.expert import read_expert
    from bem.online.drift import DriftDetector
    from bem.routing.mount import load_router, mount
    from bem.routing.mounted import Mounted
    from bem.routing.router import AgenticRouter
    from bem.stats import bca_bootstrap, benjamini_hochberg_correction, judge
    from bem.system import BEMv13System, PerformanceTracker, StatisticalValidator
    from bem.training.fit_router import RouterFit, fit_router

__version__ = "0.1.0"

_WHERE = {
    "AgenticRouter": "bem.routing.router",
    "Attached": "bem.adapters.attach",
    "BEMv13System": "bem.system",
    "BemConfig": "bem.adapters.peft_method",
    "DriftDetector": "bem.online.drift",
    "Engine": "bem.engine.engine",
    "Grammar": "bem.engine.grammar",
    "Mounted": "bem.routing.mounted",
    "PerformanceTracker": "bem.system",
    "Request": "bem.engine.request",
    "RouterFit": "bem.training.fit_router",
    "Sampling": "bem.engine.request",
    "StatisticalValidator": "bem.system",
    "attach": "bem.adapters.attach",
    "bca_bootstrap": "bem.stats",
    "benjamini_hochberg_correction": "bem.stats",
    "check_adapter": "bem.adapters.checks",
    "fit_router": "bem.training.fit_router",
    "from_peft": "bem.adapters.attach",
    "judge": "bem.stats",
    "load": "bem.adapters.attach",
    "load_base": "bem.bases.load",
    "load_router": "bem.routing.mount",
    "mount": "bem.routing.mount",
    "read_expert": "bem.experts.expert",
}

__all__ = [
    "AgenticRouter",
    "Attached",
    "BEMv13System",
    "BemConfig",
    "DriftDetector",
    "Engine",
    "Grammar",
    "Mounted",
    "PerformanceTracker",
    "Request",
    "RouterFit",
    "Sampling",
    "StatisticalValidator",
    "attach",
    "bca_bootstrap",
    "benjamini_hochberg_correction",
    "check_adapter",
    "fit_router",
    "from_peft",
    "judge",
    "load",
    "load_base",
    "load_router",
    "mount",
    "read_expert",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'bem' has no attribute {name!r}")
    return getattr(import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_WHERE])


register_with_peft()
