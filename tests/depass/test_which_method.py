"""The decision table and its figure, from values that are known."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from depass import DataError
from depass.evaluate import decide
from depass.evaluate.decide import Experiment, adds_up, choose, decision_table, draw, load
from depass.evaluate.methods import METHODS
from depass.evaluate.summary import Result, prompts_in_words, results, style

PROMPTS = 40


def spread(shift: float, count: int = PROMPTS, noise: float = 0.0) -> list[float | None]:
    """Values that differ between prompts far more than methods do; ``noise`` has the sign of the prompt's parity."""
    return [10.0 * i + shift + noise * (-1) ** i if i < count else None for i in range(PROMPTS)]


def measured(values: dict[str, list[float | None]], costs: dict[str, float], better: str = "lower") -> list[Result]:
    times = {name: [cost] for name, cost in costs.items()}
    return results("patch-top, area", better, values, "softmax", 0, [8] * PROMPTS, times)


COSTS = {"softmax": 5.0, "half": 2.0, "gradient_norm": 2.5, "leave_one_out": 30.0}


def test_the_best_is_chosen_within_the_budget() -> None:
    found = measured({name: spread(shift) for name, shift in zip(COSTS, (3.0, 4.0, 5.0, 1.0), strict=True)}, COSTS)
    for budget, name in ((1.9, None), (2.0, "half"), (5.0, "softmax"), (float("inf"), "leave_one_out")):
        choice = choose(found, budget, 0)
        assert (choice and choice.best.method) == name


def test_higher_is_better_turns_the_order() -> None:
    values = {name: spread(shift) for name, shift in zip(COSTS, (3.0, 4.0, 5.0, 1.0), strict=True)}
    choice = choose(measured(values, COSTS, "higher"), 10.0, 0)
    assert choice is not None
    assert choice.best.method == "gradient_norm"
    assert choice.fallback is not None
    assert choice.fallback.method == "half"
    assert choice.behind == (1.0, 1.0, 1.0)


def test_of_methods_that_are_level_the_cheapest_that_adds_up_is_chosen() -> None:
    """Softmax is best by 0.01 on the mean; prompt by prompt it loses as often as it wins."""
    values = {
        "softmax": spread(3.0, noise=1.0),
        "half": spread(3.01, noise=-1.0),
        "gradient_norm": spread(3.02, noise=-1.0),
        "leave_one_out": spread(3.5, noise=1.0),  # worse in every prompt
    }
    choice = choose(measured(values, COSTS), float("inf"), 0)
    assert choice is not None
    assert choice.best.method == "softmax"
    assert [result.method for result in choice.level] == ["half", "gradient_norm"]
    assert choice.chosen.method == "half"
    assert choice.fallback is None


@pytest.mark.parametrize(("behind", "is_level"), [(0.5, True), (1.5, False)])
def test_a_difference_below_a_hundredth_of_what_there_is_to_gain_does_not_matter(behind: float, is_level: bool) -> None:
    """Random scores are worse than the best by 100 in every prompt, half by a constant."""
    values = {"softmax": spread(1.0), "half": spread(1.0 + behind), "random": spread(101.0)}
    found = measured(values, {**COSTS, "random": 1.0})
    assert decide.level_with_best(found, 0) == {"softmax": True, "half": is_level, "random": False}
    without_random = found[:2]
    assert decide.level_with_best(without_random, 0) == {"softmax": True, "half": False}


def test_a_method_with_fewer_prompts_is_compared_on_those_alone() -> None:
    """The first prompts have low values: a mean over them alone is lower than every other."""
    values = {"softmax": spread(0.0), "leave_one_out": spread(1.0, count=10)}
    choice = choose(measured(values, COSTS), float("inf"), 0)
    assert choice is not None
    assert choice.best.method == "softmax"
    values["leave_one_out"] = spread(-1.0, count=10)
    choice = choose(measured(values, COSTS), float("inf"), 0)
    assert choice is not None
    assert choice.best.method == "leave_one_out"
    assert choice.behind == (1.0, 1.0, 1.0)


def test_a_method_without_a_cost_fits_no_budget() -> None:
    found = measured({"softmax": spread(3.0), "half": spread(1.0)}, {"softmax": 5.0})
    for budget, name in ((10.0, "softmax"), (float("inf"), "half")):
        choice = choose(found, budget, 0)
        assert choice is not None
        assert choice.best.method == name


@pytest.mark.parametrize(
    ("method", "adds"),
    [("softmax", True), ("half", True), ("steer", True), ("steered", True), ("softmax+half", True), ("dual_path", False),
     ("softmax+dual_path", False), ("gim", False), ("random", False), ("integrated_gradients_20", False)],
)  # fmt: skip
def test_which_methods_add_up(method: str, adds: bool) -> None:
    assert adds_up(method) == adds


# Files.


def saved(folder: Path, lines: list[Any]) -> Path:
    folder.mkdir()
    settings = {"model": "small", "data": "sets/known_1000.json", "seed": 3}
    (folder / "results.json").write_text(json.dumps({"task": "tokens", "settings": settings, "results": lines}))
    return folder


def test_results_are_read_back_as_they_were(tmp_path: Path) -> None:
    found = measured({"softmax": spread(3.0), "half": spread(1.0, count=7)}, {"softmax": 5.0})
    experiment = load(saved(tmp_path / "run", [asdict(result) for result in found]))
    assert experiment == Experiment("small", "known_1000", "tokens", 3, tuple(found))


def test_a_mixture_with_two_names_is_one_method(tmp_path: Path) -> None:
    values = {name: spread(1.0) for name in ("1*softmax+2*steer", "half", "steered", "attribution_patching")}
    found = results("patch-top, area", "lower", values, "half", 0, [8] * PROMPTS)
    assert [result.method for result in load(saved(tmp_path / "run", [asdict(each) for each in found])).results] == [
        "1*softmax+2*steer", "half", "attribution_patching",
    ]  # fmt: skip


def test_a_directory_without_results_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no results of an evaluation"):
        load(tmp_path)
    with pytest.raises(DataError, match="has no results of an evaluation"):
        load(saved(tmp_path / "old", [{"measure": "patch-top"}]))


def test_the_table_and_the_figure_show_every_experiment(tmp_path: Path) -> None:
    values = {name: spread(shift) for name, shift in zip(COSTS, (3.0, 4.0, 5.0, 1.0), strict=True)} | {
        "random": spread(9.0)
    }
    experiments = [
        Experiment(model, "known_1000", "tokens", 0, tuple(measured(values, COSTS))) for model in ("one", "two")
    ]
    lines = decision_table(experiments).splitlines()
    assert len(lines) == 2 + len(experiments)
    assert "Which tokens does the answer depend on?" in lines[2]
    assert "known_1000: 40, 8 tokens" in lines[2]
    assert "| **half** 199 at 2.0× |" in lines[2]
    assert "**leave_one_out** 196 at 30×; adds up: **softmax** 198 at 5.0×, worse by 2 [2, 2]" in lines[3]
    assert draw(experiments, tmp_path / "which.png") == "![which](which.png)"
    assert (tmp_path / "which.png").read_bytes().startswith(b"\x89PNG")


def test_measures_that_no_panel_shows_make_no_figure(tmp_path: Path) -> None:
    values = {"softmax": spread(3.0), "half": spread(1.0)}
    other = results("another measure", "lower", values, "softmax", 0, [8] * PROMPTS)
    assert draw([Experiment("one", "facts", "tokens", 0, tuple(other))], tmp_path / "which.png") == ""
    assert not (tmp_path / "which.png").exists()
    assert decide.question("another measure") == "another measure"


@pytest.mark.parametrize("models", [["one"], ["one", "two", "three"]])
def test_the_figure_has_room_for_the_names_of_all_methods(models: list[str], tmp_path: Path) -> None:
    """Nothing reaches the figure's left and right edge, where it would be cut off."""
    image = pytest.importorskip("matplotlib.image")
    values = {name: spread(float(i)) for i, name in enumerate(METHODS)}
    found = measured(values, {name: 1.0 + i for i, name in enumerate(METHODS)})
    draw([Experiment(model, "facts", "tokens", 0, tuple(found)) for model in models], tmp_path / "which.png")
    pixels = image.imread(tmp_path / "which.png")[..., :3]
    assert pixels[:, [0, 1, -2, -1]].min() == 1.0  # white
    assert pixels.min() < 0.5


def test_standings_count_where_a_method_is_level_with_the_best() -> None:
    """Softmax is the best of two experiments, half of one; leave_one_out is worse in every prompt of all three."""
    shifts = {"softmax": (1.0, 1.0, 3.0), "half": (2.0, 2.0, 1.0), "leave_one_out": (3.0, 3.0, 4.0)}
    experiments = [
        Experiment("one", "facts", "tokens", 0, tuple(measured({n: spread(of[i]) for n, of in shifts.items()}, COSTS)))
        for i in range(3)
    ]
    lines = decide.standings(experiments).splitlines()[2:]
    assert lines == [
        "| `softmax` | yes | 5.0× | 2 of 3 |",
        "| `half` | yes | 2.0× | 1 of 3 |",
        "| `leave_one_out` |  | 30× | 0 of 3 |",
    ]


def test_a_measure_of_few_prompts_decides_nothing() -> None:
    many, few = measured({"softmax": spread(3.0, 5)}, COSTS), measured({"softmax": spread(3.0, 4)}, COSTS)
    assert list(Experiment("one", "facts", "tokens", 0, tuple(many)).measures()) == ["patch-top, area"]
    assert not Experiment("one", "facts", "tokens", 0, tuple(few)).measures()


def test_standings_hold_only_the_questions_that_were_asked() -> None:
    values = {"softmax": spread(3.0), "half": spread(1.0)}
    other = results("another measure", "lower", values, "softmax", 0, [8] * PROMPTS)
    both = [*measured(values, COSTS), *other]
    head, _, first, second = decide.standings([Experiment("one", "facts", "tokens", 0, tuple(both))]).splitlines()
    assert head == "| method | adds up | plain passes | Which tokens does the answer depend on? | another measure |"
    assert first.startswith("| `half` | yes | 2.0× | 1 of 1 | 1 of 1 |")
    assert second.startswith("| `softmax` | yes | 5.0× | 0 of 1 | 0 of 1 |")


def test_no_two_methods_of_a_figure_look_alike() -> None:
    assert len({tuple(style(index).items()) for index in range(40)}) == 40


def test_a_method_with_too_few_prompts_wins_nothing() -> None:
    """Measured on one prompt, a bootstrap has no width."""
    values = {"softmax": spread(3.0), "leave_one_out": spread(1.0, count=4), "half": spread(5.0)}
    experiment = Experiment("one", "facts", "tokens", 0, tuple(measured(values, COSTS)))
    (kept,) = experiment.measures().values()
    assert [result.method for result in kept] == ["softmax", "half"]
    assert "**softmax** 198" in decision_table([experiment])


def test_prompts_are_counted_in_words() -> None:
    assert prompts_in_words([200]) == "1 prompt of 200 tokens"
    assert prompts_in_words([193, 200, 195]) == "3 prompts of 193 to 200 tokens"
    assert prompts_in_words([12, 12], "chains") == "2 prompts of chains, 12 tokens"
