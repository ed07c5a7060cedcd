"""ImageNet's weights: a file below the data root, or torchvision's download."""

import hashlib

import pytest
import torch
from safetensors.torch import save_file
from torchvision.models import resnet18

from expvae.models import MVTecVAE
from expvae_book.data import imagenet
from expvae_book.data.__main__ import main
from expvae_book.data.catalogue import IMAGENET_FILE


def tensors():
    """Weights of ResNet-18 without the classifier and the counters, as the file has them."""
    generator = torch.Generator().manual_seed(3)
    with torch.device("meta"):
        state = resnet18().state_dict()
    names = (name for name in state if not name.startswith("fc.") and not name.endswith("num_batches_tracked"))
    return {name: torch.rand(state[name].shape, generator=generator) for name in names}


def put(root, values):
    file = root / IMAGENET_FILE
    file.parent.mkdir()
    save_file(values, file)
    return file


def test_the_file_in_the_data_root_comes_first(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(imagenet, "imagenet_weights", lambda: pytest.fail("torchvision was asked"))
    values = tensors()
    file = put(tmp_path, values)
    before = torch.get_rng_state()
    weights = imagenet.load(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    assert weights.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    model = MVTecVAE(2, weights.tensors)
    assert model.normalises
    ours = model.encoder.state_dict()
    for name, value in values.items():
        assert torch.equal(ours[name], value), name
    main(["status", "--root", str(tmp_path)])
    assert f"{file} (SHA-256 {weights.sha256})" in capsys.readouterr().out


def test_a_file_of_another_network_is_refused(tmp_path):
    values = tensors()
    del values["bn1.bias"]
    values |= {"conv1.weight": torch.rand(64, 3, 3, 3), "layer5.weight": torch.rand(1)}
    file = put(tmp_path, values)
    with pytest.raises(
        ValueError, match=r"torchvision's ResNet-18; .*: bn1.bias, conv1.weight, layer5.weight$"
    ) as info:
        imagenet.load(tmp_path)
    assert str(info.value).startswith(str(file))
    with pytest.raises(RuntimeError, match=r"size mismatch for conv1\.weight"):
        MVTecVAE(2, values)


def test_a_damaged_file_is_refused(tmp_path):
    file = put(tmp_path, tensors())
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"resnet18_imagenet\.safetensors is damaged \("):
        imagenet.load(tmp_path)


def test_weights_that_are_not_finite_are_refused(tmp_path):
    values = tensors()
    values["bn1.bias"][3] = torch.nan
    with pytest.raises(
        ValueError, match=r"resnet18_imagenet\.safetensors holds numbers that are not finite: bn1\.bias$"
    ):
        put(tmp_path, values)
        imagenet.load(tmp_path)


def test_torchvisions_weights_come_second(tmp_path, monkeypatch, capsys):
    values = tensors()
    monkeypatch.setattr(imagenet, "imagenet_weights", lambda: values)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    download = tmp_path / "hub/checkpoints/resnet18-f37072fd.pth"
    download.parent.mkdir(parents=True)
    download.write_bytes(b"what torchvision loaded")
    weights = imagenet.load(tmp_path)
    assert weights.tensors is values
    assert weights.sha256 == hashlib.sha256(b"what torchvision loaded").hexdigest()
    main(["status", "--root", str(tmp_path)])
    assert "(absent, torchvision's are downloaded at first use)" in capsys.readouterr().out
    monkeypatch.setattr(imagenet, "imagenet_weights", lambda: None)
    assert imagenet.load(tmp_path) is None
