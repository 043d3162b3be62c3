"""The last few of something that is costly to open."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

Value = TypeVar("Value")


class Recent(Generic[Value]):
    """Values by number, opened when first asked for; those unused for longest are closed again."""

    def __init__(
        self, size: int, open_one: Callable[[int], Value], close: Callable[[Value], None] | None = None
    ) -> None:
        self._size, self._open, self._close = size, open_one, close
        self._values: OrderedDict[int, Value] = OrderedDict()

    def __getitem__(self, number: int) -> Value:
        if number in self._values:
            self._values.move_to_end(number)
            return self._values[number]
        value = self._values[number] = self._open(number)
        if len(self._values) > self._size:
            _, oldest = self._values.popitem(last=False)
            if self._close is not None:
                self._close(oldest)
        return value
