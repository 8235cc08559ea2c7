// Each published client, in each protocol version that it speaks, against the real gateway and a
// real Postgres: what an application does with it works.

import assert from 'node:assert/strict';
import { after, before, describe, it } from 'node:test';

import { FLAVOURS, isAtLeast } from './support/client.js';
import { ANON, Gateway, SERVICE } from './support/gateway.js';
import { Stage } from './support/stage.js';

/** This one reconnects, beats, and never joins again by itself. */
const isDeafAfterDrop = ({ realtime }) => realtime === '2.11.15';

describe('unchanged clients', { concurrency: true, timeout: 180_000 }, () => {
  let stage;
  before(async () => {
    stage = await Stage.start();
  });
  after(() => stage?.stop());

  for (const flavour of FLAVOURS) {
    describe(flavour.name, () => {
      /** A topic that no other flavour uses. */
      const room = (name) => `${name}-${flavour.supabase}-${flavour.vsn}`;
      const viewer = (t, key = ANON, url) => stage.client(t, flavour, key, url);

      it('receives what a vote notified, unchanged', async (t) => {
        const event = await stage.event();
        const channel = await viewer(t).join(`cache_invalidate_${event.eid}`);
        const notified = await event.vote();
        const message = await channel.received('vote_cast');
        assert.equal(message.type, 'broadcast');
        assert.equal(message.event, 'cache_invalidation');
        assert.deepEqual(message.payload, JSON.parse(notified));
        assert.equal(message.payload.event_eid, event.eid);
        assert.deepEqual(message.payload.endpoints, [`/live/event/${event.eid}`]);
        assert.ok(notified.includes(String(message.payload.timestamp)), notified);
      });

      it('receives an event by either spelling of its topic', async (t) => {
        const event = await stage.event();
        const client = viewer(t);
        const channels = await Promise.all(
          ['_', ':'].map((separator) => client.join(`cache_invalidate${separator}${event.eid}`)),
        );
        await event.vote();
        for (const channel of channels) {
          await channel.received('vote_cast');
          assert.deepEqual(channel.types, ['vote_cast']);
        }
      });

      it('receives nothing of an event that it has not joined', async (t) => {
        const [mine, other] = [await stage.event(), await stage.event()];
        const channel = await viewer(t).join(`cache_invalidate_${mine.eid}`);
        const others = await viewer(t).join(`cache_invalidate_${other.eid}`);
        const marker = [];
        await other.vote();
        await others.received('vote_cast');
        marker.push(JSON.parse(await mine.vote()));
        await channel.received('vote_cast');
        assert.deepEqual(channel.news.map(({ payload }) => payload), marker);
      });

      it('holds all its channels on one socket', async (t) => {
        const proxy = await stage.proxy(t);
        const client = viewer(t, ANON, proxy.url);
        const events = await Promise.all(Array.from({ length: 4 }, () => stage.event()));
        const topics = events.flatMap(({ eid }) => [`cache_invalidate_${eid}`, `auction_winner_${eid}`]);
        const channels = await Promise.all(topics.map((topic) => client.join(topic)));
        await events[2].vote();
        await channels[4].received('vote_cast');
        assert.equal(proxy.upgrades.items.length, 1);
        assert.deepEqual(channels.flatMap(({ types }) => types), ['vote_cast']);
      });

      it('broadcasts to others, with an acknowledgement, and to itself if it asks', async (t) => {
        const topic = room('room');
        const options = { event: 'note', config: { broadcast: { ack: true, self: false } } };
        const [sender, other] = [await viewer(t).join(topic, options), await viewer(t).join(topic, options)];
        const mirror = await viewer(t).join(topic, {
          event: 'note',
          config: { broadcast: { ack: true, self: true } },
        });
        assert.equal(await sender.send('first', 'note'), 'ok');
        await other.received('first');
        assert.equal(await other.send('second', 'note'), 'ok');
        await sender.received('second');
        assert.equal(await mirror.send('third', 'note'), 'ok');
        await Promise.all([sender, other, mirror].map((channel) => channel.received('third')));
        assert.deepEqual(sender.types, ['second', 'third']);
        assert.deepEqual(other.types, ['first', 'third']);
        assert.deepEqual(mirror.types, ['first', 'second', 'third']);
      });

      it('leaves a topic and joins it again back to back', async (t) => {
        const event = await stage.event();
        const client = viewer(t);
        const topic = `cache_invalidate_${event.eid}`;
        // The way of the offer channels: at each refresh of the page's data.
        let channel = await client.join(topic);
        for (let refresh = 0; refresh < 3; refresh++) {
          const left = channel.remove();
          channel = client.channel(topic);
          channel.subscribe();
          await channel.joined();
          assert.equal(await left, 'ok');
        }
        await event.vote();
        await channel.received('vote_cast');
        assert.deepEqual(channel.types, ['vote_cast']);
        assert.deepEqual(channel.statuses.items, [['SUBSCRIBED', undefined]]);
      });

      it('leaves a topic and is told nothing more of it', async (t) => {
        const event = await stage.event();
        const proxy = await stage.proxy(t);
        const client = viewer(t, ANON, proxy.url);
        const [left, kept] = [
          await client.join(`cache_invalidate_${event.eid}`),
          await client.join(`cache_invalidate:${event.eid}`),
        ];
        assert.equal(await left.remove(), 'ok');
        assert.equal(await left.became('CLOSED'), undefined);
        await proxy.frame('gateway', 'phx_close');
        await event.vote();
        await kept.received('vote_cast');
        const delivered = proxy.frames.items.filter(({ text }) => text.includes('vote_cast'));
        assert.deepEqual(
          new Set(delivered.map(({ topic }) => topic)),
          new Set([`realtime:cache_invalidate:${event.eid}`]),
        );
      });

      it('joins with Postgres changes, each binding echoed as it was sent', async (t) => {
        const proxy = await stage.proxy(t);
        const changes = [
          { event: '*', schema: 'public', table: 'bids' },
          { event: 'INSERT', schema: 'public', table: 'votes', filter: 'round=eq.1' },
        ];
        const topic = room('changes');
        const options = { event: 'note', changes };
        const channel = await viewer(t, ANON, proxy.url).join(topic, options);
        const join = await proxy.frame('client', 'phx_join');
        const reply = await proxy.frame('gateway', 'phx_reply');
        const asked = join.payload.config.postgres_changes;
        const echoed = reply.payload.response.postgres_changes;
        assert.deepEqual(echoed.map(({ id, ...binding }) => binding), asked);
        assert.ok(echoed.every(({ id }) => Number.isInteger(id) && id > 0), JSON.stringify(echoed));
        // They are not offered yet: a notice says so, and broadcasts go on.
        const notice = await proxy.frame('gateway', 'system');
        assert.equal(notice.payload.status, 'error');
        const other = await viewer(t).join(topic, { event: 'note' });
        await other.send('marker', 'note');
        await channel.received('marker');
        assert.deepEqual(channel.statuses.items, [['SUBSCRIBED', undefined]]);
      });

      it('gets a sync for a channel with presence', async (t) => {
        const channel = await viewer(t).join(room('presence'), { presence: true });
        await channel.syncs.find('sync', () => true);
        assert.deepEqual(channel.raw.presenceState(), {});
      });

      if (isAtLeast(flavour, '2.8.0')) {
        it('sends by REST what it sends before it has joined', async (t) => {
          const event = await stage.event();
          const topic = `cache_invalidate_${event.eid}`;
          const viewing = await viewer(t).join(topic);
          assert.equal(await viewer(t, SERVICE).channel(topic).send('from_server_code'), 'ok');
          await viewing.received('from_server_code');
          const chatting = await viewer(t).join(room('rest'), { event: 'note' });
          assert.equal(await viewer(t).channel(room('rest')).send('from_anybody', 'note'), 'ok');
          await chatting.received('from_anybody');
        });

        it('cannot write to a cache topic as anybody but service_role', async (t) => {
          const event = await stage.event();
          const topic = `cache_invalidate_${event.eid}`;
          const viewing = await viewer(t).join(topic);
          const forger = viewer(t);
          // By REST the answer is the same as for a message that is sent.
          assert.equal(await forger.channel(topic).send('forged_by_rest'), 'ok');
          const joined = await viewer(t).join(topic);
          assert.equal(await joined.send('forged_by_socket'), 'ok');
          assert.equal(await viewer(t, SERVICE).channel(topic).send('genuine'), 'ok');
          await viewing.received('genuine');
          await joined.received('genuine');
          assert.deepEqual([viewing.types, joined.types], [['genuine'], ['genuine']]);
        });
      } else {
        it('cannot send before it has joined', async (t) => {
          const channel = viewer(t).channel(room('rest'));
          await assert.rejects(() => channel.raw.send({ type: 'broadcast', event: 'note', payload: {} }));
        });
      }

      if (isAtLeast(flavour, '2.76.0')) {
        it('sends by REST what it asks to send so', async (t) => {
          const event = await stage.event();
          const topic = `cache_invalidate_${event.eid}`;
          const viewing = await viewer(t).join(topic);
          const sending = viewer(t, SERVICE).channel(topic);
          const answer = await sending.raw.httpSend('cache_invalidation', { type: 'explicit' });
          assert.deepEqual(answer, { success: true });
          await viewing.received('explicit');
        });
      }

      if (isDeafAfterDrop(flavour)) {
        it('is healed after its socket was dropped: reminded of its topics, it joins them', async (t) => {
          // A gateway of its own: others of its address have lost other topics.
          const gateway = await Gateway.start({ DATABASE_URL: stage.postgres.url });
          t.after(() => gateway.kill());
          const event = await stage.event();
          const proxy = await stage.proxy(t, gateway.url);
          const client = viewer(t, ANON, proxy.url);
          const topics = ['_', ':'].map((separator) => `cache_invalidate${separator}${event.eid}`);
          const channels = await Promise.all(topics.map((topic) => client.join(topic)));
          proxy.cut();
          await Promise.all(channels.map((channel) => channel.joined(2, { ms: 40_000 })));
          for (const name of topics) {
            const ofTopic = proxy.frames.items.filter(({ topic }) => topic === `realtime:${name}`);
            const back = ofTopic.filter(({ connection, event }) => connection > 1 && event !== 'broadcast');
            const said = back.map(({ from, event }) => `${from}: ${event}`).slice(0, 3);
            assert.deepEqual(said, ['gateway: phx_error', 'client: phx_join', 'gateway: phx_reply']);
          }
          await event.vote();
          await Promise.all(channels.map((channel) => channel.received('vote_cast')));
        });
      } else {
        it('joins again by itself after its socket was dropped', async (t) => {
          const event = await stage.event();
          const proxy = await stage.proxy(t);
          const client = viewer(t, ANON, proxy.url);
          const channels = await Promise.all(
            ['_', ':'].map((separator) => client.join(`cache_invalidate${separator}${event.eid}`)),
          );
          proxy.cut();
          await Promise.all(channels.map((channel) => channel.joined(2, { ms: 30_000 })));
          await event.vote();
          await Promise.all(channels.map((channel) => channel.received('vote_cast')));
          assert.deepEqual(channels.map(({ types }) => types), [['vote_cast'], ['vote_cast']]);
        });
      }
    });
  }
});
