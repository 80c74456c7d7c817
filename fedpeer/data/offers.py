"""What a partner is told of datasets: names, columns, kinds, and about how many rows. Never a value.

Rules
* Only of datasets that their owner offers; the others, and how many they are, stay unknown.
* A count of rows has two digits, and is at least rounded to tens; below FEWEST it is not told. It is that of the time
  when the dataset was added. So tables within one rounding cell cannot be told apart, however often they are asked for.
* All of it is one message of at most MAX_BYTES. What has no room is counted in `more`, not left out in silence.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Final, Literal

import msgspec

from fedpeer import codec
from fedpeer.data.columns import MAX_NAME
from fedpeer.errors import RemoteProtocolError

if TYPE_CHECKING:
    from fedpeer.data.catalog import DatasetView

FEWEST: Final = 100
MAX_BYTES: Final = 60_000
MAX_OFFERS: Final = 256
_SLACK: Final = 64
"""bytes for the lengths and numbers round one dataset"""

Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
ColumnName = Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_NAME)]


class Offer(codec.Record, frozen=True):
    """One dataset, as a partner may know it."""

    name: Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    rows: Count
    """rounded; 0: fewer than FEWEST"""
    id: ColumnName | None
    label: ColumnName | None
    columns: list[tuple[ColumnName, Literal["number", "text", "boolean"]]]
    more: Count
    """columns for which there was no room"""


class Offers(codec.Record, frozen=True):
    """All that a peer offers."""

    datasets: Annotated[list[Offer], msgspec.Meta(max_length=MAX_OFFERS)]
    more: Count
    """datasets for which there was no room"""


class OfferView(msgspec.Struct, kw_only=True):
    """What our operator sees of a partner's dataset."""

    name: str
    rows: str
    id: str | None
    label: str | None
    columns: list[list[str]]
    more_columns: int


class OffersView(msgspec.Struct, kw_only=True):
    """The shape of the admin API's answer."""

    peer: str
    datasets: list[OfferView]
    more: int


def rounded(rows: int) -> int:
    """The count that is told: two digits, at least tens, nearest; 0 for fewer than FEWEST."""
    if rows < FEWEST:
        return 0
    unit: int = 10 ** (len(str(rows)) - 2)
    return (rows + unit // 2) // unit * unit


def of(datasets: Iterable[DatasetView]) -> Offers:
    """What is told of these datasets, which is nothing of those that are not offered."""
    told: list[Offer] = []
    left, more = MAX_BYTES - _SLACK, 0
    for view in datasets:
        if not view.offered:
            continue
        bare = Offer(view.name, rounded(view.rows), view.id, view.label, [], len(view.columns))
        left_for_columns = left - len(codec.encode(bare)) - _SLACK
        if left_for_columns < 0 or len(told) == MAX_OFFERS:
            more += 1
            continue
        left = left_for_columns
        columns: list[tuple[str, Literal["number", "text", "boolean"]]] = []
        for name, kind in msgspec.convert(view.columns, list[tuple[str, Literal["number", "text", "boolean"]]]):
            cost = len(codec.encode([name, kind]))
            if cost > left:
                break
            left -= cost
            columns.append((name, kind))
        told.append(msgspec.structs.replace(bare, columns=columns, more=len(view.columns) - len(columns)))
    return Offers(told, more)


def parse(data: codec.Buffer) -> Offers:
    """What a partner says that it offers. Raises RemoteProtocolError."""
    offers = codec.decode_as(Offers, data, limit=MAX_BYTES)
    for offer in offers.datasets:
        if offer.rows != rounded(offer.rows):
            raise RemoteProtocolError("a number of rows that is not rounded")
        names = [name for name, _ in offer.columns]
        if not all(name.isprintable() for name in (*names, offer.id or "", offer.label or "")):
            raise RemoteProtocolError("a column whose name holds control characters")
    return offers


def view(peer: str, offers: Offers) -> OffersView:
    """For people."""
    return OffersView(
        peer=peer,
        datasets=[
            OfferView(
                name=offer.name,
                rows=f"about {offer.rows}" if offer.rows else f"fewer than {FEWEST}",
                id=offer.id,
                label=offer.label,
                columns=[list(column) for column in offer.columns],
                more_columns=offer.more,
            )
            for offer in offers.datasets
        ],
        more=offers.more,
    )
