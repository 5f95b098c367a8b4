"""Training with known targets as the book plans it: constructions, methods, readings as columns of a study."""

import math

import numpy as np
import pandas as pd
import pytest
from prefdyn.book import calibrating, evidence, judging, params, profiles, studies
from prefdyn.findings import calibration
from prefdyn.lab import turning
from prefdyn.lab.runs import RunStore

SMALL = {
    "profile": "smoke", "seeds": [0], "pairs": 32, "check": 16, "demonstrations": 64, "validation": 4, "held_out": 4,
    "batch": 4, "sft_batch": 8, "sft_steps": 4, "epochs": 1.0, "checkpoints": 2, "width": 16, "probe": 8,
    "choice_probe": 8, "ppo_probe": 8, "iterations": 8, "rollouts": 8, "ppo_batch": 8, "method": "forward",
}  # fmt: skip


def test_parameters_name_the_constructions_that_there_are():
    assert tuple(calibrating.CONSTRUCTIONS) == profiles.CONSTRUCTED
    p = params.check(SMALL)
    assert p.construction in calibrating.CONSTRUCTIONS


def test_constructions_cover_what_stays_what_moves_and_what_has_no_target():
    truths = {name: calibration.truth(c) for name, c in calibrating.CONSTRUCTIONS.items()}
    assert [name for name, truth in truths.items() if truth == "stable"] == ["fixed"]
    assert [name for name, truth in truths.items() if truth == "none"] == ["random"]
    assert sum(truth == "moving" for truth in truths.values()) == 4
    assert "random" not in calibrating.constructions("imitation")
    assert list(calibrating.constructions("ppo")) == list(calibrating.CONSTRUCTIONS)


@pytest.mark.parametrize(
    ("method", "kind"),
    [
        ("imitation", turning.TurningImitationRun),
        ("dpo", turning.TurningPairRun),
        ("online_dpo", turning.TurningOnlineRun),
        ("ppo", turning.TurningPPORun),
    ],
)
def test_each_method_has_its_turning_run_and_a_measurement_that_says_what_is_turned(method, kind):
    p, store = params.check(SMALL), RunStore("nowhere")
    runs = {name: calibrating.run(p, 0, method, name) for name in calibrating.constructions(method)}
    assert all(type(run) is kind for run in runs.values())
    for measure in (calibrating.alignment, calibrating.targets):
        keys = {store.key(measure(p, 0, method, run)) for run in runs.values()}
        assert len(keys) == len(runs)


def test_a_construction_that_a_method_cannot_have_is_refused_by_name():
    p = params.check(SMALL)
    with pytest.raises(
        params.ParameterError, match=r"construction: given 'random' \(str\), which imitation cannot have"
    ):
        calibrating.run(p, 0, "imitation", "random")
    few = p.model_copy(update={"epochs": 0.5})
    with pytest.raises(params.ParameterError, match=r"construction: given 'fixed'.*phases=8: must be from 1 to .* 4"):
        calibrating.run(few, 0, "dpo", "fixed")


def test_readings_are_columns_of_a_study_with_their_thresholds():
    assert [rule.name for rule in calibrating.READINGS] == list(calibration.BY_NAME)
    for rule in calibrating.READINGS:
        assert rule.threshold == calibration.BY_NAME[rule.name].threshold and rule.predicted == "above"


def test_a_row_has_the_readings_of_its_construction_and_reaches_as_far_as_all_have_come(tmp_path):
    p = params.check(SMALL | {"calibrated": "dpo", "construction": "turned often"})
    store = RunStore(tmp_path)
    assert judging.apply_rules(store, p, calibrating.READINGS)[0].verdict == "not run"
    specs = evidence.TABLES["readings"].needs(p)
    store.ensure(specs.values(), workers=1)
    found = {f.rule.name: f.found for f in judging.apply_rules(store, p, calibrating.READINGS)}
    of = {
        name: calibration.tables_of(*(store.find(specs[(what, name), 0]) for what in ("run", "G", "targets")))
        for name in calibrating.CONSTRUCTIONS
    }
    limit = min(tables["checkpoints"].sort_values("step")["kl"].iloc[-1] for tables in of.values())
    common = calibration.at_common_steps({("dpo", 0, calibrating.CONSTRUCTIONS[name]): t for name, t in of.items()})
    own = common["dpo", 0, calibrating.CONSTRUCTIONS["turned often"]]
    assert len(own["checkpoints"]) < len(of["turned often"]["checkpoints"])
    expected = calibration.read(own, 4, limit)  # 8 replies of PPO's probe are 4 pairs
    for name in calibration.BY_NAME:
        if math.isnan(expected[name]):
            assert found[name] is None or math.isnan(found[name].mean)
        else:
            assert found[name].mean == pytest.approx(expected[name]) and found[name].n == 1


def test_the_calibration_covers_what_it_should():
    study = studies.read("calibration")
    cells = {(cell.labels["calibrated"], cell.labels["construction"], cell.seed) for cell in study.cells}
    both = {(m, c, s) for m in ("dpo", "ppo") for c in calibrating.CONSTRUCTIONS for s in range(5)}
    assert both <= cells and len(both) == 6 * 5 * 2
    p = study.cells[0].parameters
    reader = params.check({"profile": "reader"})
    assert (p.probe, p.ppo_probe) == (reader.probe, reader.ppo_probe)  # as the ledger's rules have it
    assert {rule.name for rule in study.rules} == set(calibration.BY_NAME)


def planted(value) -> pd.DataFrame:
    """Rows of a study in which every reading of a training is `value(construction, seed)`."""
    return pd.DataFrame(
        {"calibrated": method, "construction": name, "seed": seed}
        | dict.fromkeys(calibration.BY_NAME, value(name, seed))
        for method in ("dpo", "ppo")
        for name in calibrating.CONSTRUCTIONS
        for seed in range(5)
    )


def test_the_error_of_a_perfect_and_of_a_useless_instrument():
    perfect = calibrating.error(planted(lambda name, seed: float(name == "fixed")))
    assert "calls 1.00 [0.48, 1.00] of stable targets stable, and leaves 1.00 [0.48, 1.00] of those that" in perfect
    assert "from those that move 1.00 [1.00, 1.00], from none 1.00 [1.00, 1.00] (AUC" in perfect
    assert "as a reading of stability: *tells*" in perfect
    rng = np.random.default_rng(0)
    useless = calibrating.error(planted(lambda name, seed: rng.random()))
    assert "*tells*" not in useless
    contrary = calibrating.error(planted(lambda name, seed: float(name != "fixed")), "ppo")
    assert contrary.startswith("Where targets are known (PPO alone, n = 5 seeds)")
    assert "calls 0.00 [0.00, 0.52] of stable targets stable, and leaves 0.00 [0.00, 0.52]" in contrary
    assert "*does not tell*" in contrary


def test_what_has_not_been_calibrated_is_said():
    assert "has not been computed" in calibrating.error(planted(lambda name, seed: 1.0).iloc[:0])
    one_kind = planted(lambda name, seed: 1.0).query("construction == 'fixed'")
    assert len(calibrating.calibrated(one_kind)) == 0 and "has not been computed" in calibrating.error(one_kind)


def test_the_curve_of_a_reading_leaves_out_what_has_no_value():
    rows = planted(lambda name, seed: float(name == "fixed"))
    rows.loc[rows["seed"] == 3, "cosine"] = np.nan
    line = calibrating.curve(rows, "cosine")
    assert line["sensitivity"].tolist() == [0, 1, 1] and line["false_positives"].tolist() == [0, 0, 1]
