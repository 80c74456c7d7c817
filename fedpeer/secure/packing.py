"""Many small numbers in one plaintext, and what a ciphertext goes through before it is returned to its owner.

A number x in slot j counts 2^(width·j)·x. Numbers are signed, so a plaintext is a number from -n/2 to n/2, kept
modulo n.

Rules
* What is returned is packed, as many numbers as fit a ciphertext; `masked` and `readable` are the only ways back.
* What the owner is not meant to read is masked by an integer that is uniform below n. Whatever the plaintext was, its
  owner sees a uniform number. A mask that is only longer than the plaintext does not do: who encrypts 2^(200 + 500·k)
  in place of its k-th number would read the other's factors from it.
* What the owner may read has random bits in every slot and bit that is not used.
* Either way a fresh encryption is added, by somebody who made its noise (paillier.Stranger): none of what went into the
  ciphertext shows in it.
* Masked slots leave 41 bits of n free, so that adding the mask does not wrap, but for 2^-40. Shares are read from
  between the slots: together they are x, or one more or less.

Source: the packing of Ge, Zdonik, Answering Aggregation Queries in a Secure System Model, 2007; masks as in Damgård,
Jurik, Nielsen, A generalization of Paillier's public-key system, 2010.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import gmpy2

from fedpeer.errors import LocalProtocolError
from fedpeer.peers import Chance
from fedpeer.secure import residues
from fedpeer.secure.paillier import Ciphertexts, PublicKey, Stranger

FREE_MASKED: Final = 41
"""bits of n above the slots of what is masked"""
FREE_READ: Final = 2


@dataclass(frozen=True)
class Slots:
    """`count` slots of `width` bits in each plaintext under this key: `Slots.masked` or `Slots.read`.

    A number x fits a slot if |x| ≤ 2^(width - 2). That it does is for the declared bounds of data to see to: what is
    under encryption cannot be looked at.
    """

    public: PublicKey
    width: int
    count: int

    @classmethod
    def masked(cls, public: PublicKey, width: int) -> Slots:
        """For what the owner is not meant to read."""
        return cls(public, width, (public.bits - FREE_MASKED) // width)

    @classmethod
    def read(cls, public: PublicKey, width: int) -> Slots:
        """For what the owner reads."""
        return cls(public, width, (public.bits - FREE_READ) // width)

    def pack(self, values: Sequence[int]) -> list[int]:
        """Plaintexts for `values`, `count` in each; the last one ends with zeros. LocalProtocolError: one is wider."""
        if any(abs(value) > 1 << (self.width - 2) for value in values):
            raise LocalProtocolError(f"a number that does not fit a slot of {self.width} bits")
        return [
            sum(int(value) << (self.width * place) for place, value in enumerate(part)) for part in self._parts(values)
        ]

    def unpack(self, plaintexts: Sequence[int], count: int) -> list[int]:
        """The first `count` numbers in the plaintexts, which are given modulo n."""
        found = []
        size, half = 1 << self.width, 1 << (self.width - 1)
        for plaintext in self.public.centred(plaintexts):
            rest = plaintext
            for _ in range(self.count):
                value = (rest + half) % size - half
                rest = (rest - value) >> self.width
                found.append(value)
        if not 0 <= count <= len(found):
            raise LocalProtocolError(f"{count} numbers were wanted of plaintexts with {len(found)}")
        return found[:count]

    def pack_encrypted(self, ciphertexts: Ciphertexts) -> Ciphertexts:
        """What `pack` does, under encryption: width squarings for each number. Not yet fit to be returned."""
        square, power = self.public.square, 1 << self.width
        found = []
        for part in self._parts(ciphertexts.values):
            total = residues.ONE
            for value in reversed(part):
                total = gmpy2.powmod(total, power, square) * value % square
            found.append(total)
        return Ciphertexts(self.public, found)

    def shares(self, uniform: Sequence[int], ring: int, count: int) -> list[int]:
        """What the slots of numbers below n say modulo 2^ring, ring ≤ width: of decryptions, the owner's shares."""
        if ring > self.width:
            raise LocalProtocolError(f"shares of {ring} bits out of slots of {self.width}")
        mask = (1 << ring) - 1
        found = [int(value) >> (self.width * place) & mask for value in uniform for place in range(self.count)]
        return found[:count]

    def _parts(self, values: Sequence[int]) -> list[Sequence[int]]:
        return [values[start : start + self.count] for start in range(0, len(values), self.count)]


def masked(packed: Ciphertexts, slots: Slots, stranger: Stranger, random: Chance) -> tuple[Ciphertexts, list[int]]:
    """What is returned of numbers that the owner is not meant to read, and the masks that came upon the plaintexts.

    `packed`: by `slots.pack_encrypted`, or made of what the owner had packed itself. Shares modulo 2^ring are
    `slots.shares` of the owner's decryptions, and `slots.shares` of the masks taken away. A masker that is meant to
    read them is told the decryptions, and has decryption - mask modulo n unpacked.
    """
    if slots != Slots.masked(packed.public, slots.width):
        raise LocalProtocolError("slots that are not those of masked numbers")
    masks = random.below(slots.public.n, len(packed))
    return packed + stranger.encrypt(masks, random), masks


def readable(ciphertexts: Ciphertexts, slots: Slots, stranger: Stranger, random: Chance) -> Ciphertexts:
    """What is returned of numbers that the owner reads by `slots.unpack`: the places left over are filled by chance."""
    if slots != Slots.read(ciphertexts.public, slots.width):
        raise LocalProtocolError("slots that are not those of numbers to be read")
    packed = slots.pack_encrypted(ciphertexts)
    filling = []
    for start in range(0, len(ciphertexts), slots.count):
        count = min(slots.count, len(ciphertexts) - start)
        free = slots.public.bits - FREE_READ - slots.width * count
        filling.append(random.below(1 << free, 1)[0] << (slots.width * count))
    return packed + stranger.encrypt(filling, random)
