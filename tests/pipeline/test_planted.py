"""What must come out because it was planted: whether neighbours matter, and whether anything does. Models are really trained; all simulated."""

from __future__ import annotations

import pytest

from tests.pipeline import planted

pytestmark = pytest.mark.pipeline

HEADS = ("knn", "logistic")
PROTOCOLS = ("blocks", "blocks_buffered")


@pytest.fixture(scope="module")
def arrangement(tmp_path_factory):
    return planted.compared(tmp_path_factory.mktemp("arrangement"), "arrangement")


@pytest.fixture(scope="module")
def marker(tmp_path_factory):
    return planted.compared(tmp_path_factory.mktemp("marker"), "marker")


@pytest.fixture(scope="module")
def permuted(tmp_path_factory):
    return planted.compared(tmp_path_factory.mktemp("permuted"), "permuted")


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_patch_beats_spot_where_domains_differ_by_how_the_spots_lie_among_each_other(arrangement, protocol):
    lead = arrangement.lead(protocol, ("patch", "knn"), ("spot", "knn"))
    assert lead["low"] > 0.1
    assert arrangement.accuracy(protocol, "patch", "knn") > 0.7
    learned = arrangement.lead(protocol, ("patch", "knn"), ("untrained_patch", "knn"))
    assert learned["low"] > 0.1  # by training, not by having attention
    for alone in ("spot", "raw", "pca"):  # a spot does not show where it lies
        assert abs(arrangement.accuracy(protocol, alone, "knn") - 0.5) < 0.06


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("head", HEADS)
def test_patch_and_spot_tie_where_a_spot_alone_tells_its_domain(marker, protocol, head):
    assert abs(marker.lead(protocol, ("patch", head), ("spot", head))["difference"]) < 0.02
    assert marker.accuracy(protocol, "spot", head) > 0.95
    assert marker.lead(protocol, ("spot", head), ("majority", "none"))["low"] > 0.1


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_nothing_beats_chance_once_expression_is_shuffled_over_the_spots(permuted, protocol):
    for method, head in permuted.runs[protocol]:
        if method != "majority":
            assert permuted.lead(protocol, (method, head), ("majority", "none"))["low"] <= 0, (method, head)
            assert abs(permuted.accuracy(protocol, method, head) - 0.5) < 0.1, (method, head)
