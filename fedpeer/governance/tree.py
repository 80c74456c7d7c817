"""A log's entries as the leaves of one hash tree, so that a short proof shows that it only grew.

Rules
* The tree is that of RFC 9162: over n leaves it splits at the largest power of two below n. A leaf's hash has its
  number in it, and leaves, nodes and the empty log have labels of their own: none can be taken for another.
* A node over 2^level leaves never changes once its last leaf is there; so it is kept with that leaf. `nodes` of a leaf
  are the hashes of all nodes that it completes: its own (level 0), then those above it.
* Who knows (m, root) and is shown (n, root) with a proof knows that the first m leaves are the same in both. A proof
  has at most 2 log2(n) hashes, whatever lies between, and tells nothing of the leaves: each holds 16 random bytes.

Pure functions of numbers and hashes. Leaves are numbered from 1.

Source: RFC 9162, sections 2.1.1 (root) and 2.1.4 (consistency), with BLAKE2b and numbered leaves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from fedpeer.crypto import hash_

HASH_BYTES: Final = 32
MAX_LEAVES: Final = 1 << 48
MAX_PROOF: Final = 2 * 48
EMPTY: Final = hash_("fp.audit.none")

NodeOf = Callable[[int, int], bytes]
"""(level, index) → the hash over leaves index·2^level + 1 … (index + 1)·2^level"""


def leaf(number: int, body: bytes) -> bytes:
    """The hash of one entry at its place."""
    return hash_("fp.audit.leaf", number.to_bytes(8, "little"), body)


def join(left: bytes, right: bytes) -> bytes:
    """The hash of the node over these two."""
    return hash_("fp.audit.node", left, right)


def completed(number: int, own: bytes, node_of: NodeOf) -> list[bytes]:
    """The nodes that leaf `number` with the hash `own` completes, from level 0 upwards."""
    nodes, index, level = [own], number - 1, 0
    while index & 1:
        nodes.append(join(node_of(level, index - 1), nodes[-1]))
        index, level = index >> 1, level + 1
    return nodes


class Growing:
    """The root of a log whose leaves come one after the other; it remembers at most one hash for each level."""

    def __init__(self) -> None:
        self.number = 0
        self._peaks: list[bytes] = []

    def add(self, own: bytes) -> list[bytes]:
        """The next leaf has this hash; the nodes that it completes."""
        nodes = [own]
        for _ in range(_trailing_ones(self.number)):
            nodes.append(join(self._peaks.pop(), nodes[-1]))
        self._peaks.append(nodes[-1])
        self.number += 1
        return nodes

    def root(self) -> bytes:
        if not self._peaks:
            return EMPTY
        root = self._peaks[-1]
        for peak in self._peaks[-2::-1]:
            root = join(peak, root)
        return root


def root(number: int, node_of: NodeOf) -> bytes:
    """The root over the first `number` leaves."""
    return _over(0, number, node_of) if number else EMPTY


def prove(old: int, new: int, node_of: NodeOf) -> list[bytes]:
    """What shows that the log of `old` leaves is the beginning of that of `new`; 0 ≤ old ≤ new."""
    return _prove(old, 0, new, True, node_of) if old else []


def grew(old: int, old_root: bytes, new: int, new_root: bytes, proof: Sequence[bytes]) -> bool:
    """Whether the log (new, new_root) begins with the log (old, old_root), by this proof of anybody."""
    if not 0 <= old <= new < MAX_LEAVES or len(proof) > MAX_PROOF:
        return False
    if old == 0:
        return old_root == EMPTY and not proof
    left = list(reversed(proof))
    try:
        roots = _roots(old, new, old_root, left)
    except IndexError:  # a hash is missing
        return False
    return roots == (old_root, new_root) and not left


def _prove(old: int, first: int, last: int, known: bool, node_of: NodeOf) -> list[bytes]:
    size = last - first
    if old == size:
        return [] if known else [_over(first, last, node_of)]
    half = _split(size)
    if old <= half:
        return [*_prove(old, first, first + half, known, node_of), _over(first + half, last, node_of)]
    return [*_prove(old - half, first + half, last, False, node_of), _over(first, first + half, node_of)]


def _roots(old: int, new: int, known: bytes | None, left: list[bytes]) -> tuple[bytes, bytes]:
    """Both roots of a subtree: over its first `old` leaves (`known`, if the verifier has it), and over all."""
    if old == new:
        same = known if known is not None else left.pop()
        return same, same
    half = _split(new)
    if old <= half:
        before, after = _roots(old, half, known, left)
        return before, join(after, left.pop())
    before, after = _roots(old - half, new - half, None, left)
    sibling = left.pop()
    return join(sibling, before), join(sibling, after)


def _over(first: int, last: int, node_of: NodeOf) -> bytes:
    """The hash over leaves first + 1 … last; `first` is a multiple of the power of two at or above their number."""
    size = last - first
    if size & (size - 1) == 0:
        return node_of(size.bit_length() - 1, first // size)
    half = _split(size)
    return join(_over(first, first + half, node_of), _over(first + half, last, node_of))


def _split(size: int) -> int:
    """The largest power of two below `size` ≥ 2."""
    return 1 << ((size - 1).bit_length() - 1)


def _trailing_ones(number: int) -> int:
    return (~number & (number + 1)).bit_length() - 1
