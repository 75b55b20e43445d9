"use strict";
// Shows /status as it changes. Everything is set as text, never as HTML: names come from outside.

const PERIOD = 2000;
const DAY = 24 * 3600;
let before = null;
let failures = 0;

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

  const outages = p.outages.slice();
  if (p.backoff) {
    outages.push({ began: p.backoff.outage_since, ended: null, cause: p.last_error ? p.last_error.kind : "", failures: p.backoff.attempt });
  }
  timeline(outages, status.started_at, now);
  const table = element("outages");
  table.hidden = outages.length === 0;
  rows(table, outages.slice().reverse().slice(0, 20).map((o) => [
    new Date(o.began * 1000).toLocaleString(),
    o.ended === null ? (joined ? ["joined again", "odd"] : ["goes on", "bad"]) : duration(o.ended - o.began),
    o.last_cause && o.last_cause !== o.cause ? `${o.cause}, then ${o.last_cause}` : o.cause,
    String(o.failures),
  ]));
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
    sum + (o.ended === null ? now : o.ended) - Math.max(o.began, now - DAY), 0);
  bar.setAttribute("aria-label", outages.length === 0
    ? "No outage of the portal channel in the last 24 hours."
    : `${outages.length} outage${outages.length === 1 ? "" : "s"} of the portal channel in the last 24 hours, ${duration(lost)} in all.`);
}

function relays(status, now) {
  element("no-relays").hidden = status.relays.length > 0;
  element("relays").hidden = status.relays.length === 0;
  rows(element("relays"), status.relays.map((r) => [
    r.addresses.join(", "),
    [r.state, r.state === "allocated" ? "good" : r.state === "failed" ? "bad" : "odd"],
    duration(now - r.since),
    r.rtt === null ? "-" : `${(r.rtt * 1000).toFixed(1)} ms`,
    String(r.allocations),
    String(r.flaps),
    r.credentials_expire_at === null ? "-" : `${duration(r.credentials_expire_at - now)} left`,
    [r.last_error === null ? "-" : `${r.last_error} (${duration(now - r.last_error_at)} ago)`, "long"],
  ]));
}

function traffic(status) {
  const t = status.traffic;
  const span = before ? (Date.now() - before.at) / 1000 : 0;
  const rate = (what) => span > 0 && t[what] >= before.traffic[what]
    ? `${bytes((t[what] - before.traffic[what]) * 8 / span).replace(/B$/, "bit")}/s` : "-";
  const numbers = [
    ["From clients, now", rate("rx_bytes")],
    ["To clients, now", rate("tx_bytes")],
    ["From clients", bytes(t.rx_bytes)],
    ["To clients", bytes(t.tx_bytes)],
    ["Flows", String(status.flows)],
    ["DNS queries", String(status.dns.answered + status.dns.failed)],
  ];
  element("traffic").replaceChildren(...numbers.map(([name, value]) => {
    const box = make("div");
    box.append(make("dt", name), make("dd", value));
    return box;
  }));
  before = { at: Date.now(), traffic: t };
  const dropped = Object.entries(status.dropped).sort((a, b) => b[1] - a[1]);
  element("dropped").hidden = dropped.length === 0;
  rows(element("dropped"), dropped.map(([reason, count]) => [reason, String(count)]));
}

function clients(status, now) {
  element("client-count").textContent = `(${status.clients.length})`;
  // The busiest, if there are very many: a browser is no place for thousands of rows.
  const shown = status.clients.slice()
    .sort((a, b) => b.rx_bytes + b.tx_bytes - a.rx_bytes - a.tx_bytes).slice(0, 200);
  element("clients").hidden = shown.length === 0;
  rows(element("clients"), shown.map((c) => [
    c.id,
    [c.connection, c.connection === "connected" ? "good" : "odd"],
    c.path === null ? "-" : c.path,
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

async function health() {
  const lamps = await Promise.all([["live", "/livez"], ["started", "/startupz"], ["ready", "/readyz"]]
    .map(async ([name, path]) => {
      const answer = await fetch(path, { headers: { Accept: "application/json" } });
      const report = await answer.json();
      const failed = report.checks.filter((c) => !c.ok && !c.excluded);
      const item = make("li");
      item.append(make("span", `${report.passed ? "\u2713" : "\u2717"} ${name}`, report.passed ? "good" : "bad"));
      if (failed.length > 0) item.append(`: ${failed.map((c) => `${c.name} (${c.reason})`).join(", ")}`);
      return item;
    }));
  element("health").replaceChildren(...lamps);
}

async function show() {
  try {
    const answer = await fetch("/status");
    if (!answer.ok) throw new Error(`the gateway answers ${answer.status}`);
    const status = await answer.json();
    // The gateway's clock, which all times in the document are of, and not that of this computer.
    const now = Date.parse(answer.headers.get("date")) / 1000 || Date.now() / 1000;
    element("name").textContent = status.name || "firezone-gateway";
    document.title = `${status.name} (${(STATES[status.portal.state] || [status.portal.state])[0]})`;
    element("facts").textContent = `firezone-gateway ${status.version}, up ${duration(now - status.started_at)}`
      + `${status.draining ? ", shutting down" : ""}. ${status.id}`;
    portal(status, now);
    relays(status, now);
    traffic(status);
    clients(status, now);
    host(status);
    await health();
    failures = 0;
    element("stale").hidden = true;
  } catch (error) {
    failures += 1;
    if (failures > 1) {
      element("stale").textContent = `The gateway does not answer (${error.message}). What you see is old.`;
      element("stale").hidden = false;
    }
  }
  setTimeout(show, PERIOD);
}

show();
