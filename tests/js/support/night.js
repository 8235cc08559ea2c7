// An event night: two gateways on one database, viewers, people who vote and bid, and some who do
// what they should not, so that every panel has something to show.

import { readFileSync } from 'node:fs';

import WebSocket from 'ws';

import { Client, PRODUCTION } from './client.js';
import { ANON, Gateway, userToken } from './gateway.js';
import { Socket } from './socket.js';
import { Stage } from './stage.js';
import { lasting, within } from './wait.js';

const POLICIES = new URL('../../../migrations/examples/private_channels.sql', import.meta.url);
const MEMBER = '00000000-0000-4000-8000-000000000001';

/** As clients beat; a socket that is silent for 90 s is closed. */
const HEARTBEAT = 25_000;

/** Between two writes: faster than any room, slow enough for windows to open. */
const PACE = 150;

export class Night {
  stage;
  /** The first has the published clients, the second may be killed. */
  gateways = [];
  /** A busy one, one that is calmer, and one whose changes are so rare that nothing is merged. */
  events = [];
  #clients = [];
  #sockets = [];
  #isOver = false;
  #beating;
  #writing;
  #paused = false;

  static async start(settings = {}) {
    const it = new Night();
    try {
      it.stage = await Stage.start();
      await it.stage.sql.query(readFileSync(POLICIES, 'utf8'));
      await it.stage.sql.query(`INSERT INTO room_members (topic, user_id, may_write) VALUES ('room', '${MEMBER}', true)`);
      await it.stage.gateway.drain();
      const DATABASE_URL = it.stage.postgres.url.replace('postgres://postgres@', 'postgres://tidegate@');
      for (let count = 0; count < 2; count++) {
        it.gateways.push(await Gateway.start({ DATABASE_URL, LIMITS__SOCKET_MESSAGES_PER_SECOND_MAX: '25', ...settings }));
      }
      for (let count = 0; count < 3; count++) it.events.push(await it.stage.event({ artworks: 4 }));
      for (const flavour of PRODUCTION) {
        const client = new Client(flavour, it.gateways[0].url, ANON);
        it.#clients.push(client);
        await client.join(`cache_invalidate_${it.events[0].eid}`);
      }
      for (const gateway of it.gateways) await it.crowd(gateway, 20);
      it.#beating = setInterval(() => it.#beat(), HEARTBEAT);
      it.#writing = it.#write();
    } catch (error) {
      await it.stop();
      throw error;
    }
    return it;
  }

  /** So many viewers more, who join and listen. */
  async crowd(gateway, count) {
    for (let index = 0; index < count; index++) {
      const socket = await this.socket(gateway);
      const { eid } = this.events[index % this.events.length];
      socket.send('1', '1', `realtime:cache_invalidate:${eid}`, 'phx_join', { config: {} });
      await socket.frames.find('the join', ({ ref }) => ref === '1');
    }
  }

  /** A WebSocket of nobody's, open until the night ends. */
  async socket(gateway, key = ANON) {
    const socket = await Socket.open(gateway.url, key);
    this.#sockets.push(socket);
    return socket;
  }

  /** Sockets that beat as if their channels were long joined, and join nothing whatever they are told. */
  async deafen(gateway, count) {
    const deaf = [];
    for (let index = 0; index < count; index++) {
      const socket = await this.socket(gateway);
      socket.send(null, '40', 'phoenix', 'heartbeat', {});
      deaf.push(socket);
    }
    return deaf;
  }

  /** Everything once that is not voting and bidding. */
  async mischief() {
    const [gateway] = this.gateways;
    const socket = await this.socket(gateway);
    socket.send(null, '1', 'phoenix', 'heartbeat', {});
    socket.send('2', '2', 'realtime:room', 'phx_join', {
      config: { private: true },
      access_token: userToken({ sub: MEMBER }),
    });
    await socket.frames.find('the private join', ({ ref }) => ref === '2');
    socket.send('2', '3', 'realtime:room', 'access_token', { access_token: userToken({ sub: MEMBER }, 3600) });
    socket.send('2', '4', 'realtime:room', 'broadcast', { type: 'broadcast', event: 'note', payload: {} });
    socket.send('2', '5', 'realtime:room', 'no_such_event', {});
    socket.send('6', '6', 'realtime:room', 'phx_join', { config: { private: true }, access_token: ANON });
    socket.send('7', '7', 'realtime:sms-1', 'phx_join', { config: {} });
    socket.send('not', 'a', 'message');
    for (let ref = 100; ref < 400; ref++) socket.send(null, String(ref), 'phoenix', 'heartbeat', {});
    await socket.frames.find('the last heartbeat', ({ ref }) => ref === '399');
    socket.send('2', '8', 'realtime:room', 'phx_leave', {});
    await socket.flushed();
    socket.close();

    const forged = `${ANON.slice(0, ANON.lastIndexOf('.'))}.${'A'.repeat(43)}`;
    await this.#refused(gateway, forged);
    await this.#refused(gateway, 'nonsense');
    await gateway.publish('announcements', 'note', { text: 'welcome' });
    await fetch(`${gateway.url}/nowhere`);
    await fetch(`${gateway.admin}/reload`, { method: 'POST' });
  }

  /** Nobody votes while the database is away. */
  async pause() {
    this.#paused = true;
    await this.#writing;
  }

  resume() {
    this.#paused = false;
    this.#writing = this.#write();
  }

  async stop() {
    this.#isOver = true;
    clearInterval(this.#beating);
    await this.#writing;
    for (const socket of this.#sockets) socket.close();
    await Promise.all(this.#clients.map((client) => client.close()));
    for (const gateway of this.gateways) await gateway.kill();
    await this.stage?.stop();
  }

  #beat() {
    for (const socket of this.#sockets) socket.send(null, 'beat', 'phoenix', 'heartbeat', {});
  }

  async #write() {
    for (let count = 0; !this.#isOver && !this.#paused; count++) {
      const event = this.events[count % 30 === 29 ? 2 : count % 5 === 0 ? 1 : 0];
      const art = event.art[count % event.art.length];
      await event.bid(art, 100 + count);
      if (count % 2 === 0) {
        await this.stage.sql.query(
          `INSERT INTO votes (event_id, eid, round, easel, art_id, art_uuid, person_id)
           VALUES ($1, $2, 1, 1, $3, $4, gen_random_uuid())`,
          [event.id, event.eid, `${event.eid}-1-1`, event.art[0].id],
        );
      }
      if (count % 7 === 0) {
        await this.stage.sql.query('INSERT INTO art_media (art_id) VALUES ($1)', [art.id]);
      }
      await lasting(PACE);
    }
  }

  async #refused(gateway, key) {
    const url = `${gateway.url}/socket/websocket?apikey=${key}&vsn=2.0.0`;
    const refusal = new Promise((resolve) => new WebSocket(url).on('error', resolve));
    await within(refusal, 'a refused upgrade');
  }
}

