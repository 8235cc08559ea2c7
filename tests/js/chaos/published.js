// Viewers that are the published supabase-js, on the same lines and before the same ledger.

import { createRequire } from 'node:module';

import WebSocket from 'ws';

import { decode } from '../support/wire.js';
import { Onlooker } from './onlooker.js';
import { summarize } from './viewer.js';

const require = createRequire(import.meta.url);

/** How long somebody looks at a page that is not live for the first time. */
const PATIENCE = 15_000;

export class Published extends Onlooker {
  /** `context` as for `Viewer`. */
  constructor(spec, context) {
    const name = `supabase-js ${spec.version}`;
    super(name, (viewer) => new Page(spec, context, viewer), PATIENCE, context.log);
  }
}

class Page {
  #context;
  #viewer;
  #client;
  #channels = [];
  #sockets = new Set();
  #isOver = false;

  constructor(spec, context, viewer) {
    this.#context = context;
    this.#viewer = viewer;
    const { createClient } = require(`supabase-${spec.version}`);
    this.#client = createClient(context.url, context.key, {
      auth: { persistSession: false, autoRefreshToken: false },
      realtime: { transport: this.#transport(spec) },
    });
    for (const eid of spec.eids) this.#join(eid);
  }

  get isLive() {
    return this.#channels.every(({ screen }) => screen.isLive);
  }

  get absent() {
    return this.#channels.filter(({ raw }) => raw.state !== 'joined').map(({ raw }) => raw.topic);
  }

  close() {
    this.#isOver = true;
    for (const { screen, raw } of this.#channels) {
      screen.end();
      raw.teardown?.();
    }
    this.#client.realtime.disconnect();
    this.#client.realtime.connect = () => {};
    for (const socket of this.#sockets) socket.terminate();
  }

  #join(eid) {
    const screen = this.#context.ledger.screen(this.#viewer, eid);
    const raw = this.#client.channel(`cache_invalidate_${eid}`);
    const channel = { screen, raw, asked: [], left: false };
    this.#channels.push(channel);
    raw.on('broadcast', { event: 'cache_invalidation' }, ({ payload }) => {
      this.#viewer.messages += 1;
      if (payload.merged) this.#viewer.merged += 1;
      screen.receive(payload);
    });
    raw.subscribe((status, error) => {
      if (this.#isOver) return;
      this.#viewer.log(`${status} ${eid} ${error?.message ?? ''}`);
      if (status === 'SUBSCRIBED') screen.joined();
      if (status === 'CLOSED') this.#closed(channel);
    });
  }

  /** It has given the topic up, unless the gateway has taken it away. */
  #closed(channel) {
    const { topic } = channel.raw;
    if (channel.left) this.#context.unanswered(this.#viewer.name, topic, channel.asked.at(-1));
    else this.#context.wrong(`${this.#viewer.name}: ${topic} closed by the gateway`);
    this.#viewer.lost(this, 'a topic was closed');
  }

  /** A WebSocket that tells what passes. */
  #transport({ version, address }) {
    const page = this;
    const vsn = version === '2.119.1' ? '2.0.0' : '1.0.0';
    return class extends WebSocket {
      constructor(url) {
        super(url, { headers: { 'User-Agent': `${version} at ${address}` }, perMessageDeflate: false });
        page.#sockets.add(this);
        this.on('error', (error) => page.#viewer.log(`socket: ${error.message}`));
        this.on('open', () => page.#viewer.log('socket open'));
        this.on('close', (code) => {
          page.#sockets.delete(this);
          page.#viewer.log(`socket closed: ${code}`);
        });
        // The client may have asked for ArrayBuffers.
        this.on('message', (data, isBinary) => page.#heard(decode(vsn, Buffer.from(data), isBinary)));
      }

      send(data, ...rest) {
        page.#said(decode(vsn, Buffer.from(data), typeof data !== 'string'));
        super.send(data, ...rest);
      }
    };
  }

  #said({ ref, topic, event }) {
    if (topic === 'phoenix') return;
    this.#viewer.log(`> ${event} ${topic} ${ref}`);
    const channel = this.#channels.find(({ raw }) => raw.topic === topic);
    if (event === 'phx_join') channel?.asked.push(this.#context.ledger.now());
    if (event === 'phx_leave' && channel) channel.left = true;
  }

  #heard({ ref, topic, event, payload }) {
    if (topic === 'phoenix') return;
    if (event === 'phx_error') this.#viewer.heals += 1;
    const said = payload?.payload;
    this.#viewer.log(
      event === 'broadcast'
        ? `< ${summarize(said)} on ${topic}`
        : `< ${event} ${topic} ${ref} ${payload?.status ?? ''}`,
    );
  }
}
