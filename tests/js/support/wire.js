// Frames as messages, for those who stand between a client and a server or in the server's place:
// `{ join_ref, ref, topic, event, payload }` whatever the version.

/** The message of a frame of this protocol version. */
export function decode(vsn, data, isBinary) {
  if (isBinary) return decodeBinary(data);
  const frame = JSON.parse(data.toString());
  if (vsn === '1.0.0') return { join_ref: null, ...frame };
  const [join_ref, ref, topic, event, payload] = frame;
  return { join_ref, ref, topic, event, payload };
}

/** The text frame of a server's message. */
export function encode(vsn, { join_ref = null, ref = null, topic, event, payload = {} }) {
  return JSON.stringify(
    vsn === '1.0.0' ? { topic, event, payload, ref } : [join_ref, ref, topic, event, payload],
  );
}

/** A kind 4 frame of JSON, as a server sends it. */
export function encodeBroadcast(topic, event, payload) {
  const fields = [topic, event].map((field) => Buffer.from(field));
  const header = [4, ...fields.map((field) => field.length), 0, 1];
  return Buffer.concat([Buffer.from(header), ...fields, Buffer.from(JSON.stringify(payload))]);
}

/** Kind 3 has join_ref and ref before the topic, kind 4 has not. */
function decodeBinary(data) {
  const names = ['topic', 'event', 'meta'];
  if (data[0] === 3) names.unshift('join_ref', 'ref');
  const fields = { join_ref: null, ref: null };
  let offset = 2 + names.length;
  names.forEach((name, index) => {
    const length = data[1 + index];
    fields[name] = data.toString('utf8', offset, (offset += length)) || null;
  });
  const rest = data.subarray(offset);
  const payload = data[1 + names.length] === 0 ? rest : JSON.parse(rest.toString());
  const { join_ref, ref, topic, event } = fields;
  return { join_ref, ref, topic, event: 'broadcast', payload: { type: 'broadcast', event, payload } };
}
