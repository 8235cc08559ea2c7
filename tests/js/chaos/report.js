// What a run will be and what it came to, in words.

import { describe } from './run.js';
import { KINDS } from './schedule.js';

/** Exceptions that are shown with what their viewer saw around them; the rest have a line each. */
const DETAILED = 8;
/** Changes of one exception that are named; the rest are counted. */
const NAMED = 4;
/** What a viewer saw is shown from so long before the commit to so long after. */
const AROUND = { before: 6000, after: 40_000, lines: 60 };

/** The metrics that tell of merging, of catching up, of healing, and of what made them necessary. */
const METRICS = new RegExp(
  '^tidegate_(catch_ups|gap|heal|invalidations|merge|conflat|joins_total|relay_recon|connections_cl)',
);

/** What will happen. */
export function announce({ seed, seconds, viewers, published, faults, writes }) {
  return [
    `seed ${seed}, ${seconds} s: ${viewers.length} viewers, ${published.length} published clients, ` +
      `${writes.length} writes, ${faults.length} faults`,
    ...faults.map((fault) => `  ${column(fault.at)} ${describe(fault)}`),
  ].join('\n');
}

/** What was owed and never came, by viewer and endpoint: `{ who, endpoint, commits }`. */
export function exceptions({ ledger }) {
  const missing = new Map();
  for (const { screen, commit, endpoint } of ledger.open) {
    const key = `${screen.owner.name} ${endpoint}`;
    if (!missing.has(key)) missing.set(key, { who: screen.owner, endpoint, commits: [] });
    missing.get(key).commits.push(commit);
  }
  return [...missing.values()];
}

/** What happened. */
export function report(run, plan) {
  const missing = exceptions(run);
  return [
    ...summary(run, plan),
    ...run.wrongs.map((what) => `wrong: ${what}`),
    `missing invalidations: ${missing.length}`,
    ...missing.flatMap((exception, index) => describeMissing(run, exception, index < DETAILED)),
  ].join('\n');
}

function summary(run, plan) {
  const { ledger, viewers, unanswered, convergence } = run;
  const sum = (list) => (of) => list.reduce((all, it) => all + of(it), 0);
  const [ofViewers, ofScreens] = [sum(viewers), sum(ledger.screens)];
  const time = (at) => seconds(at - run.began);
  const faults = KINDS.map((kind) => `${kind} ${plan.faults.filter((it) => it.kind === kind).length}`);
  const outcomes = ['done', 'failed', 'unknown'].map(
    (outcome) => `${ledger.commits.filter((commit) => commit.outcome === outcome).length} ${outcome}`,
  );
  const slowest = ledger.screens.map((it) => it.slowest).reduce((a, b) => (b.ms > a.ms ? b : a), { ms: 0 });
  const slow = slowest.commit
    ? ` (${slowest.screen.owner.name}, ${slowest.endpoint}, commit at ${time(slowest.commit.at)})`
    : '';
  const forgotten = ledger.screens.flatMap((screen) => screen.forgotten());
  const late = unanswered.filter(({ fault }) => fault === undefined);
  const absent = viewers
    .filter((viewer) => viewer.absent.length > 0)
    .map(({ name, absent }) => `${name} ${absent.join(' ')}`);
  const unborn = viewers.filter(({ page, isLive }) => page && !isLive);
  return [
    `faults: ${faults.join(', ')}`,
    `commits: ${outcomes.join(', ')}; transactions that ended with an error: ${run.failures}`,
    `messages received: ${ofViewers((it) => it.messages)}, of these merged: ${ofViewers((it) => it.merged)}`,
    `endpoints received that had not changed: ${ofScreens((it) => it.extra)}; ` +
      `messages with a timestamp seen before: ${ofScreens((it) => it.repeated)}`,
    `phx_error received: ${ofViewers((it) => it.heals)}; joins given up: ${unanswered.length}, ` +
      `of these with nothing out of order: ${late.length}; page reloads: ${ofViewers((it) => it.reloads)}`,
    `obligations met: ${ofScreens(({ met }) => met.length)}, ` +
      `the slowest after ${seconds(slowest.ms)}${slow}; of pages that were gone before: ${ledger.dismissed}`,
    `of those met, the applications' hook would have forgotten: ${forgotten.length}`,
    ...forgotten
      .slice(0, DETAILED)
      .map(({ screen, commit, endpoint }) => `  ${screen.owner.name} ${endpoint}, commit at ${time(commit.at)}`),
    'convergence after the last fault, and once more: ' +
      convergence.map((ms) => (ms === null ? 'never' : seconds(ms))).join(', '),
    `this process was held up for at most ${(run.delay.max / 1e6).toFixed(0)} ms`,
    ...[...run.metrics]
      .filter(([name, value]) => METRICS.test(name) && !/_(bucket|sum)\b/.test(name) && value !== 0)
      .map(([name, value]) => `  ${name} ${value}`)
      .sort(),
    ...late.map(
      ({ who, topic, asked, at }) =>
        `given up with nothing out of order: ${who} ${topic}, asked at ${time(asked)}, until ${time(at)}`,
    ),
    ...(absent.length > 0 ? [`not joined at the end: ${absent.join('; ')}`] : []),
    ...unborn.map(({ name }) => `never live: ${name}`),
  ];
}

function describeMissing(run, { who, endpoint, commits }, isDetailed) {
  const time = (at) => at - run.began;
  const changes = commits.slice(0, NAMED).map(({ what, at }) => `${what} at ${seconds(time(at))}`);
  if (commits.length > NAMED) changes.push(`and ${commits.length - NAMED} more`);
  const line = `missing: ${who.name} ${endpoint}: ${changes.join(', ')}`;
  if (!isDetailed) return [line];
  const [from, to] = [commits[0].at - AROUND.before, commits[0].at + AROUND.after];
  const seen = run.lines.filter(
    ({ at, who: name }) => (name === who.name || name === 'FAULT') && at > from && at < to,
  );
  const show = ({ at, who: name, text }) =>
    `      ${column(time(at))} ${name === who.name ? text : `${name} ${text}`}`;
  return [line, ...seen.slice(0, AROUND.lines).map(show)];
}

/** Everything that was seen, for a file. */
export function transcript(run) {
  const lines = [
    ...run.lines.map(({ at, who, text }) => ({ at, text: `${who}: ${text}` })),
    ...run.ledger.commits.map(({ at, what, endpoints, outcome }) => ({
      at,
      text: `commit: ${outcome} ${what}: ${endpoints.join(' ')}`,
    })),
  ].sort((a, b) => a.at - b.at);
  const began = new Date(performance.timeOrigin + run.began).toISOString();
  return [
    ...lines.map(({ at, text }) => `${column(at - run.began)} ${text}`),
    `the gateway's log; the schedule began at ${began}`,
    ...run.gatewayLog,
    '',
  ].join('\n');
}

function seconds(ms) {
  return `${(ms / 1000).toFixed(3)} s`;
}

function column(ms) {
  return seconds(ms).padStart(10);
}
