"""Writes the golden files of this version: what it has written and later versions must read.

`python tests/support/golden.py` writes those that tests/golden lacks: a registry's file with all
that a file can have, a snapshot of an allocator, and a model's configuration; and beside each, as
JSON, what is in it. What a release has written stays as it is.
"""

from __future__ import annotations

import dataclasses
import json
import lzma
import tempfile
from pathlib import Path

from crash_model import adopted, facts_of, token
from google.protobuf import json_format, text_format
from sparse import PAGE, Content, content
from stepped_child import NOW, TIMES, World
from tritonclient.grpc.model_config_pb2 import ModelConfig

from cidalloc import Allocator, __version__, snapshots
from cidalloc.manager.settings import Settings
from cidalloc.manager.storage.file_format import FORMAT, Shape
from cidalloc.triton_model import export, settings_from

FOLDER = Path(__file__).parent.parent / "golden"
SHAPE = Shape(1, 20, offset=4)
SETTINGS = Settings(first=7, capacity=640, slice="3/64", cooldown_ms=9, state="/var/x", fresh=True)


def use(path: Path) -> Content:
    """Make a registry's file with all that a file can have; return its content before its end."""
    world = World(path, SHAPE)
    for name in "abcde":
        world.open(name)
        world.acquire(name, 3)
    world.open("f, which has no IDs")
    world.acquire("", 1, None)
    world.release("a", *world.registry.held(token("a"), 0).tolist()[:2], ended=True)
    world.registry.renew(token("b"), 0, used=2, cooldown_ms=7_000)
    world.registry.close_session(token("c"), 0)
    world.registry.close_session(token("d"), 0, ended=True)
    world.open("g, where one was")
    world.time = NOW - 10
    world.acquire("g, where one was", 2)
    left = content(path)
    world.registry.close()
    return left


def facts_in(file: Path, path: Path) -> object:
    """Put a golden registry at `path`; return what the next process finds there."""
    data = lzma.decompress(file.read_bytes())
    size, step = int.from_bytes(data[:8], "little"), 8 + PAGE
    pages = [data[start : start + step] for start in range(8, len(data), step)]
    left = Content(size, {int.from_bytes(each[:8], "little"): each[8:] for each in pages})
    return dataclasses.asdict(facts_of(adopted(left.put(path)), SHAPE, NOW, TIMES))


def packed(left: Content) -> bytes:
    """Return a file's content, as `facts_in` reads it."""
    parts = [left.size.to_bytes(8, "little")]
    for place, page in sorted(left.pages.items()):
        parts += [place.to_bytes(8, "little"), page]
    return lzma.compress(b"".join(parts), preset=9)


def pool_in(snapshot: bytes) -> object:
    """Return what a restored allocator holds and has."""
    pool = Allocator.restore(snapshot)
    pool._check()
    held = {cid: pool.owner_of(cid) for cid in pool}
    about = [pool.first, pool.capacity, pool.block, pool.peak, pool.high_water]
    return {"held": held, "about": about, "free": sorted(pool.acquire_many(pool.free).tolist())}


def settings_in(config: str) -> object:
    """Return what the manager reads from its model's configuration."""
    parsed = text_format.Parse(config, ModelConfig())
    as_triton_has_it = json_format.MessageToDict(parsed, preserving_proto_field_name=True)
    return dataclasses.asdict(settings_from(as_triton_has_it))


def found_in(file: Path, scratch: Path) -> str:
    """Return what this version finds in a golden file, as JSON."""
    kind = file.name.partition("-")[0]
    if kind == "registry":
        found = facts_in(file, scratch)
    else:
        found = pool_in(file.read_bytes()) if kind == "snapshot" else settings_in(file.read_text())
    return json.dumps(found, indent=1, sort_keys=True, default=bytes.hex) + "\n"


def main() -> None:
    """Write what is not there."""
    with tempfile.TemporaryDirectory() as folder:
        model = export(Path(folder), SETTINGS)
        pool = Allocator(200, 5, 4)
        for owner in range(4):
            pool.acquire_many(30, owner, now=owner)
            pool.release_many(pool.held_by(owner)[::3], owner, 10 * owner)
        write = {
            f"registry-{FORMAT}.xz": packed(use(Path(folder, "used"))),
            f"snapshot-{snapshots._VERSION}.bin": pool.snapshot(),
            f"config-{__version__}.pbtxt": (model / "config.pbtxt").read_bytes(),
        }
        for name, data in write.items():
            file = FOLDER / name
            if not file.exists():
                file.write_bytes(data)
                file.with_suffix(".json").write_text(found_in(file, Path(folder, "it")))


if __name__ == "__main__":
    main()
