"""Ways to damage a valid file, by chance that is seeded."""

import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

Draw = np.random.Generator
Damage = Callable[[Path, Draw], str]  # changes something in a folder, and gives what the message has to name


def content(name: str, change: Callable[[bytes, Draw], bytes]) -> Damage:
    """Change the bytes of the only file of this pattern."""

    def damage(folder: Path, draw: Draw) -> str:
        file = next(folder.glob(name))
        file.write_bytes(change(file.read_bytes(), draw))
        return file.name

    return damage


def flipped(old: bytes, draw: Draw) -> bytes:
    at = int(draw.integers(len(old)))
    return old[:at] + bytes([old[at] ^ int(draw.integers(1, 256))]) + old[at + 1 :]


def put(name: str, at: int, value: int) -> Damage:
    """Another byte at a place."""
    return content(name, lambda old, draw: old[:at] + bytes([value]) + old[at % len(old) + 1 :])


def structure(name: str) -> tuple[Damage, ...]:
    """What no file of any format survives: cut, empty, text, zeros, or a pickle."""
    changes = (
        lambda old, draw: old[: draw.integers(1, len(old) - 1)],
        lambda old, draw: b"",
        lambda old, draw: b"This is a text, and nothing else.\n" * 9,
        lambda old, draw: bytes(len(old)),
        lambda old, draw: pickle.dumps({"weights": [1.0, 2.0]}),
        lambda old, draw: old[: len(old) // 2] + draw.bytes(64),
        lambda old, draw: draw.bytes(32) + old[32:],
    )
    return tuple(content(name, change) for change in changes)


def bytewise(name: str) -> tuple[Damage, ...]:
    return (content(name, flipped),) * 6


def texts(name: str, *changes: tuple[str, str]) -> tuple[Damage, ...]:
    """Replace a part of a text; a lone surrogate stands for a byte that is no UTF-8."""
    encoded = [(old.encode(), new.encode("utf-8", "surrogateescape")) for old, new in changes]
    return tuple(content(name, lambda whole, draw, pair=pair: whole.replace(*pair)) for pair in encoded)


def entry(name: str, *path: str | int, value: object = None) -> Damage:
    """Put another value at a place of a JSON text; without one, what is there goes."""

    def change(old: bytes, draw: Draw) -> bytes:
        whole = part = json.loads(old)
        for step in path[:-1]:
            part = part[step]
        if value is None:
            del part[path[-1]]
        else:
            part[path[-1]] = value
        return json.dumps(whole).encode()

    return content(name, change)


def tensors(name: str, first: str) -> tuple[Damage, ...]:
    """One tensor too few, of another shape, under another name, or NaN, in a safetensors file that stays one."""

    def changed(change: Callable[[dict], object]) -> Damage:
        def damage(folder: Path, draw: Draw) -> str:
            change(held := load_file(file := next(folder.glob(name))))
            save_file(held, file)
            return file.name

        return damage

    return (
        changed(lambda held: held.pop(first)),
        changed(lambda held: held.update({first: held[first][:1].clone()})),
        changed(lambda held: held.update({"another": held.pop(first)})),
        changed(lambda held: held.update({first: torch.full_like(held[first], torch.nan)})),
    )


def archive(name: str, **changed: object) -> Damage:
    """Write other arrays into an npz file in place of those of the same names; None leaves one out."""

    def change(old: bytes, draw: Draw) -> bytes:
        with np.load(io.BytesIO(old), allow_pickle=False) as held:
            arrays = {key: array for key, array in (dict(held) | changed).items() if array is not None}
        np.savez_compressed(made := io.BytesIO(), **arrays)
        return made.getvalue()

    return content(name, change)


def placed(make: Callable[[Path], object], said: str) -> Damage:
    """Add, move or remove files of a folder."""

    def damage(folder: Path, draw: Draw) -> str:
        make(folder)
        return said

    return damage
