"use strict";
// Shows what /events tells, or /status every two seconds where that does not work. Everything is
// set as text, never as HTML: names come from outside. All times are of the gateway's clock, which
// this computer's need not agree with; only intervals are measured here.

const DAY = 24 * 3600;
// Milliseconds. Events come once a second; without one for SILENCE, the page asks by itself.
const POLL = 2000;
const SILENCE = 4000;
const LISTEN_AGAIN = 10000;
// Seconds that the chart shows.
const CHART = 300;
let before = null;
let samples = [];

const element = (id) => document.getElementById(id);

function make(name, text, kind) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  if (kind) made.className = kind;
  return made;
}

function duration(seconds) {
  let s = Math.max(0, seconds);
  if (s < 1) return `${Math.round(s * 1000)} ms`;
  s = Math.floor(s);
  if (s < 60) return `${s} s`;
  if (s < 3600) return `${Math.floor(s / 60)} min ${s % 60} s`;
  if (s < 2 * DAY) return `${Math.floor(s / 3600)} h ${Math.floor((s % 3600) / 60)} min`;
  return `${Math.floor(s / DAY)} days`;
}

function bytes(count) {
  const units = ["B", "kB", "MB", "GB", "TB", "PB"];
  let n = 0;
  while (count >= 1000 && n < units.length - 1) { count /= 1000; n += 1; }
  return `${n && count < 10 ? count.toFixed(1) : Math.round(count)} ${units[n]}`;
}

function rows(table, all) {
  const body = table.tBodies[0];
  body.replaceChildren(...all.map((cells) => {
    const row = make("tr");
    cells.forEach((cell, n) => {
      const [text, kind] = Array.isArray(cell) ? cell : [cell, ""];
      const made = make(n === 0 ? "th" : "td", text, kind);
      if (n === 0) made.scope = "row";
      row.append(made);
    });
    return row;
  }));
}

const STATES = {
  idle: ["not started", "odd"],
  connecting: ["connecting", "odd"],
  joining: ["joining", "odd"],
  joined: ["joined", "good"],
  waiting: ["waiting for the next attempt", "bad"],
  blocked: ["blocked: the token is refused", "bad"],
  gave_up: ["gave up", "bad"],
  closed: ["closed", "odd"],
};

function portal(status, now) {
  const p = status.portal;
  const joined = p.state === "joined";
  const [words, kind] = STATES[p.state] || [p.state, "odd"];
  const line = element("portal");
  // A channel that was never started has no beginning.
  const parts = [make("span", words, kind), p.since > 0 ? ` for ${duration(now - p.since)}. ` : ". "];
  if (p.backoff) {
    const b = p.backoff;
    parts.push(`Outage for ${duration(now - b.outage_since)}, ${b.attempt} failed attempts. `);
    if (joined) {
      // A join proves something only when it has lasted.
      parts.push("It counts as over once this has lasted. ");
    } else {
      parts.push(b.next_attempt_at === null ? "An attempt is running. "
        : b.next_attempt_at <= now ? "The next attempt is due. "
        : `Next attempt in ${duration(b.next_attempt_at - now)}. `);
      parts.push(b.budget_left === null ? "It never gives up. "
        : `It gives up in ${duration(b.budget_left)}. `);
    }
  }
  if (p.last_error && (p.backoff || !joined)) {
    parts.push(`Last error: ${p.last_error.message} (${p.last_error.kind}).`);
  }
  // A status region is read out when it changes: the seconds that pass are no news.
  const news = `${p.state} ${p.backoff ? p.backoff.attempt : ""}`;
  line.setAttribute("aria-live", line.dataset.news === news ? "off" : "polite");
  line.dataset.news = news;
  line.replaceChildren(...parts);

  trying(p, joined, now);
  numbers("portal-numbers", [
    ["Attempts since start", String(p.attempts)],
    ["Joins since start", String(p.joins)],
    ["Last message", p.last_message_at === null ? "none yet" : `${duration(now - p.last_message_at)} ago`],
  ]);
  // Newest first. Without a failure among them there is nothing to learn from them.
  const attempts = p.recent_attempts.slice().reverse().slice(0, 5);
  element("last-attempts").hidden = attempts.every((a) => a.cause === null);
  rows(element("last-attempts"), attempts.map((a) => [
    date(a.at), duration(now - a.at), a.cause === null ? ["joined", "good"] : [a.cause, "bad"],
  ]));

  const outages = p.outages.slice();
  if (p.backoff) {
    outages.push({ began: p.backoff.outage_since, ended: null, cause: p.last_error ? p.last_error.kind : "", failures: p.backoff.attempt });
  }
  timeline(outages, status.started_at, now);
  const table = element("outages");
  table.hidden = outages.length === 0;
  rows(table, outages.slice().reverse().slice(0, 20).map((o) => [
    date(o.began),
    o.ended === null ? (joined ? ["joined again", "odd"] : ["goes on", "bad"]) : duration(o.ended - o.began),
    o.last_cause && o.last_cause !== o.cause ? `${o.cause}, then ${o.last_cause}` : o.cause,
    String(o.failures),
  ]));
}

function date(at) {
  return new Date(at * 1000).toLocaleString(undefined, { dateStyle: "short", timeStyle: "medium" });
}

// The present outage: its attempts, and how far it is to the next one.
function trying(p, joined, now) {
  const b = p.backoff;
  element("trying").hidden = !b || joined;
  if (!b || joined) return;
  const shown = p.recent_attempts.filter((a) => a.at >= b.outage_since);
  // Of a long outage, the attempts that are known.
  const from = shown.length > 0 && shown.length < b.attempt ? shown[0].at : b.outage_since;
  const to = Math.max(now, b.next_attempt_at || now, from + 1);
  const place = (at) => `${100 * (at - from) / (to - from)}%`;
  const passed = make("div", undefined, "passed");
  passed.style.left = "0";
  passed.style.width = place(now);
  element("attempts").replaceChildren(passed, ...shown.map((a) => {
    const tick = make("div", undefined, a.cause === null ? "tick good" : "tick");
    tick.style.left = `min(${place(a.at)}, 100% - 3px)`;
    return tick;
  }));
  const next = b.next_attempt_at === null ? "an attempt is running"
    : b.next_attempt_at <= now ? "the next attempt is due" : `next attempt in ${duration(b.next_attempt_at - now)}`;
  element("attempts").setAttribute("aria-label", `${b.attempt} failed attempts in this outage; ${next}.`);
  element("attempts-from").textContent = `${duration(now - from)} ago`;
  element("attempts-to").textContent = next;
}

function timeline(outages, started, now) {
  const bar = element("timeline");
  const place = (at) => 100 * Math.min(1, Math.max(0, 1 - (now - at) / DAY));
  const part = (from, to, kind) => {
    const made = make("div", undefined, kind);
    // From the right, so that the shortest one at the end is seen, too.
    made.style.right = `${100 - place(to)}%`;
    made.style.width = `${place(to) - place(from)}%`;
    return made;
  };
  bar.replaceChildren(part(started, now, "up"),
    ...outages.map((o) => part(o.began, o.ended === null ? now : o.ended, "down")));
  const lost = outages.reduce((sum, o) =>
    sum + Math.max(0, (o.ended === null ? now : o.ended) - Math.max(o.began, now - DAY)), 0);
  bar.setAttribute("aria-label", outages.length === 0
    ? "No outage of the portal channel in the last 24 hours."
    : `${outages.length} outage${outages.length === 1 ? "" : "s"} of the portal channel in the last 24 hours, ${duration(lost)} in all.`);
}

function relays(status, now) {
  const churn = status.relay_churn;
  element("churn").textContent = churn === 0 ? "No allocation ended in the last hour."
    : `${churn} allocation${churn === 1 ? "" : "s"} ended in the last hour.`;
  const episodes = status.relay_episodes.slice().reverse().slice(0, 10);
  element("episodes").hidden = episodes.length === 0;
  rows(element("episodes"), episodes.map((e) => [
    `${duration(now - e.ended)} ago`, e.server || e.relay, duration(e.ended - e.began), e.begin, [e.end, "long"],
  ]));
  element("no-relays").hidden = status.relays.length > 0;
  element("relays").hidden = status.relays.length === 0;
  rows(element("relays"), status.relays.map((r) => [
    r.addresses.join(", "),
    [r.state, r.state === "allocated" ? "good" : r.state === "failed" ? "bad" : "odd"],
    duration(now - r.since),
    r.rtt === null ? "-" : `${(r.rtt * 1000).toFixed(1)} ms`,
    String(Math.max(0, r.allocations - (r.allocated_at === null ? 0 : 1))),
    String(r.flaps),
    r.credentials_expire_at === null ? "-" : `${duration(r.credentials_expire_at - now)} left`,
    [r.last_error === null ? "-" : `${r.last_error} (${duration(now - r.last_error_at)} ago)`, "long"],
  ]));
}

function numbers(id, all) {
  element(id).replaceChildren(...all.map(([name, value]) => {
    const box = make("div");
    box.append(make("dt", name), make("dd", value));
    return box;
  }));
}

const bits = (rate) => `${bytes(rate).replace(/B$/, "bit")}/s`;

function traffic(status) {
  const t = status.traffic;
  // A document that was seen before tells no rate, and neither does the first one after a restart.
  if (before && (status.at < before.at || status.started_at !== before.started)) {
    before = null;
    samples = [];
  }
  if (!before || status.at > before.at) {
    if (before) {
      const rate = (what) => 8 * Math.max(0, t[what] - before.traffic[what]) / (status.at - before.at);
      samples.push({ at: status.at, rx: rate("rx_bytes"), tx: rate("tx_bytes") });
      samples = samples.filter((s) => s.at > status.at - CHART);
    }
    before = { at: status.at, started: status.started_at, traffic: t };
  }
  const last = samples[samples.length - 1];
  numbers("traffic", [
    ["From clients, now", last ? bits(last.rx) : "-"],
    ["To clients, now", last ? bits(last.tx) : "-"],
    ["From clients", bytes(t.rx_bytes)],
    ["To clients", bytes(t.tx_bytes)],
    ["Flows", String(status.flows)],
    ["DNS queries", String(status.dns.answered + status.dns.failed)],
  ]);
  chart(status.at);
  const dropped = Object.entries(status.dropped).sort((a, b) => b[1] - a[1]);
  element("dropped").hidden = dropped.length === 0;
  rows(element("dropped"), dropped.map(([reason, count]) => [reason, String(count)]));
}

function chart(now) {
  const most = Math.max(1, ...samples.map((s) => Math.max(s.rx, s.tx)));
  for (const what of ["rx", "tx"]) {
    element(`chart-${what}`).setAttribute("points", samples.map((s) =>
      `${(CHART - (now - s.at)).toFixed(1)},${(58 - 56 * s[what] / most).toFixed(1)}`).join(" "));
  }
  element("chart").setAttribute("aria-label",
    `Throughput of the last five minutes. The most was ${samples.length > 0 ? bits(most) : "not measured yet"}.`);
}

function clients(status, leftOut, now) {
  element("client-count").textContent = `(${status.clients.length + leftOut}${leftOut > 0 ? `, the ${status.clients.length} with most traffic shown` : ""})`;
  const shown = status.clients.slice().sort(busier);
  element("clients").hidden = shown.length === 0;
  rows(element("clients"), shown.map((c) => [
    c.id,
    [c.connection, c.connection === "connected" ? "good" : "odd"],
    c.path === null ? "-" : `${c.path}${c.path_since === null ? "" : ` for ${duration(now - c.path_since)}`}`,
    c.last_handshake_at === null ? "-" : `${duration(now - c.last_handshake_at)} ago`,
    bytes(c.rx_bytes),
    bytes(c.tx_bytes),
    [c.grants.map((g) => g.name).join(", ") || "-", "long"],
    [Object.entries(c.dropped).map(([reason, count]) => `${reason} ${count}`).join(", ") || "-", "long"],
  ]));
}

function host(status) {
  const d = status.device;
  const state = d.error ? make("span", d.error, "bad")
    : d.up ? make("span", "up", "good") : make("span", "not up yet", "odd");
  element("device").replaceChildren(`${d.name || "device"} is `, state, `. ${d.addresses.join(", ")}`);
  element("host").replaceChildren(...status.host.filter((f) => f.level !== "ok").map((f) => {
    const item = make("li");
    item.append(make("span", f.level, f.level === "error" ? "bad" : "odd"), ` ${f.name}: ${f.found}`);
    if (f.fix) item.append(make("pre", f.fix));
    return item;
  }));
}

function health(reports) {
  element("health").replaceChildren(...["live", "started", "ready"].map((name) => {
    const report = reports[name];
    const failed = report.checks.filter((c) => !c.ok && !c.excluded);
    const item = make("li");
    item.append(make("span", `${report.passed ? "\u2713" : "\u2717"} ${name}`, report.passed ? "good" : "bad"));
    if (failed.length > 0) item.append(`: ${failed.map((c) => `${c.name} (${c.reason})`).join(", ")}`);
    return item;
  }));
}

const busier = (a, b) => b.rx_bytes + b.tx_bytes - a.rx_bytes - a.tx_bytes;

function show(event) {
  const { status, at: now } = event;
  element("name").textContent = status.name || "firezone-gateway";
  document.title = `${status.name} (${(STATES[status.portal.state] || [status.portal.state])[0]})`;
  element("facts").textContent = `firezone-gateway ${status.version}, up ${duration(now - status.started_at)}`
    + `${status.draining ? ", shutting down" : ""}. ${status.id}`;
  health(event);
  portal(status, now);
  relays(status, now);
  traffic(status);
  clients(status, event.clients_left_out, now);
  host(status);
  element("stale").hidden = true;
}

let source = null;
let heard = 0;
let listened = 0;
let failures = 0;

function listen() {
  listened = performance.now();
  source = new EventSource("/events");
  source.addEventListener("status", (message) => {
    heard = performance.now();
    failures = 0;
    show(JSON.parse(message.data));
    element("source").textContent = "Shown as it happens.";
  });
  source.addEventListener("error", () => {
    // Refused, not broken off: no use in waiting.
    if (source.readyState === EventSource.CLOSED) heard = -SILENCE;
  });
}

// The same by asking, where events do not come: something in between may hold them back.
async function poll() {
  const ask = async (path) => {
    const answer = await fetch(path, { headers: { Accept: "application/json" } });
    // Probes that fail answer all the same.
    if (!answer.ok && path === "/status") throw new Error(`the gateway answers ${answer.status}`);
    return [await answer.json(), answer.headers.get("date")];
  };
  const [[status, date], [live], [started], [ready]] =
    await Promise.all(["/status", "/livez", "/startupz", "/readyz"].map(ask));
  status.clients.sort(busier);
  const leftOut = status.clients.splice(200).length;
  // To the second only; the document may be newer.
  const at = Math.max(Date.parse(date) / 1000 || 0, status.at);
  show({ at, live, started, ready, clients_left_out: leftOut, status });
  element("source").textContent = `Shown every ${POLL / 1000} seconds.`;
}

async function watch() {
  if (performance.now() - heard > SILENCE) {
    // A browser does not try for ever by itself, and not after every answer.
    if (!source || source.readyState === EventSource.CLOSED || performance.now() - listened > LISTEN_AGAIN) {
      if (source) source.close();
      listen();
    }
    try {
      await poll();
      failures = 0;
    } catch (error) {
      failures += 1;
      if (failures > 1) {
        element("stale").textContent = `The gateway does not answer (${error.message}). What you see is old.`;
        element("stale").hidden = false;
        element("source").textContent = "";
      }
    }
  }
  setTimeout(watch, POLL);
}

listen();
setTimeout(watch, POLL);
