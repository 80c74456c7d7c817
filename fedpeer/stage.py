"""What a stage declares: one of the two pages an algorithm author reads (the other is peers.py).

    @stage(
        version=1,                                # raised when messages or results change meaning
        params=Fit,                               # a class of `Params`: names, bounds, defaults
        roles={"member": at_least(3)},            # vertical: {"guest": exactly(1), "host": at_least(1)}
        inputs={"table": Table},
        outputs={"model": Model},
        messages={"gradient": Sum("sum of gradients and the count of rows", per_turn=1, group="turn")},
    )
    async def fit(peers: Peers, params: Fit, table: Table) -> dict[str, Any]:   # the inputs by name
        ...
        return {"model": Model(...)}

The same coroutine function runs at every participant, in a worker process that holds nothing but its inputs and
`peers`. It is named by its place: `fedpeer/algorithms/horizontal/logistic.py`, function `fit`, is
"horizontal.logistic:fit"; nothing is registered. It returns a dict with exactly the declared outputs (an output
that this role does not produce is None). It may await nothing but methods of `peers`, and takes chance from
`peers.random` only: the same inputs must give the same bytes, for a turn may be repeated after a crash. Noise of
differential privacy is drawn by secure/dp.py, whose rules say where it has to lie.

A stage that returns a model says how many numbers it fits (`parameters`), and one that adds noise what it costs
(`cost`): the policy of each owner asks both before anything runs, and refuses a model that does not say. One that
holds its rows as a matrix says so (`memory`): what cannot fit in a worker is refused then, too.

`messages` is what leaves the organization, and the only thing: operators read it before they sign, the daemon's
gate enforces it, the leak tests compare it with every recorded frame. A stage whose only role is "member" has sums
and agreed values and no send: it cannot show one peer's numbers to another even by mistake. A total over few rows
shows those rows, and whoever reads a total can take its own part out. So each participant's part has no small cells:
secure/cells.py makes it so, with a parameter `min_cell`, which a stage that reports sums without noise must have.

Testing it takes about 20 lines (`fedpeer.testing.stages`; see tests/algorithms/horizontal/test_horizontal_logistic.py):

    run = run_stage(fit, Fit(), [{"table": a}, {"table": b}, {"table": c}])  # .outputs .totals .digests .transcripts
    check_stage(fit, Fit(), split, pooled)    # kills a worker at every request, compares all peers byte by byte,
                                              # replays one as on an older processor, and compares with pooled rows
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Literal

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from fedpeer import codec
from fedpeer.crypto import hash_
from fedpeer.errors import ContractError, DataError, StageError

MAX_PEERS = 200
EXTRAS = {"dp": ("dp_accounting", "opendp")}
"""What `pip install fedpeer[NAME]` brings beyond fedpeer itself: the modules that stages of this extra import."""


class Params(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of a stage's parameters: typed fields with defaults, and bounds. Params() itself: a stage without any.

    Bounds are checked when a contract is read, not by `Fit(...)`; a field without a default must be in the contract.

    class Fit(Params, frozen=True):
        reg_lambda: Annotated[float, msgspec.Meta(ge=0)] = 0.01
    """


# what passes between stages


@dataclass(frozen=True)
class Table:
    """Rows of one peer: `data` (pyarrow.Table), and which columns are id and label (None if there is none).

    Numbers are float64 and have no NaN or infinity; a missing value is null. Columns keep the owner's order. A column
    is float64, string or bool, in outputs too; an id column needs its type (`pa.array(ids, pa.string())`), also empty.
    """

    data: pa.Table
    id: str | None = None
    label: str | None = None

    @property
    def n_samples(self) -> int:
        return int(self.data.num_rows)

    @property
    def features(self) -> list[str]:
        """Names of the feature columns: all but id and label, in the table's order."""
        return [name for name in self.data.column_names if name not in (self.id, self.label)]

    def column(self, name: str) -> npt.NDArray[np.float64]:
        """One numeric column as float64, shape (n_samples,); a missing value is NaN here."""
        if name not in self.data.column_names:
            raise DataError(f"the table has no column {name!r}")
        try:
            column = self.data.column(name).cast(pa.float64())
        except pa.ArrowInvalid:
            raise DataError(f"the column {name!r} is not numeric") from None
        return np.asarray(column.to_numpy(zero_copy_only=False), dtype=np.float64)

    def matrix(self) -> npt.NDArray[np.float64]:
        """The features as float64, shape (n_samples, n_features), C order; a missing value is NaN."""
        features = self.features
        out = np.empty((self.n_samples, len(features)), dtype=np.float64)
        for j, name in enumerate(features):
            out[:, j] = self.column(name)
        return out

    def labels(self) -> npt.NDArray[np.float64]:
        """The label column as float64, shape (n_samples,); DataError if there is none or a value is missing."""
        if self.label is None:
            raise DataError("the table has no label column", hint="fedpeer dataset add NAME URI --label COL")
        y = self.column(self.label)
        if np.isnan(y).any():
            raise DataError(f"the label column {self.label!r} has missing values")
        return y

    def ids(self) -> list[str]:
        """The id column as text."""
        if self.id is None:
            raise DataError("the table has no id column", hint="fedpeer dataset add NAME URI --id COL")
        return [str(value) for value in self.data.column(self.id).to_pylist()]


@dataclass(frozen=True)
class Rows:
    """An alignment: `index[i]` is the own row that is the i-th common one; equal length and meaning at every peer."""

    index: npt.NDArray[np.int64]


@dataclass(frozen=True)
class Model:
    """A trained model: plain facts (JSON) and arrays (safetensors).

    `algorithm` is the module that made it, for example "horizontal.logistic"; its stage `predict` takes the model.
    """

    algorithm: str
    facts: Mapping[str, Any]
    arrays: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """Numbers for people: nested dicts and lists of plain values."""

    values: Mapping[str, Any]


KINDS: dict[str, type] = {"table": Table, "rows": Rows, "model": Model, "report": Report}
Output = Table | Rows | Model | Report


# who takes part


@dataclass(frozen=True)
class Count:
    """How many participants hold a role."""

    least: int
    most: int

    def __contains__(self, n: int) -> bool:
        return self.least <= n <= self.most


def exactly(n: int) -> Count:
    return Count(n, n)


def at_least(n: int) -> Count:
    return Count(n, MAX_PEERS)


# what may leave


@dataclass(frozen=True)
class Sum:
    """A secure sum over all participants: nobody sees one peer's values. The text says what the total tells.

    group="data" for what is computed from the data alone, "turn" for what changes with the model: all sums of one
    group share one survivor set.

    per_turn is how often the tag may be asked in one turn of `peers.rounds`. What comes before the loop is a turn of
    its own, and what follows a `break` belongs to the turn it left; so a loop of sums goes into `rounds`.

    How values are written: nothing to declare is exact, at 12 bytes a value on the wire. Integers |v| < 2^(value_bits
    - 1); floats |x| < 2^(value_bits - 1 - fraction_bits), each rounded once to a multiple of 2^-fraction_bits; 3 bytes
    for each 16 of value_bits, so counts below 2^31 cost 6 with value_bits=32. Out of range fails the stage.

    clip=c is for large models (millions of floats): 3 bytes a float. A float is clipped to [-c, c] and rounded to one
    of 2^bits levels, 2c / (2^bits - 1) apart, up or down by chance so that it is right on average; integers stay
    exact. The chance is of `peers.random`: a repeated turn gives the same bytes. c is the same at all peers and not a
    function of anybody's data: for a bound that is a parameter, or another one for each layer, divide before the sum
    and multiply after it (clip=1.0). More bits cost nothing, but n * (2^bits - 1) must stay below 2^24: 16 bits go
    with any number of participants, 20 with up to 16; a contract with more is refused.
    """

    text: str
    per_turn: int = 1
    group: Literal["data", "turn"] = "turn"
    clip: float | None = None
    bits: int = 16
    value_bits: int = 55
    fraction_bits: int = 32
    kind: ClassVar[str] = "sum"

    def __post_init__(self) -> None:
        if self.clip is not None and not (isinstance(self.clip, float) and 1e-30 <= self.clip <= 1e30):
            raise TypeError(f"clip={self.clip!r}: a float from 1e-30 to 1e30")
        if not 1 <= self.bits <= 22 or (self.clip is None and self.bits != 16):
            raise TypeError(f"bits={self.bits}: 1 to 22, together with clip")
        if not (2 <= self.value_bits <= 55 and 0 <= self.fraction_bits <= 55):
            raise TypeError(f"value_bits={self.value_bits} is 2 to 55, fraction_bits={self.fraction_bits} 0 to 55")

    @property
    def codecs(self) -> dict[str, list[Any]]:
        """dtype → how a value of it is written (secure/fixedpoint.py)."""
        exact = ["fixed", self.fraction_bits, self.value_bits]
        return {
            "int64": ["int", self.value_bits],
            "float64": exact if self.clip is None else ["clip", self.bits, self.clip],
        }


@dataclass(frozen=True)
class Agreed:
    """One value that all adopt (Peers.agree), where arithmetic may differ by processor. Derived from totals only."""

    text: str
    per_turn: int = 1
    kind: ClassVar[str] = "agreed"


@dataclass(frozen=True)
class Sealed:
    """A message that its receiver cannot read (encrypted or masked; a test shows it)."""

    sender: str
    receiver: str
    text: str
    per_turn: int = 1
    max_bytes: int = 1 << 30
    kind: ClassVar[str] = "sealed"


@dataclass(frozen=True)
class Open:
    """A message that its receiver reads; the text says what it learns from it."""

    sender: str
    receiver: str
    text: str
    per_turn: int = 1
    max_bytes: int = 1 << 30
    kind: ClassVar[str] = "open"


Message = Sum | Agreed | Sealed | Open


@dataclass(frozen=True)
class Stage:
    """A declared stage; calling it calls the function."""

    function: Callable[..., Any]
    version: int
    params: type[Params]
    roles: Mapping[str, Count]
    inputs: Mapping[str, type]
    outputs: Mapping[str, type]
    messages: Mapping[str, Message]
    parameters: Callable[[Any, int], int] | None = None
    """(params, n_features) → how many numbers its model fits to the rows; not part of the declaration."""
    cost: Callable[[Any], tuple[float, float] | None] | None = None
    """params → (epsilon, delta) of one run, None without noise; not part of the declaration."""
    memory: Callable[[Any, int, int], int] | None = None
    """(params, rows, n_features) → bytes that a worker takes for it beside its inputs, at least; not part of the
    declaration."""
    extra: str = ""
    """the extra of fedpeer that must be installed where it runs, a key of EXTRAS; not part of the declaration"""
    keys: Collection[str] = ()
    """roles whose holders have a Paillier key each, of so many bits as the parameter `key_bits` says: see Peers.keys"""

    @property
    def name(self) -> str:
        """For example "horizontal.logistic:fit"."""
        module = self.function.__module__.removeprefix("fedpeer.algorithms.")
        return f"{module}:{self.function.__name__}"

    @property
    def text(self) -> str:
        return inspect.getdoc(self.function) or ""

    def declaration(self) -> bytes:
        """Canonical bytes of everything other peers must agree on: name, version, params, roles, ports, messages."""
        kind_of = {cls: name for name, cls in KINDS.items()}
        return codec.encode(
            [
                self.name,
                self.version,
                msgspec.json.encode(msgspec.json.schema(self.params), order="sorted").decode(),
                [[role, count.least, count.most] for role, count in sorted(self.roles.items())],
                [[port, kind_of[cls]] for port, cls in sorted(self.inputs.items())],
                [[port, kind_of[cls]] for port, cls in sorted(self.outputs.items())],
                [
                    [tag, m.kind, *(getattr(m, f) for f in m.__dataclass_fields__)]
                    for tag, m in sorted(self.messages.items())
                ],
                *([sorted(self.keys)] if self.keys else []),
            ]
        )

    def declaration_hash(self) -> bytes:
        return hash_("fp.declaration", self.declaration())

    def codecs(self, tag: str) -> dict[str, list[Any]]:
        """How a sum writes its values. A tag that is not declared as one is the gate's to refuse."""
        declared = self.messages.get(tag)
        return (declared if isinstance(declared, Sum) else Sum("")).codecs

    def missing(self) -> list[str]:
        """The modules of its extra that are not installed here."""
        return [module for module in EXTRAS.get(self.extra, ()) if importlib.util.find_spec(module) is None]

    def check_outputs(self, result: Any) -> dict[str, Output | None]:
        """What the function returned, if it is a dict of exactly the declared outputs; else StageError."""
        if not isinstance(result, dict) or result.keys() != self.outputs.keys():
            got = ", ".join(map(str, result)) if isinstance(result, dict) else f"a {type(result).__name__}"
            raise StageError(f"{self.name} returned {got or 'nothing'}; declared are {', '.join(self.outputs)}")
        for port, cls in self.outputs.items():
            if not isinstance(result[port], cls | None):
                raise StageError(
                    f"{self.name}: the output {port!r} is a {type(result[port]).__name__}, not a {cls.__name__}"
                )
        return result

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


def stage(
    *,
    version: int,
    roles: Mapping[str, Count],
    inputs: Mapping[str, type],
    outputs: Mapping[str, type],
    messages: Mapping[str, Message],
    params: type[Params] = Params,
    parameters: Callable[[Any, int], int] | None = None,
    cost: Callable[[Any], tuple[float, float] | None] | None = None,
    memory: Callable[[Any, int, int], int] | None = None,
    extra: str = "",
    keys: Collection[str] = (),
) -> Callable[[Callable[..., Any]], Stage]:
    """Declare a stage. Refuses at import what could never be enforced: an unknown role or kind in a message."""

    def declare(function: Callable[..., Any]) -> Stage:
        where = f"{function.__module__}:{function.__name__}"
        if not inspect.iscoroutinefunction(function):
            raise TypeError(f"{where}: a stage is an async function")
        for tag, message in messages.items():
            if isinstance(message, Sealed | Open):
                for role in (message.sender, message.receiver):
                    if role not in roles:
                        raise TypeError(f"{where}: the message {tag!r} names an unknown role {role!r}")
                if set(roles) == {"member"}:
                    raise TypeError(f"{where}: a stage of members only has no {message.kind} messages")
        for port, cls in [*inputs.items(), *outputs.items()]:
            if cls not in KINDS.values():
                raise TypeError(f"{where}: {port!r} is not a Table, Rows, Model or Report")
        if extra and extra not in EXTRAS:
            raise TypeError(f"{where}: there is no extra {extra!r}")
        if not set(keys) <= set(roles) or (keys and "key_bits" not in params.__struct_fields__):
            raise TypeError(f"{where}: keys are of roles, and their length is the parameter key_bits")
        return Stage(
            function,
            version,
            params,
            dict(roles),
            dict(inputs),
            dict(outputs),
            dict(messages),
            parameters,
            cost,
            memory,
            extra,
            tuple(keys),
        )

    return declare


def find(name: str, own: Collection[str] = ()) -> Stage:
    """The stage of a name such as "horizontal.logistic:fit". Raises ContractError, naming near misses.

    `own`: names of stages ("bank.scoring:fit"), or of modules, that this organization has installed beside fedpeer, as
    its policy lists them; nothing else outside fedpeer.algorithms is looked at. They are imported where they are
    looked for: in the daemon, too, which needs the declaration.
    """
    module, _, function = name.partition(":")
    parts = module.split(".")
    if is_own(name, own):
        return _own(module, function)
    if len(parts) != 2 or not function or not all(part.isidentifier() for part in (*parts, function)):
        raise ContractError(f"{name!r} is not the name of a stage", hint='written as "horizontal.logistic:fit"')
    try:
        loaded = importlib.import_module(f"fedpeer.algorithms.{module}")
    except ModuleNotFoundError as error:
        if error.name and error.name.startswith("fedpeer.algorithms"):
            known = algorithms()
            near = difflib.get_close_matches(module, known, n=1)
            hint = (
                f"did you mean {near[0]!r}?"
                if near
                else f"there is: {', '.join(known)}; one of your own must be in the policy, modules = [{name!r}]"
            )
            raise ContractError(f"there is no algorithm {module!r}", hint=hint) from None
        raise
    return _declared(loaded, module, function)


def is_own(name: str, own: Collection[str]) -> bool:
    """Whether `own` names this stage, or its whole module."""
    return name in own or name.partition(":")[0] in own


def check_own(name: str) -> None:
    """Whether a name may be that of a stage or a module of one's own. Raises ContractError; nothing is imported."""
    module, colon, function = name.partition(":")
    parts = module.split(".")
    if (colon and not function.isidentifier()) or not all(part.isidentifier() for part in parts):
        raise ContractError(f"{name!r} is not the name of a stage", hint='written as "bank.scoring:fit"')
    ours = {"fedpeer", *(known.partition(".")[0] for known in algorithms())}
    if parts[0] in ours or parts[0] in sys.stdlib_module_names:
        raise ContractError(
            f"{name!r} cannot be of your own: {parts[0]!r} is a name of fedpeer's or of Python's",
            hint="put the module into a package with a name of your own, for example of your organization",
        )


def _own(module: str, function: str) -> Stage:
    check_own(f"{module}:{function}")
    try:
        loaded = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and f"{module}.".startswith(f"{error.name}."):
            raise ContractError(
                f"there is no module {module!r} here, which the policy names",
                hint=f"install its package into the environment of the daemon: {sys.prefix}",
            ) from None
        raise
    return _declared(loaded, module, function)


def _declared(loaded: ModuleType, module: str, function: str) -> Stage:
    found = vars(loaded).get(function)
    if not isinstance(found, Stage) or found.function.__module__ != loaded.__name__:
        others = ", ".join(sorted(key for key, value in vars(loaded).items() if isinstance(value, Stage)))
        raise ContractError(f"{module!r} has no stage {function!r}", hint=f"it has: {others}")
    return found


def algorithms() -> list[str]:
    """The names of all modules two levels below fedpeer.algorithms, read from its folders: none is imported."""
    folders = importlib.import_module("fedpeer.algorithms").__path__
    modules = [path for folder in folders for path in Path(folder).glob("*/[!_]*.py")]
    return sorted(f"{path.parent.name}.{path.stem}" for path in modules)
