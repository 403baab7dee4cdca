"""Geometry and heads against the golden numbers of the specification, identities, and finite differences."""

import math

import geoopt
import pytest
import torch as th
from hypothesis import given, settings
from hypothesis import strategies as st

from tether.agents.common.hyperbolic import (
    BallPointRegression,
    HyperboloidRegression,
    PoincareRegression,
    conformal_factor,
    hyperboloid_distance,
    hyperboloid_exp,
    hyperboloid_log,
    lorentz_inner,
    mobius_add,
    poincare_exp,
    sinh_ratio,
    smooth_clamp,
    tanh_ratio,
    to_ball,
)
from tether.agents.common.riemannian_adam import RiemannianAdam

V = th.tensor([[0.3, -0.4]], dtype=th.float64)
CURVATURES = (0.25, 1.0, 2.0)


def vectors(n, d, scale=1.0, seed=0):
    return scale * th.randn(n, d, dtype=th.float64, generator=th.Generator().manual_seed(seed))


def head(cls, z, r, c=1.0):
    """A head in float64 with given normals and offsets (or points)."""
    made = cls(len(z[0]), len(z), c).double()
    with th.no_grad():
        made.weight.copy_(th.tensor(z, dtype=th.float64))
        made.bias.copy_(th.tensor(r, dtype=th.float64).reshape(made.bias.shape))
    return made


def close(value, expected, atol=5e-9):
    assert th.allclose(th.as_tensor(value, dtype=th.float64), th.tensor(expected, dtype=th.float64), rtol=0.0, atol=atol), (
        value
    )


class TestMaps:
    @pytest.mark.parametrize(
        ("c", "point"),
        [
            (1.0, (1.12762597, 0.31265718, -0.41687624)),
            (0.25, (2.0628262, 0.30313478, -0.40417971)),
            (2.0, (0.89137304, 0.32563249, -0.43417666)),
        ],
    )
    def test_golden_points(self, c, point):
        x = hyperboloid_exp(V, c)
        close(x[0], point, 2e-8)
        close(lorentz_inner(x, x), [-1.0 / c], 1e-12)

    def test_golden_point_in_the_ball(self):
        p = to_ball(hyperboloid_exp(V))
        close(p[0], (0.1469512, -0.19593493), 1e-8)
        close(p[0], poincare_exp(V / 2)[0].tolist(), 1e-12)  # the isometry halves the distance to the origin

    @pytest.mark.parametrize("c", CURVATURES)
    def test_points_lie_on_the_hyperboloid_at_the_vectors_length(self, c):
        v = vectors(200, 8, 0.7)
        x = hyperboloid_exp(v, c)
        origin = hyperboloid_exp(th.zeros_like(v), c)
        assert th.allclose(lorentz_inner(x, x), th.full((200,), -1.0 / c, dtype=th.float64), atol=1e-9)
        assert (x[:, 0] >= 1.0 / math.sqrt(c)).all()
        assert th.allclose(hyperboloid_distance(origin, x, c), v.norm(dim=1), atol=1e-9)

    @pytest.mark.parametrize("c", CURVATURES)
    def test_log_inverts_exp(self, c):
        v = vectors(200, 6)
        v = v / v.norm(dim=1, keepdim=True) * th.logspace(-8, math.log10(5.0), 200, dtype=th.float64).unsqueeze(1)
        assert th.allclose(hyperboloid_log(hyperboloid_exp(v, c), c), v, rtol=0.0, atol=1e-10)

    def test_distance_is_a_metric(self):
        x, y, z = (hyperboloid_exp(vectors(100, 5, seed=s)) for s in range(3))
        d = hyperboloid_distance
        assert th.allclose(d(x, y), d(y, x))
        assert (d(x, x) <= 1e-5).all()
        assert (d(x, z) <= d(x, y) + d(y, z) + 1e-5).all()

    @pytest.mark.parametrize("c", CURVATURES)
    def test_the_origin_is_exact_and_its_gradient_the_identity(self, c):
        zero = th.zeros(3, dtype=th.float64, requires_grad=True)
        x = hyperboloid_exp(zero, c)
        assert x[0].item() == pytest.approx(math.sqrt(1.0 / c), rel=4e-16)  # a square root's last bit hangs on the machine
        assert x[1:].tolist() == [0.0, 0.0, 0.0]
        jacobian = th.autograd.functional.jacobian(lambda v: hyperboloid_exp(v, c), zero)
        assert th.equal(jacobian, th.vstack([th.zeros(1, 3), th.eye(3)]).double())
        assert th.equal(th.autograd.functional.jacobian(lambda v: poincare_exp(v, c), zero), th.eye(3).double())

    @pytest.mark.parametrize(("ratio", "exact"), [(sinh_ratio, math.sinh), (tanh_ratio, math.tanh)])
    def test_series_and_closed_form_meet(self, ratio, exact):
        s = th.tensor([1e-12, 1e-6, 9.999e-4, 1.0001e-3, 0.1, 4.0], dtype=th.float64)
        expected = [exact(math.sqrt(x)) / math.sqrt(x) for x in s.tolist()]
        assert th.allclose(ratio(s), th.tensor(expected, dtype=th.float64), rtol=1e-15, atol=0.0)

    def test_mobius_addition(self):
        x, y = poincare_exp(vectors(50, 4)), poincare_exp(vectors(50, 4, seed=1))
        zero = th.zeros_like(x)
        assert th.allclose(mobius_add(zero, y), y)
        assert th.allclose(mobius_add(-x, x), zero, atol=1e-12)
        assert th.allclose(mobius_add(-x, mobius_add(x, y)), y, atol=1e-9)  # left cancellation

    def test_geoopt_agrees(self):
        ball = geoopt.PoincareBall(c=1.0)
        v, w = vectors(50, 4), vectors(50, 4, seed=1)
        x, y = poincare_exp(v), poincare_exp(w)
        assert th.allclose(x, ball.expmap0(v), atol=1e-12)
        assert th.allclose(mobius_add(x, y), ball.mobius_add(x, y), atol=1e-12)
        assert th.allclose(conformal_factor(x), ball.lambda_x(x, keepdim=True))


class TestHyperboloidHead:
    @pytest.mark.parametrize(
        ("c", "r", "score"),
        [
            (1.0, 0.0, -0.51649037), (0.25, 0.0, -0.50415610), (2.0, 0.0, -0.53259206), (1e-6, 0.0, -0.50000002),
            (1.0, 0.1, -0.76146533), (0.25, 0.1, -0.73329309), (2.0, 0.1, -0.79681621), (1e-6, 0.1, -0.72360684),
        ],
    )  # fmt: skip
    def test_golden_scores(self, c, r, score):
        close(head(HyperboloidRegression, [[1.0, 2.0]], [r], c)(V), [[score]])

    def test_becomes_the_affine_score_as_the_curvature_vanishes(self):
        z, r = th.tensor([1.0, 2.0], dtype=th.float64), 0.1
        limit = (z * V).sum().item() - r * z.norm().item()
        close(head(HyperboloidRegression, [[1.0, 2.0]], [r], 1e-10)(V), [[limit]], 1e-7)
        close(limit, -0.72360680, 1e-8)

    def test_scores_grow_with_the_normal(self):
        v, z = vectors(20, 3), vectors(4, 3, seed=1)
        r = [0.1, -0.3, 0.5, 0.0]
        one, three = (head(HyperboloidRegression, (k * z).tolist(), r)(v) for k in (1.0, 3.0))
        assert th.allclose(three, 3.0 * one, rtol=1e-12)

    def test_is_zero_on_the_hyperplane_and_changes_sign_across(self):
        z, r = th.tensor([3.0, 4.0], dtype=th.float64), 0.3
        at = z / z.norm() * r  # the nearest point: there tanh(r) = <z/|z|, xs> / x0
        layer = head(HyperboloidRegression, [z.tolist()], [r])
        assert layer(at[None]).abs().item() < 1e-15
        assert layer(0.99 * at[None]).item() < 0.0 < layer(1.01 * at[None]).item()

    def test_is_odd_without_offset(self):
        v = vectors(20, 3)
        layer = head(HyperboloidRegression, vectors(5, 3, seed=1).tolist(), [0.0] * 5)
        assert th.equal(layer(v), -layer(-v))

    @pytest.mark.parametrize("c", CURVATURES)
    def test_is_linear_in_the_distance_along_the_normal(self, c):
        z, r = th.tensor([0.6, 0.8], dtype=th.float64), 0.2
        n = th.linspace(0.0, r + 4.2 / math.sqrt(c), 50, dtype=th.float64)
        scores = head(HyperboloidRegression, [(2.0 * z).tolist()], [r], c)(n[:, None] * z).squeeze(1)
        assert th.allclose(scores, 2.0 * (n - r), rtol=0.0, atol=1e-9)
        assert (scores.diff() > 0).all()

    @pytest.mark.parametrize("c", CURVATURES)
    def test_outputs_and_gradients_stay_bounded_whatever_comes(self, c):
        z = vectors(6, 4, seed=1)
        layer = head(HyperboloidRegression, z.tolist(), [0.0, 0.1, -0.1, 1.0, -2.0, 0.5], c)
        for scale in (1e-12, 1e-3, 1.0, 10.0, 100.0, 1000.0, 1e6):
            v = vectors(20, 4, scale).requires_grad_()
            scores = layer(v)
            assert (scores.abs() <= 4.2972 * z.norm(dim=1) / math.sqrt(c)).all()
            layer.zero_grad()
            scores.sum().backward()
            assert v.grad.isfinite().all()
            assert all(p.grad.isfinite().all() for p in layer.parameters())

    @pytest.mark.parametrize("cls", [HyperboloidRegression, PoincareRegression, BallPointRegression])
    @pytest.mark.parametrize("dtype", [th.float32, th.float64])
    def test_every_head_survives_every_norm(self, cls, dtype):
        layer = cls(4, 3)
        for exponent in range(-20, 31, 2):
            v = (10.0**exponent * vectors(10, 4)).to(dtype).requires_grad_()
            scores = layer(v)
            scores.sum().backward()
            assert scores.isfinite().all()
            assert v.grad.isfinite().all()

    def test_zero_normal_and_zero_point_have_finite_gradients(self):
        layer = head(HyperboloidRegression, [[0.0, 0.0]], [0.0])
        v = th.zeros(1, 2, dtype=th.float64, requires_grad=True)
        layer(v).sum().backward()
        assert v.grad.isfinite().all()
        assert all(p.grad.isfinite().all() for p in layer.parameters())

    def test_computes_in_float64_with_float32_parameters(self):
        layer = HyperboloidRegression(2, 1)
        assert [tuple(p.shape) for p in layer.parameters()] == [(1, 2), (1, 1)]
        assert {p.dtype for p in layer.parameters()} == {th.float32}
        with th.no_grad():
            layer.weight.copy_(th.tensor([[1.0, 2.0]]))
            layer.bias.fill_(0.1)
        close(layer(V), [[-0.76146533]], 3e-8)
        assert layer(V.float()).dtype == th.float32

    def test_initial_normals(self):
        th.manual_seed(0)
        layer = HyperboloidRegression(64, 500)
        assert layer.weight.std().item() == pytest.approx(1.0 / 8.0, rel=0.02)
        assert not layer.bias.any()


class TestPoincareHeads:
    @pytest.mark.parametrize(("r", "score"), [(0.0, -2.25378219), (0.1, -3.43813207)])
    def test_golden_scores(self, r, score):
        close(head(PoincareRegression, [[1.0, 2.0]], [r])(V), [[score]])

    def test_flat_limit_is_four_times_the_affine_score(self):
        close(head(PoincareRegression, [[1.0, 2.0]], [0.1], 1e-10)(V), [[-2.89442719]], 1e-7)

    @pytest.mark.parametrize("c", CURVATURES)
    def test_is_twice_the_hyperboloid_head_at_twice_the_vector(self, c):
        v, z, r = vectors(30, 3, 0.5), vectors(4, 3, seed=1).tolist(), [0.0, 0.1, -0.2, 0.4]
        ball = head(PoincareRegression, z, r, c)(v)
        sheet = head(HyperboloidRegression, z, [2.0 * x for x in r], c)(2.0 * v)
        assert th.allclose(ball, 2.0 * sheet, rtol=1e-9, atol=1e-10)

    def test_golden_score_of_ball_points(self):
        close(head(BallPointRegression, [[1.0, 2.0]], [0.1, 0.05])(V), [[-1.63975713]])

    def test_points_at_the_origin_give_half_the_other_heads_score(self):
        v, z = vectors(30, 3, 0.5), vectors(4, 3, seed=1).tolist()
        at_origin = head(BallPointRegression, z, [[0.0] * 3] * 4)(v)
        assert th.allclose(at_origin, head(PoincareRegression, z, [0.0] * 4)(v) / 2.0, rtol=1e-12)


def test_smooth_clamp():
    for dtype, limit in ((th.float64, 36.7368), (th.float32, 16.6355)):
        inside = th.linspace(-limit + 1e-3, limit - 1e-3, 101, dtype=dtype)
        assert th.equal(smooth_clamp(inside), inside)
        above = th.tensor([limit + 1e-3, limit + 1.0, 1e6, 1e30], dtype=dtype)
        assert (smooth_clamp(above) <= limit + 1e-4).all()
        assert th.equal(smooth_clamp(-above), -smooth_clamp(above))
    just = th.tensor(math.log(2.0 / th.finfo(th.float64).eps) + 1e-9, dtype=th.float64)
    assert (smooth_clamp(just) - just).item() == pytest.approx(-math.log(2.0) / 50.0, abs=1e-6)


@pytest.mark.parametrize("cls", [HyperboloidRegression, PoincareRegression])
@given(scale=st.floats(0.01, 0.25), c=st.sampled_from(CURVATURES), seed=st.integers(0, 1000))
@settings(max_examples=15, deadline=None)
def test_gradients_are_those_of_finite_differences(cls, scale, c, seed):
    v = vectors(3, 4, scale, seed).requires_grad_()
    layer = head(cls, vectors(5, 4, seed=seed + 1).tolist(), [0.0, 0.1, -0.3, 0.5, 0.2], c)
    z, r = (p.detach().double().requires_grad_() for p in (layer.weight, layer.bias))
    th.autograd.gradcheck(
        lambda *x: th.func.functional_call(layer, {"weight": x[1], "bias": x[2]}, (x[0],)), (v, z, r), rtol=1e-6, atol=1e-8
    )


class TestRiemannianAdam:
    def layer(self):
        return head(BallPointRegression, [[1.0, 2.0], [0.5, -1.0]], [[0.1, 0.05], [-0.3, 0.4]])

    def test_first_step_by_the_formulas(self):
        layer = self.layer()
        optimizer = RiemannianAdam(layer.parameters(), lr=0.01, eps=1e-5)
        layer(V).square().sum().backward()
        p, gradient = layer.bias.detach().clone(), layer.bias.grad.clone()
        z, z_gradient = layer.weight.detach().clone(), layer.weight.grad.clone()
        optimizer.step()
        riemannian = gradient / conformal_factor(p).square()
        size = conformal_factor(p) * riemannian.norm(dim=-1, keepdim=True)  # sqrt of <r, r>_p; the corrections cancel
        assert th.allclose(layer.bias.detach(), p - 0.01 * riemannian / (size + 1e-5), atol=1e-12)
        assert th.allclose(layer.weight.detach(), z - 0.01 * z_gradient / (z_gradient.abs() + 1e-5), atol=1e-12)
        assert th.equal(layer.bias.grad, gradient)

    @pytest.mark.parametrize("c", CURVATURES)
    def test_geoopts_is_the_same_over_many_steps(self, c):
        ours, theirs = (
            head(BallPointRegression, vectors(3, 4).tolist(), (0.2 * vectors(3, 4, seed=1)).tolist(), c) for _ in "ab"
        )
        ball = geoopt.PoincareBall(c=c)
        point = geoopt.ManifoldParameter(theirs.bias.detach().clone(), manifold=ball)
        theirs.bias = point
        first = RiemannianAdam(ours.parameters(), lr=0.02, eps=1e-5, curvature=c)
        second = geoopt.optim.RiemannianAdam(theirs.parameters(), lr=0.02, eps=1e-5)
        for step in range(50):
            v = vectors(8, 4, 0.5, seed=step)
            for layer, optimizer in ((ours, first), (theirs, second)):
                optimizer.zero_grad()
                (layer(v) - v[:, :3]).square().mean().backward()
                optimizer.step()
        assert th.allclose(ours.bias, theirs.bias, rtol=0.0, atol=1e-9)
        assert th.allclose(ours.weight, theirs.weight, rtol=0.0, atol=1e-9)
        assert (ours.bias - 0.2 * vectors(3, 4, seed=1)).abs().max() > 0.05, "the points moved"

    def test_points_stay_in_the_ball(self):
        layer = self.layer().float()
        optimizer = RiemannianAdam(layer.parameters(), lr=5.0)
        for _ in range(5):
            layer(V.float()).sum().backward()
            optimizer.step()
        assert layer.bias.isfinite().all()
        assert (layer.bias.norm(dim=1) <= 1.0 - 4e-6).all()

    def test_goes_on_from_its_state(self):
        layers = [self.layer() for _ in range(2)]
        optimizers = [RiemannianAdam(layer.parameters(), lr=0.01) for layer in layers]

        def step(which):
            layers[which].zero_grad()
            layers[which](V).square().sum().backward()
            optimizers[which].step()

        for _ in range(6):
            step(0)
        for _ in range(3):
            step(1)
        state = optimizers[1].state_dict()
        optimizers[1] = RiemannianAdam(layers[1].parameters(), lr=0.5)
        optimizers[1].load_state_dict(state)
        for _ in range(3):
            step(1)
        assert all(th.equal(a, b) for a, b in zip(*(layer.parameters() for layer in layers), strict=True))
