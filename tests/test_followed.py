"""Whoever reads the layer's output, and whichever way, is part of the map; what cannot be followed is refused."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import distributed, nn
from torch.autograd.graph import get_gradient_edge
from torch.utils.checkpoint import checkpoint

from expvae import attention

ROUTES = ("auto", "loop", "batched")
X = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    """Its latents read the layer's output through the ReLU, and once more where it was kept, if it was."""

    def __init__(self, layer=None, inplace=False):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.layer = layer or nn.Conv2d(4, 4, 3, padding=1)
        self.relu, self.conv = nn.ReLU(inplace), nn.Conv2d(4, 4, 3, padding=1)
        self.head, self.second = nn.Linear(256, 5), nn.Linear(256, 5)
        self.kept = None

    def bottom(self, x):
        return self.layer(self.stem(x).sigmoid())

    def top(self, A):
        mu = self.head(self.conv(self.relu(A)).relu().flatten(1))
        return mu if self.kept is None else mu + 9 * self.second(self.kept.flatten(1))

    def forward(self, x):
        return self.top(self.bottom(x))


class Keeping(nn.Conv2d):
    """A layer that keeps something of what it computes."""

    def __init__(self, what):
        super().__init__(4, 4, 3, padding=1)
        self.what, self.owner = what, []

    def forward(self, x):
        out = super().forward(x)
        self.owner[0].kept = self.what(out)
        return out


def slow_alpha(encode, layer, x_BCYX):
    """In plain passes, one image and one latent at a time.

    The slope along the bias of a convolution is the sum of the slopes along its output, by whichever way that is read.
    Of another layer it is the slope along the output as it was put out.
    """
    alphas = []
    for x_CYX in x_BCYX:
        puts_out = []

        def keep(_module, _inputs, output, puts_out=puts_out):
            puts_out[:] = [get_gradient_edge(output), output.shape[2:].numel()]

        handle = layer.register_forward_hook(keep)
        mu_D = encode(x_CYX.unsqueeze(0))[0]
        handle.remove()
        for mu in mu_D:
            if isinstance(layer, nn.Conv2d):
                (slope_C,) = torch.autograd.grad(mu, layer.bias, retain_graph=True)
                alphas.append(slope_C[:4] / puts_out[1])
            else:
                (slope_BCHW,) = torch.autograd.grad(mu, puts_out[0], retain_graph=True)
                alphas.append(slope_BCHW[0].mean((1, 2)))
    return torch.stack(alphas).reshape(len(x_BCYX), len(mu_D), -1)


def require_followed(encode, layer, x_BCYX=X, routes=ROUTES, expected=None):
    expected = slow_alpha(encode, layer, x_BCYX) if expected is None else expected
    hooks = dict(layer._forward_hooks)
    for route in routes:
        alpha_BIC = attention(encode, layer, x_BCYX, route=route).alpha_BIC
        torch.testing.assert_close(alpha_BIC, expected, rtol=1e-4, atol=1e-6 * float(expected.abs().max()))
    assert dict(layer._forward_hooks) == hooks


def kept_by_hook(kept, inplace=False):
    net = Net(inplace=inplace)
    net.layer.register_forward_hook(lambda _module, _inputs, output: setattr(net, "kept", kept(output)))
    return net


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(
    "kept", [lambda A: A, lambda A: A.flatten(1), lambda A: A.clone(), torch.sigmoid], ids=["A", "view", "copy", "use"]
)
def test_what_a_hook_keeps_is_followed(kept, frozen, inplace):
    net = kept_by_hook(kept, inplace)
    expected = slow_alpha(net, net.layer, X)
    net.requires_grad_(not frozen)
    plain = attention(Net(), "layer", X).alpha_BIC
    assert (plain - expected).abs().max() > 0.5 * expected.abs().max()  # what is kept counts
    hooks = dict(net.layer._forward_hooks)
    for route in ROUTES:
        result = attention(net, "layer", X, route=route)
        torch.testing.assert_close(result.alpha_BIC, expected, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(result.latents_BD, net(X).detach())
    assert dict(net.layer._forward_hooks) == hooks


@pytest.mark.parametrize("what", [lambda A: A, torch.sigmoid], ids=["A", "use"])
def test_what_the_layer_keeps_is_followed(what):
    layer = Keeping(what)
    net = Net(layer)
    layer.owner.append(net)
    require_followed(net, layer)


@pytest.mark.parametrize("inplace", [False, True])
def test_a_child_whose_output_is_read_is_followed(inplace):
    net = Net(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(inplace)))
    net.layer[1].register_forward_hook(lambda _module, _inputs, output: setattr(net, "kept", output))
    require_followed(net, net.layer)


def test_what_a_parent_keeps_is_followed():
    net = Net(inplace=True)

    def encode(x):
        net.kept = net.bottom(x)
        return net.top(net.kept)

    require_followed(encode, net.layer)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("graph", ["constant_alpha", "second_order"])
@pytest.mark.parametrize("frozen", [False, True])
def test_values_in_the_graph_come_before_the_latents(graph, inplace, frozen):
    net = Net(inplace=inplace).requires_grad_(not frozen)
    result = attention(net, "layer", X, graph=graph)
    (slope_BCHW,) = torch.autograd.grad(result.latents_BD[:, 1].sum(), result.values_BCHW)
    torch.testing.assert_close(slope_BCHW.mean((2, 3)), result.alpha_BIC[:, 1])
    net = kept_by_hook(lambda A: A, inplace)
    if inplace:  # the values would not be those that the latents come from
        with pytest.raises(ValueError, match="its output shares memory with a tensor that is read or changed in place"):
            attention(net, "layer", X, graph=graph)
    else:
        torch.testing.assert_close(attention(net, "layer", X, graph=graph).alpha_BIC, slow_alpha(net, net.layer, X))


def test_one_of_several_outputs_of_an_operation():
    """Those who use another one do not use the layer's."""
    net = Net()

    class Half(nn.Conv2d):
        def forward(self, x):
            first, net.kept = super().forward(x).split(4, 1)
            return first

    net.layer = Half(4, 8, 3, padding=1)
    require_followed(net, net.layer)
    net.kept = None


def test_frozen_parameters_and_images_that_are_cut_off():
    """Nothing below the layer's output asks for a gradient."""
    net = kept_by_hook(lambda A: A)

    def encode(x):
        return net(x.detach())

    expected = slow_alpha(encode, net.layer, X)
    net.requires_grad_(False)
    puts_out = []
    net.layer.register_forward_hook(lambda _module, _inputs, output: puts_out.append(output))
    result = attention(encode, net.layer, X)
    torch.testing.assert_close(result.alpha_BIC, expected, rtol=1e-4, atol=1e-6)
    assert not puts_out[0].requires_grad  # it is left as it was put out


class Grid(nn.Module):
    def forward(self, x):
        return x.unflatten(1, (4, 8, 8))


@pytest.mark.parametrize("changed", ["nothing", "what was put out", "beside a reader", "the base"])
def test_a_view_with_changes_in_place(changed):
    torch.manual_seed(0)
    low, grid, head, relu = nn.Linear(64, 256), Grid(), nn.Linear(256, 5), nn.ReLU(inplace=True)

    def encode(x):
        below = low(x.flatten(1))
        A = grid(below)
        if changed != "nothing":
            relu(below if changed == "the base" else A)
        return head(A.flatten(1).sin()) + (0 if changed == "what was put out" else head(below))

    if changed in ("beside a reader", "the base"):
        with pytest.raises(ValueError, match="its output shares memory with a tensor"):
            attention(encode, grid, X)
        return
    grid.register_forward_hook(lambda _module, _inputs, output: output.clone())
    expected = slow_alpha(encode, grid, X)
    grid._forward_hooks.clear()
    require_followed(encode, grid, expected=expected)


# --- contexts ---------------------------------------------------------------------------------------------------------


def test_images_that_the_encoder_changes_in_place_are_left_alone():
    net, x_BCYX = Net().requires_grad_(False), X.clone()
    attention(lambda x: net(x.mul_(2)), net.layer, x_BCYX)
    assert torch.equal(x_BCYX, X)
    assert not x_BCYX.requires_grad


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
def test_anomaly_detection():
    net = kept_by_hook(lambda A: A)
    expected = slow_alpha(net, net.layer, X)
    for encoder in (net, Net()):
        wanted = expected if encoder is net else slow_alpha(encoder, encoder.layer, X)
        with torch.autograd.set_detect_anomaly(True):
            torch.testing.assert_close(attention(encoder, "layer", X).alpha_BIC, wanted, rtol=1e-4, atol=1e-6)
            with pytest.raises(ValueError, match="route='batched' cannot run under"):
                attention(encoder, "layer", X, route="batched")
        assert attention(encoder, "layer", X, route="batched").route == "batched"


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_contexts_without_gradients(context):
    net = kept_by_hook(lambda A: A)
    expected = slow_alpha(net, net.layer, X)
    with context():
        result = attention(net, "layer", X.clone())
    torch.testing.assert_close(result.alpha_BIC, expected, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match=r"does not record gradients, as under torch.no_grad, torch.inference_mode"):
        attention(context()(net.forward), net.layer, X)


@pytest.mark.parametrize("where", ["around", "above", "at the layer", "below"])
def test_checkpoints(where):
    net = kept_by_hook(lambda A: A)
    expected = slow_alpha(net, net.layer, X)

    def encode(x, use_reentrant):
        def through(run, values):
            return checkpoint(run, values, use_reentrant=use_reentrant)

        match where:
            case "around":
                return through(net, x)
            case "above":
                return through(net.top, net.bottom(x))
            case "at the layer":
                return net.top(through(net.layer, net.stem(x).sigmoid()))
            case "below":
                return net.top(net.layer(through(net.stem, x).sigmoid()))

    require_followed(lambda x: encode(x, False), net.layer, expected=expected)
    x_BCYX = X.clone().requires_grad_()  # without, a reentrant checkpoint warns
    if where == "below":
        require_followed(lambda x: encode(x, True), net.layer, x_BCYX, expected=expected)
        return
    error = (RuntimeError, "set use_reentrant=False") if where == "above" else (ValueError, "use_reentrant=True")
    with pytest.raises(error[0], match=error[1]):
        attention(lambda x: encode(x, True), net.layer, x_BCYX)
    assert len(net.layer._forward_hooks) == 1


def test_autocast():
    net = kept_by_hook(lambda A: A)
    expected = slow_alpha(net, net.layer, X)
    with torch.autocast("cpu", torch.bfloat16):
        alpha_BIC = attention(net, "layer", X).alpha_BIC
    torch.testing.assert_close(alpha_BIC, expected, rtol=0, atol=0.02 * float(expected.abs().max()))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.filterwarnings("ignore:Using `torch.compile:UserWarning")  # a hook on all modules finds training mode
def test_compiled_encoders_run_as_they_were_written(backend, first):
    net = kept_by_hook(lambda A: A)
    expected = slow_alpha(net, net.layer, X)
    compiled = torch.compile(net, backend=backend)
    if not first:
        compiled(X)
    alpha_BIC = attention(compiled, net.layer, X).alpha_BIC
    torch.testing.assert_close(alpha_BIC, expected, rtol=1e-4, atol=1e-6)
    # Nothing of the call is left in what is compiled afterwards, or before.
    for parameter in net.parameters():
        parameter.grad = None
    compiled(X).sum().backward()
    assert net.stem.weight.grad.abs().sum() > 0
    require_compiling()
    torch._dynamo.reset()


def require_compiling():
    counted = torch._dynamo.testing.CompileCounter()
    torch.compile(lambda x: x + 1, backend=counted)(X)
    assert counted.frame_count == 1


def test_threads_that_overlap_leave_compiling_as_it_was():
    """Whatever their order: the first in is the first out."""
    net = Net()
    torch.compile(net, backend="eager")(X)
    inside, left = threading.Barrier(2), threading.Event()

    def encode(x, first):
        inside.wait(60)
        if not first:
            assert left.wait(60)
        return net(x)

    def explain(first):
        attention(lambda x: encode(x, first), net.layer, X)
        if first:
            left.set()

    with ThreadPoolExecutor(2) as pool:
        for future in [pool.submit(explain, first) for first in (True, False)]:
            future.result()
    require_compiling()
    torch._dynamo.reset()


def test_wrappers_for_several_devices(tmp_path):
    net = kept_by_hook(lambda A: A)
    expected = slow_alpha(net, net.layer, X)
    require_followed(nn.DataParallel(net), net.layer, expected=expected)
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(net)
        require_followed(wrapped, net.layer, expected=expected)
        wrapped(X).sum().backward()  # it still trains
    finally:
        distributed.destroy_process_group()


def test_a_layer_reached_by_another_thread_is_refused():
    """As nn.DataParallel on several devices does with the copies that it makes."""
    net, made = Net(), []

    def encode(x):
        worker = threading.Thread(target=lambda: made.append(net(x)))
        worker.start()
        worker.join()
        return made[-1]

    with pytest.raises(ValueError, match=r"it must be once by the calling thread \(of nn.DataParallel"):
        attention(encode, net.layer, X)
