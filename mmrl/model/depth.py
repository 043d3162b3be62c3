"""Which block of a tower a parameter belongs to, by its name: for layer decay, partial freezing and LoRA."""

import re
from collections.abc import Iterable

_BLOCK = re.compile(r".*?(?:^|\.)(?:resblocks|blocks?|layers?|stages)\.?\d+\.")
_INPUT = re.compile(r"embed|cls_emb|stem|ln_pre|norm_pre|(?:cls|class)_token|(?:^|\.)(?:conv|bn)\d\.")
_POOL = re.compile(r"attn_?pool")


class Depth:
    """The number of layers between a parameter and the tower's output, from the blocks in parameter names: of a ViT
    `blocks.3.`, of a T5 `block.3.`, of a ResNet `layer3.`, of a network of stages the stages."""

    def __init__(self, names: Iterable[str]) -> None:
        found = dict.fromkeys(block for name in names if (block := block_of(name)))
        self._blocks = {block: position for position, block in enumerate(found)}

    @property
    def blocks(self) -> int:
        """The number of blocks; 0 if the names show none."""
        return len(self._blocks)

    def from_output(self, name: str) -> int:
        """0 behind the last block, 1 in it, …; one more than the number of blocks before the first."""
        if block := block_of(name):
            return self.blocks - self._blocks[block]
        return self.blocks + 1 if _INPUT.search(name) and not _POOL.search(name) else 0


def block_of(name: str) -> str | None:
    """The part of a parameter's name that names its block."""
    block = _BLOCK.match(name)
    return block and block[0]
