// One run: everything is started, everybody looks, the schedule is played, and then everything is
// whole again and everybody must have been told of everything.

import { readFileSync } from 'node:fs';
import { monitorEventLoopDelay } from 'node:perf_hooks';

import { Postgres } from '../support/postgres.js';
import { within } from '../support/wait.js';
import { Gateway } from './gateway.js';
import { Ledger } from './ledger.js';
import { Line } from './line.js';
import { Published } from './published.js';
import { EVENTS, needs } from './schedule.js';
import { Viewer } from './viewer.js';
import { Writer } from './writer.js';

const TABLES = new URL('../../../migrations/examples/production_tables.sql', import.meta.url);

/** Shorter than the defaults, so that a run sees the end of what they bound. */
const SETTINGS = {
  LOG: 'info,tidegate=debug',
  RELAY__HEARTBEAT_INTERVAL: '1s',
  RELAY__HEARTBEAT_TIMEOUT: '2s',
  RELAY__CONNECT_TIMEOUT: '2s',
  LIMITS__SILENCE_TIMEOUT: '40s',
  DRAIN__TIMEOUT: '2s',
};

/** For everybody to join, before anything happens. */
const BEGINNING = 30_000;

/** For what is under way when the schedule ends. */
const REST = 60_000;

/** A fault may be felt so long after it ended. */
const AFTERMATH = 1000;

export class Run {
  ledger = new Ledger(() => performance.now());
  viewers = [];
  /** What was observed that must not be: refused joins, closed topics, payloads that break clients. */
  wrongs = [];
  /** Joins that were given up: `{ who, topic, asked, at, fault }`. */
  unanswered = [];
  /** Transactions that failed, at their COMMIT or before. */
  failures = 0;
  /** `{ at, who, text }` of everything. */
  lines = [];
  /** How long after the last fault, and after that once more, everybody had been told; null is never. */
  convergence = [];
  metrics = new Map();
  gatewayLog = [];
  /** When the schedule's times began. */
  began = performance.now();
  delay = monitorEventLoopDelay({ resolution: 20 });
  #plan;
  #patience;
  #postgres;
  #link;
  #gateway;
  #writer;
  #lines = [];
  /** `{ kind, from, to, whom }` of every fault. */
  #faults = [];
  #under = new Set();
  /** By what it needs, the end of the latest fault. */
  #latest = new Map();
  #ended;
  #end;

  /** `patience`: how long after the last fault everybody must have been told. */
  constructor(plan, patience) {
    this.#plan = plan;
    this.#patience = patience;
    this.#ended = new Promise((_, reject) => (this.#end = reject));
    this.#ended.catch(() => {});
  }

  /** Plays it; an error if it could not be played to its end. */
  async play() {
    this.delay.enable();
    try {
      await this.#unlessEnded(this.#begin());
      await this.#unlessEnded(this.#timeline());
      await this.#unlessEnded(this.#converge());
      // And it goes on: what is changed from here on arrives, too.
      if (this.convergence[0] !== null) await this.#unlessEnded(this.#converge());
    } finally {
      this.delay.disable();
      this.metrics = (await this.#gateway?.metrics()) ?? this.metrics;
      this.gatewayLog = this.#gateway?.log ?? [];
    }
  }

  /** Ends everything that it has started. */
  async stop() {
    this.#end(new Error('stopped'));
    for (const viewer of this.viewers) viewer.close();
    for (const line of this.#lines) line.close();
    await this.#writer?.stop();
    await this.#gateway?.kill();
    this.#link?.close();
    await this.#postgres?.stop();
  }

  #log(who, text) {
    this.lines.push({ at: performance.now(), who, text });
  }

  async #unlessEnded(promise) {
    return await Promise.race([promise, this.#ended]);
  }

  async #begin() {
    this.#postgres = await Postgres.start();
    const setup = await this.#postgres.connect();
    await setup.query(readFileSync(TABLES, 'utf8'));
    await setup.end();
    const folder = new URL(this.#postgres.url).searchParams.get('host');
    this.#link = await Line.open(() => ({ path: `${folder}/.s.PGSQL.5432` }));
    this.#gateway = new Gateway({
      ...SETTINGS,
      ...(process.env.CONFIG && { CONFIG: process.env.CONFIG }),
      DATABASE_URL: `postgres://postgres@127.0.0.1:${this.#link.port}/postgres?sslmode=disable`,
    });
    this.#gateway.onEnd = (how) => this.#end(new Error(`the gateway ended by itself: ${how}`));
    const failure = await this.#gateway.migrate(this.#postgres.url);
    if (failure) throw new Error(`tidegate migrate: ${failure}`);
    this.#writer = await Writer.start(this.#postgres, this.ledger, (what) => {
      this.failures += 1;
      this.#log('writer', what);
    });
    await this.#gateway.resume();
    await this.#gateway.linked();
    for (const spec of this.#plan.viewers) await this.#add(Viewer, spec);
    for (const spec of this.#plan.published) await this.#add(Published, spec);
    const early = this.viewers.filter((_, index) => !this.#plan.viewers[index]?.opens);
    for (const viewer of early) viewer.open();
    const isLive = () => early.every((viewer) => viewer.isLive);
    if (!(await this.ledger.until(isLive, BEGINNING))) throw new Error('not everybody has joined');
  }

  /** A viewer at the end of a line of its own. */
  async #add(Kind, spec) {
    const gateway = this.#gateway;
    const onward = () => ({ ...gateway.address, localAddress: spec.address });
    const line = await Line.open(onward);
    this.#lines.push(line);
    this.viewers.push(
      new Kind(spec, {
        url: `http://127.0.0.1:${line.port}`,
        key: gateway.key,
        ledger: this.ledger,
        log: (who, text) => this.#log(who, text),
        wrong: (what) => {
          this.#log('WRONG', what);
          this.wrongs.push(what);
        },
        unanswered: (who, topic, asked) => {
          const at = performance.now();
          const fault = this.#faults.find(
            ({ from, to, whom }) =>
              (whom === undefined || whom.includes(this.#lines.indexOf(line))) &&
              from <= at && asked <= to + AFTERMATH,
          );
          this.unanswered.push({ who, topic, asked, at, fault: fault?.kind });
        },
      }),
    );
  }

  async #timeline() {
    const { viewers, faults, writes } = this.#plan;
    const moments = [
      ...writes.map((write) => ({ at: write.at, act: () => this.#writer.write(write) })),
      ...faults.map((fault) => ({ at: fault.at, act: () => this.#fault(fault) })),
      ...viewers.flatMap(({ index, opens, absences }) => [
        ...(opens ? [{ at: opens, act: () => this.viewers[index].open() }] : []),
        ...absences.map((it) => ({ at: it.at, act: () => this.viewers[index].refresh(it.topic, it.for) })),
      ]),
    ].sort((a, b) => a.at - b.at);
    this.began = performance.now();
    for (const { at, act } of moments) {
      await passed(this.began + at - performance.now());
      this.#track(act());
    }
    await within(Promise.all(this.#under), 'the end of what is under way', { ms: REST });
    this.#log('run', 'everything is whole');
  }

  /** What fails here ends the run. */
  #track(action) {
    const promise = Promise.resolve(action)
      .catch((error) => this.#end(error))
      .finally(() => this.#under.delete(promise));
    this.#under.add(promise);
  }

  /** Changes something of every event, and waits until everybody has been told of everything. */
  async #converge() {
    const from = performance.now();
    await this.#writer.resolve();
    for (const [event, eid] of EVENTS.entries()) {
      const commit = await this.#writer.write({ kind: 'bid', event, artwork: this.convergence.length });
      if (commit?.outcome !== 'done') throw new Error(`${eid} cannot be written to, and nothing is wrong`);
    }
    const isDone = () => this.ledger.isSettled && this.viewers.every((viewer) => viewer.isLive);
    const done = await this.ledger.until(isDone, this.#patience);
    this.convergence.push(done ? performance.now() - from : null);
    this.#log('run', done ? 'everybody has been told' : 'NOT everybody has been told');
  }

  /** A fault that lasts longer than it was meant to holds up the next of its place. */
  async #fault(fault) {
    const before = this.#latest.get(needs(fault));
    const after = Promise.resolve(before).then(() => this.#play(fault));
    this.#latest.set(needs(fault), after);
    await after;
  }

  async #play(fault) {
    const it = { kind: fault.kind, from: performance.now(), to: Infinity, whom: fault.whom };
    this.#log('FAULT', describe(fault));
    const disturbs = /^gateway|^clients/.test(fault.kind);
    if (disturbs) this.#faults.push(it);
    await this.#happen(fault);
    it.to = performance.now();
    this.#log('FAULT', `over: ${fault.kind}`);
  }

  async #happen(fault) {
    switch (fault.kind) {
      case 'gateway killed':
        await this.#gateway.kill();
        await passed(fault.for);
        return await this.#gateway.resume();
      case 'gateway drained':
        await this.#gateway.drain();
        await passed(fault.for);
        return await this.#gateway.resume();
      case 'gateway stopped':
        this.#gateway.freeze();
        await passed(fault.for);
        return this.#gateway.thaw();
      case 'postgres stopped':
        await this.#postgres.halt();
        await passed(fault.for);
        await this.#postgres.resume();
        return await this.#writer.resolve();
      case 'listener terminated':
        return await this.#writer.terminate(fault.whom === 'the listener');
      case 'link half open':
        this.#link.freeze();
        await passed(fault.for);
        return this.#link.thaw(fault.then);
      case 'clients cut':
        for (const index of fault.whom) this.#lines[index].refuses = fault.for > 0;
        for (const index of fault.whom) this.#lines[index].cut();
        await passed(fault.for);
        for (const index of fault.whom) this.#lines[index].refuses = false;
        return;
      case 'clients frozen':
        for (const index of fault.whom) this.#lines[index].freeze();
        await passed(fault.for);
        for (const index of fault.whom) this.#lines[index].thaw(fault.then);
        return;
      case 'pages frozen':
        for (const index of fault.whom) this.viewers[index].freeze();
        await passed(fault.for);
        for (const index of fault.whom) this.viewers[index].thaw();
        return;
      case 'burst':
        return await this.#writer.burst(fault);
      case 'long transaction':
        return await this.#writer.long(fault, passed(fault.for));
      case 'migrated again': {
        const failure = await this.#gateway.migrate(this.#postgres.url);
        if (failure) this.#log('migrate', failure);
        return;
      }
    }
    throw new Error(`no such fault: ${fault.kind}`);
  }
}

/** A fault in one line. */
export function describe({ kind, whom, ...rest }) {
  const of = Array.isArray(whom) ? [`${whom.length} of them`] : whom ? [whom] : [];
  const words = { for: (ms) => `for ${(ms / 1000).toFixed(1)} s`, then: (how) => `then ${how}` };
  delete rest.at;
  const others = Object.entries(rest).map(([name, value]) => words[name]?.(value) ?? `${name} ${value}`);
  return [kind, ...of, ...others].join(', ');
}

/** The schedule's own time. */
function passed(ms) {
  return new Promise((resolve) => setTimeout(resolve, Math.max(0, ms)));
}
