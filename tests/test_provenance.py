import hashlib
import subprocess
import types

import numpy as np
import pytest
import torch

from expvae_book import devices, provenance, weights


@pytest.fixture
def repository(tmp_path, monkeypatch):
    for name in ("lib/expvae_book/a.py", "lib/expvae/b.py", "benchmarks/speed.py", "book/mini.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x = 1")
    monkeypatch.setattr(provenance, "REPOSITORY", tmp_path)
    return tmp_path


# --- git, devices, tensors -------------------------------------------------------------------------------------------


def git(folder, *arguments):
    settings = ["-c", "user.name=n", "-c", "user.email=e", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", *settings, *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_commit_and_whether_the_code_differs_from_it(repository):
    git(repository, "init", "--quiet")
    git(repository, "add", ".")
    git(repository, "commit", "--quiet", "--message", "first")
    head = git(repository, "rev-parse", "HEAD")
    assert provenance.commit() == {"commit": head, "dirty": False}
    (repository / "notes.txt").write_text("not code")
    assert provenance.commit() == {"commit": head, "dirty": False}
    (repository / "lib" / "expvae" / "b.py").write_text("x = 2")
    assert provenance.commit() == {"commit": head, "dirty": True}
    git(repository, "checkout", "lib")
    (repository / "book" / "new.md").write_text("# New")
    assert provenance.commit() == {"commit": head, "dirty": True}
    (repository / "book" / "new.md").unlink()
    assert provenance.commit() == {"commit": head, "dirty": False}
    (repository / "benchmarks" / "speed.py").write_text("z = 2")
    assert provenance.commit() == {"commit": head, "dirty": True}


def test_commit_is_none_without_a_commit_a_checkout_or_git(repository, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(repository.parent))
    assert provenance.commit() == {"commit": None, "dirty": None}
    git(repository, "init", "--quiet")
    assert provenance.commit() == {"commit": None, "dirty": None}
    monkeypatch.setenv("PATH", str(repository))
    assert provenance.commit() == {"commit": None, "dirty": None}


def committed(folder):
    git(folder, "init", "--quiet")
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "--allow-empty", "--message", f"of {folder.name}")
    return git(folder, "rev-parse", "HEAD")


@pytest.mark.parametrize("tracked", [True, False])
def test_the_commit_of_a_repository_around_a_copy_is_not_its_own(repository, monkeypatch, tracked):
    if tracked:
        committed(repository)
    (repository / "copy").mkdir()
    for folder in ("lib", "book", "benchmarks"):
        (repository / folder).rename(repository / "copy" / folder)
    committed(repository)
    monkeypatch.setattr(provenance, "REPOSITORY", repository / "copy")
    assert provenance.commit() == {"commit": None, "dirty": None}
    (repository / "copy" / ".git").mkdir()  # which is no repository
    assert provenance.commit() == {"commit": None, "dirty": None}
    (repository / "copy" / ".git").rmdir()
    assert provenance.commit() == {"commit": None, "dirty": None}
    head = committed(repository / "copy")
    assert provenance.commit() == {"commit": head, "dirty": False}


@pytest.mark.parametrize("own", [True, False])
def test_variables_of_git_do_not_name_another_repository(repository, monkeypatch, tmp_path_factory, own):
    other = tmp_path_factory.mktemp("other")
    (other / "lib").mkdir()
    (other / "lib" / "x.py").write_text("x = 3")
    committed(other)
    expected = {"commit": committed(repository), "dirty": False} if own else {"commit": None, "dirty": None}
    monkeypatch.setenv("GIT_DIR", str(other / ".git"))
    assert provenance.commit() == expected
    monkeypatch.setenv("GIT_WORK_TREE", str(repository))
    assert provenance.commit() == expected
    monkeypatch.delenv("GIT_DIR")
    monkeypatch.setenv("GIT_WORK_TREE", str(other))
    assert provenance.commit() == expected
    monkeypatch.delenv("GIT_WORK_TREE")
    monkeypatch.setenv("GIT_INDEX_FILE", str(other / ".git" / "index"))
    assert provenance.commit() == expected


def test_worktrees_and_submodules_have_commits_of_their_own(repository, monkeypatch, tmp_path_factory):
    head = committed(repository)
    around = tmp_path_factory.mktemp("around")
    git(repository, "worktree", "add", "--quiet", "--detach", str(around / "tree"))
    committed(around / "tree")
    git(around, "init", "--quiet")
    git(around, "-c", "protocol.file.allow=always", "submodule", "--quiet", "add", str(repository), "module")
    git(around, "commit", "--quiet", "--message", "with a module")
    monkeypatch.setattr(provenance, "REPOSITORY", around / "module")
    assert provenance.commit() == {"commit": head, "dirty": False}
    monkeypatch.setattr(provenance, "REPOSITORY", around / "tree")
    tree = git(around / "tree", "rev-parse", "HEAD")
    assert tree != head
    assert provenance.commit() == {"commit": tree, "dirty": False}
    (around / "tree" / "lib" / "new.py").write_text("x = 1")
    assert provenance.commit() == {"commit": tree, "dirty": True}


@pytest.mark.parametrize(
    ("cuda", "mps", "expected"),
    [(False, False, "cpu"), (True, False, "cuda"), (False, True, "mps"), (True, True, "cuda")],
)
def test_choose_device_takes_the_fastest_that_is_there(monkeypatch, cuda, mps, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert devices.choose_device("auto") == torch.device(expected)
    assert devices.choose_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("name", ["cuda", "tpu", "", "cuda:0"])
def test_choose_device_names_what_is_there(monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    with pytest.raises(ValueError, match=rf"^device='{name}' is not there; this machine has: auto, mps, cpu$"):
        devices.choose_device(name)


def test_describe_device():
    assert devices.describe_device(torch.device("cpu")).startswith(f"cpu: {torch.get_num_threads()} threads, ")
    assert devices.describe_device(torch.device("mps")) == "mps"


@pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_a_precision_that_is_named_is_taken_on_every_device(name, device):
    assert devices.choose_precision(name, torch.device(device)) == name


@pytest.mark.parametrize(
    ("capabilities", "gain", "expected"),
    [
        ({"amx_bf16": True, "avx512_bf16": True}, 6.0, "bfloat16"),
        ({"amx_bf16": False, "avx512_bf16": True}, 2.3, "bfloat16"),
        ({"amx_bf16": False, "avx512_bf16": True}, 0.5, "float32"),  # seen on an Intel Xeon without AMX
        ({"sve": True}, 2.0, "float32"),  # an ARM has no such entry
    ],
)
def test_auto_precision_on_a_cpu_is_what_proves_faster(monkeypatch, capabilities, gain, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    monkeypatch.setattr(devices, "_gain", lambda: gain)
    assert devices.choose_precision("auto", torch.device("cpu")) == expected
    assert devices.choose_precision("auto", torch.device("mps")) == "float32"


@pytest.mark.parametrize(("units", "expected"), [(True, "bfloat16"), (False, "float32")])
def test_auto_precision_on_a_gpu_does_not_count_emulation(monkeypatch, units, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": not units})
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or units)
    assert devices.choose_precision("auto", torch.device("cuda")) == expected


def test_the_gain_is_the_ratio_of_the_best_times(monkeypatch):
    clock = iter(np.cumsum([0, 9, 0, 9, *(0, 4, 0, 2) * 5]).tolist())  # a slow first round; then 4 s and 2 s
    monkeypatch.setattr(devices.time, "perf_counter", lambda: next(clock))
    assert devices._gain.__wrapped__() == 2


@pytest.mark.parametrize("name", ["float16", "bf16", ""])
def test_choose_precision_names_the_choices(name):
    with pytest.raises(ValueError, match=rf"^precision must be one of auto, float32, bfloat16; got '{name}'$"):
        devices.choose_precision(name, torch.device("cpu"))


def test_versions_are_text():
    versions = provenance.versions()
    assert versions["torch"] == str(torch.__version__)
    assert set(versions) == {"python", "torch", "machine"}


def test_tensor_digest_is_that_of_shape_type_and_bytes():
    x = torch.arange(24, dtype=torch.uint8).reshape(2, 3, 2, 2)
    expected = hashlib.sha256(b"(2, 3, 2, 2) torch.uint8" + np.arange(24, dtype=np.uint8).tobytes()).hexdigest()
    assert weights.tensor_digest(x) == expected
    assert weights.tensor_digest(x.to(memory_format=torch.channels_last)) == expected
    others = [x.reshape(3, 2, 2, 2), x.to(torch.int8), x.flip(0), x + 1, x.to(torch.float32)]
    assert len({expected, *map(weights.tensor_digest, others)}) == 6


def test_a_process_that_computes_on_the_cpu_keeps_its_memory(monkeypatch):
    asked = []
    monkeypatch.setattr(devices.ctypes, "CDLL", lambda name: types.SimpleNamespace(mallopt=lambda *a: asked.append(a)))
    devices._keep_memory.__wrapped__()
    # M_TRIM_THRESHOLD, M_TOP_PAD and M_MMAP_MAX of glibc's malloc.h
    assert asked == [(-1, 2**31 - 1), (-2, 2**28), (-4, 0)]
    monkeypatch.setattr(devices.ctypes, "CDLL", lambda name: object())  # a libc without it
    devices._keep_memory.__wrapped__()
    monkeypatch.setattr(devices, "_keep_memory", lambda: asked.append("kept"))
    monkeypatch.setattr(devices.sys, "platform", "linux")
    devices.choose_device("cpu")
    assert asked[3:] == ["kept"]
    monkeypatch.setattr(devices.sys, "platform", "darwin")
    devices.choose_device("cpu")
    assert asked[3:] == ["kept"]
