// A WebSocket that speaks frame by frame, for what no client says on demand.

import { once } from 'node:events';

import WebSocket from 'ws';

import { Inbox } from './wait.js';
import { decode } from './wire.js';

export class Socket {
  frames = new Inbox('frames from the gateway');
  #connection;

  static async open(url, key) {
    const it = new Socket();
    it.#connection = new WebSocket(`${url}/socket/websocket?apikey=${key}&vsn=2.0.0`);
    it.#connection.on('message', (data, isBinary) => it.frames.push(decode('2.0.0', data, isBinary)));
    await once(it.#connection, 'open');
    return it;
  }

  /** Says `[join_ref, ref, topic, event, payload]`. */
  send(...message) {
    this.#connection.send(JSON.stringify(message));
  }

  /**
   * All that has arrived, as `[join_ref, ref, topic, event]`, once a heartbeat is answered; without
   * the catch-ups that may follow joins.
   */
  async flushed() {
    this.send(null, 'marker', 'phoenix', 'heartbeat', {});
    await this.frames.find('the heartbeat', ({ ref }) => ref === 'marker');
    return this.frames.items
      .filter(({ ref, payload }) => ref !== 'marker' && payload.payload?.type !== 'catch_up')
      .map(({ join_ref, ref, topic, event }) => [join_ref, ref, topic, event]);
  }

  /** Waits for a broadcast whose user payload has this `type`. */
  async received(type) {
    await this.frames.find(`a ${type}`, ({ payload }) => payload.payload?.type === type);
  }

  close() {
    this.#connection.terminate();
  }
}
