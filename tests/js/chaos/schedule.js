// What a seed means: who looks at what, what is written when, and what goes wrong when. All of it is
// drawn before anything starts, so that the same seed gives it again; a shorter run is the beginning
// of a longer one.

import { Random } from './random.js';

/** Events, and artworks of each: so many that one is seldom bid on again soon, which would hide a loss. */
export const EVENTS = ['AB3101', 'AB3102', 'AB3103', 'AB3104'];
export const ARTWORKS = 20;

/** The published clients, one page of each. */
export const PUBLISHED = ['2.53.0', '2.57.4', '2.87.0', '2.119.1'];

const VIEWERS = 50;
const WRITE_EVERY = 300;

/**
 * Before when some faults do not happen. A gateway that was killed may have lost anybody, and one that
 * has just started or lost its database has not heard what was before: whoever comes back then gets
 * everything. What somebody has missed is reckoned only where there was peace for a while.
 */
const PEACE = [
  {},
  { 'gateway killed': 150_000 },
  {
    'gateway killed': 200_000,
    'gateway drained': 200_000,
    ...Object.fromEntries(
      ['gateway stopped', 'postgres stopped', 'listener terminated', 'link half open', 'burst'].map(
        (kind) => [kind, 150_000],
      ),
    ),
  },
];

/** How often each fault is drawn, and what it needs for itself while it lasts. */
const FAULTS = {
  'gateway killed': { weight: 3, needs: 'gateway' },
  'gateway drained': { weight: 2, needs: 'gateway' },
  'gateway stopped': { weight: 2, needs: 'gateway' },
  'postgres stopped': { weight: 2, needs: 'database' },
  'listener terminated': { weight: 2, needs: 'database' },
  'link half open': { weight: 3, needs: 'database' },
  'clients cut': { weight: 4, needs: 'clients' },
  'clients frozen': { weight: 2, needs: 'clients' },
  'pages frozen': { weight: 2, needs: 'pages' },
  burst: { weight: 3, needs: 'burst' },
  'long transaction': { weight: 3, needs: 'long transaction' },
  'migrated again': { weight: 1, needs: 'migration' },
};

/** Every kind of fault there is. */
export const KINDS = Object.keys(FAULTS);

/** What a fault has for itself while it lasts. */
export function needs({ kind }) {
  return FAULTS[kind].needs;
}

/** `{ seed, seconds, viewers, published, faults, writes }`; times are milliseconds since the start. */
export function schedule(seed, seconds) {
  const end = seconds * 1000;
  // Each draws from a source of its own, which the others' length does not move.
  const source = (number) => new Random(seed * 1009 + number);
  return {
    seed,
    seconds,
    viewers: Array.from({ length: VIEWERS }, (_, index) => viewer(source(index + 2), index, end)),
    published: PUBLISHED.map((version, index) => ({
      version,
      address: `127.0.0.${10 + index}`,
      eids: index === 0 ? EVENTS.slice(0, 2) : [EVENTS[index]],
    })),
    faults: faults(source(0), end),
    writes: writes(source(1), end),
  };
}

/** A page: some are alone behind their address, and some have a browser of their own. */
function viewer(random, index, end) {
  const eids = random.some(EVENTS, random.happens(0.3) ? 2 : 1);
  const it = {
    index,
    kind: ['deaf', 'deaf', 'rejoining', 'rejoining', 'newest'][index % 5],
    address: `127.0.0.${random.whole(20, 29)}`,
    browser: random.happens(0.4) ? `browser of ${index}` : `browser ${random.whole(1, 3)}`,
    topics: eids.map((eid) => ({ eid, topic: `cache_invalidate${random.pick(['_', '_', ':'])}${eid}` })),
    opens: index % 10 === 9 ? random.seconds(3, 40) : 0,
    absences: [],
  };
  if (it.opens > end) it.opens = 0;
  it.vsn = it.kind === 'newest' ? '2.0.0' : '1.0.0';
  // A data refresh leaves and joins again, at once or a little later.
  if (index % 6 === 5) {
    for (let at = it.opens + random.seconds(3, 15); at < end; at += random.seconds(8, 30)) {
      const { topic } = random.pick(it.topics);
      it.absences.push({ at, topic, for: random.pick([0, 0, 500, 3000, 6000]) });
    }
  }
  return it;
}

function faults(random, end) {
  const busy = {};
  const list = [];
  const peace = random.pick(PEACE);
  let bag = [];
  for (let at = 2000; at < end; at += random.seconds(0.5, 3.5)) {
    if (bag.length === 0) {
      bag = random.shuffled(KINDS.flatMap((kind) => Array(FAULTS[kind].weight).fill(kind)));
    }
    bag = bag.filter((kind) => (peace[kind] ?? 0) <= at);
    const next = bag.findIndex((kind) => (busy[FAULTS[kind].needs] ?? 0) <= at);
    if (next < 0) continue;
    const [kind] = bag.splice(next, 1);
    const fault = { at, kind, ...details(random, kind) };
    // What is restarted is not at once back to what it was.
    busy[needs(fault)] = at + (fault.for ?? 0) + random.seconds(0.5, 3);
    list.push(fault);
  }
  return list;
}

function details(random, kind) {
  const everybody = [...Array(VIEWERS + PUBLISHED.length).keys()];
  const some = (share) => {
    const count = random.whole(3, Math.ceil(everybody.length * share));
    return random.some(everybody, count).sort((a, b) => a - b);
  };
  switch (kind) {
    case 'gateway killed':
      return { for: random.pick([0, random.seconds(0.2, 1), random.seconds(1, 4)]) };
    case 'gateway drained':
      return { for: random.pick([0, random.seconds(0.2, 2)]) };
    case 'gateway stopped':
      return { for: random.seconds(0.5, 5) };
    case 'postgres stopped':
      return { for: random.pick([0, random.seconds(0.2, 2), random.seconds(2, 6)]) };
    case 'listener terminated':
      return { whom: random.pick(['the listener', 'all of the gateway']) };
    case 'link half open':
      // The short one ends before any heartbeat is missed, and what was held back arrives late.
      return random.happens(0.25)
        ? { for: random.seconds(0.3, 1.5), then: 'delivered' }
        : { for: random.seconds(4, 8), then: random.pick(['delivered', 'reset', 'silent']) };
    case 'clients cut':
      return {
        for: random.pick([0, random.seconds(0.5, 3), random.seconds(3, 10)]),
        whom: random.happens(0.35) ? everybody : some(0.5),
      };
    case 'clients frozen':
      return { for: random.seconds(1, 12), then: random.pick(['delivered', 'lost']), whom: some(0.4) };
    case 'pages frozen':
      return { for: random.seconds(2, 15), whom: some(0.3).filter((index) => index < VIEWERS) };
    case 'burst':
      return {
        event: random.whole(0, EVENTS.length - 1),
        ...random.pick([
          { of: 'artworks', count: ARTWORKS },
          { of: 'bids', count: random.whole(5, 40) },
          // More than the history keeps one by one.
          { of: 'bids', count: random.whole(60, 120) },
        ]),
      };
    case 'long transaction':
      return {
        for: random.seconds(2, 12),
        event: random.whole(0, EVENTS.length - 1),
        artworks: random.some([...Array(ARTWORKS).keys()], 3),
      };
    case 'migrated again':
      return {};
  }
}

function writes(random, end) {
  const list = [];
  for (let at = random.pause(WRITE_EVERY); at < end; at += random.pause(WRITE_EVERY)) {
    const kind = random.weighted({ bid: 55, vote: 20, artwork: 12, media: 8, artist: 5 });
    const [event, artwork] = [EVENTS, { length: ARTWORKS }].map(({ length }) => random.whole(0, length - 1));
    list.push({ at, kind, event, artwork });
  }
  return list;
}
