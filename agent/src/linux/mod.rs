//! Thin, safe kernel calls. The only place for `unsafe`.
#![allow(unsafe_code)]

#[cfg(feature = "agent")]
pub mod inotify;
#[cfg(feature = "agent")]
pub mod memory;
pub mod netlink;
pub mod netns;
#[cfg(feature = "agent")]
pub mod nft;
#[cfg(feature = "agent")]
pub mod privileges;
#[cfg(feature = "agent")]
pub mod seqpacket;
#[cfg(feature = "agent")]
pub mod store;
pub mod sysctl;
#[cfg(feature = "agent")]
pub mod tun;
#[cfg(feature = "agent")]
pub mod udp;
#[cfg(feature = "agent")]
pub mod wiping;
