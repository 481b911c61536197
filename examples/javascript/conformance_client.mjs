// The client in cidalloc.mjs as a program of `cidalloc conformance`: one line in, one line out.

import { createInterface } from "node:readline";

import { CidError, Client } from "./cidalloc.mjs";

let client;
let ids; // by their text

const commands = {
  open(url, ttl) {
    client = new Client(url, { ttl: Number(ttl), timeout: 1000 });
    ids = new Map();
  },
  async acquire(count) {
    const found = await client.acquire(Number(count));
    found.forEach((id) => ids.set(String(id.value), id));
    return found.map((id) => id.value).join(" ");
  },
  use(id) {
    if (!client.mayUse(ids.get(id))) throw new CidError("SESSION_EXPIRED", "the lease is over");
  },
  release(id, how) {
    client.release(ids.get(id), { ended: how === "ended" });
  },
  close: () => client.close(),
};

for await (const line of createInterface({ input: process.stdin })) {
  const [name, ...words] = line.split(" ");
  try {
    console.log("ok", (await commands[name](...words)) ?? "");
  } catch (error) {
    if (!(error instanceof CidError)) throw error;
    console.log("error", error.code, error.message.replaceAll("\n", " "));
  }
}
