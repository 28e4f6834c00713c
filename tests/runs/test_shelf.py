"""What is kept is read only as it was written; what is damaged is replaced by keeping it again."""

import pytest

from bem.errors import CheckpointError
from bem.runs.release import Release
from tests.runs.contents import WEIGHTS, everything, make_content, make_store, sha256


@pytest.fixture
def shelf(tmp_path):
    with (store := make_store(tmp_path)).journal.locked():
        return store.shelf


def test_a_file_is_kept_once_under_its_digest_and_replaced_only_if_damaged(shelf, tmp_path):
    (tmp_path / "file").write_text("text")
    kept = shelf.objects / sha256("text")
    shelf.keep(tmp_path / "file", sha256("text"))
    first = kept.stat()
    shelf.keep(tmp_path / "file", sha256("text"))
    assert kept.read_text() == "text" and kept.stat().st_ino == first.st_ino
    kept.write_text("tex")
    shelf.keep(tmp_path / "file", sha256("text"))
    assert kept.read_text() == "text"
    with pytest.raises(CheckpointError, match="was changed while it was read"):
        shelf.keep(tmp_path / "file", sha256("other"))


def test_an_unpacked_release_is_a_copy_that_cannot_harm_what_is_kept(shelf, tmp_path):
    content = make_content(tmp_path / "c", {f"experts/sql/{WEIGHTS}": "w", "router": "r"}, "router")
    for name, digest in content.files.items():
        shelf.keep(content.folder / name, digest)
    release = Release.of(content, None, None, "c")
    shelf.put(release)
    with shelf.folder(release) as folder:
        assert everything(folder) == everything(content.folder)
        (folder / "router").write_text("spoilt")
    assert not folder.exists() and shelf.whole(release.id) == release
    (shelf.objects / sha256("w")).unlink()
    for read in (lambda: shelf.whole(release.id), lambda: shelf.folder(release).__enter__()):
        with pytest.raises(CheckpointError, match=f"{sha256('w')} cannot be read .No such file"):
            read()
