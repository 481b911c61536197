// A client of the cidalloc manager for Node 18 or later on Linux, without dependencies. docs/protocol.md says
// what a client does, and why.

import { randomBytes } from "node:crypto";
import { readFileSync } from "node:fs";
import { setTimeout as sleep } from "node:timers/promises";

const NEW = 0, DELETE = 1, OPEN = 5, RENEW = 6, CLOSE = 7, HELD = 8;
const CURED = ["NO_ANSWER", "UNAVAILABLE", "SESSION_UNKNOWN", "REPEATED"]; // by another try
const TICK = 10; // milliseconds, of the clock

// Milliseconds by a clock that runs on in suspend and never jumps; performance.now() stops in suspend.
const now = () => 1000 * parseFloat(readFileSync("/proc/uptime", "latin1"));

// `code` is the name of the manager's error, or NO_ANSWER: then the request may have been applied.
export class CidError extends Error {
  constructor(code, text) { super(text); this.code = code; }
}

export class Client {
  #url; #ttl; #timeout; #label;
  #session = null;
  #opening = null; // a token whose OPEN was not answered yet
  #deadline = 0; // no ID may be used from then on
  #turn = Promise.resolve(); // for changes, which are sent one after the other
  #closed = new AbortController();
  #heartbeat = null;

  // url: http://host:port. ttl: milliseconds after which the session ends without an answered request.
  // timeout: milliseconds that a call may take.
  constructor(url, { ttl = 120_000, timeout = 10_000, label = "node", model = "cidmgr" } = {}) {
    this.#url = `${url}/v2/models/${model}/generate`;
    [this.#ttl, this.#timeout, this.#label] = [ttl, timeout, label];
  }

  // Returns `count` IDs, all or none; the `value` of each is a BigInt. Throws CidError.
  acquire(count = 1) {
    return this.#inTurn(async (session) => {
      const values = await this.#change(session, NEW, { count });
      values.forEach((value) => session.used.add(value));
      return values.map((value) => ({ value, session }));
    });
  }

  // Whether a request with this ID may be sent now. Ask before each request.
  mayUse({ value, session }) {
    return session === this.#session && session.used.has(value) && now() < this.#deadline;
  }

  // Releases an ID, in the background. `ended`: END was answered with success. Otherwise `cooldown` is the
  // time in milliseconds until the model has forgotten the sequence; by default it is the manager's.
  release({ value, session }, { ended = false, cooldown = undefined } = {}) {
    if (!session.used.delete(value)) throw new CidError("NOT_HELD", `${value} was released, or was lost`);
    session.leaving.set(value, ended ? { ended } : { cooldown_ms: cooldown });
    this.#inTurn((current) => this.#flush(current)).catch(() => {}); // the heartbeat tries again
  }

  // Releases all IDs and closes the session. IDs in use cool.
  async close() {
    if (this.#session !== null) await this.#inTurn((current) => this.#flush(current)).catch(() => {});
    this.#closed.abort();
    await this.#heartbeat;
    const session = this.#session;
    if (session === null) return;
    this.#session = null;
    const ended = session.used.size + session.leaving.size === 0 && !session.doubtful;
    const limit = Math.min(this.#timeout, this.#ttl); // later it has expired
    await this.#retry(limit, () => this.#ask(session, CLOSE, { ended })).catch(() => {});
  }

  // ---- Changes: one at a time, each with its own seq

  #inTurn(work) {
    const attempt = async () => {
      if (this.#closed.signal.aborted) throw new CidError("INVALID_ARGUMENT", "this client is closed");
      const session = await this.#established();
      if (session.doubtful) await this.#reconcile(session);
      return work(session);
    };
    const turn = this.#turn.then(() => this.#retry(this.#timeout, attempt));
    this.#turn = turn.catch(() => {});
    return turn;
  }

  async #change(session, code, parameters, ids) {
    session.doubtful = true; // until an answer tells what was done
    const what = { ...parameters, seq: ++session.seq };
    const values = await this.#ask(session, code, what, ids).catch((error) => {
      session.doubtful = ["NO_ANSWER", "REPEATED"].includes(error.code);
      throw error;
    });
    session.doubtful = false;
    return values;
  }

  // After a lost answer. HELD with the next seq also blocks the change, if it is still on its way.
  async #reconcile(session) {
    const held = new Set(await this.#ask(session, HELD, { seq: ++session.seq }));
    for (const known of [session.used, session.leaving]) {
      for (const value of known.keys()) if (!held.has(value)) known.delete(value);
    }
    for (const value of held) { // those that are not known were issued, and nobody has used them
      if (!session.used.has(value) && !session.leaving.has(value)) session.leaving.set(value, { ended: true });
    }
    session.doubtful = false;
  }

  async #flush(session) {
    while (session.leaving.size) {
      const [how] = session.leaving.values();
      const alike = ([, other]) => other.ended === how.ended && other.cooldown_ms === how.cooldown_ms;
      const ids = [...session.leaving].filter(alike).map(([value]) => value).slice(0, 1000);
      await this.#change(session, DELETE, how, ids);
      ids.forEach((value) => session.leaving.delete(value));
    }
  }

  // ---- The session

  // Returns a session whose lease is not over.
  async #established() {
    if (this.#session !== null && now() >= this.#deadline) await this.#renew(this.#session);
    if (this.#session !== null) return this.#session;
    if (now() >= (this.#opening?.sent ?? 0) + this.#ttl) this.#opening = null; // it would have no time left
    this.#opening ??= { token: randomBytes(16).toString("hex"), sent: now() };
    const { token, sent } = this.#opening;
    const opened = { token, seen: "" };
    const answer = await this.#ask(opened, OPEN, { ttl_ms: this.#ttl, label: this.#label });
    const [, generation, , high, low, , , slice = 0n, slices = 0n] = answer;
    const hex = ((high << 64n) | low).toString(16).padStart(32, "0");
    const registry = hex.replace(/^(.{8})(.{4})(.{4})(.{4})/, "$1-$2-$3-$4-");
    const headers = slices ? { "cid-slice": String(slice) } : {};
    const holds = { seq: 0, doubtful: false, used: new Set(), leaving: new Map() };
    this.#session = { ...opened, generation, registry, headers, ...holds };
    this.#opening = null;
    this.#deadline = sent + this.#ttl - TICK; // from the first OPEN: others renew nothing
    this.#heartbeat ??= this.#beat();
    return this.#session;
  }

  async #renew(session) {
    const [generation] = await this.#ask(session, RENEW, { used: session.used.size });
    if (generation === session.generation) return;
    this.#lose(session);
    throw new CidError("SESSION_UNKNOWN", "the manager has another session under this token");
  }

  #lose(session) {
    if (session !== this.#session) return;
    [this.#session, this.#deadline] = [null, 0];
    session.used.clear();
  }

  async #beat() {
    for (let pause = this.#ttl / 3; !this.#closed.signal.aborted; ) {
      const how = { signal: this.#closed.signal, ref: false }; // it does not keep the program running
      await sleep(pause * (0.75 + Math.random() / 4), null, how).catch(() => {});
      try {
        if (this.#session !== null) await this.#renew(this.#session);
        if (this.#session?.leaving.size) this.#inTurn((session) => this.#flush(session)).catch(() => {});
        pause = this.#ttl / 3;
      } catch { pause = this.#ttl / 16; }
    }
  }

  // ---- Requests

  // Calls `work` until it succeeds, an error stays whatever one tries, or the time is over.
  async #retry(limit, work) {
    const until = now() + limit;
    for (let pause = 20; ; pause = Math.min(2 * pause, this.#ttl / 8)) {
      try {
        return await work();
      } catch (error) {
        if (!CURED.includes(error.code) || now() + pause >= until) throw error;
        await sleep(pause * (0.5 + Math.random() / 2));
      }
    }
  }

  // Sends one request of a session, and returns OUTPUT as BigInts: JSON.parse would round them.
  async #ask(session, code, parameters, ids = []) {
    const sent = now();
    const { token, registry, seen, headers } = session;
    let body = JSON.stringify({ CODE: code, session: token, registry, seen, ...parameters });
    if (ids.length) body = `${body.slice(0, -1)},"CORRELATION_ID":[${ids}]}`;
    const signal = AbortSignal.timeout(Math.min(this.#timeout, this.#ttl / 8));
    const fail = (error) => { throw new CidError("NO_ANSWER", String(error.cause ?? error.message)); };
    const answer = await fetch(this.#url, { method: "POST", body, headers, signal }).catch(fail);
    const text = await answer.text().catch(fail);
    const [, name, words] = /\[CIDALLOC \d+ ([A-Z_]+)\] ?([^"]*)/.exec(text) ?? [];
    const replaced = name === "REGISTRY_MISMATCH" && now() >= this.#deadline;
    if (name === "SESSION_UNKNOWN" || replaced) this.#lose(session);
    if (name === "SESSION_UNKNOWN" && code === CLOSE) return [];
    const [, output] = (answer.ok && /"OUTPUT":\[?((\d+(,\d+)*)?)/.exec(text)) || [];
    if (output === undefined) throw new CidError(name ?? "NO_ANSWER", words ?? text.slice(0, 200));
    const [, stamp = ""] = /"DETAIL":\[?"(?:draining )?([0-9a-f]{32})"/.exec(text) ?? [];
    if (stamp > session.seen) session.seen = stamp; // of the registry's state, which only grows
    if (session === this.#session) this.#deadline = Math.max(this.#deadline, sent + this.#ttl - TICK);
    return output ? output.split(",").map(BigInt) : [];
  }
}
