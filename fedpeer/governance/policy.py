"""The policy of this organization: what may be computed on its data, and where its text is kept.

    min_rows = 200                       # every key has a strict default; `fedpeer policy show` prints them all
    approve = "ask"                      # what no rule decides

    [[rule]]                             # the first rule that matches a stage decides about it
    do = "auto"
    stages = ["horizontal.statistics:*"]
    datasets = ["trial-*"]
    partners = ["clinic-south", "clinic-north"]
    until = 2026-12-31T00:00:00Z
    min_rows = 50                        # bounds hold always; only a rule that names one lowers it

Rules
* One TOML text, kept in the store with its number, who set it and when; the latest counts. Without any the defaults do,
  and they are those of the threat model. An unknown key is refused with the nearest known one.
* A rule that permits ("auto") matches a stage when ALL its own datasets, columns and partners match; one that restricts
  ("ask", "refuse") when ANY does. So a column that is to be kept back cannot be hidden beside others.
* A partner is named by its id, or by the name that it has in our roster. Nobody else can give itself that name here.
* A text that cannot be read is never half a policy: it is refused when it is set, and jobs are refused when it is kept.
* While the text that counts says two_person, another counts only when two people (uids) have set the very same: who
  could change the policy alone could approve alone, by any of its keys.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Collection, Mapping
from datetime import datetime
from fnmatch import fnmatchcase
from typing import Annotated, Any, Literal

import msgspec

from fedpeer.config import nearest
from fedpeer.crypto import hash_
from fedpeer.errors import ConfigError, ContractError, PolicyError
from fedpeer.stage import MAX_PEERS, check_own
from fedpeer.store import Schema, Transaction

MAX_TEXT = 64 * 1024

SCHEMA = Schema(
    "policy",
    [
        """
        CREATE TABLE policy (
            number INTEGER PRIMARY KEY AUTOINCREMENT,
            text TEXT NOT NULL,
            uid INTEGER NOT NULL,  -- of who set it
            time TEXT NOT NULL
        ) STRICT;
        """,
        """
        CREATE TABLE policy_waiting (
            uid INTEGER PRIMARY KEY,  -- of who set it, and nobody else so far
            text TEXT NOT NULL,
            time TEXT NOT NULL
        ) STRICT;
        """,
    ],
)

Globs = Annotated[tuple[Annotated[str, msgspec.Meta(min_length=1, max_length=256)], ...], msgspec.Meta(max_length=256)]
Parties = Annotated[int, msgspec.Meta(ge=2, le=MAX_PEERS)]
Colluders = Annotated[int, msgspec.Meta(ge=0, le=MAX_PEERS)]
Count = Annotated[int, msgspec.Meta(ge=0, le=10**12)]
Amount = Annotated[float, msgspec.Meta(ge=0)]
Do = Literal["auto", "ask", "refuse"]


class Rule(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is done with stages of one kind. A list that is left out matches everything."""

    do: Do
    stages: Globs | None = None
    datasets: Globs | None = None
    columns: Globs | None = None
    partners: Globs | None = None
    purpose: Globs | None = None
    from_: datetime | None = msgspec.field(name="from", default=None)
    until: datetime | None = None
    min_parties: Parties | None = None
    assumed_colluders: Colluders | None = None
    min_rows: Count | None = None
    min_cell: Count | None = None
    max_parameters_per_row: Amount | None = None
    max_depth: Count | None = None
    min_batch: Count | None = None
    psi_per_version: Count | None = None
    psi_max_ids: Count | None = None
    min_intersection: Count | None = None


BOUNDS = Rule.__struct_fields__[Rule.__struct_fields__.index("min_parties") :]
"""What a rule may set for the stages that it decides about."""


class Budget(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Privacy that may be spent."""

    epsilon: Annotated[Amount, msgspec.Meta(description="ε of a dataset and a partner in a year.")] = 3.0
    per_job: Annotated[Amount, msgspec.Meta(description="ε of a dataset in one job.")] = 1.0


class Policy(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the text may say. The comment of a key and its default stand side by side here and nowhere else."""

    approve: Annotated[
        Do, msgspec.Meta(description='What no rule decides: "ask" the operator, "auto" (allow), or "refuse".')
    ] = "ask"
    two_person: Annotated[
        bool,
        msgspec.Meta(
            description="Whether two operators must approve a job, and set another policy: the very same text."
        ),
    ] = False
    stages: Annotated[
        Globs, msgspec.Meta(description="What may run at all; anything else is refused, whatever the rules say.")
    ] = ("horizontal.*", "vertical.*", "local.*")
    modules: Annotated[
        Globs,
        msgspec.Meta(
            description="The organization's own stages that may run, of modules installed beside\n"
            'fedpeer: ["bank.scoring:fit"], or ["bank.scoring"] for all of a module. They run in the same sandbox.'
        ),
    ] = ()
    trusted: Annotated[
        Globs,
        msgspec.Meta(
            description="Partners that count as holders of data of their own, by name or id: the others do not count\n"
            "toward min_parties, for they may bring no rows. '*' is every card that you ever added: a partner's, and\n"
            "one that a person of theirs may have made up. Where partners are few, name them."
        ),
    ] = ("*",)
    organizations: Annotated[
        dict[str, Globs],
        msgspec.Meta(
            description="Partners that are one organization count once: { group = ['clinic-a', 'clinic-b'] }.\n"
            "Each of the others is one of its own."
        ),
    ] = {}
    min_parties: Annotated[
        Parties, msgspec.Meta(description="Organizations in a sum at least: of two, each reads the other's value.")
    ] = 3
    assumed_colluders: Annotated[
        Colluders,
        msgspec.Meta(description="Participants that may pool what they see: two more are in every sum, at least."),
    ] = 1
    min_rows: Annotated[Count, msgspec.Meta(description="Own rows that go into anything that leaves, at least.")] = 100
    min_cell: Annotated[
        Count, msgspec.Meta(description="Rows behind a released cell, bin, cluster or leaf, at least.")
    ] = 10
    max_parameters_per_row: Annotated[
        Amount, msgspec.Meta(description="Numbers that a model fits, for each own row, at most; inf: no bound.")
    ] = 0.33
    max_depth: Annotated[Count, msgspec.Meta(description="Depth of a tree at most.")] = 6
    min_batch: Annotated[Count, msgspec.Meta(description="Rows behind a gradient at least.")] = 64
    no_row_differencing: Annotated[
        bool,
        msgspec.Meta(
            description="Refuse rows that differ from rows answered before in 1 to min_cell - 1, and the same with\n"
            "cells of another size: the difference of both answers would show them."
        ),
    ] = True
    no_party_differencing: Annotated[
        bool,
        msgspec.Meta(
            description="Refuse sums over the same rows again with a few participants more or less: the difference of\n"
            "both would tell theirs."
        ),
    ] = True
    jobs_per_day: Annotated[Count, msgspec.Meta(description="Jobs that one organization may propose in 24 hours.")] = 20
    psi_per_version: Annotated[
        Count, msgspec.Meta(description="Alignments with one organization, for each version of a dataset, at most.")
    ] = 1
    psi_max_ids: Annotated[
        Count, msgspec.Meta(description="Ids that a partner may ask about in an alignment, at most.")
    ] = 10_000
    min_intersection: Annotated[
        Count, msgspec.Meta(description="An alignment with fewer common ids must fail, without telling how many.")
    ] = 100
    sandbox: Annotated[
        Literal["required", "best-effort"],
        msgspec.Meta(description='"required": no job runs where a layer of the workers\' sandbox is missing.'),
    ] = "required"
    budget: Budget = Budget()
    rule: Annotated[tuple[Rule, ...], msgspec.Meta(max_length=1000)] = ()

    @property
    def people(self) -> int:
        """How many approve a job that is asked about."""
        return 2 if self.two_person else 1

    def is_counted(self, peer: str, name: str) -> bool:
        """Whether a partner counts as a holder of data."""
        return any(fnmatchcase(word, pattern) for word in (peer, name) for pattern in self.trusted)

    def organization(self, peer: str, name: str) -> str:
        """The organization of a peer; its id where it is one of its own."""
        for organization, patterns in sorted(self.organizations.items()):
            if any(fnmatchcase(word, pattern) for word in (peer, name) for pattern in patterns):
                return organization
        return peer


DEFAULT = Policy()


# its text


def parse(text: str) -> Policy:
    """The policy of a TOML text. Raises ConfigError naming the entry, with the nearest word for an unknown one."""
    if len(text.encode(errors="replace")) > MAX_TEXT:
        raise ConfigError(f"the policy has more than {MAX_TEXT} bytes")
    try:
        tree = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigError(f"the policy is not TOML: {error}") from None
    _known(tree, [*Policy.__struct_fields__], "the policy")
    if isinstance(tree.get("rule"), dict):
        raise ConfigError("a rule of the policy begins with [[rule]], in double brackets")
    if isinstance(tree.get("budget"), dict):
        _known(tree["budget"], [*Budget.__struct_fields__], "[budget]")
    for number, entry in enumerate(tree["rule"] if isinstance(tree.get("rule"), list) else (), start=1):
        if isinstance(entry, dict):
            _known(entry, [*Rule.__struct_encode_fields__], f"rule {number}")
    try:
        policy = msgspec.convert(tree, Policy)
    except msgspec.ValidationError as error:
        raise ConfigError(f"the policy: {error}") from None
    for name in policy.modules:
        try:
            check_own(name)
        except ContractError as error:
            raise ConfigError(f"modules: {error.message}", hint=error.hint) from None
    for number, rule in enumerate(policy.rule, start=1):
        _check(rule, f"rule {number}")
    return policy


def _check(rule: Rule, where: str) -> None:
    for moment in (rule.from_, rule.until):
        if moment is not None and moment.tzinfo is None:
            raise ConfigError(f"{where}: {moment} has no time zone", hint="write 2026-12-01T00:00:00Z")
    if rule.from_ is not None and rule.until is not None and rule.from_ >= rule.until:
        raise ConfigError(f"{where}: it ends before it begins")
    if rule.do == "refuse" and any(getattr(rule, bound) is not None for bound in BOUNDS):
        raise ConfigError(f"{where}: what is refused has no bounds")


def _known(table: Mapping[str, Any], known: list[str], where: str) -> None:
    for key in table:
        if key not in known:
            raise ConfigError(f"{where}: unknown key {key!r}", hint=nearest(key, known))


def _default_text() -> str:
    """The defaults as commented TOML, every key commented out."""
    lines = [
        "# What may be computed on this organization's data, and with whom. Strict where nothing is said: the values",
        "# below are the defaults. `fedpeer policy edit` changes them, `fedpeer policy test` tells the effect.",
    ]
    for defaults, title in ((DEFAULT, ""), (DEFAULT.budget, "budget")):
        lines += ["", f"# [{title}]"] if title else []
        for field in msgspec.inspect.type_info(type(defaults)).fields:  # type: ignore[attr-defined]
            if field.name in ("budget", "rule"):
                continue
            lines += ["", *(f"# {line}" for line in field.type.extra_json_schema["description"].splitlines())]
            lines.append(f"# {field.name} = {json.dumps(getattr(defaults, field.name))}")
    return "\n".join(lines) + _EXAMPLE


_EXAMPLE = """

# Rules come last. The first that matches a stage decides: do = "auto", "ask" or "refuse". "auto" takes all datasets,
# columns and partners of the stage to match, the others any. Bounds hold always, unless a rule names one.
#
# [[rule]]
# do = "auto"
# stages = ["horizontal.statistics:*"]
# datasets = ["trial-*"]
# columns = ["age", "dose"]
# partners = ["clinic-south"]
# purpose = ["*quality*"]
# until = 2027-01-01T00:00:00Z
# min_rows = 200
"""
TEXT = _default_text()
"""The commented default: as a policy it says nothing, and so is DEFAULT."""


def digest(text: str) -> bytes:
    """What names a text in logs and audits."""
    return hash_("fp.policy", text.encode())


# in the store


class Kept(msgspec.Struct, frozen=True, kw_only=True):
    """A text of the store; number 0 is the default, which nobody set."""

    number: int
    text: str
    uid: int | None
    time: str


class Waiting(msgspec.Struct, frozen=True, kw_only=True):
    """A text that one person has set, where two must."""

    uid: int
    text: str
    time: str


def kept(tx: Transaction) -> Kept:
    """The text that counts."""
    row = tx.one("SELECT number, text, uid, time FROM policy ORDER BY number DESC LIMIT 1")
    return (
        Kept(number=0, text=TEXT, uid=None, time="") if row is None else Kept(**dict(zip(_COLUMNS, row, strict=True)))
    )


_COLUMNS = ("number", "text", "uid", "time")


def current(tx: Transaction) -> Policy:
    """The policy that counts. Raises PolicyError if what is kept cannot be read: then nothing is allowed."""
    found = kept(tx)
    try:
        return parse(found.text)
    except ConfigError as error:
        raise PolicyError(
            f"policy {found.number} of this peer cannot be read: {error.message}",
            hint="`fedpeer policy set FILE` replaces it",
        ) from None


def waiting(tx: Transaction) -> list[Waiting]:
    """The texts that wait for a second person, oldest first."""
    rows = tx.all("SELECT uid, text, time FROM policy_waiting ORDER BY time, uid")
    return [Waiting(uid=uid, text=text, time=time) for uid, text, time in rows]


def keep(tx: Transaction, text: str, uid: int, time: str, after: int | None = None) -> Kept | None:
    """From now on this text counts; None if it waits for a second person, in place of what `uid` set before.

    `after`: the number of the text that it was made from, if it was. Raises ConfigError, and nothing changes, for a
    text that is no policy, and if another was set meanwhile.
    """
    parse(text)
    latest = kept(tx)
    if after is not None and latest.number != after:
        raise ConfigError(f"the policy was changed meanwhile, by uid {latest.uid}", hint="fedpeer policy show")
    if _two_person(latest.text) and not any(one.text == text and one.uid != uid for one in waiting(tx)):
        tx.execute("INSERT OR REPLACE INTO policy_waiting VALUES (?, ?, ?)", (uid, text, time))
        return None
    tx.execute("DELETE FROM policy_waiting")
    tx.execute("INSERT INTO policy (text, uid, time) VALUES (?, ?, ?)", (text, uid, time))
    return kept(tx)


def _two_person(text: str) -> bool:
    """Whether a kept text asks for two, also one that is no policy of this release any more."""
    try:
        return tomllib.loads(text).get("two_person", False) is not False
    except (tomllib.TOMLDecodeError, RecursionError):
        return True


def stricter(bound: str, one: Any, other: Any) -> Any:
    """Of two values of a bound the one that allows less."""
    return max(one, other) if bound.startswith(("min_", "assumed_")) else min(one, other)


def matches(words: Collection[str], patterns: Collection[str]) -> bool:
    """Whether any of the words fits any of the patterns."""
    return any(fnmatchcase(word, pattern) for word in words for pattern in patterns)
