"""Every knob of BEM, with its unit.

A config is frozen, refuses keys it does not know (and names the nearest one), and is loaded from YAML:

    cfg = load("configs/quickstart.yaml", ["training.steps=50", "adapters.rank=8"])

The classes here hold plain values only; modules take plain numbers, never a config object.
"""

from __future__ import annotations

from bem.config.adapters import (
    EVIDENCE_FEATURES,
    KINDS,
    VARIANTS,
    AdapterConfig,
    TrainingConfig,
    parse_adapter,
)
from bem.config.arm import ArmConfig
from bem.config.data import ConversationConfig, DataConfig, RetrievalConfig, TaskConfig
from bem.config.experiment import ExperimentConfig, GatesConfig, load, load_gates
from bem.config.learning import LearningConfig
from bem.config.online import OnlineConfig
from bem.config.routing import (
    CloningConfig,
    PolicyGradientConfig,
    ReadingConfig,
    RewardConfig,
    RouterConfig,
    RoutingConfig,
)
from bem.config.section import Section, parse
from bem.config.serving import ServingConfig
from bem.config.tuning import TuningConfig
from bem.config.vision import CONCEPTS, VISION_FEATURES

__all__ = [
    "CONCEPTS",
    "EVIDENCE_FEATURES",
    "KINDS",
    "VARIANTS",
    "VISION_FEATURES",
    "AdapterConfig",
    "ArmConfig",
    "CloningConfig",
    "ConversationConfig",
    "DataConfig",
    "ExperimentConfig",
    "GatesConfig",
    "LearningConfig",
    "OnlineConfig",
    "PolicyGradientConfig",
    "ReadingConfig",
    "RetrievalConfig",
    "RewardConfig",
    "RouterConfig",
    "RoutingConfig",
    "Section",
    "ServingConfig",
    "TaskConfig",
    "TrainingConfig",
    "TuningConfig",
    "load",
    "load_gates",
    "parse",
    "parse_adapter",
]
