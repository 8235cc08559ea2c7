// What the gateway can tell of a client's version from its first join, and what it cannot: each
// published client is counted among the versions that it is one of.

import assert from 'node:assert/strict';
import { after, before, describe, it } from 'node:test';

import { Client, FLAVOURS, isAtLeast } from './support/client.js';
import { ANON, Gateway } from './support/gateway.js';

/** A client that is told to speak V1 looks like its elders, and one that is told to speak V2 like its successors. */
function generation(flavour) {
  if (flavour.vsn === '2.0.0') return '2.81+';
  if (isAtLeast(flavour, '2.12.0')) return '2.12+';
  return isAtLeast(flavour, '2.10.0') ? '2.10-2.11' : '2.0-2.9';
}

describe('client_versions_total', { timeout: 60_000 }, () => {
  let gateway;
  before(async () => {
    gateway = await Gateway.start();
  });
  after(() => gateway?.kill());

  for (const flavour of FLAVOURS) {
    it(`counts ${flavour.name} as ${generation(flavour)}`, async () => {
      const count = (labels) => gateway.metric('tidegate_client_versions_total', labels);
      const [mine, all] = [await count({ version: generation(flavour) }), await count()];
      const client = new Client(flavour, gateway.url, ANON);
      try {
        await client.join('cache_invalidate_AB3028');
        await client.join('auction_winner_AB3028', { event: 'auction_winner' });
      } finally {
        await client.close();
      }
      assert.equal(await count({ version: generation(flavour) }), mine + 1);
      assert.equal(await count(), all + 1);
    });
  }
});
