"""Names of members as people have them: dots, bytes that are not UTF-8, links, an order of their own, upper case."""

import dataclasses
import io
import json
import tarfile
from pathlib import Path

import pytest
from conftest import drawing, encoded, sample_members, write_tar
from safetensors.numpy import load, save

from mmrl.data.check.command import check_shards
from mmrl.data.index import index_shard, printable
from mmrl.data.index_file import load_index, save_index
from mmrl.data.pack.command import pack_shards
from mmrl.data.samples import FieldsConfig, group_id
from mmrl.data.sources import DataConfig, SourceConfig, open_reader, open_training_set
from mmrl.errors import InputError

IMAGE = encoded(drawing(0)[0])


def kinds(path: Path) -> dict[str, int]:
    return check_shards(path, workers=1, quiet=True).problems


# ------------------------------------------------------------------------------------------------ dots (number 6)


def test_each_image_that_the_first_dot_hides_is_a_bad_sample(tmp_path: Path) -> None:
    numbered = [(f"Nr. {n}.{kind}", data) for n in range(100) for kind, data in (("png", IMAGE), ("txt", b"a caption"))]
    path = write_tar(tmp_path / "a.tar", [*sample_members(1), *numbered])
    result = check_shards(path, workers=1, quiet=True)
    assert result.bad_samples == 100
    assert result.bad_share == pytest.approx(100 / 101, abs=0.01)
    assert result.problems == {"merged names": 99, "no image": 1}
    assert not result.ok
    (note,) = result.notes
    assert note.startswith("200 members that no field uses: . 0.png 1, ")
    assert note.endswith("and 192 other extensions. If they are samples of their own: a key ends at the name's first "
                         "dot; make the shards with mmrl pack, which replaces dots.")  # fmt: skip
    reader = open_reader(path)
    assert reader.notes == [note]
    assert [problem.reason for problem in reader.problems] == [result.examples[0].reason] * 99
    assert {problem.key for problem in reader.problems} == {f"Nr. {n}" for n in range(1, 100)}


def test_the_remedy_of_hidden_images_loses_none(tmp_path: Path) -> None:
    for n in range(12):
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / f"Nr. {n}.png").write_bytes(encoded(drawing(n)[0]))
        (tmp_path / "in" / f"Nr. {n}.txt").write_text(f"caption {n}")
    pack_shards(tmp_path / "in", tmp_path / "out", quiet=True)
    result = check_shards(tmp_path / "out", workers=1, quiet=True)
    assert (result.ok, result.sets[0].samples, result.bad_samples, result.notes) == (True, 12, 0, [])


def test_further_members_of_a_sample_are_told_and_are_no_loss(tmp_path: Path) -> None:
    extra = [("00001.cls", b"3"), ("00001.left.png", IMAGE), ("00001.right.png", IMAGE)]
    path = write_tar(tmp_path / "a.tar", [*sample_members(1), *extra, *sample_members(2)])
    result = check_shards(path, workers=1, quiet=True)
    assert (result.ok, result.bad_samples) == (True, 0)
    assert result.notes[0].startswith("3 members that no field uses: .cls 1, .left.png 1, .right.png 1. If they are")
    assert open_reader(path, FieldsConfig(image=["left.png", "png"])).notes[0].startswith("2 members that no")
    only_labels = write_tar(tmp_path / "b.tar", [*sample_members(1), ("00001.cls", b"3")])
    assert open_reader(only_labels).notes == ["1 members that no field uses: .cls 1."]


def test_a_set_of_hidden_images_alone_is_refused_with_the_remedy(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [(f"Nr. {n}.png", IMAGE) for n in range(50)])
    with pytest.raises(InputError, match=r"the members there are \. 0\.png, .*, … \(a key ends at .* with mmrl pack"):
        open_reader(path)


def test_counts_of_extensions_are_stored_and_made_up_for_in_older_indexes(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [*sample_members(1), *sample_members(2), ("00002.cls", b"3")])
    note = open_reader(path).notes  # writes the index
    assert open_reader(path).notes == note == ["1 members that no field uses: .cls 1."]
    index, stored = index_shard(path), tmp_path / "a.tar.index"
    save_index(index, stored)
    header = {"samples": 2, "extensions": index.extensions, "problems": [], "tar": vars(index.tar)}
    stored.write_bytes(save(load(stored.read_bytes()), {"mmrl-index-1": json.dumps(header)}))
    assert load_index(tmp_path / "a.tar.index").count_extensions() == {"png": 2, "txt": 2, "json": 2, "cls": 1}
    assert open_reader(path).notes == note


# ------------------------------------------------------------------------------------- names not UTF-8 (number 7)


def test_a_name_that_is_not_utf8_is_escaped_everywhere(tmp_path: Path) -> None:
    members = [(name.replace("00001", "caf\udce9"), data) for name, data in sample_members(1)]
    bad = [("bad\udce9.png", IMAGE)]
    path = write_tar(tmp_path / "sh\udce9.tar", [*members, *bad, *sample_members(2)])
    reader = open_reader(path)
    assert [reader.read(number).name for number in (0, 2)] == ["sh\\xe9.tar/caf\\xe9", "sh\\xe9.tar/00002"]
    assert reader.problem(1, "x").key == "bad\\xe9"
    result = check_shards(path, workers=1, quiet=True)
    assert result.examples[0].shard.endswith("/sh\\xe9.tar")
    json.dumps(dataclasses.asdict(result)).encode()
    # A sample without a group in a set that is shown twice has its name as the group.
    bare = write_tar(tmp_path / "b\udce9.tar", [(name, data) for name, data in members if not name.endswith("json")])
    again = open_training_set(DataConfig(sources=[SourceConfig(shards=str(bare), name="one", repeat=2.0)]))
    assert again.read(0).group == group_id("the sample b\\xe9.tar/caf\\xe9")


def test_printable_escapes_what_cannot_be_encoded() -> None:
    assert printable("plain") == "plain"
    assert printable("日本 é") == "日本 é"
    assert printable("a\udcff日") == "a\\xff日"
    assert printable("\ud800") == "\\ud800"


# ------------------------------------------------------------------- members as other tools leave them (number 11)


def test_members_that_are_not_adjacent_are_told_as_that(tmp_path: Path) -> None:
    images = [(f"{n:02}.png", IMAGE) for n in range(5)]
    texts = [(f"{n:02}.txt", b"a caption") for n in range(5)]
    path = write_tar(tmp_path / "a.tar", [*images, *texts])
    assert kinds(path) == {"members not adjacent": 5, "no caption": 5}
    assert check_shards(path, workers=1, quiet=True).bad_samples == 5
    assert index_shard(path).problems[0] == (
        "00", "members not adjacent: .txt stands apart from the other members and is not read; make the tar again "
        "with tar --sort=name",
    )  # fmt: skip
    with pytest.raises(InputError, match=r"can be used with a caption .*members not adjacent: .* tar --sort=name"):
        open_reader(path)


def test_links_and_sparse_members_are_told_as_what_they_are(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for name, data in [*sample_members(1), ("copy.txt", b"a caption"), ("soft.txt", b"a caption")]:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
            if name in ("copy.txt", "soft.txt"):
                link = tarfile.TarInfo(name.replace("txt", "png"))
                link.type, link.linkname = (tarfile.LNKTYPE if name == "copy.txt" else tarfile.SYMTYPE), "00001.png"
                tar.addfile(link)
        lonely = tarfile.TarInfo("lonely.png")
        lonely.type, lonely.linkname = tarfile.LNKTYPE, "00001.png"
        tar.addfile(lonely)
        hole = tarfile.TarInfo("hole.png")
        hole.type = tarfile.GNUTYPE_SPARSE
        tar.addfile(hole)
    assert dict(index_shard(path).problems) == {
        "copy": "hard link: copy.png links to 00001.png and has no bytes of its own; pack again with tar's "
        "--hard-dereference",
        "soft": "symbolic link: soft.png links to 00001.png and has no bytes of its own; pack again with tar's "
        "--dereference",
        "lonely": "hard link: lonely.png links to 00001.png and has no bytes of its own; pack again with tar's "
        "--hard-dereference",
        "hole": "sparse member: hole.png; pack again without tar's --sparse",
    }
    # Each of the four is a bad sample, none is missing from the count.
    result = check_shards(path, workers=1, quiet=True)
    assert (result.sets[0].samples, result.bad_samples) == (5, 4)


@pytest.mark.parametrize("size", [-512, -1, -(10**6), -(2**40), 2**60])
@pytest.mark.parametrize("kind", [b"0", b"S", b"x", b"g", b"L", b"5", b"1", b"Z"])
def test_no_size_makes_a_scan_loop_or_fail(tmp_path: Path, kind: bytes, size: int) -> None:
    samples = write_tar(tmp_path / "good.tar", [*sample_members(1), *sample_members(2)]).read_bytes().rstrip(b"\0")
    samples += bytes(-len(samples) % 512)
    header = bytearray(tarfile.TarInfo("b.png").tobuf(tarfile.GNU_FORMAT)[:512])
    header[124:136], header[156:157] = tarfile.itn(size, 12, tarfile.GNU_FORMAT), kind  # pyright: ignore
    if kind == b"S":
        header[483:495] = b"00000000144\0"  # the size that the sparse member has without its holes
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    path = tmp_path / "a.tar"
    path.write_bytes(samples + header + bytes(2048) + samples + bytes(1024))
    index = index_shard(path)
    assert index.key(0) == "00001"
    assert index.problems


def test_fields_in_another_case_are_read_or_told(tmp_path: Path) -> None:
    path = write_tar(
        tmp_path / "a.tar", [(name.upper().replace("PNG", "Png"), data) for name, data in sample_members(1)]
    )
    named = FieldsConfig(image=[".PNG"], text="TXT", metadata=".Json")
    assert open_reader(path, named).read(0).captions == open_reader(path).read(0).captions
    metadata = json.dumps({"Captions": ["another"], "GROUP": "g"}).encode()
    other = write_tar(tmp_path / "b.tar", [("1.png", IMAGE), ("1.txt", b"a caption"), ("1.json", metadata)])
    notes = [
        f"fields.{name}: none of 1 samples in 1 shards such as {other} has '{name}' in its JSON, but some have "
        f"'{key}'; to use it, set fields.{name}: {key}."
        for name, key in (("captions", "Captions"), ("group", "GROUP"))
    ]
    assert open_reader(other).notes == notes
    assert check_shards(other, workers=1, quiet=True).notes == notes
    assert open_reader(other, FieldsConfig(captions="Captions", group="GROUP")).read(0).group_name == "g"
