// Clients that were away, as their viewers live through it: the published clients before the real
// gateway and a real Postgres, behind a network that fails. Whatever was committed meanwhile, every
// page learns of it without being loaded again, and goes on learning.

import assert from 'node:assert/strict';
import { describe, it } from 'node:test';

import { withRealtime } from './support/client.js';
import { ANON, Gateway } from './support/gateway.js';
import { Stage } from './support/stage.js';
import { lasting } from './support/wait.js';

const RETURNING = ['2.11.15', '2.15.5', '2.87.0', '2.119.1'].map(withRealtime);

/**
 * A new socket comes after up to ten seconds, its join up to ten after that. The first of these
 * never joins by itself: it is reminded 2.5, 17 and 32 seconds after its socket has opened.
 */
const BACK = { ms: 60_000 };

/** The pages of one event, each with a client and a proxy of its own, all of one address. */
class Audience {
  #event;
  #members;
  /** The endpoints of each bid, and how much each member had received before it. */
  #bids = [];
  #amount = 1000;

  /** A page of each version, joined, and told what a page is told first. */
  static async of(t, stage, event) {
    const it = new Audience();
    it.#event = event;
    it.#members = await Promise.all(
      RETURNING.map(async (flavour) => {
        const proxy = await stage.proxy(t);
        const client = stage.client(t, flavour, ANON, proxy.url);
        const channel = await client.join(`cache_invalidate_${event.eid}`);
        await channel.received('catch_up');
        return { flavour, proxy, channel, left: 0 };
      }),
    );
    return it;
  }

  /** Cuts all off, and refuses them until `restore`. */
  cut() {
    for (const member of this.#members) {
      member.proxy.refuses = true;
      member.proxy.cut();
      member.left = member.proxy.frames.items.length;
    }
  }

  restore() {
    for (const { proxy } of this.#members) proxy.refuses = false;
  }

  /** Leads all who come back to this gateway. */
  leadTo(gateway) {
    for (const { proxy } of this.#members) proxy.leadTo(gateway.url);
  }

  /** Waits until `end`, by which the gateway ends, has cost each its socket. */
  async dropped(end) {
    const before = this.#members.map(({ proxy }) => proxy.closes.items.length);
    await end();
    await this.#each(async (member, index) => {
      await member.proxy.closes.nth(before[index] + 1, 'a close');
      member.left = member.proxy.frames.items.length;
    });
  }

  /** Commits a bid on each of these artworks. */
  async bid(...easels) {
    for (const easel of easels) {
      const art = this.#event.art[easel - 1];
      const before = this.#members.map(({ channel }) => channel.broadcasts.items.length);
      this.#bids.push({ endpoints: [this.#event.main, art.bids], before });
      await this.#event.bid(art);
    }
  }

  /** Waits until each that was cut off or dropped has been answered a join. */
  async joinedAgain() {
    const topic = `realtime:cache_invalidate_${this.#event.eid}`;
    await this.#each(({ proxy, left }) => proxy.frame('gateway', 'phx_reply', { topic, after: left, ...BACK }));
  }

  /** Waits until each has been told of everything that was bid on, after it was. */
  async learnt() {
    await this.#each(async ({ channel }, index) => {
      for (const { endpoints, before } of this.#bids) {
        for (const endpoint of endpoints) {
          const isTold = ({ payload }) => payload.endpoints.includes(endpoint);
          await channel.broadcasts.find(endpoint, isTold, { after: before[index], ...BACK });
        }
      }
    });
    this.#bids = [];
  }

  /** One more bid reaches each as what it is: they are back, with the channels that they had. */
  async goOn() {
    const art = this.#event.art.at(-1);
    const amount = this.#amount++;
    await this.#event.bid(art, amount);
    const isTold = ({ payload }) =>
      payload.type === 'bid_placed' && Number(payload.amount) === amount && payload.endpoints.includes(art.bids);
    await this.#each(async ({ channel }) => {
      await channel.broadcasts.find(`the bid of ${amount}`, isTold);
      assert.equal(channel.raw.state, 'joined');
      assert.ok(!channel.statuses.items.some(([status]) => status === 'CLOSED'));
    });
  }

  /** Does so for each at once; of the one that fails, shows the frames. */
  async #each(act) {
    await Promise.all(
      this.#members.map(async (member, index) => {
        try {
          await act(member, index);
        } catch (error) {
          const { flavour, proxy } = member;
          const shown = proxy.frames.items.map(({ at, connection, from, text }) =>
            [Math.round(at), connection, from, text].join(' '),
          );
          throw new Error([`${flavour.name}: ${error.message}`, ...shown].join('\n'), { cause: error });
        }
      }),
    );
  }
}

describe('clients that were away learn of everything', { concurrency: true, timeout: 230_000 }, () => {
  async function scene(t, settings) {
    const stage = await Stage.start(settings);
    t.after(() => stage.stop());
    const event = await stage.event({ artworks: 4 });
    return { stage, event, audience: await Audience.of(t, stage, event) };
  }

  it('after ten seconds without a network', async (t) => {
    const { audience } = await scene(t);
    audience.cut();
    await audience.bid(1, 2, 3);
    await lasting(10_000);
    audience.restore();
    await audience.learnt();
    await audience.goOn();
  });

  it('after each of five ends of the gateway without a word', async (t) => {
    const { stage, audience } = await scene(t);
    for (let round = 0; round < 5; round++) {
      await audience.dropped(() => stage.gateway.kill());
      await audience.bid(1, 2, 3);
      await stage.gateway.resume();
      await audience.learnt();
      await audience.goOn();
    }
  });

  it('from a gateway that came back before its database did', async (t) => {
    const { stage, audience } = await scene(t);
    await audience.dropped(() => stage.gateway.kill());
    await audience.bid(1, 2);
    await stage.postgres.halt();
    await stage.gateway.resume({ awaitsLink: false });
    await audience.joinedAgain();
    await stage.postgres.resume();
    await stage.reconnect();
    // The gateway tries its link again only after a while: this is heard by nobody, as a rule.
    await audience.bid(3);
    await audience.learnt();
    await audience.goOn();
  });

  it('from a second gateway, which has others who view the event', async (t) => {
    const { stage, event, audience } = await scene(t);
    const second = await Gateway.start({ DATABASE_URL: stage.postgres.url });
    t.after(() => second.kill());
    const bystander = stage.client(t, withRealtime('2.87.0'), ANON, second.url);
    await (await bystander.join(`cache_invalidate_${event.eid}`)).received('catch_up');
    audience.cut();
    await audience.bid(1, 2, 3);
    audience.leadTo(second);
    audience.restore();
    await audience.learnt();
    await audience.goOn();
  });

  it('from a second gateway, when the first was told to end', async (t) => {
    const { stage, audience } = await scene(t, { DRAIN__TIMEOUT: '2s' });
    const second = await Gateway.start({ DATABASE_URL: stage.postgres.url });
    t.after(() => second.kill());
    audience.leadTo(second);
    await audience.dropped(() => stage.gateway.drain());
    await audience.bid(1, 2, 3);
    await audience.learnt();
    await audience.goOn();
  });
});
