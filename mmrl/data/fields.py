"""The names of a sample's fields, and the members of a tar that no field uses."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from pydantic import Field, field_validator

from mmrl.data.index import ShardIndex
from mmrl.images.decode import image_extensions
from mmrl.settings import Settings

_DEFAULT_IMAGE = ["jpg", "jpeg", "png", "webp"]
EXTENSIONS_SHOWN = 8
"""Extensions that a message names at most."""


class FieldsConfig(Settings):
    """The names of a sample's fields: file extensions in the tar, keys in its JSON."""

    image: list[str] = Field(default=_DEFAULT_IMAGE, min_length=1)
    """Extensions of the image; the first that a sample has is used. The default also stands for all other extensions of
    images, after these."""
    text: str = "txt"
    """Extension of a plain caption."""
    metadata: str = "json"
    """Extension of the JSON object."""
    captions: str = "captions"
    """Key in the JSON: a list of captions (or one)."""
    group: str = "group"
    """Key in the JSON: the id of the item shown. Samples of one item are not each other's negatives."""
    negatives: str = "negatives"
    """Key in the JSON: a list of hard negatives (see data.negatives). Each is the key of a sample in the same shard,
    "shard/key" of a sample of the set, or else a caption."""

    second_text: str = "second_text"
    """Key in the JSON: the text that loss.text_text compares with the caption, such as the passage that answers a
    question (default for samples without it: another caption of the item)."""
    second_image: str = "second"
    """Extension, before that of an image format, of the image that loss.image_image compares with the first one:
    KEY.second.jpg, such as the catalogue's image of a shopper's photo (default for samples without it: another image of
    the item)."""

    @field_validator("image", "text", "metadata", "second_image")
    @classmethod
    def _as_indexed(cls, value: Any) -> Any:
        """Extensions as indexes have them: in lower case and without the dot before them."""
        if isinstance(value, list):
            return [one.lower().removeprefix(".") for one in value]
        return value.lower().removeprefix(".")

    def is_renamed(self, name: str) -> bool:
        """Whether a field has another name than by default, so that some sample should have it."""
        return getattr(self, name) != FieldsConfig.model_fields[name].default

    @property
    def extensions(self) -> set[str]:
        """All extensions that are read."""
        return {*self.image_extensions, *self.second_image_extensions, self.text, self.metadata}

    @property
    def image_extensions(self) -> Sequence[str]:
        """Extensions of the image. The default of `image` stands for all that there are, those of the default first."""
        return image_extensions() if self.image == _DEFAULT_IMAGE else self.image

    @property
    def second_image_extensions(self) -> Sequence[str]:
        """Extensions of the second image."""
        return [f"{self.second_image}.{extension}" for extension in image_extensions()]

    def second_image_of(self, extensions: Collection[str]) -> str | None:
        """The extension of a sample's second image; None if it has none."""
        start = f"{self.second_image}."
        found = (one for one in extensions if one.startswith(start))
        return next((one for one in found if one.removeprefix(start) in image_extensions()), None)


FIRST_DOT = "a key ends at the name's first dot; make the shards with mmrl pack, which replaces dots"
MERGED = f"merged names: this image is hidden in a sample of another image, because {FIRST_DOT}"
"""The reason of an image that WebDataset's rule for keys makes a part of another sample."""


def hidden_images(fields: FieldsConfig, extensions: Collection[str], require_captions: bool = True) -> list[str]:
    """The rest of the names of the images that a sample hides: " 1" and " 2" for "Nr. 1.png" and "Nr. 2.png", whose
    key is "Nr". Without a caption of its own, such an image counts only if captions are not required and the sample
    has no other field.
    """
    endings: dict[str, set[str]] = {}
    for extension in extensions:
        stem, dot, ending = extension.rpartition(".")
        if dot and extension not in fields.extensions:
            endings.setdefault(stem, set()).add(ending)
    is_alone = not require_captions and fields.extensions.isdisjoint(extensions)
    images, texts = set(fields.image_extensions), {fields.text, fields.metadata}
    return sorted(stem for stem, found in endings.items() if found & images and (is_alone or found & texts))


def merged_names(index: ShardIndex, fields: FieldsConfig, require_captions: bool = True) -> list[tuple[str, str]]:
    """(key, MERGED) of each hidden image of a shard, except the first of a sample without an image of its own, which
    is bad itself."""
    if not hidden_images(fields, [one for one in index.extensions if "." in one], require_captions):
        return []
    found = []
    for row in range(len(index)):
        members = index.members(row)
        hidden = hidden_images(fields, members, require_captions)
        first = 1 if set(fields.image_extensions).isdisjoint(members) else 0
        found += [(f"{index.key(row)}.{stem}", MERGED) for stem in hidden[first:]]
    return found


def unused_note(count_of_extension: Mapping[str, int], fields: FieldsConfig) -> str:
    """A sentence on the members that no field uses, with the remedy if their names suggest one; empty if all are
    used."""
    unused = Counter({one: n for one, n in count_of_extension.items() if n and one not in fields.extensions})
    if not unused:
        return ""
    shown = ", ".join(f".{extension} {count:,}" for extension, count in unused.most_common(EXTENSIONS_SHOWN))
    more = f" and {len(unused) - EXTENSIONS_SHOWN:,} other extensions" if len(unused) > EXTENSIONS_SHOWN else ""
    has_dot = any("." in one and one.rpartition(".")[2] in fields.extensions for one in unused)
    remedy = f". If they are samples of their own: {FIRST_DOT}" if has_dot else ""
    return f"{unused.total():,} members that no field uses: {shown}{more}{remedy}."
