"""Small integers packed into int32 words, as compressed-tensors packs them: the first in the lowest bits.

Fields of 1, 2, 4 and 8 bits fill a word. Of the other widths there are two packings: now (0.20) the fields follow each
other without a gap, and one may begin in a word and end in the next; in old versions (0.10) a word holds whole fields,
and its highest bits are left over (`spaced`).
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

_WORD = 32


@dataclasses.dataclass(frozen=True)
class Packing:
    """How unsigned fields lie in int32 words.

    Attributes:
        bits: of a field, 1 to 8.
        spaced: no field begins in one word and ends in another.
    """

    bits: int
    spaced: bool = False

    @property
    def whole(self) -> int:
        """The least number of fields that fill whole words, or as much of each as is used."""
        return _WORD // self.bits if self.spaced else _WORD // math.gcd(self.bits, _WORD)

    def words(self, fields: int) -> int:
        """The words that so many fields take."""
        return -(-fields // (_WORD // self.bits)) if self.spaced else -(-fields * self.bits // _WORD)

    def window(self, numbers: np.ndarray) -> slice:
        """The words that increasing numbers of fields lie in, from the beginning of a word that a field begins with."""
        first = int(numbers[0]) // self.whole * self.whole
        return slice(self.words(first), self.words(int(numbers[-1]) + 1))

    def _positions(self, numbers: np.ndarray) -> np.ndarray:
        """The number of each field's first bit, counted from the window's."""
        inside = numbers - int(numbers[0]) // self.whole * self.whole
        if not self.spaced:
            return inside * self.bits
        word, field = np.divmod(inside, _WORD // self.bits)
        return word * _WORD + field * self.bits

    def unpack(self, words: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        """The fields of those numbers, packed along the last axis.

        Args:
            words: int32 [..., words], the `window` of the numbers.
            numbers: increasing.

        Returns:
            uint8 [..., numbers].
        """
        data = np.ascontiguousarray(words, "<i4").view(np.uint8)
        mask = np.uint8((1 << self.bits) - 1)
        if 8 % self.bits:
            positions = self._positions(numbers)
            first, shift = positions >> 3, (positions & 7).astype(np.uint16)
            fields = data.take(np.minimum(first + 1, data.shape[-1] - 1), axis=-1).astype(np.uint16) << 8
            fields |= data.take(first, axis=-1)
            fields >>= shift
            return fields.astype(np.uint8) & mask
        each = 8 // self.bits
        inside = span(numbers - int(numbers[0]) // self.whole * self.whole)
        if each == 1:
            return data[..., inside]
        every = np.empty((*data.shape[:-1], each * data.shape[-1]), np.uint8)
        for i in range(each):
            np.bitwise_and(data >> np.uint8(i * self.bits), mask, out=every[..., i::each])
        return every[..., inside]

    def unpack_rows(self, words: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        """As `unpack`, of fields that are packed along the last axis but one: [..., words, columns] to uint8."""
        positions = self._positions(numbers)
        first, shift = positions >> 5, (positions & 31).astype(np.uint64)
        bits = words.astype("<i4", copy=False).view("<u4")
        fields = bits.take(np.minimum(first + 1, bits.shape[-2] - 1), axis=-2).astype(np.uint64) << np.uint64(_WORD)
        fields |= bits.take(first, axis=-2)
        fields >>= shift[:, None]
        return (fields & np.uint64((1 << self.bits) - 1)).astype(np.uint8)


def span(numbers: np.ndarray) -> slice | np.ndarray:
    """Increasing numbers as a slice, which needs no copy, where there is no gap."""
    first, last = int(numbers[0]), int(numbers[-1])
    return slice(first, last + 1) if last - first + 1 == len(numbers) else numbers
