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

  /** An event with artworks on as many easels, which nobody else knows. */
  async event({ artworks = 1 } = {}) {
    const eid = `AB${this.#next++}`;
    const notified = await this.notifications(`cache_invalidate_${eid}`);
    const { rows } = await this.sql.query(
      `WITH event AS (INSERT INTO events (eid) VALUES ($1::text) RETURNING id)
       INSERT INTO art (art_code, event_id, round, easel)
       SELECT $1::text || '-1-' || easel, id, 1, easel FROM event, generate_series(1, $2::int) AS easel
       RETURNING id, event_id, easel`,
      [eid, artworks],
    );
    await notified.nth(artworks, 'the new artworks');
    const [{ event_id: id }] = rows;
    const main = `/live/event/${eid}`;
    return {
      eid,
      id,
      main,
      media: `${main}/media`,
      artists: `${main}/artists`,
      /** `{ id, bids }` of each artwork: its uuid, and the endpoint of its bids. */
      art: rows.map(({ id, easel }) => ({ id, bids: `${main}-1-${easel}/bids` })),
      /** What the database notifies, as text. */
      notified,
      /** Inserts a vote, and gives what the database notified of it, as text. */
      vote: async () => {
        const after = notified.items.length;
        await this.sql.query(
          `INSERT INTO votes (event_id, eid, round, easel, art_id, art_uuid, person_id)
           VALUES ($1, $2, 1, 1, $3, $4, gen_random_uuid())`,
          [id, eid, `${eid}-1-1`, rows[0].id],
        );
        return await notified.nth(1, 'the vote', undefined, { after });
      },
      /** Commits a bid on an artwork. */
      bid: async (art, amount = 100) => {
        await this.sql.query(
          'INSERT INTO bids (art_id, person_id, amount) VALUES ($1, gen_random_uuid(), $2)',
          [art.id, amount],
        );
      },
    };
  }

  /** What the database notifies on a channel from here on, as text. */
  async notifications(channel) {
    const notified = new Inbox(`notifications on ${channel}`);
    this.#notified.set(channel, notified);
    await this.sql.query(`LISTEN "${channel}"`);
    return notified;
  }

  /** A client of the gateway, or of what stands before it, that ends with the test. */
  client(t, flavour, key, url = this.gateway.url) {
    const client = new Client(flavour, url, key);
    t.after(() => client.close());
    return client;
  }

  /** A proxy before the gateway, or another, that ends with the test. */
  async proxy(t, target = this.gateway.url) {
    const proxy = await Proxy.start(target);
    t.after(() => proxy.stop());
    return proxy;
  }

  async stop() {
    await this.sql?.end().catch(() => {});
    await this.gateway?.kill();
    await this.postgres?.stop();
  }
}
