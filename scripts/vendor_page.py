#!/usr/bin/env python3
"""Fetches the libraries of the chat page from npm into ``mlx_flashhead/serving/page/vendor``.

``vendored.json`` in that folder lists them: version, npm's checksum of the package, and a checksum
of each file that is taken from it. A library whose package has another name says so in "package".
Needs ``npm``.

    python scripts/vendor_page.py                 # the listed versions, checked against the list
    python scripts/vendor_page.py katex@0.19.1    # this version of one of them, and lists it
"""

import argparse
import base64
import hashlib
import io
import json
import subprocess
import tarfile
import tempfile
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent.parent / "mlx_flashhead" / "serving" / "page" / "vendor"
LIST = "vendored.json"


def checksum(content: bytes) -> str:
    """SHA-512 in the form of npm and of subresource integrity."""
    return f"sha512-{base64.b64encode(hashlib.sha512(content).digest()).decode()}"


def fetch(name: str, version: str) -> bytes:
    """The package of a version, as npm has it."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["npm", "pack", "--silent", f"{name}@{version}", "--pack-destination", folder]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        (path,) = Path(folder).glob("*.tgz")
        return path.read_bytes()


def take_files(package: bytes, wanted: dict[str, Any], folder: Path) -> None:
    """Writes the wanted files of a package, and their checksums into ``wanted``.

    Args:
        package: A tar archive.
        wanted: {path in ``folder``: {"from": path in the package, "integrity": …}}.
        folder: The folder of the package's files.

    Raises:
        ValueError: If the package lacks a file.
    """
    with tarfile.open(fileobj=io.BytesIO(package)) as archive:
        for place, file in wanted.items():
            member = archive.extractfile(f"package/{file['from']}")
            if member is None:
                raise ValueError(f"{file['from']} is not a file of the package.")
            content = member.read()
            file["integrity"] = checksum(content)
            (folder / place).parent.mkdir(parents=True, exist_ok=True)
            (folder / place).write_bytes(content)


def _package_and_version(text: str) -> tuple[str, str]:
    """A type: a package and its version, such as ``katex@0.19.1``."""
    name, _, version = text.rpartition("@")
    if not name or not version:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME@VERSION, such as katex@0.19.1")
    return name, version


def main() -> None:
    """Fetches every listed package."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    what = "the version that a package is to have, such as katex@0.19.1"
    parser.add_argument(
        "updates", nargs="*", metavar="NAME@VERSION", type=_package_and_version, help=what
    )
    updates = dict(parser.parse_args().updates)
    packages = json.loads((FOLDER / LIST).read_text())
    unknown = updates.keys() - packages.keys()
    if unknown:
        parser.error(f"{min(unknown)} is not in {LIST}: choose among {', '.join(packages)}")
    for name, entry in packages.items():
        version = updates.get(name, entry["version"])
        package = fetch(entry.get("package", name), version)
        integrity = checksum(package)
        if version == entry["version"] and entry["integrity"] not in ("", integrity):
            raise SystemExit(f"{name}@{version} is {integrity}, not {entry['integrity']}.")
        entry |= {"version": version, "integrity": integrity}
        take_files(package, entry["files"], FOLDER / name)
        print(f"{name} {version}: {len(entry['files'])} files")
    (FOLDER / LIST).write_text(json.dumps(packages, indent=2) + "\n")


if __name__ == "__main__":
    main()
