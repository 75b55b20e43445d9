//! Every bound on what clients can make us remember. Each is told in docs/access.md.

/// Most flows of one client.
pub const MAX_FLOWS: usize = 16_384;
/// Most flows of all clients together.
pub const MAX_FLOWS_TOTAL: usize = 1 << 20;
/// Flows that a client gets even when the total is used up, so that others cannot lock it out.
pub const ASSURED_FLOWS: usize = 64;
/// Most proxy addresses of one client; beyond it the domain announced longest ago is forgotten. A
/// client uses four to eight per domain, and names few domains in a day.
pub const MAX_PROXIES: usize = 16_384;
/// Most proxy addresses of one domain; more are left out.
pub const MAX_PROXIES_OF_DOMAIN: usize = 64;
/// Names being resolved at once (data-path spec §9).
pub const MAX_RESOLUTIONS: usize = 1000;
/// Announcements of one client that may wait for a resolution, so that none takes all places.
pub const MAX_RESOLUTIONS_OF_CLIENT: usize = 64;
/// Beginnings and ends of one client's flows that flow logs were not told of yet; flows that begin
/// beyond it are not logged. They are told every second: a client with so many is scanning, or
/// begins and ends the same few over and over to fill our memory.
pub const MAX_UNTOLD: usize = 4096;
/// Reports that wait to be handed over to flow logs; more are dropped. Flow logs themselves take
/// fewer at a time.
pub const MAX_REPORTS: usize = 1 << 16;
