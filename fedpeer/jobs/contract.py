"""The contract of a job: what people write, what every participant signs, and all that can be wrong with it.

    version = 1
    name = "breast"
    purpose = "risk model of the four clinics"
    expires = 2026-12-01T00:00:00Z                  # default: 30 days from now

    [participants]                                  # alias = a peer's id, a unique beginning of it, or its name
    north = "fp1…"
    south = "hospital-south"

    [[stage]]
    id = "align"
    run = "vertical.align:run"
    roles = { guest = "north", host = ["south"] }   # not needed where the stage has one role: all hold it
    inputs = { table = "dataset:patients" }         # or per alias: { table = { north = "dataset:a", … } }

    [[stage]]
    id = "fit"
    run = "horizontal.logistic:fit"
    inputs = { table = "align.rows" }               # an output of another stage: each peer's own part of it
    params = { reg_lambda = 0.01 }

    [release]
    "fit.model" = "all"                             # default: each peer keeps its own part

    [rules]
    restarts = 2

Rules
* Everything is filled in at submit: ids for names, defaults of parameters, each stage's version and declaration hash,
  a nonce that makes equal texts two jobs. The id of the contract is the hash of its canonical bytes.
* One function, `check`, says whether a contract can run, for the submitter and for every peer that receives it. It is
  pure: what stages exist is an argument. Whatever is wrong is a ContractError that names the entry as people wrote it.
* A misspelt word is answered with the nearest right one.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from typing import Annotated, Any, Literal, TypeVar

import msgspec

from fedpeer import codec
from fedpeer.aggregation.names import MIN_PARTIES, Profile
from fedpeer.aggregation.request import Terms
from fedpeer.crypto import hash_
from fedpeer.errors import ContractError, FedpeerError, LocalProtocolError
from fedpeer.jobs import graph
from fedpeer.secure import fixedpoint
from fedpeer.stage import KINDS, MAX_PEERS, Model, Params, Report, Stage, Sum, Table

FindStage = Callable[[str], Stage]
T = TypeVar("T")

NONCE_BYTES = 16
EXPIRES_S = 30 * 24 * 3600
MAX_EXPIRES_S = 366 * 24 * 3600
SKEW_S = 300  # clocks of organizations may differ by this much
MAX_STAGES = 64
DATASET = "dataset:"

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
WORD = re.compile(r"[a-z0-9][a-z0-9_-]{0,31}")
"""Of an alias and of the id of a stage."""

Nonce = Annotated[bytes, msgspec.Meta(min_length=NONCE_BYTES, max_length=NONCE_BYTES)]
Digest = Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
Text = Annotated[str, msgspec.Meta(max_length=2000)]
Parties = Annotated[int, msgspec.Meta(ge=2, le=MAX_PEERS)]
ProfileName = Literal["byz", "crash"]
Stall = Annotated[int, msgspec.Meta(ge=1, le=MAX_EXPIRES_S)]
Restarts = Annotated[int, msgspec.Meta(ge=0, le=100)]


class Participant(codec.Record, frozen=True):
    alias: str
    peer: str


class Input(codec.Record, frozen=True):
    """Where a port gets its value: "dataset:NAME" or "stage.output"; `alias` "" means every holder of a role."""

    port: str
    alias: str
    source: str


class StageEntry(codec.Record, frozen=True):
    id: str
    run: str
    version: int
    declaration: Digest
    roles: tuple[tuple[str, str], ...]
    """(alias, role) in the order of the participants; who holds none takes no part in this stage."""
    inputs: tuple[Input, ...]
    params: str
    """Canonical JSON, defaults included."""

    @property
    def role_of(self) -> dict[str, str]:
        return dict(self.roles)

    @property
    def needs(self) -> set[str]:
        """Ids of the stages that feed this one."""
        return {item.source.partition(".")[0] for item in self.inputs if not item.source.startswith(DATASET)}

    def sources(self, alias: str) -> dict[str, str]:
        """port → source at this participant."""
        return {item.port: item.source for item in self.inputs if item.alias in ("", alias)}


class Release(codec.Record, frozen=True):
    output: str
    """ "stage.output" """
    to: Literal["all"]


class Rules(codec.Record, frozen=True):
    """What the participants hold each other to."""

    min_parties: Parties = 3
    """A sum over fewer contributors is never opened: more hide one's values better, fewer may be away."""
    profile: ProfileName = "byz"
    """Against whom the sums hold: "byz" against participants that lie, "crash" where all run unmodified software and
    more of them may be away. Three participants have "crash" only, whatever is written here."""
    stall_s: Stall = 3600
    """A participant that is not reachable for so long while the job waits for it ends it."""
    restarts: Restarts = 2
    """So often a worker that crashed is started again, in each stage."""
    answer_s: Stall = 3600
    """A participant that has not agreed so long after it received the contract refuses it."""

    @property
    def terms(self) -> Terms:
        """What they say of sums."""
        return Terms(self.profile, self.min_parties, self.stall_s)


class Contract(codec.Record, frozen=True):
    """Everything the participants sign."""

    version: Literal[1]
    name: str
    purpose: Text
    nonce: Nonce
    expires: Annotated[int, msgspec.Meta(ge=0, lt=1 << 40)]
    """Seconds since 1970, UTC."""
    initiator: str
    """The alias of who submitted it."""
    participants: tuple[Participant, ...]
    stages: tuple[StageEntry, ...]
    release: tuple[Release, ...]
    rules: Rules

    @property
    def peer_of(self) -> dict[str, str]:
        """alias → peer id, in the contract's order."""
        return {item.alias: item.peer for item in self.participants}

    @property
    def alias_of(self) -> dict[str, str]:
        return {item.peer: item.alias for item in self.participants}

    @property
    def peers(self) -> list[str]:
        return [item.peer for item in self.participants]

    def stage(self, stage_id: str) -> StageEntry:
        return next(entry for entry in self.stages if entry.id == stage_id)

    def in_order(self) -> list[StageEntry]:
        """The stages, each after those that feed it."""
        return [self.stage(stage_id) for stage_id in graph.in_order({entry.id: entry.needs for entry in self.stages})]

    def datasets(self, alias: str) -> dict[tuple[str, str], str]:
        """(stage, port) → name of the dataset that this participant brings."""
        return {
            (entry.id, port): source.removeprefix(DATASET)
            for entry in self.stages
            if alias in entry.role_of
            for port, source in entry.sources(alias).items()
            if source.startswith(DATASET)
        }


def contract_id(body: bytes) -> bytes:
    """The id of the contract with these canonical bytes."""
    return hash_("fp.contract", body)


def form(contract: Contract) -> bytes:
    """What a contract has in common with those that are the same in everything but nonce and expiry: a hash."""
    return hash_("fp.form", codec.encode(msgspec.structs.replace(contract, nonce=bytes(NONCE_BYTES), expires=0)))


def outputs_equal(contract: Contract, find: FindStage) -> list[tuple[str, str]]:
    """(stage, output) of what must be the same bytes at every holder: models trained by members, and what is released.

    Only a stage whose one role is "member" and that talks to others makes equal outputs.
    """
    released = {item.output for item in contract.release}
    return [
        (entry.id, name)
        for entry in contract.stages
        for name, kind in sorted(find(entry.run).outputs.items())
        if f"{entry.id}.{name}" in released or (kind is Model and _is_common(find(entry.run)))
    ]


def sums_of(contract: Contract, entry: StageEntry, find: FindStage) -> Profile | None:
    """How many may lie, pool or be away in the secure sums of a stage; None if it makes none. Raises ContractError."""
    messages = _find(find, entry.run, f"stage {entry.id!r}").messages
    sums = {tag: message for tag, message in messages.items() if isinstance(message, Sum)}
    if not sums:
        return None
    held, least = len(entry.roles), max(MIN_PARTIES, contract.rules.min_parties)
    if held < least:
        raise ContractError(
            f"stage {entry.id!r}: {entry.run!r} makes secure sums, which take at least {least} participants; it has "
            f"{held}",
            hint="a sum of two shows each the other's value" if least == MIN_PARTIES else f"min_parties is {least}",
        )
    for tag, message in sums.items():
        if not fixedpoint.fits(held, message.bits):
            raise ContractError(
                f"stage {entry.id!r}: {entry.run!r} sums {tag!r} in values of {message.bits} bits, and with {held} "
                f"participants that would wrap",
                hint="the stage declares fewer bits, or fewer take part",
            )
    try:
        return contract.rules.terms.among(held)
    except LocalProtocolError as error:
        raise ContractError(f"stage {entry.id!r}: {error.message}") from None


def summing(contract: Contract, find: FindStage) -> list[str]:
    """The peers that have secure sums, in order; the same in all stages that make any."""
    for entry in contract.stages:
        if _sums(find(entry.run)):
            return [contract.peer_of[alias] for alias in entry.role_of]
    return []


def _sums(stage: Stage, group: str = "") -> bool:
    """Whether it makes secure sums; with a group: of that one."""
    return any(isinstance(message, Sum) and group in ("", message.group) for message in stage.messages.values())


# from text


class _WrittenStage(msgspec.Struct, forbid_unknown_fields=True):
    id: str
    run: str
    roles: dict[str, str | list[str]] = {}
    inputs: dict[str, str | dict[str, str]] = {}
    params: dict[str, Any] = {}


class _WrittenRules(msgspec.Struct, forbid_unknown_fields=True):
    min_parties: Parties = Rules.__struct_defaults__[0]
    profile: ProfileName = Rules.__struct_defaults__[1]
    stall_s: Stall = Rules.__struct_defaults__[2]
    restarts: Restarts = Rules.__struct_defaults__[3]
    answer_s: Stall = Rules.__struct_defaults__[4]


class _Written(msgspec.Struct, forbid_unknown_fields=True):
    version: int
    name: str
    participants: dict[str, str]
    stage: list[_WrittenStage]
    purpose: str = ""
    expires: datetime | None = None
    initiator: str | None = None
    release: dict[str, str] = {}
    rules: _WrittenRules = msgspec.field(default_factory=_WrittenRules)


def parse(text: str, *, me: str, resolve: Callable[[str], str], find: FindStage, now: int, nonce: bytes) -> Contract:
    """The contract of a TOML text, submitted by the peer `me` at `now`. Raises ContractError.

    `resolve` turns what people call a peer into its id (raising a FedpeerError for an unknown one).
    """
    written = _read_toml(text)
    participants = []
    for alias, ref in written.participants.items():
        try:
            participants.append(Participant(alias, resolve(ref)))
        except FedpeerError as error:
            raise ContractError(
                f'[participants] {alias} = "{ref}": {error.message}', hint=error.hint or "fedpeer peer list"
            ) from None
    aliases = [item.alias for item in participants]
    mine = [item.alias for item in participants if item.peer == me]
    if not mine:
        raise ContractError("[participants] does not name this peer", hint=f'add a line such as me = "{me}"')
    if written.initiator not in (None, mine[0]):
        raise ContractError(f'initiator = "{written.initiator}", but it is submitted by {mine[0]!r}')
    stages = tuple(_fill_in(entry, aliases, find) for entry in written.stage)
    if written.expires is not None and written.expires.tzinfo is None:
        raise ContractError("expires has no time zone", hint="write 2026-12-01T00:00:00Z")
    expires = now + EXPIRES_S if written.expires is None else int(written.expires.timestamp())
    if not now < expires <= now + MAX_EXPIRES_S:
        raise ContractError("expires must lie in the future, at most a year from now")
    for output, to in written.release.items():
        if to != "all":
            raise ContractError(f'[release] "{output}" = "{to}"', hint='only "all" can be given')
    contract = Contract(
        1,
        written.name,
        written.purpose,
        nonce,
        expires,
        mine[0],
        tuple(participants),
        stages,
        tuple(Release(output, "all") for output in sorted(written.release)),
        Rules(**msgspec.structs.asdict(written.rules)),
    )
    check(contract, find)
    return contract


def _read_toml(text: str) -> _Written:
    try:
        tree = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ContractError(f"the contract is not TOML: {error}") from None
    _known_keys(tree, _Written, "the contract")
    if tree.get("version") != 1:
        raise ContractError("this release reads contracts of version 1", hint="the first line is: version = 1")
    if isinstance(tree.get("rules"), dict):
        _known_keys(tree["rules"], _WrittenRules, "[rules]")
    if isinstance(tree.get("stage"), dict):
        raise ContractError("a stage begins with [[stage]], in double brackets")
    for number, entry in enumerate(tree["stage"] if isinstance(tree.get("stage"), list) else (), start=1):
        if isinstance(entry, dict):
            _known_keys(entry, _WrittenStage, _where(entry, number))
    return _convert(tree, _Written, "the contract")


def _fill_in(entry: _WrittenStage, aliases: Sequence[str], find: FindStage) -> StageEntry:
    where = f"stage {entry.id!r}"
    stage = _find(find, entry.run, where)
    if entry.roles:
        role_of: dict[str, str] = {}
        for role, holders in entry.roles.items():
            _one_of(role, stage.roles, f"{where}: {entry.run!r} has no role")
            for alias in [holders] if isinstance(holders, str) else holders:
                _one_of(alias, aliases, f"{where}, roles: there is no participant")
                if alias in role_of:
                    raise ContractError(f"{where}: {alias!r} is given two roles")
                role_of[alias] = role
    elif len(stage.roles) == 1:
        role_of = dict.fromkeys(aliases, next(iter(stage.roles)))
    else:
        example = ", ".join(f'{role} = "{alias}"' for role, alias in zip(stage.roles, aliases, strict=False))
        raise ContractError(
            f"{where}: {entry.run!r} has the roles {', '.join(sorted(stage.roles))}",
            hint=f"add roles = {{ {example} }}",
        )
    inputs = []
    for port, source in sorted(entry.inputs.items()):
        _one_of(port, stage.inputs, f"{where}: {entry.run!r} has no input")
        if isinstance(source, str):
            inputs.append(Input(port, "", source))
            continue
        for alias in source:
            _one_of(alias, aliases, f"{where}, inputs: there is no participant")
        inputs += [Input(port, alias, source[alias]) for alias in aliases if alias in source]
    return StageEntry(
        entry.id,
        entry.run,
        stage.version,
        stage.declaration_hash(),
        tuple((alias, role_of[alias]) for alias in aliases if alias in role_of),
        tuple(inputs),
        canonical_params(entry.params, stage, where),
    )


def canonical_params(given: Mapping[str, Any], stage: Stage, where: str) -> str:
    """Parameters checked against the stage's, with defaults, as canonical JSON. Raises ContractError."""
    for name in given:
        _one_of(name, stage.params.__struct_fields__, f"{where}: {stage.name!r} has no parameter")
    params = _convert(dict(given), stage.params, f"{where}, params")
    try:
        return msgspec.json.encode(params, order="sorted").decode()
    except (TypeError, ValueError) as error:
        raise ContractError(f"{where}, params: {error}") from None


def read_params(entry: StageEntry, stage: Stage) -> Params:
    """The typed parameters of a stage of a checked contract."""
    return msgspec.json.decode(entry.params, type=stage.params)


# from bytes


def read(body: bytes) -> Contract:
    """The contract of canonical bytes that came from elsewhere. Raises RemoteProtocolError. `check` it afterwards."""
    return codec.decode_as(Contract, body)


# what can be wrong with it


def check(contract: Contract, find: FindStage) -> None:
    """Whether it can run, as far as its own text and the stages known here say. Raises ContractError."""
    _check_participants(contract)
    if not contract.stages:
        raise ContractError("there is no stage", hint="add a [[stage]] with id and run")
    if len(contract.stages) > MAX_STAGES:
        raise ContractError(f"{len(contract.stages)} stages, where at most {MAX_STAGES} are allowed")
    known: dict[str, tuple[StageEntry, Stage]] = {}
    for entry in contract.stages:
        if not WORD.fullmatch(entry.id):
            raise ContractError(f"{entry.id!r} is not an id for a stage", hint="1 to 32 of a-z, 0-9, - and _")
        if entry.id in known:
            raise ContractError(f"two stages have the id {entry.id!r}")
        known[entry.id] = entry, _find(find, entry.run, f"stage {entry.id!r}")
    for entry, stage in known.values():
        _check_stage(contract, entry, stage)
        _check_inputs(contract, entry, stage, known)
    _check_sums(contract, known)
    contract.in_order()
    for item in contract.release:
        where = f'[release] "{item.output}"'
        entry, stage, kind = _output(item.output, known, where)
        if kind not in (Model, Report):
            raise ContractError(f"{where}: rows are never released", hint="a model or a report can be")
        if not _is_common(stage) or len(entry.roles) < len(contract.participants):
            raise ContractError(f"{where}: not every participant has this output of {entry.run!r}")
    if len({item.output for item in contract.release}) < len(contract.release):
        raise ContractError("[release] names an output twice")
    if len(codec.encode(contract)) > codec.MAX_RECORD // 2:
        raise ContractError(f"the contract is larger than {codec.MAX_RECORD // 2} bytes")


def _check_participants(contract: Contract) -> None:
    if not NAME.fullmatch(contract.name):
        raise ContractError(
            f"{contract.name!r} is not a name for a job", hint="1 to 64 of letters, digits, dot, - and _"
        )
    aliases = [item.alias for item in contract.participants]
    for alias in aliases:
        if not WORD.fullmatch(alias):
            raise ContractError(f"{alias!r} is not an alias", hint="1 to 32 of a-z, 0-9, - and _")
    if len(set(aliases)) < len(aliases):
        raise ContractError("[participants] has an alias twice")
    seen: dict[str, str] = {}
    for alias, peer in contract.peer_of.items():
        if peer in seen:
            raise ContractError(f"[participants] {seen[peer]} and {alias} are the same peer")
        seen[peer] = alias
    if len(aliases) > MAX_PEERS:
        raise ContractError(f"[participants] has {len(aliases)} entries, where at most {MAX_PEERS} are allowed")
    if contract.initiator not in aliases:
        raise ContractError(f"the initiator {contract.initiator!r} is not a participant")


def _check_sums(contract: Contract, known: Mapping[str, tuple[StageEntry, Stage]]) -> None:
    """No two sums are over other participants, or only where it does not show: their difference is one's values.

    So all stages with sums are held by the same; and where somebody may be away, one stage has sums that are not bound
    to those in the first: in the others the same could be asked again, over others.
    """
    summing = [entry for entry, stage in known.values() if _sums(stage)]
    for entry in summing[1:]:
        if entry.role_of.keys() != summing[0].role_of.keys():
            raise ContractError(
                f"stages {summing[0].id!r} and {entry.id!r} make secure sums over different participants: the "
                f"difference of two sums would tell the values of those who are in one only",
                hint="the same participants take part in every stage with sums",
            )
    free = [entry for entry, stage in known.values() if _sums(stage, "turn")]
    for entry in free[1:]:
        profile = sums_of(contract, entry, {other.run: stage for other, stage in known.values()}.__getitem__)
        if profile is not None and profile.m_min < profile.n:
            raise ContractError(
                f"stages {free[0].id!r} and {entry.id!r} make secure sums by turns, from which somebody may be away: "
                f"the difference of two sums would tell the values of who is in one only",
                hint=f"min_parties = {profile.n} in [rules]: then nobody may be away; or one contract has one of them",
            )


def _check_stage(contract: Contract, entry: StageEntry, stage: Stage) -> None:
    where = f"stage {entry.id!r}"
    if (entry.version, entry.declaration) != (stage.version, stage.declaration_hash()):
        raise ContractError(
            f"{where}: {entry.run!r} is another release there (version {entry.version}) than here "
            f"(version {stage.version})",
            hint="install the same release of fedpeer at all participants",
        )
    if missing := stage.missing():
        raise ContractError(
            f"{where}: {entry.run!r} needs the extra {stage.extra!r}, and {', '.join(missing)} is not installed here",
            hint=f"pip install 'fedpeer[{stage.extra}]', then start the daemon again",
        )
    order = [alias for alias in contract.peer_of if alias in entry.role_of]
    if [alias for alias, _ in entry.roles] != order:
        raise ContractError(f"{where}: roles are given to who is no participant, or not in order")
    held = [role for _, role in entry.roles]
    for role in held:
        _one_of(role, stage.roles, f"{where}: {entry.run!r} has no role")
    for role, count in stage.roles.items():
        n = held.count(role)
        if n not in count:
            allowed = f"at least {count.least}" if n < count.least else f"at most {count.most}"
            raise ContractError(f"{where}: {n} participants hold the role {role!r}, {entry.run!r} takes {allowed}")
    sums_of(contract, entry, lambda _: stage)
    try:
        params = msgspec.json.decode(entry.params)
    except msgspec.DecodeError as error:
        raise ContractError(f"{where}, params: {error}") from None
    if not isinstance(params, dict) or canonical_params(params, stage, where) != entry.params:
        raise ContractError(f"{where}: params are not in canonical form")


def _check_inputs(
    contract: Contract, entry: StageEntry, stage: Stage, known: Mapping[str, tuple[StageEntry, Stage]]
) -> None:
    where = f"stage {entry.id!r}"
    places = [(item.port, item.alias) for item in entry.inputs]
    if len(set(places)) < len(places):
        raise ContractError(f"{where}: an input is given twice")
    for item in entry.inputs:
        _one_of(item.port, stage.inputs, f"{where}: {entry.run!r} has no input")
        if item.alias and (item.alias not in entry.role_of or (item.port, "") in places):
            raise ContractError(f"{where}, input {item.port!r}: {item.alias!r} has no role here, or two sources")
        wanted = stage.inputs[item.port]
        spot = f"{where}, input {item.port!r}"
        if item.source.startswith(DATASET):
            if not NAME.fullmatch(item.source.removeprefix(DATASET)):
                raise ContractError(
                    f"{spot}: {item.source!r} does not name a dataset", hint='written as "dataset:NAME"'
                )
            if wanted is not Table:
                raise ContractError(f"{spot} takes a {_kind(wanted)}, and a dataset is a table")
            continue
        source, _, kind = _output(item.source, known, spot)
        if kind is not wanted:
            raise ContractError(f"{spot} takes a {_kind(wanted)}, and {item.source!r} is a {_kind(kind)}")
        for alias in [item.alias] if item.alias else list(entry.role_of):
            if alias not in source.role_of:
                raise ContractError(f"{spot}: {alias!r} has no part in {source.id!r}")
    for alias in entry.role_of:
        for port in stage.inputs:
            if port not in entry.sources(alias):
                whose = "" if not any(p == port for p, _ in places) else f" for {alias!r}"
                raise ContractError(f"{where}: the input {port!r} of {entry.run!r} is not given{whose}")


def check_columns(entry: StageEntry, find: FindStage, dataset: str, columns: Sequence[str]) -> None:
    """Whether a dataset has the columns that the parameter `columns` of a stage names. Raises ContractError."""
    named = getattr(read_params(entry, find(entry.run)), "columns", None)
    for name in named if isinstance(named, list | tuple | dict) else ():
        _one_of(name, columns, f"stage {entry.id!r}, params: the dataset {dataset!r} has no column")


def _output(source: str, known: Mapping[str, tuple[StageEntry, Stage]], where: str) -> tuple[StageEntry, Stage, type]:
    stage_id, dot, name = source.partition(".")
    if not dot:
        raise ContractError(f"{where}: {source!r} names nothing", hint='written as "dataset:NAME" or "stage.output"')
    _one_of(stage_id, known, f"{where}: there is no stage")
    entry, stage = known[stage_id]
    _one_of(name, stage.outputs, f"{where}: {entry.run!r} has no output")
    return entry, stage, stage.outputs[name]


def _is_common(stage: Stage) -> bool:
    """Whether each participant ends with the same: all in one role, and only sums and agreed values between them."""
    return set(stage.roles) == {"member"} and bool(stage.messages)


def _kind(cls: type) -> str:
    return next(name for name, known in KINDS.items() if known is cls)


def _find(find: FindStage, run: str, where: str) -> Stage:
    try:
        return find(run)
    except ContractError as error:
        raise ContractError(f"{where}: {error.message}", hint=error.hint) from None


def _where(entry: Mapping[str, Any], number: int) -> str:
    return f"stage {entry['id']!r}" if isinstance(entry.get("id"), str) else f"stage number {number}"


def _known_keys(table: Mapping[str, Any], kind: type[msgspec.Struct], where: str) -> None:
    for key in table:
        _one_of(key, kind.__struct_fields__, f"{where} has an unknown entry")


def _one_of(word: str, words: Iterable[str], complaint: str) -> None:
    """Raise "<complaint> 'word'", with the nearest of `words` as hint, unless it is one of them."""
    words = list(words)
    if word in words:
        return
    near = difflib.get_close_matches(word, words, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"there is: {', '.join(sorted(words)) or 'none'}"
    raise ContractError(f"{complaint} {word!r}", hint=hint)


def _convert(value: Any, kind: type[T], where: str) -> T:
    try:
        return msgspec.convert(value, kind, strict=True)
    except msgspec.ValidationError as error:
        raise ContractError(f"{where}: {error}") from None
