"""The system under the names of its source document: run, judge, deploy.

    system = BEMv13System("configs/quickstart.yaml")
    results = system.run_experiments(["v1", "v4"])
    verdicts = system.validate_statistical_significance(results)
    system.deploy_production([arm for arm, verdict in verdicts.items() if verdict.accepted])

A thin face: each method is one call of what the command line calls too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from numpy.typing import ArrayLike

from bem.config import ExperimentConfig, GatesConfig, ServingConfig, load
from bem.config.serving import serving_config
from bem.errors import ConfigError, MeasurementError
from bem.experiments import run as experiments
from bem.experiments.events import Show
from bem.experiments.run import RunResult
from bem.runs.folder import RunFolder
from bem.runs.promotion import promote, store_of
from bem.runs.release import Release
from bem.runs.store import Store
from bem.runs.verdicts import judge_arms, measurements, read_verdicts
from bem.serving.server import Server, check_installed
from bem.stats.bootstrap import Bca, bca_bootstrap
from bem.stats.fdr import Discoveries, benjamini_hochberg_correction
from bem.stats.gates import judge
from bem.stats.measurement import Measurement
from bem.stats.verdict import Verdict


class BEMv13System:
    """One experiment, from training to promotion."""

    def __init__(self, config: ExperimentConfig | str | Path, overrides: Sequence[str] = ()):
        """
        Args:
            config: an experiment, or the path of its YAML.
            overrides: of a path alone, such as `training.steps=50`.
        Raises:
            ConfigError: no such file, or a setting that cannot be right.
        """
        if isinstance(config, ExperimentConfig):
            if overrides:
                raise ConfigError("overrides change a config file, not a finished config.")
            self.config = config
        else:
            self.config = load(config, list(overrides))
        self._validated: Path | None = None
        self.server: Server | None = None
        """What `deploy_production(serve=True)` started."""

    def run_experiments(
        self, variants: Sequence[str] | None = None, on_event: Show | None = None
    ) -> RunResult:
        """Train, measure, judge and report; stopped, the same call goes on.

        Args:
            variants: names of arms to run beside the baseline, in a folder of their own; None: all.
        Raises:
            ConfigError: no such arm.
            BemError: a problem with data, base or training; what is finished is kept.
        """
        return experiments.run(self._of(variants), on_event)

    def _of(self, variants: Sequence[str] | None) -> ExperimentConfig:
        if variants is None:
            return self.config
        names = [arm.name for arm in self.config.arms]
        if unknown := sorted(set(variants) - set(names)):
            raise ConfigError(f"No arm {unknown[0]!r}. Arms: {', '.join(names)}.")
        kept = {self.config.baseline.name, *variants}
        kept |= {a.compare_to for a in self.config.arms if a.name in kept and a.compare_to}
        arms = [arm for arm in self.config.arms if arm.name in kept]
        name = "-".join([self.config.name, *(a.name for a in arms if a.role != "baseline")])
        return self.config.model_copy(update={"arms": arms, "name": name})

    def validate_statistical_significance(self, results: RunResult | Path) -> dict[str, Verdict]:
        """Judge a run's measurements again, by its own gates and the family it declared.

        Returns:
            Candidate -> verdict: PROMOTE, REJECT or INCONCLUSIVE, with every interval behind it.
        Raises:
            CheckpointError: the run is not finished.
        """
        folder = RunFolder(results.folder if isinstance(results, RunResult) else Path(results))
        family = read_verdicts(folder.verdicts).judgement.family
        self._validated = folder.path
        return judge_arms(folder.config, measurements(folder, folder.config), family).candidates

    def deploy_production(
        self,
        variants: Sequence[str],
        results: RunResult | Path | None = None,
        store: str | Path | None = None,
        serve: ServingConfig | bool = False,
    ) -> list[Release]:
        """Put arms into use, one after the other: the last one is in use then; and serve them.

        Args:
            results: of which run; None: the one that was validated last.
            store: folder of the version store; None: `store` beside the run.
            serve: True: start a server of the run's base and that store, which answers in the background until
                `system.server.stop()`; its address is `system.server.url`. Or how it is to be served; then base
                and store are filled in. A server that runs already follows the store by itself.
        Raises:
            NotAccepted: a verdict is not PROMOTE, or what it rests on was changed.
            MeasurementError: nothing was validated.
            MissingExtra: what serving needs is not installed.
        """
        folder = results.folder if isinstance(results, RunResult) else results
        folder = folder or self._validated
        if folder is None:
            raise MeasurementError(
                "nothing was validated yet: call validate_statistical_significance(results) first, or name the run."
            )
        if serve:
            check_installed()
        target = store_of(folder) if store is None else Store(store)
        released = [promote(folder, variant, store=target) for variant in variants]
        if serve and self.server is None:
            settings = serving_config({}) if serve is True else serve
            run = RunFolder(Path(folder)).config
            given = {"base": run.base, "dtype": run.dtype, "store": str(target.path)}
            self.server = Server(settings.model_copy(update=given)).start()
        return released


class PerformanceTracker:
    """Measures variants on the same held-out rows and compares them, example by example."""

    def __init__(self, variants: Mapping[str, str | Path], config: ExperimentConfig | str | Path):
        """
        Args:
            variants: name -> folder of a checkpoint or a router.
            config: whose base and held-out tasks they are measured on.
        """
        self.variants = {name: Path(folder) for name, folder in variants.items()}
        self.config = config if isinstance(config, ExperimentConfig) else load(config)
        self.measured: dict[str, Measurement] = {}

    def run_variant(self, name: str, on_event: Show | None = None) -> Measurement:
        """Measure one variant; once measured it is not measured again.

        Raises:
            ConfigError: no such variant.
        """
        if name not in self.variants:
            raise ConfigError(f"No variant {name!r}. Variants: {', '.join(self.variants)}.")
        if name not in self.measured:
            self.measured[name] = experiments.evaluate(self.config, self.variants[name], on_event)
        return self.measured[name]

    def compare_with_baseline(
        self, baseline: str, gates: GatesConfig | None = None
    ) -> dict[str, Verdict]:
        """Judge every other variant against one of them; what is not measured yet is measured now.

        Costs are in no measurement of one checkpoint: waive those gates, or they stay open.
        """
        measured = {name: self.run_variant(name) for name in self.variants}
        opponent = self.run_variant(baseline)
        others = {name: m for name, m in measured.items() if name != baseline}
        return judge(opponent, others, gates or self.config.gates)


class StatisticalValidator:
    """Intervals and corrections of one setting."""

    def __init__(self, bootstrap_samples: int = 10_000, alpha: float = 0.05, seed: int = 0):
        self.bootstrap_samples, self.alpha, self.seed = bootstrap_samples, alpha, seed

    def bca_bootstrap(self, paired_scores: ArrayLike, **options: Any) -> Bca:
        """Interval of a paired difference; see `bem.bca_bootstrap`."""
        return bca_bootstrap(
            paired_scores, self.bootstrap_samples, self.alpha, self.seed, **options
        )

    def fdr_correction(self, p_values: ArrayLike) -> Discoveries:
        """Benjamini and Hochberg's correction; see `bem.benjamini_hochberg_correction`."""
        return benjamini_hochberg_correction(p_values, self.alpha)
