"""The contract: what people write becomes one canonical record, and whatever is wrong in it is named."""

from __future__ import annotations

import re
from typing import Annotated, Any

import msgspec
import pytest

from fedpeer import codec
from fedpeer.errors import ContractError, NotFound, RemoteProtocolError
from fedpeer.jobs import contract
from fedpeer.jobs.contract import Contract
from fedpeer.stage import Model, Open, Params, Report, Rows, Stage, Sum, Table, at_least, exactly, stage

NOW = 1_800_000_000
PEERS = {"north": "fp1north", "south": "fp1south", "east": "fp1east", "west": "fp1west"}


class FitParams(Params, frozen=True):
    reg_lambda: Annotated[float, msgspec.Meta(ge=0)] = 0.01
    max_iter: Annotated[int, msgspec.Meta(ge=1)] = 50
    columns: list[str] | None = None


@stage(
    version=1,
    params=FitParams,
    roles={"member": at_least(3)},
    inputs={"table": Table},
    outputs={"model": Model},
    messages={"gradient": Sum("the sum")},
)
async def fit(peers: Any, params: FitParams, table: Table) -> dict[str, Any]:
    return {}


@stage(
    version=1,
    roles={"member": at_least(1)},
    inputs={"model": Model, "table": Table},
    outputs={"report": Report},
    messages={"counts": Sum("counts", group="data")},
)
async def evaluate(peers: Any, params: Params, model: Model, table: Table) -> dict[str, Any]:
    return {}


@stage(
    version=2,
    roles={"guest": exactly(1), "host": at_least(1)},
    inputs={"table": Table},
    outputs={"rows": Rows},
    messages={"points": Open("guest", "host", "points")},
)
async def align(peers: Any, params: Params, table: Table) -> dict[str, Any]:
    return {}


@stage(
    version=1,
    roles={"member": at_least(1)},
    inputs={"table": Table, "rows": Rows},
    outputs={"table": Table},
    messages={},
)
async def pick(peers: Any, params: Params, table: Table, rows: Rows) -> dict[str, Any]:
    return {}


@stage(version=1, roles={"member": at_least(1)}, inputs={"table": Table}, outputs={"table": Table}, messages={})
async def scale(peers: Any, params: Params, table: Table) -> dict[str, Any]:
    return {}


STAGES = {
    "horizontal.logistic:fit": fit,
    "horizontal.logistic:evaluate": evaluate,
    "vertical.align:run": align,
    "local.select:pick": pick,
    "local.select:scale": scale,
}

TEXT = """
version = 1
name = "breast"
purpose = "a risk model"
[participants]
north = "north"
south = "fp1south"
east = "east"
west = "west"
[[stage]]
id = "fit"
run = "horizontal.logistic:fit"
inputs = { table = "dataset:breast" }
params = { max_iter = 20 }
[[stage]]
id = "evaluate"
run = "horizontal.logistic:evaluate"
inputs = { model = "fit.model", table = "dataset:breast" }
[release]
"fit.model" = "all"
[rules]
restarts = 1
"""

VERTICAL = """
version = 1
name = "joined"
[participants]
bank = "north"
telco = "south"
shop = "east"
[[stage]]
id = "pick"
run = "local.select:pick"
inputs = { table = { bank = "dataset:loans", telco = "dataset:calls", shop = "dataset:carts" }, rows = "align.rows" }
[[stage]]
id = "align"
run = "vertical.align:run"
roles = { guest = "bank", host = ["telco", "shop"] }
inputs = { table = { bank = "dataset:loans", telco = "dataset:calls", shop = "dataset:carts" } }
"""


def find(name: str) -> Stage:
    if name not in STAGES:
        raise ContractError(f"there is no algorithm {name!r}")
    return STAGES[name]


def resolve(ref: str) -> str:
    if ref in PEERS:
        return PEERS[ref]
    if ref in PEERS.values():
        return ref
    raise NotFound(f"there is no peer {ref!r}")


def parse(text: str = TEXT, *, me: str = "fp1north", now: int = NOW, nonce: bytes = bytes(16)) -> Contract:
    return contract.parse(text, me=me, resolve=resolve, find=find, now=now, nonce=nonce)


def test_names_defaults_and_hashes_are_filled_in() -> None:
    read = parse()
    assert read.peer_of == PEERS
    assert (read.initiator, read.expires) == ("north", NOW + 30 * 24 * 3600)
    entry = read.stage("fit")
    assert entry.params == '{"columns":null,"max_iter":20,"reg_lambda":0.01}'
    assert (entry.version, entry.declaration) == (1, fit.declaration_hash())
    assert entry.roles == tuple((alias, "member") for alias in PEERS)
    assert (read.rules.restarts, read.rules.min_parties) == (1, 3)
    assert read.datasets("west") == {("fit", "table"): "breast", ("evaluate", "table"): "breast"}


def test_one_contract_has_one_encoding_and_one_id() -> None:
    body = codec.encode(parse())
    assert contract.read(body) == parse()
    assert codec.encode(contract.read(body)) == body
    assert contract.contract_id(body) == contract.contract_id(codec.encode(parse()))
    other_order = TEXT.replace('run = "horizontal.logistic:fit"\n', "").replace(
        'id = "fit"\n', 'run = "horizontal.logistic:fit"\nid = "fit"\n'
    )
    assert other_order != TEXT
    assert codec.encode(parse(other_order)) == body


def test_a_nonce_makes_equal_texts_two_jobs() -> None:
    one, two = (contract.contract_id(codec.encode(parse(nonce=bytes([i]) * 16))) for i in (1, 2))
    assert one != two


def test_every_field_is_part_of_the_id() -> None:
    changed = {
        TEXT,
        TEXT.replace('"breast"\npurpose', '"breast2"\npurpose'),
        TEXT.replace("a risk model", "another"),
        TEXT.replace("version = 1\n", "version = 1\nexpires = 2027-02-01T00:00:00Z\n"),
        TEXT.replace('west = "west"', 'far = "west"'),
        TEXT.replace("max_iter = 20", "max_iter = 21"),
        TEXT.replace("restarts = 1", "restarts = 2"),
        TEXT.replace('[release]\n"fit.model" = "all"', ""),
        TEXT.replace("dataset:breast", "dataset:breast2"),
    }
    assert len({contract.contract_id(codec.encode(parse(text))) for text in changed}) == len(changed) == 9


def test_bytes_that_are_not_exactly_a_contract_are_refused() -> None:
    body = codec.encode(parse())
    for data in (body + b"\0", body[:-1], b"", codec.encode([1, 2]), codec.encode([*codec.decode(body), 1])):
        with pytest.raises(RemoteProtocolError):
            contract.read(data)


def test_a_vertical_contract_has_roles_and_a_dataset_for_each() -> None:
    read = parse(VERTICAL)
    assert [entry.id for entry in read.in_order()] == ["align", "pick"]
    assert read.stage("align").role_of == {"bank": "guest", "telco": "host", "shop": "host"}
    assert read.stage("pick").sources("telco") == {"table": "dataset:calls", "rows": "align.rows"}
    assert read.datasets("shop") == {("align", "table"): "carts", ("pick", "table"): "carts"}


def test_models_of_members_and_what_is_released_must_be_equal() -> None:
    assert contract.outputs_equal(parse(), find) == [("fit", "model")]
    more = TEXT.replace('"fit.model" = "all"', '"evaluate.report" = "all"')
    assert contract.outputs_equal(parse(more), find) == [("fit", "model"), ("evaluate", "report")]
    assert contract.outputs_equal(parse(VERTICAL), find) == []


def test_a_stage_may_be_held_by_some_of_the_participants() -> None:
    read = parse(TEXT.replace('id = "fit"', 'id = "fit"\nroles = { member = ["west", "north", "east", "south"] }'))
    assert list(read.stage("fit").role_of) == list(PEERS)
    lonely = VERTICAL.replace('id = "pick"', 'id = "pick"\nroles = { member = "bank" }').replace(
        '"dataset:loans", telco = "dataset:calls", shop = "dataset:carts" }, rows', '"dataset:loans" }, rows'
    )
    assert parse(lonely).stage("pick").role_of == {"bank": "member"}


ERRORS = [
    # (what is changed, into what, what the message names, what the hint says)
    ("version = 1\n", "version = 1\ntitle = 2\n", "unknown entry 'title'", ""),
    ('purpose = "a', 'purpos = "a', "unknown entry 'purpos'", "did you mean 'purpose'"),
    ("version = 1\n", "version = 2\n", "version 1", ""),
    ("version = 1\n", "", "version 1", "version = 1"),
    ('name = "breast"\n', "", "name", ""),
    ('name = "breast"\n', "name = 3\n", "name", ""),
    ('name = "breast"\n', 'name = "a b"\n', "'a b' is not a name", ""),
    ("[rules]", "[rules]\nrestart = 1", "[rules] has an unknown entry 'restart'", "did you mean 'restarts'"),
    ("restarts = 1", "restarts = -1", "$.rules.restarts", ""),
    ("restarts = 1", "restarts = true", "rules", ""),
    ("restarts = 1", 'profile = "none"', "$.rules.profile", ""),
    ('id = "fit"\n', 'id = "fit"\nparam = 1\n', "stage 'fit' has an unknown entry 'param'", "did you mean 'params'"),
    ('id = "fit"', 'id = "Fit.1"', "'Fit.1' is not an id", ""),
    ('id = "evaluate"', 'id = "fit"', "two stages have the id 'fit'", ""),
    ('west = "west"', 'west = "wst"', 'west = "wst": there is no peer', ""),
    ('west = "west"', 'west = "east"', "east and west are the same peer", ""),
    ('west = "west"', 'West = "west"', "'West' is not an alias", ""),
    ('north = "north"\n', "", "does not name this peer", ""),
    ("version = 1\n", 'version = 1\ninitiator = "east"\n', "submitted by 'north'", ""),
    ("logistic:fit", "logistik:fit", "stage 'fit': there is no algorithm", ""),
    ("max_iter = 20", "max_itr = 20", "no parameter 'max_itr'", "did you mean 'max_iter'"),
    ("max_iter = 20", "max_iter = 0", "max_iter", ""),
    ("max_iter = 20", 'max_iter = "many"', "max_iter", ""),
    ("max_iter = 20", "reg_lambda = nan", "stage 'fit', params", ""),
    ('{ table = "dataset:breast" }', '{ tabel = "dataset:breast" }', "no input 'tabel'", "did you mean 'table'"),
    ('{ table = "dataset:breast" }', "{ }", "the input 'table' of 'horizontal.logistic:fit' is not given", ""),
    ('{ table = "dataset:breast" }', '{ table = "dataset:a/b" }', "'dataset:a/b' does not name a dataset", ""),
    ('{ table = "dataset:breast" }', '{ table = "breast" }', "'breast' names nothing", "dataset:NAME"),
    ('"fit.model", table', '"fit.modle", table', "no output 'modle'", "did you mean 'model'"),
    ('"fit.model", table', '"fot.model", table', "no stage 'fot'", "did you mean 'fit'"),
    ('"fit.model", table', '"dataset:m", table', "takes a model, and a dataset is a table", ""),
    ('table = "dataset:breast" }\n[release]', 'table = "fit.model" }\n[release]', "'fit.model' is a model", ""),
    ('{ table = "dataset:breast" }', '{ table = { nrth = "dataset:b" } }', "no participant 'nrth'", "'north'"),
    ('{ table = "dataset:breast" }', '{ table = { north = "dataset:b" } }', "is not given for 'south'", ""),
    ('west = "west"', "", "", None),  # three are enough
    ('east = "east"\nwest = "west"', "", "2 participants hold the role 'member', 'horizontal.logistic:fit' takes", ""),
    ('id = "fit"\n', 'id = "fit"\nroles = { membr = "north" }\n', "no role 'membr'", "did you mean 'member'"),
    ('id = "fit"\n', 'id = "fit"\nroles = { member = ["nord"] }\n', "no participant 'nord'", "did you mean 'north'"),
    ('id = "evaluate"', 'id = "evaluate"\nroles = { member = ["north", "west"] }', "at least 3 participants; it", ""),
    ("restarts = 1", "min_parties = 5", "at least 5 participants; it has 4", ""),
    ('"fit.model" = "all"', '"fit.model" = "north"', '"fit.model" = "north"', '"all"'),
    ('"fit.model" = "all"', '"fit.modl" = "all"', "no output 'modl'", "'model'"),
    ("version = 1\n", "version = 1\nexpires = 2026-01-01T00:00:00Z\n", "expires must lie in the future", ""),
    ("version = 1\n", "version = 1\nexpires = 2027-02-01T00:00:00\n", "no time zone", "Z"),
    ("version = 1\n", 'version = 1\nexpires = "soon"\n', "expires", ""),
    ("version = 1\n", "version = 1\nexpires = 0001-01-01T00:00:00+14:00\n", "expires must lie in the future", ""),
    ("version = 1\n", "version = 1\nexpires = 9999-12-31T23:59:59-14:00\n", "at most a year from now", ""),
    ("restarts = 1", "stall_s = 99999999999999999999999999", "stall_s", ""),
    ("restarts = 1", "stall_s = 31622401", "stall_s", ""),
    ("restarts = 1", "stall_s = 31622400", "", None),
    ("[[stage]]", "[stage]", "the contract is not TOML", ""),
    ("[rules]", "[rules", "the contract is not TOML", ""),
]


@pytest.mark.parametrize(("old", "new", "message", "hint"), ERRORS, ids=[f"{e[1][:40]!r}" for e in ERRORS])
def test_what_is_wrong_is_named(old: str, new: str, message: str, hint: str | None) -> None:
    assert old in TEXT
    changed = TEXT.replace(old, new, 1) if old != "[[stage]]" else TEXT.replace(old, new)
    if hint is None:
        parse(changed)
        return
    with pytest.raises(ContractError) as caught:
        parse(changed)
    assert message in caught.value.message
    assert hint in caught.value.hint


def test_stages_with_sums_over_different_participants_are_refused() -> None:
    some = TEXT.replace('id = "evaluate"', 'id = "evaluate"\nroles = { member = ["north", "south", "east"] }')
    with pytest.raises(ContractError, match="'fit' and 'evaluate' make secure sums over different participants"):
        parse(some)
    assert len(parse(TEXT).stages) == 2


def test_two_stages_with_sums_by_turns_are_refused_where_one_may_be_away() -> None:
    """The second could ask the same as the first, over others: the difference is what one has."""
    again = '[[stage]]\nid = "again"\nrun = "horizontal.logistic:fit"\ninputs = { table = "dataset:breast" }\n'
    twice = TEXT.replace("[release]", f"{again}[release]")
    with pytest.raises(ContractError, match="'fit' and 'again' make secure sums by turns") as caught:
        parse(twice)
    assert "min_parties = 4" in caught.value.hint
    assert len(parse(twice.replace("restarts = 1", "min_parties = 4")).stages) == 3, "nobody may be away"
    assert len(parse(twice.replace('west = "west"\n', "")).stages) == 3, "of three nobody ever may"


def test_sums_that_would_wrap_with_so_many_participants_are_refused() -> None:
    messages = {"gradient": Sum("the sum", clip=1.0, bits=22)}
    fine = Stage(fit.function, 1, FitParams, fit.roles, fit.inputs, fit.outputs, messages)
    named = {**STAGES, "horizontal.logistic:fit": fine}

    def parsed(text: str) -> Contract:
        return contract.parse(
            text,
            me="fp1north",
            resolve=lambda ref: PEERS.get(ref, ref),
            find=named.__getitem__,
            now=NOW,
            nonce=bytes(16),
        )

    assert len(parsed(TEXT).peer_of) == 4
    with pytest.raises(
        ContractError, match=r"stage 'fit': .* 'gradient' in values of 22 bits, and with 5 participants"
    ):
        parsed(TEXT.replace("[participants]", '[participants]\nmiddle = "fp1middle"'))


def test_a_single_bracket_of_stage_is_explained() -> None:
    with pytest.raises(ContractError, match=re.escape("[[stage]]")):
        parse('version = 1\nname = "a"\n[participants]\na = "north"\n[stage]\nid = "fit"\n')


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('guest = "bank", host = ["telco", "shop"]', 'guest = ["bank", "telco"], host = "shop"', "2 participants hold"),
        ('guest = "bank", host', 'guest = "telco", host', "'telco' is given two roles"),
        ('roles = { guest = "bank", host = ["telco", "shop"] }\n', "", "has the roles guest, host"),
        ('rows = "align.rows"', 'rows = "pick.table"', "takes a rows, and 'pick.table' is a table"),
        ('bank = "dataset:loans", telco', 'bank = "pick.table", telco', "wait for each other's outputs"),
    ],
)
def test_what_is_wrong_with_roles_and_order_is_named(old: str, new: str, message: str) -> None:
    assert old in VERTICAL
    with pytest.raises(ContractError) as caught:
        parse(VERTICAL.replace(old, new))
    assert message in caught.value.message


def test_a_part_that_somebody_does_not_have_is_named() -> None:
    without_shop = VERTICAL.replace('host = ["telco", "shop"]', 'host = ["telco"]').replace(
        'telco = "dataset:calls", shop = "dataset:carts" } }', 'telco = "dataset:calls" } }'
    )
    with pytest.raises(ContractError, match="'shop' has no part in 'align'"):
        parse(without_shop)


def test_rows_and_what_only_some_have_are_never_released() -> None:
    scaled = TEXT.replace(
        "[release]",
        '[[stage]]\nid = "s"\nrun = "local.select:scale"\n'
        'inputs = { table = "dataset:breast" }\n[release]\n"s.table" = "all"',
    )
    with pytest.raises(ContractError, match="rows are never released"):
        parse(scaled)


def test_another_release_of_a_stage_is_refused() -> None:
    read = parse()
    changed = msgspec.structs.replace(read.stages[0], declaration=bytes(32))
    with pytest.raises(ContractError, match="another release") as caught:
        contract.check(msgspec.structs.replace(read, stages=(changed, *read.stages[1:])), find)
    assert "same release" in caught.value.hint


def test_a_contract_from_elsewhere_is_checked_as_one_of_our_own() -> None:
    read = parse()
    first = read.stages[0]
    bad: list[Contract] = [
        msgspec.structs.replace(read, stages=()),
        msgspec.structs.replace(read, initiator="nobody"),
        msgspec.structs.replace(read, name="no name"),
        msgspec.structs.replace(read, participants=(*read.participants, read.participants[0])),
        *(
            msgspec.structs.replace(read, stages=(msgspec.structs.replace(first, **change), *read.stages[1:]))
            for change in (
                {"params": first.params.replace("20", "0")},
                {"params": first.params.replace(",", ", ")},
                {"params": "[]"},
                {"params": "{"},
                {"roles": tuple(reversed(first.roles))},
                {"roles": (*first.roles, ("mallory", "member"))},
                {"inputs": (*first.inputs, *first.inputs)},
                {"inputs": (*first.inputs, contract.Input("table", "north", "dataset:other"))},
            )
        ),
    ]
    for changed in bad:
        with pytest.raises(ContractError):
            contract.check(changed, find)


def test_a_column_that_the_dataset_does_not_have_is_named() -> None:
    read = parse(TEXT.replace("max_iter = 20", 'columns = ["radius", "textur"]'))
    contract.check_columns(read.stage("fit"), find, "breast", ["id", "radius", "textur"])
    with pytest.raises(ContractError, match="'breast' has no column 'textur'") as caught:
        contract.check_columns(read.stage("fit"), find, "breast", ["id", "radius", "texture"])
    assert "did you mean 'texture'" in caught.value.hint


def test_an_enormous_contract_is_refused_before_it_is_proposed() -> None:
    stages = "".join(
        f'[[stage]]\nid = "s{i}"\nrun = "local.select:scale"\ninputs = {{ table = "dataset:d" }}\n' for i in range(65)
    )
    with pytest.raises(ContractError, match="at most 64"):
        parse(TEXT.split("[[stage]]")[0] + stages)
