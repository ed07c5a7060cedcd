"""The chapter on other VAEs: its code as it stands on the page, and MONAI's VAE against a slow loop and captum."""

import ast

import jupytext
import pytest
import torch
from captum.attr import LayerGradCam
from monai.networks.nets import VarAutoEncoder
from sklearn.metrics import roc_auc_score
from torch import nn
from torch.nn import functional as F

from expvae import Method, attention
from expvae_book import names
from expvae_book.chapters import BOOK
from expvae_book.data.generated import workpieces
from expvae_book.jobs import reuse
from expvae_book.pages import reuse as page

CELLS = [cell.source for cell in jupytext.read(BOOK / "reuse.md", fmt="md:myst").cells if cell.cell_type == "code"]


@pytest.fixture(scope="module")
def chapter():
    """Names that the chapter's own cells define."""
    known = {"torch": torch, "nn": nn, "attention": attention, "Method": Method}
    for source in CELLS:
        if any(start in source for start in ("class VAE(", "def explain(", "def share_kept(")):
            defined, *_ = source.split("\n\n\nchecks = ")
            exec(defined, known)
    return known


def test_a_drawn_part_goes_the_way_of_ones_own_images(chapter, monkeypatch):
    shown = []
    monkeypatch.setattr(reuse, "PART_EPOCHS", 1)
    for images, count in {"TRAINING": 5, "GOOD": 2, "EACH": 1}.items():
        monkeypatch.setattr(workpieces, images, count)
    monkeypatch.setattr(reuse.imagenet, "load", lambda: None)
    monkeypatch.setattr(page.report, "show", lambda table, caption: shown.append((table, caption)))
    monkeypatch.setattr(page, "display", lambda text: shown.append(text.data))
    known = chapter | {"page": page, "reuse": reuse, "seed": 0, "latents": reuse.RECIPE.latent_dim}
    for source in CELLS:
        if any(part in source for part in ("workpieces.write(", "reuse.scores(")):
            exec(source, known)
    part, drawn = known["part"], workpieces.draw("metal_nut", 0)
    assert part.card.kind == "user's own"
    assert part.card.note.splitlines()[0] == "Generated workpieces of this book, no photographs."
    assert sorted(part.test_defect) == sorted(drawn.test_defect)
    assert all(
        mask_YX.any() == (kind != "good") for mask_YX, kind in zip(part.test_mask, part.test_defect, strict=True)
    )
    (folders, _), (table, caption), said = shown
    assert (
        folders["files"].sum()
        == 1 + len(drawn.train_NYXC) + len(drawn.test_NYXC) + (drawn.test_mask_NYX.any((1, 2))).sum()
    )
    assert caption.startswith("A generated part: 5 images to train on")
    names_of = ["attention", names.ERROR, "PaDiM, random features"]
    assert list(known["maps"]) == table["map"].tolist() == names_of
    truth_NYX = torch.stack(part.test_mask)
    for name, map_NYX in known["maps"].items():
        text = table.set_index("map").loc[name, names.AUROC]
        assert float(text.partition(" ")[0]) == pytest.approx(
            roc_auc_score(truth_NYX.flatten(), map_NYX.flatten()), abs=6e-4
        )
    assert said.startswith("By the pixel AUROC of these images, *PaDiM, random features* is ")


def packaged(**options):
    torch.manual_seed(0)
    return VarAutoEncoder(2, (1, 8, 8), 1, latent_size=3, channels=(3, 4), strides=(1, 2), **options).eval().double()


def images(size, dtype=torch.float32):
    return torch.rand(2, 1, size, size, generator=torch.Generator().manual_seed(1), dtype=dtype)


def slow(encode, module, x_BCYX):
    """The layer's output and ∂μ_i/∂A [I, B, C, H, W], one backward pass through the whole encoder for each latent."""
    outputs = []
    hook = module.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    mu_BI = encode(x_BCYX)[0]
    hook.remove()
    gradients = [torch.autograd.grad(mu_B.sum(), outputs[0], retain_graph=True)[0] for mu_B in mu_BI.T]
    return outputs[0].detach(), torch.stack(gradients)


def test_the_lines_of_the_chapter_make_the_papers_map(chapter):
    torch.manual_seed(0)
    vae, x_BCYX = chapter["VAE"](latents=5).eval(), images(28)
    map_BYX, highest_BK, map_BKYX = chapter["explain"](vae.encode, "features.2", x_BCYX)

    A_BCHW, gradient_IBCHW = slow(vae.encode, vae.features[2], x_BCYX)
    alpha_IBC11 = gradient_IBCHW.mean((3, 4), keepdim=True)
    small_BIHW = (alpha_IBC11 * A_BCHW).sum(2).relu().transpose(0, 1)
    map_BIYX = F.interpolate(small_BIHW, size=(28, 28), mode="bilinear")
    order_BI = small_BIHW.mean((2, 3)).argsort(dim=1, descending=True)
    torch.testing.assert_close(map_BYX, map_BIYX.mean(1))
    assert highest_BK.tolist() == order_BI[:, :3].tolist()
    torch.testing.assert_close(map_BKYX, torch.stack([map_BIYX[b, order_BI[b, :3]] for b in range(2)]))


@pytest.mark.parametrize("options", [{}, {"num_res_units": 2}, {"norm": "batch"}], ids=str)
def test_every_route_is_the_slow_loop_at_every_layer_of_a_vae_that_we_did_not_write(options):
    vae, x_BCYX = packaged(**options), images(8, torch.float64)
    encode, taken = vae.encode_forward, set()
    for name, module in vae.named_modules():
        if not name.startswith("encode."):
            continue
        _, gradient_IBCHW = slow(encode, module, x_BCYX)
        alpha_BIC = gradient_IBCHW.mean((3, 4)).transpose(0, 1)
        # Beside the size of the gradient and not that of α: at some layers α is zero, see the next test.
        rounding = 1e-12 * gradient_IBCHW.square().mean().sqrt().item()
        for route in ("auto", "loop", "batched"):
            found = attention(encode, name, x_BCYX, route=route)
            taken.add(found.route)
            assert (found.alpha_BIC - alpha_BIC).abs().max() <= rounding, (name, route)
    assert taken == {"loop", "batched", "pooled"}


def test_captum_agrees_on_a_block_of_a_vae_that_we_did_not_write():
    vae, x_BCYX = packaged(), images(8, torch.float64)
    captum = LayerGradCam(lambda x_BCYX: vae.encode_forward(x_BCYX)[0], vae.encode.encode_0)
    theirs_BIHW = torch.cat([captum.attribute(x_BCYX, target=i) for i in range(3)], dim=1).detach()
    ours_BIHW = attention(vae.encode_forward, "encode.encode_0", x_BCYX).linear_BIHW
    torch.testing.assert_close(ours_BIHW, theirs_BIHW)


def test_instance_normalisation_leaves_nothing_of_the_gradient_at_the_convolution_before_it(chapter):
    x_BCYX = images(8, torch.float64)
    kept = {
        (norm, layer): chapter["share_kept"](packaged(norm=norm).encode_forward, layer, x_BCYX).item()
        for norm in ("instance", "batch")
        for layer in ("encode.encode_1.conv", "encode.encode_1")
    }
    assert kept["instance", "encode.encode_1.conv"] < 1e-12
    assert all(0.05 < share <= 1 for case, share in kept.items() if case != ("instance", "encode.encode_1.conv"))


def test_the_share_kept_is_one_where_the_gradient_is_the_same_at_all_places(chapter):
    constant = nn.Sequential(nn.Conv2d(1, 3, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2))
    with torch.no_grad():
        constant[3].weight.fill_(1.0)
    assert chapter["share_kept"](constant, "0", images(8)).item() == pytest.approx(1, abs=1e-3)


def test_the_page_is_rendered_without_the_packages_that_its_run_needs():
    for source in CELLS:
        for statement in ast.parse(source).body:
            if isinstance(statement, ast.Import | ast.ImportFrom):
                assert not {"monai", "captum"} & set(ast.unparse(statement).replace(".", " ").split()), source
