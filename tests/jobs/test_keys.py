"""Paillier keys of a contract: made by the daemon, the same at each start, checked by everybody who uses them."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any, Literal

import pytest
import trio
from paillier_keys import primes
from trio.abc import Clock

from fedpeer import codec
from fedpeer import stage as stages
from fedpeer.errors import LocalProtocolError, RemoteProtocolError, TrustError
from fedpeer.jobs import keyring
from fedpeer.jobs.keys.service import KeyRing
from fedpeer.peers import Peers
from fedpeer.secure import paillier
from fedpeer.secure.paillier import Ciphertexts, Owner, Stranger
from fedpeer.stage import Open, Params, Report, Stage, at_least, exactly, stage
from fedpeer.testing.federation import federation
from fedpeer.testing.stages import run_stage

NAMES = ["alice", "bob", "carol"]
CONTRACT = """
[[stage]]
id = "one"
run = "test_keys:add"
roles = { guest = "alice", host = ["bob", "carol"] }
[[stage]]
id = "two"
run = "test_keys:add"
roles = { guest = "alice", host = ["bob", "carol"] }
"""


class Add(Params, frozen=True):
    key_bits: Literal[2048, 3072] = 2048


@stage(
    version=1,
    params=Add,
    roles={"guest": exactly(1), "host": at_least(1)},
    inputs={},
    outputs={"report": Report},
    messages={
        "number": Open("guest", "host", "an encrypted number"),
        "more": Open("host", "guest", "the number and one more for each host"),
    },
    keys=("guest",),
)
async def add(peers: Peers, params: Add) -> dict[str, Any]:
    guest, *_ = peers.having("guest")
    public = paillier.key_of(peers, guest)
    if peers.role == "guest":
        private = paillier.own_key(peers)
        owner = Owner(private, peers.random, 1)
        await peers.broadcast("number", owner.encrypt([40], peers.random).to_array())
        answers = await peers.gather("host", "more")
        numbers = [private.decrypt(Ciphertexts.from_array(public, answer, 1))[0] for answer in answers.values()]
        return {"report": Report({"n": str(public.n), "numbers": numbers})}
    number = Ciphertexts.from_array(public, await peers.receive(guest, "number"), 1)
    fresh = Stranger(public, peers.random, 1).encrypt([1], peers.random)
    await peers.send(guest, "more", (number + fresh).to_array())
    return {"report": Report({"n": str(public.n)})}


def find(name: str) -> Stage:
    return {add.name: add}.get(name) or stages.find(name)


def made(bits: int, number: int = 0) -> bytes:
    half = bits // 16
    return b"".join(prime.to_bytes(half, "big") for prime in primes("key", bits)[number])


@pytest.fixture(autouse=True)
def keys_of_the_tests(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """phe takes a second for a key, so the tests have theirs in a file; how many of them were taken."""
    taken: list[int] = []
    monkeypatch.setattr(keyring, "make", lambda bits: (taken.append(bits), made(bits, len(taken) % 2))[1])
    return taken


# in the worker


def test_a_stage_has_its_own_key_and_the_moduli_of_all() -> None:
    run = run_stage(add, Add(), {name: {} for name in NAMES}, roles={"alice": "guest", "bob": "host", "carol": "host"})
    assert run.outputs["alice"]["report"].values["numbers"] == [41, 41]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("keys", "params", "words"),
    [(("owner",), Add, "keys are of roles"), (("guest",), Params, "their length is the parameter key_bits")],
)
def test_keys_are_of_roles_and_have_a_length(keys: tuple[str, ...], params: type[Params], words: str) -> None:
    async def nothing(peers: Peers, params: Params) -> dict[str, Any]:
        return {}

    with pytest.raises(TypeError, match=words):
        stage(version=1, params=params, roles={"guest": exactly(1)}, inputs={}, outputs={}, messages={}, keys=keys)(
            nothing
        )


def test_who_has_a_key_is_part_of_the_declaration() -> None:
    async def nothing(peers: Peers, params: Params) -> dict[str, Any]:
        return {}

    def declared(*keys: str) -> bytes:
        roles = {"guest": exactly(1), "host": exactly(1)}
        return stage(version=1, params=Add, roles=roles, inputs={}, outputs={}, messages={}, keys=keys)(
            nothing
        ).declaration_hash()

    assert len({declared(), declared("guest"), declared("host"), declared("guest", "host")}) == 4


def test_a_role_without_a_key_has_none() -> None:
    class Silent:
        def post(self, request: object) -> None: ...

    with pytest.raises(LocalProtocolError, match="the role 'host' has no Paillier key"):
        paillier.own_key(Peers(Silent(), "bob", {"bob": "host"}, bytes(32)))  # type: ignore[arg-type]


# what others say of theirs


def test_phe_makes_keys_of_the_wanted_length() -> None:
    made_now = keyring.__dict__["phe"].generate_paillier_keypair(n_length=2048)[0].n
    assert made_now.bit_length() == 2048


def said(peer: str = "fp1alice", contract: bytes = b"c" * 32, bits: int = 2048) -> bytes:
    return codec.encode(keyring.said_of(made(bits), peer, contract))


def test_a_key_is_taken_with_the_certificate_for_its_owner_and_contract() -> None:
    p, q = primes("key", 2048)[0]
    assert keyring.checked(said(), "fp1alice", b"c" * 32, 2048) == p * q


@pytest.mark.parametrize(
    ("body", "error"),
    [
        (lambda: said(peer="fp1bob"), TrustError),
        (lambda: said(contract=b"d" * 32), TrustError),
        (lambda: said(bits=3072), TrustError),
        (lambda: codec.encode(keyring.Said(b"", b"")), TrustError),
        (lambda: codec.encode(keyring.Said((3).to_bytes(256, "big"), b"")), TrustError),
        (lambda: codec.encode([b"n" * 385, b""]), RemoteProtocolError),
        (lambda: codec.encode(["n", "c"]), RemoteProtocolError),
    ],
)
def test_another_owner_contract_length_or_no_key_is_refused(body: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        keyring.checked(body(), "fp1alice", b"c" * 32, 2048)


# between daemons


async def test_one_key_serves_all_stages_of_a_contract_and_goes_with_it(
    autojump_clock: Clock, quick_path: Path, keys_of_the_tests: list[int]
) -> None:
    async with federation(quick_path, NAMES, find=find) as peers:
        jobs = peers["bob"].daemon.jobs
        view = await jobs.wait((await jobs.submit(peers.contract(CONTRACT))).id)
        assert view.state == "done", view.error
        views = [await peer.daemon.jobs.wait(view.id) for peer in peers.values()]
        assert len({output.values["n"] for one in views for output in one.outputs if output.values}) == 1
        assert keys_of_the_tests == [2048]
        for peer in peers.values():
            assert await peer.daemon.store.read(lambda tx: tx.all("SELECT * FROM paillier_key")) == []
        second = await jobs.wait((await jobs.submit(peers.contract(CONTRACT))).id)
        assert second.state == "done", second.error
        assert second.outputs[0].values is not None
        assert view.outputs[0].values is not None
        assert second.outputs[0].values["n"] != view.outputs[0].values["n"], "contracts could be linked"


@pytest.mark.parametrize("deaths", range(20, 60, 4))
async def test_killed_after_any_write_an_owner_has_one_key(
    autojump_clock: Clock, quick_path: Path, deaths: int, keys_of_the_tests: list[int]
) -> None:
    async with federation(quick_path, NAMES, find=find) as peers:
        uses, alice = itertools.count(), peers["alice"]
        alice.at_store = lambda: next(uses) == deaths
        job = await peers["bob"].daemon.jobs.submit(peers.contract(CONTRACT))
        views = [await peers[name].daemon.jobs.wait(job.id) for name in ("bob", "carol")]
        assert [view.state for view in views] == ["done", "done"], views[0].error
        assert len({output.values["n"] for one in views for output in one.outputs if output.values}) == 1


async def test_a_key_without_its_certificate_ends_the_job_naming_its_owner(
    autojump_clock: Clock, quick_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = keyring.said_of
    monkeypatch.setattr(keyring, "said_of", lambda primes, peer, contract: honest(primes, peer, b"another"))
    async with federation(quick_path, NAMES, find=find) as peers:
        jobs = peers["bob"].daemon.jobs
        view = await jobs.wait((await jobs.submit(peers.contract(CONTRACT))).id)
        assert view.error is not None
        assert (view.state, view.error.peer) == ("failed", "alice")
        assert "alice has no good key for this job" in view.error.message


async def test_an_owner_that_is_away_is_waited_for_as_long_as_the_contract_says(
    autojump_clock: Clock, quick_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with federation(quick_path, NAMES, find=find) as peers:
        monkeypatch.setattr(KeyRing, "_own", _never)
        job = await peers["bob"].daemon.jobs.submit(peers.contract(CONTRACT, rules="stall_s = 60"))
        await trio.sleep(20)
        assert (await peers["bob"].daemon.jobs.get(job.id)).state == "running"
        await peers["alice"].stop()
        view = await peers["bob"].daemon.jobs.wait(job.id)
        assert view.error is not None
        assert (view.error.code, view.error.peer) == ("peer_absent", "alice")


async def _never(*_: object) -> None:
    await trio.sleep_forever()


async def test_a_dry_run_has_keys_of_its_own(autojump_clock: Clock, quick_path: Path) -> None:
    async with federation(quick_path, NAMES, find=find) as peers:
        ran = await peers["bob"].daemon.jobs.dry_run(peers.contract(CONTRACT.split('[[stage]]\nid = "two"')[0]))
        assert [stage.id for stage in ran.stages] == ["one"]
