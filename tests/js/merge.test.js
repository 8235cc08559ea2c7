// Merging, as the applications' pages live through it: their hook, in the client that most of them
// run, before the real gateway and a real Postgres. The hook forgets a message that is followed by
// another within two seconds; what the gateway sends is made so that nothing is forgotten.

import assert from 'node:assert/strict';
import { after, before, describe, it } from 'node:test';
import { setInterval } from 'node:timers/promises';
import { fileURLToPath } from 'node:url';

import { withRealtime } from './support/client.js';
import { ANON, Gateway } from './support/gateway.js';
import { lasting } from './support/wait.js';
import { RefreshHook } from './support/refresh_hook.js';
import { Stage } from './support/stage.js';

const PLAIN_RELAY = fileURLToPath(new URL('support/plain_relay.toml', import.meta.url));

/** The window, and longer than it. */
const LONG = { ms: 30_000 };
/** After so long a catch-up is repeated in no other message. */
const CARRIED_NO_MORE = 5500;

const sorted = (endpoints) => [...endpoints].sort();

describe('merging', { concurrency: true, timeout: 120_000 }, () => {
  let stage;
  before(async () => {
    stage = await Stage.start();
  });
  after(() => stage?.stop());

  /** A page that views an event: its channel and its hook. */
  async function page(t, event, url) {
    const channel = stage.client(t, withRealtime('2.11.15'), ANON, url).channel(`cache_invalidate_${event.eid}`);
    const hook = new RefreshHook(t, event.eid, channel);
    channel.subscribe();
    await channel.joined();
    return { channel, hook };
  }

  /** The same, when what it was told on joining is fetched, and repeated no more. */
  async function settledPage(t, event, url) {
    const it = await page(t, event, url);
    const { payload } = await it.channel.received('catch_up');
    await it.hook.refreshed(payload.endpoints, 0);
    await lasting(CARRIED_NO_MORE);
    return it;
  }

  /** Messages to a channel from here on; `nth` waits for them. */
  function messages({ channel }) {
    const after = channel.broadcasts.items.length;
    return {
      nth: async (count) => (await channel.broadcasts.nth(count, 'a message', undefined, { after, ...LONG })).payload,
      get all() {
        return channel.broadcasts.items.slice(after).map(({ payload }) => payload);
      },
    };
  }

  describe('while somebody bids every second for twenty seconds', { concurrency: true }, () => {
    /** Bids on six artworks in turn, and gives what the page has refreshed since the first. */
    async function evening(t, event, { channel, hook }) {
      const start = performance.now();
      const received = messages({ channel });
      const committed = [];
      for await (const _ of setInterval(1000)) {
        const art = event.art[committed.length % event.art.length];
        await event.bid(art);
        committed.push({ at: performance.now(), art });
        if (committed.length === 20) break;
      }
      const heard = () => received.all.reduce((sum, { merged = 1 }) => sum + merged, 0);
      await channel.broadcasts.find('the last of all bids', () => heard() >= 20, LONG);
      await hook.refreshed(received.all.at(-1).endpoints, performance.now());
      assert.equal(heard(), 20);
      const refreshes = hook.refreshes.items.filter(({ at }) => at >= start);
      const endpoints = new Set(refreshes.flatMap(({ endpoints }) => endpoints));
      const missed = committed.filter(
        ({ at, art }) => !refreshes.some((it) => it.at >= at && it.endpoints.includes(art.bids)),
      );
      return { refreshes, endpoints, missed, received: received.all };
    }

    it('the page refreshes at least six times, and everything that has changed', async (t) => {
      const event = await stage.event({ artworks: 6 });
      const { refreshes, endpoints, missed, received } = await evening(t, event, await settledPage(t, event));
      t.diagnostic(`${received.length} messages, ${refreshes.length} refreshes`);
      assert.ok(refreshes.length >= 6, `${refreshes.length} refreshes`);
      assert.deepEqual(sorted(endpoints), sorted([event.main, ...event.art.map(({ bids }) => bids)]));
      assert.deepEqual(missed, []);
      assert.equal(new Set(received.map(({ timestamp }) => timestamp)).size, received.length);
    });

    it('with merging off the page refreshes once, and forgets what came before', async (t) => {
      const gateway = await Gateway.start({ DATABASE_URL: stage.postgres.url, CONFIG: PLAIN_RELAY });
      t.after(() => gateway.kill());
      const event = await stage.event({ artworks: 6 });
      const { refreshes, endpoints, received } = await evening(t, event, await page(t, event, gateway.url));
      assert.equal(received.length, 20);
      assert.equal(refreshes.length, 1);
      assert.deepEqual(sorted(endpoints), sorted([event.main, event.art[19 % 6].bids]));
    });
  });

  // That nothing was sent for a minute makes no difference to a gateway that is told of the event
  // for the first time: neither has a window that is open.
  it('what one transaction sent is one message, the first one too', async (t) => {
    const event = await stage.event({ artworks: 24 });
    const viewer = await settledPage(t, event);
    const received = messages(viewer);
    const closing = () => stage.sql.query("UPDATE art SET status = 'closed' WHERE event_id = $1", [event.id]);
    for (const [index, what] of ['at once', 'after the window'].entries()) {
      await closing();
      const message = await received.nth(index + 1);
      const seen = [message.type, message.merged, message.endpoints];
      assert.deepEqual(seen, ['art_updated', 24, [event.main, event.media]], what);
    }
    // Nothing of them is left: a vote comes with nothing but what the last one carries.
    await event.vote();
    const vote = await received.nth(3);
    assert.deepEqual([vote.type, vote.merged], ['vote_cast', 1]);
    assert.equal(new Set(received.all.map(({ timestamp }) => timestamp)).size, 3);
    assert.equal(received.all.length, 3);
  });

  it('a vote half a second after a catch-up does not make the page forget it', async (t) => {
    const event = await stage.event({ artworks: 3 });
    const viewer = await page(t, event);
    const { payload } = await viewer.channel.received('catch_up');
    const all = [event.main, event.media, event.artists, ...event.art.map(({ bids }) => bids)];
    assert.deepEqual(sorted(payload.endpoints), sorted(all));
    await lasting(500);
    await event.vote();
    const voted = performance.now();
    await viewer.hook.refreshed(all, voted);
    // The vote itself came as it was notified, and the catch-up had no time to be refreshed alone.
    assert.deepEqual(viewer.channel.types, ['vote_cast']);
    assert.equal(viewer.hook.refreshes.items.filter(({ at }) => at < voted).length, 0);
  });

  it('what the network delays by a window and delivers with the next is not forgotten', async (t) => {
    const event = await stage.event({ artworks: 6 });
    const proxy = await stage.proxy(t);
    const viewer = await settledPage(t, event, proxy.url);
    const bids = [];
    for (let pair = 0; pair < 3; pair++) {
      const after = proxy.frames.items.length;
      proxy.hold();
      for (const [index, art] of event.art.slice(2 * pair, 2 * pair + 2).entries()) {
        await event.bid(art);
        bids.push({ art, at: performance.now() });
        // It leaves at the end of the window that the one before has begun.
        await proxy.frame('gateway', 'broadcast', { after, count: index + 1 });
      }
      proxy.release();
    }
    for (const { art, at } of bids) await viewer.hook.refreshed([event.main, art.bids], at);
  });

  it('two artworks sold in one transaction have two winners', async (t) => {
    const event = await stage.event({ artworks: 2 });
    const viewer = await settledPage(t, event);
    const topic = `auction_winner_${event.eid}`;
    const winners = await stage
      .client(t, withRealtime('2.11.15'), ANON)
      .join(topic, { event: 'auction_winner' });
    const received = messages(viewer);
    const notified = await stage.notifications(topic);
    await stage.sql.query("UPDATE art SET status = 'sold' WHERE event_id = $1", [event.id]);
    const facts = [await notified.nth(1, 'a winner'), await notified.nth(2, 'another')].map((it) => JSON.parse(it));
    await winners.broadcasts.nth(2, 'a winner');
    assert.equal((await received.nth(1)).merged, 2);
    // As they were notified, and no third.
    await stage.gateway.publish(topic, 'auction_winner', { type: 'marker' });
    await winners.received('marker');
    const told = winners.broadcasts.items.map(({ payload }) => payload);
    assert.deepEqual(told, [...facts, { type: 'marker' }]);
    assert.deepEqual(sorted(facts.map(({ art_id }) => art_id)), sorted(event.art.map(({ id }) => id)));
  });

  it('what server code broadcasts is merged with what the database notifies', async (t) => {
    const event = await stage.event({ artworks: 2 });
    const viewer = await settledPage(t, event);
    const received = messages(viewer);
    const topic = `cache_invalidate_${event.eid}`;
    const says = (type, endpoint) =>
      stage.gateway.publish(topic, 'cache_invalidation', {
        type,
        event_eid: event.eid,
        endpoints: [endpoint],
        timestamp: Date.now() / 1000,
      });
    await says('first', `${event.main}/first`);
    const first = await received.nth(1);
    assert.deepEqual([first.type, first.merged], ['first', undefined]);
    // The database before server code, and after it.
    const notified = (count) => event.notified.nth(count, 'the bid');
    const before = event.notified.items.length;
    await event.bid(event.art[0]);
    await notified(before + 1);
    await says('second', `${event.main}/second`);
    await event.bid(event.art[1]);
    const second = await received.nth(2);
    assert.deepEqual([second.type, second.merged], ['bid_placed', 3]);
    const all = ['first', 'second'].map((it) => `${event.main}/${it}`);
    assert.deepEqual(sorted(second.endpoints), sorted([event.main, ...all, ...event.art.map(({ bids }) => bids)]));
    await viewer.hook.refreshed(second.endpoints, 0);
    assert.equal(received.all.length, 2);
  });
});
