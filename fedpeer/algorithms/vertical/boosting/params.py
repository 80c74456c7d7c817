"""What guest and hosts of boosted trees have in common: the parameters, and what both compute from them."""

from __future__ import annotations

from typing import Annotated, Final, Literal, NoReturn

import msgspec
import numpy as np

from fedpeer.algorithms.horizontal.statistics import numbers
from fedpeer.errors import DataError, RemoteProtocolError
from fedpeer.peers import Peers
from fedpeer.secure import paillier, trees
from fedpeer.secure.losses import Loss, Objective
from fedpeer.secure.trees import Floats, Ints, Pairs
from fedpeer.stage import Params, Table

ALGORITHM: Final = "vertical.secureboost"
MAX_DEPTH: Final = 8
MAX_ROWS: Final = 1 << 20
MAX_FEATURES: Final = 10_000
ALIGN: Final = "align the tables, and choose the common rows: vertical.align, local.select"


class Fit(Params, frozen=True):
    objective: Objective = "binary:bce"
    """Labels are 0 and 1; 0 … num_class - 1, one class against the rest; or any numbers."""
    num_class: Annotated[int, msgspec.Meta(ge=2, le=100)] = 2
    n_estimators: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 20
    """Trees, of multi:ce for each class."""
    learning_rate: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.3
    max_depth: Annotated[int, msgspec.Meta(ge=1, le=MAX_DEPTH)] = 3
    max_bin: Annotated[int, msgspec.Meta(ge=2, le=64)] = 32
    """Bins of a feature; missing values have one more."""
    reg_lambda: Annotated[float, msgspec.Meta(ge=0, le=1e6)] = 0.1
    gamma: Annotated[float, msgspec.Meta(ge=0, le=1e6)] = 0.0
    """A split that gains no more is not made."""
    min_child_weight: Annotated[float, msgspec.Meta(ge=0, le=1e6)] = 0.0
    """Least sum of second derivatives in a child. Besides, no child has fewer than 20 rows, of any weight."""
    subsample: Annotated[float, msgspec.Meta(gt=0, le=1)] = 1.0
    """Part of the training rows that a tree learns from, drawn by the guest. Hosts do not see which."""
    subsample_feature: Annotated[float, msgspec.Meta(gt=0, le=1)] = 1.0
    """Part of its features, at least one, that each participant draws for a tree."""
    complete_secure: bool = True
    """Whether the first tree (of each class) has splits of the guest only: it would tell the hosts most of the label"""
    weight: Annotated[str, msgspec.Meta(max_length=256)] = ""
    """A column of the guest with the weights of rows, 0 to max_weight; "" where all weigh 1."""
    max_weight: Annotated[float, msgspec.Meta(ge=1e-2, le=1000)] = 1.0
    validation: Annotated[float, msgspec.Meta(ge=0, le=0.5)] = 0.0
    """Part of the rows, drawn by the guest, that no tree learns from. Hosts do not see which."""
    early_stopping: Annotated[int, msgspec.Meta(ge=0, le=1000)] = 0
    """Training ends, and goes back to the best, after so many trees without a lower loss of the validation rows."""
    key_bits: Literal[2048, 3072] = 2048
    goss: bool = False
    """Refused: rows are never chosen by their gradients."""

    def __post_init__(self) -> None:
        if self.goss:
            raise ValueError("goss is refused: which rows have a large gradient tells their labels")
        if self.early_stopping and not self.validation:
            raise ValueError("early_stopping takes validation rows: say which part, validation = 0.2")


def groups(params: Fit) -> int:
    """Trees of one iteration."""
    return Loss(params.objective, params.num_class).groups


def turns(params: Fit) -> int:
    """At most: a level of a tree each, and the end."""
    return params.n_estimators * groups(params) * params.max_depth + 1


def pairs_of(params: Fit, public: paillier.PublicKey, rows: int) -> Pairs:
    """How gradients are written: by the declared bounds, not by what they are."""
    return Pairs.of(public, rows, Loss(params.objective).bound * params.max_weight)


def how_many(params: Fit, features: int) -> int:
    """Features of a participant that a tree may split by."""
    return min(features, max(1, round(features * params.subsample_feature)))


def drawn_of(peers: Peers, params: Fit, features: int) -> Ints:
    """Which ones, ascending."""
    return np.sort(peers.random.permutation(features)[: how_many(params, features)])


def bins_of(table: Table, columns: list[str], max_bin: int) -> tuple[Ints, Floats]:
    """The bins of the named columns (features, rows), and their ends (features, max_bin - 1)."""
    if table.n_samples > MAX_ROWS:
        raise DataError(f"the table has {table.n_samples} rows; this version trains on up to {MAX_ROWS}")
    found = [numbers(table, name) for name in columns]
    ends = [trees.edges(column, max_bin) for column in found]
    bins = [trees.binned(column, each) for column, each in zip(found, ends, strict=True)]
    return (
        np.array(bins, dtype=np.int64).reshape(len(columns), table.n_samples),
        np.array(ends).reshape(len(columns), max_bin - 1),
    )


def refuse(peer: str, what: str) -> NoReturn:
    raise RemoteProtocolError(f"{peer} sent {what}", peer=peer)
