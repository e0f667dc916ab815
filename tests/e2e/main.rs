//! The real binary with real processes, from manifest to dashboard, broken in every way.

mod browser;
mod cluster;
mod commands;
mod emulated;
mod gpus;
mod recovery;
mod remote;
mod story;
