"""What ships with the package can be opened by name, is small, and says what it is."""

import pytest

import bem
from bem.errors import BaseError, MissingExtra
from bem.files import check_listed, read_json
from bem.releases.named import RELEASES

MOST_MB = 16


@pytest.fixture(params=RELEASES.values(), ids=lambda release: release.name)
def release(request):
    if not request.param.is_there:
        pytest.skip(f"{request.param.name} was not made yet: {request.param.folder} is not there")
    return request.param


def test_it_fits_the_package(release):
    files = [path for path in release.folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= MOST_MB * 1e6


def test_every_file_is_what_its_manifest_lists(release):
    for part in (release.static, release.router):
        manifest = read_json(part / "manifest.json", ValueError)
        check_listed(part, manifest["files"], ValueError)


def test_the_card_holds_verdict_training_and_licences(release):
    card = release.card.read_text(encoding="utf-8")
    for part in ("## Verdict", "## Training", "## Data", "licence", f'"{release.name}"'):
        assert part in card
    assert "was judged" in release.verdict


def test_every_task_has_held_out_rows(release):
    for task in release.config.data.tasks:
        assert release.held_out(task if isinstance(task, str) else task.name).is_file()


@pytest.mark.slow
def test_it_is_opened_by_its_name(release):
    config = release.config
    try:
        model, tokenizer = bem.load_base(config.base, dtype=config.dtype)
    except (BaseError, MissingExtra) as error:
        pytest.skip(f"its base is not here: {error}")
    attached = bem.load(model, release.name)
    attached.detach()
    mounted = bem.load_router(model, release.name)
    ids = tokenizer("Write a query: which table holds the orders?", return_tensors="pt")
    assert mounted.model.generate(**ids, max_new_tokens=4).shape[0] == 1
