"""Taking the page's libraries from npm, whose place a script of the test takes."""

import io
import json
import os
import tarfile

import pytest

import vendor_page


def package(version):
    """A package of npm's with one file of interest."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        content = f"export const version = '{version}';\n".encode()
        member = tarfile.TarInfo("package/dist/some.js")
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    return packed.getvalue()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder that lists version 1.0.0 of a package; npm has 2.0.0 too."""
    npm = tmp_path / "bin" / "npm"
    npm.parent.mkdir()
    packages = {version: package(version) for version in ("1.0.0", "2.0.0")}
    for version, content in packages.items():
        (tmp_path / f"some@{version}").write_bytes(content)
    npm.write_text(f'#!/bin/sh\ncp "{tmp_path}/$3" "$5/some.tgz"\n')
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", f"{npm.parent}:{os.environ['PATH']}")
    monkeypatch.setattr(vendor_page, "FOLDER", tmp_path / "vendor")
    entry = {"version": "1.0.0", "integrity": vendor_page.checksum(packages["1.0.0"])}
    entry["files"] = {"lib/some.js": {"from": "dist/some.js"}}
    (tmp_path / "vendor").mkdir()
    (tmp_path / "vendor" / "vendored.json").write_text(json.dumps({"some": entry}))
    return tmp_path / "vendor"


def listed(folder):
    return json.loads((folder / "vendored.json").read_text())["some"]


def test_listed_versions_and_another(folder):
    vendor_page.main([])
    file = folder / "some" / "lib" / "some.js"
    assert file.read_text() == "export const version = '1.0.0';\n"
    assert listed(folder)["files"]["lib/some.js"] == {
        "from": "dist/some.js",
        "integrity": vendor_page.checksum(file.read_bytes()),
    }
    before = listed(folder)["integrity"]
    vendor_page.main(["some@2.0.0"])
    assert "2.0.0" in (folder / "some" / "lib" / "some.js").read_text()
    assert listed(folder)["version"] == "2.0.0" and listed(folder)["integrity"] != before


def test_another_package_than_the_listed_one(folder):
    (folder.parent / "some@1.0.0").write_bytes(package("1.0.1"))
    with pytest.raises(SystemExit, match=r"some@1\.0\.0 is sha512-.*, not sha512-"):
        vendor_page.main([])
    assert not (folder / "some").exists()
