// Viewers that speak the protocol by themselves, each as a family of published clients does:
//
// | kind      | like         | after its socket was lost                                               |
// |-----------|--------------|-------------------------------------------------------------------------|
// | deaf      | 2.11         | a new socket each second; joins again only when told `phx_error`          |
// | rejoining | 2.15 to 2.91 | a new socket after 1, 2, 5, 10 s; joins by a timer of the same steps      |
// | newest    | 2.100 on     | a new socket after 1, 2, 5, 10 s; joins at once                           |
//
// The first two give a join up that is not answered before their timer's next step, 2 s after a first
// try: they leave the topic, forget it, and only a reload helps. Here their user reloads.

import WebSocket from 'ws';

import { decode } from '../support/wire.js';
import { Onlooker } from './onlooker.js';

const STEPS = [1000, 2000, 5000, 10_000];
const HEARTBEAT = 25_000;
const JOIN_TIMEOUT = 10_000;

/** How long somebody looks at a page that is not live for the first time. */
const PATIENCE = 8000;

export class Viewer extends Onlooker {
  /** `context`: `{ url, key, ledger, log, unanswered, wrong }`. */
  constructor(spec, context) {
    const name = `viewer ${spec.index} (${spec.kind})`;
    super(name, (viewer) => new Page(spec, context, viewer), PATIENCE, context.log);
  }

  /** Leaves a topic and joins it again so much later, as a data refresh does. */
  refresh(topic, ms) {
    if (!this.isLive) return;
    const { page } = this;
    page.leave(topic);
    if (ms === 0) page.subscribe(topic);
    else this.later(ms, page, () => page.subscribe(topic));
  }

  /** The page sleeps: its socket answers pings, its messages are lost. */
  freeze() {
    this.page?.freeze();
  }

  /** The page wakes: its socket is closed, as browsers do. */
  thaw() {
    this.page?.thaw();
  }
}

class Page {
  #spec;
  #context;
  #viewer;
  #screens = new Map();
  #channels = new Map();
  #socket = null;
  #ref = 0;
  #tries = 0;
  #reconnecting;
  #beating;
  #beat = null;
  #isFrozen = false;
  #isOver = false;

  constructor(spec, context, viewer) {
    this.#spec = spec;
    this.#context = context;
    this.#viewer = viewer;
    // The newest begin at a number that depends on their bindings.
    if (spec.kind === 'newest') this.#ref = 5;
    for (const { eid, topic } of spec.topics) {
      this.#screens.set(topic, context.ledger.screen(viewer, eid));
    }
    this.#connect();
    for (const { topic } of spec.topics) this.subscribe(topic);
  }

  get isLive() {
    return [...this.#screens.values()].every((screen) => screen.isLive);
  }

  get absent() {
    return [...this.#screens.keys()].filter((topic) => this.#channels.get(topic)?.state !== 'joined');
  }

  get isConnected() {
    return this.#socket?.readyState === WebSocket.OPEN;
  }

  subscribe(topic) {
    if (this.#isOver || this.#channels.has(topic)) return;
    const channel = new Channel(this, `realtime:${topic}`, this.#spec.kind);
    this.#channels.set(topic, channel);
    channel.join();
  }

  leave(topic) {
    const channel = this.#channels.get(topic);
    if (!channel) return;
    this.#viewer.log(`leaves ${topic}`);
    this.#channels.delete(topic);
    channel.leave();
  }

  freeze() {
    this.#viewer.log('sleeps');
    this.#isFrozen = true;
    clearTimeout(this.#reconnecting);
    clearInterval(this.#beating);
    for (const channel of this.#channels.values()) channel.sleep();
  }

  thaw() {
    if (!this.#isFrozen || this.#isOver) return;
    this.#viewer.log('wakes');
    this.#isFrozen = false;
    if (this.isConnected) this.#socket.close(1001);
    this.#gone(this.#socket, 'slept');
  }

  close() {
    this.#isOver = true;
    clearTimeout(this.#reconnecting);
    clearInterval(this.#beating);
    for (const channel of this.#channels.values()) channel.sleep();
    for (const screen of this.#screens.values()) screen.end();
    const socket = this.#socket;
    this.#socket = null;
    if (socket?.readyState === WebSocket.OPEN) socket.close(1001);
    setTimeout(() => socket?.terminate(), 200).unref();
  }

  /** A frame leaves, if there is a socket for it. */
  send(topic, event, payload, ref, joinRef) {
    if (!this.isConnected) return;
    if (event !== 'heartbeat') this.#viewer.log(`> ${event} ${topic} ${ref}`);
    this.#socket.send(
      JSON.stringify(
        this.#spec.vsn === '1.0.0'
          ? { topic, event, payload, ref, join_ref: joinRef }
          : [joinRef, ref, topic, event, payload],
      ),
    );
  }

  now() {
    return this.#context.ledger.now();
  }

  nextRef() {
    this.#ref += 1;
    return String(this.#ref);
  }

  /** What a join says: the first of all has no token where the version sends none. */
  joinPayload(isFirst) {
    const config = {
      broadcast: { ack: false, self: false },
      presence: { key: '', enabled: false },
      postgres_changes: [],
      private: false,
    };
    return isFirst && this.#spec.kind !== 'deaf' ? { config } : { config, access_token: this.#context.key };
  }

  joined(channel) {
    this.#viewer.log(`joined ${channel.topic}`);
    this.#screens.get(channel.topic.slice('realtime:'.length)).joined();
  }

  /** A join was not answered before the client gave it up; it has forgotten the topic. */
  gaveUp(channel, asked) {
    this.#channels.delete(channel.topic.slice('realtime:'.length));
    this.#context.unanswered(this.#viewer.name, channel.topic, asked);
    this.#viewer.lost(this, `the join of ${channel.topic} was not answered`);
  }

  /** The gateway refused, or closed, what it must not. */
  wronged(channel, what) {
    this.#context.wrong(`${this.#viewer.name}: ${channel.topic} ${what}`);
    this.#viewer.lost(this, what);
  }

  #connect() {
    const { vsn, browser, kind } = this.#spec;
    const url = `${this.#context.url}/realtime/v1/websocket?apikey=${this.#context.key}&vsn=${vsn}`;
    const socket = new WebSocket(url, { headers: { 'User-Agent': browser }, perMessageDeflate: false });
    this.#socket = socket;
    socket.on('error', (error) => this.#viewer.log(`socket: ${error.message}`));
    socket.on('close', (code) => this.#gone(socket, code));
    socket.on('message', (data, isBinary) => {
      if (socket === this.#socket && !this.#isFrozen) this.#receive(decode(vsn, data, isBinary));
    });
    socket.on('open', () => {
      if (socket !== this.#socket || this.#isFrozen) return;
      this.#viewer.log('socket open');
      this.#tries = 0;
      this.#beat = null;
      this.#beating = setInterval(() => this.#heartbeat(), HEARTBEAT);
      for (const channel of this.#channels.values()) channel.opened();
    });
    // The oldest look after their socket by closing it and making another.
    if (kind === 'deaf') for (const channel of this.#channels.values()) channel.sleep();
  }

  #gone(socket, code) {
    if (this.#isOver || socket !== this.#socket || this.#isFrozen) return;
    this.#viewer.log(`socket closed: ${code}`);
    this.#socket = null;
    clearInterval(this.#beating);
    for (const channel of this.#channels.values()) channel.errored();
    const wait = this.#spec.kind === 'deaf' ? STEPS[0] : STEPS[Math.min(this.#tries, 3)];
    this.#tries += 1;
    clearTimeout(this.#reconnecting);
    this.#reconnecting = setTimeout(() => this.#connect(), wait);
  }

  #heartbeat() {
    if (!this.isConnected) return;
    if (this.#beat !== null) {
      const socket = this.#socket;
      socket.close(1000);
      this.#gone(socket, 'no heartbeat');
      setTimeout(() => socket.terminate(), 1000).unref();
      return;
    }
    this.#beat = this.nextRef();
    this.send('phoenix', 'heartbeat', {}, this.#beat, null);
  }

  #receive({ join_ref, ref, topic, event, payload }) {
    if (topic === 'phoenix') {
      if (ref === this.#beat) this.#beat = null;
      return;
    }
    const name = topic.slice('realtime:'.length);
    const channel = this.#channels.get(name);
    if (event === 'broadcast') {
      this.#broadcast(name, channel, payload);
      return;
    }
    this.#viewer.log(`< ${event} ${topic} ${ref} ${payload?.status ?? ''}`);
    if (event === 'phx_error') this.#viewer.heals += 1;
    // A close names the join that it ends, else it ends whatever has the topic.
    const closes = (this.#spec.vsn === '1.0.0' ? ref : join_ref) ?? channel?.joinRef;
    if (event === 'phx_reply') channel?.answered(ref, payload);
    if (event === 'phx_error') channel?.errored();
    if (event === 'phx_close' && closes === channel?.joinRef) {
      this.#channels.delete(name);
      channel?.closed();
    }
  }

  #broadcast(name, channel, { event, payload }) {
    if (event !== 'cache_invalidation') return;
    const { endpoints } = payload;
    this.#viewer.log(`< ${summarize(payload)} on ${name}`);
    this.#viewer.messages += 1;
    if (payload.merged) this.#viewer.merged += 1;
    const isWhole = Array.isArray(endpoints) && endpoints.every((endpoint) => typeof endpoint === 'string');
    if (!isWhole) this.#context.wrong(`${this.#viewer.name}: endpoints ${JSON.stringify(endpoints)}`);
    else if (channel) this.#screens.get(name).receive(payload);
  }
}

/** An invalidation in few words. */
export function summarize({ type, cause, merged, endpoints }) {
  const names = [endpoints].flat().map((endpoint) => String(endpoint).replace('/live/event/', ''));
  if (names.length > 12) names.splice(12, Infinity, `and ${names.length - 12} more`);
  return [type, ...(cause ? [cause] : []), ...(merged ? [`merged ${merged}`] : []), ...names].join(' ');
}

class Channel {
  state = 'closed';
  joinRef = null;
  topic;
  #page;
  #kind;
  #tries = 0;
  #timer;
  #timeout;
  #asked;
  #isWaiting = false;
  #wasJoined = false;

  constructor(page, topic, kind) {
    this.#page = page;
    this.topic = topic;
    this.#kind = kind;
  }

  /** The first time; without a socket it waits for one. */
  join() {
    this.state = 'joining';
    if (this.#page.isConnected) this.#ask();
    else this.#isWaiting = true;
  }

  /** There is a socket. */
  opened() {
    if (this.#isWaiting) this.#ask();
    if (this.#kind !== 'newest') return;
    clearTimeout(this.#timer);
    this.#tries = 0;
    if (this.state === 'errored') this.#rejoin();
  }

  answered(ref, { status, response }) {
    if (ref !== this.joinRef || this.state !== 'joining') return;
    clearTimeout(this.#timeout);
    clearTimeout(this.#timer);
    if (status === 'ok') {
      this.state = 'joined';
      this.#wasJoined = true;
      this.#tries = 0;
      this.#page.joined(this);
      return;
    }
    this.state = 'errored';
    this.#page.wronged(this, `refused: ${JSON.stringify(response)}`);
  }

  /** The socket is gone, or `phx_error` came. */
  errored() {
    if (this.state === 'leaving' || this.state === 'closed') return;
    // Nothing was sent: what waits for the first socket waits for the next.
    if (this.#isWaiting) return;
    clearTimeout(this.#timeout);
    this.state = 'errored';
    if (this.#kind !== 'newest' || this.#page.isConnected) this.#schedule();
  }

  /** Stops what it was about to do. */
  sleep() {
    clearTimeout(this.#timer);
    clearTimeout(this.#timeout);
  }

  leave() {
    this.sleep();
    this.state = 'leaving';
    this.#sendLeave();
  }

  closed() {
    this.sleep();
    this.state = 'closed';
    this.#page.wronged(this, 'closed by the gateway');
  }

  #schedule() {
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => {
      this.#tries += 1;
      if (this.#kind !== 'newest') this.#schedule();
      if (this.#page.isConnected) this.#rejoin();
    }, STEPS[Math.min(this.#tries, 3)]);
  }

  #rejoin() {
    if (this.state === 'leaving' || this.state === 'closed') return;
    if (this.state === 'joining' && this.#kind !== 'newest') {
      // It takes itself for another that holds the topic, leaves that, and joins with no ref.
      this.sleep();
      this.state = 'closed';
      this.#sendLeave();
      this.#page.send(this.topic, 'phx_join', this.#page.joinPayload(false), '', this.joinRef);
      this.#page.gaveUp(this, this.#asked);
      return;
    }
    this.state = 'joining';
    this.#ask();
  }

  #sendLeave() {
    this.#page.send(this.topic, 'phx_leave', {}, this.#page.nextRef(), this.joinRef);
  }

  #ask() {
    this.#isWaiting = false;
    this.joinRef = this.#page.nextRef();
    this.#asked = this.#page.now();
    const payload = this.#page.joinPayload(!this.#wasJoined);
    this.#page.send(this.topic, 'phx_join', payload, this.joinRef, this.joinRef);
    clearTimeout(this.#timeout);
    this.#timeout = setTimeout(() => {
      if (this.state !== 'joining') return;
      if (this.#kind === 'newest') this.#sendLeave();
      this.state = 'errored';
      this.#schedule();
    }, JOIN_TIMEOUT);
  }
}
