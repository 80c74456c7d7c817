from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeer import codec
from fedpeer.data import offers
from fedpeer.data.catalog import DatasetView
from fedpeer.data.offers import FEWEST, MAX_BYTES, MAX_OFFERS, Offer, Offers, rounded
from fedpeer.errors import RemoteProtocolError


def dataset(name: str = "rows", rows: int = 1234, *, offered: bool = True, columns: int = 1) -> DatasetView:
    return DatasetView(
        name=name,
        uri="postgresql://u@h/d?table=t",
        id="id",
        label=None,
        rows=rows,
        columns=[[f"column {i}", "number"] for i in range(columns)],
        secret="clinic",
        offered=offered,
    )


def test_what_is_told_is_the_form_and_about_how_many_rows() -> None:
    told = offers.parse(codec.encode(offers.of([dataset()])))
    assert told == Offers([Offer("rows", 1200, "id", None, [("column 0", "number")], 0)], 0)
    said = msgspec.json.encode(offers.view("bank", told)).decode()
    assert "about 1200" in said
    assert "1234" not in said
    assert "postgresql" not in said
    assert "clinic" not in said
    few = offers.of([dataset(rows=99)])
    assert "fewer than 100" in msgspec.json.encode(offers.view("bank", few)).decode()


def test_of_what_is_not_offered_not_even_the_number_is_told() -> None:
    hidden = [dataset(f"d{i}", offered=False) for i in range(300)]
    assert offers.of(hidden) == offers.of([]) == Offers([], 0)


@pytest.mark.parametrize(
    ("rows", "told"),
    [(0, 0), (1, 0), (99, 0), (100, 100), (104, 100), (105, 110), (994, 990), (995, 1000), (1249, 1200), (1250, 1300),
     (1_000_000, 1_000_000), (1_049_999, 1_000_000), (999_999_999, 1_000_000_000)],
)  # fmt: skip
def test_rows_have_two_digits(rows: int, told: int) -> None:
    assert rounded(rows) == told


@settings(deadline=None)
@given(rows=st.integers(0, 10**12))
def test_neighbouring_tables_within_a_cell_are_told_alike_and_cells_are_wide(rows: int) -> None:
    told = codec.encode(offers.of([dataset(rows=rows)]))
    same = [
        other for other in (rows - 1, rows + 1) if other >= 0 and codec.encode(offers.of([dataset(rows=other)])) == told
    ]
    assert same, "one of its neighbours is in its cell: whoever sees the answer cannot count rows"
    if rows >= FEWEST:
        assert rounded(rows) > 0
        assert abs(rounded(rows) - rows) * 20 <= rows
        assert rounded(rounded(rows)) == rounded(rows)
        assert str(rounded(rows)).rstrip("0") in (str(rounded(rows))[:2], str(rounded(rows))[:1])


@settings(deadline=None)
@given(
    counts=st.lists(st.integers(0, 4000), max_size=12),
    width=st.integers(1, 256),
)
def test_all_of_it_is_one_bounded_message_that_counts_what_it_leaves_out(counts: list[int], width: int) -> None:
    views = [dataset(f"d{i}", columns=count) for i, count in enumerate(counts)]
    for view in views:
        view.columns = [[f"{i}".ljust(width, "ä")[:width], "boolean"] for i, _ in enumerate(view.columns)]
    told = offers.of(views)
    data = codec.encode(told)
    assert len(data) <= MAX_BYTES
    assert offers.parse(data) == told
    assert len(told.datasets) + told.more == len(views)
    there = {view.name: len(view.columns) for view in views}
    assert all(len(offer.columns) + offer.more == there[offer.name] for offer in told.datasets)


def test_there_are_at_most_so_many() -> None:
    told = offers.of([dataset(f"d{i}") for i in range(MAX_OFFERS + 3)])
    assert (len(told.datasets), told.more) == (MAX_OFFERS, 3)


@pytest.mark.parametrize(
    "wrong",
    [
        ["rows", 1234, "id", None, [], 0],
        ["rows", -1, "id", None, [], 0],
        ["../x", 100, "id", None, [], 0],
        ["rows", 100, "\x1b[2J", None, [], 0],
        ["rows", 100, "id", None, [["a\n", "number"]], 0],
        ["rows", 100, "id", None, [["a", "secret"]], 0],
        ["rows", 100, "id", None, [["a" * 257, "number"]], 0],
    ],
)
def test_what_a_partner_says_is_checked(wrong: list) -> None:
    with pytest.raises(RemoteProtocolError):
        offers.parse(codec.encode([[wrong], 0]))
    with pytest.raises(RemoteProtocolError):
        offers.parse(b"x" * (MAX_BYTES + 1))
