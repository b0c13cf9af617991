"""Every sentence on top of the score page turns with the numbers that it is made of (all of them planted)."""

from __future__ import annotations

import pandas as pd
import pytest

from tests import finished
from tests.unit.test_figures import NO_NOTES, NO_SCORES, clusterings, comparisons
from workflow import scoreboard
from workflow.assemble import COLUMNS
from workflow.findings import findings

CONTROLS = {"majority__none": 0.2, "coordinates__knn": 0.25, "pca__knn": 0.5, "untrained__knn": 0.4}


def sections(**donors: str) -> pd.DataFrame:
    return pd.DataFrame([{"slice": name, "donor": donor} for name, donor in donors.items()])


def split_rows(n_splits: int, protocol: str = "random20", names: str = "ab") -> pd.DataFrame:
    rows = [("d", name, "pca", "knn", protocol, split, "accuracy", 0.5) for name in names for split in range(n_splits)]
    return pd.DataFrame(rows, columns=COLUMNS)


def told(
    *tables: pd.DataFrame,
    scores: pd.DataFrame = NO_SCORES,
    notes: pd.DataFrame = NO_NOTES,
    of: pd.DataFrame | None = None,
    kept: tuple[str, ...] = (),
) -> str:
    of = sections(a="one", b="two") if of is None else of
    return "\n".join(findings("d", scores, pd.concat(tables), notes, of, list(kept)))


def note(**fields: str) -> pd.DataFrame:
    return pd.DataFrame([fields]).reindex(columns=NO_NOTES.columns, fill_value="")


def test_the_leak_is_named_with_its_size_and_where_position_still_helps():
    random = comparisons("random20", **{**CONTROLS, "coordinates__knn": 0.85}, stpatch__knn=0.6)
    blocks = comparisons("blocks", **{**CONTROLS, "coordinates_section__knn": 0.36}, stpatch__knn=0.6)
    donor = comparisons("leave_donor", **CONTROLS, stpatch__knn=0.6)
    said = told(random, blocks, donor)
    assert "random20 leaks: position alone, without a gene, is right on 0.850 of the tested spots" in said
    assert "0.250 under leave_donor (-0.600 from random20), 0.360 under blocks (-0.490 from random20)" in said
    assert "position still helps under blocks, so" in said  # 0.36 against 0.20; 0.25 is no more than the margin
    quiet = told(
        comparisons("random20", **{**CONTROLS, "coordinates__knn": 0.22}, stpatch__knn=0.6), donor.replace(0.25, 0.2)
    )
    assert "random20 leaks" not in quiet
    assert "random20 shows no leak by position here" in quiet
    assert "none of these rewards knowing places" in quiet


@pytest.mark.parametrize(
    ("value", "half", "said"),
    [
        (
            0.7,
            0.1,
            "stpatch is right more often than the strongest control: stpatch, knn: 0.700 against pca, knn: 0.500",
        ),
        (0.3, 0.1, "stpatch is right less often than the strongest control"),
        (0.55, 0.1, "it is undecided whether stpatch is right more often than the strongest control"),
        (0.9, float("nan"), "it is undecided whether stpatch"),
    ],
)
def test_the_model_wins_loses_or_is_undecided_by_the_interval_where_nothing_leaks(value, half, said):
    lines = told(comparisons("leave_donor", half=half, **CONTROLS, stpatch__knn=value)).splitlines()
    (line,) = [line for line in lines if "strongest control:" in line and "Pretraining" not in line]
    assert line.startswith("On donors that no training spot comes from, ")
    assert said in line
    assert line.endswith("over 40 blocks of 2 sections.")


def test_the_strictest_protocols_speak_and_a_lead_that_only_the_leak_gives_is_called_so():
    leaky = comparisons("random20", **CONTROLS, stpatch__knn=0.9)
    honest = comparisons("blocks_buffered", **CONTROLS, stpatch__knn=0.45)
    lax = comparisons("blocks", **CONTROLS, stpatch__knn=0.6)
    said = told(leaky, lax, honest)
    assert "On tissue that no window shares with a training spot, stpatch is right less often" in said
    assert "borders aside" not in said
    assert "lead of stpatch under random20 (+0.400) does not hold under blocks_buffered" in said
    assert "does not hold" not in told(leaky, comparisons("blocks_buffered", **CONTROLS, stpatch__knn=0.8))


def test_random20_alone_or_controls_alone_allow_no_claim():
    assert "Only random20 was measured" in told(comparisons("random20", **CONTROLS, stpatch__knn=0.9))
    assert "No pretrained model was scored" in told(comparisons("blocks", **CONTROLS))


@pytest.mark.parametrize(
    ("trained", "half", "said"),
    [
        (
            0.6,
            0.01,
            "Pretraining taught the encoder something: 0.600 trained, 0.400 untrained, each at its best under blocks; "
            "the paired difference is +0.200 [+0.190, +0.210].",
        ),
        (0.45, 0.01, "Pretraining taught the encoder something: 0.450 trained, 0.400 untrained"),  # pca beats both
        (0.3, 0.01, "Pretraining made the encoder worse: 0.300 trained"),
        (0.405, 0.01, "Whether pretraining taught the encoder anything is undecided"),
        (0.45, float("nan"), "no interval can be told"),
    ],
)
def test_training_is_held_against_its_own_start(trained, half, said):
    assert said in told(comparisons("blocks", half=half, **CONTROLS, stpatch__knn=trained))


def test_the_paired_difference_decides_whatever_the_intervals_of_either_side():
    table = comparisons("blocks", **{**CONTROLS, "untrained__knn": 0.7}, stpatch__knn=0.72)
    table[["value_low", "value_high"]] = 0.0, 1.0  # wide apart from each other, yet paired they are not
    assert "Pretraining taught the encoder something" in told(table)


def test_the_strictest_protocol_speaks_of_training():
    tables = [comparisons(name, **CONTROLS, stpatch__knn=0.6) for name in ("random20", "blocks", "leave_donor")]
    assert "each at its best under leave_donor" in told(*tables)
    assert "each at its best under random20" in told(tables[0])


def test_clusterings_turn_with_their_lead():
    def of(gain: float) -> str:
        table = clusterings()
        table.loc[(table["method"] == "stpatch") & (table["metric"] == "ari"), "value"] += gain
        return told(NO_SCORES_COMPARED, scores=table)

    assert "it is undecided whether stpatch finds domains that agree better" in of(0.0)
    assert "(ARI), stpatch finds domains that agree better with the labels" in of(0.5)
    assert "(ARI), stpatch finds domains that agree worse with the labels" in of(-1.0)
    assert "over 3 sections." in of(0.5)


def test_hidden_squares_are_held_against_kriging_and_the_nearest_16_size_by_size():
    table = finished.reconstructions()
    said = told(NO_SCORES_COMPARED, scores=table)
    assert "stpatch errs less than kriging at every size, 0.6" in said
    assert "errs less than the mean of the 16 nearest spots at every size" in said
    worse = table.copy()
    worse.loc[(worse["method"] == "stpatch") & (worse["head"] == "window8_side4"), "value"] += 0.15
    said = told(NO_SCORES_COMPARED, scores=worse)
    assert "against kriging: errs less at 1, more at 1 of 2 sizes" in said
    assert "errs less than the gene's mean at every size" in said
    worse.loc[worse["method"] == "stpatch", "value"] += 1
    assert "errs more than kriging at every size" in told(NO_SCORES_COMPARED, scores=worse)
    even = table[table["method"] != "stpatch"]
    twin = even[even["method"] == "kriging"].assign(method="stpatch")
    twin.loc[twin["metric"] == "mse", "value"] += [0.06, -0.05] * (len(twin) // 8)
    assert "can't be told from kriging at every size" in told(NO_SCORES_COMPARED, scores=pd.concat([even, twin]))


def test_claims_end_at_the_sections_donors_and_splits_that_there_are():
    table, rows = comparisons("blocks", **CONTROLS, stpatch__knn=0.6), split_rows(2)
    said = told(table, scores=rows, of=sections(a="one", b="one"))
    assert "All 2 sections are of one donor: nothing is said of other people." in said
    assert "2 sections, too few" in said
    assert "Few random splits (random20: 2)" in said
    said = told(table, scores=rows, of=sections(a="one", b="two"))
    assert "one donor" not in said
    assert "of 2 donors" in said
    assert "The donor of 2 of 2 sections is not known" in told(table, scores=rows, of=sections(a="", b=""))
    assert "about one section" in told(table, scores=split_rows(2, names="a"), of=sections(a="one", b="one"))
    many = {name: f"donor {name}" for name in "abcdefgh"}
    said = told(table, scores=split_rows(10, names="abcdefgh"), of=sections(**many))
    assert not any(word in said for word in ("too few", "Few", "donor"))


def test_simulated_and_contaminated_data_are_called_so_and_clean_ones_are_not():
    table = comparisons("blocks", **CONTROLS, stpatch__knn=0.6)
    assert "simulated" not in told(table)
    assert "nothing here says anything of tissue" in told(table, notes=note(kind="simulated", section="a"))
    assert "pretrained on simulated slices" in told(table, notes=note(kind="simulated", method="stpatch"))
    assert "on 2 slices that match d: its scores are not those of unseen" in told(table, kept=("x", "y"))
    assert "unseen" not in told(table)
    assert "Leaving a donor out was not possible" in told(
        table, notes=note(kind="protocol_skipped", protocol="leave_donor")
    )


def test_what_is_said_stands_on_top_of_the_page_escaped():
    table = comparisons("blocks", **CONTROLS, stpatch__knn=0.6)
    page = scoreboard.scores_page("d", table, NO_SCORES, NO_NOTES, False, ["a < b"], ["none <was>"])
    assert page.index("What this shows") < page.index("Was this tissue") < page.index("Does pretraining beat")
    assert "<li>a &lt; b</li>" in page
    assert "<li>none &lt;was&gt;</li>" in page


NO_SCORES_COMPARED = comparisons("blocks", **CONTROLS).head(0)


def test_where_nothing_was_measured_nothing_is_claimed():
    said = findings("d", NO_SCORES, NO_SCORES_COMPARED, NO_NOTES, sections(a=""), [])
    assert said == ["No pretrained model was scored by probes: nothing is said of one."]
