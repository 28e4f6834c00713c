"""`deploy_production(serve=...)`: what was promoted answers."""

import bem
from bem.config.serving import serving_config
from tests.experiments.finished_run import make_run
from tests.serving.running import client
from tests.serving.test_api import complete


def test_what_is_deployed_is_served(tmp_path, micro_base):
    run = make_run(tmp_path / "runs", base=str(micro_base))
    system = bem.BEMv13System(run.config)
    system.validate_statistical_significance(run.path)
    (release,) = system.deploy_production(["v1"], serve=serving_config({"port": 0}))
    assert system.server is not None
    try:
        assert complete(client(system.server)).bem["version"] == release.version
    finally:
        system.server.stop()
