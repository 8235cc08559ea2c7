// protocol/frames, held against the newest client's own serializer: the vectors are its truth.

import assert from 'node:assert/strict';
import { readdirSync, readFileSync } from 'node:fs';
import { describe, it } from 'node:test';

import { Client, FLAVOURS } from './support/client.js';

const FRAMES = new URL('../../protocol/frames/', import.meta.url);

const vectors = readdirSync(FRAMES).map((file) => ({
  file,
  ...JSON.parse(readFileSync(new URL(file, FRAMES), 'utf8')),
}));
const of = (serializer, direction) =>
  vectors.filter((it) => it.serializer === serializer && it.direction === direction && !it.malformed);

const bytes = (hexadecimal) => Uint8Array.from(Buffer.from(hexadecimal.replaceAll(' ', ''), 'hex'));
const hex = (buffer) => Buffer.from(buffer).toString('hex');
const text = (buffer) => Buffer.from(buffer).toString('utf8');

/** The newest client's functions of this protocol version. */
function serializer(vsn) {
  const newest = FLAVOURS.findLast((flavour) => flavour.vsn === vsn);
  const { realtime } = new Client(newest, 'http://127.0.0.1', 'key').supabase;
  return {
    encode: (message) => realtime.encode(message, (frame) => frame),
    decode: (frame) => realtime.decode(frame, (message) => message),
  };
}

/** A vector's message as the client holds it: a user broadcast is a payload like any other. */
function held({ user_event, encoding, payload, payload_hex, meta, ...message }, metadata = {}) {
  if (user_event === undefined) return { ...message, payload };
  const inner = encoding === 'binary' ? bytes(payload_hex).buffer : payload;
  const outer = { type: 'broadcast', event: user_event, payload: inner, ...metadata };
  return { ...message, payload: meta === undefined ? outer : { ...outer, meta } };
}

/** The parts of a kind 3 frame that its message does not have. */
function header(binary) {
  const frame = bytes(binary);
  const [, joinRef, ref, topic, event, meta, encoding] = frame;
  const start = 7 + joinRef + ref + topic + event;
  const metadata = text(frame.subarray(start, start + meta)) || '{}';
  return { encoding, metadata: JSON.parse(metadata), payload: text(frame.subarray(start + meta)) };
}

/** Why the client never writes a frame like this, if it never does. */
function obstacle(vector) {
  if (vector.text !== undefined) {
    const [, , , event, payload, ...more] = JSON.parse(vector.text);
    if (more.length > 0) return 'it writes five elements';
    if (event === 'broadcast' && typeof payload?.event === 'string') return 'it writes binary';
    return undefined;
  }
  const { encoding, metadata, payload } = header(vector.binary);
  if (encoding > 1) return 'it knows two encodings';
  if (Object.keys(metadata).some((key) => key !== 'persist')) return 'it keeps no other metadata';
  if (encoding === 0) return undefined;
  if (JSON.parse(payload) === null) return 'it writes {} for null';
  if (JSON.stringify(JSON.parse(payload)) !== payload) return 'it writes JSON without spaces';
  return undefined;
}

/** Encodes a vector's message: JSON as a value, binary in hexadecimal. */
function encoded(encode, { binary, message }) {
  const frame = encode(held(message, binary && header(binary).metadata));
  return typeof frame === 'string' ? JSON.parse(frame) : hex(frame);
}

describe('the newest client', () => {
  it('knows every kind of vector', () => {
    const kinds = new Set(vectors.map(({ serializer, direction }) => `${serializer} ${direction}`));
    assert.deepEqual([...kinds].sort(), ['1.0.0 client', '1.0.0 server', '2.0.0 client', '2.0.0 server']);
  });

  for (const vsn of ['1.0.0', '2.0.0']) {
    describe(`reads what the server writes in vsn ${vsn}:`, () => {
      const { decode } = serializer(vsn);
      for (const { file, name, text, binary, message } of of(vsn, 'server')) {
        it(`${name} (${file})`, () => {
          const read = decode(text ?? bytes(binary).buffer);
          const { join_ref, ...wanted } = held(message);
          // V1 has no place for it.
          assert.deepEqual(read, vsn === '1.0.0' ? wanted : { join_ref, ...wanted });
          if (message.payload_hex !== undefined) {
            assert.equal(hex(read.payload.payload), hex(bytes(message.payload_hex)));
          }
        });
      }
    });
  }

  describe('writes what the server reads in vsn 2.0.0:', () => {
    const { encode } = serializer('2.0.0');
    const own = of('2.0.0', 'client');
    const wanted = ({ text, binary }) => (text === undefined ? hex(bytes(binary)) : JSON.parse(text));
    for (const vector of own.filter((vector) => !obstacle(vector))) {
      it(`${vector.name} (${vector.file})`, () => {
        assert.deepEqual(encoded(encode, vector), wanted(vector));
      });
    }
    for (const vector of own.filter(obstacle)) {
      it(`not ${vector.name} (${vector.file}): ${obstacle(vector)}`, () => {
        assert.notDeepEqual(encoded(encode, vector), wanted(vector));
      });
    }
  });
});
