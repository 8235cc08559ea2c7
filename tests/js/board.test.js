// The boards and the alerts on a real Prometheus: each fault in turn under load sets off its alerts
// and no other, and after all of them every query of every panel has had something to show.

import assert from 'node:assert/strict';
import { after, before, describe, it } from 'node:test';

import { boards, filled } from './support/boards.js';
import { Night } from './support/night.js';
import { Prometheus } from './support/prometheus.js';

/** Every `for` and window of the rules is so much shorter: 30 s are three. */
const HURRY = 10;

/** Ten scrapes. */
const RATE_INTERVAL = '5s';

/** What this night does not have, as panel and legend. */
const NEVER = {
  'Upgrades: accept failed': 'no descriptor is scarce',
  'Tokens refused: key set: {{kind}}': 'no key set',
  'Tokens refused: key left out: {{reason}}': 'no key set',
  'Tokens that hold: expired': 'no token that ends within the test',
  'Key set: ': 'no key set',
  'What went wrong: not listened: {{reason}}': 'few events, with short names',
};

describe('boards and alerts', { timeout: 300_000 }, () => {
  let night, prometheus, start;
  /** When each fault began and was over, and which alerts belong to it. */
  const faults = [];

  before(async () => {
    night = await Night.start({
      METRICS__DATABASE_INTERVAL: '1s',
      RELAY__CANARY_INTERVAL: '1s',
      RELAY__RESYNC_SPREAD: '100ms',
      RELAY__BACKOFF_MAX: '500ms',
    });
    prometheus = await Prometheus.start(night.gateways.map(({ admin }) => admin), { hurry: HURRY });
    // It looks for whom to scrape for seconds, in which a GatewayDown in a hurry fires.
    await shows('sum(up)', (count) => count === 2);
    await prometheus.fires();
    start = Date.now() / 1000;
  });
  after(async () => {
    await prometheus?.stop();
    await night?.stop();
  });

  /** Has `break` cause the alerts and `repair` end them. */
  const fault = async (alerts, cause, repair) => {
    const fault = { alerts, from: Date.now() / 1000, to: Infinity };
    faults.push(fault);
    await cause();
    await prometheus.fires(...alerts);
    await repair();
    await prometheus.fires();
    fault.to = Date.now() / 1000;
  };

  const shows = async (expr, wanted) => {
    let seen;
    await prometheus.until(
      async () => (seen = await prometheus.query(expr)).some(({ value }) => wanted(Number(value[1]))),
      () => `${expr}: ${JSON.stringify(seen)}`,
    );
  };

  it('a night with votes, bids and mischief goes on without an alert', async () => {
    await shows('sum(rate(tidegate_deliveries_total[5s]))', (rate) => rate > 1);
    await night.mischief();
    await shows('sum(rate(tidegate_window_wait_seconds_count[5s]))', (rate) => rate > 0);
    await shows('count(count_over_time(ALERTS_FOR_STATE[1h])) or vector(0)', () => true);
    assert.deepEqual(await prometheus.firing(), []);
  });

  it('clients that stay deaf', async () => {
    let deaf;
    await fault(
      ['DeafClientsRising'],
      async () => (deaf = await night.deafen(night.gateways[0], 12)),
      async () => deaf.forEach((socket) => socket.close()),
    );
  });

  it('a trigger that somebody drops', async () => {
    await fault(
      ['TriggerMissing', 'WritesWithoutNotifications'],
      () => night.stage.sql.query('DROP TRIGGER cache_invalidate_bids_trigger ON bids'),
      () => night.stage.sql.query('SELECT enable_cache_invalidation()'),
    );
  });

  it('a Postgres that stops', async () => {
    await fault(
      ['LinkDown'],
      async () => {
        await night.pause();
        await night.stage.postgres.halt();
      },
      async () => {
        await night.stage.postgres.resume();
        await night.stage.reconnect();
        night.resume();
      },
    );
  });

  it('a gateway that is killed', async () => {
    await fault(
      ['GatewayDown'],
      () => night.gateways[1].kill(),
      () => night.gateways[1].resume(),
    );
  });

  it('no alert has fired but where it should', async () => {
    const fired = await prometheus.range('ALERTS{alertstate="firing"}', start, Date.now() / 1000);
    for (const { metric, values } of fired) {
      const name = metric.alertname;
      for (const [time] of values) {
        const isMeant = faults.some(({ alerts, from, to }) => alerts.includes(name) && time >= from && time <= to + 1);
        assert.ok(isMeant, `${name} at ${Math.round(time - start)} s: ${JSON.stringify(metric)}`);
      }
    }
  });

  for (const board of boards()) {
    it(`${board.title}: every query has had something plausible to show`, async () => {
      const end = Date.now() / 1000;
      const silent = [];
      for (const panel of board.panels) {
        for (const { expr, legendFormat = '' } of panel.targets) {
          const series = await prometheus.range(filled(expr, RATE_INTERVAL), start, end);
          const numbers = series.flatMap(({ values }) => values.map(([, text]) => Number(text))).filter(Number.isFinite);
          const what = `${panel.title}: ${legendFormat}`;
          if (numbers.length === 0) silent.push(what);
          for (const number of numbers) plausible(number, panel, expr);
        }
      }
      assert.deepEqual(silent.filter((what) => !NEVER[what]), []);
    });
  }

  it('every variable of the boards has values', async () => {
    for (const { query } of boards().flatMap(({ templating }) => templating.list)) {
      const [, expr, label] = /^label_values\((.*), (\w+)\)$/.exec(query.query ?? '') ?? [];
      if (!expr) continue;
      const series = await prometheus.query(filled(expr, RATE_INTERVAL));
      assert.ok(series.some(({ metric }) => metric[label]), query.query);
    }
  });
});

/** Whether a number can be what its panel's unit says: ratios of one, seconds of this test. */
function plausible(number, panel, expr) {
  const what = `${panel.title} shows ${number}: ${expr}`;
  const { unit } = panel.fieldConfig.defaults;
  if (unit === 'percentunit') assert.ok(number >= 0 && number <= 1.05, what);
  // The longest bucket of a latency is ten seconds, and nothing here is older than the test; what
  // has never happened is as old as 1970.
  else if (unit === 's' && /quantile/.test(expr) && !/connection_seconds/.test(expr)) {
    assert.ok(number >= 0 && number <= 10, what);
  } else if (unit === 's') assert.ok(number > -60 && (number < 600 || number > 1e9), what);
  else if (unit === 'bytes' || unit === 'Bps') assert.ok(number >= 0 && number < 1e10, what);
  else assert.ok(number >= 0 && number < 1e6, what);
}
