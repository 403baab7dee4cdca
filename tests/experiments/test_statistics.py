"""The statistics against closed forms, against enumeration, and against rliable."""

from itertools import product

import numpy as np
import pytest
from scipy import stats

from tether.experiments.statistics import interval, iqm, probability_of_improvement, stratified_bootstrap

RNG = np.random.default_rng(7)
SCORES = RNG.normal(100.0, 15.0, size=(4, 10)) + np.array([[0.0], [50.0], [-30.0], [10.0]])  # (tasks, runs)
OTHER = RNG.normal(105.0, 15.0, size=(4, 8)) + np.array([[0.0], [50.0], [-30.0], [10.0]])


class TestIqm:
    def test_is_the_mean_of_the_middle_half(self) -> None:
        assert iqm([8, 1, 7, 2, 6, 3, 5, 4]) == 4.5
        assert iqm(range(10)) == stats.trim_mean(range(10), 0.25) == 4.5
        assert iqm([-1e9, 3, 4, 5, 1e9]) == 4.0  # floor(5 / 4) = 1 dropped at each end

    def test_is_the_mean_of_fewer_than_four(self) -> None:
        assert iqm([1, 2, 30]) == 11.0

    def test_along_an_axis(self) -> None:
        np.testing.assert_array_equal(iqm(SCORES, axis=1), [iqm(task) for task in SCORES])


class TestBootstrap:
    def test_two_runs_give_their_range(self) -> None:
        # The mean of a resample is a, (a + b) / 2 or b with probabilities 1/4, 1/2, 1/4.
        assert interval([10.0, 30.0], np.mean) == (10.0, 30.0)

    def test_equals_the_enumeration_of_all_resamples(self) -> None:
        scores = np.array([1.0, 2.0, 4.0, 9.0, 20.0])
        every = [np.mean(resample) for resample in product(scores, repeat=5)]
        low, high = interval(scores, np.mean, resamples=200_000)
        for end, level in ((low, 0.025), (high, 0.975)):
            below, above = np.quantile(every, [level - 0.002, level + 0.002])
            assert below <= end <= above

    def test_approaches_the_normal_interval_for_many_runs(self) -> None:
        scores = np.random.default_rng(0).normal(5.0, 2.0, size=1000)
        reach = stats.norm.ppf(0.975) * scores.std() / np.sqrt(1000)
        low, high = interval(scores, np.mean, resamples=4000)
        np.testing.assert_allclose([low, high], [scores.mean() - reach, scores.mean() + reach], atol=0.12 * reach)

    def test_moves_and_stretches_with_the_scores(self) -> None:
        np.testing.assert_allclose(interval(3 * SCORES[0] - 7), 3 * np.array(interval(SCORES[0])) - 7)

    def test_confidence_widens_it(self) -> None:
        wide, narrow = (np.diff(interval(SCORES[0], confidence=level))[0] for level in (0.99, 0.5))
        assert wide > 2 * narrow

    def test_same_seed_same_interval(self) -> None:
        assert stratified_bootstrap(SCORES, seed=3) == stratified_bootstrap(SCORES, seed=3)
        assert stratified_bootstrap(SCORES, seed=3) != stratified_bootstrap(SCORES, seed=4)

    def test_resamples_within_tasks_only(self) -> None:
        # Without spread inside the tasks no resample differs, however far apart the tasks are.
        assert stratified_bootstrap({"easy": [100.0] * 3, "hard": [1.0] * 3}, np.mean) == (50.5, 50.5)

    def test_unequal_numbers_of_runs(self) -> None:
        low, high = stratified_bootstrap({"a": [1.0, 2.0], "b": [5.0, 6.0, 7.0, 8.0]}, np.mean)
        assert 1.0 < low < 29 / 6 < high < 8.0

    def test_curves_get_an_interval_at_each_point(self) -> None:
        curves = np.stack([np.linspace(0, top, 5) for top in (8.0, 10.0, 12.0)])
        low, high = interval(curves)
        assert low.shape == high.shape == (5,)
        assert (low[0], high[0]) == (0.0, 0.0)
        assert (low[1:] < curves.mean(axis=0)[1:]).all()
        assert (curves.mean(axis=0)[1:] < high[1:]).all()

    def test_one_run_has_no_interval(self) -> None:
        assert np.isnan(interval([3.0])).all()
        assert np.isnan(stratified_bootstrap({"a": [1.0, 2.0], "b": [3.0]})).all()
        assert np.isnan(interval(np.ones((1, 4)))).all()


class TestProbabilityOfImprovement:
    def test_counts_pairs_and_half_of_the_ties(self) -> None:
        assert probability_of_improvement([[1, 2, 3]], [[2, 2]]).value == 0.5
        assert probability_of_improvement([[5, 6]], [[1, 2, 3]]) == (1.0, 1.0, 1.0)
        assert probability_of_improvement([[2, 4]], [[1, 3]]).value == 0.75

    def test_is_the_mann_whitney_statistic(self) -> None:
        expected = stats.mannwhitneyu(SCORES[0], OTHER[0]).statistic / (10 * 8)
        assert probability_of_improvement(SCORES[:1], OTHER[:1]).value == pytest.approx(expected, abs=1e-12)

    def test_over_oneself_is_a_half(self) -> None:
        assert probability_of_improvement(SCORES, SCORES).value == 0.5

    def test_tasks_weigh_the_same(self) -> None:
        x, y = {"a": [2.0] * 9, "b": [0.0, 0.0]}, {"a": [1.0, 1.0], "b": [1.0, 1.0]}
        assert probability_of_improvement(x, y) == (0.5, 0.5, 0.5)

    def test_the_two_directions_add_up_to_one(self) -> None:
        forth, back = probability_of_improvement(SCORES, OTHER), probability_of_improvement(OTHER, SCORES)
        assert forth.value + back.value == pytest.approx(1.0, abs=1e-12)
        assert forth.low + back.high == pytest.approx(1.0, abs=0.02)

    def test_compares_the_tasks_that_both_have(self) -> None:
        x, y = {"a": [1.0, 2.0], "b": [9.0, 9.0]}, {"a": [3.0, 4.0], "c": [0.0, 0.0]}
        assert probability_of_improvement(x, y) == (0.0, 0.0, 0.0)

    def test_one_run_has_no_interval(self) -> None:
        value, low, high = probability_of_improvement([[1.0]], [[0.0, 2.0]])
        assert value == 0.5
        assert np.isnan([low, high]).all()


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ([], "no scores"),
        ({"Ant-v4": []}, "'Ant-v4' has no run"),
        ([1.0, 2.0], r"write \[scores\]"),
        ({"Ant-v4": [1.0, np.nan]}, "'Ant-v4' has a score that is not finite"),
    ],
)
def test_bad_scores_are_refused_in_words(scores: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stratified_bootstrap(scores)  # type: ignore[arg-type]


def test_comparing_nothing_is_refused_in_words() -> None:
    with pytest.raises(ValueError, match="share no task"):
        probability_of_improvement({"a": [1.0]}, {"b": [1.0]})
    with pytest.raises(ValueError, match="2 tasks and Y has 1"):
        probability_of_improvement([[1.0], [2.0]], [[1.0]])


class TestAgainstRliable:
    """rliable's arrays are (runs, tasks), and its resampling draws from numpy's global generator."""

    def test_iqm(self) -> None:
        metrics = pytest.importorskip("rliable.metrics")
        assert iqm(SCORES) == pytest.approx(metrics.aggregate_iqm(SCORES.T), abs=1e-12)

    def test_interval(self) -> None:
        library, metrics = pytest.importorskip("rliable.library"), pytest.importorskip("rliable.metrics")
        np.random.seed(0)  # noqa: NPY002
        _, theirs = library.get_interval_estimates(
            {"x": SCORES.T}, lambda scores: np.array([metrics.aggregate_iqm(scores)]), reps=1500
        )
        ours = np.array(stratified_bootstrap(SCORES))
        # A 2.5 % quantile of R draws has a standard error of 2.67 sigma / sqrt(R); the width is 3.9 sigma.
        error = 2.67 / 3.92 * np.hypot(1 / np.sqrt(1500), 1 / np.sqrt(10_000)) * np.diff(ours)[0]
        np.testing.assert_allclose(ours, theirs["x"][:, 0], atol=4 * error)

    def test_probability_of_improvement(self) -> None:
        library, metrics = pytest.importorskip("rliable.library"), pytest.importorskip("rliable.metrics")
        ours = probability_of_improvement(SCORES, OTHER)
        assert ours.value == pytest.approx(metrics.probability_of_improvement(SCORES.T, OTHER.T), abs=1e-12)
        np.random.seed(0)  # noqa: NPY002
        _, theirs = library.get_interval_estimates(
            {"x": [SCORES.T, OTHER.T]}, lambda x, y: np.array([metrics.probability_of_improvement(x, y)]), reps=300
        )
        error = 2.67 / 3.92 / np.sqrt(300) * (ours.high - ours.low)
        np.testing.assert_allclose(ours[1:], theirs["x"][:, 0], atol=4 * error)
