"""The experiments run, and their pages say what was measured."""

import re
from functools import cache

import pytest

from scripts.experiments import (
    adaptation,
    batch_size,
    figure,
    histograms,
    population,
    robustness,
)
from scripts.experiments.figure import Spread, compared


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("experiments")


@cache
def quick(experiment, folder):
    """What the experiment measured and its page, which is complete."""
    results = experiment.main(["--quick", "--out", str(folder)])
    name = experiment.__name__.rpartition(".")[2]
    page = (folder / f"{name}.md").read_text()
    assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert f"({name}.md): " in (folder / "README.md").read_text()
    assert f"scripts.experiments.{name} --quick" in page
    assert " ± " in page
    assert not re.search(r"\b(nan|inf|None)\b", page)
    assert str(folder) not in page
    return results, page


def test_batch_norm_keeps_what_reaches_a_layer(folder):
    results, _ = quick(histograms, folder)
    for (_, _, norm), (_, runs) in results.items():
        for run in runs:
            last = run.width("start", histograms.DEPTH - 1)
            assert 0.9 < last < 1.1 if norm else last < 0.1
            assert set(run.inputs) == set(histograms.TIMES)


def test_sigmoids_train_with_batch_norm_alone(folder):
    results, _ = quick(robustness, folder)
    found = {"without": [], "before": []}
    for case, accuracies in results.items():
        if case.sigmoid and case.optimizer == "sgd":
            found[case.arm] += accuracies.values
    assert max(found["without"]) < 40 < 80 < max(found["before"])


def test_batch_norm_forgives_small_weights(folder):
    results, _ = quick(robustness, folder)
    small = {c.arm: results[c].mean for c in results if c.scale == 0.03}
    assert small["without"] < 20
    assert min(small["before"], small["after"]) > 80


def test_renorm_is_trained_beside_batch_norm(folder):
    results, page = quick(batch_size, folder)
    fair = [f for case, found in results.items() if case.classes is None for f in found]
    assert all(min(f.batch, f.renorm) > 40 for f in fair)
    assert any(f.batch != f.renorm for f in fair)
    one = [f for case, found in results.items() if case.classes == 1 for f in found]
    assert max(f.batch for f in one) < 60
    assert "| 32 | 1 |" in page


def test_batches_hold_the_classes_asked_for():
    data = batch_size.digits("train")
    case = batch_size.Case(16, 3, 160)
    for x, y in batch_size.Batches(data, case, 0, 5):
        assert len(x) == 16
        assert len(y.unique()) == 3


def test_adapting_brings_contrast_back(folder):
    results, page = quick(adaptation, folder)
    for found in results["contrast"]:
        assert found.after > found.before + 20
        for _, before, after in found.kl.values():
            assert after < before / 10
    assert "/" not in results  # names of shifts, not paths
    assert "contrast 0.4" in page


def test_exact_statistics_help_after_five_steps(folder):
    results, _ = quick(population, folder)
    short = next(found for case, found in results.items() if case.steps == 5)
    long = results[population.Case(steps=40)]
    for few, many in zip(short, long, strict=True):
        assert few.exact > few.moving + 10
        assert few.error > 2 * many.error


# --- the words ------------------------------------------------------------------------------------


def test_a_spread_reads_as_mean_and_deviation():
    assert f"{Spread.of([1, 2, 3]):.1f}" == "2.0 ± 1.0"
    assert f"{Spread.of([4]):.0f}" == "4 ± 0"


def test_the_measurement_chooses_the_words():
    low, high = Spread.of([90.0, 91.0, 92.0]), Spread.of([95.1, 96.0, 96.9])
    assert compared("a", high, "b", low) == "better with a than with b, by 5.0 ± 0.1 points"
    assert compared("a", low, "b", high) == "better with b than with a, by 5.0 ± 0.1 points"
    assert compared("a", low, "b", high, is_lower_better=True).startswith("better with a ")
    noisy = Spread.of([99.0, 90.0, 93.0])
    assert compared("a", noisy, "b", low).startswith("no difference beyond the spread")


def test_one_seed_shows_no_difference():
    assert not Spread.of([5.0]).differs_from_zero
    assert Spread.of([5.0, 5.1]).differs_from_zero
    assert not Spread.of([5.0, 8.0]).differs_from_zero


def test_a_large_figure_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(figure, "MAX_BYTES", 100)
    page = figure.Page("large", "Large", "What.", ["It is"], [], "Here.")
    drawn, _ = figure.canvas(1, 1)
    with pytest.raises(SystemExit, match="draw it smaller"):
        figure.write(figure.Run(True, tmp_path, (0, 1), None), page, drawn)


# --- what is checked in ---------------------------------------------------------------------------


def test_the_index_is_of_the_pages():
    pages = sorted(path.stem for path in figure.PAGES.glob("*.md") if path.name != "README.md")
    assert pages, "no page is checked in"
    assert (figure.PAGES / "README.md").read_text() == figure.index(figure.PAGES)
    for name in pages:
        text = (figure.PAGES / f"{name}.md").read_text()
        assert (figure.PAGES / f"{name}.png").stat().st_size <= figure.MAX_BYTES
        assert (figure.ROOT / "scripts" / "experiments" / f"{name}.py").exists()
        assert f"scripts.experiments.{name}" in text
        assert "--quick" not in text
        assert int(re.search(r"over (\d+) seeds", text)[1]) >= 3
