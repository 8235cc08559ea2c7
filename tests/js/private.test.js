// Private channels with published clients: Postgres' policies decide who joins and who is heard.

import assert from 'node:assert/strict';
import { readFileSync } from 'node:fs';
import { after, before, describe, it } from 'node:test';

import { withRealtime } from './support/client.js';
import { ANON, Gateway, userToken } from './support/gateway.js';
import { Stage } from './support/stage.js';

const POLICIES = new URL('../../migrations/examples/private_channels.sql', import.meta.url);

const MEMBER = '00000000-0000-4000-8000-000000000001';
const READER = '00000000-0000-4000-8000-000000000002';

describe('private channels', { concurrency: true, timeout: 120_000 }, () => {
  let stage, gateway;
  before(async () => {
    stage = await Stage.start();
    await stage.sql.query(readFileSync(POLICIES, 'utf8'));
    // As the role that the migration has made, which may ask and nothing else.
    const url = stage.postgres.url.replace('postgres://postgres@', 'postgres://tidegate@');
    gateway = await Gateway.start({ DATABASE_URL: url });
  });
  after(async () => {
    await gateway?.kill();
    await stage?.stop();
  });

  for (const flavour of [withRealtime('2.15.5'), withRealtime('2.119.1')]) {
    describe(flavour.name, () => {
      const topic = `room-${flavour.supabase}`;
      const options = { event: 'note', config: { private: true, broadcast: { ack: true } } };
      const user = async (t, sub) => {
        const client = stage.client(t, flavour, ANON, gateway.url);
        await client.supabase.realtime.setAuth(userToken({ sub }));
        return client;
      };
      before(async () => {
        await stage.sql.query(
          'INSERT INTO room_members (topic, user_id, may_write) VALUES ($1, $2, true), ($1, $3, false)',
          [topic, MEMBER, READER],
        );
      });

      it('refuses who may not read, and says so', async (t) => {
        const channel = stage.client(t, flavour, ANON, gateway.url).channel(topic, options);
        channel.subscribe();
        const error = await channel.became('CHANNEL_ERROR');
        assert.match(error, /Unauthorized: You do not have permissions to read from this Channel topic: room-/);
      });

      it('relays what a member sends, acknowledged, and drops what a reader does', async (t) => {
        const member = await (await user(t, MEMBER)).join(topic, options);
        const reader = await (await user(t, READER)).join(topic, options);
        const note = { type: 'broadcast', event: 'note', payload: { type: 'from a reader' } };
        assert.equal(await reader.raw.send(note, { timeout: 1_000 }), 'timed out');
        assert.equal(await member.send('from a member', 'note'), 'ok');
        await reader.received('from a member');
        assert.deepEqual(reader.types, ['from a member']);
        assert.deepEqual(member.types, []);
      });

      it('ends the channel of who may read no more by its new token', async (t) => {
        const client = await user(t, READER);
        const channel = await client.join(topic, options);
        await client.supabase.realtime.setAuth(userToken({ sub: '00000000-0000-4000-8000-000000000003' }));
        await channel.became('CLOSED');
      });
    });
  }
});
