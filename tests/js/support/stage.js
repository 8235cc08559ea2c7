// What most tests need: a migrated database of the production tables, a gateway, events and votes.

import { readFileSync } from 'node:fs';

import { Gateway, migrate } from './gateway.js';
import { Postgres } from './postgres.js';
import { Proxy } from './proxy.js';
import { Client } from './client.js';
import { Inbox } from './wait.js';

const TABLES = new URL('../../../migrations/examples/production_tables.sql', import.meta.url);

export class Stage {
  /** Events are numbered from here, so that no two tests share one. */
  #next = 3028;
  #notified = new Map();

  static async start(settings = {}) {
    const it = new Stage();
    try {
      it.postgres = await Postgres.start();
      const setup = await it.postgres.connect();
      await setup.query(readFileSync(TABLES, 'utf8'));
      await setup.end();
      await migrate(it.postgres.url);
      it.gateway = await Gateway.start({ DATABASE_URL: it.postgres.url, ...settings });
      await it.reconnect();
    } catch (error) {
      await it.stop();
      throw error;
    }
    return it;
  }

  /** Connects to the database, anew after it was stopped. */
  async reconnect() {
    this.sql = await this.postgres.connect();
    this.sql.on('notification', ({ channel, payload }) => this.#notified.get(channel)?.push(payload));
    for (const channel of this.#notified.keys()) await this.sql.query(`LISTEN "${channel}"`);
  }

  /** An event with one artwork, which nobody else knows. */
  async event() {
    const eid = `AB${this.#next++}`;
    const channel = `cache_invalidate_${eid}`;
    const notified = new Inbox(`notifications on ${channel}`);
    this.#notified.set(channel, notified);
    await this.sql.query(`LISTEN "${channel}"`);
    const { rows } = await this.sql.query(
      `WITH event AS (INSERT INTO events (eid) VALUES ($1::text) RETURNING id)
       INSERT INTO art (art_code, event_id, round, easel) SELECT $1::text || '-1-1', id, 1, 1 FROM event
       RETURNING id, event_id`,
      [eid],
    );
    await notified.nth(1, 'the new artwork');
    const [{ id: art, event_id: event }] = rows;
    return {
      eid,
      /** Inserts a vote, and gives what the database notified of it, as text. */
      vote: async () => {
        const after = notified.items.length;
        await this.sql.query(
          `INSERT INTO votes (event_id, eid, round, easel, art_id, art_uuid, person_id)
           VALUES ($1, $2, 1, 1, $3, $4, gen_random_uuid())`,
          [event, eid, `${eid}-1-1`, art],
        );
        return await notified.nth(1, 'the vote', undefined, { after });
      },
    };
  }

  /** A client of the gateway, or of what stands before it, that ends with the test. */
  client(t, flavour, key, url = this.gateway.url) {
    const client = new Client(flavour, url, key);
    t.after(() => client.close());
    return client;
  }

  /** A proxy before the gateway, that ends with the test. */
  async proxy(t) {
    const proxy = await Proxy.start(this.gateway.url);
    t.after(() => proxy.stop());
    return proxy;
  }

  async stop() {
    await this.sql?.end().catch(() => {});
    await this.gateway?.kill();
    await this.postgres?.stop();
  }
}
