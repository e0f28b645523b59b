"""Against scikit-learn, torchmetrics and netcal where they have the measure; by hand and in simulation where not."""

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from medr1.cli import app
from medr1.data.records import LETTERS, write_jsonl
from medr1.errors import MedR1Error
from medr1.evaluation.calibration import (
    _chance_ece,
    _ece,
    _in_order,
    abstains,
    answered,
    applied,
    assess,
    calibrate,
    calibrating,
    choose_threshold,
    fit_temperature,
    measure,
    read_calibration,
    tempered,
    with_confidence,
    write_calibration,
)
from medr1.evaluation.intervals import interval
from medr1.evaluation.metrics import MIN_N, Row

OPTIONS = ["Cyst", "Tumour", "Scar"]


def row(probs: list[float], gold: str = "A", *, id: str = "r", group: str | None = None, letter: str = "") -> Row:
    """A row that chose its most probable option, or `letter`."""
    letter = letter or LETTERS[int(np.argmax(probs))]
    made = {
        "id": id,
        "group": group or id,
        "options": OPTIONS[: len(probs)],
        "option_probs": probs,
        "gold": gold,
        "letter": letter,
        "correct": letter == gold,
        "model": "m",
        "condition": "image",
        "mode": "no-think",
        "outcome": "letter",
        "scoring": "options",
        **dict.fromkeys(("modality", "question_type", "finish", "tokens")),
        **{"source": "s", "question": "Which?", "format_ok": True},
        **{"images": [], "chance": 1 / len(probs), "reply": f"<answer>{letter}</answer>"},
    }
    return with_confidence(made)


def sure(confidence: float, correct: bool, id: str = "r", group: str | None = None) -> Row:
    """A two-option row of this confidence."""
    return row([confidence, 1 - confidence], "A" if correct else "B", id=id, group=group, letter="A")


def drawn(num: int, *, temperature: float, seed: int = 0, group_size: int = 1) -> list[Row]:
    """Rows whose right option is drawn from their option_probs at this temperature, which is thus the true one."""
    rng = np.random.default_rng(seed)
    probs_NO = rng.dirichlet([0.6, 0.6, 0.6], size=num)
    rows = []
    for at, probs in enumerate(probs_NO.tolist()):
        truth = tempered(probs, temperature)
        gold = LETTERS[int(rng.choice(3, p=np.array(truth) / sum(truth)))]
        rows.append(row(probs, gold, id=f"r{at}", group=f"g{at // group_size}"))
    return rows


def arrays(rows: list[Row]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([r["confidence"] for r in rows]), np.array([r["correct"] for r in rows])


def test_brier_and_nll_are_scikit_learns() -> None:
    from sklearn.metrics import brier_score_loss, log_loss

    rows = drawn(200, temperature=2.0)
    confidence, correct = arrays(rows)
    found = measure(rows)
    assert found["brier"]["value"] == pytest.approx(brier_score_loss(correct, confidence))
    probs = [r["option_probs"] for r in rows]
    assert found["nll"]["value"] == pytest.approx(log_loss([r["gold"] for r in rows], probs, labels=["A", "B", "C"]))


def test_ece_is_netcals() -> None:
    from netcal.metrics import ECE

    rows = drawn(300, temperature=2.0)
    confidence, correct = arrays(rows)
    expected = ECE(bins=15, equal_intervals=False).measure(confidence, correct)
    assert measure(rows)["ece"]["value"] == pytest.approx(expected, abs=1e-9)


def test_ece_is_torchmetrics_where_bins_of_equal_size_are_of_equal_width() -> None:
    import torch
    from torchmetrics.functional.classification import binary_calibration_error

    rng = np.random.default_rng(0)
    confidence = (np.arange(150) + 0.5) / 150
    rows = [sure(c, bool(rng.random() < c**2), id=f"r{at}") for at, c in enumerate(confidence.tolist())]
    correct = torch.tensor([r["correct"] for r in rows]).long()
    expected = binary_calibration_error(torch.tensor(confidence), correct, n_bins=15, norm="l1")
    assert measure(rows)["ece"]["value"] == pytest.approx(expected.item(), abs=1e-6)


def test_bins_are_scikit_learns_calibration_curve() -> None:
    from sklearn.calibration import calibration_curve

    rows = drawn(300, temperature=2.0)
    confidence, correct = arrays(rows)
    accuracy, mean = calibration_curve(correct, confidence, n_bins=15, strategy="quantile")
    bins = measure(rows)["bins"]
    assert [b["accuracy"] for b in bins] == pytest.approx(accuracy.tolist())
    assert [b["confidence"] for b in bins] == pytest.approx(mean.tolist())
    assert {b["n"] for b in bins} == {20}


def test_temperature_is_netcals() -> None:
    from netcal.scaling import TemperatureScaling

    rows = drawn(400, temperature=2.5)
    scaling = TemperatureScaling(detection=False)
    scaling.fit(np.array([r["option_probs"] for r in rows]), np.array(["ABC".index(r["gold"]) for r in rows]))
    assert fit_temperature(rows) == pytest.approx(1 / float(scaling.temperature[0]), rel=1e-3)


def test_temperature_is_found_again_and_scales() -> None:
    rows = drawn(20_000, temperature=2.5)
    fitted = fit_temperature(rows)
    assert fitted == pytest.approx(2.5, rel=0.05)
    sharper = [with_confidence({**r, "option_probs": tempered(r["option_probs"], 0.5)}) for r in rows]
    assert fit_temperature(sharper) == pytest.approx(2 * fitted, rel=1e-3)
    # Of a calibrated model only the floor is left.
    after = measure([with_confidence({**r, "temperature": fitted}) for r in rows])
    before = measure(rows)
    assert before["ece"]["ci95"][0] > 0.05 > 0.015 > after["ece"]["value"]
    assert after["ece"]["floor"] == pytest.approx(0.01, abs=0.005)
    assert after["brier"]["value"] < before["brier"]["value"]
    assert after["aurc"]["value"] == pytest.approx(before["aurc"]["value"], abs=0.02)


def test_where_all_are_right_the_temperature_stays() -> None:
    """The lowest one would fit best and make all confidences 1.0, of which no threshold answers a part."""
    rows = [sure(0.95 + at / 4000, True, id=f"r{at}") for at in range(80)]
    assert fit_temperature(rows) == 1.0
    found = calibrate(rows)
    assert (found.temperature, found.accuracy) == (1.0, 1.0) and 0.95 < found.threshold < 0.97
    assert fit_temperature([*rows, sure(0.99, False, id="w")]) != 1.0


def test_equal_texts_are_both_right() -> None:
    two_right = {**row([0.5, 0.3, 0.2], "A"), "options": ["Cyst", "cyst ", "Scar"]}
    assert measure([two_right])["nll"]["value"] == pytest.approx(-np.log(0.8))


def test_curves_by_hand() -> None:
    rows = [sure(c, right) for c, right in ((0.6, True), (0.9, True), (0.7, False), (0.8, True))]
    found = measure(rows)
    # Sorted 0.9 0.8 0.7 0.6: right, right, wrong, right; errors among the first k: 0, 0, 1/3, 1/4.
    assert found["aurc"]["value"] == pytest.approx((1 / 3 + 1 / 4) / 4)
    assert found["curve"] == [(0.25, 1), (0.5, 1), (0.75, pytest.approx(2 / 3)), (1, 3 / 4)]
    assert found["at_coverage"]["accuracy"] == 3 / 4  # 0.8 of four is more than three
    assert found["brier"]["value"] == pytest.approx((0.16 + 0.01 + 0.49 + 0.04) / 4)
    assert found["ece"]["value"] == pytest.approx((0.4 + 0.1 + 0.7 + 0.2) / 4)  # one row a bin


def test_ties_count_their_mean_whatever_the_order_of_the_rows() -> None:
    rows = [sure(0.8, at % 3 == 0, id=f"r{at}") for at in range(30)] + [sure(0.6, True, id=f"s{at}") for at in range(7)]
    found = measure(rows)
    assert measure(rows[::-1])["ece"] == found["ece"]
    assert measure(rows[::-1])["aurc"]["value"] == found["aurc"]["value"]
    assert found["curve"][0] == (1 / 37, pytest.approx(1 / 3))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_intervals_of_ece_and_aurc_cover_in_simulation(temperature: float) -> None:
    """The true values are those of very many rows; groups of three whose members differ in confidence."""
    truth = measure(drawn(20_000, temperature=temperature, seed=99))
    found = [measure(drawn(240, temperature=temperature, seed=seed, group_size=3)) for seed in range(40)]
    for name, least in (("ece", 0.75), ("aurc", 0.85)):  # 0.86 and 0.95, but for 40 draws
        covered = [low <= truth[name]["value"] <= high for low, high in (f[name]["ci95"] for f in found)]
        assert np.mean(covered) >= least, name
    assert np.mean([f["ece"]["value"] for f in found]) > truth["ece"]["value"], "biased upwards"


def test_a_calibrated_model_that_is_seldom_wrong_is_not_called_miscalibrated() -> None:
    """With hardly a wrong answer nothing is left for a wild bootstrap to turn: it called 33 of 100 such models so."""
    rng = np.random.default_rng(0)
    groups, found = [f"g{at // 2}" for at in range(240)], {0.0: 0, 0.12: 0}
    for off in found:
        for _ in range(100):
            confidence_N = rng.beta(20, 1, size=240)
            correct_N = (rng.random(240) < confidence_N - off).astype(float)
            ece = _ece(*_in_order(confidence_N, correct_N))
            found[off] += ece > _chance_ece(confidence_N, correct_N, groups, rng)
    assert found[0.0] <= 12 and found[0.12] >= 95
    always = measure([sure(0.9, True, id=f"r{at}") for at in range(30)])["ece"]
    assert always["value"] == pytest.approx(0.1) and always["ci95"] == [0.0, pytest.approx(0.1)]


def test_the_interval_of_ece_is_no_point_where_all_are_right() -> None:
    """240 right of 240 at a confidence of 0.5 may be 0.9877 right (0.9877^240 = 0.05): off by 0.4877."""
    low, high = measure([sure(0.5, True, id=f"r{at}") for at in range(240)])["ece"]["ci95"]
    assert low < 0.4877 and high == pytest.approx(0.5)


def test_the_interval_of_ece_holds_what_the_mean_gap_may_be() -> None:
    """Two of 240 wrong in one bin: 0.1 in 14 bins and 2 / 16 - 0.1 in one are 0.095, but accuracy is up to 0.999."""
    found = measure([sure(0.9 + at / 1e6, at > 1, id=f"r{at}") for at in range(240)])
    assert found["ece"]["value"] == pytest.approx((14 * 0.1 + 0.025) / 15, abs=2e-4)
    _, high = interval([0.0] * 2 + [1.0] * 238, range(240)) or (0, 0)
    assert found["ece"]["ci95"][1] == pytest.approx(high - 0.9, abs=2e-4) and high > 0.9985


def test_tied_confidences_leave_answers_their_spread() -> None:
    """All as confident: the 32 most confident of 40 are any 32, by id 26 of them right, where the mean is 0.8."""
    rows = [sure(0.9, at % 5 < 4, id=f"r{at:02}") for at in range(40)]
    found = measure(rows[::-1])
    assert found["at_coverage"]["accuracy"] == pytest.approx(0.8)
    assert found["at_coverage"]["ci95"] == pytest.approx(list(interval([1] * 26 + [0] * 6, range(32)) or ()))
    # The first bin holds the ids r00, r01, r02, all of them right: at least 0.025^(1/3), or the mean, which is more.
    assert found["bins"][-1]["ci95"] == pytest.approx([0.025 ** (1 / 3), 1.0], abs=1e-6)
    # Another r34, wrong, and r35.
    assert found["bins"][2]["n"] == 2 and found["bins"][2]["ci95"] == pytest.approx(list(interval([0, 1], "ab") or ()))


def test_no_answer_has_no_confidence_and_is_abstained_from_first() -> None:
    silent = with_confidence({**row([0.9, 0.1]), "letter": None, "correct": False, "threshold": 0.0})
    assert silent["confidence"] is None
    assert silent["abstained"]
    assert abstains(None, 0.0) and abstains(0.49, 0.5) and not abstains(0.5, 0.5)
    assert measure([silent, sure(0.9, True)])["curve"][0] == (0.5, 1.0)


def test_thresholds_by_hand() -> None:
    # Confidences 0.99 … 0.50 fall by 0.01; the first 35 are right, then every other one is wrong.
    rows = [sure((99 - at) / 100, at < 35 or at % 2 == 0, id=f"r{at}") for at in range(50)]
    assert choose_threshold(rows, "coverage", 0.8) == pytest.approx(0.60)
    # 35 right, then wrong right wrong …: after k answers 35 + (k - 35) // 2 are right; 0.9 holds up to k = 43.
    right = [35 + (k - 35) // 2 for k in range(35, 51)]
    assert max(k for k, r in zip(range(35, 51), right, strict=True) if r / k >= 0.9) == 43
    assert choose_threshold(rows, "accuracy", 0.9) == pytest.approx((99 - 42) / 100)
    tied = [sure(0.7, True, id=f"t{at}") for at in range(40)] + rows[:10]
    assert choose_threshold(tied, "coverage", 1.0) == pytest.approx(0.7)
    with pytest.raises(MedR1Error, match=r"no threshold answers 30 or more of 50 questions with coverage 0.3;"):
        choose_threshold(tied, "coverage", 0.3)
    with pytest.raises(MedR1Error, match=r"coverage 0\.8; raise the target \(50 answers share the highest conf"):
        choose_threshold([sure(0.7, True, id=f"s{at}") for at in range(50)], "coverage", 0.8)
    wrong = [sure(0.7, False, id=f"w{at}") for at in range(40)]
    with pytest.raises(MedR1Error, match=r"accuracy 0.5 \(the best is 0.000\); lower the target"):
        choose_threshold(wrong, "accuracy", 0.5)
    with pytest.raises(MedR1Error, match=r"target coverage is 1\.2"):
        choose_threshold(rows, "coverage", 1.2)


def test_calibrated_on_one_part_of_the_groups_and_judged_on_the_other(tmp_path: Path) -> None:
    rows = drawn(600, temperature=2.0, group_size=3)
    fitted, judged = calibrating(rows, 0.5, seed=0)
    assert {r["group"] for r in fitted}.isdisjoint(r["group"] for r in judged)
    assert 0.4 < len(fitted) / 600 < 0.6
    assert calibrating(rows[::-1], 0.5, seed=0)[0] == fitted[::-1]
    calibration = calibrate(rows, target="coverage", target_value=0.7)
    assert calibration.temperature == fit_temperature(fitted)
    assert calibration.n == len(fitted)
    assert calibration.coverage == pytest.approx(0.7, abs=0.01)
    # Rows of the other part change nothing.
    turned = [r if r in fitted else {**r, "gold": "C"} for r in rows]
    assert calibrate(turned, target="coverage", target_value=0.7) == calibration
    write_calibration(tmp_path / "c.json", calibration)
    assert read_calibration(tmp_path / "c.json") == calibration
    found = assess(rows, calibration)
    assert found["before"]["n"] == found["after"]["n"] == len(judged)
    assert found["after"]["nll"]["value"] < found["before"]["nll"]["value"]
    assert found["answered"] == answered(applied(judged, calibration))
    assert found["answered"]["accuracy"] > found["before"]["accuracy"]


def test_what_cannot_be_calibrated_is_said(tmp_path: Path) -> None:
    rows = drawn(100, temperature=1.0)
    with pytest.raises(MedR1Error, match=f"only .* of {MIN_N} rows are there to calibrate on, of {MIN_N} needed"):
        calibrate(rows[:MIN_N])
    with pytest.raises(MedR1Error, match="record r0: its row has no option_probs"):
        calibrate([{"id": "r0", "group": "g"}])
    calibration = calibrate(rows)
    with pytest.raises(MedR1Error, match="for mode no-think scored by options, these rows are mode think"):
        applied([{**rows[0], "mode": "think"}], calibration)
    for content in ("{", "[]", '{"temperature": 1}'):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(MedR1Error, match=r"bad.json: is no calibration"):
            read_calibration(tmp_path / "bad.json")
    with pytest.raises(MedR1Error, match=r"gone.json: no such file"):
        read_calibration(tmp_path / "gone.json")


def test_command_line(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", drawn(200, temperature=2.0, group_size=2))
    arguments = ["calibrate", str(tmp_path / "rows.jsonl"), "--out", str(tmp_path / "c.json"), "--accuracy", "0.6"]
    said = CliRunner().invoke(app, [*arguments, "--json"])
    assert said.exit_code == 0
    result = json.loads(said.stdout.splitlines()[-1])
    assert result["target"] == "accuracy"
    assert result["accuracy"] >= 0.6
    assert read_calibration(tmp_path / "c.json").threshold == result["threshold"]
    assert result["judged"]["after"]["n"] + result["n"] == 200
