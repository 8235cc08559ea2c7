// Writes as the applications do, and tells the ledger what each commit changed.
//
// What a change invalidates is what the triggers document: a vote its event; a bid its event and its
// artwork's bids; an artwork its event and the media; a photo the media; an artist the event and the
// artists.

import { ARTWORKS, EVENTS } from './schedule.js';

const SESSIONS = 8;

const SETUP = `
  WITH event AS (INSERT INTO events (eid) VALUES ($1::text) RETURNING id)
  INSERT INTO art (art_code, event_id, round, easel)
  SELECT $1::text || '-1-' || easel, id, 1, easel FROM event, generate_series(1, $2::int) AS easel
  RETURNING id, event_id, easel`;

export class Writer {
  #postgres;
  #ledger;
  #note;
  /** By event: `{ eid, id, artworks: [id] }`. */
  #events = [];
  #idle = [];
  #waiting = [];
  #amount = 100;
  #isOver = false;

  /** Makes the events and their artworks. `note` is told what fails. */
  static async start(postgres, ledger, note) {
    const it = new Writer();
    it.#postgres = postgres;
    it.#ledger = ledger;
    it.#note = note;
    const session = await postgres.connect();
    for (const eid of EVENTS) {
      const { rows } = await session.query(SETUP, [eid, ARTWORKS]);
      const artworks = rows.sort((a, b) => a.easel - b.easel).map(({ id }) => id);
      it.#events.push({ eid, id: rows[0].event_id, artworks });
    }
    await session.end();
    it.#idle = Array.from({ length: SESSIONS }, () => new Session(postgres));
    return it;
  }

  /** One bid, vote, change of an artwork, photo or artist; gives its commit, if it came so far. */
  async write({ kind, event, artwork }) {
    const session = this.#idle.shift() ?? (await new Promise((resolve) => this.#waiting.push(resolve)));
    try {
      return await this.#transact(session, `${kind} ${EVENTS[event]}-1-${artwork + 1}`, event, (run) =>
        this.#change(run, kind, event, artwork),
      );
    } finally {
      const next = this.#waiting.shift();
      if (next) next(session);
      else this.#idle.push(session);
    }
  }

  /** Many changes of one event in one transaction. */
  async burst({ event, of, count }) {
    const session = new Session(this.#postgres);
    await this.#transact(session, `burst of ${count} ${of} of ${EVENTS[event]}`, event, async (run) => {
      const { eid, id, artworks } = this.#events[event];
      if (of === 'artworks') {
        await run('UPDATE art SET updated_at = now() WHERE event_id = $1', [id]);
        return [`/live/event/${eid}`, `/live/event/${eid}/media`];
      }
      await run(
        `INSERT INTO bids (art_id, person_id, amount)
         SELECT ($1::uuid[])[1 + n % array_length($1::uuid[], 1)], gen_random_uuid(), n
         FROM generate_series(0, $2::int - 1) AS n`,
        [artworks, count],
      );
      const bids = artworks.slice(0, count).map((_, index) => `/live/event/${eid}-1-${index + 1}/bids`);
      return [`/live/event/${eid}`, ...bids];
    });
    await session.end();
  }

  /** Bids on some artworks that are committed only when `held` is. */
  async long({ event, artworks }, held) {
    const session = new Session(this.#postgres);
    await this.#transact(session, `long transaction on ${EVENTS[event]}`, event, async (run) => {
      const endpoints = [];
      for (const artwork of artworks) {
        endpoints.push(...(await this.#change(run, 'bid only', event, artwork)));
      }
      await held;
      return endpoints;
    });
    await session.end();
  }

  /** Asks Postgres what became of the commits whose answers were lost. */
  async resolve() {
    const unknown = this.#ledger.commits.filter(({ outcome }) => outcome === 'unknown');
    if (unknown.length === 0) return;
    const session = await this.#postgres.connect();
    for (const commit of unknown) {
      const { rows } = await session.query('SELECT pg_xact_status($1::xid8) AS status', [commit.xact]);
      if (rows[0].status !== 'in progress') {
        this.#ledger.settle(commit, rows[0].status === 'committed' ? 'done' : 'failed');
      }
    }
    await session.end();
  }

  /** Terminates the gateway's session that listens, or all of the gateway's. */
  async terminate(isListenerOnly) {
    const session = await this.#postgres.connect().catch(() => null);
    await session?.query(
      `SELECT pg_terminate_backend(pid) FROM pg_stat_activity
       WHERE application_name = 'tidegate' AND ($1 = false OR query ~* '^(un)?listen|^select 1')`,
      [isListenerOnly],
    );
    await session?.end();
  }

  /** Ends every session: what is under way fails. */
  async stop() {
    this.#isOver = true;
    await Promise.all(this.#idle.map((session) => session.end()));
  }

  /** Begins, changes, commits. What fails before the COMMIT is sent has not happened. */
  async #transact(session, what, event, change) {
    let commit;
    try {
      await session.open();
      await session.run('BEGIN');
      const { rows } = await session.run('SELECT pg_current_xact_id()::text AS xact');
      const endpoints = await change((sql, values) => session.run(sql, values));
      commit = this.#ledger.commit(what, EVENTS[event], [...new Set(endpoints)], rows[0].xact);
      const { command } = await session.run('COMMIT');
      this.#ledger.settle(commit, command === 'COMMIT' ? 'done' : 'failed');
    } catch (error) {
      if (commit) this.#ledger.settle(commit, 'unknown');
      if (!this.#isOver) this.#note(`${what}: ${error.message}`);
      await session.end();
    }
    return commit;
  }

  async #change(run, kind, event, artwork) {
    const { eid, id, artworks } = this.#events[event];
    const art = artworks[artwork];
    const main = `/live/event/${eid}`;
    const bids = `${main}-1-${artwork + 1}/bids`;
    switch (kind) {
      case 'bid':
      case 'bid only':
        await run(
          'INSERT INTO bids (art_id, person_id, amount) VALUES ($1, gen_random_uuid(), $2)',
          [art, (this.#amount += 5)],
        );
        if (kind === 'bid only') return [main, bids];
        await run('UPDATE art SET bid_count = bid_count + 1 WHERE id = $1', [art]);
        return [main, bids, `${main}/media`];
      case 'vote':
        await run(
          `INSERT INTO votes (event_id, eid, round, easel, art_id, art_uuid, person_id)
           VALUES ($1, $2, 1, $3, $4, $5, gen_random_uuid())`,
          [id, eid, artwork + 1, `${eid}-1-${artwork + 1}`, art],
        );
        return [main];
      case 'artwork':
        await run('UPDATE art SET updated_at = clock_timestamp() WHERE id = $1', [art]);
        return [main, `${main}/media`];
      case 'media':
        await run('INSERT INTO art_media (art_id, media_id) VALUES ($1, gen_random_uuid())', [art]);
        return [`${main}/media`];
      case 'artist':
        await run('INSERT INTO event_artists (event_id, artist_id) VALUES ($1, gen_random_uuid())', [id]);
        return [main, `${main}/artists`];
    }
    throw new Error(`no such change: ${kind}`);
  }
}

/** A session that is opened when it is needed. */
class Session {
  #postgres;
  #client = null;

  constructor(postgres) {
    this.#postgres = postgres;
  }

  async open() {
    if (this.#client) return;
    const client = await this.#postgres.connect();
    client.on('end', () => {
      if (this.#client === client) this.#client = null;
    });
    this.#client = client;
    // Two who wait for each other's artworks do not wait long.
    await client.query("SET lock_timeout = '3s'; SET statement_timeout = '10s'");
  }

  async run(sql, values) {
    if (!this.#client) throw new Error('the session is gone');
    return await this.#client.query(sql, values);
  }

  async end() {
    const client = this.#client;
    this.#client = null;
    await client?.end().catch(() => {});
  }
}
