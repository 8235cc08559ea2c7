// How the versions that production runs behave on the wire, row by row: what the gateway does about
// it, and, where it never does a thing, what they would do if it did.

import assert from 'node:assert/strict';
import { randomUUID } from 'node:crypto';
import { after, before, describe, it } from 'node:test';

import { Client, FLAVOURS, isAtLeast, PRODUCTION } from './support/client.js';
import { ANON, Gateway, userToken } from './support/gateway.js';
import { Proxy } from './support/proxy.js';
import { Raw } from './support/raw.js';
import { Socket } from './support/socket.js';
import { Stage } from './support/stage.js';
import { encodeBroadcast } from './support/wire.js';

const PERSON = '8b1f5a3e-91a4-4f7c-8a55-0f4f43b0c8de';
const EVENT = '0c7ccf0b-9e3f-4b0a-b1de-3d7a7a2c9e11';

/** A join answered later than this ends the channels of production clients for good. */
const TOO_LATE = 2000;
/** A heartbeat comes after 25 seconds, from the oldest versions after 30. */
const BEAT = { ms: 40_000 };

/** Never joins by itself what it has joined before. */
const isDeafAfterDrop = ({ realtime }) => realtime === '2.11.15';
/** Speaks through phoenix.js. */
const isNewest = (flavour) => isAtLeast(flavour, '2.100.0');

/** Asserts that each join on the wire was answered with `ok` in time; gives how many there were. */
function assertAnsweredInTime({ items }) {
  const joins = items.filter(({ from, event }) => from === 'client' && event === 'phx_join');
  for (const { connection, topic, ref, at } of joins) {
    const reply = items.find(
      (it) => it.event === 'phx_reply' && it.connection === connection && it.topic === topic && it.ref === ref,
    );
    assert.equal(reply?.payload.status, 'ok', `${topic}: ${JSON.stringify(reply)}`);
    assert.ok(reply.at - at < TOO_LATE, `${topic} was answered after ${reply.at - at} ms`);
  }
  return joins.length;
}

describe('conformance', { concurrency: true, timeout: 180_000 }, () => {
  describe('the gateway', { concurrency: true }, () => {
    let stage;
    before(async () => {
      // A token's end is seen at its second.
      stage = await Stage.start({ AUTH__LEEWAY: '0s', AUTH__GRACE: '0s' });
    });
    after(() => stage?.stop());

    for (const flavour of FLAVOURS) {
      it(`answers the heartbeat of ${flavour.name}`, async (t) => {
        const proxy = await stage.proxy(t);
        await stage.client(t, flavour, ANON, proxy.url).join('beating');
        const beat = await proxy.frame('client', 'heartbeat', BEAT);
        const reply = await proxy.frame('gateway', 'phx_reply', { topic: 'phoenix' });
        assert.deepEqual([reply.ref, reply.payload], [beat.ref, { status: 'ok', response: {} }]);
        assert.ok(reply.at - beat.at < TOO_LATE);
      });
    }

    for (const flavour of PRODUCTION) {
      describe(`with ${flavour.name}`, () => {
        const viewer = (t, url) => stage.client(t, flavour, ANON, url);

        it('is opened with key and version in the URL, and nothing else', async (t) => {
          const proxy = await stage.proxy(t);
          await viewer(t, proxy.url).join('anything');
          const [{ url, headers }] = proxy.upgrades.items;
          const { pathname, searchParams } = new URL(url, proxy.url);
          assert.equal(pathname, '/realtime/v1/websocket');
          assert.deepEqual([searchParams.get('apikey'), searchParams.get('vsn')], [ANON, flavour.vsn]);
          assert.equal(headers['sec-websocket-protocol'], undefined);
          assert.equal(headers.authorization, undefined);
        });

        it('answers a first join that brings the key, or no token at all', async (t) => {
          const proxy = await stage.proxy(t);
          await viewer(t, proxy.url).join('cache_invalidate_AB1');
          const join = await proxy.frame('client', 'phx_join');
          assert.equal(join.payload.access_token, isDeafAfterDrop(flavour) ? ANON : undefined);
          assertAnsweredInTime(proxy.frames);
        });

        it('tells a fresh page by its first ref, and a returning one by a later', async (t) => {
          const proxy = await stage.proxy(t);
          await viewer(t, proxy.url).join('cache_invalidate_AB1');
          const join = await proxy.frame('client', 'phx_join');
          assert.equal(join.ref, isNewest(flavour) ? '6' : '1');
          proxy.cut();
          const isBack = ({ from, connection }) => from === 'client' && connection > join.connection;
          const first = await proxy.frames.find('the first on a new socket', isBack, BEAT);
          assert.ok(Number(first.ref) > Number(join.ref), first.ref);
        });

        it('closes the old channel by its own ref when a topic is left and joined at once', async (t) => {
          const proxy = await stage.proxy(t);
          const client = viewer(t, proxy.url);
          const topic = `offer_notifications_${EVENT}_${PERSON}`;
          const left = await client.join(topic);
          void left.remove();
          const joined = await client.join(topic);
          const close = await proxy.frame('gateway', 'phx_close');
          const [first, second] = proxy.frames.items.filter(({ event }) => event === 'phx_join');
          assert.notEqual(first.ref, second.ref);
          assert.equal(close.ref, first.ref);
          assert.equal(close.join_ref, flavour.vsn === '2.0.0' ? first.ref : null);
          assert.equal(joined.raw.state, 'joined');
        });

        it('answers fifty joins at once in time, and again when all come back', async (t) => {
          const proxy = await stage.proxy(t);
          const client = viewer(t, proxy.url);
          const channels = Array.from({ length: 50 }, (_, index) =>
            client.channel(`auction_winner_AB${flavour.supabase.replaceAll('.', '')}${100 + index}`),
          );
          for (const channel of channels) channel.subscribe();
          await Promise.all(channels.map((channel) => channel.joined()));
          assert.equal(assertAnsweredInTime(proxy.frames), 50);
          if (isDeafAfterDrop(flavour)) return;
          proxy.cut();
          await Promise.all(channels.map((channel) => channel.joined(2, { ms: 30_000 })));
          assert.equal(assertAnsweredInTime(proxy.frames), 100);
        });

        it('sends what was notified byte for byte, in frames of the right shape', async (t) => {
          const proxy = await stage.proxy(t);
          const event = await stage.event();
          const client = viewer(t, proxy.url);
          const options = { changes: [{ event: '*', schema: 'public', table: 'art' }], presence: true };
          const channel = await client.join(`cache_invalidate_${event.eid}`, options);
          await channel.syncs.find('sync', () => true);
          const notified = await event.vote();
          await channel.received('vote_cast');
          await client.join('keeps_the_socket_open');
          await channel.remove();
          await proxy.frame('gateway', 'phx_close');
          const frames = proxy.frames.items.filter(({ from }) => from === 'gateway');
          const kinds = new Set(frames.map(({ event }) => event));
          assert.deepEqual([...kinds].sort(), ['broadcast', 'phx_close', 'phx_reply', 'presence_state', 'system']);
          const broadcast = frames.find(({ payload }) => payload.payload?.type === 'vote_cast');
          assert.ok(broadcast.text.includes(notified), `${broadcast.text}\nis not of\n${notified}`);
          for (const { text, payload, isBinary } of frames) {
            assert.ok(payload !== null && typeof payload === 'object' && !Array.isArray(payload), text);
            if (isBinary) continue;
            const shape = Object.keys(JSON.parse(text)).sort();
            const wanted = flavour.vsn === '1.0.0' ? ['event', 'payload', 'ref', 'topic'] : ['0', '1', '2', '3', '4'];
            assert.deepEqual(shape, wanted, text);
          }
        });

        it('relays the winner of an auction and a manual invalidation', async (t) => {
          const { eid } = await stage.event();
          const client = viewer(t);
          const winners = await client.join(`auction_winner_${eid}`, { event: 'auction_winner' });
          const viewing = await client.join(`cache_invalidate_${eid}`);
          const fact = { type: 'auction_status_change', art_code: `${eid}-1-1`, new_status: 'sold' };
          await stage.sql.query('SELECT pg_notify($1, $2)', [`auction_winner_${eid}`, JSON.stringify(fact)]);
          assert.deepEqual((await winners.received('auction_status_change')).payload, fact);
          await stage.sql.query('SELECT manual_cache_invalidation($1)', [eid]);
          const { payload } = await viewing.received('manual_invalidation');
          assert.deepEqual(payload.endpoints, [`/live/event/${eid}`, `/live/event/${eid}/media`]);
        });

        it('refuses the topics that hold phone numbers, with a reason', async (t) => {
          const client = viewer(t);
          for (const topic of ['sms-+14165550100', 'sms-all-messages', 'active-campaigns']) {
            const channel = client.channel(topic);
            channel.subscribe();
            assert.match(await channel.became('CHANNEL_ERROR'), /Unauthorized: You do not have permissions/);
          }
        });

        const granted = (eid) => [
          [`admin-auction-${eid}`, { admin_events: { [eid]: 'producer' } }],
          // Another event for each flavour: they are told at the same time.
          [`event_offers_${randomUUID()}_${PERSON}`, { person_id: PERSON }],
        ];
        for (const [index, what] of ['an auction', 'offers'].entries()) {
          it(`withholds ${what} from anon, and begins to deliver when the user has signed in`, async (t) => {
            const event = await stage.event();
            const [topic, claims] = granted(event.eid)[index];
            const proxy = await stage.proxy(t);
            proxy.session = userToken(claims);
            const client = viewer(t, proxy.url);
            const changes = [
              { event: '*', schema: 'public', table: 'art', filter: `event_id=eq.${EVENT}` },
              { event: '*', schema: 'public', table: 'bids' },
            ];
            const guarded = await client.join(topic, { event: 'note', changes });
            const open = await client.join(`cache_invalidate_${event.eid}`);
            await stage.gateway.publish(topic, 'note', { type: 'withheld' });
            await event.vote();
            await open.received('vote_cast');
            await client.signIn();
            // At once, or with the next heartbeat.
            await proxy.frame('client', 'access_token', { topic: `realtime:${topic}`, ...BEAT });
            // Whatever was said before it on this socket has been done.
            await client.join('marker');
            await stage.gateway.publish(topic, 'note', { type: 'granted' });
            await guarded.received('granted');
            assert.deepEqual(guarded.types, ['granted']);
            assert.deepEqual(guarded.statuses.items, [['SUBSCRIBED', undefined]]);
          });
        }

        it('goes on with a cache topic when the token expires, and closes an ordinary one', async (t) => {
          const event = await stage.event();
          const proxy = await stage.proxy(t);
          const client = viewer(t, proxy.url);
          proxy.session = userToken({}, 10);
          await client.signIn();
          await client.tellToken();
          const cache = await client.join(`cache_invalidate_${event.eid}`);
          const ordinary = await client.join('ordinary');
          const joins = proxy.frames.items.filter(({ event }) => event === 'phx_join');
          assert.deepEqual(joins.map(({ payload }) => payload.access_token), [proxy.session, proxy.session]);
          await ordinary.became('CLOSED');
          await event.vote();
          await cache.received('vote_cast');
          assert.deepEqual(cache.statuses.items, [['SUBSCRIBED', undefined]]);
        });

        it('lets an expired token join a cache topic, and refuses it an ordinary one', async (t) => {
          const event = await stage.event();
          const proxy = await stage.proxy(t);
          const client = viewer(t, proxy.url);
          proxy.session = userToken({}, -60);
          await client.signIn();
          await client.tellToken();
          const ordinary = client.channel('ordinary');
          ordinary.subscribe();
          assert.match(await ordinary.became('CHANNEL_ERROR'), /InvalidJWTToken: Token has expired \d+ seconds ago/);
          const cache = await client.join(`cache_invalidate_${event.eid}`);
          const join = proxy.frames.items.findLast(({ event }) => event === 'phx_join');
          assert.equal(join.payload.access_token, proxy.session);
          await event.vote();
          await cache.received('vote_cast');
        });

        it('lets a user who has signed out join a cache topic', async (t) => {
          const event = await stage.event();
          const proxy = await stage.proxy(t);
          const client = viewer(t, proxy.url);
          proxy.session = userToken();
          await client.signIn();
          await client.join('ordinary');
          await client.supabase.auth.signOut();
          const cache = await client.join(`cache_invalidate_${event.eid}`);
          await event.vote();
          await cache.received('vote_cast');
        });
      });
    }

    it('ignores a leave with the ref of a channel that was replaced', async (t) => {
      const topic = 'realtime:cache_invalidate_AB1';
      const socket = await Socket.open(stage.gateway.url, ANON);
      t.after(() => socket.close());
      socket.send('1', '1', topic, 'phx_join', { config: {} });
      socket.send('2', '2', topic, 'phx_join', { config: {} });
      socket.send('1', '3', topic, 'phx_leave', {});
      await socket.frames.find('the close of the first', ({ event }) => event === 'phx_close');
      assert.deepEqual(await socket.flushed(), [
        ['1', '1', topic, 'phx_reply'],
        ['2', '2', topic, 'phx_reply'],
        ['1', '1', topic, 'phx_close'],
      ]);
      await stage.gateway.publish('cache_invalidate_AB1', 'cache_invalidation', { type: 'still_joined' });
      await socket.received('still_joined');
    });

    it('ignores a join with an empty ref, whose answer would remove a healthy channel', async (t) => {
      const topic = 'realtime:cache_invalidate_AB2';
      const socket = await Socket.open(stage.gateway.url, ANON);
      t.after(() => socket.close());
      socket.send('1', '1', topic, 'phx_join', { config: {} });
      await socket.frames.find('the reply', ({ ref }) => ref === '1');
      socket.send('', '', topic, 'phx_join', { config: {} });
      assert.deepEqual(await socket.flushed(), [['1', '1', topic, 'phx_reply']]);
      await stage.gateway.publish('cache_invalidate_AB2', 'cache_invalidation', { type: 'still_joined' });
      await socket.received('still_joined');
    });
  });

  describe('the gateway without its database', () => {
    let stage;
    before(async () => {
      stage = await Stage.start();
    });
    after(() => stage?.stop());

    it('answers joins in time while Postgres is down, and relays again once it is up', async (t) => {
      const event = await stage.event();
      const topic = `cache_invalidate_${event.eid}`;
      const proxies = await Promise.all(PRODUCTION.map(() => stage.proxy(t)));
      const clients = PRODUCTION.map((flavour, index) => stage.client(t, flavour, ANON, proxies[index].url));
      const before = await Promise.all(clients.map((client) => client.join(topic)));
      await stage.postgres.halt();
      const during = await Promise.all(
        clients.flatMap((client) =>
          [`auction_winner_${event.eid}`, 'room', `cache_invalidate:${event.eid}`].map((topic) => client.join(topic)),
        ),
      );
      for (const { frames } of proxies) assert.equal(assertAnsweredInTime(frames), 4);
      await stage.postgres.resume();
      await stage.reconnect();
      await stage.gateway.linked(2);
      await event.vote();
      const viewing = [...before, ...during.filter((_, index) => index % 3 === 2)];
      await Promise.all(viewing.map((channel) => channel.received('vote_cast')));
      assert.deepEqual(new Set(viewing.map(({ statuses }) => statuses.items.length)), new Set([1]));
    });
  });

  describe('a gateway that ends', { concurrency: true }, () => {
    /** Every production client, joined through a proxy of its own. */
    async function audience(t, settings) {
      const gateway = await Gateway.start(settings);
      t.after(() => gateway.kill());
      const members = PRODUCTION.map(async (flavour) => {
        const proxy = await Proxy.start(gateway.url);
        const client = new Client(flavour, proxy.url, ANON);
        t.after(async () => {
          await client.close();
          await proxy.stop();
        });
        return { flavour, proxy, client };
      });
      return { gateway, members: await Promise.all(members) };
    }

    const returns = async ({ gateway, members }) => {
      await Promise.all(members.map(({ proxy }) => proxy.upgrades.nth(2, 'a new socket')));
      // The socket after up to ten seconds, the join up to ten after that. 2.11.15 has to be reminded
      // of its topic, which the new gateway learns from the others.
      await Promise.all(members.map(({ channel }) => channel.joined(2, { ms: 60_000 })));
      await gateway.publish('cache_invalidate_AB1', 'cache_invalidation', { type: 'after' });
      await Promise.all(members.map(({ channel }) => channel.received('after')));
    };

    it('is left for its successor at the same address when it is killed', async (t) => {
      const { gateway, members } = await audience(t);
      for (const member of members) member.channel = await member.client.join('cache_invalidate_AB1');
      await gateway.kill();
      await gateway.resume();
      await returns({ gateway, members });
    });

    it('says 1012 to its clients when it is told to end, and they come back to its successor', async (t) => {
      const { gateway, members } = await audience(t, { DRAIN__TIMEOUT: '2s' });
      for (const member of members) member.channel = await member.client.join('cache_invalidate_AB1');
      await gateway.drain();
      for (const { proxy } of members) {
        assert.equal((await proxy.closes.nth(1, 'a close')).code, 1012);
      }
      await gateway.resume();
      await returns({ gateway, members });
    });

    it('serves a client whose first upgrade it had no place for, as soon as it has', async (t) => {
      const { gateway, members } = await audience(t, { LIMITS__CONNECTIONS_MAX: PRODUCTION.length });
      const places = await Promise.all(members.map(() => Socket.open(gateway.url, ANON)));
      for (const member of members) {
        member.channel = member.client.channel('cache_invalidate_AB1');
        member.channel.subscribe();
      }
      await Promise.all(members.map(({ proxy }) => proxy.upgrades.nth(2, 'a second attempt')));
      for (const place of places) place.close();
      // The older ones join without believing it, and are served all the same.
      await Promise.all(members.map(({ proxy }) => proxy.frame('gateway', 'phx_reply', BEAT)));
      await gateway.publish('cache_invalidate_AB1', 'cache_invalidation', { type: 'served' });
      await Promise.all(members.map(({ channel }) => channel.received('served')));
    });
  });

  describe('why the gateway does it so', { concurrency: true }, () => {
    const topic = 'realtime:cache_invalidate_AB1';
    const broadcast = (type) => ({
      topic,
      event: 'broadcast',
      payload: { type: 'broadcast', event: 'cache_invalidation', payload: { type } },
    });

    for (const flavour of PRODUCTION) {
      describe(flavour.name, () => {
        /** A scripted server, a client of it, and a channel that is about to join. */
        const scene = async (t, options) => {
          const raw = await Raw.start();
          const client = new Client(flavour, raw.url, ANON);
          t.after(async () => {
            await client.close();
            await raw.stop();
          });
          const channel = client.channel('cache_invalidate_AB1', options);
          return { raw, client, channel };
        };
        /** The same, and the channel is joined. */
        const joined = async (t, options) => {
          const it = await scene(t, options);
          it.channel.subscribe();
          await it.channel.joined();
          const [connection] = it.raw.connections.items;
          const [join] = it.raw.frames.items;
          return { ...it, connection, join };
        };

        it('joins again after a phx_error without a ref', async (t) => {
          const { raw, channel, connection } = await joined(t);
          raw.send(connection, { topic, event: 'phx_error' });
          await raw.frame('phx_join', { count: 2 });
          await channel.joined(2);
        });

        it('is closed for good by a phx_close', async (t) => {
          const { raw, client, channel, connection } = await joined(t);
          raw.send(connection, { topic, event: 'phx_close' });
          await channel.became('CLOSED');
          assert.deepEqual(client.supabase.getChannels(), []);
        });

        it('loses its new channel to a phx_close without the ref of the old one', async (t) => {
          const { raw, client, channel, connection, join } = await joined(t);
          void channel.remove();
          const second = await client.join('cache_invalidate_AB1');
          const { join_ref } = join;
          raw.send(connection, { join_ref, ref: join.ref, topic, event: 'phx_close' });
          raw.send(connection, broadcast('survived'));
          await second.received('survived');
          raw.send(connection, { topic, event: 'phx_close' });
          await second.became('CLOSED');
        });

        it('gives a refused first join up, if it is 2.11.15, until a phx_error', async (t) => {
          const { raw, channel } = await scene(t);
          raw.onJoin = (join) => raw.reply(join, 'error', { reason: 'Refused: for a test' });
          channel.subscribe();
          assert.match(await channel.became('CHANNEL_ERROR'), /Refused: for a test/);
          const [connection] = raw.connections.items;
          if (isDeafAfterDrop(flavour)) {
            await raw.frame('heartbeat', BEAT);
            assert.deepEqual(raw.frames.items.map(({ event }) => event), ['phx_join', 'heartbeat']);
            raw.onJoin = (join) => raw.ok(join);
            raw.send(connection, { topic, event: 'phx_error' });
          } else {
            await raw.frame('phx_join', { count: 2 });
            raw.onJoin = (join) => raw.ok(join);
          }
          await channel.joined();
        });

        it('lives if a join that is not its first is answered after 1.5 seconds', async (t) => {
          const { raw, channel, connection } = await joined(t);
          raw.onJoin = (join) => setTimeout(() => raw.ok(join), 1500);
          raw.send(connection, { topic, event: 'phx_error' });
          await channel.joined(2);
          assert.equal(channel.raw.state, 'joined');
        });

        it('is dead for good, up to 2.91, if such a join is answered after 2.1 seconds', async (t) => {
          const { raw, client, channel, connection } = await joined(t);
          raw.onJoin = (join) => setTimeout(() => raw.ok(join), 2100);
          raw.send(connection, { topic, event: 'phx_error' });
          if (isNewest(flavour)) {
            await channel.joined(2);
            return;
          }
          await channel.became('CLOSED');
          await raw.frame('phx_leave');
          // It joins once more, without a channel to show for it.
          await raw.frame('phx_join', { count: 3 });
          assert.deepEqual(client.supabase.getChannels(), []);
          assert.equal(channel.statuses.items.filter(([status]) => status === 'SUBSCRIBED').length, 1);
        });

        it('takes a broadcast that comes with the answer to its join, or before it', async (t) => {
          const { raw, channel } = await scene(t);
          raw.onJoin = (join) => {
            const { connection } = join;
            raw.send(connection, broadcast('before'));
            raw.together(connection, () => {
              raw.ok(join);
              raw.send(connection, broadcast('with'));
              if (flavour.vsn === '1.0.0') return;
              connection.send(encodeBroadcast(topic, 'cache_invalidation', { type: 'with_in_binary' }));
            });
          };
          channel.subscribe();
          await channel.received(flavour.vsn === '1.0.0' ? 'with' : 'with_in_binary');
          assert.deepEqual(channel.types.slice(0, 2), ['before', 'with']);
        });

        it('takes a broadcast on a topic that it holds and has not joined', async (t) => {
          const { raw, channel } = await joined(t);
          raw.onJoin = () => {};
          raw.cut();
          const connection = await raw.connections.nth(2, 'a new socket');
          raw.send(connection, broadcast('unasked'));
          await channel.received('unasked');
        });

        it('makes nothing of a system error', async (t) => {
          const { raw, channel, connection } = await joined(t);
          const payload = { extension: 'system', status: 'error', message: 'for a test', channel: 'cache_invalidate_AB1' };
          raw.send(connection, { topic, event: 'system', payload });
          raw.send(connection, broadcast('marker'));
          await channel.received('marker');
          assert.deepEqual(channel.statuses.items, [['SUBSCRIBED', undefined]]);
          assert.deepEqual(raw.frames.items.map(({ event }) => event).filter((it) => it !== 'access_token'), ['phx_join']);
        });

        it('rejects, up to 2.87.0, bindings that come back with a null for what they have not', async (t) => {
          const { raw, channel } = await scene(t, { changes: [{ event: '*', schema: 'public', table: 'bids' }] });
          raw.onJoin = (join) => raw.ok(join, (binding) => ({ ...binding, filter: null }));
          channel.subscribe();
          if (isAtLeast(flavour, '2.87.1')) return await channel.joined();
          assert.match(await channel.became('CHANNEL_ERROR'), /mismatch between server and client bindings/);
          await raw.frame('phx_leave');
        });

        it('joins with the token of its user after a phx_error', async (t) => {
          const { raw, client, channel } = await scene(t);
          raw.session = userToken();
          await client.signIn();
          channel.subscribe();
          await channel.joined();
          const [connection] = raw.connections.items;
          raw.send(connection, { topic, event: 'phx_error' });
          const again = await raw.frame('phx_join', { count: 2 });
          assert.equal(again.payload.access_token, raw.session);
          await channel.joined(2);
        });

        it('tries again, for good, when its upgrade is refused', async (t) => {
          const { raw, channel } = await scene(t);
          raw.refusals = [401, 403, 429, 503];
          channel.subscribe();
          await raw.upgrades.nth(5, 'the fifth upgrade', undefined, { ms: 40_000 });
          await raw.frame('phx_join');
        });

        it('closes a socket that leaves a heartbeat unanswered, and comes back', async (t) => {
          const { raw } = await joined(t);
          raw.answersHeartbeats = false;
          const { code } = await raw.closes.nth(1, 'a close', undefined, { ms: 70_000 });
          assert.equal(code, 1000);
          await raw.connections.nth(2, 'a new socket');
        });

        if (isDeafAfterDrop(flavour)) {
          it('is healed of its deafness by a phx_error on the topic that it held', async (t) => {
            const { raw, channel } = await joined(t);
            raw.cut();
            const connection = await raw.connections.nth(2, 'a new socket');
            raw.send(connection, { topic, event: 'phx_error' });
            await raw.frame('phx_join', { count: 2 });
            await channel.joined(2);
          });
        }
      });
    }
  });
});
