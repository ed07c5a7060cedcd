import hashlib
import subprocess
import sys
from types import ModuleType

import numpy as np
import pytest
import torch

from lib import provenance

SOURCE = '''
"""A module."""

import math


class Circle:
    """A circle."""

    def area(self, radius, *, scale=1.0):
        """Its area."""
        # Greek
        return math.pi * radius**2 * scale


def label(x, width=8, *rest, **named):
    if x is None:
        return f"{x!r:>8} of {width=}" " in " f"{rest}"
    return {"a": [x, -1, 1e-3, 2j, b"b", ...], **named}
'''
REWRITTEN = """
import math
class Circle:
  def area(
      self, radius, *, scale = 1.0 ):
    'Another docstring.'
    return (math.pi*radius**2*scale)  # a comment

def label(x,width=8,*rest,**named):
    if x is None: return f'{x!r:>8} of {width=} in {rest}'
    return {
        'a': [x, -1, 0.001, 2j, b'b', ...],
        **named,
    }
"""


def test_source_hash_ignores_comments_docstrings_and_layout():
    assert provenance.source_hash(SOURCE) == provenance.source_hash(REWRITTEN)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("radius**2", "radius**3"),
        ("math.pi * radius", "radius * math.pi"),
        ("scale=1.0", "scale=1"),
        ("*, scale", "scale"),
        ("is None", "is not None"),
        ("-1, 1e-3", "1e-3, -1"),
        ("!r:>8", "!s:>8"),
        ("!r:>8", "!r:<8"),
        ("import math", "import numpy as math"),
        ("**named}", "'b': named}"),
        ("class Circle", "class Ellipse"),
    ],
)
def test_source_hash_changes_with_the_code(old, new):
    assert old in SOURCE
    assert provenance.source_hash(SOURCE.replace(old, new)) != provenance.source_hash(SOURCE)


def test_a_string_that_is_no_docstring_counts():
    assert provenance.source_hash("x = 'a'") != provenance.source_hash("x = 'b'")
    assert provenance.source_hash("def f():\n return 'a'") != provenance.source_hash("def f():\n return 'b'")


def test_stored_digests_stay_valid():
    """The records and the cache hold such digests; they must not depend on the version of Python either."""
    assert provenance.source_hash(SOURCE) == "e470c3f95b5668e5f5a544b79b7f87ea02d4cd026aaacd7fc8ca43c4befa524b"


# --- code of modules and chapters ------------------------------------------------------------------------------------

CHAPTER = """\
---
jupytext:
  text_representation:
    extension: .md
    format_name: myst
kernelspec:
  display_name: Python 3
  name: python3
---

# A chapter

```{code-cell} ipython3
:tags: [parameters]

digit: int = 1  # 0 | 1
```

```{code-cell} ipython3
def compute():
    return digit + 1
```

```{code-cell} ipython3
run = chapters.run("mini", {"digit": digit}, compute)
```

What it means.

```{code-cell} ipython3
print(run.metrics)
```
"""


@pytest.fixture
def repository(tmp_path, monkeypatch):
    for name, text in {
        "lib/__init__.py": "",
        "lib/a.py": "x = 1",
        "lib/b.py": "y = 1",
        "benchmarks/speed.py": "z = 1",
        "book/mini.md": CHAPTER,
        "book/shows.md": CHAPTER.replace("chapters.run(", "runs.load("),
        "book/each.md": CHAPTER.replace("chapters.run(", "chapters.run_each("),
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(provenance, "REPOSITORY", tmp_path)
    return tmp_path


NAMES = ["lib.b", "lib", "lib.a", "lib.gone", "benchmarks.speed", "book/mini.md", "book/shows.md"]
NAMES += ["book/each.md", "book/gone.md"]


def test_code_hashes_name_modules_packages_and_chapters(repository):
    hashes = provenance.code_hashes(NAMES)
    assert list(hashes) == sorted(NAMES)
    assert hashes["lib.gone"] is None
    assert hashes["book/gone.md"] is None
    assert hashes["lib"] == provenance.source_hash("")
    assert hashes["lib.a"] == provenance.source_hash("x = 1")
    assert hashes["benchmarks.speed"] == provenance.source_hash("z = 1")
    assert hashes["book/shows.md"] is None  # chapters.run is called in none of its cells


@pytest.mark.parametrize(
    ("file", "old", "new", "changed"),
    [
        ("lib/a.py", "x = 1", "x = 2", {"lib.a"}),
        ("lib/a.py", "x = 1", '"""What x is."""\n\nx = 1  # one', set()),
        ("benchmarks/speed.py", "z = 1", "z = 2", {"benchmarks.speed"}),
        ("lib/__init__.py", "", "import lib.a", {"lib"}),
        ("book/mini.md", "digit + 1", "digit + 2", {"book/mini.md"}),
        ("book/mini.md", '"mini", {"digit"', '"mini", {"number"', {"book/mini.md"}),
        ("book/mini.md", "# A chapter", "# A better title", set()),
        ("book/mini.md", "digit: int = 1", "digit: int = 0", set()),  # parameters are part of the record
        ("book/mini.md", "print(run.metrics)", "print(run.losses)", set()),  # only shows the result
        ("book/each.md", "digit + 1", "digit + 2", {"book/each.md"}),
        ("book/each.md", '"mini", {"digit"', '"mini", {"number"', {"book/each.md"}),
        ("book/each.md", "print(run.metrics)", "print(run.losses)", set()),
        ("book/shows.md", "digit + 1", "digit + 2", set()),  # a page that only shows the results of others
        ("book/mini.md", "return digit", "# the number\n    return digit", set()),
    ],
)
def test_code_hashes_see_what_can_change_a_result(repository, file, old, new, changed):
    before = provenance.code_hashes(NAMES)
    text = (repository / file).read_text()
    assert old in text
    (repository / file).write_text(text.replace(old, new) if old else new)
    after = provenance.code_hashes(NAMES)
    assert {name for name in NAMES if before[name] != after[name]} == changed


def test_library_modules_are_those_that_are_loaded(monkeypatch):
    others = {name for name in sys.modules if name.partition(".")[0] not in ("lib", "benchmarks")}
    for name in ("benchmarks.speed", "benchmarks_of_others", "library"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    modules = provenance.library_modules()
    assert {"lib", "lib.provenance", "benchmarks.speed"} <= set(modules)
    assert not others & set(modules)
    assert not {"benchmarks_of_others", "library"} & set(modules)


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
    (repository / "lib" / "a.py").write_text("x = 2")
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


@pytest.mark.parametrize(
    ("cuda", "mps", "expected"),
    [(False, False, "cpu"), (True, False, "cuda"), (False, True, "mps"), (True, True, "cuda")],
)
def test_choose_device_takes_the_fastest_that_is_there(monkeypatch, cuda, mps, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert provenance.choose_device("auto") == torch.device(expected)
    assert provenance.choose_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("name", ["cuda", "tpu", "", "cuda:0"])
def test_choose_device_names_what_is_there(monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    with pytest.raises(ValueError, match=rf"^device='{name}' is not there; this machine has: auto, mps, cpu$"):
        provenance.choose_device(name)


def test_describe_device():
    assert provenance.describe_device(torch.device("cpu")).startswith(f"cpu: {torch.get_num_threads()} threads, ")
    assert provenance.describe_device(torch.device("mps")) == "mps"


@pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_a_precision_that_is_named_is_taken_on_every_device(name, device):
    assert provenance.choose_precision(name, torch.device(device)) == name


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"amx_bf16": True, "avx512_bf16": True}, "bfloat16"),
        ({"amx_bf16": False, "avx512_bf16": True}, "float32"),
        ({"sve": True}, "float32"),  # an ARM has no such entry
    ],
)
def test_auto_precision_on_a_cpu_asks_for_units_of_bfloat16(monkeypatch, capabilities, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert provenance.choose_precision("auto", torch.device("cpu")) == expected
    assert provenance.choose_precision("auto", torch.device("mps")) == "float32"


@pytest.mark.parametrize(("units", "expected"), [(True, "bfloat16"), (False, "float32")])
def test_auto_precision_on_a_gpu_does_not_count_emulation(monkeypatch, units, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": not units})
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or units)
    assert provenance.choose_precision("auto", torch.device("cuda")) == expected


@pytest.mark.parametrize("name", ["float16", "bf16", ""])
def test_choose_precision_names_the_choices(name):
    with pytest.raises(ValueError, match=rf"^precision must be one of auto, float32, bfloat16; got '{name}'$"):
        provenance.choose_precision(name, torch.device("cpu"))


def test_versions_are_text():
    versions = provenance.versions()
    assert versions["torch"] == str(torch.__version__)
    assert set(versions) == {"python", "torch", "machine"}


def test_tensor_digest_is_that_of_shape_type_and_bytes():
    x = torch.arange(24, dtype=torch.uint8).reshape(2, 3, 2, 2)
    expected = hashlib.sha256(b"(2, 3, 2, 2) torch.uint8" + np.arange(24, dtype=np.uint8).tobytes()).hexdigest()
    assert provenance.tensor_digest(x) == expected
    assert provenance.tensor_digest(x.to(memory_format=torch.channels_last)) == expected
    others = [x.reshape(3, 2, 2, 2), x.to(torch.int8), x.flip(0), x + 1, x.to(torch.float32)]
    assert len({expected, *map(provenance.tensor_digest, others)}) == 6
