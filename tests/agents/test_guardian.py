"""The guardians of OGSRL: golden numbers, rates, invariances, exactness of the fast sums, files."""

from __future__ import annotations

import numpy as np
import pytest
import torch as th

from tether.agents.common.guardian import KernelGuardian, scott
from tether.agents.common.min_max import MinMax
from tether.agents.common.nearest_model import NearestModel
from tether.agents.common.neighbours import NearestNeighbour
from tether.agents.common.sublevel_set import SublevelSet, samples_needed


def cloud(count: int, dimensions: int, seed: int = 0) -> th.Tensor:
    """Two thick lines, so that much of the cube is empty."""
    generator = th.Generator().manual_seed(seed)
    along = th.rand(count, 1, generator=generator) * 2.0 - 1.0
    side = th.where(th.arange(count)[:, None] % 2 == 0, 1.0, -1.0)
    noise = 0.15 * th.randn(count, dimensions, generator=generator)
    return (along * side.where(th.arange(dimensions) % 2 == 0, th.ones(())) + noise).float()


def naive_density(guardian: KernelGuardian, points: th.Tensor) -> np.ndarray:
    """f in float64, one difference at a time."""
    x, y = guardian.scale.scaled(points).double().numpy(), guardian.references.double().numpy()
    squares = ((x[:, None] - y[None]) ** 2).sum(2)
    return np.exp(-squares / (2 * guardian.bandwidth**2)).mean(1) / (guardian.bandwidth * np.sqrt(2 * np.pi))


# ---------------------------------------------------------------------- the kernel density


def test_golden_numbers_of_one_point():
    guardian = KernelGuardian(th.zeros(1, 1), MinMax(th.zeros(1), th.ones(1)), 0.535)
    density = guardian.density(th.tensor([[0.0], [0.535]]))
    assert density.numpy() == pytest.approx([0.745687, 0.452282], abs=5e-7)


def test_the_papers_bandwidth_is_scotts():
    assert scott(148_159, 15) == pytest.approx(0.53439, abs=5e-6)


@pytest.mark.parametrize(("count", "dimensions", "bandwidth"), [(700, 15, 0.535), (3000, 3, None), (500, 2, 0.02)])
def test_densities_are_the_naive_sums(count, dimensions, bandwidth):
    """To 1e-5 of themselves, far outside the data too, where float32 would give 0."""
    points = cloud(count, dimensions)
    guardian = KernelGuardian.fit(points, 0.05, bandwidth)
    queries = th.cat([points[:100], points[:100] + 0.3, 3.0 * cloud(50, dimensions, 1)])
    expected = naive_density(guardian, queries)
    seen = expected > 1e-290
    assert guardian.density(queries).numpy()[seen] == pytest.approx(expected[seen], rel=1e-5)


def test_early_stopping_gives_the_labels_of_the_whole_sum():
    points = cloud(6000, 6)
    guardian = KernelGuardian.fit(points, 0.1)
    queries = th.cat([points, points + 0.2 * th.randn(6000, 6, generator=th.Generator().manual_seed(1))])
    expected = naive_density(guardian, queries) < guardian.threshold
    assert 0.1 < expected.mean() < 0.9
    assert np.array_equal(guardian.outside(queries).numpy(), expected)


@pytest.mark.skipif(not th.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_same_densities_and_labels():
    points, queries = cloud(5000, 15), cloud(2000, 15, 1)
    here, there = KernelGuardian.fit(points), KernelGuardian.fit(points.cuda())
    expected = naive_density(here, queries)
    assert there.density(queries.cuda()).cpu().numpy() == pytest.approx(expected, rel=1e-5)
    sure = np.abs(expected / here.threshold - 1.0) > 1e-4
    assert np.array_equal(there.outside(queries.cuda()).cpu().numpy()[sure], here.outside(queries).numpy()[sure])


@pytest.mark.parametrize("bandwidth", [0.05, 0.2])
def test_labels_of_small_bandwidths(bandwidth):
    """Isolated points have a sum of about 1, which then is the threshold: float32 cannot tell them apart."""
    points = 2.0 * th.rand(800, 6, generator=th.Generator().manual_seed(0)) - 1.0
    guardian = KernelGuardian.fit(points, 0.05, bandwidth)
    expected = naive_density(guardian, points) < guardian.threshold * (1.0 - 1e-9)
    assert np.array_equal(guardian.outside(points).numpy(), expected)


def test_on_the_threshold_is_inside():
    """With 21 points and alpha 0.05 the quantile is the second smallest density itself."""
    points = cloud(21, 2)
    guardian = KernelGuardian.fit(points, 0.05)
    assert int(guardian.outside(points).sum()) == 1
    assert float((guardian.density(points) - guardian.threshold).abs().min()) < 1e-7


@pytest.mark.parametrize("alpha", [0.01, 0.05, 0.2])
def test_rates(alpha):
    points, fresh = cloud(4000, 15), cloud(4000, 15, 1)
    guardian = KernelGuardian.fit(points, alpha, 0.535)
    assert float(guardian.outside(points).float().mean()) == pytest.approx(alpha, abs=1 / 4000)
    held_out = float(guardian.outside(fresh).float().mean())
    assert held_out == pytest.approx(alpha, abs=3 * np.sqrt(alpha * (1 - alpha) / 4000) + 0.005)


def test_far_points_are_flagged_and_dense_ones_are_not():
    points = cloud(4000, 15)
    guardian = KernelGuardian.fit(points, 0.05, 0.535)
    low, high = points.amin(0), points.amax(0)
    cube = low + (high - low) * th.rand(2000, 15, generator=th.Generator().manual_seed(2))
    assert float(guardian.outside(cube).float().mean()) >= 0.95
    assert not bool(guardian.outside(points[guardian.density(points).argmax()][None]))


def test_invariances():
    points, queries = cloud(1000, 4), cloud(400, 4, 1)
    guardian = KernelGuardian.fit(points)
    labels = guardian.outside(queries)
    assert th.equal(KernelGuardian.fit(points.flip(0)).outside(queries), labels)
    factor, shift = th.tensor([2.0, 0.25, 8.0, 1.0]), th.tensor([1.0, 0.0, -2.0, 4.0])
    assert th.equal(KernelGuardian.fit(points * factor + shift).outside(queries * factor + shift), labels)
    thresholds = [KernelGuardian.fit(points, alpha).threshold for alpha in (0.01, 0.05, 0.2)]
    assert thresholds == sorted(thresholds)
    spreads = [KernelGuardian.fit(points, 0.05, sigma).density(queries).log().std() for sigma in (0.2, 0.4, 0.8)]
    assert spreads == sorted(spreads, reverse=True)


def test_labels_do_not_depend_on_the_normaliser():
    """The density of 4 dimensions differs by a constant factor, and ranks alone decide."""
    points, queries = cloud(1000, 4), cloud(400, 4, 1)
    guardian = KernelGuardian.fit(points)
    factor = (guardian.bandwidth * np.sqrt(2 * np.pi)) ** -3
    threshold = np.percentile(naive_density(guardian, points) * factor, 5.0)
    assert np.array_equal(naive_density(guardian, queries) * factor < threshold, guardian.outside(queries).numpy())


def test_files(tmp_path):
    points, queries = cloud(1000, 4), cloud(400, 4, 1)
    guardian = KernelGuardian.fit(points)
    guardian.save(tmp_path / "guardian.npz")
    loaded = KernelGuardian.load(tmp_path / "guardian.npz")
    assert th.equal(loaded.outside(queries), guardian.outside(queries))
    assert th.equal(loaded.density(queries), guardian.density(queries))


@pytest.mark.parametrize("arguments", [{"alpha": 0.0}, {"alpha": 1.0}, {"bandwidth": 0.0}])
def test_bad_arguments(arguments):
    with pytest.raises(ValueError, match=r"alpha lies in \(0, 1\) and bandwidth is above 0"):
        KernelGuardian.fit(cloud(10, 2), **arguments)


def test_scaler():
    points = th.tensor([[0.0, 5.0], [4.0, 5.0]])
    scale = MinMax.of(points)
    assert scale.scaled(points).tolist() == [[-1.0, -1.0], [1.0, -1.0]]
    assert scale.scaled(th.tensor([[8.0, 6.0]])).tolist() == [[3.0, 1.0]]
    assert th.equal(scale.raw(scale.scaled(points)), points)


# ---------------------------------------------------------------------- the polynomial sublevel set


def test_an_interval_of_one_dimension_covers_what_it_must():
    points = th.randn(2000, 1, generator=th.Generator().manual_seed(0))
    for degree in (1, 2):
        guardian = SublevelSet.fit(points, 0.05, degree)
        assert int(guardian.outside(points).sum()) <= 100
        inside = points[~guardian.outside(points)]
        assert not bool(guardian.outside(th.linspace(float(inside.min()), float(inside.max()), 500)[:, None]).any())


def test_without_outliers_it_is_the_smallest_ellipse():
    """Of the square's corners: the circle through them, q = |x|^2 / 2, whose lifted ellipsoid has weights 1/4."""
    corners = th.tensor([[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]]).repeat(2, 1)
    guardian = SublevelSet.fit(corners, 0.0, 1)
    edge = th.tensor([[np.sqrt(2.0), 0.0], [0.0, -np.sqrt(2.0)], [1.0, 1.0]], dtype=th.float32)
    assert guardian.value(edge).numpy() == pytest.approx([1.0, 1.0, 1.0], abs=1e-4)
    assert guardian.outside(1.01 * edge).all()
    assert not guardian.outside(0.99 * edge).any()


def test_outliers_are_left_out():
    points = th.cat([cloud(950, 2), 5.0 + cloud(50, 2)])
    guardian = SublevelSet.fit(points, 0.05, 2)
    assert guardian.outside(points[950:]).all()
    assert float(guardian.outside(cloud(1000, 2, 1)).float().mean()) < 0.02


def test_sample_size_is_the_appendixs_and_not_the_papers_12():
    assert samples_needed(0.05, 0.01) == 14_979


def test_too_few_points_for_the_degree():
    with pytest.raises(ValueError, match="10 points to cover are too few for 15 monomials: lower the degree"):
        SublevelSet.fit(cloud(10, 2), 0.0, 4)


# ---------------------------------------------------------------------- the world of recorded transitions


def test_every_recorded_pair_answers_for_itself():
    pairs = cloud(2000, 15)
    assert th.equal(NearestModel(pairs).rows(pairs), th.arange(2000))


def test_swapped_actions_change_the_answer():
    pairs = cloud(2000, 15)
    swapped = th.cat([pairs[:, :13], pairs[:, [14]], pairs[:, [13]]], 1)
    assert int((NearestModel(pairs).rows(swapped) != th.arange(2000)).sum()) > 500


def test_no_queries():
    assert NearestNeighbour(cloud(300, 3))(th.zeros(0, 3)).shape == (0,)
    assert KernelGuardian.fit(cloud(300, 3)).outside(th.zeros(0, 3)).shape == (0,)


def test_density_dynamics_draw_by_their_weights():
    pairs = th.tensor([[0.0], [1.0], [3.0]])
    th.manual_seed(0)
    rows = NearestModel(pairs, 1.0).rows(th.full((20_000, 1), 0.5))
    weights = np.exp(-0.5 * (0.5 - pairs.numpy()[:, 0]) ** 2)
    found = np.bincount(rows.numpy(), minlength=3) / 20_000
    assert found == pytest.approx(weights / weights.sum(), abs=0.015)
    assert th.equal(NearestModel(pairs, 1e-3).rows(th.tensor([[0.4], [90.0]])), th.tensor([0, 2]))
