"""Every error of the project, one tree. A class exists where somebody handles it differently.

The class docstring is what a person reads first; it says what to do. `code` is stable and is what machines
read; `exit_code` is what the command line ends with (1 failed, 2 usage, 3 daemon not reachable, 4 not
authorized, 5 not found, 6 refused by a policy, 7 timed out). The message names the file, the peer and the
remedy where there is one. To a stranger on the network none of this is ever said.
"""

from __future__ import annotations

import inspect
from typing import ClassVar


class FedpeerError(Exception):
    """Something went wrong in fedpeer."""

    code: ClassVar[str] = "error"
    exit_code: ClassVar[int] = 1

    def __init__(self, message: str = "", *, hint: str = "", peer: str = "") -> None:
        self.message = message or inspect.cleandoc(type(self).__doc__ or "")
        self.hint = hint
        self.peer = peer
        super().__init__(self.message)


# configuration and what lies on the operator's own machine


class ConfigError(FedpeerError):
    """The configuration or a file of this peer is not as it must be. Mend the file that is named, then start again."""

    code = "config"


class KeyFileError(ConfigError):
    """The key file can be read or replaced by others, or is missing. Set owner and mode as the message says."""

    code = "key_file"


class StoreError(FedpeerError):
    """The peer's database could not be read or written. Nothing was acknowledged that is not on disk."""

    code = "store"


class DiskFull(StoreError):
    """The disk of this peer is full: what runs goes on while the reserve lasts, nothing new begins. Make room."""

    code = "disk_full"


# what others send


class ProtocolError(FedpeerError):
    """Bytes broke the protocol."""

    code = "protocol"


class LocalProtocolError(ProtocolError):
    """We asked our own engine for something it must not do. This is a fault of the program: please report it."""

    code = "protocol_local"


class RemoteProtocolError(ProtocolError):
    """The other side sent what the protocol does not allow; the session with it was closed."""

    code = "protocol_remote"


class SessionError(FedpeerError):
    """The session with a peer ended. It is dialled again by itself; what was said is kept and sent again."""

    code = "session"


class HandshakeError(SessionError):
    """No session could be agreed with the other side: it does not know us, or is not who we dialled."""

    code = "handshake"


class TrustError(FedpeerError):
    """A signature, a card or an identity does not fit. Compare the fingerprints with the other side by voice."""

    code = "trust"


class CardError(TrustError):
    """This is not a whole, unchanged card. Ask for it again and paste it as one line."""

    code = "card"


class Equivocation(TrustError):
    """A peer said two different things where it may say one. The job stops; both statements are kept."""

    code = "equivocation"


class AuditBroken(TrustError):
    """The audit log is not what it was. Keep it and its store as they are, and ask the partners what they co-signed."""

    code = "audit"

    def __init__(self, message: str = "", *, hint: str = "", peer: str = "", number: int = 0) -> None:
        super().__init__(message, hint=hint, peer=peer)
        self.number = number
        """the first entry that is wrong or missing, or may be"""


# jobs


class PolicyError(FedpeerError):
    """The data owner's rules, or the stage's own declaration, do not allow this."""

    code = "policy"
    exit_code = 6


class GateClosed(PolicyError):
    """A stage tried to let something out that it had not declared. Nothing was sent; the job fails."""

    code = "gate"


class BudgetSpent(PolicyError):
    """The privacy budget of a dataset does not allow it. Nothing was sent; it grows again as a year passes."""

    code = "budget"


class JobError(FedpeerError):
    """A job did not end with a result."""

    code = "job"


class ContractError(JobError):
    """The contract cannot run as it is written. The message names the entry; mend it and submit again."""

    code = "contract"
    exit_code = 2


class StageError(JobError):
    """The stage's own code failed; its message follows."""

    code = "stage"


class NotDeterministic(JobError):
    """A repeated turn gave other bytes than the first time. The stage uses chance or time not from `peers`."""

    code = "not_deterministic"


class NotEqual(JobError):
    """Participants ended with other results where they must be the same. Do not use them; look for who differs."""

    code = "not_equal"


class SumError(JobError):
    """A secure sum could not be made: the parties do not agree on what is summed, or a value is out of range."""

    code = "sum"


class SumIsNoise(SumError):
    """What was unmasked is no sum: a participant had another history or parameters, or broke the protocol."""

    code = "sum_is_noise"


class SumLost(SumError):
    """The survivors of a sum were decided, but somebody never showed what is needed to finish it."""

    code = "sum_lost"


class SurvivorsChanged(SumError):
    """A participant that was in the first sum of a group is away; over the others it would tell that one's values."""

    code = "survivors_changed"


class BelowQuorum(SumError):
    """Too few participants were there for too long."""

    code = "below_quorum"


class PeerAbsent(JobError):
    """A peer that the job needs did not answer within the contract's rules."""

    code = "peer_absent"


class Cancelled(JobError):
    """The job was cancelled."""

    code = "cancelled"


class WorkerCrashed(JobError):
    """The worker process ended without a result: killed, out of memory, or a fault in native code."""

    code = "worker_crashed"


# data


class DataError(FedpeerError):
    """The data is not what was declared, or not what the stage needs. Its owner's daemon says which row and column."""

    code = "data"


class ColumnsDiffer(DataError):
    """The participants' tables do not have the same columns. Nothing was computed."""

    code = "columns_differ"


# the operator's door


class AdminError(FedpeerError):
    """The daemon could not do what was asked."""

    code = "admin"


class UsageError(AdminError):
    """The request is not well formed."""

    code = "usage"
    exit_code = 2


class NotReachable(AdminError):
    """The daemon does not answer on its admin socket. Start it with `fedpeer run`, or name its home with --home."""

    code = "not_reachable"
    exit_code = 3


class NotAuthorized(AdminError):
    """This user may not control the daemon. Ask its operator to add you to the group fedpeer-admin."""

    code = "not_authorized"
    exit_code = 4


class NotFound(AdminError):
    """There is nothing of that name or id here."""

    code = "not_found"
    exit_code = 5


class Ambiguous(AdminError):
    """More than one thing has this name or starts with this id. Give more of the id."""

    code = "ambiguous"
    exit_code = 2


class TimedOut(AdminError):
    """It did not happen within the time that was given. It may still happen."""

    code = "timed_out"
    exit_code = 7


def by_code(code: str) -> type[FedpeerError]:
    """The class with this stable code (FedpeerError itself for a code of a newer release)."""
    classes = [FedpeerError]
    for cls in classes:  # grows while it is walked
        if cls.__dict__.get("code") == code:
            return cls
        classes.extend(cls.__subclasses__())
    return FedpeerError
