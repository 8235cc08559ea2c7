// The demo page: one event, fetched from its cached endpoints and kept fresh by the notifications
// that the published supabase-js receives. It does what an application does: it knows which
// endpoints it has fetched, and fetches those again that a notification names, and no others.
"use strict";

const REFRESH_DELAY_MS = 1000;
const RETRY_MS = 5000;
const LOG_LINES_MAX = 300;

const byId = (id) => document.getElementById(id);
const money = new Intl.NumberFormat("en-US", {
  style: "currency", currency: "USD", maximumFractionDigits: 0,
});
const STATUS_TEXT = { active: "open", closed: "closed", sold: "sold", cancelled: "cancelled", paid: "paid" };

// What the cache holds: endpoint → its data, for the endpoints that this page shows.
const cache = new Map();
// Endpoints to be fetched again, and the newest notification that named some of them.
const invalidated = new Set();
let latest = null;
let timer = null;
let isRefreshing = false;
// Artworks whose bids are unfolded: id → endpoint.
const unfolded = new Map();
const counts = { notifications: 0, refreshes: 0, fetches: 0 };

const params = new URLSearchParams(location.search);
const eid = params.get("event") || "AB3028";
const main = `/live/event/${encodeURIComponent(eid)}`;
const media = `${main}/media`;
const artists = `${main}/artists`;

start().catch((error) => {
  log(`⚠️ ${error.message}`, "failure");
  setStatus("lost", "Not running");
});

async function start() {
  const config = await fetchJson("/demo/config.json");
  showEvents(config.events);
  showAlerts(config.prometheus);
  log("🌐 [V2-BROADCAST] Fetching event data from cached endpoint");
  log(`🌐 [V2-BROADCAST] Event EID: ${eid}`);
  const event = await fetchInto(main).catch(() => null);
  log(`🌐 [V2-BROADCAST] Cached event data received: ${event ? "SUCCESS" : "FAILED"}`);
  if (!event) {
    byId("title").textContent = `There is no event ${eid}`;
    throw new Error(`Nothing was found at ${main}`);
  }
  log(`🌐 [V2-BROADCAST] Artworks in cache: ${event.artworks.length}`);
  log("🌐 [V2-BROADCAST] Fetching media from cached endpoint");
  await Promise.all([fetchInto(media), fetchInto(artists)]);
  log("🌐 [V2-BROADCAST] Media data received: SUCCESS");
  render();
  subscribe(config);
}

// --- Notifications ---

function subscribe(config) {
  const client = supabase.createClient(new URL(config.url, location.href).href, config.anonKey);
  log(`🔔 [V2-BROADCAST] Setting up cache invalidation for event ${eid}`);
  log(`[BroadcastCacheManager] 🔔 Subscribing to cache invalidation for event ${eid}`);
  const channel = client
    .channel(`cache_invalidate_${eid}`)
    .on("broadcast", { event: "cache_invalidation" }, (message) => invalidate(message.payload))
    .subscribe((state) => {
      if (state === "SUBSCRIBED") {
        log(`[BroadcastCacheManager] ✅ Subscribed to cache invalidation for event ${eid}`);
      }
      watch();
    });
  client
    .channel(`auction_winner_${eid}`)
    .on("broadcast", { event: "auction_winner" }, ({ payload }) => {
      const winner = payload.winner_nickname ?? "nobody";
      log(`🏆 ${payload.art_code} sold to ${winner} for ${showMoney(payload.winning_amount)}`);
    })
    .subscribe();

  let wasLive = false;
  function watch() {
    const isLive = client.realtime.isConnected() && channel.state === "joined";
    wasLive ||= isLive;
    if (isLive) {
      setStatus("live", "Live");
    } else {
      setStatus(wasLive ? "lost" : "waiting", wasLive ? "Reconnecting" : "Connecting");
    }
    return isLive;
  }
  setInterval(watch, 1000);
  // Without notifications the page goes on, only slower; a demo that was started again has
  // another key.
  setInterval(async () => {
    if (watch()) return;
    const now = await fetchJson("/demo/config.json").catch(() => null);
    if (now && now.anonKey !== config.anonKey) location.reload();
    if (now) refreshSoon([...cache.keys()], { type: "fallback" });
  }, RETRY_MS);
}

function invalidate(payload) {
  counts.notifications += 1;
  log(`[BroadcastCacheManager] 📡 [BROADCAST] ${payload.type} notification for event ${eid}`, "notification");
  const endpoints = Array.isArray(payload.endpoints) ? payload.endpoints : [];
  for (const endpoint of endpoints) {
    log(`[BroadcastCacheManager] ❌ [CACHE] Invalidated endpoint: ${endpoint}`);
  }
  refreshSoon(endpoints, payload);
  showCounts();
}

// Collects what is named within the delay: the union is fetched, each endpoint once.
function refreshSoon(endpoints, payload) {
  for (const endpoint of endpoints) {
    invalidated.add(endpoint);
  }
  latest = payload;
  timer ??= setTimeout(refresh, REFRESH_DELAY_MS);
}

async function refresh() {
  timer = null;
  if (isRefreshing) {
    // An answer that is under way may be older than the notification.
    timer = setTimeout(refresh, REFRESH_DELAY_MS);
    return;
  }
  isRefreshing = true;
  const endpoints = [...invalidated];
  invalidated.clear();
  log("🔄 [V2-BROADCAST] Refreshing data after cache invalidation: "
    + JSON.stringify({ type: latest?.type, endpoints, timestamp: latest?.timestamp }));
  const shown = endpoints.filter((endpoint) => cache.has(endpoint));
  if (shown.includes(main)) {
    log("🌐 [V2-BROADCAST] Fetching event data from cached endpoint");
  }
  const results = await Promise.allSettled(shown.map(fetchInto));
  const failed = shown.filter((_, index) => results[index].status === "rejected");
  counts.refreshes += 1;
  isRefreshing = false;
  render();
  if (failed.length === 0) {
    log(`✅ [V2-BROADCAST] Successfully refreshed data for event ${eid}`);
  } else {
    log(`⚠️ Not refreshed, trying again: ${failed.join(", ")}`, "failure");
    for (const endpoint of failed) {
      invalidated.add(endpoint);
    }
    timer ??= setTimeout(refresh, RETRY_MS);
  }
}

async function fetchInto(endpoint) {
  counts.fetches += 1;
  const data = await fetchJson(endpoint);
  cache.set(endpoint, data);
  return data;
}

async function fetchJson(path) {
  const response = await fetch(path);
  if (!response.ok) throw new Error(`${path}: ${response.status}`);
  return response.json();
}

// --- The page ---

function render() {
  const event = cache.get(main);
  byId("title").textContent = `${event.eid} · ${event.name}`;
  byId("venue").textContent = `${event.venue}, round ${event.current_round}`;
  const names = new Map(cache.get(artists).artists.map((artist) => [artist.id, artist.name]));
  const photos = new Map();
  for (const photo of cache.get(media).media) {
    photos.set(photo.art_id, [...(photos.get(photo.art_id) ?? []), photo]);
  }
  const changed = event.artworks.filter((artwork) =>
    renderArtwork(artwork, names.get(artwork.artist_id) ?? "", photos.get(artwork.id) ?? []));
  if (changed.length > 0) {
    for (const row of document.querySelectorAll("tr.latest")) row.classList.remove("latest");
    for (const artwork of changed) byId(artwork.id).classList.add("latest");
  }
  showCounts();
}

// Brings an artwork's row up to date; true if it showed something else before.
function renderArtwork(artwork, artist, photos) {
  const row = byId(artwork.id) ?? newRow(artwork);
  const isNew = row.cells.length === 0;
  if (isNew) fillRow(row, artwork, artist);
  const cell = (name) => row.querySelector(`[data-is=${name}]`);
  const sold = artwork.status === "sold" && artwork.winner ? `sold to ${artwork.winner}` : null;
  const changed = [
    setText(cell("easel"), artwork.easel ?? "–"),
    setText(cell("bid"), artwork.current_bid === null
      ? `from ${showMoney(artwork.starting_bid)}` : showMoney(artwork.current_bid)),
    setText(cell("bids"), artwork.bid_count),
    setText(cell("votes"), artwork.vote_count),
    setText(cell("photos"), photos.length),
    setText(cell("status"), sold ?? STATUS_TEXT[artwork.status] ?? artwork.status),
  ].includes(true);
  paint(cell("picture"), photos.at(-1)?.media_id ?? artwork.id);
  renderBids(row, artwork);
  return changed && !isNew;
}

function newRow(artwork) {
  const group = byId(`round-${artwork.round}`) ?? newRound(artwork.round);
  const row = group.insertRow();
  row.id = artwork.id;
  return row;
}

function newRound(round) {
  const group = byId("artworks").createTBody();
  group.id = `round-${round}`;
  const heading = element("th", `Round ${round}`, "round");
  heading.colSpan = 7;
  heading.scope = "rowgroup";
  group.insertRow().append(heading);
  return group;
}

function fillRow(row, artwork, artist) {
  const name = element("th", "", "artist");
  name.scope = "row";
  const picture = element("span", "", "picture");
  picture.dataset.is = "picture";
  picture.setAttribute("aria-hidden", "true");
  name.append(picture, artist);
  const bids = element("td", "", "number");
  const button = element("button", "");
  button.type = "button";
  button.dataset.is = "bids";
  button.setAttribute("aria-expanded", "false");
  button.setAttribute("aria-label", `Bids on ${artist}'s artwork`);
  button.addEventListener("click", () => toggleBids(artwork.id));
  bids.append(button);
  row.append(
    part("easel", "easel"), name, part("bid", "number"), bids,
    part("votes", "number"), part("photos", "number"), part("status"),
  );
}

function part(name, className = "") {
  const cell = element("td", "", className);
  cell.dataset.is = name;
  return cell;
}

// Unfolds an artwork's bids, or folds them. Only what is unfolded is fetched.
async function toggleBids(id) {
  const { round, easel } = cache.get(main).artworks.find((artwork) => artwork.id === id);
  if (unfolded.has(id)) {
    foldBids(id);
  } else if (easel !== null) {
    const endpoint = `${main}-${round}-${easel}/bids`;
    try {
      await fetchInto(endpoint);
      unfolded.set(id, endpoint);
    } catch (error) {
      log(`⚠️ ${error.message}`, "failure");
    }
  }
  render();
}

function foldBids(id) {
  cache.delete(unfolded.get(id));
  unfolded.delete(id);
}

function renderBids(row, artwork) {
  // Without an easel an artwork's bids have no endpoint that a notification could name.
  if (artwork.easel === null) foldBids(artwork.id);
  const data = cache.get(unfolded.get(artwork.id));
  const id = `bids-${artwork.id}`;
  row.querySelector("button").setAttribute("aria-expanded", String(Boolean(data)));
  byId(id)?.remove();
  if (!data) return;
  const list = document.createElement("ol");
  list.append(...data.bids.map((bid) => element("li", `${showMoney(bid.amount)} ${bid.bidder}`)));
  const cell = document.createElement("td");
  cell.colSpan = 7;
  cell.append(data.bids.length > 0 ? list : "No bids yet");
  const bids = document.createElement("tr");
  bids.id = id;
  bids.className = "bids";
  bids.append(cell);
  row.after(bids);
}

// Sets an element's text; true if it was another, which its cell then shows for a moment.
function setText(part, value) {
  const text = String(value);
  if (part.textContent === text) return false;
  const isFirst = part.textContent === "";
  part.textContent = text;
  const cell = part.closest("td");
  cell.classList.remove("changed");
  if (isFirst) return false;
  void cell.offsetWidth; // Starts the animation again.
  cell.classList.add("changed");
  return true;
}

// There are no photos in the example: an id is painted instead, so that a new one is seen.
function paint(picture, id) {
  const hue = (from) => parseInt(id.replaceAll("-", "").slice(from, from + 4), 16) % 360;
  picture.style.background = `linear-gradient(${hue(0)}deg, hsl(${hue(4)} 60% 45%), `
    + `hsl(${hue(8)} 65% 60%) 55%, hsl(${hue(20)} 70% 75%))`;
}

// Prometheus listens on the demo's own machine alone, where it is installed.
function showAlerts(prometheus) {
  if (!prometheus || !["127.0.0.1", "localhost"].includes(location.hostname)) return;
  const link = element("a", "Alerts");
  link.href = `${prometheus}/alerts`;
  link.title = "The gateway's alerts, and its metrics as graphs: Prometheus";
  byId("events").append(link);
}

function showEvents(events) {
  byId("events").replaceChildren(...events.map((event) => {
    const link = element("a", event.eid);
    link.href = `?event=${encodeURIComponent(event.eid)}`;
    link.title = event.name;
    if (event.eid === eid) link.setAttribute("aria-current", "page");
    return link;
  }));
}

function setStatus(state, text) {
  const status = byId("status");
  status.dataset.state = state;
  if (status.textContent !== text) status.textContent = text;
}

function showCounts() {
  byId("counts").textContent = `${counts.notifications} notifications, `
    + `${counts.refreshes} refreshes, ${counts.fetches} fetches`;
}

// Writes a line to the console and to the page, which stays at the end unless somebody reads.
function log(text, className = "") {
  console.log(text);
  const line = element("li", "", className);
  const time = element("time", new Date().toLocaleTimeString("en-GB"));
  line.append(time, text);
  const list = byId("log");
  const isAtEnd = list.scrollHeight - list.scrollTop - list.clientHeight < 50;
  list.append(line);
  while (list.children.length > LOG_LINES_MAX) list.firstChild.remove();
  if (isAtEnd) list.scrollTop = list.scrollHeight;
}

function element(name, text, className = "") {
  const made = document.createElement(name);
  made.textContent = text;
  if (className) made.className = className;
  return made;
}

function showMoney(amount) {
  return money.format(amount);
}
