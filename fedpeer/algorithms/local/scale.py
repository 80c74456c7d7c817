"""Features brought to one scale: what comes before a model that weighs columns against each other.

Rules
* A scale is of the own rows alone. That is right where each participant has columns of its own (vertical); over the
  same columns of several participants each would have another one (horizontal.logistic brings a common scale itself).
* Fitted once, applied to other tables as it is: a table to test with has no part in it.
* Numbers only. A column of text is refused by name, not left beside scaled ones.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from fedpeer.algorithms.horizontal.statistics import numbers
from fedpeer.errors import DataError
from fedpeer.peers import Peers
from fedpeer.secure import exact
from fedpeer.stage import Model, Params, Table, at_least, stage

Floats = npt.NDArray[np.float64]

ALGORITHM = "local.scale"


class Scale(Params, frozen=True):
    method: Literal["standard", "minmax"] = "standard"
    """standard: mean 0, standard deviation 1 (population, divided by n). minmax: from 0 to 1."""
    clip: Annotated[float, msgspec.Meta(gt=0, le=1e6)] | None = None
    """A scaled value beyond ±clip becomes ±clip, for example 8.0 against outliers; in `apply`, too."""


def _memory(params: Params, rows: int, n_features: int) -> int:
    return 8 * rows * n_features  # the scaled table beside the given one


@stage(
    version=1,
    params=Scale,
    roles={"member": at_least(1)},
    inputs={"table": Table},
    outputs={"table": Table, "model": Model},
    messages={},
    memory=_memory,
)
async def run(peers: Peers, params: Scale, table: Table) -> dict[str, Any]:
    """The table with scaled features, and the scale as a model for `apply`. No message.

    Each feature x becomes (x - offset) / scale: mean and standard deviation, exact and rounded once, or minimum and
    range; that is scikit-learn's StandardScaler or MinMaxScaler. A missing value stays missing and has no part in
    either. A column whose values are all the same (or missing) becomes 0, in `apply` whatever it holds, and is among
    the model's `constant`. Columns of true and false count as 1 and 0. Id and label stay as they are, and the order of
    rows and columns. How many values were clipped is told to the own operator. DataError, naming it, for a column of
    text, or one that spans more than a float64 holds.
    """
    if not table.features:
        raise DataError("the table has no feature column")
    fitted = [_fitted(params.method, name, numbers(table, name)) for name in table.features]
    offset, scale = np.array(fitted, dtype=np.float64).T
    facts = {
        "method": params.method,
        "clip": params.clip,
        "columns": table.features,
        "constant": [name for name, width in zip(table.features, scale, strict=True) if width == 0],
        "n_samples": table.n_samples,
    }
    model = Model(ALGORITHM, facts, {"offset": offset, "scale": scale})
    return {"table": _scaled(peers, model, table), "model": model}


@stage(
    version=1,
    roles={"member": at_least(1)},
    inputs={"model": Model, "table": Table},
    outputs={"table": Table},
    messages={},
    memory=_memory,
)
async def apply(peers: Peers, params: Params, model: Model, table: Table) -> dict[str, Any]:
    """Another table on the scale of `run`, which see. No message.

    The features are found by name and are those that the scale was fitted to; DataError names what is missing or new.
    """
    if model.algorithm != ALGORITHM:
        raise DataError(f"the model is of {model.algorithm!r}, not of {ALGORITHM!r}")
    known = model.facts["columns"]
    if missing := [name for name in known if name not in table.features]:
        raise DataError(f"the table lacks features that the scale was fitted to: {', '.join(map(repr, missing))}")
    if new := [name for name in table.features if name not in known]:
        raise DataError(f"the scale was fitted without the features {', '.join(map(repr, new))}")
    return {"table": _scaled(peers, model, table)}


def _fitted(method: str, name: str, x: Floats) -> tuple[float, float]:
    """Offset and scale of a column; a scale of 0 says that it is constant."""
    if method == "standard":
        moments = exact.moments_of(exact.moments(x))
        return moments.mean, moments.std
    present = x[~np.isnan(x)]
    if not present.size:
        return 0.0, 0.0
    low, high = float(present.min()), float(present.max())
    if not np.isfinite(high - low):
        raise DataError(f"the column {name!r} spans more than a float64 holds", hint="another unit would do")
    return low, high - low


def _scaled(peers: Peers, model: Model, table: Table) -> Table:
    clip, data, clipped = model.facts["clip"], table.data, 0
    places = zip(model.facts["columns"], model.arrays["offset"], model.arrays["scale"], strict=True)
    for name, offset, scale in places:
        x = numbers(table, name)
        with np.errstate(over="ignore"):
            z = np.where(np.isnan(x), np.nan, 0.0) if scale == 0 else (x - offset) / scale
        if clip is not None:
            clipped += int(np.count_nonzero(np.abs(z) > clip))
            z = np.clip(z, -clip, clip)
        if (far := np.flatnonzero(np.isinf(z))).size:
            raise DataError(
                f"the column {name!r} is beyond a float64 on this scale, in row {far[0]} (from 0)",
                hint="set clip where the scale is fitted",
            )
        data = data.set_column(data.column_names.index(name), name, pa.array(z, pa.float64(), from_pandas=True))
    peers.progress(1, 1, clipped=clipped, constant=len(model.facts["constant"]))
    return Table(data, table.id, table.label)
