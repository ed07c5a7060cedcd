import dataclasses
import gzip
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torchvision
from filelock import FileLock
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier

import expvae_book.data
from expvae_book.data import catalogue, mnist
from expvae_book.data.__main__ import main
from expvae_book.data.card import DataCard, survey
from expvae_book.data.generated import digits as digits_of_sklearn
from expvae_book.places import SettingError

NAMES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append(self.path)
        body = self.server.files.get(self.path)
        if body is None:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(body) + self.server.cut))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        """Keep the test output free of requests."""


@pytest.fixture
def server(monkeypatch):
    """A server on localhost: `files` maps paths to bodies, `cut` is how many bytes too many it promises."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.files, server.asked, server.cut = {}, [], 0
        server.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def digest(content):
    return hashlib.sha256(content).hexdigest()


def idx(array):
    header = bytes([0, 0, 8, array.ndim]) + b"".join(int(n).to_bytes(4, "big") for n in array.shape)
    return header + array.astype(np.uint8).tobytes()


def digits(train=12, test=6):
    rng = np.random.default_rng(0)
    return {
        NAMES[0]: rng.integers(0, 256, (train, 28, 28)),
        NAMES[1]: rng.integers(0, 10, train),
        NAMES[2]: rng.integers(0, 256, (test, 28, 28)),
        NAMES[3]: rng.integers(0, 10, test),
    }


@pytest.fixture
def files():
    return {name: idx(array) for name, array in digits().items()}


@pytest.fixture
def release(monkeypatch, server, files):
    """A small release of MNIST, served from localhost and known to the catalogue."""
    packed = {name: gzip.compress(content) for name, content in files.items()}
    server.files = {f"/{name}.gz": content for name, content in packed.items()}
    source = dataclasses.replace(
        catalogue.MNIST,
        official={"train": 12, "test": 6},
        checksums={f"raw/{name}": digest(content) for name, content in files.items()},
        downloads=tuple(
            catalogue.Download((f"{server.url}/{name}.gz",), digest(content), f"raw/{name}")
            for name, content in packed.items()
        ),
    )
    monkeypatch.setitem(catalogue.SOURCES, "mnist", source)
    monkeypatch.setattr(catalogue, "MNIST", source)
    return source


def write(root, files, note=None):
    raw = root / "MNIST/raw"
    raw.mkdir(parents=True)
    for name, content in files.items():
        (raw / name).write_bytes(content)
    if note is not None:
        (root / "MNIST/NOTE.txt").write_text(note)
    return raw


def everything(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())


def fetch(name, root):
    return main(["fetch", name, "--root", str(root)])


def sentence(capsys):
    """What a failed command said, without the progress bars."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip() and "B/s" not in line]
    lines = [line for line in lines if " files" not in line and "Downloading data from" not in line]
    assert len(lines) == 1, lines
    assert "Traceback" not in lines[0]
    assert lines[0].endswith(".")
    return lines[0]


# The data root and the cost of importing


def test_root(monkeypatch, tmp_path):
    repository = Path(__file__).resolve().parents[1]
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("EXPVAE_DATA", raising=False)
    assert expvae_book.data.root() == repository / "data"
    monkeypatch.setenv("EXPVAE_DATA", "")
    assert expvae_book.data.root() == repository / "data"
    monkeypatch.setenv("EXPVAE_DATA", "elsewhere")
    assert expvae_book.data.root() == repository / "elsewhere"
    monkeypatch.setenv("EXPVAE_DATA", str(tmp_path))
    assert expvae_book.data.root() == tmp_path


def test_import_is_light():
    code = "import sys, expvae_book.data; print({'numpy', 'torch', 'pooch', 'sklearn'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"


# The card


CARD = DataCard("mnist", "partial", {"train": 1}, {"train": 2}, "0" * 64, "CC0", "By us", "A note")


def test_card_survives_json():
    assert DataCard(**json.loads(json.dumps(dataclasses.asdict(CARD)))) == CARD


@pytest.mark.parametrize(
    ("kind", "mark"), [("complete", ""), ("re-encoded", "re-encoded"), ("partial", "partial"), ("sample", "sample")]
)
def test_mark(kind, mark):
    assert dataclasses.replace(CARD, kind=kind).mark == mark


def test_mark_of_data_that_were_encoded_again():
    note = "UCSD Ped1, partial and re-encoded; not the official protocol."
    marks = {kind: dataclasses.replace(CARD, kind=kind, note=note).mark for kind in ("complete", "partial", "sample")}
    assert marks == {"complete": "", "partial": "partial, re-encoded", "sample": "sample"}


def test_survey_of_images_counts_images_only(tmp_path):
    folder = tmp_path / "mvtec"
    contents = {
        "bottle/train/good/000.png": b"a",
        "bottle/test/glue/000.JPG": b"b",
        "bottle/ground_truth/glue/0.bmp": b"c",
    }
    for name, content in contents.items() | {("bottle/test/glue/._000.JPG", b""), ("bottle/test/glue/Thumbs.db", b"")}:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    card = survey(catalogue.MVTEC, tmp_path)
    assert card.counts == {"train": 1, "test": 1, "masks": 1}
    assert card.kind == "partial"
    # What `sha256sum FILES | sha256sum` prints.
    lines = subprocess.check_output(["sha256sum", *sorted(contents)], cwd=folder)
    assert card.digest == digest(lines)
    assert survey(catalogue.UCSD, tmp_path) is None


def test_survey_of_dsprites_reads_the_header_only(tmp_path):
    file = tmp_path / next(iter(catalogue.DSPRITES.checksums))
    np.savez_compressed(file, imgs=np.zeros((7, 4, 4), np.uint8))
    card = survey(catalogue.DSPRITES, tmp_path)
    assert (card.counts, card.kind) == ({"all": 7}, "partial")
    file.write_bytes(file.read_bytes()[:-30])
    with pytest.raises(ValueError, match=file.name):
        survey(catalogue.DSPRITES, tmp_path)


# The catalogue


def test_mnist_is_torchvisions():
    published = [name for name, _ in torchvision.datasets.MNIST.resources]
    assert [download.urls[0].rsplit("/", 1)[1] for download in catalogue.MNIST.downloads] == published
    urls = {url for download in catalogue.MNIST.downloads for url in download.urls}
    assert {mirror + name for mirror in torchvision.datasets.MNIST.mirrors for name in published} <= urls


@pytest.mark.parametrize("source", catalogue.SOURCES.values(), ids=catalogue.SOURCES)
def test_catalogue_is_consistent(source):
    assert source.patterns.keys() == source.official.keys()
    for download in source.downloads:
        assert len({url.rsplit("/", 1)[1] for url in download.urls}) == 1
        assert bool(download.target) == (download.target in source.checksums)
    for checksum in [*source.checksums.values(), *(download.sha256 for download in source.downloads)]:
        assert re.fullmatch("[0-9a-f]{64}", checksum)


def test_categories_add_up_to_mvtec():
    official = catalogue.MVTEC_OFFICIAL.values()
    assert {split: sum(counts[split] for counts in official) for split in catalogue.MVTEC.official} == (
        catalogue.MVTEC.official
    )
    assert all(counts["test"] == counts["test good"] + counts["test defective"] for counts in official)


def test_source_by_name():
    assert all(catalogue.source(name) is source for name, source in catalogue.SOURCES.items())
    pill = catalogue.source("mvtec/pill")
    assert (pill.name, pill.folder, pill.title) == ("mvtec/pill", "mvtec/pill", "MVTec AD pill")
    assert pill.official == {"train": 267, "test": 167, "masks": 141, "test good": 26}
    assert pill.patterns.keys() == pill.official.keys()
    for name in (
        "cifar",
        "mvtec/a cap",
        "mvtec/",
        "mvtec/.cap",
        "mvtec/../MNIST",
        "mvtec/a,b",
        "pill",
        "ucsd/pill",
        "",
    ):
        with pytest.raises(ValueError, match=r"mnist, ucsd, .* mvtec/ and one of bottle, .*; got "):
            catalogue.source(name)


# Fetching


def test_fetch(release, server, files, tmp_path, capsys):
    root = tmp_path / "new"
    assert fetch("mnist", root) == 0
    assert {name: (root / "MNIST/raw" / name).read_bytes() for name in NAMES} == files
    assert everything(root) == sorted(f"MNIST/raw/{name}" for name in NAMES)
    out, err = capsys.readouterr()
    assert "MNIST (complete: 12 train, 6 test)" in out
    assert err.count("100%") == len(NAMES)


def test_fetch_of_what_is_there_does_nothing(release, server, files, tmp_path, capsys):
    write(tmp_path, files)
    assert fetch("mnist", tmp_path) == 0
    assert server.asked == []
    assert "nothing to do" in capsys.readouterr().out


def test_fetch_replaces_only_what_is_wrong(release, server, files, tmp_path, capsys):
    raw = write(tmp_path, files | {NAMES[2]: files[NAMES[2]][:-1]})
    assert fetch("mnist", tmp_path) == 0
    assert server.asked == [f"/{NAMES[2]}.gz"]
    assert (raw / NAMES[2]).read_bytes() == files[NAMES[2]]
    assert f"{raw / NAMES[2]} is not the file of the release" in capsys.readouterr().out


def test_a_full_disk_leaves_the_data_that_were_there(release, files, tmp_path, capsys, full_disk):
    raw = write(tmp_path, files | {NAMES[2]: b"another"})
    with full_disk():
        assert fetch("mnist", tmp_path) == 1
    assert sentence(capsys).startswith(f"The data root {tmp_path} cannot be used: ")
    assert everything(raw) == sorted(NAMES)
    assert (raw / NAMES[2]).read_bytes() == b"another"
    assert not list((tmp_path / "MNIST").rglob(".fetch*"))


def not_found(server):
    server.files.popitem()
    return "404 Client Error: Not Found"


def damaged(server):
    name, content = server.files.popitem()
    server.files[name] = content[:-1] + bytes([content[-1] ^ 1])
    return "does not match the known hash"


def cut(server):
    server.cut = 1000
    return "the connection was cut"


@pytest.mark.parametrize("failure", [not_found, damaged, cut])
def test_failed_fetch_leaves_nothing_behind(failure, release, server, tmp_path, capsys):
    reason = failure(server)
    assert fetch("mnist", tmp_path) == 1
    assert everything(tmp_path) == []
    said = sentence(capsys)
    assert reason in said
    assert f"{server.url}{server.asked[-1]}" in said


def test_failed_fetch_keeps_what_was_there(release, server, files, tmp_path, capsys):
    raw = write(tmp_path, files | {NAMES[3]: b"broken"})
    not_found(server)
    assert fetch("mnist", tmp_path) == 1
    assert (raw / NAMES[3]).read_bytes() == b"broken"
    assert everything(tmp_path) == sorted(f"MNIST/raw/{name}" for name in NAMES)
    assert "404" in sentence(capsys)


def test_no_server(release, server, tmp_path, capsys):
    server.server_close()
    assert fetch("mnist", tmp_path) == 1
    assert "no connection" in sentence(capsys)


def test_mirrors_are_tried_in_turn(monkeypatch, release, server, files, tmp_path):
    name = NAMES[0]
    server.files[f"/wrong/{name}.gz"] = b"not the file"
    mirrors = tuple(f"{server.url}/{mirror}{name}.gz" for mirror in ("gone/", "wrong/", "", "unused/"))
    first = dataclasses.replace(release.downloads[0], urls=mirrors)
    source = dataclasses.replace(release, downloads=(first, *release.downloads[1:]))
    monkeypatch.setitem(catalogue.SOURCES, "mnist", source)
    assert fetch("mnist", tmp_path) == 0
    assert server.asked[:3] == [f"/gone/{name}.gz", f"/wrong/{name}.gz", f"/{name}.gz"]
    assert not any("unused" in path for path in server.asked)
    assert (tmp_path / "MNIST/raw" / name).read_bytes() == files[name]


def test_leavings_of_a_killed_fetch_are_removed(release, tmp_path):
    (tmp_path / ".fetch-mnist/work").mkdir(parents=True)
    (tmp_path / ".fetch-mnist/work/half").write_bytes(b"half")
    assert fetch("mnist", tmp_path) == 0
    assert everything(tmp_path) == sorted(f"MNIST/raw/{name}" for name in NAMES)


def test_one_fetch_at_a_time(release, server, tmp_path, capsys):
    (tmp_path / ".fetch-mnist").mkdir()
    with FileLock(tmp_path / ".fetch-mnist/lock"):
        assert fetch("mnist", tmp_path) == 1
    assert "another fetch of MNIST" in sentence(capsys)
    assert server.asked == []


def test_root_that_is_a_file(release, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert fetch("mnist", tmp_path / "file") == 1
    assert str(tmp_path / "file") in sentence(capsys)


@pytest.mark.parametrize("arguments", [["status"], ["fetch", "mnist"], ["fetch", "mvtec", "--categories", "bottle"]])
@pytest.mark.parametrize("below", ["", "below"])
def test_a_data_root_that_names_a_file_gets_one_sentence(arguments, below, monkeypatch, tmp_path, capsys):
    (tmp_path / "file").touch()
    place = str(tmp_path / "file" / below)
    said = f"must name a folder, and {tmp_path / 'file'} is a file."
    monkeypatch.setenv("EXPVAE_DATA", place)
    assert main(arguments) == 1
    assert sentence(capsys) == f"EXPVAE_DATA {said}"
    with pytest.raises(SettingError, match=f"^EXPVAE_DATA {said[:-1]}$"):
        mnist.load("auto")
    monkeypatch.setenv("EXPVAE_DATA", str(tmp_path))
    assert main([*arguments, "--root", place]) == 1
    assert sentence(capsys) == f"--root {said}"
    assert main([*arguments, "--root", "~no-such-user"]) == 1
    assert sentence(capsys).startswith("--root is '~no-such-user', and the home ~no-such-user is not known here")


def test_unknown_data_set(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["fetch", "cifar"])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert all(name in said for name in catalogue.SOURCES)


def test_command_line_against_the_catalogues_own_address(server, tmp_path):
    # The server stands in as a proxy, so that the address in the catalogue itself is asked for.
    environment = os.environ | {"http_proxy": server.url, "no_proxy": "", "EXPVAE_DATA": str(tmp_path)}
    command = [sys.executable, "-m", "expvae_book.data", "fetch", "ucsd"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert server.asked == list(catalogue.UCSD.downloads[0].urls)
    assert "Traceback" not in done.stderr
    assert f"{catalogue.UCSD.downloads[0].urls[0]}: 404 Client Error: Not Found" in done.stderr
    assert everything(tmp_path) == []


# Archives


def archive_of(*members):
    """A tar.gz; each member is a name with content, or a TarInfo."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                tar.addfile(info, io.BytesIO(member[1]))
    return buffer.getvalue()


INNER = "UCSD_Anomaly_Dataset.v1p2"
GOOD = (
    (f"{INNER}/UCSDped1/Train/Train001/001.tif", b"frame"),
    (f"{INNER}/UCSDped1/Test/Test001/001.tif", b"frame"),
    (f"{INNER}/UCSDped1/Test/Test001_gt/001.bmp", b"mask"),
    (f"{INNER}/README.txt", b"text"),
)


@pytest.fixture
def serve_archive(monkeypatch, server):
    def serve(content, kind="tar.gz"):
        server.files = {f"/ucsd.{kind}": content}
        download = catalogue.Download(
            (f"{server.url}/ucsd.{kind}",), digest(content), inner=catalogue.UCSD.downloads[0].inner
        )
        official = {"train": 1, "test": 1, "masks": 1}
        source = dataclasses.replace(catalogue.UCSD, official=official, downloads=(download,))
        monkeypatch.setitem(catalogue.SOURCES, "ucsd", source)

    return serve


def test_fetch_archive(serve_archive, server, tmp_path, capsys):
    serve_archive(archive_of(*GOOD))
    assert fetch("ucsd", tmp_path) == 0
    assert everything(tmp_path) == sorted(name for name, _ in GOOD)
    assert (tmp_path / GOOD[2][0]).read_bytes() == b"mask"
    assert "complete" in capsys.readouterr().out
    assert fetch("ucsd", tmp_path) == 0
    assert len(server.asked) == 1
    assert "nothing to do" in capsys.readouterr().out


def test_fetch_does_not_overwrite_a_partial_folder(serve_archive, server, tmp_path, capsys):
    serve_archive(archive_of(*GOOD))
    frame = tmp_path / GOOD[0][0]
    frame.parent.mkdir(parents=True)
    frame.write_bytes(b"mine")
    assert fetch("ucsd", tmp_path) == 1
    assert "move it away" in sentence(capsys)
    assert frame.read_bytes() == b"mine"
    assert server.asked == []


def link(name, to, kind=tarfile.SYMTYPE):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, to
    return info


def device(name):
    info = tarfile.TarInfo(name)
    info.type = tarfile.CHRTYPE
    return info


@pytest.mark.parametrize(
    "member",
    [
        ("../evil", b"evil"),
        (f"{INNER}/../../../evil", b"evil"),
        link(f"{INNER}/evil", "/etc"),
        link(f"{INNER}/evil", "../../../evil"),
        link(f"{INNER}/evil", "../../evil", tarfile.LNKTYPE),
        device(f"{INNER}/evil"),
    ],
    ids=["parent", "inner parent", "absolute link", "link", "hard link", "device"],
)
def test_unsafe_member_is_refused(member, serve_archive, tmp_path, capsys):
    serve_archive(archive_of(*GOOD, member))
    root = tmp_path / "root"
    assert fetch("ucsd", root) == 1
    assert "unsafe" in sentence(capsys)
    assert everything(tmp_path) == []


@pytest.mark.parametrize(
    ("content", "kind", "said"),
    [
        (archive_of(*GOOD)[:-200], "tar.gz", "cannot be unpacked"),
        (b"\xfd7zXZ\x00 and no more", "tar.xz", "cannot be unpacked"),
        (archive_of(("other/README.txt", b"")), "tar.gz", f"holds no folder {INNER}"),
    ],
    ids=["cut", "damaged", "other"],
)
def test_useless_archive(content, kind, said, serve_archive, tmp_path, capsys):
    serve_archive(content, kind)
    assert fetch("ucsd", tmp_path) == 1
    assert said in sentence(capsys)
    assert everything(tmp_path) == []


# Categories of MVTec AD

PLACES = ("train/good/000.png", "test/good/000.png", "test/hole/000.png", "ground_truth/hole/000_mask.png")


def workpiece(category):
    return tuple((f"{category}/{place}", f"{category} {place}".encode()) for place in PLACES)


@pytest.fixture
def mvtec(monkeypatch, server):
    """Serve an archive as the release; bottle, pill and grid have four files there."""

    def serve(*members):
        content = archive_of(*members)
        server.files = {"/mvtec.tar.gz": content}
        download = catalogue.Download((f"{server.url}/mvtec.tar.gz",), digest(content))
        monkeypatch.setitem(catalogue.SOURCES, "mvtec", dataclasses.replace(catalogue.MVTEC, downloads=(download,)))
        counts = {"train": 1, "test": 2, "masks": 1, "test good": 1, "test defective": 1}
        for category in ("bottle", "pill", "grid"):
            monkeypatch.setitem(catalogue.MVTEC_OFFICIAL, category, counts)

    serve(("license.txt", b"CC"), *workpiece("bottle"), *workpiece("pill"), *workpiece("grid"))
    return serve


def fetch_categories(root, *words):
    return main(["fetch", "mvtec", "--root", str(root), "--categories", *words])


def placed(*categories):
    return sorted(f"mvtec/{category}/{place}" for category in categories for place in PLACES)


@pytest.mark.parametrize("words", [("bottle,pill",), ("bottle", "pill"), ("bottle,", "pill,bottle"), ("bottle, pill",)])
def test_fetch_chosen_categories(words, mvtec, server, tmp_path, capsys):
    assert fetch_categories(tmp_path, *words) == 0
    assert everything(tmp_path) == placed("bottle", "pill")
    assert (tmp_path / "mvtec/pill" / PLACES[3]).read_bytes() == b"pill ground_truth/hole/000_mask.png"
    said = capsys.readouterr().out
    for category in ("bottle", "pill"):
        assert f"MVTec AD {category} (complete: 1 train, 2 test, 1 masks, 1 test good) is in" in said
    assert fetch_categories(tmp_path, *words) == 0
    assert len(server.asked) == 1
    assert "nothing to do" in capsys.readouterr().out


def test_fetch_adds_categories_to_those_in_place(mvtec, server, tmp_path):
    assert fetch_categories(tmp_path, "bottle") == 0
    (tmp_path / "mvtec/NOTE.txt").write_text("Mine.")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "mvtec/bottle").rglob("*")}
    # An empty folder is not in the way.
    (tmp_path / "mvtec/grid").mkdir()
    assert fetch_categories(tmp_path, "bottle", "grid") == 0
    assert everything(tmp_path) == sorted([*placed("bottle", "grid"), "mvtec/NOTE.txt"])
    assert (tmp_path / "mvtec/NOTE.txt").read_text() == "Mine."
    assert times == {path: path.stat().st_mtime_ns for path in (tmp_path / "mvtec/bottle").rglob("*")}
    assert fetch_categories(tmp_path, "grid", "bottle") == 0
    assert len(server.asked) == 2


def test_fetch_takes_all_categories_by_default(mvtec, tmp_path, capsys):
    for chosen in ((), ("--categories", "cable")):
        assert main(["fetch", "mvtec", "--root", str(tmp_path), *chosen]) == 1
        assert "mvtec.tar.gz holds no folder cable" in sentence(capsys)
    assert everything(tmp_path) == []
    few = {category: catalogue.MVTEC_OFFICIAL[category] for category in ("bottle", "pill", "grid")}
    with mock.patch.dict(catalogue.MVTEC_OFFICIAL, few, clear=True):  # which puts them back in their order
        assert fetch("mvtec", tmp_path) == 0
    assert everything(tmp_path) == placed("bottle", "pill", "grid")


@pytest.mark.parametrize("file", ["train/good/000.png", "train/good/000.jpg", "README.txt", ""])
def test_fetch_does_not_overwrite_a_category(file, mvtec, server, tmp_path, capsys):
    path = tmp_path / "mvtec/pill" / file
    path.parent.mkdir(parents=True)
    path.write_bytes(b"mine")
    assert fetch_categories(tmp_path, "bottle", "pill") == 1
    said = sentence(capsys)
    assert f"{tmp_path / 'mvtec/pill'} already holds something else than the complete MVTec AD pill" in said
    assert everything(tmp_path) == [path.relative_to(tmp_path).as_posix()]
    assert server.asked == []
    assert fetch_categories(tmp_path, "bottle") == 0


def test_encoded_again_is_not_in_place(mvtec, server, tmp_path, capsys):
    for place in PLACES:
        path = tmp_path / "mvtec/pill" / place.replace("000.png", "000.jpg")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"image")
    assert fetch_categories(tmp_path, "pill") == 1
    assert "something else" in sentence(capsys)


@pytest.mark.parametrize("words", [("bottle,pil",), ("pil",), ("Bottle",), (",",), ("",)])
def test_unknown_category(words, mvtec, server, tmp_path, capsys):
    assert fetch_categories(tmp_path, *words) == 1
    said = sentence(capsys)
    assert f"must be some of {', '.join(catalogue.MVTEC_OFFICIAL)}; got" in said
    assert "'bottle'" not in said
    assert server.asked == everything(tmp_path) == []


def test_categories_of_another_data_set(server, tmp_path, capsys):
    assert main(["fetch", "mnist", "--root", str(tmp_path), "--categories", "bottle"]) == 1
    assert sentence(capsys) == "--categories goes with the data set mvtec; mnist has none."


@pytest.mark.parametrize(
    "member",
    [("pill/../../../evil", b"evil"), link("pill/evil", "/etc"), link("pill/evil", "../../evil"), device("pill/evil")],
    ids=["parent", "absolute link", "link", "device"],
)
def test_unsafe_member_of_a_category_is_refused(member, mvtec, tmp_path, capsys):
    mvtec(*workpiece("bottle"), *workpiece("pill"), member)
    root = tmp_path / "root"
    assert fetch_categories(root, "bottle", "pill") == 1
    assert "unsafe" in sentence(capsys)
    assert everything(tmp_path) == []


def test_failed_fetch_keeps_categories(mvtec, server, tmp_path, capsys):
    assert fetch_categories(tmp_path, "bottle") == 0
    server.files["/mvtec.tar.gz"] += b"x"
    assert fetch_categories(tmp_path, "bottle", "pill") == 1
    assert "could not be fetched" in sentence(capsys)
    assert everything(tmp_path) == placed("bottle")


def test_status_lists_categories(mvtec, tmp_path, capsys):
    assert fetch_categories(tmp_path, "grid", "bottle") == 0
    (tmp_path / "mvtec/cable/train/good").mkdir(parents=True)
    (tmp_path / "mvtec/cable/train/good/Thumbs.db").touch()
    assert main(["status", "--root", str(tmp_path)]) == 0
    assert "mvtec: 2 of 15 categories at hand: bottle, grid." in capsys.readouterr().out.splitlines()


# Other disks


@pytest.fixture
def disk(tmp_path):
    """A folder on another disk than `tmp_path`."""
    memory = Path("/dev/shm")
    if not (os.access(memory, os.W_OK) and memory.stat().st_dev != tmp_path.stat().st_dev):
        pytest.skip("there is no second file system")
    folder = Path(tempfile.mkdtemp(dir=memory))
    yield folder
    shutil.rmtree(folder)


def linked(root, name, to):
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).symlink_to(to)


@pytest.mark.parametrize("link", ["mvtec", "mvtec/pill"])
@pytest.mark.parametrize("made", [True, False])
def test_categories_are_fetched_through_a_link_to_another_disk(link, made, mvtec, disk, tmp_path, capsys):
    root = tmp_path / "root"
    linked(root, link, disk / "there")
    if made:
        (disk / "there").mkdir()
    assert fetch_categories(root, "pill") == 0, capsys.readouterr().err
    assert (root / link).is_symlink()
    assert everything(disk) == [path.removeprefix(f"{link}/").join(("there/", "")) for path in placed("pill")]
    assert (root / "mvtec/pill" / PLACES[0]).read_bytes() == b"pill train/good/000.png"
    assert everything(root) in ([], [link])
    assert fetch_categories(root, "pill") == 0
    assert "nothing to do" in capsys.readouterr().out


@pytest.mark.parametrize("made", [True, False])
def test_an_archive_is_fetched_through_a_link_to_another_disk(made, serve_archive, disk, tmp_path, capsys):
    serve_archive(archive_of(*GOOD))
    root = tmp_path / "root"
    linked(root, INNER, disk / "there")
    if made:
        (disk / "there").mkdir()
    assert fetch("ucsd", root) == 0, capsys.readouterr().err
    assert everything(disk) == sorted(name.replace(INNER, "there") for name, _ in GOOD)
    assert (root / GOOD[2][0]).read_bytes() == b"mask"


@pytest.mark.parametrize("link", ["MNIST", "MNIST/raw"])
def test_files_are_fetched_through_a_link_to_another_disk(link, release, files, disk, tmp_path, capsys):
    root = tmp_path / "root"
    linked(root, link, disk)
    assert fetch("mnist", root) == 0, capsys.readouterr().err
    assert {name: (root / "MNIST/raw" / name).read_bytes() for name in NAMES} == files
    assert len(everything(disk)) == 4
    (root / "MNIST/raw" / NAMES[0]).write_bytes(b"wrong")
    assert fetch("mnist", root) == 0, capsys.readouterr().err
    assert {name: (root / "MNIST/raw" / name).read_bytes() for name in NAMES} == files


def test_a_link_on_the_same_disk_is_followed_too(serve_archive, tmp_path, capsys):
    serve_archive(archive_of(*GOOD))
    (tmp_path / "there").mkdir()
    root = tmp_path / "root"
    linked(root, INNER, tmp_path / "there")
    assert fetch("ucsd", root) == 0, capsys.readouterr().err
    assert len(everything(tmp_path / "there")) == len(GOOD)


def test_a_place_where_nothing_may_be_written_is_found_before_the_download(
    release, server, read_only, open_place, capsys
):
    (open_place / "root/MNIST/raw").mkdir(parents=True)
    with read_only(open_place / "root"):
        assert fetch("mnist", open_place / "root") == 1
    assert "Permission denied" in sentence(capsys)
    assert server.asked == []


# Rights


def test_fetched_files_follow_the_umask(umask, odd_modes, mvtec, release, monkeypatch, server, tmp_path):
    files = dict(server.files)
    private = tarfile.TarInfo("pill/test/good/private.png")
    private.mode = 0o400
    mvtec(*workpiece("pill"), private)
    server.files |= files | {"/plain": b"content"}
    download = catalogue.Download((f"{server.url}/plain",), digest(b"content"), target="plain")
    monkeypatch.setitem(catalogue.SOURCES, "dsprites", dataclasses.replace(catalogue.DSPRITES, downloads=(download,)))
    root = tmp_path / "root"
    assert fetch("mnist", root) == 0
    assert fetch("dsprites", root) == 0
    assert fetch_categories(root, "pill") == 0
    assert len(everything(root)) == len(NAMES) + 1 + len(PLACES) + 1
    assert odd_modes(root) == {}


# Status


def test_status(release, files, tmp_path, capsys):
    write(tmp_path, files, note="As released.\n")
    frame = tmp_path / GOOD[0][0]
    frame.parent.mkdir(parents=True)
    frame.write_bytes(b"frame")
    assert main(["status", "--root", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    rows = {line.split()[0]: line for line in out.splitlines() if line.strip()}
    table = [re.split(r" {2,}", line) for line in out.split("\n\n")[0].splitlines()]
    assert table[0] == ["data set", "state", "images", "digest", "licence", "folder"]
    card = survey(release, tmp_path)
    assert table[1] == [
        "mnist",
        "complete",
        "12 train, 6 test",
        card.digest[:12],
        "CC BY-SA 3.0",
        str(tmp_path / "MNIST"),
    ]
    assert table[2][:3] == [
        "ucsd",
        "partial",
        "1 train (release: 6800), 0 test (release: 7200), 0 masks (release: 2000)",
    ]
    assert [row[:2] for row in table[3:]] == [["mvtec", "absent"], ["dsprites", "absent"]]
    assert rows["mnist:"] == "mnist: As released."
    assert "mvtec: `python -m expvae_book.data fetch mvtec` fetches it." in out.splitlines()


def test_status_names_a_damaged_file(release, files, tmp_path, capsys):
    raw = write(tmp_path, files | {NAMES[0]: files[NAMES[0]][:-1]})
    assert main(["status", "--root", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert re.search("^mnist +damaged", out, re.MULTILINE)
    assert f"mnist: {raw / NAMES[0]} is truncated or damaged" in out


# Loading MNIST


def test_partial_mnist(files, tmp_path):
    write(tmp_path, files, note="Twelve digits.\n")
    loaded = mnist.load("real", tmp_path)
    arrays = digits()
    for tensor, name, dtype in (
        (loaded.train_NYX, NAMES[0], torch.uint8),
        (loaded.train_label_N, NAMES[1], torch.int64),
        (loaded.test_NYX, NAMES[2], torch.uint8),
        (loaded.test_label_N, NAMES[3], torch.int64),
    ):
        assert tensor.dtype == dtype
        np.testing.assert_array_equal(tensor.numpy(), arrays[name])
    assert loaded.card.kind == loaded.card.mark == "partial"
    assert loaded.card.counts == {"train": 12, "test": 6}
    assert loaded.card.official == {"train": 60_000, "test": 10_000}
    assert loaded.card.note == "Twelve digits."


def test_complete_mnist(release, files, tmp_path, capsys):
    write(tmp_path, files)
    card = mnist.load("auto", tmp_path).card
    assert (card.kind, card.mark, card.note) == ("complete", "", "")
    assert capsys.readouterr().err == ""


def test_altered_mnist_of_official_counts_is_partial(release, files, tmp_path):
    write(tmp_path, files | {NAMES[0]: files[NAMES[0]][:-1] + b"x"})
    card = mnist.load("real", tmp_path).card
    assert card.kind == "partial"
    assert card.note.endswith(f"differ from the release: raw/{NAMES[0]}.")


def test_digest_tells_data_apart(files, tmp_path):
    write(tmp_path / "one", files)
    write(tmp_path / "two", files | {NAMES[1]: files[NAMES[1]][:-1] + b"\x00"})
    write(tmp_path / "three", files, note="The note is not the data.")
    one, two, three = (mnist.load("real", tmp_path / name).card.digest for name in ("one", "two", "three"))
    assert one == three != two


def test_root_comes_from_the_environment(files, tmp_path, monkeypatch):
    write(tmp_path, files)
    monkeypatch.setenv("EXPVAE_DATA", str(tmp_path))
    assert mnist.load("auto").card.counts == {"train": 12, "test": 6}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-1],
        lambda content: content + b"x",
        lambda content: content[:6],
        lambda content: content[:3],
        lambda content: b"",
        lambda content: b"\0\0\x08\0x",
        lambda content: b"\0\0\x0d" + content[3:],
        gzip.compress,
    ],
)
@pytest.mark.parametrize("data", ["real", "auto"])
def test_damaged_file_is_named(name, damage, data, files, tmp_path):
    raw = write(tmp_path, files | {name: damage(files[name])})
    with pytest.raises(ValueError, match=re.escape(str(raw / name))) as caught:
        mnist.load(data, tmp_path)
    assert "python -m expvae_book.data fetch mnist" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "array", "said"),
    [
        (NAMES[0], np.zeros((12, 14, 14)), "not images of 28x28"),
        (NAMES[1], np.zeros(11), "for 12 images"),
        (NAMES[3], np.full(6, 10), "the label 10"),
    ],
)
def test_wrong_content_is_named(name, array, said, files, tmp_path):
    raw = write(tmp_path, files | {name: idx(array)})
    with pytest.raises(ValueError, match=re.escape(str(raw / name))) as caught:
        mnist.load("real", tmp_path)
    assert said in str(caught.value)


def test_missing_files(files, tmp_path, capsys):
    with pytest.raises(FileNotFoundError) as caught:
        mnist.load("real", tmp_path)
    assert str(tmp_path / "MNIST/raw") in str(caught.value)
    assert f"python -m expvae_book.data fetch mnist --root {tmp_path}" in str(caught.value)
    # One file short is no reason to fall back to the sample in silence.
    del files[NAMES[1]]
    write(tmp_path, files)
    with pytest.raises(FileNotFoundError, match=f"lacks {NAMES[1]} .*holds {NAMES[2]}, .*; `python"):
        mnist.load("auto", tmp_path)


@pytest.mark.parametrize(
    "spell",
    [
        lambda name: name.replace("-idx", ".idx"),
        lambda name: f"{name}.gz",
        lambda name: f"{name.replace('-idx', '.idx').upper()}.gz",
        lambda name: f"{name}/{name}",  # unpacked into a folder of its name
    ],
)
@pytest.mark.parametrize("names", [NAMES, NAMES[:1]])
@pytest.mark.parametrize("data", ["real", "auto"])
def test_files_of_other_unpackers(data, names, spell, files, tmp_path, capsys):
    raw = write(tmp_path, {name: content for name, content in files.items() if name not in names})
    for name in names:
        (raw / spell(name)).parent.mkdir(exist_ok=True)
        (raw / spell(name)).write_bytes(files[name])
    with pytest.raises(FileNotFoundError) as caught:
        mnist.load(data, tmp_path)
    said = str(caught.value)
    assert said.startswith(f"{raw} lacks {', '.join(names)} ({raw} holds ")
    assert all(spell(name).partition("/")[0] in said for name in names)
    assert "; unpack what ends in .gz and rename what is there to the names it lacks, or `python -m" in said
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", ["raw/mnist.npz", "train-images-idx3-ubyte", "training/0/1.png"])
def test_sample_beside_other_files_names_them(name, tmp_path, capsys):
    file = tmp_path / "MNIST" / name
    file.parent.mkdir(parents=True)
    file.touch()
    assert mnist.load("auto", tmp_path).card.kind == "sample"
    folder = tmp_path / ("MNIST/raw" if name.startswith("raw") else "MNIST")
    shown = {"training/0/1.png": "training/"}.get(name, name.removeprefix("raw/"))
    assert f"MNIST is not in {tmp_path / 'MNIST/raw'} ({folder} holds {shown}): using" in capsys.readouterr().err


def test_of_many_files_some_are_named(tmp_path, capsys):
    raw = write(tmp_path, {f"{number}.png": b"" for number in range(10)})
    mnist.load("auto", tmp_path)
    assert f"({raw} holds 0.png, 1.png, 2.png, 3.png, 4.png, 5.png and 4 more)" in capsys.readouterr().err


def test_unknown_data():
    with pytest.raises(ValueError, match="auto, real, sample; got 'fake'"):
        mnist.load("fake")


# The sample


@pytest.fixture(scope="module")
def sample():
    return mnist.load("sample")


def test_auto_falls_back_to_the_sample_and_says_so(tmp_path, capsys):
    loaded = mnist.load("auto", tmp_path)
    assert loaded.card.kind == loaded.card.mark == "sample"
    said = capsys.readouterr().err
    assert "SAMPLE" in said
    assert str(tmp_path / "MNIST/raw") in said
    assert "python -m expvae_book.data fetch mnist" in said


def test_sample(sample):
    assert sample.train_NYX.shape == (1500, 28, 28)
    assert sample.test_NYX.shape == (297, 28, 28)
    assert sample.train_NYX.dtype == sample.test_NYX.dtype == torch.uint8
    assert sample.train_label_N.dtype == sample.test_label_N.dtype == torch.int64
    assert sample.card.counts == {"train": 1500, "test": 297}
    assert "Not MNIST" in sample.card.note
    # Stratified: each digit's share of the test split is the whole's, to one image.
    test = torch.bincount(sample.test_label_N)
    everywhere = test + torch.bincount(sample.train_label_N)
    assert ((test - everywhere * 297 / 1797).abs() < 1).all()
    # Each of the 1797 digits is in exactly one split.
    both = torch.cat([sample.train_NYX, sample.test_NYX]).flatten(1).numpy()
    expected = digits_of_sklearn.enlarged(load_digits().images.astype(np.int64)).reshape(1797, -1)
    np.testing.assert_array_equal(np.sort(both.view("V784"), axis=0), np.sort(expected.view("V784"), axis=0))


def test_sample_is_the_same_everywhere(sample):
    assert sample.card.digest == "fbdbdd1eab627c48b2796d79d0ac9da15e6d423fed5155fffde606f8456e07c0"


def test_sample_is_enlarged_as_torch_enlarges():
    v_NYX = load_digits().images[:50]
    x_NYX = digits_of_sklearn.enlarged(v_NYX.astype(np.int64)).astype(float)
    ink = torch.nn.functional.interpolate(torch.tensor(v_NYX)[None] / 16, size=(20, 20), mode="bilinear")[0]
    ink = 255 * ((ink - 0.375) / 0.375).clamp(0, 1).numpy()
    for image, expected in zip(x_NYX, ink, strict=True):
        ys, xs = np.nonzero(image)
        ey, ex = np.nonzero(expected >= 1)
        shift = (ys.min() - ey.min(), xs.min() - ex.min())
        moved = np.zeros((28, 28))
        moved[shift[0] : shift[0] + 20, shift[1] : shift[1] + 20] = expected
        np.testing.assert_allclose(image, moved, atol=1.0)  # cut to whole grey levels
        centre = (image.sum(1) @ np.arange(28) / image.sum(), image.sum(0) @ np.arange(28) / image.sum())
        np.testing.assert_allclose(centre, 13.5, atol=0.51)


def test_sample_looks_like_mnist_and_keeps_its_labels(sample):
    x_NYX = sample.train_NYX.double() / 255
    assert x_NYX.mean() == pytest.approx(0.1307, abs=0.01)  # MNIST's mean and standard deviation
    assert x_NYX.std() == pytest.approx(0.3081, abs=0.01)
    neighbours = KNeighborsClassifier(3).fit(sample.train_NYX.flatten(1).numpy(), sample.train_label_N.numpy())
    assert neighbours.score(sample.test_NYX.flatten(1).numpy(), sample.test_label_N.numpy()) > 0.95


def test_a_note_in_another_encoding_is_named(files, tmp_path):
    note = tmp_path / "MNIST" / "NOTE.txt"
    write(tmp_path, files, note="")
    note.write_bytes("café".encode("latin-1"))
    with pytest.raises(ValueError, match=rf"^{note} is no text in UTF-8 \("):
        survey(catalogue.MNIST, tmp_path)
