// The seeded chaos run: a real gateway, a real Postgres, viewers, and faults drawn at random. For every
// viewer and every endpoint that changed while it looked or was on its way back, an invalidation of it
// must arrive after the change's commit.
//
//     SEED=7 SECONDS=300 node chaos.js
//
// Ends with 0 if nothing was missed, 1 if invalidations are missing and nothing else is wrong, 2 if
// something else is. CONVERGENCE is how many seconds after the last fault everybody must have been
// told, TRANSCRIPT names a file for all that was seen, and CONFIG a settings file of the gateway.

import { mkdirSync, writeFileSync } from 'node:fs';
import { dirname, resolve } from 'node:path';

import { announce, exceptions, report, transcript } from './chaos/report.js';
import { Run } from './chaos/run.js';
import { schedule } from './chaos/schedule.js';

/** Deaf viewers are healed 2.5, 17, 32 s after their socket opened, and then each minute. */
const CONVERGENCE = 100;

/** What is none of the run's seconds: start, rest and end. */
const OVERHEAD = 200;

const seed = number('SEED', Math.floor(Math.random() * 2 ** 31));
const seconds = number('SECONDS', 300);
const convergence = number('CONVERGENCE', CONVERGENCE);

const plan = schedule(seed, seconds);
console.log(announce(plan));
const run = new Run(plan, convergence * 1000);

let isOver = false;
const longest = (seconds + 2 * convergence + OVERHEAD) * 1000;
const deadline = setTimeout(() => finish(new Error('the run hangs')), longest);
for (const signal of ['SIGINT', 'SIGTERM', 'SIGHUP']) {
  process.on(signal, () => finish(new Error(`ended by ${signal}`)));
}
process.on('uncaughtException', finish);
process.on('unhandledRejection', finish);
await run.play().then(() => finish(), finish);

/** Says what was seen, ends everything, and this process. */
async function finish(error) {
  if (isOver) return;
  isOver = true;
  clearTimeout(deadline);
  console.log(report(run, plan));
  if (error) console.log(`the run could not be played to its end: ${error.stack}`);
  if (process.env.TRANSCRIPT) {
    const file = resolve(process.env.TRANSCRIPT);
    mkdirSync(dirname(file), { recursive: true });
    writeFileSync(file, transcript(run));
    console.log(`all that was seen: ${file}`);
  }
  // What does not end by then is ended by its watchdog, when this process is gone.
  const late = setTimeout(() => process.exit(2), 20_000);
  await run.stop().catch((failure) => console.log(failure));
  clearTimeout(late);
  const isWrong = error || run.wrongs.length > 0;
  const missed = exceptions(run).length > 0 || run.convergence.includes(null);
  const verdict = isWrong ? 'FAILED' : missed ? 'MISSED' : 'nothing was missed';
  console.log(`${verdict}: SEED=${seed} SECONDS=${seconds}`);
  process.exit(isWrong ? 2 : missed ? 1 : 0);
}

function number(name, otherwise) {
  const text = process.env[name] ?? '';
  if (text === '') return otherwise;
  const value = Number(text);
  if (!Number.isInteger(value) || value < 0) throw new Error(`${name}: expected a whole number`);
  return value;
}
