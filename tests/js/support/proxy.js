// Stands between clients and a gateway: records every frame, cuts connections, refuses new ones,
// holds back what the gateway says, leads to another gateway, and signs users in.

import { createServer, request as forward } from 'node:http';
import { once } from 'node:events';

import WebSocket, { WebSocketServer } from 'ws';

import { answerAuth } from './auth.js';
import { Inbox } from './wait.js';
import { decode } from './wire.js';

export class Proxy {
  /** `{ url, headers }` of each upgrade. */
  upgrades = new Inbox('upgrades');
  /** `{ from, connection, at, isBinary, text, join_ref, ref, topic, event, payload }` of each frame. */
  frames = new Inbox('frames');
  /** `{ connection, code }` of each connection that the gateway closed. */
  closes = new Inbox('closes by the gateway');
  /** The token of the session that signing in gives. */
  session = null;
  refuses = false;
  #target;
  /** What waits for `release`, or null while nothing is held back. */
  #held = null;
  #server = createServer((request, response) => this.#request(request, response));
  #sockets = new Set();
  #accepting = new WebSocketServer({ noServer: true });

  static async start(target) {
    const it = new Proxy();
    it.#target = target;
    it.#server.on('upgrade', (request, socket, head) => it.#upgrade(request, socket, head));
    it.#server.on('connection', (socket) => {
      it.#sockets.add(socket);
      socket.on('close', () => it.#sockets.delete(socket));
    });
    it.#server.listen(0, '127.0.0.1');
    await once(it.#server, 'listening');
    it.url = `http://127.0.0.1:${it.#server.address().port}`;
    return it;
  }

  /** Frames of one side, of one event, since `after`. */
  async frame(from, event, { count = 1, after = 0, topic, ...options } = {}) {
    const wanted = (it) =>
      it.from === from && it.event === event && (topic === undefined || it.topic === topic);
    return await this.frames.nth(count, `${event} from the ${from}`, wanted, { after, ...options });
  }

  /** Leads connections that are made from here on to another gateway. */
  leadTo(target) {
    this.#target = target;
  }

  /** Holds back what the gateway says; it is recorded when it comes. */
  hold() {
    this.#held ??= [];
  }

  /** Delivers what was held back, together, and everything else as it comes. */
  release() {
    const held = this.#held ?? [];
    this.#held = null;
    for (const deliver of held) deliver();
  }

  /** Cuts all connections as a lost network does: no close frame. */
  cut() {
    for (const socket of this.#sockets) socket.destroy();
  }

  async stop() {
    this.refuses = true;
    this.#server.close();
    this.cut();
    if (this.#server.listening) await once(this.#server, 'close');
  }

  #request(request, response) {
    if (request.url.startsWith('/auth/v1/')) return answerAuth(request, response, this.session);
    const { method, headers, url } = request;
    const onward = forward(new URL(url, this.#target), { method, headers }, (answer) => {
      response.writeHead(answer.statusCode, answer.headers);
      answer.pipe(response);
    });
    onward.on('error', () => response.destroy());
    request.pipe(onward);
  }

  #upgrade(request, socket, head) {
    socket.on('error', () => {});
    if (this.refuses) return socket.destroy();
    const { url, headers } = request;
    const connection = this.upgrades.items.length + 1;
    const vsn = new URL(url, this.#target).searchParams.get('vsn');
    this.upgrades.push({ connection, url, headers });
    const server = new WebSocket(new URL(url, this.#target).href.replace(/^http/, 'ws'));
    const early = [];
    const record = (from, data, isBinary) => {
      const seen = { from, connection, at: performance.now(), isBinary, text: data.toString() };
      this.frames.push({ ...seen, ...decode(vsn, data, isBinary) });
    };
    server.on('unexpected-response', (_, answer) => {
      socket.end(`HTTP/1.1 ${answer.statusCode} ${answer.statusMessage}\r\ncontent-length: 0\r\n\r\n`);
      server.terminate();
    });
    server.on('error', () => socket.destroy());
    server.on('message', (data, isBinary) => early.push([data, isBinary]));
    server.on('open', () => {
      this.#accepting.handleUpgrade(request, socket, head, (client) => {
        const pass = (data, isBinary) => {
          record('gateway', data, isBinary);
          const deliver = () => client.send(data, { binary: isBinary });
          if (this.#held) this.#held.push(deliver);
          else deliver();
        };
        early.forEach((frame) => pass(...frame));
        server.removeAllListeners('message').on('message', pass);
        client.on('message', (data, isBinary) => {
          record('client', data, isBinary);
          if (server.readyState === WebSocket.OPEN) server.send(data, { binary: isBinary });
        });
        client.on('close', () => server.terminate());
        server.on('close', (code) => {
          this.closes.push({ connection, code });
          if (code === 1006) socket.destroy();
          else client.close(code === 1005 ? undefined : code);
        });
        client.on('error', () => {});
      });
    });
  }
}
