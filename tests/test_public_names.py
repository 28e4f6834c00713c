"""`import bem` is light, and its public names are exactly the promised ones."""

import importlib
import subprocess
import sys

import pytest

import bem

PROMISED = {
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
}
HEAVY = ("torch", "transformers", "peft", "scipy", "matplotlib", "sacrebleu", "jinja2")


def test_the_public_names_are_the_promised_ones():
    assert set(bem.__all__) == PROMISED


@pytest.mark.parametrize("name", sorted(PROMISED))
def test_every_public_name_can_be_imported(name):
    assert getattr(bem, name) is getattr(importlib.import_module(bem._WHERE[name]), name)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'atach'"):
        bem.atach  # noqa: B018


@pytest.mark.parametrize(
    "code", ["import bem", "import bem.cli", "import bem.config", "import bem.errors"]
)
def test_importing_loads_no_heavy_library(code):
    loaded = _modules_after(code)
    assert not loaded & set(HEAVY)


def test_watching_a_stream_needs_no_torch():
    assert "torch" not in _modules_after("import bem.online")


def test_help_loads_no_heavy_library():
    code = "import bem.cli\ntry: bem.cli.main(['--help'])\nexcept SystemExit: pass"
    assert not _modules_after(code) & set(HEAVY)


def _modules_after(code: str) -> set[str]:
    script = f"{code}\nimport sys\nprint('MODULES', *sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120
    )
    return set(done.stdout.split("MODULES", 1)[1].split())
