"""Judge two systems that were scored elsewhere: no model, no training, only the statistics.

python examples/judge_scores.py
"""

import numpy as np

from bem import bca_bootstrap, benjamini_hochberg_correction

rng = np.random.default_rng(0)
baseline = (rng.random(400) < 0.62).astype(float)  # exact match of 400 questions
better = np.where(rng.random(400) < 0.10, 1.0, baseline)  # repairs a tenth of its errors
other = np.where(rng.random(400) < 0.04, 1.0 - baseline, baseline)  # changes answers at random

p_values = []
for name, scores in {"better": better, "other": other}.items():
    interval = bca_bootstrap(scores - baseline, n_bootstrap=10_000, alpha=0.05, seed=0)
    print(
        f"{name}: {interval.observed:+.3f} [{interval.lower:+.3f}, {interval.upper:+.3f}] "
        f"p = {interval.p_value:.4f}"
    )
    p_values.append(interval.p_value)

corrected = benjamini_hochberg_correction(p_values, alpha=0.05)
print("kept after the false discovery rate:", corrected.rejected.tolist())
