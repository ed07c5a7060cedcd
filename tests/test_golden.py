"""The golden numbers: computed again, and changed only beside a raised version."""

import json
import shutil

import pytest

import golden
from expvae_book import protocols
from golden import FOLDER, GOLDEN


@pytest.fixture
def folder(tmp_path):
    """A copy of the files."""
    return shutil.copytree(FOLDER, tmp_path / "golden")


def read(name, folder=FOLDER):
    return json.loads((folder / name).read_text(encoding="utf-8"))


def assert_stands(name, folder):
    entries = golden.manifest(folder).get(name, {})
    assert entries.get(GOLDEN[name].versions()) == golden.digest(folder / name), (
        f"{name} is not the file that the manifest has for {GOLDEN[name].versions()}: {GOLDEN[name].remedy()}"
    )


@pytest.mark.parametrize("name", GOLDEN)
def test_numbers_are_those_of_the_file(name):
    lines = golden.moved(name, read(name), golden.computed(name))
    assert not lines, "\n".join([f"{len(lines)} golden numbers of {name} moved: {GOLDEN[name].remedy()}", *lines])


@pytest.mark.parametrize("name", GOLDEN)
def test_a_file_is_that_of_the_present_versions(name):
    assert_stands(name, FOLDER)


def test_there_are_no_other_files():
    assert {path.name for path in FOLDER.iterdir()} == {"manifest.json", *GOLDEN}
    assert golden.manifest().keys() == GOLDEN.keys()


def test_a_changed_file_stands_only_beside_a_raised_version(folder, monkeypatch):
    numbers = read("pixel.json", folder)
    changed = numbers | {"AUROC": numbers["AUROC"] + 0.1}
    with pytest.raises(ValueError, match=r"^pixel.json stands for PIXEL \d+: raise the version of PIXEL in lib/exp"):
        golden.write("pixel.json", changed, folder)
    assert_stands("pixel.json", folder)

    (folder / "pixel.json").write_text(json.dumps(changed), encoding="utf-8")
    with pytest.raises(AssertionError, match=r"mend it, or raise the version of PIXEL in lib/expvae_book/proto"):
        assert_stands("pixel.json", folder)

    raised = protocols.VERSIONS["PIXEL"] + 1
    monkeypatch.setitem(protocols.VERSIONS, "PIXEL", raised)
    with pytest.raises(AssertionError, match=f"not the file that the manifest has for PIXEL {raised}"):
        assert_stands("pixel.json", folder)
    golden.write("pixel.json", changed, folder)
    assert_stands("pixel.json", folder)
    assert read("pixel.json", folder)["AUROC"] == pytest.approx(changed["AUROC"])
    assert len(golden.manifest(folder)["pixel.json"]) == len(golden.manifest()["pixel.json"]) + 1
    with pytest.raises(ValueError, match=f"stands for PIXEL {raised}"):
        golden.write("pixel.json", numbers, folder)
    assert not list(folder.glob("*.tmp"))


def test_the_command_writes_only_what_is_new(folder, monkeypatch, capsys):
    monkeypatch.setattr(golden, "manifest", lambda at=folder, read=golden.manifest: read(at))
    written = []
    monkeypatch.setattr(golden, "write", lambda name, numbers: written.append(name))
    monkeypatch.setattr(golden, "computed", lambda name: {})
    with pytest.raises(SystemExit, match="raise that of the protocol whose numbers are to change"):
        golden.main([])
    with pytest.raises(SystemExit, match=r"There is no golden file ink\.json; there are training\.json, "):
        golden.main(["ink.json"])
    raised = protocols.VERSIONS["rbm"] + 1
    monkeypatch.setitem(protocols.VERSIONS, "rbm", raised)
    golden.main([])
    assert written == ["chapter-rbm.json"]
    assert f", rbm {raised}\n" in capsys.readouterr().out


def test_a_number_outside_its_tolerance_has_moved():
    numbers = read("pixel.json")
    assert golden.moved("pixel.json", numbers, dict(numbers)) == []
    beyond = numbers | {"AUROC": numbers["AUROC"] * (1 + 1e-5)}
    assert [line.partition(":")[0] for line in golden.moved("pixel.json", numbers, beyond)] == ["AUROC"]
    low, high = numbers["image AUROC: ends"]
    for share, count in ((0.1, 0), (0.15, 1)):
        shifted = numbers | {"image AUROC: ends": [low + share * (high - low), high]}
        assert len(golden.moved("pixel.json", numbers, shifted)) == count
    del beyond["AUROC"]
    assert golden.moved("pixel.json", numbers, beyond) == ["AUROC is only in one of both"]
