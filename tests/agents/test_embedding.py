"""The regularised feature: golden numbers, its bounds, and gradients of the whole chain."""

import math

import numpy as np
import pytest
import torch as th
from gymnasium import spaces

from tether.agents.common.embedding import Embedding
from tether.agents.common.hyperbolic import HyperboloidRegression, hyperboloid_exp

U = th.tensor([[1.0, 2.0, 3.0, 4.0]], dtype=th.float64)


def block(d, **kwargs):
    """An embedding in float64 that is nothing but the feature block: trunk and last layer are identities."""
    embedding = Embedding(spaces.Box(-np.inf, np.inf, (d,)), d, trunk_kwargs={"widths": ()}, **kwargs).double()
    with th.no_grad():
        embedding.last.weight.copy_(th.eye(d))
        embedding.last.bias.zero_()
    return embedding


def half_open(embedding):
    """The same with a gate that is always 1/2."""
    with th.no_grad():
        embedding.gate.weight.zero_()
        embedding.gate.bias.zero_()
    return embedding


def test_golden_feature():
    embedding = half_open(block(4))
    x = embedding(U)
    q = x / (0.5 * embedding.radius)
    assert q[0].tolist() == pytest.approx([0.174870, 0.311623, 0.399428, 0.448884], abs=1e-6)
    assert q.norm().item() == pytest.approx(0.699091, abs=1e-6)
    assert x[0].tolist() == pytest.approx([0.160162, 0.285413, 0.365833, 0.411128], abs=1e-6)
    assert x.norm().item() == pytest.approx(0.640291, abs=1e-6)
    point = hyperboloid_exp(x)[0].tolist()
    assert point == pytest.approx([1.212086, 0.171332, 0.305319, 0.391347, 0.439802], abs=1e-6)
    assert embedding.radius == pytest.approx(1.8317808, abs=1e-7)


@pytest.mark.parametrize(("r", "score"), [(0.0, 0.06166995), (0.2, -0.30110339)])
def test_golden_score_of_the_whole_chain(r, score):
    layer = HyperboloidRegression(4, 1).double()
    with th.no_grad():
        layer.weight.copy_(th.tensor([[1.0, -1.0, 0.5, 0.0]]))
        layer.bias.fill_(r)
    assert layer(half_open(block(4))(U)).item() == pytest.approx(score, abs=5e-8)


def test_relu_of_a_positive_vector_has_length_one():
    embedding = half_open(block(4, activation="relu"))
    assert (embedding(U) / (0.5 * embedding.radius)).norm().item() == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize(("activation", "largest_q", "largest_x", "largest_x0"), [
    ("tanh", math.tanh(1.0), 1.3951, 2.1416), ("relu", 1.0, 1.8318, 3.2026),
])  # fmt: skip
@pytest.mark.parametrize("d", [2, 32, 512])
def test_the_norm_is_bounded_whatever_comes(activation, largest_q, largest_x, largest_x0, d):
    embedding = block(d, activation=activation)
    generator = th.Generator().manual_seed(0)
    for scale in (1e-3, 1e-2, 1.0, 1e2, 1e3):
        for u in (scale * th.randn(500, d, dtype=th.float64, generator=generator), scale * th.ones(1, d, dtype=th.float64)):
            x, gate = embedding.embed(u)
            q = x / (gate * embedding.radius)
            assert q.norm(dim=1).max() <= largest_q + 1e-6
            assert x.norm(dim=1).max() <= min(largest_x, embedding.bound)
            assert hyperboloid_exp(x)[:, 0].max() <= largest_x0
    with th.no_grad():
        embedding.gate.bias.fill_(100.0)  # a gate that is wide open
    assert embedding(1e3 * th.ones(1, d, dtype=th.float64)).norm() <= embedding.bound
    assert embedding.float()(1e3 * th.ones(1, d)).norm() <= embedding.bound


def test_scale_of_the_last_layer_does_not_matter():
    embedding = block(8)
    u = th.randn(50, 8, dtype=th.float64, generator=th.Generator().manual_seed(0))
    assert th.allclose(embedding(u), embedding(5.0 * u), atol=1e-6)
    tiny = 1e-3 * th.ones(1, 8, dtype=th.float64)  # where epsilon counts: |y| shrinks by 1 / sqrt(1 + 0.119)
    y = th.nn.functional.rms_norm(tiny, (8,), eps=1.1920929e-07)
    assert y[0, 0].item() == pytest.approx(1.0 / math.sqrt(1.1192), abs=1e-4)


def test_gradients_are_those_of_finite_differences_and_orthogonal_to_the_scale():
    embedding, layer = block(5), HyperboloidRegression(5, 3).double()
    u = th.randn(4, 5, dtype=th.float64, generator=th.Generator().manual_seed(0)).requires_grad_()
    th.autograd.gradcheck(lambda u: layer(embedding(u)), (u,), rtol=1e-6, atol=1e-9)
    (gradient,) = th.autograd.grad(layer(embedding(u)).sum(), u)
    assert ((gradient * u).sum(1).abs() < 1e-6 * gradient.norm(dim=1)).all()


@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_dead_rows_have_finite_gradients(activation):
    embedding, layer = block(6, activation=activation), HyperboloidRegression(6, 3).double()
    u = th.vstack([th.zeros(1, 6), -th.ones(1, 6), th.randn(1, 6)]).double().requires_grad_()
    layer(embedding(u)).square().sum().backward()
    assert u.grad.isfinite().all()


@pytest.mark.parametrize("scaling", ["constant", "none"])
def test_other_scalings(scaling):
    x, gate = block(4, scaling=scaling).embed(U)
    factor = 2.0 if scaling == "none" else 1.0
    assert x[0].tolist() == pytest.approx([factor * q for q in (0.174870, 0.311623, 0.399428, 0.448884)], abs=2e-6)
    assert gate is None
    assert x.norm() <= block(4, scaling=scaling).bound


def test_without_normalisation_there_is_no_bound():
    assert block(4, regularization="none").bound == math.inf
    assert block(4, regularization="none", scaling="none", activation="relu")(100.0 * U).norm() > 500


def test_spectral_norm_reaches_every_layer():
    th.manual_seed(0)
    pictures = spaces.Box(0, 255, (3, 64, 64), np.uint8)
    embedding = Embedding(pictures, 32, regularization="spectral_norm", scaling="learned", activation="relu")
    layers = [m for m in embedding.modules() if isinstance(m, (th.nn.Conv2d, th.nn.Linear))]
    assert len(layers) == 17  # 15 convolutions, the last layer, the gate
    assert all(hasattr(layer, "parametrizations") for layer in layers)
    for _ in range(30):
        embedding(th.zeros(1, 3, 64, 64))
    largest = th.linalg.matrix_norm(embedding.last.weight, 2).item()
    assert largest == pytest.approx(1.0, abs=0.05)


def test_parameters_of_the_trunks():
    pictures, frames = spaces.Box(0, 255, (3, 64, 64), np.uint8), spaces.Box(0, 255, (4, 84, 84), np.uint8)
    count = lambda module: sum(p.numel() for p in module.parameters())  # noqa: E731
    impala, nature = Embedding(pictures, 32), Embedding(frames, 512, trunk="nature", activation="relu")
    assert (count(impala.trunk), count(impala.last), count(impala.gate)) == (97_600, 65_568, 33)
    assert (count(nature.trunk), count(nature.last)) == (77_984, 1_606_144)


def test_images_are_centred_on_the_device():
    embedding = Embedding(spaces.Box(0, 255, (3, 16, 16), np.uint8), 8, trunk_kwargs={"channels": (4,)})
    image = th.randint(0, 256, (2, 3, 16, 16), dtype=th.uint8, generator=th.Generator().manual_seed(0))
    by_hand = embedding.trunk(image.float() / 255.0 - 0.5)
    assert th.allclose(embedding._features(image), by_hand, atol=1e-6)


@pytest.mark.parametrize(
    ("kwargs", "word"),
    [
        ({"regularization": "layer_norm"}, "regularization must be one of rms_norm"),
        ({"scaling": "fixed"}, "scaling must be one of"),
        ({"activation": "gelu"}, "activation must be one of"),
        ({"trunk": "resnet"}, "trunk must be one of"),
        ({"trunk": "impala"}, "takes images"),
        ({"alpha": 1.0}, "0 < alpha < 1"),
        ({"embedding_dim": 0}, "embedding_dim >= 1"),
    ],
)
def test_refuses_in_words(kwargs, word):
    with pytest.raises(ValueError, match=word):
        Embedding(spaces.Box(-1.0, 1.0, (3,)), **kwargs)
