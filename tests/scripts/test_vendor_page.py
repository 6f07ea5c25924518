"""The page's libraries from npm, in whose place a script of the test stands."""

import io
import json
import os
import tarfile

import pytest

import vendor_page


def package(version):
    """A package of npm's with one file of interest."""
    packed, content = io.BytesIO(), f"export const version = '{version}';\n".encode()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        member = tarfile.TarInfo("package/dist/some.js")
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    return packed.getvalue()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder that lists version 1.0.0 of a package; npm has 2.0.0 too."""
    for version in ("1.0.0", "2.0.0"):
        (tmp_path / f"some@{version}").write_bytes(package(version))
    npm, folder = tmp_path / "bin" / "npm", tmp_path / "vendor"
    npm.parent.mkdir()
    npm.write_text(f'#!/bin/sh\ncp "{tmp_path}/$3" "$5/some.tgz"\n')
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", f"{npm.parent}:{os.environ['PATH']}")
    monkeypatch.setattr(vendor_page, "FOLDER", folder)
    integrity = vendor_page.checksum((tmp_path / "some@1.0.0").read_bytes())
    files = {"lib/some.js": {"from": "dist/some.js"}}
    folder.mkdir()
    listed = {"some": {"version": "1.0.0", "integrity": integrity, "files": files}}
    (folder / "vendored.json").write_text(json.dumps(listed))
    return folder


def test_listed_versions_and_another(folder):
    file = folder / "some" / "lib" / "some.js"
    for arguments, version in (([], "1.0.0"), (["some@2.0.0"], "2.0.0")):
        vendor_page.main(arguments)
        assert file.read_text() == f"export const version = '{version}';\n"
        listed = json.loads((folder / "vendored.json").read_text())["some"]
        integrity = vendor_page.checksum(file.read_bytes())
        assert listed["files"] == {"lib/some.js": {"from": "dist/some.js", "integrity": integrity}}
        archive = (folder.parent / f"some@{version}").read_bytes()
        assert (listed["version"], listed["integrity"]) == (version, vendor_page.checksum(archive))


def test_another_package_than_the_listed_one(folder):
    (folder.parent / "some@1.0.0").write_bytes(package("1.0.1"))
    with pytest.raises(SystemExit, match=r"some@1\.0\.0 is sha512-.*, not sha512-"):
        vendor_page.main([])
    assert not (folder / "some").exists()
