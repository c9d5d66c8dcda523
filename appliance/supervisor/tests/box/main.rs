//! The daemon as its users meet it: over sockets, with real journals in temporary folders, killed, damaged and filled up.

mod agent;
mod away;
mod branches;
mod chrome;
mod crash;
mod damage;
mod enrol;
mod face;
mod failback;
mod fencing;
mod full;
mod groups;
mod hostile;
mod ingest;
mod notices;
mod restores;
mod standby;
mod support;
mod takeovers;
