//! The node's bridge, veths, routes, sysctls and firewall.
//!
//! ```text
//!    pod ─eth0══wf…─┐
//!    pod ─eth0══wf…─┤ weft ── routes ── weft0 ▸ data path
//!                   │ bridge    │
//!       bridge weft │           ├── eth0 ▸ outside, masqueraded by inet weft
//!       checks who  │           │
//!       speaks      │        10.32.0.0/12  dev weft0 src 10.32.0.1     the universe
//!                   │        10.32.4.0/24  dev weft0 mtu 1300          a narrow path's range
//!                   │        10.32.0.0/24  unreachable                 what we own and nobody has
//!                   │        10.32.0.2     dev weft                    a pod
//! ```
//!
//! [`Desired`] says how it should be, [`Observed`] how it is, [`plan`] what to do about it; [`spawn`] keeps doing it.

mod apply;
mod desired;
mod firewall;
mod found;
mod listing;
mod observe;
mod observed;
mod plan;
mod reconcile;
mod task;
mod trouble;

#[cfg(test)]
mod model;
#[cfg(test)]
mod netns;

pub use desired::{Bridge, Desired, PodPort, Tun};
pub use firewall::Firewall;
pub use found::FOUND;
pub use observed::{Observed, Veth};
pub use plan::{Change, plan, teardown};
pub use reconcile::{look, remove};
pub use task::{Handle, LinksError, Status, spawn};
