// The published clients, each as its applications use it: `createClient(url, key)` and no realtime
// options, but for a WebSocket where the version brings none and Node has none, and the protocol
// version where it has two.

import { createRequire } from 'node:module';

import WebSocket from 'ws';

import { Inbox, within } from './wait.js';

const require = createRequire(import.meta.url);

/** In Node an error that nobody listens for ends the process, in a browser it does not. */
class Transport extends WebSocket {
  constructor(...args) {
    super(...args);
    this.on('error', () => {});
  }
}

/** Every version that is tested; `vsns` begins with its default. */
export const VERSIONS = [
  { supabase: '2.0.0', realtime: '2.0.0', vsns: ['1.0.0'] },
  { supabase: '2.39.0', realtime: '2.8.4', vsns: ['1.0.0'] },
  { supabase: '2.53.0', realtime: '2.11.15', vsns: ['1.0.0'] },
  { supabase: '2.54.0', realtime: '2.15.0', vsns: ['1.0.0'] },
  { supabase: '2.57.4', realtime: '2.15.5', vsns: ['1.0.0'] },
  { supabase: '2.74.0', realtime: '2.74.0', vsns: ['1.0.0'] },
  { supabase: '2.87.0', realtime: '2.87.0', vsns: ['1.0.0', '2.0.0'] },
  { supabase: '2.91.0', realtime: '2.91.0', vsns: ['2.0.0', '1.0.0'] },
  { supabase: '2.119.1', realtime: '2.119.1', vsns: ['2.0.0', '1.0.0'] },
];

/** Each version with each protocol version that it speaks. */
export const FLAVOURS = VERSIONS.flatMap((version) =>
  version.vsns.map((vsn) => ({
    ...version,
    vsn,
    isDefault: vsn === version.vsns[0],
    name: `supabase-js ${version.supabase}, vsn ${vsn}`,
  })),
);

/** Those that production runs, and the newest, as they come. */
export const PRODUCTION = FLAVOURS.filter(
  ({ supabase, isDefault }) =>
    isDefault && ['2.53.0', '2.54.0', '2.57.4', '2.74.0', '2.87.0', '2.119.1'].includes(supabase),
);

/** The one of PRODUCTION with this realtime-js. */
export function withRealtime(version) {
  return PRODUCTION.find(({ realtime }) => realtime === version);
}

/** Whether a flavour's realtime-js is at least so new. */
export function isAtLeast({ realtime }, wanted) {
  const [a, b] = [realtime, wanted].map((version) => version.split('.').map(Number));
  const index = a.findIndex((part, index) => part !== b[index]);
  return index < 0 || a[index] > b[index];
}

export class Client {
  #channels = [];

  constructor(flavour, url, key) {
    const { createClient } = require(`supabase-${flavour.supabase}`);
    const realtime = {};
    if (isAtLeast(flavour, '2.15.0')) realtime.transport = Transport;
    if (!flavour.isDefault) realtime.vsn = flavour.vsn;
    this.flavour = flavour;
    this.supabase = createClient(url, key, Object.keys(realtime).length > 0 ? { realtime } : {});
  }

  /** A channel of this client, not yet joined. */
  channel(topic, options) {
    const channel = new Channel(this.supabase, topic, options);
    this.#channels.push(channel);
    return channel;
  }

  /** A channel that is joined, or an error saying what it became. */
  async join(topic, options) {
    const channel = this.channel(topic, options);
    channel.subscribe();
    await channel.joined();
    return channel;
  }

  /** Signs in, as `Proxy.session` says. */
  async signIn() {
    const { error } = await this.supabase.auth.signInWithPassword({ email: 'a@example.org', password: 'a' });
    if (error) throw error;
  }

  /** Has realtime-js know the signed-in user's token, which some versions ask for only later. */
  async tellToken() {
    await this.supabase.realtime.setAuth();
  }

  /** Ends it; nothing of it stays. */
  async close() {
    await within(this.supabase.removeAllChannels(), 'leaving all channels').catch(() => {});
    this.supabase.realtime.disconnect();
    // Some versions have a new connection on its way even so, the newest one floor below.
    const { realtime } = this.supabase;
    for (const it of [realtime, realtime.socketAdapter?.socket]) if (it) it.connect = () => {};
    // A channel that its client has forgotten may still try to join, again and again.
    for (const { raw } of this.#channels) raw.teardown?.();
    await this.supabase.auth.stopAutoRefresh?.();
  }
}

class Channel {
  /** `[status, error]` of each call of the callback of `subscribe`. */
  statuses;
  /** Each broadcast, as the handler gets it: `{ type, event, payload }`. */
  broadcasts;
  syncs;
  #supabase;

  /**
   * @param {string} options.event the broadcast event that it binds
   * @param {object[]} options.changes `postgres_changes` that it binds
   * @param {boolean} options.presence whether it binds presence
   */
  constructor(supabase, topic, { event = 'cache_invalidation', changes = [], presence = false, config } = {}) {
    this.#supabase = supabase;
    this.statuses = new Inbox(`status of ${topic}`);
    this.broadcasts = new Inbox(`broadcasts on ${topic}`);
    this.syncs = new Inbox(`presence of ${topic}`);
    this.raw = config ? supabase.channel(topic, { config }) : supabase.channel(topic);
    this.raw.on('broadcast', { event }, (message) => this.broadcasts.push(message));
    for (const change of changes) this.raw.on('postgres_changes', change, () => {});
    if (presence) this.raw.on('presence', { event: 'sync' }, () => this.syncs.push('sync'));
  }

  subscribe() {
    this.raw.subscribe((status, error) => this.statuses.push([status, error?.message]));
  }

  /** Waits until it has been joined so many times. */
  async joined(count = 1, options) {
    await this.statuses.nth(count, 'SUBSCRIBED', ([status]) => status === 'SUBSCRIBED', options);
  }

  /** Waits for a status, and gives its error's text. */
  async became(wanted, options) {
    const [, error] = await this.statuses.find(wanted, ([status]) => status === wanted, options);
    return error;
  }

  /** Waits for a broadcast whose user payload has this `type`. */
  async received(type, options) {
    const wanted = (message) => message.payload.type === type;
    return await this.broadcasts.find(`a ${type}`, wanted, options);
  }

  /**
   * What it received of what was published as it was published: without the catch-up that may
   * follow a join, and without the messages that repeat its endpoints beside others.
   */
  get news() {
    return this.broadcasts.items.filter(
      ({ payload }) => payload.type !== 'catch_up' && payload.merged === undefined,
    );
  }

  /** The types of its news. */
  get types() {
    return this.news.map((message) => message.payload.type);
  }

  /** Sends a user broadcast of this type, by the socket or, while not joined, by REST. */
  async send(type, event = 'cache_invalidation') {
    return await this.raw.send({ type: 'broadcast', event, payload: { type } });
  }

  async remove() {
    return await this.#supabase.removeChannel(this.raw);
  }
}
