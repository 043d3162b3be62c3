"""The last few of something that is costly to open."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

Value = TypeVar("Value")


class Recent(Generic[Value]):
    """Values by number, opened when first asked for. Those unused for longest are closed again when all together are
    larger than `limit`; the size of each is 1 where `size_of` does not tell."""

    def __init__(
        self,
        limit: int,
        open_one: Callable[[int], Value],
        size_of: Callable[[Value], int] = lambda _: 1,
        close: Callable[[Value], None] = lambda _: None,
    ) -> None:
        self._limit, self._open, self._size_of, self._close = limit, open_one, size_of, close
        self._values: OrderedDict[int, Value] = OrderedDict()
        self._size = 0

    def __del__(self) -> None:
        for value in self._values.values():
            self._close(value)

    def __getitem__(self, number: int) -> Value:
        if number in self._values:
            self._values.move_to_end(number)
            return self._values[number]
        value = self._values[number] = self._open(number)
        self._size += self._size_of(value)
        while self._size > self._limit and len(self._values) > 1:
            _, oldest = self._values.popitem(last=False)
            self._size -= self._size_of(oldest)
            self._close(oldest)
        return value
