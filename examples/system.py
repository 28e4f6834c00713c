"""The three calls of the whole system: run experiments, validate, deploy.

python examples/system.py [CONFIG]      # default: configs/quickstart.yaml, minutes on a CPU
"""

import sys
from pathlib import Path

import bem

QUICKSTART = Path(__file__).parent.parent / "configs" / "quickstart.yaml"
system = bem.BEMv13System(sys.argv[1] if len(sys.argv) > 1 else QUICKSTART)
results = system.run_experiments()
verdicts = system.validate_statistical_significance(results)
for name, verdict in verdicts.items():
    print(f"{name}: {verdict.decision}")
accepted = [name for name, verdict in verdicts.items() if verdict.accepted]
for release in system.deploy_production(accepted):
    print(f"in use: version {release.short}, {release.source}")
print(f"report: {results.report}")
