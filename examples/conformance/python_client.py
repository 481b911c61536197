"""The Python client as a program of `cidalloc conformance`: one line in, one line out."""

import contextlib
import sys

from cidalloc.client import CidError, Client, Sequence

MODEL, INPUTS = "sequence", {"INPUT": [[1]]}


class Adapter:
    """Each ID is that of a sequence on the model that the kit serves."""

    def open(self, url: str, ttl_ms: str) -> None:
        self.client = Client(url, ttl=int(ttl_ms) / 1000, timeout=1.0)
        self.sequences: dict[str, Sequence] = {}

    def acquire(self, count: str) -> str:
        with contextlib.ExitStack() as undo:
            found = []
            for _ in range(int(count)):
                found.append(self.client.sequence(MODEL, timeout=1.0))
                undo.callback(found[-1].close)
            undo.pop_all()
        self.sequences.update({str(each.cid): each for each in found})
        return " ".join(str(each.cid) for each in found)

    def use(self, cid: str) -> None:
        self.sequences[cid].infer(INPUTS)

    def release(self, cid: str, how: str = "") -> None:
        with self.sequences.pop(cid) as sequence:
            if how == "ended":
                sequence.infer(INPUTS, end=True)

    def close(self) -> None:
        self.client.close()
        for each in self.sequences.values():
            each.close()


adapter = Adapter()
for line in sys.stdin:
    name, *arguments = line.split()
    try:
        print("ok", getattr(adapter, name)(*arguments) or "", flush=True)
    except CidError as error:
        print("error", error.code.name, error, flush=True)
