// A server that says what a test scripts, for what clients do when told what the gateway never says.

import { createServer } from 'node:http';
import { once } from 'node:events';

import { WebSocketServer } from 'ws';

import { answerAuth } from './auth.js';
import { Inbox } from './wait.js';
import { decode, encode } from './wire.js';

export class Raw {
  /** `{ connection, url }` of each upgrade, also of those that are refused. */
  upgrades = new Inbox('upgrades');
  /** Each open connection. */
  connections = new Inbox('connections');
  /** `{ connection, join_ref, ref, topic, event, payload }` of each frame from a client. */
  frames = new Inbox('frames from the client');
  /** `{ connection, code }` of each connection that a client closed. */
  closes = new Inbox('closes by the client');
  /** What a join meets: `ok`, unless a test takes its place. */
  onJoin = (join) => this.ok(join);
  answersHeartbeats = true;
  /** Statuses of the next upgrades to be refused. */
  refusals = [];
  /** The token of the session that signing in gives. */
  session = null;
  #server = createServer((request, response) => answerAuth(request, response, this.session));
  #sockets = new Set();
  #accepting = new WebSocketServer({ noServer: true });

  static async start() {
    const it = new Raw();
    it.#server.on('upgrade', (request, socket, head) => it.#upgrade(request, socket, head));
    it.#server.listen(0, '127.0.0.1');
    await once(it.#server, 'listening');
    it.url = `http://127.0.0.1:${it.#server.address().port}`;
    return it;
  }

  /** A frame of this event, since `after` frames. */
  async frame(event, { count = 1, ...options } = {}) {
    return await this.frames.nth(count, event, (frame) => frame.event === event, options);
  }

  send(connection, message) {
    connection.send(encode(connection.vsn, message));
  }

  /** Answers a client's push. */
  reply({ connection, join_ref, ref, topic }, status, response) {
    const payload = { status, response };
    this.send(connection, { join_ref, ref, topic, event: 'phx_reply', payload });
  }

  /** Answers a join, its bindings echoed. */
  ok(join, alter = (binding) => binding) {
    const asked = join.payload.config.postgres_changes;
    const postgres_changes = asked.map((binding, index) => alter({ ...binding, id: index + 1 }));
    this.reply(join, 'ok', { postgres_changes });
  }

  /** What `send` sends leaves in one packet. */
  together(connection, send) {
    connection.stream.cork();
    send();
    connection.stream.uncork();
  }

  /** Cuts all connections as a lost network does. */
  cut() {
    for (const socket of this.#sockets) socket.destroy();
  }

  async stop() {
    this.#server.close();
    this.cut();
    this.#server.closeAllConnections();
    await once(this.#server, 'close');
  }

  #upgrade(request, stream, head) {
    stream.on('error', () => {});
    this.#sockets.add(stream);
    stream.on('close', () => this.#sockets.delete(stream));
    this.upgrades.push({ url: request.url });
    const refusal = this.refusals.shift();
    if (refusal) return stream.end(`HTTP/1.1 ${refusal} No\r\ncontent-length: 0\r\n\r\n`);
    this.#accepting.handleUpgrade(request, stream, head, (connection) => {
      connection.vsn = new URL(request.url, this.url).searchParams.get('vsn');
      connection.stream = stream;
      connection.toJSON = () => 'connection';
      connection.on('message', (data, isBinary) => this.#receive(connection, data, isBinary));
      connection.on('close', (code) => this.closes.push({ connection, code }));
      this.connections.push(connection);
    });
  }

  #receive(connection, data, isBinary) {
    const frame = { connection, ...decode(connection.vsn, data, isBinary) };
    this.frames.push(frame);
    if (frame.event === 'phx_join') this.onJoin(frame);
    if (frame.event === 'phx_leave') this.reply(frame, 'ok', {});
    if (frame.event === 'heartbeat' && this.answersHeartbeats) this.reply(frame, 'ok', {});
  }
}
