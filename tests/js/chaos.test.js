// Nothing is missed, whatever goes wrong; and who says so is believed, because the same
// run finds that a plain relay misses much.

import assert from 'node:assert/strict';
import { describe, it } from 'node:test';
import { fileURLToPath } from 'node:url';

import { Ledger } from './chaos/ledger.js';
import { KINDS, schedule } from './chaos/schedule.js';
import { Process } from './support/process.js';
import { within } from './support/wait.js';

const SEED = 4;
const CHAOS = fileURLToPath(new URL('chaos.js', import.meta.url));
const PLAIN_RELAY = fileURLToPath(new URL('support/plain_relay.toml', import.meta.url));
const EVENT = '/live/event/AB3101';

/** A ledger whose clock a test sets, and a screen that was joined at 0. */
function stage() {
  let now = 0;
  let stamp = 0;
  const ledger = new Ledger(() => now);
  const screen = ledger.screen({ name: 'a viewer' }, 'AB3101');
  screen.joined();
  return {
    ledger,
    screen,
    at: (ms) => (now = ms),
    commit: (endpoints = [EVENT], eid = 'AB3101') => ledger.commit('a change', eid, endpoints, '1'),
    receive: (endpoints = [EVENT], timestamp = (stamp += 1)) => screen.receive({ endpoints, timestamp }),
    owed: () => [...ledger.open].map(({ endpoint }) => endpoint),
  };
}

describe('who has been told of what', () => {
  it('owes each endpoint of a committed change', () => {
    const { ledger, commit, receive, owed } = stage();
    ledger.settle(commit([EVENT, `${EVENT}/media`]), 'done');
    assert.deepEqual(owed(), [EVENT, `${EVENT}/media`]);
    receive([`${EVENT}/media`]);
    assert.deepEqual(owed(), [EVENT]);
  });

  it('takes a message from before the commit for nothing', () => {
    const { ledger, at, commit, receive, owed } = stage();
    receive();
    at(1);
    ledger.settle(commit(), 'done');
    assert.deepEqual(owed(), [EVENT]);
  });

  it('takes a message between COMMIT and its answer', () => {
    const { ledger, at, commit, receive, owed } = stage();
    const sent = commit();
    at(1);
    receive();
    ledger.settle(sent, 'done');
    assert.deepEqual(owed(), []);
  });

  it('takes a message whose timestamp came before for nothing, as the applications do', () => {
    const { ledger, at, commit, receive, owed, screen } = stage();
    receive([EVENT], 5);
    at(1);
    ledger.settle(commit(), 'done');
    receive([EVENT], 5);
    assert.deepEqual(owed(), [EVENT]);
    assert.equal(screen.repeated, 1);
  });

  it('owes nothing of a change that failed, and of one that is unknown only when it is known', () => {
    const { ledger, commit, owed } = stage();
    ledger.settle(commit(), 'failed');
    const lost = commit();
    ledger.settle(lost, 'unknown');
    assert.deepEqual(owed(), []);
    ledger.settle(lost, 'done');
    assert.deepEqual(owed(), [EVENT]);
  });

  it('owes nothing of another event, and nothing to a page that is gone', () => {
    const { ledger, screen, commit, owed } = stage();
    ledger.settle(commit([EVENT], 'AB3102'), 'done');
    assert.deepEqual(owed(), []);
    ledger.settle(commit(), 'done');
    screen.end();
    ledger.settle(commit(), 'done');
    assert.deepEqual(owed(), []);
    assert.equal(ledger.dismissed, 1);
  });

  it('owes a page what changed while it was loaded and before its join was answered', () => {
    const { ledger, at, commit } = stage();
    ledger.settle(commit(), 'done');
    at(1);
    const late = ledger.screen({ name: 'a late one' }, 'AB3101');
    ledger.settle(commit([`${EVENT}/media`]), 'done');
    at(2);
    late.joined();
    const owed = [...ledger.open].filter(({ screen }) => screen === late);
    assert.deepEqual(owed.map(({ endpoint }) => endpoint), [`${EVENT}/media`]);
  });
});

describe('the schedule', () => {
  it('is the same for the same seed, and a shorter one is its beginning', () => {
    assert.deepEqual(schedule(7, 60), schedule(7, 60));
    assert.notDeepEqual(schedule(7, 60).faults, schedule(8, 60).faults);
    const [short, long] = [schedule(7, 20), schedule(7, 60)];
    assert.deepEqual(short.faults, long.faults.slice(0, short.faults.length));
    assert.deepEqual(short.writes, long.writes.slice(0, short.writes.length));
  });

  it('has every kind of fault within the 60 s that are played here', () => {
    const kinds = new Set(schedule(SEED, 60).faults.map(({ kind }) => kind));
    assert.deepEqual(KINDS.filter((kind) => !kinds.has(kind)), []);
  });
});

describe('chaos', { timeout: 600_000 }, () => {
  it('misses no invalidation in 60 s of faults', async (t) => {
    const { code, output } = await play(t, { SECONDS: '60' });
    assert.equal(code, 0, output);
  });

  it('is found to miss invalidations when the gateway does not catch up', async (t) => {
    const { code, output } = await play(t, { CONFIG: PLAIN_RELAY, SECONDS: '30', CONVERGENCE: '25' });
    assert.equal(code, 1, output);
    // Some are deaf; but others have joined again, hear everything that happens from then on, and
    // were not told of what had happened.
    const [, absent = ''] = /^not joined at the end: (.*)$/m.exec(output) ?? [];
    const missing = output.matchAll(/^missing: (viewer \d+ \((?:rejoining|newest)\)) /gm);
    assert.ok([...missing].some(([, who]) => !absent.includes(who)), output);
  });
});

/** Plays the run in a process of its own, which ends all that it starts. */
async function play(t, settings) {
  const env = { ...process.env, SEED: String(SEED), ...settings };
  const run = await Process.start(process.execPath, [CHAOS], { env });
  try {
    const [code] = await within(run.exited, 'the end of the run', { ms: 300_000 });
    const output = [...run.lines.items, ...run.errors.items].join('\n');
    for (const line of run.lines.items) if (!/^missing:|^ {6}/.test(line)) t.diagnostic(line);
    return { code, output };
  } finally {
    await run.stop('SIGTERM');
  }
}
